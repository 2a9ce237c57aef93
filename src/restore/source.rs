//! The plain WAL of a repository, extent by extent.

use std::future::Future;

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange};
use crate::repo::names::EXTENT_PLAIN_BYTES_MAX;
use crate::repo::patience::insist;
use crate::repo::{ExtentName, Reader, Repository, WalCatalog, list_extents};

use super::scan::WalSource;

/// How often a request is made whose answer does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// Once: somebody waits for the answer, or asks again by himself.
    Once,
    /// For as long as a store is given to come back ([`patience`](crate::repo::patience)).
    UntilAnswered,
}

/// Reads extents. Where one cannot be had, because compaction has joined it with others since it was
/// listed or because its object is damaged, its WAL is read from others that hold it.
#[derive(Debug)]
pub(crate) struct RepositoryWal {
    reader: Reader,
    asks: Asks,
}

impl RepositoryWal {
    /// The WAL that `reader` can open.
    pub(crate) fn new(reader: &Reader) -> Self {
        Self { reader: reader.clone(), asks: Asks::Once }
    }

    /// The same for a restore, which has begun and would begin anew.
    pub(crate) fn of_restore(reader: &Reader) -> Self {
        Self { reader: reader.clone(), asks: Asks::UntilAnswered }
    }

    /// Makes a request of the repository, as often as it is worth.
    ///
    /// # Errors
    /// Those of the request.
    pub(crate) async fn ask<T, F>(&self, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        match self.asks {
            Asks::Once => request().await,
            Asks::UntilAnswered => insist(self.repository().clock(), request).await,
        }
    }

    pub(crate) fn repository(&self) -> &Repository {
        self.reader.repository()
    }

    /// The bytes of an extent that cannot be had, from others that hold them: what took its place, or
    /// what it was joined from, which compaction keeps when the joint object is not what it has put.
    ///
    /// # Errors
    /// `cause`, which says what is wrong with the extent, when no others have all of them.
    async fn read_others(&self, name: &ExtentName, cause: Error) -> Result<Bytes> {
        // The longest extent that may hold its first byte begins one extent earlier.
        let from = Lsn(name.range.start().0.saturating_sub(EXTENT_PLAIN_BYTES_MAX));
        let starts = LsnRange::new(from, name.range.end()).unwrap_or(name.range);
        let listed = list_extents(self.repository(), name.timeline, starts).await?;
        let mut others = WalCatalog::new(listed).without(|found| found == name);
        'plan: loop {
            let Ok(cover) = others.cover(name.timeline, name.range) else { return Err(cause) };
            let mut bytes = BytesMut::new();
            let mut position = name.range.start();
            for extent in cover {
                let plain = match self.reader.extent(&extent).await {
                    Err(error) if may_be_elsewhere(&error) => {
                        others = others.without(|found| *found == extent);
                        continue 'plan;
                    }
                    read => read?,
                };
                let until = extent.range.end().min(name.range.end());
                bytes.extend_from_slice(part(&plain, &extent, (position, until))?);
                position = until;
            }
            // That one was joined with others, or expired, since it was listed is in order.
            if cause.kind() != Kind::NotFound {
                tracing::warn!("{cause}; its WAL was read from other extents, which hold it too");
            }
            return Ok(bytes.freeze());
        }
    }
}

/// Whether an error says that this object cannot be had, and nothing about the store.
fn may_be_elsewhere(error: &Error) -> bool {
    matches!(error.kind(), Kind::NotFound | Kind::Corrupt | Kind::Unsupported)
}

fn part<'a>(plain: &'a [u8], extent: &ExtentName, (from, until): (Lsn, Lsn)) -> Result<&'a [u8]> {
    let index = |lsn: Lsn| usize::try_from(lsn.saturating_since(extent.range.start())).ok();
    let range = LsnRange::new(from, until).and_then(|_| index(from).zip(index(until)));
    range.and_then(|(from, until)| plain.get(from..until)).ok_or_else(|| {
        Error::new(Kind::Corrupt, format!("extent '{extent}' is shorter than its name says"))
    })
}

impl WalSource for RepositoryWal {
    fn extent(&self, name: &ExtentName) -> impl Future<Output = Result<Bytes>> + Send {
        let name = *name;
        self.ask(move || async move {
            match self.reader.extent(&name).await {
                Err(error) if may_be_elsewhere(&error) => self.read_others(&name, error).await,
                other => other,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::clock::Clock;
    use crate::pg::{SegmentSize, TimelineId};
    use crate::repo::compaction::{self, CompactionOptions};
    use crate::repo::{DecryptionIdentity, Encryption, ExtentBuilder, Level, Object};
    use crate::store::ObjectName;
    use crate::store::memory::Memory;

    const MIB: u64 = 1 << 20;
    const CUTS: [u64; 4] = [0, 1000, 2000, MIB];

    struct Scene {
        memory: Memory,
        wal: RepositoryWal,
    }

    fn extent(start: u64, end: u64) -> ExtentName {
        let range = LsnRange::new(Lsn(start), Lsn(end)).unwrap();
        ExtentName { timeline: TimelineId::FIRST, range, time: None }
    }

    /// WAL whose every byte tells its position.
    fn wal_bytes(range: LsnRange) -> Bytes {
        let byte = |at| u8::try_from(at / 7 % 251).unwrap();
        (range.start().0..range.end().0).map(byte).collect()
    }

    impl Scene {
        /// Parts of one segment and the object that compaction has made of them, not yet one without
        /// the other.
        async fn joined() -> Self {
            let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
            let (memory, repository) = Repository::in_memory(&clock).await;
            let identity = DecryptionIdentity::generate();
            let encryption = Encryption::Recipients(vec![identity.recipient()]);
            let writer = repository.writer(&encryption).await.unwrap();
            for cut in CUTS.windows(2) {
                let name = extent(cut[0], cut[1]);
                let (timeline, start) = (name.timeline, name.range.start());
                let level = Level::default();
                let mut builder = ExtentBuilder::new(&writer, timeline, start, level).unwrap();
                builder.push(wal_bytes(name.range)).unwrap();
                writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(700)).await;
            let size = SegmentSize::new(1 << 20).unwrap();
            let options = CompactionOptions::new(size);
            let listed = WalCatalog::load_tail(&repository, TimelineId::FIRST, Lsn(0), size).await;
            let plan = compaction::plan(&listed.unwrap(), &BTreeSet::new(), &options, clock.now());
            let report = compaction::apply(&repository, &plan, &options).await.unwrap();
            assert_eq!(report.joint_count, 1);
            Self { memory, wal: RepositoryWal::new(&repository.reader(vec![identity])) }
        }

        fn object(&self, name: ExtentName) -> ObjectName {
            self.wal.repository().name(&Object::Extent(name)).unwrap()
        }

        /// Flips a bit behind all headers and lengths.
        fn flip(&self, name: ExtentName) {
            self.memory.damage(&self.object(name), |body| body[200] ^= 1).unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wal_of_a_damaged_joint_extent_is_read_from_its_parts_while_they_are_there() {
        let scene = Scene::joined().await;
        let joint = extent(0, MIB);
        let whole = wal_bytes(joint.range);
        assert_eq!(scene.wal.extent(&joint).await.unwrap(), whole);
        scene.flip(joint);
        assert_eq!(scene.wal.extent(&joint).await.unwrap(), whole);
        scene.memory.damage(&scene.object(joint), |body| body.truncate(100)).unwrap();
        assert_eq!(scene.wal.extent(&joint).await.unwrap(), whole);
        // Of a damaged part only the joint one has the same bytes.
        scene.flip(extent(1000, 2000));
        let error = scene.wal.extent(&joint).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.message().contains(scene.object(joint).as_str()), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn wal_of_a_damaged_part_is_read_from_the_joint_extent() {
        let scene = Scene::joined().await;
        let part = extent(1000, 2000);
        scene.flip(part);
        assert_eq!(scene.wal.extent(&part).await.unwrap(), wal_bytes(part.range));
        scene.flip(extent(0, MIB));
        assert_eq!(scene.wal.extent(&part).await.unwrap_err().kind(), Kind::Corrupt);
    }
}
