//! Which of the two transports a stream goes over. The one place that decides it.
//!
//! Over ordinary Ethernet TLS over TCP takes a third of the CPU time of QUIC, and over jumbo frames no more than it
//! (`cargo bench -p darter-agent --bench transport`), so what is cheaper is a question of whether TCP gets through. QUIC
//! carries what is small or stays open: one connection is for any number of calls and sessions, and its datagrams tell
//! whether a peer is alive.

use tokio::time::Duration;

/// What a stream goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// QUIC.
    Quic,
    /// TLS over TCP.
    Tcp,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        })
    }
}

/// What the operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Pieces over TCP where it gets through, everything else over QUIC.
    #[default]
    Auto,
    /// Everything over QUIC; TCP is not even listened on.
    Quic,
    /// Everything over TCP where it gets through.
    Tcp,
}

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cargo {
    /// Messages.
    Talk,
    /// A piece.
    Bulk,
}

/// How long TCP may take to a connection before a stream goes over QUIC; the connection is there for the next one. Below the time
/// after which a peer is taken for silent, and far above what a handshake takes in a data centre, 2 to 3 ms: where fifty members
/// begin at the same moment on busy machines it is a tenth of a second, and a piece over QUIC costs three times the CPU time.
pub(super) const PATIENCE: Duration = Duration::from_millis(200);

/// Whether a stream goes over TCP where that gets through.
pub(super) fn wants_tcp(mode: Mode, cargo: Cargo) -> bool {
    match mode {
        Mode::Quic => false,
        Mode::Auto => cargo == Cargo::Bulk,
        Mode::Tcp => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_go_over_tcp_only_if_it_is_wanted() {
        for cargo in [Cargo::Talk, Cargo::Bulk] {
            assert!(!wants_tcp(Mode::Quic, cargo) && wants_tcp(Mode::Tcp, cargo));
        }
        assert!(!wants_tcp(Mode::Auto, Cargo::Talk) && wants_tcp(Mode::Auto, Cargo::Bulk));
    }
}
