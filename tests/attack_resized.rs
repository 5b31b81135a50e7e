//! The resize inside a classifier: against torch, against the pictures that a file's preparation
//! makes, and as a linear map with its transpose.

mod fixture;
mod toy;

use candle_core::{Device, Tensor};
use fixture::{Fixture, assert_same, values};
use image::{Rgb, RgbImage};
use radapt::Result;
use radapt::attack::{Apgd, Classification, Classifier, Loss, Objective, Pgd, Resized, Subject};
use radapt::image::{Contract, Filter, Preprocess, Scale, pixels_from_rgb};
use toy::{Toy, assert_lawful, eps, photos, random, trained};

/// The pixels are the logits, so that the resize alone is seen.
struct Pixels {
    subject: Subject,
    classes: usize,
}

impl Pixels {
    fn new(preprocess: &Preprocess) -> Self {
        let classes = 3 * (preprocess.width * preprocess.height) as usize;
        Self { subject: Subject::undefended("pixels"), classes }
    }
}

impl Classifier for Pixels {
    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        Ok(pixels.flatten_from(1)?)
    }

    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let logits = self.logits(pixels)?;
        let back = |c: &Tensor| Ok(c.reshape(pixels.shape())?);
        let gradients = cotangents(&logits)?.iter().map(back).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

/// For pictures of the size of `pixels`.
fn resized(preprocess: &Preprocess, pixels: &Tensor) -> Resized<Pixels> {
    let (_, _, height, width) = pixels.dims4().unwrap();
    Resized::new(Pixels::new(preprocess), preprocess, height, width, &Device::Cpu).unwrap()
}

fn exact(contract: Contract, scale: Scale, width: u32, height: u32, filter: Filter) -> Preprocess {
    Preprocess { scale, width, height, filter, ..Preprocess::clip(width, contract) }
}

/// Ways to other shapes: larger, smaller, cropped, squashed, and on black.
fn ways() -> Vec<(Preprocess, usize, usize)> {
    let square = |width, height| Scale::Exact { width, height };
    vec![
        (Preprocess::clip(48, Contract::Clip), 32, 32),
        (Preprocess::clip(24, Contract::Clip), 60, 41),
        (Preprocess::clip(25, Contract::LlavaCrop), 30, 47),
        (Preprocess::clip(20, Contract::Squash), 13, 40),
        (Preprocess::clip(16, Contract::Clip), 16, 16),
        (exact(Contract::Clip, square(9, 14), 12, 20, Filter::Bilinear), 21, 17),
        (exact(Contract::Clip, square(15, 30), 20, 11, Filter::Bicubic), 21, 17),
    ]
}

/// Rough numbers in [0, 1], the same in the fixture's `make.py`.
fn pattern(seed: u64, shape: &[usize]) -> Tensor {
    let n = shape.iter().product::<usize>() as u64;
    let values: Vec<f32> =
        (0..n).map(|i| (((i * i * 31 + i * 17 * seed) % 251) as f64 / 250.0) as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
}

#[test]
fn it_is_torchs_bicubic_resize_with_antialias() {
    let fixture = Fixture::open("resize_inside/expected.safetensors");
    for (name, side, shape) in [
        ("small", 48, [2, 3, 32, 32]),
        ("wide", 48, [1, 3, 200, 300]),
        ("tall", 48, [1, 3, 90, 61]),
        ("squashed", 40, [1, 3, 50, 70]),
    ] {
        let contract = if name == "squashed" { Contract::Squash } else { Contract::Clip };
        let preprocess = Preprocess::clip(side, contract);
        let want = fixture.tensor(&format!("{name}.resized"));
        let pixels = pattern(5, &shape);
        let classifier = resized(&preprocess, &pixels);
        let cotangent = pattern(3, want.dims()).flatten_from(1).unwrap();
        let (logits, gradients) =
            classifier.logits_and_gradients(&pixels, &mut |_| Ok(vec![cotangent.clone()])).unwrap();
        assert_same("both ways", &logits, &classifier.logits(&pixels).unwrap());
        let close = |what: &str, found: &Tensor, want: &Tensor| {
            let off = |(a, b): (&f64, &f64)| (a - b).abs();
            let most = values(found).iter().zip(&values(want)).map(off).fold(0.0, f64::max);
            println!("{name}: {what} within {most:.1e} of torch's");
            assert!(most <= 1e-5, "{name} {what}: {most}");
        };
        close("resized", &logits, &want);
        if name != "wide" {
            close("gradient", &gradients[0], &fixture.tensor(&format!("{name}.gradient")));
        }
    }
}

#[test]
fn its_gradient_is_its_transpose() {
    for (preprocess, height, width) in ways() {
        let x = random(&[2, 3, height, width], 1, -1.0, 1.0);
        let classifier = resized(&preprocess, &x);
        let y = random(&[2, Classifier::classes(&classifier)], 2, -1.0, 1.0);
        let other = random(&[2, Classifier::classes(&classifier)], 3, -1.0, 1.0);
        let (rx, gradients) =
            classifier.logits_and_gradients(&x, &mut |_| Ok(vec![y.clone(), other.clone()])).unwrap();
        for (y, back) in [y, other].iter().zip(&gradients) {
            assert_eq!(back.dims(), x.dims());
            let (forth, back) = (dot(&rx, y), dot(&x, back));
            assert!((forth - back).abs() <= 1e-5 * forth.abs().max(1.0), "{forth} {back}");
        }
    }
}

#[test]
fn its_gradient_is_that_of_finite_differences() {
    let preprocess = Preprocess::clip(8, Contract::Clip);
    let pixels = random(&[1, 3, 11, 14], 4, 0.2, 0.8);
    let inner = Toy::mlp(5, 192, 5);
    let classifier = Resized::new(&inner, &preprocess, 11, 14, &Device::Cpu).unwrap();
    let task = Classification::new(&classifier, vec![2]).unwrap();
    let objective = task.objective(Loss::CrossEntropy).unwrap();
    let (_, gradient) = objective.values_and_gradient(&pixels, &[0]).unwrap();
    let most = values(&gradient).iter().fold(0.0, |most: f64, g| most.max(g.abs()));
    for seed in 0..20 {
        let way = random(&[1, 3, 11, 14], 10 + seed, -1.0, 1.0);
        let at = |h: f64| {
            let place = (&pixels + (&way * h).unwrap()).unwrap();
            objective.values(&place, &[0]).unwrap().loss[0]
        };
        let h = 4e-3;
        let slope = (at(h) - at(-h)) / (2.0 * h);
        assert!((slope - dot(&gradient, &way)).abs() < 5e-3 * most * 20.0, "{seed}: {slope}");
    }
}

#[test]
fn it_is_what_a_files_preparation_makes_of_a_smooth_picture() {
    for (preprocess, height, width) in ways() {
        let wave = |x: u32, y: u32, c: f32| {
            let (x, y) = (x as f32 / width as f32, y as f32 / height as f32);
            (127.0 + 60.0 * (3.0 * x + c).sin() + 50.0 * (2.0 * y - c).cos()).round() as u8
        };
        let photo = RgbImage::from_fn(width as u32, height as u32, |x, y| {
            Rgb([wave(x, y, 0.0), wave(x, y, 1.0), wave(x, y, 2.0)])
        });
        let want = pixels_from_rgb(&preprocess.prepare(&photo), &Device::Cpu).unwrap();
        let pixels = pixels_from_rgb(&photo, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let found = resized(&preprocess, &pixels).logits(&pixels).unwrap();
        // In whole grey levels, as the prepared picture has them.
        let off = |(a, b): (&f64, f64)| ((a * 255.0).round() - (b * 255.0).round()).abs();
        let most = values(&found).iter().zip(values(&want)).map(off).fold(0.0, f64::max);
        assert!(most <= 1.0, "{preprocess:?}: {most}");
    }
}

#[test]
fn what_it_cannot_do_is_refused() {
    let refused = |preprocess: &Preprocess, height, width| {
        let found = Resized::new(Pixels::new(preprocess), preprocess, height, width, &Device::Cpu);
        found.err().unwrap().to_string()
    };
    let error = refused(&Preprocess::clip(24, Contract::LlavaPad), 32, 32);
    assert_eq!(error, "contract: expected a resize and a crop (clip, llava-crop, squash), found llava-pad");
    let error = refused(&Preprocess::clip(24, Contract::Clip), 0, 32);
    assert_eq!(error, "picture size: expected at least 1 x 1, found 0 x 32");
    let pixels = random(&[1, 3, 9, 7], 6, 0.0, 1.0);
    let classifier = resized(&Preprocess::clip(8, Contract::Clip), &pixels);
    for shape in [vec![1, 3, 7, 9], vec![1, 1, 9, 7], vec![3, 9, 7]] {
        let other = random(&shape, 7, 0.0, 1.0);
        let error = classifier.logits(&other).unwrap_err().to_string();
        assert_eq!(error, format!("pixels: expected shape [B, 3, 9, 7], found {shape:?}"));
        assert!(classifier.logits_and_gradients(&other, &mut |_| Ok(Vec::new())).is_err());
    }
}

#[test]
fn the_laws_of_every_attack_hold_through_it() {
    for (preprocess, height, width) in ways() {
        let inner = Toy::mlp(5, 3 * (preprocess.width * preprocess.height) as usize, 8);
        let classifier = Resized::new(&inner, &preprocess, height, width, &Device::Cpu).unwrap();
        let pixels = photos(3, height, width, 9);
        let task = Classification::new(&classifier, vec![0; 3]).unwrap();
        let labels = task.predictions(&pixels).unwrap();
        assert_eq!(classifier.subject(), inner.subject());
        let apgd = Apgd { steps: 6, ..Apgd::standard(eps("6/255")) };
        assert_lawful(&apgd.on(Loss::CrossEntropy), &classifier, &pixels, &labels);
    }
}

#[test]
fn a_trained_clip_sees_the_same_through_it() {
    let Some(trained) = trained(12) else { return };
    let native = &trained.native;
    let classifier = Resized::new(&trained.classifier, &trained.preprocess, 32, 32, &Device::Cpu).unwrap();
    let task = Classification::new(&classifier, trained.labels.clone()).unwrap();
    let rows: Vec<usize> = (0..12).collect();
    let clean = task.correct(native, &rows).unwrap();
    let agree = task.predictions(native).unwrap();
    let prepared = trained.task().predictions(&trained.pixels).unwrap();
    let same = agree.iter().zip(&prepared).filter(|(a, b)| a == b).count();
    assert!(same >= 11, "{same} of 12 answers agree");
    let pgd = Pgd { steps: 5, only_correct: true, ..Pgd::new(eps("4/255")) };
    let crafted = assert_lawful(&pgd.on(Loss::CrossEntropy), &classifier, native, &trained.labels);
    let fooled = crafted.outcomes().iter().filter(|o| o.attacked && o.fooled == Some(true)).count();
    println!("{fooled} of {} fooled at 32 x 32", toy::count(&clean));
    assert!(fooled > 0);
}
