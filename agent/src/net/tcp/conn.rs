//! One connection: TLS over the socket, and chunks inside, so that both sides know where a stream ends.
//!
//! A chunk is a u32, little endian: what it is in the highest three bits, and for data how many bytes follow in the
//! others. `END` ends a direction and is answered with `ACK`; when both have been said in both directions, the next stream
//! begins. `ALIVE` means nothing but that the process is alive; an accepted connection begins with it, so that the dialler
//! knows that it was let in.
//!
//! Everything is polled, by whichever half of the stream needs it; nothing here waits for two things.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use darter_tracker::NodeId;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Duration, Instant};
use tokio_rustls::TlsStream;

use super::wire::Wire;
use super::{ALIVE_EVERY, WRITE_BYTES};
use crate::net::error::NetError;

/// Bytes of a chunk's header.
const HEAD_BYTES: usize = 4;
/// Where its kind begins.
const KIND_SHIFT: u32 = 29;
/// Data of one chunk: between two chunks there is room for a sign of life.
const CHUNK_BYTES_MAX: usize = 1024 * 1024;
/// Of what is to be written, so many parts are given to TLS at a time: a chunk with a frame and a piece, what waits before it and
/// the end behind it.
const PARTS_AT_ONCE: usize = 8;
/// What is read and thrown away of a stream that nobody wants any more, before its connection is closed instead.
const UNWANTED_BYTES_MAX: usize = 64 * 1024;

const _: () = assert!(CHUNK_BYTES_MAX < 1 << KIND_SHIFT);

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Bytes of the stream follow.
    Data = 0,
    /// The direction ends.
    End = 1,
    /// The end has come, and all before it.
    Ack = 2,
    /// The process is alive.
    Alive = 3,
    /// What is sent is not wanted.
    Stop = 4,
    /// There is no room for this connection.
    Full = 5,
}

impl Kind {
    fn of(head: u32) -> Option<Self> {
        let all = [Self::Data, Self::End, Self::Ack, Self::Alive, Self::Stop, Self::Full];
        all.into_iter().find(|kind| *kind as u32 == head >> KIND_SHIFT)
    }

    fn head(self, bytes: usize) -> Bytes {
        // Fits: a chunk has at most a megabyte.
        Bytes::copy_from_slice(&((self as u32) << KIND_SHIFT | bytes as u32).to_le_bytes())
    }
}

/// A connection whose other end is proven.
#[derive(Debug)]
pub(super) struct Conn {
    tls: TlsStream<Wire>,
    /// Who is at the other end.
    pub(super) peer: NodeId,
    /// Where.
    pub(super) remote: SocketAddr,
    /// Counts what comes from the peer, on all its connections.
    heard: Arc<AtomicU64>,
    head: [u8; HEAD_BYTES],
    head_read: usize,
    /// Unread bytes of the data chunk that is being read.
    unread: usize,
    ended_by_peer: bool,
    stopped_by_peer: bool,
    acknowledged: bool,
    /// What TLS has not taken yet: heads of chunks, and what data chunks have.
    out: VecDeque<Bytes>,
    /// Bytes in `out` up to the end of its last data chunk.
    unwritten: usize,
    ended: bool,
    /// Why the connection is of no more use.
    failure: Option<NetError>,
    wrote: Instant,
    /// When something last came.
    heard_at: Instant,
    /// Who waits for what comes.
    reader: Option<Waker>,
}

impl Conn {
    pub(super) fn new(mut tls: TlsStream<Wire>, peer: NodeId, remote: SocketAddr, heard: Arc<AtomicU64>) -> Self {
        match &mut tls {
            TlsStream::Client(stream) => stream.get_mut().1.set_buffer_limit(Some(WRITE_BYTES)),
            TlsStream::Server(stream) => stream.get_mut().1.set_buffer_limit(Some(WRITE_BYTES)),
        }
        Self {
            tls,
            peer,
            remote,
            heard,
            head: [0; HEAD_BYTES],
            head_read: 0,
            unread: 0,
            ended_by_peer: false,
            stopped_by_peer: false,
            acknowledged: false,
            out: VecDeque::new(),
            unwritten: 0,
            ended: false,
            failure: None,
            wrote: Instant::now(),
            heard_at: Instant::now(),
            reader: None,
        }
    }

    // === Sending ===

    /// Writes `parts`, one after the other, as far as the socket takes them, and the direction's end behind the `last`; ready when
    /// it has taken all. What is left in them has not been taken yet.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &mut [Bytes],
        last: bool,
    ) -> Poll<Result<(), NetError>> {
        loop {
            self.sound()?;
            let more = parts.iter().any(|part| !part.is_empty());
            let queue = more && self.unwritten == 0;
            if queue && self.ended {
                return Poll::Ready(Err(NetError::Finished));
            }
            if (queue || self.unwritten > 0) && self.stopped_by_peer {
                return Poll::Ready(Err(NetError::Abandoned));
            }
            if queue {
                self.queue(parts, last);
            } else if last && !more && !self.ended {
                self.queue_end();
            }
            ready!(self.poll_out(cx))?;
            if parts.iter().all(Bytes::is_empty) {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Makes a data chunk of what `parts` have, as far as it fits; in one record, and one packet, with what goes before and behind.
    fn queue(&mut self, parts: &mut [Bytes], last: bool) {
        let bytes = parts.iter().map(Bytes::len).sum::<usize>().min(CHUNK_BYTES_MAX);
        self.out.push_back(Kind::Data.head(bytes));
        let mut room = bytes;
        for part in parts.iter_mut() {
            let taken = part.split_to(part.len().min(room));
            room -= taken.len();
            if !taken.is_empty() {
                self.out.push_back(taken);
            }
        }
        self.unwritten = self.out.iter().map(Bytes::len).sum();
        if last && parts.iter().all(Bytes::is_empty) {
            self.queue_end();
        }
    }

    fn queue_end(&mut self) {
        self.ended = true;
        self.out.push_back(Kind::End.head(0));
    }

    /// Says that nothing more comes. What is in the middle of a chunk cannot end cleanly: the connection is cut then.
    pub(super) fn end(&mut self, complete: bool) {
        if self.unwritten > 0 || !self.ended && !complete {
            self.ended = true;
            self.cut(NetError::Abandoned);
        } else if !self.ended {
            self.queue_end();
            self.send_queued();
        }
    }

    /// Queues a chunk without data, and sends it if that can be done at once; otherwise it goes before whatever is sent next.
    pub(super) fn say(&mut self, kind: Kind) {
        self.out.push_back(kind.head(0));
        self.send_queued();
    }

    /// Sends what is queued, if that can be done at once.
    fn send_queued(&mut self) {
        // Whoever waits to write has its waker in the socket, which must not be replaced.
        if self.is_flushed() && self.unwritten == 0 {
            // An error comes again with the next use.
            let _ = self.poll_out(&mut Context::from_waker(Waker::noop()));
        }
    }

    /// Sends what is queued.
    pub(super) fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        self.sound()?;
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS_AT_ONCE];
            slices.iter_mut().zip(&self.out).for_each(|(slice, part)| *slice = IoSlice::new(part));
            let count = self.out.len().min(PARTS_AT_ONCE);
            let written = Pin::new(&mut self.tls).poll_write_vectored(cx, &slices[..count]);
            let written = ready!(written).map_err(|error| self.fail(&error))?;
            self.written(written);
        }
        self.poll_flush(cx)
    }

    /// TLS has taken so many bytes.
    fn written(&mut self, mut bytes: usize) {
        self.unwritten = self.unwritten.saturating_sub(bytes);
        self.wrote = Instant::now();
        while let Some(part) = self.out.front_mut() {
            let taken = bytes.min(part.len());
            part.advance(taken);
            bytes -= taken;
            if !part.is_empty() {
                break;
            }
            self.out.pop_front();
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        if self.is_flushed() {
            return Poll::Ready(Ok(()));
        }
        let flushed = ready!(Pin::new(&mut self.tls).poll_flush(cx));
        Poll::Ready(flushed.map_err(|error| self.fail(&error)))
    }

    fn is_flushed(&self) -> bool {
        match &self.tls {
            TlsStream::Client(stream) => !stream.get_ref().1.wants_write(),
            TlsStream::Server(stream) => !stream.get_ref().1.wants_write(),
        }
    }

    // === Receiving ===

    /// Reads at most `max` bytes of the stream into `into`; `false` at its end.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut BytesMut,
        max: usize,
    ) -> Poll<Result<bool, NetError>> {
        while self.unread == 0 {
            if self.ended_by_peer {
                return Poll::Ready(Ok(false));
            }
            ready!(self.poll_chunk(cx))?;
        }
        self.sound()?;
        let read = tokio_util::io::poll_read_buf(Pin::new(&mut self.tls), cx, &mut into.limit(self.unread.min(max)));
        let read = self.waits(cx, read);
        let read = ready!(read).map_err(|error| self.fail(&error))?;
        self.heard(read)?;
        self.unread -= read;
        if self.wrote.elapsed() >= ALIVE_EVERY && self.out.is_empty() {
            self.wrote = Instant::now();
            self.say(Kind::Alive);
        }
        Poll::Ready(Ok(true))
    }

    /// Takes note of what comes that is not data: signs of life, acknowledgements. Pending until data comes, or the end.
    pub(super) fn poll_listen(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        while self.unread == 0 && !(self.ended && self.acknowledged) {
            ready!(self.poll_chunk(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the peer has acknowledged the end of what was sent, or does not want it. Data of the peer that nobody has
    /// read is in front of the acknowledgement: then nothing is waited for.
    pub(super) fn poll_acknowledged(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        if let Poll::Ready(Err(error)) = self.poll_out(cx) {
            return Poll::Ready(Err(error));
        }
        while !self.acknowledged && !self.stopped_by_peer && self.unread == 0 {
            ready!(self.poll_chunk(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads the head of the next chunk.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Kind, NetError>> {
        self.sound()?;
        while self.head_read < HEAD_BYTES {
            let mut head = ReadBuf::new(&mut self.head[self.head_read..]);
            let read = AsyncRead::poll_read(Pin::new(&mut self.tls), cx, &mut head);
            let read = read.map_ok(|()| head.filled().len());
            let read = self.waits(cx, read);
            let read = ready!(read).map_err(|error| self.fail(&error))?;
            self.heard(read)?;
            self.head_read += read;
        }
        self.head_read = 0;
        let head = u32::from_le_bytes(self.head);
        let bytes = (head & ((1 << KIND_SHIFT) - 1)) as usize;
        let kind = Kind::of(head);
        match kind {
            Some(Kind::Data) if bytes > 0 && bytes <= CHUNK_BYTES_MAX && !self.ended_by_peer => self.unread = bytes,
            Some(Kind::End) if !self.ended_by_peer => {
                self.ended_by_peer = true;
                self.out.push_back(Kind::Ack.head(0));
                // Otherwise it goes with what is sent next: at least this direction's end.
                if self.ended {
                    self.send_queued();
                }
            }
            Some(Kind::Ack) if self.ended => self.acknowledged = true,
            Some(Kind::Stop) => self.stopped_by_peer = true,
            Some(Kind::Alive) => {}
            Some(Kind::Full) => self.cut(NetError::Full),
            Some(Kind::Data | Kind::End | Kind::Ack) | None => self.cut(NetError::Protocol),
        }
        self.sound()?;
        Poll::Ready(kind.ok_or(NetError::Protocol))
    }

    fn heard(&mut self, read: usize) -> Result<(), NetError> {
        if read == 0 {
            self.failure.get_or_insert(NetError::ClosedByPeer);
            return self.sound();
        }
        self.heard_at = Instant::now();
        self.heard.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Remembers who waits, if it has to wait.
    fn waits<T>(&mut self, cx: &Context<'_>, polled: Poll<T>) -> Poll<T> {
        if polled.is_pending() && !self.reader.as_ref().is_some_and(|reader| reader.will_wake(cx.waker())) {
            self.reader = Some(cx.waker().clone());
        }
        polled
    }

    /// A stream begins: the peer's silence counts from now on.
    pub(super) fn begins(&mut self) {
        self.heard_at = Instant::now();
    }

    /// Shows the peer that this process lives, and looks whether it does: nothing that comes for `idle`, though it says every
    /// `keep_alive` that it lives, means that it is dead, frozen or cut off.
    pub(super) fn pulse(&mut self, keep_alive: Duration, idle: Duration) {
        if self.wrote.elapsed() >= keep_alive && self.out.is_empty() {
            self.say(Kind::Alive);
        }
        self.send_queued();
        // Takes the place of whoever waits, who is woken for it.
        let reader = self.reader.take();
        let heard = self.poll_listen(&mut Context::from_waker(Waker::noop()));
        // Data that nobody reads hides what comes behind it.
        if heard.is_pending() && self.heard_at.elapsed() >= idle {
            self.cut(NetError::Silent);
        }
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    // === Between streams ===

    /// Ready with the first byte of the peer: that it has let this agent in, or begins a stream.
    pub(super) fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        while self.unread == 0 && !self.ended_by_peer {
            if ready!(self.poll_chunk(cx))? == Kind::Alive {
                break;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the peer begins a stream.
    pub(super) fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        while self.unread == 0 && !self.ended_by_peer {
            ready!(self.poll_chunk(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Brings the stream to its end at both sides, throwing away what is left of it; then the next can begin.
    pub(super) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NetError>> {
        self.end(true);
        let mut unwanted = BytesMut::new();
        loop {
            // Both directions: what is said while reading goes out as well.
            let written = self.poll_out(cx)?;
            if self.ended_by_peer && self.acknowledged {
                ready!(written);
                break;
            }
            if self.unread > UNWANTED_BYTES_MAX {
                return Poll::Ready(Err(NetError::Abandoned));
            }
            if self.unread > 0 {
                let left = UNWANTED_BYTES_MAX;
                ready!(self.poll_read(cx, &mut unwanted, left))?;
                if unwanted.len() >= UNWANTED_BYTES_MAX {
                    return Poll::Ready(Err(NetError::Abandoned));
                }
            } else {
                ready!(self.poll_chunk(cx))?;
            }
        }
        self.ended_by_peer = false;
        self.acknowledged = false;
        self.stopped_by_peer = false;
        self.ended = false;
        self.tls_wire().shrink();
        Poll::Ready(Ok(()))
    }

    /// Whether an unused connection can be used: it is not closed and nothing has come that nobody asked for.
    pub(super) fn is_usable(&mut self) -> bool {
        self.poll_request(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Closes the socket in both directions at once. Whoever waits for it learns of it.
    pub(super) fn cut(&mut self, reason: NetError) {
        self.failure.get_or_insert(reason);
        // Fails where it is closed already.
        let _ = SockRef::from(self.tls.get_ref().0.stream()).shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn is_ended_by_peer(&self) -> bool {
        self.ended_by_peer
    }

    fn tls_wire(&mut self) -> &mut Wire {
        self.tls.get_mut().0
    }

    fn fail(&mut self, error: &io::Error) -> NetError {
        self.failure.get_or_insert_with(|| lost(error)).clone()
    }

    fn sound(&self) -> Result<(), NetError> {
        self.failure.clone().map_or(Ok(()), Err)
    }
}

/// What the failure of a socket, or of TLS on it, means to whoever uses the stream.
pub(super) fn lost(error: &io::Error) -> NetError {
    match tls_error(error) {
        Some(rustls::Error::AlertReceived(_)) => NetError::RefusedByPeer,
        Some(_) => NetError::Protocol,
        None => match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                NetError::Silent
            }
            _ => NetError::ClosedByPeer,
        },
    }
}

/// The TLS library's own error in one of a socket.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_as_they_are_written() {
        for kind in [Kind::Data, Kind::End, Kind::Ack, Kind::Alive, Kind::Stop, Kind::Full] {
            let head = kind.head(CHUNK_BYTES_MAX).get_u32_le();
            assert_eq!((Kind::of(head), head as usize & ((1 << KIND_SHIFT) - 1)), (Some(kind), CHUNK_BYTES_MAX));
        }
        assert_eq!(Kind::of(u32::MAX), None);
    }
}
