//! The WAL: every extent, those that a larger one holds included.

use futures::StreamExt as _;
use futures::stream;

use crate::error::{Kind, Result};
use crate::repo::coverage::{StoredExtent, WalCatalog};
use crate::repo::names::Object;

use super::{Defect, Found, Run, WalReport};

enum Outcome {
    Whole,
    NotDrawn,
    Vanished,
    Bad(String),
}

/// Checks all extents and adds what is bad to `found`.
pub(super) async fn check(run: &Run, wal: &WalCatalog, found: &mut Found) -> Result<()> {
    for timeline in wal.timelines() {
        let mut report =
            WalReport { timeline, extent_count: 0, whole_count: 0, bad_count: 0, plain_bytes: 0 };
        let mut reads = stream::iter(wal.extents(timeline))
            .map(|extent| async move { (extent, read(run, &extent).await) })
            .buffer_unordered(run.options.jobs.max(1));
        while let Some((extent, outcome)) = reads.next().await {
            report.extent_count += 1;
            match outcome? {
                Outcome::NotDrawn => {}
                Outcome::Vanished => found.vanished_count += 1,
                Outcome::Whole => {
                    report.whole_count += 1;
                    report.plain_bytes += extent.name.range.len_bytes();
                }
                Outcome::Bad(problem) => {
                    report.bad_count += 1;
                    found.bad_extents.insert(extent.name);
                    let object = run.repository.name(&Object::Extent(extent.name))?;
                    found.add(run, Defect::new(object, None, problem));
                }
            }
            if found.is_full() {
                break;
            }
        }
        drop(reads);
        found.wal.push(report);
        if found.is_full() {
            break;
        }
    }
    Ok(())
}

async fn read(run: &Run, extent: &StoredExtent) -> Result<Outcome> {
    if !run.draws()? {
        run.done(extent.stored_bytes);
        return Ok(Outcome::NotDrawn);
    }
    let _room = run.room(extent.stored_bytes + extent.name.range.len_bytes()).await?;
    let fetched = run.reader.fetch_extent(&extent.name).await;
    run.done(extent.stored_bytes);
    let opened = match fetched {
        Ok(fetched) => {
            run.opened();
            run.pool.run(move |worker| fetched.open(&mut worker.decompressor).map(drop)).await?
        }
        Err(error) => Err(error),
    };
    let Err(error) = opened else { return Ok(Outcome::Whole) };
    // Compaction and retention delete extents while we read.
    let object = run.repository.name(&Object::Extent(extent.name))?;
    if error.kind() == Kind::NotFound && run.is_gone(&object).await? {
        return Ok(Outcome::Vanished);
    }
    run.damage(error).map(Outcome::Bad)
}
