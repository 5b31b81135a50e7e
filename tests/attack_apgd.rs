//! APGD against a replay of its algorithm and against the original on a tiny MLP, on a quadratic
//! of known maximum, and the laws of every attack.

mod fixture;
mod toy;

use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, IndexOp, Tensor};
use fixture::{Fixture, assert_same, values};
use radapt::Result;
use radapt::attack::{
    Apgd, ApgdCsr, ApgdT, Attack, Ball, Classification, Classifier, Crafted, Eps, Evaluation, Goal, Loss,
    Maximise, Objective, OnLoss, Pgd, Recipe, Subject, ThreatKind,
};
use serde_json::{Value, json};
use toy::{
    Toy, assert_lawful, assert_lawful_on_a_clip, assert_progress, count, craft, eps, linf, photos, pictures,
    quiet, random, trained,
};

const LOSSES: [Loss; 2] = [Loss::CrossEntropy, Loss::Dlr];

fn short(eps: Eps, steps: usize) -> Apgd {
    Apgd { steps, ..Apgd::standard(eps) }
}

/// APGD in its ways, on a loss.
fn variants(eps: Eps) -> Vec<Apgd> {
    let apgd = short(eps, 12);
    vec![
        apgd.clone(),
        Apgd { restarts: 3, ..apgd.clone() },
        Apgd { keep_best: true, restarts: 2, ..apgd.clone() },
        Apgd { stop_when_fooled: true, restarts: 2, ..apgd.clone() },
        Apgd { stop_when_fooled: true, keep_best: true, rho: 0.3, ..apgd.clone() },
        Apgd { eot: 2, steps: 5, ..apgd },
    ]
}

fn attacks(eps: Eps) -> Vec<Box<dyn Attack>> {
    let each = variants(eps).into_iter().flat_map(|apgd| -> Vec<Box<dyn Attack>> {
        let targeted = ApgdT { apgd: apgd.clone(), targets: 2 };
        vec![Box::new(apgd.clone().on(Loss::CrossEntropy)), Box::new(apgd.on(Loss::Dlr)), Box::new(targeted)]
    });
    each.collect()
}

// --- the algorithm, step by step ----------------------------------------------------------------

/// The walk of one picture as Croce and Hein describe it, replayed on the places that a run took
/// gradients at: each is to follow from those before.
struct Replay {
    losses: Vec<f64>,
    fooled: Vec<bool>,
    /// After how many steps the size was looked at; whether the loss had risen too seldom, and
    /// whether its best had stood still since a checkpoint that halved nothing.
    checks: Vec<(usize, bool, bool)>,
    step: f64,
}

fn replay(clean: &Tensor, seen: &[Tensor], objective: &dyn Objective, row: usize, apgd: &Apgd) -> Replay {
    let (eps, n) = (apgd.eps.value(), apgd.steps);
    assert_eq!(seen.len(), n + 1, "a gradient per step, and one at the start");
    let center = values(clean);
    let project = |i: usize, v: f64| v.clamp(center[i] - eps, center[i] + eps).clamp(0.0, 1.0);
    let look = |at: &Tensor| {
        let (found, gradient) = objective.values_and_gradient(at, &[row]).unwrap();
        (found.loss[0], found.fooled.is_some_and(|f| f[0]), values(at), values(&gradient))
    };
    let share = |percent: f64| ((percent / 100.0 * n as f64) as usize).max(1);
    let (loss, fooled, mut x, mut g) = look(&seen[0]);
    let mut before = x.clone();
    let mut best = (loss, x.clone(), g.clone());
    let mut found = Replay { losses: vec![loss], fooled: vec![fooled], checks: Vec::new(), step: 2.0 * eps };
    let (mut window, mut since, mut last, mut halved) = (share(22.0), 0, loss, true);
    for i in 0..n {
        let a = if i == 0 { 1.0 } else { 0.75 };
        let next: Vec<f64> = (0..x.len())
            .map(|j| {
                let sign = if g[j] == 0.0 { 0.0 } else { g[j].signum() };
                let z = project(j, x[j] + found.step * sign);
                project(j, x[j] + a * (z - x[j]) + (1.0 - a) * (x[j] - before[j]))
            })
            .collect();
        let taken = values(&seen[i + 1]);
        let off = next.iter().zip(&taken).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 2e-6, "step {i} of {n}: {off}");
        before = x;
        let (loss, fooled, here, gradient) = look(&seen[i + 1]);
        (x, g) = (here, gradient);
        if loss > best.0 {
            best = (loss, x.clone(), g.clone());
        }
        found.losses.push(loss);
        found.fooled.push(fooled);
        since += 1;
        if since == window {
            let recent = &found.losses[i + 1 - window..];
            let rises = recent.windows(2).filter(|pair| pair[1] > pair[0]).count();
            let seldom = rises as f64 <= apgd.rho * window as f64;
            let stuck = !halved && best.0 <= last;
            found.checks.push((i + 1, seldom, stuck));
            (halved, last, since) = (seldom || stuck, best.0, 0);
            if halved {
                found.step /= 2.0;
                (x, g) = (best.1.clone(), best.2.clone());
            }
            window = window.saturating_sub(share(3.0)).max(share(6.0));
        }
    }
    found
}

#[test]
fn the_step_size_is_looked_at_ever_sooner() {
    let of = |steps| short(eps("4/255"), steps).checkpoints();
    assert_eq!(of(100), [22, 41, 57, 70, 80, 87, 93, 99]);
    assert_eq!(of(50), [11, 21, 30, 38, 45]);
    let thirty: Vec<usize> = [6, 11, 15, 18].into_iter().chain(20..=30).collect();
    assert_eq!(of(30), thirty);
    assert_eq!(of(10), (2..=10).collect::<Vec<_>>());
    assert_eq!((of(1), of(0)), (vec![1], vec![]));
    // As the original reckons, in floating point.
    for n in 1..=1000 {
        let share = |part: f64| ((part * n as f64) as usize).max(1);
        let (mut window, mut since, mut want) = (share(0.22), 0, Vec::new());
        for i in 1..=n {
            since += 1;
            if since == window {
                want.push(i);
                (window, since) = (window.saturating_sub(share(0.03)).max(share(0.06)), 0);
            }
        }
        assert_eq!(of(n), want, "{n}");
    }
}

#[test]
fn every_step_is_that_of_the_algorithm() {
    let (mut seldom_at, mut stuck_at, mut kept) = (0, 0, 0);
    for seed in 0..12 {
        let loss = LOSSES[seed as usize % 2];
        let apgd = Apgd {
            only_correct: false,
            keep_best: seed % 3 == 0,
            rho: if seed % 4 < 2 { 0.75 } else { 0.5 },
            ..short(eps("24/255"), [100, 50, 30, 10][seed as usize % 4])
        };
        // Off the walls, so that the start lies on the ball's surface.
        let pixels = random(&[1, 3, 6, 6], 50 + seed, 0.2, 0.8);
        let model = Toy::mlp(6, 108, 100 + 10 * seed);
        let labels = model.labels(&pixels);
        let crafted = craft(&apgd.clone().on(loss), &model, &labels, &pixels, seed);
        let seen = model.seen.lock().unwrap().clone();
        assert!((linf(&seen[0], &pixels, 0) - apgd.eps.value()).abs() < 1e-6);
        let task = Classification::new(&model, labels).unwrap();
        let objective = task.objective(loss).unwrap();
        let found = replay(&pixels, &seen, &objective, 0, &apgd);
        let at: Vec<usize> = found.checks.iter().map(|(at, _, _)| *at).collect();
        assert_eq!(at, apgd.checkpoints());
        let halvings = found.checks.iter().filter(|(_, seldom, stuck)| *seldom || *stuck).count();
        assert_eq!(found.step, 2.0 * apgd.eps.value() / f64::from(1 << halvings));
        assert!(!found.checks[0].2, "the first checkpoint asks for rises alone");
        seldom_at += found.checks.iter().filter(|(_, seldom, _)| *seldom).count();
        stuck_at += found.checks.iter().filter(|(_, seldom, stuck)| *stuck && !*seldom).count();
        kept += found.checks.iter().filter(|(_, seldom, stuck)| !*seldom && !*stuck).count();
        // What is returned: the last of the fooled, or the best of them or of all.
        let outcome = &crafted.outcomes()[0];
        let any = found.fooled.contains(&true);
        assert_eq!(outcome.fooled, Some(any));
        let places = || (0..seen.len()).filter(|&i| found.fooled[i] == any);
        let highest = |best: usize, i| if found.losses[i] > found.losses[best] { i } else { best };
        let returned = match (any, apgd.keep_best) {
            (true, false) => places().next_back(),
            (false, false) => None,
            _ => places().reduce(highest),
        };
        match returned {
            Some(i) => {
                assert_same("returned", crafted.pixels(), &seen[i]);
                assert_eq!(outcome.loss, Some(found.losses[i]));
            }
            None => {
                assert_same("untouched", crafted.pixels(), &pixels);
                assert_eq!(outcome.loss, outcome.clean_loss);
            }
        }
    }
    assert!(seldom_at > 10 && stuck_at > 0 && kept > 10, "{seldom_at} {stuck_at} {kept}");
}

/// The walks of `apgd-t` on one picture that it does not fool, each with its target.
#[test]
fn targets_come_by_falling_clean_logit() {
    for seed in 0..4 {
        let pixels = photos(1, 6, 6, 60 + seed);
        let model = Toy::mlp(12, 108, 200 + 10 * seed);
        let labels = model.labels(&pixels);
        let apgd = Apgd { restarts: 2, ..short(eps("0.02/255"), 10) };
        let attack = ApgdT { apgd: apgd.clone(), ..ApgdT::standard(apgd.eps) };
        let crafted = craft(&attack, &model, &labels, &pixels, seed);
        assert_eq!(crafted.outcomes()[0].fooled, Some(false));
        assert_eq!(crafted.outcomes()[0].gradients, 9 * 2 * 11);
        let seen = model.seen.lock().unwrap().clone();
        let task = Classification::new(&model, labels.clone()).unwrap();
        let logits = values(&task.logits(&pixels).unwrap());
        let mut order: Vec<usize> = (0..12).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        assert_eq!(order[0], labels[0]);
        for (run, walk) in seen.chunks(11).enumerate() {
            let target = order[1 + run / 2];
            let objective = task.targeted(Loss::TargetedDlr, vec![target], Goal::Misclassify).unwrap();
            replay(&pixels, walk, &objective, 0, &apgd);
        }
        // Every run from a start of its own.
        let starts: Vec<&Tensor> = seen.iter().step_by(11).collect();
        for (i, a) in starts.iter().enumerate() {
            assert!(starts.iter().take(i).all(|b| linf(a, b, 0) > 0.0), "{i}");
        }
    }
}

// --- against the original -----------------------------------------------------------------------

#[test]
fn losses_and_answers_are_those_of_the_original() {
    let minimal = Fixture::open("minimal_norm/expected.safetensors");
    let want = Fixture::open("apgd/expected.safetensors");
    let model = Toy::of_fixture(&minimal);
    let pixels = want.tensor("pixels");
    let n = pixels.dim(0).unwrap();
    let labels = model.labels(&pixels);
    let mut worst: f64 = 0.0;
    let mut robust_left = 0;
    for (name, loss) in [("ce", Loss::CrossEntropy), ("dlr", Loss::Dlr)] {
        for text in ["0.02", "0.06"] {
            let of = |what: &str| want.tensor(&format!("{name}.{text}.{what}"));
            let attack = Apgd::standard(eps(text)).on(loss);
            model.seen.lock().unwrap().clear();
            let crafted = craft(&attack, &model, &labels, &pixels, 3);
            let starts: Vec<Tensor> = model.seen.lock().unwrap().drain(..).take(n).collect();
            let starts = Tensor::cat(&starts, 0).unwrap();
            let robust = values(&of("robust"));
            let best = values(&of("loss"));
            let attack = Apgd { keep_best: true, ..Apgd::standard(eps(text)) }.on(loss);
            let highest = craft(&attack, &model, &labels, &pixels, 3);
            for row in 0..n {
                assert!(linf(&starts, &of("start"), row) < 1e-6, "{name} {text} {row}: the start");
                let fooled = robust[row] == 0.0;
                assert_eq!(crafted.outcomes()[row].fooled, Some(fooled), "{name} {text} {row}");
                robust_left += usize::from(!fooled);
                // A wrong picture's ratio has no bound: where its logits come close it is chaos.
                if fooled && loss == Loss::Dlr {
                    continue;
                }
                let off = (highest.outcomes()[row].loss.unwrap() - best[row]).abs();
                worst = worst.max(off / best[row].abs().max(0.1));
                assert!(off <= 1e-3 * best[row].abs() + 1e-4, "{name} {text} {row}: {off}");
            }
        }
    }
    assert!(robust_left > 5 && robust_left < 4 * n - 5, "{robust_left}");
    println!("APGD: best losses within {worst:.1e} of the original's");
}

// --- laws ---------------------------------------------------------------------------------------

#[test]
fn the_laws_of_every_attack_hold() {
    for (classes, seed) in [(4, 20), (12, 30)] {
        for model in [Toy::linear(classes, 105, seed), Toy::mlp(classes, 105, seed)] {
            let pixels = photos(5, 5, 7, seed);
            let mut labels = model.labels(&pixels);
            labels[1] = (labels[1] + 1) % classes;
            for eps in [eps("0"), eps("3/255"), eps("0.2")] {
                for attack in attacks(eps) {
                    assert_lawful(attack.as_ref(), &model, &pixels, &labels);
                }
            }
            for attack in attacks(eps("6/255")) {
                assert_progress(attack.as_ref(), &model, &pixels, &labels);
            }
        }
    }
}

#[test]
fn a_tiny_clip_is_attacked_lawfully_with_and_without_its_defence() {
    let apgd = |steps| Apgd { stop_when_fooled: steps > 6, ..short(eps("16/255"), steps) };
    assert!(assert_lawful_on_a_clip(&apgd(6).on(Loss::CrossEntropy)) > 0);
    assert!(assert_lawful_on_a_clip(&apgd(7).on(Loss::Dlr)) > 0);
    assert!(assert_lawful_on_a_clip(&ApgdT { apgd: apgd(6), targets: 2 }) > 0);
}

/// As it is, stopping early, keeping the best, and both: for every loss.
fn ways(apgd: Apgd) -> [[Box<dyn Attack>; 4]; 3] {
    let of = |loss: Loss| {
        let flags = [(false, false), (false, true), (true, false), (true, true)];
        flags.map(|(keep_best, stop_when_fooled)| -> Box<dyn Attack> {
            let apgd = Apgd { keep_best, stop_when_fooled, ..apgd.clone() };
            match loss {
                Loss::TargetedDlr => Box::new(ApgdT { apgd, targets: 3 }),
                _ => Box::new(apgd.on(loss)),
            }
        })
    };
    [of(Loss::CrossEntropy), of(Loss::Dlr), of(Loss::TargetedDlr)]
}

#[test]
fn every_way_fools_the_same_pictures() {
    let pixels = photos(10, 6, 6, 7);
    let model = Toy::mlp(8, 108, 8);
    let labels = model.labels(&pixels);
    let (mut fooled, mut robust, mut changed) = (0, 0, 0);
    for text in ["1/255", "3/255", "8/255"] {
        for ways in ways(Apgd { restarts: 2, ..short(eps(text), 30) }) {
            let [plain, early, best, best_early] =
                &ways.each_ref().map(|way| craft(way.as_ref(), &model, &labels, &pixels, 3));
            for row in 0..10 {
                let [p, e, b, be] = [plain, early, best, best_early].map(|c| &c.outcomes()[row]);
                let answer = p.fooled.unwrap();
                assert!([e, b, be].iter().all(|o| o.fooled == Some(answer)), "{text} {row}");
                assert!(e.gradients <= p.gradients && be.gradients == e.gradients);
                assert_eq!(b.gradients, p.gradients);
                let moved = |c: &Crafted| linf(c.pixels(), &pixels, row) > 0.0;
                // Left alone where the original leaves it, moved where the best is kept.
                assert_eq!((moved(plain), moved(early)), (answer, answer));
                changed += usize::from(!answer && moved(best));
                if answer {
                    fooled += 1;
                    // The first that is fooled, whichever is returned.
                    let [a, b] = [early, best_early].map(|c| c.pixels().i(row).unwrap());
                    assert_same("stopped", &a, &b);
                } else {
                    robust += 1;
                }
            }
        }
    }
    assert!(fooled > 10 && robust > 10 && changed > 10, "{fooled} {robust} {changed}");
}

#[test]
fn restarts_are_spent_on_what_is_left_alone() {
    let pixels = photos(6, 6, 6, 9);
    let model = Toy::mlp(4, 108, 10);
    let mut labels = model.labels(&pixels);
    labels[2] = (labels[2] + 1) % 4;
    let apgd = |text, restarts| Apgd { restarts, ..short(eps(text), 7) };
    let run = |attack: &dyn Attack, each: usize| {
        let all = model.backwards.swap(0, Ordering::Relaxed);
        let crafted = craft(attack, &model, &labels, &pixels, 0);
        for (row, outcome) in crafted.outcomes().iter().enumerate() {
            assert_eq!(outcome.gradients, if row == 2 { 0 } else { each }, "{row}");
        }
        assert_eq!(model.backwards.load(Ordering::Relaxed), 5 * each, "{all}");
    };
    // Out of reach: all restarts, and all 3 targets there are of 9.
    run(&apgd("0.01/255", 3).on(Loss::CrossEntropy), 3 * 8);
    run(&ApgdT { apgd: apgd("0.01/255", 3), targets: 9 }, 3 * 3 * 8);
    run(&Apgd { eot: 4, ..apgd("0.01/255", 2) }.on(Loss::Dlr), 4 * 2 * 8);
    // Within reach: the first is enough.
    run(&apgd("0.5", 3).on(Loss::CrossEntropy), 8);
    run(&ApgdT { apgd: apgd("0.5", 3), targets: 9 }, 8);
}

#[test]
fn a_later_start_can_fool_what_the_first_does_not() {
    let pixels = photos(40, 6, 6, 19);
    let model = Toy::mlp(12, 108, 20);
    let labels = model.labels(&pixels);
    let fooled = |restarts| {
        // Without steps: the starts alone, which differ most.
        let attack = Apgd { restarts, ..short(eps("0.2"), 0) }.on(Loss::CrossEntropy);
        let crafted = craft(&attack, &model, &labels, &pixels, 0);
        crafted.outcomes().iter().map(|o| o.fooled.unwrap()).collect::<Vec<_>>()
    };
    let (one, ten) = (fooled(1), fooled(10));
    assert!(one.iter().zip(&ten).all(|(one, ten)| one <= ten));
    assert!(count(&ten) > count(&one), "{} {}", count(&one), count(&ten));
}

#[test]
fn a_targeted_walk_ends_at_any_wrong_class() {
    // Class 1 is the target, the second likeliest; where it grows, class 2 grows three times as
    // fast, and overtakes both.
    let way = random(&[1, 48], 1, -1.0, 1.0);
    let weights: Vec<Tensor> = [0.0, 1.0, 3.0, 0.0].iter().map(|by| (&way * *by).unwrap()).collect();
    let pixels = random(&[1, 3, 4, 4], 2, 0.3, 0.7);
    let here: f64 = values(&way).iter().zip(values(&pixels)).map(|(w, x)| w * x).sum();
    let bias = [0.0, -0.5 - here, -1.0 - 3.0 * here, -3.0].map(|b| b as f32);
    let bias = Tensor::new(&bias, &Device::Cpu).unwrap();
    let model = Toy::affine(Tensor::cat(&weights, 0).unwrap(), bias);
    let task = Classification::new(&model, vec![0]).unwrap();
    for stop_when_fooled in [false, true] {
        let apgd = Apgd { stop_when_fooled, ..short(eps("0.1"), 20) };
        let crafted = craft(&ApgdT { apgd, targets: 1 }, &model, &[0], &pixels, 1);
        assert_eq!(crafted.outcomes()[0].fooled, Some(true));
        assert_eq!(task.predictions(crafted.pixels()).unwrap(), [2]);
    }
}

#[test]
fn with_eps_0_nothing_changes() {
    let pixels = photos(4, 6, 6, 5);
    let model = Toy::mlp(4, 108, 6);
    let labels = model.labels(&pixels);
    for attack in attacks(eps("0")) {
        let crafted = craft(attack.as_ref(), &model, &labels, &pixels, 0);
        assert_same("eps 0", crafted.pixels(), &pixels);
    }
    let csr = craft(&ApgdCsr::new(eps("0")).attack(), &model, &labels, &pixels, 0);
    assert_same("eps 0", csr.pixels(), &pixels);
}

#[test]
fn wrong_pictures_are_attacked_where_that_is_asked_for_and_stay_wrong() {
    let (mut walked, mut kept) = (0, 0);
    for seed in 0..10 {
        let pixels = photos(6, 6, 6, 80 + seed);
        let model = Toy::mlp(5, 108, 400 + 10 * seed);
        // The second likeliest class: wrong, and close to right.
        let logits = Classification::new(&model, vec![0; 6]).unwrap().logits(&pixels).unwrap();
        let second = |z: Vec<f32>| {
            let mut order: Vec<usize> = (0..5).collect();
            order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
            order[1]
        };
        let labels: Vec<usize> = logits.to_vec2::<f32>().unwrap().into_iter().map(second).collect();
        let task = Classification::new(&model, labels.clone()).unwrap();
        // A gradient that leads the wrong way: the label wins wherever the walk goes.
        let away = Times::new(&model, [-1.0; 2]);
        let misled = Classification::new(&away, labels.clone()).unwrap();
        for keep_best in [false, true] {
            let apgd = Apgd { only_correct: false, keep_best, ..short(eps("60/255"), 12) };
            for attack in [
                Box::new(apgd.clone().on(Loss::CrossEntropy)) as Box<dyn Attack>,
                Box::new(ApgdT { apgd, targets: 1 }),
            ] {
                for task in [&task, &misled] {
                    let crafted = attack.craft(task, &pictures(&pixels), 0, &mut quiet).unwrap();
                    let rows: Vec<usize> = (0..6).collect();
                    assert_eq!(task.correct(crafted.pixels(), &rows).unwrap(), [false; 6]);
                    for (row, outcome) in crafted.outcomes().iter().enumerate() {
                        assert!(outcome.attacked && outcome.gradients == 13);
                        assert_eq!(outcome.fooled, Some(true));
                        let moved = linf(crafted.pixels(), &pixels, row) > 0.0;
                        walked += usize::from(moved);
                        kept += usize::from(!moved);
                    }
                }
            }
        }
    }
    assert!(walked > 20 && kept > 5, "{walked} {kept}");
}

// --- how strong it is ---------------------------------------------------------------------------

/// -|x - c|^2 for every picture; no goal.
struct Quadratic {
    subject: Subject,
    /// `(B, 3, H, W)`.
    top: Tensor,
}

impl Objective for Quadratic {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn pictures(&self) -> usize {
        self.top.dim(0).unwrap()
    }

    fn describe(&self) -> Value {
        json!({ "loss": "quadratic" })
    }

    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
        Ok(self.values_and_gradient(pixels, rows)?.0)
    }

    fn values_and_gradient(&self, pixels: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
        let away = (pixels - self.top.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?)?;
        let loss = values(&away.sqr()?.flatten_from(1)?.sum(1)?).into_iter().map(|v| -v).collect();
        Ok((Evaluation { loss, fooled: None }, (away * -2.0)?))
    }
}

#[test]
fn the_top_of_a_quadratic_is_found() {
    let pixels = random(&[4, 3, 5, 5], 30, 0.0, 1.0);
    // Tops in the ball and far out of it, out of the box too: mostly a corner.
    let top = (&pixels + random(&[4, 3, 5, 5], 31, -1.0, 1.0)).unwrap();
    let objective = Quadratic { subject: Subject::undefended("quadratic"), top };
    let radius = eps("0.1");
    let corner = Ball::new(&pixels, radius).unwrap().project(&objective.top).unwrap();
    let rows: Vec<usize> = (0..4).collect();
    let want = objective.values(&corner, &rows).unwrap().loss;
    for apgd in [
        Apgd::standard(radius),
        // Without a goal these say nothing.
        Apgd { keep_best: true, stop_when_fooled: true, only_correct: false, ..Apgd::standard(radius) },
        Apgd { restarts: 2, ..short(radius, 50) },
    ] {
        let crafted = apgd.maximise(&objective, &pictures(&pixels), 0, &mut quiet).unwrap();
        let found = objective.values(crafted.pixels(), &rows).unwrap().loss;
        for row in 0..4 {
            let outcome = &crafted.outcomes()[row];
            assert_eq!((outcome.fooled, outcome.attacked, outcome.loss), (None, true, Some(found[row])));
            assert!(outcome.clean_loss.unwrap() < found[row]);
            assert_eq!(outcome.gradients, apgd.restarts * (apgd.steps + 1));
            let short_of = want[row] - found[row];
            assert!((-1e-5..1e-3).contains(&short_of), "{row}: {short_of}");
        }
    }
    // At the top already: the clean picture is the best.
    let objective = Quadratic { top: pixels.clone(), ..objective };
    let crafted = short(radius, 5).maximise(&objective, &pictures(&pixels), 0, &mut quiet).unwrap();
    assert_same("at the top", crafted.pixels(), &pixels);
    assert!(crafted.outcomes().iter().all(|o| o.loss == Some(0.0) && o.clean_loss == Some(0.0)));
}

#[test]
fn it_fools_no_fewer_than_ten_steps_of_pgd() {
    let (mut apgd, mut pgd, mut all) = (0, 0, 0);
    for seed in 0..6 {
        let pixels = photos(20, 6, 6, 90 + seed);
        let model = Toy::mlp(10, 108, 500 + 10 * seed);
        let labels = model.labels(&pixels);
        for text in ["3/255", "6/255"] {
            let fooled = |attack: &dyn Attack| {
                let crafted = craft(attack, &model, &labels, &pixels, 0);
                crafted.outcomes().iter().filter(|o| o.fooled == Some(true)).count()
            };
            let stronger = fooled(&Apgd::standard(eps(text)).on(Loss::CrossEntropy));
            let weaker = fooled(&Pgd::new(eps(text)).on(Loss::CrossEntropy));
            assert!(stronger >= weaker, "{seed} {text}: {stronger} {weaker}");
            (apgd, pgd, all) = (apgd + stronger, pgd + weaker, all + 20);
        }
    }
    println!("fooled of {all}: {apgd} by APGD-CE with 100 steps, {pgd} by PGD with 10");
    assert!(pgd > 0 && apgd < all);
}

#[test]
fn a_trained_clip_is_fooled_no_less_than_by_pgd() {
    let Some(trained) = trained(12) else { return };
    let task = trained.task();
    let rows: Vec<usize> = (0..12).collect();
    let clean = task.correct(&trained.pixels, &rows).unwrap();
    let robust = |attack: &dyn Attack| {
        let crafted = attack.craft(&task, &trained.pictures(), 0, &mut quiet).unwrap();
        count(crafted.score(&task, ThreatKind::Adaptive, &clean).unwrap().robust())
    };
    let apgd = Apgd { stop_when_fooled: true, ..short(eps("0.5/255"), 30) };
    let apgd = robust(&apgd.on(Loss::CrossEntropy));
    let pgd = robust(&Pgd { stop_when_fooled: true, ..Pgd::new(eps("0.5/255")) }.on(Loss::CrossEntropy));
    println!(
        "at 0.5/255 (adaptive, undefended): {} right, {pgd} after PGD, {apgd} after APGD-CE",
        count(&clean)
    );
    assert!(apgd <= pgd && pgd <= count(&clean));
}

// --- gradients that are odd, random or not there ------------------------------------------------

#[test]
fn odd_gradients_and_logits_are_survived() {
    let pixels = photos(4, 6, 6, 13);
    let mut model = Toy::mlp(4, 108, 14);
    let labels = model.labels(&pixels);
    model.broken = vec![(0, f32::NAN), (50, f32::INFINITY), (107, f32::NEG_INFINITY)];
    for attack in attacks(eps("0.3")) {
        assert_lawful(attack.as_ref(), &model, &pixels, &labels);
    }
    let crafted = craft(&short(eps("0.3"), 10).on(Loss::CrossEntropy), &model, &labels, &pixels, 0);
    for outcome in crafted.outcomes() {
        assert_eq!((outcome.nan_gradients, outcome.gradients, outcome.zero_gradient), (11, 11, false));
    }
    // No gradient at all: a walk that stays at its start, and says so.
    for value in [0.0, f32::NAN] {
        model.broken = (0..108).map(|i| (i, value)).collect();
        let mut wrong = labels.clone();
        wrong[3] = (wrong[3] + 1) % 4;
        let crafted = craft(&short(eps("2/255"), 10).on(Loss::Dlr), &model, &wrong, &pixels, 0);
        let zero: Vec<bool> = crafted.outcomes().iter().map(|o| o.zero_gradient).collect();
        assert_eq!(zero, [true, true, true, false]);
        let seen = std::mem::take(&mut *model.seen.lock().unwrap());
        let last = &seen[seen.len() - 3..];
        (0..3).for_each(|i| assert_same("no way to go", &last[i], &seen[seen.len() - 33 + i]));
        let csr = craft(&ApgdCsr::new(eps("2/255")).attack(), &model, &labels, &pixels, 0);
        assert!(csr.outcomes().iter().all(|o| o.zero_gradient));
        model.seen.lock().unwrap().clear();
    }
    model.broken = (0..108).map(|i| (i, f32::MAX)).collect();
    for attack in attacks(eps("0.3")) {
        assert_lawful(attack.as_ref(), &model, &pixels, &labels);
    }
    model.broken = Vec::new();
    // A logit that is no number somewhere: the clean picture counts as wrong, or the walk meets it.
    for above in [-1.0, 0.3, 0.6] {
        model.nan_logit = Some((1, above));
        for attack in attacks(eps("20/255")) {
            assert_lawful(attack.as_ref(), &model, &pixels, &labels);
        }
    }
}

/// Gradients times one of two numbers, in turn.
struct Times<'a> {
    inner: &'a Toy,
    factors: [f64; 2],
    passes: AtomicUsize,
}

impl<'a> Times<'a> {
    fn new(inner: &'a Toy, factors: [f64; 2]) -> Self {
        Self { inner, factors, passes: AtomicUsize::new(0) }
    }
}

impl Classifier for Times<'_> {
    fn subject(&self) -> &Subject {
        self.inner.subject()
    }

    fn classes(&self) -> usize {
        self.inner.classes()
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        self.inner.logits(pixels)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let factor = self.factors[self.passes.fetch_add(1, Ordering::Relaxed) % 2];
        let (logits, gradients) = self.inner.logits_and_gradients(pixels, cotangents)?;
        Ok((logits, gradients.iter().map(|g| g * factor).collect::<candle_core::Result<_>>()?))
    }
}

#[test]
fn random_gradients_are_averaged() {
    let pixels = photos(12, 6, 6, 15);
    let model = Toy::mlp(5, 108, 16);
    let labels = model.labels(&pixels);
    // Three times too long, then of the wrong sign: the sum is right.
    let flipping = || Times::new(&model, [3.0, -1.0]);
    let apgd = |eot| Apgd { eot, ..short(eps("3/255"), 20) };
    let attacks: [fn(Apgd) -> Box<dyn Attack>; 3] = [
        |apgd| Box::new(apgd.on(Loss::CrossEntropy)),
        |apgd| Box::new(apgd.on(Loss::Dlr)),
        |apgd| Box::new(ApgdT { apgd, targets: 2 }),
    ];
    for attack in attacks {
        let want = craft(attack(apgd(1)).as_ref(), &model, &labels, &pixels, 0);
        let single = craft(attack(apgd(1)).as_ref(), &flipping(), &labels, &pixels, 0);
        let pair = craft(attack(apgd(2)).as_ref(), &flipping(), &labels, &pixels, 0);
        assert_same("averaged", pair.pixels(), want.pixels());
        let moved = (0..12).filter(|&row| linf(single.pixels(), want.pixels(), row) > 0.0).count();
        assert!(moved > 0, "one pass alone leads astray");
        for (pair, want) in pair.outcomes().iter().zip(want.outcomes()) {
            assert_eq!(pair.gradients, 2 * want.gradients);
        }
        assert!(!attack(apgd(1)).expects_randomness() && attack(apgd(2)).expects_randomness());
    }
}

// --- parameters ---------------------------------------------------------------------------------

#[test]
fn a_ratio_needs_its_classes() {
    let pixels = photos(3, 6, 6, 17);
    for classes in [2, 3, 4] {
        let model = Toy::mlp(classes, 108, 18);
        let labels = model.labels(&pixels);
        let task = Classification::new(&model, labels.clone()).unwrap();
        let apgd = short(eps("2/255"), 5);
        let dlr = apgd.clone().on(Loss::Dlr);
        let targeted = ApgdT { apgd: apgd.clone(), targets: 9 };
        assert_lawful(&apgd.on(Loss::CrossEntropy), &model, &pixels, &labels);
        for (attack, least) in [(&dlr as &dyn Attack, 3), (&targeted, 4)] {
            assert_eq!(attack.fewest_classes(), least);
            if classes >= least {
                assert_lawful(attack, &model, &pixels, &labels);
                continue;
            }
            let error = attack.craft(&task, &pictures(&pixels), 0, &mut quiet).err().unwrap().to_string();
            let want = format!("classes: expected at least {least} for this loss, found {classes}");
            assert_eq!(error, want);
        }
    }
}

#[test]
fn parameters_are_checked_and_recorded() {
    let pixels = photos(2, 6, 6, 15);
    let model = Toy::linear(5, 108, 16);
    let task = Classification::new(&model, vec![0, 1]).unwrap();
    let base = short(eps("4/255"), 2);
    let run = |attack: &dyn Attack| attack.craft(&task, &pictures(&pixels), 7, &mut quiet);
    for apgd in [
        Apgd { restarts: 0, ..base.clone() },
        Apgd { eot: 0, ..base.clone() },
        Apgd { rho: -0.1, ..base.clone() },
        Apgd { rho: 1.1, ..base.clone() },
        Apgd { rho: f64::NAN, ..base.clone() },
    ] {
        assert!(run(&apgd.clone().on(Loss::CrossEntropy)).is_err(), "{apgd:?}");
        assert!(run(&ApgdT { apgd, targets: 9 }).is_err());
    }
    assert!(run(&ApgdT { apgd: base.clone(), targets: 0 }).is_err());
    assert!(run(&ApgdCsr { steps: 0, ..ApgdCsr::new(base.eps) }.attack()).is_err());
    let standard = Apgd::standard(base.eps);
    assert_eq!((standard.steps, standard.restarts, standard.eot, standard.rho), (100, 1, 1, 0.75));
    assert!(standard.only_correct && !standard.keep_best && !standard.stop_when_fooled);
    let targeted = ApgdT::standard(base.eps);
    assert_eq!((&targeted.apgd, targeted.targets, Attack::targets(&targeted)), (&standard, 9, Some(9)));
    for (attack, name) in [
        (Box::new(base.clone().on(Loss::CrossEntropy)) as Box<dyn Attack>, "apgd-ce"),
        (Box::new(base.clone().on(Loss::Dlr)), "apgd-dlr"),
        (Box::new(ApgdT { apgd: base.clone(), targets: 2 }), "apgd-t"),
        (Box::new(ApgdCsr::new(base.eps).attack()), "apgd-csr"),
    ] {
        let crafted = run(attack.as_ref()).unwrap();
        let recipe = crafted.recipe();
        assert_eq!((attack.name(), recipe.attack.as_str()), (name, name));
        assert_eq!((recipe.seed, recipe.eps, attack.eps()), (7, Some(base.eps), Some(base.eps)));
        assert_eq!(serde_json::from_value::<Recipe>(json!(recipe)).unwrap(), *recipe);
    }
    let read: ApgdT = serde_json::from_value(Attack::parameters(&targeted)).unwrap();
    assert_eq!(read, targeted);
    // Without steps the start alone is looked at.
    let crafted = run(&short(eps("0.9"), 0).on(Loss::CrossEntropy)).unwrap();
    assert!(crafted.outcomes().iter().all(|o| !o.attacked || o.gradients == 1));
}

// --- what is published as APGD ------------------------------------------------------------------

#[test]
fn csr_halves_at_fixed_steps_and_never_looks_at_its_last_update() {
    assert_eq!(ApgdCsr::new(eps("4/255")).halvings(), [6, 14, 23]);
    for seed in 0..4 {
        let pixels = photos(1, 6, 6, 110 + seed);
        let model = Toy::mlp(6, 108, 600 + 10 * seed);
        let labels = model.labels(&pixels);
        let csr = ApgdCsr::new(eps("10/255"));
        let crafted = craft(&csr.clone().attack(), &model, &labels, &pixels, 0);
        // One for the clean answer; every other is a gradient.
        assert_eq!(model.forwards.swap(0, Ordering::Relaxed), 1);
        let seen = model.seen.lock().unwrap().clone();
        assert_eq!((seen.len(), crafted.outcomes()[0].gradients), (30, 30));
        let task = Classification::new(&model, labels).unwrap();
        let objective = task.objective(Loss::CrossEntropy).unwrap();
        let center = values(&pixels);
        let radius = csr.eps.value();
        let mut step = 2.0 * radius;
        let mut best = (f64::NEG_INFINITY, 0);
        for (i, here) in seen.iter().enumerate() {
            let (found, gradient) = objective.values_and_gradient(here, &[0]).unwrap();
            if found.loss[0] > best.0 {
                best = (found.loss[0], i);
            }
            if [6, 14, 23].contains(&i) {
                step /= 2.0;
            }
            let Some(next) = seen.get(i + 1) else { continue };
            let (x, g, next) = (values(here), values(&gradient), values(next));
            for j in 0..x.len() {
                let sign = if g[j] == 0.0 { 0.0 } else { g[j].signum() };
                let want = (x[j] + step * sign).clamp(center[j] - radius, center[j] + radius).clamp(0.0, 1.0);
                assert!((want - next[j]).abs() < 1e-6, "{seed} {i} {j}");
            }
        }
        assert_same("the highest loss", crafted.pixels(), &seen[best.1]);
        assert_eq!(crafted.outcomes()[0].loss, Some(best.0));
    }
}

#[test]
fn csr_keeps_to_the_ball_and_the_box_and_tells_what_is_fooled() {
    let pixels = photos(6, 6, 6, 21);
    let mut model = Toy::mlp(5, 108, 22);
    let mut labels = model.labels(&pixels);
    labels[0] = (labels[0] + 1) % 5;
    let keys = pictures(&pixels).keys().to_vec();
    for (nan, broken) in [(None, vec![]), (Some((1, 0.4)), vec![(3, f32::NAN)])] {
        (model.nan_logit, model.broken) = (nan, broken);
        for text in ["0", "1/255", "6/255", "0.3"] {
            let attack: OnLoss<ApgdCsr> = ApgdCsr::new(eps(text)).attack();
            let crafted = craft(&attack, &model, &labels, &pixels, 4);
            let task = Classification::new(&model, labels.clone()).unwrap();
            let right = task.correct(crafted.pixels(), &[0, 1, 2, 3, 4, 5]).unwrap();
            for (row, outcome) in crafted.outcomes().iter().enumerate() {
                assert!(linf(crafted.pixels(), &pixels, row) <= attack.maximise.eps.value() + 1e-6);
                // It attacks wrong pictures as well.
                assert!(outcome.attacked && outcome.gradients == 30, "{row}");
                assert_eq!(outcome.fooled, Some(!right[row]), "{text} {row}");
                // One in every gradient, or all where the loss is none.
                let odd = outcome.nan_gradients;
                assert!(if nan.is_some() { (30..=30 * 108).contains(&odd) } else { odd == 0 }, "{odd}");
                let task = Classification::new(&model, vec![labels[row]]).unwrap();
                let alone = pixels.narrow(0, row, 1).unwrap();
                let alone = radapt::attack::Pictures::new(&alone, vec![keys[row]]).unwrap();
                let alone = attack.craft(&task, &alone, 4, &mut quiet).unwrap();
                assert_same("alone", alone.pixels(), &crafted.pixels().narrow(0, row, 1).unwrap());
            }
            let again = craft(&attack, &model, &labels, &pixels, 4);
            assert_same("same seed", again.pixels(), crafted.pixels());
            let chosen = pictures(&pixels).only(vec![true, false, true, false, false, true]).unwrap();
            let some = attack.craft(&task, &chosen, 4, &mut quiet).unwrap();
            for row in 0..6 {
                let want = if chosen.rows().contains(&row) { crafted.pixels() } else { &pixels };
                assert_same("chosen", &some.pixels().i(row).unwrap(), &want.i(row).unwrap());
            }
        }
    }
}
