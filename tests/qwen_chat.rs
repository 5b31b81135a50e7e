//! Qwen-VL through mistral.rs against transformers 5.23: prompt token ids, greedy tokens, logits.
#![cfg(feature = "engine")]

mod fixture;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use fixture::{Fixture, path};
use image::RgbImage;
use radapt::Error;
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::engine::{Engine, EngineOptions, Role, Sampling, Turn};
use radapt::image::{DecodeLimits, decode_file};
use radapt::model::{Lookup, Model};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Largest difference over largest value that logits may have.
const LOGITS: f32 = 1e-4;
const FAMILIES: [&str; 4] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"];

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a runtime")
}

async fn try_load(folder: &Path) -> radapt::Result<Engine> {
    let model = Model::find(&folder.display().to_string(), &Lookup::default())?;
    let defense = DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() };
    Engine::load(model, EngineOptions { defense, ..EngineOptions::new(Device::Cpu) }).await
}

async fn load(folder: &Path) -> Engine {
    try_load(folder).await.expect("a loaded model")
}

fn family(name: &str) -> std::path::PathBuf {
    path(&format!("qwen_chat/{name}"))
}

fn picture(name: &str) -> RgbImage {
    decode_file(&path(&format!("qwen_chat/pictures/{name}.png")), &DecodeLimits::default())
        .expect("a picture")
}

fn sampling(tokens: usize) -> Sampling {
    Sampling { max_tokens: tokens, top_logprobs: Some(1), trace: true, ..Sampling::default() }
}

/// The turns of a case: pictures go to the image parts in order.
fn turns(case: &Value) -> Vec<Turn> {
    let names = case["pictures"].as_array().expect("pictures");
    let mut pictures = names.iter().map(|name| picture(name.as_str().expect("a name")));
    let messages = case["messages"].as_array().expect("messages");
    let turn = |message: &Value| {
        let role = match message["role"].as_str() {
            Some("assistant") => Role::Assistant,
            Some("system") => Role::System,
            _ => Role::User,
        };
        let mut turn = Turn::text(role, "");
        for part in message["content"].as_array().expect("content in parts") {
            match part["type"].as_str() {
                Some("image") => turn.images.push(pictures.next().expect("a picture for each image part")),
                _ => turn.text = part["text"].as_str().expect("text").to_string(),
            }
        }
        turn
    };
    messages.iter().map(turn).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn cases(family: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(path("qwen_chat/expected.json")).expect("the fixture");
    let mut cases = serde_json::from_str::<Vec<Value>>(&text).expect("cases");
    cases.retain(|case| case["family"] == family);
    assert_eq!(cases.len(), 11, "{family}: cases");
    cases
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let largest = |m: f32, v: f32| if v.is_nan() { f32::INFINITY } else { m.max(v) };
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, largest) / scale
}

/// Asks every case of a family and compares all there is.
async fn agree(engine: &Engine, family: &str) {
    let expected = Fixture::open("qwen_chat/expected.safetensors");
    let mut worst = 0f32;
    for case in cases(family) {
        let name = case["name"].as_str().expect("a name");
        let answer = engine.answer(&turns(&case), &sampling(8)).await.expect("an answer");
        assert_eq!(answer.prompt_ids, ids(&case["ids"]), "{family} {name}: prompt ids");
        assert_eq!(answer.prompt_tokens, answer.prompt_ids.len(), "{family} {name}: usage");
        let logits = expected.tensor(&format!("{family}.{name}.logits")).to_vec2::<f32>().expect("rows");
        for (step, (found, expected)) in answer.logits.iter().zip(&logits).enumerate() {
            let difference = difference(found, expected);
            assert!(difference <= LOGITS, "{family} {name}: logits of step {step} differ by {difference}");
            worst = worst.max(difference);
        }
        assert_eq!(answer.tokens, ids(&case["tokens"]), "{family} {name}: tokens");
        assert_eq!(answer.logits.len(), logits.len(), "{family} {name}: steps");
        // mistral.rs leaves out a space in front.
        assert_eq!(answer.text.trim(), case["text"].as_str().expect("text").trim(), "{family} {name}: text");
    }
    println!("{family}: logits differ by at most {worst:e}");
}

#[test]
fn qwen2_vl_agrees_with_transformers() {
    runtime().block_on(async { agree(&load(&family("qwen2_vl")).await, "qwen2_vl").await });
}

#[test]
fn qwen2_5_vl_agrees_with_transformers() {
    runtime().block_on(async { agree(&load(&family("qwen2_5_vl")).await, "qwen2_5_vl").await });
}

#[test]
fn qwen3_vl_agrees_with_transformers() {
    runtime().block_on(async { agree(&load(&family("qwen3_vl")).await, "qwen3_vl").await });
}

#[test]
fn qwen3_vl_moe_agrees_with_transformers() {
    runtime().block_on(async { agree(&load(&family("qwen3_vl_moe")).await, "qwen3_vl_moe").await });
}

/// A copy of a family's folder.
fn copy(name: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(family(name)).expect("the fixture").flatten() {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("a copy");
        }
    }
    folder
}

/// The same folder with the names transformers 5 has in memory, and its `config.json`.
fn version_5(name: &str) -> TempDir {
    let folder = copy(name);
    std::fs::copy(family(name).join("v5/config.json"), folder.path().join("config.json")).expect("a copy");
    rename(folder.path(), |name| match name.split_once('.') {
        Some(("visual", _)) => format!("model.{name}"),
        Some(("model", rest)) if !rest.starts_with("visual.") && !rest.starts_with("language_model.") => {
            format!("model.language_model.{rest}")
        }
        _ => name.to_string(),
    });
    folder
}

fn rename(folder: &Path, to: impl Fn(&str) -> String) {
    let file = folder.join("model.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).expect("the weights");
    let tensors: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (to(&name), tensor)).collect();
    candle_core::safetensors::save(&tensors, file).expect("the weights are written");
}

#[test]
fn what_transformers_5_writes_is_read() {
    runtime().block_on(async {
        for name in FAMILIES {
            let folder = version_5(name);
            let engine = load(folder.path()).await;
            let case = &cases(name)[6];
            assert_eq!(case["name"], "two_pictures");
            let answer = engine.answer(&turns(case), &sampling(8)).await.expect("an answer");
            assert_eq!(answer.tokens, ids(&case["tokens"]), "{name}");
        }
    });
}

/// Names as models without a head have them: neither `model.` nor, in Qwen3-VL, anything else.
#[test]
fn names_without_the_models_prefix_are_read() {
    runtime().block_on(async {
        for name in ["qwen2_vl", "qwen3_vl"] {
            let folder = copy(name);
            rename(folder.path(), |name| name.strip_prefix("model.").unwrap_or(name).to_string());
            let engine = load(folder.path()).await;
            let case = &cases(name)[0];
            let answer = engine.answer(&turns(case), &sampling(8)).await.expect("an answer");
            assert_eq!(answer.tokens, ids(&case["tokens"]), "{name}");
        }
    });
}

/// Requests that run at once share batches of prompts and of decoding steps: with pictures of
/// different sizes, with none, with several.
#[test]
fn concurrent_answers_equal_single_ones() {
    runtime().block_on(async {
        for name in FAMILIES {
            let engine = load(&family(name)).await;
            let cases = cases(name);
            let plain = Sampling { trace: false, ..sampling(8) };
            for round in 0..3 {
                // Another order each time, and each picture from the encoder cache from then on.
                let order: Vec<&Value> = cases.iter().cycle().skip(round * 4).take(cases.len()).collect();
                let conversations: Vec<Vec<Turn>> = order.iter().map(|case| turns(case)).collect();
                let answers = conversations.iter().map(|turns| engine.answer(turns, &plain));
                let answers = futures::future::join_all(answers).await;
                for (case, answer) in order.iter().zip(answers) {
                    let tokens = answer.expect("an answer").tokens;
                    assert_eq!(tokens, ids(&case["tokens"]), "{name} {}", case["name"]);
                }
            }
        }
    });
}

/// Prompts of one length are decoded in the same steps, whatever the grids of their pictures: here
/// 3 x 4 and 2 x 6 tokens, behind which an answer has other positions.
#[test]
fn prompts_of_one_length_share_steps() {
    runtime().block_on(async {
        for name in FAMILIES {
            let engine = load(&family(name)).await;
            let side = if name.starts_with("qwen3") { 32 } else { 28 };
            let conversation = |(width, height): (u32, u32)| {
                let size = (width * side, height * side);
                let image = RgbImage::from_fn(size.0, size.1, |x, y| image::Rgb([x as u8, y as u8, 99]));
                vec![Turn::of_pictures("What is it?", vec![image])]
            };
            let conversations = [(4, 3), (6, 2), (3, 4), (2, 6)].map(conversation);
            let mut alone = Vec::new();
            for turns in &conversations {
                let answer = engine.answer(turns, &sampling(8)).await.expect("an answer");
                alone.push((answer.prompt_tokens, answer.tokens));
            }
            assert!(alone.iter().all(|(length, _)| *length == alone[0].0), "{name}: {alone:?}");
            let plain = Sampling { trace: false, ..sampling(8) };
            let answers = conversations.iter().map(|turns| engine.answer(turns, &plain));
            for ((_, alone), answer) in alone.iter().zip(futures::future::join_all(answers).await) {
                assert_eq!(*alone, answer.expect("an answer").tokens, "{name}");
            }
        }
    });
}

/// What cannot be answered is an error, and what follows is answered as ever.
#[test]
fn bad_conversations_are_errors() {
    runtime().block_on(async {
        for name in FAMILIES {
            let engine = load(&family(name)).await;
            let mut markers = Vec::new();
            for marker in ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"] {
                let mut turn = Turn::text(Role::User, format!("What is {marker}?"));
                markers.push(vec![turn.clone()]);
                turn.images.push(picture("wide"));
                markers.push(vec![turn]);
            }
            for turns in &markers {
                let error = engine.answer(turns, &sampling(2)).await.expect_err("a marker in the text");
                assert!(matches!(error, Error::Conversation(_)), "{error:?}");
            }
            // 512 tokens are the most; each of these takes 10 or more.
            let long = Turn::of_pictures("What?", vec![picture("wide"); 60]);
            let error = engine.answer(&[long], &sampling(2)).await.expect_err("a long prompt");
            assert!(error.to_string().contains("the model takes 512"), "{error}");
            let strip = Turn::of_pictures("What?", vec![RgbImage::new(201, 1)]);
            let error = engine.answer(&[strip], &sampling(2)).await.expect_err("a strip");
            assert!(error.to_string().contains("200"), "{error}");
            let empty = Turn::of_pictures("What?", vec![RgbImage::new(0, 0)]);
            engine.answer(&[empty], &sampling(2)).await.expect_err("a picture without pixels");

            let case = &cases(name)[0];
            let answer = engine.answer(&turns(case), &sampling(8)).await.expect("an answer");
            assert_eq!(answer.tokens, ids(&case["tokens"]), "{name}");
        }
    });
}

/// A template that leaves pictures out, or puts in more than there are.
#[test]
fn a_template_with_another_number_of_pictures_is_an_error() {
    runtime().block_on(async {
        for (marker, text) in [("", "0 `<|image_pad|>` token(s)"), ("<|image_pad|><|image_pad|>", "more")] {
            let folder = copy("qwen3_vl");
            let file = folder.path().join("tokenizer_config.json");
            let config = std::fs::read_to_string(&file).expect("the file");
            std::fs::write(&file, config.replace("<|image_pad|>", marker)).expect("the file is written");
            let engine = load(folder.path()).await;
            let case = &cases("qwen3_vl")[0];
            let error = engine.answer(&turns(case), &sampling(2)).await.expect_err("a wrong number");
            assert!(matches!(error, Error::Conversation(_)) && error.to_string().contains(text), "{error}");
        }
    });
}

/// `config.json` with one value changed, by its JSON pointer.
fn with(folder: &Path, pointer: &str, value: Value) {
    let file = folder.join("config.json");
    let text = std::fs::read_to_string(&file).expect("the file");
    let mut config: Value = serde_json::from_str(&text).expect("JSON");
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    let parent = config.pointer_mut(parent).and_then(Value::as_object_mut).expect("the parent");
    parent.insert(key.to_string(), value);
    std::fs::write(&file, config.to_string()).expect("the file is written");
}

#[test]
fn impossible_configurations_are_errors() {
    let common = |place: &str| {
        [
            (format!("{place}/hidden_size"), json!(0)),
            (format!("{place}/num_hidden_layers"), json!(u64::MAX)),
            (format!("{place}/num_key_value_heads"), json!(3)),
            (format!("{place}/vocab_size"), json!(-5)),
            (format!("{place}/vocab_size"), json!(300)),
            (format!("{place}/max_position_embeddings"), json!("many")),
            (format!("{place}/head_dim"), json!(7)),
            (format!("{place}/rope_theta"), json!(0)),
            (format!("{place}/rope_scaling"), json!({ "type": "yarn", "factor": 4.0 })),
            (format!("{place}/rope_scaling"), json!({ "mrope_section": [1] })),
            (format!("{place}/rope_scaling"), json!({ "mrope_section": [4, 4, 4] })),
            (format!("{place}/hidden_act"), json!("gelu")),
            (format!("{place}/use_sliding_window"), json!(true)),
            ("/image_token_id".to_string(), json!(4_000_000_000u64)),
            ("/vision_config/patch_size".to_string(), json!(0)),
            ("/vision_config/spatial_merge_size".to_string(), json!([2, 3])),
        ]
    };
    let experts = [
        ("/text_config/num_experts_per_tok".to_string(), json!(7)),
        ("/text_config/num_experts".to_string(), json!(0)),
    ];
    runtime().block_on(async {
        for name in FAMILIES {
            let place = if name.starts_with("qwen3") { "/text_config" } else { "" };
            let experts = experts.clone().into_iter().filter(|_| name == "qwen3_vl_moe");
            for (pointer, value) in common(place).into_iter().chain(experts) {
                let folder = copy(name);
                with(folder.path(), &pointer, value.clone());
                let error = try_load(folder.path()).await.err();
                assert!(matches!(error, Some(Error::Config { .. })), "{name} {pointer} {value}: {error:?}");
            }
        }
    });
}

#[test]
fn missing_weights_are_named() {
    runtime().block_on(async {
        for (name, weight) in [
            ("qwen2_vl", "model.layers.1.self_attn.k_proj.bias"),
            ("qwen2_vl", "visual.merger.mlp.2.weight"),
            ("qwen2_5_vl", "lm_head.weight"),
            ("qwen3_vl", "model.language_model.layers.0.self_attn.q_norm.weight"),
            ("qwen3_vl", "model.visual.deepstack_merger_list.1.norm.weight"),
            ("qwen3_vl_moe", "model.language_model.layers.1.mlp.gate.weight"),
            ("qwen3_vl_moe", "model.language_model.layers.1.mlp.experts.down_proj"),
        ] {
            let folder = copy(name);
            rename(
                folder.path(),
                |other| {
                    if other == weight { "another.weight".into() } else { other.to_string() }
                },
            );
            match try_load(folder.path()).await.err() {
                Some(Error::MissingWeight { name: found, .. }) => assert_eq!(found, weight),
                other => panic!("{name} without {weight}: {other:?}"),
            }
        }
    });
}

/// Largest difference of the first logits of two answers, over the largest.
async fn apart(one: &Engine, other: &Engine, turns: &[Turn]) -> f32 {
    let first = one.answer(turns, &sampling(1)).await.expect("an answer");
    let second = other.answer(turns, &sampling(1)).await.expect("an answer");
    assert_eq!(first.prompt_ids, second.prompt_ids);
    difference(&first.logits[0], &second.logits[0])
}

/// A defence acts on the pictures, and one without effect does nothing; both answer under load as
/// they do alone.
#[test]
fn defended_models_answer() {
    runtime().block_on(async {
        for name in FAMILIES {
            let defended = |defense: DefenseOptions| async move {
                let model = Model::find(&family(name).display().to_string(), &Lookup::default());
                let options = EngineOptions { defense, ..EngineOptions::new(Device::Cpu) };
                Engine::load(model.expect("a model"), options).await.expect("a loaded model")
            };
            let plain = load(&family(name)).await;
            assert!(plain.defense().is_none());
            let neutral =
                DefenseOptions { alpha: Some(0.0), beta: Some(1.0), no_gif: true, ..Default::default() };
            let neutral = defended(neutral).await;
            let full = defended(DefenseOptions::default()).await;
            assert!(
                full.defense().is_some_and(|defense| defense.cutoff.is_some() && defense.alpha.is_some())
            );

            let cases = cases(name);
            let pictures = turns(&cases[6]);
            assert!(apart(&plain, &neutral, &pictures).await <= 1e-5, "{name}: no effect");
            assert!(apart(&plain, &full, &pictures).await > 1e-3, "{name}: an effect");
            let text = turns(&cases[10]);
            assert_eq!(apart(&plain, &full, &text).await, 0.0, "{name}: no picture");

            let plain = Sampling { trace: false, ..sampling(8) };
            let conversations: Vec<Vec<Turn>> = cases.iter().map(turns).collect();
            let mut alone = Vec::new();
            for turns in &conversations {
                alone.push(full.answer(turns, &plain).await.expect("an answer").tokens);
            }
            let again = defended(DefenseOptions::default()).await;
            let answers = conversations.iter().map(|turns| again.answer(turns, &plain));
            for (alone, answer) in alone.iter().zip(futures::future::join_all(answers).await) {
                assert_eq!(*alone, answer.expect("an answer").tokens, "{name}");
            }
        }
    });
}

/// mistral.rs' own towers, with the merger's activation mended, and ours: the same answers. In logits
/// those of Qwen2-VL and Qwen2.5-VL are off by a few thousandths, from transformers' as from ours.
#[test]
fn upstreams_towers_and_ours_agree() {
    runtime().block_on(async {
        let mut all = Vec::new();
        for name in FAMILIES {
            let found =
                Model::find(&family(name).display().to_string(), &Lookup::default()).expect("a model");
            let none = DefenseOptions { anchor: AnchorChoice::None, ..Default::default() };
            let options =
                EngineOptions { upstream_tower: true, defense: none, ..EngineOptions::new(Device::Cpu) };
            let upstream = Engine::load(found.clone(), options).await.expect("a loaded model");
            let ours = load(&family(name)).await;
            let mut worst = 0f32;
            for case in cases(name) {
                let turns = turns(&case);
                worst = worst.max(apart(&upstream, &ours, &turns).await);
                let sampling = sampling(8);
                let a = upstream.answer(&turns, &sampling).await.expect("an answer");
                let b = ours.answer(&turns, &sampling).await.expect("an answer");
                assert_eq!(a.tokens, b.tokens, "{name}");
            }
            println!("{name}: first logits within {worst:.1e} of those with mistral.rs' own tower");
            all.push((name, worst));
            let defended = EngineOptions { upstream_tower: true, ..EngineOptions::new(Device::Cpu) };
            assert!(matches!(Engine::load(found, defended).await, Err(Error::Argument { .. })));
        }
        for (name, worst) in all {
            let right = name.starts_with("qwen3");
            assert!(worst <= if right { 1e-4 } else { 1e-2 }, "{name}: {worst}");
        }
    });
}

/// A server that ends with the test, however that ends.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command and the server answer as the library does, undefended and defended.
#[test]
fn chat_and_serve_answer_for_every_family() {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::process::{Command, Stdio};

    use base64::Engine as _;

    let binary = env!("CARGO_BIN_EXE_radapt");
    let picture = path("qwen_chat/pictures/wide.png");
    let other = path("qwen_chat/pictures/tall.png");
    let url = |path: &Path| {
        let bytes = std::fs::read(path).expect("a picture");
        format!("data:image/png;base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
    };
    for name in FAMILIES {
        let folder = family(name);
        let model = folder.to_str().expect("a name");
        let mut seen = Vec::new();
        for anchor in ["none", "training-free"] {
            let output = Command::new(binary)
                .args(["chat", "--model", model, "--anchor", anchor, "--max-tokens", "8", "--json"])
                .args([
                    "--image",
                    picture.to_str().expect("a name"),
                    "--image",
                    other.to_str().expect("a name"),
                ])
                .arg("what is it ?")
                .output()
                .expect("a process");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name} {anchor}: {stderr}");
            let said: Value = serde_json::from_slice(&output.stdout).expect("json");
            assert_eq!(said["defense"].is_null(), anchor == "none");
            assert_eq!(said["contract"], "qwen");
            let logprobs = said["logprobs"].clone();
            assert_eq!(said["tokens"].as_array().map(Vec::is_empty), Some(false), "{said}");

            let mut server = Running(
                Command::new(binary)
                    .args(["serve", "--model", model, "--anchor", anchor, "--addr", "127.0.0.1:0", "--json"])
                    .stdout(Stdio::piped())
                    .spawn()
                    .expect("a server"),
            );
            let mut line = String::new();
            let stdout = server.0.stdout.take().expect("its first line");
            BufReader::new(stdout).read_line(&mut line).expect("its first line");
            let started: Value = serde_json::from_str(&line).expect("json");
            let address = started["address"].as_str().expect("an address").to_string();
            let served = started["model"].clone();
            let content = json!([
                { "type": "image_url", "image_url": { "url": url(&picture) } },
                { "type": "image_url", "image_url": { "url": url(&other) } },
                { "type": "text", "text": "what is it ?" },
            ]);
            let body = json!({
                "model": served,
                "messages": [{ "role": "user", "content": content }],
                "max_tokens": 8, "temperature": 0,
            });
            let ask = |body: String, address: String| {
                let mut socket = std::net::TcpStream::connect(address).expect("a socket");
                let length = body.len();
                let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
                write!(
                    socket,
                    "{head}content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
                )
                .expect("a request");
                let mut text = String::new();
                socket.read_to_string(&mut text).expect("a response");
                let json = text.split("\r\n\r\n").nth(1).expect("a body").to_string();
                let start = json.find('{').expect("json");
                let end = json.rfind('}').expect("json");
                serde_json::from_str::<Value>(&json[start..=end]).expect("json")
            };
            // Several at once have the one answer.
            let threads: Vec<_> = (0..3)
                .map(|_| {
                    let (body, address) = (body.to_string(), address.clone());
                    std::thread::spawn(move || ask(body, address))
                })
                .collect();
            for thread in threads {
                let found = thread.join().expect("an answer");
                let text = found["choices"][0]["message"]["content"].as_str();
                assert_eq!(text, said["answer"].as_str(), "{name} {anchor}: {found}");
            }
            seen.push(logprobs);
        }
        assert_ne!(seen[0], seen[1], "{name}: the defence has an effect");
    }
}
