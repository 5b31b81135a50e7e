//! A [`Report`] as a page and as a table.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::headline::{Lead, share, things};
use super::report::{Answer, Picture, Report, Row, Version};
use crate::attack::{Eps, Threat, ThreatKind};
use crate::eval::judge::Verdict;
use crate::page::{
    DEFENSE, document, escape, printable, prose, shorten, threat_code, two_threats, undefended_or,
};

/// How many pictures the page shows.
const SHOWN: usize = 12;
/// The longest answer shown, in characters.
const LONGEST: usize = 300;
/// The width of [`table`], at most, in characters.
const WIDTH: usize = 110;

const CSS: &str = include_str!("page.css");

/// The signs of the verdicts, drawn so that they need no font.
const SIGNS: &str = r#"<svg class="symbols" aria-hidden="true" focusable="false"><defs>
<symbol id="right" viewBox="0 0 16 16"><path d="M2.5 8.6 6.2 12.3 13.5 4" fill="none" stroke="currentColor" stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round"/></symbol>
<symbol id="fooled" viewBox="0 0 16 16"><path d="M3.5 3.5 12.5 12.5M12.5 3.5 3.5 12.5" fill="none" stroke="currentColor" stroke-width="2.4" stroke-linecap="round"/></symbol>
<symbol id="lost" viewBox="0 0 16 16"><path d="M5 5.6C5 2 11 2 11 5.6 11 8 8 7.8 8 10.2" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round"/><circle cx="8" cy="13.4" r="1.3" fill="currentColor"/></symbol>
<symbol id="both" viewBox="0 0 16 16"><circle cx="8" cy="8" r="5.6" fill="none" stroke="currentColor" stroke-width="2"/><path d="M8 2.4a5.6 5.6 0 0 1 0 11.2z" fill="currentColor"/></symbol>
</defs></svg>
"#;

/// The report as one HTML file that needs nothing else: no script, no font, no request.
///
/// Every text in it is escaped and its content security policy allows pictures from `data:` URLs
/// and the one style sheet, by its hash. Its headline is made of the rows; the first 12 pictures
/// are shown.
pub fn page(report: &Report) -> String {
    let lead = Lead::of(report);
    let defended = lead.defended_name(report);
    let body = [
        SIGNS.into(),
        top(report, &lead, &defended),
        "<main>\n".into(),
        gallery(report, &defended),
        figures(report),
        explanation(report, &defended),
        making(report),
        "</main>\n".into(),
    ]
    .concat();
    let title = format!("radapt demo: {}", report.model);
    document(&title, "radapt demo", CSS, ("pictures", "the pictures"), &body)
}

/// The figures of the report as text for a terminal, at most 110 characters wide.
pub fn table(report: &Report) -> String {
    let columns = ["task", "model", "pictures", "eps", "threat", "right", "%", "95 % interval", "fooled"];
    // What a column may grow to; with the gaps between them they come to less than the width.
    let most = [9, 14, 16, 9, 8, 13, 5, 14, 6];
    debug_assert!(most.iter().sum::<usize>() + 2 * (most.len() - 1) <= WIDTH);
    let right_aligned = |column: usize| column >= 5;
    let mut lines: Vec<[String; 9]> = vec![columns.map(str::to_owned)];
    for row in &report.rows {
        lines.push([
            row.task.to_owned(),
            undefended_or(&row.defense).to_owned(),
            row.attack.clone().unwrap_or_else(|| "clean".into()),
            row.eps.clone().unwrap_or_else(|| "-".into()),
            threat_words(row).to_owned(),
            format!("{}/{}", row.correct, row.n),
            format!("{:.1}", row.value),
            format!("{:.1} to {:.1}", row.low, row.high),
            // Clean pictures have no attacker who could have fooled anyone.
            if row.attack.is_some() { row.target.to_string() } else { "-".into() },
        ]);
    }
    for line in &mut lines {
        for (cell, most) in line.iter_mut().zip(most) {
            *cell = shorten(&printable(cell), most);
        }
    }
    let widths: Vec<usize> =
        (0..9).map(|i| lines.iter().map(|line| line[i].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    let mut task = "";
    for (i, line) in lines.iter().enumerate() {
        if i > 1 && line[0] != task {
            out.push('\n');
        }
        task = &line[0];
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if right_aligned(column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
        if i == 0 {
            out.push_str(&"─".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
            out.push('\n');
        }
    }
    out.push_str(
        "\nright     answers that name the object in the picture, with the Wilson 95 % interval\n\
         fooled    answers that name the attacker's target instead\n\
         transfer  crafted on the undefended model; the attacker does not know of the defence\n\
         adaptive  crafted on the model that answers, with gradients through its defence\n",
    );
    out
}

fn top(report: &Report, lead: &Lead, defended: &str) -> String {
    let notes: String =
        lead.notes(defended).iter().map(|note| format!("<li>{}</li>\n", prose(note))).collect();
    format!(
        "<header class=\"top\">\n<p class=\"eyebrow\">radapt demo · {model}</p>\n<h1>{headline}</h1>\n\
         {chart}<ul class=\"notes\">\n{notes}</ul>\n</header>\n",
        model = escape(&report.model),
        headline = prose(&lead.headline(&report.eps, defended)),
        chart = chart(lead, defended),
    )
}

fn chart(lead: &Lead, defended: &str) -> String {
    let Some(first) = lead.rows().next() else {
        return String::new();
    };
    let is = |row: &&Row, kind: Option<ThreatKind>| row.threat.as_ref().map(Threat::kind) == kind;
    let groups: String = [
        ("Untouched pictures".to_owned(), None),
        (
            format!("Attacked, and the attacker does not know of the defence {}", threat_code("transfer")),
            Some(ThreatKind::Transfer),
        ),
        (
            format!("Attacked, and the attacker knows the defence {}", threat_code("adaptive")),
            Some(ThreatKind::Adaptive),
        ),
    ]
    .into_iter()
    .map(|(label, kind)| {
        let bars: String = lead.rows().filter(|row| is(row, kind)).map(|row| bar(row, defended)).collect();
        if bars.is_empty() {
            String::new()
        } else {
            format!("<p class=\"group\">{label}</p>\n<ul>\n{bars}</ul>\n")
        }
    })
    .collect();
    format!(
        "<figure class=\"chart\">\n<figcaption>{what} the right object. The thin line is \
         the 95 % interval: with as few {things} as these, the true share may lie anywhere on it.\
         </figcaption>\n{groups}</figure>\n",
        what = if first.task == "vqa" {
            "Questions whose answer names"
        } else {
            "Pictures for which the answer names"
        },
        things = things(first),
    )
}

fn bar(row: &Row, defended: &str) -> String {
    let (low, high) = (row.low, row.high);
    let bare = row.defense == "none";
    format!(
        "<li><span>{name}</span><svg class=\"bar\" viewBox=\"0 0 100 10\" preserveAspectRatio=\"none\" \
         aria-hidden=\"true\" focusable=\"false\"><rect class=\"track\" width=\"100\" height=\"10\"/>\
         <rect class=\"fill{bare_class}\" width=\"{share:.2}\" height=\"10\"/>\
         <path d=\"M{low:.2} 5H{high:.2}M{low:.2} 2V8M{high:.2} 2V8\"/></svg>\
         <span class=\"value\"><b>{correct}</b> of {n}</span></li>\n",
        name = if bare { "Undefended".into() } else { format!("With {}", escape(defended)) },
        bare_class = if bare { " bare" } else { "" },
        share = 100.0 * share(row),
        correct = row.correct,
        n = row.n,
    )
}

fn gallery(report: &Report, defended: &str) -> String {
    let total = report.pictures.len();
    let which = match total {
        0 => "This run kept no pictures.".to_owned(),
        1 => "The one picture of this run.".to_owned(),
        n if n <= SHOWN => format!("All {n} pictures of this run, in the order they were drawn."),
        n => format!(
            "The first {SHOWN} of {n} pictures, in the order they were drawn; none was picked by hand. \
             The figures are about all {n}."
        ),
    };
    let mut out = format!(
        "<section aria-labelledby=\"pictures\">\n<h2 id=\"pictures\">The pictures, and what the models say</h2>\n\
         <p>{which}</p>\n"
    );
    if total > 0 {
        out.push_str(&format!(
            "<p>Every picture is attacked twice. Each time the attacker changes the pixels a little, so \
             that the patches that show the object are taken for those of another: the target. The \
             two attacks differ in what the attacker knows, and their figures must never be mixed:</p>\n\
             <div class=\"threats\">\n\
             <div><h3>Attack 1: does not know of the defence {transfer}</h3><p>The change is crafted on the \
             undefended model’s eyes, its CLIP. The very same picture is then shown to the defended one.</p></div>\n\
             <div><h3>Attack 2: knows the defence {adaptive}</h3><p>The change is crafted on the defended \
             model itself, with gradients through the defence. It is shown to that model alone. This is \
             the harder test, and the one a defence has to be judged by.</p></div>\n</div>\n\
             <p class=\"small soft\">How an answer is marked:</p>\n<ul class=\"key\">\n\
             <li>{right} names the object in the picture</li>\n\
             <li>{fooled} names the attacker’s target</li>\n\
             <li>{lost} names neither of them</li>\n<li>{both} names both</li>\n</ul>\n",
            transfer = threat_code("transfer"),
            adaptive = threat_code("adaptive"),
            right = pill("right", "right"),
            fooled = pill("fooled", "fooled"),
            lost = pill("lost", "lost"),
            both = pill("both", "both"),
        ));
    }
    for (i, picture) in report.pictures.iter().take(SHOWN).enumerate() {
        out.push_str(&card(i + 1, picture, defended));
    }
    out.push_str("</section>\n");
    out
}

fn card(number: usize, picture: &Picture, defended: &str) -> String {
    let object = escape(&picture.object);
    let asked = picture.clean.defended.first().map(|answer| {
        format!(
            " Both models were asked: <q dir=\"auto\">{}</q>",
            escape(&shorten(&answer.question, LONGEST))
        )
    });
    let attacked = |class: &str, name: &str, knows: &str, version: &Version| {
        format!(
            "<section class=\"version {class}\">\n<h4>{name} {code}<span>{knows}</span></h4>\n\
             <div class=\"pair\">\n{picture}{change}</div>\n{says}</section>\n",
            code = threat_code(class),
            picture = image(
                &version.png,
                &format!("The picture of {object} after {name}; it looks nearly as before"),
                "Attacked"
            ),
            change = image(
                &version.change,
                &format!("The change of {name}, magnified: grey where nothing changed"),
                "The change, magnified"
            ),
            says = says(version.undefended.as_deref(), &version.defended, true, defended),
        )
    };
    format!(
        "<article class=\"card\" aria-labelledby=\"picture-{number}\">\n<header>\n\
         <h3 id=\"picture-{number}\">{number}. {object}</h3>\n\
         <p class=\"soft small\">Shown is <q dir=\"auto\">{caption}</q> The attacker wants it taken for: \
         <b>{target}</b>.{asked}</p>\n</header>\n\
         <div class=\"versions\">\n<section class=\"version clean\">\n\
         <h4>Untouched<span>nobody attacks</span></h4>\n<div class=\"pair one\">\n{clean}</div>\n{says}</section>\n\
         {transfer}{adaptive}</div>\n{more}</article>\n",
        caption = escape(&shorten(&picture.caption, LONGEST)),
        target = escape(&picture.target),
        asked = asked.unwrap_or_default(),
        clean = image(&picture.clean.png, &format!("Picture of {object}, as drawn"), "As drawn"),
        says = says(picture.clean.undefended.as_deref(), &picture.clean.defended, false, defended),
        transfer = attacked("transfer", "Attack 1", "does not know of the defence", &picture.transfer),
        adaptive = attacked("adaptive", "Attack 2", "knows the defence", &picture.adaptive),
        more = more(picture, defended),
    )
}

/// A figure; `alt` and `caption` are HTML already.
fn image(png: &[u8], alt: &str, caption: &str) -> String {
    let image = if png.is_empty() {
        "<div class=\"none\">not kept</div>".to_owned()
    } else {
        format!("<img alt=\"{alt}\" src=\"data:image/png;base64,{}\">", STANDARD.encode(png))
    };
    format!("<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
}

/// What the models say to the first question; `attacked` says whether anybody meant them to be wrong.
fn says(undefended: Option<&[Answer]>, defended: &[Answer], attacked: bool, name: &str) -> String {
    let one = |who: String, answers: &[Answer]| {
        answers
            .first()
            .map(|a| format!("<dt>{who}</dt>\n<dd>{}</dd>\n", answer(a, attacked)))
            .unwrap_or_default()
    };
    let bare = undefended.map(|answers| one("Undefended model".into(), answers)).unwrap_or_default();
    format!("<dl class=\"says\">\n{bare}{}</dl>\n", one(format!("With {}", escape(name)), defended))
}

fn answer(answer: &Answer, attacked: bool) -> String {
    let said = match answer.answer.trim() {
        "" => "<i class=\"soft\">(nothing)</i><br>".to_owned(),
        text => format!("<q dir=\"auto\">{}</q>", escape(&shorten(text, LONGEST))),
    };
    let verdict = match (answer.verdict, attacked) {
        (Verdict::Original, _) => pill("right", "right"),
        (Verdict::Both, _) => pill("both", "both"),
        (Verdict::Target, true) => pill("fooled", "fooled"),
        (Verdict::Neither, true) => pill("lost", "lost"),
        // Nobody has fooled a model that is wrong about an untouched picture.
        (Verdict::Target | Verdict::Neither, false) => pill("lost", "wrong"),
    };
    format!("{said}{verdict}")
}

/// A verdict by sign, colour and words; `words` are HTML already.
fn pill(class: &str, words: &str) -> String {
    format!(
        "<span class=\"verdict {class}\"><svg aria-hidden=\"true\" focusable=\"false\"><use href=\"#{class}\"/>\
         </svg>{words}</span>"
    )
}

/// The questions after the first.
fn more(picture: &Picture, defended: &str) -> String {
    let questions = picture.clean.defended.get(1..).unwrap_or_default();
    if questions.is_empty() {
        return String::new();
    }
    let name = escape(defended);
    let rows: String = questions
        .iter()
        .enumerate()
        .map(|(i, question)| {
            let cell = |answers: Option<&[Answer]>, attacked| {
                // The same question wherever it stands.
                let found = answers
                    .and_then(|answers| answers.get(i + 1).filter(|a| a.question == question.question));
                let said = found.map_or_else(
                    || "<span class=\"soft\">not asked</span>".to_owned(),
                    |found| answer(found, attacked),
                );
                format!("<td>{said}</td>")
            };
            format!(
                "<tr><th scope=\"row\">{}</th>{}{}{}{}{}</tr>\n",
                escape(&shorten(&question.question, LONGEST)),
                cell(picture.clean.undefended.as_deref(), false),
                cell(Some(&picture.clean.defended), false),
                cell(picture.transfer.undefended.as_deref(), true),
                cell(Some(&picture.transfer.defended), true),
                cell(Some(&picture.adaptive.defended), true),
            )
        })
        .collect();
    format!(
        "<details>\n<summary>{count} more question{s} about this picture</summary>\n\
         <div class=\"scroll answers\" role=\"region\" aria-label=\"More questions about {object}\" tabindex=\"0\">\n\
         <table>\n<thead>\n<tr><td></td><th scope=\"colgroup\" colspan=\"2\">Untouched</th>\
         <th scope=\"colgroup\" colspan=\"2\">Attack 1 {transfer}</th>\
         <th scope=\"colgroup\">Attack 2 {adaptive}</th></tr>\n\
         <tr><th scope=\"col\">Question</th><th scope=\"col\">Undefended</th><th scope=\"col\">With {name}</th>\
         <th scope=\"col\">Undefended</th><th scope=\"col\">With {name}</th>\
         <th scope=\"col\">With {name}</th></tr>\n</thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n</details>\n",
        count = questions.len(),
        s = if questions.len() == 1 { "" } else { "s" },
        object = escape(&picture.object),
        transfer = threat_code("transfer"),
        adaptive = threat_code("adaptive"),
    )
}

fn figures(report: &Report) -> String {
    let mut body = String::new();
    let mut task = None;
    for row in &report.rows {
        if task != Some(row.task) {
            let open = if task.is_some() { "</tbody>\n" } else { "" };
            task = Some(row.task);
            body.push_str(&format!(
                "{open}<tbody>\n<tr><th class=\"task\" colspan=\"7\" scope=\"rowgroup\"><span>{}</span></th></tr>\n",
                escape(&task_words(row.task))
            ));
        }
        let threat = match &row.threat {
            None => format!("<span class=\"soft\">{}</span>", threat_words(row)),
            Some(Threat::Adaptive) => threat_code("adaptive"),
            Some(Threat::Transfer { surrogate }) => {
                format!(
                    "{}<span class=\"under\">crafted on {}</span>",
                    threat_code("transfer"),
                    escape(surrogate)
                )
            }
        };
        let dash = "<span class=\"soft\">–</span>";
        body.push_str(&format!(
            "<tr><th scope=\"row\">{model}</th><td>{attack}{eps}</td><td>{threat}</td>\
             <td class=\"number\">{correct} of {n}</td><td class=\"number\">{value:.1} %</td>\
             <td class=\"number\">{low:.1} to {high:.1}</td><td class=\"number\">{target}</td></tr>\n",
            model = escape(undefended_or(&row.defense)),
            attack = row.attack.as_deref().map_or("clean".into(), escape),
            eps = row
                .eps
                .as_deref()
                .map_or(String::new(), |eps| format!("<span class=\"under\">eps {}</span>", escape(eps))),
            correct = row.correct,
            n = row.n,
            value = row.value,
            low = row.low,
            high = row.high,
            target = if row.attack.is_some() { row.target.to_string() } else { dash.into() },
        ));
    }
    if task.is_some() {
        body.push_str("</tbody>\n");
    }
    format!(
        "<section aria-labelledby=\"figures\">\n<h2 id=\"figures\">The figures</h2>\n\
         <div class=\"scroll figures\" role=\"region\" aria-label=\"Table of figures\" tabindex=\"0\">\n<table>\n\
         <caption>How many answers name the object that is in the picture (right), and how many name the \
         attacker’s target (fooled). The interval is Wilson’s at 95 %. Every attacked row names its threat \
         model; an undefended model has no defence to know of, so for it both are the same attack.</caption>\n\
         <thead><tr><th scope=\"col\">Model</th><th scope=\"col\">Pictures</th>\
         <th scope=\"col\">Threat model</th><th scope=\"col\" class=\"number\">Right</th>\
         <th scope=\"col\" class=\"number\">Share</th><th scope=\"col\" class=\"number\">95 % interval</th>\
         <th scope=\"col\" class=\"number\">Fooled</th></tr></thead>\n{body}</table>\n</div>\n</section>\n"
    )
}

fn explanation(report: &Report, defended: &str) -> String {
    let size = report.eps.parse::<Eps>().map_or_else(
        |_| format!("at most eps = {}", escape(&report.eps)),
        |eps| {
            format!(
                "at most {steps} of the 255 steps between dark and bright (eps = {eps})",
                steps = eps.steps(),
                eps = escape(&report.eps),
            )
        },
    );
    format!(
        "<section class=\"prose\" aria-labelledby=\"what\">\n<h2 id=\"what\">What is this?</h2>\n\
         <p>Models that look at pictures can be misled on purpose. Someone who can compute how the model’s \
         answer hangs on each pixel can nudge all pixels a little at once, each in just the direction that \
         hurts. To a person the picture is still the same; to the model it shows something else. This page \
         shows that on a small model, and shows what one defence does about it and what it does not.</p>\n\
         <h3>The change</h3>\n\
         <p>The red, green and blue of every pixel may move by {size}, and the result is a normal picture \
         file again. “The change, magnified” shows the difference alone: grey is no change.</p>\n\
         <h3>The defence</h3>\n\
         <p>R-Adapt puts two things into a finished model, whose weights all stay as they are.</p>\n\
         {DEFENSE}<p>In force here: {defense}.{called}</p>\n\
         {threats}<h3>The pocket model</h3>\n\
         <p>The model that answers is {model}: a picture-and-language model of a few megabytes, trained \
         on pictures that a program draws, one object of 26 kinds in each. It is small enough to be asked and \
         attacked on any computer while you wait. It is built like the large ones, but the figures are about it alone: what \
         they are for a large model on photographs has to be measured on that model.</p>\n</section>\n",
        defense = escape(&report.defense),
        called = if defended == "R-Adapt" {
            ""
        } else {
            " That is not the whole of R-Adapt, and this page calls it by its own name."
        },
        threats = two_threats(),
        model = escape(&report.model),
    )
}

fn making(report: &Report) -> String {
    let facts: String = [
        ("Command", format!("<code>{}</code>", escape(&report.command))),
        ("Model", escape(&report.model)),
        ("Defence", escape(&report.defense)),
        ("Attack", escape(&report.attack)),
        ("Largest change", format!("{} per pixel and colour", escape(&report.eps))),
        ("Seed", report.seed.to_string()),
        ("Pictures", report.pictures.len().to_string()),
        ("Time", duration(report.seconds)),
        ("Version", format!("radapt {}", env!("CARGO_PKG_VERSION"))),
    ]
    .iter()
    .map(|(name, value)| format!("<dt>{name}</dt><dd>{value}</dd>\n"))
    .collect();
    format!(
        "<section aria-labelledby=\"made\">\n<h2 id=\"made\">How it was made</h2>\n\
         <dl class=\"facts\">\n{facts}</dl>\n\
         <p class=\"soft small\">An answer is judged by the words in it, by a program, not by a person or \
         another model. The same command and seed make the same pictures again.</p>\n</section>\n"
    )
}

fn task_words(task: &str) -> String {
    match task {
        "caption" => "caption: the model says what is in the picture".into(),
        "vqa" => "vqa: the model is asked questions whose answer is the object".into(),
        "zero-shot" => "zero-shot: CLIP picks one name for the picture".into(),
        other => other.into(),
    }
}

fn threat_words(row: &Row) -> &'static str {
    match &row.threat {
        None if row.attack.is_some() => "unstated",
        None => "clean",
        Some(Threat::Transfer { .. }) => "transfer",
        Some(Threat::Adaptive) => "adaptive",
    }
}

fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1} seconds"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, RgbImage};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};
    use sha2::{Digest, Sha256};

    use super::super::sample::{report, rows};
    use super::*;
    use crate::pocket::{KINDS, Split, draw};

    /// A picture with whose every text is `text`.
    fn picture(text: &str) -> Picture {
        let answers = || {
            [Verdict::Original, Verdict::Target, Verdict::Both, Verdict::Neither]
                .map(|verdict| Answer { question: text.into(), answer: text.into(), verdict })
                .to_vec()
        };
        let version =
            |undefended| Version { png: vec![1, 2, 3], change: vec![4], undefended, defended: answers() };
        Picture {
            object: text.into(),
            target: text.into(),
            caption: text.into(),
            clean: version(Some(answers())),
            transfer: version(Some(answers())),
            adaptive: version(None),
        }
    }

    #[test]
    fn every_text_is_escaped() {
        let evil = "</style><script>alert('1')</script>\" onerror=\"x&\u{202e}";
        let mut report = report(rows("caption", [3, 3, 0, 2, 0], 3));
        report.pictures = vec![picture(evil)];
        for text in
            [&mut report.model, &mut report.defense, &mut report.attack, &mut report.eps, &mut report.command]
        {
            *text = evil.into();
        }
        for row in &mut report.rows {
            if row.defense != "none" {
                row.defense = evil.into();
            }
            if row.attack.is_some() {
                (row.attack, row.eps) = (Some(evil.into()), Some(evil.into()));
            }
            if let Some(Threat::Transfer { surrogate }) = &mut row.threat {
                *surrogate = evil.into();
            }
        }
        let html = page(&report);
        assert!(!html.contains("<script") && !html.contains("onerror=\"") && !html.contains('\u{202e}'));
        assert_eq!(html.matches("</style>").count(), 1);
        assert!(html.matches("&lt;script&gt;").count() > 20);
        assert!(!table(&report).contains('\u{202e}'));
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        let mut report = report(rows("caption", [3, 3, 0, 2, 0], 3));
        report.pictures = vec![picture("apple")];
        let html = page(&report);
        for outside in ["http:", "https:", "<link", "<script", "url(", "@import", " style=", "<iframe"] {
            assert!(!html.contains(outside), "{outside}");
        }
        let source = html.matches("src=\"").count();
        assert_eq!((source, html.matches("src=\"data:image/png;base64,").count()), (5, 5));
        // The policy's hash is that of the style sheet as it stands in the page.
        let style = html.split("<style>").nth(1).and_then(|rest| rest.split("</style>").next());
        let hash = STANDARD.encode(Sha256::digest(style.expect("a style sheet")));
        assert!(html.contains(&format!("style-src 'sha256-{hash}';")));
    }

    #[test]
    fn every_robust_row_shows_its_threat() {
        let mut all = rows("caption", [24, 24, 2, 15, 2], 24);
        all.extend(rows("vqa", [70, 69, 5, 40, 6], 72));
        let report = report(all);
        let html = page(&report);
        let body = html.split("id=\"figures\"").nth(1).and_then(|rest| rest.split("</table>").next());
        let lines: Vec<_> = body.expect("the table").lines().filter(|l| l.contains("of 24<")).collect();
        assert_eq!(lines.len(), 5);
        let text = table(&report);
        let printed: Vec<_> = text.lines().filter(|line| line.starts_with("caption")).collect();
        assert_eq!(printed.len(), 5);
        for (row, (line, printed)) in report.rows.iter().zip(lines.iter().zip(printed)) {
            let threat = threat_words(row);
            assert!(line.contains(&format!(">{threat}<")), "{line}");
            assert!(printed.split_whitespace().any(|w| w == threat), "{printed}");
            assert!(line.contains(&format!("{} of {}", row.correct, row.n)), "{line}");
            assert!(line.contains(&format!("{:.1} to {:.1}", row.low, row.high)), "{line}");
            assert!(printed.contains(&format!("{}/{}", row.correct, row.n)), "{printed}");
        }
        // The chart has every bar under its threat model.
        let chart = html.split("<figure class=\"chart\">").nth(1).expect("a chart");
        let groups: Vec<_> =
            chart.split("class=\"group\"").skip(1).map(|g| g.matches("<li>").count()).collect();
        assert!(groups.starts_with(&[2, 2]), "{groups:?}");
    }

    #[test]
    fn the_table_fits_a_terminal() {
        let mut report = report(rows("zero-shot", [123_456, 99_999, 12, 100_000, 0], 123_456));
        for row in &mut report.rows {
            if row.attack.is_some() {
                row.attack = Some("an-attack-with-a-very-long-name\u{1b}[31m".into());
            }
            if row.defense != "none" {
                row.defense = "gif+fra with an anchor from a very long path".into();
            }
        }
        let text = table(&report);
        println!("{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(!text.contains('\u{1b}'));
        println!("{}", table(&super::super::sample::report(rows("caption", [24, 24, 2, 15, 2], 24))));
    }

    #[test]
    fn an_empty_report_has_a_page() {
        let html = page(&report(Vec::new()));
        assert!(html.contains("Nothing was measured") && html.contains("kept no pictures"));
        assert!(table(&report(Vec::new())).starts_with("task"));
        let mut none = report(rows("caption", [0; 5], 0));
        none.pictures = vec![picture("")];
        none.pictures[0].clean.defended.clear();
        none.pictures[0].clean.png.clear();
        assert!(page(&none).contains("Nothing was measured") && page(&none).contains("not kept"));
    }

    #[test]
    fn of_many_pictures_the_first_twelve_are_shown_and_that_is_said() {
        let mut report = report(rows("caption", [24, 24, 2, 15, 2], 24));
        report.pictures = vec![picture("apple"); 24];
        let html = page(&report);
        assert_eq!(html.matches("<article").count(), 12);
        assert!(html.contains("The first 12 of 24 pictures"));
    }

    fn png(picture: &RgbImage) -> Vec<u8> {
        let mut out = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut out, ImageFormat::Png).expect("a PNG in memory");
        out.into_inner()
    }

    fn sample() -> Report {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut all = rows("caption", [24, 23, 2, 15, 2], 24);
        all.extend(rows("vqa", [71, 68, 6, 44, 9], 72));
        all.extend(rows("zero-shot", [24, 22, 1, 13, 1], 24));
        let mut report = report(all);
        for index in 0..24 {
            let scene = draw(Split::Test, 0, index, 96).expect("an allowed size");
            let target = KINDS[scene.target].name;
            let mut version = |attacked: Option<(usize, usize)>| {
                let (mut picture, mut change) = (scene.picture.clone(), scene.picture.clone());
                for (value, change) in picture.iter_mut().zip(change.iter_mut()) {
                    let new = (i32::from(*value) + (rng.next_u32() % 33) as i32 - 16).clamp(0, 255);
                    *change = (128 + (new - i32::from(*value)) * 7).clamp(0, 255) as u8;
                    *value = if attacked.is_some() { new as u8 } else { *value };
                }
                let answers = |verdict: Verdict| -> Vec<Answer> {
                    let say = |right: &str, wrong: &str| match verdict {
                        Verdict::Original => right.to_owned(),
                        Verdict::Target => wrong.to_owned(),
                        Verdict::Both => format!("{right} {wrong}"),
                        Verdict::Neither => "A green traffic light in the snow.".into(),
                    };
                    let first = Answer {
                        question: "Describe the image in one sentence.".into(),
                        answer: say(&scene.caption, &scene.target_caption),
                        verdict,
                    };
                    let rest = scene.questions.iter().map(|question| Answer {
                        question: question.question.clone(),
                        answer: say(&question.answer, &format!("A {target}.")),
                        verdict,
                    });
                    [first].into_iter().chain(rest).collect()
                };
                let of =
                    |i: usize| [Verdict::Original, Verdict::Target, Verdict::Neither, Verdict::Both][i % 4];
                let (bare, defended) = attacked.unwrap_or((0, 0));
                Version {
                    png: png(&picture),
                    change: if attacked.is_some() { png(&change) } else { Vec::new() },
                    undefended: (bare < 9).then(|| answers(of(bare))),
                    defended: answers(of(defended)),
                }
            };
            let i = index as usize;
            report.pictures.push(Picture {
                object: scene.name().into(),
                target: target.into(),
                caption: scene.caption.clone(),
                clean: version(None),
                transfer: version(Some((1, [0, 0, 2, 0, 3, 1][i % 6]))),
                adaptive: version(Some((9, [1, 1, 0, 2, 1][i % 5]))),
            });
        }
        report
    }

    /// `cargo test --release --no-default-features --lib sample_page -- --ignored --nocapture`
    #[test]
    #[ignore = "writes a page to look at, with invented answers"]
    fn a_sample_page_is_written() {
        let path = std::env::temp_dir().join("radapt-page.html");
        let html = page(&sample());
        std::fs::write(&path, &html).expect("a writable temporary folder");
        println!("{} bytes in {}", html.len(), path.display());
    }
}
