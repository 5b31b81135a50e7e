//! The API of `radapt serve` on the built-in pocket model: over plain HTTP, by the official `openai`
//! Python client and by schemathesis.
#![cfg(feature = "engine")]

mod fixture;
mod serving;

use std::process::Command;

use base64::Engine as _;
use fixture::path;
use serde_json::{Value, json};
use serving::{Server, python};

fn picture() -> Value {
    let bytes = std::fs::read(path("llava/pictures/wide.png")).expect("the fixture");
    let url = format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes));
    json!({ "type": "image_url", "image_url": { "url": url } })
}

fn text(text: &str) -> Value {
    json!({ "type": "text", "text": text })
}

/// A request about the picture, with these fields too.
fn about(fields: Value) -> Value {
    let mut body = json!({
        "model": "pocket",
        "max_tokens": 40,
        "messages": [{ "role": "user", "content": [picture(), text("What is it?")] }],
    });
    for (field, value) in fields.as_object().expect("fields") {
        body[field] = value.clone();
    }
    body
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": { "where": { "enum": ["left", "right"] }, "often": { "type": "integer", "minimum": 0, "maximum": 9 } },
        "required": ["where", "often"],
        "additionalProperties": false,
    });
    json!([
        { "type": "function", "function": { "name": "look", "description": "Look.", "parameters": parameters } },
        { "type": "function", "function": { "name": "wait" } },
    ])
}

#[test]
fn the_same_seed_gives_the_same_answer_among_others() {
    let server = Server::start(&[]);
    let ask = |seed: usize| {
        let fields = json!({ "temperature": 1.8, "seed": seed, "n": 2, "logprobs": true });
        let (status, answer) = server.chat(&about(fields));
        assert_eq!(status, 200, "{answer}");
        answer["choices"].clone()
    };
    let alone: Vec<Value> = (0..6).map(ask).collect();
    let mut different = alone.clone();
    different.sort_by_key(Value::to_string);
    different.dedup();
    assert!(different.len() > 3, "seeds differ: {different:?}");
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..18).map(|i| (i % 6, scope.spawn(move || ask(i % 6)))).collect();
        for (seed, thread) in threads {
            // To the last bit of the log-probabilities.
            assert_eq!(thread.join().expect("an answer"), alone[seed], "{seed}");
        }
    });
    // Without a seed it is another each time.
    let unseeded: Vec<Value> = (0..4)
        .map(|_| server.chat(&about(json!({ "temperature": 2.0, "n": 2 }))).1["choices"].clone())
        .collect();
    assert!(unseeded.iter().any(|choices| *choices != unseeded[0]), "{unseeded:?}");
}

#[test]
fn log_probabilities_are_the_models_own() {
    let server = Server::start(&[]);
    let tokens = |fields: Value| {
        let (status, answer) = server.chat(&about(fields));
        assert_eq!(status, 200, "{answer}");
        (
            content(&answer).to_string(),
            answer["choices"][0]["logprobs"]["content"].as_array().expect("tokens").clone(),
        )
    };
    let (said, greedy) = tokens(json!({ "logprobs": true, "top_logprobs": 20 }));
    let bytes: Vec<u8> = greedy
        .iter()
        .flat_map(|token| token["bytes"].as_array().expect("bytes"))
        .map(|byte| u8::try_from(byte.as_u64().expect("a byte")).expect("a byte"))
        .collect();
    assert_eq!(String::from_utf8(bytes).expect("text").trim_start(), said);
    for token in &greedy {
        let top: Vec<f64> = token["top_logprobs"]
            .as_array()
            .expect("20")
            .iter()
            .map(|t| t["logprob"].as_f64().expect("one"))
            .collect();
        assert_eq!(top.len(), 20);
        assert_eq!(top[0], token["logprob"], "greedy takes the likeliest");
        let sum: f64 = top.iter().map(|l| l.exp()).sum();
        assert!(sum <= 1.0 + 1e-4 && sum > 0.3 && top.is_sorted_by(|a, b| a >= b), "{sum} {top:?}");
    }
    // However a token was chosen, its probability is the same.
    let forced =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": { "const": "yes" } } });
    for fields in [
        json!({ "logprobs": true, "top_logprobs": 20, "temperature": 1.9, "seed": 1 }),
        json!({ "logprobs": true, "top_logprobs": 20, "frequency_penalty": 2.0, "presence_penalty": 2.0 }),
        json!({ "logprobs": true, "top_logprobs": 20, "response_format": forced }),
        json!({ "logprobs": true, "top_logprobs": 20, "logit_bias": { "7": 100 } }),
    ] {
        let (_, other) = tokens(fields.clone());
        assert_eq!(other[0]["top_logprobs"], greedy[0]["top_logprobs"], "{fields}");
        let listed = &other[0]["top_logprobs"]
            .as_array()
            .expect("20")
            .iter()
            .find(|t| t["token"] == other[0]["token"]);
        assert!(listed.is_none_or(|t| t["logprob"] == other[0]["logprob"]), "{fields}");
    }
    assert_eq!(server.chat(&about(json!({}))).1["choices"][0]["logprobs"], Value::Null);
}

#[test]
fn penalties_bias_and_stop_texts_change_the_answer() {
    let server = Server::start(&[]);
    let say = |fields: Value| {
        let (status, answer) = server.chat(&about(fields));
        assert_eq!(status, 200, "{answer}");
        (content(&answer).to_string(), answer["choices"][0]["finish_reason"].clone(), answer["usage"].clone())
    };
    let (plain, finish, _) = say(json!({}));
    assert_eq!(finish, "stop");
    let word = plain.split_whitespace().nth(1).expect("two words");
    let (cut, finish, usage) = say(json!({ "stop": word }));
    assert_eq!((cut.as_str(), finish), (&plain[..plain.find(word).expect("the word")], json!("stop")));
    assert!(usage["completion_tokens"].as_u64() <= Some(4), "{usage}");
    let streamed =
        server.chunks(&about(json!({ "stop": [word], "stream_options": { "include_usage": true } })));
    let text: String = streamed.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, cut);
    assert_eq!(streamed[streamed.len() - 1]["usage"], usage);
    // A bias of 100 leaves nothing else: 5 is `!` in the pocket's vocabulary.
    assert_eq!(say(json!({ "logit_bias": { "5": 100 }, "max_tokens": 3 })).0, "!!!");
    // With all that was said made unlikely, the end token is left to others.
    let repeated = say(json!({ "logit_bias": { "5": 30, "2": -100 }, "max_tokens": 6 })).0;
    let varied =
        say(json!({ "logit_bias": { "5": 30, "2": -100 }, "max_tokens": 6, "frequency_penalty": 2.0 })).0;
    assert_eq!(repeated, "!!!!!!");
    assert!(varied.starts_with('!'), "{varied}");
}

#[test]
fn answers_keep_to_a_json_schema() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {
            "zebra": { "enum": ["dog", "cat"] },
            "apples": { "type": "integer", "minimum": 0, "maximum": 99 },
            "list": { "type": "array", "items": { "type": "boolean" }, "maxItems": 3 },
        },
        "required": ["zebra", "apples", "list"],
        "additionalProperties": false,
    });
    let format =
        json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": schema, "strict": true } });
    for seed in 0..8 {
        let fields =
            json!({ "response_format": format, "temperature": 2.0, "seed": seed, "max_tokens": 200 });
        let (status, answer) = server.chat(&about(fields));
        assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("stop")), "{answer}");
        let text = content(&answer);
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert!(["dog", "cat"].map(Value::from).contains(&value["zebra"]), "{value}");
        assert!(value["apples"].as_u64().is_some_and(|n| n < 100), "{value}");
        assert!(value["list"].as_array().is_some_and(|list| list.len() <= 3), "{value}");
        assert!(text.find("zebra") < text.find("apples"), "{text}");
    }
    for bad in [
        json!({ "type": "odd" }),
        json!({ "$ref": "https://example.com/x" }),
        json!({ "type": "string", "pattern": "(" }),
    ] {
        let format = json!({ "type": "json_schema", "json_schema": { "name": "x", "schema": bad } });
        for stream in [false, true] {
            let (status, answer) =
                server.chat(&about(json!({ "response_format": format, "stream": stream })));
            assert_eq!((status, &answer["error"]["param"]), (400, &json!("response_format")), "{answer}");
        }
    }
}

#[test]
fn tools_are_called_whole_and_streamed() {
    let server = Server::start(&[]);
    let named = json!({ "type": "function", "function": { "name": "look" } });
    let (status, answer) =
        server.chat(&about(json!({ "tools": tools(), "tool_choice": named, "max_tokens": 200 })));
    assert_eq!(status, 200, "{answer}");
    let message = &answer["choices"][0]["message"];
    assert_eq!((&message["content"], &answer["choices"][0]["finish_reason"]), (&Value::Null, &json!("stop")));
    let call = &message["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("look")), "{answer}");
    let arguments = call["function"]["arguments"].as_str().expect("text");
    let value: Value = serde_json::from_str(arguments).expect("JSON");
    assert!(value["where"].is_string() && value["often"].is_u64(), "{value}");

    let body = about(json!({ "tools": tools(), "tool_choice": named, "max_tokens": 200, "n": 2 }));
    let mut calls = [(String::new(), 0), (String::new(), 0)];
    for chunk in server.chunks(&body) {
        let choice = &chunk["choices"][0];
        let (text, begun) = &mut calls[choice["index"].as_u64().expect("an index") as usize];
        for part in choice["delta"]["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            assert_eq!(part["index"], 0);
            *begun += usize::from(part["id"].is_string() && part["function"]["name"] == "look");
            text.push_str(part["function"]["arguments"].as_str().expect("text"));
        }
    }
    // Greedy answers are the same.
    assert_eq!(calls, [(arguments.to_string(), 1), (arguments.to_string(), 1)]);

    let required = json!({ "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false, "max_tokens": 200 });
    let (_, answer) = server.chat(&about(required));
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls", "{answer}");
    assert_eq!(answer["choices"][0]["message"]["tool_calls"].as_array().map(Vec::len), Some(1));

    // A free answer may have none; what begins like a call of a strict function is one.
    let mut strict = tools();
    strict[0]["function"]["strict"] = json!(true);
    let (status, answer) = server.chat(&about(json!({ "tools": strict })));
    assert_eq!((status, answer["choices"][0]["message"].get("tool_calls")), (200, None), "{answer}");

    // A call and its result go on, and change what is read.
    let question = json!({ "role": "user", "content": "Where?" });
    let asked = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
    let result = json!({ "role": "tool", "tool_call_id": call["id"], "content": "a dog" });
    let tokens = |messages: Value| {
        let body = about(json!({ "messages": messages, "tools": tools() }));
        let (status, answer) = server.chat(&body);
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens"].as_u64().expect("a count")
    };
    assert!(tokens(json!([question, asked, result])) > tokens(json!([question])) + 20);
    for (messages, says) in [
        (json!([question, asked]), "last message"),
        (json!([question, result]), "tool_call_id"),
        (json!([question, asked, result, result]), "tool_call_id"),
        (json!([{ "role": "user", "content": "a", "tool_calls": [call] }]), "tool_calls"),
    ] {
        let (status, answer) = server.chat(&about(json!({ "messages": messages })));
        assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains(says)), "{answer}");
        assert_eq!(status, 400);
    }
}

#[test]
fn instructions_and_several_pictures_reach_the_model() {
    let server = Server::start(&[]);
    let tokens = |messages: Value| {
        let (status, answer) = server.chat(&about(json!({ "messages": messages })));
        assert_eq!(status, 200, "{answer}");
        answer["usage"]["prompt_tokens"].as_u64().expect("a count")
    };
    let user = |parts: Value| json!({ "role": "user", "content": parts });
    let plain = tokens(json!([user(json!("What is it?"))]));
    // The pocket's template knows no system turns; they must not be lost.
    for role in ["system", "developer"] {
        let instructed =
            tokens(json!([{ "role": role, "content": "Answer in one word." }, user(json!("What is it?"))]));
        assert!(instructed > plain + 4, "{role}: {instructed} {plain}");
    }
    let one = tokens(json!([user(json!([picture(), text("What is it?")]))]));
    let two = tokens(json!([user(json!([picture(), text("What is it?"), picture()]))]));
    // 64 tokens each, and what stands between them and the text.
    assert!((64..70).contains(&(one - plain)) && (64..70).contains(&(two - one)), "{plain} {one} {two}");
    let turns = json!([
        user(json!([picture(), text("What is it?")])),
        { "role": "assistant", "content": [text("A dog.")] },
        user(json!([text("And here?"), picture()])),
    ]);
    assert!(tokens(turns) > two);
    let elsewhere = json!([{ "role": "system", "content": [picture()] }, user(json!("What?"))]);
    let (status, answer) = server.chat(&about(json!({ "messages": elsewhere })));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("messages[0].content[0]")), "{answer}");
}

#[test]
fn what_is_not_offered_is_refused_by_name() {
    let server = Server::start(&["--max-choices", "2"]);
    let call = json!({ "type": "function", "function": { "name": "look" } });
    for (fields, param) in [
        (json!({ "functions": [] , "function_call": "auto" }), "function"),
        (json!({ "top_k": 3 }), "top_k"),
        (json!({ "reasoning_effort": "low" }), "reasoning_effort"),
        (json!({ "store": true }), "store"),
        (json!({ "n": 3 }), "n"),
        (json!({ "n": 0 }), "n"),
        (json!({ "service_tier": "flex" }), "service_tier"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), "stop"),
        (json!({ "stop": "" }), "stop"),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "presence_penalty": 2.5 }), "presence_penalty"),
        (json!({ "frequency_penalty": -3 }), "frequency_penalty"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "1": 101 } }), "logit_bias"),
        (json!({ "max_tokens": 3, "max_completion_tokens": 4 }), "max_tokens"),
        (json!({ "stream_options": {} }), "stream_options"),
        (json!({ "stream": true, "stream_options": { "odd": 1 } }), "stream_options.odd"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (
            json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "x" } } }),
            "tool_choice",
        ),
        (json!({ "tools": [call, call] }), "tools"),
        (json!({ "tools": [{ "type": "web_search", "function": { "name": "a" } }] }), "tools"),
        (json!({ "tools": [{ "type": "function", "function": { "name": "a b" } }] }), "tools"),
        (json!({ "tools": tools(), "response_format": { "type": "json_object" } }), "response_format"),
        (json!({ "response_format": { "type": "grammar" } }), "response_format"),
        (json!({ "response_format": { "type": "json_schema" } }), "response_format"),
        (json!({ "seed": 1.5 }), "seed"),
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "metadata": { "a": "b".repeat(600) } }), "metadata"),
        (json!({ "messages": [{ "role": "user", "content": "a", "name": "eve" }] }), "messages[0].name"),
        (json!({ "messages": [{ "role": "user", "content": [] }] }), "messages[0]"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "input_audio" }] }] }),
            "messages[0].content[0]",
        ),
    ] {
        let (status, answer) = server.chat(&about(fields.clone()));
        assert_eq!(status, 400, "{fields}: {answer}");
        let found = answer["error"]["param"].as_str().unwrap_or_else(|| panic!("{fields}: {answer}"));
        assert!(found.starts_with(param), "{fields}: {answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    // What asks for nothing is taken.
    let harmless = json!({
        "user": "u", "metadata": { "a": "b" }, "store": false, "service_tier": "auto", "safety_identifier": "s",
        "prompt_cache_key": "k", "top_k": null, "tools": [], "parallel_tool_calls": true, "seed": -1, "stop": null,
    });
    let (status, answer) = server.chat(&about(harmless));
    assert_eq!(status, 200, "{answer}");
    let response = |fields: Value| {
        let mut body = json!({ "model": "pocket", "input": "What is it?", "max_output_tokens": 8 });
        for (field, value) in fields.as_object().expect("fields") {
            body[field] = value.clone();
        }
        server.post("/v1/responses", &body)
    };
    for (fields, param) in [
        (json!({ "previous_response_id": "resp_1" }), "previous_response_id"),
        (json!({ "store": true }), "store"),
        (json!({ "background": true }), "background"),
        (json!({ "tools": [{ "type": "web_search" }] }), "tools"),
        (json!({ "conversation": "c" }), "conversation"),
        (json!({ "text": { "format": { "type": "odd" } } }), "text.format"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [{ "type": "item_reference", "id": "x" }] }), "input[0]"),
    ] {
        let (status, answer) = response(fields.clone());
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{fields}: {answer}");
    }
    let (status, answer) =
        response(json!({ "store": false, "background": false, "tools": [], "truncation": "disabled" }));
    assert_eq!((status, &answer["store"]), (200, &json!(false)), "{answer}");
}

#[test]
fn errors_have_openais_shape_and_status() {
    let server = Server::start(&["--max-image-bytes", "1000"]);
    let shape = |status: u16, text: &str| -> Value {
        let body = text.split_once("\r\n\r\n").expect("a body").1;
        let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{status} {e}: {text}"));
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
        assert!(["param", "code"].iter().all(|field| body["error"].get(field).is_some()), "{body}");
        body["error"].clone()
    };
    let routes = ["/v1/chat/completions", "/v1/responses"];
    for route in routes {
        for (kind, body, want) in [
            ("text/plain", "{}", 415),
            ("application/json", "{", 400),
            ("application/json", "{}", 400),
            ("application/json", "[]", 400),
            ("application/json", "\u{0}", 400),
            ("application/json", &json!({ "model": "x".repeat(3 << 20) }).to_string(), 413),
        ] {
            let (status, text) = server.exchange("POST", route, kind, body);
            assert_eq!(status, want, "{route} {kind}: {text}");
            shape(status, &text);
        }
        for method in ["GET", "PUT", "DELETE"] {
            let (status, text) = server.exchange(method, route, "application/json", "");
            assert_eq!(status, 405, "{text}");
            assert!(text.to_lowercase().contains("\r\nallow: post"), "{text}");
            shape(status, &text);
        }
    }
    let (status, text) = server.exchange("GET", "/v1/nothing", "application/json", "");
    assert_eq!((status, &shape(status, &text)["code"]), (404, &Value::Null));
    for route in ["/v1/models/gpt", "/v1/models/llava-hf/llava-1.5-7b-hf"] {
        let (status, text) = server.exchange("GET", route, "application/json", "");
        assert_eq!((status, &shape(status, &text)["code"]), (404, &json!("model_not_found")));
    }
    let (status, model) = server.get("/v1/models/pocket");
    assert_eq!((status, &model["object"]), (200, &json!("model")));
    assert_eq!(server.get("/v1/models").1["data"][0], model);
}

#[test]
fn the_document_names_what_is_taken_and_the_page_loads_nothing() {
    let server = Server::start(&["--max-tokens", "99"]);
    let (status, document) = server.get("/openapi.json");
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.0")));
    let chat = &document["components"]["schemas"]["ChatRequest"]["properties"];
    assert_eq!(chat["max_tokens"]["maximum"], 99);
    // Every field of the document is known to the server: a value it cannot have is another error
    // than that of an unknown field.
    for (route, schema) in [("/v1/chat/completions", "ChatRequest"), ("/v1/responses", "ResponsesRequest")] {
        for field in
            document["components"]["schemas"][schema]["properties"].as_object().expect("fields").keys()
        {
            let mut body =
                json!({ "model": "pocket", "messages": [{ "role": "user", "content": "a" }], "input": "a" });
            if schema == "ChatRequest" {
                body.as_object_mut().expect("it").remove("input");
            } else {
                body.as_object_mut().expect("it").remove("messages");
            }
            body[field] = json!({ "odd": [{}] });
            let (status, answer) = server.post(route, &body);
            assert!(status == 400 || status == 404, "{field}: {answer}");
            let message = answer["error"]["message"].as_str().expect("a message");
            assert!(!message.contains(&format!("`{field}` is not offered")), "{message}");
        }
    }
    let (status, page) = server.exchange("GET", "/docs", "", "");
    assert_eq!(status, 200);
    let (head, html) = page.split_once("\r\n\r\n").expect("a page");
    assert!(head.contains("default-src 'none'") && head.contains("frame-ancestors 'none'"), "{head}");
    for field in chat.as_object().expect("fields").keys() {
        assert!(html.contains(&format!("<code>{field}</code>")), "{field}");
    }
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("<script"));
}

#[test]
fn responses_come_whole_and_as_events() {
    let server = Server::start(&[]);
    let mut part = picture();
    part["type"] = json!("input_image");
    part["image_url"] = part["image_url"]["url"].take();
    let body = json!({
        "model": "pocket",
        "max_output_tokens": 40,
        "input": [{ "role": "user", "content": [part, { "type": "input_text", "text": "What is it?" }] }],
    });
    let (status, response) = server.post("/v1/responses", &body);
    assert_eq!((status, &response["status"]), (200, &json!("completed")), "{response}");
    let text = response["output"][0]["content"][0]["text"].as_str().expect("text");
    // The same as of chat completions.
    assert_eq!(text, content(&server.chat(&about(json!({}))).1));
    let events: Vec<Value> = server
        .events("/v1/responses", &body)
        .iter()
        .map(|event| serde_json::from_str(event).expect("JSON"))
        .collect();
    let kinds: Vec<&str> = events.iter().filter_map(|event| event["type"].as_str()).collect();
    let begin = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"];
    let end = ["output_text.done", "content_part.done", "output_item.done", "completed"];
    let named = |names: &[&str]| names.iter().map(|name| format!("response.{name}")).collect::<Vec<_>>();
    assert_eq!(kinds[..5], named(&begin));
    assert_eq!(kinds[kinds.len() - 4..], named(&end));
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(deltas, text);
    assert_eq!(events[events.len() - 1]["response"]["usage"], response["usage"]);
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
}

#[test]
fn the_openai_python_client_drives_all_of_it() {
    let Some(python) = python("openai, pydantic") else { return };
    let server = Server::start(&[]);
    let output = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/serve_openai.py"))
        .args([
            format!("http://{}/v1", server.address),
            path("llava/pictures/wide.png").display().to_string(),
        ])
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seen: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(seen["errors"], json!([404, 404, 400, 400, 400, 400, 400, 400, 400, 400]), "{seen}");
}

/// schemathesis makes requests of the OpenAPI document, good and bad, and holds the answers to it. That
/// a good one is answered is not among its checks: a document cannot say that a picture must be one, or
/// that one field goes with another.
#[test]
fn schemathesis_finds_nothing() {
    let Some(python) = python("schemathesis") else { return };
    let server = Server::start(&["--max-tokens", "64", "--compare", "--perturb", "--on-suspect", "flag"]);
    let report = tempfile::tempdir().expect("a folder");
    let output = Command::new(python)
        .current_dir(&report)
        .args(["-m", "schemathesis.cli", "run", &format!("http://{}/openapi.json", server.address)])
        .args(["--max-examples", "25", "--seed", "1", "--no-color", "--generation-database", "none"])
        .args([
            "--exclude-checks",
            "positive_data_acceptance",
            "--request-timeout",
            "60",
            "--continue-on-failure",
        ])
        .output()
        .expect("schemathesis runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("Tested: 9"), "{said}");
    assert_eq!(server.get("/health").0, 200);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}
