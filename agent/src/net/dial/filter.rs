//! Which addresses the agent connects to on behalf of others (S2).
//!
//! Private networks are allowed, since that is where registries are. What is refused is what a request could only want
//! in order to turn the agent against its own host or cloud: loopback, link-local, metadata services, broadcast and
//! multicast, and the agent itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Why an address is not connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RefusedAddress {
    /// A cloud's metadata or credential service. Refused even where configured.
    #[error("a metadata service")]
    Metadata,
    /// 127.0.0.0/8 or ::1, which reaches what trusts this host. Allowed for configured hosts.
    #[error("a loopback address")]
    Loopback,
    /// 169.254.0.0/16 or fe80::/10. Allowed for configured hosts.
    #[error("a link-local address")]
    LinkLocal,
    /// 0.0.0.0/8 and ::, which many systems take for loopback. Refused even where configured.
    #[error("an unspecified address")]
    Unspecified,
    /// Multicast, broadcast, and what is reserved. Refused even where configured.
    #[error("not the address of one host")]
    NotUnicast,
    /// A port that this agent listens on, at an address of this host. Refused even where configured.
    #[error("this agent itself")]
    Own,
}

/// Metadata and credential services of clouds: EC2, ECS, EKS, GCP (all but the last at the same address), Alibaba,
/// Oracle, Azure's wire server.
const METADATA_V4: [Ipv4Addr; 6] = [
    Ipv4Addr::new(169, 254, 169, 254),
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(169, 254, 170, 23),
    Ipv4Addr::new(100, 100, 100, 200),
    Ipv4Addr::new(192, 0, 0, 192),
    Ipv4Addr::new(168, 63, 129, 16),
];

/// The same over IPv6: EC2, EKS, GCP.
const METADATA_V6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x23),
    Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254),
];

/// Judges one address. `local` says that its host was configured by name.
///
/// # Errors
/// Says why it is refused.
pub fn judge(address: SocketAddr, local: bool, own_ports: &[u16]) -> Result<(), RefusedAddress> {
    let kind = match address.ip() {
        IpAddr::V4(ip) => v4(ip),
        IpAddr::V6(ip) => v6(ip),
    };
    match kind {
        Some(RefusedAddress::Loopback | RefusedAddress::LinkLocal) if local => {}
        Some(reason) => return Err(reason),
        None => {}
    }
    if own_ports.contains(&address.port()) && is_own(address.ip()) { Err(RefusedAddress::Own) } else { Ok(()) }
}

fn v4(ip: Ipv4Addr) -> Option<RefusedAddress> {
    if METADATA_V4.contains(&ip) {
        Some(RefusedAddress::Metadata)
    } else if ip.octets()[0] == 0 {
        Some(RefusedAddress::Unspecified)
    } else if ip.is_loopback() {
        Some(RefusedAddress::Loopback)
    } else if ip.is_link_local() {
        Some(RefusedAddress::LinkLocal)
    } else if ip.is_multicast() || ip.octets()[0] >= 240 {
        Some(RefusedAddress::NotUnicast)
    } else {
        None
    }
}

fn v6(ip: Ipv6Addr) -> Option<RefusedAddress> {
    if METADATA_V6.contains(&ip) {
        Some(RefusedAddress::Metadata)
    } else if ip.is_unspecified() {
        Some(RefusedAddress::Unspecified)
    } else if ip.is_loopback() {
        Some(RefusedAddress::Loopback)
    } else if ip.is_unicast_link_local() {
        Some(RefusedAddress::LinkLocal)
    } else if ip.is_multicast() {
        Some(RefusedAddress::NotUnicast)
    } else {
        embedded(ip).and_then(v4)
    }
}

/// The IPv4 address that an IPv6 address leads to: mapped, compatible, translated (RFC 2765), NAT64 (RFC 6052, and RFC 8215
/// at its full length), 6to4 (RFC 3056), Teredo (RFC 4380, which hides it) and ISATAP (RFC 5214).
fn embedded(ip: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = ip.segments();
    let from = |high: u16, low: u16| {
        let ([w, x], [y, z]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(w, x, y, z)
    };
    match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0 | 0xffff) | (0x64, 0xff9b, 0, 0, 0, 0) => Some(from(g, h)),
        (0, 0, 0, 0, 0xffff, 0) | (0x64, 0xff9b, 1, ..) => Some(from(g, h)),
        (0x2002, ..) => Some(from(b, c)),
        (0x2001, 0, ..) => Some(from(!g, !h)),
        (_, _, _, _, 0 | 0x200, 0x5efe) => Some(from(g, h)),
        _ => None,
    }
}

/// Whether an address is this host's: exactly those can be bound. Where the system lets everything be bound
/// (ip_nonlocal_bind) every address counts as own, which errs on the side of refusing.
fn is_own(ip: IpAddr) -> bool {
    UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn verdict(ip: &str, local: bool) -> Result<(), RefusedAddress> {
        judge(SocketAddr::new(ip.parse().unwrap(), 443), local, &[])
    }

    #[test]
    fn refuses_what_turns_the_agent_against_its_network() {
        use RefusedAddress::*;
        for (ip, reason) in [
            ("127.0.0.1", Loopback),
            ("127.255.0.3", Loopback),
            ("::1", Loopback),
            ("::ffff:127.0.0.1", Loopback),
            ("::127.0.0.1", Loopback),
            ("64:ff9b::7f00:1", Loopback),
            ("2002:7f00:1::", Loopback),
            ("::ffff:0:127.0.0.1", Loopback),
            ("64:ff9b:1::7f00:1", Loopback),
            ("2001:0:102:304:0:ffff:80ff:fffe", Loopback),
            ("2001:db8::5efe:127.0.0.1", Loopback),
            ("169.254.1.1", LinkLocal),
            ("fe80::1", LinkLocal),
            ("::ffff:169.254.1.1", LinkLocal),
        ] {
            assert_eq!(verdict(ip, false), Err(reason), "{ip}");
            assert_eq!(verdict(ip, true), Ok(()), "{ip} configured");
        }
        for (ip, reason) in [
            ("169.254.169.254", Metadata),
            ("169.254.170.2", Metadata),
            ("::ffff:169.254.169.254", Metadata),
            ("64:ff9b::a9fe:a9fe", Metadata),
            ("2002:a9fe:a9fe::1", Metadata),
            ("100.100.100.200", Metadata),
            ("168.63.129.16", Metadata),
            ("fd00:ec2::254", Metadata),
            ("0.0.0.0", Unspecified),
            ("0.1.2.3", Unspecified),
            ("::", Unspecified),
            ("224.0.0.1", NotUnicast),
            ("255.255.255.255", NotUnicast),
            ("ff02::1", NotUnicast),
        ] {
            assert_eq!(verdict(ip, false), Err(reason), "{ip}");
            assert_eq!(verdict(ip, true), Err(reason), "{ip} configured");
        }
        for ip in [
            "10.77.0.1",
            "192.168.1.1",
            "172.17.0.1",
            "100.64.0.1",
            "8.8.8.8",
            "fd00::1",
            "2001:db8::1",
            "64:ff9b::808:808",
            "2001:db8::5efe:10.0.0.1",
        ] {
            assert_eq!(verdict(ip, false), Ok(()), "{ip}");
        }
    }

    #[test]
    fn own_ports_are_refused_on_own_addresses_alone() {
        let at = |ip: &str, port| judge(SocketAddr::new(ip.parse().unwrap(), port), true, &[65001]);
        assert_eq!(at("127.0.0.1", 65001), Err(RefusedAddress::Own));
        assert_eq!(at("127.0.0.1", 5000), Ok(()));
        // TEST-NET-1 is nobody's.
        assert_eq!(at("192.0.2.1", 65001), Ok(()));
    }
}
