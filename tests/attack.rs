//! The losses against candle's autograd and finite differences, PGD's invariants on linear models
//! and on a tiny CLIP with and without the defence, and that no figure goes without its threat.

mod fixture;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{D, DType, Device, IndexOp, Tensor, Var};
use fixture::{assert_close, assert_same, clip, difference, values};
use radapt::attack::{
    Attack, Classification, Classifier, CosineHead, Crafted, Direction, Eps, Evaluation, Feature,
    FeatureObjective, Goal, Head, Loss, Maximise, Objective, Outcome, Pgd, Pictures, Progress, Recipe,
    Subject, Threat, ThreatChoice, ThreatKind, TowerClassifier, key, picture_rng, quantise, uniform,
};
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif};
use radapt::image::{DecodeLimits, decode, pixels_from_rgb, rgb_from_pixels};
use radapt::tower::VisionTower;
use radapt::tower::clip::Clip;
use radapt::{Error, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

const SIDE: usize = 20;

fn eps(text: &str) -> Eps {
    text.parse().unwrap()
}

/// Uniform in [low, high].
fn random(shape: &[usize], seed: u64, low: f32, high: f32) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..=high)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// 8-bit pictures, some samples 0 and 255.
fn photos(batch: usize, side: usize, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let sample = |_| -> f32 { f32::from(rng.random_range(-40..=295i16).clamp(0, 255) as u8) / 255.0 };
    let samples: Vec<f32> = (0..batch * 3 * side * side).map(sample).collect();
    Tensor::from_vec(samples, (batch, 3, side, side), &Device::Cpu).unwrap()
}

fn pictures(pixels: &Tensor) -> Pictures {
    let n = pixels.dim(0).unwrap();
    Pictures::new(pixels, (0..n).map(|i| key(&format!("picture {i}"))).collect()).unwrap()
}

fn quiet(_: &Progress) {}

/// The largest |a - b|.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// logits_k = <w_k, x>, every picture by itself.
struct LinearModel {
    subject: Subject,
    /// `(K, 3 H W)`.
    weights: Tensor,
    /// Gradients at these entries of every picture are NaN.
    broken: Vec<usize>,
    gradients: AtomicUsize,
}

impl LinearModel {
    fn new(weights: Tensor) -> Self {
        Self {
            subject: Subject::undefended("linear"),
            weights,
            broken: Vec::new(),
            gradients: AtomicUsize::new(0),
        }
    }
}

impl Classifier for LinearModel {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn classes(&self) -> usize {
        self.weights.dim(0).unwrap()
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = pixels.flatten_from(1)?.unsqueeze(1)?;
        Ok(x.broadcast_mul(&self.weights.unsqueeze(0)?)?.sum(D::Minus1)?)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.gradients.fetch_add(pixels.dim(0)?, Ordering::Relaxed);
        let logits = self.logits(pixels)?;
        let mut mask = vec![0f32; self.weights.dim(1)?];
        self.broken.iter().for_each(|&i| mask[i] = f32::NAN);
        let mask = Tensor::new(mask, &Device::Cpu)?;
        let gradient = |c: &Tensor| -> Result<Tensor> {
            let each = c.unsqueeze(2)?.broadcast_mul(&self.weights.unsqueeze(0)?)?.sum(1)?;
            Ok(each.broadcast_add(&mask)?.reshape(pixels.shape())?)
        };
        let gradients = cotangents(&logits)?.iter().map(gradient).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

// --- eps ----------------------------------------------------------------------------------------

#[test]
fn eps_is_printed_as_it_was_written() {
    for (text, value, steps) in [
        ("4/255", 4.0 / 255.0, 4),
        ("0.0157", 0.0157, 4),
        ("0", 0.0, 0),
        ("1", 1.0, 255),
        ("255/255", 1.0, 255),
        ("0.5/255", 0.5 / 255.0, 0),
        ("16/255", 16.0 / 255.0, 16),
        ("0.0156", 0.0156, 3),
        ("0.015686", 0.015686, 4),
    ] {
        let eps = eps(text);
        assert_eq!((eps.to_string().as_str(), eps.value(), eps.steps()), (text, value, steps));
        assert_eq!(json!(eps), json!(text));
        assert_eq!(serde_json::from_value::<Eps>(json!(text)).unwrap(), eps);
    }
    for n in 0..=255 {
        assert_eq!(Eps::of_255(n).steps(), n);
        assert_eq!(Eps::new(f64::from(n) / 255.0).unwrap().steps(), n);
        assert_eq!(Eps::new(f64::from(n) / 255.0).unwrap(), Eps::of_255(n));
    }
    for text in
        ["", "4", "-1/255", "4/0", "0/0", "4/-255", "nan", "inf", "1/inf", "4/255/2", "256/255", "4:255"]
    {
        let error = text.parse::<Eps>().unwrap_err().to_string();
        assert_eq!(
            error,
            format!("eps: expected 0 to 1 in pixel units, such as 4/255 or 0.0157, found {text}")
        );
    }
    assert!(Eps::new(-1e-3).is_err());
    assert_eq!(Eps::new(-0.0).unwrap().to_string(), "0");
}

// --- threat -------------------------------------------------------------------------------------

fn defended_subject(alpha: f64) -> Subject {
    let tower = clip("v4");
    Subject::new("tiny", &defense(&tower, alpha)).unwrap()
}

#[test]
fn a_threat_is_adaptive_only_on_the_model_crafted_on() {
    let (plain, one, other) = (Subject::undefended("tiny"), defended_subject(1.2), defended_subject(1.1));
    let (transfer, adaptive) = (ThreatKind::Transfer, ThreatKind::Adaptive);
    let surrogate = |name: &str| Threat::Transfer { surrogate: name.into() };
    assert_eq!(transfer.threat(&plain, &one).unwrap(), surrogate("tiny"));
    assert_eq!(adaptive.threat(&one, &one).unwrap(), Threat::Adaptive);
    assert!(adaptive.threat(&plain, &one).is_err());
    assert!(adaptive.threat(&other, &one).is_err(), "another alpha is another model");
    assert!(transfer.threat(&one, &one).is_err(), "a defended model is no surrogate of itself");
    // On the undefended model the two coincide, and so do the pictures.
    assert_eq!(transfer.threat(&plain, &plain).unwrap(), surrogate("tiny"));
    assert_eq!(adaptive.threat(&plain, &plain).unwrap(), Threat::Adaptive);
    assert_eq!(transfer.crafts_on(&plain, &plain), adaptive.crafts_on(&plain, &plain));
    assert_eq!(transfer.crafts_on(&plain, &one), &plain);
    assert_eq!(adaptive.crafts_on(&plain, &one), &one);
    let error = adaptive.threat(&plain, &one).unwrap_err().to_string();
    assert!(error.starts_with("threat: expected adaptive pictures, crafted on tiny with GIF"), "{error}");
    assert!(error.ends_with("found tiny"), "{error}");
}

#[test]
fn a_threat_is_said_in_one_word() {
    let transfer = Threat::Transfer { surrogate: "clip".into() };
    assert_eq!(
        (transfer.to_string().as_str(), Threat::Adaptive.to_string().as_str()),
        ("transfer", "adaptive")
    );
    assert_eq!(json!(transfer), json!({"threat": "transfer", "surrogate": "clip"}));
    assert_eq!(json!(Threat::Adaptive), json!({"threat": "adaptive"}));
    for text in ["transfer", "adaptive", "both"] {
        assert_eq!(text.parse::<ThreatChoice>().unwrap().to_string(), text);
    }
    assert_eq!(ThreatChoice::Both.kinds(), [ThreatKind::Transfer, ThreatKind::Adaptive]);
    assert!("white-box".parse::<ThreatChoice>().is_err());
}

#[test]
fn a_score_carries_its_threat_and_never_beats_the_clean_answers() {
    let pixels = photos(4, 5, 1);
    let model = LinearModel::new(random(&[3, 75], 2, -1.0, 1.0));
    let labels = Classification::new(&model, vec![0; 4]).unwrap().predictions(&pixels).unwrap();
    let task = Classification::new(&model, labels).unwrap();
    let attack = Pgd { steps: 0, random_start: false, ..Pgd::csr(eps("4/255")) }.on(Loss::CrossEntropy);
    let crafted = attack.craft(&task, &pictures(&pixels), 7, &mut quiet).unwrap();
    let scored = crafted.score(&task, ThreatKind::Transfer, &[true, false, true, true]).unwrap();
    assert_eq!(scored.correct(), [true; 4]);
    assert_eq!(scored.robust(), [true, false, true, true]);
    let line = json!(scored);
    assert_eq!((&line["threat"], &line["surrogate"]), (&json!("transfer"), &json!("linear")));
    assert_eq!(line["recipe"]["eps"], json!("4/255"));
    assert_eq!(line["recipe"]["parameters"]["steps"], json!(0));
    assert_eq!(line["recipe"]["objective"], json!({"loss": "cross-entropy", "goal": "misclassify"}));
    assert_eq!(serde_json::from_value::<Recipe>(line["recipe"].clone()).unwrap(), *scored.recipe());
    let mut other = LinearModel::new(model.weights.clone());
    other.subject = Subject::undefended("another");
    let other = Classification::new(&other, vec![0; 4]).unwrap();
    assert!(crafted.score(&other, ThreatKind::Adaptive, &[true; 4]).is_err());
    assert!(crafted.score(&task, ThreatKind::Adaptive, &[true; 3]).is_err());
}

#[test]
fn crafted_pictures_outside_the_ball_are_refused() {
    let clean = (Tensor::ones((1, 3, 2, 2), DType::F32, &Device::Cpu).unwrap() * 0.5).unwrap();
    let recipe = Recipe {
        attack: "external".into(),
        parameters: json!({}),
        objective: json!({}),
        eps: Some(eps("4/255")),
        seed: 0,
        crafted_on: Subject::undefended("clip"),
        quantised: false,
    };
    let made = |pixels: Tensor, recipe: &Recipe| {
        Crafted::new(&pictures(&clean), pixels, recipe.clone(), vec![Outcome::default()])
    };
    assert!(made((&clean + 4.0 / 255.0).unwrap(), &recipe).is_ok());
    assert!(made((&clean + (4.0 / 255.0 + 3e-6)).unwrap(), &recipe).is_err());
    assert!(made((&clean * f64::NAN).unwrap(), &recipe).is_err());
    let unbounded = Recipe { eps: None, ..recipe };
    assert!(made((&clean + 0.4).unwrap(), &unbounded).is_ok());
    assert!(made((&clean + 0.6).unwrap(), &unbounded).is_err());
}

// --- losses -------------------------------------------------------------------------------------

const LOSSES: [Loss; 8] = [
    Loss::CrossEntropy,
    Loss::TargetedCrossEntropy,
    Loss::Margin { kappa: None },
    Loss::Margin { kappa: Some(0.5) },
    Loss::TargetedMargin { kappa: None },
    Loss::TargetedMargin { kappa: Some(-2.0) },
    Loss::Dlr,
    Loss::TargetedDlr,
];

/// The loss by candle's operations, which have gradients.
fn by_candle(loss: Loss, z: &Tensor, y: usize, t: usize) -> candle_core::Result<Tensor> {
    let numbers = values(z);
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    order.sort_by(|&a, &b| numbers[b].total_cmp(&numbers[a]));
    let log_p = |k: usize| candle_nn::ops::log_softmax(z, 0)?.i(k);
    let other = |but: usize| order.iter().copied().find(|&i| i != but).unwrap();
    let capped = |x: Tensor, kappa: Option<f64>| match kappa {
        Some(kappa) => x.minimum(kappa),
        None => Ok(x),
    };
    match loss {
        Loss::CrossEntropy => log_p(y)?.neg(),
        Loss::TargetedCrossEntropy => log_p(t),
        Loss::Margin { kappa } => capped((z.i(other(y))? - z.i(y)?)?, kappa),
        Loss::TargetedMargin { kappa } => capped((z.i(t)? - z.i(other(t))?)?, kappa),
        Loss::Dlr => {
            let below = (z.i(order[0])? - z.i(order[2])?)?;
            ((z.i(y)? - z.i(other(y))?)?.neg()?) / (below + 1e-12)?
        }
        Loss::TargetedDlr => {
            let below = (z.i(order[0])? - ((z.i(order[2])? + z.i(order[3])?)? * 0.5)?)?;
            ((z.i(y)? - z.i(t)?)?.neg()?) / (below + 1e-12)?
        }
    }
}

#[test]
fn losses_equal_autograd_and_finite_differences() {
    let (batch, classes) = (40, 7);
    let logits = random(&[batch, classes], 3, -3.0, 3.0);
    let labels: Vec<usize> = (0..batch).map(|i| i % classes).collect();
    let targets: Vec<usize> = (0..batch).map(|i| (i * 3 + 1) % classes).collect();
    let (mut worst_autograd, mut worst_difference): (f64, f64) = (0.0, 0.0);
    for loss in LOSSES {
        let found = loss.evaluate(&logits, &labels, Some(&targets)).unwrap();
        for row in 0..batch {
            let z = Var::from_tensor(&logits.i(row).unwrap().to_dtype(DType::F64).unwrap()).unwrap();
            let want = by_candle(loss, &z, labels[row], targets[row]).unwrap();
            let gradient = want.backward().unwrap().get(&z).unwrap().clone();
            assert!((found.loss[row] - values(&want)[0]).abs() <= 1e-12, "{loss:?} {row}");
            let (found_row, want) = (values(&found.cotangent.i(row).unwrap()), values(&gradient));
            let largest = want.iter().fold(1e-3, |m: f64, v| m.max(v.abs()));
            // candle gives half of the gradient to each side where two are equal.
            for (f, w) in found_row.iter().zip(&want) {
                worst_autograd = worst_autograd.max((f - w).abs() / largest);
            }
            // A step that f32 logits hold exactly, and too small to change their order.
            let h = 2f64.powi(-12);
            for (k, f) in found_row.iter().enumerate() {
                let at = |by: f64| {
                    let mut moved = values(&logits.i(row).unwrap());
                    moved[k] += by;
                    let moved = Tensor::from_vec(moved, (1, classes), &Device::Cpu).unwrap();
                    loss.evaluate(&moved, &labels[row..=row], Some(&targets[row..=row])).unwrap().loss[0]
                };
                worst_difference = worst_difference.max(((at(h) - at(-h)) / (2.0 * h) - f).abs() / largest);
            }
        }
    }
    println!("losses: autograd {worst_autograd:.1e}, finite differences {worst_difference:.1e}");
    assert!(worst_autograd <= 1e-6 && worst_difference <= 1e-4);
}

fn one_loss(loss: Loss, z: &[f64], y: usize, t: usize) -> (f64, Vec<f64>) {
    let logits = Tensor::from_slice(z, (1, z.len()), &Device::Cpu).unwrap();
    let found = loss.evaluate(&logits, &[y], Some(&[t])).unwrap();
    (found.loss[0], values(&found.cotangent))
}

#[test]
fn dlr_does_not_feel_shift_and_scale_and_is_positive_iff_wrong() {
    for seed in 0..50 {
        let z = values(&random(&[6], seed, -2.0, 2.0));
        let wrong = |y: usize| z.iter().any(|&v| v > z[y]);
        for y in 0..6 {
            let t = (y + 1) % 6;
            for loss in [Loss::Dlr, Loss::TargetedDlr] {
                let moved: Vec<f64> = z.iter().map(|v| 37.0 * v - 5.0).collect();
                assert!((one_loss(loss, &z, y, t).0 - one_loss(loss, &moved, y, t).0).abs() < 1e-9);
            }
            let dlr = one_loss(Loss::Dlr, &z, y, t).0;
            assert_eq!(dlr > 0.0, wrong(y));
            assert!(wrong(y) || (-1.0..=0.0).contains(&dlr));
        }
    }
}

#[test]
fn a_confident_prediction_keeps_its_gradient() {
    // In f32, softmax(60, 0) is (1, 9e-27), and 1 - 1 would be no gradient at all.
    let (loss, gradient) = one_loss(Loss::CrossEntropy, &[60.0, 0.0], 0, 0);
    assert!((loss / (-60f64).exp() - 1.0).abs() < 1e-9, "{loss:e}");
    assert!((gradient[0] / -(-60f64).exp() - 1.0).abs() < 1e-6, "{gradient:?}");
    assert_eq!(gradient[0], -gradient[1]);
}

#[test]
fn a_margin_beyond_kappa_has_no_gradient_and_a_tie_has() {
    let loss = Loss::Margin { kappa: Some(0.0) };
    assert_eq!(one_loss(loss, &[1.0, 2.0, 0.0], 0, 0), (0.0, vec![0.0; 3]));
    assert_eq!(one_loss(loss, &[2.0, 2.0, 0.0], 0, 0), (0.0, vec![-1.0, 1.0, 0.0]));
    assert_eq!(one_loss(loss, &[3.0, 2.0, 0.0], 0, 0), (-1.0, vec![-1.0, 1.0, 0.0]));
}

#[test]
fn losses_refuse_what_they_are_not_defined_for() {
    let logits = random(&[2, 3], 1, 0.0, 1.0);
    let error = |loss: Loss, logits: &Tensor, labels: &[usize], targets: Option<&[usize]>| {
        loss.evaluate(logits, labels, targets).unwrap_err().to_string()
    };
    let few = logits.narrow(1, 0, 2).unwrap();
    assert_eq!(error(Loss::Dlr, &few, &[0, 0], None), "classes: expected at least 3 for this loss, found 2");
    assert!(error(Loss::TargetedDlr, &logits, &[0, 0], Some(&[1, 1])).contains("at least 4"));
    assert!(error(Loss::CrossEntropy, &logits, &[0, 3], None).contains("classes 0 to 2"));
    assert!(error(Loss::CrossEntropy, &logits, &[0], None).contains("one per picture, 2"));
    assert!(error(Loss::TargetedCrossEntropy, &logits, &[0, 0], None).contains("targeted loss"));
    let model = LinearModel::new(random(&[3, 75], 2, -1.0, 1.0));
    assert!(Classification::new(&model, vec![3]).is_err());
    let task = Classification::new(&model, vec![0]).unwrap();
    assert!(task.objective(Loss::TargetedDlr).is_err());
    assert!(task.targeted(Loss::TargetedDlr, vec![1], Goal::Target).is_err());
    assert!(task.targeted(Loss::TargetedCrossEntropy, vec![1, 2], Goal::Target).is_err());
    assert!(task.targeted(Loss::CrossEntropy, vec![1], Goal::Target).is_err());
    // Not a number is never the right answer.
    let task = Classification::new(&model, vec![0, 0]).unwrap();
    let nan = (Tensor::ones((1, 3, 5, 5), DType::F32, &Device::Cpu).unwrap() * f64::NAN).unwrap();
    assert_eq!(task.correct(&nan, &[1]).unwrap(), [false]);
}

// --- PGD on a linear model ----------------------------------------------------------------------

struct Toy {
    model: LinearModel,
    pixels: Tensor,
    labels: Vec<usize>,
}

/// Five photos of 6 x 6 under a random linear model of 4 classes, labelled as it sees them.
fn toy(seed: u64) -> Toy {
    let model = LinearModel::new(random(&[4, 108], seed, -1.0, 1.0));
    let pixels = photos(5, 6, seed + 1);
    let labels = Classification::new(&model, vec![0; 5]).unwrap().predictions(&pixels).unwrap();
    Toy { model, pixels, labels }
}

impl Toy {
    fn task(&self) -> Classification<'_> {
        Classification::new(&self.model, self.labels.clone()).unwrap()
    }

    fn run(&self, pgd: &Pgd, seed: u64) -> Crafted {
        let objective = self.task().objective(Loss::CrossEntropy).unwrap();
        pgd.maximise(&objective, &pictures(&self.pixels), seed, &mut quiet).unwrap()
    }
}

fn variants(eps: Eps) -> Vec<Pgd> {
    let base = Pgd::new(eps);
    vec![
        base.clone(),
        Pgd::csr(eps),
        Pgd::fare(eps),
        Pgd { random_start: false, ..base.clone() },
        Pgd { only_correct: true, ..base.clone() },
        Pgd { stop_when_fooled: true, ..base.clone() },
        Pgd { stop_when_fooled: true, only_correct: true, momentum: 0.5, ..Pgd::csr(eps) },
        Pgd { alpha: 3.0, ..base },
    ]
}

#[test]
fn pgd_stays_in_the_ball_and_in_the_box() {
    let toy = toy(1);
    for text in ["0", "0.5/255", "4/255", "0.3", "1"] {
        let eps = eps(text);
        for pgd in variants(eps) {
            let crafted = toy.run(&pgd, 3);
            let found = values(crafted.pixels());
            assert!(found.iter().all(|v| (0.0..=1.0).contains(v)));
            let distance = distance(crafted.pixels(), &toy.pixels);
            assert!(distance <= eps.value() + 1e-6, "{pgd:?}: {distance}");
        }
    }
}

#[test]
fn pgd_with_eps_0_returns_the_clean_pictures() {
    let toy = toy(2);
    for pgd in variants(eps("0")) {
        assert_same(&format!("{pgd:?}"), toy.run(&pgd, 1).pixels(), &toy.pixels);
    }
}

#[test]
fn pgd_without_steps_returns_the_start() {
    let toy = toy(3);
    let eps = eps("8/255");
    let pgd = Pgd { steps: 0, ..Pgd::csr(eps) };
    let found = toy.run(&pgd, 5);
    // The start by its definition, from the picture's own random numbers.
    let mut want = Vec::new();
    for (row, &key) in pictures(&toy.pixels).keys().iter().enumerate() {
        let clean = toy.pixels.i(row).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let noise = uniform(&mut picture_rng(5, key, 0, "pgd"), clean.len());
        want.extend(
            clean.iter().zip(noise).map(|(x, u)| f64::from((x + u * eps.value() as f32).clamp(0.0, 1.0))),
        );
    }
    let found = values(found.pixels());
    assert!(found.iter().zip(&want).all(|(f, w)| (f - w).abs() <= 1e-7));
    assert!(found.iter().zip(values(&toy.pixels)).filter(|(f, x)| **f != *x).count() > 400, "it moved");
    let still = toy.run(&Pgd { random_start: false, ..pgd }, 5);
    assert_same("no random start", still.pixels(), &toy.pixels);
}

#[test]
fn one_step_on_a_linear_model_reaches_the_corner() {
    let weights = random(&[2, 108], 4, -1.0, 1.0);
    let model = LinearModel::new(weights.clone());
    let pixels = random(&[3, 3, 6, 6], 5, 0.1, 0.9);
    let (label, eps) = (1, eps("4/255"));
    let task = Classification::new(&model, vec![label; 3]).unwrap();
    let away = (weights.i(0).unwrap() - weights.i(1).unwrap()).unwrap().sign().unwrap();
    let step = (away * eps.value()).unwrap().reshape((1, 3, 6, 6)).unwrap();
    let want = pixels.broadcast_add(&step).unwrap();
    for alpha in [eps.value(), 1.0] {
        let pgd = Pgd { alpha, steps: 1, random_start: false, ..Pgd::csr(eps) };
        for loss in [Loss::CrossEntropy, Loss::Margin { kappa: None }] {
            let crafted = pgd.clone().on(loss).craft(&task, &pictures(&pixels), 0, &mut quiet).unwrap();
            assert_same("corner", crafted.pixels(), &want);
        }
        // Targeted at the other class, it is the same way; at its own, the opposite one.
        for (target, sign) in [(0, 1.0), (1, -1.0)] {
            let objective = task.targeted(Loss::TargetedCrossEntropy, vec![target; 3], Goal::Target).unwrap();
            let crafted = pgd.maximise(&objective, &pictures(&pixels), 0, &mut quiet).unwrap();
            let want = pixels.broadcast_add(&(&step * sign).unwrap()).unwrap();
            assert_same("targeted corner", crafted.pixels(), &want);
        }
    }
}

#[test]
fn pixels_without_gradient_do_not_move() {
    let keep =
        Tensor::from_vec((0..108).map(|i| (i % 3 != 0) as u8 as f32).collect(), 108, &Device::Cpu).unwrap();
    let weights = random(&[4, 108], 6, -1.0, 1.0).broadcast_mul(&keep).unwrap();
    let model = LinearModel::new(weights);
    let pixels = photos(2, 6, 7);
    let task = Classification::new(&model, vec![0, 1]).unwrap();
    let pgd = Pgd { random_start: false, ..Pgd::csr(eps("8/255")) };
    let crafted = pgd.on(Loss::CrossEntropy).craft(&task, &pictures(&pixels), 0, &mut quiet).unwrap();
    let moved: Vec<bool> =
        values(crafted.pixels()).iter().zip(values(&pixels)).map(|(a, b)| *a != b).collect();
    assert!((0..216).filter(|i| i % 108 % 3 == 0).all(|i| !moved[i]));
    assert!(moved.iter().any(|moved| *moved));
}

#[test]
fn nan_gradients_are_zero_and_counted() {
    let mut toy = toy(8);
    toy.model.broken = vec![0, 50, 107];
    let pgd = Pgd { random_start: false, ..Pgd::csr(eps("8/255")) };
    let crafted = toy.run(&pgd, 0);
    let (found, clean) = (values(crafted.pixels()), values(&toy.pixels));
    for (row, outcome) in crafted.outcomes().iter().enumerate() {
        assert_eq!((outcome.gradients, outcome.nan_gradients), (10, 30));
        assert!([0, 50, 107].iter().all(|i| found[row * 108 + i] == clean[row * 108 + i]));
    }
    assert!(distance(crafted.pixels(), &toy.pixels) > 0.03);
}

#[test]
fn the_seed_and_the_key_decide_the_bytes() {
    let toy = toy(9);
    for pgd in variants(eps("4/255")) {
        assert_same("same seed", toy.run(&pgd, 1).pixels(), toy.run(&pgd, 1).pixels());
    }
    let pgd = Pgd { steps: 0, ..Pgd::csr(eps("4/255")) };
    assert!(distance(toy.run(&pgd, 1).pixels(), toy.run(&pgd, 2).pixels()) > 0.0);
    // The first of all random numbers, for good.
    let mut rng = picture_rng(0, key("a.png"), 0, "pgd");
    assert_eq!(key("a.png"), 6_394_935_000_140_220_287);
    assert_eq!(uniform(&mut rng, 3), [-0.7582015, 0.66804695, -0.712417]);
    assert!(uniform(&mut rng, 100_000).iter().all(|u| (-1.0..1.0).contains(u)));
}

/// Runs every picture alone, with the labels and key it has in the batch.
fn assert_alone_as_in_a_batch(
    pixels: &Tensor,
    labels: &[usize],
    classifier: &dyn Classifier,
    pgd: &Pgd,
    loss: Loss,
) {
    let batch = pictures(pixels);
    let task = Classification::new(classifier, labels.to_vec()).unwrap();
    let attack = pgd.clone().on(loss);
    let together = attack.craft(&task, &batch, 11, &mut quiet).unwrap();
    for (row, &label) in labels.iter().enumerate() {
        let task = Classification::new(classifier, vec![label]).unwrap();
        let alone = Pictures::new(&pixels.narrow(0, row, 1).unwrap(), vec![batch.keys()[row]]).unwrap();
        let alone = attack.craft(&task, &alone, 11, &mut quiet).unwrap();
        assert_same(&format!("{pgd:?} {row}"), &together.pixels().narrow(0, row, 1).unwrap(), alone.pixels());
        assert_eq!(together.outcomes()[row], alone.outcomes()[0]);
    }
}

#[test]
fn a_picture_alone_fares_as_in_a_batch() {
    let toy = toy(10);
    // One label is wrong, so that pictures leave the batch at different times.
    let mut labels = toy.labels.clone();
    labels[1] = (labels[1] + 1) % 4;
    for eps in [eps("4/255"), eps("60/255")] {
        for pgd in variants(eps) {
            for loss in [Loss::CrossEntropy, Loss::Margin { kappa: Some(0.0) }, Loss::Dlr] {
                assert_alone_as_in_a_batch(&toy.pixels, &labels, &toy.model, &pgd, loss);
            }
        }
    }
}

#[test]
fn the_best_kept_is_no_worse_than_clean_picture_and_last_iterate() {
    for seed in 0..20 {
        let toy = toy(100 + seed);
        for text in ["1/255", "20/255"] {
            let best = toy.run(&Pgd { alpha: 0.1, ..Pgd::new(eps(text)) }, seed);
            let last = toy.run(&Pgd { alpha: 0.1, ..Pgd::csr(eps(text)) }, seed);
            let objective = toy.task().objective(Loss::CrossEntropy).unwrap();
            let rows: Vec<usize> = (0..5).collect();
            let at = |pixels: &Tensor| objective.values(pixels, &rows).unwrap();
            let (clean, found) = (at(&toy.pixels), at(best.pixels()));
            let last = at(last.pixels());
            for row in rows.iter().copied() {
                assert!(!clean.beats(row, &found, row) && !last.beats(row, &found, row));
                // What is reported is what is returned.
                assert_eq!(best.outcomes()[row].loss, Some(found.loss[row]));
                assert_eq!(best.outcomes()[row].fooled, Some(found.is_fooled(row)));
                assert_eq!(best.outcomes()[row].clean_loss, Some(clean.loss[row]));
                // The loss itself falls only where a fooled picture takes the place of a right one.
                assert!(found.loss[row] >= clean.loss[row] || found.is_fooled(row) && !clean.is_fooled(row));
            }
        }
    }
}

#[test]
fn fooled_goes_before_the_loss_and_nan_is_last() {
    let of = |loss: f64, fooled: bool| Evaluation { loss: vec![loss], fooled: Some(vec![fooled]) };
    assert!(of(1.0, true).beats(0, &of(2.0, false), 0));
    assert!(!of(2.0, false).beats(0, &of(1.0, true), 0));
    assert!(of(2.0, true).beats(0, &of(1.0, true), 0));
    assert!(!of(1.0, true).beats(0, &of(1.0, true), 0));
    assert!(of(1.0, false).beats(0, &of(f64::NAN, false), 0));
    assert!(!of(f64::NAN, false).beats(0, &of(-1.0, false), 0));
}

#[test]
fn only_what_is_needed_is_attacked() {
    let mut toy = toy(12);
    toy.labels[1] = (toy.labels[1] + 1) % 4;
    let same = |crafted: &Crafted, row: usize| {
        values(&crafted.pixels().i(row).unwrap()) == values(&toy.pixels.i(row).unwrap())
    };
    let crafted = toy.run(&Pgd { only_correct: true, ..Pgd::new(eps("4/255")) }, 0);
    let attacked: Vec<bool> = crafted.outcomes().iter().map(|outcome| outcome.attacked).collect();
    assert_eq!(attacked, [true, false, true, true, true]);
    assert_eq!(toy.model.gradients.load(Ordering::Relaxed), 40);
    assert!(same(&crafted, 1) && !same(&crafted, 0));
    assert_eq!(crafted.outcomes()[1].fooled, Some(true));
    // By the caller's choice, as AutoAttack's driver does.
    let chosen = pictures(&toy.pixels).only(vec![false, false, true, false, true]).unwrap();
    let attack = Pgd::csr(eps("4/255")).on(Loss::CrossEntropy);
    let some = attack.craft(&toy.task(), &chosen, 0, &mut quiet).unwrap();
    let all = attack.craft(&toy.task(), &pictures(&toy.pixels), 0, &mut quiet).unwrap();
    for row in [0, 1, 3] {
        assert!(same(&some, row));
        assert_eq!(some.outcomes()[row], Outcome::default());
    }
    for row in [2, 4] {
        let [some, all] = [&some, &all].map(|crafted| crafted.pixels().i(row).unwrap());
        assert_same("chosen", &some, &all);
    }
    let none = attack.craft(&toy.task(), &chosen.only(vec![false; 5]).unwrap(), 0, &mut quiet).unwrap();
    assert_same("none", none.pixels(), &toy.pixels);
}

#[test]
fn a_picture_is_left_as_soon_as_it_is_fooled() {
    let toy = toy(13);
    let pgd = Pgd { stop_when_fooled: true, steps: 40, ..Pgd::csr(eps("60/255")) };
    let crafted = toy.run(&pgd, 0);
    let early: Vec<usize> = crafted.outcomes().iter().map(|outcome| outcome.gradients).collect();
    assert!(early.iter().all(|&gradients| gradients < 41) && early.iter().any(|&g| g < 40), "{early:?}");
    assert_eq!(early.iter().sum::<usize>(), toy.model.gradients.load(Ordering::Relaxed));
    let correct = toy.task().correct(crafted.pixels(), &[0, 1, 2, 3, 4]).unwrap();
    for (outcome, correct) in crafted.outcomes().iter().zip(correct) {
        assert_eq!(outcome.fooled, Some(!correct));
    }
}

#[test]
fn the_cw_margin_freezes_what_is_fooled() {
    let toy = toy(14);
    let pgd = Pgd { alpha: eps("60/255").value() / 12.0, steps: 30, ..Pgd::csr(eps("60/255")) };
    let loss = Loss::Margin { kappa: Some(0.0) };
    let run = |pgd: Pgd| pgd.on(loss).craft(&toy.task(), &pictures(&toy.pixels), 0, &mut quiet).unwrap();
    let to_the_end = run(pgd.clone());
    let stopped = run(Pgd { stop_when_fooled: true, ..pgd });
    assert!(to_the_end.outcomes().iter().any(|outcome| outcome.fooled == Some(true)));
    assert_same("frozen", to_the_end.pixels(), stopped.pixels());
}

#[test]
fn momentum_below_1_tells_only_where_the_gradient_is_zero() {
    let toy = toy(15);
    let with = |momentum: f64| toy.run(&Pgd { momentum, ..Pgd::csr(eps("4/255")) }, 0);
    assert_same("FARE's momentum", with(0.9).pixels(), with(0.0).pixels());
}

#[test]
fn progress_counts_steps_and_pictures() {
    let toy = toy(16);
    let objective = toy.task().objective(Loss::CrossEntropy).unwrap();
    let mut seen = Vec::new();
    let pgd = Pgd::new(eps("60/255"));
    let crafted = pgd.maximise(&objective, &pictures(&toy.pixels), 0, &mut |p| seen.push(p.clone())).unwrap();
    assert_eq!(seen.iter().map(|p| p.step).collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    assert!(seen.iter().all(|p| p.steps == 10 && p.active == 5));
    assert!(seen.windows(2).all(|pair| pair[0].fooled <= pair[1].fooled), "the best never gets worse");
    let fooled = crafted.outcomes().iter().filter(|outcome| outcome.fooled == Some(true)).count();
    assert!(fooled > 0 && seen[9].fooled <= Some(fooled));
}

#[test]
fn presets_are_those_of_their_authors() {
    let eps = eps("4/255");
    let csr = Pgd::csr(eps);
    assert_eq!((csr.alpha, csr.steps, csr.random_start, csr.keep_best), (1.0 / 255.0, 10, true, false));
    let fare = Pgd::fare(Eps::of_255(2));
    assert_eq!((fare.alpha, fare.steps, fare.momentum, fare.random_start), (1.0 / 255.0, 10, 0.9, true));
    assert!(Pgd::new(eps).keep_best);
}

#[test]
fn pgd_and_pictures_refuse_nonsense() {
    let toy = toy(17);
    let objective = toy.task().objective(Loss::CrossEntropy).unwrap();
    let run = |pgd: Pgd, pictures: &Pictures| {
        pgd.maximise(&objective, pictures, 0, &mut quiet).err().map(|e| e.to_string())
    };
    let good = pictures(&toy.pixels);
    for pgd in [
        Pgd { alpha: f64::NAN, ..Pgd::new(eps("4/255")) },
        Pgd { alpha: -1.0, ..Pgd::new(eps("4/255")) },
        Pgd { alpha: 1e300, ..Pgd::new(eps("4/255")) },
        Pgd { momentum: -0.1, ..Pgd::new(eps("4/255")) },
    ] {
        assert!(run(pgd, &good).is_some());
    }
    let few = pictures(&toy.pixels.narrow(0, 0, 2).unwrap());
    assert_eq!(
        run(Pgd::new(eps("4/255")), &few).unwrap(),
        "pictures: expected as many as the objective is made for, 5, found 2"
    );
    let bad =
        |pixels: &Tensor, keys: usize| Pictures::new(pixels, vec![0; keys]).err().map(|e| e.to_string());
    assert_eq!(bad(&toy.pixels, 4).unwrap(), "keys: expected one per picture, 5, found 4");
    assert!(bad(&toy.pixels.i(0).unwrap(), 3).is_some());
    assert!(bad(&toy.pixels.to_dtype(DType::F64).unwrap(), 5).is_some());
    assert!(bad(&(&toy.pixels * 255.0).unwrap(), 5).unwrap().contains("values that are not"));
    assert!(bad(&(&toy.pixels * f64::NAN).unwrap(), 5).unwrap().contains("540 values that are not"));
    assert!(good.only(vec![true; 4]).is_err());
    assert!(objective.values(&toy.pixels, &[0, 1, 2, 3, 5]).is_err());
    assert!(objective.values(&toy.pixels, &[0, 1]).is_err());
}

// --- 8 bits -------------------------------------------------------------------------------------

#[test]
fn a_quantised_picture_stays_in_the_ball_through_a_file() {
    let clean = photos(3, 9, 20);
    for text in ["0", "0.5/255", "1/255", "4/255", "0.0157", "0.0156", "16/255", "1"] {
        let eps = eps(text);
        let noise = random(&[3, 3, 9, 9], 21, -1.0, 1.0);
        let pixels = (&clean + (noise * eps.value()).unwrap()).unwrap().clamp(0f32, 1f32).unwrap();
        let found = quantise(&pixels, &clean, eps).unwrap();
        assert!(distance(&found, &clean) <= eps.value() + 1e-6, "{text}");
        assert!(distance(&found, &clean) <= f64::from(eps.steps()) / 255.0 + 1e-6, "{text}");
        assert!(distance(&found, &pixels) <= 1.0 / 255.0 + 1e-6, "{text}");
        for row in 0..3 {
            let picture = found.i(row).unwrap();
            let mut png = std::io::Cursor::new(Vec::new());
            rgb_from_pixels(&picture).unwrap().write_to(&mut png, image::ImageFormat::Png).unwrap();
            let read = decode(&png.into_inner(), "adversarial.png", &DecodeLimits::default()).unwrap();
            assert_same("through a PNG", &pixels_from_rgb(&read, &Device::Cpu).unwrap(), &picture);
        }
        assert_same("again", &quantise(&found, &clean, eps).unwrap(), &found);
    }
    // Rounding alone would leave the ball: 3.9/255 rounds to 4/255.
    let eps = eps("3.9/255");
    let pixels = (&clean + eps.value()).unwrap().clamp(0f32, 1f32).unwrap();
    assert!(distance(&quantise(&pixels, &clean, eps).unwrap(), &clean) <= 3.0 / 255.0 + 1e-6);
    assert!(quantise(&clean, &random(&[3, 3, 9, 9], 1, 0.0, 1.0), eps).is_err(), "no 8-bit picture");
    assert!(quantise(&(&clean * f64::NAN).unwrap(), &clean, eps).is_err());
    assert!(quantise(&clean.i(0).unwrap(), &clean, eps).is_err());
}

#[test]
fn crafted_pictures_say_that_they_are_quantised() {
    let toy = toy(22);
    let crafted = toy.run(&Pgd::new(eps("4/255")), 0);
    assert!(!crafted.recipe().quantised);
    let quantised = crafted.clone().quantised(&toy.pixels).unwrap();
    assert!(quantised.recipe().quantised);
    assert_same(
        "quantised",
        quantised.pixels(),
        &quantise(crafted.pixels(), &toy.pixels, eps("4/255")).unwrap(),
    );
}

// --- a tiny CLIP, defended ----------------------------------------------------------------------

fn defense(tower: &Clip, alpha: f64) -> Defense {
    let gif = Gif::new(SIDE, SIDE, 6.0, &Device::Cpu).unwrap();
    let fra = Fra::new(&training_free(tower).unwrap(), alpha, -0.8, &Device::Cpu).unwrap();
    Defense { gif: Some(Arc::new(gif)), fra: Some(Arc::new(fra)), ..Default::default() }
}

fn head(tower: &Clip) -> CosineHead {
    CosineHead::new(&random(&[6, tower.spec().projection.unwrap()], 30, -1.0, 1.0), 20.0).unwrap()
}

/// The tiny CLIP, as it is and with GIF and FRA.
fn towers() -> [(Clip, Subject); 2] {
    let tower = clip("v4");
    let defense = defense(&tower, 1.2);
    let subject = Subject::new("tiny", &defense).unwrap();
    [(tower.clone(), Subject::undefended("tiny")), (tower.with(defense.inserts()), subject)]
}

/// The derivative along `direction` by a central difference that leaves the f32 noise behind.
fn along(f: impl Fn(&Tensor) -> f64, pixels: &Tensor, direction: &Tensor, h: f64) -> f64 {
    let at = |h: f64| f(&(pixels + (direction * h).unwrap()).unwrap());
    // Richardson: the error is of the fourth order in h.
    let slope = |h: f64| (at(h) - at(-h)) / (2.0 * h);
    (4.0 * slope(h / 2.0) - slope(h)) / 3.0
}

/// The largest difference between the gradient and finite differences, along the gradient itself
/// and along random directions, over the gradient's length.
fn check_gradient(objective: &dyn Objective, pixels: &Tensor, h: f64) -> f64 {
    let rows: Vec<usize> = (0..objective.pictures()).rev().collect();
    let (values_there, gradient) = objective.values_and_gradient(pixels, &rows).unwrap();
    assert_eq!(values_there, objective.values(pixels, &rows).unwrap());
    assert_eq!(gradient.dims(), pixels.dims());
    let mut worst: f64 = 0.0;
    for (i, &row) in rows.iter().enumerate() {
        let (x, g) = (pixels.narrow(0, i, 1).unwrap(), gradient.narrow(0, i, 1).unwrap());
        let length = values(&g).iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!(length > 0.0);
        let mut directions = vec![g.clone()];
        directions.extend((0..4).map(|seed| random(g.dims(), 40 + seed, -1.0, 1.0)));
        for direction in directions {
            let size = values(&direction).iter().map(|v| v * v).sum::<f64>().sqrt();
            let direction = (direction / size).unwrap();
            let slope = along(|x| objective.values(x, &[row]).unwrap().loss[0], &x, &direction, h);
            let want: f64 = values(&g).iter().zip(values(&direction)).map(|(a, b)| a * b).sum();
            worst = worst.max((slope - want).abs() / length);
        }
    }
    worst
}

#[test]
fn the_classifiers_gradient_equals_finite_differences_through_gif_and_fra() {
    let pixels = random(&[3, 3, SIDE, SIDE], 31, 0.2, 0.8);
    for (tower, subject) in towers() {
        let head = head(&tower);
        let classifier = TowerClassifier::new(tower, head, subject.clone()).unwrap();
        let task = Classification::new(&classifier, vec![0, 3, 5]).unwrap();
        for loss in [Loss::CrossEntropy, Loss::Margin { kappa: None }, Loss::Dlr] {
            let worst = check_gradient(&task.objective(loss).unwrap(), &pixels, 0.05);
            println!("{subject}: {loss:?}: {worst:.1e}");
            assert!(worst <= 1e-3, "{subject}: {loss:?}: {worst:.1e}");
        }
        let targeted = task.targeted(Loss::TargetedCrossEntropy, vec![1, 0, 2], Goal::Target).unwrap();
        let worst = check_gradient(&targeted, &pixels, 0.05);
        assert!(worst <= 1e-3, "{subject}: targeted: {worst:.1e}");
    }
}

#[test]
fn the_feature_gradient_equals_finite_differences() {
    let pixels = random(&[2, 3, SIDE, SIDE], 32, 0.2, 0.8);
    let elsewhere = random(&[2, 3, SIDE, SIDE], 33, 0.0, 1.0);
    for (tower, subject) in towers() {
        for feature in [Feature::Embeds, Feature::Pooled, Feature::Patches(3), Feature::Patches(0)] {
            let references = feature.of(&tower, &elsewhere).unwrap();
            for direction in [Direction::Away, Direction::Toward] {
                let objective =
                    FeatureObjective::new(&tower, subject.clone(), feature, direction, &references).unwrap();
                let worst = check_gradient(&objective, &pixels, 0.05);
                println!("{subject}: {feature:?} {direction:?}: {worst:.1e}");
                assert!(worst <= 1e-3, "{subject}: {feature:?} {direction:?}: {worst:.1e}");
            }
        }
    }
}

#[test]
fn the_cosine_heads_vjp_equals_autograd() {
    let tower = clip("v4");
    let head = head(&tower);
    let embeds = random(&[4, 24], 34, -2.0, 2.0);
    let cotangent = random(&[4, 6], 35, -1.0, 1.0);
    let x = Var::from_tensor(&embeds).unwrap();
    let logits = head.logits(&x).unwrap();
    let want = (logits * &cotangent).unwrap().sum_all().unwrap().backward().unwrap().get(&x).unwrap().clone();
    assert_close("cosine head", &head.vjp(&embeds, &cotangent).unwrap(), &want, 1e-5);
    // Longer embeddings, the same logits.
    let [short, long] = [&embeds, &(&embeds * 8.0).unwrap()].map(|x| head.logits(x).unwrap());
    assert_close("scale", &long, &short, 1e-6);
    for (weights, scale) in [
        (random(&[6, 24], 1, 0.0, 0.0), 1.0),
        (random(&[6], 1, 0.0, 1.0), 1.0),
        (random(&[6, 24], 1, -1.0, 1.0), 0.0),
        (random(&[6, 24], 1, -1.0, 1.0), f64::NAN),
    ] {
        assert!(CosineHead::new(&weights, scale).is_err());
    }
}

#[test]
fn an_embeddings_cosine_to_itself_is_1_and_its_sign_turns_with_the_direction() {
    let tower = clip("v4");
    let pixels = random(&[2, 3, SIDE, SIDE], 36, 0.0, 1.0);
    for feature in [Feature::Embeds, Feature::Patches(3)] {
        let subject = Subject::undefended("tiny");
        let away = FeatureObjective::away_from_clean(&tower, subject.clone(), feature, &pixels).unwrap();
        let found = away.values(&pixels, &[0, 1]).unwrap();
        assert!(found.loss.iter().all(|loss| (loss + 1.0).abs() < 1e-6), "{found:?}");
        assert_eq!(found.fooled, None);
        let references = feature.of(&tower, &pixels).unwrap();
        let toward = FeatureObjective::new(&tower, subject, feature, Direction::Toward, &references).unwrap();
        let swapped = pixels.flip(&[0]).unwrap();
        let [away, toward] =
            [&away as &dyn Objective, &toward].map(|o| o.values(&swapped, &[0, 1]).unwrap().loss);
        assert!(away.iter().zip(&toward).all(|(a, t)| (a + t).abs() < 1e-7 && t.abs() < 0.9999));
        assert_eq!(away_description(&tower, feature)["direction"], json!("away"));
    }
    let error = |feature: Feature, shape: &[usize]| {
        let references = random(shape, 1, 0.0, 1.0);
        FeatureObjective::new(&tower, Subject::undefended("tiny"), feature, Direction::Away, &references)
            .err()
            .map(|e| e.to_string())
    };
    assert_eq!(error(Feature::Embeds, &[2, 24]), None);
    assert_eq!(
        error(Feature::Patches(3), &[2, 26, 32]).unwrap(),
        "references: expected shape [n, 25, 32], found [2, 26, 32]"
    );
    assert!(error(Feature::Patches(5), &[2, 25, 32]).is_some());
    assert!(error(Feature::Embeds, &[24]).is_some());
}

fn away_description(tower: &Clip, feature: Feature) -> serde_json::Value {
    let pixels = random(&[1, 3, SIDE, SIDE], 36, 0.0, 1.0);
    FeatureObjective::away_from_clean(tower, Subject::undefended("tiny"), feature, &pixels)
        .unwrap()
        .describe()
}

#[test]
fn pgd_lowers_the_margin_of_a_clip_with_and_without_its_defence() {
    let pixels = photos(8, SIDE, 37);
    for (tower, subject) in towers() {
        let head = head(&tower);
        let classifier = TowerClassifier::new(tower, head, subject.clone()).unwrap();
        let labels = Classification::new(&classifier, vec![0; 8]).unwrap().predictions(&pixels).unwrap();
        let task = Classification::new(&classifier, labels).unwrap();
        let margin = task.objective(Loss::Margin { kappa: None }).unwrap();
        let rows: Vec<usize> = (0..8).collect();
        let before = margin.values(&pixels, &rows).unwrap();
        for loss in [Loss::CrossEntropy, Loss::Margin { kappa: None }] {
            let attack = Pgd::csr(eps("4/255")).on(loss);
            let crafted = attack.craft(&task, &pictures(&pixels), 0, &mut quiet).unwrap();
            let after = margin.values(crafted.pixels(), &rows).unwrap();
            let robust = task.correct(crafted.pixels(), &rows).unwrap().iter().filter(|c| **c).count();
            println!(
                "{subject} (adaptive): {loss:?}: {:.3?} to {:.3?}, {robust} of 8 robust",
                before.loss, after.loss
            );
            for row in &rows {
                assert!(after.loss[*row] > before.loss[*row], "{subject} {row}");
            }
        }
    }
}

#[test]
fn pgd_moves_patch_tokens_away_and_embeddings_towards_a_target() {
    let pixels = photos(2, SIDE, 38);
    let target = photos(2, SIDE, 39);
    for (tower, subject) in towers() {
        let pgd = Pgd::new(eps("8/255"));
        let away =
            FeatureObjective::away_from_clean(&tower, subject.clone(), Feature::Patches(3), &pixels).unwrap();
        let crafted = pgd.maximise(&away, &pictures(&pixels), 0, &mut quiet).unwrap();
        for outcome in crafted.outcomes() {
            println!("{subject}: patch tokens' -cosine {:?} to {:?}", outcome.clean_loss, outcome.loss);
            assert!(outcome.loss.unwrap() > outcome.clean_loss.unwrap() + 1e-4);
        }
        let references = Feature::Embeds.of(&tower, &target).unwrap();
        let toward =
            FeatureObjective::new(&tower, subject, Feature::Embeds, Direction::Toward, &references).unwrap();
        let crafted = pgd.maximise(&toward, &pictures(&pixels), 0, &mut quiet).unwrap();
        for outcome in crafted.outcomes() {
            assert!(outcome.loss.unwrap() > outcome.clean_loss.unwrap());
            assert_eq!(outcome.fooled, None);
        }
        assert_eq!(crafted.recipe().objective["feature"], json!("embeds"));
    }
}

#[test]
fn a_picture_alone_fares_as_in_a_batch_on_a_clip() {
    let pixels = photos(3, SIDE, 41);
    for (tower, subject) in towers() {
        let head = head(&tower);
        let classifier = TowerClassifier::new(tower, head, subject).unwrap();
        for pgd in variants(eps("4/255")) {
            assert_alone_as_in_a_batch(&pixels, &[0, 1, 2], &classifier, &pgd, Loss::CrossEntropy);
        }
    }
}

#[test]
fn larger_batches_differ_in_the_last_bits_only() {
    let pixels = photos(5, SIDE, 42);
    let [_, (tower, subject)] = towers();
    let head = head(&tower);
    let gradient = |batch: usize| {
        let classifier = TowerClassifier::new(&tower, &head, subject.clone()).unwrap().with_batch(batch);
        let task = Classification::new(&classifier, vec![0, 1, 2, 3, 4]).unwrap();
        let objective = task.objective(Loss::CrossEntropy).unwrap();
        objective.values_and_gradient(&pixels, &[0, 1, 2, 3, 4]).unwrap()
    };
    let (alone, want) = gradient(1);
    for batch in [2, 5] {
        let (evaluation, found) = gradient(batch);
        assert!(evaluation.loss.iter().zip(&alone.loss).all(|(a, b)| (a - b).abs() < 1e-4));
        println!("batch {batch}: {:.1e}", difference(&found, &want));
        assert!(difference(&found, &want) < 1e-4);
    }
}

#[test]
fn a_tower_without_projection_is_no_classifier() {
    let tower = clip("v4");
    let tensors: HashMap<String, Tensor> = tower.tensors().unwrap().into_iter().collect();
    let bare = fixture::Memory(tensors).tower(&fixture::clip_config("v4"));
    let error = TowerClassifier::new(&bare, head(&tower), Subject::undefended("bare")).err().unwrap();
    assert!(matches!(error, Error::Unsupported(_)));
    assert_eq!(error.to_string(), "bare: the vision tower has no projection");
}
