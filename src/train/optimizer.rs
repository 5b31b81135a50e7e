use std::f64::consts::PI;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a gradient does to the anchor, as in PyTorch's `torch.optim`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum Optimizer {
    /// Adam (Kingma and Ba 2015), beta 0.9 and 0.999, epsilon 1e-8.
    Adam {
        /// The learning rate.
        rate: f64,
    },
    /// Gradient descent with momentum.
    Sgd {
        /// The learning rate.
        rate: f64,
        /// The share of the last step that goes into the next.
        momentum: f64,
    },
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// What an optimizer remembers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Moments {
    pub(super) steps: u64,
    /// Of the gradient.
    pub(super) first: Vec<f32>,
    /// Of its square.
    pub(super) second: Vec<f32>,
}

impl Moments {
    pub(super) fn new(n: usize) -> Self {
        Self { steps: 0, first: vec![0.0; n], second: vec![0.0; n] }
    }
}

impl Optimizer {
    /// Adam at 0.01.
    pub const ADAM: Self = Self::Adam { rate: 0.01 };

    pub(super) fn check(self) -> Result<()> {
        let (rate, momentum) = match self {
            Self::Adam { rate } => (rate, 0.0),
            Self::Sgd { rate, momentum } => (rate, momentum),
        };
        if !((rate as f32).is_finite() && rate > 0.0) {
            return Err(Error::argument("learning rate", "a positive number", rate));
        }
        if !(0.0..1.0).contains(&momentum) {
            return Err(Error::argument("momentum", "from 0 to below 1", momentum));
        }
        Ok(())
    }

    /// One step of `values` along `gradient`, the learning rate multiplied by `factor`.
    pub(super) fn step(self, values: &mut [f32], gradient: &[f32], moments: &mut Moments, factor: f64) {
        moments.steps += 1;
        match self {
            Self::Adam { rate } => {
                let bias = |beta: f64| 1.0 - beta.powf(moments.steps as f64);
                let size = (rate * factor / bias(BETA1)) as f32;
                let root = bias(BETA2).sqrt() as f32;
                let both = moments.first.iter_mut().zip(&mut moments.second);
                for ((value, &g), (first, second)) in values.iter_mut().zip(gradient).zip(both) {
                    *first += (1.0 - BETA1) as f32 * (g - *first);
                    *second = BETA2 as f32 * *second + (1.0 - BETA2) as f32 * g * g;
                    *value -= size * *first / (second.sqrt() / root + EPSILON as f32);
                }
            }
            Self::Sgd { rate, momentum } => {
                let size = (rate * factor) as f32;
                for ((value, &g), first) in values.iter_mut().zip(gradient).zip(&mut moments.first) {
                    *first = if moments.steps == 1 { g } else { momentum as f32 * *first + g };
                    *value -= size * *first;
                }
            }
        }
    }
}

/// What becomes of the learning rate over a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// It falls along half a cosine to zero.
    Cosine,
}

impl Schedule {
    /// The learning rate's factor in step `step`, counted from 0, of `of`.
    pub fn factor(self, step: usize, of: usize) -> f64 {
        match self {
            Self::Constant => 1.0,
            Self::Cosine => 0.5 * (1.0 + (PI * step as f64 / of.max(1) as f64).cos()),
        }
    }
}

impl std::fmt::Display for Schedule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Constant => "constant",
            Self::Cosine => "cosine",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "constant" => Ok(Self::Constant),
            "cosine" => Ok(Self::Cosine),
            other => Err(Error::argument("schedule", "constant or cosine", other)),
        }
    }
}
