//! COCO's instances and captions (val2017 and anything in their format), and sets of objects, targets
//! and questions chosen from them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::coco300::{ObjectRow, ObjectSet};
use crate::eval::judge::{Case, Verdict, WordJudge};
use crate::{Error, Result};

/// A picture of COCO.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct CocoImage {
    /// Its id.
    pub id: u64,
    /// Its file name, such as `000000000285.jpg`.
    pub file_name: String,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
}

/// A class of COCO.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Category {
    /// Its id.
    pub id: u64,
    /// Its name, such as `teddy bear`.
    pub name: String,
    /// What sort of thing it is, such as `indoor`.
    #[serde(default)]
    pub supercategory: String,
}

/// An object in a picture.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Instance {
    /// The picture.
    pub image_id: u64,
    /// The class.
    pub category_id: u64,
    /// In pixels; of the object's outline, not its box.
    pub area: f64,
    /// Left, top, width and height in pixels.
    pub bbox: [f64; 4],
    /// 1 for many at once.
    #[serde(default)]
    pub iscrowd: u8,
}

#[derive(Deserialize)]
struct InstancesFile {
    images: Vec<CocoImage>,
    categories: Vec<Category>,
    annotations: Vec<Instance>,
}

#[derive(Deserialize)]
struct Sentence {
    image_id: u64,
    caption: String,
}

#[derive(Deserialize)]
struct CaptionsFile {
    images: Vec<CocoImage>,
    annotations: Vec<Sentence>,
}

/// Pictures with their objects, or their captions, or both; in the order of their ids.
#[derive(Debug, Clone, Default)]
pub struct Coco {
    images: Vec<CocoImage>,
    categories: Vec<Category>,
    instances: HashMap<u64, Vec<Instance>>,
    captions: HashMap<u64, Vec<String>>,
}

fn json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::data(path, e.to_string()))
}

impl Coco {
    /// Reads `instances_*.json`, and `captions_*.json` where given.
    ///
    /// # Errors
    /// If a file is damaged, names a picture or a class that it does not list, or lists one twice.
    pub fn open(instances: &Path, captions: Option<&Path>) -> Result<Self> {
        let file: InstancesFile = json(instances)?;
        let known = ids(instances, &file.images)?;
        let mut classes = HashSet::new();
        for category in &file.categories {
            if !classes.insert(category.id) {
                return Err(Error::data(instances, format!("category {} comes twice", category.id)));
            }
        }
        let mut coco = Self { images: file.images, categories: file.categories, ..Self::default() };
        for (i, instance) in file.annotations.into_iter().enumerate() {
            for (what, id, there) in [
                ("picture", instance.image_id, known.contains(&instance.image_id)),
                ("category", instance.category_id, classes.contains(&instance.category_id)),
            ] {
                if !there {
                    return Err(Error::data(instances, format!("annotation {i}: there is no {what} {id}")));
                }
            }
            coco.instances.entry(instance.image_id).or_default().push(instance);
        }
        if let Some(path) = captions {
            coco.captions = Self::captions_alone(path)?.captions;
        }
        coco.images.sort_by_key(|image| image.id);
        Ok(coco)
    }

    /// Reads `captions_*.json` alone.
    ///
    /// # Errors
    /// As [`Coco::open`].
    pub fn captions_alone(path: &Path) -> Result<Self> {
        let file: CaptionsFile = json(path)?;
        let known = ids(path, &file.images)?;
        let mut coco = Self { images: file.images, ..Self::default() };
        for (i, Sentence { image_id, caption }) in file.annotations.into_iter().enumerate() {
            if !known.contains(&image_id) {
                return Err(Error::data(path, format!("annotation {i}: there is no picture {image_id}")));
            }
            coco.captions.entry(image_id).or_default().push(caption);
        }
        coco.images.sort_by_key(|image| image.id);
        Ok(coco)
    }

    /// The pictures.
    pub fn images(&self) -> &[CocoImage] {
        &self.images
    }

    /// The classes.
    pub fn categories(&self) -> &[Category] {
        &self.categories
    }

    /// A picture's objects.
    pub fn instances(&self, image: u64) -> &[Instance] {
        self.instances.get(&image).map_or(&[], Vec::as_slice)
    }

    /// A picture's captions, in the file's order.
    pub fn captions(&self, image: u64) -> &[String] {
        self.captions.get(&image).map_or(&[], Vec::as_slice)
    }

    /// Chooses `n` pictures with one main object each, a target to confuse it with, and three
    /// questions. A main object covers at least a tenth of its picture, and no other class covers more
    /// than half as much. The target is of the same supercategory, is nowhere in the picture, and is
    /// told apart from the object by [`WordJudge`]. A caption that names the object and not the target
    /// describes it, where there is one.
    ///
    /// The draw goes by picture: it does not depend on the files' order, and one of fewer pictures with
    /// the same seed is part of it.
    ///
    /// # Errors
    /// If fewer than `n` pictures have a main object, or `n` is 0.
    pub fn select(&self, name: &str, n: usize, seed: u64) -> Result<ObjectSet> {
        let prompts = SelectPrompts::new()?;
        let judge = WordJudge::new()?;
        let mut order: Vec<([u8; 32], &CocoImage)> =
            self.images.iter().map(|image| (draw(seed, image.id, "picture"), image)).collect();
        order.sort_by_key(|(hash, image)| (*hash, image.id));
        let mut rows = Vec::new();
        for (_, image) in order {
            if rows.len() == n {
                break;
            }
            rows.extend(self.row(image, seed, &prompts, &judge));
        }
        if rows.len() < n || n == 0 {
            let found = format!("{n}; {} have a main object and a target", rows.len());
            return Err(Error::argument("--select", "at least 1 picture, and no more than there are", found));
        }
        rows.sort_by(|a, b| a.image.cmp(&b.image));
        ObjectSet::new(name, rows)
    }

    fn row(
        &self,
        image: &CocoImage,
        seed: u64,
        prompts: &SelectPrompts,
        judge: &WordJudge,
    ) -> Option<ObjectRow> {
        let mut areas: BTreeMap<u64, f64> = BTreeMap::new();
        let mut alone: BTreeMap<u64, f64> = BTreeMap::new();
        for instance in self.instances(image.id) {
            *areas.entry(instance.category_id).or_default() += instance.area;
            if instance.iscrowd == 0 {
                let most = alone.entry(instance.category_id).or_default();
                *most = most.max(instance.area);
            }
        }
        let (main, most) = alone.into_iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let others = areas.iter().filter(|(id, _)| **id != main).map(|(_, area)| *area);
        let second = others.fold(0.0, f64::max);
        let pixels = f64::from(image.width) * f64::from(image.height);
        if most < 0.1 * pixels || second > 0.5 * areas.get(&main)? {
            return None;
        }
        let class = self.categories.iter().find(|category| category.id == main)?;
        if prompts.never.contains(&class.name) {
            return None;
        }
        let keyword = judge.keyword(&class.name);
        let mut targets: Vec<(&Category, [u8; 32])> = self
            .categories
            .iter()
            .filter(|other| other.supercategory == class.supercategory && other.id != main)
            .filter(|other| !areas.contains_key(&other.id) && !prompts.never.contains(&other.name))
            .filter(|other| judge.tells_apart(keyword, judge.keyword(&other.name)))
            .map(|other| (other, draw(seed, image.id, &other.name)))
            .collect();
        targets.sort_by_key(|(category, hash)| (*hash, category.id));
        let target = judge.keyword(&targets.first()?.0.name);
        let names_it = |caption: &&String| {
            judge.verdict(&Case::new(caption.as_str(), keyword, target)) == Verdict::Original
        };
        let description = self.captions(image.id).iter().find(names_it).map_or_else(
            || prompts.describe(keyword),
            |caption| caption.split_whitespace().collect::<Vec<_>>().join(" "),
        );
        let sort = prompts.sorts.get(&class.supercategory).unwrap_or(&class.supercategory);
        let questions = prompts.questions.iter().enumerate().filter_map(|(i, wordings)| {
            let hash = draw(seed, image.id, &format!("question {i}"));
            let pick = usize::from(hash[0]) % wordings.len().max(1);
            Some(wordings.get(pick)?.replace("{sort}", if sort.is_empty() { "object" } else { sort }))
        });
        let mut letters = keyword.chars();
        Some(ObjectRow {
            image: image.file_name.clone(),
            questions: questions.collect(),
            description,
            target: target.into(),
            target_description: prompts.describe(target),
            keyword: letters.next().map(|c| c.to_uppercase().chain(letters).collect())?,
        })
    }
}

fn ids(path: &Path, images: &[CocoImage]) -> Result<HashSet<u64>> {
    let mut known = HashSet::new();
    for image in images {
        if !known.insert(image.id) {
            return Err(Error::data(path, format!("picture {} comes twice", image.id)));
        }
    }
    Ok(known)
}

/// A hash that picks something for a picture.
fn draw(seed: u64, image: u64, what: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"radapt select\0");
    hash.update(seed.to_le_bytes());
    hash.update(image.to_le_bytes());
    hash.update(what.as_bytes());
    hash.finalize().into()
}

/// `prompts/select.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SelectPrompts {
    #[serde(rename = "version")]
    _version: u32,
    description: String,
    questions: Vec<Vec<String>>,
    never: Vec<String>,
    sorts: BTreeMap<String, String>,
}

impl SelectPrompts {
    fn new() -> Result<Self> {
        let text = include_str!("../../prompts/select.toml");
        toml::from_str(text).map_err(|e| Error::config(Path::new("prompts/select.toml"), e.to_string()))
    }

    fn describe(&self, object: &str) -> String {
        let article = if object.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        let article =
            if object.ends_with('s') && !object.ends_with("ss") && object != "bus" { "" } else { article };
        let named = format!("{article} {object}");
        self.description.replace("{object}", named.trim())
    }
}
