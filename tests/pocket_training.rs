//! The pocket models' training: it repeats, it can be stopped and go on, and its first steps give
//! the losses committed beside the shipped weights.

use std::path::Path;

use radapt::pocket::training::{Plan, Step, clip, llava};

fn steps(text: &str) -> Vec<Step> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Other processors add in another order, and fifty steps let that grow.
fn same_losses(found: &[Step], committed: &[Step]) {
    assert_eq!(found.len(), 50);
    for (found, committed) in found.iter().zip(committed) {
        assert_eq!(found.step, committed.step);
        let off = (found.loss - committed.loss).abs() / committed.loss;
        assert!(off < 0.01, "step {}: {} instead of {}", found.step, found.loss, committed.loss);
    }
    let exact = found.iter().zip(committed).filter(|(a, b)| a == b).count();
    println!("{exact} of 50 losses are equal to the last bit");
}

#[test]
fn the_first_fifty_steps_of_the_clip_give_the_committed_losses() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan { until: Some(50), ..clip::PLAN };
    let mut found = Vec::new();
    clip::train(&plan, folder.path(), &mut |step| found.push(step.clone())).unwrap();
    same_losses(&found, &steps(include_str!("../pocket/clip/losses.jsonl")));
}

#[test]
fn the_first_fifty_steps_of_the_llava_give_the_committed_losses() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan { until: Some(50), ..llava::PLAN };
    let mut found = Vec::new();
    let clip = Path::new(env!("CARGO_MANIFEST_DIR")).join("pocket/clip");
    llava::train(&plan, &clip, folder.path(), &mut |step| found.push(step.clone())).unwrap();
    same_losses(&found, &steps(include_str!("../pocket/llava/losses.jsonl")));
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let small = Plan { steps: 4, group: 3, groups: 2, warmup: 2, seed: 7, ..clip::PLAN };
    let run = |stops: &[u64]| {
        let folder = tempfile::tempdir().unwrap();
        for until in stops {
            clip::train(&Plan { until: Some(*until), ..small }, folder.path(), &mut |_| ()).unwrap();
        }
        let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
        (read("losses.jsonl"), read("model/model.safetensors"), read("model/tokenizer.json"))
    };
    let (whole, stopped) = (run(&[4]), run(&[1, 3, 4]));
    assert!(
        whole == stopped,
        "losses:\n{}\n{}",
        String::from_utf8_lossy(&whole.0),
        String::from_utf8_lossy(&stopped.0)
    );
    assert_eq!(steps(std::str::from_utf8(&whole.0).unwrap()).len(), 4);
}

#[test]
fn a_folder_is_of_one_plan() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan { steps: 1, group: 2, groups: 1, warmup: 1, ..clip::PLAN };
    clip::train(&plan, folder.path(), &mut |_| ()).unwrap();
    let error = clip::train(&Plan { seed: 2, ..plan }, folder.path(), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("plan.json"), "{error}");

    let none = Plan { groups: 0, ..plan };
    let error = clip::train(&none, tempfile::tempdir().unwrap().path(), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("0 groups"), "{error}");

    // And a LLaVA's is of one CLIP.
    let other = folder.path().join("model");
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("pocket/clip");
    let llava_folder = tempfile::tempdir().unwrap();
    let plan = Plan { steps: 1, group: 2, groups: 1, warmup: 1, ..llava::PLAN };
    llava::train(&plan, &shipped, llava_folder.path(), &mut |_| ()).unwrap();
    let error = llava::train(&plan, &other, llava_folder.path(), &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("another CLIP"), "{error}");
}
