//! Who is in the cluster, and the events that reach everybody: SWIM (foca) behind sealed datagrams.
//!
//! Sans-IO: datagrams, timers and wishes go in with `now`, datagrams, deadlines and news come out of `poll_*`.
//! Randomness is handed in, so the same seed gives the same run.
//!
//! - [`seal`] opens and seals datagrams, [`replay`] is its window per sender.
//! - `identity` is who a member is, `config` how eagerly members probe and talk, `timers` what is due when.
//! - `relay` decides which events are believed and passed on.
//! - `seek` decides when who is asked for what he knows, so that nobody stays alone and the halves of a split meet.
//! - `compare` finds what two members know differently, so that what SWIM has missed does not stay wrong.
//! - `rejoin` decides under which epoch a member comes back that was declared dead.
//!
//! What a peer says here is believed as far as he holds the cluster's secret: he can disturb, never corrupt. Not here:
//! sockets, discovery, who has which task ([`crate::holdings`]), who may publish what.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use darter_tracker::{Event, EventBody, NodeId};
use foca::{AccumulatingRuntime, Codec, Foca, Header, Message, OwnedNotification, PostcardCodec, State, Timer};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::identity::{ClusterKeys, NodeKey, SignedEvent};

mod compare;
mod config;
mod identity;
mod rejoin;
mod relay;
pub mod replay;
pub mod seal;
mod seek;
mod timers;

pub use identity::{Member, Roster};
pub use relay::EVENT_BYTES_MAX;
pub use seal::DropReason;

use compare::Comparison;
use identity::Identity;
use rejoin::Rejoin;
use relay::Relay;
use seal::{Opener, Outcome, Sealer};
use seek::Seek;
use timers::Timers;

/// How often a leaving member says so, to five others each time.
const FAREWELLS: u32 = 3;
/// Between two of them.
const FAREWELL_INTERVAL: Duration = Duration::from_millis(100);
/// Events waiting to be sent, above which foreign ones are no longer passed on.
const RELAY_BACKLOG_MAX: usize = 512;
/// Events waiting to be sent, above which own ones are refused.
const PUBLISH_BACKLOG_MAX: usize = 1024;
/// Datagrams waiting for [`Membership::poll_transmit`]; beyond that they are dropped, as the network might do.
const TRANSMIT_MAX: usize = 4096;
/// Known members that are asked, beside the seeds, by one that hears from nobody.
const ANNOUNCE_TO_KNOWN: usize = 3;

/// The first byte of a plaintext: whose message it is.
const SWIM: u8 = 0;
const COMPARISON: u8 = 1;
/// What a message may have after that byte so that the sealed datagram fits.
const MESSAGE_BYTES_MAX: usize = seal::PLAINTEXT_BYTES_MAX - 1;
/// Beside the members themselves: which message it is, and their length.
const TOLD_OVERHEAD_BYTES: usize = 4;

/// News for the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipEvent {
    /// A member is alive, or has changed its epoch.
    Up(Member),
    /// A member has left or died. Its promises are void.
    Down(NodeId),
    /// Another member said this; signed, and newer than what it said before on the subject.
    Event(SignedEvent),
    /// Somebody answers: this member is part of a cluster.
    Joined,
    /// Nobody is known to be alive.
    Alone,
    /// This member was declared dead, or its address was claimed by another, and is back under a new epoch.
    Rejoined {
        /// The new epoch.
        epoch: u64,
    },
}

/// Why a membership cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// The crypto library refused the key.
    #[error("no key could be made for sealing datagrams")]
    Key,
}

/// Why an event was not published. Nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The event is longer than [`EVENT_BYTES_MAX`]; the caller's mistake.
    #[error("the event is too long")]
    TooLong,
    /// Too many events are waiting to be sent; may be tried again.
    #[error("too many events are waiting")]
    Backlog,
    /// This member is leaving.
    #[error("the member is leaving")]
    Leaving,
}

/// One member's view of the cluster and its part in SWIM.
pub struct Membership {
    me: Member,
    node: Arc<NodeKey>,
    rng: StdRng,
    sealer: Sealer,
    opener: Opener,
    foca: Foca<Identity, PostcardCodec, StdRng, Relay>,
    runtime: AccumulatingRuntime<Identity>,
    timers: Timers,
    seek: Seek,
    members: BTreeMap<NodeId, Member>,
    accepted: mpsc::Receiver<SignedEvent>,
    congested: Arc<AtomicBool>,
    transmits: VecDeque<(SocketAddr, Vec<u8>)>,
    events: VecDeque<MembershipEvent>,
    sequence: u64,
    /// Whether somebody has answered under the present identity.
    joined: bool,
    rejoin: Rejoin,
    farewell_at: Option<Instant>,
    /// `None` until [`Self::leave`].
    farewells_left: Option<u32>,
}

impl Membership {
    /// A member that knows nobody. `me.epoch` must be higher than that of any earlier run at this address, as far as
    /// known, and `me.id` is `node`'s.
    ///
    /// # Errors
    /// Only if the crypto library fails.
    pub fn new(
        me: Member,
        keys: Arc<ClusterKeys>,
        node: Arc<NodeKey>,
        mut rng: StdRng,
    ) -> Result<Self, MembershipError> {
        let me = Identity::of(&Member { id: node.id(), ..me }).member();
        let sealer = Sealer::new(&keys, rng.random()).ok_or(MembershipError::Key)?;
        let (accept, accepted) = mpsc::sync_channel(relay::ACCEPTED_MAX);
        let congested = Arc::new(AtomicBool::new(false));
        let relay = Relay::new(keys.clone(), me.id, accept, congested.clone());
        let foca_rng = StdRng::from_rng(&mut rng);
        Ok(Self {
            foca: Foca::with_custom_broadcast(Identity::of(&me), config::config(), foca_rng, PostcardCodec, relay),
            seek: Seek::new(me.gossip),
            opener: Opener::new(keys),
            me,
            node,
            rng,
            sealer,
            runtime: AccumulatingRuntime::new(),
            timers: Timers::default(),
            members: BTreeMap::new(),
            accepted,
            congested,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            sequence: 0,
            joined: false,
            rejoin: Rejoin::default(),
            farewell_at: None,
            farewells_left: None,
        })
    }

    /// This member, under its present epoch.
    #[must_use]
    pub fn me(&self) -> &Member {
        &self.me
    }

    /// The others that are alive.
    #[must_use]
    pub fn members(&self) -> &BTreeMap<NodeId, Member> {
        &self.members
    }

    /// Whether somebody has answered this member.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.joined
    }

    /// Replaces the addresses to ask for the cluster. Asks at once if this member is alone.
    pub fn set_seeds(&mut self, seeds: BTreeSet<SocketAddr>, now: Instant) {
        self.seek.set_seeds(seeds, self.joined, now, &mut self.rng);
    }

    /// Asks whoever gossips at `address` for what he knows, and so joins his cluster.
    pub fn announce(&mut self, address: SocketAddr, now: Instant) {
        let result = self.foca.announce(Identity::at(address), &mut self.runtime);
        self.settle(now, result);
    }

    /// Says something to everybody, and returns it as the others will hear it.
    ///
    /// # Errors
    /// If it is too long, too much is waiting already, or this member is leaving.
    pub fn publish(&mut self, body: EventBody) -> Result<SignedEvent, PublishError> {
        if self.farewells_left.is_some() {
            return Err(PublishError::Leaving);
        }
        if self.foca.custom_broadcast_backlog() >= PUBLISH_BACKLOG_MAX {
            return Err(PublishError::Backlog);
        }
        let sequence = self.sequence + 1;
        let event = Event { author: self.me.id, epoch: self.node.signer().epoch, sequence, body };
        let signed = self.node.sign_event(event);
        let bytes = relay::encode(&signed).ok_or(PublishError::TooLong)?;
        self.foca.add_broadcast(&bytes).map_err(|_| PublishError::TooLong)?;
        self.sequence = sequence;
        Ok(signed)
    }

    /// Tells the others that this member goes. Keep driving it for half a second, so that they hear it.
    pub fn leave(&mut self, now: Instant) {
        if self.farewells_left.is_some() {
            return;
        }
        self.farewells_left = Some(FAREWELLS - 1);
        self.farewell_at = Some(now + FAREWELL_INTERVAL);
        self.rejoin.cancel();
        let result = self.foca.leave_cluster(&mut self.runtime);
        self.settle(now, result);
    }

    /// Takes a datagram in. `from` is only where an answer goes, never who speaks.
    ///
    /// # Errors
    /// Says why it was dropped; nothing changed then.
    pub fn handle_datagram(&mut self, from: SocketAddr, datagram: &[u8], now: Instant) -> Result<(), DropReason> {
        match self.opener.handle(now, datagram, &mut self.sealer, &mut self.rng) {
            Outcome::Deliver(plaintexts) => {
                let mut result = Ok(());
                for plaintext in plaintexts {
                    result = result.and(self.handle_plaintext(from, &plaintext, now));
                }
                result
            }
            Outcome::Reply(datagram) => {
                self.transmit(from, datagram);
                Ok(())
            }
            Outcome::Held => Ok(()),
            Outcome::Drop(reason) => Err(reason),
        }
    }

    fn handle_plaintext(&mut self, from: SocketAddr, plaintext: &[u8], now: Instant) -> Result<(), DropReason> {
        let read = match plaintext.split_first() {
            Some((&SWIM, message)) => self.handle_swim(message, now),
            Some((&COMPARISON, message)) => self.handle_comparison(from, message, now),
            _ => None,
        };
        read.ok_or(DropReason::Malformed)
    }

    fn handle_swim(&mut self, plaintext: &[u8], now: Instant) -> Option<()> {
        let congested = self.foca.custom_broadcast_backlog() >= RELAY_BACKLOG_MAX;
        self.congested.store(congested, Ordering::Relaxed);
        let redirected = self.redirect(plaintext);
        let result = self.foca.handle_data(redirected.as_deref().unwrap_or(plaintext), &mut self.runtime);
        let read = result.is_ok();
        self.settle(now, result);
        self.defend_address(now);
        read.then_some(())
    }

    /// Answers a digest, and takes in what was told. Nothing is compared any more by one that leaves.
    fn handle_comparison(&mut self, from: SocketAddr, message: &[u8], now: Instant) -> Option<()> {
        let (comparison, []) = postcard::take_from_bytes(message).ok()? else { return None };
        match comparison {
            Comparison::Digest { .. } if self.farewells_left.is_some() => {}
            Comparison::Digest { sums, answer } => {
                let known = self.known();
                let bytes = MESSAGE_BYTES_MAX - TOLD_OVERHEAD_BYTES;
                let differing = compare::differing(&sums, &known, bytes, &mut self.rng)?;
                let ours = (!answer && !differing.is_empty()).then(|| compare::digest(&known, true));
                for said in differing.into_iter().chain(ours) {
                    self.compare(from, &said);
                }
            }
            Comparison::Told(told) => {
                let members = compare::read(&told)?;
                let result = self.foca.apply_many(members.into_iter(), false, &mut self.runtime);
                self.settle(now, result);
                self.defend_address(now);
            }
        }
        Some(())
    }

    fn compare(&mut self, to: SocketAddr, said: &Comparison) {
        match postcard::to_extend(said, vec![COMPARISON]) {
            Ok(plaintext) => self.send(to, &plaintext),
            Err(error) => tracing::warn!(%error, "a comparison could not be written"),
        }
    }

    /// What is known of all members, dead ones and this one included.
    fn known(&self) -> Vec<foca::Member<Identity>> {
        let me = foca::Member::alive(Identity::of(&self.me));
        self.foca.iter_membership_state().cloned().chain([me]).collect()
    }

    /// A newcomer knows a seed by some address, such as a service's or that of the other family, and the seed itself by
    /// the one it advertises: his question is put to whoever got it. foca would ignore it.
    fn redirect(&self, plaintext: &[u8]) -> Option<Vec<u8>> {
        let mut rest = plaintext;
        let mut header: Header<Identity> = PostcardCodec.decode_header(&mut rest).ok()?;
        if !rest.is_empty() || header.message != Message::Announce || !header.dst.is_anonymous() {
            return None;
        }
        header.dst = Identity::of(&self.me);
        let mut redirected = Vec::with_capacity(plaintext.len());
        PostcardCodec.encode_header(&header, &mut redirected).ok()?;
        Some(redirected)
    }

    /// Does what is due. Call it when [`Self::poll_timeout`] says so; too early is harmless.
    pub fn handle_timer(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop(now) {
            if self.is_moot(&timer) {
                continue;
            }
            let result = self.foca.handle_timer(timer, &mut self.runtime);
            self.settle(now, result);
        }
        if self.rejoin.is_due(now) {
            self.rejoin(now);
        }
        if self.farewell_at.is_some_and(|at| at <= now) {
            self.say_farewell(now);
        }
        if self.farewells_left.is_none() && self.seek.due().is_some_and(|due| due <= now) {
            self.seek_others(now);
        }
    }

    /// Where to send what.
    pub fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.transmits.pop_front()
    }

    /// When [`Self::handle_timer`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let seek = self.seek.due().filter(|_| self.farewells_left.is_none());
        [self.timers.next(), self.rejoin.due(), self.farewell_at, seek].into_iter().flatten().min()
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<MembershipEvent> {
        self.events.pop_front()
    }

    /// foca would declare a member down although it has refuted the suspicion, find that it cannot, and yet tell the
    /// living member that it is dead, which then rejoins for nothing.
    fn is_moot(&self, timer: &Timer<Identity>) -> bool {
        let Timer::ChangeSuspectToDown { member_id, incarnation, .. } = timer else {
            return false;
        };
        !self.foca.iter_membership_state().any(|member| {
            member.id() == member_id && member.state() == State::Suspect && member.incarnation() == *incarnation
        })
    }

    /// Carries out what foca decided in one call.
    fn settle(&mut self, now: Instant, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            tracing::trace!(%error, "foca");
        }
        while let Some((to, plaintext)) = self.runtime.to_send() {
            let mut message = Vec::with_capacity(1 + plaintext.len());
            message.push(SWIM);
            message.extend_from_slice(&plaintext);
            self.send(foca::Identity::addr(&to), &message);
        }
        while let Some((after, timer)) = self.runtime.to_schedule() {
            self.timers.push(now + after, timer);
        }
        while let Some(notification) = self.runtime.to_notify() {
            self.notice(notification, now);
        }
        while let Ok(event) = self.accepted.try_recv() {
            self.events.push_back(MembershipEvent::Event(event));
        }
    }

    fn send(&mut self, to: SocketAddr, plaintext: &[u8]) {
        match self.sealer.seal(plaintext) {
            Ok(datagram) => self.transmit(to, datagram),
            Err(error) => tracing::warn!(%error, "a datagram could not be sealed"),
        }
    }

    fn transmit(&mut self, to: SocketAddr, datagram: Vec<u8>) {
        if self.transmits.len() < TRANSMIT_MAX {
            self.transmits.push_back((to, datagram));
        }
    }

    fn notice(&mut self, notification: OwnedNotification<Identity>, now: Instant) {
        match notification {
            OwnedNotification::MemberUp(identity) => self.up(identity.member()),
            OwnedNotification::MemberDown(identity) => self.down(&identity.member()),
            OwnedNotification::Rename(old, new) => self.rename(&old.member(), new.member()),
            OwnedNotification::Active => {
                self.joined = true;
                self.seek.settle(now, &mut self.rng);
                self.events.push_back(MembershipEvent::Joined);
            }
            OwnedNotification::Idle => {
                self.joined = false;
                self.seek.hurry(now, &mut self.rng);
                self.events.push_back(MembershipEvent::Alone);
            }
            OwnedNotification::Defunct => {
                self.joined = false;
                self.plan_rejoin(now);
            }
            // Only foca's own renewals cause this, and identities here do not renew themselves.
            OwnedNotification::Rejoin(_) => {}
        }
    }

    fn up(&mut self, member: Member) {
        // Two addresses under one name, or ours under another's address: one of them lies, and the first one stays.
        let taken = self.members.get(&member.id).is_some_and(|known| known.gossip != member.gossip);
        if !taken && member.id != self.me.id {
            self.members.insert(member.id, member);
            self.events.push_back(MembershipEvent::Up(member));
        }
    }

    fn down(&mut self, member: &Member) {
        if self.members.get(&member.id).is_some_and(|known| known.gossip == member.gossip) {
            self.members.remove(&member.id);
            self.events.push_back(MembershipEvent::Down(member.id));
        }
    }

    /// A restarted member takes its old self's place; one that only changed its epoch stays.
    fn rename(&mut self, old: &Member, new: Member) {
        if self.members.get(&old.id).is_none_or(|known| known.gossip != old.gossip) {
            return;
        }
        if old.id != new.id {
            self.down(old);
        }
        self.up(new);
    }

    /// Another identity at our own address with a higher epoch would make the others ignore us: outdo it.
    fn defend_address(&mut self, now: Instant) {
        if self.rejoin.due().is_none() && self.heard_epoch().is_some_and(|heard| heard >= self.me.epoch) {
            self.plan_rejoin(now);
        }
    }

    /// The epoch of whoever else claims this address.
    fn heard_epoch(&self) -> Option<u64> {
        let claims = self.foca.iter_membership_state().map(foca::Member::id);
        claims.filter(|claim| foca::Identity::addr(*claim) == self.me.gossip).map(|claim| claim.epoch).max()
    }

    fn plan_rejoin(&mut self, now: Instant) {
        if self.farewells_left.is_none() {
            self.rejoin.plan(now);
        }
    }

    fn rejoin(&mut self, now: Instant) {
        self.me.epoch = self.rejoin.next_epoch(now, self.me.epoch, self.heard_epoch());
        self.joined = false;
        let result = self.foca.change_identity(Identity::of(&self.me), &mut self.runtime);
        self.settle(now, result);
        self.events.push_back(MembershipEvent::Rejoined { epoch: self.me.epoch });
        self.seek.hurry(now, &mut self.rng);
    }

    fn say_farewell(&mut self, now: Instant) {
        let left = self.farewells_left.unwrap_or(0);
        self.farewell_at = None;
        if left > 0 {
            self.farewells_left = Some(left - 1);
            self.farewell_at = Some(now + FAREWELL_INTERVAL);
            let result = self.foca.gossip(&mut self.runtime);
            self.settle(now, result);
        }
    }

    fn seek_others(&mut self, now: Instant) {
        let live: BTreeSet<SocketAddr> = self.members.values().map(|member| member.gossip).collect();
        if let Some(partner) = self.seek.partner(&live, now, &mut self.rng) {
            let digest = compare::digest(&self.known(), false);
            self.compare(partner, &digest);
        }
        let Some(mut targets) = self.seek.targets(self.joined, &live, now, &mut self.rng) else { return };
        if !self.joined {
            targets.extend(seek::pick(live, ANNOUNCE_TO_KNOWN, &mut self.rng));
        }
        for target in targets {
            self.announce(target, now);
        }
    }
}

#[cfg(test)]
mod tests;
