//! What travels on a stream: frames, and raw bytes between them.
//!
//! A frame is its length (u32, little endian) and a value in postcard. Whether raw bytes follow, and how many, is
//! said by the frame before them. Nothing is allocated before its length is found to be within bounds.
//!
//! Not here: what the frames mean.

use bytes::{Bytes, BytesMut};
use darter_tracker::PieceSize;
use futures_util::FutureExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::NetError;
use super::link::Use;
use super::tcp;
use super::way::Way;

/// Bound on an encoded frame: sixteen of the largest bitmaps (8 KiB), far above any message, far below what hurts.
pub const FRAME_BYTES_MAX: usize = 128 * 1024;

/// Bytes of a frame's length.
const HEADER_BYTES: usize = 4;

/// A bidirectional stream to a peer whose identity is proven.
#[derive(Debug)]
pub struct Stream {
    sender: Sender,
    receiver: Receiver,
}

/// The sending half of a [`Stream`]. Dropping it ends the direction like [`Sender::finish`].
#[derive(Debug)]
pub struct Sender {
    half: SendHalf,
    /// What an earlier, cancelled call left unsent: of a frame, and of bytes behind it.
    pending: [Bytes; 2],
}

#[derive(Debug)]
enum SendHalf {
    Quic(quinn::SendStream, #[expect(dead_code, reason = "held")] Use),
    Tcp(tcp::SendHalf),
}

/// The receiving half of a [`Stream`]. Dropping it before the end tells the peer to stop sending.
#[derive(Debug)]
pub struct Receiver {
    half: RecvHalf,
    /// What has come of the frame's header, then of its body, or of the piece that is being read.
    partial: BytesMut,
    /// Length of the frame's body, once its header has come.
    body: Option<usize>,
}

#[derive(Debug)]
enum RecvHalf {
    Quic(quinn::RecvStream, #[expect(dead_code, reason = "held")] Use),
    Tcp(tcp::RecvHalf),
}

impl Stream {
    pub(super) fn quic(send: quinn::SendStream, receive: quinn::RecvStream, link: Use) -> Self {
        Self::new(SendHalf::Quic(send, link.clone()), RecvHalf::Quic(receive, link))
    }

    pub(super) fn tcp(send: tcp::SendHalf, receive: tcp::RecvHalf) -> Self {
        Self::new(SendHalf::Tcp(send), RecvHalf::Tcp(receive))
    }

    fn new(send: SendHalf, receive: RecvHalf) -> Self {
        Self {
            sender: Sender { half: send, pending: Default::default() },
            receiver: Receiver { half: receive, partial: BytesMut::new(), body: None },
        }
    }

    /// What it goes over.
    #[must_use]
    pub fn way(&self) -> Way {
        match self.sender.half {
            SendHalf::Quic(..) => Way::Quic,
            SendHalf::Tcp(_) => Way::Tcp,
        }
    }

    /// Sends a frame; see [`Sender::send`].
    ///
    /// # Errors
    /// As there.
    pub async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), NetError> {
        self.push([encode(message)?, Bytes::new()], false).await
    }

    /// Sends a frame and ends the sending direction; see [`Sender::send_last`].
    ///
    /// # Errors
    /// As there.
    pub async fn send_last<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), NetError> {
        self.push([encode(message)?, Bytes::new()], true).await
    }

    /// Sends a frame and raw bytes behind it, and ends the sending direction; see [`Sender::send_last`].
    ///
    /// # Errors
    /// As there.
    pub async fn send_last_with<T: Serialize + Sync>(&mut self, message: &T, bytes: Bytes) -> Result<(), NetError> {
        self.push([encode(message)?, bytes], true).await
    }

    /// Sends raw bytes; see [`Sender::send_bytes`].
    ///
    /// # Errors
    /// As there.
    pub async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), NetError> {
        self.push([Bytes::new(), bytes], false).await
    }

    /// Ends the sending direction; see [`Sender::finish`].
    pub fn finish(&mut self) {
        self.sender.finish();
    }

    /// Like [`Self::finish`], and waits until the peer has acknowledged every byte, or does not want them. Only then are they
    /// off this node's link: what has been sent is merely in the transport's buffers.
    ///
    /// # Errors
    /// Why the connection died.
    pub async fn deliver(&mut self) -> Result<(), NetError> {
        self.finish();
        match (&mut self.sender.half, &mut self.receiver.half) {
            (SendHalf::Quic(stream, _), _) => match stream.stopped().await {
                Ok(_) | Err(quinn::StoppedError::ZeroRttRejected) => Ok(()),
                Err(quinn::StoppedError::ConnectionLost(lost)) => Err(lost.into()),
            },
            (SendHalf::Tcp(send), RecvHalf::Tcp(receive)) => tcp::delivered(send, receive).await,
            (SendHalf::Tcp(_), RecvHalf::Quic(..)) => Err(NetError::Protocol),
        }
    }

    /// Receives a frame; see [`Receiver::receive`].
    ///
    /// # Errors
    /// As there.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, NetError> {
        self.receiver.receive().await
    }

    /// Receives raw bytes; see [`Receiver::receive_bytes`].
    ///
    /// # Errors
    /// As there.
    pub async fn receive_bytes(&mut self, len: usize) -> Result<Bytes, NetError> {
        self.receiver.receive_bytes(len).await
    }

    /// Like [`Sender::push`]. Over TCP it is this that hears the peer's signs of life meanwhile.
    async fn push(&mut self, parts: [Bytes; 2], last: bool) -> Result<(), NetError> {
        let (SendHalf::Tcp(send), RecvHalf::Tcp(receive)) = (&mut self.sender.half, &mut self.receiver.half) else {
            return self.sender.push(parts, last).await;
        };
        let pending = &mut self.sender.pending;
        tcp::write_listening(send, receive, pending, false).await?;
        *pending = parts;
        tcp::write_listening(send, receive, pending, last).await
    }

    /// The two directions, to be used by two tasks.
    #[must_use]
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

impl Sender {
    /// Sends `message` as one frame. Returns when the transport has taken it, which waits for the peer to read.
    ///
    /// If the call is cancelled, the rest of the frame goes out before whatever is sent next, or never: the peer then
    /// finds the stream truncated.
    ///
    /// # Errors
    /// [`NetError::FrameTooLong`] and [`NetError::Malformed`] (a value that postcard cannot encode) with nothing sent;
    /// otherwise why the stream is of no more use.
    pub async fn send<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), NetError> {
        self.push([encode(message)?, Bytes::new()], false).await
    }

    /// Like [`Self::send`], and ends the sending direction behind it, in the same packet where there is room.
    ///
    /// # Errors
    /// As there.
    pub async fn send_last<T: Serialize + Sync>(&mut self, message: &T) -> Result<(), NetError> {
        self.push([encode(message)?, Bytes::new()], true).await
    }

    /// Sends bytes as they are. Cancelling acts as with [`Self::send`].
    ///
    /// # Errors
    /// Why the stream is of no more use.
    pub async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), NetError> {
        self.push([Bytes::new(), bytes], false).await
    }

    /// Ends the sending direction: the peer's next `receive` gives `None`. What was sent still arrives. Does nothing
    /// the second time.
    pub fn finish(&mut self) {
        match &mut self.half {
            // Fails if the direction has ended already, which is what is wanted.
            SendHalf::Quic(stream, _) => drop(stream.finish()),
            SendHalf::Tcp(half) => half.finish(),
        }
    }

    async fn push(&mut self, parts: [Bytes; 2], last: bool) -> Result<(), NetError> {
        self.flush(false).await?;
        self.pending = parts;
        self.flush(last).await
    }

    async fn flush(&mut self, last: bool) -> Result<(), NetError> {
        match &mut self.half {
            SendHalf::Quic(stream, _) => {
                while self.pending.iter().any(|part| !part.is_empty()) {
                    stream.write_chunks(&mut self.pending).await?;
                }
                if last {
                    // Fails if the direction has ended already, which is what is wanted.
                    drop(stream.finish());
                }
                Ok(())
            }
            SendHalf::Tcp(half) => half.write(&mut self.pending, last).await,
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Where the end has come, but was not read yet, the library would still have the peer told to stop, in a packet of its own.
        if let RecvHalf::Quic(stream, _) = &mut self.half {
            let _ = stream.read_chunk(1, true).now_or_never();
        }
    }
}

impl Receiver {
    /// Receives one frame; `None` when the peer has ended the stream between frames.
    ///
    /// A cancelled call loses nothing: the next one goes on where it was.
    ///
    /// # Errors
    /// [`NetError::FrameTooLong`], [`NetError::Truncated`], [`NetError::Malformed`], or why the connection died.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, NetError> {
        let len = match self.body {
            Some(len) => len,
            None => match self.header().await? {
                Some(len) => len,
                None => return Ok(None),
            },
        };
        self.fill(len).await?;
        self.body = None;
        let body = self.partial.split();
        match postcard::take_from_bytes(&body) {
            Ok((message, [])) => Ok(Some(message)),
            // Left-over bytes mean that the two sides do not speak of the same thing.
            Ok(_) | Err(_) => Err(NetError::Malformed),
        }
    }

    /// Receives exactly `len` raw bytes, at most one piece. A cancelled call must be repeated with the same `len`.
    ///
    /// # Errors
    /// [`NetError::PieceTooLong`] with nothing read, [`NetError::Truncated`], or why the connection died.
    pub async fn receive_bytes(&mut self, len: usize) -> Result<Bytes, NetError> {
        if len > PieceSize::MAX_BYTES as usize {
            return Err(NetError::PieceTooLong { bytes: len });
        }
        self.fill(len).await?;
        Ok(self.partial.split().freeze())
    }

    /// The next frame's length, checked; `None` at a clean end.
    async fn header(&mut self) -> Result<Option<usize>, NetError> {
        match self.fill(HEADER_BYTES).await {
            Ok(()) => {}
            Err(NetError::Truncated) if self.partial.is_empty() => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&self.partial[..HEADER_BYTES]);
        let len = u32::from_le_bytes(header) as usize;
        if len > FRAME_BYTES_MAX {
            // The header stays, so that the stream gives the same answer however often it is asked.
            return Err(NetError::FrameTooLong { bytes: len });
        }
        self.partial.clear();
        self.body = Some(len);
        Ok(Some(len))
    }

    /// Reads until `partial` has `len` bytes and no more.
    async fn fill(&mut self, len: usize) -> Result<(), NetError> {
        self.partial.reserve(len.saturating_sub(self.partial.len()));
        while self.partial.len() < len {
            let wanted = len - self.partial.len();
            let more = match &mut self.half {
                RecvHalf::Quic(stream, _) => {
                    let chunk = stream.read_chunk(wanted, true).await?;
                    chunk.map(|chunk| self.partial.extend_from_slice(&chunk.bytes)).is_some()
                }
                RecvHalf::Tcp(half) => half.read(&mut self.partial, wanted).await?,
            };
            if !more {
                return Err(NetError::Truncated);
            }
        }
        Ok(())
    }
}

/// A frame with its length in front.
fn encode<T: Serialize>(message: &T) -> Result<Bytes, NetError> {
    let mut frame = postcard::to_extend(message, vec![0; HEADER_BYTES]).map_err(|_| NetError::Malformed)?;
    let bytes = frame.len() - HEADER_BYTES;
    if bytes > FRAME_BYTES_MAX {
        return Err(NetError::FrameTooLong { bytes });
    }
    // Fits: the bound is far below u32::MAX.
    frame[..HEADER_BYTES].copy_from_slice(&(bytes as u32).to_le_bytes());
    Ok(frame.into())
}
