//! Sets of objects, targets and questions chosen from COCO, in V-Attack's format.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::judge::{Case, Verdict, WordJudge};
use crate::data::coco::{Category, Coco, CocoImage};
use crate::data::coco300::{ObjectRow, ObjectSet};
use crate::{Error, Result};

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
pub fn select(coco: &Coco, name: &str, n: usize, seed: u64) -> Result<ObjectSet> {
    let prompts = SelectPrompts::new()?;
    let judge = WordJudge::new()?;
    let mut order: Vec<([u8; 32], &CocoImage)> =
        coco.images().iter().map(|image| (draw(seed, image.id, "picture"), image)).collect();
    order.sort_by_key(|(hash, image)| (*hash, image.id));
    let mut rows = Vec::new();
    for (_, image) in order {
        if rows.len() == n {
            break;
        }
        rows.extend(row(coco, image, seed, &prompts, &judge));
    }
    if rows.len() < n || n == 0 {
        let found = format!("{n}; {} have a main object and a target", rows.len());
        return Err(Error::argument("--select", "at least 1 picture, and no more than there are", found));
    }
    rows.sort_by(|a, b| a.image.cmp(&b.image));
    ObjectSet::new(name, rows)
}

fn row(
    coco: &Coco,
    image: &CocoImage,
    seed: u64,
    prompts: &SelectPrompts,
    judge: &WordJudge,
) -> Option<ObjectRow> {
    let mut areas: BTreeMap<u64, f64> = BTreeMap::new();
    let mut alone: BTreeMap<u64, f64> = BTreeMap::new();
    for instance in coco.instances(image.id) {
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
    let class = coco.categories().iter().find(|category| category.id == main)?;
    if prompts.never.contains(&class.name) {
        return None;
    }
    let keyword = judge.keyword(&class.name);
    let mut targets: Vec<(&Category, [u8; 32])> = coco
        .categories()
        .iter()
        .filter(|other| other.supercategory == class.supercategory && other.id != main)
        .filter(|other| !areas.contains_key(&other.id) && !prompts.never.contains(&other.name))
        .filter(|other| judge.tells_apart(keyword, judge.keyword(&other.name)))
        .map(|other| (other, draw(seed, image.id, &other.name)))
        .collect();
    targets.sort_by_key(|(category, hash)| (*hash, category.id));
    let target = judge.keyword(&targets.first()?.0.name);
    let names_it =
        |caption: &&String| judge.verdict(&Case::new(caption.as_str(), keyword, target)) == Verdict::Original;
    let description = coco.captions(image.id).iter().find(names_it).map_or_else(
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
