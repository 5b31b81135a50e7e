//! CLIP's vision transformer, as in LLaVA-1.5 and LLaVA-NeXT.
//!
//! After transformers 5.23 `models/clip/modeling_clip.py` (`CLIPVisionTransformer`): a strided
//! patch embedding without bias, a class token, learnt positions, a norm before the first block
//! (spelt `pre_layrnorm` in checkpoints), pre-norm blocks, and a norm on the class token.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use candle_core::{D, DType, Device, IndexOp, Tensor};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::layers::{Activation, Attention, AttentionTape, LayerNorm, Linear, on_host};
use super::packed::{self, Engine, Outside};
use super::stem::{self, Embedding, VisionWeights};
use super::weights::{Checkpoint, Weights};
use super::{
    Cotangent, Features, Gradients, Insertable, Inserts, Precision, TowerSpec, VisionTower, Want, Wrt,
    device_batch,
};
use crate::{Error, Result};

/// The vision part of a `config.json`. Defaults are those of transformers' `CLIPVisionConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads per block.
    pub num_attention_heads: usize,
    /// Side of the square picture, in pixels.
    pub image_size: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// The MLP's activation by name.
    pub hidden_act: String,
    /// Added to the variance in every norm.
    pub layer_norm_eps: f64,
    /// Width of the joint embedding; used where the checkpoint has `visual_projection`.
    pub projection_dim: usize,
    /// `clip_vision_model`, or empty in old files.
    pub model_type: String,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            projection_dim: 512,
            model_type: String::new(),
        }
    }
}

impl ClipConfig {
    /// From the text of a `config.json`: a CLIP model's or a LLaVA's (`vision_config`), or that of
    /// a vision model alone. `file` is named in errors.
    ///
    /// # Errors
    /// If the file is no JSON, is of a model without a CLIP tower, or has impossible numbers.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let json: serde_json::Value =
            serde_json::from_str(text).map_err(|e| Error::config(file, e.to_string()))?;
        let nested = json.get("vision_config").filter(|v| v.is_object());
        let mut config = Self::deserialize(nested.unwrap_or(&json))
            .map_err(|e| Error::config(file, format!("vision_config: {e}")))?;
        if let Some(dim) = json.get("projection_dim").and_then(|v| v.as_u64()).filter(|_| nested.is_some()) {
            config.projection_dim = dim as usize;
        }
        if !matches!(config.model_type.as_str(), "" | "clip_vision_model" | "clip") {
            let found = &config.model_type;
            return Err(Error::config(
                file,
                format!("expected a clip_vision_model as vision tower, found `{found}`"),
            ));
        }
        config.check(file)?;
        Ok(config)
    }

    /// The shapes of the tower this describes, whose checkpoint is taken to have no projection.
    pub fn spec(&self) -> TowerSpec {
        let side = self.image_size / self.patch_size.max(1);
        TowerSpec {
            family: "clip",
            image_size: self.image_size,
            picture: (self.image_size, self.image_size),
            patch_size: self.patch_size,
            grid: (side, side),
            class_token: true,
            hidden: self.hidden_size,
            blocks: self.num_hidden_layers,
            heads: self.num_attention_heads,
            projection: None,
            merge: None,
        }
    }

    pub(super) fn check(&self, file: &Path) -> Result<()> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("image_size", self.image_size),
            ("patch_size", self.patch_size),
            ("projection_dim", self.projection_dim),
        ];
        for (name, value) in sizes {
            if value == 0 || value > 1 << 20 {
                return Err(Error::config(file, format!("{name} is {value}, expected 1 to 2^20")));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let (d, h) = (self.hidden_size, self.num_attention_heads);
            return Err(Error::config(
                file,
                format!("hidden_size {d} is not a multiple of num_attention_heads {h}"),
            ));
        }
        if self.patch_size > self.image_size {
            let (p, s) = (self.patch_size, self.image_size);
            return Err(Error::config(file, format!("patch_size {p} is larger than image_size {s}")));
        }
        Activation::from_config(&self.hidden_act).map_err(|e| Error::config(file, e.to_string()))?;
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// What of a block makes its queries, keys and values, and its attention output of them.
#[derive(Debug, Clone)]
pub struct BlockParts {
    /// The norm before attention.
    pub norm1: LayerNorm,
    /// The projections.
    pub attention: Attention,
}

/// A part of the tower, as [`Clip::with_parts`] takes them from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// All before block 1: normalisation, patch embedding, class token, positions and the norm.
    Embedding,
    /// A block's attention with the norm before it; blocks count from 1.
    Attention(usize),
    /// A block's MLP with the norm before it; blocks count from 1.
    Mlp(usize),
    /// All after the last block: the norm on the class token and the projection.
    Output,
}

impl Part {
    /// The parts of a tower, in the order a picture passes them.
    pub fn all(blocks: usize) -> Vec<Self> {
        let inner = (1..=blocks).flat_map(|i| [Self::Attention(i), Self::Mlp(i)]);
        std::iter::once(Self::Embedding).chain(inner).chain([Self::Output]).collect()
    }
}

/// `emb`, `b1-attn`, `b1-mlp`, `out`.
impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Embedding => f.write_str("emb"),
            Self::Attention(block) => write!(f, "b{block}-attn"),
            Self::Mlp(block) => write!(f, "b{block}-mlp"),
            Self::Output => f.write_str("out"),
        }
    }
}

/// CLIP's vision transformer with what is put into it.
#[derive(Clone)]
pub struct Clip {
    spec: TowerSpec,
    device: Device,
    dtype: DType,
    activation: Activation,
    /// `(1, 3, 1, 1)` f32.
    mean: Tensor,
    /// `(1, 3, 1, 1)` f32, 1 / std.
    inverse_std: Tensor,
    /// `(D, 3 P P)`.
    patches: Linear,
    class: Tensor,
    positions: Tensor,
    pre_norm: LayerNorm,
    /// Empty where they are packed.
    blocks: Vec<Block>,
    post_norm: LayerNorm,
    projection: Option<Linear>,
    inserts: Inserts,
    packed: Option<Arc<dyn Engine>>,
}

/// What a block's gradient needs.
struct BlockTape {
    /// The block's input.
    input: Tensor,
    /// `None` in block 1 where the mix does not need the attention output.
    attention: Option<AttentionTape>,
    /// The residual stream between attention and MLP.
    middle: Tensor,
    /// The MLP before its activation.
    up: Tensor,
}

/// What [`Clip::forward_tape`] keeps: per block the input, queries, keys, values, the stream
/// between attention and MLP, and the MLP's inner layer; nine numbers per token and channel.
pub struct ClipTape {
    batch: usize,
    /// The input of the norm before block 1.
    embedded: Tensor,
    blocks: Vec<BlockTape>,
    /// The class token after the last block, where the pooled embedding was asked for.
    class: Option<Tensor>,
    /// Of a packed tower, which keeps nothing above.
    packed: Option<packed::Tape>,
}

impl Clip {
    /// Builds the tower from weights named as below CLIP's `vision_model.` prefix.
    ///
    /// `mean` and `std` normalise pixels in [0, 1]. `projection` is where `visual_projection`
    /// lies, for checkpoints that have one. Weights keep the dtype they are given in.
    ///
    /// # Errors
    /// If a weight is missing or has another shape than `config` says.
    pub fn new(
        config: &ClipConfig,
        weights: &dyn Weights,
        projection: Option<&dyn Weights>,
        mean: [f32; 3],
        std: [f32; 3],
    ) -> Result<Self> {
        let (d, p) = (config.hidden_size, config.patch_size);
        let side = config.image_size / p;
        let tokens = side * side + 1;
        let norm = |name: &str| stem::norm(weights, name, d, config.layer_norm_eps);
        let linear = |name: &str, rows: usize, columns: usize| stem::linear(weights, name, rows, columns);
        let patches = weights.get("embeddings.patch_embedding.weight", &[d, 3, p, p])?;
        let device = patches.device().clone();
        let dtype = patches.dtype();
        let blocks = (0..config.num_hidden_layers)
            .map(|i| {
                let at = |part: &str| format!("encoder.layers.{i}.{part}");
                Ok(Block {
                    norm1: norm(&at("layer_norm1"))?,
                    attention: stem::attention(
                        weights,
                        &format!("encoder.layers.{i}"),
                        d,
                        config.num_attention_heads,
                    )?,
                    norm2: norm(&at("layer_norm2"))?,
                    fc1: linear(&at("mlp.fc1"), config.intermediate_size, d)?,
                    fc2: linear(&at("mlp.fc2"), d, config.intermediate_size)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let projection = projection
            .filter(|w| w.contains("visual_projection.weight"))
            .map(|w| w.get("visual_projection.weight", &[config.projection_dim, d]))
            .transpose()?
            .map(|weight| Linear::new(weight, None));
        Ok(Self {
            spec: TowerSpec { projection: projection.as_ref().map(Linear::out_features), ..config.spec() },
            dtype,
            activation: Activation::from_config(&config.hidden_act)?,
            mean: stem::channels(mean, &device)?,
            inverse_std: stem::channels(std.map(f32::recip), &device)?,
            patches: Linear::new(patches.reshape((d, 3 * p * p))?, None),
            class: weights.get("embeddings.class_embedding", &[d])?,
            positions: weights.get("embeddings.position_embedding.weight", &[tokens, d])?,
            // Misspelt in every checkpoint, up to transformers 5.23.
            pre_norm: norm("pre_layrnorm")?,
            blocks,
            post_norm: norm("post_layernorm")?,
            projection,
            inserts: Inserts::default(),
            packed: None,
            device,
        })
    }

    /// Loads the tower of a model folder: a CLIP, a CLIP vision model or a LLaVA, in the key
    /// layouts of transformers 4 and 5, or a CLIP in OpenAI's and OpenCLIP's names.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the checkpoint has no CLIP vision tower.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &ClipConfig,
        mean: [f32; 3],
        std: [f32; 3],
        device: &Device,
    ) -> Result<Self> {
        let weights = VisionWeights::find(checkpoint, device)?;
        weights.check_design()?;
        Self::new(config, &weights, Some(&weights), mean, std)
    }

    /// The same tower, weights shared, with other things put in.
    pub fn with(&self, inserts: Inserts) -> Self {
        Self { inserts, ..self.clone() }
    }

    /// The same tower with its blocks' weights laid out for fast products on this CPU; the tensors
    /// they came from go where no one else holds them. A picture's result is then the same to the
    /// bit in any batch, whose size [`VisionTower::batch`] suggests.
    ///
    /// It takes a processor with AVX-512 and its bf16 products, and a width that is a multiple of
    /// 32. Elsewhere [`Precision::F32`] changes nothing and [`Precision::Bf16`] is
    /// [`Clip::to_dtype`]: weights rounded to bf16, products in the device's own way, on a CPU f32.
    pub fn packed(self, precision: Precision) -> Result<Self> {
        if self.precision() == Some(precision) {
            return Ok(self);
        }
        if !on_host(&self.device) || !packed::supported(&self.spec) {
            return match precision {
                Precision::F32 => Ok(self),
                Precision::Bf16 => self.to_dtype(DType::BF16),
            };
        }
        let mut tower = self;
        let blocks = match tower.packed {
            Some(_) => tower.plain_blocks()?.into_owned(),
            None => std::mem::take(&mut tower.blocks),
        };
        let outside = Outside {
            spec: &tower.spec,
            activation: tower.activation,
            mean: &tower.mean,
            inverse_std: &tower.inverse_std,
            patches: &tower.patches,
            class: &tower.class,
            positions: &tower.positions,
            pre_norm: &tower.pre_norm,
            post_norm: &tower.post_norm,
            projection: tower.projection.as_ref(),
        };
        let blocks = blocks.into_iter().map(|block| packed::Block {
            norm1: block.norm1,
            q: block.attention.q,
            k: block.attention.k,
            v: block.attention.v,
            out: block.attention.out,
            norm2: block.norm2,
            fc1: block.fc1,
            fc2: block.fc2,
        });
        tower.packed = Some(packed::pack(outside, blocks, precision)?);
        Ok(tower)
    }

    /// How a packed tower multiplies; `None` for one that is not packed.
    pub fn precision(&self) -> Option<Precision> {
        self.packed.as_ref().map(|packed| packed.precision())
    }

    /// The blocks, unpacked where they are packed.
    fn plain_blocks(&self) -> Result<Cow<'_, [Block]>> {
        match &self.packed {
            None => Ok(Cow::Borrowed(&self.blocks)),
            Some(_) => {
                (0..self.spec.blocks).map(|i| self.plain_block(i)).collect::<Result<Vec<_>>>().map(Cow::Owned)
            }
        }
    }

    /// Block `i`.
    fn plain_block(&self, i: usize) -> Result<Block> {
        let missing = || Error::argument("block", format!("one of {}", self.spec.blocks), i);
        let Some(packed) = &self.packed else {
            return self.blocks.get(i).cloned().ok_or_else(missing);
        };
        let block = packed.block(i)?;
        Ok(Block {
            norm1: block.norm1,
            attention: Attention {
                q: block.q,
                k: block.k,
                v: block.v,
                out: block.out,
                heads: self.spec.heads,
            },
            norm2: block.norm2,
            fc1: block.fc1,
            fc2: block.fc2,
        })
    }

    /// The parts of block `i`, counted from 0, that read hidden state `i`; unpacked where the tower
    /// is packed, which copies them.
    ///
    /// # Errors
    /// If there is no such block.
    pub fn block_parts(&self, i: usize) -> Result<BlockParts> {
        let block = self.plain_block(i)?;
        Ok(BlockParts { norm1: block.norm1, attention: block.attention })
    }

    /// The same tower with some of its parts another's, of the same shapes; not packed, weights
    /// shared with both. Without parts it is this tower, with all of them the other, bit for bit.
    ///
    /// # Errors
    /// If the towers differ in shapes, activation, device or dtype, or there is no such block.
    pub fn with_parts(&self, other: &Self, parts: &[Part]) -> Result<Self> {
        let mut ours = self.spec.clone();
        // The projection's width is a shape as well, if it is to be exchanged.
        if !parts.contains(&Part::Output) {
            ours.projection = other.spec.projection;
        }
        for (what, same) in [
            ("shapes", ours == other.spec),
            ("activation", self.activation == other.activation),
            ("dtype", self.dtype == other.dtype),
            ("device", self.device.same_device(&other.device)),
        ] {
            if !same {
                let expected = format!("a tower of the same {what} as the one it goes into");
                return Err(Error::argument("parts", expected, "another"));
            }
        }
        let mut tower = Self { blocks: self.plain_blocks()?.into_owned(), packed: None, ..self.clone() };
        for part in parts {
            match *part {
                Part::Embedding => {
                    tower.mean = other.mean.clone();
                    tower.inverse_std = other.inverse_std.clone();
                    tower.patches = other.patches.clone();
                    tower.class = other.class.clone();
                    tower.positions = other.positions.clone();
                    tower.pre_norm = other.pre_norm.clone();
                }
                Part::Attention(block) | Part::Mlp(block) => {
                    let missing = || Error::argument("part", "a part of this tower", part);
                    let i = block.checked_sub(1).ok_or_else(missing)?;
                    let from = other.plain_block(i).map_err(|_| missing())?;
                    let own = tower.blocks.get_mut(i).ok_or_else(missing)?;
                    if let Part::Attention(_) = part {
                        (own.norm1, own.attention) = (from.norm1, from.attention);
                    } else {
                        (own.norm2, own.fc1, own.fc2) = (from.norm2, from.fc1, from.fc2);
                    }
                }
                Part::Output => {
                    tower.post_norm = other.post_norm.clone();
                    tower.projection = other.projection.clone();
                }
            }
        }
        Ok(tower)
    }

    /// The patch embedding's weight as a convolution's, `(D, 3, P, P)`.
    pub fn patch_embedding(&self) -> Result<Tensor> {
        let (d, p) = (self.spec.hidden, self.spec.patch_size);
        Ok(self.patches.weight().reshape((d, 3, p, p))?)
    }

    /// The norm that the class token goes through at the end.
    pub fn post_norm(&self) -> &LayerNorm {
        &self.post_norm
    }

    /// What makes an embedding of the class token, where the checkpoint has it.
    pub fn projection(&self) -> Option<&Linear> {
        self.projection.as_ref()
    }

    /// The same tower, not packed, with its weights held in `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let cast = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(dtype)?) };
        let norm = |layer: &LayerNorm| layer.map(cast);
        let linear = |layer: &Linear| layer.map(cast);
        let blocks = self.plain_blocks()?;
        let blocks = blocks.iter().map(|block| {
            Ok(Block {
                norm1: norm(&block.norm1)?,
                attention: Attention {
                    q: linear(&block.attention.q)?,
                    k: linear(&block.attention.k)?,
                    v: linear(&block.attention.v)?,
                    out: linear(&block.attention.out)?,
                    heads: block.attention.heads,
                },
                norm2: norm(&block.norm2)?,
                fc1: linear(&block.fc1)?,
                fc2: linear(&block.fc2)?,
            })
        });
        Ok(Self {
            dtype,
            patches: linear(&self.patches)?,
            class: cast(&self.class)?,
            positions: cast(&self.positions)?,
            pre_norm: norm(&self.pre_norm)?,
            blocks: blocks.collect::<Result<_>>()?,
            post_norm: norm(&self.post_norm)?,
            projection: self.projection.as_ref().map(linear).transpose()?,
            packed: None,
            ..self.clone()
        })
    }

    /// The dtype the weights are held in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// What is put in.
    pub fn inserts(&self) -> &Inserts {
        &self.inserts
    }

    /// The tower's tensors under transformers' names, below `vision_model.`.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = vec![
            ("embeddings.class_embedding".to_string(), self.class.clone()),
            ("embeddings.patch_embedding.weight".to_string(), self.patch_embedding()?),
            ("embeddings.position_embedding.weight".to_string(), self.positions.clone()),
        ];
        let norm = |all: &mut Vec<(String, Tensor)>, name: String, layer: &LayerNorm| {
            all.push((format!("{name}.weight"), layer.weight().clone()));
            all.push((format!("{name}.bias"), layer.bias().clone()));
        };
        let linear = |all: &mut Vec<(String, Tensor)>, name: String, layer: &Linear| {
            all.push((format!("{name}.weight"), layer.weight().clone()));
            all.extend(layer.bias().map(|bias| (format!("{name}.bias"), bias.clone())));
        };
        norm(&mut all, "pre_layrnorm".into(), &self.pre_norm);
        for (i, block) in self.plain_blocks()?.iter().enumerate() {
            let at = |part: &str| format!("encoder.layers.{i}.{part}");
            norm(&mut all, at("layer_norm1"), &block.norm1);
            linear(&mut all, at("self_attn.q_proj"), &block.attention.q);
            linear(&mut all, at("self_attn.k_proj"), &block.attention.k);
            linear(&mut all, at("self_attn.v_proj"), &block.attention.v);
            linear(&mut all, at("self_attn.out_proj"), &block.attention.out);
            norm(&mut all, at("layer_norm2"), &block.norm2);
            linear(&mut all, at("mlp.fc1"), &block.fc1);
            linear(&mut all, at("mlp.fc2"), &block.fc2);
        }
        norm(&mut all, "post_layernorm".into(), &self.post_norm);
        Ok(all)
    }

    /// SHA-256 over what an anchor depends on: class token, patch embedding, positions, pre-norm
    /// and the first block, each as its name and its values as little-endian f32.
    ///
    /// Values are rounded to f16 first, so that the same weights stored in f32 and in f16 (as
    /// CLIP's and LLaVA's checkpoints of one encoder are) have one fingerprint.
    pub fn fingerprint(&self) -> Result<String> {
        fingerprint(self.tensors()?.into_iter().filter(|(name, _)| in_trunk(name)).map(Ok))
    }

    /// The first block's attention output `(B, N, D)` for `pixels` `(B, 3, H, W)`, with nothing
    /// put in: MHSA(Embed(x)) of the paper's Eq. 6 and 7.
    pub fn first_attention(&self, pixels: &Tensor) -> Result<Tensor> {
        self.check_pixels(pixels)?;
        let stream = self.pre_norm.forward(&self.embed(pixels)?)?;
        let block = self.plain_block(0)?;
        Ok(block.attention.forward(&block.norm1.forward(&stream)?)?.0)
    }

    fn check_pixels(&self, pixels: &Tensor) -> Result<usize> {
        let side = self.spec.image_size;
        match *pixels.dims() {
            [batch, 3, height, width] if batch > 0 && height == side && width == side => {}
            _ => {
                let found = format!("{:?}", pixels.dims());
                return Err(Error::argument("pixels", format!("shape [B, 3, {side}, {side}]"), found));
            }
        }
        if pixels.dtype() != DType::F32 {
            return Err(Error::argument("pixels", "f32 in [0, 1]", format!("{:?}", pixels.dtype())));
        }
        Ok(pixels.dim(0)?)
    }

    /// Normalised pixels to patches and positions, `(B, N, D)`, before the pre-norm.
    fn embed(&self, pixels: &Tensor) -> Result<Tensor> {
        let embedding = Embedding {
            spec: &self.spec,
            dtype: self.dtype,
            mean: &self.mean,
            inverse_std: &self.inverse_std,
            patches: &self.patches,
            class: &self.class,
            positions: &self.positions,
        };
        embedding.forward(pixels)
    }

    /// The gradient at [`Clip::embed`]'s result to that at its pixels.
    fn embed_vjp(&self, gradient: &Tensor) -> Result<Tensor> {
        let batch = gradient.dim(0)?;
        let (rows, columns) = self.spec.grid;
        let (p, side) = (self.spec.patch_size, self.spec.image_size);
        let patches = self.patches.vjp(&gradient.i((.., 1.., ..))?.contiguous()?)?;
        let pixels = patches
            .to_dtype(DType::F32)?
            .reshape(&[batch, rows, columns, 3, p, p][..])?
            .permute([0, 3, 1, 4, 2, 5])?
            .reshape((batch, 3, rows * p, columns * p))?;
        let pixels =
            pixels.pad_with_zeros(2, 0, side - rows * p)?.pad_with_zeros(3, 0, side - columns * p)?;
        Ok(pixels.broadcast_mul(&self.inverse_std)?)
    }

    fn run(&self, pixels: &Tensor, want: &Want, mut tape: Option<&mut ClipTape>) -> Result<Features> {
        let batch = self.check_pixels(pixels)?;
        if let Some(&block) = want.hidden.iter().find(|&&block| block > self.spec.blocks) {
            return Err(Error::argument("block", format!("0 to {}", self.spec.blocks), block));
        }
        if want.merged {
            return Err(Error::argument("feature", "one that the tower has", "merged embeddings"));
        }
        if let Some(packed) = &self.packed {
            let (features, kept) = packed.forward(pixels, want, &self.inserts, tape.is_some())?;
            if let Some(tape) = tape {
                tape.packed = kept;
            }
            return Ok(features);
        }
        let filtered = match &self.inserts.input {
            Some(filter) => filter.apply(pixels)?,
            None => pixels.clone(),
        };
        let embedded = self.embed(&filtered)?;
        let mut stream = self.pre_norm.forward(&embedded)?;
        let mut hidden: Vec<Option<Tensor>> = vec![None; want.hidden.len()];
        let mut keep = |block: usize, stream: &Tensor| {
            for (slot, _) in hidden.iter_mut().zip(&want.hidden).filter(|(_, wanted)| **wanted == block) {
                *slot = Some(stream.clone());
            }
        };
        keep(0, &stream);
        if let Some(tape) = tape.as_deref_mut() {
            tape.batch = batch;
            tape.embedded = embedded;
        }
        for (i, block) in self.blocks.iter().take(want.last_block(self.spec.blocks)).enumerate() {
            let mix = self.inserts.attention.as_ref().filter(|_| i == 0);
            let (attention, attention_tape) = if mix.is_none_or(|mix| mix.needs_attention()) {
                let (attention, tape) = block.attention.forward(&block.norm1.forward(&stream)?)?;
                (Some(attention), Some(tape))
            } else {
                (None, None)
            };
            let attention = match (mix, attention) {
                (Some(mix), attention) => mix.apply(attention.as_ref(), batch, stream.dtype())?,
                (None, Some(attention)) => attention,
                (None, None) => return Err(Error::Unsupported("attention skipped without a mix".into())),
            };
            let middle = (&stream + attention)?;
            let up = block.fc1.forward(&block.norm2.forward(&middle)?)?;
            let output = (&middle + block.fc2.forward(&self.activation.forward(&up)?)?)?;
            if let Some(tape) = tape.as_deref_mut() {
                tape.blocks.push(BlockTape { input: stream, attention: attention_tape, middle, up });
            }
            stream = output;
            keep(i + 1, &stream);
        }
        let (mut pooled, mut embeds) = (None, None);
        if want.pooled {
            let class = stream.i((.., 0, ..))?.contiguous()?;
            let normal = self.post_norm.forward(&class)?;
            embeds = self.projection.as_ref().map(|projection| projection.forward(&normal)).transpose()?;
            pooled = Some(normal);
            if let Some(tape) = tape {
                tape.class = Some(class);
            }
        }
        let hidden = hidden.into_iter().flatten().collect();
        Ok(Features { hidden, pooled, embeds, ..Features::default() })
    }

    /// The gradient at the last block's output from those at the pooled outputs.
    fn pooled_vjp(&self, tape: &ClipTape, cotangent: &Cotangent) -> Result<Option<Tensor>> {
        let embeds = match (&cotangent.embeds, &self.projection) {
            (Some(gradient), Some(projection)) => Some(projection.vjp(gradient)?),
            (Some(_), None) => {
                return Err(Error::argument(
                    "cotangent",
                    "none at embeds: the tower has no projection",
                    "one",
                ));
            }
            (None, _) => None,
        };
        let Some(gradient) = add(cotangent.pooled.clone(), embeds)? else {
            return Ok(None);
        };
        let Some(class) = &tape.class else {
            return Err(Error::argument(
                "cotangent",
                "none at the pooled output: the tape stops before it",
                "one",
            ));
        };
        let class = self.post_norm.vjp(class, &gradient)?.unsqueeze(1)?;
        Ok(Some(class.pad_with_zeros(1, 0, self.spec.tokens() - 1)?))
    }

    fn block_vjp(&self, block: &Block, tape: &BlockTape, gradient: &Tensor) -> Result<Tensor> {
        let up = self.activation.vjp(&tape.up, &block.fc2.vjp(gradient)?)?;
        let middle = block.norm2.vjp(&tape.middle, &block.fc1.vjp(&up)?)?;
        Ok((gradient + middle)?)
    }
}

/// Tokens of a batch in a packed tower: with more, its products are no faster.
const ROWS: usize = 1024;

/// Bytes that programs can still have, where the system says (Linux).
fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes = line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?;
    Some(kilobytes.saturating_mul(1024))
}

impl VisionTower for Clip {
    type Tape = ClipTape;

    fn spec(&self) -> &TowerSpec {
        &self.spec
    }

    fn device(&self) -> &Device {
        &self.device
    }

    /// Of a packed tower enough for some thousand tokens, if a quarter of the memory that is
    /// free holds what their gradient needs.
    fn batch(&self) -> usize {
        match &self.packed {
            Some(packed) => {
                let most =
                    available_memory().map_or(usize::MAX, |free| free / 4 / packed.tape_bytes().max(1));
                ROWS.div_ceil(self.spec.tokens().max(1)).min(most).max(1)
            }
            None if on_host(&self.device) => 1,
            None => device_batch(self.spec.tokens()),
        }
    }

    fn forward(&self, pixels: &Tensor, want: &Want) -> Result<Features> {
        self.run(pixels, want, None)
    }

    fn forward_tape(&self, pixels: &Tensor, want: &Want) -> Result<(Features, ClipTape)> {
        let mut tape =
            ClipTape { batch: 0, embedded: pixels.clone(), blocks: Vec::new(), class: None, packed: None };
        let features = self.run(pixels, want, Some(&mut tape))?;
        Ok((features, tape))
    }

    fn vjp(&self, tape: &ClipTape, cotangent: &Cotangent, wrt: Wrt) -> Result<Gradients> {
        if cotangent.merged.is_some() || !cotangent.deepstack.is_empty() {
            let expected = "none at merged embeddings: the tower has none";
            return Err(Error::argument("cotangent", expected, "one"));
        }
        match (&self.packed, &tape.packed) {
            (Some(packed), Some(tape)) => return packed.vjp(tape, cotangent, wrt, &self.inserts),
            (None, None) => {}
            _ => return Err(Error::argument("tape", "one of this tower", "a tape of another")),
        }
        if let Some((block, _)) = cotangent.hidden.iter().find(|(block, _)| *block > tape.blocks.len()) {
            return Err(Error::argument(
                "cotangent",
                format!("blocks 0 to {} of this tape", tape.blocks.len()),
                block,
            ));
        }
        let at =
            |block: usize| cotangent.hidden.iter().filter(move |(b, _)| *b == block).map(|(_, g)| g.clone());
        let mut gradients = Gradients::default();
        let mut gradient = self.pooled_vjp(tape, cotangent)?;
        for (i, (block, tape)) in self.blocks.iter().zip(&tape.blocks).enumerate().rev() {
            for given in at(i + 1) {
                gradient = add(gradient, Some(given))?;
            }
            let Some(reached) = &gradient else { continue };
            let middle = self.block_vjp(block, tape, reached)?;
            let attention = match self.inserts.attention.as_ref().filter(|_| i == 0) {
                Some(mix) => {
                    if wrt.anchor {
                        gradients.anchor = Some(mix.vjp_anchor(&middle)?);
                    }
                    mix.vjp_attention(&middle)?
                }
                None => Some(middle.clone()),
            };
            if i == 0 && !wrt.pixels {
                break;
            }
            gradient = Some(match (attention, &tape.attention) {
                (Some(attention), Some(attention_tape)) => {
                    let normal = block.attention.vjp(attention_tape, &attention)?;
                    (&middle + block.norm1.vjp(&tape.input, &normal)?)?
                }
                _ => middle,
            });
        }
        if wrt.anchor && gradients.anchor.is_none() {
            let Some(_) = &self.inserts.attention else {
                return Err(Error::argument("wrt", "no anchor gradient: no anchor is put in", "one"));
            };
            // Only outputs before the anchor's place were differentiated.
            gradients.anchor =
                Some(Tensor::zeros((self.spec.tokens(), self.spec.hidden), DType::F32, &self.device)?);
        }
        if wrt.pixels {
            for given in at(0) {
                gradient = add(gradient, Some(given))?;
            }
            gradients.pixels = Some(match gradient {
                Some(gradient) => {
                    let filtered = self.embed_vjp(&self.pre_norm.vjp(&tape.embedded, &gradient)?)?;
                    match &self.inserts.input {
                        Some(filter) => filter.adjoint(&filtered)?,
                        None => filtered,
                    }
                }
                None => {
                    let side = self.spec.image_size;
                    Tensor::zeros((tape.batch, 3, side, side), DType::F32, &self.device)?
                }
            });
        }
        Ok(gradients)
    }
}

impl Insertable for Clip {
    fn with(&self, inserts: Inserts) -> Self {
        Clip::with(self, inserts)
    }

    fn first_attention(&self, pixels: &Tensor) -> Result<Tensor> {
        Clip::first_attention(self, pixels)
    }

    fn fingerprint(&self) -> Result<String> {
        Clip::fingerprint(self)
    }

    fn dtype(&self) -> DType {
        Clip::dtype(self)
    }

    fn precision(&self) -> Option<Precision> {
        Clip::precision(self)
    }
}

/// [`Clip::fingerprint`] of the tower in `checkpoint`, reading only what it covers.
///
/// # Errors
/// If the checkpoint has no CLIP vision tower, or one without the weights `config` asks for.
pub fn checkpoint_fingerprint(checkpoint: &Checkpoint, config: &ClipConfig) -> Result<String> {
    let weights = VisionWeights::find(checkpoint, &Device::Cpu)?;
    let (d, p, m) = (config.hidden_size, config.patch_size, config.intermediate_size);
    let side = config.image_size / p;
    let mut shapes = vec![
        ("embeddings.class_embedding".to_string(), vec![d]),
        ("embeddings.patch_embedding.weight".to_string(), vec![d, 3, p, p]),
        ("embeddings.position_embedding.weight".to_string(), vec![side * side + 1, d]),
    ];
    let layer = |name: &str, weight: Vec<usize>| {
        let bias = vec![weight.first().copied().unwrap_or(0)];
        [(format!("{name}.weight"), weight), (format!("{name}.bias"), bias)]
    };
    shapes.extend(layer("pre_layrnorm", vec![d]));
    shapes.extend(layer("encoder.layers.0.layer_norm1", vec![d]));
    for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
        shapes.extend(layer(&format!("encoder.layers.0.self_attn.{part}"), vec![d, d]));
    }
    shapes.extend(layer("encoder.layers.0.layer_norm2", vec![d]));
    shapes.extend(layer("encoder.layers.0.mlp.fc1", vec![m, d]));
    shapes.extend(layer("encoder.layers.0.mlp.fc2", vec![d, m]));
    fingerprint(shapes.into_iter().map(|(name, shape)| {
        let tensor = weights.get(&name, &shape)?;
        Ok((name, tensor))
    }))
}

/// Whether an anchor depends on this weight.
fn in_trunk(name: &str) -> bool {
    name.starts_with("embeddings.")
        || name.starts_with("pre_layrnorm.")
        || name.starts_with("encoder.layers.0.")
}

pub(super) fn fingerprint(tensors: impl Iterator<Item = Result<(String, Tensor)>>) -> Result<String> {
    let mut hash = Sha256::new();
    for named in tensors {
        let (name, tensor) = named?;
        let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        hash.update(name.as_bytes());
        hash.update([0]);
        let bytes: Vec<u8> =
            values.into_iter().flat_map(|v| half::f16::from_f32(v).to_f32().to_le_bytes()).collect();
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

pub(super) fn add(a: Option<Tensor>, b: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (a, b) {
        (Some(a), Some(b)) => Some((a + b)?),
        (a, b) => a.or(b),
    })
}

/// The block whose output LLaVA's `vision_feature_layer` names.
///
/// transformers counts the hidden states `[input, block 1, ..., block L]`, so -1 is block L and
/// LLaVA's -2 is block L - 1. (mistral.rs 0.8.1 takes block L for -2.)
///
/// # Errors
/// If there is no such hidden state.
pub fn feature_block(layer: i64, blocks: usize) -> Result<usize> {
    let states = blocks as i64 + 1;
    let index = if layer < 0 { layer + states } else { layer };
    if (0..states).contains(&index) {
        Ok(index as usize)
    } else {
        Err(Error::argument("vision_feature_layer", format!("{} to {blocks}", -states), layer))
    }
}

/// Drops the class token from `(B, N, D)`, as LLaVA's `vision_feature_select_strategy` `default`.
pub fn without_class_token(hidden: &Tensor) -> Result<Tensor> {
    let tokens = hidden.dim(D::Minus2)?;
    Ok(hidden.narrow(D::Minus2, 1, tokens - 1)?)
}
