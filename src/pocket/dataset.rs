//! A folder of scenes: V-Attack's three files, COCO's annotations and CLIP_benchmark's class files.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use image::ImageEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

use super::{KINDS, Question, Scene, Split, draw};
use crate::{Error, Result};

const IMAGES: &str = "images";
const DESCRIPTIONS: &str = "pocket_object_descriptions_main.json";
const TARGETS: &str = "pocket_target_obj_sim.json";
const QUESTIONS: &str = "pocket_vqa_main.json";
const ANSWERS: &str = "pocket_vqa_answers.json";
const INSTANCES: &str = "annotations/instances.json";
const CAPTIONS: &str = "annotations/captions.json";
const CLASSES: &str = "classnames.txt";
const TEMPLATES: &str = "zeroshot_classification_templates.txt";
const LABELS: &str = "labels.tsv";
const README: &str = "README.md";

/// Where a folder is written before it is whole.
const PARTIAL: &str = ".partial";
/// One more than the largest index that fits a file name of twelve digits.
const END: u64 = 1_000_000_000_000;
/// Pictures that are drawn at once.
const CHUNK: u64 = 256;

/// A run of scenes, and how large they are drawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// The stream the scenes come from.
    pub split: Split,
    /// The stream's seed.
    pub seed: u64,
    /// The first scene's index.
    pub start: u64,
    /// How many scenes, at least 1; indices have at most twelve digits.
    pub n: u64,
    /// The pictures' side in pixels, one of [`super::SIDES`].
    pub size: u32,
}

impl Dataset {
    /// The files [`Self::write`] makes beside the pictures in `images/`, relative to its folder.
    pub const FILES: [&str; 10] =
        [DESCRIPTIONS, TARGETS, QUESTIONS, ANSWERS, INSTANCES, CAPTIONS, CLASSES, TEMPLATES, LABELS, README];

    /// A scene's file name: its index in twelve digits, `.png`.
    pub fn file_name(index: u64) -> String {
        format!("{index:012}.png")
    }

    /// Draws the scenes into `folder`, which is made where it is missing; `told` hears how many
    /// are done.
    ///
    /// - `images/000000000000.png` and so on, named by index;
    /// - V-Attack's files: `pocket_object_descriptions_main.json`, `pocket_target_obj_sim.json`,
    ///   `pocket_vqa_main.json`, and the answers in `pocket_vqa_answers.json`;
    /// - COCO's: `annotations/instances.json`, `annotations/captions.json`. An image's id is its
    ///   index, an annotation's that plus 1, a category's its place in [`KINDS`] plus 1;
    /// - CLIP_benchmark's: `classnames.txt` and `zeroshot_classification_templates.txt`, with the
    ///   classes, counted from 0, in `labels.tsv`;
    /// - `README.md`: what this is, how it was made, its licence.
    ///
    /// The same scenes give the same bytes. They appear in `folder` once all are written; on an
    /// error nothing is left. Pictures are drawn on every core, and memory does not grow with
    /// their number.
    ///
    /// # Errors
    /// If a field is out of its range, one of these files is in `folder` already, or one cannot be
    /// written.
    pub fn write(&self, folder: &Path, told: &mut dyn FnMut(u64)) -> Result<()> {
        self.check()?;
        let partial = Partial::new(folder)?;
        for inner in [IMAGES, "annotations"] {
            make(&partial.path.join(inner))?;
        }
        self.fill(&partial.path, told)?;
        partial.publish()
    }

    fn check(&self) -> Result<()> {
        if !super::SIDES.contains(&self.size) {
            return Err(Error::argument("size", "96 to 224 pixels", self.size));
        }
        if self.n == 0 {
            return Err(Error::argument("n", "at least 1 scene", 0));
        }
        if self.start.checked_add(self.n).is_none_or(|end| end > END) {
            let found = format!("start {} and n {}", self.start, self.n);
            return Err(Error::argument("start", "indices of at most twelve digits", found));
        }
        Ok(())
    }

    fn fill(&self, folder: &Path, told: &mut dyn FnMut(u64)) -> Result<()> {
        let open = |name: &str| Document::create(folder.join(name));
        let mut descriptions = open(DESCRIPTIONS)?;
        let mut targets = open(TARGETS)?;
        let mut questions = open(QUESTIONS)?;
        let mut answers = open(ANSWERS)?;
        let mut instances = open(INSTANCES)?;
        let mut captions = open(CAPTIONS)?;
        let mut labels = open(LABELS)?;
        for document in [&mut descriptions, &mut targets, &mut questions, &mut answers] {
            document.list("[")?;
        }
        let head = self.coco_head();
        instances.list(&format!("{{{head},\n\"categories\": ["))?;
        for (kind, id) in KINDS.iter().zip(1..) {
            instances.line(&Category { id, name: kind.name, supercategory: kind.category })?;
        }
        instances.list("\n],\n\"annotations\": [")?;
        captions.list(&format!("{{{head},\n\"annotations\": ["))?;

        let images = folder.join(IMAGES);
        let end = self.start + self.n;
        let mut next = self.start;
        while next < end {
            let stop = end.min(next + CHUNK);
            let scenes = (next..stop).into_par_iter().map(|index| self.picture(index, &images));
            for (index, scene) in (next..stop).zip(scenes.collect::<Result<Vec<_>>>()?) {
                let image = Self::file_name(index);
                let image = image.as_str();
                let (kind, target) = (KINDS[scene.kind].name, KINDS[scene.target].name);
                let caption = format!("{}: {}", capitalised(kind), scene.caption);
                descriptions.row(&Description { image, caption: [&caption] })?;
                let replace = format!("{target}: {}", scene.target_caption);
                targets.row(&Target { image, replace: [&replace] })?;
                let vqa = scene.questions.each_ref().map(|q| q.question.as_str());
                questions.row(&Asked { image, vqa })?;
                answers.row(&Answered {
                    image,
                    answers: scene.questions.each_ref().map(|q| q.answer.as_str()),
                    more: scene.more.iter().map(Pair::from).collect(),
                })?;
                instances.line(&Instance::new(index, &scene, self.size))?;
                captions.line(&Caption { image_id: index, id: index + 1, caption: &scene.caption })?;
                labels.put(&format!("{image}\t{}\n", scene.kind))?;
            }
            next = stop;
            told(next - self.start);
        }

        for document in [&mut descriptions, &mut targets, &mut questions, &mut answers] {
            document.put("\n]")?;
        }
        for coco in [&mut instances, &mut captions] {
            coco.list("\n],\n\"images\": [")?;
            for id in self.start..end {
                let file_name = Self::file_name(id);
                coco.line(&Image { id, file_name, width: self.size, height: self.size, license: 1 })?;
            }
            coco.put("\n]}\n")?;
        }
        for document in [descriptions, targets, questions, answers, instances, captions, labels] {
            document.finish()?;
        }
        let classes: String = KINDS.iter().map(|kind| format!("{}\n", kind.name)).collect();
        write(&folder.join(CLASSES), classes.as_bytes())?;
        write(&folder.join(TEMPLATES), b"a photo of a {c}.\n")?;
        write(&folder.join(README), self.readme().as_bytes())
    }

    /// Writes one picture and returns the rest of its scene.
    fn picture(&self, index: u64, images: &Path) -> Result<Scene> {
        let mut scene = draw(self.split, self.seed, index, self.size)?;
        let picture = std::mem::take(&mut scene.picture);
        let name = Self::file_name(index);
        write(&images.join(&name), &png(&name, &picture)?)?;
        Ok(scene)
    }

    fn coco_head(&self) -> String {
        let Self { split, seed, size, .. } = self;
        let split = split.name();
        format!(
            "\"info\": {{\"description\": \"The pocket world, {split} split, seed {seed}, {size} pixels\", \
             \"version\": \"1\", \"contributor\": \"radapt\"}},\n\
             \"licenses\": [{{\"id\": 1, \"name\": \"CC0-1.0\", \
             \"url\": \"https://creativecommons.org/publicdomain/zero/1.0/\"}}]"
        )
    }

    fn readme(&self) -> String {
        let Self { split, seed, start, n, size } = self;
        let split = split.name();
        let pictures = if *n == 1 { "picture" } else { "pictures" };
        format!(
            "The pocket world: {n} drawn {pictures} of one object each, its {split} split, with captions, \
             questions and answers, boxes and classes.\n\n\
             Made by `radapt pocket draw --n {n} --size {size} --split {split} --start {start} \
             --seed {seed} --out DIR`, radapt {}.\n\n\
             The pictures are in the public domain: CC0-1.0, \
             https://creativecommons.org/publicdomain/zero/1.0/.\n",
            env!("CARGO_PKG_VERSION")
        )
    }
}

#[derive(Serialize)]
struct Description<'a> {
    image: &'a str,
    caption: [&'a str; 1],
}

#[derive(Serialize)]
struct Target<'a> {
    image: &'a str,
    replace: [&'a str; 1],
}

#[derive(Serialize)]
struct Asked<'a> {
    image: &'a str,
    vqa: [&'a str; 3],
}

#[derive(Serialize)]
struct Answered<'a> {
    image: &'a str,
    answers: [&'a str; 3],
    more: Vec<Pair<'a>>,
}

#[derive(Serialize)]
struct Pair<'a> {
    question: &'a str,
    answer: &'a str,
}

impl<'a> From<&'a Question> for Pair<'a> {
    fn from(Question { question, answer }: &'a Question) -> Self {
        Self { question, answer }
    }
}

#[derive(Serialize)]
struct Category {
    id: usize,
    name: &'static str,
    supercategory: &'static str,
}

#[derive(Serialize)]
struct Image {
    id: u64,
    file_name: String,
    width: u32,
    height: u32,
    license: u32,
}

#[derive(Serialize)]
struct Caption<'a> {
    image_id: u64,
    id: u64,
    caption: &'a str,
}

#[derive(Serialize)]
struct Instance {
    /// Never 0, which COCO's own evaluation takes for "unmatched".
    id: u64,
    image_id: u64,
    category_id: usize,
    bbox: [f64; 4],
    area: f64,
    iscrowd: u32,
    segmentation: [f64; 0],
}

impl Instance {
    fn new(index: u64, scene: &Scene, size: u32) -> Self {
        // To a hundredth of a pixel, as COCO gives its boxes; counted in hundredths, so that left
        // and width add up to no more than the picture's side.
        let hundredths = |at: f32| (f64::from(at) * 100.0).round().clamp(0.0, f64::from(size) * 100.0);
        let [x, y, w, h] = scene.bbox;
        let (left, top) = (hundredths(x), hundredths(y));
        let (width, height) = (hundredths(x + w) - left, hundredths(y + h) - top);
        Self {
            id: index + 1,
            image_id: index,
            category_id: scene.kind + 1,
            bbox: [left, top, width, height].map(|side| side / 100.0),
            area: width * height / 10_000.0,
            iscrowd: 0,
            segmentation: [],
        }
    }
}

fn capitalised(noun: &str) -> String {
    let mut chars = noun.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// A picture's file.
fn png(name: &str, picture: &image::RgbImage) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive)
        .write_image(picture, picture.width(), picture.height(), image::ExtendedColorType::Rgb8)
        .map_err(|e| Error::Picture { name: name.into(), reason: e.to_string() })?;
    Ok(bytes)
}

/// A document that grows record by record.
struct Document {
    path: PathBuf,
    out: BufWriter<File>,
    rows: u64,
}

impl Document {
    fn create(path: PathBuf) -> Result<Self> {
        match File::create_new(&path) {
            Ok(file) => Ok(Self { path, out: BufWriter::new(file), rows: 0 }),
            Err(source) => Err(Error::write(path, source)),
        }
    }

    fn put(&mut self, text: &str) -> Result<()> {
        self.out.write_all(text.as_bytes()).map_err(|e| Error::write(&self.path, e))
    }

    /// Begins a list with what stands before its first entry.
    fn list(&mut self, text: &str) -> Result<()> {
        self.rows = 0;
        self.put(text)
    }

    /// An entry of the outermost list, as Python's `json.dump(..., indent=4)` writes it.
    fn row(&mut self, record: &impl Serialize) -> Result<()> {
        let mut bytes = Vec::new();
        let mut serializer = Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"    "));
        record.serialize(&mut serializer).map_err(|e| Error::write(&self.path, io::Error::other(e)))?;
        // Strings hold no bare line breaks, so every one is the formatter's.
        let text = String::from_utf8_lossy(&bytes).replace('\n', "\n    ");
        self.next("    ", &text)
    }

    /// An entry on a line of its own.
    fn line(&mut self, record: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(record).map_err(|e| Error::write(&self.path, e.into()))?;
        self.next("", &text)
    }

    fn next(&mut self, indent: &str, text: &str) -> Result<()> {
        let comma = if self.rows > 0 { "," } else { "" };
        self.rows += 1;
        self.put(&format!("{comma}\n{indent}{text}"))
    }

    fn finish(mut self) -> Result<()> {
        self.out.flush().map_err(|e| Error::write(&self.path, e))
    }
}

/// A folder inside the one to be written, removed unless it is published.
struct Partial<'a> {
    path: PathBuf,
    folder: &'a Path,
    /// Whether the folder was made for this.
    made: bool,
}

impl<'a> Partial<'a> {
    fn new(folder: &'a Path) -> Result<Self> {
        if let Some(taken) = top_level().rev().map(|name| folder.join(name)).find(|path| path.exists()) {
            let hint = "draw into another folder".into();
            return Err(Error::Exists { path: taken, hint });
        }
        let made = !folder.exists();
        fs::create_dir_all(folder).map_err(|e| Error::write(folder, e))?;
        let path = folder.join(PARTIAL);
        match fs::create_dir(&path) {
            Ok(()) => Ok(Self { path, folder, made }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let hint = "another run is drawing here, or left this when it was stopped: \
                            remove it, or draw into another folder";
                Err(Error::Exists { path, hint: hint.into() })
            }
            Err(e) => Err(Error::write(path, e)),
        }
    }

    /// Moves everything to its place.
    fn publish(mut self) -> Result<()> {
        for name in top_level() {
            let to = self.folder.join(name);
            fs::rename(self.path.join(name), &to).map_err(|e| Error::write(to, e))?;
        }
        self.made = false;
        Ok(())
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        // What failed is already being reported.
        let _ = fs::remove_dir_all(&self.path);
        if self.made {
            let _ = fs::remove_dir(self.folder);
        }
    }
}

/// What lies in the folder itself, the pictures last.
fn top_level() -> impl DoubleEndedIterator<Item = &'static str> {
    let files = Dataset::FILES.into_iter().filter(|name| !name.contains('/'));
    files.chain(["annotations", IMAGES])
}

fn make(folder: &Path) -> Result<()> {
    fs::create_dir(folder).map_err(|e| Error::write(folder, e))
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|e| Error::write(path, e))
}
