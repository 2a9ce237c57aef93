//! WAL of every supported major as pg_waldump read it when the samples were made.

use std::path::Path;

use tidemark::pg::{ControlFile, Lsn, SegmentSize};
use tidemark::wal::{RecordReader, Scanner};

use super::wal_lines::{in_pieces, landmark_line, our_line};

/// Greatest size of an unpacked sample, bytes.
const SAMPLE_BYTES_MAX: usize = 2 << 20;

fn sample(major: u32, kind: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
    let packed = std::fs::read(folder.join(format!("{major}.{kind}.zst"))).unwrap();
    zstd::bulk::decompress(&packed, SAMPLE_BYTES_MAX).unwrap()
}

#[test]
fn samples_of_every_major_are_read_as_pg_waldump_reads_them() {
    let size = SegmentSize::new(1 << 20).unwrap();
    for major in 13..=18 {
        let wal = sample(major, "wal");
        let text = String::from_utf8(sample(major, "txt")).unwrap();
        let (start, text) = text.split_once('\n').unwrap();
        let (records, landmarks) = text.split_once("\n\n").unwrap();
        let start: Lsn = start.parse().unwrap();

        let mut ours = Vec::new();
        let mut reader = RecordReader::new(size, start);
        in_pieces(&wal, |piece| {
            let each = &mut |record: &tidemark::wal::Record<'_>| {
                assert_eq!(record.major, major);
                ours.push(our_line(record));
                Ok(())
            };
            reader.feed(piece, each).unwrap();
        });
        assert_eq!(ours.join("\n"), records, "PostgreSQL {major}");

        let mut ours = Vec::new();
        let mut scanner = Scanner::new(size, start);
        in_pieces(&wal, |piece| {
            scanner.feed(piece, &mut |landmark| ours.push(landmark_line(&landmark))).unwrap();
        });
        assert_eq!(ours.join("\n"), landmarks.trim_end(), "PostgreSQL {major}");
        for kind in ["commit", "abort", "prepare", "point sample", "checkpoint Online"] {
            assert!(landmarks.contains(kind), "PostgreSQL {major}: no {kind} in the sample");
        }

        let control = ControlFile::decode(&sample(major, "control")).unwrap();
        assert_eq!(control.major, Some(major));
        assert_eq!(control.wal_segment_size, size);
        let shutdown = format!("{} checkpoint Shutdown", control.checkpoint_lsn);
        assert!(landmarks.contains(&shutdown), "PostgreSQL {major}: {shutdown}");
    }
}
