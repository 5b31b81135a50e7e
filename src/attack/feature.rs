use candle_core::{D, DType, Tensor};
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::classifier::{pixel_gradient, scaled, unit, unit_vjp};
use super::objective::{check_rows, in_batches};
use super::pictures::select;
use super::{Evaluation, Objective, Subject};
use crate::image::pixels_from_rgb;
use crate::tower::clip::Clip;
use crate::tower::qwen::Qwen;
use crate::tower::{Cotangent, Features, Inserts, VisionTower, Want};
use crate::{Error, Result};

/// An output of a tower, as `(B, T, D)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// The embedding after the projection; T is 1. What CLIP classifies by.
    Embeds,
    /// The class token after the final norm; T is 1.
    Pooled,
    /// The patch tokens (no class token) of the hidden state after this block. LLaVA reads those
    /// of block L - 1.
    Patches(usize),
    /// What a Qwen-VL's language model reads: the merged embeddings and behind them, as further
    /// tokens, DeepStack's features.
    Merged,
}

impl Feature {
    pub(crate) fn want(self) -> Want {
        match self {
            Self::Embeds | Self::Pooled => Want::pooled(),
            Self::Patches(block) => Want::hidden(block),
            Self::Merged => Want::merged(),
        }
    }

    /// This feature of pixels `(B, 3, H, W)`: `(B, T, D)` f32.
    ///
    /// # Errors
    /// If the tower has no such feature, or fails.
    pub fn of(self, tower: &impl VisionTower, pixels: &Tensor) -> Result<Tensor> {
        let found = self.pick(tower, tower.forward(pixels, &self.want())?)?;
        Ok(found.to_dtype(DType::F32)?)
    }

    pub(crate) fn pick(self, tower: &impl VisionTower, features: Features) -> Result<Tensor> {
        let whole = match self {
            Self::Embeds => features.embeds.map(|x| x.unsqueeze(1)).transpose()?,
            Self::Pooled => features.pooled.map(|x| x.unsqueeze(1)).transpose()?,
            Self::Patches(_) => {
                let skip = usize::from(tower.spec().class_token);
                let hidden = features.hidden.into_iter().next();
                hidden.map(|x| x.narrow(1, skip, x.dim(1)? - skip)).transpose()?
            }
            Self::Merged => {
                let parts: Vec<Tensor> = features.merged.into_iter().chain(features.deepstack).collect();
                if parts.is_empty() { None } else { Some(Tensor::cat(&parts, 1)?) }
            }
        };
        whole.ok_or_else(|| Error::argument("feature", "one that the tower has", format!("{self:?}")))
    }

    /// A gradient `(B, T, D)` at the feature, as the tower takes it.
    pub(crate) fn cotangent(self, tower: &impl VisionTower, gradient: &Tensor) -> Result<Cotangent> {
        Ok(match self {
            Self::Embeds => Cotangent { embeds: Some(gradient.squeeze(1)?), ..Default::default() },
            Self::Pooled => Cotangent { pooled: Some(gradient.squeeze(1)?), ..Default::default() },
            Self::Patches(block) => {
                let skip = usize::from(tower.spec().class_token);
                let gradient = gradient.pad_with_zeros(1, skip, 0)?;
                Cotangent { hidden: vec![(block, gradient)], ..Default::default() }
            }
            Self::Merged => {
                let entries = tower.spec().merge.as_ref().map_or(0, |merge| merge.deepstack.len());
                let tokens = gradient.dim(1)? / (1 + entries);
                let part = |i: usize| gradient.narrow(1, i * tokens, tokens);
                let deepstack = (0..entries).map(|i| Ok((i, part(i + 1)?))).collect::<Result<Vec<_>>>()?;
                Cotangent { merged: Some(part(0)?), deepstack, ..Default::default() }
            }
        })
    }
}

/// A tower of either family, and which of its features stand for what a model reads of a picture.
#[derive(Clone)]
pub enum FeatureTower {
    /// CLIP's, and the feature.
    Clip(Box<Clip>, Feature),
    /// Qwen-VL's, by [`Feature::Merged`].
    Qwen(Qwen),
}

impl FeatureTower {
    /// The same with nothing put in; weights are held once.
    pub fn undefended(&self) -> Self {
        match self {
            Self::Clip(tower, feature) => Self::Clip(Box::new(tower.with(Inserts::default())), *feature),
            Self::Qwen(tower) => Self::Qwen(tower.with_grids(None)),
        }
    }

    /// The feature of one prepared picture, of a size that the tower takes: `(1, T, D)` f32.
    ///
    /// # Errors
    /// If the tower does not take it, or fails.
    pub fn of(&self, picture: &RgbImage) -> Result<Tensor> {
        match self {
            Self::Clip(tower, feature) => {
                feature.of(tower.as_ref(), &pixels_from_rgb(picture, tower.device())?.unsqueeze(0)?)
            }
            Self::Qwen(tower) => {
                let at = tower.at(picture.height() as usize, picture.width() as usize)?;
                Feature::Merged.of(&at, &pixels_from_rgb(picture, tower.device())?.unsqueeze(0)?)
            }
        }
    }
}

/// Where a picture's features are to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Away from the reference: untargeted, where that is the clean picture's own.
    ///
    /// There the gradient is zero, so such an attack needs a random start.
    Away,
    /// Towards the reference: targeted.
    Toward,
}

/// The mean over tokens of the cosine between a tower's feature and a reference per picture, its
/// negative where the way is [`Direction::Away`].
///
/// This is how a model is attacked that reads a tower's features, as LLaVA does: through its
/// encoder alone. It knows no success; scoring needs the whole model.
#[derive(Clone)]
pub struct FeatureObjective<T> {
    tower: T,
    subject: Subject,
    feature: Feature,
    direction: Direction,
    /// `(n, T, D)` f32, of length 1 along D.
    references: Tensor,
    batch: usize,
}

impl<T: VisionTower> FeatureObjective<T> {
    /// `references` `(n, T, D)`, or `(n, D)` where T is 1, has one per picture, of any length.
    /// `subject` says which model this is, with what is put into `tower`.
    ///
    /// # Errors
    /// If the references have another shape.
    pub fn new(
        tower: T,
        subject: Subject,
        feature: Feature,
        direction: Direction,
        references: &Tensor,
    ) -> Result<Self> {
        let references = match references.rank() {
            2 => references.unsqueeze(1)?,
            _ => references.clone(),
        };
        let spec = tower.spec();
        let expected = match feature {
            Feature::Embeds => spec.projection.map(|width| (1, width)),
            Feature::Pooled => Some((1, spec.hidden)),
            Feature::Patches(block) if block <= spec.blocks => Some((spec.grid.0 * spec.grid.1, spec.hidden)),
            Feature::Patches(_) => None,
            Feature::Merged => {
                let width = spec.merge.as_ref().map(|merge| merge.width);
                spec.merged_tokens().zip(width)
            }
        };
        let (tokens, width) = expected
            .ok_or_else(|| Error::argument("feature", "one that the tower has", format!("{feature:?}")))?;
        match *references.dims() {
            [n, t, d] if n > 0 && (t, d) == (tokens, width) => {}
            _ => {
                let found = format!("{:?}", references.dims());
                return Err(Error::argument("references", format!("shape [n, {tokens}, {width}]"), found));
            }
        }
        let references = unit(&references.to_device(tower.device())?.to_dtype(DType::F32)?)?.0;
        Ok(Self { batch: tower.batch(), tower, subject, feature, direction, references })
    }

    /// Away from the features of the clean pictures `(n, 3, H, W)` themselves.
    ///
    /// # Errors
    /// If the tower has no such feature, or fails.
    pub fn away_from_clean(tower: T, subject: Subject, feature: Feature, clean: &Tensor) -> Result<Self> {
        let parts = (0..clean.dim(0)?)
            .map(|row| feature.of(&tower, &clean.narrow(0, row, 1)?))
            .collect::<Result<Vec<_>>>()?;
        Self::new(tower, subject, feature, Direction::Away, &Tensor::cat(&parts, 0)?)
    }

    /// The same with at most `batch` pictures at once, [`VisionTower::batch`] where not given. With
    /// more than that a picture's gradient can depend on its batch in the last bits.
    pub fn with_batch(self, batch: usize) -> Self {
        Self { batch: batch.max(1), ..self }
    }

    /// Losses, and the gradient `(R, T, D)` of each at `feature` `(R, T, D)`.
    fn at_feature(&self, feature: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        let references = select(&self.references, rows)?;
        let sign = match self.direction {
            Direction::Away => -1.0,
            Direction::Toward => 1.0,
        };
        let (unit, lengths) = unit(feature)?;
        let cosines = (&unit * &references)?.sum(D::Minus1)?;
        let mean: Vec<f32> = cosines.mean(1)?.to_vec1()?;
        let gradient = (&references * (sign / feature.dim(1)? as f64))?;
        let loss = mean.into_iter().map(|cosine| sign * f64::from(cosine)).collect();
        Ok((Evaluation { loss, fooled: None }, unit_vjp(&unit, &lengths, &gradient)?))
    }
}

impl<T: VisionTower> Objective for FeatureObjective<T> {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn pictures(&self) -> usize {
        self.references.dims().first().copied().unwrap_or(0)
    }

    fn describe(&self) -> Value {
        json!({ "loss": "cosine", "feature": self.feature, "direction": self.direction })
    }

    fn values(&self, pixels: &Tensor, rows: &[usize]) -> Result<Evaluation> {
        check_rows(pixels, rows, self.pictures())?;
        let (evaluation, _) = in_batches(pixels, rows, self.batch, |pixels, rows| {
            Ok((self.at_feature(&self.feature.of(&self.tower, pixels)?, rows)?.0, Vec::new()))
        })?;
        Ok(evaluation)
    }

    fn values_and_gradient(&self, pixels: &Tensor, rows: &[usize]) -> Result<(Evaluation, Tensor)> {
        check_rows(pixels, rows, self.pictures())?;
        let (evaluation, mut gradients) = in_batches(pixels, rows, self.batch, |pixels, rows| {
            let (features, tape) = self.tower.forward_tape(pixels, &self.feature.want())?;
            let feature = self.feature.pick(&self.tower, features)?;
            let (evaluation, gradient) = self.at_feature(&feature.to_dtype(DType::F32)?, rows)?;
            let (gradient, undo) = scaled(&gradient)?;
            let cotangent = self.feature.cotangent(&self.tower, &gradient.to_dtype(feature.dtype())?)?;
            let gradient = pixel_gradient(&self.tower, &tape, &cotangent)?;
            Ok((evaluation, vec![gradient.broadcast_mul(&undo)?]))
        })?;
        let missing = || Error::Unsupported("the tower gave no gradient at the pixels".into());
        Ok((evaluation, gradients.pop().ok_or_else(missing)?))
    }
}
