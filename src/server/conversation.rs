//! From a request's messages to a conversation: the checks, and the pictures.

use super::Served;
use super::api::{ApiError, Content, ImageUrl, Message, Part, is_name, refuse};
use super::suspicion::Suspicion;
use crate::engine::{Call, Role, Turn};

/// Which of OpenAI's two APIs a part of a message is written for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Api {
    Chat,
    Responses,
}

/// Reads the messages of one request.
pub struct Reader<'a> {
    served: &'a Served,
    api: Api,
    /// How many pictures there were so far.
    pictures: usize,
    /// Whether they are to be looked at whatever the server is told.
    look: bool,
    /// What was seen.
    seen: Vec<Suspicion>,
}

impl<'a> Reader<'a> {
    pub fn new(served: &'a Served, api: Api) -> Self {
        Self { served, api, pictures: 0, look: false, seen: Vec::new() }
    }

    /// The same, but every picture is looked at.
    pub fn looking(self) -> Self {
        Self { look: true, ..self }
    }

    /// How suspicious the pictures are that were looked at.
    pub fn seen(self) -> Vec<Suspicion> {
        self.seen
    }

    /// The turns of a chat completion's messages.
    ///
    /// Messages are checked before the first picture is looked at, which costs more.
    pub async fn messages(&mut self, messages: &[Message]) -> Result<Vec<Turn>, ApiError> {
        let mut roles = Vec::new();
        let mut open: Vec<&str> = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            roles.push(self.check(message, &format!("messages[{i}]"), &mut open)?);
        }
        match roles.last() {
            Some(Role::User | Role::Tool) => {}
            _ => {
                return Err(ApiError::bad_request(
                    "the last message must be the user's or a tool's",
                    "messages",
                ));
            }
        }
        let mut turns = Vec::new();
        for (i, (message, role)) in messages.iter().zip(roles).enumerate() {
            let mut turn = self.content(message.content.as_ref(), role, &format!("messages[{i}]")).await?;
            turn.call_id = message.tool_call_id.clone();
            let calls = message.tool_calls.iter().flatten();
            turn.calls = calls
                .map(|call| Call {
                    id: call.id.clone(),
                    name: call.function.name.clone(),
                    arguments: call.function.arguments.clone(),
                })
                .collect();
            turns.push(turn);
        }
        Ok(turns)
    }

    fn check<'m>(
        &self,
        message: &'m Message,
        param: &str,
        open: &mut Vec<&'m str>,
    ) -> Result<Role, ApiError> {
        let bad = |reason: String| Err(ApiError::bad_request(format!("{param}{reason}"), param));
        let role = match message.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            other => {
                let other: String = other.chars().take(32).collect();
                return bad(format!(
                    ".role: expected system, developer, user, assistant or tool, found `{other}`"
                ));
            }
        };
        // An answer may come back as the client got it, with empty lists.
        let mut rest = message.rest.clone();
        rest.retain(|_, value| {
            value.as_array().is_none_or(|list| !list.is_empty()) || role != Role::Assistant
        });
        // A tool's result may say whose it is; the call it belongs to tells that too.
        rest.retain(|field, _| !(field == "name" && role == Role::Tool));
        refuse(&rest, param)?;
        let calls = message.tool_calls.as_deref().unwrap_or_default();
        if !calls.is_empty() && role != Role::Assistant {
            return bad(".tool_calls: only an assistant's message has calls".into());
        }
        if message.tool_call_id.is_some() && role != Role::Tool {
            return bad(".tool_call_id: only a tool's message has one".into());
        }
        if role != Role::Tool && role != Role::Assistant || !calls.is_empty() {
            open.clear();
        }
        for call in calls {
            let at = format!("{param}.tool_calls");
            refuse(&call.rest, &at)?;
            refuse(&call.function.rest, &at)?;
            if call.kind != "function" || !is_name(&call.function.name) {
                return bad(".tool_calls: expected calls of type function with a function's name".into());
            }
            if !serde_json::from_str::<serde_json::Value>(&call.function.arguments)
                .is_ok_and(|v| v.is_object())
            {
                return bad(".tool_calls: arguments: expected a JSON object as text".into());
            }
            open.push(&call.id);
        }
        if role == Role::Tool {
            let Some(at) = open.iter().position(|id| Some(*id) == message.tool_call_id.as_deref()) else {
                return bad(
                    ".tool_call_id: expected the id of a call in the assistant's message before".into()
                );
            };
            open.remove(at);
        }
        match &message.content {
            None if calls.is_empty() => bad(" has no content".into()),
            _ => Ok(role),
        }
    }

    /// One turn's text and pictures.
    pub async fn content(
        &mut self,
        content: Option<&Content>,
        role: Role,
        param: &str,
    ) -> Result<Turn, ApiError> {
        let mut turn = Turn::text(role, "");
        let parts = match content {
            None => return Ok(turn),
            Some(Content::Text(text)) => {
                turn.text.clone_from(text);
                return Ok(turn);
            }
            Some(Content::Parts(parts)) => parts,
        };
        if parts.is_empty() {
            return Err(ApiError::bad_request(format!("{param}.content: expected at least one part"), param));
        }
        let mut after_text = false;
        for (i, part) in parts.iter().enumerate() {
            let at = format!("{param}.content[{i}]");
            let mut rest = part.rest.clone();
            if part.kind == "output_text" {
                // As an answer of ours has them.
                rest.retain(|field, value| {
                    !(["annotations", "logprobs"].contains(&field.as_str()) && value.is_array())
                });
            }
            refuse(&rest, &at)?;
            let (texts, pictures): (&[&str], _) = match self.api {
                Api::Chat => (&["text"], "image_url"),
                Api::Responses => (&["input_text", "output_text"], "input_image"),
            };
            let kind = part.kind.as_str();
            match (texts.contains(&kind), kind == pictures, &part.text, url(part, &at)?) {
                (true, _, Some(text), None) => {
                    if after_text {
                        turn.text.push('\n');
                    }
                    turn.text.push_str(text);
                    after_text = true;
                }
                (_, true, None, Some(url)) => {
                    self.pictures += 1;
                    let most = self.served.options.max_pictures;
                    if self.pictures > most {
                        return Err(ApiError::bad_request(format!("more than {most} pictures"), param));
                    }
                    if role != Role::User {
                        return Err(ApiError::bad_request(
                            format!("{at}: only a user's message has pictures"),
                            &at,
                        ));
                    }
                    let label = format!("{param}, picture {}", self.pictures);
                    let picture = self.served.picture(url, &label).await.map_err(|error| error.at(&at))?;
                    let watched = self.served.watched(picture, &label, self.look).await;
                    let (picture, seen) = watched.map_err(|error| error.at(&at))?;
                    self.seen.extend(seen);
                    turn.images.push(picture);
                    turn.places.push(turn.text.len());
                    after_text = false;
                }
                (false, false, ..) => {
                    let kind: String = kind.chars().take(32).collect();
                    let message = format!("{at}.type: `{kind}` is not offered by this server");
                    return Err(ApiError::bad_request(message, &at));
                }
                _ => {
                    return Err(ApiError::bad_request(format!("{at}: not a whole part of type {kind}"), &at));
                }
            }
        }
        Ok(turn)
    }
}

/// The picture's URL, where the part has one.
fn url<'p>(part: &'p Part, at: &str) -> Result<Option<&'p str>, ApiError> {
    let (url, detail) = match &part.image_url {
        None => (None, &part.detail),
        Some(ImageUrl::Bare(url)) => (Some(url.as_str()), &part.detail),
        Some(ImageUrl::Object { url, detail, rest }) => {
            refuse(rest, at)?;
            (Some(url.as_str()), if detail.is_some() { detail } else { &part.detail })
        }
    };
    match detail.as_deref() {
        None | Some("auto") => Ok(url),
        Some(_) => {
            let message =
                format!("{at}: detail: expected auto, as every picture is prepared in the model's own way");
            Err(ApiError::bad_request(message, at))
        }
    }
}
