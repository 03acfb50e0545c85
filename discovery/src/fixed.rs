//! Seeds from a list: literal addresses, and names that are looked up and looked up again.
//!
//! What a name resolved to stays valid when a later lookup fails: a resolver that is down is no reason to forget seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::Update;
use crate::backoff::Backoff;
use crate::index::SourceId;

/// How often names are looked up again although they resolved: what a DNS record of a moving host usually lives.
pub(crate) const REFRESH: Duration = Duration::from_secs(30);

/// How long one lookup may take before it counts as failed. Resolvers try their second server after 5 s.
const LOOKUP_MAX: Duration = Duration::from_secs(6);

/// The longest name that DNS can carry, RFC 1035 section 2.3.4.
const NAME_BYTES_MAX: usize = 253;

/// The longest label of a name, same place.
const LABEL_BYTES_MAX: usize = 63;

/// A host, by number or by name, and a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// An IP address.
    Literal(SocketAddr),
    /// A name that is looked up, and looked up again.
    Name {
        /// The host name.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Why a text names no host and port. The operator's mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// There is no port, or it is not a number between 1 and 65535.
    #[error("a port between 1 and 65535 must follow the host, as in host:8002")]
    Port,
    /// What stands before the port is neither an address nor a host name.
    #[error("neither an IP address nor a host name (IPv6 addresses stand in brackets)")]
    Host,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(AddressError::Port) } else { Ok(Self::Literal(address)) };
        }
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::Port)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or(AddressError::Port)?;
        if !is_host_name(host) {
            return Err(AddressError::Host);
        }
        Ok(Self::Name { host: host.to_ascii_lowercase(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(address) => address.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Whether a text can be a host's name: letters, digits, `-` and `_` between dots, perhaps a dot at the end. The last
/// label has a letter, so that 10.0.0.300 is not taken for a name.
#[must_use]
pub fn is_host_name(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    let label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.len() <= NAME_BYTES_MAX
        && host.split('.').all(label)
        && host.rsplit('.').next().is_some_and(|last| last.bytes().any(|byte| byte.is_ascii_alphabetic()))
}

/// A list that is being followed: its addresses, and what its names resolved to last.
#[derive(Debug, Default)]
pub(crate) struct List {
    literals: BTreeSet<SocketAddr>,
    names: BTreeSet<(String, u16)>,
    resolved: BTreeMap<(String, u16), Vec<SocketAddr>>,
}

impl List {
    /// Takes another list over. What names resolved to that are in both stays.
    pub(crate) fn replace(&mut self, addresses: Vec<Address>) {
        self.literals.clear();
        self.names.clear();
        for address in addresses {
            match address {
                Address::Literal(address) => self.literals.insert(address),
                Address::Name { host, port } => self.names.insert((host, port)),
            };
        }
        self.resolved.retain(|name, _| self.names.contains(name));
    }

    /// Whether there are names, so that looking up makes a difference.
    pub(crate) fn has_names(&self) -> bool {
        !self.names.is_empty()
    }

    /// All addresses that are known.
    pub(crate) fn seeds(&self) -> BTreeSet<SocketAddr> {
        self.literals.iter().chain(self.resolved.values().flatten()).copied().collect()
    }

    /// Looks all names up, side by side. Returns whether every one was found.
    pub(crate) async fn look_up(&mut self) -> bool {
        let mut lookups = JoinSet::new();
        for name in self.names.iter().cloned() {
            lookups.spawn(async move {
                let found = tokio::time::timeout(LOOKUP_MAX, tokio::net::lookup_host((name.0.as_str(), name.1))).await;
                let found = found.map(|found| found.map(Iterator::collect::<Vec<_>>));
                (name, found)
            });
        }
        let mut found_all = true;
        while let Some(lookup) = lookups.join_next().await {
            let failure = match lookup {
                Ok((name, Ok(Ok(addresses)))) if !addresses.is_empty() => {
                    self.resolved.insert(name, addresses);
                    continue;
                }
                Ok((name, Ok(Ok(_)))) => format!("{}: no addresses", name.0),
                Ok((name, Ok(Err(error)))) => format!("{}: {error}", name.0),
                Ok((name, Err(_))) => format!("{}: no answer", name.0),
                Err(error) => error.to_string(),
            };
            tracing::debug!(failure, "a seed's name was not found");
            found_all = false;
        }
        found_all
    }
}

/// Reports the list's addresses: once for literals, again and again where there are names. Ends when nobody listens.
pub(crate) async fn run(source: SourceId, addresses: Vec<Address>, updates: mpsc::Sender<Update>) {
    let mut list = List::default();
    list.replace(addresses);
    let mut backoff = Backoff::default();
    if list.has_names() && !list.literals.is_empty() {
        // Literals need not wait for the lookups.
        let update = Update { source, seeds: list.seeds(), complete: false };
        if updates.send(update).await.is_err() {
            return;
        }
    }
    loop {
        let complete = list.look_up().await;
        if updates.send(Update { source, seeds: list.seeds(), complete }).await.is_err() {
            return;
        }
        let wait = match (list.has_names(), complete) {
            (false, _) => return updates.closed().await,
            (true, true) => {
                backoff.succeeded();
                REFRESH
            }
            (true, false) => backoff.failed(rand::random()),
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = updates.closed() => return,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed() {
        for (text, expected) in [
            ("10.0.0.1:8002", Ok(Address::Literal("10.0.0.1:8002".parse().unwrap()))),
            ("[fd00::1]:8002", Ok(Address::Literal("[fd00::1]:8002".parse().unwrap()))),
            ("Seed-1.Example.org:80", Ok(Address::Name { host: "seed-1.example.org".into(), port: 80 })),
            ("seed.:80", Ok(Address::Name { host: "seed.".into(), port: 80 })),
            ("10.0.0.1", Err(AddressError::Port)),
            ("10.0.0.1:0", Err(AddressError::Port)),
            ("seed", Err(AddressError::Port)),
            ("seed:", Err(AddressError::Port)),
            ("seed:0", Err(AddressError::Port)),
            ("seed:65536", Err(AddressError::Port)),
            ("10.0.0.300:8002", Err(AddressError::Host)),
            ("fd00::1:8002", Err(AddressError::Host)),
            (":8002", Err(AddressError::Host)),
            ("a..b:8002", Err(AddressError::Host)),
            ("-a:8002", Err(AddressError::Host)),
            ("http://seed:8002", Err(AddressError::Host)),
            ("", Err(AddressError::Port)),
        ] {
            assert_eq!(text.parse::<Address>(), expected, "{text}");
            if let Ok(address) = text.parse::<Address>() {
                assert_eq!(address.to_string().parse(), Ok(address));
            }
        }
    }

    #[tokio::test]
    async fn a_name_that_fails_keeps_what_it_had() {
        let before: SocketAddr = "10.0.0.9:8002".parse().unwrap();
        let gone = ("gone.invalid".to_owned(), 8002);
        let found = ("127.0.0.3".to_owned(), 8002);
        let names = BTreeSet::from([gone.clone(), found.clone()]);
        let mut list = List { names, resolved: BTreeMap::from([(gone.clone(), vec![before])]), ..List::default() };
        assert!(!list.look_up().await);
        assert_eq!(list.resolved[&gone], [before]);
        assert_eq!(list.resolved[&found], ["127.0.0.3:8002".parse().unwrap()]);
        list.replace(vec!["gone.invalid:8002".parse().unwrap(), "10.0.0.1:8002".parse().unwrap()]);
        assert_eq!(list.seeds(), BTreeSet::from([before, "10.0.0.1:8002".parse().unwrap()]));
        list.replace(Vec::new());
        assert_eq!(list.seeds(), BTreeSet::new());
    }
}
