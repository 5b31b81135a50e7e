//! `prompts/synonyms.toml`: what is called how, and what is a kind of what.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Deserialize;

use super::text::plain;
use crate::{Error, Result};

/// Names a concept; those of the table come first, a case's own after them.
pub(super) type Id = usize;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Entry {
    words: Vec<String>,
    is: Vec<String>,
    loose: Vec<String>,
    broad: bool,
    coco: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    portions: Vec<String>,
    adjectives: Vec<String>,
    colors: Vec<String>,
    heads: Vec<String>,
    plurals: BTreeMap<String, String>,
    concept: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, Default)]
struct Concept {
    name: String,
    is: Vec<Id>,
    loose: Vec<Id>,
    broad: bool,
    coco: Option<String>,
}

/// The table, made ready.
#[derive(Debug)]
pub(super) struct Lexicon {
    concepts: Vec<Concept>,
    phrases: HashMap<String, Id>,
    portions: HashSet<String>,
    adjectives: HashSet<String>,
    colors: HashSet<String>,
    heads: HashSet<String>,
    plurals: BTreeMap<String, String>,
    longest: usize,
    animal: Id,
    stuffed: Id,
}

const TABLE: &str = include_str!("../../../prompts/synonyms.toml");

impl Lexicon {
    /// Reads the table.
    ///
    /// # Errors
    /// If it is damaged: a phrase for two things, or a kind of what is not there.
    pub(super) fn new() -> Result<Self> {
        Self::parse(TABLE)
    }

    fn parse(text: &str) -> Result<Self> {
        let wrong = |reason: String| Error::config(Path::new("prompts/synonyms.toml"), reason);
        let table: Table = toml::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let ids: HashMap<&str, Id> = table.concept.keys().enumerate().map(|(i, k)| (k.as_str(), i)).collect();
        let id = |name: &str, of: &str| {
            ids.get(name).copied().ok_or_else(|| wrong(format!("`{of}` is a `{name}`, which is no concept")))
        };
        let mut concepts = Vec::new();
        let (mut phrases, mut longest) = (HashMap::new(), 1);
        for (i, (name, entry)) in table.concept.iter().enumerate() {
            concepts.push(Concept {
                name: name.clone(),
                is: entry.is.iter().map(|other| id(other, name)).collect::<Result<_>>()?,
                loose: entry.loose.iter().map(|other| id(other, name)).collect::<Result<_>>()?,
                broad: entry.broad,
                coco: entry.coco.clone(),
            });
            for phrase in std::iter::once(name).chain(&entry.words) {
                let phrase = plain(phrase);
                longest = longest.max(phrase.split(' ').count());
                let many = plural(&phrase, &table.plurals);
                for form in [phrase, many] {
                    if let Some(other) = phrases.insert(form.clone(), i).filter(|other| *other != i) {
                        let other = &concepts[other].name;
                        return Err(wrong(format!("`{form}` is both `{other}` and `{name}`")));
                    }
                }
            }
        }
        let set = |words: &[String]| {
            words.iter().flat_map(|word| [word.clone(), plural(word, &table.plurals)]).collect()
        };
        Ok(Self {
            portions: set(&table.portions),
            adjectives: table.adjectives.iter().cloned().collect(),
            colors: table.colors.iter().cloned().collect(),
            heads: set(&table.heads),
            animal: id("animal", "the judge")?,
            stuffed: id("stuffed animal", "the judge")?,
            plurals: table.plurals,
            concepts,
            phrases,
            longest,
        })
    }

    pub(super) fn is_color(&self, word: &str) -> bool {
        self.colors.contains(word)
    }

    pub(super) fn is_portion(&self, word: &str) -> bool {
        self.portions.contains(word)
    }

    /// Whether a noun before this word is no thing of its own.
    pub(super) fn is_head(&self, word: &str) -> bool {
        self.heads.contains(word)
    }

    /// The name of the concept that stands for a COCO class.
    pub(super) fn coco(&self, class: &str) -> Option<&str> {
        self.concepts.iter().find(|c| c.coco.as_deref() == Some(class)).map(|c| c.name.as_str())
    }
}

/// The plural of a phrase, by its last word; of `X of Y`, by X.
fn plural(phrase: &str, irregular: &BTreeMap<String, String>) -> String {
    if let Some((first, rest)) = phrase.split_once(" of ") {
        return format!("{} of {rest}", plural(first, irregular));
    }
    let (before, last) = match phrase.rsplit_once(' ') {
        Some((before, last)) => (format!("{before} "), last),
        None => (String::new(), phrase),
    };
    if let Some(many) = irregular.get(last) {
        return format!("{before}{many}");
    }
    let vowel_before_last = last.chars().rev().nth(1).is_some_and(|c| "aeiou".contains(c));
    let many = if last.ends_with(['s', 'x', 'z']) || last.ends_with("ch") || last.ends_with("sh") {
        format!("{last}es")
    } else if last.ends_with('y') && !vowel_before_last {
        format!("{}ies", &last[..last.len() - 1])
    } else if last.ends_with("ato") {
        format!("{last}es")
    } else {
        format!("{last}s")
    };
    format!("{before}{many}")
}

/// The two objects of a case, as concepts. Names that the table does not have are added for it alone.
pub(super) struct Pair<'a> {
    lexicon: &'a Lexicon,
    own: Vec<Concept>,
    phrases: HashMap<String, Id>,
    pub original: Id,
    pub target: Id,
    /// Words of each name that the other has not: what tells a red door from a blue one.
    pub original_only: HashSet<String>,
    pub target_only: HashSet<String>,
    longest: usize,
}

impl<'a> Pair<'a> {
    pub(super) fn new(lexicon: &'a Lexicon, original: &str, target: &str) -> Self {
        let none = HashSet::new();
        let mut pair = Self {
            lexicon,
            own: Vec::new(),
            phrases: HashMap::new(),
            original: 0,
            target: 0,
            original_only: none.clone(),
            target_only: none,
            longest: lexicon.longest,
        };
        let (original, target) = (plain(original), plain(target));
        pair.original = pair.resolve(&original);
        pair.target = pair.resolve(&target);
        let words = |name: &str| -> HashSet<String> {
            name.split(' ').filter(|word| !matches!(*word, "and" | "of" | "with")).map(String::from).collect()
        };
        let (first, second) = (words(&original), words(&target));
        pair.original_only = first.difference(&second).cloned().collect();
        pair.target_only = second.difference(&first).cloned().collect();
        pair
    }

    /// The concept of a phrase in lower case.
    pub(super) fn lookup(&self, phrase: &str) -> Option<Id> {
        self.phrases.get(phrase).or_else(|| self.lexicon.phrases.get(phrase)).copied()
    }

    /// The words of the longest phrase there is.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    fn concept(&self, id: Id) -> &Concept {
        let table = &self.lexicon.concepts;
        table.get(id).unwrap_or_else(|| &self.own[id - table.len()])
    }

    /// A concept's name.
    pub(super) fn name(&self, id: Id) -> &str {
        &self.concept(id).name
    }

    fn add(&mut self, name: &str, is: Vec<Id>, loose: Vec<Id>) -> Id {
        let id = self.lexicon.concepts.len() + self.own.len();
        self.own.push(Concept { name: name.into(), is, loose, broad: false, coco: None });
        self.longest = self.longest.max(name.split(' ').count());
        self.phrases.insert(plural(name, &self.lexicon.plurals), id);
        self.phrases.insert(name.into(), id);
        id
    }

    /// What a name names: itself, or what is left of it without portions and adjectives, or a kind of
    /// its head noun.
    fn resolve(&mut self, name: &str) -> Id {
        if let Some(id) = self.lookup(name) {
            return id;
        }
        if let Some((first, rest)) = name.split_once(" of ") {
            let portion = first.rsplit(' ').next().is_some_and(|word| self.lexicon.is_portion(word));
            return self.resolve(if portion { rest } else { first });
        }
        if let Some((rest, last)) = name.rsplit_once(' ')
            && self.lexicon.is_portion(last)
        {
            return self.resolve(rest);
        }
        let Some((first, rest)) = name.split_once(' ') else {
            return self.add(name, Vec::new(), Vec::new());
        };
        if self.lexicon.adjectives.contains(first) {
            return self.resolve(rest);
        }
        let words: Vec<&str> = name.split(' ').collect();
        for start in 1..words.len() {
            if let Some(head) = self.lookup(&words[start..].join(" ")) {
                // A brand or another word that the table does not know tells no other kind of thing.
                let known = words[..start].iter().any(|word| self.lookup(word).is_some());
                return if known { self.add(name, vec![head], Vec::new()) } else { head };
            }
        }
        let head = self.add(words[words.len() - 1], Vec::new(), Vec::new());
        self.add(name, Vec::new(), vec![head])
    }

    /// Whether one concept is the other or a kind of it.
    pub(super) fn is(&self, one: Id, other: Id) -> bool {
        one == other || self.concept(one).is.iter().any(|parent| self.is(*parent, other))
    }

    /// Whether it is an animal, and no stuffed one.
    pub(super) fn is_animal(&self, id: Id) -> bool {
        self.is(id, self.lexicon.animal)
    }

    /// What a stuffed animal of no table entry of its own is.
    pub(super) fn stuffed(&self) -> Id {
        self.lexicon.stuffed
    }

    /// How well naming `named` names `object`: 4 as itself, 3 as a kind of it, 2 as what it is a kind
    /// of, 1 loosely, 0 not at all.
    pub(super) fn strength(&self, named: Id, object: Id) -> u8 {
        if named == object {
            4
        } else if self.is(named, object) {
            3
        } else if self.is(object, named) && !self.concept(named).broad {
            2
        } else if self.concept(object).loose.contains(&named) {
            1
        } else {
            0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plurals_follow_the_rules() {
        let irregular = Lexicon::new().unwrap().plurals;
        for (one, many) in [
            ("cat", "cats"),
            ("bus", "buses"),
            ("box", "boxes"),
            ("couch", "couches"),
            ("toothbrush", "toothbrushes"),
            ("pony", "ponies"),
            ("key", "keys"),
            ("computer mouse", "computer mice"),
            ("wine glass", "wine glasses"),
            ("cup of tea", "cups of tea"),
            ("steak knife", "steak knives"),
            ("sheep", "sheep"),
        ] {
            assert_eq!(plural(one, &irregular), many);
        }
    }

    #[test]
    fn the_table_has_every_class_of_coco_once() {
        let lexicon = Lexicon::new().unwrap();
        let classes: Vec<_> = lexicon.concepts.iter().filter_map(|c| c.coco.clone()).collect();
        let distinct: HashSet<_> = classes.iter().collect();
        assert_eq!((classes.len(), distinct.len()), (80, 80));
        assert_eq!(lexicon.coco("mouse"), Some("computer mouse"));
    }

    #[test]
    fn every_kind_of_the_pocket_world_is_in_the_table() {
        let lexicon = Lexicon::new().unwrap();
        for kind in &crate::pocket::KINDS {
            assert!(lexicon.phrases.contains_key(kind.name), "{}", kind.name);
        }
    }

    #[test]
    fn names_come_down_to_their_head() {
        let lexicon = Lexicon::new().unwrap();
        for (name, head) in [
            ("Black cat", "cat"),
            ("Orange and white cat", "cat"),
            ("Red and gray SUV", "suv"),
            ("Cake slice", "cake"),
            ("Slice of cake", "cake"),
            ("Bowl of soup", "soup"),
            ("Red Chevrolet truck", "truck"),
            ("Red apples", "apple"),
            ("Orange slice", "orange"),
            ("Teddy bears", "teddy bear"),
            ("Double-decker bus", "double-decker bus"),
            ("Blue umbrella", "umbrella"),
        ] {
            let pair = Pair::new(&lexicon, name, "x");
            assert_eq!(pair.name(pair.original), head, "{name}");
        }
        let pair = Pair::new(&lexicon, "cherry picker", "x");
        assert_eq!(pair.strength(pair.lookup("picker").unwrap(), pair.original), 1);
    }

    #[test]
    fn a_damaged_table_is_told() {
        let head = "portions=[]\nadjectives=[]\ncolors=[]\nheads=[]\n[plurals]\n[concept]\n";
        let error = Lexicon::parse(&format!("{head}cat = {{ words = [\"dog\"] }}\ndog = {{}}")).unwrap_err();
        assert!(error.to_string().ends_with("`dog` is both `cat` and `dog`"), "{error}");
        let error = Lexicon::parse(&format!("{head}cat = {{ is = [\"pet\"] }}")).unwrap_err();
        assert!(error.to_string().ends_with("`cat` is a `pet`, which is no concept"), "{error}");
    }
}
