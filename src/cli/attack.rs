//! `radapt attack`

use std::process::ExitCode;

use clap::Args;
use radapt::attack::{Eps, NAMES, ThreatKind};

use super::classify::{RunFlags, What, with_text};
use super::options::{ModelOptions, Size};
use super::{Global, attack_features, attack_value};

/// Craft adversarial pictures of labelled ones, as PNG files that stay in the ball
///
/// They go into a run's folder (`pictures/`), with a line for each in `items.jsonl`: the class the
/// model gives it as crafted and rounded to 8 bits. Pictures that the model gets wrong are left out.
/// v-attack makes the object in a picture be taken for another by what a CLIP's patches say of it;
/// its pictures are for language models to be asked about.
/// On a model without a text side, a LLaVA or a Qwen-VL, pgd attacks what its language model reads,
/// and the lines say how far the features moved.
#[derive(Args)]
#[command(after_help = names())]
pub struct AttackCommand {
    /// The attack
    #[arg(value_name = "ATTACK")]
    attack: String,
    /// Radii of the attack
    #[arg(long, value_name = "EPS,...", value_delimiter = ',', default_value = "4/255")]
    eps: Vec<Eps>,
    /// transfer: craft on the undefended model; adaptive: on the defended one, gradients through
    /// its defence
    #[arg(long, value_name = "THREAT", value_parser = parse_kind)]
    threat: ThreatKind,
    /// The size of the pictures, on a Qwen-VL alone: 448 (the default) or 448x336, height and width
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
    #[command(flatten)]
    values: attack_value::ValueFlags,
    #[command(flatten)]
    flags: RunFlags,
}

fn parse_kind(text: &str) -> Result<ThreatKind, String> {
    match text {
        "transfer" => Ok(ThreatKind::Transfer),
        "adaptive" => Ok(ThreatKind::Adaptive),
        other => Err(format!("expected transfer or adaptive, found `{other}`")),
    }
}

fn names() -> String {
    let lines = NAMES.iter().map(|(name, what)| format!("  {name:17} {what}"));
    let custom = [
        "  custom:A+B        AutoAttack over attacks of your choice",
        "  v-attack          V-Attack: an object is taken for another, --source for --target",
    ]
    .map(String::from);
    let lines: Vec<String> = lines.chain(custom).collect();
    format!("Attacks:\n{}", lines.join("\n"))
}

impl AttackCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.attack == attack_value::NAME {
            super::options::no_size(self.size)?;
            let asked = attack_value::Asked {
                eps: self.eps,
                threat: self.threat,
                values: &self.values,
                flags: &self.flags,
            };
            return asked.run(global);
        }
        self.values.check_none(&self.attack)?;
        let options = &self.flags.model;
        let model = ModelOptions { model: with_text(&options.model), ..options.clone() }.find()?;
        if attack_features::wanted(&model) {
            let asked = attack_features::Asked {
                attack: &self.attack,
                eps: self.eps,
                threat: self.threat,
                size: self.size,
                flags: &self.flags,
            };
            return asked.run(global, &model);
        }
        super::options::sizes(&model, self.size.as_slice())?;
        let what = What {
            attacks: vec![self.attack],
            eps: self.eps,
            threats: vec![self.threat],
            ablate: false,
            undefended: false,
            save: true,
            others: Vec::new(),
            flagged: true,
        };
        self.flags.run(global, &what)
    }
}
