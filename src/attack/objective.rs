use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::Tensor;
use serde_json::{Value, json};

use super::loss::{check_classes, largest, rows as logit_rows, wins};
use super::pictures::select;
use super::{Loss, Pictures, Subject};
use crate::tower::layers::on_host;
use crate::{Error, Result};

/// A function of pixels to logits, with its transpose.
pub trait Classifier: Sync {
    /// Which model this is, defence included.
    fn subject(&self) -> &Subject;

    /// Number of classes, K.
    fn classes(&self) -> usize;

    /// The most pictures it is given at once. A picture's result can depend on how many there
    /// are in the last bits, as matrix products do; with 1 it cannot.
    fn batch(&self) -> usize {
        usize::MAX
    }

    /// Pixels `(B, 3, H, W)` f32 in [0, 1] to logits `(B, K)` f32.
    fn logits(&self, pixels: &Tensor) -> Result<Tensor>;

    /// The logits `(B, K)`, and for each cotangent `(B, K)` f32 that `cotangents` makes of them
    /// the gradient `(B, 3, H, W)` f32 at the pixels: one forward pass, any number of backward
    /// passes (one for a loss, K for FAB).
    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)>;

    /// Whether [`Classifier::near_logits_and_gradients`] gives other logits than
    /// [`Classifier::logits`], which alone say whether a picture is fooled.
    fn is_near(&self) -> bool {
        false
    }

    /// As [`Classifier::logits_and_gradients`], with logits that are only near the classifier's
    /// where [`Classifier::is_near`].
    fn near_logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.logits_and_gradients(pixels, cotangents)
    }
}

impl<C: Classifier + ?Sized> Classifier for &C {
    fn subject(&self) -> &Subject {
        (**self).subject()
    }

    fn classes(&self) -> usize {
        (**self).classes()
    }

    fn batch(&self) -> usize {
        (**self).batch()
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        (**self).logits(pixels)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        (**self).logits_and_gradients(pixels, cotangents)
    }

    fn is_near(&self) -> bool {
        (**self).is_near()
    }

    fn near_logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        (**self).near_logits_and_gradients(pixels, cotangents)
    }
}

/// What an objective says of pictures.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Evaluation {
    /// Per picture, to be maximised.
    pub loss: Vec<f64>,
    /// Per picture, whether the attack has reached its goal; `None` for an objective without one.
    pub fooled: Option<Vec<bool>>,
}

impl Evaluation {
    /// Whether picture `i` has reached the goal.
    pub fn is_fooled(&self, i: usize) -> bool {
        self.fooled.as_ref().is_some_and(|fooled| fooled[i])
    }

    /// Whether picture `i` here is better for the attacker than picture `j` of `other`: fooled
    /// before not fooled, then the higher loss. A loss that is not a number is below all others.
    pub fn beats(&self, i: usize, other: &Self, j: usize) -> bool {
        let [found, best] =
            [self.loss[i], other.loss[j]].map(|l| if l.is_nan() { f64::NEG_INFINITY } else { l });
        match (self.is_fooled(i), other.is_fooled(j)) {
            (true, false) => true,
            (false, true) => false,
            _ => found > best,
        }
    }

    /// The pictures `rows` alone.
    pub fn select(&self, rows: &[usize]) -> Self {
        Self {
            loss: rows.iter().map(|&row| self.loss[row]).collect(),
            fooled: self.fooled.as_ref().map(|fooled| rows.iter().map(|&row| fooled[row]).collect()),
        }
    }
}

/// A scalar per picture that an attack climbs.
///
/// It is made for n pictures and asked about some of them at a time: `rows` are their numbers, in
/// the order of the pixels given, so that pictures can leave the batch. What it says of a picture
/// depends on that picture alone.
pub trait Objective {
    /// Which model it is computed on, defence included.
    fn subject(&self) -> &Subject;

    /// The number of pictures it is made for.
    fn pictures(&self) -> usize;

    /// What it is, for the record.
    fn describe(&self) -> Value;

    /// At pixels `(R, 3, H, W)` f32 in [0, 1] of the pictures `rows`.
    ///
    /// # Errors
    /// If a row does not exist, there are not as many as pictures, or the model fails.
    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation>;

    /// As [`Objective::values`], and the gradient `(R, 3, H, W)` f32 of each picture's loss at its
    /// pixels. It may contain NaN; attacks take that for 0 and count it.
    fn values_and_gradient(&self, pixels: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)>;
}

/// Refuses pictures that an objective is not made for.
pub(super) fn check_pictures(objective: &dyn Objective, pictures: &Pictures) -> Result<()> {
    if objective.pictures() != pictures.len() {
        let expected = format!("as many as the objective is made for, {}", objective.pictures());
        return Err(Error::argument("pictures", expected, pictures.len()));
    }
    Ok(())
}

/// Refuses rows that an objective over `pictures` does not have, or that do not match `pixels`.
pub(super) fn check_rows(pixels: &Tensor, rows: &[usize], pictures: usize) -> Result<()> {
    let batch = pixels.dims().first().copied().unwrap_or(0);
    if rows.len() != batch || rows.is_empty() {
        return Err(Error::argument("rows", format!("one per picture, {batch}"), rows.len()));
    }
    match rows.iter().find(|&&row| row >= pictures) {
        Some(row) => {
            Err(Error::argument("rows", format!("pictures 0 to {}", pictures.saturating_sub(1)), row))
        }
        None => Ok(()),
    }
}

/// Pictures worked on side by side on a CPU. Each holds what its gradient needs, half a gigabyte
/// for a picture in ViT-L/14 at 336 pixels.
const LANES: usize = 8;

/// Runs `f` over at most `batch` pictures at a time, on a CPU several single pictures side by side,
/// and puts the results together in order. `f` gets pixels and their rows; its tensors have a row per
/// picture.
///
/// # Errors
/// The first that `f` gives.
pub fn in_batches(
    pixels: &Tensor,
    rows: &[usize],
    batch: usize,
    f: impl Fn(&Tensor, &[usize]) -> Result<(Evaluation, Vec<Tensor>)> + Sync,
) -> Result<(Evaluation, Vec<Tensor>)> {
    let batch = batch.max(1);
    if rows.len() <= batch {
        return f(pixels, rows);
    }
    let parts: Vec<&[usize]> = rows.chunks(batch).collect();
    // What takes several pictures at once spreads them over the threads itself.
    let lanes = if on_host(pixels.device()) && batch == 1 { LANES } else { 1 };
    let threads = rayon::current_num_threads().min(lanes);
    let next = AtomicUsize::new(0);
    // Threads of their own: a worker of rayon's that waits for a matrix product would begin
    // another batch meanwhile, and hold more and more of them.
    let lane = || {
        let mut found = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(part) = parts.get(i) else { break };
            let result = pixels.narrow(0, i * batch, part.len()).map_err(Error::from);
            let result = result.and_then(|pixels| f(&pixels, part));
            if result.is_err() {
                // Nothing more to begin.
                next.store(parts.len(), Ordering::Relaxed);
            }
            found.push((i, result));
        }
        found
    };
    let mut found = if threads.min(parts.len()) == 1 {
        lane()
    } else {
        std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..threads.min(parts.len())).map(|_| scope.spawn(lane)).collect();
            let join = |lane: std::thread::ScopedJoinHandle<'_, _>| {
                lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            lanes.into_iter().flat_map(join).collect::<Vec<_>>()
        })
    };
    found.sort_by_key(|(i, _)| *i);
    let mut whole = Evaluation::default();
    let mut tensors: Vec<Vec<Tensor>> = Vec::new();
    for (_, result) in found {
        let (evaluation, parts) = result?;
        whole.loss.extend(evaluation.loss);
        if let Some(fooled) = evaluation.fooled {
            whole.fooled.get_or_insert_default().extend(fooled);
        }
        tensors.resize(parts.len().max(tensors.len()), Vec::new());
        tensors.iter_mut().zip(parts).for_each(|(column, tensor)| column.push(tensor));
    }
    let tensors = tensors.iter().map(|column| Ok(Tensor::cat(column, 0)?)).collect::<Result<_>>()?;
    Ok((whole, tensors))
}

/// A classifier and the labels of n pictures: what an attack on classification is given.
#[derive(Clone)]
pub struct Classification<'a> {
    classifier: &'a dyn Classifier,
    labels: Vec<usize>,
}

impl<'a> Classification<'a> {
    /// `labels` has a class number per picture.
    ///
    /// # Errors
    /// If one is not a class.
    pub fn new(classifier: &'a dyn Classifier, labels: Vec<usize>) -> Result<Self> {
        check_classes("labels", &labels, labels.len(), classifier.classes())?;
        Ok(Self { classifier, labels })
    }

    /// The classifier.
    pub fn classifier(&self) -> &'a dyn Classifier {
        self.classifier
    }

    /// A class number per picture.
    pub fn labels(&self) -> &[usize] {
        &self.labels
    }

    /// The logits `(R, K)` f32 of pixels `(R, 3, H, W)`, no more than [`Classifier::batch`] at a
    /// time.
    pub fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let rows: Vec<usize> = (0..pixels.dim(0)?).collect();
        let (_, mut found) = in_batches(pixels, &rows, self.classifier.batch(), |pixels, _| {
            Ok((Evaluation::default(), vec![self.classifier.logits(pixels)?]))
        })?;
        found.pop().ok_or_else(|| Error::argument("pixels", "at least one picture", "none"))
    }

    /// The class each of pixels `(R, 3, H, W)` is given: the largest logit, the first of equals.
    pub fn predictions(&self, pixels: &Tensor) -> Result<Vec<usize>> {
        Ok(logit_rows(&self.logits(pixels)?)?.iter().map(|z| largest(z)).collect())
    }

    /// Whether the pictures `rows`, at pixels `(R, 3, H, W)`, are given their labels. A picture
    /// with logits that are not numbers is not.
    pub fn correct(&self, pixels: &Tensor, rows: &[usize]) -> Result<Vec<bool>> {
        check_rows(pixels, rows, self.labels.len())?;
        let logits = logit_rows(&self.logits(pixels)?)?;
        Ok(logits.iter().zip(rows).map(|(z, &row)| wins(z, self.labels[row])).collect())
    }

    /// The objective of an untargeted loss.
    ///
    /// # Errors
    /// If the loss needs targets, or more classes than there are.
    pub fn objective(&self, loss: Loss) -> Result<ClassificationObjective<'a>> {
        if loss.targeted() {
            return Err(Error::argument("loss", "an untargeted loss", format!("{loss:?}")));
        }
        loss.check(self.classifier.classes())?;
        Ok(ClassificationObjective { task: self.clone(), loss, targets: None, goal: Goal::Misclassify })
    }

    /// The objective of a targeted loss, `targets` having a class per picture.
    ///
    /// # Errors
    /// If the loss takes no targets or needs more classes than there are, or a target is not a
    /// class.
    pub fn targeted(
        &self,
        loss: Loss,
        targets: Vec<usize>,
        goal: Goal,
    ) -> Result<ClassificationObjective<'a>> {
        if !loss.targeted() {
            return Err(Error::argument("loss", "a targeted loss", format!("{loss:?}")));
        }
        loss.check(self.classifier.classes())?;
        check_classes("targets", &targets, self.labels.len(), self.classifier.classes())?;
        Ok(ClassificationObjective { task: self.clone(), loss, targets: Some(targets), goal })
    }
}

/// When an attack on a classifier has succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Any class but the label: untargeted attacks, and APGD-T and FAB-T, which use targets only
    /// to find a way.
    Misclassify,
    /// The target class.
    Target,
}

/// A loss of a classifier's logits as an [`Objective`].
#[derive(Clone)]
pub struct ClassificationObjective<'a> {
    task: Classification<'a>,
    loss: Loss,
    targets: Option<Vec<usize>>,
    goal: Goal,
}

impl ClassificationObjective<'_> {
    /// Losses, successes and cotangent of the pictures `rows` from their logits.
    fn at_logits(&self, logits: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        let pick = |classes: &[usize]| -> Vec<usize> { rows.iter().map(|&row| classes[row]).collect() };
        let labels = pick(&self.task.labels);
        let targets = self.targets.as_deref().map(pick);
        let found = self.loss.evaluate(logits, &labels, targets.as_deref())?;
        let logits = logit_rows(logits)?;
        let fooled = match (self.goal, targets) {
            (Goal::Target, Some(targets)) => logits.iter().zip(&targets).map(|(z, &t)| wins(z, t)).collect(),
            _ => logits.iter().zip(&labels).map(|(z, &y)| !wins(z, y)).collect(),
        };
        Ok((Evaluation { loss: found.loss, fooled: Some(fooled) }, found.cotangent))
    }
}

impl ClassificationObjective<'_> {
    /// What the exact logits say of the pictures that those near them call fooled.
    fn verify(&self, pixels: &Tensor, rows: &[usize], evaluation: &mut Evaluation) -> Result<()> {
        let claimed: Vec<usize> = (0..rows.len()).filter(|&i| evaluation.is_fooled(i)).collect();
        if claimed.is_empty() {
            return Ok(());
        }
        let logits = self.task.classifier.logits(&select(pixels, &claimed)?)?;
        let claimed_rows: Vec<usize> = claimed.iter().map(|&i| rows[i]).collect();
        let (exact, _) = self.at_logits(&logits, &claimed_rows)?;
        for (j, &i) in claimed.iter().enumerate() {
            evaluation.loss[i] = exact.loss[j];
            if let Some(fooled) = &mut evaluation.fooled {
                fooled[i] = exact.is_fooled(j);
            }
        }
        Ok(())
    }
}

impl Objective for ClassificationObjective<'_> {
    fn subject(&self) -> &Subject {
        self.task.classifier.subject()
    }

    fn pictures(&self) -> usize {
        self.task.labels.len()
    }

    fn describe(&self) -> Value {
        let goal = match self.goal {
            Goal::Misclassify => "misclassify",
            Goal::Target => "target",
        };
        let mut description = json!(self.loss);
        description["goal"] = json!(goal);
        description
    }

    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
        check_rows(pixels, rows, self.pictures())?;
        let classifier = self.task.classifier;
        let (evaluation, _) = in_batches(pixels, rows, classifier.batch(), |pixels, rows| {
            Ok((self.at_logits(&classifier.logits(pixels)?, rows)?.0, Vec::new()))
        })?;
        Ok(evaluation)
    }

    fn values_and_gradient(&self, pixels: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        check_rows(pixels, rows, self.pictures())?;
        let classifier = self.task.classifier;
        let (evaluation, mut gradients) = in_batches(pixels, rows, classifier.batch(), |pixels, rows| {
            let mut evaluation = Evaluation::default();
            let (_, gradients) = classifier.near_logits_and_gradients(pixels, &mut |logits| {
                let (found, cotangent) = self.at_logits(logits, rows)?;
                evaluation = found;
                Ok(vec![cotangent])
            })?;
            if classifier.is_near() {
                self.verify(pixels, rows, &mut evaluation)?;
            }
            Ok((evaluation, gradients))
        })?;
        let missing = || Error::argument("classifier", "a gradient per cotangent", "none");
        Ok((evaluation, gradients.pop().ok_or_else(missing)?))
    }
}

/// The gradient with 0 for NaN, and how many there were per picture.
pub(super) fn without_nan(gradient: &Tensor) -> Result<(Tensor, Vec<u64>)> {
    let nan = gradient.ne(gradient)?;
    let counts: Vec<u32> = nan.to_dtype(candle_core::DType::U32)?.flatten_from(1)?.sum(1)?.to_vec1()?;
    if counts.iter().all(|&count| count == 0) {
        return Ok((gradient.clone(), vec![0; counts.len()]));
    }
    let gradient = nan.where_cond(&gradient.zeros_like()?, gradient)?;
    Ok((gradient, counts.into_iter().map(u64::from).collect()))
}

/// Per picture, `new` where `taken`, else `old`; all `(R, ...)`.
pub(super) fn take(taken: &[bool], new: &Tensor, old: &Tensor) -> Result<Tensor> {
    if !taken.contains(&true) {
        return Ok(old.clone());
    }
    if !taken.contains(&false) {
        return Ok(new.clone());
    }
    let rows: Vec<usize> =
        (0..taken.len()).map(|row| if taken[row] { row } else { row + taken.len() }).collect();
    select(&Tensor::cat(&[new, old], 0)?, &rows)
}
