use std::time::Instant;

use candle_core::{Device, Tensor};
use futures::StreamExt;
use image::{ImageFormat, RgbImage};

use super::report::{Answer, Picture, Report, Row, Version};
use crate::attack::vattack::{Crop, Surrogate, VAttack};
use crate::attack::{Crafted, Eps, Pictures, Subject, Threat};
use crate::defense::DefenseOptions;
use crate::engine::{Engine, EngineOptions, Sampling, Turn};
use crate::eval::judge::{Case, Verdict, WordJudge};
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
    /// The CLIP that pictures are crafted on: the LLaVA's own, so that what is put in fits both.
    pub surrogate: Model,
    /// The defence to compare the undefended model with.
    pub defense: DefenseOptions,
    /// How many held-out pictures.
    pub pictures: usize,
    /// The largest change of a pixel.
    pub eps: Eps,
    /// The attack's steps.
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
    /// The attack is V-Attack towards each scene's target, on the surrogate: once undefended
    /// (`transfer`) and once with the defence put in (`adaptive`). The language model is never
    /// attacked itself. Adversarial pictures are rounded to 8 bits before anybody is asked.
    ///
    /// # Errors
    /// If a model cannot be loaded, they are no LLaVA and its CLIP, nothing is put in by the
    /// defence, or `pictures` or the steps are 0.
    pub async fn run(&self, told: &mut dyn FnMut(Stage)) -> Result<Report> {
        let start = Instant::now();
        if self.pictures == 0 {
            return Err(Error::argument("--pictures", "at least 1", 0));
        }
        if self.steps == 0 {
            return Err(Error::argument("--steps", "at least 1", 0));
        }
        for (model, kind, words) in [
            (&self.model, ModelKind::Llava, "is no LLaVA-1.5, which the demo asks about its pictures"),
            (&self.surrogate, ModelKind::Clip, "is no CLIP, on which the demo crafts its pictures"),
        ] {
            if model.kind != kind {
                return Err(Error::Model { model: model.name.clone(), reason: words.into() });
            }
        }
        let asked = self.tower(&self.model)?;
        let size = asked.spec().image_size as u32;
        let defense = self.defense.build(&asked, || self.model.fingerprint())?;
        let subject = Subject::new(&self.model.name, &defense)?;
        if subject.is_undefended() {
            return Err(Error::argument("--anchor", "a defence to compare with", "none"));
        }
        let summary = defense.summary().map(|summary| summary.to_string()).unwrap_or_default();
        let short = match (&defense.gif, &defense.fra) {
            (Some(_), Some(_)) => "gif+fra",
            (Some(_), None) => "gif",
            _ => "fra",
        };
        let clip = self.tower(&self.surrogate)?;
        let crafted_on = {
            let defense = self.defense.build(&clip, || self.surrogate.fingerprint())?;
            let name = &self.surrogate.name;
            [
                (clip.clone(), Subject::undefended(name)),
                (clip.with(defense.inserts()), Subject::new(name, &defense)?),
            ]
        };
        if crafted_on[1].1.digest != subject.digest || clip.spec().image_size as u32 != size {
            let expected = format!("the CLIP of `{}`, which the same defence is put in", self.model.name);
            return Err(Error::argument("--surrogate", expected, &self.surrogate.name));
        }
        let scenes = (0..self.pictures as u64)
            .map(|index| draw(Split::Test, self.seed, index, size))
            .collect::<Result<Vec<_>>>()?;
        let pixels = self.pixels(&scenes)?;

        let text = self.surrogate.text(&Device::Cpu)?;
        let words: Vec<(String, String)> =
            scenes.iter().map(|scene| (scene.name().into(), target(scene).into())).collect();
        let attack = self.attack();
        let crafting = 2 * self.steps as u64;
        let mut done = 0;
        let mut craft = |(tower, subject): (Clip, Subject)| -> Result<Crafted> {
            let surrogate = Surrogate::of_words(tower, subject, 1.0, &text, &words)?;
            let pictures = Pictures::new(&pixels, (0..self.pictures as u64).collect())?;
            let made = attack.craft(&[surrogate], &pictures, self.seed, &mut |progress| {
                told(Stage { name: "crafting", done: done + progress.step as u64, all: crafting });
            })?;
            done += self.steps as u64;
            made.crafted.quantised(&pixels)
        };
        // To the undefended LLaVA its CLIP is a surrogate. To the defended one, what was crafted on
        // the CLIP through that very defence is adaptive.
        let own = Threat::Transfer { surrogate: crafted_on[0].1.to_string() };
        let threats = [own.clone(), Threat::Adaptive];
        let [plain, defended] = crafted_on;
        let (transfer, adaptive) = (craft(plain)?, craft(defended)?);

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
                target: target(scene).into(),
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
                "V-Attack, {} steps on the values of the last {} blocks of {}",
                attack.steps, attack.blocks, self.surrogate.name
            ),
            eps: self.eps.to_string(),
            seed: self.seed,
            command: self.command.clone(),
            rows,
            pictures: shown,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The strongest setting found on the pocket models: the paper's form on whole pictures, on
    /// several blocks and with momentum.
    fn attack(&self) -> VAttack {
        VAttack {
            steps: self.steps,
            alpha: (4.0 * self.eps.value() / self.steps as f64).max(1.0 / 255.0),
            blocks: 4,
            momentum: 0.9,
            crop: Crop::Whole,
            ..VAttack::paper(self.eps)
        }
    }

    fn tower(&self, model: &Model) -> Result<Clip> {
        model.tower(&model.preprocess(None)?, None, &Device::Cpu)
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
        let target = after.iter().filter(|verdict| **verdict == Verdict::Target).count();
        let (low, high) = wilson(correct, after.len());
        Row {
            task,
            defense: defense.into(),
            attack: threat.map(|_| "v-attack".into()),
            eps: threat.map(|_| self.eps.to_string()),
            threat: threat.cloned(),
            n: after.len(),
            correct,
            target,
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
    let judge = WordJudge::new()?;
    let answer = async |(scene, picture, question): (&Scene, &RgbImage, &str)| -> Result<Answer> {
        let turn = Turn::of_pictures(question, vec![picture.clone()]);
        let answer = engine.answer(&[turn], &sampling).await?.text.trim().to_string();
        let verdict = judge.verdict(&Case {
            question: Some(question.into()),
            ..Case::new(&*answer, scene.name(), target(scene))
        });
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

/// What an attacker wants the scene to be taken for.
fn target(scene: &Scene) -> &'static str {
    KINDS[scene.target].name
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
    fn the_change_is_shown_around_grey() {
        let clean = RgbImage::from_pixel(1, 1, image::Rgb([100, 100, 100]));
        let picture = RgbImage::from_pixel(1, 1, image::Rgb([108, 92, 100]));
        assert_eq!(magnified(&picture, &clean, Eps::of_255(8)).get_pixel(0, 0).0, [255, 1, 128]);
    }
}
