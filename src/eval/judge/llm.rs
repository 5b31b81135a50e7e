//! The judge behind an OpenAI-compatible endpoint.

use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::cache::Cache;
use super::{Case, JudgePrompt, Verdict, sha256};
use crate::{Error, Result};

/// No answer of one word is longer.
const MAX_BODY: u64 = 1 << 20;

/// Where a language model answers.
#[derive(Clone)]
pub struct Endpoint {
    /// The server's base, such as `http://127.0.0.1:8080/v1`, or its whole `.../chat/completions`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as a bearer token.
    pub key: Option<String>,
    /// For one attempt.
    pub timeout: Duration,
    /// Further attempts after one that a later one may mend: no connection, a time-out, 408, 429 and
    /// 5xx.
    pub retries: u32,
    /// Before the second attempt; twice as long before each further one, a minute at most. A server's
    /// `Retry-After` comes first.
    pub backoff: Duration,
    /// Questions asked at a time.
    pub parallel: usize,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key stays out of logs.
        f.debug_struct("Endpoint").field("url", &self.url).field("model", &self.model).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// With 60 seconds for an attempt, 4 retries after 1, 2, 4 and 8 seconds, and 4 questions at a time.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            key: None,
            timeout: Duration::from_secs(60),
            retries: 4,
            backoff: Duration::from_secs(1),
            parallel: 4,
        }
    }

    fn completions(&self) -> String {
        let base = self.url.trim_end_matches('/');
        if base.ends_with("/chat/completions") { base.into() } else { format!("{base}/chat/completions") }
    }
}

/// What the LLM judge made of a case. A failure is no verdict, and no default stands in for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LlmAnswer {
    /// It answered in one of the four words.
    Verdict(Verdict),
    /// It did not, or could not be asked; the reason.
    Failed(String),
}

impl LlmAnswer {
    /// The verdict, if there is one.
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Self::Verdict(verdict) => Some(*verdict),
            Self::Failed(_) => None,
        }
    }
}

/// Asks a language model which object a response names: at temperature 0, with the prompt of
/// `prompts/judge.toml`, and not told which of the two is in the picture.
#[derive(Debug)]
pub struct LlmJudge {
    endpoint: Endpoint,
    prompt: JudgePrompt,
    agent: ureq::Agent,
    cache: Option<Cache>,
}

/// Why an attempt came to nothing.
enum Trouble {
    /// A later attempt may do better, after this long if the server says so.
    Passing(String, Option<Duration>),
    /// This case cannot be judged.
    Case(String),
    /// No case can: a wrong address, model or key.
    All(String),
}

impl LlmJudge {
    /// A judge at this endpoint. Verdicts are kept in the file `cache`, where one is given, by
    /// everything they depend on; failures are not.
    ///
    /// # Errors
    /// If the address is none of HTTP, or the cache cannot be opened.
    pub fn new(endpoint: Endpoint, cache: Option<&Path>) -> Result<Self> {
        if !endpoint.url.starts_with("http://") && !endpoint.url.starts_with("https://") {
            return Err(Error::argument("--judge", "http://HOST/v1 or https://HOST/v1", &endpoint.url));
        }
        let agent = ureq::AgentBuilder::new().timeout(endpoint.timeout).redirects(0).build();
        let cache = cache.map(Cache::open).transpose()?;
        Ok(Self { endpoint, prompt: JudgePrompt::new()?, agent, cache })
    }

    /// What decides an answer, as a run's manifest may hold it; without the key.
    pub fn decides(&self) -> Value {
        json!({
            "url": self.endpoint.completions(),
            "model": self.endpoint.model,
            "prompt": self.prompt.version,
            "prompt_sha256": sha256(&[&self.prompt.system, &self.prompt.user]),
        })
    }

    fn body(&self, case: &Case) -> Value {
        json!({
            "model": self.endpoint.model,
            "temperature": 0,
            "max_tokens": self.prompt.max_tokens,
            "messages": [
                { "role": "system", "content": self.prompt.system },
                { "role": "user", "content": self.prompt.ask(case) },
            ],
        })
    }

    /// Judges one case. A failure concerns it alone.
    ///
    /// # Errors
    /// If no case can be judged: the server refuses the key (401, 403) or knows no such address or model
    /// (404), or the cache cannot be written.
    pub fn judge(&self, case: &Case) -> Result<LlmAnswer> {
        let body = self.body(case);
        let ask = self.prompt.ask(case);
        let tokens = self.prompt.max_tokens.to_string();
        let url = self.endpoint.completions();
        let key = sha256(&["radapt judge 1", &url, &self.endpoint.model, &tokens, &self.prompt.system, &ask]);
        if let Some(cache) = &self.cache
            && let Some(verdict) = cache.get(&key).and_then(|answer| JudgePrompt::parse(case, &answer))
        {
            return Ok(LlmAnswer::Verdict(verdict));
        }
        let (mut attempt, mut wait) = (0, self.endpoint.backoff);
        let answer = loop {
            match self.attempt(&url, &body) {
                Ok(answer) => break answer,
                Err(Trouble::Case(reason)) => return Ok(LlmAnswer::Failed(reason)),
                Err(Trouble::All(reason)) => {
                    return Err(Error::argument("--judge", "an endpoint that answers", reason));
                }
                Err(Trouble::Passing(reason, _)) if attempt >= self.endpoint.retries => {
                    let reason = format!("{reason}, {} attempts", attempt + 1);
                    return Ok(LlmAnswer::Failed(reason));
                }
                Err(Trouble::Passing(_, after)) => {
                    std::thread::sleep(after.unwrap_or(wait).min(Duration::from_secs(60)));
                    attempt += 1;
                    wait = wait.saturating_mul(2);
                }
            }
        };
        let Some(verdict) = JudgePrompt::parse(case, &answer) else {
            let shown: String = answer.chars().take(80).collect();
            return Ok(LlmAnswer::Failed(format!("expected A, B, both or neither, found `{shown}`")));
        };
        if let Some(cache) = &self.cache {
            cache.put(&key, &self.endpoint.model, &answer)?;
        }
        Ok(LlmAnswer::Verdict(verdict))
    }

    fn attempt(&self, url: &str, body: &Value) -> std::result::Result<String, Trouble> {
        let mut request = self.agent.post(url).set("content-type", "application/json");
        if let Some(key) = &self.endpoint.key {
            request = request.set("authorization", &format!("Bearer {key}"));
        }
        let response = match request.send_string(&body.to_string()) {
            Ok(response) if response.status() == 200 => response,
            Ok(response) => return Err(Trouble::Case(format!("status {}", response.status()))),
            Err(ureq::Error::Status(code, response)) => {
                let after = response.header("retry-after").and_then(|text| text.trim().parse().ok());
                let text = read(response).unwrap_or_default();
                let shown: String = text.chars().take(200).collect();
                let reason = format!("status {code}: {}", shown.replace('\n', " "));
                return Err(match code {
                    408 | 429 | 500..=599 => Trouble::Passing(reason, after.map(Duration::from_secs)),
                    401 | 403 | 404 => Trouble::All(reason),
                    _ => Trouble::Case(reason),
                });
            }
            Err(ureq::Error::Transport(error)) => return Err(Trouble::Passing(error.to_string(), None)),
        };
        // A connection that breaks off within the body may hold the next time.
        let text = read(response).map_err(|e| Trouble::Passing(e.to_string(), None))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| Trouble::Case(format!("the answer is no JSON: {e}")))?;
        let content = value.pointer("/choices/0/message/content").and_then(Value::as_str);
        content
            .map(String::from)
            .ok_or_else(|| Trouble::Case("the answer has no text at choices[0].message.content".into()))
    }

    /// Judges many, several at a time, and answers in their order; `told` hears how many are done.
    ///
    /// # Errors
    /// As [`LlmJudge::judge`]; the first one ends it.
    pub fn judge_all(&self, cases: &[Case], told: &(dyn Fn(usize) + Sync)) -> Result<Vec<LlmAnswer>> {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let found: Mutex<Vec<Option<LlmAnswer>>> = Mutex::new(vec![None; cases.len()]);
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..self.endpoint.parallel.clamp(1, cases.len().max(1)) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        let Some(case) = cases.get(i) else { return };
                        match self.judge(case) {
                            Ok(answer) => {
                                found.lock().unwrap_or_else(PoisonError::into_inner)[i] = Some(answer);
                                told(done.fetch_add(1, Ordering::Relaxed) + 1);
                            }
                            Err(error) => {
                                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                                next.store(cases.len(), Ordering::Relaxed);
                                return;
                            }
                        }
                    }
                });
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let missing = || LlmAnswer::Failed("was not asked".into());
        Ok(found.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect())
    }
}

fn read(response: ureq::Response) -> std::io::Result<String> {
    let mut text = String::new();
    response.into_reader().take(MAX_BODY).read_to_string(&mut text)?;
    Ok(text)
}
