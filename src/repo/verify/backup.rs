//! One backup: its manifest, its packs, its files.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream;

use crate::error::{Error, Kind, Result};
use crate::repo::catalog::BackupSummary;
use crate::repo::manifest::{Manifest, PackSummary};
use crate::repo::names::{BackupId, Object, PackName};
use crate::repo::pack::PackFooter;
use crate::repo::reader::{Check, FrameBatch, PackHandle};
use crate::store::ObjectName;

use super::files::Files;
use super::{BackupReport, Defect, FILES_NAMED_MAX, Found, Run};

/// Checks a backup and adds its verdict to `found`.
pub(super) async fn check(run: &Run, summary: &BackupSummary, found: &mut Found) -> Result<()> {
    let id = summary.id();
    let mut report = BackupReport::new(id);
    let defects_before = found.defects.len();
    let object = run.repository.name(&Object::Manifest(id))?;
    match run.reader.manifest(id).await {
        Ok(manifest) => {
            run.opened();
            check_packs(run, summary, &manifest, &mut report, found).await?;
        }
        Err(error) if error.kind() == Kind::NotFound && run.is_gone(&object).await? => {
            report.vanished = true;
        }
        Err(error) => {
            let problem = run.damage(error)?;
            found.add(run, Defect::new(object, Some(id), problem));
        }
    }
    if !report.vanished && run.is_gone(&run.repository.name(&Object::Manifest(id))?).await? {
        // Deleted while it was read: what was missing was meant to be.
        report.vanished = true;
        found.defects.truncate(defects_before);
    }
    found.vanished_count += u64::from(report.vanished);
    report.whole = found.defects.len() == defects_before;
    found.backups.push(report);
    Ok(())
}

async fn check_packs(
    run: &Run,
    summary: &BackupSummary,
    manifest: &Manifest,
    report: &mut BackupReport,
    found: &mut Found,
) -> Result<()> {
    let id = summary.id();
    let mut files = Files::default();
    // Without every footer nothing can be said about whether files are complete.
    let mut all_footers = true;
    for pack in &manifest.packs {
        if found.is_full() {
            return Ok(());
        }
        let name = PackName { backup: id, number: pack.number };
        let object = run.repository.name(&Object::Pack(name))?;
        let mut findings = Findings::default();
        match open_pack(run, name, pack, &object).await? {
            Ok((handle, footer)) => {
                report.pack_count += 1;
                findings.note(expected_counts(&footer, pack));
                findings.note(files.add(&footer));
                read_frames(run, &handle, footer, &mut findings, report).await?;
            }
            Err(problem) => {
                all_footers = false;
                findings.note(Err(problem));
            }
        }
        if let Some(defect) = findings.defect(&object, id) {
            found.add(run, defect);
        }
    }
    report.file_count = files.file_count;
    if all_footers {
        let object = run.repository.name(&Object::Manifest(id))?;
        if let Some(defect) = incomplete(manifest, files, &object, id) {
            found.add(run, defect);
        }
    }
    Ok(())
}

/// The pack's footer; the inner error when the pack is bad.
async fn open_pack(
    run: &Run,
    name: PackName,
    pack: &PackSummary,
    object: &ObjectName,
) -> Result<Result<(PackHandle, Arc<PackFooter>), String>> {
    match run.repository.store().head(object).await? {
        None => return Ok(Err("it is missing".to_owned())),
        Some(info) if info.size_bytes != pack.stored_bytes => {
            let (found, expected) = (info.size_bytes, pack.stored_bytes);
            return Ok(Err(format!("it has {found} bytes, the manifest says {expected}")));
        }
        Some(_) => {}
    }
    let opened = async {
        let handle = run.reader.pack(name).await?;
        let footer = run.reader.pack_footer(&handle, pack.stored_bytes, pack.footer).await?;
        Ok((handle, Arc::new(footer)))
    };
    match opened.await {
        Ok(opened) => Ok(Ok(opened)),
        Err(error) => run.damage(error).map(Err),
    }
}

fn expected_counts(footer: &PackFooter, pack: &PackSummary) -> Result<(), String> {
    let (entries, frames) = (footer.entries.len(), footer.frames.len());
    if (entries, frames) == (pack.entry_count as usize, pack.frame_count as usize) {
        return Ok(());
    }
    let (said_entries, said_frames) = (pack.entry_count, pack.frame_count);
    Err(format!(
        "its footer lists {entries} entries and {frames} frames, the manifest says {said_entries} \
         and {said_frames}"
    ))
}

fn incomplete(
    manifest: &Manifest,
    files: Files,
    object: &ObjectName,
    id: BackupId,
) -> Option<Defect> {
    let (seen, said) = (files.file_count, manifest.public.file_count);
    let missing = files.incomplete();
    if missing.is_empty() && seen == said {
        return None;
    }
    let count = missing.len();
    let problem = if count > 0 {
        format!("its packs do not hold all bytes of {count} files")
    } else {
        format!("its packs hold {seen} files, it says {said}")
    };
    let names = missing.iter().take(FILES_NAMED_MAX).map(ToString::to_string).collect();
    let defect = Defect::new(object, Some(id), problem);
    Some(Defect { files: names, file_count: count as u64, ..defect })
}

/// Fetches, opens and hashes the frames of a pack, several batches at a time.
async fn read_frames(
    run: &Run,
    handle: &PackHandle,
    footer: Arc<PackFooter>,
    findings: &mut Findings,
    report: &mut BackupReport,
) -> Result<()> {
    let batches = FrameBatch::plan(&footer, run.batch_bytes(), |_| true);
    let mut reads = stream::iter(batches)
        .map(|batch| read_batch(run, handle, Arc::clone(&footer), batch))
        .buffer_unordered(run.options.jobs.max(1));
    while let Some(outcome) = reads.next().await {
        let outcome = outcome?;
        report.frame_count += outcome.frame_count;
        report.plain_bytes += outcome.plain_bytes;
        findings.take(outcome, &footer);
    }
    Ok(())
}

/// What reading one batch showed.
#[derive(Default)]
struct BatchOutcome {
    frame_count: u64,
    plain_bytes: u64,
    /// Bad frames, by index in the footer's list of frames.
    bad: Vec<(usize, String)>,
}

async fn read_batch(
    run: &Run,
    handle: &PackHandle,
    footer: Arc<PackFooter>,
    batch: FrameBatch,
) -> Result<BatchOutcome> {
    let sealed_bytes = batch.range.end - batch.range.start;
    if !run.draws()? {
        run.done(sealed_bytes);
        return Ok(BatchOutcome::default());
    }
    let frames = batch.frames.clone();
    let whole_batch_bad = |problem: String| BatchOutcome {
        bad: frames.iter().map(|index| (*index, problem.clone())).collect(),
        ..BatchOutcome::default()
    };
    let _room = run.room(sealed_bytes * 2).await?;
    let source = match batch.source.checked_sub(1) {
        None => Ok(handle.clone()),
        Some(index) => match footer.sources.get(index as usize) {
            Some(name) => run.reader.pack(*name).await,
            None => return Ok(whole_batch_bad("its source is not listed".to_owned())),
        },
    };
    let fetched = match source {
        Ok(source) => run.reader.fetch(&source, batch).await,
        Err(error) => Err(error),
    };
    run.done(sealed_bytes);
    let fetched = match fetched {
        Ok(fetched) => fetched,
        Err(error) => return run.damage(error).map(whole_batch_bad),
    };
    let indexes = frames.clone();
    let outcome = run
        .pool
        .run(move |worker| {
            let mut outcome = BatchOutcome::default();
            let mut indexes = indexes.into_iter();
            fetched.open_each(&footer, Check::Hashes, worker, |frame, block| {
                let index = indexes.next().unwrap_or_default();
                match block {
                    Ok(_) => {
                        outcome.frame_count += 1;
                        outcome.plain_bytes += u64::from(frame.plain_bytes);
                    }
                    Err(error) => outcome.bad.push((index, error.to_string())),
                }
                Ok(())
            })?;
            Ok::<_, Error>(outcome)
        })
        .await??;
    Ok(outcome)
}

/// What is wrong with one pack.
#[derive(Default)]
struct Findings {
    problem: Option<String>,
    bad_frame_count: u64,
    /// Paths of the first of them.
    files: BTreeSet<String>,
    /// Files with a bad frame, by index in the footer's list of entries.
    entries: BTreeSet<u32>,
}

impl Findings {
    fn note(&mut self, outcome: Result<(), String>) {
        if let Err(problem) = outcome {
            self.problem.get_or_insert(problem);
        }
    }

    fn take(&mut self, outcome: BatchOutcome, footer: &PackFooter) {
        for (index, problem) in outcome.bad {
            self.note(Err(problem));
            self.bad_frame_count += 1;
            let spans = footer.frames.get(index).map(|frame| frame.spans.as_slice());
            for span in spans.unwrap_or_default() {
                let Some(entry) = footer.entries.get(span.entry as usize) else { continue };
                if self.entries.insert(span.entry) && self.files.len() < FILES_NAMED_MAX {
                    self.files.insert(entry.path.to_string());
                }
            }
        }
    }

    fn defect(self, object: &ObjectName, backup: BackupId) -> Option<Defect> {
        let defect = Defect::new(object, Some(backup), self.problem?);
        Some(Defect {
            bad_frame_count: self.bad_frame_count,
            files: self.files.into_iter().collect(),
            file_count: self.entries.len() as u64,
            ..defect
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::pack::{Entry, EntryKind, FilePath, FrameRecord, Span};

    #[test]
    fn files_are_counted_once_however_many_of_their_frames_are_bad() {
        let entries = (0..15).map(|number| Entry {
            path: FilePath::new(format!("base/1/{number}")).unwrap(),
            mode: 0o600,
            mtime: 0,
            kind: EntryKind::File { size_bytes: 30, crc32c: None },
        });
        let frames = (0..45).map(|index| FrameRecord {
            source: 0,
            offset: 64,
            frame_bytes: 42,
            plain_bytes: 10,
            index,
            hash: [0; 16],
            spans: vec![Span {
                entry: index % 15,
                file_offset: u64::from(index / 15 * 10),
                bytes: 10,
            }],
        });
        let footer = PackFooter {
            entries: entries.collect(),
            frames: frames.collect(),
            ..PackFooter::default()
        };
        let mut findings = Findings::default();
        let bad = (0..45).map(|index| (index, "bad".to_owned())).collect();
        findings.take(BatchOutcome { bad, ..BatchOutcome::default() }, &footer);
        let time = "2026-11-22T10:00:00Z".parse().unwrap();
        let id = BackupId::new(time, crate::pg::TimelineId::FIRST, crate::pg::Lsn(0x28));
        let object = ObjectName::new("main/pack").unwrap();
        let defect = findings.defect(&object, id).unwrap();
        let found = (defect.bad_frame_count, defect.file_count, defect.files.len());
        assert_eq!(found, (45, 15, FILES_NAMED_MAX));
    }
}
