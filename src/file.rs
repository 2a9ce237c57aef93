//! Files that somebody else has written, read up to a named maximum.
//!
//! In: a path, and the greatest size that makes sense for what it should hold. Out: the content, or
//! `InvalidData`. Whoever names a device, a pipe that never ends or the wrong file is told so before
//! memory is gone.
//!
//! # Invariants
//! Bytes are counted as they are read. What the file system says of a size before tells nothing of a
//! device or a pipe, and a file may grow.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
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

#[cfg(test)]
mod tests {
    use super::*;

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
