//! Records and landmarks of WAL as lines of text, to compare with what pg_waldump says.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tidemark::fuzz::wal_of_records;
use tidemark::pg::page::BLCKSZ;
use tidemark::pg::{ControlFile, Lsn, PgTime, SegmentSize};
use tidemark::wal::{ImageCompression, Landmark, Record, RecordReader, RmgrId, Scanner};

/// Greatest size of an unpacked sample, bytes: most of it is the padding behind the switches of a backup.
pub const SAMPLE_BYTES_MAX: usize = 4 << 20;

/// Resource managers of PostgreSQL's own, the same in every major.
pub const RMGR_COUNT: u8 = 22;
/// The last two came with 15.
const COMPRESSIONS: [ImageCompression; 4] =
    [ImageCompression::None, ImageCompression::Pglz, ImageCompression::Lz4, ImageCompression::Zstd];
/// What the lines of a sample's landmarks must show.
const LANDMARKS: [&str; 11] = [
    " commit ",
    " abort ",
    " prepare ",
    " point sample",
    " checkpoint Online ",
    " checkpoint Shutdown ",
    " end of recovery ",
    " backup end ",
    " switch",
    " tablespace ",
    " parameters ",
];

/// A piece of WAL, what pg_waldump said of it, and the control file of its server.
pub struct Sample {
    pub major: u32,
    /// Where the WAL begins.
    pub start: Lsn,
    pub wal: Vec<u8>,
    /// A line for each record, as [`our_line`] has it.
    pub records: String,
    /// A line for each landmark, as [`landmark_line`] has it.
    pub landmarks: String,
    pub control: Vec<u8>,
}

impl Sample {
    /// Where one kind of file of a sample is.
    pub fn path(folder: &Path, major: u32, kind: &str) -> PathBuf {
        folder.join(format!("{major}.{kind}.zst"))
    }

    /// Reads `<major>.{wal,txt,control}.zst`.
    pub fn read(folder: &Path, major: u32) -> Self {
        let unpacked = |kind| {
            let packed = std::fs::read(Self::path(folder, major, kind)).unwrap();
            zstd::bulk::decompress(&packed, SAMPLE_BYTES_MAX).unwrap()
        };
        let text = String::from_utf8(unpacked("txt")).unwrap();
        let (start, text) = text.split_once('\n').unwrap();
        let (records, landmarks) = text.split_once("\n\n").unwrap();
        Self {
            major,
            start: start.parse().unwrap(),
            wal: unpacked("wal"),
            records: records.to_owned(),
            landmarks: landmarks.trim_end().to_owned(),
            control: unpacked("control"),
        }
    }

    /// Reads the WAL as pg_waldump did, and finds in it what a sample must have: every resource manager,
    /// landmark and compression but those that its server was `lacking`.
    #[track_caller]
    pub fn check(&self, lacking: &[&str]) {
        let major = self.major;
        let control = ControlFile::decode(&self.control).unwrap();
        assert_eq!(control.major, Some(major));
        let size = control.wal_segment_size;

        let mut ours = Vec::new();
        let mut brought: BTreeSet<String> = lacking.iter().map(|what| (*what).into()).collect();
        let mut reader = RecordReader::new(size, self.start);
        in_pieces(&self.wal, |piece| {
            let each = &mut |record: &Record<'_>| {
                assert_eq!(record.major, major);
                ours.push(our_line(record));
                brought.insert(record.rmgr.to_string());
                let images = record.blocks.iter().filter_map(|block| block.image);
                brought.extend(images.map(|image| format!("{:?}", image.compression)));
                Ok(())
            };
            reader.feed(piece, each).unwrap();
        });
        assert_eq!(ours.join("\n"), self.records, "PostgreSQL {major}");
        let rmgrs = (0..RMGR_COUNT).map(|number| RmgrId(number).to_string());
        let compressions = if major >= 15 { &COMPRESSIONS[..] } else { &COMPRESSIONS[..2] };
        for what in rmgrs.chain(compressions.iter().map(|compression| format!("{compression:?}"))) {
            assert!(brought.contains(&what), "PostgreSQL {major}: no {what} in the sample");
        }

        let mut ours = Vec::new();
        let mut scanner = Scanner::new(size, self.start);
        in_pieces(&self.wal, |piece| {
            scanner.feed(piece, &mut |landmark| ours.push(landmark_line(&landmark))).unwrap();
        });
        assert_eq!(ours.join("\n"), self.landmarks, "PostgreSQL {major}");
        let shutdown = format!("{} checkpoint Shutdown", control.checkpoint_lsn);
        for kind in LANDMARKS.into_iter().chain([shutdown.as_str()]) {
            assert!(self.landmarks.contains(kind), "PostgreSQL {major}: no {kind} in the sample");
        }
    }
}

/// Resource manager and operation of each record of a kept input of the fuzz target `wal_records`.
pub fn kinds_of_records(input: &[u8], major: u32) -> Vec<(u8, u8)> {
    let (start, wal) = wal_of_records(input, major);
    let mut kinds = Vec::new();
    let mut reader = RecordReader::new(SegmentSize::new(1 << 20).unwrap(), start);
    let each = &mut |record: &Record<'_>| {
        kinds.push((record.rmgr.0, record.info));
        Ok(())
    };
    reader.feed(&wal, each).unwrap();
    kinds
}

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
        Landmark::EndOfRecovery { timeline, previous_timeline, time, .. } => {
            format!("end of recovery {timeline} {previous_timeline} {}", shown(*time))
        }
        Landmark::BackupEnd { start_lsn, .. } => format!("backup end {start_lsn}"),
        Landmark::Switch { .. } => "switch".into(),
        Landmark::Tablespace { oid, path, .. } => {
            format!("tablespace {oid} \"{}\"", path.display())
        }
        Landmark::ParameterChange { wal_level, limits, .. } => {
            let limits = [
                limits.max_connections,
                limits.max_worker_processes,
                limits.max_wal_senders,
                limits.max_prepared_transactions,
                limits.max_locks_per_transaction,
            ];
            format!("parameters {wal_level} {}", limits.map(|limit| limit.to_string()).join(" "))
        }
    };
    format!("{start} {what}")
}
