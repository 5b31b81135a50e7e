//! CLIP's text transformer.
//!
//! After transformers 5.23 `models/clip/modeling_clip.py` (`CLIPTextModel`): token and learnt
//! position embeddings, pre-norm blocks with causal attention, a final norm, and the end-of-text
//! token's state through a projection.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use crate::tower::layers::{Activation, Attention, LayerNorm, Linear};
use crate::tower::weights::Weights;
use crate::{Error, Result};

/// The text part of a CLIP's `config.json`. Defaults are those of transformers' `CLIPTextConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct TextConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Attention heads per block.
    pub num_attention_heads: usize,
    /// The longest text, in tokens with its start and its end.
    pub max_position_embeddings: usize,
    /// The MLP's activation by name.
    pub hidden_act: String,
    /// Added to the variance in every norm.
    pub layer_norm_eps: f64,
    /// Width of the joint embedding.
    pub projection_dim: usize,
    /// The end-of-text token's id, or 2; see [`TextConfig::pooling`].
    pub eos_token_id: u32,
    /// `clip_text_model`, or empty in old files.
    pub model_type: String,
}

impl Default for TextConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: "quick_gelu".into(),
            layer_norm_eps: 1e-5,
            projection_dim: 512,
            eos_token_id: 49407,
            model_type: String::new(),
        }
    }
}

/// Which token's state stands for a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first with this id.
    FirstOf(u32),
    /// The first with the highest id of the text.
    Highest,
}

impl TextConfig {
    /// From the text of a CLIP's `config.json` (`text_config`), or that of a text model alone.
    /// `file` is named in errors.
    ///
    /// Where there is an old file's `text_config_dict` it replaces `text_config`, as in
    /// transformers.
    ///
    /// # Errors
    /// If the file is no JSON, is of a model without a CLIP text encoder, or has impossible numbers.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let json: serde_json::Value =
            serde_json::from_str(text).map_err(|e| Error::config(file, e.to_string()))?;
        let part = |name: &str| json.get(name).filter(|v| v.is_object());
        let nested = part("text_config_dict").or_else(|| part("text_config"));
        let mut config = Self::deserialize(nested.unwrap_or(&json))
            .map_err(|e| Error::config(file, format!("text_config: {e}")))?;
        if let Some(dim) = json.get("projection_dim").and_then(|v| v.as_u64()).filter(|_| nested.is_some()) {
            config.projection_dim = dim as usize;
        }
        if !matches!(config.model_type.as_str(), "" | "clip_text_model" | "clip") {
            let found = &config.model_type;
            let reason = format!("expected a clip_text_model as text encoder, found `{found}`");
            return Err(Error::config(file, reason));
        }
        config.check(file)?;
        Ok(config)
    }

    /// transformers' rule: an `eos_token_id` of 2 is what CLIP's configurations had before they
    /// were right, and then the highest id is taken for the end of the text.
    pub fn pooling(&self) -> Pooling {
        if self.eos_token_id == 2 { Pooling::Highest } else { Pooling::FirstOf(self.eos_token_id) }
    }

    fn check(&self, file: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("max_position_embeddings", self.max_position_embeddings),
            ("projection_dim", self.projection_dim),
        ];
        for (name, value) in sizes {
            if value == 0 || value > 1 << 20 {
                let reason = format!("text_config: {name} is {value}, expected 1 to 2^20");
                return Err(Error::config(file, reason));
            }
        }
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let (d, h) = (self.hidden_size, self.num_attention_heads);
            let reason = format!("text_config: hidden_size {d} is not a multiple of num_attention_heads {h}");
            return Err(Error::config(file, reason));
        }
        Activation::from_config(&self.hidden_act)
            .map_err(|e| Error::config(file, format!("text_config: {e}")))?;
        Ok(())
    }
}

#[derive(Debug, Clone)]
struct Block {
    norm1: LayerNorm,
    attention: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// CLIP's text transformer with its projection, held and run in f32.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    config: TextConfig,
    device: Device,
    activation: Activation,
    /// `(vocab_size, D)`.
    tokens: Tensor,
    /// `(max_position_embeddings, D)`.
    positions: Tensor,
    blocks: Vec<Block>,
    final_norm: LayerNorm,
    projection: Linear,
}

/// The outputs of a [`TextEncoder`], f32.
#[derive(Debug, Clone)]
pub struct TextFeatures {
    /// Every token's state after the final norm, `(B, N, D)` with the longest text's N. What lies
    /// behind a shorter text's end means nothing.
    pub hidden: Tensor,
    /// The state of the token that [`TextConfig::pooling`] says, `(B, D)`.
    pub pooled: Tensor,
    /// `pooled` after the projection, `(B, projection)`, not normalised.
    pub embeds: Tensor,
}

impl TextEncoder {
    /// Builds the encoder from weights named as in transformers' `CLIPModel`: `text_model.*` and
    /// `text_projection.weight`. They are widened to f32.
    ///
    /// # Errors
    /// If a weight is missing or has another shape than `config` says.
    pub fn new(config: &TextConfig, weights: &dyn Weights) -> Result<Self> {
        let (d, m) = (config.hidden_size, config.intermediate_size);
        let get = |name: &str, shape: &[usize]| -> Result<Tensor> {
            Ok(weights.get(name, shape)?.to_dtype(DType::F32)?)
        };
        let norm = |name: String| -> Result<LayerNorm> {
            let (weight, bias) = (get(&format!("{name}.weight"), &[d])?, get(&format!("{name}.bias"), &[d])?);
            Ok(LayerNorm::new(weight, bias, config.layer_norm_eps))
        };
        let linear = |name: String, rows: usize, columns: usize| -> Result<Linear> {
            let weight = get(&format!("{name}.weight"), &[rows, columns])?;
            Ok(Linear::new(weight, Some(get(&format!("{name}.bias"), &[rows])?)))
        };
        let blocks = (0..config.num_hidden_layers)
            .map(|i| {
                let at = |part: &str| format!("text_model.encoder.layers.{i}.{part}");
                Ok(Block {
                    norm1: norm(at("layer_norm1"))?,
                    attention: Attention {
                        q: linear(at("self_attn.q_proj"), d, d)?,
                        k: linear(at("self_attn.k_proj"), d, d)?,
                        v: linear(at("self_attn.v_proj"), d, d)?,
                        out: linear(at("self_attn.out_proj"), d, d)?,
                        heads: config.num_attention_heads,
                    },
                    norm2: norm(at("layer_norm2"))?,
                    fc1: linear(at("mlp.fc1"), m, d)?,
                    fc2: linear(at("mlp.fc2"), d, m)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let tokens = get("text_model.embeddings.token_embedding.weight", &[config.vocab_size, d])?;
        let positions =
            get("text_model.embeddings.position_embedding.weight", &[config.max_position_embeddings, d])?;
        Ok(Self {
            device: tokens.device().clone(),
            activation: Activation::from_config(&config.hidden_act)?,
            tokens,
            positions,
            blocks,
            final_norm: norm("text_model.final_layer_norm".into())?,
            projection: Linear::new(get("text_projection.weight", &[config.projection_dim, d])?, None),
            config: config.clone(),
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &TextConfig {
        &self.config
    }

    /// The device its weights are on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Runs texts as token ids, each with its start and its end, of any lengths.
    ///
    /// # Errors
    /// If there is no text, one is empty or longer than the model, an id has no embedding, or a
    /// text has no end where [`TextConfig::pooling`] looks for one. (transformers pools such a text
    /// at its first token.)
    pub fn forward(&self, texts: &[impl AsRef<[u32]>]) -> Result<TextFeatures> {
        let (limit, vocabulary) = (self.config.max_position_embeddings, self.config.vocab_size);
        let longest = texts.iter().map(|text| text.as_ref().len()).max().unwrap_or(0);
        if longest == 0 {
            return Err(Error::argument("texts", "at least one with tokens", "none"));
        }
        // Padding comes after the end, where no token before it looks; it must not be taken for it.
        let padding = match self.config.pooling() {
            Pooling::FirstOf(end) => end,
            Pooling::Highest => 0,
        };
        let mut ids = Vec::with_capacity(texts.len() * longest);
        let mut ends = Vec::with_capacity(texts.len());
        for (row, text) in texts.iter().enumerate() {
            let text = text.as_ref();
            if text.len() > limit {
                return Err(Error::argument("text", format!("at most {limit} tokens"), text.len()));
            }
            if let Some(id) = text.iter().find(|id| **id as usize >= vocabulary) {
                return Err(Error::argument("token id", format!("below vocab_size {vocabulary}"), id));
            }
            let end = match self.config.pooling() {
                Pooling::FirstOf(end) => text.iter().position(|id| *id == end),
                Pooling::Highest => text.iter().max().and_then(|most| text.iter().position(|id| id == most)),
            };
            let Some(end) = end else {
                let expected = format!("an end-of-text token, eos_token_id {}", self.config.eos_token_id);
                return Err(Error::argument("text", expected, format!("none in {text:?}")));
            };
            ends.push((row * longest + end) as u32);
            ids.extend_from_slice(text);
            ids.resize((row + 1) * longest, padding);
        }
        let (batch, d) = (texts.len(), self.config.hidden_size);
        let ids = Tensor::from_vec(ids, batch * longest, &self.device)?;
        let tokens = self.tokens.index_select(&ids, 0)?.reshape((batch, longest, d))?;
        let mut stream = tokens.broadcast_add(&self.positions.narrow(0, 0, longest)?)?;
        for block in &self.blocks {
            let attention = block.attention.forward_causal(&block.norm1.forward(&stream)?)?;
            stream = (stream + attention)?;
            let up = block.fc1.forward(&block.norm2.forward(&stream)?)?;
            stream = (&stream + block.fc2.forward(&self.activation.forward(&up)?)?)?;
        }
        let hidden = self.final_norm.forward(&stream)?;
        let ends = Tensor::from_vec(ends, batch, &self.device)?;
        let pooled = hidden.reshape((batch * longest, d))?.index_select(&ends, 0)?;
        let embeds = self.projection.forward(&pooled)?;
        Ok(TextFeatures { hidden, pooled, embeds })
    }
}
