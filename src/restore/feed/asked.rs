//! A file that a server waits for, and whether it still does.
//!
//! PostgreSQL's startup process runs `restore_command` in a shell. When it is killed alone, the shell and
//! `wal-get` live on, and the next server on the data directory asks for its own file at the same path. It
//! looks there when its own `wal-get` has ended and takes what it finds; before it gives that its name it
//! syncs it (`durable_rename` in `fd.c`), which takes a disk a while. Another segment put there by then has
//! the wrong addresses in its pages, and recovery would end with it as if that were the end of the WAL.
//!
//! # Invariants
//! - Nothing is written at the path: a file is made whole beside it and renamed.
//! - A file is not renamed once another postmaster runs in the data directory, or none.
//!
//! What remains is the instant between the last look and the rename, in which a server would have to start
//! and come to its first file; and the startup process of a postmaster that lives on, which only ends as one
//! with the shell: the signals that it is ended by go to its process group (`signal_child` in
//! `postmaster.c`).
//!
//! # Source
//! `postmaster.pid`: `CreateLockFile` in `miscinit.c`, `LOCK_FILE_LINE_PID` and
//! `LOCK_FILE_LINE_START_TIME` in `pidfile.h` (13 to 18). Its status, in the last line, changes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{WalGet, WalGetRequest, data_directory_of, wal_directory_of};
use crate::error::{Context, Error, Kind, Result};
use crate::file;
use crate::restore::handover::remove_unfinished;

/// The file that a postmaster keeps in its data directory as long as it runs.
const LOCK_FILE: &str = "postmaster.pid";
/// It has eight short lines and two paths.
const LOCK_FILE_BYTES_MAX: u64 = 16 << 10;

/// A request, and the server that made it.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) request: &'a WalGetRequest,
    lock_file: PathBuf,
    /// `None` for who asks without a server: `pg_rewind`, or somebody by hand.
    postmaster: Option<Postmaster>,
}

/// Which start of which process it is.
#[derive(Debug, PartialEq, Eq)]
struct Postmaster {
    pid: String,
    start_time: String,
}

impl<'a> Asked<'a> {
    /// By the server that runs now in the data directory of `request`.
    pub(super) fn now(request: &'a WalGetRequest) -> Result<Self> {
        let lock_file = data_directory_of(&request.path)?.join(LOCK_FILE);
        let postmaster = Postmaster::of(&lock_file)?;
        Ok(Self { request, lock_file, postmaster })
    }

    /// Whether who has asked still waits.
    ///
    /// # Errors
    /// `cancelled` when that server is gone.
    pub(super) fn still_waits(&self) -> Result<()> {
        if self.postmaster.is_none() || Postmaster::of(&self.lock_file)? == self.postmaster {
            return Ok(());
        }
        let what = format!("the server that asked for it is gone, '{}'", self.lock_file.display());
        Err(Error::new(Kind::Cancelled, format!("{what} is another's or missing")))
    }

    /// Gives the server the file at `from`; `false` when there is none.
    ///
    /// # Durability
    /// By one rename. Who dies before it leaves the file where it was, to be given to the next who asks or
    /// removed as unfinished; PostgreSQL then asks again. After it, it is PostgreSQL's, which syncs it.
    pub(super) fn give(&self, from: &Path) -> Result<bool> {
        self.still_waits()?;
        match fs::rename(from, &self.request.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => {
                let name = &self.request.name;
                Err(Error::io(format!("unable to hand over WAL file '{name}'"), &error))
            }
        }
    }

    /// As [`Asked::give`], for a file that was just made.
    pub(super) fn give_made(&self, made: &Unfinished) -> Result<WalGet> {
        match self.give(made.path())? {
            true => Ok(WalGet::Found),
            false => {
                Err(Error::new(Kind::NotFound, format!("'{}' is gone", made.path().display())))
            }
        }
    }

    /// A place beside the path for a file that is being made. What others left there who died is removed.
    pub(super) fn unfinished(&self) -> Result<Unfinished> {
        let path = &self.request.path;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        remove_unfinished(&wal_directory_of(path)?, Some(&name))?;
        let pid = std::process::id();
        Ok(Unfinished(path.with_file_name(format!("{name}.{pid}.part"))))
    }
}

impl Postmaster {
    fn of(lock_file: &Path) -> Result<Option<Self>> {
        let text = match file::read_to_string(lock_file, LOCK_FILE_BYTES_MAX) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.context(|| format!("unable to read '{}'", lock_file.display()))?,
        };
        let line = |index| text.lines().nth(index).unwrap_or_default().trim().to_owned();
        Ok(Some(Self { pid: line(0), start_time: line(2) }))
    }
}

/// A file that is removed when it is not given to anybody.
#[derive(Debug)]
pub(super) struct Unfinished(PathBuf);

impl Unfinished {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Unfinished {
    /// Its name has this process's number: nobody else's file goes.
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_told_from_the_next_by_its_process_and_its_start() {
        let data = tempfile::tempdir().unwrap();
        let wal = data.path().join("pg_wal");
        fs::create_dir(&wal).unwrap();
        let (name, path) = ("00000002.history".to_owned(), wal.join("RECOVERYHISTORY"));
        let request = WalGetRequest { name, path };
        let runs = |text: &str| fs::write(data.path().join(LOCK_FILE), text).unwrap();
        let by_hand = Asked::now(&request).unwrap();
        runs("71\n/data\n1700000000\n5432\n\n\n  123 4\nstarting\n");
        by_hand.still_waits().unwrap();
        let asked = Asked::now(&request).unwrap();
        runs("71\n/data\n1700000000\n5432\n/tmp\n*\n  123 4\nready   \n");
        asked.still_waits().unwrap();
        for next in ["72\n/data\n1700000000\n", "71\n/data\n1700000001\n", ""] {
            runs(next);
            assert_eq!(asked.still_waits().unwrap_err().kind(), Kind::Cancelled, "{next}");
        }
        fs::remove_file(data.path().join(LOCK_FILE)).unwrap();
        assert!(asked.still_waits().is_err());
    }

    #[test]
    fn what_is_unfinished_is_removed_by_who_made_it_or_when_he_is_dead() {
        let data = tempfile::tempdir().unwrap();
        let (name, path) = ("00000002.history".to_owned(), data.path().join("RECOVERYHISTORY"));
        let request = WalGetRequest { name, path };
        let asked = Asked::now(&request).unwrap();
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
        let another = format!("RECOVERYHISTORY.{parent}.part");
        // No process has so great a number.
        let others = [&another, "RECOVERYHISTORY.2147483632.part", "RECOVERYXLOG.2147483632.part"];
        for other in others {
            fs::write(data.path().join(other), "").unwrap();
        }
        let unfinished = asked.unfinished().unwrap();
        fs::write(unfinished.path(), "1\t0/0\tno reason\n").unwrap();
        drop(unfinished);
        let left = fs::read_dir(data.path()).unwrap();
        let mut left: Vec<_> =
            left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, [another.as_str(), "RECOVERYXLOG.2147483632.part"]);
    }
}
