//! CLIP's encoder for processors with AVX-512 and its bf16 products: the attack step, forward and
//! gradient at the pixels, with everything in the layout that the products want.
//!
//! Activations lie 16 tokens to a vector from the patches to the pooled embedding, so nothing is
//! packed, transposed or copied between the products; biases, activations and residuals are added
//! while a product's result is still in registers; weights lie once, in lines that serve forward
//! and backward; memory is used again from step to step. A picture's result has the same bits in
//! every batch and with every number of threads.

#[cfg(target_arch = "x86_64")]
mod attention;
#[cfg(target_arch = "x86_64")]
mod encoder;
#[cfg(target_arch = "x86_64")]
mod kernel;
#[cfg(target_arch = "x86_64")]
mod memory;
#[cfg(target_arch = "x86_64")]
mod rows;

use std::sync::Arc;

use candle_core::Tensor;

#[cfg(target_arch = "x86_64")]
pub(super) use encoder::Tape;

use super::layers::{Activation, LayerNorm, Linear};
use super::{Cotangent, Features, Gradients, Inserts, Precision, TowerSpec, Want, Wrt};
use crate::Result;

/// What a forward pass keeps: nothing where there is no encoder.
#[cfg(not(target_arch = "x86_64"))]
pub(super) enum Tape {}

/// An encoder of either precision.
pub(super) trait Engine: Send + Sync {
    /// How it multiplies.
    fn precision(&self) -> Precision;
    /// As [`super::VisionTower::forward_tape`], with a tape if `keep`. The pixels and blocks asked
    /// for are checked.
    fn forward(
        &self,
        pixels: &Tensor,
        want: &Want,
        inserts: &Inserts,
        keep: bool,
    ) -> Result<(Features, Option<Tape>)>;
    /// As [`super::VisionTower::vjp`].
    fn vjp(&self, tape: &Tape, cotangent: &Cotangent, wrt: Wrt, inserts: &Inserts) -> Result<Gradients>;
    /// The weights of block `i` again, f32; what bf16 has lost is lost.
    fn block(&self, i: usize) -> Result<Block>;
    /// Bytes that a tape keeps for one picture.
    fn tape_bytes(&self) -> usize;
}

/// A block's layers.
pub(super) struct Block {
    pub norm1: LayerNorm,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub out: Linear,
    pub norm2: LayerNorm,
    pub fc1: Linear,
    pub fc2: Linear,
}

/// What is outside the blocks, as [`super::clip::Clip`] has it.
pub(super) struct Outside<'a> {
    pub spec: &'a TowerSpec,
    pub activation: Activation,
    pub mean: &'a Tensor,
    pub inverse_std: &'a Tensor,
    pub patches: &'a Linear,
    pub class: &'a Tensor,
    pub positions: &'a Tensor,
    pub pre_norm: &'a LayerNorm,
    pub post_norm: &'a LayerNorm,
    pub projection: Option<&'a Linear>,
}

/// Whether there is an encoder for a tower of these shapes on this processor, which must have
/// AVX-512 with bf16 products: AMD's from Zen 4, Intel's server processors from Cooper Lake.
pub(super) fn supported(spec: &TowerSpec) -> bool {
    #[cfg(target_arch = "x86_64")]
    let processor = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let processor = false;
    processor && spec.hidden.is_multiple_of(32) && (spec.hidden / spec.heads.max(1)).is_multiple_of(2)
}

/// Packs a tower that is [`supported`]. The blocks are taken one after the other, so that what
/// they held can go meanwhile.
pub(super) fn pack(
    outside: Outside<'_>,
    blocks: impl Iterator<Item = Block>,
    precision: Precision,
) -> Result<Arc<dyn Engine>> {
    #[cfg(target_arch = "x86_64")]
    match precision {
        Precision::F32 => Ok(Arc::new(encoder::Encoder::<kernel::Single>::new(outside, blocks)?)),
        Precision::Bf16 => Ok(Arc::new(encoder::Encoder::<kernel::Brain>::new(outside, blocks)?)),
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        drop(blocks);
        let what = format!("{precision:?} products of packed weights for {:?}", outside.spec);
        Err(crate::Error::Unsupported(what))
    }
}
