//! Robust models as they are published, for [`super::acquire::model_guided`].

use std::path::Path;

use candle_core::Device;

use crate::image::Preprocess;
use crate::model::{Lookup, Model, digest};
use crate::tower::TowerSpec;
use crate::tower::clip::ClipConfig;
use crate::tower::stem::{Stem, VisionWeights};
use crate::tower::weights::Checkpoint;
use crate::{Error, Result};

/// What a file of weights may end with. A name with such an end is never taken for a Hub id.
const ENDS: [&str; 5] = ["pt", "pth", "tar", "bin", "safetensors"];

/// An adversarially fine-tuned model.
pub struct Guide {
    /// The name as it was given, with what identifies it: `@` and the revision where it is from the
    /// Hub, ` sha256:` and the digest of its weight files.
    pub name: String,
    /// The beginning of its vision tower.
    pub stem: Stem,
}

impl Guide {
    /// Finds a robust model: a file, a folder, a built-in model or a Hub id.
    ///
    /// A file is a safetensors file or one of PyTorch's, of which nothing is executed; it holds a
    /// CLIP or its vision tower alone, in the names of transformers, OpenAI or OpenCLIP, anywhere in
    /// the nested dictionaries of a training checkpoint. So are FARE and TeCoA by Schlarmann et al.
    /// (`fare_eps_4.pt`), Mao's TeCoA (`vitb32_eps4.pth.tar`) and TGA-ZSR published. It is read as
    /// its shapes tell; what they do not tell, the number of heads and the normalisation, is
    /// `base`'s, of the model that the anchor is for, and `normal`'s. A folder or a Hub id such as
    /// `chs20/fare4-clip` ([`Model::find`]) says both itself.
    ///
    /// # Errors
    /// If it is not there, is damaged, or has no CLIP vision transformer.
    pub fn find(
        name: &str,
        lookup: &Lookup,
        base: &TowerSpec,
        normal: &Preprocess,
        device: &Device,
    ) -> Result<Self> {
        let path = Path::new(name);
        let file = path.is_file()
            || !path.exists() && path.extension().is_some_and(|end| ENDS.iter().any(|known| end == *known));
        let (checkpoint, config, normal, revision) = if file {
            std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
            (Checkpoint::open(path)?, None, normal.clone(), None)
        } else {
            let model = Model::find(name, lookup)?;
            let revision = model.commit();
            (model.checkpoint()?, Some(model.tower_config()?), model.preprocess(None)?, revision)
        };
        let weights = VisionWeights::find(&checkpoint, device)?;
        weights.check_design()?;
        let config: ClipConfig = match config {
            Some(config) => config,
            None => {
                let config = weights.config()?;
                // Of another width it will not fit anyway.
                let heads =
                    if config.hidden_size == base.hidden { base.heads } else { config.num_attention_heads };
                ClipConfig { num_attention_heads: heads, ..config }
            }
        };
        let stem = Stem::load(&config, &weights, normal.mean, normal.std)?;
        let revision = revision.map(|revision| format!("@{revision}")).unwrap_or_default();
        Ok(Self { name: format!("{name}{revision} sha256:{}", digest(checkpoint.files())?), stem })
    }
}
