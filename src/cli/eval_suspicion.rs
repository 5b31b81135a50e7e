//! `radapt eval suspicion`

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use radapt::attack::{FeatureTower, Subject};
use radapt::eval::coco::CraftedSet;
use radapt::eval::run::{Manifest, Run, lines};
use radapt::eval::suspicion::{Calibration, Detector, SuspicionLine, SuspicionRun, SuspicionSummary};
use radapt::model::Model;
use radapt::tower::VisionTower;
use serde_json::{json, to_value};

use super::anchor_train::feature;
use super::options::{DataFlags, DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, print};

/// How well adversarial pictures are told from clean ones by how far the defended and the undefended
/// tower disagree: the ROC of what `radapt serve` calls suspicious
///
/// Half of the clean pictures set the thresholds, the figures are about the other half. Adversarial
/// pictures come from runs of `radapt attack` over the same data.
#[derive(Args)]
pub struct SuspicionCommand {
    #[command(flatten)]
    data: DataFlags,
    /// Runs of `radapt attack` over the same pictures
    #[arg(long, value_name = "RUN,...", value_delimiter = ',')]
    crafted: Vec<PathBuf>,
    /// Write the clean pictures' scores there, all of them, for `radapt serve --calibration`
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    /// The run's folder
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Go on with the run in --out, if there is one
    #[arg(long)]
    resume: bool,
    /// Work on shard I of N alone, to be put together with `radapt eval merge`
    #[arg(long, value_name = "I/N", value_parser = super::classify::parse_shard)]
    shard: Option<(usize, usize)>,
    /// Pictures worked on together: what a kill loses
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    #[command(flatten)]
    limits: PictureLimits,
}

impl SuspicionCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.calibration.is_some() && self.shard.is_some() {
            let expected = "none of a shard: all clean pictures are in it";
            return Err(argument("--calibration", expected, "one").into());
        }
        let crafted = self.crafted.iter().map(|run| CraftedSet::read(run));
        let crafted: Vec<CraftedSet> =
            crafted.collect::<radapt::Result<Vec<_>>>()?.into_iter().flatten().collect();
        let spinner = global.spinner("loading the model");
        let model = self.model.find()?;
        let (detector, subject, side) = self.detector(&model)?;
        spinner.finish_and_clear();
        for set in &crafted {
            if set.threat(&subject).is_none() {
                let expected = format!("pictures crafted on the undefended model or on {subject}");
                return Err(argument("--crafted", &expected, &set.folder.display().to_string()).into());
            }
        }
        let set = self.data.open(global.seed, side.clamp(96, 224), self.model.offline)?;
        if self.calibration.is_some() && set.items().len() < Calibration::LEAST {
            let expected = format!("at least {} pictures to calibrate on", Calibration::LEAST);
            return Err(argument("--n", &expected, &set.items().len().to_string()).into());
        }
        let suspicion = SuspicionRun {
            set: &set,
            limits: self.limits.limits(),
            detector,
            subject: subject.clone(),
            crafted,
            seed: global.seed,
            batch: self.batch as usize,
        };
        let decides = suspicion.decides(json!({
            "model": { "name": model.name, "revision": model.revision, "digest": model.digest()? },
            "contract": self.model.contract.map(|contract| contract.to_string()),
            "dtype": self.model.dtype().map(|dtype| dtype.as_str()),
            "device": self.model.device.split(':').next(),
        }));
        let manifest = Manifest::new(decides, self.shard, suspicion.items(self.shard));
        let mut run = Run::open(&self.out, manifest, self.resume)?;
        let bar = global.bar("scoring", 0);
        let summary = suspicion.run(&mut run, &mut |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if let Some(file) = &self.calibration {
            let all = lines::<SuspicionLine>(&self.out)?.collect::<radapt::Result<Vec<_>>>()?;
            let scores = all.iter().filter(|line| line.error.is_none()).map(|line| line.clean).collect();
            Calibration::new(subject, set.name(), scores)?.write(file)?;
        }
        if summary.failed > 0 {
            global.say(format_args!(
                "warning: {} of {} pictures have no score; see {}",
                summary.failed,
                summary.items,
                self.out.join("items.jsonl").display()
            ));
        }
        print(global, to_value(&summary)?, &table(&summary))?;
        Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// The towers, who is defended, and the side of its pictures.
    fn detector(&self, model: &Model) -> anyhow::Result<(Detector, Subject, u32)> {
        let device = self.model.device()?;
        let preprocess = model.preprocess(self.model.contract)?;
        let options = self.defense.options();
        let (tower, subject, side) = if model.kind.is_qwen() {
            let tower = model.qwen(&preprocess, self.model.dtype(), &device)?;
            let defense = options.for_grids(&tower, || model.fingerprint())?;
            let subject = Subject::new(&model.name, &defense.middling()?)?;
            (FeatureTower::Qwen(tower.with_grids(Some(Arc::new(defense)))), subject, 224)
        } else {
            let tower = model.tower(&preprocess, self.model.dtype(), &device)?;
            let defense = options.build(&tower, || model.fingerprint())?;
            let side = tower.spec().image_size as u32;
            let feature = feature(model, tower.spec())?;
            (
                FeatureTower::Clip(Box::new(tower.with(defense.inserts())), feature),
                Subject::new(&model.name, &defense)?,
                side,
            )
        };
        if subject.is_undefended() {
            return Err(
                argument("--anchor", "a defence: without one there is nothing to disagree", "none").into()
            );
        }
        Ok((Detector::new(tower, preprocess), subject, side))
    }
}

pub fn table(summary: &SuspicionSummary) -> String {
    let [low, middle, high] = summary.clean;
    let mut text = vec![format!(
        "clean pictures score {middle:.4} in the median, {low:.4} to {high:.4} from 5 to 95 % of them"
    )];
    if !summary.rows.is_empty() {
        text.push(format!(
            "{:8} {:7} {:9} {:>5} {:>22}  caught where 1, 5, 10 % of clean pictures were to be (are)",
            "attack", "eps", "threat", "n", "AUC"
        ));
    }
    text.extend(summary.rows.iter().map(|row| {
        let (low, high) = row.auc_interval;
        let point = |p: &radapt::eval::suspicion::Point| match p.threshold {
            Some(_) => format!("{:.1} % ({:.1})", p.caught, p.clean),
            None => "too few".to_string(),
        };
        format!(
            "{:8} {:7} {:9} {:>5} {:>22}  {}",
            row.attacked.attack,
            row.attacked.eps.to_string(),
            row.attacked.threat.to_string(),
            row.n,
            format!("{:.1} % ({low:.1} to {high:.1})", row.auc),
            row.at.iter().map(point).collect::<Vec<_>>().join(", ")
        )
    }));
    text.join("\n")
}
