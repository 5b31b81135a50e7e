//! `radapt anchor export`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use radapt::defense::export::{Host, write};
use serde_json::json;

use super::{Global, print};

#[derive(Args)]
pub struct Export {
    /// The anchor file, or a built-in anchor's name
    file: PathBuf,
    /// The program it is for: transformers, open_clip or vllm
    #[arg(long, value_name = "HOST", value_parser = |text: &str| text.parse::<Host>())]
    to: Host,
    /// The folder to write; the files' first lines say how to use them
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Replace files that are there already
    #[arg(long)]
    force: bool,
}

impl Export {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let files = write(&self.file, self.to, &self.out, self.force)?;
        let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        let json = json!({
            "to": self.to.name(),
            "out": self.out.display().to_string(),
            "module": self.out.join(self.to.module()).display().to_string(),
            "files": files,
        });
        print(global, json, &files.join("\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
