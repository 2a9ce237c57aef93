//! Bad input against real servers: what a person is told, word for word, and the exit status.
//!
//! Each case is a golden file in `tests/golden/errors`; `INSTA_UPDATE=always` writes them anew. The
//! server's own words in them are those of PostgreSQL 15.

mod damaged;
mod refused;
mod restore;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use tidemark::pg::Lsn;

use crate::harness::transcript::golden;
use crate::harness::{Account, Binaries, Postgres, Settings, Tidemark};

/// What differs from run to run and matters to nobody.
const MASKS: &[(&str, &str)] = &[
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?( UTC|\+00)?", "[TIME]"),
    (r"\b[0-9A-F]{1,8}/[0-9A-F]{6,8}\b", "[LSN]"),
    (r"[0-9A-F]{16}-[0-9A-F]{16}-[0-9A-F]{16}", "[EXTENT]"),
    (r"\d{8}T\d{6}Z-[0-9A-F]{8}-[0-9A-F]{16}", "[BACKUP]"),
    (r"\bkeys?([ /])'?[0-9a-f]{32}\b'?", "key$1[KEY]"),
    (r"\b7\d{18}\b", "[SYSTEM]"),
    (r"\d+(\.\d+)? ([KMGT]iB|B\b)", "[SIZE]"),
    (r"bytes \d+\.\.\d+", "bytes [N]..[N]"),
    (r"\b\d+ bytes", "[N] bytes"),
    (r"says \d+", "says [N]"),
    (r"at byte \d+", "at byte [N]"),
    (r"frame \d+", "frame [N]"),
    (r"\d+ of \d+ extents", "[N] of [N] extents"),
    (r"\d+ (files|frames|extents)", "[N] $1"),
    (r"(needs|has only) \d+", "$1 [N]"),
    (r"unable to write '([^']*/data)/[^']*'", "unable to write '$1/[FILE]'"),
    (
        r"DEFECT main/wal/00000001/\[EXTENT\][^\n]*(\n  lost[^\n]*)*(\nDEFECT main/wal/00000001/\[EXTENT\][^\n]*(\n  lost[^\n]*)*)+",
        "[THE SAME OF EACH EXTENT]",
    ),
    (r"files: \d+: .*", "files: [FILES]"),
    // How many extents a few commits make is a matter of timing.
    (r"\d\d bad,", "[N] bad,"),
    (r"\d\d objects are damaged", "[N] objects are damaged"),
    (r"version \d+\.\d+", "version [VERSION]"),
    (r"CRC [0-9a-f]{8}, expected [0-9a-f]{8}", "CRC [CRC], expected [CRC]"),
    (r"127\.0\.0\.1:\d+", "127.0.0.1:[PORT]"),
    (r"port=\d+", "port=[PORT]"),
    (r"password=\S+", "password=[PASSWORD]"),
];

/// Compares with a golden file in `errors`; `known` are words that differ from run to run, and what is
/// shown for them.
#[track_caller]
fn golden_error(name: &str, text: &str, known: &[(String, &str)]) {
    let shown = known.iter().fold(text.to_owned(), |text, (word, label)| text.replace(word, label));
    golden("errors", name, &shown, MASKS);
}

/// A commit: when it was over by the server's clock, and the end of the WAL then.
#[derive(Clone, Debug)]
struct Moment {
    time: String,
    end_lsn: Lsn,
}

/// A WAL object in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Extent {
    start: Lsn,
    end: Lsn,
    path: PathBuf,
}

/// A repository in a directory as an ordinary week leaves it: two backups, commits before, between and
/// after them, each in an extent of its own. Its server is gone.
struct Scene {
    binaries: Binaries,
    tidemark: Tidemark,
    /// The two backups.
    one: String,
    two: String,
    /// Before the first backup.
    before_all: Moment,
    /// Three commits between the backups.
    between: [Moment; 3],
    /// The WAL objects after the second backup.
    late_extents: Vec<Extent>,
}

impl Scene {
    /// The one that other tests are using, else a new one: it is made once as long as somebody has it.
    fn shared() -> Arc<Self> {
        static CURRENT: Mutex<Weak<Scene>> = Mutex::new(Weak::new());
        let mut current = CURRENT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        current.upgrade().unwrap_or_else(|| {
            let scene = Arc::new(Self::make());
            *current = Arc::downgrade(&scene);
            scene
        })
    }

    fn make() -> Self {
        let binaries = Binaries::of_this_run();
        let server = Postgres::start(&binaries, &Settings::default().segment_mib(1));
        server.psql("create table t (id int)");
        let tidemark = Tidemark::with_directory();
        let conninfo = server.conninfo();
        let mut stream =
            tidemark.spawn(&["stream", "--postgres", &conninfo, "--flush-interval", "100ms"]);
        server.wait_for_stream();
        let wal = Path::new(tidemark.url()).join("main/wal/00000001");
        let backup = || {
            let arguments = ["backup", "--quiet", "--postgres", &conninfo, "--checkpoint", "fast"];
            tidemark.run(&arguments).ok().stdout.trim().to_owned()
        };
        let before_all = commit(&server, &wal);
        // It is in the files of the first backup, and so nothing leads back to the one before.
        commit(&server, &wal);
        let one = backup();
        let between = [commit(&server, &wal), commit(&server, &wal), commit(&server, &wal)];
        let two = backup();
        let second_end = extents(&wal).pop().unwrap().end;
        for _ in 0..4 {
            commit(&server, &wal);
        }
        assert!(stream.is_running(), "{}", stream.log());
        assert_eq!(stream.terminate(), Some(0));
        let mut late_extents = extents(&wal);
        late_extents.retain(|extent| extent.start >= second_end);
        assert!(late_extents.len() >= 4, "{late_extents:?}");
        Self { binaries, tidemark, one, two, before_all, between, late_extents }
    }

    /// A copy of the repository to be damaged, and a `tidemark` for it.
    fn copy(&self, name: &str) -> Copy {
        let folder = self.tidemark.home().join(name);
        // As the account that owns them; hard links would share the damage.
        let mut copy = Account::current().command("cp");
        let copied = copy.arg("-a").arg(self.tidemark.url()).arg(&folder).status().unwrap();
        assert!(copied.success());
        Copy { tidemark: self.tidemark.at(&folder.display().to_string()), folder }
    }

    /// Runs `tidemark ARGS` on the repository, and compares what it says.
    #[track_caller]
    fn golden(&self, name: &str, args: &[&str]) {
        self.golden_of(&self.tidemark, name, args);
    }

    /// As [`Scene::golden`] with another `tidemark`.
    #[track_caller]
    fn golden_of(&self, tidemark: &Tidemark, name: &str, args: &[&str]) {
        golden_error(name, &tidemark.run(args).transcript(args), &self.known());
    }

    /// What differs from run to run, with a name for each.
    fn known(&self) -> Vec<(String, &'static str)> {
        let [before_gap, in_gap, after_gap] = &self.between;
        vec![
            (self.tidemark.home().display().to_string(), "[HOME]"),
            (self.one.clone(), "[BACKUP ONE]"),
            (self.two.clone(), "[BACKUP TWO]"),
            (self.before_all.time.clone(), "[BEFORE ALL]"),
            (self.before_all.end_lsn.to_string(), "[BEFORE ALL]"),
            (before_gap.time.clone(), "[BEFORE THE GAP]"),
            (in_gap.time.clone(), "[IN THE GAP]"),
            (in_gap.end_lsn.to_string(), "[IN THE GAP]"),
            (after_gap.time.clone(), "[AFTER THE GAP]"),
        ]
    }
}

/// A copy of a repository; deleted when dropped.
struct Copy {
    folder: PathBuf,
    tidemark: Tidemark,
}

impl Copy {
    /// The file of an object, by its name without the cluster's.
    fn object(&self, name: &str) -> PathBuf {
        self.folder.join("main").join(name)
    }

    /// The file of a WAL object of the scene.
    fn extent(&self, extent: &Extent) -> PathBuf {
        self.object("wal/00000001").join(extent.path.file_name().unwrap())
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// One commit, and waits until the repository has it.
fn commit(server: &Postgres, wal: &Path) -> Moment {
    server.psql("insert into t values (1)");
    let end_lsn: Lsn = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    let time = server.psql("select clock_timestamp()").replace(' ', "T");
    let time: jiff::Timestamp = time.parse().unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while extents(wal).last().is_none_or(|last| last.end < end_lsn) {
        assert!(Instant::now() < deadline, "{end_lsn} is not stored: {:?}", extents(wal));
        std::thread::sleep(Duration::from_millis(20));
    }
    Moment { time: time.to_string(), end_lsn }
}

/// The WAL objects in a folder, in order.
fn extents(folder: &Path) -> Vec<Extent> {
    let files = std::fs::read_dir(folder).into_iter().flatten();
    let read = |path: PathBuf| {
        let name = path.file_name()?.to_str()?;
        let mut numbers = name.splitn(3, '-').map(|text| u64::from_str_radix(text, 16).ok());
        let (start, end) = (Lsn(numbers.next()??), Lsn(numbers.next()??));
        Some(Extent { start, end, path })
    };
    let mut found: Vec<Extent> = files.filter_map(|file| read(file.ok()?.path())).collect();
    found.sort();
    found
}

/// Runs a program to its end as the tests' account: what it wrote to standard error.
fn stderr_of(command: &mut Command) -> String {
    String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned()
}
