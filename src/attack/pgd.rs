use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crafted::Finished;
use super::objective::{check_pictures, take, without_nan};
use super::pictures::select;
use super::{Ball, Crafted, Eps, Evaluation, Loss, Maximise, Objective, OnLoss, Pictures, Progress, Recipe};
use crate::{Error, Result};

/// Projected gradient descent in the Linf ball (Madry et al. 2018): from x + U(-eps, eps), `steps`
/// times x' <- P(x' + alpha sign(gradient)), P cutting to the ball and to [0, 1].
///
/// It climbs any [`Objective`]; with a targeted one it is targeted PGD.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pgd {
    /// The radius of the ball.
    pub eps: Eps,
    /// The size of a step, in pixel units of [0, 1].
    pub alpha: f64,
    /// Number of steps. With 0 the start is the only iterate.
    pub steps: usize,
    /// Begin at a random place in the ball, drawn by the picture's key, instead of at the picture.
    pub random_start: bool,
    /// v <- sign(momentum v + sign(gradient)) takes the place of the gradient's sign, as in FARE's
    /// training. Below 1 it tells only where the gradient is zero, which then keeps its last
    /// direction; 0 is plain PGD.
    pub momentum: f64,
    /// Return the best of the clean picture, the start and every iterate (fooled before not
    /// fooled, then the highest loss, then the earliest) instead of the last iterate. No picture
    /// is then worse for the attacker than the clean one.
    pub keep_best: bool,
    /// Leave alone pictures that reach the goal untouched: for an untargeted attack those the
    /// model gets wrong. Without effect where the objective has no goal.
    pub only_correct: bool,
    /// Leave a picture as soon as an iterate reaches the goal. It saves time, and gives up the
    /// losses that lie beyond, which transfer needs.
    pub stop_when_fooled: bool,
}

impl Pgd {
    /// 10 steps of eps / 4 from a random start, keeping the best: for reporting.
    pub fn new(eps: Eps) -> Self {
        Self {
            eps,
            alpha: eps.value() / 4.0,
            steps: 10,
            random_start: true,
            momentum: 0.0,
            keep_best: true,
            only_correct: false,
            stop_when_fooled: false,
        }
    }

    /// As the authors of CSR and R-Adapt publish it (`pgd.py`): 10 steps of 2.5 eps / 10 from a
    /// random start, the last iterate.
    pub fn csr(eps: Eps) -> Self {
        Self { keep_best: false, ..Self::new(eps) }
    }

    /// As FARE and TeCoA train (`pgd_train.py`): 10 steps of 1/255 with momentum 0.9 from a random
    /// start, the last iterate.
    pub fn fare(eps: Eps) -> Self {
        Self { alpha: 1.0 / 255.0, momentum: 0.9, ..Self::csr(eps) }
    }

    /// On a loss, as an [`super::Attack`] on a labelled task.
    pub fn on(self, loss: Loss) -> OnLoss<Self> {
        OnLoss { name: self.name().into(), maximise: self, loss }
    }

    fn check(&self) -> Result<()> {
        for (what, value) in [("alpha", self.alpha), ("momentum", self.momentum)] {
            if !((value as f32).is_finite() && value >= 0.0) {
                return Err(Error::argument(what, "a number from 0", value));
            }
        }
        Ok(())
    }
}

/// The pictures still under attack; all tensors `(R, 3, H, W)`.
struct Walk {
    /// Their numbers among all pictures.
    rows: Vec<usize>,
    ball: Ball,
    pixels: Tensor,
    velocity: Option<Tensor>,
    /// The best so far and what is said of it, where it is kept.
    best: Option<(Tensor, Evaluation)>,
}

impl Walk {
    /// Takes the present pixels where they are better than the best so far.
    fn offer(&mut self, evaluation: &Evaluation) -> Result<()> {
        if let Some((pixels, best)) = &mut self.best {
            let better: Vec<bool> = (0..best.loss.len()).map(|i| evaluation.beats(i, best, i)).collect();
            *pixels = take(&better, &self.pixels, pixels)?;
            for (i, _) in better.iter().enumerate().filter(|(_, better)| **better) {
                best.loss[i] = evaluation.loss[i];
                if let (Some(best), Some(found)) = (&mut best.fooled, &evaluation.fooled) {
                    best[i] = found[i];
                }
            }
        }
        Ok(())
    }

    /// Goes on with these of its pictures alone.
    fn select(&mut self, kept: &[usize]) -> Result<()> {
        self.rows = kept.iter().map(|&i| self.rows[i]).collect();
        self.ball = self.ball.select(kept)?;
        self.pixels = select(&self.pixels, kept)?;
        self.velocity = self.velocity.as_ref().map(|velocity| select(velocity, kept)).transpose()?;
        if let Some((pixels, evaluation)) = &mut self.best {
            *pixels = select(pixels, kept)?;
            *evaluation = evaluation.select(kept);
        }
        Ok(())
    }

    /// Moves by `alpha` along the gradient's sign.
    fn step(&mut self, gradient: &Tensor, pgd: &Pgd) -> Result<()> {
        let mut direction = gradient.sign()?;
        if pgd.momentum > 0.0 {
            if let Some(velocity) = &self.velocity {
                direction = ((velocity * pgd.momentum)? + direction)?.sign()?;
            }
            self.velocity = Some(direction.clone());
        }
        self.pixels = self.ball.project(&(&self.pixels + (direction * pgd.alpha)?)?)?;
        Ok(())
    }

    /// Puts down in `finished` where it is with its pictures `done`; `evaluation` is of the present
    /// pixels.
    fn settle(&self, evaluation: &Evaluation, done: &[usize], finished: &mut Finished) -> Result<()> {
        let (pixels, evaluation) = match &self.best {
            Some((pixels, best)) => (pixels, best),
            None => (&self.pixels, evaluation),
        };
        for &i in done {
            let row = self.rows[i];
            // Its own storage: a view would keep the whole batch alive, and so would `copy`, which
            // copies all of it.
            finished.pixels[row] = pixels.narrow(0, i, 1)?.force_contiguous()?;
            finished.outcomes[row].loss = Some(evaluation.loss[i]);
            finished.outcomes[row].fooled = evaluation.fooled.as_ref().map(|fooled| fooled[i]);
        }
        Ok(())
    }
}

impl Maximise for Pgd {
    fn name(&self) -> &'static str {
        "pgd"
    }

    fn parameters(&self) -> Value {
        json!(self)
    }

    fn eps(&self) -> Option<Eps> {
        Some(self.eps)
    }

    fn maximise(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        self.check()?;
        check_pictures(objective, pictures)?;
        let mut finished = Finished::new(pictures)?;
        let rows = pictures.rows();
        if !rows.is_empty() {
            self.walk(objective, pictures, rows, seed, &mut finished, progress)?;
        }
        finished.crafted(pictures, Recipe::of(self, objective, seed))
    }
}

impl Pgd {
    fn walk(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        rows: Vec<usize>,
        seed: u64,
        finished: &mut Finished,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let clean_pixels = select(pictures.pixels(), &rows)?;
        let clean = objective.values(&clean_pixels, &rows)?;
        for (i, &row) in rows.iter().enumerate() {
            let outcome = &mut finished.outcomes[row];
            outcome.clean_loss = Some(clean.loss[i]);
            outcome.loss = Some(clean.loss[i]);
            outcome.fooled = clean.fooled.as_ref().map(|fooled| fooled[i]);
        }
        let mut walk = Walk {
            ball: Ball::new(&clean_pixels, self.eps)?,
            best: self.keep_best.then(|| (clean_pixels.clone(), clean.clone())),
            pixels: clean_pixels,
            velocity: None,
            rows,
        };
        let mut clean = clean;
        if self.only_correct {
            let kept: Vec<usize> = (0..walk.rows.len()).filter(|&i| !clean.is_fooled(i)).collect();
            if kept.is_empty() {
                return Ok(());
            }
            walk.select(&kept)?;
            clean = clean.select(&kept);
        }
        for &row in &walk.rows {
            finished.outcomes[row].attacked = true;
        }
        if self.random_start {
            walk.pixels = walk.ball.random_start(pictures, &walk.rows, seed, 0, self.name())?;
        }
        let mut left_fooled = 0;
        for step in 0..self.steps {
            let (mut evaluation, mut gradient) = objective.values_and_gradient(&walk.pixels, &walk.rows)?;
            for &row in &walk.rows {
                finished.outcomes[row].gradients += 1;
            }
            walk.offer(&evaluation)?;
            if self.stop_when_fooled {
                let (done, kept): (Vec<usize>, Vec<usize>) =
                    (0..walk.rows.len()).partition(|&i| evaluation.is_fooled(i));
                if !done.is_empty() {
                    walk.settle(&evaluation, &done, finished)?;
                    left_fooled += done.len();
                    if kept.is_empty() {
                        progress(&Progress {
                            step: self.steps,
                            steps: self.steps,
                            active: 0,
                            fooled: Some(left_fooled),
                        });
                        return Ok(());
                    }
                    walk.select(&kept)?;
                    gradient = select(&gradient, &kept)?;
                    evaluation = evaluation.select(&kept);
                }
            }
            let (gradient, nan) = without_nan(&gradient)?;
            for (&row, count) in walk.rows.iter().zip(nan) {
                finished.outcomes[row].nan_gradients += count;
            }
            walk.step(&gradient, self)?;
            let reached = walk.best.as_ref().map_or(&evaluation, |(_, best)| best);
            let fooled = reached.fooled.as_ref().map(|f| left_fooled + f.iter().filter(|f| **f).count());
            progress(&Progress { step: step + 1, steps: self.steps, active: walk.rows.len(), fooled });
        }
        // The last iterate has not been looked at yet.
        let evaluation = if self.steps == 0 && !self.random_start {
            clean
        } else {
            objective.values(&walk.pixels, &walk.rows)?
        };
        walk.offer(&evaluation)?;
        let all: Vec<usize> = (0..walk.rows.len()).collect();
        walk.settle(&evaluation, &all, finished)
    }
}
