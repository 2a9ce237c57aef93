//! Files of a data directory, and names in it.

use jiff::Timestamp;
use ring::digest;
use serde_json::Value;

use super::input::Input;
use crate::pg::backup_label::{
    TABLESPACE_MAP_BYTES_MAX, decode_tablespace_map, encode_tablespace_map,
};
use crate::pg::backup_manifest::{BackupManifest, ManifestFile};
use crate::pg::control::{CHECKPOINT_BYTES, PG_CONTROL_FILE_SIZE};
use crate::pg::data_dir::RelationFile;
use crate::pg::page::{
    BLCKSZ, CHANGE_BYTES_MAX, PageHeader, PageVerdict, page_checksum, verify_page,
};
use crate::pg::{
    BackupLabel, Checkpoint, ControlFile, Lsn, LsnRange, SegmentSize, SystemId, TimelineHistory,
    TimelineId, Version, crc32c,
};

/// What was read can be written and read again; the path covers every position once.
pub(super) fn timeline_history(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let Some(timeline) = TimelineId::new(input.u32()) else { return };
    let Ok(history) = TimelineHistory::decode(timeline, input.rest()) else { return };
    let lines = history.entries().iter();
    let lines =
        lines.map(|entry| format!("{}\t{}\t{}\n", entry.timeline, entry.switch_lsn, entry.reason));
    let again: String = lines.collect();
    let again = TimelineHistory::decode(timeline, again.as_bytes());
    assert_eq!(again.expect("what was read can be read again"), history);

    let path = history.path();
    let mut next = Some(Lsn(0));
    for part in &path {
        assert_eq!(Some(part.start), next);
        assert!(part.end.is_none_or(|end| part.start <= end));
        if part.end.is_none_or(|end| part.start < end) {
            assert_eq!(history.timeline_at(part.start), part.timeline);
        }
        next = part.end;
    }
    assert_eq!(next, None, "the last part is open");
    assert_eq!(path.last().map(|part| part.timeline), Some(timeline));
}

/// What was read can be written as the server writes it and read again.
pub(super) fn backup_label(bytes: &[u8]) {
    let Ok(label) = BackupLabel::decode(bytes) else { return };
    let again = BackupLabel::decode(&label.encode(SegmentSize::DEFAULT));
    assert_eq!(again.expect("what was read can be read again"), label);
}

/// What was read can be written and read again.
pub(super) fn tablespace_map(bytes: &[u8]) {
    let Ok(links) = decode_tablespace_map(bytes) else { return };
    let again = encode_tablespace_map(&links);
    assert!(again.len() <= TABLESPACE_MAP_BYTES_MAX);
    assert_eq!(decode_tablespace_map(&again).expect("what was read can be read again"), links);
}

/// No bit of what the CRC covers can change unnoticed, and what is behind it does not matter.
pub(super) fn control_file(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let (mended, place) = (input.byte() & 1 != 0, usize::from(input.u16()));
    let mut file = input.take(PG_CONTROL_FILE_SIZE).to_vec();
    let version = file.get(8..12).and_then(|word| word.first_chunk()).copied();
    let crc_offset = match version.map(u32::from_le_bytes) {
        Some(1300 | 1700) => 288,
        _ => 292,
    };
    if mended && file.len() >= crc_offset + 4 {
        let crc = crc32c(&file[..crc_offset]).to_le_bytes();
        file[crc_offset..crc_offset + 4].copy_from_slice(&crc);
    }
    if let Some(checkpoint) = file.get(40..).and_then(Checkpoint::decode) {
        assert!(file.len() >= 40 + CHECKPOINT_BYTES);
        assert_eq!(Checkpoint::decode(&file[40..40 + CHECKPOINT_BYTES]), Some(checkpoint));
    }
    let Ok(control) = ControlFile::decode(&file) else { return };
    assert!(!control.state.description().is_empty());
    let covered = crc_offset + 4;
    assert_eq!(ControlFile::decode(&file[..covered]).ok(), Some(control));
    file[place % covered] ^= 1 << (place / covered % 8);
    assert!(ControlFile::decode(&file).is_err(), "a flipped bit went unnoticed");
}

/// A name that is understood is written the same way again.
pub(super) fn file_names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for size in [SegmentSize::MIN_BYTES, 16 << 20, SegmentSize::MAX_BYTES] {
        let size = SegmentSize::new(size).expect("a segment size");
        if let Some((timeline, number)) = size.parse_file_name(text) {
            assert_eq!(size.file_name(timeline, number), text);
        }
    }
    if let Ok(lsn) = text.parse::<Lsn>() {
        assert_eq!(lsn.to_string().parse::<Lsn>().ok(), Some(lsn));
    }
    let versions = [Version::from_setting(text), Version::from_version_file(bytes)];
    for version in versions.into_iter().flatten() {
        assert!((13..=18).contains(&version.major()));
        let again = Version::from_server_version_num(version.server_version_num());
        assert_eq!(again.ok(), Some(version));
    }
    if let Ok(id) = text.parse::<SystemId>() {
        assert_eq!(id.to_string().parse::<SystemId>().ok(), Some(id));
    }
    if let Some(file) = RelationFile::from_path(text) {
        let relation = file.relation;
        assert!(relation.number != 0 && text.contains(&relation.number.to_string()));
        let last = file.block_number_at((1 << 30) - 1);
        assert!(last.is_none_or(|block| block >= file.segment));
    }
}

/// A manifest is JSON that names the paths it was given, and its checksum is right.
pub(super) fn backup_manifest(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let version =
        Version::from_server_version_num(input.choose(&[130_000, 160_000, 170_000, 180_001]));
    let Ok(version) = version else { return };
    let mut manifest = BackupManifest::new(version, SystemId(input.u64()));
    let (mut written, mut paths) = (Vec::new(), Vec::new());
    while !input.is_empty() {
        let crc32c = (input.byte() & 1 == 0).then_some(7);
        let seconds = i64::from(input.u32());
        let size_bytes = input.u64();
        let length = usize::from(input.byte());
        let path = input.take(length);
        let modified = Timestamp::from_second(seconds).expect("a 32-bit time");
        manifest.file(&ManifestFile { path, size_bytes, modified, crc32c });
        paths.push((path, size_bytes));
        if seconds % 2 == 0 {
            written.extend(manifest.take());
        }
    }
    let range = LsnRange::new(Lsn(1), Lsn(2)).expect("a range");
    written.extend(manifest.finish(&[(TimelineId::FIRST, range)]));

    let text = std::str::from_utf8(&written).expect("JSON is text");
    let (covered, _) = text.rsplit_once("\"Manifest-Checksum\"").expect("a checksum at its end");
    let expected = digest::digest(&digest::SHA256, covered.as_bytes());
    let json: Value = serde_json::from_str(text).expect("a manifest is JSON");
    assert_eq!(json["Manifest-Checksum"], hex(expected.as_ref()));
    let files = json["Files"].as_array().expect("a list of files");
    assert_eq!(files.len(), paths.len());
    for (file, (path, size_bytes)) in files.iter().zip(paths) {
        assert_eq!(file["Size"], size_bytes);
        match file["Path"].as_str() {
            Some(found) => assert_eq!(found.as_bytes(), path),
            None => assert_eq!(file["Encoded-Path"], hex(path)),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A page with the checksum it must carry is right or changed since the start, unless it says that it
/// was never initialised, and the checksum is what the simplest reading of PostgreSQL's source gives.
pub(super) fn data_page(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let block_number = input.u32();
    let mut page = [0; BLCKSZ];
    let content = input.take(BLCKSZ);
    page[..content.len()].copy_from_slice(content);
    let checksum = page_checksum(&page, block_number);
    assert_eq!(checksum, plain_checksum(&page, block_number));
    page[8..10].copy_from_slice(&checksum.to_le_bytes());
    assert_eq!(page_checksum(&page, block_number), checksum, "the checksum covers itself");
    let header = PageHeader::decode(&page);
    assert_eq!(header.checksum, checksum);
    let refused = PageVerdict::Mismatch { expected: checksum, found: checksum };
    let expected = if header.is_new() { refused } else { PageVerdict::Ok };
    if header.lsn < Lsn(u64::MAX) {
        assert_eq!(verify_page(&page, block_number, Lsn(u64::MAX)), expected);
    }
    page[8] ^= 1;
    let found = PageHeader::decode(&page).checksum;
    let refused = PageVerdict::Mismatch { expected: checksum, found };
    let expected = match header.is_new() {
        true if page == [0; BLCKSZ] => PageVerdict::New,
        true => refused,
        false => PageVerdict::ChangedSinceStart,
    };
    assert_eq!(verify_page(&page, block_number, header.lsn), expected);
    if let Some(too_far) = header.lsn.0.checked_sub(CHANGE_BYTES_MAX + 1)
        && !header.is_new()
    {
        assert_eq!(verify_page(&page, block_number, Lsn(too_far)), refused);
    }
}

/// `pg_checksum_page` one word after the other.
fn plain_checksum(page: &[u8; BLCKSZ], block_number: u32) -> u16 {
    const BASE: [u32; 32] = [
        0x5B1F_36E9,
        0xB852_5960,
        0x02AB_50AA,
        0x1DE6_6D2A,
        0x79FF_467A,
        0x9BB9_F8A3,
        0x217E_7CD2,
        0x83E1_3D2C,
        0xF8D4_474F,
        0xE39E_B970,
        0x42C6_AE16,
        0x9932_16FA,
        0x7B09_3B5D,
        0x98DA_FF3C,
        0xF718_902A,
        0x0B1C_9CDB,
        0xE58F_764B,
        0x1876_36BC,
        0x5D7B_3BB1,
        0xE73D_E7DE,
        0x92BE_C979,
        0xCCA6_C0B2,
        0x304A_0979,
        0x85AA_43D4,
        0x7831_25BB,
        0x6CA8_EAA2,
        0xE407_EAC6,
        0x4B5C_FC3E,
        0x9FBF_8C76,
        0x15CA_20BE,
        0xF2CA_9FD3,
        0x959B_D756,
    ];
    let mut sums = BASE;
    let mut add = |index: usize, word: u32| {
        let mixed = sums[index] ^ word;
        sums[index] = mixed.wrapping_mul(16_777_619) ^ mixed >> 17;
    };
    for (index, word) in page.as_chunks::<4>().0.iter().enumerate() {
        let word = u32::from_le_bytes(*word);
        add(index % 32, if index == 2 { word & 0xffff_0000 } else { word });
    }
    for index in 0..64 {
        add(index % 32, 0);
    }
    let folded = sums.iter().fold(block_number, |folded, sum| folded ^ sum);
    u16::try_from(folded % 65_535 + 1).expect("at most 65535")
}
