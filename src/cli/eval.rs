//! `radapt eval`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use radapt::attack::{Eps, ThreatChoice};
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::eval::classify::summarise;
use radapt::eval::run::{Manifest, merge};
use radapt::eval::{coco, features, questions, retrieve, suspicion, vattack};
use serde_json::to_value;

use super::classify::{RunFlags, What};
use super::options::{DefenseFlags, argument};
use super::row_table::{question_table, row_table};
use super::{Global, print};

/// Measure how robust a model is
#[derive(Args)]
pub struct Eval {
    #[command(subcommand)]
    command: EvalCommand,
}

#[derive(Subcommand)]
enum EvalCommand {
    /// Zero-shot classification, clean and attacked, undefended and defended
    Classify(Box<ClassifyCommand>),
    /// Figures along the defence's parameters: alpha, beta, cutoff, training pictures and epochs
    Sweep(Box<super::eval_sweep::SweepCommand>),
    #[cfg(feature = "engine")]
    Coco(Box<super::eval_coco::CocoCommand>),
    #[cfg(feature = "engine")]
    Vqa(Box<super::eval_vqa::VqaCommand>),
    Retrieve(Box<super::eval_retrieve::RetrieveCommand>),
    Suspicion(Box<super::eval_suspicion::SuspicionCommand>),
    Judge(super::eval_judge::Judge),
    /// Put the shards of a run together
    Merge(Merge),
    /// Make a report of runs: Markdown, CSV or a page with plots
    Report(super::eval_report::Report),
}

impl Eval {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        match self.command {
            EvalCommand::Classify(command) => command.run(global),
            EvalCommand::Sweep(command) => command.run(global),
            #[cfg(feature = "engine")]
            EvalCommand::Coco(command) => command.run(global),
            #[cfg(feature = "engine")]
            EvalCommand::Vqa(command) => command.run(global),
            EvalCommand::Retrieve(command) => command.run(global),
            EvalCommand::Suspicion(command) => command.run(global),
            EvalCommand::Judge(command) => command.run(global),
            EvalCommand::Merge(command) => command.run(global),
            EvalCommand::Report(command) => command.run(global),
        }
    }
}

#[derive(Args)]
pub struct ClassifyCommand {
    /// Attacks, as `radapt attack --help` lists them; none for clean figures alone
    #[arg(long, value_name = "ATTACK,...", value_delimiter = ',')]
    attack: Vec<String>,
    /// Radii of the attacks
    #[arg(long, value_name = "EPS,...", value_delimiter = ',', default_value = "4/255")]
    eps: Vec<Eps>,
    /// transfer (crafted on the undefended model), adaptive (on the model scored) or both
    #[arg(long, value_name = "THREAT", default_value = "both", value_parser = parse_threat)]
    threat: ThreatChoice,
    /// Score every part of the defence: none, gif, fra, gif+fra
    #[arg(long)]
    ablate: bool,
    /// Leave the undefended model out
    #[arg(long, conflicts_with = "ablate")]
    defended_only: bool,
    /// Anchors to score beside it, each with what it recommends and under its file's name, or gif:BINS
    /// for the filter alone; transfer pictures are crafted once for all of them
    #[arg(long, value_name = "ANCHOR,...", value_delimiter = ',')]
    also: Vec<String>,
    /// Write the adversarial pictures as PNG into the run's folder
    #[arg(long)]
    save_pictures: bool,
    #[command(flatten)]
    flags: RunFlags,
}

/// A defence of `--also` with its name in figures.
fn other(text: &str, allow_mismatch: bool) -> radapt::Result<(String, DefenseOptions)> {
    let (name, anchor, cutoff) = match text.strip_prefix("gif:") {
        Some(bins) => {
            let wrong = || argument("--also", "an anchor, or gif:BINS with a number of bins", text);
            (text.to_string(), AnchorChoice::None, Some(bins.parse().map_err(|_| wrong())?))
        }
        None => {
            let path = PathBuf::from(text);
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            (stem.unwrap_or_else(|| text.to_string()), AnchorChoice::File(path), None)
        }
    };
    if matches!(name.as_str(), "none" | "gif" | "fra" | "gif+fra") {
        return Err(argument("--also", "an anchor file by another name, which figures use", text));
    }
    Ok((name, DefenseOptions { anchor, cutoff, allow_mismatch, ..DefenseOptions::default() }))
}

/// The undefended model unless it is left out, the defence of the flags, and those of `--also`, by their
/// names where they have one.
///
/// # Errors
/// If nothing is left, or `--also` names none.
pub fn defenses(
    flags: &DefenseFlags,
    also: &[String],
    defended_only: bool,
) -> radapt::Result<Vec<(Option<String>, DefenseOptions)>> {
    let none = DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() };
    let own = flags.options();
    let mut all = Vec::new();
    if !defended_only {
        all.push((None, none.clone()));
    }
    if own != none {
        all.push((None, own.clone()));
    }
    for text in also {
        let (name, options) = other(text, own.allow_mismatch)?;
        all.push((Some(name), options));
    }
    if all.is_empty() {
        return Err(argument("--defended-only", "a defence to go with it", "none"));
    }
    Ok(all)
}

pub fn parse_threat(text: &str) -> Result<ThreatChoice, String> {
    text.parse::<ThreatChoice>().map_err(|e| e.to_string())
}

impl ClassifyCommand {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let mismatch = self.flags.defense.options().allow_mismatch;
        let what = What {
            attacks: self.attack,
            eps: self.eps,
            threats: self.threat.kinds().to_vec(),
            ablate: self.ablate,
            undefended: !self.defended_only,
            save: self.save_pictures,
            others: self.also.iter().map(|text| other(text, mismatch)).collect::<radapt::Result<_>>()?,
            flagged: true,
        };
        self.flags.run(global, &what)
    }
}

#[derive(Args)]
struct Merge {
    /// The shards' folders
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where the whole run goes
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
}

impl Merge {
    fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let first = self.runs.first().map(|run| Manifest::read(run)).transpose()?;
        let task = first.as_ref().and_then(|manifest| manifest.decides["task"].as_str());
        let (runs, out) = (&self.runs[..], self.out.as_path());
        let (json, text) = match task {
            Some("coco") => {
                let summary = coco::summarise(&merge(runs, out)?, None)?;
                (to_value(&summary)?, row_table(&summary.summary.rows))
            }
            Some("retrieve") => {
                let summary = retrieve::summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, row_table(&summary.rows))
            }
            Some("questions") => {
                let summary = questions::summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, question_table(&summary.rows))
            }
            Some("suspicion") => {
                let summary = suspicion::summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, super::eval_suspicion::table(&summary))
            }
            Some("v-attack") => {
                let summary = vattack::summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, super::attack_value::table(&summary.rows))
            }
            Some("features") => {
                let summary = features::summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, super::attack_features::table(&summary.rows))
            }
            _ => {
                let summary = summarise(&merge(runs, out)?)?;
                (to_value(&summary)?, row_table(&summary.rows))
            }
        };
        print(global, json, &text)?;
        Ok(ExitCode::SUCCESS)
    }
}
