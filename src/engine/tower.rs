//! Our tower where mistral.rs would build its own.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};
use mistralrs_core::vision_tower::{Encoded, Resize, SuppliedTower, TowerRequest, VisionTowerSupplier};
use mistralrs_quant::ShardedVarBuilder;

use super::weights::upstream_name;
use crate::attack::{Feature, FeatureTower, Subject};
use crate::defense::{DefenseOptions, DefenseSummary};
use crate::image::{Filter, Preprocess, resize};
use crate::model::Model;
use crate::tower::clip::{Clip, ClipConfig, without_class_token};
use crate::tower::qwen::{Qwen, QwenConfig};
use crate::tower::weights::{Checkpoint, Weights};
use crate::tower::{VisionTower, Want};
use crate::{Error, Result};

/// Builds the defended tower of one model.
pub struct Supplier {
    model: Model,
    base: Base,
    mean: [f32; 3],
    std: [f32; 3],
    filter: Filter,
    options: DefenseOptions,
    /// Whether the checkpoint's tensors go by other names than mistral.rs looks for.
    renamed: bool,
    outcome: Mutex<Option<Result<Built>>>,
}

/// The tower that was built.
pub struct Built {
    /// What to say of the defence, `None` for the undefended tower.
    pub defense: Option<DefenseSummary>,
    /// The model with this defence.
    pub subject: Subject,
    /// The tower itself, with what the language model reads of it.
    pub tower: FeatureTower,
}

/// What kind of tower it is, before anything is put into it.
enum Base {
    /// CLIP's, of which the language model reads one block.
    Clip { config: ClipConfig, block: usize, class_token: bool },
    /// Qwen-VL's, with its mergers.
    Qwen(QwenConfig),
}

impl Supplier {
    pub fn new(
        model: &Model,
        preprocess: &Preprocess,
        checkpoint: &Checkpoint,
        options: DefenseOptions,
    ) -> Result<Self> {
        let base = if model.kind.is_qwen() {
            Base::Qwen(model.qwen_config()?)
        } else {
            let (block, class_token) = model.features()?;
            Base::Clip { config: model.tower_config()?, block, class_token }
        };
        let renamed = checkpoint.names().iter().any(|name| upstream_name(model.kind, name) != *name);
        Ok(Self {
            base,
            mean: preprocess.mean,
            std: preprocess.std,
            filter: preprocess.filter,
            options,
            renamed,
            outcome: Mutex::new(None),
            model: model.clone(),
        })
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

    /// The tower, if it was built.
    pub fn take_built(&self) -> Option<Built> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take().and_then(Result::ok)
    }

    fn build(&self, request: &TowerRequest<'_>) -> Result<(Arc<dyn SuppliedTower>, Built)> {
        let weights = Engine { weights: request.weights, file: self.model.folder.clone() };
        match &self.base {
            Base::Clip { config, block, class_token } => {
                let tower = Clip::new(config, &weights, None, self.mean, self.std)?;
                let defense = self.options.build(&tower, || self.model.fingerprint())?;
                let tower = tower.with(defense.inserts());
                let subject = Subject::new(&self.model.name, &defense)?;
                let (block, class_token, cache_salt) = (*block, *class_token, salt(&subject));
                let shown = FeatureTower::Clip(Box::new(tower.clone()), Feature::Patches(block));
                let built = Built { defense: defense.summary(), subject, tower: shown };
                Ok((Arc::new(Defended { tower, block, class_token, cache_salt }), built))
            }
            Base::Qwen(config) => {
                let tower = Qwen::new(config, &weights, self.mean, self.std)?;
                let defense = self.options.for_grids(&tower, || self.model.fingerprint())?;
                let summary = defense.summary();
                let subject = Subject::new(&self.model.name, &defense.middling()?)?;
                let cache_salt = salt(&subject);
                let tower = tower.with_grids(summary.is_some().then(|| Arc::new(defense) as _));
                let built = Built { defense: summary, subject, tower: FeatureTower::Qwen(tower.clone()) };
                Ok((Arc::new(DefendedQwen { tower, cache_salt }), built))
            }
        }
    }
}

impl VisionTowerSupplier for Supplier {
    fn supply(&self, request: &TowerRequest<'_>) -> candle_core::Result<Option<Arc<dyn SuppliedTower>>> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        match self.build(request) {
            Ok((tower, built)) => {
                *outcome = Some(Ok(built));
                Ok(Some(tower))
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
        let kind = self.model.kind;
        self.renamed.then(|| Arc::new(move |name: &str| upstream_name(kind, name)) as _)
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
            let levels = Tensor::new(255f32, self.tower.device())?;
            let pixels =
                pixels.to_device(self.tower.device())?.to_dtype(DType::F32)?.broadcast_div(&levels)?;
            let features = self.tower.forward(&pixels, &Want::hidden(self.block))?;
            let hidden =
                features.hidden.into_iter().next().ok_or_else(|| Error::Engine("no features".into()))?;
            let hidden = if self.class_token { hidden } else { without_class_token(&hidden)? };
            Ok(hidden.to_dtype(self.tower.dtype())?.contiguous()?)
        };
        let embeddings = encode().map_err(candle_error)?;
        Ok(Encoded { embeddings, deepstack: Vec::new() })
    }

    fn cache_salt(&self) -> u64 {
        self.cache_salt
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        self.tower.tensors().unwrap_or_default()
    }
}

struct DefendedQwen {
    tower: Qwen,
    cache_salt: u64,
}

impl SuppliedTower for DefendedQwen {
    /// `pixels` are patches of grey levels divided by 255.
    fn encode(&self, pixels: &Tensor, grid: Option<&Tensor>) -> candle_core::Result<Encoded> {
        let encode = || -> Result<Encoded> {
            let grid = grid.ok_or_else(|| Error::Engine("a Qwen-VL without its pictures' grids".into()))?;
            let grids: Vec<[usize; 3]> = grid
                .to_vec2::<u32>()?
                .iter()
                .map(|row| match row[..] {
                    [t, h, w] => Ok([t, h, w].map(|side| side as usize)),
                    _ => Err(Error::Engine("a picture's grid is of three numbers".into())),
                })
                .collect::<Result<_>>()?;
            let merged = self.tower.encode_patches(&pixels.to_device(self.tower.device())?, &grids)?;
            Ok(Encoded { embeddings: merged.embeddings, deepstack: merged.deepstack })
        };
        encode().map_err(candle_error)
    }

    fn cache_salt(&self) -> u64 {
        self.cache_salt
    }

    fn residual_tensors(&self) -> Vec<(String, Tensor)> {
        self.tower.tensors().unwrap_or_default()
    }
}

fn candle_error(error: Error) -> candle_core::Error {
    match error {
        Error::Tensor(error) => error,
        other => candle_core::Error::Msg(other.to_string()),
    }
}

/// A number that differs between defences with different outputs.
fn salt(subject: &Subject) -> u64 {
    let digest = subject.digest.as_deref().and_then(|digest| digest.get(..16));
    digest.and_then(|first| u64::from_str_radix(first, 16).ok()).unwrap_or_default()
}
