//! What is inside WAL: of a segment file, or of an extent that was opened.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Value, json};

use super::Depth;
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, PgTime, SegmentSize, TimelineId};
use crate::wal::{Landmark, Record, RecordReader, Scanner};

/// Bytes read from a file at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A segment file. Its name says where in the WAL it belongs, its length how large segments are.
///
/// It is read in chunks, and again for its records: a million of them would not fit into memory, and a
/// segment of a running server changes and may be truncated while it is looked at, so that it cannot be
/// mapped either.
pub(super) struct SegmentFile<'a> {
    path: &'a Path,
    size: SegmentSize,
    timeline: TimelineId,
    range: LsnRange,
}

impl<'a> SegmentFile<'a> {
    /// Looks at name and length.
    pub(super) fn find(path: &'a Path) -> Result<Self> {
        let attempted = || format!("unable to read the WAL segment '{}'", path.display());
        let length = std::fs::metadata(path).context(attempted)?.len();
        let size = u32::try_from(length).ok().and_then(SegmentSize::new).ok_or_else(|| {
            Error::new(
                Kind::Usage,
                format!("{}: it has {length} bytes, which no WAL segment has", attempted()),
            )
            .hint("WAL segments have a power of two from 1 MiB to 1 GiB.")
        })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.trim_end_matches(".partial");
        let Some((timeline, number)) = size.parse_file_name(name) else {
            return Err(Error::new(
                Kind::Usage,
                format!("{}: its name is not that of a WAL segment", attempted()),
            )
            .hint(
                "A segment has a name of 24 hexadecimal digits, such as 000000010000000000000001.",
            ));
        };
        let range = size.range_of(number).ok_or_else(|| {
            Error::new(Kind::Usage, format!("{}: its number is beyond the WAL", attempted()))
        })?;
        Ok(Self { path, size, timeline, range })
    }

    /// What it holds, without its records.
    pub(super) fn summary(&self) -> Result<Value> {
        let mut wal = Wal::new(self.size, self.range.start(), Depth::Summary);
        self.read(&mut |bytes| Ok(wal.feed(bytes)))?;
        Ok(json!({
            "kind": "WAL segment",
            "timeline": self.timeline,
            "start": self.range.start(),
            "end": self.range.end(),
            "wal": wal.found(),
        }))
    }

    /// Every record up to where no more can be read; the summary says why it ends there.
    pub(super) fn records(&self, each: &mut dyn FnMut(Value) -> Result<()>) -> Result<()> {
        let mut reader = RecordReader::new(self.size, self.range.start());
        self.read(&mut |bytes| {
            let mut refused = None;
            let read = reader.feed(bytes, &mut |record| {
                // An error given to the reader would look like damage.
                if refused.is_none() {
                    refused = each(show(record)).err();
                }
                Ok(())
            });
            refused.map_or(Ok(read.is_ok() && !reader.is_behind_end()), Err)
        })
    }

    /// Gives the file in chunks, until `each` wants no more.
    fn read(&self, each: &mut dyn FnMut(&[u8]) -> Result<bool>) -> Result<()> {
        let attempted = || format!("unable to read the WAL segment '{}'", self.path.display());
        let mut file = File::open(self.path).context(attempted)?;
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = file.read(&mut chunk).context(attempted)?;
            let Some(bytes) = chunk.get(..count).filter(|bytes| !bytes.is_empty()) else { break };
            if !each(bytes)? {
                break;
            }
        }
        Ok(())
    }
}

/// Reads WAL and remembers what to show.
pub(super) struct Wal {
    reader: RecordReader,
    scanner: Scanner,
    depth: Depth,
    by_rmgr: BTreeMap<String, (u64, u64)>,
    records: Vec<Value>,
    landmarks: Vec<Value>,
    problem: Option<Error>,
}

impl Wal {
    /// For WAL that begins at `start`, a page boundary.
    pub(super) fn new(size: SegmentSize, start: Lsn, depth: Depth) -> Self {
        Self {
            reader: RecordReader::new(size, start),
            scanner: Scanner::new(size, start),
            depth,
            by_rmgr: BTreeMap::new(),
            records: Vec::new(),
            landmarks: Vec::new(),
            problem: None,
        }
    }

    /// Takes the bytes that follow; false once nothing more can be read.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> bool {
        let Self { by_rmgr, records, depth, .. } = self;
        let mut each = |record: &Record<'_>| {
            let count = by_rmgr.entry(record.rmgr.to_string()).or_default();
            count.0 += 1;
            count.1 += u64::from(record.length_bytes);
            if *depth == Depth::All {
                records.push(show(record));
            }
            Ok(())
        };
        let read = self.reader.feed(bytes, &mut each);
        let landmarks = &mut self.landmarks;
        let scanned = self.scanner.feed(bytes, &mut |landmark| landmarks.push(name(&landmark)));
        self.problem = read.and(scanned).err();
        self.problem.is_none() && !self.reader.is_behind_end()
    }

    /// Whether all that was fed could be read.
    pub(super) fn is_sound(&self) -> bool {
        self.problem.is_none()
    }

    /// What was found.
    pub(super) fn found(self) -> Value {
        let rmgrs: Vec<Value> = self
            .by_rmgr
            .iter()
            .map(|(name, (count, bytes))| json!({ "rmgr": name, "records": count, "bytes": bytes }))
            .collect();
        let mut found = json!({
            "postgres_major": self.scanner.major(),
            "last_record_end": self.reader.last_record_end(),
            "ends_in_zeros": self.reader.is_behind_end(),
            "problem": self.problem.map(|problem| problem.to_string()),
            "resource_managers": rmgrs,
            "landmarks": self.landmarks,
        });
        if self.depth == Depth::All
            && let Some(members) = found.as_object_mut()
        {
            members.insert("records".to_owned(), Value::Array(self.records));
        }
        found
    }
}

fn show(record: &Record<'_>) -> Value {
    let blocks = record.blocks.iter().map(|block| {
        let image = if block.image.is_some() { " image" } else { "" };
        format!("{} {:?} {}{image}", block.relation, block.fork, block.block_number)
    });
    json!({
        "lsn": record.range.start(),
        "rmgr": record.rmgr.to_string(),
        "info": format!("{:02X}", record.info),
        "xid": record.xid,
        "bytes": record.length_bytes,
        "blocks": blocks.collect::<Vec<_>>().join("; "),
    })
}

fn name(landmark: &Landmark) -> Value {
    let lsn = landmark.range().start();
    let time = |time: &PgTime| time.to_string();
    match landmark {
        Landmark::Commit { xid, time: at, .. } => {
            json!({ "lsn": lsn, "what": "commit", "xid": xid, "time": time(at) })
        }
        Landmark::Abort { xid, time: at, .. } => {
            json!({ "lsn": lsn, "what": "abort", "xid": xid, "time": time(at) })
        }
        Landmark::Prepare { xid, time: at, gid, .. } => {
            json!({ "lsn": lsn, "what": "prepare", "xid": xid, "time": time(at), "gid": gid })
        }
        Landmark::RestorePoint { name, time: at, .. } => {
            json!({ "lsn": lsn, "what": "restore point", "name": name, "time": time(at) })
        }
        Landmark::Checkpoint { kind, redo_lsn, time: at, .. } => json!({
            "lsn": lsn, "what": "checkpoint", "kind": kind, "redo": redo_lsn, "time": time(at),
        }),
        Landmark::EndOfRecovery { time: at, timeline, .. } => {
            json!({ "lsn": lsn, "what": "end of recovery", "timeline": timeline, "time": time(at) })
        }
        Landmark::BackupEnd { start_lsn, .. } => {
            json!({ "lsn": lsn, "what": "end of backup", "start": start_lsn })
        }
        Landmark::Switch { .. } => json!({ "lsn": lsn, "what": "segment switch" }),
        Landmark::Tablespace { oid, path, .. } => {
            json!({ "lsn": lsn, "what": "create tablespace", "oid": oid, "path": path.to_string_lossy() })
        }
        Landmark::ParameterChange { wal_level, .. } => {
            json!({ "lsn": lsn, "what": "parameter change", "wal_level": wal_level })
        }
    }
}
