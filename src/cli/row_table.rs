//! Figures as a table on a terminal.

use radapt::eval::Row;

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
