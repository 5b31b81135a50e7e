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

/// Runs of every other kind, with figures made up by hand, each with its name.
fn kinds() -> Vec<(&'static str, Value)> {
    let run = |task: &str, dataset: &str, model: &str| {
        json!({
            "task": task, "version": "0.1.0", "seed": 0, "dataset": {"name": dataset, "items": 40},
            "model": {"name": model, "revision": "", "digest": "cd".repeat(32)},
            "defenses": [
                {"name": "none", "subject": {"model": model, "defense": null, "digest": null}},
                {"name": "plus-8", "subject": {"model": model, "digest": "ab", "defense":
                    "GIF (cutoff 17.1429) and FRA (anchor out/plus-8.safetensors, data-driven, alpha 0.8, beta 0.2)"}},
                {"name": "white", "subject": {"model": model, "digest": "ef", "defense":
                    "GIF (cutoff 17.1429) and FRA (anchor training-free, alpha 1.2, beta -0.8)"}},
            ],
        })
    };
    let summary = |print: &str, run: Value, rows: Value| {
        json!({
            "schema_version": 1, "fingerprint": print.repeat(64 / print.len()), "run": run, "shard": null,
            "items": 40, "done": 40, "failed": 0, "rows": rows,
        })
    };
    let row = |task: &str, defense: &str, attack: Option<(&str, &str)>, n: usize, correct: usize| {
        let (eps, threat) =
            attack.map_or((Value::Null, Value::Null), |(eps, threat)| (eps.into(), threat.into()));
        let name = if task.contains("R@") { "pgd" } else { "v-attack" };
        json!({
            "task": task, "dataset": "pocket", "defense": defense, "eps": eps, "threat": threat,
            "attack": attack.map(|_| name), "pictures": attack.map(|_| "8-bit"),
            "surrogate": attack.filter(|a| a.1 == "transfer").map(|_| "tiny-clip"), "n": n, "correct": correct,
        })
    };
    let transfer =
        |eps: &str| json!({"attack": "v-attack", "eps": eps, "threat": "transfer", "surrogate": "tiny-clip"});

    let mut rows = Vec::new();
    for (defense, counts) in [("none", [40, 8]), ("plus-8", [39, 30]), ("white", [38, 20])] {
        for (task, n) in [("caption", 1), ("vqa", 3)] {
            rows.push(row(task, defense, None, 40 * n, counts[0] * n));
            rows.push(row(task, defense, Some(("16/255", "transfer")), 40 * n, counts[1] * n));
        }
    }
    rows.push(row("caption", "plus-8", Some(("16/255", "adaptive")), 40, 4));
    let counts =
        |original: usize| json!({"original": original, "target": 40 - original, "both": 0, "neither": 0});
    let mut coco = summary("c0", run("coco", "pocket", "tiny-llava"), rows.into());
    coco["flags"] = json!([]);
    coco["missing"] = json!([]);
    coco["verdicts"] = json!([
        {"task": "caption", "defense": "none", "attacked": null, "judge": "words", "n": 40, "counts": counts(40),
         "failed": 0, "captions": {"n": 40, "scores": {"n": 40, "cider": 997.04, "bleu4": 99.7}}},
        {"task": "caption", "defense": "none", "attacked": transfer("16/255"), "judge": "words", "n": 40,
         "counts": counts(9), "failed": 0},
    ]);

    let pope = json!({"n": 40, "correct": 26, "accuracy": 65.0, "precision": 72.1, "recall": 50.3, "f1": 59.3, "yes_ratio": 34.7});
    let mut questions = json!([
        {"task": "pope", "dataset": "pocket-pope", "defense": "none", "n": 40, "value": 65.0, "low": 49.5, "high": 77.9, "pope": pope},
        {"task": "pope", "dataset": "pocket-pope", "defense": "none", "n": 40, "value": 45.0, "low": 30.7, "high": 60.2, "pope": pope},
    ]);
    for (key, value) in transfer("8/255").as_object().expect("an object") {
        questions[1][key] = value.clone();
    }
    let mut questions = summary("a1", run("questions", "pocket-pope", "tiny-llava"), questions);
    questions["missing"] = 2.into();

    let mut found = Vec::new();
    for (defense, correct) in [("none", 25), ("plus-8", 24)] {
        for direction in ["image-to-text", "text-to-image"] {
            for k in [1, 5, 10] {
                let task = format!("{direction} R@{k}");
                found.push(row(&task, defense, None, 40, correct + k));
                for threat in ["transfer", "adaptive"] {
                    found.push(row(&task, defense, Some(("4/255", threat)), 40, correct - 20 + k));
                }
            }
        }
    }
    let mut retrieve = summary("e2", run("retrieve", "pocket", "tiny-clip"), found.into());
    retrieve["flags"] = json!([]);

    let share = |count: usize| json!({"count": count, "value": 2.5 * count as f64, "interval": [1.0, 99.0]});
    let mut attacked = transfer("8/255");
    for (key, value) in [("dataset", json!("pocket")), ("defense", "plus-8".into()), ("n", 40.into())] {
        attacked[key] = value;
    }
    (attacked["source"], attacked["target"]) = (share(30), share(2));
    let vattack = json!([
        {"dataset": "pocket", "defense": "none", "attack": "none", "eps": null, "n": 40, "source": share(40), "target": share(0)},
        attacked,
    ]);
    let mut vattack = summary("f3", run("v-attack", "pocket", "tiny-clip"), vattack);
    vattack.as_object_mut().expect("an object").remove("shard");

    let features = json!([{
        "task": "features", "measure": "mean cosine", "dataset": "cifar10", "defense": "gif+fra", "attack": "pgd",
        "eps": "2/255", "threat": "adaptive", "pictures": "8-bit", "n": 40, "value": 0.9923, "value_undefended": 0.9901,
    }]);
    let features = summary("b4", run("features", "cifar10", "tiny-llava"), features);

    let mut suspected = transfer("8/255");
    for (key, value) in [
        ("task", json!("suspicion")),
        ("dataset", "cifar10".into()),
        ("n", 20.into()),
        ("auc", 67.3.into()),
        ("auc_interval", json!([61.4, 73.2])),
        (
            "at",
            json!([{"asked": 5.0, "threshold": 0.59, "clean": 5.66, "caught": 15.03, "interval": [2.6, 29.6]},
                      {"asked": 0.1, "threshold": null, "clean": 0.0, "caught": 0.0, "interval": [0.0, 9.0]}]),
        ),
    ] {
        suspected[key] = value;
    }
    let mut suspicion = summary("d5", run("suspicion", "cifar10", "tiny-llava"), json!([suspected]));
    suspicion["run"]["subject"] =
        json!({"model": "tiny-llava", "defense": "GIF (cutoff 8.5714)", "digest": "ab"});
    suspicion["clean"] = json!([0.1, 0.2, 0.5]);

    vec![
        ("coco", coco),
        ("questions", questions),
        ("retrieve", retrieve),
        ("v-attack", vattack),
        ("features", features),
        ("suspicion", suspicion),
    ]
}

/// A sweep's folder, with its run and a drawing.
fn sweep_folder(root: &Path) -> PathBuf {
    let point =
        |epochs: u64| json!({"alpha": 0.8, "beta": 0.2, "cutoff": 6.0, "pictures": 2000, "epochs": epochs});
    let name = |epochs: u64| format!("alpha 0.8, beta 0.2, cutoff 6, pictures 2000, epochs {epochs}");
    let mut rows = vec![row("cifar10", "none", 100, 66)];
    for (epochs, correct) in [(3, 30), (10, 40), (30, 45)] {
        let row = row("cifar10", &name(epochs), 100, 55);
        rows.push(row.clone());
        for (adaptive, less) in [(false, 0), (true, 25)] {
            rows.push(attacked(Row { correct: correct - less, ..row.clone() }, "apgd-ce", Some(4), adaptive));
        }
    }
    let folder = folder(root, "sweep/run", &summary("cifar10", "77", 100, rows));
    let sweep = folder.parent().expect("a folder").to_path_buf();
    let points: Vec<Value> = [3, 10, 30].map(|e| json!({"name": name(e), "point": point(e)})).into();
    let document = json!({
        "schema_version": 1, "base": point(10), "axes": [{"parameter": "epochs", "values": [3.0, 10.0, 30.0]}],
        "grid": false, "points": points, "rows": [], "flags": [], "plots": ["epochs-apgd-ce-4of255.svg"],
    });
    std::fs::write(sweep.join("sweep.json"), document.to_string()).expect("a file");
    std::fs::write(sweep.join("epochs-apgd-ce-4of255.svg"), SVG).expect("a file");
    sweep
}

/// With something in it that must not run.
const SVG: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\"><script>alert(1)</script><image href=\"http://a.example/\"/></svg>";

/// A folder with every analysis, all with a drawing but one.
fn analyses(root: &Path) -> PathBuf {
    let folder = root.join("analyses");
    std::fs::create_dir_all(&folder).expect("a folder");
    let mean = |value: f64| json!({"value": value, "low": value - 0.1, "high": value + 0.1});
    let pair = |first: &str, second: &str, value: f64| json!({"first": first, "second": second, "value": value, "low": value - 0.1, "high": value + 0.1});
    let mut rows = Vec::new();
    for (stage, correct) in [("none", 70), ("emb", 60)] {
        let row = row("cifar10", stage, 100, correct);
        rows.push(row.clone());
        rows.push(attacked(Row { correct: correct - 50, ..row.clone() }, "pgd", Some(4), false));
        rows.push(attacked(Row { correct: correct - 55, ..row }, "pgd", Some(4), true));
    }
    let heads = json!([{"head": 1, "value": 2.5, "low": -4.5, "high": 9.5}, {"head": 2, "value": -1.5, "low": -5.5, "high": 3.0}]);
    let values = json!([
        {"attack": null, "eps": null, "threat": null, "surrogate": null, "n": 40, "whole": 55.0, "none": 57.5, "heads": heads},
        {"attack": "pgd", "eps": "4/255", "threat": "transfer", "surrogate": "tiny-clip", "n": 40, "whole": 40.0, "none": 35.0, "heads": heads},
    ]);
    for (name, found) in [
        (
            "cka",
            json!({"layers": ["emb", "b1"], "batches": 5, "minibatch": {"cross": [[0.805, 0.815], [0.808, 0.851]]}}),
        ),
        (
            "replace",
            json!({"stages": [{"name": "none"}, {"name": "emb"}], "sets": [
            {"role": "in-distribution", "dataset": "cifar10", "items": 100, "failed": 0, "rows": rows, "flags": []}]}),
        ),
        (
            "spectrum",
            json!({"rings": [{"radius": 0, "standard": 0.2867, "robust": 0.3193, "shift": 0.0326, "relative": 0.1136}]}),
        ),
        (
            "attention",
            json!({"habits": [{"tower": "standard", "class": mean(0.06), "entropy": mean(0.85), "brightness": null,
            "between_pictures": mean(0.43)}]}),
        ),
        (
            "insensitivity",
            json!({"pictures": 300, "between_pictures": [pair("standard", "standard", 0.37)],
            "with_white": [pair("standard", "robust", 0.41)]}),
        ),
        ("shapley", json!({"values": values})),
    ] {
        let mut all = json!({
            "schema_version": 1, "analysis": name, "version": "0.1.0", "seed": 0, "failed": [],
            "standard": {"name": "tiny-clip", "revision": null, "digest": "12".repeat(32)},
            "robust": {"name": "tiny-tecoa", "revision": null, "digest": "34".repeat(32)},
            "data": {"name": "cifar10", "digest": "56", "contract": "clip", "n": 300},
        });
        for (key, value) in found.as_object().expect("an object") {
            all[key] = value.clone();
        }
        std::fs::write(folder.join(format!("{name}.json")), all.to_string()).expect("a file");
        if name != "spectrum" {
            std::fs::write(folder.join(format!("{name}.svg")), SVG).expect("a file");
        }
    }
    folder
}

fn written(root: &Path, name: &str, json: &Value) -> PathBuf {
    let folder = root.join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("summary.json"), json.to_string()).expect("a file");
    folder
}

/// Every kind of run, a sweep and the analyses, in one report.
fn mixed(root: &Path) -> Report {
    let mut paths = vec![folder(root, "classify", &small("cifar10", "ab"))];
    paths.extend(kinds().iter().map(|(name, json)| written(root, name, json)));
    paths.extend([sweep_folder(root), analyses(root)]);
    Report::read(&paths).expect("a report")
}

#[test]
fn every_kind_of_run_and_analysis_is_read() {
    let root = tempfile::tempdir().expect("a folder");
    let report = mixed(root.path());
    let markdown = report.render(Format::Markdown).expect("a text");
    for line in [
        // Right answers of a language model are rows as those of classification.
        "## caption on pocket",
        "| plus-8 | transfer | tiny-clip | 8-bit | 40 | 97.5 (87.1 to 99.6) | 75.0 (59.8 to 85.8) |",
        "## What the answers name: pocket",
        "| caption, judged by words | undefended | clean | – | – | – | 40 | 100.0 | 0.0 | 0.0 | 0.0 | 997.0 | 99.7 |",
        "| caption, judged by words | undefended | v-attack @ 16/255 | transfer | tiny-clip | 8-bit | 40 | 22.5 | 77.5 | 0.0 | 0.0 | – | – |",
        "## Questions answered with yes or no (POPE): pocket-pope",
        "| undefended | v-attack @ 8/255 | transfer | tiny-clip | 8-bit | 40 | 45.0 (30.7 to 60.2) | 59.3 | 72.1 | 50.3 | 34.7 |",
        "## Retrieval: pocket",
        "## What V-Attack’s pictures are called: pocket",
        "| plus-8 | v-attack @ 8/255 | transfer | tiny-clip | 8-bit | 40 | 75.0 (1.0 to 99.0) | 5.0 (1.0 to 99.0) |",
        "## How far an attack moves features: cifar10",
        "| gif+fra | pgd @ 2/255 | adaptive | – | 8-bit | 40 | 0.992 | 0.990 |",
        "## Telling adversarial pictures by their suspicion score: cifar10",
        "| GIF (cutoff 8.5714) | v-attack @ 8/255 | transfer | tiny-clip | 8-bit | 20 | 67.3 (61.4 to 73.2) | 15.0 (2.6 to 29.6) |",
        "## Sweep: cifar10",
        "| alpha 0.8, beta 0.2, cutoff 6, pictures 2000, epochs 10 | apgd-ce @ 4/255 | adaptive | – | 8-bit | 100 | 15.0 (9.3 to 23.3) |",
        "## How alike the layers of the two towers are (CKA)",
        "| b1 | 0.851 | 0.808 |",
        "## Progressive replacement: cifar10 (in-distribution)",
        "| Replaced up to | clean | pgd @ 4/255, transfer, crafted on tiny-clip, 8-bit | pgd @ 4/255, adaptive, 8-bit |",
        "| emb | 60.0 (50.2 to 69.1) | 10.0 (5.5 to 17.4) | 5.0 (2.2 to 11.2) |",
        "| 0 | 0.2867 | 0.3193 | 11.4 |",
        "| standard | 0.060 (-0.040 to 0.160) | 0.850 (0.750 to 0.950) | – | 0.430 (0.330 to 0.530) |",
        "| a picture and white | standard and robust | 0.410 (0.310 to 0.510) |",
        "| pgd @ 4/255 | transfer | tiny-clip | 40 | 40.0 | 35.0 | 2.5 (-4.5 to 9.5) | -1.5 (-5.5 to 3.0) |",
    ] {
        assert!(markdown.contains(line), "{line}\n{markdown}");
    }
    // Retrieval is one table with all ranks, not six sections.
    assert!(!markdown.contains("R@1 on pocket") && markdown.contains("image-to-text R@1, %"), "{markdown}");
    // What has no threshold is no figure.
    assert!(!markdown.contains("caught at 0.1 %"), "{markdown}");
    let notes = report.notes().join("\n");
    for note in [
        "warns: the pictures of 2 questions are not there",
        "V-Attack’s pictures are called on pocket: plus-8 was attacked by transfer alone",
        "Analysis spectrum: there is no drawing",
    ] {
        assert!(notes.contains(note), "{note}\n{notes}");
    }
    assert!(!notes.contains("has no figures") && !notes.contains("Retrieval on pocket"), "{notes}");

    let json: Value = serde_json::from_str(&report.render(Format::Json).expect("JSON")).expect("JSON");
    assert_eq!(json["analyses"].as_array().map(Vec::len), Some(6));
    assert!(json.get("paper").is_none());
    let moved = json["figures"].as_array().expect("figures").iter().find(|f| f["measure"] == "mean cosine");
    let moved = moved.expect("the attack on features");
    assert_eq!(
        (&moved["value"], &moved["threat"], &moved["run"]),
        (&0.9923.into(), &"adaptive".into(), &6.into())
    );

    // The page shows drawings as pictures, in which nothing runs and nothing loads.
    let html = report.render(Format::Html).expect("a page");
    assert_eq!(html.matches("src=\"data:image/svg+xml;base64,").count(), 6);
    for outside in ["http:", "https:", "<script", "<link", "url(", " style=", "<iframe", "src=\"h"] {
        assert!(!html.contains(outside), "{outside}");
    }
    let ids: Vec<&str> =
        html.split(" id=\"").skip(1).map(|id| id.split('"').next().expect("an id")).collect();
    assert!(ids.iter().enumerate().all(|(i, id)| !ids[..i].contains(id)), "{ids:?}");
    // Every table's head fits its lines.
    for (head, cells) in html_rows(&html).iter().filter(|(_, cells)| cells.len() > 1) {
        assert_eq!(head.len(), cells.len(), "{head:?} {cells:?}");
    }
}

/// No figure of an attack without its threat model, in a table of any kind.
fn threats_are_named(head: &[String], cells: &[String]) {
    let place = |name: &str| head.iter().position(|h| h.eq_ignore_ascii_case(name));
    let attacked = |text: &str| text.contains('@') || text.ends_with(" robust") || text.contains("/255");
    let named = |text: &str| text.contains("transfer") || text.contains("adaptive");
    if let Some(threat) = place("threat") {
        let is_clean = place("attack").map(|at| cells[at].starts_with("clean")).unwrap_or(false);
        let clean_only = head
            .iter()
            .skip(threat + 1)
            .zip(&cells[threat + 1..])
            .all(|(head, cell)| !attacked(head) || cell.starts_with('–'));
        assert!(named(&cells[threat]) || is_clean || clean_only, "{head:?}\n{cells:?}");
        assert!(!is_clean || !named(&cells[threat]), "{cells:?}");
        return;
    }
    for head in head.iter().filter(|head| attacked(head)) {
        assert!(named(head) || cells[0].contains("transfer") || cells[0].contains("adaptive"), "{head}");
    }
}

#[test]
fn no_robust_figure_of_any_kind_goes_without_its_threat_model() {
    let root = tempfile::tempdir().expect("a folder");
    let report = mixed(root.path()).beside_paper();
    let text = report.render(Format::Csv).expect("CSV");
    let mut lines = csv::Reader::from_reader(text.as_bytes());
    let lines: Vec<BTreeMap<String, String>> = lines.deserialize().collect::<Result<_, _>>().expect("CSV");
    let mut papers = 0;
    for line in &lines {
        let attacked = !line["attack"].is_empty() && line["attack"] != "none";
        assert_eq!(attacked, ["transfer", "adaptive"].contains(&line["threat"].as_str()), "{line:?}");
        assert_eq!(line["surrogate"].is_empty(), line["threat"] != "transfer", "{line:?}");
        if line["source"] == "paper" {
            assert!(attacked == (line["threat"] == "transfer"), "{line:?}");
            assert!(line["threat"].is_empty() || line["surrogate"].contains("inferred"), "{line:?}");
            assert!(line["model"].is_empty() && line["run"].is_empty(), "{line:?}");
            papers += 1;
        }
    }
    assert!(papers > 100, "{papers}");
    let json: Value = serde_json::from_str(&report.render(Format::Json).expect("JSON")).expect("JSON");
    let figures = [&json["rows"], &json["figures"]];
    for figure in figures.into_iter().flat_map(|all| all.as_array().expect("figures")) {
        let attacked = !figure["attack"].is_null();
        assert_eq!(attacked, figure["threat"].is_string(), "{figure}");
        assert_eq!(figure["surrogate"].is_string(), figure["threat"] == "transfer", "{figure}");
    }

    let html = report.render(Format::Html).expect("a page");
    for (head, cells) in html_rows(&html).iter().filter(|(_, cells)| cells.len() > 1) {
        if head.iter().any(|head| head == "Threat") {
            threats_are_named(head, cells);
        }
    }
    let mut head: Vec<String> = Vec::new();
    let mut tables = 0;
    for line in report.render(Format::Markdown).expect("a text").lines() {
        let cells =
            || line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
        match line {
            line if line.starts_with("| ---") => tables += 1,
            line if line.starts_with("| **") => {}
            line if line.starts_with("| ") && head.is_empty() => head = cells(),
            line if line.starts_with("| ") => threats_are_named(&head, &cells()),
            _ => head.clear(),
        }
    }
    assert!(tables > 15, "{tables}");
}

#[test]
fn a_figure_without_its_threat_model_is_refused_whatever_its_kind() {
    let root = tempfile::tempdir().expect("a folder");
    let without = |json: &Value, place: &str| {
        let mut json = json.clone();
        json.pointer_mut(place).expect("the place").as_object_mut().expect("an object").remove("threat");
        json
    };
    for (name, place) in [
        ("coco", "/rows/1"),
        ("coco", "/verdicts/1/attacked"),
        ("questions", "/rows/1"),
        ("retrieve", "/rows/1"),
        ("v-attack", "/rows/1"),
        ("features", "/rows/0"),
        ("suspicion", "/rows/0"),
    ] {
        let json = kinds().into_iter().find(|(kind, _)| *kind == name).expect("the kind").1;
        let path =
            written(root.path(), &format!("{name}{}", place.replace('/', "-")), &without(&json, place));
        let error = Report::read(std::slice::from_ref(&path)).expect_err("a refusal").to_string();
        assert!(
            error.contains("threat") && error.contains(&*path.to_string_lossy()),
            "{name}{place}: {error}"
        );
    }
    let shapley = analyses(root.path()).join("shapley.json");
    let json: Value = serde_json::from_slice(&std::fs::read(&shapley).expect("a file")).expect("JSON");
    std::fs::write(&shapley, without(&json, "/values/1").to_string()).expect("a file");
    let error = Report::read(&[shapley]).expect_err("a refusal").to_string();
    assert!(error.contains("threat") && error.contains("shapley.json"), "{error}");
}

#[test]
fn what_is_no_run_is_refused_by_its_name() {
    let root = tempfile::tempdir().expect("a folder");
    let questions = || kinds().into_iter().find(|(kind, _)| *kind == "questions").expect("the kind").1;
    let mut other = questions();
    other["run"]["task"] = "segmentation".into();
    let mut newer = questions();
    newer["schema_version"] = 2.into();
    let mut shard = questions();
    shard["shard"] = json!([1, 3]);
    let empty = root.path().join("empty");
    std::fs::create_dir_all(&empty).expect("a folder");
    let alone = sweep_folder(root.path());
    let document = std::fs::read_to_string(alone.join("sweep.json")).expect("a file");
    let outside = root.path().join("outside");
    std::fs::create_dir_all(&outside).expect("a folder");
    std::fs::write(outside.join("sweep.json"), document.replace("epochs-apgd-ce", "../epochs-apgd-ce"))
        .expect("a file");
    std::fs::create_dir_all(outside.join("run")).expect("a folder");
    std::fs::copy(alone.join("run/summary.json"), outside.join("run/summary.json")).expect("a copy");
    std::fs::remove_file(alone.join("run/summary.json")).expect("a file");
    let strange = root.path().join("cka.json");
    std::fs::write(&strange, json!({"schema_version": 1, "analysis": "saliency"}).to_string())
        .expect("a file");
    let torn = analyses(root.path()).join("replace.json");
    std::fs::write(&torn, json!({"schema_version": 1, "analysis": "replace"}).to_string()).expect("a file");
    for (path, says) in [
        (written(root.path(), "other", &other), "found `segmentation`"),
        (written(root.path(), "newer", &newer), "schema_version: expected 1, found 2"),
        (written(root.path(), "shard", &shard), "expected a whole run, found shard 1 of 3"),
        (empty, "expected summary.json of a run"),
        (alone, "run/summary.json"),
        (outside, "outside its folder"),
        (strange, "analysis: expected cka, replace"),
        (torn, "missing field"),
    ] {
        let error = Report::read(std::slice::from_ref(&path)).expect_err("a refusal").to_string();
        assert!(error.contains(says) && error.contains(&*path.to_string_lossy()), "{error}");
        let output = radapt(&[path.to_str().expect("a path"), "--paper"]);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(output.stdout.is_empty() && text(&output.stderr).contains(says), "{}", text(&output.stderr));
    }
    let cka = analyses(root.path()).join("cka.json");
    let error = Report::read(&[cka.clone(), cka]).expect_err("a refusal").to_string();
    assert!(error.contains("each analysis once"), "{error}");
}

#[test]
fn an_incomplete_run_of_any_kind_is_marked() {
    let root = tempfile::tempdir().expect("a folder");
    let mut paths = Vec::new();
    for (name, mut json) in kinds() {
        json["items"] = 50.into();
        json["failed"] = 1.into();
        paths.push(written(root.path(), name, &json));
    }
    let report = Report::read(&paths).expect("a report").beside_paper();
    let notes = report.notes().join("\n");
    for number in 1..=paths.len() {
        assert!(notes.contains(&format!("Run {number} is not complete: 40 of 50 items are done")), "{notes}");
        assert!(notes.contains(&format!("Run {number}: 1 of 40 items could not be scored")), "{notes}");
    }
    let markdown = report.render(Format::Markdown).expect("a text");
    assert!(markdown.contains("| 0.992\\* | 0.990\\* |"), "{markdown}");
    assert!(markdown.contains("| 67.3\\* (61.4 to 73.2) |"), "{markdown}");
    let table =
        markdown.split("### Table 5").nth(1).expect("Table 5").split("\n### ").next().expect("an end");
    assert!(table.contains("| 97.5\\* (87.1 to 99.6) |"), "{table}");
    for (line, is_paper) in
        table.lines().filter(|l| l.starts_with("| ")).map(|l| (l, l.contains("| the paper")))
    {
        assert!(!is_paper || !line.contains("\\*"), "{line}");
    }
}

const PAPER: &str = include_str!("../src/eval/report/paper.toml");

fn paper() -> toml::Table {
    toml::from_str(PAPER).expect("the paper's tables")
}

/// A table's values, row by row, with the row's name and method.
fn values(number: i64) -> Vec<(String, Vec<f64>)> {
    let paper = paper();
    let table =
        paper["table"].as_array().expect("tables").iter().find(|t| t["number"].as_integer() == Some(number));
    let rows = table.expect("the table")["row"].as_array().expect("rows");
    rows.iter()
        .map(|row| {
            let block = row.get("block").and_then(|block| block.as_str()).unwrap_or_default();
            let values = row["values"].as_array().expect("values");
            let values = values.iter().map(|v| v.as_float().expect("a number")).collect();
            (format!("{block}: {}", row["name"].as_str().expect("a name")), values)
        })
        .collect()
}

#[test]
fn the_papers_figures_are_as_printed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/docs/paper.txt");
    let Ok(text) = std::fs::read_to_string(path) else {
        eprintln!("SKIPPED: `{path}` is not here");
        return;
    };
    for number in [1, 2, 3, 4, 5, 6, 7, 8, 11] {
        let from = text.find(&format!("\nTable {number}:")).expect("the table");
        // Numbers with one digit behind the point are the figures, but for the gains behind arrows.
        let mut found = Vec::new();
        let table: Vec<char> = text[from..].chars().collect();
        for (i, c) in table.iter().enumerate() {
            let starts = c.is_ascii_digit() && !(table[i - 1].is_ascii_digit() || table[i - 1] == '.');
            if !starts || table[..i].iter().rev().take(5).eq("worra".chars().collect::<Vec<_>>().iter()) {
                continue;
            }
            let number: String = table[i..].iter().take_while(|c| c.is_ascii_digit() || **c == '.').collect();
            if number.split_once('.').is_some_and(|(_, behind)| behind.len() == 1) {
                found.push(number.parse::<f64>().expect("a number"));
            }
        }
        let want: Vec<f64> = values(number).into_iter().flat_map(|(_, values)| values).collect();
        assert_eq!(found[..want.len()], want, "Table {number}");
    }
    for encoder in paper()["encoder"].as_array().expect("encoders") {
        let line = ["name", "encoder", "id"].map(|key| encoder[key].as_str().expect("a text")).join(" ");
        assert!(text.contains(&format!("\n{line}\n")), "{line}");
    }
}

#[test]
fn what_is_said_of_the_papers_threat_model_is_in_its_figures() {
    let table = values(1);
    let (clean, robust) = table.split_at(9);
    let mut above = Vec::new();
    for ((name, clean), (_, robust)) in clean.iter().zip(robust) {
        let higher =
            clean.iter().zip(robust).enumerate().filter(|(i, (clean, robust))| *i < 16 && robust > clean);
        above.extend(higher.map(|(i, _)| (name.trim_start_matches("Clean accuracy: ").to_owned(), i)));
    }
    let named = |name: &str, set| (name.to_owned(), set);
    assert_eq!(above, [named("TeCoA", 12), named("TeCoA", 15), named("FARE", 15)]);
    let second = values(2);
    for (name, values) in second.iter().filter(|(name, _)| name.contains("R-Adapt")) {
        let (pgd, cw, apgd) = (&values[1..4], &values[4..7], &values[7..10]);
        assert!(pgd[2] < apgd[2], "{name}");
        assert!(cw[0] - cw[2] < 2.0, "{name}");
    }
    let of = |name: &str| second.iter().find(|(row, _)| row.ends_with(name)).expect("the row").1.clone();
    assert_eq!((of(": FARE")[0], of(": FARE")[9]), (56.2, 52.8));
    for ((_, averages), (_, second)) in robust.iter().zip(&second) {
        assert_eq!(averages[16], second[9]);
    }
}

fn defended(mut run: Summary, model: &str, defenses: &[(&str, &str)]) -> Summary {
    run.run["model"]["name"] = model.into();
    let list = defenses.iter().map(
        |(name, words)| json!({"name": name, "subject": {"model": model, "defense": words, "digest": "ab"}}),
    );
    run.run["defenses"] = list.collect();
    run
}

const PLUS: &str = "GIF (cutoff 40) and FRA (anchor out/plus.safetensors, data-driven, alpha 0.8, beta 0.2)";

#[test]
fn ours_stand_in_the_papers_layout_and_cannot_be_taken_for_its_figures() {
    let mut runs = Vec::new();
    let sets = [
        "imagenet1k",
        "cifar10",
        "cifar100",
        "stl10",
        "caltech101",
        "caltech256",
        "pets",
        "flowers",
        "food101",
        "cars",
        "sun397",
        "country211",
        "fgvc_aircraft",
        "eurosat",
        "dtd",
        "pcam",
    ];
    for (i, set) in sets.into_iter().enumerate() {
        let mut rows = Vec::new();
        for (defense, counts) in [("none", [80, 0, 0]), ("plus", [70, 50 + i, 10])] {
            rows.push(row(set, defense, 100, counts[0]));
            rows.push(attacked(row(set, defense, 100, counts[1]), "apgd-ce", Some(4), false));
            rows.push(attacked(row(set, defense, 100, counts[2]), "apgd-ce", Some(4), true));
        }
        let print = format!("{:02x}", i + 16);
        let run = summary(set, &print, 100, rows);
        runs.push((PathBuf::from(set), defended(run, "openai/clip-vit-large-patch14", &[("plus", PLUS)])));
    }
    let report = Report::new(runs.clone()).expect("a report").beside_paper();
    let markdown = report.render(Format::Markdown).expect("a text");
    let table = |text: &str, number: usize| {
        let table = text
            .split(&format!("### Table {number}:"))
            .nth(1)
            .unwrap_or_else(|| panic!("Table {number}\n{text}"));
        table.split("\n## ").next().and_then(|t| t.split("\n### ").next()).expect("an end").to_owned()
    };
    let first = table(&markdown, 1);
    assert!(first.contains("| **Robustness under AutoAttack at eps 4/255** |"), "{first}");
    let paper =
        first.lines().rfind(|line| line.starts_with("| R-Adapt+ | the paper")).expect("the paper's line");
    assert!(
        paper.starts_with("| R-Adapt+ | the paper; CLIP ViT-L/14 | transfer; inferred | 64.0 | 83.1 |"),
        "{paper}"
    );
    assert!(paper.ends_with("| 49.6 | 57.2 |"), "{paper}");
    // Ours right below, with the mean of the sixteen, and each threat model in a line of its own.
    let lines: Vec<&str> = first.lines().skip_while(|line| *line != paper).skip(1).take(2).collect();
    assert!(
        lines[0].starts_with(
            "| R-Adapt+ | ours: openai/clip-vit-large-patch14; the paper’s model; defence plus; n = 100;"
        ),
        "{}",
        lines[0]
    );
    assert!(
        lines[0].contains("| transfer; crafted on tiny-clip; 8-bit; apgd-ce | 50.0 (40.4 to 59.6) | 51.0"),
        "{}",
        lines[0]
    );
    assert!(lines[0].ends_with("| 57.5 |"), "{}", lines[0]);
    assert!(
        lines[1].contains("| adaptive; not comparable with the paper’s; 8-bit; apgd-ce | 10.0"),
        "{}",
        lines[1]
    );
    assert!(first.contains("Lines with adaptive are not what the paper measures"), "{first}");
    let second = table(&markdown, 2);
    assert!(second.contains("mean of the 16 sets; n = 100"), "{second}");
    assert!(
        second
            .lines()
            .any(|l| l.starts_with("| R-Adapt+ | ours") && l.contains("transfer") && l.ends_with("| 57.5 |")),
        "{second}"
    );
    assert!(!markdown.contains("Not models of the paper"), "{markdown}");
    assert!(markdown.contains("The paper does not name its threat model."), "{markdown}");
    assert!(
        markdown.contains("No figure given belongs to these tables: 3, 4, 5, 6, 7, 8, 10, 11."),
        "{markdown}"
    );

    // Without one set there is no average that would pass for that of all.
    let report = Report::new(runs[1..].to_vec()).expect("a report").beside_paper();
    let markdown = report.render(Format::Markdown).expect("a text");
    let ours =
        |text: &str| text.lines().filter(|l| l.contains("| ours: ")).map(String::from).collect::<Vec<_>>();
    assert!(ours(&table(&markdown, 1)).iter().all(|line| line.ends_with("| – |")), "{markdown}");
    assert!(
        table(&markdown, 2).contains("mean of 15 sets alone, not the 16: cifar10, cifar100"),
        "{markdown}"
    );

    // Another model and another set, named as such wherever they stand.
    let scene = defended(small("pocket test", "ab"), "pocket-clip", &[("gif+fra", PLUS)]);
    let mut scene = scene;
    for row in &mut scene.rows {
        row.attacked.iter_mut().for_each(|a| a.attack = "apgd-ce".into());
    }
    let report = report_of(&[("a", scene.clone())]).beside_paper();
    for format in [Format::Markdown, Format::Html] {
        let text = report.render(format).expect("a text");
        assert!(text.contains("pocket test (not in the paper)"), "{text}");
        assert!(text.matches("not the paper’s CLIP ViT-L/14").count() >= 5, "{text}");
        let warning = text.find("Not models of the paper").expect("the warning");
        assert!(warning < text.find("<table").or_else(|| text.find("| ---")).expect("a table"));
    }
    let markdown = report.render(Format::Markdown).expect("a text");
    assert!(table(&markdown, 2).contains("pocket test alone, not the 16 sets"), "{markdown}");
    // 8/255 is no column of the paper's.
    assert!(!table(&markdown, 1).contains("54.3") && !table(&markdown, 2).contains("54.3"), "{markdown}");
    // Nothing changes where the paper is not asked for.
    assert!(!report_of(&[("a", scene)]).render(Format::Markdown).expect("a text").contains("paper"));
}

fn report_of(runs: &[(&str, Summary)]) -> Report {
    report(runs)
}

#[test]
fn ablations_sweeps_and_language_models_have_their_tables() {
    let root = tempfile::tempdir().expect("a folder");
    let gif = "GIF (cutoff 40)";
    let fra = "FRA (anchor plus.safetensors, data-driven, alpha 0.8, beta 0.2)";
    let mut rows = Vec::new();
    for (defense, correct) in [("none", 0), ("gif", 20), ("fra", 30), ("gif+fra", 60)] {
        rows.push(row("eurosat", defense, 100, 80));
        rows.push(attacked(row("eurosat", defense, 100, correct), "apgd-ce", Some(4), false));
    }
    let ablated = summary("eurosat", "ab", 100, rows);
    let ablated = defended(ablated, "tiny-clip", &[("gif", gif), ("fra", fra), ("gif+fra", PLUS)]);
    // Anchors as the recipes call them.
    let mut rows = Vec::new();
    for (defense, correct) in [("images-500", 31), ("images-2000", 42)] {
        rows.push(row("eurosat", defense, 100, 80));
        rows.push(attacked(row("eurosat", defense, 100, correct), "apgd-ce", Some(4), false));
    }
    let words = |name: &str| PLUS.replace("plus", name);
    let (few, many) = (words("images-500"), words("images-2000"));
    let images = summary("eurosat", "cd", 100, rows);
    let images = defended(images, "tiny-clip", &[("images-500", &few), ("images-2000", &many)]);
    let mut paths = vec![folder(root.path(), "ablated", &ablated), folder(root.path(), "images", &images)];
    paths.push(sweep_folder(root.path()));
    paths.extend(kinds().iter().map(|(name, json)| written(root.path(), name, json)));
    let report = Report::read(&paths).expect("a report").beside_paper();
    let markdown = report.render(Format::Markdown).expect("a text");
    let table = |number: usize| {
        let table = markdown
            .split(&format!("### Table {number}:"))
            .nth(1)
            .unwrap_or_else(|| panic!("{number}\n{markdown}"));
        table.split("\n## ").next().and_then(|t| t.split("\n### ").next()).expect("an end").to_owned()
    };
    let line = |table: &str, method: &str, has: &str| {
        let found = table.lines().find(|l| l.starts_with(&format!("| {method} | ours")) && l.contains(has));
        found.unwrap_or_else(|| panic!("{method} {has}\n{table}")).to_owned()
    };
    // GIF alone is GIF alone, under the paper's line of that name.
    let six = table(6);
    assert!(
        six.contains("| GIF alone | the paper; CLIP ViT-L/14 | transfer; inferred | 87.3 | 57.5 |"),
        "{six}"
    );
    assert!(line(&six, "GIF alone", "").contains("| 20.0 (13.3 to 28.9) |"), "{six}");
    assert!(line(&six, "FRA alone", "").contains("| 30.0 (21.9 to 39.6) |"), "{six}");
    assert!(!six.contains("images-500") && six.contains("“respectively”"), "{six}");
    let seven = table(7);
    let found = line(&seven, "eurosat", "placed by the anchors’ names");
    assert!(found.ends_with("| 31.0 (22.8 to 40.6) | – | 42.0 (32.8 to 51.8) | – | – | – |"), "{found}");
    let eight = table(8);
    assert!(eight.contains("| 20 epochs | 30 epochs (not in the paper) |"), "{eight}");
    assert!(eight.contains("| **Ours alone: sets that the paper’s table has not** |"), "{eight}");
    for (threat, value) in [("transfer", "40.0"), ("adaptive", "15.0")] {
        assert!(line(&eight, "cifar10", threat).contains(&format!(" | {value} (")), "{eight}");
    }
    // One number of pictures is no series.
    assert!(!seven.contains("cifar10"), "{seven}");
    let five = table(5);
    let found = line(&five, "R-Adapt+, trained at 8/255", "transfer");
    assert!(found.contains("not the paper’s LLaVA-1.5-7B; defence plus-8; pocket, not coco300"), "{found}");
    assert!(found.contains("| 97.5 (87.1 to 99.6) | 75.0 (59.8 to 85.8) |"), "{found}");
    line(&five, "R-Adapt+, trained at 8/255", "adaptive");
    assert!(five.contains("| **Ours alone: the paper’s table has no such line** |"), "{five}");
    line(&five, "white", "transfer");
    assert!(line(&table(4), "R-Adapt+", "transfer").contains("pocket, not flickr30k"), "{markdown}");
    let ten = table(10);
    assert!(ten.contains("| LLaVA | the paper | CLIP-L/14@336 | llava-hf/llava-1.5-7b-hf |"), "{ten}");
    assert!(
        ten.contains("| LLaVA | ours; not LLaVA, a stand-in for it | – | tiny-llava; weights cdcdcdcdcdcd |"),
        "{ten}"
    );
    assert!(markdown.contains("No figure given belongs to these tables: 3, 11."), "{markdown}");
    let json: Value = serde_json::from_str(&report.render(Format::Json).expect("JSON")).expect("JSON");
    let tables: Vec<i64> = json["paper"]["tables"]
        .as_array()
        .expect("tables")
        .iter()
        .filter_map(|t| t["table"].as_i64())
        .collect();
    assert_eq!(tables, [1, 2, 4, 5, 6, 7, 8, 10]);
}

#[test]
fn the_command_sets_ours_beside_the_paper() {
    let root = tempfile::tempdir().expect("a folder");
    let a = folder(root.path(), "a", &small("cifar10", "ab"));
    let folder = analyses(root.path());
    let out = root.path().join("r.html");
    let paths = [a.to_str().expect("a path"), folder.to_str().expect("a path")];
    let output = radapt(&[paths[0], paths[1], "--paper", "--out", out.to_str().expect("a path")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let page = std::fs::read_to_string(out).expect("a page");
    assert!(page.contains("Beside the paper’s tables") && page.contains("1 run and 6 analyses"));
    // Analyses alone are a report as well.
    let output = radapt(&[paths[1]]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = radapt(&[paths[1], "--paper"]);
    assert!(text(&output.stdout).contains("None of the figures given has a place in the paper’s tables."));
}

#[test]
fn names_in_runs_of_any_kind_and_in_analyses_are_text() {
    let root = tempfile::tempdir().expect("a folder");
    let evil = "</style><script>alert('1')</script>|\\\" onerror=\\\"x&\u{202e}`*";
    let mut paths = Vec::new();
    for (name, json) in kinds() {
        let text = json.to_string();
        let text =
            ["tiny-clip", "tiny-llava", "plus-8"].iter().fold(text, |text, name| text.replace(name, evil));
        paths.push(written(root.path(), name, &serde_json::from_str(&text).expect("JSON")));
    }
    let folder = analyses(root.path());
    for name in ["replace", "shapley", "cka"] {
        let file = folder.join(format!("{name}.json"));
        let text =
            std::fs::read_to_string(&file).expect("a file").replace("tiny-clip", evil).replace("emb", evil);
        std::fs::write(&file, text).expect("a file");
    }
    paths.push(folder);
    let report = Report::read(&paths).expect("a report").beside_paper();
    let html = report.render(Format::Html).expect("a page");
    assert!(html.matches("&lt;script&gt;").count() > 30, "{}", html.matches("&lt;script&gt;").count());
    let markdown = report.render(Format::Markdown).expect("a text");
    for text in [&html, &markdown] {
        assert!(!text.contains("<script") && !text.contains('\u{202e}') && !text.contains("onerror=\"x\""));
    }
    assert_eq!(html.matches("</style>").count(), 1);
    // A name does not make columns.
    let mut want = None;
    for line in markdown.lines() {
        let columns = line.replace("\\|", "").matches('|').count();
        match want {
            Some(want) if line.starts_with("| ") => assert_eq!(columns, want, "{line}"),
            _ => want = line.starts_with("| ").then_some(columns),
        }
    }
}
