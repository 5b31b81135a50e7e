use candle_core::Tensor;

use super::Eps;
use crate::{Error, Result};

/// An adversarial picture as an 8-bit file holds it: rounded to the nearest of k/255, halves to
/// even, and then cut to [`Eps::steps`] steps around the clean one, so that rounding never takes
/// it out of the ball.
///
/// `adversarial` and `clean` are f32 in [0, 1] of one shape; `clean` must itself be 8-bit, as
/// every picture from a file is after [`crate::image::Preprocess`]. The result has the same shape,
/// and the very values that [`crate::image::pixels_from_rgb`] makes of the written picture.
///
/// # Errors
/// If the shapes differ, `clean` is no 8-bit picture or `adversarial` is not a number.
pub fn quantise(adversarial: &Tensor, clean: &Tensor, eps: Eps) -> Result<Tensor> {
    if adversarial.dims() != clean.dims() {
        let expected = format!("the shape of the clean pictures, {:?}", clean.dims());
        return Err(Error::argument("adversarial pictures", expected, format!("{:?}", adversarial.dims())));
    }
    let steps = f32::from(eps.steps());
    let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
    let rounded = values(adversarial)?
        .into_iter()
        .zip(values(clean)?)
        .map(|(found, clean)| {
            let sample = (clean * 255.0).round_ties_even();
            if !((0.0..=255.0).contains(&sample) && (clean * 255.0 - sample).abs() <= 1e-3) {
                return Err(Error::argument("clean pictures", "8-bit values k/255", clean));
            }
            if found.is_nan() {
                return Err(Error::argument("adversarial pictures", "values in [0, 1]", "NaN"));
            }
            let (low, high) = ((sample - steps).max(0.0), (sample + steps).min(255.0));
            Ok((found * 255.0).round_ties_even().clamp(low, high) / 255.0)
        })
        .collect::<Result<Vec<f32>>>()?;
    Ok(Tensor::from_vec(rounded, clean.shape(), clean.device())?)
}
