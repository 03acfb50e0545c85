//! What the pool waits for in tasks of its own: handshakes in both directions, and connections that are in use.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use darter_tracker::NodeId;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant, MissedTickBehavior, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::sync::CancellationToken;

use super::conn::{self, Conn, Kind};
use super::half::{Lent, open_halves};
use super::pool::Failure;
use super::wire::Wire;
use crate::net::error::NetError;
use crate::net::frame::Stream;
use crate::net::quic::Timing;
use crate::net::tls::{ALPN, Verdict};
use crate::net::{Incoming, canonical};

/// Name that TLS asks for. Not sent, and not looked at: a peer is its key.
const SERVER_NAME: &str = "darter";
/// How long the end of a stream may take at the other side before its connection is closed instead of used again.
const OVER_MAX: Duration = Duration::from_secs(1);

/// A connection whose handshake is over, with the certificates that were shown.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) tls: TlsStream<Wire>,
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

/// Outcome of a dial, with the address that was dialled.
pub(super) type Dialled = (SocketAddr, Result<Conn, Failure>);
/// Outcome of an incoming handshake, with the address that it came from.
pub(super) type Shaken = (SocketAddr, Result<Shown, io::Error>);

/// What a dial is to have.
pub(super) struct Dial {
    pub(super) listen: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) peer: NodeId,
    pub(super) tls: rustls::ClientConfig,
    pub(super) verdict: Verdict,
    pub(super) heard: Arc<AtomicU64>,
    pub(super) timing: Timing,
}

/// Dials, and waits until the peer has let this agent in. `bearer` says once more who it is.
pub(super) async fn dial(order: Dial, bearer: impl FnOnce(&[CertificateDer<'_>]) -> Option<NodeId>) -> Dialled {
    let (remote, within, verdict) = (order.remote, order.timing.connect, order.verdict.clone());
    let outcome = timeout(within, handshake(order, bearer)).await.unwrap_or(Err(Failure::Silent));
    let outcome = outcome
        .map_err(|failure| verdict.get().map_or(failure, |refusal| Failure::Refused(NetError::Refused(*refusal))));
    (remote, outcome)
}

async fn handshake(order: Dial, bearer: impl FnOnce(&[CertificateDer<'_>]) -> Option<NodeId>) -> Result<Conn, Failure> {
    let Dial { listen, remote, peer, tls, heard, timing, .. } = order;
    let stream = super::connect(listen, remote, &timing).await.map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => Failure::Closed,
        _ => Failure::Silent,
    })?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|_| Failure::Broken)?;
    let connecting = TlsConnector::from(Arc::new(tls)).connect(name, Wire::new(stream));
    let stream = connecting.await.map_err(|error| refused(conn::lost(&error)))?;
    if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
        return Err(Failure::Broken);
    }
    if bearer(stream.get_ref().1.peer_certificates().unwrap_or_default()) != Some(peer) {
        // The verifier has seen to it already; this says it once more where the name is taken into use.
        return Err(Failure::Refused(NetError::Protocol));
    }
    let mut conn = Conn::new(stream.into(), peer, remote, heard);
    // This side of the handshake is over before the other has seen the certificate.
    match poll_fn(|cx| conn.poll_begin(cx)).await {
        Ok(()) => Ok(conn),
        Err(NetError::Full) => Err(Failure::Full),
        Err(error) => Err(refused(error)),
    }
}

fn refused(error: NetError) -> Failure {
    match error {
        NetError::RefusedByPeer | NetError::Refused(_) => Failure::Refused(error),
        NetError::Silent => Failure::Silent,
        _ => Failure::Broken,
    }
}

/// Completes the handshake of an incoming connection.
pub(super) async fn shake(stream: TcpStream, remote: SocketAddr, acceptor: TlsAcceptor, timing: Timing) -> Shaken {
    let shaking = async {
        super::set_up(&stream, &timing)?;
        let stream = acceptor.accept(Wire::new(stream)).await?;
        // TLS lets in who names no protocol at all; this version wants its own.
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, rustls::Error::NoApplicationProtocol));
        }
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|certificate| certificate.clone().into_owned()).collect();
        Ok(Shown { tls: stream.into(), certificates })
    };
    let outcome = timeout(timing.connect, shaking).await;
    (canonical(remote), outcome.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())))
}

/// Tells a dialler that there is no room for its connection.
pub(super) fn turn_away(mut conn: Conn) {
    conn.say(Kind::Full);
}

/// Passes on the streams that the peer opens on an accepted connection, one after the other, until it ends, has been
/// unused for too long, or the transport closes; says why it did. While the queue is full the stream waits here.
pub(super) async fn serve(
    mut conn: Conn,
    streams: mpsc::Sender<Incoming>,
    unused_max: Duration,
    timing: Timing,
    closing: CancellationToken,
) -> NetError {
    conn.say(Kind::Alive);
    loop {
        let begun = tokio::select! {
            begun = timeout(unused_max, poll_fn(|cx| conn.poll_request(cx))) => begun,
            () = closing.cancelled() => return NetError::Closed,
        };
        match begun {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(_) => return NetError::Closed,
        }
        let (peer, remote) = (conn.peer, conn.remote);
        let (send, receive, lent) = open_halves(conn);
        let incoming = Incoming { peer, remote, stream: Stream::tcp(send, receive) };
        let passed_on = tokio::select! {
            sent = streams.send(incoming) => sent.is_ok(),
            () = closing.cancelled() => false,
        };
        if !passed_on {
            return NetError::Closed;
        }
        conn = match over(lent, timing, closing.clone()).await {
            Ok(conn) => conn,
            Err(error) => return error,
        };
    }
}

/// Waits until a stream is dropped and is over at the other side as well; gives the connection for the next one. Meanwhile
/// shows the peer that this agent lives, and ends the stream if the peer does not.
pub(super) async fn over(mut lent: Lent, timing: Timing, closing: CancellationToken) -> Result<Conn, NetError> {
    // Nobody has to say anything between two streams.
    lent.with(Conn::begins);
    let mut pulse = tokio::time::interval_at(Instant::now() + timing.keep_alive, timing.keep_alive);
    pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut conn = loop {
        tokio::select! {
            biased;
            conn = lent.returned() => break conn?,
            () = closing.cancelled() => {
                lent.with(|conn| conn.cut(NetError::Closed));
                return Err(NetError::Closed);
            }
            _ = pulse.tick() => lent.with(|conn| conn.pulse(timing.keep_alive, timing.idle)),
        }
    };
    match timeout(OVER_MAX, poll_fn(|cx| conn.poll_over(cx))).await {
        Ok(Ok(())) => Ok(conn),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(NetError::Abandoned),
    }
}
