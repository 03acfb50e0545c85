//! What the configuration must know of this host: its name, its addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Where packets to other networks would go: addresses for documentation (RFC 5737, RFC 3849), so that even a mistake
/// could reach nobody. Connecting a datagram socket sends nothing, it only asks the kernel for a route.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Discard; any port but 0 will do.
const PORT: u16 = 9;

/// The name of this host.
#[must_use]
pub fn name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Whether a socket can be bound to `ip`, which is whether it is one of this host's.
///
/// Says yes to everything where `ip_nonlocal_bind` is set; whoever sets that takes care of his addresses himself.
#[must_use]
pub fn has(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

/// The address of this host that others reach it at, as far as it can tell: the one that packets to other networks
/// leave from, else one on a network that is directly attached. IPv4 first, where `v4` and `v6` allow both.
#[must_use]
pub fn outward(v4: bool, v6: bool) -> Option<IpAddr> {
    let wanted = |ip: &IpAddr| if ip.is_ipv4() { v4 } else { v6 };
    let attached = attached();
    ELSEWHERE.into_iter().chain(attached).filter(wanted).find_map(source)
}

/// The address that packets to `destination` would leave from, if others could answer to it.
fn source(destination: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(SocketAddr::new(destination, PORT)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    (!ip.is_loopback() && !ip.is_unspecified() && !link_local).then_some(ip)
}

/// An address on every network that is directly attached, for hosts without a default route.
fn attached() -> Vec<IpAddr> {
    let v4 = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
    let v6 = std::fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    v4.lines().filter_map(network_v4).map(IpAddr::V4).chain(v6.lines().filter_map(own_v6).map(IpAddr::V6)).collect()
}

/// The first address of a line's network in the kernel's table of routes, as proc(5) describes it.
fn network_v4(line: &str) -> Option<Ipv4Addr> {
    let destination = u32::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()?;
    // The kernel prints the address as its own integer, whose bytes lie in memory in network order.
    let destination = u32::from_be_bytes(destination.to_ne_bytes());
    (destination != 0).then(|| Ipv4Addr::from(destination | 1))
}

/// The address in a line of the kernel's table of IPv6 addresses.
fn own_v6(line: &str) -> Option<Ipv6Addr> {
    u128::from_str_radix(line.split_whitespace().next()?, 16).ok().map(Ipv6Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_ours_and_documentation_is_not() {
        assert!(has(Ipv4Addr::LOCALHOST.into()));
        assert!(has(Ipv4Addr::new(127, 9, 9, 9).into()));
        assert!(!has(Ipv4Addr::new(203, 0, 113, 7).into()));
    }

    #[test]
    fn what_is_found_is_ours() {
        assert!(!name().is_empty());
        for (v4, v6) in [(true, false), (false, true), (true, true)] {
            if let Some(ip) = outward(v4, v6) {
                assert!(has(ip) && !ip.is_loopback(), "{ip}");
                assert!(if ip.is_ipv4() { v4 } else { v6 });
            }
        }
        assert_eq!(outward(false, false), None);
    }

    #[test]
    fn kernel_tables_are_read() {
        let route = format!("eth0\t{:08X}\t00000000\t0001", u32::from_ne_bytes([10, 77, 3, 0]));
        assert_eq!(network_v4(&route), Some(Ipv4Addr::new(10, 77, 3, 1)));
        assert_eq!(network_v4("Iface\tDestination\tGateway"), None);
        assert_eq!(network_v4("eth0\t00000000\t0102000A\t0003"), None);
        assert_eq!(
            own_v6("fd000000000000000000000000000002 02 40 00 80 eth0"),
            Some("fd00::2".parse().unwrap_or(Ipv6Addr::UNSPECIFIED))
        );
    }
}
