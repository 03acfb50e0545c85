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

/// How long a caller waits for TCP to a peer that was never reached over it. A handshake in a data centre takes 2 to 3 ms;
/// where it takes longer, the stream goes over QUIC and the connection is there for the next one.
const PATIENCE_NEW: Duration = Duration::from_millis(10);
/// The same of an agent that was told to use TCP: still below the time after which a peer is taken for silent.
const PATIENCE_TOLD: Duration = Duration::from_millis(200);
/// The same for a peer that is reached over TCP at present.
const PATIENCE_PROVEN: Duration = Duration::from_millis(200);

/// How long TCP may take before a stream goes over QUIC; `None` if it goes there at once.
pub(super) fn patience(mode: Mode, cargo: Cargo, proven: bool) -> Option<Duration> {
    match (mode, cargo) {
        (Mode::Quic, _) | (Mode::Auto, Cargo::Talk) => None,
        (Mode::Auto, Cargo::Bulk) if !proven => Some(PATIENCE_NEW),
        (Mode::Tcp, _) if !proven => Some(PATIENCE_TOLD),
        (Mode::Auto | Mode::Tcp, _) => Some(PATIENCE_PROVEN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_wait_for_tcp_only_if_it_is_wanted() {
        for cargo in [Cargo::Talk, Cargo::Bulk] {
            assert_eq!(patience(Mode::Quic, cargo, true), None);
            assert!(patience(Mode::Tcp, cargo, false).is_some());
        }
        assert_eq!(patience(Mode::Auto, Cargo::Talk, true), None);
        assert!(patience(Mode::Auto, Cargo::Bulk, false) < patience(Mode::Auto, Cargo::Bulk, true));
    }
}
