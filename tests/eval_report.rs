//! `radapt eval report`: what it says of runs, and that no robust figure goes without its threat model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use radapt::Error;
use radapt::attack::{Eps, Threat};
use radapt::eval::report::{Format, Report};
use radapt::eval::{Attacked, Precision, Row, Summary};
use serde_json::{Value, json};

/// The command's words.
const COMMAND: &[&str] = &["eval", "report"];

fn row(dataset: &str, defense: &str, n: usize, correct: usize) -> Row {
    Row {
        task: "zero-shot".into(),
        dataset: dataset.into(),
        defense: defense.into(),
        attacked: None,
        n,
        correct,
        mean_per_class: None,
    }
}

fn attacked(row: Row, attack: &str, eps: Option<u8>, adaptive: bool) -> Row {
    let threat = if adaptive { Threat::Adaptive } else { Threat::Transfer { surrogate: "tiny-clip".into() } };
    let eps = eps.map(Eps::of_255);
    Row {
        attacked: Some(Attacked { attack: attack.into(), eps, threat, pictures: Precision::EightBit }),
        ..row
    }
}

fn summary(dataset: &str, fingerprint: &str, items: usize, rows: Vec<Row>) -> Summary {
    Summary {
        schema_version: Summary::VERSION,
        fingerprint: fingerprint.repeat(64 / fingerprint.len()),
        run: json!({
            "task": "zero-shot", "dataset": {"name": dataset, "items": items, "sha256": "ab".repeat(32)},
            "model": {"name": "tiny-clip", "dtype": "f32"}, "seed": 7, "version": "0.1.0",
            "anchor": {"name": "white", "sha256": "0123456789abcdef"},
            "attacks": [{"name": "pgd", "steps": 40}, {"name": "apgd-ce", "steps": 100}],
        }),
        shard: None,
        items,
        done: items,
        failed: 0,
        rows,
        flags: Vec::new(),
    }
}

/// Undefended and both parts of the defence, two radii, both threat models.
fn small(dataset: &str, fingerprint: &str) -> Summary {
    let mut rows = vec![row(dataset, "none", 1000, 900), row(dataset, "gif+fra", 1000, 850)];
    for (defense, adaptive, counts) in [
        ("none", false, [50, 2]),
        ("gif+fra", false, [700, 543]),
        ("none", true, [50, 2]),
        ("gif+fra", true, [210, 30]),
    ] {
        for (eps, correct) in [4, 8].into_iter().zip(counts) {
            rows.push(attacked(row(dataset, defense, 1000, correct), "pgd", Some(eps), adaptive));
        }
    }
    summary(dataset, fingerprint, 1000, rows)
}

/// Four defences, three attacks and one without a radius, five radii, both threat models.
fn large(dataset: &str, fingerprint: &str, n: usize) -> Summary {
    let mut rows = Vec::new();
    for (d, defense) in ["none", "gif", "fra", "gif+fra"].into_iter().enumerate() {
        let clean = n * (90 - 2 * d) / 100;
        rows.push(row(dataset, defense, n, clean));
        for adaptive in [false, true] {
            for (a, attack) in ["pgd", "apgd-ce", "autoattack"].into_iter().enumerate() {
                for eps in [1u8, 2, 4, 8, 16] {
                    let strength =
                        f64::from(eps) * (1.0 + 0.35 * a as f64) * if adaptive { 2.0 } else { 1.0 };
                    let correct = clean as f64 * (-strength / (0.8 + 3.0 * d as f64)).exp();
                    rows.push(attacked(
                        row(dataset, defense, n, correct as usize),
                        attack,
                        Some(eps),
                        adaptive,
                    ));
                }
            }
            rows.push(attacked(row(dataset, defense, n, n / 50), "cw", None, adaptive));
        }
    }
    if dataset == "pets" {
        rows.iter_mut().for_each(|row| row.mean_per_class = Some(row.value().floor()));
    }
    summary(dataset, fingerprint, n, rows)
}

fn report(runs: &[(&str, Summary)]) -> Report {
    Report::new(runs.iter().map(|(path, run)| (path.into(), run.clone())).collect()).expect("a report")
}

fn render(runs: &[(&str, Summary)], format: Format) -> String {
    report(runs).render(format).expect("a text")
}

fn refused(runs: &[(&str, Summary)]) -> Error {
    Report::new(runs.iter().map(|(path, run)| (path.into(), run.clone())).collect()).expect_err("a refusal")
}

fn folder(root: &Path, name: &str, summary: &Summary) -> PathBuf {
    let folder = root.join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("summary.json"), serde_json::to_vec(summary).expect("JSON")).expect("a file");
    folder
}

fn radapt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_radapt"))
        .args(COMMAND)
        .args(arguments)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("the command runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_markdown_is_this() {
    let want = "\
<!-- radapt eval report -->
# Robustness report: cifar10

All runs are complete, every item was scored, and no attack raised a warning.

Share of items that came out right in percent, with its Wilson 95 % interval; under attack, right on the clean \
picture as well. `transfer` pictures were crafted on the surrogate, which is not the defended model: the attacker does \
not know of the defence. `adaptive` pictures were crafted on the model that is scored, with gradients through its \
defence. After the @ is eps, the largest change of a pixel.

## zero-shot on cifar10

| defence | threat | surrogate | pictures | n | clean | pgd @ 4/255 | pgd @ 8/255 |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: |
| undefended | transfer | tiny-clip | 8-bit | 1000 | 90.0 (88.0 to 91.7) | 5.0 (3.8 to 6.5) | 0.2 (0.1 to 0.7) |
| gif+fra | transfer | tiny-clip | 8-bit | 1000 | 85.0 (82.7 to 87.1) | 70.0 (67.1 to 72.8) | 54.3 (51.2 to 57.4) |
| undefended | adaptive | – | 8-bit | 1000 | 90.0 (88.0 to 91.7) | 5.0 (3.8 to 6.5) | 0.2 (0.1 to 0.7) |
| gif+fra | adaptive | – | 8-bit | 1000 | 85.0 (82.7 to 87.1) | 21.0 (18.6 to 23.6) | 3.0 (2.1 to 4.3) |

- Run 1 (runs/a): model tiny-clip, anchor white (0123456789ab), n 1000, seed 7, version radapt 0.1.0, fingerprint abababababab
";
    assert_eq!(render(&[("runs/a", small("cifar10", "ab"))], Format::Markdown), want);
}

#[test]
fn the_csv_is_this() {
    let mut run = small("cifar10", "ab");
    run.rows.truncate(3);
    run.run["model"]["name"] = "tiny, \"quoted\"".into();
    let print = "ab".repeat(32);
    let want = format!(
        "run,fingerprint,model,items,done,failed,complete,task,dataset,defense,attack,eps,eps_value,threat,surrogate,pictures,\
         n,correct,value,low,high,mean_per_class,seed\n\
         1,{print},\"tiny, \"\"quoted\"\"\",1000,1000,0,true,zero-shot,cifar10,none,,,,,,,1000,900,90,LOW,HIGH,,7\n\
         1,{print},\"tiny, \"\"quoted\"\"\",1000,1000,0,true,zero-shot,cifar10,gif+fra,,,,,,,1000,850,85,LOW,HIGH,,7\n\
         1,{print},\"tiny, \"\"quoted\"\"\",1000,1000,0,true,zero-shot,cifar10,none,pgd,4/255,0.01568627450980392,transfer,\
         tiny-clip,8-bit,1000,50,5,LOW,HIGH,,7\n"
    );
    let mut want: Vec<String> = want.lines().map(str::to_owned).collect();
    for (line, row) in want[1..].iter_mut().zip(&run.rows) {
        let (low, high) = row.interval();
        *line = line.replace("LOW", &low.to_string()).replace("HIGH", &high.to_string());
    }
    let found = render(&[("runs/a", run)], Format::Csv);
    assert_eq!(found.lines().collect::<Vec<_>>(), want);
}

#[test]
fn several_data_sets_come_with_their_average() {
    let runs = [("a", small("cifar10", "ab")), ("b", small("pocket", "cd"))];
    let text = render(&runs, Format::Markdown);
    let table = text.split("## zero-shot on all data sets").nth(1).expect("the table");
    for line in [
        "| pictures | defence (threat) | surrogate | scored as | cifar10 (n = 1000) | pocket (n = 1000) | average |",
        "| clean | undefended | – | – | 90.0 | 90.0 | 90.0 |",
        "| pgd @ 4/255 | gif+fra (transfer) | tiny-clip | 8-bit | 70.0 | 70.0 | 70.0 |",
        "| pgd @ 8/255 | gif+fra (adaptive) | – | 8-bit | 3.0 | 3.0 | 3.0 |",
    ] {
        assert!(table.contains(line), "{line}\n{table}");
    }
    assert!(!render(&runs[..1], Format::Markdown).contains("on all data sets"));

    // An average over what is there would be of other data sets from row to row.
    let mut without = runs.clone();
    without[1].1.rows.retain(|row| row.attacked.as_ref().is_none_or(|a| a.eps != Some(Eps::of_255(8))));
    // Per class where every row has it, as the paper's metric for such sets.
    without[1].1.rows.iter_mut().for_each(|row| row.mean_per_class = Some(row.value() - 10.0));
    let text = render(&without, Format::Markdown);
    assert!(text.contains("| pgd @ 8/255 | gif+fra (adaptive) | – | 8-bit | 3.0 | – | – |"), "{text}");
    assert!(text.contains("| pocket (per class, n = 1000) |"), "{text}");
    assert!(text.contains("| clean | undefended | – | – | 90.0 | 80.0 | 85.0 |"), "{text}");

    // Two runs of one data set: both values, no average that would choose one.
    let mut again = small("cifar10", "ef");
    again.rows[0].correct = 880;
    let text = render(&[("a", runs[0].1.clone()), ("b", runs[1].1.clone()), ("c", again)], Format::Markdown);
    assert!(
        text.contains("| clean | undefended | – | – | 90.0 (run 1), 88.0 (run 3) | 90.0 | – |"),
        "{text}"
    );
}

#[test]
fn what_casts_doubt_comes_first() {
    let mut part = small("cifar10", "ab");
    (part.items, part.failed) = (1200, 3);
    part.rows.iter_mut().for_each(|row| row.n = 997);
    part.flags = vec!["square beats the white-box attacks".into()];
    let mut transfer = small("pocket", "cd");
    transfer.rows.retain(|row| row.attacked.as_ref().is_none_or(|a| a.threat != Threat::Adaptive));
    transfer.rows.retain(|row| row.defense != "none");
    let mut other = small("cifar10", "ef");
    other.run["dataset"]["sha256"] = "other".into();
    let runs = [("a", part), ("b", transfer), ("c", other)];
    let report = report(&runs);
    assert!(!report.is_complete());
    let want = [
        "Run 1 is not complete: 1000 of 1200 items are done.",
        "Run 1: 3 of 1000 items could not be scored and are in no figure.",
        "Run 1 warns: square beats the white-box attacks",
        "zero-shot on cifar10: the runs are not on the same pictures",
        "zero-shot on pocket: no undefended model was measured",
        "zero-shot on pocket: gif+fra was attacked by transfer alone",
    ];
    let notes = report.notes();
    assert_eq!(notes.len(), want.len(), "{notes:?}");
    for format in [Format::Markdown, Format::Html] {
        let text = report.render(format).expect("a text");
        let first = text.find("<table").or_else(|| text.find("| ---")).expect("a table");
        for (want, note) in want.iter().zip(&notes) {
            assert!(note.starts_with(want), "{note}");
            let place = text.find(want).unwrap_or_else(|| panic!("{format}: {want}"));
            assert!(place < first, "{format}: {want}");
        }
    }
    // The figures of the run that is not complete are marked, the others not.
    let text = report.render(Format::Markdown).expect("a text");
    for line in
        text.lines().filter(|line| line.starts_with("| gif+fra |") || line.starts_with("| undefended |"))
    {
        let run = line.split('|').map(str::trim).nth(5).expect("the run's number");
        assert_eq!(line.contains(")*"), run == "1", "{line}");
    }
    let json: Value = serde_json::from_str(&report.render(Format::Json).expect("JSON")).expect("JSON");
    assert_eq!(
        (&json["complete"], &json["runs"][0]["complete"], &json["runs"][1]["complete"]),
        (&false.into(), &false.into(), &true.into())
    );
    assert_eq!(json["runs"][0]["flags"][0], "square beats the white-box attacks");
    assert!(render(&[("a", small("pocket", "ab"))], Format::Html).contains("All runs are complete"));
}

/// The rows of the tables of a page as text, each with its head.
fn html_rows(html: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let cells = |row: &str| -> Vec<String> {
        row.split("<t")
            .skip(1)
            .filter(|cell| cell.starts_with('h') || cell.starts_with('d'))
            .map(|cell| {
                let mut text = String::new();
                let mut inside = true;
                for c in cell.chars() {
                    match c {
                        '<' => inside = true,
                        '>' => inside = false,
                        c if !inside => text.push(c),
                        _ => {}
                    }
                }
                text
            })
            .collect()
    };
    let mut rows = Vec::new();
    for table in html.split("<table>").skip(1) {
        let table = table.split("</table>").next().expect("an end");
        let (head, body) = table.split_once("</thead>").expect("a head");
        let head = cells(head.split_once("<thead>").expect("a head").1.split_once("<tr>").expect("a row").1);
        for row in body.split("<tr>").skip(1) {
            rows.push((head.clone(), cells(row)));
        }
    }
    rows
}

#[test]
fn no_robust_figure_goes_without_its_threat_model() {
    let runs = [
        ("a", large("cifar10", "ab", 1000)),
        ("b", large("pocket", "cd", 260)),
        ("c", large("pets", "ef", 300)),
    ];
    let all: Vec<&Row> = runs.iter().flat_map(|(_, run)| &run.rows).collect();
    let figure =
        |row: &Row| format!("{:.1} ({:.1} to {:.1})", row.value(), row.interval().0, row.interval().1);

    // CSV and JSON: every row, with what it had.
    let text = render(&runs, Format::Csv);
    let mut lines = csv::Reader::from_reader(text.as_bytes());
    let lines: Vec<BTreeMap<String, String>> = lines.deserialize().collect::<Result<_, _>>().expect("CSV");
    let json: Value = serde_json::from_str(&render(&runs, Format::Json)).expect("JSON");
    let rows = json["rows"].as_array().expect("rows");
    assert_eq!((lines.len(), rows.len()), (all.len(), all.len()));
    for ((row, line), json) in all.iter().zip(&lines).zip(rows) {
        let threat = row.attacked.as_ref().map(|a| a.threat.to_string());
        let transfer = threat.as_deref() == Some("transfer");
        assert_eq!(line["threat"], threat.clone().unwrap_or_default());
        assert_eq!(line["attack"].is_empty(), threat.is_none());
        assert_eq!(line["surrogate"], if transfer { "tiny-clip" } else { "" });
        assert_eq!(line["correct"], row.correct.to_string());
        assert_eq!(&serde_json::from_value::<Row>(json.clone()).expect("a row"), *row);
    }

    // Markdown: each line with attacked figures has the threat, and exactly that threat's figures.
    let text = render(&runs, Format::Markdown);
    let mut dataset = "";
    let mut seen = 0;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## zero-shot on ") {
            dataset = name;
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        if !line.starts_with("| ") || line.starts_with("| defence") || line.contains("---") {
            continue;
        }
        if dataset == "all data sets" {
            let robust = !cells[0].starts_with("clean") && cells[0] != "pictures";
            assert_eq!(
                robust,
                cells[1].ends_with("(transfer)") || cells[1].ends_with("(adaptive)"),
                "{line}"
            );
            assert_eq!(cells[2] == "tiny-clip", cells[1].ends_with("(transfer)"), "{line}");
            continue;
        }
        assert_eq!(cells[2] == "tiny-clip", cells[1] == "transfer", "{line}");
        for row in all.iter().filter(|row| row.dataset == dataset) {
            let defense = if row.defense == "none" { "undefended" } else { &row.defense };
            let here = defense == cells[0]
                && row.attacked.as_ref().is_some_and(|a| a.threat.to_string() == cells[1]);
            if here {
                assert!(cells[5..].iter().any(|cell| cell.starts_with(&figure(row))), "{line}");
                seen += 1;
            }
        }
    }
    assert_eq!(seen, all.iter().filter(|row| row.attacked.is_some()).count());

    // HTML: tables and plots.
    let html = render(&runs, Format::Html);
    let tables = html_rows(&html);
    assert!(tables.len() > 3 * 4 * 2 * 4);
    let mut condition = String::new();
    for (head, cells) in &tables {
        if cells.len() == 1 {
            condition = cells[0].trim().to_owned();
        } else if head[1] == "Threat" {
            assert!(["transfer", "adaptive"].contains(&cells[1].as_str()), "{cells:?}");
            assert_eq!(cells[2] == "tiny-clip", cells[1] == "transfer", "{cells:?}");
        } else {
            let threat = cells[0].ends_with(" transfer") || cells[0].ends_with(" adaptive");
            assert_eq!(threat, condition != "Untouched pictures", "{condition}: {cells:?}");
            assert_eq!(cells[1] == "tiny-clip", cells[0].ends_with(" transfer"), "{cells:?}");
        }
    }
    let figures: Vec<&str> =
        html.split("<figure").skip(1).map(|f| f.split("</figure>").next().expect("an end")).collect();
    assert_eq!(figures.len(), 3 * 4 * 2);
    let mut points = 0;
    for figure in &figures {
        let caption = figure.split("</figcaption>").next().expect("a caption");
        let title = figure.split("</title>").next().and_then(|t| t.split("<title").nth(1)).expect("a title");
        let transfer = caption.contains("transfer");
        assert!(transfer != caption.contains("adaptive"), "{caption}");
        assert!(
            title.contains(if transfer { "transfer, crafted on tiny-clip" } else { "adaptive" }),
            "{title}"
        );
        assert!(!transfer || caption.contains("tiny-clip"), "{caption}");
        assert!(caption.contains("n = "), "{caption}");
        for label in figure.split("<g><title>").skip(1).map(|label| label.split('<').next().expect("a label"))
        {
            let threat = if transfer { "transfer, crafted on tiny-clip" } else { "adaptive" };
            assert!(label.starts_with("untouched pictures") || label.contains(threat), "{label}");
            points += 1;
        }
    }
    // Every figure that has a radius is drawn, and the clean one in each plot.
    let drawn = all.iter().filter(|row| row.attacked.as_ref().is_some_and(|a| a.eps.is_some())).count();
    assert_eq!(points, drawn + figures.len());
    assert_eq!(html.matches("Not drawn, because it has no eps").count(), 3);
}

#[test]
fn a_plot_shows_the_figures_where_they_are() {
    let html = render(&[("a", small("cifar10", "ab"))], Format::Html);
    // 14 to 236 is 100 % to 0 %; gif+fra under transfer is the second plot.
    let plot = html.split("<svg class=\"plot\"").nth(2).expect("a plot");
    let height = |percent: f64| format!("{:.1}", 236.0 - 222.0 * percent / 100.0);
    for percent in [85.0, 70.0, 54.3] {
        assert!(plot.contains(&format!(" {})\" d=\"", height(percent))), "{percent}\n{plot}");
    }
    let (low, high) = row("", "", 1000, 543).interval();
    assert!(plot.contains(&format!(" {}V{}M", height(low), height(high))), "{plot}");
    // Clean, then 4/255, then 8/255, from left to right.
    let line = plot.split("class=\"line\"").nth(1).and_then(|l| l.split("d=\"M").nth(1)).expect("a line");
    let points: Vec<Vec<f64>> = line
        .split('"')
        .next()
        .expect("a path")
        .split('L')
        .map(|point| point.split(' ').map(|v| v.parse().expect("a number")).collect())
        .collect();
    assert_eq!(points.len(), 3);
    assert!(points.windows(2).all(|pair| pair[0][0] < pair[1][0] && pair[0][1] < pair[1][1]), "{points:?}");
}

#[test]
fn the_page_needs_nothing_else_and_escapes_every_text() {
    let evil = "</style><script>alert('1')</script>|\" onerror=\"x&\u{202e}`*";
    let mut run = small("cifar10", "ab");
    run.run["model"]["name"] = evil.into();
    run.run["anchor"] = evil.into();
    run.run["seed"] = evil.into();
    run.run[evil] = evil.into();
    run.flags = vec![evil.into()];
    run.fingerprint = evil.into();
    for row in &mut run.rows {
        (row.task, row.dataset) = (evil.into(), evil.into());
        if row.defense != "none" {
            row.defense = evil.into();
        }
        if let Some(attacked) = &mut row.attacked {
            attacked.attack = evil.into();
            if let Threat::Transfer { surrogate } = &mut attacked.threat {
                *surrogate = evil.into();
            }
        }
    }
    let mut second = run.clone();
    second.fingerprint = "second".into();
    second.rows.iter_mut().for_each(|row| row.dataset = "other".into());
    let runs = [(evil, run), ("second", second)];
    let html = render(&runs, Format::Html);
    for outside in [
        "http:",
        "https:",
        "<link",
        "<script",
        "url(",
        "@import",
        " style=",
        "<iframe",
        "onerror=\"",
        "\u{202e}",
        "src=",
    ] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert_eq!(html.matches("</style>").count(), 1);
    assert!(html.matches("&lt;script&gt;").count() > 30);
    // Every id once, and every reference to one answered.
    let ids: Vec<&str> =
        html.split(" id=\"").skip(1).map(|id| id.split('"').next().expect("an id")).collect();
    for (i, id) in ids.iter().enumerate() {
        assert!(!ids[..i].contains(id), "{id} twice");
    }
    for named in html.split("aria-labelledby=\"").skip(1).map(|n| n.split('"').next().expect("an end")) {
        assert!(named.split(' ').all(|id| ids.contains(&id)), "{named}");
    }
    let markdown = render(&runs, Format::Markdown);
    assert!(!markdown.contains("<script") && !markdown.contains('\u{202e}'));
    // A name does not make columns.
    for section in markdown.split("\n## ").skip(1) {
        let columns = |line: &str| line.replace("\\|", "").matches('|').count();
        let table: Vec<usize> = section.lines().filter(|line| line.starts_with("| ")).map(columns).collect();
        assert!(table.len() > 2 && table.iter().all(|&columns| columns == table[0]), "{section}");
    }
}

#[test]
fn runs_that_cannot_be_joined_are_refused() {
    let run = small("cifar10", "ab");
    let error = refused(&[("a", run.clone()), ("b", run.clone())]);
    assert!(matches!(error, Error::Argument { .. }) && error.to_string().contains("`a` and `b`"), "{error}");

    let shard = Summary { shard: Some((1, 3)), ..run.clone() };
    let error = refused(&[("a", shard)]);
    assert_eq!(error.to_string(), "`a`: expected a whole run, found shard 1 of 3");
    assert!(error.hint().expect("a hint").contains("radapt eval merge"));

    let mut twice = run.clone();
    twice.rows.push(Row { correct: 1, ..twice.rows[4].clone() });
    let error = refused(&[("a", twice)]);
    assert!(
        error.to_string().contains("two for zero-shot on cifar10, gif+fra, pgd at eps 4/255, transfer"),
        "{error}"
    );

    let mut nameless = run.clone();
    nameless.run["model"] = Value::Null;
    assert!(refused(&[("a", nameless)]).to_string().contains("run.model.name"));
    assert!(refused(&[("a", Summary { done: 1001, ..run })]).to_string().contains("done 1001"));
    assert!(Report::new(Vec::new()).is_err());
}

#[test]
fn a_run_without_figures_is_said_to_have_none() {
    let mut empty = summary("pocket", "ab", 10, Vec::new());
    empty.done = 0;
    let runs = [("a", empty)];
    for format in [Format::Markdown, Format::Html] {
        let text = render(&runs, format);
        assert!(text.contains("Run 1 has no figures.") && text.contains("0 of 10 items are done"), "{text}");
        assert!(text.contains("tiny-clip"), "{text}");
    }
    // Rows about nothing are no zero.
    let nothing = summary(
        "pocket",
        "ab",
        0,
        vec![row("pocket", "none", 0, 0), attacked(row("pocket", "none", 0, 0), "pgd", Some(4), true)],
    );
    assert!(
        render(&[("a", nothing.clone())], Format::Markdown)
            .contains("| undefended | adaptive | – | 8-bit | 0 | – | – |")
    );
    assert!(!render(&[("a", nothing)], Format::Html).contains("<figure"));
}

#[test]
fn the_command_reads_folders_and_writes_what_is_asked() {
    let root = tempfile::tempdir().expect("a folder");
    let a = folder(root.path(), "a", &small("cifar10", "ab"));
    let b = folder(root.path(), "b", &small("pocket", "cd"));
    let (a, b) = (a.to_str().expect("a path"), b.to_str().expect("a path"));

    let output = radapt(&[a, b]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("<!-- radapt eval report -->"));
    let output = radapt(&[a, "--format", "csv"]);
    assert_eq!(text(&output.stdout).lines().count(), 11);
    let json: Value = serde_json::from_slice(&radapt(&[a, "--json"]).stdout).expect("JSON");
    assert_eq!((&json["schema_version"], json["rows"].as_array().map(Vec::len)), (&1.into(), Some(10)));

    // Each format by its ending, and over itself or another report.
    for name in ["r.md", "r.csv", "r.html", "r.json"] {
        let out = root.path().join(name);
        let out = out.to_str().expect("a path");
        for format in [None, None, Some("html"), None] {
            let mut arguments = vec![a, b, "--out", out];
            arguments.extend(format.into_iter().flat_map(|format| ["--format", format]));
            let output = radapt(&arguments);
            assert!(output.status.success(), "{name}: {}", text(&output.stderr));
            assert_eq!(text(&output.stdout).trim_end(), out);
        }
        let written = std::fs::read_to_string(out).expect("a report");
        let format = Format::of(Path::new(out)).expect("a format");
        assert_eq!(
            written,
            Report::read(&[a.into(), b.into()]).and_then(|r| r.render(format)).expect("a report")
        );
    }

    // Nothing else is written over.
    let other = root.path().join("thesis.md");
    std::fs::write(&other, "# My thesis\n").expect("a file");
    let output = radapt(&[a, "--out", other.to_str().expect("a path")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("it exists already")
            && text(&output.stderr).contains("hint: it holds no report")
    );
    assert_eq!(std::fs::read_to_string(&other).expect("a file"), "# My thesis\n");
}

#[test]
fn the_command_says_what_is_wrong_with_a_run() {
    let root = tempfile::tempdir().expect("a folder");
    let a = folder(root.path(), "a", &small("cifar10", "ab"));
    let shard = folder(root.path(), "shard", &Summary { shard: Some((2, 3)), ..small("cifar10", "ab") });
    let broken = folder(root.path(), "broken", &small("cifar10", "cd"));
    std::fs::write(broken.join("summary.json"), "{\"schema_version\": 1, ").expect("a file");
    let bare = folder(root.path(), "bare", &small("cifar10", "ef"));
    let mut json = serde_json::to_value(small("cifar10", "ef")).expect("JSON");
    json["rows"][2]["threat"] = Value::Null;
    std::fs::write(bare.join("summary.json"), json.to_string()).expect("a file");
    let path = |path: &Path| path.to_str().expect("a path").to_owned();
    let missing = path(&root.path().join("missing"));
    for (arguments, code, says) in [
        (vec![path(&a), path(&a)], 2, "each run once"),
        (vec![path(&shard)], 1, "shard 2 of 3"),
        (vec![path(&broken)], 1, "summary.json"),
        (vec![path(&bare)], 1, "threat"),
        (vec![missing], 1, "missing"),
        (vec![path(&a), "--out".into(), path(&root.path().join("report"))], 2, "--format"),
        (vec![path(&a), "--json".into(), "--format".into(), "csv".into()], 2, "--json"),
        (vec![], 2, "RUN"),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = radapt(&arguments);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty() && stderr.contains(says), "{arguments:?}: {stderr}");
    }
    assert!(text(&radapt(&[&path(&shard)]).stderr).contains("hint: join the shards first"));
}

/// `cargo test --release --no-default-features --test eval_report sample -- --ignored --nocapture`
#[test]
#[ignore = "writes reports to look at, with invented figures"]
fn a_sample_is_written() {
    let mut part = large("pets", "ef", 300);
    (part.items, part.failed) = (500, 4);
    part.done = 304;
    part.flags = vec![
        "autoattack: square beat the white-box attacks on 3 items (gif+fra, adaptive, eps 8/255)".into(),
    ];
    let report = report(&[
        ("runs/cifar10", large("cifar10", "ab", 1000)),
        ("runs/pocket", large("pocket", "cd", 260)),
        ("runs/pets", part),
    ]);
    for format in [Format::Markdown, Format::Csv, Format::Html, Format::Json] {
        let path = std::env::temp_dir().join(format!("radapt-report.{format}"));
        report.write(&path, format).expect("a writable temporary folder");
        println!("{}", path.display());
    }
    let path = std::env::temp_dir().join("radapt-report-small.html");
    self::report(&[("runs/cifar10", small("cifar10", "ab"))])
        .write(&path, Format::Html)
        .expect("a writable folder");
}
