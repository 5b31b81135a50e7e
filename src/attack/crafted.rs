use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::eps::TOLERANCE;
use super::pictures::outside;
use super::{Classification, Eps, Maximise, Objective, Pictures, Subject, Threat, ThreatKind, quantise};
use crate::{Error, Result};

/// How adversarial pictures were made; with the clean pictures and their keys it decides them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The attack's name: `pgd`.
    pub attack: String,
    /// All of its parameters.
    pub parameters: Value,
    /// What it climbed.
    pub objective: Value,
    /// The radius of the Linf ball; `None` for attacks that have none, such as the L2 C&W.
    pub eps: Option<Eps>,
    /// The seed.
    pub seed: u64,
    /// The model it was made on, defence included.
    pub crafted_on: Subject,
    /// Whether the pictures hold 8-bit values, as a file does.
    pub quantised: bool,
}

impl Recipe {
    /// Of what `attack` made on `objective`.
    pub(super) fn of(attack: &(impl Maximise + ?Sized), objective: &dyn Objective, seed: u64) -> Self {
        Self {
            attack: attack.name().into(),
            parameters: attack.parameters(),
            objective: objective.describe(),
            eps: attack.eps(),
            seed,
            crafted_on: objective.subject().clone(),
            quantised: false,
        }
    }
}

/// What became of one picture, on the model crafted on and before any rounding to 8 bits.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether it was attacked at all; otherwise it is returned unchanged.
    pub attacked: bool,
    /// The loss of the clean picture, where it was computed.
    pub clean_loss: Option<f64>,
    /// The loss of the picture returned, where it was computed.
    pub loss: Option<f64>,
    /// Whether the picture returned reaches the goal, where that is known.
    pub fooled: Option<bool>,
    /// Gradients taken.
    pub gradients: usize,
    /// Entries of those that were NaN, and taken for 0.
    pub nan_gradients: u64,
    /// Whether the gradient was zero everywhere where a walk began: then it tells nothing, and the
    /// model may be hiding it.
    #[serde(default)]
    pub zero_gradient: bool,
    /// For attacks that minimise it: how far from the clean picture the nearest one found lies that
    /// reaches the goal, in the attack's norm (FAB's Linf, C&W's L2), whether it is returned or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance: Option<f64>,
    /// For attacks that see no gradients: pictures shown to the model, the clean one not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queries: Option<usize>,
}

/// What an attack will return, by picture: the clean ones until something better is found.
pub(super) struct Finished {
    /// `(1, 3, H, W)` each.
    pub(super) pixels: Vec<Tensor>,
    pub(super) outcomes: Vec<Outcome>,
}

impl Finished {
    pub(super) fn new(pictures: &Pictures) -> Result<Self> {
        let whole = pictures.pixels();
        let pixels = (0..pictures.len()).map(|row| whole.narrow(0, row, 1));
        Ok(Self {
            pixels: pixels.collect::<candle_core::Result<_>>()?,
            outcomes: vec![Outcome::default(); pictures.len()],
        })
    }

    pub(super) fn is_fooled(&self, row: usize) -> bool {
        self.outcomes[row].fooled == Some(true)
    }

    pub(super) fn crafted(self, pictures: &Pictures, recipe: Recipe) -> Result<Crafted> {
        Crafted::new(pictures, Tensor::cat(&self.pixels, 0)?, recipe, self.outcomes)
    }
}

/// Adversarial pictures, and how they came to be.
///
/// It has no accuracy of its own: that is [`Crafted::score`]'s to say, which asks for the threat.
#[derive(Debug, Clone)]
pub struct Crafted {
    pixels: Tensor,
    recipe: Recipe,
    outcomes: Vec<Outcome>,
}

impl Crafted {
    /// Adversarial `pixels` `(B, 3, H, W)` of `pictures`, with an outcome for each: what an attack
    /// returns, or what was once written to files.
    ///
    /// # Errors
    /// If the pixels have another shape, are not numbers in [0, 1], or lie more than 1e-6 outside
    /// the ball, or there are more or fewer outcomes.
    pub fn new(pictures: &Pictures, pixels: Tensor, recipe: Recipe, outcomes: Vec<Outcome>) -> Result<Self> {
        let refuse = |expected: String, found: String| {
            Err(Error::argument(format!("pictures of {}", recipe.attack), expected, found))
        };
        if pixels.dims() != pictures.pixels().dims() {
            return refuse(format!("shape {:?}", pictures.pixels().dims()), format!("{:?}", pixels.dims()));
        }
        if outcomes.len() != pictures.len() {
            return refuse(format!("{} outcomes", pictures.len()), outcomes.len().to_string());
        }
        let beyond = outside(&pixels, 0.0, 1.0)?;
        if beyond > 0 {
            return refuse("values in [0, 1]".into(), format!("{beyond} values that are not"));
        }
        if let Some(eps) = recipe.eps {
            let limit = eps.value() + TOLERANCE;
            let beyond = outside(&(&pixels - pictures.pixels())?, -limit, limit)?;
            if beyond > 0 {
                return refuse(format!("values within {eps}"), format!("{beyond} values that are not"));
            }
        }
        Ok(Self { pixels, recipe, outcomes })
    }

    /// The same under another attack's name.
    pub(super) fn named(mut self, attack: &str) -> Self {
        self.recipe.attack = attack.into();
        self
    }

    /// `(B, 3, H, W)` f32 in [0, 1].
    pub fn pixels(&self) -> &Tensor {
        &self.pixels
    }

    /// How they were made.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// One per picture.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// The same as 8-bit files hold them; see [`quantise`]. `clean` is `(B, 3, H, W)`. Without a
    /// ball to stay in, pictures are rounded only.
    ///
    /// # Errors
    /// If the clean pictures are not 8-bit or have another shape.
    pub fn quantised(mut self, clean: &Tensor) -> Result<Self> {
        let eps = self.recipe.eps.unwrap_or(Eps::of_255(255));
        self.pixels = quantise(&self.pixels, clean, eps)?;
        self.recipe.quantised = true;
        Ok(self)
    }

    /// How the pictures fare on `target`, and under which threat model that is.
    ///
    /// `clean_correct` says which clean pictures the target gets right: a picture it gets wrong
    /// anyway never counts as robust.
    ///
    /// # Errors
    /// If the pictures are no attack of this kind on the target ([`ThreatKind::threat`]), or
    /// there are not as many labels or `clean_correct` as pictures.
    pub fn score(&self, target: &Classification, kind: ThreatKind, clean_correct: &[bool]) -> Result<Scored> {
        let subject = target.classifier().subject();
        let threat = kind.threat(&self.recipe.crafted_on, subject)?;
        let n = self.outcomes.len();
        for (what, found) in [("labels", target.labels().len()), ("clean answers", clean_correct.len())] {
            if found != n {
                return Err(Error::argument(what, format!("one per picture, {n}"), found));
            }
        }
        let rows: Vec<usize> = (0..n).collect();
        let correct = target.correct(&self.pixels, &rows)?;
        let robust = correct.iter().zip(clean_correct).map(|(&now, &before)| now && before).collect();
        Ok(Scored { threat, target: subject.clone(), recipe: self.recipe.clone(), correct, robust })
    }
}

/// What a target makes of adversarial pictures. It exists only with its threat model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    #[serde(flatten)]
    threat: Threat,
    target: Subject,
    recipe: Recipe,
    correct: Vec<bool>,
    robust: Vec<bool>,
}

impl Scored {
    /// The threat model of every figure made of this.
    pub fn threat(&self) -> &Threat {
        &self.threat
    }

    /// The model scored, defence included.
    pub fn target(&self) -> &Subject {
        &self.target
    }

    /// How the pictures were made.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Per picture, whether the adversarial one is given its label, whatever the clean one is
    /// given: the bookkeeping of re-scored picture files, whose share of right answers can pass
    /// the clean one.
    pub fn correct(&self) -> &[bool] {
        &self.correct
    }

    /// Per picture, whether the clean and the adversarial one are both given the label. Its share
    /// is the robust accuracy under this attack and threat.
    pub fn robust(&self) -> &[bool] {
        &self.robust
    }
}
