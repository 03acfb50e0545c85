//! What a downloader knows of one peer.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use darter_tracker::{Bitmap, ErrorKind, NodeId, PieceIndex};
use rand::RngExt as _;
use rand::rngs::StdRng;

/// Bound on peers that a downloader deals with: the 16 of its own neighbourhood, as many that were introduced to it by
/// others' neighbourhoods, and sources that the home named.
pub const NEIGHBOURS_MAX: usize = 48;

/// Pieces taken from one peer at a time: one on its way while the next waits for the sender's link.
pub const PIPELINE: usize = 2;

/// A peer from which nothing comes for so long, not even an acknowledgement, has failed. How long a piece takes says nothing:
/// on a link of 20 Mb/s that carries four of them it is a second and more.
const SILENCE: Duration = Duration::from_millis(750);

/// A request is given up after this, plus what the piece takes at [`RATE_MIN`], though its peer is alive.
const DEADLINE_BASE: Duration = Duration::from_secs(5);

/// A peer slower than this (bytes per second) is not worth waiting for.
const RATE_MIN: u64 = 256 * 1024;

/// A piece is asked of a second peer when nothing has come from the first for so long,
const HEDGE_SILENT: Duration = Duration::from_millis(250);

/// or when it has taken this long, or three times what pieces of that peer usually take.
const HEDGE_MIN: Duration = Duration::from_millis(500);

/// How long a busy peer is left alone, with as much jitter again; doubled with each refusal in a row, up to the maximum.
const BUSY_PAUSE: Duration = Duration::from_millis(15);
const BUSY_PAUSE_MAX: Duration = Duration::from_millis(240);

/// How long a peer is left alone after its first failure; doubled with each, up to the maximum.
const PAUSE_BASE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// After a session has ended, or could not be begun, none is begun with the same peer for this long: homes go on naming
/// it, and one that has nothing to say ends each session at once.
const RECONNECT: Duration = Duration::from_secs(2);

/// One peer.
#[derive(Debug)]
pub struct Neighbour {
    has: Bitmap,
    news: Option<Instant>,
    /// Whether a session exists or is being made.
    connected: bool,
    /// Whether a session exists.
    up: bool,
    reconnect_at: Option<Instant>,
    /// Its home, as far as it has told.
    pub(super) home: Option<NodeId>,
    /// Since when it has been asked for a turn that it has not offered.
    in_line: Option<Instant>,
    /// The pieces that were asked of it.
    requests: BTreeMap<PieceIndex, Request>,
    paused_until: Option<Instant>,
    failures: u32,
    /// Refusals since it last delivered.
    refusals: u32,
    /// When something last came from it, if that was noticed.
    heard: Option<Instant>,
    /// Silence that proves nothing where this peer is concerned.
    patience: Duration,
    /// How long its pieces take; `None` before the first.
    latency: Option<Duration>,
    /// When it was last asked for a turn.
    asked_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    since: Instant,
    deadline: Instant,
}

impl Neighbour {
    pub(super) fn new(pieces: u32, patience: Duration) -> Self {
        Self {
            has: Bitmap::new(pieces),
            news: None,
            connected: false,
            up: false,
            reconnect_at: None,
            home: None,
            in_line: None,
            requests: BTreeMap::new(),
            paused_until: None,
            failures: 0,
            refusals: 0,
            heard: None,
            patience,
            latency: None,
            asked_at: None,
        }
    }

    /// Notes that a session is being made; tells whether one is needed. One that gives everything has no news.
    pub(super) fn begin_connect(&mut self, now: Instant) -> bool {
        let soon = self.paused(now) || self.reconnect_at.is_some_and(|at| now < at);
        !soon && !self.has.is_full() && !std::mem::replace(&mut self.connected, true)
    }

    /// Whether a session exists.
    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    pub(super) fn up(&mut self) {
        (self.connected, self.up) = (true, true);
    }

    pub(super) fn gone(&mut self, now: Instant) {
        (self.connected, self.up) = (false, false);
        self.reconnect_at = Some(now + RECONNECT);
    }

    pub(super) fn lost(&mut self, now: Instant) {
        self.gone(now);
        self.failures += 1;
        self.pause_until(now + self.pause().max(RECONNECT));
    }

    /// A short pause does not end a long one: who lied is not asked sooner because it was busy as well.
    fn pause_until(&mut self, until: Instant) {
        self.paused_until = self.paused_until.max(Some(until));
    }

    /// Whether nothing is lost if another takes its place: no session, nothing asked for, nothing to give.
    pub(super) fn expendable(&self, have: &Bitmap, now: Instant) -> bool {
        let gives = !self.paused(now) && self.has.iter().any(|piece| !have.contains(piece));
        !self.connected && self.owes_nothing() && !gives
    }

    /// Whether it offers `piece`.
    #[must_use]
    pub fn has(&self, piece: PieceIndex) -> bool {
        self.has.contains(piece)
    }

    /// What of `wanted` it offers, in order.
    pub(super) fn offers<'a>(&'a self, wanted: &'a Bitmap) -> impl Iterator<Item = PieceIndex> + 'a {
        self.has.common(wanted)
    }

    /// Whether it lacks something, so that a piece may be passed on to it.
    #[must_use]
    pub fn lacks(&self, piece: PieceIndex) -> bool {
        self.connected && !self.has.contains(piece)
    }

    pub(super) fn offer(&mut self, piece: PieceIndex, now: Instant) -> bool {
        let new = self.has.insert(piece);
        if new {
            self.news = Some(now);
        }
        new
    }

    /// When it last offered something new.
    pub(super) fn news(&self) -> Option<Instant> {
        self.news
    }

    pub(super) fn withdraw(&mut self, piece: PieceIndex) -> bool {
        self.has.remove(piece)
    }

    pub(super) fn withdraw_all(&mut self) -> Vec<PieceIndex> {
        let pieces = self.has.iter().collect();
        self.has = Bitmap::new(self.has.pieces());
        pieces
    }

    /// Whether it offers one of `pieces` that it is not asked for.
    pub(super) fn gives_any(&self, pieces: &[PieceIndex]) -> bool {
        pieces.iter().any(|piece| self.has(*piece) && !self.asked(*piece))
    }

    /// Whether it offers one of `wanted`.
    pub(super) fn offers_any(&self, wanted: &Bitmap) -> bool {
        self.has.intersects(wanted)
    }

    /// All that it offers.
    pub(super) fn offered(&self) -> &Bitmap {
        &self.has
    }

    /// Whether it may be asked for a turn at `now`.
    #[must_use]
    pub fn ready(&self, now: Instant) -> bool {
        self.in_line.is_none() && self.requests.len() < PIPELINE && !self.paused(now)
    }

    /// Whether it was asked for a turn that it has not offered yet.
    #[must_use]
    pub fn is_in_line(&self) -> bool {
        self.in_line.is_some()
    }

    /// Whether it was asked for nothing, or has given it.
    pub(super) fn owes_nothing(&self) -> bool {
        self.in_line.is_none() && self.requests.is_empty()
    }

    /// Notes that it is asked for a turn; returns when its silence is to be judged.
    pub(super) fn line_up(&mut self, now: Instant) -> Instant {
        (self.in_line, self.asked_at) = (Some(now), Some(now));
        now + self.silence()
    }

    /// Notes that it waits for a turn no longer; tells whether it did.
    pub(super) fn leave_line(&mut self) -> bool {
        self.in_line.take().is_some()
    }

    /// When it was last asked for a turn; `None` before the first time.
    pub(super) fn asked_at(&self) -> Option<Instant> {
        self.asked_at
    }

    /// Whether it is left alone at `now`.
    #[must_use]
    pub fn paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// Whether it is asked for `piece`.
    #[must_use]
    pub fn asked(&self, piece: PieceIndex) -> bool {
        self.requests.contains_key(&piece)
    }

    /// The pieces it is asked for.
    pub fn requested(&self) -> impl Iterator<Item = PieceIndex> + '_ {
        self.requests.keys().copied()
    }

    /// Whether its answer for `piece` is overdue, so that another may be asked as well.
    #[must_use]
    pub fn slow(&self, piece: PieceIndex, now: Instant) -> bool {
        self.requests
            .get(&piece)
            .is_some_and(|request| now >= request.since + self.hedge_after() || self.silent(piece, now))
    }

    /// Whether nothing has come from it for a while since it was asked for `piece`.
    #[must_use]
    pub fn silent(&self, piece: PieceIndex, now: Instant) -> bool {
        self.requests.get(&piece).is_some_and(|request| now >= self.alive(request.since) + self.hedge_silent())
    }

    /// Notes that something has come from it; returns since when it had been silent, if it owed something.
    pub(super) fn heard(&mut self, now: Instant) -> Option<Instant> {
        let silent_since = self.silent_since();
        self.heard = Some(now);
        silent_since
    }

    /// Since when nothing has come from it, if it owes something.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let owed = self.requests.values().map(|request| request.since).chain(self.in_line).min();
        owed.map(|since| self.alive(since))
    }

    /// Sets what silence proves nothing.
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    fn silence(&self) -> Duration {
        SILENCE.max(self.patience)
    }

    fn hedge_silent(&self) -> Duration {
        HEDGE_SILENT.max(self.patience)
    }

    /// When it was last known to be alive, as far as something that it was asked for at `since` is concerned.
    fn alive(&self, since: Instant) -> Instant {
        self.heard.map_or(since, |heard| heard.max(since))
    }

    /// Notes that it is asked for a piece; returns when that is to be looked at.
    pub(super) fn ask(&mut self, piece: PieceIndex, bytes: u32, now: Instant) -> Instant {
        let transfer = Duration::from_millis(u64::from(bytes) * 1000 / RATE_MIN);
        self.requests.insert(piece, Request { since: now, deadline: now + DEADLINE_BASE + transfer });
        now + self.hedge_silent()
    }

    pub(super) fn delivered(&mut self, piece: PieceIndex, now: Instant) {
        self.failures = 0;
        self.refusals = 0;
        if let Some(request) = self.requests.remove(&piece) {
            let took = now.saturating_duration_since(request.since);
            self.latency = Some(self.latency.map_or(took, |usual| (usual * 7 + took) / 8));
        }
    }

    /// How long its pieces usually take; `None` before the first.
    pub(super) fn latency(&self) -> Option<Duration> {
        self.latency
    }

    pub(super) fn cancel(&mut self, piece: PieceIndex) -> bool {
        self.requests.remove(&piece).is_some()
    }

    /// Notes that a request failed; tells whether it was still open.
    pub(super) fn fail(&mut self, piece: PieceIndex, kind: Option<ErrorKind>, now: Instant, rng: &mut StdRng) -> bool {
        let open = self.requests.remove(&piece).is_some();
        if open {
            self.leave_alone(kind, now, rng);
        }
        open
    }

    /// Notes that it offers no turn; tells whether it was still asked for one.
    pub(super) fn fail_turn(&mut self, kind: Option<ErrorKind>, now: Instant, rng: &mut StdRng) -> bool {
        let open = self.leave_line();
        if open {
            self.leave_alone(kind, now, rng);
        }
        open
    }

    fn leave_alone(&mut self, kind: Option<ErrorKind>, now: Instant, rng: &mut StdRng) {
        let pause = match kind {
            None => {
                let pause = (BUSY_PAUSE * 2u32.saturating_pow(self.refusals.min(8))).min(BUSY_PAUSE_MAX);
                self.refusals += 1;
                pause + pause.mul_f64(rng.random::<f64>())
            }
            Some(ErrorKind::NotFound) => BUSY_PAUSE,
            Some(ErrorKind::Unreachable) => {
                self.failures += 1;
                self.pause()
            }
            Some(ErrorKind::Mismatch) => PAUSE_MAX,
        };
        self.pause_until(now + pause);
    }

    /// Whether nothing has come from it for so long that it offers no turn any more.
    pub(super) fn line_is_dead(&self, now: Instant) -> bool {
        self.in_line.is_some_and(|since| now >= self.alive(since) + self.silence())
    }

    /// The requests that are given up, and whether because the peer is silent.
    pub(super) fn overdue(&self, now: Instant) -> Vec<(PieceIndex, bool)> {
        let overdue = |(piece, request): (&PieceIndex, &Request)| {
            let silent = now >= self.alive(request.since) + self.silence();
            (silent || now >= request.deadline).then_some((*piece, silent))
        };
        self.requests.iter().filter_map(overdue).collect()
    }

    pub(super) fn deadlines(&self, now: Instant) -> impl Iterator<Item = Instant> + '_ {
        let (hedge, hedge_silent, silence) = (self.hedge_after(), self.hedge_silent(), self.silence());
        self.requests
            .values()
            .flat_map(move |request| {
                let alive = self.alive(request.since);
                [request.since + hedge, alive + hedge_silent, alive + silence, request.deadline]
            })
            .chain(self.paused_until)
            .chain(self.in_line.map(move |since| self.alive(since) + silence))
            .filter(move |at| *at > now)
    }

    fn hedge_after(&self) -> Duration {
        (self.latency.unwrap_or(HEDGE_MIN) * 3).max(HEDGE_MIN)
    }

    fn pause(&self) -> Duration {
        (PAUSE_BASE * 2u32.saturating_pow(self.failures.saturating_sub(1).min(8))).min(PAUSE_MAX)
    }
}
