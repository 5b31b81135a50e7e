//! `radapt completions` and `radapt man`: what a package installs beside the program.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use clap_complete::Shell;
use radapt::Error;
use serde_json::json;

use super::options::argument;
use super::{Global, command, print};

/// Write a shell's completions to stdout.
#[derive(Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub fn run(&self, global: &Global) -> anyhow::Result<ExitCode> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut command(), "radapt", &mut text);
        let text = String::from_utf8_lossy(&text);
        let json = json!({ "shell": self.shell.to_string(), "completions": text });
        print(global, json, text.trim_end())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Write manual pages, one for each command, to a folder.
#[derive(Args)]
pub struct Man {
    /// Where to write them; it is made if it is not there
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

impl Man {
    pub fn run(&self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.folder.exists() && !self.folder.is_dir() {
            return Err(argument("FOLDER", "a folder", &self.folder.display().to_string()).into());
        }
        let failed = |source| Error::Write { path: self.folder.clone(), source };
        std::fs::create_dir_all(&self.folder).map_err(failed)?;
        clap_mangen::generate_to(command(), &self.folder).map_err(failed)?;
        let pages = std::fs::read_dir(&self.folder).map_err(failed)?;
        let mut names: Vec<String> = pages
            .flatten()
            .map(|page| page.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("radapt") && name.ends_with(".1"))
            .collect();
        names.sort();
        let text = names.join("\n");
        print(global, json!({ "folder": self.folder, "pages": names }), &text)?;
        Ok(ExitCode::SUCCESS)
    }
}
