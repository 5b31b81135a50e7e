//! `POST /v1/responses`, without a memory: every request brings its whole conversation.
//!
//! mistralrs-server-core's own handler fetches pictures from any address and reads them from files,
//! so it cannot stand behind our intake; this one shares that of chat completions.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Served;
use super::api::{ApiError, Content, Harmless, is_name, now, refuse};
use super::chat::{Hold, Pieces, compile, max_tokens, pieces, schema_of, temperature, top_p};
use super::conversation::{Api, Reader};
use super::gate::Streamed;
use super::suspicion::Suspicion;
use crate::Error;
use crate::engine::{Role, Sampling, Turn};

/// The body of `POST /v1/responses`.
#[derive(Debug, Deserialize)]
pub struct ResponsesRequest {
    model: String,
    input: Input,
    instructions: Option<String>,
    max_output_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    text: Option<TextFormat>,
    stream: Option<bool>,
    #[serde(flatten)]
    harmless: Harmless,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Input {
    Text(String),
    Items(Vec<Item>),
}

#[derive(Debug, Deserialize)]
struct Item {
    #[serde(rename = "type")]
    kind: Option<String>,
    role: Option<String>,
    content: Option<Content>,
    /// Of an answer of ours that comes back.
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(rename = "status")]
    _status: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct TextFormat {
    format: Option<Format>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
    name: Option<String>,
    #[serde(rename = "description")]
    _description: Option<String>,
    schema: Option<Value>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Answers, whole or as an event stream.
pub async fn create(
    State(served): State<Arc<Served>>,
    body: Result<Json<ResponsesRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let model = served.named(&request.model)?;
    let mut rest = request.rest.clone();
    // What asks for what is done anyway.
    rest.retain(|field, value| match field.as_str() {
        "background" | "parallel_tool_calls" => value.is_object() || *value == json!(field == "background"),
        "tools" | "include" => value.as_array().is_none_or(|list| !list.is_empty()),
        "tool_choice" => !["auto", "none"].map(Value::from).contains(value),
        "truncation" => *value != json!("disabled"),
        _ => true,
    });
    refuse(&rest, "")?;
    request.harmless.check()?;
    let (hold, format) = held(request.text.as_ref())?;
    let sampling = Sampling {
        max_tokens: max_tokens(request.max_output_tokens, "max_output_tokens", &served)?,
        temperature: Some(temperature(request.temperature)?),
        top_p: top_p(request.top_p)?,
        whole: !request.stream.unwrap_or(false),
        ..Sampling::default()
    };
    let (turns, seen) = turns(&request, &served).await?;
    let flagged = served.flagged(&seen);
    let headers = model.headers(flagged);
    let sampling = Sampling { grammar: compile(&model.engine, &hold, &[]).await?, ..sampling };
    let pieces = pieces(&served.metrics, &model.engine, &turns, &[], &sampling).await?;
    let shape = Shape {
        id: format!("resp_{}", uuid::Uuid::new_v4().simple()),
        message: format!("msg_{}", uuid::Uuid::new_v4().simple()),
        created: now(),
        format,
        temperature: sampling.temperature.unwrap_or(0.0),
        x_radapt: model.x_radapt(flagged),
        request,
    };
    if shape.request.stream.unwrap_or(false) {
        let mut events = Box::pin(events(pieces, shape));
        // What cannot be answered at all is an error with its status, not an event.
        let first = match events.next().await {
            Some(first) => first?,
            None => return Err(Error::Engine("an empty answer".into()).into()),
        };
        let events = futures::stream::once(async { Ok(first) }).chain(events).map(|event| {
            let json = event.unwrap_or_else(|error| {
                let body = error.body();
                json!({ "type": "error", "code": body["error"]["type"], "message": error.message(), "param": null })
            });
            let name = json["type"].as_str().unwrap_or_default().to_string();
            Ok::<_, Infallible>(Event::default().event(name).data(json.to_string()))
        });
        let mut response = Sse::new(events).keep_alive(KeepAlive::default()).into_response();
        response.extensions_mut().insert(Streamed);
        return Ok((headers, response).into_response());
    }
    let (mut pieces, mut text, mut end) = (pieces, String::new(), None);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        text.push_str(&piece.text);
        end = piece.finish_reason.map(|reason| (reason, piece.usage));
    }
    let Some((reason, usage)) = end else {
        return Err(Error::Engine("the answer has no end".into()).into());
    };
    Ok((headers, Json(shape.response(&text, Some((&reason, usage))))).into_response())
}

fn held(text: Option<&TextFormat>) -> Result<(Hold, Value), ApiError> {
    let plain = (Hold::Free, json!({ "type": "text" }));
    let Some(TextFormat { format, rest }) = text else { return Ok(plain) };
    refuse(rest, "text")?;
    let Some(format) = format else { return Ok(plain) };
    refuse(&format.rest, "text.format")?;
    match (format.kind.as_str(), &format.name) {
        ("text", None) => Ok(plain),
        ("json_object", None) => {
            Ok((Hold::Schema(json!({ "type": "object" }), "text"), json!({ "type": "json_object" })))
        }
        ("json_schema", Some(name)) if is_name(name) => {
            let shown =
                json!({ "type": "json_schema", "name": name, "schema": format.schema, "strict": true });
            Ok((schema_of(format.schema.as_ref(), "text")?, shown))
        }
        _ => {
            let message =
                "text.format: expected type text, json_object, or json_schema with a name and a schema";
            Err(ApiError::bad_request(message, "text.format"))
        }
    }
}

async fn turns(request: &ResponsesRequest, served: &Served) -> Result<(Vec<Turn>, Vec<Suspicion>), ApiError> {
    let mut turns = Vec::new();
    let mut reader = Reader::new(served, Api::Responses);
    if let Some(instructions) = &request.instructions {
        turns.push(Turn::text(Role::System, instructions.clone()));
    }
    match &request.input {
        Input::Text(text) => turns.push(Turn::text(Role::User, text.clone())),
        Input::Items(items) => {
            for (i, item) in items.iter().enumerate() {
                let param = format!("input[{i}]");
                refuse(&item.rest, &param)?;
                if let Some(kind) = item.kind.as_deref().filter(|kind| *kind != "message") {
                    let kind: String = kind.chars().take(32).collect();
                    let message = format!("{param}.type: `{kind}` is not offered by this server");
                    return Err(ApiError::bad_request(message, &param));
                }
                let role = match item.role.as_deref() {
                    Some("system" | "developer") => Role::System,
                    Some("user") => Role::User,
                    Some("assistant") => Role::Assistant,
                    _ => {
                        let message = format!("{param}.role: expected system, developer, user or assistant");
                        return Err(ApiError::bad_request(message, &param));
                    }
                };
                if item.content.is_none() {
                    return Err(ApiError::bad_request(format!("{param} has no content"), &param));
                }
                turns.push(reader.content(item.content.as_ref(), role, &param).await?);
            }
        }
    }
    match turns.last() {
        Some(turn) if turn.role == Role::User => Ok((turns, reader.seen())),
        _ => Err(ApiError::bad_request("the last message must be the user's", "input")),
    }
}

/// What a response tells of its request.
struct Shape {
    id: String,
    message: String,
    created: u64,
    format: Value,
    temperature: f64,
    x_radapt: Value,
    request: ResponsesRequest,
}

impl Shape {
    /// The response object, with why it ended and its tokens once it has.
    fn response(&self, text: &str, end: Option<(&str, (usize, usize))>) -> Value {
        let request = &self.request;
        let short = end.is_some_and(|(reason, _)| reason == "length");
        let (status, details) = match end {
            None => ("in_progress", Value::Null),
            Some(_) if short => ("incomplete", json!({ "reason": "max_output_tokens" })),
            Some(_) => ("completed", Value::Null),
        };
        let output = end.map(|_| self.item(text, status));
        let usage = end.map(|(_, (input, output))| {
            json!({
                "input_tokens": input,
                "input_tokens_details": { "cached_tokens": 0 },
                "output_tokens": output,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": input + output,
            })
        });
        json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": details,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.harmless.metadata.clone().unwrap_or_default(),
            "model": request.model,
            "output": output.into_iter().collect::<Vec<_>>(),
            "parallel_tool_calls": true,
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "store": false,
            "temperature": self.temperature,
            "text": { "format": self.format },
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p.unwrap_or(1.0),
            "truncation": "disabled",
            "usage": usage,
            "user": request.harmless.user,
            "x_radapt": self.x_radapt,
        })
    }

    fn item(&self, text: &str, status: &str) -> Value {
        let content = if status == "in_progress" { json!([]) } else { json!([part(text)]) };
        json!({ "id": self.message, "type": "message", "status": status, "role": "assistant", "content": content })
    }
}

fn part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

/// The events of a streamed response, numbered.
fn events(mut pieces: Pieces, shape: Shape) -> impl Stream<Item = Result<Value, ApiError>> + Send {
    async_stream::stream! {
        let mut number = 0;
        let mut event = |kind: &str, mut fields: Value| {
            fields["type"] = json!(format!("response.{kind}"));
            fields["sequence_number"] = json!(number);
            number += 1;
            fields
        };
        let of_part = json!({ "item_id": shape.message, "output_index": 0, "content_index": 0 });
        let with = |field: &str, value: Value| {
            let mut fields = of_part.clone();
            fields[field] = value;
            fields
        };
        let mut text = String::new();
        let mut begun = false;
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    yield Err(error.into());
                    return;
                }
            };
            if !begun {
                begun = true;
                yield Ok(event("created", json!({ "response": shape.response("", None) })));
                yield Ok(event("in_progress", json!({ "response": shape.response("", None) })));
                let item = shape.item("", "in_progress");
                yield Ok(event("output_item.added", json!({ "output_index": 0, "item": item })));
                yield Ok(event("content_part.added", with("part", part(""))));
            }
            if !piece.text.is_empty() {
                text.push_str(&piece.text);
                let mut fields = with("delta", json!(piece.text));
                fields["logprobs"] = json!([]);
                yield Ok(event("output_text.delta", fields));
            }
            let Some(reason) = piece.finish_reason else { continue };
            let mut fields = with("text", json!(text));
            fields["logprobs"] = json!([]);
            yield Ok(event("output_text.done", fields));
            yield Ok(event("content_part.done", with("part", part(&text))));
            let response = shape.response(&text, Some((&reason, piece.usage)));
            let item = response["output"][0].clone();
            yield Ok(event("output_item.done", json!({ "output_index": 0, "item": item })));
            let status = if reason == "length" { "incomplete" } else { "completed" };
            yield Ok(event(status, json!({ "response": response })));
            return;
        }
        yield Err(Error::Engine("the answer has no end".into()).into());
    }
}
