//! CAP and VQA: figures from responses, runs that are killed, shards, missing pictures, and the binary
//! on the pocket models.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::RgbImage;
use radapt::Result;
use radapt::attack::Subject;
use radapt::data::coco300::ObjectSet;
use radapt::eval::coco::{
    Asked, CocoLine, CocoRun, CocoSummary, CraftedSet, Source, Speaker, Spoken, figures, summarise,
};
use radapt::eval::judge::Verdict;
use radapt::eval::run::{Line, Manifest, Run, lines, merge};
use radapt::eval::{Row, prompts};
use radapt::image::DecodeLimits;
use radapt::pocket::{Split, draw};
use serde_json::{Value, json};

const N: u64 = 6;
const SIZE: u32 = 96;

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt")).args(arguments).output().unwrap()
}

#[track_caller]
fn json_of(arguments: &[&str]) -> Value {
    let output = radapt(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// V-Attack's pictures on the pocket CLIP: two radii, one threat.
fn crafted(threat: &str, out: &Path) {
    #[rustfmt::skip]
    json_of(&[
        "attack", "v-attack", "--n", &N.to_string(), "--threat", threat, "--eps", "8/255,16/255",
        "--steps", "2", "--out", text(out), "--json", "-q",
    ]);
}

/// Names the object of the clean pictures, and of the others something else. The third picture it says
/// nothing of, and the fourth it always knows.
struct Parrot {
    scenes: Vec<(RgbImage, String)>,
    robust: bool,
    asked: usize,
}

impl Parrot {
    fn new(robust: bool, asked: usize) -> Self {
        let scenes = (0..N).map(|i| draw(Split::Test, 0, i, SIZE).unwrap());
        let scenes = scenes.map(|scene| (scene.picture.clone(), scene.name().to_string())).collect();
        Self { scenes, robust, asked }
    }
}

/// The scene a picture is of, changed or not.
fn nearest(scenes: &[(RgbImage, String)], picture: &RgbImage) -> usize {
    let apart = |scene: &RgbImage| -> u64 {
        scene.iter().zip(picture.iter()).map(|(a, b)| u64::from(a.abs_diff(*b))).sum()
    };
    (0..scenes.len()).min_by_key(|i| apart(&scenes[*i].0)).unwrap()
}

impl Speaker for Parrot {
    fn answers(&self, asked: &[Asked<'_>]) -> Result<Vec<std::result::Result<String, String>>> {
        assert!(asked.len() <= self.asked, "{} at once", asked.len());
        let answer = |asked: &Asked<'_>| {
            let i = nearest(&self.scenes, asked.picture);
            let (clean, object) = &self.scenes[i];
            match i {
                2 => Err("it says nothing".to_string()),
                _ if clean == asked.picture || self.robust || i == 3 => Ok(format!("A {object}.")),
                _ => Ok("A spaceship.".to_string()),
            }
        };
        Ok(asked.iter().map(answer).collect())
    }
}

fn models() -> Vec<Spoken> {
    let named = |defense: &str, subject| Spoken { defense: defense.into(), subject };
    let subject = Subject { model: "pocket".into(), defense: Some("words".into()), digest: Some("x".into()) };
    vec![named("none", Subject::undefended("pocket")), named("gif", subject)]
}

struct Ground {
    set: ObjectSet,
    crafted: Vec<CraftedSet>,
}

impl Ground {
    fn run(&self) -> CocoRun<'_> {
        let references = self.set.rows().iter().map(|row| (row.image.clone(), vec![row.description.clone()]));
        CocoRun {
            set: &self.set,
            source: Source::Pocket { split: Split::Test, seed: 0, size: SIZE },
            limits: DecodeLimits::default(),
            models: models(),
            crafted: self.crafted.clone(),
            caption: prompts::caption("v-attack").unwrap(),
            question: prompts::question("v-attack").unwrap(),
            references: references.collect(),
            batch: 2,
            seed: 0,
        }
    }
}

fn go(coco: &CocoRun, folder: &Path, shard: Option<(usize, usize)>, loads: &mut usize) -> CocoSummary {
    let manifest = Manifest::new(coco.decides(json!({})), shard, coco.items(shard));
    let mut run = Run::open(folder, manifest, true).unwrap();
    let mut load = |i: usize| -> Result<Box<dyn Speaker>> {
        *loads += 1;
        Ok(Box::new(Parrot::new(i == 1, 8)))
    };
    coco.run(&mut run, &mut load, None, &mut |_| {}).unwrap()
}

fn row<'a>(rows: &'a [Row], task: &str, defense: &str, eps: Option<&str>) -> &'a Row {
    let eps_of = |row: &Row| row.attacked.as_ref().and_then(|a| a.eps).map(|eps| eps.to_string());
    let found: Vec<&Row> = rows
        .iter()
        .filter(|r| r.task == task && r.defense == defense && eps_of(r).as_deref() == eps)
        .collect();
    assert_eq!(found.len(), 1, "{task} {defense} {eps:?}");
    found[0]
}

#[test]
fn figures_follow_from_the_responses_whatever_becomes_of_the_run() {
    let files = tempfile::tempdir().unwrap();
    let attack = files.path().join("attack");
    crafted("transfer", &attack);
    let crafted = CraftedSet::read(&attack).unwrap();
    assert_eq!(crafted.len(), 2);
    let ground = Ground { set: ObjectSet::pocket(Split::Test, 0, N).unwrap(), crafted };
    let coco = ground.run();
    // Two models, clean and two radii, six pictures.
    assert_eq!(coco.items(None), 36);
    let whole = files.path().join("whole");
    let mut loads = 0;
    let summary = go(&coco, &whole, None, &mut loads);
    assert_eq!((loads, summary.summary.items, summary.summary.failed), (2, 36, 6));
    let rows = &summary.summary.rows;
    for (defense, right) in [("none", 1), ("gif", 5)] {
        assert_eq!(
            (row(rows, "caption", defense, None).n, row(rows, "caption", defense, None).correct),
            (5, 5)
        );
        assert_eq!((row(rows, "vqa", defense, None).n, row(rows, "vqa", defense, None).correct), (15, 15));
        for eps in ["8/255", "16/255"] {
            let found = row(rows, "caption", defense, Some(eps));
            assert_eq!((found.n, found.correct), (5, right), "{defense} {eps}");
            assert_eq!(row(rows, "vqa", defense, Some(eps)).correct, 3 * right);
            let attacked = found.attacked.as_ref().unwrap();
            assert_eq!(attacked.threat.kind(), radapt::attack::ThreatKind::Transfer);
        }
    }
    for found in &summary.verdicts {
        assert_eq!(found.counts.values().sum::<usize>(), found.n);
        assert_eq!(found.captions.is_some(), found.task == "caption");
    }
    let lines_of =
        |folder: &Path| -> Vec<CocoLine> { lines(folder).unwrap().map(|line| line.unwrap()).collect() };
    let all = lines_of(&whole);
    for line in all.iter().filter(|line| line.error.is_none()) {
        assert_eq!(line.responses.len(), 4, "{}", line.id());
        assert_eq!(line.responses[0].prompt, "Describe the image briefly in one sentence.");
        let right = line.attacked.is_none() || line.defense == "gif" || line.row == 3;
        assert!(line.responses.iter().all(|r| (r.verdict == Verdict::Original) == right));
    }

    // From the lines alone.
    assert_eq!(figures("pocket", &all).unwrap().0, *rows);
    let manifest = Manifest::read(&whole).unwrap();
    let again: Run<CocoLine> = Run::open(&whole, manifest, true).unwrap();
    assert_eq!(summarise(&again, None).unwrap(), summary);
    drop(again);

    // Killed after ten lines and in the middle of one; only what is missing is asked again.
    let kept = std::fs::read_to_string(whole.join("items.jsonl")).unwrap();
    let broken = files.path().join("broken");
    go(&coco, &broken, None, &mut 0);
    let cut: String = kept.split_inclusive('\n').take(20).collect::<String>() + "{\"index\":3,";
    std::fs::write(broken.join("items.jsonl"), cut).unwrap();
    let mut loads = 0;
    assert_eq!(go(&coco, &broken, None, &mut loads), summary);
    assert_eq!((loads, std::fs::read_to_string(broken.join("items.jsonl")).unwrap()), (1, kept));

    // Three shards are the whole.
    let shards: Vec<PathBuf> = (1..=3).map(|i| files.path().join(format!("shard{i}"))).collect();
    for (i, folder) in shards.iter().enumerate() {
        go(&coco, folder, Some((i + 1, 3)), &mut 0);
    }
    let merged = merge::<CocoLine>(&shards, &files.path().join("merged")).unwrap();
    assert_eq!(summarise(&merged, None).unwrap().summary.rows, *rows);
    let mut sorted = all.clone();
    sorted.sort_by_key(Line::index);
    assert_eq!(lines_of(merged.folder()), sorted);

    // Another run's pictures are no part of this one, nor are half of them.
    let mut half = std::fs::read_to_string(attack.join("items.jsonl")).unwrap();
    half = half.split_inclusive('\n').take(2).collect();
    std::fs::write(attack.join("items.jsonl"), half).unwrap();
    let error = CraftedSet::read(&attack).unwrap_err().to_string();
    assert!(error.contains("not complete: 2 of 6"), "{error}");
    let error = CraftedSet::read(&whole).unwrap_err().to_string();
    assert!(error.contains("expected v-attack or features, found `coco`"), "{error}");
}

#[test]
fn adaptive_pictures_are_shown_to_the_model_they_were_made_for_alone() {
    let files = tempfile::tempdir().unwrap();
    let attack = files.path().join("attack");
    crafted("adaptive", &attack);
    let sets = CraftedSet::read(&attack).unwrap();
    let own = sets[0].through.clone().unwrap();
    assert!(sets[0].threat(&Subject::undefended("pocket")).is_none());
    assert_eq!(sets[0].threat(&own), Some(radapt::attack::Threat::Adaptive));
    let other = Subject { digest: Some("another".into()), defense: Some("another".into()), ..own.clone() };
    assert!(sets[0].threat(&other).is_none());
    let ground = Ground { set: ObjectSet::pocket(Split::Test, 0, N).unwrap(), crafted: sets };
    // Neither model has that defence.
    assert_eq!(ground.run().items(None), 12);
}

#[test]
fn pictures_of_labelled_folders_are_found_by_their_names() {
    let files = tempfile::tempdir().unwrap();
    let attack = files.path().join("attack");
    crafted("transfer", &attack);
    let lines = std::fs::read_to_string(attack.join("items.jsonl")).unwrap();
    let ids: Vec<String> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].as_str().unwrap().to_string())
        .collect();
    // As `attack pgd` calls pictures of folders by classes.
    let named = |of: &dyn Fn(usize) -> String| -> Vec<CraftedSet> {
        let mut told = lines.clone();
        for (i, id) in ids.iter().enumerate() {
            told = told.replace(&format!("\"{id}\""), &format!("\"{}\"", of(i)));
        }
        std::fs::write(attack.join("items.jsonl"), told).unwrap();
        CraftedSet::read(&attack).unwrap()
    };
    let sets = named(&|i| format!("class{}/{i}.jpg", i % 2));
    assert_ne!(sets[0].picture("3.jpg").unwrap(), sets[0].picture("2.jpg").unwrap());
    assert_eq!(sets[0].picture("3.jpg").unwrap(), sets[0].picture("class1/3.jpg").unwrap());
    assert!(sets[0].picture("9.jpg").unwrap_err().to_string().contains("found none in"));
    assert!(sets[0].picture("class0/3.jpg").is_err());
    // Two of one name are none of them.
    let sets = named(&|i| format!("class{i}/{}.jpg", i / 2));
    assert!(sets[0].picture("1.jpg").unwrap_err().to_string().contains("found several in"));
    assert!(sets[0].picture("class3/1.jpg").is_ok());
}

#[test]
fn the_released_files_run_and_missing_pictures_are_no_failures() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/coco");
    if !shared.is_dir() {
        println!("SKIPPED: {} is not there", shared.display());
        return;
    }
    let set = ObjectSet::open(&shared).unwrap();
    let located = set.locate(&shared.join("v-attack"));
    let found = located.paths.iter().flatten().count();
    assert_eq!(found, 4);
    let ground = Ground { set, crafted: Vec::new() };
    let coco = CocoRun { source: Source::Files(located.paths), references: HashMap::new(), ..ground.run() };
    struct Silent;
    impl Speaker for Silent {
        fn answers(&self, asked: &[Asked<'_>]) -> Result<Vec<std::result::Result<String, String>>> {
            Ok(asked.iter().map(|_| Ok("Nothing at all.".to_string())).collect())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let manifest = Manifest::new(coco.decides(json!({})), None, coco.items(None));
    let mut run = Run::open(folder.path(), manifest, false).unwrap();
    let summary = coco.run(&mut run, &mut |_| Ok(Box::new(Silent)), None, &mut |_| {}).unwrap();
    assert_eq!((summary.summary.items, summary.summary.failed), (8, 0));
    assert_eq!(summary.missing.len(), 296);
    assert!(summary.summary.flags.iter().any(|flag| flag.contains("keyword-as-question")));
    assert!(summary.summary.rows.iter().all(|row| row.correct == 0));
}

#[cfg(feature = "engine")]
#[test]
fn the_pocket_model_is_asked_through_the_binary() {
    let files = tempfile::tempdir().unwrap();
    let attack = files.path().join("attack");
    crafted("transfer", &attack);
    let own = files.path().join("adaptive");
    crafted("adaptive", &own);
    let out = files.path().join("run");
    let both = format!("{},{}", text(&attack), text(&own));
    #[rustfmt::skip]
    let arguments = [
        "eval", "coco", "--n", &N.to_string(), "--crafted", &both, "--out", text(&out), "--json", "-q",
    ];
    let found = json_of(&arguments);
    // Clean twice, transfer at two radii twice, adaptive at two for the defended model; two tasks each.
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 16);
    let clean: Vec<&Value> = rows.iter().filter(|row| row["threat"].is_null()).collect();
    assert_eq!(clean.len(), 4);
    assert!(clean.iter().all(|row| row["value"].as_f64().unwrap() > 60.0), "{clean:?}");
    assert_eq!(rows.iter().filter(|row| row["threat"] == "adaptive").count(), 4);
    assert_eq!((&found["failed"], &found["schema_version"]), (&json!(0), &json!(1)));
    let again = radapt(&arguments);
    assert_eq!(again.status.code(), Some(1), "a run is not overwritten");
    let missing = radapt(&["eval", "coco", "--crafted", text(&own), "--anchor", "none", "--out", "x"]);
    let stderr = String::from_utf8_lossy(&missing.stderr);
    assert!(stderr.contains("--crafted") && missing.status.code() == Some(2), "{stderr}");
}

#[cfg(feature = "engine")]
#[test]
fn the_released_pictures_go_through_the_whole_pipeline() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/coco");
    if !shared.is_dir() {
        println!("SKIPPED: {} is not there", shared.display());
        return;
    }
    let files = tempfile::tempdir().unwrap();
    let (attack, out) = (files.path().join("attack"), files.path().join("run"));
    let pictures = shared.join("v-attack");
    #[rustfmt::skip]
    let made = json_of(&[
        "attack", "v-attack", "--data", text(&shared), "--pictures", text(&pictures), "--threat", "transfer",
        "--eps", "16/255", "--steps", "2", "--out", text(&attack), "--json", "-q",
    ]);
    assert_eq!((&made["items"], &made["failed"]), (&json!(4), &json!(0)));
    // A LLaVA of random weights: the way of a picture is tested, not what is said of it.
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llava/v5");
    #[rustfmt::skip]
    let found = json_of(&[
        "eval", "coco", "--model", model, "--data", text(&shared), "--pictures", text(&pictures), "--crafted",
        text(&attack), "--anchor", "training-free", "--out", text(&out), "--json", "-q",
    ]);
    // Four pictures, two models, clean and attacked; four responses each.
    assert_eq!((&found["items"], &found["failed"]), (&json!(16), &json!(0)));
    assert_eq!(found["missing"].as_array().unwrap().len(), 296);
    let counted: u64 = found["rows"].as_array().unwrap().iter().map(|row| row["n"].as_u64().unwrap()).sum();
    assert_eq!(counted, 64);
    let lines = std::fs::read_to_string(out.join("items.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 16);
}
