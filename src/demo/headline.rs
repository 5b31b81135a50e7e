//! What happened in a run, in words.

use super::report::{Report, Row};
use crate::attack::{Eps, Threat, ThreatKind};
use crate::page::shorten;

/// The rows the headline is about: one task, its fullest defence, the strongest attacks on it.
pub(super) struct Lead<'a> {
    clean: Option<&'a Row>,
    clean_defended: Option<&'a Row>,
    attacked: Option<&'a Row>,
    transfer: Option<&'a Row>,
    adaptive: Option<&'a Row>,
}

impl<'a> Lead<'a> {
    pub(super) fn of(report: &'a Report) -> Self {
        let measured = || report.rows.iter().filter(|row| row.n > 0);
        let tasks = ["caption", "vqa", "zero-shot"];
        let has = |task: &&&str, attacked: bool| {
            measured().any(|row| row.task == **task && (row.attack.is_some() || !attacked))
        };
        let task = tasks.iter().find(|t| has(t, true)).or_else(|| tasks.iter().find(|t| has(t, false)));
        let of_task = || measured().filter(|row| Some(&row.task) == task);
        // The first of those with the most parts.
        let defense = of_task().map(|row| row.defense.as_str()).filter(|d| *d != "none").fold(
            None,
            |best: Option<&str>, d| {
                let parts = |d: &str| d.split('+').count();
                if best.is_none_or(|best| parts(d) > parts(best)) { Some(d) } else { best }
            },
        );
        let clean = |defense: &str| of_task().find(|row| row.defense == defense && row.attack.is_none());
        // Of several attacks the one that leaves the least, at the report's eps where there is one.
        let attacked = |defense: &str, kind: ThreatKind| {
            of_task()
                .filter(|row| row.defense == defense && row.threat.as_ref().map(Threat::kind) == Some(kind))
                .min_by(|a, b| {
                    let key = |row: &Row| (row.eps.as_ref() != Some(&report.eps), share(row));
                    key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal)
                })
        };
        let defended = |kind| defense.and_then(|defense| attacked(defense, kind));
        Self {
            clean: clean("none"),
            clean_defended: defense.and_then(clean),
            // On the undefended model both threat models are one and the same.
            attacked: attacked("none", ThreatKind::Transfer)
                .or_else(|| attacked("none", ThreatKind::Adaptive)),
            transfer: defended(ThreatKind::Transfer),
            adaptive: defended(ThreatKind::Adaptive),
        }
    }

    /// What to call the defended model.
    pub(super) fn defended_name(&self, report: &Report) -> String {
        let row = [self.clean_defended, self.transfer, self.adaptive].into_iter().flatten().next();
        let defense = row.map_or(report.defense.as_str(), |row| &row.defense);
        let has = |part: &str| defense.to_lowercase().contains(part);
        if has("gif") && has("fra") { "R-Adapt".into() } else { shorten(defense, 40) }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &'a Row> {
        [self.clean, self.clean_defended, self.attacked, self.transfer, self.adaptive].into_iter().flatten()
    }

    /// What happened, in one sentence.
    pub(super) fn headline(&self, eps: &str, defended: &str) -> String {
        let Some(first) = self.rows().next() else {
            return "Nothing was measured in this run.".into();
        };
        // Without "of n" where n is that of the first figure.
        let short = |row: &Row| if row.n == first.n { row.correct.to_string() } else { of(row) };
        let asks = first.task == "vqa";
        let verb = if asks { "answers" } else { "names" };
        // "names 2 of 24 pictures correctly"
        let names = |row: &Row| format!("{verb} {} {} correctly", of(row), things(row));
        let mut out = match (self.clean, self.attacked) {
            (Some(clean), Some(hit)) if share(hit) < share(clean) => format!(
                "{} takes the undefended model from {} {} down to {}",
                change_words(eps),
                of(clean),
                if asks { "questions answered correctly" } else { "pictures named correctly" },
                short(hit),
            ),
            (Some(clean), Some(hit)) => format!(
                "The attack does not mislead the undefended model: it {} without it, and {} under it",
                names(clean),
                short(hit),
            ),
            (None, Some(hit)) => format!("under attack, the undefended model {}", names(hit)),
            (Some(clean), None) => format!("without any attack, the undefended model {}", names(clean)),
            (None, None) => String::new(),
        };
        let mut add = |link: &str, text: String| {
            out.push_str(if out.is_empty() { "" } else { link });
            out.push_str(&text);
        };
        let mut helps = false;
        match (self.attacked, self.transfer) {
            (Some(hit), Some(row)) if share(row) > share(hit) => {
                helps = true;
                add("; ", format!("with {defended} it still {verb} {}", short(row)));
            }
            (Some(hit), Some(row)) if share(row) < share(hit) => {
                add("; ", format!("with {defended} it {verb} even fewer: {}", short(row)));
            }
            (Some(_), Some(row)) => add("; ", format!("with {defended} it is {} as well", short(row))),
            (None, Some(row)) => {
                add("; ", format!("under attack, the model with {defended} {}", names(row)));
            }
            (None, None) if self.adaptive.is_none() => {
                if let Some(row) = self.clean_defended {
                    add("; ", format!("with {defended} it {}", names(row)));
                }
            }
            _ => {}
        }
        match (self.transfer, self.adaptive) {
            (Some(unaware), Some(row)) if helps && 2.0 * share(row) <= share(unaware) => {
                add(" — ", format!("unless the attacker knows of the defence: then {}", short(row)));
            }
            (Some(unaware), Some(row)) => {
                let even = if share(row) < share(unaware) { "" } else { "even " };
                add(", and ", format!("{} {even}where the attacker knows of the defence", short(row)));
            }
            (None, Some(row)) => {
                let model = format!("the model with {defended} {}", names(row));
                add("; ", format!("where the attacker knows of the defence, {model}"));
            }
            _ => {}
        }
        let mut chars = out.chars();
        let initial = chars.next().map(|c| c.to_uppercase().collect::<String>()).unwrap_or_default();
        format!("{initial}{}.", chars.as_str())
    }

    /// What is to be said about the headline, a sentence each.
    pub(super) fn notes(&self, defended: &str) -> Vec<String> {
        let mut notes = Vec::new();
        if let (Some(clean), Some(row)) = (self.clean, self.clean_defended) {
            let cost = if share(row) < share(clean) {
                "that is what the defence costs where nobody attacks"
            } else {
                "here the defence costs nothing where nobody attacks"
            };
            notes.push(format!(
                "On untouched pictures the undefended model is right in {}, with {defended} in {}: {cost}.",
                of(clean),
                of(row),
            ));
        }
        if let Some(row) = self.attacked {
            let what = if row.task == "vqa" { "answers about attacked" } else { "attacked" };
            notes.push(format!(
                "In {} of {} {what} pictures, the undefended model names the very thing the attacker wants it to \
                 see; where else it is wrong, it names another or none.",
                row.target, row.n,
            ));
        }
        for (row, whom) in
            [(self.transfer, "who does not know of the defence"), (self.adaptive, "who knows of the defence")]
        {
            if let (Some(hit), Some(row)) = (self.attacked, row)
                && share(hit) != share(row)
                && hit.low <= row.high
                && row.low <= hit.high
            {
                notes.push(format!(
                    "Against an attacker {whom}, the difference between {} (undefended) and {} ({defended}) \
                     could be chance: the 95 % intervals overlap.",
                    of(hit),
                    of(row),
                ));
            }
        }
        if let Some(row) = self.rows().max_by_key(|row| row.n).filter(|row| row.n < 200) {
            notes.push(format!(
                "{} {} are a demonstration, not a benchmark; mind the intervals.",
                row.n,
                things(row),
            ));
        }
        notes
    }
}

/// The figure as `15 of 24`.
fn of(row: &Row) -> String {
    format!("{} of {}", row.correct, row.n)
}

/// What a figure of this row counts.
pub(super) fn things(row: &Row) -> &'static str {
    if row.task == "vqa" { "questions" } else { "pictures" }
}

/// The change by its size, as honest as a few words can be.
fn change_words(eps: &str) -> &'static str {
    match eps.parse::<Eps>().map(Eps::steps) {
        Ok(0..=4) => "A change nobody can see",
        Ok(5..=8) => "A change that is hard to see",
        Ok(9..=16) => "A faint change of the pixels",
        _ => "A change of the pixels",
    }
}

pub(super) fn share(row: &Row) -> f64 {
    row.correct as f64 / row.n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::page::page;
    use super::super::sample::{report, row, rows};
    use super::*;

    fn headline(counts: [usize; 5]) -> String {
        let report = report(rows("caption", counts, 24));
        Lead::of(&report).headline(&report.eps, "R-Adapt")
    }

    #[test]
    fn the_headline_tells_what_the_rows_say() {
        assert_eq!(
            headline([23, 21, 2, 15, 2]),
            "A faint change of the pixels takes the undefended model from 23 of 24 pictures named correctly down \
             to 2; with R-Adapt it still names 15 — unless the attacker knows of the defence: then 2."
        );
        assert_eq!(
            headline([24, 24, 2, 15, 14]),
            "A faint change of the pixels takes the undefended model from 24 of 24 pictures named correctly down \
             to 2; with R-Adapt it still names 15, and 14 where the attacker knows of the defence."
        );
        assert!(
            headline([24, 24, 2, 15, 16]).ends_with("and 16 even where the attacker knows of the defence.")
        );
        assert!(headline([24, 20, 6, 6, 3]).contains("with R-Adapt it is 6 as well, and 3 where"));
        assert!(headline([24, 20, 6, 1, 0]).contains("with R-Adapt it names even fewer: 1, and 0 where"));
        assert_eq!(
            headline([20, 24, 20, 22, 21]),
            "The attack does not mislead the undefended model: it names 20 of 24 pictures correctly without it, \
             and 20 under it; with R-Adapt it still names 22, and 21 where the attacker knows of the \
             defence."
        );
    }

    #[test]
    fn the_headline_makes_do_with_the_rows_there_are() {
        let all = rows("vqa", [23, 21, 2, 15, 4], 24);
        for left in 0..32_u32 {
            let kept: Vec<Row> = (0..5).filter(|i| left >> i & 1 == 1).map(|i| all[i].clone()).collect();
            let counts: Vec<_> = kept.iter().map(|row| row.correct.to_string()).collect();
            let report = report(kept);
            let text = Lead::of(&report).headline(&report.eps, "R-Adapt");
            assert!(text.ends_with('.') && !text.contains(";;") && !text.contains("  "), "{text}");
            assert!(text.chars().next().is_some_and(char::is_uppercase), "{text}");
            println!("{left:05b} {text}");
            if left & 0b11100 == 0b11100 {
                assert!(counts[counts.len() - 3..].iter().all(|count| text.contains(count)), "{text}");
            }
            page(&report);
        }
    }

    #[test]
    fn the_headline_is_about_captions_and_the_strongest_attack_at_the_eps() {
        let mut all = rows("zero-shot", [9, 9, 9, 9, 9], 10);
        all.extend(rows("caption", [23, 21, 2, 15, 6], 24));
        let mut stronger = row("caption", "gif+fra", Some(ThreatKind::Adaptive), 5, 9, 24);
        stronger.attack = Some("apgd".into());
        let mut wider = row("caption", "gif+fra", Some(ThreatKind::Adaptive), 0, 24, 24);
        wider.eps = Some("32/255".into());
        let part = row("caption", "gif", Some(ThreatKind::Transfer), 1, 20, 24);
        all.extend([stronger, wider, part]);
        let report = report(all);
        let text = Lead::of(&report).headline(&report.eps, "R-Adapt");
        assert!(
            text.contains("from 23 of 24") && text.contains("still names 15") && text.ends_with("then 5.")
        );
        // The page's headline is that one.
        assert!(page(&report).contains(&format!(
            "<h1>{}</h1>",
            text.replace("R-Adapt", "<span class=\"nowrap\">R-Adapt</span>")
        )));
    }

    #[test]
    fn differences_that_could_be_chance_are_called_so() {
        let notes = |counts| Lead::of(&report(rows("caption", counts, 24))).notes("R-Adapt").join("\n");
        assert!(!notes([24, 24, 2, 15, 2]).contains("chance"));
        assert!(
            notes([24, 24, 2, 15, 5]).contains("who knows of the defence, the difference between 2 of 24")
        );
        assert!(notes([24, 24, 2, 4, 2]).contains("who does not know of the defence, the difference"));
    }
}
