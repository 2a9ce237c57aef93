//! Loading a catalog: few requests for few objects, several at a time for many.
//!
//! # Shape
//! A listing comes in pages one after the other, each beginning after the last name of the one
//! before: a million extents would be a thousand round trips in a row. Names are positions in the
//! WAL, so what is left of a listing is split at a position in between, and both halves are listed at
//! the same time, by at most [`LIST_JOBS_MAX`] requests. How WAL lies under the names is not known
//! before; a half that turns out empty costs one request.
//!
//! Memory: the pages in flight, and 32 bytes an extent.

use futures::StreamExt as _;
use futures::stream::{self, FuturesUnordered};

use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, LsnRange, SegmentSize, TimelineId};
use crate::store::{ListPage, ObjectInfo, ObjectName};

use super::catalog::{
    BAD_PACKS_MAX, BackupObjects, BackupSummary, Catalog, DamagedObject, IncompleteBackup,
    StoredKey,
};
use super::coverage::{StoredExtent, WalCatalog};
use super::lease;
use super::manifest::PublicManifest;
use super::marks;
use super::names::{BackupId, Object};
use super::{Repository, printable};

/// Listing requests in flight.
const LIST_JOBS_MAX: usize = 8;
/// Manifests and histories read at a time.
const READ_JOBS_MAX: usize = 8;
/// How many pages further the first guess at the middle of an unbounded rest lies.
const GUESS_PAGES: u64 = 64;
/// Before a hole, how far back an extent that reaches into it may begin: the longest segment.
const LOOK_BACK_BYTES: u64 = 1 << 30;

impl Catalog {
    /// Makes a catalog of what is there now.
    ///
    /// # Errors
    /// What the store reports. Objects that cannot be read are listed in [`Catalog::damaged`].
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn load(repository: &Repository) -> Result<Self> {
        let mut catalog = Self::default();
        catalog.load_backups(repository).await?;
        // The lease says what is stored by now: listed after it, the WAL holds it.
        catalog.load_keys_and_lease(repository).await?;
        let timelines = catalog.load_wal(repository).await?;
        catalog.load_histories(repository, timelines).await?;
        catalog.confirm_gaps(repository).await?;
        // A mark is put before what it is about changes: listed last, none is missing that the WAL needs.
        let (marks, foreign_count) = marks::load(repository).await?;
        catalog.marks = marks;
        catalog.foreign_count += foreign_count;
        catalog.forget_deleted(repository).await?;
        Ok(catalog)
    }

    /// Takes backups off the list that were deleted after it: their manifests went before their packs and
    /// their WAL, which may be missed here already.
    async fn forget_deleted(&mut self, repository: &Repository) -> Result<()> {
        let is_broken = |backup: &&BackupSummary| !self.is_restorable(backup);
        let broken: Vec<_> = self.backups.iter().filter(is_broken).map(BackupSummary::id).collect();
        let mut looks = stream::iter(broken)
            .map(async |id| {
                let manifest = repository.name(&Object::Manifest(id))?;
                Ok::<_, Error>((id, repository.store().head(&manifest).await?))
            })
            .buffered(READ_JOBS_MAX);
        while let Some(look) = looks.next().await {
            if let (id, None) = look? {
                self.backups.retain(|backup| backup.id() != id);
            }
        }
        Ok(())
    }

    async fn load_backups(&mut self, repository: &Repository) -> Result<()> {
        let mut found: Vec<Found> = Vec::new();
        let prefix = repository.cluster().base_prefix();
        let mut after: Option<ObjectName> = None;
        loop {
            let page = repository.store().list(&prefix, after.as_ref()).await?;
            for object in &page.objects {
                self.add_backup_object(repository, object, &mut found);
            }
            after = page.next_after()?;
            if after.is_none() {
                break;
            }
        }
        let (complete, incomplete): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|found| found.has_manifest);
        self.incomplete.extend(
            incomplete.into_iter().map(|f| IncompleteBackup { id: f.id, objects: f.objects }),
        );
        let read = stream::iter(complete)
            .map(async |found| (repository.public_manifest(found.id).await, found))
            .buffered(READ_JOBS_MAX)
            .collect::<Vec<_>>()
            .await;
        for (manifest, found) in read {
            match manifest {
                Ok(manifest) => self.backups.push(found.summary(manifest)),
                Err(error) => self.note(repository, Object::Manifest(found.id), error).await?,
            }
        }
        Ok(())
    }

    /// Notes that `object`, which was listed, cannot be read, unless `error` is about the store. One
    /// that is not found was deleted since, or the store errs: of what it lists and does not give,
    /// nothing is known, and least of all that it is gone.
    async fn note(&mut self, repository: &Repository, object: Object, error: Error) -> Result<()> {
        let name = repository.name(&object)?;
        match error.kind() {
            Kind::NotFound => {
                let listed = repository.store().list_all(name.as_str()).await?;
                if listed.iter().all(|object| object.name != name) {
                    return Ok(());
                }
            }
            kind if is_damage(kind) => {}
            _ => return Err(error),
        }
        let (backup, timeline) = match object {
            Object::Manifest(id) => (Some(id), None),
            Object::History(timeline) => (None, Some(timeline)),
            _ => (None, None),
        };
        let (object, problem) = (name.to_string(), printable(&error.to_string()));
        self.damaged.push(DamagedObject { object, backup, timeline, problem });
        Ok(())
    }

    /// Names come in order, so all objects of one backup are neighbours.
    fn add_backup_object(
        &mut self,
        repository: &Repository,
        object: &ObjectInfo,
        found: &mut Vec<Found>,
    ) {
        let (id, pack) = match Object::parse(repository.cluster(), &object.name) {
            Some(Object::Pack(pack)) => (pack.backup, Some(pack.number)),
            Some(Object::Manifest(id)) => (id, None),
            _ => {
                self.foreign_count += 1;
                return;
            }
        };
        if found.last().is_none_or(|last| last.id != id) {
            found.push(Found::new(id));
        }
        if let Some(last) = found.last_mut() {
            last.add(pack, object);
        }
    }

    async fn load_keys_and_lease(&mut self, repository: &Repository) -> Result<()> {
        for key in repository.store().list_all(&repository.cluster().keys_prefix()).await? {
            match Object::parse(repository.cluster(), &key.name) {
                Some(Object::Key(id)) => self.keys.push(StoredKey { id, modified: key.modified }),
                _ => self.foreign_count += 1,
            }
        }
        let name = repository.name(&Object::Lease)?;
        match lease::read(&**repository.store(), &name).await {
            Ok(lease) => self.lease = lease,
            Err(error) => self.note(repository, Object::Lease, error).await?,
        }
        Ok(())
    }

    async fn load_wal(&mut self, repository: &Repository) -> Result<Vec<TimelineId>> {
        let mut timelines = Vec::new();
        let (wal, foreign_count) = (&mut self.wal, &mut self.foreign_count);
        list_wal(
            repository,
            &mut |object| match Object::parse(repository.cluster(), &object.name) {
                Some(Object::Extent(name)) => wal.push(stored(name, object)),
                Some(Object::History(timeline)) => timelines.push(timeline),
                _ => *foreign_count += 1,
            },
        )
        .await?;
        self.wal.index();
        Ok(timelines)
    }

    async fn load_histories(
        &mut self,
        repository: &Repository,
        timelines: Vec<TimelineId>,
    ) -> Result<()> {
        let mut reads = stream::iter(timelines)
            .map(async |timeline| (timeline, repository.history(timeline).await))
            .buffered(READ_JOBS_MAX);
        while let Some((timeline, history)) = reads.next().await {
            match history {
                Ok(history) => {
                    self.histories.insert(timeline, history);
                }
                Err(error) => self.note(repository, Object::History(timeline), error).await?,
            }
        }
        Ok(())
    }

    /// Lists the names around each hole again.
    async fn confirm_gaps(&mut self, repository: &Repository) -> Result<()> {
        let gaps = self.lineage().gaps();
        if gaps.is_empty() {
            return Ok(());
        }
        for gap in gaps {
            let from = Lsn(gap.missing.start().0.saturating_sub(LOOK_BACK_BYTES));
            let around = LsnRange::new(from, gap.missing.end()).unwrap_or(gap.missing);
            for extent in list_extents(repository, gap.timeline, around).await? {
                self.wal.push(extent);
            }
        }
        self.wal.index();
        Ok(())
    }
}

impl WalCatalog {
    /// The WAL of one timeline from the segment that holds `from` on: all that a writer needs to find
    /// out where to go on, without listing the past.
    ///
    /// # Errors
    /// What the store reports.
    pub async fn load_tail(
        repository: &Repository,
        timeline: TimelineId,
        from: Lsn,
        segment_size: SegmentSize,
    ) -> Result<Self> {
        let start = segment_size.start_of(from);
        let all = LsnRange::new(start, Lsn(u64::MAX));
        let extents = match all {
            Some(range) => list_extents(repository, timeline, range).await?,
            None => Vec::new(),
        };
        Ok(Self::new(extents))
    }
}

/// Shows `take` each object of the WAL once, in no order.
///
/// # Errors
/// What the store reports.
pub(crate) async fn list_wal(
    repository: &Repository,
    take: &mut (dyn FnMut(&ObjectInfo) + Send),
) -> Result<()> {
    let begin = vec![Rest { after: None, scope: Scope::All }];
    list_in_parallel(repository, &repository.cluster().wal_prefix(), begin, take).await
}

/// Extents of `timeline` that begin inside `starts`.
///
/// # Errors
/// What the store reports.
pub async fn list_extents(
    repository: &Repository,
    timeline: TimelineId,
    starts: LsnRange,
) -> Result<Vec<StoredExtent>> {
    let mut extents = Vec::new();
    let prefix = repository.cluster().timeline_prefix(timeline);
    let after = before_start(&prefix, starts.start())?;
    let scope = Scope::Timeline { timeline, until: starts.end() };
    let begin = vec![Rest { after: Some(after), scope }];
    list_in_parallel(repository, &prefix, begin, &mut |object| {
        if let Some(Object::Extent(name)) = Object::parse(repository.cluster(), &object.name) {
            extents.push(stored(name, object));
        }
    })
    .await?;
    Ok(extents)
}

fn stored(name: super::names::ExtentName, object: &ObjectInfo) -> StoredExtent {
    StoredExtent { name, stored_bytes: object.size_bytes, modified: object.modified }
}

/// Kinds of error that mean "this object", not "the store".
fn is_damage(kind: Kind) -> bool {
    matches!(kind, Kind::Corrupt | Kind::Unsupported | Kind::Usage)
}

/// A backup while its objects are listed.
struct Found {
    id: BackupId,
    has_manifest: bool,
    objects: BackupObjects,
    /// Sizes by number, to be compared with the manifest's.
    packs: Vec<(u32, u64)>,
}

impl Found {
    fn new(id: BackupId) -> Self {
        Self { id, has_manifest: false, objects: BackupObjects::default(), packs: Vec::new() }
    }

    fn add(&mut self, pack: Option<u32>, object: &ObjectInfo) {
        let is_first = self.packs.is_empty() && !self.has_manifest;
        self.objects.newest = match (self.objects.newest, object.modified) {
            (_, modified) if is_first => modified,
            (Some(newest), Some(modified)) => Some(newest.max(modified)),
            _ => None,
        };
        self.objects.stored_bytes += object.size_bytes;
        match pack {
            Some(number) => {
                self.objects.pack_count += 1;
                self.packs.push((number, object.size_bytes));
            }
            None => self.has_manifest = true,
        }
    }

    fn summary(self, manifest: PublicManifest) -> BackupSummary {
        let mut objects = self.objects;
        let expected = (1_u32..).zip(&manifest.pack_bytes);
        let bad = expected.filter(|(number, bytes)| {
            let found = self.packs.binary_search_by_key(number, |(number, _)| *number);
            let size = found.ok().and_then(|index| self.packs.get(index)).map(|pack| pack.1);
            size != Some(**bytes)
        });
        objects.bad_packs = bad.map(|(number, _)| number).take(BAD_PACKS_MAX).collect();
        BackupSummary { manifest, objects }
    }
}

/// What is left to list.
#[derive(Clone, Debug)]
struct Rest {
    after: Option<ObjectName>,
    scope: Scope,
}

#[derive(Clone, Copy, Debug)]
enum Scope {
    /// Everything below the prefix.
    All,
    /// Extents of one timeline that begin before `until`.
    Timeline { timeline: TimelineId, until: Lsn },
}

/// The greatest name below a timeline's prefix that sorts before every extent that begins at `start`.
fn before_start(timeline_prefix: &str, start: Lsn) -> Result<ObjectName> {
    ObjectName::new(format!("{timeline_prefix}{:016X}", start.0))
}

async fn list_in_parallel(
    repository: &Repository,
    prefix: &str,
    begin: Vec<Rest>,
    take: &mut (dyn FnMut(&ObjectInfo) + Send),
) -> Result<()> {
    let cluster = repository.cluster();
    let mut waiting = begin;
    let mut running = FuturesUnordered::new();
    loop {
        while let Some(rest) = waiting.pop_if(|_| running.len() < LIST_JOBS_MAX) {
            running.push(async move {
                let prefix = match rest.scope {
                    Scope::All => prefix.to_owned(),
                    Scope::Timeline { timeline, .. } => cluster.timeline_prefix(timeline),
                };
                let page = repository.store().list(&prefix, rest.after.as_ref()).await;
                (rest.scope, page.context(|| "unable to list the WAL"))
            });
        }
        let Some((scope, page)) = running.next().await else { return Ok(()) };
        let page = page?;
        for object in page.objects.iter().filter(|object| is_inside(repository, scope, object)) {
            take(object);
        }
        let idle = LIST_JOBS_MAX.saturating_sub(running.len() + waiting.len());
        waiting.extend(what_is_left(repository, scope, &page, idle)?);
    }
}

fn extent_start(repository: &Repository, object: &ObjectInfo) -> Option<(TimelineId, Lsn)> {
    match Object::parse(repository.cluster(), &object.name) {
        Some(Object::Extent(name)) => Some((name.timeline, name.range.start())),
        _ => None,
    }
}

fn is_inside(repository: &Repository, scope: Scope, object: &ObjectInfo) -> bool {
    match scope {
        Scope::All => true,
        Scope::Timeline { until: Lsn(u64::MAX), .. } => true,
        Scope::Timeline { until, .. } => {
            extent_start(repository, object).is_none_or(|(_, start)| start < until)
        }
    }
}

/// What of `scope` comes after `page`: in one piece, or in two when a job is idle.
fn what_is_left(
    repository: &Repository,
    scope: Scope,
    page: &ListPage,
    idle: usize,
) -> Result<Vec<Rest>> {
    let after = page.next_after()?;
    let Some(last) = page.objects.last().filter(|_| after.is_some()) else { return Ok(Vec::new()) };
    let Some((timeline, last_start)) = extent_start(repository, last) else {
        return Ok(vec![Rest { after, scope }]);
    };
    let prefix = repository.cluster().timeline_prefix(timeline);
    let until = match scope {
        // The rest of this timeline, and those after it: 'Z' sorts behind every digit.
        Scope::All => {
            let own = Scope::Timeline { timeline, until: Lsn(u64::MAX) };
            let behind = Some(ObjectName::new(format!("{prefix}Z"))?);
            return Ok(vec![Rest { after: behind, scope }, Rest { after, scope: own }]);
        }
        Scope::Timeline { until, .. } => until,
    };
    if last_start >= until {
        return Ok(Vec::new());
    }
    let middle = middle(repository, page, last_start, until);
    if idle < 2 || middle <= last_start || middle >= until {
        return Ok(vec![Rest { after, scope }]);
    }
    let near = Rest { after, scope: Scope::Timeline { timeline, until: middle } };
    let far = Rest { after: Some(before_start(&prefix, middle)?), scope };
    Ok(vec![far, near])
}

/// Where to split what is left: halfway, or, when nobody knows where the WAL ends, as far away as many
/// pages like this one reach.
fn middle(repository: &Repository, page: &ListPage, last_start: Lsn, until: Lsn) -> Lsn {
    let left = until.saturating_since(last_start);
    if until != Lsn(u64::MAX) {
        return Lsn(last_start.0 + left / 2);
    }
    let first = page.objects.iter().find_map(|object| extent_start(repository, object));
    let page_bytes = first.map_or(0, |(_, start)| last_start.saturating_since(start)).max(1);
    Lsn(last_start.0 + page_bytes.saturating_mul(GUESS_PAGES).min(left / 2))
}

#[cfg(test)]
mod tests {

    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::pg::PgTime;
    use crate::repo::KeyId;
    use crate::repo::marks;
    use crate::repo::names::{ExtentName, PackName};
    use crate::store::memory::{Call, Memory, Outcome};
    use crate::store::{PutOutcome, Store};

    async fn scene() -> (Memory, Repository) {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 3);
        Repository::in_memory(&clock).await
    }

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    async fn put(memory: &Memory, repository: &Repository, object: Object) {
        let name = repository.name(&object).unwrap();
        let outcome = memory.put_if_absent(&name, Bytes::from_static(b"12345")).await.unwrap();
        assert_eq!(outcome, PutOutcome::Created);
    }

    fn extent(number: u32, start: u64, end: u64) -> ExtentName {
        let range = LsnRange::new(Lsn(start), Lsn(end)).unwrap();
        let time = Some(PgTime(i64::try_from(start).unwrap()));
        ExtentName { timeline: timeline(number), range, time }
    }

    /// Extents of several timelines, thick here and thin there, some far away.
    async fn put_wal(memory: &Memory, repository: &Repository, count: u64) -> Vec<ExtentName> {
        let mut names = Vec::new();
        let regions =
            [(1, 1 << 24, 10), (1, 1 << 40, 1000), (2, 1 << 41, 7), (9, 1 << 62, 1 << 20)];
        for (number, base, step) in regions {
            for index in 0..count / 4 {
                let start: u64 = base + index * step;
                names.push(extent(number, start, start + step));
            }
        }
        for name in &names {
            put(memory, repository, Object::Extent(*name)).await;
        }
        names
    }

    fn listed(catalog: &WalCatalog) -> Vec<ExtentName> {
        catalog
            .timelines()
            .flat_map(|timeline| catalog.extents(timeline).map(|extent| extent.name))
            .collect()
    }

    #[tokio::test]
    async fn many_names_are_listed_at_the_same_time_each_once() {
        let (memory, repository) = scene().await;
        let names = put_wal(&memory, &repository, 40_000).await;
        put(&memory, &repository, Object::History(timeline(3))).await;
        let mut found = Vec::new();
        let before = memory.requests();
        let begin = vec![Rest { after: None, scope: Scope::All }];
        let prefix = repository.cluster().wal_prefix();
        list_in_parallel(&repository, &prefix, begin, &mut |object| {
            if let Some(Object::Extent(name)) = Object::parse(repository.cluster(), &object.name) {
                found.push(name);
            }
        })
        .await
        .unwrap();
        let requests = memory.requests().since(&before).lists;
        assert!(requests < 120, "{requests} requests for 40 pages");
        found.sort_unstable();
        assert_eq!(found, names, "all of them, none twice");
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(listed(&catalog.wal), names);
        assert_eq!(catalog.damaged.len(), 1, "the history is none");
    }

    #[tokio::test]
    async fn the_tail_is_found_without_the_past() {
        let (memory, repository) = scene().await;
        put_wal(&memory, &repository, 20_000).await;
        let before = memory.requests();
        let from = Lsn((1 << 40) + 4_000_000);
        let size = SegmentSize::new(1 << 20).unwrap();
        let tail = WalCatalog::load_tail(&repository, timeline(1), from, size).await.unwrap();
        assert_eq!(tail.contiguous_end(timeline(1), from), Lsn((1 << 40) + 5_000_000));
        assert!(tail.extents(timeline(1)).all(|e| e.name.range.start() >= size.start_of(from)));
        assert!(memory.requests().since(&before).lists <= 5);
    }

    #[tokio::test]
    async fn packs_without_a_manifest_keys_marks_and_foreign_names_are_told_apart() {
        let (memory, repository) = scene().await;
        let id = BackupId::new(repository.clock().now(), timeline(1), Lsn(0x28));
        for number in [1, 2] {
            put(&memory, &repository, Object::Pack(PackName { backup: id, number })).await;
        }
        put(&memory, &repository, Object::Mark(format!("hold-{id}"))).await;
        put(&memory, &repository, Object::Key(KeyId([7; 16]))).await;
        put(&memory, &repository, Object::Mark("what".into())).await;
        for name in ["main/base/x", "main/wal/x", "main/keys/x"] {
            let name = ObjectName::new(name).unwrap();
            memory.put_if_absent(&name, Bytes::new()).await.unwrap();
        }
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(catalog.incomplete.len(), 1);
        let objects = &catalog.incomplete[0].objects;
        assert_eq!((objects.pack_count, objects.stored_bytes), (2, 10));
        assert_eq!(catalog.marks.holds, [id].into());
        assert_eq!(catalog.keys.len(), 1);
        assert_eq!(catalog.foreign_count, 4);
        assert!(catalog.backups.is_empty() && catalog.damaged.is_empty());
    }

    #[tokio::test]
    async fn a_mark_that_is_put_while_the_wal_is_listed_is_seen_with_the_wal_behind_it() {
        let (memory, repository) = scene().await;
        put(&memory, &repository, Object::Extent(extent(1, 0x1000, 0x2000))).await;
        let barrier = marks::Barrier::minimal(Lsn(0x2000));
        let (rival, place) = (memory.clone(), repository.clone());
        memory.before_list(&repository.cluster().wal_prefix(), async move {
            marks::put_barrier(&place, timeline(1), &barrier).await.unwrap();
            put(&rival, &place, Object::Extent(extent(1, 0x2000, 0x3000))).await;
        });
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(catalog.wal.extent_count(), 2);
        assert_eq!(catalog.marks.barriers, [(timeline(1), barrier)].into());
    }

    #[tokio::test]
    async fn what_is_listed_and_not_found_is_damaged_unless_it_is_gone_from_the_listing() {
        let (memory, repository) = scene().await;
        let id = BackupId::new(repository.clock().now(), timeline(1), Lsn(0x28));
        let objects = [Object::Manifest(id), Object::History(timeline(2))];
        for object in objects.clone() {
            put(&memory, &repository, object).await;
        }
        let unread = async || {
            // The lease is read in between; there is none.
            for _ in 0..3 {
                memory.fail_next(Call::Read, Outcome::NotFound);
            }
            Catalog::load(&repository).await.unwrap()
        };
        let catalog = unread().await;
        let damaged: Vec<_> = catalog.damaged.iter().map(|d| (d.backup, d.timeline)).collect();
        assert_eq!(damaged, [(Some(id), None), (None, Some(timeline(2)))]);
        assert_eq!(catalog.unknown_ancestries(), [timeline(2)].into(), "though it has no WAL");
        for object in objects {
            let name = repository.name(&object).unwrap();
            let (rival, gone) = (memory.clone(), name.clone());
            memory.before_list(name.as_str(), async move { rival.delete(&[gone]).await.unwrap() });
        }
        let catalog = unread().await;
        assert_eq!(catalog.damaged, [], "deleted since they were listed first");
        assert!(catalog.unknown_ancestries().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_backup_that_expires_between_the_listings_is_not_listed_without_its_wal() {
        use crate::repo::Encryption;
        use crate::repo::catalog::tests::backup;
        use crate::repo::manifest::Manifest;
        use crate::repo::retention::{self, RetentionOptions};
        let (memory, repository) = scene().await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let days = 10 * 24 * 60;
        for (lsns, minute) in
            [((1 << 20, (1 << 20) + 0x1000), 0), ((5 << 20, (5 << 20) + 0x1000), days)]
        {
            let public = backup(1, lsns, (minute, minute + 1)).manifest;
            let pack = Object::Pack(PackName { backup: public.id, number: 1 });
            let name = repository.name(&pack).unwrap();
            memory.put_if_absent(&name, Bytes::from(vec![0; 10])).await.unwrap();
            let manifest = Object::Manifest(public.id);
            let sealed = Manifest {
                public,
                tablespaces: Vec::new(),
                settings: [].into(),
                packs: Vec::new(),
                checksum_failures: Vec::new(),
            };
            let name = repository.name(&manifest).unwrap();
            memory.put_if_absent(&name, sealed.seal(&writer).unwrap()).await.unwrap();
            for start in [lsns.0, lsns.0 + 0x1000] {
                let extent = extent(1, start, start + 0x1000);
                put(&memory, &repository, Object::Extent(extent)).await;
            }
            tokio::time::sleep(std::time::Duration::from_secs(days.unsigned_abs() * 60)).await;
        }
        let catalog = Catalog::load(&repository).await.unwrap();
        assert_eq!(catalog.backups.len(), 2);
        let options = RetentionOptions { keep_count: Some(1), ..RetentionOptions::default() };
        let plan = retention::plan(&catalog, &options, repository.clock().now()).unwrap();
        assert_eq!((plan.backups.len(), plan.wal.len()), (1, 1));
        let elsewhere = repository.clone();
        memory.before_list(&repository.cluster().wal_prefix(), async move {
            let report = retention::apply(&elsewhere, &plan).await.unwrap();
            assert_eq!((report.backups.len(), report.refused.len()), (1, 0));
        });
        let catalog = Catalog::load(&repository).await.unwrap();
        let broken = catalog.backups.iter().filter(|backup| !catalog.is_restorable(backup));
        assert_eq!(broken.map(BackupSummary::id).collect::<Vec<_>>(), []);
        assert_eq!((catalog.backups.len(), catalog.damaged.len()), (1, 0));
    }

    #[tokio::test]
    async fn a_store_that_does_not_answer_is_an_error_and_no_empty_catalog() {
        let (memory, repository) = scene().await;
        put_wal(&memory, &repository, 8000).await;
        for call in [Call::List, Call::Read] {
            memory.fail_next(call, Outcome::FailsBefore);
            assert!(Catalog::load(&repository).await.unwrap_err().is_transient());
        }
        Catalog::load(&repository).await.unwrap();
    }

    #[tokio::test]
    async fn requests_grow_with_the_pages_of_names_and_with_nothing_else() {
        let mut lists = Vec::new();
        for count in [4_000, 20_000] {
            let (memory, repository) = scene().await;
            put_wal(&memory, &repository, count).await;
            let before = memory.requests();
            let catalog = Catalog::load(&repository).await.unwrap();
            assert_eq!(catalog.wal.extent_count() as u64, count);
            lists.push(memory.requests().since(&before).lists);
        }
        // A page has 1000 names; a listing that is cut into shares reads some pages twice.
        let (few, many) = (lists[0], lists[1]);
        assert!(many <= 3 * 20, "{many} requests for 20 pages");
        assert!(many - few <= 3 * 16, "{few} requests for 4 pages, {many} for 20");
    }
}
