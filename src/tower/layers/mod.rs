//! The layers of the towers, each with its forward pass and its vector-Jacobian product.
//!
//! None forms a gradient of its weights. Weights stay in the dtype they are loaded in; on the CPU,
//! which has no half-precision products worth using, they are widened to f32 as they are used and
//! activations are f32.

mod activation;
mod attention;
pub(crate) mod fused;
mod linear;
mod norm;
mod rotary;

pub use activation::Activation;
pub use attention::{Attention, AttentionTape, Places, Windows};
pub use linear::Linear;
pub use norm::{LayerNorm, Norm, RmsNorm};
pub use rotary::Rotary;

use candle_core::{DType, Device};

/// The dtype activations have when the weights are `weights`.
pub fn compute_dtype(device: &Device, weights: DType) -> DType {
    if device.is_cpu() { DType::F32 } else { weights }
}
