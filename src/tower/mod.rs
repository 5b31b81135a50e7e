//! Vision towers with gradients.
//!
//! There is one implementation of each tower: mistral.rs serves it, the attacks differentiate it.
//! `forward` and `vjp` are written by hand, side by side, from plain tensor operations, so that a
//! gradient reaches the pixels (and the anchor) without forming those of the weights.
//!
//! A tower knows nothing of attacks or defences. It offers two places to put something in,
//! [`Inserts`]: a linear filter on the input picture and a mix on the first block's attention
//! output. [`crate::defense`] fills them.

pub mod clip;
pub mod layers;
pub(crate) mod open_clip;
mod packed;
pub mod qwen;
pub mod stem;
mod torch;
pub mod weights;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::Result;

/// How the products of a tower on a CPU multiply; sums are f32 in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// Factors rounded to bf16: twice as fast and half as large, for crafting. What it finds is to
    /// be judged in f32.
    Bf16,
}

/// What a tower is: its shapes and where its weights came from.
#[derive(Debug, Clone, PartialEq)]
pub struct TowerSpec {
    /// The kind of tower: `clip`, `qwen2_vl`, `qwen2_5_vl` or `qwen3_vl`.
    pub family: &'static str,
    /// Side of the square picture, in pixels; the shorter side where it is none.
    pub image_size: usize,
    /// Height and width of the picture, in pixels.
    pub picture: (usize, usize),
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Patches down and across.
    pub grid: (usize, usize),
    /// Whether token 0 is a class token.
    pub class_token: bool,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Number of blocks, L.
    pub blocks: usize,
    /// Attention heads per block.
    pub heads: usize,
    /// Width of the pooled embedding after the projection, where the checkpoint has one.
    pub projection: Option<usize>,
    /// What becomes of the patch tokens in a tower that merges them. Such towers take pictures of
    /// any size; what is said here of picture and grid is said of one.
    pub merge: Option<Merge>,
}

/// How a Qwen-VL tower hands its patch tokens to the language model.
#[derive(Debug, Clone, PartialEq)]
pub struct Merge {
    /// Patches down and across that become one token.
    pub side: usize,
    /// Width of such a token, that of the language model.
    pub width: usize,
    /// Blocks whose output is merged too, for the language model's early layers (DeepStack).
    pub deepstack: Vec<usize>,
}

impl TowerSpec {
    /// Tokens per picture, N: the patches and the class token.
    pub fn tokens(&self) -> usize {
        self.grid.0 * self.grid.1 + usize::from(self.class_token)
    }

    /// Tokens per picture that the language model reads of a tower that merges them, DeepStack's
    /// included.
    pub fn merged_tokens(&self) -> Option<usize> {
        let merge = self.merge.as_ref()?;
        Some(self.grid.0 * self.grid.1 / merge.side.pow(2).max(1) * (1 + merge.deepstack.len()))
    }
}

/// A linear filter on pictures, put in front of the tower.
pub trait InputFilter: Send + Sync {
    /// Filters pixels `(B, 3, H, W)` f32 in [0, 1].
    fn apply(&self, pixels: &Tensor) -> Result<Tensor>;
    /// The transpose of [`InputFilter::apply`]: takes a gradient back through the filter.
    fn adjoint(&self, gradient: &Tensor) -> Result<Tensor>;
}

/// A mix on the attention output of the first block, after its output projection and before the
/// residual addition.
pub trait AttentionMix: Send + Sync {
    /// Whether the result depends on the attention output at all. Where it does not, the tower
    /// skips the first block's attention.
    fn needs_attention(&self) -> bool;
    /// The mixed output. `attention` is `(B, N, D)`, `None` where it is not needed; `batch` is B.
    fn apply(&self, attention: Option<&Tensor>, batch: usize, dtype: DType) -> Result<Tensor>;
    /// From the gradient `(B, N, D)` at the mixed output: the gradient at the attention output
    /// `(B, N, D)`, where it is needed.
    fn vjp_attention(&self, gradient: &Tensor) -> Result<Option<Tensor>>;
    /// From the gradient `(B, N, D)` at the mixed output: the gradient `(N, D)` f32 of the anchor,
    /// summed over the batch.
    fn vjp_anchor(&self, gradient: &Tensor) -> Result<Tensor>;
}

/// What is put into a tower. Empty is the undefended tower, bit for bit.
#[derive(Clone, Default)]
pub struct Inserts {
    /// On the picture, before normalisation.
    pub input: Option<Arc<dyn InputFilter>>,
    /// On the first block's attention output.
    pub attention: Option<Arc<dyn AttentionMix>>,
}

/// What is put into a tower that takes pictures of any size.
pub trait GridInserts: Send + Sync {
    /// For pictures of so many patches down and across. What is mixed into the attention output has
    /// its rows patch by patch, row by row of the picture.
    fn at(&self, grid: (usize, usize)) -> Result<Inserts>;
}

/// Which outputs a forward pass computes; blocks behind the last one asked for are not run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Want {
    /// Hidden states by block number: 0 is the input of block 1, k the output of block k.
    pub hidden: Vec<usize>,
    /// The pooled embedding.
    pub pooled: bool,
    /// What the language model reads, merged embeddings and DeepStack features, of a tower that
    /// merges its tokens.
    pub merged: bool,
}

impl Want {
    /// The hidden state after `block` alone.
    pub fn hidden(block: usize) -> Self {
        Self { hidden: vec![block], ..Self::default() }
    }

    /// Every hidden state, and the pooled or the merged embeddings.
    pub fn everything(spec: &TowerSpec) -> Self {
        let merged = spec.merge.is_some();
        Self { hidden: (0..=spec.blocks).collect(), pooled: !merged, merged }
    }

    /// The pooled embedding alone.
    pub fn pooled() -> Self {
        Self { pooled: true, ..Self::default() }
    }

    /// What the language model reads alone.
    pub fn merged() -> Self {
        Self { merged: true, ..Self::default() }
    }

    /// The last block to run.
    pub(crate) fn last_block(&self, blocks: usize) -> usize {
        if self.pooled || self.merged { blocks } else { self.hidden.iter().copied().max().unwrap_or(0) }
    }
}

/// The outputs of a forward pass.
#[derive(Debug, Clone, Default)]
pub struct Features {
    /// `(B, N, D)` per entry of [`Want::hidden`], in that order.
    pub hidden: Vec<Tensor>,
    /// The class token after the final norm, `(B, D)`, if asked for.
    pub pooled: Option<Tensor>,
    /// `pooled` after the projection, `(B, projection)`, where the checkpoint has one.
    pub embeds: Option<Tensor>,
    /// The merged embeddings, `(B, N / side^2, width)` with [`Merge::side`] and [`Merge::width`],
    /// row by row of the picture, if asked for.
    pub merged: Option<Tensor>,
    /// DeepStack's features, of the same shape, one per entry of [`Merge::deepstack`], where
    /// `merged` is asked for.
    pub deepstack: Vec<Tensor>,
}

/// Gradients of a scalar with respect to the outputs of a forward pass.
#[derive(Debug, Clone, Default)]
pub struct Cotangent {
    /// By block number, each `(B, N, D)`.
    pub hidden: Vec<(usize, Tensor)>,
    /// At [`Features::pooled`], `(B, D)`.
    pub pooled: Option<Tensor>,
    /// At [`Features::embeds`], `(B, projection)`.
    pub embeds: Option<Tensor>,
    /// At [`Features::merged`].
    pub merged: Option<Tensor>,
    /// At [`Features::deepstack`], by the number of the entry.
    pub deepstack: Vec<(usize, Tensor)>,
}

/// Which gradients `vjp` forms. Those of the weights never are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wrt {
    /// With respect to the pixels.
    pub pixels: bool,
    /// With respect to the anchor. Alone, it stops at block 1 and skips the patch embedding.
    pub anchor: bool,
}

/// The result of a `vjp`.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// `(B, 3, H, W)` f32, with respect to the pixels in [0, 1], if asked for.
    pub pixels: Option<Tensor>,
    /// `(N, D)` f32, with respect to the anchor and summed over the batch, if asked for.
    pub anchor: Option<Tensor>,
}

/// A vision tower: the one thing that serving, attacking, training and analysis see.
pub trait VisionTower: Send + Sync {
    /// What a forward pass keeps for [`VisionTower::vjp`].
    type Tape;

    /// The tower's shapes.
    fn spec(&self) -> &TowerSpec;

    /// The device its weights are on.
    fn device(&self) -> &Device;

    /// The most pictures to give it at once where the caller does not say: on a CPU as many as
    /// leave a picture's result independent of its batch, which is 1 unless the tower knows better;
    /// elsewhere as many as keep the device busy, and a picture's last bits depend on its batch.
    fn batch(&self) -> usize {
        if layers::on_host(self.device()) { 1 } else { device_batch(self.spec().tokens()) }
    }

    /// Runs pixels `(B, 3, H, W)` f32 in [0, 1] through the tower.
    ///
    /// # Errors
    /// If the pixels have another shape than the tower's, or a block asked for does not exist.
    fn forward(&self, pixels: &Tensor, want: &Want) -> Result<Features>;

    /// As [`VisionTower::forward`], and keeps what the gradient needs.
    fn forward_tape(&self, pixels: &Tensor, want: &Want) -> Result<(Features, Self::Tape)>;

    /// The vector-Jacobian product: takes `cotangent` back to the pixels and the anchor.
    ///
    /// # Errors
    /// If a cotangent is given for an output the tape does not reach, or the gradient of an
    /// anchor is asked for where none is put in.
    fn vjp(&self, tape: &Self::Tape, cotangent: &Cotangent, wrt: Wrt) -> Result<Gradients>;
}

/// Tokens that go through a tower together on a GPU: 32 pictures of ViT-L/14 at 336 pixels, whose
/// gradient needs 10 GB in bf16 and 20 GB in f32, and fewer larger ones.
const DEVICE_TOKENS: usize = 32 * 577;

/// Pictures of so many tokens that go through a tower together on a GPU.
pub(crate) fn device_batch(tokens: usize) -> usize {
    (DEVICE_TOKENS / tokens.max(1)).clamp(1, 256)
}

/// A frozen tower that something can be put into.
pub trait Insertable: VisionTower + Clone {
    /// The same tower, weights shared, with other things put in.
    fn with(&self, inserts: Inserts) -> Self;

    /// The first block's attention output `(B, N, D)` for `pixels` `(B, 3, H, W)`, with nothing
    /// put in: MHSA(Embed(x)) of the paper's Eq. 6 and 7.
    ///
    /// # Errors
    /// If the pixels have another shape than the tower's.
    fn first_attention(&self, pixels: &Tensor) -> Result<Tensor>;

    /// SHA-256 over the weights that an anchor depends on, the embedding and the first block, each
    /// as its name and its values; these are rounded to f16 first, so that the same weights stored
    /// in f32 and in f16 have one fingerprint.
    ///
    /// # Errors
    /// If the device fails.
    fn fingerprint(&self) -> Result<String>;

    /// The dtype the weights are held in.
    fn dtype(&self) -> DType;

    /// How a packed tower multiplies; `None` for one that is not packed.
    fn precision(&self) -> Option<Precision> {
        None
    }
}

impl<T: VisionTower> VisionTower for &T {
    type Tape = T::Tape;

    fn spec(&self) -> &TowerSpec {
        (**self).spec()
    }

    fn device(&self) -> &Device {
        (**self).device()
    }

    fn batch(&self) -> usize {
        (**self).batch()
    }

    fn forward(&self, pixels: &Tensor, want: &Want) -> Result<Features> {
        (**self).forward(pixels, want)
    }

    fn forward_tape(&self, pixels: &Tensor, want: &Want) -> Result<(Features, Self::Tape)> {
        (**self).forward_tape(pixels, want)
    }

    fn vjp(&self, tape: &Self::Tape, cotangent: &Cotangent, wrt: Wrt) -> Result<Gradients> {
        (**self).vjp(tape, cotangent, wrt)
    }
}
