//! A museum of damaged repositories: what was done to each, and the exact verdict beside it.
//!
//! Each exhibit is a repository made anew by the real writer: two backups and WAL of two
//! timelines, encrypted. Then something is damaged behind everybody's back and `verify` is asked.

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use minis3::{Effect, Fault, Op};

use tidemark::clock::Clock;
use tidemark::error::{Kind, Result};
use tidemark::pg::{Lsn, LsnRange, PgTime, SegmentSize, SystemId, TimelineId};
use tidemark::repo::packing::NoInspection;
use tidemark::repo::verify::{Depth, VerifyOptions, VerifyReport, verify};
use tidemark::repo::{
    BackupId, Budget, Catalog, ClusterName, DecryptionIdentity, Encryption, ExtentBuilder,
    ExtentName, FileMeta, FilePath, Level, ManifestFacts, Object, PackName, PackOptions,
    Repository, Writer,
};
use tidemark::store::memory::Memory;
use tidemark::store::{ObjectName, Store};

use crate::s3_server;

const KIB: u64 = 1024;
const SYSTEM: SystemId = SystemId(7_300_000_000_000_000_001);

struct Museum {
    memory: Memory,
    repository: Repository,
    identity: DecryptionIdentity,
}

fn minute(minute: i64) -> Timestamp {
    Timestamp::from_second(1_795_348_800 + minute * 60).unwrap()
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

/// The first and the second backup.
fn backup(number: i64) -> BackupId {
    let (start, timeline_number) = if number == 1 { (32 * KIB, 1) } else { (288 * KIB, 2) };
    BackupId::new(minute(number * 10), timeline(timeline_number), Lsn(start))
}

/// WAL in pieces of 64 KiB, a commit a minute; timeline 2 left 1 at 256 KiB.
fn extent(index: u64) -> ExtentName {
    let range = LsnRange::new(Lsn(index * 64 * KIB), Lsn((index + 1) * 64 * KIB)).unwrap();
    let time = PgTime::from_timestamp(minute(10 + i64::try_from(index).unwrap() * 4));
    ExtentName { timeline: timeline(if index < 4 { 1 } else { 2 }), range, time: Some(time) }
}

/// Bytes that do not compress and are always the same.
fn noise(seed: u64, count: usize) -> Bytes {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn encrypted(identity: &DecryptionIdentity) -> Encryption {
    Encryption::Recipients(vec![identity.recipient()])
}

impl Museum {
    async fn open() -> Self {
        Self::open_with(encrypted, 512 << 20).await
    }

    async fn open_with(
        encryption: impl Fn(&DecryptionIdentity) -> Encryption,
        pack_bytes: u64,
    ) -> Self {
        let clock = Clock::simulated(minute(0), 1);
        let memory = Memory::new(&clock);
        let store: Arc<dyn Store> = Arc::new(memory.clone());
        let cluster = ClusterName::new("main").unwrap();
        let repository = Repository::create(store, cluster, SYSTEM, &clock).await.unwrap();
        let identity = DecryptionIdentity::generate();
        let writer = repository.writer(&encryption(&identity)).await.unwrap();
        for index in 0..7 {
            put_wal(&writer, index).await;
        }
        let history = Bytes::from("1\t0/40000\tno recovery target specified\n");
        writer.put_history(timeline(2), history).await.unwrap();
        put_backup(&writer, 1, pack_bytes).await;
        put_backup(&writer, 2, pack_bytes).await;
        Self { memory, repository, identity }
    }

    fn name(&self, object: &Object) -> ObjectName {
        self.repository.name(object).unwrap()
    }

    fn pack(&self, backup_number: i64, number: u32) -> ObjectName {
        self.name(&Object::Pack(PackName { backup: backup(backup_number), number }))
    }

    fn manifest(&self, number: i64) -> ObjectName {
        self.name(&Object::Manifest(backup(number)))
    }

    fn extent(&self, index: u64) -> ObjectName {
        self.name(&Object::Extent(extent(index)))
    }

    fn change(&self, name: &ObjectName, change: impl FnOnce(&mut Vec<u8>)) {
        self.memory.damage(name, change).unwrap();
    }

    /// Flips a bit of the byte at a part (of 100) of the object.
    fn flip(&self, name: &ObjectName, percent: usize) {
        self.change(name, |body| {
            let at = (body.len() - 1) * percent / 100;
            body[at] ^= 1;
        });
    }

    async fn remove(&self, name: &ObjectName) {
        self.memory.delete(std::slice::from_ref(name)).await.unwrap();
    }

    async fn swap(&self, one: &ObjectName, other: &ObjectName) {
        let a = self.memory.get(one, None).await.unwrap();
        let b = self.memory.get(other, None).await.unwrap();
        self.change(one, |body| *body = b.to_vec());
        self.change(other, |body| *body = a.to_vec());
    }

    async fn key(&self) -> ObjectName {
        let catalog = Catalog::load(&self.repository).await.unwrap();
        self.name(&Object::Key(catalog.keys[0].id))
    }

    async fn verify_as(&self, identities: Vec<DecryptionIdentity>) -> Result<VerifyReport> {
        let reader = self.repository.reader(identities);
        verify(&self.repository, &reader, &VerifyOptions::new(2), &Arc::default()).await
    }

    async fn verdict(&self) -> String {
        let report = self.verify_as(vec![self.identity.clone()]).await.unwrap();
        let sound = report.is_sound();
        assert_eq!(sound, report.ensure_sound().is_ok());
        shorten(&report, sound)
    }
}

/// The report without what is the same everywhere or differs from run to run.
fn shorten(report: &VerifyReport, sound: bool) -> String {
    let mut text = String::from(if sound { "sound\n" } else { "NOT SOUND\n" });
    for line in report.to_string().lines() {
        let line = line.split(" (").next().unwrap_or(line);
        let boring = line.ends_with(": whole") || line.contains("read and whole, 0 bad");
        if !boring {
            text.push_str(line);
            text.push('\n');
        }
    }
    let mut names = vec![
        (backup(1).to_string(), "ONE".to_owned()),
        (backup(2).to_string(), "TWO".to_owned()),
        ("main/".to_owned(), String::new()),
        ("2026-11-22T".to_owned(), String::new()),
    ];
    names.extend((0..7).map(|index| (format!("wal/{}", extent(index)), format!("wal-{index}"))));
    for (name, short) in names {
        text = text.replace(&name, &short);
    }
    // Keys are drawn anew each time, and so is what checksums are made over.
    hide_numbers(&hide_numbers(&hide_numbers(&text, "at byte "), "has CRC "), "expected ")
}

fn hide_numbers(text: &str, after: &str) -> String {
    let mut pieces = text.split(after);
    let mut shown = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        shown.push_str(after);
        shown.push('_');
        shown.push_str(piece.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
    }
    shown
}

async fn put_wal(writer: &Writer, index: u64) {
    let name = extent(index);
    let level = Level::default();
    let mut builder = ExtentBuilder::new(writer, name.timeline, name.range.start(), level).unwrap();
    builder.push(noise(index, 64 * 1024)).unwrap();
    let sealed = builder.finish(name.time).unwrap();
    assert_eq!(sealed.name, name);
    writer.put_extent(&sealed).await.unwrap();
}

async fn put_backup(writer: &Writer, number: i64, pack_bytes: u64) {
    let id = backup(number);
    let options = PackOptions {
        budget: Budget::backup(128 << 20, 1, Level::default()),
        level: Level::default(),
        pack_bytes,
    };
    let mut backup = writer.backup(id, options, Arc::new(NoInspection)).unwrap();
    let files: [(&str, usize); 5] = [
        ("PG_VERSION", 3),
        ("base/5/1000", 2_500_000),
        ("base/5/1001", 0),
        ("base/5/1002", 1_200_000),
        ("global/pg_control", 8192),
    ];
    backup.add_directory(FilePath::new("base").unwrap(), 0o700, 0).await.unwrap();
    for (path, size) in files {
        let path = FilePath::new(path).unwrap();
        let meta = FileMeta { path, mode: 0o600, mtime: 0, size_bytes: size as u64 };
        backup.begin_file(meta).await.unwrap();
        // The same content in both: a swap of packs changes no size.
        backup.write(noise(size as u64, size)).await.unwrap();
        backup.end_file().await.unwrap();
    }
    let packed = backup.finish_packs().await.unwrap();
    let facts = ManifestFacts {
        postgres_version_num: 150_000,
        segment_size: SegmentSize::new(1 << 20).unwrap(),
        end_timeline: id.timeline(),
        end_lsn: Lsn(id.start_lsn().0 + 64 * KIB),
        start_time: minute(number * 10),
        end_time: minute(number * 10 + 1),
        tablespaces: Vec::new(),
        settings: [].into(),
    };
    packed.commit(facts).await.unwrap();
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect()
}

macro_rules! exhibits {
    ($($name:ident: $damage:expr, $verdict:expr;)+) => {$(
        #[tokio::test]
        async fn $name() {
            let museum = Museum::open().await;
            let damage: fn(&Museum) -> std::pin::Pin<Box<dyn Future<Output = ()> + '_>> =
                |museum| Box::pin(async move { $damage(museum).await });
            damage(&museum).await;
            let verdict = museum.verdict().await;
            assert_eq!(lines(&verdict), lines($verdict), "\n--- found:\n{verdict}--- end");
        }
    )+};
}

exhibits! {
    an_untouched_repository: async |_: &Museum| {}, "sound";
    a_pack_cut_by_a_byte: async |m: &Museum| m.change(&m.pack(1, 1), |body| { body.pop(); }), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: it has 3708748 bytes, the manifest says 3708749
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_pack_missing: async |m: &Museum| m.remove(&m.pack(2, 1)).await, "
        NOT SOUND
        backup TWO: DAMAGED
        DEFECT base/TWO/pack-000001: it is missing
          lost: backup TWO cannot be restored
    ";
    a_bit_flipped_in_a_frame: async |m: &Museum| m.flip(&m.pack(1, 1), 50), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: unable to read pack 'base/ONE/pack-000001' at byte _: the frame is damaged: frame 1 is not authentic
          files: 1: base/5/1000
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_a_pack_header: async |m: &Museum| m.flip(&m.pack(1, 1), 0), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: unable to read pack 'base/ONE/pack-000001': it does not begin with 'TIDEMARK'
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_a_salt: async |m: &Museum| m.change(&m.pack(1, 1), |body| body[40] ^= 1), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: unable to read the footer of pack 'base/ONE/pack-000001': at byte _: the frame is damaged: frame 4 is not authentic
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_a_footer: async |m: &Museum| {
        m.change(&m.pack(1, 1), |body| { let at = body.len() - 100; body[at] ^= 1; });
    }, "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: unable to read the footer of pack 'base/ONE/pack-000001': at byte _: the frame is damaged: frame 4 is not authentic
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_a_trailer: async |m: &Museum| m.flip(&m.pack(1, 1), 100), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/pack-000001: unable to read the footer of pack 'base/ONE/pack-000001': its trailer is missing
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    two_packs_swapped: async |m: &Museum| m.swap(&m.pack(1, 1), &m.pack(2, 1)).await, "
        NOT SOUND
        backup ONE: DAMAGED
        backup TWO: DAMAGED
        NOT REACHED by any backup: the WAL up to 0/70000 of timeline 2
        DEFECT base/ONE/pack-000001: unable to read the footer of pack 'base/ONE/pack-000001': at byte _: the frame is damaged: frame 4 is not authentic
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
        DEFECT base/TWO/pack-000001: unable to read the footer of pack 'base/TWO/pack-000001': at byte _: the frame is damaged: frame 4 is not authentic
          lost: backup TWO cannot be restored
    ";
    a_manifest_cut: async |m: &Museum| m.change(&m.manifest(1), |body| body.truncate(3000)), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/manifest: unable to read manifest 'base/ONE/manifest': unable to read bytes 0..4096 of object 'base/ONE/manifest': it has only 3000
          lost: backup ONE cannot be restored
    ";
    a_manifest_that_ends_early: async |m: &Museum| {
        m.change(&m.manifest(1), |body| { body.pop(); });
    }, "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/manifest: unable to read manifest 'base/ONE/manifest': at byte _: the frame is cut off
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_public: async |m: &Museum| m.change(&m.manifest(1), |body| body[4000] ^= 1), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/manifest: unable to read manifest 'base/ONE/manifest': its public section has CRC _, expected _
          lost: backup ONE cannot be restored
    ";
    a_bit_flipped_in_private: async |m: &Museum| m.flip(&m.manifest(1), 100), "
        NOT SOUND
        backup ONE: DAMAGED
        DEFECT base/ONE/manifest: unable to read manifest 'base/ONE/manifest': at byte _: the frame is damaged: frame 0 is not authentic
          lost: backup ONE cannot be restored
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    two_manifests_swapped: async |m: &Museum| m.swap(&m.manifest(1), &m.manifest(2)).await, "
        NOT SOUND
        backup ONE: DAMAGED
        backup TWO: DAMAGED
        NOT REACHED by any backup: the WAL up to 0/70000 of timeline 2
        DEFECT base/ONE/manifest: unable to read manifest 'base/ONE/manifest': it is the manifest of 'TWO' of cluster 7300000000000000001
          lost: backup ONE cannot be restored
        DEFECT base/TWO/manifest: unable to read manifest 'base/TWO/manifest': it is the manifest of 'ONE' of cluster 7300000000000000001
          lost: backup TWO cannot be restored
    ";
    a_manifest_missing: async |m: &Museum| m.remove(&m.manifest(2)).await, "
        sound
        backup TWO: no manifest; it is being taken, or was aborted
    ";
    a_bit_flipped_in_wal: async |m: &Museum| m.flip(&m.extent(2), 50), "
        NOT SOUND
        WAL of timeline 1: 3 of 4 extents read and whole, 1 bad, 192.0 KiB
        WAL [0/20000, 0/30000) of timeline 1: LOST, with the commits between 12:14:00Z and 12:22:00Z
        DEFECT wal-2: unable to read WAL extent 'wal-2' at byte _: the frame is damaged: frame 0 is not authentic
          lost: WAL [0/20000, 0/30000) of timeline 1
          lost: times from 12:14:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    a_bit_flipped_in_a_wal_header: async |m: &Museum| {
        m.change(&m.extent(2), |body| body[72] ^= 1);
    }, "
        NOT SOUND
        WAL of timeline 1: 3 of 4 extents read and whole, 1 bad, 192.0 KiB
        WAL [0/20000, 0/30000) of timeline 1: LOST, with the commits between 12:14:00Z and 12:22:00Z
        DEFECT wal-2: unable to read WAL extent 'wal-2': the extent at byte _ is damaged: its frames hold 65536 bytes of WAL, its header says 65535
          lost: WAL [0/20000, 0/30000) of timeline 1
          lost: times from 12:14:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    wal_cut: async |m: &Museum| m.change(&m.extent(2), |body| { body.pop(); }), "
        NOT SOUND
        WAL of timeline 1: 3 of 4 extents read and whole, 1 bad, 192.0 KiB
        WAL [0/20000, 0/30000) of timeline 1: LOST, with the commits between 12:14:00Z and 12:22:00Z
        DEFECT wal-2: unable to read WAL extent 'wal-2': the extent at byte _ is damaged: 65663 bytes are left where it needs 65664
          lost: WAL [0/20000, 0/30000) of timeline 1
          lost: times from 12:14:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    wal_with_more_behind_it: async |m: &Museum| m.change(&m.extent(2), |body| body.push(0)), "
        NOT SOUND
        WAL of timeline 1: 3 of 4 extents read and whole, 1 bad, 192.0 KiB
        WAL [0/20000, 0/30000) of timeline 1: LOST, with the commits between 12:14:00Z and 12:22:00Z
        DEFECT wal-2: unable to read WAL extent 'wal-2': the extent at byte _ is damaged: the object ends in its header: 1 bytes, expected _
          lost: WAL [0/20000, 0/30000) of timeline 1
          lost: times from 12:14:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    // No name tells it from WAL that was never stored; it is told, and a later backup leads on.
    wal_missing: async |m: &Museum| m.remove(&m.extent(2)).await, "
        sound
        WAL [0/20000, 0/30000) of timeline 1: LOST, with the commits between 12:14:00Z and 12:22:00Z
    ";
    the_wal_of_a_backup_missing: async |m: &Museum| m.remove(&m.extent(5)).await, "
        NOT SOUND
        backup TWO: NOT RESTORABLE: its WAL is not complete
        WAL [0/50000, 0/60000) of timeline 2: LOST, with the commits between 12:26:00Z and 12:34:00Z
        NOT REACHED by any backup: the WAL up to 0/70000 of timeline 2
    ";
    two_pieces_of_wal_swapped: async |m: &Museum| m.swap(&m.extent(1), &m.extent(2)).await, "
        NOT SOUND
        backup ONE: NOT RESTORABLE: its WAL is not complete
        WAL of timeline 1: 2 of 4 extents read and whole, 2 bad, 128.0 KiB
        WAL [0/10000, 0/30000) of timeline 1: LOST, with the commits between 12:10:00Z and 12:22:00Z
        DEFECT wal-1: unable to read WAL extent 'wal-1': the extent at byte _ holds WAL [0/20000, 0/30000) of timeline 1, expected _what follows 0/10000 on timeline 1
          lost: WAL [0/10000, 0/20000) of timeline 1
          lost: times from 12:11:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
        DEFECT wal-2: unable to read WAL extent 'wal-2': the extent at byte _ holds WAL [0/10000, 0/20000) of timeline 1, expected _what follows 0/20000 on timeline 1
          lost: WAL [0/20000, 0/30000) of timeline 1
          lost: times from 12:14:00Z to 12:22:00Z on timeline 1
          lost: times from 12:11:00Z to 12:26:00Z on timeline 2
    ";
    wal_that_a_larger_extent_holds_too: async |m: &Museum| {
        let mut body = Vec::new();
        for index in [1, 2] {
            body.extend_from_slice(&m.memory.get(&m.extent(index), None).await.unwrap());
        }
        let range = LsnRange::new(extent(1).range.start(), extent(2).range.end()).unwrap();
        let joint = m.name(&Object::Extent(ExtentName { range, ..extent(2) }));
        m.memory.put_if_absent(&joint, Bytes::from(body)).await.unwrap();
        m.flip(&m.extent(2), 50);
    }, "
        NOT SOUND
        WAL of timeline 1: 4 of 5 extents read and whole, 1 bad, 320.0 KiB
        DEFECT wal-2: unable to read WAL extent 'wal-2' at byte _: the frame is damaged: frame 0 is not authentic
          lost: nothing: all that could be recovered still can
    ";
    a_history_missing: async |m: &Museum| {
        m.remove(&m.name(&Object::History(timeline(2)))).await;
    }, "
        NOT SOUND
        DEFECT wal/00000002.history: it is missing: where this timeline left which other is not known
          lost: recovery to timeline 2 from backups of its ancestors
    ";
    a_bit_flipped_in_a_history: async |m: &Museum| {
        m.flip(&m.name(&Object::History(timeline(2))), 80);
    }, "
        NOT SOUND
        DEFECT wal/00000002.history: unable to read timeline history 'wal/00000002.history': at byte _: the frame is damaged: frame 0 is not authentic
          lost: recovery to timeline 2 from backups of its ancestors
    ";
    a_lease_that_is_none: async |m: &Museum| {
        let lease = m.name(&Object::Lease);
        m.memory.put_if_absent(&lease, Bytes::from_static(b"mine")).await.unwrap();
    }, "
        NOT SOUND
        DEFECT lease: unable to read the lease 'lease': expected _value at line 1 column 1
          lost: nothing: all that could be recovered still can
    ";
    names_that_are_not_ours: async |m: &Museum| {
        for name in ["main/wal/00000001/readme.txt", "main/base/notes", "main/wal/old.history"] {
            let name = ObjectName::new(name).unwrap();
            m.memory.put_if_absent(&name, Bytes::from_static(b"hello")).await.unwrap();
        }
    }, "
        sound
    ";
}

/// Without the right identity nothing is called damaged: nothing was read.
#[tokio::test]
async fn the_wrong_identity_is_an_error_and_no_verdict() {
    let museum = Museum::open().await;
    for identities in [vec![], vec![DecryptionIdentity::generate()]] {
        let error = museum.verify_as(identities).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Denied, "{error}");
    }
}

#[tokio::test]
async fn without_its_key_every_object_is_lost_and_the_key_is_named() {
    let museum = Museum::open().await;
    let key = museum.key().await;
    museum.remove(&key).await;
    let report = museum.verify_as(vec![museum.identity.clone()]).await.unwrap();
    assert_eq!(report.defects.len(), 2 + 7);
    for defect in &report.defects {
        assert!(defect.problem.contains(key.as_str()), "{}", defect.problem);
    }
    assert!(report.intervals.is_empty());
}

/// Flipped bits are found without encryption too.
#[tokio::test]
async fn an_unencrypted_repository_is_checked_as_well() {
    let museum = Museum::open_with(|_| Encryption::None, 1 << 20).await;
    let report = museum.verify_as(vec![]).await.unwrap();
    assert!(report.is_sound(), "{report}");
    assert_eq!(report.backups.len(), 2);
    for name in [museum.pack(1, 1), museum.manifest(1), museum.extent(3)] {
        museum.flip(&name, 99);
        let report = museum.verify_as(vec![]).await.unwrap();
        assert_eq!(report.defects.len(), 1, "{report}");
        assert_eq!(report.defects[0].object, name.as_str());
        museum.flip(&name, 99);
    }
}

/// Wherever a bit flips, it is noticed, and the object is named.
#[tokio::test]
async fn any_flipped_bit_is_found() {
    let museum = Museum::open_with(encrypted, 1 << 20).await;
    let objects = museum.memory.list_all("main/").await.unwrap();
    let sealed = objects.iter().filter(|object| {
        ["main/base/", "main/wal/"].iter().any(|prefix| object.name.as_str().starts_with(prefix))
    });
    let sealed: Vec<_> = sealed.collect();
    let mut dice = 99_u64;
    let mut throw = |sides: usize| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) as usize % sides
    };
    for round in 0..24 {
        let object = sealed[throw(sealed.len())];
        let size = usize::try_from(object.size_bytes).unwrap();
        // Half of them where headers, footers and lengths are.
        let at = match round % 4 {
            0 => throw(size.min(200)),
            1 => size - 1 - throw(size.min(200)),
            _ => throw(size),
        };
        let bit = throw(8);
        let flip = || museum.change(&object.name, |body| body[at] ^= 1 << bit);
        flip();
        let report = museum.verify_as(vec![museum.identity.clone()]).await.unwrap();
        let named = report.defects.iter().any(|defect| defect.object == object.name.as_str());
        assert!(named, "bit {bit} of byte {at} of '{}':\n{report}", object.name);
        flip();
    }
}

#[tokio::test]
async fn a_sample_reads_less_and_all_footers() {
    let museum = Museum::open_with(encrypted, 1 << 20).await;
    let reader = museum.repository.reader(vec![museum.identity.clone()]);
    let options = VerifyOptions { depth: Depth::SamplePercent(0), ..VerifyOptions::new(1) };
    let report = verify(&museum.repository, &reader, &options, &Arc::default()).await.unwrap();
    assert!(report.is_sound());
    let frames: u64 = report.backups.iter().map(|backup| backup.frame_count).sum();
    let extents: u64 = report.wal.iter().map(|wal| wal.whole_count).sum();
    assert_eq!((frames, extents), (0, 0));
    assert!(report.backups.iter().all(|backup| backup.pack_count >= 2 && backup.file_count == 5));
}

/// One object that a lifecycle rule has moved to an archive class is not there for as long as nobody brings
/// it back. Everything else is.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_moved_to_an_archive_class_hides_nothing_else() {
    let server = s3_server::memory();
    let store = s3_server::open(&server, "p");
    let cluster = ClusterName::new("main").unwrap();
    let clock = Clock::system();
    let repository = Repository::create(store, cluster, SYSTEM, &clock).await.unwrap();
    let writer = repository.writer(&Encryption::None).await.unwrap();
    for index in 0..7 {
        put_wal(&writer, index).await;
    }
    let history = Bytes::from("1\t0/40000\tno recovery target specified\n");
    writer.put_history(timeline(2), history).await.unwrap();
    put_backup(&writer, 1, 512 << 20).await;
    put_backup(&writer, 2, 512 << 20).await;
    let archive = |object: &Object| {
        let archived = Effect::error(403, "InvalidObjectState");
        let key = repository.name(object).unwrap();
        server.faults().add(Fault::new(archived).on(Op::GetObject).key(key.as_str()));
    };
    archive(&Object::Manifest(backup(1)));
    let catalog = Catalog::load(&repository).await.unwrap();
    let listed: Vec<_> = catalog.backups.iter().map(|backup| backup.id()).collect();
    let damaged: Vec<_> = catalog.damaged.iter().map(|object| object.backup).collect();
    assert_eq!((listed, damaged), (vec![backup(2)], vec![Some(backup(1))]));
    server.faults().clear();
    archive(&Object::Pack(PackName { backup: backup(2), number: 1 }));
    archive(&Object::Extent(extent(0)));
    let reader = repository.reader(Vec::new());
    let options = VerifyOptions::new(2);
    let report = verify(&repository, &reader, &options, &Arc::default()).await.unwrap();
    assert_eq!(report.defects.len(), 2, "{report}");
    let whole: Vec<_> = report.backups.iter().map(|backup| backup.whole).collect();
    assert_eq!(whole, [true, false], "{report}");
}
