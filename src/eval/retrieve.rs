//! Image-text retrieval, clean and attacked (the paper's Table 4): recall at 1, 5 and 10 in both
//! directions.
//!
//! A picture is attacked by driving its embedding away from those of its own captions. Under attack
//! every picture of the gallery is an adversarial one. As elsewhere here, an item counts under attack
//! if it is found with the clean pictures and with the attacked ones, so that a robust figure is never
//! above its clean one.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::run::{Line, Run, shard_size, write_whole};
pub use super::vattack::Source;
use super::{Attacked, Precision, Row, Summary};
use crate::attack::{
    Direction, Eps, Feature, FeatureObjective, Maximise, Pgd, Pictures, Settings, Subject, Threat,
    ThreatKind, key, with_settings,
};
use crate::data::captioned::CaptionedSet;
use crate::image::{DecodeLimits, Preprocess, pixels_from_rgb};
use crate::tower::VisionTower;
use crate::tower::clip::Clip;
use crate::{Error, Result};

/// A model that is scored.
pub struct Embedder {
    /// Its defence's name in figures.
    pub defense: String,
    /// The tower with it, in f32.
    pub exact: Clip,
    /// The same in the precision pictures are crafted in.
    pub craft: Clip,
    /// Who it is.
    pub subject: Subject,
}

/// A retrieval over a set.
pub struct RetrieveRun<'a> {
    /// The pictures' names and captions.
    pub set: &'a CaptionedSet,
    /// The pictures.
    pub source: Source,
    /// Limits on picture files.
    pub limits: DecodeLimits,
    /// From a picture file to the tower's pixels.
    pub preprocess: &'a Preprocess,
    /// The models; transfer pictures are crafted on `surrogate`.
    pub models: Vec<Embedder>,
    /// The undefended model.
    pub surrogate: Embedder,
    /// Embeddings of all captions `(M, P)` f32, picture by picture, of length 1.
    pub texts: Tensor,
    /// Radii; none for clean figures alone.
    pub eps: Vec<Eps>,
    /// The threat models.
    pub threats: Vec<ThreatKind>,
    /// What is changed of PGD.
    pub settings: Settings,
    /// Of the random starts.
    pub seed: u64,
    /// Pictures worked on together: what a kill loses.
    pub batch: usize,
}

/// A picture's line: its embeddings, from which every figure follows together with the captions'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrieveLine {
    /// Its place in the set.
    pub index: usize,
    /// Its name.
    pub id: String,
    /// Why it has no embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of the clean and of the attacked pictures.
    #[serde(default)]
    pub embeddings: Vec<Embedding>,
}

/// What a model makes of a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// The model's defence.
    pub defense: String,
    /// The radius; `None` for the clean picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eps: Option<Eps>,
    /// The threat model; `None` for the clean picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threat: Option<Threat>,
    /// Little-endian f32 in base64, not normalised.
    pub values: String,
}

impl Line for RetrieveLine {
    fn index(&self) -> usize {
        self.index
    }

    fn id(&self) -> &str {
        &self.id
    }
}

const ATTACK: &str = "pgd";
/// The captions' embeddings in a run's folder.
const CAPTIONS: &str = "captions.safetensors";
/// Ranks that count.
const AT: [usize; 3] = [1, 5, 10];

/// Rows of length 1.
///
/// # Errors
/// If the device fails.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    let lengths = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(x.broadcast_div(&lengths.maximum(f32::MIN_POSITIVE as f64)?)?)
}

impl RetrieveRun<'_> {
    /// What decides the result; `more` are the caller's own entries, such as the model's weights.
    pub fn decides(&self, more: Value) -> Value {
        let p = self.preprocess;
        let all: Vec<Value> = self
            .set
            .pictures()
            .iter()
            .enumerate()
            .map(|(i, picture)| json!([picture.name, picture.captions, self.source.has(i)]))
            .collect();
        let digest = Sha256::digest(Value::from(all).to_string());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut decides = json!({
            "task": "retrieve",
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.seed,
            "dataset": { "name": self.set.name(), "items": self.set.pictures().len(), "digest": digest },
            "preprocess": {
                "contract": p.contract.to_string(),
                "width": p.width,
                "height": p.height,
                "resize": format!("{:?}, {:?}", p.scale, p.filter),
            },
            "defenses": self.models.iter()
                .map(|model| json!({ "name": model.defense, "subject": model.subject }))
                .collect::<Vec<_>>(),
            "attack": ATTACK,
            "eps": self.eps,
            "settings": self.settings,
            "threats": self.threats,
            "pictures": Precision::Float,
        });
        if let (Some(all), Value::Object(more)) = (decides.as_object_mut(), more) {
            all.extend(more);
        }
        decides
    }

    /// Does what of the run is not done yet, and writes its summary. `told` is given the pictures done.
    ///
    /// # Errors
    /// If a model fails, or the run's folder cannot be written. A picture that cannot be read is an
    /// item that failed; neither it nor its captions are in the figures.
    pub fn run(&self, run: &mut Run<RetrieveLine>, told: &mut dyn FnMut(usize, usize)) -> Result<Summary> {
        let captions: usize = self.set.pictures().iter().map(|picture| picture.captions.len()).sum();
        if self.texts.dim(0)? != captions {
            return Err(Error::argument("texts", format!("{captions} rows"), self.texts.dim(0)?));
        }
        self.keep_captions(run.folder())?;
        run.work(self.names(), self.batch, |part, run| {
            told(run.done(), run.manifest().items);
            self.lines(part)
        })?;
        told(run.done(), run.manifest().items);
        summarise(run)
    }

    /// The number of items in a shard, or in the whole run.
    pub fn items(&self, shard: Option<(usize, usize)>) -> usize {
        shard_size(shard, self.names())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.set.pictures().iter().map(|picture| picture.name.as_str())
    }

    /// Writes the captions' embeddings beside the lines, so that the figures need no model.
    fn keep_captions(&self, folder: &Path) -> Result<()> {
        let path = folder.join(CAPTIONS);
        if path.exists() {
            return Ok(());
        }
        let counts: Vec<u32> = self.set.pictures().iter().map(|p| p.captions.len() as u32).collect();
        let counts = Tensor::from_vec(counts, self.set.pictures().len(), &Device::Cpu)?;
        let texts = self.texts.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let all = HashMap::from([("texts", texts), ("captions", counts)]);
        let beside = folder.join(format!("{CAPTIONS}.part"));
        candle_core::safetensors::save(&all, &beside)?;
        std::fs::rename(&beside, &path).map_err(|e| Error::write(&path, e))
    }

    fn places(&self) -> Vec<Range<usize>> {
        places(self.set.pictures().iter().map(|picture| picture.captions.len()))
    }

    fn lines(&self, part: &[usize]) -> Result<Vec<RetrieveLine>> {
        let read = |&index: &usize| {
            let name = &self.set.pictures()[index].name;
            let picture = self.source.picture(index, name, &self.limits);
            picture.map(|picture| self.preprocess.prepare(&picture)).map_err(|e| e.to_string())
        };
        let found: Vec<_> = part.par_iter().map(read).collect();
        let mut lines: Vec<RetrieveLine> = part
            .iter()
            .zip(&found)
            .map(|(&index, picture)| RetrieveLine {
                index,
                id: self.set.pictures()[index].name.clone(),
                error: picture.as_ref().err().cloned(),
                embeddings: Vec::new(),
            })
            .collect();
        let good: Vec<usize> = (0..part.len()).filter(|&i| found[i].is_ok()).collect();
        if good.is_empty() {
            return Ok(lines);
        }
        let device = self.surrogate.exact.device();
        let pixels = found.iter().filter_map(|picture| picture.as_ref().ok());
        let pixels = pixels.map(|picture| pixels_from_rgb(picture, device)).collect::<Result<Vec<_>>>()?;
        let clean = Tensor::stack(&pixels, 0)?;
        for model in &self.models {
            push(&mut lines, &good, model, None, &embeds(&model.exact, &clean)?)?;
        }
        if self.eps.is_empty() {
            return Ok(lines);
        }
        // The mean of a picture's captions: the sum of the cosines with them has its direction.
        let places = self.places();
        let own = good.iter().map(|&i| {
            let place = &places[part[i]];
            self.texts.narrow(0, place.start, place.len())?.mean_keepdim(0)
        });
        let own = Tensor::cat(&own.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let pictures = Pictures::new(&clean, good.iter().map(|&i| key(&lines[i].id)).collect())?;
        for &eps in &self.eps {
            let pgd = with_settings(Pgd::new(eps), &self.settings);
            let craft = |on: &Embedder| -> Result<Tensor> {
                let away = FeatureObjective::new(
                    &on.craft,
                    on.subject.clone(),
                    Feature::Embeds,
                    Direction::Away,
                    &own,
                )?;
                Ok(pgd.maximise(&away, &pictures, self.seed, &mut |_| {})?.pixels().clone())
            };
            let transfer = match self.threats.contains(&ThreatKind::Transfer)
                || self.models.iter().any(|model| model.subject.is_undefended())
            {
                true => Some(craft(&self.surrogate)?),
                false => None,
            };
            for &kind in &self.threats {
                for model in &self.models {
                    // On the undefended model both kinds are one.
                    let made = match &transfer {
                        Some(made) if kind == ThreatKind::Transfer || model.subject.is_undefended() => {
                            made.clone()
                        }
                        _ => craft(model)?,
                    };
                    let on = kind.crafts_on(&self.surrogate.subject, &model.subject);
                    let threat = kind.threat(on, &model.subject)?;
                    push(&mut lines, &good, model, Some((eps, threat)), &embeds(&model.exact, &made)?)?;
                }
            }
        }
        Ok(lines)
    }
}

/// Where each picture's captions are among all.
fn places(counts: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut start = 0;
    let place = |n: usize| {
        start += n;
        start - n..start
    };
    counts.map(place).collect()
}

/// What a run comes to, from its lines, its captions' embeddings and its manifest alone; written as its
/// `summary.json`.
///
/// # Errors
/// If a line or the embeddings are damaged, or the summary cannot be written.
pub fn summarise(run: &Run<RetrieveLine>) -> Result<Summary> {
    let path = run.folder().join(CAPTIONS);
    if !path.is_file() {
        return Err(Error::read(path, std::io::ErrorKind::NotFound.into()));
    }
    let mut kept = candle_core::safetensors::load(&path, &Device::Cpu)
        .map_err(|e| Error::config(&path, e.to_string()))?;
    let mut taken = |name: &str| {
        kept.remove(name)
            .ok_or_else(|| Error::config(&path, format!("expected a tensor `{name}`, found none")))
    };
    let (texts, counts) = (taken("texts")?, taken("captions")?);
    let counts = counts.to_vec1::<u32>().map_err(|e| Error::config(&path, e.to_string()))?;
    let mut all: Vec<RetrieveLine> = run.lines()?.collect::<Result<_>>()?;
    all.sort_by_key(|line| line.index);
    let manifest = run.manifest();
    let dataset = manifest.decides.pointer("/dataset/name").and_then(Value::as_str).unwrap_or_default();
    let summary = Summary {
        schema_version: Summary::VERSION,
        fingerprint: manifest.fingerprint.clone(),
        run: manifest.decides.clone(),
        shard: manifest.shard,
        items: manifest.items,
        done: all.len(),
        failed: all.iter().filter(|line| line.error.is_some()).count(),
        rows: figures(dataset, &all, &texts, &places(counts.into_iter().map(|n| n as usize)))?,
        flags: match manifest.shard {
            Some((i, n)) => vec![format!("shard {i}/{n}: found among the shard's own pictures and captions")],
            None => Vec::new(),
        },
    };
    write_whole(&run.folder().join("summary.json"), &summary)?;
    Ok(summary)
}

fn embeds(tower: &Clip, pixels: &Tensor) -> Result<Tensor> {
    let (batch, at_once) = (pixels.dim(0)?, tower.batch().max(1));
    let parts = (0..batch)
        .step_by(at_once)
        .map(|start| Feature::Embeds.of(tower, &pixels.narrow(0, start, at_once.min(batch - start))?))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?.squeeze(1)?)
}

fn push(
    lines: &mut [RetrieveLine],
    good: &[usize],
    model: &Embedder,
    attacked: Option<(Eps, Threat)>,
    values: &Tensor,
) -> Result<()> {
    let rows = values.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
    for (&i, row) in good.iter().zip(rows) {
        let bytes: Vec<u8> = row.into_iter().flat_map(f32::to_le_bytes).collect();
        lines[i].embeddings.push(Embedding {
            defense: model.defense.clone(),
            eps: attacked.as_ref().map(|(eps, _)| *eps),
            threat: attacked.as_ref().map(|(_, threat)| threat.clone()),
            values: STANDARD.encode(bytes),
        });
    }
    Ok(())
}

type Kind<'a> = (&'a str, Option<Eps>, Option<&'a Threat>);

fn kind(found: &Embedding) -> Kind<'_> {
    (&found.defense, found.eps, found.threat.as_ref())
}

/// Every figure of a run, from its lines and the captions' embeddings `(M, P)`; `places` has where each
/// picture's captions are among them.
///
/// # Errors
/// If an embedding is damaged or of another width.
pub fn figures(
    dataset: &str,
    all: &[RetrieveLine],
    texts: &Tensor,
    places: &[Range<usize>],
) -> Result<Vec<Row>> {
    let good: Vec<&RetrieveLine> = all.iter().filter(|line| line.error.is_none()).collect();
    let Some(first) = good.first() else { return Ok(Vec::new()) };
    let mut kinds: Vec<Kind> = first.embeddings.iter().map(kind).collect();
    kinds.sort_by_key(|(_, eps, _)| eps.is_some());
    let texts = texts.to_device(&Device::Cpu)?;
    let own = good.iter().map(|line| {
        let expected = || format!("pictures 0 to {}", places.len().saturating_sub(1));
        places.get(line.index).cloned().ok_or_else(|| Error::argument("items.jsonl", expected(), line.index))
    });
    let own: Vec<Range<usize>> = own.collect::<Result<_>>()?;
    let captions: Vec<u32> = own.iter().flat_map(|place| place.clone().map(|at| at as u32)).collect();
    let n = captions.len();
    let texts = texts.index_select(&Tensor::from_vec(captions, n, &Device::Cpu)?, 0)?;
    let mut hits: Vec<(Kind, [Vec<usize>; 2])> = Vec::new();
    for kind_wanted in kinds {
        let rows = good.iter().map(|line| {
            let damaged = || Error::argument("items.jsonl", "the embeddings of every model", &line.id);
            let found = line.embeddings.iter().find(|e| kind(e) == kind_wanted).ok_or_else(damaged)?;
            let bytes = STANDARD.decode(&found.values).map_err(|_| damaged())?;
            Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        });
        let rows: Vec<Vec<f32>> = rows.collect::<Result<_>>()?;
        let pictures = unit_rows(&Tensor::new(rows, &Device::Cpu)?)?;
        // (captions, pictures)
        let cosines = texts.matmul(&pictures.t()?)?.to_vec2::<f32>()?;
        let mut start = 0;
        let owner: Vec<usize> =
            own.iter().enumerate().flat_map(|(i, place)| std::iter::repeat_n(i, place.len())).collect();
        // How many others are at least as near: ties count against.
        let to_text = own.iter().enumerate().map(|(i, place)| {
            let mine = start..start + place.len();
            start += place.len();
            let best = mine.clone().map(|t| cosines[t][i]).fold(f32::NEG_INFINITY, f32::max);
            (0..n).filter(|t| !mine.contains(t) && cosines[*t][i] >= best).count()
        });
        let to_text = to_text.collect();
        let to_image = owner
            .iter()
            .enumerate()
            .map(|(t, &i)| (0..own.len()).filter(|&j| j != i && cosines[t][j] >= cosines[t][i]).count());
        hits.push((kind_wanted, [to_text, to_image.collect()]));
    }
    let mut rows = Vec::new();
    for ((defense, eps, threat), ranks) in &hits {
        let clean = hits.iter().find(|((other, eps, _), _)| other == defense && eps.is_none());
        for (direction, (name, ranks)) in ["image-to-text", "text-to-image"].iter().zip(ranks).enumerate() {
            for k in AT {
                let held =
                    |i: usize| eps.is_none() || clean.is_some_and(|(_, clean)| clean[direction][i] < k);
                let correct = ranks.iter().enumerate().filter(|(i, rank)| **rank < k && held(*i)).count();
                rows.push(Row {
                    task: format!("{name} R@{k}"),
                    dataset: dataset.into(),
                    defense: (*defense).into(),
                    attacked: eps.zip(threat.as_ref()).map(|(eps, threat)| Attacked {
                        attack: ATTACK.into(),
                        eps: Some(eps),
                        threat: (*threat).clone(),
                        pictures: Precision::Float,
                    }),
                    n: ranks.len(),
                    correct,
                    mean_per_class: None,
                });
            }
        }
    }
    Ok(rows)
}
