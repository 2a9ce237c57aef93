//! What is inside an object of the repository.

use serde_json::{Value, json};

use super::{Depth, segment};
use crate::cli::invocation::Invocation;
use crate::daemon::{keys, opening};
use crate::error::{Context, Error, Kind, Result};
use crate::pg::{Lsn, SegmentSize};
use crate::repo::{
    BackupId, EntryKind, ExtentMember, ExtentName, KeyId, Object, PackFooter, PackName, Reader,
    Repository,
};
use crate::store::ObjectName;

/// Size of WAL pages: an extent may begin inside one.
const WAL_PAGE_BYTES: u64 = 8192;

/// Longest small object (identity, lease, mark, key) that is read.
const SMALL_BYTES_MAX: u64 = 64 << 10;

/// What the object called `name` holds.
pub(super) async fn inspect(name: &str, depth: Depth, invocation: &Invocation) -> Result<Value> {
    let repository = opening::repository(&invocation.config, &invocation.clock).await?;
    let object = parse(name, &repository)?;
    let reader = keys::reader(&invocation.config, &repository)?;
    match object {
        Object::Pack(pack) => pack_of(&repository, &reader, pack, depth).await,
        Object::Manifest(backup) => manifest(&repository, &reader, backup).await,
        Object::Extent(extent) => extent_of(&repository, &reader, extent, depth).await,
        Object::History(timeline) => {
            let bytes = repository.history_file(timeline).await?;
            let lines: Vec<_> =
                String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
            Ok(json!({ "kind": "timeline history", "timeline": timeline, "lines": lines }))
        }
        Object::Key(id) => key(&repository, id).await,
        other => small(&repository, &other).await,
    }
}

fn parse(name: &str, repository: &Repository) -> Result<Object> {
    let cluster = repository.cluster();
    let below = format!("{cluster}/{name}");
    for candidate in [name, below.as_str()] {
        if let Ok(candidate) = ObjectName::new(candidate)
            && let Some(object) = Object::parse(cluster, &candidate)
        {
            return Ok(object);
        }
    }
    Err(Error::new(
        Kind::NotFound,
        format!("there is no file '{name}', and no object of cluster '{cluster}' has such a name"),
    )
    .hint("Give a WAL segment file, or a name such as base/<backup>/manifest or wal/<...>."))
}

async fn size_of(repository: &Repository, object: &Object) -> Result<(ObjectName, u64)> {
    let name = repository.name(object)?;
    let info = repository.store().head(&name).await?;
    let info = info.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("unable to read object '{name}': it does not exist"))
    })?;
    Ok((name, info.size_bytes))
}

async fn small(repository: &Repository, object: &Object) -> Result<Value> {
    let (name, size_bytes) = size_of(repository, object).await?;
    let bytes = repository.store().get(&name, Some(0..size_bytes.min(SMALL_BYTES_MAX))).await?;
    let content = serde_json::from_slice(&bytes)
        .unwrap_or_else(|_not_json| json!(String::from_utf8_lossy(&bytes)));
    Ok(json!({ "object": name.to_string(), "size_bytes": size_bytes, "content": content }))
}

/// The wrapped key is not shown, nor is what it wraps.
async fn key(repository: &Repository, id: KeyId) -> Result<Value> {
    let (name, size_bytes) = size_of(repository, &Object::Key(id)).await?;
    Ok(json!({
        "kind": "wrapped data key", "object": name.to_string(), "size_bytes": size_bytes,
    }))
}

async fn manifest(repository: &Repository, reader: &Reader, backup: BackupId) -> Result<Value> {
    let public = repository.public_manifest(backup).await?;
    let private = match reader.manifest(backup).await {
        Ok(manifest) => {
            let settings: Vec<Value> = manifest
                .settings
                .iter()
                .map(|(name, value)| json!(format!("{name} = {value}")))
                .collect();
            json!({
                "tablespaces": manifest.tablespaces,
                "settings": settings,
                "packs": manifest.packs.iter().map(|pack| json!({
                    "number": pack.number,
                    "stored_bytes": pack.stored_bytes,
                    "plain_bytes": pack.plain_bytes,
                    "entries": pack.entry_count,
                    "frames": pack.frame_count,
                })).collect::<Vec<_>>(),
                "checksum_failures": manifest.checksum_failures,
            })
        }
        Err(error) => json!(format!("not opened: {error}")),
    };
    Ok(json!({ "kind": "manifest", "public": public, "sealed": private }))
}

async fn pack_of(
    repository: &Repository,
    reader: &Reader,
    pack: PackName,
    depth: Depth,
) -> Result<Value> {
    let (name, size_bytes) = size_of(repository, &Object::Pack(pack)).await?;
    let handle = reader.pack(pack).await?;
    let place = reader.footer_place(&handle, size_bytes).await?;
    let footer = reader.pack_footer(&handle, size_bytes, place).await?;
    let plain: u64 = footer.frames.iter().map(|frame| u64::from(frame.plain_bytes)).sum();
    let zero: u64 = footer.zero_runs.iter().map(|run| run.bytes).sum();
    let mut found = json!({
        "kind": "pack",
        "object": name.to_string(),
        "size_bytes": size_bytes,
        "entries": footer.entries.len(),
        "frames": footer.frames.len(),
        "plain_bytes": plain,
        "zero_bytes": zero,
        "footer": place,
    });
    if depth == Depth::All
        && let Some(members) = found.as_object_mut()
    {
        members.insert("files".to_owned(), files(&footer));
        members.insert("places".to_owned(), places(&footer));
    }
    Ok(found)
}

fn files(footer: &PackFooter) -> Value {
    let entries = footer.entries.iter().map(|entry| {
        let path = String::from_utf8_lossy(entry.path.as_bytes()).into_owned();
        let mode = format!("{:04o}", entry.mode);
        match &entry.kind {
            EntryKind::File { size_bytes, crc32c } => json!({
                "path": path, "mode": mode, "size_bytes": size_bytes,
                "crc32c": crc32c.map(|crc| format!("{crc:08x}")),
            }),
            EntryKind::Directory => json!({ "path": path, "mode": mode, "kind": "directory" }),
            EntryKind::Symlink { target } => json!({
                "path": path, "mode": mode, "target": String::from_utf8_lossy(target),
            }),
        }
    });
    Value::Array(entries.collect())
}

fn places(footer: &PackFooter) -> Value {
    let frames = footer.frames.iter().map(|frame| {
        json!({
            "index": frame.index, "source": frame.source, "offset": frame.offset,
            "frame_bytes": frame.frame_bytes, "plain_bytes": frame.plain_bytes,
            "pieces": frame.spans.len(),
        })
    });
    Value::Array(frames.collect())
}

async fn extent_of(
    repository: &Repository,
    reader: &Reader,
    extent: ExtentName,
    depth: Depth,
) -> Result<Value> {
    let name = repository.name(&Object::Extent(extent))?;
    let object = repository.store().get(&name, None).await?;
    let members = ExtentMember::walk(&extent, &object)
        .context(|| format!("unable to read WAL extent '{name}'"))?;
    let members: Vec<Value> = members
        .iter()
        .map(|member| {
            json!({
                "start": member.name.range.start(),
                "end": member.name.range.end(),
                "time": member.name.time.map(|time| time.to_string()),
                "stored_bytes": member.range.len(),
                "key": member.key_id.to_string(),
            })
        })
        .collect();
    let wal = match reader.extent(&extent).await {
        Ok(plain) => content(extent, &plain, depth),
        Err(error) => json!(format!("not opened: {error}")),
    };
    Ok(json!({
        "kind": "WAL extent",
        "object": name.to_string(),
        "timeline": extent.timeline,
        "stored_bytes": object.len(),
        "members": members,
        "wal": wal,
    }))
}

/// The records of an extent, from its first page on: what stands before that cannot be read without
/// the extent before.
fn content(extent: ExtentName, plain: &[u8], depth: Depth) -> Value {
    let start = extent.range.start();
    let page = start.0.next_multiple_of(WAL_PAGE_BYTES);
    let skip = usize::try_from(page.saturating_sub(start.0)).unwrap_or(usize::MAX);
    let Some(bytes) = plain.get(skip..).filter(|bytes| !bytes.is_empty()) else {
        return json!("it lies inside one page");
    };
    // An extent does not say how large its cluster's segments are; only the right size fits the
    // long headers that stand where segments begin. 16 MiB is the size of nearly all clusters.
    let sizes = std::iter::once(24).chain(20..=30);
    let readings =
        sizes.filter_map(|power| SegmentSize::new(1_u32.checked_shl(power)?)).map(|size| {
            let mut wal = segment::Wal::new(size, Lsn(page), depth);
            wal.feed(bytes);
            wal
        });
    let mut first = None;
    for wal in readings {
        if wal.is_sound() {
            return wal.found();
        }
        first.get_or_insert(wal);
    }
    first.map_or(Value::Null, segment::Wal::found)
}
