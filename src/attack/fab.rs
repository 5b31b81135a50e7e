use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crafted::Finished;
use super::loss::{rows as logit_rows, wins};
use super::objective::in_batches;
use super::pictures::select;
use super::projection::linf_step;
use super::{
    Attack, Classification, Crafted, Eps, Evaluation, Pictures, Progress, Recipe, picture_rng, uniform,
};
use crate::{Error, Result};

/// Keeps quotients finite; the values of Croce and Hein's code.
const TINY: f64 = 1e-12;
const SHORTEST: f64 = 1e-8;

/// FAB in the Linf norm (Croce and Hein 2020): looks for the nearest picture the model gets wrong.
///
/// Every step takes the classes' boundaries for hyperplanes, goes onto the nearest one from where
/// it is and from the clean picture ([`Fab::eta`] times as far, and inside the box), and mixes the
/// two; beyond the boundary it falls back towards the clean picture. The radius plays no part in
/// that but for where restarts begin. It says whether what was found counts: a picture is returned
/// that is wrong within `eps`, or else the clean one. Pictures that are wrong from the beginning
/// are left alone.
///
/// With [`Fab::targets`] it is FAB-T, which looks at one other class at a time and needs one
/// gradient a step. Otherwise it needs K - 1, and holds them all at once: for a thousand classes
/// FAB-T is meant. A step costs a forward pass more, as nearly every one ends beyond the boundary,
/// and the next begins elsewhere.
///
/// What it finds lies so close to the boundary that rounding to 8 bits undoes much of it.
///
/// [`super::Outcome::distance`] is the Linf distance of the nearest wrong picture found, within `eps` or
/// not. What is within `eps` after one target or restart takes no part in the next, as in the
/// original, so the distance is then that run's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fab {
    /// The radius within which a picture counts.
    pub eps: Eps,
    /// Steps of each run.
    pub steps: usize,
    /// Runs per target: the first from the clean picture, the others from x + t eps / (2 max |t|),
    /// t uniform.
    pub restarts: usize,
    /// The most that the step from the clean picture weighs in the mix.
    pub alpha_max: f64,
    /// How far beyond the hyperplane: 1 is onto it.
    pub eta: f64,
    /// What remains of the way from the clean picture after a step beyond the boundary.
    pub beta: f64,
    /// `None` is FAB. `Some(n)` is FAB-T: in turn the n classes that follow the label in the clean
    /// picture's logits, K - 1 where there are fewer.
    pub targets: Option<usize>,
    /// Leave a picture as soon as it is wrong within `eps`. That changes no answer to whether one
    /// was found, but distances are no longer the smallest.
    pub stop_when_fooled: bool,
}

impl Fab {
    /// FAB-T as in AutoAttack's `standard`: 9 targets, 100 steps, one run each.
    pub fn standard(eps: Eps) -> Self {
        Self { restarts: 1, targets: Some(9), ..Self::plus(eps) }
    }

    /// FAB as in AutoAttack's `plus`: 5 runs of 100 steps. With `targets: Some(9)` it is the
    /// FAB-T there.
    pub fn plus(eps: Eps) -> Self {
        Self {
            eps,
            steps: 100,
            restarts: 5,
            alpha_max: 0.1,
            eta: 1.05,
            beta: 0.9,
            targets: None,
            stop_when_fooled: false,
        }
    }

    fn check(&self, classes: usize) -> Result<()> {
        for (what, value, most) in
            [("alpha_max", self.alpha_max, 1.0), ("eta", self.eta, f64::MAX), ("beta", self.beta, 1.0)]
        {
            if !(0.0..=most).contains(&value) {
                let expected = if most > 1.0 { "a number from 0" } else { "0 to 1" };
                return Err(Error::argument(what, expected, value));
            }
        }
        for (what, value) in [("restarts", Some(self.restarts)), ("targets", self.targets)] {
            if value == Some(0) {
                return Err(Error::argument(what, "at least 1", 0));
            }
        }
        if classes < 2 {
            return Err(Error::argument("classes", "at least 2 for this attack", classes));
        }
        Ok(())
    }

    /// Where a step from `x1` leads; `x0` is the clean picture.
    fn step(&self, x1: &[f32], x0: &[f32], plane: &Plane) -> Vec<f32> {
        let back: f64 = (plane.weights.iter().zip(x1.iter().zip(x0)))
            .map(|(&w, (&x1, &x0))| f64::from(w) * (f64::from(x1) - f64::from(x0)))
            .sum();
        let here = linf_step(x1, &plane.weights, plane.gap);
        let clean = linf_step(x0, &plane.weights, plane.gap + back);
        let [near, far] = [&here, &clean].map(|d| norm(d.iter().copied()).max(SHORTEST));
        let alpha = (near / (near + far)).min(self.alpha_max) as f32;
        let eta = self.eta as f32;
        let mix = |i: usize| {
            let (near, far) = (x1[i] + eta * here[i], x0[i] + eta * clean[i]);
            (near + alpha * (far - near)).clamp(0.0, 1.0)
        };
        (0..x1.len()).map(mix).collect()
    }
}

/// The largest |v|.
fn norm(values: impl Iterator<Item = f32>) -> f64 {
    f64::from(values.fold(0f32, |most, v| most.max(v.abs())))
}

/// The boundary between the label and another class, as the gradient has it: where <weights, d> =
/// gap.
struct Plane {
    /// By the dual norm, how far away it is.
    distance: f64,
    gap: f64,
    weights: Vec<f32>,
}

impl Plane {
    /// From the logit of the other class less the label's, and the gradient of that; also the
    /// number of entries that were NaN or infinite, and taken for 0.
    fn new(difference: f64, gradient: &[f32]) -> (Self, u64) {
        let weights: Vec<f32> = gradient.iter().map(|&g| if g.is_finite() { g } else { 0.0 }).collect();
        let odd = gradient.iter().filter(|g| !g.is_finite()).count();
        let size: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
        let distance = difference.abs() / (size + TINY);
        let distance = if distance.is_nan() { f64::INFINITY } else { distance };
        (Self { distance, gap: -difference, weights }, odd as u64)
    }
}

/// One run: the pictures still in it. Tensors are `(R, 3, H, W)`.
struct Run<'a> {
    task: &'a Classification<'a>,
    /// Their numbers among all pictures.
    rows: Vec<usize>,
    labels: Vec<usize>,
    /// FAB-T's class per picture.
    targets: Option<Vec<usize>>,
    clean: Tensor,
    pixels: Tensor,
    /// The nearest wrong picture so far, `(1, 3, H, W)`, and its distance.
    best: Vec<Option<(f64, Tensor)>>,
}

impl Run<'_> {
    /// Gradients a picture needs per step.
    fn gradients(&self) -> usize {
        if self.targets.is_some() { 1 } else { self.task.classifier().classes() - 1 }
    }

    /// The `j`-th class that picture `i` is compared with.
    fn other(&self, i: usize, j: usize) -> usize {
        match &self.targets {
            Some(targets) => targets[i],
            None => j + usize::from(j >= self.labels[i]),
        }
    }

    /// The nearest boundary of each of the pictures `at`, at `pixels`, and the odd entries.
    fn planes(&self, pixels: &Tensor, at: &[usize]) -> Result<Vec<(Plane, u64)>> {
        let classes = self.task.classifier().classes();
        let (logits, gradients) = self.task.classifier().logits_and_gradients(pixels, &mut |logits| {
            let cotangent = |j: usize| {
                let mut values = vec![0f32; at.len() * classes];
                for (n, &i) in at.iter().enumerate() {
                    values[n * classes + self.other(i, j)] = 1.0;
                    values[n * classes + self.labels[i]] = -1.0;
                }
                Ok(Tensor::from_vec(values, (at.len(), classes), logits.device())?)
            };
            (0..self.gradients()).map(cotangent).collect()
        })?;
        let logits = logit_rows(&logits)?;
        let mut nearest: Vec<Option<(Plane, u64)>> = at.iter().map(|_| None).collect();
        for (j, gradient) in gradients.into_iter().enumerate() {
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            let each = gradient.len() / at.len().max(1);
            for (n, (&i, gradient)) in at.iter().zip(gradient.chunks_exact(each)).enumerate() {
                let difference = logits[n][self.other(i, j)] - logits[n][self.labels[i]];
                let (plane, odd) = Plane::new(difference, gradient);
                nearest[n] = Some(match nearest[n].take() {
                    Some((best, before)) if best.distance <= plane.distance => (best, before + odd),
                    Some((_, before)) => (plane, before + odd),
                    None => (plane, odd),
                });
            }
        }
        let missing = || Error::argument("classifier", "a gradient per cotangent", "none");
        nearest.into_iter().map(|plane| plane.ok_or_else(missing)).collect()
    }

    /// One step of every picture; the entries of gradients that were no numbers, per picture.
    fn step(&mut self, fab: &Fab) -> Result<Vec<u64>> {
        let all: Vec<usize> = (0..self.rows.len()).collect();
        let classifier = self.task.classifier();
        let (evaluation, mut found) = in_batches(&self.pixels, &all, classifier.batch(), |pixels, at| {
            let planes = self.planes(pixels, at)?;
            let [x1, x0] =
                [pixels, &select(&self.clean, at)?].map(|pixels| pixels.flatten_all()?.to_vec1::<f32>());
            let (x1, x0) = (x1?, x0?);
            let each = x1.len() / at.len().max(1);
            let of = |n: usize| (&x1[n * each..][..each], &x0[n * each..][..each]);
            let reached: Vec<Vec<f32>> =
                (0..at.len()).into_par_iter().map(|n| fab.step(of(n).0, of(n).1, &planes[n].0)).collect();
            let tensor = |values: Vec<f32>| Tensor::from_vec(values, pixels.shape(), pixels.device());
            let reached_pixels = tensor(reached.concat())?;
            let logits = logit_rows(&classifier.logits(&reached_pixels)?)?;
            let fooled: Vec<bool> = at.iter().zip(&logits).map(|(&i, z)| !wins(z, self.labels[i])).collect();
            let distance = |n: usize| norm(reached[n].iter().zip(of(n).1).map(|(x, x0)| x - x0));
            let evaluation =
                Evaluation { loss: (0..at.len()).map(distance).collect(), fooled: Some(fooled.clone()) };
            let beta = fab.beta as f32;
            let next: Vec<f32> = (0..at.len())
                .flat_map(|n| reached[n].iter().zip(of(n).1).map(move |(&x, &x0)| (n, x, x0)))
                .map(|(n, x, x0)| if fooled[n] { (x0 + beta * (x - x0)).clamp(0.0, 1.0) } else { x })
                .collect();
            let odd: Vec<i64> = planes.iter().map(|(_, odd)| *odd as i64).collect();
            let odd = Tensor::from_vec(odd, at.len(), &Device::Cpu)?;
            Ok((evaluation, vec![reached_pixels, tensor(next)?, odd]))
        })?;
        let missing = || Error::argument("pictures", "at least one", "none");
        let odd = found.pop().ok_or_else(missing)?.to_vec1::<i64>()?;
        self.pixels = found.pop().ok_or_else(missing)?;
        let reached = found.pop().ok_or_else(missing)?;
        for (i, best) in self.best.iter_mut().enumerate() {
            let distance = evaluation.loss[i];
            if evaluation.is_fooled(i) && best.as_ref().is_none_or(|(least, _)| distance < *least) {
                *best = Some((distance, reached.narrow(0, i, 1)?.force_contiguous()?));
            }
        }
        Ok(odd.into_iter().map(|odd| odd as u64).collect())
    }

    /// Whether a wrong picture within `eps` was found for picture `i`.
    fn succeeded(&self, i: usize, eps: Eps) -> bool {
        self.best[i].as_ref().is_some_and(|(distance, _)| *distance <= eps.value())
    }

    /// Goes on with these of its pictures alone.
    fn select(&mut self, kept: &[usize]) -> Result<()> {
        let pick = |of: &[usize]| -> Vec<usize> { kept.iter().map(|&i| of[i]).collect() };
        self.rows = pick(&self.rows);
        self.labels = pick(&self.labels);
        self.targets = self.targets.as_deref().map(pick);
        self.clean = select(&self.clean, kept)?;
        self.pixels = select(&self.pixels, kept)?;
        self.best = kept.iter().map(|&i| self.best[i].take()).collect();
        Ok(())
    }

    /// Puts down in `finished` what it found for its pictures `done`.
    fn settle(&self, done: &[usize], eps: Eps, finished: &mut Finished) {
        for &i in done {
            let Some((distance, pixels)) = &self.best[i] else { continue };
            let outcome = &mut finished.outcomes[self.rows[i]];
            outcome.distance = Some(outcome.distance.map_or(*distance, |least| least.min(*distance)));
            if self.succeeded(i, eps) {
                outcome.fooled = Some(true);
                finished.pixels[self.rows[i]] = pixels.clone();
            }
        }
    }
}

impl Attack for Fab {
    fn name(&self) -> &str {
        if self.targets.is_some() { "fab-t" } else { "fab" }
    }

    fn parameters(&self) -> Value {
        json!(self)
    }

    fn eps(&self) -> Option<Eps> {
        Some(self.eps)
    }

    fn targets(&self) -> Option<usize> {
        self.targets
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        let classifier = task.classifier();
        self.check(classifier.classes())?;
        if task.labels().len() != pictures.len() {
            let expected = format!("one per picture, {}", pictures.len());
            return Err(Error::argument("labels", expected, task.labels().len()));
        }
        let mut finished = Finished::new(pictures)?;
        let rows = pictures.rows();
        if !rows.is_empty() {
            self.runs(task, pictures, rows, seed, &mut finished, progress)?;
        }
        let recipe = Recipe {
            attack: self.name().into(),
            parameters: self.parameters(),
            objective: json!({ "minimises": "linf distance", "goal": "misclassify" }),
            eps: Some(self.eps),
            seed,
            crafted_on: classifier.subject().clone(),
            quantised: false,
        };
        finished.crafted(pictures, recipe)
    }
}

impl Fab {
    fn runs(
        &self,
        task: &Classification,
        pictures: &Pictures,
        rows: Vec<usize>,
        seed: u64,
        finished: &mut Finished,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let logits = logit_rows(&task.logits(&select(pictures.pixels(), &rows)?)?)?;
        // The pictures given their labels, and their other classes, likeliest first.
        let (mut left, mut others) = (Vec::new(), Vec::new());
        for (&row, z) in rows.iter().zip(&logits) {
            let label = task.labels()[row];
            let right = wins(z, label);
            let outcome = &mut finished.outcomes[row];
            (outcome.attacked, outcome.fooled) = (right, Some(!right));
            outcome.distance = (!right).then_some(0.0);
            if right {
                let mut order: Vec<usize> = (0..z.len()).filter(|&class| class != label).collect();
                order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
                left.push(row);
                others.push(order);
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        let others: std::collections::HashMap<usize, Vec<usize>> = left.iter().copied().zip(others).collect();
        let first = left.len();
        let targets = self.targets.map_or(1, |n| n.min(task.classifier().classes() - 1));
        let steps = targets * self.restarts * self.steps;
        let mut done_steps = 0;
        for number in 0..targets * self.restarts {
            let labels = left.iter().map(|&row| task.labels()[row]).collect();
            let rank = number / self.restarts;
            let clean = select(pictures.pixels(), &left)?;
            let start = if number % self.restarts == 0 {
                clean.clone()
            } else {
                self.random_start(&clean, pictures, &left, seed, number)?
            };
            let mut run = Run {
                task,
                labels,
                targets: self.targets.map(|_| left.iter().map(|row| others[row][rank]).collect()),
                best: left.iter().map(|_| None).collect(),
                rows: left.clone(),
                pixels: start,
                clean,
            };
            for step in 0..self.steps {
                let odd = run.step(self)?;
                for (&row, odd) in run.rows.iter().zip(odd) {
                    finished.outcomes[row].gradients += run.gradients();
                    finished.outcomes[row].nan_gradients += odd;
                }
                let (done, kept): (Vec<usize>, Vec<usize>) =
                    (0..run.rows.len()).partition(|&i| run.succeeded(i, self.eps));
                let fooled = Some(first - left.len() + done.len());
                let active = run.rows.len();
                done_steps = number * self.steps + step + 1;
                progress(&Progress { step: done_steps, steps, active, fooled });
                if self.stop_when_fooled && !done.is_empty() {
                    run.settle(&done, self.eps, finished);
                    if kept.is_empty() {
                        run.rows.clear();
                        break;
                    }
                    run.select(&kept)?;
                }
            }
            let all: Vec<usize> = (0..run.rows.len()).collect();
            run.settle(&all, self.eps, finished);
            left.retain(|&row| !finished.is_fooled(row));
            if left.is_empty() {
                if done_steps < steps {
                    progress(&Progress { step: steps, steps, active: 0, fooled: Some(first) });
                }
                break;
            }
        }
        Ok(())
    }

    /// x + t eps / (2 max |t|) for the clean pictures `rows` of `pictures`, cut to the box.
    fn random_start(
        &self,
        clean: &Tensor,
        pictures: &Pictures,
        rows: &[usize],
        seed: u64,
        run: usize,
    ) -> Result<Tensor> {
        let each = clean.elem_count() / rows.len().max(1);
        let keys = rows.iter().filter_map(|&row| pictures.keys().get(row));
        let noise = keys.flat_map(|&key| {
            let t = uniform(&mut picture_rng(seed, key, run as u64, self.name()), each);
            let most = norm(t.iter().copied()).max(TINY);
            let scale = (0.5 * self.eps.value() / most) as f32;
            t.into_iter().map(move |t| t * scale)
        });
        let noise = Tensor::from_vec(noise.collect::<Vec<f32>>(), clean.shape(), clean.device())?;
        Ok((clean + noise)?.clamp(0f32, 1f32)?)
    }
}
