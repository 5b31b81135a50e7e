//! The pocket world: little pictures with words, drawn from a seed.
//!
//! [`draw`] renders a [`Scene`]: one object of one of 26 [`KINDS`] in one of ten places, with a
//! caption and questions about it in a small closed vocabulary. It is enough to train and test a
//! tiny CLIP and a tiny LLaVA without a single downloaded picture. Surfaces carry fine texture (fur,
//! scales, wood grain), which an undefended network leans on as it does on photographs.
//!
//! A [`Dataset`] is a folder of scenes in the formats of V-Attack, COCO and CLIP_benchmark.
//!
//! Everything but the resolution follows from (split, seed, index); the splits never share a
//! random stream.
//!
//! ```
//! use radapt::pocket::{Split, draw};
//!
//! # fn main() -> radapt::Result<()> {
//! let scene = draw(Split::Train, 7, 0, 96)?;
//! assert_eq!(scene.picture.dimensions(), (96, 96));
//! assert!(scene.caption.contains(scene.name()));
//! // The same scene, sharper.
//! assert_eq!(draw(Split::Train, 7, 0, 224)?.caption, scene.caption);
//! # Ok(())
//! # }
//! ```

pub mod built_in;
mod dataset;
mod draft;
mod objects;
mod places;
mod render;
pub mod score;
mod texture;
pub mod training;
mod words;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::{Error, Result};
pub use dataset::Dataset;
use draft::Rgb;

/// The sides [`draw`] takes, in pixels.
pub const SIDES: std::ops::RangeInclusive<u32> = 96..=224;

/// Which of the disjoint random streams a scene comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// For training.
    Train,
    /// For choosing among trained models.
    Validation,
    /// For reported numbers.
    Test,
}

impl Split {
    /// Its name: `train`, `validation` or `test`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }
}

impl std::str::FromStr for Split {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::Train, Self::Validation, Self::Test]
            .into_iter()
            .find(|split| split.name() == text)
            .ok_or_else(|| Error::argument("split", "train, validation or test", text))
    }
}

/// A kind of object.
pub struct Kind {
    /// Its noun.
    pub name: &'static str,
    /// What goes before its noun: `a`, `an` or `a pair of`.
    pub article: &'static str,
    /// The noun of its category.
    pub category: &'static str,
    /// The other kinds of its category, as indices into [`KINDS`].
    pub confusable: &'static [usize],
    /// The colours it comes in.
    pub colors: &'static [&'static str],
    /// Whether it may be mirrored.
    mirrors: bool,
    /// The range of angles, in degrees, added to every kind's own ±20.
    turn: f32,
    drawing: objects::Drawing,
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kind")
            .field("name", &self.name)
            .field("category", &self.category)
            .finish_non_exhaustive()
    }
}

type Colors = &'static [&'static str];

const fn kind(
    (article, name): (&'static str, &'static str),
    category: &'static str,
    confusable: &'static [usize],
    colors: Colors,
    drawing: objects::Drawing,
) -> Kind {
    Kind { name, article, category, confusable, colors, mirrors: true, turn: 0.0, drawing }
}

impl Kind {
    const fn turned(mut self, turn: f32) -> Self {
        self.turn = turn;
        self
    }

    const fn never_mirrored(mut self) -> Self {
        self.mirrors = false;
        self
    }
}

const HOUSEHOLD: &str = "household object";
const STREET: &str = "street object";

/// Every kind, by category.
pub static KINDS: [Kind; 26] = [
    kind(("an", "apple"), "fruit", &[1, 2, 3], &["red", "green", "yellow"], objects::apple),
    kind(("a", "pear"), "fruit", &[0, 2, 3], &["green", "yellow"], objects::pear),
    kind(("a", "banana"), "fruit", &[0, 1, 3], &["yellow", "green"], objects::banana),
    kind(("a", "strawberry"), "fruit", &[0, 1, 2], &["red"], objects::strawberry),
    kind(("a", "car"), "vehicle", &[5, 6, 7], &["red", "blue", "yellow", "white", "green"], objects::car),
    kind(("a", "bus"), "vehicle", &[4, 6, 7], &["yellow", "red", "blue", "green"], objects::bus)
        .never_mirrored(),
    kind(("a", "sailboat"), "vehicle", &[4, 5, 7], &["white", "red", "blue", "orange"], objects::sailboat),
    kind(("an", "airplane"), "vehicle", &[4, 5, 6], &["white", "red", "blue", "yellow"], objects::airplane)
        .turned(40.0),
    kind(("a", "cat"), "animal", &[9, 10, 11], &["orange", "gray", "black", "white", "brown"], objects::cat),
    kind(("a", "fish"), "animal", &[8, 10, 11], &["orange", "blue", "yellow", "red"], objects::fish),
    kind(
        ("a", "butterfly"),
        "animal",
        &[8, 9, 11],
        &["orange", "blue", "yellow", "purple", "pink"],
        objects::butterfly,
    ),
    kind(("an", "owl"), "animal", &[8, 9, 10], &["brown", "gray", "white"], objects::owl),
    kind(("a", "hammer"), "tool", &[13, 14, 15], &["red", "yellow", "blue", "brown"], objects::hammer)
        .turned(20.0),
    kind(
        ("a pair of", "scissors"),
        "tool",
        &[12, 14, 15],
        &["red", "blue", "orange", "green"],
        objects::scissors,
    )
    .turned(20.0),
    kind(("a", "key"), "tool", &[12, 13, 15], &["yellow", "gray", "brown"], objects::key).turned(25.0),
    kind(("a", "saw"), "tool", &[12, 13, 14], &["brown", "red", "blue", "orange"], objects::saw).turned(15.0),
    kind(("a", "mug"), HOUSEHOLD, &[17, 18, 19], &["white", "red", "blue", "green", "yellow"], objects::mug),
    kind(
        ("a", "teapot"),
        HOUSEHOLD,
        &[16, 18, 19],
        &["white", "blue", "red", "green", "pink"],
        objects::teapot,
    ),
    kind(("a", "lamp"), HOUSEHOLD, &[16, 17, 19], &["yellow", "red", "blue", "green"], objects::lamp),
    kind(
        ("a", "clock"),
        HOUSEHOLD,
        &[16, 17, 18],
        &["red", "blue", "black", "green", "orange"],
        objects::clock,
    ),
    kind(("a", "cactus"), "plant", &[21, 22], &["green"], objects::cactus),
    kind(("a", "sunflower"), "plant", &[20, 22], &["yellow"], objects::sunflower),
    kind(("a", "tree"), "plant", &[20, 21], &["green", "orange", "yellow", "red"], objects::tree),
    kind(("a", "stop sign"), STREET, &[24, 25], &["red"], objects::stop_sign).never_mirrored(),
    kind(("a", "traffic light"), STREET, &[23, 25], &["black", "yellow", "gray"], objects::traffic_light),
    kind(("a", "fire hydrant"), STREET, &[23, 24], &["red", "yellow", "blue"], objects::hydrant),
];

/// A picture and what there is to say about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    /// The picture, square.
    pub picture: image::RgbImage,
    /// The object's kind, as an index into [`KINDS`].
    pub kind: usize,
    /// A confusable kind of the same category, for an attack to aim at.
    pub target: usize,
    /// The object's main colour.
    pub color: &'static str,
    /// Where it is, such as `on the sand`.
    pub place: &'static str,
    /// One sentence about the picture, such as `A red car on the sand.`
    pub caption: String,
    /// The same sentence about the target.
    pub target_caption: String,
    /// Three questions whose answer names the object: what it is, by colour or place, by category.
    pub questions: [Question; 3],
    /// Further questions, about colour, place and presence.
    pub more: Vec<Question>,
    /// The object's box in pixels: left, top, width, height, within the picture.
    pub bbox: [f32; 4],
    /// Whether something lies over the object or the frame cuts it.
    pub occluded: bool,
}

impl Scene {
    /// The object's noun.
    pub fn name(&self) -> &'static str {
        KINDS[self.kind].name
    }
}

/// A question about a picture and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The question, a full sentence.
    pub question: String,
    /// The answer, such as `A car.` or `Yes.`
    pub answer: String,
}

/// Draws a scene, `size` pixels wide and high; [`SIDES`] are allowed.
pub fn draw(split: Split, seed: u64, index: u64, size: u32) -> Result<Scene> {
    if !SIDES.contains(&size) {
        return Err(Error::argument("size", "96 to 224 pixels", size));
    }
    let mut dice = Dice::new(split, seed, index);
    let kind = dice.below(KINDS.len());
    let target = *dice.pick(KINDS[kind].confusable);
    let color = *dice.pick(KINDS[kind].colors);
    let places: Vec<_> = places::PLACES.iter().filter(|p| !p.avoid.contains(&color)).collect();
    let place = *dice.pick(&places);
    let words = words::Words::new(&mut dice, kind, target, color, place.phrase);
    let view = render::render(&mut dice, &KINDS[kind], color, place, size)?;
    Ok(Scene {
        picture: view.picture,
        kind,
        target,
        color,
        place: place.phrase,
        caption: words.caption,
        target_caption: words.target_caption,
        questions: words.questions,
        more: words.more,
        bbox: view.bbox,
        occluded: view.occluded,
    })
}

/// The kind of the object in a scene, as an index into [`KINDS`], without drawing it.
pub fn kind_of(split: Split, seed: u64, index: u64) -> usize {
    Dice::new(split, seed, index).below(KINDS.len())
}

/// A colour's middle, which [`render`] varies a little.
fn rgb(name: &str) -> Rgb {
    match name {
        "red" => [208.0, 40.0, 42.0],
        "orange" => [236.0, 126.0, 36.0],
        "yellow" => [244.0, 204.0, 46.0],
        "green" => [66.0, 152.0, 62.0],
        "blue" => [44.0, 98.0, 202.0],
        "purple" => [136.0, 72.0, 184.0],
        "pink" => [238.0, 132.0, 170.0],
        "brown" => [138.0, 86.0, 48.0],
        "white" => [238.0, 238.0, 234.0],
        "gray" => [142.0, 146.0, 154.0],
        _ => [50.0, 50.0, 56.0],
    }
}

/// A scene's random stream; its draws are the same on every platform.
struct Dice(ChaCha8Rng);

impl Dice {
    fn new(split: Split, seed: u64, index: u64) -> Self {
        let mut key = *b"radapt pocket world, version 1  ";
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[31] = match split {
            Split::Train => 0,
            Split::Validation => 1,
            Split::Test => 2,
        };
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        Self(rng)
    }

    /// Uniform in `[0, 1)`.
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Uniform in `0..count`.
    fn below(&mut self, count: usize) -> usize {
        ((u64::from(self.0.next_u32()) * count as u64) >> 32) as usize
    }

    fn chance(&mut self, share: f32) -> bool {
        self.unit() < share
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    fn seed(&mut self) -> u32 {
        self.0.next_u32()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn scene(split: Split, index: u64, size: u32) -> Scene {
        draw(split, 3, index, size).expect("an allowed size")
    }

    #[test]
    fn the_same_arguments_give_the_same_scene() {
        for index in 0..40 {
            assert_eq!(scene(Split::Train, index, 96), scene(Split::Train, index, 96));
        }
    }

    #[test]
    fn size_changes_the_resolution_alone() {
        for index in 0..40 {
            let (small, large) = (scene(Split::Train, index, 96), scene(Split::Train, index, 224));
            for (a, b) in small.bbox.iter().zip(large.bbox) {
                assert!((a / 96.0 - b / 224.0).abs() < 1e-3, "{:?} {:?}", small.bbox, large.bbox);
            }
            let blank = |scene: Scene| Scene { picture: image::RgbImage::default(), bbox: [0.0; 4], ..scene };
            let mean =
                |s: &Scene| s.picture.iter().map(|&v| f64::from(v)).sum::<f64>() / s.picture.len() as f64;
            assert!((mean(&small) - mean(&large)).abs() < 3.0, "scene {index}");
            assert_eq!(blank(small), blank(large));
        }
    }

    #[test]
    fn splits_and_seeds_differ() {
        let mut seen = BTreeSet::new();
        for split in [Split::Train, Split::Validation, Split::Test] {
            for index in 0..30 {
                assert!(seen.insert(scene(split, index, 96).picture.into_raw()));
            }
        }
        assert!(seen.insert(draw(Split::Train, 4, 0, 96).expect("allowed").picture.into_raw()));
    }

    #[test]
    fn other_sizes_are_refused() {
        for size in [0, 95, 225, u32::MAX] {
            assert!(matches!(draw(Split::Train, 0, 0, size), Err(Error::Argument { .. })));
        }
    }

    #[test]
    fn kinds_are_consistent() {
        for (i, kind) in KINDS.iter().enumerate() {
            assert!(kind.article.len() > 2 || kind.article == words::article(kind.name));
            let same: Vec<_> = (0..26).filter(|&j| j != i && KINDS[j].category == kind.category).collect();
            assert_eq!(kind.confusable, same);
            for color in kind.colors {
                assert!(places::PLACES.iter().any(|p| !p.avoid.contains(color)));
            }
        }
    }

    #[test]
    fn words_fit_the_scene() {
        let mut count = [0u32; 26];
        let (mut yes, mut asked) = (0, 0);
        let mut vocabulary = BTreeSet::new();
        for index in 0..1500 {
            let s = scene(Split::Test, index, 96);
            count[s.kind] += 1;
            let kind = &KINDS[s.kind];
            assert_ne!(s.kind, s.target);
            assert_eq!(s.kind, kind_of(Split::Test, 3, index));
            assert_eq!(kind.category, KINDS[s.target].category);
            assert!(s.caption.contains(s.name()) && s.caption.ends_with(&format!("{}.", s.place)));
            assert!(s.caption.contains(s.color) && s.target_caption.contains(KINDS[s.target].name));
            for q in &s.questions {
                assert!(q.answer.ends_with(&format!("{}.", kind.name)), "{q:?}");
                assert!(!q.question.contains(kind.name) && q.question.ends_with('?'), "{q:?}");
            }
            for q in s.questions.iter().chain(&s.more) {
                let text = format!("{} {} {}", q.question, q.answer, s.caption).to_lowercase();
                vocabulary.extend(text.split(|c: char| !c.is_alphabetic()).map(str::to_owned));
                let words: Vec<_> = text.split_whitespace().collect();
                for pair in words.windows(2).filter(|w| ["a", "an"].contains(&w[0])) {
                    assert_eq!(words::article(pair[1]), pair[0], "{text}");
                }
                if q.question.starts_with("Is there") {
                    asked += 1;
                    yes += u32::from(q.answer == "Yes.");
                }
            }
            let [x, y, w, h] = s.bbox;
            assert!(x >= 0.0 && y >= 0.0 && x + w <= 96.01 && y + h <= 96.01 && w.max(h) > 40.0);
        }
        assert!(count.iter().all(|&n| n > 25), "{count:?}");
        assert!((0.45..0.55).contains(&(f64::from(yes) / f64::from(asked))));
        println!("{} words", vocabulary.len() - 1);
        assert!(vocabulary.len() < 120, "{vocabulary:?}");
    }
}
