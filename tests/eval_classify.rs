//! `radapt eval classify` and `radapt attack`: runs that are killed, split and merged, and what
//! their folders hold.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use radapt::eval::{Precision, Row, Summary};
use serde_json::Value;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_radapt"));
    command
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env_remove("RUST_BACKTRACE")
        .env("HF_HUB_OFFLINE", "1");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn done(output: &Output) -> &Output {
    assert!(output.status.success(), "{}", text(&output.stderr));
    output
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn read(folder: &Path, file: &str) -> String {
    std::fs::read_to_string(folder.join(file)).unwrap()
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A small run that has everything in it: two attacks, one of them a suite with a state, both
/// threats, two models.
const SMALL: [&str; 14] = [
    "eval",
    "classify",
    "--n",
    "9",
    "--attack",
    "pgd,custom:apgd-ce+square",
    "--eps",
    "8/255",
    "--steps",
    "3",
    "--queries",
    "10",
    "--batch",
    "2",
];

fn small(out: &Path, more: &[&str]) -> Vec<String> {
    let out = ["--out", name(out)];
    SMALL.iter().chain(&out).chain(more).map(ToString::to_string).collect()
}

fn spawn(arguments: &[String]) -> Child {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn whole(arguments: &[String]) -> Output {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(&arguments)
}

#[test]
fn a_run_that_is_killed_ten_times_ends_like_one_that_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (straight, killed) = (folder.path().join("straight"), folder.path().join("killed"));
    let start = std::time::Instant::now();
    done(&whole(&small(&straight, &[])));
    let length = start.elapsed();
    let mut kills = 0;
    let mut grew = 0;
    for attempt in 0..10u32 {
        let before = std::fs::metadata(killed.join("items.jsonl")).map_or(0, |file| file.len());
        let mut child = spawn(&small(&killed, &["--resume"]));
        // At places of all kinds: some before the first item, some long after.
        std::thread::sleep(length * (attempt * 7 % 10 + 1) / 14 + Duration::from_millis(3));
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
        let after = std::fs::metadata(killed.join("items.jsonl")).map_or(0, |file| file.len());
        grew += usize::from(after > before);
    }
    assert!(kills > 0 && grew > 0, "{kills} kills, {grew} of the attempts got on");
    done(&whole(&small(&killed, &["--resume"])));
    for file in ["items.jsonl", "run.json", "summary.json"] {
        assert_eq!(read(&killed, file), read(&straight, file), "{file}");
    }
    assert!(!killed.join("state").exists(), "what was kept of unfinished batches");
}

#[test]
fn three_shards_merged_are_the_whole_run_and_the_batch_does_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let whole_run = folder.path().join("whole");
    done(&whole(&small(&whole_run, &[])));
    let shards: Vec<PathBuf> = (1..=3).map(|i| folder.path().join(format!("shard-{i}"))).collect();
    for (i, shard) in shards.iter().enumerate() {
        let of = format!("{}/3", i + 1);
        let mut arguments = small(shard, &["--shard", &of]);
        let at = arguments.iter().position(|argument| argument == "--batch").unwrap() + 1;
        arguments[at] = "5".into();
        done(&whole(&arguments));
    }
    let merged = folder.path().join("merged");
    let mut arguments = vec!["eval", "merge", "--out", name(&merged)];
    arguments.extend(shards.iter().map(|shard| name(shard)));
    done(&run(&arguments));
    for file in ["items.jsonl", "run.json", "summary.json"] {
        assert_eq!(read(&merged, file), read(&whole_run, file), "{file}");
    }
    // One shard alone is not the run.
    let output = run(&["eval", "merge", "--out", name(&folder.path().join("no")), name(&shards[0])]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("expected all 3 shards"), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
}

#[test]
fn another_run_in_the_same_folder_is_refused_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    done(&whole(&small(&out, &[])));
    let before = read(&out, "items.jsonl");
    for (more, says) in [
        (vec![], "it exists already"),
        (vec!["--resume", "--seed", "1"], "seed was 0, is 1"),
        (vec!["--resume", "--cutoff", "9"], "this is another run"),
    ] {
        let output = whole(&small(&out, &more));
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains(says), "{}", text(&output.stderr));
        assert!(output.stdout.is_empty());
        assert_eq!(read(&out, "items.jsonl"), before);
    }
}

fn row<'a>(rows: &'a [Row], defense: &str, attack: Option<&str>, threat: Option<&str>) -> &'a Row {
    let matches = |row: &&Row| {
        row.defense == defense
            && row.attacked.as_ref().map(|a| a.attack.as_str()) == attack
            && row.attacked.as_ref().map(|a| a.threat.to_string()).as_deref() == threat
    };
    rows.iter().find(matches).unwrap_or_else(|| panic!("no row {defense} {attack:?} {threat:?}"))
}

#[test]
fn figures_follow_from_the_items_and_the_worst_is_no_better_than_any() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let arguments = ["--ablate", "--quantise", "--save-pictures", "--json"];
    let output = whole(&small(&out, &arguments));
    let printed: Value = serde_json::from_slice(&done(&output).stdout).unwrap();
    let summary = Summary::read(&out).unwrap();
    assert_eq!(printed, serde_json::to_value(&summary).unwrap());
    assert_eq!((summary.items, summary.done, summary.failed), (9, 9, 0));
    let rows = &summary.rows;
    let suite = "custom:apgd-ce+square";
    let worst = format!("worst of pgd, {suite}");
    for defense in ["none", "gif", "fra", "gif+fra"] {
        let clean = row(rows, defense, None, None);
        assert_eq!(clean.n, 9);
        for threat in ["transfer", "adaptive"] {
            let [pgd, suite, worst] =
                ["pgd", suite, &worst].map(|attack| row(rows, defense, Some(attack), Some(threat)));
            assert!(pgd.correct <= clean.correct && suite.correct <= clean.correct);
            assert!(worst.correct <= pgd.correct.min(suite.correct));
            let attacked = pgd.attacked.as_ref().unwrap();
            assert_eq!(attacked.pictures, Precision::EightBit);
        }
    }
    // On the undefended model both threats are the same pictures.
    let of = |threat| row(rows, "none", Some("pgd"), Some(threat)).correct;
    assert_eq!(of("transfer"), of("adaptive"));
    // By hand, from the lines.
    let lines: Vec<Value> =
        read(&out, "items.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let robust = lines.iter().filter(|line| {
        line["attacked"].as_array().unwrap().iter().any(|item| {
            item["attack"] == "pgd"
                && item["threat"] == "adaptive"
                && item["defense"] == "gif+fra"
                && item["class_8bit"] == line["label"]
        })
    });
    assert_eq!(robust.count(), row(rows, "gif+fra", Some("pgd"), Some("adaptive")).correct);
    let mut checked = 0;
    for line in &lines {
        for item in line["attacked"].as_array().unwrap() {
            assert!(item["linf"].as_f64().unwrap() <= 8.0 / 255.0 + 1e-6);
            assert!(item["threat"] == "adaptive" || item["surrogate"].is_string());
            if item["threat"] != "adaptive" || item["attack"] != "pgd" {
                continue;
            }
            // The file holds the picture that was scored.
            let defense = item["defense"].as_str().unwrap();
            let file =
                format!("pictures/pgd/8of255/crafted-on-{defense}/{}.png", line["id"].as_str().unwrap());
            let found = image::open(out.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}")).to_rgb8();
            let index = line["index"].as_u64().unwrap();
            let clean =
                radapt::pocket::draw(radapt::pocket::Split::Test, 0, index, found.width()).unwrap().picture;
            let far = found.iter().zip(clean.iter()).map(|(a, b)| a.abs_diff(*b)).max();
            assert!((1..=8).contains(&far.unwrap()), "{file}: {far:?}");
            checked += 1;
        }
    }
    assert!(checked > 9);
}

#[test]
fn an_item_that_cannot_be_read_is_counted_and_does_not_end_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for (class, scene) in [("apple", 0), ("boat", 1)] {
        let of = data.join(class);
        std::fs::create_dir_all(&of).unwrap();
        let picture = radapt::pocket::draw(radapt::pocket::Split::Test, 0, scene, 96).unwrap().picture;
        picture.save(of.join("0.png")).unwrap();
    }
    std::fs::write(data.join("apple/broken.jpg"), b"not a picture").unwrap();
    let out = folder.path().join("run");
    let output = run(&["eval", "classify", "--data", name(&data), "--out", name(&out), "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let summary: Summary = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((summary.items, summary.done, summary.failed), (3, 3, 1));
    assert!(summary.rows.iter().all(|row| row.n == 2));
    assert!(text(&output.stderr).contains("1 of 3 items could not be scored"));
    let lines = read(&out, "items.jsonl");
    let broken: Value =
        serde_json::from_str(lines.lines().find(|line| line.contains("broken")).unwrap()).unwrap();
    assert!(broken["error"].as_str().unwrap().contains("apple/broken.jpg"), "{broken}");
}

#[test]
fn attack_writes_pictures_and_says_what_they_were_crafted_on() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let output = run(&[
        "attack",
        "pgd",
        "--threat",
        "transfer",
        "--eps",
        "8/255",
        "--steps",
        "2",
        "--n",
        "3",
        "--out",
        name(&out),
    ]);
    let table = text(&done(&output).stdout);
    let robust: Vec<&str> = table.lines().filter(|line| line.contains(" pgd ")).collect();
    assert!(robust.len() == 1 && robust[0].contains("transfer") && robust[0].contains("gif+fra"), "{table}");
    assert!(out.join("pictures/pgd/8of255/crafted-on-surrogate").is_dir());
    for (arguments, code, says) in [
        (vec!["attack", "pgd", "--out", "x"], 2, "--threat"),
        (vec!["attack", "pdg", "--threat", "adaptive", "--out", "x"], 2, "attack: expected pgd, pgd-csr"),
        (vec!["attack", "square", "--steps", "3", "--threat", "adaptive", "--out", "x"], 2, "--steps"),
        (vec!["eval", "classify", "--attack", "pgd", "--early-stop", "--out", "x"], 2, "--early-stop"),
        (vec!["eval", "classify", "--attack", "pgd,pgd", "--out", "x"], 2, "each attack and eps once"),
        (vec!["eval", "classify", "--data", "nowhere", "--out", "x"], 1, "nowhere"),
        (vec!["eval", "classify", "--template", "a photo", "--out", "x"], 2, "--template"),
        (vec!["eval", "classify", "--shard", "4/3", "--out", "x"], 2, "I/N"),
        (
            vec!["eval", "classify", "--n", "2", "--native-size", "--contract", "llava-pad", "--out", "x"],
            2,
            "a resize and a crop",
        ),
    ] {
        let output = command(&arguments).current_dir(folder.path()).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty() && !folder.path().join("x").exists(), "{arguments:?}");
    }
}

#[test]
fn an_attack_without_a_radius_is_run_once_and_pocket_is_a_surrogate() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let attack = ["--attack", "cw-l2", "--eps", "2/255,4/255", "--steps", "1", "--threat", "transfer"];
    let mut arguments = vec!["eval", "classify", "--n", "2", "--surrogate", "pocket", "--out", name(&out)];
    arguments.extend(attack);
    done(&run(&arguments));
    let rows = Summary::read(&out).unwrap().rows;
    let attacked: Vec<&Row> = rows.iter().filter(|row| row.attacked.is_some()).collect();
    assert_eq!(attacked.len(), 2, "{rows:?}");
    assert!(attacked.iter().all(|row| row.attacked.as_ref().unwrap().eps.is_none()));
}
