//! What the program writes against `schemas/`.

mod fixture;

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn schema(name: &str) -> jsonschema::Validator {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("schemas/{name}-1.schema.json"));
    let text = std::fs::read_to_string(&path).expect("the schema");
    jsonschema::draft202012::new(&serde_json::from_str(&text).expect("JSON")).expect("a schema")
}

fn holds(schema: &jsonschema::Validator, value: &Value) {
    let wrong: Vec<String> =
        schema.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(wrong.is_empty(), "{wrong:#?}\n{value:#}");
}

fn radapt(args: &[&str]) -> Value {
    let output =
        Command::new(env!("CARGO_BIN_EXE_radapt")).args(args).arg("--json").output().expect("it runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a file")).expect("JSON")
}

#[test]
fn a_classification_run_is_as_its_schemas_say() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("run");
    let run = out.display().to_string();
    let attack = ["--attack", "pgd,square", "--eps", "4/255", "--steps", "1", "--queries", "2"];
    let args = [&["eval", "classify", "--model", "pocket-clip", "--n", "4", "--threat", "both"][..], &attack];
    let summary = radapt(&[&args.concat()[..], &["--out", &run]].concat());
    holds(&schema("summary"), &summary);
    assert_eq!(read(&out.join("summary.json"))["rows"], summary["rows"]);
    holds(&schema("run"), &read(&out.join("run.json")));
    let (items, lines) = (schema("items"), std::fs::read_to_string(out.join("items.jsonl")).expect("lines"));
    assert_eq!(lines.lines().count(), 4);
    for line in lines.lines() {
        holds(&items, &serde_json::from_str(line).expect("JSON"));
    }

    // A robust figure without its threat model is none.
    let attacked = |row: &Value| row["threat"] == "transfer";
    let place = summary["rows"].as_array().expect("rows").iter().position(attacked).expect("an attacked row");
    for (field, wrong) in [("threat", Value::Null), ("surrogate", Value::Null), ("threat", "adaptive".into())]
    {
        let mut changed = summary.clone();
        changed["rows"][place][field] = wrong;
        assert!(!schema("summary").is_valid(&changed), "{field}");
    }
    let mut line: Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    line["attacked"][0].as_object_mut().expect("an object").remove("threat");
    assert!(!items.is_valid(&line));
}

#[test]
fn anchors_and_calibrations_are_as_their_schemas_say() {
    let anchor = schema("anchor");
    for name in ["pocket-white", "pocket-16-embedding"] {
        holds(&anchor, &radapt(&["anchor", "show", name]));
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("clean.json");
    let (out, clean) = (folder.path().join("run").display().to_string(), file.display().to_string());
    radapt(&["eval", "suspicion", "--n", "20", "--calibration", &clean, "--out", &out]);
    holds(&schema("calibration"), &read(&file));
    holds(&schema("run"), &read(&folder.path().join("run/run.json")));
}

#[cfg(feature = "engine")]
#[test]
fn an_answer_is_as_its_schema_says() {
    let picture = fixture::path("llava/pictures/wide.png").display().to_string();
    for anchor in ["none", "training-free"] {
        let chat = ["chat", "--anchor", anchor, "--image", &picture, "What is it?"];
        holds(&schema("chat"), &radapt(&chat));
    }
}
