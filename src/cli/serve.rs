//! `radapt serve`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use radapt::engine::Engine;
use radapt::server::{ServerOptions, bind, router, serve};
use serde_json::json;

use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, chat, print};

/// Serve a model over OpenAI's API: POST /v1/chat/completions, POST /v1/responses, GET /v1/models,
/// GET /health. GET /docs describes it.
///
/// Pictures come as `data:` URLs; the server reads no files and fetches nothing.
///
/// Every flag may be given as a variable too, RADAPT_MAX_TOKENS for --max-tokens, and as a key of the
/// same name in a file, max-tokens. A flag comes before the variable, that before the file.
#[derive(Args)]
pub struct Serve {
    /// A TOML file of flags
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Load everything, say whether it is in order, and exit: 0 if it is, 1 or 2 if not
    #[arg(long)]
    check: bool,
    /// Where to listen
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    addr: SocketAddr,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    defense: DefenseFlags,
    #[command(flatten)]
    limits: PictureLimits,
    /// The model's name in the API; its Hub id or folder name where not given
    #[arg(long, value_name = "NAME", help_heading = "Answer")]
    name: Option<String>,
    /// The most tokens an answer may have
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Answer")]
    max_tokens: usize,
    /// The most pictures a request may have
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Picture limits")]
    max_pictures: usize,
    /// The most answers a request may ask for, as `n`
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Answer")]
    max_choices: usize,
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE", help_heading = "Answer")]
    isq: Option<String>,
}

impl Serve {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        let runtime = tokio::runtime::Runtime::new()?;
        if !self.check {
            return runtime.block_on(self.listen(global));
        }
        let checked = runtime.block_on(self.load(global));
        let json = match &checked {
            Ok((engine, options)) => json!({
                "ok": true,
                "model": options.name,
                "defense": engine.defense(),
                "contract": engine.preprocess().contract,
                "address": self.addr.to_string(),
            }),
            Err(error) => json!({ "ok": false, "reason": error.to_string() }),
        };
        if global.json {
            print(global, json, "")?;
        }
        let (_, options) = checked?;
        global.say(format_args!("all is in order to serve {} at http://{}", options.name, self.addr));
        Ok(ExitCode::SUCCESS)
    }

    /// All that is needed to serve.
    async fn load(&self, global: &Global) -> anyhow::Result<(Engine, ServerOptions)> {
        for (flag, value) in [("--max-tokens", self.max_tokens), ("--max-choices", self.max_choices)] {
            if value == 0 {
                return Err(argument(flag, "at least 1", "0").into());
            }
        }
        if self.name.as_ref().is_some_and(|name| name.trim().is_empty()) {
            return Err(argument("--name", "a name", "none").into());
        }
        let engine = chat::load(&self.model, &self.defense, self.isq.clone(), global).await?;
        let limits = self.limits.limits();
        let given = &engine.model().name;
        let folder = std::path::Path::new(given).canonicalize().ok();
        let short = folder.as_deref().and_then(|f| f.file_name()).map(|f| f.to_string_lossy().into_owned());
        let name = self.name.clone().or(short).unwrap_or_else(|| given.clone());
        // One picture at its limit in base64, which takes four bytes for three, and a conversation;
        // or several smaller ones.
        let max_body = usize::try_from(limits.max_bytes.saturating_mul(2))?.saturating_add(1 << 20);
        let options = ServerOptions {
            name,
            limits,
            max_body,
            max_tokens: self.max_tokens,
            max_pictures: self.max_pictures,
            max_choices: self.max_choices,
        };
        Ok((engine, options))
    }

    async fn listen(self, global: &Global) -> anyhow::Result<ExitCode> {
        // A taken port should not be found out after minutes of loading.
        let listener = bind(self.addr).await?;
        let address = listener.local_addr()?;
        let (engine, options) = self.load(global).await?;
        let name = options.name.clone();
        let json = json!({ "address": address.to_string(), "model": name, "defense": engine.defense() });
        let router = router(engine, options);
        if global.json {
            print(global, json, "")?;
        } else {
            global.say(format_args!("serving {name} at http://{address}"));
        }
        serve(listener, router).await?;
        Ok(ExitCode::SUCCESS)
    }
}
