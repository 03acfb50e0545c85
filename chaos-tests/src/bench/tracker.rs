//! A BitTorrent tracker over HTTP with compact answers (BEP 3, BEP 23): what the swarms of aria2 and rqbit meet at. It knows
//! everybody who has announced himself, and tells that to everybody who asks.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::torrent::Item;

/// The tracker's port.
pub const PORT: u16 = 6969;

/// Where it is asked.
pub const PATH: &str = "/announce";

/// How soon clients should ask again, in seconds. Of those that begin together the first is told of nobody, so this is short;
/// public trackers say half an hour.
const INTERVAL_SECONDS: u64 = 5;

/// The longest request.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// Requests at a time; those beyond wait in the backlog.
const CONNECTIONS_MAX: usize = 256;

/// Who has announced himself, by torrent.
#[derive(Debug, Default)]
struct Swarms {
    members: BTreeSet<(String, SocketAddrV4)>,
}

/// Serves until the process ends.
pub async fn serve(listen: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(listen).await.with_context(|| format!("cannot listen on {listen}"))?;
    let swarms = Arc::new(Mutex::new(Swarms::default()));
    let mut connections = JoinSet::new();
    loop {
        if connections.len() >= CONNECTIONS_MAX {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        let (stream, from) = listener.accept().await?;
        let swarms = Arc::clone(&swarms);
        // Whoever asks oddly or leaves early gets no answer, which is his own loss.
        connections.spawn(async move { drop(answer(stream, from, &swarms).await) });
    }
}

async fn answer(mut stream: TcpStream, from: SocketAddr, swarms: &Mutex<Swarms>) -> Result<()> {
    let SocketAddr::V4(from) = from else { return Ok(()) };
    let mut request = Vec::new();
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        ensure!(request.len() < REQUEST_BYTES_MAX, "the request does not end");
        ensure!(stream.read_buf(&mut request).await? > 0, "cut off");
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let target = request.split(' ').nth(1).context("no target")?;
    let body = swarms.lock().unwrap_or_else(PoisonError::into_inner).announce(target, *from.ip());
    let (status, body) = body.map_or(("400 Bad Request", Vec::new()), |body| ("200 OK", body));
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), &body].concat()).await?;
    Ok(())
}

impl Swarms {
    /// Enters who asks, or takes him out if he leaves, and returns the others; None for what is not an announcement.
    fn announce(&mut self, target: &str, address: Ipv4Addr) -> Option<Vec<u8>> {
        let query = target.strip_prefix(PATH)?.strip_prefix('?')?;
        let value = |key: &str| query.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        // Clients may escape the same bytes differently.
        let torrent = unescaped(value("info_hash")?)?;
        let own = (torrent, SocketAddrV4::new(address, value("port")?.parse().ok()?));
        if value("event") == Some("stopped") {
            self.members.remove(&own);
        } else {
            self.members.insert(own.clone());
        }
        let others = self.members.iter().filter(|member| member.0 == own.0 && **member != own);
        let peers = others.flat_map(|(_, peer)| [&peer.ip().octets()[..], &peer.port().to_be_bytes()].concat());
        let answer =
            Item::Dict(vec![("interval", Item::Number(INTERVAL_SECONDS)), ("peers", Item::Bytes(peers.collect()))]);
        let mut bytes = Vec::new();
        answer.write(&mut bytes);
        Some(bytes)
    }
}

/// Undoes percent-encoding; the bytes come as lower-case hexadecimal.
fn unescaped(text: &str) -> Option<String> {
    let (mut out, mut rest) = (String::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first == b'%' {
            let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
            u8::from_str_radix(digits, 16).ok()?;
            out.push_str(&digits.to_lowercase());
            rest = &rest[2..];
        } else {
            out.push_str(&format!("{first:02x}"));
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, last)
    }

    #[test]
    fn everybody_is_told_of_the_others() {
        let mut swarms = Swarms::default();
        let ask = "/announce?info_hash=%01a&peer_id=x&port=6881&event=started&compact=1";
        assert_eq!(swarms.announce(ask, ip(1)).unwrap(), b"d8:intervali5e5:peers0:e");
        let same = "/announce?port=258&info_hash=%01%61";
        assert_eq!(swarms.announce(same, ip(2)).unwrap(), b"d8:intervali5e5:peers6:\x0a\x4d\x00\x01\x1a\xe1e");
        assert_eq!(swarms.announce(ask, ip(1)).unwrap(), b"d8:intervali5e5:peers6:\x0a\x4d\x00\x02\x01\x02e");
    }

    #[test]
    fn swarms_do_not_mix_and_who_leaves_is_forgotten() {
        let mut swarms = Swarms::default();
        let nobody = b"d8:intervali5e5:peers0:e";
        swarms.announce("/announce?info_hash=a&port=1", ip(1)).unwrap();
        assert_eq!(swarms.announce("/announce?info_hash=b&port=1", ip(2)).unwrap(), nobody);
        swarms.announce("/announce?info_hash=a&port=1&event=stopped", ip(1)).unwrap();
        assert_eq!(swarms.announce("/announce?info_hash=a&port=1", ip(3)).unwrap(), nobody);
    }

    #[test]
    fn what_is_not_an_announcement_gets_no_answer() {
        let mut swarms = Swarms::default();
        for odd in ["/", "/announce", "/announce?port=1", "/announce?info_hash=a", "/announce?info_hash=%zz&port=1"] {
            assert_eq!(swarms.announce(odd, ip(1)), None, "{odd}");
        }
        assert_eq!(swarms.announce("/announce?info_hash=a&port=70000", ip(1)), None);
    }
}
