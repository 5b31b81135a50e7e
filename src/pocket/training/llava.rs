//! Training the pocket LLaVA: a projector and a small Llama on the frozen tower of the pocket CLIP.
//!
//! Each picture is asked several questions at once. They share the picture's tokens and do not see
//! one another, so each is answered as the first of its conversation; in a part of the batch they
//! follow one another instead, as turns do. The loss is on the answers alone.

use std::path::Path;
use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde_json::json;
use tokenizers::Tokenizer;

use super::autograd::{attend, join_heads, linear, log_softmax, split_heads};
use super::clip::{MEAN, STD, preprocessor_json, vision_config, vision_json};
use super::parameters::{Leaves, Parameters};
use super::words::{CHAT_TEMPLATE, DESCRIBE, ids, llava_tokenizer, read_tokenizer};
use super::{Plan, Share, Step};
use crate::model::{Lookup, Model};
use crate::pocket::{Scene, Split, draw};
use crate::tower::clip::Clip;
use crate::tower::weights::Weights;
use crate::tower::{VisionTower, Want};
use crate::{Error, Result};

const WIDTH: usize = 128;
const INNER: usize = 384;
const BLOCKS: usize = 3;
const HEADS: usize = 4;
const HEAD: usize = WIDTH / HEADS;
const EPS: f64 = 1e-5;
const THETA: f64 = 10_000.0;
const END: u32 = 2;
const IMAGE_TOKEN: u32 = 4;
/// The shipped model's plan.
pub const PLAN: Plan = Plan {
    steps: 1400,
    until: None,
    group: 16,
    groups: 4,
    rate: 2e-3,
    warmup: 100,
    weight_decay: 0.01,
    seed: 1,
};

/// Questions per picture and step.
const QUESTIONS: usize = 5;

fn initialise(p: &mut Parameters, vision: usize, vocabulary: usize) {
    let linear = |p: &mut Parameters, name: &str, rows: usize, columns: usize| {
        p.normal(&format!("{name}.weight"), (columns as f64).powf(-0.5), &[rows, columns]);
    };
    for (name, columns) in [("linear_1", vision), ("linear_2", WIDTH)] {
        linear(p, &format!("multi_modal_projector.{name}"), WIDTH, columns);
        p.constant(&format!("multi_modal_projector.{name}.bias"), 0.0, &[WIDTH]);
    }
    p.normal("language_model.model.embed_tokens.weight", 0.02, &[vocabulary, WIDTH]);
    let deep = (2.0 * BLOCKS as f64).powf(-0.5);
    for i in 0..BLOCKS {
        let at = |part: &str| format!("language_model.model.layers.{i}.{part}");
        for name in ["q_proj", "k_proj", "v_proj"] {
            linear(p, &at(&format!("self_attn.{name}")), WIDTH, WIDTH);
        }
        p.normal(&at("self_attn.o_proj.weight"), deep * (WIDTH as f64).powf(-0.5), &[WIDTH, WIDTH]);
        linear(p, &at("mlp.gate_proj"), INNER, WIDTH);
        linear(p, &at("mlp.up_proj"), INNER, WIDTH);
        p.normal(&at("mlp.down_proj.weight"), deep * (INNER as f64).powf(-0.5), &[WIDTH, INNER]);
        p.constant(&at("input_layernorm.weight"), 1.0, &[WIDTH]);
        p.constant(&at("post_attention_layernorm.weight"), 1.0, &[WIDTH]);
    }
    p.constant("language_model.model.norm.weight", 1.0, &[WIDTH]);
    p.normal("language_model.lm_head.weight", 0.02, &[vocabulary, WIDTH]);
}

/// One picture's conversation: tokens behind those of the picture, where each stands and what it
/// sees, and which tokens are to be foretold.
struct Talk {
    tokens: Vec<u32>,
    positions: Vec<usize>,
    /// The branch a token belongs to; one sees the picture and its own branch alone.
    branches: Vec<usize>,
    /// `(row, token)`: at that token the next one is this.
    targets: Vec<(usize, u32)>,
    /// Where each answer's targets begin.
    answers: Vec<usize>,
}

fn talk(tokenizer: &Tokenizer, scene: &Scene, rng: &mut ChaCha8Rng, before: usize) -> Result<Talk> {
    let mut asked: Vec<(&str, &str)> = vec![(DESCRIBE, &scene.caption)];
    asked.extend(scene.questions.iter().chain(&scene.more).map(|q| (q.question.as_str(), q.answer.as_str())));
    // The caption and the three questions that are scored always, then others, in any order.
    while asked.len() > QUESTIONS {
        let at = 4 + rng.next_u32() as usize % (asked.len() - 4);
        asked.remove(at);
    }
    for i in (1..asked.len()).rev() {
        asked.swap(i, rng.next_u32() as usize % (i + 1));
    }
    let turns = rng.next_u32().is_multiple_of(4);
    let mut talk =
        Talk { tokens: vec![], positions: vec![], branches: vec![], targets: vec![], answers: vec![] };
    for (i, (question, answer)) in asked.into_iter().enumerate() {
        let opening = if turns && i > 0 { "USER: " } else { "\n" };
        let mut tokens = ids(tokenizer, &format!("{opening}{question} ASSISTANT:"))?;
        let first = tokens.len();
        tokens.extend(ids(tokenizer, answer)?);
        tokens.push(END);
        let from = if turns { before + talk.tokens.len() } else { before };
        talk.answers.push(talk.targets.len());
        for (j, token) in tokens.iter().enumerate() {
            if j >= first {
                talk.targets.push((before + talk.tokens.len() - 1, *token));
            }
            talk.positions.push(from + j);
            talk.branches.push(if turns { 0 } else { i });
            talk.tokens.push(*token);
        }
    }
    Ok(talk)
}

fn rms_norm(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (a, b) = (x.narrow(2, 0, HEAD / 2)?, x.narrow(2, HEAD / 2, HEAD / 2)?);
    let turned = Tensor::cat(&[&b.neg()?, &a], 2)?;
    Ok(((x * cos)? + (turned * sin)?)?)
}

/// The sum of losses over the answers' tokens, with the number of tokens, and how many answers are
/// right in every token.
fn answer(
    leaves: &Leaves,
    features: &Tensor,
    start: &[u32],
    talks: &[Talk],
) -> Result<(Tensor, usize, usize)> {
    let (batch, seen, _) = features.dims3()?;
    let before = start.len() + seen;
    let longest = talks.iter().map(|t| t.tokens.len()).max().unwrap_or(0);
    let n = before + longest;
    let (mut tokens, mut mask) = (Vec::new(), vec![-1e9f32; batch * n * n]);
    let (mut cos, mut sin) = (Vec::with_capacity(batch * HEADS * n * HEAD), Vec::new());
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    // A position's angles, as cosine and sine.
    let angle = |i: usize| {
        let angle = (i / (HEAD / 2)) as f64 * THETA.powf(-((i % (HEAD / 2)) as f64) * 2.0 / HEAD as f64);
        (angle.cos() as f32, angle.sin() as f32)
    };
    let angles: Vec<(f32, f32)> = (0..n * HEAD / 2).map(angle).collect();
    for (b, talk) in talks.iter().enumerate() {
        tokens
            .extend(talk.tokens.iter().copied().chain(std::iter::repeat_n(END, longest - talk.tokens.len())));
        for i in 0..n {
            let row = &mut mask[(b * n + i) * n..(b * n + i + 1) * n];
            let branch = |j: usize| j.checked_sub(before).and_then(|j| talk.branches.get(j));
            for (j, seen) in row[..=i].iter_mut().enumerate() {
                if j < before || branch(j) == branch(i) {
                    *seen = 0.0;
                }
            }
        }
        for _ in 0..HEADS {
            for i in 0..n {
                let position =
                    i.checked_sub(before).and_then(|i| talk.positions.get(i)).copied().unwrap_or(i);
                let angles = &angles[position * HEAD / 2..(position + 1) * HEAD / 2];
                for _ in 0..2 {
                    cos.extend(angles.iter().map(|(cos, _)| cos));
                    sin.extend(angles.iter().map(|(_, sin)| sin));
                }
            }
        }
        rows.extend(talk.targets.iter().map(|(row, _)| (b * n + row) as u32));
        targets.extend(talk.targets.iter().map(|(_, token)| *token));
    }
    let tensor = |values: Vec<f32>| Tensor::from_vec(values, (batch * HEADS, n, HEAD), &Device::Cpu);
    let (cos, sin, mask) = (tensor(cos)?, tensor(sin)?, Arc::new(mask));

    let get = |name: &str| leaves.get(name);
    let project = |x: &Tensor, name: &str| {
        let at = |part: &str| get(&format!("multi_modal_projector.{name}.{part}"));
        linear(x, at("weight")?, Some(at("bias")?))
    };
    let pictures = features.reshape((batch * seen, features.dim(2)?))?;
    let pictures = project(&project(&pictures, "linear_1")?.gelu_erf()?, "linear_2")?;
    let table = get("language_model.model.embed_tokens.weight")?;
    let start = table.index_select(&Tensor::new(start, &Device::Cpu)?, 0)?.unsqueeze(0)?;
    let start = start.broadcast_as((batch, start.dim(1)?, WIDTH))?;
    let words =
        table.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?.reshape((batch, longest, WIDTH))?;
    let x = Tensor::cat(&[&start, &pictures.reshape((batch, seen, WIDTH))?, &words], 1)?;
    let mut x = x.reshape((batch * n, WIDTH))?;
    for i in 0..BLOCKS {
        let get = |part: &str| get(&format!("language_model.model.layers.{i}.{part}.weight"));
        let h = rms_norm(&x, get("input_layernorm")?)?;
        let head = |name: &str| split_heads(&linear(&h, get(name)?, None)?, batch, HEADS);
        let q = rotate(&head("self_attn.q_proj")?, &cos, &sin)?;
        let k = rotate(&head("self_attn.k_proj")?, &cos, &sin)?;
        let h = join_heads(&attend(&q, &k, &head("self_attn.v_proj")?, mask.clone())?, batch)?;
        x = (x + linear(&h, get("self_attn.o_proj")?, None)?)?;
        let h = rms_norm(&x, get("post_attention_layernorm")?)?;
        let h = (linear(&h, get("mlp.gate_proj")?, None)?.silu()? * linear(&h, get("mlp.up_proj")?, None)?)?;
        x = (x + linear(&h, get("mlp.down_proj")?, None)?)?;
    }
    // Rows that are not asked for need no logits.
    let x = x.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
    let x = rms_norm(&x, get("language_model.model.norm.weight")?)?;
    let logits = linear(&x, get("language_model.lm_head.weight")?, None)?;
    let told = Tensor::new(targets.as_slice(), &Device::Cpu)?.unsqueeze(1)?;
    let loss = log_softmax(&logits)?.gather(&told, 1)?.sum_all()?.neg()?;
    let best: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
    let (mut at, mut right) = (0, 0);
    for talk in talks {
        let ends = talk.answers.iter().skip(1).copied().chain([talk.targets.len()]);
        right += talk
            .answers
            .iter()
            .zip(ends)
            .filter(|(a, b)| best[at + **a..at + b] == targets[at + **a..at + b])
            .count();
        at += talk.targets.len();
    }
    Ok((loss, targets.len(), right))
}

/// What stays as it is through training.
struct Fixed {
    tower: Clip,
    block: usize,
    tokenizer: Tokenizer,
    /// The tokens before the picture.
    start: Vec<u32>,
}

impl Fixed {
    fn features(&self, scenes: &[Scene]) -> Result<Tensor> {
        let pictures: Vec<Tensor> = scenes
            .iter()
            .map(|scene| crate::image::pixels_from_rgb(&scene.picture, &Device::Cpu))
            .collect::<Result<_>>()?;
        let pixels = Tensor::stack(&pictures, 0)?;
        let hidden = self.tower.forward(&pixels, &Want::hidden(self.block))?.hidden.remove(0);
        Ok(hidden.narrow(1, 1, hidden.dim(1)? - 1)?.contiguous()?)
    }
}

fn share(p: &Parameters, fixed: &Fixed, plan: &Plan, split: Split, step: u64, group: usize) -> Result<Share> {
    let batch = (plan.group * plan.groups) as u64;
    let first = (step - 1) * batch + (group * plan.group) as u64;
    let size = fixed.tower.spec().image_size as u32;
    let scenes = (first..first + plan.group as u64)
        .map(|i| draw(split, plan.seed, i, size))
        .collect::<Result<Vec<_>>>()?;
    let mut seed = [1u8; 32];
    seed[..8].copy_from_slice(&plan.seed.to_le_bytes());
    seed[8..16].copy_from_slice(&first.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(seed);
    let features = fixed.features(&scenes)?;
    let before = fixed.start.len() + features.dim(1)?;
    let talks = scenes
        .iter()
        .map(|scene| talk(&fixed.tokenizer, scene, &mut rng, before))
        .collect::<Result<Vec<_>>>()?;
    let leaves = p.leaves(|_| true)?;
    let (loss, tokens, right) = answer(&leaves, &features, &fixed.start, &talks)?;
    let mut gradients = p.zeros();
    if matches!(split, Split::Train) {
        let mean = loss.affine(1.0 / tokens as f64, 0.0)?;
        leaves.add(p, &mean.backward()?, &mut gradients)?;
    }
    let answers = talks.iter().map(|talk| talk.answers.len()).sum::<usize>() as f64;
    // Loss per token, accuracy per answer.
    let loss = f64::from(loss.to_scalar::<f32>()?) / tokens as f64 * answers;
    Ok(Share { gradients, loss, right: right as f64, n: answers })
}

fn prepare(plan: &Plan, clip: &Path, model: &Path) -> Result<(Fixed, Parameters)> {
    std::fs::create_dir_all(model).map_err(|e| Error::write(model, e))?;
    let path = model.join("tokenizer.json");
    let found = Model::find(&clip.display().to_string(), &Lookup::default())?;
    // The configuration that is written is the pocket tower's.
    if found.tower_config()? != vision_config() {
        return Err(Error::Model {
            model: found.name,
            reason: "has another tower than a pocket CLIP".into(),
        });
    }
    let mut preprocess = found.preprocess(None)?;
    (preprocess.mean, preprocess.std) = (MEAN, STD);
    let tower = found.tower(&preprocess, None, &Device::Cpu)?;
    if !path.is_file() {
        let size = tower.spec().image_size as u32;
        let scenes = (0..3000).map(|i| draw(Split::Train, plan.seed, i, size)).collect::<Result<Vec<_>>>()?;
        super::write_json(&path, &llava_tokenizer(&scenes)?)?;
    }
    let tokenizer = read_tokenizer(&path)?;
    let mut parameters = Parameters::new(plan.seed);
    initialise(&mut parameters, tower.spec().hidden, tokenizer.get_vocab_size(true));
    let start = ids(&tokenizer, "<s>USER: ")?;
    Ok((Fixed { block: tower.spec().blocks - 1, tower, tokenizer, start }, parameters))
}

/// Trains, or goes on training, in `folder` on the tower of the CLIP model folder `clip`; `told`
/// hears of every step. Then writes the model as transformers' `LlavaForConditionalGeneration`, as
/// it is named on the Hub, into `folder/model`.
///
/// # Errors
/// If a file cannot be read or written, or the folder belongs to another plan.
pub fn train(plan: &Plan, clip: &Path, folder: &Path, told: &mut dyn FnMut(&Step)) -> Result<()> {
    let model = folder.join("model");
    let (fixed, mut parameters) = prepare(plan, clip, &model)?;
    let tower = Model::find(&clip.display().to_string(), &Lookup::default())?.fingerprint()?;
    super::check_same(&folder.join("tower"), &tower, "is of a run on another CLIP; use another folder")?;
    super::run(
        plan,
        folder,
        &mut parameters,
        None,
        |p, step, group| share(p, &fixed, plan, Split::Train, step, group),
        told,
    )?;
    write(&parameters, &fixed, clip, &model)
}

fn write(parameters: &Parameters, fixed: &Fixed, clip: &Path, model: &Path) -> Result<()> {
    let mut tensors = Vec::new();
    // The tower's weights as they are stored, byte for byte.
    let checkpoint = crate::tower::weights::Checkpoint::open(clip)?;
    let weights = checkpoint.at("", &Device::Cpu);
    for (name, tensor) in fixed.tower.tensors()? {
        let stored = weights.get(&format!("vision_model.{name}"), tensor.dims())?;
        let values: Vec<half::f16> = stored.to_dtype(candle_core::DType::F16)?.flatten_all()?.to_vec1()?;
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((format!("vision_tower.vision_model.{name}"), stored.dims().to_vec(), bytes));
    }
    tensors.extend(parameters.halves(str::to_string));
    super::write_model(model, tensors)?;
    let vocabulary = fixed.tokenizer.get_vocab_size(true);
    super::write_json(
        &model.join("config.json"),
        &json!({
            "architectures": ["LlavaForConditionalGeneration"], "dtype": "float16",
            "image_seq_length": fixed.tower.spec().tokens() - 1, "image_token_index": IMAGE_TOKEN,
            "model_type": "llava", "multimodal_projector_bias": true, "projector_hidden_act": "gelu",
            "text_config": {
                "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": END,
                "head_dim": HEAD, "hidden_act": "silu", "hidden_size": WIDTH, "initializer_range": 0.02,
                "intermediate_size": INNER, "max_position_embeddings": 2048, "mlp_bias": false,
                "model_type": "llama", "num_attention_heads": HEADS, "num_hidden_layers": BLOCKS,
                "num_key_value_heads": HEADS, "pad_token_id": 3, "rms_norm_eps": EPS,
                "rope_theta": THETA, "tie_word_embeddings": false, "use_cache": true, "vocab_size": vocabulary
            },
            "tie_word_embeddings": false, "vision_config": vision_json(),
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default"
        }),
    )?;
    super::write_json(
        &model.join("generation_config.json"),
        &json!({"_from_model_config": true, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": 3}),
    )?;
    let mut image = preprocessor_json();
    super::write_json(
        &model.join("processor_config.json"),
        &json!({
            "image_processor": image, "image_token": "<image>", "num_additional_image_tokens": 1,
            "patch_size": fixed.tower.spec().patch_size, "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default"
        }),
    )?;
    image["processor_class"] = "LlavaProcessor".into();
    super::write_json(&model.join("preprocessor_config.json"), &image)?;
    super::write_json(
        &model.join("tokenizer_config.json"),
        &json!({
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
            "image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"}, "model_max_length": 2048,
            "processor_class": "LlavaProcessor", "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE
        }),
    )?;
    super::write_whole(&model.join("chat_template.jinja"), CHAT_TEMPLATE.as_bytes())
}

/// The share of answers about the first `n` pictures of the validation split, in percent, that are
/// right in every token when each token is foretold from the right ones before it.
///
/// # Errors
/// If something does not fit.
pub fn validate(folder: &Path, clip: &Path, plan: &Plan, n: u64) -> Result<f64> {
    let (fixed, mut parameters) = prepare(plan, clip, &folder.join("model"))?;
    parameters.load(&folder.join("state.safetensors"))?;
    let groups = n.div_ceil(plan.group as u64);
    let one = Plan { groups: 1, ..*plan };
    let shares = super::in_parallel(groups as usize, |i| {
        share(&parameters, &fixed, &one, Split::Validation, i as u64 + 1, 0)
    })?;
    let (right, n) = shares.iter().fold((0.0, 0.0), |(a, b), share| (a + share.right, b + share.n));
    Ok(100.0 * right / n)
}
