//! What happens in a round: settings and timed faults, drawn from the seed and nothing else.
//!
//! # Invariants
//! Pure: the same seed, round and choice of kinds give the same plan on every machine. What a machine
//! cannot do (mount a file system) is in the plan all the same and is reported as not run.

use std::fmt;
use std::time::Duration;

use super::random::Random;

/// One kind of trouble.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// kill -9 of the sidecar, and a new one after a while.
    SidecarKill,
    /// SIGSTOP for less than the lease lives.
    SidecarStop,
    /// SIGSTOP for longer than the lease lives, every other time for a minute: it must notice and say so.
    SidecarFreeze,
    /// SIGTERM, and a new one after a while.
    SidecarTerm,
    /// A second sidecar while the first is at work: it must be refused, and say so.
    SecondSidecar,
    /// A second sidecar waits while the first is frozen, and takes over: the first must be fenced.
    Takeover,
    /// Postgres is stopped at once and started again.
    ServerImmediate,
    /// kill -9 of the postmaster, and a start.
    ServerCrash,
    /// kill -9 of one of its children: it restarts by itself.
    ServerChildKill,
    /// An orderly restart of Postgres.
    ServerRestart,
    /// The walsender is terminated, again and again.
    WalsenderKill,
    /// The primary dies, a standby is promoted, the old primary may come back for a while.
    Promote,
    /// The slot is dropped while the server still has the WAL: nothing may be missing.
    SlotDrop,
    /// The slot is dropped and the server removes WAL: the gap must show.
    SlotDropGap,
    /// The server gives the slot up because we are too far behind (`max_slot_wal_keep_size`).
    SlotLost,
    /// `pg_switch_wal` again and again.
    SwitchStorm,
    /// No room is left where `pg_wal` is; later there is.
    WalDiskFull,
    /// Connections to Postgres are cut, new ones too.
    NetServerCut,
    /// Connections to Postgres stay open and no byte passes.
    NetServerHole,
    /// A few kB a second from Postgres.
    NetServerSlow,
    /// Connections to Postgres are reset in the middle of a message.
    NetServerReset,
    /// Connections to S3 are cut, new ones too.
    NetStoreCut,
    /// Connections to S3 stay open and no byte passes.
    NetStoreHole,
    /// A few kB a second to S3.
    NetStoreSlow,
    /// Connections to S3 are reset in the middle of an upload.
    NetStoreReset,
    /// Bursts of 500 and 503.
    S3Errors,
    /// Nothing but 503 for longer than the lease lives: the sidecar must live through it.
    S3Outage,
    /// What was asked for is done, and answered by an error or a closed connection.
    S3LostReply,
    /// What was asked for is done, and never answered.
    S3HangAfter,
    /// 200 with an error as the body of CompleteMultipartUpload.
    S3CompleteError,
    /// A part of a multipart upload is confirmed and forgotten.
    S3LosePart,
    /// Listings take seconds.
    S3SlowList,
    /// The store's clock is set to twenty minutes from ours, and back: it refuses what we signed by ours.
    S3Skew,
    /// Credentials expire and come back.
    S3Expired,
    /// The bucket is gone and comes back.
    S3BucketGone,
    /// The disk is full during the restore; with more room the same command succeeds.
    RestoreDiskFull,
    /// The disk becomes read-only in the middle of the restore; when it can be written the same command
    /// succeeds.
    RestoreReadOnly,
}

impl Kind {
    /// All kinds with their names.
    pub const ALL: &'static [(Self, &'static str)] = &[
        (Self::SidecarKill, "sidecar-kill"),
        (Self::SidecarStop, "sidecar-stop"),
        (Self::SidecarFreeze, "sidecar-freeze"),
        (Self::SidecarTerm, "sidecar-term"),
        (Self::SecondSidecar, "second-sidecar"),
        (Self::Takeover, "takeover"),
        (Self::ServerImmediate, "server-immediate"),
        (Self::ServerCrash, "server-crash"),
        (Self::ServerChildKill, "server-child-kill"),
        (Self::ServerRestart, "server-restart"),
        (Self::WalsenderKill, "walsender-kill"),
        (Self::Promote, "promote"),
        (Self::SlotDrop, "slot-drop"),
        (Self::SlotDropGap, "slot-drop-gap"),
        (Self::SlotLost, "slot-lost"),
        (Self::SwitchStorm, "switch-storm"),
        (Self::WalDiskFull, "wal-disk-full"),
        (Self::NetServerCut, "net-server-cut"),
        (Self::NetServerHole, "net-server-hole"),
        (Self::NetServerSlow, "net-server-slow"),
        (Self::NetServerReset, "net-server-reset"),
        (Self::NetStoreCut, "net-store-cut"),
        (Self::NetStoreHole, "net-store-hole"),
        (Self::NetStoreSlow, "net-store-slow"),
        (Self::NetStoreReset, "net-store-reset"),
        (Self::S3Errors, "s3-errors"),
        (Self::S3Outage, "s3-outage"),
        (Self::S3LostReply, "s3-lost-reply"),
        (Self::S3HangAfter, "s3-hang-after"),
        (Self::S3CompleteError, "s3-complete-error"),
        (Self::S3LosePart, "s3-lose-part"),
        (Self::S3SlowList, "s3-slow-list"),
        (Self::S3Skew, "s3-skew"),
        (Self::S3Expired, "s3-expired"),
        (Self::S3BucketGone, "s3-bucket-gone"),
        (Self::RestoreDiskFull, "restore-disk-full"),
        (Self::RestoreReadOnly, "restore-read-only"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, _)| *kind == self).unwrap().1
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(kind, _)| *kind)
    }

    /// Whether the store cannot be used as it should.
    pub fn hits_store(self) -> bool {
        self.name().starts_with("s3-") || self.name().starts_with("net-store-")
    }

    /// Whether the store cannot be used, or not reached while the slot is being lost.
    pub fn keeps_store_away(self) -> bool {
        self.hits_store() || self == Self::SlotLost
    }

    /// Whether Postgres, or the way to it, is not as it should be.
    pub fn hits_server(self) -> bool {
        let name = self.name();
        ["server-", "net-server-", "slot-"].iter().any(|begin| name.starts_with(begin))
            || matches!(self, Self::Promote | Self::WalsenderKill | Self::WalDiskFull)
    }

    /// Whether the sidecar itself, or its right to write, is touched.
    pub fn hits_sidecar(self) -> bool {
        let name = self.name();
        name.starts_with("sidecar-") || matches!(self, Self::SecondSidecar | Self::Takeover)
    }

    /// Whether what it must show can be told only after the first backup.
    fn needs_calm(self) -> bool {
        self.hits_sidecar()
            || matches!(
                self,
                Self::Promote
                    | Self::SlotDrop
                    | Self::SlotDropGap
                    | Self::SlotLost
                    | Self::WalDiskFull
            )
    }

    /// Whether it happens during the restore, not before.
    pub fn is_at_restore(self) -> bool {
        matches!(self, Self::RestoreDiskFull | Self::RestoreReadOnly)
    }

    /// Whether two of them in one round would undo each other, or hide what each should show.
    fn excludes(self, other: Self) -> bool {
        const CHANGES_THE_SERVER: &[Kind] =
            &[Kind::Promote, Kind::SlotDrop, Kind::SlotDropGap, Kind::SlotLost, Kind::WalDiskFull];
        const HOLDS_THE_SIDECAR: &[Kind] =
            &[Kind::SidecarStop, Kind::SidecarFreeze, Kind::SecondSidecar, Kind::Takeover];
        const AIMS_AT_THE_SERVER: &[Kind] =
            &[Kind::NetServerCut, Kind::NetServerHole, Kind::NetServerSlow, Kind::NetServerReset];
        const AIMS_AT_THE_STORE: &[Kind] = &[
            Kind::NetStoreCut,
            Kind::NetStoreHole,
            Kind::NetStoreSlow,
            Kind::NetStoreReset,
            Kind::SlotLost,
        ];
        // One needs a backup every few seconds, the other none but the one that it asks for.
        const NEEDS_BACKUPS: &[Kind] = &[Kind::S3CompleteError, Kind::S3LosePart];
        const NEEDS_NO_BACKUP: &[Kind] = &[Kind::SlotDropGap, Kind::SlotLost];
        let both = |group: &[Kind]| group.contains(&self) && group.contains(&other);
        let apart = |one: Self, another: Self| {
            NEEDS_BACKUPS.contains(&one) && NEEDS_NO_BACKUP.contains(&another)
        };
        self == other
            || apart(self, other)
            || apart(other, self)
            || self.is_at_restore() && other.is_at_restore()
            || [CHANGES_THE_SERVER, HOLDS_THE_SIDECAR, AIMS_AT_THE_SERVER, AIMS_AT_THE_STORE]
                .iter()
                .any(|group| both(group))
    }
}

/// Trouble at its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// When it begins, counted from the end of the warm-up.
    pub at: Duration,
    /// How long it is kept up, or how long until what was taken away comes back.
    pub lasts: Duration,
    /// How much of it: bytes, bytes a second, parts of a million, or how often; the kind says which.
    pub strength: u64,
}

/// When a COMMIT counts as durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acknowledgement {
    /// Postgres waits for the sidecar: each COMMIT that returned.
    Synchronous,
    /// When the flush position that Postgres saw has passed it.
    ByFlushPosition,
}

/// How the sidecar ends before the repository is all that is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// SIGTERM: it stores what it received.
    Term,
    /// kill -9.
    Kill,
}

/// What names the earlier target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `--to-time`.
    Time,
    /// `--to-lsn`.
    Lsn,
}

/// How servers and sidecar are set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// When a COMMIT counts as durable.
    pub acknowledgement: Acknowledgement,
    /// Size of WAL segments.
    pub segment_mib: u32,
    /// Whether the repository is encrypted.
    pub encrypted: bool,
    /// `lease.ttl`.
    pub lease_ttl: Duration,
    /// `wal.flush_interval`.
    pub flush_interval: Duration,
    /// `run.backup_interval`.
    pub backup_interval: Duration,
    /// Whether the sidecar expires old backups all the time.
    pub upkeep: bool,
    /// Whether the faults begin before the first backup is complete.
    pub early: bool,
    /// Connections that write.
    pub writer_count: u32,
    /// Bytes of an ordinary row, in units of 32.
    pub row_units: u32,
    /// Longest pause of a writer between two commits.
    pub pause_ms_max: u64,
    /// How the sidecar ends.
    pub end: End,
    /// What names the earlier target.
    pub target: Target,
    /// Which of the moments that can be restored is the target, in thousandths of the way.
    pub target_permille: u64,
    /// Whether old backups are expired before the newest state is restored.
    pub expire: bool,
}

/// A whole round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The seed of all rounds.
    pub seed: u64,
    /// Which of them; counts from 0.
    pub round: u32,
    /// How servers and sidecar are set up.
    pub setup: Setup,
    /// What happens, in the order of time.
    pub faults: Vec<Fault>,
}

impl Plan {
    /// The plan of a round, with faults of these kinds only; all of them when there are none.
    ///
    /// The rounds of a seed go through the kinds in an order of their own, so that each comes up; the
    /// fault that joins it is drawn freely.
    pub fn draw(seed: u64, round: u32, only: &[Kind]) -> Self {
        let every: Vec<Kind> = Kind::ALL.iter().map(|(kind, _)| *kind).collect();
        let kinds = if only.is_empty() { &every } else { only };
        let order = Random::new(seed).shuffled(kinds);
        let mut random = Random::of_round(seed, round);
        let mut chosen = vec![order[round as usize % order.len()]];
        let wanted = random.one_of(&[1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 5, 7]);
        // A choice of kinds that exclude each other gives fewer.
        for _ in 0..30 {
            let kind = random.one_of(kinds);
            if chosen.len() < wanted && !chosen.iter().any(|other| kind.excludes(*other)) {
                chosen.push(kind);
            }
        }
        let setup = Self::setup(&mut random, &chosen);
        let together = random.percent(50);
        let mut faults: Vec<Fault> = Vec::new();
        for kind in chosen {
            let mut fault = Fault::draw(kind, &setup, &mut random);
            if let (true, Some(first)) = (together, faults.first()) {
                fault.at = first.at + fault.at / 8;
            }
            faults.push(fault);
        }
        faults.sort_by_key(|fault| fault.at);
        Self { seed, round, setup, faults }
    }

    fn setup(random: &mut Random, chosen: &[Kind]) -> Setup {
        let has = |kind| chosen.contains(&kind);
        let synchronous = random.percent(40);
        let mut setup = Setup {
            acknowledgement: match synchronous {
                true => Acknowledgement::Synchronous,
                false => Acknowledgement::ByFlushPosition,
            },
            segment_mib: random.one_of(&[16, 16, 16, 1, 1, 64]),
            encrypted: random.percent(70),
            lease_ttl: Duration::from_secs(random.one_of(&[10, 20, 40])),
            flush_interval: Duration::from_millis(random.one_of(&[200, 1000])),
            backup_interval: Duration::from_secs(random.one_of(&[7, 15, 40])),
            upkeep: random.percent(35),
            early: random.percent(25) && !chosen.iter().any(|kind| kind.needs_calm()),
            writer_count: random.within(2..=5) as u32,
            row_units: random.one_of(&[1, 10, 60]),
            pause_ms_max: random.one_of(&[0, 4, 4, 15, 15, 40]),
            end: random.one_of(&[End::Term, End::Kill]),
            target: random.one_of(&[Target::Time, Target::Lsn]),
            target_permille: random.within(0..=1000),
            expire: random.percent(50),
        };
        if has(Kind::SidecarFreeze) || has(Kind::Takeover) || has(Kind::S3Outage) {
            setup.lease_ttl = Duration::from_secs(10);
        }
        if has(Kind::SidecarStop) {
            setup.lease_ttl = Duration::from_secs(40);
        }
        if has(Kind::S3CompleteError) || has(Kind::S3LosePart) {
            setup.backup_interval = Duration::from_secs(4);
        }
        if has(Kind::S3SlowList) {
            // Nothing else lists again and again.
            setup.upkeep = true;
        }
        if has(Kind::SlotDropGap) || has(Kind::SlotLost) {
            // Nothing but the gap itself asks for the backup that must follow it.
            setup.backup_interval = Duration::from_secs(3600);
            setup.segment_mib = setup.segment_mib.min(16);
            setup.upkeep = false;
        }
        if has(Kind::WalDiskFull) {
            setup.segment_mib = setup.segment_mib.min(16);
        }
        setup
    }

    /// Whether a fault of this kind is in it.
    pub fn has(&self, kind: Kind) -> bool {
        self.faults.iter().any(|fault| fault.kind == kind)
    }

    /// Whether a fault is in it of which this is true.
    pub fn any(&self, test: impl Fn(Kind) -> bool) -> bool {
        self.faults.iter().any(|fault| test(fault.kind))
    }

    /// The command that does this round again; the choice of kinds is part of what is drawn from.
    pub fn replay(&self, only: &[Kind]) -> String {
        let names: Vec<&str> = only.iter().map(|kind| kind.name()).collect();
        let faults = match names.as_slice() {
            [] => String::new(),
            names => format!(" --faults {}", names.join(",")),
        };
        format!("tools/chaos --seed {} --round {}{faults}", self.seed, self.round)
    }
}

impl Fault {
    fn draw(kind: Kind, setup: &Setup, random: &mut Random) -> Self {
        use Kind::*;
        let ms =
            |random: &mut Random, from, until| Duration::from_millis(random.within(from..=until));
        let at = ms(random, 300, 3500);
        let (lasts, strength) = match kind {
            SidecarKill | SidecarTerm => (ms(random, 0, 3000), 0),
            SidecarStop => (ms(random, 500, 6000), 0),
            SidecarFreeze => {
                let long = random.percent(50);
                let short = setup.lease_ttl + ms(random, 500, 4000);
                (if long { Duration::from_secs(60) } else { short }, 0)
            }
            SecondSidecar => (ms(random, 2000, 4000), 0),
            Takeover => (setup.lease_ttl, 0),
            ServerImmediate | ServerCrash | ServerRestart => (ms(random, 0, 3000), 0),
            ServerChildKill => (Duration::ZERO, random.within(0..=2)),
            WalsenderKill => (ms(random, 200, 2500), random.within(1..=6)),
            // The strength says for how long (ms) the standby has heard of nothing.
            Promote => {
                (Duration::from_millis(random.one_of(&[0, 2500])), random.one_of(&[0, 0, 800]))
            }
            SlotDrop => (Duration::ZERO, 0),
            // An odd strength kills the sidecar once more when the gap was found.
            SlotDropGap => (ms(random, 0, 500), random.within(0..=1)),
            SlotLost => (ms(random, 0, 2000), 0),
            SwitchStorm => (ms(random, 1000, 4000), random.within(5..=25)),
            WalDiskFull => (ms(random, 500, 3000), 0),
            NetServerCut | NetStoreCut => (ms(random, 300, 5000), 0),
            NetServerHole | NetStoreHole => (ms(random, 1000, 9000), 0),
            NetServerSlow | NetStoreSlow => (ms(random, 2000, 6000), random.within(2000..=60_000)),
            NetServerReset => (ms(random, 1000, 4000), random.within(500..=200_000)),
            // Between two backups a connection carries little.
            NetStoreReset => {
                (ms(random, 1000, 5000), random.one_of(&[300, 5000, 60_000, 600_000, 3_000_000]))
            }
            S3Errors | S3LostReply => {
                (ms(random, 1500, 6000), random.one_of(&[150_000, 500_000, 900_000]))
            }
            S3Outage => (setup.lease_ttl + ms(random, 500, 8000), 0),
            S3HangAfter => (ms(random, 1500, 5000), random.one_of(&[150_000, 500_000])),
            S3CompleteError | S3LosePart => (ms(random, 6000, 9000), 700_000),
            S3SlowList => (ms(random, 3000, 7000), random.within(500..=4000)),
            // An odd strength sets the store's clock behind ours, an even one ahead.
            S3Skew => (ms(random, 1000, 5000), random.within(0..=1)),
            S3Expired | S3BucketGone => (ms(random, 1000, 5000), 0),
            RestoreDiskFull | RestoreReadOnly => (Duration::ZERO, 0),
        };
        Self { kind, at, lasts, strength }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, at, lasts, strength } = self;
        write!(f, "at {:.1} s {}", at.as_secs_f64(), kind.name())?;
        if !lasts.is_zero() {
            write!(f, " for {:.1} s", lasts.as_secs_f64())?;
        }
        if *strength > 0 {
            write!(f, " ({strength})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Setup { acknowledgement, segment_mib, end, target, .. } = &self.setup;
        let faults: Vec<String> = self.faults.iter().map(ToString::to_string).collect();
        let early = if self.setup.early { ", no backup yet" } else { "" };
        write!(
            f,
            "seed {} round {}: {acknowledgement:?}, {segment_mib} MiB segments{early}, ends by \
             {end:?}, earlier target by {target:?}; {}",
            self.seed,
            self.round,
            faults.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_plan_is_a_function_of_seed_round_and_kinds() {
        for round in 0..50 {
            assert_eq!(Plan::draw(7, round, &[]), Plan::draw(7, round, &[]));
            assert_ne!(Plan::draw(7, round, &[]), Plan::draw(8, round, &[]));
        }
    }

    #[test]
    fn every_kind_comes_up_once_in_as_many_rounds_as_there_are_kinds() {
        let rounds = Kind::ALL.len() as u32;
        let seen: BTreeSet<Kind> = (0..rounds)
            .flat_map(|round| Plan::draw(99, round, &[]).faults)
            .map(|fault| fault.kind)
            .collect();
        assert_eq!(seen.len(), Kind::ALL.len());
    }

    #[test]
    fn many_rounds_have_faults_that_overlap_and_none_has_faults_that_exclude_each_other() {
        let plans: Vec<Plan> = (0..300).map(|round| Plan::draw(5, round, &[])).collect();
        let overlapping = plans.iter().filter(|plan| {
            plan.faults.windows(2).any(|pair| pair[1].at < pair[0].at + pair[0].lasts)
        });
        assert!(overlapping.count() > 60);
        for plan in &plans {
            for (index, fault) in plan.faults.iter().enumerate() {
                let others = plan.faults.iter().skip(index + 1);
                assert!(others.clone().all(|other| !fault.kind.excludes(other.kind)), "{plan}");
            }
        }
    }

    #[test]
    fn only_the_kinds_that_were_asked_for_are_drawn() {
        let only = [Kind::Promote, Kind::S3Skew];
        for round in 0..20 {
            assert!(!Plan::draw(1, round, &only).any(|kind| !only.contains(&kind)));
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for (kind, name) in Kind::ALL {
            assert_eq!(Kind::named(name), Some(*kind));
        }
        let replay = Plan::draw(3, 4, &[]).replay(&[Kind::Promote]);
        assert_eq!(replay, "tools/chaos --seed 3 --round 4 --faults promote");
    }
}
