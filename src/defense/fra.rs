use candle_core::{DType, Device, Tensor};

use crate::tower::AttentionMix;
use crate::{Error, Result};

/// The Fixed Robustness Anchor: in the first block the attention output h becomes
/// alpha A + beta h (the paper's Section 4.1), for every picture the same A.
pub struct Fra {
    /// `(N, D)` f32.
    anchor: Tensor,
    alpha: f64,
    beta: f64,
}

impl Fra {
    /// From an anchor `(N, D)`, moved to `device` as f32.
    ///
    /// # Errors
    /// If alpha or beta is not finite in f32, or the anchor is not a matrix.
    pub fn new(anchor: &Tensor, alpha: f64, beta: f64, device: &Device) -> Result<Self> {
        for (name, value) in [("alpha", alpha), ("beta", beta)] {
            // 1e300 is finite, but not as the f32 it is multiplied in.
            if !(value as f32).is_finite() {
                return Err(Error::argument(name, "a finite number", value));
            }
        }
        anchor.dims2()?;
        Ok(Self { anchor: anchor.to_device(device)?.to_dtype(DType::F32)?, alpha, beta })
    }

    /// The anchor, `(N, D)` f32.
    pub fn anchor(&self) -> &Tensor {
        &self.anchor
    }

    /// The anchor's factor.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// The attention output's factor.
    pub fn beta(&self) -> f64 {
        self.beta
    }
}

impl AttentionMix for Fra {
    fn needs_attention(&self) -> bool {
        self.beta != 0.0
    }

    fn apply(&self, attention: Option<&Tensor>, batch: usize, dtype: DType) -> Result<Tensor> {
        // An anchor of one row or column would be broadcast without a word.
        if let Some(h) = attention
            && h.dims().get(1..) != Some(self.anchor.dims())
        {
            let expected = format!("shape {:?}", h.dims().get(1..).unwrap_or_default());
            return Err(Error::argument("anchor", expected, format!("{:?}", self.anchor.dims())));
        }
        let kept = match attention {
            // Multiplying by one, or adding zero, could still turn -0 into 0.
            Some(h) if self.beta == 1.0 => Some(h.clone()),
            Some(h) if self.beta != 0.0 => Some((h * self.beta)?),
            _ => None,
        };
        if let Some(kept) = &kept
            && self.alpha == 0.0
        {
            return Ok(kept.clone());
        }
        let anchor = (&self.anchor * self.alpha)?.to_dtype(dtype)?.unsqueeze(0)?;
        match kept {
            Some(kept) => Ok(kept.broadcast_add(&anchor)?),
            None => Ok(anchor.repeat((batch, 1, 1))?),
        }
    }

    fn vjp_attention(&self, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(match self.beta {
            0.0 => None,
            1.0 => Some(gradient.clone()),
            beta => Some((gradient * beta)?),
        })
    }

    fn vjp_anchor(&self, gradient: &Tensor) -> Result<Tensor> {
        Ok((gradient.to_dtype(DType::F32)?.sum(0)? * self.alpha)?)
    }
}
