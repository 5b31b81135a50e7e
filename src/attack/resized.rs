use candle_core::{Device, Tensor};

use super::{Classifier, Subject};
use crate::image::Preprocess;
use crate::tower::layers::on_host;
use crate::{Error, Result};

/// A classifier that takes pictures at another size than its own: the resize, and the crop where
/// the contract has one, lie inside the function, so that an attack changes the pictures as they
/// are. So FARE and AutoAttack treat CIFAR and STL10.
///
/// In f32 and without rounding between the passes or at the end, where a file's pixels would be
/// rounded to 8 bits; its clean answers can differ from those on resized pictures.
pub struct Resized<C> {
    inner: C,
    /// `(height, H)`.
    rows: Tensor,
    /// `(width, W)`.
    columns: Tensor,
}

impl<C: Classifier> Resized<C> {
    /// Pictures of `height` x `width`, resized as `preprocess` says.
    ///
    /// # Errors
    /// If the contract is not a resize and a crop, as padding is not.
    pub fn new(
        inner: C,
        preprocess: &Preprocess,
        height: usize,
        width: usize,
        device: &Device,
    ) -> Result<Self> {
        let [rows, columns] = preprocess.matrices(height, width)?;
        Ok(Self {
            inner,
            rows: Tensor::from_vec(rows, (preprocess.height as usize, height), device)?,
            columns: Tensor::from_vec(columns, (preprocess.width as usize, width), device)?,
        })
    }
}

/// R X C^T for every plane of `(B, 3, H, W)`; R is `(h, H)`, C is `(w, W)`. On a CPU one picture at
/// a time: a product's bits depend on how many it is given.
fn sandwich(rows: &Tensor, x: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let batch = x.dim(0)?;
    if batch == 1 || !on_host(x.device()) {
        return sandwich_at_once(rows, x, columns);
    }
    let parts = (0..batch).map(|row| sandwich_at_once(rows, &x.narrow(0, row, 1)?, columns));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

fn sandwich_at_once(rows: &Tensor, x: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let planes = batch * channels;
    let (high, wide) = (rows.dim(0)?, columns.dim(0)?);
    let x = x.reshape((planes * height, width))?.matmul(&columns.t()?)?;
    let x = x.reshape((planes, height, wide))?.transpose(1, 2)?.reshape((planes * wide, height))?;
    let x = x.matmul(&rows.t()?)?.reshape((planes, wide, high))?.transpose(1, 2)?.contiguous()?;
    Ok(x.reshape((batch, channels, high, wide))?)
}

impl<C: Classifier> Classifier for Resized<C> {
    fn subject(&self) -> &Subject {
        self.inner.subject()
    }

    fn classes(&self) -> usize {
        self.inner.classes()
    }

    fn batch(&self) -> usize {
        self.inner.batch()
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        self.inner.logits(&self.resize(pixels)?)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let (logits, gradients) = self.inner.logits_and_gradients(&self.resize(pixels)?, cotangents)?;
        Ok((logits, self.back(&gradients)?))
    }

    fn is_near(&self) -> bool {
        self.inner.is_near()
    }

    fn near_logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let (logits, gradients) = self.inner.near_logits_and_gradients(&self.resize(pixels)?, cotangents)?;
        Ok((logits, self.back(&gradients)?))
    }
}

impl<C> Resized<C> {
    /// Gradients at the inner classifier's pixels to those at the pictures.
    fn back(&self, gradients: &[Tensor]) -> Result<Vec<Tensor>> {
        let (rows, columns) = (self.rows.t()?, self.columns.t()?);
        gradients.iter().map(|gradient| sandwich(&rows, gradient, &columns)).collect()
    }

    /// `(B, 3, H, W)` to the inner classifier's size.
    fn resize(&self, pixels: &Tensor) -> Result<Tensor> {
        let (found, expected) = (pixels.dims(), (self.rows.dim(1)?, self.columns.dim(1)?));
        match *found {
            [_, 3, height, width] if (height, width) == expected => {
                sandwich(&self.rows, pixels, &self.columns)
            }
            _ => {
                let (height, width) = expected;
                Err(Error::argument(
                    "pixels",
                    format!("shape [B, 3, {height}, {width}]"),
                    format!("{found:?}"),
                ))
            }
        }
    }
}
