//! Root at work for another account: what is done with the account's rights, and not with root's.
//!
//! Where the account may write, it says what a name means: it can put a link to anybody's file where root
//! is about to write. Done with the account's own rights, nothing leads further than the account may go
//! by itself.
//!
//! # Invariants
//! - Rights are those of one thread. [`as_account`] has them back when its work is done, and that work
//!   begins no thread and no process, which would go on with them.
//! - A program that [`spawn`] starts has all groups of the account and none of root's.
//!
//! # Source
//! `credentials(7)`, "C library/kernel differences" in `setresuid(2)` and `setgroups(2)`: for the kernel of
//! Linux each thread has its own. Elsewhere root works as root, and starts with the account's first group.

use std::process::{Child, Command};

use super::directory::Owner;
use crate::error::{Context, Result};

/// Does `work`, for root with the rights of `account`; that must not start threads or processes.
///
/// # Errors
/// Those of the work; as the operating system says when this process may not act for others.
pub(crate) fn as_account<T>(account: Option<Owner>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(account) = account.filter(|_| Owner::process_is_root()) else { return work() };
    let attempted = || format!("unable to act for user {}", account.uid);
    let _lent = thread::Lent::begin(account).context(attempted)?;
    work()
}

/// Starts `command`, for root as `account` with all its groups.
///
/// # Errors
/// As the operating system says.
pub(crate) fn spawn(account: Owner, mut command: Command) -> Result<Child> {
    let attempted = format!("unable to start '{}'", command.get_program().display());
    let started = match Owner::process_is_root() {
        true => thread::spawn(account, command),
        false => command.spawn(),
    };
    started.context(|| attempted)
}

#[cfg(target_os = "linux")]
mod thread {
    use std::io;
    use std::process::{Child, Command};

    use rustix::io::Errno;
    use rustix::process::{Gid, Uid, getegid, getgroups};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

    use crate::restore::directory::Owner;

    /// The rights of this thread are those of an account until this is dropped.
    #[derive(Debug)]
    pub(super) struct Lent {
        groups: Vec<Gid>,
        gid: Gid,
    }

    impl Lent {
        pub(super) fn begin(account: Owner) -> io::Result<Self> {
            let own = Self { groups: getgroups()?, gid: getegid() };
            set_groups(&[])?;
            set_thread_res_gid(None, Gid::from_raw(account.gid), None)?;
            set_thread_res_uid(None, Uid::from_raw(account.uid), None)?;
            Ok(own)
        }
    }

    impl Drop for Lent {
        fn drop(&mut self) {
            let back = set_thread_res_uid(None, Uid::ROOT, None)
                .and_then(|()| set_thread_res_gid(None, self.gid, None))
                .and_then(|()| set_groups(&self.groups));
            assert!(back.is_ok(), "a thread without the rights of its process: {back:?}");
        }
    }

    /// A child begins with the rights of the thread that starts it; this one ends with that.
    pub(super) fn spawn(account: Owner, mut command: Command) -> io::Result<Child> {
        let groups: Vec<Gid> = account.groups().into_iter().map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
        let start = move || {
            set_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            command.spawn()
        };
        let starter = std::thread::Builder::new().name("tm-account".to_owned()).spawn(start)?;
        starter.join().unwrap_or_else(|_panic| Err(io::Error::other("its thread ended early")))
    }

    /// A container may have taken from root the right to change groups; then it has none to spare.
    fn set_groups(groups: &[Gid]) -> Result<(), Errno> {
        match set_thread_groups(groups) {
            Err(Errno::PERM) => Ok(()),
            done => done,
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod thread {
    use std::io;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};

    use crate::restore::directory::Owner;

    #[derive(Debug)]
    pub(super) struct Lent;

    impl Lent {
        pub(super) fn begin(_: Owner) -> io::Result<Self> {
            Ok(Self)
        }
    }

    pub(super) fn spawn(account: Owner, mut command: Command) -> io::Result<Child> {
        command.uid(account.uid).gid(account.gid).spawn()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use super::*;
    use crate::error::Kind;

    #[test]
    fn root_has_the_rights_of_the_account_for_as_long_as_the_work_takes() {
        if !Owner::process_is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
        fs::create_dir(&theirs).unwrap();
        fs::write(&ours, "precious").unwrap();
        let account = Owner { uid: 12_345, gid: 12_346 };
        account.give(&theirs).unwrap();
        std::os::unix::fs::symlink(&ours, theirs.join("link")).unwrap();
        let write = |name: &str| {
            let path = theirs.join(name);
            as_account(Some(account), || fs::write(path, "x").context(|| "unable to write"))
        };
        assert_eq!(write("link").unwrap_err().kind(), Kind::Denied);
        assert_eq!(fs::read(&ours).unwrap(), b"precious");
        write("file").unwrap();
        let found = fs::metadata(theirs.join("file")).unwrap();
        assert_eq!((found.uid(), found.gid()), (12_345, 12_346));
        let groups = || rustix::process::getgroups().unwrap();
        let before = groups();
        assert_eq!(as_account(Some(account), || Ok(groups())).unwrap(), []);
        assert!(Owner::process_is_root() && groups() == before);
        fs::write(&ours, "x").unwrap();
    }
}
