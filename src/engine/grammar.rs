//! What an answer is held to.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use mistralrs_core::llguidance::api::TopLevelGrammar;
use mistralrs_core::llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};

use super::Engine;
use super::tools::Tool;
use crate::{Error, Result};

/// A compiled constraint on an answer: a JSON schema, or a call of a tool.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl Grammar {
    /// A matcher at the start of an answer.
    pub(super) fn matcher(&self) -> Matcher {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
    }
}

impl Engine {
    /// Holds an answer to JSON of `schema`, written on one line with `, ` and `: ` as separators.
    ///
    /// Takes milliseconds of a core, more for large schemas.
    ///
    /// # Errors
    /// [`Error::Conversation`] if the schema is not one, or more than the engine's limits take.
    pub fn json_grammar(&self, schema: &Value) -> Result<Grammar> {
        self.compile(TopLevelGrammar::from_json_schema(one_line(schema)))
    }

    /// Holds an answer to calls of these tools, of which there are up to `most`.
    ///
    /// # Errors
    /// As [`Engine::json_grammar`], of the tools' parameters.
    pub fn call_grammar(&self, tools: &[Tool], most: usize) -> Result<Grammar> {
        let mut lark = format!("start: call (\"\\n\" call){{0,{}}}\n", most.saturating_sub(1));
        let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
        lark.push_str(&format!("call: {}\n", names.join(" | ")));
        for (name, tool) in names.iter().zip(tools) {
            let head =
                format!("<tool_call>\n{{\"name\": {}, \"arguments\": ", Value::from(tool.name.as_str()));
            // A JSON string is a Lark string.
            let (head, tail) = (Value::from(head), Value::from("}\n</tool_call>"));
            let schema = one_line(&tool.schema());
            lark.push_str(&format!(
                "{name}: {head} {name}_arguments {tail}\n{name}_arguments: %json {schema}\n"
            ));
        }
        self.compile(TopLevelGrammar::from_lark(lark))
    }

    fn compile(&self, grammar: TopLevelGrammar) -> Result<Grammar> {
        let factory: &ParserFactory = &self.vocabulary;
        // It is a stranger's grammar.
        let compiled = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let mut matcher = Matcher::new(factory.create_parser(grammar));
            // What is found to be impossible only at the first step.
            matcher.compute_mask().map(|_| matcher)
        }));
        match compiled {
            Ok(Ok(matcher)) => Ok(Grammar(Arc::new(Mutex::new(matcher)))),
            Ok(Err(error)) => {
                let reason: String = super::first_line(&error.to_string()).chars().take(400).collect();
                Err(Error::Conversation(format!("the constraint: {reason}")))
            }
            Err(_) => Err(Error::Conversation("the constraint cannot be compiled".into())),
        }
    }
}

/// The schema with how JSON is written: with whitespace left free a weak model writes nothing else.
fn one_line(schema: &Value) -> Value {
    let style = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
    let mut fields = match schema {
        Value::Object(fields) => fields.clone(),
        // `true` and `false` are schemas too.
        other => Map::from_iter([("allOf".to_string(), json!([other]))]),
    };
    fields.insert("x-guidance".into(), style);
    Value::Object(fields)
}
