//! `radapt anchor export` and `radapt features`: what is written, what is refused, and that the
//! Python does what the tower does.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{Device, Tensor};
use fixture::{assert_close, assert_same, clip, path};
use radapt::defense::acquire::training_free;
use radapt::defense::{Fra, Gif, default_cutoff};
use radapt::tower::{Inserts, VisionTower, Want};
use serde_json::{Value, json};

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json_of(arguments: &[&str]) -> Value {
    let output = radapt(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

/// A failed command leaves stdout empty and says one line, with at most a hint after it.
fn fails(arguments: &[&str], code: i32, says: &str) {
    let output = radapt(arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty() && stderr.starts_with("error: "), "{arguments:?}: {stderr}");
    assert!(stderr.contains(says), "{arguments:?}: expected `{says}` in: {stderr}");
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A training-free anchor of the tiny CLIP.
fn anchor(root: &Path) -> PathBuf {
    let file = root.join("white.safetensors");
    let output =
        radapt(&["anchor", "extract", "--model", &shown(&path("clip/v4")), "--out", &shown(&file), "-q"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    file
}

fn pictures() -> [String; 2] {
    ["tall", "wide"].map(|name| shown(&path(&format!("llava/pictures/{name}.png"))))
}

const HOSTS: [(&str, &[&str]); 3] = [
    ("transformers", &["anchor.safetensors", "radapt_transformers.py"]),
    ("open_clip", &["anchor.safetensors", "radapt_open_clip.py"]),
    ("vllm", &["radapt_vllm/anchor.safetensors", "radapt_vllm/__init__.py", "pyproject.toml"]),
];

#[test]
fn a_folder_holds_the_same_anchor_and_python_without_a_trace_of_this_machine() {
    let root = tempfile::tempdir().expect("a folder");
    let file = anchor(root.path());
    let built_in = path("../../anchors/pocket-white.safetensors");
    for (host, files) in HOSTS {
        for (name, source) in [(shown(&file), &file), ("pocket-white".into(), &built_in)] {
            let out = root.path().join(format!("deep/{host}-{}", name.len()));
            let json = json_of(&["anchor", "export", &name, "--to", host, "--out", &shown(&out)]);
            let written: Vec<String> = files.iter().map(|file| shown(&out.join(file))).collect();
            assert_eq!(json["schema_version"], 1);
            assert_eq!((&json["to"], &json["files"]), (&json!(host), &json!(written)));
            assert_eq!(json["module"], json!(written[1]));
            let bytes = |file: &Path| std::fs::read(file).expect("a file");
            assert_eq!(bytes(&out.join(files[0])), bytes(source), "{host}: another anchor");
            let python = std::fs::read_to_string(out.join(files[1])).expect("the module");
            assert!(python.starts_with("\"\"\"R-Adapt's defence"), "{host}: {python}");
            for part in ["class Gif", "class Fra", "def fingerprint", "def attach", "def find_tower"] {
                assert_eq!(python.matches(part).count(), 1, "{host}: {part}");
            }
            assert!(!python.contains("from core"), "{host}");
            let root = shown(root.path());
            for trace in [root.as_str(), env!("CARGO_MANIFEST_DIR"), "/root", "/home", "/tmp", "C:\\"] {
                assert!(!python.contains(trace), "{host}: mentions {trace}");
            }
            // No more than what is named, and nothing half written.
            let held = |folder: &Path| {
                std::fs::read_dir(folder)
                    .expect("a folder")
                    .filter(|e| e.as_ref().is_ok_and(|e| e.path().is_file()))
                    .count()
            };
            let inner = out.join(files[1]).parent().expect("a folder").to_path_buf();
            assert_eq!(held(&inner) + if inner == out { 0 } else { held(&out) }, files.len(), "{host}");
        }
    }
}

#[test]
fn what_is_there_is_kept_unless_forced() {
    let root = tempfile::tempdir().expect("a folder");
    let file = shown(&anchor(root.path()));
    let out = root.path().join("out");
    let run = |more: &[&str]| {
        radapt(&[&["anchor", "export", &file, "--to", "transformers", "--out", &shown(&out)], more].concat())
    };
    assert!(run(&[]).status.success());
    assert!(run(&[]).status.success(), "the same once more is no loss");
    let module = out.join("radapt_transformers.py");
    let python = std::fs::read(&module).expect("the module");
    std::fs::write(&module, "mine").expect("written");
    std::fs::remove_file(out.join("anchor.safetensors")).expect("removed");
    let refused = run(&[]);
    let stderr = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("radapt_transformers.py") && stderr.contains("hint: give --force"), "{stderr}");
    assert_eq!(std::fs::read(&module).expect("a file"), b"mine");
    assert!(!out.join("anchor.safetensors").exists(), "nothing is written before all is looked at");
    assert!(run(&["--force"]).status.success());
    assert_eq!(std::fs::read(&module).expect("a file"), python);
    // The anchor of another model in the same folder.
    let other = ["anchor", "export", "pocket-white", "--to", "transformers", "--out", &shown(&out)];
    fails(&other, 1, "anchor.safetensors");
}

#[test]
fn what_cannot_be_exported_is_one_clear_line() {
    let root = tempfile::tempdir().expect("a folder");
    let file = shown(&anchor(root.path()));
    let out = shown(&root.path().join("out"));
    fails(&["anchor", "export", &file, "--to", "jax", "--out", &out], 2, "transformers, open_clip or vllm");
    fails(&["anchor", "export", &file, "--to", "vllm"], 2, "--out");
    fails(
        &["anchor", "export", "nowhere.safetensors", "--to", "vllm", "--out", &out],
        1,
        "nowhere.safetensors",
    );
    let broken = root.path().join("broken.safetensors");
    std::fs::write(&broken, "no anchor").expect("written");
    fails(&["anchor", "export", &shown(&broken), "--to", "vllm", "--out", &out], 1, "safetensors file");
    assert!(!Path::new(&out).exists(), "nothing is made for an anchor that is none");
    fails(&["anchor", "export", &file, "--to", "vllm", "--out", &file], 1, "cannot write");
    fails(
        &["features", &pictures()[0], "--model", &shown(&path("clip/v4")), "--out", &out, "--blocks", "5"],
        2,
        "0 to 4",
    );
    fails(&["features", &file, "--model", &shown(&path("clip/v4")), "--out", &out], 1, "white.safetensors");
    fails(&["features", "--model", &shown(&path("clip/v4")), "--out", &out], 2, "IMAGE");
}

#[test]
fn features_are_those_of_the_tower() {
    let root = tempfile::tempdir().expect("a folder");
    let file = shown(&root.path().join("features.safetensors"));
    let [tall, wide] = pictures();
    let model = shown(&path("clip/v4"));
    let about = json_of(&["features", &tall, &wide, "--model", &model, "--out", &file]);
    assert_eq!((&about["schema_version"], &about["contract"]), (&json!(1), &json!("clip")));
    assert_eq!(about["shapes"]["block.4"], json!([2, 26, 32]));
    assert_eq!(about["defense"]["anchor"], "training-free");
    let bytes = std::fs::read(&file).expect("a file");
    json_of(&["features", &tall, &wide, "--model", &model, "--out", &file]);
    assert_eq!(std::fs::read(&file).expect("a file"), bytes, "the same call gives the same bytes");

    let found = candle_core::safetensors::load(&file, &Device::Cpu).expect("the features");
    let tower = clip("v4");
    let cutoff = default_cutoff(20);
    let values = training_free(&tower).expect("an anchor");
    let defended = tower.with(Inserts {
        input: Some(std::sync::Arc::new(Gif::new(20, 20, cutoff, &Device::Cpu).expect("a filter"))),
        attention: Some(std::sync::Arc::new(Fra::new(&values, 1.2, -0.8, &Device::Cpu).expect("an anchor"))),
    });
    let want = Want::everything(tower.spec());
    for i in 0..2 {
        let pixels = found["pixels"].narrow(0, i, 1).expect("a picture");
        let features = defended.forward(&pixels, &want).expect("features");
        for (k, hidden) in features.hidden.iter().enumerate() {
            assert_same("a block", &found[&format!("block.{k}")].narrow(0, i, 1).expect("one"), hidden);
        }
        for (name, part) in [("pooled", features.pooled), ("embeds", features.embeds)] {
            assert_same(name, &found[name].narrow(0, i, 1).expect("one"), &part.expect("there"));
        }
    }
    // Some blocks alone, in order and once.
    let about = json_of(&[
        "features", &tall, "--model", &model, "--out", &file, "--blocks", "3,0,3", "--anchor", "none",
    ]);
    assert_eq!(about["defense"], Value::Null);
    let names: Vec<&String> = about["shapes"].as_object().expect("shapes").keys().collect();
    let mut names: Vec<&str> = names.into_iter().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["block.0", "block.3", "embeds", "pixels", "pooled"]);
}

#[test]
fn the_python_agrees_with_the_tower() {
    let python = std::env::var("RADAPT_PYTHON").unwrap_or_else(|_| "python3".into());
    let there = Command::new(&python).args(["-c", "import torch, safetensors"]).output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!(
            "SKIPPED: `{python}` has no `torch` and `safetensors`; set RADAPT_PYTHON to one that has (pip install torch safetensors)"
        );
        return;
    }
    let root = tempfile::tempdir().expect("a folder");
    let file = shown(&anchor(root.path()));
    for (host, _) in HOSTS {
        json_of(&["anchor", "export", &file, "--to", host, "--out", &shown(&root.path().join(host))]);
    }
    let model = shown(&path("clip/v4"));
    let [tall, wide] = pictures();
    let at = |name: &str| shown(&root.path().join(name));
    for (anchor, out) in [(file.as_str(), "ours"), ("none", "undefended")] {
        json_of(&["features", &tall, &wide, "--model", &model, "--anchor", anchor, "--out", &at(out)]);
    }
    let output = Command::new(&python)
        .arg(path("export/check.py"))
        .args([
            &shown(root.path()),
            &shown(&path("clip/v4/model.safetensors")),
            &at("ours"),
            &at("undefended"),
        ])
        .arg(at("theirs"))
        .env("OMP_NUM_THREADS", "1")
        .env_remove("RADAPT_ALPHA")
        .env_remove("RADAPT_ALLOW_MISMATCH")
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let load = |name: &str| candle_core::safetensors::load(at(name), &Device::Cpu).expect("a file");
    let (ours, undefended, theirs) = (load("ours"), load("undefended"), load("theirs"));
    for k in 0..=4 {
        let block = format!("block.{k}");
        for host in ["transformers", "open_clip", "clip", "vllm"] {
            assert_close(host, &theirs[&format!("{host}.{block}")], &ours[&block], 2e-5);
            assert_close(host, &theirs[&format!("{host}.removed.{block}")], &undefended[&block], 2e-5);
        }
        for host in ["transformers", "open_clip", "clip"] {
            assert_close(host, &theirs[&format!("{host}.neutral.{block}")], &undefended[&block], 2e-5);
        }
        // Eleven and eight bits.
        assert_close("float16", &theirs[&format!("float16.{block}")], &ours[&block], 1e-2);
        assert_close("bfloat16", &theirs[&format!("bfloat16.{block}")], &ours[&block], 6e-2);
    }
    assert_close("gradient", &theirs["slope.autograd"], &theirs["slope.difference"], 1e-6);
    let gif = Gif::new(19, 20, 2.5, &Device::Cpu).expect("a filter");
    let filtered = gif.filter(&theirs["gif.picture"]).expect("filtered");
    assert_close("GIF", &theirs["gif.filtered"], &filtered, 1e-6);
    // What lets a host filter the picture it has normalised.
    let constant = Tensor::full(0.7f32, (1, 3, 19, 20), &Device::Cpu).expect("a picture");
    assert_close("a constant", &gif.filter(&constant).expect("filtered"), &constant, 1e-6);
}
