//! COCO's annotations, V-Attack's three files and sets chosen from COCO.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use radapt::data::coco::Coco;
use radapt::data::coco300::{DefectKind, ObjectRow, ObjectSet};
use radapt::eval::judge::{Case, Verdict, WordJudge};
use radapt::eval::select::select;
use radapt::pocket::{Dataset, Split};
use serde_json::json;

fn shared() -> Option<PathBuf> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/coco"));
    if !folder.is_dir() {
        eprintln!("SKIPPED: `{}` is not here", folder.display());
        return None;
    }
    Some(folder)
}

fn row(image: &str, keyword: &str, target: &str, questions: &[&str]) -> ObjectRow {
    ObjectRow {
        image: image.into(),
        keyword: keyword.into(),
        description: "It is: here.".into(),
        target: target.into(),
        target_description: "It is there.".into(),
        questions: questions.iter().map(|q| q.to_string()).collect(),
    }
}

#[test]
fn the_published_files_have_the_defects_that_are_known() {
    let Some(folder) = shared() else { return };
    let set = ObjectSet::open(&folder).unwrap();
    assert_eq!((set.name(), set.rows().len()), ("coco300", 300));
    assert_eq!(set.rows().iter().map(|row| row.questions.len()).sum::<usize>(), 904);
    let keywords: HashSet<_> = set.rows().iter().map(|row| &row.keyword).collect();
    assert_eq!(keywords.len(), 152);
    let found: Vec<(usize, DefectKind)> = set.defects().iter().map(|d| (d.row, d.kind)).collect();
    let (twice, answer, same) =
        (DefectKind::DuplicatePicture, DefectKind::KeywordAsQuestion, DefectKind::SameObject);
    assert_eq!(
        found,
        [
            (103, answer),
            (128, twice),
            (159, twice),
            (165, same),
            (172, answer),
            (189, twice),
            (193, answer),
            (202, answer)
        ]
    );
    assert_eq!(set.rows()[103].asked()[0], "Train");
    assert_eq!(set.distinct().unwrap().rows().len(), 296);

    let clean = set.clone().clean();
    assert_eq!(clean.rows().len(), 300);
    assert!(clean.rows().iter().all(|row| row.questions.len() == 3));
    assert!(clean.defects().iter().all(|d| d.kind == twice || d.kind == same));

    // The four pictures that there are.
    let located = set.locate(&folder.join("v-attack"));
    assert_eq!(located.paths.iter().flatten().count(), 4);
    assert_eq!(located.missing.len(), 293);
    assert!(located.missing.contains(&"000000001425.jpg".to_string()));

    // Written again, they are the published bytes.
    let out = tempfile::tempdir().unwrap();
    set.write(out.path()).unwrap();
    for name in ["object_descriptions_main", "target_obj_sim", "vqa_main"] {
        let name = format!("coco300_{name}.json");
        let parse = |path: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs::read(path.join(&name)).unwrap()).unwrap()
        };
        assert_eq!(parse(out.path()), parse(&folder), "{name}");
    }
    let error = set.write(out.path()).unwrap_err().to_string();
    assert!(error.ends_with("it exists already"), "{error}");
}

#[test]
fn sets_are_written_and_read_back() {
    let rows = vec![
        row("a.jpg", "Cat", "dog", &["Cat", "What?", "Who?"]),
        row("a.jpg", "Bus", "bus", &["1", "2", "3"]),
    ];
    let set = ObjectSet::new("mine", rows).unwrap();
    let folder = tempfile::tempdir().unwrap();
    set.write(folder.path()).unwrap();
    assert_eq!(ObjectSet::open(folder.path()).unwrap(), set);
    let defects: Vec<_> = set.defects().iter().map(|d| (d.row, d.kind.name())).collect();
    assert_eq!(
        defects,
        [(0, "keyword-as-question"), (0, "few-questions"), (1, "duplicate-picture"), (1, "same-object")]
    );
    assert_eq!(set.distinct().unwrap().rows().len(), 1);

    fs::create_dir(folder.path().join("images")).unwrap();
    fs::write(folder.path().join("images/a.png"), "").unwrap();
    let located = set.locate(folder.path());
    assert!(located.missing.is_empty() && located.paths[1].as_ref().unwrap().ends_with("images/a.png"));
    // A name that leads elsewhere is no picture of the set.
    let outside = ObjectSet::new("x", vec![row("../images/a.png", "Cat", "dog", &[])]).unwrap();
    assert_eq!(outside.locate(&folder.path().join("images")).missing.len(), 1);
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |reason: &str| {
        let error = ObjectSet::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused("found none");
    ObjectSet::new("a", vec![row("a.jpg", "Cat", "dog", &[])]).unwrap().write(folder.path()).unwrap();
    let write = |name: &str, value: serde_json::Value| {
        fs::write(folder.path().join(name), value.to_string()).unwrap();
    };
    write("a_vqa_main.json", json!([]));
    refused("expected 1 rows, found 0");
    write("a_vqa_main.json", json!([{ "image": "b.jpg", "vqa": [] }]));
    refused("row 0: expected picture `a.jpg`, found `b.jpg`");
    write("a_vqa_main.json", json!([{ "image": "a.jpg", "vqa": [] }]));
    write("a_target_obj_sim.json", json!([{ "image": "a.jpg", "replace": ["no colon"] }]));
    refused("row 0: expected one string `NAME: SENTENCE` in `replace`, found `no colon`");
    write("a_target_obj_sim.json", json!([{ "image": "a.jpg", "replace": [] }]));
    refused("found 0 strings");
    write("a_target_obj_sim.json", json!([{ "image": 3 }]));
    refused("a_target_obj_sim.json");
    fs::remove_file(folder.path().join("a_target_obj_sim.json")).unwrap();
    refused("cannot read");
    write("b_object_descriptions_main.json", json!([]));
    refused("found a, b");
}

fn draw(folder: &Path, n: u64) {
    let dataset = Dataset { split: Split::Test, seed: 3, start: 0, n, size: 96 };
    dataset.write(folder, &mut |_| {}).unwrap();
}

#[test]
fn the_pocket_world_gives_the_set_it_draws() {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path(), 12);
    let drawn = ObjectSet::open(folder.path()).unwrap();
    assert_eq!(ObjectSet::pocket(Split::Test, 3, 12).unwrap(), drawn);
    assert!(drawn.defects().is_empty());
    assert!(drawn.locate(folder.path()).missing.is_empty());
    assert!(ObjectSet::pocket(Split::Test, 3, 0).is_err());
}

#[test]
fn pocket_captions_name_their_objects() {
    let judge = WordJudge::new().unwrap();
    for row in ObjectSet::pocket(Split::Test, 0, 300).unwrap().rows() {
        for (caption, expected) in
            [(&row.description, Verdict::Original), (&row.target_description, Verdict::Target)]
        {
            let case = Case::new(caption.as_str(), &row.keyword, &row.target);
            assert_eq!(judge.verdict(&case), expected, "{case:?}");
        }
    }
}

#[test]
fn sets_are_chosen_from_coco() {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path(), 60);
    let annotations = folder.path().join("annotations");
    let coco =
        Coco::open(&annotations.join("instances.json"), Some(&annotations.join("captions.json"))).unwrap();
    assert_eq!((coco.images().len(), coco.categories().len()), (60, 26));
    assert_eq!((coco.instances(5).len(), coco.captions(5).len()), (1, 1));
    let chosen = select(&coco, "mine", 20, 7).unwrap();
    assert_eq!(chosen, select(&coco, "mine", 20, 7).unwrap());
    assert_ne!(chosen, select(&coco, "mine", 20, 8).unwrap());
    let drawn = ObjectSet::open(folder.path()).unwrap();
    for row in chosen.rows() {
        let truth = drawn.rows().iter().find(|other| other.image == row.image).unwrap();
        assert_eq!((&row.keyword, &row.description), (&truth.keyword, &truth.description));
        assert!(row.has_target() && row.questions.len() == 3);
        let category = |name: &str| {
            let name = name.to_lowercase();
            coco.categories().iter().find(|c| c.name == name).unwrap().supercategory.clone()
        };
        assert_eq!(category(&row.keyword), category(&row.target));
        let named = row.questions.iter().any(|q| q.to_lowercase().contains(&row.keyword.to_lowercase()));
        assert!(!named && row.questions.iter().all(|q| q.ends_with('?') && !q.contains('{')));
    }
    // A draw of fewer is part of it.
    for row in select(&coco, "mine", 5, 7).unwrap().rows() {
        assert!(chosen.rows().contains(row));
    }
    let out = tempfile::tempdir().unwrap();
    chosen.write(out.path()).unwrap();
    assert_eq!(ObjectSet::open(out.path()).unwrap(), chosen);
    let error = select(&coco, "mine", 61, 7).unwrap_err().to_string();
    assert!(error.contains("--select"), "{error}");
}

#[test]
fn a_main_object_is_large_alone_and_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("instances.json");
    let image = |id: u64| json!({ "id": id, "file_name": format!("{id}.jpg"), "width": 100, "height": 100 });
    let object = |image: u64, category: u64, area: f64, crowd: u8| json!({ "image_id": image, "category_id": category, "area": area, "bbox": [0, 0, 1, 1], "iscrowd": crowd });
    let category = |id: u64, name: &str, sort: &str| json!({ "id": id, "name": name, "supercategory": sort });
    let file = json!({
        "images": (1..=7).map(image).collect::<Vec<_>>(),
        "categories": [
            category(1, "person", "person"), category(17, "cat", "animal"), category(18, "dog", "animal"),
            category(74, "mouse", "electronic"), category(72, "tv", "electronic"), category(47, "cup", "kitchen"),
        ],
        "annotations": [
            object(1, 17, 3000.0, 0), object(1, 1, 200.0, 0),
            // too small
            object(2, 17, 900.0, 0),
            // two of a size
            object(3, 17, 3000.0, 0), object(3, 1, 1600.0, 0),
            // no main object
            object(4, 1, 5000.0, 0),
            // the only other animal is there too
            object(5, 17, 3000.0, 0), object(5, 18, 10.0, 1),
            object(6, 74, 2000.0, 0),
            // nothing to confuse it with
            object(7, 47, 2000.0, 0),
        ],
    });
    fs::write(&path, file.to_string()).unwrap();
    let chosen = select(&Coco::open(&path, None).unwrap(), "x", 2, 0).unwrap();
    let found: Vec<_> =
        chosen.rows().iter().map(|r| (r.image.as_str(), r.keyword.as_str(), r.target.as_str())).collect();
    assert_eq!(found, [("1.jpg", "Cat", "dog"), ("6.jpg", "Computer mouse", "television")]);
    assert_eq!(chosen.rows()[0].description, "A photo of a cat.");
    assert!(select(&Coco::open(&path, None).unwrap(), "x", 3, 0).is_err());
    for (key, row, reason) in [
        ("annotations", object(9, 17, 1.0, 0), "there is no picture 9"),
        ("annotations", object(1, 99, 1.0, 0), "there is no category 99"),
        ("images", image(1), "picture 1 comes twice"),
        ("categories", category(1, "x", "y"), "category 1 comes twice"),
    ] {
        let mut bad = file.clone();
        bad[key].as_array_mut().unwrap().push(row);
        fs::write(&path, bad.to_string()).unwrap();
        let error = Coco::open(&path, None).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
