//! The pocket models' words: prompts, and the two tokenizers, learnt from what the world says.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{Tokenizer, Trainer};

use crate::pocket::{KINDS, Scene};
use crate::{Error, Result};

/// Prompts for a class in training; `{class}` is its name. The first is the one accuracy is given for.
pub const TEMPLATES: [&str; 16] = [
    "a photo of a {class}.",
    "a photo of the {class}.",
    "a picture of a {class}.",
    "an image of a {class}.",
    "a {class}.",
    "a close-up photo of a {class}.",
    "a bright photo of the {class}.",
    "a dark photo of a {class}.",
    "a blurry photo of a {class}.",
    "a photo of one {class}.",
    "a photo of a small {class}.",
    "a photo of a large {class}.",
    "a drawing of a {class}.",
    "there is a {class} in the picture.",
    "this is a {class}.",
    "{class}",
];

/// The instruction that the reference caption answers, as in V-Attack's evaluation.
pub const DESCRIBE: &str = "Describe the image briefly in one sentence.";

/// How a LLaVA conversation is written, after the template of LLaVA-1.5.
pub const CHAT_TEMPLATE: &str = "<s>{% for m in messages %}{% if m['role'] == 'user' %}USER: {% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% endif %}{% endfor %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} {% elif m['role'] == 'assistant' %}ASSISTANT:{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";

fn fail(e: impl std::fmt::Display) -> Error {
    Error::argument("tokenizer", "a tokenizer", e)
}

/// Byte-pair merges over `words`, most frequent pairs first.
fn merges(words: &HashMap<String, u64>, suffix: Option<&str>) -> Result<Vec<(String, String)>> {
    let mut trainer = BpeTrainer::builder().show_progress(false).vocab_size(1 << 14).min_frequency(3);
    if let Some(suffix) = suffix {
        trainer = trainer.end_of_word_suffix(suffix.to_string());
    }
    let mut trainer = trainer.build();
    // Each word as often as it was said; the trainer counts them again.
    let said = words.iter().flat_map(|(word, n)| std::iter::repeat_n(word.as_str(), *n as usize));
    trainer.feed(said, |word| Ok(vec![word.to_string()])).map_err(fail)?;
    let mut bpe = BPE::default();
    trainer.train(&mut bpe).map_err(fail)?;
    let json = serde_json::to_value(&bpe).map_err(fail)?;
    let pair = |merge: &Value| match merge {
        Value::Array(two) => Some((two.first()?.as_str()?.to_string(), two.get(1)?.as_str()?.to_string())),
        Value::String(text) => text.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
        _ => None,
    };
    let all = json["merges"].as_array().map(|list| list.iter().filter_map(pair).collect());
    all.ok_or_else(|| fail("no merges"))
}

/// The 256 characters that stand for bytes, in order.
fn alphabet() -> Vec<String> {
    let mut all: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    all.sort_unstable();
    all.into_iter().map(String::from).collect()
}

fn count(words: &mut HashMap<String, u64>, tokenizer: &Tokenizer, text: &str) -> Result<()> {
    use tokenizers::{Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
    let mut normal = tokenizers::NormalizedString::from(text);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut normal).map_err(fail)?;
    }
    let mut split = PreTokenizedString::from(normal);
    if let Some(pre) = tokenizer.get_pre_tokenizer() {
        pre.pre_tokenize(&mut split).map_err(fail)?;
    }
    for (word, _, _) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
        *words.entry(word.to_string()).or_default() += 1;
    }
    Ok(())
}

fn parse(json: &Value) -> Result<Tokenizer> {
    Tokenizer::from_bytes(json.to_string()).map_err(fail)
}

fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
}

fn numbered(tokens: Vec<String>) -> serde_json::Map<String, Value> {
    tokens.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect()
}

fn joined(merges: &[(String, String)]) -> Vec<String> {
    merges.iter().map(|(a, b)| format!("{a}{b}")).collect()
}

/// CLIP's kind of tokenizer: lower case, bytes, word ends marked, ids of start and end last.
///
/// # Errors
/// If the tokenizers library refuses.
pub fn clip_tokenizer(scenes: &[Scene]) -> Result<Value> {
    const START: &str = "<|startoftext|>";
    const END: &str = "<|endoftext|>";
    let build = |merges: &[(String, String)]| {
        let bytes = alphabet();
        let mut tokens: Vec<String> = bytes.clone();
        tokens.extend(bytes.iter().map(|b| format!("{b}</w>")));
        tokens.extend(joined(merges));
        let (start, end) = (tokens.len(), tokens.len() + 1);
        tokens.extend([START.to_string(), END.to_string()]);
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(start, START), special(end, END)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
                {"type": "Lowercase"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"}, "behavior": "Removed", "invert": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
            "post_processor": {"type": "RobertaProcessing", "sep": [END, end], "cls": [START, start], "trim_offsets": false, "add_prefix_space": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": END, "continuing_subword_prefix": "",
                "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": numbered(tokens), "merges": merges.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>()}
        })
    };
    let plain = parse(&build(&[]))?;
    let mut words = HashMap::new();
    for scene in scenes {
        count(&mut words, &plain, &scene.caption)?;
    }
    for template in TEMPLATES {
        for kind in &KINDS {
            for _ in 0..3 {
                count(&mut words, &plain, &template.replace("{class}", kind.name))?;
            }
        }
    }
    Ok(build(&merges(&words, Some("</w>"))?))
}

/// A byte-level tokenizer such as Llama 3's, with LLaVA's special tokens first.
///
/// # Errors
/// If the tokenizers library refuses.
pub fn llava_tokenizer(scenes: &[Scene]) -> Result<Value> {
    const SPECIAL: [&str; 5] = ["<unk>", "<s>", "</s>", "<pad>", "<image>"];
    let build = |merges: &[(String, String)]| {
        let mut tokens: Vec<String> = SPECIAL.map(String::from).to_vec();
        tokens.extend(alphabet());
        tokens.extend(joined(merges));
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": SPECIAL.iter().enumerate().map(|(id, text)| special(id, text)).collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": numbered(tokens), "merges": merges.iter().map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>()}
        })
    };
    let plain = parse(&build(&[]))?;
    let mut words = HashMap::new();
    let mut say = |text: &str| count(&mut words, &plain, text);
    for scene in scenes {
        say(&scene.caption)?;
        say(DESCRIBE)?;
        say("USER: \nASSISTANT:")?;
        for pair in scene.questions.iter().chain(&scene.more) {
            say(&pair.question)?;
            say(&format!(" {} ASSISTANT:", pair.question))?;
            say(&pair.answer)?;
        }
    }
    Ok(build(&merges(&words, None)?))
}

/// Reads a `tokenizer.json`.
///
/// # Errors
/// If the file cannot be read or is none.
pub fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|e| Error::config(path, e.to_string()))
}

/// The ids of `text`.
///
/// # Errors
/// If the tokenizer refuses.
pub fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    Ok(tokenizer.encode_fast(text, true).map_err(fail)?.get_ids().to_vec())
}
