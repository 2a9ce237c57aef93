//! Where bytes are kept: memory, or one file a piece.
//!
//! # Shape
//! A piece is what one upload request brought; an object is a list of pieces, so completing a
//! multipart upload copies nothing. In a folder a body passes through buffers of about a MiB.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use s3s::dto::StreamingBlob;
use s3s::{S3Error, S3Result, s3_error};
use serde::{Deserialize, Serialize};

use crate::checksum::Hashes;

/// Bytes gathered before they are written to a file, and read from one at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// Chunks smaller than this are copied, so that they do not hold on to a connection's read buffer.
const COPY_BYTES_MAX: usize = 16 << 10;

/// Bytes of one upload request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub(crate) size: u64,
    /// Name of its file; empty in memory.
    file: String,
    #[serde(skip)]
    chunks: Arc<Vec<Bytes>>,
}

impl Piece {
    /// Whether both are the same stored bytes.
    pub(crate) fn same(&self, other: &Self) -> bool {
        if self.file.is_empty() {
            Arc::ptr_eq(&self.chunks, &other.chunks)
        } else {
            self.file == other.file
        }
    }
}

/// Where pieces go.
#[derive(Debug)]
pub(crate) enum Backend {
    Memory,
    Folder { data: PathBuf, last_number: AtomicU64 },
}

impl Backend {
    /// Keeps pieces in `root/data`.
    pub(crate) fn folder(root: &Path) -> io::Result<Self> {
        let data = root.join("data");
        fs::create_dir_all(&data)?;
        let mut last_number = 0;
        for entry in fs::read_dir(&data)? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok());
            last_number = last_number.max(number.unwrap_or(0));
        }
        Ok(Self::Folder { data, last_number: AtomicU64::new(last_number) })
    }

    /// Takes a body in, passing every byte by `hashes`.
    pub(crate) async fn receive(
        &self,
        body: Option<StreamingBlob>,
        hashes: &mut Hashes,
    ) -> S3Result<Piece> {
        let mut writer = Writer::new(self)?;
        if let Some(mut body) = body {
            while let Some(chunk) = body.next().await {
                let chunk = chunk.map_err(|error| broken_body(&error))?;
                hashes.update(&chunk);
                if let Err(error) = writer.add(chunk).await {
                    writer.discard();
                    return Err(S3Error::internal_error(error));
                }
            }
        }
        writer.finish().await.map_err(S3Error::internal_error)
    }

    /// A piece that is at hand, for damaging objects.
    pub(crate) fn store(&self, bytes: Vec<u8>) -> io::Result<Piece> {
        let size = bytes.len() as u64;
        match self {
            Self::Memory => {
                let chunks = Arc::new(vec![Bytes::from(bytes)]);
                Ok(Piece { size, file: String::new(), chunks })
            }
            Self::Folder { data, last_number } => {
                let file = format!("{:016x}", last_number.fetch_add(1, Ordering::Relaxed) + 1);
                fs::write(data.join(&file), bytes)?;
                Ok(Piece { size, file, chunks: Arc::default() })
            }
        }
    }

    /// The bytes of an object in one vector.
    pub(crate) fn read_all(&self, pieces: &[Piece]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for piece in pieces {
            match self {
                Self::Memory => {
                    piece.chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk))
                }
                Self::Folder { data, .. } => bytes.extend(fs::read(data.join(&piece.file))?),
            }
        }
        Ok(bytes)
    }

    /// The bytes of `range` of an object made of `pieces`. Files are opened now, so a delete does not
    /// disturb who reads.
    pub(crate) fn read(&self, pieces: &[Piece], range: Range<u64>) -> io::Result<Reading> {
        let mut parts = Vec::new();
        let mut at = 0;
        for piece in pieces {
            let (start, end) = (range.start.max(at), range.end.min(at + piece.size));
            if start < end {
                let inside = start - at..end - at;
                match self {
                    Self::Memory => chunks_of(&piece.chunks, inside, &mut parts),
                    Self::Folder { data, .. } => {
                        let file = Arc::new(File::open(data.join(&piece.file))?);
                        parts.extend(
                            slices(inside).map(|slice| ReadPart::File(file.clone(), slice)),
                        );
                    }
                }
            }
            at += piece.size;
        }
        Ok(Reading { parts })
    }

    /// Forgets pieces that nothing refers to.
    pub(crate) fn discard(&self, pieces: &[Piece]) {
        if let Self::Folder { data, .. } = self {
            for piece in pieces {
                let _ = fs::remove_file(data.join(&piece.file));
            }
        }
    }
}

fn broken_body(error: &s3s::StdError) -> S3Error {
    let text = error.to_string();
    if text.to_lowercase().contains("sha256") || text.to_lowercase().contains("checksum") {
        return s3_error!(BadDigest, "{text}");
    }
    s3_error!(IncompleteBody, "the body broke off: {text}")
}

/// What a reader will send.
#[derive(Debug)]
pub(crate) struct Reading {
    parts: Vec<ReadPart>,
}

#[derive(Debug)]
enum ReadPart {
    Memory(Bytes),
    File(Arc<File>, Range<u64>),
}

type Chunks = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send + Sync>>;

impl Reading {
    pub(crate) fn into_blob(self) -> StreamingBlob {
        let chunks: Chunks = Box::pin(stream::iter(self.parts).then(|part| async move {
            match part {
                ReadPart::Memory(bytes) => Ok(bytes),
                ReadPart::File(file, range) => {
                    blocking(move || {
                        let size = usize::try_from(range.end - range.start).unwrap_or(0);
                        let mut buffer = vec![0; size];
                        file.read_exact_at(&mut buffer, range.start)?;
                        Ok(Bytes::from(buffer))
                    })
                    .await
                }
            }
        }));
        StreamingBlob::wrap(chunks)
    }
}

/// Cuts a range into what is read at a time.
fn slices(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(BUFFER_BYTES).map(move |start| start..end.min(start + BUFFER_BYTES as u64))
}

/// The slices of memory that make up `range`.
fn chunks_of(chunks: &[Bytes], range: Range<u64>, parts: &mut Vec<ReadPart>) {
    let mut at = 0;
    for chunk in chunks {
        let size = chunk.len() as u64;
        let (start, end) = (range.start.max(at), range.end.min(at + size));
        if start < end {
            let inside = usize::try_from(start - at).ok().zip(usize::try_from(end - at).ok());
            if let Some((start, end)) = inside {
                parts.push(ReadPart::Memory(chunk.slice(start..end)));
            }
        }
        at += size;
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Takes chunks to their place.
struct Writer {
    size: u64,
    gathered: Vec<Bytes>,
    gathered_bytes: usize,
    file: Option<(Arc<File>, PathBuf, String)>,
}

impl Writer {
    fn new(backend: &Backend) -> S3Result<Self> {
        let file = match backend {
            Backend::Memory => None,
            Backend::Folder { data, last_number } => {
                let name = format!("{:016x}", last_number.fetch_add(1, Ordering::Relaxed) + 1);
                let path = data.join(&name);
                let file = File::create(&path).map_err(S3Error::internal_error)?;
                Some((Arc::new(file), path, name))
            }
        };
        Ok(Self { size: 0, gathered: Vec::new(), gathered_bytes: 0, file })
    }

    async fn add(&mut self, chunk: Bytes) -> io::Result<()> {
        self.size += chunk.len() as u64;
        self.gathered_bytes += chunk.len();
        let small = chunk.len() < COPY_BYTES_MAX && self.file.is_none();
        self.gathered.push(if small { Bytes::copy_from_slice(&chunk) } else { chunk });
        if self.gathered_bytes >= BUFFER_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        let Some((file, _, _)) = &self.file else { return Ok(()) };
        let (file, gathered) = (Arc::clone(file), std::mem::take(&mut self.gathered));
        self.gathered_bytes = 0;
        blocking(move || gathered.iter().try_for_each(|chunk| (&*file).write_all(chunk))).await
    }

    async fn finish(mut self) -> io::Result<Piece> {
        if let Err(error) = self.flush().await {
            self.discard();
            return Err(error);
        }
        let file = self.file.map(|(_, _, name)| name).unwrap_or_default();
        let chunks = Arc::new(if file.is_empty() { self.gathered } else { Vec::new() });
        Ok(Piece { size: self.size, file, chunks })
    }

    fn discard(&mut self) {
        if let Some((_, path, _)) = &self.file {
            let _ = fs::remove_file(path);
        }
    }
}
