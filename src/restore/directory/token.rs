//! What shows of which restore all is that is in the directory of a tablespace.
//!
//! A marker stays as long as nobody runs its restore again. The directories that it names may belong to
//! another restore by then, or to the cluster that was there before: their paths alone prove nothing.
//!
//! # Shape
//! An empty file `tidemark.restoring.<32 hexadecimal digits>` in the directory; the marker has the digits.
//!
//! # Invariants
//! 1. It gets its name in a directory that holds nothing else. So whatever is beside it came later, into a
//!    directory that a restore had visibly taken.
//! 2. A directory is emptied only while it holds the token of the marker that has it emptied.
//!
//! # Durability
//! Dying on any line destroys nothing foreign, and leaves nothing that the next restore could not clear:
//! - *Taken*: first the marker is durable, then the token gets its name, then that is durable, and only then
//!   is anything written beside it. Before that the directory is empty, or has what somebody else put there;
//!   the one needs no clearing and the other gets none.
//! - *Cleared*: the token goes when all the rest is durably gone, and the marker is not written anew before
//!   that too is durable. A directory without it is empty.
//! - *Finished*: the marker loses what it says when it is filled with `pg_control`; until it has become that
//!   file its last words are in `pg_wal`, durable before it loses them. The tokens go after that. A token that
//!   was to go and has not is beside a finished cluster: no marker is left that has it, and PostgreSQL looks
//!   at nothing in the directory but the folder of its own version.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::MARKER;
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};

/// Digits of a token, so many that two are never alike.
const DIGITS: usize = 32;

/// The token of one restore; shown as the name of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token(u128);

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// `bug` when the operating system has no randomness to give.
    pub fn draw(clock: &Clock) -> Result<Self> {
        Ok(Self(u128::from_be_bytes(clock.random()?)))
    }

    /// Its name until it is known to be alone.
    fn new_name(self) -> String {
        format!("{self}.new")
    }

    /// Puts it into `folder`, the directory at `place`, which must hold nothing.
    ///
    /// # Errors
    /// `conflict` when something else is there.
    pub(super) fn put(self, folder: &File, place: &Path) -> Result<()> {
        let attempted = || format!("unable to restore a tablespace into '{}'", place.display());
        let (name, new_name) = (self.to_string(), self.new_name());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let create = || openat(folder, &new_name, flags, Mode::RUSR | Mode::WUSR).map(drop);
        create().map_err(io::Error::from).context(attempted)?;
        // Two that take it at the same time both come here, and one of them at least sees the other.
        if let Some(other) = first_but(folder, &new_name).context(attempted)? {
            unlinkat(folder, &new_name, AtFlags::empty())
                .map_err(io::Error::from)
                .context(attempted)?;
            let message = format!("{}: '{other}' has come into it", attempted());
            return Err(Error::new(Kind::Conflict, message)
                .hint("Somebody else is at work there. Name a new or empty directory."));
        }
        renameat(folder, &new_name, folder, &name).map_err(io::Error::from).context(attempted)?;
        folder.sync_all().context(attempted)
    }

    /// Whether all that is in `folder` is of the restore that has this token. One that died on its way to
    /// the name has left nothing beside it.
    pub(super) fn is_in(self, folder: &File) -> io::Result<bool> {
        if is_there(folder, &self.to_string())? {
            return Ok(true);
        }
        let new_name = self.new_name();
        Ok(is_there(folder, &new_name)? && first_but(folder, &new_name)?.is_none())
    }

    /// Removes it, if it is there.
    pub(super) fn remove(self, folder: &File) -> io::Result<()> {
        match unlinkat(folder, self.to_string(), AtFlags::empty()) {
            Err(error) if error != Errno::NOENT => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// The first name in `folder` that is not `known`.
pub(super) fn first_but(folder: &File, known: &str) -> io::Result<Option<String>> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if ![c".", c".."].contains(&name) && name.to_bytes() != known.as_bytes() {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

fn is_there(folder: &File, name: &str) -> io::Result<bool> {
    match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARKER}.{:0DIGITS$x}", self.0)
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        format!("{:0DIGITS$x}", token.0)
    }
}

impl TryFrom<String> for Token {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_whole = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).ok().filter(|_| is_whole);
        number.map(Self).ok_or("a token of 32 hexadecimal digits was expected")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_token_is_put_only_where_nothing_is() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::system());
        let folder = File::open(dir.path()).unwrap();
        let names = || {
            let names = fs::read_dir(dir.path()).unwrap();
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        let (first, second) = (Token::draw(&clock).unwrap(), Token::draw(&clock).unwrap());
        first.put(&folder, dir.path()).unwrap();
        assert_eq!(names(), [first.to_string()]);
        let error = second.put(&folder, dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error}");
        assert_eq!(names(), [first.to_string()]);
        assert_eq!((first.is_in(&folder).unwrap(), second.is_in(&folder).unwrap()), (true, false));
        first.remove(&folder).unwrap();
        first.remove(&folder).unwrap();

        // On its way to the name it proves nothing but that nothing was written yet.
        fs::write(dir.path().join(second.new_name()), "").unwrap();
        assert!(second.is_in(&folder).unwrap());
        fs::write(dir.path().join("precious"), "x").unwrap();
        assert!(!second.is_in(&folder).unwrap());
    }

    #[test]
    fn what_is_no_token_names_no_file() {
        let token = Token(7);
        let text = serde_json::to_string(&token).unwrap();
        assert_eq!(serde_json::from_str::<Token>(&text).unwrap(), token);
        for bad in
            ["", "7", "+0000000000000000000000000000007", "../../../../../../../../etc/precious"]
        {
            assert!(serde_json::from_value::<Token>(bad.into()).is_err(), "{bad}");
        }
    }
}
