use std::path::Path;

use serde_json::{Map, Value};

use super::super::layers::Activation;
use super::super::{Merge, TowerSpec};
use crate::{Error, Result};

/// The generations of Qwen-VL's tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Layer norms, quick_gelu, full attention.
    Qwen2Vl,
    /// RMS norms, a gated MLP, attention within windows but for some blocks.
    Qwen2_5Vl,
    /// Layer norms, learnt positions interpolated to the grid, DeepStack.
    Qwen3Vl,
}

impl Family {
    /// Its name, as `model_type` has it: `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen2Vl => "qwen2_vl",
            Self::Qwen2_5Vl => "qwen2_5_vl",
            Self::Qwen3Vl => "qwen3_vl",
        }
    }
}

/// The `vision_config` of a Qwen-VL's `config.json`. Defaults are those of transformers 5.23's
/// `Qwen2VLVisionConfig`, `Qwen2_5_VLVisionConfig` and `Qwen3VLVisionConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenConfig {
    /// Which tower.
    pub family: Family,
    /// Number of blocks.
    pub blocks: usize,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Attention heads per block.
    pub heads: usize,
    /// The MLP's activation by name.
    pub activation: String,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Frames in a patch. A still stands for that many equal frames.
    pub frames: usize,
    /// Patches down and across that are merged into one token.
    pub merge: usize,
    /// Width of the merged embeddings, that of the language model.
    pub out: usize,
    /// Base of the rotary frequencies.
    pub theta: f64,
    /// Side of a window, in pixels (Qwen2.5-VL).
    pub window: usize,
    /// Blocks that attend to the whole picture, counted from 0 (Qwen2.5-VL).
    pub full_attention: Vec<usize>,
    /// Learnt positions, the square of a side (Qwen3-VL).
    pub positions: usize,
    /// Blocks whose output is merged for DeepStack, counted from 0 (Qwen3-VL).
    pub deepstack: Vec<usize>,
}

/// No tower is as large; what is larger is a mistake.
const MAX_SIZE: u64 = 1 << 20;

impl QwenConfig {
    /// From the text of a model's `config.json`, with its `vision_config`. `file` is named in errors.
    ///
    /// # Errors
    /// If the file is no JSON, is of another kind of model, or has impossible numbers.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|e| Error::config(file, e.to_string()))?;
        let kind = json.get("model_type").and_then(Value::as_str);
        let family = match kind {
            Some("qwen2_vl") => Family::Qwen2Vl,
            Some("qwen2_5_vl") => Family::Qwen2_5Vl,
            Some("qwen3_vl" | "qwen3_vl_moe") => Family::Qwen3Vl,
            other => {
                let found = other.map_or("none".into(), |kind| format!("`{kind}`"));
                let expected = "qwen2_vl, qwen2_5_vl, qwen3_vl or qwen3_vl_moe";
                return Err(Error::config(file, format!("model_type: expected {expected}, found {found}")));
            }
        };
        let empty = Map::new();
        let vision = match json.get("vision_config") {
            None | Some(Value::Null) => &empty,
            Some(Value::Object(vision)) => vision,
            Some(other) => {
                return Err(Error::config(file, format!("vision_config: expected an object, found {other}")));
            }
        };
        let keys = Keys { keys: vision, file };
        let (older, v3) = (family != Family::Qwen3Vl, family == Family::Qwen3Vl);
        let (hidden, out, intermediate);
        if family == Family::Qwen2Vl {
            hidden = keys.size("embed_dim", 1280)?;
            out = keys.size("hidden_size", 3584)?;
            let ratio = keys.number("mlp_ratio", 4.0)?;
            // As Python's int(embed_dim * mlp_ratio).
            intermediate = (hidden as f64 * ratio) as usize;
            if intermediate == 0 || intermediate as u64 > MAX_SIZE {
                return Err(Error::config(file, format!("vision_config.mlp_ratio: {ratio} is out of range")));
            }
        } else {
            hidden = keys.size("hidden_size", if v3 { 1152 } else { 3584 })?;
            out = keys.size("out_hidden_size", 3584)?;
            intermediate = keys.size("intermediate_size", if v3 { 4304 } else { 3420 })?;
        }
        let blocks = keys.size("depth", if v3 { 27 } else { 32 })?;
        let activation = match family {
            Family::Qwen2Vl => "quick_gelu",
            Family::Qwen2_5Vl => "silu",
            Family::Qwen3Vl => "gelu_pytorch_tanh",
        };
        let activation = keys.text("hidden_act", activation)?;
        Activation::from_config(&activation)
            .map_err(|e| Error::config(file, format!("vision_config.{e}")))?;
        let theta = match vision.get("rope_parameters").and_then(|rope| rope.get("rope_theta")) {
            None | Some(Value::Null) => 10_000.0,
            Some(value) => {
                value.as_f64().filter(|theta| theta.is_finite() && *theta > 0.0).ok_or_else(|| {
                    Error::config(file, format!("vision_config.rope_parameters.rope_theta: found {value}"))
                })?
            }
        };
        let config = Self {
            family,
            blocks,
            hidden,
            intermediate,
            heads: keys.size("num_heads", 16)?,
            activation,
            patch: keys.side("patch_size", if older { 14 } else { 16 })?,
            frames: keys.side("temporal_patch_size", 2)?,
            merge: keys.size("spatial_merge_size", 2)?,
            out,
            theta,
            window: keys.size("window_size", 112)?,
            full_attention: keys.blocks("fullatt_block_indexes", &[7, 15, 23, 31], blocks)?,
            positions: keys.size("num_position_embeddings", 2304)?,
            deepstack: keys.blocks("deepstack_visual_indexes", &[8, 16, 24], blocks)?,
        };
        let config = match family {
            Family::Qwen2Vl => Self { full_attention: Vec::new(), deepstack: Vec::new(), ..config },
            Family::Qwen2_5Vl => Self { deepstack: Vec::new(), ..config },
            Family::Qwen3Vl => Self { full_attention: Vec::new(), ..config },
        };
        // mistral.rs and transformers 4 call it by either name.
        for key in ["in_channels", "in_chans"] {
            if keys.size(key, 3)? != 3 {
                return Err(Error::config(file, format!("vision_config.{key}: expected 3")));
            }
        }
        config.check(file)?;
        Ok(config)
    }

    fn check(&self, file: &Path) -> Result<()> {
        let (hidden, heads) = (self.hidden, self.heads);
        if hidden % heads != 0 || hidden / heads % 4 != 0 {
            let reason = format!("a width of {hidden} in {heads} heads; expected heads of a multiple of 4");
            return Err(Error::config(file, format!("vision_config: {reason}")));
        }
        let side = self.positions_side();
        if self.family == Family::Qwen3Vl && side * side != self.positions {
            let positions = self.positions;
            return Err(Error::config(
                file,
                format!("vision_config.num_position_embeddings: expected a square, found {positions}"),
            ));
        }
        if self.family == Family::Qwen2_5Vl && self.window / self.merge / self.patch == 0 {
            let (window, unit) = (self.window, self.merge * self.patch);
            return Err(Error::config(
                file,
                format!("vision_config.window_size: expected at least {unit}, found {window}"),
            ));
        }
        if !self.deepstack.is_sorted_by(|a, b| a < b) {
            let found = &self.deepstack;
            let reason = format!("expected ascending blocks, found {found:?}");
            return Err(Error::config(file, format!("vision_config.deepstack_visual_indexes: {reason}")));
        }
        Ok(())
    }

    pub(super) fn positions_side(&self) -> usize {
        self.positions.isqrt()
    }

    /// What the sides of its pictures are multiples of, in pixels.
    pub fn factor(&self) -> usize {
        self.patch * self.merge
    }

    /// The shapes of the tower for pictures of `rows` x `columns` patches.
    pub fn spec(&self, (rows, columns): (usize, usize)) -> TowerSpec {
        let picture = (rows * self.patch, columns * self.patch);
        TowerSpec {
            family: self.family.name(),
            image_size: picture.0.min(picture.1),
            picture,
            patch_size: self.patch,
            grid: (rows, columns),
            class_token: false,
            hidden: self.hidden,
            blocks: self.blocks,
            heads: self.heads,
            projection: None,
            merge: Some(Merge {
                side: self.merge,
                width: self.out,
                deepstack: self.deepstack.iter().map(|block| block + 1).collect(),
            }),
        }
    }
}

struct Keys<'a> {
    keys: &'a Map<String, Value>,
    file: &'a Path,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str, value: &Value) -> Error {
        Error::config(self.file, format!("vision_config.{key}: expected {expected}, found {value}"))
    }

    fn size(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value
            .as_u64()
            .filter(|size| (1..=MAX_SIZE).contains(size))
            .map(|size| size as usize)
            .ok_or_else(|| self.wrong(key, "1 to 2^20", value))
    }

    /// One number, or a list of equal ones.
    fn side(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key).and_then(Value::as_array) {
            Some(list) if !list.is_empty() && list.iter().all(|value| *value == list[0]) => {
                let one = Map::from_iter([(key.to_string(), list[0].clone())]);
                Keys { keys: &one, file: self.file }.size(key, default)
            }
            _ => self.size(key, default),
        }
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| self.wrong(key, "a positive number", value))
    }

    fn text(&self, key: &str, default: &str) -> Result<String> {
        let Some(value) = self.get(key) else { return Ok(default.into()) };
        value.as_str().map(String::from).ok_or_else(|| self.wrong(key, "a name", value))
    }

    /// Blocks of a tower of `blocks`. A default is cut to those that there are.
    fn blocks(&self, key: &str, default: &[usize], blocks: usize) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(default.iter().copied().filter(|block| *block < blocks).collect());
        };
        let expected = || self.wrong(key, &format!("blocks from 0 to {}", blocks - 1), value);
        let list = value.as_array().ok_or_else(expected)?;
        list.iter()
            .map(|block| block.as_u64().map(|b| b as usize).filter(|b| *b < blocks).ok_or_else(expected))
            .collect()
    }
}
