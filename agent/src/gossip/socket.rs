//! The UDP socket: one for both address families where it listens on all addresses.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Type};
use tokio::net::UdpSocket;

/// What the kernel may queue, if it allows as much: a thousand members that all speak at once to a seed that is busy
/// for a moment, at what a datagram of 1200 bytes costs it.
const BUFFER_BYTES: usize = 4 * 1024 * 1024;

pub(super) struct Socket {
    udp: UdpSocket,
    v6: bool,
}

impl Socket {
    pub(super) fn bind(listen: SocketAddr) -> io::Result<Self> {
        let socket = socket2::Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
        if listen.is_ipv6() && listen.ip().is_unspecified() {
            socket.set_only_v6(false)?;
        }
        // The kernel silently gives less than asked for; a refusal is no reason not to run either.
        for result in [socket.set_recv_buffer_size(BUFFER_BYTES), socket.set_send_buffer_size(BUFFER_BYTES)] {
            if let Err(error) = result {
                tracing::debug!(%error, "the gossip socket keeps its small buffers");
            }
        }
        socket.set_nonblocking(true)?;
        socket.bind(&listen.into())?;
        Ok(Self { udp: UdpSocket::from_std(socket.into())?, v6: listen.is_ipv6() })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Waits for a datagram. Cancel safe.
    pub(super) async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (length, from) = self.udp.recv_from(buffer).await?;
        Ok((length, canonical(from)))
    }

    /// The next datagram, if one has arrived.
    pub(super) fn try_receive(&self, buffer: &mut [u8]) -> Option<(usize, SocketAddr)> {
        let (length, from) = self.udp.try_recv_from(buffer).ok()?;
        Some((length, canonical(from)))
    }

    /// Sends a datagram, waiting only for room in the kernel's queue. Nobody learns whether it arrived.
    pub(super) async fn send(&self, to: SocketAddr, datagram: &[u8]) {
        let to = match to.ip() {
            IpAddr::V4(ip) if self.v6 => SocketAddr::new(ip.to_ipv6_mapped().into(), to.port()),
            _ => to,
        };
        if let Err(error) = self.udp.send_to(datagram, to).await {
            tracing::debug!(%error, %to, "a gossip datagram was not sent");
        }
    }
}

/// An IPv4 sender, as a socket for both families names it, under its own address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
