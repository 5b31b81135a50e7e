//! OpenAI's and OpenCLIP's names and configurations, told in those of transformers.
//!
//! The published robust towers are OpenCLIP's: FARE and TeCoA as the state dict of its visual tower
//! alone, Mao's TeCoA and TGA-ZSR as that of OpenAI's in a training checkpoint, of the same names.
//!
//! After open_clip `src/open_clip/model.py` (`CLIPVisionCfg`, `CLIPTextCfg`) and `transformer.py`.

use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Value, json};

use super::weights::{CheckpointAt, Weights};
use crate::{Error, Result};

/// Where one of transformers' tensors lies in OpenCLIP's.
#[derive(Debug, PartialEq)]
pub(crate) enum Source {
    /// A tensor of its own.
    Whole(String),
    /// A third of the rows: of the queries 0, keys 1, values 2.
    Third(String, usize),
    /// The other way round.
    Transposed(String),
}

impl Source {
    /// The tensor it is, or is a part of.
    pub fn name(&self) -> &str {
        match self {
            Self::Whole(name) | Self::Third(name, _) | Self::Transposed(name) => name,
        }
    }

    /// Reads it.
    pub fn get(&self, weights: &CheckpointAt<'_>, shape: &[usize]) -> Result<Tensor> {
        match self {
            Self::Whole(name) => weights.get(name, shape),
            Self::Third(name, third) => {
                let mut whole = shape.to_vec();
                let rows = shape.first().copied().unwrap_or(0);
                whole.iter_mut().take(1).for_each(|rows| *rows *= 3);
                Ok(weights.get(name, &whole)?.narrow(0, third * rows, rows)?.force_contiguous()?)
            }
            Self::Transposed(name) => {
                let turned: Vec<usize> = shape.iter().rev().copied().collect();
                Ok(weights.get(name, &turned)?.t()?.contiguous()?)
            }
        }
    }
}

/// A tensor of a block, `encoder.layers.*`, in a text or a vision tower alike: queries, keys and
/// values are in one matrix, as PyTorch's `MultiheadAttention` has them.
pub(crate) fn block(name: &str) -> Option<Source> {
    let (layer, part) = name.strip_prefix("encoder.layers.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let at = |part: String| format!("transformer.resblocks.{layer}.{part}");
    let whole = |part: &str| Some(Source::Whole(at(format!("{part}.{kind}"))));
    let third = |third: usize| Some(Source::Third(at(format!("attn.in_proj_{kind}")), third));
    match part {
        "self_attn.q_proj" => third(0),
        "self_attn.k_proj" => third(1),
        "self_attn.v_proj" => third(2),
        "self_attn.out_proj" => whole("attn.out_proj"),
        "layer_norm1" => whole("ln_1"),
        "layer_norm2" => whole("ln_2"),
        "mlp.fc1" => whole("mlp.c_fc"),
        "mlp.fc2" => whole("mlp.c_proj"),
        _ => None,
    }
}

/// A tensor of the vision tower.
pub(crate) fn visual(name: &str) -> Option<Source> {
    let whole = |name: &str| Some(Source::Whole(name.into()));
    match name {
        "embeddings.class_embedding" => return whole("class_embedding"),
        "embeddings.patch_embedding.weight" => return whole("conv1.weight"),
        "embeddings.position_embedding.weight" => return whole("positional_embedding"),
        "visual_projection.weight" => return Some(Source::Transposed("proj".into())),
        _ => {}
    }
    match name.split_once('.') {
        Some(("pre_layrnorm", kind)) => whole(&format!("ln_pre.{kind}")),
        Some(("post_layernorm", kind)) => whole(&format!("ln_post.{kind}")),
        _ => block(name),
    }
}

/// The `config.json` of transformers that says what OpenCLIP's `open_clip_config.json` does.
/// `file` is named in errors.
///
/// # Errors
/// If the file is no JSON, or asks for one of OpenCLIP's other vision towers. A text encoder of
/// another design is an error only for who asks for it.
pub(crate) fn config(text: &str, file: &Path) -> Result<Value> {
    let wrong = |reason: String| Error::config(file, reason);
    let json: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
    let object = |json: &Value, key: &str| -> Result<Map<String, Value>> {
        let found = json.get(key).and_then(Value::as_object).cloned();
        found.ok_or_else(|| wrong(format!("expected an object `{key}`")))
    };
    let model = json.get("model_cfg").unwrap_or(&json);
    let vision = object(model, "vision_cfg")?;
    let activation = match model.get("quick_gelu").and_then(Value::as_bool) {
        Some(true) => "quick_gelu",
        _ => "gelu",
    };
    let embedding = model.get("embed_dim").cloned().unwrap_or(Value::Null);
    const VISION: [&str; 8] = [
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        // Of training.
        "patch_dropout",
        "output_tokens",
    ];
    if let Some(key) = other(&vision, &VISION) {
        let found = &vision[key];
        return Err(wrong(format!("vision_cfg: `{key}` is {found}; this OpenCLIP design is not supported")));
    }
    let size = |part: &Map<String, Value>, key: &str, default: u64| -> Result<u64> {
        let found = part.get(key).filter(|found| !found.is_null());
        let number = |found: &Value| match found {
            Value::Array(sides) => match &sides[..] {
                [a, b] if a == b => a.as_u64(),
                _ => None,
            },
            found => found.as_u64(),
        };
        let Some(found) = found else { return Ok(default) };
        number(found)
            .filter(|number| (1..=1 << 20).contains(number))
            .ok_or_else(|| wrong(format!("`{key}`: expected a whole number from 1 to 2^20, found {found}")))
    };
    let ratio = |part: &Map<String, Value>| -> Result<f64> {
        let ratio = part.get("mlp_ratio").map_or(Some(4.0), Value::as_f64).filter(|ratio| *ratio > 0.0);
        ratio.filter(|ratio| *ratio < 1024.0).ok_or_else(|| wrong("`mlp_ratio`: expected a number".into()))
    };
    let width = size(&vision, "width", 768)?;
    let vision_config = json!({
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": (width as f64 * ratio(&vision)?) as u64,
        "num_hidden_layers": size(&vision, "layers", 12)?,
        "num_attention_heads": width / size(&vision, "head_width", 64)?,
        "image_size": size(&vision, "image_size", 224)?,
        "patch_size": size(&vision, "patch_size", 16)?,
        "hidden_act": activation,
        "projection_dim": embedding,
    });
    let text = object(model, "text_cfg")?;
    const TEXT: [&str; 7] =
        ["context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name"];
    let mut design = ["multimodal_cfg", "init_logit_bias"].into_iter();
    let design = design.find(|key| model.get(key).is_some_and(|value| !value.is_null()));
    let text_config = match other(&text, &TEXT).or(design) {
        // No encoder of ours has this name, and the error for that says it.
        Some(key) => json!({ "model_type": format!("OpenCLIP's with `{key}`") }),
        None => {
            let width = size(&text, "width", 512)?;
            json!({
                "model_type": "clip_text_model",
                "vocab_size": size(&text, "vocab_size", 49408)?,
                "hidden_size": width,
                "intermediate_size": (width as f64 * ratio(&text)?) as u64,
                "num_hidden_layers": size(&text, "layers", 12)?,
                "num_attention_heads": size(&text, "heads", 8)?,
                "max_position_embeddings": size(&text, "context_length", 77)?,
                "hidden_act": activation,
                // The highest id ends a text.
                "eos_token_id": 2,
                "projection_dim": embedding,
            })
        }
    };
    let mut config = json!({
        "model_type": "clip",
        "vision_config": vision_config,
        "text_config": text_config,
        "projection_dim": embedding,
    });
    if embedding.is_null() {
        for part in ["", "/vision_config", "/text_config"] {
            if let Some(part) = config.pointer_mut(part).and_then(Value::as_object_mut) {
                part.remove("projection_dim");
            }
        }
    }
    Ok(config)
}

/// A key that is set and not among those that are `known`: one that changes the design.
fn other<'a>(part: &'a Map<String, Value>, known: &[&str]) -> Option<&'a str> {
    // What the designs that are known have by default.
    let default = |key: &str, value: &Value| match key {
        "pool_type" => value == "tok" || value == "argmax",
        "pos_embed_type" => value == "learnable",
        "proj_type" => value == "linear",
        _ => value.is_null() || value == false,
    };
    let mut keys = part.iter().filter(|(key, value)| !known.contains(&key.as_str()) && !default(key, value));
    keys.next().map(|(key, _)| key.as_str())
}
