//! Hosts and ports as clients and the configuration write them, parsed once and compared in one form.
//!
//! Not here: resolving names, or deciding which addresses may be dialled; the dial filter does both.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// Longest DNS name in text form (RFC 1035, section 2.3.4, less the root).
const HOST_BYTES_MAX: usize = 253;

/// Ports that a pattern without a port stands for where it decides what may be reached: the two that URLs imply.
const IMPLIED_PORTS: [u16; 2] = [443, 80];

/// A host and a port. The host is lower-case; an IPv6 address is in its canonical form, without brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Why a text is not a host, or not a host and a port. Whoever wrote it has to change it; nothing happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not a DNS name, an IPv4 address or an IPv6 address in brackets.
    #[error("not a host name or address")]
    Host,
    /// Not a number from 1 to 65535.
    #[error("not a port")]
    Port,
    /// A port is needed and there is none.
    #[error("the port is missing")]
    NoPort,
}

impl HostPort {
    /// Parses `host`, `host:port`, `[v6]` or `[v6]:port`.
    ///
    /// # Errors
    /// If the text is none of these, or has no port and there is no `implied_port`.
    pub fn parse(text: &str, implied_port: Option<u16>) -> Result<Self, AddressError> {
        let (host, port) = split(text)?;
        let port = port.or(implied_port).ok_or(AddressError::NoPort)?;
        Ok(Self { host: parse_host(host)?, port })
    }

    /// The host, in lower case, an IPv6 address without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How a URL or a Host header of that scheme names it: without the port that the scheme implies.
    #[must_use]
    pub fn authority(&self, scheme: &http::uri::Scheme) -> String {
        let implied = if *scheme == http::uri::Scheme::HTTPS { 443 } else { 80 };
        if self.port == implied { bracketed(&self.host) } else { self.to_string() }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.port)
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// Which hosts the configuration means: `host`, `host:port`, `*.suffix` or `*.suffix:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    /// `Err` holds the suffix with its dot.
    name: Result<String, String>,
    port: Option<u16>,
}

impl HostPattern {
    /// Exactly this host and port.
    #[must_use]
    pub fn exactly(address: &HostPort) -> Self {
        Self { name: Ok(address.host.clone()), port: Some(address.port) }
    }

    /// Whether the address is meant; a pattern without a port means every port.
    #[must_use]
    pub fn matches(&self, address: &HostPort) -> bool {
        self.port.is_none_or(|port| port == address.port) && self.names(&address.host)
    }

    /// Whether the pattern opens the way to the address: as [`Self::matches`], but without a port only 443 and 80 are
    /// meant, so that naming a registry does not open its ssh port.
    #[must_use]
    pub fn opens(&self, address: &HostPort) -> bool {
        self.matches(address) && (self.port.is_some() || IMPLIED_PORTS.contains(&address.port))
    }

    fn names(&self, host: &str) -> bool {
        match &self.name {
            Ok(exact) => exact == host,
            // `*.suffix` is not the suffix itself, and the star stands for at least one character.
            Err(suffix) => host.len() > suffix.len() && host.ends_with(suffix.as_str()),
        }
    }
}

impl FromStr for HostPattern {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (name, port) = split(text)?;
        let name = match name.strip_prefix("*.") {
            Some(suffix) => Err(format!(".{}", parse_host(suffix)?)),
            None => Ok(parse_host(name)?),
        };
        Ok(Self { name, port })
    }
}

/// Splits off a port, minding that IPv6 addresses have colons of their own.
fn split(text: &str) -> Result<(&str, Option<u16>), AddressError> {
    let colon = match text.rfind(']') {
        Some(bracket) => text[bracket..].find(':').map(|at| bracket + at),
        None => text.find(':'),
    };
    let Some(colon) = colon else { return Ok((text, None)) };
    let digits = &text[colon + 1..];
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(AddressError::Port);
    }
    match digits.parse() {
        Ok(0) | Err(_) => Err(AddressError::Port),
        Ok(port) => Ok((&text[..colon], Some(port))),
    }
}

fn parse_host(text: &str) -> Result<String, AddressError> {
    if let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().map(|address| address.to_string()).map_err(|_| AddressError::Host);
    }
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let dots = text.starts_with('.') || text.contains("..");
    if text.is_empty() || text.len() > HOST_BYTES_MAX || dots || !text.bytes().all(good) {
        return Err(AddressError::Host);
    }
    Ok(text.to_ascii_lowercase())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(text: &str) -> HostPort {
        HostPort::parse(text, None).unwrap()
    }

    #[test]
    fn addresses_are_parsed_and_written_in_one_form() {
        for (text, host, port, https) in [
            ("Registry.Example.ORG:443", "registry.example.org", 443, "registry.example.org"),
            ("10.77.0.1:5000", "10.77.0.1", 5000, "10.77.0.1:5000"),
            ("[0:0::1]:5000", "::1", 5000, "[::1]:5000"),
            ("[::1]:443", "::1", 443, "[::1]"),
        ] {
            let address = at(text);
            assert_eq!((address.host(), address.port()), (host, port), "{text}");
            assert_eq!(address.authority(&http::uri::Scheme::HTTPS), https, "{text}");
        }
        for (text, error) in [
            ("", AddressError::NoPort),
            (":1", AddressError::Host),
            ("h", AddressError::NoPort),
            ("h:", AddressError::Port),
            ("h:0", AddressError::Port),
            ("h:+1", AddressError::Port),
            ("h:65536", AddressError::Port),
            ("a:1:2", AddressError::Port),
            ("::1:5000", AddressError::Port),
            ("[::1", AddressError::Port),
            ("[nope]:1", AddressError::Host),
            ("user@h:1", AddressError::Host),
            ("a..b:1", AddressError::Host),
            ("a/b:1", AddressError::Host),
            ("é:1", AddressError::Host),
        ] {
            assert_eq!(HostPort::parse(text, None), Err(error), "{text}");
        }
    }

    #[test]
    fn patterns_mean_hosts_ports_and_suffixes() {
        for (pattern, address, matches, opens) in [
            ("registry.example.org", "registry.example.org:443", true, true),
            ("registry.example.org", "registry.example.org:22", true, false),
            ("Registry.example.org:5000", "registry.example.org:5000", true, true),
            ("registry.example.org:5000", "registry.example.org:443", false, false),
            ("registry.example.org", "evilregistry.example.org:443", false, false),
            ("*.example.org", "a.example.org:443", true, true),
            ("*.example.org", "a.b.example.org:80", true, true),
            ("*.example.org", "example.org:443", false, false),
            ("*.example.org", "badexample.org:443", false, false),
            ("*.example.org:5000", "a.example.org:5000", true, true),
            ("[::1]:5000", "[::1]:5000", true, true),
        ] {
            let pattern: HostPattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(&at(address)), matches, "{pattern:?} {address}");
            assert_eq!(pattern.opens(&at(address)), opens, "{pattern:?} {address}");
        }
        assert!("*".parse::<HostPattern>().is_err());
        assert!("*.".parse::<HostPattern>().is_err());
        assert!("a.*.b".parse::<HostPattern>().is_err());
    }
}
