//! The socket as TLS sees it: reads are served from a buffer that is filled with as much as the kernel has.
//!
//! The TLS library asks for 4 KiB at a time. The buffer begins small, grows while reads fill it, and is given back when a
//! stream is over: an unused connection costs kilobytes.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::{READ_AHEAD_BYTES_MAX, READ_AHEAD_BYTES_MIN};

/// A TCP stream with read-ahead.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    ahead: BytesMut,
    /// How much is asked for at a time.
    want: usize,
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, ahead: BytesMut::new(), want: READ_AHEAD_BYTES_MIN }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Gives back what was taken for a piece.
    pub(super) fn shrink(&mut self) {
        self.want = READ_AHEAD_BYTES_MIN;
        if self.ahead.is_empty() {
            self.ahead = BytesMut::new();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ahead.is_empty() {
            this.ahead.clear();
            this.ahead.reserve(this.want);
            let read = ready!(tokio_util::io::poll_read_buf(Pin::new(&mut this.stream), cx, &mut this.ahead))?;
            if read >= this.want {
                this.want = (this.want * 2).min(READ_AHEAD_BYTES_MAX);
            }
        }
        let len = this.ahead.len().min(into.remaining());
        into.put_slice(&this.ahead[..len]);
        this.ahead.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
