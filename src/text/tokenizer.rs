//! CLIP's byte-level BPE tokenizer.

use std::path::Path;

use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, NormalizerWrapper, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessor, SplitDelimiterBehavior, TruncationParams};

use crate::{Error, Result};

/// How CLIP cuts a text into words, from transformers 5.23 `models/clip/tokenization_clip.py`.
const WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A CLIP's tokenizer: texts to token ids between a start and an end, cut to the model's length.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    limit: usize,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json`, or CLIP's pipeline around
    /// `vocab.json` and `merges.txt`. Texts are cut to `limit` tokens, the model's
    /// `max_position_embeddings`; a file's own padding and truncation are set aside.
    ///
    /// Start and end are those the file puts around a text. Where it puts none they are the
    /// `bos_token` and `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`, or
    /// else `<|startoftext|>` and `<|endoftext|>`.
    ///
    /// # Errors
    /// If a file is missing or damaged, a text would not come to lie between two tokens, or `limit`
    /// leaves no room between them.
    pub fn load(folder: &Path, limit: usize) -> Result<Self> {
        let file = folder.join("tokenizer.json");
        let (file, inner) = if file.is_file() {
            let text = std::fs::read(&file).map_err(|e| Error::read(&file, e))?;
            let mut inner =
                tokenizers::Tokenizer::from_bytes(text).map_err(|e| Error::config(&file, first_line(&e)))?;
            if inner.get_post_processor().is_none_or(|processor| processor.added_tokens(false) == 0) {
                surround(&mut inner, folder, &file)?;
            }
            (file, inner)
        } else {
            let vocabulary = folder.join("vocab.json");
            let merges = folder.join("merges.txt");
            if !vocabulary.is_file() || !merges.is_file() {
                return Err(Error::config(
                    folder,
                    "no tokenizer: neither tokenizer.json nor vocab.json with merges.txt",
                ));
            }
            let inner = clip(folder, &vocabulary, &merges)?;
            (vocabulary, inner)
        };
        Self::new(inner, limit, &file)
    }

    fn new(mut inner: tokenizers::Tokenizer, limit: usize, file: &Path) -> Result<Self> {
        let fail = |e: tokenizers::Error| Error::config(file, first_line(&e));
        inner.with_padding(None);
        inner.with_truncation(None).map_err(fail)?;
        let around = inner.encode_fast("", true).map_err(fail)?;
        let added = inner.get_post_processor().map_or(0, |processor| processor.added_tokens(false));
        let (start, end) = match *around.get_ids() {
            [start, end] if added == 2 => (start, end),
            ref ids => {
                let reason =
                    format!("expected one token before a text and one after it, found {ids:?} around none");
                return Err(Error::config(file, reason));
            }
        };
        // Below this the library computes a negative length.
        if limit <= added {
            return Err(Error::argument(
                "max_position_embeddings",
                "more than the start and end of a text",
                limit,
            ));
        }
        // The library cuts the text between the two, so the end stays.
        let truncation = TruncationParams { max_length: limit, ..Default::default() };
        inner.with_truncation(Some(truncation)).map_err(fail)?;
        Ok(Self { inner, start, end, limit })
    }

    /// The token ids of each text with its start and its end, at most [`Tokenizer::limit`].
    ///
    /// # Errors
    /// If a text holds what the vocabulary cannot spell and it has no token for the unknown.
    pub fn ids(&self, texts: &[impl AsRef<str>]) -> Result<Vec<Vec<u32>>> {
        let texts = texts.iter().map(AsRef::as_ref).collect::<Vec<&str>>();
        let encodings = self
            .inner
            .encode_batch_fast(texts, true)
            .map_err(|e| Error::Unsupported(format!("cannot tokenize: {}", first_line(&e))))?;
        Ok(encodings.iter().map(|encoding| encoding.get_ids().to_vec()).collect())
    }

    /// The id of the token before every text.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// The id of the token after every text.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The most tokens a text has, start and end among them.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

/// CLIP's pipeline around a vocabulary, as transformers' `CLIPTokenizer` builds it.
fn clip(folder: &Path, vocabulary: &Path, merges: &Path) -> Result<tokenizers::Tokenizer> {
    let fail = |e: tokenizers::Error| Error::config(vocabulary, first_line(&e));
    let text = |path: &Path| {
        path.to_str().map(String::from).ok_or_else(|| Error::config(path, "the path is not UTF-8"))
    };
    let (ids, pairs) = BPE::read_file(&text(vocabulary)?, &text(merges)?)
        .map_err(|e| Error::config(folder, format!("vocab.json and merges.txt: {}", first_line(&e))))?;
    let unknown = special_token(folder, "unk_token")?.unwrap_or_else(|| END.into());
    let model = BPE::builder()
        .vocab_and_merges(ids, pairs)
        .unk_token(unknown)
        .end_of_word_suffix("</w>".into())
        .build()
        .map_err(|e| Error::config(folder, format!("vocab.json and merges.txt: {}", first_line(&e))))?;
    let mut inner = tokenizers::Tokenizer::new(model);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ").map_err(fail)?;
    let words = SplitPattern::Regex(WORDS.into());
    let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(fail)?;
    let steps: Vec<NormalizerWrapper> = vec![NFC.into(), spaces.into(), Lowercase.into()];
    inner.with_normalizer(Some(tokenizers::normalizers::Sequence::new(steps)));
    inner.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::sequence::Sequence::new(vec![
        words.into(),
        ByteLevel::default().add_prefix_space(false).into(),
    ])));
    surround(&mut inner, folder, vocabulary)?;
    Ok(inner)
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// Has every text begin and end with the folder's special tokens.
fn surround(inner: &mut tokenizers::Tokenizer, folder: &Path, file: &Path) -> Result<()> {
    let start = special_token(folder, "bos_token")?.unwrap_or_else(|| START.into());
    let end = special_token(folder, "eos_token")?.unwrap_or_else(|| END.into());
    let id = |token: &str| {
        inner
            .token_to_id(token)
            .ok_or_else(|| Error::config(file, format!("no token `{token}` to put around texts")))
    };
    let ids = [(start.clone(), id(&start)?), (end.clone(), id(&end)?)];
    inner.add_special_tokens(&[AddedToken::from(start.clone(), true), AddedToken::from(end.clone(), true)]);
    let mut template = TemplateProcessing::builder();
    template.try_single(vec![start, "$A".into(), end]).map_err(|e| Error::config(file, e))?;
    let template =
        template.special_tokens(ids.to_vec()).build().map_err(|e| Error::config(file, first_line(&e)))?;
    inner.with_post_processor(Some(template));
    Ok(())
}

/// One of the tokens that `tokenizer_config.json` or `special_tokens_map.json` names, as a string or
/// as an object with its `content`.
fn special_token(folder: &Path, name: &str) -> Result<Option<String>> {
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| Error::config(&path, e.to_string()))?;
        let token = json.get(name).and_then(|token| token.get("content").unwrap_or(token).as_str());
        if let Some(token) = token {
            return Ok(Some(token.to_string()));
        }
    }
    Ok(None)
}

fn first_line(error: &impl ToString) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
