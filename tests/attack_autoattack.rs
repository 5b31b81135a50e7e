//! AutoAttack's bookkeeping over attacks that follow a script, its flags and its state; and the
//! attacks by their names.

mod fixture;
mod toy;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{Device, IndexOp, Tensor};
use fixture::{assert_same, values};
use radapt::attack::{
    Apgd, ApgdT, Attack, AutoAttack, Classification, Classifier, Crafted, Eps, Evaluated, Flag, Loss, NAMES,
    Named, Outcome, Pictures, Progress, Recipe, Settings, Square, Subject, flags_of_outcomes,
};
use radapt::{Error, Result};
use serde_json::{Value, json};
use toy::{Toy, assert_lawful, count, eps, linf, photos, pictures, quiet, random};

type Boxed = Box<dyn Attack + Send + Sync>;

/// Class 1 where the first sample is above 1/2, else class 0; there are more that never win.
struct Switch {
    subject: Subject,
    classes: usize,
    /// Added to a logit, in turn or not, in every pass.
    noise: f32,
    probabilities: bool,
    passes: AtomicUsize,
}

impl Switch {
    fn new(classes: usize) -> Self {
        Self {
            subject: Subject::undefended("switch"),
            classes,
            noise: 0.0,
            probabilities: false,
            passes: AtomicUsize::new(0),
        }
    }
}

impl Classifier for Switch {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let pass = self.passes.fetch_add(1, Ordering::Relaxed);
        let logits = |x: Vec<f32>| {
            let mut z = vec![-3.0; self.classes];
            (z[0], z[1]) = (0.5 - x[0], x[0] - 0.5 + self.noise * (pass % 2) as f32);
            if self.probabilities {
                let sum: f32 = z.iter().map(|v| v.exp()).sum();
                z.iter_mut().for_each(|v| *v = v.exp() / sum);
            }
            z
        };
        let rows = pixels.flatten_from(1)?.to_vec2::<f32>()?.into_iter().map(logits);
        Ok(Tensor::new(rows.collect::<Vec<_>>(), &Device::Cpu)?)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let logits = self.logits(pixels)?;
        let gradients =
            cotangents(&logits)?.iter().map(|_| Ok(pixels.zeros_like()?)).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

/// The pictures chosen, and all pixels.
type Shown = (Vec<usize>, Tensor);

/// An attack on [`Switch`] that fools the pictures it is told to, and changes all others too.
#[derive(Clone)]
struct Scripted {
    name: &'static str,
    fools: Vec<usize>,
    eps: Eps,
    fewest: usize,
    targets: Option<usize>,
    random: bool,
    /// It changes nothing.
    still: bool,
    /// What it says of every picture.
    outcome: Outcome,
    /// What it was given.
    seen: Arc<Mutex<Vec<Shown>>>,
    fails: Arc<AtomicBool>,
}

fn scripted(name: &'static str, fools: &[usize]) -> Scripted {
    Scripted {
        name,
        fools: fools.to_vec(),
        eps: eps("1"),
        fewest: 2,
        targets: None,
        random: false,
        still: false,
        outcome: Outcome { attacked: true, gradients: 3, clean_loss: Some(0.5), ..Outcome::default() },
        seen: Arc::default(),
        fails: Arc::default(),
    }
}

impl Scripted {
    fn calls(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

impl Attack for Scripted {
    fn name(&self) -> &str {
        self.name
    }

    fn parameters(&self) -> Value {
        json!({ "fools": self.fools })
    }

    fn eps(&self) -> Option<Eps> {
        Some(self.eps)
    }

    fn fewest_classes(&self) -> usize {
        self.fewest
    }

    fn targets(&self) -> Option<usize> {
        self.targets
    }

    fn expects_randomness(&self) -> bool {
        self.random
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        self.seen.lock().unwrap().push((pictures.rows(), pictures.pixels().clone()));
        if self.fails.load(Ordering::Relaxed) {
            return Err(Error::Unsupported("cut off".into()));
        }
        let mut rows = pictures.pixels().flatten_from(1)?.to_vec2::<f32>()?;
        let mut outcomes = vec![Outcome::default(); rows.len()];
        let mut fooled = 0;
        for row in pictures.rows() {
            if self.fools.contains(&row) {
                rows[row][0] = 1.0;
                fooled += 1;
            }
            if !self.still {
                rows[row][1] = 1.0;
            }
            outcomes[row] = self.outcome.clone();
        }
        let active = pictures.rows().len();
        progress(&Progress { step: 1, steps: 2, active, fooled: Some(0) });
        progress(&Progress { step: 2, steps: 2, active, fooled: Some(fooled) });
        let recipe = Recipe {
            attack: self.name.into(),
            parameters: self.parameters(),
            objective: Value::Null,
            eps: Some(self.eps),
            seed,
            crafted_on: task.classifier().subject().clone(),
            quantised: false,
        };
        let pixels = Tensor::new(rows, &Device::Cpu)?.reshape(pictures.pixels().shape())?;
        Crafted::new(pictures, pixels, recipe, outcomes)
    }
}

fn suite(attacks: &[&Scripted]) -> AutoAttack {
    let attacks = attacks.iter().map(|attack| -> Boxed { Box::new((*attack).clone()) });
    AutoAttack::new("suite", attacks.collect()).unwrap()
}

/// Pictures of class 0.
fn zeros(n: usize) -> Tensor {
    random(&[n, 3, 4, 4], 1, 0.1, 0.4)
}

fn evaluate(suite: &AutoAttack, model: &Switch, pixels: &Tensor, labels: &[usize]) -> Evaluated {
    let task = Classification::new(model, labels.to_vec()).unwrap();
    suite.evaluate(&task, &pictures(pixels), 0, &mut quiet).unwrap()
}

// --- bookkeeping --------------------------------------------------------------------------------

#[test]
fn each_attack_is_shown_the_clean_pictures_that_are_left() {
    let model = Switch::new(4);
    let pixels = zeros(8);
    // The sixth is wrong, the seventh not chosen, the last fooled by none.
    let labels = vec![0, 0, 0, 0, 0, 1, 0, 0];
    let task = Classification::new(&model, labels).unwrap();
    let chosen = pictures(&pixels).only((0..8).map(|row| row != 6).collect()).unwrap();
    let all = [scripted("a", &[0, 5, 6]), scripted("b", &[0, 1, 6]), scripted("c", &[2, 3])];
    let found = suite(&all.each_ref()).evaluate(&task, &chosen, 9, &mut quiet).unwrap();
    for (attack, rows) in all.iter().zip([vec![0, 1, 2, 3, 4, 7], vec![1, 2, 3, 4, 7], vec![2, 3, 4, 7]]) {
        let seen = attack.seen.lock().unwrap();
        assert_eq!((seen.len(), &seen[0].0), (1, &rows));
        assert_same("clean", &seen[0].1, &pixels);
    }
    assert_eq!(found.clean, [true, true, true, true, true, false, false, true]);
    let by: Vec<Option<&str>> = found.broken_by.iter().map(Option::as_deref).collect();
    assert_eq!(by, [Some("a"), Some("b"), Some("c"), Some("c"), None, None, None, None]);
    assert_eq!(found.robust(), [false, false, false, false, true, false, false, true]);
    let after: Vec<(&str, usize)> = found.robust_after.iter().map(|(name, n)| (name.as_str(), *n)).collect();
    assert_eq!(after, [("a", 5), ("b", 4), ("c", 2)]);
    assert_eq!(found.flags, []);
    let now = found.crafted.pixels();
    for row in 0..8 {
        let outcome = &found.crafted.outcomes()[row];
        let samples = values(&now.i(row).unwrap());
        if by[row].is_some() {
            assert_eq!((samples[0], samples[1], outcome.fooled), (1.0, 1.0, Some(true)));
        } else {
            assert_same("untouched", &now.i(row).unwrap(), &pixels.i(row).unwrap());
            assert_eq!(
                outcome.fooled,
                [None, Some(true), Some(false)][if row == 6 { 0 } else { 1 + usize::from(row != 5) }]
            );
        }
        // As often as it was attacked.
        let attacks = [1, 2, 3, 3, 3, 0, 0, 3][row];
        assert_eq!((outcome.attacked, outcome.gradients), (attacks > 0, 3 * attacks));
    }
    let recipe = found.crafted.recipe();
    assert_eq!((recipe.attack.as_str(), recipe.seed, recipe.eps), ("suite", 9, Some(eps("1"))));
    assert_eq!(recipe.parameters["attacks"][1], json!({"attack": "b", "parameters": {"fools": [0, 1, 6]}}));
}

#[test]
fn it_stops_when_none_is_left_and_its_worst_case_is_that_of_all() {
    let model = Switch::new(4);
    let pixels = zeros(6);
    for seed in 0..20usize {
        let fools =
            |k: usize| -> Vec<usize> { (0..6).filter(|row| (seed + 1) * (row + 3) * k % 5 < 2).collect() };
        let all = [scripted("a", &fools(1)), scripted("b", &fools(2)), scripted("c", &fools(7))];
        let last = scripted("d", if seed % 2 == 0 { &[0, 1, 2, 3, 4, 5] } else { &[] });
        let never = scripted("e", &[]);
        let [a, b, c] = &all;
        let labels: Vec<usize> = (0..6).map(|row| usize::from(seed % 7 == row)).collect();
        let found = evaluate(&suite(&[a, b, c, &last, &never]), &model, &pixels, &labels);
        let robust = found.robust();
        for row in 0..6 {
            let fooled = all.iter().chain([&last]).any(|attack| attack.fools.contains(&row));
            assert_eq!(robust[row], labels[row] == 0 && !fooled);
            assert!(robust[row] <= found.clean[row]);
        }
        let after: Vec<usize> = found.robust_after.iter().map(|(_, n)| *n).collect();
        assert!(after.windows(2).all(|pair| pair[1] <= pair[0]));
        assert_eq!(after.last(), Some(&count(&robust)));
        let left = count(&robust) > 0;
        assert_eq!((never.calls() == 1, found.robust_after.len() == 5), (left, left), "{seed}");
    }
    // None to begin with.
    let attack = scripted("a", &[0]);
    let found = evaluate(&suite(&[&attack]), &model, &pixels, &[1; 6]);
    assert_eq!((attack.calls(), found.robust(), found.robust_after), (0, vec![false; 6], vec![]));
    let task = Classification::new(&model, vec![0; 6]).unwrap();
    let none = pictures(&pixels).only(vec![false; 6]).unwrap();
    let found = suite(&[&attack]).evaluate(&task, &none, 0, &mut quiet).unwrap();
    assert_eq!((attack.calls(), found.clean, found.flags), (0, vec![false; 6], vec![]));
    assert_same("none", found.crafted.pixels(), &pixels);
}

#[test]
fn an_attack_is_not_taken_at_its_word() {
    let mut liar = scripted("liar", &[]);
    liar.outcome.fooled = Some(true);
    let mut modest = scripted("modest", &[1]);
    modest.outcome.fooled = Some(false);
    let pixels = zeros(2);
    let found = evaluate(&suite(&[&liar, &modest]), &Switch::new(2), &pixels, &[0, 0]);
    assert_eq!(found.broken_by, [None, Some("modest".into())]);
    assert_eq!(found.robust_after, [("liar".into(), 2), ("modest".into(), 1)]);
    let fooled: Vec<Option<bool>> = found.crafted.outcomes().iter().map(|o| o.fooled).collect();
    assert_eq!(fooled, [Some(false), Some(true)]);
}

#[test]
fn progress_goes_over_all_attacks() {
    let model = Switch::new(2);
    let labels = vec![0, 0, 0, 1];
    let task = Classification::new(&model, labels).unwrap();
    let all = [scripted("a", &[0]), scripted("b", &[1])];
    let mut seen = Vec::new();
    let chosen = pictures(&zeros(4)).only(vec![true, true, false, true]).unwrap();
    suite(&all.each_ref()).evaluate(&task, &chosen, 0, &mut |p| seen.push(p.clone())).unwrap();
    let told: Vec<_> = seen.iter().map(|p| (p.step, p.steps, p.active, p.fooled)).collect();
    // Those wrong or not chosen are not among the fooled.
    let want = [
        (500, 2000, 2, Some(0)),
        (1000, 2000, 2, Some(1)),
        (1500, 2000, 1, Some(1)),
        (2000, 2000, 1, Some(2)),
    ];
    assert_eq!(told, want);
}

#[test]
fn suites_that_make_no_sense_are_refused() {
    let refused = |attacks: &[&Scripted]| {
        let attacks = attacks.iter().map(|attack| -> Boxed { Box::new((*attack).clone()) });
        AutoAttack::new("suite", attacks.collect()).err().unwrap().to_string()
    };
    let (a, b) = (scripted("a", &[]), Scripted { eps: eps("4/255"), ..scripted("b", &[]) });
    assert_eq!(refused(&[]), "attacks: expected at least one, found 0");
    assert_eq!(refused(&[&a, &a]), "attacks: expected each once, found a twice");
    assert_eq!(
        refused(&[&a, &b]),
        "attacks: expected all within the same eps, found b with 4/255 and a with 1"
    );
    let model = Switch::new(2);
    let task = Classification::new(&model, vec![0; 3]).unwrap();
    let error = suite(&[&a]).evaluate(&task, &pictures(&zeros(2)), 0, &mut quiet).err().unwrap().to_string();
    assert_eq!(error, "pictures: expected one per label, 3, found 2");
}

#[test]
fn the_laws_of_every_attack_hold() {
    let settings = Settings {
        steps: Some(6),
        restarts: None,
        targets: Some(2),
        queries: Some(15),
        stop_when_fooled: false,
    };
    let pixels = photos(5, 5, 7, 3);
    let model = Toy::mlp(6, 105, 4);
    let mut labels = model.labels(&pixels);
    labels[1] = (labels[1] + 1) % 6;
    let mut broken = 0;
    for name in ["autoattack", "autoattack-plus", "autoattack-rand", "autoattack-paper", "custom:fab+square"]
    {
        for text in ["0", "2/255", "9/255"] {
            let named = Named::new(name, eps(text), &settings).unwrap();
            let crafted = assert_lawful(named.as_attack(), &model, &pixels, &labels);
            assert_eq!(crafted.recipe().attack, name);
            let Named::AutoAttack(suite) = &named else { panic!("a suite") };
            let task = Classification::new(&model, labels.clone()).unwrap();
            let found = suite.evaluate(&task, &pictures(&pixels), 5, &mut quiet).unwrap();
            assert_same("evaluated", found.crafted.pixels(), crafted.pixels());
            assert_eq!(task.correct(crafted.pixels(), &[0, 1, 2, 3, 4]).unwrap(), found.robust());
            assert!(found.robust().iter().zip(&found.clean).all(|(robust, clean)| robust <= clean));
            broken += found.broken_by.iter().flatten().count();
        }
    }
    assert!(broken > 5, "{broken}");
}

// --- flags --------------------------------------------------------------------------------------

#[test]
fn a_model_is_looked_at_before_it_is_attacked() {
    let pixels = zeros(3);
    let attack = scripted("a", &[0]);
    let flags =
        |model: &Switch, attack: &Scripted| evaluate(&suite(&[attack]), model, &pixels, &[0; 3]).flags;
    assert_eq!(flags(&Switch::new(3), &attack), []);
    let random = |noise| Switch { noise, ..Switch::new(3) };
    assert_eq!(flags(&random(0.01), &attack), [Flag::Randomised]);
    assert_eq!(flags(&random(1e-6), &attack), [], "rounding is not randomness");
    // Made for it.
    assert_eq!(flags(&random(0.01), &Scripted { random: true, ..attack.clone() }), []);
    let probable = Switch { probabilities: true, ..Switch::new(3) };
    assert_eq!(flags(&probable, &attack), [Flag::Probabilities]);
}

#[test]
fn too_few_classes_leave_an_attack_out_or_take_its_targets() {
    let pixels = zeros(3);
    let needy = Scripted { fewest: 4, targets: Some(9), ..scripted("needy", &[0, 1, 2]) };
    let plain = scripted("plain", &[1]);
    let of = |classes| evaluate(&suite(&[&needy, &plain]), &Switch::new(classes), &pixels, &[0; 3]);
    let found = of(3);
    assert_eq!(found.flags, [Flag::TooFewClasses { attack: "needy".into(), needs: 4, classes: 3 }]);
    assert_eq!((needy.calls(), &found.robust_after), (0, &vec![("plain".into(), 2)]));
    assert_eq!(found.flags[0].to_string(), "needy needs 4 classes and was left out: there are 3");
    let found = of(5);
    assert_eq!(found.flags, [Flag::FewerTargets { attack: "needy".into(), targets: 9, classes: 5 }]);
    assert_eq!(needy.calls(), 1);
    assert_eq!(of(10).flags, []);
    // The real ones: on 3 classes the standard goes on without APGD-T.
    let settings = Settings { steps: Some(3), queries: Some(5), ..Settings::default() };
    for (classes, left_out) in [(2, vec!["apgd-t"]), (3, vec!["apgd-t"]), (4, vec![])] {
        let model = Toy::mlp(classes, 48, 5);
        let labels = model.labels(&pixels);
        let Named::AutoAttack(suite) = Named::new("autoattack", eps("0"), &settings).unwrap() else {
            panic!("a suite")
        };
        let task = Classification::new(&model, labels).unwrap();
        let found = suite.evaluate(&task, &pictures(&pixels), 0, &mut quiet).unwrap();
        let missing = |flag: &Flag| match flag {
            Flag::TooFewClasses { attack, .. } => Some(attack.clone()),
            _ => None,
        };
        assert_eq!(found.flags.iter().filter_map(missing).collect::<Vec<_>>(), left_out);
        let fewer = found.flags.iter().filter(|flag| matches!(flag, Flag::FewerTargets { .. })).count();
        assert_eq!(fewer, 2 - left_out.len());
        assert_eq!(found.robust_after.len(), 4 - left_out.len());
    }
}

#[test]
fn odd_gradients_are_flagged() {
    let mut attack = scripted("a", &[0]);
    attack.outcome.zero_gradient = true;
    let mut other = scripted("b", &[1]);
    other.outcome.nan_gradients = 7;
    let found = evaluate(&suite(&[&attack, &other]), &Switch::new(3), &zeros(3), &[0, 0, 0]);
    assert_eq!(found.flags, [Flag::ZeroGradient { pictures: 3 }, Flag::NanGradient { pictures: 2 }]);
    assert_eq!(found.crafted.outcomes()[1].nan_gradients, 7);
    assert_eq!(flags_of_outcomes(found.crafted.outcomes()), found.flags);
    assert_eq!(flags_of_outcomes(&[Outcome::default()]), []);
    // From a real attack: this model's gradients are all zero.
    let attacks: Vec<Boxed> = vec![
        Box::new(Apgd { steps: 3, ..Apgd::standard(eps("1")) }.on(Loss::CrossEntropy)),
        Box::new(Square { queries: 200, ..Square::standard(eps("1")) }.on(Loss::Margin { kappa: None })),
    ];
    let real = AutoAttack::new("real", attacks).unwrap();
    let found = evaluate(&real, &Switch { noise: 0.0, ..Switch::new(3) }, &zeros(4), &[0; 4]);
    assert_eq!(found.flags[0], Flag::ZeroGradient { pictures: 4 });
    assert!(found.crafted.outcomes().iter().all(|o| o.gradients == 4));
    let by_square = found.broken_by.iter().flatten().filter(|name| *name == "square").count();
    let queried = found.crafted.outcomes().iter().filter(|o| o.queries.is_some()).count();
    assert!(by_square > 0 && queried >= by_square, "{by_square} {queried}");
    assert_eq!(found.flags[1..], [Flag::SquareBeatsGradients { pictures: by_square, of: 4 }]);
}

#[test]
fn square_is_flagged_where_it_fools_what_no_gradient_did() {
    assert_eq!(Flag::square(2, 1000), None);
    assert_eq!(Flag::square(3, 1000), Some(Flag::SquareBeatsGradients { pictures: 3, of: 1000 }));
    assert_eq!(Flag::square(0, 0), None);
    let (other, square) = (scripted("apgd-ce", &[0]), scripted("square", &[0, 1]));
    let flags = |all: &[&Scripted]| evaluate(&suite(all), &Switch::new(3), &zeros(3), &[0; 3]).flags;
    assert_eq!(flags(&[&other, &square]), [Flag::SquareBeatsGradients { pictures: 1, of: 3 }]);
    // Alone or first it says nothing of gradients.
    assert_eq!(flags(&[&square]), []);
    assert_eq!(flags(&[&square, &other]), []);
    assert_eq!(flags(&[&other, &scripted("square", &[0])]), []);
}

// --- state --------------------------------------------------------------------------------------

fn assert_equal(a: &Evaluated, b: &Evaluated) {
    assert_same("pixels", a.crafted.pixels(), b.crafted.pixels());
    assert_eq!((a.crafted.outcomes(), a.crafted.recipe()), (b.crafted.outcomes(), b.crafted.recipe()));
    assert_eq!((&a.clean, &a.broken_by), (&b.clean, &b.broken_by));
    assert_eq!((&a.robust_after, &a.flags), (&b.robust_after, &b.flags));
}

#[test]
fn a_run_that_was_cut_off_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    // Random, so that a flag is in the state too.
    let model = Switch { noise: 0.01, ..Switch::new(5) };
    let (pixels, labels) = (zeros(5), [0, 0, 1, 0, 0]);
    let mut all = [scripted("a", &[0]), scripted("b", &[1]), scripted("square", &[3])];
    all[0].targets = Some(9);
    all[1].outcome.nan_gradients = 2;
    let whole = evaluate(&suite(&all.each_ref()), &model, &pixels, &labels);
    assert_eq!(whole.flags.len(), 4);
    all.iter().for_each(|attack| attack.seen.lock().unwrap().clear());
    let task = Classification::new(&model, labels.to_vec()).unwrap();
    let run = || suite(&all.each_ref()).with_state(&path).evaluate(&task, &pictures(&pixels), 0, &mut quiet);
    all[1].fails.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(run().err().unwrap().to_string(), Error::Unsupported("cut off".into()).to_string());
    }
    assert_eq!(all.each_ref().map(Scripted::calls), [1, 2, 0], "the first is not run again");
    all[1].fails.store(false, Ordering::Relaxed);
    all[2].fails.store(true, Ordering::Relaxed);
    assert!(run().is_err());
    assert_eq!(all.each_ref().map(Scripted::calls), [1, 3, 1]);
    all[2].fails.store(false, Ordering::Relaxed);
    assert_equal(&run().unwrap(), &whole);
    assert_eq!(all.each_ref().map(Scripted::calls), [1, 3, 2]);
    assert_eq!(all[2].seen.lock().unwrap()[1].0, [3, 4]);
    // Done: nothing is run, and the same comes of it.
    assert_equal(&run().unwrap(), &whole);
    assert_eq!(all.each_ref().map(Scripted::calls), [1, 3, 2]);
    let files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|f| f.unwrap().path()).collect();
    assert_eq!(files, [path]);
}

#[test]
fn a_real_run_goes_on_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let pixels = photos(12, 6, 6, 7);
    let model = Toy::mlp(8, 108, 8);
    let labels = model.labels(&pixels);
    let task = Classification::new(&model, labels).unwrap();
    let barrier = Scripted { eps: eps("3/255"), still: true, ..scripted("barrier", &[]) };
    let suite = || {
        let attacks: Vec<Boxed> = vec![
            Box::new(Apgd { steps: 10, ..Apgd::standard(barrier.eps) }.on(Loss::CrossEntropy)),
            Box::new(barrier.clone()),
            Box::new(ApgdT { apgd: Apgd { steps: 10, ..Apgd::standard(barrier.eps) }, targets: 2 }),
        ];
        AutoAttack::new("real", attacks).unwrap()
    };
    let run = |suite: AutoAttack| suite.evaluate(&task, &pictures(&pixels), 3, &mut quiet);
    let whole = run(suite()).unwrap();
    let by: Vec<&str> = whole.broken_by.iter().flatten().map(String::as_str).collect();
    assert!(by.contains(&"apgd-ce") && by.len() < 12, "{by:?}");
    barrier.fails.store(true, Ordering::Relaxed);
    assert!(run(suite().with_state(&path)).is_err());
    barrier.fails.store(false, Ordering::Relaxed);
    model.seen.lock().unwrap().clear();
    assert_equal(&run(suite().with_state(&path)).unwrap(), &whole);
    // The gradients of APGD-T alone: those that APGD-CE had fooled are not looked at again.
    let left = 12 - by.iter().filter(|name| **name == "apgd-ce").count();
    assert!(model.seen.lock().unwrap().len() <= left * 2 * 11);
}

#[test]
fn the_state_of_another_run_or_a_damaged_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let model = Switch::new(4);
    let pixels = zeros(4);
    let (a, b) = (scripted("a", &[0]), scripted("b", &[1]));
    let labels = vec![0, 0, 0, 1];
    let task = Classification::new(&model, labels).unwrap();
    let all = pictures(&pixels);
    let run = |task: &Classification, attacks: &[&Scripted], pictures: &Pictures, seed| {
        suite(attacks).with_state(&path).evaluate(task, pictures, seed, &mut quiet)
    };
    let whole = run(&task, &[&a, &b], &all, 0).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let refused = |found: Result<Evaluated>, why: &str| {
        let error = found.expect_err(why).to_string();
        assert!(error.contains("state.safetensors") && error.contains(why), "{error}");
        assert!(error.contains("not the state of an AutoAttack run"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap().is_empty(), why == "empty");
    };
    let another = "it is of another model, other attacks, pictures or another seed";
    refused(run(&task, &[&a, &b], &all, 1), another);
    refused(run(&task, &[&b, &a], &all, 0), another);
    refused(run(&task, &[&a], &all, 0), another);
    refused(run(&task, &[&a, &scripted("b", &[2])], &all, 0), another);
    let other = Classification::new(&model, vec![0, 0, 0, 0]).unwrap();
    refused(run(&other, &[&a, &b], &all, 0), another);
    let other = Switch { subject: Subject::undefended("other"), ..Switch::new(4) };
    let other = Classification::new(&other, vec![0, 0, 0, 1]).unwrap();
    refused(run(&other, &[&a, &b], &all, 0), another);
    refused(run(&task, &[&a, &b], &pictures(&(&pixels * 0.999).unwrap()), 0), another);
    refused(run(&task, &[&a, &b], &Pictures::new(&pixels, vec![1, 2, 3, 4]).unwrap(), 0), another);
    refused(run(&task, &[&a, &b], &all.clone().only(vec![true, true, true, false]).unwrap(), 0), another);
    // A turned picture has the same samples.
    let turned = pixels.reshape((4, 3, 2, 8)).unwrap();
    refused(run(&task, &[&a, &b], &pictures(&turned), 0), another);
    let damaged = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = run(&task, &[&a, &b], &all, 0).expect_err("damaged").to_string();
        assert!(error.contains("state.safetensors`: not the state of an AutoAttack run: "), "{error}");
        error
    };
    damaged(b"");
    damaged(b"no state at all, but long enough to be one");
    for length in [7, 20, bytes.len() / 2, bytes.len() - 1] {
        damaged(&bytes[..length]);
    }
    let mut flipped = bytes.clone();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(damaged(&flipped).ends_with("its pixels are not those written"));
    let text = String::from_utf8_lossy(&bytes[8..]);
    assert!(text.contains(r#"\"version\":1"#), "{text}");
    let at = bytes.windows(12).position(|w| w == br#"version\":1,"#).unwrap();
    let mut newer = bytes.clone();
    newer[at + 10] = b'2';
    assert!(damaged(&newer).ends_with("expected version 1, found 2"));
    std::fs::write(&path, &bytes).unwrap();
    assert_equal(&run(&task, &[&a, &b], &all, 0).unwrap(), &whole);
    assert_eq!((a.calls(), b.calls()), (1, 1), "refused before anything is run");
    // Where it cannot be written.
    let nowhere = suite(&[&a]).with_state(folder.path().join("no/such/folder"));
    let error = nowhere.evaluate(&task, &all, 0, &mut quiet).err().unwrap().to_string();
    assert!(error.contains("no/such/folder.part"), "{error}");
    assert!(suite(&[&a]).with_state(folder.path()).evaluate(&task, &all, 0, &mut quiet).is_err());
}

// --- names --------------------------------------------------------------------------------------

fn parameters(name: &str, settings: &Settings) -> Value {
    Named::new(name, eps("4/255"), settings).unwrap().as_attack().parameters()
}

/// The attacks of a suite, each with its parameters.
fn parts(name: &str, settings: &Settings) -> Vec<(String, Value)> {
    let of = parameters(name, settings);
    let parts = of["attacks"].as_array().unwrap().iter();
    parts.map(|part| (part["attack"].as_str().unwrap().to_string(), part["parameters"].clone())).collect()
}

#[test]
fn every_name_is_an_attack() {
    let pixels = photos(3, 6, 6, 11);
    let model = Toy::mlp(6, 108, 12);
    let mut labels = model.labels(&pixels);
    labels[2] = (labels[2] + 1) % 6;
    let settings = Settings { steps: Some(4), targets: Some(2), queries: Some(9), ..Settings::default() };
    let radius = eps("5/255");
    let names = NAMES.iter().map(|(name, _)| *name).chain(["custom:apgd-ce+square", "custom:cw"]);
    for name in names {
        let named = Named::new(name, radius, &settings).unwrap();
        let attack = named.as_attack();
        assert_eq!(attack.name(), name);
        let is_suite = name.starts_with("autoattack") || name.starts_with("custom:");
        assert_eq!(matches!(named, Named::AutoAttack(_)), is_suite, "{name}");
        assert_eq!(attack.eps(), (name != "cw-l2").then_some(radius), "{name}");
        let task = Classification::new(&model, labels.clone()).unwrap();
        let crafted = attack.craft(&task, &pictures(&pixels), 1, &mut quiet).unwrap();
        assert_eq!(crafted.recipe().attack, name);
        // Of its objective the recipe speaks elsewhere.
        let mut parameters = attack.parameters();
        if let (Some(parameters), None) =
            (parameters.as_object_mut(), crafted.recipe().parameters.get("loss"))
        {
            parameters.remove("loss");
        }
        assert_eq!(crafted.recipe().parameters, parameters);
        let right = task.correct(crafted.pixels(), &[0, 1, 2]).unwrap();
        for (row, outcome) in crafted.outcomes().iter().enumerate() {
            assert_eq!(outcome.fooled, Some(!right[row]), "{name} {row}");
            if name != "cw-l2" {
                assert!(linf(crafted.pixels(), &pixels, row) <= radius.value() + 1e-6, "{name}");
            }
        }
        // Those attacks that climb take wrong pictures too: another model may get them right.
        if name.starts_with("pgd") || name.starts_with("apgd") || name == "cw" {
            assert!(crafted.outcomes()[2].attacked, "{name}");
        }
    }
    for wrong in
        ["", "pdg", "custom:", "custom:pdg", "custom:autoattack", "custom:pgd+", "autoattack-", "Pgd"]
    {
        let error = Named::new(wrong, radius, &settings).err().expect(wrong).to_string();
        let part = wrong.strip_prefix("custom:").unwrap_or(wrong);
        let part = part.strip_prefix("pgd+").unwrap_or(part);
        assert!(error.starts_with("attack: expected pgd, pgd-csr, "), "{error}");
        assert!(error.ends_with(&format!("autoattack-paper or custom:A+B, found {part}")), "{error}");
    }
    assert!(Named::new("custom:pgd+pgd", radius, &settings).is_err());
    assert!(Named::new("custom:pgd+cw-l2", radius, &settings).is_err(), "one has no eps");
}

#[test]
fn the_presets_are_those_of_autoattack() {
    let none = Settings::default();
    let list = |name| parts(name, &none).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(list("autoattack"), ["apgd-ce", "apgd-t", "fab-t", "square"]);
    assert_eq!(list("autoattack-plus"), ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]);
    assert_eq!(list("autoattack-rand"), ["apgd-ce", "apgd-dlr"]);
    assert_eq!(list("autoattack-paper"), ["apgd-ce"]);
    assert_eq!(list("custom:square+fab"), ["square", "fab"]);
    for (suite, apgd, fab) in [("autoattack", 1, 1), ("autoattack-plus", 5, 5), ("autoattack-rand", 1, 0)] {
        let eot = if suite == "autoattack-rand" { 20 } else { 1 };
        for (name, of) in parts(suite, &none) {
            let walk = |of: &Value, restarts: usize| {
                let found = ["steps", "restarts", "eot", "rho"].map(|key| of[key].clone());
                assert_eq!(found, [json!(100), json!(restarts), json!(eot), json!(0.75)], "{suite} {name}");
            };
            match name.as_str() {
                "apgd-ce" => {
                    walk(&of, apgd);
                    assert_eq!(of["loss"], json!({"loss": "cross-entropy"}));
                }
                "apgd-dlr" => {
                    walk(&of, apgd);
                    assert_eq!(of["loss"], json!({"loss": "dlr"}));
                }
                // The original's driver gives the targeted ones one start whatever the preset.
                "apgd-t" => {
                    walk(&of["apgd"], 1);
                    assert_eq!(of["targets"], json!(9));
                }
                "fab-t" => {
                    assert_eq!(
                        [&of["steps"], &of["restarts"], &of["targets"]],
                        [100, 1, 9].map(|n| json!(n)).each_ref()
                    );
                }
                "fab" => {
                    assert_eq!([&of["steps"], &of["restarts"]], [100, fab].map(|n| json!(n)).each_ref());
                    assert_eq!(of["targets"], Value::Null);
                }
                _ => {
                    assert_eq!((name.as_str(), &of["queries"]), ("square", &json!(5000)));
                    assert_eq!(of["loss"]["loss"], "margin");
                }
            }
        }
        let named = Named::new(suite, eps("4/255"), &none).unwrap();
        let Named::AutoAttack(built) = &named else { panic!("a suite") };
        assert_eq!(built.attacks(), list(suite));
    }
    // Alone they are as in `standard`, but FAB, which is not in it.
    let standard = parts("autoattack", &none);
    for (name, of) in &standard {
        assert_eq!(parameters(name, &none), *of);
        assert_eq!(parts(&format!("custom:{name}"), &none), [(name.clone(), of.clone())]);
    }
    assert_eq!(parameters("fab", &none)["restarts"], 5);
    let model = |name: &str| Named::new(name, eps("4/255"), &none).unwrap();
    let expects: Vec<bool> = ["apgd-ce", "custom:apgd-ce"]
        .iter()
        .map(|name| model(name).as_attack().expects_randomness())
        .collect();
    assert_eq!(expects, [false, false]);
}

#[test]
fn settings_reach_the_attacks_that_have_a_use_for_them() {
    let settings = Settings {
        steps: Some(7),
        restarts: Some(3),
        targets: Some(2),
        queries: Some(11),
        stop_when_fooled: true,
    };
    for (name, of) in parts("autoattack-plus", &settings) {
        let walk = if name == "apgd-t" { &of["apgd"] } else { &of };
        if name == "square" {
            assert_eq!(of["queries"], 11);
            continue;
        }
        assert_eq!((&walk["steps"], &walk["restarts"]), (&json!(7), &json!(3)), "{name}");
        assert_eq!(walk["stop_when_fooled"], true, "{name}");
        if name.ends_with("-t") {
            assert_eq!(of["targets"], 2);
        }
    }
    let none = Settings::default();
    for name in ["pgd", "pgd-csr", "pgd-fare", "cw"] {
        let (was, now) = (parameters(name, &none), parameters(name, &settings));
        assert_eq!((&now["steps"], &now["stop_when_fooled"]), (&json!(7), &json!(true)));
        let way = |of: &Value| of["alpha"].as_f64().unwrap() * of["steps"].as_f64().unwrap();
        if name == "pgd-fare" {
            assert_eq!(was["alpha"], now["alpha"]);
        } else {
            assert!((way(&was) - way(&now)).abs() < 1e-12, "{name}: the same way in all");
        }
    }
    for name in ["cw-l2", "apgd-csr"] {
        assert_eq!(parameters(name, &settings)["steps"], 7);
    }
    let unused = |settings: Settings, names: &[&str]| {
        settings.unused_by(&names.iter().map(ToString::to_string).collect::<Vec<_>>())
    };
    let none = || Settings::default();
    for (settings, flag, takes, does_not) in [
        (
            Settings { steps: Some(1), ..none() },
            "--steps",
            vec!["pgd", "cw-l2", "apgd-csr", "autoattack", "custom:square+fab"],
            vec!["square", "custom:square"],
        ),
        (
            Settings { restarts: Some(1), ..none() },
            "--restarts",
            vec!["apgd-ce", "fab", "autoattack-rand", "autoattack-paper", "custom:pgd+apgd-t"],
            vec!["pgd", "cw", "square", "apgd-csr", "custom:pgd+square"],
        ),
        (
            Settings { targets: Some(1), ..none() },
            "--targets",
            vec!["apgd-t", "fab-t", "autoattack", "autoattack-plus", "custom:pgd+fab-t"],
            vec!["fab", "apgd-ce", "autoattack-rand", "autoattack-paper", "custom:fab"],
        ),
        (
            Settings { queries: Some(1), ..none() },
            "--queries",
            vec!["square", "autoattack", "autoattack-plus", "custom:pgd+square"],
            vec!["pgd", "autoattack-rand", "autoattack-paper", "custom:fab"],
        ),
    ] {
        for name in takes {
            assert_eq!(unused(settings.clone(), &[name]), None, "{flag} {name}");
            assert_eq!(unused(settings.clone(), &["cw", name]), None, "one of them is enough");
        }
        for name in &does_not {
            assert_eq!(unused(settings.clone(), &[name]), Some(flag), "{name}");
        }
        assert_eq!(unused(settings.clone(), &does_not), Some(flag));
        assert_eq!(unused(settings, &[]), Some(flag));
    }
    assert_eq!(unused(none(), &["pgd"]), None);
}
