//! What the server sends, taken apart: messages and tar archives.
//!
//! Unit: bytes a second of the thread that receives. Limit: reading the same bytes from the same kind
//! of socket and looking at none of them. No server of PostgreSQL's is here: it would be slower than
//! what is measured.

use std::hint::black_box;
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use bytes::Bytes;
use criterion::{BenchmarkId, Throughput};
use tidemark::capture::base::tar::{ArchiveEnd, Splitter, TarEvent};
use tidemark::clock::Clock;
use tidemark::pg::{Lsn, TimelineId};
use tidemark::wire::{ConnectOptions, Connection, Session, WalEvent, WalStream};
use tokio::runtime::Builder;

use crate::measure::{Bench, bytes};

/// WAL received in one measurement.
const RECEIVED_BYTES: usize = 32 << 20;
/// Sizes of messages: a walsender's greatest, and a page at a time as under a light load.
const MESSAGE_BYTES: [usize; 2] = [128 << 10, 8 << 10];
/// The buffer that the product reads into.
const READ_BUFFER_BYTES: usize = 512 << 10;
/// Where the stream begins.
const START: Lsn = Lsn(1 << 24);

pub fn bench(bench: &mut Bench) {
    messages(bench);
    archives(bench);
}

fn messages(bench: &mut Bench) {
    let home = tempfile::tempdir().unwrap();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let mut group = bench.cpu.benchmark_group("messages");
    for size in MESSAGE_BYTES {
        let count = RECEIVED_BYTES / size;
        let (elements, total) = (count as u64, (count * size) as u64);
        group.throughput(Throughput::ElementsAndBytes { elements, bytes: total });
        let name = format!("CopyData of {} KiB", size >> 10);
        group.bench_function(BenchmarkId::new("WAL stream", &name), |run| {
            let mut stream = runtime.block_on(connect(home.path(), size));
            run.iter(|| runtime.block_on(receive(&mut stream, count)));
        });
        group.bench_function(BenchmarkId::new("limit: read(2) alone", &name), |run| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            thread::spawn(move || send_wal(&theirs, size));
            let mut buffer = vec![0; READ_BUFFER_BYTES];
            run.iter(|| {
                let mut left = count * (size + 30);
                while left > 0 {
                    left = left.saturating_sub(ours.read(black_box(&mut buffer)).unwrap());
                }
            });
        });
    }
    group.finish();
}

async fn receive(stream: &mut WalStream, count: usize) -> u64 {
    let mut received = 0;
    for _ in 0..count {
        match stream.next().await.unwrap() {
            WalEvent::Wal { data, .. } => received += black_box(data).len() as u64,
            other => panic!("{other:?}"),
        }
    }
    received
}

/// A stream from a server in this process that sends WAL without end.
async fn connect(home: &Path, size: usize) -> WalStream {
    let socket = home.join(".s.PGSQL.5432");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || serve(&listener.accept().unwrap().0, size));
    let text = format!("host={} port=5432 user=bench", home.display());
    let options = ConnectOptions::parse(&text, &|_| None).unwrap();
    let connection =
        Connection::connect(&options, Session::Physical, &Clock::system()).await.unwrap();
    connection.start_replication(None, START, TimelineId::FIRST).await.unwrap()
}

/// What a server says until WAL flows.
fn serve(mut socket: &UnixStream, size: usize) {
    let mut asked = [0; 4096];
    let _startup = socket.read(&mut asked).unwrap();
    let mut hello = b"R\0\0\0\x08\0\0\0\0".to_vec();
    let parameter = b"server_version\x0015.10\0";
    hello.push(b'S');
    hello.extend_from_slice(&(4 + parameter.len() as u32).to_be_bytes());
    hello.extend_from_slice(parameter);
    hello.extend_from_slice(b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I");
    socket.write_all(&hello).unwrap();
    let _start_replication = socket.read(&mut asked).unwrap();
    socket.write_all(b"W\0\0\0\x07\0\0\0").unwrap();
    send_wal(socket, size);
}

/// Sends messages of so much WAL each until nobody reads them.
fn send_wal(mut socket: &UnixStream, size: usize) {
    let wal = vec![7; size];
    let mut at = START.0;
    loop {
        let mut head = vec![b'd'];
        head.extend_from_slice(&(4 + 25 + size as u32).to_be_bytes());
        head.push(b'w');
        head.extend_from_slice(&at.to_be_bytes());
        at += size as u64;
        head.extend_from_slice(&at.to_be_bytes());
        head.extend_from_slice(&[0; 8]);
        let mut parts = &mut [IoSlice::new(&head), IoSlice::new(&wal)][..];
        while !parts.is_empty() {
            match socket.write_vectored(parts) {
                Ok(count) => IoSlice::advance_slices(&mut parts, count),
                Err(_nobody_reads) => return,
            }
        }
    }
}

/// Splitting an archive as BASE_BACKUP sends it.
fn archives(bench: &mut Bench) {
    let mut group = bench.cpu.benchmark_group("tar");
    for (name, sizes) in
        [("files of 8 KiB", vec![8 << 10; 4000]), ("files of 16 MiB", vec![16 << 20; 2])]
    {
        let archive = Bytes::from(sizes.iter().flat_map(|size| member(*size)).collect::<Vec<u8>>());
        for piece_bytes in [32 << 10, 128 << 10] {
            let cut = |from: usize| archive.slice(from..(from + piece_bytes).min(archive.len()));
            let pieces: Vec<Bytes> = (0..archive.len()).step_by(piece_bytes).map(cut).collect();
            let (elements, total) = (sizes.len() as u64, archive.len() as u64);
            group.throughput(Throughput::ElementsAndBytes { elements, bytes: total });
            let id = format!("{name}, in pieces of {} KiB", piece_bytes >> 10);
            group.bench_function(id, |run| run.iter(|| split(&pieces)));
        }
        let mut copy = vec![0; archive.len()];
        group.throughput(bytes(archive.len()));
        group.bench_function(format!("{name}, for comparison: memcpy"), |run| {
            run.iter(|| {
                copy.copy_from_slice(black_box(&archive));
                black_box(copy.last().copied())
            });
        });
    }
    group.finish();
}

fn split(pieces: &[Bytes]) -> u64 {
    let mut splitter = Splitter::new();
    let mut content = 0;
    for piece in pieces {
        splitter.push(piece.clone());
        while let Some(event) = splitter.next().unwrap() {
            if let TarEvent::Data(data) = event {
                content += black_box(data).len() as u64;
            }
        }
    }
    splitter.finish(ArchiveEnd::Bare).unwrap();
    content
}

/// A member with its header, as `tarCreateHeader` writes it.
fn member(size: usize) -> Vec<u8> {
    let mut header = [0; 512];
    let mut put = |at: usize, text: &str| {
        header[at..at + text.len()].copy_from_slice(text.as_bytes());
    };
    put(0, "base/5/16384");
    put(100, "0000600 ");
    put(108, "0000000 ");
    put(116, "0000000 ");
    put(124, &format!("{size:011o} "));
    put(136, "14700000000 ");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|byte: &u8| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o} \0").as_bytes());
    let mut bytes = header.to_vec();
    bytes.resize(512 + size.next_multiple_of(512), 7);
    bytes
}
