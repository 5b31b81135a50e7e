//! Questions with known answers: VQAv2's and POPE's files, figures worked out by hand, and the binary
//! on the pocket LLaVA.

use std::path::Path;

use radapt::attack::{Eps, Threat};
use radapt::data::questions::{QuestionSet, Truth};
use radapt::eval::coco::CocoAttack;
use radapt::eval::questions::{QuestionLine, figures};
use radapt::pocket::Split;
use serde_json::json;

fn write(path: &Path, text: impl ToString) {
    std::fs::write(path, text.to_string()).unwrap();
}

#[test]
fn vqav2_and_pope_are_read_as_they_are_published() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let asked =
        |id: u64| json!({ "image_id": 262148, "question": "Where is he looking?", "question_id": id });
    let questions = json!({ "data_subtype": "val2014", "questions": [asked(262148000), asked(262148001)] });
    write(&at("questions.json"), questions);
    let answers = json!([{ "answer": "down", "answer_confidence": "yes", "answer_id": 1 }]);
    let found = |id: u64| json!({ "question_id": id, "image_id": 262148, "answers": answers });
    write(&at("annotations.json"), json!({ "annotations": [found(262148001), found(262148000)] }));
    let set = QuestionSet::vqav2(&at("questions.json"), &at("annotations.json")).unwrap();
    assert_eq!((set.name(), set.rows().len()), ("vqav2", 2));
    assert_eq!(set.rows()[0].image, "COCO_val2014_000000262148.jpg");
    assert_eq!(set.rows()[0].id, "262148000");
    assert_eq!(set.rows()[0].truth, Truth::Humans(vec!["down".into()]));
    write(&at("annotations.json"), json!({ "annotations": [found(262148001)] }));
    let error = QuestionSet::vqav2(&at("questions.json"), &at("annotations.json")).unwrap_err();
    assert!(error.to_string().contains("262148000"), "{error}");

    let line = |label: &str| {
        let found = json!({
            "question_id": 1, "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a snowboard in the image?", "label": label,
        });
        format!("{found}\n")
    };
    write(&at("coco_pope_random.json"), line("yes") + &line("no"));
    let set = QuestionSet::pope(&at("coco_pope_random.json")).unwrap();
    assert_eq!((set.name(), set.rows()[1].truth.clone()), ("coco_pope_random", Truth::Yes(false)));
    write(&at("bad.json"), line("yes") + &line("maybe"));
    let error = QuestionSet::pope(&at("bad.json")).unwrap_err().to_string();
    assert!(error.contains("line 2") && error.contains("maybe"), "{error}");
    write(&at("bad.json"), "");
    assert!(QuestionSet::pope(&at("bad.json")).is_err());
}

#[test]
fn pockets_questions_come_in_both_kinds() {
    let set = QuestionSet::pocket(Split::Test, 0, 6).unwrap();
    assert!(set.rows().len() >= 18);
    for row in set.rows() {
        let Truth::Humans(humans) = &row.truth else { panic!("{row:?}") };
        assert!(humans.len() == 10 && !humans[0].ends_with('.') && !humans[0].starts_with("a "), "{row:?}");
    }
    let pope = QuestionSet::pocket_pope(Split::Test, 0, 20).unwrap();
    let yes = pope.rows().iter().filter(|row| row.truth == Truth::Yes(true)).count();
    assert!(yes > 0 && yes < pope.rows().len());
    assert!(QuestionSet::pocket(Split::Test, 0, 0).is_err());
}

#[test]
fn figures_are_those_worked_out_by_hand() {
    let line = |row: usize, truth: &Truth, attacked: bool, response: &str| QuestionLine {
        index: 10 * usize::from(attacked) + row,
        id: format!("{row}"),
        row,
        image: format!("{row}.jpg"),
        question: "What is it?".into(),
        truth: truth.clone(),
        defense: "none".into(),
        attacked: attacked.then(|| CocoAttack {
            attack: "pgd".into(),
            eps: Eps::of_255(8),
            threat: Threat::Adaptive,
        }),
        error: None,
        response: response.into(),
    };
    // Two of ten people say car: left out one at a time, 8 times 2/3 and twice 1/3, 0.6 in the mean.
    let mut humans = vec!["car".to_string(); 2];
    humans.extend(vec!["bus".to_string(); 8]);
    let truth = Truth::Humans(humans);
    let lines = [
        line(0, &truth, false, "A bus, on the sand."),
        line(1, &truth, false, "A car."),
        line(0, &truth, true, "a car"),
        // Better than before is worth what it was before.
        line(1, &truth, true, "bus"),
        // Without a clean answer there is no robust one.
        line(2, &truth, true, "bus"),
    ];
    let rows = figures("hand", &lines);
    assert_eq!((rows.len(), rows[0].task.as_str(), rows[0].n, rows[1].n), (2, "vqa", 2, 2));
    assert!((rows[0].value - 80.0).abs() < 1e-9, "{}", rows[0].value);
    assert!((rows[1].value - 60.0).abs() < 1e-9, "{}", rows[1].value);
    assert!(rows[0].low < 80.0 && rows[0].high <= 100.0 && rows[0].attacked.is_none());
    assert_eq!(rows[1].attacked.as_ref().unwrap().threat, Threat::Adaptive);

    let (yes, no) = (Truth::Yes(true), Truth::Yes(false));
    let lines = [
        line(0, &yes, false, "Yes."),
        line(1, &no, false, "Yes."),
        line(2, &no, false, "No."),
        line(0, &yes, true, "No."),
        line(1, &no, true, "No."),
        line(2, &no, true, "No, it is not."),
    ];
    let rows = figures("pope", &lines);
    let (clean, attacked) = (&rows[0], &rows[1]);
    assert!((clean.value - 200.0 / 3.0).abs() < 1e-9);
    assert!((attacked.value - 100.0 / 3.0).abs() < 1e-9, "{}", attacked.value);
    let pope = attacked.pope.unwrap();
    // As answered two are right: no clean answer comes into POPE's own figures.
    assert_eq!((pope.correct, pope.n, pope.yes_ratio), (2, 3, 0.0));
    assert!((clean.pope.unwrap().f1 - 200.0 / 3.0).abs() < 1e-9);
}

#[cfg(feature = "engine")]
#[test]
fn the_pocket_llava_answers_through_the_binary_in_shards_and_after_a_kill() {
    use std::process::{Command, Output};

    use serde_json::Value;

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let radapt = |arguments: &[&str]| -> Output {
        let command = [arguments, &["--quiet", "--json"]].concat();
        Command::new(env!("CARGO_BIN_EXE_radapt")).args(command).output().unwrap()
    };
    let json_of = |arguments: &[&str]| -> Value {
        let output = radapt(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let crafted = at("crafted");
    json_of(&[
        "attack",
        "v-attack",
        "--threat",
        "transfer",
        "--eps",
        "16/255",
        "--n",
        "4",
        "--steps",
        "20",
        "--no-crop",
        "--blocks",
        "4",
        "--out",
        &crafted,
    ]);
    let common = ["eval", "vqa", "--n", "4", "--crafted", &crafted];
    let with =
        |more: &[&str]| -> Vec<String> { common.iter().chain(more).map(|text| text.to_string()).collect() };
    let call = |more: &[&str]| -> Value {
        let all = with(more);
        json_of(&all.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let whole = call(&["--out", &at("whole")]);
    let rows = whole["rows"].as_array().unwrap();
    // Two models, clean and transfer.
    assert_eq!(rows.len(), 4);
    assert!(rows[0]["value"].as_f64().unwrap() > 70.0, "{}", rows[0]);
    assert_eq!(rows.iter().filter(|row| row["threat"] == "transfer").count(), 2);
    let lines = |run: &str| std::fs::read_to_string(folder.path().join(run).join("items.jsonl")).unwrap();
    let before = lines("whole");
    let kept: String = before.split_inclusive('\n').take(5).collect();
    std::fs::write(folder.path().join("whole/items.jsonl"), kept + "{").unwrap();
    assert_eq!(call(&["--out", &at("whole"), "--resume"]), whole);
    let sorted = |text: &str| {
        let mut all: Vec<String> = text.lines().map(str::to_string).collect();
        all.sort();
        all
    };
    assert_eq!(sorted(&lines("whole")), sorted(&before));
    for shard in ["1/2", "2/2"] {
        call(&["--out", &at(&shard[..1]), "--shard", shard]);
    }
    let merged = json_of(&["eval", "merge", &at("1"), &at("2"), "--out", &at("merged")]);
    assert_eq!(merged["rows"], whole["rows"]);

    let pope =
        json_of(&["eval", "vqa", "--data", "pocket-pope", "--n", "6", "--anchor", "none", "--out", &at("p")]);
    assert_eq!(pope["rows"][0]["task"], "pope");
    assert!(pope["rows"][0]["pope"]["f1"].is_number());
    let refused = radapt(&["eval", "vqa", "--data", "pocket-pope:none", "--out", &at("x")]);
    assert_eq!(refused.status.code(), Some(2));
}
