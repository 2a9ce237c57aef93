//! Who a lease's holder is, as far as another process can find out whether it is dead.
//!
//! Only a process on the same machine, since the same boot, in the same process namespace can be
//! looked up; of any other we know nothing, which is the safe answer.
//!
//! # Source
//! proc(5): `/proc/<pid>/stat` field 3 (state) and 22 (start time in ticks since boot),
//! `/proc/sys/kernel/random/boot_id`; pid_namespaces(7).

use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

/// A process, told from every other of its machine since boot by its start time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Name of the machine or container.
    pub host: String,
    /// Kernel's random identifier of this boot; empty where unknown.
    #[serde(default)]
    pub boot_id: String,
    /// The process namespace as the kernel names it, `pid:[4026531836]`; empty where unknown.
    #[serde(default)]
    pub pid_namespace: String,
    /// Process identifier inside that namespace.
    pub pid: u32,
    /// Ticks from boot to the start of the process; 0 where unknown.
    #[serde(default)]
    pub start_ticks: u64,
}

/// What could be found out about another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// It is this very process.
    Ourselves,
    /// It has certainly ended.
    Dead,
    /// It lives, or nothing is known.
    MayLive,
}

impl ProcessIdentity {
    /// This process. What the machine does not tell stays empty, and then nobody takes over early.
    #[must_use]
    pub fn current() -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let pid = std::process::id();
        Self {
            host: line("/proc/sys/kernel/hostname"),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            pid_namespace: fs::read_link("/proc/self/ns/pid")
                .map(|link| link.to_string_lossy().into_owned())
                .unwrap_or_default(),
            pid,
            start_ticks: stat_of(pid).map_or(0, |stat| stat.start_ticks),
        }
    }

    /// Whether `other` may be what ran in this very container before it was restarted: its name and
    /// the boot are the same, and it was in another process namespace, into which we cannot look.
    pub(super) fn may_follow(&self, other: &ProcessIdentity) -> bool {
        let both = |ours: &str, theirs: &str| !ours.is_empty() && !theirs.is_empty();
        both(&self.host, &other.host)
            && both(&self.boot_id, &other.boot_id)
            && both(&self.pid_namespace, &other.pid_namespace)
            && (&self.host, &self.boot_id) == (&other.host, &other.boot_id)
            && self.pid_namespace != other.pid_namespace
    }

    /// What is known, from the process `self`, about `other`.
    pub(super) fn look_up(&self, other: &ProcessIdentity) -> Life {
        let known = |ours: &str, theirs: &str| !ours.is_empty() && ours == theirs;
        let visible = known(&self.host, &other.host)
            && known(&self.boot_id, &other.boot_id)
            && known(&self.pid_namespace, &other.pid_namespace)
            && other.start_ticks != 0;
        if !visible {
            return Life::MayLive;
        }
        if self.pid == other.pid && self.start_ticks == other.start_ticks {
            return Life::Ourselves;
        }
        // A signal of number 0 tells whether the process exists even where /proc hides those of
        // other users (hidepid).
        let pid = i32::try_from(other.pid).ok().and_then(rustix::process::Pid::from_raw);
        let Some(pid) = pid else { return Life::MayLive };
        if rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            return Life::Dead;
        }
        match stat_of(other.pid) {
            Some(stat) if stat.start_ticks != other.start_ticks => Life::Dead,
            Some(stat) if stat.is_zombie && thread_count(other.pid) <= 1 => Life::Dead,
            _ => Life::MayLive,
        }
    }
}

impl fmt::Display for ProcessIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} on '{}'", self.pid, self.host)
    }
}

struct Stat {
    is_zombie: bool,
    start_ticks: u64,
}

fn stat_of(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The command name in field 2 may hold blanks and brackets, so fields count from the last bracket.
fn parse_stat(line: &str) -> Option<Stat> {
    let (_, rest) = line.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let is_zombie = matches!(fields.next()?, "Z" | "X");
    // The state was field 3; the start time is field 22.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { is_zombie, start_ticks })
}

/// Threads of the process; many where it cannot be told, for a zombie leader may have living ones.
fn thread_count(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).map_or(usize::MAX, Iterator::count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_command_name() {
        let line = "42 (a) R (b) S 1 42 42 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 98765 1 1";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.start_ticks, stat.is_zombie), (98765, false));
        assert!(parse_stat("42 (cut").is_none());
    }

    #[test]
    fn only_another_namespace_of_this_machine_and_boot_may_be_ours_before_a_restart() {
        let me = ProcessIdentity {
            host: "pod".into(),
            boot_id: "boot".into(),
            pid_namespace: "pid:[2]".into(),
            pid: 1,
            start_ticks: 9,
        };
        let before = ProcessIdentity { pid_namespace: "pid:[1]".into(), ..me.clone() };
        assert!(me.may_follow(&before));
        for other in [
            me.clone(),
            ProcessIdentity { host: "other".into(), ..before.clone() },
            ProcessIdentity { boot_id: "other".into(), ..before.clone() },
            ProcessIdentity { boot_id: String::new(), ..before.clone() },
            ProcessIdentity { pid_namespace: String::new(), ..before.clone() },
            ProcessIdentity::default(),
        ] {
            assert!(!me.may_follow(&other), "{other:?}");
        }
        assert!(!ProcessIdentity::default().may_follow(&ProcessIdentity::default()));
    }

    #[test]
    fn only_a_process_that_certainly_ended_is_dead() {
        let me = ProcessIdentity::current();
        assert_eq!(me.look_up(&me), Life::Ourselves);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let ticks = stat_of(child.id()).unwrap().start_ticks;
        let other = ProcessIdentity { pid: child.id(), start_ticks: ticks, ..me.clone() };
        assert_eq!(me.look_up(&other), Life::MayLive);
        let reused = ProcessIdentity { start_ticks: ticks - 1, ..other.clone() };
        assert_eq!(me.look_up(&reused), Life::Dead, "the number belongs to another process now");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(me.look_up(&other), Life::Dead);
        for elsewhere in [
            ProcessIdentity { host: "other".into(), ..other.clone() },
            ProcessIdentity { boot_id: "other".into(), ..other.clone() },
            ProcessIdentity { pid_namespace: "pid:[1]".into(), ..other.clone() },
            ProcessIdentity { start_ticks: 0, ..other.clone() },
        ] {
            assert_eq!(me.look_up(&elsewhere), Life::MayLive, "{elsewhere:?}");
        }
    }
}
