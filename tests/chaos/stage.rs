//! Everything a round plays on: servers, store, the ways between them, and the sidecar.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use tidemark::pg::Lsn;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::harness::postgres::Stop;
use crate::harness::proxy::Proxy;
use crate::harness::{Account, Binaries, Postgres, S3, Settings, Tidemark};

use super::diary::Diary;
use super::plan::{Acknowledgement, Kind, Plan, Setup};
use super::sidecars::Supervised;
use super::writer::{Goal, Record, Sample, TABLE, Writer, WriterContext, observe};

/// Rows that cannot be compressed, and so many that the pack of each thread of a backup is uploaded in
/// several parts: 2 of 12 MiB, or 4 of 8 MiB.
const BALLAST: &str = "create table ballast (filler bytea); \
     alter table ballast alter filler set storage external; \
     insert into ballast select (select string_agg(sha512(random()::text::bytea), '') \
     from generate_series(1, 125) where outer_row = outer_row) \
     from generate_series(1, 5200) outer_row; checkpoint";
/// `repository.attempt_timeout` of the sidecars.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Room for `pg_wal` in the rounds in which it runs out.
const WAL_DISK_MIB: u64 = 320;

/// What must be true at the end besides what always must.
#[derive(Clone, Debug)]
pub struct GapExpected {
    /// End of the WAL in the repository when the server forgot what followed.
    pub from: Lsn,
    /// The oldest WAL that the server still had.
    pub kept_from: Lsn,
}

/// A file system of its own, unmounted when dropped.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// Mounts one in memory; the reason when this machine does not let us.
    pub fn tmpfs(at: &Path, mib: u64) -> Result<Self, String> {
        std::fs::create_dir_all(at).map_err(|error| error.to_string())?;
        let owner = owner().map_or(String::new(), |(uid, gid)| format!(",uid={uid},gid={gid}"));
        let options = format!("size={mib}m,mode=0700{owner}");
        root_does(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "chaos"]).arg(at))?;
        Ok(Self(at.to_path_buf()))
    }

    /// Gives one in memory more room.
    pub fn enlarge(&self, mib: u64) {
        let options = format!("remount,size={mib}m");
        root_does(Command::new("mount").args(["-o", &options]).arg(&self.0)).unwrap();
    }

    /// Mounts one in a file beside it, which an error turns read-only: the kernel does no such thing to
    /// one in memory while a file is open for writing.
    pub fn ext4(at: &Path, mib: u64) -> Result<Self, String> {
        let mount = Self(at.to_path_buf());
        let file = std::fs::File::create(mount.image()).map_err(|error| error.to_string())?;
        file.set_len(mib << 20).map_err(|error| error.to_string())?;
        let (uid, gid) = owner().unwrap_or_default();
        let owner = format!("root_owner={uid}:{gid}");
        root_does(Command::new("mkfs.ext4").args(["-q", "-F", "-E", &owner]).arg(mount.image()))?;
        mount.attach()?;
        Ok(mount)
    }

    fn image(&self) -> PathBuf {
        self.0.with_extension("ext4")
    }

    fn attach(&self) -> Result<(), String> {
        let mut mount = Command::new("mount");
        root_does(mount.args(["-o", "loop,errors=remount-ro"]).arg(self.image()).arg(&self.0))
    }

    /// How much is on it.
    pub fn used_mib(&self) -> u64 {
        let now = rustix::fs::statvfs(&self.0).unwrap();
        ((now.f_blocks - now.f_bfree) * now.f_frsize) >> 20
    }

    /// Lets it meet an error, after which nobody can write to it. What was written before stays.
    pub fn fail(&self) {
        root_does(Command::new("sync").arg("-f").arg(&self.0)).unwrap();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let at = self.0.display().to_string();
        let ours = mounts.lines().find(|line| line.split(' ').nth(1) == Some(&at)).unwrap();
        let device = ours.split(' ').next().unwrap().trim_start_matches("/dev/");
        std::fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
    }

    /// Mounts it anew, after which it can be written again.
    pub fn mend(&self) {
        root_does(Command::new("umount").arg(&self.0)).unwrap();
        self.attach().unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Whom files of the tests belong to, when that is not who runs them.
fn owner() -> Option<(u32, u32)> {
    Account::current().ids()
}

/// Runs what only root may run; what it said when that failed.
fn root_does(command: &mut Command) -> Result<(), String> {
    let done = command.output().map_err(|error| error.to_string())?;
    if done.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&done.stderr).trim().to_owned())
}

/// The stage of one round.
pub struct Stage {
    /// What is to happen.
    pub plan: Plan,
    /// What happened.
    pub diary: Arc<Diary>,
    /// The store.
    pub s3: S3,
    /// How the binary is called; through the proxy.
    pub tidemark: Arc<Tidemark>,
    /// The way to Postgres.
    pub to_server: Proxy,
    /// The way to S3.
    pub to_store: Proxy,
    /// The sidecar.
    pub sidecar: Arc<Supervised>,
    /// What the writers did.
    pub record: Arc<Record>,
    /// What the servers saw.
    pub samples: Arc<Mutex<Vec<Sample>>>,
    /// Why the machine did not let a fault happen.
    pub not_run: Mutex<Vec<(Kind, String)>>,
    /// What the faults leave to be checked.
    pub gaps: Mutex<Vec<GapExpected>>,
    /// Faults that did not do what they must, found while they were made.
    pub complaints: Mutex<Vec<String>>,
    /// How often a writer was seen refused or fenced.
    pub fenced: Mutex<Vec<Kind>>,
    /// Faults that met what they are aimed at.
    pub effective: Mutex<Vec<Kind>>,
    /// Says when the writers stop.
    pub stop: Arc<AtomicBool>,
    /// One at a time may start and stop servers.
    pub hand: Mutex<()>,
    /// Inside a server's folder, so unmounted before that is deleted.
    wal_disk: Option<Mount>,
    servers: RwLock<Vec<Arc<Postgres>>>,
    goal: watch::Sender<Goal>,
    runtime: Runtime,
}

impl Stage {
    /// Sets up servers, store and sidecar; nothing is written yet.
    pub fn set(plan: Plan) -> Self {
        let diary = Arc::new(Diary::begin());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let setup = &plan.setup;
        let s3 = S3::start();
        let upstream = s3.server().endpoint.trim_start_matches("http://").parse().unwrap();
        let server = Arc::new(Postgres::copy_of(
            &template(setup.segment_mib),
            &Settings { conf: server_conf(&plan), ..Settings::default() },
        ));
        let mut not_run = Vec::new();
        let mut wal_disk = None;
        if plan.has(Kind::WalDiskFull) {
            match put_wal_on_its_own_disk(&server) {
                Ok(mount) => wal_disk = Some(mount),
                Err(reason) => not_run.push((Kind::WalDiskFull, reason)),
            }
        }
        server.run();
        let address = SocketAddr::from(([127, 0, 0, 1], server.port()));
        let (to_server, to_store) =
            runtime.block_on(async { (Proxy::start(address).await, Proxy::start(upstream).await) });
        let tidemark = Arc::new(configured(&s3, &to_store, setup));
        let through_proxy =
            format!("host=127.0.0.1 port={} user=postgres", to_server.address().port());
        let sidecar = Supervised::start(Arc::clone(&tidemark), through_proxy, Arc::clone(&diary));
        let (goal, _) = watch::channel(Goal { server: 0, conninfo: server.conninfo() });
        diary.note(format!("{plan}"));
        Self {
            plan,
            diary,
            s3,
            tidemark,
            to_server,
            to_store,
            sidecar,
            record: Arc::default(),
            samples: Arc::default(),
            not_run: Mutex::new(not_run),
            gaps: Mutex::default(),
            complaints: Mutex::default(),
            fenced: Mutex::default(),
            effective: Mutex::default(),
            stop: Arc::default(),
            hand: Mutex::new(()),
            servers: RwLock::new(vec![server]),
            goal,
            wal_disk,
            runtime,
        }
    }

    /// The servers there are; the first is the original primary.
    pub fn servers(&self) -> Vec<Arc<Postgres>> {
        self.servers.read().unwrap().clone()
    }

    /// The server that is written to, and its index.
    pub fn primary(&self) -> (usize, Arc<Postgres>) {
        let index = self.goal.borrow().server;
        (index, self.servers()[index].clone())
    }

    /// Adds a server that the plan will need.
    pub fn add_standby(&self) {
        let standby = self.servers()[0].standby_with(&server_conf(&self.plan));
        self.watch_server(1, &standby);
        self.servers.write().unwrap().push(Arc::new(standby));
    }

    /// Moves writers and sidecar to another server.
    pub fn move_to(&self, index: usize) {
        let conninfo = self.servers()[index].conninfo();
        self.goal.send_replace(Goal { server: index, conninfo });
        self.aim(index);
    }

    /// Writes to a server that is not the one to write to, for so long.
    pub fn write_one(&self, index: usize, lasts: Duration) {
        let (goal, seen) =
            watch::channel(Goal { server: index, conninfo: self.servers()[index].conninfo() });
        let stop = Arc::new(AtomicBool::new(false));
        let record = Arc::clone(&self.record);
        let context = WriterContext { goal: seen, record, stop: Arc::clone(&stop) };
        let id = self.plan.setup.writer_count as i32;
        let writer = Writer::new(id, &self.plan.setup, self.plan.seed, &context);
        let running = self.runtime.spawn(writer.run());
        std::thread::sleep(lasts);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let _ = self.runtime.block_on(running);
        drop(goal);
    }

    /// Moves the sidecar alone.
    pub fn aim(&self, index: usize) {
        let port = self.servers()[index].port();
        self.to_server.aim(SocketAddr::from(([127, 0, 0, 1], port)));
    }

    /// Starts the writers.
    pub fn write(&self) {
        let context = WriterContext {
            goal: self.goal.subscribe(),
            record: Arc::clone(&self.record),
            stop: Arc::clone(&self.stop),
        };
        for id in 0..self.plan.setup.writer_count as i32 {
            let seed = self.plan.seed ^ u64::from(self.plan.round) << 20;
            self.runtime.spawn(Writer::new(id, &self.plan.setup, seed, &context).run());
        }
        self.watch_server(0, &self.servers()[0]);
    }

    fn watch_server(&self, index: usize, server: &Postgres) {
        self.runtime.spawn(observe(index, server.conninfo(), Arc::clone(&self.samples)));
    }

    /// Whether `pg_wal` has a file system of its own.
    pub fn has_wal_disk(&self) -> bool {
        self.wal_disk.is_some()
    }

    /// Serialises what starts and stops servers.
    pub fn take_hand(&self) -> MutexGuard<'_, ()> {
        self.hand.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Adds a complaint.
    pub fn complain(&self, text: impl Into<String>) {
        let text = text.into();
        self.diary.note(format!("COMPLAINT: {text}"));
        self.complaints.lock().unwrap().push(text);
    }

    /// The greatest flush position that a server saw.
    pub fn flushed(&self, server: usize) -> Lsn {
        let samples = self.samples.lock().unwrap();
        let seen = samples.iter().filter(|sample| sample.server == server);
        seen.map(|sample| sample.flush_lsn).max().unwrap_or_default()
    }

    /// Waits until `test` holds; `false` when it did not in time.
    pub fn wait(&self, at_most: Duration, mut test: impl FnMut() -> bool) -> bool {
        let deadline = Instant::now() + at_most;
        while !test() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        true
    }

    /// Stops the sidecar for good and all servers, at once.
    pub fn strike(&self) {
        self.sidecar.kill();
        for server in self.servers() {
            server.stop(Stop::Immediate);
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.strike();
    }
}

/// Stopped servers with empty tables, for copying, by size of their segments.
static TEMPLATES: Mutex<BTreeMap<u32, Arc<Postgres>>> = Mutex::new(BTreeMap::new());

fn template(segment_mib: u32) -> Arc<Postgres> {
    let mut templates = TEMPLATES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let made = templates.entry(segment_mib).or_insert_with(|| {
        let settings = Settings::default()
            .segment_mib(segment_mib)
            .conf("fsync = off")
            .conf("min_wal_size = 128MB");
        let server = Postgres::start(&Binaries::of_this_run(), &settings);
        server.psql(TABLE);
        server.psql(BALLAST);
        server.stop(Stop::Fast);
        Arc::new(server)
    });
    Arc::clone(made)
}

/// Deletes the templates: what is static is never dropped.
pub fn delete_templates() {
    TEMPLATES.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
}

fn server_conf(plan: &Plan) -> Vec<String> {
    let mut conf = vec![
        // Only the machine can lose what is not synced, and it does not crash here.
        "fsync = off".to_owned(),
        "wal_sender_timeout = 5s".to_owned(),
        "checkpoint_timeout = 30s".to_owned(),
        "log_replication_commands = on".to_owned(),
    ];
    let (min, max) = match plan.setup.segment_mib {
        1 => (4, 48),
        16 => (64, 192),
        _ => (128, 512),
    };
    conf.push(format!("min_wal_size = {min}MB"));
    conf.push(format!("max_wal_size = {max}MB"));
    if plan.has(Kind::SlotLost) {
        conf.push(format!("max_slot_wal_keep_size = {}MB", plan.setup.segment_mib * 4));
    }
    if plan.has(Kind::SlotDrop) || plan.has(Kind::Promote) {
        conf.push("wal_keep_size = 4GB".to_owned());
    }
    if plan.setup.acknowledgement == Acknowledgement::Synchronous {
        conf.push("synchronous_standby_names = 'tidemark'".to_owned());
    }
    conf
}

fn configured(s3: &S3, to_store: &Proxy, setup: &Setup) -> Tidemark {
    let endpoint = format!("http://{}", to_store.address());
    let ms = |time: Duration| format!("{}ms", time.as_millis());
    let mut env: Vec<(&str, String)> =
        s3.environment().into_iter().map(|(name, value)| (name, value.to_owned())).collect();
    env.extend([
        ("TIDEMARK_REPOSITORY_ENDPOINT", endpoint),
        ("TIDEMARK_REPOSITORY_ATTEMPT_TIMEOUT", ms(ATTEMPT_TIMEOUT)),
        ("TIDEMARK_REPOSITORY_OVERALL_TIMEOUT", "20s".to_owned()),
        ("TIDEMARK_ENCRYPTION", if setup.encrypted { "age" } else { "none" }.to_owned()),
        ("TIDEMARK_LEASE_TTL", ms(setup.lease_ttl)),
        ("TIDEMARK_WAL_FLUSH_INTERVAL", ms(setup.flush_interval)),
        ("TIDEMARK_WAL_IDLE_FLUSH_INTERVAL", "5s".to_owned()),
        ("TIDEMARK_RUN_BACKUP_INTERVAL", ms(setup.backup_interval)),
        ("TIDEMARK_LOG_LEVEL", "info".to_owned()),
    ]);
    if setup.upkeep {
        env.push(("TIDEMARK_RUN_UPKEEP_INTERVAL", "3s".to_owned()));
        env.push(("TIDEMARK_RETENTION_KEEP_COUNT", "2".to_owned()));
    }
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    Tidemark::with_url("s3://tidemark/chaos", &env)
}

/// Moves `pg_wal` of a stopped server to a small file system.
fn put_wal_on_its_own_disk(server: &Postgres) -> Result<Mount, String> {
    let disk = server.home().join("wal-disk");
    let mount = Mount::tmpfs(&disk, WAL_DISK_MIB)?;
    let (old, new) = (server.data().join("pg_wal"), disk.join("pg_wal"));
    let moved = Account::current().command("/bin/mv").arg(&old).arg(&new).status().unwrap();
    assert!(moved.success());
    std::os::unix::fs::symlink(&new, &old).unwrap();
    Ok(mount)
}
