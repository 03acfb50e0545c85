//! The tracker without a tracker server: every call goes to the member that is home of the task, over an authenticated
//! stream, or to this node's own [`Home`] if that is it. `bridge` is what that home and others tell each other, `awake`
//! whether this node is fit to judge them; [`tags`] asks homes what tags mean.

mod awake;
mod bridge;
pub mod tags;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use darter_swarm::holdings::QUARTERS_ALL;
use darter_swarm::home::{Home, STALLED};
use darter_swarm::isolation::Isolation;
use darter_swarm::membership::{Member, MembershipEvent};
use darter_swarm::rendezvous;
use darter_swarm::wire::{Call, Open, Reply};
use darter_tracker::{
    ClientErrorRequest, EventBody, NodeId, PullPieceRequest, PullPieceResponse, RegisterRequest, RegisterResponse,
    ReportPieceRequest, ReportPieceResponse, ServiceDownRequest, TaskId, Tracker, TrackerError,
};
use lru::LruCache;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use self::awake::Awake;
use self::bridge::Bridge;
use super::{Gossip, Roster};
use crate::admin::metrics::Metrics;
use crate::net::{Peer, Transport};
use crate::store::{Outcome, Store};

/// A call to a member from which nothing comes for this long has failed; the downloader has turned to the next home by then.
const SILENCE: Duration = Duration::from_secs(2);

/// A call that is given up after this long or more, and for which nothing has come, has failed too. It is the time after
/// which a downloader turns away from a home that it never heard of.
const UNANSWERED: Duration = darter_swarm::task::link::SILENT_STRANGER;

/// A call that takes longer has failed though the member is alive.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// A member that did not answer a call is nobody's home for this long, as far as this node is concerned.
const SILENT_FOR: Duration = Duration::from_secs(10);

/// Calls that wait for this node's home. It answers in microseconds; callers beyond the bound wait.
const CALLS_MAX: usize = 1024;

/// How often the transport is asked whether this home's fetchers are alive.
const PULSE: Duration = Duration::from_millis(100);

/// A home whose pulse is so late has been held up.
const HELD_UP: Duration = PULSE.saturating_mul(3);

/// Everybody is asked about a task so often at the most, and the tasks of which that is remembered.
const ASKED_AGAIN: Duration = Duration::from_secs(2);
const ASKED_MAX: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// After a member was lost, a home that is asked for a task that nobody is known to hold asks everybody for this long: as long
/// as gossip remembers the dead. In a cluster that loses nobody, a new image costs no such question.
const RECOVERING: Duration = Duration::from_secs(15 * 60);

/// The members in rank that a downloader tries: the home and its stand-bys. The design has two of those (D3); where three
/// of ten nodes freeze at the same moment, all of them do once in a hundred times, and everybody fetches alone.
pub(super) const HOMES: usize = 5;

/// Blobs of one manifest whose homes are connected to before a client asks for any of them: more than a client asks for at
/// once, few enough that a list of a thousand layers is not a thousand handshakes.
const PREPARED_MAX: usize = 16;

struct HomeCall {
    from: NodeId,
    call: Call,
    reply: oneshot::Sender<Reply>,
}

/// This node's own home: one task owns it, everybody else sends calls.
#[derive(Clone, Debug)]
pub struct HomeHandle {
    calls: mpsc::Sender<HomeCall>,
    /// Its loop is this node's pulse.
    awake: Arc<Awake>,
}

impl HomeHandle {
    /// Starts the loop that owns `home`, which knows what is in `store`. It ends when every handle is gone or it is aborted.
    #[must_use]
    pub fn start(home: Home, store: Arc<Store>, peers: Option<(Arc<Gossip>, Transport)>) -> (Self, JoinHandle<()>) {
        let (sender, calls) = mpsc::channel(CALLS_MAX);
        let awake = Arc::new(Awake::new(Instant::now()));
        let handle = Self { calls: sender, awake: Arc::clone(&awake) };
        (handle, tokio::spawn(run_home(home, store, peers, calls, awake)))
    }

    /// Answers a call of `from`.
    pub async fn call(&self, from: NodeId, call: Call) -> Reply {
        let stopping = || Reply::Failed(TrackerError::Unreachable { reason: "the agent is stopping".to_owned() });
        let (reply, answer) = oneshot::channel();
        if self.calls.send(HomeCall { from, call, reply }).await.is_err() {
            return stopping();
        }
        answer.await.unwrap_or_else(|_| stopping())
    }
}

async fn run_home(
    mut home: Home,
    store: Arc<Store>,
    peers: Option<(Arc<Gossip>, Transport)>,
    mut calls: mpsc::Receiver<HomeCall>,
    awake: Arc<Awake>,
) {
    let (gossip, transport) = peers.unzip();
    let mut bridge =
        gossip.as_ref().zip(transport.clone()).map(|(gossip, transport)| Bridge::new(transport, gossip.roster()));
    let mut pulse = tokio::time::interval(PULSE);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut received = BTreeMap::new();
    let mut lost = None;
    let mut asked = LruCache::new(ASKED_MAX);
    let mut felt = Instant::now();
    let mut events = gossip.as_ref().map(|gossip| gossip.events());
    let mut roster = gossip.as_ref().map(|gossip| gossip.roster());
    loop {
        tokio::select! {
            call = calls.recv() => match call {
                Some(HomeCall { from, call, reply }) => {
                    if felt.elapsed() >= STALLED {
                        home.handle_stall(Instant::now());
                    }
                    // This node was held up itself: nobody's silence is judged by that.
                    if felt.elapsed() > HELD_UP {
                        home.fetchers().into_iter().for_each(|fetcher| home.handle_alive(fetcher, Instant::now()));
                        felt = Instant::now();
                    }
                    // A caller that has given up is no error.
                    let _ = reply.send({
                        let mut knowledge = Knowledge { store: &store, gossip: gossip.as_deref(), lost, asked: &mut asked };
                        answer(&mut home, &mut knowledge, from, call, Instant::now())
                    });
                    bridge.iter_mut().for_each(|bridge| bridge.tell(&mut home));
                }
                None => return,
            },
            (from, news) = Bridge::answered(bridge.as_mut()) => home.handle_news(from, news, Instant::now()),
            Some(event) = next_event(&mut events) => {
                match event {
                    MembershipEvent::Down(node) => {
                        lost = Some(Instant::now());
                        home.member_down(node);
                    }
                    // Whoever has thrown a blob out is nobody's source any more.
                    MembershipEvent::Event(signed) => {
                        if let EventBody::Remove { task } = signed.event.body {
                            home.service_down(signed.event.author, ServiceDownRequest { task });
                        }
                    }
                    _ => {}
                }
            }
            _ = pulse.tick() => {
                received = feel_pulse(&mut home, transport.as_ref(), &received);
                bridge.iter_mut().for_each(|bridge| bridge.tell(&mut home));
                felt = Instant::now();
                awake.feel(felt);
            }
            Some(roster) = roster_change(&mut roster) => {
                home.set_cluster_size(roster.members.len() + 1);
                let all = roster.members.values().chain([&roster.me]);
                home.set_zones(all.filter(|member| member.zone != 0).map(|member| (member.id, member.zone)).collect());
            }
        }
    }
}

/// Tells the home which of its fetchers are alive, and returns what has come from each of them until now.
fn feel_pulse(home: &mut Home, transport: Option<&Transport>, before: &BTreeMap<NodeId, u64>) -> BTreeMap<NodeId, u64> {
    let mut received = BTreeMap::new();
    for fetcher in home.fetchers() {
        let packets = transport.map_or(0, |transport| transport.received(fetcher));
        // This node itself is alive.
        if fetcher == home.me() || before.get(&fetcher).is_none_or(|before| packets > *before) {
            home.handle_alive(fetcher, Instant::now());
        }
        received.insert(fetcher, packets);
    }
    received
}

/// The next membership event; never, without gossip. A burst that overran the queue is survivable: leases lapse and
/// callers complain about the dead.
async fn next_event(events: &mut Option<tokio::sync::broadcast::Receiver<MembershipEvent>>) -> Option<MembershipEvent> {
    use tokio::sync::broadcast::error::RecvError;
    let Some(receiver) = events else { return std::future::pending().await };
    loop {
        match receiver.recv().await {
            Ok(event) => return Some(event),
            Err(RecvError::Lagged(missed)) => tracing::debug!(missed, "membership events were missed"),
            Err(RecvError::Closed) => break,
        }
    }
    *events = None;
    std::future::pending().await
}

async fn roster_change(roster: &mut Option<watch::Receiver<Arc<Roster>>>) -> Option<Arc<Roster>> {
    let Some(receiver) = roster else { return std::future::pending().await };
    if receiver.changed().await.is_err() {
        *roster = None;
        return std::future::pending().await;
    }
    Some(receiver.borrow_and_update().clone())
}

fn answer(home: &mut Home, knowledge: &mut Knowledge<'_>, from: NodeId, call: Call, now: Instant) -> Reply {
    let result = match call {
        Call::Register(request) => {
            knowledge.teach(home, &request, now);
            home.register(from, request, now).map(Reply::Registered)
        }
        Call::PullPiece(request) => home.pull_piece(from, &request, now).map(Reply::Pulled),
        Call::ReportPiece(request) => home.report_piece(from, &request, now).map(Reply::Reported),
        Call::ServiceDown(request) => {
            home.service_down(from, request);
            Ok(Reply::Done)
        }
        Call::ReportError(request) => home.report_error(from, &request, now).map(|()| Reply::Done),
        Call::Compare(news) => Ok(Reply::Compared(home.compare(from, news, now))),
        Call::AskTag { tag, accepts, fresh } => Ok(Reply::Tag(home.tags().ask(from, tag, accepts, fresh, now))),
        Call::TellTag { tag, news } => {
            home.tags().tell(from, tag, news, now);
            Ok(Reply::Done)
        }
    };
    result.unwrap_or_else(Reply::Failed)
}

/// What a home may learn from when it is asked for a task that it does not know.
struct Knowledge<'a> {
    store: &'a Store,
    gossip: Option<&'a Gossip>,
    /// When the last member died or left.
    lost: Option<Instant>,
    /// When everybody was asked about a task.
    asked: &'a mut LruCache<TaskId, Instant>,
}

impl Knowledge<'_> {
    /// Tells a home that knows no holder of a task who holds it: this node itself, or whom gossip knows. If that is nobody, and
    /// the home that knew may be one of those who died lately, everybody is asked.
    fn teach(&mut self, home: &mut Home, request: &RegisterRequest, now: Instant) {
        let task = request.task;
        if home.knows_holders(&task) {
            return;
        }
        let unknown = !home.knows(&task);
        let own = self.store.find(&task).filter(|blob| blob.state().borrow().outcome == Outcome::Complete);
        if let Some(own) = &own {
            home.learn_holder(task, *own.geometry(), home.me(), now);
        }
        let Some(gossip) = self.gossip else { return };
        let holders = gossip.holders(&task);
        // Who asks has the length from the registry, which a member's word does not outweigh.
        let announced = gossip.geometry(&task);
        let cut = request.geometry.or(announced).filter(|cut| announced.is_none_or(|announced| announced == *cut));
        if let Some(geometry) = cut {
            let me = home.me();
            for (node, quarters) in holders.iter().filter(|(node, _)| *node != me) {
                match *quarters {
                    QUARTERS_ALL => home.learn_holder(task, geometry, *node, now),
                    _ if unknown => home.learn_downloader(task, geometry, *node, now),
                    _ => {}
                }
            }
        }
        let recovering = self.lost.is_some_and(|lost| now.saturating_duration_since(lost) < RECOVERING);
        let whole = holders.iter().any(|(_, quarters)| *quarters == QUARTERS_ALL);
        let asked = self.asked.get(&task).is_some_and(|asked| now.saturating_duration_since(*asked) < ASKED_AGAIN);
        if own.is_none() && !whole && recovering && !asked {
            self.asked.put(task, now);
            tracing::debug!(%task, "everybody is asked who holds it");
            gossip.publish(EventBody::Recover { task: Some(task) });
        }
    }
}

/// A member that did not answer a call.
struct Silent {
    /// When it is asked again.
    until: Instant,
    /// Packets that had come from it, if none came in answer to the call: one more shows that it was late and not dead.
    received: Option<u64>,
}

/// The [`Tracker`] over gossip membership.
pub struct GossipTracker {
    me: NodeId,
    home: HomeHandle,
    /// `None` for an agent without a secret: it has no peers and is its own home.
    peers: Option<(Transport, watch::Receiver<Arc<Roster>>)>,
    silent: Mutex<BTreeMap<NodeId, Silent>>,
    isolation: watch::Sender<Isolation>,
    metrics: Arc<Metrics>,
}

impl GossipTracker {
    /// A tracker for the node `me`.
    #[must_use]
    pub fn new(
        me: NodeId,
        home: HomeHandle,
        peers: Option<(Transport, watch::Receiver<Arc<Roster>>)>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { me, home, peers, silent: Mutex::default(), isolation: watch::Sender::default(), metrics }
    }

    /// This node's own home, for calls that come from others.
    #[must_use]
    pub fn own_home(&self) -> &HomeHandle {
        &self.home
    }

    /// Where a member takes piece requests; `None` if gossip does not know it.
    #[must_use]
    pub fn peer(&self, node: NodeId) -> Option<Peer> {
        let (_, roster) = self.peers.as_ref()?;
        let roster = roster.borrow();
        roster.members.get(&node).map(|member: &Member| Peer { id: node, addr: member.peer })
    }

    /// The members to ask about a task, best first. This node is always among them: it is its own last resort.
    /// Members that did not answer lately are left out. Nobody is asked while this node isolates itself.
    #[must_use]
    pub fn homes(&self, task: &TaskId) -> Vec<NodeId> {
        if self.is_isolated() { Vec::new() } else { self.homes_if_reached(task) }
    }

    /// The same for a node that may be isolated.
    #[must_use]
    pub fn homes_if_reached(&self, task: &TaskId) -> Vec<NodeId> {
        let now = Instant::now();
        let mut silent = lock(&self.silent);
        silent.retain(|node, silent| {
            silent.until > now && silent.received.is_none_or(|before| self.received(*node) == before)
        });
        let mut members = Vec::new();
        if let Some((_, roster)) = &self.peers {
            let roster = roster.borrow();
            members.push((self.me, roster.me.role));
            let others = roster.members.values().filter(|member| !silent.contains_key(&member.id));
            members.extend(others.map(|member| (member.id, member.role)));
        }
        let mut order = rendezvous::order(task, members);
        order.truncate(HOMES);
        if !order.contains(&self.me) {
            order.push(self.me);
        }
        order
    }

    /// The first in rank for a task of those that gossip knows.
    #[must_use]
    pub fn best(&self, task: &TaskId, nodes: impl IntoIterator<Item = NodeId>) -> Option<NodeId> {
        let (_, roster) = self.peers.as_ref()?;
        let roster = roster.borrow();
        let role = |node| {
            let known = if node == self.me { Some(&roster.me) } else { roster.members.get(&node) };
            known.map(|member| (node, member.role))
        };
        rendezvous::order(task, nodes.into_iter().filter_map(role)).into_iter().next()
    }

    /// Connects to the homes of tasks that may be asked for soon, so that the first call needs no handshake. Says nothing about
    /// the tasks; a home that does not answer is found out by the calls.
    pub async fn prepare(&self, tasks: &[TaskId]) {
        let Some((transport, _)) = &self.peers else { return };
        let homes = tasks.iter().take(PREPARED_MAX).filter_map(|task| self.homes(task).first().copied());
        let unknown: BTreeSet<NodeId> = homes.filter(|home| *home != self.me && self.received(*home) == 0).collect();
        let dials = unknown.into_iter().filter_map(|home| self.peer(home)).map(|peer| transport.open(peer));
        for dialled in futures_util::future::join_all(dials).await {
            if let Err(error) = dialled {
                tracing::debug!(%error, "no connection to a home yet");
            }
        }
    }

    /// A receiver that tells when the members have changed.
    #[must_use]
    pub fn roster(&self) -> Option<watch::Receiver<Arc<Roster>>> {
        self.peers.as_ref().map(|(_, roster)| roster.clone())
    }

    /// Whether this node has failed with everybody it asked, and asks the registry alone for a while.
    #[must_use]
    pub fn is_isolated(&self) -> bool {
        self.isolation.borrow().is_isolated(Instant::now())
    }

    /// A member could not be reached, or was silent.
    pub fn member_failed(&self, node: NodeId) {
        if self.home.awake.stood_still(Instant::now()) {
            return;
        }
        // Who has left, or never was a member, does not answer anybody.
        let others = match &self.peers {
            Some((_, roster)) if roster.borrow().members.contains_key(&node) => roster.borrow().members.len(),
            _ => return,
        };
        if self.isolation.send_if_modified(|isolation| isolation.failed(node, others, Instant::now())) {
            self.metrics.isolations.inc();
            tracing::warn!(others, "isolated: no member answers this node, the registry alone is asked for a while");
        }
    }

    /// A member did not answer a call; when that was made, so many packets had come from it.
    fn member_silent(&self, node: NodeId, before: u64) {
        if self.home.awake.stood_still(Instant::now()) {
            return;
        }
        let received = Some(before).filter(|before| self.received(node) == *before);
        lock(&self.silent).insert(node, Silent { until: Instant::now() + SILENT_FOR, received });
        self.member_failed(node);
    }

    /// A member has answered, or has come by itself.
    pub fn member_answered(&self) {
        if self.isolation.send_if_modified(Isolation::answered) {
            tracing::info!("no longer isolated: a member answers");
        }
    }

    /// How often this node has isolated itself.
    #[must_use]
    pub fn isolations(&self) -> u64 {
        self.metrics.isolations.get()
    }

    /// Waits for an isolation and then for its end: somebody answers, or it is time to try again.
    pub async fn isolation_over(&self) {
        let mut isolation = self.isolation.subscribe();
        let isolated = |isolation: &Isolation| isolation.is_isolated(Instant::now());
        // The sender is this tracker's own.
        while let Ok(Some(until)) = isolation.wait_for(isolated).await.map(|isolation| isolation.until()) {
            let answered = isolation.wait_for(|isolation| isolation.until() != Some(until));
            // A second term may have begun meanwhile.
            let _ = tokio::time::timeout_at(until.into(), answered).await;
            if !self.is_isolated() {
                return;
            }
        }
    }

    async fn call(&self, node: NodeId, call: Call) -> Result<Reply, TrackerError> {
        let reply = if node == self.me {
            self.home.call(self.me, call).await
        } else {
            let mut verdict = Verdict::pending(self, node);
            let outcome = self.while_alive(node, self.call_peer(node, call)).await;
            verdict.over = true;
            match outcome {
                Ok(reply) => {
                    lock(&self.silent).remove(&node);
                    self.member_answered();
                    reply
                }
                Err(reason) => {
                    self.member_silent(node, verdict.received);
                    return Err(TrackerError::Unreachable { reason });
                }
            }
        };
        match reply {
            Reply::Failed(error) => Err(error),
            reply => Ok(reply),
        }
    }

    /// Packets that have come from a member.
    fn received(&self, node: NodeId) -> u64 {
        self.peers.as_ref().map_or(0, |(transport, _)| transport.received(node))
    }

    /// Waits for what a member was asked for as long as something comes from it.
    async fn while_alive<T>(&self, node: NodeId, asked: impl Future<Output = Result<T, String>>) -> Result<T, String> {
        let received = || self.received(node);
        let (begin, mut before) = (Instant::now(), received());
        tokio::pin!(asked);
        loop {
            match tokio::time::timeout(SILENCE, &mut asked).await {
                Ok(outcome) => return outcome,
                Err(_) if begin.elapsed() < CALL_TIMEOUT && received() != before => before = received(),
                Err(_) => return Err("no answer in time".to_owned()),
            }
        }
    }

    async fn call_peer(&self, node: NodeId, call: Call) -> Result<Reply, String> {
        let (transport, _) = self.peers.as_ref().ok_or("this agent has no peers")?;
        let peer = self.peer(node).ok_or("gossip does not know it")?;
        let exchange = async {
            let mut stream = transport.open(peer).await?;
            stream.send_last(&Open::Call(call)).await?;
            stream.receive::<Reply>().await
        };
        exchange.await.map_err(|error: crate::net::NetError| error.to_string())?.ok_or_else(|| "no answer".to_owned())
    }
}

/// Judges a member whose answer nobody waits for any more: pulls that the registry has completed meanwhile would else learn
/// nothing about those who keep silent, and each of them would wait for the same members again.
struct Verdict<'a> {
    tracker: &'a GossipTracker,
    node: NodeId,
    since: Instant,
    received: u64,
    over: bool,
}

impl<'a> Verdict<'a> {
    fn pending(tracker: &'a GossipTracker, node: NodeId) -> Self {
        Self { tracker, node, since: Instant::now(), received: tracker.received(node), over: false }
    }
}

impl Drop for Verdict<'_> {
    fn drop(&mut self) {
        let waited = self.since.elapsed() >= UNANSWERED;
        if !self.over && waited && self.tracker.received(self.node) == self.received {
            self.tracker.member_silent(self.node, self.received);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A home that answers another question than the asked one.
fn confused<T>() -> Result<T, TrackerError> {
    Err(TrackerError::Unreachable { reason: "the answer does not fit the call".to_owned() })
}

impl Tracker for GossipTracker {
    async fn register(&self, node: NodeId, request: RegisterRequest) -> Result<RegisterResponse, TrackerError> {
        match self.call(node, Call::Register(request)).await? {
            Reply::Registered(response) => Ok(response),
            _ => confused(),
        }
    }

    async fn pull_piece(&self, node: NodeId, request: PullPieceRequest) -> Result<PullPieceResponse, TrackerError> {
        match self.call(node, Call::PullPiece(request)).await? {
            Reply::Pulled(response) => Ok(response),
            _ => confused(),
        }
    }

    async fn report_piece(
        &self,
        node: NodeId,
        request: ReportPieceRequest,
    ) -> Result<ReportPieceResponse, TrackerError> {
        match self.call(node, Call::ReportPiece(request)).await? {
            Reply::Reported(response) => Ok(response),
            _ => confused(),
        }
    }

    async fn service_down(&self, node: NodeId, request: ServiceDownRequest) -> Result<(), TrackerError> {
        match self.call(node, Call::ServiceDown(request)).await? {
            Reply::Done => Ok(()),
            _ => confused(),
        }
    }

    async fn report_error(&self, node: NodeId, request: ClientErrorRequest) -> Result<(), TrackerError> {
        match self.call(node, Call::ReportError(request)).await? {
            Reply::Done => Ok(()),
            _ => confused(),
        }
    }
}
