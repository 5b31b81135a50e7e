//! The anchor file: what goes in comes out, and whatever else is given is refused in one clear line.

mod fixture;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};
use fixture::{Fixture, Memory, assert_same, clip, clip_config};
use radapt::Error;
use radapt::defense::acquire::training_free;
use radapt::defense::{Anchor, AnchorMeta, Method};
use radapt::image::Contract;
use radapt::tower::VisionTower;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A small anchor: 2 x 3 patches, a class token, width 4.
fn small(method: Method) -> Anchor {
    let values: Vec<f32> = (0..28).map(|i| (i as f32 - 13.7) / 3.0).collect();
    let keys = ["eps", "epochs", "images", "attack", "examples", "objective", "seed", "losses"];
    let training = keys.map(|key| (key.to_string(), format!("the {key}")));
    let meta = AnchorMeta {
        method,
        base_model: "openai/clip-vit-large-patch14-336".into(),
        base_revision: "ce19dc912ca5cd21c8a653c79e251e808ccabcd1".into(),
        fingerprint: "0123456789abcdef".repeat(4),
        guide_model: String::new(),
        interpolated_from: None,
        grid: (2, 3),
        class_token: true,
        image_size: 336,
        contract: Contract::LlavaPad,
        alpha: 1.2,
        beta: -0.8,
        cutoff: 40.0,
        training: if method == Method::DataDriven { training.into() } else { BTreeMap::new() },
    };
    Anchor { values: Tensor::from_vec(values, (7, 4), &Device::Cpu).unwrap(), meta }
}

/// The header and the data of an anchor's file.
fn taken_apart(anchor: &Anchor) -> (Value, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(saved(anchor, &folder)).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..end]).unwrap(), bytes[end..].to_vec())
}

/// Those of the small data-driven anchor, which has every key.
fn full() -> (Value, Vec<u8>) {
    static FULL: LazyLock<(Value, Vec<u8>)> = LazyLock::new(|| taken_apart(&small(Method::DataDriven)));
    FULL.clone()
}

fn put_together(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn saved(anchor: &Anchor, folder: &TempDir) -> PathBuf {
    let path = folder.path().join("a.safetensors");
    anchor.save(&path).unwrap();
    path
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

// --- Round trips -------------------------------------------------------------------------------

#[test]
fn what_is_saved_is_what_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for method in [Method::TrainingFree, Method::ModelGuided, Method::DataDriven] {
        let mut anchor = small(method);
        anchor.meta.guide_model = "a \"guide\" of µ\n".into();
        (anchor.meta.alpha, anchor.meta.beta, anchor.meta.cutoff) = (0.1 + 0.2, -1e-300, f64::MIN_POSITIVE);
        let loaded = Anchor::load(&saved(&anchor, &folder)).unwrap();
        assert_same("values", &loaded.values, &anchor.values);
        assert_eq!(loaded.values.dtype(), DType::F32);
        assert_eq!(loaded.meta, anchor.meta);
        assert_eq!(loaded.sha256().unwrap(), anchor.sha256().unwrap());
    }
}

#[test]
fn extreme_finite_values_survive() {
    let folder = tempfile::tempdir().unwrap();
    let mut anchor = small(Method::TrainingFree);
    let mut values = vec![0.0f32; 28];
    values[..6].copy_from_slice(&[
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -0.0,
        f32::EPSILON,
    ]);
    anchor.values = Tensor::from_vec(values, (7, 4), &Device::Cpu).unwrap();
    assert_same("values", &Anchor::load(&saved(&anchor, &folder)).unwrap().values, &anchor.values);
}

#[test]
fn an_anchor_without_class_token_has_a_row_per_patch() {
    let folder = tempfile::tempdir().unwrap();
    let mut anchor = small(Method::TrainingFree);
    anchor.meta.class_token = false;
    assert!(anchor.save(&folder.path().join("a")).is_err(), "7 rows are one too many");
    anchor.values = anchor.values.narrow(0, 0, 6).unwrap();
    assert_eq!(Anchor::load(&saved(&anchor, &folder)).unwrap().meta, anchor.meta);
}

#[test]
fn a_towers_own_anchor_goes_through_a_file_and_fits() {
    let folder = tempfile::tempdir().unwrap();
    let tower = clip("v4");
    let mut anchor = small(Method::TrainingFree);
    anchor.values = training_free(&tower).unwrap();
    (anchor.meta.grid, anchor.meta.image_size, anchor.meta.fingerprint) =
        ((5, 5), 20, tower.fingerprint().unwrap());
    let loaded = Anchor::load(&saved(&anchor, &folder)).unwrap();
    assert_same("values", &loaded.values, &anchor.values);
    loaded.check(tower.spec(), &tower.fingerprint().unwrap(), false).unwrap();
}

#[test]
fn the_same_anchor_makes_the_same_bytes_and_another_makes_others() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |anchor: &Anchor| fs::read(saved(anchor, &folder)).unwrap();
    let first = bytes(&small(Method::DataDriven));
    // Hash maps are seeded anew in every one of them.
    for _ in 0..20 {
        assert_eq!(bytes(&small(Method::DataDriven)), first);
    }
    let mut other = small(Method::DataDriven);
    other.meta.training.insert("seed".into(), "1".into());
    assert_ne!(bytes(&other), first);
    assert_ne!(other.sha256().unwrap(), small(Method::DataDriven).sha256().unwrap());
}

#[test]
fn the_file_is_one_that_any_safetensors_reader_takes() {
    let folder = tempfile::tempdir().unwrap();
    let anchor = small(Method::DataDriven);
    let path = saved(&anchor, &folder);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0, "the data is aligned");
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let metadata: BTreeMap<_, _> = header.metadata().clone().unwrap().into_iter().collect();
    assert_eq!(metadata, anchor.meta.entries());
    assert_eq!(metadata["radapt.version"], "1");
    assert_eq!(metadata["radapt.grid"], "2x3");
    assert_eq!(metadata["radapt.contract"], "llava-pad");
    assert_eq!(metadata.len(), 21);
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    assert_eq!(tensors.len(), 1);
    assert_same("anchor", &tensors["anchor"], &anchor.values);
}

// --- Saving ------------------------------------------------------------------------------------

#[test]
fn saving_replaces_the_old_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(&small(Method::TrainingFree), &folder);
    small(Method::DataDriven).save(&path).unwrap();
    assert_eq!(names(folder.path()), ["a.safetensors"]);
    assert_eq!(Anchor::load(&path).unwrap().meta, small(Method::DataDriven).meta);
}

#[test]
fn a_save_that_fails_keeps_the_old_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // Its own name is allowed, the longer one of a partial file is not: writing fails, for root too.
    let path = folder.path().join("n".repeat(250));
    fs::write(&path, "old").unwrap();
    let error = small(Method::TrainingFree).save(&path).unwrap_err();
    assert!(matches!(&error, Error::Write { path: named, .. } if *named == path), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(names(folder.path()).len(), 1);

    // Here the partial file is written and cannot be moved.
    let target = folder.path().join("folder");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("inside"), "").unwrap();
    assert!(small(Method::TrainingFree).save(&target).is_err());
    assert_eq!(names(folder.path()).len(), 2);
    assert_eq!(names(&target), ["inside"]);
}

#[test]
fn saving_into_no_folder_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    for path in [folder.path().join("nowhere/a"), folder.path().join("file/a"), folder.path().join("..")] {
        let error = small(Method::TrainingFree).save(&path).unwrap_err();
        assert!(error.to_string().starts_with(&format!("cannot write `{}`: ", path.display())), "{error}");
    }
    assert_eq!(names(folder.path()), ["file"]);
}

#[test]
fn an_anchor_that_could_not_be_loaded_is_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(&small(Method::DataDriven), &folder);
    let old = fs::read(&path).unwrap();
    type Change = fn(&mut Anchor);
    let changes: [(&str, Change); 9] = [
        ("rows", |a| a.values = a.values.narrow(0, 0, 6).unwrap()),
        ("a matrix", |a| a.values = a.values.unsqueeze(0).unwrap()),
        ("finite values", |a| a.values = (&a.values / 0.0).unwrap()),
        ("alpha", |a| a.meta.alpha = f64::NAN),
        ("cutoff", |a| a.meta.cutoff = 0.0),
        ("fingerprint", |a| a.meta.fingerprint = "abc".into()),
        ("image size", |a| a.meta.image_size = 0),
        ("training key", |a| drop(a.meta.training.remove("eps"))),
        ("unknown key", |a| drop(a.meta.training.insert("mood".into(), "good".into()))),
    ];
    for (what, change) in changes {
        let mut anchor = small(Method::DataDriven);
        change(&mut anchor);
        assert!(anchor.save(&path).is_err(), "{what}");
        assert!(anchor.sha256().is_err(), "{what}");
        assert_eq!(fs::read(&path).unwrap(), old, "{what}");
    }
}

#[test]
fn threads_that_save_one_file_leave_one_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    std::thread::scope(|scope| {
        for method in [Method::TrainingFree, Method::ModelGuided, Method::DataDriven, Method::TrainingFree] {
            let path = &path;
            scope.spawn(move || (0..25).for_each(|_| small(method).save(path).unwrap()));
        }
    });
    assert_eq!(names(folder.path()), ["a.safetensors"]);
    Anchor::load(&path).unwrap();
}

// --- Damaged files -----------------------------------------------------------------------------

/// A file that is no anchor: what it is, its bytes, what the error must say.
struct Broken(String, Vec<u8>, &'static str);

/// With one metadata key set, or taken away where `value` is null.
fn with_key(key: &str, value: Value) -> Vec<u8> {
    let (mut header, data) = full();
    let metadata = header["__metadata__"].as_object_mut().unwrap();
    assert!(metadata.contains_key(key), "{key}");
    if value.is_null() {
        metadata.remove(key);
    } else {
        metadata.insert(key.into(), value);
    }
    put_together(&header, &data)
}

fn with_tensor(entry: Value, data: &[u8]) -> Vec<u8> {
    let (mut header, _) = full();
    header["anchor"] = entry;
    put_together(&header, data)
}

fn broken_files() -> Vec<Broken> {
    let (header, data) = full();
    let whole = put_together(&header, &data);
    let mut files = Vec::new();
    let mut add = |what: String, bytes: Vec<u8>, part| files.push(Broken(what, bytes, part));

    let damaged = "is not a complete safetensors file";
    let end = whole.len() - data.len();
    for length in [0, 1, 7, 8, 9, end / 2, end - 1, end, end + 1, end + data.len() / 2, whole.len() - 1] {
        add(format!("the first {length} bytes"), whole[..length].to_vec(), damaged);
    }
    add("one byte too many".into(), [&whole[..], &[0]].concat(), damaged);
    add("text".into(), b"this is not an anchor, it is a sentence".to_vec(), damaged);
    let mut rng = StdRng::seed_from_u64(1);
    add("random bytes".into(), (0..1000).map(|_| rng.random()).collect(), damaged);
    for length in [u64::MAX, 1 << 63, 1 << 40, 100_000_001, whole.len() as u64] {
        add(format!("a header of {length} bytes"), [&length.to_le_bytes(), &whole[8..]].concat(), damaged);
    }
    add("a header that is a list".into(), put_together(&json!([1, 2]), &data), damaged);
    add("a header that is not UTF-8".into(), [&4u64.to_le_bytes()[..], b"{\xff\xfe}"].concat(), damaged);
    add(
        "a header of many levels".into(),
        {
            let nested = "{\"a\":".repeat(100_000);
            [&(nested.len() as u64).to_le_bytes(), nested.as_bytes()].concat()
        },
        damaged,
    );
    add("metadata that is a number".into(), with_key("radapt.alpha", json!(1.2)), damaged);

    let mut plain = header.clone();
    plain.as_object_mut().unwrap().remove("__metadata__");
    add("no metadata".into(), put_together(&plain, &data), "no `radapt.version`: it is not an anchor");
    for key in header["__metadata__"].as_object().unwrap().keys() {
        // A key's own name is part of the message; `leak` makes it a constant for the table.
        let part = format!("no `{key}`").leak();
        add(format!("without {key}"), with_key(key, Value::Null), part);
    }
    let values: [(&str, &[&str], &str); 13] = [
        ("version", &["0", "2", "1.0", "01", "", "x\ny"], "this radapt reads version 1"),
        ("method", &["", "free", "Training-Free", "data driven"], "radapt.method: expected training-free"),
        (
            "grid",
            &["", "x", "6", "2x", "x3", "axb", "0x3", "2x0", "-2x3", "2x3x1", "2 x 3", "2,3"],
            "radapt.grid: expected ROWSxCOLUMNS",
        ),
        ("grid", &["99999999999999999999999x1"], "radapt.grid: expected ROWSxCOLUMNS"),
        ("grid", &["3x3", "1x6x", "99999999999x99999999999", "18446744073709551615x1"], "grid"),
        ("class_token", &["", "yes", "1", "True"], "radapt.class_token: expected true or false"),
        ("class_token", &["false"], "grid 2x3 without class token makes 6 rows"),
        (
            "fingerprint",
            &["", "abc", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64)],
            "expected 64 hexadecimal digits",
        ),
        (
            "image_size",
            &["", "0", "-1", "336.0", "99999999999999999999999"],
            "radapt.image_size: expected a number of pixels",
        ),
        ("contract", &["", "Clip", "llava"], "radapt.contract: expected"),
        (
            "alpha",
            &["", "abc", "inf", "-inf", "NaN", "1e999", "1,2"],
            "radapt.alpha: expected a finite number",
        ),
        ("beta", &["", "abc", "inf", "NaN"], "radapt.beta: expected a finite number"),
        (
            "cutoff",
            &["", "0", "-0", "-1", "inf", "NaN", "forty"],
            "radapt.cutoff: expected a positive number",
        ),
    ];
    for (key, found, part) in values {
        for value in found {
            add(format!("{key} `{value}`"), with_key(&format!("radapt.{key}"), json!(value)), part);
        }
    }
    let endless = "9".repeat(50_000);
    add("an endless version".into(), with_key("radapt.version", json!(endless)), "is of version `999");
    add(
        "a version that moves the cursor".into(),
        with_key("radapt.version", json!("\u{1b}[2J\r\n")),
        "is of version `\\u{1b}[2J",
    );

    let entry = |dtype: &str, shape: Value, bytes: usize| json!({"dtype": dtype, "shape": shape, "data_offsets": [0, bytes]});
    let shapes = [
        (json!([28]), "[28], expected [N, D]"),
        (json!([1, 7, 4]), "[1, 7, 4], expected [N, D]"),
        (json!([4, 7]), "[4, 7], but grid 2x3 with a class token makes 7 rows"),
        (json!([28, 1]), "[28, 1], but grid"),
        (json!([7, 5]), damaged),
        (json!([usize::MAX, 4]), damaged),
    ];
    for (shape, part) in shapes {
        add(format!("shape {shape}"), with_tensor(entry("F32", shape, 112), &data), part);
    }
    add("width 0".into(), with_tensor(entry("F32", json!([7, 0]), 0), &[]), "[7, 0], but grid");
    add("a number".into(), with_tensor(entry("F32", json!([]), 4), &data[..4]), "expected [N, D]");
    for (dtype, bytes) in [("F16", 56), ("BF16", 56), ("F64", 224), ("I32", 112), ("U8", 28)] {
        let data = vec![0; bytes];
        add(dtype.into(), with_tensor(entry(dtype, json!([7, 4]), bytes), &data), "expected F32");
    }
    for (at, value, part) in
        [(0, f32::NAN, "row 0"), (27, f32::INFINITY, "row 6"), (11, f32::NEG_INFINITY, "row 2")]
    {
        let mut data = data.clone();
        data[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
        add(format!("{value} at {at}"), put_together(&header, &data), part);
    }
    let mut renamed = header.clone();
    let tensor = renamed.as_object_mut().unwrap().remove("anchor").unwrap();
    renamed["other\nname"] = tensor;
    add(
        "another tensor".into(),
        put_together(&renamed, &data),
        "has no tensor `anchor`; it has: other\\nname",
    );
    files
}

#[test]
fn every_broken_file_gives_one_clear_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broken.safetensors");
    let files = broken_files();
    assert!(files.len() >= 100, "{}", files.len());
    for Broken(what, bytes, part) in files {
        fs::write(&path, bytes).unwrap();
        let error = Anchor::load(&path).err().unwrap_or_else(|| panic!("{what} is taken for an anchor"));
        let text = error.to_string();
        println!("{what}: {text}");
        assert!(matches!(error, Error::Anchor { .. }), "{what}: {text}");
        assert!(text.starts_with(&format!("anchor `{}`: ", path.display())), "{what}: {text}");
        assert!(text.contains(part), "{what}: `{text}` does not say `{part}`");
        assert!(!text.chars().any(char::is_control) && text.len() < 700, "{what}: {text}");
    }
}

#[test]
fn the_table_breaks_a_file_that_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("whole.safetensors");
    let (header, data) = full();
    fs::write(&path, put_together(&header, &data)).unwrap();
    assert_eq!(Anchor::load(&path).unwrap().meta, small(Method::DataDriven).meta);
    // What others may add is no fault.
    for bytes in [
        with_key("radapt.grid", json!("2x3")),
        with_key("radapt.fingerprint", json!("0123456789ABCDEF".repeat(4))),
    ] {
        fs::write(&path, bytes).unwrap();
        assert_eq!(Anchor::load(&path).unwrap().meta, small(Method::DataDriven).meta);
    }
    let mut more = header.clone();
    more["__metadata__"]["somebody.else"] = json!("note");
    fs::write(&path, put_together(&more, &data)).unwrap();
    assert_eq!(Anchor::load(&path).unwrap().meta, small(Method::DataDriven).meta);
}

#[test]
fn only_data_driven_anchors_need_to_say_how_they_were_trained() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let (mut header, data) = taken_apart(&small(Method::TrainingFree));
    for (method, fine) in [("training-free", true), ("model-guided", true), ("data-driven", false)] {
        header["__metadata__"]["radapt.method"] = json!(method);
        fs::write(&path, put_together(&header, &data)).unwrap();
        assert_eq!(Anchor::load(&path).is_ok(), fine, "{method}");
    }
}

#[test]
fn what_is_no_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let found = Anchor::load(folder.path()).unwrap_err().to_string();
    assert_eq!(found, format!("anchor `{}`: is not a file", folder.path().display()));
    let missing = folder.path().join("missing.safetensors");
    let found = Anchor::load(&missing).unwrap_err().to_string();
    assert!(found.starts_with(&format!("cannot read `{}`: ", missing.display())), "{found}");
}

#[test]
fn a_file_too_large_for_an_anchor_is_not_even_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    // Sparse: it takes no room on the disk.
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let found = Anchor::load(&path).unwrap_err().to_string();
    assert!(found.contains("has 1099511627776 bytes, more than any anchor"), "{found}");
}

/// Whatever happens to a file, it is refused, or is an anchor that can be saved again.
#[test]
fn mutated_files_are_refused_or_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mutated = folder.path().join("mutated");
    let (header, data) = full();
    let whole = put_together(&header, &data);
    let header_end = whole.len() - data.len();
    let mut rng = StdRng::seed_from_u64(7);
    let (mut refused, mut taken) = (0, 0);
    for round in 0..5000 {
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            // Half of them in the header, where most can go wrong.
            let end = if rng.random() { header_end } else { bytes.len() };
            let at = rng.random_range(0..end.min(bytes.len()));
            match rng.random_range(0..5) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                2 => bytes[at] = *b"0123456789{}[]\",:.-x\\ ".choose(&mut rng).unwrap(),
                3 => drop(bytes.remove(at)),
                _ => bytes.insert(at, rng.random()),
            }
        }
        fs::write(&mutated, &bytes).unwrap();
        let loaded = Anchor::load(&mutated);
        // Overwriting it would wait for the disk.
        fs::remove_file(&mutated).unwrap();
        match loaded {
            Ok(anchor) => {
                taken += 1;
                // Makes its file, which must be one that reads back as the same anchor.
                anchor.sha256().unwrap_or_else(|e| panic!("round {round}: {e}"));
            }
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(!text.chars().any(char::is_control), "round {round}: {text}");
            }
        }
    }
    println!("{refused} refused, {taken} taken");
    assert!(refused > 1000 && taken > 100, "{refused} refused, {taken} taken");
}

// --- Whether it fits ---------------------------------------------------------------------------

/// The anchor of `clip/v4`.
fn fitting() -> Anchor {
    let tower = clip("v4");
    let mut anchor = small(Method::TrainingFree);
    anchor.values = training_free(&tower).unwrap();
    (anchor.meta.grid, anchor.meta.image_size, anchor.meta.fingerprint) =
        ((5, 5), 20, tower.fingerprint().unwrap());
    anchor
}

#[test]
fn another_shape_never_fits() {
    let tower = clip("v4");
    let fingerprint = tower.fingerprint().unwrap();
    let anchor = fitting();
    anchor.check(tower.spec(), &fingerprint, false).unwrap();

    let mut wide = anchor.clone();
    wide.values = Tensor::zeros((26, 64), DType::F32, &Device::Cpu).unwrap();
    let mut tall = anchor.clone();
    (tall.values, tall.meta.grid) = (Tensor::zeros((37, 32), DType::F32, &Device::Cpu).unwrap(), (6, 6));
    // As many rows, but other patches.
    let mut turned = anchor.clone();
    turned.meta.grid = (25, 1);
    let mut headless = anchor.clone();
    (headless.meta.grid, headless.meta.class_token) = ((13, 2), false);
    for (what, anchor) in [("wide", wide), ("tall", tall), ("turned", turned), ("headless", headless)] {
        for allow in [false, true] {
            let error = anchor.check(tower.spec(), &fingerprint, allow).expect_err(what);
            assert!(matches!(error, Error::AnchorMismatch { .. }), "{what}: {error}");
            assert!(error.to_string().contains("the tower needs [26, 32]"), "{what}: {error}");
            let ((h, w), hint) = (anchor.meta.grid, error.hint().unwrap());
            let want = format!(
                "this anchor is for {h}x{w} patches of `{}` at 20 pixels; the model has 5x5 at 20",
                anchor.meta.base_model
            );
            assert_eq!(hint, want, "{what}");
        }
    }
}

#[test]
fn another_fingerprint_fits_only_where_that_is_allowed() {
    let tower = clip("v4");
    let mut anchor = fitting();
    anchor.meta.fingerprint = "f".repeat(64);
    anchor.meta.base_model = "some/model\n".into();
    let fingerprint = tower.fingerprint().unwrap();
    anchor.check(tower.spec(), &fingerprint, true).unwrap();
    let error = anchor.check(tower.spec(), &fingerprint, false).unwrap_err();
    let text = format!(
        "anchor does not fit this model: it was made on a tower with fingerprint ffffffffffff..., this one has {}...",
        &fingerprint[..12]
    );
    assert_eq!(error.to_string(), text);
    assert_eq!(
        error.hint().unwrap(),
        "it was made on `some/model\\n`; `--allow-mismatch` uses it all the same"
    );
}

// --- The fingerprint ---------------------------------------------------------------------------

#[test]
fn one_trunk_has_one_fingerprint_however_it_is_stored() {
    let tower = clip("v4");
    let fingerprint = tower.fingerprint().unwrap();
    assert!(
        fingerprint.len() == 64
            && fingerprint.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    );
    for folder in ["v5", "v5_sharded", "v5_bare"] {
        assert_eq!(clip(folder).fingerprint().unwrap(), fingerprint, "{folder}");
    }
    let half = tower.to_dtype(DType::F16).unwrap();
    assert_eq!(half.fingerprint().unwrap(), fingerprint, "in f16");
    assert_eq!(half.to_dtype(DType::F32).unwrap().fingerprint().unwrap(), fingerprint, "rounded to f16");
    let rough = tower.to_dtype(DType::BF16).unwrap();
    assert_ne!(rough.fingerprint().unwrap(), fingerprint, "rounded to bf16");
}

#[test]
fn the_fingerprint_covers_all_of_the_trunk_and_nothing_else() {
    let config = clip_config("v5_bare");
    let tower = clip("v5_bare");
    let fingerprint = tower.fingerprint().unwrap();
    let memory = Memory::of(&tower);
    let (mut inside, mut outside) = (0, 0);
    for (name, tensor) in tower.tensors().unwrap() {
        // One entry, by one part in a hundred.
        let last = tensor.elem_count() - 1;
        let changed = memory.clone().change(&name, |tensor| {
            let mut values = tensor.flatten_all()?.to_vec1::<f32>()?;
            values[last] = values[last] * 1.01 + 0.001;
            Tensor::from_vec(values, tensor.dims(), &Device::Cpu)
        });
        let same = changed.tower(&config).fingerprint().unwrap() == fingerprint;
        let trunk = name.starts_with("embeddings.")
            || name.starts_with("pre_")
            || name.starts_with("encoder.layers.0.");
        assert_eq!(same, !trunk, "{name}");
        if trunk { inside += 1 } else { outside += 1 }
    }
    assert_eq!((inside, outside), (3 + 2 + 16, 3 * 16 + 2));
}

#[test]
fn weights_that_change_places_change_the_fingerprint() {
    let tower = clip("v5_bare");
    let memory = Memory::of(&tower);
    let (q, k) = ("encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.k_proj.weight");
    let mut swapped = memory.clone();
    swapped.0.insert(q.into(), memory.0[k].clone());
    swapped.0.insert(k.into(), memory.0[q].clone());
    let swapped = swapped.tower(&clip_config("v5_bare"));
    assert_ne!(swapped.fingerprint().unwrap(), tower.fingerprint().unwrap());
    // The picture's own normalisation and the activation are no weights.
    assert_eq!(clip("gelu").fingerprint().unwrap(), tower.fingerprint().unwrap());
}

#[test]
fn the_fixtures_anchor_is_the_towers_own() {
    let want = Fixture::open("clip/expected.safetensors").tensor("anchor");
    fixture::assert_close("anchor", &fitting().values, &want, 1e-5);
}
