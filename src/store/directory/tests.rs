//! What is particular to the directory driver; the promises all drivers share are in the contract
//! suite.

use super::*;
use crate::error::Kind;

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

fn store() -> (tempfile::TempDir, Directory) {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::new(folder.path().join("repository"), &Clock::system());
    (folder, store)
}

#[tokio::test]
async fn a_put_leaves_one_file_and_nothing_in_the_making() {
    let (_folder, store) = store();
    store.put_if_absent(&name("c/wal/a"), Bytes::from_static(b"x")).await.unwrap();
    store.put_if_absent(&name("c/wal/a"), Bytes::from_static(b"y")).await.unwrap();
    assert_eq!(fs::read(store.0.root.path().join("c/wal/a")).unwrap(), b"x");
    assert_eq!(fs::read_dir(store.0.root.path().join(".incoming")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn first_puts_that_meet_do_not_take_the_root_of_another_for_one_that_went_away() {
    for _ in 0..150 {
        let (_folder, store) = store();
        let names: Vec<ObjectName> = (0..12).map(|index| name(&format!("c/{index}"))).collect();
        let puts = names.iter().map(|name| store.put_if_absent(name, Bytes::new()));
        for put in futures::future::join_all(puts).await {
            assert_eq!(put.unwrap(), PutOutcome::Created);
        }
    }
}

#[tokio::test]
async fn the_sweep_takes_what_a_crash_left_and_nothing_that_is_held() {
    let (_folder, store) = store();
    let held = store.begin_multipart(&name("c/held")).await.unwrap();
    held.put_part(1, Bytes::from_static(b"x")).await.unwrap();
    fs::write(store.0.root.path().join(".incoming/left-behind"), b"half").unwrap();
    assert_eq!(store.abort_stale_multiparts("", Duration::from_secs(60)).await.unwrap(), 0);
    assert_eq!(store.abort_stale_multiparts("", Duration::ZERO).await.unwrap(), 1);
    assert_eq!(held.complete().await.unwrap(), PutOutcome::Created);
    assert_eq!(store.get(&name("c/held"), None).await.unwrap().as_ref(), b"x");
}

#[tokio::test]
async fn dropping_an_upload_removes_its_files() {
    let (_folder, store) = store();
    let upload = store.begin_multipart(&name("c/x")).await.unwrap();
    upload.put_part(2, Bytes::from_static(b"early")).await.unwrap();
    assert_eq!(fs::read_dir(store.0.root.path().join(".incoming")).unwrap().count(), 2);
    drop(upload);
    assert_eq!(fs::read_dir(store.0.root.path().join(".incoming")).unwrap().count(), 0);
}

/// Whatever is asked of the store is answered as an outage.
async fn assert_gone(store: &Directory) {
    let answers = [
        ("get", store.get(&name("c/a"), None).await.map(|_| ())),
        ("head", store.head(&name("c/a")).await.map(|_| ())),
        ("list", store.list("", None).await.map(|_| ())),
        ("list", store.list("c/", None).await.map(|_| ())),
        ("read", store.read_versioned(&name("lease")).await.map(|_| ())),
        ("put", store.put_if_absent(&name("c/b"), Bytes::new()).await.map(|_| ())),
        ("begin", store.begin_multipart(&name("c/b")).await.map(|_| ())),
        ("replace", store.replace_if(&name("lease"), Bytes::new(), None).await.map(|_| ())),
        ("delete", store.delete(&[name("c/a")]).await),
        ("probe", store.probe().await.map(|_| ())),
    ];
    for (what, answer) in answers {
        let error = answer.expect_err(what);
        assert_eq!(error.kind(), Kind::Unavailable, "{what}: {error}");
        assert!(error.message().contains("unmounted or replaced"), "{what}: {error}");
        assert!(error.hint_text().unwrap().contains("Mount"), "{what}: {error:?}");
    }
}

#[tokio::test]
async fn a_root_that_went_away_is_an_outage_and_neither_empty_nor_written_to() {
    let (folder, store) = store();
    let (root, away) = (store.0.root.path().to_owned(), folder.path().join("unmounted"));
    store.put_if_absent(&name("c/a"), Bytes::from_static(b"x")).await.unwrap();
    let begun = store.begin_multipart(&name("c/parts")).await.unwrap();
    begun.put_part(1, Bytes::from_static(b"x")).await.unwrap();
    fs::rename(&root, &away).unwrap();
    assert_gone(&store).await;
    assert!(!root.exists(), "it is not made anew");
    // The bare mount point, and one with a copy of everything in it.
    fs::create_dir(&root).unwrap();
    assert_gone(&store).await;
    assert_eq!(begun.complete().await.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    fs::create_dir(root.join("c")).unwrap();
    fs::copy(away.join("c/a"), root.join("c/a")).unwrap();
    assert_gone(&store).await;
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
    assert!(root.join("c/a").exists());
    fs::rename(&root, folder.path().join("copy")).unwrap();
    fs::rename(&away, &root).unwrap();
    assert_eq!(store.get(&name("c/a"), None).await.unwrap().as_ref(), b"x");
    assert_eq!(store.list_all("").await.unwrap().len(), 1);
    store.put_if_absent(&name("c/b"), Bytes::new()).await.unwrap();
}

#[tokio::test]
async fn a_completion_that_an_outage_stopped_is_called_again() {
    let (folder, store) = store();
    let (root, away) = (store.0.root.path().to_owned(), folder.path().join("unmounted"));
    store.put_if_absent(&name("c/there"), Bytes::from_static(b"first")).await.unwrap();
    for (text, outcome, content) in [
        ("c/absent", PutOutcome::Created, b"early late".as_slice()),
        ("c/there", PutOutcome::AlreadyThere, b"first"),
    ] {
        let upload = store.begin_multipart(&name(text)).await.unwrap();
        upload.put_part(2, Bytes::from_static(b" late")).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"early")).await.unwrap();
        fs::rename(&root, &away).unwrap();
        for _ in 0..2 {
            let error = upload.complete().await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
        }
        fs::rename(&away, &root).unwrap();
        assert_eq!(upload.complete().await.unwrap(), outcome, "{text}");
        assert_eq!(store.get(&name(text), None).await.unwrap().as_ref(), content);
        assert_eq!(upload.complete().await.unwrap_err().kind(), Kind::Conflict);
    }
    // Early parts that were moved while their own files could not be removed.
    assert_eq!(store.abort_stale_multiparts("", Duration::ZERO).await.unwrap(), 2);
    assert_eq!(fs::read_dir(root.join(".incoming")).unwrap().count(), 0);
}

/// What an outage leaves after the rename: the name, which could not be taken back, or nothing.
#[tokio::test]
async fn a_file_that_was_named_before_an_outage_is_known_as_ours() {
    let (_folder, store) = store();
    let store = &store.0;
    let target = store.path(&name("c/a"));
    for taken_back in [false, true] {
        let mut incoming = store.incoming().unwrap();
        fs::create_dir_all(parent(&target)).unwrap();
        incoming.rename_no_replace(&target).unwrap();
        if taken_back {
            incoming.take_back(&target);
            assert!(!target.exists());
        }
        assert_eq!(store.publish(&mut incoming, &name("c/a")).unwrap(), PutOutcome::Created);
        assert!(incoming.is(&target));
        let mut rival = store.incoming().unwrap();
        assert_eq!(store.publish(&mut rival, &name("c/a")).unwrap(), PutOutcome::AlreadyThere);
        rival.take_back(&target);
        assert!(incoming.is(&target), "a rival's file is left alone");
        fs::remove_file(&target).unwrap();
    }
}

#[tokio::test]
async fn a_root_that_was_only_read_is_known_too() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("repository");
    let store = Directory::new(&root, &Clock::system());
    // Never there: nothing is in it yet.
    assert!(store.list_all("").await.unwrap().is_empty());
    assert_eq!(store.head(&name("c/a")).await.unwrap(), None);
    assert_eq!(store.get(&name("c/a"), None).await.unwrap_err().kind(), Kind::NotFound);
    assert!(!root.exists());
    fs::create_dir(&root).unwrap();
    assert_eq!(store.head(&name("c/a")).await.unwrap(), None);
    fs::rename(&root, folder.path().join("away")).unwrap();
    assert_gone(&store).await;
}

/// A writer that is killed after the rename leaves names that a power failure may still take away.
#[tokio::test]
async fn what_another_process_put_is_made_durable_by_who_builds_on_it() {
    let (_folder, store) = store();
    for text in ["c/wal/1/a", "c/wal/2/a", "c/base/b/manifest"] {
        store.put_if_absent(&name(text), Bytes::new()).await.unwrap();
    }
    let other = Directory::new(store.0.root.path(), &Clock::system());
    assert_eq!(other.list_all("c/wal/").await.unwrap().len(), 2);
    let synced = || other.latencies().fsync.summary().count;
    assert_eq!(synced(), 0);
    other.make_durable("c/wal/").await.unwrap();
    let known = synced();
    assert!(known >= 5, "c/wal, the two in it, c and the root: {known}");
    // More may have come since; what is above is known.
    other.make_durable("c/wal").await.unwrap();
    assert_eq!(synced(), known + 3);
    other.make_durable("none").await.unwrap();
    other.make_durable("").await.unwrap();
}

#[tokio::test]
async fn empty_folders_go_with_their_last_object_and_come_back() {
    let (_folder, store) = store();
    for _ in 0..2 {
        store.put_if_absent(&name("c/base/b/manifest"), Bytes::new()).await.unwrap();
        store.delete(&[name("c/base/b/manifest"), name("c/none")]).await.unwrap();
        assert!(!store.0.root.path().join("c").exists());
        assert!(store.0.root.path().exists());
    }
}

#[tokio::test]
async fn pages_are_in_byte_order_of_whole_names_and_complete() {
    let (_folder, store) = store();
    let mut names = ["a-b", "a/b", "a/b-c", "a/c/d", "a/c.d", "ab", "a.b", "b/0", "b/1/2", "b/10"]
        .map(str::to_owned)
        .to_vec();
    names.sort();
    for text in &names {
        store.put_if_absent(&name(text), Bytes::new()).await.unwrap();
    }
    let root = store.0.root.open().unwrap().unwrap();
    for count_max in 1..=names.len() {
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = walk::page(&root, "", after.as_ref(), count_max).unwrap();
            found.extend(page.objects.iter().map(|object| object.name.to_string()));
            if !page.more {
                break;
            }
            assert_eq!(page.objects.len(), count_max);
            after = page.objects.last().map(|object| object.name.clone());
        }
        assert_eq!(found, names, "pages of {count_max}");
    }
    let page = walk::page(&root, "a/c", None, 100).unwrap();
    assert_eq!(page.objects.len(), 2);
    let page = walk::page(&root, "a/", Some(&name("a/b")), 100).unwrap();
    assert_eq!(page.objects.len(), 3);
    assert!(walk::page(&root, "none/", None, 100).unwrap().objects.is_empty());
}

#[tokio::test]
async fn an_object_cannot_take_the_place_of_a_folder() {
    let (_folder, store) = store();
    store.put_if_absent(&name("a/b"), Bytes::new()).await.unwrap();
    let error = store.put_if_absent(&name("a"), Bytes::new()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error}");
    assert_eq!(store.get(&name("a"), None).await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(store.head(&name("a")).await.unwrap(), None);
}

/// A link to a file is an object; what a link to a folder holds would be missing, and what is missing is
/// taken for gone.
#[tokio::test]
async fn a_folder_that_was_moved_and_linked_back_is_refused_and_not_passed_over() {
    let (folder, store) = store();
    store.put_if_absent(&name("c/base/a/manifest"), Bytes::from_static(b"m")).await.unwrap();
    store.put_if_absent(&name("c/wal/x"), Bytes::from_static(b"w")).await.unwrap();
    let (inside, bigger) = (store.0.root.path().join("c"), folder.path().join("bigger"));
    fs::rename(inside.join("base/a"), &bigger).unwrap();
    std::os::unix::fs::symlink(&bigger, inside.join("base/a")).unwrap();
    let answers = [
        store.list("", None).await.map(drop),
        store.list("c/base/", None).await.map(drop),
        store.list("c/base/a/", None).await.map(drop),
        store.make_durable("c").await,
    ];
    for (index, answer) in answers.into_iter().enumerate() {
        // In the folder itself nothing is passed over.
        if index == 2 {
            answer.unwrap();
            continue;
        }
        let error = answer.unwrap_err();
        assert_eq!(error.kind(), Kind::Config, "{error}");
        assert!(error.message().contains("'c/base/a': it is a link to a folder"), "{error}");
        assert!(error.hint_text().unwrap().contains("Mount"), "{error:?}");
    }
    assert_eq!(store.list("c/wal/", None).await.unwrap().objects.len(), 1);
    fs::remove_file(inside.join("base/a")).unwrap();
    std::os::unix::fs::symlink(bigger.join("manifest"), inside.join("base/file")).unwrap();
    std::os::unix::fs::symlink("nowhere", inside.join("base/dangling")).unwrap();
    let found = store.list_all("c/base/").await.unwrap();
    assert_eq!(found.iter().map(|o| o.name.as_str()).collect::<Vec<_>>(), ["c/base/file"]);
}

#[tokio::test]
async fn where_no_file_can_be_made_the_time_is_told_all_the_same() {
    let (_folder, store) = store();
    store.replace_if(&name("lease"), Bytes::from_static(b"x"), None).await.unwrap();
    let root = store.0.root.path();
    fs::remove_dir(root.join(".incoming")).unwrap();
    fs::write(root.join(".incoming"), b"").unwrap();
    let lock = File::options().write(true).open(root.join(".lock")).unwrap();
    lock.set_modified(std::time::UNIX_EPOCH).unwrap();
    let skew = store.time().await.unwrap().unwrap().duration_since(Clock::system().now());
    assert!(skew.abs() < jiff::SignedDuration::from_secs(60), "{skew}");
    fs::remove_file(root.join(".lock")).unwrap();
    assert_eq!(store.time().await.unwrap_err().kind(), Kind::Unavailable);
}
