use candle_core::Tensor;

use super::pictures::select;
use super::{Eps, Pictures, picture_rng, uniform};
use crate::Result;

/// The Linf balls around clean pictures, cut to the box [0, 1].
#[derive(Debug, Clone)]
pub struct Ball {
    center: Tensor,
    lower: Tensor,
    upper: Tensor,
    eps: f64,
}

impl Ball {
    /// Around `center` `(R, 3, H, W)` f32 in [0, 1].
    pub fn new(center: &Tensor, eps: Eps) -> Result<Self> {
        let eps = eps.value();
        Ok(Self {
            center: center.clone(),
            lower: (center - eps)?.maximum(0f32)?,
            upper: (center + eps)?.minimum(1f32)?,
            eps,
        })
    }

    /// The clean pictures.
    pub fn center(&self) -> &Tensor {
        &self.center
    }

    /// The radius.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The nearest pictures inside, of the same shape.
    pub fn project(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.maximum(&self.lower)?.minimum(&self.upper)?)
    }

    /// The balls of the pictures `rows` alone.
    pub fn select(&self, rows: &[usize]) -> Result<Self> {
        Ok(Self {
            center: select(&self.center, rows)?,
            lower: select(&self.lower, rows)?,
            upper: select(&self.upper, rows)?,
            eps: self.eps,
        })
    }

    /// x + U(-eps, eps), cut to the box, for the balls of the pictures `rows` of `pictures`, from
    /// each one's [`picture_rng`].
    pub fn random_start(
        &self,
        pictures: &Pictures,
        rows: &[usize],
        seed: u64,
        restart: u64,
        purpose: &str,
    ) -> Result<Tensor> {
        let each = self.center.elem_count() / self.center.dim(0)?.max(1);
        let keys = rows.iter().filter_map(|&row| pictures.keys().get(row));
        let noise: Vec<f32> =
            keys.flat_map(|&key| uniform(&mut picture_rng(seed, key, restart, purpose), each)).collect();
        let noise = Tensor::from_vec(noise, self.center.shape(), self.center.device())?;
        self.project(&(&self.center + (noise * self.eps)?)?)
    }
}
