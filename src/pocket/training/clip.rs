//! Training the pocket CLIP: pictures against class prompts and against their own captions.
//!
//! The loss is the cross-entropy of a picture over the prompts of all kinds (one template a step)
//! plus CLIP's symmetric contrastive loss (Radford et al., arXiv 2103.00020) of the pictures of a
//! group and their captions, where pictures with the same caption share it. Attention and MLP of
//! every vision block are dropped per picture with a small probability (stochastic depth, Huang et
//! al., arXiv 1603.09382).

use std::path::Path;
use std::sync::Mutex;

use candle_core::{D, Device, Tensor, Var};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::autograd::{layer_norm, linear, log_softmax, unit_rows};
use super::parameters::{Gradients, Leaves, Parameters};
use super::transformer::{
    self, EPS, Stack, Tape, Transformer, affine, affine_weights, norm, norm_back, with_two,
};
use super::words::{TEMPLATES, clip_tokenizer, ids};
use super::{Plan, Share, Step};
use crate::image::{Filter, resize};
use crate::pocket::{KINDS, Scene, Split, draw};
use crate::tower::clip::ClipConfig;
use crate::{Error, Result};

/// Side of the pictures, in pixels.
pub const IMAGE: usize = 96;
/// Mean and standard deviation of CLIP's pixels.
pub const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_7];
/// As [`MEAN`].
pub const STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];
/// `ln 100`, where CLIP holds its logit scale.
const MOST_SCALE: f32 = 4.605_170_2;

const VISION: Stack = Stack { width: 128, inner: 512, blocks: 9, heads: 4 };
const TEXT: Stack = Stack { width: 128, inner: 512, blocks: 2, heads: 4 };
const PATCH: usize = 12;
const PROJECTION: usize = 128;
const CONTEXT: usize = 32;
/// The shipped model's plan. It was stopped where the held-out pictures were all named right.
pub const PLAN: Plan = Plan {
    steps: 4000,
    until: Some(3600),
    group: 64,
    groups: 2,
    rate: 1e-3,
    warmup: 200,
    weight_decay: 0.05,
    seed: 1,
};

/// Numbers in a patch.
const PIXELS: usize = 3 * PATCH * PATCH;
const TOKENS: usize = (IMAGE / PATCH) * (IMAGE / PATCH) + 1;
/// The chance that a branch of a vision block is left out for a picture.
const DROP: f64 = 0.1;

/// The vision part of the configuration.
pub fn vision_config() -> ClipConfig {
    ClipConfig {
        hidden_size: VISION.width,
        intermediate_size: VISION.inner,
        num_hidden_layers: VISION.blocks,
        num_attention_heads: VISION.heads,
        image_size: IMAGE,
        patch_size: PATCH,
        hidden_act: "quick_gelu".into(),
        layer_norm_eps: 1e-5,
        projection_dim: PROJECTION,
        model_type: "clip_vision_model".into(),
    }
}

/// `vision_config` as transformers writes it.
pub(super) fn vision_json() -> Value {
    json!({
        "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": VISION.width, "image_size": IMAGE,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": VISION.inner,
        "layer_norm_eps": 1e-5, "model_type": "clip_vision_model", "num_attention_heads": VISION.heads,
        "num_channels": 3, "num_hidden_layers": VISION.blocks, "patch_size": PATCH, "projection_dim": PROJECTION
    })
}

fn config_json(vocabulary: usize) -> Value {
    json!({
        "architectures": ["CLIPModel"], "dtype": "float16", "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": PROJECTION,
        "text_config": {
            "attention_dropout": 0.0, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
            "hidden_act": "quick_gelu", "hidden_size": TEXT.width, "initializer_factor": 1.0,
            "initializer_range": 0.02, "intermediate_size": TEXT.inner, "layer_norm_eps": 1e-5,
            "max_position_embeddings": CONTEXT, "model_type": "clip_text_model",
            "num_attention_heads": TEXT.heads, "num_hidden_layers": TEXT.blocks,
            "pad_token_id": vocabulary - 1, "projection_dim": PROJECTION, "vocab_size": vocabulary
        },
        "vision_config": vision_json()
    })
}

pub(super) fn preprocessor_json() -> Value {
    json!({
        "crop_size": {"height": IMAGE, "width": IMAGE}, "do_center_crop": true, "do_convert_rgb": true,
        "do_normalize": true, "do_rescale": true, "do_resize": true,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": IMAGE}
    })
}

/// Initial values as in transformers' `CLIPPreTrainedModel._init_weights`.
fn initialise(p: &mut Parameters, vocabulary: usize) {
    let (d, t) = (VISION.width, TEXT.width);
    let norm = |p: &mut Parameters, name: &str, width: usize| {
        p.constant(&format!("{name}.weight"), 1.0, &[width]);
        p.constant(&format!("{name}.bias"), 0.0, &[width]);
    };
    p.normal("vision_model.embeddings.class_embedding", 0.02, &[d]);
    let patch = [d, 3, PATCH, PATCH];
    p.normal("vision_model.embeddings.patch_embedding.weight", (PIXELS as f64).powf(-0.5), &patch);
    p.normal("vision_model.embeddings.position_embedding.weight", 0.02, &[TOKENS, d]);
    norm(p, "vision_model.pre_layrnorm", d);
    transformer::initialise(p, "vision_model", VISION);
    norm(p, "vision_model.post_layernorm", d);
    p.normal("visual_projection.weight", (d as f64).powf(-0.5), &[PROJECTION, d]);
    p.normal("text_model.embeddings.token_embedding.weight", 0.02, &[vocabulary, t]);
    p.normal("text_model.embeddings.position_embedding.weight", 0.01, &[CONTEXT, t]);
    transformer::initialise(p, "text_model", TEXT);
    norm(p, "text_model.final_layer_norm", t);
    p.normal("text_projection.weight", (t as f64).powf(-0.5), &[PROJECTION, t]);
    p.constant("logit_scale", 2.6592, &[]);
}

/// Pictures as normalised patches, `(B P, 3 p p)`.
fn patches(scenes: &[Scene]) -> Vec<f32> {
    let side = IMAGE / PATCH;
    let mut values = Vec::with_capacity(scenes.len() * IMAGE * IMAGE * 3);
    for scene in scenes {
        let small;
        let picture = if scene.picture.width() as usize == IMAGE {
            &scene.picture
        } else {
            small = resize(&scene.picture, IMAGE as u32, IMAGE as u32, Filter::Bicubic);
            &small
        };
        for patch in 0..side * side {
            let (top, left) = ((patch / side * PATCH) as u32, (patch % side * PATCH) as u32);
            for channel in 0..3 {
                for y in 0..PATCH as u32 {
                    for x in 0..PATCH as u32 {
                        let value = f32::from(picture.get_pixel(left + x, top + y).0[channel]) / 255.0;
                        values.push((value - MEAN[channel]) / STD[channel]);
                    }
                }
            }
        }
    }
    values
}

/// The vision transformer up to the class tokens.
struct Seen<'a> {
    transformer: Transformer<'a>,
    patches: Vec<f32>,
    /// Patches, class token and positions, before the first norm.
    embedded: Vec<f32>,
    tape: Tape,
    /// The class tokens after the last block, `(B, D)`.
    class: Tensor,
}

fn see<'a>(
    p: &'a Parameters,
    scenes: &[Scene],
    drop: Option<&mut ChaCha8Rng>,
    spare: Vec<f32>,
) -> Result<Seen<'a>> {
    let (batch, d) = (scenes.len(), VISION.width);
    let patches = patches(scenes);
    let get = |name: &str| p.get(&format!("vision_model.{name}"));
    let (class, positions) =
        (get("embeddings.class_embedding")?, get("embeddings.position_embedding.weight")?);
    let mut flat = vec![0f32; batch * (TOKENS - 1) * d];
    affine(
        &mut flat,
        &patches,
        get("embeddings.patch_embedding.weight")?,
        None,
        batch * (TOKENS - 1),
        PIXELS,
        d,
    );
    let mut embedded = Vec::with_capacity(batch * TOKENS * d);
    for picture in flat.chunks_exact((TOKENS - 1) * d) {
        let tokens = class.iter().chain(picture);
        embedded.extend(tokens.zip(positions).map(|(x, position)| x + position));
    }
    let mut x = vec![0f32; embedded.len()];
    norm(&mut x, &embedded, get("pre_layrnorm.weight")?, get("pre_layrnorm.bias")?);
    let transformer = Transformer::new(p, "vision_model", VISION, false)?;
    let tape = transformer.forward(&mut x, batch, drop.map(|rng| (DROP, rng)), spare);
    let class = x.chunks_exact(TOKENS * d).flat_map(|picture| &picture[..d]).copied().collect();
    Ok(Seen {
        transformer,
        patches,
        embedded,
        tape,
        class: Tensor::from_vec(class, (batch, d), &Device::Cpu)?,
    })
}

impl Seen<'_> {
    /// From the gradient at the class tokens; returns the buffer to use again.
    fn back(self, p: &Parameters, class: &Tensor, gradients: &mut Gradients) -> Result<Vec<f32>> {
        let d = VISION.width;
        let class: Vec<f32> = class.flatten_all()?.to_vec1()?;
        let mut g = vec![0f32; self.embedded.len()];
        g.chunks_exact_mut(TOKENS * d)
            .zip(class.chunks_exact(d))
            .for_each(|(g, class)| g[..d].copy_from_slice(class));
        let spare = self.transformer.backward(self.tape, &mut g, gradients);
        let mut at = vec![0f32; g.len()];
        let place = |name: &str| p.place(&format!("vision_model.{name}"));
        let (weight, bias) = (place("pre_layrnorm.weight")?, place("pre_layrnorm.bias")?);
        with_two(gradients, weight, bias, |dw, db| {
            norm_back(&mut at, &self.embedded, &g, p.values(weight), dw, db)
        });
        let (class, positions) =
            (place("embeddings.class_embedding")?, place("embeddings.position_embedding.weight")?);
        let mut flat = Vec::with_capacity(at.len());
        for picture in at.chunks_exact(TOKENS * d) {
            gradients[class].iter_mut().zip(picture).for_each(|(a, b)| *a += b);
            gradients[positions].iter_mut().zip(picture).for_each(|(a, b)| *a += b);
            flat.extend_from_slice(&picture[d..]);
        }
        let weight = &mut gradients[place("embeddings.patch_embedding.weight")?];
        affine_weights(weight, None, &flat, &self.patches, flat.len() / d, PIXELS, d);
        Ok(spare)
    }
}

/// Unit embeddings from the class tokens, `(B, projection)`.
fn project_pictures(leaves: &Leaves, class: &Tensor) -> Result<Tensor> {
    let get = |name: &str| leaves.get(&format!("vision_model.post_layernorm.{name}"));
    let class = layer_norm(class, get("weight")?, get("bias")?, f64::from(EPS))?;
    unit_rows(&linear(&class, leaves.get("visual_projection.weight")?, None)?)
}

/// The text transformer up to the last tokens.
struct Said<'a> {
    transformer: Transformer<'a>,
    tokens: Vec<u32>,
    /// Tokens per text.
    longest: usize,
    /// The row of each text's last token.
    ends: Vec<usize>,
    tape: Tape,
    /// The last tokens after the last block, `(T, D)`.
    last: Tensor,
}

fn say<'a>(p: &'a Parameters, tokenizer: &Tokenizer, texts: &[String], spare: Vec<f32>) -> Result<Said<'a>> {
    let mut rows = texts.iter().map(|text| ids(tokenizer, text)).collect::<Result<Vec<_>>>()?;
    let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
    if longest > CONTEXT {
        return Err(Error::argument("caption", format!("at most {CONTEXT} tokens"), longest.to_string()));
    }
    // The last token is the end of the text, which is where CLIP reads the embedding.
    let ends: Vec<usize> = rows.iter().enumerate().map(|(i, row)| i * longest + row.len() - 1).collect();
    let pad = rows.first().and_then(|row| row.last()).copied().unwrap_or(0);
    rows.iter_mut().for_each(|row| row.resize(longest, pad));
    let tokens: Vec<u32> = rows.concat();
    let d = TEXT.width;
    let embedding = p.get("text_model.embeddings.token_embedding.weight")?;
    let positions = p.get("text_model.embeddings.position_embedding.weight")?;
    let mut x = Vec::with_capacity(tokens.len() * d);
    for (i, token) in tokens.iter().enumerate() {
        let (at, position) = (*token as usize * d, i % longest * d);
        let pairs = embedding[at..at + d].iter().zip(&positions[position..position + d]);
        x.extend(pairs.map(|(a, b)| a + b));
    }
    let transformer = Transformer::new(p, "text_model", TEXT, true)?;
    let tape = transformer.forward(&mut x, texts.len(), None, spare);
    let last = ends.iter().flat_map(|end| &x[end * d..(end + 1) * d]).copied().collect();
    let last = Tensor::from_vec(last, (texts.len(), d), &Device::Cpu)?;
    Ok(Said { transformer, tokens, longest, ends, tape, last })
}

impl Said<'_> {
    /// From the gradient at the last tokens; returns the buffer to use again.
    fn back(self, p: &Parameters, last: &Tensor, gradients: &mut Gradients) -> Result<Vec<f32>> {
        let d = TEXT.width;
        let last: Vec<f32> = last.flatten_all()?.to_vec1()?;
        let mut g = vec![0f32; self.tokens.len() * d];
        for (end, last) in self.ends.iter().zip(last.chunks_exact(d)) {
            g[end * d..(end + 1) * d].copy_from_slice(last);
        }
        let spare = self.transformer.backward(self.tape, &mut g, gradients);
        let embedding = p.place("text_model.embeddings.token_embedding.weight")?;
        let positions = p.place("text_model.embeddings.position_embedding.weight")?;
        for (i, (token, g)) in self.tokens.iter().zip(g.chunks_exact(d)).enumerate() {
            for (place, row) in [(embedding, *token as usize), (positions, i % self.longest)] {
                let row = &mut gradients[place][row * d..(row + 1) * d];
                row.iter_mut().zip(g).for_each(|(a, b)| *a += b);
            }
        }
        Ok(spare)
    }
}

/// Unit embeddings from the last tokens, `(T, projection)`.
fn project_texts(leaves: &Leaves, last: &Tensor) -> Result<Tensor> {
    let get = |name: &str| leaves.get(&format!("text_model.final_layer_norm.{name}"));
    let last = layer_norm(last, get("weight")?, get("bias")?, f64::from(EPS))?;
    unit_rows(&linear(&last, leaves.get("text_projection.weight")?, None)?)
}

/// The weights behind both transformers, which are few.
fn is_head(name: &str) -> bool {
    [
        "vision_model.post_layernorm.",
        "visual_projection.",
        "text_model.final_layer_norm.",
        "text_projection.",
        "logit_scale",
    ]
    .iter()
    .any(|head| name.starts_with(head))
}

fn prompts(template: &str) -> Vec<String> {
    KINDS.iter().map(|kind| template.replace("{class}", kind.name)).collect()
}

/// The mean over rows of -sum(target log softmax(logits)).
fn cross_entropy(logits: &Tensor, target: &Tensor) -> Result<Tensor> {
    Ok((log_softmax(logits)? * target)?.sum_all()?.neg()?.affine(1.0 / logits.dim(0)? as f64, 0.0)?)
}

/// The size a training picture is drawn at: mostly the tower's own, else larger and then resized,
/// as a user's picture is.
fn drawn_size(index: u64) -> u32 {
    if index % 4 == 3 { IMAGE as u32 + 16 * (index / 4 % 9) as u32 } else { IMAGE as u32 }
}

/// Buffers of finished groups, to use again.
type Spare = Mutex<Vec<[Vec<f32>; 2]>>;

fn share(
    p: &Parameters,
    tokenizer: &Tokenizer,
    plan: &Plan,
    spare: &Spare,
    step: u64,
    group: usize,
) -> Result<Share> {
    let batch = (plan.group * plan.groups) as u64;
    let first = (step - 1) * batch + (group * plan.group) as u64;
    let scenes = (first..first + plan.group as u64)
        .map(|i| draw(Split::Train, plan.seed, i, drawn_size(i)))
        .collect::<Result<Vec<_>>>()?;
    let mut seed = [0u8; 32];
    seed[..8].copy_from_slice(&plan.seed.to_le_bytes());
    seed[8..16].copy_from_slice(&step.to_le_bytes());
    seed[16..24].copy_from_slice(&(group as u64).to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(seed);
    // Captions said once each, and which is whose.
    let mut texts = prompts(TEMPLATES[(step % TEMPLATES.len() as u64) as usize]);
    let kinds = texts.len();
    let mut whose = Vec::new();
    for scene in &scenes {
        let at = texts[kinds..].iter().position(|text| *text == scene.caption);
        whose.push(at.unwrap_or(texts.len() - kinds));
        if at.is_none() {
            texts.push(scene.caption.clone());
        }
    }
    let captions = texts.len() - kinds;
    let [small, large] = spare.lock().ok().and_then(|mut all| all.pop()).unwrap_or_default();
    let (texts, pictures) = (say(p, tokenizer, &texts, small)?, see(p, &scenes, Some(&mut rng), large)?);
    let leaves = p.leaves(is_head)?;
    let (last, class) = (Var::from_tensor(&texts.last)?, Var::from_tensor(&pictures.class)?);
    let said = project_texts(&leaves, &last)?;
    let seen = project_pictures(&leaves, &class)?.broadcast_mul(&leaves.get("logit_scale")?.exp()?)?;
    let n = scenes.len();
    let one_hot = |rows: usize, columns: usize, hot: &[usize]| -> Result<Tensor> {
        let mut values = vec![0f32; rows * columns];
        hot.iter().enumerate().for_each(|(row, column)| values[row * columns + column] = 1.0);
        Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
    };
    let labels: Vec<usize> = scenes.iter().map(|scene| scene.kind).collect();
    let logits = seen.matmul(&said.narrow(0, 0, kinds)?.t()?)?;
    let loss = cross_entropy(&logits, &one_hot(n, kinds, &labels)?)?;
    let matches = seen.matmul(&said.narrow(0, kinds, captions)?.t()?)?;
    let target = one_hot(n, captions, &whose)?;
    let by_text = target.t()?.contiguous()?;
    let by_text = by_text.broadcast_div(&by_text.sum_keepdim(1)?)?;
    let contrast =
        (cross_entropy(&matches, &target)? + cross_entropy(&matches.t()?.contiguous()?, &by_text)?)?;
    let loss = (loss + (contrast * 0.5)?)?;
    let store = loss.backward()?;
    let mut gradients = p.zeros();
    leaves.add(p, &store, &mut gradients)?;
    let at = |leaf: &Var| store.get(leaf).ok_or_else(|| Error::argument("training", "a gradient", "none"));
    let buffers =
        [texts.back(p, at(&last)?, &mut gradients)?, pictures.back(p, at(&class)?, &mut gradients)?];
    if let Ok(mut all) = spare.lock() {
        all.push(buffers);
    }
    let best: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
    let right = best.iter().zip(&labels).filter(|(best, label)| **best as usize == **label).count();
    Ok(Share {
        gradients,
        loss: f64::from(loss.to_scalar::<f32>()?) * n as f64,
        right: right as f64,
        n: n as f64,
    })
}

/// Trains, or goes on training, in `folder`; `told` hears of every step. Once the plan is done,
/// writes the model as transformers' `CLIPModel` into `folder/model`.
///
/// # Errors
/// If a file cannot be read or written, or the folder belongs to another plan.
pub fn train(plan: &Plan, folder: &Path, told: &mut dyn FnMut(&Step)) -> Result<()> {
    let model = folder.join("model");
    std::fs::create_dir_all(&model).map_err(|e| Error::write(&model, e))?;
    let path = model.join("tokenizer.json");
    if !path.is_file() {
        let scenes =
            (0..3000).map(|i| draw(Split::Train, plan.seed, i, IMAGE as u32)).collect::<Result<Vec<_>>>()?;
        let text =
            serde_json::to_string_pretty(&clip_tokenizer(&scenes)?).map_err(candle_core::Error::wrap)?;
        super::write_whole(&path, text.as_bytes())?;
    }
    let tokenizer = super::words::read_tokenizer(&path)?;
    let vocabulary = tokenizer.get_vocab_size(true);
    let mut parameters = Parameters::new(plan.seed);
    initialise(&mut parameters, vocabulary);
    let spare = Spare::default();
    let clamp = Some(("logit_scale", MOST_SCALE));
    super::run(
        plan,
        folder,
        &mut parameters,
        clamp,
        |p, step, group| share(p, &tokenizer, plan, &spare, step, group),
        told,
    )?;
    write(&parameters, &model, vocabulary)
}

/// Writes the model as it stands in a folder of an unfinished run.
///
/// # Errors
/// If the folder holds no such run, or a file cannot be written.
pub fn export(plan: &Plan, folder: &Path, model: &Path) -> Result<()> {
    let text = folder.join("model/tokenizer.json");
    let vocabulary = super::words::read_tokenizer(&text)?.get_vocab_size(true);
    let mut parameters = Parameters::new(plan.seed);
    initialise(&mut parameters, vocabulary);
    parameters.load(&folder.join("state.safetensors"))?;
    std::fs::create_dir_all(model).map_err(|e| Error::write(model, e))?;
    std::fs::copy(text, model.join("tokenizer.json")).map_err(|e| Error::write(model, e))?;
    write(&parameters, model, vocabulary)
}

fn write(parameters: &Parameters, model: &Path, vocabulary: usize) -> Result<()> {
    super::write_model(model, parameters.halves(str::to_string))?;
    super::write_json(&model.join("config.json"), &config_json(vocabulary))?;
    super::write_json(&model.join("preprocessor_config.json"), &preprocessor_json())?;
    super::write_json(
        &model.join("tokenizer_config.json"),
        &json!({
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "model_max_length": CONTEXT,
            "pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>"
        }),
    )
}

/// The zero-shot accuracy, in percent, over the first `n` pictures of the validation split, by the
/// weights in training.
///
/// # Errors
/// If something does not fit.
pub fn validate(folder: &Path, plan: &Plan, n: u64) -> Result<f64> {
    let tokenizer = super::words::read_tokenizer(&folder.join("model/tokenizer.json"))?;
    let mut parameters = Parameters::new(plan.seed);
    initialise(&mut parameters, tokenizer.get_vocab_size(true));
    parameters.load(&folder.join("state.safetensors"))?;
    let leaves = parameters.leaves(is_head)?;
    let said =
        project_texts(&leaves, &say(&parameters, &tokenizer, &prompts(TEMPLATES[0]), Vec::new())?.last)?
            .detach();
    let right = super::in_parallel(n.div_ceil(50) as usize, |part| {
        let from = part as u64 * 50;
        let scenes = (from..(from + 50).min(n))
            .map(|i| draw(Split::Validation, plan.seed, i, IMAGE as u32))
            .collect::<Result<Vec<_>>>()?;
        let seen = project_pictures(&leaves, &see(&parameters, &scenes, None, Vec::new())?.class)?.detach();
        let best: Vec<u32> = seen.matmul(&said.t()?)?.argmax(D::Minus1)?.to_vec1()?;
        Ok(best.iter().zip(&scenes).filter(|(best, scene)| **best as usize == scene.kind).count())
    })?;
    Ok(100.0 * right.iter().sum::<usize>() as f64 / n as f64)
}
