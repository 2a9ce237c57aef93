//! WAL of every supported major as pg_waldump read it when the samples were made.

use std::collections::BTreeSet;
use std::path::Path;

use super::wal_lines::{RMGR_COUNT, Sample, kinds_of_records};

const SEGMENT_BYTES: usize = 1 << 20;

#[test]
fn samples_of_every_major_are_read_as_pg_waldump_reads_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
    for major in 13..=18 {
        Sample::read(&folder, major).check(&[]);
    }
}

#[test]
fn fuzzing_begins_with_every_kind_of_record_that_a_load_brings() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/wal_records");
    for major in 13..=18 {
        let prefix = format!("seed-{major}-each-");
        let seeds = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let seeds =
            seeds.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(&prefix));
        let kinds: BTreeSet<(u8, u8)> =
            seeds.flat_map(|seed| kinds_of_records(&std::fs::read(seed).unwrap(), major)).collect();
        let rmgrs: BTreeSet<u8> = kinds.iter().map(|kind| kind.0).collect();
        assert!(rmgrs.into_iter().eq(0..RMGR_COUNT), "PostgreSQL {major}: {kinds:?}");
        assert!(kinds.len() >= 80, "PostgreSQL {major}: {} kinds", kinds.len());
    }
}

#[test]
fn inspect_shows_every_record_of_a_segment_file() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
    let sample = Sample::read(&folder, 17);
    let mut bytes = sample.wal.clone();
    bytes.resize(SEGMENT_BYTES, 0);
    let number = sample.start.0 / SEGMENT_BYTES as u64;
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(format!("00000001{:08X}{:08X}", number >> 12, number & 0xfff));
    std::fs::write(&path, bytes).unwrap();
    let inspect = |words: &[&str]| {
        let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_tidemark"));
        command.env("HOME", home.path()).arg("inspect").arg(&path).args(words);
        String::from_utf8(command.assert().success().get_output().stdout.clone()).unwrap()
    };
    let all: serde_json::Value = serde_json::from_str(&inspect(&["--all", "--json"])).unwrap();
    let records = all["records"].as_array().unwrap();
    let end = format!("{}", tidemark::pg::Lsn(sample.start.0 + SEGMENT_BYTES as u64));
    assert_eq!(all["end"].as_str(), Some(end.as_str()));
    let counted: u64 = all["wal"]["resource_managers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rmgr| rmgr["records"].as_u64().unwrap())
        .sum();
    assert_eq!(records.len() as u64, counted);
    // A record's first line in the sample has no '#'.
    let wanted: Vec<&str> =
        sample.records.lines().filter(|line| line.starts_with("rmgr: ")).collect();
    assert!(records.len() > 100 && records.len() <= wanted.len(), "{}", records.len());
    for (record, line) in records.iter().zip(wanted) {
        let rmgr = line.strip_prefix("rmgr: ").unwrap().split(' ').next().unwrap();
        assert_eq!(record["rmgr"], rmgr, "{line}");
    }
    let text = inspect(&["--all"]);
    let listed = text.split_once("\nrecords:\n").unwrap().1;
    assert_eq!(listed.lines().count(), records.len());
    let summary: serde_json::Value = serde_json::from_str(&inspect(&["--json"])).unwrap();
    assert_eq!(summary["wal"], all["wal"]);
    assert!(summary.get("records").is_none());
}
