use candle_core::Tensor;

use super::{Classifier, Subject};
use crate::{Error, Result};

/// A classifier whose gradients come from a faster likeness of it: the same model with products in
/// bf16 ([`crate::tower::clip::Clip::packed`]), say.
///
/// Success is the exact classifier's to decide. Its logits are what [`Classifier::logits`] and
/// [`Classifier::logits_and_gradients`] give; [`Classifier::near_logits_and_gradients`] gives the
/// likeness's, and the objectives of [`super::Classification`] ask the exact one before they call
/// a picture fooled on them. Attacks that climb such an objective run at the likeness's speed.
#[derive(Clone)]
pub struct Mixed<C, V> {
    craft: C,
    verify: V,
}

impl<C: Classifier, V: Classifier> Mixed<C, V> {
    /// Gradients from `craft`, which must be a likeness of `verify`: the same model and defence.
    ///
    /// # Errors
    /// If they are of two models, or have not as many classes.
    pub fn new(craft: C, verify: V) -> Result<Self> {
        if craft.subject() != verify.subject() {
            let (craft, verify) = (craft.subject().to_string(), verify.subject().to_string());
            return Err(Error::argument("the classifier to craft on", verify, craft));
        }
        if craft.classes() != verify.classes() {
            let expected = format!("{} classes", verify.classes());
            return Err(Error::argument("the classifier to craft on", expected, craft.classes()));
        }
        Ok(Self { craft, verify })
    }

    /// The likeness that gradients come from.
    pub fn craft(&self) -> &C {
        &self.craft
    }

    /// The exact classifier.
    pub fn verify(&self) -> &V {
        &self.verify
    }
}

impl<C: Classifier, V: Classifier> Classifier for Mixed<C, V> {
    fn subject(&self) -> &Subject {
        self.verify.subject()
    }

    fn classes(&self) -> usize {
        self.verify.classes()
    }

    fn batch(&self) -> usize {
        self.craft.batch().min(self.verify.batch())
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        self.verify.logits(pixels)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let logits = self.verify.logits(pixels)?;
        let (_, gradients) = self.craft.logits_and_gradients(pixels, &mut |_| cotangents(&logits))?;
        Ok((logits, gradients))
    }

    fn is_near(&self) -> bool {
        true
    }

    fn near_logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.craft.logits_and_gradients(pixels, cotangents)
    }
}
