//! Our tower where mistral.rs would build its own.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};
use mistralrs_core::vision_tower::{Encoded, Resize, SuppliedTower, TowerRequest, VisionTowerSupplier};
use mistralrs_quant::ShardedVarBuilder;

use super::weights::upstream_name;
use crate::defense::{Defense, DefenseOptions};
use crate::image::{Filter, Preprocess, resize};
use crate::model::Model;
use crate::tower::clip::{Clip, ClipConfig, without_class_token};
use crate::tower::weights::{Checkpoint, Weights};
use crate::tower::{VisionTower, Want};
use crate::{Error, Result};

/// Builds the defended tower of one model.
pub struct Supplier {
    model: Model,
    config: ClipConfig,
    mean: [f32; 3],
    std: [f32; 3],
    filter: Filter,
    options: DefenseOptions,
    block: usize,
    class_token: bool,
    /// Whether the checkpoint's tensors go by other names than mistral.rs looks for.
    renamed: bool,
    outcome: Mutex<Option<Result<Defense>>>,
}

impl Supplier {
    pub fn new(
        model: &Model,
        preprocess: &Preprocess,
        checkpoint: &Checkpoint,
        options: DefenseOptions,
    ) -> Result<Self> {
        let (block, class_token) = model.features()?;
        Ok(Self {
            config: model.tower_config()?,
            mean: preprocess.mean,
            std: preprocess.std,
            filter: preprocess.filter,
            options,
            block,
            class_token,
            renamed: checkpoint.names().iter().any(|name| upstream_name(name) != *name),
            outcome: Mutex::new(None),
            model: model.clone(),
        })
    }

    fn take(&self) -> Option<Result<Defense>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Why the tower could not be built, if it was tried.
    pub fn take_error(&self) -> Option<Error> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome.take() {
            Some(Err(error)) => Some(error),
            other => {
                *outcome = other;
                None
            }
        }
    }

    /// The defence that went into the tower, if it was built.
    pub fn take_defense(&self) -> Option<Defense> {
        self.take().and_then(Result::ok)
    }

    fn build(&self, request: &TowerRequest<'_>) -> Result<(Defended, Defense)> {
        let weights = Engine { weights: request.weights, file: self.model.folder.clone() };
        let tower = Clip::new(&self.config, &weights, None, self.mean, self.std)?;
        let defense = self.options.build(&tower, || self.model.fingerprint())?;
        let tower = tower.with(defense.inserts());
        let cache_salt = salt(&defense)?;
        Ok((Defended { tower, block: self.block, class_token: self.class_token, cache_salt }, defense))
    }
}

impl VisionTowerSupplier for Supplier {
    fn supply(&self, request: &TowerRequest<'_>) -> candle_core::Result<Option<Arc<dyn SuppliedTower>>> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match self.build(request) {
            Ok((tower, defense)) => {
                *outcome = Some(Ok(defense));
                Ok(Some(Arc::new(tower)))
            }
            Err(error) => {
                let text = error.to_string();
                *outcome = Some(Err(error));
                Err(candle_core::Error::Msg(text))
            }
        }
    }

    fn resize(&self) -> Option<Resize> {
        let filter = self.filter;
        Some(Arc::new(move |image, width, height| resize(&image.to_rgb8(), width, height, filter).into()))
    }

    fn rename(&self) -> Option<Arc<dyn Fn(&str) -> String + Send + Sync>> {
        self.renamed.then(|| Arc::new(|name: &str| upstream_name(name)) as _)
    }
}

/// The engine's weights as ours.
struct Engine<'a> {
    weights: &'a ShardedVarBuilder,
    file: std::path::PathBuf,
}

impl Weights for Engine<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if !self.contains(name) {
            let name = format!("{}.{name}", self.weights.prefix());
            return Err(Error::MissingWeight { file: self.file.clone(), name });
        }
        self.weights.get(shape.to_vec(), name).map_err(|error| match error {
            candle_core::Error::UnexpectedShape { got, .. } => Error::WeightShape {
                file: self.file.clone(),
                name: format!("{}.{name}", self.weights.prefix()),
                expected: shape.to_vec(),
                found: got.dims().to_vec(),
            },
            other => Error::Tensor(other),
        })
    }

    fn contains(&self, name: &str) -> bool {
        self.weights.contains_tensor(name)
    }
}

struct Defended {
    tower: Clip,
    block: usize,
    class_token: bool,
    cache_salt: u64,
}

impl SuppliedTower for Defended {
    /// `pixels` are grey levels, 0 to 255: what the engine's input processor passes on when told
    /// to neither rescale nor normalise.
    fn encode(&self, pixels: &Tensor, _grid: Option<&Tensor>) -> candle_core::Result<Encoded> {
        let encode = || -> Result<Tensor> {
            // The same division as in `Preprocess::pixels`, for the same bits.
            let levels = Tensor::new(255f32, pixels.device())?;
            let pixels =
                pixels.to_device(self.tower.device())?.to_dtype(DType::F32)?.broadcast_div(&levels)?;
            let features = self.tower.forward(&pixels, &Want::hidden(self.block))?;
            let hidden =
                features.hidden.into_iter().next().ok_or_else(|| Error::Engine("no features".into()))?;
            let hidden = if self.class_token { hidden } else { without_class_token(&hidden)? };
            Ok(hidden.to_dtype(self.tower.dtype())?.contiguous()?)
        };
        let embeddings = encode().map_err(|error| match error {
            Error::Tensor(error) => error,
            other => candle_core::Error::Msg(other.to_string()),
        })?;
        Ok(Encoded { embeddings, deepstack: Vec::new() })
    }

    fn cache_salt(&self) -> u64 {
        self.cache_salt
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        self.tower.tensors().unwrap_or_default()
    }
}

/// A number that differs between defences with different outputs.
fn salt(defense: &Defense) -> Result<u64> {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    if let Some(gif) = &defense.gif {
        hash.update(b"gif");
        hash.update(gif.cutoff().to_le_bytes());
    }
    if let Some(fra) = &defense.fra {
        hash.update(b"fra");
        hash.update(fra.alpha().to_le_bytes());
        hash.update(fra.beta().to_le_bytes());
        for value in fra.anchor().flatten_all()?.to_vec1::<f32>()? {
            hash.update(value.to_le_bytes());
        }
    }
    let digest = hash.finalize();
    let mut first = [0u8; 8];
    first.copy_from_slice(&digest[..8]);
    Ok(u64::from_le_bytes(first))
}
