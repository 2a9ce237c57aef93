//! Files that somebody else has written, read up to a named maximum; folders that survive a crash.
//!
//! In: a path, and the greatest size that makes sense for what it should hold. Out: the content, or
//! `InvalidData`. Whoever names a device, a pipe that never ends or the wrong file is told so before
//! memory is gone.
//!
//! # Invariants
//! Bytes are counted as they are read. What the file system says of a size before tells nothing of a
//! device or a pipe, and a file may grow.

use std::fs::{DirBuilder, File};
use std::io::{Error, ErrorKind, Read, Result};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// All bytes of the file.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>> {
    let file = File::open(path)?;
    let size_bytes = file.metadata()?.len().min(bytes_max);
    // Room for all at once: a buffer that grows leaves copies behind, and this may be a key.
    let mut bytes = Vec::with_capacity(usize::try_from(size_bytes).unwrap_or(0) + 1);
    read_into(&mut bytes, file, bytes_max)?;
    Ok(bytes)
}

/// All of the file as text.
pub(crate) fn read_to_string(path: &Path, bytes_max: u64) -> Result<String> {
    let text = String::from_utf8(read(path, bytes_max)?);
    text.map_err(|error| Error::new(ErrorKind::InvalidData, error.utf8_error()))
}

/// All that `source`, an open file, still holds.
pub(crate) fn read_into(bytes: &mut Vec<u8>, source: impl Read, bytes_max: u64) -> Result<()> {
    source.take(bytes_max.saturating_add(1)).read_to_end(bytes)?;
    if bytes.len() as u64 > bytes_max {
        let flaw = format!("it has more than {bytes_max} bytes");
        return Err(Error::new(ErrorKind::InvalidData, flaw));
    }
    Ok(())
}

/// Makes the folder and those above it that are missing, each with `mode`.
///
/// # Durability
/// All that were made survive a crash when this returns. Each is made when those above it do, so a
/// call that dies on the way leaves one at most of which that is not known, the last: the folder that a
/// later call finds. That one is fsynced too, as far as we may and its file system can; where we may
/// not, it is not ours.
pub(crate) fn make_folders(path: &Path, mode: u32) -> Result<()> {
    make_folders_by(path, mode, &mut |folder| File::open(folder)?.sync_all())
}

fn make_folders_by(
    path: &Path,
    mode: u32,
    sync: &mut impl FnMut(&Path) -> Result<()>,
) -> Result<()> {
    let above = match path.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        Some(_) => Path::new("."),
        None => return Ok(()),
    };
    if path.is_dir() {
        return match sync(above) {
            Err(error) if says_nothing(&error) => Ok(()),
            synced => synced,
        };
    }
    make_folders_by(above, mode, sync)?;
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists || !path.is_dir() => Err(error),
        _ => sync(above),
    }
}

/// Whether the error of an fsync is one of rights, or of file systems that have none (automounters).
fn says_nothing(error: &Error) -> bool {
    use ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    [InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported].contains(&error.kind())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_that_was_made_and_the_one_found_are_synced_in_the_folder_above() {
        let folder = tempfile::tempdir().unwrap();
        let (found, last) = (folder.path().join("a"), folder.path().join("a/b/c"));
        std::fs::create_dir(&found).unwrap();
        let mut synced = Vec::new();
        let mut note = |folder: &Path| {
            synced.push((folder.to_owned(), last.is_dir()));
            Ok(())
        };
        make_folders_by(&last, 0o700, &mut note).unwrap();
        let before = |path: &Path| (path.to_owned(), false);
        let expected = [before(folder.path()), before(&found), (found.join("b"), true)];
        assert_eq!(synced, expected);
        let mut failing = |_: &Path| Err(Error::from(ErrorKind::PermissionDenied));
        make_folders_by(&last, 0o700, &mut failing).unwrap();
        assert!(make_folders_by(&last.join("d"), 0o700, &mut failing).is_err());
    }

    #[test]
    fn folders_are_made_with_those_above_them_and_a_file_is_not_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/c");
        for _ in 0..2 {
            make_folders(&path, 0o700).unwrap();
            assert!(path.is_dir());
        }
        std::fs::write(path.join("file"), "").unwrap();
        for path in [path.join("file"), path.join("file/d")] {
            assert!(make_folders(&path, 0o700).is_err());
        }
        make_folders(Path::new("/"), 0o700).unwrap();
    }

    #[test]
    fn a_file_is_read_up_to_its_maximum_and_not_cut_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (text, whole) in [("", true), ("1234", true), ("12345", false)] {
            std::fs::write(&path, text).unwrap();
            let read = read_to_string(&path, 4);
            assert_eq!(read.is_ok(), whole, "{text}");
            match read {
                Ok(found) => assert_eq!(found, text),
                Err(error) => assert_eq!(error.to_string(), "it has more than 4 bytes"),
            }
        }
        std::fs::write(&path, b"\xff").unwrap();
        assert_eq!(read_to_string(&path, 4).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    #[test]
    fn what_has_no_size_and_no_end_is_refused() {
        let error = read(Path::new("/dev/zero"), 1 << 16).unwrap_err();
        assert_eq!(error.to_string(), "it has more than 65536 bytes");
    }
}
