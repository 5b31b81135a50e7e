//! The language model: mistral.rs with our vision tower.
//!
//! This is the only room that names mistral.rs. A picture is prepared by [`crate::image`], so the
//! engine's own resizing is the identity; the tower is [`crate::tower`]'s, defended or not, and
//! holds its weights once.
//!
//! ```
//! use candle_core::Device;
//! use radapt::engine::{Engine, EngineOptions, Sampling, Turn};
//! use radapt::model::{Lookup, Model};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # tokio::runtime::Runtime::new()?.block_on(async {
//! // The defence is on unless `EngineOptions::defense` says otherwise.
//! let model = Model::find("pocket", &Lookup::default())?;
//! let engine = Engine::load(model, EngineOptions::new(Device::Cpu)).await?;
//! let question = Turn::of_pictures("What is in the picture?", vec![image::RgbImage::new(96, 96)]);
//! let answer = engine.answer(&[question], &Sampling { max_tokens: 4, ..Default::default() }).await?;
//! println!("{} ({})", answer.text, engine.defense().expect("defended"));
//! # Ok(())
//! # })
//! # }
//! ```

mod choose;
mod config;
mod generate;
mod grammar;
mod qwen;
mod text;
mod tools;
mod tower;
mod weights;

pub use choose::{Alternative, Token};
pub use generate::{Answer, Piece, Role, Sampling, Turn};
pub use grammar::Grammar;
pub use tools::{Call, Calls, Said, Tool};

use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device};
use mistralrs_core::llguidance::ParserFactory;
use mistralrs_core::{
    AdapterPaths, AutoDeviceMapParams, DefaultSchedulerMethod, DeviceMapSetting, IsqType, LocalModelPaths,
    MistralRs, MistralRsBuilder, ModelDType, ModelPaths, MultimodalLoaderBuilder, MultimodalLoaderType,
    MultimodalSpecificConfig, Pipeline, SchedulerConfig,
};

use crate::attack::{FeatureTower, Subject};
use crate::defense::{AnchorChoice, DefenseOptions, DefenseSummary};
use crate::image::{Contract, Preprocess};
use crate::model::{Model, ModelKind};
use crate::{Error, Result};
use tower::{Built, Supplier};

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The defence.
    pub defense: DefenseOptions,
    /// Another picture contract than the model's own.
    pub contract: Option<Contract>,
    /// The dtype weights are held in; f32 on a CPU and bf16 elsewhere where not given.
    pub dtype: Option<DType>,
    /// In-situ quantisation of the language model, as mistral.rs names it (`q4k`, `8`, ...).
    pub isq: Option<String>,
    /// Where it runs.
    pub device: Device,
    /// How many sequences are generated at once.
    pub max_sequences: NonZeroUsize,
    /// mistral.rs' own vision tower in place of ours, undefended, to compare with; of a Qwen-VL in
    /// the published key layout alone.
    pub upstream_tower: bool,
}

impl EngineOptions {
    /// The defaults on `device`.
    pub fn new(device: Device) -> Self {
        let max_sequences = NonZeroUsize::new(16).unwrap_or(NonZeroUsize::MIN);
        Self {
            defense: DefenseOptions::default(),
            contract: None,
            dtype: None,
            isq: None,
            device,
            max_sequences,
            upstream_tower: false,
        }
    }
}

/// A loaded model that answers about pictures.
pub struct Engine {
    runner: Arc<MistralRs>,
    model: Model,
    preprocess: Preprocess,
    built: Option<Built>,
    /// The tokenizer's tokens as bytes, and what compiles grammars over them.
    vocabulary: Arc<ParserFactory>,
    /// The model's end tokens.
    ends: Arc<[u32]>,
    /// How many positions the model has.
    positions: usize,
    manner: Manner,
}

/// What the model's chat template knows.
#[derive(Debug, Clone, Copy, Default)]
struct Manner {
    /// Turns of role `system`.
    system: bool,
    /// Tools, calls and their results.
    tools: bool,
    /// Thoughts before the answer.
    thinks: bool,
}

impl Engine {
    /// Loads a LLaVA or Qwen-VL with its defence.
    ///
    /// # Errors
    /// If a file is missing or wrong, the model is of another kind, or the anchor does not fit.
    pub async fn load(model: Model, options: EngineOptions) -> Result<Self> {
        let loading = tokio::task::spawn_blocking(move || load(model, options));
        let loaded = loading.await.map_err(|e| Error::Engine(e.to_string()))??;
        let scheduler =
            SchedulerConfig::DefaultScheduler { method: DefaultSchedulerMethod::Fixed(loaded.max_sequences) };
        let (metadata, thinks) = {
            let pipeline = loaded.pipeline.lock().await;
            let thinks = pipeline.get_chat_template().is_some_and(|template| template.uses_think_tags());
            (pipeline.get_metadata(), thinks)
        };
        let no_vocabulary = || Error::Engine("the tokenizer has no byte vocabulary".into());
        let tokens = metadata.tok_env().ok_or_else(no_vocabulary)?;
        let mut vocabulary = ParserFactory::new_simple(&tokens).map_err(|e| Error::Engine(e.to_string()))?;
        // Its warnings quote what a stranger asked for.
        vocabulary.quiet().limits_mut().verbose_errors = false;
        let vocabulary = Arc::new(vocabulary);
        // The prefix cache matches prompts before their pictures are put in place.
        let runner = MistralRsBuilder::new(loaded.pipeline, scheduler, false, None)
            .with_no_prefix_cache(true)
            .build()
            .await;
        let mut engine = Self {
            runner,
            model: loaded.model,
            preprocess: loaded.preprocess,
            built: loaded.built,
            vocabulary,
            ends: metadata.eos_tok.clone().into(),
            positions: metadata.max_seq_len,
            manner: Manner::default(),
        };
        engine.manner = Manner { thinks, ..engine.manners().await? };
        Ok(engine)
    }

    /// What of a conversation reaches the prompt: templates drop silently what they do not know.
    async fn manners(&self) -> Result<Manner> {
        let user = Turn::text(Role::User, "hello");
        let instructed = [Turn::text(Role::System, "listen"), user.clone()];
        let call = Call { id: "call".into(), name: "look".into(), arguments: "{}".into() };
        let called = Turn { calls: vec![call], ..Turn::text(Role::Assistant, "") };
        let result = Turn { call_id: Some("call".into()), ..Turn::text(Role::Tool, "a dog") };
        let tool = Tool { name: "look".into(), description: None, parameters: None };
        let plain = self.prompt(std::slice::from_ref(&user), &[]).await?;
        let Some(plain) = plain else {
            return Err(Error::Engine("the model's chat template cannot be used".into()));
        };
        let differs = |other: Option<Vec<u32>>| other.is_some_and(|other| other != plain);
        let tools = differs(self.prompt(std::slice::from_ref(&user), &[tool]).await?)
            && self.says(&[user.clone(), called.clone()], "look").await?
            && self.says(&[user, called, result], "dog").await?;
        Ok(Manner { system: differs(self.prompt(&instructed, &[]).await?), tools, thinks: false })
    }

    /// Whether the prompt has a word.
    async fn says(&self, turns: &[Turn], word: &str) -> Result<bool> {
        let Some(ids) = self.prompt(turns, &[]).await? else { return Ok(false) };
        let text = self.vocabulary.tok_env().tok_trie().decode(&ids);
        Ok(String::from_utf8_lossy(&text).contains(word))
    }

    /// The model's files.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How pictures are prepared.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// The defence in the tower, `None` for the undefended model.
    pub fn defense(&self) -> Option<&DefenseSummary> {
        self.built.as_ref()?.defense.as_ref()
    }

    /// The model with its defence, `None` with mistral.rs' own tower.
    pub fn subject(&self) -> Option<&Subject> {
        Some(&self.built.as_ref()?.subject)
    }

    /// The vision tower with its defence, by what the language model reads of it; weights are held
    /// once. `None` with mistral.rs' own tower.
    pub fn tower(&self) -> Option<&FeatureTower> {
        Some(&self.built.as_ref()?.tower)
    }

    /// How many pictures one conversation may have, `None` for any number.
    pub fn max_pictures(&self) -> Option<usize> {
        match self.model.kind {
            ModelKind::LlavaNext => Some(1),
            _ => None,
        }
    }
}

struct Loaded {
    pipeline: Arc<tokio::sync::Mutex<dyn Pipeline + Send + Sync>>,
    model: Model,
    preprocess: Preprocess,
    /// `None` with mistral.rs' own tower.
    built: Option<Built>,
    max_sequences: NonZeroUsize,
}

fn load(model: Model, options: EngineOptions) -> Result<Loaded> {
    let kind = match model.kind {
        ModelKind::Llava => MultimodalLoaderType::LLaVA,
        ModelKind::LlavaNext => MultimodalLoaderType::LLaVANext,
        ModelKind::Qwen2Vl => MultimodalLoaderType::Qwen2VL,
        ModelKind::Qwen2_5Vl => MultimodalLoaderType::Qwen2_5VL,
        ModelKind::Qwen3Vl => MultimodalLoaderType::Qwen3VL,
        ModelKind::Qwen3VlMoe => MultimodalLoaderType::Qwen3VLMoE,
        ModelKind::Clip => {
            return Err(Error::Model {
                model: model.name,
                reason: "is a CLIP without a language model; chat needs a LLaVA or Qwen-VL".into(),
            });
        }
    };
    let upstream = options.upstream_tower;
    if upstream && (!model.kind.is_qwen() || options.defense.anchor != AnchorChoice::None) {
        let found = format!("`{}` with anchor {:?}", model.name, options.defense.anchor);
        return Err(Error::argument("mistral.rs' own tower", "an undefended Qwen-VL", found));
    }
    let preprocess = model.preprocess(options.contract)?;
    let checkpoint = model.checkpoint()?;
    // mistral.rs would read anything else by candle's means.
    if !checkpoint.is_safetensors() {
        return Err(Error::config(checkpoint.label(), "expected the language model in safetensors files"));
    }
    let isq = options.isq.as_deref().map(|isq| parse_isq(isq, &options.device)).transpose()?;
    let config = config::translate(&model)?;
    weights::check(&checkpoint, model.kind, &config)?;
    let staged = config::stage(&model, &config, upstream.then_some(&preprocess))?;
    let supplier = Arc::new(Supplier::new(&model, &preprocess, &checkpoint, options.defense)?);
    let paths: Box<dyn ModelPaths> = Box::new(LocalModelPaths {
        tokenizer_filename: needed(&model, "tokenizer.json")?,
        config_filename: staged.path().join("config.json"),
        template_filename: ["chat_template.jinja", "tokenizer_config.json"]
            .iter()
            .map(|name| model.file(name))
            .find(|path| path.is_file()),
        filenames: checkpoint.files().to_vec(),
        adapter_paths: AdapterPaths::None,
        gen_conf: optional(&model, "generation_config.json")?,
        preprocessor_config: Some(staged.path().join("preprocessor_config.json")),
        processor_config: None,
        chat_template_json_filename: optional(&model, "chat_template.json")?,
    });
    optional(&model, "tokenizer_config.json")?;
    let dtype = match options.dtype {
        Some(DType::F32) => ModelDType::F32,
        Some(DType::F16) => ModelDType::F16,
        Some(DType::BF16) if options.device.is_cpu() => {
            return Err(Error::argument("--dtype", "f32 or f16 for a language model on a CPU", "bf16"));
        }
        Some(DType::BF16) => ModelDType::BF16,
        Some(other) => return Err(Error::argument("--dtype", "f32, f16 or bf16", format!("{other:?}"))),
        None if options.device.is_cpu() => ModelDType::F32,
        None => ModelDType::BF16,
    };
    let mapping = if options.device.is_cpu() {
        DeviceMapSetting::dummy()
    } else {
        DeviceMapSetting::Auto(AutoDeviceMapParams::default_multimodal())
    };
    let builder = MultimodalLoaderBuilder::new(
        MultimodalSpecificConfig::default(),
        None,
        None,
        Some(model.name.clone()),
        None,
    );
    let builder = if upstream { builder } else { builder.with_vision_tower(supplier.clone()) };
    let loader = builder.build(Some(kind));
    let load = || loader.load_model_from_path(&paths, &dtype, &options.device, true, mapping, isq, None);
    // Upstream unwraps in places where a file is not what it expects.
    let loaded = std::panic::catch_unwind(AssertUnwindSafe(load));
    if let Some(error) = supplier.take_error() {
        // Our own error, which has passed through upstream's as text.
        return Err(error);
    }
    let pipeline = match loaded {
        Ok(loaded) => loaded.map_err(|e| Error::Engine(first_line(&format!("{e:#}"))))?,
        Err(panic) => {
            return Err(Error::Engine(format!(
                "mistral.rs could not load the model: {}",
                panic_text(&*panic)
            )));
        }
    };
    let built = supplier.take_built();
    if built.is_none() && !upstream {
        return Err(Error::Engine("mistral.rs did not ask for the vision tower".into()));
    }
    Ok(Loaded { pipeline, model, preprocess, built, max_sequences: options.max_sequences })
}

fn parse_isq(isq: &str, device: &Device) -> Result<IsqType> {
    mistralrs_core::parse_isq_value(isq, Some(device))
        .map_err(|e| Error::argument("--isq", first_line(&e), isq))
}

fn needed(model: &Model, name: &str) -> Result<PathBuf> {
    optional(model, name)?.ok_or_else(|| Error::read(model.file(name), std::io::ErrorKind::NotFound.into()))
}

/// The path of a JSON file where it exists, checked, because upstream unwraps what it parses.
fn optional(model: &Model, name: &str) -> Result<Option<PathBuf>> {
    let path = model.file(name);
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
    serde_json::from_str::<serde::de::IgnoredAny>(&text).map_err(|e| Error::config(&path, e.to_string()))?;
    Ok(Some(path))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    first_line(text.unwrap_or("it panicked"))
}
