//! Tablespaces that are created by the WAL of a restore.
//!
//! Replay makes such a tablespace at the very path that `CREATE TABLESPACE` named, whatever the restore was
//! told of others, and takes what is there for its own: on the host of the original server it writes over
//! that server's files. So a segment with such a record is not given to PostgreSQL while somebody's
//! tablespace is at the path.
//!
//! # Shape
//! A [`Watch`] sees segment files in the order of the WAL, each when it is written and before PostgreSQL
//! gets it. A record that lies across two segments is seen when one watch sees both.
//!
//! # Source
//! `tblspc_redo` and `create_tablespace_directories` in `src/backend/commands/tablespace.c` (13 to 18).

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize};
use crate::wal::{CrcCheck, Landmark, Scanner};

use super::scan::{WAL_PAGE_BYTES, blocking};

/// Begins the name of the folder that a major version has in a tablespace
/// (`TABLESPACE_VERSION_DIRECTORY`).
const VERSION_FOLDER: &str = "PG_";

/// Bytes of a segment that are read at a time: a segment may have a gibibyte.
const LOOK_BYTES: usize = 1 << 20;

/// Looks for such records.
#[derive(Debug)]
pub(crate) struct Watch {
    size: SegmentSize,
    /// The data directory.
    data: PathBuf,
    /// Records that begin here are replayed.
    replayed: Range<Lsn>,
    scanner: Option<Scanner>,
    missing: Vec<PathBuf>,
}

impl Watch {
    /// For the WAL of `replayed`, which the server in `data` is to replay.
    pub(crate) fn new(size: SegmentSize, data: &Path, replayed: Range<Lsn>) -> Self {
        let (data, scanner, missing) = (data.to_path_buf(), None, Vec::new());
        Self { size, data, replayed, scanner, missing }
    }

    /// Paths of tablespaces to come at which nothing is: replay wants a directory there.
    pub(crate) fn into_missing(self) -> Vec<PathBuf> {
        self.missing
    }

    /// Reads the WAL of `known` in the segment file at `path`. WAL that cannot be decoded ends recovery
    /// by itself.
    ///
    /// # Errors
    /// `conflict` when a tablespace would be created where there is one.
    pub(crate) async fn see(mut self, path: PathBuf, known: LsnRange) -> Result<Self> {
        blocking(move || self.look(&path, known).map(|()| self)).await?
    }

    fn look(&mut self, path: &Path, known: LsnRange) -> Result<()> {
        let attempted = || format!("unable to read '{}'", path.display());
        let goes_on = |scanner: &Scanner| scanner.position() == known.start();
        let mut scanner = self.scanner.take().filter(goes_on).unwrap_or_else(|| {
            let page = Lsn(known.start().0.next_multiple_of(WAL_PAGE_BYTES));
            Scanner::new(self.size, page).with_crc_check(CrcCheck::None)
        });
        let file = File::open(path).context(attempted)?;
        let mut bytes = Vec::new();
        let mut created = Vec::new();
        let mut fed = Ok(());
        for piece in pieces(scanner.position(), known.end()) {
            bytes.resize(usize::try_from(piece.len_bytes()).unwrap_or(0), 0);
            let offset = piece.start().saturating_since(self.size.start_of(piece.start()));
            file.read_exact_at(&mut bytes, offset).context(attempted)?;
            fed = scanner.feed(&bytes, &mut |landmark| {
                if let Landmark::Tablespace { path, range, .. } = landmark {
                    created.push((path, range.start()));
                }
            });
            if fed.is_err() {
                break;
            }
        }
        self.scanner = fed.is_ok().then_some(scanner);
        created.into_iter().try_for_each(|(place, lsn)| self.check(place, lsn))
    }

    fn check(&mut self, place: PathBuf, lsn: Lsn) -> Result<()> {
        if !self.replayed.contains(&lsn) || !place.is_absolute() || self.is_ours(&place) {
            return Ok(());
        }
        let entries = match fs::read_dir(&place) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.missing.push(place);
                return Ok(());
            }
            other => other.context(|| format!("unable to look into '{}'", place.display()))?,
        };
        let is_version =
            |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(VERSION_FOLDER);
        if !entries.flatten().any(|entry| is_version(&entry.file_name())) {
            return Ok(());
        }
        let message = format!(
            "unable to replay the WAL at {lsn}: it creates a tablespace in '{}', where there is one",
            place.display()
        );
        Err(Error::new(Kind::Conflict, message).hint(
            "PostgreSQL would write over its files, and they may be another server's. Restore on \
             another host, or move that directory away and make an empty one in its place for \
             PostgreSQL's account.",
        ))
    }

    /// Whether a tablespace of the server itself is there. Not of this record: replay that begins again
    /// finds what it made before, and that may be a later tablespace at the place of one that was dropped.
    fn is_ours(&self, place: &Path) -> bool {
        let links = fs::read_dir(self.data.join("pg_tblspc")).into_iter().flatten().flatten();
        links.map(|link| fs::read_link(link.path())).any(|to| to.is_ok_and(|to| to == place))
    }
}

/// The WAL from `start` to `end` in pieces that are read at a time.
fn pieces(start: Lsn, end: Lsn) -> impl Iterator<Item = LsnRange> {
    let starts = (start.0..end.0).step_by(LOOK_BYTES);
    starts.filter_map(move |from| {
        LsnRange::new(Lsn(from), Lsn(from.saturating_add(LOOK_BYTES as u64)).min(end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::craft::Craft;

    const START: Lsn = Lsn(0x300_0000);

    fn create(craft: &mut Craft, oid: u32, place: &Path) -> LsnRange {
        let path = place.to_str().unwrap().as_bytes();
        craft.main_data((5, 0), 7, &[&oid.to_le_bytes()[..], path, b"\0"].concat())
    }

    #[test]
    fn a_segment_is_read_in_pieces_and_a_record_across_two_is_seen() {
        let known = (Lsn(0x4000_2000), Lsn(0x8000_0000));
        let (mut reached, mut bytes_max) = (known.0, 0);
        for piece in pieces(known.0, known.1) {
            assert_eq!(piece.start(), reached);
            (reached, bytes_max) = (piece.end(), bytes_max.max(piece.len_bytes()));
        }
        assert_eq!((reached, bytes_max), (known.1, 1 << 20));
        assert_eq!(pieces(known.1, known.0).count(), 0);

        let folder = tempfile::tempdir().unwrap();
        let (data, missing) = (folder.path().join("data"), folder.path().join("missing"));
        let size = SegmentSize::new(4 << 20).unwrap();
        let start = Lsn(0x400_0000);
        let mut craft = Craft::new(15, size, start);
        craft.filler((1 << 20) - 8192);
        while start.0 + (1 << 20) - craft.position().0 > 64 {
            craft.filler(8);
        }
        let record = create(&mut craft, 1, &missing);
        let edge = Lsn(start.0 + (1 << 20));
        assert!(record.start() < edge && edge < record.end(), "{record:?}");
        let segment = folder.path().join("segment");
        fs::write(&segment, &craft.bytes).unwrap();
        let mut watch = Watch::new(size, &data, start..craft.position());
        watch.look(&segment, LsnRange::new(start, craft.position()).unwrap()).unwrap();
        assert_eq!(watch.into_missing(), [missing]);
    }

    #[test]
    fn a_tablespace_of_somebody_is_not_created_again() {
        let folder = tempfile::tempdir().unwrap();
        let (data, taken) = (folder.path().join("data"), folder.path().join("taken"));
        let free = folder.path().join("free");
        let missing = folder.path().join("missing");
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        fs::create_dir_all(taken.join("PG_15_202209061")).unwrap();
        fs::create_dir_all(free.join("lost+found")).unwrap();
        let size = SegmentSize::new(1 << 20).unwrap();
        let mut craft = Craft::new(15, size, START);
        create(&mut craft, 1, &free);
        create(&mut craft, 2, &missing);
        create(&mut craft, 3, Path::new(""));
        // Across the end of a page, where the first look ends.
        craft.filler(8192 - craft.bytes.len() - 29 - 40);
        let record = create(&mut craft, 4, &taken);
        let segment = folder.path().join("segment");
        fs::write(&segment, &craft.bytes).unwrap();
        let (middle, end) = (Lsn(START.0 + 8192), craft.position());
        assert!(record.start() < middle && middle < record.end(), "{record:?}");
        let range = |start, end| LsnRange::new(start, end).unwrap();
        let seen = |replayed_end| {
            let mut watch = Watch::new(size, &data, START..replayed_end);
            watch.look(&segment, range(START, middle))?;
            watch.look(&segment, range(middle, end))?;
            Ok(watch.into_missing())
        };
        let error: Error = seen(end).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.message().contains("/taken', where there is one"), "{error}");
        // Recovery stops before it.
        assert_eq!(seen(record.start()).unwrap(), std::slice::from_ref(&missing));
        // Replay made it, before the server was started anew.
        std::os::unix::fs::symlink(&taken, data.join("pg_tblspc/4")).unwrap();
        assert_eq!(seen(end).unwrap(), std::slice::from_ref(&missing));
        // Or made a later one there, when this one had been dropped.
        fs::rename(data.join("pg_tblspc/4"), data.join("pg_tblspc/5")).unwrap();
        assert_eq!(seen(end).unwrap(), [missing]);
    }
}
