//! `radapt anchor extract | show | check`; the other subcommands have files of their own.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use radapt::defense::acquire::training_free;
use radapt::defense::{self, AnchorMeta, Method};
use radapt::eval::Row;
use radapt::image::Contract;
use radapt::model::Model;
use radapt::tower::{Insertable, TowerSpec};
use serde_json::{Map, Value, json};

use super::anchor_train::distance_line;
use super::options::{ModelOptions, Size, sizes};
use super::row_table::row_table;
use super::{Global, print};

#[derive(Args)]
pub struct Anchor {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Take a training-free anchor from a model: its own first attention output on a white picture
    Extract(Extract),
    /// Take an anchor for a model from an adversarially fine-tuned one: its first attention output on
    /// a white picture
    Guide(super::anchor_guide::Guide),
    /// List the paper's settings, for --preset
    Presets,
    /// Train an anchor on adversarial pictures (R-Adapt+), every weight frozen
    Train(Box<super::anchor_train::Train>),
    /// Print what an anchor file says of itself
    Show {
        /// The anchor file, or a built-in anchor's name
        file: PathBuf,
    },
    /// Say whether an anchor fits a model
    Check(Check),
    /// Take an anchor to another program: the anchor and a Python file that hooks it in
    Export(super::anchor_export::Export),
}

#[derive(Args)]
struct Extract {
    #[command(flatten)]
    model: ModelOptions,
    /// Where to write the anchor
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    settings: super::anchor_guide::Settings,
    /// The size of the white picture, on a Qwen-VL alone: 448 (the default) or 448x336, height and width
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
}

#[derive(Args)]
struct Check {
    /// The anchor file, or a built-in anchor's name
    file: PathBuf,
    #[command(flatten)]
    model: ModelOptions,
    /// Accept an anchor made on another tower of the same shape
    #[arg(long)]
    allow_mismatch: bool,
}

impl Anchor {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Extract(extract) => extract.run(global),
            Command::Guide(guide) => guide.run(global),
            Command::Presets => super::anchor_guide::list(global),
            Command::Train(train) => train.run(global),
            Command::Show { file } => {
                let anchor = defense::Anchor::find(&file)?;
                print(global, Value::Object(fields(&anchor)?), &table(&anchor))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Check(check) => check.run(global),
            Command::Export(export) => export.run(global),
        }
    }
}

impl Extract {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        self.settings.check()?;
        let model = self.model.find()?;
        let preprocess = model.preprocess(self.model.contract)?;
        let sizes = sizes(&model, self.size.as_slice())?;
        let spinner = global.spinner("reading the tower");
        let (dtype, device) = (self.model.dtype(), self.model.device()?);
        let (spec, values) = match sizes.first() {
            None => of_white(&model.tower(&preprocess, dtype, &device)?)?,
            Some(size) => {
                let tower = model.qwen(&preprocess, dtype, &device)?;
                of_white(&tower.at(size.height as usize, size.width as usize)?)?
            }
        };
        let (alpha, beta, cutoff) = self.settings.settle("clip", spec.image_size, &values)?;
        spinner.finish_and_clear();
        let anchor = defense::Anchor {
            values,
            meta: meta(&model, &spec, preprocess.contract, Method::TrainingFree, (alpha, beta, cutoff))?,
        };
        save(global, &anchor, &self.out)
    }
}

/// A tower's shapes and its training-free anchor.
fn of_white(tower: &impl Insertable) -> radapt::Result<(TowerSpec, candle_core::Tensor)> {
    Ok((tower.spec().clone(), training_free(tower)?))
}

impl Check {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let anchor = defense::Anchor::find(&self.file)?;
        let model = self.model.find()?;
        // A Qwen-VL's tower takes an anchor of any grid, interpolated to each picture's.
        let spec = if model.kind.is_qwen() {
            model.qwen_config()?.spec(anchor.meta.grid)
        } else {
            model.tower_config()?.spec()
        };
        let checked = anchor.check(&spec, &model.fingerprint()?, self.allow_mismatch);
        let mut json = fields(&anchor)?;
        let reason = match &checked {
            Ok(()) => None,
            Err(error @ radapt::Error::AnchorMismatch { .. }) => Some(error.to_string()),
            Err(_) => return Err(checked.err().map_or_else(|| anyhow::anyhow!("check failed"), Into::into)),
        };
        json.insert("fits".into(), reason.is_none().into());
        json.insert("reason".into(), json!(reason));
        match checked {
            Ok(()) => {
                print(global, Value::Object(json), &format!("{} fits {}", self.file.display(), model.name))?;
                Ok(ExitCode::SUCCESS)
            }
            Err(error) if global.json => {
                print(global, Value::Object(json), "")?;
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// What every anchor says of the model it is for, and how it is to be used: alpha, beta and cutoff.
pub fn meta(
    model: &Model,
    spec: &TowerSpec,
    contract: Contract,
    method: Method,
    (alpha, beta, cutoff): (f64, f64, f64),
) -> radapt::Result<AnchorMeta> {
    Ok(AnchorMeta {
        method,
        base_model: model.name.clone(),
        base_revision: model.revision.clone(),
        fingerprint: model.fingerprint()?,
        guide_model: String::new(),
        interpolated_from: None,
        grid: spec.grid,
        class_token: spec.class_token,
        image_size: spec.image_size,
        contract,
        alpha,
        beta,
        cutoff,
        training: Default::default(),
    })
}

/// Writes an anchor and says so.
pub fn save(global: &Global, anchor: &defense::Anchor, out: &Path) -> anyhow::Result<ExitCode> {
    anchor.save(out)?;
    let mut json = fields(anchor)?;
    json.insert("file".into(), out.display().to_string().into());
    json.insert("sha256".into(), anchor.sha256()?.into());
    print(global, Value::Object(json), &out.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// Every metadata key as it stands in the file, and the tensor's shape.
pub fn fields(anchor: &defense::Anchor) -> radapt::Result<Map<String, Value>> {
    let mut fields: Map<String, Value> =
        anchor.meta.entries().into_iter().map(|(key, value)| (key, value.into())).collect();
    fields.insert("shape".into(), json!(anchor.values.dims()));
    Ok(fields)
}

/// The same for people: what is JSON in the file is lines of its own, the figures last.
fn table(anchor: &defense::Anchor) -> String {
    let mut lines = vec![format!("{:22} {:?}", "shape", anchor.values.dims())];
    let mut figures = Vec::new();
    for (key, value) in anchor.meta.entries() {
        let said = match key.strip_prefix("radapt.") {
            Some("losses") => serde_json::from_str(&value).ok().map(losses),
            Some("validation") => serde_json::from_str(&value).ok().map(validation),
            _ => None,
        };
        match said {
            Some(said) => figures.push(format!("\n{key}\n{said}")),
            None => lines.push(format!("{key:22} {value}")),
        }
    }
    lines.extend(figures);
    lines.join("\n")
}

/// A line per epoch.
fn losses(epochs: Vec<Value>) -> String {
    let loss = |value: &Value| value.as_f64().map_or("-".to_string(), |loss| format!("{loss:.4}"));
    let mut lines = vec![format!("{:>5} {:>8} {:>9}", "epoch", "training", "held out")];
    lines.extend(epochs.iter().map(|epoch| {
        format!(
            "{:>5} {:>8} {:>9}",
            epoch["epoch"].to_string(),
            loss(&epoch["train"]),
            loss(&epoch["held_out"])
        )
    }));
    lines.join("\n")
}

/// A line per figure, of robust accuracy or, for anchors trained on features, of their distances.
fn validation(rows: Vec<Value>) -> String {
    match rows.iter().cloned().map(serde_json::from_value).collect::<Result<Vec<Row>, _>>() {
        Ok(rows) => row_table(&rows),
        Err(_) => rows.iter().map(distance_line).collect::<Vec<_>>().join("\n"),
    }
}
