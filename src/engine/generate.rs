use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Tensor};
use either::Either;
use futures::Stream;
use image::{DynamicImage, RgbImage};
use indexmap::IndexMap;
use mistralrs_core::{
    Constraint, CustomLogitsProcessor, MessageContent, NormalRequest, Request, RequestMessage, Response,
    ResponseLogprob, SamplingParams, StopTokens,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::{Receiver, channel};

use super::{Engine, qwen};
use crate::{Error, Result};

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions.
    System,
    /// The asker.
    User,
    /// The model.
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub text: String,
    /// Decoded pictures that go with it, of any size.
    pub images: Vec<RgbImage>,
}

impl Turn {
    /// A turn without pictures.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self { role, text: text.into(), images: Vec::new() }
    }
}

/// How an answer is drawn.
#[derive(Debug, Clone, Default)]
pub struct Sampling {
    /// The most tokens an answer may have.
    pub max_tokens: usize,
    /// `None` or 0 is greedy.
    pub temperature: Option<f64>,
    /// Nucleus sampling.
    pub top_p: Option<f64>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// Keep token ids and their log-probabilities, and this many alternatives to each.
    pub top_logprobs: Option<usize>,
    /// Keep the prompt's token ids and each step's logits.
    pub trace: bool,
}

/// A complete answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What was said.
    pub text: String,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: String,
    /// The generated tokens, where log-probabilities were asked for.
    pub tokens: Vec<u32>,
    /// The natural logarithms of their probabilities.
    pub logprobs: Vec<f32>,
    /// Tokens of the prompt, image tokens included.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// The prompt's token ids, where a trace was asked for.
    pub prompt_ids: Vec<u32>,
    /// The logits that led to each token, `vocab` numbers each, where a trace was asked for.
    pub logits: Vec<Vec<f32>>,
}

/// A part of an answer as it is generated.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The text that came to it.
    pub text: String,
    /// Why the answer ended, in the last piece.
    pub finish_reason: Option<String>,
    /// Tokens of the prompt and of the answer, in the last piece.
    pub usage: Option<(usize, usize)>,
}

/// What the logits processors are shown.
#[derive(Default)]
struct Recorded {
    prompt: Option<Vec<u32>>,
    logits: Vec<Vec<f32>>,
}

impl Engine {
    /// Answers the last turn.
    ///
    /// # Errors
    /// If there are more pictures than the model takes, or generation fails.
    pub async fn answer(&self, turns: &[Turn], sampling: &Sampling) -> Result<Answer> {
        let recorded = sampling.trace.then(|| Arc::new(Mutex::new(Recorded::default())));
        let mut responses = self.send(turns, sampling, false, recorded.clone()).await?;
        let response = match responses.recv().await {
            Some(Response::Done(response)) => response,
            Some(other) => return Err(failure(other)),
            None => return Err(Error::Engine("the engine stopped".into())),
        };
        let choice = response
            .choices
            .into_iter()
            .next()
            .ok_or_else(|| Error::Engine("an answer without choices".into()))?;
        let kept: Vec<ResponseLogprob> = choice.logprobs.and_then(|l| l.content).unwrap_or_default();
        let recorded = recorded
            .map(|r| std::mem::take(&mut *r.lock().unwrap_or_else(PoisonError::into_inner)))
            .unwrap_or_default();
        Ok(Answer {
            text: choice.message.content.unwrap_or_default(),
            finish_reason: choice.finish_reason,
            tokens: kept.iter().map(|token| token.token_id).collect(),
            logprobs: kept.iter().map(|token| token.logprob).collect(),
            prompt_tokens: response.usage.prompt_tokens,
            completion_tokens: response.usage.completion_tokens,
            prompt_ids: recorded.prompt.unwrap_or_default(),
            logits: recorded.logits,
        })
    }

    /// Answers the last turn piece by piece. Dropping the stream ends the generation.
    ///
    /// # Errors
    /// As [`Engine::answer`]; errors during generation come through the stream.
    pub async fn stream(
        &self,
        turns: &[Turn],
        sampling: &Sampling,
    ) -> Result<impl Stream<Item = Result<Piece>> + Send + use<>> {
        let mut responses = self.send(turns, sampling, true, None).await?;
        Ok(async_stream::stream! {
            let mut finished = false;
            while let Some(response) = responses.recv().await {
                match response {
                    Response::Chunk(chunk) => {
                        let usage = chunk.usage.map(|usage| (usage.prompt_tokens, usage.completion_tokens));
                        for choice in chunk.choices {
                            finished |= choice.finish_reason.is_some();
                            let text = choice.delta.content.unwrap_or_default();
                            yield Ok(Piece { text, finish_reason: choice.finish_reason, usage });
                        }
                        if finished {
                            return;
                        }
                    }
                    other => {
                        yield Err(failure(other));
                        return;
                    }
                }
            }
            yield Err(Error::Engine("the engine stopped".into()));
        })
    }

    async fn send(
        &self,
        turns: &[Turn],
        sampling: &Sampling,
        streaming: bool,
        record: Option<Arc<Mutex<Recorded>>>,
    ) -> Result<Receiver<Response>> {
        // The marker stands for a picture; as text it would be taken for one.
        let markers = if self.model().kind.is_qwen() { &qwen::MARKERS[..] } else { &["<image>"] };
        if let Some(marker) = markers.iter().find(|&&m| turns.iter().any(|turn| turn.text.contains(m))) {
            return Err(Error::Conversation(format!("the text may not contain `{marker}`")));
        }
        let images = turns.iter().flat_map(|turn| &turn.images);
        let pictures: Vec<DynamicImage> = images.map(|image| self.prepare(image)).collect::<Result<_>>()?;
        if let Some(most) = self.max_pictures().filter(|&most| pictures.len() > most) {
            return Err(Error::argument(
                "pictures",
                format!("at most {most} for this model"),
                pictures.len(),
            ));
        }
        let messages = turns.iter().map(message).collect();
        let messages = if pictures.is_empty() {
            RequestMessage::Chat { messages, enable_thinking: None, reasoning_effort: None }
        } else {
            RequestMessage::MultimodalChat {
                images: pictures,
                audios: Vec::new(),
                videos: Vec::new(),
                messages,
                enable_thinking: None,
                reasoning_effort: None,
            }
        };
        // Room for a piece per token: the engine waits on a full channel, and with it every other
        // conversation would wait for one slow reader.
        let (responder, responses) = channel(sampling.max_tokens.saturating_add(16).min(1 << 16));
        let request = NormalRequest {
            messages,
            sampling_params: SamplingParams {
                // mistral.rs takes `None` for 1, which samples.
                temperature: Some(sampling.temperature.unwrap_or(0.0)),
                top_p: sampling.top_p,
                max_len: Some(sampling.max_tokens),
                stop_toks: (!sampling.stop.is_empty()).then(|| StopTokens::Seqs(sampling.stop.clone())),
                top_n_logprobs: sampling.top_logprobs.unwrap_or(0),
                ..SamplingParams::neutral()
            },
            response: responder,
            return_logprobs: sampling.top_logprobs.is_some(),
            is_streaming: streaming,
            id: self.runner.next_request_id(),
            constraint: Constraint::None,
            suffix: None,
            tools: None,
            tool_choice: None,
            logits_processors: record.map(|record| vec![recorder(record)]),
            return_raw_logits: false,
            web_search_options: None,
            model_id: None,
            truncate_sequence: false,
        };
        let sender = self.runner.get_sender(None).map_err(|e| Error::Engine(e.to_string()))?;
        sender
            .send(Request::Normal(Box::new(request)))
            .await
            .map_err(|_| Error::Engine("the engine stopped".into()))?;
        Ok(responses)
    }

    fn prepare(&self, picture: &RgbImage) -> Result<DynamicImage> {
        Ok(match self.max_pictures() {
            // Tiled models cut the picture themselves.
            Some(_) => picture.clone().into(),
            None => {
                // What the contract does not take.
                self.preprocess().size_of(picture.height(), picture.width())?;
                self.preprocess().prepare(picture).into()
            }
        })
    }
}

/// Content in parts, which is what chat templates of vision models are written for: pictures
/// first, as transformers' templates order them.
fn message(turn: &Turn) -> IndexMap<String, MessageContent> {
    let part = |fields: &[(&str, Value)]| {
        fields.iter().map(|(k, v)| (k.to_string(), v.clone())).collect::<IndexMap<_, _>>()
    };
    let mut parts: Vec<_> = turn.images.iter().map(|_| part(&[("type", json!("image"))])).collect();
    parts.push(part(&[("type", json!("text")), ("text", json!(turn.text))]));
    IndexMap::from([
        ("role".to_string(), Either::Left(turn.role.name().to_string())),
        ("content".to_string(), Either::Right(parts)),
    ])
}

fn recorder(record: Arc<Mutex<Recorded>>) -> Arc<dyn CustomLogitsProcessor> {
    Arc::new(move |logits: &Tensor, context: &[u32]| -> candle_core::Result<Tensor> {
        let row = logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
        record.prompt.get_or_insert_with(|| context.to_vec());
        record.logits.push(row);
        Ok(logits.clone())
    })
}

fn failure(response: Response) -> Error {
    match response {
        Response::ValidationError(error) => {
            let reason = error.to_string();
            // The rest is advice for mistral.rs' own users.
            Error::Conversation(reason.split(", perhaps").next().unwrap_or_default().to_lowercase())
        }
        Response::InternalError(error) => Error::Engine(super::first_line(&error.to_string())),
        // As our patch of the input processors words it.
        Response::ModelError(message, _) if message.starts_with("the prompt has") => {
            Error::Conversation(super::first_line(&message))
        }
        // A backtrace may follow.
        Response::ModelError(message, _) => Error::Engine(super::first_line(&message)),
        _ => Error::Engine("an answer of another kind than asked for".into()),
    }
}
