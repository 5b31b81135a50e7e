use candle_core::{D, DType, Tensor};

use super::{Classifier, Subject};
use crate::text::ZeroShotHead;
use crate::tower::layers::on_host;
use crate::tower::{Cotangent, Features, VisionTower, Want, Wrt};
use crate::{Error, Result};

/// What makes logits of a tower's embeddings.
pub trait Head: Sync {
    /// Number of classes, K.
    fn classes(&self) -> usize;
    /// Embeddings `(B, P)` f32, of any length, to logits `(B, K)` f32.
    fn logits(&self, embeds: &Tensor) -> Result<Tensor>;
    /// The gradient `(B, K)` at the logits to that at `embeds`, `(B, P)`.
    fn vjp(&self, embeds: &Tensor, cotangent: &Tensor) -> Result<Tensor>;
}

impl<H: Head> Head for &H {
    fn classes(&self) -> usize {
        (**self).classes()
    }
    fn logits(&self, embeds: &Tensor) -> Result<Tensor> {
        (**self).logits(embeds)
    }
    fn vjp(&self, embeds: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        (**self).vjp(embeds, cotangent)
    }
}

/// Logits as scale times the cosine to a vector per class, as CLIP's zero-shot head.
#[derive(Debug, Clone)]
pub struct CosineHead {
    /// `(K, P)` f32, rows of length 1.
    weights: Tensor,
    scale: f64,
}

impl CosineHead {
    /// From class weights `(K, P)` of any length (they are scaled to 1) and the logit scale, 100
    /// in CLIP.
    ///
    /// # Errors
    /// If the weights are no matrix, one is zero or not a number, or the scale is not positive
    /// and finite.
    pub fn new(weights: &Tensor, scale: f64) -> Result<Self> {
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::argument("logit scale", "a positive number", scale));
        }
        weights.dims2()?;
        let weights = weights.to_dtype(DType::F32)?;
        let lengths = lengths(&weights)?;
        if lengths.flatten_all()?.to_vec1::<f32>()?.iter().any(|&n| !(n.is_finite() && n > TINY)) {
            return Err(Error::argument("class weights", "rows of positive length", "another"));
        }
        Ok(Self { weights: weights.broadcast_div(&lengths)?, scale })
    }
}

impl Head for ZeroShotHead {
    fn classes(&self) -> usize {
        self.classes.len()
    }
    fn logits(&self, embeds: &Tensor) -> Result<Tensor> {
        ZeroShotHead::logits(self, embeds)
    }
    fn vjp(&self, embeds: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        ZeroShotHead::vjp(self, embeds, cotangent)
    }
}

impl Head for CosineHead {
    fn classes(&self) -> usize {
        self.weights.dims().first().copied().unwrap_or(0)
    }

    fn logits(&self, embeds: &Tensor) -> Result<Tensor> {
        Ok((unit(embeds)?.0.matmul(&self.weights.t()?)? * self.scale)?)
    }

    fn vjp(&self, embeds: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let (unit, lengths) = unit(embeds)?;
        unit_vjp(&unit, &lengths, &(cotangent.matmul(&self.weights)? * self.scale)?)
    }
}

/// The least length a vector is divided by, as torch's `normalize`.
const TINY: f32 = 1e-12;

/// Lengths along the last axis, which is kept as 1.
fn lengths(x: &Tensor) -> Result<Tensor> {
    Ok(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.maximum(TINY)?)
}

/// Vectors along the last axis scaled to length 1, and the lengths.
pub(super) fn unit(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let lengths = lengths(x)?;
    Ok((x.broadcast_div(&lengths)?, lengths))
}

/// Through [`unit`]: (g - u <u, g>) / |x|.
pub(super) fn unit_vjp(unit: &Tensor, lengths: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let along = (unit * gradient)?.sum_keepdim(D::Minus1)?;
    Ok((gradient - unit.broadcast_mul(&along)?)?.broadcast_div(lengths)?)
}

/// The cotangent with each picture scaled by the power of two that brings its largest entry into
/// [1, 2), and the factors `(B, 1, 1, 1)` that undo it. Powers of two cost no bit in f32, and keep
/// the small gradients of a confident prediction from vanishing in an f16 tower.
pub(super) fn scaled(cotangent: &Tensor) -> Result<(Tensor, Tensor)> {
    let batch = cotangent.dim(0)?;
    let largest: Vec<f32> = cotangent.flatten_from(1)?.abs()?.max(1)?.to_vec1()?;
    // The exponent by its bits, within what its inverse can be, and 0 for zero, infinity and NaN.
    let exponent = |m: f32| if m.is_normal() { (m.to_bits() >> 23) as i32 - 127 } else { 0 };
    let power = |sign: i32| -> Vec<f32> {
        let bits = |m: f32| ((127 + sign * exponent(m).clamp(-126, 126)) as u32) << 23;
        largest.iter().map(|&m| f32::from_bits(bits(m))).collect()
    };
    let mut shape = vec![batch];
    shape.resize(cotangent.rank(), 1);
    let up = Tensor::from_vec(power(-1), shape, cotangent.device())?;
    let down = Tensor::from_vec(power(1), (batch, 1, 1, 1), cotangent.device())?;
    Ok((cotangent.broadcast_mul(&up)?, down))
}

/// A tower, with or without a defence put in, and a head on its embeddings.
///
/// Gradients go through everything in the tower, GIF and FRA included.
#[derive(Clone)]
pub struct TowerClassifier<T, H> {
    tower: T,
    head: H,
    subject: Subject,
    batch: usize,
}

impl<T: VisionTower, H: Head> TowerClassifier<T, H> {
    /// `subject` says which model this is, with what is put into `tower`.
    ///
    /// # Errors
    /// If the tower has no projection to make embeddings with.
    pub fn new(tower: T, head: H, subject: Subject) -> Result<Self> {
        if tower.spec().projection.is_none() {
            return Err(Error::Unsupported(format!("{subject}: the vision tower has no projection")));
        }
        Ok(Self { batch: tower.batch(), tower, head, subject })
    }

    /// The same with at most `batch` pictures at once, [`VisionTower::batch`] where not given. With
    /// more than that a picture's gradient can depend on its batch in the last bits.
    pub fn with_batch(self, batch: usize) -> Self {
        Self { batch: batch.max(1), ..self }
    }

    /// The tower.
    pub fn tower(&self) -> &T {
        &self.tower
    }

    /// The head.
    pub fn head(&self) -> &H {
        &self.head
    }

    /// The embeddings in the tower's dtype.
    fn embeds(&self, features: Features) -> Result<Tensor> {
        let missing = || Error::Unsupported(format!("{}: the tower gave no embeddings", self.subject));
        features.embeds.ok_or_else(missing)
    }
}

impl<T: VisionTower, H: Head> Classifier for TowerClassifier<T, H> {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn classes(&self) -> usize {
        self.head.classes()
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let embeds = self.embeds(self.tower.forward(pixels, &Want::pooled())?)?;
        each(&embeds.to_dtype(DType::F32)?, |embeds, _| self.head.logits(embeds))
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let (features, tape) = self.tower.forward_tape(pixels, &Want::pooled())?;
        let embeds = self.embeds(features)?;
        let wide = embeds.to_dtype(DType::F32)?;
        let logits = each(&wide, |embeds, _| self.head.logits(embeds))?;
        let gradient = |cotangent: &Tensor| {
            let at_embeds =
                each(&wide, |embeds, row| self.head.vjp(embeds, &cotangent.narrow(0, row, embeds.dim(0)?)?))?;
            let (cotangent, undo) = scaled(&at_embeds)?;
            let cotangent =
                Cotangent { embeds: Some(cotangent.to_dtype(embeds.dtype())?), ..Default::default() };
            Ok(pixel_gradient(&self.tower, &tape, &cotangent)?.broadcast_mul(&undo)?)
        };
        let gradients = cotangents(&logits)?.iter().map(gradient).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

/// Gives `f` rows of `embeds` `(B, P)` and the number of the first, on a CPU one at a time: a
/// product's bits depend on how many it is given.
fn each(embeds: &Tensor, f: impl Fn(&Tensor, usize) -> Result<Tensor>) -> Result<Tensor> {
    let batch = embeds.dim(0)?;
    if batch == 1 || !on_host(embeds.device()) {
        return f(embeds, 0);
    }
    let parts = (0..batch).map(|row| f(&embeds.narrow(0, row, 1)?, row)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// The gradient at the pixels, `(B, 3, H, W)` f32.
pub(super) fn pixel_gradient<T: VisionTower>(
    tower: &T,
    tape: &T::Tape,
    cotangent: &Cotangent,
) -> Result<Tensor> {
    let gradients = tower.vjp(tape, cotangent, Wrt { pixels: true, anchor: false })?;
    gradients.pixels.ok_or_else(|| Error::Unsupported("the tower gave no gradient at the pixels".into()))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn cotangents_are_scaled_to_1_and_back_without_a_bit_lost() -> Result<()> {
        let rows = [[0.0f32, 0.0], [1e-30, -3e-31], [-5e20, 1.0], [f32::MIN_POSITIVE, 0.0], [1.0, 2.0]];
        let cotangent = Tensor::new(&rows, &Device::Cpu)?;
        let (found, undo) = scaled(&cotangent)?;
        let largest = found.abs()?.max(1)?.to_vec1::<f32>()?;
        assert!(largest.iter().skip(1).all(|m| (1.0..2.0).contains(m)), "{largest:?}");
        let back = found.broadcast_mul(&undo.reshape((5, 1))?)?;
        assert_eq!(back.to_vec2::<f32>()?, rows);
        // f16 would have made nothing of the second row.
        let half = found.to_dtype(DType::F16)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        assert!(half[1].iter().all(|v| *v != 0.0));
        Ok(())
    }
}
