//! Anchors on the towers of Qwen-VL: at every grid, trained at one and at several sizes, and through
//! the binary.

mod fixture;

use std::path::Path;
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use fixture::{assert_same, difference, path, values};
use radapt::Error;
use radapt::attack::{Direction, Eps, Feature, FeatureObjective, Maximise, Pgd, Pictures, Settings, Subject};
use radapt::data::{LabelledSet, OpenOptions};
use radapt::defense::acquire::{interpolate, interpolate_vjp, training_free};
use radapt::defense::{Anchor, AnchorChoice, DefenseOptions, default_cutoff};
use radapt::image::{DecodeLimits, Preprocess};
use radapt::model::{Lookup, Model};
use radapt::tower::qwen::{Qwen, QwenAt};
use radapt::tower::{Cotangent, VisionTower, Want, Wrt};
use radapt::train::{Examples, Goal, Optimizer, Plan, Resolution, Trained, Training, TrainingSet};
use serde_json::{Value, json};

const FAMILIES: [&str; 3] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"];

fn folder(family: &str) -> String {
    path(&format!("qwen/{family}")).to_str().unwrap().into()
}

fn load(family: &str) -> (Model, Preprocess, Qwen) {
    let model = Model::find(&folder(family), &Lookup::default()).unwrap();
    let preprocess = model.preprocess(None).unwrap();
    let tower = model.qwen(&preprocess, None, &Device::Cpu).unwrap();
    (model, preprocess, tower)
}

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt")).args(arguments).output().unwrap()
}

#[track_caller]
fn json_of(arguments: &[&str]) -> Value {
    let output = radapt(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn fails(arguments: &[&str], parts: &[&str]) {
    let output = radapt(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(output.stdout.is_empty());
    for part in parts {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
}

#[test]
fn interpolation_and_its_transpose_agree() {
    let random = |n: usize, seed: f64| {
        let values: Vec<f32> = (0..n * 3).map(|i| ((i as f64 * 12.9898 + seed).sin() * 7.0) as f32).collect();
        Tensor::from_vec(values, (n, 3), &Device::Cpu).unwrap()
    };
    let dot = |a: &Tensor, b: &Tensor| -> f64 { values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum() };
    for (from, to) in [((4, 6), (10, 2)), ((7, 3), (2, 2)), ((2, 2), (9, 5)), ((5, 5), (5, 5))] {
        let (a, g) = (random(from.0 * from.1, 1.0), random(to.0 * to.1, 2.0));
        let there = dot(&interpolate(&a, false, from, to).unwrap(), &g);
        let back = dot(&a, &interpolate_vjp(&g, from, to).unwrap());
        assert!((there - back).abs() < 1e-4 * there.abs().max(1.0), "{from:?} {to:?}: {there} {back}");
    }
    assert!(matches!(interpolate_vjp(&random(5, 0.0), (2, 2), (2, 2)), Err(Error::Argument { .. })));
}

#[test]
fn a_training_free_anchor_is_made_anew_at_every_grid() {
    for family in FAMILIES {
        let (model, _, tower) = load(family);
        let defense = DefenseOptions::default().for_grids(&tower, || model.fingerprint()).unwrap();
        for (rows, columns) in [(6, 10), (14, 6), (2, 2)] {
            let at = tower.at(rows * 4, columns * 4).unwrap();
            let found = defense.at((rows, columns)).unwrap();
            let fra = found.fra.unwrap();
            assert_same("anchor", fra.anchor(), &training_free(&at).unwrap());
            assert_eq!((fra.alpha(), fra.beta()), (1.2, -0.8));
            let side = 4 * rows.min(columns);
            assert_eq!(found.gif.unwrap().cutoff(), default_cutoff(side));
        }
        let summary = defense.summary().unwrap();
        assert_eq!((summary.cutoff, summary.alpha), (Some(40.0), Some(1.2)));
        let error = defense.at((3, 2)).err().unwrap().to_string();
        assert!(error.contains("multiples of"), "{error}");
        let none = DefenseOptions { anchor: AnchorChoice::None, ..Default::default() };
        assert!(none.for_grids(&tower, || model.fingerprint()).unwrap().summary().is_none());
    }
}

#[test]
fn a_stored_anchor_is_interpolated_and_checked() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("a.safetensors");
    let name = file.to_str().unwrap();
    let model_name = folder("qwen3_vl");
    let made =
        json_of(&["anchor", "extract", "--model", &model_name, "--size", "24x40", "--out", name, "--json"]);
    assert_eq!((&made["radapt.grid"], &made["radapt.contract"]), (&json!("6x10"), &json!("qwen")));
    assert_eq!((&made["radapt.image_size"], &made["radapt.class_token"]), (&json!("24"), &json!("false")));
    let (model, _, tower) = load("qwen3_vl");
    let anchor = Anchor::load(&file).unwrap();
    let options = DefenseOptions { anchor: AnchorChoice::File(file.clone()), ..Default::default() };
    let defense = options.for_grids(&tower, || model.fingerprint()).unwrap();
    let own = defense.at((6, 10)).unwrap();
    assert_same("its own grid", own.fra.unwrap().anchor(), &anchor.values);
    assert_eq!(own.gif.unwrap().cutoff(), anchor.meta.cutoff);
    let other = defense.at((14, 6)).unwrap();
    let want = interpolate(&anchor.values, false, (6, 10), (14, 6)).unwrap();
    assert_same("another grid", other.fra.unwrap().anchor(), &want);
    // A window's worth of bins is the same share of them.
    assert_eq!(defense.at((112, 112)).unwrap().gif.unwrap().cutoff(), anchor.meta.cutoff * 224.0 / 24.0);

    let checked = json_of(&["anchor", "check", name, "--model", &model_name, "--json"]);
    assert_eq!(checked["fits"], true);
    for family in ["qwen2_vl", "qwen2_5_vl"] {
        let other = folder(family);
        let output = radapt(&["anchor", "check", name, "--model", &other, "--json"]);
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.success(), &found["fits"]), (false, &json!(false)));
        assert!(found["reason"].as_str().unwrap().contains("fingerprint"), "{found}");
        let (model, _, tower) = load(family);
        assert!(matches!(
            options.for_grids(&tower, || model.fingerprint()),
            Err(Error::AnchorMismatch { .. })
        ));
        let lenient = DefenseOptions { allow_mismatch: true, ..options.clone() };
        lenient.for_grids(&tower, || model.fingerprint()).unwrap();
    }
    fails(
        &["anchor", "extract", "--model", &model_name, "--size", "25x40", "--out", name],
        &["multiples of 8"],
    );
    fails(&["anchor", "extract", "--model", "pocket", "--size", "96", "--out", name], &["--size"]);
    fails(
        &["anchor", "export", name, "--to", "transformers", "--out", files.path().to_str().unwrap()],
        &["qwen"],
    );
    let contract = ["anchor", "extract", "--model", &model_name, "--contract", "clip", "--out", name];
    fails(&contract, &["contract", "qwen"]);
}

/// A training of two sizes on a handful of pictures.
struct Ground {
    places: Vec<(QwenAt, Preprocess)>,
    set: LabelledSet,
}

impl Ground {
    fn new(family: &str, sizes: &[(usize, usize)]) -> Self {
        let (_, preprocess, tower) = load(family);
        let place =
            |&(h, w): &(usize, usize)| (tower.at(h, w).unwrap(), preprocess.fixed(h as u32, w as u32));
        let set = LabelledSet::open(&path("training/pictures"), &OpenOptions::default()).unwrap();
        Self { places: sizes.iter().map(place).collect(), set }
    }

    fn training(&self, plan: Plan) -> Training<'_, QwenAt> {
        let at =
            |i: usize| Resolution { tower: &self.places[i].0, craft: None, preprocess: &self.places[i].1 };
        Training {
            plan,
            tower: &self.places[0].0,
            craft: None,
            model: "tiny".into(),
            goal: Goal::Embedding { feature: Feature::Merged },
            initial: training_free(&self.places[0].0).unwrap(),
            data: TrainingSet {
                set: &self.set,
                held_out: None,
                limits: DecodeLimits::default(),
                preprocess: &self.places[0].1,
            },
            save_every: 1,
            pictures: None,
            others: (1..self.places.len()).map(at).collect(),
        }
    }
}

fn plan(examples: Examples) -> Plan {
    Plan {
        eps: Eps::of_255(16),
        settings: Settings { steps: Some(2), ..Settings::default() },
        examples,
        batch: 8,
        epochs: 6,
        optimizer: Optimizer::Adam { rate: 0.02 },
        ..Plan::paper(5.0)
    }
}

fn run(training: &Training<QwenAt>, folder: &Path) -> Trained {
    training.run(folder, training.decides(json!({})).unwrap(), true, &mut |_| {}).unwrap()
}

#[test]
fn training_at_one_and_at_two_sizes_lowers_the_loss_and_resumes_to_the_same_bytes() {
    for (family, sizes, examples) in [
        ("qwen2_vl", vec![(24, 24)], Examples::Static),
        ("qwen2_5_vl", vec![(24, 40)], Examples::Adaptive),
        ("qwen3_vl", vec![(24, 24), (16, 40)], Examples::Static),
    ] {
        let ground = Ground::new(family, &sizes);
        let training = ground.training(plan(examples));
        let whole = tempfile::tempdir().unwrap();
        let trained = run(&training, whole.path());
        let epoch = |i: usize| -> f64 {
            let losses = trained.steps.iter().filter(|step| step.epoch == i).map(|step| step.loss);
            losses.clone().sum::<f64>() / losses.count() as f64
        };
        assert!(epoch(6) < 0.9 * epoch(1), "{family}: {} to {}", epoch(1), epoch(6));
        assert_eq!(trained.anchor.dims(), [sizes[0].0 * sizes[0].1 / 16, 24]);

        // Stopped in the middle by an error, and gone on with.
        let broken = tempfile::tempdir().unwrap();
        let mut left = 9;
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            training.run(broken.path(), training.decides(json!({})).unwrap(), true, &mut |done| {
                if done.loss.is_some() {
                    left -= 1;
                    assert!(left > 0, "stopped here on purpose");
                }
            })
        }));
        assert!(stopped.is_err());
        let resumed = run(&training, broken.path());
        assert_same("resumed", &resumed.anchor, &trained.anchor);
    }
}

#[test]
fn the_gradient_of_a_step_at_another_size_is_that_of_the_anchor() {
    let (_, _, tower) = load("qwen3_vl");
    let at = tower.at(16, 40).unwrap();
    let values_of = |tensor: &Tensor| values(tensor);
    let anchor = training_free(&tower.at(24, 24).unwrap()).unwrap();
    let pixels = Tensor::rand(0f32, 1f32, (2, 3, 16, 40), &Device::Cpu).unwrap();
    let given = Tensor::rand(-1f32, 1f32, (2, 10, 20), &Device::Cpu).unwrap();
    let loss = |anchor: &Tensor, tape: bool| {
        use radapt::tower::Insertable;
        let there = interpolate(anchor, false, (6, 6), (4, 10)).unwrap();
        let fra = radapt::defense::Fra::new(&there, 0.8, 0.2, &Device::Cpu).unwrap();
        let inserts = radapt::tower::Inserts { input: None, attention: Some(std::sync::Arc::new(fra)) };
        let tower = at.with(inserts);
        let (features, kept) = tower.forward_tape(&pixels, &Want::merged()).unwrap();
        let merged = features.merged.unwrap();
        let sum: f64 = values_of(&merged).iter().zip(values_of(&given)).map(|(a, b)| a * b).sum();
        let gradient = tape.then(|| {
            let cotangent = Cotangent { merged: Some(given.clone()), ..Default::default() };
            let wrt = Wrt { pixels: false, anchor: true };
            let found = tower.vjp(&kept, &cotangent, wrt).unwrap().anchor.unwrap();
            interpolate_vjp(&found, (6, 6), (4, 10)).unwrap()
        });
        (sum, gradient)
    };
    let gradient = loss(&anchor, true).1.unwrap();
    let direction = Tensor::rand(-1f32, 1f32, anchor.dims(), &Device::Cpu).unwrap();
    let step = 1e-3;
    let moved = |sign: f64| loss(&(&anchor + (&direction * (sign * step)).unwrap()).unwrap(), false).0;
    let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
    let along: f64 = values(&gradient).iter().zip(values(&direction)).map(|(a, b)| a * b).sum();
    assert!((slope - along).abs() < 5e-3 * along.abs().max(1.0), "{slope} against {along}");
}

#[test]
fn pgd_moves_what_the_language_model_reads() {
    for family in FAMILIES {
        let (_, _, tower) = load(family);
        let at = tower.at(24, 40).unwrap();
        let clean = Tensor::rand(0f32, 1f32, (2, 3, 24, 40), &Device::Cpu).unwrap();
        let want = Feature::Merged.of(&at, &clean).unwrap();
        let tokens = at.spec().merged_tokens().unwrap();
        assert_eq!(want.dims(), [2, tokens, 20]);
        let objective =
            FeatureObjective::new(&at, Subject::undefended("tiny"), Feature::Merged, Direction::Away, &want)
                .unwrap();
        let pictures = Pictures::new(&clean, vec![1, 2]).unwrap();
        let found = Pgd::new(Eps::of_255(8)).maximise(&objective, &pictures, 0, &mut |_| {}).unwrap();
        let moved = (found.pixels() - &clean).unwrap().abs().unwrap().max_all().unwrap();
        assert!(moved.to_scalar::<f32>().unwrap() <= 8.0 / 255.0 + 1e-6);
        let apart = difference(&Feature::Merged.of(&at, found.pixels()).unwrap(), &want);
        let noise = Tensor::rand(-8f32 / 255.0, 8f32 / 255.0, clean.dims(), &Device::Cpu).unwrap();
        let noisy = (&clean + noise).unwrap().clamp(0f32, 1f32).unwrap();
        let random = difference(&Feature::Merged.of(&at, &noisy).unwrap(), &want);
        assert!(apart > 1.5 * random, "{family}: {apart} against {random}");
        assert_eq!(want.dtype(), DType::F32);
    }
}

#[test]
fn an_anchor_is_trained_and_checked_through_the_binary_at_a_grid_it_has_not_seen() {
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("plus.safetensors");
    let (name, model) = (file.to_str().unwrap(), folder("qwen3_vl"));
    #[rustfmt::skip]
    let train = [
        "anchor", "train", "--model", &model, "--objective", "embedding", "--size", "24x40,32",
        "--validation-size", "40x24", "--n", "16", "--held-out", "4", "--validate", "4", "--epochs", "3",
        "--batch", "8", "--steps", "2", "--eps", "16/255", "--rate", "0.05", "--out", name, "--json", "-q",
    ];
    let made = json_of(&train);
    assert_eq!(made["radapt.grid"], "6x10");
    assert_eq!(
        (&made["radapt.objective"], &made["radapt.sizes"]),
        (&json!("embedding"), &json!("24x40,32x32"))
    );
    let rows = made["rows"].as_array().unwrap();
    // Three sizes, three defences, clean and two threats each.
    assert_eq!(rows.len(), 27);
    for row in rows {
        assert_eq!(row["attack"].is_null(), row["threat"].is_null(), "{row}");
        assert_eq!(row["trained_at"], json!(row["size"] != "40x24"), "{row}");
    }
    assert_eq!(json_of(&["anchor", "check", name, "--model", &model, "--json"])["fits"], true);
    // The same bytes again.
    let again = files.path().join("again.safetensors");
    let mut second = train;
    second[train.len() - 3] = again.to_str().unwrap();
    json_of(&second);
    assert_eq!(std::fs::read(&file).unwrap(), std::fs::read(&again).unwrap());
    fails(&["anchor", "train", "--model", &model, "--size", "24", "--out", name], &["--objective"]);
}

#[test]
fn pictures_are_attacked_through_the_binary_and_a_kill_costs_nothing() {
    let runs = tempfile::tempdir().unwrap();
    let at = |name: &str| runs.path().join(name).to_str().unwrap().to_string();
    let llava = path("llava/v4").to_str().unwrap().to_string();
    let pictures = path("training/pictures").to_str().unwrap().to_string();
    for (name, model, size) in [
        ("qwen2", folder("qwen2_vl"), Some("24x40")),
        ("qwen3", folder("qwen3_vl"), Some("24x40")),
        ("llava", llava, None),
    ] {
        let mut values = Vec::new();
        for threat in ["transfer", "adaptive"] {
            let out = at(&format!("{name}-{threat}"));
            #[rustfmt::skip]
            let mut arguments = vec![
                "attack", "pgd", "--model", &model, "--data", &pictures, "--n", "6", "--eps", "8/255,16/255",
                "--threat", threat, "--steps", "4", "--batch", "4", "--out", &out, "--json", "-q",
            ];
            arguments.extend(size.iter().flat_map(|size| ["--size", size]));
            let found = json_of(&arguments);
            let rows = found["rows"].as_array().unwrap();
            assert_eq!((rows.len(), &found["failed"]), (2, &json!(0)));
            for row in rows {
                assert_eq!(
                    (&row["threat"], &row["n"], &row["pictures"]),
                    (&json!(threat), &json!(6), &json!("8-bit"))
                );
            }
            let value = |i: usize| rows[i]["value"].as_f64().unwrap();
            assert!(value(1) < value(0) && value(0) < 1.0, "{name} {threat}: {rows:?}");
            values.push(value(1));
            let on = if threat == "transfer" { "none" } else { "gif+fra" };
            let files = Path::new(&out).join(format!("pictures/pgd/16of255/crafted-on-{on}"));
            let pngs = walk(&files);
            assert_eq!(pngs.len(), 6);
            let lines = std::fs::read_to_string(Path::new(&out).join("items.jsonl")).unwrap();
            for line in lines.lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                for moved in line["attacked"].as_array().unwrap() {
                    let eps = if moved["eps"] == "8/255" { 8.0 } else { 16.0 };
                    assert!(moved["linf"].as_f64().unwrap() <= eps / 255.0 + 1e-6);
                }
            }
            // Lines lost in a kill are made again, to the same bytes.
            let file = Path::new(&out).join("items.jsonl");
            let kept: String = lines.split_inclusive('\n').take(4).collect();
            std::fs::write(&file, kept + "{\"index\":").unwrap();
            arguments.push("--resume");
            assert_eq!(json_of(&arguments), found);
            assert_eq!(std::fs::read_to_string(&file).unwrap(), lines);
        }
        assert!(values[1] < values[0], "{name}: who has the gradients moves more, {values:?}");
    }
    let out = at("refused");
    let model = folder("qwen3_vl");
    let refused = ["attack", "apgd-ce", "--model", &model, "--threat", "transfer", "--out", &out];
    fails(&refused, &["pgd"]);
    let mut refused = vec!["attack", "pgd", "--model", &model, "--threat", "transfer", "--out", &out];
    refused.extend(["--early-stop"]);
    fails(&refused, &["--early-stop"]);
    let clip = path("clip/v4").to_str().unwrap().to_string();
    fails(
        &["attack", "pgd", "--model", &clip, "--size", "24", "--threat", "transfer", "--out", &out],
        &["--size"],
    );
}

fn walk(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { all.extend(walk(&path)) } else { all.push(path) }
    }
    all
}
