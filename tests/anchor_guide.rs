//! Model-guided anchors: robust models in the formats they are published in, against PyTorch, and
//! files that are no such models.

mod fixture;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use fixture::{Fixture, assert_close, assert_same, path};
use radapt::Result;
use radapt::defense::acquire::{interpolate, model_guided, training_free};
use radapt::defense::guide::Guide;
use radapt::model::{Lookup, Model};
use radapt::tower::{VisionTower, Want};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The robust tower in every format there is.
const FORMATS: [&str; 8] = [
    "visual.pt",
    "visual_f16.pt",
    "legacy.pt",
    "training.pth.tar",
    "visual.safetensors",
    "openclip",
    "openclip/open_clip_pytorch_model.bin",
    "hf",
];

fn fixture(name: &str) -> PathBuf {
    path(&format!("guide/{name}"))
}

fn base() -> Model {
    Model::find(&path("clip/v4").display().to_string(), &Lookup::default()).expect("the base")
}

fn guide(from: &Path) -> Result<Guide> {
    let base = base();
    let normal = base.preprocess(None)?;
    let spec = base.tower_config()?.spec();
    Guide::find(&from.display().to_string(), &Lookup::default(), &spec, &normal, &Device::Cpu)
}

/// The anchor that the file or folder `from` makes for the base.
fn anchor(from: &Path) -> Result<(Tensor, Option<(usize, usize)>)> {
    model_guided(&guide(from)?.stem, &base().tower_config()?.spec())
}

fn refused(from: &Path, parts: &[&str]) {
    let error = anchor(from).map(drop).expect_err("it is to be refused").to_string();
    for part in parts {
        assert!(error.contains(part), "{}: expected `{part}` in: {error}", from.display());
    }
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn every_format_makes_pytorchs_anchor() {
    let want = Fixture::open("guide/expected.safetensors").tensor("anchor");
    let (first, _) = anchor(&fixture(FORMATS[0])).unwrap();
    for format in FORMATS {
        let (found, from) = anchor(&fixture(format)).unwrap_or_else(|e| panic!("{format}: {e}"));
        assert_eq!(from, None);
        assert_close(format, &found, &want, 1e-5);
        assert_same(format, &found, &first);
    }
}

#[test]
fn a_robust_models_own_normalisation_is_used_where_it_has_one() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["open_clip_config.json", "open_clip_pytorch_model.bin"] {
        std::fs::copy(fixture("openclip").join(name), folder.path().join(name)).unwrap();
    }
    let file = folder.path().join("open_clip_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    config["preprocess_cfg"]["mean"] = json!([0.5, 0.5, 0.5]);
    config["preprocess_cfg"]["std"] = json!([0.5, 0.5, 0.5]);
    std::fs::write(&file, config.to_string()).unwrap();
    let want = Fixture::open("guide/expected.safetensors").tensor("anchor_half");
    assert_close("half", &anchor(folder.path()).unwrap().0, &want, 1e-5);
    // A file does not say it: the base's.
    let want = Fixture::open("guide/expected.safetensors").tensor("anchor");
    assert_close(
        "base's",
        &anchor(&folder.path().join("open_clip_pytorch_model.bin")).unwrap().0,
        &want,
        1e-5,
    );
}

#[test]
fn another_resolution_is_interpolated_as_pytorch_does() {
    let expected = Fixture::open("guide/expected.safetensors");
    let larger = guide(&fixture("larger.pt")).unwrap();
    assert_eq!((larger.stem.spec().grid, larger.stem.spec().image_size), ((7, 7), 28));
    assert_close("larger", &larger.stem.white_attention().unwrap(), &expected.tensor("larger"), 1e-5);
    let (found, from) = anchor(&fixture("larger.pt")).unwrap();
    assert_eq!(from, Some((7, 7)));
    assert_close("resized", &found, &expected.tensor("resized"), 1e-5);
    // The class token's row is kept, to the bit.
    let whole = larger.stem.white_attention().unwrap();
    assert_same("class token", &found.narrow(0, 0, 1).unwrap(), &whole.narrow(0, 0, 1).unwrap());
}

#[test]
fn interpolation_keeps_what_is_linear_and_refuses_what_does_not_fit() {
    // A constant, and rows only.
    let rows = Tensor::new(&[[7f32], [1.0], [2.0], [3.0], [4.0]], &Device::Cpu).unwrap();
    let same = interpolate(&rows, true, (2, 2), (2, 2)).unwrap();
    assert_same("the same grid", &same, &rows);
    let wide = interpolate(&rows, true, (2, 2), (1, 4)).unwrap();
    // By hand: the middle of both rows, then at -1/4 (held at the border), 1/4, 3/4 and 5/4.
    assert_eq!(fixture::values(&wide), [7.0, 2.0, 2.25, 2.75, 3.0]);
    let patches = rows.narrow(0, 1, 4).unwrap();
    assert_eq!(fixture::values(&interpolate(&patches, false, (2, 2), (1, 1)).unwrap()), [2.5]);
    for (class_token, from, to) in [(false, (2, 2), (1, 1)), (true, (3, 2), (1, 1)), (true, (2, 2), (0, 1))] {
        assert!(interpolate(&rows, class_token, from, to).is_err());
    }
}

#[test]
fn the_bases_own_copy_makes_the_training_free_anchor() {
    let base = base();
    let tower = base.tower(&base.preprocess(None).unwrap(), None, &Device::Cpu).unwrap();
    let own = training_free(&tower).unwrap();
    assert_same("folder", &anchor(&base.folder).unwrap().0, &own);
    assert_same("file", &anchor(&base.folder.join("model.safetensors")).unwrap().0, &own);
}

#[test]
fn openclips_copy_is_the_same_model_as_transformers() {
    let expected = Fixture::open("guide/expected.safetensors");
    let models = ["openclip", "hf"]
        .map(|name| Model::find(&fixture(name).display().to_string(), &Lookup::default()).expect("a model"));
    assert_eq!(models[0].fingerprint().unwrap(), models[1].fingerprint().unwrap());
    assert_eq!(models[0].tower_config().unwrap().spec(), models[1].tower_config().unwrap().spec());
    assert_eq!(models[0].preprocess(None).unwrap(), models[1].preprocess(None).unwrap());
    assert_ne!(models[0].digest().unwrap(), models[1].digest().unwrap());
    let all: Vec<String> = serde_json::from_slice(&std::fs::read(path("clip_text/texts.json")).unwrap())
        .map(|texts: Value| {
            let texts = texts.get("texts").cloned().unwrap_or(texts);
            texts
                .as_array()
                .unwrap()
                .iter()
                .map(|text| text.as_str().or(text["text"].as_str()).unwrap().to_string())
                .collect()
        })
        .unwrap();
    let pixels = expected.tensor("pixels");
    let features = models.each_ref().map(|model| {
        let tower = model.tower(&model.preprocess(None).unwrap(), None, &Device::Cpu).unwrap();
        assert_eq!(tower.fingerprint().unwrap(), model.fingerprint().unwrap());
        let embeds = tower.forward(&pixels, &Want::pooled()).unwrap().embeds.expect("a projection");
        assert_close("embeds", &embeds, &expected.tensor("embeds"), 1e-5);
        let text = model.text(&Device::Cpu).unwrap().embed(&all[..2]).unwrap();
        assert_close("text", &text, &expected.tensor("text"), 1e-5);
        (embeds, text)
    });
    assert_same("embeds", &features[0].0, &features[1].0);
    assert_same("text", &features[0].1, &features[1].1);
}

#[test]
fn nothing_in_a_pickle_is_executed() {
    let marker = Path::new("radapt-ran-a-pickle");
    refused(
        &fixture("evil_root.pt"),
        &["evil_root.pt", "expected a dictionary of tensors", "system` would return, which is not called"],
    );
    refused(&fixture("evil_weight.pt"), &["weight `class_embedding`", "`posix.system`", "not called"]);
    // Beside a tower it does not matter.
    let want = Fixture::open("guide/expected.safetensors").tensor("anchor");
    assert_close("entry", &anchor(&fixture("evil_entry.pt")).unwrap().0, &want, 1e-5);
    assert!(!marker.exists());
}

#[test]
fn what_is_no_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        file
    };
    refused(&folder.path().join("missing.pt"), &["cannot read", "missing.pt"]);
    refused(Path::new("missing/fare.pt"), &["cannot read", "missing/fare.pt"]);
    refused(&put("text.pt", b"not a checkpoint"), &["text.pt", "not a complete safetensors checkpoint"]);
    refused(&put("empty.pt", b""), &["empty.pt", "not a complete safetensors checkpoint"]);
    refused(&put("pickle.pt", b"\x80\x04}."), &["pickle.pt", "not a complete safetensors checkpoint"]);
    refused(&fixture("torchscript.pt"), &["TorchScript"]);
    refused(folder.path(), &["config.json"]);
    // A text encoder alone.
    refused(&path("clip_text/openclip/model.safetensors"), &["no CLIP vision tower, only a text encoder"]);
}

/// A file in PyTorch's zip format with this pickle and a storage `0` of 64 bytes.
fn zipped(folder: &Path, pickle: &[u8]) -> PathBuf {
    let file = folder.join("made.pt");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&file).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("a/data.pkl", pickle), ("a/data/0", &[0; 64]), ("a/byteorder", b"little")] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    file
}

fn text(text: &str) -> Vec<u8> {
    [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

/// A state dict whose `class_embedding` is what the instructions `value` make.
fn dictionary(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &*text("class_embedding"), value, b"s."].concat()
}

/// A call of PyTorch's with a tensor's arguments: the storage's key and its count, and the rest.
fn rebuilt(key: &str, count: i32, rest: &[u8]) -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &*text("storage"),
        b"ctorch\nFloatStorage\n",
        &text(key),
        &text("cpu"),
        b"J",
        &count.to_le_bytes(),
        b"tQ",
        rest,
        b"tR",
    ]
    .concat()
}

#[test]
fn made_up_pickles_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let weight = |value: &[u8], parts: &[&str]| refused(&zipped(folder.path(), &dictionary(value)), parts);
    // Well formed, but there is no more of a tower: the tensor itself is in order.
    let order = rebuilt("0", 16, b"K\x00K\x10\x85K\x01\x85");
    weight(&order, &["weight `conv1.weight` is missing"]);
    for (rest, says) in [
        // 17 of 16, from 1 on, by steps, below zero, and so far that the sum overflows.
        (&b"K\x00K\x11\x85K\x01\x85"[..], "not within its storage `0` of 16"),
        (b"K\x01K\x10\x85K\x01\x85", "not within its storage"),
        (b"K\x00K\x09\x85K\x02\x85", "not within its storage"),
        (b"J\xff\xff\xff\xffK\x10\x85K\x01\x85", "its offset is not a whole number"),
        (b"K\x00J\xff\xff\xff\xff\x85K\x01\x85", "its shape is not"),
        (b"K\x00K\x10\x85J\xff\xff\xff\xff\x85", "its stride is not"),
        (b"K\x00K\x02\x85\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85", "not within its storage"),
        (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x02\x85K\x01\x85", "not within its storage"),
        // More memory than the file has bytes, from one entry.
        (b"K\x00\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85K\x00\x85", "larger than the file"),
        (b"K\x00J\x00\x00\x00\x40J\x00\x00\x00\x40\x86K\x00K\x00\x86", "larger than the file"),
        (b"K\x00K\x10\x85K\x01K\x01\x86", "1 sides and 2 strides"),
        (b"K\x00", "has 2 arguments, expected at least 4"),
        (b"K\x00NN", "its shape is not"),
    ] {
        weight(&rebuilt("0", 16, rest), &["tensor `class_embedding`", says]);
    }
    weight(&rebuilt("1", 16, b"K\x00K\x10\x85K\x01\x85"), &["its storage `1` is missing"]);
    weight(&rebuilt("0", 999, b"K\x00K\x11\x85K\x01\x85"), &["of 16 entries"]);
    weight(&rebuilt("0", 3, b"K\x00K\x04\x85K\x01\x85"), &["of 3 entries"]);
    weight(b"ctorch._utils\n_rebuild_parameter\n)R", &["`torch._utils._rebuild_parameter` would return"]);
    weight(b"ctorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00))tR", &["its storage is a number"]);
    // A parameter of a parameter and so on.
    let wraps = b"ctorch._utils\n_rebuild_parameter\n".repeat(20);
    weight(&[wraps, order.clone(), b"\x85R".repeat(20)].concat(), &["is wrapped more than 8 times"]);
    weight(b"K\x07", &["weight `class_embedding` is a number"]);
    weight(b"cos\nsystem\n", &["the name `os.system`"]);
    weight(b"cos\n\x1b[31msystem\n", &["the name `os.\\u{1b}[31msystem`"]);
    weight(&[b"(".repeat(100_000), b"K\x00".to_vec(), b"t".repeat(100_000)].concat(), &["is a list"]);
    // Dictionaries in each other without an end, and one that holds itself.
    let deep = [b"}".to_vec(), text("a")].concat().repeat(50_000);
    weight(&[deep, b"N".to_vec(), b"s".repeat(50_000)].concat(), &["no CLIP vision tower"]);
    let itself = [b"}q\x00".to_vec(), text("a"), b"h\x00sh\x00".to_vec(), text("b"), b"h\x00s0".to_vec()];
    weight(&itself.concat(), &["no CLIP vision tower"]);
    // Doubling dictionaries: small in the file, without end when taken apart.
    let mut bomb = b"}q\x00".to_vec();
    for _ in 0..8 {
        // The one before is in the memo.
        bomb.extend(b"0}");
        for key in 0..100u8 {
            bomb.extend([b'K', key, b'h', 0, b's']);
        }
        bomb.extend(b"q\x00");
    }
    weight(&bomb, &["entries"]);
    let whole = |pickle: &[u8], parts: &[&str]| refused(&zipped(folder.path(), pickle), parts);
    whole(b"\x80\x02].", &["expected a dictionary of tensors, found a list"]);
    whole(b"\x80\x02", &["as a pickle: ends after 2 bytes"]);
    whole(b"\x80\x02}\x82\x01.", &["instruction 0x82"]);
    whole(b"\x80\x02}Xdddd", &["ends within"]);
    whole(&[b"\x80\x02".to_vec(), b"N0".repeat(9_000_000)].concat(), &["more than"]);
    whole(&[b"\x80\x02(".to_vec(), b"N".repeat(5_000_000)].concat(), &["more than"]);
    // From one list of 100 pairs, 50,000 dictionaries.
    let pairs =
        [b"]q\x00(".to_vec(), b"NN\x86".repeat(100), b"e\x85q\x01ccollections\nOrderedDict\nq\x02".to_vec()];
    whole(&[b"\x80\x02".to_vec(), pairs.concat(), b"h\x02h\x01R".repeat(50_000)].concat(), &["more than"]);
}

#[test]
fn cut_and_changed_files_are_errors_or_towers_and_never_panics() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("robust.pt");
    for format in ["training.pth.tar", "legacy.pt"] {
        let good = std::fs::read(fixture(format)).unwrap();
        for length in (0..good.len()).step_by(173).chain(good.len() - 30..good.len()) {
            std::fs::write(&file, &good[..length]).unwrap();
            assert!(anchor(&file).is_err(), "{format}: {length} bytes");
        }
        // Where names, shapes and places are: every byte; among the weights a few.
        let pickle = good.windows(4).position(|part| part == b"\x80\x02}q").unwrap_or(0);
        let mut read = 0;
        for at in (0..good.len()).filter(|at| (pickle..pickle + 2500).contains(at) || at % 97 == 0) {
            let mut bad = good.clone();
            bad[at] ^= [0xff, 0x01, 0x80][at % 3];
            std::fs::write(&file, &bad).unwrap();
            read += usize::from(anchor(&file).is_ok());
        }
        assert!(read > 0, "{format}: a changed weight is still a tower");
    }
}

#[test]
fn several_towers_are_refused_unless_one_is_what_was_fine_tuned() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("two.safetensors");
    let tower = candle_core::safetensors::load(fixture("visual.safetensors"), &Device::Cpu).unwrap();
    let put = |first: &str, second: &str| {
        let both: std::collections::HashMap<_, _> = [first, second]
            .iter()
            .flat_map(|prefix| tower.iter().map(move |(name, t)| (format!("{prefix}{name}"), t.clone())))
            .collect();
        candle_core::safetensors::save(&both, &file).unwrap();
    };
    put("model.visual.", "ema.visual.");
    refused(&file, &["more than one vision tower: ema.visual., model.visual."]);
    put("state_dict.module.visual.", "vision_encoder_state_dict.");
    assert!(anchor(&file).is_ok());
}

#[test]
fn shapes_that_make_no_tower_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("odd.safetensors");
    let odd = |name: &str, shape: &[usize], parts: &[&str]| {
        let mut tower = candle_core::safetensors::load(fixture("visual.safetensors"), &Device::Cpu).unwrap();
        match shape {
            [] => drop(tower.remove(name)),
            shape => {
                let zeros = Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
                tower.insert(name.to_string(), zeros);
            }
        }
        candle_core::safetensors::save(&tower, &file).unwrap();
        refused(&file, parts);
    };
    odd("conv1.weight", &[], &["weight `conv1.weight` is missing"]);
    odd("conv1.weight", &[32, 3, 4, 5], &["patch embedding has shape [32, 3, 4, 5]"]);
    odd("conv1.weight", &[32, 1, 4, 4], &["patch embedding"]);
    odd("class_embedding", &[1, 32], &["class embedding has shape [1, 32]"]);
    odd("positional_embedding", &[27, 32], &["position embedding has shape [27, 32]", "1 + a square"]);
    odd("positional_embedding", &[25, 32], &["position embedding"]);
    odd("ln_pre.weight", &[], &["weight `ln_pre.weight` is missing"]);
    odd("transformer.resblocks.0.attn.in_proj_weight", &[95, 32], &["[95, 32]", "expected [96, 32]"]);
    // Another width, whole.
    let wide = base().folder.join("model.safetensors");
    let tensors = candle_core::safetensors::load(wide, &Device::Cpu).unwrap();
    let narrow: std::collections::HashMap<_, _> = tensors
        .into_iter()
        .filter(|(name, _)| name.starts_with("vision_model."))
        .map(|(name, t)| {
            let shape: Vec<usize> = t.dims().iter().map(|&side| if side == 32 { 24 } else { side }).collect();
            (name, Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap())
        })
        .collect();
    candle_core::safetensors::save(&narrow, &file).unwrap();
    refused(&file, &["the robust model is 24 wide, the base 32"]);
}

#[test]
fn openclips_other_designs_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let name = |name: &str| folder.path().join(name);
    let weights = "open_clip_pytorch_model.bin";
    std::fs::copy(fixture("openclip").join(weights), name(weights)).unwrap();
    let config: Value =
        serde_json::from_slice(&std::fs::read(fixture("openclip/open_clip_config.json")).unwrap()).unwrap();
    for (pointer, key, value, says) in [
        ("/model_cfg/vision_cfg", "timm_model_name", json!("vit"), "`timm_model_name` is \"vit\""),
        ("/model_cfg/vision_cfg", "width", json!(0), "`width`"),
        ("/model_cfg/vision_cfg", "layers", json!("many"), "`layers`"),
        ("/model_cfg/vision_cfg", "mlp_ratio", json!(-1), "`mlp_ratio`"),
        ("/model_cfg/vision_cfg", "image_size", json!([20, 24]), "`image_size`"),
        ("/model_cfg/vision_cfg", "pool_type", json!("avg"), "`pool_type`"),
        ("/model_cfg", "vision_cfg", json!(3), "`vision_cfg`"),
        ("/preprocess_cfg", "resize_mode", json!("longest"), "`resize_mode`"),
        ("/preprocess_cfg", "interpolation", json!("random"), "`interpolation`"),
        ("/preprocess_cfg", "std", json!([0, 1, 1]), "`image_std`"),
    ] {
        let mut bad = config.clone();
        bad.pointer_mut(pointer).unwrap()[key] = value;
        std::fs::write(name("open_clip_config.json"), bad.to_string()).unwrap();
        refused(folder.path(), &["open_clip_config.json", says]);
    }
    // A text encoder of another design does not matter to an anchor, only to who asks for it.
    let mut other = config;
    other["model_cfg"]["text_cfg"]["hf_model_name"] = json!("roberta-base");
    std::fs::write(name("open_clip_config.json"), other.to_string()).unwrap();
    assert!(anchor(folder.path()).is_ok());
    let model = Model::find(&folder.path().display().to_string(), &Lookup::default()).unwrap();
    let error = model.text(&Device::Cpu).expect_err("another text encoder").to_string();
    assert!(error.contains("hf_model_name"), "{error}");
}

fn radapt(arguments: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("RADAPT_MODEL")
        .env_remove("RUST_BACKTRACE")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("the command runs")
}

fn stdout_json(arguments: &[&str], folder: &Path) -> Value {
    let output = radapt(arguments, folder);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

fn show(name: &Path) -> String {
    name.display().to_string()
}

#[test]
fn the_command_writes_an_anchor_that_fits() {
    let folder = tempfile::tempdir().unwrap();
    let (robust, model) = (show(&fixture("larger.pt")), show(&path("clip/v4")));
    let arguments =
        ["anchor", "guide", "--from", &robust, "--model", &model, "--out", "a.safetensors", "--json"];
    let made = stdout_json(&arguments, folder.path());
    let sum: String =
        Sha256::digest(std::fs::read(&robust).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
    let expect = json!({
        "schema_version": made["schema_version"],
        "file": "a.safetensors",
        "shape": [26, 32],
        "sha256": made["sha256"],
        "radapt.version": "1",
        "radapt.method": "model-guided",
        "radapt.base_model": model,
        "radapt.base_revision": "",
        "radapt.fingerprint": base().fingerprint().unwrap(),
        "radapt.guide_model": format!("{robust} sha256:{sum}"),
        "radapt.interpolated_from": "7x7",
        "radapt.grid": "5x5",
        "radapt.class_token": "true",
        "radapt.image_size": "20",
        "radapt.contract": "clip",
        "radapt.alpha": "1.2",
        "radapt.beta": "0",
        "radapt.cutoff": radapt::defense::default_cutoff(20).to_string(),
    });
    assert_eq!(made, expect);
    let shown = stdout_json(&["anchor", "show", "a.safetensors", "--json"], folder.path());
    assert_eq!(shown["radapt.interpolated_from"], "7x7");
    let fits = stdout_json(&["anchor", "check", "a.safetensors", "--model", &model, "--json"], folder.path());
    assert_eq!(fits["fits"], true);
    // The same bytes again, and none of the optional key where nothing was interpolated.
    let before = std::fs::read(folder.path().join("a.safetensors")).unwrap();
    stdout_json(&arguments, folder.path());
    assert_eq!(before, std::fs::read(folder.path().join("a.safetensors")).unwrap());
    let robust = show(&fixture("training.pth.tar"));
    let preset = ["--preset", "tga", "--alpha", "-0.5"];
    let arguments = ["anchor", "guide", "--from", &robust, "--model", &model, "--out", "b", "--json"];
    let made = stdout_json(&[&arguments[..], &preset].concat(), folder.path());
    assert_eq!(made["radapt.interpolated_from"], Value::Null);
    let found = (&made["radapt.alpha"], &made["radapt.beta"], &made["radapt.cutoff"]);
    let cutoff = (30.0 * 20.0 / 224.0f64).to_string();
    let number = |value: &Value| value.as_str().unwrap().parse::<f64>().unwrap();
    assert_eq!((found.0.as_str(), found.1.as_str()), (Some("-0.5"), Some("0")));
    assert!((number(found.2) - cutoff.parse::<f64>().unwrap()).abs() < 1e-12);
}

#[test]
fn an_anchor_of_one_layout_fits_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let (openclip, hf) = (show(&fixture("openclip")), show(&fixture("hf")));
    let arguments = ["anchor", "extract", "--model", &hf, "--out", "a", "--preset", "plus", "--json"];
    let made = stdout_json(&arguments, folder.path());
    assert_eq!((&made["radapt.alpha"], &made["radapt.beta"]), (&json!("0.8"), &json!("0.2")));
    let fits = stdout_json(&["anchor", "check", "a", "--model", &openclip, "--json"], folder.path());
    assert_eq!(fits["fits"], true);
    // The whole of an evaluation on OpenCLIP's folder, with that anchor.
    for (i, class) in ["cat", "dog"].iter().enumerate() {
        let classes = folder.path().join("pictures").join(class);
        std::fs::create_dir_all(&classes).unwrap();
        for picture in 0..3 {
            let paint =
                |x: u32, y: u32| image::Rgb([(x * 12) as u8, (y * 12) as u8, (i * 90 + picture * 30) as u8]);
            let picture_file = classes.join(format!("{picture}.png"));
            image::RgbImage::from_fn(20, 20, paint).save(picture_file).unwrap();
        }
    }
    let figures = |model: &str, out: &str| {
        let arguments = [
            "eval", "classify", "--model", model, "--data", "pictures", "--anchor", "a", "--attack", "pgd",
            "--eps", "4/255", "--out", out, "--json",
        ];
        let mut rows = stdout_json(&arguments, folder.path())["rows"].clone();
        for row in rows.as_array_mut().unwrap() {
            // The model's own name.
            row.as_object_mut().unwrap().remove("surrogate");
        }
        rows
    };
    let rows = figures(&openclip, "one");
    assert_eq!(rows.as_array().map(Vec::len), Some(6));
    assert_eq!(rows, figures(&hf, "two"));
}

#[test]
fn presets_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let listed = stdout_json(&["anchor", "presets", "--json"], folder.path());
    assert!(listed["schema_version"].is_number());
    let tga = &listed["presets"][2];
    assert_eq!(
        (&tga["name"], &tga["method"], &tga["cutoff"]),
        (&json!("tga"), &json!("model-guided"), &json!(30.0))
    );
    let table = radapt(&["anchor", "presets"], folder.path()).stdout;
    let table = String::from_utf8(table).unwrap();
    for name in ["clip", "tecoa", "tga", "fare", "plus"] {
        assert!(table.lines().any(|line| line.starts_with(name)), "{table}");
    }
}

#[test]
fn bad_input_is_one_line_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("no.pt"), "no").unwrap();
    let model = show(&path("clip/v4"));
    let names =
        ["evil_root.pt", "evil_weight.pt", "torchscript.pt", "visual.pt"].map(|name| show(&fixture(name)));
    let [root, weight, script, visual] = &names;
    let text = show(&path("clip_text/openclip/model.safetensors"));
    for (from, more, code, says) in [
        ("missing.pt", &[][..], 1, "cannot read `missing.pt`"),
        ("missing", &[], 1, "no such folder"),
        ("organisation/missing", &[], 1, "`config.json` or `open_clip_config.json`"),
        ("no.pt", &[], 1, "no.pt"),
        (root, &[], 1, "not called"),
        (weight, &[], 1, "not called"),
        (script, &[], 1, "TorchScript"),
        (&text, &[], 1, "only a text encoder"),
        (visual, &["--preset", "none"], 2, "one of clip, tecoa, tga, fare, plus"),
        (visual, &["--cutoff", "0"], 2, "cutoff"),
        (visual, &["--alpha", "nan"], 2, "alpha"),
        (visual, &["--model", "pocket-clip"], 1, "wide, the base"),
        (visual, &["--model", "nowhere"], 1, "nowhere"),
    ] {
        let mut arguments = vec!["anchor", "guide", "--from", from, "--out", "a"];
        if !more.contains(&"--model") {
            arguments.extend(["--model", &model]);
        }
        arguments.extend(more);
        let output = radapt(&[&arguments[..], &["--json"]].concat(), folder.path());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{from} {more:?}: {stderr}");
        assert!(stderr.contains(says), "{from} {more:?}: expected `{says}` in {stderr}");
        assert!(stderr.lines().count() <= 2 && stderr.starts_with("error: "), "{stderr}");
        assert!(output.stdout.is_empty());
        assert!(!folder.path().join("a").exists(), "{from}");
    }
    assert!(!folder.path().join("radapt-ran-a-pickle").exists());
}
