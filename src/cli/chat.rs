//! `radapt chat`

use std::io::{BufRead, IsTerminal, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use futures::StreamExt;
use radapt::defense::DefenseOptions;
use radapt::engine::{Engine, EngineOptions, Role, Sampling, Turn};
use radapt::image::{DecodeLimits, decode_file};
use serde_json::json;

use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, print};

/// Ask one question, or without one hold a conversation.
///
/// In a conversation `/image FILE` adds a picture to the next question, `/reset` starts anew and
/// `/quit` ends it.
#[derive(Args)]
pub struct Chat {
    /// The question; without it, a prompt
    question: Option<String>,
    /// A picture; may be given several times
    #[arg(long = "image", value_name = "FILE")]
    images: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    #[command(flatten)]
    limits: PictureLimits,
    /// The most tokens an answer may have
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Answer")]
    max_tokens: usize,
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE", help_heading = "Answer")]
    isq: Option<String>,
}

impl Chat {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.question.is_none() && global.json {
            return Err(argument("--json", "a question to go with it", "none").into());
        }
        if self.max_tokens == 0 {
            return Err(argument("--max-tokens", "at least 1", "0").into());
        }
        let runtime = tokio::runtime::Runtime::new()?;
        runtime.block_on(self.hold(global))
    }

    async fn hold(self, global: &Global) -> anyhow::Result<ExitCode> {
        let limits = self.limits.limits();
        // Before the model, which takes longer.
        let images =
            self.images.iter().map(|path| decode_file(path, &limits)).collect::<radapt::Result<Vec<_>>>()?;
        let engine = load(&self.model, self.defense.options(), self.isq.clone(), None, global).await?;
        let sampling = Sampling { max_tokens: self.max_tokens, top_logprobs: Some(0), ..Sampling::default() };
        let mut turn = Turn::of_pictures("", images);
        match self.question {
            Some(question) => {
                turn.text = question;
                if global.json {
                    answer_json(&engine, &[turn], &sampling, global).await?;
                } else {
                    answer(&engine, &[turn], &sampling).await?;
                }
            }
            None => converse(&engine, turn, &sampling, &limits, global).await?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Loads a model, `sequences` of whose answers are generated at once, and says how it is defended.
pub async fn load(
    model: &ModelOptions,
    defense: DefenseOptions,
    isq: Option<String>,
    sequences: Option<NonZeroUsize>,
    global: &Global,
) -> anyhow::Result<Engine> {
    let found = model.find()?;
    let defaults = EngineOptions::new(model.device()?);
    let options = EngineOptions {
        defense,
        contract: model.contract,
        dtype: model.dtype(),
        isq,
        max_sequences: sequences.unwrap_or(defaults.max_sequences),
        ..defaults
    };
    let spinner = global.spinner(&format!("loading {}", found.name));
    let engine = Engine::load(found, options).await;
    spinner.finish_and_clear();
    let engine = engine?;
    match engine.defense() {
        Some(defense) => global.say(format_args!("defence: {defense}")),
        None => global.say("defence: none, the model is undefended"),
    }
    Ok(engine)
}

async fn answer_json(
    engine: &Engine,
    turns: &[Turn],
    sampling: &Sampling,
    global: &Global,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let answer = engine.answer(turns, sampling).await?;
    let json = json!({
        "model": engine.model().name,
        "defense": engine.defense(),
        "contract": engine.preprocess().contract,
        "answer": answer.text,
        "tokens": answer.tokens,
        "logprobs": answer.logprobs,
        "seconds": start.elapsed().as_secs_f64(),
    });
    print(global, json, &answer.text)
}

/// Prints an answer as it comes and returns it.
async fn answer(engine: &Engine, turns: &[Turn], sampling: &Sampling) -> anyhow::Result<String> {
    let sampling = Sampling { top_logprobs: None, ..sampling.clone() };
    let mut pieces = std::pin::pin!(engine.stream(turns, &sampling).await?);
    let mut text = String::new();
    let live = std::io::stdout().is_terminal();
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        text.push_str(&piece.text);
        if live {
            let mut out = std::io::stdout().lock();
            out.write_all(piece.text.as_bytes())?;
            out.flush()?;
        }
    }
    let mut out = std::io::stdout().lock();
    if live {
        writeln!(out)?;
    } else {
        // In a pipe an answer comes whole, so that a failed one leaves nothing behind.
        writeln!(out, "{text}")?;
    }
    out.flush()?;
    Ok(text)
}

async fn converse(
    engine: &Engine,
    first: Turn,
    sampling: &Sampling,
    limits: &DecodeLimits,
    global: &Global,
) -> anyhow::Result<()> {
    let prompt = std::io::stdin().is_terminal();
    let mut turns: Vec<Turn> = Vec::new();
    let mut next = first;
    loop {
        if prompt && !global.quiet {
            eprint!("> ");
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim();
        match line.split_once(' ').unwrap_or((line, "")) {
            ("", _) => {}
            ("/quit", _) => return Ok(()),
            ("/reset", _) => {
                turns.clear();
                next = Turn::text(Role::User, "");
            }
            ("/image", path) => match decode_file(std::path::Path::new(path.trim()), limits) {
                Ok(image) => next.images.push(image),
                // A wrong picture ends neither the conversation nor the question.
                Err(error) => eprintln!("error: {error}"),
            },
            _ => {
                next.text = line.to_string();
                turns.push(next);
                next = Turn::text(Role::User, "");
                match answer(engine, &turns, sampling).await {
                    Ok(text) => turns.push(Turn::text(Role::Assistant, text)),
                    // What came before stands; a question that is too long is forgotten.
                    Err(error) if error.downcast_ref::<radapt::Error>().is_some() => {
                        turns.pop();
                        eprintln!("error: {error}");
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}
