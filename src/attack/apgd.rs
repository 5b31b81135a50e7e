use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crafted::Finished;
use super::objective::{check_pictures, take, without_nan};
use super::pictures::select;
use super::{
    Attack, Ball, Classification, Crafted, Eps, Evaluation, Goal, Loss, Maximise, Objective, OnLoss,
    Pictures, Progress, Recipe, picture_rng, uniform,
};
use crate::{Error, Result};

/// Auto-PGD in the Linf ball (Croce and Hein 2020, Algorithm 1; `autopgd_base.py`): sign steps with
/// momentum whose size begins at 2 eps and is halved, picture by picture, at checkpoints where the
/// loss has not risen often enough; the walk then goes on from the best place so far.
///
/// Where the objective has a goal, a picture that reached it is returned as it was the last time it
/// did, and one that never did is returned untouched, unless `keep_best` is set.
///
/// Unlike the original, the first window's first rise is counted against the loss at the start
/// (there it is counted against a zero that the loss history happens to end with), and gradients
/// that are not numbers are taken for 0 and counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Apgd {
    /// The radius of the ball.
    pub eps: Eps,
    /// Number of steps, each a gradient; one more is taken at the start.
    pub steps: usize,
    /// Number of random starts; each is for the pictures that the ones before have not fooled.
    pub restarts: usize,
    /// The share of a window's steps that must raise the loss to keep the step size.
    pub rho: f64,
    /// Gradients averaged at every place, for models that are random.
    pub eot: usize,
    /// Leave alone pictures that reach the goal untouched: for an untargeted attack those the
    /// model gets wrong.
    pub only_correct: bool,
    /// Return the best place for every picture (fooled before not fooled, then the highest loss;
    /// the clean picture is one of them) instead of what the original returns. The same pictures
    /// are fooled, and those that are not may still fool another model. Always so where the
    /// objective has no goal.
    pub keep_best: bool,
    /// Leave a picture as soon as it reaches the goal. The same pictures are fooled, sooner; those
    /// returned are then barely so.
    pub stop_when_fooled: bool,
}

impl Apgd {
    /// AutoAttack's `standard`: 100 steps from one start.
    pub fn standard(eps: Eps) -> Self {
        Self {
            eps,
            steps: 100,
            restarts: 1,
            rho: 0.75,
            eot: 1,
            only_correct: true,
            keep_best: false,
            stop_when_fooled: false,
        }
    }

    /// On a loss, as an [`Attack`] on a labelled task: `apgd-ce` on the cross-entropy, `apgd-dlr` on
    /// the difference of logits ratio.
    pub fn on(self, loss: Loss) -> OnLoss<Self> {
        let name = match loss {
            Loss::CrossEntropy => "apgd-ce",
            Loss::Dlr => "apgd-dlr",
            _ => self.name(),
        };
        OnLoss { name: name.into(), maximise: self, loss }
    }

    /// After how many steps the step size is looked at: 22 % of all at first, then ever sooner,
    /// down to 6 %.
    pub fn checkpoints(&self) -> Vec<usize> {
        let share = |percent: usize| (percent * self.steps / 100).max(1);
        let (mut window, mut at, mut found) = (share(22), 0, Vec::new());
        while at + window <= self.steps {
            at += window;
            found.push(at);
            window = window.saturating_sub(share(3)).max(share(6));
        }
        found
    }

    fn check(&self) -> Result<()> {
        for (what, value) in [("restarts", self.restarts), ("eot", self.eot)] {
            if value == 0 {
                return Err(Error::argument(what, "at least 1", value));
            }
        }
        if !(0.0..=1.0).contains(&self.rho) {
            return Err(Error::argument("rho", "0 to 1", self.rho));
        }
        Ok(())
    }
}

/// What becomes of the pictures, in the order of all.
pub(super) struct Record<'a> {
    pub(super) finished: Finished,
    /// Whether the clean picture reaches the goal.
    reached: Vec<bool>,
    /// The highest loss so far, from -infinity.
    highest: Vec<f64>,
    pub(super) told: &'a mut dyn FnMut(&Progress),
    /// Steps done in all runs, and to do.
    done: usize,
    all: usize,
    /// The last step told.
    last: usize,
    began: usize,
}

impl<'a> Record<'a> {
    pub(super) fn new(pictures: &Pictures, all: usize, told: &'a mut dyn FnMut(&Progress)) -> Result<Self> {
        Ok(Self {
            finished: Finished::new(pictures)?,
            reached: vec![false; pictures.len()],
            highest: vec![f64::NEG_INFINITY; pictures.len()],
            told,
            done: 0,
            all,
            last: 0,
            began: 0,
        })
    }

    fn tell(&mut self, step: usize, active: usize, goal: bool, fooled: impl Fn() -> usize) {
        let fooled = goal.then(fooled);
        self.last = self.done + step;
        (self.told)(&Progress { step: self.last, steps: self.all, active, fooled });
    }

    /// After all runs: a picture that reaches the goal as it is, and at no place returned of those
    /// seen, stays as it is; and where the last runs had nothing to do, progress ends here.
    fn finish(&mut self, pictures: &Pictures) -> Result<()> {
        for (row, outcome) in self.finished.outcomes.iter_mut().enumerate() {
            if self.reached[row] && outcome.fooled == Some(false) {
                self.finished.pixels[row] = pictures.pixels().narrow(0, row, 1)?;
                outcome.fooled = Some(true);
                outcome.loss = outcome.clean_loss;
            }
        }
        if self.last < self.all && self.began > 0 {
            (self.told)(&Progress { step: self.all, steps: self.all, active: 0, fooled: Some(self.began) });
        }
        Ok(())
    }
}

/// The pictures of one run from one start; tensors are `(R, 3, H, W)`, the rest has R entries.
struct Walk {
    rows: Vec<usize>,
    ball: Ball,
    pixels: Tensor,
    /// The place before, for the momentum.
    before: Tensor,
    gradient: Tensor,
    best: Tensor,
    best_gradient: Tensor,
    best_loss: Vec<f64>,
    /// Whether the goal was reached anywhere.
    fooled: Vec<bool>,
    /// What is to be returned, and its loss.
    returned: Tensor,
    returned_loss: Vec<f64>,
    /// Losses at the start and after every step.
    losses: Vec<Vec<f64>>,
    step: Vec<f64>,
    /// At the last checkpoint: the best loss, and whether the step was halved.
    checked: Vec<(f64, bool)>,
}

impl Walk {
    fn new(
        rows: Vec<usize>,
        ball: Ball,
        start: Tensor,
        found: &Evaluation,
        gradient: Tensor,
        step: f64,
    ) -> Self {
        let n = rows.len();
        Self {
            ball,
            before: start.clone(),
            best: start.clone(),
            returned: start.clone(),
            pixels: start,
            best_gradient: gradient.clone(),
            gradient,
            best_loss: found.loss.iter().map(|&loss| number(loss)).collect(),
            fooled: (0..n).map(|i| found.is_fooled(i)).collect(),
            returned_loss: found.loss.iter().map(|&loss| number(loss)).collect(),
            losses: found.loss.iter().map(|&loss| vec![number(loss)]).collect(),
            step: vec![step; n],
            // As if halved, so that only oscillation halves it at the first checkpoint.
            checked: found.loss.iter().map(|&loss| (number(loss), true)).collect(),
            rows,
        }
    }

    /// x + 0.75 (z - x) + 0.25 (x - x before), z = x + step sign(gradient), both cut to the ball;
    /// in the first step z itself.
    fn advance(&mut self, first: bool) -> Result<()> {
        let steps: Vec<f32> = self.step.iter().map(|&step| step as f32).collect();
        let steps = Tensor::from_vec(steps, (self.rows.len(), 1, 1, 1), self.pixels.device())?;
        let z = (&self.pixels + self.gradient.sign()?.broadcast_mul(&steps)?)?;
        let z = self.ball.project(&z)?;
        let next = if first {
            z
        } else {
            let ahead = ((z - &self.pixels)? * 0.75)?;
            let drift = ((&self.pixels - &self.before)? * 0.25)?;
            self.ball.project(&((&self.pixels + ahead)? + drift)?)?
        };
        self.before = std::mem::replace(&mut self.pixels, next);
        Ok(())
    }

    /// Takes note of what the present pixels come to; `last`: of places that reach the goal the
    /// last is returned, not that of the highest loss.
    fn note(&mut self, found: &Evaluation, gradient: Tensor, last: bool) -> Result<()> {
        let returned = (0..self.rows.len()).map(|i| {
            let (now, loss) = (found.is_fooled(i), number(found.loss[i]));
            match (now, self.fooled[i]) {
                (true, true) => last || loss > self.returned_loss[i],
                (true, false) => true,
                (false, true) => false,
                (false, false) => loss > self.returned_loss[i],
            }
        });
        let returned: Vec<bool> = returned.collect();
        self.returned = take(&returned, &self.pixels, &self.returned)?;
        for (i, _) in returned.iter().enumerate().filter(|(_, returned)| **returned) {
            self.returned_loss[i] = number(found.loss[i]);
            self.fooled[i] |= found.is_fooled(i);
        }
        let better: Vec<bool> =
            found.loss.iter().zip(&self.best_loss).map(|(&loss, best)| number(loss) > *best).collect();
        self.best = take(&better, &self.pixels, &self.best)?;
        self.best_gradient = take(&better, &gradient, &self.best_gradient)?;
        for (i, &loss) in found.loss.iter().enumerate() {
            let loss = number(loss);
            self.losses[i].push(loss);
            if better[i] {
                self.best_loss[i] = loss;
            }
        }
        self.gradient = gradient;
        Ok(())
    }

    /// At a checkpoint after a window of `window` steps.
    fn checkpoint(&mut self, window: usize, rho: f64) -> Result<()> {
        let mut halved = vec![false; self.rows.len()];
        for (i, halved) in halved.iter_mut().enumerate() {
            let recent = &self.losses[i][self.losses[i].len() - 1 - window..];
            let rises = recent.windows(2).filter(|pair| pair[1] > pair[0]).count();
            let (best, was_halved) = self.checked[i];
            let stuck = !was_halved && best >= self.best_loss[i];
            *halved = rises as f64 <= rho * window as f64 || stuck;
            if *halved {
                self.step[i] /= 2.0;
            }
            self.checked[i] = (self.best_loss[i], *halved);
        }
        self.pixels = take(&halved, &self.best, &self.pixels)?;
        self.gradient = take(&halved, &self.best_gradient, &self.gradient)?;
        Ok(())
    }

    /// Goes on with these of its pictures alone.
    fn keep(&mut self, kept: &[usize]) -> Result<()> {
        fn pick<T: Clone>(all: &[T], kept: &[usize]) -> Vec<T> {
            kept.iter().map(|&i| all[i].clone()).collect()
        }
        for tensor in [
            &mut self.pixels,
            &mut self.before,
            &mut self.gradient,
            &mut self.best,
            &mut self.best_gradient,
            &mut self.returned,
        ] {
            *tensor = select(tensor, kept)?;
        }
        self.ball = self.ball.select(kept)?;
        self.rows = pick(&self.rows, kept);
        self.best_loss = pick(&self.best_loss, kept);
        self.fooled = pick(&self.fooled, kept);
        self.returned_loss = pick(&self.returned_loss, kept);
        self.losses = pick(&self.losses, kept);
        self.step = pick(&self.step, kept);
        self.checked = pick(&self.checked, kept);
        Ok(())
    }
}

/// A loss that is not a number is below all others.
pub(super) fn number(loss: f64) -> f64 {
    if loss.is_nan() { f64::NEG_INFINITY } else { loss }
}

impl Apgd {
    /// Walks the pictures `rows` of `record` that are not fooled yet, from the start of number
    /// `start` drawn for `purpose`.
    pub(super) fn run(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        seed: u64,
        (start, purpose): (u64, &str),
        record: &mut Record,
    ) -> Result<()> {
        let all = pictures.rows().into_iter();
        let rows: Vec<usize> = all
            .filter(|&row| record.finished.outcomes[row].attacked && !record.finished.is_fooled(row))
            .collect();
        if record.began == 0 {
            record.began = rows.len();
        }
        if !rows.is_empty() {
            self.run_rows(objective, pictures, rows, seed, (start, purpose), record)?;
        }
        record.done += self.steps;
        Ok(())
    }

    fn run_rows(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        rows: Vec<usize>,
        seed: u64,
        (start, purpose): (u64, &str),
        record: &mut Record,
    ) -> Result<()> {
        let fooled_before = record.began - rows.len();
        let ball = Ball::new(&select(pictures.pixels(), &rows)?, self.eps)?;
        let first = edge_start(&ball, pictures, &rows, seed, start, purpose)?;
        let (found, gradient) = self.evaluate(objective, &first, &rows, record)?;
        let zero = without_direction(&gradient)?;
        for (&row, zero) in rows.iter().zip(zero) {
            record.finished.outcomes[row].zero_gradient |= zero;
        }
        let goal = found.fooled.is_some();
        let mut walk = Walk::new(rows, ball, first, &found, gradient, 2.0 * self.eps.value());
        let checkpoints = self.checkpoints();
        let mut last_check = 0;
        let mut left = 0;
        for step in 0..self.steps {
            if self.stop_when_fooled && goal {
                let (done, kept): (Vec<usize>, Vec<usize>) =
                    (0..walk.rows.len()).partition(|&i| walk.fooled[i]);
                if !done.is_empty() {
                    left += done.len();
                    self.settle(&walk, &done, goal, record)?;
                    if kept.is_empty() {
                        return Ok(());
                    }
                    walk.keep(&kept)?;
                }
            }
            walk.advance(step == 0)?;
            let (found, gradient) = self.evaluate(objective, &walk.pixels, &walk.rows, record)?;
            walk.note(&found, gradient, goal && !self.keep_best)?;
            if checkpoints.contains(&(step + 1)) {
                walk.checkpoint(step + 1 - last_check, self.rho)?;
                last_check = step + 1;
            }
            let fooled = || fooled_before + left + walk.fooled.iter().filter(|f| **f).count();
            record.tell(step + 1, walk.rows.len(), goal, fooled);
        }
        let everyone: Vec<usize> = (0..walk.rows.len()).collect();
        self.settle(&walk, &everyone, goal, record)
    }

    /// Puts down what is found of the pictures `done` of `walk`.
    fn settle(&self, walk: &Walk, done: &[usize], goal: bool, record: &mut Record) -> Result<()> {
        for &i in done {
            let row = walk.rows[i];
            let outcome = &mut record.finished.outcomes[row];
            let fooled = walk.fooled[i];
            outcome.fooled = goal.then_some(fooled);
            let returned = if goal && !self.keep_best {
                fooled
            } else {
                fooled || walk.returned_loss[i] > record.highest[row]
            };
            if returned {
                record.highest[row] = walk.returned_loss[i];
                outcome.loss = Some(walk.returned_loss[i]);
                record.finished.pixels[row] = walk.returned.narrow(0, i, 1)?.force_contiguous()?;
            }
        }
        Ok(())
    }

    /// The gradient averaged over [`Apgd::eot`] passes, without NaN, and what the last pass says.
    fn evaluate(
        &self,
        objective: &dyn Objective,
        pixels: &Tensor,
        rows: &[usize],
        record: &mut Record,
    ) -> Result<(Evaluation, Tensor)> {
        let (mut found, mut sum) = objective.values_and_gradient(pixels, rows)?;
        for _ in 1..self.eot {
            let (again, gradient) = objective.values_and_gradient(pixels, rows)?;
            sum = (sum + gradient)?;
            found = again;
        }
        let (gradient, nan) = without_nan(&sum)?;
        for (&row, nan) in rows.iter().zip(nan) {
            record.finished.outcomes[row].gradients += self.eot;
            record.finished.outcomes[row].nan_gradients += nan;
        }
        // A mean and a sum have the same signs.
        Ok((found, gradient))
    }
}

/// Per picture, whether a gradient without NaN is zero everywhere.
pub(super) fn without_direction(gradient: &Tensor) -> Result<Vec<bool>> {
    let most: Vec<f32> = gradient.flatten_from(1)?.abs()?.max(1)?.to_vec1()?;
    Ok(most.into_iter().map(|most| most == 0.0).collect())
}

/// A random place on the ball's surface, cut to [0, 1]: x + eps t / max |t|, t uniform in [-1, 1).
fn edge_start(
    ball: &Ball,
    pictures: &Pictures,
    rows: &[usize],
    seed: u64,
    start: u64,
    purpose: &str,
) -> Result<Tensor> {
    let shape = ball.center().shape();
    let each = shape.elem_count() / rows.len().max(1);
    let mut noise = Vec::with_capacity(shape.elem_count());
    for &row in rows {
        let key = pictures.keys().get(row).copied().unwrap_or_default();
        let t = uniform(&mut picture_rng(seed, key, start, purpose), each);
        let most = t.iter().fold(f32::MIN_POSITIVE, |most, t| most.max(t.abs()));
        noise.extend(t.into_iter().map(|t| t / most));
    }
    let noise = Tensor::from_vec(noise, shape, ball.center().device())?;
    ball.project(&(ball.center() + (noise * ball.eps())?)?)
}

/// Refuses pictures that the objective is not made for, and says what is known of the clean ones.
/// With `only_correct`, those that reach the goal untouched are not marked as attacked.
pub(super) fn begin(
    objective: &dyn Objective,
    pictures: &Pictures,
    only_correct: bool,
    record: &mut Record,
) -> Result<()> {
    check_pictures(objective, pictures)?;
    let rows = pictures.rows();
    if rows.is_empty() {
        return Ok(());
    }
    let clean = objective.values(&select(pictures.pixels(), &rows)?, &rows)?;
    for (i, &row) in rows.iter().enumerate() {
        let outcome = &mut record.finished.outcomes[row];
        outcome.clean_loss = Some(clean.loss[i]);
        outcome.attacked = !(only_correct && clean.is_fooled(i));
        record.reached[row] = clean.is_fooled(i);
        outcome.fooled = if outcome.attacked { clean.fooled.as_ref().map(|_| false) } else { Some(true) };
    }
    Ok(())
}

impl Maximise for Apgd {
    fn name(&self) -> &'static str {
        "apgd"
    }

    fn parameters(&self) -> Value {
        json!(self)
    }

    fn eps(&self) -> Option<Eps> {
        Some(self.eps)
    }

    fn expects_randomness(&self) -> bool {
        self.eot > 1
    }

    fn maximise(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        self.check()?;
        let mut record = Record::new(pictures, self.steps * self.restarts, progress)?;
        begin(objective, pictures, self.only_correct, &mut record)?;
        for (outcome, highest) in record.finished.outcomes.iter_mut().zip(&mut record.highest) {
            outcome.loss = outcome.clean_loss;
            *highest = outcome.clean_loss.map_or(f64::NEG_INFINITY, number);
        }
        for restart in 0..self.restarts {
            self.run(objective, pictures, seed, (restart as u64, self.name()), &mut record)?;
        }
        record.finish(pictures)?;
        record.finished.crafted(pictures, Recipe::of(self, objective, seed))
    }
}

/// APGD-T: [`Apgd`] on the targeted difference of logits ratio, once for each of the classes that
/// come next on the clean picture. A picture that any of them fools, into whatever class, is done.
///
/// Needs 4 classes; with fewer other classes than `targets` it takes those there are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApgdT {
    /// How it walks.
    pub apgd: Apgd,
    /// Number of target classes.
    pub targets: usize,
}

impl ApgdT {
    /// AutoAttack's: 9 targets, 100 steps from one start each.
    pub fn standard(eps: Eps) -> Self {
        Self { apgd: Apgd::standard(eps), targets: 9 }
    }
}

/// For every chosen picture the other classes by falling logit, no more than `targets`:
/// `found[rank][row]`. Ties go to the class of the lower number.
fn ranked_targets(task: &Classification, pictures: &Pictures, targets: usize) -> Result<Vec<Vec<usize>>> {
    let others = task.classifier().classes().saturating_sub(1).min(targets);
    let mut found = vec![vec![0; task.labels().len()]; others];
    let rows = pictures.rows();
    if rows.is_empty() {
        return Ok(found);
    }
    let logits = super::loss::rows(&task.logits(&select(pictures.pixels(), &rows)?)?)?;
    for (row, z) in rows.into_iter().zip(logits) {
        let y = task.labels()[row];
        let mut order: Vec<usize> = (0..z.len()).filter(|&class| class != y).collect();
        order.sort_by(|&a, &b| number(z[b]).total_cmp(&number(z[a])));
        for (rank, class) in found.iter_mut().zip(order) {
            rank[row] = class;
        }
    }
    Ok(found)
}

impl Attack for ApgdT {
    fn name(&self) -> &str {
        "apgd-t"
    }

    fn parameters(&self) -> Value {
        json!(self)
    }

    fn eps(&self) -> Option<Eps> {
        Some(self.apgd.eps)
    }

    fn fewest_classes(&self) -> usize {
        Loss::TargetedDlr.classes()
    }

    fn targets(&self) -> Option<usize> {
        Some(self.targets)
    }

    fn expects_randomness(&self) -> bool {
        self.apgd.eot > 1
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        self.apgd.check()?;
        if self.targets == 0 {
            return Err(Error::argument("targets", "at least 1", 0));
        }
        // Refused here where there are too few classes.
        task.targeted(Loss::TargetedDlr, vec![0; task.labels().len()], Goal::Misclassify)?;
        let runs = self.targets.min(task.classifier().classes() - 1) * self.apgd.restarts;
        let mut record = Record::new(pictures, self.apgd.steps * runs, progress)?;
        let clean = task.objective(Loss::Margin { kappa: None })?;
        begin(&clean, pictures, self.apgd.only_correct, &mut record)?;
        let targets = ranked_targets(task, pictures, self.targets)?;
        for (rank, targets) in targets.into_iter().enumerate() {
            let objective = task.targeted(Loss::TargetedDlr, targets, Goal::Misclassify)?;
            for restart in 0..self.apgd.restarts {
                let start = (rank * self.apgd.restarts + restart) as u64;
                self.apgd.run(&objective, pictures, seed, (start, self.name()), &mut record)?;
            }
            // Losses of different targets do not compare.
            record.highest.fill(f64::NEG_INFINITY);
        }
        record.finish(pictures)?;
        let recipe = Recipe {
            attack: self.name().into(),
            parameters: self.parameters(),
            objective: json!({ "loss": "targeted-dlr", "goal": "misclassify" }),
            eps: Some(self.apgd.eps),
            seed,
            crafted_on: task.classifier().subject().clone(),
            quantised: false,
        };
        record.finished.crafted(pictures, recipe)
    }
}
