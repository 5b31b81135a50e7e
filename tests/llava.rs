//! LLaVA through mistral.rs against transformers 5.23: prompt token ids, greedy tokens, logits.
#![cfg(feature = "engine")]

mod fixture;

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use fixture::{Fixture, path};
use image::RgbImage;
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::engine::{Engine, EngineOptions, Role, Sampling, Turn};
use radapt::image::{Contract, DecodeLimits, decode_file};
use radapt::model::{Lookup, Model};
use radapt::tower::clip::without_class_token;
use radapt::tower::{VisionTower, Want};
use serde_json::Value;

/// Largest difference over largest value that logits may have.
const LOGITS: f32 = 1e-4;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a runtime")
}

fn undefended() -> DefenseOptions {
    DefenseOptions { anchor: AnchorChoice::None, ..DefenseOptions::default() }
}

async fn load(folder: &Path, contract: Option<Contract>, defense: DefenseOptions) -> Engine {
    let model = Model::find(&folder.display().to_string(), &Lookup::default()).expect("a model");
    let options = EngineOptions { defense, contract, ..EngineOptions::new(candle_core::Device::Cpu) };
    Engine::load(model, options).await.expect("a loaded model")
}

fn picture(folder: &str, name: &str) -> RgbImage {
    decode_file(&path(&format!("{folder}/pictures/{name}.png")), &DecodeLimits::default()).expect("a picture")
}

fn sampling(tokens: usize) -> Sampling {
    Sampling { max_tokens: tokens, top_logprobs: Some(1), trace: true, ..Sampling::default() }
}

/// The turns of a case: pictures go to the image parts in order.
fn turns(case: &Value, folder: &str) -> Vec<Turn> {
    let mut pictures = case["pictures"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|name| picture(folder, name.as_str().expect("a name")));
    let messages = case["messages"].as_array().expect("messages");
    messages
        .iter()
        .map(|message| {
            let role = if message["role"] == "assistant" { Role::Assistant } else { Role::User };
            let mut turn = Turn::text(role, "");
            for part in message["content"].as_array().expect("content in parts") {
                match part["type"].as_str() {
                    Some("image") => {
                        turn.images.push(pictures.next().expect("a picture for each image part"))
                    }
                    _ => turn.text = part["text"].as_str().expect("text").to_string(),
                }
            }
            turn
        })
        .collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn cases(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(path(file)).expect("the fixture");
    serde_json::from_str::<Vec<Value>>(&text).expect("cases")
}

/// Runs every case of one contract and returns the largest relative difference of the logits.
async fn agree(
    model: &Path,
    folder: &str,
    cases: &[Value],
    expected: &Fixture,
    contract: Option<&str>,
) -> f32 {
    let engine = load(model, contract.map(|c| c.parse().expect("a contract")), undefended()).await;
    let mut worst = 0f32;
    let cases =
        cases.iter().filter(|case| case["contract"].as_str() == contract || case["contract"].is_null());
    for case in cases {
        let name = case["name"].as_str().expect("a name");
        let answer = engine.answer(&turns(case, folder), &sampling(8)).await.expect("an answer");
        assert_eq!(answer.prompt_ids, ids(&case["ids"]), "{name}: prompt ids");
        assert_eq!(answer.prompt_tokens, answer.prompt_ids.len(), "{name}: usage");
        assert_eq!(answer.tokens, ids(&case["tokens"]), "{name}: tokens");
        assert_eq!(answer.text.trim(), case["text"].as_str().expect("text").trim(), "{name}: text");
        let logits = expected.tensor(&format!("{name}.logits")).to_vec2::<f32>().expect("rows");
        assert_eq!(answer.logits.len(), logits.len(), "{name}: steps");
        for (step, (found, expected)) in answer.logits.iter().zip(&logits).enumerate() {
            let scale = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
            let difference = found.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale;
            assert!(difference <= LOGITS, "{name}: logits of step {step} differ by {difference}");
            worst = worst.max(difference);
            // log softmax of the expected logits at the chosen token
            let sum: f64 = expected.iter().map(|&v| f64::from(v).exp()).sum();
            let logprob = f64::from(expected[answer.tokens[step] as usize]) - sum.ln();
            assert!(
                (f64::from(answer.logprobs[step]) - logprob).abs() < 1e-4,
                "{name}: logprob of step {step}"
            );
        }
    }
    println!("{}: logits differ by at most {worst:e}", model.display());
    worst
}

#[test]
fn image_features_are_those_of_transformers_layer_minus_two() {
    for tokenizer in ["v4", "sp"] {
        let expected = Fixture::open(&format!("llava/expected_{tokenizer}.safetensors"));
        let model =
            Model::find(&path(&format!("llava/{tokenizer}")).display().to_string(), &Lookup::default())
                .expect("a model");
        let (block, class_token) = model.features().expect("a feature layer");
        assert_eq!((block, class_token), (3, false), "-2 of four blocks is block 3");
        for contract in ["llava-crop", "llava-pad"] {
            let preprocess =
                model.preprocess(Some(contract.parse().expect("a contract"))).expect("a preprocessor");
            let tower = model.tower(&preprocess, None, &candle_core::Device::Cpu).expect("a tower");
            for name in ["wide", "tall"] {
                let case = format!("{contract}.{name}");
                let prepared = preprocess.prepare(&picture("llava", name));
                let levels = expected
                    .tensor(&format!("{case}.u8"))
                    .permute((1, 2, 0))
                    .and_then(|t| t.flatten_all())
                    .expect("levels");
                assert_eq!(
                    prepared.as_raw(),
                    &levels.to_vec1::<u8>().expect("levels"),
                    "{case}: the prepared picture"
                );
                let pixels =
                    preprocess.batch(&[picture("llava", name)], &candle_core::Device::Cpu).expect("pixels");
                let features = tower.forward(&pixels, &Want::hidden(block)).expect("features");
                let features = without_class_token(&features.hidden[0])
                    .and_then(|f| Ok(f.squeeze(0)?))
                    .expect("patches");
                let expected = expected.tensor(&format!("{case}.features"));
                let largest = |t: &Tensor| {
                    t.abs().and_then(|t| t.flatten_all()?.max(0)?.to_scalar::<f32>()).expect("a number")
                };
                let difference =
                    largest(&(&features - &expected).expect("equal shapes")) / largest(&expected);
                assert!(difference <= 1e-5, "{tokenizer} {case}: features differ by {difference}");
            }
        }
    }
}

#[test]
fn llava_agrees_with_transformers_for_both_contracts() {
    let (cases, expected) = (cases("llava/expected_v4.json"), Fixture::open("llava/expected_v4.safetensors"));
    runtime().block_on(async {
        for contract in ["llava-crop", "llava-pad"] {
            agree(&path("llava/v4"), "llava", &cases, &expected, Some(contract)).await;
        }
    });
}

#[test]
fn every_layout_transformers_5_writes_is_read() {
    let (cases, expected) = (cases("llava/expected_v4.json"), Fixture::open("llava/expected_v4.safetensors"));
    // As saved by transformers 5 without its tokenizer: the other files come from beside it.
    let saved = tempfile::tempdir().expect("a folder");
    for (from, files) in [("llava/v5", None), ("llava/v5_saved", Some(()))] {
        for entry in std::fs::read_dir(path(from)).expect("the fixture").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if files.is_some() || !(name.contains("safetensors") || name == "config.json") {
                std::fs::copy(entry.path(), saved.path().join(name)).expect("a copy");
            }
        }
    }
    runtime().block_on(async {
        for folder in [path("llava/v5"), saved.path().to_path_buf()] {
            agree(&folder, "llava", &cases, &expected, Some("llava-crop")).await;
        }
    });
}

#[test]
fn sentencepiece_prompts_have_transformers_token_ids() {
    let (cases, expected) = (cases("llava/expected_sp.json"), Fixture::open("llava/expected_sp.safetensors"));
    runtime().block_on(async {
        for contract in ["llava-crop", "llava-pad"] {
            agree(&path("llava/sp"), "llava", &cases, &expected, Some(contract)).await;
        }
    });
}

#[test]
fn llava_next_agrees_with_transformers() {
    let (cases, expected) =
        (cases("llava_next/expected.json"), Fixture::open("llava_next/expected.safetensors"));
    runtime().block_on(agree(&path("llava_next/model"), "llava_next", &cases, &expected, None));
}

/// Requests that run at once share batches of prompts and of decoding steps.
#[test]
fn concurrent_answers_equal_single_ones() {
    let cases = cases("llava/expected_v4.json");
    runtime().block_on(async {
        let engine = load(&path("llava/v4"), Some(Contract::LlavaCrop), undefended()).await;
        let chosen: Vec<&Value> =
            cases.iter().filter(|case| case["contract"].as_str() != Some("llava-pad")).collect();
        for _ in 0..3 {
            let conversations: Vec<Vec<Turn>> = chosen.iter().map(|case| turns(case, "llava")).collect();
            let plain = Sampling { trace: false, ..sampling(8) };
            let answers =
                futures::future::join_all(conversations.iter().map(|turns| engine.answer(turns, &plain)))
                    .await;
            for (case, answer) in chosen.iter().zip(answers) {
                assert_eq!(answer.expect("an answer").tokens, ids(&case["tokens"]), "{}", case["name"]);
            }
        }
    });
}

#[test]
fn a_defence_without_effect_leaves_the_logits_as_they_are() {
    let cases = cases("llava/expected_v4.json");
    runtime().block_on(async {
        let contract = Some(Contract::LlavaPad);
        let plain = load(&path("llava/v4"), contract, undefended()).await;
        assert!(plain.defense().is_none());
        let neutral =
            DefenseOptions { alpha: Some(0.0), beta: Some(1.0), no_gif: true, ..DefenseOptions::default() };
        let neutral = load(&path("llava/v4"), contract, neutral).await;
        let defended = load(&path("llava/v4"), contract, DefenseOptions::default()).await;
        let turns = turns(&cases[0], "llava");
        let plain = plain.answer(&turns, &sampling(4)).await.expect("an answer");
        assert_eq!(plain.logits, neutral.answer(&turns, &sampling(4)).await.expect("an answer").logits);
        // Two models in one process keep their own towers.
        assert_ne!(plain.logits, defended.answer(&turns, &sampling(4)).await.expect("an answer").logits);
    });
}

#[test]
fn in_situ_quantisation_loads_and_answers() {
    let cases = cases("llava/expected_v4.json");
    runtime().block_on(async {
        let model =
            Model::find(&path("llava/v4").display().to_string(), &Lookup::default()).expect("a model");
        let options =
            EngineOptions { isq: Some("q8_0".into()), ..EngineOptions::new(candle_core::Device::Cpu) };
        let engine = Engine::load(model, options).await.expect("a loaded model");
        let answer = engine.answer(&turns(&cases[0], "llava"), &sampling(4)).await.expect("an answer");
        assert_eq!(answer.tokens.len(), 4);
    });
}

fn shared() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("shared");
    let there = folder.join("models/cifar-llava/config.json").is_file()
        && folder.join("data/cifar10/test_batch.bin").is_file();
    if !there {
        eprintln!("SKIPPED: {} has no models/cifar-llava and data/cifar10", folder.display());
    }
    there.then_some(folder)
}

#[test]
fn a_trained_llava_answers_as_in_transformers_about_real_photos() {
    let Some(shared) = shared() else { return };
    let text = std::fs::read_to_string(path("shared_llava/expected.json")).expect("the fixture");
    let expected: Value = serde_json::from_str(&text).expect("answers");
    let bytes = std::fs::read(shared.join("data/cifar10/test_batch.bin")).expect("the photos");
    let questions: Vec<&str> =
        expected["questions"].as_array().expect("questions").iter().filter_map(Value::as_str).collect();
    let answers = expected["answers"].as_array().expect("answers");
    let limit = expected["max_tokens"].as_u64().expect("a limit") as usize;
    runtime().block_on(async {
        let engine = load(&shared.join("models/cifar-llava"), None, undefended()).await;
        let mut wrong = Vec::new();
        for (i, expected) in answers.iter().enumerate() {
            let row = &bytes[i / questions.len() * 3073 + 1..][..3072];
            let photo = RgbImage::from_fn(32, 32, |x, y| {
                let at = (y * 32 + x) as usize;
                image::Rgb([row[at], row[1024 + at], row[2048 + at]])
            });
            let turn = Turn::of_pictures(questions[i % questions.len()], vec![photo]);
            let answer = engine
                .answer(&[turn], &Sampling { trace: false, ..sampling(limit) })
                .await
                .expect("an answer");
            if answer.tokens != ids(&expected["tokens"]) {
                wrong.push(format!("answer {i}: {:?}, transformers {}", answer.text, expected["text"]));
            }
        }
        assert!(
            wrong.is_empty(),
            "{} of {} answers differ:\n{}",
            wrong.len(),
            answers.len(),
            wrong.join("\n")
        );
        println!("{} answers about real photos equal transformers'", answers.len());
    });
}
