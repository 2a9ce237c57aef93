//! Durations and sizes as people write them.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::{Span, SpanRelativeTo};

/// A length of time: `500ms`, `1m 30s`, `7d`, `2 weeks`, `PT1H`. A day has 24 hours and a week seven
/// days; months and years have no fixed length and are refused.
///
/// # Errors
/// What was expected, to be put behind the setting's name.
pub fn duration(text: &str) -> Result<Duration, String> {
    const EXPECTED: &str = "expected a length of time such as '500ms', '90s', '1h 30m' or '7d'";
    let span: Span = text.trim().parse().map_err(|_error: jiff::Error| EXPECTED.to_owned())?;
    if span.get_months() != 0 || span.get_years() != 0 {
        return Err("months and years have no fixed length; write days, as in '30d'".to_owned());
    }
    let length = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_error: jiff::Error| EXPECTED.to_owned())?;
    Duration::try_from(length)
        .map_err(|_error: jiff::Error| "expected a length of time that is not negative".to_owned())
}

/// A number of bytes: `64 MiB` (powers of 1024), `64 MB` (powers of 1000), `4096`.
///
/// # Errors
/// What was expected, to be put behind the setting's name.
pub fn size_bytes(text: &str) -> Result<u64, String> {
    text.trim()
        .parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_error: String| "expected a size such as '64 MiB', '1.5 GB' or '4096'".to_owned())
}

/// `true` or `false`, also as PostgreSQL and systemd spell them.
///
/// # Errors
/// What was expected, to be put behind the setting's name.
pub fn switch(text: &str) -> Result<bool, String> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Ok(true),
        "false" | "off" | "no" | "0" => Ok(false),
        _ => Err("expected 'true' or 'false'".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in
            [("90s", 90.0), ("1h 30m", 5400.0), ("7d", 604_800.0), ("2 weeks", 1_209_600.0)]
        {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("PT1H"), Ok(Duration::from_secs(3600)));
    }

    #[test]
    fn lengths_that_are_not_fixed_or_not_positive_are_refused() {
        assert!(duration("1 month").unwrap_err().contains("days"));
        assert!(duration("-5s").unwrap_err().contains("negative"));
        assert!(duration("10 parsecs").unwrap_err().contains("expected"));
        assert!(duration("").is_err());
    }

    #[test]
    fn sizes_know_both_families_of_units() {
        assert_eq!(size_bytes("64 MiB"), Ok(64 << 20));
        assert_eq!(size_bytes("64MB"), Ok(64_000_000));
        assert_eq!(size_bytes("4096"), Ok(4096));
        assert!(size_bytes("many").is_err());
    }

    #[test]
    fn switches_take_the_usual_words() {
        assert_eq!(switch("On"), Ok(true));
        assert_eq!(switch("0"), Ok(false));
        assert!(switch("maybe").is_err());
    }
}
