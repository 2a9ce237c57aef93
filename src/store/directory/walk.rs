//! Listing a tree of files in the byte order of object names, a page at a time.
//!
//! `a-b` sorts before `a/b` and that before `ab`, so a folder sorts by its name with the slash.
//!
//! # Invariants
//! Memory is bounded by the page, not by the folder: of each folder only the first names that could
//! still be on the page are kept.

use super::{Opened, is_missing, object_info};
use crate::error::{Context, Error, Result};
use crate::store::{ListPage, ObjectInfo, ObjectName};

/// The first `count_max` objects with `prefix` after `after`.
pub(super) fn page(
    root: &Opened,
    prefix: &str,
    after: Option<&ObjectName>,
    count_max: usize,
) -> Result<ListPage> {
    let after = after.map_or("", ObjectName::as_str);
    let start = prefix.rfind('/').map_or("", |slash| prefix.split_at(slash + 1).0);
    let mut walk = Walk { root, prefix, after, count_max, objects: Vec::new(), more: false };
    walk.folder(start)?;
    Ok(ListPage { objects: walk.objects, more: walk.more })
}

/// Names gathered beyond need before the surplus is thrown out.
const SORT_BATCH: usize = 1024;

/// Whether a folder has more names than were kept.
#[derive(PartialEq, Eq)]
enum Rest {
    None,
    LeftOut,
}

struct Walk<'a> {
    root: &'a Opened,
    prefix: &'a str,
    after: &'a str,
    count_max: usize,
    objects: Vec<ObjectInfo>,
    more: bool,
}

impl Walk<'_> {
    /// Lists the folder of that name ("" or ending with a slash) and those below it.
    fn folder(&mut self, folder: &str) -> Result<()> {
        let mut floor = String::new();
        loop {
            let (names, rest) = self.entries(folder, &floor)?;
            for name in &names {
                if self.more {
                    return Ok(());
                }
                if name.ends_with('/') {
                    self.folder(name)?;
                } else {
                    self.object(name)?;
                }
            }
            // Names were left out to bound the memory, and those kept did not fill the page: files
            // vanished, or folders were empty.
            match (rest, names.last()) {
                (Rest::LeftOut, Some(last)) if !self.more => floor.clone_from(last),
                _ => return Ok(()),
            }
        }
    }

    fn object(&mut self, name: &str) -> Result<()> {
        let Ok(name) = ObjectName::new(name) else { return Ok(()) };
        let found = match self.root.stat(name.as_str()) {
            Ok(found) => found,
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => {
                return Err(Error::io(format!("unable to look at object '{name}'"), &error));
            }
        };
        if self.objects.len() == self.count_max {
            self.more = true;
        } else {
            self.objects.push(object_info(name, &found)?);
        }
        Ok(())
    }

    /// Names of files and, with a slash, of folders in `folder` that the page may need, sorted, from
    /// after `floor` on.
    fn entries(&self, folder: &str, floor: &str) -> Result<(Vec<String>, Rest)> {
        let attempted = || format!("unable to list folder '{folder}'");
        let entries = match self.root.entries(folder) {
            Err(error) if is_missing(&error) => return Ok((Vec::new(), Rest::None)),
            entries => entries.context(attempted)?,
        };
        // One more than fits tells that there is more.
        let keep = self.count_max - self.objects.len() + 1;
        let (mut names, mut rest) = (Vec::new(), Rest::None);
        for entry in entries {
            let entry = entry.map_err(std::io::Error::from).context(attempted)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name.starts_with('.') {
                continue;
            }
            let is_folder = self.root.is_folder(folder, &entry)?;
            let name = format!("{folder}{name}{}", if is_folder { "/" } else { "" });
            if name.as_str() > floor && self.wanted(&name) {
                names.push(name);
            }
            if names.len() >= 2 * keep + SORT_BATCH {
                names.select_nth_unstable(keep);
                names.truncate(keep);
                rest = Rest::LeftOut;
            }
        }
        names.sort_unstable();
        if rest == Rest::LeftOut {
            // What came after names were left out may lie behind some of those.
            names.truncate(keep);
        }
        Ok((names, rest))
    }

    /// Whether the file or anything in the folder of this name belongs on the page.
    fn wanted(&self, name: &str) -> bool {
        let is_folder = name.ends_with('/');
        let in_prefix = name.starts_with(self.prefix) || is_folder && self.prefix.starts_with(name);
        let is_after = name > self.after || is_folder && self.after.starts_with(name);
        in_prefix && is_after
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::root::Root;
    use super::*;

    /// The first names yield no object, so the page is filled from those behind, of which most were left out.
    #[test]
    fn no_name_is_passed_over_in_a_folder_of_more_names_than_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let count = SORT_BATCH + 200;
        for number in 0..count {
            fs::write(folder.path().join(format!("b{number:05}")), b"").unwrap();
        }
        for number in 0..10 {
            fs::create_dir(folder.path().join(format!("a{number}"))).unwrap();
        }
        let root = Root::new(folder.path().to_owned());
        let root = root.open().unwrap().unwrap();
        let (mut listed, mut after) = (Vec::new(), None);
        loop {
            let page = page(&root, "", after.as_ref(), 5).unwrap();
            listed.extend(page.objects.iter().map(|object| object.name.to_string()));
            after = page.objects.last().map(|object| object.name.clone());
            if !page.more || listed.len() > 100 {
                break;
            }
        }
        let expected: Vec<String> =
            (0..listed.len()).map(|number| format!("b{number:05}")).collect();
        assert_eq!(listed, expected);
        assert!(listed.len() > 100);
    }
}
