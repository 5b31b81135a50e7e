use candle_core::{DType, Tensor};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The clean pictures an attack begins with.
#[derive(Debug, Clone)]
pub struct Pictures {
    pixels: Tensor,
    keys: Vec<u64>,
    chosen: Vec<bool>,
}

/// A picture's key by its name: the first 8 bytes of the name's SHA-256, little-endian.
pub fn key(name: &str) -> u64 {
    let digest = Sha256::digest(name.as_bytes());
    digest.iter().take(8).rev().fold(0, |key, &byte| key << 8 | u64::from(byte))
}

impl Pictures {
    /// Pixels `(B, 3, H, W)` f32 in [0, 1] and a key per picture, from which its random numbers
    /// are drawn ([`key`] makes one of a name). All are chosen.
    ///
    /// # Errors
    /// If the pixels have another shape, dtype or range, or there are more or fewer keys.
    pub fn new(pixels: &Tensor, keys: Vec<u64>) -> Result<Self> {
        match *pixels.dims() {
            [batch, 3, height, width] if batch * height * width > 0 => {}
            _ => return Err(Error::argument("pixels", "shape [B, 3, H, W]", format!("{:?}", pixels.dims()))),
        }
        if pixels.dtype() != DType::F32 {
            return Err(Error::argument("pixels", "f32 in [0, 1]", format!("{:?}", pixels.dtype())));
        }
        let batch = pixels.dim(0)?;
        if keys.len() != batch {
            return Err(Error::argument("keys", format!("one per picture, {batch}"), keys.len()));
        }
        let outside = outside(pixels, 0.0, 1.0)?;
        if outside > 0 {
            return Err(Error::argument("pixels", "f32 in [0, 1]", format!("{outside} values that are not")));
        }
        Ok(Self { pixels: pixels.contiguous()?.detach(), keys, chosen: vec![true; batch] })
    }

    /// The same with only those chosen that are `true`: the others are returned unchanged.
    ///
    /// # Errors
    /// If there are more or fewer than pictures.
    pub fn only(self, chosen: Vec<bool>) -> Result<Self> {
        if chosen.len() != self.len() {
            let expected = format!("one per picture, {}", self.len());
            return Err(Error::argument("chosen pictures", expected, chosen.len()));
        }
        Ok(Self { chosen, ..self })
    }

    /// Number of pictures, B.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// `(B, 3, H, W)` f32 in [0, 1].
    pub fn pixels(&self) -> &Tensor {
        &self.pixels
    }

    /// One per picture.
    pub fn keys(&self) -> &[u64] {
        &self.keys
    }

    /// The indices of the chosen pictures, in order.
    pub fn rows(&self) -> Vec<usize> {
        (0..self.len()).filter(|&row| self.chosen[row]).collect()
    }
}

/// How many entries are not in `low..=high`, NaN among them.
pub(super) fn outside(tensor: &Tensor, low: f64, high: f64) -> Result<usize> {
    let inside = (tensor.ge(low)? * tensor.le(high)?)?;
    // Per picture first: a sum over everything may pass 2^32.
    let inside: Vec<u32> = inside.to_dtype(DType::U32)?.flatten_from(1)?.sum(1)?.to_vec1()?;
    Ok(tensor.elem_count() - inside.into_iter().map(|n| n as usize).sum::<usize>())
}

/// The pictures `rows` of a tensor `(B, ...)`; the tensor itself where they are all, in order.
pub(super) fn select(tensor: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if rows.len() == tensor.dim(0)? && rows.iter().enumerate().all(|(i, &row)| i == row) {
        return Ok(tensor.clone());
    }
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(tensor.index_select(&Tensor::new(rows, tensor.device())?, 0)?)
}
