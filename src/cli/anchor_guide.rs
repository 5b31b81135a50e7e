//! `radapt anchor guide` and `radapt anchor presets`

use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{Device, Tensor};
use clap::Args;
use radapt::defense::acquire::model_guided;
use radapt::defense::guide::Guide as Robust;
use radapt::defense::{self, AnchorMeta, Method, presets};
use radapt::model::Lookup;
use serde_json::json;

use super::options::ModelOptions;
use super::{Global, print};

#[derive(Args)]
pub struct Guide {
    /// The robust model: a file (.pt, .pth, .pth.tar, .bin or .safetensors; nothing in it is
    /// executed), a folder, or a Hub id such as chs20/fare4-clip
    #[arg(long, value_name = "ROBUST")]
    from: String,
    /// The robust model's branch, tag or commit on the Hub
    #[arg(long, value_name = "REVISION")]
    from_revision: Option<String>,
    #[command(flatten)]
    model: ModelOptions,
    /// Where to write the anchor
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    settings: Settings,
}

/// What an anchor's file recommends to use it with.
#[derive(Args)]
pub struct Settings {
    /// Settings of the paper to recommend in the file (radapt anchor presets lists them): by default
    /// clip for a model's own anchor, fare for a guided one
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// The anchor's factor to recommend in the file, instead of the preset's
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// The attention output's factor to recommend in the file, instead of the preset's
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    beta: Option<f64>,
    /// Cutoff D0 to recommend in the file, instead of the preset's, of which pictures under 224 pixels
    /// get their share
    #[arg(long, value_name = "BINS")]
    cutoff: Option<f64>,
}

impl Settings {
    /// That the preset exists, before anything is read.
    pub fn check(&self) -> radapt::Result<()> {
        self.preset.as_deref().map_or(Ok(()), |name| presets::find(name).map(drop))
    }

    /// alpha, beta and cutoff, which must be usable with the anchor.
    pub fn settle(&self, default: &str, size: usize, anchor: &Tensor) -> radapt::Result<(f64, f64, f64)> {
        let preset = presets::find(self.preset.as_deref().unwrap_or(default))?;
        let alpha = self.alpha.unwrap_or(preset.alpha);
        let beta = self.beta.unwrap_or(preset.beta);
        let cutoff = self.cutoff.unwrap_or_else(|| preset.cutoff_at(size));
        defense::Gif::new(1, 1, cutoff, &Device::Cpu)?;
        defense::Fra::new(anchor, alpha, beta, &Device::Cpu)?;
        Ok((alpha, beta, cutoff))
    }
}

impl Guide {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        self.settings.check()?;
        let model = self.model.find()?;
        let preprocess = model.preprocess(self.model.contract)?;
        let spec = model.tower_config()?.spec();
        let spinner = global.spinner("reading the models");
        let lookup = Lookup { revision: self.from_revision.clone(), offline: self.model.offline };
        let robust = Robust::find(&self.from, &lookup, &spec, &preprocess, &self.model.device()?)?;
        let (values, interpolated_from) = model_guided(&robust.stem, &spec)?;
        let (alpha, beta, cutoff) = self.settings.settle("fare", spec.image_size, &values)?;
        spinner.finish_and_clear();
        let anchor = defense::Anchor {
            values,
            meta: AnchorMeta {
                guide_model: robust.name,
                interpolated_from,
                ..super::anchor::meta(
                    &model,
                    &spec,
                    preprocess.contract,
                    Method::ModelGuided,
                    (alpha, beta, cutoff),
                )?
            },
        };
        super::anchor::save(global, &anchor, &self.out)
    }
}

/// Prints the presets.
pub fn list(global: &Global) -> anyhow::Result<ExitCode> {
    let all = presets::all()?;
    let mut lines =
        vec![format!("{:6} {:14} {:>5} {:>5} {:>6}  note", "name", "method", "alpha", "beta", "cutoff")];
    lines.extend(all.iter().map(|preset| {
        format!(
            "{:6} {:14} {:>5} {:>5} {:>6}  {}",
            preset.name,
            preset.method.to_string(),
            preset.alpha,
            preset.beta,
            preset.cutoff,
            preset.note
        )
    }));
    print(global, json!({ "presets": all }), &lines.join("\n"))?;
    Ok(ExitCode::SUCCESS)
}
