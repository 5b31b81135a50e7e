//! `radapt eval report`

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use radapt::eval::report;

use super::{Global, print};

/// Show the figures of one or several runs: as Markdown, as CSV, as JSON, or as a page with plots.
///
/// Runs of every kind, sweeps and analyses come out in one report; classification on several data
/// sets also in one table with their average. A run that is not complete is shown with what it has,
/// and is marked. With --paper the paper's tables come first, as far as there are figures for them, its
/// own figures and ours in one table, each with its threat model.
#[derive(Args)]
pub struct Report {
    /// Folders of runs (summary.json) and sweeps (sweep.json), and analyses (the JSON of `radapt
    /// analyze`, or a folder with several)
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Also the paper's tables, its own figures beside ours
    #[arg(long)]
    paper: bool,
    /// What to write; by the ending of --out where not given, else md
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Write to this file, over an earlier report but over nothing else
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Md,
    Csv,
    Html,
    Json,
}

impl From<Format> for report::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Md => Self::Markdown,
            Format::Csv => Self::Csv,
            Format::Html => Self::Html,
            Format::Json => Self::Json,
        }
    }
}

impl Report {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let format = match (self.format, &self.out) {
            (Some(format), _) => format.into(),
            (None, Some(out)) => report::Format::of(out)?,
            (None, None) if global.json => report::Format::Json,
            (None, None) => report::Format::Markdown,
        };
        if global.json && self.out.is_none() && format != report::Format::Json {
            let reason = radapt::Error::Argument {
                what: "--json".into(),
                expected: "--out with another format than json".into(),
                found: format!("--format {format} alone"),
            };
            return Err(reason.into());
        }
        let mut report = report::Report::read(&self.runs)?;
        if self.paper {
            report = report.beside_paper();
        }
        let Some(out) = &self.out else {
            let text = report.render(format)?;
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()?;
            return Ok(ExitCode::SUCCESS);
        };
        report.write(out, format)?;
        for note in report.notes() {
            global.say(format_args!("note: {note}"));
        }
        let mut json = report.json()?;
        json["file"] = out.display().to_string().into();
        print(global, json, &out.display().to_string())?;
        Ok(ExitCode::SUCCESS)
    }
}
