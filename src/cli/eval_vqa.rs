//! `radapt eval vqa`

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use radapt::data::questions::QuestionSet;
use radapt::eval::coco::{CraftedSet, Source};
use radapt::eval::prompts;
use radapt::eval::questions::QuestionRun;
use radapt::eval::run::{Manifest, Run};
use radapt::model::Model;
use radapt::pocket::SIDES;
use serde_json::to_value;

use super::eval::defenses;
use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument, pocket_split};
use super::row_table::question_table;
use super::speakers::Speakers;
use super::{Global, print};

/// Questions with known answers, clean and adversarial, undefended and defended: VQAv2's accuracy, or
/// POPE's figures
///
/// Adversarial pictures come from runs of `radapt attack`; under attack an answer is worth no more than
/// the same model's answer to the clean picture.
#[derive(Args)]
pub struct VqaCommand {
    /// VQAv2's file of questions (with --annotations), one of POPE's, or the built-in pocket and
    /// pocket-pope (pocket:validation and so on are other splits)
    #[arg(long, value_name = "FILE", default_value = "pocket")]
    data: String,
    /// VQAv2's file of annotations
    #[arg(long, value_name = "FILE")]
    annotations: Option<PathBuf>,
    /// Where the pictures are, if not beside the file
    #[arg(long, value_name = "FOLDER")]
    pictures: Option<PathBuf>,
    /// The first N questions; all where not given, those about 300 scenes of pocket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    n: Option<u64>,
    /// Runs of `radapt attack` whose pictures to ask about
    #[arg(long, value_name = "RUN,...", value_delimiter = ',')]
    crafted: Vec<PathBuf>,
    /// Anchors to ask as well, each with what it recommends and under its file's name, or gif:BINS
    #[arg(long, value_name = "ANCHOR,...", value_delimiter = ',')]
    also: Vec<String>,
    /// Leave the undefended model out
    #[arg(long)]
    defended_only: bool,
    /// How a question is put: v-attack, in-image, fare, textvqa or vizwiz; fare where not given (a word
    /// or phrase is asked for), and the question alone on pocket
    #[arg(long, value_name = "PRESET")]
    question_prompt: Option<String>,
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE")]
    isq: Option<String>,
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
    /// Questions asked together: what a kill loses
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    #[command(flatten)]
    limits: PictureLimits,
}

impl VqaCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let crafted = self.crafted.iter().map(|run| CraftedSet::read(run));
        let crafted: Vec<CraftedSet> =
            crafted.collect::<radapt::Result<Vec<_>>>()?.into_iter().flatten().collect();
        let model = self.model.find()?;
        let (set, source, pictures) = self.set(&model)?;
        let speakers = Speakers::new(
            &model,
            &self.model,
            self.isq.clone(),
            defenses(&self.defense, &self.also, self.defended_only)?,
            &crafted,
        )?;
        let preset = match (&self.question_prompt, &source) {
            (Some(preset), _) => preset,
            (None, Source::Pocket { .. }) => prompts::PRESET,
            (None, Source::Files(_)) => "fare",
        };
        let questions = QuestionRun {
            set: &set,
            source,
            pictures,
            limits: self.limits.limits(),
            models: speakers.spoken().to_vec(),
            crafted,
            prompt: prompts::question(preset)?,
            seed: global.seed,
            batch: self.batch as usize,
        };
        let decides = questions.decides(speakers.decides()?);
        let manifest = Manifest::new(decides, self.shard, questions.items(self.shard));
        let mut run = Run::open(&self.out, manifest, self.resume)?;
        let bar = global.bar("asking", 0);
        let summary = questions.run(&mut run, &mut |i| speakers.load(i), &mut |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if summary.missing > 0 {
            global.say(format_args!(
                "the pictures of {} of {} questions are missing; they were not asked",
                summary.missing,
                set.rows().len()
            ));
        }
        if summary.failed > 0 {
            global.say(format_args!(
                "warning: {} of {} items have no answer; see {}",
                summary.failed,
                summary.items,
                self.out.join("items.jsonl").display()
            ));
        }
        print(global, to_value(&summary)?, &question_table(&summary.rows))?;
        Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// The questions, the pictures, and which of them each question is about.
    fn set(&self, model: &Model) -> radapt::Result<(QuestionSet, Source, Vec<usize>)> {
        let take = |set: QuestionSet| match self.n {
            Some(n) => set.first(usize::try_from(n).unwrap_or(usize::MAX)),
            None => set,
        };
        let pope =
            self.data.strip_prefix("pocket-pope").filter(|rest| rest.is_empty() || rest.starts_with(':'));
        let pocket = pope.map_or_else(|| self.data.clone(), |rest| format!("pocket{rest}"));
        if let Some(split) = pocket_split(&pocket)? {
            let side =
                if model.kind.is_qwen() { *SIDES.end() } else { model.tower_config()?.image_size as u32 };
            let size = side.clamp(*SIDES.start(), *SIDES.end());
            let scenes = self.n.unwrap_or(300).min(300);
            let set = match pope {
                Some(_) => QuestionSet::pocket_pope(split, 0, scenes)?,
                None => QuestionSet::pocket(split, 0, scenes)?,
            };
            let set = take(set);
            // `INDEX.QUESTION`
            let scene = |id: &String| id.split('.').next().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
            let pictures = set.rows().iter().map(|row| scene(&row.id)).collect();
            return Ok((set, Source::Pocket { split, seed: 0, size }, pictures));
        }
        let file = Path::new(&self.data);
        let set = take(match &self.annotations {
            Some(annotations) => QuestionSet::vqav2(file, annotations)?,
            None => QuestionSet::pope(file)?,
        });
        let folder = self.pictures.as_deref().or(file.parent()).unwrap_or(Path::new("."));
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut paths: Vec<Option<PathBuf>> = Vec::new();
        let mut pictures = Vec::new();
        for row in set.rows() {
            let place = *places.entry(&row.image).or_insert_with(|| {
                paths.push(find(folder, &row.image));
                paths.len() - 1
            });
            pictures.push(place);
        }
        if paths.iter().all(Option::is_none) {
            let expected = "a folder with at least one of the questions' pictures";
            return Err(argument("--pictures", expected, &folder.display().to_string()));
        }
        Ok((set, Source::Files(paths), pictures))
    }
}

/// A picture by its name, or by what COCO calls it since 2017: without the split before its number.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let short = name.rsplit('_').next().unwrap_or(name);
    [name, short].iter().map(|name| folder.join(name)).find(|path| path.is_file())
}
