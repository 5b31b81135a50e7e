//! Qwen-VL's files as mistral.rs 0.8.1 reads them: configuration, weight names, preprocessor.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{MAX_SIZE, without_nulls};
use crate::image::Preprocess;
use crate::model::{Model, ModelKind};
use crate::tower::qwen::QwenConfig;
use crate::tower::weights::Checkpoint;
use crate::{Error, Result};

/// Tokens that stand for a picture or enclose it; as text they would be taken for one.
pub const MARKERS: [&str; 4] = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"];

/// Whether the model is Qwen3-VL or its mixture of experts.
fn is_third(kind: ModelKind) -> bool {
    matches!(kind, ModelKind::Qwen3Vl | ModelKind::Qwen3VlMoe)
}

/// `config.json` with every value spelt out that mistral.rs needs, has another default for, or
/// looks for under its transformers 4 name or place: Qwen2-VL's and Qwen2.5-VL's text keys at the
/// top level, Qwen3-VL's in `text_config`.
///
/// # Errors
/// If a number is impossible, or the model needs something the engine would silently get wrong.
pub fn translate(model: &Model) -> Result<Value> {
    let path = model.file("config.json");
    let kind = model.kind;
    let config = without_nulls(model.config.as_object());
    let third = is_third(kind);
    let nested = config.get("text_config").and_then(Value::as_object);
    if third && nested.is_none() {
        return Err(Error::config(&path, "text_config: expected an object, found none"));
    }
    let text = nested.map_or_else(|| config.clone(), |text| without_nulls(Some(text)));
    let in_text = |key: &str| text.get(key) == Some(&json!(true));
    let at_top = config.get("tie_word_embeddings") == Some(&json!(true));
    let tied = at_top || (!third && in_text("tie_word_embeddings"));

    let mut text = translate_text(kind, text, &path, if nested.is_some() { "text_config." } else { "" })?;
    let number = |key: &str| text.get(key).and_then(Value::as_u64).unwrap_or_default();
    let (vocabulary, width) = (number("vocab_size"), number("hidden_size"));
    let mut out = if third {
        if let Some(quantization) = config.get("quantization_config") {
            text.insert("quantization_config".into(), quantization.clone());
        }
        Map::from_iter([("text_config".to_string(), Value::Object(text))])
    } else {
        text.remove("text_config");
        text
    };
    for key in ["architectures", "quantization_config"] {
        if let Some(value) = config.get(key) {
            out.insert(key.into(), value.clone());
        }
    }
    let ids = [
        ("image_token_id", 151_655),
        ("video_token_id", 151_656),
        ("vision_start_token_id", 151_652),
        ("vision_end_token_id", 151_653),
    ];
    for (key, default) in ids {
        let value = config.get(key).cloned().unwrap_or(json!(default));
        if value.as_u64().is_none_or(|id| id >= vocabulary) {
            return Err(Error::config(
                &path,
                format!("{key}: expected less than vocab_size {vocabulary}, found {value}"),
            ));
        }
        out.insert(key.into(), value);
    }
    out.insert("model_type".into(), model.config.get("model_type").cloned().unwrap_or_default());
    out.insert("tie_word_embeddings".into(), json!(tied));
    out.insert("vision_config".into(), translate_vision(model, &path, width)?);
    Ok(Value::Object(out))
}

/// `vision_config` with every number spelt out. The tower is ours; mistral.rs still reads it.
fn translate_vision(model: &Model, path: &Path, width: u64) -> Result<Value> {
    let tower = QwenConfig::parse(&model.config.to_string(), path)?;
    if tower.out as u64 != width {
        let found = tower.out;
        return Err(Error::config(
            path,
            format!("vision_config: expected a tower of the text's hidden_size {width}, found {found}"),
        ));
    }
    let mut vision = json!({
        "depth": tower.blocks,
        // mistral.rs' spelling; with the published one it does not load.
        "hidden_act": tower.activation.replace("quick_gelu", "quickgelu"),
        "hidden_size": tower.hidden,
        "in_channels": 3,
        "in_chans": 3,
        "intermediate_size": tower.intermediate,
        "num_heads": tower.heads,
        "out_hidden_size": tower.out,
        "patch_size": tower.patch,
        "spatial_merge_size": tower.merge,
        "temporal_patch_size": tower.frames,
    });
    match model.kind {
        ModelKind::Qwen2Vl => {
            vision["embed_dim"] = json!(tower.hidden);
            vision["hidden_size"] = json!(tower.out);
            let ratio = model.config["vision_config"].get("mlp_ratio").filter(|ratio| !ratio.is_null());
            vision["mlp_ratio"] = ratio.cloned().unwrap_or(json!(4));
        }
        ModelKind::Qwen2_5Vl => {
            vision["window_size"] = json!(tower.window);
            vision["fullatt_block_indexes"] = json!(tower.full_attention);
        }
        _ => {
            vision["num_position_embeddings"] = json!(tower.positions);
            vision["deepstack_visual_indexes"] = json!(tower.deepstack);
        }
    }
    Ok(vision)
}

/// transformers' defaults of the text configurations, which many files rely on.
fn translate_text(
    kind: ModelKind,
    mut text: Map<String, Value>,
    path: &Path,
    place: &str,
) -> Result<Map<String, Value>> {
    let fail = |reason: String| Error::config(path, format!("{place}{reason}"));
    let third = is_third(kind);
    let (defaults, theta, section) = match kind {
        ModelKind::Qwen3Vl => (
            json!({
                "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22016,
                "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 128_000,
                "rms_norm_eps": 1e-6, "head_dim": 128,
            }),
            5e5,
            [24, 20, 20],
        ),
        ModelKind::Qwen3VlMoe => (
            json!({
                "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5632,
                "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
                "max_position_embeddings": 128_000, "rms_norm_eps": 1e-6, "moe_intermediate_size": 1408,
                "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }),
            5e5,
            [24, 20, 20],
        ),
        _ => (
            json!({
                "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29568,
                "num_hidden_layers": 80, "num_attention_heads": 64, "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
            }),
            1e6,
            [16, 24, 24],
        ),
    };
    if let Some(experts) = text.remove("num_local_experts") {
        text.entry("num_experts").or_insert(experts);
    }
    for (key, value) in defaults.as_object().into_iter().flatten() {
        text.entry(key.clone()).or_insert(value.clone());
    }
    let size = |key: &str| {
        let value = text.get(key).cloned().unwrap_or_default();
        value
            .as_u64()
            // The engine allocates by these before it sees a weight.
            .filter(|n| (1..=MAX_SIZE).contains(n))
            .ok_or_else(|| fail(format!("{key}: expected 1 to {MAX_SIZE}, found {value}")))
    };
    let sizes = ["intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"];
    let of_experts = ["moe_intermediate_size", "num_experts", "num_experts_per_tok", "decoder_sparse_step"];
    let of_experts = of_experts.into_iter().filter(|_| kind == ModelKind::Qwen3VlMoe);
    for key in sizes.into_iter().chain(of_experts) {
        size(key)?;
    }
    if kind == ModelKind::Qwen3VlMoe && size("num_experts_per_tok")? > size("num_experts")? {
        return Err(fail("num_experts_per_tok: expected at most num_experts".into()));
    }
    let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
    let kv_heads = match text.get("num_key_value_heads") {
        Some(_) => size("num_key_value_heads")?,
        None if kind == ModelKind::Qwen3Vl => heads,
        None => heads.min(8),
    };
    if heads % kv_heads != 0 {
        return Err(fail(format!(
            "num_key_value_heads: expected a divisor of num_attention_heads {heads}, found {kv_heads}"
        )));
    }
    let head = match text.get("head_dim") {
        Some(_) => size("head_dim")?,
        None => hidden / heads,
    };
    // The rotary embedding turns pairs.
    if head == 0 || head % 2 != 0 || (!third && head * heads != hidden) {
        return Err(fail(format!(
            "head_dim: {head} for {heads} heads does not fit hidden_size {hidden}, or is odd"
        )));
    }
    // The engine would go on without these and answer something else.
    if let Some(activation) = text.get("hidden_act").filter(|act| **act != json!("silu")) {
        return Err(fail(format!("hidden_act: expected silu, found {activation}")));
    }
    for key in ["use_sliding_window", "attention_bias"] {
        if text.get(key) == Some(&json!(true)) {
            return Err(fail(format!("{key}: expected false, found true")));
        }
    }

    // transformers 5 writes the two rope keys as one, in which the old ones win where both are.
    let new = text.remove("rope_parameters");
    let old = text.remove("rope_scaling");
    let rope = |key: &str| [&old, &new].into_iter().flatten().find_map(|rope| rope.get(key)).cloned();
    let flat = text.remove("rope_theta");
    let given = rope("rope_theta").or(flat).unwrap_or(json!(theta));
    if given.as_f64().is_none_or(|theta| !theta.is_finite() || theta <= 0.0) {
        return Err(fail(format!("rope_theta: expected a positive number, found {given}")));
    }
    let scaling = rope("rope_type").or(rope("type")).filter(|kind| *kind != json!("default"));
    if let Some(kind) = scaling.filter(|kind| *kind != json!("mrope")) {
        return Err(fail(format!(
            "rope_scaling: mistral.rs' Qwen-VL has no scaled rotary embedding, found {kind}"
        )));
    }
    let section = rope("mrope_section").unwrap_or(json!(section));
    let parts: Option<Vec<u64>> =
        section.as_array().map(|parts| parts.iter().filter_map(Value::as_u64).collect());
    if !parts.is_some_and(|parts| {
        parts.len() == 3 && parts.iter().try_fold(0u64, |sum, &part| sum.checked_add(part)) == Some(head / 2)
    }) {
        return Err(fail(format!(
            "mrope_section: expected three numbers with the sum {}, found {section}",
            head / 2
        )));
    }

    text.insert("rope_theta".into(), given);
    text.insert("rope_scaling".into(), json!({ "type": "default", "mrope_section": section }));
    text.insert("num_key_value_heads".into(), json!(kv_heads));
    text.insert("head_dim".into(), json!(head));
    text.insert("hidden_act".into(), json!("silu"));
    // transformers takes no notice of the window unless told to use it; the engine does.
    text.insert("use_sliding_window".into(), json!(false));
    text.insert("sliding_window".into(), Value::Null);
    if kind == ModelKind::Qwen3VlMoe {
        // As transformers does, whatever the file says.
        text.insert("norm_topk_prob".into(), json!(true));
    }
    Ok(text)
}

/// `preprocessor_config.json` for the engine. Pictures come resized, and the tower normalises them
/// itself: what it is given are grey levels divided by 255. mistral.rs' own takes them normalised.
pub fn preprocessor(config: &Value, upstream: Option<&Preprocess>) -> Value {
    let vision = &config["vision_config"];
    json!({
        "do_resize": false,
        "do_rescale": true,
        "do_normalize": upstream.is_some(),
        "image_mean": upstream.map(|preprocess| preprocess.mean),
        "image_std": upstream.map(|preprocess| preprocess.std),
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
    })
}

/// The name mistral.rs 0.8.1 looks for, from any of the layouts Qwen-VL is saved in: with or without
/// `model.` before the vision tower and `language_model.` before the text layers.
pub fn upstream_name(kind: ModelKind, stored: &str) -> String {
    let bare = stored.strip_prefix("model.").unwrap_or(stored);
    if bare.starts_with("lm_head.") {
        return bare.to_string();
    }
    let third = is_third(kind);
    if bare.starts_with("visual.") {
        return if third { format!("model.{bare}") } else { bare.to_string() };
    }
    // Names of neither part stay: nothing looks for them.
    let layer = bare.strip_prefix("language_model.").unwrap_or(bare);
    let layer = layer.strip_prefix("model.").unwrap_or(layer);
    if !["embed_tokens.", "layers.", "norm."].iter().any(|part| layer.starts_with(part)) {
        return stored.to_string();
    }
    if third { format!("model.language_model.{layer}") } else { format!("model.{layer}") }
}

/// Whether the checkpoint has every weight of the language model. mistral.rs loads without those it
/// misses and fails at the first question.
///
/// `config` is the translated one, with every number spelt out.
///
/// # Errors
/// [`Error::MissingWeight`] for the first that is not there, [`Error::WeightShape`] for experts in
/// another order than the Hub's.
pub fn check(checkpoint: &Checkpoint, kind: ModelKind, config: &Value) -> Result<()> {
    let names: HashSet<String> = checkpoint.names().iter().map(|name| upstream_name(kind, name)).collect();
    let third = is_third(kind);
    let (root, text) =
        if third { ("model.language_model.", &config["text_config"]) } else { ("model.", config) };
    let number = |key: &str| text[key].as_u64().unwrap_or_default();
    let mut needed = vec![format!("{root}embed_tokens.weight"), format!("{root}norm.weight")];
    if config["tie_word_embeddings"] != json!(true) {
        needed.push("lm_head.weight".into());
    }
    let attention: &[&str] = if third {
        &[
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "o_proj.weight",
            "q_norm.weight",
            "k_norm.weight",
        ]
    } else {
        &[
            "q_proj.weight",
            "k_proj.weight",
            "v_proj.weight",
            "o_proj.weight",
            "q_proj.bias",
            "k_proj.bias",
            "v_proj.bias",
        ]
    };
    const DENSE: [&str; 3] = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];
    const EXPERTS: [&str; 3] = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"];
    let step = number("decoder_sparse_step").max(1);
    let dense = |layer: u64| {
        let listed = text["mlp_only_layers"].as_array();
        kind != ModelKind::Qwen3VlMoe
            || listed.is_some_and(|layers| layers.contains(&json!(layer)))
            || !(layer + 1).is_multiple_of(step)
    };
    // One at a time: a configuration may claim any number of layers, and the first missing one ends it.
    let of_layers = (0..number("num_hidden_layers")).flat_map(|layer| {
        let norms = ["input_layernorm.weight", "post_attention_layernorm.weight"].map(str::to_string);
        let attention = attention.iter().map(|part| format!("self_attn.{part}"));
        let mlp = if dense(layer) { DENSE } else { EXPERTS }.map(|part| format!("mlp.{part}"));
        let parts: Vec<String> = norms.into_iter().chain(attention).chain(mlp).collect();
        parts.into_iter().map(move |part| format!("{root}layers.{layer}.{part}"))
    });
    if let Some(name) = needed.into_iter().chain(of_layers).find(|name| !names.contains(name)) {
        return Err(Error::MissingWeight { file: checkpoint.label().to_path_buf(), name });
    }
    for name in checkpoint.names().iter().filter(|name| name.contains(".mlp.experts.")) {
        let (hidden, inner, experts) = (
            number("hidden_size") as usize,
            number("moe_intermediate_size") as usize,
            number("num_experts") as usize,
        );
        let expected = match name.rsplit('.').next() {
            Some("gate_up_proj") => vec![experts, hidden, 2 * inner],
            Some("down_proj") => vec![experts, inner, hidden],
            _ => continue,
        };
        let found = checkpoint.shape(name).unwrap_or_default();
        if found != expected {
            let file = checkpoint.label().to_path_buf();
            return Err(Error::WeightShape { file, name: name.clone(), expected, found });
        }
    }
    Ok(())
}
