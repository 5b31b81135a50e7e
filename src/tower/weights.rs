//! Where a tower's weights come from: memory-mapped safetensors, PyTorch's checkpoint files, or
//! whatever an engine holds.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};
use safetensors::Dtype;

use super::torch::TorchFile;
use crate::{Error, Result};

/// Named tensors.
pub trait Weights {
    /// The tensor `name`, in the dtype it is stored in.
    ///
    /// # Errors
    /// [`Error::MissingWeight`] if there is none, [`Error::WeightShape`] if it has another shape.
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor>;
    /// Whether there is a tensor `name`.
    fn contains(&self, name: &str) -> bool;
}

/// The weights of a model folder: safetensors files, memory-mapped, or a file of PyTorch's, of which
/// nothing is executed.
pub struct Checkpoint {
    folder: PathBuf,
    /// The index file of a sharded checkpoint, or its only file: what errors name.
    label: PathBuf,
    files: Vec<PathBuf>,
    tensors: Tensors,
    /// Every tensor's name.
    names: Vec<String>,
}

enum Tensors {
    Safetensors(MmapedSafetensors),
    Torch(TorchFile),
}

/// What a folder's weights may be called, beside an index; the first there is taken. The last
/// three are OpenCLIP's and PyTorch's own.
const NAMES: [&str; 4] =
    ["model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"];

impl Checkpoint {
    /// Maps a folder's `model.safetensors`, or the files that `model.safetensors.index.json` lists,
    /// or else `open_clip_model.safetensors`; or reads its `open_clip_pytorch_model.bin` or
    /// `pytorch_model.bin`; or opens a single file of either kind given directly, by what it begins
    /// with and not by its name.
    ///
    /// Tensors in nested dictionaries of a PyTorch file go by their keys joined with dots.
    ///
    /// # Errors
    /// If there is no such file, or one of them is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let (folder, label, files) = if path.is_file() {
            let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
            (folder, path.to_path_buf(), vec![path.to_path_buf()])
        } else {
            let index = path.join("model.safetensors.index.json");
            let names = NAMES.iter().map(|name| path.join(name));
            let single = names.into_iter().find(|file| file.is_file()).unwrap_or_else(|| path.join(NAMES[0]));
            if index.is_file() {
                (path.to_path_buf(), index.clone(), shards(&index)?)
            } else {
                (path.to_path_buf(), single.clone(), vec![single])
            }
        };
        for file in &files {
            // A clearer message than the mapping's own.
            std::fs::File::open(file).map_err(|e| Error::read(file, e))?;
        }
        if let [file] = &files[..]
            && TorchFile::is_one(file)
        {
            let tensors = TorchFile::open(file)?;
            let names = tensors.names().cloned().collect();
            return Ok(Self { folder, label, files, tensors: Tensors::Torch(tensors), names });
        }
        // Safety: the files must not change while they are mapped, as for every reader of weights.
        let tensors = unsafe { MmapedSafetensors::multi(&files) }.map_err(|e| {
            Error::config(&label, format!("not a complete safetensors checkpoint: {}", first_line(&e)))
        })?;
        let names = tensors.tensors().into_iter().map(|(name, _)| name).collect();
        Ok(Self { folder, label, files, tensors: Tensors::Safetensors(tensors), names })
    }

    /// What errors name: the index file of a sharded checkpoint, or its only file.
    pub fn label(&self) -> &Path {
        &self.label
    }

    /// The folder the files lie in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The files, in the index's order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Whether it is of safetensors files, and not of PyTorch's.
    pub fn is_safetensors(&self) -> bool {
        matches!(self.tensors, Tensors::Safetensors(_))
    }

    /// Every tensor's name.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The part of the checkpoint whose names begin with `prefix`, loaded onto `device`.
    pub fn at<'a>(&'a self, prefix: &str, device: &Device) -> CheckpointAt<'a> {
        CheckpointAt { checkpoint: self, prefix: prefix.to_string(), device: device.clone() }
    }

    /// The shape of the tensor `name`, if there is one.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.tensors {
            // `get` names a wrong tensor in a single file, so look first.
            Tensors::Safetensors(tensors) if self.contains(name) => {
                tensors.get(name).ok().map(|view| view.shape().to_vec())
            }
            Tensors::Safetensors(_) => None,
            Tensors::Torch(file) => file.shape(name).map(<[usize]>::to_vec),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    fn get(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let missing = || Error::MissingWeight { file: self.label.clone(), name: name.to_string() };
        if let Some(found) = self.shape(name).filter(|found| found != shape) {
            return Err(Error::WeightShape {
                file: self.label.clone(),
                name: name.to_string(),
                expected: shape.to_vec(),
                found,
            });
        }
        let tensors = match &self.tensors {
            Tensors::Torch(file) => return file.get(name, device)?.ok_or_else(missing),
            Tensors::Safetensors(tensors) if self.contains(name) => tensors,
            Tensors::Safetensors(_) => return Err(missing()),
        };
        let view = tensors.get(name).map_err(|_| missing())?;
        // Integers and 8-bit floats are quantised weights, which mean nothing without their scales.
        if !matches!(view.dtype(), Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            let dtype = view.dtype();
            return Err(Error::config(
                &self.label,
                format!("weight `{name}` is {dtype:?}, expected F32, F16 or BF16"),
            ));
        }
        Ok(candle_core::safetensors::Load::load(&view, device)?)
    }
}

/// A [`Checkpoint`] below a prefix.
pub struct CheckpointAt<'a> {
    checkpoint: &'a Checkpoint,
    prefix: String,
    device: Device,
}

impl CheckpointAt<'_> {
    /// The shape of the tensor `name`, if there is one.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.shape(&format!("{}{name}", self.prefix))
    }
}

impl Weights for CheckpointAt<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.checkpoint.get(&format!("{}{name}", self.prefix), shape, &self.device)
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(&format!("{}{name}", self.prefix))
    }
}

/// The files an index names, each once, in order of first mention.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(|e| Error::read(index, e))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::config(index, e.to_string()))?;
    let mut names: Vec<&String> = parsed.weight_map.values().collect();
    names.sort();
    names.dedup();
    let folder = index.parent().unwrap_or(Path::new("."));
    names
        .into_iter()
        .map(|name| {
            // An index is outside data: it may name files beside itself and nothing else.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(Error::config(index, format!("names a file outside its folder: `{name}`")));
            }
            Ok(folder.join(name))
        })
        .collect()
}

fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
