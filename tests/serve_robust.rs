//! What `radapt serve` says and does of its defence: the pair of models, comparisons, suspicious
//! pictures, adversarial ones made on demand, and the page to try it all with.
#![cfg(feature = "engine")]

mod serving;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, RgbImage};
use radapt::pocket::{Split, draw};
use serde_json::{Value, json};
use serving::{Server, python};

const ALL: [&str; 4] = ["--compare", "--perturb", "--on-suspect", "flag"];

fn url(picture: &RgbImage) -> String {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).expect("a PNG");
    format!("data:image/png;base64,{}", STANDARD.encode(bytes.into_inner()))
}

fn decoded(url: &Value) -> RgbImage {
    let base64 = url.as_str().and_then(|url| url.strip_prefix("data:image/png;base64,")).expect("a data URL");
    image::load_from_memory(&STANDARD.decode(base64).expect("base64")).expect("a picture").to_rgb8()
}

fn scene(index: u64) -> String {
    url(&draw(Split::Test, 7, index, 96).expect("a scene").picture)
}

fn question(model: &str, picture: &str) -> Value {
    json!({
        "model": model,
        "max_tokens": 24,
        "messages": [{ "role": "user", "content": [
            { "type": "image_url", "image_url": { "url": picture } },
            { "type": "text", "text": "What is in the picture?" },
        ]}],
    })
}

fn said(completion: &Value) -> &str {
    completion["choices"][0]["message"]["content"].as_str().expect("an answer")
}

/// The last event of `POST /v1/perturb`, after those of progress.
fn perturb(server: &Server, picture: &str, eps: &str, threat: &str) -> Value {
    let body = json!({ "image": picture, "eps": eps, "threat": threat, "steps": 10 });
    let events = server.event_stream("/v1/perturb", &body);
    let events: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).expect("JSON")).collect();
    let (last, progress) = events.split_last().expect("events");
    let steps: Vec<_> =
        progress.iter().map(|event| (event["step"].as_u64(), event["steps"].as_u64())).collect();
    assert_eq!(steps, (1..=10).map(|step| (Some(step), Some(10))).collect::<Vec<_>>());
    last.clone()
}

#[test]
fn both_models_are_there_and_a_comparison_is_what_each_says_alone() {
    let server = Server::start(&ALL);
    let (status, models) = server.get("/v1/models");
    assert_eq!(status, 200);
    let names: Vec<_> = models["data"].as_array().expect("models").iter().map(|m| m["id"].as_str()).collect();
    assert_eq!(names, [Some("pocket"), Some("pocket:undefended")]);
    assert_eq!(models["data"][0]["x_radapt"]["defense"]["anchor"], "training-free");
    assert_eq!(models["data"][1]["x_radapt"]["defense"], Value::Null);
    assert_eq!(server.get("/v1/models/pocket:undefended").1, models["data"][1]);

    let mut different = 0;
    for index in 0..4 {
        let clean = scene(index);
        let attacked = perturb(&server, &clean, "16/255", "transfer");
        let picture = attacked["picture"].as_str().expect("a URL").to_string();
        let (status, compared) = server.post("/v1/compare", &question("pocket", &picture));
        assert_eq!(status, 200, "{compared}");
        for (side, name) in [("defended", "pocket"), ("undefended", "pocket:undefended")] {
            let (status, alone) = server.chat(&question(name, &picture));
            assert_eq!(status, 200);
            assert_eq!((said(&compared[side]), &compared[side]["model"]), (said(&alone), &json!(name)));
            assert_eq!(compared[side]["x_radapt"]["defense"], alone["x_radapt"]["defense"]);
            // Flagged pictures are part of an answer.
            assert_eq!(alone["x_radapt"]["pictures"], compared["pictures"]);
        }
        different += usize::from(said(&compared["defended"]) != said(&compared["undefended"]));

        // The events are those of the two answers, mixed.
        let mut body = question("pocket", &picture);
        body["stream_options"] = json!({ "include_usage": true });
        let events = server.events("/v1/compare", &body);
        let events: Vec<Value> = events[..events.len() - 1]
            .iter()
            .map(|event| serde_json::from_str(event).expect("JSON"))
            .collect();
        assert_eq!(events[0]["object"], "radapt.comparison");
        assert_eq!(events[0]["pictures"], compared["pictures"]);
        for (side, name) in [("defended", "pocket"), ("undefended", "pocket:undefended")] {
            let chunks: Vec<&Value> = events[1..].iter().filter(|event| event["model"] == name).collect();
            let text: String =
                chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
            assert_eq!(text, said(&compared[side]));
            assert_eq!(chunks[0]["x_radapt"]["defense"], compared[side]["x_radapt"]["defense"]);
            assert_eq!(chunks[chunks.len() - 1]["usage"], compared[side]["usage"]);
        }
    }
    assert!(different > 0, "the two models never differ");

    let (status, error) = server.post("/v1/compare", &question("pocket:undefended", &scene(0)));
    assert_eq!((status, &error["error"]["code"]), (404, &json!("model_not_found")));
}

#[test]
fn the_defence_is_in_the_header_and_in_every_kind_of_answer() {
    let server = Server::start(&ALL);
    let expected = r#"x-radapt-defense: gif;cutoff=17.143, fra;anchor="training-free";alpha=1.2;beta=-0.8"#;
    let body = question("pocket", &scene(0)).to_string();
    let (status, answer) = server.exchange("POST", "/v1/chat/completions", "application/json", &body);
    assert_eq!(status, 200);
    assert!(answer.contains(expected), "{answer}");
    assert!(!answer.contains("x-radapt-suspicious"), "{answer}");
    let body = question("pocket:undefended", &scene(0)).to_string();
    let (_, answer) = server.exchange("POST", "/v1/chat/completions", "application/json", &body);
    assert!(answer.contains("x-radapt-defense: none\r\n"), "{answer}");

    let first = &server.chunks(&question("pocket", &scene(0)))[0];
    assert_eq!(first["x_radapt"]["defense"]["alpha"], 1.2);
    let picture = json!({ "type": "input_image", "image_url": scene(0) });
    let input =
        json!([{ "role": "user", "content": [picture, { "type": "input_text", "text": "What is it?" }] }]);
    let (status, response) = server.post("/v1/responses", &json!({ "model": "pocket", "input": input }));
    assert_eq!(status, 200, "{response}");
    assert_eq!(response["x_radapt"]["defense"]["beta"], -0.8);
    assert_eq!(response["x_radapt"]["pictures"][0]["suspicious"], false);
}

#[test]
fn an_adversarial_picture_keeps_within_eps_and_says_its_threat_model() {
    let server = Server::start(&["--perturb"]);
    let clean = scene(3);
    for (eps, most, threat, surrogate) in
        [("4/255", 4, "transfer", "pocket:undefended"), ("16/255", 16, "adaptive", "pocket")]
    {
        let made = perturb(&server, &clean, eps, threat);
        assert_eq!(
            (&made["threat"], &made["surrogate"], &made["eps"]),
            (&json!(threat), &json!(surrogate), &json!(eps))
        );
        let (clean, picture) = (decoded(&made["clean"]), decoded(&made["picture"]));
        assert_eq!(clean.dimensions(), picture.dimensions());
        let linf = clean.as_raw().iter().zip(picture.as_raw()).map(|(a, b)| a.abs_diff(*b)).max();
        assert_eq!(made["linf"], json!(linf));
        assert!(linf > Some(0) && linf <= Some(most), "{linf:?}");
        assert_eq!(
            made,
            perturb(&server, made["clean"].as_str().expect("a URL"), eps, threat),
            "of the prepared picture"
        );
        let side = if threat == "adaptive" { "defended" } else { "undefended" };
        assert!(made["cosine"][side].as_f64().expect("a cosine") < 0.95, "{}", made["cosine"]);
    }
    for (field, value) in [
        ("eps", json!("33/255")),
        ("eps", json!("0/255")),
        ("eps", json!("08/255")),
        ("steps", json!(0)),
        ("steps", json!(101)),
        ("image", json!("file:///etc/passwd")),
        ("threat", json!("none")),
        ("more", json!(1)),
    ] {
        let mut body = json!({ "image": clean, "eps": "4/255", "threat": "transfer" });
        body[field] = value;
        let (status, error) = server.post("/v1/perturb", &body);
        assert_eq!(status, 400, "{field}: {error}");
        assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains(field)), "{error}");
    }
    // It offers what it was started with, and nothing else.
    let (status, error) = server.post("/v1/compare", &question("pocket", &clean));
    assert_eq!(status, 404, "{error}");
    assert_eq!(server.chat(&question("pocket:undefended", &clean)).0, 404);
}

#[test]
fn one_adversarial_picture_is_made_at_a_time_and_only_while_its_asker_is_there() {
    let server = Server::start(&["--perturb"]);
    let body = json!({ "image": scene(1), "eps": "8/255", "threat": "adaptive", "steps": 100 }).to_string();
    let mut stream = TcpStream::connect(&server.address).expect("a connection");
    write!(
        stream,
        "POST /v1/perturb HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("the request");
    // Its first event means that it works.
    let mut begun = [0; 1];
    stream.read_exact(&mut begun).expect("an answer");
    let short = json!({ "image": scene(1), "eps": "8/255", "threat": "transfer", "steps": 1 });
    let (status, error) = server.post("/v1/perturb", &short);
    assert_eq!((status, &error["error"]["code"]), (429, &json!("server_busy")), "{error}");
    drop(stream);
    let start = Instant::now();
    loop {
        let (status, _) = server.request("POST", "/v1/perturb", &short.to_string());
        if status == 200 {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "the place is not free again");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn suspicious_pictures_are_flagged_logged_or_refused() {
    let pictures = |server: &Server| -> (Vec<String>, Vec<String>) {
        let clean: Vec<String> = (0..6).map(scene).collect();
        let attacked = clean.iter().map(|picture| {
            perturb(server, picture, "32/255", "transfer")["picture"].as_str().expect("a URL").to_string()
        });
        (clean.clone(), attacked.collect())
    };
    let flagging = Server::start(&["--perturb", "--on-suspect", "flag", "--calibrate-n", "200"]);
    let (clean, attacked) = pictures(&flagging);
    let suspicious = |picture: &String| {
        let (status, answer) = flagging.chat(&question("pocket", picture));
        assert_eq!(status, 200, "{answer}");
        let found = &answer["x_radapt"]["pictures"][0];
        let (score, share) = (found["score"].as_f64(), found["share"].as_f64());
        assert!(
            score.is_some() && share.is_some_and(|share| (1.0 / 201.0..=1.0).contains(&share)),
            "{found}"
        );
        found["suspicious"] == true
    };
    let caught = attacked.iter().filter(|picture| suspicious(picture)).count();
    let wronged = clean.iter().filter(|picture| suspicious(picture)).count();
    assert!(caught >= 5 && wronged <= 1, "{caught} of 6 caught, {wronged} of 6 clean ones suspected");
    let body = question("pocket", attacked.iter().find(|p| suspicious(p)).expect("one")).to_string();
    let (_, answer) = flagging.exchange("POST", "/v1/chat/completions", "application/json", &body);
    assert!(answer.contains("x-radapt-suspicious: ?1\r\n"), "{answer}");

    // The others say nothing to the asker of a picture that is let through.
    let one = attacked.iter().find(|picture| suspicious(picture)).expect("one");
    let logging = Server::start(&["--on-suspect", "log", "--calibrate-n", "200"]);
    let (status, answer) = logging.chat(&question("pocket", one));
    assert_eq!((status, &answer["x_radapt"]["pictures"]), (200, &Value::Null), "{answer}");
    assert!(logging.log().contains("a suspicious picture"), "{}", logging.log());
    let (_, metrics) = logging.request("GET", "/metrics", "");
    assert!(metrics.contains("radapt_suspicious_pictures_total{reason=\"log\"} 1"), "{metrics}");
    assert!(metrics.contains("radapt_suspicion_score_count 1"), "{metrics}");

    let refusing = Server::start(&["--on-suspect", "refuse", "--calibrate-n", "200", "--compare"]);
    let (status, error) = refusing.chat(&question("pocket", one));
    assert_eq!((status, &error["error"]["code"]), (400, &json!("suspicious_picture")), "{error}");
    assert_eq!(error["error"]["param"], "messages[0].content[0]");
    // Neither model sees it.
    assert_eq!(refusing.chat(&question("pocket:undefended", one)).0, 400);
    assert_eq!(refusing.post("/v1/compare", &question("pocket", one)).0, 400);
    assert_eq!(refusing.chat(&question("pocket", &clean[0])).0, 200);
}

#[test]
fn a_calibration_file_is_used_if_it_is_this_models() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("clean.json").display().to_string();
    let out = folder.path().join("run").display().to_string();
    let radapt =
        |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_radapt")).args(args).output().expect("it runs");
    let scored = radapt(&["eval", "suspicion", "--n", "52", "--calibration", &file, "--out", &out]);
    assert!(scored.status.success(), "{}", String::from_utf8_lossy(&scored.stderr));
    let check = |more: &[&str]| {
        let args = [&["serve", "--check", "--addr", "127.0.0.1:0"][..], more].concat();
        let output = radapt(&args);
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let given = ["--calibration", &file];
    let (code, said) = check(&[&given[..], &["--on-suspect", "log", "--suspect-share", "0.05"]].concat());
    assert_eq!(code, Some(0), "{said}");
    // 52 pictures cannot tell one in a hundred.
    let (code, said) = check(&[&given[..], &["--on-suspect", "log"]].concat());
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("--suspect-share") && said.contains("99"), "{said}");
    // Another defence is another model.
    let (code, said) = check(&[&given[..], &["--on-suspect", "log", "--alpha", "1.1"]].concat());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("made for"), "{said}");
    for (more, what) in [
        (&["--on-suspect", "log", "--anchor", "none"][..], "--on-suspect"),
        (&["--compare", "--anchor", "none"], "--compare"),
        (&["--compare", "--no-gif", "--no-fra"], "--compare"),
        (&given, "--calibration"),
        (&["--calibrate", "pocket"], "--calibrate"),
        (&["--on-suspect", "log", "--suspect-share", "1.5"], "--suspect-share"),
        (&["--on-suspect", "log", "--calibrate-n", "5"], "--calibrate-n"),
    ] {
        let (code, said) = check(more);
        assert_eq!(code, Some(2), "{more:?}: {said}");
        assert!(said.contains(what), "{more:?}: {said}");
    }
    // Told before a model is loaded: there is none of this name.
    let nowhere = ["--on-suspect", "log", "--model", "./no-such-model"];
    let missing = folder.path().join("missing.json").display().to_string();
    for (more, expected, what) in
        [(["--suspect-share", "1.5"], 2, "--suspect-share"), (["--calibration", &missing], 1, "missing.json")]
    {
        let (code, said) = check(&[&nowhere[..], &more].concat());
        assert_eq!(code, Some(expected), "{more:?}: {said}");
        assert!(said.contains(what) && !said.contains("no-such-model"), "{more:?}: {said}");
    }
}

#[test]
fn the_page_is_served_with_a_strict_policy_or_not_at_all() {
    let server = Server::start(&[]);
    for (route, kind) in
        [("/", "text/html"), ("/playground.css", "text/css"), ("/playground.js", "text/javascript")]
    {
        let (status, answer) = server.exchange("GET", route, "text/plain", "");
        assert_eq!(status, 200, "{route}");
        assert!(answer.contains(&format!("content-type: {kind}; charset=utf-8\r\n")), "{answer}");
        assert!(
            answer.contains("content-security-policy: default-src 'none'; script-src 'self'"),
            "{answer}"
        );
        // Nothing inline, nothing from elsewhere.
        for word in ["unsafe", "<style", " style=", "onclick", "http://", "https://"] {
            assert!(!answer.contains(word), "{route}: {word}");
        }
    }
    let (status, answer) = server.exchange("HEAD", "/playground/sample", "text/plain", "");
    assert_eq!(status, 200);
    assert!(answer.contains("content-type: image/png"), "{answer}");
    let none = Server::start(&["--no-playground"]);
    for route in ["/", "/playground.js", "/playground/sample"] {
        assert_eq!(none.request("GET", route, "").0, 404, "{route}");
    }
}

/// Uploads, compares and attacks in headless Chromium.
#[test]
fn the_page_works_in_a_browser() {
    let Some(python) = python("playwright.sync_api") else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let picture = folder.path().join("banana.png");
    let scenes = (0..).map(|index| draw(Split::Test, 0, index, 224).expect("a scene"));
    let scene = scenes.into_iter().find(|scene| scene.name() == "banana").expect("one");
    scene.picture.save(&picture).expect("a file");
    let server = Server::start(&ALL);
    let output = Command::new(python)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/serve_playground.py"))
        .arg(format!("http://{}", server.address))
        .arg(&picture)
        .output()
        .expect("python runs");
    let said = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    if output.status.code() == Some(77) {
        eprintln!("SKIPPED: no Chromium on the PATH, and none in RADAPT_CHROMIUM");
        return;
    }
    assert!(output.status.success(), "{said}");
    assert_eq!(said.lines().filter(|line| line.contains("attacked")).count(), 4, "{said}");
}
