//! What describes the server: the OpenAPI document, and the same as a page to read.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Served, ServerOptions};
use crate::page;

/// The document, without what a server is started with.
const DOCUMENT: &str = include_str!("openapi.json");

/// A red picture of one pixel.
const DOT: &str = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR42mP4z8AAAAMBAQD3A0FDAAAAAElFTkSuQmCC";

/// `GET /openapi.json`
pub async fn document(State(served): State<Arc<Served>>) -> Json<Value> {
    Json(described(&served.options, &names(&served)))
}

/// `GET /docs`
pub async fn page(State(served): State<Arc<Served>>) -> Response {
    let html = written(&described(&served.options, &names(&served)));
    let policy = format!("{}; frame-ancestors 'none'", page::policy(CSS));
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_string()),
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_string()),
    ];
    (headers, html).into_response()
}

fn names(served: &Served) -> Vec<&str> {
    served.models().map(|model| model.name.as_str()).collect()
}

/// The document with the server's models and limits.
fn described(options: &ServerOptions, names: &[&str]) -> Value {
    // It is ours; a test reads it.
    let mut document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    let schemas = &mut document["components"]["schemas"];
    schemas["Model"]["enum"] = json!(names);
    let chat = &mut schemas["ChatRequest"]["properties"];
    chat["n"]["maximum"] = json!(options.max_choices);
    for field in ["max_completion_tokens", "max_tokens"] {
        chat[field]["maximum"] = json!(options.max_tokens);
    }
    schemas["ResponsesRequest"]["properties"]["max_output_tokens"]["maximum"] = json!(options.max_tokens);
    let question = "What is in the picture?";
    let most = options.max_tokens.min(16);
    let picture = json!({ "type": "image_url", "image_url": { "url": DOT } });
    let content = json!([picture, { "type": "text", "text": question }]);
    let messages = json!([{ "role": "user", "content": content }]);
    let picture = json!({ "type": "input_image", "image_url": DOT });
    let content = json!([picture, { "type": "input_text", "text": question }]);
    let input = json!([{ "role": "user", "content": content }]);
    let chat = json!({ "model": options.name, "messages": messages, "max_completion_tokens": most });
    for (path, example) in [
        ("/v1/chat/completions", chat.clone()),
        ("/v1/compare", chat),
        ("/v1/perturb", json!({ "image": DOT, "eps": "8/255", "threat": "transfer", "steps": 2 })),
        ("/v1/responses", json!({ "model": options.name, "input": input, "max_output_tokens": most })),
    ] {
        document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"] = example;
    }
    document["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["example"] = json!(options.name);
    document
}

const CSS: &str = "\
.route { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 1.1rem; overflow-wrap: anywhere; }\n\
.fields td:first-child, .fields td:nth-child(2) { white-space: nowrap; }\n\
.fields table { min-width: 34rem; }\n\
h2 { margin-top: 3rem; }\n\
ul.toc { padding-left: 1.15rem; }\n";

/// The document as a page.
fn written(document: &Value) -> String {
    let mut body = format!(
        "<div class=\"top\"><p class=\"eyebrow\">radapt {}</p><h1>The server’s API</h1></div>\n<main id=\"routes\">\n\
         <p>{}</p>\n<p>As a document for machines: <a href=\"/openapi.json\">/openapi.json</a>.</p>\n<h2>Routes</h2>\n",
        prose(&document["info"]["version"]),
        prose(&document["info"]["description"]),
    );
    for (path, methods) in fields(&document["paths"]) {
        for (method, operation) in fields(methods) {
            let _ = write!(
                body,
                "<section class=\"card\">\n<h3 class=\"route\">{} {}</h3>\n<p>{}. {}</p>\n<dl class=\"facts\">\n",
                method.to_uppercase(),
                page::escape(path),
                prose(&operation["summary"]),
                prose(&operation["description"]),
            );
            let asked = kind(&operation["requestBody"]["content"]["application/json"]["schema"]);
            if !asked.is_empty() {
                let example = &operation["requestBody"]["content"]["application/json"]["example"];
                let _ = writeln!(
                    body,
                    "<dt>Takes</dt><dd>{asked}, such as <code>{}</code></dd>",
                    page::escape(&example.to_string())
                );
            }
            for (status, answer) in fields(&operation["responses"]) {
                let kinds: Vec<String> = fields(&answer["content"])
                    .map(|(media, content)| {
                        let schema = if content["x-event-schema"].is_null() {
                            &content["schema"]
                        } else {
                            &content["x-event-schema"]
                        };
                        format!("{} <span class=\"soft\">({})</span>", kind(schema), page::escape(media))
                    })
                    .collect();
                let _ = writeln!(
                    body,
                    "<dt>{}</dt><dd>{} {}</dd>",
                    page::escape(status),
                    prose(&answer["description"]),
                    kinds.join(" or ")
                );
            }
            body.push_str("</dl>\n</section>\n");
        }
    }
    body.push_str("<h2>Schemas</h2>\n");
    for (name, schema) in fields(&document["components"]["schemas"]) {
        let _ = write!(
            body,
            "<section class=\"card\">\n<h3 id=\"{0}\">{0}</h3>\n<p>{1}</p>\n",
            page::escape(name),
            prose(&schema["description"]),
        );
        match fields(&schema["properties"]).next() {
            Some(_) => table(&mut body, schema),
            None => {
                let _ = writeln!(body, "<p>{}</p>", kind(schema));
            }
        }
        body.push_str("</section>\n");
    }
    body.push_str("</main>\n");
    page::document("radapt: the server’s API", "radapt serve", CSS, ("routes", "the routes"), &body)
}

fn table(body: &mut String, schema: &Value) {
    let required = schema["required"].as_array().map(Vec::as_slice).unwrap_or_default();
    body.push_str(
        "<div class=\"scroll fields\" tabindex=\"0\"><table><thead><tr><th scope=\"col\">Field</th>\
         <th scope=\"col\">Type</th><th scope=\"col\">Meaning</th></tr></thead><tbody>\n",
    );
    for (field, schema) in fields(&schema["properties"]) {
        let must = if required.iter().any(|name| name == field) {
            " <span class=\"soft\">required</span>"
        } else {
            ""
        };
        let _ = writeln!(
            body,
            "<tr><td><code>{}</code>{must}</td><td>{}</td><td>{} {}</td></tr>",
            page::escape(field),
            kind(schema),
            prose(&schema["description"]),
            limits(schema),
        );
    }
    body.push_str("</tbody></table></div>\n");
}

/// A schema's type as HTML: its name with a link, or its JSON type.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        return format!("<a href=\"#{0}\">{0}</a>", page::escape(name));
    }
    let words = |list: &Value| -> Vec<String> {
        let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().map(|value| format!("<code>{}</code>", page::escape(&value.to_string()))).collect()
    };
    if let Some(choices) = schema["oneOf"].as_array() {
        let kinds: Vec<String> = choices.iter().filter(|choice| choice["type"] != "null").map(kind).collect();
        return kinds.join(" or ");
    }
    if !schema["enum"].is_null() {
        return words(&schema["enum"]).join(", ");
    }
    if !schema["const"].is_null() {
        return format!("<code>{}</code>", page::escape(&schema["const"].to_string()));
    }
    let name = match &schema["type"] {
        Value::String(name) => name.as_str(),
        // `null` is the same as leaving the field out.
        Value::Array(names) => {
            names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or("null")
        }
        _ => return String::new(),
    };
    match name {
        "array" if !schema["items"].is_null() => format!("list of {}", kind(&schema["items"])),
        "object" if fields(&schema["properties"]).next().is_some() => {
            let names = fields(&schema["properties"]).map(|(name, schema)| match kind(schema) {
                kind if kind.is_empty() => format!("<code>{}</code>", page::escape(name)),
                kind => format!("<code>{}</code>: {kind}", page::escape(name)),
            });
            format!("{{ {} }}", names.collect::<Vec<_>>().join("; "))
        }
        name => page::escape(name),
    }
}

fn limits(schema: &Value) -> String {
    let bounds = ["minimum", "exclusiveMinimum", "maximum", "minItems", "maxItems", "maxLength", "pattern"];
    let told: Vec<String> = bounds
        .iter()
        .filter(|bound| !schema[**bound].is_null())
        .map(|bound| format!("{bound} <code>{}</code>", page::escape(&schema[*bound].to_string())))
        .collect();
    if told.is_empty() { String::new() } else { format!("<span class=\"under\">{}</span>", told.join(", ")) }
}

/// A description as HTML: what stands between backticks is code.
fn prose(text: &Value) -> String {
    let text = page::escape(text.as_str().unwrap_or_default());
    let parts = text.split('`').enumerate();
    parts
        .map(|(i, part)| if i % 2 == 1 { format!("<code>{part}</code>") } else { part.to_string() })
        .collect()
}

fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::super::intake::IntakeOptions;
    use super::*;

    fn document() -> Value {
        let options = ServerOptions {
            name: "<b>odd".into(),
            intake: IntakeOptions::default(),
            max_tokens: 77,
            max_pictures: 1,
            max_choices: 3,
            watch: None,
            perturb: false,
            playground: true,
            samples: false,
        };
        described(&options, &["<b>odd", "<b>odd:undefended"])
    }

    #[test]
    fn the_document_has_the_servers_limits_and_no_dangling_reference() {
        let document = document();
        assert_eq!(document["openapi"], "3.1.0");
        let chat = &document["components"]["schemas"]["ChatRequest"]["properties"];
        assert_eq!((&chat["n"]["maximum"], &chat["max_tokens"]["maximum"]), (&json!(3), &json!(77)));
        let text = document.to_string();
        let names = text.split("\"#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next());
        let mut count = 0;
        for name in names {
            assert!(!document["components"]["schemas"][name].is_null(), "{name}");
            count += 1;
        }
        assert!(count > 20, "{count}");
    }

    #[test]
    fn the_page_says_all_and_loads_nothing() {
        let html = written(&document());
        for (path, _) in fields(&document()["paths"]) {
            assert!(html.contains(&page::escape(path)), "{path}");
        }
        for (field, _) in fields(&document()["components"]["schemas"]["ChatRequest"]["properties"]) {
            assert!(html.contains(&format!("<code>{field}</code>")), "{field}");
        }
        assert!(html.contains("&lt;b&gt;odd") && !html.contains("<b>odd"));
        for foreign in ["http://", "https://", "<script", "src=", " style=", "@import"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
    }
}
