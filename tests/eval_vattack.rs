//! `radapt attack v-attack` over pocket's scenes, a coco300-like folder and plain pictures.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fixture::path;
use radapt::attack::ThreatKind;
use radapt::eval::run::lines;
use radapt::eval::vattack::{VAttackLine, VAttackRow, VAttackSummary, rows};
use radapt::image::{DecodeLimits, decode_file};
use radapt::model::{Lookup, Model};
use radapt::pocket::{Dataset, Split, draw};
use serde_json::Value;

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["attack", "v-attack", "--quiet"])
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("the command runs")
}

fn works(arguments: &[&str]) -> String {
    let output = radapt(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn fails(arguments: &[&str], code: i32, says: &str) {
    let output = radapt(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(stderr.contains(says), "expected `{says}` in: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn items(run: &Path) -> Vec<VAttackLine> {
    lines(run).unwrap().collect::<radapt::Result<_>>().unwrap()
}

fn summary(run: &Path) -> VAttackSummary {
    serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap()
}

/// Every file below a folder with its bytes, but for what a run keeps for itself.
fn bytes(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => all.push((path.strip_prefix(folder).unwrap().into(), std::fs::read(&path).unwrap())),
            }
        }
    }
    all.sort();
    all
}

#[test]
fn a_run_over_pocket_keeps_to_the_ball_and_resumes_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str| folder.path().join(name);
    let at = |name: &str| run(name).display().to_string();
    for (threat, preset) in [("transfer", "notebook"), ("adaptive", "paper")] {
        let common = ["--threat", threat, "--preset", preset, "--n", "3", "--steps", "3", "--maps"];
        let with = |more: &[&str]| [&common[..], &["--eps", "8/255,16/255"], more].concat().join("\n");
        let call = |more: &[&str]| works(&with(more).split('\n').collect::<Vec<_>>());
        let (whole, parts) = (format!("{threat}-whole"), format!("{threat}-parts"));
        let json: Value = serde_json::from_str(&call(&["--out", &at(&whole), "--json"])).unwrap();
        assert_eq!(json["items"], 3);
        assert_eq!(json["failed"], 0);

        // As if it had been killed after the first picture, and gone on with one at a time.
        call(&["--out", &at(&parts), "--batch", "1"]);
        let file = run(&parts).join("items.jsonl");
        let text = std::fs::read_to_string(&file).unwrap();
        let first = text.find('\n').unwrap();
        std::fs::write(&file, &text[..first + 20]).unwrap();
        std::fs::remove_file(run(&parts).join("summary.json")).unwrap();
        call(&["--out", &at(&parts), "--batch", "1", "--resume"]);
        assert_eq!(bytes(&run(&whole)), bytes(&run(&parts)));
        fails(&with(&["--out", &at(&parts)]).split('\n').collect::<Vec<_>>(), 1, "--resume");

        let model = Model::find("pocket-clip", &Lookup::default()).unwrap();
        let contract = (preset == "notebook").then_some(radapt::image::Contract::Squash);
        let preprocess = model.preprocess(contract).unwrap();
        let found = items(&run(&whole));
        assert_eq!(found.len(), 3);
        for line in &found {
            let size = preprocess.width.clamp(96, 224);
            let scene = draw(Split::Test, 0, line.index as u64, size).unwrap();
            assert_eq!(line.source.to_lowercase(), scene.name());
            let clean = preprocess.prepare(&scene.picture);
            for (attacked, most) in line.attacked.iter().zip([8, 16]) {
                let made =
                    decode_file(&run(&whole).join(&attacked.picture), &DecodeLimits::default()).unwrap();
                let change = made.iter().zip(clean.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
                assert!((1..=most).contains(&change), "{change} of {most}");
                assert_eq!(f32::from(change) / 255.0, (attacked.linf * 255.0).round() / 255.0);
                assert_eq!(attacked.threat.kind().to_string(), threat);
                assert!(attacked.masked > 0.0 && attacked.masked < 1.0);
                assert_eq!(attacked.outcome.gradients, 3);
            }
        }
        let maps = bytes(&run(&whole).join("maps"));
        assert_eq!(maps.len(), 3 * 2 * 2);

        // Figures come from the lines alone.
        let summary = summary(&run(&whole));
        // JSON gives some numbers back with another last bit.
        let again = serde_json::to_string(&rows(&found, "pocket", "gif+fra")).unwrap();
        let again: Vec<VAttackRow> = serde_json::from_str(&again).unwrap();
        assert_eq!(again, summary.rows);
        assert_eq!(summary.rows.len(), 2 + 2 * 2);
        for row in &summary.rows {
            assert_eq!(row.attack == "none", row.threat.is_none());
            let adaptive = row.threat.as_ref().is_some_and(|t| t.kind() == ThreatKind::Adaptive);
            assert_eq!(adaptive, threat == "adaptive" && row.defense == "gif+fra" && row.attack != "none");
        }
    }
}

/// Merges three shards, the second of them killed and resumed, and compares with the whole run: lines,
/// pictures, maps and figures. What `run.json` says is the same too, and of the summary all of it.
fn shards_make_the_whole(folder: &Path, command: &[&str]) {
    let at = |name: &str| folder.join(name).display().to_string();
    let call = |more: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args([command, &["--quiet"], more].concat())
            .env_remove("RADAPT_MODEL")
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{more:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    call(&["--out", &at("whole")]);
    let mut counts = Vec::new();
    for shard in ["1/3", "2/3", "3/3"] {
        let out = at(&shard[..1]);
        let arguments = ["--out", &out, "--shard", shard, "--batch", "1"];
        call(&arguments);
        if shard == "2/3" {
            let file = Path::new(&out).join("items.jsonl");
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, &text[..text.find('\n').unwrap() + 9]).unwrap();
            call(&[&arguments[..], &["--resume"]].concat());
        }
        let lines = std::fs::read_to_string(Path::new(&out).join("items.jsonl")).unwrap().lines().count();
        counts.push(lines);
    }
    assert!(counts.iter().all(|n| *n > 0), "a shard without items tests nothing: {counts:?}");
    let merge = |runs: &[&str], out: &str| {
        let runs: Vec<String> = runs.iter().map(|run| at(run)).collect();
        Command::new(env!("CARGO_BIN_EXE_radapt"))
            .args(["eval", "merge", "--quiet", "--out", &at(out)])
            .args(runs)
            .output()
            .unwrap()
    };
    let merged = merge(&["3", "1", "2"], "merged");
    assert!(merged.status.success(), "{}", String::from_utf8_lossy(&merged.stderr));
    let (whole, merged) = (bytes(&folder.join("whole")), bytes(&folder.join("merged")));
    let names = |all: &[(PathBuf, Vec<u8>)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&whole), names(&merged));
    for ((name, whole), (_, merged)) in whole.iter().zip(&merged) {
        assert!(whole == merged, "{}", name.display());
    }
    let less = merge(&["1", "3"], "less");
    assert!(String::from_utf8_lossy(&less.stderr).contains("2/3"));
}

#[test]
fn three_shards_are_the_whole_run() {
    let folder = tempfile::tempdir().unwrap();
    shards_make_the_whole(
        &folder.path().join("values"),
        &[
            "attack", "v-attack", "--threat", "transfer", "--n", "9", "--steps", "2", "--eps", "8/255",
            "--maps",
        ],
    );
    shards_make_the_whole(
        &folder.path().join("features"),
        &["attack", "pgd", "--model", "pocket", "--threat", "adaptive", "--n", "9", "--steps", "2"],
    );
    shards_make_the_whole(
        &folder.path().join("captions"),
        &["eval", "retrieve", "--n", "9", "--steps", "2", "--eps", "8/255"],
    );
}

#[test]
fn a_set_of_files_is_attacked_where_its_pictures_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let set = folder.path().join("set");
    Dataset { split: Split::Test, seed: 0, start: 0, n: 4, size: 96 }.write(&set, &mut |_| ()).unwrap();
    std::fs::remove_file(set.join("images/000000000002.png")).unwrap();
    let out = |name: &str| folder.path().join(name).display().to_string();
    let data = set.display().to_string();
    let common = ["--threat", "transfer", "--eps", "16/255", "--steps", "1", "--data", &data];
    let output = Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["attack", "v-attack"])
        .args(common)
        .args(["--out", &out("all"), "--surrogates", "pocket-clip,pocket", "--weights", "1,0.5"])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of 4 pictures are missing"));
    let found = items(&folder.path().join("all"));
    assert_eq!(
        found.iter().map(|line| line.id.as_str()).collect::<Vec<_>>(),
        ["000000000000.png", "000000000001.png", "000000000003.png"]
    );
    let manifest = std::fs::read_to_string(folder.path().join("all/run.json")).unwrap();
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["decides"]["surrogates"][1]["weight"], 0.5);

    // One object of the set, towards another target.
    let word = found[1].source.to_lowercase();
    works(&[&common[..], &["--out", &out("one"), "--source", &word, "--target", "zebra"]].concat());
    let one = items(&folder.path().join("one"));
    assert!(one.iter().all(|line| line.source.to_lowercase() == word && line.target == "zebra"));
    assert!(one.iter().any(|line| line.id == found[1].id));

    // A picture that is none is an item that failed.
    std::fs::write(set.join("images/000000000001.png"), b"no picture").unwrap();
    let output = radapt(&[&common[..], &["--out", &out("damaged")]].concat());
    assert_eq!(output.status.code(), Some(1));
    let damaged = items(&folder.path().join("damaged"));
    assert!(damaged[1].error.is_some() && damaged[1].attacked.is_empty() && damaged[0].error.is_none());
}

#[test]
fn plain_pictures_take_their_words_from_the_flags() {
    let folder = tempfile::tempdir().unwrap();
    let scene = draw(Split::Test, 0, 5, 96).unwrap();
    let file = folder.path().join("bear.png");
    scene.picture.save(&file).unwrap();
    let (file, out) = (file.display().to_string(), folder.path().join("run").display().to_string());
    let common = ["--threat", "transfer", "--eps", "16/255", "--steps", "1", "--data", &file, "--out", &out];
    fails(&common, 2, "--source");
    fails(&[&common[..], &["--source", "bear"]].concat(), 2, "--target");
    fails(&[&common[..], &["--source", "bear", "--target", "Bear"]].concat(), 2, "another object");
    works(&[&common[..], &["--source", "bear", "--target", "lion"]].concat());
    let found = items(&folder.path().join("run"));
    assert_eq!((found.len(), found[0].source.as_str(), found[0].target.as_str()), (1, "bear", "lion"));
    assert!(["bear", "lion"].contains(&found[0].attacked[0].class.as_str()));
}

#[test]
fn what_does_not_go_together_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run").display().to_string();
    let call = |threat: &str, more: &[&str], says: &str| {
        fails(&[&["--threat", threat, "--n", "1", "--out", &out][..], more].concat(), 2, says);
    };
    call("adaptive", &["--surrogates", "pocket-clip"], "adaptive");
    call("transfer", &["--surrogates", "pocket-clip", "--weights", "1,2"], "one per surrogate");
    call("transfer", &["--source", "car", "--target", "bus"], "pocket");
    call("transfer", &["--preset", "mine"], "notebook or paper");
    call("transfer", &["--key-block", "1"], "--key-block");
    call("transfer", &["--preset", "notebook", "--key-block", "99"], "block");
    call("transfer", &["--blocks", "99"], "blocks");
    call("transfer", &["--template", "own"], "{class}");
    call("transfer", &["--restarts", "2"], "--restarts");
    call("transfer", &["--size", "224"], "--size");
    let llava = path("llava/v5").display().to_string();
    call("transfer", &["--model", &llava], "radapt attack pgd");
    let other = Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["attack", "pgd", "--threat", "transfer", "--maps", "--out", &out])
        .output()
        .unwrap();
    assert_eq!(other.status.code(), Some(2));
    assert!(!folder.path().join("run").exists());
}
