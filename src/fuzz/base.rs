//! The archives of a base backup.

use bytes::Bytes;

use super::input::{Input, pieces};
use crate::capture::base::tar::{ArchiveEnd, Member, MemberKind, Splitter, TarEvent};

/// A member as two readings of an archive are compared: its header and content.
type Read = (Member, Vec<u8>, bool);

/// Members and contents are the same however the archive comes; a file's content is as long as its
/// header says, and nothing is longer than the archive.
pub(super) fn tar(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sizes = input.sizes();
    let archive = Bytes::copy_from_slice(input.rest());
    let whole = split(std::iter::once(archive.clone()));
    let pieced = split(pieces(&archive, &sizes).map(|piece| archive.slice_ref(piece)));
    assert_eq!(whole.0, pieced.0);
    assert_eq!(whole.1.is_err(), pieced.1.is_err(), "{:?} {:?}", whole.1, pieced.1);

    let mut content_bytes = 0;
    for (member, content, ended) in &whole.0 {
        content_bytes += content.len();
        match member.kind {
            MemberKind::File if *ended => assert_eq!(content.len() as u64, member.size_bytes),
            MemberKind::File => assert!(content.len() as u64 <= member.size_bytes),
            MemberKind::Directory | MemberKind::Symlink(_) => assert!(content.is_empty()),
        }
        assert!(member.mode <= 0o7777);
        assert!(!member.path.ends_with(b"/"));
    }
    assert!(content_bytes <= archive.len());
}

fn split(archive: impl Iterator<Item = Bytes>) -> (Vec<Read>, Result<(), String>) {
    let mut splitter = Splitter::new();
    let mut members: Vec<Read> = Vec::new();
    for piece in archive {
        splitter.push(piece);
        loop {
            match splitter.next() {
                Ok(None) => break,
                Ok(Some(TarEvent::Begin(member))) => {
                    assert!(members.last().is_none_or(|last| last.2), "a member in a member");
                    members.push((member, Vec::new(), false));
                }
                Ok(Some(TarEvent::Data(data))) => {
                    assert!(!data.is_empty());
                    let last = members.last_mut().filter(|last| !last.2);
                    last.expect("data of no member").1.extend_from_slice(&data);
                }
                Ok(Some(TarEvent::End)) => {
                    let last = members.last_mut().filter(|last| !last.2);
                    last.expect("the end of no member").2 = true;
                }
                Err(error) => return (members, Err(error.to_string())),
            }
        }
    }
    (members, splitter.finish(ArchiveEnd::Bare).map_err(|error| error.to_string()))
}
