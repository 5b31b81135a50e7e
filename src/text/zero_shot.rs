//! Classes by name: a linear classifier on pictures' embeddings, made of texts.

use std::collections::HashMap;

use candle_core::{D, DType, Tensor};

use super::{BATCH, ClipText, row_norms};
use crate::{Error, Result};

/// CLIP's zero-shot classifier.
#[derive(Debug, Clone)]
pub struct ZeroShotHead {
    /// The class names, K of them.
    pub classes: Vec<String>,
    /// One row of length 1 for each class, `(K, projection)` f32.
    pub weights: Tensor,
    /// What cosines are multiplied by: e to the checkpoint's `logit_scale`.
    pub logit_scale: f64,
}

impl ZeroShotHead {
    /// Builds the head from class names and templates like `a photo of a {class}.`; CLIP_benchmark's
    /// `{c}` is the same. A class's row is the mean of its prompts' embeddings, each normalised,
    /// normalised again (Radford et al. 2021, section 3.1.4).
    ///
    /// # Errors
    /// If there are no classes or no templates, a template has no place for the class, or a class
    /// name is empty or comes twice.
    pub fn new(text: &ClipText, classes: &[impl AsRef<str>], templates: &[impl AsRef<str>]) -> Result<Self> {
        Self::with_prompt_names(text, classes, classes, templates)
    }

    /// As [`ZeroShotHead::new`], with other words for the classes in the prompts: ImageNet's two
    /// cranes are both a `crane` there. Classes with the same words have the same row, so the
    /// second never has the larger logit.
    ///
    /// # Errors
    /// As [`ZeroShotHead::new`], but prompt names may come twice; also if there are not as many as
    /// classes, or one is empty.
    pub fn with_prompt_names(
        text: &ClipText,
        classes: &[impl AsRef<str>],
        prompt_names: &[impl AsRef<str>],
        templates: &[impl AsRef<str>],
    ) -> Result<Self> {
        let classes: Vec<String> = classes.iter().map(|class| class.as_ref().to_string()).collect();
        check_classes(&classes)?;
        if prompt_names.len() != classes.len() {
            let expected = format!("one for each of {} classes", classes.len());
            return Err(Error::argument("prompt names", expected, prompt_names.len()));
        }
        if let Some(i) = prompt_names.iter().position(|name| name.as_ref().trim().is_empty()) {
            return Err(Error::argument("prompt names", "names", format!("an empty one at {i}")));
        }
        let templates = check_templates(templates)?;
        let rows = prompt_names
            .chunks((BATCH / templates.len()).max(1))
            .map(|group| {
                let prompts: Vec<String> = group
                    .iter()
                    .flat_map(|class| {
                        templates.iter().map(move |template| template.replace(PLACE, class.as_ref()))
                    })
                    .collect();
                let embeds = text.embed(&prompts)?;
                let unit = embeds.broadcast_div(&row_norms(&embeds)?)?;
                let mean = unit.reshape((group.len(), templates.len(), ()))?.mean(1)?;
                Ok(mean.broadcast_div(&row_norms(&mean)?)?)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { classes, weights: Tensor::cat(&rows, 0)?, logit_scale: text.logit_scale })
    }

    /// Scaled cosines `(B, K)` f32 of pictures' embeddings `(B, projection)`, which need not be
    /// normalised.
    ///
    /// # Errors
    /// If the embeddings have another shape.
    pub fn logits(&self, embeds: &Tensor) -> Result<Tensor> {
        let embeds = self.check("embeds", embeds, 1)?;
        let unit = embeds.broadcast_div(&row_norms(&embeds)?)?;
        Ok((unit.matmul(&self.weights.t()?)? * self.logit_scale)?)
    }

    /// The gradient `(B, K)` at [`ZeroShotHead::logits`]' result to that at `embeds`, both
    /// `(B, projection)`; f32.
    ///
    /// With u = e / |e| and g = scale c W:  (g - u (u g)) / |e|.
    ///
    /// # Errors
    /// If the embeddings or the cotangent have another shape.
    pub fn vjp(&self, embeds: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let (embeds, cotangent) = (self.check("embeds", embeds, 1)?, self.check("cotangent", cotangent, 0)?);
        let norms = row_norms(&embeds)?;
        let unit = embeds.broadcast_div(&norms)?;
        let gradient = (cotangent.matmul(&self.weights)? * self.logit_scale)?;
        let along = (&unit * &gradient)?.sum_keepdim(D::Minus1)?;
        Ok((gradient - unit.broadcast_mul(&along)?)?.broadcast_div(&norms)?)
    }

    /// `x` in f32, where its rows are as long as dimension `dim` of the weights.
    fn check(&self, what: &str, x: &Tensor, dim: usize) -> Result<Tensor> {
        let width = self.weights.dim(dim)?;
        match *x.dims() {
            [_, found] if found == width => Ok(x.to_dtype(DType::F32)?.contiguous()?),
            ref dims => Err(Error::argument(what, format!("shape [B, {width}]"), format!("{dims:?}"))),
        }
    }
}

const PLACE: &str = "{class}";

fn check_classes(classes: &[String]) -> Result<()> {
    if classes.is_empty() {
        return Err(Error::argument("classes", "at least one", 0));
    }
    let mut seen = HashMap::new();
    for (i, class) in classes.iter().enumerate() {
        if class.trim().is_empty() {
            return Err(Error::argument("classes", "names", format!("an empty one at {i}")));
        }
        if let Some(first) = seen.insert(class, i) {
            let found = format!("`{class}` at {first} and at {i}");
            return Err(Error::argument("classes", "each name once", found));
        }
    }
    Ok(())
}

/// The templates with `{class}` for `{c}`.
fn check_templates(templates: &[impl AsRef<str>]) -> Result<Vec<String>> {
    if templates.is_empty() {
        return Err(Error::argument("templates", "at least one", 0));
    }
    let place = |template: &str| {
        let template = template.replace("{c}", PLACE);
        if template.contains(PLACE) {
            return Ok(template);
        }
        Err(Error::argument("template", "`{class}` in it", format!("`{template}`")))
    };
    templates.iter().map(|template| place(template.as_ref())).collect()
}
