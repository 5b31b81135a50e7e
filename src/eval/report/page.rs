//! The report as a page.

use super::super::Row;
use super::arrange::{Line, Overview, Section, Setting, overviews, sections};
use super::plot::{self, Axis, plot};
use super::{Report, count, paper};
use crate::attack::{Eps, Threat};
use crate::page::{DEFENSE, document, escape, threat_code, two_threats, undefended_or};

const CSS: &str = include_str!("page.css");

/// The line by which a page is known as one of these.
pub(super) const GENERATOR: &str = "<meta name=\"generator\" content=\"radapt eval report\">";

const DASH: &str = "<span class=\"soft\">–</span>";

/// What some attacks do, by name.
const KNOWN: [(&str, &str); 10] = [
    ("pgd", "many small steps, each in the direction that hurts most"),
    ("cw", "a search for the smallest change that misleads"),
    ("apgd-ce", "steps whose size adapts by itself, on the usual loss of a classifier"),
    ("apgd-dlr", "the same, on a loss that scaling the model’s outputs cannot hide from"),
    ("apgd-t", "the same, towards one wrong name after the other"),
    ("fab", "a search along the border between the right name and the others"),
    ("fab-t", "the same, towards one wrong name after the other"),
    ("square", "squares of random place and colour, kept if they hurt; needs no gradients"),
    ("apgd-csr", "the paper authors’ own variant of APGD"),
    ("autoattack", "several attacks in a row: a picture counts as right only if it withstands them all"),
];

/// The page: what must be known first, then plots and tables, then how it was made.
pub(super) fn page(report: &Report) -> String {
    let datasets = report.datasets();
    let title = match datasets.as_slice() {
        [] => "Robustness report".to_owned(),
        names => format!("Robustness on {}", listed(names)),
    };
    let sections = sections(&report.runs);
    // An attack looks the same wherever it stands.
    let mut attacks: Vec<&str> = Vec::new();
    for attack in sections.iter().flat_map(Section::attacks) {
        if !attacks.contains(&attack) {
            attacks.push(attack);
        }
    }
    let overviews: String = overviews(&report.runs).iter().map(|overview| all(report, overview)).collect();
    let grids = report.grids();
    let others = grids.iter().enumerate().map(|(i, grid)| grid.html(&format!("kind-{i}"), "h2")).collect();
    let analyses = report.analyses.iter().flat_map(|analysis| &analysis.grids).enumerate();
    let analyses = analyses.map(|(i, grid)| grid.html(&format!("analysis-{i}"), "h2")).collect();
    let body = [
        top(report, &title),
        "<main id=\"main\">\n".into(),
        if report.paper { beside(report) } else { String::new() },
        sections.iter().enumerate().map(|(i, section)| one(report, section, &attacks, i)).collect(),
        overviews,
        others,
        analyses,
        explanation(&attacks),
        making(report),
        "</main>\n".into(),
    ]
    .concat();
    document(&title, super::MARK, CSS, ("main", "the figures"), &body)
}

/// The paper's tables with ours beside.
fn beside(report: &Report) -> String {
    let beside = paper::beside(&report.runs);
    let lead: String = beside.lead.iter().map(|words| format!("<p>{}</p>\n", escape(words))).collect();
    let tables: String =
        beside.tables.iter().map(|(number, grid)| grid.html(&format!("paper-{number}"), "h3")).collect();
    format!(
        "<section class=\"beside\" aria-labelledby=\"paper\">\n<h2 id=\"paper\">Beside the paper’s tables</h2>\n{lead}{tables}</section>\n"
    )
}

fn top(report: &Report, title: &str) -> String {
    let notes = report.notes();
    let state = if notes.is_empty() {
        "<p class=\"state\">All runs are complete, every item was scored, and no attack raised a warning.</p>\n".to_owned()
    } else {
        let notes: String = notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
        format!(
            "<section class=\"state warns card\" aria-labelledby=\"state\">\n<h2 id=\"state\">Before you read the figures</h2>\n\
             <ul class=\"notes\">\n{notes}</ul>\n</section>\n"
        )
    };
    let runs = report.runs.len();
    let analyses = match report.analyses.len() {
        0 => String::new(),
        1 => " and 1 analysis".into(),
        n => format!(" and {n} analyses"),
    };
    format!(
        "<header class=\"top\">\n<p class=\"eyebrow\">radapt eval report · {runs} run{s}{analyses}</p>\n<h1>{title}</h1>\n\
         <p>How many pictures a model still gets right when somebody changes them on purpose: every pixel a \
         little, by at most eps. <a href=\"#what\">What the words mean</a> stands at the end.</p>\n{state}</header>\n",
        s = if runs == 1 { "" } else { "s" },
        title = escape(title),
    )
}

fn one(report: &Report, section: &Section, attacks: &[&str], index: usize) -> String {
    let name = format!("{}: {}", task(section.task), escape(section.dataset));
    format!(
        "<section aria-labelledby=\"set-{index}\">\n<h2 id=\"set-{index}\">{name}</h2>\n{}{}</section>\n",
        plots(report, section, attacks, index),
        figures(report, section, &name),
    )
}

/// A group of plots for each threat model, in it one for each defence, so that they stand side by side.
fn plots(report: &Report, section: &Section, attacks: &[&str], index: usize) -> String {
    let axis = Axis::new(section.radii().into_iter().flatten());
    let (several, models) = (section.runs.len() > 1, section.has_models());
    let mut out = String::new();
    let mut group: Option<(&str, Setting)> = None;
    for (i, line) in section.lines.iter().enumerate() {
        let drawn = plot::series(line, attacks);
        let Some(setting) = line.setting.filter(|_| !drawn.is_empty()) else {
            continue;
        };
        if group != Some((line.model, setting)) {
            if group.is_some() {
                out += "</div>\n";
            }
            let model = if models { format!("{}: ", escape(line.model)) } else { String::new() };
            out += &format!(
                "<div class=\"group\">\n<h3>{model}{knows} {code}</h3>\n<p class=\"soft\">{words}</p>\n</div>\n<div class=\"plots\">\n",
                knows = match setting.threat {
                    Threat::Transfer { .. } => "The attacker does not know of the defence",
                    Threat::Adaptive => "The attacker knows the defence",
                },
                code = threat_code(&setting.threat.to_string()),
                words = setting_words(setting),
            );
            group = Some((line.model, setting));
        }
        let threat = match setting.surrogate() {
            Some(surrogate) => format!("transfer, crafted on {surrogate}"),
            None => "adaptive".into(),
        };
        let defense = undefended_or(line.defense);
        let run = if several { format!(", run {}", line.run + 1) } else { String::new() };
        let unfinished = if report.runs[line.run].is_complete() { "" } else { " The run is not complete." };
        let title = format!("{}, {defense}, {threat}: right answers against eps", section.dataset);
        let legend: String = drawn
            .iter()
            .map(|(look, _)| format!("<li>{}{}</li>\n", plot::key(*look), escape(attacks[*look])))
            .collect();
        let clean = match line.clean {
            Some(row) if row.n > 0 => format!("<li>{}untouched pictures</li>\n", plot::clean_key()),
            _ => String::new(),
        };
        out += &format!(
            "<figure class=\"card\">\n<figcaption><b>{shown}</b> {code}<span>Crafted on {crafted}; n = {n}{run}.{unfinished}</span></figcaption>\n\
             {plot}<ul class=\"legend\">\n{clean}{legend}</ul>\n</figure>\n",
            shown = if defense == "undefended" {
                "Undefended".into()
            } else {
                format!("With {}", escape(defense))
            },
            code = threat_code(&setting.threat.to_string()),
            crafted = setting.surrogate().map_or("this very model".into(), escape),
            n = count(line.rows().map(|row| row.n)),
            plot = plot(line, attacks, &axis, &title, &threat, &format!("plot-{index}-{i}")),
        );
    }
    if group.is_some() {
        out += "</div>\n";
        let unplaced: Vec<String> = section
            .columns
            .iter()
            .filter(|column| column.eps.is_none())
            .filter_map(|column| column.attack.map(escape))
            .collect();
        if !unplaced.is_empty() {
            out += &format!(
                "<p class=\"soft small\">Not drawn, because it has no eps, and so in the table alone: {}.</p>\n",
                unplaced.join(", ")
            );
        }
    }
    out
}

fn setting_words(setting: Setting) -> String {
    let holds = match setting.holds() {
        "8-bit" => "scored as a picture file can hold them, in 8 bits",
        _ => "scored as the attack made them, before any file could hold them",
    };
    match setting.surrogate() {
        Some(surrogate) => format!("Pictures crafted on {}, {holds}.", escape(surrogate)),
        None => format!("Pictures crafted on the very model that is scored, {holds}."),
    }
}

/// The table beside the plots: a row for each attack, a column for each radius.
fn figures(report: &Report, section: &Section, name: &str) -> String {
    let radii = section.radii();
    let (several, models) = (section.runs.len() > 1, section.has_models());
    let mut head = String::new();
    let mut column =
        |name: &str, class: &str| head.push_str(&format!("<th scope=\"col\"{class}>{name}</th>"));
    if models {
        column("Model", "");
    }
    for name in ["Defence", "Threat", "Surrogate", "Attack"] {
        column(name, "");
    }
    if several {
        column("Run", "");
    }
    let number = " class=\"number\"";
    column("n", number);
    column("Clean", number);
    for eps in &radii {
        column(&eps.map_or("no eps".into(), |eps| format!("eps {}", escape(&eps.to_string()))), number);
    }
    let mut body = String::new();
    for line in &section.lines {
        body += "<tbody>\n";
        let attacks: Vec<Option<&str>> = match line.setting {
            None => vec![None],
            Some(_) => section.attacks().into_iter().map(Some).collect(),
        };
        for attack in attacks {
            let cells: Vec<Option<&Row>> =
                radii.iter().map(|eps| attack.and_then(|attack| find(section, line, attack, *eps))).collect();
            if attack.is_some() && cells.iter().all(Option::is_none) {
                continue;
            }
            body += "<tr>";
            if models {
                body += &format!("<td>{}</td>", escape(line.model));
            }
            let (threat, surrogate) = threat(line.setting);
            body += &format!(
                "<th scope=\"row\">{defense}</th><td>{threat}</td><td>{surrogate}</td><td>{attack}{holds}</td>",
                defense = escape(undefended_or(line.defense)),
                attack = attack.map_or("clean".into(), escape),
                holds = line
                    .setting
                    .map_or(String::new(), |s| format!("<span class=\"under\">{}</span>", s.holds())),
            );
            if several {
                body += &format!("<td>{}</td>", line.run + 1);
            }
            let rows = line.clean.into_iter().chain(cells.iter().copied().flatten());
            body += &format!("<td class=\"number\">{}</td>", count(rows.map(|row| row.n)));
            let mark = if report.runs[line.run].is_complete() { "" } else { "*" };
            for cell in std::iter::once(line.clean).chain(cells) {
                body += &value(cell, mark);
            }
            body += "</tr>\n";
        }
        body += "</tbody>\n";
    }
    let stars = stars(report, section.runs.iter().copied());
    let per_class = if section.lines.iter().flat_map(Line::rows).any(|row| row.mean_per_class.is_some()) {
        " “Per class” is the mean of the classes’ own shares; the interval and the plots are about the share of all items."
    } else {
        ""
    };
    format!(
        "<div class=\"scroll figures\" role=\"region\" aria-label=\"Figures, {name}\" tabindex=\"0\">\n<table>\n\
         <caption>Share of items that came out right in percent, below it the Wilson 95 % interval. Under \
         attack a picture counts only if it was right before as well. Below an attack’s name stands what the \
         pictures held when they were scored.{per_class}{stars}</caption>\n\
         <thead><tr>{head}</tr></thead>\n{body}</table>\n</div>\n"
    )
}

/// What the stars in a table with these runs' figures mean, if there are any.
fn stars(report: &Report, mut runs: impl Iterator<Item = usize>) -> &'static str {
    if runs.all(|run| report.runs[run].is_complete()) { "" } else { " * From a run that is not complete." }
}

fn find<'a>(section: &Section<'a>, line: &Line<'a>, attack: &str, eps: Option<Eps>) -> Option<&'a Row> {
    let place = section.columns.iter().position(|c| c.attack == Some(attack) && c.eps == eps)?;
    line.cells[place]
}

fn value(row: Option<&Row>, mark: &str) -> String {
    let Some(row) = row.filter(|row| row.n > 0) else {
        return format!("<td class=\"number\">{DASH}</td>");
    };
    let (low, high) = row.interval();
    let mean = row
        .mean_per_class
        .map(|mean| format!("<span class=\"under\">per class {mean:.1}</span>"))
        .unwrap_or_default();
    format!(
        "<td class=\"number\">{:.1}{mark}<span class=\"under\">({low:.1} to {high:.1})</span>{mean}</td>",
        row.value()
    )
}

/// Threat and surrogate, as cells' contents.
fn threat(setting: Option<Setting>) -> (String, String) {
    match setting {
        None => (DASH.into(), DASH.into()),
        Some(setting) => {
            (threat_code(&setting.threat.to_string()), setting.surrogate().map_or(DASH.into(), escape))
        }
    }
}

/// All data sets of a task, in the paper's layout.
fn all(report: &Report, overview: &Overview) -> String {
    let number = " class=\"number\"";
    let mut head = String::new();
    if overview.has_models {
        head += "<th scope=\"col\">Model</th>";
    }
    for name in ["Defence, threat", "Surrogate", "Pictures"] {
        head += &format!("<th scope=\"col\">{name}</th>");
    }
    for column in &overview.datasets {
        head += &format!(
            "<th scope=\"col\"{number}>{}<span class=\"under soft\">{}n = {}</span></th>",
            escape(column.dataset),
            if column.per_class { "per class, " } else { "" },
            column.n
        );
    }
    head += &format!("<th scope=\"col\"{number}>Average</th>");
    let columns = 4 + overview.datasets.len() + usize::from(overview.has_models);
    let mark = |run: usize| if report.runs[run].is_complete() { "" } else { "*" };
    let mut body = String::new();
    let mut condition = None;
    for line in &overview.lines {
        if condition != Some(line.condition) {
            if condition.is_some() {
                body += "</tbody>\n";
            }
            condition = Some(line.condition);
            let label = match line.condition.attack {
                None => "Untouched pictures".into(),
                Some(_) => escape(&line.condition.label()),
            };
            body += &format!(
                "<tbody>\n<tr><th class=\"task\" colspan=\"{columns}\" scope=\"rowgroup\"><span>{label}</span></th></tr>\n"
            );
        }
        let (threat, surrogate) = threat(line.setting);
        let threat = if line.setting.is_some() { format!(" {threat}") } else { String::new() };
        body += "<tr>";
        if overview.has_models {
            body += &format!("<td>{}</td>", escape(line.model));
        }
        body += &format!(
            "<th scope=\"row\">{}{threat}</th><td>{surrogate}</td><td>{}</td>",
            escape(undefended_or(line.defense)),
            line.setting.map_or(DASH, Setting::holds),
        );
        for cell in &line.cells {
            let values: Vec<String> = match cell.as_slice() {
                [] => vec![DASH.into()],
                [(run, value)] => vec![format!("{value:.1}{}", mark(*run))],
                several => several
                    .iter()
                    .map(|(run, value)| {
                        format!("{value:.1}{} <span class=\"soft\">run {}</span>", mark(*run), run + 1)
                    })
                    .collect(),
            };
            body += &format!("<td{number}>{}</td>", values.join("<br>"));
        }
        let unfinished = if line.runs().any(|run| !report.runs[run].is_complete()) { "*" } else { "" };
        let average = line.average().map_or(DASH.into(), |average| format!("{average:.1}{unfinished}"));
        body += &format!("<td{number}>{average}</td></tr>\n");
    }
    if condition.is_some() {
        body += "</tbody>\n";
    }
    let stars = stars(report, overview.lines.iter().flat_map(|line| line.runs()));
    let (id, name) = (escape(overview.task).replace(' ', "-"), task(overview.task));
    format!(
        "<section aria-labelledby=\"all-{id}\">\n<h2 id=\"all-{id}\">{name}: all data sets</h2>\n\
         <div class=\"scroll figures\" role=\"region\" aria-label=\"{name}, all data sets\" tabindex=\"0\">\n<table>\n\
         <caption>In percent. The average gives each data set the same weight, and is there only where each has one \
         figure; the intervals stand in the tables above.{stars}</caption>\n\
         <thead><tr>{head}</tr></thead>\n{body}</table>\n</div>\n</section>\n"
    )
}

fn explanation(attacks: &[&str]) -> String {
    let known: String = attacks
        .iter()
        .filter_map(|name| KNOWN.iter().find(|(known, _)| known == name))
        .map(|(name, words)| format!("<li><b>{name}</b>: {words}.</li>\n"))
        .collect();
    let known =
        if known.is_empty() { String::new() } else { format!("<h3>The attacks</h3>\n<ul>\n{known}</ul>\n") };
    format!(
        "<section class=\"prose\" aria-labelledby=\"what\">\n<h2 id=\"what\">What the words mean</h2>\n\
         <p>Models that look at pictures can be misled on purpose: someone nudges all pixels a little at once, \
         each in just the direction that hurts. To a person the picture is still the same.</p>\n\
         <h3>eps</h3>\n\
         <p>The most that the red, green or blue of any pixel may change, where 1/255 is one of the 255 steps between dark \
         and bright. At eps 0 nobody attacks: that is where the plots begin.</p>\n\
         <h3>The thin upright lines</h3>\n\
         <p>The 95 % interval (Wilson’s) of each figure. It says how far the share may lie from the \
         true one because only n items were scored; it does not say how far a better attack would get. Robust \
         accuracy is what these attacks left standing, so it is an upper bound.</p>\n\
         {threats}<p>An undefended model has no defence to know of, so for a model that is its own surrogate both are the same \
         attack.</p>\n\
         <h3>The defences</h3>\n{DEFENSE}{known}</section>\n",
        threats = two_threats(),
    )
}

fn making(report: &Report) -> String {
    let list = |facts: &mut dyn Iterator<Item = (String, String)>, class: &str| {
        let facts: String = facts
            .map(|(name, value)| format!("<dt>{}</dt><dd>{}</dd>\n", escape(&name), escape(&value)))
            .collect();
        format!("<dl class=\"facts{class}\">\n{facts}</dl>\n")
    };
    let runs: String = (1..)
        .zip(&report.runs)
        .map(|(number, run)| {
            let facts = run.facts().into_iter().map(|(name, value)| {
                let name = if name == "n" { "Items scored".into() } else { capitalised(name) };
                (name, value)
            });
            format!(
                "<h3>Run {number}: <code>{path}</code></h3>\n{facts}\
                 <details>\n<summary>Everything that decides the result of run {number}</summary>\n{settings}</details>\n",
                path = escape(&run.path.display().to_string()),
                facts = list(&mut facts.into_iter(), ""),
                settings = list(&mut run.settings().into_iter(), " settings"),
            )
        })
        .collect();
    let analyses: String = report
        .analyses
        .iter()
        .map(|analysis| {
            let facts = analysis.facts.iter().map(|(name, value)| (capitalised(name), value.clone()));
            format!(
                "<h3>Analysis: <code>{}</code></h3>\n{}",
                escape(&analysis.path.display().to_string()),
                list(&mut facts.into_iter(), "")
            )
        })
        .collect();
    format!(
        "<section class=\"runs\" aria-labelledby=\"made\">\n<h2 id=\"made\">How it was made</h2>\n{runs}{analyses}</section>\n"
    )
}

/// A task as a heading, as HTML.
fn task(task: &str) -> String {
    match task {
        "zero-shot" => "Zero-shot classification".into(),
        "caption" => "Captions".into(),
        "vqa" => "Questions about pictures".into(),
        other => escape(other),
    }
}

/// `a`, `a and b`, `a, b and c`.
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}
