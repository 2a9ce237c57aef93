//! A small file system that can be full, and can be given more room.
//!
//! Root mounts it; who is not root does so in a mount namespace of its own, in which the commands that
//! are to see it are then run.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::geteuid;

/// A mounted file system in memory; gone when dropped.
#[derive(Debug)]
pub struct Room {
    path: PathBuf,
    /// Keeps the namespace that the file system is in; `None` when it is in ours.
    keeper: Option<Child>,
}

impl Room {
    /// Mounts one of `mib` MiB on the folder `path`; why not, where that is not allowed.
    pub fn mount(path: &Path, mib: u32) -> Result<Self, String> {
        let size = format!("size={mib}m,mode=0777");
        if geteuid().is_root() {
            done(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path))?;
            return Ok(Self { path: path.into(), keeper: None });
        }
        let ready = path.join("ready");
        let script = "mount -t tmpfs -o \"$1\" tmpfs \"$2\" && touch \"$3\" && exec sleep 600";
        let mut command = Command::new("unshare");
        command.args(["--map-current-user", "--keep-caps", "--mount", "sh", "-c", script, "sh"]);
        let keeper = command
            .args([size.as_str()])
            .args([path, &ready])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let mut this = Self { path: path.into(), keeper: Some(keeper) };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !this.host(&ready).exists() {
            let ended = this.keeper.as_mut().and_then(|keeper| keeper.try_wait().unwrap());
            if ended.is_some() || Instant::now() > deadline {
                return Err("this user may not mount in a namespace of its own".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        std::fs::remove_file(this.host(&ready)).unwrap();
        Ok(this)
    }

    /// Changes its size.
    pub fn resize(&self, mib: u32) {
        let options = format!("remount,size={mib}m");
        let mut command = Command::new("mount");
        command.args(["-o", &options]).arg(&self.path);
        done(&mut self.inside(command)).unwrap();
    }

    /// `command`, run where the file system is seen.
    pub fn inside(&self, command: Command) -> Command {
        let Some(keeper) = &self.keeper else { return command };
        let mut inside = Command::new("nsenter");
        inside.args(["-t", &keeper.id().to_string(), "--user", "--mount"]);
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
                let root = PathBuf::from(format!("/proc/{}/root", keeper.id()));
                root.join(path.strip_prefix("/").unwrap())
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        match &mut self.keeper {
            Some(keeper) => {
                let _ = keeper.kill();
                let _ = keeper.wait();
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
