//! The paper's settings by name (`anchors/presets.toml`).

use serde::{Deserialize, Serialize};

use super::Method;
use crate::{Error, Result};

const TEXT: &str = include_str!("../../anchors/presets.toml");

/// What an anchor is used with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// Its name.
    pub name: String,
    /// How the anchor that it is meant for is acquired.
    pub method: Method,
    /// The anchor's factor.
    pub alpha: f64,
    /// The attention output's factor.
    pub beta: f64,
    /// GIF's cutoff D0 in frequency bins, of pictures of 224 pixels and more.
    pub cutoff: f64,
    /// Where it is from, in a line.
    pub note: String,
}

impl Preset {
    /// GIF's cutoff for pictures of `image_size` pixels: smaller ones have fewer bins, and get the
    /// same share of them, as in [`super::default_cutoff`].
    pub fn cutoff_at(&self, image_size: usize) -> f64 {
        self.cutoff * (image_size as f64 / 224.0).min(1.0)
    }
}

/// All presets, in the paper's order.
///
/// # Errors
/// If this build's `anchors/presets.toml` is damaged.
pub fn all() -> Result<Vec<Preset>> {
    #[derive(Deserialize)]
    struct File {
        preset: Vec<Preset>,
    }
    let file: File =
        toml::from_str(TEXT).map_err(|e| Error::config("anchors/presets.toml", e.message().to_string()))?;
    Ok(file.preset)
}

/// The preset `name`.
///
/// # Errors
/// [`Error::Argument`], which lists the names, if there is none.
pub fn find(name: &str) -> Result<Preset> {
    let all = all()?;
    let names: Vec<_> = all.iter().map(|preset| preset.name.clone()).collect();
    all.into_iter().find(|preset| preset.name == name).ok_or_else(|| {
        Error::argument("--preset", format!("one of {}", names.join(", ")), format!("`{name}`"))
    })
}

#[cfg(test)]
mod tests {
    use super::super::{TRAINING_FREE_MIX, default_cutoff};
    use super::*;

    /// The paper's Table 9, row by row.
    #[test]
    fn presets_are_the_papers_table() {
        let alpha = [1.2, 1.2, 1.2, 1.2, 0.8];
        let beta = [-0.8, 0.0, 0.0, 0.0, 0.2];
        let cutoff = [40.0, 40.0, 30.0, 40.0, 40.0];
        let guided = Method::ModelGuided;
        let method = [Method::TrainingFree, guided, guided, guided, Method::DataDriven];
        let all = all().expect("the presets");
        let names: Vec<_> = all.iter().map(|preset| preset.name.as_str()).collect();
        assert_eq!(names, ["clip", "tecoa", "tga", "fare", "plus"]);
        for (i, preset) in all.iter().enumerate() {
            let found = (preset.alpha, preset.beta, preset.cutoff, preset.method);
            assert_eq!(found, (alpha[i], beta[i], cutoff[i], method[i]), "{}", preset.name);
            assert!(!preset.note.is_empty() && !preset.note.contains('\n'), "{}", preset.name);
            assert_eq!(find(&preset.name).expect("by its name"), *preset);
        }
    }

    #[test]
    fn a_preset_agrees_with_the_defaults_at_every_size() {
        let clip = find("clip").expect("a preset");
        assert_eq!((clip.alpha, clip.beta), TRAINING_FREE_MIX);
        for size in [20, 32, 112, 224, 336] {
            assert_eq!(clip.cutoff_at(size), default_cutoff(size));
        }
        assert_eq!(find("tga").expect("a preset").cutoff_at(112), 15.0);
    }

    #[test]
    fn an_unknown_preset_is_an_error_with_all_names() {
        let error = find("FARE").expect_err("no such preset").to_string();
        assert_eq!(error, "--preset: expected one of clip, tecoa, tga, fare, plus, found `FARE`");
    }
}
