//! Small classifiers on small pictures, and what every attack on them must keep to.
#![allow(dead_code, reason = "each test file uses a part of this")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use candle_core::{D, Device, IndexOp, Tensor};
use image::RgbImage;
use radapt::Result;
use radapt::attack::{
    Attack, Classification, Classifier, CosineHead, Crafted, Eps, Outcome, Pictures, Progress, Subject,
    TowerClassifier, key,
};
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif};
use radapt::image::{Preprocess, pixels_from_rgb};
use radapt::model::{Lookup, Model};
use radapt::text::ZeroShotHead;
use radapt::tower::VisionTower;
use radapt::tower::clip::Clip;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::fixture::{Fixture, assert_same, clip, values};

pub fn eps(text: &str) -> Eps {
    text.parse().unwrap()
}

/// Uniform in [low, high].
pub fn random(shape: &[usize], seed: u64, low: f32, high: f32) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..=high)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// 8-bit pictures, some samples 0 and 255.
pub fn photos(batch: usize, height: usize, width: usize, seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let sample = |_| -> f32 { f32::from(rng.random_range(-40..=295i16).clamp(0, 255) as u8) / 255.0 };
    let samples: Vec<f32> = (0..batch * 3 * height * width).map(sample).collect();
    Tensor::from_vec(samples, (batch, 3, height, width), &Device::Cpu).unwrap()
}

pub fn pictures(pixels: &Tensor) -> Pictures {
    let n = pixels.dim(0).unwrap();
    Pictures::new(pixels, (0..n).map(|i| key(&format!("picture {i}"))).collect()).unwrap()
}

pub fn quiet(_: &Progress) {}

/// The largest |a - b| of picture `row`.
pub fn linf(a: &Tensor, b: &Tensor, row: usize) -> f64 {
    let [a, b] = [a, b].map(|x| values(&x.i(row).unwrap()));
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// |a - b| of picture `row`.
pub fn l2(a: &Tensor, b: &Tensor, row: usize) -> f64 {
    let [a, b] = [a, b].map(|x| values(&x.i(row).unwrap()));
    a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

/// logits = w2 tanh(w1 (x - 1/2) + b1) + b2, or w1 x + b1 without a second layer; every picture by
/// itself. It counts what is asked, and can be broken.
pub struct Toy {
    subject: Subject,
    first: (Tensor, Tensor),
    second: Option<(Tensor, Tensor)>,
    /// Gradients at these entries of every picture are this.
    pub broken: Vec<(usize, f32)>,
    /// The logit of this class is NaN wherever the first sample is above the number.
    pub nan_logit: Option<(usize, f32)>,
    /// Panic where a gradient is asked for.
    pub forward_only: bool,
    /// Pictures given to `logits`, and to `logits_and_gradients`.
    pub forwards: AtomicUsize,
    pub backwards: AtomicUsize,
    /// All pixels a gradient was asked at, `(1, 3, H, W)` each.
    pub seen: Mutex<Vec<Tensor>>,
}

impl Toy {
    fn new(first: (Tensor, Tensor), second: Option<(Tensor, Tensor)>) -> Self {
        Self {
            subject: Subject::undefended("toy"),
            first,
            second,
            broken: Vec::new(),
            nan_logit: None,
            forward_only: false,
            forwards: AtomicUsize::new(0),
            backwards: AtomicUsize::new(0),
            seen: Mutex::new(Vec::new()),
        }
    }

    /// Weights `(K, entries)` and biases.
    pub fn affine(weights: Tensor, bias: Tensor) -> Self {
        Self::new((weights, bias), None)
    }

    /// Random weights for pictures of `entries` entries.
    pub fn linear(classes: usize, entries: usize, seed: u64) -> Self {
        Self::affine(random(&[classes, entries], seed, -1.0, 1.0), random(&[classes], seed + 1, -0.1, 0.1))
    }

    pub fn mlp(classes: usize, entries: usize, seed: u64) -> Self {
        let first = (random(&[24, entries], seed, -0.3, 0.3), random(&[24], seed + 1, -0.3, 0.3));
        let second = (random(&[classes, 24], seed + 2, -2.0, 2.0), random(&[classes], seed + 3, -0.3, 0.3));
        Self::new(first, Some(second))
    }

    /// The network of `tests/fixtures/minimal_norm`.
    pub fn of_fixture(fixture: &Fixture) -> Self {
        let [w1, b1, w2, b2] = ["w1", "b1", "w2", "b2"].map(|name| fixture.tensor(name));
        Self::new((w1, b1), Some((w2, b2)))
    }

    /// The weights of a linear one, `(K, entries)`.
    pub fn weights(&self) -> &Tensor {
        &self.first.0
    }

    pub fn labels(&self, pixels: &Tensor) -> Vec<usize> {
        let n = pixels.dim(0).unwrap();
        let labels = Classification::new(self, vec![0; n]).unwrap().predictions(pixels).unwrap();
        self.forwards.store(0, Ordering::Relaxed);
        labels
    }

    /// The hidden layer `(B, 24)`, or the logits of a linear one.
    fn hidden(&self, pixels: &Tensor) -> Result<Tensor> {
        let x = pixels.flatten_from(1)?;
        let x = if self.second.is_some() { (x - 0.5)? } else { x };
        let h = affine(&x, &self.first)?;
        Ok(if self.second.is_some() { h.tanh()? } else { h })
    }
}

/// W x + b, each picture's numbers added up in the same order whatever the batch.
fn affine(x: &Tensor, (weights, bias): &(Tensor, Tensor)) -> Result<Tensor> {
    let each = x.unsqueeze(1)?.broadcast_mul(&weights.unsqueeze(0)?)?.sum(D::Minus1)?;
    Ok(each.broadcast_add(bias)?)
}

/// W^T c.
fn back(c: &Tensor, weights: &Tensor) -> Result<Tensor> {
    Ok(c.unsqueeze(2)?.broadcast_mul(&weights.unsqueeze(0)?)?.sum(1)?)
}

impl Classifier for Toy {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn classes(&self) -> usize {
        self.second.as_ref().unwrap_or(&self.first).0.dim(0).unwrap()
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        self.forwards.fetch_add(pixels.dim(0)?, Ordering::Relaxed);
        let hidden = self.hidden(pixels)?;
        let logits = self.second.as_ref().map_or(Ok(hidden.clone()), |second| affine(&hidden, second))?;
        let Some((class, above)) = self.nan_logit else { return Ok(logits) };
        let mut rows = logits.to_vec2::<f32>()?;
        for (z, x) in rows.iter_mut().zip(pixels.flatten_from(1)?.to_vec2::<f32>()?) {
            z[class] = if x[0] > above { f32::NAN } else { z[class] };
        }
        Ok(Tensor::new(rows, &Device::Cpu)?)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        assert!(!self.forward_only, "no gradient is to be asked for");
        let logits = self.logits(pixels)?;
        self.forwards.fetch_sub(pixels.dim(0)?, Ordering::Relaxed);
        for row in 0..pixels.dim(0)? {
            self.seen.lock().unwrap().push(pixels.narrow(0, row, 1)?.force_contiguous()?);
        }
        let hidden = self.hidden(pixels)?;
        let gradient = |c: &Tensor| -> Result<Tensor> {
            self.backwards.fetch_add(pixels.dim(0)?, Ordering::Relaxed);
            let c = match &self.second {
                Some((weights, _)) => (back(c, weights)? * (1.0 - hidden.sqr()?)?)?,
                None => c.clone(),
            };
            let mut g = back(&c, &self.first.0)?.to_vec2::<f32>()?;
            for (at, value) in &self.broken {
                g.iter_mut().for_each(|g| g[*at] = *value);
            }
            Ok(Tensor::new(g, &Device::Cpu)?.reshape(pixels.shape())?)
        };
        let gradients = cotangents(&logits)?.iter().map(gradient).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

/// `attack` on all of `pixels`.
pub fn craft(
    attack: &dyn Attack,
    model: &dyn Classifier,
    labels: &[usize],
    pixels: &Tensor,
    seed: u64,
) -> Crafted {
    let task = Classification::new(model, labels.to_vec()).unwrap();
    attack.craft(&task, &pictures(pixels), seed, &mut quiet).unwrap()
}

/// The laws of every attack: in the box, and in the ball where there is one; same seed, same
/// bytes; a picture alone fares as in a batch; wrong pictures and those not chosen are returned
/// as they are; what is said to be fooled is wrong, and what is not is right.
pub fn assert_lawful(
    attack: &dyn Attack,
    model: &dyn Classifier,
    pixels: &Tensor,
    labels: &[usize],
) -> Crafted {
    let name = attack.name();
    let n = labels.len();
    let all: Vec<usize> = (0..n).collect();
    let task = Classification::new(model, labels.to_vec()).unwrap();
    let clean = task.correct(pixels, &all).unwrap();
    let crafted = craft(attack, model, labels, pixels, 5);
    assert!(values(crafted.pixels()).iter().all(|v| (0.0..=1.0).contains(v)), "{name}");
    let right = task.correct(crafted.pixels(), &all).unwrap();
    for (row, outcome) in crafted.outcomes().iter().enumerate() {
        if let Some(eps) = crafted.recipe().eps {
            assert!(linf(crafted.pixels(), pixels, row) <= eps.value() + 1e-6, "{name} {row}");
        }
        assert_eq!(outcome.fooled, Some(!right[row]), "{name} {row}");
        assert_eq!(outcome.attacked, clean[row], "{name} {row}");
        if !clean[row] {
            let [found, was] = [crafted.pixels(), pixels].map(|x| x.i(row).unwrap());
            assert_same("wrong already", &found, &was);
            assert_eq!((outcome.gradients, outcome.queries), (0, None), "{name} {row}");
        }
    }
    let again = craft(attack, model, labels, pixels, 5);
    assert_same("same seed", again.pixels(), crafted.pixels());
    // By their words: a loss that is no number equals nothing.
    assert_eq!(format!("{:?}", again.outcomes()), format!("{:?}", crafted.outcomes()), "{name}");
    let keys = pictures(pixels).keys().to_vec();
    for row in 0..n {
        let task = Classification::new(model, vec![labels[row]]).unwrap();
        let alone = Pictures::new(&pixels.narrow(0, row, 1).unwrap(), vec![keys[row]]).unwrap();
        let alone = attack.craft(&task, &alone, 5, &mut quiet).unwrap();
        assert_same(
            &format!("{name} {row} alone"),
            alone.pixels(),
            &crafted.pixels().narrow(0, row, 1).unwrap(),
        );
        let [alone, together] = [&alone.outcomes()[0], &crafted.outcomes()[row]].map(|o| format!("{o:?}"));
        assert_eq!(alone, together, "{name} {row} alone");
    }
    let chosen: Vec<bool> = all.iter().map(|row| row % 2 == 0).collect();
    let some = attack.craft(&task, &pictures(pixels).only(chosen.clone()).unwrap(), 5, &mut quiet).unwrap();
    for row in all {
        let want = if chosen[row] { crafted.pixels() } else { pixels };
        assert_same("chosen or not", &some.pixels().i(row).unwrap(), &want.i(row).unwrap());
        if !chosen[row] {
            assert_eq!(some.outcomes()[row], Outcome::default());
        }
    }
    let none = attack.craft(&task, &pictures(pixels).only(vec![false; n]).unwrap(), 5, &mut quiet).unwrap();
    assert_same("none", none.pixels(), pixels);
    let few = pictures(pixels).only(vec![true; n]).unwrap();
    let error = Classification::new(model, vec![0; n + 1]).unwrap();
    assert!(attack.craft(&error, &few, 5, &mut quiet).is_err(), "{name}: more labels than pictures");
    crafted
}

/// Steps only go up to their number, and fooled pictures do not come back.
pub fn assert_progress(attack: &dyn Attack, model: &Toy, pixels: &Tensor, labels: &[usize]) {
    let mut seen = Vec::new();
    let task = Classification::new(model, labels.to_vec()).unwrap();
    attack.craft(&task, &pictures(pixels), 5, &mut |p| seen.push(p.clone())).unwrap();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|p| p.step <= p.steps && p.steps == seen[0].steps && p.active <= labels.len()));
    assert!(seen.windows(2).all(|p| p[0].step < p[1].step && p[0].fooled <= p[1].fooled), "{seen:?}");
    assert!(seen.iter().all(|p| p.fooled.is_some_and(|fooled| fooled <= labels.len())));
}

// --- a tiny CLIP, defended ----------------------------------------------------------------------

/// The tiny CLIP of the fixtures, for pictures of 20 x 20 and 6 classes, as it is and with GIF and
/// FRA.
pub fn tiny_clips() -> [TowerClassifier<Clip, CosineHead>; 2] {
    let tower = clip("v4");
    let gif = Gif::new(20, 20, 6.0, &Device::Cpu).unwrap();
    let fra = Fra::new(&training_free(&tower).unwrap(), 1.2, -0.8, &Device::Cpu).unwrap();
    let defense = Defense { gif: Some(Arc::new(gif)), fra: Some(Arc::new(fra)), ..Default::default() };
    let subject = Subject::new("tiny", &defense).unwrap();
    let weights = random(&[6, tower.spec().projection.unwrap()], 30, -1.0, 1.0);
    let head = CosineHead::new(&weights, 20.0).unwrap();
    let defended = tower.clone().with(defense.inserts());
    [(tower, Subject::undefended("tiny")), (defended, subject)]
        .map(|(tower, subject)| TowerClassifier::new(tower, head.clone(), subject).unwrap())
}

/// The laws of every attack on the tiny CLIP, with and without its defence; one of 3 pictures is
/// wrong already. How many of the other two are fooled, of 4.
pub fn assert_lawful_on_a_clip(attack: &dyn Attack) -> usize {
    let pixels = photos(3, 20, 20, 41);
    let fooled = |classifier: TowerClassifier<Clip, CosineHead>| {
        let task = Classification::new(&classifier, vec![0; 3]).unwrap();
        let mut labels = task.predictions(&pixels).unwrap();
        labels[1] = (labels[1] + 1) % 6;
        let crafted = assert_lawful(attack, &classifier, &pixels, &labels);
        crafted.outcomes().iter().filter(|outcome| outcome.attacked && outcome.fooled == Some(true)).count()
    };
    tiny_clips().map(fooled).iter().sum()
}

// --- a trained model ----------------------------------------------------------------------------

/// The small trained CLIP and photos of CIFAR-10 beside the repository, where they are.
pub struct Trained {
    pub classifier: TowerClassifier<Clip, ZeroShotHead>,
    /// `(n, 3, 48, 48)`, as the model's preprocessing makes them.
    pub pixels: Tensor,
    /// `(n, 3, 32, 32)`, as they are.
    pub native: Tensor,
    pub preprocess: Preprocess,
    pub labels: Vec<usize>,
}

fn shared() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("shared");
    let there = folder.join("models/cifar-clip/config.json").is_file()
        && folder.join("data/cifar10/test_batch.bin").is_file();
    if !there {
        eprintln!("SKIPPED: {} has no models/cifar-clip and data/cifar10", folder.display());
    }
    there.then_some(folder)
}

/// With the first `n` photos of the test set; `None`, and a line, where there are none.
pub fn trained(n: usize) -> Option<Trained> {
    let shared = shared()?;
    let folder = shared.join("models/cifar-clip");
    let model = Model::find(folder.to_str().expect("a name"), &Lookup::default()).unwrap();
    let preprocess = model.preprocess(None).unwrap();
    let tower = model.tower(&preprocess, None, &Device::Cpu).unwrap();
    let names = std::fs::read_to_string(shared.join("data/cifar10/batches.meta.txt")).unwrap();
    let names: Vec<&str> = names.lines().filter(|name| !name.is_empty()).collect();
    let head =
        ZeroShotHead::new(&model.text(&Device::Cpu).unwrap(), &names, &["a photo of a {class}."]).unwrap();
    let bytes = std::fs::read(shared.join("data/cifar10/test_batch.bin")).unwrap();
    let (mut photos, mut labels) = (Vec::new(), Vec::new());
    for photo in bytes.chunks_exact(3073).take(n) {
        labels.push(usize::from(photo[0]));
        photos.push(RgbImage::from_fn(32, 32, |x, y| {
            let at = 1 + (y * 32 + x) as usize;
            image::Rgb([photo[at], photo[1024 + at], photo[2048 + at]])
        }));
    }
    let pixels = preprocess.batch(&photos, &Device::Cpu).unwrap();
    let classifier = TowerClassifier::new(tower, head, Subject::undefended("cifar-clip")).unwrap();
    let native = photos.iter().map(|photo| pixels_from_rgb(photo, &Device::Cpu).unwrap());
    let native = Tensor::stack(&native.collect::<Vec<_>>(), 0).unwrap();
    Some(Trained { classifier, pixels, native, preprocess, labels })
}

impl Trained {
    pub fn task(&self) -> Classification<'_> {
        Classification::new(&self.classifier, self.labels.clone()).unwrap()
    }

    pub fn pictures(&self) -> Pictures {
        let keys = (0..self.labels.len()).map(|i| key(&format!("test/{i}"))).collect();
        Pictures::new(&self.pixels, keys).unwrap()
    }
}

pub fn count(all: &[bool]) -> usize {
    all.iter().filter(|one| **one).count()
}
