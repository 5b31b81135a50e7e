use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crafted::Finished;
use super::objective::without_nan;
use super::pictures::select;
use super::{
    Attack, Classification, Crafted, Eps, Evaluation, Loss, Objective, OnLoss, Outcome, Pgd, Pictures,
    Progress, Recipe,
};
use crate::{Error, Result};

impl Pgd {
    /// The C&W attack of the authors of CSR and R-Adapt (`cw.py`), named `cw`: 30 steps of
    /// 2.5 eps / 30 from a random start on the margin with ceiling 0, the last iterate.
    ///
    /// Beyond the boundary the margin is flat, so a picture stays where it is first wrong. Its
    /// loss is the margin or 0, whichever is less.
    pub fn cw(eps: Eps) -> OnLoss<Self> {
        let pgd = Self { alpha: eps.value() / 12.0, steps: 30, ..Self::csr(eps) };
        OnLoss { name: "cw".into(), maximise: pgd, loss: Loss::Margin { kappa: Some(0.0) } }
    }
}

/// Carlini and Wagner's L2 attack (2017) as torchattacks has it: Adam on w, x' = (tanh w + 1) / 2,
/// lowers |x' - x|^2 - c min(max_{i != y} z_i - z_y, kappa) from the clean picture on. Named
/// `cw-l2`.
///
/// It has no eps. Returned is the nearest iterate that was wrong, or the clean picture where none
/// was; [`Outcome::distance`] is its L2 distance. Pictures that are wrong from the beginning are
/// left alone. There is no search over `c`.
///
/// It differs from torchattacks in this: the other logit is the largest of the others (there it
/// is at least 0); a picture stops by its own cost (there by that of the batch); 2 x - 1 is cut
/// to +-(1 - 1e-6), where the inverse of tanh is finite (there a pixel of 0 or 1 never moves).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cw {
    /// What the margin weighs against the distance.
    pub c: f64,
    /// The margin's ceiling, from 0: how sure the model is to be of the wrong class.
    pub kappa: f64,
    /// The most steps. A picture stops earlier where its cost has risen since the last look, each
    /// tenth of them.
    pub steps: usize,
    /// Adam's learning rate.
    pub lr: f64,
}

impl Default for Cw {
    /// 50 steps of 0.01 with c 1 and kappa 0.
    fn default() -> Self {
        Self { c: 1.0, kappa: 0.0, steps: 50, lr: 0.01 }
    }
}

impl Cw {
    fn check(&self) -> Result<()> {
        for (what, value) in [("c", self.c), ("kappa", self.kappa), ("lr", self.lr)] {
            if !((value as f32).is_finite() && value >= 0.0) {
                return Err(Error::argument(what, "a number from 0", value));
            }
        }
        Ok(())
    }

    fn loss(&self) -> Loss {
        Loss::Margin { kappa: Some(self.kappa) }
    }
}

/// The largest |2 x - 1| whose inverse of tanh is taken.
const WALL: f64 = 1.0 - 1e-6;

/// The pictures still under attack; all tensors `(R, 3, H, W)`.
struct Descent {
    /// Their numbers among all pictures.
    rows: Vec<usize>,
    clean: Tensor,
    w: Tensor,
    /// Adam's means of the gradient and of its square.
    first: Tensor,
    second: Tensor,
    /// Each one's cost at the last look.
    cost: Vec<f64>,
}

impl Descent {
    fn new(rows: Vec<usize>, clean: Tensor) -> Result<Self> {
        let u = ((&clean * 2.0)? - 1.0)?.clamp(-WALL, WALL)?;
        let w = (((&u + 1.0)? / (1.0 - u)?)?.log()? * 0.5)?;
        let zeros = clean.zeros_like()?;
        Ok(Self {
            cost: vec![f64::INFINITY; rows.len()],
            rows,
            clean,
            w,
            first: zeros.clone(),
            second: zeros,
        })
    }

    /// Goes on with these of its pictures alone.
    fn select(&mut self, kept: &[usize]) -> Result<()> {
        self.rows = kept.iter().map(|&i| self.rows[i]).collect();
        self.cost = kept.iter().map(|&i| self.cost[i]).collect();
        for tensor in [&mut self.clean, &mut self.w, &mut self.first, &mut self.second] {
            *tensor = select(tensor, kept)?;
        }
        Ok(())
    }

    /// Adam's step `number`, from 1, down `gradient`.
    fn step(&mut self, gradient: &Tensor, number: usize, lr: f64) -> Result<()> {
        const BETAS: (f64, f64) = (0.9, 0.999);
        const EPSILON: f64 = 1e-8;
        self.first = ((&self.first * BETAS.0)? + (gradient * (1.0 - BETAS.0))?)?;
        self.second = ((&self.second * BETAS.1)? + (gradient.sqr()? * (1.0 - BETAS.1))?)?;
        let number = number as f64;
        let (bias1, bias2) = (1.0 - BETAS.0.powf(number), 1.0 - BETAS.1.powf(number));
        let below = ((&self.second / bias2)?.sqrt()? + EPSILON)?;
        self.w = (&self.w - ((&self.first * (lr / bias1))? / below)?)?;
        Ok(())
    }
}

impl Attack for Cw {
    fn name(&self) -> &str {
        "cw-l2"
    }

    fn parameters(&self) -> Value {
        json!(self)
    }

    fn eps(&self) -> Option<Eps> {
        None
    }

    fn craft(
        &self,
        task: &Classification,
        pictures: &Pictures,
        seed: u64,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<Crafted> {
        self.check()?;
        let objective = task.objective(self.loss())?;
        if objective.pictures() != pictures.len() {
            let expected = format!("one per picture, {}", pictures.len());
            return Err(Error::argument("labels", expected, objective.pictures()));
        }
        let mut finished = Finished::new(pictures)?;
        let rows = pictures.rows();
        if !rows.is_empty() {
            self.descend(&objective, pictures, rows, &mut finished, progress)?;
        }
        let recipe = Recipe {
            attack: self.name().into(),
            parameters: self.parameters(),
            objective: objective.describe(),
            eps: None,
            seed,
            crafted_on: objective.subject().clone(),
            quantised: false,
        };
        finished.crafted(pictures, recipe)
    }
}

impl Cw {
    fn descend(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        rows: Vec<usize>,
        finished: &mut Finished,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let clean = select(pictures.pixels(), &rows)?;
        let evaluation = objective.values(&clean, &rows)?;
        for (i, &row) in rows.iter().enumerate() {
            let wrong = evaluation.is_fooled(i);
            let loss = Some(evaluation.loss[i]);
            finished.outcomes[row] = Outcome {
                attacked: !wrong,
                clean_loss: loss,
                loss,
                fooled: Some(wrong),
                distance: wrong.then_some(0.0),
                ..Outcome::default()
            };
        }
        let kept: Vec<usize> = (0..rows.len()).filter(|&i| !evaluation.is_fooled(i)).collect();
        if kept.is_empty() {
            return Ok(());
        }
        let mut descent = Descent::new(kept.iter().map(|&i| rows[i]).collect(), select(&clean, &kept)?)?;
        let began_with = descent.rows.clone();
        for step in 0..self.steps {
            let tanh = descent.w.tanh()?;
            let pixels = ((&tanh + 1.0)? * 0.5)?;
            let (found, gradient) = objective.values_and_gradient(&pixels, &descent.rows)?;
            let (gradient, nan) = without_nan(&gradient)?;
            let away = (&pixels - &descent.clean)?;
            let squares: Vec<f32> = away.sqr()?.flatten_from(1)?.sum(D::Minus1)?.to_vec1()?;
            for (i, &row) in descent.rows.iter().enumerate() {
                let outcome = &mut finished.outcomes[row];
                outcome.gradients += 1;
                outcome.nan_gradients += nan[i];
                let distance = f64::from(squares[i]).sqrt();
                if found.is_fooled(i) && outcome.distance.is_none_or(|least| distance < least) {
                    outcome.distance = Some(distance);
                    outcome.fooled = Some(true);
                    outcome.loss = Some(found.loss[i]);
                    finished.pixels[row] = pixels.narrow(0, i, 1)?.force_contiguous()?;
                }
            }
            let fooled = began_with.iter().filter(|&&row| finished.outcomes[row].fooled == Some(true));
            let (steps, active, fooled) = (self.steps, descent.rows.len(), Some(fooled.count()));
            progress(&Progress { step: step + 1, steps, active, fooled });
            // The slope of (tanh w + 1) / 2.
            let slope = ((1.0 - tanh.sqr()?)? * 0.5)?;
            // Cut to what f32 can square: an infinite entry would leave no number in w.
            let gradient = ((away * 2.0)? - (gradient * self.c)?)?.clamp(-1e18, 1e18)?;
            let gradient = (gradient * slope)?;
            descent.step(&gradient, step + 1, self.lr)?;
            if step % (self.steps / 10).max(1) == 0 && !self.look(&mut descent, &found, &squares)? {
                if step + 1 < steps {
                    progress(&Progress { step: steps, steps, active: 0, fooled });
                }
                break;
            }
        }
        Ok(())
    }

    /// Drops the pictures whose cost has risen since the last look; whether any is left.
    fn look(&self, descent: &mut Descent, found: &Evaluation, squares: &[f32]) -> Result<bool> {
        let cost = |i: usize| f64::from(squares[i]) - self.c * found.loss[i];
        let costs: Vec<f64> = (0..descent.rows.len()).map(cost).collect();
        let rose = |i: usize| costs[i] > descent.cost[i];
        let kept: Vec<usize> = (0..costs.len()).filter(|&i| !rose(i)).collect();
        descent.cost = costs;
        if kept.is_empty() {
            return Ok(false);
        }
        descent.select(&kept)?;
        Ok(true)
    }
}
