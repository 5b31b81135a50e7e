//! `radapt serve`

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use radapt::server::{ServerOptions, bind, router, serve};
use serde_json::json;

use super::options::{DefenseFlags, ModelOptions, PictureLimits, argument};
use super::{Global, chat, print};

/// Serve a model over OpenAI's API: POST /v1/chat/completions, GET /v1/models, GET /health.
///
/// Pictures come as `data:` URLs; the server reads no files and fetches nothing.
#[derive(Args)]
pub struct Serve {
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
    /// Quantise the language model as it is loaded (q4k, q8_0, 4, 8, ...)
    #[arg(long, value_name = "TYPE", help_heading = "Answer")]
    isq: Option<String>,
}

impl Serve {
    pub fn run(self, global: &Global) -> anyhow::Result<ExitCode> {
        if self.max_tokens == 0 {
            return Err(argument("--max-tokens", "at least 1", "0").into());
        }
        tokio::runtime::Runtime::new()?.block_on(self.listen(global))
    }

    async fn listen(self, global: &Global) -> anyhow::Result<ExitCode> {
        // A taken port should not be found out after minutes of loading.
        let listener = bind(self.addr).await?;
        let address = listener.local_addr()?;
        let engine = chat::load(&self.model, &self.defense, self.isq.clone(), global).await?;
        let limits = self.limits.limits();
        let given = &engine.model().name;
        let folder = std::path::Path::new(given).canonicalize().ok();
        let short = folder.as_deref().and_then(|f| f.file_name()).map(|f| f.to_string_lossy().into_owned());
        let name = self.name.or(short).unwrap_or_else(|| given.clone());
        // One picture at its limit in base64, which takes four bytes for three, and a conversation;
        // or several smaller ones.
        let max_body = usize::try_from(limits.max_bytes.saturating_mul(2))?.saturating_add(1 << 20);
        let options = ServerOptions {
            name: name.clone(),
            limits,
            max_body,
            max_tokens: self.max_tokens,
            max_pictures: self.max_pictures,
        };
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
