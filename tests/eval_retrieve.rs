//! Image-text retrieval: ranks worked out by hand, Karpathy's and COCO's files, and the binary on the
//! pocket CLIP.

use std::path::Path;
use std::process::{Command, Output};

use base64::Engine as _;
use candle_core::{Device, Tensor};
use radapt::data::captioned::CaptionedSet;
use radapt::eval::Row;
use radapt::eval::retrieve::{Embedding, RetrieveLine, figures, unit_rows};
use serde_json::{Value, json};

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt")).args(arguments).output().unwrap()
}

#[track_caller]
fn json_of(arguments: &[&str]) -> Value {
    let output = radapt(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn line(index: usize, kinds: &[(Option<&str>, [f32; 2])]) -> RetrieveLine {
    let embedding = |(eps, values): &(Option<&str>, [f32; 2])| Embedding {
        defense: "none".into(),
        eps: eps.map(|eps| eps.parse().unwrap()),
        threat: eps.map(|_| radapt::attack::Threat::Adaptive),
        values: base64::engine::general_purpose::STANDARD
            .encode(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
    };
    let embeddings = kinds.iter().map(embedding).collect();
    RetrieveLine { index, id: format!("{index}.jpg"), error: None, embeddings }
}

fn correct(rows: &[Row], task: &str, attacked: bool) -> (usize, usize) {
    let row = rows.iter().find(|row| row.task == task && row.attacked.is_some() == attacked).unwrap();
    (row.correct, row.n)
}

#[test]
fn ranks_are_those_worked_out_by_hand() {
    // Three pictures in the plane at 0, 90 and 180 degrees; captions at 10, 80 and 100, and 170.
    let at = |degrees: f32| [degrees.to_radians().cos(), degrees.to_radians().sin()];
    let texts = Tensor::new(&[at(10.0), at(80.0), at(100.0), at(170.0)], &Device::Cpu).unwrap();
    let places = [0..1, 1..3, 3..4];
    // Attacked, the first picture goes to 85 degrees, the others stay.
    let lines = [
        line(0, &[(None, at(0.0)), (Some("8/255"), at(85.0))]),
        line(1, &[(None, at(90.0)), (Some("8/255"), at(90.0))]),
        line(2, &[(None, at(180.0)), (Some("8/255"), at(180.0))]),
    ];
    let rows = figures("hand", &lines, &texts, &places).unwrap();
    assert_eq!(correct(&rows, "image-to-text R@1", false), (3, 3));
    assert_eq!(correct(&rows, "text-to-image R@1", false), (4, 4));
    // At 85 degrees its own caption is third of four.
    assert_eq!(correct(&rows, "image-to-text R@1", true), (2, 3));
    assert_eq!(correct(&rows, "image-to-text R@5", true), (3, 3));
    // The caption at 80 degrees is now nearer to it than to its own; the one at 10 still finds it.
    assert_eq!(correct(&rows, "text-to-image R@1", true), (3, 4));
    assert_eq!(correct(&rows, "text-to-image R@5", true), (4, 4));

    // Who looks like another does not win the tie.
    let same = [line(0, &[(None, at(0.0))]), line(1, &[(None, at(0.0))])];
    let rows = figures("ties", &same, &texts.narrow(0, 0, 2).unwrap(), &[0..1, 1..2]).unwrap();
    assert_eq!(correct(&rows, "text-to-image R@1", false), (0, 2));
    assert_eq!(correct(&rows, "text-to-image R@5", false), (2, 2));

    // A picture that could not be read takes its captions with it.
    let mut broken = lines.to_vec();
    broken[1] = RetrieveLine { error: Some("damaged".into()), embeddings: Vec::new(), ..broken[1].clone() };
    let rows = figures("two", &broken, &texts, &places).unwrap();
    assert_eq!(correct(&rows, "text-to-image R@1", true), (2, 2));
    broken[0].embeddings[0].values = "no base64".into();
    assert!(figures("damaged", &broken, &texts, &places).is_err());
    let unit = unit_rows(&Tensor::new(&[[3f32, 4.0], [0.0, 0.0]], &Device::Cpu).unwrap()).unwrap();
    assert_eq!(unit.to_vec2::<f32>().unwrap(), [[0.6, 0.8], [0.0, 0.0]]);
}

#[test]
fn karpathys_and_cocos_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dataset_flickr30k.json");
    let image = |name: &str, split: &str, captions: &[&str]| {
        let sentences: Vec<Value> = captions.iter().map(|raw| json!({ "raw": raw, "tokens": [] })).collect();
        json!({ "filename": name, "split": split, "sentences": sentences, "imgid": 1 })
    };
    let images = [image("a.jpg", "test", &["one", "two"]), image("b.jpg", "train", &["three"])];
    std::fs::write(&file, json!({ "dataset": "flickr30k", "images": images }).to_string()).unwrap();
    let set = CaptionedSet::open(&file, "test").unwrap();
    assert_eq!((set.name(), set.pictures().len()), ("flickr30k test", 1));
    assert_eq!(set.pictures()[0].captions, ["one", "two"]);
    let error = CaptionedSet::open(&file, "val").unwrap_err().to_string();
    assert!(error.contains("split val"), "{error}");
    let coco = folder.path().join("captions_val2017.json");
    let text = json!({
        "images": [{ "id": 7, "file_name": "7.jpg", "width": 4, "height": 3 }],
        "annotations": [{ "image_id": 7, "id": 1, "caption": "four" }, { "image_id": 7, "id": 2, "caption": "five" }],
    });
    std::fs::write(&coco, text.to_string()).unwrap();
    let set = CaptionedSet::open(&coco, "test").unwrap();
    assert_eq!(set.pictures()[0].captions, ["four", "five"]);
    std::fs::write(&coco, "[").unwrap();
    assert!(CaptionedSet::open(&coco, "test").is_err());
}

#[test]
fn the_pocket_clip_is_scored_through_the_binary_and_a_kill_costs_nothing() {
    let files = tempfile::tempdir().unwrap();
    let out = files.path().join("run");
    let name = out.to_str().unwrap();
    #[rustfmt::skip]
    let mut arguments = vec![
        "eval", "retrieve", "--n", "12", "--eps", "8/255", "--steps", "4", "--batch", "5", "--out", name,
        "--json", "-q",
    ];
    let found = json_of(&arguments);
    let rows = found["rows"].as_array().unwrap();
    // Two models, clean and under two threats, three ranks in two directions.
    assert_eq!(rows.len(), 36);
    let value = |task: &str, defense: &str, threat: Option<&str>| {
        let row = rows
            .iter()
            .find(|row| row["task"] == task && row["defense"] == defense && row["threat"] == json!(threat));
        row.unwrap_or_else(|| panic!("{task} {defense} {threat:?}"))["value"].as_f64().unwrap()
    };
    for task in ["image-to-text", "text-to-image"] {
        let r =
            |k: usize, defense: &str, threat: Option<&str>| value(&format!("{task} R@{k}"), defense, threat);
        assert!(r(1, "none", None) > 50.0);
        assert_eq!(r(1, "none", Some("transfer")), r(1, "none", Some("adaptive")));
        assert!(r(1, "none", Some("transfer")) < r(1, "none", None));
        for defense in ["none", "gif+fra"] {
            for threat in [None, Some("transfer"), Some("adaptive")] {
                assert!(r(1, defense, threat) <= r(5, defense, threat));
                assert!(r(5, defense, threat) <= r(10, defense, threat));
                assert!(r(5, defense, threat) <= r(5, defense, None));
            }
        }
    }
    let items = Path::new(name).join("items.jsonl");
    let whole = std::fs::read_to_string(&items).unwrap();
    let kept: String = whole.split_inclusive('\n').take(5).collect();
    std::fs::write(&items, kept + "{").unwrap();
    arguments.push("--resume");
    assert_eq!(json_of(&arguments), found);
    assert_eq!(std::fs::read_to_string(&items).unwrap(), whole);
    let refused = radapt(&["eval", "retrieve", "--data", "pocket:none", "--out", "x"]);
    assert_eq!(refused.status.code(), Some(2));
}
