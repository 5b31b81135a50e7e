//! `POST /v1/chat/completions`.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde_json::{Value, json};

use super::Served;
use super::api::{
    ApiError, ChatRequest, JsonSchema, ResponseFormat, Stop, ToolChoice, ToolDefinition, is_name, now,
    refuse, within,
};
use super::conversation::{Api, Reader};
use super::gate::{SPANS, Streamed};
use super::metrics::Metrics;
use super::models::Model;
use crate::Error;
use crate::engine::{Alternative, Calls, Engine, Grammar, Piece, Said, Sampling, Token, Tool, Turn};

/// How many calls one answer may have.
const MOST_CALLS: usize = 16;

/// Answers a conversation, whole or as an event stream.
pub async fn completions(
    State(served): State<Arc<Served>>,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let model = served.named(&request.model)?;
    let asked = Asked::read(&request, &served)?;
    let mut reader = Reader::new(&served, Api::Chat);
    let turns = reader.messages(&request.messages).await?;
    let seen = reader.seen();
    let flagged = served.flagged(&seen);
    let answers = asked.answers(&served, model, &turns).await?;
    let head = Head::new(model, model.x_radapt(flagged));
    let response = match asked.stream {
        true => stream(Box::pin(events(answers, head, asked.include_usage))).await?,
        false => Json(completion(answers, head).await?).into_response(),
    };
    Ok((model.headers(flagged), response).into_response())
}

/// Events as a response.
///
/// # Errors
/// If there is no first event: what cannot be answered at all is an error with its status.
pub async fn stream(
    mut events: Pin<Box<dyn Stream<Item = Result<String, ApiError>> + Send>>,
) -> Result<Response, ApiError> {
    let first = match events.next().await {
        Some(first) => first?,
        None => return Err(Error::Engine("an empty answer".into()).into()),
    };
    let events = futures::stream::once(async { Ok(first) }).chain(events).map(|event| {
        let data = event.unwrap_or_else(|error| error.body().to_string());
        Ok::<_, Infallible>(Event::default().data(data))
    });
    let done = futures::stream::once(async { Ok(Event::default().data("[DONE]")) });
    let mut response = Sse::new(events.chain(done)).keep_alive(KeepAlive::default()).into_response();
    response.extensions_mut().insert(Streamed);
    Ok(response)
}

/// The whole answer.
pub async fn completion(answers: Answers, head: Head) -> Result<Value, ApiError> {
    let whole = answers.into_iter().map(|(pieces, choice)| choice.whole(pieces));
    let choices = futures::future::try_join_all(whole).await?;
    let prompt = choices.first().map_or(0, |choice| choice.usage.0);
    let completion = choices.iter().map(|choice| choice.usage.1).sum();
    let choices: Vec<Value> = choices.into_iter().map(Choice::json).collect();
    let mut completion = head.json("chat.completion", choices, Some(usage(prompt, completion)));
    completion["system_fingerprint"] = fingerprint();
    completion["x_radapt"] = head.x_radapt;
    Ok(completion)
}

/// A request's answers as they begin.
pub type Answers = Vec<(Pieces, Choice)>;

/// A boxed answer in pieces.
pub type Pieces = Pin<Box<dyn Stream<Item = crate::Result<Piece>> + Send>>;

/// Begins an answer, whose tokens are counted at its end.
pub async fn pieces(
    metrics: &Arc<Metrics>,
    engine: &Engine,
    turns: &[Turn],
    tools: &[Tool],
    sampling: &Sampling,
) -> Result<Pieces, ApiError> {
    let metrics = metrics.clone();
    // It ends with the stream, which is when the closure goes.
    let span = tracing::info_span!(
        target: SPANS,
        "answer",
        gen_ai.usage.input_tokens = tracing::field::Empty,
        gen_ai.usage.output_tokens = tracing::field::Empty,
    );
    let pieces = engine.stream_with(turns, tools, sampling).await?;
    Ok(Box::pin(pieces.inspect(move |piece| {
        if let Ok(Piece { finish_reason: Some(_), usage: (prompt, completion), .. }) = piece {
            span.record("gen_ai.usage.input_tokens", prompt);
            span.record("gen_ai.usage.output_tokens", completion);
            metrics.count_tokens(*prompt, *completion);
        }
    })))
}

/// What an answer is held to.
pub enum Hold {
    /// Nothing.
    Free,
    /// JSON of this schema, which the named field gave.
    Schema(Value, &'static str),
    /// Up to so many calls of the tools, and nothing else unless it is free.
    Calls { most: usize, free: bool },
}

/// Compiles what an answer is held to, away from the threads that serve.
pub async fn compile(engine: &Arc<Engine>, hold: &Hold, tools: &[Tool]) -> Result<Option<Grammar>, ApiError> {
    let engine = engine.clone();
    let (grammar, param) = match hold {
        Hold::Free => return Ok(None),
        Hold::Schema(schema, param) => {
            let schema = schema.clone();
            (tokio::task::spawn_blocking(move || engine.json_grammar(&schema)), *param)
        }
        Hold::Calls { most, free } => {
            let (tools, most, free) = (tools.to_vec(), *most, *free);
            (tokio::task::spawn_blocking(move || engine.call_grammar(&tools, most, free)), "tools")
        }
    };
    let grammar = grammar.await.map_err(|e| Error::Engine(e.to_string()))?;
    grammar.map(Some).map_err(|error| ApiError::from(error).at(param))
}

/// A request whose fields are in order.
pub struct Asked {
    pub sampling: Sampling,
    n: usize,
    tools: Vec<Tool>,
    hold: Hold,
    /// Whether the answer may have calls, and must be nothing else.
    calls: Option<bool>,
    most_calls: usize,
    /// Whether one function was named, which ends with `stop`.
    named: bool,
    pub stream: bool,
    pub include_usage: bool,
}

impl Asked {
    /// Begins the answers of a model.
    pub async fn answers(&self, served: &Served, model: &Model, turns: &[Turn]) -> Result<Answers, ApiError> {
        let engine = &model.engine;
        let hold = compile(engine, &self.hold, &self.tools).await?;
        let mut answers = Vec::new();
        for choice in 0..self.n {
            let sampling = Sampling { choice: choice as u64, grammar: hold.clone(), ..self.sampling.clone() };
            let pieces = pieces(&served.metrics, engine, turns, &self.tools, &sampling).await?;
            answers.push((pieces, Choice::new(choice, self)));
        }
        Ok(answers)
    }

    pub fn read(request: &ChatRequest, served: &Served) -> Result<Self, ApiError> {
        refuse(&request.rest, "")?;
        request.harmless.check()?;
        let stream = request.stream.unwrap_or(false);
        let include_usage = match &request.stream_options {
            None => false,
            Some(_) if !stream => {
                return Err(ApiError::bad_request(
                    "stream_options: only where stream is true",
                    "stream_options",
                ));
            }
            Some(options) => {
                let mut rest = options.rest.clone();
                // Padding against onlookers who measure: there is none, and `false` asks for none.
                rest.retain(|field, value| field != "include_obfuscation" || *value != json!(false));
                refuse(&rest, "stream_options")?;
                options.include_usage.unwrap_or(false)
            }
        };
        let most = served.options.max_choices;
        let n = request.n.unwrap_or(1);
        if !(1..=most).contains(&n) {
            return Err(ApiError::bad_request(format!("n: expected 1 to {most}, found {n}"), "n"));
        }
        let tools = tools(request.tools.as_deref().unwrap_or_default())?;
        let strict = request.tools.iter().flatten().any(|tool| tool.function.strict == Some(true));
        let parallel = request.parallel_tool_calls.unwrap_or(true);
        let (tools, calls, most_calls, named) = choice(tools, request.tool_choice.as_ref(), parallel)?;
        let hold = match format(request.response_format.as_ref())? {
            Hold::Free => match calls {
                Some(true) => Hold::Calls { most: most_calls, free: false },
                // A call that was not asked for keeps to its schema where that is promised.
                Some(false) if strict => Hold::Calls { most: most_calls, free: true },
                _ => Hold::Free,
            },
            _ if calls.is_some() => {
                let message = "response_format: not together with tools, unless tool_choice is none";
                return Err(ApiError::bad_request(message, "response_format"));
            }
            hold => hold,
        };
        Ok(Self {
            // An answer with calls may end before its text does.
            sampling: Sampling { whole: !stream && calls.is_none(), ..sampling(request, served)? },
            n,
            tools,
            hold,
            calls,
            most_calls,
            named,
            stream,
            include_usage,
        })
    }
}

fn sampling(request: &ChatRequest, served: &Served) -> Result<Sampling, ApiError> {
    let max_tokens = match (request.max_completion_tokens, request.max_tokens) {
        (Some(new), Some(old)) if new != old => {
            let message = "max_tokens: the old name of max_completion_tokens, and both are given";
            return Err(ApiError::bad_request(message, "max_tokens"));
        }
        (Some(new), _) => max_tokens(Some(new), "max_completion_tokens", served)?,
        (None, old) => max_tokens(old, "max_tokens", served)?,
    };
    let top_logprobs = match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (_, Some(n)) if n > 20 => {
            return Err(ApiError::bad_request(
                format!("top_logprobs: expected 0 to 20, found {n}"),
                "top_logprobs",
            ));
        }
        (false, Some(_)) => {
            return Err(ApiError::bad_request("top_logprobs: only where logprobs is true", "top_logprobs"));
        }
        (true, top) => Some(top.unwrap_or(0)),
        (false, None) => None,
    };
    let mut bias = Vec::new();
    for (id, &value) in request.logit_bias.iter().flatten() {
        let id: u32 =
            id.parse().map_err(|_| ApiError::bad_request("logit_bias: expected token ids", "logit_bias"))?;
        within("logit_bias", Some(value), -100.0..=100.0)?;
        bias.push((id, value as f32));
    }
    if bias.len() > 300 {
        return Err(ApiError::bad_request("logit_bias: expected up to 300 tokens", "logit_bias"));
    }
    Ok(Sampling {
        max_tokens,
        temperature: Some(temperature(request.temperature)?),
        top_p: top_p(request.top_p)?,
        seed: request.seed.map(i64::cast_unsigned),
        presence_penalty: within("presence_penalty", request.presence_penalty, -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: within("frequency_penalty", request.frequency_penalty, -2.0..=2.0)?.unwrap_or(0.0),
        bias,
        stop: Stop::texts(request.stop.as_ref())?,
        top_logprobs,
        ..Sampling::default()
    })
}

/// The most tokens of an answer.
pub fn max_tokens(asked: Option<usize>, field: &str, served: &Served) -> Result<usize, ApiError> {
    let most = served.options.max_tokens;
    match asked {
        Some(asked) if !(1..=most).contains(&asked) => {
            Err(ApiError::bad_request(format!("{field}: expected 1 to {most}, found {asked}"), field))
        }
        asked => Ok(asked.unwrap_or(most)),
    }
}

/// Greedy where not given, so that an answer is the same every time.
pub fn temperature(asked: Option<f64>) -> Result<f64, ApiError> {
    Ok(within("temperature", asked, 0.0..=2.0)?.unwrap_or(0.0))
}

/// Nucleus sampling.
pub fn top_p(asked: Option<f64>) -> Result<Option<f64>, ApiError> {
    match asked {
        Some(p) if !(p > 0.0 && p <= 1.0) => {
            Err(ApiError::bad_request(format!("top_p: expected a number in (0, 1], found {p}"), "top_p"))
        }
        p => Ok(p),
    }
}

fn tools(definitions: &[ToolDefinition]) -> Result<Vec<Tool>, ApiError> {
    let bad = |reason: String| Err(ApiError::bad_request(format!("tools: {reason}"), "tools"));
    let mut tools: Vec<Tool> = Vec::new();
    if definitions.len() > 128 {
        return bad("expected up to 128".into());
    }
    for (i, ToolDefinition { kind, function, rest }) in definitions.iter().enumerate() {
        refuse(rest, &format!("tools[{i}]"))?;
        refuse(&function.rest, &format!("tools[{i}].function"))?;
        if kind != "function" {
            return bad(format!("[{i}]: expected type function"));
        }
        if !is_name(&function.name) {
            return bad(format!("[{i}]: name: expected 1 to 64 letters, digits, `_` and `-`"));
        }
        if tools.iter().any(|tool| tool.name == function.name) {
            return bad(format!("[{i}]: another function has this name"));
        }
        let kind = function.parameters.as_ref().and_then(|parameters| parameters.get("type"));
        if kind.is_some_and(|kind| kind != "object") {
            return bad(format!("[{i}]: parameters: expected a schema of type object"));
        }
        tools.push(Tool {
            name: function.name.clone(),
            description: function.description.clone(),
            parameters: function.parameters.clone(),
        });
    }
    Ok(tools)
}

/// Which tools the model is told of, whether it may (`false`) or must (`true`) call, how often, and
/// whether one was named.
type Chosen = (Vec<Tool>, Option<bool>, usize, bool);

fn choice(mut tools: Vec<Tool>, choice: Option<&ToolChoice>, parallel: bool) -> Result<Chosen, ApiError> {
    let bad = |reason: &str| Err(ApiError::bad_request(format!("tool_choice: {reason}"), "tool_choice"));
    let most = if parallel { MOST_CALLS } else { 1 };
    if tools.is_empty() {
        return match choice {
            None => Ok((tools, None, most, false)),
            Some(ToolChoice::Word(word)) if word == "none" => Ok((tools, None, most, false)),
            Some(_) => bad("only with tools"),
        };
    }
    match choice {
        None => Ok((tools, Some(false), most, false)),
        Some(ToolChoice::Word(word)) => match word.as_str() {
            "none" => Ok((Vec::new(), None, most, false)),
            "auto" => Ok((tools, Some(false), most, false)),
            "required" => Ok((tools, Some(true), most, false)),
            _ => bad("expected none, auto, required or a function"),
        },
        Some(ToolChoice::Function { kind, function }) => {
            if kind != "function" {
                return bad("expected type function");
            }
            tools.retain(|tool| tool.name == function.name);
            if tools.is_empty() {
                return bad("none of the tools has this name");
            }
            Ok((tools, Some(true), 1, true))
        }
    }
}

/// What `response_format` holds the answer to.
fn format(format: Option<&ResponseFormat>) -> Result<Hold, ApiError> {
    let Some(ResponseFormat { kind, json_schema, rest }) = format else { return Ok(Hold::Free) };
    refuse(rest, "response_format")?;
    match (kind.as_str(), json_schema) {
        ("text", None) => Ok(Hold::Free),
        ("json_object", None) => Ok(Hold::Schema(json!({ "type": "object" }), "response_format")),
        ("json_schema", Some(JsonSchema { name, schema, rest, .. })) => {
            refuse(rest, "response_format.json_schema")?;
            if !is_name(name) {
                let message = "response_format: name: expected 1 to 64 letters, digits, `_` and `-`";
                return Err(ApiError::bad_request(message, "response_format"));
            }
            schema_of(schema.as_ref(), "response_format")
        }
        _ => {
            let message =
                "response_format: expected type text, json_object, or json_schema with a json_schema";
            Err(ApiError::bad_request(message, "response_format"))
        }
    }
}

/// A JSON schema as what an answer is held to.
pub fn schema_of(schema: Option<&Value>, field: &'static str) -> Result<Hold, ApiError> {
    match schema {
        None => Ok(Hold::Schema(json!({ "type": "object" }), field)),
        Some(schema @ Value::Object(_)) => Ok(Hold::Schema(schema.clone(), field)),
        Some(_) => Err(ApiError::bad_request(format!("{field}: schema: expected an object"), field)),
    }
}

/// One of a request's answers as it comes.
pub struct Choice {
    index: usize,
    calls: Option<Calls>,
    named: bool,
    logprobs: bool,
    text: String,
    reasoning: String,
    /// Id, name and arguments.
    called: Vec<(String, String, String)>,
    tokens: Vec<Value>,
    finish: Option<String>,
    /// Tokens of the prompt and the answer so far.
    usage: (usize, usize),
}

impl Choice {
    fn new(index: usize, asked: &Asked) -> Self {
        Self {
            index,
            calls: asked.calls.map(|certain| Calls::new(&asked.tools, certain, asked.most_calls)),
            named: asked.named,
            logprobs: asked.sampling.top_logprobs.is_some(),
            text: String::new(),
            reasoning: String::new(),
            called: Vec::new(),
            tokens: Vec::new(),
            finish: None,
            usage: (0, 0),
        }
    }

    /// Takes a piece; what is new in it, as deltas.
    fn take(&mut self, piece: Piece) -> Vec<Value> {
        self.usage = piece.usage;
        self.tokens.extend(piece.tokens.iter().filter(|token| !token.ends).map(logprob));
        let mut deltas = Vec::new();
        if !piece.reasoning.is_empty() {
            self.reasoning.push_str(&piece.reasoning);
            deltas.push(json!({ "reasoning_content": piece.reasoning }));
        }
        let last = piece.finish_reason.is_some();
        let said = match &mut self.calls {
            Some(calls) => calls.push(&piece.text, last),
            None if piece.text.is_empty() => Vec::new(),
            None => vec![Said::Text(piece.text)],
        };
        for said in said {
            deltas.push(match said {
                Said::Text(text) => {
                    self.text.push_str(&text);
                    json!({ "content": text })
                }
                Said::Call { index, name } => {
                    let id = format!("call_{}", uuid::Uuid::new_v4().simple());
                    let function = json!({ "name": name, "arguments": "" });
                    let call = json!({ "index": index, "id": id, "type": "function", "function": function });
                    self.called.push((id, name, String::new()));
                    json!({ "tool_calls": [call] })
                }
                Said::Arguments { index, text } => {
                    let call = json!({ "index": index, "function": { "arguments": text } });
                    if let Some((.., arguments)) = self.called.get_mut(index) {
                        arguments.push_str(&text);
                    }
                    json!({ "tool_calls": [call] })
                }
            });
        }
        let complete = self.calls.as_ref().is_some_and(Calls::complete);
        let reason = piece.finish_reason.or(complete.then(|| "stop".to_string()));
        self.finish = reason.map(|reason| {
            let calls = reason == "stop" && !self.called.is_empty() && !self.named;
            if calls { "tool_calls".to_string() } else { reason }
        });
        deltas
    }

    async fn whole(mut self, mut pieces: Pieces) -> Result<Self, ApiError> {
        while self.finish.is_none() {
            match pieces.next().await {
                Some(piece) => drop(self.take(piece?)),
                None => return Err(Error::Engine("the answer has no end".into()).into()),
            }
        }
        Ok(self)
    }

    fn json(self) -> Value {
        let content =
            if self.called.is_empty() || !self.text.is_empty() { json!(self.text) } else { Value::Null };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = json!(self.reasoning);
        }
        if !self.called.is_empty() {
            let calls = self.called.into_iter().map(|(id, name, arguments)| {
                json!({ "id": id, "type": "function", "function": { "name": name, "arguments": arguments } })
            });
            message["tool_calls"] = calls.collect();
        }
        let logprobs = if self.logprobs { logprobs(self.tokens) } else { Value::Null };
        json!({ "index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish })
    }
}

fn logprobs(tokens: Vec<Value>) -> Value {
    json!({ "content": tokens, "refusal": null })
}

/// A token's log-probability in OpenAI's shape.
fn logprob(token: &Token) -> Value {
    let mut json = entry(&token.bytes, token.logprob);
    json["top_logprobs"] =
        token.top.iter().map(|Alternative { bytes, logprob, .. }| entry(bytes, *logprob)).collect();
    json
}

fn entry(bytes: &[u8], logprob: f32) -> Value {
    // JSON has no infinity; OpenAI writes this for what cannot come.
    let logprob = logprob.max(-9999.0);
    json!({ "token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes })
}

/// What every chunk of an answer begins with, and `x_radapt`, which stands in the first.
pub struct Head {
    id: String,
    created: u64,
    model: String,
    x_radapt: Value,
}

impl Head {
    pub fn new(model: &Model, x_radapt: Value) -> Self {
        let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
        Self { id, created: now(), model: model.name.clone(), x_radapt }
    }

    fn json(&self, object: &str, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut json = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            json["usage"] = usage;
        }
        json
    }
}

fn fingerprint() -> Value {
    json!(concat!("radapt-", env!("CARGO_PKG_VERSION")))
}

fn usage(prompt: usize, completion: usize) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
}

/// The events of a streamed answer, without the last; an error ends them.
pub fn events(
    answers: Answers,
    mut head: Head,
    include_usage: bool,
) -> impl Stream<Item = Result<String, ApiError>> + Send {
    async_stream::stream! {
        let mut x_radapt = Some(head.x_radapt.take());
        let mut chunk = |index: usize, delta: Value, logprobs: Value, finish: Option<&str>| {
            let choice = json!({ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish });
            let mut chunk = head.json("chat.completion.chunk", vec![choice], include_usage.then_some(Value::Null));
            chunk["system_fingerprint"] = fingerprint();
            if let Some(x_radapt) = x_radapt.take() {
                chunk["x_radapt"] = x_radapt;
            }
            chunk.to_string()
        };
        let (pieces, mut choices): (Vec<Pieces>, Vec<Choice>) = answers.into_iter().unzip();
        // Pieces of all choices as they come; one that has its end is not asked again.
        let numbered = pieces.into_iter().enumerate().map(|(i, pieces)| pieces.map(move |piece| (i, piece)).boxed());
        let mut pieces = futures::stream::select_all(numbered);
        let mut begun = vec![false; choices.len()];
        let mut open = choices.len();
        while open > 0 {
            let Some((i, piece)) = pieces.next().await else {
                yield Err(Error::Engine("the answer has no end".into()).into());
                return;
            };
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    yield Err(error.into());
                    return;
                }
            };
            let choice = &mut choices[i];
            if choice.finish.is_some() {
                continue;
            }
            if !begun[i] {
                begun[i] = true;
                let delta = json!({ "role": "assistant", "content": "", "refusal": null });
                yield Ok(chunk(i, delta, Value::Null, None));
            }
            let mut deltas = choice.take(piece);
            let tokens = std::mem::take(&mut choice.tokens);
            if deltas.is_empty() && !tokens.is_empty() {
                deltas.push(json!({}));
            }
            let mut entries = if choice.logprobs { logprobs(tokens) } else { Value::Null };
            for delta in deltas {
                yield Ok(chunk(i, delta, entries.take(), None));
            }
            if let Some(finish) = &choice.finish {
                open -= 1;
                yield Ok(chunk(i, json!({}), Value::Null, Some(finish)));
            }
        }
        if include_usage {
            let prompt = choices.first().map_or(0, |choice| choice.usage.0);
            let completion = choices.iter().map(|choice| choice.usage.1).sum();
            let mut last = head.json("chat.completion.chunk", Vec::new(), Some(usage(prompt, completion)));
            last["system_fingerprint"] = fingerprint();
            yield Ok(last.to_string());
        }
    }
}
