//! `radapt eval sweep`, and several anchors in one run of `radapt eval classify`.

use std::path::Path;
use std::process::{Command, Output};

use radapt::eval::Row;
use serde_json::Value;

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_radapt"));
    command
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env_remove("RUST_BACKTRACE")
        .env("HF_HUB_OFFLINE", "1");
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn sweep<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["eval", "sweep", "--json", "--n", "6", "--steps", "2", "--eps", "8/255"];
    if !more.contains(&"--attack") {
        all.extend(["--attack", "pgd"]);
    }
    all.extend(["--out", out.to_str().unwrap()]);
    all.extend(more);
    all
}

fn rows(document: &Value) -> Vec<Row> {
    serde_json::from_value(document["rows"].clone()).unwrap()
}

/// Clean, transfer and adaptive right of the defence called `name`.
fn right(rows: &[Row], name: &str) -> Vec<usize> {
    let own: Vec<usize> = rows.iter().filter(|row| row.defense == name).map(|row| row.correct).collect();
    assert_eq!(own.len(), 3, "{name}");
    own
}

#[test]
fn settings_of_an_anchor_are_swept_and_scored_as_classify_does() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s");
    let more = ["--alphas", "0.4,1.2", "--cutoffs", "10,17.142857142857142"];
    let document = json(&run(&sweep(&out, &more)));
    assert_eq!(document["schema_version"], 1);
    // Along alpha beta follows, by the paper's rule; along the cutoff both are the anchor's.
    let names: Vec<&str> =
        document["points"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "alpha 0.4, beta 0.6, cutoff 17.142857142857142",
            "alpha 1.2, beta 0, cutoff 17.142857142857142",
            "alpha 1.2, beta -0.8, cutoff 10",
            "alpha 1.2, beta -0.8, cutoff 17.142857142857142",
        ]
    );
    let found = rows(&document);
    assert_eq!(found.len(), 3 * (names.len() + 1));
    assert!(found.iter().all(|row| row.n == 6));
    // As `eval classify` has it.
    let classify = folder.path().join("c");
    let alone = json(&run(&[
        "eval",
        "classify",
        "--json",
        "--n",
        "6",
        "--attack",
        "pgd",
        "--steps",
        "2",
        "--eps",
        "8/255",
        "--alpha",
        "0.4",
        "--beta",
        "0.6",
        "--out",
        classify.to_str().unwrap(),
    ]));
    assert_eq!(right(&found, names[0]), right(&rows(&alone), "gif+fra"));
    assert_eq!(right(&found, "none"), right(&rows(&alone), "none"));
    for file in ["sweep.json", "sweep.csv", "sweep.md", "alpha-pgd-8of255.svg", "cutoff-pgd-8of255.svg"] {
        let text = std::fs::read_to_string(out.join(file)).unwrap();
        assert!(text.contains("transfer") && text.contains("adaptive"), "{file} names its threat models");
    }
    let csv = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 3 * (names.len() + 1));
    // It is there already; going on with it changes nothing.
    let again = run(&sweep(&out, &more));
    assert_eq!(again.status.code(), Some(1));
    let resumed: Vec<&str> = more.into_iter().chain(["--resume"]).collect();
    assert_eq!(json(&run(&sweep(&out, &resumed))), document);
}

#[test]
fn a_grid_has_every_combination_and_several_attacks_their_own_lines() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s");
    let more =
        ["--alphas", "0.4,0.8", "--cutoffs", "10,20", "--beta", "0.1", "--grid", "--attack", "pgd,square"];
    let more: Vec<&str> = more.into_iter().chain(["--queries", "5"]).collect();
    let document = json(&run(&sweep(&out, &more)));
    let points = document["points"].as_array().unwrap();
    assert_eq!(points.len(), 4);
    assert!(points.iter().all(|point| point["point"]["beta"] == 0.1), "beta was given");
    let csv = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
    // Clean, two attacks and the worst of them, under both threats; five models.
    assert_eq!(csv.lines().count(), 1 + 5 * (1 + 2 * 3));
    assert!(csv.lines().all(|line| line.ends_with(char::is_numeric) || line.ends_with("high")), "{csv}");
    let plot = std::fs::read_to_string(out.join("alpha-square-8of255.svg")).unwrap();
    assert_eq!(plot.matches("<circle").count(), 2 * 3);
    // One part alone.
    let gif = folder.path().join("g");
    let alone = json(&run(&sweep(&gif, &["--cutoffs", "10,20", "--no-fra"])));
    assert_eq!(alone["points"].as_array().unwrap().len(), 2);
}

#[test]
fn every_setting_is_trained_on_shared_pictures_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s");
    let more = [
        "--pictures",
        "10,20",
        "--epochs",
        "1,2",
        "--resume",
        "--",
        "--n",
        "30",
        "--held-out",
        "4",
        "--batch",
        "10",
        "--steps",
        "2",
    ];
    let document = json(&run(&sweep(&out, &more)));
    let names: Vec<&str> =
        document["points"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 4, "two numbers of pictures for 10 epochs, two numbers of epochs of 30");
    assert!(names[0].ends_with("pictures 10, epochs 10") && names[3].ends_with("pictures 30, epochs 2"));
    let anchors = out.join("anchors");
    let written = |ending: &str| {
        let files = std::fs::read_dir(&anchors).unwrap();
        files.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().ends_with(ending)).count()
    };
    assert_eq!(written(".safetensors"), 4);
    // 30 pictures are crafted once for both numbers of epochs.
    assert!(out.join("pictures-30/crafted.u8").exists());
    // An anchor that is lost is made again, the same.
    let lost = std::fs::read_dir(&anchors).unwrap().map(|file| file.unwrap().path());
    let lost =
        lost.into_iter().find(|path| path.to_string_lossy().ends_with("epochs-1.safetensors")).unwrap();
    let bytes = std::fs::read(&lost).unwrap();
    std::fs::remove_file(&lost).unwrap();
    std::fs::remove_dir_all(lost.with_extension("safetensors.training")).unwrap();
    assert_eq!(json(&run(&sweep(&out, &more))), document);
    assert_eq!(std::fs::read(&lost).unwrap(), bytes);
}

#[test]
fn sweeps_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("s");
    for (more, part) in [
        (&[][..], "--alphas"),
        (&["--cutoffs", "0"], "--cutoff"),
        (&["--pictures", "0"], "--pictures"),
        (&["--alphas", "1", "--anchor", "none"], "--anchor"),
        (&["--epochs", "1", "--anchor", "pocket-white"], "--anchor"),
        (&["--alphas", "1", "--", "--out", "x"], "--out"),
        (&["--alphas", "1", "--", "--dtype", "bf16"], "--dtype"),
        (&["--alphas", "1", "--", "--data", "pocket"], "--data"),
        (&["--epochs", "1", "--alpha", "0.5"], "--alpha"),
        (&["--epochs", "1", "--restarts", "5"], "--restarts"),
        (&["--alphas", "1", "--", "--rates", "1"], "--rates"),
        (&["--alphas", "1", "--shard", "1/2"], "--shard"),
    ] {
        let refused = run(&sweep(&out, more));
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{more:?}: {text}");
        assert!(text.contains(part), "{more:?}: {text}");
    }
    assert!(!out.join("run").exists());
}

#[test]
fn several_anchors_are_scored_on_the_same_transfer_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let white = folder.path().join("mine.safetensors");
    let extracted = run(&[
        "anchor",
        "extract",
        "--model",
        "pocket-clip",
        "--out",
        white.to_str().unwrap(),
        "--beta",
        "0",
    ]);
    assert!(extracted.status.success());
    let out = folder.path().join("c");
    let flags =
        ["eval", "classify", "--json", "--n", "6", "--attack", "pgd", "--steps", "2", "--eps", "8/255"];
    let also = format!("{},pocket-white,gif:9", white.display());
    let all = |also: &str, out: &Path| {
        let mut all = flags.to_vec();
        all.extend(["--also", also, "--out", out.to_str().unwrap()]);
        run(&all)
    };
    let document = json(&all(&also, &out));
    let found = rows(&document);
    // The built-in anchor is the training-free one, alone and beside it.
    assert_eq!(right(&found, "pocket-white"), right(&found, "gif+fra"));
    assert_eq!(right(&found, "mine").len(), 3);
    let gif = folder.path().join("g");
    let mut alone = flags.to_vec();
    alone.extend(["--anchor", "none", "--cutoff", "9", "--out", gif.to_str().unwrap()]);
    assert_eq!(right(&found, "gif:9"), right(&rows(&json(&run(&alone))), "gif"));
    let twice = all(&format!("{0},{0}", white.display()), &folder.path().join("d"));
    assert_eq!(twice.status.code(), Some(2));
}
