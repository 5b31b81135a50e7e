//! The part of CLIP's vision transformer that an anchor is taken from: the embedding, the norm
//! before the first block, and that block's first norm and attention.

use candle_core::{DType, Device, IndexOp, Tensor};

use super::TowerSpec;
use super::clip::ClipConfig;
use super::layers::{Attention, LayerNorm, Linear, compute_dtype};
use super::open_clip::{self, Source};
use super::weights::{Checkpoint, CheckpointAt, Weights};
use crate::{Error, Result};

/// A CLIP vision tower's weights under the names that transformers has for them below
/// `vision_model.`, and its `visual_projection.weight`, whatever the checkpoint's own names are.
pub struct VisionWeights<'a> {
    checkpoint: &'a Checkpoint,
    /// Below `vision_model.`, or below OpenCLIP's `visual.`.
    tower: CheckpointAt<'a>,
    /// Where `visual_projection` lies; `None` in OpenCLIP's names.
    root: Option<CheckpointAt<'a>>,
}

impl<'a> VisionWeights<'a> {
    /// Finds the tower: below `vision_model.` in a CLIP, `vision_tower.vision_model.` or
    /// `model.vision_tower.` in a LLaVA and so on; below `visual.` in OpenAI's and OpenCLIP's names,
    /// or below nothing where the visual tower was saved alone; in a training checkpoint below its
    /// `vision_encoder_state_dict` where it has one, `state_dict`, `module.` and whatever else.
    ///
    /// # Errors
    /// If the checkpoint holds no such tower, or more than one.
    pub fn find(checkpoint: &'a Checkpoint, device: &Device) -> Result<Self> {
        const CLASS: &str = "class_embedding";
        const EMBEDDINGS: &str = "embeddings.";
        const FINE_TUNED: &str = "vision_encoder_state_dict.";
        let names = checkpoint.names().iter();
        let mut found: Vec<&str> = names
            .filter_map(|name| name.strip_suffix(CLASS))
            .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
            .collect();
        found.sort_unstable();
        if found.len() > 1 && found.iter().filter(|prefix| prefix.starts_with(FINE_TUNED)).count() == 1 {
            // Mao's TeCoA and TGA-ZSR: what was fine-tuned, beside a whole model.
            found.retain(|prefix| prefix.starts_with(FINE_TUNED));
        }
        let prefix = match found[..] {
            [prefix] => prefix,
            [] => return Err(none(checkpoint)),
            _ => {
                let all: Vec<_> =
                    found.iter().map(|prefix| prefix.strip_suffix(EMBEDDINGS).unwrap_or(prefix)).collect();
                return Err(Error::config(
                    checkpoint.folder(),
                    format!("more than one vision tower: {}", all.join(", ")),
                ));
            }
        };
        if let Some(prefix) = prefix.strip_suffix(EMBEDDINGS) {
            let root = prefix.strip_suffix("vision_model.").unwrap_or(prefix);
            let root = Some(checkpoint.at(root, device));
            return Ok(Self { checkpoint, tower: checkpoint.at(prefix, device), root });
        }
        Ok(Self { checkpoint, tower: checkpoint.at(prefix, device), root: None })
    }

    /// That the tower has nothing but what CLIP's have: what else there is would be left out.
    ///
    /// # Errors
    /// On one of OpenCLIP's other designs.
    pub fn check_design(&self) -> Result<()> {
        // Layer scale, and CoCa's pooling by attention.
        let other = ["transformer.resblocks.0.ls_1.gamma", "attn_pool.query"];
        match other.iter().find(|name| self.root.is_none() && self.tower.contains(name)) {
            None => Ok(()),
            Some(name) => Err(Error::config(
                self.checkpoint.label(),
                format!(
                    "weight `{name}` is not part of CLIP's vision tower; this OpenCLIP design is not supported"
                ),
            )),
        }
    }

    fn place(&self, name: &str) -> (&CheckpointAt<'a>, Source) {
        match &self.root {
            Some(root) if name == "visual_projection.weight" => (root, Source::Whole(name.into())),
            Some(_) => (&self.tower, Source::Whole(name.into())),
            None => (&self.tower, open_clip::visual(name).unwrap_or_else(|| Source::Whole(name.into()))),
        }
    }

    /// The shape of a tensor that the checkpoint has as it is.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let (place, source) = self.place(name);
        place.shape(source.name())
    }

    /// The configuration as far as the shapes tell it: widths, picture, patches and blocks. They do
    /// not tell the number of heads, which is one per 64 channels as in every CLIP there is, nor the
    /// activation, which is left at CLIP's own.
    ///
    /// # Errors
    /// If a tensor is missing, or shapes do not belong together.
    pub fn config(&self) -> Result<ClipConfig> {
        let label = self.checkpoint.label();
        let need = |name: &str| match self.shape(name) {
            Some(shape) => Ok(shape),
            // Why there is none: it is missing, or no tensor.
            None => Err(self
                .get(name, &[])
                .err()
                .unwrap_or_else(|| Error::MissingWeight { file: label.to_path_buf(), name: name.into() })),
        };
        let wrong = |what: &str, shape: &[usize], expected: &str| {
            Error::config(label, format!("the {what} has shape {shape:?}, expected {expected}"))
        };
        let class = need("embeddings.class_embedding")?;
        let &[hidden] = &class[..] else { return Err(wrong("class embedding", &class, "[D]")) };
        let patches = need("embeddings.patch_embedding.weight")?;
        let patch = match patches[..] {
            [d, 3, p, q] if d == hidden && p == q && p > 0 => p,
            _ => return Err(wrong("patch embedding", &patches, &format!("[{hidden}, 3, P, P]"))),
        };
        let positions = need("embeddings.position_embedding.weight")?;
        let side = match positions[..] {
            [rows, d] if d == hidden && rows > 1 => (rows - 1).isqrt(),
            _ => 0,
        };
        if side == 0 || positions[0] != side * side + 1 {
            let expected = format!("[1 + a square, {hidden}]");
            return Err(wrong("position embedding", &positions, &expected));
        }
        let inner = need("encoder.layers.0.mlp.fc1.weight")?;
        let blocks =
            (0..).take_while(|i| self.shape(&format!("encoder.layers.{i}.layer_norm1.weight")).is_some());
        let heads = if hidden.is_multiple_of(64) { hidden / 64 } else { 1 };
        let config = ClipConfig {
            hidden_size: hidden,
            intermediate_size: inner.first().copied().unwrap_or(0),
            num_hidden_layers: blocks.count(),
            num_attention_heads: heads.max(1),
            image_size: side * patch,
            patch_size: patch,
            ..Default::default()
        };
        config.check(label)?;
        Ok(config)
    }
}

impl Weights for VisionWeights<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (place, source) = self.place(name);
        source.get(place, shape)
    }

    fn contains(&self, name: &str) -> bool {
        let (place, source) = self.place(name);
        place.contains(source.name())
    }
}

/// What to say of a checkpoint without a tower of ours.
fn none(checkpoint: &Checkpoint) -> Error {
    let has = |part: &str| checkpoint.names().iter().any(|name| name.contains(part));
    let reason = if has("attnpool.positional_embedding") {
        "its vision tower is a ResNet, expected a vision transformer with a class token"
    } else if has("token_embedding.weight") {
        "no CLIP vision tower, only a text encoder: no weight is called `...embeddings.class_embedding`, or `...class_embedding` as OpenCLIP's"
    } else {
        "no CLIP vision tower: no weight is called `...embeddings.class_embedding`, or `...class_embedding` as OpenCLIP's"
    };
    Error::config(checkpoint.folder(), reason)
}

pub(super) fn norm(weights: &dyn Weights, name: &str, width: usize, eps: f64) -> Result<LayerNorm> {
    let weight = weights.get(&format!("{name}.weight"), &[width])?;
    let bias = weights.get(&format!("{name}.bias"), &[width])?;
    Ok(LayerNorm::new(weight, bias, eps))
}

pub(super) fn linear(weights: &dyn Weights, name: &str, rows: usize, columns: usize) -> Result<Linear> {
    let weight = weights.get(&format!("{name}.weight"), &[rows, columns])?;
    let bias = weights.get(&format!("{name}.bias"), &[rows])?;
    Ok(Linear::new(weight, Some(bias)))
}

/// A block's attention; `name` ends with the block's number.
pub(super) fn attention(weights: &dyn Weights, name: &str, width: usize, heads: usize) -> Result<Attention> {
    let part = |part: &str| linear(weights, &format!("{name}.self_attn.{part}"), width, width);
    Ok(Attention {
        q: part("q_proj")?,
        k: part("k_proj")?,
        v: part("v_proj")?,
        out: part("out_proj")?,
        heads,
    })
}

/// Pixels to tokens before the pre-norm.
pub(super) struct Embedding<'a> {
    pub spec: &'a TowerSpec,
    /// The dtype weights are held in.
    pub dtype: DType,
    pub mean: &'a Tensor,
    pub inverse_std: &'a Tensor,
    pub patches: &'a Linear,
    pub class: &'a Tensor,
    pub positions: &'a Tensor,
}

impl Embedding<'_> {
    /// `(B, 3, H, W)` f32 in [0, 1] to `(B, N, D)`.
    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let batch = pixels.dim(0)?;
        let (rows, columns) = self.spec.grid;
        let p = self.spec.patch_size;
        let dtype = compute_dtype(pixels.device(), self.dtype);
        let normal = pixels.broadcast_sub(self.mean)?.broadcast_mul(self.inverse_std)?;
        // A strided convolution drops what lies beyond the last whole patch.
        let normal = normal.i((.., .., ..rows * p, ..columns * p))?;
        let patches = normal
            .reshape(&[batch, 3, rows, p, columns, p][..])?
            .permute([0, 2, 4, 1, 3, 5])?
            .reshape((batch, rows * columns, 3 * p * p))?;
        let patches = self.patches.forward(&patches.to_dtype(dtype)?)?;
        let class = self.class.to_dtype(dtype)?.reshape((1, 1, self.spec.hidden))?.repeat((batch, 1, 1))?;
        Ok(Tensor::cat(&[class, patches], 1)?.broadcast_add(&self.positions.to_dtype(dtype)?)?)
    }
}

/// `(1, 3, 1, 1)` f32.
pub(super) fn channels(values: [f32; 3], device: &Device) -> Result<Tensor> {
    Ok(Tensor::new(&values, device)?.reshape((1, 3, 1, 1))?)
}

/// The beginning of a tower, which is all that Eq. 7 needs of a robust model; the rest of its
/// checkpoint is not read. Held and run in f32.
pub struct Stem {
    spec: TowerSpec,
    mean: Tensor,
    inverse_std: Tensor,
    patches: Linear,
    class: Tensor,
    positions: Tensor,
    pre_norm: LayerNorm,
    norm1: LayerNorm,
    attention: Attention,
}

impl Stem {
    /// Reads it from a tower's weights. `mean` and `std` normalise pixels in [0, 1].
    ///
    /// # Errors
    /// If a weight is missing or has another shape than `config` says.
    pub fn load(
        config: &ClipConfig,
        weights: &VisionWeights<'_>,
        mean: [f32; 3],
        std: [f32; 3],
    ) -> Result<Self> {
        struct Widened<'w>(&'w dyn Weights);
        impl Weights for Widened<'_> {
            fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
                Ok(self.0.get(name, shape)?.to_dtype(DType::F32)?)
            }
            fn contains(&self, name: &str) -> bool {
                self.0.contains(name)
            }
        }
        let weights = &Widened(weights);
        let spec = config.spec();
        let (d, p, eps) = (spec.hidden, spec.patch_size, config.layer_norm_eps);
        let patches = weights.get("embeddings.patch_embedding.weight", &[d, 3, p, p])?;
        let device = patches.device().clone();
        Ok(Self {
            mean: channels(mean, &device)?,
            inverse_std: channels(std.map(f32::recip), &device)?,
            patches: Linear::new(patches.reshape((d, 3 * p * p))?, None),
            class: weights.get("embeddings.class_embedding", &[d])?,
            positions: weights.get("embeddings.position_embedding.weight", &[spec.tokens(), d])?,
            pre_norm: norm(weights, "pre_layrnorm", d, eps)?,
            norm1: norm(weights, "encoder.layers.0.layer_norm1", d, eps)?,
            attention: attention(weights, "encoder.layers.0", d, spec.heads)?,
            spec,
        })
    }

    /// The tower's shapes.
    pub fn spec(&self) -> &TowerSpec {
        &self.spec
    }

    /// The first block's attention output on a uniform white picture, `(N, D)` f32 on the CPU:
    /// MHSA(Embed(x)) of the paper's Eq. 6 and 7.
    pub fn white_attention(&self) -> Result<Tensor> {
        let side = self.spec.image_size;
        let white = Tensor::ones((1, 3, side, side), DType::F32, self.class.device())?;
        let embedding = Embedding {
            spec: &self.spec,
            dtype: DType::F32,
            mean: &self.mean,
            inverse_std: &self.inverse_std,
            patches: &self.patches,
            class: &self.class,
            positions: &self.positions,
        };
        let stream = self.pre_norm.forward(&embedding.forward(&white)?)?;
        let (attention, _) = self.attention.forward(&self.norm1.forward(&stream)?)?;
        Ok(attention.squeeze(0)?.to_device(&Device::Cpu)?)
    }
}
