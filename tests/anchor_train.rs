//! R-Adapt+: the training loop against PyTorch, its examples, and trainings that are killed.
//!
//! Reached on a machine with AVX-512: losses of 52 steps within 8e-7 of PyTorch's, anchors within 1.3e-6.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use candle_core::{DType, Device};
use fixture::{Fixture, assert_close, path, values};
use radapt::attack::{Eps, Feature};
use radapt::data::{LabelledSet, OpenOptions};
use radapt::defense::acquire::training_free;
use radapt::defense::{Anchor, Method};
use radapt::image::{DecodeLimits, Preprocess};
use radapt::model::{Lookup, Model};
use radapt::text::ZeroShotHead;
use radapt::tower::Precision;
use radapt::tower::clip::Clip;
use radapt::train::{
    Examples, Goal, Keep, Optimizer, Plan, Schedule, Trained, Training, TrainingSet, epoch_order,
};
use serde_json::{Value, json};

/// What the fixture was made with.
struct Tiny {
    expected: Fixture,
    tower: Clip,
    preprocess: Preprocess,
    set: LabelledSet,
    head: ZeroShotHead,
}

impl Tiny {
    fn new() -> Self {
        let expected = Fixture::open("training/expected.safetensors");
        let model = Model::find(path("clip/v4").to_str().unwrap(), &Lookup::default()).unwrap();
        let preprocess = model.preprocess(None).unwrap();
        let tower = model.tower(&preprocess, Some(DType::F32), &Device::Cpu).unwrap();
        let set = LabelledSet::open(&path("training/pictures"), &OpenOptions::default()).unwrap();
        let head = ZeroShotHead {
            classes: set.classes().to_vec(),
            weights: expected.tensor("head"),
            logit_scale: 20.0,
        };
        Self { expected, tower, preprocess, set, head }
    }

    fn plan(&self) -> Plan {
        Plan { eps: Eps::of_255(0), batch: 6, epochs: 13, seed: 7, ..Plan::paper(4.0) }
    }

    fn goal(&self) -> Goal<'_> {
        Goal::CrossEntropy { head: &self.head }
    }

    fn training<'a>(
        &'a self,
        plan: Plan,
        goal: Goal<'a>,
        held_out: Option<&'a LabelledSet>,
    ) -> Training<'a, Clip> {
        Training {
            plan,
            tower: &self.tower,
            craft: None,
            model: "tiny".into(),
            goal,
            initial: training_free(&self.tower).unwrap(),
            data: TrainingSet {
                set: &self.set,
                held_out,
                limits: DecodeLimits::default(),
                preprocess: &self.preprocess,
            },
            save_every: 5,
            pictures: None,
            others: Vec::new(),
        }
    }
}

fn run(training: &Training<Clip>, folder: &Path) -> radapt::Result<Trained> {
    training.run(folder, training.decides(json!({}))?, true, &mut |_| {})
}

fn trained(training: &Training<Clip>) -> Trained {
    run(training, tempfile::tempdir().unwrap().path()).unwrap()
}

#[test]
fn the_paper_s_plan_is_its_preset() {
    let (plan, preset) = (Plan::paper(40.0), radapt::defense::presets::find("plus").unwrap());
    assert_eq!((plan.alpha, plan.beta, plan.cutoff), (preset.alpha, preset.beta, preset.cutoff));
    assert_eq!((plan.epochs, plan.eps, plan.examples), (10, Eps::of_255(4), Examples::Static));
}

#[test]
fn the_order_of_an_epoch_is_chacha8_s() {
    let expected = Fixture::open("training/expected.safetensors");
    for epoch in 0..13 {
        let want = values(&expected.tensor(&format!("order.{epoch}").clone()).to_dtype(DType::F64).unwrap());
        let found: Vec<f64> = epoch_order(24, 7, epoch).into_iter().map(|i| i as f64).collect();
        assert_eq!(found, want, "epoch {epoch}");
    }
}

#[test]
fn losses_and_anchors_are_pytorch_s_over_50_steps() {
    let tiny = Tiny::new();
    let start = tiny.expected.tensor("initial");
    assert_close("initial", &training_free(&tiny.tower).unwrap(), &start, 1e-5);
    let sgd = Plan {
        optimizer: Optimizer::Sgd { rate: 0.5, momentum: 0.9 },
        schedule: Schedule::Constant,
        ..tiny.plan()
    };
    let runs = [
        ("adam", tiny.plan(), tiny.goal()),
        ("sgd", sgd, tiny.goal()),
        ("mixed", Plan { clean: 0.5, ..tiny.plan() }, tiny.goal()),
        ("embedding", tiny.plan(), Goal::Embedding { feature: Feature::Embeds }),
    ];
    for (name, plan, goal) in runs {
        let found = trained(&tiny.training(plan, goal, None));
        let want = values(&tiny.expected.tensor(&format!("{name}.losses")));
        assert_eq!(found.steps.len(), 52);
        let apart = found.steps.iter().zip(&want).map(|(step, want)| (step.loss / want - 1.0).abs());
        let worst = apart.fold(0.0, f64::max);
        println!("{name}: losses within {worst:.1e} of PyTorch's");
        // The issue asks for 1e-2.
        assert!(worst < 1e-4, "{name}: {worst}");
        assert!(found.steps[51].loss < 0.8 * found.steps[0].loss, "{name} learns");
        assert_close(name, &found.anchor, &tiny.expected.tensor(&format!("{name}.anchor")), 1e-4);
    }
}

#[test]
fn a_packed_tower_trains_the_same_anchor() {
    let tiny = Tiny::new();
    let plain = trained(&tiny.training(tiny.plan(), tiny.goal(), None));
    let packed = Tiny { tower: tiny.tower.clone().packed(Precision::F32).unwrap(), ..Tiny::new() };
    let found = trained(&packed.training(packed.plan(), packed.goal(), None));
    assert_close("packed", &found.anchor, &plain.anchor, 5e-3);
}

#[test]
fn static_examples_are_8_bit_in_the_ball_and_made_once() {
    let tiny = Tiny::new();
    let eps = Eps::of_255(6);
    let plan = Plan { eps, epochs: 2, ..tiny.plan() };
    let training = tiny.training(plan, tiny.goal(), None);
    let folder = tempfile::tempdir().unwrap();
    run(&training, folder.path()).unwrap();
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let (clean, crafted) = (read("pictures.u8"), read("crafted.u8"));
    assert_eq!(clean.len(), 24 * 3 * 20 * 20);
    let apart: Vec<u8> = clean.iter().zip(&crafted).map(|(a, b)| a.abs_diff(*b)).collect();
    assert_eq!(apart.iter().max(), Some(&6));
    assert_eq!(clean.len(), crafted.len());
    // The first picture is that of the folder, row by row.
    let picture = image::open(path("training/pictures/a/0.png")).unwrap().into_rgb8();
    assert_eq!(&clean[..1200], picture.as_raw().as_slice());
}

#[test]
fn training_helps_against_what_it_is_trained_on_and_a_seed_decides_the_bytes() {
    let tiny = Tiny::new();
    let held_out = tiny.set.clone().sample(12, 3);
    for examples in [Examples::Static, Examples::Adaptive] {
        let plan = Plan { eps: Eps::of_255(4), examples, epochs: 6, ..tiny.plan() };
        let training = tiny.training(plan.clone(), tiny.goal(), Some(&held_out));
        let found = trained(&training);
        let losses: Vec<f64> = found.epochs.iter().map(|e| e.held_out.as_ref().unwrap().loss).collect();
        assert_eq!(losses.len(), 7);
        let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert_eq!(losses[found.epoch], lowest);
        assert!(lowest < 0.8 * losses[0], "{examples}: {losses:?}");
        let bytes = |found: &Trained| values(&found.anchor);
        assert_eq!(bytes(&found), bytes(&trained(&training)), "{examples}");
        let other = tiny.training(Plan { seed: 8, ..plan }, tiny.goal(), Some(&held_out));
        assert_ne!(bytes(&found), bytes(&trained(&other)), "{examples}");
    }
}

#[test]
fn it_stops_early_with_the_best_epoch_s_anchor() {
    let tiny = Tiny::new();
    let held_out = tiny.set.clone().sample(12, 3);
    // Too fast to last.
    let plan = Plan {
        optimizer: Optimizer::Adam { rate: 3.0 },
        schedule: Schedule::Constant,
        patience: Some(2),
        epochs: 30,
        ..tiny.plan()
    };
    let found = trained(&tiny.training(plan.clone(), tiny.goal(), Some(&held_out)));
    assert!(found.stopped);
    assert_eq!(found.epochs.len(), found.epoch + 3, "two epochs without a better one");
    let short = Plan { patience: None, epochs: found.epoch.max(1), ..plan };
    let again = trained(&tiny.training(short, tiny.goal(), Some(&held_out)));
    assert_eq!(values(&found.anchor), values(&again.anchor));
}

#[test]
fn a_training_goes_on_from_every_state() {
    let tiny = Tiny::new();
    let held_out = tiny.set.clone().sample(12, 3);
    for examples in [Examples::Static, Examples::Adaptive] {
        let plan = Plan { eps: Eps::of_255(4), examples, epochs: 3, ..tiny.plan() };
        let mut training = tiny.training(plan, tiny.goal(), Some(&held_out));
        training.save_every = 1;
        let want = trained(&training);
        let folder = tempfile::tempdir().unwrap();
        let decides = training.decides(json!({})).unwrap();
        // Each attempt dies a few reports later than the one before.
        for most in 1.. {
            let reports = std::cell::Cell::new(0);
            let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                training
                    .run(folder.path(), decides.clone(), true, &mut |_| {
                        reports.set(reports.get() + 1);
                        assert!(reports.get() < most, "killed");
                    })
                    .unwrap()
            }));
            let Ok(found) = attempt else { continue };
            assert!(most > 2, "it was killed at least once");
            assert_eq!(values(&found.anchor), values(&want.anchor));
            assert_eq!((found.steps, found.epochs), (want.steps, want.epochs));
            break;
        }
        // Another plan does not go on with it.
        training.plan.batch = 5;
        let error = run(&training, folder.path()).unwrap_err().to_string();
        assert!(error.ends_with("this is another run: plan.batch was 6, is 5"), "{error}");
    }
}

#[test]
fn the_last_epoch_is_kept_where_that_is_asked_for() {
    let tiny = Tiny::new();
    let held_out = tiny.set.clone().sample(12, 3);
    let plan = Plan { optimizer: Optimizer::Adam { rate: 3.0 }, epochs: 3, ..tiny.plan() };
    let last =
        trained(&tiny.training(Plan { keep: Keep::Last, ..plan.clone() }, tiny.goal(), Some(&held_out)));
    let alone = trained(&tiny.training(plan, tiny.goal(), None));
    assert_eq!((last.epoch, alone.epoch), (3, 3));
    assert_eq!(values(&last.anchor), values(&alone.anchor));
}

#[test]
fn shared_pictures_are_crafted_once_and_change_nothing() {
    let tiny = Tiny::new();
    let plan = Plan { eps: Eps::of_255(4), epochs: 2, ..tiny.plan() };
    let alone = trained(&tiny.training(plan.clone(), tiny.goal(), None));
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    let sharing =
        |plan: Plan| Training { pictures: Some(shared.clone()), ..tiny.training(plan, tiny.goal(), None) };
    let found = run(&sharing(plan.clone()), &folder.path().join("a")).unwrap();
    assert_eq!(values(&found.anchor), values(&alone.anchor));
    let written = |name: &str| std::fs::metadata(shared.join(name)).unwrap().modified().unwrap();
    let before = written("crafted.u8");
    // Another learning rate has the same pictures, another radius has not.
    let rate = Plan { optimizer: Optimizer::Adam { rate: 0.1 }, ..plan.clone() };
    run(&sharing(rate), &folder.path().join("b")).unwrap();
    assert_eq!(written("crafted.u8"), before);
    let eps = Plan { eps: Eps::of_255(5), ..plan.clone() };
    let error = run(&sharing(eps), &folder.path().join("c")).unwrap_err().to_string();
    assert!(error.contains("this is another run: plan.crafted.eps was"), "{error}");
    let error = run(&sharing(plan), &shared).unwrap_err().to_string();
    assert!(error.contains("a folder of their own"), "{error}");
}

#[test]
fn pictures_are_split_without_overlap() {
    let tiny = Tiny::new();
    let ids = |set: &LabelledSet| set.items().iter().map(|item| item.id.clone()).collect::<Vec<_>>();
    let (train, held_out) = tiny.set.clone().split(15, 9, 1).unwrap();
    assert_eq!((train.items().len(), held_out.items().len()), (15, 9));
    let mut both: Vec<String> = ids(&train).into_iter().chain(ids(&held_out)).collect();
    both.sort();
    assert_eq!(both, ids(&tiny.set));
    assert_eq!(ids(&train), ids(&tiny.set.clone().split(15, 3, 1).unwrap().0));
    assert_ne!(ids(&train), ids(&tiny.set.clone().split(15, 9, 2).unwrap().0));
    assert!(tiny.set.clone().split(15, 10, 1).is_err());
}

#[test]
fn plans_that_cannot_be_are_refused_before_any_work() {
    let tiny = Tiny::new();
    let refused = |plan: Plan, goal: Goal, part: &str| {
        let folder = tempfile::tempdir().unwrap();
        let error = run(&tiny.training(plan, goal, None), folder.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{part}");
    };
    refused(Plan { clean: 1.0, ..tiny.plan() }, tiny.goal(), "clean share");
    refused(Plan { epochs: 0, ..tiny.plan() }, tiny.goal(), "epochs");
    refused(Plan { batch: 0, ..tiny.plan() }, tiny.goal(), "batch");
    refused(Plan { patience: Some(3), ..tiny.plan() }, tiny.goal(), "held-out");
    refused(Plan { attack: "cw-l2".into(), ..tiny.plan() }, tiny.goal(), "within a ball");
    refused(Plan { attack: "apgd-t".into(), ..tiny.plan() }, tiny.goal(), "3 classes");
    refused(Plan { alpha: f64::NAN, ..tiny.plan() }, tiny.goal(), "alpha");
    refused(Plan { cutoff: 0.0, ..tiny.plan() }, tiny.goal(), "cutoff");
    let rate = Optimizer::Adam { rate: f64::NAN };
    refused(Plan { optimizer: rate, ..tiny.plan() }, tiny.goal(), "learning rate");
    let embedding = Goal::Embedding { feature: Feature::Embeds };
    refused(Plan { attack: "apgd-ce".into(), ..tiny.plan() }, embedding, "pgd");
}

// --- The command -------------------------------------------------------------------------------

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

fn output(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn small<'a>(out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec![
        "anchor",
        "train",
        "--out",
        out.to_str().unwrap(),
        "--n",
        "30",
        "--held-out",
        "10",
        "--validate",
        "12",
        "--epochs",
        "2",
        "--batch",
        "10",
        "--steps",
        "2",
        "--save-every",
        "1",
        "--seed",
        "5",
        "--json",
    ];
    all.extend(more);
    all
}

#[test]
fn killed_and_resumed_it_writes_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    for (i, more) in [
        &["--objective", "embedding", "--rate", "0.003"][..],
        &["--validation-attack", "pgd", "--examples", "adaptive"],
    ]
    .into_iter()
    .enumerate()
    {
        let straight = folder.path().join(format!("straight{i}.safetensors"));
        let killed = folder.path().join(format!("killed{i}.safetensors"));
        let whole = output(&small(&straight, more));
        assert!(whole.status.success(), "{}", text(&whole.stderr));
        let resume: Vec<&str> = more.iter().copied().chain(["--resume"]).collect();
        let mut kills = 0;
        for attempt in 1.. {
            let mut child: Child = command(&small(&killed, &resume))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(60 * attempt));
            if child.try_wait().unwrap().is_some_and(|status| status.success()) {
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
        assert!(kills > 0);
        assert_eq!(std::fs::read(&straight).unwrap(), std::fs::read(&killed).unwrap());
    }
}

#[test]
fn the_anchor_says_how_it_was_made_and_every_figure_its_threat() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.safetensors");
    let done =
        output(&small(&out, &["--validation-attack", "pgd", "--eps", "8/255", "--clean-share", "0.5"]));
    assert!(done.status.success(), "{}", text(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["steps"].as_array().unwrap().len(), 6);
    let anchor = Anchor::load(&out).unwrap();
    assert_eq!(anchor.meta.method, Method::DataDriven);
    assert_eq!((anchor.meta.alpha, anchor.meta.beta), (0.8, 0.2));
    let of = |key: &str| anchor.meta.training.get(key).unwrap_or_else(|| panic!("{key}")).clone();
    assert_eq!(
        [of("eps"), of("images"), of("examples"), of("objective"), of("seed")],
        ["8/255", "30", "static", "ce", "5"]
    );
    let rows: Vec<radapt::eval::Row> = serde_json::from_str(&of("validation")).unwrap();
    // Three models, clean and under both threats.
    assert_eq!(rows.len(), 9);
    assert_eq!(rows.iter().filter(|row| row.attacked.is_none()).count(), 3);
    assert!(rows.iter().all(|row| row.n == 12));
    let raw: Value = serde_json::from_str(&of("validation")).unwrap();
    for row in raw.as_array().unwrap() {
        assert_eq!(row["attack"].is_null(), row["threat"].is_null(), "{row}");
    }
    // It is at home in the CLIP and in the LLaVA that shares its tower.
    for model in ["pocket-clip", "pocket"] {
        let checked = output(&["anchor", "check", out.to_str().unwrap(), "--model", model]);
        assert!(checked.status.success(), "{model}: {}", text(&checked.stderr));
    }
    // It is where another begins.
    let next = folder.path().join("b.safetensors");
    let mut begun = small(&next, &["--initial", out.to_str().unwrap()]);
    let validate = begun.iter().position(|word| *word == "--validate").unwrap();
    begun[validate + 1] = "0";
    let done = output(&begun);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let from = Anchor::load(&next).unwrap().meta.training;
    assert!(from["initial"].contains("a.safetensors") && !from.contains_key("validation"));
    // There is one already.
    let again = output(&small(&out, &[]));
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("--resume"), "{}", text(&again.stderr));
}

#[test]
fn a_tower_without_a_text_side_is_trained_on_its_features() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.safetensors");
    let refused = output(&small(&out, &["--model", path("llava/v5").to_str().unwrap()]));
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("embedding"), "{}", text(&refused.stderr));
    let done = output(&small(&out, &["--objective", "embedding", "--rate", "0.003"]));
    assert!(done.status.success(), "{}", text(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    let value = |defense: &str, threat: Value| {
        let rows = json["rows"].as_array().unwrap();
        let row = rows.iter().find(|row| row["defense"] == defense && row["threat"] == threat);
        row.and_then(|row| row["value"].as_f64()).unwrap_or_else(|| panic!("{defense} {threat}"))
    };
    assert_eq!(value("none", Value::Null), 0.0);
    assert_eq!(value("none", "transfer".into()), value("none", "adaptive".into()));
    assert!(value("gif+fra", "adaptive".into()) > value("gif+fra", Value::Null));
    let losses: Vec<f64> = serde_json::from_value(json["steps"].clone()).unwrap();
    assert!(losses[losses.len() - 1] < losses[0], "{losses:?}");
}

#[test]
fn wrong_flags_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out: PathBuf = folder.path().join("a.safetensors");
    for (more, part) in [
        (&["--attack", "fgsm"][..], "attack"),
        (&["--momentum", "0.9"], "--momentum"),
        (&["--clean-share", "1"], "clean share"),
        (&["--schedule", "linear"], "schedule"),
        (&["--validation-attack", "strong"], "attack"),
        (&["--objective", "embedding", "--validation-attack", "apgd-ce"], "--validation-attack"),
        (&["--patience", "0"], "patience"),
        (&["--cutoff", "0"], "cutoff"),
        (&["--objective", "embedding", "--attack", "apgd-ce"], "pgd"),
    ] {
        let refused = output(&small(&out, more));
        assert_eq!(refused.status.code(), Some(2), "{more:?}: {}", text(&refused.stderr));
        assert!(text(&refused.stderr).contains(part), "{more:?}: {}", text(&refused.stderr));
        assert!(!out.exists());
    }
    let few = path("training/pictures");
    let refused = output(&small(&out, &["--data", few.to_str().unwrap()]));
    assert!(text(&refused.stderr).contains("40 pictures and 12 others"), "{}", text(&refused.stderr));
}
