//! Figures as a table on a terminal.

use radapt::eval::Row;
use radapt::eval::questions::QuestionRow;

/// One line per figure, its threat model always among them.
pub fn row_table(rows: &[Row]) -> String {
    let attack = |row: &Row| row.attacked.as_ref().map_or("clean".to_string(), |a| a.attack.clone());
    let width = rows.iter().map(|row| attack(row).len()).max().unwrap_or(0).max(8);
    let name = rows.iter().map(|row| row.defense.len()).max().unwrap_or(0).max(9);
    let mut lines = vec![format!(
        "{:10} {:name$} {:width$} {:7} {:9} {:9} {:>5} {:>8} {:>16}",
        "task", "defence", "attack", "eps", "threat", "pictures", "n", "right", "95 % interval"
    )];
    for row in rows {
        let (low, high) = row.interval();
        let attacked = row.attacked.as_ref();
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        lines.push(format!(
            "{:10} {:name$} {:width$} {:7} {:9} {:9} {:5} {:6.1} % {:>16}",
            row.task,
            row.defense,
            attack(row),
            text(attacked.and_then(|a| a.eps).map(|eps| eps.to_string())),
            text(attacked.map(|a| a.threat.to_string())),
            text(attacked.map(|a| a.pictures.to_string())),
            row.n,
            row.value(),
            format!("{low:.1} to {high:.1} %"),
        ));
    }
    lines.join("\n")
}

/// The same of questions with known answers.
pub fn question_table(rows: &[QuestionRow]) -> String {
    let name = rows.iter().map(|row| row.defense.len()).max().unwrap_or(0).max(9);
    let mut text = vec![format!(
        "{:6} {:name$} {:8} {:7} {:9} {:>6} {:>9} {:>16}  {}",
        "task", "defence", "attack", "eps", "threat", "n", "accuracy", "95 % interval", "POPE"
    )];
    text.extend(rows.iter().map(|row| {
        let attacked = row.attacked.as_ref();
        let pope = row.pope.map(|p| format!("F1 {:.1}, yes {:.1} %, as answered", p.f1, p.yes_ratio));
        format!(
            "{:6} {:name$} {:8} {:7} {:9} {:>6} {:>7.1} % {:>16}  {}",
            row.task,
            row.defense,
            attacked.map_or("clean", |a| &a.attack),
            attacked.map_or("-".into(), |a| a.eps.to_string()),
            attacked.map_or("-".into(), |a| a.threat.to_string()),
            row.n,
            row.value,
            format!("{:.1} to {:.1} %", row.low, row.high),
            pope.unwrap_or_else(|| "-".into())
        )
    }));
    text.join("\n")
}
