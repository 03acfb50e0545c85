//! Loopback addresses for a registry and its agents, so that each has the usual ports to itself.
//!
//! All of 127.0.0.0/8 is the host's own on Linux. Where only 127.0.0.1 is, everybody lives there on free ports.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

/// The ports of an agent that has an address to itself.
const PROXY_PORT: u16 = 65_001;
const PEER_PORT: u16 = 15_001;
const GOSSIP_PORT: u16 = 8002;
const ADMIN_PORT: u16 = 15_003;

/// Networks of 256 addresses below 127.77.0.0, one for each cluster that runs at the same time.
const NETWORKS: std::ops::RangeInclusive<u8> = 0..=255;

/// The port by which a network is claimed: whoever listens there, at the registry's address, has it.
const CLAIM_PORT: u16 = PROXY_PORT;

/// How often a free port is looked for: it must be free for TCP and UDP.
const PORT_TRIES: usize = 100;

/// A range of addresses that no other cluster of this machine uses while it is held.
#[derive(Debug)]
pub struct Subnet {
    /// The third part of the addresses; `None` where only 127.0.0.1 works.
    network: Option<u8>,
    _claim: Option<TcpListener>,
}

/// Where an agent listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// For container runtimes.
    pub proxy: SocketAddr,
    /// For pieces and tracker calls, over UDP and TCP.
    pub peer: SocketAddr,
    /// For gossip, over UDP.
    pub gossip: SocketAddr,
    /// For health and metrics.
    pub admin: SocketAddr,
}

impl Subnet {
    /// Takes a range that is free.
    ///
    /// # Errors
    /// If all are taken.
    pub fn claim() -> io::Result<Self> {
        for network in NETWORKS {
            match TcpListener::bind((host(Some(network), 1), CLAIM_PORT)) {
                Ok(claim) => return Ok(Self { network: Some(network), _claim: Some(claim) }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    return Ok(Self { network: None, _claim: None });
                }
                Err(error) => return Err(error),
            }
        }
        // Perhaps something listens on that port at every address.
        Ok(Self { network: None, _claim: None })
    }

    /// The address that is meant for the registry.
    #[must_use]
    pub fn registry(&self) -> IpAddr {
        host(self.network, 1)
    }

    /// Addresses for `count` agents, at most 253: the usual ports where they are free, others where not, but none that the
    /// registry listens on, since an agent dials no port of its own on its own host.
    pub(super) fn agents(&self, count: usize, registry: u16) -> io::Result<Vec<Addresses>> {
        let mut taken = BTreeSet::new();
        let last_parts = 2..=u8::MAX - 1;
        last_parts.take(count).map(|last| Addresses::choose(host(self.network, last), registry, &mut taken)).collect()
    }
}

fn host(network: Option<u8>, last: u8) -> IpAddr {
    network.map_or(Ipv4Addr::LOCALHOST, |network| Ipv4Addr::new(127, 77, network, last)).into()
}

impl Addresses {
    fn choose(ip: IpAddr, registry: u16, taken: &mut BTreeSet<SocketAddr>) -> io::Result<Self> {
        Ok(Self {
            proxy: free(ip, PROXY_PORT, registry, taken)?,
            peer: free(ip, PEER_PORT, registry, taken)?,
            gossip: free(ip, GOSSIP_PORT, registry, taken)?,
            admin: free(ip, ADMIN_PORT, registry, taken)?,
        })
    }
}

/// A port of `ip` that is free for TCP and UDP, not `registry`, and not in `taken`, which it is added to. Nothing holds it: another
/// process may still be quicker, and then the agent says so.
fn free(ip: IpAddr, preferred: u16, registry: u16, taken: &mut BTreeSet<SocketAddr>) -> io::Result<SocketAddr> {
    let mut failure = io::Error::from(io::ErrorKind::AddrInUse);
    let ports = std::iter::once(preferred).chain(std::iter::repeat_n(0, PORT_TRIES));
    for port in ports {
        let opened = TcpListener::bind((ip, port)).and_then(|listener| {
            let address = listener.local_addr()?;
            UdpSocket::bind(address).map(|_| address)
        });
        match opened {
            Ok(address) if address.port() != registry && taken.insert(address) => return Ok(address),
            Ok(_) => {}
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn two_clusters_have_nothing_in_common() {
        let (one, other) = (Subnet::claim().unwrap(), Subnet::claim().unwrap());
        let all: Vec<Addresses> = [one.agents(5, 0).unwrap(), other.agents(5, 0).unwrap()].concat();
        let sockets = all.iter().flat_map(|own| [own.proxy, own.peer, own.gossip, own.admin]);
        assert_eq!(sockets.clone().collect::<BTreeSet<_>>().len(), 40);
        assert!(sockets.clone().all(|socket| socket.ip().is_loopback() && socket.port() != 0));
        if one.network.is_some() && other.network.is_some() {
            assert_ne!(one.registry(), other.registry());
        }
    }

    #[test]
    fn everybody_fits_on_one_address() {
        let subnet = Subnet { network: None, _claim: None };
        let all = subnet.agents(10, 0).unwrap();
        let sockets: BTreeSet<_> = all.iter().flat_map(|own| [own.proxy, own.peer, own.gossip, own.admin]).collect();
        assert_eq!(sockets.len(), 40);
        assert!(sockets.iter().all(|socket| socket.ip() == Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn a_port_that_is_taken_is_replaced() {
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let udp = UdpSocket::bind((ip, 0)).unwrap();
        let address = udp.local_addr().unwrap();
        assert_ne!(free(ip, address.port(), 0, &mut BTreeSet::new()).unwrap(), address);
    }
}
