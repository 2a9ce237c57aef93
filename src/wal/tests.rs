//! What the scanner and the reader promise, on crafted WAL.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

use proptest::prelude::*;

use super::craft::{CRAFTED_SYSTEM_ID, Craft};
use super::{CheckpointKind, CrcCheck, ImageCompression, Landmark, Record, RecordReader, Scanner};
use crate::error::{Kind, Result};
use crate::pg::data_dir::{Fork, Relation};
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, SystemId, TimelineId};

fn mib() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// A segment boundary, then some pages.
const START: Lsn = Lsn(5 << 20);

fn scan(start: Lsn, bytes: &[u8]) -> Result<(Vec<Landmark>, Scanner)> {
    scan_cut(start, bytes, &[usize::MAX])
}

/// Scans `bytes` cut into pieces of these sizes, over and over.
fn scan_cut(start: Lsn, bytes: &[u8], sizes: &[usize]) -> Result<(Vec<Landmark>, Scanner)> {
    let mut scanner = Scanner::new(mib(), start);
    let mut found = Vec::new();
    feed_cut(&mut scanner, bytes, sizes, &mut |landmark| found.push(landmark))?;
    Ok((found, scanner))
}

fn feed_cut(
    scanner: &mut Scanner,
    bytes: &[u8],
    sizes: &[usize],
    found: &mut dyn FnMut(Landmark),
) -> Result<()> {
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        let (now, later) = rest.split_at((*size).min(rest.len()));
        scanner.feed(now, found)?;
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    Ok(())
}

fn read(start: Lsn, bytes: &[u8], sizes: &[usize]) -> Result<Vec<String>> {
    let mut reader = RecordReader::new(mib(), start);
    let mut found = Vec::new();
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        let (now, later) = rest.split_at((*size).min(rest.len()));
        reader.feed(now, &mut |record| {
            found.push(format!("{record:?}"));
            Ok(())
        })?;
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn commit(xid: u32, time: i64, range: LsnRange) -> Landmark {
    Landmark::Commit { xid, time: PgTime(time), range }
}

#[test]
fn commits_are_found_whatever_they_cross() {
    for major in 13..=18 {
        let mut wal = Craft::new(major, mib(), START);
        let mut expected = Vec::new();
        for index in 0..400_u32 {
            wal.filler(index as usize * 37 % 9000);
            let time = i64::from(index) * 1000 - 7;
            expected.push(commit(index, time, wal.commit(index, PgTime(time))));
        }
        let (found, scanner) = scan(START, &wal.bytes).unwrap();
        assert_eq!(found, expected);
        assert_eq!(scanner.last_record_end(), wal.position());
        assert_eq!(scanner.major(), Some(major));
        assert_eq!(scanner.timeline(), Some(TimelineId::FIRST));
        assert!(scanner.at_record_boundary());
    }
}

#[test]
fn a_scan_may_begin_in_the_middle_of_a_record() {
    let mut wal = Craft::new(15, mib(), START);
    wal.filler(30_000);
    let range = wal.commit(9, PgTime(1));
    for page in 1..=3_usize {
        let start = Lsn(START.0 + page as u64 * 8192);
        let (found, scanner) = scan(start, &wal.bytes[page * 8192..]).unwrap();
        assert_eq!(found, [commit(9, 1, range)]);
        assert_eq!(scanner.last_record_end(), range.end());
    }
    let (found, scanner) = scan(Lsn(START.0 + 8192), &wal.bytes[8192..16_384]).unwrap();
    assert!(found.is_empty() && !scanner.at_record_boundary());
    assert_eq!(scanner.last_record_end(), Lsn(START.0 + 8192));
}

#[test]
fn the_end_of_the_last_whole_record_is_known_at_any_byte() {
    let mut wal = Craft::new(16, mib(), START);
    let ends: Vec<Lsn> = (0..6).map(|index| wal.filler(3000 + index).end()).collect();
    let mut scanner = Scanner::new(mib(), START);
    for byte in &wal.bytes {
        scanner.feed(std::slice::from_ref(byte), &mut |_| ()).unwrap();
        let position = scanner.position();
        let expected = ends.iter().copied().filter(|end| *end <= position).max().unwrap_or(START);
        // The padding behind a record belongs to it; in it, the end is as far as we are.
        let in_padding =
            ends.iter().any(|end| (1..8).contains(&(end.0 as i64 - position.0 as i64)))
                && scanner.at_record_boundary();
        assert_eq!(scanner.last_record_end(), if in_padding { position } else { expected });
        assert!(scanner.last_record_end() <= position);
    }
}

#[test]
fn a_switch_leads_to_the_next_segment() {
    let mut wal = Craft::new(18, mib(), START);
    wal.filler(100);
    let switch = wal.switch();
    assert_eq!(switch.end(), Lsn(6 << 20));
    let range = wal.commit(7, PgTime(3));
    for sizes in [&[usize::MAX][..], &[1000], &[8192], &[1]] {
        let (found, _) = scan_cut(START, &wal.bytes, sizes).unwrap();
        assert_eq!(found, [Landmark::Switch { range: switch }, commit(7, 3, range)]);
    }
    // From the middle of the padding: zeros, then a segment.
    let skipped = 40 * 8192;
    let (found, _) = scan(Lsn(START.0 + skipped as u64), &wal.bytes[skipped..]).unwrap();
    assert_eq!(found, [commit(7, 3, range)]);
    let (_, scanner) = scan(START, &wal.bytes[..skipped]).unwrap();
    assert_eq!(scanner.last_record_end(), scanner.position());
}

#[test]
fn zeros_end_the_wal_and_nothing_may_follow_them() {
    let mut wal = Craft::new(15, mib(), START);
    let range = wal.commit(1, PgTime(1));
    wal.bytes.resize(3 * 8192, 0);
    let (found, scanner) = scan(START, &wal.bytes).unwrap();
    assert_eq!(found.len(), 1);
    assert!(scanner.is_behind_end() && scanner.at_record_boundary());
    assert_eq!(scanner.last_record_end(), range.end());
    for place in [300, 8192 + 5, 2 * 8192 + 100] {
        let mut damaged = wal.bytes.clone();
        damaged[place] = 1;
        for sizes in [&[usize::MAX][..], &[1]] {
            let error = scan_cut(START, &damaged, sizes).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{place}");
        }
    }
}

#[test]
fn what_a_server_sends_has_zeros_behind_a_switch_and_nowhere_else() {
    let size = mib();
    let mut wal = Craft::new(15, size, START);
    wal.filler(20_000);
    let switch = wal.switch();
    let segment_bytes = (switch.end().0 - START.0) as usize;
    wal.filler(30_000);
    wal.commit(7, PgTime(3));
    let sent = |from: usize, bytes: &[u8], sizes: &[usize]| {
        let mut scanner = Scanner::new(size, Lsn(START.0 + from as u64)).of_sent_wal();
        let outcome = feed_cut(&mut scanner, &bytes[from..], sizes, &mut |_| ());
        (outcome.map_err(|error| error.kind()), scanner.last_record_end())
    };
    for sizes in [&[usize::MAX][..], &[1000], &[8192], &[1]] {
        for from in [0, 8192, 40 * 8192, segment_bytes] {
            assert_eq!(sent(from, &wal.bytes, sizes).0, Ok(()), "from {from}");
        }
        // A record, a page within one, the first page of a segment: none is ever all zero.
        let of_record = segment_bytes + 40;
        let within = segment_bytes + 8192;
        for (from, zeros) in [(0, of_record..of_record + 8000), (0, within..within + 8192)] {
            let mut damaged = wal.bytes.clone();
            damaged[zeros].fill(0);
            assert_eq!(sent(from, &damaged, sizes), (Err(Kind::Corrupt), switch.end()));
        }
        let mut damaged = wal.bytes.clone();
        damaged[..segment_bytes].fill(0);
        assert_eq!(sent(0, &damaged, sizes), (Err(Kind::Corrupt), START));
        // Where it looks like padding, the record behind it follows one that nobody has seen.
        let mut unswitched = Craft::new(15, size, START);
        for _ in 0..60 {
            unswitched.filler(20_000);
        }
        let from = 20 * 8192;
        let mut damaged = unswitched.bytes.clone();
        damaged[from..segment_bytes].fill(0);
        assert_eq!(sent(from, &damaged, sizes).0, Err(Kind::Corrupt));
    }
}

/// `ReserveXLogSwitch`: where the header of a switch ends in the next segment, that one is padded.
#[test]
fn a_switch_whose_header_crosses_a_segment_is_followed_by_padding_wherever_a_scan_begins() {
    let size = mib();
    // Up to so many bytes before the end of the first segment.
    let up_to = |before_end: u64| {
        let mut wal = Craft::new(15, size, START);
        while wal.position().0 < (6 << 20) - 8192 - 2000 {
            wal.filler(1000);
        }
        // Behind the header of the last page.
        let room = (6 << 20) - wal.position().0 - 24 - before_end;
        let last = wal.filler(room as usize - 24 - 5);
        assert_eq!(last.end(), Lsn((6 << 20) - before_end));
        wal
    };
    for before_end in [8, 16] {
        let mut wal = up_to(before_end);
        let switch = wal.switch();
        assert_eq!(switch.end(), Lsn(7 << 20));
        let range = wal.commit(7, PgTime(3));
        let sent = |from: usize, bytes: &[u8], sizes: &[usize]| {
            let mut scanner = Scanner::new(size, Lsn(START.0 + from as u64)).of_sent_wal();
            let mut found = Vec::new();
            feed_cut(&mut scanner, &bytes[from..], sizes, &mut |landmark| found.push(landmark))?;
            Ok::<_, crate::error::Error>(found)
        };
        for from in (0..=2 << 20).step_by(8192) {
            let found = sent(from, &wal.bytes, &[usize::MAX]).unwrap();
            assert_eq!(found.last(), Some(&commit(7, 3, range)), "from {from}");
        }
        let from = 1 << 20;
        for sizes in [&[usize::MAX][..], &[1000], &[8192], &[1]] {
            sent(from, &wal.bytes, sizes).unwrap();
            for place in [from + 60, from + 70, from + 8192 + 5, from + 20 * 8192] {
                let mut damaged = wal.bytes.clone();
                damaged[place] = 1;
                let error = sent(from, &damaged, sizes).unwrap_err();
                assert_eq!(error.kind(), Kind::Corrupt, "{place}");
            }
        }
        // What only looks like it, behind a record that left as little: another one was there.
        let mut unswitched = up_to(before_end);
        let small = unswitched.body((10, 0), 5, &[]);
        for _ in 0..60 {
            unswitched.filler(20_000);
        }
        let mut damaged = unswitched.bytes;
        damaged[(small.end().0 - START.0) as usize..2 * from].fill(0);
        assert_eq!(sent(from, &damaged, &[8192]).unwrap_err().kind(), Kind::Corrupt);
    }
}

#[test]
fn a_record_that_was_never_finished_is_passed_over() {
    let mut wal = Craft::new(17, mib(), START);
    wal.filler(500);
    let cut = wal.cut_off_record(20_000);
    let range = wal.commit(3, PgTime(9));
    for sizes in [&[usize::MAX][..], &[1], &[8192], &[777]] {
        let (found, _) = scan_cut(START, &wal.bytes, sizes).unwrap();
        assert_eq!(found, [commit(3, 9, range)]);
        assert_eq!(read(START, &wal.bytes, sizes).unwrap().len(), 3);
    }
    // Without the flag the record is damaged, and the error names it.
    let mut damaged = wal.bytes.clone();
    damaged[8192 + 2] &= !8;
    let error = scan(START, &damaged).unwrap_err();
    assert!(error.to_string().contains(&format!("record {cut}")), "{error}");
}

#[test]
fn damage_is_never_taken_for_a_record() {
    let mut wal = Craft::new(15, mib(), START);
    let ranges: Vec<LsnRange> = (0..20).map(|index| wal.filler(index * 113)).collect();
    for range in ranges {
        for place in (range.start().0..range.start().0 + 20).step_by(3) {
            let mut damaged = wal.bytes.clone();
            damaged[(place - START.0) as usize] ^= 0x40;
            // A longer length makes the last record one that is not complete yet.
            let seen = scan(START, &damaged).map(|(_, scanner)| scanner.last_record_end());
            assert!(seen.is_err() || seen.is_ok_and(|end| end <= range.start()), "{place}");
        }
    }
    let (found, _) = scan(START, &wal.bytes).unwrap();
    assert!(found.is_empty());
}

#[test]
fn behind_a_page_of_a_known_server_one_of_an_unknown_is_damaged() {
    let mut wal = Craft::new(15, mib(), START);
    let first = wal.filler(5000);
    wal.filler(9000);
    let mut damaged = wal.bytes.clone();
    damaged[8192..8194].copy_from_slice(&0xD199_u16.to_le_bytes());
    let mut scanner = Scanner::new(mib(), START);
    assert_eq!(scanner.feed(&damaged, &mut |_| ()).unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(scanner.last_record_end(), first.end());
    let of_page = scan(Lsn(START.0 + 8192), &damaged[8192..]).unwrap_err();
    assert_eq!(of_page.kind(), Kind::Unsupported);
}

#[test]
fn a_record_that_cannot_be_taken_in_is_not_one_that_was_read() {
    for pieces in [[usize::MAX, 1], [7, 100]] {
        let mut wal = Craft::new(15, mib(), START);
        let before = wal.filler(100);
        wal.main_data((1, 0), 5, &[1, 2, 3]);
        let mut scanner = Scanner::new(mib(), START);
        let failed = feed_cut(&mut scanner, &wal.bytes, &pieces, &mut |_| ());
        assert_eq!(failed.unwrap_err().kind(), Kind::Corrupt);
        assert_eq!(scanner.last_record_end(), before.end());
    }
}

#[test]
fn wal_of_another_cluster_is_refused() {
    let mut wal = Craft::new(15, mib(), START);
    wal.filler(10);
    let mut right = Scanner::new(mib(), START).with_system_id(CRAFTED_SYSTEM_ID);
    right.feed(&wal.bytes, &mut |_| ()).unwrap();
    let mut wrong = Scanner::new(mib(), START).with_system_id(SystemId(1));
    assert_eq!(wrong.feed(&wal.bytes, &mut |_| ()).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn a_timeline_may_rise_but_not_fall() {
    let mut wal = Craft::new(15, mib(), START);
    wal.filler(9000);
    wal.timeline = 4;
    wal.filler(9000);
    let (_, scanner) = scan(START, &wal.bytes).unwrap();
    assert_eq!(scanner.timeline().unwrap().get(), 4);
    wal.timeline = 3;
    wal.filler(9000);
    assert_eq!(scan(START, &wal.bytes).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn the_crc_check_can_be_turned_off() {
    let mut wal = Craft::new(15, mib(), START);
    wal.filler(100);
    let last = wal.bytes.len() - 8;
    wal.bytes[last] ^= 1;
    let mut scanner = Scanner::new(mib(), START);
    assert_eq!(scanner.feed(&wal.bytes, &mut |_| ()).unwrap_err().kind(), Kind::Corrupt);
    assert!(scanner.feed(&[0], &mut |_| ()).is_err(), "it goes on behind damage");
    let mut scanner = Scanner::new(mib(), START).with_crc_check(CrcCheck::None);
    scanner.feed(&wal.bytes, &mut |_| ()).unwrap();
}

/// The main data of a commit of a prepared transaction with every list before its number.
fn prepared_commit(major: u32, counts: [u32; 4], xid: u32) -> Vec<u8> {
    let stats_flag = if major >= 15 { 1 << 8 } else { 0 };
    let mut data = 77_i64.to_le_bytes().to_vec();
    data.extend(u32::to_le_bytes(1 | 2 | 4 | 8 | 16 | 1 << 7 | stats_flag));
    data.extend([0xEE; 8]);
    let [subxacts, relations, stats, messages] = counts;
    let mut lists = vec![(subxacts, 4), (relations, 12)];
    if major >= 15 {
        lists.push((stats, if major >= 18 { 16 } else { 12 }));
    }
    lists.push((messages, 16));
    for (count, item_bytes) in lists {
        data.extend(count.to_le_bytes());
        data.extend(vec![0xEE; count as usize * item_bytes]);
    }
    data.extend(xid.to_le_bytes());
    data.extend(b"the gid\0");
    data
}

#[test]
fn the_transaction_of_a_commit_prepared_is_found_behind_lists_of_any_length() {
    for major in 13..=18 {
        for counts in [[0, 0, 0, 0], [1, 2, 3, 4], [5000, 0, 900, 3], [0, 3000, 1, 9000]] {
            let mut wal = Craft::new(major, mib(), START);
            let data = prepared_commit(major, counts, 4711);
            let range = wal.main_data((1, 0x30 | 0x80), 0, &data);
            for sizes in [&[usize::MAX][..], &[1], &[511, 2, 8192]] {
                let (found, _) = scan_cut(START, &wal.bytes, sizes).unwrap();
                assert_eq!(found, [commit(4711, 77, range)], "{major} {counts:?}");
            }
        }
    }
}

#[test]
fn a_commit_record_cut_short_is_an_error_and_no_landmark() {
    let mut wal = Craft::new(15, mib(), START);
    wal.main_data((1, 0), 5, &[1, 2, 3]);
    assert_eq!(scan(START, &wal.bytes).unwrap_err().kind(), Kind::Corrupt);
    let mut wal = Craft::new(15, mib(), START);
    let data = prepared_commit(15, [1, 1, 1, 1], 9);
    wal.main_data((1, 0x30 | 0x80), 5, &data[..data.len() - 10]);
    assert_eq!(scan(START, &wal.bytes).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn the_other_landmarks_say_what_their_records_say() {
    for major in [13, 15, 18] {
        let mut wal = Craft::new(major, mib(), START);
        let mut point = 5_i64.to_le_bytes().to_vec();
        point.extend(b"before the accident");
        point.resize(72, 0);
        let point = wal.main_data((0, 0x70), 0, &point);
        let mut checkpoint = [0_u8; 88];
        checkpoint[..8].copy_from_slice(&point.start().0.to_le_bytes());
        checkpoint[8] = 2;
        checkpoint[12] = 1;
        checkpoint[64..72].copy_from_slice(&946_684_801_i64.to_le_bytes());
        let online = wal.main_data((0, 0x10), 0, &checkpoint);
        let shutdown = wal.main_data((0, 0x00), 0, &checkpoint);
        let mut end = 8_i64.to_le_bytes().to_vec();
        end.extend([3, 0, 0, 0, 2, 0, 0, 0]);
        let end = wal.main_data((0, 0x90), 0, &end);
        let backup = wal.main_data((0, 0x50), 0, &point.start().0.to_le_bytes());
        let mut prepare = [0_u8; 90];
        prepare[8] = 42;
        prepare[16] = 99;
        let (length, gid) = if major >= 15 { (54, 72) } else { (46, 64) };
        prepare[length] = 4;
        prepare[gid..gid + 4].copy_from_slice(b"gid\0");
        let prepare = wal.main_data((1, 0x10), 42, &prepare);
        let (found, _) = scan(START, &wal.bytes).unwrap();
        let timeline = |number| TimelineId::new(number).unwrap();
        let checkpoint = |kind, range| Landmark::Checkpoint {
            kind,
            redo_lsn: point.start(),
            time: PgTime(1_000_000),
            timeline: timeline(2),
            range,
        };
        let expected = [
            Landmark::RestorePoint {
                name: "before the accident".into(),
                time: PgTime(5),
                range: point,
            },
            checkpoint(CheckpointKind::Online, online),
            checkpoint(CheckpointKind::Shutdown, shutdown),
            Landmark::EndOfRecovery {
                time: PgTime(8),
                timeline: timeline(3),
                previous_timeline: timeline(2),
                range: end,
            },
            Landmark::BackupEnd { start_lsn: point.start(), range: backup },
            Landmark::Prepare { xid: 42, time: PgTime(99), gid: "gid".into(), range: prepare },
        ];
        assert_eq!(found, expected);
    }
}

/// A body with an origin, two blocks (one with an image) and main data.
fn block_body(major: u32) -> Vec<u8> {
    let mut body = vec![253, 7, 0];
    // Block 0: main fork, image with a hole, data of 3 bytes.
    body.extend([0, 0x10 | 0x20, 3, 0]);
    body.extend(100_u16.to_le_bytes());
    body.extend(60_u16.to_le_bytes());
    body.push(if major >= 15 { 1 | 2 } else { 1 | 4 });
    for number in [1663_u32, 5, 16_384, 12] {
        body.extend(number.to_le_bytes());
    }
    // Block 2: visibility map of the same relation, initialised, nothing else.
    body.extend([2, 0x02 | 0x40 | 0x80, 0, 0]);
    body.extend(3_u32.to_le_bytes());
    body.extend([255, 2]);
    body.extend([0xAA; 100]);
    body.extend([1, 2, 3]);
    body.extend([8, 9]);
    body
}

#[test]
fn blocks_and_data_are_taken_apart() {
    for major in 13..=18 {
        let mut wal = Craft::new(major, mib(), START);
        wal.body((10, 0), 77, &block_body(major));
        let mut reader = RecordReader::new(mib(), START);
        let mut count = 0;
        let check = &mut |record: &Record<'_>| {
            count += 1;
            assert_eq!((record.xid, record.origin, record.main_data), (77, Some(7), &[8, 9][..]));
            let [first, second] = record.blocks.as_slice() else { unreachable!() };
            let relation = Relation { tablespace: 1663, database: 5, number: 16_384 };
            assert_eq!(
                (first.relation, first.fork, first.block_number),
                (relation, Fork::Main, 12)
            );
            assert_eq!((first.data, first.will_init), (&[1, 2, 3][..], false));
            let image = first.image.unwrap();
            assert!(image.apply && image.compression == ImageCompression::None);
            let page = image.restore_uncompressed().unwrap();
            assert_eq!((page[59], page[60], page[8151], page[8152]), (0xAA, 0, 0, 0xAA));
            assert_eq!((second.id, second.relation, second.fork), (2, relation, Fork::Visibility));
            assert_eq!((second.block_number, second.will_init), (3, true));
            assert!(second.image.is_none() && second.data.is_empty());
            Ok(())
        };
        reader.feed(&wal.bytes, check).unwrap();
        assert_eq!(count, 1);
    }
}

#[test]
fn an_error_of_the_caller_ends_the_reading() {
    let mut wal = Craft::new(15, mib(), START);
    wal.filler(10);
    let mut reader = RecordReader::new(mib(), START);
    let stop = crate::error::Error::new(Kind::Cancelled, "stop");
    let mut stop = Some(stop);
    let error = reader.feed(&wal.bytes, &mut |_| stop.take().map_or(Ok(()), Err)).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
}

/// What a record of the property tests is.
fn any_wal() -> impl Strategy<Value = Vec<u8>> {
    let record = prop_oneof![
        6 => (0_usize..300).prop_map(|length| (0_u8, length)),
        2 => (300_usize..30_000).prop_map(|length| (0, length)),
        6 => Just((1, 0)),
        1 => (0_usize..9000).prop_map(|length| (2, length)),
        1 => Just((3, 0)),
        1 => (9000_usize..20_000).prop_map(|length| (4, length)),
        1 => Just((5, 0)),
    ];
    (13_u32..=18, proptest::collection::vec(record, 1..60)).prop_map(|(major, records)| {
        let mut wal = Craft::new(major, mib(), START);
        for (index, (kind, length)) in records.into_iter().enumerate() {
            let number = index as u32;
            match kind {
                0 => wal.filler(length),
                1 => wal.commit(number, PgTime(i64::from(number))),
                2 => {
                    let count = length as u32;
                    let data = prepared_commit(major, [count, 2, 1, 3], number);
                    wal.main_data((1, 0x30 | 0x80), 0, &data)
                }
                3 if wal.bytes.len() < 3 << 20 => wal.switch(),
                4 => {
                    wal.cut_off_record(length);
                    wal.filler(1)
                }
                _ => wal.body((10, 0), number, &block_body(major)),
            };
        }
        wal.bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_chunking_gives_the_same(
        bytes in any_wal(),
        sizes in proptest::collection::vec(1_usize..20_000, 1..8),
        cut in 0.0_f64..=1.0,
    ) {
        let bytes = &bytes[..(bytes.len() as f64 * cut) as usize];
        let (whole, one) = scan(START, bytes).unwrap();
        let (pieces, many) = scan_cut(START, bytes, &sizes).unwrap();
        prop_assert_eq!(whole, pieces);
        prop_assert_eq!(one.last_record_end(), many.last_record_end());
        prop_assert_eq!(one.position(), many.position());
        prop_assert_eq!(read(START, bytes, &[usize::MAX]).unwrap(), read(START, bytes, &sizes).unwrap());
    }

    #[test]
    fn any_bytes_are_refused_or_read_and_never_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..20_000),
        sizes in proptest::collection::vec(1_usize..9000, 1..4),
    ) {
        let _ = scan_cut(START, &bytes, &sizes);
        let _ = read(START, &bytes, &sizes);
    }

    #[test]
    fn any_damage_is_refused_or_read_and_never_panics(
        wal in any_wal(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        sizes in proptest::collection::vec(1_usize..20_000, 1..4),
        check in any::<bool>(),
    ) {
        let mut bytes = wal;
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        // Without the CRC check the damage reaches the decoders.
        let check = if check { CrcCheck::Every } else { CrcCheck::None };
        let mut scanner = Scanner::new(mib(), START).with_crc_check(check);
        let outcome = scanner.feed(&bytes, &mut |_| ());
        // However the bytes come, the damage begins at the same place.
        let mut pieces = Scanner::new(mib(), START).with_crc_check(check);
        let in_pieces = feed_cut(&mut pieces, &bytes, &sizes, &mut |_| ());
        prop_assert_eq!(in_pieces.is_err(), outcome.is_err());
        prop_assert_eq!(pieces.last_record_end(), scanner.last_record_end());
        let mut reader = RecordReader::new(mib(), START).with_crc_check(check);
        let _ = reader.feed(&bytes, &mut |record| {
            for image in record.blocks.iter().filter_map(|block| block.image) {
                let _ = image.restore_uncompressed();
            }
            Ok(())
        });
    }

    #[test]
    fn any_record_body_is_refused_or_decoded_and_never_panics(
        body in proptest::collection::vec(any::<u8>(), 0..400),
        kind in (0_u8..22, any::<u8>()),
        major in 13_u32..=18,
    ) {
        let mut wal = Craft::new(major, mib(), START);
        wal.body(kind, 1, &body);
        let _ = scan(START, &wal.bytes);
        let _ = read(START, &wal.bytes, &[usize::MAX]);
    }
}
