//! TLS that ends here, so that the requests inside can be served by the swarm.
//!
//! Only for hosts that the operator named. The certificate that is shown is either one that the operator had made for
//! those hosts, or a leaf that is minted per host from the operator's CA; see [`leaf`].

pub mod leaf;

use std::time::SystemTime;

use tokio::io::{AsyncRead, AsyncWrite};

use super::address::{HostPattern, HostPort};
use super::tls::{Identity, PemPair, TlsError, TlsStream};
use leaf::{Authority, LeafError};

/// What is hijacked, and with what.
#[derive(Clone)]
pub struct HijackSettings {
    /// A CA, or a certificate that names the hijacked hosts, with its key.
    pub pair: PemPair,
    /// The hosts whose TLS ends here. None: nothing is hijacked.
    pub hosts: Vec<HostPattern>,
}

/// Why nothing, or not this connection, can be hijacked.
#[derive(Debug, thiserror::Error)]
pub enum HijackError {
    /// Certificate or key are of no use, or the handshake failed; see [`TlsError`] for whose fault it is.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The CA cannot be used, or a leaf cannot be minted.
    #[error(transparent)]
    Leaf(#[from] LeafError),
}

/// The hosts whose TLS ends here, and what they are shown.
pub(super) struct Hijack {
    hosts: Vec<HostPattern>,
    shown: Shown,
}

enum Shown {
    /// The same certificate whatever the host.
    Certificate(Identity),
    /// A leaf per host.
    Leaves(Box<Authority>),
}

impl Hijack {
    /// Reads certificate and key; a certificate that may issue others is taken for a CA.
    pub(super) fn new(settings: &HijackSettings) -> Result<Self, HijackError> {
        let shown = match Authority::from_pem(&settings.pair)? {
            Some(authority) => Shown::Leaves(Box::new(authority)),
            None => Shown::Certificate(Identity::inside(&settings.pair)?),
        };
        Ok(Self { hosts: settings.hosts.clone(), shown })
    }

    /// Whether TLS to that address ends here.
    pub(super) fn covers(&self, address: &HostPort) -> bool {
        self.hosts.iter().any(|pattern| pattern.matches(address))
    }

    /// Takes the handshake of a client whose tunnel leads to `host`.
    pub(super) async fn accept<I>(&self, io: I, host: &str) -> Result<TlsStream<I>, HijackError>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let identity = match &self.shown {
            Shown::Certificate(identity) => identity.clone(),
            Shown::Leaves(authority) => authority.leaf(host, SystemTime::now())?,
        };
        Ok(identity.accept(io, Some(host)).await?)
    }
}
