//! The shipped pocket models: small enough, as good as their cards say, alike in their tower, and
//! the default of the command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use radapt::defense::{AnchorChoice, DefenseOptions, built_in};
use radapt::model::{Lookup, Model, ModelKind};
use radapt::pocket::Split;
use radapt::pocket::score::{ZeroShot, zero_shot};
#[cfg(feature = "engine")]
use radapt::pocket::{KINDS, draw};
use serde_json::Value;

fn model(name: &str) -> Model {
    Model::find(name, &Lookup { offline: true, ..Lookup::default() }).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs the binary where there is no network to be had and no model named.
fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap()
}

#[test]
fn both_models_together_weigh_at_most_12_mb() {
    let weights = ["clip", "llava"].map(|name| root().join("pocket").join(name).join("model.safetensors"));
    let bytes: u64 = weights.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
    println!("{bytes} bytes");
    assert!(bytes <= 12_000_000, "{bytes}");
}

#[test]
fn the_clip_names_held_out_pictures_and_keeps_to_it_without_its_first_attention() {
    let white =
        DefenseOptions { alpha: Some(1.2), beta: Some(0.0), no_gif: true, ..DefenseOptions::default() };
    let what = ZeroShot {
        n: 520,
        split: Split::Test,
        seed: 0,
        defenses: vec![("fra".into(), white)],
        eps: vec![],
        steps: 0,
    };
    let rows = zero_shot(&model("pocket-clip"), &what, &mut |_, _| ()).unwrap();
    println!("{:.1} % undefended, {:.1} % with the plain white anchor", rows[0].value(), rows[1].value());
    assert!(rows[0].value() >= 95.0);
    assert!(rows[1].value() >= rows[0].value() - 5.0);
    assert!(rows.iter().all(|row| row.attacked.is_none()));
}

#[test]
fn under_pgd_the_undefended_model_falls_and_every_figure_names_its_threat() {
    let what = ZeroShot {
        n: 16,
        split: Split::Test,
        seed: 3,
        defenses: vec![("gif+fra".into(), DefenseOptions::default())],
        eps: vec!["8/255".parse().unwrap()],
        steps: 10,
    };
    let rows = zero_shot(&model("pocket-clip"), &what, &mut |_, _| ()).unwrap();
    let shown: Vec<_> = rows
        .iter()
        .map(|row| (row.defense.as_str(), row.attacked.as_ref().map(|a| a.threat.to_string()), row.correct))
        .collect();
    let threats: Vec<_> = shown.iter().map(|(defense, threat, _)| (*defense, threat.as_deref())).collect();
    assert_eq!(
        threats,
        [
            ("none", None),
            ("gif+fra", None),
            ("none", Some("adaptive")),
            ("gif+fra", Some("transfer")),
            ("gif+fra", Some("adaptive"))
        ]
    );
    assert!(shown[0].2 >= 14 && shown[2].2 <= 2, "{shown:?}");
    // What holds without knowledge of the defence does not hold with it.
    assert!(shown[4].2 <= shown[3].2, "{shown:?}");
    assert!(rows[2..].iter().all(|row| row.correct <= rows[1].correct.max(rows[0].correct)));
}

#[test]
fn the_llava_has_the_clips_tower_and_the_built_in_anchor_fits_both() {
    let (clip, llava) = (model("pocket-clip"), model("pocket"));
    assert_eq!((clip.kind, llava.kind), (ModelKind::Clip, ModelKind::Llava));
    assert_eq!(clip.fingerprint().unwrap(), llava.fingerprint().unwrap());
    let anchor = built_in::anchor("pocket-white").unwrap();
    for model in [&clip, &llava] {
        anchor.check(&model.tower_config().unwrap().spec(), &model.fingerprint().unwrap(), false).unwrap();
        // It is the training-free anchor, bit for bit.
        let tower = model.tower(&model.preprocess(None).unwrap(), None, &candle_core::Device::Cpu).unwrap();
        let white = radapt::defense::acquire::training_free(&tower).unwrap();
        let off = (white - &anchor.values).unwrap().abs().unwrap().max_all().unwrap();
        let off = off.to_scalar::<f32>().unwrap();
        assert!(off < 1e-5, "{off}");
    }
    let choice: AnchorChoice = "pocket-white".parse().unwrap();
    let tower = clip.tower(&clip.preprocess(None).unwrap(), None, &candle_core::Device::Cpu).unwrap();
    let defense = DefenseOptions { anchor: choice, ..DefenseOptions::default() }
        .build(&tower, || clip.fingerprint())
        .unwrap();
    assert_eq!(defense.summary().unwrap().anchor.as_deref(), Some("pocket-white"));
}

#[test]
fn every_built_in_anchor_fits_has_a_card_and_names_the_threats_of_its_figures() {
    let readme = std::fs::read_to_string(root().join("anchors/README.md")).unwrap();
    let models = [model("pocket-clip"), model("pocket")];
    for name in built_in::names() {
        let anchor = built_in::anchor(name).unwrap();
        for model in &models {
            anchor
                .check(&model.tower_config().unwrap().spec(), &model.fingerprint().unwrap(), false)
                .unwrap();
        }
        assert!(readme.contains(&format!("`{name}`")), "{name} has no card");
        let Some((eps, examples)) = name.strip_prefix("pocket-").and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        let training = &anchor.meta.training;
        assert_eq!(training["eps"].as_str(), &*format!("{eps}/255"));
        if examples == "embedding" {
            // Trained by features, whose figures are distances.
            assert_eq!((&*training["objective"], &*training["examples"]), ("embedding", "static"));
            let rows: Vec<Value> = serde_json::from_str(&training["validation"]).unwrap();
            let of = |row: &&Value| row["defense"] == "gif+fra";
            for row in rows.iter().filter(of) {
                assert_eq!(row["attack"].is_null(), row["threat"].is_null(), "{row}");
                assert!(readme.contains(&format!("{:.3}", row["value"].as_f64().unwrap())), "{name}: {row}");
            }
            assert_eq!(rows.iter().filter(of).count(), 3);
            continue;
        }
        assert_eq!(training["examples"].as_str(), examples);
        let rows: Vec<radapt::eval::Row> = serde_json::from_str(&training["validation"]).unwrap();
        assert!(rows.iter().any(|row| row.attacked.is_some()), "{name}");
        // The card is written from these.
        for row in rows.iter().filter(|row| row.defense == "gif+fra") {
            let (low, high) = row.interval();
            let figure = format!("{:.1} ({low:.1} to {high:.1})", row.value());
            assert!(readme.contains(&figure), "{name}: {figure}");
        }
    }
}

#[test]
fn the_shipped_files_are_the_built_in_ones() {
    for (name, folder) in [("pocket-clip", "clip"), ("pocket", "llava")] {
        let unpacked: PathBuf = model(name).folder;
        for entry in std::fs::read_dir(&unpacked).unwrap() {
            let entry = entry.unwrap();
            let shipped = root().join("pocket").join(folder).join(entry.file_name());
            assert_eq!(std::fs::read(entry.path()).unwrap(), std::fs::read(shipped).unwrap());
        }
    }
}

#[test]
fn an_anchor_is_made_and_checked_without_naming_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("white.safetensors");
    let file = file.to_str().unwrap();
    assert!(radapt(&["anchor", "extract", "--out", file]).status.success());
    for anchor in [file, "pocket-white"] {
        let output = radapt(&["anchor", "check", anchor, "--json"]);
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["fits"], true, "{json}");
    }
}

/// The binary alone is enough: an empty home, no network, no files beside it.
#[cfg(feature = "engine")]
#[test]
fn chat_answers_about_held_out_pictures_with_the_default_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut right = 0;
    for index in 0..6 {
        let scene = draw(Split::Test, 11, index, 128).unwrap();
        let picture = folder.path().join("picture.png");
        scene.picture.save(&picture).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args(["chat", "--anchor", "none", "--image", picture.to_str().unwrap(), "What is in the image?"])
            .env_clear()
            .env("HOME", folder.path())
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        right += usize::from(said.contains(KINDS[scene.kind].name));
    }
    assert!(folder.path().join(".cache/radapt").is_dir());
    assert!(right >= 5, "{right} of 6");
}

#[cfg(feature = "engine")]
#[test]
fn the_demo_tells_the_story_with_both_threat_models() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("demo.html");
    let output = radapt(&[
        "demo",
        "--pictures",
        "3",
        "--steps",
        "10",
        "--eps",
        "16/255",
        "--json",
        "--out",
        page.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = json["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 10);
    for row in rows {
        let attacked = !row["attack"].is_null();
        assert_eq!(attacked, matches!(row["threat"].as_str(), Some("transfer" | "adaptive")), "{row}");
        assert_eq!(row["n"], if row["task"] == "caption" { 3 } else { 9 });
        // What is crafted on the CLIP is transfer to the LLaVA, and says so.
        let surrogate = (row["threat"] == "transfer").then_some("pocket-clip");
        assert_eq!(row["surrogate"].as_str(), surrogate, "{row}");
    }
    let clean =
        |row: &&Value| row["task"] == "caption" && row["defense"] == "none" && row["attack"].is_null();
    assert!(rows.iter().find(clean).unwrap()["correct"].as_u64().unwrap() >= 2);
    let html = std::fs::read_to_string(page).unwrap();
    assert!(
        html.contains("transfer") && html.contains("adaptive") && html.contains("data:image/png;base64,")
    );
}

#[cfg(feature = "engine")]
#[test]
fn the_demo_refuses_what_it_cannot_do_before_it_begins() {
    for (arguments, code, says) in [
        (&["demo", "--pictures", "0"][..], 2, "--pictures"),
        (&["demo", "--anchor", "none"][..], 2, "--anchor"),
        (&["demo", "--eps", "300/255"][..], 2, "--eps"),
        (&["demo", "--out", "/nowhere/at/all.html"][..], 1, "/nowhere/at/all.html"),
        (&["demo", "--model", "pocket-clip"][..], 1, "pocket-clip"),
        (&["demo", "--surrogate", "pocket"][..], 1, "`pocket`"),
        (&["demo", "--steps", "0"][..], 2, "--steps"),
    ] {
        let output = radapt(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty());
    }
}
