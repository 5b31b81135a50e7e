//! The language models that an evaluation asks: one model, with one defence after the other.

use std::rc::Rc;

use futures::StreamExt;
use radapt::attack::Subject;
use radapt::defense::{Defense, DefenseOptions};
use radapt::engine::{Engine, EngineOptions, Sampling, Turn};
use radapt::eval::coco::{Asked, CraftedSet, Speaker, Spoken};
use radapt::model::Model;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::classify::short_name;
use super::options::{ModelOptions, argument};

/// A model with its defences, each by the name it has in figures.
pub struct Speakers {
    model: Model,
    flags: ModelOptions,
    isq: Option<String>,
    options: Vec<DefenseOptions>,
    spoken: Vec<Spoken>,
    runtime: Rc<Runtime>,
}

impl Speakers {
    /// Builds the defences, at the size of the adversarial pictures where the tower takes any.
    ///
    /// # Errors
    /// If one cannot be built, two have one name, or no model has the defence that adversarial pictures
    /// were crafted through.
    pub fn new(
        model: &Model,
        flags: &ModelOptions,
        isq: Option<String>,
        defenses: Vec<(Option<String>, DefenseOptions)>,
        crafted: &[CraftedSet],
    ) -> anyhow::Result<Self> {
        let size = crafted.first().map(|set| set.size);
        let mut spoken: Vec<Spoken> = Vec::new();
        let mut all = Vec::new();
        for (name, options) in defenses {
            let built = build(model, flags, &options, size)?;
            let name = name.unwrap_or_else(|| short_name(&built));
            if spoken.iter().any(|other| other.defense == name) {
                return Err(argument("--also", "defences that are called by different names", &name).into());
            }
            spoken.push(Spoken { defense: name, subject: Subject::new(&model.name, &built)? });
            all.push(options);
        }
        for set in crafted {
            if spoken.iter().all(|spoken| set.threat(&spoken.subject).is_none()) {
                let expected = format!(
                    "a model with the defence of {}, which its pictures were crafted on",
                    set.surrogate
                );
                return Err(argument("--crafted", &expected, &set.folder.display().to_string()).into());
            }
        }
        let runtime = Rc::new(Runtime::new()?);
        Ok(Self { model: model.clone(), flags: flags.clone(), isq, options: all, spoken, runtime })
    }

    /// One per defence.
    pub fn spoken(&self) -> &[Spoken] {
        &self.spoken
    }

    /// What of the model decides a result.
    pub fn decides(&self) -> radapt::Result<Value> {
        let model = &self.model;
        Ok(json!({
            "model": { "name": model.name, "revision": model.revision, "digest": model.digest()? },
            "contract": self.flags.contract.map(|contract| contract.to_string()),
            "dtype": self.flags.dtype().map(|dtype| dtype.as_str()),
            "isq": self.isq,
            "device": self.flags.device.split(':').next(),
        }))
    }

    /// Loads the model with the defence of this place.
    pub fn load(&self, i: usize) -> radapt::Result<Box<dyn Speaker>> {
        let options = EngineOptions {
            defense: self.options.get(i).cloned().unwrap_or_default(),
            contract: self.flags.contract,
            dtype: self.flags.dtype(),
            isq: self.isq.clone(),
            ..EngineOptions::new(self.flags.device()?)
        };
        let engine = self.runtime.block_on(Engine::load(self.model.clone(), options))?;
        Ok(Box::new(Loaded { engine, runtime: self.runtime.clone() }))
    }
}

/// The defence in numbers.
fn build(
    model: &Model,
    flags: &ModelOptions,
    options: &DefenseOptions,
    size: Option<(usize, usize)>,
) -> radapt::Result<Defense> {
    let device = flags.device()?;
    let preprocess = model.preprocess(flags.contract)?;
    if model.kind.is_qwen() {
        let (height, width) = size.unwrap_or((448, 448));
        let tower = model.qwen(&preprocess, None, &device)?.at(height, width)?;
        return options.build(&tower, || model.fingerprint());
    }
    options.build(&model.tower(&preprocess, None, &device)?, || model.fingerprint())
}

/// The engine, asked about several pictures at once.
struct Loaded {
    engine: Engine,
    runtime: Rc<Runtime>,
}

impl Speaker for Loaded {
    fn answers(&self, asked: &[Asked<'_>]) -> radapt::Result<Vec<Result<String, String>>> {
        let answer = async |asked: &Asked<'_>| {
            let turn = Turn::of_pictures(asked.prompt.clone(), vec![asked.picture.clone()]);
            let sampling = Sampling { max_tokens: asked.max_tokens, ..Sampling::default() };
            let found = self.engine.answer(&[turn], &sampling).await;
            found.map(|answer| answer.text.trim().to_string()).map_err(|e| e.to_string())
        };
        Ok(self.runtime.block_on(futures::stream::iter(asked).map(answer).buffered(16).collect()))
    }
}
