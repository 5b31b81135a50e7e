//! The `radapt` command: what it prints, and what it says of broken input.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fixture::path;
use serde_json::{Value, json};

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env_remove("RUST_BACKTRACE")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn stdout_json(arguments: &[&str]) -> Value {
    let output = radapt(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

/// A failed command leaves stdout empty and says one line, with at most a hint after it.
fn fails(what: &str, arguments: &[&str], code: i32, says: &str) {
    let output = radapt(arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: exit code, stderr: {stderr}");
    assert!(output.stdout.is_empty(), "{what}: stdout: {}", text(&output.stdout));
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    assert!(stderr.to_lowercase().contains(&says.to_lowercase()), "{what}: expected `{says}` in: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines[0].starts_with("error: "), "{what}: {stderr}");
    // clap's own messages carry a usage line.
    if !stderr.contains("Usage:") && !stderr.contains("--help") {
        assert!(
            lines[1..].iter().all(|line| line.starts_with("hint: ")) && lines.len() <= 2,
            "{what}: {stderr}"
        );
    }
}

fn copy(from: &str, to: &Path) {
    for entry in std::fs::read_dir(path(from)).expect("the fixture").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
}

/// Rewrites the header of a safetensors file.
fn edit_header(file: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(file).expect("a file");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    change(&mut header);
    let header = header.to_string().into_bytes();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header);
    out.extend(&bytes[8 + length..]);
    std::fs::write(file, out).expect("written");
}

fn truncate(file: &Path, keep: usize) {
    let bytes = std::fs::read(file).expect("a file");
    std::fs::write(file, &bytes[..keep]).expect("written");
}

/// An anchor of the tiny model.
fn extract(root: &Path) -> PathBuf {
    let file = root.join("anchor.safetensors");
    let model = path("llava/v4").display().to_string();
    let output = radapt(&["anchor", "extract", "--model", &model, "--out", &file.display().to_string()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    file
}

#[test]
fn anchors_are_extracted_shown_and_checked() {
    let root = tempfile::tempdir().expect("a folder");
    let anchor = extract(root.path()).display().to_string();
    let shown = stdout_json(&["anchor", "show", &anchor, "--json"]);
    assert_eq!(shown["schema_version"], 1);
    assert_eq!(shown["shape"], json!([26, 32]));
    for (key, value) in [
        ("method", "training-free"),
        ("grid", "5x5"),
        ("alpha", "1.2"),
        ("beta", "-0.8"),
        ("contract", "llava-pad"),
    ] {
        assert_eq!(shown[format!("radapt.{key}")], value, "{key}");
    }
    let llava = path("llava/v4").display().to_string();
    let checked = stdout_json(&["anchor", "check", &anchor, "--model", &llava, "--json"]);
    assert_eq!((&checked["fits"], &checked["reason"]), (&json!(true), &Value::Null));
    // The same bytes again.
    let before = std::fs::read(&anchor).expect("a file");
    extract(root.path());
    assert_eq!(before, std::fs::read(&anchor).expect("a file"));

    let other = path("llava/sp").display().to_string();
    let output = radapt(&["anchor", "check", &anchor, "--model", &other, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let checked: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(checked["fits"], false);
    assert!(checked["reason"].as_str().is_some_and(|reason| reason.contains("fingerprint")), "{checked}");
    assert!(radapt(&["anchor", "check", &anchor, "--model", &other, "--allow-mismatch"]).status.success());
}

/// `org/name` in a cache laid out as the Hub's clients do.
#[test]
fn a_cached_hub_model_is_found_offline_by_its_revision() {
    let root = tempfile::tempdir().expect("a folder");
    let model = root.path().join("models--tiny--llava");
    let snapshot = model.join("snapshots/0123abcd");
    std::fs::create_dir_all(&snapshot).expect("a folder");
    std::fs::create_dir(model.join("refs")).expect("a folder");
    std::fs::write(model.join("refs/v1"), "0123abcd").expect("written");
    copy("llava/v4", &snapshot);
    let out = root.path().join("anchor.safetensors").display().to_string();
    let extract = |revision: &str| {
        Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args([
                "anchor",
                "extract",
                "--model",
                "tiny/llava",
                "--revision",
                revision,
                "--out",
                &out,
                "--offline",
            ])
            .env("HF_HUB_CACHE", root.path())
            .output()
            .expect("the command runs")
    };
    let output = extract("v1");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let shown = stdout_json(&["anchor", "show", &out, "--json"]);
    assert_eq!(
        (&shown["radapt.base_model"], &shown["radapt.base_revision"]),
        (&json!("tiny/llava"), &json!("v1"))
    );
    let output = extract("v2");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("revision `v2` is not in the cache"), "{}", text(&output.stderr));
}

#[test]
fn broken_anchors_are_one_clear_line() {
    let root = tempfile::tempdir().expect("a folder");
    let good = extract(root.path());
    let bytes = std::fs::read(&good).expect("a file");
    let file = |name: &str, change: &dyn Fn(&Path)| {
        let file = root.path().join(name);
        std::fs::write(&file, &bytes).expect("written");
        change(&file);
        file.display().to_string()
    };
    let metadata = |key: &'static str, value: &'static str| {
        move |file: &Path| edit_header(file, |h| h["__metadata__"][key] = json!(value))
    };
    let nan = |file: &Path| {
        let mut bytes = std::fs::read(file).expect("a file");
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(file, bytes).expect("written");
    };
    let cases: Vec<(String, &str)> = vec![
        (file("truncated", &|f| truncate(f, bytes.len() - 7)), "not a complete safetensors file"),
        (file("header", &|f| truncate(f, 40)), "not a complete safetensors file"),
        (file("empty", &|f| truncate(f, 0)), "not a complete safetensors file"),
        (
            file("text", &|f| std::fs::write(f, "not an anchor").expect("written")),
            "not a complete safetensors file",
        ),
        (file("nan", &nan), "NaN"),
        (file("version", &metadata("radapt.version", "2")), "version `2`"),
        (file("grid", &metadata("radapt.grid", "4x5")), "makes 21 rows"),
        (file("alpha", &metadata("radapt.alpha", "inf")), "radapt.alpha"),
        (file("contract", &metadata("radapt.contract", "fisheye")), "radapt.contract"),
        (
            file("no-metadata", &|f| {
                edit_header(f, |h| {
                    h.as_object_mut().expect("an object").remove("__metadata__");
                })
            }),
            "not an anchor",
        ),
        (
            file("tensor", &|f| {
                edit_header(f, |h| {
                    let t = h.as_object_mut().expect("an object").remove("anchor").expect("it");
                    h["other"] = t;
                })
            }),
            "no tensor `anchor`",
        ),
        (root.path().join("missing").display().to_string(), "missing"),
        (root.path().display().to_string(), "not a file"),
    ];
    for (anchor, says) in &cases {
        fails(anchor, &["anchor", "show", anchor], 1, says);
    }
    // The tiny model at another shape, and of other weights.
    let small = root.path().join("small");
    std::fs::create_dir(&small).expect("a folder");
    copy("clip/v4", &small);
    let fingerprint =
        metadata("radapt.fingerprint", "0000000000000000000000000000000000000000000000000000000000000000");
    let other = file("fingerprint", &fingerprint);
    let llava = path("llava/v4").display().to_string();
    fails("fingerprint", &["anchor", "check", &other, "--model", &llava], 1, "--allow-mismatch");
    let wide = file("wide", &|f| {
        edit_header(f, |h| {
            h["anchor"]["shape"] = json!([52, 16]);
            h["__metadata__"]["radapt.grid"] = json!("3x17");
        })
    });
    fails("shape", &["anchor", "check", &wide, "--model", &llava, "--allow-mismatch"], 1, "patches");
}

#[cfg(feature = "engine")]
mod chat {
    use super::*;

    /// A copy of the tiny LLaVA, changed by `change`.
    fn model(root: &Path, name: &str, change: impl FnOnce(&Path)) -> String {
        let folder = root.join(name);
        std::fs::create_dir(&folder).expect("a folder");
        copy("llava/v4", &folder);
        change(&folder);
        folder.display().to_string()
    }

    fn edit_json(file: &Path, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON");
        change(&mut value);
        std::fs::write(file, value.to_string()).expect("written");
    }

    fn picture(name: &str) -> String {
        path(&format!("llava/pictures/{name}.png")).display().to_string()
    }

    #[test]
    fn an_answer_and_its_json_are_the_same() {
        let model = path("llava/v4").display().to_string();
        let arguments = [
            "chat",
            "--model",
            &model,
            "--image",
            &picture("wide"),
            "--max-tokens",
            "8",
            "--contract",
            "llava-crop",
            "What is in the picture?",
        ];
        for (anchor, defended) in [("none", false), ("training-free", true)] {
            let with: Vec<&str> = [&arguments[..], &["--anchor", anchor]].concat();
            let output = radapt(&with);
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert_eq!(text(&output.stderr).contains("undefended"), !defended, "{}", text(&output.stderr));
            let json = stdout_json(&[&with[..], &["--json"]].concat());
            assert_eq!(json["answer"].as_str().map(str::trim), Some(text(&output.stdout).trim()), "{anchor}");
            assert_eq!(json["schema_version"], 1);
            assert_eq!(json["contract"], "llava-crop");
            assert_eq!(json["defense"].is_object(), defended);
            assert_eq!(json["tokens"].as_array().map(Vec::len), Some(8));
            assert!(
                json["logprobs"]
                    .as_array()
                    .is_some_and(|l| l.len() == 8 && l.iter().all(|p| p.as_f64().is_some_and(|p| p <= 0.0)))
            );
        }
    }

    #[test]
    fn an_anchor_file_answers_as_the_anchor_it_holds() {
        let root = tempfile::tempdir().expect("a folder");
        let anchor = extract(root.path()).display().to_string();
        let model = path("llava/v4").display().to_string();
        let ask = |anchor: &str| {
            let json = stdout_json(&[
                "chat",
                "--model",
                &model,
                "--image",
                &picture("tall"),
                "--max-tokens",
                "8",
                "--anchor",
                anchor,
                "--json",
                "What is it?",
            ]);
            (json["tokens"].clone(), json["logprobs"].clone())
        };
        assert_eq!(ask(&anchor), ask("training-free"));
        assert_ne!(ask(&anchor), ask("none"));
    }

    #[test]
    fn a_conversation_keeps_its_picture() {
        use std::io::Write;
        use std::process::Stdio;
        let model = path("llava/v4").display().to_string();
        let mut child = Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args([
                "chat",
                "--model",
                &model,
                "--image",
                &picture("wide"),
                "--anchor",
                "none",
                "--max-tokens",
                "8",
                "-q",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command runs");
        let long = "word ".repeat(900);
        let script = format!(
            "What is in the picture?\n/image /no/such/file\n{long}\nWhat is in the picture?\n/reset\nHello\n/quit\n"
        );
        child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("written");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_eq!(text(&output.stdout).lines().count(), 3, "{}", text(&output.stdout));
        let stderr = text(&output.stderr);
        assert!(stderr.contains("/no/such/file") && stderr.contains("greater than 512"), "{stderr}");
    }

    #[test]
    fn more_pictures_than_the_model_takes_are_an_error() {
        let model = path("llava_next/model").display().to_string();
        let output = radapt(&[
            "chat",
            "--model",
            &model,
            "--image",
            &picture("wide"),
            "--image",
            &picture("tall"),
            "-q",
            "What is it?",
        ]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        assert!(
            text(&output.stderr).starts_with("error: pictures: expected at most 1"),
            "{}",
            text(&output.stderr)
        );
        assert!(output.stdout.is_empty());
    }

    #[test]
    fn the_picture_marker_as_text_is_an_error() {
        let model = path("llava/v4").display().to_string();
        fails(
            "marker",
            &["chat", "-q", "--model", &model, "What is <image>?"],
            1,
            "may not contain `<image>`",
        );
    }

    #[test]
    fn broken_input_is_one_clear_line() {
        let root = tempfile::tempdir().expect("a folder");
        let at = |name: &str| root.path().join(name).display().to_string();
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(root.path().join(name), bytes).expect("written");
            at(name)
        };
        let good = path("llava/v4").display().to_string();
        let ask = |what: &str, model: &str, extra: &[&str], code: i32, says: &str| {
            let arguments = [&["chat", "--model", model], extra, &["What is it?"]].concat();
            fails(what, &arguments, code, says);
        };

        // Pictures.
        let jpeg = std::fs::read(path("decode/cut-busy-420.jpg")).expect("the fixture");
        let png = std::fs::read(path("decode/huge-header.png")).expect("the fixture");
        for (what, file, says) in [
            ("truncated jpeg", write("a.jpg", &jpeg), "end-of-image"),
            ("60000 x 60000 png", write("b.png", &png), "pixels"),
            ("text", write("c.png", b"hello"), "not a PNG, JPEG"),
            ("empty", write("d.png", b""), "not a PNG, JPEG"),
            ("missing", at("none.png"), "none.png"),
            ("folder", root.path().display().to_string(), "not a"),
        ] {
            ask(what, &good, &["--image", &file], 1, says);
        }
        ask("bytes", &good, &["--image", &picture("wide"), "--max-image-bytes", "10"], 1, "bytes");
        ask("pixels", &good, &["--image", &picture("wide"), "--max-pixels", "10"], 1, "pixels");

        // Models.
        let broken = |name: &str, change: &dyn Fn(&Path)| model(root.path(), name, change);
        let weights = |f: &Path| f.join("model.safetensors");
        let rename = |name: &'static str| {
            move |f: &Path| {
                edit_header(&f.join("model.safetensors"), |h| {
                    let tensor = h.as_object_mut().expect("an object").remove(name).expect("the weight");
                    h["renamed"] = tensor;
                })
            }
        };
        let config = |change: fn(&mut Value)| move |f: &Path| edit_json(&f.join("config.json"), change);
        let cases: Vec<(&str, String, &str)> = vec![
            (
                "tower weight",
                broken("tower", &rename("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight")),
                "encoder.layers.1.mlp.fc1.weight",
            ),
            (
                "language weight",
                broken("language", &rename("language_model.model.layers.0.mlp.up_proj.weight")),
                "up_proj",
            ),
            (
                "projector weight",
                broken("projector", &rename("multi_modal_projector.linear_1.weight")),
                "linear_1",
            ),
            (
                "no tower",
                broken("no-tower", &rename("vision_tower.vision_model.embeddings.class_embedding")),
                "class_embedding",
            ),
            (
                "weight shape",
                broken("shape", &config(|c| c["vision_config"]["intermediate_size"] = json!(96))),
                "shape",
            ),
            ("truncated weights", broken("cut", &|f| truncate(&weights(f), 5000)), "safetensors"),
            (
                "no weights",
                broken("bare", &|f| std::fs::remove_file(weights(f)).expect("removed")),
                "model.safetensors",
            ),
            (
                "no config",
                broken("no-config", &|f| std::fs::remove_file(f.join("config.json")).expect("removed")),
                "config.json",
            ),
            (
                "config is no JSON",
                broken("no-json", &|f| std::fs::write(f.join("config.json"), "{").expect("written")),
                "config.json",
            ),
            ("model type", broken("type", &config(|c| c["model_type"] = json!("llama"))), "model_type"),
            (
                "tower type",
                broken(
                    "siglip",
                    &config(|c| c["vision_config"]["model_type"] = json!("siglip_vision_model")),
                ),
                "siglip",
            ),
            (
                "activation",
                broken("act", &config(|c| c["vision_config"]["hidden_act"] = json!("relu"))),
                "hidden_act",
            ),
            (
                "heads",
                broken("heads", &config(|c| c["vision_config"]["num_attention_heads"] = json!(5))),
                "num_attention_heads",
            ),
            (
                "feature layer",
                broken("layer", &config(|c| c["vision_feature_layer"] = json!(-9))),
                "vision_feature_layer",
            ),
            (
                "layers without end",
                broken("endless", &config(|c| c["text_config"]["num_hidden_layers"] = json!(1u64 << 40))),
                "num_hidden_layers",
            ),
            (
                "more layers than weights",
                broken("deep", &config(|c| c["text_config"]["num_hidden_layers"] = json!(9_000_000))),
                "layers.2.input_layernorm",
            ),
            (
                "scaled rope",
                broken(
                    "rope",
                    &config(|c| c["text_config"]["rope_scaling"] = json!({"type": "linear", "factor": 2.0})),
                ),
                "rope_scaling",
            ),
            (
                "text model",
                broken("gemma", &config(|c| c["text_config"]["model_type"] = json!("gemma"))),
                "text_config.model_type",
            ),
            (
                "preprocessor",
                broken("pre", &|f| {
                    edit_json(&f.join("preprocessor_config.json"), |c| c["size"] = json!("big"))
                }),
                "preprocessor_config.json",
            ),
            (
                "other picture size",
                broken("size", &|f| {
                    edit_json(&f.join("preprocessor_config.json"), |c| {
                        c["size"] = json!({"shortest_edge": 28});
                        c["crop_size"] = json!({"height": 28, "width": 28});
                    })
                }),
                "28x28",
            ),
            (
                "no tokenizer",
                broken("tokens", &|f| std::fs::remove_file(f.join("tokenizer.json")).expect("removed")),
                "tokenizer.json",
            ),
            (
                "broken tokenizer",
                broken("tok", &|f| std::fs::write(f.join("tokenizer.json"), "[").expect("written")),
                "tokenizer.json",
            ),
            ("no such folder", "/no/such/model".into(), "no such folder"),
            ("not in the cache", "radapt-test/none".into(), "offline"),
            ("a CLIP", path("clip/v4").display().to_string(), "needs a LLaVA"),
        ];
        for (what, model, says) in &cases {
            ask(what, model, &["--image", &picture("wide")], 1, says);
        }

        // Usage.
        for (what, extra, says) in [
            ("contract", &["--contract", "fisheye"][..], "llava-pad"),
            ("device", &["--device", "tpu"], "--device"),
            ("isq", &["--isq", "q99"], "--isq"),
            ("cutoff", &["--cutoff", "0"], "cutoff"),
            ("alpha", &["--alpha", "nan"], "alpha"),
            ("alpha without an anchor", &["--anchor", "none", "--alpha", "1"], "--alpha"),
            ("cutoff without the filter", &["--no-gif", "--cutoff", "9"], "--no-gif"),
            ("no tokens", &["--max-tokens", "0"], "--max-tokens"),
            ("dtype", &["--dtype", "int3"], "--dtype"),
            ("bf16 on a CPU", &["--dtype", "bf16"], "f32 or f16"),
        ] {
            ask(what, &good, extra, 2, says);
        }
        fails("json without a question", &["chat", "--model", &good, "--json"], 2, "--json");
        fails("no model", &["chat", "--model", "pocket-bus", "What is it?"], 1, "built-in model");
        fails("no command", &["paint"], 2, "paint");
    }
}

#[test]
fn the_attack_step_is_timed_case_by_case() {
    let model = path("clip/v4");
    let model = model.to_str().expect("a name");
    let cases = ["--batch", "1,3", "--repeats", "2", "--json", "--quiet"];
    let json = stdout_json(&[&["bench", "attack", "--model", model, "--defended"], &cases[..]].concat());
    assert_eq!(json["schema_version"], 1);
    let rows = json["rows"].as_array().expect("rows");
    let names: Vec<String> =
        rows.iter().map(|row| format!("{} {} {}", row["batch"], row["dtype"], row["name"])).collect();
    let expected = ["1 f32 forward", "1 f32 step", "1 bf16 verify", "1 bf16 step"];
    let expected = expected.iter().flat_map(|case| [case.to_string(), case.replacen('1', "3", 1)]);
    let mut expected: Vec<String> = expected.collect();
    let mut found: Vec<String> = names.iter().map(|name| name.replace('"', "")).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert!(number("min_ms") > 0.0 && number("min_ms") <= number("median_ms"), "{row}");
        let per_second = number("batch") / number("median_ms") * 1e3;
        assert!((number("images_per_second") / per_second - 1.0).abs() < 1e-6, "{row}");
        assert!(number("gflops") > 0.0 && number("peak_rss_mb") > 1.0, "{row}");
    }
    let output = radapt(&["bench", "attack", "--model", model, "--batch", "1", "--dtype", "f32"]);
    assert!(text(&output.stdout).contains("peak MB"), "{}", text(&output.stdout));
    fails("no such device", &["bench", "attack", "--quiet", "--device", "bogus"], 2, "--device");
    fails("no batch", &["bench", "attack", "--batch", "0"], 2, "batch");
    fails("two at once", &["bench", "attack", "--model", "x", "--shape", "all"], 2, "shape");
    fails("several here", &["bench", "attack", "--here"], 2, "--here");
}

#[test]
fn completions_and_manual_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let said = text(&radapt(&["completions", shell]).stdout).to_string();
        for word in ["anchor", "suspicion", "completions", "--cutoff"] {
            let word = if shell == "fish" { word.trim_start_matches('-') } else { word };
            assert!(said.contains(word), "{shell}: {word}");
        }
    }
    fails("no such shell", &["completions", "tcsh"], 2, "tcsh");
    let folder = tempfile::tempdir().expect("a folder");
    let pages = folder.path().join("man");
    let json = stdout_json(&["man", &pages.display().to_string(), "--json"]);
    let names: Vec<&str> =
        json["pages"].as_array().expect("pages").iter().filter_map(|p| p.as_str()).collect();
    for name in ["radapt.1", "radapt-eval-suspicion.1", "radapt-anchor-train.1"] {
        assert!(names.contains(&name), "{names:?}");
        let page = std::fs::read_to_string(pages.join(name)).expect("a page").replace("\\-", "-");
        assert!(page.contains(".SH SYNOPSIS") && page.contains("--seed"), "{page}");
    }
    fails("a file", &["man", "Cargo.toml"], 2, "FOLDER");
}
