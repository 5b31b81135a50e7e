//! Caption and answer metrics against the figures of the programs that define them.

use radapt::eval::metrics::caption::{Captioned, score, tokenise};
use radapt::eval::metrics::vqa;
use serde_json::Value;

fn near(found: f64, expected: f64, what: &str) {
    assert!(
        (found - expected).abs() <= 1e-9 * expected.abs().max(1.0),
        "{what}: {found}, expected {expected}"
    );
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(text).collect()
}

fn captions() -> Value {
    serde_json::from_str(include_str!("fixtures/captions/captions.json")).unwrap()
}

#[test]
fn cider_and_bleu_are_pycocoevalcaps() {
    let fixture = captions();
    let items = fixture["items"].as_array().unwrap();
    let tokenised: Vec<Captioned> = items
        .iter()
        .map(|item| Captioned::tokenised(text(&item["caption_tokens"]), &strings(&item["reference_tokens"])))
        .collect();
    let found = score(&tokenised).unwrap();
    near(found.cider, 100.0 * fixture["cider"].as_f64().unwrap(), "CIDEr");
    near(found.bleu4, 100.0 * fixture["bleu4"].as_f64().unwrap(), "BLEU-4");
    for (i, item) in items.iter().enumerate() {
        near(found.ciders[i], 100.0 * item["cider"].as_f64().unwrap(), &format!("CIDEr of {i}"));
        near(found.bleu4s[i], 100.0 * item["bleu4"].as_f64().unwrap(), &format!("BLEU-4 of {i}"));
    }
    // And from the sentences, with our own tokeniser.
    let sentences: Vec<Captioned> = items
        .iter()
        .map(|item| Captioned::new(text(&item["caption"]), &strings(&item["references"])))
        .collect();
    assert_eq!(score(&sentences).unwrap(), found);
}

#[test]
fn captions_are_tokenised_as_the_penn_treebank_is() {
    let mut wrong = Vec::new();
    for item in captions()["items"].as_array().unwrap() {
        let references = strings(&item["references"]).into_iter().zip(strings(&item["reference_tokens"]));
        for (sentence, tokens) in references.chain([(text(&item["caption"]), text(&item["caption_tokens"]))])
        {
            let found = tokenise(sentence).join(" ");
            if found != tokens {
                wrong.push(format!("{sentence}: {found}, expected {tokens}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn captions_without_references_are_refused() {
    assert!(score(&[]).is_err());
    let none: [&str; 0] = [];
    let error = score(&[Captioned::new("a cat", &none)]).unwrap_err().to_string();
    assert!(error.ends_with("found none for caption 0"), "{error}");
}

#[test]
fn vqa_accuracy_is_the_officials() {
    let fixture: Value = serde_json::from_str(include_str!("fixtures/vqa/vqa.json")).unwrap();
    for pair in fixture["normalised"].as_array().unwrap() {
        assert_eq!(vqa::normalised(text(&pair[0])), text(&pair[1]), "{}", pair[0]);
    }
    let mut seen = std::collections::BTreeSet::new();
    for case in fixture["accuracy"].as_array().unwrap() {
        let expected = case["accuracy"].as_f64().unwrap();
        let found = vqa::accuracy(text(&case["answer"]), &strings(&case["humans"]));
        near(found, expected, &case.to_string());
        seen.insert((100.0 * expected).round() as u32);
    }
    // 0, 30, 60, 90 and 100 are all there are with ten answers.
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 30, 60, 90, 100]);
    let none: [&str; 0] = [];
    assert_eq!(vqa::accuracy("cat", &none), 0.0);
}

#[test]
fn long_answers_are_cut_as_fares_script_cuts_them() {
    for (answer, cut) in [
        ("red", "red"),
        ("red, blue", "red"),
        ("1,000", "1,000"),
        ("red Question: what", "red "),
        ("red\nShort Answer", "red\n"),
        ("Answer", ""),
    ] {
        assert_eq!(vqa::cut(answer), cut, "{answer}");
    }
}
