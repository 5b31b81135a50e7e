//! Functions a model may call: how they are told to it, and how its calls are read.
//!
//! Calls are written as Qwen's models and many others are trained to: `<tool_call>`, a line of JSON
//! with `name` and `arguments`, `</tool_call>`. A model whose chat template knows tools is told of
//! them by its template; others in words at the head of the conversation.

use serde_json::{Map, Value, json};

use super::text::overlap;
use super::{Role, Turn};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A function a model may call.
#[derive(Debug, Clone)]
pub struct Tool {
    /// Its name: letters, digits, `_` and `-`.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments; none where it is not given.
    pub parameters: Option<Map<String, Value>>,
}

impl Tool {
    /// The schema of its arguments.
    pub(super) fn schema(&self) -> Value {
        match &self.parameters {
            Some(parameters) if !parameters.is_empty() => Value::Object(parameters.clone()),
            _ => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
        }
    }

    fn json(&self) -> Value {
        let function =
            json!({ "name": self.name, "description": self.description, "parameters": self.schema() });
        json!({ "type": "function", "function": function })
    }
}

/// A function call in a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What its result names it by.
    pub id: String,
    /// The function.
    pub name: String,
    /// Its arguments, JSON as text.
    pub arguments: String,
}

impl Call {
    /// The arguments as JSON; as a string where they are none.
    pub(super) fn value(&self) -> Value {
        serde_json::from_str(&self.arguments).unwrap_or_else(|_| Value::from(self.arguments.as_str()))
    }

    fn text(&self) -> String {
        let name = Value::from(self.name.as_str());
        format!("{OPEN}\n{{\"name\": {name}, \"arguments\": {}}}\n{CLOSE}", self.arguments)
    }
}

/// The conversation for a chat template that knows neither tools nor, if `!system`, instructions.
pub(super) fn in_words(turns: &[Turn], tools: &[Tool], native: bool, system: bool) -> Vec<Turn> {
    let mut turns: Vec<Turn> = if native { turns.to_vec() } else { spelled_out(turns) };
    if !native && !tools.is_empty() {
        let list: Vec<String> = tools.iter().map(|tool| tool.json().to_string()).collect();
        let text = format!(
            "You can call these functions:\n{}\nTo call one, answer with\n{OPEN}\n{{\"name\": the function's name, \
             \"arguments\": an object}}\n{CLOSE}\nIts result comes between <tool_response> and </tool_response>.",
            list.join("\n")
        );
        match turns.first_mut() {
            Some(first) if first.role == Role::System => first.text = format!("{}\n\n{text}", first.text),
            _ => turns.insert(0, Turn::text(Role::System, text)),
        }
    }
    if system {
        return turns;
    }
    // Instructions go to the head of what the user says next.
    let mut out: Vec<Turn> = Vec::new();
    let mut waiting = String::new();
    for mut turn in turns {
        match turn.role {
            Role::System => waiting = join(&waiting, &turn.text),
            Role::User if !waiting.is_empty() => {
                let head = format!("{}\n\n", std::mem::take(&mut waiting));
                turn.places.iter_mut().for_each(|place| *place += head.len());
                turn.text = head + &turn.text;
                out.push(turn);
            }
            _ => out.push(turn),
        }
    }
    if !waiting.is_empty() {
        out.push(Turn::text(Role::User, waiting));
    }
    out
}

fn join(first: &str, second: &str) -> String {
    if first.is_empty() { second.to_string() } else { format!("{first}\n\n{second}") }
}

/// Calls and results as text.
fn spelled_out(turns: &[Turn]) -> Vec<Turn> {
    let mut out: Vec<Turn> = Vec::new();
    for (i, turn) in turns.iter().enumerate() {
        match turn.role {
            Role::Assistant if !turn.calls.is_empty() => {
                let calls: Vec<String> = turn.calls.iter().map(Call::text).collect();
                let text = match turn.text.as_str() {
                    "" => calls.join("\n"),
                    text => format!("{text}\n{}", calls.join("\n")),
                };
                out.push(Turn::text(Role::Assistant, text));
            }
            Role::Tool => {
                let text = format!("<tool_response>\n{}\n</tool_response>", turn.text);
                let follows = i > 0 && turns[i - 1].role == Role::Tool;
                match out.last_mut() {
                    Some(last) if follows => last.text = format!("{}\n{text}", last.text),
                    _ => out.push(Turn::text(Role::User, text)),
                }
            }
            _ => out.push(turn.clone()),
        }
    }
    out
}

/// A part of an answer that may hold calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Text.
    Text(String),
    /// A call begins; the first is 0.
    Call {
        /// Which call it is.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments.
    Arguments {
        /// Which call they are of.
        index: usize,
        /// JSON, in part.
        text: String,
    },
}

/// Reads calls out of an answer as it comes.
///
/// What looks like a call and is none of a function known is text.
#[derive(Debug)]
pub struct Calls {
    names: Vec<String>,
    /// Whether the answer is held to calls, so that arguments can be passed on as they come.
    certain: bool,
    most: usize,
    pending: String,
    inside: bool,
    /// Of a call whose arguments are being passed on.
    arguments: Option<Nesting>,
    count: usize,
}

impl Calls {
    /// For an answer that may call these functions up to `most` times, and that does nothing else
    /// if it is `certain`.
    pub fn new(tools: &[Tool], certain: bool, most: usize) -> Self {
        Self {
            names: tools.iter().map(|tool| tool.name.clone()).collect(),
            certain,
            most,
            pending: String::new(),
            inside: false,
            arguments: None,
            count: 0,
        }
    }

    /// How many calls have begun.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether nothing more is to come.
    pub fn complete(&self) -> bool {
        self.count >= self.most && !self.inside
    }

    /// Takes more text; `last` if nothing follows.
    pub fn push(&mut self, text: &str, last: bool) -> Vec<Said> {
        let mut said = Vec::new();
        self.pending.push_str(text);
        while !self.complete() && self.next(last, &mut said) {}
        if self.complete() {
            self.pending.clear();
        }
        said
    }

    /// One thing out of what is pending; false if more is needed.
    fn next(&mut self, last: bool, said: &mut Vec<Said>) -> bool {
        if !self.inside {
            return self.outside(last, said);
        }
        let index = self.count.saturating_sub(1);
        if let Some(nesting) = &mut self.arguments {
            let (end, over) = nesting.take(&self.pending);
            let text: String = self.pending.drain(..end).collect();
            if !text.is_empty() {
                said.push(Said::Arguments { index, text });
            }
            if over {
                self.arguments = None;
            }
            return over;
        }
        let end = self.pending.find(CLOSE);
        if self.certain {
            if let Some((name, at)) = head(&self.pending) {
                self.pending.drain(..at);
                self.arguments = Some(Nesting::default());
                said.push(Said::Call { index: self.count, name });
                self.count += 1;
                return true;
            }
            // What stands behind the arguments.
            return match end {
                Some(end) => {
                    self.pending.drain(..end + CLOSE.len());
                    self.inside = false;
                    true
                }
                None => false,
            };
        }
        if end.is_none() && !last {
            return false;
        }
        let body: String = self.pending.drain(..end.unwrap_or(self.pending.len())).collect();
        if end.is_some() {
            self.pending.drain(..CLOSE.len());
        }
        self.inside = false;
        match self.parse(&body) {
            Some((name, text)) => {
                said.push(Said::Call { index: self.count, name });
                said.push(Said::Arguments { index: self.count, text });
                self.count += 1;
            }
            None => {
                let close = if end.is_some() { CLOSE } else { "" };
                said.push(Said::Text(format!("{OPEN}{body}{close}")));
            }
        }
        true
    }

    fn outside(&mut self, last: bool, said: &mut Vec<Said>) -> bool {
        let open = self.pending.find(OPEN);
        let end = match open {
            Some(at) => at,
            None if last => self.pending.len(),
            None => {
                let held = overlap(self.pending.as_bytes(), OPEN.as_bytes());
                let text = &self.pending[..self.pending.len() - held];
                // White space before a call belongs to neither.
                text.trim_end().len()
            }
        };
        let text: String = self.pending.drain(..end).collect();
        if open.is_some() {
            self.pending.drain(..OPEN.len());
            self.inside = true;
        }
        let text = if open.is_some() { text.trim_end() } else { text.as_str() };
        if !(text.is_empty() || self.count > 0 && text.trim().is_empty()) {
            said.push(Said::Text(text.to_string()));
        }
        open.is_some()
    }

    fn parse(&self, body: &str) -> Option<(String, String)> {
        let Ok(Value::Object(call)) = serde_json::from_str::<Value>(body.trim()) else { return None };
        let name = call.get("name")?.as_str().filter(|name| self.names.iter().any(|known| known == name))?;
        let arguments = match call.get("arguments").or(call.get("parameters")) {
            None | Some(Value::Null) => "{}".to_string(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        Some((name.to_string(), arguments))
    }
}

/// The name in the head that a constraint writes before the arguments, and where they begin.
fn head(text: &str) -> Option<(String, usize)> {
    let (begin, middle) = ("\n{\"name\": \"", "\", \"arguments\": ");
    let rest = text.strip_prefix(begin)?;
    let end = rest.find(middle)?;
    Some((rest[..end].to_string(), begin.len() + end + middle.len()))
}

/// How deep in a JSON value one is.
#[derive(Debug, Default)]
struct Nesting {
    depth: usize,
    string: bool,
    escaped: bool,
}

impl Nesting {
    /// How far the value, an object or array, reaches into `text`, and whether it ends there.
    fn take(&mut self, text: &str) -> (usize, bool) {
        for (at, c) in text.char_indices() {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' if self.string => self.escaped = true,
                '"' => self.string = !self.string,
                _ if self.string => {}
                '{' | '[' => self.depth += 1,
                '}' | ']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tools() -> Vec<Tool> {
        ["look", "ask"].map(|name| Tool { name: name.into(), description: None, parameters: None }).to_vec()
    }

    /// What is said in all, of text in pieces of `size` bytes.
    fn read(text: &str, certain: bool, most: usize, size: usize) -> (String, Vec<(String, String)>) {
        let mut calls = Calls::new(&tools(), certain, most);
        let pieces: Vec<&str> =
            text.as_bytes().chunks(size).map(|c| std::str::from_utf8(c).expect("ASCII")).collect();
        let mut out = (String::new(), Vec::new());
        for (i, piece) in pieces.iter().enumerate() {
            for said in calls.push(piece, i + 1 == pieces.len()) {
                match said {
                    Said::Text(text) => out.0.push_str(&text),
                    Said::Call { index, name } => {
                        assert_eq!(index, out.1.len());
                        out.1.push((name, String::new()));
                    }
                    Said::Arguments { index, text } => out.1[index].1.push_str(&text),
                }
            }
        }
        out
    }

    #[test]
    fn calls_are_read_in_pieces_of_any_size() {
        let call = |name: &str, arguments: &str| {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>")
        };
        let (a, b) = (r#"{"s": "a}\"<tool_call>", "n": [1, {}]}"#, "{}");
        let two = format!("{}\n{}", call("look", a), call("ask", b));
        for size in [1, 2, 3, 7, 1000] {
            let want = vec![("look".to_string(), a.to_string()), ("ask".into(), b.into())];
            assert_eq!(read(&two, true, 16, size), (String::new(), want), "{size}");
            // In an answer that need not be a call arguments are read as JSON.
            let (text, found) = read(&format!("Let me see.\n{two}"), false, 16, size);
            assert_eq!((text.as_str(), found.len()), ("Let me see.", 2), "{size}");
            let value = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
            assert_eq!(value(&found[0].1), value(a));
            assert_eq!(read(&two, false, 1, size).1.len(), 1);
        }
    }

    #[test]
    fn what_is_no_call_is_text() {
        for text in [
            "a < b <tool",
            "x\n\ny",
            "<tool_call>\n{}\n</tool_call>",
            "<tool_call>{\"name\": \"other\"}</tool_call>",
        ] {
            for size in [1, 5, 1000] {
                assert_eq!(read(text, false, 16, size), (text.to_string(), vec![]), "{text} {size}");
            }
        }
        // A call whose end was forgotten is one.
        let open = "<tool_call>{\"name\": \"ask\", \"arguments\": {}}";
        assert_eq!(read(open, false, 16, 4).1, [("ask".to_string(), "{}".to_string())]);
    }

    #[test]
    fn a_template_without_tools_is_told_in_words() {
        let call = Call { id: "1".into(), name: "look".into(), arguments: "{}".into() };
        let turns = [
            Turn::text(Role::System, "Be kind."),
            Turn::text(Role::User, "What?"),
            Turn { calls: vec![call], ..Turn::text(Role::Assistant, "") },
            Turn::text(Role::Tool, "a dog"),
            Turn::text(Role::Tool, "a cat"),
        ];
        let told = in_words(&turns, &tools(), false, false);
        let roles: Vec<Role> = told.iter().map(|turn| turn.role).collect();
        assert_eq!(roles, [Role::User, Role::Assistant, Role::User]);
        assert!(told[0].text.starts_with("Be kind.\n\nYou can call"), "{}", told[0].text);
        assert!(told[0].text.ends_with("\n\nWhat?"), "{}", told[0].text);
        assert_eq!(told[1].text, "<tool_call>\n{\"name\": \"look\", \"arguments\": {}}\n</tool_call>");
        assert!(told[2].text.contains("a dog") && told[2].text.contains("a cat"));
        assert_eq!(in_words(&turns, &tools(), true, true).len(), turns.len());
    }
}
