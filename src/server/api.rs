//! OpenAI's request and error shapes.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::intake::{IntakeError, Refusal};
use crate::Error;

/// An error in OpenAI's shape.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    /// With a status, a message and the request field at fault.
    pub fn new(status: StatusCode, message: impl Into<String>, param: Option<&str>) -> Self {
        // What a stranger sent may stand in both, and be long.
        let short = |text: &str, most: usize| text.chars().take(most).collect::<String>();
        Self {
            status,
            message: short(&message.into(), 1000),
            param: param.map(|p| short(p, 200)),
            code: None,
        }
    }

    /// A request that cannot be answered as it is.
    pub fn bad_request(message: impl Into<String>, param: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message, Some(param))
    }

    /// A route that is not there.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message, None)
    }

    /// A model that is not there.
    pub fn no_model(asked: &str, names: &str) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("no model `{asked}` here; this server has {names}");
        Self { code: Some("model_not_found"), ..Self::new(StatusCode::NOT_FOUND, message, Some("model")) }
    }

    /// With a code to tell it by.
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// Another request field at fault, where none is named.
    pub fn at(self, param: &str) -> Self {
        let named = Self::new(self.status, self.message, self.param.as_deref().or(Some(param)));
        Self { code: self.code, ..named }
    }

    /// What OpenAI calls the kind.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The error as a JSON value, for event streams.
    pub fn body(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind(), "param": self.param, "code": self.code } })
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::PictureTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Error::Picture { .. } | Error::Argument { .. } | Error::Conversation(_) => {
                StatusCode::BAD_REQUEST
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string(), None)
    }
}

impl From<IntakeError> for ApiError {
    fn from(error: IntakeError) -> Self {
        let status = StatusCode::from_u16(error.refusal.status()).unwrap_or(StatusCode::BAD_REQUEST);
        let code = (error.refusal == Refusal::Busy).then_some("server_busy");
        Self { code, ..Self::new(status, error.message, None) }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        // OpenAI answers 400 where axum says 422.
        let status = match rejection.status() {
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        let text = rejection.body_text();
        let text = text.split_once("target type: ").map_or(text.as_str(), |(_, reason)| reason);
        // The path to the field stands before the reason.
        let param = match &rejection {
            JsonRejection::JsonDataError(_) => text.split_once(": ").map(|(path, _)| path),
            _ => None,
        };
        Self::new(status, text, param.filter(|path| !path.contains(' ')))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Refuses by name what is asked for and not offered; `null` asks for nothing.
pub fn refuse(rest: &Map<String, Value>, at: &str) -> Result<(), ApiError> {
    match rest.iter().find(|(_, value)| !value.is_null()) {
        None => Ok(()),
        Some((field, _)) => {
            let field: String = field.chars().take(64).collect();
            let param = if at.is_empty() { field } else { format!("{at}.{field}") };
            Err(ApiError::bad_request(format!("`{param}` is not offered by this server"), &param))
        }
    }
}

/// The number where it lies in the range.
pub fn within(
    field: &str,
    found: Option<f64>,
    range: std::ops::RangeInclusive<f64>,
) -> Result<Option<f64>, ApiError> {
    match found {
        Some(found) if !range.contains(&found) => {
            let (least, most) = range.into_inner();
            Err(ApiError::bad_request(format!("{field}: expected {least} to {most}, found {found}"), field))
        }
        found => Ok(found),
    }
}

/// The body of `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub struct ChatRequest {
    pub model: String,
    pub messages: Vec<Message>,
    pub max_tokens: Option<usize>,
    pub max_completion_tokens: Option<usize>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub n: Option<usize>,
    pub seed: Option<i64>,
    pub stop: Option<Stop>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<usize>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub tools: Option<Vec<ToolDefinition>>,
    pub tool_choice: Option<ToolChoice>,
    pub parallel_tool_calls: Option<bool>,
    pub response_format: Option<ResponseFormat>,
    #[serde(flatten)]
    pub harmless: Harmless,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Fields that ask for nothing here, checked all the same.
#[derive(Debug, Deserialize)]
pub struct Harmless {
    pub user: Option<String>,
    #[serde(rename = "safety_identifier")]
    pub _safety_identifier: Option<String>,
    #[serde(rename = "prompt_cache_key")]
    pub _prompt_cache_key: Option<String>,
    pub metadata: Option<BTreeMap<String, String>>,
    pub store: Option<bool>,
    pub service_tier: Option<String>,
}

impl Harmless {
    pub fn check(&self) -> Result<(), ApiError> {
        if self.store == Some(true) {
            return Err(ApiError::bad_request("store: this server keeps nothing", "store"));
        }
        if let Some(tier) = self.service_tier.as_deref().filter(|tier| !["auto", "default"].contains(tier)) {
            let tier: String = tier.chars().take(32).collect();
            let message = format!("service_tier: expected auto or default, found `{tier}`");
            return Err(ApiError::bad_request(message, "service_tier"));
        }
        let most = self.metadata.as_ref().is_some_and(|metadata| {
            metadata.len() > 16
                || metadata.iter().any(|(k, v)| k.chars().count() > 64 || v.chars().count() > 512)
        });
        if most {
            let message = "metadata: expected up to 16 pairs, keys up to 64 and values up to 512 characters";
            return Err(ApiError::bad_request(message, "metadata"));
        }
        Ok(())
    }
}

#[derive(Debug, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    One(String),
    Many(Vec<String>),
}

impl Stop {
    /// The texts, of which there are at most four.
    pub fn texts(stop: Option<&Self>) -> Result<Vec<String>, ApiError> {
        let texts = match stop {
            None => Vec::new(),
            Some(Self::One(text)) => vec![text.clone()],
            Some(Self::Many(texts)) => texts.clone(),
        };
        if texts.len() > 4 || texts.iter().any(|text| text.is_empty() || text.len() > 1024) {
            let message = "stop: expected up to 4 texts of 1 to 1024 bytes";
            return Err(ApiError::bad_request(message, "stop"));
        }
        Ok(texts)
    }
}

#[derive(Debug, Deserialize)]
pub struct ToolDefinition {
    #[serde(rename = "type")]
    pub kind: String,
    pub function: FunctionDefinition,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub struct FunctionDefinition {
    pub name: String,
    pub description: Option<String>,
    pub parameters: Option<Map<String, Value>>,
    pub strict: Option<bool>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum ToolChoice {
    Word(String),
    Function {
        #[serde(rename = "type")]
        kind: String,
        function: FunctionName,
    },
}

#[derive(Debug, Deserialize)]
pub struct FunctionName {
    pub name: String,
}

#[derive(Debug, Deserialize)]
pub struct ResponseFormat {
    #[serde(rename = "type")]
    pub kind: String,
    pub json_schema: Option<JsonSchema>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub struct JsonSchema {
    pub name: String,
    /// For the model, which is not told of it: the answer is held to the schema.
    #[serde(rename = "description")]
    pub _description: Option<String>,
    pub schema: Option<Value>,
    /// Answers always keep to the schema.
    #[serde(rename = "strict")]
    pub _strict: Option<bool>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Whether it is a name OpenAI takes for a function or schema.
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

#[derive(Debug, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: Option<Content>,
    pub tool_calls: Option<Vec<ToolCall>>,
    pub tool_call_id: Option<String>,
    /// Of an answer that comes back; what was thought is not told again.
    #[serde(rename = "reasoning_content")]
    pub _reasoning: Option<String>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub struct ToolCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub function: CalledFunction,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
pub struct CalledFunction {
    pub name: String,
    pub arguments: String,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message, of chat completions or responses.
#[derive(Debug, Deserialize)]
pub struct Part {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
    pub image_url: Option<ImageUrl>,
    pub detail: Option<String>,
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum ImageUrl {
    Object {
        url: String,
        detail: Option<String>,
        #[serde(flatten)]
        rest: Map<String, Value>,
    },
    Bare(String),
}
