//! `radapt pocket train`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use radapt::pocket::training::{clip, llava};
use serde_json::json;

use super::{Global, print};

/// Train a pocket model, or go on with it: the same command on the same folder continues where it
/// stopped.
#[derive(Args)]
pub struct Train {
    /// Which model
    model: Which,
    /// The folder of the run: its state, its losses and, at the end, the model
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The trained CLIP's model folder, which a LLaVA takes its tower from
    #[arg(long, value_name = "DIR", required_if_eq("model", "llava"))]
    clip: Option<PathBuf>,
    /// Another number of steps than the shipped model's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Stop after this step; the rest can be done later
    #[arg(long, value_name = "STEP")]
    until: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    Clip,
    Llava,
}

/// How often the held-out accuracy is measured, and on how many pictures.
const VALIDATE_EVERY: u64 = 500;
const VALIDATE_ON: u64 = 520;

impl Train {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let mut plan = match self.model {
            Which::Clip => clip::PLAN,
            Which::Llava => llava::PLAN,
        };
        plan.seed = global.seed;
        if let Some(steps) = self.steps {
            (plan.steps, plan.until) = (steps, None);
        }
        plan.until = self.until.or(plan.until);
        let bar = global.bar("training", plan.until.unwrap_or(plan.steps).min(plan.steps));
        let mut last = None;
        let tower = self.clip.as_deref().unwrap_or(Path::new(""));
        let out = self.out.as_path();
        let mut told = |step: &radapt::pocket::training::Step| {
            bar.set_position(step.step);
            bar.set_message(format!("loss {:.3}, right {:.1} %", step.loss, step.accuracy));
            // The state on disk is that of the last whole hundred.
            if step.step % VALIDATE_EVERY == 1 && step.step > 1 {
                let measured = match self.model {
                    Which::Clip => clip::validate(out, &plan, VALIDATE_ON),
                    Which::Llava => llava::validate(out, tower, &plan, VALIDATE_ON),
                };
                match measured {
                    Ok(value) => bar.suspend(|| {
                        global.say(format_args!(
                            "step {}: {value:.1} % of {VALIDATE_ON} held-out pictures",
                            step.step - 1
                        ));
                    }),
                    Err(error) => bar.suspend(|| global.say(format_args!("not measured: {error}"))),
                }
            }
            last = Some(step.clone());
        };
        match self.model {
            Which::Clip => clip::train(&plan, out, &mut told)?,
            Which::Llava => llava::train(&plan, tower, out, &mut told)?,
        }
        bar.finish_and_clear();
        let model = out.join("model").display().to_string();
        print(global, json!({"model": model, "plan": plan, "last": last}), &model)?;
        Ok(ExitCode::SUCCESS)
    }
}
