use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::apgd::{Record, begin, number, without_direction};
use super::objective::{take, without_nan};
use super::pictures::select;
use super::{Ball, Crafted, Eps, Loss, Maximise, Objective, OnLoss, Pictures, Progress, Recipe};
use crate::{Error, Result};

/// What the authors of CSR and R-Adapt publish under APGD's name (`csr/attacks/apgd.py`), for
/// reproduction only: sign steps of 2 eps, halved at 22, 48 and 78 % of the steps whatever the
/// loss, no momentum, no return to the best place, and of all iterates but the last, which is never
/// looked at, the one of the highest loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ApgdCsr {
    /// The radius of the ball.
    pub eps: Eps,
    /// Number of gradients.
    pub steps: usize,
}

impl ApgdCsr {
    /// As published: 30 steps.
    pub fn new(eps: Eps) -> Self {
        Self { eps, steps: 30 }
    }

    /// On the cross-entropy, as `apgd-csr`.
    pub fn attack(self) -> OnLoss<Self> {
        OnLoss { name: self.name().into(), maximise: self, loss: Loss::CrossEntropy }
    }

    /// The steps after which the step size is halved: int(0.22 N), int(0.48 N), int(0.78 N).
    pub fn halvings(&self) -> [usize; 3] {
        [22, 48, 78].map(|percent| percent * self.steps / 100)
    }
}

impl Maximise for ApgdCsr {
    fn name(&self) -> &'static str {
        "apgd-csr"
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
        if self.steps == 0 {
            return Err(Error::argument("steps", "at least 1", 0));
        }
        let mut record = Record::new(pictures, self.steps, progress)?;
        begin(objective, pictures, false, &mut record)?;
        let rows = pictures.rows();
        if !rows.is_empty() {
            let ball = Ball::new(&select(pictures.pixels(), &rows)?, self.eps)?;
            let mut pixels = ball.random_start(pictures, &rows, seed, 0, self.name())?;
            let mut best = pixels.clone();
            let mut highest = vec![f64::NEG_INFINITY; rows.len()];
            let mut step = 2.0 * self.eps.value();
            for done in 0..self.steps {
                let (found, gradient) = objective.values_and_gradient(&pixels, &rows)?;
                let (gradient, nan) = without_nan(&gradient)?;
                // The start is the best so far even where its loss is no number.
                let better: Vec<bool> =
                    found.loss.iter().zip(&highest).map(|(loss, best)| done == 0 || loss > best).collect();
                best = take(&better, &pixels, &best)?;
                let zero = if done == 0 { without_direction(&gradient)? } else { vec![false; rows.len()] };
                for (i, &row) in rows.iter().enumerate() {
                    let outcome = &mut record.finished.outcomes[row];
                    outcome.zero_gradient |= zero[i];
                    outcome.gradients += 1;
                    outcome.nan_gradients += nan[i];
                    if better[i] {
                        highest[i] = number(found.loss[i]);
                        outcome.loss = Some(found.loss[i]);
                        outcome.fooled = found.fooled.as_ref().map(|fooled| fooled[i]);
                    }
                }
                if self.halvings().contains(&done) && done > 0 {
                    step /= 2.0;
                }
                pixels = ball.project(&(&pixels + (gradient.sign()? * step)?)?)?;
                let fooled = found.fooled.map(|_| {
                    rows.iter().filter(|&&row| record.finished.outcomes[row].fooled == Some(true)).count()
                });
                let (step, steps) = (done + 1, self.steps);
                (record.told)(&Progress { step, steps, active: rows.len(), fooled });
            }
            for (i, &row) in rows.iter().enumerate() {
                record.finished.pixels[row] = best.narrow(0, i, 1)?.force_contiguous()?;
            }
        }
        record.finished.crafted(pictures, Recipe::of(self, objective, seed))
    }
}
