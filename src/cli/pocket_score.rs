//! `radapt pocket score`

use std::process::ExitCode;

use clap::Args;
use radapt::attack::Eps;
use radapt::defense::{AnchorChoice, DefenseOptions};
#[cfg(feature = "engine")]
use radapt::eval::Row;
use radapt::model::{Lookup, Model};
use radapt::pocket::Split;
#[cfg(feature = "engine")]
use radapt::pocket::built_in::POCKET;
use radapt::pocket::built_in::POCKET_CLIP;
use radapt::pocket::score::{ZeroShot, zero_shot};
use serde_json::json;

use super::row_table::row_table;
use super::{Global, print};

/// Score models on pictures of the pocket world: zero-shot accuracy, clean and under PGD with each
/// part of the defence, and with a LLaVA captions and answers.
#[derive(Args)]
pub struct Score {
    /// The CLIP: a folder or the built-in one
    #[arg(long, value_name = "MODEL", default_value = POCKET_CLIP)]
    clip: String,
    /// The LLaVA whose captions and answers are scored, clean: a folder or the built-in one
    #[cfg(feature = "engine")]
    #[arg(long, value_name = "MODEL", default_value = POCKET)]
    model: String,
    /// How many pictures, from the split's first
    #[arg(long, value_name = "N", default_value_t = 520, value_parser = clap::value_parser!(u64).range(1..))]
    n: u64,
    /// train, validation or test
    #[arg(long, value_name = "SPLIT", default_value = "test", value_parser = super::pocket::parse_split)]
    split: Split,
    /// Radii of the attack; a bare --eps for clean figures alone
    #[arg(long, value_name = "EPS,...", default_value = "8/255,16/255", value_delimiter = ',', num_args = 0..)]
    eps: Vec<Eps>,
    /// PGD's steps
    #[arg(long, value_name = "N", default_value_t = 10)]
    steps: usize,
    /// An anchor file, a built-in name or training-free
    #[arg(long, value_name = "ANCHOR", default_value = "training-free")]
    anchor: String,
    /// The anchor's factor
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// The attention output's factor
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    beta: Option<f64>,
    /// GIF's cutoff
    #[arg(long, value_name = "BINS")]
    cutoff: Option<f64>,
}

impl Score {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let anchor = match self.anchor.parse::<AnchorChoice>() {
            Ok(AnchorChoice::None) => {
                return Err(super::options::argument("--anchor", "a defence to score", "none").into());
            }
            Ok(choice) => choice,
            Err(never) => match never {},
        };
        let all = DefenseOptions {
            anchor,
            alpha: self.alpha,
            beta: self.beta,
            cutoff: self.cutoff,
            ..DefenseOptions::default()
        };
        let clip = Model::find(&self.clip, &Lookup::default())?;
        let plain = DefenseOptions { alpha: None, beta: None, ..all.clone() };
        let defenses = vec![
            ("gif".to_string(), DefenseOptions { no_fra: true, ..plain }),
            ("fra".to_string(), DefenseOptions { no_gif: true, cutoff: None, ..all.clone() }),
            ("gif+fra".to_string(), all.clone()),
        ];
        let what = ZeroShot {
            n: self.n,
            split: self.split,
            seed: global.seed,
            defenses,
            eps: self.eps.clone(),
            steps: self.steps,
        };
        // The quicker part first: what is wrong with a model shows before the long one.
        #[cfg(feature = "engine")]
        let mut rows = answered(&self, &all, global)?;
        #[cfg(not(feature = "engine"))]
        let mut rows = Vec::new();
        let bar = global.bar("zero-shot", 0);
        rows.extend(zero_shot(&clip, &what, &mut |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        })?);
        bar.finish_and_clear();
        let json = json!({
            "clip": self.clip,
            "seed": global.seed,
            "steps": self.steps,
            // As asked for; null is the anchor's own.
            "anchor": self.anchor,
            "alpha": self.alpha,
            "beta": self.beta,
            "cutoff": self.cutoff,
            "rows": rows,
        });
        print(global, json, &row_table(&rows))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Captions and answers of the LLaVA on clean pictures, undefended and defended.
#[cfg(feature = "engine")]
fn answered(score: &Score, defense: &DefenseOptions, global: &Global) -> anyhow::Result<Vec<Row>> {
    use radapt::demo::answers;
    use radapt::engine::{Engine, EngineOptions};
    use radapt::eval::judge::Verdict;
    use radapt::pocket::draw;

    let model = Model::find(&score.model, &Lookup::default())?;
    let size = model.tower_config()?.image_size as u32;
    let scenes = (0..score.n)
        .map(|index| draw(score.split, global.seed, index, size))
        .collect::<radapt::Result<Vec<_>>>()?;
    let pictures: Vec<_> = scenes.iter().map(|scene| scene.picture.clone()).collect();
    let runtime = tokio::runtime::Runtime::new()?;
    let none = DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() };
    let mut rows = Vec::new();
    for (name, defense) in [("none", none), ("gif+fra", defense.clone())] {
        let options = EngineOptions { defense, ..EngineOptions::new(candle_core::Device::Cpu) };
        let bar = global.bar("answers", 4 * score.n);
        let found = runtime.block_on(async {
            let engine = Engine::load(model.clone(), options).await?;
            answers(&engine, &scenes, &pictures, &mut |done| bar.set_position(done)).await
        })?;
        bar.finish_and_clear();
        for (task, range) in [("caption", 0..1), ("vqa", 1..4)] {
            let asked = found.iter().flat_map(|answers| &answers[range.clone()]);
            let right: Vec<bool> = asked.map(|answer| answer.verdict == Verdict::Original).collect();
            rows.push(Row {
                task: task.into(),
                dataset: format!("pocket {}", score.split.name()),
                defense: name.into(),
                attacked: None,
                n: right.len(),
                correct: right.iter().filter(|right| **right).count(),
                mean_per_class: None,
            });
        }
    }
    Ok(rows)
}
