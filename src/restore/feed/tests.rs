//! Files of a plan: who waits for them, who fetches ahead, and what goes wrong meanwhile.

use super::*;
use crate::pg::{SegmentSize, SystemId, TimelineHistory};
use crate::repo::{Encryption, ExtentBuilder, Level};
use crate::restore::handover::tests::settings;
use crate::store::Store as _;
use crate::store::memory::{Faults, Memory};

/// A repository with a few segments, and a data directory into which a plan hands them over.
struct Scene {
    clock: Clock,
    memory: Memory,
    reader: Reader,
    _data: tempfile::TempDir,
    folder: Folder,
    settings: Settings,
    request: WalGetRequest,
}

impl Scene {
    async fn new() -> Self {
        Self::with_segments(2).await
    }

    async fn with_segments(count: u64) -> Self {
        let clock = Clock::simulated("2026-11-22T10:00:00Z".parse().unwrap(), 3);
        let (memory, repository) = Repository::in_memory(&clock).await;
        let writer = repository.writer(&Encryption::None).await.unwrap();
        let end = 0x300_0000 + (count << 20);
        for start in (0x300_0000..end).step_by(1 << 20) {
            let (first, level) = (TimelineId::FIRST, Level::default());
            let mut builder = ExtentBuilder::new(&writer, first, Lsn(start), level).unwrap();
            builder.push(vec![7; 1 << 20].into()).unwrap();
            writer.put_extent(&builder.finish(None).unwrap()).await.unwrap();
        }
        let size = SegmentSize::new(1 << 20).unwrap();
        let path = TimelineHistory::first_timeline_only(TimelineId::FIRST).path();
        let span = LsnRange::new(Lsn(0x300_0028), Lsn(end)).unwrap();
        let settings = Settings::new("main".into(), SystemId(7), size, &path, span);
        let data = tempfile::tempdir().unwrap();
        let folder = Folder::of(&data.path().join("pg_wal"));
        folder.create(&settings).unwrap();
        let path = data.path().join("pg_wal/RECOVERYXLOG");
        let request = WalGetRequest { name: settings.segment_name(0x30).unwrap(), path };
        let reader = repository.reader(Vec::new());
        Self { clock, memory, reader, _data: data, folder, settings, request }
    }

    fn set_down(&self, down: bool) {
        self.memory.set_faults(Faults { down, ..Faults::default() });
    }

    fn ahead(&self) -> FetchAhead<'_> {
        FetchAhead {
            folder: &self.folder,
            owner: None,
            settings: &self.settings,
            reader: &self.reader,
            when_idle: WhenIdle::End,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_of_the_past_keeps_no_segment_away() {
    let scene = Scene::new().await;
    scene.folder.fail(&Error::new(Kind::Unavailable, "no store")).unwrap();
    let open = async || Ok(scene.reader.clone());
    let given = wal_get(&scene.request, &scene.clock, None, open).await.unwrap();
    assert_eq!(given, WalGet::Found);
    assert!(scene.request.path.exists());
    assert!(scene.folder.take_failure().unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_minutes_ends_neither_who_fetches_ahead_nor_who_waits() {
    let scene = Scene::new().await;
    scene.set_down(true);
    let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
    let waiting = wal_get(&scene.request, &scene.clock, None, never);
    let back = async {
        tokio::time::sleep(Duration::from_secs(300)).await;
        scene.set_down(false);
    };
    let ahead = scene.ahead();
    let (fetched, given, ()) = tokio::join!(ahead.run(0x30), waiting, back);
    assert_eq!(given.unwrap(), WalGet::Found);
    fetched.unwrap();
    assert!(scene.folder.spooled(&scene.settings.segment_name(0x31).unwrap()).exists());
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_minutes_is_outlasted_before_the_repository_is_open() {
    let mut scene = Scene::new().await;
    let begun = scene.clock.instant();
    let open = async || match scene.clock.instant() - begun < Duration::from_secs(300) {
        true => Err(Error::new(Kind::Unavailable, "no store")),
        false => Ok(scene.reader.clone()),
    };
    let given = wal_get(&scene.request, &scene.clock, None, open).await.unwrap();
    assert_eq!(given, WalGet::Found);

    // Who fetches ahead is known to be at work meanwhile.
    scene.request.name = scene.settings.segment_name(0x31).unwrap();
    let begun = scene.clock.instant();
    let open = async || match scene.clock.instant() - begun < Duration::from_secs(300) {
        true => {
            assert!(scene.folder.is_fetched_ahead().unwrap());
            Err(Error::new(Kind::Unavailable, "no store"))
        }
        false => Ok(scene.reader.clone()),
    };
    prefetch(&scene.request, &scene.clock, open).await.unwrap();
    assert!(scene.clock.instant() - begun >= Duration::from_secs(300));
    assert!(scene.folder.spooled(&scene.request.name).exists());
    // Why it could not be opened is told.
    let open = async || Err(Error::new(Kind::Denied, "no key"));
    assert!(prefetch(&scene.request, &scene.clock, open).await.is_err());
    assert_eq!(scene.folder.take_failure().unwrap().unwrap().message(), "no key");
}

#[tokio::test(start_paused = true)]
async fn who_asked_for_a_server_that_is_gone_gives_the_next_one_nothing() {
    let scene = Scene::new().await;
    let runs = |pid: u32| {
        let lines = format!("{pid}\n/data\n1700000000\n5432\n");
        fs::write(scene.folder.data().join("postmaster.pid"), lines).unwrap();
    };
    runs(71);
    let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
    let spooled = scene.folder.spooled(&scene.request.name);
    let held = scene.folder.lock().unwrap();
    let (given, ()) = tokio::join!(wal_get(&scene.request, &scene.clock, None, never), async {
        tokio::time::sleep(LOOK_EVERY * 2).await;
        runs(72);
        fs::write(&spooled, "wal").unwrap();
    });
    assert_eq!(given.unwrap_err().kind(), Kind::Cancelled);
    assert!(spooled.exists() && !scene.request.path.exists());
    // The next one gets it, and nobody waits in vain for longer than it takes to see that.
    wal_get(&scene.request, &scene.clock, None, never).await.unwrap();
    let (given, ()) = tokio::join!(wal_get(&scene.request, &scene.clock, None, never), async {
        tokio::time::sleep(LOOK_EVERY * 2).await;
        runs(73);
    });
    assert_eq!(given.unwrap_err().kind(), Kind::Cancelled);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn who_fetches_ahead_ends_when_its_folder_goes() {
    let scene = Scene::new().await;
    fs::remove_dir_all(scene.folder.path().join("spool")).unwrap();
    scene.ahead().run(0x30).await.unwrap();
    // Between a look into the spool and the segment.
    let scene = Scene::new().await;
    scene.memory.before_list(
        &scene.reader.repository().cluster().timeline_prefix(TimelineId::FIRST),
        {
            let folder = scene.folder.path().to_path_buf();
            async move { fs::remove_dir_all(folder).unwrap() }
        },
    );
    scene.ahead().run(0x30).await.unwrap();
}

/// Has all of `count` segments fetched ahead from a repository that is slow, while `take` takes them, and
/// checks that each was fetched once and that nothing stays behind.
async fn fetched_once(count: u64, take: impl AsyncFn(&Scene, String)) {
    let scene = Scene::with_segments(count).await;
    let delay_max = Duration::from_secs(7);
    scene.memory.set_faults(Faults { seed: 3, delay_max, ..Faults::default() });
    let before = scene.memory.requests();
    let taking = async {
        for number in 0x30..0x30 + count {
            take(&scene, scene.settings.segment_name(number).unwrap()).await;
            // Replay, in which it asks for nothing.
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    };
    let ahead = scene.ahead();
    let (fetched, ()) = tokio::join!(ahead.run(0x30), taking);
    fetched.unwrap();
    assert_eq!(scene.folder.spool().unwrap(), Some(Vec::new()));
    assert_eq!(scene.memory.requests().gets - before.gets, count);
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_over_is_not_fetched_again() {
    fetched_once(20, async |scene, name| {
        let request = WalGetRequest { name, path: scene.request.path.clone() };
        let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
        let given = wal_get(&request, &scene.clock, None, never).await.unwrap();
        assert_eq!(given, WalGet::Found);
    })
    .await;
    // Nor on the word of a note that its writer, who was killed for instance, has left.
    fetched_once(20, async |scene, name| {
        let take = || fs::rename(scene.folder.spooled(&name), &scene.request.path).is_ok();
        if take() {
            return;
        }
        scene.folder.want(&name, 1).unwrap();
        while !take() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_replay_has_passed_does_not_stay_in_the_spool() {
    let scene = Scene::with_segments(4).await;
    let name = |number| scene.settings.segment_name(number).unwrap();
    for number in [0x30, 0x31, 0x33] {
        fs::write(scene.folder.spooled(&name(number)), "wal").unwrap();
    }
    scene.folder.want(&name(0x32), 1).unwrap();
    scene.ahead().run(0x30).await.unwrap();
    let mut left = scene.folder.spool().unwrap().unwrap();
    left.sort();
    assert_eq!(left, [name(0x32), name(0x33)]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_says_again_what_for() {
    let scene = Scene::new().await;
    let (name, never) = (&scene.request.name, async || Err(Error::new(Kind::Bug, "opened")));
    let held = scene.folder.lock().unwrap();
    let (given, ()) = tokio::join!(wal_get(&scene.request, &scene.clock, None, never), async {
        for _ in 0..3 {
            tokio::time::sleep(LOOK_FOR_SERVER_EVERY + LOOK_EVERY * 2).await;
            assert_eq!(scene.folder.take_wanted().unwrap().as_ref(), Some(name));
        }
        fs::write(scene.folder.spooled(name), "wal").unwrap();
    });
    assert_eq!(given.unwrap(), WalGet::Found);
    drop(held);
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_ends_in_a_segment_takes_no_wal_from_who_has_more() {
    let mut scene = Scene::new().await;
    scene.settings.end_lsn = Lsn(0x310_0064);
    scene.folder.create(&scene.settings).unwrap();
    scene.request.name = scene.settings.segment_name(0x31).unwrap();
    let own = scene.request.path.with_file_name(&scene.request.name);
    let open = async || Ok(scene.reader.clone());
    let given = async || {
        drop(fs::remove_file(&scene.request.path));
        wal_get(&scene.request, &scene.clock, None, open).await.unwrap()
    };
    let mut bytes = vec![0; 1 << 20];
    for (count, expected) in [(0, WalGet::Found), (0x63, WalGet::Found), (0x64, WalGet::NotThere)] {
        bytes[..count].fill(7);
        fs::write(&own, &bytes).unwrap();
        assert_eq!(given().await, expected, "{count}");
        assert!(!scene.folder.spooled(&scene.request.name).exists());
    }
    // A file that PostgreSQL would not read is none.
    fs::write(&own, &bytes[1..]).unwrap();
    assert_eq!(given().await, WalGet::Found);
}

#[tokio::test(start_paused = true)]
async fn a_number_that_another_server_has_taken_since_the_plan_is_known() {
    let mut scene = Scene::new().await;
    let writer = scene.reader.repository().writer(&Encryption::None).await.unwrap();
    let (two, text) = (TimelineId::new(2).unwrap(), &b"1\t0/3100000\tno reason\n"[..]);
    writer.put_history(two, text.into()).await.unwrap();
    let asked = async |name: &str, scene: &mut Scene| {
        scene.request.name = name.into();
        let open = async || Ok(scene.reader.clone());
        wal_get(&scene.request, &scene.clock, None, open).await.unwrap()
    };
    assert_eq!(asked("00000002.history", &mut scene).await, WalGet::Found);
    assert_eq!(fs::read(&scene.request.path).unwrap(), text);
    for name in ["00000003.history", "00000001.history"] {
        assert_eq!(asked(name, &mut scene).await, WalGet::NotThere, "{name}");
    }
    scene.request.name = "00000002.history".into();
    let closed = async || Err(Error::new(Kind::Denied, "no key"));
    let given = wal_get(&scene.request, &scene.clock, None, closed).await;
    assert_eq!(given.unwrap(), WalGet::NotThere);
}

/// Asks a data directory with these notes for a segment that is on the way to the target.
async fn asked(notes: &str) -> Result<WalGet> {
    let data = tempfile::tempdir().unwrap();
    let wal = data.path().join("pg_wal");
    let folder = Folder::of(&wal);
    folder.create(&settings()).unwrap();
    fs::write(folder.path().join("wal-get.json"), notes).unwrap();
    let name = settings().segment_name(0x33).unwrap();
    fs::write(folder.spooled(&name), "wal").unwrap();
    let request = WalGetRequest { name, path: wal.join("RECOVERYXLOG") };
    let never = async || Err(Error::new(Kind::Bug, "the repository was opened"));
    wal_get(&request, &Clock::system(), None, never).await
}

#[test]
fn the_data_directory_is_above_the_name_of_pg_wal_and_not_above_what_it_links_to() {
    let place = tempfile::tempdir().unwrap();
    let (data, volume) = (place.path().join("data"), place.path().join("volume/wal"));
    fs::create_dir_all(&data).unwrap();
    fs::create_dir_all(&volume).unwrap();
    std::os::unix::fs::symlink(&volume, data.join("pg_wal")).unwrap();
    let path = data.join("pg_wal/RECOVERYXLOG");
    assert!(!asks_again(&path));
    fs::write(data.join(STANDBY_SIGNAL), "").unwrap();
    assert!(asks_again(&path));
    // As PostgreSQL asks, in the data directory, and as somebody does in pg_wal itself.
    let here = std::env::current_dir().unwrap();
    assert_eq!(data_directory_of(Path::new("pg_wal/RECOVERYXLOG")).unwrap(), here);
    assert_eq!(data_directory_of(Path::new("x")).unwrap(), here.parent().unwrap());
}

#[tokio::test]
async fn a_hole_in_the_notes_is_an_error_and_not_the_end_of_the_wal() {
    let whole = serde_json::to_value(settings()).unwrap();
    assert_eq!(asked(&whole.to_string()).await.unwrap(), WalGet::Found);
    let mut holed = whole.clone();
    holed["path"].as_array_mut().unwrap().pop();
    let error = asked(&holed.to_string()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    let truncated = whole.to_string();
    let error = asked(&truncated[..truncated.len() / 2]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    assert!(error.hint_text().unwrap().contains("restore again"), "{error:?}");
}
