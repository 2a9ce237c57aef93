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
    /// `None` during and after completion, and after abort.
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
            upload.complete().context(|| format!("unable to write object '{}'", upload.name))
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

    /// Moves the parts that came early to their place, fsyncs the object, and publishes it.
    ///
    /// After an outage everything is as it was before, and this can be called again.
    ///
    /// # Durability
    /// Nothing has the object's name before all of it is fsynced. A failed fsync is the end of the
    /// upload (`conflict`: it must be made anew): Linux reports a failed write once and then takes its
    /// pages for clean, so that a second fsync of the same file succeeds and what was lost stays lost.
    fn complete(&self) -> Result<PutOutcome> {
        let (mut object, mut parts) = self.take()?;
        let moved = self.move_early(&object, &mut parts);
        let published = moved.and_then(|()| {
            self.sync(&object)?;
            let published = self.store.publish(&mut object, &self.name);
            published.map_err(|error| self.store.root.explain(error))
        });
        match &published {
            Ok(_) => {
                // A backup must not push the database out of the page cache; only advice, so errors
                // are fine.
                let _ = fadvise(object.file(), 0, None, Advice::DontNeed);
            }
            Err(error) if error.is_transient() => {
                let mut state = self.state();
                state.object = Some(Arc::new(object));
                state.parts = parts;
            }
            Err(_) => {}
        }
        published
    }

    /// The whole object out of the state.
    fn take(&self) -> Result<(Incoming, BTreeMap<u32, Part>)> {
        let mut state = self.state();
        if state.object.is_none() {
            return Err(self.gone());
        }
        joined(&self.name, state.parts.keys().copied())?;
        if let Some((number, _)) = state.parts.iter().find(|(_, part)| !part.written) {
            let message = format!("part {number} was not written");
            return Err(Error::new(Kind::Bug, message));
        }
        let object = state.object.take().and_then(Arc::into_inner);
        let object =
            object.ok_or_else(|| Error::new(Kind::Bug, "a part is still being written"))?;
        Ok((object, std::mem::take(&mut state.parts)))
    }

    /// Moves the parts that came early to their place. Each is fsynced before: of what the disk would
    /// not take, a copy might be made that can be fsynced.
    fn move_early(&self, object: &Incoming, parts: &mut BTreeMap<u32, Part>) -> Result<()> {
        let mut offset = 0;
        for part in parts.values_mut() {
            if let Place::Apart(file) = &part.place {
                self.sync(file)?;
                let copied = copy(file.file(), object.file(), offset);
                copied.map_err(|error| self.store.root.explain(error))?;
                part.place = Place::Object(offset);
            }
            offset += part.size_bytes;
        }
        Ok(())
    }

    /// The error is final, also where the root went away: see [`Upload::complete`].
    fn sync(&self, file: &Incoming) -> Result<()> {
        self.store.sync(file.file()).map_err(|error| {
            Error::io("unable to fsync a new file", &error)
                .with_kind(Kind::Conflict)
                .hint("What was written may be lost on its way to the disk: begin anew.")
        })
    }

    fn gone(&self) -> Error {
        Error::new(
            Kind::Conflict,
            format!("unable to go on with the upload of '{}': it has ended", self.name),
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
fn copy(mut from: &File, mut to: &File, offset: u64) -> Result<()> {
    let attempted = || "unable to move a part to its place";
    from.seek(SeekFrom::Start(0)).context(attempted)?;
    to.seek(SeekFrom::Start(offset)).context(attempted)?;
    std::io::copy(&mut from, &mut to).context(attempted)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Directory;
    use super::*;
    use crate::clock::Clock;
    use crate::store::Store;

    #[tokio::test]
    async fn a_failed_fsync_is_never_tried_again_and_believed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Directory::new(folder.path().join("repository"), &Clock::system());
        let name = ObjectName::new("c/a").unwrap();
        for early in [false, true] {
            let upload = DirectoryMultipart::begin(Arc::clone(&store.0), name.clone()).unwrap();
            upload.put_part(2, Bytes::from_static(b"x")).await.unwrap();
            upload.put_part(1, Bytes::from_static(b"x")).await.unwrap();
            // No pipe can be fsynced.
            let (_reader, writer) = std::io::pipe().unwrap();
            let writer = File::from(std::os::fd::OwnedFd::from(writer));
            let failing = Arc::new(Incoming::of(writer));
            if early {
                upload.0.state().parts.get_mut(&2).unwrap().place = Place::Apart(failing);
            } else {
                upload.0.state().object = Some(failing);
                upload.0.state().parts.remove(&2);
            }
            for _ in 0..2 {
                let error = upload.complete().await.unwrap_err();
                assert_eq!(error.kind(), Kind::Conflict, "{error}");
            }
            assert_eq!(store.head(&name).await.unwrap(), None);
        }
    }
}
