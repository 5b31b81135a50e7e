use std::sync::Arc;

use either::Either;
use futures::{Stream, StreamExt};
use image::{DynamicImage, RgbImage};
use indexmap::IndexMap;
use mistralrs_core::{
    Constraint, Function, MessageContent, NormalRequest, Request, RequestMessage, Response, SamplingParams,
    TokenizationRequest, ToolChoice, ToolType,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, channel, unbounded_channel};

use super::choose::{Chooser, Finish, Plan, Responses, Step, Token};
use super::grammar::Grammar;
use super::text::{Shown, Text, Thoughts};
use super::tools::{Call, Tool, in_words};
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
    /// A function the model has called.
    Tool,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
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
    /// Where in the text each picture stands, in bytes, ascending; before all of it where not told.
    /// A chat template may put them elsewhere, as LLaVA's do.
    pub places: Vec<usize>,
    /// Functions the model calls in it.
    pub calls: Vec<Call>,
    /// The call that a function's result belongs to.
    pub call_id: Option<String>,
}

impl Turn {
    /// A turn without pictures.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            text: text.into(),
            images: Vec::new(),
            places: Vec::new(),
            calls: Vec::new(),
            call_id: None,
        }
    }

    /// What the user says of pictures.
    pub fn of_pictures(text: impl Into<String>, images: Vec<RgbImage>) -> Self {
        Self { images, ..Self::text(Role::User, text) }
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
    /// Decides all that is drawn at random; another each time where not given. What is drawn by a
    /// seed is computed outside of batches, so that it is the same whatever else is answered.
    pub seed: Option<u64>,
    /// Which of several answers to one request this is; each draws its own.
    pub choice: u64,
    /// Taken from the logits of tokens that the answer has already.
    pub presence_penalty: f64,
    /// The same for each time it has them.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub bias: Vec<(u32, f32)>,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// What the answer is held to.
    pub grammar: Option<Grammar>,
    /// Keep token ids and their log-probabilities, and this many alternatives to each.
    pub top_logprobs: Option<usize>,
    /// Keep the prompt's token ids and each step's logits.
    pub trace: bool,
    /// Nobody reads along: the pieces come when the answer is over, which costs less. Without effect
    /// where a stop text may end it.
    pub whole: bool,
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
#[derive(Debug, Clone, Default)]
pub struct Piece {
    /// The text that came to it.
    pub text: String,
    /// What came to the thoughts before it, of a model that thinks.
    pub reasoning: String,
    /// The tokens it was made of, where log-probabilities were asked for.
    pub tokens: Vec<Token>,
    /// Why the answer ended, `stop` or `length`, in the last piece.
    pub finish_reason: Option<String>,
    /// Tokens of the prompt, and of the answer so far.
    pub usage: (usize, usize),
    prompt_ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

impl Engine {
    /// Answers the last turn.
    ///
    /// # Errors
    /// If there are more pictures than the model takes, or generation fails.
    pub async fn answer(&self, turns: &[Turn], sampling: &Sampling) -> Result<Answer> {
        let sampling = Sampling { whole: true, ..sampling.clone() };
        let mut pieces = std::pin::pin!(self.stream(turns, &sampling).await?);
        let mut answer = Answer {
            text: String::new(),
            finish_reason: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            prompt_ids: Vec::new(),
            logits: Vec::new(),
        };
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            answer.text.push_str(&piece.text);
            answer.tokens.extend(piece.tokens.iter().map(|token| token.id));
            answer.logprobs.extend(piece.tokens.iter().map(|token| token.logprob));
            answer.prompt_ids.extend(piece.prompt_ids);
            answer.logits.extend(piece.logits);
            if let Some(reason) = piece.finish_reason {
                answer.finish_reason = reason;
            }
            (answer.prompt_tokens, answer.completion_tokens) = piece.usage;
        }
        Ok(answer)
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
        self.stream_with(turns, &[], sampling).await
    }

    /// As [`Engine::stream`], with functions the model may call. Its calls are in the text, where
    /// [`Calls`](super::Calls) finds them.
    ///
    /// # Errors
    /// As [`Engine::stream`].
    pub async fn stream_with(
        &self,
        turns: &[Turn],
        tools: &[Tool],
        sampling: &Sampling,
    ) -> Result<impl Stream<Item = Result<Piece>> + Send + use<>> {
        let (mut steps, responses) = self.send(turns, tools, sampling).await?;
        let (vocabulary, thinks) = (
            self.vocabulary.clone(),
            self.manner.thinks && sampling.grammar.as_ref().is_none_or(|grammar| grammar.free),
        );
        let (mut text, keep) = (Text::new(&sampling.stop), sampling.top_logprobs.is_some());
        Ok(async_stream::stream! {
            let mut thoughts = Thoughts::new(false, false);
            let (mut prompt, mut count) = (0, 0);
            let mut next = Piece::default();
            loop {
                let (token, logits, finish) = match receive(&mut steps, &responses).await {
                    Ok(Step::Token(token, logits, finish)) => (Some(token), logits, finish),
                    Ok(Step::Over) => (None, None, Some(Finish::Stop)),
                    Ok(Step::Prompt(ids)) => {
                        prompt = ids.len();
                        let tail = vocabulary.tok_env().tok_trie().decode_ext(&ids[prompt.saturating_sub(8)..], true);
                        thoughts = Thoughts::new(thinks, String::from_utf8_lossy(&tail).trim_end().ends_with("<think>"));
                        next.prompt_ids = ids;
                        continue;
                    }
                    Ok(Step::Failed(error)) | Err(error) => {
                        yield Err(error);
                        return;
                    }
                };
                count += usize::from(token.is_some());
                next.logits.extend(logits);
                let mut shown = token.map(|token| text.push(token)).unwrap_or_default();
                let mut finish = finish;
                if shown.stopped {
                    finish = Some(Finish::Stop);
                } else if finish.is_some() {
                    let Shown { text: rest, tokens, .. } = text.end();
                    shown.text.push_str(&rest);
                    shown.tokens.extend(tokens);
                }
                (next.text, next.reasoning) = thoughts.push(&shown.text, finish.is_some());
                next.tokens = if keep { shown.tokens } else { Vec::new() };
                next.usage = (prompt, count);
                next.finish_reason = finish.map(|finish| match finish {
                    Finish::Stop => "stop".to_string(),
                    Finish::Length => "length".to_string(),
                });
                yield Ok(std::mem::take(&mut next));
                if finish.is_some() {
                    return;
                }
            }
        })
    }

    async fn send(
        &self,
        turns: &[Turn],
        tools: &[Tool],
        sampling: &Sampling,
    ) -> Result<(UnboundedReceiver<Step>, Arc<Responses>)> {
        // The marker stands for a picture; as text it would be taken for one.
        let markers = if self.model().kind.is_qwen() { &qwen::MARKERS[..] } else { &["<image>"] };
        let told = tools.iter().map(|tool| format!("{tool:?}")).collect::<Vec<_>>();
        let calls = turns.iter().flat_map(|turn| &turn.calls).flat_map(|call| [&call.name, &call.arguments]);
        let mut texts = turns.iter().map(|turn| &turn.text).chain(calls).chain(&told);
        if let Some(marker) = texts.find_map(|text| markers.iter().find(|&&marker| text.contains(marker))) {
            return Err(Error::Conversation(format!("the text may not contain `{marker}`")));
        }
        let turns = in_words(turns, tools, self.manner.tools, self.manner.system);
        let images = turns.iter().flat_map(|turn| &turn.images);
        let pictures: Vec<DynamicImage> = images.map(|image| self.prepare(image)).collect::<Result<_>>()?;
        if let Some(most) = self.max_pictures().filter(|&most| pictures.len() > most) {
            return Err(Error::argument(
                "pictures",
                format!("at most {most} for this model"),
                pictures.len(),
            ));
        }
        let messages = turns.iter().map(|turn| message(turn, self.manner.tools)).collect();
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
        // There is one, at the end or in place of an answer; tokens are told by our sampler.
        let (responder, responses) = channel(4);
        let responses = Arc::new(Responses::new(responses));
        let (told, steps) = unbounded_channel();
        let seed = sampling.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        let plan = Plan {
            temperature: sampling.temperature.unwrap_or(0.0),
            top_p: sampling.top_p.unwrap_or(1.0),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            bias: sampling.bias.clone(),
            seed,
            seeded: sampling.seed.is_some(),
            choice: sampling.choice,
            top_logprobs: sampling.top_logprobs,
            trace: sampling.trace,
            whole: sampling.whole && sampling.stop.is_empty(),
            max_tokens: sampling.max_tokens,
            ends: self.ends.clone(),
            positions: self.positions,
            vocabulary: self.vocabulary.clone(),
        };
        let grammar = sampling.grammar.as_ref().map(Grammar::matcher);
        let chooser = Chooser::new(plan, grammar, told, responses.clone());
        let request = NormalRequest {
            messages,
            sampling_params: SamplingParams {
                // mistral.rs takes `None` for 1, which samples; the sampler leaves it no choice.
                temperature: Some(0.0),
                max_len: Some(sampling.max_tokens),
                ..SamplingParams::neutral()
            },
            response: responder,
            return_logprobs: false,
            // The sampler notices when nobody listens any more.
            is_streaming: false,
            id: self.runner.next_request_id(),
            constraint: Constraint::None,
            suffix: None,
            tools: (self.manner.tools && !tools.is_empty()).then(|| tools.iter().map(declared).collect()),
            // Calls are read by us.
            tool_choice: Some(ToolChoice::None),
            logits_processors: Some(vec![Arc::new(chooser)]),
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
        Ok((steps, responses))
    }

    /// The tokens of a conversation without pictures as the template has it, `None` if it refuses.
    pub(super) async fn prompt(&self, turns: &[Turn], tools: &[Tool]) -> Result<Option<Vec<u32>>> {
        let (response, mut tokens) = channel(1);
        let request = TokenizationRequest {
            text: Either::Left(turns.iter().map(|turn| message(turn, true)).collect()),
            tools: (!tools.is_empty()).then(|| tools.iter().map(declared).collect()),
            add_generation_prompt: true,
            add_special_tokens: true,
            enable_thinking: None,
            reasoning_effort: None,
            response,
        };
        let sender = self.runner.get_sender(None).map_err(|e| Error::Engine(e.to_string()))?;
        sender.send(Request::Tokenize(request)).await.map_err(|_| stopped())?;
        Ok(tokens.recv().await.ok_or_else(stopped)?.ok())
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

/// A message as chat templates take it. Content comes in parts, which is what those of vision
/// models are written for; around calls as text, which is what those with tools are.
fn message(turn: &Turn, native: bool) -> IndexMap<String, MessageContent> {
    let part = |fields: &[(&str, Value)]| {
        fields.iter().map(|(k, v)| (k.to_string(), v.clone())).collect::<IndexMap<_, _>>()
    };
    let text = |text: &str| part(&[("type", json!("text")), ("text", json!(text))]);
    let mut message = IndexMap::from([("role".to_string(), Either::Left(turn.role.name().to_string()))]);
    if native && (turn.role == Role::Tool || !turn.calls.is_empty()) {
        message.insert("content".to_string(), Either::Left(turn.text.clone()));
        if let Some(id) = &turn.call_id {
            message.insert("tool_call_id".to_string(), Either::Left(id.clone()));
        }
        if !turn.calls.is_empty() {
            let calls = turn.calls.iter().map(|call| {
                let function = json!({ "name": call.name, "arguments": call.value() });
                part(&[("id", json!(call.id)), ("type", json!("function")), ("function", function)])
            });
            message.insert("tool_calls".to_string(), Either::Right(calls.collect()));
        }
        return message;
    }
    let (mut parts, mut from) = (Vec::new(), 0);
    for i in 0..turn.images.len() {
        let place = turn.places.get(i).copied().unwrap_or(from);
        if let Some(before) = turn.text.get(from..place).filter(|before| !before.is_empty()) {
            parts.push(text(before));
            from = place;
        }
        parts.push(part(&[("type", json!("image"))]));
    }
    let rest = &turn.text[from..];
    if !rest.is_empty() || parts.is_empty() || from == 0 {
        parts.push(text(rest));
    }
    message.insert("content".to_string(), Either::Right(parts));
    message
}

fn declared(tool: &Tool) -> mistralrs_core::Tool {
    let parameters = match tool.schema() {
        Value::Object(fields) => Some(fields.into_iter().collect()),
        _ => None,
    };
    let function = Function { name: tool.name.clone(), description: tool.description.clone(), parameters };
    mistralrs_core::Tool { tp: ToolType::Function, function }
}

/// The sampler's next word, or why there is none.
async fn receive(steps: &mut UnboundedReceiver<Step>, responses: &Responses) -> Result<Step> {
    // Nobody else waits for it.
    let mut responses = responses.lock().await;
    tokio::select! {
        biased;
        Some(step) = steps.recv() => Ok(step),
        response = responses.recv() => match response {
            Some(Response::Done(_)) => Ok(steps.try_recv().unwrap_or(Step::Over)),
            Some(other) => Err(failure(other)),
            None => steps.try_recv().map_err(|_| stopped()),
        },
    }
}

fn stopped() -> Error {
    Error::Engine("the engine stopped".into())
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
