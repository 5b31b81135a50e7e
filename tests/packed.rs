//! The packed tower against the plain one, and against itself in other batches.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use radapt::Result;
use radapt::attack::{
    Attack, Classification, Classifier, CosineHead, Eps, Loss, Mixed, Objective, Pgd, Pictures, Subject,
    TowerClassifier, key,
};
use radapt::defense::acquire::training_free;
use radapt::defense::{Defense, Fra, Gif};
use radapt::model::{Lookup, Model};
use radapt::tower::clip::{Clip, ClipConfig};
use radapt::tower::weights::Weights;
use radapt::tower::{Cotangent, Features, Gradients, Precision, VisionTower, Want, Wrt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Weights drawn at random by their names.
struct Seeded;

impl Weights for Seeded {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut seed = DefaultHasher::new();
        name.hash(&mut seed);
        let mut rng = StdRng::seed_from_u64(seed.finish());
        let (centre, spread) = match shape {
            [_] if name.contains("norm") && name.ends_with("weight") => (1.0, 0.3),
            [_] => (0.0, 0.3),
            [_, inner @ ..] => (0.0, (3.0 / inner.iter().product::<usize>() as f32).sqrt()),
            [] => (0.0, 1.0),
        };
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| centre + spread * (2.0 * rng.random::<f32>() - 1.0))
            .collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn contains(&self, name: &str) -> bool {
        name == "visual_projection.weight"
    }
}

/// Odd sizes: 50 tokens, heads of 24, an MLP that is no multiple of 32, a patch of 3 * 49 numbers,
/// two rows of pixels beyond the last patch.
fn config(activation: &str) -> ClipConfig {
    ClipConfig {
        hidden_size: 96,
        intermediate_size: 200,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        image_size: 51,
        patch_size: 7,
        hidden_act: activation.into(),
        projection_dim: 40,
        ..Default::default()
    }
}

fn tower(activation: &str) -> Clip {
    Clip::new(&config(activation), &Seeded, Some(&Seeded), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]).unwrap()
}

/// The packed tower, or `None` and a line where this processor has no such products.
fn packed(tower: &Clip, precision: Precision) -> Option<Clip> {
    let found = tower.clone().packed(precision).unwrap();
    if found.precision() != Some(precision) {
        eprintln!("skipped: this processor has no AVX-512 with bf16");
        return None;
    }
    Some(found)
}

fn random(seed: u64, shape: &[usize], low: f32) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| low + (1.0 - low) * rng.random::<f32>()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn pixels(batch: usize) -> Tensor {
    random(1, &[batch, 3, 51, 51], 0.0)
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference over the largest entry of `want`.
fn error(found: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(found.dims(), want.dims());
    let (found, want) = (values(found), values(want));
    let most = want.iter().fold(0f32, |most, v| most.max(v.abs()));
    let off = found
        .iter()
        .zip(&want)
        .fold(0f32, |off, (a, b)| if (a - b).abs() <= off { off } else { (a - b).abs() });
    off / most
}

fn cosine(a: &Tensor, b: &Tensor) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let (a, b) = (values(a), values(b));
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

fn outputs(features: &Features) -> Vec<(String, &Tensor)> {
    let hidden = features.hidden.iter().enumerate().map(|(i, h)| (format!("hidden {i}"), h));
    let pooled = features.pooled.iter().map(|p| ("pooled".to_string(), p));
    let embeds = features.embeds.iter().map(|e| ("embeds".to_string(), e));
    hidden.chain(pooled).chain(embeds).collect()
}

/// Every kind of pass: what is wanted, and a cotangent at it.
fn passes(batch: usize) -> Vec<(&'static str, Want, Cotangent)> {
    let hidden = |block: usize| (block, random(10 + block as u64, &[batch, 50, 96], -1.0));
    let embeds = Some(random(20, &[batch, 40], -1.0));
    let pooled = Some(random(21, &[batch, 96], -1.0));
    vec![
        ("embeds", Want::pooled(), Cotangent { embeds: embeds.clone(), ..Default::default() }),
        ("pooled", Want::pooled(), Cotangent { pooled: pooled.clone(), ..Default::default() }),
        (
            "all",
            Want { hidden: vec![0, 1, 2, 3], pooled: true, merged: false },
            Cotangent {
                hidden: vec![hidden(0), hidden(2), hidden(3)],
                pooled,
                embeds: embeds.clone(),
                ..Default::default()
            },
        ),
        (
            "pooled and a hidden state before",
            Want { hidden: vec![1], pooled: true, merged: false },
            Cotangent { hidden: vec![hidden(1), hidden(1)], embeds, ..Default::default() },
        ),
        ("hidden", Want::hidden(2), Cotangent { hidden: vec![hidden(2)], ..Default::default() }),
        ("input", Want::hidden(0), Cotangent { hidden: vec![hidden(0)], ..Default::default() }),
    ]
}

fn pass(
    tower: &Clip,
    pixels: &Tensor,
    want: &Want,
    cotangent: &Cotangent,
    anchor: bool,
) -> (Features, Gradients) {
    let (features, tape) = tower.forward_tape(pixels, want).unwrap();
    for ((name, with), (_, without)) in
        outputs(&features).into_iter().zip(outputs(&tower.forward(pixels, want).unwrap()))
    {
        assert_eq!(values(with), values(without), "{name}: with and without a tape");
    }
    let gradients = tower.vjp(&tape, cotangent, Wrt { pixels: true, anchor }).unwrap();
    (features, gradients)
}

fn compare(plain: &Clip, precision: Precision, anchor: bool) {
    let Some(fast) = packed(plain, precision) else { return };
    for (name, want, cotangent) in passes(3) {
        let (features, gradients) = pass(&fast, &pixels(3), &want, &cotangent, anchor);
        let (expected, expected_gradients) = pass(plain, &pixels(3), &want, &cotangent, anchor);
        let (found, expected) = (outputs(&features), outputs(&expected));
        assert_eq!(found.len(), expected.len());
        for ((output, found), (_, expected)) in found.into_iter().zip(expected) {
            let off = error(found, expected);
            let allowed = if precision == Precision::F32 { 2e-6 } else { 3e-2 };
            assert!(off < allowed, "{name}, {output}: {off:e}");
        }
        let mut both = vec![("pixels", gradients.pixels, expected_gradients.pixels)];
        both.push(("anchor", gradients.anchor, expected_gradients.anchor));
        for (kind, found, expected) in both {
            assert_eq!(found.is_some(), expected.is_some());
            let (Some(found), Some(expected)) = (found, expected) else { continue };
            if precision == Precision::F32 {
                let off = error(&found, &expected);
                let zero = values(&expected).iter().all(|v| *v == 0.0);
                assert!(off < 1e-5 || zero && values(&found) == values(&expected), "{name}, {kind}: {off:e}");
            } else if values(&expected).iter().any(|v| *v != 0.0) {
                let cosine = cosine(&found, &expected);
                assert!(cosine > 0.995, "{name}, {kind}: {cosine}");
            }
        }
    }
}

#[test]
fn f32_is_the_plain_tower_up_to_rounding() {
    for activation in ["quick_gelu", "gelu", "gelu_pytorch_tanh"] {
        compare(&tower(activation), Precision::F32, false);
    }
}

#[test]
fn bf16_is_close_to_the_plain_tower() {
    compare(&tower("quick_gelu"), Precision::Bf16, false);
    compare(&tower("gelu"), Precision::Bf16, false);
}

#[test]
fn defences_are_put_in_as_in_the_plain_tower() {
    let plain = tower("quick_gelu");
    let anchor = training_free(&plain).unwrap();
    for (alpha, beta) in [(0.7, 0.3), (1.0, 0.0)] {
        let gif = Some(Arc::new(Gif::new(51, 51, 9.0, &Device::Cpu).unwrap()));
        let fra = Some(Arc::new(Fra::new(&anchor, alpha, beta, &Device::Cpu).unwrap()));
        let defended = plain.with(Defense { gif, fra, ..Default::default() }.inserts());
        compare(&defended, Precision::F32, true);
        compare(&defended, Precision::Bf16, true);
    }
}

#[test]
fn a_picture_has_the_same_bits_in_every_batch_and_with_every_number_of_threads() {
    for precision in [Precision::F32, Precision::Bf16] {
        let plain = tower("quick_gelu");
        let gif = Some(Arc::new(Gif::new(51, 51, 9.0, &Device::Cpu).unwrap()));
        let anchor = training_free(&plain).unwrap();
        let fra = Some(Arc::new(Fra::new(&anchor, 1.2, -0.8, &Device::Cpu).unwrap()));
        let defended = plain.with(Defense { gif, fra, ..Default::default() }.inserts());
        let Some(fast) = packed(&defended, precision) else { return };
        let row = |tensor: &Tensor, i: usize, n: usize| tensor.narrow(0, i, n).unwrap().contiguous().unwrap();
        for (name, want, cotangent) in passes(21) {
            let cut = |i: usize, n: usize| Cotangent {
                hidden: cotangent.hidden.iter().map(|(b, h)| (*b, row(h, i, n))).collect(),
                pooled: cotangent.pooled.as_ref().map(|p| row(p, i, n)),
                embeds: cotangent.embeds.as_ref().map(|e| row(e, i, n)),
                ..Default::default()
            };
            let all = pixels(21);
            let (features, gradients) = pass(&fast, &all, &want, &cotangent, false);
            let threads = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            for (i, n) in [(0, 1), (7, 1), (20, 1), (2, 5), (0, 17)] {
                let part = || pass(&fast, &row(&all, i, n), &want, &cut(i, n), false);
                for (own, own_gradients) in [part(), threads.install(part)] {
                    for ((output, own), (_, whole)) in outputs(&own).into_iter().zip(outputs(&features)) {
                        assert_eq!(values(own), values(&row(whole, i, n)), "{name}, {output}");
                    }
                    let (own, whole) = (own_gradients.pixels.unwrap(), gradients.pixels.clone().unwrap());
                    assert_eq!(values(&own), values(&row(&whole, i, n)), "{name}, gradient");
                }
            }
        }
    }
}

#[test]
fn a_tape_too_large_to_keep_gives_the_same_bits() {
    // The inner layers of 48 pictures take 236 MB, those of one 5.
    let wide = ClipConfig { hidden_size: 32, intermediate_size: 8192, ..config("quick_gelu") };
    let plain = Clip::new(&wide, &Seeded, None, [0.5; 3], [0.25; 3]).unwrap();
    let Some(fast) = packed(&plain, Precision::F32) else { return };
    let (all, given) = (pixels(48), random(40, &[48, 32], -1.0));
    let gradient = |from: usize, n: usize| {
        let pixels = all.narrow(0, from, n).unwrap();
        let (_, tape) = fast.forward_tape(&pixels, &Want::pooled()).unwrap();
        let pooled = Some(given.narrow(0, from, n).unwrap());
        let cotangent = Cotangent { pooled, ..Default::default() };
        fast.vjp(&tape, &cotangent, Wrt { pixels: true, anchor: false }).unwrap().pixels.unwrap()
    };
    let whole = gradient(0, 48);
    for i in [0, 29, 47] {
        assert_eq!(values(&gradient(i, 1)), values(&whole.narrow(0, i, 1).unwrap()));
    }
}

#[test]
fn packed_weights_come_back() {
    let plain = tower("quick_gelu");
    let Some(fast) = packed(&plain, Precision::F32) else { return };
    assert_eq!(fast.fingerprint().unwrap(), plain.fingerprint().unwrap());
    for ((name, want), (_, found)) in plain.tensors().unwrap().iter().zip(&fast.tensors().unwrap()) {
        assert_eq!(values(found), values(want), "{name}");
    }
    let attention = plain.first_attention(&pixels(2)).unwrap();
    assert_eq!(values(&fast.first_attention(&pixels(2)).unwrap()), values(&attention));
    let half = packed(&fast, Precision::Bf16).unwrap();
    let want = plain.to_dtype(DType::BF16).unwrap();
    for ((name, want), (_, found)) in want.tensors().unwrap().iter().zip(&half.tensors().unwrap()) {
        if name.contains("layers") && name.ends_with("weight") && !name.contains("norm") {
            assert_eq!(values(found), values(want), "{name}");
        }
    }
    let again = half.to_dtype(DType::F32).unwrap();
    assert_eq!(again.precision(), None);
    again.forward(&pixels(1), &Want::pooled()).unwrap();
}

#[test]
fn a_picture_that_is_no_number_spoils_itself_alone() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(fast) = packed(&tower("quick_gelu"), precision) else { return };
        let (want, clean) = (Want::pooled(), pixels(3));
        let mut broken = values(&clean);
        broken[3 * 51 * 51 + 700] = f32::NAN;
        let broken = Tensor::from_vec(broken, clean.dims(), &Device::Cpu).unwrap();
        let (_, _, cotangent) = passes(3).remove(0);
        let (features, gradients) = pass(&fast, &clean, &want, &cotangent, false);
        let (found, tape) = fast.forward_tape(&broken, &want).unwrap();
        let found_gradients = fast.vjp(&tape, &cotangent, Wrt { pixels: true, anchor: false }).unwrap();
        let pairs = [
            (found.embeds.unwrap(), features.embeds.unwrap()),
            (found_gradients.pixels.unwrap(), gradients.pixels.unwrap()),
        ];
        for (found, clean) in pairs {
            let row = |tensor: &Tensor, i: usize| values(&tensor.narrow(0, i, 1).unwrap());
            assert_eq!((row(&found, 0), row(&found, 2)), (row(&clean, 0), row(&clean, 2)));
            // Pixels beyond the last patch have no gradient at all.
            let own = row(&found, 1);
            assert!(own.iter().any(|v| v.is_nan()) && own.iter().all(|v| v.is_nan() || *v == 0.0));
        }
    }
}

#[test]
fn what_the_tape_has_not_is_refused() {
    let plain = tower("quick_gelu");
    let Some(fast) = packed(&plain, Precision::F32) else { return };
    let (_, tape) = fast.forward_tape(&pixels(1), &Want::pooled()).unwrap();
    let wrt = Wrt { pixels: true, anchor: false };
    let at = |block: usize| Cotangent {
        hidden: vec![(block, random(1, &[1, 50, 96], 0.0))],
        ..Default::default()
    };
    // Only the class token went through the last block.
    for block in [3, 4] {
        let error = fast.vjp(&tape, &at(block), wrt).unwrap_err().to_string();
        assert!(error.contains("blocks 0 to 2"), "{error}");
    }
    fast.vjp(&tape, &at(2), wrt).unwrap();
    let error = plain.vjp(&tape, &at(2), wrt).unwrap_err().to_string();
    assert!(error.contains("tape"), "{error}");
    let wrong = Cotangent { embeds: Some(random(1, &[1, 41], 0.0)), ..Default::default() };
    let error = fast.vjp(&tape, &wrong, wrt).unwrap_err().to_string();
    assert!(error.contains("40"), "{error}");
}

// --- Crafting on a likeness ---------------------------------------------------------------------

fn classifier(tower: &Clip, width: usize) -> TowerClassifier<Clip, CosineHead> {
    let head = CosineHead::new(&random(30, &[7, width], -1.0), 100.0).unwrap();
    TowerClassifier::new(tower.clone(), head, Subject::undefended("a tower")).unwrap()
}

fn eps(text: &str) -> Eps {
    text.parse().unwrap()
}

fn rows(logits: &Tensor) -> Vec<Vec<f32>> {
    logits.to_vec2().unwrap()
}

fn largest(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

#[test]
fn what_is_crafted_in_bf16_is_judged_in_f32() {
    let plain = tower("quick_gelu");
    let (Some(craft), Some(verify)) = (packed(&plain, Precision::Bf16), packed(&plain, Precision::F32))
    else {
        return;
    };
    let (plain, mixed) =
        (classifier(&plain, 40), Mixed::new(classifier(&craft, 40), classifier(&verify, 40)).unwrap());
    let clean = pixels(24);
    let labels: Vec<usize> = rows(&plain.logits(&clean).unwrap()).iter().map(|row| largest(row)).collect();
    let pictures = Pictures::new(&clean, (0..24).map(|i| key(&format!("{i}"))).collect()).unwrap();
    let task = Classification::new(&mixed, labels.clone()).unwrap();
    let mut last = None;
    let (mut fooled, mut kept) = (0, 0);
    for radius in ["1/255", "4/255", "16/255", "64/255", "160/255"] {
        let attack = Pgd { stop_when_fooled: true, ..Pgd::new(eps(radius)) }.on(Loss::CrossEntropy);
        let crafted = attack.craft(&task, &pictures, 1, &mut |_| {}).unwrap();
        let found = rows(&mixed.verify().logits(crafted.pixels()).unwrap());
        for (i, outcome) in crafted.outcomes().iter().enumerate() {
            let wrong = largest(&found[i]) != labels[i];
            assert_eq!(outcome.fooled, Some(wrong), "{radius}, picture {i}");
            fooled += usize::from(wrong);
            kept += usize::from(!wrong);
        }
        last = Some((attack, crafted));
    }
    assert!(fooled > 0 && kept > 0, "{fooled} and {kept}");
    let (attack, crafted) = last.unwrap();
    // In another order, alone: the same picture.
    let alone = Pictures::new(&clean.narrow(0, 23, 1).unwrap(), vec![key("23")]).unwrap();
    let task = Classification::new(&mixed, vec![labels[23]]).unwrap();
    let own = attack.craft(&task, &alone, 1, &mut |_| {}).unwrap();
    assert_eq!(values(own.pixels()), values(&crafted.pixels().narrow(0, 23, 1).unwrap()));
}

/// Calls every picture class `says`, with no slope at all.
struct Stubborn {
    subject: Subject,
    says: f32,
}

impl Classifier for Stubborn {
    fn subject(&self) -> &Subject {
        &self.subject
    }
    fn classes(&self) -> usize {
        2
    }
    fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let rows = vec![vec![0.0, self.says]; pixels.dim(0)?];
        Ok(Tensor::new(rows, &Device::Cpu)?)
    }
    fn logits_and_gradients(
        &self,
        pixels: &Tensor,
        cotangents: &mut dyn FnMut(&Tensor) -> Result<Vec<Tensor>>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let logits = self.logits(pixels)?;
        let gradients =
            cotangents(&logits)?.iter().map(|_| Ok(pixels.zeros_like()?)).collect::<Result<_>>()?;
        Ok((logits, gradients))
    }
}

#[test]
fn a_likeness_fools_no_one_by_itself() {
    let model = |name: &str, says: f32| Stubborn { subject: Subject::undefended(name), says };
    let mixed = Mixed::new(model("m", 5.0), model("m", -3.0)).unwrap();
    let pixels = pixels(2);
    for (label, fooled) in [(0, false), (1, true)] {
        let task = Classification::new(&mixed, vec![label; 2]).unwrap();
        let objective = task.objective(Loss::CrossEntropy).unwrap();
        let (near, _) = objective.values_and_gradient(&pixels, &[0, 1]).unwrap();
        if label == 0 {
            // The likeness says class 1; asked, the model says class 0, with its own loss.
            assert_eq!(near, objective.values(&pixels, &[0, 1]).unwrap());
        }
        assert_eq!(objective.values(&pixels, &[0, 1]).unwrap().fooled, Some(vec![fooled; 2]));
        let by_reference: &dyn Classifier = &&mixed;
        assert!(by_reference.is_near());
    }
    // Whoever does not know of likenesses gets the model's own logits.
    let mut seen = Vec::new();
    let (logits, _) = mixed
        .logits_and_gradients(&pixels, &mut |logits| {
            seen = rows(logits);
            Ok(vec![logits.clone()])
        })
        .unwrap();
    assert_eq!((rows(&logits), seen), (vec![vec![0.0, -3.0]; 2], vec![vec![0.0, -3.0]; 2]));
    let error = Mixed::new(model("m", 5.0), model("another", -3.0)).err().unwrap().to_string();
    assert!(error.contains("another") && error.contains("`m`") || error.contains(" m"), "{error}");
}

/// The cosine of every photo's bf16 gradient with its f32 one, on a trained model.
#[test]
fn bf16_gradients_of_a_trained_model_point_where_f32_ones_do() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("shared");
    let (folder, photos) = (shared.join("models/cifar-clip"), shared.join("data/cifar10/test_batch.bin"));
    if !folder.join("config.json").is_file() || !photos.is_file() {
        eprintln!("SKIPPED: {} has no models/cifar-clip and data/cifar10", shared.display());
        return;
    }
    let model = Model::find(folder.to_str().unwrap(), &Lookup::default()).unwrap();
    let plain = model.tower(&model.preprocess(None).unwrap(), None, &Device::Cpu).unwrap();
    let (Some(craft), Some(verify)) = (packed(&plain, Precision::Bf16), packed(&plain, Precision::F32))
    else {
        return;
    };
    // Each pixel of 32 as it is, in the middle of 48.
    let bytes = std::fs::read(photos).unwrap();
    let mut pixels = vec![0.5f32; 50 * 3 * 48 * 48];
    for (i, record) in bytes.chunks_exact(3073).take(50).enumerate() {
        for (j, byte) in record[1..].iter().enumerate() {
            let (c, y, x) = (j / 1024, j / 32 % 32, j % 32);
            pixels[((i * 3 + c) * 48 + y + 8) * 48 + x + 8] = f32::from(*byte) / 255.0;
        }
    }
    let pixels = Tensor::from_vec(pixels, (50, 3, 48, 48), &Device::Cpu).unwrap();
    let gradient = |tower: &Clip| {
        let ones = |logits: &Tensor| {
            let row = vec![1.0f32, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
            Ok(vec![Tensor::new(vec![row; logits.dim(0)?], &Device::Cpu)?])
        };
        classifier(tower, 128).logits_and_gradients(&pixels, &mut |logits| ones(logits)).unwrap().1.remove(0)
    };
    let (found, exact, own) = (gradient(&craft), gradient(&verify), gradient(&plain));
    assert!(error(&exact, &own) < 1e-4, "{:e}", error(&exact, &own));
    let row = |tensor: &Tensor, i: usize| tensor.narrow(0, i, 1).unwrap();
    let least = (0..50).map(|i| cosine(&row(&found, i), &row(&own, i))).fold(1.0, f64::min);
    eprintln!("the least cosine of 50: {least:.5}");
    assert!(least > 0.99, "{least}");
}
