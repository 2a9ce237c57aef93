//! An object in parts, as one growing file.
//!
//! # Shape
//! Parts have sizes of their own, so where a part goes is known once every lower number has been put.
//! Parts that come in the order of their numbers, even if they overlap in time, are written straight
//! to their place; one that comes early gets a file of its own and is moved when the object is
//! completed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{Advice, fadvise};

use super::{Incoming, Inner, blocking};
use crate::error::{Context, Error, Kind, Result};
use crate::store::{Multipart, ObjectName, PART_NUMBER_MAX, PutOutcome, joined};

#[derive(Debug)]
pub(super) struct DirectoryMultipart(Arc<Upload>);

#[derive(Debug)]
struct Upload {
    store: Arc<Inner>,
    name: ObjectName,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` after completion or abort.
    object: Option<Arc<Incoming>>,
    parts: BTreeMap<u32, Part>,
    /// All parts below this number are known, and end at `next_offset` bytes.
    next_number: u32,
    next_offset: u64,
}

#[derive(Clone, Debug)]
struct Part {
    size_bytes: u64,
    place: Place,
    written: bool,
}

#[derive(Clone, Debug)]
enum Place {
    /// At this offset of the object.
    Object(u64),
    /// In a file of its own until the object is completed.
    Apart(Arc<Incoming>),
}

impl DirectoryMultipart {
    pub(super) fn begin(store: Arc<Inner>, name: ObjectName) -> Result<Self> {
        let object = Some(Arc::new(store.incoming()?));
        let state = State { object, parts: BTreeMap::new(), next_number: 1, next_offset: 0 };
        Ok(Self(Arc::new(Upload { store, name, state: Mutex::new(state) })))
    }
}

#[async_trait]
impl Multipart for DirectoryMultipart {
    async fn put_part(&self, number: u32, body: Bytes) -> Result<()> {
        self.0.store.requests.parts.one();
        self.0.store.requests.sent_bytes.add(body.len() as u64);
        // The place is taken in the order of the calls, before any of them waits for a thread.
        let (file, offset) = self.0.place(number, body.len() as u64)?;
        let upload = Arc::clone(&self.0);
        blocking(move || {
            let begun = upload.store.clock.instant();
            let attempted = || format!("unable to write part {number} of object '{}'", upload.name);
            file.file().write_all_at(&body, offset).context(attempted)?;
            upload.written(number);
            upload.store.note_upload(begun);
            Ok(())
        })
        .await
    }

    async fn complete(&self) -> Result<PutOutcome> {
        self.0.store.requests.multipart_completes.one();
        let upload = Arc::clone(&self.0);
        blocking(move || {
            let completed = upload.complete().map_err(|error| upload.store.root.explain(error));
            completed.context(|| format!("unable to write object '{}'", upload.name))
        })
        .await
    }

    async fn abort(&self) -> Result<()> {
        self.0.store.requests.multipart_aborts.one();
        let upload = Arc::clone(&self.0);
        blocking(move || {
            let mut state = upload.state();
            state.object = None;
            state.parts.clear();
            Ok(())
        })
        .await
    }
}

impl Upload {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the bytes of a part are to be written.
    fn place(&self, number: u32, size_bytes: u64) -> Result<(Arc<Incoming>, u64)> {
        if !(1..=PART_NUMBER_MAX).contains(&number) {
            return Err(Error::new(Kind::Bug, format!("part number {number} of '{}'", self.name)));
        }
        let mut state = self.state();
        let object = Arc::clone(state.object.as_ref().ok_or_else(|| self.gone())?);
        if let Some(part) = state.parts.get_mut(&number) {
            if part.size_bytes != size_bytes {
                let message = format!("part {number} of '{}' was put with another size", self.name);
                return Err(Error::new(Kind::Bug, message));
            }
            part.written = false;
            return Ok(match &part.place {
                Place::Object(offset) => (object, *offset),
                Place::Apart(file) => (Arc::clone(file), 0),
            });
        }
        if number == state.next_number {
            let offset = state.next_offset;
            let place = Place::Object(offset);
            state.parts.insert(number, Part { size_bytes, place, written: false });
            state.advance();
            return Ok((object, offset));
        }
        let file = Arc::new(self.store.incoming()?);
        let place = Place::Apart(Arc::clone(&file));
        state.parts.insert(number, Part { size_bytes, place, written: false });
        Ok((file, 0))
    }

    fn written(&self, number: u32) {
        if let Some(part) = self.state().parts.get_mut(&number) {
            part.written = true;
        }
    }

    /// Moves the parts that came early to their place, and publishes. Everything is fsynced by
    /// `publish` before the object gets its name.
    fn complete(&self) -> Result<PutOutcome> {
        let (object, parts) = {
            let mut state = self.state();
            joined(&self.name, state.parts.keys().copied())?;
            if let Some((number, _)) = state.parts.iter().find(|(_, part)| !part.written) {
                let message = format!("part {number} was not written");
                return Err(Error::new(Kind::Bug, message));
            }
            let object = state.object.take().ok_or_else(|| self.gone())?;
            (object, std::mem::take(&mut state.parts))
        };
        let mut object = Arc::try_unwrap(object)
            .map_err(|_held| Error::new(Kind::Bug, "a part is still being written"))?;
        let mut offset = 0;
        for part in parts.into_values() {
            if let Place::Apart(file) = part.place {
                copy(file.file(), object.file_mut(), offset)?;
            }
            offset += part.size_bytes;
        }
        let file = object.file().try_clone().context(|| "unable to hold on to a new file")?;
        let outcome = self.store.publish(object, &self.name)?;
        // A backup must not push the database out of the page cache; only advice, so errors are fine.
        let _ = fadvise(&file, 0, None, Advice::DontNeed);
        Ok(outcome)
    }

    fn gone(&self) -> Error {
        Error::new(
            Kind::Conflict,
            format!("unable to go on with the upload of '{}': completed or aborted", self.name),
        )
    }
}

impl State {
    /// Steps over the parts that are known without a gap.
    fn advance(&mut self) {
        while let Some(part) = self.parts.get(&self.next_number) {
            self.next_offset += part.size_bytes;
            self.next_number += 1;
        }
    }
}

/// Copies a whole file to `offset` of another; the standard library lets the kernel do it.
fn copy(mut from: &File, to: &mut File, offset: u64) -> Result<()> {
    let attempted = || "unable to move a part to its place";
    from.seek(SeekFrom::Start(0)).context(attempted)?;
    to.seek(SeekFrom::Start(offset)).context(attempted)?;
    std::io::copy(&mut from, to).context(attempted)?;
    Ok(())
}
