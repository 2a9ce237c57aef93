//! A reader of the golden vectors written from `FORMAT.md` alone: it uses none of Tidemark's code, so
//! that the text is known to be enough.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf;

use crate::golden::{ROOTS, files, folder, wal};

const SYSTEM: u64 = 7_300_000_000_000_000_001;
const BACKUP: &str = "base/20261122T100000Z-00000001-0000000002000028";

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()))
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// "Data keys": zero bytes, or what the age file holds.
fn data_key(root: &str, header: &[u8]) -> [u8; 32] {
    let id = &header[16..32];
    if header[11] == 0 {
        assert_eq!(id, [0; 16]);
        return [0; 32];
    }
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let file = fs::read(folder().join(root).join("main/keys").join(hex)).unwrap();
    let identity = fs::read_to_string(folder().join("identity.txt")).unwrap();
    let line = identity.lines().find(|line| line.starts_with("AGE-SECRET-KEY-1")).unwrap();
    let identity: age::x25519::Identity = line.parse().unwrap();
    let decryptor = age::Decryptor::new(file.as_slice()).unwrap();
    let mut reader = decryptor.decrypt(std::iter::once(&identity as &dyn age::Identity)).unwrap();
    let mut plain = Vec::new();
    reader.read_to_end(&mut plain).unwrap();
    assert_eq!((plain.len(), &plain[..8]), (64, b"TMKEY v1".as_slice()));
    assert_eq!((u64_at(&plain, 8), &plain[16..32]), (SYSTEM, id));
    plain[32..].try_into().unwrap()
}

/// "The object key".
fn object_key(root: &str, header: &[u8], thing: &str) -> [u8; 32] {
    let mut info = b"tidemark v1".to_vec();
    info.extend_from_slice(&SYSTEM.to_le_bytes());
    info.extend_from_slice(&(thing.len() as u16).to_le_bytes());
    info.extend_from_slice(thing.as_bytes());
    info.extend_from_slice(header);
    let salt = hkdf::Salt::new(hkdf::HKDF_SHA256, &header[32..48]);
    let secret = salt.extract(&data_key(root, header));
    let mut key = [0; 32];
    secret.expand(&[&info], hkdf::HKDF_SHA256).unwrap().fill(&mut key).unwrap();
    key
}

/// "Frames": opens the one at the front of `bytes`; its index, whether it is last, its length and its
/// plain block.
fn open_frame(cipher: u8, key: &[u8; 32], bytes: &[u8]) -> (u32, bool, usize, Vec<u8>) {
    let (sealed, plain_len, index) = (u32_at(bytes, 0), u32_at(bytes, 4), u32_at(bytes, 8) as u32);
    assert_eq!((bytes[13] & !1, u16_at(bytes, 14)), (0, 0));
    let (header, mut rest) = (&bytes[..16], bytes[16..16 + sealed].to_vec());
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&index.to_le_bytes());
    if cipher == 1 {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
        let nonce = Nonce::assume_unique_for_key(nonce);
        key.open_in_place(nonce, Aad::from(header), &mut rest).unwrap();
    } else {
        let payload = &rest[..sealed - 16];
        let hash = blake3::keyed_hash(key, &[&nonce, header, payload].concat());
        assert_eq!(&hash.as_bytes()[..16], &rest[sealed - 16..]);
    }
    rest.truncate(sealed - 16);
    let plain = match bytes[12] {
        0 => rest,
        1 => zstd::bulk::decompress(&rest, plain_len).unwrap(),
        other => panic!("codec {other}"),
    };
    assert_eq!(plain.len(), plain_len);
    (index, bytes[13] & 1 == 1, 16 + sealed, plain)
}

/// All frames of `bytes`, one after the other, the last flagged.
fn open_frames(cipher: u8, key: &[u8; 32], mut bytes: &[u8], mut index: u32) -> Vec<u8> {
    let mut plain = Vec::new();
    loop {
        let (found, last, length, block) = open_frame(cipher, key, bytes);
        assert_eq!(found, index);
        plain.extend(block);
        bytes = &bytes[length..];
        assert_eq!(last, bytes.is_empty());
        if last {
            return plain;
        }
        index += 1;
    }
}

fn header(object: &[u8], kind: u8) -> &[u8] {
    assert_eq!((&object[..8], u16_at(object, 8), object[10]), (b"TIDEMARK".as_slice(), 1, kind));
    &object[..u16_at(object, 12)]
}

/// "WAL extents": every object of timeline 1, joined ones too.
fn read_wal(root: &str) -> usize {
    let mut objects = 0;
    for entry in fs::read_dir(folder().join(root).join("main/wal/00000001")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let start = usize::from_str_radix(&name[..16], 16).unwrap() - 0x200_0000;
        let end = usize::from_str_radix(&name[17..33], 16).unwrap() - 0x200_0000;
        let object = fs::read(entry.path()).unwrap();
        let (mut rest, mut plain) = (object.as_slice(), Vec::new());
        while !rest.is_empty() {
            let head = header(rest, 3);
            let (from, to, time) = (u64_at(head, 72), u64_at(head, 80), u64_at(head, 88));
            let timeline = u32_at(head, 64);
            let thing = format!("wal/{timeline:08X}/{from:016X}-{to:016X}-{time:016X}");
            let length = u32_at(head, 68);
            let key = object_key(root, head, &thing);
            plain.extend(open_frames(head[11], &key, &rest[96..96 + length], 0));
            rest = &rest[96 + length..];
        }
        assert!(plain == wal()[start..end], "{name}");
        objects += 1;
    }
    objects
}

/// "Packs": every regular file, by its path.
fn read_pack(root: &str) -> BTreeMap<String, Vec<u8>> {
    let thing = format!("{BACKUP}/pack-000001");
    let object = fs::read(folder().join(root).join("main").join(&thing)).unwrap();
    let head = header(&object, 1);
    let key = object_key(root, head, &thing);
    let trailer = &object[object.len() - 24..];
    assert_eq!(&trailer[16..], b"TIDEFOOT");
    let (offset, length) = (u64_at(trailer, 0) as usize, u32_at(trailer, 8));
    assert_eq!(offset + length + 24, object.len());
    let frames = &object[offset..offset + length];
    let footer = open_frames(head[11], &key, frames, u32_at(trailer, 12) as u32);

    let mut at = 0;
    let mut take = |bytes: usize| {
        at += bytes;
        &footer[at - bytes..at]
    };
    assert_eq!(u32_at(take(4), 0), 0, "a full backup has no sources");
    let mut entries = Vec::new();
    for _ in 0..u32_at(take(4), 0) {
        let (kind, flags) = (take(1)[0], take(1)[0]);
        take(4 + 8);
        let length = u16_at(take(2), 0);
        let path = String::from_utf8(take(length).to_vec()).unwrap();
        match kind {
            0 => {
                let (size, crc) = (u64_at(take(8), 0) as usize, u32_at(take(4), 0) as u32);
                assert_eq!(flags, 1, "every file ends in the only pack");
                entries.push((path, Some((vec![0; size], crc))));
            }
            1 => entries.push((path, None)),
            2 => {
                let length = u16_at(take(2), 0);
                assert_eq!(take(length), b"/mnt/fast");
                entries.push((path, None));
            }
            other => panic!("kind {other}"),
        }
    }
    for _ in 0..u32_at(take(4), 0) {
        assert_eq!(u32_at(take(4), 0), 0, "source");
        let (offset, bytes) = (u64_at(take(8), 0) as usize, u32_at(take(4), 0));
        let (plain, index) = (u32_at(take(4), 0), u32_at(take(4), 0) as u32);
        let hash = take(16).to_vec();
        let (found, last, _, block) = open_frame(head[11], &key, &object[offset..offset + bytes]);
        assert_eq!((found, last, block.len()), (index, false, plain));
        assert_eq!(&blake3::hash(&block).as_bytes()[..16], hash);
        let mut from = 0;
        for _ in 0..u32_at(take(4), 0) {
            let (entry, to, bytes) =
                (u32_at(take(4), 0), u64_at(take(8), 0) as usize, u32_at(take(4), 0));
            let (file, _) = entries[entry].1.as_mut().unwrap();
            file[to..to + bytes].copy_from_slice(&block[from..from + bytes]);
            from += bytes;
        }
        assert_eq!(from, plain);
    }
    for _ in 0..u32_at(take(4), 0) {
        take(4 + 8 + 8);
    }
    assert_eq!(at, footer.len());
    let files = entries.into_iter().filter_map(|(path, file)| Some((path, file?)));
    files
        .map(|(path, (content, crc))| {
            assert_eq!(crc_fast::crc32_iscsi(&content), crc, "{path}");
            (path, content)
        })
        .collect()
}

/// "Manifests": public and private section.
fn read_manifest(root: &str) -> (serde_json::Value, serde_json::Value) {
    let thing = format!("{BACKUP}/manifest");
    let object = fs::read(folder().join(root).join("main").join(&thing)).unwrap();
    let head = header(&object, 2);
    let end = 72 + u32_at(&object, 64);
    assert_eq!(end % 4096, 0);
    let public = &object[72..end];
    assert_eq!(crc_fast::crc32_iscsi(public) as usize, u32_at(&object, 68));
    let key = object_key(root, head, &thing);
    let private = open_frames(head[11], &key, &object[end..], 0);
    let private: serde_json::Value = serde_json::from_slice(&private).unwrap();
    assert_eq!(private["public_blake3"], blake3::hash(public).to_hex().as_str());
    (serde_json::from_slice(public).unwrap(), private)
}

#[test]
fn a_reader_made_from_the_text_alone_reads_all_objects() {
    for root in ROOTS.iter().flat_map(|(plain, encrypted)| [*plain, *encrypted]) {
        assert_eq!(read_wal(root), 4);
        let found = read_pack(root);
        for (name, content) in files() {
            assert!(found[name] == content, "{root} {name}");
        }
        assert_eq!(found.len(), files().len());
        let (public, private) = read_manifest(root);
        assert_eq!(public["system_id"], SYSTEM.to_string());
        assert_eq!(public["end_lsn"], "0/2000138");
        assert_eq!(private["packs"][0]["stored_bytes"], public["pack_bytes"][0]);
        assert_eq!(private["tablespaces"][0]["location"], "/mnt/fast");
        let history = fs::read(folder().join(root).join("main/wal/00000002.history")).unwrap();
        let head = header(&history, 4);
        let key = object_key(root, head, "wal/00000002.history");
        let content = open_frames(0, &key, &history[64..], 0);
        assert!(content.starts_with(b"1\t0/2100000\t"));
        let identity = fs::read(folder().join(root).join("main/identity")).unwrap();
        let identity: serde_json::Value = serde_json::from_slice(&identity).unwrap();
        assert_eq!((&identity["format"], &identity["version"]), (&"tidemark".into(), &1.into()));
    }
}
