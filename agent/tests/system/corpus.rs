//! What clients and registries say to turn an agent against its network, its clients or its registries, by the hundred
//! (S2, S25, S28, S29, S31).
//!
//! The cases are tables; each has its verdict. Over all of them: nothing connects to the [traps](recorder::Trap), what a
//! registry gets is framed in one way and names one host, a planted secret goes to the registry that it is for and nowhere
//! else, not into the log either, and the agent is there at the end as it was at the beginning.
//!
//! Not here: names that a resolver has bad addresses for; see `net/dial.rs`.

mod framing;
pub(crate) mod http2;
mod recorder;
mod targets;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use darter_agent::demo::authority::Authority;
use rustls_pki_types::ServerName;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::stage::{KIB, Plan, Stage, admin, log, reconfigure};
use crate::unruly::server::{Origin, Reply, Seen, reply};
use crate::wait::PATIENCE;
use crate::wire;
use recorder::{Recorder, Trap};
use targets::Redirect;

/// What clients send as credentials, in every header that may hold some.
const SECRET: &str = "pl4nted-s3cret";

/// The same as a user's password.
const SECRET_BASIC: &str = "dXNlcjpwbDRudGVkLXMzY3JldA==";

/// The blob that redirects lead to.
const BLOB: &[u8] = b"the blob that a registry keeps somewhere else";

/// A promise of the project.
const CASES_MIN: usize = 200;

/// What has to come of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    /// These answers, and then the end of the connection. What is answered with 200 reached the registry, nothing else did.
    Exactly(&'static [u16]),
    /// No success, and nothing that the registry takes for a request.
    Nothing,
}

/// Everybody whom the cases are about.
struct World {
    stage: Stage,
    registry: Recorder,
    redirector: Origin,
    /// What a registry may redirect to.
    others: Vec<Origin>,
    traps: Vec<Trap>,
    names: Names,
    process: u32,
    cases: usize,
    faults: Vec<String>,
}

/// What stands for what in the tables.
#[derive(Clone)]
struct Names(Vec<(&'static str, String)>);

impl Names {
    fn fill(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (name, value)| text.replace(name, value))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_hostile_requests_reach_nothing_and_give_nothing_away() {
    let mut world = World::start().await;
    let begun = world.cases;
    for way in [Framed::Absolute, Framed::Mirror, Framed::Inside] {
        for (text, want) in framing::CASES {
            world.framed(way, text, *want).await;
        }
        for (path, arrives) in framing::PATHS {
            world.path(way, path, *arrives).await;
        }
        println!("{way:?}: {} cases", world.cases - begun);
    }
    world.over_http2().await;
    for (host, status) in targets::HOSTS {
        world.host(host, *status).await;
    }
    for (target, status) in targets::TARGETS {
        let target = world.names.fill(target);
        let answers = world.get(&target).await;
        let reached = world.registry.take().len();
        let holds = answers == [*status] && reached == usize::from(*status == 200);
        world.case(&target, holds, &(answers, reached));
    }
    for (to, status) in targets::TUNNELS {
        let to = world.names.fill(to);
        let answers = world.tunnel(&to, "").await;
        world.case(&format!("CONNECT {to}"), answers == [*status], &answers);
    }
    let answers = world.tunnel("127.0.0.1:443", "content-length: 5\r\n").await;
    world.case("CONNECT with a body", answers == [400], &answers);
    let secure = world.names.fill("{secure}");
    let answers = world.tunnel(&secure, "transfer-encoding: chunked\r\n").await;
    world.case("CONNECT with chunks", answers == [400], &answers);
    for (request, host, status) in targets::INSIDE {
        world.inside(request, host, *status).await;
    }
    world.other_names().await;
    for (at, redirect) in targets::REDIRECTS.iter().enumerate() {
        world.redirected(at, redirect).await;
    }
    world.end().await;
}

/// How a request of [`framing`] gets to the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framed {
    /// With the whole URL, to the proxy.
    Absolute,
    /// With a path, to the mirror.
    Mirror,
    /// With a path, in a tunnel whose TLS the agent ends.
    Inside,
}

// === impl World ===

impl World {
    async fn start() -> Self {
        let mut stage = Stage::start(Plan { agents: 1, layers: vec![64 * KIB], tls: false, ..Plan::default() }).await;
        let host = stage.subnet.registry();
        assert_ne!(host, IpAddr::from(Ipv4Addr::LOCALHOST), "the traps need loopback addresses that nobody named");
        let places = Arc::new(OnceLock::<Names>::new());
        let registry = Recorder::start(SocketAddr::new(host, 0)).await;
        let at = |host: IpAddr| format!("{host}:0");
        let elsewhere = |places: &Arc<OnceLock<Names>>| {
            let places = places.clone();
            move |seen: &Seen| store(places.get().unwrap(), seen)
        };
        let to = places.clone();
        let redirector = Origin::start_at(&at(host), None, move |seen| redirect(to.get().unwrap(), seen)).await;
        let authority = Authority::new("secure", &[&host.to_string()]).unwrap();
        let tls = TlsAcceptor::from(authority.server(&host.to_string()).unwrap());
        let storage = Origin::start_at(&at(host), None, elsewhere(&places)).await;
        let secure = Origin::start_at(&at(host), Some(tls), elsewhere(&places)).await;
        let plain = Origin::start_at(&at(host), None, elsewhere(&places)).await;

        let mut traps = vec![Trap::set(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0)).await.unwrap()];
        let trap = traps[0].address.port();
        for ip in [Ipv6Addr::LOCALHOST.into(), IpAddr::from([127, 1, 2, 3])] {
            for port in [trap, 80, 443] {
                traps.extend(Trap::set(SocketAddr::new(ip, port)).await);
            }
        }
        for port in [22, 80, 443] {
            traps.extend(Trap::set(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)).await);
        }

        let own = *stage.agent(0).addresses();
        let names = Names(vec![
            ("{registry}", registry.address.to_string()),
            ("{redirector}", redirector.address.to_string()),
            ("{store}", storage.address.to_string()),
            ("{secure}", secure.address.to_string()),
            ("{plain}", plain.address.to_string()),
            ("{agent}", own.proxy.ip().to_string()),
            ("{proxy}", own.proxy.port().to_string()),
            ("{peer}", own.peer.port().to_string()),
            ("{gossip}", own.gossip.port().to_string()),
            ("{admin}", own.admin.port().to_string()),
            ("{trap}", trap.to_string()),
            ("{d}", digest()),
        ]);
        places.set(names.clone()).unwrap_or_else(|_| unreachable!());
        let ca_file = stage.cluster.directory().join("secure.crt");
        std::fs::write(&ca_file, authority.certificate_pem()).unwrap();
        let agent = stage.cluster.agent_mut(0).unwrap();
        agent.stop().await;
        reconfigure(agent, |config| {
            for spoken_to in [registry.address, redirector.address, storage.address, own.admin, own.proxy] {
                config["registries"][spoken_to.to_string()] = json!({"insecure_http": true});
            }
            for own in [own.peer, own.gossip] {
                config["registries"][own.to_string()] = json!({"insecure_http": true});
            }
            config["registries"][secure.address.to_string()] = json!({"ca_file": ca_file});
            config["registries"][plain.address.to_string()] = json!({});
            config["registry_mirror"] = json!({"remote": format!("http://{}", registry.address)});
            config["hijack"]["hosts"] = json!([registry.address.to_string()]);
        });
        agent.start_with(&[("DARTER_LOG", "trace")]).unwrap();
        stage.ready().await;
        let process = stage.agent(0).process_id().unwrap();
        let others = vec![storage, secure, plain];
        Self { stage, registry, redirector, others, traps, names, process, cases: 0, faults: Vec::new() }
    }

    /// Counts a case, and notes it if what came is not what should have.
    fn case(&mut self, name: &str, holds: bool, came: &dyn std::fmt::Debug) {
        self.cases += 1;
        if !holds {
            self.faults.push(format!("{}: {came:?}", name.escape_debug()));
        }
    }

    fn proxy(&self) -> SocketAddr {
        self.stage.agent(0).addresses().proxy
    }

    /// Says something to the agent, and hears all that it answers until it closes.
    async fn say(&self, way: Framed, text: &str, ends: bool) -> Vec<u16> {
        match way {
            Framed::Absolute | Framed::Mirror => {
                let stream = TcpStream::connect(self.proxy()).await.unwrap();
                hear(stream, text.as_bytes(), ends).await
            }
            Framed::Inside => {
                let to = self.registry.address;
                let (status, stream) = wire::tunnel(self.proxy(), &to.to_string()).await;
                assert_eq!(status, 200);
                let tls = TlsConnector::from(self.stage.agent(0).tls());
                let stream = tls.connect(ServerName::IpAddress(to.ip().into()), stream).await.unwrap();
                hear(stream, text.as_bytes(), ends).await
            }
        }
    }

    async fn framed(&mut self, way: Framed, text: &str, want: Want) {
        let registry = self.registry.address.to_string();
        let (front, host) = match way {
            Framed::Absolute => (format!("http://{registry}"), registry.clone()),
            Framed::Mirror => (String::new(), "mirror.example:65001".to_owned()),
            Framed::Inside => (String::new(), registry.clone()),
        };
        let smuggled = format!("GET {front}/v2/smuggled HTTP/1.1\r\nhost: {host}\r\n\r\n");
        let begin = |method: &str| {
            format!(
                "{method} {front}/v2/case HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {SECRET}\r\n\
                 proxy-authorization: Basic {SECRET_BASIC}\r\n"
            )
        };
        let filled = text
            .replace("{G}", &begin("GET"))
            .replace("{P}", &begin("POST"))
            .replace("{S}", &smuggled)
            .replace("{n}", &smuggled.len().to_string())
            .replace("{t}", &front)
            .replace("{h}", &host);
        let last = format!("GET {front}/v2/last HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let answers = self.say(way, &(filled + &last), want == Want::Nothing).await;
        let seen = self.registry.take();
        let holds = match want {
            Want::Exactly(expected) => {
                let served = expected.iter().filter(|status| **status == 200).count();
                answers == expected && seen.len() == served
            }
            Want::Nothing => answers.iter().all(|status| *status >= 400) && seen.is_empty(),
        };
        let faults: Vec<_> = seen.iter().flat_map(|seen| seen.faults(&registry)).collect();
        // What is a body stays one.
        let bodies = want != framing::SERVED
            || !text.contains("{n}")
            || seen.iter().all(|seen| seen.path == "/v2/last" || seen.body == smuggled);
        let smuggled = !bodies || seen.iter().any(|seen| seen.path.contains("smuggled"));
        let paths: Vec<_> = seen.iter().map(|seen| &seen.path).collect();
        self.case(
            &format!("{way:?} {text:?}"),
            holds && faults.is_empty() && !smuggled,
            &(answers, want, paths, faults),
        );
    }

    /// A path that means what it says to the registry alone, or nothing.
    async fn path(&mut self, way: Framed, path: &str, arrives: Option<&str>) {
        let registry = self.registry.address.to_string();
        let front = if way == Framed::Absolute { format!("http://{registry}") } else { String::new() };
        let text = format!(
            "GET {front}{} HTTP/1.1\r\nhost: {registry}\r\ncookie: {SECRET}\r\nconnection: close\r\n\r\n",
            self.names.fill(path)
        );
        let answers = self.say(way, &text, false).await;
        let seen: Vec<String> = self.registry.take().into_iter().map(|seen| seen.path).collect();
        let holds = match arrives {
            Some(path) => answers == [200] && seen == [self.names.fill(path)],
            None => answers == [400] && seen.is_empty(),
        };
        self.case(&format!("{way:?} {path}"), holds, &(answers, seen));
    }

    async fn get(&self, target: &str) -> Vec<u16> {
        let text = format!(
            "GET {target} HTTP/1.1\r\nhost: client.example\r\nauthorization: Bearer {SECRET}\r\ncookie: a={SECRET}\r\n\
             proxy-authorization: Basic {SECRET_BASIC}\r\nx-registry-key: {SECRET}\r\nconnection: close\r\n\r\n"
        );
        self.say(Framed::Absolute, &text, false).await
    }

    /// Asks for a tunnel. Nothing is said in it.
    async fn tunnel(&self, to: &str, headers: &str) -> Vec<u16> {
        let text = format!(
            "CONNECT {to} HTTP/1.1\r\nhost: client.example\r\nproxy-authorization: Basic {SECRET_BASIC}\r\n\
             connection: close\r\n{headers}\r\n"
        );
        let mut stream = TcpStream::connect(self.proxy()).await.unwrap();
        let exchange = async {
            stream.write_all(text.as_bytes()).await.unwrap();
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") {
                heard.push(stream.read_u8().await.unwrap());
            }
            if !heard.starts_with(b"HTTP/1.1 200 ") {
                let _ = stream.read_to_end(&mut heard).await;
            }
            answers(&heard)
        };
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer")
    }

    /// A host that nobody is to be sent to, in every way of asking for it.
    async fn host(&mut self, host: &str, status: u16) {
        let trap = self.names.fill("{trap}");
        let refused = |answers: &[u16], also: &[u16]| {
            answers.len() == 1 && (matches!(answers[0], 400 | 403) || also.contains(&answers[0]))
        };
        let answers = self.get(&format!("http://{host}:{trap}/v2/")).await;
        self.case(&format!("http://{host}"), answers == [status], &answers);
        let answers = self.get(&format!("http://{host}:{trap}/v2/a/blobs/{}", digest())).await;
        self.case(&format!("a blob of http://{host}"), refused(&answers, &[503]), &answers);
        let answers = self.get(&format!("https://{host}/v2/")).await;
        // What no certificate can be for is not even asked.
        self.case(&format!("https://{host}"), answers == [status] || answers == [502], &answers);
        let answers = self.get(&format!("/v2/?ns={host}:{trap}")).await;
        self.case(&format!("?ns={host}"), refused(&answers, &[502]), &answers);
        let answers = self.tunnel(&format!("{host}:443"), "").await;
        self.case(&format!("CONNECT {host}:443"), answers == [status], &answers);
    }

    async fn inside(&mut self, request: &str, host: &str, status: u16) {
        let [request, host] = [request, host].map(|text| self.names.fill(text));
        let text = format!(
            "{request} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {SECRET}\r\nconnection: close\r\n\r\n"
        );
        let answers = self.say(Framed::Inside, &text, false).await;
        let seen = self.registry.take().len();
        let holds = answers == [status] && seen == usize::from(status == 200);
        self.case(&format!("inside: {request} at {host}"), holds, &(answers, seen));
    }

    /// TLS that asks for another host than its tunnel leads to.
    async fn other_names(&mut self) {
        let to = self.registry.address.to_string();
        for name in ["localhost", "evil.example", "metadata.google.internal", "registry.example.org"] {
            let (status, stream) = wire::tunnel(self.proxy(), &to).await;
            assert_eq!(status, 200);
            let tls = TlsConnector::from(self.stage.agent(0).tls());
            let came = tls.connect(ServerName::try_from(name).unwrap(), stream).await.map(|_| ());
            self.case(&format!("TLS for {name}"), came.is_err(), &came);
        }
    }

    async fn redirected(&mut self, at: usize, redirect: &Redirect) {
        let url = format!("http://{}/v2/r{at}/blobs/{}", self.redirector.address, digest());
        let answers = self.get(&url).await;
        let (text, holds) = match redirect {
            Redirect::Followed(text) => (text, answers == [200]),
            Redirect::Refused(text) => (text, answers.len() == 1 && matches!(answers[0], 307 | 502 | 503)),
        };
        self.case(&format!("redirected to {text}"), holds, &answers);
    }

    /// What holds over all cases.
    async fn end(self) {
        println!("{} cases, {} of them not as they should be", self.cases, self.faults.len());
        assert!(self.faults.is_empty(), "{:#?}", self.faults);
        assert!(self.cases >= CASES_MIN, "{}", self.cases);

        let caught: Vec<_> = self.traps.iter().map(|trap| (trap.address, trap.caught())).collect();
        assert!(caught.iter().all(|(_, caught)| caught.is_empty()), "{caught:#?}");
        println!("{} traps, nothing in them", caught.len());

        assert_eq!(self.registry.odd_bytes(), [""; 0]);
        assert!(holds_secret(&self.registry.raw()), "the registry that was asked gets what it is asked with");
        assert!(self.redirector.seen().iter().any(|seen| holds_secret(format!("{seen:?}").as_bytes())));
        let returned = self.redirector.seen().into_iter().filter(|seen| seen.path.starts_with("/returned"));
        let strangers: Vec<Seen> = self.others.iter().flat_map(Origin::seen).chain(returned).collect();
        let asked: BTreeSet<&str> = strangers.iter().map(|seen| seen.path.as_str()).collect();
        for path in ["/blob", "/returned/blob", "/hop/store", "/hop/home", "/hop/trap", "/hop/plain"] {
            assert!(asked.contains(path), "{path} was never asked for: {asked:?}");
        }
        for seen in &strangers {
            assert!(!holds_secret(format!("{seen:?}").as_bytes()), "{seen:?}");
        }
        assert!(self.others[2].seen().is_empty(), "https became http");

        let agent = self.stage.agent(0);
        assert_eq!(agent.process_id(), Some(self.process));
        assert_eq!(admin(agent, "/readyz").await.unwrap().0, 200);
        let log = log(agent);
        assert!(log.contains("TRACE") && log.contains("DEBUG"), "{log}");
        for sign in ["panicked", "ended in a defect"] {
            assert!(!log.contains(sign), "{sign} in {log}");
        }
        assert!(!holds_secret(log.as_bytes()), "{:?}", log.lines().find(|line| holds_secret(line.as_bytes())));
        for path in ["/metrics", "/api/v1/sources", "/api/v1/holdings", "/args", "/env"] {
            let said = admin(agent, path).await.unwrap().1;
            assert!(!holds_secret(said.as_bytes()), "{path}: {said}");
        }
        self.stage.stop().await;
    }
}

fn holds_secret(bytes: &[u8]) -> bool {
    [SECRET, SECRET_BASIC].iter().any(|secret| bytes.windows(secret.len()).any(|window| window == secret.as_bytes()))
}

fn digest() -> String {
    format!("sha256:{}", Sha256::digest(BLOB).iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// Says `text`, then nothing if it `ends`, and gives the statuses of all answers until the other side closes.
async fn hear(mut stream: impl AsyncRead + AsyncWrite + Unpin, text: &[u8], ends: bool) -> Vec<u16> {
    let exchange = async {
        // Whoever has heard enough closes before it has heard all.
        let _ = stream.write_all(text).await;
        let _ = stream.flush().await;
        if ends {
            let _ = stream.shutdown().await;
        }
        let mut heard = Vec::new();
        // A reset counts as an end; what came before it is what matters.
        let _ = stream.read_to_end(&mut heard).await;
        answers(&heard)
    };
    let text = text.escape_ascii();
    tokio::time::timeout(PATIENCE, exchange).await.unwrap_or_else(|_| panic!("it does not end: {text}"))
}

/// The statuses of answers that follow each other, interim ones left out; 0 for what is none.
fn answers(mut bytes: &[u8]) -> Vec<u16> {
    let mut statuses = Vec::new();
    while !bytes.is_empty() {
        let Some((status, rest)) = answer(bytes) else {
            statuses.push(0);
            break;
        };
        bytes = rest;
        if status >= 200 {
            statuses.push(status);
        }
    }
    statuses
}

/// The first answer's status, and what follows it.
fn answer(bytes: &[u8]) -> Option<(u16, &[u8])> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).ok()?.to_ascii_lowercase();
    let status = head.strip_prefix("http/1.")?.split(' ').nth(1)?.parse().ok()?;
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    Some((status, bytes[end..].get(length.unwrap_or(0)..)?))
}

/// The registry that redirects: each of its repositories in a way of its own.
fn redirect(names: &Names, seen: &Seen) -> Reply {
    let repository = seen.path.strip_prefix("/v2/r").and_then(|rest| rest.split_once('/')?.0.parse::<usize>().ok());
    match repository.and_then(|at| targets::REDIRECTS.get(at)) {
        Some(_) if seen.path.ends_with("/stored/blob") => blob(seen),
        Some(Redirect::Followed(header) | Redirect::Refused(header)) => {
            let header = names.fill(header).replace("{n}", &seen.path);
            Reply::Say(format!("HTTP/1.1 307 Status\r\n{header}\r\ncontent-length: 0\r\n\r\n").into_bytes())
        }
        None => store(names, seen),
    }
}

/// Hosts that a registry redirects to: they have the blob, or know somebody who does.
fn store(names: &Names, seen: &Seen) -> Reply {
    let to = match seen.path.as_str() {
        "/hop/store" => "http://{store}/blob",
        "/hop/home" => "http://{redirector}/returned/blob",
        "/hop/trap" => "http://127.0.0.1:{trap}/blob",
        "/hop/metadata" => "http://169.254.169.254/latest/meta-data/",
        "/hop/plain" => "http://{plain}/blob",
        "/hop/file" => "file:///etc/passwd",
        "/hop/circle" => "http://{store}/hop/circle",
        _ => return blob(seen),
    };
    Reply::Say(reply(307, &[("location", &names.fill(to))], b""))
}

fn blob(seen: &Seen) -> Reply {
    let length = BLOB.len().to_string();
    Reply::Say(match (seen.method.as_str(), seen.range().filter(|range| range.end <= BLOB.len())) {
        ("HEAD", _) => reply(200, &[("content-length", &length)], b""),
        (_, Some(range)) => {
            let part = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            reply(206, &[("content-range", &part)], &BLOB[range])
        }
        (_, None) => reply(200, &[], BLOB),
    })
}
