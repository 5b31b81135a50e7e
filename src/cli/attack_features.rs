//! `radapt attack pgd` on a model without a text side: what its language model reads is attacked.

use std::process::ExitCode;

use candle_core::DType;
use radapt::attack::{Eps, Subject, ThreatKind};
use radapt::eval::features::{FeatureAttack, FeatureRow};
use radapt::eval::run::{Manifest, Run};
use radapt::image::Preprocess;
use radapt::model::Model;
use radapt::tower::Insertable;
use serde_json::json;

use super::anchor_train::feature;
use super::classify::{RunFlags, Towers, short_name};
use super::options::{Size, argument, sizes};
use super::{Global, print};

/// What was asked for.
pub struct Asked<'a> {
    pub attack: &'a str,
    pub eps: Vec<Eps>,
    pub threat: ThreatKind,
    pub size: Option<Size>,
    pub flags: &'a RunFlags,
}

impl Asked<'_> {
    pub fn run(self, global: &Global, model: &Model) -> anyhow::Result<ExitCode> {
        if self.attack != "pgd" {
            let expected = "pgd, the attack on features, for a model without a text side";
            return Err(argument("attack", expected, self.attack).into());
        }
        self.flags.check_features()?;
        let options = &self.flags.model;
        let device = options.device()?;
        let preprocess = model.preprocess(options.contract)?;
        let sizes = sizes(model, self.size.as_slice())?;
        let spinner = global.spinner("loading the model");
        match sizes.first() {
            Some(size) => {
                let preprocess = preprocess.fixed(size.height, size.width);
                let tower = model.qwen(&preprocess, Some(DType::F32), &device)?;
                let tower = tower.at(size.height as usize, size.width as usize)?;
                spinner.finish_and_clear();
                self.on(global, model, &preprocess, tower)
            }
            None => {
                let towers = Towers::load(model, &preprocess, None, &device)?;
                spinner.finish_and_clear();
                self.on(global, model, &preprocess, towers.exact)
            }
        }
    }

    fn on<T: Insertable>(
        self,
        global: &Global,
        model: &Model,
        preprocess: &Preprocess,
        tower: T,
    ) -> anyhow::Result<ExitCode> {
        let flags = self.flags;
        let defense = flags.defense.options().build(&tower, || model.fingerprint())?;
        // As large as pocket's scenes are drawn, or as the pictures are.
        let (height, width) = tower.spec().picture;
        let side = (height.max(width) as u32).clamp(96, 224);
        let set = flags.data.open(global.seed, side, flags.model.offline)?;
        let spec = tower.spec().clone();
        let defended = tower.with(defense.inserts());
        let target = if defense.summary().is_some() {
            Subject::new(&model.name, &defense)?
        } else {
            Subject::undefended(&model.name)
        };
        let attack = FeatureAttack {
            set: &set,
            limits: flags.limits.limits(),
            preprocess,
            undefended: (tower, Subject::undefended(&model.name)),
            target: (defended, target),
            defense: short_name(&defense),
            feature: feature(model, &spec)?,
            threat: self.threat,
            eps: self.eps,
            settings: flags.feature_settings(),
            seed: global.seed,
            batch: flags.batch as usize,
        };
        let decides = attack.decides(json!({
            "model": { "name": model.name, "revision": model.revision, "digest": model.digest()? },
            "device": if flags.model.device()?.is_cpu() { "cpu" } else { "gpu" },
        }));
        let items = attack.items(flags.shard);
        let mut run = Run::open(&flags.out, Manifest::new(decides, flags.shard, items), flags.resume)?;
        let bar = global.bar("attacking", items as u64);
        let summary = attack.run(&mut run, &mut |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        if summary.failed > 0 {
            global.say(format_args!(
                "warning: {} of {} items could not be attacked; see {}",
                summary.failed,
                summary.items,
                flags.out.join("items.jsonl").display()
            ));
        }
        print(global, serde_json::to_value(&summary)?, &table(&summary.rows))?;
        Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// Whether the model's attack is one on features: it has no text side to classify by.
pub fn wanted(model: &Model) -> bool {
    model.kind != radapt::model::ModelKind::Clip
}

pub fn table(rows: &[FeatureRow]) -> String {
    let mut text = vec![format!(
        "{:8} {:8} {:7} {:9} {:>5} {:>8}  {}",
        "defence",
        "attack",
        "eps",
        "threat",
        "n",
        "cosine",
        "with the model's own features of the clean picture"
    )];
    text.extend(rows.iter().map(|row| {
        format!(
            "{:8} {:8} {:7} {:9} {:>5} {:>8.4}",
            row.defense,
            row.attack,
            row.eps.to_string(),
            row.threat.to_string(),
            row.n,
            row.value
        )
    }));
    text.join("\n")
}
