//! The checkpoint's tensors under the names mistral.rs looks for.

use std::collections::HashSet;

use serde_json::Value;

use super::qwen;
use crate::model::ModelKind;
use crate::tower::weights::Checkpoint;
use crate::{Error, Result};

/// The name mistral.rs 0.8.1 looks for, from any of the layouts a model is saved in.
pub fn upstream_name(kind: ModelKind, stored: &str) -> String {
    if kind.is_qwen() { qwen::upstream_name(kind, stored) } else { llava_name(stored) }
}

/// LLaVA's: transformers 4 (unchanged), transformers 5 in memory (`model.language_model.`,
/// `model.vision_tower.`, `lm_head.`), and as transformers 5 saves a model it has made
/// (`vision_tower.embeddings.`).
fn llava_name(stored: &str) -> String {
    const PARTS: [&str; 4] = ["vision_tower.", "multi_modal_projector.", "language_model.", "image_newline"];
    let bare = stored.strip_prefix("model.").filter(|rest| PARTS.iter().any(|part| rest.starts_with(part)));
    let name = match bare {
        Some(rest) => match rest.strip_prefix("language_model.") {
            Some(layer) => format!("language_model.model.{layer}"),
            None => rest.to_string(),
        },
        None if stored.starts_with("lm_head.") => format!("language_model.{stored}"),
        None => stored.to_string(),
    };
    match name.strip_prefix("vision_tower.") {
        Some(rest) if !rest.starts_with("vision_model.") => format!("vision_tower.vision_model.{rest}"),
        _ => name,
    }
}

/// Whether the checkpoint has every weight of the projector and the language model. mistral.rs
/// loads without those it misses and fails at the first question.
///
/// `config` is the translated one, with every number spelt out.
///
/// # Errors
/// [`Error::MissingWeight`] for the first that is not there; as [`qwen::check`].
pub fn check(checkpoint: &Checkpoint, kind: ModelKind, config: &Value) -> Result<()> {
    if kind.is_qwen() {
        return qwen::check(checkpoint, kind, config);
    }
    let names: HashSet<String> = checkpoint.names().iter().map(|name| llava_name(name)).collect();
    let mut needed: Vec<String> = ["linear_1", "linear_2"]
        .iter()
        .flat_map(|layer| ["weight", "bias"].map(|part| format!("multi_modal_projector.{layer}.{part}")))
        .collect();
    needed.extend(
        ["model.embed_tokens", "model.norm", "lm_head"].map(|name| format!("language_model.{name}.weight")),
    );
    if kind == ModelKind::LlavaNext {
        needed.push("image_newline".into());
    }
    const LAYER: [&str; 9] = [
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let layers = config["text_config"]["num_hidden_layers"].as_u64().unwrap_or_default();
    // One at a time: a configuration may claim any number of layers, and the first missing one ends it.
    let of_layers = (0..layers)
        .flat_map(|layer| LAYER.map(|part| format!("language_model.model.layers.{layer}.{part}.weight")));
    match needed.into_iter().chain(of_layers).find(|name| !names.contains(name)) {
        Some(name) => Err(Error::MissingWeight { file: checkpoint.label().to_path_buf(), name }),
        None => Ok(()),
    }
}
