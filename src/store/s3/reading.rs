//! One GET for a long range, of which pieces are taken as they are wanted.
//!
//! A body that breaks off, stalls, or comes too slowly for the piece that is wanted is asked for again
//! from where it ended: what has come is kept.
//! A reader that takes its time holds nothing but what the connection buffers; a server that loses
//! patience with it breaks off, too.

use std::ops::Range;

use async_trait::async_trait;
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Buf, Bytes, BytesMut};

use super::attempt::Call;
use super::client::Client;
use super::failure::Failure;
use super::{S3, size_of_whole, tag_of};
use crate::error::Result;
use crate::store::reading::{Reading, take_off};
use crate::store::{ObjectName, asked_bytes, too_short};

/// A range being read.
pub(super) struct Body<'a> {
    s3: &'a S3,
    name: &'a ObjectName,
    /// Not yet given to the reader.
    left: Range<u64>,
    /// The answer to the last GET, unless it broke off.
    answer: Option<ByteStream>,
    /// Received and not wanted yet.
    ahead: Bytes,
}

/// The begin of the answer to a GET of a range, or how long the object is that ends before it does.
pub(super) enum Begun {
    Answer(Box<GetObjectOutput>),
    TooShort(u64),
}

impl S3 {
    pub(super) async fn read<'a>(
        &'a self,
        name: &'a ObjectName,
        range: Range<u64>,
    ) -> Result<Body<'a>> {
        asked_bytes(name, &range)?;
        let answer =
            if range.is_empty() { None } else { Some(self.open(name, range.clone()).await?) };
        Ok(Body { s3: self, name, left: range, answer, ahead: Bytes::new() })
    }

    async fn open(&self, name: &ObjectName, range: Range<u64>) -> Result<ByteStream> {
        let call = Call::new(&self.requests.gets);
        let begin = |client| self.begin_once(client, name, range.clone());
        match self.attempt(call, begin).await?.result {
            Ok(Begun::Answer(answer)) => Ok(answer.body),
            Ok(Begun::TooShort(size_bytes)) => Err(too_short(name, &range, size_bytes)),
            Err(failure) if failure.is_missing() => Err(self.missing(name)),
            Err(failure) => Err(failure.into_error(self.unable("read", name))),
        }
    }

    /// Asks for a range, which must not be empty: HTTP has no such.
    pub(super) async fn begin_once(
        &self,
        client: &Client,
        name: &ObjectName,
        range: Range<u64>,
    ) -> std::result::Result<Begun, Failure> {
        let header = format!("bytes={}-{}", range.start, range.end - 1);
        let request = client.sdk().get_object().bucket(&self.bucket).key(self.key(name));
        let answer = match request.range(header).send().await.map_err(Failure::from) {
            Ok(answer) => answer,
            Err(failure) if failure.is("InvalidRange", 416) => {
                let size = self.head_once(client, name).await?.map_or(0, |found| found.size_bytes);
                return Ok(Begun::TooShort(size));
            }
            Err(failure) => return Err(failure),
        };
        tag_of(answer.e_tag())?;
        match size_of_whole(&answer) {
            None => Err(Failure::nonsense("the server ignores ranges")),
            Some(size_bytes) if size_bytes < range.end => Ok(Begun::TooShort(size_bytes)),
            Some(_) => Ok(Begun::Answer(Box::new(answer))),
        }
    }
}

impl Body<'_> {
    /// Fills `piece` up to `bytes` from what has come and what comes.
    async fn fill(
        &mut self,
        answer: &mut ByteStream,
        piece: &mut BytesMut,
        bytes: usize,
    ) -> std::result::Result<(), Failure> {
        while piece.len() < bytes {
            if self.ahead.is_empty() {
                self.ahead = self.s3.piece_of(answer).await?.ok_or_else(broke_off)?;
            }
            let take = self.ahead.len().min(bytes - piece.len());
            piece.extend_from_slice(self.ahead.get(..take).unwrap_or_default());
            self.ahead.advance(take);
        }
        Ok(())
    }
}

pub(super) fn broke_off() -> Failure {
    Failure::transport("the answer broke off".to_owned())
}

#[async_trait]
impl Reading for Body<'_> {
    async fn next(&mut self, bytes: usize) -> Result<Bytes> {
        let wanted = take_off(&mut self.left, bytes, self.name)?;
        let mut piece = BytesMut::with_capacity(bytes);
        let mut broken = 0;
        while piece.len() < bytes {
            let mut answer = match self.answer.take() {
                Some(answer) => answer,
                None => {
                    let from = wanted.start + piece.len() as u64;
                    self.s3.open(self.name, from..self.left.end).await?
                }
            };
            let (s3, begun) = (self.s3, self.s3.clock.instant());
            let left_bytes = (bytes - piece.len()) as u64;
            let filling = self.fill(&mut answer, &mut piece, bytes);
            match s3.in_time(begun, left_bytes, filling).await {
                Ok(()) => self.answer = Some(answer),
                Err(failure) => {
                    broken += 1;
                    self.s3.pause_after_break(failure, broken, self.name).await?;
                }
            }
        }
        self.s3.requests.received_bytes.add(bytes as u64);
        Ok(piece.freeze())
    }
}
