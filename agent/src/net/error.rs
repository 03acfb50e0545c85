//! Why the network failed a caller, and how the QUIC library's reasons are read.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{ConnectionError, ReadError, VarInt, WriteError};

use super::frame::FRAME_BYTES_MAX;
use super::identity::{CertifyError, Refusal};

/// Codes with which a connection is closed. The other side only logs them.
pub(super) mod close {
    use super::VarInt;

    /// The agent ends.
    pub(crate) const ENDING: VarInt = VarInt::from_u32(1);
    /// Nobody has used the connection for a while.
    pub(crate) const UNUSED: VarInt = VarInt::from_u32(2);
    /// There are too many connections.
    pub(crate) const FULL: VarInt = VarInt::from_u32(3);
    /// The certificate no longer convinces after the handshake.
    pub(crate) const STRANGER: VarInt = VarInt::from_u32(4);
}

/// Range of the QUIC error codes that carry a TLS alert (RFC 9001, section 4.8).
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;

/// Why a peer could not be talked to. The transport itself goes on working after each of them but [`Self::Closed`].
#[derive(Debug, Clone, thiserror::Error)]
pub enum NetError {
    /// The listening address cannot be had. The operator's to mend; nothing started.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: Arc<io::Error>,
    },
    /// The node's own key is unusable for TLS. A fault of this agent; nothing started, or nothing was sent.
    #[error("the agent cannot prove who it is")]
    Certify(#[from] CertifyError),
    /// Nobody answered the handshake in time, or the address cannot be sent to. Ask another peer; trying this one
    /// again soon costs the same time again.
    #[error("the peer does not answer")]
    Unreachable,
    /// The peer did not prove that it is who it should be. Its fault, or the address is stale; repeating cannot help.
    #[error("the peer was refused")]
    Refused(#[from] Refusal),
    /// The peer refused this agent, such as for a secret that it does not have yet. Repeating cannot help.
    #[error("the peer refused this agent")]
    RefusedByPeer,
    /// Every connection is in use, or the peer has as many open streams, or waiting callers, as it may. Nothing was
    /// sent; later may work.
    #[error("too many connections or streams")]
    Full,
    /// Nothing was heard of the peer for the idle timeout: it is dead, frozen or cut off. Whether it has acted on
    /// what was sent is unknown.
    #[error("the peer fell silent")]
    Silent,
    /// The peer closed the connection, or has restarted. Whether it has acted on what was sent is unknown; a new
    /// stream may work.
    #[error("the peer closed the connection")]
    ClosedByPeer,
    /// The peer gave up this stream; others are not affected.
    #[error("the peer gave up the stream")]
    Abandoned,
    /// The stream ended inside a frame or a piece. The peer is to blame; what came is dropped.
    #[error("the stream ended too early")]
    Truncated,
    /// A frame is, or says that it is, longer than permitted. Whoever made it is to blame; nothing was allocated for
    /// it and the stream is of no more use.
    #[error("a frame of {bytes} bytes is over the limit of {FRAME_BYTES_MAX}")]
    FrameTooLong {
        /// Its length.
        bytes: usize,
    },
    /// More piece bytes were asked for than a piece can have. The caller is to blame; nothing was read.
    #[error("no piece has {bytes} bytes")]
    PieceTooLong {
        /// What was asked for.
        bytes: usize,
    },
    /// A frame does not decode to what is expected there. The peer is to blame; the frame is consumed.
    #[error("a frame does not decode")]
    Malformed,
    /// The peer broke the transport protocol. Ask another.
    #[error("the peer broke the protocol")]
    Protocol,
    /// Sending after the end. The caller is to blame; nothing was sent.
    #[error("the stream has been finished")]
    Finished,
    /// This transport has been closed.
    #[error("the transport is closed")]
    Closed,
}

impl From<ConnectionError> for NetError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::Silent,
            ConnectionError::Reset | ConnectionError::ApplicationClosed(_) => Self::ClosedByPeer,
            ConnectionError::ConnectionClosed(_) if is_refusal(&error) => Self::RefusedByPeer,
            ConnectionError::ConnectionClosed(close) => match close.error_code {
                // The QUIC way to turn away a new connection: no room for it.
                quinn::TransportErrorCode::CONNECTION_REFUSED => Self::Full,
                _ => Self::ClosedByPeer,
            },
            ConnectionError::VersionMismatch | ConnectionError::TransportError(_) => Self::Protocol,
            ConnectionError::CidsExhausted => Self::Full,
            ConnectionError::LocallyClosed => Self::Closed,
        }
    }
}

impl From<WriteError> for NetError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(_) => Self::Abandoned,
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::ClosedStream => Self::Finished,
            WriteError::ZeroRttRejected => Self::Protocol,
        }
    }
}

impl From<ReadError> for NetError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(_) => Self::Abandoned,
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::ClosedStream => Self::Truncated,
            ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => Self::Protocol,
        }
    }
}

/// Whether a connection ended since one side did not accept the other's certificate, or its lack of one.
pub(super) fn is_refusal(error: &ConnectionError) -> bool {
    let code = match error {
        ConnectionError::TransportError(error) => error.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return false,
    };
    TLS_ALERTS.contains(&u64::from(code))
}

/// An error with its causes in one line, for the log.
pub(super) struct Chain<'a>(pub(super) &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
