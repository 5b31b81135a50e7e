//! The layers of the towers, each with its forward pass and its vector-Jacobian product.
//!
//! None forms a gradient of its weights. Weights stay in the dtype they are loaded in; on the CPU,
//! which has no half-precision products worth using, they are widened to f32 as they are used and
//! activations are f32.
//!
//! On a CPU the row-wise operations are our own; any other device composes them of
//! candle's.

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

use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Device};

/// The dtype activations have when the weights are `weights`.
pub fn compute_dtype(device: &Device, weights: DType) -> DType {
    if on_host(device) { DType::F32 } else { weights }
}

static CPU_AS_DEVICE: AtomicBool = AtomicBool::new(false);

/// Whether what is on `device` is worked on as it suits a CPU: in f32, by fused operations, one
/// picture at a time.
pub(crate) fn on_host(device: &Device) -> bool {
    device.is_cpu() && !CPU_AS_DEVICE.load(Ordering::Relaxed)
}

/// From here on lets this process work on its CPU as on a GPU, or no longer: in the weights' dtype,
/// by candle's operations alone, several pictures at a time. For `tests/device.rs`, so that what a
/// GPU runs is tested without one.
#[doc(hidden)]
pub fn treat_cpu_as_device(yes: bool) {
    CPU_AS_DEVICE.store(yes, Ordering::Relaxed);
}
