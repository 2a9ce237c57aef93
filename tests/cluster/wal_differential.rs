//! WAL that no server ever wrote, read by us and by pg_waldump: whatever it accepts we accept with the
//! same records, whatever we accept it accepts with the same lengths, resource managers and block
//! references.
//!
//! The cases are the kept inputs of the fuzz targets `wal_pages` and `wal_records`, and seeded
//! mutations of the records of real servers, half of them with headers and CRCs made right again.
//! `TIDEMARK_TEST_WAL_MUTATIONS` says how many mutations, `TIDEMARK_TEST_SEED` where they begin: without it
//! each commit has others. A long run, minutes a major, is
//! `TIDEMARK_TEST_WAL_MUTATIONS=20000 cargo test --test cluster however_it_was_mutated`.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tidemark::fuzz::{mend_wal, wal_of_pages, wal_of_records};
use tidemark::pg::{Lsn, SegmentSize, TimelineId};
use tidemark::wal::RecordReader;

use crate::harness::commit::commit_seed;
use crate::harness::wal_lines::{SAMPLE_BYTES_MAX, cut_down, our_line, waldump_records};
use crate::harness::{Account, Binaries};

/// Mutations of a run that says nothing else.
const MUTATIONS: u64 = 60;

/// CPU time after which pg_waldump is taken to have died, seconds: it may go round for ever in describing
/// nonsense (`desc_recompress_leaf` in `gindesc.c`), and what is no nonsense takes it milliseconds.
const CPU_SECONDS_MAX: u64 = 10;

/// What we refuse and pg_waldump does not, on purpose.
const STRICTER: [&str; 7] = [
    // It would look up the fork's name behind the end of a table.
    "names an unknown fork",
    // No server writes these, and nobody could restore such an image.
    "names two compressions",
    "contradicts itself about its hole",
    "its timeline is 0",
    // At the start, where it looks for the next record on a later page.
    "is not continued on page",
    "it continues a record by",
    // The page at the start lies about how far a record goes on: the one behind it follows one within.
    "expected an earlier one",
];

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// SplitMix64.
fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (*state ^ *state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ mixed >> 31
}

struct Case {
    name: String,
    start: Lsn,
    wal: Vec<u8>,
}

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// The real WAL of a server of `major`, which begins with a segment.
fn real_wal(major: u32) -> (Lsn, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/wal");
    let unpacked = |kind| {
        let packed = std::fs::read(folder.join(format!("{major}.{kind}.zst"))).unwrap();
        zstd::bulk::decompress(&packed, SAMPLE_BYTES_MAX).unwrap()
    };
    let text = String::from_utf8(unpacked("txt")).unwrap();
    (text.lines().next().unwrap().parse().unwrap(), unpacked("wal"))
}

/// Records of every kind that a server of `major` was brought to write, laid out anew.
fn each_kind(major: u32) -> (Lsn, Vec<u8>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/wal_records");
    wal_of_records(&std::fs::read(folder.join(format!("seed-{major}-each-0"))).unwrap(), major)
}

fn mutated(major: u32, seed: u64) -> Case {
    let mut state = seed;
    let one_in_four = draw(&mut state).is_multiple_of(4);
    let (start, mut wal) = if one_in_four { each_kind(major) } else { real_wal(major) };
    // Long enough to hold every kind of record once in a while, short enough to be quick.
    let pages = 1 + draw(&mut state) % 12;
    // The padding behind a switch has nothing to mutate.
    let written = |page: &usize| wal[page * 8192..].iter().take(2).any(|byte| *byte != 0);
    let places: Vec<usize> = (0..wal.len() / 8192).filter(written).collect();
    let first = places[draw(&mut state) as usize % places.len()] as u64;
    let start = Lsn(start.0 + first * 8192);
    wal.drain(..first as usize * 8192);
    wal.truncate(pages as usize * 8192);
    let magic = [wal[0], wal[1]];
    for _ in 0..1 + draw(&mut state) % 6 {
        let place = draw(&mut state) as usize % wal.len();
        wal[place] = match draw(&mut state) % 4 {
            0 => 0,
            1 => 0xff,
            2 => wal[place] ^ 1 << (draw(&mut state) % 8),
            _ => draw(&mut state) as u8,
        };
    }
    let mended = seed.is_multiple_of(2);
    if mended {
        // Else it would become the WAL of another major.
        wal[..2].copy_from_slice(&magic);
        mend_wal(&mut wal, start);
    }
    let name = format!("mutation TIDEMARK_TEST_SEED={seed} TIDEMARK_TEST_WAL_MUTATIONS=1");
    Case { name, start, wal }
}

fn kept(major: u32) -> Vec<Case> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let inputs = |target: &str| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(corpus.join(target)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let case = |path: PathBuf, read: fn(&[u8], u32) -> (Lsn, Vec<u8>)| {
        let (start, wal) = read(&std::fs::read(&path).unwrap(), major);
        Case { name: path.display().to_string(), start, wal }
    };
    let pages = inputs("wal_pages").into_iter().map(|path| case(path, wal_of_pages));
    let records = inputs("wal_records").into_iter().map(|path| case(path, wal_of_records));
    pages.chain(records).filter(|case| !case.wal.is_empty()).collect()
}

/// Our lines and what ended them; the bytes are those of whole segments.
fn ours(start: Lsn, wal: &[u8]) -> (Vec<String>, Option<String>) {
    let mut lines = Vec::new();
    let mut reader = RecordReader::new(size(), start);
    let outcome = reader.feed(wal, &mut |record| {
        lines.push(our_line(record));
        Ok(())
    });
    (lines, outcome.err().map(|error| error.to_string()))
}

/// Their records, and whether pg_waldump died of what it read.
pub(super) struct Theirs {
    /// Each that it described, with the lines of its blocks.
    pub(super) records: Vec<String>,
    pub(super) said: String,
    pub(super) crashed: bool,
}

/// Writes the WAL as segment files into `folder` and lets pg_waldump read them.
pub(super) fn theirs(binaries: &Binaries, folder: &Path, start: Lsn, wal: &[u8]) -> Theirs {
    let segment_start = size().start_of(start);
    let before = start.saturating_since(segment_start) as usize;
    let mut content = vec![0; before];
    content.extend_from_slice(wal);
    if before > 0 {
        // The first page of a segment says how large segments are.
        content[..2].copy_from_slice(&wal[..2]);
        mend_wal(&mut content[..8192], segment_start);
    }
    let mut end = segment_start;
    for segment in content.chunks(size().bytes() as usize) {
        let name = size().file_name(TimelineId::FIRST, size().number_of(end));
        let path = folder.join(name);
        let mut file = File::create(&path).unwrap();
        file.write_all(segment).unwrap();
        file.set_len(size().bytes()).unwrap();
        // Whatever the umask is.
        Account::current().give(&path);
        end = Lsn(end.0 + size().bytes());
    }
    let (start, end) = (start.to_string(), end.to_string());
    let judge = binaries.command("pg_waldump");
    let settings = judge.get_envs().filter_map(|(name, value)| Some((name, value?)));
    let answer = Account::current()
        .command("/bin/sh")
        .args(["-c", &format!("ulimit -t {CPU_SECONDS_MAX}; exec \"$0\" \"$@\"")])
        .arg(judge.get_program())
        .envs(settings)
        .env("TZ", "UTC")
        .envs(line_by_line())
        .args(["-b", "-s", &start, "-e", &end, "-p"])
        .arg(folder)
        .output()
        .unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    let mut records = waldump_records(&String::from_utf8_lossy(&answer.stdout));
    records.retain(|record| record.contains(", desc: "));
    Theirs {
        records,
        said: String::from_utf8_lossy(&answer.stderr).trim().to_owned(),
        crashed: answer.status.signal().is_some(),
    }
}

/// The variables with which `stdbuf` makes a program print a line at a time, so that what it printed
/// before it died is not lost.
fn line_by_line() -> impl Iterator<Item = (String, String)> {
    let answer = Command::new("stdbuf").args(["-oL", "env"]).output().unwrap();
    let text = String::from_utf8(answer.stdout).unwrap();
    let ours = |line: &str| line.starts_with("LD_PRELOAD=") || line.starts_with("_STDBUF_O=");
    let lines: Vec<String> = text.lines().filter(|line| ours(line)).map(str::to_owned).collect();
    lines.into_iter().map(|line| {
        let (name, value) = line.split_once('=').unwrap();
        (name.to_owned(), value.to_owned())
    })
}

/// How often what happened.
#[derive(Debug, Default)]
struct Tally {
    cases: usize,
    records: usize,
    crashes: usize,
    stricter: usize,
}

fn compare(binaries: &Binaries, folder: &Path, case: &Case, tally: &mut Tally) -> Option<String> {
    let segment_start = size().start_of(case.start);
    let used = case.start.saturating_since(segment_start) as usize + case.wal.len();
    let mut wal = case.wal.clone();
    wal.resize(wal.len() + used.next_multiple_of(size().bytes() as usize) - used, 0);
    let (ours, why) = ours(case.start, &wal);
    let theirs = theirs(binaries, folder, case.start, &case.wal);
    tally.cases += 1;
    let lines: Vec<String> = theirs.records.iter().map(|record| cut_down(record)).collect();
    tally.records += lines.len();
    for (one, other) in ours.iter().zip(&lines) {
        if one != other {
            return Some(format!("{}:\n  ours   {one}\n  theirs {other}", case.name));
        }
    }
    let stricter =
        why.as_deref().is_some_and(|why| STRICTER.iter().any(|reason| why.contains(reason)));
    tally.crashes += usize::from(theirs.crashed);
    tally.stricter += usize::from(ours.len() < lines.len() && stricter);
    let (count, their_count) = (ours.len(), lines.len());
    let fine = count == their_count
        || count < their_count && stricter
        // It describes every record, and what it describes may be nonsense.
        || count > their_count && theirs.crashed;
    let said = theirs.said;
    (!fine).then(|| {
        let name = &case.name;
        format!("{name}:\n  {count} records of ours, then {why:?}\n  {their_count} of theirs, then {said}")
    })
}

#[test]
fn we_and_pg_waldump_accept_the_same_wal_however_it_was_mutated() {
    let binaries = Binaries::of_this_run();
    if !binaries.brings("pg_waldump", "on mutated WAL") {
        return;
    }
    let major = binaries.major();
    let count = number("TIDEMARK_TEST_WAL_MUTATIONS").unwrap_or(MUTATIONS);
    let seed = number("TIDEMARK_TEST_SEED").unwrap_or_else(commit_seed);
    println!("TIDEMARK_TEST_SEED={seed} TIDEMARK_TEST_WAL_MUTATIONS={count}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let play = |cases: &mut dyn Iterator<Item = Case>, tally: &mut Tally| -> Vec<String> {
        cases.filter_map(|case| compare(&binaries, folder.path(), &case, tally)).collect()
    };
    let (mut of_kept, mut of_mutations) = (Tally::default(), Tally::default());
    let mut differences = play(&mut kept(major).into_iter(), &mut of_kept);
    let mut mutations = (seed..seed + count).map(|seed| mutated(major, seed));
    differences.extend(play(&mut mutations, &mut of_mutations));
    println!("PostgreSQL {major}, kept {of_kept:?}, mutations {of_mutations:?}");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    let records = of_kept.records + of_mutations.records;
    assert!(records > 300, "too few records to mean anything: {records}");
    // Where it dies nothing more is compared. Of what fuzzing found much is meant to be nonsense.
    for (tally, share) in [(of_kept, 2), (of_mutations, 5)] {
        assert!(
            tally.crashes * share < tally.cases,
            "too many crashes to mean anything: {tally:?}"
        );
    }
}
