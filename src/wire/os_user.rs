//! The operating system's users, as far as connecting needs them: our own name and home directory,
//! and the name behind a socket's user id.
//!
//! Read from `/etc/passwd`, so users that only a directory service knows are not found: such a user
//! names `user` and `HOME`.

use std::path::{Path, PathBuf};

use crate::file;

/// A larger `/etc/passwd` is not read: half a million users.
const PASSWD_BYTES_MAX: u64 = 64 << 20;

/// One line of `/etc/passwd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OsUser {
    /// Login name.
    pub(super) name: String,
    /// Home directory.
    pub(super) home: PathBuf,
}

/// The user we run as, if `/etc/passwd` knows it.
pub(super) fn current() -> Option<OsUser> {
    by_id(rustix::process::geteuid().as_raw())
}

/// The user with this id, if `/etc/passwd` knows it.
pub(super) fn by_id(id: u32) -> Option<OsUser> {
    find(&file::read_to_string(Path::new("/etc/passwd"), PASSWD_BYTES_MAX).ok()?, id)
}

fn find(passwd: &str, id: u32) -> Option<OsUser> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, _, _, home, ..] = fields.as_slice() else { return None };
        (uid.parse() == Ok(id))
            .then(|| OsUser { name: (*name).to_owned(), home: PathBuf::from(home) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_id() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nu:x:1000:1000:,,,:/home/u:/bin/sh\n";
        let user = find(passwd, 1000).unwrap();
        assert_eq!((user.name.as_str(), user.home), ("u", PathBuf::from("/home/u")));
        assert_eq!(find(passwd, 7), None);
    }
}
