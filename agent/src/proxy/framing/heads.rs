//! The one thing about a request's head that the HTTP/1 library takes back before anybody sees it: that there was a length
//! beside chunks. Two readers could take such a request for different ones.
//!
//! [`Watched`] stands between the library and the connection and looks at the heads that pass. It follows lengths from head to
//! head, and stops at the first request that is chunked: whoever serves the connection closes it after that one.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::{io, str};

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{HEADER_BYTES_MAX, HEADERS_MAX};

/// Whether a connection has brought a head with both a length and a coding. What else came in the same breath is not told
/// apart from it.
#[derive(Clone, Default)]
pub(in crate::proxy) struct FramedTwice(Arc<AtomicBool>);

impl FramedTwice {
    /// Asked for each request, it is true before the one that it is about.
    pub(in crate::proxy) fn was_seen(&self) -> bool {
        // Whoever reads the connection asks, so that nothing has to be ordered.
        self.0.load(Ordering::Relaxed)
    }
}

/// A connection whose heads are looked at as they are read.
pub(in crate::proxy) struct Watched<I> {
    io: I,
    next: Next,
    twice: FramedTwice,
}

/// What the next byte belongs to.
enum Next {
    /// A head, of which this has come.
    Head(Vec<u8>),
    /// A body, of which so many bytes are to come.
    Body(u64),
    /// Nothing that is looked at: a request that is chunked, or that the library refuses as well, is the last one of its
    /// connection; and what is no HTTP, as in a tunnel, has no heads.
    Unwatched,
}

impl<I> Watched<I> {
    pub(in crate::proxy) fn new(io: I) -> (Self, FramedTwice) {
        let twice = FramedTwice::default();
        (Self { io, next: Next::Head(Vec::new()), twice: twice.clone() }, twice)
    }

    fn see(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match &mut self.next {
                Next::Unwatched => return,
                Next::Body(left) => {
                    let here = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    *left -= here as u64;
                    bytes = &bytes[here..];
                    if *left == 0 {
                        self.next = Next::Head(Vec::new());
                    }
                }
                Next::Head(head) => {
                    let before = head.len();
                    let fits = bytes.len().min(HEADER_BYTES_MAX - before);
                    head.extend_from_slice(&bytes[..fits]);
                    // A head ends with a line.
                    let read = if bytes[..fits].contains(&b'\n') { read(head) } else { Read::Partial };
                    match read {
                        Read::Partial if head.len() < HEADER_BYTES_MAX => return,
                        // One that is longer is refused by the library.
                        Read::Partial => self.next = Next::Unwatched,
                        Read::Whole { length, next } => {
                            bytes = bytes.get(length.saturating_sub(before)..).unwrap_or_default();
                            self.next = next;
                        }
                        Read::Twice => {
                            self.twice.0.store(true, Ordering::Relaxed);
                            self.next = Next::Unwatched;
                        }
                    }
                }
            }
        }
    }
}

/// What bytes are as a head.
enum Read {
    Partial,
    /// So many of them are one, and that is what follows.
    Whole {
        length: usize,
        next: Next,
    },
    /// They have a length and a coding.
    Twice,
}

/// Reads as the library does, with the same parser.
fn read(bytes: &[u8]) -> Read {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Read::Partial,
        Err(_) => return Read::Whole { length: bytes.len(), next: Next::Unwatched },
    };
    let coded = request.headers.iter().any(|header| header.name.eq_ignore_ascii_case(TRANSFER_ENCODING.as_str()));
    let mut lengths = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(CONTENT_LENGTH.as_str()));
    let next = match (coded, lengths.next()) {
        (true, Some(_)) => return Read::Twice,
        (true, None) => Next::Unwatched,
        (false, None) => Next::Head(Vec::new()),
        // Lengths that differ are refused by the library, and so is what is no number.
        (false, Some(length)) => number(length.value).map_or(Next::Unwatched, Next::Body),
    };
    Read::Whole { length, next }
}

/// Digits alone: `parse` would take a sign.
fn number(value: &[u8]) -> Option<u64> {
    let digits = value.iter().all(u8::is_ascii_digit);
    str::from_utf8(value).ok().filter(|_| digits)?.parse().ok()
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.see(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GET: &str = "GET / HTTP/1.1\r\nhost: h\r\n\r\n";
    const TWICE: &str = "POST / HTTP/1.1\r\nTransfer-encoding: x\r\ncontent-LENGTH: y\r\n\r\n";

    /// What is found in a text that comes in parts of so many bytes.
    fn seen(text: &str, step: usize) -> bool {
        let (mut watched, twice) = Watched::new(());
        text.as_bytes().chunks(step).for_each(|part| watched.see(part));
        twice.was_seen()
    }

    #[test]
    fn a_head_that_is_framed_twice_is_found_wherever_a_head_may_be() {
        let body = format!("POST / HTTP/1.1\r\ncontent-length: {}\r\n\r\n{TWICE}", TWICE.len());
        let chunked = format!("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n{TWICE}");
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n{TWICE}", "x".repeat(HEADER_BYTES_MAX));
        let cases = [
            (TWICE.to_owned(), true),
            (TWICE.replace("\r\n", "\n"), true),
            (format!("\r\n\r\n{TWICE}"), true),
            (format!("{GET}{GET}{TWICE}"), true),
            (format!("{body}{TWICE}"), true),
            (format!("POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n{TWICE}"), true),
            (GET.to_owned(), false),
            (body, false),
            // The last of its connection.
            (chunked, false),
            // What the library refuses.
            (format!("no request\r\n\r\n{TWICE}"), false),
            (format!("POST / HTTP/1.1\r\ncontent-length: +5\r\n\r\n{TWICE}"), false),
            (long, false),
        ];
        for step in [1, 2, 3, 7, 64, 1 << 20] {
            for (text, found) in &cases {
                assert_eq!(seen(text, step), *found, "{step} bytes at a time: {text}");
            }
        }
    }

    #[test]
    fn a_body_is_not_kept() {
        let (mut watched, _) = Watched::new(());
        watched.see(b"POST / HTTP/1.1\r\ncontent-length: 10000000000\r\n\r\n");
        for _ in 0..1000 {
            watched.see(&[b'x'; 1 << 16]);
        }
        assert!(matches!(watched.next, Next::Body(left) if left == 10_000_000_000 - (1000 << 16)));
    }
}
