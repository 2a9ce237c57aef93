//! Numbers, lengths of time and tables as people read them.

use bytesize::ByteSize;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use jiff::{SignedDuration, Timestamp};

/// `1.5 GiB`.
pub(super) fn bytes(count: u64) -> String {
    ByteSize(count).display().iec().to_string()
}

/// `2026-11-22 10:00:00Z`: to the second, in UTC.
pub(super) fn time(instant: Timestamp) -> String {
    format!("{instant:.0}").replace('T', " ")
}

/// `1.2 s`, `3 min 20 s`, `5 h 12 min`, `3 d 4 h`: two units at most, enough to judge.
pub(super) fn length(length: SignedDuration) -> String {
    let length = length.max(SignedDuration::ZERO);
    let seconds = length.as_secs();
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{big} {big_unit}")
        } else {
            format!("{big} {big_unit} {small} {small_unit}")
        }
    };
    match seconds {
        0..10 => format!("{:.1} s", length.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => pair(seconds / 60, "min", seconds % 60, "s"),
        3600..86_400 => pair(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => pair(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

/// The time from `then` to `now`, never negative.
pub(super) fn age(then: Timestamp, now: Timestamp) -> String {
    length(now.duration_since(then))
}

/// `1 backup`, `2 backups`.
pub(super) fn count(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// Whether a column's cells are words or numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    /// Aligned left.
    Words(&'static str),
    /// Aligned right.
    Numbers(&'static str),
}

/// A table without lines; every row has as many cells as there are columns.
pub(super) fn table(columns: &[Column], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|column| match column {
        Column::Words(name) | Column::Numbers(name) => *name,
    }));
    table.add_rows(rows);
    for (shown, column) in table.column_iter_mut().zip(columns) {
        shown.set_padding((0, 2));
        if matches!(column, Column::Numbers(_)) {
            shown.set_cell_alignment(CellAlignment::Right);
        }
    }
    let lines = table.lines().map(|line| line.trim_end().to_owned());
    lines.fold(String::new(), |text, line| text + &line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_two_units_at_most() {
        for (millis, expected) in [
            (1_250, "1.2 s"),
            (59_900, "59 s"),
            (200_000, "3 min 20 s"),
            (3_600_000, "1 h"),
            (273_600_000, "3 d 4 h"),
            (-5, "0.0 s"),
        ] {
            assert_eq!(length(SignedDuration::from_millis(millis)), expected);
        }
    }

    #[test]
    fn tables_are_aligned_and_have_no_trailing_blanks() {
        let columns = [Column::Words("NAME"), Column::Numbers("SIZE")];
        let rows = vec![vec!["a".into(), "10 B".into()], vec!["long".into(), "1 B".into()]];
        assert_eq!(table(&columns, rows), "NAME  SIZE\na     10 B\nlong   1 B\n");
    }
}
