//! `POST /v1/chat/completions`.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::{Stream, StreamExt};
use serde_json::{Value, json};

use super::Served;
use super::api::{ApiError, ChatRequest, Content, Message, Part, Stop, now};
use crate::engine::{Answer, Piece, Role, Sampling, Turn};
use crate::image::{DecodeLimits, decode};

/// Answers a conversation, whole or as an event stream.
pub async fn completions(
    State(served): State<Arc<Served>>,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body.map_err(|e| ApiError::new(e.status(), e.body_text(), None))?;
    if request.model != served.options.name {
        let (asked, name) = (&request.model, &served.options.name);
        return Err(ApiError::not_found(format!("no model `{asked}` here; this server has `{name}`")));
    }
    let sampling = sampling(&request, &served)?;
    let (stream, usage) = (request.stream, request.stream_options.as_ref().is_some_and(|o| o.include_usage));
    let (limits, most) = (served.options.limits, served.options.max_pictures);
    // Decoding takes milliseconds of a core and must not hold up other connections.
    let turns = tokio::task::spawn_blocking(move || turns(request.messages, &limits, most))
        .await
        .map_err(|e| crate::Error::Engine(e.to_string()))??;
    let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
    if stream {
        let mut pieces = Box::pin(served.engine.stream(&turns, &sampling).await?);
        // What cannot be answered at all is an error with its status, not an event.
        let first = match pieces.next().await {
            Some(first) => first?,
            None => return Err(crate::Error::Engine("an empty answer".into()).into()),
        };
        let pieces = futures::stream::once(async { Ok(first) }).chain(pieces);
        let events = events(pieces, id, served.options.name.clone(), usage);
        return Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response());
    }
    let answer = served.engine.answer(&turns, &sampling).await?;
    Ok(Json(completion(&answer, &id, &served.options.name)).into_response())
}

fn sampling(request: &ChatRequest, served: &Served) -> Result<Sampling, ApiError> {
    let most = served.options.max_tokens;
    let asked = request.max_completion_tokens.or(request.max_tokens);
    if let Some(asked) = asked.filter(|n| !(1..=most).contains(n)) {
        return Err(ApiError::bad_request(
            format!("max_tokens: expected 1 to {most}, found {asked}"),
            "max_tokens",
        ));
    }
    if request.n.is_some_and(|n| n != 1) {
        return Err(ApiError::bad_request("n: one answer a request", "n"));
    }
    let temperature = request.temperature.unwrap_or(0.0);
    if !(0.0..=2.0).contains(&temperature) {
        return Err(ApiError::bad_request(
            format!("temperature: expected 0 to 2, found {temperature}"),
            "temperature",
        ));
    }
    if request.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
        return Err(ApiError::bad_request("top_p: expected a number in (0, 1]", "top_p"));
    }
    if request.seed.is_some() && temperature > 0.0 {
        return Err(ApiError::bad_request(
            "seed: sampled answers cannot be seeded here; temperature 0 needs no seed",
            "seed",
        ));
    }
    if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        return Err(ApiError::bad_request("tools are not supported", "tools"));
    }
    let format = request.response_format.as_ref().and_then(|f| f.get("type")).and_then(Value::as_str);
    if format.is_some_and(|format| format != "text") {
        return Err(ApiError::bad_request("response_format: only `text` is supported", "response_format"));
    }
    let logprobs = request.logprobs.unwrap_or(false);
    if logprobs || request.top_logprobs.is_some() {
        return Err(ApiError::bad_request("logprobs are not supported", "logprobs"));
    }
    Ok(Sampling {
        max_tokens: asked.unwrap_or(most),
        temperature: Some(temperature),
        top_p: request.top_p,
        stop: match &request.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop.clone()],
            Some(Stop::Many(stops)) => stops.clone(),
        },
        top_logprobs: None,
        trace: false,
    })
}

fn turns(messages: Vec<Message>, limits: &DecodeLimits, most: usize) -> Result<Vec<Turn>, ApiError> {
    let mut pictures = 0;
    let mut turns = Vec::new();
    for (i, message) in messages.into_iter().enumerate() {
        let param = format!("messages[{i}]");
        let role = match message.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => {
                return Err(ApiError::bad_request(
                    format!("{param}.role: expected system, user or assistant, found `{other}`"),
                    &param,
                ));
            }
        };
        let mut turn = Turn::text(role, "");
        match message.content {
            None => return Err(ApiError::bad_request(format!("{param} has no content"), &param)),
            Some(Content::Text(text)) => turn.text = text,
            Some(Content::Parts(parts)) => {
                for part in parts {
                    match part {
                        Part::Text { text } if turn.text.is_empty() => turn.text = text,
                        Part::Text { text } => turn.text = format!("{}\n{text}", turn.text),
                        Part::ImageUrl { image_url } => {
                            pictures += 1;
                            if pictures > most {
                                return Err(ApiError::bad_request(
                                    format!("more than {most} pictures"),
                                    &param,
                                ));
                            }
                            let bytes = data_url(image_url.url()).map_err(|reason| {
                                ApiError::bad_request(format!("{param}: {reason}"), &param)
                            })?;
                            turn.images.push(decode(
                                &bytes,
                                &format!("{param}, picture {pictures}"),
                                limits,
                            )?);
                        }
                    }
                }
            }
        }
        turns.push(turn);
    }
    match turns.last() {
        Some(turn) if turn.role == Role::User => Ok(turns),
        _ => Err(ApiError::bad_request("the last message must be the user's", "messages")),
    }
}

/// The bytes of a `data:` URL in base64. Every other URL is refused.
fn data_url(url: &str) -> Result<Vec<u8>, String> {
    let Some(rest) = url.strip_prefix("data:") else {
        let scheme = url.split_once(':').map_or("none", |(scheme, _)| scheme);
        let scheme: String = scheme.chars().take(16).collect();
        return Err(format!("image_url: expected a `data:` URL, found scheme `{scheme}`"));
    };
    let Some((kind, data)) = rest.split_once(',') else {
        return Err("image_url: the `data:` URL has no comma".into());
    };
    if !kind.ends_with(";base64") {
        return Err("image_url: expected `data:image/...;base64,`".into());
    }
    STANDARD.decode(data.trim()).map_err(|e| format!("image_url: not base64: {e}"))
}

fn completion(answer: &Answer, id: &str, model: &str) -> Value {
    json!({
        "id": id,
        "object": "chat.completion",
        "created": now(),
        "model": model,
        "choices": [{
            "index": 0,
            "message": { "role": "assistant", "content": answer.text },
            "logprobs": null,
            "finish_reason": answer.finish_reason,
        }],
        "usage": usage(answer.prompt_tokens, answer.completion_tokens),
    })
}

fn usage(prompt: usize, completion: usize) -> Value {
    json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
}

fn events(
    pieces: impl Stream<Item = crate::Result<Piece>> + Send + 'static,
    id: String,
    model: String,
    include_usage: bool,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    async_stream::stream! {
        let created = now();
        let chunk = |choices: Value, usage: Value| {
            let mut chunk = json!({ "id": id, "object": "chat.completion.chunk", "created": created, "model": model, "choices": choices });
            if include_usage && let Some(fields) = chunk.as_object_mut() {
                fields.insert("usage".into(), usage);
            }
            Event::default().data(chunk.to_string())
        };
        yield Ok(chunk(json!([{ "index": 0, "delta": { "role": "assistant", "content": "" }, "finish_reason": null }]), Value::Null));
        let mut pieces = std::pin::pin!(pieces);
        while let Some(piece) = pieces.next().await {
            match piece {
                Ok(piece) => {
                    let delta = if piece.text.is_empty() { json!({}) } else { json!({ "content": piece.text }) };
                    yield Ok(chunk(json!([{ "index": 0, "delta": delta, "finish_reason": piece.finish_reason }]), Value::Null));
                    if let Some((prompt, completion)) = piece.usage.filter(|_| include_usage) {
                        yield Ok(chunk(json!([]), usage(prompt, completion)));
                    }
                }
                Err(error) => {
                    yield Ok(Event::default().data(ApiError::from(error).body().to_string()));
                    break;
                }
            }
        }
        yield Ok(Event::default().data("[DONE]"));
    }
}
