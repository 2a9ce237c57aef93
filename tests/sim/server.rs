//! A PostgreSQL server that exists in memory: walsenders, a slot, WAL that is removed, crashes,
//! promotions. It stands behind the seam of the product (`capture::stream::upstream`), so the engine
//! runs as it is and no protocol is spoken.
//!
//! # Source
//! `walsender.c`, `slot.c`, `xlog.c` of PostgreSQL 15: one walsender a slot, `restart_lsn` follows the
//! flush position told, WAL goes by whole segments at checkpoints, an idle connection ends after
//! `wal_sender_timeout`, a keepalive carries the position *sent*, not the end of the WAL.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use tidemark::capture::stream::relief::SlotMove;
use tidemark::capture::stream::upstream::{Sending, Upstream, Walsender};
use tidemark::capture::stream::watch::Observation;
use tidemark::capture::stream::{DEFAULT_NAME, SlotHealth};
use tidemark::clock::Clock;
use tidemark::error::{Error, Kind, Result};
use tidemark::pg::{Lsn, PgTime, SegmentSize, SystemId, TimelineId};
use tidemark::wire::{Session, Slot, SlotLife, StandbyStatus, SystemIdentification, WalEvent};
use tokio::sync::Notify;

use crate::dice::Dice;
use crate::model::{Backup, Damage, Line, ORIGIN, SEGMENT, SYSTEM_ID};

/// A walsender ends a connection that is silent for so long.
const SENDER_TIMEOUT: SignedDuration = SignedDuration::from_secs(60);
/// Most bytes of one message.
const MESSAGE_BYTES_MAX: u64 = 128 << 10;
/// How long a connection takes.
const CONNECT_TIME: Duration = Duration::from_millis(7);
/// A keepalive comes when nothing else came for so long.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(20);

/// A flush position that was told.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    pub process: usize,
    /// The timeline of the connection, by index.
    pub line: usize,
    pub position: u64,
    /// Where the slot was before.
    pub before: u64,
}

/// Who answers next, once WAL that was asked for is gone: another host of the connection string.
#[derive(Clone, Copy, Debug)]
pub enum Elsewhere {
    /// The first primary, which came up again and knows nothing of a promotion.
    OldPrimary,
    /// One that keeps what its slot says.
    Sound { slot: u64, kept_from: u64 },
}

#[derive(Debug)]
struct Conn {
    id: u64,
    heard: Timestamp,
}

/// What the server is and has.
#[derive(Debug)]
pub struct State {
    pub lines: Vec<Line>,
    /// The timeline it writes, by index.
    pub current: usize,
    pub up: bool,
    /// Where our slot is.
    pub slot: Option<u64>,
    /// Where it was when it was made.
    pub slot_made: Option<u64>,
    /// A temporary slot: whose, its name, and where it is.
    passing: Option<(u64, String, u64)>,
    slot_user: Option<u64>,
    /// First position whose WAL is still on disk.
    pub kept_from: u64,
    /// Where recovery from the newest checkpoint would begin.
    pub redo: u64,
    pub synchronous: bool,
    /// An answer it owes goes out before the next WAL.
    pub answers_first: bool,
    /// It is a standby that has WAL up to here, and is promoted as soon as it has said so.
    pub standby_end: Option<u64>,
    /// It is a standby that has received WAL up to here, perhaps in the middle of a record.
    received_end: Option<u64>,
    /// It is promoted, and has its connections still, when it is asked for WAL next.
    pub promoted_at_start: bool,
    /// What happens when WAL that was asked for is gone.
    pub elsewhere: Option<Elsewhere>,
    /// The next connection is one to the old primary.
    old_primary_answers: bool,
    /// How often the old primary was told a flush position.
    pub old_primary_acks: usize,
    /// What the catalog says of our slot comes from a host on which nobody streams by it.
    pub catalog_elsewhere: bool,
    /// Rises with each crash: what began before is gone.
    pub generation: u64,
    conns: Vec<Conn>,
    last_conn: u64,
    pub acks: Vec<Ack>,
    dice: Dice,
    last_xid: u32,
    last_time: i64,
    pub backups: Vec<Backup>,
}

/// A handle on the server.
#[derive(Clone, Debug)]
pub struct Server {
    state: Arc<Mutex<State>>,
    news: Arc<Notify>,
}

impl Server {
    pub fn new(dice: &mut Dice, now: Timestamp) -> Self {
        let magic = dice.pick(&[0xD106, 0xD10D, 0xD110, 0xD113]);
        let state = State {
            lines: vec![Line::first(magic)],
            current: 0,
            up: true,
            slot: None,
            slot_made: None,
            passing: None,
            slot_user: None,
            kept_from: ORIGIN,
            redo: ORIGIN,
            synchronous: dice.chance(200),
            answers_first: false,
            standby_end: None,
            received_end: None,
            promoted_at_start: false,
            elsewhere: None,
            old_primary_answers: false,
            old_primary_acks: 0,
            catalog_elsewhere: false,
            generation: 0,
            conns: Vec::new(),
            last_conn: 0,
            acks: Vec::new(),
            dice: dice.fork(),
            last_xid: 700,
            last_time: 0,
            backups: Vec::new(),
        };
        let server = Self { state: Arc::new(Mutex::new(state)), news: Arc::default() };
        server.checkpoint(now);
        server
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let out = change(&mut self.state());
        self.news.notify_waiters();
        out
    }

    /// Transactions of about `bytes` in all.
    pub fn work(&self, bytes: u64, now: Timestamp) {
        self.change(|state| {
            if !state.up {
                return;
            }
            let target = state.line().end() + bytes;
            while state.line().end() < target {
                let salt = state.dice.next();
                let size = match state.dice.below(10) {
                    0 => state.dice.below(60_000),
                    1..4 => state.dice.below(4000),
                    _ => state.dice.below(300),
                };
                let (time, xid) = (state.time(now), state.last_xid + 1);
                state.last_xid = xid;
                let commit = !state.dice.chance(100);
                let line = state.line_mut();
                line.filler(size as usize, salt);
                line.ending(xid, time, commit);
            }
        });
    }

    /// Records that nobody waits for.
    pub fn idle_work(&self) {
        self.change(|state| {
            let (size, salt) = (state.dice.below(500), state.dice.next());
            if state.up {
                state.line_mut().filler(size as usize, salt);
            }
        });
    }

    pub fn restore_point(&self, now: Timestamp) {
        self.change(|state| {
            let time = state.time(now);
            let name = format!("point {}", state.dice.next());
            if state.up {
                state.line_mut().restore_point(name, time);
            }
        });
    }

    pub fn switch(&self) {
        self.change(|state| {
            if state.up {
                state.line_mut().switch();
            }
        });
    }

    /// A checkpoint, and what it removes: all WAL that neither the slot nor recovery needs.
    pub fn checkpoint(&self, now: Timestamp) {
        self.change(|state| {
            if !state.up {
                return;
            }
            let time = state.time(now);
            let redo = state.line().end();
            state.line_mut().filler(40, 1);
            state.redo = state.line().records.iter().find(|(_, end)| *end > redo).unwrap().0;
            let redo = state.redo;
            state.line_mut().checkpoint(Some(redo), time);
            let passing = state.passing.as_ref().map_or(redo, |(_, _, at)| *at);
            let needed = state.slot.unwrap_or(redo).min(redo).min(passing);
            state.kept_from = state.kept_from.max(needed / SEGMENT * SEGMENT);
        });
    }

    /// Ends all connections, as a broken network does.
    pub fn break_connections(&self) {
        self.change(State::disconnect);
    }

    pub fn crash(&self) {
        self.change(|state| {
            state.disconnect();
            state.up = false;
            state.generation += 1;
        });
    }

    pub fn start(&self, now: Timestamp) {
        let was_down = self.change(|state| !std::mem::replace(&mut state.up, true));
        if was_down {
            self.change(|state| {
                let time = state.time(now);
                state.line_mut().checkpoint(None, time);
            });
        }
    }

    /// Loses the slot, as an administrator's mistake does.
    pub fn drop_slot(&self) {
        self.change(|state| {
            state.disconnect();
            state.slot = None;
        });
    }

    /// The server runs with `wal_level = minimal` for a while, which no slot outlives, and keeps its WAL.
    pub fn minimal(&self, now: Timestamp) {
        self.change(|state| {
            state.disconnect();
            state.slot = None;
            state.up = true;
            state.generation += 1;
            for wal_level in [0, 1] {
                let time = state.time(now);
                state.redo = state.line_mut().checkpoint(None, time);
                state.line_mut().parameter_change(wal_level);
                let (size, salt) = (state.dice.below(20_000), state.dice.next());
                state.line_mut().filler(size as usize, salt);
            }
        });
    }

    /// The server's disk damages WAL that nobody has read yet.
    pub fn damage(&self, how: Damage) {
        self.change(|state| state.line_mut().damaged(how));
    }

    /// The server has fetched anew what was damaged by one bit.
    pub fn heal(&self) {
        self.change(|state| state.line_mut().heal());
    }

    /// A standby that has received `all` or all but the last of the WAL is promoted and takes the
    /// place of this server. One that has all of it may be the one we stream from: its connections
    /// last.
    pub fn promote(&self, lost_records: usize, seamless: bool, now: Timestamp) {
        self.change(|state| {
            let line = state.line();
            let begin = line.ancestors.last().map_or(ORIGIN, |(_, at)| *at);
            let last = line.records.len().saturating_sub(1 + lost_records);
            // Never before its own beginning or before what was checkpointed.
            let at = line.records[last].1.max(begin).max(line.boundary_before(state.redo));
            let at = if seamless { line.end() } else { at };
            // A standby stops at damaged WAL: here it had that before.
            let inside = line.barriers.iter().find(|it| it.at < at && at < it.until);
            let at = inside.map_or(at, |barrier| barrier.until);
            state.fork(at, now);
            if !seamless {
                state.disconnect();
                // Physical slots are not copied to a standby.
                state.slot = None;
                state.slot_made = None;
                state.redo = state.redo.min(at);
            }
        });
    }

    /// From now on it is a standby that has received WAL up to `end`.
    pub fn receive(&self, end: u64) {
        self.change(|state| state.received_end = Some(end));
    }

    /// Begins a base backup; gives where, and the timeline by index.
    pub fn begin_backup(&self, now: Timestamp) -> Result<(u64, usize, u64)> {
        self.checkpoint(now);
        let state = self.state();
        if !state.up {
            return Err(gone("the server is down"));
        }
        Ok((state.redo, state.current, state.generation))
    }

    /// Ends a base backup; gives where.
    pub fn end_backup(&self, start: u64, generation: u64) -> Result<u64> {
        self.change(|state| {
            if !state.up || state.generation != generation {
                return Err(gone("the server went away during the backup"));
            }
            let end = state.line_mut().backup_end(start);
            state.line_mut().switch();
            Ok(end)
        })
    }

    /// Ends connections that were silent for too long.
    pub fn tick(&self, now: Timestamp) {
        let mut state = self.state();
        let before = state.conns.len();
        state.conns.retain(|conn| now.duration_since(conn.heard) < SENDER_TIMEOUT);
        let changed = state.conns.len() != before;
        drop(state);
        if changed {
            self.news.notify_waiters();
        }
    }
}

impl State {
    pub fn line(&self) -> &Line {
        &self.lines[self.current]
    }

    fn line_mut(&mut self) -> &mut Line {
        let current = self.current;
        &mut self.lines[current]
    }

    /// The time of a record, after that of every earlier one.
    fn time(&mut self, now: Timestamp) -> i64 {
        self.last_time = now.as_microsecond().max(self.last_time + 1);
        self.last_time
    }

    /// First position that it does not have.
    fn end(&self) -> u64 {
        self.received_end.unwrap_or(self.line().end())
    }

    /// Begins a timeline at `at`, the end of a record.
    fn fork(&mut self, at: u64, now: Timestamp) {
        let number = self.lines.iter().map(|line| line.number).max().unwrap_or(1) + 1;
        let (previous, mut line) = (self.line().number, self.line().fork(number, at));
        let time = self.time(now);
        line.end_of_recovery(previous, time);
        self.lines.push(line);
        self.current = self.lines.len() - 1;
        self.up = true;
        self.generation += 1;
    }

    /// A standby is promoted: what it has of a record that it has not received to its end is no part of
    /// the new timeline.
    fn promote_at_start(&mut self, now: Timestamp) {
        if std::mem::take(&mut self.promoted_at_start) {
            let at = self.line().boundary_before(self.end());
            self.received_end = None;
            self.fork(at, now);
        }
    }

    /// WAL that was asked for is gone; another host may answer next.
    fn removed(&mut self, position: u64) -> Error {
        match self.elsewhere.take() {
            Some(Elsewhere::OldPrimary) => self.old_primary_answers = true,
            Some(Elsewhere::Sound { slot, kept_from }) => {
                (self.slot, self.kept_from) = (Some(slot), kept_from);
            }
            None => {}
        }
        removed(position)
    }

    fn disconnect(&mut self) {
        self.conns.clear();
        self.slot_user = None;
        self.passing = None;
    }

    fn conn(&mut self, id: u64) -> Result<&mut Conn> {
        let found = self.conns.iter_mut().find(|conn| conn.id == id);
        found.ok_or_else(|| gone("the connection broke"))
    }

    fn is_slot_used(&self) -> bool {
        self.slot_user.is_some_and(|user| self.is_connected(user))
    }

    fn is_connected(&self, id: u64) -> bool {
        self.conns.iter().any(|conn| conn.id == id)
    }
}

fn gone(message: &str) -> Error {
    Error::new(Kind::Unavailable, format!("simulated server: {message}"))
}

fn removed(position: u64) -> Error {
    let position = Lsn(position);
    Error::new(Kind::NotFound, format!("simulated server: WAL at {position} was removed"))
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

/// How one process reaches the server.
#[derive(Debug)]
pub struct Dial {
    pub server: Server,
    pub process: usize,
}

#[async_trait]
impl Upstream for Dial {
    async fn connect(&self, session: Session, clock: &Clock) -> Result<Box<dyn Walsender>> {
        tokio::time::sleep(CONNECT_TIME).await;
        let mut state = self.server.state();
        if !state.up {
            return Err(gone("it is down"));
        }
        state.last_conn += 1;
        let id = state.last_conn;
        if session == Session::Physical {
            state.conns.push(Conn { id, heard: clock.now() });
        }
        let is_old = session == Session::Physical && std::mem::take(&mut state.old_primary_answers);
        let (server, clock, process) = (self.server.clone(), clock.clone(), self.process);
        Ok(Box::new(Connected { server, clock, process, id, is_old }))
    }
}

/// A connection.
#[derive(Debug)]
struct Connected {
    server: Server,
    clock: Clock,
    process: usize,
    id: u64,
    /// It leads to the old primary.
    is_old: bool,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.server.state();
        state.conns.retain(|conn| conn.id != self.id);
        state.slot_user = state.slot_user.filter(|user| *user != self.id);
        state.passing = state.passing.take().filter(|(user, _, _)| *user != self.id);
    }
}

impl Connected {
    fn alive(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.server.state();
        let now = self.clock.now();
        state.conn(self.id)?.heard = now;
        Ok(state)
    }

    /// The timeline that it leads to, by index.
    fn line(&self, state: &State) -> usize {
        if self.is_old { 0 } else { state.current }
    }
}

#[async_trait]
impl Walsender for Connected {
    async fn identify_system(&mut self) -> Result<SystemIdentification> {
        let (number, end, is_standby) = {
            let mut state = self.alive()?;
            let standby_end = state.standby_end.take();
            let line = &state.lines[self.line(&state)];
            let end = if self.is_old { line.end() } else { state.end() };
            (line.number, standby_end.unwrap_or(end), standby_end.is_some())
        };
        if is_standby {
            self.server.promote(0, true, self.clock.now());
        }
        Ok(SystemIdentification {
            system_id: SystemId(SYSTEM_ID),
            timeline: timeline(number),
            flushed_end_lsn: Lsn(end),
        })
    }

    async fn segment_size(&mut self) -> Result<SegmentSize> {
        Ok(SegmentSize::new(SEGMENT as u32).unwrap())
    }

    async fn show(&mut self, name: &str) -> Result<String> {
        Ok(match name {
            "wal_sender_timeout" => "1min".to_owned(),
            "wal_block_size" => "8192".to_owned(),
            "synchronous_standby_names" if self.alive()?.synchronous => "tidemark".to_owned(),
            _ => String::new(),
        })
    }

    fn parameter(&self, name: &str) -> Option<&str> {
        match name {
            "application_name" => Some("tidemark"),
            "in_hot_standby" => {
                let state = self.server.state();
                let is_standby = state.standby_end.is_some() || state.received_end.is_some();
                Some(if is_standby { "on" } else { "off" })
            }
            _ => None,
        }
    }

    async fn read_slot(&mut self, name: &str) -> Result<Option<Slot>> {
        let state = self.alive()?;
        let passing = state.passing.as_ref().filter(|(_, its, _)| its == name);
        let slot = match name {
            DEFAULT_NAME => state.slot,
            _ => passing.map(|(_, _, at)| *at),
        };
        Ok(slot.map(|at| Slot { restart_lsn: Some(Lsn(at)), restart_timeline: None }))
    }

    async fn create_slot(&mut self, name: &str, life: SlotLife) -> Result<()> {
        let id = self.id;
        let mut state = self.alive()?;
        if life == SlotLife::Temporary {
            let at = state.redo.max(state.kept_from);
            state.passing = Some((id, name.to_owned(), at));
            return Ok(());
        }
        if state.slot.is_some() {
            return Err(Error::new(Kind::Conflict, "simulated server: the slot exists"));
        }
        state.slot = Some(state.redo.max(state.kept_from));
        state.slot_made = state.slot;
        Ok(())
    }

    async fn drop_slot(&mut self, _name: &str) -> Result<()> {
        self.alive()?.slot = None;
        Ok(())
    }

    async fn timeline_history(&mut self, wanted: TimelineId) -> Result<(String, Bytes)> {
        let state = self.alive()?;
        let line = state.lines.iter().find(|line| line.number == wanted.get());
        let text = line.and_then(Line::history);
        let text =
            text.ok_or_else(|| Error::new(Kind::NotFound, "simulated server: no history"))?;
        Ok((wanted.history_file_name(), Bytes::from(text)))
    }

    async fn observe(&mut self, _name: &str) -> Result<Observation> {
        let state = self.server.state();
        if !state.up {
            return Err(gone("it is down"));
        }
        let wal_status = if state.catalog_elsewhere { "lost" } else { "reserved" };
        Ok(Observation {
            server_end_lsn: Lsn(state.end()),
            slot: SlotHealth { wal_status: Some(wal_status.to_owned()), ..SlotHealth::default() },
            slot_restart_lsn: state.slot.map(Lsn),
            slot_in_use: Some(state.is_slot_used() && !state.catalog_elsewhere),
            ..Observation::default()
        })
    }

    async fn move_slot(&mut self, _name: &str, way: SlotMove, system_id: SystemId) -> Result<bool> {
        let mut state = self.server.state();
        if !state.up {
            return Err(gone("it is down"));
        }
        if state.slot != Some(way.from.0) || state.is_slot_used() || system_id.0 != SYSTEM_ID {
            return Ok(false);
        }
        state.slot = Some(way.to.0);
        Ok(true)
    }

    async fn start_replication(
        self: Box<Self>,
        slot: Option<&str>,
        start: Lsn,
        wanted: TimelineId,
    ) -> Result<Box<dyn Sending>> {
        let id = self.id;
        {
            let mut state = self.alive()?;
            state.promote_at_start(self.clock.now());
            // The old primary has a slot of the name as well.
            let passing = slot != Some(DEFAULT_NAME) || self.is_old;
            if state.slot.is_none() && !passing {
                return Err(Error::new(Kind::NotFound, "simulated server: no such slot"));
            }
            let is_own = |(owner, own, _): &(_, String, _)| *owner == id && Some(&**own) == slot;
            if slot.is_some_and(|name| name != DEFAULT_NAME)
                && !self.is_old
                && !state.passing.iter().any(is_own)
            {
                let message = "simulated server: no such temporary slot on this connection";
                return Err(Error::new(Kind::NotFound, message));
            }
            let user = state.slot_user;
            if !passing && user.is_some_and(|user| user != id && state.is_connected(user)) {
                return Err(Error::new(Kind::Conflict, "simulated server: the slot is in use"));
            }
            if !passing {
                state.slot_user = Some(id);
            }
            let line = &state.lines[self.line(&state)];
            let part = line.parts().into_iter().find(|part| part.0 == wanted.get());
            let Some((_, _, part_end)) = part else {
                return Err(Error::new(Kind::Conflict, "simulated server: not in its history"));
            };
            if start.0 > part_end || start.0 > line.end() {
                let message = format!("simulated server: {start} is ahead of timeline {wanted}");
                return Err(Error::new(Kind::Conflict, message));
            }
        }
        let (number, position) = (wanted.get(), start.0);
        let due = self.clock.instant() + KEEPALIVE_AFTER;
        Ok(Box::new(Running { inner: *self, number, position, ended: false, due }))
    }

    async fn close(self: Box<Self>) {}
}

/// A stream.
#[derive(Debug)]
struct Running {
    inner: Connected,
    /// The timeline that is sent.
    number: u32,
    position: u64,
    ended: bool,
    /// When it says something though there is nothing to say.
    due: tidemark::clock::Instant,
}

impl Running {
    /// What can be said now; `None` to wait.
    fn say(&mut self) -> Result<Option<WalEvent>> {
        let now = PgTime::from_timestamp(self.inner.clock.now());
        let mut state = self.inner.server.state();
        let state = &mut *state;
        state.conn(self.inner.id)?;
        if self.position < state.kept_from && !self.inner.is_old {
            return Err(state.removed(self.position));
        }
        // A server that was promoted goes on with the timeline it was on for as far as that goes.
        let line = &state.lines[self.inner.line(state)];
        let mut parts = line.parts().into_iter().skip_while(|part| part.0 != self.number);
        let Some((_, _, part_end)) = parts.next() else { return Err(gone("another history")) };
        let end = if self.inner.is_old { line.end() } else { state.end() };
        let limit = end.min(part_end);
        if self.position < limit {
            // A reply that the server owes goes out before WAL it has not looked at yet.
            if std::mem::take(&mut state.answers_first) || state.dice.chance(5) {
                return Ok(Some(self.keepalive(now)));
            }
            let mut bytes = (limit - self.position).min(MESSAGE_BYTES_MAX);
            if state.dice.chance(300) {
                bytes = state.dice.between(1, bytes);
            }
            let (start, end) = (self.position, self.position + bytes);
            let data = Bytes::copy_from_slice(line.slice(start, end));
            self.position = end;
            return Ok(Some(WalEvent::Wal {
                start_lsn: Lsn(start),
                server_end_lsn: Lsn(limit),
                server_time: now,
                data,
            }));
        }
        if part_end == limit && part_end != u64::MAX {
            let next_timeline = timeline(parts.next().unwrap().0);
            self.ended = true;
            return Ok(Some(WalEvent::TimelineEnded {
                next_timeline,
                next_start_lsn: Lsn(part_end),
            }));
        }
        Ok(None)
    }

    fn keepalive(&self, server_time: PgTime) -> WalEvent {
        let server_end_lsn = Lsn(self.position);
        WalEvent::Keepalive { server_end_lsn, server_time, reply_requested: false }
    }
}

#[async_trait]
impl Sending for Running {
    async fn next(&mut self) -> Result<WalEvent> {
        let news = Arc::clone(&self.inner.server.news);
        loop {
            let mut heard = std::pin::pin!(news.notified());
            heard.as_mut().enable();
            if let Some(event) = self.say()? {
                self.due = self.inner.clock.instant() + KEEPALIVE_AFTER;
                return Ok(event);
            }
            tokio::select! {
                biased;
                () = heard => {}
                () = tokio::time::sleep_until(self.due) => {
                    self.due = self.inner.clock.instant() + KEEPALIVE_AFTER;
                    drop(self.inner.alive()?);
                    return Ok(self.keepalive(PgTime::from_timestamp(self.inner.clock.now())));
                }
            }
        }
    }

    async fn send_status(&mut self, status: StandbyStatus) -> Result<()> {
        let (id, process) = (self.inner.id, self.inner.process);
        let now = self.inner.clock.now();
        let mut state = self.inner.server.state();
        let state = &mut *state;
        // One that is told to a broken connection is told to nobody.
        let Ok(conn) = state.conn(id) else { return Ok(()) };
        conn.heard = now;
        let position = status.durable_end_lsn.0;
        if position == 0 || self.ended {
            return Ok(());
        }
        if self.inner.is_old {
            state.old_primary_acks += 1;
            return Ok(());
        }
        let line = state.current;
        let before = match (state.passing.as_mut(), state.slot_user) {
            (Some((user, _, at)), _) if *user == id => std::mem::replace(at, position),
            (_, Some(user)) if user == id => state.slot.replace(position).unwrap_or(position),
            _ => return Ok(()),
        };
        state.acks.push(Ack { process, line, position, before });
        Ok(())
    }

    async fn finish(self: Box<Self>) -> Result<Box<dyn Walsender>> {
        drop(self.inner.alive()?);
        Ok(Box::new(self.inner))
    }
}
