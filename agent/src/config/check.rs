//! Whether values fit each other and this host: what no single key can tell.

use std::net::{IpAddr, SocketAddr};

use super::host;
use super::read::Reader;

/// Where the agent listens; `None` where that is wrong already.
#[derive(Clone, Copy)]
pub(super) struct Listeners {
    pub(super) proxy: Option<SocketAddr>,
    pub(super) peer: Option<SocketAddr>,
    pub(super) gossip: Option<SocketAddr>,
    pub(super) admin: Option<SocketAddr>,
}

/// A socket that the agent opens: the key it comes from, whether it is TCP or UDP, where.
pub(super) type Opened = (&'static str, Protocol, SocketAddr);

/// What a port is a port of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
}

impl Listeners {
    /// All sockets that are opened for these addresses. Peers are reached over both protocols.
    pub(super) fn opened(&self) -> Vec<Opened> {
        use Protocol::{Tcp, Udp};
        let all = [
            ("proxy.listen", Tcp, self.proxy),
            ("peer.listen", Udp, self.peer),
            ("peer.listen", Tcp, self.peer),
            ("gossip.listen", Udp, self.gossip),
            ("admin.listen", Tcp, self.admin),
        ];
        all.into_iter().filter_map(|(key, protocol, listen)| Some((key, protocol, listen?))).collect()
    }

    fn all_loopback(&self) -> Option<bool> {
        let all = [self.proxy?, self.peer?, self.gossip?, self.admin?];
        Some(all.iter().all(|listen| listen.ip().is_loopback()))
    }
}

/// Listeners are on this host's addresses and none takes another's port.
pub(super) fn listeners(reader: &mut Reader<'_>, listeners: &Listeners) {
    let opened = listeners.opened();
    for (at, (key, protocol, listen)) in opened.iter().enumerate() {
        let ip = listen.ip();
        let repeated = opened.iter().take(at).any(|(before, ..)| before == key);
        if !repeated && !ip.is_unspecified() && !host::has(ip) {
            reader.problem(key, format!("{ip} is not an address of this host"));
        }
        let taken = opened.iter().take(at).find(|(_, other, before)| other == protocol && overlap(*before, *listen));
        if let Some((before, ..)) = taken {
            reader.problem(key, format!("port {} is taken by {before} already", listen.port()));
        }
    }
}

/// Whether two sockets of the same protocol get in each other's way. Port 0 is whatever is free.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let covers = |any: SocketAddr, other: SocketAddr| {
        // The IPv6 wildcard takes IPv4 as well.
        any.ip().is_unspecified() && (any.is_ipv6() || other.is_ipv4())
    };
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || covers(a, b) || covers(b, a))
}

/// The address that peers are told. `given` is what the operator wrote, `peers` whether there will be any.
pub(super) fn advertise(
    reader: &mut Reader<'_>,
    given: Option<IpAddr>,
    listeners: &Listeners,
    peers: bool,
) -> Option<IpAddr> {
    const KEY: &str = "node.advertise";
    let Some(ip) = given else {
        return default_advertise(reader, listeners.peer?, listeners.gossip?, listeners, peers);
    };
    let multicast = ip.is_multicast() || matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    if ip.is_unspecified() || multicast {
        // The classic: everybody who is told 0.0.0.0 talks to himself.
        reader.problem(KEY, format!("{ip} is an address that nobody can be reached at"));
        return None;
    }
    if !host::has(ip) {
        reader.problem(KEY, format!("{ip} is not an address of this host"));
        return None;
    }
    if ip.is_loopback() && !listeners.all_loopback()? {
        reader.problem(KEY, format!("{ip} is loopback, which is allowed only if every listener is on loopback"));
        return None;
    }
    let (peer, gossip) = (listeners.peer?, listeners.gossip?);
    let mut reached = true;
    for (key, listen) in [("peer.listen", peer), ("gossip.listen", gossip)] {
        if !reaches(ip, listen) {
            reader.problem(KEY, format!("{ip} does not reach {key}, which is {listen}"));
            reached = false;
        }
    }
    reached.then_some(ip)
}

/// The address that the listeners name, or else the one that this host is known by elsewhere.
fn default_advertise(
    reader: &mut Reader<'_>,
    peer: SocketAddr,
    gossip: SocketAddr,
    listeners: &Listeners,
    peers: bool,
) -> Option<IpAddr> {
    const KEY: &str = "node.advertise";
    let named = [peer, gossip].into_iter().map(|listen| listen.ip()).find(|ip| !ip.is_unspecified());
    let v6 = peer.is_ipv6() && gossip.is_ipv6();
    let v4 = [peer, gossip].iter().all(|listen| listen.is_ipv4() || listen.ip().is_unspecified());
    let ip = named.or_else(|| host::outward(v4, v6));
    if !peers {
        // Nobody is told, so anything will do.
        return Some(ip.unwrap_or_else(|| IpAddr::from([127, 0, 0, 1])));
    }
    let Some(ip) = ip else {
        reader.problem(KEY, "this host has no address that others could reach; name one");
        return None;
    };
    if ip.is_loopback() && !listeners.all_loopback()? {
        reader.problem("peer.listen", "loopback, so that no peer can reach it, while other listeners are not");
        return None;
    }
    if let Some((key, listen)) =
        [("peer.listen", peer), ("gossip.listen", gossip)].into_iter().find(|(_, l)| !reaches(ip, *l))
    {
        reader.problem(key, format!("{listen} is not reached at {ip}, the address that peers would be told"));
        return None;
    }
    Some(ip)
}

/// Whether packets to `ip` arrive at a socket bound to `listen`.
fn reaches(ip: IpAddr, listen: SocketAddr) -> bool {
    if listen.ip().is_unspecified() { ip.is_ipv4() || listen.is_ipv6() } else { listen.ip().to_canonical() == ip }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_overlap() {
        for (a, b, expected) in [
            ("127.0.0.1:1", "127.0.0.1:1", true),
            ("127.0.0.1:1", "127.0.0.2:1", false),
            ("127.0.0.1:1", "127.0.0.1:2", false),
            ("0.0.0.0:1", "127.0.0.1:1", true),
            ("0.0.0.0:1", "[::1]:1", false),
            ("[::]:1", "127.0.0.1:1", true),
            ("[::]:1", "0.0.0.0:1", true),
            ("127.0.0.1:0", "127.0.0.1:0", false),
        ] {
            let (a, b) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!(overlap(a, b), expected, "{a} {b}");
            assert_eq!(overlap(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn listeners_are_reached_at_their_own_addresses() {
        for (ip, listen, expected) in [
            ("10.0.0.1", "0.0.0.0:1", true),
            ("10.0.0.1", "[::]:1", true),
            ("fd00::1", "[::]:1", true),
            ("fd00::1", "0.0.0.0:1", false),
            ("10.0.0.1", "10.0.0.1:1", true),
            ("10.0.0.1", "10.0.0.2:1", false),
        ] {
            assert_eq!(reaches(ip.parse().unwrap(), listen.parse().unwrap()), expected, "{ip} {listen}");
        }
    }
}
