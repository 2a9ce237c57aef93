//! Objects that are cut, flipped, swapped or gone, and keys that do not fit: seen by `verify` and by
//! `restore`.

use std::path::{Path, PathBuf};

use super::{Copy, Scene, golden_error};
use crate::harness::{Account, Tidemark};

/// What happens to an object behind everybody's back.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Truncated,
    Flipped,
    Swapped,
    Missing,
}

const DAMAGES: [(&str, Damage); 4] = [
    ("truncated", Damage::Truncated),
    ("flipped", Damage::Flipped),
    ("swapped", Damage::Swapped),
    ("missing", Damage::Missing),
];

impl Damage {
    /// Does it to `path`; `other` is what it is swapped with.
    fn strike(self, path: &Path, other: &Path) {
        let bytes = std::fs::read(path).unwrap();
        match self {
            Self::Truncated => std::fs::write(path, &bytes[..bytes.len() * 2 / 3]).unwrap(),
            Self::Flipped => {
                let mut bytes = bytes;
                // In what is sealed, of all kinds of objects but a manifest.
                let at = bytes.len() / 5 * 4;
                bytes[at] ^= 4;
                std::fs::write(path, &bytes).unwrap();
            }
            Self::Swapped => {
                std::fs::write(path, std::fs::read(other).unwrap()).unwrap();
                std::fs::write(other, &bytes).unwrap();
            }
            Self::Missing => std::fs::remove_file(path).unwrap(),
        }
    }
}

/// What `verify` and `restore` of the second backup say.
fn verdicts(scene: &Scene, tidemark: &Tidemark, name: &str) -> String {
    let into = tidemark.new_target(name).display().to_string();
    let restore = ["restore", "--quiet", "--backup", &scene.two, "--into", &into];
    let verify = ["verify"];
    let [verified, restored] = [&verify[..], &restore[..]].map(|args| {
        let output = tidemark.run(args);
        let control = Path::new(&into).join("global/pg_control");
        assert!(output.code == Some(0) || !control.exists(), "looks whole: {output:?}");
        output.transcript(args)
    });
    let _ = std::fs::remove_dir_all(&into);
    format!("{verified}\n{restored}")
}

#[test]
fn damaged_objects_are_named_with_what_is_lost() {
    let scene = Scene::shared();
    let [first, second] = [&scene.late_extents[1], &scene.late_extents[2]];
    let pack = |backup: &str| format!("base/{backup}/pack-000001");
    let manifest = |backup: &str| format!("base/{backup}/manifest");
    let mut known = scene.known();
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    known.push((name(&first.path), "[EXTENT A]"));
    known.push((name(&second.path), "[EXTENT B]"));
    type Place<'a> = &'a dyn Fn(&Copy) -> (PathBuf, PathBuf);
    let places: [(&str, Place<'_>); 3] = [
        ("pack", &|copy| (copy.object(&pack(&scene.two)), copy.object(&pack(&scene.one)))),
        ("manifest", &|copy| {
            (copy.object(&manifest(&scene.two)), copy.object(&manifest(&scene.one)))
        }),
        ("wal", &|copy| (copy.extent(first), copy.extent(second))),
    ];
    for (object, place) in places {
        for (how, damage) in DAMAGES {
            let copy = scene.copy("copy");
            let (path, other) = place(&copy);
            damage.strike(&path, &other);
            let name = format!("damaged-{object}-{how}");
            let text = verdicts(&scene, &copy.tidemark, &name);
            golden_error(&name, &text, &known);
        }
    }
}

#[test]
fn damaged_keys_and_identities_are_named() {
    let scene = Scene::shared();
    for (how, damage) in DAMAGES {
        if matches!(damage, Damage::Swapped) {
            continue;
        }
        let copy = scene.copy("copy-keys");
        let keys = std::fs::read_dir(copy.object("keys")).unwrap();
        // Each writer has its own.
        for key in keys {
            damage.strike(&key.unwrap().path(), Path::new("/nonexistent"));
        }
        let name = format!("damaged-key-{how}");
        let text = verdicts(&scene, &copy.tidemark, &name);
        golden_error(&name, &text, &scene.known());
    }
    let copy = scene.copy("copy-keys");
    let identity = copy.object("identity");
    let mut bytes = std::fs::read(&identity).unwrap();
    bytes[0] ^= 4;
    std::fs::write(&identity, bytes).unwrap();
    let name = "damaged-identity-flipped";
    golden_error(name, &verdicts(&scene, &copy.tidemark, name), &scene.known());
}

#[test]
fn who_has_not_the_identity_reads_nothing() {
    let scene = Scene::shared();
    // Another home: no identity, or somebody else's.
    let stranger = Tidemark::with_url(scene.tidemark.url(), &[]);
    let mut known = scene.known();
    known.push((stranger.home().display().to_string(), "[STRANGER]"));
    golden_error("no-identity", &verdicts(&scene, &stranger, "no-identity"), &known);

    let file = stranger.home().join("key.txt").display().to_string();
    stranger.run(&["keygen", "--output", &file]).ok();
    let strange = stranger.at(stranger.url()).with_env("TIDEMARK_KEYS_IDENTITY_FILE", &file);
    golden_error("wrong-identity", &verdicts(&scene, &strange, "wrong-identity"), &known);

    let check = |name: &str, content: &str| {
        std::fs::write(&file, content).unwrap();
        Account::current().give(Path::new(&file));
        let args = ["restore", "--dry-run"];
        golden_error(name, &strange.run(&args).transcript(&args), &known);
    };
    check("identity-file-nonsense", "this is a shopping list\n");
    check("identity-file-empty", "");
    std::fs::remove_file(&file).unwrap();
    let args = ["restore", "--dry-run"];
    golden_error("identity-file-missing", &strange.run(&args).transcript(&args), &known);
}
