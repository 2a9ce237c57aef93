//! The unprivileged account that servers and the binary under test run as.
//!
//! PostgreSQL refuses to run as root. Run as an ordinary user, the tests use that user; run as root
//! they use `postgres`, or `nobody` where there is no such account.

use std::hash::{Hash, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Who runs the servers.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// `None`: whoever runs the tests.
    ids: Option<(u32, u32)>,
}

impl Account {
    /// The account for this run.
    pub fn current() -> Self {
        if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
            return Self { ids: None };
        }
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
        let find = |name: &str| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        Self { ids: Some(find("postgres").or_else(|| find("nobody")).expect("an account")) }
    }

    /// Numbers of the account when it is not whoever runs the tests.
    pub fn ids(self) -> Option<(u32, u32)> {
        self.ids
    }

    /// A command that will run as this account, without the caller's settings for PostgreSQL, S3 and us, and
    /// with messages in English.
    pub fn command(self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if ["PG", "AWS_", "TIDEMARK_"].iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(&name);
            }
        }
        command.env_remove("LC_ALL").env_remove("LANGUAGE").env("LC_MESSAGES", "C");
        if let Some((uid, gid)) = self.ids {
            command.uid(uid).gid(gid).env("HOME", "/tmp");
        }
        command.current_dir("/tmp");
        command
    }

    /// A new folder that the account owns, deleted when dropped.
    pub fn temp_dir(self, name: &str) -> TempDir {
        let dir = tempfile::Builder::new().prefix(&format!("tidemark-{name}-")).tempdir().unwrap();
        self.own(dir.path());
        dir
    }

    /// A new folder inside `parent`, owned by the account.
    pub fn make_dir(self, parent: &Path, name: &str) -> PathBuf {
        let path = parent.join(name);
        std::fs::create_dir_all(&path).unwrap();
        self.own(&path);
        path
    }

    fn own(self, dir: &Path) {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).unwrap();
        self.give(dir);
    }

    /// Makes the account the owner of `path`.
    pub fn give(self, path: &Path) {
        if let Some((uid, gid)) = self.ids {
            chown(path, Some(uid), Some(gid)).unwrap();
        }
    }

    /// The `tidemark` binary of this build (or the one that `TIDEMARK_TEST_BINARY` names, to measure an
    /// optimised one) where the account can execute it: build folders are often inside a home that
    /// others may not enter.
    pub fn tidemark_binary(self) -> PathBuf {
        let built = std::env::var_os("TIDEMARK_TEST_BINARY")
            .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_tidemark")), PathBuf::from);
        if self.ids.is_none() {
            return built;
        }
        static COPY: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
        COPY.get_or_init(|| {
            // One copy for each build folder, replaced by the next build: statics are never dropped,
            // so a folder of this run's own would be left behind.
            let mut hash = std::hash::DefaultHasher::new();
            built.hash(&mut hash);
            let dir = std::env::temp_dir().join(format!("tidemark-test-{:016x}", hash.finish()));
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
            let fresh = dir.join(format!("tidemark.{}", std::process::id()));
            std::fs::copy(&built, &fresh).unwrap();
            // Whatever the umask was when it was built.
            std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755)).unwrap();
            let path = dir.join("tidemark");
            std::fs::rename(&fresh, &path).unwrap();
            path
        })
        .clone()
    }
}
