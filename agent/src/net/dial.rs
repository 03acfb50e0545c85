//! The one function that opens connections to hosts which a client or a registry named.
//!
//! A name is resolved here, every address it has is judged by [`filter`], and what is dialled is the judged address
//! itself: nothing resolves a second time, so a name cannot turn into another address in between. Each redirect hop
//! passes here again.
//!
//! Not here: connections to other members. Their addresses come from authenticated gossip, never from a request.

pub mod filter;
pub mod tls;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use filter::RefusedAddress;

/// How long the resolver may take. A resolver's own first retry comes after 5 s; one of them fits in.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long one address may take to accept. Long enough for a lost SYN (retransmitted after 1 s and 3 s).
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(4);

/// Addresses of one name that are tried at most; with [`ATTEMPT_TIMEOUT`] connecting ends within 16 s.
const ADDRESSES_MAX: usize = 4;

/// Receive buffer of a socket that blobs are fetched over. What a fetcher has not read stays at the registry, so that
/// a lease which another member takes over is not paid for twice; 256 KiB still fills 100 Mb/s at 20 ms.
pub const BLOB_RECEIVE_BYTES: u32 = 256 * 1024;

/// Why a connection could not be opened. Nothing changed; [`DialError::is_refused`] tells the two causes apart.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DialError {
    /// The name does not resolve. The network's or the asker's fault; may be retried.
    #[error("{host} does not resolve")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        #[source]
        source: Arc<io::Error>,
    },
    /// The name has no address. As above.
    #[error("{host} has no address")]
    NoAddress {
        /// The name.
        host: String,
    },
    /// Each of its addresses is one that the agent does not connect to. The asker's fault; never retried.
    #[error("{host} is {reason}, the agent does not connect there")]
    Refused {
        /// The name as it was asked for.
        host: String,
        /// What is wrong with its (last) address.
        reason: RefusedAddress,
    },
    /// No address accepted. May be retried.
    #[error("{host} cannot be reached")]
    Connect {
        /// The name.
        host: String,
        /// The last attempt's error.
        #[source]
        source: Arc<io::Error>,
    },
    /// The TLS handshake failed, for example because the certificate is not trusted or is another host's.
    #[error("no trusted TLS connection to {host}")]
    Tls {
        /// The name.
        host: String,
        /// What the handshake said.
        #[source]
        source: Arc<io::Error>,
    },
}

impl DialError {
    /// Whether the agent itself declined, as opposed to the network.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether the host is down or out of reach. An untrusted certificate is not that: somebody answered.
    #[must_use]
    pub fn is_down(&self) -> bool {
        matches!(self, Self::Resolve { .. } | Self::NoAddress { .. } | Self::Connect { .. })
    }
}

/// A configured host: `host`, `host:port` or `*.suffix`, IPv6 with or without brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPattern {
    host: String,
    port: Option<u16>,
}

impl HostPattern {
    /// Reads a configured host. Any text is one; a text that is no host matches nothing.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let text = text.trim();
        if let Some((host, rest)) = text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            return Self { host: canonical(host), port: rest.strip_prefix(':').and_then(|port| port.parse().ok()) };
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') => match port.parse() {
                Ok(port) => Self { host: canonical(host), port: Some(port) },
                Err(_) => Self { host: canonical(text), port: None },
            },
            _ => Self { host: canonical(text), port: None },
        }
    }

    /// The port, if one is named.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Whether `host` at `port` is meant.
    #[must_use]
    pub fn matches(&self, host: &str, port: u16) -> bool {
        if self.port.is_some_and(|own| own != port) {
            return false;
        }
        let host = canonical(host);
        match self.host.strip_prefix('*') {
            Some(suffix) if suffix.starts_with('.') => host.len() > suffix.len() && host.ends_with(suffix),
            Some(_) => false,
            None => host == self.host,
        }
    }
}

/// One spelling per host: lower case, no brackets, no final dot, addresses as the standard library writes them.
#[must_use]
pub fn canonical(host: &str) -> String {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    host.parse::<IpAddr>().map(|address| address.to_string()).unwrap_or(host)
}

/// Opens connections to what is allowed. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Dialer {
    own_ports: Arc<[u16]>,
    local_hosts: Arc<[HostPattern]>,
}

impl Dialer {
    /// `own_ports` are the ports that this agent listens on; `local_hosts` are the hosts that somebody configured by
    /// name, and which may therefore be on loopback or link-local addresses.
    #[must_use]
    pub fn new(own_ports: &[u16], local_hosts: &BTreeSet<String>) -> Self {
        Self {
            own_ports: own_ports.into(),
            local_hosts: local_hosts.iter().map(|text| HostPattern::parse(text)).collect(),
        }
    }

    /// Connects to `host`, a name or an address, with TCP_NODELAY set. The addresses are tried in the resolver's
    /// order. `receive_bytes` bounds the socket's receive buffer; the kernel's own choice where it is none.
    ///
    /// # Errors
    /// See [`DialError`]; [`DialError::Tls`] does not happen here.
    pub async fn dial(&self, host: &str, port: u16, receive_bytes: Option<u32>) -> Result<TcpStream, DialError> {
        let host = canonical(host);
        let addresses = self.allowed(&host, port, resolve(&host, port).await?)?;
        let mut last = io::Error::from(io::ErrorKind::TimedOut);
        for address in addresses {
            match timeout(ATTEMPT_TIMEOUT, connect(address, receive_bytes)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(DialError::Connect { host, source: Arc::new(last) })
    }

    /// What of `addresses` may be dialled for `host`.
    fn allowed(&self, host: &str, port: u16, addresses: Vec<SocketAddr>) -> Result<Vec<SocketAddr>, DialError> {
        let local = self.local_hosts.iter().any(|pattern| pattern.matches(host, port));
        let mut refused = None;
        let mut allowed = Vec::with_capacity(addresses.len().min(ADDRESSES_MAX));
        for address in addresses {
            match filter::judge(address, local, &self.own_ports) {
                Ok(()) if allowed.len() < ADDRESSES_MAX => allowed.push(address),
                Ok(()) => {}
                Err(reason) => refused = Some(reason),
            }
        }
        match refused {
            _ if !allowed.is_empty() => Ok(allowed),
            Some(reason) => Err(DialError::Refused { host: host.to_owned(), reason }),
            None => Err(DialError::NoAddress { host: host.to_owned() }),
        }
    }
}

async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, DialError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let failed = |source| DialError::Resolve { host: host.to_owned(), source: Arc::new(source) };
    match timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((host, port))).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

async fn connect(address: SocketAddr, receive_bytes: Option<u32>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(bytes) = receive_bytes {
        // Before connecting, since the window scale is agreed in the handshake.
        socket.set_recv_buffer_size(bytes)?;
    }
    let stream = socket.connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn dialer(own_ports: &[u16], local: &[&str]) -> Dialer {
        Dialer::new(own_ports, &local.iter().map(|host| (*host).to_owned()).collect())
    }

    #[test]
    fn a_pattern_names_a_host_a_port_or_a_suffix() {
        for (pattern, host, port, matches) in [
            ("registry.example.org", "Registry.Example.Org.", 443, true),
            ("registry.example.org", "registry.example.org", 5000, true),
            ("registry.example.org:5000", "registry.example.org", 5000, true),
            ("registry.example.org:5000", "registry.example.org", 443, false),
            ("*.example.org", "a.example.org", 443, true),
            ("*.example.org", "example.org", 443, false),
            ("*.example.org:5000", "a.example.org", 443, false),
            ("*example.org", "badexample.org", 443, false),
            ("[::1]:5000", "::1", 5000, true),
            ("::1", "[::1]", 1, true),
            ("[::1]", "0:0::1", 1, true),
            ("10.0.0.1:5000", "10.0.0.1", 5000, true),
            ("", "registry.example.org", 443, false),
        ] {
            assert_eq!(HostPattern::parse(pattern).matches(host, port), matches, "{pattern} {host} {port}");
        }
    }

    // S2: the filter is applied after resolution, to each address, in whatever spelling it was asked for.
    #[tokio::test]
    async fn loopback_is_refused_unless_configured() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["127.0.0.1", "localhost", "LOCALHOST.", "::ffff:127.0.0.1", "[::ffff:7f00:1]", "0x7f.1", "0.0.0.0"]
        {
            let error = dialer(&[], &["registry.example.org"]).dial(host, port, None).await.unwrap_err();
            assert!(error.is_refused(), "{host}: {error}");
        }
        let stream = dialer(&[], &["127.0.0.1"]).dial("127.0.0.1", port, Some(BLOB_RECEIVE_BYTES)).await.unwrap();
        assert!(stream.nodelay().unwrap());
        // Linux doubles what is asked for.
        assert!(socket2::SockRef::from(&stream).recv_buffer_size().unwrap() <= 2 * BLOB_RECEIVE_BYTES as usize);
        assert!(dialer(&[], &[&format!("127.0.0.1:{port}")]).dial("127.0.0.1", port, None).await.is_ok());
        assert!(dialer(&[], &["127.0.0.1:1"]).dial("127.0.0.1", port, None).await.unwrap_err().is_refused());
    }

    // S2: a name is worth no more than its addresses, whoever answers for it, and may have some of both kinds.
    #[test]
    fn what_a_name_resolves_to_is_judged_address_by_address() {
        let dialer = dialer(&[], &["named.example.org"]);
        let allowed = |host: &str, addresses: &[&str]| {
            let addresses = addresses.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 80)).collect();
            dialer.allowed(host, 80, addresses)
        };
        for address in [
            "169.254.169.254",
            "169.254.170.2",
            "fd00:ec2::254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "100.100.100.200",
            "0.0.0.0",
            "255.255.255.255",
        ] {
            for host in ["metadata.google.internal", "evil.example.org", "named.example.org"] {
                assert!(allowed(host, &[address]).unwrap_err().is_refused(), "{host} at {address}");
                let kept = allowed(host, &[address, "192.0.2.1", address]).unwrap();
                assert_eq!(kept, ["192.0.2.1:80".parse().unwrap()], "{host} at {address} too");
            }
        }
        for address in ["127.0.0.1", "::1", "169.254.1.1", "fe80::1"] {
            assert!(allowed("evil.example.org", &[address]).unwrap_err().is_refused(), "{address}");
            assert_eq!(allowed("named.example.org", &[address]).unwrap().len(), 1, "{address}");
        }
        assert!(matches!(allowed("evil.example.org", &[]), Err(DialError::NoAddress { .. })));
    }

    #[tokio::test]
    async fn the_agents_own_ports_are_refused_even_where_the_host_is_configured() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = dialer(&[port], &["127.0.0.1"]).dial("127.0.0.1", port, None).await.unwrap_err();
        assert!(matches!(error, DialError::Refused { reason: RefusedAddress::Own, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_closed_port_is_down_and_not_refused() {
        // Bound and not listening: the port refuses, and nobody else gets it meanwhile.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = socket.local_addr().unwrap().port();
        let error = dialer(&[], &["127.0.0.1"]).dial("127.0.0.1", port, None).await.unwrap_err();
        assert!(error.is_down() && !error.is_refused(), "{error}");
    }
}
