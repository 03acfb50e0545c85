//! The same over HTTP/2, written frame by frame: no client's library says what is wrong.

use std::sync::Arc;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;

use super::{SECRET, World};
use crate::wait::PATIENCE;
use crate::wire;

/// What has to come of a request.
#[derive(Clone, Copy, Debug)]
enum Want {
    /// This answer; 200 comes from the registry.
    Status(u16),
    /// No success, and nothing that the registry takes for a request.
    Nothing,
}
use Want::{Nothing, Status};

/// A request that has each pseudo-header but those it names itself; `-` leaves one out, `+` adds another one. `{h}` is the
/// tunnel's host, `{S}` a request that must never be taken for one.
type Case = (&'static [(&'static str, &'static str)], Want);

const GETS: &[Case] = &[
    (&[], Status(200)),
    (&[("host", "{h}")], Status(200)),
    (&[(":authority", "-"), ("host", "{h}")], Status(200)),
    (&[("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers")], Status(200)),
    // Whom it is for.
    (&[(":authority", "{store}")], Status(421)),
    (&[(":authority", "127.0.0.1:{trap}")], Status(421)),
    (&[(":authority", "169.254.169.254")], Status(421)),
    (&[(":authority", "{agent}:{admin}")], Status(421)),
    (&[(":authority", "user@{h}")], Status(421)),
    (&[(":authority", "{store}"), ("host", "{h}")], Status(421)),
    (&[("host", "{store}")], Status(421)),
    (&[("host", "127.0.0.1:{trap}")], Status(421)),
    (&[("host", "")], Status(421)),
    (&[(":authority", "-"), ("host", "{store}")], Status(421)),
    (&[(":scheme", "http")], Status(421)),
    (&[(":scheme", "ftp")], Status(421)),
    (&[("host", "{h}"), ("host", "{h}")], Status(400)),
    (&[("host", "{h}"), ("host", "{store}")], Status(400)),
    (&[("host", "a b")], Status(400)),
    (&[(":authority", "-")], Status(400)),
    (&[(":authority", "")], Nothing),
    (&[(":authority", "{h}\r\nx: y")], Nothing),
    (&[("+:authority", "{store}")], Nothing),
    // Paths.
    (&[(":path", "//evil.example/v2/")], Status(200)),
    (&[(":path", "/v2/?ns=127.0.0.1:{trap}")], Status(200)),
    (&[(":path", "v2/")], Nothing),
    (&[(":path", ":{trap}/v2/")], Nothing),
    (&[(":path", "@127.0.0.1:{trap}/v2/")], Nothing),
    (&[(":path", ".evil.example/v2/")], Nothing),
    (&[(":path", "http://{store}/v2/")], Nothing),
    (&[(":path", "*")], Nothing),
    (&[(":path", "-")], Nothing),
    (&[(":path", "")], Nothing),
    (&[(":path", "/v2/a b")], Nothing),
    (&[(":path", "/v2/\0")], Nothing),
    (&[(":path", "/v2/ HTTP/1.1\r\nhost: evil.example\r\n\r\n")], Nothing),
    (&[("+:path", "/v2/smuggled")], Nothing),
    // Methods, schemes, and other headers with a colon.
    (&[(":method", "-")], Nothing),
    (&[(":method", "G ET")], Nothing),
    (&[(":method", "GET /v2/smuggled HTTP/1.1\r\n")], Nothing),
    (&[(":scheme", "-")], Nothing),
    (&[(":status", "200")], Nothing),
    (&[(":protocol", "websocket")], Nothing),
    (&[(":unknown", "x")], Nothing),
    (&[("x", "y"), ("+:path", "/v2/smuggled")], Nothing),
    (&[(":method", "CONNECT"), (":scheme", "-"), (":path", "-")], Status(400)),
    (&[(":method", "CONNECT"), (":scheme", "-"), (":path", "-"), (":authority", "127.0.0.1:{trap}")], Status(400)),
    (&[(":method", "CONNECT")], Nothing),
    (&[(":method", "CONNECT"), (":protocol", "websocket")], Nothing),
    // Lines that are none.
    (&[("x", "a\r\n\r\n{S}")], Nothing),
    (&[("x", "a\r\ntransfer-encoding: chunked")], Nothing),
    (&[("x", "a\nb")], Nothing),
    (&[("x", "a\rb")], Nothing),
    (&[("x", "a\0b")], Nothing),
    (&[("x\r\ny", "z")], Nothing),
    (&[("x y", "z")], Nothing),
    (&[("x: y", "z")], Nothing),
    (&[("", "z")], Nothing),
    (&[("X-Upper", "z")], Nothing),
    // What is for one connection.
    (&[("connection", "close")], Nothing),
    (&[("transfer-encoding", "chunked")], Nothing),
    (&[("upgrade", "h2c")], Nothing),
    (&[("keep-alive", "timeout=9")], Nothing),
    (&[("proxy-connection", "keep-alive")], Nothing),
    (&[("te", "gzip")], Nothing),
    (&[("content-length", "5")], Nothing),
];

/// The same with a body.
const POSTS: &[(Case, &str)] = &[
    ((&[], Status(200)), "{S}"),
    ((&[("content-length", "5")], Status(200)), "hello"),
    ((&[("expect", "100-continue")], Status(200)), "hello"),
    ((&[("content-length", "5")], Nothing), "hello{S}"),
    ((&[("content-length", "500")], Nothing), "hello"),
    ((&[("content-length", "0")], Nothing), "{S}"),
    ((&[("content-length", "x")], Nothing), "hello"),
    ((&[("content-length", "+5")], Nothing), "hello"),
    ((&[("content-length", "5, 5")], Nothing), "hello"),
    ((&[("content-length", "5"), ("content-length", "6")], Nothing), "hello"),
    ((&[("content-length", "6"), ("content-length", "5")], Nothing), "hello"),
    ((&[("content-length", "5"), ("transfer-encoding", "chunked")], Nothing), "hello"),
];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// What an agent says to whom it takes for an attacker.
const ENHANCE_YOUR_CALM: u8 = 11;

/// More than any client takes back at a time.
const FLOOD: u32 = 10_000;

/// Requests that a registry may see of a flood that was taken back.
const FLOOD_SEEN_MAX: usize = 100;

/// What was answered.
#[derive(Debug, Default)]
struct Heard {
    /// By the order in which the streams ended; 0 for one that was reset, or for all that were left at the end.
    statuses: Vec<u16>,
    /// Why the connection was ended.
    goaway: Option<u8>,
}

impl World {
    /// All cases over HTTP/2.
    pub(super) async fn over_http2(&mut self) {
        let before = self.cases;
        for (fields, want) in GETS {
            let request = self.request("GET", fields, None);
            self.framed_once(&format!("HTTP/2 GET {fields:?}"), request, *want, "").await;
        }
        for ((fields, want), body) in POSTS {
            let body = body.replace("{S}", &self.smuggled());
            let request = self.request("POST", fields, Some(&body));
            self.framed_once(&format!("HTTP/2 POST {fields:?}"), request, *want, &body).await;
        }
        self.frames().await;
        self.floods().await;
        println!("HTTP/2: {} cases", self.cases - before);
    }

    fn smuggled(&self) -> String {
        format!("GET /v2/smuggled HTTP/1.1\r\nhost: {}\r\n\r\n", self.registry.address)
    }

    /// A request's frames, on the first stream.
    fn request(&self, method: &str, fields: &[(&str, &str)], body: Option<&str>) -> Vec<u8> {
        let end = if body.is_none() { END_STREAM } else { 0 };
        let headers = frame(HEADERS, END_HEADERS | end, 1, &self.block(method, fields));
        let body = body.map(|body| frame(DATA, END_STREAM, 1, body.as_bytes())).unwrap_or_default();
        [headers, body].concat()
    }

    fn block(&self, method: &str, fields: &[(&str, &str)]) -> Vec<u8> {
        let host = self.registry.address.to_string();
        let mut block = Vec::new();
        for (name, value) in [(":method", method), (":scheme", "https"), (":authority", &host), (":path", "/v2/case")] {
            match fields.iter().find(|(own, _)| *own == name) {
                Some((_, "-")) => {}
                Some((_, own)) => block.extend(self.field(name, own)),
                None => block.extend(self.field(name, value)),
            }
        }
        block.extend(self.field("authorization", &format!("Bearer {SECRET}")));
        let usual = [":method", ":scheme", ":authority", ":path"];
        for (name, value) in fields.iter().filter(|(name, _)| !usual.contains(name)) {
            block.extend(self.field(name.trim_start_matches('+'), value));
        }
        block
    }

    /// A header that no table remembers.
    fn field(&self, name: &str, value: &str) -> Vec<u8> {
        let value = value.replace("{h}", &self.registry.address.to_string()).replace("{S}", &self.smuggled());
        [vec![0], string(name), string(&self.names.fill(&value))].concat()
    }

    async fn framed_once(&mut self, name: &str, request: Vec<u8>, want: Want, body: &str) {
        let heard = self.say_frames(&[preface(), request].concat(), 1).await;
        let seen = self.registry.take();
        let host = self.registry.address.to_string();
        let faults: Vec<_> = seen.iter().flat_map(|seen| seen.faults(&host)).collect();
        let holds = match want {
            Status(200) => {
                let whole = |seen: &super::recorder::Seen| {
                    let cookies: Vec<_> = seen.headers.get_all("cookie").iter().collect();
                    seen.body == body && (cookies.is_empty() || cookies == ["a=1; b=2"])
                };
                heard.statuses == [200] && matches!(&seen[..], [seen] if whole(seen))
            }
            Status(status) => heard.statuses == [status] && seen.is_empty(),
            Nothing => heard.statuses.iter().all(|status| *status == 0 || *status >= 400) && seen.is_empty(),
        };
        self.case(name, holds && faults.is_empty(), &(heard, want, faults, seen));
    }

    /// Frames that should not be, or not there.
    async fn frames(&mut self) {
        let get = self.block("GET", &[]);
        let many: Vec<(String, String)> = (0..100).map(|at| (format!("x-{at}"), "y".to_owned())).collect();
        let many: Vec<_> = many.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let large = "y".repeat(16_000);
        let large = [("x-1", large.as_str()), ("x-2", &large), ("x-3", &large)];
        // A name and value of 4 KiB that is put into the table once, and referred to by a byte a thousand times.
        let bomb = [get.clone(), vec![0x40], string("x"), string(&"y".repeat(4000)), vec![0xbe; 1000]].concat();
        let spread = |block: &[u8]| {
            let mut parts = block.chunks(16_000);
            let first = frame(HEADERS, END_STREAM, 1, parts.next().unwrap());
            let rest = parts.map(|part| frame(CONTINUATION, 0, 1, part)).collect::<Vec<_>>().concat();
            [first, rest, frame(CONTINUATION, END_HEADERS, 1, &[])].concat()
        };
        let whole = |stream, block: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, stream, block);
        let open = frame(HEADERS, END_HEADERS, 1, &self.block("POST", &[]));
        let trailers = |flags, fields: &[(&str, &str)]| {
            let block: Vec<u8> = fields.iter().flat_map(|(name, value)| self.field(name, value)).collect();
            frame(HEADERS, END_HEADERS | flags, 1, &block)
        };
        let other_path = trailers(END_STREAM, &[(":path", "/v2/smuggled")]);
        let odd = trailers(END_STREAM, &[("host", "evil.example"), ("content-length", "9"), ("authorization", "x")]);
        let http1 = format!("GET /v2/case HTTP/1.1\r\nhost: {}\r\n\r\n", self.registry.address);
        let cases: Vec<(&str, Vec<u8>, Want)> = vec![
            ("HTTP/1.1 after HTTP/2 was agreed on", http1.into_bytes(), Nothing),
            ("a preface that is none", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n".to_vec(), Nothing),
            ("101 headers", [preface(), whole(1, &self.block("GET", &many))].concat(), Status(431)),
            ("48 KiB of headers", [preface(), spread(&self.block("GET", &large))].concat(), Nothing),
            ("4 MB of headers out of 5 KB", [preface(), whole(1, &bomb)].concat(), Nothing),
            ("a block that is no headers", [preface(), whole(1, &[0xff; 64])].concat(), Nothing),
            ("an index past the table", [preface(), whole(1, &[0xbf])].concat(), Nothing),
            ("a request on stream 0", [preface(), whole(0, &get)].concat(), Nothing),
            ("a request on a stream of the server", [preface(), whole(2, &get)].concat(), Nothing),
            ("data on stream 0", [preface(), frame(DATA, END_STREAM, 0, b"x")].concat(), Nothing),
            ("data before a request", [preface(), frame(DATA, END_STREAM, 1, b"x")].concat(), Nothing),
            ("headers that go on from nowhere", [preface(), frame(CONTINUATION, 4, 1, &get)].concat(), Nothing),
            (
                "another frame between headers",
                {
                    let begun = frame(HEADERS, END_STREAM, 1, &get);
                    [preface(), begun, frame(PING, 0, 0, &[0; 8]), frame(CONTINUATION, 4, 1, &[])].concat()
                },
                Nothing,
            ),
            ("a frame that is too large", [preface(), frame(HEADERS, 5, 1, &vec![0; 20_000])].concat(), Nothing),
            ("settings that are none", [preface(), frame(SETTINGS, 0, 0, &[0; 5])].concat(), Nothing),
            (
                "a window of more than there is",
                {
                    let window = [0, 4, 0xff, 0xff, 0xff, 0xff];
                    [preface(), frame(SETTINGS, 0, 0, &window), whole(1, &get)].concat()
                },
                Nothing,
            ),
            (
                "a window that overflows",
                {
                    let update = frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]);
                    [preface(), update.clone(), update].concat()
                },
                Nothing,
            ),
            ("a promise by a client", [preface(), frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2])].concat(), Nothing),
            // The library takes these for no headers, and no trailers are passed on.
            ("trailers with a path", [preface(), open.clone(), other_path].concat(), Status(200)),
            ("trailers that are not the end", [preface(), open.clone(), trailers(0, &[("x", "y")])].concat(), Nothing),
            ("trailers", [preface(), open, odd].concat(), Status(200)),
        ];
        for (name, bytes, want) in cases {
            let heard = self.say_frames(&bytes, 1).await;
            let seen = self.registry.take();
            let faults: Vec<_> = seen.iter().flat_map(|it| it.faults(&self.registry.address.to_string())).collect();
            let reached = usize::from(matches!(want, Status(200)));
            let holds = seen.len() == reached
                && seen.iter().all(|seen| seen.path == "/v2/case")
                && faults.is_empty()
                && match want {
                    Status(status) => heard.statuses == [status],
                    Nothing => heard.statuses.iter().all(|status| *status == 0 || *status >= 400),
                };
            self.case(&format!("HTTP/2: {name}"), holds, &(heard, want, faults, seen));
        }
    }

    /// Much of what costs a client little.
    async fn floods(&mut self) {
        let get = self.block("GET", &[]);
        let streams = || (0..FLOOD).map(|at| at * 2 + 1);
        let taken_back: Vec<u8> = streams()
            .flat_map(|stream| {
                let headers = frame(HEADERS, END_HEADERS | END_STREAM, stream, &get);
                [headers, frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
            })
            .collect();
        let made_reset: Vec<u8> = streams()
            .flat_map(|stream| {
                let headers = frame(HEADERS, END_HEADERS, stream, &get);
                // A window that overflows is an error of the stream, which the server has to reset.
                [headers, frame(WINDOW_UPDATE, 0, stream, &[0x7f, 0xff, 0xff, 0xff])].concat()
            })
            .collect();
        let malformed: Vec<u8> = {
            let bad = self.block("GET", &[("connection", "close")]);
            streams().flat_map(|stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &bad)).collect()
        };
        let endless: Vec<u8> = {
            let rest = frame(CONTINUATION, 0, 1, &self.field("x", "y")).repeat(FLOOD as usize);
            [frame(HEADERS, END_STREAM, 1, &get), rest].concat()
        };
        for (name, flood) in [
            ("requests that are taken back", taken_back),
            ("requests that have to be reset", made_reset),
            ("malformed requests", malformed),
            ("headers without an end", endless),
        ] {
            let heard = self.say_frames(&[preface(), flood].concat(), usize::MAX).await;
            let seen = self.registry.take().len();
            let holds = heard.goaway == Some(ENHANCE_YOUR_CALM) && seen <= FLOOD_SEEN_MAX;
            println!("HTTP/2 flood of {name}: {seen} reached the registry");
            self.case(&format!("HTTP/2 flood of {name}"), holds, &(heard.goaway, seen));
        }
        // Whoever asks properly is served as before.
        let request = self.request("GET", &[], None);
        self.framed_once("HTTP/2 after the floods", request, Status(200), "").await;
    }

    /// Says bytes in a tunnel in which HTTP/2 was agreed on, and hears until so many streams have ended, or all has.
    async fn say_frames(&self, bytes: &[u8], streams: usize) -> Heard {
        let to = self.registry.address;
        let (status, stream) = wire::tunnel(self.proxy(), &to.to_string()).await;
        assert_eq!(status, 200);
        let tls = TlsConnector::from(over_http2(&self.stage.agent(0).tls()));
        let stream = tls.connect(ServerName::IpAddress(to.ip().into()), stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (mut reader, mut writer) = tokio::io::split(stream);
        let exchange = async {
            let hearing = hear(&mut reader, streams);
            let saying = async {
                // Whoever has heard enough closes before it has heard all.
                let _ = writer.write_all(bytes).await;
                let _ = writer.flush().await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                heard = hearing => heard,
                () = saying => unreachable!(),
            }
        };
        let what = bytes[..bytes.len().min(1000)].escape_ascii();
        tokio::time::timeout(PATIENCE, exchange).await.unwrap_or_else(|_| panic!("it does not end: {what}"))
    }
}

/// The same client, if it spoke HTTP/2.
pub(crate) fn over_http2(tls: &Arc<ClientConfig>) -> Arc<ClientConfig> {
    let mut tls = ClientConfig::clone(tls);
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(tls)
}

/// How a client begins: without a table, so that what it hears can be read by itself.
pub(crate) fn preface() -> Vec<u8> {
    [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0])].concat()
}

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A text as RFC 7541 has it, not compressed.
pub(crate) fn string(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    match text.len() {
        short @ 0..127 => out.push(short as u8),
        long => {
            out.push(127);
            let mut rest = long - 127;
            while rest >= 128 {
                out.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            out.push(rest as u8);
        }
    }
    out.extend_from_slice(text.as_bytes());
    out
}

async fn hear(reader: &mut (impl AsyncRead + Unpin), streams: usize) -> Heard {
    let mut heard = Heard::default();
    let mut status = 0;
    while heard.statuses.len() < streams {
        let mut head = [0; 9];
        if reader.read_exact(&mut head).await.is_err() {
            heard.statuses.push(0);
            break;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let mut payload = vec![0; length];
        if reader.read_exact(&mut payload).await.is_err() {
            heard.statuses.push(0);
            break;
        }
        match kind {
            HEADERS => status = read_status(&payload),
            RST_STREAM => heard.statuses.push(0),
            GOAWAY => heard.goaway = payload.get(7).copied(),
            _ => {}
        }
        if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
            heard.statuses.push(status);
        }
    }
    heard
}

/// The status at the beginning of a block of headers (RFC 7541, appendices A and B); 1 if it is none.
fn read_status(block: &[u8]) -> u16 {
    // The size of the table may come first.
    let block = &block[block.iter().take_while(|byte| **byte & 0xe0 == 0x20).count()..];
    match block {
        [byte @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(byte - 0x88)],
        [0x48 | 0x08 | 0x18, 3, digits @ ..] => {
            digits.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(1)
        }
        [0x48 | 0x08 | 0x18, length, digits @ ..] if length & 0x80 != 0 => compressed(digits),
        _ => 1,
    }
}

/// Three digits in Huffman's code: 0, 1 and 2 have five bits, the others six.
fn compressed(bytes: &[u8]) -> u16 {
    let bits: Vec<u16> =
        bytes.iter().take(3).flat_map(|byte| (0..8).rev().map(move |at| u16::from(byte >> at & 1))).collect();
    let number = |bits: &[u16]| bits.iter().fold(0, |sum, bit| sum * 2 + bit);
    let mut at = 0;
    let mut status = 0;
    for _ in 0..3 {
        let short = bits.get(at..at + 5).map_or(0, number);
        let (digit, length) = if short < 3 { (short, 5) } else { (bits.get(at..at + 6).map_or(22, number) - 22, 6) };
        status = status * 10 + digit;
        at += length;
    }
    status
}
