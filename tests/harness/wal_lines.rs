//! Records and landmarks of WAL as lines of text, to compare with what pg_waldump says.
#![allow(dead_code, reason = "each test binary uses its own part")]

use tidemark::pg::page::BLCKSZ;
use tidemark::pg::{Lsn, PgTime};
use tidemark::wal::{ImageCompression, Landmark, Record};

/// A record as pg_waldump shows it, without its description and the compression's name.
pub fn our_line(record: &Record<'_>) -> String {
    let images: usize =
        record.blocks.iter().filter_map(|block| block.image).map(|image| image.bytes.len()).sum();
    let padded = |lsn: Lsn| format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 & 0xffff_ffff);
    let mut text = format!(
        "rmgr: {} len (rec/tot): {}/{}, tx: {}, lsn: {}, prev {}",
        record.rmgr,
        record.length_bytes as usize - images,
        record.length_bytes,
        record.xid,
        padded(record.range.start()),
        padded(record.previous_lsn),
    );
    for block in &record.blocks {
        let (id, relation, fork) = (block.id, block.relation, block.fork.name());
        text += &format!("\n#{id}: rel {relation} fork {fork} blk {}", block.block_number);
        if let Some(image) = block.image {
            let purpose = if image.apply { "" } else { " for WAL verification" };
            let (offset, length) = (image.hole_offset, image.hole_length);
            text += &format!(" (FPW{purpose}); hole: offset: {offset}, length: {length}");
            if image.compression != ImageCompression::None {
                // As pg_waldump counts, also where no compressor saved anything.
                let saved = BLCKSZ as i32 - i32::from(length) - image.bytes.len() as i32;
                let saved = saved.cast_unsigned();
                text += &format!(", compression saved: {saved}");
            }
        }
    }
    text
}

/// What pg_waldump printed, a record with the lines of its blocks each.
pub fn waldump_records(text: &str) -> Vec<String> {
    let mut records: Vec<String> = Vec::new();
    for line in text.lines() {
        if line.starts_with("rmgr: ") {
            records.push(line.to_owned());
        } else if let Some(last) = records.last_mut() {
            last.push('\n');
            last.push_str(line);
        }
    }
    records
}

/// A line of pg_waldump cut down to what [`our_line`] makes.
pub fn cut_down(record: &str) -> String {
    let (head, rest) = record.split_once(", desc: ").unwrap();
    let mut text = head.split_whitespace().collect::<Vec<_>>().join(" ").replace("/ ", "/");
    for line in rest.lines().skip(1) {
        if let Some(block) = line.strip_prefix("\tblkref ") {
            text.push('\n');
            text.push_str(block.split(", method").next().unwrap());
        }
    }
    text
}

/// Feeds all bytes in pieces whose sizes are of no meaning to WAL.
pub fn in_pieces(bytes: &[u8], mut feed: impl FnMut(&[u8])) {
    let mut rest = bytes;
    for size in [1, 8192, 65_536, 13, 131_072, 40_000, 7, 24].into_iter().cycle() {
        let (now, later) = rest.split_at(size.min(rest.len()));
        feed(now);
        rest = later;
        if rest.is_empty() {
            return;
        }
    }
}

/// A time as pg_waldump shows it in UTC.
pub fn shown(time: PgTime) -> String {
    let zoned = time.to_timestamp().unwrap().to_zoned(jiff::tz::TimeZone::UTC);
    zoned.strftime("%Y-%m-%d %H:%M:%S%.6f UTC").to_string()
}

/// A landmark with its start.
pub fn landmark_line(landmark: &Landmark) -> String {
    let start = landmark.range().start();
    let what = match landmark {
        Landmark::Commit { xid, time, .. } => format!("commit {xid} {}", shown(*time)),
        Landmark::Abort { xid, time, .. } => format!("abort {xid} {}", shown(*time)),
        Landmark::Prepare { xid, time, gid, .. } => {
            format!("prepare {xid} {gid} {}", shown(*time))
        }
        Landmark::RestorePoint { name, .. } => format!("point {name}"),
        Landmark::Checkpoint { kind, redo_lsn, timeline, .. } => {
            format!("checkpoint {kind:?} {redo_lsn} {timeline}")
        }
        Landmark::EndOfRecovery { .. } => "end of recovery".into(),
        Landmark::BackupEnd { .. } => "backup end".into(),
        Landmark::Switch { .. } => "switch".into(),
        Landmark::ParameterChange { wal_level, limits, .. } => {
            format!("parameters {wal_level} {}", limits.max_connections)
        }
    };
    format!("{start} {what}")
}
