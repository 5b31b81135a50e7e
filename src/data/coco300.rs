//! V-Attack's three files over 300 COCO pictures, and every set in the same format: what is in each
//! picture, what an attack aims at, and what is asked.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::ser::{PrettyFormatter, Serializer};

use crate::pocket::{self, KINDS, Split};
use crate::{Error, Result};

const DESCRIPTIONS: &str = "_object_descriptions_main.json";
const TARGETS: &str = "_target_obj_sim.json";
const QUESTIONS: &str = "_vqa_main.json";

/// Questions that are asked about a picture: the first of those there are.
pub const ASKED: usize = 3;

/// A picture with its object and the target of an attack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectRow {
    /// The picture's file name.
    pub image: String,
    /// The object in it, such as `Grizzly bear`.
    pub keyword: String,
    /// A sentence about it.
    pub description: String,
    /// The object an attack aims at, such as `lion`.
    pub target: String,
    /// A sentence about that.
    pub target_description: String,
    /// All the strings of the file; the first [`ASKED`] are asked.
    pub questions: Vec<String>,
}

impl ObjectRow {
    /// The questions that are asked.
    pub fn asked(&self) -> &[String] {
        &self.questions[..self.questions.len().min(ASKED)]
    }

    /// Whether its target is another object than the one in the picture.
    pub fn has_target(&self) -> bool {
        self.keyword.to_lowercase() != self.target.to_lowercase()
    }
}

/// What is wrong with a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DefectKind {
    /// The picture came before.
    DuplicatePicture,
    /// The first of its questions is the keyword itself, so that it gives the answer away and one
    /// question is not asked.
    KeywordAsQuestion,
    /// The target is the object in the picture.
    SameObject,
    /// It has less than [`ASKED`] questions.
    FewQuestions,
}

impl DefectKind {
    /// Its name, such as `keyword-as-question`.
    pub fn name(self) -> &'static str {
        match self {
            Self::DuplicatePicture => "duplicate-picture",
            Self::KeywordAsQuestion => "keyword-as-question",
            Self::SameObject => "same-object",
            Self::FewQuestions => "few-questions",
        }
    }
}

/// Something wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RowDefect {
    /// The row, counted from 0.
    pub row: usize,
    /// What is wrong.
    pub kind: DefectKind,
    /// The same in words.
    pub detail: String,
}

/// Pictures with objects, targets and questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectSet {
    name: String,
    rows: Vec<ObjectRow>,
}

#[derive(Serialize, Deserialize)]
struct Description {
    image: String,
    caption: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Target {
    image: String,
    replace: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Questions {
    image: String,
    vqa: Vec<String>,
}

impl ObjectSet {
    /// Reads the three files `NAME_object_descriptions_main.json`, `NAME_target_obj_sim.json` and
    /// `NAME_vqa_main.json` in a folder, as they are. [`ObjectSet::defects`] says what is wrong with
    /// the rows, [`ObjectSet::clean`] mends what can be.
    ///
    /// # Errors
    /// If the folder does not have them once, a file is damaged, or they do not belong together: other
    /// lengths, or other pictures at the same row.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .map_err(|e| Error::read(folder, e))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_suffix(DESCRIPTIONS)?.to_string()))
            .collect();
        names.sort();
        let name = match names.as_slice() {
            [name] => name.clone(),
            [] => return Err(Error::data(folder, format!("expected a file NAME{DESCRIPTIONS}, found none"))),
            many => {
                let found = many.join(", ");
                return Err(Error::data(
                    folder,
                    format!("expected one file NAME{DESCRIPTIONS}, found {found}"),
                ));
            }
        };
        Self::read(folder, &name)
    }

    /// Reads the three files of one name.
    ///
    /// # Errors
    /// As [`ObjectSet::open`].
    pub fn read(folder: &Path, name: &str) -> Result<Self> {
        fn list<T: for<'de> Deserialize<'de>>(
            folder: &Path,
            name: &str,
            ending: &str,
        ) -> Result<(PathBuf, Vec<T>)> {
            let path = folder.join(format!("{name}{ending}"));
            let text = fs::read_to_string(&path).map_err(|e| Error::read(&path, e))?;
            let rows = serde_json::from_str(&text).map_err(|e| Error::data(&path, e.to_string()))?;
            Ok((path, rows))
        }
        let (first, descriptions) = list::<Description>(folder, name, DESCRIPTIONS)?;
        let (second, targets) = list::<Target>(folder, name, TARGETS)?;
        let (third, questions) = list::<Questions>(folder, name, QUESTIONS)?;
        for (path, found) in [(&second, targets.len()), (&third, questions.len())] {
            if found != descriptions.len() {
                return Err(Error::data(
                    path,
                    format!("expected {} rows, found {found}", descriptions.len()),
                ));
            }
        }
        let mut rows = Vec::new();
        for (i, ((d, t), q)) in descriptions.into_iter().zip(targets).zip(questions).enumerate() {
            for (path, image) in [(&second, &t.image), (&third, &q.image)] {
                if *image != d.image {
                    let reason = format!("row {i}: expected picture `{}`, found `{image}`", d.image);
                    return Err(Error::data(path, reason));
                }
            }
            let (keyword, description) = halves(&first, i, "caption", &d.caption)?;
            let (target, target_description) = halves(&second, i, "replace", &t.replace)?;
            let questions = q.vqa;
            rows.push(ObjectRow {
                image: d.image,
                keyword,
                description,
                target,
                target_description,
                questions,
            });
        }
        Self::new(name, rows)
    }

    /// A set of rows.
    ///
    /// # Errors
    /// If there are none.
    pub fn new(name: &str, rows: Vec<ObjectRow>) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::data(Path::new(name), "has no rows"));
        }
        Ok(Self { name: name.into(), rows })
    }

    /// The pocket world's scenes `0..n` of a split and seed, as `radapt pocket draw` writes them.
    ///
    /// # Errors
    /// If `n` is 0.
    pub fn pocket(split: Split, seed: u64, n: u64) -> Result<Self> {
        let row = |index| {
            let scene = pocket::draw(split, seed, index, *pocket::SIDES.start())?;
            let mut letters = scene.name().chars();
            let keyword =
                letters.next().map(|c| c.to_uppercase().chain(letters).collect()).unwrap_or_default();
            Ok(ObjectRow {
                image: pocket::Dataset::file_name(index),
                keyword,
                description: scene.caption,
                target: KINDS[scene.target].name.into(),
                target_description: scene.target_caption,
                questions: scene.questions.map(|question| question.question).into(),
            })
        };
        Self::new("pocket", (0..n).map(row).collect::<Result<_>>()?)
    }

    /// What the files are named after, such as `coco300`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The rows, in the files' order.
    pub fn rows(&self) -> &[ObjectRow] {
        &self.rows
    }

    /// What is wrong with its rows, by row.
    pub fn defects(&self) -> Vec<RowDefect> {
        let mut all = Vec::new();
        let mut first = HashMap::new();
        for (i, row) in self.rows.iter().enumerate() {
            let mut add = |kind, detail| all.push(RowDefect { row: i, kind, detail });
            let before = *first.entry(&row.image).or_insert(i);
            if before != i {
                add(DefectKind::DuplicatePicture, format!("picture `{}` is that of row {before}", row.image));
            }
            if gives_away(row) {
                let detail = format!("the first question is the keyword `{}`", row.questions[0]);
                add(DefectKind::KeywordAsQuestion, detail);
            }
            if !row.has_target() {
                add(DefectKind::SameObject, format!("object and target are both `{}`", row.target));
            }
            let questions = row.questions.len() - usize::from(gives_away(row));
            if questions < ASKED {
                add(DefectKind::FewQuestions, format!("expected {ASKED} questions, found {questions}"));
            }
        }
        all
    }

    /// Without the keywords among the questions. The rows stay, so that figures compare with those of
    /// others: leave out duplicates and rows without a target with [`ObjectSet::distinct`].
    pub fn clean(mut self) -> Self {
        for row in &mut self.rows {
            if gives_away(row) {
                row.questions.remove(0);
            }
        }
        self
    }

    /// The first row of each picture, and of those the ones whose target is another object.
    ///
    /// # Errors
    /// If none is left.
    pub fn distinct(&self) -> Result<Self> {
        let mut seen = std::collections::HashSet::new();
        let kept = self.rows.iter().filter(|row| seen.insert(&row.image) && row.has_target());
        Self::new(&self.name, kept.cloned().collect())
    }

    /// Where the pictures lie: in `folder`, or in `images` or `val2017` within it, under their name or
    /// as PNG.
    pub fn locate(&self, folder: &Path) -> Located {
        let found = self.rows.iter().map(|row| find(folder, &row.image));
        let paths: Vec<Option<PathBuf>> = found.collect();
        let mut missing: Vec<String> = Vec::new();
        for (row, path) in self.rows.iter().zip(&paths) {
            if path.is_none() && !missing.contains(&row.image) {
                missing.push(row.image.clone());
            }
        }
        Located { paths, missing }
    }

    /// Writes the three files into a folder, which is made where it is missing.
    ///
    /// # Errors
    /// If one is there already or cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = |ending: &str| folder.join(format!("{}{ending}", self.name));
        for ending in [DESCRIPTIONS, TARGETS, QUESTIONS] {
            if path(ending).exists() {
                let hint = "write into another folder".into();
                return Err(Error::Exists { path: path(ending), hint });
            }
        }
        fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
        let image = |row: &ObjectRow| row.image.clone();
        let both = |name: &str, sentence: &str| vec![format!("{name}: {sentence}")];
        let rows = || self.rows.iter();
        let captions: Vec<_> = rows()
            .map(|row| Description { image: image(row), caption: both(&row.keyword, &row.description) })
            .collect();
        let targets: Vec<_> = rows()
            .map(|row| Target { image: image(row), replace: both(&row.target, &row.target_description) })
            .collect();
        let questions: Vec<_> =
            rows().map(|row| Questions { image: image(row), vqa: row.questions.clone() }).collect();
        write(&path(DESCRIPTIONS), &captions)?;
        write(&path(TARGETS), &targets)?;
        write(&path(QUESTIONS), &questions)
    }
}

/// Which pictures of a set are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// For each row, its picture's file, where there is one.
    pub paths: Vec<Option<PathBuf>>,
    /// The names of those that are not there, each once.
    pub missing: Vec<String>,
}

/// Whether the first question is the keyword and no question.
fn gives_away(row: &ObjectRow) -> bool {
    row.questions.first().is_some_and(|first| first.trim().to_lowercase() == row.keyword.to_lowercase())
}

/// Splits `keyword: sentence`.
fn halves(path: &Path, row: usize, key: &str, strings: &[String]) -> Result<(String, String)> {
    let wrong = |found: String| {
        Error::data(
            path,
            format!("row {row}: expected one string `NAME: SENTENCE` in `{key}`, found {found}"),
        )
    };
    let [text] = strings else {
        return Err(wrong(format!("{} strings", strings.len())));
    };
    let (name, sentence) = text.split_once(':').ok_or_else(|| wrong(format!("`{text}`")))?;
    let (name, sentence) = (name.trim(), sentence.trim());
    if name.is_empty() {
        return Err(wrong(format!("`{text}`")));
    }
    Ok((name.into(), sentence.into()))
}

fn find(folder: &Path, image: &str) -> Option<PathBuf> {
    let name = Path::new(image);
    // A name from a file must not lead out of the folder.
    if name.components().count() != 1 || name.file_name().is_none() {
        return None;
    }
    [folder.to_path_buf(), folder.join("images"), folder.join("val2017")].into_iter().find_map(|folder| {
        [name.to_path_buf(), name.with_extension("png")]
            .into_iter()
            .map(|name| folder.join(name))
            .find(|path| path.is_file())
    })
}

/// As Python's `json.dump(..., indent=4)` writes it, which is how the published files are.
fn write(path: &Path, rows: &impl Serialize) -> Result<()> {
    let mut bytes = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"    "));
    rows.serialize(&mut serializer).map_err(|e| Error::write(path, std::io::Error::other(e)))?;
    fs::write(path, bytes).map_err(|e| Error::write(path, e))
}
