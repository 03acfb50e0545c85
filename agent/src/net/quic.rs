//! The QUIC endpoint: socket, windows, timers.
//!
//! The library's defaults are made for the internet; these are made for machines a millisecond apart.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use darter_tracker::PieceSize;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::debug;

use super::identity::CertifyError;

/// Times of a connection. One struct, so that tests need not wait as long as agents do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timing {
    /// For a whole handshake. Two round trips take milliseconds, but seconds on a crowded link, or where fifty members begin
    /// at the same moment on one machine. No client waits for it: the registry is asked instead.
    pub(super) connect: Duration,
    /// Silence after which a connection is dead. Not the deadline of a request: each request has its own, shorter one.
    pub(super) idle: Duration,
    /// How often a quiet connection shows that it lives: two signs in a row may be lost before `idle` is over.
    pub(super) keep_alive: Duration,
    /// How long a connection without streams is kept: as long as the pauses between two layers of one pull.
    pub(super) unused: Duration,
}

impl Timing {
    /// What agents use.
    pub(super) const AGENT: Self = Self {
        connect: Duration::from_secs(3),
        idle: Duration::from_secs(5),
        keep_alive: Duration::from_millis(1500),
        unused: Duration::from_secs(60),
    };
}

/// Streams that a peer may have open at once on one connection: a window of requests for each of some tasks. More
/// wait at the peer.
const STREAMS_MAX: u32 = 256;
/// Unread bytes of one stream: 30 ms of 1 Gb/s. Larger pieces stall no one, since they are read as they come.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Unread bytes of one connection at the most; the pool gives a connection its share of [`RECEIVE_BUDGET_BYTES`].
const WINDOW_BYTES_MAX: u32 = 8 * 1024 * 1024;
/// And at the least, which a new connection has until it is authenticated: 64 MB/s at a round trip of 1 ms.
const WINDOW_BYTES_MIN: u32 = 64 * 1024;
/// Unread bytes of all connections: half of what an agent may spend on buffers.
const RECEIVE_BUDGET_BYTES: u32 = 32 * 1024 * 1024;
/// Connections at once, dialled and accepted. Beyond it, one that nobody uses makes room, or the new one is refused.
pub(super) const CONNECTIONS_MAX: usize = 512;
/// Bytes sent and not yet acknowledged, per connection: as much as the peer may be willing to take.
const SEND_WINDOW_BYTES: u64 = 8 * 1024 * 1024;
/// Buffers of the socket, as far as the system permits: 30 ms of 1 Gb/s without the process being scheduled.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// A guess until the first measurement. Also decides how soon a lost first packet is sent again.
const INITIAL_RTT: Duration = Duration::from_millis(5);
/// Largest UDP payload that is tried: what fits into Ethernet frames under IPv6.
const UDP_PAYLOAD_BYTES_MAX: u16 = 1452;
/// The library sends ten payloads as one segmented datagram of at most 64 KiB; above this they are silently lost.
const UDP_PAYLOAD_BYTES_GSO: u16 = 6550;
/// Packets between two acknowledgements that a receiver is asked for. The default, every second one, costs both ends
/// CPU time that a path without long queues does not repay.
const ACK_EVERY: u32 = 10;
/// Longest wait before an acknowledgement that is not due by [`ACK_EVERY`]: what is said here are mostly single small messages, and
/// their acknowledgements can go along with others. The end of a piece waits for none: its turn's stream ends with it.
const ACK_DELAY: Duration = Duration::from_millis(40);
/// Handshakes from unknown addresses beyond this many must first show that they can receive.
pub(super) const HANDSHAKES_UNVALIDATED_MAX: usize = 32;
/// Handshakes of incoming connections at once; more are not answered and try again by themselves.
pub(super) const HANDSHAKES_MAX: usize = 128;

const _: () = assert!(UDP_PAYLOAD_BYTES_MAX <= UDP_PAYLOAD_BYTES_GSO);
const _: () = assert!(CONNECTIONS_MAX * WINDOW_BYTES_MIN as usize <= RECEIVE_BUDGET_BYTES as usize);
const _: () = assert!(STREAM_WINDOW_BYTES <= WINDOW_BYTES_MAX && STREAM_WINDOW_BYTES <= PieceSize::MAX_BYTES);

/// The share of each of `connections` in the receive budget.
pub(super) fn receive_window(connections: usize) -> VarInt {
    let connections = u32::try_from(connections.max(1)).unwrap_or(u32::MAX);
    // A power of two, so that it changes seldom while connections come and go.
    let share = 1 << (RECEIVE_BUDGET_BYTES / connections).max(1).ilog2();
    VarInt::from_u32(share.clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX))
}

/// An endpoint on `listen` that accepts with `tls`.
pub(super) fn endpoint(listen: SocketAddr, tls: ServerEnd, timing: &Timing) -> io::Result<Endpoint> {
    let mut server = ServerConfig::with_crypto(Arc::new(tls.0));
    // No migration: members do not change addresses, and nobody shall move a connection elsewhere.
    server.transport_config(transport(timing)).max_incoming(HANDSHAKES_MAX).migration(false);
    Endpoint::new(EndpointConfig::default(), Some(server), socket(listen)?, Arc::new(quinn::TokioRuntime))
}

/// TLS for incoming connections, found fit for QUIC.
pub(super) struct ServerEnd(QuicServerConfig);

impl TryFrom<rustls::ServerConfig> for ServerEnd {
    type Error = CertifyError;
    fn try_from(tls: rustls::ServerConfig) -> Result<Self, CertifyError> {
        QuicServerConfig::try_from(tls).map(Self).map_err(|_| CertifyError)
    }
}

/// The configuration of one outgoing connection.
pub(super) fn client(tls: rustls::ClientConfig, timing: &Timing) -> Result<ClientConfig, CertifyError> {
    let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(|_| CertifyError)?));
    client.transport_config(transport(timing));
    Ok(client)
}

fn transport(timing: &Timing) -> Arc<TransportConfig> {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(UDP_PAYLOAD_BYTES_MAX);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY)).max_ack_delay(Some(ACK_DELAY));
    let idle = VarInt::from_u32(u32::try_from(timing.idle.as_millis()).unwrap_or(u32::MAX));

    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(WINDOW_BYTES_MIN))
        .send_window(SEND_WINDOW_BYTES)
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery))
        .ack_frequency_config(Some(acks))
        .max_idle_timeout(Some(IdleTimeout::from(idle)))
        .keep_alive_interval(Some(timing.keep_alive));
    Arc::new(transport)
}

fn socket(listen: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // The system may grant less (net.core.rmem_max); transfers are then slower, not wrong.
    for (what, granted) in [
        ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES).and_then(|()| socket.recv_buffer_size())),
        ("send", socket.set_send_buffer_size(SOCKET_BUFFER_BYTES).and_then(|()| socket.send_buffer_size())),
    ] {
        match granted {
            Ok(bytes) if bytes >= SOCKET_BUFFER_BYTES => {}
            Ok(bytes) => debug!(what, bytes, wanted = SOCKET_BUFFER_BYTES, "the UDP buffer is smaller than wanted"),
            Err(error) => debug!(what, %error, "the UDP buffer cannot be set"),
        }
    }
    socket.bind(&listen.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receive_budget_holds_for_any_number_of_connections() {
        for connections in 1..=CONNECTIONS_MAX {
            let share = receive_window(connections).into_inner();
            assert!(share * connections as u64 <= u64::from(RECEIVE_BUDGET_BYTES), "{connections} x {share}");
        }
        assert_eq!(receive_window(0), receive_window(1));
        assert_eq!(receive_window(1).into_inner(), u64::from(WINDOW_BYTES_MAX));
        assert_eq!(receive_window(CONNECTIONS_MAX).into_inner(), u64::from(WINDOW_BYTES_MIN));
    }
}
