//! Hosts as they are named in a configuration: `host`, `host:port`, and `*.suffix` where a pattern is meant.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use darter_discovery::fixed::is_host_name;

/// A host by name or number, lower case, IPv6 without brackets; perhaps with a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// The host.
    pub host: String,
    /// The port, if one is named.
    pub port: Option<u16>,
}

/// Why a text names no host. The operator's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// It is a URL.
    #[error("a host is wanted here, as in registry.example.org:5000, not a URL")]
    Url,
    /// The port is not a number between 1 and 65535.
    #[error("the port is not a number between 1 and 65535")]
    Port,
    /// The host is neither an address nor a name.
    #[error("neither a host name nor an IP address (IPv6 addresses with a port stand in brackets)")]
    Host,
    /// A pattern is something else than `*.suffix`.
    #[error("a pattern is *.suffix, as in *.example.org")]
    Pattern,
}

impl FromStr for HostPort {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        if text.contains('/') {
            return Err(HostError::Url);
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self { host: ip.to_string(), port: None });
        }
        if let Some(rest) = text.strip_prefix('[') {
            let (ip, port) = rest.split_once(']').ok_or(HostError::Host)?;
            let ip = ip.parse::<Ipv6Addr>().map_err(|_| HostError::Host)?;
            let port = if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(HostError::Port)?) };
            return Ok(Self { host: ip.to_string(), port: port.map(parse_port).transpose()? });
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, Some(parse_port(port)?)),
            None => (text, None),
        };
        if host.parse::<IpAddr>().is_err() && (host.ends_with('.') || !is_host_name(host)) {
            return Err(HostError::Host);
        }
        Ok(Self { host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.port, self.host.contains(':')) {
            (Some(port), true) => write!(f, "[{}]:{port}", self.host),
            (Some(port), false) => write!(f, "{}:{port}", self.host),
            (None, _) => f.write_str(&self.host),
        }
    }
}

/// A host, or with `*.` in front every name below one; perhaps only on a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPattern {
    /// The host, or what follows the `*.`.
    pub host: HostPort,
    /// Whether it stands for all names below `host`, at any depth, and not for `host` itself.
    pub below: bool,
}

impl HostPattern {
    /// Whether a host is meant. A pattern without a port means all of them. `host` is compared without regard to case;
    /// IPv6 addresses are given without brackets.
    #[must_use]
    pub fn matches(&self, host: &str, port: u16) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let named = if self.below {
            host.strip_suffix(&self.host.host).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
        } else {
            host == self.host.host
        };
        named && self.host.port.is_none_or(|wanted| wanted == port)
    }
}

impl FromStr for HostPattern {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        let Some(suffix) = text.strip_prefix("*.") else {
            if text.contains('*') {
                return Err(HostError::Pattern);
            }
            return Ok(Self { host: text.parse()?, below: false });
        };
        let host: HostPort =
            suffix.parse().map_err(|error| if suffix.contains('*') { HostError::Pattern } else { error })?;
        if host.host.parse::<IpAddr>().is_ok() {
            return Err(HostError::Pattern);
        }
        Ok(Self { host, below: true })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.below {
            f.write_str("*.")?;
        }
        self.host.fmt(f)
    }
}

fn parse_port(text: &str) -> Result<u16, HostError> {
    text.parse().ok().filter(|port| *port != 0).ok_or(HostError::Port)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_parsed_and_printed_alike() {
        for (text, host, port) in [
            ("registry.example.org", "registry.example.org", None),
            ("Registry.Example.org:5000", "registry.example.org", Some(5000)),
            ("10.77.0.1:5000", "10.77.0.1", Some(5000)),
            ("10.77.0.1", "10.77.0.1", None),
            ("fd00::1", "fd00::1", None),
            ("[fd00::1]", "fd00::1", None),
            ("[FD00::1]:443", "fd00::1", Some(443)),
            ("localhost", "localhost", None),
            ("my_host:1", "my_host", Some(1)),
        ] {
            let parsed: HostPort = text.parse().unwrap();
            assert_eq!((parsed.host.as_str(), parsed.port), (host, port), "{text}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
        for (text, error) in [
            ("https://registry.example.org", HostError::Url),
            ("registry.example.org/v2", HostError::Url),
            ("registry:0", HostError::Port),
            ("registry:99999", HostError::Port),
            ("registry:", HostError::Port),
            ("[fd00::1]443", HostError::Port),
            ("", HostError::Host),
            ("a b", HostError::Host),
            ("10.0.0.300", HostError::Host),
            ("-a.org", HostError::Host),
            ("user@registry", HostError::Host),
            ("[fd00::zz]:1", HostError::Host),
        ] {
            assert_eq!(text.parse::<HostPort>(), Err(error), "{text}");
        }
    }

    #[test]
    fn patterns_match_what_they_say() {
        for (pattern, host, port, expected) in [
            ("registry.example.org", "Registry.Example.org", 443, true),
            ("registry.example.org", "registry.example.org.", 8443, true),
            ("registry.example.org", "a.registry.example.org", 443, false),
            ("registry.example.org:5000", "registry.example.org", 5000, true),
            ("registry.example.org:5000", "registry.example.org", 443, false),
            ("*.example.org", "a.example.org", 443, true),
            ("*.example.org", "a.b.example.org", 443, true),
            ("*.example.org", "example.org", 443, false),
            ("*.example.org", ".example.org", 443, false),
            ("*.example.org", "badexample.org", 443, false),
            ("*.example.org:5000", "a.example.org", 443, false),
            ("[fd00::1]:5000", "fd00::1", 5000, true),
        ] {
            let parsed: HostPattern = pattern.parse().unwrap();
            assert_eq!(parsed.matches(host, port), expected, "{pattern} {host}:{port}");
            assert_eq!(parsed.to_string(), pattern);
        }
        for text in ["*", "*.", "a.*.org", "*.*.org", "*example.org", "*.10.0.0.1"] {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
    }
}
