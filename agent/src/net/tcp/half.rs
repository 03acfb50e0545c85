//! The two directions of a stream on a connection. When both are dropped, the connection goes back to its owner.
//!
//! Each half polls the connection under a lock that is held for the poll, never across an await. A half registers the
//! waker of its own task for its own direction only: reading and writing have one each.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::conn::{Conn, Kind};
use crate::net::error::NetError;

/// A connection in use.
#[derive(Debug)]
struct Shared {
    /// `None` only while it is being dropped.
    conn: Mutex<Option<Conn>>,
    back: Option<oneshot::Sender<Conn>>,
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut Conn) -> T) -> Option<T> {
        // Nothing that runs under the lock can panic halfway, but for the TLS library, which then fails again.
        self.conn.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    fn poll<T>(&self, act: impl FnOnce(&mut Conn) -> Poll<Result<T, NetError>>) -> Poll<Result<T, NetError>> {
        self.with(act).unwrap_or(Poll::Ready(Err(NetError::Closed)))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let conn = self.conn.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(conn), Some(back)) = (conn, self.back.take()) {
            // Where the owner is gone the connection is closed.
            let _ = back.send(conn);
        }
    }
}

/// The sending direction. Dropping it ends the direction.
#[derive(Debug)]
pub(in crate::net) struct SendHalf {
    shared: Arc<Shared>,
    /// Whether a cancelled call may have left something unsent.
    unsent: bool,
}

/// The receiving direction.
#[derive(Debug)]
pub(in crate::net) struct RecvHalf {
    shared: Arc<Shared>,
}

/// A connection that is in use, as its owner sees it.
pub(super) struct Lent {
    shared: Weak<Shared>,
    returned: oneshot::Receiver<Conn>,
}

/// The halves of a stream on `conn`.
pub(super) fn open_halves(conn: Conn) -> (SendHalf, RecvHalf, Lent) {
    let (back, returned) = oneshot::channel();
    let shared = Arc::new(Shared { conn: Mutex::new(Some(conn)), back: Some(back) });
    let lent = Lent { shared: Arc::downgrade(&shared), returned };
    (SendHalf { shared: shared.clone(), unsent: false }, RecvHalf { shared }, lent)
}

impl Lent {
    /// Waits until both halves are dropped, and gives the connection back. Cancelling is harmless.
    pub(super) async fn returned(&mut self) -> Result<Conn, NetError> {
        (&mut self.returned).await.map_err(|_| NetError::Closed)
    }

    /// Does something with the connection while it is in use.
    pub(super) fn with(&self, act: impl FnOnce(&mut Conn)) {
        if let Some(shared) = self.shared.upgrade() {
            shared.with(act);
        }
    }
}

impl SendHalf {
    /// Sends `parts`, and ends the direction behind the `last`; what is left in them has not been taken yet.
    pub(in crate::net) async fn write(&mut self, parts: &mut [Bytes], last: bool) -> Result<(), NetError> {
        let Self { shared, unsent } = self;
        poll_fn(|cx| {
            let written = shared.poll(|conn| conn.poll_write(cx, parts, last));
            *unsent = parts.iter().any(|part| !part.is_empty());
            written
        })
        .await
    }

    /// Ends the direction.
    pub(in crate::net) fn finish(&mut self) {
        let complete = !self.unsent;
        self.shared.with(|conn| conn.end(complete));
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        self.finish();
    }
}

impl RecvHalf {
    /// Reads at most `max` bytes into `into`; `false` at the end of the stream.
    pub(in crate::net) async fn read(&mut self, into: &mut BytesMut, max: usize) -> Result<bool, NetError> {
        poll_fn(|cx| self.shared.poll(|conn| conn.poll_read(cx, into, max))).await
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        // A stream that is dropped as a whole is brought to its end by the connection's owner.
        if Arc::strong_count(&self.shared) > 1 {
            self.shared.with(|conn| conn.say_unwanted());
        }
    }
}

/// Sends `parts` like [`SendHalf::write`], and listens for the peer's signs of life meanwhile. Both halves are there, so
/// nobody else waits for what comes.
pub(in crate::net) async fn write_listening(
    send: &mut SendHalf,
    _: &mut RecvHalf,
    parts: &mut [Bytes],
    last: bool,
) -> Result<(), NetError> {
    let SendHalf { shared, unsent } = send;
    poll_fn(|cx: &mut Context<'_>| {
        let written = shared.poll(|conn| {
            if let Poll::Ready(Err(error)) = conn.poll_listen(cx) {
                return Poll::Ready(Err(error));
            }
            conn.poll_write(cx, parts, last)
        });
        *unsent = parts.iter().any(|part| !part.is_empty());
        written
    })
    .await
}

/// Ends the sending direction, and waits until the peer has all of it or does not want it.
pub(in crate::net) async fn delivered(send: &mut SendHalf, _: &mut RecvHalf) -> Result<(), NetError> {
    send.finish();
    poll_fn(|cx| send.shared.poll(|conn| conn.poll_acknowledged(cx))).await
}

impl Conn {
    /// Tells the peer that what it sends is not wanted, unless it has ended.
    fn say_unwanted(&mut self) {
        if !self.is_ended_by_peer() {
            self.say(Kind::Stop);
        }
    }
}
