//! TLS 1.3 over TCP, for bulk: the same certificates, the same frames, a third of QUIC's CPU time on ordinary Ethernet.
//!
//! A connection carries one stream at a time, opened by the side that dialled. When a stream is over at both ends the
//! connection waits for the next one; a stream that is given up in the middle takes its connection with it. Read in this
//! order: `wire` (the socket), `conn` (chunks, and where a stream ends), `half` (the two directions of a stream), `tasks`
//! (handshakes, and what happens between two streams), `pool` (which connections there are).
//!
//! Not here: whether a stream goes over TCP at all (`way`).

mod conn;
mod half;
mod pool;
mod tasks;
mod wire;

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Duration;

pub(super) use half::{RecvHalf, SendHalf, delivered, write_listening};
pub(super) use pool::{Failure, OpenRequest, Pool};

use super::quic::Timing;

/// Connections at once, dialled and accepted. Beyond it, one that nobody uses makes room, or the new one is refused and
/// its stream goes over QUIC.
const CONNECTIONS_MAX: usize = 256;
/// Connections with one peer in each direction: two requests each for some layers that are pulled at once. More go over
/// QUIC.
const LINKS_PER_PEER_MAX: usize = 16;
/// Handshakes of incoming connections at once; more are closed.
const HANDSHAKES_MAX: usize = 64;
/// Of these from one address, so that one slow stranger does not keep the others out.
const HANDSHAKES_PER_ADDRESS_MAX: usize = 16;
/// Connections in the kernel's queue. More are dialled again by the peer's kernel.
const BACKLOG: u32 = 128;
/// Handshakes that this node begins at once.
const DIALS_MAX: usize = 64;
/// Bytes read ahead of TLS on a connection that is in use: what the kernel has at hand when it is asked, so that there is
/// a system call for eight records, not for a quarter of one.
const READ_AHEAD_BYTES_MAX: usize = 128 * 1024;
/// Where that begins, and what an unused connection may keep: requests are far smaller.
const READ_AHEAD_BYTES_MIN: usize = 4 * 1024;
/// Bytes that TLS encrypts before they are written, in one system call: fits in the second-level cache with its source, and has
/// room for a piece of 256 KiB with what goes before and behind it.
const WRITE_BYTES: usize = 260 * 1024;
/// Receive buffer of accepted connections: requests only, of up to [`super::FRAME_BYTES_MAX`]. Those that were dialled
/// have what the kernel finds good (at most `net.ipv4.tcp_rmem`), since a fixed one would be cut to `net.core.rmem_max`, which
/// is too little for a fast network; what may come on them is bounded by what was asked for.
const ACCEPTED_BUFFER_BYTES: usize = 128 * 1024;
/// What is read ahead in all of this agent's connections, like the QUIC connections' windows.
const RECEIVE_BUDGET_BYTES: usize = 32 * 1024 * 1024;
/// How often a connection shows that it lives while its peer sends: well below the time after which an upload's slot goes
/// to another (500 ms).
const ALIVE_EVERY: Duration = Duration::from_millis(100);
/// Probes in a row that may be lost before a connection without traffic is dead.
const PROBES: u32 = 3;

const _: () = assert!(CONNECTIONS_MAX * READ_AHEAD_BYTES_MAX <= RECEIVE_BUDGET_BYTES);
const _: () = assert!(READ_AHEAD_BYTES_MIN < READ_AHEAD_BYTES_MAX && HANDSHAKES_PER_ADDRESS_MAX < HANDSHAKES_MAX);

/// Listens on `listen`; an unspecified IPv6 address listens for IPv4 as well.
pub(super) fn listen(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(listen), Type::STREAM, Some(Protocol::TCP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // A port that connections of the agent's former run still linger on is free.
    socket.set_reuse_address(true)?;
    // Accepted sockets have it from the listener.
    socket.set_recv_buffer_size(ACCEPTED_BUFFER_BYTES)?;
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    socket.listen(BACKLOG.cast_signed())?;
    TcpListener::from_std(socket.into())
}

/// Connects to `remote` from the address that this agent listens on, where that is a certain one.
async fn connect(listen: SocketAddr, remote: SocketAddr, timing: &Timing) -> io::Result<TcpStream> {
    let socket = if remote.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if !listen.ip().is_unspecified() && listen.is_ipv4() == remote.is_ipv4() {
        socket.bind(SocketAddr::new(listen.ip(), 0))?;
    }
    let stream = socket.connect(remote).await?;
    set_up(&stream, timing)?;
    Ok(stream)
}

/// No waiting for more bytes; and a peer that is dead, frozen or cut off is noticed as soon as on QUIC.
fn set_up(stream: &TcpStream, timing: &Timing) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let idle = u32::try_from(timing.idle.as_millis()).unwrap_or(u32::MAX);
    // Also ends a connection whose probes are not answered, whatever the number of probes.
    rustix::net::sockopt::set_tcp_user_timeout(stream, idle)?;
    rustix::net::sockopt::set_tcp_keepcnt(stream, PROBES)?;
    // The kernel counts in seconds.
    let every = (timing.idle / (PROBES + 1)).max(Duration::from_secs(1));
    rustix::net::sockopt::set_tcp_keepidle(stream, every)?;
    rustix::net::sockopt::set_tcp_keepintvl(stream, every)?;
    SockRef::from(stream).set_keepalive(true)
}
