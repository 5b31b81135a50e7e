//! The 16 sets of the paper's Table 1, from `prompts/classification.toml`.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The paper's one template.
pub const TEMPLATE: &str = "a photo of a {class}.";

/// How a set's own literature counts (Radford et al. 2021, Table 9). The paper and FARE give plain
/// accuracy for every set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// The share of pictures that are classified right.
    Accuracy,
    /// The mean over classes of the share of their pictures that are classified right.
    MeanPerClass,
}

/// What is known about a set, wherever its pictures lie.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its short name, such as `cifar10`.
    pub name: String,
    /// Its name in print, such as `CIFAR-10`.
    pub title: String,
    /// How many classes it has.
    pub classes: usize,
    /// How its literature counts.
    pub metric: Metric,
    /// The split that is evaluated, as the WebDataset's folder is called.
    pub split: String,
    /// The data set on the Hub in CLIP_benchmark's WebDataset layout, where there is one.
    pub hub: Option<String>,
    /// CLIP's own prompt ensemble, each with a place `{class}`.
    pub templates: Option<Vec<String>>,
    /// Its classes in label order, where its files do not bring them.
    pub class_names: Option<Vec<String>>,
}

impl Entry {
    /// Whether a folder or file of this name is this set: its own name, or its repository's.
    pub(super) fn is_called(&self, name: &str) -> bool {
        let repository = self.hub.as_deref().and_then(|hub| hub.rsplit('/').next());
        self.name == name || repository == Some(name)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Registry {
    set: Vec<Entry>,
}

static ENTRIES: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let text = include_str!("../../prompts/classification.toml");
    // Checked by the test below; a build with another file does not pass.
    toml::from_str::<Registry>(text).map(|registry| registry.set).unwrap_or_default()
});

/// The paper's 16 sets, in the order of its Table 1's text.
pub fn entries() -> &'static [Entry] {
    &ENTRIES
}

/// The set of this name.
///
/// # Errors
/// If there is none.
pub fn entry(name: &str) -> Result<&'static Entry> {
    entries().iter().find(|entry| entry.is_called(name)).ok_or_else(|| {
        let names: Vec<_> = entries().iter().map(|entry| entry.name.as_str()).collect();
        Error::argument("data set", names.join(", "), name)
    })
}
