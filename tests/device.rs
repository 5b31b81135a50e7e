//! The towers, attacks and trainings on another device, against the same on the CPU.
//!
//! Every test runs in two places. One is the first CUDA device, where this is built with
//! `--features cuda` and there is one. The other is the CPU worked on as a device is: by candle's
//! operations alone, in the weights' dtype, many pictures at a time. So the operations that a GPU is
//! given are tested everywhere, if not its kernels.
//!
//! `RADAPT_DEVICE_ONLY=1` leaves the second out and fails where there is no device.

mod fixture;

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use fixture::{Fixture, MEAN, STD, clip_config, difference, path, values};
use radapt::analyze::attention::class_weights;
use radapt::attack::vattack::{Preset, Surrogate, VAttack};
use radapt::attack::{
    Apgd, Attack, Classification, Classifier, Crafted, Cw, Direction, Eps, Fab, Feature, FeatureObjective,
    Loss, Maximise, Mixed, Pgd, Pictures, Resized, Square, Subject, TowerClassifier, key,
};
use radapt::data::{LabelledSet, OpenOptions};
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif};
use radapt::image::{DecodeLimits, Preprocess, pixels_from_rgb};
use radapt::model::{Lookup, Model};
use radapt::pocket::Split;
use radapt::text::ZeroShotHead;
use radapt::tower::clip::Clip;
use radapt::tower::layers::{Attention, Linear, treat_cpu_as_device};
use radapt::tower::qwen::{Qwen, QwenConfig};
use radapt::tower::weights::Checkpoint;
use radapt::tower::{Cotangent, Features, Gradients, GridInserts, Inserts, VisionTower, Want, Wrt};
use radapt::train::{Examples, Goal, Plan, Trained, Training, TrainingSet};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// What f32 on a device may differ by: the largest difference over the largest entry. Products in
/// TF32 would be ten times beyond it.
const F32: f64 = 1e-4;
const EVERYTHING: Wrt = Wrt { pixels: true, anchor: true };

/// Where a test runs.
#[derive(Clone)]
struct Place {
    device: Device,
    /// The CPU in a device's stead.
    stand_in: bool,
}

impl Place {
    /// Runs `f` there.
    fn run<T>(&self, f: impl FnOnce(&Device) -> T) -> T {
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                treat_cpu_as_device(false);
            }
        }
        let _back = self.stand_in.then(|| {
            treat_cpu_as_device(true);
            Back
        });
        f(&self.device)
    }

    fn name(&self) -> &'static str {
        if self.stand_in { "CPU as a device" } else { "CUDA" }
    }

    /// Half precision: bf16, or f16, which is what candle multiplies in on a CPU.
    fn half(&self) -> DType {
        if self.stand_in { DType::F16 } else { DType::BF16 }
    }

    /// What outputs in half precision may differ from f32's by, and the least cosine of gradients.
    /// bf16 has 8 bits where f16 has 11.
    fn half_allowed(&self) -> (f64, f64) {
        if self.stand_in { (1e-2, 0.9995) } else { (8e-2, 0.97) }
    }
}

/// How the CPU is worked on is said for the whole process, so tests take turns.
fn places() -> (Vec<Place>, MutexGuard<'static, ()>) {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let only = std::env::var_os("RADAPT_DEVICE_ONLY").is_some();
    let mut all = Vec::new();
    match Device::new_cuda(0) {
        Ok(device) => all.push(Place { device, stand_in: false }),
        Err(reason) => {
            let reason = reason.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            assert!(!only, "RADAPT_DEVICE_ONLY is set and there is no CUDA device: {reason}");
            // Past the test harness, which would swallow it.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no CUDA device ({reason}); the CPU stands in");
        }
    }
    if !only {
        all.push(Place { device: Device::Cpu, stand_in: true });
    }
    (all, turn)
}

fn host(tensor: &Tensor) -> Tensor {
    tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

fn random(shape: &[usize], seed: u64, low: f32) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (values(&host(a)), values(&host(b)));
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

/// The worst of what was compared in one place.
#[derive(Default)]
struct Worst {
    output: f64,
    gradient: f64,
}

/// Compares what `place` found with what the CPU did.
struct Compare<'a> {
    place: &'a Place,
    dtype: DType,
    worst: Worst,
}

impl<'a> Compare<'a> {
    fn new(place: &'a Place, dtype: DType) -> Self {
        Self { place, dtype, worst: Worst::default() }
    }

    #[track_caller]
    fn output(&mut self, what: &str, found: &Tensor, want: &Tensor) {
        assert_eq!(found.device().is_cpu(), self.place.device.is_cpu(), "{what} stays where it is made");
        let allowed = if self.dtype == DType::F32 { F32 } else { self.place.half_allowed().0 };
        let apart = difference(&host(found), &host(want));
        assert!(apart <= allowed, "{}, {:?}: {what} differs by {apart:.2e}", self.place.name(), self.dtype);
        self.worst.output = self.worst.output.max(apart);
    }

    #[track_caller]
    fn gradient(&mut self, what: &str, found: &Tensor, want: &Tensor) {
        let (apart, allowed) = match self.dtype {
            DType::F32 => (difference(&host(found), &host(want)), F32),
            _ => (1.0 - cosine(found, want), 1.0 - self.place.half_allowed().1),
        };
        assert!(apart <= allowed, "{}, {:?}: {what} differs by {apart:.2e}", self.place.name(), self.dtype);
        self.worst.gradient = self.worst.gradient.max(apart);
    }

    fn features(&mut self, found: &Features, want: &Features) {
        assert_eq!((found.hidden.len(), found.deepstack.len()), (want.hidden.len(), want.deepstack.len()));
        for (block, (found, want)) in found.hidden.iter().zip(&want.hidden).enumerate() {
            self.output(&format!("hidden {block}"), found, want);
        }
        for (i, (found, want)) in found.deepstack.iter().zip(&want.deepstack).enumerate() {
            self.output(&format!("deepstack {i}"), found, want);
        }
        for (what, found, want) in [
            ("pooled", &found.pooled, &want.pooled),
            ("embeds", &found.embeds, &want.embeds),
            ("merged", &found.merged, &want.merged),
        ] {
            assert_eq!(found.is_some(), want.is_some(), "{what}");
            if let (Some(found), Some(want)) = (found, want) {
                self.output(what, found, want);
            }
        }
    }

    fn gradients(&mut self, found: &Gradients, want: &Gradients) {
        for (what, found, want) in
            [("pixels", &found.pixels, &want.pixels), ("anchor", &found.anchor, &want.anchor)]
        {
            let (found, want) = (found.as_ref().unwrap(), want.as_ref().unwrap());
            assert_eq!(found.dtype(), DType::F32, "gradients are f32 whatever the tower is");
            self.gradient(&format!("gradient at the {what}"), found, want);
        }
    }

    fn say(&self, what: &str) {
        let Worst { output, gradient } = self.worst;
        let apart = if self.dtype == DType::F32 { "gradients within" } else { "1 - cosine of gradients" };
        println!(
            "{what}, {} {:?}: outputs within {output:.1e}, {apart} {gradient:.1e}",
            self.place.name(),
            self.dtype
        );
    }
}

/// A cotangent in the dtype and on the device of what it is one of.
fn like(cotangent: &Cotangent, dtype: DType, device: &Device) -> Cotangent {
    let to = |x: &Tensor| x.to_device(device).unwrap().to_dtype(dtype).unwrap();
    let list = |all: &[(usize, Tensor)]| all.iter().map(|(at, x)| (*at, to(x))).collect();
    Cotangent {
        hidden: list(&cotangent.hidden),
        pooled: cotangent.pooled.as_ref().map(to),
        embeds: cotangent.embeds.as_ref().map(to),
        merged: cotangent.merged.as_ref().map(to),
        deepstack: list(&cotangent.deepstack),
    }
}

fn clip_on(folder: &str, dtype: DType, device: &Device) -> Clip {
    let weights = if folder.starts_with("gelu") { "v4" } else { folder };
    let checkpoint = Checkpoint::open(&path(&format!("clip/{weights}"))).unwrap();
    let tower = Clip::load(&checkpoint, &clip_config(folder), MEAN, STD, device).unwrap();
    tower.to_dtype(dtype).unwrap()
}

/// GIF at 5 bins, and `anchor` at 1.2 and -0.8.
fn inserts((height, width): (usize, usize), anchor: &Tensor, device: &Device) -> Inserts {
    Inserts {
        input: Some(Arc::new(Gif::new(height, width, 5.0, device).unwrap())),
        attention: Some(Arc::new(Fra::new(anchor, 1.2, -0.8, device).unwrap())),
    }
}

#[test]
fn clip_s_outputs_and_gradients_are_the_cpu_s() {
    let (places, _turn) = places();
    let pixels = Fixture::open("clip/expected.safetensors").tensor("pixels");
    for folder in ["v4", "gelu", "gelu_tanh"] {
        let run = |dtype: DType, device: &Device, anchor: Option<&Tensor>| {
            let tower = clip_on(folder, dtype, device);
            assert_eq!(tower.device().is_cpu(), device.is_cpu());
            let tower = match anchor {
                Some(anchor) => tower.with(inserts(tower.spec().picture, anchor, device)),
                None => tower,
            };
            let pixels = pixels.to_device(device).unwrap();
            let want = Want::everything(tower.spec());
            let (features, tape) = tower.forward_tape(&pixels, &want).unwrap();
            let shape = features.embeds.as_ref().unwrap().dims().to_vec();
            let hidden = features.hidden[1].dims().to_vec();
            let cotangent = Cotangent {
                embeds: Some(random(&shape, 2, -1.0)),
                hidden: vec![(1, random(&hidden, 3, -1.0))],
                ..Default::default()
            };
            let cotangent = like(&cotangent, features.hidden[1].dtype(), device);
            let wrt = Wrt { pixels: true, anchor: anchor.is_some() };
            let gradients = tower.vjp(&tape, &cotangent, wrt).unwrap();
            (features, gradients)
        };
        let bare = clip_on(folder, DType::F32, &Device::Cpu);
        let anchor = training_free(&bare).unwrap();
        let plain = run(DType::F32, &Device::Cpu, None);
        let defended = run(DType::F32, &Device::Cpu, Some(&anchor));
        for place in &places {
            for dtype in [DType::F32, place.half()] {
                let mut compare = Compare::new(place, dtype);
                place.run(|device| {
                    let found = run(dtype, device, None);
                    assert_eq!(found.0.hidden[1].dtype(), dtype, "activations are in the weights' dtype");
                    compare.features(&found.0, &plain.0);
                    let (found, want) = (found.1.pixels.unwrap(), plain.1.pixels.as_ref().unwrap());
                    compare.gradient("undefended gradient", &found, want);
                    let found = run(dtype, device, Some(&anchor));
                    compare.features(&found.0, &defended.0);
                    compare.gradients(&found.1, &defended.1);
                    let own = training_free(&clip_on(folder, dtype, device)).unwrap();
                    assert!(own.device().is_cpu() && own.dtype() == DType::F32);
                    let allowed = if dtype == DType::F32 { F32 } else { place.half_allowed().0 };
                    assert!(difference(&own, &anchor) <= allowed, "{folder}: the anchor of a white picture");
                    let found = clip_on(folder, DType::F32, device).fingerprint().unwrap();
                    assert_eq!(found, bare.fingerprint().unwrap());
                });
                compare.say(folder);
            }
        }
    }
}

const PICTURES: usize = 3;
const BLOCKS: usize = 4;

fn qwen_on(family: &str, dtype: DType, device: &Device) -> Qwen {
    let file = path(&format!("qwen/{family}/config.json"));
    let config = QwenConfig::parse(&std::fs::read_to_string(&file).unwrap(), &file).unwrap();
    let checkpoint = Checkpoint::open(&path(&format!("qwen/{family}"))).unwrap();
    Qwen::load(&checkpoint, &config, MEAN, STD, device).unwrap().to_dtype(dtype).unwrap()
}

/// Anchors of the CPU's tower, by grid.
struct Defended {
    device: Device,
    patch: usize,
    anchors: HashMap<(usize, usize), Tensor>,
}

impl GridInserts for Defended {
    fn at(&self, grid: (usize, usize)) -> radapt::Result<Inserts> {
        let picture = (grid.0 * self.patch, grid.1 * self.patch);
        Ok(inserts(picture, &self.anchors[&grid], &self.device))
    }
}

#[test]
fn qwen_s_outputs_and_gradients_are_the_cpu_s() {
    let (places, _turn) = places();
    for family in ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] {
        let expected = Fixture::open(&format!("qwen/{family}.safetensors"));
        let pictures: Vec<Tensor> = (0..PICTURES).map(|i| expected.tensor(&format!("picture.{i}"))).collect();
        let bare = qwen_on(family, DType::F32, &Device::Cpu);
        let patch = bare.config().patch;
        let grid = |picture: &Tensor| (picture.dims()[2] / patch, picture.dims()[3] / patch);
        let anchors = pictures.iter().map(|picture| {
            let (rows, columns) = grid(picture);
            let at = bare.at(rows * patch, columns * patch).unwrap();
            ((rows, columns), training_free(&at).unwrap())
        });
        let anchors: HashMap<_, _> = anchors.collect();
        let deepstack = if family == "qwen3_vl" { 2 } else { 0 };
        let cotangent = |i: usize| {
            let of = |name: &str| expected.tensor(&format!("c.{name}"));
            Cotangent {
                merged: Some(of(&format!("merged.{i}"))),
                deepstack: (0..deepstack).map(|j| (j, of(&format!("deepstack.{i}.{j}")))).collect(),
                hidden: vec![(2, of(&format!("hidden.{i}")))],
                ..Default::default()
            }
        };
        let run = |dtype: DType, device: &Device| {
            let tower = qwen_on(family, dtype, device);
            let defended = Defended { device: device.clone(), patch, anchors: anchors.clone() };
            let tower = tower.with_grids(Some(Arc::new(defended)));
            let pictures: Vec<Tensor> = pictures.iter().map(|p| p.to_device(device).unwrap()).collect();
            let want = Want { hidden: (0..=BLOCKS).collect(), pooled: false, merged: true };
            let (features, tape) = tower.forward_tape(&pictures, &want).unwrap();
            let dtype = features[0].hidden[0].dtype();
            let cotangents: Vec<_> = (0..PICTURES).map(|i| like(&cotangent(i), dtype, device)).collect();
            let gradients = tower.vjp(&tape, &cotangents, EVERYTHING).unwrap();
            // Two stills of one size at once, as an attack gives them, and a still as the server does.
            let still = pictures.iter().find(|p| p.dims()[0] == 1).unwrap();
            let (_, _, height, width) = still.dims4().unwrap();
            let at = tower.at(height, width).unwrap();
            let two = Tensor::cat(&[still, &still.flip(&[3]).unwrap()], 0).unwrap();
            let objective = FeatureObjective::new(
                &at,
                Subject::undefended(family),
                Feature::Merged,
                Direction::Toward,
                &Feature::Merged.of(&at, &two.flip(&[2]).unwrap()).unwrap(),
            );
            let climbed = radapt::attack::Objective::values_and_gradient(&objective.unwrap(), &two, &[0, 1]);
            let frames = still.unsqueeze(0).unwrap();
            let patches = tower.patches_of(&frames).unwrap();
            let (rows, columns) = grid(still);
            let merged = tower.encode_patches(&patches, &[[1, rows, columns]]).unwrap();
            (features, gradients, climbed.unwrap(), merged)
        };
        let want = run(DType::F32, &Device::Cpu);
        for place in &places {
            for dtype in [DType::F32, place.half()] {
                let mut compare = Compare::new(place, dtype);
                place.run(|device| {
                    let found = run(dtype, device);
                    for i in 0..PICTURES {
                        compare.features(&found.0[i], &want.0[i]);
                        compare.gradients(&found.1[i], &want.1[i]);
                    }
                    let allowed = if dtype == DType::F32 { 1e-4 } else { 0.02 };
                    for (found, want) in found.2.0.loss.iter().zip(&want.2.0.loss) {
                        assert!((found - want).abs() < allowed, "{family}: cosines {found} and {want}");
                    }
                    compare.gradient("of the features", &found.2.1, &want.2.1);
                    compare.output("encoded patches", &found.3.embeddings, &want.3.embeddings);
                    let found = qwen_on(family, DType::F32, device).fingerprint().unwrap();
                    assert_eq!(found, bare.fingerprint().unwrap());
                });
                compare.say(family);
            }
        }
    }
}

#[test]
fn gif_is_the_cpu_s() {
    let (places, _turn) = places();
    for (height, width, cutoff) in [(9, 7, 2.0), (96, 96, 17.0), (224, 224, 40.0), (336, 224, 40.0)] {
        let pixels = random(&[2, 3, height, width], 5, 0.0);
        let want = Gif::new(height, width, cutoff, &Device::Cpu).unwrap().filter(&pixels).unwrap();
        for place in &places {
            let found = place.run(|device| {
                let gif = Gif::new(height, width, cutoff, device).unwrap();
                gif.filter(&pixels.to_device(device).unwrap()).unwrap()
            });
            // Sums of 336 products: TF32's 11 bits would be far beyond it.
            let apart = difference(&host(&found), &want);
            println!("{height}x{width}, {}: {apart:.1e}", place.name());
            assert!(apart < 1e-5, "{}: {height}x{width} differs by {apart:.1e}", place.name());
        }
    }
}

#[test]
fn more_patches_than_a_device_s_kernels_can_number_are_refused() {
    let (places, _turn) = places();
    for place in places {
        place.run(|device| {
            let one = |seed| Linear::new(random(&[1, 1], seed, 0.5).to_device(device).unwrap(), None);
            let attention = Attention { q: one(1), k: one(2), v: one(3), out: one(4), heads: 1 };
            let x = Tensor::ones((1, 46_341, 1), DType::F32, device).unwrap();
            let refused = attention.forward(&x).unwrap_err().to_string();
            assert!(refused.contains("46340") && refused.contains("46341"), "{refused}");
        });
    }
}

/// pocket-clip with its head and some pictures of its test split.
struct Pocket {
    model: Model,
    preprocess: Preprocess,
    pixels: Tensor,
    labels: Vec<usize>,
    keys: Vec<u64>,
    classes: Vec<String>,
}

impl Pocket {
    fn new(n: u64) -> Self {
        let model = Model::find("pocket-clip", &Lookup::default()).unwrap();
        let preprocess = model.preprocess(None).unwrap();
        let set = LabelledSet::pocket(Split::Test, 0, n, preprocess.width).unwrap();
        let limits = DecodeLimits::default();
        let pixels: Vec<Tensor> = (0..set.items().len())
            .map(|i| {
                let picture = set.picture(i, &limits).unwrap();
                pixels_from_rgb(&preprocess.prepare(&picture), &Device::Cpu).unwrap()
            })
            .collect();
        Self {
            pixels: Tensor::stack(&pixels, 0).unwrap(),
            labels: set.items().iter().map(|item| item.label).collect(),
            keys: set.items().iter().map(|item| key(&item.id)).collect(),
            classes: set.classes().to_vec(),
            model,
            preprocess,
        }
    }

    fn tower(&self, dtype: Option<DType>, device: &Device) -> Clip {
        self.model.tower(&self.preprocess, dtype, device).unwrap()
    }

    fn head(&self, device: &Device) -> ZeroShotHead {
        let text = self.model.text(device).unwrap();
        ZeroShotHead::new(&text, &self.classes, &[radapt::data::registry::TEMPLATE]).unwrap()
    }

    fn pictures(&self, device: &Device) -> Pictures {
        Pictures::new(&self.pixels.to_device(device).unwrap(), self.keys.clone()).unwrap()
    }

    /// The tower with its training-free defence.
    fn defended(&self, tower: &Clip) -> (Clip, Subject) {
        let options = radapt::defense::DefenseOptions::default();
        let defense: Defense = options.build(tower, || self.model.fingerprint()).unwrap();
        (tower.with(defense.inserts()), Subject::new("pocket-clip", &defense).unwrap())
    }
}

#[test]
fn features_and_zero_shot_answers_are_the_cpu_s() {
    let (places, _turn) = places();
    let pocket = Pocket::new(40);
    let run = |dtype: Option<DType>, device: &Device| {
        let (tower, head) = (pocket.tower(dtype, device), pocket.head(device));
        let (tower, subject) = pocket.defended(&tower);
        let classifier = TowerClassifier::new(&tower, &head, subject).unwrap();
        let task = Classification::new(&classifier, pocket.labels.clone()).unwrap();
        let pixels = pocket.pixels.to_device(device).unwrap();
        let logits = task.logits(&pixels).unwrap();
        let patches = Feature::Patches(tower.spec().blocks - 1).of(&tower, &pixels).unwrap();
        let weights = class_weights(&tower, &pixels).unwrap();
        (head.weights.clone(), logits, task.predictions(&pixels).unwrap(), patches, weights)
    };
    let want = run(None, &Device::Cpu);
    let logits = host(&want.1).to_vec2::<f32>().unwrap();
    for place in &places {
        for dtype in [DType::F32, place.half()] {
            place.run(|device| {
                let found = run(Some(dtype), device);
                let (allowed, near) =
                    if dtype == DType::F32 { (F32, 1e-3) } else { (place.half_allowed().0, 1.0) };
                for (what, found, want) in [
                    ("text head", &found.0, &want.0),
                    ("logits", &found.1, &want.1),
                    ("patch tokens", &found.3, &want.3),
                    ("class token's weights", &found.4, &want.4),
                ] {
                    let apart = difference(&host(found), &host(want));
                    println!("{what}, {} {dtype:?}: {apart:.1e}", place.name());
                    assert!(apart <= allowed, "{}: {what} differs by {apart:.1e}", place.name());
                }
                let mut others = 0;
                for (i, (found, want)) in found.2.iter().zip(&want.2).enumerate() {
                    if found != want {
                        others += 1;
                        let apart = logits[i][*want] - logits[i][*found];
                        assert!(apart < near, "picture {i}: {found} for {want}, {apart} lower on the CPU");
                    }
                }
                assert!(others <= 4, "{others} of 40 answers differ");
            });
        }
    }
}

/// Asserts that pictures lie in the ball and the box, looked at on the CPU.
#[track_caller]
fn assert_inside(made: &Crafted, clean: &Tensor, eps: Eps) {
    let (found, clean) = (values(&host(made.pixels())), values(clean));
    for (x, y) in found.iter().zip(&clean) {
        assert!((0.0..=1.0).contains(x) && (x - y).abs() <= eps.value() + 1e-6, "{x} for {y}");
    }
}

#[test]
fn attacks_stay_in_their_ball_and_fool_as_many_as_on_the_cpu() {
    let (places, _turn) = places();
    let pocket = Pocket::new(16);
    let n = pocket.labels.len();
    let (eps, wide) = (Eps::of_255(4), Eps::of_255(24));
    let attacks: Vec<(&str, Box<dyn Attack>)> = vec![
        ("pgd", Box::new(Pgd::new(eps).on(Loss::CrossEntropy))),
        ("apgd-ce", Box::new(Apgd { steps: 15, ..Apgd::standard(eps) }.on(Loss::CrossEntropy))),
        ("apgd-dlr", Box::new(Apgd { steps: 6, ..Apgd::standard(eps) }.on(Loss::Dlr))),
        (
            "square",
            Box::new(Square { queries: 40, ..Square::standard(wide) }.on(Loss::Margin { kappa: None })),
        ),
        ("fab-t", Box::new(Fab { steps: 4, targets: Some(2), ..Fab::standard(eps) })),
        ("cw-l2", Box::new(Cw { steps: 8, ..Cw::default() })),
    ];
    for (name, attack) in &attacks {
        // How many are fooled, as the exact tower has it, and the losses it ended with.
        let run = |device: &Device, craft: Option<DType>| {
            let head = pocket.head(device);
            let (exact, subject) = pocket.defended(&pocket.tower(None, device));
            let verify = TowerClassifier::new(&exact, &head, subject.clone()).unwrap();
            let pictures = pocket.pictures(device);
            let robust = |classifier: &dyn Classifier| {
                let task = Classification::new(classifier, pocket.labels.clone()).unwrap();
                let made = attack.craft(&task, &pictures, 3, &mut |_| {}).unwrap();
                assert_eq!(made.pixels().device().is_cpu(), device.is_cpu());
                if let Some(eps) = attack.eps() {
                    assert_inside(&made, &pocket.pixels, eps);
                }
                let rows: Vec<usize> = (0..n).collect();
                task.correct(made.pixels(), &rows).unwrap().into_iter().filter(|right| *right).count()
            };
            match craft {
                None => robust(&verify),
                Some(dtype) => {
                    let rough = exact.to_dtype(dtype).unwrap();
                    let rough = TowerClassifier::new(rough, &head, subject).unwrap();
                    robust(&Mixed::new(rough, verify).unwrap())
                }
            }
        };
        let want = run(&Device::Cpu, None);
        assert!(want < n - 2, "{name} is to fool some: {want} of {n} are right");
        for place in &places {
            let exact = place.run(|device| run(device, None));
            let mixed = place.run(|device| run(device, Some(place.half())));
            println!(
                "{name}, {}: of {n} still right {exact}, crafted in {:?} {mixed}, on the CPU {want}",
                place.name(),
                place.half()
            );
            assert!(exact.abs_diff(want) <= 2, "{name}: {exact} and {want} of {n} still right");
            assert!(mixed.abs_diff(want) <= 4, "{name}: {mixed} and {want} of {n} still right");
        }
    }
}

#[test]
fn attacks_on_features_resized_pictures_and_values_are_the_cpu_s() {
    let (places, _turn) = places();
    let pocket = Pocket::new(6);
    let n = pocket.labels.len();
    let eps: Eps = "4/255".parse().unwrap();
    let run = |device: &Device| {
        let tower = pocket.tower(None, device);
        let (tower, subject) = pocket.defended(&tower);
        let pictures = pocket.pictures(device);
        let feature = Feature::Patches(tower.spec().blocks - 1);
        let objective =
            FeatureObjective::away_from_clean(&tower, subject.clone(), feature, pictures.pixels()).unwrap();
        let pgd = Pgd { steps: 3, alpha: 2.0 / 255.0, ..Pgd::new(eps) };
        let made = pgd.maximise(&objective, &pictures, 1, &mut |_| {}).unwrap();
        assert_inside(&made, &pocket.pixels, eps);
        let mut losses: Vec<f64> = made.outcomes().iter().map(|o| o.loss.unwrap()).collect();
        // The same pictures, cut to another size and resized within the function.
        let head = pocket.head(device);
        let side = tower.spec().image_size;
        let classifier = TowerClassifier::new(&tower, &head, subject.clone()).unwrap();
        let (height, width) = (side - 20, side - 20);
        let resized = Resized::new(classifier, &pocket.preprocess, height, width, device).unwrap();
        let task = Classification::new(&resized, pocket.labels.clone()).unwrap();
        let cut = pictures.pixels().narrow(2, 10, height).unwrap().narrow(3, 10, width).unwrap();
        let cut = Pictures::new(&cut, pocket.keys.clone()).unwrap();
        let made = pgd.on(Loss::Margin { kappa: None }).craft(&task, &cut, 1, &mut |_| {}).unwrap();
        losses.extend(made.outcomes().iter().map(|o| o.loss.unwrap()));
        for preset in [Preset::Paper, Preset::Notebook] {
            let text = pocket.model.text(device).unwrap();
            let words = vec![("a circle".to_string(), "a square".to_string()); n];
            let surrogate = Surrogate::of_words(tower.clone(), subject.clone(), 1.0, &text, &words).unwrap();
            let attack = VAttack { steps: 3, blocks: 2, ..VAttack::preset(preset, eps) };
            let made = attack.craft(&[surrogate], &pictures, 5, &mut |_| {}).unwrap();
            assert_inside(&made.crafted, &pocket.pixels, eps);
            losses.extend(made.crafted.outcomes().iter().map(|o| o.loss.unwrap()));
        }
        losses
    };
    let want = run(&Device::Cpu);
    for place in &places {
        let found = place.run(run);
        let apart = |(a, b): (&f64, &f64)| (a - b).abs() / b.abs().max(0.1);
        let mut all: Vec<f64> = found.iter().zip(&want).map(apart).collect();
        all.sort_by(f64::total_cmp);
        let (middle, worst) = (all[all.len() / 2], all[all.len() - 1]);
        println!("losses, {}: {middle:.1e} apart in the middle, {worst:.1e} at most", place.name());
        // Where a gradient is nearly zero its sign is anyone's, and steps part.
        assert!(middle < 2e-2 && worst < 0.5, "{}: {found:?}, {want:?}", place.name());
    }
}

#[test]
fn a_training_s_losses_are_the_cpu_s() {
    let (places, _turn) = places();
    let expected = Fixture::open("training/expected.safetensors");
    let model = Model::find(path("clip/v4").to_str().unwrap(), &Lookup::default()).unwrap();
    let preprocess = model.preprocess(None).unwrap();
    let set = LabelledSet::open(&path("training/pictures"), &OpenOptions::default()).unwrap();
    let run = |name: &str, device: &Device, craft: Option<DType>| -> Trained {
        let tower = model.tower(&preprocess, None, device).unwrap();
        let craft = craft.map(|dtype| tower.to_dtype(dtype).unwrap());
        let head = ZeroShotHead {
            classes: set.classes().to_vec(),
            weights: expected.tensor("head").to_device(device).unwrap(),
            logit_scale: 20.0,
        };
        let still = Plan { eps: Eps::of_255(0), batch: 6, epochs: 2, seed: 7, ..Plan::paper(4.0) };
        let (plan, goal) = match name {
            "still" => (still, Goal::CrossEntropy { head: &head }),
            "features" => (still, Goal::Embedding { feature: Feature::Embeds }),
            _ => {
                let settings = radapt::attack::Settings { steps: Some(2), ..Default::default() };
                let (eps, examples) = (Eps::of_255(2), Examples::Adaptive);
                let plan = Plan { eps, examples, settings, clean: 0.5, ..still };
                (plan, Goal::CrossEntropy { head: &head })
            }
        };
        let training = Training {
            plan,
            tower: &tower,
            craft: craft.as_ref(),
            model: "tiny".into(),
            goal,
            initial: expected.tensor("initial"),
            data: TrainingSet {
                set: &set,
                held_out: Some(&set),
                limits: DecodeLimits::default(),
                preprocess: &preprocess,
            },
            save_every: 5,
            pictures: None,
            others: Vec::new(),
        };
        let folder = tempfile::tempdir().unwrap();
        training.run(folder.path(), training.decides(json!({})).unwrap(), true, &mut |_| {}).unwrap()
    };
    for name in ["still", "features", "adaptive"] {
        let want = run(name, &Device::Cpu, None);
        assert_eq!(want.steps.len(), 8);
        for place in &places {
            let crafts = if name == "adaptive" { vec![None, Some(place.half())] } else { vec![None] };
            for craft in crafts {
                let found = place.run(|device| run(name, device, craft));
                let apart = found.steps.iter().zip(&want.steps).map(|(a, b)| (a.loss - b.loss).abs());
                let worst = apart.fold(0.0, f64::max);
                let anchor = difference(&found.anchor, &want.anchor);
                println!(
                    "{name}, {}, crafted in {craft:?}: losses within {worst:.1e}, anchors {anchor:.1e}",
                    place.name()
                );
                // Adam's first steps go by signs, so an entry without a gradient may part.
                let (loss, apart) = match (name, craft) {
                    ("adaptive", Some(_)) => (3e-2, 0.3),
                    ("adaptive", None) => (1e-2, 0.3),
                    _ => (1e-3, 1e-2),
                };
                assert!(worst < loss && anchor < apart, "{name}: {worst:.1e}, {anchor:.1e}");
            }
        }
    }
}
