//! The hook: an embedder supplies the vision tower of a model that mistral.rs loads.
//!
//! [`crate::MultimodalLoaderBuilder::with_vision_tower`] registers a [`VisionTowerSupplier`] for
//! one load. While that loader builds its model, each multimodal model that knows the hook calls
//! [`supplied`] with its own var builder and uses the tower it gets in place of its own, so the
//! weights are held once. Nothing is process-wide: two models in one process, one defended and
//! one not, each keep the tower they were loaded with.
//!
//! The registration reaches the model's constructor through a thread-local scope, because
//! upstream's loader traits offer no parameter to carry it and a load runs on one thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use mistralrs_quant::safetensors::MmapedSafetensors;
use mistralrs_quant::{ShardedSafeTensors, ShardedVarBuilder};

use crate::vision_models::clip::ClipVisionTransformer;

/// What a model says of the tower it is about to need.
pub struct TowerRequest<'a> {
    /// The asking model: `llava`, `llava_next`, `qwen2_vl`, `qwen2_5_vl`, `qwen3_vl` or
    /// `qwen3_vl_moe`.
    pub family: &'static str,
    /// The text of the model's `config.json`.
    pub config: &'a str,
    /// The model's weights at the tower's root, on the device and in the dtype of the tower.
    pub weights: &'a ShardedVarBuilder,
}

/// What a tower makes of its pictures.
pub struct Encoded {
    /// The image tokens the projector takes, `(pictures, tokens, hidden)`, or for Qwen-VL those
    /// the language model takes, `(tokens, hidden)`.
    pub embeddings: Tensor,
    /// Features for the early blocks of the language model (Qwen3-VL's DeepStack), else empty.
    pub deepstack: Vec<Tensor>,
}

/// A vision tower built outside this crate.
pub trait SuppliedTower: Send + Sync {
    /// Encodes pictures as the model's input processor prepared them, always in f32:
    /// `(pictures, 3, height, width)` for LLaVA, the patches of all pictures one after the other
    /// for Qwen-VL, `(t * h * w, channels * temporal * patch * patch)` in the order transformers
    /// has them in. `grid` is `(pictures, 3)` of time, height and width in patches where the model
    /// has one.
    fn encode(&self, pixels: &Tensor, grid: Option<&Tensor>) -> Result<Encoded>;

    /// Mixed into the keys of the encoder cache: another value for another output.
    fn cache_salt(&self) -> u64;

    /// The tower's tensors under the names of the model's own tower, for UQFF files.
    fn residual_tensors(&self) -> Vec<(String, Tensor)>;
}

/// Resizes a picture to exactly `(width, height)`.
pub type Resize = Arc<dyn Fn(&image::DynamicImage, u32, u32) -> image::DynamicImage + Send + Sync>;

/// Builds towers for the loads it is registered with.
pub trait VisionTowerSupplier: Send + Sync {
    /// The tower for this request, or `None` to let the model use its own.
    fn supply(&self, request: &TowerRequest<'_>) -> Result<Option<Arc<dyn SuppliedTower>>>;

    /// How pictures are resized to `(width, height)` where the model's input processor cuts them
    /// into tiles itself (LLaVA-NeXT). `None` leaves it to mistral.rs.
    fn resize(&self) -> Option<Resize> {
        None
    }

    /// The name under which mistral.rs looks for the tensor that the checkpoint calls `stored`.
    /// `None` where the checkpoint already has the expected names.
    fn rename(&self) -> Option<Arc<dyn Fn(&str) -> String + Send + Sync>> {
        None
    }
}

/// A model's tower: the embedder's or upstream's, never both.
pub(crate) enum VisionTower<T = ClipVisionTransformer> {
    Supplied(Arc<dyn SuppliedTower>),
    Upstream(T),
}

impl<T> VisionTower<T> {
    /// The embedder's tower if one is registered, else what `upstream` builds.
    pub(crate) fn new(
        family: &'static str,
        weights: &ShardedVarBuilder,
        upstream: impl FnOnce() -> Result<T>,
    ) -> Result<Self> {
        Ok(match supplied(family, weights)? {
            Some(tower) => Self::Supplied(tower),
            None => Self::Upstream(upstream()?),
        })
    }

    /// What keys of the encoder cache are mixed with.
    pub(crate) fn cache_salt(&self) -> u64 {
        match self {
            Self::Supplied(tower) => tower.cache_salt(),
            Self::Upstream(_) => 0,
        }
    }
}

struct Registration {
    supplier: Arc<dyn VisionTowerSupplier>,
    config: String,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Registration>>> = const { RefCell::new(None) };
}

/// Restores the registration that was in force before [`scope`].
pub(crate) struct Scope(Option<Arc<Registration>>);

impl Drop for Scope {
    fn drop(&mut self) {
        CURRENT.with(|current| *current.borrow_mut() = self.0.take());
    }
}

/// Puts `supplier` in force on this thread until the guard drops. `None` clears it, so that a
/// load without a supplier inside one with a supplier gets upstream's tower.
pub(crate) fn scope(supplier: Option<Arc<dyn VisionTowerSupplier>>, config: &str) -> Scope {
    let next = supplier.map(|supplier| Arc::new(Registration { supplier, config: config.to_string() }));
    Scope(CURRENT.with(|current| std::mem::replace(&mut *current.borrow_mut(), next)))
}

fn current() -> Option<Arc<Registration>> {
    CURRENT.with(|current| current.borrow().clone())
}

/// The embedder's tower for the model under construction, if one is registered.
pub(crate) fn supplied(
    family: &'static str,
    weights: &ShardedVarBuilder,
) -> Result<Option<Arc<dyn SuppliedTower>>> {
    let Some(registration) = current() else {
        return Ok(None);
    };
    registration.supplier.supply(&TowerRequest { family, config: &registration.config, weights })
}

/// The embedder's resizing for the model under construction, if one is registered.
pub(crate) fn resize() -> Option<Resize> {
    current().and_then(|registration| registration.supplier.resize())
}

/// Memory-mapped weights under the names the supplier gives them.
struct Renamed {
    tensors: MmapedSafetensors,
    stored: HashMap<String, String>,
}

impl Renamed {
    fn stored(&self, name: &str) -> Result<&str> {
        self.stored
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() }.bt())
    }
}

impl SimpleBackend for Renamed {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        SimpleBackend::get(&self.tensors, shape, self.stored(name)?, init, dtype, device)
    }
    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.tensors.get_unchecked(self.stored(name)?, dtype, device)
    }
    fn contains_tensor(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }
}

/// A var builder over `paths` with the supplier's renaming, where one is asked for.
pub(crate) fn renamed(
    paths: &[PathBuf],
    dtype: Option<DType>,
    device: &Device,
) -> Result<Option<ShardedVarBuilder>> {
    let Some(rename) = current().and_then(|registration| registration.supplier.rename()) else {
        return Ok(None);
    };
    // Safety: as upstream's own mapping of these files: they must not change while mapped.
    let tensors = unsafe { MmapedSafetensors::multi(paths)? };
    let stored = tensors.tensors().into_iter().map(|(name, _)| (rename(&name), name)).collect();
    let backend = Box::new(Renamed { tensors, stored });
    Ok(Some(ShardedSafeTensors::wrap(backend, dtype.unwrap_or(DType::F16), device.clone())))
}
