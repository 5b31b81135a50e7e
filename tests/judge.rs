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
