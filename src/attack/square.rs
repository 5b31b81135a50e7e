use candle_core::Tensor;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::crafted::Finished;
use super::objective::check_pictures;
use super::pictures::select;
use super::{
    Crafted, Eps, Evaluation, Loss, Maximise, Objective, OnLoss, Pictures, Progress, Recipe, picture_rng,
};
use crate::{Error, Result};

/// Square in the Linf norm (Andriushchenko et al. 2020): a random search that sees values of the
/// objective and never a gradient.
///
/// It begins at the picture with vertical stripes of +-eps, one sign per channel and column. Each
/// query paints a square of +-eps, one sign per channel, and keeps it where it raises the
/// objective or reaches the goal; the squares shrink on a schedule. A picture is left as soon as
/// it reaches the goal; those that reach it untouched are left alone. Where nothing found is
/// better than the clean picture, the clean one is returned.
///
/// Upstream draws one place and one set of signs per query for the whole batch. Here every picture
/// draws its own from its key, so that its result does not depend on its batch. As there, a square
/// smaller than the picture never touches the last row and column. A tie counts as wrong there;
/// here the objective's goal decides. Pictures may be of any height and width; the square's side
/// comes from their area and is at most the shorter of the two.
///
/// On a labelled task it climbs the margin: [`Square::on`] with [`Loss::Margin`] without ceiling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Square {
    /// The radius of the ball.
    pub eps: Eps,
    /// The most queries after the start.
    pub queries: usize,
    /// The first square's share of the picture.
    pub p_init: f64,
    /// Stretch the schedule, made for 10000 queries, to `queries`.
    pub rescale: bool,
}

impl Square {
    /// As in AutoAttack's `standard`: 5000 queries on the schedule for 10000.
    pub fn standard(eps: Eps) -> Self {
        Self { eps, queries: 5000, p_init: 0.8, rescale: false }
    }

    /// As in torchattacks: 5000 queries with the schedule stretched to them.
    pub fn torchattacks(eps: Eps) -> Self {
        Self { rescale: true, ..Self::standard(eps) }
    }

    /// On a loss, as an [`super::Attack`] on a labelled task.
    pub fn on(self, loss: Loss) -> OnLoss<Self> {
        OnLoss { name: self.name().into(), maximise: self, loss }
    }

    /// The side of the square of `query`, from 0, on a picture of `height` x `width`.
    pub fn side(&self, query: usize, height: usize, width: usize) -> usize {
        // How often the share has been halved, by the number of the query.
        const HALVED_AFTER: [usize; 9] = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000];
        let query = if self.rescale {
            (query as f64 / self.queries.max(1) as f64 * 10_000.0) as usize
        } else {
            query
        };
        let halved = HALVED_AFTER.iter().filter(|after| query > **after).count();
        let share = self.p_init / f64::from(1u32 << halved);
        let side = (share * height as f64 * width as f64).sqrt().round_ties_even();
        (side as usize).max(1).min(height).min(width)
    }

    fn check(&self) -> Result<()> {
        if !(self.p_init > 0.0 && self.p_init <= 1.0) {
            return Err(Error::argument("p_init", "a share of the picture, above 0 up to 1", self.p_init));
        }
        Ok(())
    }
}

/// The shape of a picture.
#[derive(Clone, Copy)]
struct Shape {
    height: usize,
    width: usize,
}

impl Shape {
    const CHANNELS: usize = 3;

    /// The entries of row `y` of channel `c` from column `x` on, `side` of them.
    fn row(self, c: usize, y: usize, x: usize, side: usize) -> std::ops::Range<usize> {
        let start = (c * self.height + y) * self.width + x;
        start..start + side
    }
}

/// A picture under attack.
struct Candidate<'a> {
    row: usize,
    rng: ChaCha8Rng,
    clean: &'a [f32],
    /// The best so far, with the square on trial painted in.
    pixels: Vec<f32>,
    /// What the square on trial covers: its place and the values before it.
    place: (usize, usize),
    covered: Vec<f32>,
}

impl Candidate<'_> {
    fn value(&self, at: usize, up: bool, eps: f32) -> f32 {
        (self.clean[at] + if up { eps } else { -eps }).clamp(0.0, 1.0)
    }

    /// Stripes over the whole picture.
    fn stripes(&mut self, shape: Shape, eps: f32) {
        for c in 0..Shape::CHANNELS {
            for x in 0..shape.width {
                let up = coin(&mut self.rng);
                for y in 0..shape.height {
                    let at = shape.row(c, y, x, 1).start;
                    self.pixels[at] = self.value(at, up, eps);
                }
            }
        }
    }

    /// Paints a square. Within the ball and the box, x' +- 2 eps cut to both is x +- eps.
    fn paint(&mut self, shape: Shape, side: usize, eps: f32) {
        self.place = (below(&mut self.rng, shape.height - side), below(&mut self.rng, shape.width - side));
        self.covered.clear();
        for c in 0..Shape::CHANNELS {
            let up = coin(&mut self.rng);
            for y in 0..side {
                for at in shape.row(c, self.place.0 + y, self.place.1, side) {
                    self.covered.push(self.pixels[at]);
                    self.pixels[at] = self.value(at, up, eps);
                }
            }
        }
    }

    /// Takes the last square off again.
    fn wipe(&mut self, shape: Shape, side: usize) {
        let mut covered = self.covered.chunks_exact(side);
        for c in 0..Shape::CHANNELS {
            for (y, covered) in (0..side).zip(&mut covered) {
                self.pixels[shape.row(c, self.place.0 + y, self.place.1, side)].copy_from_slice(covered);
            }
        }
    }
}

fn coin(rng: &mut ChaCha8Rng) -> bool {
    rng.next_u32() >> 31 == 1
}

/// Uniform below `n`; 0 where n is 0.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize
}

/// The pictures under attack and what is said of the best of each.
struct Search<'a> {
    objective: &'a dyn Objective,
    like: &'a Tensor,
    candidates: Vec<Candidate<'a>>,
    best: Evaluation,
}

impl Search<'_> {
    /// What the objective says of the candidates as they are.
    fn ask(&self) -> Result<Evaluation> {
        let mut shape = self.like.dims().to_vec();
        shape[0] = self.candidates.len();
        let mut pixels = Vec::with_capacity(shape.iter().product());
        self.candidates.iter().for_each(|candidate| pixels.extend_from_slice(&candidate.pixels));
        let rows: Vec<usize> = self.candidates.iter().map(|candidate| candidate.row).collect();
        self.objective.values(&Tensor::from_vec(pixels, shape, self.like.device())?, &rows)
    }

    /// Puts down what has reached the goal and goes on without it; how many those were.
    fn leave(&mut self, finished: &mut Finished) -> Result<usize> {
        let kept: Vec<usize> = (0..self.candidates.len()).filter(|&i| !self.best.is_fooled(i)).collect();
        let left = self.candidates.len() - kept.len();
        if left > 0 {
            let best = std::mem::take(&mut self.best);
            self.best = best.select(&kept);
            for (i, candidate) in std::mem::take(&mut self.candidates).into_iter().enumerate() {
                if best.is_fooled(i) {
                    candidate.settle(&best, i, self.like, finished)?;
                } else {
                    self.candidates.push(candidate);
                }
            }
        }
        Ok(left)
    }
}

impl Candidate<'_> {
    /// Puts down in `finished` where it is; `evaluation` says at `i` what that is.
    fn settle(
        &self,
        evaluation: &Evaluation,
        i: usize,
        like: &Tensor,
        finished: &mut Finished,
    ) -> Result<()> {
        let mut shape = like.dims().to_vec();
        shape[0] = 1;
        finished.pixels[self.row] = Tensor::from_slice(&self.pixels, shape, like.device())?;
        finished.outcomes[self.row].loss = Some(evaluation.loss[i]);
        finished.outcomes[self.row].fooled = evaluation.fooled.as_ref().map(|fooled| fooled[i]);
        Ok(())
    }
}

impl Maximise for Square {
    fn name(&self) -> &'static str {
        "square"
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
            self.search(objective, pictures, rows, seed, &mut finished, progress)?;
        }
        finished.crafted(pictures, Recipe::of(self, objective, seed))
    }
}

impl Square {
    fn search(
        &self,
        objective: &dyn Objective,
        pictures: &Pictures,
        rows: Vec<usize>,
        seed: u64,
        finished: &mut Finished,
        progress: &mut dyn FnMut(&Progress),
    ) -> Result<()> {
        let pixels = select(pictures.pixels(), &rows)?;
        let clean = objective.values(&pixels, &rows)?;
        let attacked: Vec<usize> = (0..rows.len()).filter(|&i| !clean.is_fooled(i)).collect();
        for (i, &row) in rows.iter().enumerate() {
            let outcome = &mut finished.outcomes[row];
            outcome.clean_loss = Some(clean.loss[i]);
            outcome.loss = Some(clean.loss[i]);
            outcome.fooled = clean.fooled.as_ref().map(|fooled| fooled[i]);
            outcome.attacked = !clean.is_fooled(i);
        }
        if attacked.is_empty() {
            return Ok(());
        }
        let (_, _, height, width) = pixels.dims4()?;
        let shape = Shape { height, width };
        let eps = self.eps.value() as f32;
        let flat = pixels.flatten_all()?.to_vec1::<f32>()?;
        let each = flat.len() / rows.len();
        let mut candidates = Vec::with_capacity(attacked.len());
        for &i in &attacked {
            let clean = &flat[i * each..][..each];
            let rng = picture_rng(seed, pictures.keys()[rows[i]], 0, self.name());
            let covered = Vec::new();
            let pixels = clean.to_vec();
            let mut candidate = Candidate { row: rows[i], rng, clean, pixels, place: (0, 0), covered };
            candidate.stripes(shape, eps);
            candidates.push(candidate);
        }
        let mut search =
            Search { objective, like: pictures.pixels(), candidates, best: Evaluation::default() };
        search.best = search.ask()?;
        for candidate in &search.candidates {
            finished.outcomes[candidate.row].queries = Some(1);
        }
        let mut fooled = search.leave(finished)?;
        for query in 0..self.queries {
            if search.candidates.is_empty() {
                let steps = self.queries;
                progress(&Progress { step: steps, steps, active: 0, fooled: Some(fooled) });
                return Ok(());
            }
            let side = self.side(query, height, width);
            search.candidates.iter_mut().for_each(|candidate| candidate.paint(shape, side, eps));
            let found = search.ask()?;
            for (i, candidate) in search.candidates.iter_mut().enumerate() {
                if found.beats(i, &search.best, i) {
                    search.best.loss[i] = found.loss[i];
                    if let (Some(best), Some(found)) = (&mut search.best.fooled, &found.fooled) {
                        best[i] = found[i];
                    }
                } else {
                    candidate.wipe(shape, side);
                }
                if let Some(queries) = &mut finished.outcomes[candidate.row].queries {
                    *queries += 1;
                }
            }
            let active = search.candidates.len();
            fooled += search.leave(finished)?;
            let known = found.fooled.is_some().then_some(fooled);
            progress(&Progress { step: query + 1, steps: self.queries, active, fooled: known });
        }
        for (i, candidate) in search.candidates.iter().enumerate() {
            // None of these has reached the goal, so only the loss counts.
            let clean = finished.outcomes[candidate.row].clean_loss;
            if clean.is_none_or(|clean| clean.is_nan() || search.best.loss[i] > clean) {
                candidate.settle(&search.best, i, search.like, finished)?;
            }
        }
        Ok(())
    }
}
