//! The plain WAL of a repository, extent by extent.

use std::future::Future;

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize};
use crate::repo::names::EXTENT_PLAIN_BYTES_MAX;
use crate::repo::patience::insist;
use crate::repo::{ExtentName, Reader, Repository, WalCatalog};

use super::scan::WalSource;

/// How often a request is made whose answer does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// Once: somebody waits for the answer, or asks again by himself.
    Once,
    /// For as long as a store is given to come back ([`patience`](crate::repo::patience)).
    UntilAnswered,
}

/// Reads extents, also those that compaction has joined since they were listed.
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

    /// The bytes of an extent that is no longer there from those that took its place.
    async fn read_successors(&self, name: &ExtentName, cause: Error) -> Result<Bytes> {
        // The longest extent that may hold its first byte begins one extent earlier.
        let from = Lsn(name.range.start().0.saturating_sub(EXTENT_PLAIN_BYTES_MAX));
        let size = SegmentSize::DEFAULT;
        let catalog = WalCatalog::load_tail(self.repository(), name.timeline, from, size).await?;
        let Ok(cover) = catalog.cover(name.timeline, name.range) else { return Err(cause) };
        if cover.contains(name) {
            return Err(cause);
        }
        let mut bytes = BytesMut::new();
        let mut position = name.range.start();
        for extent in cover {
            let plain = self.reader.extent(&extent).await?;
            let until = extent.range.end().min(name.range.end());
            bytes.extend_from_slice(part(&plain, &extent, (position, until))?);
            position = until;
        }
        Ok(bytes.freeze())
    }
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
                Err(error) if error.kind() == Kind::NotFound => {
                    self.read_successors(&name, error).await
                }
                other => other,
            }
        })
    }
}
