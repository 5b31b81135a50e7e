//! Configuration files as mistral.rs 0.8.1 reads them.
//!
//! The model's own files stay as they are; translated copies of two of them are put into a
//! temporary folder for the time of loading.

use std::path::Path;

use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::qwen;
use crate::image::Preprocess;
use crate::model::{Model, ModelKind};
use crate::{Error, Result};

/// Writes `config.json`, as [`translate`] makes it, and `preprocessor_config.json` for the engine; for
/// mistral.rs' own tower, which takes pictures normalised, with how that is done.
///
/// # Errors
/// If the folder for temporary files cannot be written to.
pub fn stage(model: &Model, config: &Value, upstream: Option<&Preprocess>) -> Result<TempDir> {
    let folder = tempfile::tempdir().map_err(|e| Error::write(std::env::temp_dir(), e))?;
    let write = |name: &str, value: &Value| {
        let path = folder.path().join(name);
        std::fs::write(&path, value.to_string()).map_err(|e| Error::write(&path, e))
    };
    write("config.json", config)?;
    let preprocessor = if model.kind.is_qwen() {
        qwen::preprocessor(config, upstream)
    } else {
        let size = model.tower_config()?.image_size;
        json!({
            // LLaVA-1.5's pictures come prepared. LLaVA-NeXT's are cut into tiles by the engine.
            "do_resize": model.kind == ModelKind::LlavaNext,
            "do_center_crop": model.kind == ModelKind::LlavaNext,
            // The tower takes grey levels, and divides and normalises them itself.
            "do_rescale": false,
            "do_normalize": false,
            "resample": 3,
            "size": { "shortest_edge": size },
            "crop_size": { "height": size, "width": size },
        })
    };
    write("preprocessor_config.json", &preprocessor)?;
    Ok(folder)
}

/// `config.json` with every value spelt out that mistral.rs needs, has another default for, or
/// looks for under its transformers 4 name.
///
/// # Errors
/// If the model needs something the engine would silently get wrong.
pub fn translate(model: &Model) -> Result<Value> {
    if model.kind.is_qwen() {
        return qwen::translate(model);
    }
    let path = model.file("config.json");
    let fail = |reason: String| Error::config(&path, reason);
    let mut config = model.config.as_object().cloned().unwrap_or_default();

    let tower = model.tower_config()?;
    config.insert(
        "vision_config".into(),
        json!({
            "hidden_size": tower.hidden_size,
            "image_size": tower.image_size,
            "intermediate_size": tower.intermediate_size,
            "num_attention_heads": tower.num_attention_heads,
            "num_hidden_layers": tower.num_hidden_layers,
            "patch_size": tower.patch_size,
        }),
    );
    config.entry("vision_feature_layer").or_insert(json!(-2));
    config.entry("vision_feature_select_strategy").or_insert(json!("default"));
    if config.get("vision_feature_select_strategy").and_then(Value::as_str) == Some("full") {
        return Err(fail(
            "vision_feature_select_strategy: the engine supports `default`, found `full`".into(),
        ));
    }
    let activation = config.entry("projector_hidden_act").or_insert(json!("gelu")).clone();
    if activation != json!("gelu") {
        return Err(fail(format!("projector_hidden_act: expected gelu, found {activation}")));
    }
    if config.get("multimodal_projector_bias") == Some(&json!(false)) {
        return Err(fail("multimodal_projector_bias: expected true, found false".into()));
    }

    let text = config.get("text_config").and_then(Value::as_object).cloned().unwrap_or_default();
    config.insert("text_config".into(), Value::Object(translate_text(text, &path)?));
    Ok(Value::Object(config))
}

/// Ten times the largest number in any model's configuration; what is larger is a mistake.
pub(super) const MAX_SIZE: u64 = 1 << 24;

/// An object's entries that say something; mistral.rs does not take `null` for an absent one.
pub(super) fn without_nulls(object: Option<&Map<String, Value>>) -> Map<String, Value> {
    let entries = object.into_iter().flatten().filter(|(_, value)| !value.is_null());
    entries.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// transformers' defaults of `LlamaConfig` and `MistralConfig`, which old LLaVA files rely on.
fn translate_text(mut text: Map<String, Value>, path: &Path) -> Result<Map<String, Value>> {
    let fail = |reason: String| Error::config(path, format!("text_config.{reason}"));
    let family = text.entry("model_type").or_insert(json!("llama")).clone();
    let mistral = match family.as_str() {
        Some("llama") => false,
        Some("mistral") => true,
        _ => return Err(fail(format!("model_type: expected llama or mistral, found {family}"))),
    };
    let defaults = [
        ("hidden_size", json!(4096)),
        ("intermediate_size", json!(if mistral { 14336 } else { 11008 })),
        ("num_hidden_layers", json!(32)),
        ("num_attention_heads", json!(32)),
        ("vocab_size", json!(32000)),
        ("max_position_embeddings", json!(if mistral { 131_072 } else { 2048 })),
        ("rms_norm_eps", json!(1e-6)),
    ];
    for (key, value) in defaults {
        if text.get(key).is_none_or(Value::is_null) {
            text.insert(key.into(), value);
        }
    }
    let size = |key: &str| {
        let value = text.get(key).cloned().unwrap_or_default();
        value
            .as_u64()
            // The engine allocates by these before it sees a weight.
            .filter(|n| (1..=MAX_SIZE).contains(n))
            .ok_or_else(|| fail(format!("{key}: expected 1 to {MAX_SIZE}, found {value}")))
    };
    for key in ["intermediate_size", "num_hidden_layers", "vocab_size"] {
        size(key)?;
    }
    let (hidden, heads) = (size("hidden_size")?, size("num_attention_heads")?);
    let kv_heads = if text.get("num_key_value_heads").is_none_or(Value::is_null) {
        if mistral { 8 } else { heads }
    } else {
        size("num_key_value_heads")?
    };
    if hidden % heads != 0 || heads % kv_heads != 0 {
        return Err(fail(format!(
            "num_attention_heads: {heads} does not divide hidden_size {hidden}, or num_key_value_heads {kv_heads} does not divide it"
        )));
    }
    // The engine would go on without these and answer something else.
    if let Some(head) = text.get("head_dim").and_then(Value::as_u64).filter(|&head| head != hidden / heads) {
        return Err(fail(format!(
            "head_dim: expected hidden_size / num_attention_heads = {}, found {head}",
            hidden / heads
        )));
    }
    if let Some(activation) = text.get("hidden_act").filter(|act| **act != json!("silu") && !act.is_null()) {
        return Err(fail(format!("hidden_act: expected silu, found {activation}")));
    }
    for key in ["attention_bias", "mlp_bias", "tie_word_embeddings"] {
        if text.get(key) == Some(&json!(true)) {
            return Err(fail(format!("{key}: expected false, found true")));
        }
    }
    let positions = size("max_position_embeddings")?;
    text.insert("num_key_value_heads".into(), json!(kv_heads));
    // Where this is smaller than a prompt, the engine cuts the embeddings but not the mask.
    text.insert("max_length".into(), json!(positions));

    // transformers 5 writes the two rope keys as one.
    let rope = text.remove("rope_parameters").filter(|rope| !rope.is_null());
    let from_v5 =
        |key: &str| rope.as_ref().and_then(|rope| rope.get(key)).filter(|value| !value.is_null()).cloned();
    if text.get("rope_theta").is_none_or(Value::is_null) {
        text.insert("rope_theta".into(), from_v5("rope_theta").unwrap_or(json!(10_000.0)));
    }
    let old = text.remove("rope_scaling").filter(|scaling| !scaling.is_null());
    let scaling =
        old.as_ref().and_then(|s| s.get("rope_type").or(s.get("type"))).cloned().or(from_v5("rope_type"));
    if let Some(kind) = scaling.filter(|kind| *kind != json!("default")) {
        return Err(fail(format!(
            "rope_scaling: mistral.rs' LLaVA has no scaled rotary embedding, found {kind}"
        )));
    }
    Ok(text)
}
