//! `radapt pocket draw` and `sheet`: files that parse and agree, the same bytes every time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use radapt::pocket::{Dataset, KINDS, Split, draw};
use serde_json::{Value, json};

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Draws into `folder` and returns what stdout says.
fn drawn(folder: &Path, arguments: &[&str]) -> String {
    let out = folder.display().to_string();
    let output = radapt(&[&["pocket", "draw", "--out", &out], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// A failed command says one line and at most a hint, and leaves stdout empty.
fn fails(arguments: &[&str], code: i32, says: &str) -> String {
    let output = radapt(arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", text(&output.stdout));
    assert!(stderr.starts_with("error: ") && stderr.contains(says), "{arguments:?}: no `{says}` in {stderr}");
    stderr
}

fn parsed(file: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(file).expect("a file")).expect("JSON")
}

fn rows(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn keys(value: &Value) -> Vec<&str> {
    // serde_json sorts keys or keeps their order, as some other crate's features have it.
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Every file below a folder, by its path inside.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for path in std::fs::read_dir(next).expect("a folder").flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).expect("below it").to_path_buf();
                found.insert(name, std::fs::read(&path).expect("a file"));
            }
        }
    }
    found
}

#[test]
fn every_file_says_what_the_scenes_say() {
    let root = tempfile::tempdir().expect("a folder");
    let folder = root.path().join("new/world");
    // More than are drawn at once.
    let (n, start, seed) = (300, 41, 5);
    let said = drawn(&folder, &["--n", "300", "--start", "41", "--seed", "5", "--split", "validation"]);
    assert_eq!(said.trim_end(), folder.display().to_string());

    let lists = [
        ("object_descriptions_main", ["caption", "image"]),
        ("target_obj_sim", ["image", "replace"]),
        ("vqa_main", ["image", "vqa"]),
    ]
    .map(|(name, expected)| {
        let list = parsed(&folder.join(format!("pocket_{name}.json")));
        assert_eq!(rows(&list).len(), n, "{name}");
        assert!(rows(&list).iter().all(|row| keys(row) == expected), "{name}");
        list
    });
    let [descriptions, targets, questions] = &lists;
    let answers = parsed(&folder.join("pocket_vqa_answers.json"));
    let instances = parsed(&folder.join("annotations/instances.json"));
    let captions = parsed(&folder.join("annotations/captions.json"));
    assert_eq!(keys(&instances), ["annotations", "categories", "images", "info", "licenses"]);
    assert_eq!(keys(&captions), ["annotations", "images", "info", "licenses"]);
    assert_eq!(instances["images"], captions["images"]);
    let labels = std::fs::read_to_string(folder.join("labels.tsv")).expect("a file");
    let labels: Vec<_> = labels.lines().map(|line| line.split_once('\t').expect("two columns")).collect();
    let classes = std::fs::read_to_string(folder.join("classnames.txt")).expect("a file");
    let classes: Vec<_> = classes.lines().collect();
    assert_eq!(classes, KINDS.each_ref().map(|kind| kind.name));
    for list in [&answers, &instances["annotations"], &captions["annotations"], &captions["images"]] {
        assert_eq!(rows(list).len(), n);
    }
    assert_eq!(labels.len(), n);
    for (place, category) in rows(&instances["categories"]).iter().enumerate() {
        let kind = &KINDS[place];
        let want = json!({"id": place + 1, "name": kind.name, "supercategory": kind.category});
        assert_eq!(*category, want);
    }

    for row in 0..n {
        let index = start + row as u64;
        let scene = draw(Split::Validation, seed, index, 96).expect("an allowed size");
        let name = format!("{index:012}.png");
        assert_eq!(name, Dataset::file_name(index));
        let picture = image::open(folder.join("images").join(&name)).expect("a picture").into_rgb8();
        assert_eq!(picture, scene.picture, "{name}");

        for list in [descriptions, targets, questions, &answers] {
            assert_eq!(list[row]["image"], name);
        }
        let caption = descriptions[row]["caption"][0].as_str().expect("text");
        let (keyword, rest) = caption.split_once(": ").expect("a keyword");
        assert_eq!((keyword.to_lowercase().as_str(), rest), (scene.name(), scene.caption.as_str()));
        assert!(keyword.starts_with(char::is_uppercase), "{keyword}");
        let target = KINDS[scene.target].name;
        assert_eq!(targets[row]["replace"], json!([format!("{target}: {}", scene.target_caption)]));
        assert_eq!(questions[row]["vqa"], json!(scene.questions.each_ref().map(|q| &q.question)));
        assert_eq!(answers[row]["answers"], json!(scene.questions.each_ref().map(|q| &q.answer)));
        let more: Vec<_> =
            scene.more.iter().map(|q| json!({"question": q.question, "answer": q.answer})).collect();
        assert_eq!(answers[row]["more"], json!(more));

        assert_eq!(labels[row], (name.as_str(), scene.kind.to_string().as_str()));
        let image = &instances["images"][row];
        let want = json!({"id": index, "file_name": name, "width": 96, "height": 96, "license": 1});
        assert_eq!(*image, want);
        let said = json!({"image_id": index, "id": index + 1, "caption": scene.caption});
        assert_eq!(captions["annotations"][row], said);
        let instance = &instances["annotations"][row];
        assert_eq!(
            (&instance["id"], &instance["image_id"], &instance["category_id"]),
            (&json!(index + 1), &json!(index), &json!(scene.kind + 1))
        );
        assert_eq!((&instance["iscrowd"], &instance["segmentation"]), (&json!(0), &json!([])));
        let bbox: Vec<f64> = rows(&instance["bbox"]).iter().filter_map(Value::as_f64).collect();
        let [left, top, width, height] = bbox[..] else { panic!("{bbox:?}") };
        assert!(left >= 0.0 && top >= 0.0 && width > 20.0 && height > 20.0, "{bbox:?}");
        assert!(left + width < 96.0 + 1e-9 && top + height < 96.0 + 1e-9, "{bbox:?}");
        for (found, want) in bbox.iter().zip(scene.bbox) {
            assert!((found - f64::from(want)).abs() < 0.02, "{bbox:?} {:?}", scene.bbox);
        }
        assert!((instance["area"].as_f64().expect("a number") - width * height).abs() < 1e-6);
    }

    let templates =
        std::fs::read_to_string(folder.join("zeroshot_classification_templates.txt")).expect("a file");
    assert_eq!(templates, "a photo of a {c}.\n");
    let readme = std::fs::read_to_string(folder.join("README.md")).expect("a file");
    assert_eq!(readme.lines().filter(|line| !line.is_empty()).count(), 3);
    let command = "radapt pocket draw --n 300 --size 96 --split validation --start 41 --seed 5 --out DIR";
    assert!(readme.contains(command) && readme.contains("CC0-1.0"), "{readme}");
    // All of it, and nothing else.
    assert_eq!(contents(&folder).len(), n + Dataset::FILES.len());
}

#[test]
fn the_same_arguments_give_the_same_bytes() {
    let root = tempfile::tempdir().expect("a folder");
    let run = |name: &str, more: &[&str]| {
        let folder = root.path().join(name);
        drawn(&folder, &[&["--n", "5"], more].concat());
        contents(&folder)
    };
    let first = run("a", &[]);
    assert_eq!(first, run("b", &["--split", "test", "--size", "96", "--start", "0", "--seed", "0"]));
    let picture = |found: &BTreeMap<PathBuf, Vec<u8>>, index: u64| {
        found[&Path::new("images").join(Dataset::file_name(index))].clone()
    };
    for other in [["--split", "train"], ["--split", "validation"], ["--seed", "1"], ["--size", "97"]] {
        let found = run(&other.concat(), &other);
        for index in 0..5 {
            assert_ne!(picture(&first, index), picture(&found, index), "{other:?}");
        }
    }
    // A later start goes on where the first run ends.
    let later = run("later", &["--start", "3"]);
    assert_eq!((picture(&first, 3), picture(&first, 4)), (picture(&later, 3), picture(&later, 4)));
}

#[test]
fn json_says_what_was_written() {
    let root = tempfile::tempdir().expect("a folder");
    // A folder that is there, with something of its own in it.
    std::fs::write(root.path().join("notes.txt"), "mine").expect("written");
    let said: Value = serde_json::from_str(&drawn(root.path(), &["--n", "2", "--json"])).expect("JSON");
    let want = json!({
        "n": 2, "out": root.path().display().to_string(), "images": "images", "files": Dataset::FILES,
        "kinds": 26, "seed": 0, "split": "test", "start": 0, "size": 96, "schema_version": 1,
    });
    assert_eq!(said, want);
    for file in Dataset::FILES {
        assert!(root.path().join(file).is_file(), "{file}");
    }
    assert_eq!(std::fs::read_to_string(root.path().join("notes.txt")).expect("a file"), "mine");
}

/// A document's shape: its lines without the values.
fn shape(document: &str) -> Vec<String> {
    let mask = |line: &str| match line.split_once("\": ") {
        Some((key, value)) if value.starts_with('"') => format!("{key}: S{}", &value[value.len() - 1..]),
        Some(_) => line.to_owned(),
        None if line.trim_start().starts_with('"') => {
            let indent = line.len() - line.trim_start().len();
            format!("{}S{}", &line[..indent], &line[line.len() - 1..])
        }
        None => line.to_owned(),
    };
    document.split('\n').map(mask).collect()
}

#[test]
fn the_files_are_those_of_v_attack() {
    let root = tempfile::tempdir().expect("a folder");
    let folder = root.path().join("world");
    drawn(&folder, &["--n", "300"]);
    let read = |path: PathBuf| std::fs::read_to_string(path).expect("a file");
    let main = read(folder.join("pocket_object_descriptions_main.json"));
    assert!(main.starts_with("[\n    {\n        \"image\": \"000000000000.png\",\n        \"caption\": [\n"));
    assert!(main.ends_with("\n        ]\n    }\n]"));

    let originals = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/coco");
    if !originals.is_dir() {
        eprintln!("SKIPPED: no {}", originals.display());
        return;
    }
    for name in ["object_descriptions_main", "target_obj_sim", "vqa_main"] {
        let ours = shape(&read(folder.join(format!("pocket_{name}.json"))));
        let theirs = shape(&read(originals.join(format!("coco300_{name}.json"))));
        if name == "vqa_main" {
            // Four of their rows have a fourth string.
            assert_eq!(ours[..600], theirs[..600], "{name}");
        } else {
            assert_eq!(ours, theirs, "{name}");
        }
    }
}

#[test]
fn bad_usage_is_refused() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("world").display().to_string();
    for (arguments, says) in [
        (&["--n", "0"][..], "--n"),
        (&["--n", "-1"], "-1"),
        (&[], "--n"),
        (&["--n", "1", "--size", "95"], "--size"),
        (&["--n", "1", "--size", "225"], "96..=224"),
        (&["--n", "1", "--split", "dev"], "train, validation or test"),
        (&["--n", "1", "--start", "1000000000000"], "start"),
        (&["--n", "2", "--start", "18446744073709551615"], "start"),
        (&["--n", "18446744073709551615", "--start", "1"], "twelve digits"),
    ] {
        fails(&[&["pocket", "draw", "--out", &out], arguments].concat(), 2, says);
        assert!(!Path::new(&out).exists(), "{arguments:?}");
    }
    fails(&["pocket", "draw", "--n", "1"], 2, "--out");
    let sheet = root.path().join("sheet.png").display().to_string();
    fails(&["pocket", "sheet", "--out", &sheet, "--rows", "7"], 2, "--rows: expected a multiple of 2");
    fails(&["pocket", "sheet", "--out", &sheet, "--columns", "27"], 2, "--columns");
    fails(&["pocket", "sheet", "--out", "sheet.jpg"], 2, ".png");
    assert!(!Path::new(&sheet).exists());
}

#[test]
fn nothing_is_overwritten_and_nothing_half_written_stays() {
    let root = tempfile::tempdir().expect("a folder");
    let world = root.path().join("world");
    drawn(&world, &["--n", "2"]);
    let before = contents(&world);
    let at = |path: &Path| path.display().to_string();
    let draw = |out: &str, says: &str| fails(&["pocket", "draw", "--n", "3", "--out", out], 1, says);
    let said = draw(&at(&world), "images`: it exists already");
    assert_eq!(said.lines().nth(1), Some("hint: draw into another folder"));
    assert_eq!(before, contents(&world));

    // Someone else's file of the same name.
    let mine = root.path().join("mine");
    std::fs::create_dir(&mine).expect("a folder");
    std::fs::write(mine.join("README.md"), "mine").expect("written");
    draw(&at(&mine), "README.md`: it exists already");
    assert_eq!(contents(&mine).len(), 1);

    // A run that was killed.
    let stopped = root.path().join("stopped");
    std::fs::create_dir_all(stopped.join(".partial/images")).expect("folders");
    assert!(draw(&at(&stopped), ".partial`: it exists already").contains("hint: another run"));

    let file = world.join("README.md");
    let said = draw(&at(&file.join("below")), "cannot write");
    assert_eq!((said.lines().count(), said.matches("os error").count()), (1, 1), "{said}");
}

#[test]
fn a_sheet_has_every_kind_in_its_column() {
    let root = tempfile::tempdir().expect("a folder");
    let out = root.path().join("sheet.png").display().to_string();
    let arguments = ["pocket", "sheet", "--out", &out, "--columns", "9", "--rows", "6", "--seed", "1"];
    let output = radapt(&[&arguments[..], &["--json"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&said["width"], &said["height"], &said["schema_version"]),
        (&json!(864), &json!(576), &json!(1))
    );
    let sheet = image::open(&out).expect("a picture").into_rgb8();
    assert_eq!(sheet.dimensions(), (864, 576));
    let cell =
        |column: u32, row: u32| image::imageops::crop_imm(&sheet, column * 96, row * 96, 96, 96).to_image();
    let first = |kind: usize| {
        (0..)
            .map(|index| draw(Split::Validation, 1, index, 96).expect("an allowed size"))
            .find(|scene| scene.kind == kind)
            .expect("every kind comes")
            .picture
    };
    assert_eq!(cell(0, 0), first(0));
    assert_eq!(cell(3, 2), first(12));
    assert_eq!(cell(7, 4), first(25));
    // There is no 27th kind.
    assert!(cell(8, 4).iter().chain(cell(8, 5).iter()).all(|&v| v == 255));
    assert_eq!(radapt(&arguments).stdout, format!("{out}\n").into_bytes());
}
