use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Keeps DLR's quotient finite; the value of Croce and Hein's code.
const TINY: f64 = 1e-12;

/// What a picture's logits z lose, to be maximised. y is the label, t the target.
///
/// In all of them larger is better for the attacker, targeted or not.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "loss", rename_all = "kebab-case")]
pub enum Loss {
    /// -log softmax(z)_y.
    CrossEntropy,
    /// log softmax(z)_t.
    TargetedCrossEntropy,
    /// min(max_{i != y} z_i - z_y, kappa): Carlini and Wagner's. Beyond kappa the gradient is zero.
    Margin {
        /// The ceiling; none where not given.
        kappa: Option<f64>,
    },
    /// min(z_t - max_{i != t} z_i, kappa).
    TargetedMargin {
        /// The ceiling; none where not given.
        kappa: Option<f64>,
    },
    /// -(z_y - max_{i != y} z_i) / (z_(1) - z_(3)), with z_(k) the k-th largest: the difference of
    /// logits ratio (Croce and Hein 2020). Positive iff wrong. Needs 3 classes.
    Dlr,
    /// -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2). Needs 4 classes.
    TargetedDlr,
}

/// A loss per picture and its gradient at the logits.
#[derive(Debug, Clone)]
pub struct LossValues {
    /// One per picture.
    pub loss: Vec<f64>,
    /// Of each picture's own loss, `(B, K)` f32 on the logits' device.
    pub cotangent: Tensor,
}

impl Loss {
    /// Whether it needs a target.
    pub fn targeted(self) -> bool {
        matches!(self, Self::TargetedCrossEntropy | Self::TargetedMargin { .. } | Self::TargetedDlr)
    }

    /// The fewest classes it is defined for.
    pub fn classes(self) -> usize {
        match self {
            Self::CrossEntropy | Self::TargetedCrossEntropy => 1,
            Self::Margin { .. } | Self::TargetedMargin { .. } => 2,
            Self::Dlr => 3,
            Self::TargetedDlr => 4,
        }
    }

    /// The loss of every row of `logits` `(B, K)`, computed in f64.
    ///
    /// `labels` and, for a targeted loss, `targets` have a class per picture. Among equal logits
    /// the class of the lower number counts as the larger.
    ///
    /// # Errors
    /// If there are too few classes, labels or targets, or one of them is not a class.
    pub fn evaluate(
        self,
        logits: &Tensor,
        labels: &[usize],
        targets: Option<&[usize]>,
    ) -> Result<LossValues> {
        let (batch, classes) = logits.dims2()?;
        self.check(classes)?;
        check_classes("labels", labels, batch, classes)?;
        match targets {
            Some(targets) => check_classes("targets", targets, batch, classes)?,
            None if self.targeted() => {
                return Err(Error::argument("targets", "one per picture for a targeted loss", "none"));
            }
            None => {}
        }
        let mut loss = Vec::with_capacity(batch);
        let mut cotangent = Vec::with_capacity(batch * classes);
        for (row, z) in rows(logits)?.iter().enumerate() {
            let target = targets.map_or(labels[row], |targets| targets[row]);
            let (value, gradient) = self.of(z, labels[row], target);
            loss.push(value);
            cotangent.extend(gradient.into_iter().map(|g| g as f32));
        }
        Ok(LossValues { loss, cotangent: Tensor::from_vec(cotangent, (batch, classes), logits.device())? })
    }

    pub(super) fn check(self, classes: usize) -> Result<()> {
        let least = self.classes();
        if classes < least {
            return Err(Error::argument("classes", format!("at least {least} for this loss"), classes));
        }
        Ok(())
    }

    fn of(self, z: &[f64], y: usize, t: usize) -> (f64, Vec<f64>) {
        match self {
            Self::CrossEntropy => {
                let (value, gradient) = log_softmax(z, y);
                (-value, gradient.into_iter().map(|g| -g).collect())
            }
            Self::TargetedCrossEntropy => log_softmax(z, t),
            Self::Margin { kappa } => margin(z, largest_but(z, y), y, kappa),
            Self::TargetedMargin { kappa } => margin(z, t, largest_but(z, t), kappa),
            Self::Dlr => ratio(z, y, largest_but(z, y), &[1.0, 0.0, -1.0]),
            Self::TargetedDlr => ratio(z, y, t, &[1.0, 0.0, -0.5, -0.5]),
        }
    }
}

/// log softmax(z)_k and its gradient.
fn log_softmax(z: &[f64], k: usize) -> (f64, Vec<f64>) {
    let most = z[largest(z)];
    let exponents: Vec<f64> = z.iter().map(|v| (v - most).exp()).collect();
    let sum: f64 = exponents.iter().sum();
    // 1 - p_k as the sum of the others: it does not vanish where p_k rounds to 1.
    let others: f64 = exponents.iter().enumerate().filter(|(i, _)| *i != k).map(|(_, e)| e).sum();
    let mut gradient: Vec<f64> = exponents.iter().map(|e| -e / sum).collect();
    gradient[k] = others / sum;
    // Where k is the largest, its exponent is 1 and the sum is 1 + others.
    let log_sum = if z[k] == most { others.ln_1p() } else { sum.ln() };
    (z[k] - most - log_sum, gradient)
}

/// min(z_up - z_down, kappa) and its gradient.
fn margin(z: &[f64], up: usize, down: usize, kappa: Option<f64>) -> (f64, Vec<f64>) {
    let value = z[up] - z[down];
    let mut gradient = vec![0.0; z.len()];
    match kappa {
        Some(kappa) if value > kappa => (kappa, gradient),
        _ => {
            gradient[up] += 1.0;
            gradient[down] -= 1.0;
            (value, gradient)
        }
    }
}

/// -(z_y - z_other) / (sum_k weights_k z_(k)) and its gradient.
fn ratio(z: &[f64], y: usize, other: usize, weights: &[f64]) -> (f64, Vec<f64>) {
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|&a, &b| z[b].total_cmp(&z[a]));
    let below = order.iter().zip(weights).map(|(&i, w)| w * z[i]).sum::<f64>() + TINY;
    let above = z[other] - z[y];
    let mut gradient = vec![0.0; z.len()];
    gradient[other] += 1.0 / below;
    gradient[y] -= 1.0 / below;
    for (&i, w) in order.iter().zip(weights) {
        gradient[i] -= w * above / (below * below);
    }
    (above / below, gradient)
}

/// The class of the largest logit, the first of equals.
pub(super) fn largest(z: &[f64]) -> usize {
    (1..z.len()).fold(0, |best, i| if z[i] > z[best] { i } else { best })
}

/// The class of the largest logit but `but`, the first of equals.
fn largest_but(z: &[f64], but: usize) -> usize {
    let first = usize::from(but == 0);
    (first..z.len()).filter(|&i| i != but).fold(first, |best, i| if z[i] > z[best] { i } else { best })
}

/// Whether `class` is the largest logit, the first of equals. Never so among NaN.
pub(super) fn wins(z: &[f64], class: usize) -> bool {
    let value = z[class];
    z.iter().enumerate().all(|(i, &v)| if i < class { value > v } else { value >= v })
}

/// `(B, K)` as rows of f64.
pub(super) fn rows(logits: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec2()?)
}

/// Refuses anything but `batch` numbers below `classes`.
pub(super) fn check_classes(what: &str, given: &[usize], batch: usize, classes: usize) -> Result<()> {
    if given.len() != batch {
        return Err(Error::argument(what, format!("one per picture, {batch}"), given.len()));
    }
    match given.iter().find(|&&class| class >= classes) {
        Some(class) => {
            Err(Error::argument(what, format!("classes 0 to {}", classes.saturating_sub(1)), class))
        }
        None => Ok(()),
    }
}
