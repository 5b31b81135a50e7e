//! The command line: one file per command.
//!
//! Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 something failed, 2 the
//! command was used wrongly.

mod analyze;
mod anchor;
mod anchor_export;
mod anchor_guide;
mod anchor_train;
mod attack;
mod attack_features;
mod attack_value;
mod bench;
#[cfg(feature = "engine")]
mod chat;
mod classify;
mod completions;
#[cfg(feature = "engine")]
mod demo;
mod eval;
#[cfg(feature = "engine")]
mod eval_coco;
mod eval_judge;
mod eval_report;
mod eval_retrieve;
mod eval_suspicion;
mod eval_sweep;
#[cfg(feature = "engine")]
mod eval_vqa;
mod features;
mod logging;
mod options;
mod pocket;
mod pocket_score;
mod pocket_train;
mod row_table;
#[cfg(feature = "engine")]
mod serve;
#[cfg(feature = "engine")]
mod serve_config;
#[cfg(feature = "engine")]
mod speakers;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

#[cfg(feature = "engine")]
use clap::FromArgMatches;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

/// Version of every JSON document printed by this program.
const SCHEMA_VERSION: u64 = 1;

/// Adversarially robust vision for large vision-language models.
#[derive(Parser)]
#[command(name = "radapt", version, about, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Flags that every command has.
#[derive(clap::Args, Clone)]
struct Global {
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Print data and errors alone
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Print more of what happens; twice for everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Seed of everything that is drawn at random
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    seed: u64,
}

#[derive(Subcommand)]
enum Command {
    /// See the whole story on the built-in model: attacks, and what the defence does
    #[cfg(feature = "engine")]
    Demo(demo::Demo),
    /// Ask a model about pictures
    #[cfg(feature = "engine")]
    Chat(chat::Chat),
    /// Serve a model over OpenAI's API
    #[cfg(feature = "engine")]
    Serve(Box<serve::Serve>),
    /// Make, show and check robustness anchors
    Anchor(anchor::Anchor),
    /// Write a vision tower's features of pictures to a file
    Features(Box<features::Features>),
    Attack(Box<attack::AttackCommand>),
    Eval(eval::Eval),
    Analyze(analyze::Analyze),
    /// Measure how fast this machine is
    Bench(bench::Bench),
    /// The pocket world: draw its pictures, train its models, score them
    Pocket(pocket::Pocket),
    Completions(completions::Completions),
    Man(completions::Man),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => match error.downcast_ref::<clap::Error>() {
            Some(error) => {
                // --help and --version come this way too, with exit code 0.
                let code = if error.use_stderr() { 2 } else { 0 };
                let _ = error.print();
                return ExitCode::from(code);
            }
            None => return report(&error),
        },
    };
    let told = match &cli.command {
        #[cfg(feature = "engine")]
        Command::Serve(serve) => serve.logging(),
        _ => logging::Logging::default(),
    };
    let _traces = match logging::start(&cli.global, &told) {
        Ok(traces) => traces,
        Err(error) => return report(&error.into()),
    };
    let result = match cli.command {
        #[cfg(feature = "engine")]
        Command::Demo(demo) => demo.run(&cli.global),
        #[cfg(feature = "engine")]
        Command::Chat(chat) => chat.run(&cli.global),
        #[cfg(feature = "engine")]
        Command::Serve(serve) => serve.run(&cli.global),
        Command::Anchor(anchor) => anchor.run(&cli.global),
        Command::Features(features) => features.run(&cli.global),
        Command::Attack(attack) => attack.run(&cli.global),
        Command::Eval(eval) => eval.run(&cli.global),
        Command::Analyze(analyze) => analyze.run(&cli.global),
        Command::Bench(bench) => bench.run(&cli.global),
        Command::Pocket(pocket) => pocket.run(&cli.global),
        Command::Completions(completions) => completions.run(&cli.global),
        Command::Man(man) => man.run(&cli.global),
    };
    match result {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

#[cfg(not(feature = "engine"))]
fn parse() -> anyhow::Result<Cli> {
    Ok(Cli::try_parse()?)
}

/// The command line, and for `serve` the environment and the file of `--config`.
#[cfg(feature = "engine")]
fn parse() -> anyhow::Result<Cli> {
    let command = command();
    let mut given: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let matches = command.clone().try_get_matches_from(&given)?;
    let file =
        matches.subcommand_matches("serve").and_then(|serve| Some((serve, serve_config::file(serve)?)));
    let Some((serve, path)) = file else { return Ok(Cli::from_arg_matches(&matches)?) };
    given.extend(serve_config::flags(path, serve, &command, "serve")?);
    let with_file =
        command.try_get_matches_from(given).map_err(|error| serve_config::complaint(path, &error))?;
    Ok(Cli::from_arg_matches(&with_file)?)
}

/// The command line as it is described.
fn command() -> clap::Command {
    let command = Cli::command();
    #[cfg(feature = "engine")]
    let command = serve_config::with_environment(command, "serve");
    command
}

/// One line, and a hint where there is one.
fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(io) = error.downcast_ref::<std::io::Error>()
        && io.kind() == std::io::ErrorKind::BrokenPipe
    {
        // Whoever read our output has enough.
        return ExitCode::SUCCESS;
    }
    // Our messages hold their cause's already; the chain would say it twice.
    let mut line = String::new();
    for text in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = text;
        } else if !line.ends_with(&text) {
            line = format!("{line}: {text}");
        }
    }
    eprintln!("error: {}", line.replace('\n', " "));
    let cause = error.downcast_ref::<radapt::Error>();
    if let Some(hint) = cause.and_then(radapt::Error::hint) {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(if matches!(cause, Some(radapt::Error::Argument { .. })) { 2 } else { 1 })
}

impl Global {
    /// A line about what happens, unless quiet.
    fn say(&self, line: impl std::fmt::Display) {
        if !self.quiet {
            eprintln!("{line}");
        }
    }

    /// Whether something may move on stderr.
    fn moves(&self) -> bool {
        !self.quiet && self.verbose == 0 && std::io::stderr().is_terminal()
    }

    /// A bar of `length` steps on a terminal, nothing elsewhere.
    fn bar(&self, message: impl Into<std::borrow::Cow<'static, str>>, length: u64) -> ProgressBar {
        if !self.moves() {
            return ProgressBar::hidden();
        }
        ProgressBar::new(length).with_message(message).with_style(
            ProgressStyle::with_template("{msg} {bar:40} {pos}/{len}, {eta} left")
                .unwrap_or_else(|_| ProgressStyle::default_bar()),
        )
    }

    /// A spinner on a terminal, nothing elsewhere.
    fn spinner(&self, message: &str) -> ProgressBar {
        if !self.moves() {
            return ProgressBar::hidden();
        }
        let spinner = ProgressBar::new_spinner().with_message(message.to_string());
        spinner.set_style(
            ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        spinner.enable_steady_tick(Duration::from_millis(100));
        spinner
    }
}

/// Prints data: `json` with its schema version, or `text`.
fn print(global: &Global, mut json: Value, text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if global.json {
        if let Some(fields) = json.as_object_mut() {
            fields.insert("schema_version".into(), SCHEMA_VERSION.into());
        }
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{text}")?;
    }
    Ok(out.flush()?)
}
