//! What the program writes against `schemas/`: every document holds, and none whose robust figure has
//! lost its threat model.

mod fixture;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{LazyLock, OnceLock};

use candle_core::{DType, Device, Tensor};
use radapt::pocket::built_in;
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas")
}

/// The schemas by their names without the version.
static SCHEMAS: LazyLock<HashMap<String, Value>> = LazyLock::new(|| {
    let files = std::fs::read_dir(folder()).expect("the schemas").map(|entry| entry.expect("a file").path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "json"));
    let name = |path: &Path| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        name.strip_suffix("-1.schema.json").expect("a schema's name").to_string()
    };
    files.map(|path| (name(&path), read(&path))).collect()
});

fn schema(name: &str) -> jsonschema::Validator {
    jsonschema::draft202012::new(SCHEMAS.get(name).unwrap_or_else(|| panic!("no {name}"))).expect("a schema")
}

#[track_caller]
fn holds(schema: &jsonschema::Validator, value: &Value) {
    let wrong: Vec<String> =
        schema.iter_errors(value).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(wrong.is_empty(), "{wrong:#?}\n{value:#}");
}

/// The pointers of all objects in `value` that name a threat model. What decides a run is left out: it
/// says what was asked for and has no figures.
fn with_threat(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if fields.get("threat").is_some_and(|threat| !threat.is_null()) {
                found.push(at.to_string());
            }
            for (key, inner) in fields.iter().filter(|(key, _)| !matches!(key.as_str(), "run" | "settings")) {
                with_threat(inner, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
            }
        }
        Value::Array(all) => {
            all.iter().enumerate().for_each(|(i, inner)| with_threat(inner, &format!("{at}/{i}"), found));
        }
        _ => {}
    }
}

/// The document holds; and it does not without the threat model of any one figure, or with half of it.
#[track_caller]
fn holds_with_threats(name: &str, value: &Value) {
    let schema = schema(name);
    holds(&schema, value);
    let mut places = Vec::new();
    with_threat(value, "", &mut places);
    assert!(!places.is_empty(), "{name}: no attacked figure\n{value:#}");
    let refused = |place: &str, what: &str, change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut changed = value.clone();
        change(changed.pointer_mut(place).and_then(Value::as_object_mut).expect("an object"));
        assert!(!schema.is_valid(&changed), "{name}: {place} {what}");
    };
    // Of many alike the first and the last.
    let ends = places.len().min(12);
    for place in places[..ends].iter().chain(&places[places.len() - ends..]) {
        refused(place, "without its threat", &|fields| drop(fields.remove("threat")));
        refused(place, "with no threat", &|fields| drop(fields.insert("threat".into(), Value::Null)));
        refused(place, "with another threat", &|fields| {
            fields.insert("threat".into(), "robust".into());
        });
        match value.pointer(place).map(|figure| &figure["threat"]) {
            Some(Value::String(threat)) if threat == "transfer" => {
                refused(place, "without its surrogate", &|fields| drop(fields.remove("surrogate")));
                refused(place, "as adaptive", &|fields| {
                    drop(fields.insert("threat".into(), json!("adaptive")))
                });
            }
            Some(Value::String(_)) => refused(place, "as transfer", &|fields| {
                fields.insert("threat".into(), "transfer".into());
            }),
            _ => {}
        }
    }
}

fn command(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_radapt"));
    command.args(args).env("HF_HUB_OFFLINE", "1").env_remove("RUST_BACKTRACE").output().expect("it runs")
}

#[track_caller]
fn radapt(args: &[&str]) -> Value {
    let output = command(&[&["--json", "--quiet"], args].concat());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The document of a command that fails.
#[track_caller]
fn failed(args: &[&str]) -> Value {
    let output = command(&[&["--json", "--quiet"], args].concat());
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a file")).expect("JSON")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The files of a run, whose summary is the document given.
#[track_caller]
fn a_run_holds(out: &Path, summary: &Value) {
    let written = read(&out.join("summary.json"));
    [summary, &written].into_iter().for_each(|document| holds(&schema("summary"), document));
    assert_eq!((&summary["fingerprint"], &summary["run"]), (&written["fingerprint"], &written["run"]));
    holds(&schema("run"), &read(&out.join("run.json")));
    let items = lines(&std::fs::read_to_string(out.join("items.jsonl")).expect("lines"));
    assert_eq!(items.len() as u64, summary["items"].as_u64().expect("a number"));
    let schema = schema("items");
    items.iter().for_each(|line| holds(&schema, line));
}

/// The run's lines hold, and not without a threat model.
#[track_caller]
fn lines_have_threats(out: &Path) {
    let text = std::fs::read_to_string(out.join("items.jsonl")).expect("lines");
    let all = lines(&text);
    let attacked: Vec<&Value> = all
        .iter()
        .filter(|line| {
            let mut found = Vec::new();
            with_threat(line, "", &mut found);
            !found.is_empty()
        })
        .collect();
    assert!(!attacked.is_empty(), "{text}");
    attacked.into_iter().for_each(|line| holds_with_threats("items", line));
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn fixed(name: &str) -> String {
    fixture::path(name).display().to_string()
}

/// Pictures in folders by class, one of them no picture.
fn damaged(folder: &Folder) -> String {
    for class in ["a", "b"] {
        std::fs::create_dir_all(folder.path("damaged").join(class)).expect("a folder");
        for name in ["0.png", "1.png"] {
            let from = fixture::path("training/pictures").join(class).join(name);
            std::fs::copy(from, folder.path("damaged").join(class).join(name)).expect("a copy");
        }
    }
    std::fs::write(folder.path("damaged/b/1.png"), "no picture").expect("written");
    folder.at("damaged")
}

#[test]
fn a_classification_run_is_as_its_schemas_say() {
    let folder = Folder::new();
    let (run, out) = (folder.at("run"), folder.path("run"));
    #[rustfmt::skip]
    let summary = radapt(&[
        "eval", "classify", "--model", "pocket-clip", "--n", "4", "--threat", "both", "--attack", "pgd,square",
        "--eps", "4/255", "--steps", "1", "--queries", "2", "--out", &run,
    ]);
    assert_eq!(read(&out.join("summary.json"))["rows"], summary["rows"]);
    a_run_holds(&out, &summary);
    holds_with_threats("summary", &summary);
    lines_have_threats(&out);
    for (field, wrong) in
        [("value", 101.into()), ("eps", "4/ 255".into()), ("n", (-1).into()), ("more", 1.into())]
    {
        let mut changed: Value = summary.clone();
        changed["rows"][2][field] = wrong;
        assert!(!schema("summary").is_valid(&changed), "{field}");
    }

    // Without a ball, and of several attacks.
    for (attack, more) in [("cw", &[][..]), ("autoattack", &["--queries", "1"])] {
        let run = folder.at(attack);
        let flags = ["--n", "1", "--attack", attack, "--steps", "1", "--out", &run];
        let summary = radapt(&[&["eval", "classify"], &flags[..], more].concat());
        a_run_holds(&folder.path(attack), &summary);
        holds_with_threats("summary", &summary);
    }
    // Shards and the whole, clean figures alone.
    for shard in ["1/2", "2/2"] {
        let out = &shard[..1];
        let summary = radapt(&["eval", "classify", "--n", "4", "--shard", shard, "--out", &folder.at(out)]);
        a_run_holds(&folder.path(out), &summary);
    }
    let merged = radapt(&["eval", "merge", &folder.at("1"), &folder.at("2"), "--out", &folder.at("whole")]);
    a_run_holds(&folder.path("whole"), &merged);
    // With a picture that cannot be read.
    let run = folder.at("failed");
    let summary = failed(&["eval", "classify", "--data", &damaged(&folder), "--out", &run]);
    assert_eq!(summary["failed"], 1);
    a_run_holds(&folder.path("failed"), &summary);
}

#[test]
fn the_other_runs_are_as_their_schemas_say() {
    let folder = Folder::new();
    let retrieved = radapt(&[
        "eval",
        "retrieve",
        "--n",
        "3",
        "--eps",
        "8/255",
        "--steps",
        "1",
        "--out",
        &folder.at("retrieve"),
    ]);
    a_run_holds(&folder.path("retrieve"), &retrieved);
    holds_with_threats("summary", &retrieved);
    lines_have_threats(&folder.path("retrieve"));

    let llava = fixed("llava/v5");
    let pictures = fixed("training/pictures");
    let value = ["v-attack", "--n", "20", "--eps", "8/255", "--no-crop", "--blocks", "1"];
    let labelled = ["pgd", "--n", "2"];
    let features = ["pgd", "--model", &llava, "--data", &pictures, "--n", "2"];
    for (name, what) in [("value", &value[..]), ("labelled", &labelled), ("features", &features)] {
        for threat in ["transfer", "adaptive"] {
            let run = format!("{name}-{threat}");
            let out = folder.at(&run);
            let flags = ["--threat", threat, "--steps", "1", "--out", &out];
            let summary = radapt(&[&["attack"], what, &flags].concat());
            a_run_holds(&folder.path(&run), &summary);
            holds_with_threats("summary", &summary);
            lines_have_threats(&folder.path(&run));
        }
    }
    let crafted = format!("{},{}", folder.at("value-transfer"), folder.at("value-adaptive"));
    let (calibration, out) = (folder.at("clean.json"), folder.at("suspicion"));
    #[rustfmt::skip]
    let told = radapt(&[
        "eval", "suspicion", "--n", "20", "--crafted", &crafted, "--calibration", &calibration, "--out", &out,
    ]);
    a_run_holds(&folder.path("suspicion"), &told);
    holds_with_threats("summary", &told);
    lines_have_threats(&folder.path("suspicion"));
    holds(&schema("calibration"), &read(&folder.path("clean.json")));
    let unread = failed(&["eval", "suspicion", "--data", &damaged(&folder), "--out", &folder.at("unread")]);
    a_run_holds(&folder.path("unread"), &unread);

    let runs = ["retrieve", "value-transfer", "labelled-adaptive", "features-transfer", "suspicion"];
    let runs = runs.map(|run| folder.at(run));
    let runs: Vec<&str> = runs.iter().map(String::as_str).collect();
    let report = radapt(&[&["eval", "report"], &runs[..], &["--out", &folder.at("report.html")]].concat());
    assert!(report["figures"].is_array());
    holds_with_threats("report", &report);
}

/// The pocket CLIP with every weight of its vision tower a little off, in a folder.
fn sibling() -> String {
    static FOLDER: OnceLock<Folder> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = Folder::new();
        let base = built_in::folder("pocket-clip").expect("the model").expect("built in");
        for entry in std::fs::read_dir(&base).expect("its files") {
            let from = entry.expect("a file").path();
            if from.extension().is_some_and(|end| end == "json") {
                let to = folder.0.path().join(from.file_name().expect("a name"));
                std::fs::copy(&from, to).expect("a copy");
            }
        }
        let mut tensors: HashMap<String, Tensor> =
            candle_core::safetensors::load(base.join("model.safetensors"), &Device::Cpu).expect("weights");
        for (name, tensor) in &mut tensors {
            if name.starts_with("vision_model.") {
                *tensor = (tensor.to_dtype(DType::F32).expect("f32") * 1.1).expect("more");
            }
        }
        candle_core::safetensors::save(&tensors, folder.path("model.safetensors")).expect("written");
        folder
    });
    folder.0.path().display().to_string()
}

#[test]
fn analyses_are_as_their_schema_says_alone_and_in_a_report() {
    let folder = Folder::new();
    let (robust, out) = (sibling(), folder.at("found"));
    let attack = ["--n", "1", "--attack", "pgd", "--steps", "1"];
    let calls: [(&str, &[&str]); 6] = [
        ("cka", &["--n", "4", "--batch", "4"]),
        ("replace", &attack),
        ("spectrum", &[]),
        ("attention", &["--n", "2", "--draw", "1"]),
        ("insensitivity", &["--n", "2"]),
        ("shapley", &[&attack[..], &["--orders", "1"]].concat()),
    ];
    for (name, flags) in calls {
        let all = [&["analyze", name, "--robust", &robust, "--out", &out], flags].concat();
        let document = radapt(&all);
        let written = read(&folder.path("found").join(format!("{name}.json")));
        for document in [&document, &written] {
            if matches!(name, "replace" | "shapley") {
                holds_with_threats("analysis", document);
            } else {
                holds(&schema("analysis"), document);
            }
            let mut other = document.clone();
            other["analysis"] = if name == "cka" { "shapley".into() } else { "cka".into() };
            assert!(!schema("analysis").is_valid(&other), "{name} is no other analysis");
        }
    }
    let run = folder.path("found").join("in");
    a_run_holds(&run, &read(&run.join("summary.json")));
    #[rustfmt::skip]
    let short = radapt(&[
        "analyze", "cka", "--robust", &robust, "--n", "4", "--minibatch-only", "--out", &folder.at("short"),
    ]);
    assert!(short["exact"].is_null());
    holds(&schema("analysis"), &short);

    let report = radapt(&["eval", "report", &out, "--out", &folder.at("report.md")]);
    let schema = schema("report");
    holds(&schema, &report);
    // Tables have their threat models in words.
    let mut checked = 0;
    for (i, analysis) in report["analyses"].as_array().expect("analyses").iter().enumerate() {
        let table = format!("/analyses/{i}/tables/0/lines");
        match analysis["analysis"].as_str().expect("a name") {
            "shapley" => {
                for (field, line) in [("Threat", 1), ("Threat", 2), ("Surrogate", 1)] {
                    let mut changed = report.clone();
                    let cells = changed.pointer_mut(&format!("{table}/{line}/cells")).expect("cells");
                    cells[field] = "–".into();
                    assert!(!schema.is_valid(&changed), "{field} of {cells}", cells = analysis["tables"]);
                    checked += 1;
                }
            }
            "replace" => {
                let mut changed = report.clone();
                let cells = changed.pointer_mut(&format!("{table}/0/cells")).expect("cells");
                cells["pgd @ 4/255"] = 1.into();
                assert!(!schema.is_valid(&changed), "a column without its threat model");
                checked += 1;
            }
            _ => {}
        }
    }
    assert_eq!(checked, 4);
}

#[test]
fn sweeps_and_reports_are_as_their_schemas_say() {
    let folder = Folder::new();
    let (settings, trained) = (folder.at("settings"), folder.at("trained"));
    let common = ["eval", "sweep", "--n", "2", "--steps", "1", "--attack", "pgd"];
    let sweep = radapt(&[&common[..], &["--alphas", "0.4,1.2", "--out", &settings]].concat());
    #[rustfmt::skip]
    let training = [
        "--pictures", "4", "--epochs", "1", "--out", &trained, "--", "--n", "6", "--held-out", "2", "--batch", "2",
        "--steps", "1",
    ];
    let training = radapt(&[&common[..], &training].concat());
    for (document, out) in [(&sweep, "settings"), (&training, "trained")] {
        holds_with_threats("sweep", document);
        holds_with_threats("sweep", &read(&folder.path(out).join("sweep.json")));
        let run = folder.path(out).join("run");
        a_run_holds(&run, &read(&run.join("summary.json")));
    }
    assert!(training["points"][0]["epoch"].is_number());

    let report = radapt(&["eval", "report", &settings, "--format", "json"]);
    holds_with_threats("report", &report);
    let page = folder.at("report.html");
    let report = radapt(&[
        "eval",
        "report",
        &folder.path("settings/run").display().to_string(),
        "--paper",
        "--out",
        &page,
    ]);
    holds_with_threats("report", &report);
    // The paper's robust figures have theirs in words.
    let lines: Vec<(usize, usize)> = report["paper"]["tables"]
        .as_array()
        .expect("tables")
        .iter()
        .enumerate()
        .flat_map(|(t, table)| (0..table["lines"].as_array().expect("lines").len()).map(move |l| (t, l)))
        .filter(|(t, l)| report["paper"]["tables"][t]["lines"][l]["cells"]["Threat"]["text"] == "transfer")
        .collect();
    assert!(lines.len() > 10, "{}", lines.len());
    let schema = schema("report");
    for (t, l) in lines {
        let mut changed = report.clone();
        changed["paper"]["tables"][t]["lines"][l]["cells"]["Threat"] = "–".into();
        assert!(!schema.is_valid(&changed), "{}", report["paper"]["tables"][t]["lines"][l]);
    }
}

#[test]
fn anchors_are_as_their_schemas_say() {
    let anchor = schema("anchor");
    for name in ["pocket-white", "pocket-16-embedding"] {
        holds(&anchor, &radapt(&["anchor", "show", name]));
    }
    holds(&schema("presets"), &radapt(&["anchor", "presets"]));
    let folder = Folder::new();
    let small = fixed("clip/v5");
    let fits = radapt(&["anchor", "check", "pocket-white", "--model", "pocket-clip"]);
    let does_not = failed(&["anchor", "check", "pocket-white", "--model", &small]);
    assert_eq!((&fits["fits"], &does_not["fits"]), (&json!(true), &json!(false)));
    let extracted = radapt(&["anchor", "extract", "--model", &small, "--out", &folder.at("own")]);
    let guide = fixed("guide/hf");
    let guided =
        radapt(&["anchor", "guide", "--from", &guide, "--model", &small, "--out", &folder.at("guided")]);
    [&fits, &does_not, &extracted, &guided].into_iter().for_each(|document| holds(&anchor, document));

    #[rustfmt::skip]
    let common = [
        "--n", "4", "--held-out", "2", "--validate", "1", "--epochs", "1", "--batch", "2", "--steps", "1",
        "--validation-attack", "pgd",
    ];
    let trainings: [(&str, &[&str]); 3] = [
        ("static", &[]),
        ("adaptive", &["--examples", "adaptive"]),
        ("embedding", &["--objective", "embedding"]),
    ];
    for (name, flags) in trainings {
        let out = folder.at(name);
        let trained = radapt(&[&["anchor", "train", "--out", &out], &common[..], flags].concat());
        holds_with_threats("anchor", &trained);
        let held_out = &trained["epochs"][0]["held_out"];
        match name {
            "embedding" => assert!(held_out["adversarial"].is_null() && held_out.get("threat").is_none()),
            "adaptive" => assert_eq!(held_out["threat"], "adaptive"),
            _ => assert_eq!(
                (&held_out["threat"], &held_out["surrogate"]),
                (&json!("transfer"), &json!("pocket-clip"))
            ),
        }
        holds(&anchor, &radapt(&["anchor", "show", &out]));
        let work = folder.path(&format!("{name}.training"));
        holds(&schema("run"), &read(&work.join("run.json")));
        if name != "embedding" {
            let validation = work.join("validation-pgd");
            a_run_holds(&validation, &read(&validation.join("summary.json")));
        }
    }
    let exported =
        radapt(&["anchor", "export", "pocket-white", "--to", "vllm", "--out", &folder.at("export")]);
    holds(&schema("files"), &exported);
}

#[test]
fn what_the_other_commands_print_is_as_their_schemas_say() {
    let folder = Folder::new();
    let (files, bench, pocket) = (schema("files"), schema("bench"), schema("pocket"));
    holds(&files, &radapt(&["pocket", "draw", "--n", "1", "--out", &folder.at("drawn")]));
    holds(
        &files,
        &radapt(&["pocket", "sheet", "--columns", "13", "--rows", "2", "--out", &folder.at("sheet.png")]),
    );
    holds(&files, &radapt(&["completions", "bash"]));
    holds(&files, &radapt(&["man", &folder.at("man")]));
    // A step takes 128 pictures; none is enough for a model in its folder.
    let trained =
        radapt(&["pocket", "train", "clip", "--steps", "1", "--until", "0", "--out", &folder.at("trained")]);
    holds(&pocket, &trained);
    let mut further = trained;
    further["last"] = json!({ "step": 1, "loss": 7.8, "accuracy": 3.9 });
    holds(&pocket, &further);
    holds_with_threats("pocket", &radapt(&["pocket", "score", "--n", "1", "--steps", "1"]));

    // Elsewhere the peak memory is not known.
    if cfg!(target_os = "linux") {
        let small = fixed("clip/v5");
        for dtype in ["f32", "bf16"] {
            #[rustfmt::skip]
            let timed = radapt(&[
                "bench", "attack", "--model", &small, "--batch", "1", "--dtype", dtype, "--repeats", "1",
            ]);
            holds(&bench, &timed);
        }
        holds(&bench, &radapt(&["bench", "v-attack", "--model", "pocket-clip", "--steps", "1"]));
        holds(&bench, &radapt(&["bench", "anchor", "--model", "pocket-clip", "--n", "3", "--batch", "1"]));
    }

    let (model, picture) = (fixed("clip/v4"), fixed("llava/pictures/wide.png"));
    let features = schema("features");
    for anchor in ["none", "training-free"] {
        let out = folder.at("features");
        #[rustfmt::skip]
        let printed = radapt(&["features", &picture, "--model", &model, "--anchor", anchor, "--out", &out]);
        holds(&features, &printed);
        let bytes = std::fs::read(&out).expect("a file");
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("metadata");
        let about = &metadata.metadata().as_ref().expect("metadata")["radapt.features"];
        let about: Value = serde_json::from_str(about).expect("JSON");
        holds(&features, &about);
        assert_eq!(about["defense"].is_null(), anchor == "none");
    }
}

/// A language model that says A of the first request, and nothing that can be used of the others.
fn language_model() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/v1", listener.local_addr().expect("its address"));
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let Ok(mut stream) = stream else { return };
            let mut reader = BufReader::new(stream.try_clone().expect("the stream"));
            let mut length = 0;
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                    break;
                }
                if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                    length = n.trim().parse().expect("a number");
                }
            }
            let _ = reader.read_exact(&mut vec![0; length]);
            let said = if i == 0 { "A" } else { "hm" };
            let body = json!({ "choices": [{ "message": { "content": said } }] }).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close", body.len());
            let _ = write!(stream, "{head}\r\n\r\n{body}");
        }
    });
    url
}

#[test]
fn judgements_are_as_their_schema_says() {
    let folder = Folder::new();
    let schema = schema("judge");
    let cases = "{\"response\":\"A cat.\",\"original\":\"cat\",\"target\":\"dog\"}\n\
                 {\"response\":\"A dog.\",\"original\":\"cat\",\"target\":\"dog\",\"question\":\"What is it?\",\"more\":1}\n";
    std::fs::write(folder.path("cases.jsonl"), format!("{cases}{{\"no\":\"case\"}}\n")).expect("written");
    let (input, summary, url) = (folder.at("cases.jsonl"), folder.at("summary.json"), language_model());
    let words = ["eval", "judge", &input, "--summary", &summary];
    let both = [
        &words[..],
        &["--judge", &url, "--judge-model", "tiny", "--judge-parallel", "1", "--judge-retries", "0"],
    ]
    .concat();
    for (args, with_model) in [(&words[..], false), (&both, true)] {
        let output = command(args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let lines = lines(&text);
        assert_eq!(lines.len(), 3, "{}", String::from_utf8_lossy(&output.stderr));
        lines.iter().for_each(|line| holds(&schema, line));
        assert_eq!(lines[0].get("llm_verdict").is_some(), with_model);
        assert_eq!(lines[1].get("llm_error").is_some(), with_model);
        let summary = read(&folder.path("summary.json"));
        assert_eq!(summary.get("llm").is_some(), with_model);
        holds(&schema, &summary);
    }
    assert!(!schema.is_valid(&json!({ "response": "A cat.", "original": "cat", "target": "dog" })));
}

/// The commands of the README's table, `eval classify`, with the schemas that their lines name.
fn table() -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(folder().join("README.md")).expect("the README");
    let quoted =
        |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(String::from).collect() };
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `radapt ")?.split_once("` |"));
    let schemas = |rest: &str| -> Vec<String> {
        quoted(rest).iter().filter_map(|name| name.strip_suffix("-1")).map(String::from).collect()
    };
    rows.map(|(command, rest)| (command.to_string(), schemas(rest))).collect()
}

#[test]
fn every_command_has_a_schema_and_every_schema_a_command() {
    let table = table();
    let folder = Folder::new();
    let man = radapt(&["man", &folder.at("man")]);
    let pages = man["pages"].as_array().expect("pages").iter().filter_map(Value::as_str);
    let names: Vec<&str> =
        pages.filter_map(|page| page.strip_prefix("radapt-")?.strip_suffix(".1")).collect();
    // Commands of commands print nothing themselves.
    let last = |name: &&&str| !names.iter().any(|other| other.starts_with(&format!("{name}-")));
    let listed: Vec<String> = table.keys().map(|command| command.replace(' ', "-")).collect();
    let commands: Vec<&&str> = names.iter().filter(last).collect();
    assert!(commands.len() > 25, "{commands:?}");
    for command in &commands {
        assert!(listed.iter().any(|name| name == **command), "schemas/README.md has no line for {command}");
    }
    if cfg!(feature = "engine") {
        for name in &listed {
            assert!(commands.iter().any(|command| **command == name), "schemas/README.md: no command {name}");
        }
    }
    for (command, schemas) in &table {
        assert!(!schemas.is_empty(), "{command} has no schema");
        for name in schemas {
            assert!(SCHEMAS.contains_key(name), "{command}: no schema {name}");
        }
    }
    // A run's files are named once for all runs.
    for name in SCHEMAS.keys().filter(|name| !matches!(name.as_str(), "run" | "items")) {
        assert!(table.values().flatten().any(|known| known == name), "no command has {name}");
    }
}

#[test]
fn schemas_are_schemas_and_what_they_share_is_the_same() {
    let mut shared: HashMap<&str, (&str, &Value)> = HashMap::new();
    for (name, value) in SCHEMAS.iter() {
        assert!(jsonschema::meta::is_valid(value), "{name}");
        assert_eq!(value["$id"], format!("urn:radapt:schema:{name}:1"));
        for (key, definition) in value["$defs"].as_object().into_iter().flatten() {
            let (first, other) = *shared.entry(key).or_insert((name, definition));
            assert_eq!(definition, other, "{key} in {name} and {first}");
        }
    }
    assert!(shared.contains_key("threat_model") && shared.contains_key("row"));
}

#[cfg(feature = "engine")]
#[test]
fn an_answer_is_as_its_schema_says() {
    let picture = fixed("llava/pictures/wide.png");
    for anchor in ["none", "training-free"] {
        holds(&schema("chat"), &radapt(&["chat", "--anchor", anchor, "--image", &picture, "What is it?"]));
    }
}

#[cfg(feature = "engine")]
#[test]
fn runs_that_ask_are_as_their_schemas_say() {
    let folder = Folder::new();
    for threat in ["transfer", "adaptive"] {
        let out = folder.at(threat);
        #[rustfmt::skip]
        radapt(&[
            "attack", "v-attack", "--n", "1", "--threat", threat, "--eps", "8/255", "--steps", "1", "--out", &out,
        ]);
    }
    let crafted = format!("{},{}", folder.at("transfer"), folder.at("adaptive"));
    let url = language_model();
    let judge = ["--judge", &url, "--judge-model", "tiny", "--judge-parallel", "1", "--judge-retries", "0"];
    let calls: [(&str, &str, &[&str]); 4] = [
        ("coco", "coco", &[]),
        ("judged", "coco", &judge),
        ("vqa", "vqa", &[]),
        ("pope", "vqa", &["--data", "pocket-pope"]),
    ];
    for (name, task, flags) in calls {
        let out = folder.at(name);
        let args = ["eval", task, "--n", "1", "--crafted", &crafted, "--out", &out];
        let output = command(&[&["--json", "--quiet"], &args[..], flags].concat());
        let summary: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{name}: {e}: {}", String::from_utf8_lossy(&output.stderr)));
        assert_eq!(summary.get("agreement").is_some(), name == "judged");
        a_run_holds(&folder.path(name), &summary);
        holds_with_threats("summary", &summary);
        lines_have_threats(&folder.path(name));
    }
    let runs = ["coco", "vqa", "pope"].map(|run| folder.at(run));
    let report = radapt(&["eval", "report", &runs[0], &runs[1], &runs[2], "--out", &folder.at("report.md")]);
    holds_with_threats("report", &report);
}

#[cfg(feature = "engine")]
#[test]
fn the_demo_is_as_its_schema_says() {
    let folder = Folder::new();
    let demo = radapt(&["demo", "--pictures", "1", "--steps", "1", "--out", &folder.at("demo.html")]);
    // The versions of a picture have their threat models as names.
    holds_with_threats("demo", &demo);
    let mut changed = demo;
    changed["pictures"][0].as_object_mut().expect("a picture").remove("adaptive");
    assert!(!schema("demo").is_valid(&changed));
}

#[cfg(feature = "engine")]
#[test]
fn what_the_server_says_of_itself_is_as_its_schema_says() {
    let schema = schema("serve");
    holds(&schema, &radapt(&["serve", "--check"]));
    holds(&schema, &radapt(&["serve", "--check", "--anchor", "none"]));
    holds(&schema, &failed(&["serve", "--check", "--model", "/nowhere/model"]));
    let mut server = Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(["serve", "--addr", "127.0.0.1:0", "--json", "--quiet"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    let mut line = String::new();
    let read = BufReader::new(server.stdout.take().expect("a pipe")).read_line(&mut line);
    server.kill().and_then(|()| server.wait()).expect("it stops");
    read.expect("its first line");
    holds(&schema, &serde_json::from_str(&line).expect("JSON"));
}
