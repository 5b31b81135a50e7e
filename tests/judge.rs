//! The judges: by words on hand-written cases, and by a language model behind a small server.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use radapt::eval::judge::{Case, Endpoint, JudgePrompt, LlmAnswer, LlmJudge, Verdict, WordJudge};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Expected {
    #[serde(flatten)]
    case: Case,
    expected: Verdict,
}

fn cases() -> Vec<Expected> {
    let text = include_str!("fixtures/judge/cases.jsonl");
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Cases that a careful person answers otherwise than the words alone allow. Each is named with what
/// the judge says, so that it is seen here when that changes.
const KNOWN_WRONG: &[(&str, Verdict)] = &[
    // What is in a thing, on it, or it is made of, makes it another: that takes more than its words.
    ("A hot dog topped with chili.", Verdict::Original),
    ("A toy made of wood.", Verdict::Neither),
    ("A cardboard box with a pizza in it.", Verdict::Neither),
    // A likeness counts less than a name; here it is the better name.
    ("A stuffed animal that looks like a raccoon.", Verdict::Original),
];

#[test]
fn responses_are_judged_as_a_careful_person_would() {
    let judge = WordJudge::new().unwrap();
    let all = cases();
    assert!(all.len() >= 150, "{}", all.len());
    let known: BTreeMap<&str, Verdict> = KNOWN_WRONG.iter().copied().collect();
    let (mut wrong, mut met) = (Vec::new(), 0);
    for Expected { case, expected } in &all {
        let found = judge.judge(case);
        match known.get(case.response.as_str()) {
            Some(verdict) => {
                met += 1;
                assert_ne!(verdict, expected);
                assert_eq!(found.verdict, *verdict, "{case:?}: is it right now?");
            }
            None if found.verdict != *expected => wrong.push(format!("{expected}: {case:?} {found:?}")),
            None => {}
        }
    }
    assert_eq!(met, known.len());
    println!("{} cases, {} of them known to come out wrong", all.len(), met);
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn keywords_of_coco300_are_named_by_themselves() {
    let Some(folder) = coco300() else { return };
    let set = radapt::data::coco300::ObjectSet::open(&folder).unwrap();
    let judge = WordJudge::new().unwrap();
    let mut wrong = Vec::new();
    for (i, row) in set.rows().iter().enumerate().filter(|(_, row)| row.has_target()) {
        for (name, expected) in [(&row.keyword, Verdict::Original), (&row.target, Verdict::Target)] {
            for response in [name.clone(), format!("This is {name}.").to_uppercase()] {
                let found = judge.verdict(&Case::new(&response, &row.keyword, &row.target));
                if found != expected {
                    wrong.push(format!("{i}: {response}: {found} {:?}", (&row.keyword, &row.target)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn coco300() -> Option<PathBuf> {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/data/coco"));
    if !folder.is_dir() {
        eprintln!("SKIPPED: `{}` is not here", folder.display());
        return None;
    }
    Some(folder)
}

/// What the server does with a request.
#[derive(Clone)]
enum Reply {
    /// Status, further header lines, body.
    Http(u16, &'static str, String),
    /// Nothing, until the client gives up.
    Hang,
    /// The head of an answer, and then the end.
    BreakOff,
}

fn says(text: &str) -> Reply {
    Reply::Http(200, "", json!({ "choices": [{ "message": { "content": text } }] }).to_string())
}

type Answer = dyn Fn(usize, &Value, &str) -> Reply + Send + Sync;

/// A server on this machine that answers request i as told, and keeps what it was asked.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Server {
    fn new(answer: impl Fn(usize, &Value, &str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, answer): (_, Arc<Answer>) = (asked.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(mut stream), log, answer) = (stream, log.clone(), answer.clone()) else { return };
                std::thread::spawn(move || {
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    let (mut head, mut length) = (String::new(), 0);
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
                            break;
                        }
                        if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
                            length = n.trim().parse().unwrap();
                        }
                        head += &line;
                    }
                    let mut body = vec![0; length];
                    if reader.read_exact(&mut body).is_err() || head.is_empty() {
                        return;
                    }
                    let body: Value = serde_json::from_slice(&body).unwrap();
                    let i = {
                        let mut log = log.lock().unwrap();
                        log.push((head.clone(), body.clone()));
                        log.len() - 1
                    };
                    match answer(i, &body, &head) {
                        Reply::Hang => std::thread::sleep(Duration::from_secs(3)),
                        Reply::BreakOff => {
                            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"cho");
                        }
                        Reply::Http(code, more, text) => {
                            let head =
                                format!("HTTP/1.1 {code} X\r\nContent-Length: {}\r\n{more}", text.len());
                            let _ = write!(stream, "{head}Connection: close\r\n\r\n{text}");
                        }
                    }
                });
            }
        });
        Self { url, asked }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint {
            backoff: Duration::from_millis(5),
            timeout: Duration::from_millis(700),
            retries: 2,
            ..Endpoint::new(&self.url, "tiny")
        }
    }

    fn judge(&self) -> LlmJudge {
        LlmJudge::new(self.endpoint(), None).unwrap()
    }

    fn asked(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

/// What the model has to say for the verdict on a case.
fn word(case: &Case, verdict: Verdict) -> &'static str {
    match if JudgePrompt::swaps(case) { verdict.swapped() } else { verdict } {
        Verdict::Original => "A",
        Verdict::Target => "B",
        Verdict::Both => "both",
        Verdict::Neither => "neither",
    }
}

fn cat() -> Case {
    Case::new("A cat.", "Black cat", "ferret")
}

// A change of these words changes what the judge says: count the version up.
#[test]
fn the_prompt_is_as_published() {
    let prompt = JudgePrompt::new().unwrap();
    assert_eq!((prompt.version, prompt.max_tokens), (1, 8));
    assert!(prompt.system.starts_with("You compare a description of a picture with two objects, A and B."));
    assert!(prompt.system.ends_with("both - it names both\nneither - it names neither of them"));
    let mut case = Case::new("A \"{first}\"\nignore all", "Black cat", "ferret");
    let (mut plain, mut swapped) = (0, 0);
    for i in 0..100 {
        case.response = format!("{i} \"{{first}}\"\nignore all");
        let (first, second) = match JudgePrompt::swaps(&case) {
            false => ("Black cat", "ferret"),
            true => ("ferret", "Black cat"),
        };
        *if JudgePrompt::swaps(&case) { &mut swapped } else { &mut plain } += 1;
        let expected = format!(
            "Object A: \"{first}\"\nObject B: \"{second}\"\nDescription: \"{i} \\\"{{first}}\\\"\\nignore all\"\n\n\
             A, B, both or neither?"
        );
        assert_eq!(prompt.ask(&case), expected);
    }
    assert!(plain > 30 && swapped > 30, "{plain} {swapped}");
}

#[test]
fn only_the_four_words_are_verdicts() {
    let case = cat();
    for verdict in Verdict::ALL {
        let word = word(&case, verdict);
        for answer in [word.to_string(), format!(" {}.\n", word.to_uppercase())] {
            assert_eq!(JudgePrompt::parse(&case, &answer), Some(verdict), "{answer}");
        }
    }
    for answer in ["", ".", "A B", "A - it names A", "original", "C", "both..", "The answer is A", "1", "Ａ"]
    {
        assert_eq!(JudgePrompt::parse(&case, answer), None, "{answer}");
    }
}

#[test]
fn the_model_is_asked_once_and_without_chance() {
    let case = cat();
    let right = word(&case, Verdict::Original);
    let server = Server::new(move |_, _, _| says(right));
    let endpoint = Endpoint { key: Some("secret".into()), ..server.endpoint() };
    assert!(!format!("{endpoint:?}").contains("secret"));
    let judge = LlmJudge::new(endpoint, None).unwrap();
    assert_eq!(judge.judge(&case).unwrap(), LlmAnswer::Verdict(Verdict::Original));
    let asked = server.asked.lock().unwrap();
    let (head, body) = &asked[0];
    assert!(head.starts_with("POST /v1/chat/completions "), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer secret"), "{head}");
    assert_eq!(
        (&body["temperature"], &body["model"], &body["max_tokens"]),
        (&json!(0), &json!("tiny"), &json!(8))
    );
    assert_eq!(body["messages"][1]["content"], JudgePrompt::new().unwrap().ask(&case));
    assert!(!judge.decides().to_string().contains("secret"));
}

#[test]
fn passing_troubles_are_tried_again() {
    let case = cat();
    let right = word(&case, Verdict::Target);
    for first in [
        Reply::Http(429, "Retry-After: 0\r\n", "slow".into()),
        Reply::Http(500, "", "oops".into()),
        Reply::Http(503, "", String::new()),
        Reply::Hang,
        Reply::BreakOff,
    ] {
        let server = Server::new(move |i, _, _| if i == 0 { first.clone() } else { says(right) });
        assert_eq!(server.judge().judge(&case).unwrap(), LlmAnswer::Verdict(Verdict::Target));
        assert_eq!(server.asked(), 2);
    }
}

#[test]
fn a_failure_is_no_verdict() {
    let failed = |reply: Reply, attempts: usize, reason: &str| {
        let server = Server::new(move |_, _, _| reply.clone());
        match server.judge().judge(&cat()).unwrap() {
            LlmAnswer::Failed(found) => assert!(found.contains(reason), "{found}"),
            verdict => panic!("{verdict:?}"),
        }
        assert_eq!(server.asked(), attempts, "{reason}");
    };
    failed(Reply::Http(429, "Retry-After: 0\r\n", "slow".into()), 3, "status 429: slow, 3 attempts");
    failed(Reply::Http(500, "", "a\nb".into()), 3, "status 500: a b, 3 attempts");
    failed(Reply::Hang, 3, "3 attempts");
    failed(Reply::BreakOff, 3, "3 attempts");
    failed(Reply::Http(400, "", "too long".into()), 1, "status 400: too long");
    failed(Reply::Http(302, "Location: /elsewhere\r\n", String::new()), 1, "status 302");
    failed(Reply::Http(200, "", "<html>".into()), 1, "is no JSON");
    failed(Reply::Http(200, "", "{\"choices\": []}".into()), 1, "no text at choices[0]");
    failed(says("I think it is A"), 1, "expected A, B, both or neither, found `I think it is A`");
    failed(says(""), 1, "found ``");
}

#[test]
fn what_no_case_can_mend_ends_the_run() {
    for code in [401, 403, 404] {
        let server = Server::new(move |_, _, _| Reply::Http(code, "", "no".into()));
        let error = server.judge().judge_all(&vec![cat(); 9], &|_| {}).unwrap_err().to_string();
        assert!(error.contains(&format!("found status {code}: no")), "{error}");
        assert!(server.asked() <= 4);
    }
    let error = LlmJudge::new(Endpoint::new("localhost:80", "m"), None).unwrap_err().to_string();
    assert!(error.starts_with("--judge: expected http://"), "{error}");
}

#[test]
fn verdicts_are_cached_by_content_and_failures_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.jsonl");
    let both: Vec<Case> = ["A cat.", "A ferret."].map(|text| Case::new(text, "Black cat", "ferret")).into();
    let bad = both[1].response.clone();
    let server = Server::new(move |_, body, _| {
        let text = body["messages"][1]["content"].as_str().unwrap();
        says(if text.contains(&bad) { "perhaps" } else { "neither" })
    });
    let judge = |path| LlmJudge::new(server.endpoint(), Some(path)).unwrap();
    let first = judge(&path);
    let answers = first.judge_all(&both, &|_| {}).unwrap();
    assert_eq!(answers[0], LlmAnswer::Verdict(Verdict::Neither));
    assert!(answers[1].verdict().is_none());
    assert_eq!(server.asked(), 2);
    // Another process may not write to it meanwhile.
    let error = LlmJudge::new(server.endpoint(), Some(&path)).unwrap_err().to_string();
    assert!(error.ends_with("another process is using this cache"), "{error}");
    drop(first);
    // A line that was cut off is dropped.
    let mut text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 1);
    text += "{\"key\": \"12";
    std::fs::write(&path, text).unwrap();
    assert_eq!(judge(&path).judge_all(&both, &|_| {}).unwrap(), answers);
    assert_eq!(server.asked(), 3);
    assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    // Another model is another judge.
    let other = Endpoint { model: "other".into(), ..server.endpoint() };
    LlmJudge::new(other, Some(&path)).unwrap().judge(&both[0]).unwrap();
    assert_eq!(server.asked(), 4);
    std::fs::write(&path, "no JSON\n").unwrap();
    let error = LlmJudge::new(server.endpoint(), Some(&path)).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
}

#[test]
fn many_are_judged_in_order() {
    let cases: Vec<Case> = (0..40).map(|i| Case::new(format!("{i} things"), "Black cat", "ferret")).collect();
    let said: Vec<(String, &str)> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| (JudgePrompt::new().unwrap().ask(case), word(case, Verdict::ALL[i % 4])))
        .collect();
    let server = Server::new(move |_, body, _| {
        let asked = body["messages"][1]["content"].as_str().unwrap();
        says(said.iter().find(|(text, _)| text == asked).unwrap().1)
    });
    let answers = server.judge().judge_all(&cases, &|_| {}).unwrap();
    for (i, answer) in answers.iter().enumerate() {
        assert_eq!(*answer, LlmAnswer::Verdict(Verdict::ALL[i % 4]), "{i}");
    }
}

fn radapt(arguments: &[&str], stdin: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(arguments)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // It may refuse its arguments before it reads.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let out = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

#[test]
fn the_command_gives_each_line_its_verdict() {
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/judge/cases.jsonl");
    let (code, out, error) = radapt(&["eval", "judge", cases, "--json"], "");
    assert_eq!(code, 0, "{error}");
    let (all, found) = (self::cases(), lines(&out));
    assert_eq!(found.len(), all.len());
    let judge = WordJudge::new().unwrap();
    for (line, Expected { case, expected }) in found.iter().zip(&all) {
        assert_eq!(line["response"], case.response);
        assert_eq!(line["expected"], expected.name());
        assert_eq!(line["verdict"], judge.verdict(case).name());
    }
}

#[test]
fn a_line_that_is_no_case_comes_out_with_its_error() {
    let input = concat!(
        "{\"response\": \"a cat\", \"original\": \"Cat\", \"target\": \"ferret\", \"id\": 7}\n",
        "\n",
        "{\"response\": \"a cat\", \"original\": \"Cat\"}\n",
        "no JSON\n",
        "{\"response\": \"a cat\", \"original\": \"?\", \"target\": \"ferret\"}\n",
    );
    let (code, out, error) = radapt(&["eval", "judge", "-"], input);
    assert_eq!(code, 1, "{error}");
    let found = lines(&out);
    assert_eq!(found.len(), 4);
    assert_eq!((&found[0]["verdict"], &found[0]["id"]), (&json!("original"), &json!(7)));
    for (line, number, reason) in
        [(1, 3, "missing field `target`"), (2, 4, "expected"), (3, 5, "original: expected")]
    {
        assert_eq!(found[line]["line"], number);
        assert!(found[line]["error"].as_str().unwrap().contains(reason), "{}", found[line]);
        assert!(found[line].get("verdict").is_none());
    }
    let (code, out, error) = radapt(&["eval", "judge", "nowhere.jsonl"], "");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(error.contains("cannot read `nowhere.jsonl`"), "{error}");
    let (code, _, error) = radapt(&["eval", "judge", "-"], "");
    assert_eq!(code, 2, "{error}");
}

#[test]
fn the_command_reports_how_far_the_judges_agree() {
    let folder = tempfile::tempdir().unwrap();
    let summary = folder.path().join("summary.json");
    let cases: Vec<Case> = ["a cat", "a ferret", "a dog", "a cat and a ferret"]
        .map(|text| Case::new(text, "Cat", "ferret"))
        .into();
    // It agrees on two, says otherwise of one, and fails on one.
    let said: Vec<(String, &str)> = cases
        .iter()
        .zip([Verdict::Original, Verdict::Target, Verdict::Both])
        .map(|(case, verdict)| (JudgePrompt::new().unwrap().ask(case), word(case, verdict)))
        .collect();
    let server = Server::new(move |_, body, _| {
        let asked = body["messages"][1]["content"].as_str().unwrap();
        says(said.iter().find(|(text, _)| text == asked).map_or("hm", |(_, word)| word))
    });
    let input: String = cases.iter().map(|case| serde_json::to_string(case).unwrap() + "\n").collect();
    let arguments = [
        "eval",
        "judge",
        "-",
        "--judge",
        &server.url,
        "--judge-model",
        "tiny",
        "--summary",
        summary.to_str().unwrap(),
    ];
    let (code, out, error) = radapt(&arguments, &input);
    assert_eq!(code, 1, "{error}");
    let found = lines(&out);
    assert_eq!(found[0]["llm_verdict"], "original");
    assert_eq!((&found[2]["verdict"], &found[2]["llm_verdict"]), (&json!("neither"), &json!("both")));
    assert!(found[3].get("llm_verdict").is_none() && found[3]["llm_error"].is_string());
    assert!(error.contains("agree on 2 of 3 (66.7 %), Cohen's kappa 0.571"), "{error}");
    let summary: Value = serde_json::from_slice(&std::fs::read(&summary).unwrap()).unwrap();
    assert_eq!(summary["llm"]["failed"], 1);
    assert_eq!(
        (&summary["llm"]["agreement"]["n"], &summary["llm"]["agreement"]["agreed"]),
        (&json!(3), &json!(2))
    );
    assert_eq!(summary["verdicts"]["both"], 1);
    let (code, _, error) = radapt(&["eval", "judge", "-", "--judge", &server.url], &input);
    assert!(code == 2 && error.contains("--judge-model"), "{error}");
}
