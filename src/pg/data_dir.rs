//! What a data directory holds: which files are relation segments (and so carry page checksums),
//! and what a base backup leaves out.
//!
//! # Shape
//! Paths are relative to the data directory, separated by `/`, without `./` in front; files of a
//! tablespace are under `pg_tblspc/<oid>/`.
//!
//! # Source
//! `sendDir`, `excludeDirContents`, `excludeFiles` in `src/backend/backup/basebackup.c` (13:
//! `src/backend/replication/basebackup.c`), `parse_filename_for_nontemp_relation` in
//! `src/backend/storage/file/reinit.c`, `forkNames` in `src/common/relpath.c`, `pg_tablespace.dat`;
//! read on 13, 15, 17, 18.

use std::fmt;

/// `DEFAULTTABLESPACE_OID`: `pg_default`, the files under `base/`.
pub const DEFAULTTABLESPACE_OID: u32 = 1663;
/// `GLOBALTABLESPACE_OID`: `pg_global`, the files under `global/`.
pub const GLOBALTABLESPACE_OID: u32 = 1664;

/// The directories whose contents no backup holds: PostgreSQL makes them anew. They themselves are
/// kept, empty. (`excludeDirContents`)
pub const CONTENTS_NOT_BACKED_UP: [&str; 7] = [
    "pg_stat_tmp",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
];

/// Whether the contents of the directory at `path` are left out of a backup; `pg_wal` is among
/// them, because its contents come from the archived WAL.
#[must_use]
pub fn contents_not_backed_up(path: &str) -> bool {
    path == "pg_wal" || CONTENTS_NOT_BACKED_UP.contains(&path)
}

/// A fork of a relation (`ForkNumber`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The data.
    Main,
    /// The free space map.
    FreeSpace,
    /// The visibility map.
    Visibility,
    /// What an unlogged relation is reset to.
    Init,
}

impl Fork {
    /// The fork with this number, as WAL records have it.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Main,
            1 => Self::FreeSpace,
            2 => Self::Visibility,
            3 => Self::Init,
            _ => return None,
        })
    }

    /// The fork's name in PostgreSQL's messages and, except for the main fork, in file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::FreeSpace => "fsm",
            Self::Visibility => "vm",
            Self::Init => "init",
        }
    }
}

/// A relation as the storage layer knows it (`RelFileLocator`; `RelFileNode` before 16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Relation {
    /// Tablespace oid.
    pub tablespace: u32,
    /// Database oid; 0 for relations shared by all databases.
    pub database: u32,
    /// The relation's file number.
    pub number: u32,
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tablespace, self.database, self.number)
    }
}

/// One segment file of one fork of a relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// The relation.
    pub relation: Relation,
    /// The fork.
    pub fork: Fork,
    /// Segment number; the file begins with block `segment * RELSEG_SIZE` of the fork.
    pub segment: u32,
}

impl RelationFile {
    /// The relation segment at `path`, or `None` when the file there is something else. Only these
    /// files hold pages with checksums. Files of temporary relations are not among them.
    #[must_use]
    pub fn from_path(path: &str) -> Option<Self> {
        let (folder, name) = path.rsplit_once('/')?;
        let (tablespace, database) = folder_owner(folder)?;
        let (number, fork, segment) = parse_file_name(name)?;
        Some(Self { relation: Relation { tablespace, database, number }, fork, segment })
    }

    /// Number in its fork of the block at `offset` bytes of this file, or `None` past the greatest
    /// block number.
    #[must_use]
    pub fn block_number_at(self, offset: u64) -> Option<u32> {
        let before = u64::from(self.segment) * u64::from(super::page::RELSEG_SIZE);
        let block = before.checked_add(offset / super::page::BLCKSZ as u64)?;
        // InvalidBlockNumber is not a block.
        u32::try_from(block).ok().filter(|block| *block != u32::MAX)
    }
}

/// Tablespace and database of the relation files in `folder`, or `None` when it holds none.
fn folder_owner(folder: &str) -> Option<(u32, u32)> {
    if folder == "global" {
        return Some((GLOBALTABLESPACE_OID, 0));
    }
    if let Some(database) = folder.strip_prefix("base/") {
        return Some((DEFAULTTABLESPACE_OID, oid(database)?));
    }
    let mut parts = folder.strip_prefix("pg_tblspc/")?.split('/');
    let (tablespace, version, database) = (parts.next()?, parts.next()?, parts.next()?);
    let whole = parts.next().is_none() && version.starts_with("PG_");
    whole.then(|| Some((oid(tablespace)?, oid(database)?))).flatten()
}

/// Relation number, fork and segment in a file name, as `parse_filename_for_nontemp_relation`
/// reads it: no leading zeros, no other spelling of a number.
fn parse_file_name(name: &str) -> Option<(u32, Fork, u32)> {
    let (stem, segment) = match name.split_once('.') {
        Some((stem, segment)) => (stem, oid(segment)?),
        None => (name, 0),
    };
    let (number, fork) = match stem.split_once('_') {
        Some((number, "fsm")) => (number, Fork::FreeSpace),
        Some((number, "vm")) => (number, Fork::Visibility),
        Some((number, "init")) => (number, Fork::Init),
        Some(_) => return None,
        None => (stem, Fork::Main),
    };
    Some((oid(number)?, fork, segment))
}

/// A positive 32-bit number written without sign or leading zeros.
fn oid(text: &str) -> Option<u32> {
    let plain = !text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relation_files_are_told_from_everything_else() {
        let file = |tablespace, database, number, fork, segment| RelationFile {
            relation: Relation { tablespace, database, number },
            fork,
            segment,
        };
        for (path, expected) in [
            ("base/5/16384", Some(file(1663, 5, 16384, Fork::Main, 0))),
            ("base/5/16384.12", Some(file(1663, 5, 16384, Fork::Main, 12))),
            ("base/5/16384_fsm.1", Some(file(1663, 5, 16384, Fork::FreeSpace, 1))),
            ("global/1262_vm", Some(file(1664, 0, 1262, Fork::Visibility, 0))),
            (
                "pg_tblspc/17000/PG_15_202209061/5/17001_init",
                Some(file(17000, 5, 17001, Fork::Init, 0)),
            ),
            ("global/pg_control", None),
            ("global/pg_filenode.map", None),
            ("base/5/PG_VERSION", None),
            ("base/5/pg_internal.init", None),
            ("base/5/t3_16384", None),
            ("base/5/016384", None),
            ("base/5/16384.0", None),
            ("base/5/16384.1_fsm", None),
            ("base/5/16384_fsmx", None),
            ("base/5/4294967296", None),
            ("base/pgsql_tmp/1234", None),
            ("pg_xact/0000", None),
            ("pg_tblspc/17000/PG_15_202209061/5/6/7", None),
            ("PG_VERSION", None),
            ("base/5/", None),
        ] {
            assert_eq!(RelationFile::from_path(path), expected, "{path}");
        }
    }

    #[test]
    fn block_numbers_run_on_across_segments() {
        let file = RelationFile::from_path("base/5/16384.2").unwrap();
        assert_eq!(file.block_number_at(0), Some(262_144));
        assert_eq!(file.block_number_at(8192 * 3 + 1), Some(262_147));
        let last = RelationFile::from_path("base/5/16384.4294967295").unwrap();
        assert_eq!(last.block_number_at(0), None);
    }
}
