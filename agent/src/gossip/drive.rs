//! The task that owns the socket and the core: wait for one thing, apply it, then carry out what the core decided.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use darter_swarm::holdings::Holdings;
use darter_swarm::membership::seal::DATAGRAM_BYTES_MAX;
use darter_swarm::membership::{DropReason, Membership, MembershipEvent, Roster};
use darter_tracker::EventBody;
use tokio::sync::{broadcast, mpsc, watch};

use super::outbox::Outbox;
use super::socket::Socket;
use crate::admin::metrics::{self, Metrics};

/// Datagrams taken per turn before anything else gets one.
const BATCH: usize = 64;
/// How long a leaving node stays to repeat its farewell and to prove to strangers that it lives.
const FAREWELL: Duration = Duration::from_millis(400);
/// Between two lines in the log about datagrams of another cluster.
const FOREIGN_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Pause after the socket failed, so that a lasting failure does not use a core.
const SOCKET_PAUSE: Duration = Duration::from_millis(50);
/// When nothing is due at all, which a node without seeds may see: any time will do.
const IDLE: Duration = Duration::from_secs(60);

/// What the handle asks of the task.
pub(super) enum Wish {
    Publish(EventBody),
    Leave,
}

/// What the task is made of.
pub(super) struct Parts {
    pub(super) socket: Socket,
    pub(super) membership: Membership,
    pub(super) wishes: mpsc::Receiver<Wish>,
    pub(super) seeds: watch::Receiver<BTreeSet<SocketAddr>>,
    pub(super) roster: watch::Sender<Arc<Roster>>,
    pub(super) holdings: Arc<RwLock<Holdings>>,
    pub(super) news: broadcast::Sender<MembershipEvent>,
    pub(super) metrics: Arc<Metrics>,
}

pub(super) struct Driver {
    parts: Parts,
    outbox: Outbox,
    /// Bytes of a datagram and one, so that a longer one is seen to be too long.
    buffer: Box<[u8; DATAGRAM_BYTES_MAX + 1]>,
    /// False once nobody will change the seeds any more.
    follows_seeds: bool,
    leaves_at: Option<Instant>,
    foreign_logged: Option<Instant>,
    foreign_count: u64,
}

enum Input {
    Datagram(usize, SocketAddr),
    SocketFailed(std::io::Error),
    Wish(Option<Wish>),
    Seeds(bool),
    Timer,
}

impl Driver {
    pub(super) fn new(parts: Parts) -> Self {
        Self {
            parts,
            outbox: Outbox::new(Instant::now()),
            buffer: Box::new([0; DATAGRAM_BYTES_MAX + 1]),
            follows_seeds: true,
            leaves_at: None,
            foreign_logged: None,
            foreign_count: 0,
        }
    }

    /// Runs until told to leave, or until the handle is gone.
    pub(super) async fn run(mut self) {
        self.take_seeds();
        loop {
            self.say_what_is_due();
            self.carry_out().await;
            if self.leaves_at.is_some_and(|at| at <= Instant::now()) {
                return;
            }
            let input = self.select().await;
            if !self.apply(input).await {
                return;
            }
        }
    }

    async fn select(&mut self) -> Input {
        let due = [self.parts.membership.poll_timeout(), self.outbox.due(), self.leaves_at];
        let due = due.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + IDLE);
        tokio::select! {
            received = self.parts.socket.receive(self.buffer.as_mut_slice()) => match received {
                Ok((length, from)) => Input::Datagram(length, from),
                Err(error) => Input::SocketFailed(error),
            },
            wish = self.parts.wishes.recv() => Input::Wish(wish),
            changed = self.parts.seeds.changed(), if self.follows_seeds => Input::Seeds(changed.is_ok()),
            () = tokio::time::sleep_until(due.into()) => Input::Timer,
        }
    }

    /// False if there is nothing left to do.
    async fn apply(&mut self, input: Input) -> bool {
        let now = Instant::now();
        match input {
            Input::Datagram(length, from) => self.receive(length, from, now),
            Input::SocketFailed(error) => {
                tracing::warn!(%error, "the gossip socket failed");
                tokio::time::sleep(SOCKET_PAUSE).await;
            }
            Input::Wish(Some(Wish::Publish(body))) => {
                if self.outbox.push(body).is_some() {
                    self.parts.metrics.gossip_events_dropped.inc();
                }
            }
            Input::Wish(Some(Wish::Leave)) => {
                self.parts.membership.leave(now);
                self.leaves_at = Some(now + FAREWELL);
            }
            Input::Wish(None) => return false,
            Input::Seeds(true) => self.take_seeds(),
            Input::Seeds(false) => self.follows_seeds = false,
            Input::Timer => {}
        }
        // Also when datagrams keep coming, or a busy node would never probe anybody.
        self.parts.membership.handle_timer(now);
        true
    }

    fn take_seeds(&mut self) {
        let seeds = self.parts.seeds.borrow_and_update().clone();
        self.parts.metrics.seeds.set(i64::try_from(seeds.len()).unwrap_or(i64::MAX));
        self.parts.membership.set_seeds(seeds, Instant::now());
    }

    fn receive(&mut self, length: usize, from: SocketAddr, now: Instant) {
        self.handle(length, from, now);
        for _ in 1..BATCH {
            let Some((length, from)) = self.parts.socket.try_receive(self.buffer.as_mut_slice()) else { return };
            self.handle(length, from, now);
        }
    }

    fn handle(&mut self, length: usize, from: SocketAddr, now: Instant) {
        let Err(reason) = self.parts.membership.handle_datagram(from, &self.buffer[..length], now) else { return };
        tracing::trace!(%from, %reason, "a gossip datagram was dropped");
        self.parts.metrics.dropped(match reason {
            DropReason::Malformed => metrics::DropReason::Malformed,
            DropReason::OtherCluster(_) => metrics::DropReason::OtherCluster,
            DropReason::Forged => metrics::DropReason::Forged,
            DropReason::Replayed => metrics::DropReason::Replayed,
            DropReason::Full => metrics::DropReason::Full,
        });
        if let DropReason::OtherCluster(_) = reason {
            self.foreign_count += 1;
            if self.foreign_logged.is_none_or(|last| now.duration_since(last) >= FOREIGN_LOG_INTERVAL) {
                let count = std::mem::take(&mut self.foreign_count);
                self.foreign_logged = Some(now);
                tracing::warn!(%from, %reason, count, "gossip of another cluster, or under a secret not known here");
            }
        }
    }

    fn say_what_is_due(&mut self) {
        while let Some(body) = self.outbox.pop(Instant::now()) {
            match self.parts.membership.publish(body) {
                Ok(signed) => {
                    self.parts.holdings.write().unwrap_or_else(PoisonError::into_inner).apply(&signed.event);
                }
                Err(error) => {
                    tracing::debug!(%error, "an event was not published");
                    self.parts.metrics.gossip_events_dropped.inc();
                }
            }
        }
    }

    /// Sends what is to be sent and makes the news known.
    async fn carry_out(&mut self) {
        let mut roster_changed = false;
        while let Some(news) = self.parts.membership.poll_event() {
            roster_changed |= self.learn(&news);
            // Without a receiver nobody wants to know.
            let _ = self.parts.news.send(news);
        }
        if roster_changed {
            let (me, members) = (*self.parts.membership.me(), self.parts.membership.members().clone());
            self.parts.metrics.members.set(i64::try_from(members.len()).unwrap_or(i64::MAX).saturating_add(1));
            self.parts.roster.send_replace(Arc::new(Roster { me, members }));
        }
        while let Some((to, datagram)) = self.parts.membership.poll_transmit() {
            self.parts.socket.send(to, &datagram).await;
        }
    }

    /// Tells whether the roster has changed.
    fn learn(&mut self, news: &MembershipEvent) -> bool {
        let mut holdings = self.parts.holdings.write().unwrap_or_else(PoisonError::into_inner);
        match news {
            MembershipEvent::Up(member) => {
                holdings.member_up(member.id);
                tracing::debug!(member = %member.id, peer = %member.peer, "a member is up");
            }
            MembershipEvent::Down(node) => {
                holdings.member_down(*node);
                self.parts.metrics.members_lost.inc();
                tracing::debug!(member = %node, "a member is down");
            }
            MembershipEvent::Event(signed) => {
                holdings.apply(&signed.event);
                return false;
            }
            MembershipEvent::Joined => {
                tracing::info!("joined the cluster");
                return false;
            }
            MembershipEvent::Alone => {
                tracing::info!("no other member is known to be alive");
                return false;
            }
            MembershipEvent::Rejoined { epoch } => {
                tracing::warn!(epoch, "was declared dead, or another node advertises this address; joining again");
            }
        }
        true
    }
}
