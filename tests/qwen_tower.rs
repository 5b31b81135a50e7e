//! The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against PyTorch, against finite differences, and
//! against themselves; the size that their processors choose.
//!
//! Differences are the largest absolute one over the reference's largest entry, of PyTorch in f64.

mod fixture;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use fixture::{Fixture, MEAN, STD, assert_close, assert_same, difference, path, values};
use radapt::defense::{Fra, Gif};
use radapt::image::SmartResize;
use radapt::tower::qwen::{Qwen, QwenConfig, checkpoint_fingerprint};
use radapt::tower::weights::Checkpoint;
use radapt::tower::{Cotangent, Features, GridInserts, Inserts, VisionTower, Want, Wrt};
use radapt::{Error, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

const FAMILIES: [&str; 3] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"];
const PICTURES: usize = 3;
const BLOCKS: usize = 4;
/// transformers computes rotary angles in f32 whatever the dtype is, and so do we.
const OUTPUT: f64 = 1e-5;
const GRADIENT: f64 = 1e-4;
const EVERYTHING: Wrt = Wrt { pixels: true, anchor: true };
const PIXELS: Wrt = Wrt { pixels: true, anchor: false };

fn config(family: &str) -> QwenConfig {
    let file = path(&format!("qwen/{family}/config.json"));
    QwenConfig::parse(&std::fs::read_to_string(&file).unwrap(), &file).unwrap()
}

/// The family's tower, in f32.
fn tower(family: &str) -> Qwen {
    let checkpoint = Checkpoint::open(&path(&format!("qwen/{family}"))).unwrap();
    let tower = Qwen::load(&checkpoint, &config(family), MEAN, STD, &Device::Cpu).unwrap();
    tower.to_dtype(DType::F32).unwrap()
}

fn expected(family: &str) -> Fixture {
    Fixture::open(&format!("qwen/{family}.safetensors"))
}

fn pictures(expected: &Fixture) -> Vec<Tensor> {
    (0..PICTURES).map(|i| expected.tensor(&format!("picture.{i}"))).collect()
}

fn everything() -> Want {
    Want { hidden: (0..=BLOCKS).collect(), pooled: false, merged: true }
}

fn deepstack(family: &str) -> usize {
    if family == "qwen3_vl" { 2 } else { 0 }
}

/// The cotangent of picture `i`, that of a hidden state too if asked for.
fn cotangent(family: &str, expected: &Fixture, i: usize) -> Cotangent {
    let of = |name: &str| expected.tensor(&format!("c.{name}"));
    Cotangent {
        merged: Some(of(&format!("merged.{i}"))),
        deepstack: (0..deepstack(family)).map(|j| (j, of(&format!("deepstack.{i}.{j}")))).collect(),
        hidden: vec![(2, of(&format!("hidden.{i}")))],
        ..Default::default()
    }
}

/// GIF at 5 bins, and the anchor of a white picture at 1.2 and -0.8.
struct Defended {
    bare: Qwen,
    beta: f64,
}

fn white_anchor(tower: &Qwen, height: usize, width: usize) -> Tensor {
    radapt::defense::acquire::training_free(&tower.at(height, width).unwrap()).unwrap()
}

impl GridInserts for Defended {
    fn at(&self, (rows, columns): (usize, usize)) -> Result<Inserts> {
        let patch = self.bare.config().patch;
        let (height, width) = (rows * patch, columns * patch);
        let anchor = white_anchor(&self.bare, height, width);
        Ok(Inserts {
            input: Some(Arc::new(Gif::new(height, width, 5.0, &Device::Cpu)?)),
            attention: Some(Arc::new(Fra::new(&anchor, 1.2, self.beta, &Device::Cpu)?)),
        })
    }
}

fn defended(family: &str) -> Qwen {
    let bare = tower(family);
    bare.with_grids(Some(Arc::new(Defended { bare: bare.clone(), beta: -0.8 })))
}

fn at(picture: &Tensor) -> (usize, usize) {
    let (_, _, height, width) = picture.dims4().unwrap();
    (height, width)
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(0.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

#[test]
fn every_output_of_any_mix_of_grids_equals_pytorch() {
    for family in FAMILIES {
        let (tower, expected) = (tower(family), expected(family));
        let found = tower.forward(&pictures(&expected), &everything()).unwrap();
        let mut worst = 0.0f64;
        for (i, features) in found.iter().enumerate() {
            for (k, hidden) in features.hidden.iter().enumerate() {
                let name = format!("hidden.{i}.{k}");
                worst = worst.max(assert_close(&name, hidden, &expected.tensor(&name), OUTPUT));
            }
            let merged = features.merged.as_ref().unwrap();
            let name = format!("merged.{i}");
            worst = worst.max(assert_close(&name, merged, &expected.tensor(&name), OUTPUT));
            assert_eq!(features.deepstack.len(), deepstack(family));
            for (j, feature) in features.deepstack.iter().enumerate() {
                let name = format!("deepstack.{i}.{j}");
                worst = worst.max(assert_close(&name, feature, &expected.tensor(&name), OUTPUT));
            }
        }
        println!("{family}: outputs within {worst:.1e} of PyTorch");
    }
}

#[test]
fn gradients_at_the_pixels_equal_pytorchs() {
    for family in FAMILIES {
        let (tower, expected) = (tower(family), expected(family));
        let (_, tape) = tower.forward_tape(&pictures(&expected), &everything()).unwrap();
        let cotangents: Vec<_> = (0..PICTURES).map(|i| cotangent(family, &expected, i)).collect();
        let found = tower.vjp(&tape, &cotangents, PIXELS).unwrap();
        let mut worst = 0.0f64;
        for (i, gradients) in found.iter().enumerate() {
            let name = format!("grad.{i}");
            let gradient = gradients.pixels.as_ref().unwrap();
            worst = worst.max(assert_close(&name, gradient, &expected.tensor(&name), GRADIENT));
        }
        println!("{family}: gradients within {worst:.1e} of PyTorch");
    }
}

#[test]
fn a_defended_tower_and_its_gradients_equal_pytorchs() {
    for family in FAMILIES {
        let (tower, expected) = (defended(family), expected(family));
        let pictures = pictures(&expected);
        let (features, tape) = tower.forward_tape(&pictures, &everything()).unwrap();
        let cotangents: Vec<_> = (0..PICTURES).map(|i| cotangent(family, &expected, i)).collect();
        let found = tower.vjp(&tape, &cotangents, EVERYTHING).unwrap();
        let (mut outputs, mut gradients) = (0.0f64, 0.0f64);
        for i in 0..PICTURES {
            let (height, width) = at(&pictures[i]);
            let white = white_anchor(&tower, height, width);
            assert_close(&format!("white {i}"), &white, &expected.tensor(&format!("white.{i}")), OUTPUT);
            let want = |name: &str| expected.tensor(&format!("def.{i}.{name}"));
            let merged = features[i].merged.as_ref().unwrap();
            outputs = outputs.max(assert_close("defended merged", merged, &want("merged"), OUTPUT));
            for (j, feature) in features[i].deepstack.iter().enumerate() {
                let want = want(&format!("deepstack.{j}"));
                outputs = outputs.max(assert_close("defended deepstack", feature, &want, OUTPUT));
            }
            for (name, gradient) in [("grad", &found[i].pixels), ("anchor", &found[i].anchor)] {
                let gradient = gradient.as_ref().unwrap();
                gradients = gradients.max(assert_close(name, gradient, &want(name), GRADIENT));
            }
        }
        println!("{family}: defended outputs within {outputs:.1e}, gradients {gradients:.1e} of PyTorch");
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    for family in FAMILIES {
        let (tower, expected) = (defended(family), expected(family));
        let picture = expected.tensor("picture.1");
        let cotangent = cotangent(family, &expected, 1);
        let value = |picture: &Tensor| -> f64 {
            let found: Features =
                tower.forward(std::slice::from_ref(picture), &everything()).unwrap().remove(0);
            let dot =
                |a: &Tensor, b: &Tensor| -> f64 { values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum() };
            let mut sum = dot(found.merged.as_ref().unwrap(), cotangent.merged.as_ref().unwrap());
            for (j, c) in &cotangent.deepstack {
                sum += dot(&found.deepstack[*j], c);
            }
            sum + dot(&found.hidden[2], &cotangent.hidden[0].1)
        };
        let (_, tape) = tower.forward_tape(std::slice::from_ref(&picture), &everything()).unwrap();
        let gradient = tower.vjp(&tape, std::slice::from_ref(&cotangent), PIXELS).unwrap().remove(0);
        let gradient = gradient.pixels.unwrap();
        // Along the gradient's signs the slope stands clear of f32's noise; a random way as well, as far
        // as that lets one see.
        let signs = gradient.sign().unwrap();
        for (direction, allowed) in [(signs, 2e-3), (random(picture.dims(), 5), 2e-2)] {
            let along: f64 = values(&gradient).iter().zip(values(&direction)).map(|(a, b)| a * b).sum();
            let moved = |step: f64| value(&(&picture + (&direction * step).unwrap()).unwrap());
            let step = 1e-3;
            let near = moved(step) - moved(-step);
            let far = moved(2.0 * step) - moved(-2.0 * step);
            let slope = (8.0 * near - far) / (12.0 * step);
            assert!((slope - along).abs() < allowed * along.abs().max(1.0), "{family}: {along}, {slope}");
        }
    }
}

#[test]
fn several_pictures_have_the_bits_of_each_alone_and_of_the_tower_at_its_size() {
    for family in FAMILIES {
        let (tower, expected) = (defended(family), expected(family));
        let pictures = pictures(&expected);
        let together = tower.forward(&pictures, &everything()).unwrap();
        for (picture, together) in pictures.iter().zip(&together) {
            let alone = tower.forward(std::slice::from_ref(picture), &everything()).unwrap().remove(0);
            assert_same("merged", together.merged.as_ref().unwrap(), alone.merged.as_ref().unwrap());
            for (a, b) in together.deepstack.iter().zip(&alone.deepstack) {
                assert_same("deepstack", a, b);
            }
            if picture.dim(0).unwrap() == 1 {
                let (height, width) = at(picture);
                let there = tower.at(height, width).unwrap();
                let found = there.forward(picture, &everything()).unwrap();
                assert_same("at its size", &found.merged.unwrap(), alone.merged.as_ref().unwrap());
                assert_eq!(there.spec().tokens(), height * width / 16);
            }
        }
    }
}

#[test]
fn without_an_effect_the_defence_changes_no_bit() {
    struct Nothing(Qwen);
    impl GridInserts for Nothing {
        fn at(&self, (rows, columns): (usize, usize)) -> Result<Inserts> {
            let anchor = Tensor::ones((rows * columns, self.0.config().hidden), DType::F32, &Device::Cpu)?;
            Ok(Inserts { input: None, attention: Some(Arc::new(Fra::new(&anchor, 0.0, 1.0, &Device::Cpu)?)) })
        }
    }
    for family in FAMILIES {
        let (tower, expected) = (tower(family), expected(family));
        let idle = tower.with_grids(Some(Arc::new(Nothing(tower.clone()))));
        let pictures = pictures(&expected);
        let plain = tower.forward(&pictures, &everything()).unwrap();
        for (a, b) in plain.iter().zip(idle.forward(&pictures, &everything()).unwrap()) {
            assert_same("merged", a.merged.as_ref().unwrap(), &b.merged.unwrap());
        }
    }
}

#[test]
fn without_beta_the_first_attention_is_skipped_and_gradients_still_flow() {
    for family in FAMILIES {
        let (bare, expected) = (tower(family), expected(family));
        let tower = bare.with_grids(Some(Arc::new(Defended { bare: bare.clone(), beta: 0.0 })));
        let picture = expected.tensor("picture.0");
        let (_, tape) = tower.forward_tape(&[picture], &everything()).unwrap();
        let found = tower.vjp(&tape, &[cotangent(family, &expected, 0)], EVERYTHING).unwrap().remove(0);
        for gradient in [found.pixels.unwrap(), found.anchor.unwrap()] {
            assert!(values(&gradient).iter().any(|x| x.abs() > 1e-6), "{family}");
        }
    }
}

#[test]
fn patches_in_the_processors_order_give_what_their_pictures_give() {
    for family in FAMILIES {
        let (tower, expected) = (defended(family), expected(family));
        let pictures = pictures(&expected);
        let grids = [[1, 6, 10], [1, 14, 6], [2, 4, 6]];
        let patches = expected.tensor("patches");
        let found = tower.encode_patches(&patches, &grids).unwrap();
        let features = tower.forward(&pictures, &Want::merged()).unwrap();
        let merged: Vec<Tensor> =
            features.iter().map(|f| f.merged.as_ref().unwrap().flatten(0, 1).unwrap()).collect();
        let merged = Tensor::cat(&merged, 0).unwrap();
        // A still is filtered once here, and as two equal frames there.
        assert!(difference(&found.embeddings, &merged) < 1e-6);
        assert_eq!(found.deepstack.len(), deepstack(family));
        // Cutting and putting together are each other's inverse.
        let start = grids[0][1] * grids[0][2];
        let part = patches.narrow(0, 0, start).unwrap();
        let frames = tower.frames_of(&part, grids[0]).unwrap();
        assert_same("patches", &tower.patches_of(&frames).unwrap(), &part);
        assert_same("frames", &frames.squeeze(0).unwrap().narrow(0, 0, 1).unwrap(), &pictures[0]);
        let wrong = tower.encode_patches(&patches, &grids[..2]);
        assert!(matches!(wrong, Err(Error::Argument { .. })));
    }
}

#[test]
fn v5_names_and_shards_load_the_same_tower() {
    for family in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let source = path(&format!("qwen/{family}/model.safetensors"));
        let all = candle_core::safetensors::load(&source, &Device::Cpu).unwrap();
        let mut index = serde_json::Map::new();
        let mut shards = [std::collections::HashMap::new(), std::collections::HashMap::new()];
        for (i, (name, tensor)) in all.into_iter().enumerate() {
            let name = format!("model.{name}");
            index.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
            shards[i % 2].insert(name, tensor);
        }
        for (i, shard) in shards.iter().enumerate() {
            let file = folder.path().join(format!("part-{i}.safetensors"));
            candle_core::safetensors::save(shard, file).unwrap();
        }
        let index = serde_json::json!({ "weight_map": index }).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let loaded = Qwen::load(&checkpoint, &config(family), MEAN, STD, &Device::Cpu).unwrap();
        assert_eq!(loaded.dtype(), DType::BF16);
        let picture = expected(family).tensor("picture.0");
        let reference = tower(family);
        let of = |tower: &Qwen| {
            tower.forward(std::slice::from_ref(&picture), &Want::merged()).unwrap().remove(0).merged.unwrap()
        };
        assert_same("from bf16", &of(&loaded), &of(&reference));
        let print = checkpoint_fingerprint(&checkpoint, &config(family)).unwrap();
        assert_eq!(print, loaded.fingerprint().unwrap());
        assert_eq!(print, reference.fingerprint().unwrap());
        // What it holds is what was stored, under the same names.
        for (name, tensor) in loaded.tensors().unwrap() {
            let file = format!("qwen/{family}/model.safetensors");
            let stored = candle_core::safetensors::load(path(&file), &Device::Cpu).unwrap();
            let stored = stored.get(&format!("visual.{name}")).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(stored.dims(), tensor.dims(), "{name}");
            assert_same(&name, &tensor.to_dtype(DType::F32).unwrap(), &stored.to_dtype(DType::F32).unwrap());
        }
    }
}

#[test]
fn wrong_pictures_and_configurations_are_errors() {
    let tower = tower("qwen3_vl");
    let still = |h: usize, w: usize| Tensor::zeros((1, 3, h, w), DType::F32, &Device::Cpu).unwrap();
    let forward = |picture: Tensor, want: &Want| tower.forward(&[picture], want).err().unwrap().to_string();
    assert!(
        forward(still(12, 16), &Want::merged()).contains("multiples of 8"),
        "{}",
        forward(still(12, 16), &Want::merged())
    );
    assert!(forward(still(0, 16), &Want::merged()).contains("multiples of 8"));
    assert!(forward(still(16, 16), &Want::pooled()).contains("pooled"));
    assert!(forward(still(16, 16), &Want::hidden(9)).contains("0 to 4"));
    assert!(tower.at(8, 12).is_err());
    let file = path("qwen/qwen3_vl/config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    for (from, to, named) in [
        ("qwen3_vl", "qwen4_vl", "qwen4_vl"),
        ("\"num_heads\": 2", "\"num_heads\": 5", "heads"),
        ("\"num_heads\": 2", "\"num_heads\": 0", "num_heads"),
        ("\"num_position_embeddings\": 25", "\"num_position_embeddings\": 26", "square"),
        ("\"depth\": 4", "\"depth\": 2", "deepstack_visual_indexes"),
        ("\"depth\": 4", "\"depth\": -4", "depth"),
        ("\"patch_size\": 4", "\"patch_size\": [4, 5]", "patch_size"),
    ] {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        let error = QwenConfig::parse(&changed, &file).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
fn a_cotangent_of_what_the_tower_has_not_is_an_error() {
    let (tower, expected) = (tower("qwen3_vl"), expected("qwen3_vl"));
    let there = tower.at(24, 40).unwrap();
    let picture = expected.tensor("picture.0");
    let (features, tape) = there.forward_tape(&picture, &everything()).unwrap();
    let merged = features.merged.unwrap();
    for cotangent in [
        Cotangent { pooled: Some(merged.clone()), ..Default::default() },
        Cotangent { hidden: vec![(7, merged.clone())], ..Default::default() },
        Cotangent { deepstack: vec![(2, merged.clone())], ..Default::default() },
    ] {
        assert!(there.vjp(&tape, &cotangent, PIXELS).is_err());
    }
    let (_, early) = there.forward_tape(&picture, &Want::hidden(1)).unwrap();
    let cotangent = Cotangent { merged: Some(merged), ..Default::default() };
    assert!(there.vjp(&early, &cotangent, PIXELS).is_err());
}

#[test]
fn the_size_chosen_for_a_picture_is_transformers_for_every_side_up_to_700() {
    let text = std::fs::read_to_string(path("qwen/smart_resize.json")).unwrap();
    let tables: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut sizes = 0;
    for (factor, table) in &tables {
        let factor: u32 = factor.parse().unwrap();
        let number = |key: &str| table[key].as_u64().unwrap();
        let smart = SmartResize { factor, min_pixels: number("least"), max_pixels: number("most") };
        let of = |smart: &SmartResize, h: u32, w: u32| smart.size(h, w).unwrap_or((0, 0));
        let check = |smart: &SmartResize, key: &str| {
            for row in table[key].as_array().unwrap() {
                let row: Vec<u32> =
                    row.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
                assert_eq!(of(smart, row[0], row[1]), (row[2], row[3]), "{factor}: {row:?}");
            }
        };
        check(&smart, "some");
        check(&SmartResize { max_pixels: smart.min_pixels * 20, ..smart }, "large");
        let mut hash = Sha256::new();
        for height in 1..=700 {
            for width in 1..=700 {
                let (h, w) = of(&smart, height, width);
                hash.update(format!("{height} {width} {h} {w}\n"));
                sizes += 1;
            }
        }
        let hash: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hash, table["sha256"].as_str().unwrap(), "factor {factor}");
    }
    println!("{sizes} sizes as transformers has them");
}
