//! The deterministic judge.

use super::lexicon::{Id, Lexicon, Pair};
use super::text::{Gap, Token, tokens};
use super::{Case, Verdict};
use crate::Result;

/// Judges by words: synonyms, plurals, kinds and head nouns from `prompts/synonyms.toml`.
///
/// - The longest phrase counts: a hot dog is no dog, a teddy bear no bear, a bus stop no bus.
/// - What is denied ("no cat", "not a cat but", "rather than a cat") does not count. What it is only
///   likened to ("resembles a cat", "like a cat") counts where nothing else names either object.
/// - A word that names both objects equally ("dog" for a pug and a collie) names neither, unless the
///   words beside it tell them apart ("blue" for a blue door and a red one). A word that names one of
///   them better ("bird" for a bird and a hummingbird) names that one.
#[derive(Debug)]
pub struct WordJudge {
    lexicon: Lexicon,
}

/// A verdict, and by which words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// What the response names.
    pub verdict: Verdict,
    /// The words that name the original, as concepts of the table.
    pub original: Vec<String>,
    /// Those that name the target.
    pub target: Vec<String>,
}

/// A phrase that names a concept: the words `start..end` of the response.
#[derive(Debug, Clone, Copy)]
struct Mention {
    start: usize,
    end: usize,
    id: Id,
    /// Only likened to.
    weak: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Original,
    Target,
    /// Both equally.
    Shared,
}

impl WordJudge {
    /// Reads the table in the binary.
    ///
    /// # Errors
    /// If the table is damaged, which this package's tests exclude.
    pub fn new() -> Result<Self> {
        Ok(Self { lexicon: Lexicon::new()? })
    }

    /// What the response names.
    pub fn verdict(&self, case: &Case) -> Verdict {
        self.judge(case).verdict
    }

    /// What the response names, and by which words. A bare yes is judged by the question, where the
    /// case has one: "Is there a cat?"
    pub fn judge(&self, case: &Case) -> Judgement {
        let pair = Pair::new(&self.lexicon, &case.original, &case.target);
        let words = tokens(&case.response);
        let judgement = self.read(&pair, &words);
        let yes = words.first().is_some_and(|word| matches!(word.text.as_str(), "yes" | "yeah" | "yep"));
        if yes
            && judgement.verdict == Verdict::Neither
            && let Some(question) = &case.question
        {
            let asked = self.read(&pair, &tokens(question));
            if matches!(asked.verdict, Verdict::Original | Verdict::Target) {
                return asked;
            }
        }
        judgement
    }

    /// The keyword that stands for a COCO class: the class, or a plainer name for it.
    pub(crate) fn keyword<'a>(&'a self, class: &'a str) -> &'a str {
        self.lexicon.coco(class).unwrap_or(class)
    }

    /// Whether naming the one never counts for the other.
    pub(crate) fn tells_apart(&self, one: &str, other: &str) -> bool {
        let pair = Pair::new(&self.lexicon, one, other);
        pair.strength(pair.original, pair.target) == 0 && pair.strength(pair.target, pair.original) == 0
    }

    fn read(&self, pair: &Pair, words: &[Token]) -> Judgement {
        let denied = denied(words);
        let likened = likened(words);
        let mut all = self.mentions(pair, words);
        all.retain(|m| !denied[m.start..m.end].iter().any(|d| *d) && !denied_after(words, m.end));
        for m in &mut all {
            m.weak = likened[m.start];
        }
        let side = |m: &Mention| {
            let original = pair.strength(m.id, pair.original);
            let target = pair.strength(m.id, pair.target);
            match original.cmp(&target) {
                std::cmp::Ordering::Greater => Some(Side::Original),
                std::cmp::Ordering::Less => Some(Side::Target),
                std::cmp::Ordering::Equal if original == 0 => None,
                std::cmp::Ordering::Equal => Some(match self.beside(pair, words, m) {
                    Verdict::Original => Side::Original,
                    Verdict::Target => Side::Target,
                    Verdict::Both | Verdict::Neither => Side::Shared,
                }),
            }
        };
        let mut sides: Vec<(Mention, Side)> = all
            .iter()
            .filter_map(|m| Some((*m, side(m)?)))
            .filter(|(_, side)| *side != Side::Shared)
            .collect();
        if sides.iter().any(|(m, _)| !m.weak) {
            sides.retain(|(m, _)| !m.weak);
        }
        // "A bird, a hummingbird": the first is the second, said broadly.
        let broader = |m: &Mention, side: Side| {
            sides.iter().any(|(other, s)| *s != side && other.id != m.id && pair.is(other.id, m.id))
        };
        let named = |wanted: Side| -> Vec<String> {
            let mut names: Vec<String> = Vec::new();
            for (m, side) in &sides {
                let name = pair.name(m.id);
                if *side == wanted && !broader(m, *side) && !names.iter().any(|n| n == name) {
                    names.push(name.to_string());
                }
            }
            names
        };
        let (original, target) = (named(Side::Original), named(Side::Target));
        Judgement { verdict: Verdict::of(!original.is_empty(), !target.is_empty()), original, target }
    }

    /// The concepts that are named, the longest phrase at each place.
    fn mentions(&self, pair: &Pair, words: &[Token]) -> Vec<Mention> {
        let mut all: Vec<Mention> = Vec::new();
        let mut i = 0;
        while i < words.len() {
            let joined = (i + 1..words.len()).take_while(|&j| !words[j].gap.parts()).count();
            let longest = (1..=pair.longest().min(joined + 1)).rev().find_map(|length| {
                let phrase: Vec<&str> = words[i..i + length].iter().map(|w| w.text.as_str()).collect();
                Some((length, pair.lookup(&phrase.join(" "))?))
            });
            let Some((length, id)) = longest else {
                i += 1;
                continue;
            };
            let (start, end) = (i, i + length);
            i = end;
            let mut mention = Mention { start, end, id, weak: false };
            // What follows the word, if nothing parts them.
            let next = words.get(end).filter(|word| !word.gap.parts());
            if words[start].gap == Gap::Hyphen
                && matches!(words[start - 1].text.as_str(), "non" | "anti" | "pseudo")
            {
                continue;
            }
            if let Some(last) = all.last().copied().filter(|last| last.end == start)
                && words[start].gap == Gap::Space
            {
                if pair.is(last.id, id) {
                    // "labrador dog"
                    all.pop();
                    mention = Mention { start: last.start, end, id: last.id, weak: false };
                } else {
                    // "cat bed" is a bed
                    all.pop();
                }
            }
            match next {
                // "bear-like", "horse-drawn"; but "cat-ferret hybrid" names a cat.
                Some(word) if word.gap == Gap::Hyphen && pair.lookup(&word.text).is_none() => continue,
                Some(word) if self.lexicon.is_head(&word.text) && length == 1 => continue,
                _ => {}
            }
            if length == 1 && self.lexicon.is_color(&words[start].text) && is_color(self, pair, words, start)
            {
                continue;
            }
            let before = words[..start].last().filter(|_| !words[start].gap.parts());
            if pair.is_animal(mention.id)
                && before.is_some_and(|w| matches!(w.text.as_str(), "stuffed" | "plush" | "toy"))
                && pair.strength(mention.id, pair.original).max(pair.strength(mention.id, pair.target)) != 1
            {
                mention.id = pair.stuffed();
            }
            all.push(mention);
        }
        all
    }

    /// For a word that names both objects equally: which of the words that tell them apart stand with
    /// it, before ("a blue door") or after ("a door painted blue").
    fn beside(&self, pair: &Pair, words: &[Token], m: &Mention) -> Verdict {
        let determiner =
            |w: &str| matches!(w, "a" | "an" | "the" | "this" | "that" | "two" | "three" | "and");
        let before = (m.start.saturating_sub(4)..m.start).rev();
        let mut near = Vec::new();
        for i in before {
            if words[i + 1].gap == Gap::Stop || determiner(&words[i].text) {
                break;
            }
            near.push(i);
        }
        for (i, word) in words.iter().enumerate().skip(m.end).take(4) {
            let then = i > m.end && matches!(word.text.as_str(), "a" | "an" | "the" | "and");
            if word.gap.parts() || then {
                break;
            }
            near.push(i);
        }
        let has =
            |own: &std::collections::HashSet<String>| near.iter().any(|&i| own.contains(&words[i].text));
        Verdict::of(has(&pair.original_only), has(&pair.target_only))
    }
}

/// Whether a fruit's name is a colour here: before a noun, or after "is" without an article.
fn is_color(judge: &WordJudge, pair: &Pair, words: &[Token], at: usize) -> bool {
    let next = words.get(at + 1).filter(|word| !word.gap.parts()).map(|word| word.text.as_str());
    let function = |w: &str| {
        matches!(
            w,
            "on" | "in"
                | "is"
                | "are"
                | "was"
                | "with"
                | "and"
                | "or"
                | "at"
                | "of"
                | "to"
                | "that"
                | "which"
                | "near"
                | "next"
                | "sitting"
                | "lying"
                | "placed"
                | "resting"
                | "cut"
                | "sliced"
                | "from"
                | "by"
                | "under"
                | "beside"
                | "hanging"
                | "has"
                | "being"
                | "as"
                | "for"
                | "rather"
                | "not"
                | "but"
                | "behind"
                | "growing"
                | "fruit"
                | "wedge"
                | "wedges"
                | "segment"
                | "segments"
        )
    };
    // "orange and white", "orange or red"
    let two_colors = matches!(next, Some("and" | "or"))
        && words.get(at + 2).is_some_and(|w| {
            matches!(
                w.text.as_str(),
                "white"
                    | "black"
                    | "red"
                    | "blue"
                    | "green"
                    | "yellow"
                    | "brown"
                    | "gray"
                    | "grey"
                    | "pink"
                    | "purple"
                    | "silver"
                    | "tan"
                    | "gold"
            )
        });
    // "an orange nestled among", but "an orange striped cat"
    let participle = next.is_some_and(|w| w.ends_with("ed") || w.ends_with("ing"))
        && words.get(at + 2).is_none_or(|w| {
            w.gap.parts()
                || matches!(
                    w.text.as_str(),
                    "a" | "against"
                        | "among"
                        | "at"
                        | "behind"
                        | "beside"
                        | "between"
                        | "by"
                        | "from"
                        | "in"
                        | "into"
                        | "near"
                        | "next"
                        | "on"
                        | "over"
                        | "the"
                        | "to"
                        | "under"
                        | "with"
                )
        });
    let portion = next.is_some_and(|w| judge.lexicon.is_portion(w));
    let before_noun = next.is_some_and(|w| {
        !function(w) && !participle && !portion && pair.lookup(w).is_none_or(|id| id != pair.original)
    });
    let back = |n: usize| at.checked_sub(n).map_or("", |i| text(words, i));
    let after_verb = !portion
        && !words[at].gap.parts()
        && match back(1) {
            // "The wall is orange", but "it is orange" may answer what it is.
            "is" | "was" => !matches!(back(2), "this" | "it" | "that"),
            "are" | "color" | "colour" | "painted" | "colored" | "mostly" => true,
            "bright" | "dark" | "light" => !matches!(back(2), "a" | "an" | "the" | "one"),
            _ => false,
        };
    two_colors || before_noun || after_verb
}

/// Where a denial or a likeness ends.
fn ends(words: &[Token], i: usize) -> bool {
    words[i].gap == Gap::Stop
        || matches!(
            words[i].text.as_str(),
            "but"
                | "however"
                | "although"
                | "though"
                | "while"
                | "whereas"
                | "because"
                | "since"
                | "it"
                | "which"
                | "there"
                | "instead"
                | "rather"
                | "just"
                | "only"
                | "is"
                | "are"
        )
}

fn text(words: &[Token], i: usize) -> &str {
    words.get(i).map_or("", |word| word.text.as_str())
}

/// For each word, whether it is denied.
fn denied(words: &[Token]) -> Vec<bool> {
    let mut all = vec![false; words.len()];
    for k in 0..words.len() {
        let (next, after) = (text(words, k + 1), text(words, k + 2));
        let (mut from, length, lists) = match words[k].text.as_str() {
            // "No, it is": an answer.
            "no" if words.get(k + 1).is_some_and(|word| word.gap.parts()) => continue,
            "no" if matches!(next, "doubt" | "other" | "longer" | "less") => continue,
            "no" | "neither" | "nor" => (k + 1, 5, true),
            "without" | "lacks" | "lacking" => (k + 1, 5, true),
            "never" => (k + 1, 6, true),
            "not" | "dont" | "doesnt" | "isnt" | "arent" | "didnt" | "cant" | "wasnt" => {
                // "not only a cat"; "is not on the bed", where the bed is.
                let place = matches!(next, "on" | "at" | "under" | "near" | "behind" | "inside")
                    || next == "in" && after != "fact";
                if place || matches!(next, "only" | "just" | "merely" | "simply" | "help") {
                    continue;
                }
                (k + 1, 8, true)
            }
            "unlike" => (k + 1, 4, false),
            "instead" | "rather" if matches!(next, "of" | "than") => (k + 2, 4, false),
            "opposed" | "contrary" if next == "to" => (k + 2, 4, false),
            "than"
                if k > 0
                    && text(words, k - 1) == "other"
                    && k > 1
                    && matches!(text(words, k - 2), "none" | "no") =>
            {
                continue;
            }
            "than" => (k + 1, 3, false),
            "absence" | "lack" if next == "of" => (k + 2, 4, true),
            "fails" | "failed" if next == "to" => (k + 2, 5, false),
            _ => continue,
        };
        // "I am not sure what the cat does" denies no cat; "not sure if it is a cat" does.
        let doubt = |w: &str| {
            matches!(w, "sure" | "know" | "tell" | "clear" | "certain" | "determine" | "say" | "specify")
        };
        if words[k].text == "not" && (doubt(next) || doubt(after)) {
            match (k + 1..words.len().min(k + 7)).find(|&i| matches!(text(words, i), "if" | "whether")) {
                Some(at) => {
                    // Everything that is in doubt: "whether it is a cat or a ferret".
                    let end = (at + 1..words.len()).find(|&i| words[i].gap.parts()).unwrap_or(words.len());
                    all[at..end].fill(true);
                }
                None => continue,
            }
            continue;
        }
        // What ends a denial does not do so as its first word: "not just", "no other".
        let last = words.len().min(from + length);
        while from < last {
            if ends(words, from) && from > k + 1 {
                break;
            }
            if words[from].gap == Gap::Stop
                || words[from].gap == Gap::Comma && !(lists && listed(words, from))
            {
                break;
            }
            if from > k + 1 && text(words, from) == "and" && words[k].text != "without" {
                break;
            }
            all[from] = true;
            from += 1;
        }
    }
    all
}

/// Whether a comma goes on with a list that ends in "or": "no cats, dogs or birds".
fn listed(words: &[Token], at: usize) -> bool {
    for i in at..words.len().min(at + 6) {
        if matches!(text(words, i), "or" | "nor") {
            return true;
        }
        if words[i].gap == Gap::Stop || ends(words, i) {
            return false;
        }
    }
    false
}

/// Whether what ends before word `at` is denied by what follows it: "the cat is not visible".
fn denied_after(words: &[Token], at: usize) -> bool {
    if words.get(at).is_none_or(|word| word.gap.parts()) {
        return false;
    }
    let be = matches!(text(words, at), "is" | "are" | "was" | "were" | "can");
    let seen = |w: &str| {
        matches!(
            w,
            "present"
                | "visible"
                | "shown"
                | "seen"
                | "depicted"
                | "here"
                | "there"
                | "pictured"
                | "be"
                | "in"
        )
    };
    be && (text(words, at + 1) == "not" && seen(text(words, at + 2))
        || matches!(text(words, at + 1), "absent" | "missing" | "nowhere"))
}

/// For each word, whether it is only what something is likened to.
fn likened(words: &[Token]) -> Vec<bool> {
    let mut all = vec![false; words.len()];
    for k in 0..words.len() {
        let (next, after) = (text(words, k + 1), text(words, k + 2));
        let from = match words[k].text.as_str() {
            "resembles" | "resemble" | "resembling" | "imitating" => k + 1,
            "like" if matches!(next, "a" | "an" | "the" | "some") || words[k].gap != Gap::Hyphen && k > 0 => {
                k + 1
            }
            "similar" | "compared" if next == "to" => k + 2,
            "reminiscent" if next == "of" => k + 2,
            "mistaken" | "confused" if matches!(next, "for" | "with" | "as") => k + 2,
            "disguised" | "dressed" if next == "as" => k + 2,
            "shape" | "form" if next == "of" => k + 2,
            "as" if after == "as" => k + 3,
            // "At first glance a cat, but"
            "first" if matches!(next, "glance" | "sight") => k + 2,
            _ => continue,
        };
        for (i, like) in all.iter_mut().enumerate().take(from + 5).skip(from) {
            if i > from && (words[i].gap.parts() || ends(words, i)) || i == from && words[i].gap == Gap::Stop
            {
                break;
            }
            *like = true;
        }
    }
    all
}
