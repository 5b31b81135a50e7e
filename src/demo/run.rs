use std::time::Instant;

use candle_core::{Device, Tensor};
use futures::StreamExt;
use image::{ImageFormat, RgbImage};

use super::report::{Answer, Picture, Report, Row, Verdict, Version};
use crate::attack::{
    Crafted, Eps, Feature, FeatureObjective, Maximise, Pgd, Pictures, Subject, Threat, ThreatKind,
};
use crate::defense::DefenseOptions;
use crate::engine::{Engine, EngineOptions, Sampling, Turn};
use crate::eval::wilson;
use crate::image::{pixels_from_rgb, rgb_from_pixels};
use crate::model::{Model, ModelKind};
use crate::pocket::training::words::DESCRIBE;
use crate::pocket::{KINDS, Scene, Split, draw};
use crate::tower::VisionTower;
use crate::tower::clip::Clip;
use crate::{Error, Result};

/// What the demo does.
#[derive(Debug, Clone)]
pub struct Demo {
    /// A LLaVA that knows the pocket world.
    pub model: Model,
    /// The defence to compare the undefended model with.
    pub defense: DefenseOptions,
    /// How many held-out pictures.
    pub pictures: usize,
    /// The largest change of a pixel.
    pub eps: Eps,
    /// PGD's steps.
    pub steps: usize,
    /// Of the pictures and of the attack.
    pub seed: u64,
    /// The command that asked for it, which the page names.
    pub command: String,
}

/// How far the demo is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// What is being done, in words.
    pub name: &'static str,
    /// How much of it is done.
    pub done: u64,
    /// Of how much.
    pub all: u64,
}

impl Demo {
    /// Draws held-out pictures, attacks them through the vision tower under both threat models, and
    /// asks the undefended and the defended model about all of them.
    ///
    /// The attack is PGD that drives the features LLaVA reads (the patch tokens of block L - 1) away
    /// from those of the clean picture, once on the undefended tower (`transfer`) and once through
    /// the defence (`adaptive`). Adversarial pictures are rounded to
    /// 8 bits before anybody is asked.
    ///
    /// # Errors
    /// If the model cannot be loaded or is no LLaVA, nothing is put in by the defence, or
    /// `pictures` is 0.
    pub async fn run(&self, told: &mut dyn FnMut(Stage)) -> Result<Report> {
        let start = Instant::now();
        if self.pictures == 0 {
            return Err(Error::argument("--pictures", "at least 1", 0));
        }
        if self.model.kind != ModelKind::Llava {
            let reason = "is no LLaVA-1.5, which the demo asks about its pictures".into();
            return Err(Error::Model { model: self.model.name.clone(), reason });
        }
        let preprocess = self.model.preprocess(None)?;
        let undefended = self.model.tower(&preprocess, None, &Device::Cpu)?;
        let defense = self.defense.build(&undefended, || self.model.fingerprint())?;
        let subjects = [Subject::undefended(&self.model.name), Subject::new(&self.model.name, &defense)?];
        if subjects[1].is_undefended() {
            return Err(Error::argument("--anchor", "a defence to compare with", "none"));
        }
        let summary = defense.summary().map(|summary| summary.to_string()).unwrap_or_default();
        let short = match (&defense.gif, &defense.fra) {
            (Some(_), Some(_)) => "gif+fra",
            (Some(_), None) => "gif",
            _ => "fra",
        };
        let size = undefended.spec().image_size as u32;
        let scenes = (0..self.pictures as u64)
            .map(|index| draw(Split::Test, self.seed, index, size))
            .collect::<Result<Vec<_>>>()?;
        let pixels = self.pixels(&scenes)?;

        let crafting = 2 * self.steps as u64;
        let block = self.model.features()?.0;
        let defended = undefended.with(defense.inserts());
        let mut done = 0;
        let mut craft = |tower: &Clip, subject: &Subject| -> Result<Crafted> {
            let feature = Feature::Patches(block);
            let objective = FeatureObjective::away_from_clean(tower, subject.clone(), feature, &pixels)?;
            let pictures = Pictures::new(&pixels, (0..self.pictures as u64).collect())?;
            let crafted = self.pgd().maximise(&objective, &pictures, self.seed, &mut |progress| {
                told(Stage { name: "crafting", done: done + progress.step as u64, all: crafting });
            })?;
            done += self.steps as u64;
            crafted.quantised(&pixels)
        };
        let transfer = craft(&undefended, &subjects[0])?;
        let adaptive = craft(&defended, &subjects[1])?;
        let threats = [
            ThreatKind::Transfer.threat(&transfer.recipe().crafted_on, &subjects[1])?,
            ThreatKind::Adaptive.threat(&adaptive.recipe().crafted_on, &subjects[1])?,
        ];
        // The undefended model is attacked with its own gradients.
        let own = ThreatKind::Adaptive.threat(&transfer.recipe().crafted_on, &subjects[0])?;

        told(Stage { name: "loading", done: 0, all: 2 });
        let load = |defense: DefenseOptions| {
            Engine::load(self.model.clone(), EngineOptions { defense, ..EngineOptions::new(Device::Cpu) })
        };
        let none = DefenseOptions { anchor: crate::defense::AnchorChoice::None, ..Default::default() };
        let plain = load(none).await?;
        told(Stage { name: "loading", done: 1, all: 2 });
        let robust = load(self.defense.clone()).await?;

        let clean: Vec<RgbImage> = scenes.iter().map(|scene| scene.picture.clone()).collect();
        let (transferred, adapted) = (pictures(&transfer)?, pictures(&adaptive)?);
        let each = (1 + scenes[0].questions.len()) as u64;
        let (all, mut done) = (5 * each * self.pictures as u64, 0);
        let mut ask = async |engine: &Engine, pictures: &[RgbImage]| -> Result<Vec<Vec<Answer>>> {
            let before = done;
            let answers = answers(engine, &scenes, pictures, &mut |n| {
                told(Stage { name: "asking", done: before + n, all });
            })
            .await?;
            done += each * self.pictures as u64;
            Ok(answers)
        };
        let plain_clean = ask(&plain, &clean).await?;
        let robust_clean = ask(&robust, &clean).await?;
        let plain_attacked = ask(&plain, &transferred).await?;
        let robust_transfer = ask(&robust, &transferred).await?;
        let robust_adaptive = ask(&robust, &adapted).await?;

        let mut rows = Vec::new();
        for task in ["caption", "vqa"] {
            for (defense, clean, attacked, threat) in [
                ("none", &plain_clean, None, None),
                (short, &robust_clean, None, None),
                ("none", &plain_clean, Some(&plain_attacked), Some(&own)),
                (short, &robust_clean, Some(&robust_transfer), Some(&threats[0])),
                (short, &robust_clean, Some(&robust_adaptive), Some(&threats[1])),
            ] {
                rows.push(self.row(task, defense, clean, attacked, threat));
            }
        }
        let version = |picture: &RgbImage, clean: &RgbImage, undefended, defended| -> Result<Version> {
            let change =
                if picture == clean { Vec::new() } else { png(&magnified(picture, clean, self.eps))? };
            Ok(Version { png: png(picture)?, change, undefended, defended })
        };
        let mut shown = Vec::new();
        for (i, scene) in scenes.iter().enumerate() {
            let said = |answers: &[Vec<Answer>]| answers[i].clone();
            shown.push(Picture {
                object: scene.name().into(),
                caption: scene.caption.clone(),
                clean: version(&clean[i], &clean[i], Some(said(&plain_clean)), said(&robust_clean))?,
                transfer: version(
                    &transferred[i],
                    &clean[i],
                    Some(said(&plain_attacked)),
                    said(&robust_transfer),
                )?,
                adaptive: version(&adapted[i], &clean[i], None, said(&robust_adaptive))?,
            });
        }
        Ok(Report {
            model: self.model.name.clone(),
            defense: summary,
            attack: format!(
                "PGD, {} steps, driving the patch tokens of block {block} away from those of the clean picture",
                self.steps
            ),
            eps: self.eps.to_string(),
            seed: self.seed,
            command: self.command.clone(),
            rows,
            pictures: shown,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn pgd(&self) -> Pgd {
        Pgd {
            steps: self.steps,
            alpha: 4.0 * self.eps.value() / self.steps.max(1) as f64,
            ..Pgd::new(self.eps)
        }
    }

    fn pixels(&self, scenes: &[Scene]) -> Result<Tensor> {
        let pixels: Vec<Tensor> = scenes
            .iter()
            .map(|scene| pixels_from_rgb(&scene.picture, &Device::Cpu))
            .collect::<Result<_>>()?;
        Ok(Tensor::stack(&pixels, 0)?)
    }

    fn row(
        &self,
        task: &'static str,
        defense: &str,
        clean: &[Vec<Answer>],
        attacked: Option<&Vec<Vec<Answer>>>,
        threat: Option<&Threat>,
    ) -> Row {
        let questions = |answers: &'static str| if answers == "caption" { 0..1 } else { 1..usize::MAX };
        let of = |answers: &[Vec<Answer>]| -> Vec<Verdict> {
            let range = questions(task);
            let within = |(i, answer): (usize, &Answer)| range.contains(&i).then_some(answer.verdict);
            answers.iter().flat_map(|answers| answers.iter().enumerate().filter_map(within)).collect()
        };
        let before = of(clean);
        let after = attacked.map_or_else(|| before.clone(), |answers| of(answers));
        let right = |verdict: &Verdict| *verdict == Verdict::Original;
        // An answer that is wrong on the clean picture is never robust.
        let correct = before.iter().zip(&after).filter(|(a, b)| right(a) && right(b)).count();
        let other = after.iter().filter(|verdict| **verdict == Verdict::Other).count();
        let (low, high) = wilson(correct, after.len());
        Row {
            task,
            defense: defense.into(),
            attack: threat.map(|_| "pgd".into()),
            eps: threat.map(|_| self.eps.to_string()),
            threat: threat.cloned(),
            n: after.len(),
            correct,
            other,
            value: 100.0 * correct as f64 / after.len().max(1) as f64,
            low,
            high,
        }
    }
}

/// Asks for a caption and the scene's three questions, picture by picture, greedily; `told` hears
/// how many are answered.
///
/// # Errors
/// If the engine fails.
pub async fn answers(
    engine: &Engine,
    scenes: &[Scene],
    pictures: &[RgbImage],
    told: &mut dyn FnMut(u64),
) -> Result<Vec<Vec<Answer>>> {
    let asked = scenes.iter().zip(pictures).flat_map(|(scene, picture)| {
        let questions = scene.questions.iter().map(|question| question.question.as_str());
        std::iter::once(DESCRIBE).chain(questions).map(move |question| (scene, picture, question))
    });
    let sampling = Sampling { max_tokens: 48, ..Sampling::default() };
    let answer = async |(scene, picture, question): (&Scene, &RgbImage, &str)| -> Result<Answer> {
        let turn = Turn::of_pictures(question, vec![picture.clone()]);
        let answer = engine.answer(&[turn], &sampling).await?.text.trim().to_string();
        let verdict = verdict(&answer, scene.name());
        Ok(Answer { question: question.into(), answer, verdict })
    };
    let mut said = futures::stream::iter(asked).map(answer).buffered(8);
    let mut all: Vec<Answer> = Vec::new();
    while let Some(answer) = said.next().await {
        all.push(answer?);
        told(all.len() as u64);
    }
    let each = all.len() / scenes.len().max(1);
    Ok(all.chunks(each.max(1)).map(<[Answer]>::to_vec).collect())
}

/// What an answer names, by whole words: the picture's `object`, or another kind of thing of the
/// pocket world.
pub fn verdict(answer: &str, object: &str) -> Verdict {
    let other = KINDS.iter().any(|kind| kind.name != object && names(answer, kind.name));
    match (names(answer, object), other) {
        (true, false) => Verdict::Original,
        (false, true) => Verdict::Other,
        (true, true) => Verdict::Both,
        (false, false) => Verdict::Neither,
    }
}

fn names(answer: &str, object: &str) -> bool {
    let words = |text: &str| -> Vec<String> {
        let split = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        split.map(str::to_lowercase).collect()
    };
    let (answer, object) = (words(answer), words(object));
    !object.is_empty() && answer.windows(object.len()).any(|window| window == object)
}

fn pictures(crafted: &Crafted) -> Result<Vec<RgbImage>> {
    (0..crafted.outcomes().len()).map(|i| rgb_from_pixels(&crafted.pixels().get(i)?)).collect()
}

/// The change around grey, so that the largest one allowed is black or white.
fn magnified(picture: &RgbImage, clean: &RgbImage, eps: Eps) -> RgbImage {
    let scale = 127.0 / f64::from(eps.steps().max(1));
    let mut change = picture.clone();
    for (value, clean) in change.iter_mut().zip(clean.iter()) {
        *value = (128.0 + (f64::from(*value) - f64::from(*clean)) * scale).clamp(0.0, 255.0) as u8;
    }
    change
}

fn png(picture: &RgbImage) -> Result<Vec<u8>> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).map_err(candle_core::Error::wrap)?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_judged_by_whole_words() {
        assert_eq!(verdict("A red Car, on the sand.", "car"), Verdict::Original);
        assert_eq!(verdict("A bus.", "car"), Verdict::Other);
        assert_eq!(verdict("A cartoon.", "car"), Verdict::Neither);
        assert_eq!(verdict("A car or a bus.", "car"), Verdict::Both);
        assert_eq!(verdict("A stop sign.", "stop sign"), Verdict::Original);
        assert_eq!(verdict("A sign to stop.", "stop sign"), Verdict::Neither);
        assert_eq!(verdict("A pair of scissors.", "saw"), Verdict::Other);
    }

    #[test]
    fn the_change_is_shown_around_grey() {
        let clean = RgbImage::from_pixel(1, 1, image::Rgb([100, 100, 100]));
        let picture = RgbImage::from_pixel(1, 1, image::Rgb([108, 92, 100]));
        assert_eq!(magnified(&picture, &clean, Eps::of_255(8)).get_pixel(0, 0).0, [255, 1, 128]);
    }
}
