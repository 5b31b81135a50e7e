//! CLIP's text side: tokenizer, text encoder and the zero-shot head they make. Inference only; the
//! head alone has a gradient, with respect to the picture's embedding.
//!
//! ```
//! use candle_core::Device;
//! use radapt::model::{Lookup, Model};
//! use radapt::text::ZeroShotHead;
//!
//! # fn main() -> radapt::Result<()> {
//! // A folder or a Hub id; this one is a tiny random CLIP.
//! let model = Model::find("tests/fixtures/clip_text/hf", &Lookup::default())?;
//! let text = model.text(&Device::Cpu)?;
//! let head = ZeroShotHead::new(&text, &["cat", "dog"], &["a photo of a {class}."])?;
//! // A picture's embedding would come from the vision tower; a text's stands in for it.
//! let logits = head.logits(&text.embed(&["a photo of a dog."])?)?.to_vec2::<f32>()?;
//! assert!(logits[0][1] > logits[0][0]);
//! # Ok(())
//! # }
//! ```

mod encoder;
mod layout;
mod tokenizer;
mod zero_shot;

pub use encoder::{Pooling, TextConfig, TextEncoder, TextFeatures};
pub use tokenizer::Tokenizer;
pub use zero_shot::ZeroShotHead;

use candle_core::{D, DType, Device, Tensor};

use crate::tower::weights::Checkpoint;
use crate::{Error, Result};

/// Texts that go through the encoder at once.
const BATCH: usize = 256;

/// The text side of a CLIP.
#[derive(Debug, Clone)]
pub struct ClipText {
    /// Texts to token ids.
    pub tokenizer: Tokenizer,
    /// Token ids to embeddings.
    pub encoder: TextEncoder,
    /// What cosines are multiplied by: e to the checkpoint's `logit_scale`.
    pub logit_scale: f64,
}

impl ClipText {
    /// Loads the text side of a CLIP's folder: weights in the key layouts of transformers 4 and 5
    /// or of OpenAI and OpenCLIP, and the tokenizer's files beside them.
    ///
    /// # Errors
    /// If a file or weight is missing or wrong, or the tokenizer is not the encoder's: other ids
    /// than it has embeddings for, or another end-of-text token than it pools at.
    pub fn load(checkpoint: &Checkpoint, config: &TextConfig, device: &Device) -> Result<Self> {
        let weights = layout::text_weights(checkpoint, device)?;
        let encoder = TextEncoder::new(config, &*weights)?;
        // A scalar, but of one entry in some files.
        let scale = weights.get("logit_scale", &[]).or_else(|e| match e {
            Error::WeightShape { .. } => weights.get("logit_scale", &[1]),
            other => Err(other),
        })?;
        let scale = f64::from(scale.flatten_all()?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?);
        let logit_scale = scale.exp();
        if !logit_scale.is_finite() {
            let reason =
                format!("weight `logit_scale` is {scale}, expected a number with a finite exponential");
            return Err(Error::config(checkpoint.label(), reason));
        }
        let tokenizer = Tokenizer::load(checkpoint.folder(), config.max_position_embeddings)?;
        let end = tokenizer.end();
        let reason = match config.pooling() {
            Pooling::FirstOf(pooled) if pooled != end => {
                format!("text_config.eos_token_id is {pooled}, but the tokenizer ends texts with {end}")
            }
            _ if end as usize >= config.vocab_size => {
                format!(
                    "text_config.vocab_size is {}, but the tokenizer ends texts with {end}",
                    config.vocab_size
                )
            }
            _ => return Ok(Self { tokenizer, encoder, logit_scale }),
        };
        Err(Error::config(checkpoint.folder().join("config.json"), reason))
    }

    /// The embeddings `(B, projection)` f32 of texts, as the projection gives them: not normalised.
    ///
    /// # Errors
    /// If there are no texts, or one cannot be tokenized.
    pub fn embed(&self, texts: &[impl AsRef<str>]) -> Result<Tensor> {
        let ids = self.tokenizer.ids(texts)?;
        let parts = ids.chunks(BATCH).map(|rows| Ok(self.encoder.forward(rows)?.embeds));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        if parts.is_empty() {
            return Err(Error::argument("texts", "at least one", 0));
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// The Euclidean length of each row of `(B, P)`, `(B, 1)`.
fn row_norms(x: &Tensor) -> Result<Tensor> {
    Ok(x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}
