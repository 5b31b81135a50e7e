//! `examples/tables/`: every recipe end to end on the built-in models, and that it wrote what it says.
#![cfg(all(feature = "engine", unix))]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tables").join(name)
}

/// A recipe with nothing of this environment in it.
fn recipe(name: &str, out: &Path) -> Command {
    let mut command = Command::new("bash");
    command.arg(script(name)).env("RADAPT", env!("CARGO_BIN_EXE_radapt")).env("OUT", out);
    for variable in [
        "ANSWERS",
        "ATTACK",
        "CLIP",
        "DATA",
        "DEVICE",
        "DTYPE",
        "EPOCHS",
        "EPS",
        "FARE",
        "ISQ",
        "JUDGE",
        "MODEL",
        "MODELS",
        "N",
        "N_TRAIN",
        "OBJECTIVE",
        "PASSES",
        "PGD_STEPS",
        "PICTURES",
        "QUERIES",
        "RADAPT_MODEL",
        "SETTINGS",
        "SIZE",
        "STEP",
        "STEPS",
        "SURROGATE",
        "TECOA",
        "TGA",
        "TRAIN",
    ] {
        command.env_remove(variable);
    }
    command.env("HF_HUB_OFFLINE", "1");
    command
}

#[track_caller]
fn done(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Runs a recipe on the built-in models and gives what it wrote.
fn pocket(number: usize, out: &Path) -> String {
    let start = Instant::now();
    let said = done(&recipe(&format!("table{number}.sh"), out).arg("--pocket").output().expect("bash"));
    println!("table {number}: {:.1} s", start.elapsed().as_secs_f64());
    let table = out.join(format!("table{number}.md"));
    assert!(said.contains(&format!("table{number}: {}", table.display())), "{said}");
    read(&table)
}

/// Rows of the report's CSV: its columns by name.
fn rows(number: usize, out: &Path, columns: &[&str]) -> Vec<Vec<String>> {
    let text = read(&out.join(format!("table{number}.csv")));
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let names = reader.headers().expect("a header").clone();
    let places: Vec<usize> = columns
        .iter()
        .map(|column| names.iter().position(|name| name == *column).expect("a column of that name"))
        .collect();
    reader
        .records()
        .map(|record| {
            let record = record.expect("a row");
            places.iter().map(|place| record[*place].to_string()).collect()
        })
        .collect()
}

/// Runs a table with robust figures and asserts that it has these defences, attacks and radii under both threat
/// models, each run whole, and the paper's figures below.
#[track_caller]
fn robust(number: usize, defences: &[&str], attacks: &[(&str, &str)], paper: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("run");
    let table = pocket(number, &out);
    assert!(table.contains(paper), "the paper's figures, such as {paper}");
    assert!(table.contains("does not name its threat model"), "{table}");
    let found = rows(number, &out, &["defense", "attack", "eps", "threat", "complete", "n"]);
    let has = |defence: &str, attack: &str, eps: &str, threat: &str| {
        let whole = |row: &&Vec<String>| row[4] == "true" && row[5].parse::<usize>().is_ok_and(|n| n > 0);
        let row = found.iter().find(|row| row[..4] == [defence, attack, eps, threat]);
        assert!(row.as_ref().is_some_and(whole), "{defence}, {attack}, {eps}, {threat}: {found:?}");
    };
    for defence in defences {
        has(defence, "", "", "");
        for (attack, eps) in attacks {
            has(defence, attack, eps, "transfer");
            has(defence, attack, eps, "adaptive");
        }
    }
    assert!(read(&out.join("report.html")).contains("</html>"));
}

#[test]
fn table_1() {
    robust(
        1,
        &["none", "clip", "fare", "plus"],
        &[("apgd-ce", "4/255")],
        "| R-Adapt+ (`plus`) | 64.0 | 83.1 |",
    );
}

#[test]
fn table_2() {
    let attacks = ["pgd", "cw", "apgd-ce"].map(|attack| ["1/255", "2/255", "4/255"].map(|eps| (attack, eps)));
    robust(2, &["none", "clip", "fare", "plus"], attacks.as_flattened(), "| 63.1 | 60.5 | 57.2 |");
}

#[test]
fn table_3() {
    let attacks = ["apgd-dlr", "fab-t", "square"].map(|attack| ["2/255", "4/255"].map(|eps| (attack, eps)));
    robust(3, &["none", "plus"], attacks.as_flattened(), "| 62.9 | 59.2 | 62.4 |");
}

#[test]
fn table_4() {
    robust(4, &["none", "plus"], &[("pgd", "2/255"), ("pgd", "4/255")], "| 79.7 | 98.4 | 77.5 |");
}

#[test]
fn table_6() {
    robust(6, &["none", "gif", "fra", "gif+fra"], &[("apgd-ce", "4/255")], "| 86.9 | 82.5 |");
}

#[test]
fn table_7() {
    robust(7, &["none", "images-20", "images-40"], &[("apgd-ce", "4/255")], "| 76.8 | 80.4 |");
}

#[test]
fn table_8() {
    robust(8, &["none", "epochs-1", "epochs-2"], &[("apgd-ce", "4/255")], "| 74.7 | 78.3 |");
}

/// Of language models: the undefended one has no adaptive row, for nothing was crafted through no defence.
#[track_caller]
fn said(number: usize, defences: &[&str], transfer: &[&str], adaptive: &str, paper: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("run");
    let table = pocket(number, &out);
    assert!(table.contains(paper), "the paper's figures, such as {paper}");
    let found = rows(number, &out, &["task", "defense", "attack", "eps", "threat", "complete"]);
    let has = |row: [&str; 5]| {
        let found = found.iter().find(|found| found[..5] == row);
        assert!(found.is_some_and(|found| found[5] == "true"), "{row:?}");
    };
    for task in ["caption", "vqa"] {
        for defence in ["none"].iter().chain(defences) {
            has([task, defence, "", "", ""]);
            for attack in transfer {
                has([task, defence, attack, "16/255", "transfer"]);
            }
        }
        for defence in defences {
            has([task, defence, adaptive, "16/255", "adaptive"]);
        }
    }
}

#[test]
fn table_5() {
    said(5, &["plus-8", "plus-16"], &["v-attack"], "v-attack", "| 99.3 | 85.3 | 98.3 | 79.4 |");
}

#[test]
fn table_11() {
    said(11, &["plus-16"], &["v-attack", "pgd"], "pgd", "| 100.0 | 76.7 | 100.0 | 73.8 |");
}

#[test]
fn table_9() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = pocket(9, folder.path());
    for row in ["| `clip` | 1.2 | -0.8 |", "| `fare` | 1.2 | 0 |", "| `plus` | 0.8 | 0.2 | 40 |"] {
        assert!(table.contains(row), "{row}: {table}");
    }
}

#[test]
fn table_10() {
    let folder = tempfile::tempdir().expect("a folder");
    let table = pocket(10, folder.path());
    assert!(table.contains("| pocket | [65, 128] | 8x8 | true | 96 |"), "{table}");
    assert!(table.contains("qwen3_vl | [16, 16] | 4x4 | false |"), "{table}");
}

#[test]
fn a_recipe_goes_on_where_it_was_and_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("run");
    let table = pocket(6, &out);
    let items = out.join("pocket/items.jsonl");
    let whole = read(&items);
    // As after a kill: two whole lines and half of the third.
    let ends: Vec<usize> = whole.match_indices('\n').map(|(end, _)| end).collect();
    std::fs::write(&items, &whole[..ends[1] + 20]).expect("the items");
    std::fs::remove_file(out.join("pocket/summary.json")).expect("the summary");
    assert_eq!(pocket(6, &out), table);
    assert_eq!(read(&items), whole);
}

#[test]
fn costs_are_told_and_flags_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let told = |name: &str| done(&recipe(name, folder.path()).arg("--cost").output().expect("bash"));
    assert!(
        told("table1.sh").contains("1.45e+07 attack steps of one picture at 224 pixels"),
        "{}",
        told("table1.sh")
    );
    let hour =
        done(&recipe("table5.sh", folder.path()).arg("--cost").env("STEP", "1").output().expect("bash"));
    assert!(hour.contains("190 hours on two cores at 1.00 s each (STEP)"), "{hour}");
    let refused = recipe("table1.sh", folder.path()).arg("--fast").output().expect("bash");
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("expected --pocket or --cost, found --fast"));
    assert!(std::fs::read_dir(folder.path()).expect("the folder").next().is_none(), "--cost did something");
}

/// `data.sh` on archives that are made here: a wrong checksum is refused and leaves nothing behind, a right one is
/// unpacked, and what is there is not fetched again.
#[test]
fn downloads_are_checked() {
    if Command::new("curl").arg("--version").output().is_err() {
        println!("SKIPPED downloads_are_checked: curl is not installed");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (site, data) = (folder.path().join("site"), folder.path().join("data"));
    let class = site.join("256_ObjectCategories/001.ak47");
    std::fs::create_dir_all(&class).expect("a folder");
    std::fs::write(class.join("001_0001.jpg"), b"a picture").expect("a file");
    let archive = site.join("256_ObjectCategories.tar");
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(&site).arg("-cf").arg(&archive).arg("256_ObjectCategories");
    assert!(pack.status().expect("tar").success());
    let fetch = |sum: Option<&str>, count: &str| {
        let mut command = Command::new("bash");
        command.arg(script("data.sh")).arg("caltech256").env("DATA_DIR", &data).env("CALTECH_COUNT", count);
        command.env("CALTECH_URL", format!("file://{}", site.display()));
        match sum {
            Some(sum) => command.env("CALTECH_SUM", sum),
            None => command.env_remove("CALTECH_SUM"),
        };
        command.output().expect("bash")
    };
    let wrong = fetch(None, "1");
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("expected the checksum 67b4f42c"));
    assert!(std::fs::read_dir(&data).expect("the folder").next().is_none(), "something was kept");
    let sum = Command::new("sha256sum").arg(&archive).output().expect("sha256sum");
    let sum = String::from_utf8_lossy(&sum.stdout)[..64].to_string();
    let few = fetch(Some(&sum), "2");
    assert!(String::from_utf8_lossy(&few.stderr).contains("expected 2 files *.jpg or more, found 1"));
    let place = data.join("caltech256/256_ObjectCategories");
    assert_eq!(done(&fetch(Some(&sum), "1")).trim(), place.display().to_string());
    assert!(place.join("001.ak47/001_0001.jpg").is_file());
    std::fs::remove_file(&archive).expect("the archive");
    assert_eq!(done(&fetch(Some(&sum), "1")).trim(), place.display().to_string());
}
