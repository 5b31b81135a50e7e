//! The 16 sets of the paper's Table 1, from `prompts/classification.toml`.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The one template that figures are given for where no other is asked for. The paper's authors
/// leave out its full stop in their code.
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
    /// The split that is evaluated, as the WebDataset's folder is called; ImageNet's validation
    /// pictures are its `test`.
    pub split: Option<String>,
    /// The data set on the Hub in CLIP_benchmark's WebDataset layout, where there is one.
    pub hub: Option<String>,
    /// CLIP's own prompt ensemble, each with a place `{class}`.
    pub templates: Option<Vec<String>>,
    /// Its classes in label order, where its files do not bring them.
    pub class_names: Option<Vec<String>>,
}

impl Entry {
    /// Whether a set with this name and number of classes is this one.
    pub(super) fn fits(&self, name: &str, classes: usize) -> bool {
        self.is_called(name) && self.classes == classes
    }

    /// Whether a folder or file of this name is this set: its own name, or its repository's.
    fn is_called(&self, name: &str) -> bool {
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
    // Only an edit of that file can fail here, and no test of this module passes then.
    toml::from_str::<Registry>(text).expect("prompts/classification.toml is a registry").set
});

/// The paper's 16 sets.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_registry_holds_the_papers_sixteen_sets() {
        assert_eq!(entries().len(), 16);
        let names: BTreeSet<_> = entries().iter().map(|entry| &entry.name).collect();
        assert_eq!(names.len(), 16);
        for entry in entries() {
            if let Some(names) = &entry.class_names {
                assert_eq!(names.len(), entry.classes, "{}", entry.name);
                assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), entry.classes, "{}", entry.name);
                assert!(names.iter().all(|name| name.trim() == name && !name.is_empty()));
            }
            for template in entry.templates.iter().flatten() {
                assert_eq!(template.matches("{class}").count(), 1, "{template}");
            }
            assert_eq!(entry.hub.is_some(), entry.split.is_some(), "{}", entry.name);
            for name in [Some(entry.name.as_str()), entry.hub.as_deref()].into_iter().flatten() {
                let last = name.rsplit('/').next().expect("a part");
                assert!(std::ptr::eq(super::entry(last).expect("it is there"), entry));
            }
        }
        let ensemble = |name| entry(name).expect("a set").templates.as_ref().map(Vec::len);
        assert_eq!(
            (ensemble("imagenet1k"), ensemble("cifar10"), ensemble("caltech101")),
            (Some(80), Some(18), Some(34))
        );
        let error = entry("mnist").expect_err("none of the sixteen").to_string();
        assert!(error.contains("found mnist") && error.contains("caltech256"), "{error}");
    }

    // The sizes that the Hub lists for the files of CLIP_benchmark's WebDatasets.
    #[test]
    fn names_and_templates_have_the_sizes_of_the_published_files() {
        let size = |lines: &Option<Vec<String>>, place: &str| -> usize {
            let lines = lines.iter().flatten();
            lines.map(|line| line.replace("{class}", place).len() + 1).sum()
        };
        for (name, names, templates) in
            [("cifar10", 60, 480), ("cifar100", 725, 480), ("pcam", 57, 63), ("caltech101", 0, 646)]
        {
            let entry = entry(name).expect("a set");
            assert_eq!(size(&entry.class_names, ""), names, "{name}");
            assert_eq!(size(&entry.templates, "{c}"), templates, "{name}");
        }
    }
}
