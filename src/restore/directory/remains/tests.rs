//! Planted, moved and foreign markers.

use std::os::unix::fs::{PermissionsExt, chown, symlink};

use super::super::{Directory, TablespacePlace};
use super::*;
use crate::clock::Clock;
use crate::restore::rights::as_account;

fn marker(places: &[&Path]) -> Marker {
    let places: Vec<TablespacePlace> = places
        .iter()
        .map(|path| TablespacePlace { oid: 1, old: "/x".into(), new: path.to_path_buf() })
        .collect();
    Marker::new("main", "b", &places, Token::draw(&Clock::system()).unwrap())
}

/// A data directory with a marker that names `places`, as an interrupted restore leaves it.
fn interrupted(data: &Path, places: &[&Path]) {
    drop(Directory::claim(data, &marker(places), None).unwrap());
    fs::write(data.join("PG_VERSION"), "15").unwrap();
}

fn refusal(data: &Path, places: &[&Path], owner: Option<Owner>) -> Error {
    let error = Directory::claim(data, &marker(places), owner).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    error
}

/// The name of the one file in `space` that a restore has put there itself.
fn token_in(space: &Path) -> PathBuf {
    let names = fs::read_dir(space).unwrap().map(|entry| entry.unwrap().path());
    let of_ours = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(MARKER);
    names.into_iter().find(of_ours).unwrap()
}

#[test]
fn what_only_the_marker_names_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (data, victim) = (dir.path().join("data"), dir.path().join("victim"));
    interrupted(&data, &[&victim]);
    fs::write(victim.join("left"), "x").unwrap();
    let error = refusal(&data, &[&dir.path().join("space")], None);
    assert!(error.message().contains(&format!("something in '{}'", victim.display())), "{error}");
    assert!(error.hint_text().unwrap().contains("--tablespace"), "{error:?}");
    assert!(victim.join("left").exists() && data.join("PG_VERSION").exists());
    // Emptied by hand, or named again, it is in nobody's way.
    drop(Directory::claim(&data, &marker(&[&victim]), None).unwrap());
    assert!(!victim.join("left").exists() && !data.join("PG_VERSION").exists());
    fs::remove_file(token_in(&victim)).unwrap();
    drop(Directory::claim(&data, &marker(&[]), None).unwrap());
}

#[test]
fn a_directory_that_is_another_clusters_by_now_is_not_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (old, space) = (path("old"), path("space"));
    interrupted(&old, &[&space]);
    fs::remove_dir_all(&space).unwrap();
    // Another restore is writing there, is interrupted, has finished: it is never the old one's to clear.
    let new = Directory::claim(&path("new"), &marker(&[&space]), None).unwrap();
    fs::write(space.join("precious"), "x").unwrap();
    for folder in ["global", "pg_wal"] {
        fs::create_dir(path("new").join(folder)).unwrap();
    }
    refusal(&old, &[&space], None);
    new.finish(b"control", 0o600).unwrap();
    let error = refusal(&old, &[&space], None);
    assert!(error.message().contains("nothing there shows"), "{error}");
    assert!(error.hint_text().unwrap().contains("--tablespace OLD=NEW"), "{error:?}");
    assert!(space.join("precious").exists() && old.join("PG_VERSION").exists());
    // Nor is it in the way of who wants something else.
    drop(Directory::claim(&old, &marker(&[&path("elsewhere")]), None).unwrap());
    assert!(space.join("precious").exists() && !old.join("PG_VERSION").exists());
}

#[test]
fn a_tablespace_inside_of_another_is_taken_and_cleared_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (data, outer) = (dir.path().join("data"), dir.path().join("outer"));
    let inner = outer.join("inner");
    let again = || Directory::claim(&data, &marker(&[&inner, &outer]), None);
    for _ in 0..2 {
        drop(again().unwrap());
        fs::write(outer.join("left"), "x").unwrap();
        fs::write(inner.join("left"), "x").unwrap();
    }
    drop(again().unwrap());
    assert!(!outer.join("left").exists() && !inner.join("left").exists());
}

#[test]
fn a_marker_without_a_token_has_no_say_about_tablespaces() {
    let dir = tempfile::tempdir().unwrap();
    let (data, space) = (dir.path().join("data"), dir.path().join("space"));
    interrupted(&data, &[&space]);
    fs::remove_file(token_in(&space)).unwrap();
    let old = Marker { token: None, ..marker(&[&space]) };
    fs::write(data.join(MARKER), serde_json::to_vec(&old).unwrap()).unwrap();
    fs::write(space.join("precious"), "x").unwrap();
    for by_links in [false, true] {
        if by_links {
            // As after an interruption in the last step.
            fs::create_dir(data.join("pg_tblspc")).unwrap();
            symlink(&space, data.join("pg_tblspc/16400")).unwrap();
            fs::write(data.join(MARKER), [0xff; 8192]).unwrap();
        }
        for planned in [&space, &dir.path().join("elsewhere")] {
            let error = refusal(&data, &[planned], None);
            assert!(error.message().contains(&format!("'{}'", space.display())), "{error}");
            assert!(error.hint_text().unwrap().contains("empty it yourself"), "{error:?}");
            assert!(space.join("precious").exists() && data.join("PG_VERSION").exists());
        }
    }
    fs::remove_file(space.join("precious")).unwrap();
    drop(Directory::claim(&data, &marker(&[&space]), None).unwrap());
    assert!(!data.join("PG_VERSION").exists());
}

#[test]
fn wherever_a_restore_dies_the_next_one_can_clear_its_tablespaces() {
    let dir = tempfile::tempdir().unwrap();
    let (data, space) = (dir.path().join("data"), dir.path().join("space"));
    let again = || drop(Directory::claim(&data, &marker(&[&space]), None).unwrap());
    // Before the directory was made, and before the token was put into it.
    interrupted(&data, &[&space]);
    fs::remove_dir_all(&space).unwrap();
    again();
    fs::remove_file(token_in(&space)).unwrap();
    again();
    // Before the token had its name.
    let token = token_in(&space);
    fs::rename(&token, format!("{}.new", token.display())).unwrap();
    again();
    // While it was being cleared.
    fs::create_dir_all(space.join("PG_15/1")).unwrap();
    again();
    assert_eq!(fs::read_dir(&space).unwrap().count(), 1);
    // In the last step.
    fs::write(space.join("left"), "x").unwrap();
    fs::create_dir(data.join("pg_wal")).unwrap();
    fs::copy(data.join(MARKER), LAST_WORDS.iter().fold(data.clone(), |path, name| path.join(name)))
        .unwrap();
    again();
    assert!(!space.join("left").exists());
    fs::write(space.join("left"), "x").unwrap();
    fs::create_dir(data.join("pg_wal")).unwrap();
    fs::copy(data.join(MARKER), data.join("pg_wal").join(MARKER)).unwrap();
    fs::write(data.join(MARKER), [0xff; 8192]).unwrap();
    again();
    assert!(!space.join("left").exists());
}

#[test]
fn a_planned_tablespace_that_the_marker_does_not_name_is_refused_when_it_has_anything() {
    let dir = tempfile::tempdir().unwrap();
    let (data, space) = (dir.path().join("data"), dir.path().join("space"));
    interrupted(&data, &[]);
    fs::create_dir(&space).unwrap();
    fs::write(space.join("precious"), "x").unwrap();
    let error = refusal(&data, &[&space], None);
    assert!(error.message().contains("'precious'"), "{error}");
    assert!(space.join("precious").exists());
}

#[test]
fn links_in_what_is_cleared_are_removed_and_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (data, victim) = (dir.path().join("data"), dir.path().join("victim"));
    fs::create_dir_all(victim.join("deep")).unwrap();
    fs::write(victim.join("deep/precious"), "x").unwrap();
    interrupted(&data, &[]);
    fs::create_dir_all(data.join("base/1")).unwrap();
    symlink(&victim, data.join("link")).unwrap();
    symlink(&victim, data.join("base/1/link")).unwrap();
    symlink(victim.join("deep/precious"), data.join("base/1/file")).unwrap();
    drop(Directory::claim(&data, &marker(&[]), None).unwrap());
    let names: Vec<_> = fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [MARKER]);
    assert!(victim.join("deep/precious").exists());
    // Nor is a marker that is a link.
    fs::rename(data.join(MARKER), victim.join("marker")).unwrap();
    symlink(victim.join("marker"), data.join(MARKER)).unwrap();
    assert!(Directory::claim(&data, &marker(&[]), None).is_err());
}

#[test]
fn a_marker_that_others_could_have_made_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    interrupted(&data, &[]);
    let path = data.join(MARKER);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let error = refusal(&data, &[], None);
    assert!(error.message().contains("everybody could have written"), "{error}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::hard_link(&path, dir.path().join("elsewhere")).unwrap();
    let error = refusal(&data, &[], None);
    assert!(error.message().contains("not a file of its own"), "{error}");
    assert!(data.join("PG_VERSION").exists());
}

#[test]
fn the_word_of_a_marker_is_that_of_its_writer() {
    let owner = Some(Owner { uid: 70, gid: 70 });
    for (writer, us, owner, word) in [
        (0, 0, owner, Some(Word::Trusted)),
        (0, 70, None, Some(Word::Trusted)),
        (70, 70, None, Some(Word::Trusted)),
        (70, 0, owner, Some(Word::Of(70))),
        (70, 0, None, None),
        (71, 0, owner, None),
        (71, 70, None, None),
    ] {
        assert_eq!(Word::of_writer(writer, us, owner), word, "{writer} {us} {owner:?}");
    }
}

#[test]
fn root_clears_nothing_of_others_on_the_word_of_the_account_it_restores_for() {
    if !Owner::process_is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (data, space) = (dir.path().join("data"), dir.path().join("space"));
    interrupted(&data, &[&space]);
    fs::write(space.join("precious"), "x").unwrap();
    let give = |path: &Path, uid| chown(path, Some(uid), Some(uid)).unwrap();
    let owner = Some(Owner { uid: 70, gid: 70 });
    give(&data.join(MARKER), 71);
    let error = refusal(&data, &[&space], owner);
    assert!(error.message().contains("belongs to user 71, who has no say"), "{error}");
    give(&data.join(MARKER), 70);
    give(&data, 70);
    let error = refusal(&data, &[&space], owner);
    assert!(error.message().contains("space' belongs to user 0"), "{error}");
    assert!(space.join("precious").exists() && data.join("PG_VERSION").exists());
    give(&space, 70);
    drop(Directory::claim(&data, &marker(&[&space]), owner).unwrap());
    assert!(!space.join("precious").exists() && !data.join("PG_VERSION").exists());
}

#[test]
fn folders_that_keep_their_owner_from_writing_are_cleared_by_him() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    interrupted(&data, &[]);
    fs::create_dir_all(data.join("extra/deep")).unwrap();
    fs::write(data.join("extra/deep/server.key"), "x").unwrap();
    for folder in ["extra/deep", "extra"] {
        fs::set_permissions(data.join(folder), fs::Permissions::from_mode(0o500)).unwrap();
    }
    if Owner::process_is_root() {
        // Modes do not bind root, so that it is done by somebody else.
        let nobody = Owner { uid: 12_345, gid: 12_346 };
        for path in ["", MARKER, "PG_VERSION", "extra", "extra/deep", "extra/deep/server.key"] {
            nobody.give(&data.join(path)).unwrap();
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        as_account(Some(nobody), || Directory::claim(&data, &marker(&[]), None)).unwrap();
    } else {
        drop(Directory::claim(&data, &marker(&[]), None).unwrap());
    }
    let names: Vec<_> = fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [MARKER]);
}
