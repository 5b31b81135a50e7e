//! Analyses of a standard and a robust tower: numbers against NumPy, what must hold for any two
//! towers, and the commands.

mod fixture;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use fixture::{Fixture, MEAN, STD, assert_close, assert_same, clip, path, values};
use radapt::Result;
use radapt::analyze::attention::{Attention, attention, class_weights};
use radapt::analyze::cka::{self, Cka, Hsic, Map, exact};
use radapt::analyze::insensitivity::{Cosine, Insensitivity, between, insensitivity};
use radapt::analyze::replace::{self, Replace};
use radapt::analyze::shapley::{Shapley, coalitions, orders, shapley_values};
use radapt::analyze::spectrum::{Spectrum, magnitudes, spectrum};
use radapt::analyze::{Analysis, Pair, Sample, Side, Tokens, Which};
use radapt::attack::ThreatKind;
use radapt::data::LabelledSet;
use radapt::image::rgb_from_pixels;
use radapt::model::{Lookup, Model};
use radapt::pocket::built_in;
use radapt::tower::clip::{Clip, Part};
use radapt::tower::weights::Checkpoint;
use radapt::tower::{VisionTower, Want};
use serde_json::Value;

/// What is computed in f32 against NumPy's f64.
const TOLERANCE: f64 = 1e-5;

fn robust() -> Clip {
    let folder = path("analyze/robust");
    let model = Model::find(&folder.display().to_string(), &Lookup::default()).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let tower = Clip::load(&checkpoint, &model.tower_config().unwrap(), MEAN, STD, &Device::Cpu).unwrap();
    tower.to_dtype(DType::F32).unwrap()
}

fn pair() -> Pair {
    Pair::new(clip("v5"), robust()).unwrap()
}

fn expected() -> Fixture {
    Fixture::open("analyze/expected.safetensors")
}

/// The towers of NumPy's names, such as `standard-robust`.
fn both(name: &str) -> [Which; 2] {
    let one = |name: &str| if name == "standard" { Which::Standard } else { Which::Robust };
    let (a, b) = name.split_once('-').unwrap();
    [one(a), one(b)]
}

const PAIRS: [&str; 3] = ["standard-standard", "standard-robust", "robust-robust"];

/// Asserts that two tables are equal to [`TOLERANCE`] in absolute terms.
#[track_caller]
fn assert_table(what: &str, found: &[Vec<f64>], want: &Tensor) {
    let found: Vec<f64> = found.concat();
    let want = values(want);
    assert_eq!(found.len(), want.len(), "{what}");
    let far = found
        .iter()
        .zip(&want)
        .map(|(f, w)| (f - w).abs())
        .fold(0.0, |a: f64, b| if b.is_nan() { f64::INFINITY } else { a.max(b) });
    println!("{what}: {far:.1e}");
    assert!(far <= TOLERANCE, "{what} is {far:.1e} off");
}

fn some(map: &Map) -> Vec<Vec<f64>> {
    map.iter().map(|row| row.iter().map(|value| value.expect("a number")).collect()).collect()
}

/// Features of every layer, `(12, F)`, one picture at a time.
fn features(tower: &Clip, pixels: &Tensor, tokens: Tokens) -> Vec<Tensor> {
    let layers = tower.spec().blocks + 1;
    let want = Want { hidden: (0..layers).collect(), ..Want::default() };
    let mut parts: Vec<Vec<Tensor>> = vec![Vec::new(); layers];
    for i in 0..pixels.dim(0).unwrap() {
        let found = tower.forward(&pixels.narrow(0, i, 1).unwrap(), &want).unwrap();
        for (all, hidden) in parts.iter_mut().zip(&found.hidden) {
            all.push(tokens.take(hidden).unwrap());
        }
    }
    parts.iter().map(|parts| Tensor::cat(parts, 0).unwrap()).collect()
}

const TOKENS: [Tokens; 3] = [Tokens::All, Tokens::Class, Tokens::Mean];

#[test]
fn cka_is_numpys_exact_and_over_minibatches() {
    let (pair, want) = (pair(), expected());
    let pixels = want.tensor("pixels");
    for tokens in TOKENS {
        for name in PAIRS {
            let all: Vec<Tensor> =
                both(name).iter().flat_map(|which| features(pair.tower(*which), &pixels, tokens)).collect();
            let layers = all.len() / 2;
            let mut hsic = Hsic::new(all.len());
            for (start, n) in [(0, 5), (5, 7)] {
                let part: Vec<Tensor> = all.iter().map(|x| x.narrow(0, start, n).unwrap()).collect();
                hsic.add(&part).unwrap();
            }
            // The class token before block 1 is the same in every picture.
            let least = usize::from(tokens == Tokens::Class);
            let (rows, columns) = (least..layers, layers + least..2 * layers);
            let found = hsic.cka(rows.clone(), columns.clone());
            assert_table(
                &format!("minibatch {tokens} {name}"),
                &some(&found),
                &want.tensor(&format!("cka.mini.{tokens}.{name}")),
            );
            let found = exact(&all).unwrap().cka(rows, columns);
            assert_table(
                &format!("exact {tokens} {name}"),
                &some(&found),
                &want.tensor(&format!("cka.exact.{tokens}.{name}")),
            );
            if tokens == Tokens::Class {
                assert!(hsic.cka(0..1, 0..2 * layers)[0].iter().all(Option::is_none));
                assert!(exact(&all).unwrap().cka(0..2, 0..1)[0][0].is_none());
            }
        }
    }
}

#[test]
fn a_tower_is_like_itself_and_rotation_scale_and_offset_do_not_matter() {
    let pixels = expected().tensor("pixels");
    let layers = features(&clip("v5"), &pixels, Tokens::Mean);
    let turned: Vec<Tensor> = layers
        .iter()
        .map(|x| {
            // Channels in another order, signs changed, scaled and shifted.
            let width = x.dim(1).unwrap() as u32;
            let order = Tensor::from_iter((0..width).map(|i| (i * 5 + 3) % width), &Device::Cpu).unwrap();
            ((x.index_select(&order, 1).unwrap() * -7.5).unwrap() + 100.0).unwrap()
        })
        .collect();
    let n = layers.len();
    let all: Vec<Tensor> = layers.into_iter().chain(turned).collect();
    let mut minibatch = Hsic::new(2 * n);
    minibatch.add(&all).unwrap();
    for hsic in [minibatch, exact(&all).unwrap()] {
        let (own, other) = (some(&hsic.cka(0..n, 0..n)), some(&hsic.cka(0..n, n..2 * n)));
        for i in 0..n {
            assert!((own[i][i] - 1.0).abs() < 1e-12, "{}", own[i][i]);
            assert!((other[i][i] - 1.0).abs() < 1e-6, "{}", other[i][i]);
            for j in 0..n {
                assert!((own[i][j] - own[j][i]).abs() < 1e-12 && own[i][j] <= 1.0 + 1e-12);
                assert!((own[i][j] - other[i][j]).abs() < 1e-6);
            }
        }
    }
    for bad in [vec![], vec![Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap()]] {
        assert!(Hsic::new(1).add(&bad).is_err());
    }
}

#[test]
fn spectra_are_numpys() {
    let want = expected();
    let found = spectrum(&pair()).unwrap();
    assert_table("standard", &found.standard_magnitude, &want.tensor("spectrum.standard"));
    assert_table("robust", &found.robust_magnitude, &want.tensor("spectrum.robust"));
    assert_table("shift", &found.shift, &want.tensor("spectrum.shift"));
    assert_eq!(found.frequencies, [-2, -1, 0, 1]);
    // What the rings hold is what the map holds, and of a tower with itself nothing shifts.
    let whole: f64 = found.shift.iter().flatten().sum();
    let members = |radius: usize| {
        let at = |i: usize, j: usize| f64::hypot(found.frequencies[i] as f64, found.frequencies[j] as f64);
        (0..16).filter(|i| at(i / 4, i % 4).round() as usize == radius).count() as f64
    };
    let rings: f64 = found.rings.iter().map(|ring| ring.shift * members(ring.radius)).sum();
    assert!((whole - rings).abs() < 1e-9, "{whole} {rings}");
    let itself = spectrum(&Pair::new(robust(), robust()).unwrap()).unwrap();
    assert!(itself.shift.iter().flatten().all(|v| *v == 0.0));
    // An odd side: 0 is still in the middle; a constant kernel has nothing else.
    let flat = magnitudes(&Tensor::ones((2, 3, 5, 5), DType::F32, &Device::Cpu).unwrap()).unwrap();
    for (u, row) in flat.iter().enumerate() {
        for (v, value) in row.iter().enumerate() {
            let want = if (u, v) == (2, 2) { 25.0 } else { 0.0 };
            assert!((value - want).abs() < 1e-12, "{u} {v}: {value}");
        }
    }
    assert!(magnitudes(&Tensor::ones((2, 3, 5, 4), DType::F32, &Device::Cpu).unwrap()).is_err());
}

#[test]
fn cosines_and_their_intervals_are_numpys() {
    let (pair, want) = (pair(), expected());
    let pixels = want.tensor("pixels");
    let outputs = |which: Which, tokens: Tokens| {
        let rows = (0..12).map(|i| {
            let attention = pair.tower(which).first_attention(&pixels.narrow(0, i, 1).unwrap()).unwrap();
            tokens.take(&attention).unwrap()
        });
        Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
    };
    for tokens in TOKENS {
        for name in PAIRS {
            let [a, b] = both(name).map(|which| outputs(which, tokens));
            let (value, low, high) = between(&a, &b).unwrap();
            assert_table(
                &format!("{tokens} {name}"),
                &[vec![value, low, high]],
                &want.tensor(&format!("cosine.{tokens}.{name}")),
            );
        }
    }
    let a = outputs(Which::Standard, Tokens::Class);
    assert!(between(&a, &a.narrow(0, 0, 5).unwrap()).is_err());
    // The same picture every time: nothing depends on it.
    let same = Tensor::cat(&vec![a.narrow(0, 0, 1).unwrap(); 4], 0).unwrap();
    let (value, low, high) = between(&same, &same).unwrap();
    assert!((value - 1.0).abs() < 1e-6 && high - low < 1e-6, "{value} {low} {high}");
}

#[test]
fn attention_maps_are_transformers_and_heads_add_up_to_the_output() {
    let (pair, want) = (pair(), expected());
    let pixels = want.tensor("pixels");
    for which in [Which::Standard, Which::Robust] {
        let found = class_weights(pair.tower(which), &pixels).unwrap();
        assert_close(&format!("{which}"), &found, &want.tensor(&format!("attention.{which}")), TOLERANCE);
        let tower = pair.tower(which);
        let one = pixels.narrow(0, 3, 1).unwrap();
        let stream = tower.forward(&one, &Want::hidden(0)).unwrap().hidden.remove(0);
        let block = tower.block_parts(0).unwrap();
        let heads = block.attention.by_head(&block.norm1.forward(&stream).unwrap()).unwrap();
        assert_eq!(heads.len(), 4);
        let sum = heads.iter().skip(1).fold(heads[0].clone(), |sum, head| (sum + head).unwrap());
        let sum = sum.broadcast_add(block.attention.out.bias().unwrap()).unwrap();
        assert_close("heads", &sum, &tower.first_attention(&one).unwrap(), TOLERANCE);
    }
}

#[test]
fn whole_analyses_of_picture_files_are_numpys() {
    let (pair, want) = (pair(), expected());
    let pixels = want.tensor("pixels");
    let folder = tempfile::tempdir().unwrap();
    let class = folder.path().join("one");
    std::fs::create_dir(&class).unwrap();
    for i in 0..12 {
        let picture = rgb_from_pixels(&pixels.get(i).unwrap()).unwrap();
        picture.save(class.join(format!("{i:02}.png"))).unwrap();
    }
    let set = LabelledSet::open(folder.path(), &Default::default()).unwrap();
    let model = Model::find(path("analyze/robust").to_str().unwrap(), &Lookup::default()).unwrap();
    let preprocess = model.preprocess(None).unwrap();
    let limits = Default::default();
    let sample = Sample { set: &set, limits, preprocess: &preprocess, device: &Device::Cpu };
    let mut told = 0;
    for tokens in [Tokens::All, Tokens::Mean] {
        let (found, failed) = insensitivity(&pair, &sample, tokens, &mut |done| told = done).unwrap();
        assert!(failed.is_empty() && found.pictures == 12 && told == 12);
        for name in PAIRS {
            let [first, second] = both(name);
            let find =
                |list: &[Cosine]| list.iter().find(|c| (c.first, c.second) == (first, second)).cloned();
            let c = find(&found.between_pictures).unwrap();
            let table = want.tensor(&format!("cosine.{tokens}.{name}"));
            assert_table(&format!("{tokens} {name}"), &[vec![c.value, c.low, c.high]], &table);
            let c = find(&found.with_white).unwrap();
            let table = want.tensor(&format!("white.{tokens}.{name}"));
            assert_table(&format!("white {tokens} {name}"), &[vec![c.value, c.high - c.value]], &table);
        }
        // The order in which pictures come does not matter to the exact estimate; in the minibatches it
        // is drawn by the seed.
        let maps = |seed: u64| {
            let options = cka::Options { tokens, batch: 5, minibatch_only: false, seed };
            cka::cka(&pair, &sample, &options, &mut |_| ()).unwrap().0
        };
        let (found, other) = (maps(0), maps(1));
        assert_eq!((found.batches, found.batch), (3, 4));
        let whole = found.exact.as_ref().unwrap();
        for (map, name) in [&whole.standard, &whole.cross, &whole.robust].into_iter().zip(PAIRS) {
            assert_table(
                &format!("cka {tokens} {name}"),
                &some(map),
                &want.tensor(&format!("cka.exact.{tokens}.{name}")),
            );
        }
        assert_ne!(found.minibatch, other.minibatch);
        assert_eq!(found.minibatch, maps(0).minibatch);
    }
    let (found, _) = attention(&pair, &sample, 12, false, &mut |_| ()).unwrap();
    for which in [Which::Standard, Which::Robust] {
        let mean = want.tensor(&format!("attention.{which}")).mean(1).unwrap();
        let found: Vec<Vec<f64>> = found
            .drawn
            .iter()
            .map(|drawn| if which == Which::Standard { &drawn.standard } else { &drawn.robust })
            .map(|seen| std::iter::once(seen.class).chain(seen.patches.iter().copied()).collect())
            .collect();
        assert_table(&format!("attention {which}"), &found, &mean);
    }
}

fn answers(tower: &Clip, pixels: &Tensor) -> Tensor {
    tower.forward(pixels, &Want::pooled()).unwrap().embeds.unwrap()
}

#[test]
fn replacing_nothing_is_the_standard_tower_and_replacing_all_the_robust_one() {
    let pair = pair();
    let pixels = expected().tensor("pixels").narrow(0, 0, 2).unwrap();
    let stages = replace::stages(4);
    let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names[..4], ["none", "emb", "b1-attn", "b1-mlp"]);
    assert_eq!((names.len(), names[names.len() - 1]), (11, "out"));
    let towers: Vec<Clip> = stages.iter().map(|stage| pair.replaced(stage.replaced).unwrap()).collect();
    assert_same("nothing", &answers(&towers[0], &pixels), &answers(&pair.standard, &pixels));
    assert_same("all", &answers(&towers[10], &pixels), &answers(&pair.robust, &pixels));
    // Tensor by tensor: each stage has the robust tower's weights up to its part, the standard's after.
    let (ours, theirs) = (pair.standard.tensors().unwrap(), pair.robust.tensors().unwrap());
    let place = |name: &str| -> usize {
        let block = name.strip_prefix("encoder.layers.").and_then(|rest| rest.split('.').next());
        match block.map(|block| block.parse::<usize>().unwrap()) {
            None if name.starts_with("post_") => 10,
            None => 1,
            Some(block) if name.contains("self_attn") || name.contains("layer_norm1") => 2 + 2 * block,
            Some(block) => 3 + 2 * block,
        }
    };
    for (stage, tower) in stages.iter().zip(&towers) {
        for ((name, found), (own, other)) in tower.tensors().unwrap().iter().zip(ours.iter().zip(&theirs)) {
            let want = if place(name) <= stage.replaced { other } else { own };
            assert_same(&format!("{} at {}", name, stage.name), found, &want.1);
        }
    }
    // Packed towers are taken apart again.
    let packed = |tower: Clip| tower.packed(radapt::tower::Precision::F32).unwrap();
    let again = Pair::new(packed(clip("v5")), packed(robust())).unwrap();
    assert_same("packed", &answers(&again.replaced(5).unwrap(), &pixels), &answers(&towers[5], &pixels));
    assert!(pair.replaced(12).is_err());
    assert!(pair.standard.with_parts(&pair.robust, &[Part::Mlp(5)]).is_err());
    assert!(pair.standard.with_parts(&pair.robust, &[Part::Attention(0)]).is_err());
    assert!(replace::choose(4, &["b5-mlp".into()]).is_err());
    let chosen = replace::choose(4, &["out".into(), "emb".into()]).unwrap();
    assert_eq!(chosen.iter().map(|stage| stage.replaced).collect::<Vec<_>>(), [1, 10]);
    // Stages are different models; the standard tower is undefended.
    let side = |name: &str| Side { name: name.into(), revision: None, digest: name.into() };
    let sides = [side("a"), side("b")];
    let subjects: Vec<_> = stages.iter().map(|stage| replace::subject(&sides, stage)).collect();
    assert!(subjects[0].is_undefended() && !subjects[1].is_undefended());
    assert!((1..11).all(|i| subjects[i] != subjects[i - 1]));
}

#[test]
fn shapley_values_are_those_of_the_sum_over_coalitions_and_add_up() {
    let want = expected();
    let table = want.tensor("shapley.worth").to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let worth: BTreeMap<u64, Vec<f64>> = table.into_iter().enumerate().map(|(i, w)| (i as u64, w)).collect();
    let mean = |with: u64| worth[&with].iter().sum::<f64>() / 5.0;
    let all = orders(4, 24, 0);
    assert_eq!(all.len(), 24);
    assert_eq!(coalitions(&all), (0..16).collect::<Vec<u64>>());
    let found = shapley_values(4, &all, true, &worth).unwrap();
    let by_picture = want.tensor("shapley.values").to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    for (head, values) in found.iter().zip(&by_picture) {
        let value = values.iter().sum::<f64>() / 5.0;
        let square: f64 = values.iter().map(|v| (v - value).powi(2)).sum();
        assert!((head.value - value).abs() < 1e-6, "{head:?}, expected {value}");
        assert!((head.error_pictures - (square / 20.0).sqrt()).abs() < 1e-6, "{head:?}");
        assert_eq!(head.error_orders, 0.0);
    }
    let whole = mean(15) - mean(0);
    for sampled in [all, orders(4, 5, 1)] {
        let found = shapley_values(4, &sampled, false, &worth).unwrap();
        let sum: f64 = found.iter().map(|head| head.value).sum();
        assert!((sum - whole).abs() < 1e-12, "{sum}, expected {whole}");
        assert!(found.iter().all(|head| head.error_orders > 0.0 && head.low < head.value));
    }
    // Many random orders come to the sum over all.
    let many = orders(4, 23, 5);
    assert_eq!((many.len(), &many), (23, &orders(4, 23, 5)));
    assert_ne!(many, orders(4, 23, 6));
    for order in &many {
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3]);
    }
    let near = shapley_values(4, &many, false, &worth).unwrap();
    for (near, exact) in near.iter().zip(&found) {
        assert!((near.value - exact.value).abs() < 5.0 * near.error_orders, "{near:?}, expected {exact:?}");
    }
    let gap: BTreeMap<u64, Vec<f64>> =
        worth.iter().filter(|(with, _)| **with != 7).map(|(k, v)| (*k, v.clone())).collect();
    assert!(shapley_values(4, &orders(4, 24, 0), true, &gap).is_err());
}

#[test]
fn towers_of_other_shapes_are_refused_by_what_differs() -> Result<()> {
    let find = |name: &str| Model::find(&path(name).display().to_string(), &Lookup::default());
    let model = find("clip/v4")?;
    let preprocess = model.preprocess(None)?;
    let load = |robust: &str| {
        let robust = path(robust).display().to_string();
        Pair::load(&model, &robust, &Lookup::default(), &preprocess, DType::F32, &Device::Cpu)
    };
    let (_, sides) = load("analyze/robust")?;
    assert!(sides[1].name.ends_with("analyze/robust") && sides[0].digest != sides[1].digest);
    for (robust, says) in [
        ("guide/hf", "with 4 blocks, found 2"),
        ("guide/visual.pt", "with 4 blocks, found 2"),
        ("qwen_chat/qwen2_vl", "no CLIP"),
        ("data/protocol2.pkl", "protocol2.pkl"),
        ("nothing/here", "nothing/here"),
    ] {
        let error = load(robust).map(drop).expect_err(robust).to_string();
        assert!(error.contains(says), "{robust}: {error}");
    }
    // A file of weights alone, as FARE's.
    let (from_file, _) = load("analyze/robust/model.safetensors")?;
    let pixels = expected().tensor("pixels").narrow(0, 0, 1)?;
    assert_same("file", &answers(&from_file.robust, &pixels), &answers(&robust(), &pixels));
    Ok(())
}

fn command(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .env_remove("RADAPT_MODEL")
        .env_remove("RUST_BACKTRACE")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The pocket CLIP with every weight of its vision tower a little off, in a folder.
fn sibling() -> &'static Path {
    static FOLDER: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, folder) = FOLDER.get_or_init(|| {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path().join("sibling");
        std::fs::create_dir(&folder).unwrap();
        let base = built_in::folder("pocket-clip").unwrap().unwrap();
        for entry in std::fs::read_dir(&base).unwrap() {
            let from = entry.unwrap().path();
            if from.extension().is_some_and(|end| end == "json") {
                std::fs::copy(&from, folder.join(from.file_name().unwrap())).unwrap();
            }
        }
        let mut tensors =
            candle_core::safetensors::load(base.join("model.safetensors"), &Device::Cpu).unwrap();
        for (name, tensor) in &mut tensors {
            if name.starts_with("vision_model.") {
                let wave: Vec<f32> =
                    (0..tensor.elem_count()).map(|i| 1.0 + 0.2 * (i as f32 * 0.7).sin()).collect();
                let wave = Tensor::from_vec(wave, tensor.dims(), &Device::Cpu).unwrap();
                *tensor = (tensor.to_dtype(DType::F32).unwrap() * wave).unwrap();
            }
        }
        candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
        (temporary, folder)
    });
    folder
}

/// Runs an analysis of pocket and its sibling; what it printed and what it wrote.
fn analyze(name: &str, out: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["analyze", name, "--robust", sibling().to_str().unwrap(), "--json"];
    arguments.extend(["--out", out.to_str().unwrap()]);
    arguments.extend(more);
    command(&arguments)
}

/// Whether two documents are the same but for the last bits of numbers, which JSON may lose.
fn alike(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| alike(value, other)))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| alike(a, b)),
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 1e-12 * a.abs().max(1.0)
        }
        _ => a == b,
    }
}

/// Checks the three files of an analysis and returns its document.
fn files<T>(name: &str, output: &Output, out: &Path) -> Analysis<T>
where
    T: serde::de::DeserializeOwned + serde::Serialize,
{
    assert!(output.status.success(), "{name}: {}", text(&output.stderr));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let written: Value =
        serde_json::from_str(&std::fs::read_to_string(out.join(format!("{name}.json"))).unwrap()).unwrap();
    assert!(alike(&printed, &written), "{name}");
    assert_eq!((&written["schema_version"], &written["analysis"]), (&1.into(), &name.into()));
    let found: Analysis<T> = serde_json::from_value(written.clone()).unwrap();
    assert!(
        alike(&serde_json::to_value(&found).unwrap(), &written),
        "{name}: something is lost when it is read back"
    );
    let mut lines = csv::Reader::from_path(out.join(format!("{name}.csv"))).unwrap();
    let lines = lines.records().collect::<csv::Result<Vec<_>>>().unwrap();
    assert!(lines.len() > 1, "{name}");
    let svg = std::fs::read_to_string(out.join(format!("{name}.svg"))).unwrap();
    assert!(
        svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && svg.ends_with("</svg>\n"),
        "{name}"
    );
    assert!(svg.contains("fill=\"#ffffff\"") && svg.contains("<text") && svg.contains("<title>"), "{name}");
    // Nothing is loaded: no address but the namespace, pictures in the file itself.
    assert_eq!(svg.matches("http").count(), 1, "{name}");
    assert!(svg.matches("href=\"").count() == svg.matches("href=\"data:image/png;base64,").count(), "{name}");
    let drawn: String =
        svg.split("href=\"").map(|part| part.split_once("\"/>").map_or(part, |(_, rest)| rest)).collect();
    assert!(!drawn.contains("NaN") && !svg.contains("<script"), "{name}");
    assert!(text(&output.stderr).lines().count() > 1, "{name}: a table");
    found
}

#[test]
fn every_analysis_runs_writes_its_files_and_is_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let attack = ["--attack", "pgd", "--steps", "2", "--eps", "4/255"];
    let with = |more: &[&'static str]| -> Vec<&str> { attack.iter().chain(more).copied().collect() };
    let replace_flags = with(&["--n", "5", "--parts", "none,b1-attn,out", "--ood-data", "pocket:validation"]);
    let shapley_flags = with(&["--n", "5", "--orders", "3"]);
    let all: [(&str, &[&str]); 6] = [
        ("spectrum", &[]),
        ("cka", &["--n", "10", "--batch", "5"]),
        ("attention", &["--n", "3", "--draw", "2", "--heads"]),
        ("insensitivity", &["--n", "5", "--tokens", "class"]),
        ("replace", &replace_flags),
        ("shapley", &shapley_flags),
    ];
    for (name, flags) in all {
        let (out, again) = (folder.path().join("once"), folder.path().join("again"));
        let output = analyze(name, &out, flags);
        match name {
            "spectrum" => assert!(files::<Spectrum>(name, &output, &out).data.is_none()),
            "cka" => {
                let found = files::<Cka>(name, &output, &out).result;
                assert_eq!((found.batches, found.batch), (2, 5));
                for map in [&found.minibatch, found.exact.as_ref().unwrap()] {
                    for own in [&map.standard, &map.robust] {
                        assert!((0..own.len()).all(|i| (own[i][i].unwrap() - 1.0).abs() < 1e-9), "{own:?}");
                    }
                    assert!(map.cross.iter().flatten().all(|v| v.unwrap() < 1.0), "{:?}", map.cross);
                }
            }
            "attention" => {
                let found = files::<Attention>(name, &output, &out).result;
                assert_eq!((found.pictures, found.drawn.len()), (3, 2));
                for seen in found.drawn.iter().flat_map(|drawn| [&drawn.standard, &drawn.robust]) {
                    let sum = seen.class + seen.patches.iter().sum::<f64>();
                    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
                }
                let svg = std::fs::read_to_string(out.join("attention.svg")).unwrap();
                assert!(svg.contains("head 1") && svg.contains("data:image/png;base64,"));
            }
            "insensitivity" => {
                let found = files::<Insensitivity>(name, &output, &out).result;
                assert_eq!((found.between_pictures.len(), found.with_white.len()), (3, 4));
                for c in found.between_pictures.iter().chain(&found.with_white) {
                    assert!(c.low <= c.value && c.value <= c.high && c.high <= 1.0, "{c:?}");
                }
                assert!(text(&output.stderr).contains("note: 5 pictures; the paper's figure is of 300"));
            }
            "replace" => check_replace(&files::<Replace>(name, &output, &out).result),
            _ => check_shapley(&files::<Shapley>(name, &output, &out).result),
        }
        // With the same seed the same bytes.
        assert!(analyze(name, &again, flags).status.success());
        for end in ["json", "csv", "svg"] {
            let read = |folder: &Path| std::fs::read(folder.join(format!("{name}.{end}"))).unwrap();
            assert!(read(&out) == read(&again), "{name}.{end}");
        }
    }
    // The run goes on where it was, and is not begun again by mistake.
    let out = folder.path().join("once");
    assert_eq!(analyze("replace", &out, &replace_flags).status.code(), Some(1));
    let mut resumed = replace_flags.clone();
    resumed.push("--resume");
    let before = std::fs::read(out.join("replace.json")).unwrap();
    assert!(analyze("replace", &out, &resumed).status.success());
    assert!(std::fs::read(out.join("replace.json")).unwrap() == before);
}

fn check_replace(found: &Replace) {
    assert_eq!(found.stages.iter().map(|stage| stage.replaced).collect::<Vec<_>>(), [0, 2, 2 * blocks() + 2]);
    assert_eq!(found.sets.len(), 2);
    for set in &found.sets {
        for stage in &found.stages {
            let clean = set.row(&stage.name, None).unwrap();
            assert!(clean.n == 5);
            for threat in [ThreatKind::Transfer, ThreatKind::Adaptive] {
                let row = set.row(&stage.name, Some(threat)).unwrap();
                assert!(row.correct <= clean.correct);
            }
        }
        // On the standard tower itself both are the same pictures.
        let of = |threat| set.row("none", Some(threat)).unwrap().correct;
        assert_eq!(of(ThreatKind::Transfer), of(ThreatKind::Adaptive));
    }
}

fn blocks() -> usize {
    let model = Model::find("pocket-clip", &Lookup::default()).unwrap();
    model.tower_config().unwrap().num_hidden_layers
}

fn check_shapley(found: &Shapley) {
    let threats: Vec<_> = found.values.iter().map(|values| values.threat).collect();
    assert_eq!(threats, [None, Some(ThreatKind::Transfer), Some(ThreatKind::Adaptive)]);
    for kind in &found.values {
        assert_eq!(
            (kind.attack.is_some(), kind.surrogate.is_some()),
            (kind.threat.is_some(), kind.threat == Some(ThreatKind::Transfer))
        );
        assert_eq!(kind.heads.len(), found.heads);
        let sum: f64 = kind.heads.iter().map(|head| head.value).sum();
        assert!((sum - (kind.whole - kind.none)).abs() < 1e-9, "{sum} {} {}", kind.whole, kind.none);
        assert!((0.0..=100.0).contains(&kind.whole) && kind.n == 5);
    }
}

#[test]
fn all_heads_are_the_tower_itself() {
    let folder = tempfile::tempdir().unwrap();
    let shapley = analyze(
        "shapley",
        folder.path(),
        &["--n", "40", "--attack", "pgd", "--steps", "1", "--threat", "transfer", "--orders", "1"],
    );
    let whole = files::<Shapley>("shapley", &shapley, folder.path()).result.values[0].whole;
    let replace = analyze(
        "replace",
        folder.path(),
        &["--n", "40", "--attack", "pgd", "--steps", "1", "--threat", "transfer", "--parts", "out"],
    );
    let found = files::<Replace>("replace", &replace, folder.path()).result;
    assert_eq!(found.sets[0].row("out", None).unwrap().value(), whole);
}

#[test]
fn a_picture_that_cannot_be_read_costs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for scene in 0..6 {
        let class = data.join(["apple", "boat"][scene % 2]);
        std::fs::create_dir_all(&class).unwrap();
        let picture = radapt::pocket::draw(radapt::pocket::Split::Test, 0, scene as u64, 96).unwrap().picture;
        picture.save(class.join(format!("{scene}.png"))).unwrap();
    }
    std::fs::write(data.join("apple/broken.jpg"), b"not a picture").unwrap();
    let data = data.to_str().unwrap();
    for (name, more) in [
        ("cka", vec![]),
        ("attention", vec![]),
        ("insensitivity", vec![]),
        ("replace", vec!["--attack", "pgd", "--steps", "1", "--parts", "emb"]),
        ("shapley", vec!["--attack", "pgd", "--steps", "1", "--orders", "1"]),
    ] {
        let flags: Vec<&str> = ["--data", data].into_iter().chain(more).collect();
        let output = analyze(name, folder.path(), &flags);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("warning: pictures that could not be used: 1"), "{name}");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&found["data"]["n"], found["failed"].as_array().unwrap().len()),
            (&6.into(), 1),
            "{name}"
        );
        assert!(found["failed"][0]["id"].as_str().unwrap().contains("broken.jpg"), "{name}");
        assert!(folder.path().join(format!("{name}.svg")).is_file(), "{name}");
    }
}

#[test]
fn wrong_input_is_said_on_one_line_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let name = |name: &str| path(name).display().to_string();
    let (other, qwen) = (name("guide/hf"), name("qwen_chat/qwen2_vl"));
    let own = sibling().display().to_string();
    let cases: Vec<(Vec<&str>, i32, &str)> = vec![
        (vec!["cka", "--robust", &other], 2, "--robust: expected a tower of the standard one's shape"),
        (vec!["spectrum", "--robust", &qwen], 1, "has no CLIP as its vision tower"),
        (vec!["spectrum", "--model", &qwen, "--robust", &own], 1, "has no CLIP as its vision tower"),
        (vec!["spectrum", "--robust", "nowhere/at/all"], 1, "nowhere/at/all"),
        (vec!["spectrum"], 2, "--robust"),
        (vec!["spectrum", "--robust", &own, "--dtype", "bf16"], 2, "analyses are exact"),
        (vec!["attention", "--robust", &own, "--data", empty.to_str().unwrap()], 1, "empty"),
        (vec!["cka", "--robust", &own, "--n", "3"], 2, "at least 4 pictures"),
        (vec!["cka", "--robust", &own, "--batch", "3"], 2, "--batch"),
        (vec!["insensitivity", "--robust", &own, "--n", "1"], 2, "at least 2 pictures"),
        (vec!["insensitivity", "--robust", &own, "--tokens", "some"], 2, "all, class or mean"),
        (vec!["replace", "--robust", &own, "--parts", "b99-mlp"], 2, "--parts"),
        (vec!["replace", "--robust", &own, "--attack", "pdg"], 2, "attack: expected pgd"),
        (vec!["replace", "--robust", &own, "--ood-n", "4"], 2, "--ood-data"),
        (vec!["shapley", "--robust", &own, "--attack", "autoattack"], 2, "a single attack, no suite"),
        (vec!["shapley", "--robust", "pocket-clip", "--n", "2"], 2, "another model than --model"),
    ];
    for (arguments, code, says) in cases {
        let out = folder.path().join("out");
        let mut all = vec!["analyze"];
        all.extend(&arguments);
        all.extend(["--out", out.to_str().unwrap()]);
        let output = command(&all);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        assert!(!out.join(format!("{}.json", arguments[0])).exists(), "{arguments:?}");
    }
}
