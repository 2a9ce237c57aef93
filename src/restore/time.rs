//! Moments as people write them, read without ever guessing.
//!
//! In: text, the time now, and perhaps the zone to read zone-less times in. Out: one instant, or an
//! error that says how to write what was meant. Whatever could name two instants is refused: a time
//! without a zone (unless one was given), a local time that happens twice when clocks go back or not
//! at all when they go forward, an abbreviation such as `CST`, a date with its day and month in doubt.
//!
//! Accepted: RFC 3339 and RFC 9557; what PostgreSQL prints for a `timestamptz`
//! (`2026-11-22 10:00:00.123456+01`); date with or without a time (a date alone is its first moment);
//! `10:00` for today; a zone as `Z`, `UTC`, `+01`, `+0530`, `-03:30`, `Europe/Berlin`, with or without
//! a space or brackets; `now`, `today 09:00`, `yesterday 18:00 Europe/Berlin`; `10 minutes ago`,
//! `1h30m ago`, `-PT2H`; `@1763800000` and `@1763800000.25` (Unix seconds).

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Span, Timestamp, ToSpan};

use crate::error::{Error, Kind, Result};

/// Longest text looked at; PostgreSQL's own limit for a timestamp is 128 bytes (`MAXDATELEN`).
const TEXT_BYTES_MAX: usize = 128;

/// What a text is read against.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The time now: relative times count from it, and nothing after it is accepted.
    pub now: Timestamp,
    /// The zone of times written without one; `None` refuses them.
    pub zone: Option<TimeZone>,
}

/// Reads `text` as one instant that is not after `reading.now`.
///
/// # Errors
/// `usage` when the text is no time, names no zone, names two instants or none, or lies in the future.
pub fn parse(text: &str, reading: &Reading) -> Result<Timestamp> {
    let trimmed = text.trim();
    let refuse =
        |why: String| Error::new(Kind::Usage, format!("unable to read '{text}' as a time: {why}"));
    if trimmed.is_empty() || trimmed.len() > TEXT_BYTES_MAX || !trimmed.is_ascii() {
        return Err(refuse("it is empty, too long, or not plain ASCII".into()).hint(FORMS));
    }
    let instant = parse_any(trimmed, reading).map_err(|Refusal { why, hint }| {
        let error = refuse(why);
        match hint {
            Some(hint) => error.hint(hint),
            None => error.hint(FORMS),
        }
    })?;
    if instant > reading.now {
        return Err(refuse(format!("it is in the future ({instant}; now is {:.0})", reading.now))
            .hint("A cluster can only be restored to a moment that has passed."));
    }
    Ok(instant)
}

/// Reads `text` as a time zone: an IANA name, an offset, `UTC`, or `local` for this machine's zone.
///
/// # Errors
/// `usage` when it is none of these.
pub fn parse_zone(text: &str) -> Result<TimeZone> {
    if text.trim().eq_ignore_ascii_case("local") {
        return Ok(TimeZone::system());
    }
    zone_named(text.trim()).ok_or_else(|| {
        Error::new(Kind::Usage, format!("unable to read '{text}' as a time zone"))
            .hint("Write an IANA name like Europe/Berlin, an offset like +01:00, UTC, or local.")
    })
}

/// `instant` as people check it: UTC first, then the local time of `zone` unless that is UTC too.
#[must_use]
pub fn show(instant: Timestamp, zone: &TimeZone) -> String {
    let utc = instant.strftime("%Y-%m-%d %H:%M:%S%.f UTC").to_string();
    if zone.to_offset(instant) == Offset::UTC {
        return utc;
    }
    let local = instant.to_zoned(zone.clone());
    let name = zone.iana_name().map(|name| format!(" {name}")).unwrap_or_default();
    format!("{utc} ({}{name})", local.strftime("%Y-%m-%d %H:%M:%S%.f %:z"))
}

const FORMS: &str = "Write it like '2026-11-22 10:00:00+01', '2026-11-22 10:00 Europe/Berlin', \
                     '10 minutes ago', 'yesterday 18:00 UTC' or '@1763800000'.";

/// Why a text is not one instant, and what to do when that differs from [`FORMS`].
struct Refusal {
    why: String,
    hint: Option<String>,
}

impl Refusal {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

fn parse_any(text: &str, reading: &Reading) -> Result<Timestamp, Refusal> {
    if let Some(seconds) = text.strip_prefix('@') {
        return parse_epoch(seconds);
    }
    if text.eq_ignore_ascii_case("now") {
        return Ok(reading.now);
    }
    if let Some(span) = parse_relative(text) {
        return before_now(span, reading);
    }
    let (local_text, zone) = split_zone(text)?;
    let zone = match (zone, &reading.zone) {
        (Some(Written { zone, offset: Some(offset) }), _) => {
            let (local, _) = parse_local(local_text, reading, &zone)?;
            return at_offset(local, &zone, offset);
        }
        (Some(Written { zone, offset: None }), _) => zone,
        (None, Some(zone)) => zone.clone(),
        (None, None) => {
            // Say what is wrong with the text itself first, if anything is.
            parse_local(local_text, reading, &TimeZone::UTC)?;
            return Err(Refusal::new("it does not say in which time zone").hint(
                "Add a zone, like '+01', 'UTC' or 'Europe/Berlin', or give one with --time-zone.",
            ));
        }
    };
    let (local, day_only) = parse_local(local_text, reading, &zone)?;
    if day_only {
        // The first moment of a day exists even where midnight does not.
        return zone
            .to_zoned(local)
            .and_then(|zoned| zoned.start_of_day())
            .map(|zoned| zoned.timestamp())
            .map_err(|error| Refusal::new(error.to_string()));
    }
    resolve(local, &zone)
}

fn parse_epoch(text: &str) -> Result<Timestamp, Refusal> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let (negative, digits) = match whole.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, whole),
    };
    let is_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let read = || {
        let well_formed =
            !digits.is_empty() && is_digits(digits) && is_digits(fraction) && fraction.len() <= 9;
        let seconds: i64 = well_formed.then(|| digits.parse().ok()).flatten()?;
        let nanos: i32 = format!("{fraction:0<9}").parse().ok()?;
        let (seconds, nanos) = if negative { (-seconds, -nanos) } else { (seconds, nanos) };
        Timestamp::new(seconds, nanos).ok()
    };
    read().ok_or_else(|| {
        Refusal::new("after '@' a number of seconds since 1970-01-01 UTC is expected")
    })
}

/// A distance into the past, or `None` when the text is not one.
fn parse_relative(text: &str) -> Option<Span> {
    let lower = text.to_ascii_lowercase();
    let lower = match lower.split_once(' ') {
        Some(("a" | "an" | "one", rest)) => format!("1 {rest}"),
        _ => lower,
    };
    lower.parse::<Span>().ok()
}

/// The instant `span` (negative: into the past) from now. Days and longer are counted on the calendar
/// of the zone given, else a day is 24 hours.
fn before_now(span: Span, reading: &Reading) -> Result<Timestamp, Refusal> {
    if span.is_positive() {
        return Err(Refusal::new("it lies in the future").hint("Add 'ago' for a time before now."));
    }
    let zone = reading.zone.clone().unwrap_or(TimeZone::UTC);
    let zoned = reading.now.to_zoned(zone).checked_add(span);
    zoned.map(|zoned| zoned.timestamp()).map_err(|error| Refusal::new(error.to_string()))
}

/// A zone as it was written; with an offset next to a zone's name the two must agree.
struct Written {
    zone: TimeZone,
    offset: Option<Offset>,
}

/// Parts a zone at the end of the text from the local time before it.
fn split_zone(text: &str) -> Result<(&str, Option<Written>), Refusal> {
    if let Some((before, name)) = text.strip_suffix(']').and_then(|text| text.split_once('[')) {
        let zone = zone_named(name).ok_or_else(|| unknown_zone(name))?;
        let (local, offset) = split_attached(before.trim_end());
        return Ok((local, Some(Written { zone, offset })));
    }
    if let Some((before, last)) = text.rsplit_once(char::is_whitespace) {
        let before = before.trim_end();
        if let Some(zone) = zone_named(last) {
            let (local, offset) = split_attached(before);
            return Ok((local, Some(Written { zone, offset })));
        }
        let looks_like_name = last.starts_with(|first: char| first.is_ascii_alphabetic())
            && !matches!(last.to_ascii_lowercase().as_str(), "today" | "yesterday" | "ago");
        if looks_like_name {
            return Err(unknown_zone(last));
        }
    }
    let (local, offset) = split_attached(text);
    Ok((local, offset.map(|offset| Written { zone: TimeZone::fixed(offset), offset: None })))
}

/// Parts `Z` or an offset written right behind a time of day from what is before it.
fn split_attached(text: &str) -> (&str, Option<Offset>) {
    if let Some(local) = text.strip_suffix(['Z', 'z'])
        && local.ends_with(|last: char| last.is_ascii_digit())
    {
        return (local, Some(Offset::UTC));
    }
    // An offset follows a time of day, and only a time has a colon: a sign after the first colon, or
    // after 'T10', is not a date's dash.
    let time_start = text.find(['T', 't', ' ']).map_or(0, |at| at + 1);
    let sign = text.char_indices().skip(time_start).find(|(_, c)| matches!(c, '+' | '-'));
    let split = sign.and_then(|(at, _)| text.split_at_checked(at));
    match split.and_then(|(local, sign)| Some((local, parse_offset(sign)?))) {
        Some((local, offset)) if time_start > 0 || local.contains(':') => {
            (local.trim_end(), Some(offset))
        }
        _ => (text, None),
    }
}

fn unknown_zone(name: &str) -> Refusal {
    Refusal::new(format!("'{name}' is not a time zone that means one offset everywhere")).hint(
        "Write the zone as an offset like +01, as UTC, or by its IANA name like Europe/Berlin.",
    )
}

/// The zone that `name` means, or `None`. Abbreviations are not taken: `IST` and `CST` are several
/// zones each, and `CET` does not say whether summer time was meant.
fn zone_named(name: &str) -> Option<TimeZone> {
    if name.eq_ignore_ascii_case("z")
        || name.eq_ignore_ascii_case("utc")
        || name.eq_ignore_ascii_case("gmt")
    {
        return Some(TimeZone::UTC);
    }
    if name.starts_with(['+', '-']) {
        return parse_offset(name).map(TimeZone::fixed);
    }
    name.contains('/').then(|| TimeZone::get(name).ok()).flatten()
}

/// `+01`, `+0130`, `+01:30`, `+01:30:15`; up to PostgreSQL's 15:59:59 (`MAX_TZDISP_HOUR`).
fn parse_offset(text: &str) -> Option<Offset> {
    let negative = match text.as_bytes().first()? {
        b'+' => false,
        b'-' => true,
        _ => return None,
    };
    let rest = text.get(1..)?;
    let parts: Vec<&str> = if rest.contains(':') {
        rest.split(':').collect()
    } else {
        match rest.len() {
            1 | 2 => vec![rest],
            4 => vec![rest.get(..2)?, rest.get(2..)?],
            _ => return None,
        }
    };
    let mut seconds = 0;
    for (index, part) in parts.iter().enumerate() {
        let well_formed = part.bytes().all(|byte| byte.is_ascii_digit())
            && (part.len() == 2 || index == 0 && part.len() == 1);
        let number: i32 = well_formed.then(|| part.parse().ok()).flatten()?;
        let (limit, unit) = *[(15, 3600), (59, 60), (59, 1)].get(index)?;
        if number > limit {
            return None;
        }
        seconds += number * unit;
    }
    Offset::from_seconds(if negative { -seconds } else { seconds }).ok()
}

/// A local time, and whether only a day was given.
fn parse_local(
    text: &str,
    reading: &Reading,
    zone: &TimeZone,
) -> Result<(DateTime, bool), Refusal> {
    let today = reading.now.to_zoned(zone.clone()).date();
    let lower = text.to_ascii_lowercase();
    for (word, back) in [("today", 0.days()), ("yesterday", 1.day())] {
        if let Some(rest) = lower.strip_prefix(word) {
            let date = today.checked_sub(back).map_err(|error| Refusal::new(error.to_string()))?;
            let rest = rest.trim_start();
            let rest = rest.strip_prefix("at ").unwrap_or(rest);
            return match rest {
                "" => Ok((date.to_datetime(Time::midnight()), true)),
                time => Ok((date.to_datetime(parse_time(time)?), false)),
            };
        }
    }
    if text.contains(':') && !text.contains(['-', '/', '.', ' ', 'T', 't']) {
        return Ok((today.to_datetime(parse_time(text)?), false));
    }
    let (date, time) = match text.split_once(['T', 't', ' ']) {
        Some((date, time)) => (date, Some(time.trim_start())),
        None => (text, None),
    };
    let date = parse_date(date)?;
    match time {
        Some(time) => Ok((date.to_datetime(parse_time(time)?), false)),
        None => Ok((date.to_datetime(Time::midnight()), true)),
    }
}

fn parse_date(text: &str) -> Result<Date, Refusal> {
    let fields: Vec<&str> = text.split('-').collect();
    let read = || match fields.as_slice() {
        [year, month, day] if year.len() == 4 => {
            let number = |part: &str| {
                let well_formed = part.bytes().all(|byte| byte.is_ascii_digit());
                well_formed.then(|| part.parse::<i16>().ok()).flatten()
            };
            let small = |part: &str| number(part).and_then(|number| i8::try_from(number).ok());
            Date::new(number(year)?, small(month)?, small(day)?).ok()
        }
        _ => None,
    };
    read().ok_or_else(|| Refusal::new(format!("'{text}' is not a date (year-month-day)")))
}

/// `10`, `10:00`, `10:00:00` or `10:00:00.123456`.
fn parse_time(text: &str) -> Result<Time, Refusal> {
    let read = || {
        let (clock, fraction) = text.split_once('.').unwrap_or((text, ""));
        let mut fields = [0_i8; 3];
        let parts: Vec<&str> = clock.split(':').collect();
        for (index, part) in parts.iter().enumerate() {
            let well_formed =
                (1..=2).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit());
            *fields.get_mut(index)? = well_formed.then(|| part.parse().ok()).flatten()?;
        }
        let fraction_ok = fraction.len() <= 9 && fraction.bytes().all(|byte| byte.is_ascii_digit());
        if !fraction_ok || (!fraction.is_empty() && parts.len() < 3) {
            return None;
        }
        let nanos: i32 = format!("{fraction:0<9}").parse().ok()?;
        let [hour, minute, second] = fields;
        Time::new(hour, minute, second, nanos).ok()
    };
    read()
        .ok_or_else(|| Refusal::new(format!("'{text}' is not a time of day (hour:minute:second)")))
}

/// The one instant at which clocks of `zone` show `local`.
fn resolve(local: DateTime, zone: &TimeZone) -> Result<Timestamp, Refusal> {
    let at = |offset: Offset| {
        offset.to_timestamp(local).map_err(|error| Refusal::new(error.to_string()))
    };
    match zone.to_ambiguous_timestamp(local).offset() {
        AmbiguousOffset::Unambiguous { offset } => at(offset),
        AmbiguousOffset::Fold { before, after } => {
            let (first, second) = (at(before)?, at(after)?);
            Err(Refusal::new(format!(
                "clocks showed it twice that day, at {first} and at {second}"
            ))
            .hint(format!("Write '{local}{before}' or '{local}{after}', whichever was meant.")))
        }
        AmbiguousOffset::Gap { before, after } => {
            let (late, early) = (at(before)?, at(after)?);
            Err(Refusal::new(format!(
                "clocks skipped it that day; with the offsets before and after the change it is {late} or {early}"
            ))
            .hint("Write a time with an offset, like '2026-03-29 03:30+02'."))
        }
    }
}

/// `local` at `offset`, which the named zone must have had then.
fn at_offset(local: DateTime, zone: &TimeZone, offset: Offset) -> Result<Timestamp, Refusal> {
    let instant = offset.to_timestamp(local).map_err(|error| Refusal::new(error.to_string()))?;
    let actual = zone.to_offset(instant);
    if actual != offset {
        return Err(Refusal::new(format!("that zone's offset then was {actual}, not {offset}"))
            .hint("Leave out either the offset or the zone's name."));
    }
    Ok(instant)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: &str = "2026-11-22T12:00:00Z";

    fn read(text: &str, zone: Option<&str>) -> Result<Timestamp> {
        let zone = zone.map(|name| parse_zone(name).unwrap());
        parse(text, &Reading { now: NOW.parse().unwrap(), zone })
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        let berlin = Some("Europe/Berlin");
        for (text, zone, expected) in [
            ("2026-11-22 10:00:00+01", None, "2026-11-22T09:00:00Z"),
            ("2026-11-22 10:00:00.123456+01", None, "2026-11-22T09:00:00.123456Z"),
            ("2026-11-22 10:00:00+0530", None, "2026-11-22T04:30:00Z"),
            ("2026-11-22 04:00:00-03:30", None, "2026-11-22T07:30:00Z"),
            ("2026-11-22 10:00:00 +01", None, "2026-11-22T09:00:00Z"),
            ("2026-11-22T10:00:00Z", None, "2026-11-22T10:00:00Z"),
            ("2026-11-22t10:00:00z", None, "2026-11-22T10:00:00Z"),
            ("2026-11-22T10+01", None, "2026-11-22T09:00:00Z"),
            ("2026-11-22 10:00:00 UTC", None, "2026-11-22T10:00:00Z"),
            ("2026-11-22 10:00 Europe/Berlin", None, "2026-11-22T09:00:00Z"),
            ("2026-07-22 10:00 Europe/Berlin", None, "2026-07-22T08:00:00Z"),
            ("2026-11-22T10:00:00[Europe/Paris]", None, "2026-11-22T09:00:00Z"),
            ("2026-11-22T10:00:00+01:00[Europe/Paris]", None, "2026-11-22T09:00:00Z"),
            ("  2026-11-22 10:00  ", berlin, "2026-11-22T09:00:00Z"),
            ("2026-11-22 10:00+00", berlin, "2026-11-22T10:00:00Z"),
            ("2026-11-22", berlin, "2026-11-21T23:00:00Z"),
            ("2026-11-22 UTC", None, "2026-11-22T00:00:00Z"),
            ("10:30", berlin, "2026-11-22T09:30:00Z"),
            ("10:30Z", None, "2026-11-22T10:30:00Z"),
            ("10:30+01", None, "2026-11-22T09:30:00Z"),
            ("yesterday 18:00", berlin, "2026-11-21T17:00:00Z"),
            ("yesterday 18:00 UTC", None, "2026-11-21T18:00:00Z"),
            ("Yesterday at 18:00 Europe/Berlin", None, "2026-11-21T17:00:00Z"),
            ("yesterday 18:00+01", None, "2026-11-21T17:00:00Z"),
            ("yesterday", berlin, "2026-11-20T23:00:00Z"),
            ("today 09:00:30 +01", None, "2026-11-22T08:00:30Z"),
            ("now", None, NOW),
            ("10 minutes ago", None, "2026-11-22T11:50:00Z"),
            ("an hour ago", None, "2026-11-22T11:00:00Z"),
            ("1h30m ago", None, "2026-11-22T10:30:00Z"),
            ("1 day ago", None, "2026-11-21T12:00:00Z"),
            ("1 month ago", berlin, "2026-10-22T11:00:00Z"),
            ("-PT2H", None, "2026-11-22T10:00:00Z"),
            ("@1763800000", None, "2025-11-22T08:26:40Z"),
            ("@1763800000.25", None, "2025-11-22T08:26:40.25Z"),
            ("2026-10-25 02:30:00+02", None, "2026-10-25T00:30:00Z"),
            ("2026-10-25T02:30:00+01:00[Europe/Berlin]", None, "2026-10-25T01:30:00Z"),
        ] {
            let got = read(text, zone).map(|time| time.to_string());
            assert_eq!(got.unwrap(), expected, "{text} {zone:?}");
        }
    }

    #[test]
    fn what_does_not_name_one_past_instant_is_refused() {
        let berlin = Some("Europe/Berlin");
        for (text, zone, because) in [
            ("", None, "empty"),
            ("2026-11-22 10:00", None, "time zone"),
            ("yesterday 18:00", None, "time zone"),
            ("2026-11-22", None, "time zone"),
            ("2026-10-25 02:30:00", berlin, "2026-10-25T00:30:00Z and at 2026-10-25T01:30:00Z"),
            ("2026-03-29 02:30:00", berlin, "skipped"),
            ("2026-11-22 10:00:00+02:00[Europe/Berlin]", None, "offset then was +01"),
            ("2026-11-22 13:00 UTC", None, "future"),
            ("13:00 UTC", None, "future"),
            ("10 minutes", None, "future"),
            ("PT2H", None, "future"),
            ("tomorrow", berlin, "not a date"),
            ("2026-11-22 10:00 CST", None, "'CST'"),
            ("2026-11-22 10:00 CET", None, "'CET'"),
            ("2026-11-22 10:00 Europe/Berlni", None, "'Europe/Berlni'"),
            ("22.11.2026 10:00 UTC", None, "not a date"),
            ("11/22/2026 10:00 UTC", None, "not a date"),
            ("26-11-22 10:00 UTC", None, "not a date"),
            ("2026-02-30 10:00 UTC", None, "not a date"),
            ("2026-11-22 25:00 UTC", None, "not a time"),
            ("2026-11-22 10:00:00+16", None, "not a time"),
            ("2026-11-22 10:00 PM UTC", None, "'10:00 PM'"),
            ("@", None, "seconds"),
            ("@12x", None, "seconds"),
            ("last tuesday", None, "'tuesday'"),
            ("dix heures", None, "'heures'"),
        ] {
            let error = read(text, zone).expect_err(text);
            assert_eq!(error.kind(), Kind::Usage, "{text}");
            assert!(error.message().contains(because), "{text}: {error}");
            assert!(error.hint_text().is_some(), "{text}");
        }
    }

    #[test]
    fn an_instant_is_shown_in_utc_and_in_local_time() {
        let zone = parse_zone("Europe/Berlin").unwrap();
        let time: Timestamp = "2026-11-22T09:00:00.5Z".parse().unwrap();
        let expected = "2026-11-22 09:00:00.5 UTC (2026-11-22 10:00:00.5 +01:00 Europe/Berlin)";
        assert_eq!(show(time, &zone), expected);
        assert_eq!(show(time, &TimeZone::UTC), "2026-11-22 09:00:00.5 UTC");
    }

    proptest::proptest! {
        #[test]
        fn every_instant_that_postgres_prints_is_read_back(
            micros in 0_i64..1_700_000_000_000_000, offset_minutes in -840_i32..=840,
        ) {
            let time = Timestamp::from_microsecond(micros).unwrap();
            let offset = Offset::from_seconds(offset_minutes * 60).unwrap();
            let local = offset.to_datetime(time);
            for text in [
                format!("{}{:+03}:{:02}", local.strftime("%Y-%m-%d %H:%M:%S%.f"),
                    offset_minutes / 60, (offset_minutes % 60).abs()),
                format!("@{}.{:06}", micros / 1_000_000, micros % 1_000_000),
                time.to_string(),
            ] {
                // Hours of an offset west of UTC by less than an hour lose their sign above.
                if offset_minutes < 0 && offset_minutes > -60 && text.contains("+00:") { continue; }
                proptest::prop_assert_eq!(read(&text, None).unwrap(), time, "{}", text);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            let _ = read(&text, Some("Europe/Berlin"));
        }

        #[test]
        fn nothing_near_a_time_makes_the_parser_panic(text in "[-+@ TZ:./0-9a-z\\[\\]]{0,30}") {
            let _ = read(&text, None);
        }
    }
}
