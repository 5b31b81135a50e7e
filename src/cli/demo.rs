//! `radapt demo`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use radapt::attack::Eps;
use radapt::demo::{Demo as Run, Stage, page, report};
use radapt::model::{Lookup, Model};
use radapt::pocket::built_in::{POCKET, POCKET_CLIP};

use super::options::DefenseFlags;
use super::{Global, print};

/// See the whole story on the built-in pocket model: pictures, attacks on them, and what the
/// undefended and the defended model say.
///
/// It draws held-out pictures, crafts adversarial ones with V-Attack under both threat models, asks
/// both models about all of them, prints a table and writes one HTML page with everything.
#[derive(Args)]
pub struct Demo {
    /// How many pictures
    #[arg(long, value_name = "N", default_value_t = 24)]
    pictures: usize,
    /// The largest change of a pixel, such as 8/255
    #[arg(long, value_name = "EPS", default_value = "16/255")]
    eps: Eps,
    /// Steps of the attack
    #[arg(long, value_name = "N", default_value_t = 50)]
    steps: usize,
    /// Where to write the page
    #[arg(long, value_name = "FILE", default_value = "radapt-demo.html")]
    out: PathBuf,
    /// A LLaVA that knows the pocket world: a folder, or the built-in one
    #[arg(long, value_name = "MODEL", default_value = POCKET)]
    model: String,
    /// Its CLIP with a text tower, which pictures are crafted on: a folder, or the built-in one
    #[arg(long, value_name = "MODEL", default_value = POCKET_CLIP)]
    surrogate: String,
    #[command(flatten)]
    defense: DefenseFlags,
}

impl Demo {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let lookup = Lookup { offline: true, ..Lookup::default() };
        let demo = Run {
            model: Model::find(&self.model, &lookup)?,
            surrogate: Model::find(&self.surrogate, &lookup)?,
            defense: self.defense.options(),
            pictures: self.pictures,
            eps: self.eps,
            steps: self.steps,
            seed: global.seed,
            command: std::iter::once("radapt".to_string())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
        };
        writable(&self.out)?;
        let bar = global.bar("", 0);
        let mut stage = "";
        let mut told = |now: Stage| {
            if now.name != stage {
                stage = now.name;
                if bar.is_hidden() {
                    global.say(format_args!("{stage} ..."));
                }
                bar.set_message(stage);
            }
            bar.set_length(now.all);
            bar.set_position(now.done);
        };
        let runtime = tokio::runtime::Runtime::new()?;
        let report = runtime.block_on(demo.run(&mut told))?;
        bar.finish_and_clear();
        std::fs::write(&self.out, page::page(&report))
            .map_err(|source| radapt::Error::Write { path: self.out.clone(), source })?;
        let mut json = serde_json::to_value(&report)?;
        json["page"] = self.out.display().to_string().into();
        let text = format!("{}\n\n{}", page::table(&report), said(&report));
        print(global, json, text.trim_end())?;
        global.say(format_args!("pictures and answers: {}", self.out.display()));
        Ok(ExitCode::SUCCESS)
    }
}

/// Refuses a file that cannot be written before all the work, not after.
fn writable(path: &Path) -> radapt::Result<()> {
    let existed = path.exists();
    let opened = std::fs::File::options().create(true).append(true).open(path);
    opened.map_err(|source| radapt::Error::Write { path: path.into(), source })?;
    if !existed {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// The first pictures with what was said of them.
fn said(report: &report::Report) -> String {
    let mut text = String::new();
    for picture in report.pictures.iter().take(3) {
        text += &format!("shown: {}\n", picture.caption);
        let versions =
            [("clean", &picture.clean), ("transfer", &picture.transfer), ("adaptive", &picture.adaptive)];
        for (name, version) in versions {
            let models =
                [("undefended", version.undefended.as_deref()), ("defended", Some(&version.defended[..]))];
            for (model, answers) in models {
                if let Some(answer) = answers.and_then(|answers| answers.first()) {
                    text += &format!("  {name:9} {model:10}  {}\n", answer.answer);
                }
            }
        }
    }
    text
}
