//! What the pool waits for in tasks of its own: handshakes in both directions, and the streams of a live connection.

use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{Connection, ConnectionError, Endpoint};
use rustls_pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::time::{Duration, timeout};

use crate::net::error::NetError;
use crate::net::frame::Stream;
use crate::net::link::Link;
use crate::net::quic::{self, Timing};
use crate::net::tls::Verdict;
use crate::net::{Incoming, canonical, error};

/// Name that QUIC asks for. Not sent, and not looked at: a peer is its key.
const SERVER_NAME: &str = "darter";

/// Outcome of a dial, with the address that was dialled.
pub(super) type Dialled = (SocketAddr, Result<Connection, NetError>);
/// Outcome of an incoming handshake, with the address that it came from.
pub(super) type Shaken = (SocketAddr, Result<Connection, ConnectionError>);

/// Dials `remote` with the configuration `tls`, which says who must answer.
pub(super) async fn dial(
    endpoint: Endpoint,
    tls: rustls::ClientConfig,
    verdict: Verdict,
    remote: SocketAddr,
    timing: Timing,
) -> Dialled {
    let outcome = handshake(&endpoint, tls, remote, &timing).await;
    let outcome = outcome.map_err(|error| verdict.get().map_or(error, |refusal| NetError::Refused(*refusal)));
    (remote, outcome)
}

async fn handshake(
    endpoint: &Endpoint,
    tls: rustls::ClientConfig,
    remote: SocketAddr,
    timing: &Timing,
) -> Result<Connection, NetError> {
    let config = quic::client(tls, timing)?;
    // Fails for addresses that cannot be sent to, such as IPv6 from an IPv4 socket.
    let connecting = endpoint.connect_with(config, remote, SERVER_NAME).map_err(|_| NetError::Unreachable)?;
    match timeout(timing.connect, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(ConnectionError::TimedOut)) | Err(_) => Err(NetError::Unreachable),
        Ok(Err(error)) => Err(error.into()),
    }
}

/// Completes the handshake of an incoming connection.
pub(super) async fn shake(incoming: quinn::Incoming, within: Duration) -> Shaken {
    let remote = canonical(incoming.remote_address());
    let outcome = timeout(within, incoming).await.unwrap_or(Err(ConnectionError::TimedOut));
    (remote, outcome)
}

/// Passes on the streams that the peer opens, until the connection ends; says why it did. While the queue is full,
/// one stream waits here and the others in the connection.
pub(super) async fn serve(link: Arc<Link>, streams: mpsc::Sender<Incoming>) -> ConnectionError {
    loop {
        let (send, receive) = match link.connection.accept_bi().await {
            Ok(halves) => halves,
            Err(error) => return error,
        };
        let remote = canonical(link.connection.remote_address());
        let incoming = Incoming { peer: link.peer, remote, stream: Stream::quic(send, receive, link.hold()) };
        tokio::select! {
            error = link.connection.closed() => return error,
            sent = streams.send(incoming) => if sent.is_err() {
                link.connection.close(error::close::ENDING, b"ending");
            },
        }
    }
}

/// The certificates that the peer of a finished handshake has shown.
pub(super) fn shown(connection: &Connection) -> Vec<CertificateDer<'static>> {
    let identity = connection.peer_identity().and_then(|identity| identity.downcast().ok());
    identity.map_or_else(Vec::new, |certificates: Box<Vec<_>>| *certificates)
}
