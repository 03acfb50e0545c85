//! Who a member is, on the wire of SWIM and for the rest of the agent.
//!
//! An [`Identity`] is about 35 bytes in postcard: what fits in a packet decides how fast a cluster learns itself. Name
//! and zone label are exchanged when peers first talk. Not here: proof. Gossip believes whoever holds the secret; a
//! member's key is proven when peers connect.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use darter_tracker::{NodeId, Role};
use serde::{Deserialize, Serialize};

/// A live member of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// The hash of its public key; a restarted agent has another.
    pub id: NodeId,
    /// Where it gossips.
    pub gossip: SocketAddr,
    /// Where it answers peers; the same host as `gossip`.
    pub peer: SocketAddr,
    /// Decides between two members that claim one gossip address: the higher epoch is the living one.
    pub epoch: u64,
    /// What it is there for.
    pub role: Role,
    /// The number of its zone; 0 is no zone.
    pub zone: u16,
}

/// The cluster as one member sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// This member.
    pub me: Member,
    /// The others that are alive, ordered.
    pub members: BTreeMap<NodeId, Member>,
}

/// A member as SWIM names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub(super) struct Identity {
    ip: IpAddr,
    gossip_port: u16,
    peer_port: u16,
    pub(super) epoch: u64,
    role: Role,
    zone: u16,
    pub(super) node: NodeId,
}

type Wire = (IpAddr, u16, u16, u64, Role, u16, NodeId);

impl Identity {
    pub(super) fn of(member: &Member) -> Self {
        Self {
            ip: member.gossip.ip().to_canonical(),
            gossip_port: member.gossip.port(),
            peer_port: member.peer.port(),
            epoch: member.epoch,
            role: member.role,
            zone: member.zone,
            node: member.id,
        }
    }

    /// Whoever listens at `gossip`: enough to announce to somebody whose name is not known.
    pub(super) fn at(gossip: SocketAddr) -> Self {
        // No key has this hash that anybody could find.
        let (ip, node) = (gossip.ip().to_canonical(), NodeId::from_bytes([0; NodeId::BYTES]));
        Self { ip, gossip_port: gossip.port(), peer_port: 0, epoch: 0, role: Role::Node, zone: 0, node }
    }

    /// Whether this names an address only, not a member.
    pub(super) fn is_anonymous(&self) -> bool {
        self.node == NodeId::from_bytes([0; NodeId::BYTES])
    }

    pub(super) fn member(&self) -> Member {
        Member {
            id: self.node,
            gossip: SocketAddr::new(self.ip, self.gossip_port),
            peer: SocketAddr::new(self.ip, self.peer_port),
            epoch: self.epoch,
            role: self.role,
            zone: self.zone,
        }
    }
}

impl foca::Identity for Identity {
    type Addr = SocketAddr;

    /// None: [`super::Membership`] renews by itself, as it knows what epochs it heard and how often it did so lately.
    fn renew(&self) -> Option<Self> {
        None
    }

    fn addr(&self) -> SocketAddr {
        SocketAddr::new(self.ip, self.gossip_port)
    }

    /// The higher epoch wins. The other fields only break ties, so that all members decide alike.
    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        let rank = |identity: &Self| (identity.epoch, identity.node, identity.peer_port, identity.zone, identity.role);
        rank(self) > rank(adversary)
    }
}

impl TryFrom<Wire> for Identity {
    type Error = &'static str;

    /// Refuses addresses that would make members send to somebody who is no single host.
    fn try_from((ip, gossip_port, peer_port, epoch, role, zone, node): Wire) -> Result<Self, Self::Error> {
        let ip = ip.to_canonical();
        if ip.is_unspecified() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST || gossip_port == 0 {
            return Err("a member has the address of one host");
        }
        Ok(Self { ip, gossip_port, peer_port, epoch, role, zone, node })
    }
}

impl From<Identity> for Wire {
    fn from(of: Identity) -> Self {
        (of.ip, of.gossip_port, of.peer_port, of.epoch, of.role, of.zone, of.node)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use foca::Identity as _;

    fn member() -> Member {
        Member {
            id: NodeId::from_bytes([7; 16]),
            gossip: "10.1.2.3:8002".parse().unwrap(),
            peer: "10.1.2.3:15001".parse().unwrap(),
            epoch: 1_800_000_000,
            role: Role::Seed,
            zone: 300,
        }
    }

    #[test]
    fn an_identity_is_small_and_comes_back_whole() {
        let identity = Identity::of(&member());
        let bytes = postcard::to_stdvec(&identity).unwrap();
        assert!(bytes.len() <= 40, "{} bytes", bytes.len());
        assert_eq!(postcard::from_bytes::<Identity>(&bytes).unwrap().member(), member());
    }

    #[test]
    fn addresses_of_nobody_are_refused() {
        for ip in ["0.0.0.0", "255.255.255.255", "224.0.0.1", "::", "ff02::1", "::ffff:0.0.0.0"] {
            let wire: Wire = (ip.parse().unwrap(), 1, 1, 1, Role::Node, 0, NodeId::from_bytes([0; 16]));
            let bytes = postcard::to_stdvec(&wire).unwrap();
            assert!(postcard::from_bytes::<Identity>(&bytes).is_err(), "{ip}");
        }
    }

    #[test]
    fn exactly_one_of_two_wins_an_address() {
        let old = Identity::of(&member());
        let new = Identity { epoch: old.epoch + 1, node: NodeId::from_bytes([0; 16]), ..old };
        let twin = Identity { node: NodeId::from_bytes([8; 16]), ..old };
        for (winner, loser) in [(new, old), (twin, old), (new, twin)] {
            assert!(winner.win_addr_conflict(&loser) && !loser.win_addr_conflict(&winner));
        }
        assert!(!old.win_addr_conflict(&old));
    }
}
