//! Where an anchor comes from.

use candle_core::{DType, Device, Tensor};

use crate::Result;
use crate::tower::VisionTower;
use crate::tower::clip::Clip;

/// The training-free anchor, the paper's Eq. 6: the tower's own first attention output on a
/// uniform white picture, `(N, D)` f32 on the CPU. Whatever is put into the tower is ignored.
pub fn training_free(tower: &Clip) -> Result<Tensor> {
    let side = tower.spec().image_size;
    let white = Tensor::ones((1, 3, side, side), DType::F32, tower.device())?;
    let attention = tower.first_attention(&white)?;
    Ok(attention.squeeze(0)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?)
}
