//! CLIP's text side against transformers, and the zero-shot head's gradient against candle's
//! autograd and finite differences.
//!
//! Differences are the largest absolute one over the reference's largest entry.

mod fixture;

use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, IndexOp, Tensor, Var};
use fixture::{Fixture, assert_close, assert_same, path, values};
use image::RgbImage;
use radapt::Result;
use radapt::model::{Lookup, Model};
use radapt::text::{ClipText, Pooling, TextConfig, Tokenizer, ZeroShotHead};
use radapt::tower::weights::Checkpoint;
use radapt::tower::{VisionTower, Want};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const OUTPUT: f64 = 1e-5;
const LIMIT: usize = 12;
const CLASSES: [&str; 4] = ["cat", "dog", "fire truck", "café"];
const TEMPLATES: [&str; 3] = ["a photo of a {class}.", "the {class}", "a {class}, it's a {class}!"];

fn expected() -> Fixture {
    Fixture::open("clip_text/expected.safetensors")
}

fn folder(name: &str) -> PathBuf {
    path("clip_text").join(name)
}

fn config(name: &str) -> TextConfig {
    let file = folder(name).join("config.json");
    TextConfig::parse(&std::fs::read_to_string(&file).expect("the configuration"), &file).expect("a CLIP")
}

/// A copy of a fixture's folder.
fn copy(name: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder(name)).unwrap() {
        let file = entry.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    copy
}

fn load(folder: &Path) -> Result<ClipText> {
    Model::find(folder.to_str().expect("a name"), &Lookup::default())?.text(&Device::Cpu)
}

/// The text side in `clip_text/{name}/`; `legacy` and `gelu` take what they lack from `hf`.
fn clip(name: &str) -> ClipText {
    let copy = copy(name);
    let files: &[&str] = match name {
        "legacy" => &["model.safetensors"],
        "gelu" => &["model.safetensors", "tokenizer.json"],
        _ => &[],
    };
    for file in files {
        std::fs::copy(folder("hf").join(file), copy.path().join(file)).unwrap();
    }
    load(copy.path()).expect("a text encoder")
}

fn texts() -> Vec<(String, Vec<u32>)> {
    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
    }
    let text = std::fs::read_to_string(folder("texts.json")).expect("the fixture");
    let cases: Vec<Case> = serde_json::from_str(&text).expect("texts and ids");
    cases.into_iter().map(|case| (case.text, case.ids)).collect()
}

/// The fixture's texts, each padded with the end to 12 ids.
fn padded() -> Vec<Vec<u32>> {
    let ids = expected().tensor("ids").to_dtype(DType::U32).and_then(|ids| ids.to_vec2());
    ids.expect("ids")
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[track_caller]
fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
    assert_eq!(message.lines().count(), 1, "`{message}` has several lines");
}

// --- Tokens ------------------------------------------------------------------------------------

#[test]
fn ids_equal_transformers_from_every_kind_of_tokenizer_file() {
    let (texts, want): (Vec<_>, Vec<_>) = texts().into_iter().unzip();
    // A tokenizer.json with settings of its own, one without start and end, vocabulary and merges.
    for name in ["hf", "openclip", "legacy"] {
        let tokenizer = Tokenizer::load(&folder(name), LIMIT).unwrap();
        assert_eq!((tokenizer.start(), tokenizer.end(), tokenizer.limit()), (221, 222, LIMIT), "{name}");
        for ((text, want), found) in texts.iter().zip(&want).zip(tokenizer.ids(&texts).unwrap()) {
            assert_eq!(&found, want, "{name}: {text:?}");
        }
    }
}

#[test]
fn a_text_too_long_keeps_its_start_and_its_end() {
    let long = "cat ".repeat(1000);
    for limit in [3, 4, LIMIT] {
        let tokenizer = Tokenizer::load(&folder("hf"), limit).unwrap();
        let ids = tokenizer.ids(&[&long]).unwrap().remove(0);
        assert_eq!(ids.len(), limit);
        assert_eq!((ids[0], ids[limit - 1]), (221, 222));
        assert!(ids[1..limit - 1].iter().all(|id| *id == 206));
    }
    let text = clip("hf");
    let cut = text.embed(&[&long]).unwrap();
    assert_same("cut", &cut, &text.embed(&["cat ".repeat(LIMIT - 2)]).unwrap());
    for limit in [0, 1, 2] {
        assert_error(Tokenizer::load(&folder("hf"), limit), &["max_position_embeddings", &limit.to_string()]);
    }
}

#[test]
fn special_tokens_come_from_the_files_that_name_them() {
    let copy = copy("openclip");
    let file = copy.path().join("tokenizer_config.json");
    std::fs::remove_file(&file).unwrap();
    // CLIP's own where no file names any.
    assert_eq!(Tokenizer::load(copy.path(), LIMIT).unwrap().end(), 222);
    let map = copy.path().join("special_tokens_map.json");
    std::fs::write(&map, r#"{"bos_token": "!", "eos_token": {"content": "a</w>"}}"#).unwrap();
    let tokenizer = Tokenizer::load(copy.path(), LIMIT).unwrap();
    assert_eq!((tokenizer.start(), tokenizer.end()), (0, 163));
    std::fs::write(&map, r#"{"eos_token": "<eos>"}"#).unwrap();
    assert_error(Tokenizer::load(copy.path(), LIMIT), &["tokenizer.json", "no token `<eos>`"]);
    std::fs::write(&map, "{").unwrap();
    assert_error(Tokenizer::load(copy.path(), LIMIT), &["special_tokens_map.json"]);
}

#[test]
fn a_missing_or_damaged_tokenizer_is_an_error() {
    let empty = tempfile::tempdir().unwrap();
    assert_error(
        Tokenizer::load(empty.path(), LIMIT),
        &["neither tokenizer.json nor vocab.json with merges.txt"],
    );
    for text in ["", "{", "[]", "{}", r#"{"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}"#] {
        std::fs::write(empty.path().join("tokenizer.json"), text).unwrap();
        assert_error(Tokenizer::load(empty.path(), LIMIT), &["tokenizer.json"]);
    }
    let whole = std::fs::read_to_string(folder("hf").join("tokenizer.json")).unwrap();
    let mut whole: serde_json::Value = serde_json::from_str(&whole).unwrap();
    let mut with = |processor: serde_json::Value| {
        whole["post_processor"] = processor;
        std::fs::write(empty.path().join("tokenizer.json"), whole.to_string()).unwrap();
        Tokenizer::load(empty.path(), LIMIT)
    };
    assert_eq!(with(serde_json::json!({"type": "Sequence", "processors": []})).unwrap().end(), 222);
    let end = serde_json::json!({
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [222], "tokens": ["</s>"]}},
    });
    assert_error(with(end), &["tokenizer.json", "one token before a text and one after it, found [222]"]);
    let copy = copy("legacy");
    for (file, text) in
        [("merges.txt", "#version: 0.2\na b c\n"), ("merges.txt", "x y\n"), ("vocab.json", "[]")]
    {
        std::fs::write(copy.path().join(file), text).unwrap();
        assert_error(Tokenizer::load(copy.path(), LIMIT), &["vocab.json and merges.txt"]);
    }
}

// --- Outputs -----------------------------------------------------------------------------------

#[test]
fn every_output_equals_transformers() {
    let expected = expected();
    for name in ["hf", "legacy", "gelu"] {
        let text = clip(name);
        let features = text.encoder.forward(&padded()).unwrap();
        let parts = [("hidden", features.hidden), ("pooled", features.pooled), ("embeds", features.embeds)];
        for (part, found) in parts {
            let name = format!("{name}.{part}");
            assert_close(&name, &found, &expected.tensor(&name), OUTPUT);
        }
        let texts: Vec<String> = texts().into_iter().map(|(text, _)| text).collect();
        let found = text.embed(&texts).unwrap();
        assert_close("as texts", &found, &expected.tensor(&format!("{name}.embeds")), OUTPUT);
    }
}

#[test]
fn logits_equal_transformers() {
    let expected = expected();
    for name in ["hf", "legacy", "gelu"] {
        let head = ZeroShotHead::new(&clip(name), &CLASSES, &["a photo of a {c}."]).unwrap();
        let images = expected.tensor(&format!("{name}.images"));
        assert_close(
            name,
            &head.logits(&images).unwrap(),
            &expected.tensor(&format!("{name}.logits")),
            OUTPUT,
        );
    }
    let head = ZeroShotHead::new(&clip("hf"), &CLASSES, &TEMPLATES).unwrap();
    assert_eq!(head.classes, CLASSES);
    assert_eq!(head.weights.dims(), [4, 10]);
    let lengths = values(&head.weights.sqr().unwrap().sum(1).unwrap());
    assert!(lengths.iter().all(|length| (length - 1.0).abs() < 1e-6));
    assert!((head.logit_scale - 3f64.exp()).abs() < 1e-9);
    let images = expected.tensor("hf.images");
    let logits = head.logits(&images).unwrap();
    assert_close("an ensemble", &logits, &expected.tensor("hf.ensemble"), OUTPUT);
    let larger = head.logits(&(images * 7.0).unwrap()).unwrap();
    assert_close("another length", &larger, &logits, 1e-6);
}

#[test]
fn openclip_names_give_the_same_bits() {
    let reference = clip("hf");
    let want = reference.encoder.forward(&padded()).unwrap();
    let tensors: Vec<(String, Tensor)> =
        candle_core::safetensors::load(folder("openclip").join("model.safetensors"), &Device::Cpu)
            .unwrap()
            .into_iter()
            .collect();
    let check = |what: &str, tensors: Vec<(String, Tensor)>| {
        let copy = copy("openclip");
        save(&copy, tensors);
        let text = load(copy.path()).unwrap();
        let found = text.encoder.forward(&padded()).unwrap();
        assert_same(&format!("{what} hidden"), &found.hidden, &want.hidden);
        assert_same(&format!("{what} embeds"), &found.embeds, &want.embeds);
        assert_eq!(text.logit_scale, reference.logit_scale, "{what}");
    };
    check("openai", tensors.clone());
    let named =
        |f: &dyn Fn(&str) -> String| tensors.iter().map(|(n, t)| (f(n), t.clone())).collect::<Vec<_>>();
    check("wrapped", named(&|name| format!("module.{name}")));
    // open_clip's CustomTextCLIP.
    let custom = named(&|name| if name == "logit_scale" { name.into() } else { format!("text.{name}") });
    check("custom", custom.clone());
    // With a linear layer for a projection, and the scale as a vector.
    let linear = custom.into_iter().map(|(name, tensor)| match name.as_str() {
        "text.text_projection" => (format!("{name}.weight"), tensor.t().unwrap().contiguous().unwrap()),
        "logit_scale" => (name, tensor.reshape(1).unwrap()),
        _ => (name, tensor),
    });
    check("linear", linear.collect());
    // What these designs add would be left out.
    for name in ["cls_emb", "transformer.resblocks.0.ls_1.gamma"] {
        let copy = copy("openclip");
        save(&copy, [tensors.clone(), vec![(name.to_string(), random(&[16], 1))]].concat());
        assert_error(load(copy.path()), &[name, "not supported"]);
    }
}

fn save(folder: &tempfile::TempDir, tensors: Vec<(String, Tensor)>) {
    let tensors = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
}

#[test]
fn half_weights_compute_as_the_rounded_weights_in_f32() {
    let tensors =
        candle_core::safetensors::load(folder("hf").join("model.safetensors"), &Device::Cpu).unwrap();
    let copy = copy("hf");
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let embeds = |round: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
            save(
                &copy,
                tensors.iter().map(|(name, tensor)| (name.clone(), round(tensor).unwrap())).collect(),
            );
            load(copy.path()).unwrap().encoder.forward(&padded()).unwrap().embeds
        };
        let found = embeds(&|tensor| tensor.to_dtype(dtype));
        assert_eq!(found.dtype(), DType::F32);
        let rounded = embeds(&|tensor| tensor.to_dtype(dtype)?.to_dtype(DType::F32));
        assert_same(&format!("{dtype:?}"), &found, &rounded);
        assert_close(
            &format!("{dtype:?}, rounded or not"),
            &found,
            &expected().tensor("hf.embeds"),
            tolerance,
        );
    }
}

#[test]
fn a_batch_answers_as_each_text_alone() {
    for name in ["hf", "legacy"] {
        let text = clip(name);
        let texts: Vec<String> = texts().into_iter().map(|(text, _)| text).collect();
        let batch = text.embed(&texts).unwrap();
        for (row, prompt) in texts.iter().enumerate() {
            let alone = text.embed(&[prompt]).unwrap();
            assert_close(&format!("{name} {prompt:?}"), &alone, &batch.i(row..row + 1).unwrap(), 2e-6);
        }
        // More texts than go through at once.
        let many: Vec<String> = (0..600).map(|i| format!("{i}")).collect();
        let found = text.embed(&many).unwrap();
        assert_eq!(found.dims(), [600, 10]);
        let last = text.embed(&["599"]).unwrap();
        assert_close("the last", &found.i(599..600).unwrap(), &last, 2e-6);
    }
}

#[test]
fn what_comes_behind_the_end_changes_nothing() {
    let encoder = clip("hf").encoder;
    let short = encoder.forward(&[vec![221, 206, 222]]).unwrap();
    let long = encoder.forward(&[vec![221, 206, 222, 5, 9, 222, 1]]).unwrap();
    assert_close("pooled", &long.pooled, &short.pooled, 2e-6);
    assert_close("hidden", &long.hidden.i((.., ..3, ..)).unwrap(), &short.hidden, 2e-6);
}

#[test]
fn an_end_id_of_two_pools_at_the_highest_id() {
    assert_eq!(config("legacy").pooling(), Pooling::Highest);
    assert_eq!(config("hf").pooling(), Pooling::FirstOf(222));
    let features = clip("legacy").encoder.forward(&[[221, 206, 2, 222, 222], [221, 2, 206, 2, 1]]).unwrap();
    assert_same("the highest", &features.pooled.i(0).unwrap(), &features.hidden.i((0, 3)).unwrap());
    assert_same("not the end", &features.pooled.i(1).unwrap(), &features.hidden.i((1, 0)).unwrap());
}

// --- The head's gradient -----------------------------------------------------------------------

#[test]
fn the_heads_gradient_equals_autograd() {
    let head = ZeroShotHead::new(&clip("hf"), &CLASSES, &TEMPLATES).unwrap();
    let (embeds, cotangent) = (random(&[5, 10], 1), random(&[5, 4], 2));
    let found = head.vjp(&embeds, &cotangent).unwrap();
    let var = Var::from_tensor(&embeds.to_dtype(DType::F64).unwrap()).unwrap();
    let unit =
        var.broadcast_div(&var.sqr().unwrap().sum_keepdim(D::Minus1).unwrap().sqrt().unwrap()).unwrap();
    let weights = head.weights.to_dtype(DType::F64).unwrap().t().unwrap();
    let logits = (unit.matmul(&weights).unwrap() * head.logit_scale).unwrap();
    let loss = (logits * cotangent.to_dtype(DType::F64).unwrap()).unwrap().sum_all().unwrap();
    let want = loss.backward().unwrap().get(&var).unwrap().clone();
    assert_close("autograd", &found, &want, 1e-6);
}

#[test]
fn the_heads_gradient_equals_finite_differences() {
    let head = ZeroShotHead::new(&clip("hf"), &CLASSES, &TEMPLATES).unwrap();
    let (embeds, cotangent) = (random(&[2, 10], 3), random(&[2, 4], 4));
    let gradient = values(&head.vjp(&embeds, &cotangent).unwrap());
    let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
    let value = |direction: &Tensor, step: f64| {
        let logits = head.logits(&(&embeds + (direction * step).unwrap()).unwrap()).unwrap();
        values(&logits).iter().zip(values(&cotangent)).map(|(l, c)| l * c).sum::<f64>()
    };
    for seed in 0..8 {
        let direction = random(&[2, 10], 10 + seed);
        let slope = |step: f64| (value(&direction, step) - value(&direction, -step)) / (2.0 * step);
        // Richardson's extrapolation.
        let found = (4.0 * slope(0.02) - slope(0.04)) / 3.0;
        let exact: f64 = gradient.iter().zip(values(&direction)).map(|(g, d)| g * d).sum();
        let error = (found - exact).abs() / norm;
        println!("direction {seed}: {found:.6} for {exact:.6}, {error:.1e}");
        assert!(error < 1e-4, "direction {seed}: {found} for {exact}");
    }
    // A step along the embedding changes no cosine.
    let along: f64 = gradient[..10].iter().zip(values(&embeds)).map(|(g, e)| g * e).sum();
    assert!(along.abs() < 1e-5 * norm, "{along}");
}

// --- Errors ------------------------------------------------------------------------------------

#[test]
fn impossible_heads_are_errors() {
    let text = clip("hf");
    let head = |classes: &[&str], templates: &[&str]| ZeroShotHead::new(&text, classes, templates);
    assert_error(head(&[], &["{class}"]), &["classes: expected at least one, found 0"]);
    assert_error(head(&["cat"], &[]), &["templates: expected at least one, found 0"]);
    assert_error(head(&["cat"], &["{c}", "a photo"]), &["template", "`{class}`", "`a photo`"]);
    assert_error(head(&["cat", "dog", "cat"], &["{c}"]), &["`cat` at 0 and at 2"]);
    assert_error(head(&["cat", " "], &["{c}"]), &["an empty one at 1"]);
    let head = head(&["{c}", "dog"], &["the {c}"]).unwrap();
    let literal = text.embed(&["the {c}"]).unwrap();
    let cosine = head.logits(&literal).unwrap().i((0, 0)).unwrap().to_scalar::<f32>().unwrap();
    assert!((f64::from(cosine) / head.logit_scale - 1.0).abs() < 1e-5, "a class's name is not a template");
    let (embeds, cotangent) = (random(&[2, 10], 1), random(&[2, 2], 2));
    assert_error(head.logits(&random(&[2, 9], 1)), &["embeds", "[B, 10]", "[2, 9]"]);
    assert_error(head.logits(&random(&[10], 1)), &["embeds", "[10]"]);
    assert_error(head.vjp(&embeds, &random(&[2, 3], 1)), &["cotangent", "[B, 2]", "[2, 3]"]);
    assert!(head.vjp(&embeds, &cotangent).is_ok());
    assert!(head.vjp(&embeds, &random(&[3, 2], 1)).is_err(), "another batch");
}

#[test]
fn impossible_ids_are_errors() {
    let text = clip("hf");
    let none: [Vec<u32>; 0] = [];
    assert_error(text.encoder.forward(&none), &["texts"]);
    assert_error(text.embed(&[""; 0]), &["texts"]);
    assert_error(text.encoder.forward(&[Vec::<u32>::new()]), &["texts"]);
    assert_error(text.encoder.forward(&[vec![221, 222], vec![]]), &["end-of-text token", "222"]);
    assert_error(text.encoder.forward(&[[222; 13]]), &["at most 12 tokens, found 13"]);
    assert_error(
        text.encoder.forward(&[[221, 223, 222]]),
        &["token id", "below vocab_size 223", "found 223"],
    );
    assert_error(text.encoder.forward(&[[221, 5, 6]]), &["end-of-text token", "[221, 5, 6]"]);
}

#[test]
fn weights_that_are_missing_or_wrong_are_named() {
    for name in ["hf", "openclip"] {
        let tensors: Vec<(String, Tensor)> =
            candle_core::safetensors::load(folder(name).join("model.safetensors"), &Device::Cpu)
                .unwrap()
                .into_iter()
                .filter(|(name, _)| !name.starts_with("vi") && !name.ends_with("position_ids"))
                .collect();
        for (missing, _) in tensors.iter().filter(|(name, _)| !name.ends_with("token_embedding.weight")) {
            let copy = copy(name);
            save(&copy, tensors.iter().filter(|(name, _)| name != missing).cloned().collect());
            assert_error(load(copy.path()), &["model.safetensors", "is missing"]);
            let double = tensors.iter().map(|(name, tensor)| {
                let dims = [tensor.dims(), &[1, 1]].concat();
                (name.clone(), if name == missing { tensor.reshape(dims).unwrap() } else { tensor.clone() })
            });
            save(&copy, double.collect());
            assert_error(load(copy.path()), &["model.safetensors", &format!("`{missing}` has shape")]);
        }
    }
    let vision = tempfile::tempdir().unwrap();
    std::fs::copy(path("clip/v5/model.safetensors"), vision.path().join("model.safetensors")).unwrap();
    std::fs::copy(folder("hf").join("config.json"), vision.path().join("config.json")).unwrap();
    assert_error(load(vision.path()), &["no CLIP text encoder", "token_embedding.weight"]);
    assert_error(load(&path("clip/v5")), &["clip_text_model", "clip_vision_model"]);
    assert_error(load(&path("llava/v4")), &["clip_text_model", "llama"]);
}

#[test]
fn a_tokenizer_that_is_not_the_encoders_is_an_error() {
    let checkpoint = Checkpoint::open(&folder("hf")).unwrap();
    let other = TextConfig { eos_token_id: 5, ..config("hf") };
    let loaded = ClipText::load(&checkpoint, &other, &Device::Cpu);
    assert_error(loaded, &["config.json", "eos_token_id is 5", "ends texts with 222"]);
}

#[test]
fn a_configuration_has_transformers_defaults() {
    let parse = |text: &str| TextConfig::parse(text, Path::new("m/config.json"));
    let bare = parse(r#"{"model_type": "clip", "text_config": {}}"#).unwrap();
    assert_eq!(bare, TextConfig::default());
    assert_eq!((bare.vocab_size, bare.hidden_size, bare.intermediate_size), (49408, 512, 2048));
    assert_eq!((bare.num_hidden_layers, bare.num_attention_heads, bare.max_position_embeddings), (12, 8, 77));
    assert_eq!(
        (bare.hidden_act.as_str(), bare.projection_dim, bare.eos_token_id),
        ("quick_gelu", 512, 49407)
    );
    // As openai/clip-vit-large-patch14 has it: the old entry decides, and its end is the default.
    let old = parse(
        r#"{"model_type": "clip", "projection_dim": 768,
            "text_config": {"eos_token_id": 2, "hidden_size": 64, "model_type": "clip_text_model"},
            "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12}}"#,
    )
    .unwrap();
    assert_eq!((old.hidden_size, old.projection_dim, old.pooling()), (768, 768, Pooling::FirstOf(49407)));
    let null =
        parse(r#"{"model_type": "clip", "text_config": {"eos_token_id": 2}, "text_config_dict": null}"#);
    assert_eq!(null.unwrap().pooling(), Pooling::Highest);
    for (text, part) in [
        ("", "EOF"),
        (r#"{"text_config": {"hidden_size": 0}}"#, "hidden_size is 0"),
        (r#"{"text_config": {"vocab_size": 99999999}}"#, "vocab_size is 99999999"),
        (r#"{"text_config": {"hidden_size": 30, "num_attention_heads": 4}}"#, "not a multiple"),
        (r#"{"text_config": {"hidden_act": "relu"}}"#, "hidden_act"),
        (r#"{"text_config": {"eos_token_id": [1, 2]}}"#, "text_config"),
        (r#"{"text_config": {"model_type": "llama"}}"#, "found `llama`"),
    ] {
        assert_error(parse(text), &["`m/config.json`", part]);
    }
}

// --- A trained model ---------------------------------------------------------------------------

fn shared() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("shared");
    let there = folder.join("models/cifar-clip/config.json").is_file()
        && folder.join("data/cifar10/test_batch.bin").is_file();
    if !there {
        eprintln!("SKIPPED: {} has no models/cifar-clip and data/cifar10", folder.display());
    }
    there.then_some(folder)
}

/// Of the first 300: 58 % or more.
#[test]
fn a_trained_clip_names_real_photos() {
    const PHOTOS: usize = 300;
    let Some(shared) = shared() else { return };
    let model = shared.join("models/cifar-clip");
    let model = Model::find(model.to_str().expect("a name"), &Lookup::default()).unwrap();
    let preprocess = model.preprocess(None).unwrap();
    let tower = model.tower(&preprocess, None, &Device::Cpu).unwrap();
    let text = model.text(&Device::Cpu).unwrap();
    let names = std::fs::read_to_string(shared.join("data/cifar10/batches.meta.txt")).unwrap();
    let names: Vec<&str> = names.lines().filter(|name| !name.is_empty()).collect();
    let head = ZeroShotHead::new(&text, &names, &["a photo of a {class}."]).unwrap();
    let bytes = std::fs::read(shared.join("data/cifar10/test_batch.bin")).unwrap();
    let rows: Vec<&[u8]> = bytes.chunks_exact(3073).take(PHOTOS).collect();
    let photo = |row: &[u8]| {
        RgbImage::from_fn(32, 32, |x, y| {
            let at = 1 + (y * 32 + x) as usize;
            image::Rgb([row[at], row[1024 + at], row[2048 + at]])
        })
    };
    let mut right = 0;
    for rows in rows.chunks(50) {
        let photos: Vec<RgbImage> = rows.iter().map(|row| photo(row)).collect();
        let pixels = preprocess.batch(&photos, &Device::Cpu).unwrap();
        let embeds = tower.forward(&pixels, &Want::pooled()).unwrap().embeds.unwrap();
        let found = head.logits(&embeds).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap();
        right += found.iter().zip(rows).filter(|(found, row)| **found == u32::from(row[0])).count();
    }
    let percent = 100.0 * right as f64 / PHOTOS as f64;
    println!("{right} of {PHOTOS} photos named, {percent:.1} %");
    assert!(percent >= 58.0, "{right} of {PHOTOS} photos named");
}
