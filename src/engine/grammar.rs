//! What an answer is held to.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};

use mistralrs_core::llguidance::Matcher;
use mistralrs_core::llguidance::api::TopLevelGrammar;
use serde_json::{Map, Value, json};

use super::Engine;
use super::tools::Tool;
use crate::{Error, Result};

/// The most bytes of JSON schemas in one constraint, and the most object properties: compiling takes
/// time by the square of their number, 0.4 s for a thousand.
const MOST_BYTES: usize = 100_000;
/// See [`MOST_BYTES`].
const MOST_PROPERTIES: usize = 1000;

/// A compiled constraint on an answer: a JSON schema, or a call of a tool.
#[derive(Clone)]
pub struct Grammar {
    matcher: Arc<Mutex<Matcher>>,
    /// Whether free text may stand around what is constrained.
    pub(super) free: bool,
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl Grammar {
    /// A matcher at the start of an answer.
    pub(super) fn matcher(&self) -> Matcher {
        self.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()
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
        bounded(std::iter::once(schema))?;
        self.compile(TopLevelGrammar::from_json_schema(one_line(schema)), false)
    }

    /// Holds an answer to calls of these tools, of which there are up to `most`; if `free`, to text in
    /// which what begins like a call is one.
    ///
    /// # Errors
    /// As [`Engine::json_grammar`], of the tools' parameters.
    pub fn call_grammar(&self, tools: &[Tool], most: usize, free: bool) -> Result<Grammar> {
        let schemas: Vec<Value> = tools.iter().map(Tool::schema).collect();
        bounded(schemas.iter())?;
        let mut lark = match (free, most) {
            (true, _) => format!(
                "start: (until call){{0,{most}}} TAIL\nuntil[suffix=\"<tool_call>\"]: /(.|\\n)*/\nTAIL: /(.|\\n)*/\n"
            ),
            (false, 0 | 1) => "start: \"<tool_call>\" call\n".to_string(),
            (false, _) => {
                format!("start: \"<tool_call>\" call (\"\\n<tool_call>\" call){{0,{}}}\n", most - 1)
            }
        };
        let names: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
        lark.push_str(&format!("call: {}\n", names.join(" | ")));
        for ((name, tool), schema) in names.iter().zip(tools).zip(&schemas) {
            let head = format!("\n{{\"name\": {}, \"arguments\": ", Value::from(tool.name.as_str()));
            // A JSON string is a Lark string.
            let (head, tail) = (Value::from(head), Value::from("}\n</tool_call>"));
            let schema = one_line(schema);
            lark.push_str(&format!(
                "{name}: {head} {name}_arguments {tail}\n{name}_arguments: %json {schema}\n"
            ));
        }
        self.compile(TopLevelGrammar::from_lark(lark), free)
    }

    fn compile(&self, grammar: TopLevelGrammar, free: bool) -> Result<Grammar> {
        // It is a stranger's grammar.
        let compiled = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let mut matcher = Matcher::new(self.vocabulary.create_parser(grammar));
            // What is found to be impossible only at the first step.
            matcher.compute_mask().map(|_| matcher)
        }));
        match compiled {
            Ok(Ok(matcher)) => Ok(Grammar { matcher: Arc::new(Mutex::new(matcher)), free }),
            Ok(Err(error)) => {
                let reason: String = super::first_line(&error.to_string()).chars().take(400).collect();
                Err(Error::Conversation(format!("the constraint: {reason}")))
            }
            Err(_) => Err(Error::Conversation("the constraint cannot be compiled".into())),
        }
    }
}

/// That compiling these schemas takes a bounded time.
fn bounded<'a>(schemas: impl Iterator<Item = &'a Value>) -> Result<()> {
    let (mut bytes, mut properties) = (0, 0);
    for schema in schemas {
        bytes += schema.to_string().len();
        let mut open = vec![schema];
        while let Some(value) = open.pop() {
            match value {
                Value::Array(values) => open.extend(values),
                Value::Object(fields) => {
                    properties += fields.get("properties").and_then(Value::as_object).map_or(0, Map::len);
                    open.extend(fields.values());
                }
                _ => {}
            }
        }
    }
    if bytes > MOST_BYTES || properties > MOST_PROPERTIES {
        return Err(Error::Conversation(format!(
            "the constraint: expected schemas of up to {MOST_BYTES} bytes and {MOST_PROPERTIES} properties, \
             found {bytes} and {properties}"
        )));
    }
    Ok(())
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
