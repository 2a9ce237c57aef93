//! The archives of `BASE_BACKUP` to files of a backup.
//!
//! Members pass through without being copied; of the three small files that say what the backup is
//! (`backup_label`, `global/pg_control`, `tablespace_map`) a copy is kept to check and to learn from.

use bytes::{Bytes, BytesMut};

use super::names::{Names, Node};
use super::tar::{ArchiveEnd, Member, MemberKind, Splitter, TarEvent};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::backup_label::BACKUP_LABEL_BYTES_MAX;
use crate::pg::{BackupLabel, ControlFile};
use crate::repo::{BackupWriter, FileMeta, FilePath, Tablespace};

/// Largest of the files kept: `pg_control` has 8 KiB, a label 200 bytes.
const KEPT_BYTES_MAX: u64 = BACKUP_LABEL_BYTES_MAX as u64;

/// What the small files said.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// `backup_label`, the first file of the main archive.
    pub(super) label: Option<BackupLabel>,
    /// `global/pg_control`, the last file of the main archive.
    pub(super) control: Option<ControlFile>,
}

/// The archives in their order.
#[derive(Debug)]
pub(super) struct Files {
    /// How each archive ends.
    archive_end: ArchiveEnd,
    /// `None` between archives.
    splitter: Option<Splitter>,
    /// Whose archive it is; `None` for the data directory.
    tablespace: Option<Tablespace>,
    /// Put in front of each member's path: the tablespace.
    prefix: String,
    /// Members of this archive so far.
    member_count: u64,
    /// The tablespace of which the server has just sent nothing.
    absent: Option<Tablespace>,
    /// Path and content of the file being kept.
    keeping: Option<(String, BytesMut)>,
    in_file: bool,
    found: Found,
    names: Names,
}

impl Default for Files {
    fn default() -> Self {
        Self::new(ArchiveEnd::default())
    }
}

impl Files {
    /// Before the first archive.
    #[must_use]
    pub(super) fn new(archive_end: ArchiveEnd) -> Self {
        Self {
            archive_end,
            splitter: None,
            tablespace: None,
            prefix: String::new(),
            member_count: 0,
            absent: None,
            keeping: None,
            in_file: false,
            found: Found::default(),
            names: Names::default(),
        }
    }

    /// The archive of `tablespace`, or of the data directory itself, begins.
    ///
    /// # Errors
    /// As [`Self::finish`], for the archive before.
    pub(super) fn begin_archive(&mut self, tablespace: Option<Tablespace>) -> Result<()> {
        self.end_archive()?;
        self.splitter = Some(Splitter::new());
        self.names = Names::default();
        self.member_count = 0;
        let prefix = tablespace.as_ref().map(|one| format!("pg_tblspc/{}/", one.oid));
        self.prefix = prefix.unwrap_or_default();
        self.tablespace = tablespace;
        Ok(())
    }

    /// A tablespace has a folder of its version at least. Where the server finds none it sends an archive
    /// without members and no error, for the tablespace may have been dropped meanwhile.
    fn end_archive(&mut self) -> Result<()> {
        let Some(splitter) = self.splitter.take() else { return Ok(()) };
        splitter.finish(self.archive_end)?;
        self.absent = self.tablespace.take().filter(|_| self.member_count == 0);
        Ok(())
    }

    /// The tablespace of which the server has just sent nothing, once.
    pub(super) fn take_absent(&mut self) -> Option<Tablespace> {
        self.absent.take()
    }

    /// The next bytes of the archive, into `backup`.
    ///
    /// # Errors
    /// `corrupt` for what is no archive, or has a path twice; what the store reported meanwhile.
    pub(super) async fn write(&mut self, bytes: Bytes, backup: &mut BackupWriter) -> Result<()> {
        let outside = || Error::new(Kind::Corrupt, "the server sent bytes outside an archive");
        self.splitter.as_mut().ok_or_else(outside)?.push(bytes);
        while let Some(event) = self.splitter.as_mut().ok_or_else(outside)?.next()? {
            match event {
                TarEvent::Begin(member) => self.begin(member, backup).await?,
                TarEvent::Data(data) => {
                    if let Some((_, content)) = &mut self.keeping {
                        content.extend_from_slice(&data);
                    }
                    backup.write(data).await?;
                }
                TarEvent::End => self.end(backup).await?,
            }
        }
        Ok(())
    }

    async fn begin(&mut self, member: Member, backup: &mut BackupWriter) -> Result<()> {
        let path = FilePath::new([self.prefix.as_bytes(), &member.path].concat())
            .context(|| "unable to take a member of the base backup")?;
        let node = match member.kind {
            MemberKind::Directory => Node::Directory,
            MemberKind::File | MemberKind::Symlink(_) => Node::Leaf,
        };
        if !self.names.add(&member.path, node) {
            let message = format!("the server's base backup has '{path}' twice");
            return Err(Error::new(Kind::Corrupt, message)
                .hint("Check the server's file system, then take the backup again."));
        }
        self.member_count += 1;
        let mtime = i64::try_from(member.mtime_seconds).unwrap_or(i64::MAX);
        match member.kind {
            MemberKind::File => {
                self.keeping = self.wants(&path, member.size_bytes);
                self.in_file = true;
                let (mode, size_bytes) = (member.mode, member.size_bytes);
                backup.begin_file(FileMeta { path, mode, mtime, size_bytes }).await
            }
            MemberKind::Directory => backup.add_directory(path, member.mode, mtime).await,
            MemberKind::Symlink(target) => backup.add_symlink(path, mtime, target).await,
        }
    }

    fn wants(&self, path: &FilePath, size_bytes: u64) -> Option<(String, BytesMut)> {
        let path =
            path.as_str().filter(|path| ["backup_label", "global/pg_control"].contains(path))?;
        (size_bytes <= KEPT_BYTES_MAX).then(|| (path.to_owned(), BytesMut::new()))
    }

    async fn end(&mut self, backup: &mut BackupWriter) -> Result<()> {
        if !std::mem::take(&mut self.in_file) {
            return Ok(());
        }
        match self.keeping.take() {
            Some((path, content)) if path == "backup_label" => {
                self.found.label = Some(BackupLabel::decode(&content)?);
            }
            Some((_, content)) => self.found.control = Some(ControlFile::decode(&content)?),
            None => {}
        }
        backup.end_file().await
    }

    /// Ends the last archive and gives what was found.
    ///
    /// # Errors
    /// `corrupt` when it ended inside a member, or a file that every backup has was not in it;
    /// `unavailable` when it was a tablespace's and empty.
    pub(super) fn finish(mut self) -> Result<(BackupLabel, ControlFile)> {
        self.end_archive()?;
        if let Some(absent) = self.take_absent() {
            return Err(missing_tablespace(&absent));
        }
        let missing = |name: &str| {
            Error::new(Kind::Corrupt, format!("the server sent a base backup without '{name}'"))
        };
        let label = self.found.label.ok_or_else(|| missing("backup_label"))?;
        let control = self.found.control.ok_or_else(|| missing("global/pg_control"))?;
        Ok((label, control))
    }
}

/// What is wrong when `tablespace` still exists and the server has sent nothing of it.
pub(super) fn missing_tablespace(tablespace: &Tablespace) -> Error {
    let Tablespace { oid, location } = tablespace;
    let message = format!(
        "unable to back up tablespace {oid}: the server finds none of its files in '{location}'"
    );
    Error::new(Kind::Unavailable, message).hint(
        "Mount its file system on the server, or put its directory back; if it is being dropped, \
         take the backup again.",
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tar::tests::member;
    use super::*;
    use crate::clock::Clock;
    use crate::pg::{Lsn, TimelineId};
    use crate::pipeline::{Budget, Level};
    use crate::repo::packing::NoInspection;
    use crate::repo::{BackupId, Encryption, PackOptions, Repository};

    fn tablespace() -> Tablespace {
        Tablespace { oid: 16_400, location: "/mnt/far".to_owned() }
    }

    #[tokio::test]
    async fn a_path_may_come_once_in_each_archive() {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 7);
        let (_, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let id = BackupId::new(clock.now(), TimelineId::FIRST, Lsn(0x200_0028));
        let level = Level::default();
        let budget = Budget::backup(64 << 20, 1, level);
        let options = PackOptions { budget, level, pack_bytes: 1 << 20 };
        let mut backup = writer.backup(id, options, Arc::new(NoInspection)).unwrap();
        let mut files = Files::new(ArchiveEnd::Bare);
        for archive in [Some(tablespace()), None] {
            files.begin_archive(archive).unwrap();
            for path in ["base/1", "base/2"] {
                files.write(Bytes::from(member(path, b"x")), &mut backup).await.unwrap();
            }
        }
        let again = files.write(Bytes::from(member("base/1", b"y")), &mut backup).await;
        let error = again.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        assert!(error.message().contains("has 'base/1' twice"), "{error}");
        backup.abort().await;
    }

    #[test]
    fn an_archive_of_a_tablespace_is_never_empty() {
        let mut files = Files::new(ArchiveEnd::Bare);
        files.begin_archive(Some(tablespace())).unwrap();
        files.begin_archive(Some(tablespace())).unwrap();
        assert_eq!(files.take_absent(), Some(tablespace()));
        assert_eq!(files.take_absent(), None);
        let error = files.finish().unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.message().contains("tablespace 16400"), "{error}");
        assert!(error.message().contains("in '/mnt/far'"), "{error}");
    }
}
