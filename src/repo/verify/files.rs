//! Whether the pieces in a backup's footers make up every file, each byte once.
//!
//! Packs are looked at in their order; a file's pieces lie in packs that follow one another, so only
//! files that are not complete yet are held.

use std::collections::{BTreeMap, HashMap};

use crate::repo::pack::{EntryKind, FilePath, PackFooter};

/// Most incomplete files that are held; a writer of ours leaves a handful open at the end of a pack.
const OPEN_FILES_MAX: usize = 1_000_000;

/// Files seen in part.
#[derive(Default)]
pub(super) struct Files {
    open: HashMap<FilePath, OpenFile>,
    /// Regular files of which an end was seen.
    pub(super) file_count: u64,
}

struct OpenFile {
    size_bytes: u64,
    /// Pieces, by offset; those that touch are joined.
    pieces: BTreeMap<u64, u64>,
    ended: bool,
}

impl OpenFile {
    /// Adds `[start, end)`; false when part of it was there.
    fn add(&mut self, start: u64, end: u64) -> bool {
        let before = self.pieces.range(..=start).next_back().map(|(s, e)| (*s, *e));
        let after = self.pieces.range(start..).next().map(|(s, e)| (*s, *e));
        if before.is_some_and(|(_, e)| e > start) || after.is_some_and(|(s, _)| s < end) {
            return false;
        }
        let (mut joined_start, mut joined_end) = (start, end);
        if let Some((s, _)) = before.filter(|(_, e)| *e == start) {
            joined_start = s;
        }
        if let Some((s, e)) = after.filter(|(s, _)| *s == end) {
            self.pieces.remove(&s);
            joined_end = e;
        }
        self.pieces.insert(joined_start, joined_end);
        true
    }

    fn is_complete(&self) -> bool {
        let whole = || self.pieces.iter().eq([(&0, &self.size_bytes)]);
        self.ended && (self.size_bytes == 0 || whole())
    }
}

impl Files {
    /// Takes in a pack's footer; the first thing that is wrong.
    pub(super) fn add(&mut self, footer: &PackFooter) -> Result<(), String> {
        for entry in &footer.entries {
            let EntryKind::File { size_bytes, crc32c } = entry.kind else { continue };
            let known = self.open.entry(entry.path.clone()).or_insert_with(|| OpenFile {
                size_bytes,
                pieces: BTreeMap::new(),
                ended: false,
            });
            if known.size_bytes != size_bytes {
                return Err(format!("file '{}' has two sizes", entry.path));
            }
            if crc32c.is_some() {
                if known.ended {
                    return Err(format!("file '{}' ends twice", entry.path));
                }
                known.ended = true;
                self.file_count += 1;
            }
        }
        let spans = footer.frames.iter().flat_map(|frame| &frame.spans);
        let spans = spans.map(|span| (span.entry, span.file_offset, u64::from(span.bytes)));
        let zeros = footer.zero_runs.iter().map(|run| (run.entry, run.file_offset, run.bytes));
        for (entry, start, bytes) in spans.chain(zeros) {
            let entry = footer.entries.get(entry as usize);
            let Some(entry) = entry.filter(|_| bytes > 0) else { continue };
            let end = start.saturating_add(bytes);
            let file = self.open.get_mut(&entry.path);
            if !file.is_some_and(|file| end <= file.size_bytes && file.add(start, end)) {
                let path = &entry.path;
                return Err(format!("bytes {start}..{end} of file '{path}' do not fit into it"));
            }
        }
        self.open.retain(|_, file| !file.is_complete());
        if self.open.len() > OPEN_FILES_MAX {
            return Err(format!("{} files are open at once", self.open.len()));
        }
        Ok(())
    }

    /// After the last pack: the files that are not complete, by path.
    pub(super) fn incomplete(self) -> Vec<FilePath> {
        let mut paths: Vec<FilePath> = self.open.into_keys().collect();
        paths.sort_unstable();
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::pack::{Entry, ZeroRun};

    fn footer(size_bytes: u64, ends: bool, pieces: &[(u64, u64)]) -> PackFooter {
        let kind = EntryKind::File { size_bytes, crc32c: ends.then_some(1) };
        let path = FilePath::new("base/1/2").unwrap();
        let zero_runs = pieces.iter().map(|(file_offset, bytes)| ZeroRun {
            entry: 0,
            file_offset: *file_offset,
            bytes: *bytes,
        });
        PackFooter {
            entries: vec![Entry { path, mode: 0, mtime: 0, kind }],
            zero_runs: zero_runs.collect(),
            ..PackFooter::default()
        }
    }

    #[test]
    fn a_file_is_complete_when_every_byte_came_once() {
        let mut files = Files::default();
        files.add(&footer(100, false, &[(40, 20), (0, 40)])).unwrap();
        assert_eq!(files.open.len(), 1);
        files.add(&footer(100, true, &[(60, 40)])).unwrap();
        assert_eq!((files.file_count, files.incomplete().len()), (1, 0));
        let mut files = Files::default();
        files.add(&footer(0, true, &[])).unwrap();
        assert!(files.incomplete().is_empty());
    }

    #[test]
    fn holes_overlaps_and_second_ends_are_found() {
        let mut files = Files::default();
        files.add(&footer(100, true, &[(0, 40), (41, 59)])).unwrap();
        assert_eq!(files.incomplete().len(), 1);
        for pieces in [&[(0, 40), (39, 2)][..], &[(39, 2), (0, 40)], &[(90, 11)], &[(0, 9), (0, 9)]]
        {
            assert!(Files::default().add(&footer(100, true, pieces)).is_err(), "{pieces:?}");
        }
        let mut files = Files::default();
        files.add(&footer(100, true, &[(0, 10)])).unwrap();
        assert!(files.add(&footer(100, true, &[])).unwrap_err().contains("ends twice"));
        assert!(files.add(&footer(99, false, &[])).unwrap_err().contains("two sizes"));
    }
}
