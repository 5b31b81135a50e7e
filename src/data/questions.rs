//! Pictures with questions whose answers are known: VQAv2's files, POPE's, and the pocket world.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::pocket::{self, Dataset, Split};
use crate::{Error, Result};

/// What is right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Truth {
    /// What people answered, ten of them in VQAv2.
    Humans(Vec<String>),
    /// Whether yes is right.
    Yes(bool),
}

/// A question about a picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuestionRow {
    /// Its number or name.
    pub id: String,
    /// The picture's file name.
    pub image: String,
    /// The words.
    pub question: String,
    /// What is right.
    pub truth: Truth,
}

/// Questions of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuestionSet {
    name: String,
    rows: Vec<QuestionRow>,
}

#[derive(Deserialize)]
struct VqaQuestions {
    data_subtype: String,
    questions: Vec<VqaQuestion>,
}

#[derive(Deserialize)]
struct VqaQuestion {
    image_id: u64,
    question: String,
    question_id: u64,
}

#[derive(Deserialize)]
struct VqaAnnotations {
    annotations: Vec<VqaAnnotation>,
}

#[derive(Deserialize)]
struct VqaAnnotation {
    question_id: u64,
    answers: Vec<VqaAnswer>,
}

#[derive(Deserialize)]
struct VqaAnswer {
    answer: String,
}

/// POPE's numbers are numbers in its own files and strings in others'.
#[derive(Deserialize)]
struct PopeLine {
    question_id: serde_json::Value,
    image: String,
    #[serde(alias = "question")]
    text: String,
    label: String,
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

impl QuestionSet {
    /// VQAv2's two files: questions (`v2_OpenEnded_mscoco_val2014_questions.json`) and annotations.
    ///
    /// # Errors
    /// If one cannot be read, or a question has no annotation.
    pub fn vqav2(questions: &Path, annotations: &Path) -> Result<Self> {
        fn open<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
            let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
            serde_json::from_str(&text).map_err(|e| Error::config(path, e.to_string()))
        }
        let asked: VqaQuestions = open(questions)?;
        let found: VqaAnnotations = open(annotations)?;
        let mut answers: HashMap<u64, Vec<String>> = found
            .annotations
            .into_iter()
            .map(|a| (a.question_id, a.answers.into_iter().map(|answer| answer.answer).collect()))
            .collect();
        let subtype = asked.data_subtype;
        let row = |question: VqaQuestion| {
            let id = question.question_id;
            let humans = answers.remove(&id).filter(|answers| !answers.is_empty()).ok_or_else(|| {
                Error::config(annotations, format!("expected answers to question {id}, found none"))
            })?;
            Ok(QuestionRow {
                id: id.to_string(),
                image: format!("COCO_{subtype}_{:012}.jpg", question.image_id),
                question: question.question,
                truth: Truth::Humans(humans),
            })
        };
        let rows = asked.questions.into_iter().map(row).collect::<Result<_>>()?;
        Self::new("vqav2", rows).map_err(|reason| Error::config(questions, reason))
    }

    /// A file of POPE (`coco_pope_random.json`): a JSON object a line.
    ///
    /// # Errors
    /// If it cannot be read, or a label is neither yes nor no.
    pub fn pope(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        let mut rows = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |reason: String| Error::config(path, format!("line {}: {reason}", i + 1));
            let found: PopeLine = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
            let yes = match found.label.as_str() {
                "yes" => true,
                "no" => false,
                other => return Err(wrong(format!("label: expected yes or no, found `{other}`"))),
            };
            let id = match found.question_id {
                serde_json::Value::String(id) => id,
                other => other.to_string(),
            };
            rows.push(QuestionRow { id, image: found.image, question: found.text, truth: Truth::Yes(yes) });
        }
        Self::new(&stem(path), rows).map_err(|reason| Error::config(path, reason))
    }

    /// Questions about the pocket world's scenes `0..n`: what the object is, its colour and its place,
    /// answered in a word or two.
    ///
    /// # Errors
    /// If `n` is 0.
    pub fn pocket(split: Split, seed: u64, n: u64) -> Result<Self> {
        // Whoever drew the picture is the one who knows.
        let known = |answer: &str| match yes_or_no(answer) {
            Some(_) => None,
            None => Some(Truth::Humans(vec![bare(answer); 10])),
        };
        Self::scenes("pocket", split, seed, n, known)
    }

    /// Questions of yes and no about the same scenes: whether an object is there.
    ///
    /// # Errors
    /// If there are none among `n` scenes.
    pub fn pocket_pope(split: Split, seed: u64, n: u64) -> Result<Self> {
        Self::scenes("pocket-pope", split, seed, n, |answer| yes_or_no(answer).map(Truth::Yes))
    }

    fn scenes(
        name: &str,
        split: Split,
        seed: u64,
        n: u64,
        known: impl Fn(&str) -> Option<Truth>,
    ) -> Result<Self> {
        let mut rows = Vec::new();
        for index in 0..n {
            let scene = pocket::draw(split, seed, index, *pocket::SIDES.start())?;
            for (i, asked) in scene.questions.into_iter().chain(scene.more).enumerate() {
                if let Some(truth) = known(&asked.answer) {
                    rows.push(QuestionRow {
                        id: format!("{index}.{i}"),
                        image: Dataset::file_name(index),
                        question: asked.question,
                        truth,
                    });
                }
            }
        }
        Self::new(name, rows).map_err(|reason| Error::argument("n", reason, n))
    }

    /// Questions with a name.
    fn new(name: &str, rows: Vec<QuestionRow>) -> std::result::Result<Self, String> {
        let Some(first) = rows.first() else {
            return Err("expected questions, found none".into());
        };
        let kind = std::mem::discriminant(&first.truth);
        if rows.iter().any(|row| std::mem::discriminant(&row.truth) != kind) {
            return Err("expected questions of one kind".into());
        }
        Ok(Self { name: name.into(), rows })
    }

    /// Its name in figures.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The questions, all of one kind, at least one.
    pub fn rows(&self) -> &[QuestionRow] {
        &self.rows
    }

    /// The first `n` of them.
    pub fn first(mut self, n: usize) -> Self {
        self.rows.truncate(n.max(1));
        self
    }
}

fn yes_or_no(answer: &str) -> Option<bool> {
    match answer {
        "Yes." => Some(true),
        "No." => Some(false),
        _ => None,
    }
}

/// `A stop sign.` as people answer: `stop sign`.
fn bare(answer: &str) -> String {
    let answer = answer.trim_end_matches('.').to_lowercase();
    let articles = ["a ", "an ", "the "];
    let rest = articles.iter().find_map(|article| answer.strip_prefix(article));
    rest.map_or_else(|| answer.clone(), str::to_string)
}
