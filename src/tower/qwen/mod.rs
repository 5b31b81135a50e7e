//! The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
//!
//! After transformers 5.23 `models/{qwen2_vl,qwen2_5_vl,qwen3_vl}/modeling_*.py`
//! (`Qwen2VisionTransformerPretrainedModel`, `Qwen2_5_VisionTransformerPretrainedModel`,
//! `Qwen3VLVisionModel`). They share a patch embedding over pairs of frames, rotary positions in two
//! axes, pre-norm blocks, and a merger that makes one token of 2 x 2 patches; what differs is in
//! [`QwenConfig`].
//!
//! Pictures may have any size whose sides are multiples of [`QwenConfig::factor`]. Frames of a video
//! go through in pairs that do not see each other, so a video is a batch of pairs. Hidden states and
//! anchors have their tokens in the order of the picture, row by row; the group order that
//! transformers keeps is made where groups are merged.

mod block;
mod config;
mod grid;

pub use config::{Family, QwenConfig};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, IndexOp, Tensor};

use self::block::{Block, Merger, MergerTape, Mlp, MlpTape};
use self::grid::Grid;
use super::clip::fingerprint;
use super::layers::{
    Activation, Attention, AttentionTape, LayerNorm, Linear, Norm, RmsNorm, compute_dtype, on_host,
};
use super::stem;
use super::weights::{Checkpoint, CheckpointAt, Weights};
use super::{
    Cotangent, Features, Gradients, GridInserts, Insertable, Inserts, TowerSpec, VisionTower, Want, Wrt,
    device_batch,
};
use crate::{Error, Result};

/// Added to the variance in every norm.
const EPS: f64 = 1e-6;
/// Tokens of all grids whose positions are kept: a server sees many.
const TOKENS: usize = 1 << 14;

/// What is known of the grids seen so far, by patches down and across.
type Grids = Arc<Mutex<HashMap<(usize, usize), Arc<Grid>>>>;

/// A Qwen-VL's vision tower with what is put into it, for pictures of any grid.
///
/// [`Qwen::at`] is the same tower for pictures of one size, which is what attacks and trainings
/// take.
#[derive(Clone)]
pub struct Qwen {
    config: Arc<QwenConfig>,
    device: Device,
    dtype: DType,
    activation: Activation,
    /// `(1, 3, 1, 1)` f32.
    mean: Tensor,
    /// `(1, 3, 1, 1)` f32, 1 / std.
    inverse_std: Tensor,
    /// `(D, 3 T P P)`.
    patches: Linear,
    /// `(side^2, D)`.
    positions: Option<Tensor>,
    blocks: Arc<Vec<Block>>,
    merger: Arc<Merger>,
    deepstack: Arc<Vec<Merger>>,
    inserts: Option<Arc<dyn GridInserts>>,
    grids: Grids,
}

/// What a language model reads of some pictures.
#[derive(Debug, Clone)]
pub struct Merged {
    /// `(tokens of all pictures, width)`.
    pub embeddings: Tensor,
    /// DeepStack's features, each of the same shape.
    pub deepstack: Vec<Tensor>,
}

struct BlockTape {
    input: Tensor,
    /// `None` in block 1 where the mix does not need the attention output.
    attention: Option<AttentionTape>,
    middle: Tensor,
    mlp: MlpTape,
}

/// What the gradient of a batch of one grid needs.
pub struct BatchTape {
    grid: Arc<Grid>,
    inserts: Inserts,
    /// Slices and frames in each.
    shape: (usize, usize),
    blocks: Vec<BlockTape>,
    /// By the number of the entry, behind them the last merger's.
    mergers: Vec<MergerTape>,
}

/// What [`Qwen::forward_tape`] keeps.
pub struct QwenTape {
    /// Per picture: frames, frames with those repeated at the end, and its batches.
    pictures: Vec<(usize, Vec<BatchTape>)>,
}

/// The tower's weights under the names they have below `visual.`.
pub struct QwenWeights<'a>(CheckpointAt<'a>);

impl<'a> QwenWeights<'a> {
    /// Finds the tower: below `visual.` as published, `model.visual.` as transformers 5 has it, or
    /// wherever else the patch embedding is.
    ///
    /// # Errors
    /// If the checkpoint holds no such tower, or more than one.
    pub fn find(checkpoint: &'a Checkpoint, device: &Device) -> Result<Self> {
        const PATCHES: &str = "patch_embed.proj.weight";
        let found: Vec<&str> =
            checkpoint.names().iter().filter_map(|name| name.strip_suffix(PATCHES)).collect();
        match found[..] {
            [prefix] => Ok(Self(checkpoint.at(prefix, device))),
            [] => Err(Error::MissingWeight {
                file: checkpoint.label().to_path_buf(),
                name: format!("visual.{PATCHES}"),
            }),
            _ => {
                let all = found.join(", ");
                Err(Error::config(checkpoint.label(), format!("more than one vision tower: {all}")))
            }
        }
    }
}

impl Weights for QwenWeights<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.0.get(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

impl Qwen {
    /// Builds the tower from weights named as below `visual.`.
    ///
    /// `mean` and `std` normalise pixels in [0, 1]. Weights keep the dtype they are given in.
    ///
    /// # Errors
    /// If a weight is missing or has another shape than `config` says.
    pub fn new(config: &QwenConfig, weights: &dyn Weights, mean: [f32; 3], std: [f32; 3]) -> Result<Self> {
        let c = config;
        let (d, p, m) = (c.hidden, c.patch, c.intermediate);
        let v3 = c.family == Family::Qwen3Vl;
        let linear = |name: &str, rows: usize, columns: usize| stem::linear(weights, name, rows, columns);
        let norm = |name: &str, width: usize| -> Result<Norm> {
            Ok(match c.family {
                Family::Qwen2_5Vl => {
                    Norm::Rms(RmsNorm::new(weights.get(&format!("{name}.weight"), &[width])?, EPS))
                }
                _ => {
                    let weight = weights.get(&format!("{name}.weight"), &[width])?;
                    let bias = weights.get(&format!("{name}.bias"), &[width])?;
                    Norm::Layer(LayerNorm::new(weight, bias, EPS))
                }
            })
        };
        let patches = weights.get("patch_embed.proj.weight", &[d, 3, c.frames, p, p])?;
        let bias = v3.then(|| weights.get("patch_embed.proj.bias", &[d])).transpose()?;
        let (device, dtype) = (patches.device().clone(), patches.dtype());
        let block = |i: usize| -> Result<Block> {
            let at = |part: &str| format!("blocks.{i}.{part}");
            let qkv = linear(&at("attn.qkv"), 3 * d, d)?;
            let part = |i: usize| -> Result<Linear> {
                let bias = qkv.bias().map(|bias| bias.narrow(0, i * d, d)).transpose()?;
                Ok(Linear::new(qkv.weight().narrow(0, i * d, d)?, bias))
            };
            let out = linear(&at("attn.proj"), d, d)?;
            let mlp = match c.family {
                Family::Qwen2_5Vl => Mlp::Gated {
                    gate: linear(&at("mlp.gate_proj"), m, d)?,
                    up: linear(&at("mlp.up_proj"), m, d)?,
                    down: linear(&at("mlp.down_proj"), d, m)?,
                },
                Family::Qwen2Vl => {
                    Mlp::Plain { fc1: linear(&at("mlp.fc1"), m, d)?, fc2: linear(&at("mlp.fc2"), d, m)? }
                }
                Family::Qwen3Vl => Mlp::Plain {
                    fc1: linear(&at("mlp.linear_fc1"), m, d)?,
                    fc2: linear(&at("mlp.linear_fc2"), d, m)?,
                },
            };
            Ok(Block {
                norm1: norm(&at("norm1"), d)?,
                attention: Attention { q: part(0)?, k: part(1)?, v: part(2)?, out, heads: c.heads },
                windowed: c.family == Family::Qwen2_5Vl && !c.full_attention.contains(&i),
                norm2: norm(&at("norm2"), d)?,
                mlp,
            })
        };
        let group = c.merge * c.merge;
        let merger = |name: &str, whole: bool| -> Result<Merger> {
            let [n, fc1, fc2] = Self::merger_names(c.family);
            Ok(Merger {
                norm: norm(&format!("{name}.{n}"), if whole { group * d } else { d })?,
                whole,
                fc1: linear(&format!("{name}.{fc1}"), group * d, group * d)?,
                fc2: linear(&format!("{name}.{fc2}"), c.out, group * d)?,
                group,
            })
        };
        let deepstack = (0..c.deepstack.len()).map(|i| merger(&format!("deepstack_merger_list.{i}"), true));
        Ok(Self {
            activation: Activation::from_config(&c.activation)?,
            mean: stem::channels(mean, &device)?,
            inverse_std: stem::channels(std.map(f32::recip), &device)?,
            patches: Linear::new(patches.reshape((d, 3 * c.frames * p * p))?, bias),
            positions: v3.then(|| weights.get("pos_embed.weight", &[c.positions, d])).transpose()?,
            blocks: Arc::new((0..c.blocks).map(block).collect::<Result<_>>()?),
            merger: Arc::new(merger("merger", false)?),
            deepstack: Arc::new(deepstack.collect::<Result<_>>()?),
            inserts: None,
            grids: Arc::default(),
            config: Arc::new(config.clone()),
            device,
            dtype,
        })
    }

    /// The norm and the two layers of a merger.
    fn merger_names(family: Family) -> [&'static str; 3] {
        match family {
            Family::Qwen3Vl => ["norm", "linear_fc1", "linear_fc2"],
            Family::Qwen2Vl | Family::Qwen2_5Vl => ["ln_q", "mlp.0", "mlp.2"],
        }
    }

    /// Loads the tower of a model folder, in the key layouts of transformers 4 and 5.
    ///
    /// # Errors
    /// If a file is missing or damaged, or the checkpoint has no such tower.
    pub fn load(
        checkpoint: &Checkpoint,
        config: &QwenConfig,
        mean: [f32; 3],
        std: [f32; 3],
        device: &Device,
    ) -> Result<Self> {
        Self::new(config, &QwenWeights::find(checkpoint, device)?, mean, std)
    }

    /// The tower's configuration.
    pub fn config(&self) -> &QwenConfig {
        &self.config
    }

    /// The dtype the weights are held in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device the weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The same tower, weights shared, with other things put in; `None` is the undefended tower.
    pub fn with_grids(&self, inserts: Option<Arc<dyn GridInserts>>) -> Self {
        Self { inserts, ..self.clone() }
    }

    /// The same tower with its weights held in `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let cast = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.to_dtype(dtype)?) };
        let linear = |layer: &Linear| layer.map(cast);
        let norm = |layer: &Norm| layer.map(cast);
        let blocks = self.blocks.iter().map(|block| {
            let attention = &block.attention;
            Ok(Block {
                norm1: norm(&block.norm1)?,
                attention: Attention {
                    q: linear(&attention.q)?,
                    k: linear(&attention.k)?,
                    v: linear(&attention.v)?,
                    out: linear(&attention.out)?,
                    heads: attention.heads,
                },
                windowed: block.windowed,
                norm2: norm(&block.norm2)?,
                mlp: block.mlp.map(linear)?,
            })
        });
        Ok(Self {
            dtype,
            patches: linear(&self.patches)?,
            positions: self.positions.as_ref().map(cast).transpose()?,
            blocks: Arc::new(blocks.collect::<Result<_>>()?),
            merger: Arc::new(self.merger.map(norm, linear)?),
            deepstack: Arc::new(
                self.deepstack.iter().map(|merger| merger.map(norm, linear)).collect::<Result<_>>()?,
            ),
            grids: Arc::default(),
            ..self.clone()
        })
    }

    /// The tower's tensors under the names they have below `visual.`.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut all = self.trunk()?;
        for (i, block) in self.blocks.iter().enumerate().skip(1) {
            all.extend(self.block_tensors(i, block)?);
        }
        let mut mergers = vec![("merger".to_string(), &*self.merger)];
        mergers.extend(
            self.deepstack.iter().enumerate().map(|(i, m)| (format!("deepstack_merger_list.{i}"), m)),
        );
        for (name, merger) in mergers {
            let [norm, fc1, fc2] = Self::merger_names(self.config.family);
            push_norm(&mut all, &format!("{name}.{norm}"), &merger.norm);
            push_linear(&mut all, &format!("{name}.{fc1}"), &merger.fc1);
            push_linear(&mut all, &format!("{name}.{fc2}"), &merger.fc2);
        }
        Ok(all)
    }

    /// What an anchor depends on: the patch embedding, positions and the first block.
    fn trunk(&self) -> Result<Vec<(String, Tensor)>> {
        let c = &self.config;
        let shape = (c.hidden, 3, c.frames, c.patch, c.patch);
        let mut all = vec![("patch_embed.proj.weight".to_string(), self.patches.weight().reshape(shape)?)];
        all.extend(self.patches.bias().map(|bias| ("patch_embed.proj.bias".to_string(), bias.clone())));
        all.extend(self.positions.clone().map(|positions| ("pos_embed.weight".to_string(), positions)));
        if let Some(block) = self.blocks.first() {
            all.extend(self.block_tensors(0, block)?);
        }
        Ok(all)
    }

    fn block_tensors(&self, i: usize, block: &Block) -> Result<Vec<(String, Tensor)>> {
        let at = |part: &str| format!("blocks.{i}.{part}");
        let mut all = Vec::new();
        push_norm(&mut all, &at("norm1"), &block.norm1);
        let attention = &block.attention;
        let parts = [&attention.q, &attention.k, &attention.v];
        all.push((at("attn.qkv.weight"), Tensor::cat(&parts.map(Linear::weight), 0)?));
        let biases: Vec<&Tensor> = parts.iter().filter_map(|part| part.bias()).collect();
        all.push((at("attn.qkv.bias"), Tensor::cat(&biases, 0)?));
        push_linear(&mut all, &at("attn.proj"), &attention.out);
        push_norm(&mut all, &at("norm2"), &block.norm2);
        for (name, layer) in block.mlp.layers(self.config.family == Family::Qwen3Vl) {
            push_linear(&mut all, &at(&format!("mlp.{name}")), layer);
        }
        Ok(all)
    }

    /// SHA-256 over what an anchor depends on: patch embedding, positions and the first block, as
    /// [`Insertable::fingerprint`].
    pub fn fingerprint(&self) -> Result<String> {
        fingerprint(self.trunk()?.into_iter().map(Ok))
    }

    /// The tower for pictures of `height` x `width` pixels, with what is put in at that size.
    ///
    /// # Errors
    /// If the sides are no multiples of [`QwenConfig::factor`].
    pub fn at(&self, height: usize, width: usize) -> Result<QwenAt> {
        let size = self.grid_of(height, width)?;
        let grid = self.grid(size)?;
        let inserts = self.inserts_at(size)?;
        Ok(QwenAt { spec: self.config.spec(size), tower: self.clone(), grid, inserts })
    }

    fn grid_of(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let factor = self.config.factor();
        if height == 0 || width == 0 || !height.is_multiple_of(factor) || !width.is_multiple_of(factor) {
            let expected = format!("sides that are multiples of {factor} pixels");
            return Err(Error::argument("picture size", expected, format!("{height} x {width}")));
        }
        Ok((height / self.config.patch, width / self.config.patch))
    }

    fn inserts_at(&self, size: (usize, usize)) -> Result<Inserts> {
        self.inserts.as_ref().map_or_else(|| Ok(Inserts::default()), |inserts| inserts.at(size))
    }

    fn grid(&self, size: (usize, usize)) -> Result<Arc<Grid>> {
        let mut grids = self.grids.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(grid) = grids.get(&size) {
            return Ok(grid.clone());
        }
        let grid = Arc::new(Grid::new(&self.config, size, self.positions.as_ref(), &self.device)?);
        if grids.values().map(|grid| grid.tokens()).sum::<usize>() + grid.tokens() > TOKENS {
            grids.clear();
        }
        grids.insert(size, grid.clone());
        Ok(grid)
    }

    /// Runs pictures of any sizes through the tower: stills `(1, 3, H, W)` and videos
    /// `(F, 3, H, W)`, f32 in [0, 1]. The last frame of a video is repeated as often as it takes to
    /// fill its last pair.
    ///
    /// Per picture, the features' first dimension counts its pairs of frames, 1 for a still.
    ///
    /// # Errors
    /// If a picture has another shape, or a block asked for does not exist.
    pub fn forward(&self, pictures: &[Tensor], want: &Want) -> Result<Vec<Features>> {
        pictures.iter().map(|picture| self.run_picture(picture, want, None)).collect()
    }

    /// As [`Qwen::forward`], and keeps what the gradient needs.
    pub fn forward_tape(&self, pictures: &[Tensor], want: &Want) -> Result<(Vec<Features>, QwenTape)> {
        let mut tape = QwenTape { pictures: Vec::with_capacity(pictures.len()) };
        let features = pictures
            .iter()
            .map(|picture| {
                let mut batches = Vec::new();
                let features = self.run_picture(picture, want, Some(&mut batches))?;
                tape.pictures.push((picture.dim(0)?, batches));
                Ok(features)
            })
            .collect::<Result<_>>()?;
        Ok((features, tape))
    }

    /// The vector-Jacobian product: one cotangent per picture, shaped as its features are.
    /// Gradients have the pictures' own shapes, `(F, 3, H, W)`; that of the anchor is of the
    /// picture's own grid, with one row per patch.
    ///
    /// # Errors
    /// As [`VisionTower::vjp`], and if there are not as many cotangents as pictures.
    pub fn vjp(&self, tape: &QwenTape, cotangents: &[Cotangent], wrt: Wrt) -> Result<Vec<Gradients>> {
        if cotangents.len() != tape.pictures.len() {
            let (expected, found) = (tape.pictures.len(), cotangents.len());
            return Err(Error::argument("cotangents", format!("one for each of {expected} pictures"), found));
        }
        let mut all = Vec::with_capacity(cotangents.len());
        for ((frames, batches), cotangent) in tape.pictures.iter().zip(cotangents) {
            let mut pixels = Vec::with_capacity(batches.len());
            let mut gradients = Gradients::default();
            let mut start = 0;
            for batch in batches {
                let part = part_of(cotangent, start, batch.shape.0)?;
                let found = self.batch_vjp(batch, &part, wrt)?;
                if let Some(found) = found.pixels {
                    let (slices, per, ..) = found.dims5()?;
                    let (_, _, c, h, w) = found.dims5()?;
                    pixels.push(found.reshape((slices * per, c, h, w))?);
                }
                gradients.anchor = super::clip::add(gradients.anchor, found.anchor)?;
                start += batch.shape.0;
            }
            if wrt.pixels {
                let whole = Tensor::cat(&pixels, 0)?;
                let n = whole.dim(0)?;
                gradients.pixels = Some(if n > *frames {
                    // The frames repeated at the end are all the last one.
                    let last = whole.narrow(0, frames - 1, n + 1 - frames)?.sum_keepdim(0)?;
                    Tensor::cat(&[whole.narrow(0, 0, frames - 1)?, last], 0)?
                } else {
                    whole
                });
            }
            all.push(gradients);
        }
        Ok(all)
    }

    /// What the language model reads of patches `(sum of t h w, 3 T P P)` of several pictures, in the
    /// order in which transformers' and mistral.rs' processors cut them: pixels in [0, 1], not
    /// normalised. `grids` has each picture's pairs of frames, patches down and patches across.
    ///
    /// # Errors
    /// If the numbers do not belong together.
    pub fn encode_patches(&self, patches: &Tensor, grids: &[[usize; 3]]) -> Result<Merged> {
        let (rows, _) = patches.dims2()?;
        let needed: usize = grids.iter().map(|[t, h, w]| t * h * w).sum();
        if rows != needed {
            return Err(Error::argument("patches", format!("{needed} for these grids"), rows));
        }
        let mut embeddings = Vec::new();
        let mut deepstack = vec![Vec::new(); self.deepstack.len()];
        let mut start = 0;
        for &[t, h, w] in grids {
            let frames = self.frames_of(&patches.narrow(0, start, t * h * w)?, [t, h, w])?;
            let features = self.run_frames(&frames, &Want::merged(), None)?;
            let missing = || Error::Unsupported("the tower gave no merged embeddings".into());
            embeddings.push(features.merged.ok_or_else(missing)?.flatten(0, 1)?);
            for (whole, part) in deepstack.iter_mut().zip(&features.deepstack) {
                whole.push(part.flatten(0, 1)?);
            }
            start += t * h * w;
        }
        if embeddings.is_empty() {
            return Err(Error::argument("pictures", "at least one", 0));
        }
        Ok(Merged {
            embeddings: Tensor::cat(&embeddings, 0)?,
            deepstack: deepstack.iter().map(|parts| Ok(Tensor::cat(parts, 0)?)).collect::<Result<_>>()?,
        })
    }

    /// Patches `(t h w, 3 T P P)` of one picture, as a processor cuts them, to its frames
    /// `(t, T, 3, H, W)`. The inverse is [`Qwen::patches_of`].
    ///
    /// # Errors
    /// If the patches are of another number or size.
    pub fn frames_of(&self, patches: &Tensor, [t, h, w]: [usize; 3]) -> Result<Tensor> {
        let c = &self.config;
        let (p, m, f) = (c.patch, c.merge, c.frames);
        if patches.dims() != [t * h * w, 3 * f * p * p] || h % m != 0 || w % m != 0 || t == 0 {
            let expected = format!("shape [{}, {}] in groups of {m} x {m}", t * h * w, 3 * f * p * p);
            return Err(Error::argument("patches", expected, format!("{:?}", patches.dims())));
        }
        let cut = patches.reshape(&[t, h / m, w / m, m, m, 3, f, p, p][..])?;
        Ok(cut.permute([0, 6, 5, 1, 3, 7, 2, 4, 8])?.reshape((t, f, 3, h * p, w * p))?)
    }

    /// Frames `(t, T, 3, H, W)`, or `(t, 1, 3, H, W)` for stills, to patches `(t h w, 3 T P P)` in
    /// the order of transformers' processors.
    ///
    /// # Errors
    /// If the sides are no multiples of [`QwenConfig::factor`], or there is another number of
    /// frames.
    pub fn patches_of(&self, frames: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (t, f, channels, height, width) = frames.dims5()?;
        let (h, w) = self.grid_of(height, width)?;
        let (p, m) = (c.patch, c.merge);
        if channels != 3 || (f != c.frames && f != 1) {
            let expected = format!("shape [t, {}, 3, {height}, {width}]", c.frames);
            return Err(Error::argument("frames", expected, format!("{:?}", frames.dims())));
        }
        let frames = if f == c.frames { frames.clone() } else { frames.repeat((1, c.frames, 1, 1, 1))? };
        let cut = frames.reshape(&[t, c.frames, 3, h / m, m, p, w / m, m, p][..])?;
        let cut = cut.permute([0, 3, 6, 4, 7, 2, 1, 5, 8])?;
        Ok(cut.reshape((t * h * w, 3 * c.frames * p * p))?)
    }

    /// A picture `(F, 3, H, W)`, in pairs of frames.
    fn run_picture(
        &self,
        picture: &Tensor,
        want: &Want,
        tape: Option<&mut Vec<BatchTape>>,
    ) -> Result<Features> {
        let (frames, channels, height, width) = match *picture.dims() {
            [frames, channels, height, width] if frames > 0 => (frames, channels, height, width),
            _ => {
                let found = format!("{:?}", picture.dims());
                return Err(Error::argument("picture", "shape [F, 3, H, W]", found));
            }
        };
        let per = self.config.frames;
        let stack = if frames == 1 {
            picture.unsqueeze(0)?
        } else {
            let slices = frames.div_ceil(per);
            let lack = slices * per - frames;
            let whole = if lack == 0 {
                picture.clone()
            } else {
                let last = picture.narrow(0, frames - 1, 1)?.repeat((lack, 1, 1, 1))?;
                Tensor::cat(&[picture.clone(), last], 0)?
            };
            whole.reshape((slices, per, channels, height, width))?
        };
        self.run_frames(&stack, want, tape)
    }

    /// `(slices, F, 3, H, W)`, as many slices at a time as leave results independent of each other.
    fn run_frames(
        &self,
        frames: &Tensor,
        want: &Want,
        mut tape: Option<&mut Vec<BatchTape>>,
    ) -> Result<Features> {
        let (slices, _, _, height, width) = frames.dims5()?;
        let size = self.grid_of(height, width)?;
        let (grid, inserts) = (self.grid(size)?, self.inserts_at(size)?);
        let at_once = if on_host(&self.device) { 1 } else { device_batch(grid.tokens()) };
        let mut parts = Vec::with_capacity(slices);
        for start in (0..slices).step_by(at_once) {
            let part = frames.narrow(0, start, at_once.min(slices - start))?;
            let mut batch = tape.is_some().then(|| BatchTape::new(&grid, &inserts));
            parts.push(self.run(&part, &grid, &inserts, want, batch.as_mut())?);
            if let (Some(tape), Some(batch)) = (tape.as_deref_mut(), batch) {
                tape.push(batch);
            }
        }
        if parts.len() == 1 {
            return parts.pop().ok_or_else(|| Error::Unsupported("no slices".into()));
        }
        let join = |of: &dyn Fn(&Features) -> Option<Tensor>| -> Result<Option<Tensor>> {
            let found: Vec<Tensor> = parts.iter().filter_map(of).collect();
            Ok(if found.is_empty() { None } else { Some(Tensor::cat(&found, 0)?) })
        };
        let list = |n: usize, of: &dyn Fn(&Features, usize) -> Option<Tensor>| -> Result<Vec<Tensor>> {
            (0..n).filter_map(|i| join(&|part| of(part, i)).transpose()).collect()
        };
        Ok(Features {
            hidden: list(want.hidden.len(), &|part, i| part.hidden.get(i).cloned())?,
            merged: join(&|part| part.merged.clone())?,
            deepstack: list(self.deepstack.len(), &|part, i| part.deepstack.get(i).cloned())?,
            ..Features::default()
        })
    }

    /// `(B, F, 3, H, W)`, F frames a patch or one that stands for as many, to `(B, N, D)`.
    fn embed(&self, frames: &Tensor, grid: &Grid) -> Result<Tensor> {
        let c = &self.config;
        let (batch, f, ..) = frames.dims5()?;
        let ((rows, columns), p) = (grid.size, c.patch);
        let (height, width) = (rows * p, columns * p);
        let flat = frames.reshape((batch * f, 3, height, width))?;
        let normal = flat.broadcast_sub(&self.mean)?.broadcast_mul(&self.inverse_std)?;
        let cut = normal.reshape(&[batch, f, 3, rows, p, columns, p][..])?;
        let cut = cut.permute([0, 3, 5, 2, 1, 4, 6])?.reshape((batch, grid.tokens(), 3, f, p * p))?;
        let cut = if f == c.frames { cut } else { cut.repeat((1, 1, 1, c.frames, 1))? };
        let cut = cut.reshape((batch, grid.tokens(), 3 * c.frames * p * p))?;
        let stream = self.patches.forward(&cut.to_dtype(compute_dtype(&self.device, self.dtype))?)?;
        match &grid.positions {
            Some(positions) => Ok(stream.broadcast_add(&positions.to_dtype(stream.dtype())?)?),
            None => Ok(stream),
        }
    }

    /// The gradient at [`Qwen::embed`]'s result to that at its frames.
    fn embed_vjp(&self, gradient: &Tensor, grid: &Grid, f: usize) -> Result<Tensor> {
        let c = &self.config;
        let batch = gradient.dim(0)?;
        let ((rows, columns), p) = (grid.size, c.patch);
        let cut = self.patches.vjp(gradient)?.to_dtype(DType::F32)?;
        let cut = cut.reshape((batch, grid.tokens(), 3, c.frames, p * p))?;
        let cut = if f == c.frames { cut } else { cut.sum_keepdim(3)? };
        let cut = cut.reshape(&[batch, rows, columns, 3, f, p, p][..])?.permute([0, 4, 3, 1, 5, 2, 6])?;
        let flat = cut.reshape((batch * f, 3, rows * p, columns * p))?.broadcast_mul(&self.inverse_std)?;
        Ok(flat.reshape((batch, f, 3, rows * p, columns * p))?)
    }

    /// What is filtered of `(B, F, 3, H, W)`, frame by frame.
    fn per_frame(frames: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let (batch, per, channels, height, width) = frames.dims5()?;
        let flat = frames.reshape((batch * per, channels, height, width))?;
        Ok(f(&flat)?.reshape((batch, per, channels, height, width))?)
    }

    fn run(
        &self,
        frames: &Tensor,
        grid: &Grid,
        inserts: &Inserts,
        want: &Want,
        mut tape: Option<&mut BatchTape>,
    ) -> Result<Features> {
        let c = &self.config;
        let (batch, f, channels, height, width) = frames.dims5()?;
        if channels != 3 || (f != 1 && f != c.frames) || frames.dtype() != DType::F32 {
            let expected = format!("f32 in [0, 1] of shape [B, {}, 3, {height}, {width}]", c.frames);
            let found = format!("{:?} {:?}", frames.dtype(), frames.dims());
            return Err(Error::argument("pixels", expected, found));
        }
        if let Some(&block) = want.hidden.iter().find(|&&block| block > c.blocks) {
            return Err(Error::argument("block", format!("0 to {}", c.blocks), block));
        }
        if want.pooled {
            return Err(Error::argument("feature", "one that the tower has", "a pooled embedding"));
        }
        let filtered = match &inserts.input {
            Some(filter) => Self::per_frame(frames, |frames| filter.apply(frames))?,
            None => frames.clone(),
        };
        let mut stream = self.embed(&filtered, grid)?;
        let mut hidden: Vec<Option<Tensor>> = vec![None; want.hidden.len()];
        let mut keep = |block: usize, stream: &Tensor| {
            for (slot, _) in hidden.iter_mut().zip(&want.hidden).filter(|(_, wanted)| **wanted == block) {
                *slot = Some(stream.clone());
            }
        };
        keep(0, &stream);
        if let Some(tape) = tape.as_deref_mut() {
            tape.shape = (batch, f);
        }
        let mut deepstack = Vec::new();
        for (i, block) in self.blocks.iter().take(want.last_block(c.blocks)).enumerate() {
            let mix = inserts.attention.as_ref().filter(|_| i == 0);
            let (attention, attention_tape) = if mix.is_none_or(|mix| mix.needs_attention()) {
                let normal = block.norm1.forward(&stream)?;
                let (attention, tape) = block.attention.forward_at(&normal, places(block, grid))?;
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
            let (mlp, mlp_tape) = block.mlp.forward(&block.norm2.forward(&middle)?, self.activation)?;
            let output = (&middle + mlp)?;
            if let Some(tape) = tape.as_deref_mut() {
                let attention = attention_tape;
                tape.blocks.push(BlockTape { input: stream, attention, middle, mlp: mlp_tape });
            }
            stream = output;
            keep(i + 1, &stream);
            if let Some(merger) = self.deepstack_after(i).filter(|_| want.merged) {
                let (merged, merger_tape) = merger.forward(&stream, grid)?;
                deepstack.push(merged);
                if let Some(tape) = tape.as_deref_mut() {
                    tape.mergers.push(merger_tape);
                }
            }
        }
        let mut merged = None;
        if want.merged {
            let (found, merger_tape) = self.merger.forward(&stream, grid)?;
            merged = Some(found);
            if let Some(tape) = tape {
                tape.mergers.push(merger_tape);
            }
        }
        let hidden = hidden.into_iter().flatten().collect();
        Ok(Features { hidden, merged, deepstack, ..Features::default() })
    }

    /// The merger of block `i`'s output, counted from 0.
    fn deepstack_after(&self, i: usize) -> Option<&Merger> {
        let entry = self.config.deepstack.iter().position(|block| *block == i)?;
        self.deepstack.get(entry)
    }

    fn batch_vjp(&self, tape: &BatchTape, cotangent: &Cotangent, wrt: Wrt) -> Result<Gradients> {
        let grid = &*tape.grid;
        let refuse = |expected: String, found: String| Err(Error::argument("cotangent", expected, found));
        if cotangent.pooled.is_some() || cotangent.embeds.is_some() {
            return refuse("none at a pooled embedding: the tower has none".into(), "one".into());
        }
        if let Some((block, _)) = cotangent.hidden.iter().find(|(block, _)| *block > tape.blocks.len()) {
            return refuse(format!("blocks 0 to {} of this tape", tape.blocks.len()), block.to_string());
        }
        let given = cotangent.merged.is_some() || !cotangent.deepstack.is_empty();
        if given && tape.mergers.is_empty() {
            return refuse("none at merged embeddings: the tape has none".into(), "one".into());
        }
        if let Some((entry, _)) =
            cotangent.deepstack.iter().find(|(entry, _)| *entry >= self.config.deepstack.len())
        {
            return refuse(
                format!("one of {} DeepStack features", self.config.deepstack.len()),
                entry.to_string(),
            );
        }
        let add = super::clip::add;
        let mut gradient = match (&cotangent.merged, tape.mergers.last()) {
            (Some(given), Some(tape)) => Some(self.merger.vjp(tape, given, grid)?),
            _ => None,
        };
        let mut gradients = Gradients::default();
        for (i, (block, block_tape)) in self.blocks.iter().zip(&tape.blocks).enumerate().rev() {
            for (_, given) in cotangent.hidden.iter().filter(|(at, _)| *at == i + 1) {
                gradient = add(gradient, Some(given.clone()))?;
            }
            let entry = self.config.deepstack.iter().position(|block| *block == i);
            let at_entry = cotangent.deepstack.iter().filter(|(at, _)| Some(*at) == entry);
            for (at, given) in at_entry {
                if let (Some(merger), Some(tape)) = (self.deepstack.get(*at), tape.mergers.get(*at)) {
                    gradient = add(gradient, Some(merger.vjp(tape, given, grid)?))?;
                }
            }
            let Some(reached) = &gradient else { continue };
            let inner = block.mlp.vjp(&block_tape.mlp, reached, self.activation)?;
            let middle = (reached + block.norm2.vjp(&block_tape.middle, &inner)?)?;
            let attention = match tape.inserts.attention.as_ref().filter(|_| i == 0) {
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
            gradient = Some(match (attention, &block_tape.attention) {
                (Some(attention), Some(attention_tape)) => {
                    let normal = block.attention.vjp_at(attention_tape, &attention, places(block, grid))?;
                    (&middle + block.norm1.vjp(&block_tape.input, &normal)?)?
                }
                _ => middle,
            });
        }
        if wrt.anchor && gradients.anchor.is_none() {
            if tape.inserts.attention.is_none() {
                return Err(Error::argument("wrt", "no anchor gradient: no anchor is put in", "one"));
            }
            // Only outputs before the anchor's place were differentiated.
            let shape = (grid.tokens(), self.config.hidden);
            gradients.anchor = Some(Tensor::zeros(shape, DType::F32, &self.device)?);
        }
        if wrt.pixels {
            for (_, given) in cotangent.hidden.iter().filter(|(at, _)| *at == 0) {
                gradient = add(gradient, Some(given.clone()))?;
            }
            let (batch, f) = tape.shape;
            gradients.pixels = Some(match gradient {
                Some(gradient) => {
                    let filtered = self.embed_vjp(&gradient, grid, f)?;
                    match &tape.inserts.input {
                        Some(filter) => Self::per_frame(&filtered, |frames| filter.adjoint(frames))?,
                        None => filtered,
                    }
                }
                None => {
                    let ((rows, columns), p) = (grid.size, self.config.patch);
                    Tensor::zeros((batch, f, 3, rows * p, columns * p), DType::F32, &self.device)?
                }
            });
        }
        Ok(gradients)
    }
}

fn places<'a>(block: &Block, grid: &'a Grid) -> &'a super::layers::Places {
    match &grid.windowed {
        Some(windowed) if block.windowed => windowed,
        _ => &grid.places,
    }
}

fn push_norm(all: &mut Vec<(String, Tensor)>, name: &str, norm: &Norm) {
    all.extend(norm.tensors().into_iter().map(|(part, tensor)| (format!("{name}.{part}"), tensor.clone())));
}

fn push_linear(all: &mut Vec<(String, Tensor)>, name: &str, layer: &Linear) {
    all.push((format!("{name}.weight"), layer.weight().clone()));
    all.extend(layer.bias().map(|bias| (format!("{name}.bias"), bias.clone())));
}

/// The rows of a cotangent that belong to some of a picture's slices.
fn part_of(cotangent: &Cotangent, start: usize, n: usize) -> Result<Cotangent> {
    let part = |x: &Tensor| -> Result<Tensor> { Ok(x.narrow(0, start, n)?) };
    let whole = |x: &Option<Tensor>| x.as_ref().map(part).transpose();
    let list =
        |list: &[(usize, Tensor)]| list.iter().map(|(at, x)| Ok((*at, part(x)?))).collect::<Result<Vec<_>>>();
    Ok(Cotangent {
        hidden: list(&cotangent.hidden)?,
        pooled: whole(&cotangent.pooled)?,
        embeds: whole(&cotangent.embeds)?,
        merged: whole(&cotangent.merged)?,
        deepstack: list(&cotangent.deepstack)?,
    })
}

impl BatchTape {
    fn new(grid: &Arc<Grid>, inserts: &Inserts) -> Self {
        let (grid, inserts) = (grid.clone(), inserts.clone());
        Self { grid, inserts, shape: (0, 0), blocks: Vec::new(), mergers: Vec::new() }
    }
}

/// A [`Qwen`] for stills of one size.
#[derive(Clone)]
pub struct QwenAt {
    tower: Qwen,
    spec: TowerSpec,
    grid: Arc<Grid>,
    inserts: Inserts,
}

impl QwenAt {
    /// What is put in at this size.
    pub fn inserts(&self) -> &Inserts {
        &self.inserts
    }

    /// The tower for any size.
    pub fn tower(&self) -> &Qwen {
        &self.tower
    }

    fn stills(&self, pixels: &Tensor) -> Result<Tensor> {
        let (height, width) = self.spec.picture;
        match *pixels.dims() {
            [batch, 3, h, w] if batch > 0 && (h, w) == (height, width) => Ok(pixels.unsqueeze(1)?),
            _ => {
                let found = format!("{:?}", pixels.dims());
                Err(Error::argument("pixels", format!("shape [B, 3, {height}, {width}]"), found))
            }
        }
    }
}

impl VisionTower for QwenAt {
    type Tape = BatchTape;

    fn spec(&self) -> &TowerSpec {
        &self.spec
    }

    fn device(&self) -> &Device {
        &self.tower.device
    }

    fn forward(&self, pixels: &Tensor, want: &Want) -> Result<Features> {
        self.tower.run(&self.stills(pixels)?, &self.grid, &self.inserts, want, None)
    }

    fn forward_tape(&self, pixels: &Tensor, want: &Want) -> Result<(Features, BatchTape)> {
        let mut tape = BatchTape::new(&self.grid, &self.inserts);
        let stills = self.stills(pixels)?;
        let features = self.tower.run(&stills, &self.grid, &self.inserts, want, Some(&mut tape))?;
        Ok((features, tape))
    }

    fn vjp(&self, tape: &BatchTape, cotangent: &Cotangent, wrt: Wrt) -> Result<Gradients> {
        let mut gradients = self.tower.batch_vjp(tape, cotangent, wrt)?;
        gradients.pixels = gradients.pixels.map(|pixels| pixels.i((.., 0))).transpose()?;
        Ok(gradients)
    }
}

impl Insertable for QwenAt {
    fn with(&self, inserts: Inserts) -> Self {
        Self { inserts, ..self.clone() }
    }

    fn first_attention(&self, pixels: &Tensor) -> Result<Tensor> {
        let stream = self.tower.embed(&self.stills(pixels)?, &self.grid)?;
        let block =
            self.tower.blocks.first().ok_or_else(|| Error::argument("tower", "one with a block", "none"))?;
        let normal = block.norm1.forward(&stream)?;
        Ok(block.attention.forward_at(&normal, places(block, &self.grid))?.0)
    }

    fn fingerprint(&self) -> Result<String> {
        self.tower.fingerprint()
    }

    fn dtype(&self) -> DType {
        self.tower.dtype
    }
}

/// [`Qwen::fingerprint`] of the tower in `checkpoint`, reading only what it covers.
///
/// # Errors
/// If the checkpoint has no such tower, or one without the weights `config` asks for.
pub fn checkpoint_fingerprint(checkpoint: &Checkpoint, config: &QwenConfig) -> Result<String> {
    let weights = QwenWeights::find(checkpoint, &Device::Cpu)?;
    let c = config;
    let (d, p, m) = (c.hidden, c.patch, c.intermediate);
    let v3 = c.family == Family::Qwen3Vl;
    let mut shapes = vec![("patch_embed.proj.weight".to_string(), vec![d, 3, c.frames, p, p])];
    if v3 {
        shapes.push(("patch_embed.proj.bias".into(), vec![d]));
        shapes.push(("pos_embed.weight".into(), vec![c.positions, d]));
    }
    let norm = |name: &str| -> Vec<(String, Vec<usize>)> {
        let parts: &[&str] = if c.family == Family::Qwen2_5Vl { &["weight"] } else { &["weight", "bias"] };
        parts.iter().map(|part| (format!("blocks.0.{name}.{part}"), vec![d])).collect()
    };
    let layer = |name: &str, rows: usize, columns: usize| {
        let name = format!("blocks.0.{name}");
        [(format!("{name}.weight"), vec![rows, columns]), (format!("{name}.bias"), vec![rows])]
    };
    shapes.extend(norm("norm1"));
    shapes.extend(layer("attn.qkv", 3 * d, d));
    shapes.extend(layer("attn.proj", d, d));
    shapes.extend(norm("norm2"));
    match c.family {
        Family::Qwen2_5Vl => {
            shapes.extend(layer("mlp.gate_proj", m, d));
            shapes.extend(layer("mlp.up_proj", m, d));
            shapes.extend(layer("mlp.down_proj", d, m));
        }
        Family::Qwen2Vl => {
            shapes.extend(layer("mlp.fc1", m, d));
            shapes.extend(layer("mlp.fc2", d, m));
        }
        Family::Qwen3Vl => {
            shapes.extend(layer("mlp.linear_fc1", m, d));
            shapes.extend(layer("mlp.linear_fc2", d, m));
        }
    }
    fingerprint(shapes.into_iter().map(|(name, shape)| {
        let tensor = weights.get(&name, &shape)?;
        Ok((name, tensor))
    }))
}
