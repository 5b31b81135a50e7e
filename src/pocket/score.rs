//! How good the pocket CLIP is, clean and under PGD, with each part of the defence.

use candle_core::{Device, Tensor};

use crate::attack::{
    Attack, Classification, Classifier, Eps, Loss, Pgd, Pictures, Progress, Subject, ThreatKind,
    TowerClassifier,
};
use crate::defense::{Defense, DefenseOptions};
use crate::eval::{Attacked, Precision, Row};
use crate::image::pixels_from_rgb;
use crate::model::Model;
use crate::pocket::{KINDS, Split, draw};
use crate::text::ZeroShotHead;
use crate::tower::VisionTower;
use crate::{Error, Result};

/// The template accuracy is given for.
pub const TEMPLATE: &str = "a photo of a {class}.";

/// What [`zero_shot`] measures.
#[derive(Debug, Clone)]
pub struct ZeroShot {
    /// Pictures of the split, from its first.
    pub n: u64,
    /// Where they come from.
    pub split: Split,
    /// Of the pictures and of the attack.
    pub seed: u64,
    /// The defences by short name; the undefended model is the surrogate of `transfer` and comes
    /// first whatever is listed.
    pub defenses: Vec<(String, DefenseOptions)>,
    /// The radii of PGD; none for clean figures alone.
    pub eps: Vec<Eps>,
    /// PGD's steps, each of eps / 4.
    pub steps: usize,
}

/// Zero-shot accuracy on clean pictures, and robust accuracy under PGD on the cross-entropy, for
/// the undefended model and every defence: first all clean rows, then those of each eps under
/// `transfer` (crafted on the undefended model) and `adaptive` (crafted through the defence).
/// Adversarial pictures are rounded to 8 bits, as a file holds them, before they are scored.
/// `told(done, all)` hears of progress.
///
/// # Errors
/// If the model is no CLIP with a text side for pictures of 96 to 224 pixels, or a defence does
/// not fit.
pub fn zero_shot(model: &Model, what: &ZeroShot, told: &mut dyn FnMut(u64, u64)) -> Result<Vec<Row>> {
    let device = Device::Cpu;
    let preprocess = model.preprocess(None)?;
    let tower = model.tower(&preprocess, None, &device)?;
    let names: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
    let head = ZeroShotHead::new(&model.text(&device)?, &names, &[TEMPLATE])?;
    let mut settings = vec![("none".to_string(), Defense::default())];
    for (name, options) in &what.defenses {
        settings.push((name.clone(), options.build(&tower, || model.fingerprint())?));
    }
    let towers: Vec<_> = settings.iter().map(|(_, defense)| tower.with(defense.inserts())).collect();
    let mut classifiers = Vec::new();
    for (tower, (_, defense)) in towers.iter().zip(&settings) {
        classifiers.push(TowerClassifier::new(tower, &head, Subject::new(&model.name, defense)?)?);
    }
    let size = tower.spec().image_size as u32;
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for index in 0..what.n {
        let scene = draw(what.split, what.seed, index, size)?;
        pixels.push(pixels_from_rgb(&scene.picture, &device)?);
        labels.push(scene.kind);
    }
    let pixels = Tensor::stack(&pixels, 0)?;
    let pictures = Pictures::new(&pixels, (0..what.n).collect())?;
    let everything: Vec<usize> = (0..what.n as usize).collect();

    let crafting = settings.len() as u64 * what.eps.len() as u64;
    let (all, mut done) = (settings.len() as u64 + crafting * what.steps as u64, 0);
    let dataset = format!("pocket {}", what.split.name());
    let row = |defense: &str, attacked: Option<Attacked>, right: &[bool]| Row {
        task: "zero-shot".into(),
        dataset: dataset.clone(),
        defense: defense.into(),
        attacked,
        n: right.len(),
        correct: right.iter().filter(|right| **right).count(),
        mean_per_class: None,
    };
    let mut rows = Vec::new();
    let mut tasks = Vec::new();
    for (classifier, (name, _)) in classifiers.iter().zip(&settings) {
        let task = Classification::new(classifier as &dyn Classifier, labels.clone())?;
        let right = task.correct(&pixels, &everything)?;
        rows.push(row(name, None, &right));
        tasks.push((task, right));
        done += 1;
        told(done, all);
    }
    for eps in &what.eps {
        let pgd = Pgd { steps: what.steps, ..Pgd::new(*eps) }.on(Loss::CrossEntropy);
        let mut craft = |task: &Classification| {
            let before = done;
            let crafted = pgd.craft(task, &pictures, what.seed, &mut |progress: &Progress| {
                told(before + progress.step as u64, all);
            })?;
            done += what.steps as u64;
            crafted.quantised(&pixels)
        };
        let Some((undefended, _)) = tasks.first() else {
            return Err(Error::argument("defences", "one", "none"));
        };
        let surrogate = craft(undefended)?;
        for (i, ((task, right), (name, _))) in tasks.iter().zip(&settings).enumerate() {
            let mut add = |crafted: &crate::attack::Crafted, kind: ThreatKind| -> Result<()> {
                let scored = crafted.score(task, kind, right)?;
                let attacked = Attacked {
                    attack: pgd.name.clone(),
                    eps: Some(*eps),
                    threat: scored.threat().clone(),
                    pictures: Precision::EightBit,
                };
                rows.push(row(name, Some(attacked), scored.robust()));
                Ok(())
            };
            if i == 0 {
                // The undefended model is its own surrogate: gradients through all there is.
                add(&surrogate, ThreatKind::Adaptive)?;
            } else {
                add(&surrogate, ThreatKind::Transfer)?;
                add(&craft(task)?, ThreatKind::Adaptive)?;
            }
        }
    }
    Ok(rows)
}
