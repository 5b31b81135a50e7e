use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::Plan;
use crate::attack::{
    Classification, Direction, Feature, FeatureObjective, Loss, Maximise, Named, Pgd, Pictures, Subject,
    TowerClassifier, with_settings,
};
use crate::text::ZeroShotHead;
use crate::tower::layers::on_host;
use crate::tower::{Cotangent, Features, Insertable, VisionTower, Want, Wrt};
use crate::{Error, Result};

/// What a training makes small.
pub enum Goal<'a> {
    /// The cross-entropy of a zero-shot head: Eq. 8.
    CrossEntropy {
        /// The head.
        head: &'a ZeroShotHead,
    },
    /// How far the defended tower's features are from those that the undefended tower gives the
    /// clean picture: |f(x') - f0(x)|^2 / |f0(x)|^2, over all tokens. It needs no labels and no
    /// text, as FARE.
    Embedding {
        /// Which features.
        feature: Feature,
    },
}

/// Sums over some pictures.
pub(super) struct Found {
    pub(super) loss: f64,
    /// Pictures given their labels, where there is a head.
    pub(super) right: Option<usize>,
    /// Of the mean loss times the weight, empty where it was not asked for.
    pub(super) gradient: Vec<f32>,
}

/// Tokens that go through the tower together on a CPU. It is fixed, since the order in which a
/// gradient is summed decides its last bits.
const TOKENS: usize = 1024;

impl Goal<'_> {
    /// Its name in metadata: `ce` or `embedding`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::CrossEntropy { .. } => "ce",
            Self::Embedding { .. } => "embedding",
        }
    }

    pub(super) fn describe(&self) -> Value {
        match self {
            Self::CrossEntropy { head } => json!({ "objective": "ce", "classes": head.classes }),
            Self::Embedding { feature } => json!({ "objective": "embedding", "feature": feature }),
        }
    }

    /// Whether the plan's attack can be made on it.
    pub(super) fn check(&self, plan: &Plan, tower: &impl Insertable) -> Result<()> {
        match self {
            Self::CrossEntropy { head } => {
                let attack = Named::new(&plan.attack, plan.eps, &plan.settings)?;
                if attack.as_attack().fewest_classes() > head.classes.len() {
                    let expected = format!("one that works with {} classes", head.classes.len());
                    return Err(Error::argument("attack", expected, &plan.attack));
                }
                if attack.as_attack().eps().is_none() {
                    return Err(Error::argument("attack", "one within a ball", &plan.attack));
                }
                if tower.spec().projection.is_none() {
                    return Err(Error::argument("objective", "embedding: the tower has no projection", "ce"));
                }
                Ok(())
            }
            Self::Embedding { .. } if plan.attack != "pgd" => {
                Err(Error::argument("attack", "pgd, which knows how to climb features", &plan.attack))
            }
            Self::Embedding { .. } => Ok(()),
        }
    }

    /// Crafts pictures on `tower`; `undefended` is the tower whose features are to be kept.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    pub(super) fn craft<T: Insertable>(
        &self,
        plan: &Plan,
        undefended: &T,
        tower: &T,
        subject: Subject,
        pictures: &Pictures,
        labels: Vec<usize>,
        seed: u64,
    ) -> Result<Tensor> {
        let crafted = match self {
            Self::CrossEntropy { head } => {
                let classifier = TowerClassifier::new(tower, *head, subject)?;
                let task = Classification::new(&classifier, labels)?;
                let attack = Named::new(&plan.attack, plan.eps, &plan.settings)?;
                attack.as_attack().craft(&task, pictures, seed, &mut |_| {})?
            }
            Self::Embedding { feature } => {
                let clean = in_parts(pictures.pixels(), undefended, |pixels| feature.of(undefended, pixels))?;
                let objective = FeatureObjective::new(tower, subject, *feature, Direction::Away, &clean)?;
                let pgd = with_settings(Pgd::new(plan.eps), &plan.settings);
                pgd.maximise(&objective, pictures, seed, &mut |_| {})?
            }
        };
        Ok(crafted.pixels().clone())
    }

    /// The loss of pixels `(B, 3, H, W)` in `tower`, summed, and if asked for the gradient at the
    /// anchor of `weight` times its mean. `clean` are the pictures before the attack.
    #[expect(clippy::too_many_arguments, reason = "each is another thing")]
    pub(super) fn loss_and_gradient<T: Insertable>(
        &self,
        undefended: &T,
        tower: &T,
        pixels: &Tensor,
        clean: &Tensor,
        labels: &[usize],
        weight: f64,
        gradient: bool,
    ) -> Result<Found> {
        let batch = pixels.dim(0)?;
        let scale = weight / batch as f64;
        let at_once = at_once(tower);
        let mut found = Found { loss: 0.0, right: None, gradient: Vec::new() };
        for start in (0..batch).step_by(at_once) {
            let n = at_once.min(batch - start);
            let pixels = pixels.narrow(0, start, n)?;
            let (cotangent, tape) = match self {
                Self::CrossEntropy { head } => {
                    let (features, tape) = run(tower, &pixels, &Want::pooled(), gradient)?;
                    let missing = || Error::Unsupported("the tower gave no embeddings".into());
                    let embeds = features.embeds.ok_or_else(missing)?;
                    let wide = embeds.to_dtype(DType::F32)?;
                    let logits = head.logits(&wide)?;
                    let labels = &labels[start..start + n];
                    let values = Loss::CrossEntropy.evaluate(&logits, labels, None)?;
                    found.loss += values.loss.iter().sum::<f64>();
                    let largest = logits.argmax(1)?.to_vec1::<u32>()?;
                    let right = largest.iter().zip(labels).filter(|(z, y)| **z as usize == **y).count();
                    found.right = Some(found.right.unwrap_or(0) + right);
                    let embeds = match gradient {
                        true => {
                            let at_embeds = head.vjp(&wide, &(values.cotangent * scale)?)?;
                            Some(at_embeds.to_dtype(embeds.dtype())?)
                        }
                        false => None,
                    };
                    (Cotangent { embeds, ..Default::default() }, tape)
                }
                Self::Embedding { feature } => {
                    let target = feature.of(undefended, &clean.narrow(0, start, n)?)?;
                    let (features, tape) = run(tower, &pixels, &feature.want(), gradient)?;
                    let value = feature.pick(tower, features)?;
                    let apart = (value.to_dtype(DType::F32)? - &target)?;
                    let sizes = target.flatten_from(1)?.sqr()?.sum_keepdim(1)?;
                    let loss = apart.flatten_from(1)?.sqr()?.sum_keepdim(1)?.broadcast_div(&sizes)?;
                    found.loss +=
                        loss.flatten_all()?.to_vec1::<f32>()?.iter().map(|&l| f64::from(l)).sum::<f64>();
                    let at = (apart.broadcast_div(&sizes.unsqueeze(2)?)? * (2.0 * scale))?;
                    (feature.cotangent(tower, &at.to_dtype(value.dtype())?)?, tape)
                }
            };
            if let Some(tape) = tape {
                let gradients = tower.vjp(&tape, &cotangent, Wrt { pixels: false, anchor: true })?;
                let missing = || Error::Unsupported("the tower gave no gradient at the anchor".into());
                let part = gradients.anchor.ok_or_else(missing)?.flatten_all()?.to_vec1::<f32>()?;
                found.gradient.resize(part.len(), 0.0);
                found.gradient.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
            }
        }
        Ok(found)
    }
}

fn run<T: VisionTower>(
    tower: &T,
    pixels: &Tensor,
    want: &Want,
    keep: bool,
) -> Result<(Features, Option<T::Tape>)> {
    if keep {
        let (features, tape) = tower.forward_tape(pixels, want)?;
        return Ok((features, Some(tape)));
    }
    Ok((tower.forward(pixels, want)?, None))
}

fn at_once(tower: &impl VisionTower) -> usize {
    if on_host(tower.device()) { TOKENS.div_ceil(tower.spec().tokens().max(1)) } else { tower.batch() }
}

fn in_parts(
    pixels: &Tensor,
    tower: &impl VisionTower,
    f: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (batch, at_once) = (pixels.dim(0)?, at_once(tower));
    let parts = (0..batch)
        .step_by(at_once)
        .map(|start| f(&pixels.narrow(0, start, at_once.min(batch - start))?))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}
