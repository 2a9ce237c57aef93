//! Restores that cannot be: targets out of reach, directories that are taken or full, and what
//! `wal-get` tells PostgreSQL.

use std::path::Path;

use super::{Copy, Extent, Scene, extents, golden_error, stderr_of};
use crate::harness::room::Room;
use crate::harness::sidecar::Output;
use crate::harness::{Account, Postgres, Tidemark, not_run};

/// The instants that a message names as the nearest that can be reached.
fn nearest(stderr: &str) -> Vec<String> {
    let (_, named) = stderr.split_once("Nearest reachable:").expect(stderr);
    let words: Vec<&str> = named.split_whitespace().collect();
    let instants = words.windows(2).filter(|pair| pair[0] == "it");
    instants.map(|pair| pair[1].trim_end_matches([',', '.']).to_owned()).collect()
}

/// A copy of the repository in which the WAL of the commit in the middle is missing.
fn with_a_gap(scene: &Scene) -> (Copy, Extent) {
    let copy = scene.copy("gap");
    let [before, inside, _] = &scene.between;
    let wal = copy.object("wal/00000001");
    let mut lost = extents(&wal);
    lost.retain(|extent| extent.start >= before.end_lsn && extent.end <= inside.end_lsn);
    let [lost] = lost.try_into().expect("each commit has an extent of its own");
    std::fs::remove_file(&lost.path).unwrap();
    (copy, lost)
}

#[test]
fn a_target_that_cannot_be_reached_is_answered_with_the_nearest_that_can() {
    let scene = Scene::shared();
    let (gapped, lost) = with_a_gap(&scene);
    let listed = scene.tidemark.run(&["list", "--json"]).ok().json();
    let newest = scene.late_extents.last().unwrap();
    let after_all = jiff::Timestamp::now().to_string();
    let far = format!("{:X}/0", (newest.end.0 >> 32) + 1);
    let mut known = scene.known();
    known.push((after_all.clone(), "[AFTER ALL]"));
    known.push((lost.start.to_string(), "[START OF THE GAP]"));
    known.push((lost.end.to_string(), "[END OF THE GAP]"));
    known.push((newest.end.to_string(), "[END OF WAL]"));
    for (backup, label) in [(0, "[END OF ONE]"), (1, "[END OF TWO]")] {
        let backup = &listed["backups"][backup]["backup"];
        for key in ["end_lsn", "end_time"] {
            known.push((backup[key].as_str().expect(key).to_owned(), label));
        }
    }
    let [_, inside, after] = &scene.between;
    let in_gap_lsn = lost.end.to_string();
    let whole = &scene.tidemark;
    for (name, tidemark, option, target, reachable) in [
        ("time-before", whole, "--to-time", &scene.before_all.time, 1),
        ("time-after", whole, "--to-time", &after_all, 1),
        ("time-in-gap", &gapped.tidemark, "--to-time", &inside.time, 2),
        ("time-behind-gap", &gapped.tidemark, "--to-time", &after.time, 2),
        ("lsn-before", whole, "--to-lsn", &scene.before_all.end_lsn.to_string(), 1),
        ("lsn-after", whole, "--to-lsn", &far, 1),
        ("lsn-in-gap", &gapped.tidemark, "--to-lsn", &in_gap_lsn, 2),
    ] {
        let args = ["restore", "--dry-run", option, target];
        let output = tidemark.run(&args).failed(6);
        golden_error(&format!("target-{name}"), &output.transcript(&args), &known);
        // What is named can be reached.
        let named = nearest(&output.stderr);
        assert_eq!(named.len(), reachable, "{name}: {}", output.stderr);
        for instant in named {
            tidemark.run(&["restore", "--dry-run", option, &instant]).ok();
        }
    }
    for (name, args) in [
        ("target-future", ["--to-time", "2999-01-01 00:00:00Z"]),
        ("target-no-zone", ["--to-time", "2026-11-22 10:00"]),
        ("target-no-time", ["--to-time", "half past nine"]),
        ("target-no-lsn", ["--to-lsn", "12345"]),
        ("target-xid", ["--to-xid", "4000000000"]),
        ("target-name", ["--to-name", "before-the-accident"]),
        ("target-timeline", ["--timeline", "7"]),
        ("target-backup", ["--backup", "20200101T000000Z-00000001-0000000001000028"]),
        ("target-backup-nonsense", ["--backup", "yesterday"]),
    ] {
        let [option, value] = args;
        let args = ["restore", "--dry-run", option, value];
        let text = whole.run(&args).transcript(&args);
        // The present is in one of them.
        golden_error(name, &text, &known);
    }
    // All that can be reached stops at a gap behind the last backup: that is said, and loudly.
    let copy = scene.copy("late-gap");
    std::fs::remove_file(copy.extent(&scene.late_extents[1])).unwrap();
    let into = scene.tidemark.new_target("late-gap-target");
    let args = ["restore", "--quiet", "--into", into.to_str().unwrap()];
    golden_error("target-latest-with-gap", &copy.tidemark.run(&args).transcript(&args), &known);
}

#[test]
fn a_directory_that_is_taken_is_left_alone() {
    let scene = Scene::shared();
    let folder = Account::current().make_dir(scene.tidemark.home(), "taken");
    let restore = |name: &str, into: &Path| {
        let into = into.display().to_string();
        scene.golden(name, &["restore", "--quiet", "--into", &into]);
    };
    let precious = folder.join("precious.txt");
    std::fs::write(&precious, "do not touch").unwrap();
    restore("directory-not-empty", &folder);
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "do not touch");
    restore("directory-is-a-file", &precious);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);

    let done = folder.join("done/data");
    let into = done.display().to_string();
    Account::current().make_dir(&folder, "done");
    scene.tidemark.run(&["restore", "--quiet", "--into", &into]).ok();
    restore("directory-restored-already", &done);
    assert!(done.join("global/pg_control").exists());

    let closed = folder.join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o555)).unwrap();
    restore("directory-closed", &closed.join("data"));
    scene.golden("directory-not-named", &["restore"]);
}

#[test]
fn a_full_disk_leaves_nothing_that_looks_whole_and_the_restore_can_be_run_again() {
    let scene = Scene::shared();
    let account = Account::current();
    let folder = account.make_dir(scene.tidemark.home(), "small-disk");
    let room = match Room::mount(&folder, 12) {
        Ok(room) => room,
        Err(why) => {
            not_run(&format!("restore onto a full disk: unable to mount one: {why}"));
            return;
        }
    };
    let data = folder.join("data");
    let into = data.display().to_string();
    let args = ["restore", "--quiet", "--into", &into];
    let restore = || Output::of(&mut room.inside(scene.tidemark.command(&args)));
    let full = restore().failed(4);
    golden_error("disk-full", &full.transcript(&args), &scene.known());

    // Unmistakable: PostgreSQL does not start, and a file says why.
    let host = room.host(&data);
    assert!(host.join("tidemark.restoring").exists());
    assert!(!host.join("global/pg_control").exists());
    let mut postgres = scene.binaries.command("postgres");
    postgres.arg("-D").arg(&data);
    let started = Output::of(&mut room.inside(postgres));
    assert!(started.code.is_some_and(|code| code != 0), "{started:?}");
    let mut control = scene.binaries.client("pg_controldata");
    control.arg(&data);
    let said = stderr_of(&mut room.inside(control));
    assert!(said.contains("global/pg_control\" for reading: No such file"), "{said}");
    // Still full: the same words, and not "not empty".
    let again = restore().failed(4);
    assert!(again.stderr.contains("No space left on device"), "{again:?}");

    room.resize(400);
    restore().ok();
    assert!(!host.join("tidemark.restoring").exists());
    assert!(host.join("global/pg_control").exists());
    // Another major's refuses what this one wrote.
    if scene.binaries.brings("pg_verifybackup", "on a restore") {
        let mut verify = scene.binaries.command("pg_verifybackup");
        verify.arg("--quiet").arg(&data);
        assert_eq!(stderr_of(&mut room.inside(verify)), "");
    }
}

/// A data directory to which PostgreSQL would fetch WAL: `wal-get` reads its `pg_control`.
fn standby(scene: &Scene) -> Postgres {
    let data = scene.tidemark.new_target("standby");
    let into = data.display().to_string();
    scene.tidemark.run(&["restore", "--quiet", "--as-standby", "--into", &into]).ok();
    Postgres::adopt(&scene.binaries, &data)
}

#[test]
fn wal_get_says_not_there_only_when_it_is_not_there() {
    let scene = Scene::shared();
    let server = standby(&scene);
    // As somebody sets up who restores by hand: no plan of ours, and no standby.
    let [standby, recovery] =
        ["standby.signal", "recovery.signal"].map(|name| server.data().join(name));
    std::fs::rename(&standby, &recovery).unwrap();
    let path = server.data().join("pg_wal/RECOVERYXLOG").display().to_string();
    let late = &scene.late_extents[2];
    let segment = |number: u64| format!("{:08X}{:08X}{:08X}", 1, number >> 12, number & 0xFFF);
    let number = late.start.0 >> 20;
    let (here, never) = (segment(number), segment(number + 1000));
    let mut known = scene.known();
    known.push((here.clone(), "[SEGMENT]"));
    known.push((never.clone(), "[NO SEGMENT]"));

    let get = |tidemark: &Tidemark, args: &[&str], status: i32| {
        let _ = std::fs::remove_file(&path);
        let output = tidemark.run(args).failed(status);
        assert_eq!(Path::new(&path).exists(), status == 0, "{output:?}");
        output.transcript(args)
    };
    // The restore has placed all that the repository has of it.
    get(&scene.tidemark, &["wal-get", &here, &path], 1);
    std::fs::remove_file(server.data().join("pg_wal").join(&here)).unwrap();
    // PostgreSQL goes on after 0, takes 1 for the end of the WAL, and stops above 125.
    get(&scene.tidemark, &["wal-get", &here, &path], 0);
    golden_error(
        "wal-get-not-there",
        &get(&scene.tidemark, &["wal-get", &never, &path], 1),
        &known,
    );
    get(&scene.tidemark, &["wal-get", "00000009.history", &path], 1);
    let text: String = [
        &["wal-get"][..],
        &["wal-get", &here],
        &["wal-get", &here, &path, "--clustr", "main"],
        &["wal-get", "--repository", "gs://nowhere", &here, &path],
        &["wal-get", "--cluster", "other", &here, &path],
    ]
    .iter()
    .map(|args| get(&scene.tidemark, args, 200))
    .collect();
    golden_error("wal-get-nonsense", &text, &known);

    let get_here = ["wal-get", here.as_str(), path.as_str()];
    let nowhere = scene.tidemark.at("/nonexistent/repository");
    golden_error("wal-get-no-repository", &get(&nowhere, &get_here, 200), &known);
    let stranger = Tidemark::with_url(scene.tidemark.url(), &[]);
    golden_error("wal-get-no-identity", &get(&stranger, &get_here, 200), &known);
    let copy = scene.copy("wal-get-copy");
    let damaged = copy.extent(late);
    let mut bytes = std::fs::read(&damaged).unwrap();
    let sealed = bytes.len() / 5 * 4;
    bytes[sealed] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    golden_error("wal-get-damaged", &get(&copy.tidemark, &get_here, 200), &known);

    // A standby asks again: it is told why, and goes on.
    std::fs::rename(&recovery, &standby).unwrap();
    golden_error("wal-get-standby", &get(&copy.tidemark, &get_here, 1), &known);
}
