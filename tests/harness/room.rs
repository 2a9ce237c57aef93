//! A small file system that can be full, and can be given more room.
//!
//! Root mounts it; who is not root does so in a mount namespace of its own, in which the commands that
//! are to see it are then run.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use rustix::process::geteuid;

/// A mounted file system in memory; gone when dropped.
#[derive(Debug)]
pub struct Room {
    path: PathBuf,
    /// Keeps the namespace that the file system is in; `None` when it is in ours.
    keeper: Option<Keeper>,
}

/// A shell in the namespace that answers each order with an empty line.
#[derive(Debug)]
struct Keeper {
    process: Child,
    answers: Mutex<BufReader<ChildStdout>>,
}

impl Keeper {
    /// Waits for an answer; `false` when it ended.
    fn answered(&self) -> bool {
        let mut line = String::new();
        self.answers.lock().unwrap().read_line(&mut line).is_ok_and(|bytes| bytes > 0)
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Room {
    /// Mounts one of `mib` MiB on the folder `path`; why not, where that is not allowed.
    pub fn mount(path: &Path, mib: u32) -> Result<Self, String> {
        let size = format!("size={mib}m,mode=0777");
        if geteuid().is_root() {
            done(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path))?;
            return Ok(Self { path: path.into(), keeper: None });
        }
        // Whoever enters the namespace later may not mount in it, so the keeper does; it ends with its
        // standard input.
        let script = "mount -t tmpfs -o \"$1\" tmpfs \"$2\" && echo && while read options; do \
                      mount -o \"$options\" \"$2\" && echo; done";
        let mut command = Command::new("unshare");
        command.args(["--map-current-user", "--keep-caps", "--mount", "sh", "-c", script, "sh"]);
        let mut keeper = command
            .arg(&size)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let answers = BufReader::new(keeper.stdout.take().unwrap());
        let keeper = Keeper { process: keeper, answers: answers.into() };
        match keeper.answered() {
            true => Ok(Self { path: path.into(), keeper: Some(keeper) }),
            false => Err("this user may not mount in a namespace of its own".into()),
        }
    }

    /// Changes its size.
    pub fn resize(&self, mib: u32) {
        let options = format!("remount,size={mib}m");
        match &self.keeper {
            None => done(Command::new("mount").args(["-o", &options]).arg(&self.path)).unwrap(),
            Some(keeper) => {
                let mut orders = keeper.process.stdin.as_ref().unwrap();
                writeln!(orders, "{options}").unwrap();
                assert!(keeper.answered(), "{options}");
            }
        }
    }

    /// `command`, run where the file system is seen.
    pub fn inside(&self, command: Command) -> Command {
        let Some(keeper) = &self.keeper else { return command };
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &keeper.pid().to_string(), "--user", "--mount"]);
        inside.args(["--preserve-credentials", "--"]).arg(command.get_program());
        inside.args(command.get_args()).stdin(Stdio::null());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }

    /// Where this process finds `path` of the file system.
    pub fn host(&self, path: &Path) -> PathBuf {
        match &self.keeper {
            None => path.into(),
            Some(keeper) => {
                let root = PathBuf::from(format!("/proc/{}/root", keeper.pid()));
                root.join(path.strip_prefix("/").unwrap())
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        match &mut self.keeper {
            Some(keeper) => {
                let _ = keeper.process.kill();
                let _ = keeper.process.wait();
            }
            None => {
                let _ = done(Command::new("umount").arg(&self.path));
            }
        }
    }
}

fn done(command: &mut Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{:?}: {error}", command.get_program()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{:?}: {}", command.get_program(), String::from_utf8_lossy(&output.stderr)))
}
