//! The names in an archive, each of which may come once: of a path that comes twice, the bytes would be in
//! the backup twice, and no restore could tell which it is made of.
//!
//! # Shape
//! The server goes depth first. So only the names in the directories on the way to the member being sent
//! are kept, each as a hash, and at most [`NAMES_MAX`] of them (some 20 MB). A directory that was left is
//! not come back to; only `global/pg_control` is sent at the end, from outside its directory.
//!
//! # Source
//! `perform_base_backup` and `sendDir` in `src/backend/backup/basebackup.c` (13 to 18).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::pg::control::XLOG_CONTROL_FILE;

/// Most names kept at a time: those of a database with some hundred thousand tables. What is in a larger
/// directory is taken on trust.
const NAMES_MAX: usize = 1 << 20;

/// The names that came so far in an archive.
#[derive(Debug, Default)]
pub(super) struct Names {
    root: Level,
    /// The directory last sent and those it is in, outermost first.
    open: Vec<(Vec<u8>, Level)>,
    kept_count: usize,
    has_control: bool,
}

/// What came of one directory.
#[derive(Debug, Default)]
struct Level(HashSet<u64>);

/// Whether something is in a directory or can have things in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    /// A file or a link.
    Leaf,
    /// A directory.
    Directory,
}

impl Names {
    /// Takes in a path without a slash at its ends; false when it, or a directory above it that was left
    /// since, came before.
    #[must_use]
    pub(super) fn add(&mut self, path: &[u8], node: Node) -> bool {
        if path == XLOG_CONTROL_FILE.as_bytes() {
            return !std::mem::replace(&mut self.has_control, true);
        }
        let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => path.split_at(slash),
            None => (&[][..], path),
        };
        let mut depth = 0;
        for part in above.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            if self.open.get(depth).is_none_or(|(open, _)| open != part) {
                self.leave(depth);
                if !self.keep(part) {
                    return false;
                }
                self.open.push((part.to_vec(), Level::default()));
            }
            depth += 1;
        }
        self.leave(depth);
        let name = name.strip_prefix(b"/").unwrap_or(name);
        let is_new = self.keep(name);
        if node == Node::Directory {
            self.open.push((name.to_vec(), Level::default()));
        }
        is_new
    }

    /// Forgets what came of all but the `depth` outermost directories.
    fn leave(&mut self, depth: usize) {
        for (_, level) in self.open.drain(depth..) {
            self.kept_count -= level.0.len();
        }
    }

    /// Keeps a name in the innermost directory; false when it is there.
    fn keep(&mut self, name: &[u8]) -> bool {
        let level = self.open.last_mut().map_or(&mut self.root, |(_, level)| level);
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let hash = hasher.finish();
        if self.kept_count >= NAMES_MAX {
            return !level.0.contains(&hash);
        }
        let is_new = level.0.insert(hash);
        self.kept_count += usize::from(is_new);
        is_new
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Says what [`Names::add`] should: keeps every path that ever came, and those of the directories that
    /// are not left yet.
    #[derive(Default)]
    struct Model {
        came: HashSet<String>,
        open: Vec<String>,
    }

    impl Model {
        fn add(&mut self, path: &str, node: Node) -> bool {
            let ends = path.match_indices('/').map(|(slash, _)| slash);
            for (depth, above) in ends.map(|end| path.get(..end).unwrap()).enumerate() {
                if self.open.get(depth).is_none_or(|open| open != above) {
                    self.open.truncate(depth);
                    if !self.came.insert(above.to_owned()) {
                        return false;
                    }
                    self.open.push(above.to_owned());
                }
            }
            self.open.truncate(path.matches('/').count());
            let is_new = self.came.insert(path.to_owned());
            if node == Node::Directory {
                self.open.push(path.to_owned());
            }
            is_new
        }
    }

    proptest! {
        /// Up to the first that is refused, with which a backup ends.
        #[test]
        fn forgetting_directories_that_were_left_changes_no_answer(
            sent in proptest::collection::vec(("[ab](/[ab]){0,3}", any::<bool>()), 0..12)
        ) {
            let (mut names, mut model) = (Names::default(), Model::default());
            for (path, is_directory) in sent {
                let node = if is_directory { Node::Directory } else { Node::Leaf };
                let is_taken = names.add(path.as_bytes(), node);
                prop_assert_eq!(is_taken, model.add(&path, node), "{}", path);
                if !is_taken {
                    break;
                }
            }
        }
    }

    /// The paths that are refused, of those that end in a slash the directories.
    fn refused<'a>(paths: &[&'a str]) -> Vec<&'a str> {
        let mut names = Names::default();
        let is_refused = |path: &&str| match path.strip_suffix('/') {
            Some(path) => !names.add(path.as_bytes(), Node::Directory),
            None => !names.add(path.as_bytes(), Node::Leaf),
        };
        paths.iter().copied().filter(is_refused).collect()
    }

    #[test]
    fn what_a_server_sends_is_taken() {
        let sent = [
            "backup_label",
            "pg_wal/",
            "pg_wal/archive_status/",
            "pg_wal/summaries/",
            "global/",
            "global/1262",
            "global/pg_filenode.map",
            "base/",
            "base/1/",
            "base/1/1262",
            "base/1/pg_filenode.map",
            "base/5/",
            "base/5/1262",
            "base/pgsql_tmp/",
            "pg_tblspc/",
            "pg_tblspc/16400",
            "PG_VERSION",
            "global/pg_control",
        ];
        assert_eq!(refused(&sent), [""; 0]);
    }

    #[test]
    fn what_comes_twice_is_refused_wherever_it_is() {
        for (sent, twice) in [
            (&["a", "b", "a"][..], "a"),
            (&["a/", "a/b", "a/c/", "a/c/d", "a/b"], "a/b"),
            (&["a/", "a/b/", "a/b/c", "x", "a/b/c"], "a/b/c"),
            (&["a/", "a/"], "a/"),
            (&["a/b", "a"], "a"),
            (&["a", "a/b"], "a/b"),
            (&["global/", "global/pg_control", "x", "global/pg_control"], "global/pg_control"),
        ] {
            assert_eq!(refused(sent), [twice], "{sent:?}");
        }
    }

    #[test]
    fn no_more_names_are_kept_than_the_limit_and_those_of_a_left_directory_make_room() {
        let mut names = Names::default();
        assert!(names.add(b"a", Node::Directory));
        for number in 0..NAMES_MAX + 10 {
            assert!(names.add(format!("a/{number}").as_bytes(), Node::Leaf));
        }
        assert_eq!(names.kept_count, NAMES_MAX);
        assert!(!names.add(b"a/5", Node::Leaf), "those that are kept count on");
        assert!(names.add(b"b", Node::Leaf));
        assert_eq!(names.kept_count, 2);
        assert!(!names.add(b"a", Node::Leaf));
    }
}
