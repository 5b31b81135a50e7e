//! `radapt eval coco`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use radapt::data::coco::Coco;
use radapt::data::coco300::ObjectSet;
use radapt::eval::coco::{CocoRun, CocoSummary, CraftedSet, Source};
use radapt::eval::prompts;
use radapt::eval::run::{Manifest, Run};
use radapt::eval::select::select;
use radapt::model::Model;
use radapt::pocket::SIDES;
use serde_json::{json, to_value};

use super::eval::defenses;
use super::eval_judge::JudgeFlags;
use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument, pocket_split};
use super::row_table::row_table;
use super::speakers::Speakers;
use super::{Global, print};

/// Captions and answers about pictures with a known object, clean and adversarial, undefended and
/// defended: how many name the object
///
/// Adversarial pictures come from runs of `radapt attack v-attack` (or `attack pgd` on a model without a
/// text side). Every response is kept in `items.jsonl`; figures follow from it alone.
#[derive(Args)]
pub struct CocoCommand {
    /// A folder with V-Attack's three coco300 files, or the built-in pocket (pocket:validation and
    /// pocket:train are its other splits)
    #[arg(long, value_name = "PATH", default_value = "pocket")]
    data: String,
    /// Where the set's pictures are, if not beside its files
    #[arg(long, value_name = "FOLDER")]
    pictures: Option<PathBuf>,
    /// The first N rows; all where not given, 300 of pocket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    n: Option<u64>,
    /// Correct what is known to be wrong of coco300: keywords among the questions, duplicates, rows whose
    /// target is the object
    #[arg(long)]
    clean: bool,
    /// Runs of `radapt attack` whose pictures to ask about
    #[arg(long, value_name = "RUN,...", value_delimiter = ',')]
    crafted: Vec<PathBuf>,
    /// Anchors to ask as well, each with what it recommends and under its file's name, or gif:BINS
    #[arg(long, value_name = "ANCHOR,...", value_delimiter = ',')]
    also: Vec<String>,
    /// Leave the undefended model out
    #[arg(long)]
    defended_only: bool,
    /// How a caption is asked for: v-attack or fare
    #[arg(long, value_name = "PRESET", default_value = prompts::PRESET)]
    caption_prompt: String,
    /// How a question is put: v-attack, in-image, fare, textvqa or vizwiz
    #[arg(long, value_name = "PRESET", default_value = prompts::PRESET)]
    question_prompt: String,
    /// COCO's captions file, for CIDEr and BLEU of the captions
    #[arg(long, value_name = "FILE")]
    captions: Option<PathBuf>,
    /// Choose N pictures, objects, targets and questions from COCO, write them as the three files into
    /// --out, and ask nobody
    #[arg(long, value_name = "N", requires = "instances", requires = "captions")]
    select: Option<usize>,
    /// COCO's instances file, for --select
    #[arg(long, value_name = "FILE")]
    instances: Option<PathBuf>,
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE")]
    isq: Option<String>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    #[command(flatten)]
    judge: JudgeFlags,
    /// The run's folder
    #[arg(long, value_name = "RUN")]
    out: PathBuf,
    /// Go on with the run in --out, if there is one
    #[arg(long)]
    resume: bool,
    /// Work on shard I of N alone, to be put together with `radapt eval merge`
    #[arg(long, value_name = "I/N", value_parser = super::classify::parse_shard)]
    shard: Option<(usize, usize)>,
    /// Pictures asked about together: what a kill loses
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    #[command(flatten)]
    limits: PictureLimits,
}

impl CocoCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if let Some(n) = self.select {
            return self.choose(global, n);
        }
        let crafted = self.crafted.iter().map(|run| CraftedSet::read(run));
        let crafted: Vec<CraftedSet> =
            crafted.collect::<radapt::Result<Vec<_>>>()?.into_iter().flatten().collect();
        let model = self.model.find()?;
        let (set, source) = self.set(&model)?;
        let speakers = Speakers::new(
            &model,
            &self.model,
            self.isq.clone(),
            defenses(&self.defense, &self.also, self.defended_only)?,
            &crafted,
        )?;
        let references = match (&self.captions, &source) {
            (Some(file), _) => {
                let coco = Coco::captions_alone(file)?;
                coco.images().iter().map(|i| (i.file_name.clone(), coco.captions(i.id).to_vec())).collect()
            }
            (None, Source::Pocket { .. }) => {
                set.rows().iter().map(|row| (row.image.clone(), vec![row.description.clone()])).collect()
            }
            (None, Source::Files(_)) => Default::default(),
        };
        let coco = CocoRun {
            set: &set,
            source,
            limits: self.limits.limits(),
            models: speakers.spoken().to_vec(),
            crafted,
            caption: prompts::caption(&self.caption_prompt)?,
            question: prompts::question(&self.question_prompt)?,
            references,
            batch: self.batch as usize,
            seed: global.seed,
        };
        // A judge that cannot be asked is said before there is a run; its verdicts are kept in the run's folder.
        self.judge.llm(None)?;
        let decides = coco.decides(speakers.decides()?);
        let manifest = Manifest::new(decides, self.shard, coco.items(self.shard));
        let mut run = Run::open(&self.out, manifest, self.resume)?;
        let llm = self.judge.llm(Some(&self.out.join("judge.jsonl")))?;
        let bar = global.bar("", 0);
        let summary = coco.run(&mut run, &mut |i| speakers.load(i), llm.as_ref(), &mut |done| {
            bar.set_length(done.of as u64);
            bar.set_position(done.done as u64);
            bar.set_message(format!("asking, defence {}", done.defense));
        })?;
        bar.finish_and_clear();
        self.say(global, &summary);
        print(global, to_value(&summary)?, &row_table(&summary.summary.rows))?;
        Ok(if summary.summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    fn say(&self, global: &Global, summary: &CocoSummary) {
        if !summary.missing.is_empty() {
            global.say(format_args!(
                "{} pictures are missing and were not asked about, the first `{}`",
                summary.missing.len(),
                summary.missing[0]
            ));
        }
        let failed = summary.summary.failed;
        if failed > 0 {
            global.say(format_args!(
                "warning: {failed} of {} items have no response; see {}",
                summary.summary.items,
                self.out.join("items.jsonl").display()
            ));
        }
    }

    fn set(&self, model: &Model) -> radapt::Result<(ObjectSet, Source)> {
        if let Some(split) = pocket_split(&self.data)? {
            let side =
                if model.kind.is_qwen() { *SIDES.end() } else { model.tower_config()?.image_size as u32 };
            let size = side.clamp(*SIDES.start(), *SIDES.end());
            return Ok((
                ObjectSet::pocket(split, 0, self.n.unwrap_or(300))?,
                Source::Pocket { split, seed: 0, size },
            ));
        }
        let folder = Path::new(&self.data);
        let mut set = ObjectSet::open(folder)?;
        if self.clean {
            set = set.clean().distinct()?;
        }
        if let Some(n) = self.n {
            let rows = set.rows().iter().take(usize::try_from(n).unwrap_or(usize::MAX)).cloned().collect();
            set = ObjectSet::new(set.name(), rows)?;
        }
        let located = set.locate(self.pictures.as_deref().unwrap_or(folder));
        if located.paths.iter().all(Option::is_none) {
            let expected = "a folder with at least one of the set's pictures";
            return Err(argument("--pictures", expected, &located.missing.len().to_string()));
        }
        Ok((set, Source::Files(located.paths)))
    }

    fn choose(&self, global: &Global, n: usize) -> anyhow::Result<ExitCode> {
        let (Some(instances), Some(captions)) = (&self.instances, &self.captions) else {
            return Err(argument("--select", "--instances and --captions to go with it", "none").into());
        };
        let coco = Coco::open(instances, Some(captions))?;
        let name = format!("coco{n}");
        let set = select(&coco, &name, n, global.seed)?;
        set.write(&self.out)?;
        let out = self.out.display().to_string();
        let json = json!({ "out": out, "name": name, "n": set.rows().len(), "seed": global.seed });
        print(global, json, &out)?;
        Ok(ExitCode::SUCCESS)
    }
}
