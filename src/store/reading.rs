//! Reading a long range from front to back, in pieces as large as the reader can hold.

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

use super::{ObjectName, Store};
use crate::error::{Error, Kind, Result};

/// A range of an object that is read from front to back.
#[async_trait]
pub trait Reading: Send {
    /// The next `bytes` of the range, in one buffer that nobody else holds.
    ///
    /// # Errors
    /// As [`Store::get`]; `bug` when fewer are left of the range. After an error nothing more can be
    /// read.
    ///
    /// # Cancel safety
    /// When the future is dropped, nothing more can be read either.
    async fn next(&mut self, bytes: usize) -> Result<Bytes>;
}

/// Takes the next `bytes` off `left`.
///
/// # Errors
/// `bug` when fewer are left.
pub(super) fn take_off(
    left: &mut Range<u64>,
    bytes: usize,
    name: &ObjectName,
) -> Result<Range<u64>> {
    let start = left.start;
    let end = start.checked_add(bytes as u64).filter(|end| *end <= left.end).ok_or_else(|| {
        let message = format!("{bytes} bytes of '{name}' from {start}, which ends at {}", left.end);
        Error::new(Kind::Bug, message)
    })?;
    left.start = end;
    Ok(start..end)
}

/// Reads by a [`Store::get`] for each piece: for a store where a request costs nothing.
pub(super) struct Piecewise<'a, S: ?Sized> {
    pub(super) store: &'a S,
    pub(super) name: &'a ObjectName,
    pub(super) left: Range<u64>,
}

#[async_trait]
impl<S: Store + ?Sized> Reading for Piecewise<'_, S> {
    async fn next(&mut self, bytes: usize) -> Result<Bytes> {
        let piece = take_off(&mut self.left, bytes, self.name)?;
        self.store.get(self.name, Some(piece)).await
    }
}
