//! Who is in the cluster and who has which task: the socket, the clock and the randomness around
//! [`darter_swarm::membership`] and [`darter_swarm::holdings`].
//!
//! One task owns all of it: `drive` takes datagrams, deadlines and wishes to the core and carries out what it decides.
//! `socket` is the UDP socket, `outbox` holds back what this node wants to say faster than gossip carries it. The
//! [`Gossip`] handle only reads what that task has published, or sends it a wish.
//!
//! Not here: which nodes may speak about a task (its home says so), where seeds come from (discovery), what is done
//! with a member that died (the data path has its own deadlines and does not wait for this).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use darter_swarm::holdings::Holdings;
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_swarm::membership::{Membership, MembershipError};
use darter_swarm::rendezvous;
use darter_tracker::{EventBody, Geometry, NodeId, Role, TaskId};
use rand::SeedableRng;
use rand::rngs::{StdRng, SysRng};
use tokio::sync::{Mutex, broadcast, mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::admin::metrics::Metrics;

pub mod tracker;

mod drive;
mod outbox;
mod socket;

pub use darter_swarm::membership::{Member, MembershipEvent, Roster};

use drive::{Driver, Wish};
use socket::Socket;

/// Wishes under way to the owner task, which takes them at once; beyond that, events are dropped and counted.
const WISHES_MAX: usize = 256;
/// News kept for a receiver that lags; it is told how much it missed and reads the roster instead.
const NEWS_MAX: usize = 1024;
/// How long leaving takes at the most, whatever the network does.
pub(crate) const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

/// What gossip is told by the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to listen. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// The address that others reach this node at.
    pub advertise: IpAddr,
    /// The port that it answers peers at.
    pub peer_port: u16,
    /// What this node is there for.
    pub role: Role,
    /// The number of its zone; 0 is none.
    pub zone: u16,
}

/// Why gossip did not start. Nothing runs then.
#[derive(Debug, thiserror::Error)]
pub enum GossipError {
    /// The address is taken or not this host's; the operator's to solve.
    #[error("cannot listen for gossip at {address}")]
    Bind {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody could send anything there; the operator's mistake.
    #[error("{0} is not an address that others can reach this node at")]
    Advertise(IpAddr),
    /// The system gave no random numbers.
    #[error("the system gives no random numbers")]
    Randomness,
    /// The crypto library failed.
    #[error(transparent)]
    Membership(#[from] MembershipError),
}

/// A running gossip task. Dropping it stops the task without telling anybody; [`Self::leave`] is the polite way.
pub struct Gossip {
    local: SocketAddr,
    wishes: mpsc::Sender<Wish>,
    roster: watch::Receiver<Arc<Roster>>,
    holdings: Arc<RwLock<Holdings>>,
    news: broadcast::Sender<MembershipEvent>,
    metrics: Arc<Metrics>,
    task: Mutex<Option<AbortOnDropHandle<()>>>,
}

impl Gossip {
    /// Binds the socket and starts the task; must be called within a tokio runtime. The boot epoch is the one that
    /// `node` was made for. `seeds` is followed for as long as its sender lives; this node's own address in it is
    /// ignored.
    ///
    /// # Errors
    /// Says what the operator or the system must change.
    pub fn start(
        settings: &Settings,
        keys: Arc<ClusterKeys>,
        node: Arc<NodeKey>,
        seeds: watch::Receiver<BTreeSet<SocketAddr>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, GossipError> {
        if settings.advertise.is_unspecified() || settings.advertise.is_multicast() {
            return Err(GossipError::Advertise(settings.advertise));
        }
        let bind_error = |source| GossipError::Bind { address: settings.listen, source };
        let socket = Socket::bind(settings.listen).map_err(bind_error)?;
        let local = socket.local_addr().map_err(bind_error)?;
        let me = Member {
            id: node.id(),
            gossip: SocketAddr::new(settings.advertise, local.port()),
            peer: SocketAddr::new(settings.advertise, settings.peer_port),
            epoch: node.signer().epoch,
            role: settings.role,
            zone: settings.zone,
        };
        let rng = StdRng::try_from_rng(&mut SysRng).map_err(|_| GossipError::Randomness)?;
        let membership = Membership::new(me, keys, node, rng)?;
        metrics.members.set(1);
        let roster = Roster { me: *membership.me(), members: membership.members().clone() };
        let (roster_sender, roster) = watch::channel(Arc::new(roster));
        let (wishes, wish_receiver) = mpsc::channel(WISHES_MAX);
        let (news, _) = broadcast::channel(NEWS_MAX);
        let holdings = Arc::new(RwLock::new(Holdings::default()));
        let driver = Driver::new(drive::Parts {
            socket,
            membership,
            wishes: wish_receiver,
            seeds,
            roster: roster_sender,
            holdings: holdings.clone(),
            news: news.clone(),
            metrics: metrics.clone(),
        });
        let task = Mutex::new(Some(AbortOnDropHandle::new(tokio::spawn(driver.run()))));
        Ok(Self { local, wishes, roster, holdings, news, metrics, task })
    }

    /// Where the socket listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The live members, always as of now.
    #[must_use]
    pub fn roster(&self) -> watch::Receiver<Arc<Roster>> {
        self.roster.clone()
    }

    /// What happens from now on. A receiver that lags misses the oldest news and is told so.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MembershipEvent> {
        self.news.subscribe()
    }

    /// Says something to every member, soon: a few times a second, later events replacing waiting ones on the same
    /// subject. What waits too long is dropped and counted; nothing here is needed for a download to finish.
    pub fn publish(&self, body: EventBody) {
        if self.wishes.try_send(Wish::Publish(body)).is_err() {
            self.metrics.gossip_events_dropped.inc();
        }
    }

    /// Which other live members have, or are getting, `task`, with how many quarters of it: 0 is a start, 4 is all.
    #[must_use]
    pub fn holders(&self, task: &TaskId) -> Vec<(NodeId, u8)> {
        let mut holders = self.holdings.read().unwrap_or_else(PoisonError::into_inner).holders(task);
        let roster = self.roster.borrow();
        holders.retain(|(node, _)| roster.members.contains_key(node));
        holders
    }

    /// What other live members are known to have, or to be getting: quarters per task and address where they serve it.
    #[must_use]
    pub fn known(&self) -> BTreeMap<TaskId, BTreeMap<SocketAddr, u8>> {
        let holdings = self.holdings.read().unwrap_or_else(PoisonError::into_inner);
        let roster = self.roster.borrow();
        let address = |(node, quarters)| Some((roster.members.get(&node)?.peer, quarters));
        let tasks = holdings.tasks().map(|(task, holders)| (task, holders.into_iter().filter_map(address).collect()));
        tasks.filter(|(_, holders): &(TaskId, BTreeMap<_, _>)| !holders.is_empty()).collect()
    }

    /// Where the home of `task` and its stand-bys answer, best first, going by nothing but who is alive.
    #[must_use]
    pub fn homes(&self, task: &TaskId) -> Vec<SocketAddr> {
        let roster = self.roster.borrow();
        let members = || std::iter::once(&roster.me).chain(roster.members.values());
        let order = rendezvous::order(task, members().map(|member| (member.id, member.role)));
        let addresses = order.into_iter().filter_map(|id| members().find(|member| member.id == id));
        addresses.take(tracker::HOMES).map(|member| member.peer).collect()
    }

    /// How `task` is cut, if anybody said so.
    #[must_use]
    pub fn geometry(&self, task: &TaskId) -> Option<Geometry> {
        self.holdings.read().unwrap_or_else(PoisonError::into_inner).geometry(task)
    }

    /// Tells the others that this node goes and closes the socket; takes at most a second. Once is enough.
    pub async fn leave(&self) {
        let Some(mut task) = self.task.lock().await.take() else { return };
        let farewell = async {
            if self.wishes.send(Wish::Leave).await.is_ok()
                && let Err(error) = (&mut task).await
            {
                tracing::error!(%error, "gossip had failed");
            }
        };
        if tokio::time::timeout(LEAVE_TIMEOUT, farewell).await.is_err() {
            tracing::warn!("the others may not have heard that this node leaves");
        }
    }
}

#[cfg(test)]
mod tests;
