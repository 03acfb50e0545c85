//! The ways in which a registry is not as it should be, and what has to come of each.

use std::time::Duration;

use super::registry::{Asked, Manner, part, right, said, serve};
use super::server::{Reply, reply};

const MIB: u64 = 1 << 20;

/// A document that some load balancers give with 200.
const SORRY: &[u8] = b"{\"errors\":[{\"code\":\"UNAVAILABLE\",\"message\":\"please come again\"}]}";

/// What clients get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The blob.
    Right,
    /// The registry's own refusal, or what the agent says in its place.
    Refused(&'static [u16]),
    /// The blob, or an error of the registry's or the agent's: whoever asked at the wrong moment may be told so.
    RightOrFailed,
    /// The blob, or a connection that is cut: wrong bytes may have been passed on before others came.
    RightOrCut,
    /// Nothing that could be taken for the blob: a connection that is cut, the redirect itself, 502 or 503.
    Broken,
    /// What the registry gave and how it declared it, for the client to decode.
    Encoded,
}

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) blob_bytes: u64,
    pub(super) manner: Manner,
    pub(super) outcome: Outcome,
    /// Requests for the blob that the registry may get until both clients have their answers.
    pub(super) requests_max: usize,
}

const fn case(name: &'static str, manner: Manner, outcome: Outcome) -> Case {
    Case { name, blob_bytes: MIB + 1, manner, outcome, requests_max: 24 }
}

pub(super) const CASES: &[Case] = &[
    case("redirected", redirected, Outcome::Right),
    case("expired-once", redirected, Outcome::Right),
    case("expired-always", redirected, Outcome::Refused(&[307, 403])),
    Case { requests_max: 40, ..case("redirected-in-circles", in_circles, Outcome::Broken) },
    case("no-ranges", no_ranges, Outcome::Right),
    case("ranges-refused", ranges_refused, Outcome::Right),
    case("another-range", another_range, Outcome::Right),
    case("busy-once", busy_once, Outcome::Right),
    case("busy-for-long", busy_for_long, Outcome::Refused(&[429])),
    case("flapping", flapping, Outcome::RightOrFailed),
    case("down", down, Outcome::Broken),
    case("closes-at-first", closes_at_first, Outcome::RightOrFailed),
    case("resets-at-first", resets_at_first, Outcome::Right),
    case("resets-always", resets_always, Outcome::Broken),
    case("ends-wrong-at-first", ends_wrong_at_first, Outcome::RightOrCut),
    case("ends-in-the-middle", ends_in_the_middle, Outcome::Broken),
    case("claims-more", claims_more, Outcome::Broken),
    case("claims-less", claims_less, Outcome::Broken),
    case("head-claims-more", head_claims_more, Outcome::Right),
    case("head-claims-less", head_claims_less, Outcome::Right),
    case("head-without-length", head_without_length, Outcome::Right),
    case("no-head", no_head, Outcome::Right),
    case("no-lengths", no_lengths, Outcome::Right),
    case("no-lengths-and-cut", no_lengths_and_cut, Outcome::Broken),
    case("http-1.0", http_10, Outcome::Right),
    case("http-1.0-and-cut", http_10_and_cut, Outcome::Broken),
    case("chunked", chunked, Outcome::Right),
    case("chunked-without-ranges", chunked_without_ranges, Outcome::Right),
    case("sorry", sorry, Outcome::Broken),
    case("sorry-but-for-head", sorry_but_for_head, Outcome::Broken),
    case("wrong-bytes", wrong_bytes, Outcome::Broken),
    case("encoded", encoded, Outcome::Encoded),
    case("encoded-but-for-head", encoded_but_for_head, Outcome::Encoded),
    case("slow-headers", slow_headers, Outcome::Right),
    case("sha512", serve, Outcome::Right),
    Case { blob_bytes: 0, ..case("empty", serve, Outcome::Right) },
    Case { blob_bytes: 1, ..case("one-byte", serve, Outcome::Right) },
];

fn is_head(asked: &Asked<'_>) -> bool {
    asked.seen.method == "HEAD"
}

/// The whole blob, whatever was asked for.
fn whole(asked: &Asked<'_>, headers: &[(&str, &str)]) -> Vec<u8> {
    said(asked.seen, reply(200, headers, asked.blob))
}

fn chunks(bytes: &[u8]) -> Vec<u8> {
    let chunk = |bytes: &[u8]| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
    let mut body: Vec<u8> = bytes.chunks(100_000).flat_map(chunk).collect();
    body.extend_from_slice(b"0\r\n\r\n");
    body
}

/// A right answer of which only a part is said.
fn half(asked: &Asked<'_>) -> Vec<u8> {
    let mut answer = right(asked, &[]);
    answer.truncate(answer.len() - part(asked).2.len() / 2);
    answer
}

/// A head that ends the body with the connection.
fn unframed(asked: &Asked<'_>) -> Vec<u8> {
    let (status, range, bytes) = part(asked);
    let range = range.map(|range| format!("content-range: {range}\r\n")).unwrap_or_default();
    let head = format!("HTTP/1.1 {status} Status\r\nconnection: close\r\n{range}\r\n");
    said(asked.seen, [head.as_bytes(), bytes].concat())
}

fn redirected(asked: &Asked<'_>) -> Reply {
    Reply::Say(said(asked.seen, reply(307, &[("location", &asked.stored)], b"elsewhere")))
}

fn in_circles(asked: &Asked<'_>) -> Reply {
    Reply::Say(said(asked.seen, reply(307, &[("location", &asked.seen.path)], b"here")))
}

fn no_ranges(asked: &Asked<'_>) -> Reply {
    Reply::Say(whole(asked, &[]))
}

fn ranges_refused(asked: &Asked<'_>) -> Reply {
    match asked.seen.range() {
        Some(_) => Reply::Say(reply(416, &[], b"")),
        None => serve(asked),
    }
}

fn another_range(asked: &Asked<'_>) -> Reply {
    let length = asked.blob.len();
    match asked.seen.range() {
        Some(_) => {
            let range = format!("bytes 1-{}/{length}", length - 1);
            Reply::Say(reply(206, &[("content-range", &range)], &asked.blob[1..]))
        }
        None => serve(asked),
    }
}

fn busy_once(asked: &Asked<'_>) -> Reply {
    match asked.before {
        0 if !is_head(asked) => Reply::Say(reply(429, &[("retry-after", "1")], b"slow down")),
        _ => serve(asked),
    }
}

fn busy_for_long(asked: &Asked<'_>) -> Reply {
    Reply::Say(said(asked.seen, reply(429, &[("retry-after", "120")], b"slow down")))
}

fn flapping(asked: &Asked<'_>) -> Reply {
    match asked.before % 4 {
        0 if !is_head(asked) => Reply::Say(reply(500, &[], b"oops")),
        2 if !is_head(asked) => Reply::Say(reply(502, &[], b"oops")),
        _ => serve(asked),
    }
}

fn down(asked: &Asked<'_>) -> Reply {
    Reply::Say(said(asked.seen, reply(503, &[], b"down")))
}

fn closes_at_first(asked: &Asked<'_>) -> Reply {
    if asked.before < 2 { Reply::Close(Vec::new()) } else { serve(asked) }
}

fn resets_at_first(asked: &Asked<'_>) -> Reply {
    if asked.before < 3 && !is_head(asked) { Reply::Reset(half(asked)) } else { serve(asked) }
}

fn resets_always(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { serve(asked) } else { Reply::Reset(half(asked)) }
}

/// The last byte before the end is another, in the middle of a piece.
fn ends_wrong_at_first(asked: &Asked<'_>) -> Reply {
    if asked.before > 1 || is_head(asked) {
        return serve(asked);
    }
    let mut answer = half(asked);
    if let Some(last) = answer.last_mut() {
        *last ^= 1;
    }
    Reply::Close(answer)
}

fn ends_in_the_middle(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { serve(asked) } else { Reply::Close(half(asked)) }
}

fn claims_more(asked: &Asked<'_>) -> Reply {
    let length = (part(asked).2.len() + 7).to_string();
    Reply::Close(right(asked, &[("content-length", &length)]))
}

fn claims_less(asked: &Asked<'_>) -> Reply {
    let length = (part(asked).2.len().max(8) - 7).to_string();
    Reply::Close(right(asked, &[("content-length", &length)]))
}

fn head_claims_more(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { claims_more(asked) } else { serve(asked) }
}

fn head_claims_less(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { claims_less(asked) } else { serve(asked) }
}

fn head_without_length(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { Reply::Close(unframed(asked)) } else { serve(asked) }
}

fn no_head(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { Reply::Say(said(asked.seen, reply(405, &[], b""))) } else { serve(asked) }
}

fn no_lengths(asked: &Asked<'_>) -> Reply {
    Reply::Close(unframed(asked))
}

fn no_lengths_and_cut(asked: &Asked<'_>) -> Reply {
    let mut answer = unframed(asked);
    if !is_head(asked) {
        answer.truncate(answer.len() - part(asked).2.len() / 2);
    }
    Reply::Close(answer)
}

/// As servers of old: the end of the connection is all that ends a body.
fn http_10(asked: &Asked<'_>) -> Reply {
    Reply::Close([&b"HTTP/1.0"[..], &unframed(asked)[b"HTTP/1.1".len()..]].concat())
}

fn http_10_and_cut(asked: &Asked<'_>) -> Reply {
    match (http_10(asked), is_head(asked)) {
        (Reply::Close(mut answer), false) => {
            answer.truncate(answer.len() - part(asked).2.len() / 2);
            Reply::Close(answer)
        }
        (whole, _) => whole,
    }
}

fn chunked(asked: &Asked<'_>) -> Reply {
    if is_head(asked) {
        return serve(asked);
    }
    let (status, range, bytes) = part(asked);
    let range = range.iter().map(|range| ("content-range", range.as_str()));
    let headers: Vec<_> = range.chain([("transfer-encoding", "chunked")]).collect();
    Reply::Say(reply(status, &headers, &chunks(bytes)))
}

fn chunked_without_ranges(asked: &Asked<'_>) -> Reply {
    if is_head(asked) {
        return serve(asked);
    }
    Reply::Say(reply(200, &[("transfer-encoding", "chunked")], &chunks(asked.blob)))
}

fn sorry(asked: &Asked<'_>) -> Reply {
    Reply::Say(said(asked.seen, reply(200, &[("content-type", "application/json")], SORRY)))
}

fn sorry_but_for_head(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { serve(asked) } else { sorry(asked) }
}

fn wrong_bytes(asked: &Asked<'_>) -> Reply {
    let mut answer = right(asked, &[]);
    if let Some(last) = answer.last_mut().filter(|_| !is_head(asked)) {
        *last ^= 1;
    }
    Reply::Say(answer)
}

fn encoded(asked: &Asked<'_>) -> Reply {
    // Nobody on the way decodes it, so that any bytes do.
    Reply::Say(said(asked.seen, reply(200, &[("content-encoding", "gzip")], b"as if it were gzip")))
}

fn encoded_but_for_head(asked: &Asked<'_>) -> Reply {
    if is_head(asked) { serve(asked) } else { encoded(asked) }
}

fn slow_headers(asked: &Asked<'_>) -> Reply {
    let answer = right(asked, &[]);
    let bytes = part(asked).2.len().min(answer.len());
    // So that the head takes about a second, and the body no pauses to speak of.
    match is_head(asked) {
        true => Reply::Dribble { bytes: answer, step: 5, pause: Duration::from_millis(40) },
        false => Reply::Dribble {
            step: (answer.len() - bytes).max(bytes / 8),
            bytes: answer,
            pause: Duration::from_millis(250),
        },
    }
}
