//! `radapt eval sweep`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser};
use radapt::attack::{Eps, ThreatChoice};
use radapt::defense::{AnchorChoice, DefenseOptions, default_cutoff};
use radapt::eval::sweep::{Axis, Parameter, Point, Scored, Sweep};
use radapt::pocket::built_in::POCKET_CLIP;
use serde_json::{Value, json};

use super::anchor_train::{KeepFlag, Train};
use super::classify::{RunFlags, What, with_text};
use super::eval::parse_threat;
use super::options::{ModelOptions, argument};
use super::{Global, print};

/// Figures along the defence's parameters, one at a time around a base, or all combinations.
///
/// Without flags after `--` the anchor is that of --anchor, and its alpha, beta and cutoff vary.
/// With them, flags of `radapt anchor train`, every setting has an anchor trained for it:
///
///     radapt eval sweep --out S --alphas 0.4,0.8,1.2 --pictures 500,1000,2000 -- --rate 0.03
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct SweepCommand {
    /// Values of alpha; beta is max(1 - alpha, 0) with them, as in the paper, unless --betas or --beta
    /// is given
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', allow_negative_numbers = true)]
    alphas: Vec<f64>,
    /// Values of beta
    #[arg(long, value_name = "NUMBER,...", value_delimiter = ',', allow_negative_numbers = true)]
    betas: Vec<f64>,
    /// Values of GIF's cutoff D0
    #[arg(long, value_name = "BINS,...", value_delimiter = ',')]
    cutoffs: Vec<f64>,
    /// Numbers of pictures to train on
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    pictures: Vec<u64>,
    /// Numbers of epochs to train for
    #[arg(long, value_name = "N,...", value_delimiter = ',')]
    epochs: Vec<u64>,
    /// Score every combination instead of one parameter at a time
    #[arg(long)]
    grid: bool,
    /// Attacks, as `radapt attack --help` lists them
    #[arg(long, value_name = "ATTACK,...", value_delimiter = ',', default_value = "apgd-ce")]
    attack: Vec<String>,
    /// Radii of the attacks
    #[arg(long, value_name = "EPS,...", value_delimiter = ',', default_value = "4/255")]
    eps: Vec<Eps>,
    /// transfer (crafted on the undefended model), adaptive (on the model scored) or both
    #[arg(long, value_name = "THREAT", default_value = "both", value_parser = parse_threat)]
    threat: ThreatChoice,
    #[command(flatten)]
    flags: RunFlags,
    /// Flags of `radapt anchor train`; those of the model and of files are the sweep's own
    #[arg(last = true, value_name = "TRAINING")]
    training: Vec<String>,
}

/// `radapt anchor train`'s flags, read apart.
#[derive(Parser)]
#[command(name = "--", no_binary_name = true)]
struct TrainingFlags {
    #[command(flatten)]
    train: Train,
}

impl SweepCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.flags.shard.is_some() {
            return Err(argument("--shard", "no shards of a sweep", "one").into());
        }
        let out = self.flags.out.clone();
        let train = self.train()?;
        let sweep = self.sweep(train.as_ref())?;
        let points = sweep.points()?;
        let mut what = What {
            attacks: self.attack.clone(),
            eps: self.eps.clone(),
            threats: self.threat.kinds().to_vec(),
            ablate: false,
            undefended: true,
            save: false,
            others: Vec::new(),
            flagged: false,
        };
        // Before hours of training.
        self.flags.check(global, &what)?;
        std::fs::create_dir_all(&out).map_err(|e| radapt::Error::Write { path: out.clone(), source: e })?;
        let mut left_out = Vec::new();
        let mut chosen = Vec::new();
        let asked = self.flags.defense.options();
        for (i, point) in points.iter().enumerate() {
            let options = match &train {
                Some(train) => {
                    let (file, trained) = anchor(global, train, point, &out, self.flags.resume)
                        .with_context(|| {
                            format!("setting {} of {}, {}", i + 1, points.len(), point.name())
                        })?;
                    global.say(format_args!("trained {} of {}: {}", i + 1, points.len(), point.name()));
                    chosen.push(trained["epoch"].clone());
                    for failed in trained["failed"].as_array().into_iter().flatten() {
                        if !left_out.contains(failed) {
                            left_out.push(failed.clone());
                        }
                    }
                    DefenseOptions { anchor: AnchorChoice::File(file), ..DefenseOptions::default() }
                }
                None => DefenseOptions {
                    alpha: (!asked.no_fra).then_some(point.alpha),
                    beta: (!asked.no_fra).then_some(point.beta),
                    cutoff: (!asked.no_gif).then_some(point.cutoff),
                    ..asked.clone()
                },
            };
            what.others.push((point.name(), options));
        }
        let mut flags = self.flags.clone();
        flags.out = out.join("run");
        if train.is_some() {
            flags.defense.anchor = "none".into();
        }
        let summary = flags.summary(global, &what)?;
        for failed in &left_out {
            global.say(format_args!("warning: not trained on {failed}"));
        }
        if summary.failed > 0 {
            let file = flags.out.join("items.jsonl");
            let (failed, items) = (summary.failed, summary.items);
            global.say(format_args!(
                "warning: {failed} of {items} items could not be scored; see {}",
                file.display()
            ));
        }
        let failed = !left_out.is_empty() || summary.failed > 0;
        let scored = Scored { sweep, summary };
        let table = scored.markdown()?;
        let plots = scored.plots()?;
        let document = json!({
            "schema_version": 1,
            "base": scored.sweep.base,
            "axes": scored.sweep.axes,
            "grid": scored.sweep.grid,
            "points": points
                .iter()
                .enumerate()
                .map(|(i, point)| json!({ "name": point.name(), "point": point, "epoch": chosen.get(i) }))
                .collect::<Vec<_>>(),
            "run": scored.summary.run,
            "training": self.training.join(" "),
            "not_trained_on": left_out,
            "rows": scored.summary.rows,
            "flags": scored.summary.flags,
            "plots": plots.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        });
        let text = serde_json::to_string_pretty(&document)? + "\n";
        let files = [
            ("sweep.json".to_string(), text),
            ("sweep.csv".into(), scored.csv()?),
            ("sweep.md".into(), table.clone()),
        ];
        for (name, text) in files.into_iter().chain(plots) {
            let path = out.join(name);
            std::fs::write(&path, text).map_err(|e| radapt::Error::Write { path, source: e })?;
        }
        for flag in &scored.summary.flags {
            global.say(format_args!("warning: {flag}"));
        }
        print(global, document, table.trim_end())?;
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// The training of every setting, where there is one.
    fn train(&self) -> anyhow::Result<Option<Train>> {
        let asked = !self.pictures.is_empty() || !self.epochs.is_empty();
        if self.training.is_empty() && !asked {
            return Ok(None);
        }
        if self.flags.defense.anchor != "training-free" {
            let found = &self.flags.defense.anchor;
            return Err(argument("--anchor", "none where every setting is trained", found).into());
        }
        let own = [
            "--out",
            "--work",
            "--share",
            "--resume",
            "--model",
            "--revision",
            "--offline",
            "--contract",
            "--device",
            "--dtype",
            "--validate",
            "--validation-attack",
        ];
        for flag in own {
            let given = |word: &String| word == flag || word.starts_with(&format!("{flag}="));
            if self.training.iter().any(given) {
                return Err(argument("-- TRAINING", "no flag that the sweep sets itself", flag).into());
            }
        }
        let asked = self.flags.defense.options();
        for (flag, given) in [
            ("--alpha", asked.alpha.is_some()),
            ("--beta", asked.beta.is_some()),
            ("--cutoff", asked.cutoff.is_some()),
            ("--no-gif", asked.no_gif),
            ("--no-fra", asked.no_fra),
        ] {
            if given {
                let expected = "it after `--`, where every setting is trained";
                return Err(argument(flag, expected, "it before").into());
            }
        }
        let words = ["--out".to_string(), "unused".into()].into_iter().chain(self.training.iter().cloned());
        let mut train = match TrainingFlags::try_parse_from(words) {
            Ok(flags) => flags.train,
            Err(error) => {
                let text = error.render().to_string();
                let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_string();
                return Err(argument("-- TRAINING", "flags of `radapt anchor train`", &first).into());
            }
        };
        let pocket = with_text(&self.flags.model.model) == POCKET_CLIP;
        if !pocket && train.pictures.data == "pocket:train" {
            let expected = "-- --data with pictures to train on: the default is the pocket world";
            return Err(argument("-- TRAINING", expected, "none").into());
        }
        if train.pictures.data == self.flags.data.data {
            return Err(
                argument("-- --data", "other pictures than those scored", &train.pictures.data).into()
            );
        }
        train.model = self.flags.model.clone();
        train.pictures.validate = 0;
        if !self.epochs.is_empty() {
            // What so many epochs come to, not the best of them.
            train.recipe.keep = KeepFlag::Last;
        }
        Ok(Some(train))
    }

    fn sweep(&self, train: Option<&Train>) -> anyhow::Result<Sweep> {
        let options = ModelOptions { model: with_text(&self.flags.model.model), ..self.flags.model.clone() };
        let side = options.find()?.tower_config()?.image_size;
        let asked = self.flags.defense.options();
        let base = match train {
            Some(train) => Point {
                alpha: train.recipe.alpha,
                beta: train.recipe.beta,
                cutoff: train.recipe.cutoff.unwrap_or(default_cutoff(side)),
                pictures: Some(train.pictures.n),
                epochs: Some(train.recipe.epochs as u64),
            },
            None => {
                let (alpha, beta, cutoff) = match &asked.anchor {
                    AnchorChoice::None => {
                        return Err(argument("--anchor", "an anchor to vary the settings of", "none").into());
                    }
                    AnchorChoice::TrainingFree => {
                        let (alpha, beta) = radapt::defense::TRAINING_FREE_MIX;
                        (alpha, beta, default_cutoff(side))
                    }
                    AnchorChoice::File(path) => {
                        let meta = radapt::defense::Anchor::find(path)?.meta;
                        (meta.alpha, meta.beta, meta.cutoff)
                    }
                };
                Point {
                    alpha: asked.alpha.unwrap_or(alpha),
                    beta: asked.beta.unwrap_or(beta),
                    cutoff: asked.cutoff.unwrap_or(cutoff),
                    pictures: None,
                    epochs: None,
                }
            }
        };
        let counts = |values: &[u64]| values.iter().map(|&n| n as f64).collect::<Vec<f64>>();
        let axes = [
            (Parameter::Alpha, self.alphas.clone()),
            (Parameter::Beta, self.betas.clone()),
            (Parameter::Cutoff, self.cutoffs.clone()),
            (Parameter::Pictures, counts(&self.pictures)),
            (Parameter::Epochs, counts(&self.epochs)),
        ];
        let axes = axes.into_iter().filter(|(_, values)| !values.is_empty());
        let beta = |word: &String| word == "--beta" || word.starts_with("--beta=");
        let fixed = asked.beta.is_some() || self.training.iter().any(beta);
        Ok(Sweep {
            base,
            follow: !fixed && self.betas.is_empty(),
            axes: axes.map(|(parameter, values)| Axis { parameter, values }).collect(),
            grid: self.grid,
        })
    }
}

/// The anchor of a setting, trained unless it is there already.
fn anchor(
    global: &Global,
    train: &Train,
    point: &Point,
    out: &Path,
    resume: bool,
) -> anyhow::Result<(PathBuf, Value)> {
    let mut train = train.clone();
    train.recipe.alpha = point.alpha;
    train.recipe.beta = point.beta;
    train.recipe.cutoff = Some(point.cutoff);
    train.pictures.n = point.pictures.unwrap_or(train.pictures.n);
    train.recipe.epochs = point.epochs.map_or(train.recipe.epochs, |n| n as usize);
    let name = point.name().replace(", ", "_").replace(' ', "-");
    train.out = out.join("anchors").join(format!("{name}.safetensors"));
    std::fs::create_dir_all(out.join("anchors"))?;
    // What is crafted depends on the pictures alone.
    train.share = Some(out.join(format!("pictures-{}", train.pictures.n)));
    train.resume = resume;
    let quiet = Global { quiet: !global.moves(), ..global.clone() };
    let (trained, _) = train.train(&quiet)?;
    Ok((train.out, trained))
}
