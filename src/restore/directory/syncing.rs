//! Writing out what a restore has written, so that nothing of it can be missing later without a word.
//!
//! # Durability
//! The whole file system is written out by one call (`syncfs`): syncing a hundred thousand files one by one
//! costs more than writing them. From Linux 5.8 on that call reports what could not be written since its
//! descriptor was opened, which is before the first write. An older Linux reports nothing of a single file,
//! nor does the call that other systems have (`sync`): there every file is synced too, which reports it. The
//! call before leaves such an error where `fsync` finds it.
//!
//! # Source
//! "vfs: track per-sb writeback errors and report them to syncfs" (Linux 5.8), `filemap_fdatawait_keep_errors`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::open_directory;
use crate::error::{Context, Result};
use crate::file;

/// Where Linux says which release it is.
const OSRELEASE: &str = "/proc/sys/kernel/osrelease";
/// Longest name of a release.
const OSRELEASE_BYTES_MAX: u64 = 256;

/// A directory that is written to.
#[derive(Debug)]
pub(super) struct Written {
    path: PathBuf,
    folder: File,
}

impl Written {
    /// Before the first write.
    pub(super) fn begin(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_path_buf(), folder: open_directory(path)? })
    }

    /// The directory itself, whatever its path leads to by now.
    pub(super) fn folder(&self) -> &File {
        &self.folder
    }

    /// Writes everything out.
    ///
    /// # Errors
    /// What could not be written, now or since the beginning.
    pub(super) fn sync(&self) -> Result<()> {
        let attempted = || format!("unable to write out all of '{}'", self.path.display());
        sync_file_system(&self.folder).context(attempted)?;
        if syncfs_tells_errors() {
            return Ok(());
        }
        visit(&self.path, &mut |path| {
            let synced = File::open(path).and_then(|open| open.sync_all());
            synced.context(|| format!("unable to sync '{}'", path.display()))
        })
    }
}

/// Writes out everything of the file system that `folder` is in.
fn sync_file_system(folder: &File) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return rustix::fs::syncfs(folder).map_err(Into::into);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        rustix::fs::sync();
        Ok(())
    }
}

/// Whether that reports what could not be written.
fn syncfs_tells_errors() -> bool {
    let release = file::read_to_string(Path::new(OSRELEASE), OSRELEASE_BYTES_MAX);
    cfg!(target_os = "linux") && release.is_ok_and(|release| is_from_5_8_on(&release))
}

fn is_from_5_8_on(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 8),
        _ => false,
    }
}

/// Shows `look` every file and every folder in `folder`, which comes last; links are not followed, for
/// where those of tablespaces lead is looked at by itself.
fn visit(folder: &Path, look: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    let attempted = || format!("unable to list '{}'", folder.display());
    for entry in fs::read_dir(folder).context(attempted)? {
        let entry = entry.context(attempted)?;
        let found = entry.file_type().context(attempted)?;
        if found.is_dir() {
            visit(&entry.path(), look)?;
        } else if found.is_file() {
            look(&entry.path())?;
        }
    }
    look(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_that_tell_errors_are_known() {
        for release in ["5.8.0", "5.8", "5.15.0-1-amd64", "6.1.0-rc1\n", "10.0"] {
            assert!(is_from_5_8_on(release), "{release}");
        }
        for release in ["4.18.0-553.el8_10.x86_64", "5.7.19", "3.10", "", "x", "5", "five.8"] {
            assert!(!is_from_5_8_on(release), "{release}");
        }
    }

    #[test]
    fn every_file_is_synced_and_no_link_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("data");
        fs::create_dir_all(root.join("base/1")).unwrap();
        for file in ["PG_VERSION", "base/1/2", "base/1/3"] {
            fs::write(root.join(file), "x").unwrap();
        }
        fs::write(dir.path().join("elsewhere"), "x").unwrap();
        std::os::unix::fs::symlink(dir.path(), root.join("base/link")).unwrap();
        let mut seen = Vec::new();
        visit(&root, &mut |path| {
            seen.push(path.strip_prefix(&root).unwrap().display().to_string());
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.pop().as_deref(), Some(""));
        seen.sort();
        assert_eq!(seen, ["PG_VERSION", "base", "base/1", "base/1/2", "base/1/3"]);
        Written::begin(&root).unwrap().sync().unwrap();
    }
}
