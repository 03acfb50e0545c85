//! A DNS server on loopback whose records, failures and slowness are what a test says. Speaks UDP and TCP on one port.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinSet;

/// The largest answer over UDP: what resolvers offer to take these days.
const UDP_BYTES_MAX: usize = 1232;

/// What the server does with questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Answers,
    Fails(ResponseCode),
    Silent,
}

/// What it knows, and what it was asked.
pub(crate) struct Zone {
    pub(crate) mood: Mood,
    /// Refuses names below this one's labels, as dnsmasq does without a server to forward to.
    pub(crate) refused: Option<String>,
    /// Whether the addresses of SRV targets come along.
    pub(crate) brings_along: bool,
    records: BTreeMap<(Name, RecordType), Vec<Record>>,
    pub(crate) asked: Vec<(String, RecordType)>,
    pub(crate) over_tcp: usize,
}

impl Zone {
    /// Replaces the addresses of a name.
    pub(crate) fn addresses(&mut self, name: &str, ttl: u32, ips: &[&str]) {
        let name = Name::from_ascii(name).unwrap();
        self.records.remove(&(name.clone(), RecordType::A));
        self.records.remove(&(name.clone(), RecordType::AAAA));
        for ip in ips {
            let data = match ip.parse().unwrap() {
                IpAddr::V4(ip) => RData::A(ip.into()),
                IpAddr::V6(ip) => RData::AAAA(ip.into()),
            };
            let record = Record::from_rdata(name.clone(), ttl, data);
            self.records.entry((name.clone(), record.record_type())).or_default().push(record);
        }
    }

    /// Replaces the SRV records of a name.
    pub(crate) fn services(&mut self, name: &str, ttl: u32, targets: &[(&str, u16)]) {
        let name = Name::from_ascii(name).unwrap();
        let record = |(target, port): &(&str, u16)| {
            let data = SRV::new(0, 0, *port, Name::from_ascii(target).unwrap());
            Record::from_rdata(name.clone(), ttl, RData::SRV(data))
        };
        self.records.insert((name.clone(), RecordType::SRV), targets.iter().map(record).collect());
    }

    fn answer(&mut self, question: &Message, limit: Option<usize>) -> Option<Vec<u8>> {
        let query = question.queries.first()?;
        let name = query.name().to_lowercase();
        self.asked.push((name.to_string(), query.query_type()));
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.metadata.recursion_available = true;
        answer.add_query(query.clone());
        let refused = self.refused.as_ref().is_some_and(|refused| name.to_string().starts_with(refused));
        match self.mood {
            Mood::Silent => return None,
            Mood::Fails(code) => answer.metadata.response_code = code,
            Mood::Answers if refused => answer.metadata.response_code = ResponseCode::Refused,
            Mood::Answers => {
                let found = self.records.get(&(name.clone(), query.query_type())).cloned().unwrap_or_default();
                let exists = self.records.keys().any(|(known, _)| *known == name);
                answer.metadata.response_code = if exists { ResponseCode::NoError } else { ResponseCode::NXDomain };
                for record in found {
                    if let (RData::SRV(srv), true) = (&record.data, self.brings_along) {
                        for kind in [RecordType::A, RecordType::AAAA] {
                            let along = self.records.get(&(srv.target.clone(), kind)).cloned().unwrap_or_default();
                            answer.add_additionals(along);
                        }
                    }
                    answer.add_answer(record);
                }
            }
        }
        let bytes = answer.to_vec().unwrap();
        if limit.is_some_and(|limit| bytes.len() > limit) {
            return answer.truncate().to_vec().ok();
        }
        Some(bytes)
    }
}

/// The server. Stops when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) zone: Arc<Mutex<Zone>>,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        // The same port twice: whoever took the other one in between makes for another try.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let zone = Zone {
            mood: Mood::Answers,
            refused: None,
            brings_along: true,
            records: BTreeMap::new(),
            asked: Vec::new(),
            over_tcp: 0,
        };
        let zone = Arc::new(Mutex::new(zone));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, zone.clone()));
        tasks.spawn(serve_tcp(tcp, zone.clone()));
        Self { address, zone, _tasks: tasks }
    }

    pub(crate) fn zone(&self) -> std::sync::MutexGuard<'_, Zone> {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn serve_udp(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 4096];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
        let answer = zone.lock().unwrap().answer(&question, Some(UDP_BYTES_MAX));
        if let Some(answer) = answer {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<Mutex<Zone>>) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        let zone = zone.clone();
        connections.spawn(async move {
            while let Ok(length) = stream.read_u16().await {
                let mut bytes = vec![0; length.into()];
                if stream.read_exact(&mut bytes).await.is_err() {
                    return;
                }
                let Ok(question) = Message::from_vec(&bytes) else { return };
                let answer = {
                    let mut zone = zone.lock().unwrap();
                    zone.over_tcp += 1;
                    zone.answer(&question, None)
                };
                if let Some(answer) = answer {
                    let _ = stream.write_u16(u16::try_from(answer.len()).unwrap()).await;
                    let _ = stream.write_all(&answer).await;
                }
            }
        });
    }
}
