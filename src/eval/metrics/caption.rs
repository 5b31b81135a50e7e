//! Captions against references: CIDEr-D and BLEU-4 as pycocoevalcap computes them.
//!
//! ```
//! use radapt::eval::metrics::caption::{Captioned, score};
//!
//! # fn main() -> radapt::Result<()> {
//! let said = |caption: &str, references: &[&str]| Captioned::new(caption, references);
//! let items = [
//!     said("A red car on the road.", &["A red car on the road.", "A car drives along a road."]),
//!     said("A dog.", &["A black cat asleep on a sofa."]),
//! ];
//! let scores = score(&items)?;
//! assert!(scores.ciders[0] > 100.0 && scores.ciders[1] < 1.0);
//! # Ok(())
//! # }
//! ```

use std::collections::HashMap;

use serde::Serialize;

use crate::{Error, Result};

const N: usize = 4;
/// Of the penalty on the difference in length, as in CIDEr-D.
const SIGMA: f64 = 6.0;

/// A caption and what people wrote, tokenised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captioned {
    caption: Vec<String>,
    references: Vec<Vec<String>>,
}

impl Captioned {
    /// Tokenises a caption and its references.
    pub fn new(caption: &str, references: &[impl AsRef<str>]) -> Self {
        Self {
            caption: tokenise(caption),
            references: references.iter().map(|reference| tokenise(reference.as_ref())).collect(),
        }
    }

    /// Of words that a tokeniser made, with spaces between them.
    pub fn tokenised(caption: &str, references: &[impl AsRef<str>]) -> Self {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let references = references.iter().map(|reference| words(reference.as_ref())).collect();
        Self { caption: words(caption), references }
    }
}

/// What captions come to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaptionScores {
    /// Captions.
    pub n: usize,
    /// CIDEr-D times 100, as papers print it: 100 times pycocoevalcap's mean.
    pub cider: f64,
    /// BLEU-4 of the corpus times 100.
    pub bleu4: f64,
    /// CIDEr-D times 100 of each caption; the document frequencies are of all references given.
    pub ciders: Vec<f64>,
    /// BLEU-4 times 100 of each caption.
    pub bleu4s: Vec<f64>,
}

/// Scores captions. CIDEr-D weighs n-grams by how rare they are among the references of all items, so
/// that figures over different items do not compare, and one item alone scores 0.
///
/// # Errors
/// If there are no captions or one has no reference.
pub fn score(items: &[Captioned]) -> Result<CaptionScores> {
    if items.is_empty() {
        return Err(Error::argument("captions", "at least one", 0));
    }
    if let Some(i) = items.iter().position(|item| item.references.is_empty()) {
        return Err(Error::argument("captions", "a reference for each", format!("none for caption {i}")));
    }
    let ciders: Vec<f64> = cider(items).into_iter().map(|value| 100.0 * value).collect();
    let counts: Vec<Counts> = items.iter().map(Counts::new).collect();
    let all = counts.iter().fold(Counts::default(), |sum, one| sum.and(one));
    Ok(CaptionScores {
        n: items.len(),
        cider: ciders.iter().sum::<f64>() / items.len() as f64,
        bleu4: 100.0 * all.bleu4(),
        ciders,
        bleu4s: counts.iter().map(|one| 100.0 * one.bleu4()).collect(),
    })
}

type Ngrams<'a> = HashMap<&'a [String], usize>;

/// How often each n-gram of 1 to 4 words comes.
fn ngrams(words: &[String]) -> Ngrams<'_> {
    let mut all = HashMap::new();
    for n in 1..=N {
        for gram in words.windows(n) {
            *all.entry(gram).or_insert(0) += 1;
        }
    }
    all
}

fn cider(items: &[Captioned]) -> Vec<f64> {
    let references: Vec<Vec<Ngrams>> =
        items.iter().map(|item| item.references.iter().map(|words| ngrams(words)).collect()).collect();
    let mut frequency: HashMap<&[String], usize> = HashMap::new();
    for of_one in &references {
        let mut seen: Vec<&[String]> = of_one.iter().flat_map(|grams| grams.keys().copied()).collect();
        seen.sort_unstable();
        seen.dedup();
        for gram in seen {
            *frequency.entry(gram).or_insert(0) += 1;
        }
    }
    let documents = (items.len() as f64).ln();
    let weight = |gram: &[String], count: usize| {
        count as f64 * (documents - (frequency.get(gram).copied().unwrap_or(0).max(1) as f64).ln())
    };
    // The norm of each order, and the length, in bigrams as the original counts it.
    let weigh = |grams: &Ngrams<'_>| -> ([f64; N], f64) {
        let (mut norms, mut length) = ([0.0; N], 0.0);
        // Sorted, so that the sums are the same every time.
        let mut sorted: Vec<_> = grams.iter().collect();
        sorted.sort_unstable();
        for (gram, count) in sorted {
            norms[gram.len() - 1] += weight(gram, *count).powi(2);
            if gram.len() == 2 {
                length += *count as f64;
            }
        }
        (norms.map(f64::sqrt), length)
    };
    items
        .iter()
        .zip(&references)
        .map(|(item, of_one)| {
            let said = ngrams(&item.caption);
            let mut sorted: Vec<_> = said.iter().map(|(gram, count)| (*gram, *count)).collect();
            sorted.sort_unstable();
            let (norms, length) = weigh(&said);
            let mut sum = 0.0;
            for reference in of_one {
                let (other, other_length) = weigh(reference);
                let mut values = [0.0; N];
                for (gram, count) in &sorted {
                    if let Some(there) = reference.get(gram) {
                        let (mine, theirs) = (weight(gram, *count), weight(gram, *there));
                        values[gram.len() - 1] += mine.min(theirs) * theirs;
                    }
                }
                let penalty = (-(length - other_length).powi(2) / (2.0 * SIGMA * SIGMA)).exp();
                for n in 0..N {
                    if norms[n] != 0.0 && other[n] != 0.0 {
                        values[n] /= norms[n] * other[n];
                    }
                    sum += values[n] * penalty;
                }
            }
            10.0 * sum / N as f64 / of_one.len() as f64
        })
        .collect()
}

/// What BLEU counts.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    correct: [usize; N],
    guessed: [usize; N],
    length: usize,
    /// Of the reference whose length is closest, the shorter of two.
    reference: usize,
}

impl Counts {
    fn new(item: &Captioned) -> Self {
        let length = item.caption.len();
        let mut counts = Self { length, ..Self::default() };
        let closest = item.references.iter().map(Vec::len).min_by_key(|len| (len.abs_diff(length), *len));
        counts.reference = closest.unwrap_or(0);
        for n in 0..N {
            counts.guessed[n] = length.saturating_sub(n);
        }
        let references: Vec<Ngrams> = item.references.iter().map(|words| ngrams(words)).collect();
        for (gram, count) in ngrams(&item.caption) {
            let most = references.iter().filter_map(|grams| grams.get(gram)).max().copied().unwrap_or(0);
            counts.correct[gram.len() - 1] += count.min(most);
        }
        counts
    }

    fn and(mut self, other: &Self) -> Self {
        for n in 0..N {
            self.correct[n] += other.correct[n];
            self.guessed[n] += other.guessed[n];
        }
        self.length += other.length;
        self.reference += other.reference;
        self
    }

    /// In [0, 1], with the original's small numbers against division by 0.
    fn bleu4(&self) -> f64 {
        const SMALL: f64 = 1e-9;
        const TINY: f64 = 1e-15;
        let product: f64 =
            (0..N).map(|n| (self.correct[n] as f64 + TINY) / (self.guessed[n] as f64 + SMALL)).product();
        let ratio = (self.length as f64 + TINY) / (self.reference as f64 + SMALL);
        let penalty = if ratio < 1.0 { (1.0 - 1.0 / ratio).exp() } else { 1.0 };
        product.powf(1.0 / N as f64) * penalty
    }
}

/// Words that end in a full stop of their own.
const ABBREVIATIONS: &[&str] = &[
    "mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr.", "vs.", "etc.", "e.g.", "i.e.", "a.m.", "p.m.",
    "inc.", "co.", "corp.", "ltd.", "no.", "mt.", "ave.", "blvd.", "rd.", "gen.", "sen.", "gov.",
];

/// The words of a caption, in lower case and without punctuation but brackets: the Penn Treebank's way that COCO
/// captions are tokenised in, for the English of captions. `don't` is `do n't`, `dog's` is `dog 's`,
/// `cannot` is `can not`; hyphens stay within words, marks of currency and `%` are words.
pub fn tokenise(caption: &str) -> Vec<String> {
    let mut out = Vec::new();
    let text = caption.to_lowercase().replace(['’', '‘'], "'").replace(['“', '”'], "\"");
    for chunk in text.split_whitespace() {
        // Marks that part words wherever they stand.
        let mut word = String::new();
        let chars: Vec<char> = chunk.chars().collect();
        for (i, &c) in chars.iter().enumerate() {
            let digit = |at: Option<&char>| at.is_some_and(|c| c.is_ascii_digit());
            let between_digits = i > 0 && digit(chars.get(i - 1)) && digit(chars.get(i + 1));
            let dashes = c == '-' && (chars.get(i + 1) == Some(&'-') || i > 0 && chars[i - 1] == '-');
            match c {
                ',' | ':' | '.' | '/' if between_digits => word.push(c),
                ',' | ';' | ':' | '?' | '!' | '(' | ')' | '[' | ']' | '{' | '}' | '"' | '…' | '–' | '—'
                | '`' => {
                    flush(&mut word, &mut out);
                    // The original means to drop brackets, but looks for their names in capitals.
                    let bracket = match c {
                        '(' => "-lrb-",
                        ')' => "-rrb-",
                        '[' => "-lsb-",
                        ']' => "-rsb-",
                        '{' => "-lcb-",
                        '}' => "-rcb-",
                        _ => continue,
                    };
                    out.push(bracket.into());
                }
                '*' | '|' | '~' | '=' | '+' | '<' | '>' | '$' | '€' | '£' | '%' | '#' | '&'
                    if !(c == '&' && i > 0 && i + 1 < chars.len()) =>
                {
                    flush(&mut word, &mut out);
                    out.push(c.to_string());
                }
                _ if dashes => flush(&mut word, &mut out),
                _ => word.push(c),
            }
        }
        flush(&mut word, &mut out);
    }
    out
}

/// Takes a word that no mark parts to pieces: its full stop, quotes and clitics.
fn flush(word: &mut String, out: &mut Vec<String>) {
    let taken = std::mem::take(word);
    let mut text = taken.as_str();
    let abbreviated = |text: &str| {
        ABBREVIATIONS.contains(&text)
            || text.len() == 2 && text.starts_with(|c: char| c.is_ascii_alphabetic())
            || text.split_terminator('.').count() > 1
                && text.split_terminator('.').all(|part| part.len() == 1 && part.is_ascii())
    };
    while text.ends_with('.') && !abbreviated(text) {
        text = &text[..text.len() - 1];
    }
    let clitic = |text: &str| matches!(text, "'s" | "'re" | "'ve" | "'ll" | "'d" | "'m");
    if !clitic(text) {
        text = text.trim_start_matches('\'');
    }
    let text = text.strip_suffix('\'').unwrap_or(text).trim_matches(|c| c == '-');
    if text.is_empty() {
        return;
    }
    let mut put = |part: &str| {
        if !part.is_empty() {
            out.push(part.to_string());
        }
    };
    let halves = match text {
        "cannot" => Some(("can", "not")),
        "gonna" => Some(("gon", "na")),
        "gotta" => Some(("got", "ta")),
        "wanna" => Some(("wan", "na")),
        "lemme" => Some(("lem", "me")),
        "gimme" => Some(("gim", "me")),
        _ => None,
    };
    if let Some((first, second)) = halves {
        put(first);
        put(second);
        return;
    }
    if let Some(before) = text.strip_suffix("n't").filter(|before| !before.is_empty()) {
        put(before);
        put("n't");
        return;
    }
    for ending in ["'s", "'re", "'ve", "'ll", "'d", "'m"] {
        if let Some(before) = text.strip_suffix(ending) {
            put(before);
            put(ending);
            return;
        }
    }
    put(text);
}
