//! A model by folder or Hub id: its files, its configuration, its vision tower, its text encoder.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use hf_hub::RepoType;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::hub;
use crate::image::{Contract, Preprocess};
use crate::pocket::built_in;
use crate::text::{ClipText, TextConfig};
use crate::tower::clip::{Clip, ClipConfig, checkpoint_fingerprint, feature_block};
use crate::tower::qwen::{self, Qwen, QwenConfig};
use crate::tower::weights::Checkpoint;
use crate::{Error, Result};

/// The kinds of model there is a tower for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// A CLIP, or its vision tower alone.
    Clip,
    /// LLaVA-1.5: one square picture, one run of tokens.
    Llava,
    /// LLaVA-NeXT: tiles of a picture.
    LlavaNext,
    /// Qwen2-VL: pictures of any size.
    Qwen2Vl,
    /// Qwen2.5-VL.
    Qwen2_5Vl,
    /// Qwen3-VL.
    Qwen3Vl,
    /// Qwen3-VL with a mixture of experts as its language model.
    Qwen3VlMoe,
}

impl ModelKind {
    /// Whether it has a Qwen-VL's tower, and not CLIP's.
    pub fn is_qwen(self) -> bool {
        match self {
            Self::Clip | Self::Llava | Self::LlavaNext => false,
            Self::Qwen2Vl | Self::Qwen2_5Vl | Self::Qwen3Vl | Self::Qwen3VlMoe => true,
        }
    }
}

/// How a model is looked up.
#[derive(Debug, Clone, Default)]
pub struct Lookup {
    /// A branch, tag or commit on the Hub; `main` where not given.
    pub revision: Option<String>,
    /// Never touch the network. `HF_HUB_OFFLINE=1` says the same.
    pub offline: bool,
}

/// A model's files on disk.
#[derive(Debug, Clone)]
pub struct Model {
    /// The folder or Hub id as it was given.
    pub name: String,
    /// The revision asked for on the Hub, or empty.
    pub revision: String,
    /// Where the files lie.
    pub folder: PathBuf,
    /// Its kind, by `model_type`.
    pub kind: ModelKind,
    /// `config.json`, parsed; or what it would be, where there is only OpenCLIP's
    /// `open_clip_config.json`.
    pub config: Value,
    /// The file the configuration is from.
    pub config_file: PathBuf,
}

impl Model {
    /// Finds a model: a built-in one ([`crate::pocket::built_in`]: `pocket` is the LLaVA,
    /// `pocket-clip` the CLIP; a folder of that name is `./pocket`), a folder with a `config.json`
    /// or OpenCLIP's `open_clip_config.json`, or a Hub id `organisation/name`, from the cache or,
    /// unless offline, from the Hub.
    ///
    /// Honours `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and
    /// `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// If neither exists, a file is missing, or its `model_type` is none of [`ModelKind`].
    pub fn find(name: &str, lookup: &Lookup) -> Result<Self> {
        let local = Path::new(name);
        let folder = if let Some(folder) = built_in::folder(name)? {
            folder
        } else if local.is_dir() {
            local.to_path_buf()
        } else if hub::is_id(name) {
            hub::folder(name, RepoType::Model, lookup, wanted, &[CONFIG, OPEN_CLIP])
                .map_err(|reason| Error::Model { model: name.into(), reason })?
        } else {
            return Err(Error::Model {
                model: name.into(),
                reason: "no such folder, no built-in model, and not a Hub id `organisation/name`".into(),
            });
        };
        let open_clip = folder.join(OPEN_CLIP);
        let has_open_clip = open_clip.is_file();
        let path = folder.join(CONFIG);
        let found = if has_open_clip && !path.is_file() { None } else { Some(json(&path)?) };
        let found = found.map(|config| (kind(&config), config));
        let (config_file, kind, config) = match found {
            Some((Some(kind), config)) => (path, kind, config),
            // Some of OpenCLIP's repositories have a `config.json` for another library.
            _ if has_open_clip => {
                let text = std::fs::read_to_string(&open_clip).map_err(|e| Error::read(&open_clip, e))?;
                let config = crate::tower::open_clip::config(&text, &open_clip)?;
                (open_clip, ModelKind::Clip, config)
            }
            found => {
                let other = found.as_ref().and_then(|(_, config)| config.get("model_type")?.as_str());
                let found = other.map_or("none".to_string(), |t| format!("`{t}`"));
                return Err(Error::config(
                    path,
                    format!(
                        "model_type: expected clip, clip_vision_model, llava, llava_next, qwen2_vl, \
                         qwen2_5_vl, qwen3_vl or qwen3_vl_moe, found {found}"
                    ),
                ));
            }
        };
        Ok(Self {
            name: name.into(),
            revision: lookup.revision.clone().unwrap_or_default(),
            folder,
            kind,
            config,
            config_file,
        })
    }

    /// The commit of a snapshot from the Hub, which names the folder it lies in; `None` of others.
    pub fn commit(&self) -> Option<String> {
        let snapshots = self.folder.parent()?.file_name()? == "snapshots";
        let name = self.folder.file_name()?.to_str()?;
        (snapshots && !Path::new(&self.name).is_dir()).then(|| name.to_string())
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The configuration of its vision tower, a CLIP's.
    ///
    /// # Errors
    /// If it has no CLIP vision tower, or impossible sizes.
    pub fn tower_config(&self) -> Result<ClipConfig> {
        if self.kind.is_qwen() {
            return Err(Error::Model {
                model: self.name.clone(),
                reason: "has no CLIP as its vision tower, which this needs".into(),
            });
        }
        ClipConfig::parse(&self.config.to_string(), &self.config_file)
    }

    /// The configuration of its vision tower, a Qwen-VL's.
    ///
    /// # Errors
    /// If it has no such tower, or impossible sizes.
    pub fn qwen_config(&self) -> Result<QwenConfig> {
        QwenConfig::parse(&self.config.to_string(), &self.config_file)
    }

    /// How it prepares pictures: its files, or `contract` where given. LLaVA pads unless told
    /// otherwise, as the original does. A Qwen-VL's has no size of its own, unless
    /// [`Preprocess::fixed`] gives it one.
    ///
    /// # Errors
    /// If its preprocessor file asks for something unknown, or for another size than the tower's.
    pub fn preprocess(&self, contract: Option<Contract>) -> Result<Preprocess> {
        if self.kind.is_qwen() {
            if let Some(other) = contract.filter(|contract| *contract != Contract::Qwen) {
                return Err(Error::argument("contract", "qwen for this model", other));
            }
            let config = self.qwen_config()?;
            return Preprocess::qwen_from_folder(&self.folder, config.patch as u32, config.merge as u32);
        }
        let size = self.tower_config()?.image_size as u32;
        let default = match self.kind {
            ModelKind::Clip => Contract::Clip,
            _ => Contract::LlavaPad,
        };
        let preprocess = Preprocess::from_folder(&self.folder, size, contract, default)?;
        if (preprocess.width, preprocess.height) != (size, size) {
            let (w, h) = (preprocess.width, preprocess.height);
            return Err(Error::config(
                &self.folder,
                format!("the preprocessor makes pictures of {w}x{h}, the tower takes {size}x{size}"),
            ));
        }
        Ok(preprocess)
    }

    /// Maps its weights.
    ///
    /// # Errors
    /// If there are none, or they are damaged.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Checkpoint::open(&self.folder)
    }

    /// Loads its vision tower, undefended. `dtype` is what the weights are held in, f32 where not
    /// given: what a figure or an anchor is of should not depend on the device. In half precision a
    /// GPU computes in half precision; a CPU would widen the weights each time they are used.
    ///
    /// # Errors
    /// If the configuration or a weight is missing or wrong.
    pub fn tower(&self, preprocess: &Preprocess, dtype: Option<DType>, device: &Device) -> Result<Clip> {
        let checkpoint = self.checkpoint()?;
        let tower = Clip::load(&checkpoint, &self.tower_config()?, preprocess.mean, preprocess.std, device)?;
        tower.to_dtype(dtype.unwrap_or(DType::F32))
    }

    /// Loads its vision tower, a Qwen-VL's, undefended, as [`Model::tower`] does a CLIP's.
    ///
    /// # Errors
    /// If the configuration or a weight is missing or wrong.
    pub fn qwen(&self, preprocess: &Preprocess, dtype: Option<DType>, device: &Device) -> Result<Qwen> {
        let checkpoint = self.checkpoint()?;
        let tower = Qwen::load(&checkpoint, &self.qwen_config()?, preprocess.mean, preprocess.std, device)?;
        tower.to_dtype(dtype.unwrap_or(DType::F32))
    }

    /// Loads a CLIP's tokenizer and text encoder, held in f32.
    ///
    /// # Errors
    /// If it has no CLIP text encoder, or a file or weight of it is missing or wrong.
    pub fn text(&self, device: &Device) -> Result<ClipText> {
        let config = TextConfig::parse(&self.config.to_string(), &self.config_file)?;
        ClipText::load(&self.checkpoint()?, &config, device)
    }

    /// SHA-256 over its weight files and its configuration, whatever they are called: the whole of what
    /// a result depends on. [`Model::fingerprint`] covers only what an anchor depends on.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn digest(&self) -> Result<String> {
        let mut files: Vec<PathBuf> = std::fs::read_dir(&self.folder)
            .map_err(|e| Error::read(&self.folder, e))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
            .collect();
        if files.is_empty() {
            files = self.checkpoint()?.files().to_vec();
        }
        files.sort();
        files.push(self.config_file.clone());
        digest(&files)
    }

    /// The fingerprint of its vision tower's trunk, from the weights as stored.
    ///
    /// # Errors
    /// If a weight is missing or wrong.
    pub fn fingerprint(&self) -> Result<String> {
        if self.kind.is_qwen() {
            return qwen::checkpoint_fingerprint(&self.checkpoint()?, &self.qwen_config()?);
        }
        checkpoint_fingerprint(&self.checkpoint()?, &self.tower_config()?)
    }

    /// The block whose output the model takes as image features, and whether the class token goes
    /// with it: `vision_feature_layer` and `vision_feature_select_strategy`.
    ///
    /// # Errors
    /// If the configuration names a block that does not exist, or several.
    pub fn features(&self) -> Result<(usize, bool)> {
        let path = self.config_file.clone();
        let layer = match self.config.get("vision_feature_layer") {
            None => -2,
            Some(value) => value.as_i64().ok_or_else(|| {
                Error::config(&path, format!("vision_feature_layer: expected one number, found {value}"))
            })?,
        };
        let block = feature_block(layer, self.tower_config()?.num_hidden_layers)
            .map_err(|e| Error::config(&path, e.to_string()))?;
        let class_token = match self.config.get("vision_feature_select_strategy").and_then(Value::as_str) {
            None | Some("default") => false,
            Some("full") => true,
            Some(other) => {
                return Err(Error::config(
                    &path,
                    format!("vision_feature_select_strategy: expected default or full, found `{other}`"),
                ));
            }
        };
        Ok((block, class_token))
    }
}

const CONFIG: &str = "config.json";
const OPEN_CLIP: &str = "open_clip_config.json";

fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::config(path, e.to_string()))
}

fn kind(config: &Value) -> Option<ModelKind> {
    match config.get("model_type").and_then(Value::as_str) {
        Some("clip" | "clip_vision_model") => Some(ModelKind::Clip),
        Some("llava") => Some(ModelKind::Llava),
        Some("llava_next") => Some(ModelKind::LlavaNext),
        Some("qwen2_vl") => Some(ModelKind::Qwen2Vl),
        Some("qwen2_5_vl") => Some(ModelKind::Qwen2_5Vl),
        Some("qwen3_vl") => Some(ModelKind::Qwen3Vl),
        Some("qwen3_vl_moe") => Some(ModelKind::Qwen3VlMoe),
        _ => None,
    }
}

/// SHA-256 over files, one after the other, in hexadecimal digits.
pub(crate) fn digest(files: &[PathBuf]) -> Result<String> {
    let mut hash = Sha256::new();
    for path in files {
        let mut file = std::fs::File::open(path).map_err(|e| Error::read(path, e))?;
        std::io::copy(&mut file, &mut hash).map_err(|e| Error::read(path, e))?;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The files of a model that matter here, of `all` there are; checkpoints in other formats are not
/// downloaded, nor is a second copy in OpenCLIP's names.
fn wanted(file: &str, all: &[&str]) -> bool {
    if file.contains('/') {
        return false;
    }
    let any = |part: fn(&str) -> bool| all.iter().any(|file| !file.contains('/') && part(file));
    if file.ends_with(".safetensors") {
        return !file.starts_with("open_clip_") || !any(|file| file.starts_with("model."));
    }
    match file {
        "open_clip_pytorch_model.bin" => !any(|file| file.ends_with(".safetensors")),
        "pytorch_model.bin" => {
            !any(|file| file.ends_with(".safetensors") || file == "open_clip_pytorch_model.bin")
        }
        "pytorch_model.bin.index.json" => false,
        "merges.txt" => true,
        file => file.ends_with(".json") || file.ends_with(".jinja"),
    }
}
