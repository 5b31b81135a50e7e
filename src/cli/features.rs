//! `radapt features`

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Device, Tensor};
use clap::Args;
use radapt::Error;
use radapt::image::decode_file;
use radapt::tower::{VisionTower, Want};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::options::{DefenseFlags, ModelOptions, PictureLimits};
use super::{Global, SCHEMA_VERSION, print};

/// What the file holds, for `--help`.
const FILE: &str = "The file holds, in f32: `pixels` (B, 3, H, W) in [0, 1] as they were prepared, before \
    the filter; `block.K` (B, N, D), the hidden state after block K, 0 being the input of block 1; `pooled` \
    (B, D); and `embeds` (B, P) where the model has a projection. Its metadata has one key, \
    `radapt.features`, a JSON object that says how they came about.";

#[derive(Args)]
#[command(after_help = FILE)]
pub struct Features {
    /// The pictures
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// Where to write the features, a safetensors file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The blocks whose output to write, such as 0,11; every one where not given
    #[arg(long, value_name = "K,K", value_delimiter = ',')]
    blocks: Option<Vec<usize>>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    #[command(flatten)]
    limits: PictureLimits,
}

impl Features {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let model = self.model.find()?;
        let preprocess = model.preprocess(self.model.contract)?;
        let tower = model.tower(&preprocess, self.model.dtype(), &self.model.device()?)?;
        let defense = self.defense.options().build(&tower, || model.fingerprint())?;
        let tower = tower.with(defense.inserts());
        let mut want = Want::everything(tower.spec());
        if let Some(blocks) = &self.blocks {
            want.hidden.clone_from(blocks);
            want.hidden.sort_unstable();
            want.hidden.dedup();
        }
        let names: Vec<String> = want.hidden.iter().map(|block| format!("block.{block}")).collect();
        let bar = global.bar("features", self.images.len() as u64);
        let limits = self.limits.limits();
        let mut parts: Vec<(String, Vec<Tensor>)> = Vec::new();
        let mut add = |name: &str, part: &Tensor| -> radapt::Result<()> {
            let part = part.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            match parts.iter_mut().find(|(known, _)| known == name) {
                Some((_, parts)) => parts.push(part),
                None => parts.push((name.into(), vec![part])),
            }
            Ok(())
        };
        for image in &self.images {
            let picture = decode_file(image, &limits)?;
            let pixels = preprocess.pixels(&picture, tower.device())?.unsqueeze(0)?;
            // One at a time, so that a picture's features do not depend on the others.
            let features = tower.forward(&pixels, &want)?;
            add("pixels", &pixels)?;
            for (name, hidden) in names.iter().zip(&features.hidden) {
                add(name, hidden)?;
            }
            for (name, part) in [("pooled", &features.pooled), ("embeds", &features.embeds)] {
                part.as_ref().map_or(Ok(()), |part| add(name, part))?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let mut shapes = serde_json::Map::new();
        let mut tensors = Vec::new();
        for (name, parts) in parts {
            let whole = Tensor::cat(&parts, 0)?;
            shapes.insert(name.clone(), json!(whole.dims()));
            let values = whole.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
            tensors.push((name, whole.dims().to_vec(), bytes));
        }
        let mut about = json!({
            "schema_version": SCHEMA_VERSION,
            "model": model.name,
            "contract": preprocess.contract.to_string(),
            "defense": defense.summary(),
            "images": self.images.iter().map(|image| image.display().to_string()).collect::<Vec<_>>(),
            "mean": preprocess.mean,
            "std": preprocess.std,
        });
        let views = tensors
            .iter()
            .map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        // With one key alone the library has no order to choose.
        let metadata = HashMap::from([("radapt.features".to_string(), about.to_string())]);
        let bytes = safetensors::serialize(views, Some(metadata))?;
        std::fs::write(&self.out, bytes).map_err(|source| Error::Write { path: self.out.clone(), source })?;
        let out = self.out.display().to_string();
        if let Some(fields) = about.as_object_mut() {
            fields.insert("out".into(), out.clone().into());
            fields.insert("shapes".into(), shapes.into());
        }
        print(global, about, &out)?;
        Ok(ExitCode::SUCCESS)
    }
}
