//! COCO's instances and captions: val2017 and anything in their format. Sets of objects and targets
//! are chosen from them by [`crate::eval::select`].

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Deserialize;

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
