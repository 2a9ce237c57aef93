//! The WAL: every extent, those that a larger one holds included.
//!
//! Compaction and retention delete extents while we read. What took the place of a deleted one is read
//! instead; where nothing did, and retention does not say that it removed it, its WAL is lost.

use std::collections::BTreeSet;

use futures::StreamExt as _;
use futures::stream;

use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, TimelineId};
use crate::repo::coverage::{StoredExtent, WalCatalog};
use crate::repo::load::list_extents;
use crate::repo::marks;
use crate::repo::names::{EXTENT_PLAIN_BYTES_MAX, ExtentName, Object};

use super::{Defect, Found, Run, WalReport};

/// How often what took the place of deleted extents is looked for: joint objects are joined again a few
/// times at most, and rest in between for longer than a look takes.
const LOOKS_MAX: usize = 8;

enum Outcome {
    Whole,
    Vanished,
    Bad(String),
}

/// Which extents are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Draw {
    /// As the depth says.
    Sample,
    Each,
}

/// Checks all extents and adds what is bad to `found`.
pub(super) async fn check(run: &Run, wal: &WalCatalog, found: &mut Found) -> Result<()> {
    for timeline in wal.timelines() {
        let report =
            WalReport { timeline, extent_count: 0, whole_count: 0, bad_count: 0, plain_bytes: 0 };
        let mut pass = Pass { run, wal, found, report };
        let vanished = pass.read(wal.extents(timeline), Draw::Sample).await?;
        pass.follow(vanished).await?;
        let report = pass.report;
        found.wal.push(report);
        if found.is_full() {
            break;
        }
    }
    Ok(())
}

/// One timeline's WAL being read.
struct Pass<'a> {
    run: &'a Run,
    /// As it was listed first.
    wal: &'a WalCatalog,
    found: &'a mut Found,
    report: WalReport,
}

impl Pass<'_> {
    /// Reads extents, and gives those that were deleted since they were listed.
    async fn read(
        &mut self,
        extents: impl Iterator<Item = StoredExtent> + Send,
        draw: Draw,
    ) -> Result<Vec<ExtentName>> {
        let run = self.run;
        let mut vanished = Vec::new();
        let mut reads = stream::iter(extents)
            .map(|extent| async move {
                let is_read = draw == Draw::Each || run.draws()?;
                let outcome = if is_read { Some(read(run, &extent).await?) } else { None };
                run.done(extent.stored_bytes);
                Ok::<_, Error>((extent.name, outcome))
            })
            .buffer_unordered(run.options.jobs.max(1));
        while let Some(outcome) = reads.next().await {
            let (name, outcome) = outcome?;
            match outcome {
                None => self.report.extent_count += 1,
                Some(Outcome::Vanished) => vanished.push(name),
                Some(Outcome::Whole) => {
                    self.report.extent_count += 1;
                    self.report.whole_count += 1;
                    self.report.plain_bytes += name.range.len_bytes();
                }
                Some(Outcome::Bad(problem)) => {
                    self.report.extent_count += 1;
                    self.bad(name, problem)?;
                }
            }
            if self.found.is_full() {
                break;
            }
        }
        self.found.vanished_count += vanished.len() as u64;
        Ok(vanished)
    }

    fn bad(&mut self, name: ExtentName, problem: String) -> Result<()> {
        self.report.bad_count += 1;
        self.found.bad_extents.insert(name);
        let object = self.run.repository.name(&Object::Extent(name))?;
        self.found.add(self.run, Defect::new(object, None, problem));
        Ok(())
    }

    /// Reads what took the place of `vanished`.
    async fn follow(&mut self, mut vanished: Vec<ExtentName>) -> Result<()> {
        let run = self.run;
        let mut seen = BTreeSet::new();
        for _ in 0..LOOKS_MAX {
            if vanished.is_empty() || self.found.is_full() {
                return Ok(());
            }
            let now = around(run, self.report.timeline, vanished).await?;
            let mut holders = BTreeSet::new();
            for name in &now.vanished {
                match now.wal.cover(name.timeline, name.range) {
                    Ok(cover) => {
                        self.found.replaced.insert(*name);
                        holders.extend(cover);
                    }
                    Err(_) if name.range.end() <= now.horizon => {}
                    Err(gap) => {
                        let missing = gap.missing;
                        self.bad(
                            *name,
                            format!("it is gone, and nothing else holds WAL {missing}"),
                        )?;
                    }
                }
            }
            let is_new = |extent: &StoredExtent| {
                let listed = self.wal.extents_in(extent.name.timeline, extent.name.range);
                holders.contains(&extent.name)
                    && listed.into_iter().all(|listed| listed.name != extent.name)
                    && seen.insert(extent.name)
            };
            let fresh: Vec<StoredExtent> =
                now.wal.extents(self.report.timeline).filter(is_new).collect();
            let stored_bytes = fresh.iter().map(|extent| extent.stored_bytes).sum();
            run.progress.total_bytes.fetch_add(stored_bytes, std::sync::atomic::Ordering::Relaxed);
            self.found.fresh.extend_from_slice(&fresh);
            vanished = self.read(fresh.into_iter(), Draw::Each).await?;
        }
        for name in vanished {
            self.bad(
                name,
                "it and what took its place are gone as often as it is read".to_owned(),
            )?;
        }
        Ok(())
    }
}

/// What there is now where extents vanished.
struct Around {
    vanished: Vec<ExtentName>,
    wal: WalCatalog,
    /// What is missing before this was removed on purpose.
    horizon: Lsn,
}

async fn around(run: &Run, timeline: TimelineId, vanished: Vec<ExtentName>) -> Result<Around> {
    let starts = vanished.iter().map(|name| name.range.start()).min().unwrap_or_default();
    let end = vanished.iter().map(|name| name.range.end()).max().unwrap_or_default();
    // The longest extent that holds the first byte begins so far before it.
    let from = Lsn(starts.0.saturating_sub(EXTENT_PLAIN_BYTES_MAX));
    let extents = match LsnRange::new(from, end) {
        Some(range) => list_extents(&run.repository, timeline, range).await?,
        None => Vec::new(),
    };
    let gone: BTreeSet<ExtentName> = vanished.iter().copied().collect();
    let wal = WalCatalog::new(extents.into_iter().filter(|extent| !gone.contains(&extent.name)));
    // After the WAL: a mark is put before what it is about is deleted.
    let (marks, _) = marks::load(&run.repository).await?;
    let horizon = marks.expired.get(&timeline).copied().unwrap_or_default();
    Ok(Around { vanished, wal, horizon })
}

async fn read(run: &Run, extent: &StoredExtent) -> Result<Outcome> {
    let _room = run.room(extent.stored_bytes + extent.name.range.len_bytes()).await?;
    let opened = match run.reader.fetch_extent(&extent.name).await {
        Ok(fetched) => {
            run.opened();
            run.pool.run(move |worker| fetched.open(&mut worker.decompressor).map(drop)).await?
        }
        Err(error) => Err(error),
    };
    let Err(error) = opened else { return Ok(Outcome::Whole) };
    let object = run.repository.name(&Object::Extent(extent.name))?;
    if error.kind() == Kind::NotFound && run.is_gone(&object).await? {
        return Ok(Outcome::Vanished);
    }
    run.damage(error).map(Outcome::Bad)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::pg::PgTime;
    use crate::repo::catalog::Catalog;
    use crate::repo::verify::{VerifyOptions, VerifyReport};
    use crate::repo::{Encryption, ExtentBuilder, Level, Repository, SealedExtent, Writer, marks};
    use crate::store::Store as _;
    use crate::store::memory::Memory;

    const CUTS: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];

    struct Scene {
        memory: Memory,
        repository: Repository,
        /// As it was before anything was joined or deleted.
        stale: Catalog,
        parts: Vec<SealedExtent>,
    }

    fn sealed(writer: &Writer, start: u64, end: u64) -> SealedExtent {
        let level = Level::default();
        let mut builder = ExtentBuilder::new(writer, TimelineId::FIRST, Lsn(start), level).unwrap();
        builder.push(Bytes::from(vec![7; usize::try_from(end - start).unwrap()])).unwrap();
        builder.finish(Some(PgTime(i64::try_from(end).unwrap()))).unwrap()
    }

    async fn scene() -> Scene {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let mut parts = Vec::new();
        for cut in CUTS.windows(2) {
            parts.push(sealed(&writer, cut[0], cut[1]));
        }
        for part in &parts {
            writer.put_extent(part).await.unwrap();
        }
        let stale = Catalog::load(&repository).await.unwrap();
        Scene { memory, repository, stale, parts }
    }

    impl Scene {
        /// Puts some of the parts as one object, which `damage` may change, and deletes them.
        async fn join(&self, parts: &[SealedExtent], damage: impl FnOnce(&mut Vec<u8>)) {
            let (first, last) = (parts[0].name, parts[parts.len() - 1].name);
            let range = LsnRange::new(first.range.start(), last.range.end()).unwrap();
            let joint = Object::Extent(ExtentName { range, ..last });
            let mut body: Vec<u8> = parts.iter().flat_map(|part| part.body.to_vec()).collect();
            damage(&mut body);
            let name = self.repository.name(&joint).unwrap();
            self.memory.put_if_absent(&name, body.into()).await.unwrap();
            self.delete(parts).await;
        }

        async fn delete(&self, parts: &[SealedExtent]) {
            for part in parts {
                let name = self.repository.name(&Object::Extent(part.name)).unwrap();
                self.memory.delete(&[name]).await.unwrap();
            }
        }

        async fn verify(&self) -> VerifyReport {
            let options = VerifyOptions { thread_count: 0, ..VerifyOptions::new(1) };
            let reader = self.repository.reader(Vec::new());
            let run = Run::new(&self.repository, &reader, &options, &Arc::default()).unwrap();
            let mut catalog = self.stale.clone();
            let mut found = Found::default();
            check(&run, &catalog.wal, &mut found).await.unwrap();
            found.bring_up_to_date(&mut catalog.wal);
            found.report(&catalog, self.repository.clock().now(), &run)
        }
    }

    #[tokio::test]
    async fn what_was_joined_while_it_was_read_is_read_in_its_joint_object() {
        let scene = scene().await;
        scene.join(&scene.parts, |_| ()).await;
        let report = scene.verify().await;
        assert_eq!(report.defects, []);
        let wal = &report.wal[0];
        assert_eq!((wal.extent_count, wal.whole_count, wal.plain_bytes), (1, 1, 0x3000));
        assert_eq!(report.vanished_count, 3);
        assert!(report.to_string().contains("3 objects were deleted while"), "{report}");
    }

    #[tokio::test]
    async fn a_joint_object_that_took_the_place_of_what_was_listed_and_is_damaged_is_a_defect() {
        let scene = scene().await;
        scene.join(&scene.parts[..2], |body| *body.last_mut().unwrap() ^= 1).await;
        let report = scene.verify().await;
        assert_eq!(report.defects.len(), 1, "{report}");
        assert!(report.defects[0].object.contains("0000000000001000-0000000000003000"));
        let wal = &report.wal[0];
        assert_eq!((wal.extent_count, wal.whole_count, wal.bad_count), (2, 1, 1));
        assert!(report.defects[0].lost.iter().any(|lost| lost.to_string().contains("[0/1000")));
    }

    #[tokio::test]
    async fn what_vanished_without_anything_in_its_place_is_lost_unless_retention_removed_it() {
        let scene = scene().await;
        scene.delete(&scene.parts[..2]).await;
        let report = scene.verify().await;
        assert_eq!((report.defects.len(), report.wal[0].extent_count), (2, 1), "{report}");
        let mark = marks::expired(TimelineId::FIRST, Lsn(CUTS[2]));
        let name = scene.repository.name(&mark).unwrap();
        scene.memory.put_if_absent(&name, Bytes::new()).await.unwrap();
        let report = scene.verify().await;
        assert_eq!((report.defects.len(), report.vanished_count), (0, 2), "{report}");
    }
}
