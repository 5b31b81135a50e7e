//! `radapt eval retrieve`

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use radapt::attack::{Eps, Settings, Subject, ThreatChoice};
use radapt::data::captioned::CaptionedSet;
use radapt::defense::Defense;
use radapt::eval::retrieve::{Embedder, RetrieveRun, Source, unit_rows};
use radapt::eval::run::{Manifest, Run};
use radapt::pocket::SIDES;
use radapt::tower::VisionTower;
use serde_json::{json, to_value};

use super::classify::{Towers, short_name, with_text};
use super::eval::{defenses, parse_threat};
use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument, pocket_split};
use super::row_table::row_table;
use super::{Global, print};

/// Image-text retrieval, clean and attacked, undefended and defended: recall at 1, 5 and 10 in both
/// directions
///
/// Pictures are attacked by PGD that drives their embedding away from those of their own captions.
#[derive(Args)]
pub struct RetrieveCommand {
    /// A file of Karpathy's splits (dataset_flickr30k.json), COCO's captions file, or the built-in
    /// pocket (pocket:validation and pocket:train are its other splits)
    #[arg(long, value_name = "FILE", default_value = "pocket")]
    data: String,
    /// The split of Karpathy's file
    #[arg(long, value_name = "SPLIT", default_value = "test")]
    split: String,
    /// Where the pictures are, if not beside the file
    #[arg(long, value_name = "FOLDER")]
    pictures: Option<PathBuf>,
    /// The first N pictures; all where not given, 300 of pocket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    n: Option<u64>,
    /// Radii of the attack; none for clean figures alone
    #[arg(long, value_name = "EPS,...", value_delimiter = ',')]
    eps: Vec<Eps>,
    /// transfer (crafted on the undefended model), adaptive (on the model scored) or both
    #[arg(long, value_name = "THREAT", default_value = "both", value_parser = parse_threat)]
    threat: ThreatChoice,
    /// PGD's steps instead of its own 10
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Anchors to score as well, each with what it recommends and under its file's name, or gif:BINS
    #[arg(long, value_name = "ANCHOR,...", value_delimiter = ',')]
    also: Vec<String>,
    /// Leave the undefended model out
    #[arg(long)]
    defended_only: bool,
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
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..))]
    batch: u64,
    #[command(flatten)]
    limits: PictureLimits,
}

impl RetrieveCommand {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let options = ModelOptions { model: with_text(&self.model.model), ..self.model.clone() };
        let model = options.find()?;
        let device = options.device()?;
        let preprocess = model.preprocess(options.contract)?;
        let spinner = global.spinner("loading the model");
        let text = model.text(&device)?;
        let towers = Towers::load(&model, &preprocess, options.dtype(), &device)?;
        let spec = towers.exact.spec();
        if spec.projection.is_none() {
            return Err(argument("--model", "a CLIP with a projection", &model.name).into());
        }
        let (set, source) = self.set(global, spec.image_size as u32)?;
        let captions: Vec<&String> = set.pictures().iter().flat_map(|picture| &picture.captions).collect();
        let parts = captions.chunks(64).map(|part| unit_rows(&text.embed(part)?));
        let texts = candle_core::Tensor::cat(&parts.collect::<radapt::Result<Vec<_>>>()?, 0)?;
        let embedder = |name: Option<String>, defense: &Defense| -> radapt::Result<Embedder> {
            let subject = Subject::new(&model.name, defense)?;
            let craft = towers.craft.as_ref().unwrap_or(&towers.exact);
            Ok(Embedder {
                defense: name.unwrap_or_else(|| short_name(defense)),
                exact: towers.exact.with(defense.inserts()),
                craft: craft.with(defense.inserts()),
                subject,
            })
        };
        let models = defenses(&self.defense, &self.also, self.defended_only)?
            .into_iter()
            .map(|(name, options)| {
                let defense = options.build(&towers.exact, || model.fingerprint())?;
                embedder(name, &defense)
            })
            .collect::<radapt::Result<Vec<_>>>()?;
        for (i, model) in models.iter().enumerate() {
            if models.iter().take(i).any(|other| other.defense == model.defense) {
                let expected = "defences that are called by different names";
                return Err(argument("--also", expected, &model.defense).into());
            }
        }
        spinner.finish_and_clear();
        let retrieve = RetrieveRun {
            set: &set,
            source,
            limits: self.limits.limits(),
            preprocess: &preprocess,
            models,
            surrogate: embedder(None, &Defense::default())?,
            texts,
            eps: self.eps.clone(),
            threats: self.threat.kinds().to_vec(),
            settings: Settings { steps: self.steps, ..Settings::default() },
            seed: global.seed,
            batch: self.batch as usize,
        };
        let decides = retrieve.decides(json!({
            "model": { "name": model.name, "revision": model.revision, "digest": model.digest()? },
            "dtype": options.dtype().map(|dtype| dtype.as_str()),
            "device": if device.is_cpu() { "cpu" } else { "gpu" },
        }));
        let items = retrieve.items(self.shard);
        let mut run = Run::open(&self.out, Manifest::new(decides, self.shard, items), self.resume)?;
        let bar = global.bar("retrieval", items as u64);
        let summary = retrieve.run(&mut run, &mut |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if summary.failed > 0 {
            global.say(format_args!(
                "warning: {} of {items} pictures could not be read; see {}",
                summary.failed,
                self.out.join("items.jsonl").display()
            ));
        }
        print(global, to_value(&summary)?, &row_table(&summary.rows))?;
        Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    fn set(&self, global: &Global, side: u32) -> anyhow::Result<(CaptionedSet, Source)> {
        if let Some(split) = pocket_split(&self.data)? {
            let size = side.clamp(*SIDES.start(), *SIDES.end());
            let set = CaptionedSet::pocket(split, 0, self.n.unwrap_or(300))?;
            return Ok((set, Source::Pocket { split, seed: 0, size }));
        }
        let file = Path::new(&self.data);
        let mut set = CaptionedSet::open(file, &self.split)?;
        if let Some(n) = self.n {
            set = set.first(usize::try_from(n).unwrap_or(usize::MAX));
        }
        let folder = self.pictures.as_deref().or(file.parent()).unwrap_or(Path::new("."));
        let paths: Vec<Option<PathBuf>> = set
            .pictures()
            .iter()
            .map(|picture| Some(folder.join(&picture.name)).filter(|path| path.is_file()))
            .collect();
        let missing = paths.iter().filter(|path| path.is_none()).count();
        if missing == paths.len() {
            let expected = "a folder with at least one of the set's pictures";
            return Err(argument("--pictures", expected, &folder.display().to_string()).into());
        }
        if missing > 0 {
            global.say(format_args!("warning: {missing} of {} pictures are not there", paths.len()));
        }
        Ok((set, Source::Files(paths)))
    }
}
