//! `radapt serve`: the real binary on a real socket, asked over plain HTTP and by the official
//! `openai` Python client.
#![cfg(feature = "engine")]

mod fixture;
mod serving;

use std::process::Command;

use base64::Engine as _;
use fixture::path;
use serde_json::{Value, json};
use serving::{Server, python};

/// A server of the tiny model.
fn start(extra: &[&str]) -> Server {
    let model = path("llava/v4").display().to_string();
    let flags = ["--model", &model, "--name", "tiny", "--contract", "llava-crop"];
    Server::start(&[&flags[..], extra].concat())
}

fn data_url(name: &str) -> String {
    let bytes = std::fs::read(path(name)).expect("the fixture");
    format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

fn question(url: &str) -> Value {
    json!({
        "model": "tiny",
        "max_tokens": 8,
        "messages": [{ "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": url } },
            { "type": "text", "text": "What is in the picture?" },
        ]}],
    })
}

/// What transformers says.
fn expected() -> String {
    let text = std::fs::read_to_string(path("llava/expected_v4.json")).expect("the fixture");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("cases");
    let case = cases.iter().find(|case| case["name"] == "llava-crop.q0.wide").expect("the case");
    case["text"].as_str().expect("text").to_string()
}

#[test]
fn answers_over_http_whole_and_streamed() {
    let server = start(&["--anchor", "none"]);
    let (status, body) = server.request("GET", "/health", "");
    assert_eq!((status, body.trim()), (200, r#"{"status":"ok"}"#));
    let (status, models) = server.request("GET", "/v1/models", "");
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<Value>(&models).expect("JSON")["data"][0]["id"], "tiny");

    let body = question(&data_url("llava/pictures/wide.png"));
    let (status, answer) = server.chat(&body);
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"].as_str().map(str::trim), Some(expected().trim()));
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 40, "completion_tokens": 8, "total_tokens": 48 }));

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({ "include_usage": true });
    let (status, events) = server.request("POST", "/v1/chat/completions", &streamed.to_string());
    assert_eq!(status, 200);
    let events: Vec<&str> = events.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(events.last(), Some(&"[DONE]"));
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text.trim(), expected().trim());
    assert!(chunks.len() > 4, "an answer of eight tokens comes in pieces");
    assert_eq!(chunks[chunks.len() - 1]["usage"]["total_tokens"], 48);
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");
}

#[test]
fn requests_at_once_get_their_own_answers() {
    let server = start(&["--anchor", "none"]);
    let ask =
        |name: &str| server.chat(&question(&data_url(name))).1["choices"][0]["message"]["content"].clone();
    let (wide, tall) = (ask("llava/pictures/wide.png"), ask("llava/pictures/tall.png"));
    assert_ne!(wide, tall);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12)
            .map(|i| {
                let (name, expected) = if i % 2 == 0 {
                    ("llava/pictures/wide.png", &wide)
                } else {
                    ("llava/pictures/tall.png", &tall)
                };
                scope.spawn(move || (ask(name), expected))
            })
            .collect();
        for thread in threads {
            let (answer, expected) = thread.join().expect("an answer");
            assert_eq!(&answer, expected);
        }
    });
}

#[test]
fn refuses_what_it_cannot_answer_in_openais_shape() {
    let server = start(&["--max-pixels", "100000"]);
    let good = question(&data_url("llava/pictures/wide.png"));
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = good.clone();
        change(&mut body);
        body
    };
    let url =
        |url: &'static str| with(&move |b| b["messages"][0]["content"][0]["image_url"]["url"] = json!(url));
    let cases = [
        ("another model", with(&|b| b["model"] = json!("gpt")), 404, "no model `gpt`"),
        ("a web address", url("https://example.com/a.png"), 400, "data:"),
        ("a file", url("file:///etc/passwd"), 400, "data:"),
        ("a path", url("/etc/passwd"), 400, "data:"),
        ("no base64", url("data:image/png;base64,@@@"), 400, "base64"),
        ("no picture", url("data:image/png;base64,aGVsbG8="), 400, "not a PNG"),
        (
            "a huge picture",
            with(&|b| {
                b["messages"][0]["content"][0]["image_url"]["url"] = json!(data_url("decode/huge-header.png"))
            }),
            413,
            "pixels",
        ),
        ("no messages", with(&|b| b["messages"] = json!([])), 400, "last message"),
        ("a role", with(&|b| b["messages"][0]["role"] = json!("robot")), 400, "robot"),
        (
            "the marker",
            with(&|b| b["messages"][0]["content"][1]["text"] = json!("<image> what?")),
            400,
            "<image>",
        ),
        ("too many tokens", with(&|b| b["max_tokens"] = json!(1_000_000)), 400, "max_tokens"),
        ("no tokens", with(&|b| b["max_tokens"] = json!(0)), 400, "max_tokens"),
        ("nine answers", with(&|b| b["n"] = json!(9)), 400, "n: expected 1 to 8"),
        ("a temperature", with(&|b| b["temperature"] = json!(-1)), 400, "temperature"),
        ("no JSON schema", with(&|b| b["messages"] = json!(7)), 400, "messages"),
        (
            "too many pictures",
            with(&|b| {
                let part = b["messages"][0]["content"][0].clone();
                b["messages"][0]["content"] = json!(vec![part; 9]);
            }),
            400,
            "more than 8",
        ),
    ];
    for (what, body, status, says) in cases {
        let (found, answer) = server.chat(&body);
        assert_eq!(found, status, "{what}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{what}: {answer}"));
        assert!(message.contains(says), "{what}: {message}");
    }
    let small = start(&["--max-image-bytes", "1000"]);
    let body = with(&|b| b["messages"][0]["content"][1]["text"] = json!("word ".repeat(1 << 19)));
    let (status, answer) = small.chat(&body);
    assert_eq!(status, 413, "{answer}");
    assert!(answer["error"]["message"].is_string(), "{answer}");
    assert_eq!(server.request("GET", "/nothing", "").0, 404);
    assert_eq!(server.request("GET", "/v1/chat/completions", "").0, 405);
    // And it still answers.
    assert_eq!(server.chat(&good).0, 200);
}

/// The tiny model has 512 positions.
#[test]
fn conversations_longer_than_the_model_end_and_leave_the_server_running() {
    let server = start(&["--anchor", "none"]);
    let text = |words: usize| json!({ "model": "tiny", "max_tokens": 1000, "messages": [{ "role": "user", "content": "word ".repeat(words) }] });
    let (status, answer) = server.chat(&text(2000));
    assert!((400..500).contains(&status), "{status}: {answer}");
    assert!(
        answer["error"]["message"].as_str().is_some_and(|m| m.contains("length") || m.contains("long")),
        "{answer}"
    );
    // Some 400 tokens of text fit, and do not with the 200 of eight pictures.
    let mut short = text(30);
    short["max_tokens"] = json!(1);
    let per_word = server.chat(&short).1["usage"]["prompt_tokens"].as_u64().expect("a count") as usize / 30;
    let words = "word ".repeat(400 / per_word);
    let picture = question(&data_url("llava/pictures/wide.png"))["messages"][0]["content"][0].clone();
    let mut pictures = text(0);
    pictures["messages"][0]["content"] =
        json!([vec![picture; 8], vec![json!({ "type": "text", "text": words })]].concat());
    let (status, answer) = server.chat(&pictures);
    assert_eq!(status, 400, "{answer}");
    assert!(answer["error"]["message"].as_str().is_some_and(|m| m.contains("with its picture")), "{answer}");
    let (status, answer) = server.chat(&text(3));
    assert_eq!((status, &answer["choices"][0]["finish_reason"]), (200, &json!("length")), "{answer}");
    assert_eq!(server.chat(&question(&data_url("llava/pictures/wide.png"))).0, 200);
}

#[test]
fn the_official_python_client_gets_answers() {
    let Some(python) = python("openai") else { return };
    let server = start(&["--anchor", "training-free"]);
    let output = Command::new(&python)
        .arg(path("openai/ask.py"))
        .args([
            &format!("http://{}/v1", server.address),
            &path("llava/pictures/wide.png").display().to_string(),
        ])
        .output()
        .expect("python runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(answers["models"], json!(["tiny"]));
    assert_eq!(answers["whole"], answers["streamed"]);
    assert!(answers["whole"].as_str().is_some_and(|text| !text.trim().is_empty()), "{answers}");
    assert_eq!(answers["refused"], 400);
}
