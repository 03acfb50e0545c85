//! CPU time of both ends per GiB between two network namespaces, for each way that bytes can take.
//!
//! `cargo bench -p darter-agent --bench transport` (as root; `-- --mtu 9000`, `-- --gib 4`, `-- tcp quic` for some of the
//! ways). Time of CPU, not of the clock, so that it says the same on a busy machine; what the kernel does in threads of its
//! own is not in it. Each way runs in two processes of its own, which tell what they used between the first byte and the
//! last.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chaos_tests::bench::memory::{Hold, touch};
use darter_agent::admin::metrics::{Metrics, PieceOrigin};
use darter_agent::net::{Mode, Peer, Transport};
use darter_agent::store::{Blob, Hashed, MEMORY_BYTES, Outcome, Settings, Store};
use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::{Digest, Geometry, PieceIndex, PieceProof, PieceSize, TaskId};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

const PIECE: u32 = 4 * 1024 * 1024;
const GIB: u64 = 1024 * 1024 * 1024;
/// Requests at a time, as a pull has them.
const PARALLEL: u32 = 4;
/// Bytes per system call of the ways that are not ours.
const CHUNK: usize = 256 * 1024;
const PORT: u16 = 15001;
/// Files that are written in a call: where there is one way of each kind from file to file, what is read and what comes of it.
const FILES: u64 = 6;
/// The kernel counts CPU time in these.
const TICKS: f64 = 100.0;

const WAYS: [&str; 9] =
    ["plain", "rustls", "tcp", "quic", "hashes", "rustls+hashes", "file-rustls", "file-tcp", "file-quic"];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let option =
        |name: &str| arguments.iter().position(|argument| argument == name).map(|at| arguments[at + 1].clone());
    let gib: u64 = option("--gib").map_or(1, |gib| gib.parse().unwrap());
    if let Some(role) = option("--role") {
        let (way, dir) = (option("--way").unwrap(), PathBuf::from(option("--dir").unwrap()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        return runtime.block_on(end(&role, &way, &dir, gib));
    }
    let mtu = option("--mtu").unwrap_or_else(|| "1500".to_owned());
    let named: Vec<&str> = WAYS.into_iter().filter(|way| arguments.iter().any(|argument| argument == way)).collect();
    let ways = if named.is_empty() { WAYS.to_vec() } else { named };
    let lab = Lab::new(&mtu);
    // Else it is how fast the host of this machine finds pages again that is measured.
    let _memory = Hold::take();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(touch(FILES * gib * GIB)).unwrap();
    println!(
        "MTU {mtu}, {gib} GiB; CPU s per GiB\n{:<14} {:>8} {:>8} {:>8} {:>8}",
        "way", "sender", "receiver", "both", "Gb/s"
    );
    for way in ways {
        lab.run(way, gib);
    }
}

/// Two namespaces, `a` and `b`, and a folder.
struct Lab {
    names: [String; 2],
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(mtu: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a", "b"].map(|end| format!("bench{}{end}", std::process::id()));
        let [a, b] = &names;
        for name in &names {
            ip(&["netns", "add", name]);
        }
        let lab = Self { names: names.clone(), dir };
        ip(&[
            "-n", a, "link", "add", "eth0", "mtu", mtu, "type", "veth", "peer", "name", "eth0", "mtu", mtu, "netns", b,
        ]);
        for (name, address) in names.iter().zip(["10.77.0.1/24", "10.77.0.2/24"]) {
            ip(&["-n", name, "addr", "add", address, "dev", "eth0"]);
            ip(&["-n", name, "link", "set", "eth0", "up"]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        lab
    }

    fn spawn(&self, at: usize, role: &str, way: &str, gib: u64) -> (Child, BufReader<std::process::ChildStdout>) {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.names[at]])
            .arg(std::env::current_exe().unwrap())
            .args(["--role", role, "--way", way, "--gib", &gib.to_string(), "--dir"])
            .arg(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        (child, output)
    }

    fn run(&self, way: &str, gib: u64) {
        let (mut server, mut said) = self.spawn(0, "serve", way, gib);
        assert_eq!(line(&mut said), "ready");
        let (mut client, mut answer) = self.spawn(1, "get", way, gib);
        let got = line(&mut answer);
        client.wait().unwrap();
        // Its end is what the server waits for.
        drop(server.stdin.take());
        let served: f64 = line(&mut said).parse().unwrap();
        server.wait().unwrap();
        let got: Vec<f64> = got.split(' ').map(|number| number.parse().unwrap()).collect();
        let per_gib = |seconds: f64| seconds / gib as f64;
        println!(
            "{way:<14} {:>8.2} {:>8.2} {:>8.2} {:>8.1}",
            per_gib(served),
            per_gib(got[0]),
            per_gib(served + got[0]),
            gib as f64 * 8.59 / got[1]
        );
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim().to_owned()
}

/// CPU time of this process until now, its threads' and the system's on its behalf.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / TICKS
}

/// One of the two processes.
async fn end(role: &str, way: &str, dir: &Path, gib: u64) {
    let pieces = (gib * GIB / u64::from(PIECE)) as u32;
    if role == "serve" {
        let serving = Serving::begin(way, dir, pieces).await;
        println!("ready");
        let before = cpu();
        let serving = tokio::spawn(serving.run());
        tokio::task::spawn_blocking(|| line(&mut std::io::stdin().lock())).await.unwrap();
        println!("{}", cpu() - before);
        serving.abort();
    } else {
        // What a client knows beforehand is not counted.
        let into = way.starts_with("file").then(|| {
            let (store, (task, geometry)) = (store(dir, "get"), task(pieces));
            let blob = store.create(&task, geometry).unwrap();
            (store, blob)
        });
        let (before, begin) = (cpu(), Instant::now());
        get(way, dir, pieces, into.as_ref().map(|(_, blob)| blob.clone())).await;
        println!("{} {}", cpu() - before, begin.elapsed().as_secs_f64());
    }
}

fn listen(end: u8) -> SocketAddr {
    SocketAddr::from(([10, 77, 0, end], PORT))
}

fn piece() -> Bytes {
    let mut state = 1u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(PIECE as usize).collect()
}

fn member(seed: u8) -> (Arc<ClusterKeys>, NodeKey) {
    let keys = Arc::new(ClusterKeys::new("bench", &[[1; 32]]).unwrap());
    let node = NodeKey::new(&keys, &[seed; 32], 1).unwrap();
    (keys, node)
}

fn transport(seed: u8, way: &str) -> Transport {
    let mode = if way.ends_with("quic") { Mode::Quic } else { Mode::Tcp };
    let (keys, node) = member(seed);
    Transport::bind(listen(seed), mode, keys, &node, Arc::default()).unwrap()
}

fn store(dir: &Path, end: &str) -> Arc<Store> {
    let settings = Settings {
        dir: dir.join(format!("{end}-{}", std::process::id())),
        max_bytes: u64::MAX,
        min_free_bytes: 0,
        idle: Duration::MAX,
        verify_before_stream: false,
        memory_bytes: MEMORY_BYTES,
        put_off: Duration::ZERO,
    };
    Store::open(settings, Arc::new(Metrics::default())).unwrap()
}

/// All pieces are the same bytes, which are different for the digest of the whole only.
fn task(pieces: u32) -> (TaskId, Geometry) {
    let (mut hasher, piece) = (Sha256::new(), piece());
    for _ in 0..pieces {
        hasher.update(&piece);
    }
    let digest = Digest::Sha256(hasher.finalize().into());
    let length = u64::from(pieces) * u64::from(PIECE);
    (TaskId::blob(digest), Geometry::new(length, PieceSize::new(PIECE).unwrap()).unwrap())
}

enum Serving {
    Plain(TcpListener),
    Rustls(TcpListener, tokio_rustls::TlsAcceptor, Option<Arc<std::fs::File>>),
    Ours(Transport, Option<(Arc<Store>, TaskId)>),
    Nothing,
}

impl Serving {
    async fn begin(way: &str, dir: &Path, pieces: u32) -> Self {
        match way {
            "plain" => Self::Plain(TcpListener::bind(listen(1)).await.unwrap()),
            "rustls" | "rustls+hashes" | "file-rustls" => {
                let made = rcgen::generate_simple_self_signed(vec!["bench".to_owned()]).unwrap();
                std::fs::write(dir.join("cert"), made.cert.der()).unwrap();
                let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
                let config = rustls::ServerConfig::builder_with_provider(provider())
                    .with_protocol_versions(&[&rustls::version::TLS13])
                    .unwrap()
                    .with_no_client_auth()
                    .with_single_cert(vec![made.cert.der().clone()], key)
                    .unwrap();
                let file = (way == "file-rustls").then(|| {
                    let content = piece().repeat(pieces as usize);
                    std::fs::write(dir.join("held"), content).unwrap();
                    Arc::new(std::fs::File::open(dir.join("held")).unwrap())
                });
                Self::Rustls(TcpListener::bind(listen(1)).await.unwrap(), Arc::new(config).into(), file)
            }
            "hashes" => Self::Nothing,
            _ => {
                let held = if way.starts_with("file") { Some(fill(dir, pieces).await) } else { None };
                Self::Ours(transport(1, way), held)
            }
        }
    }

    async fn run(self) {
        let mut streams = JoinSet::new();
        match self {
            Self::Nothing => {}
            Self::Plain(listener) => loop {
                streams.spawn(give(listener.accept().await.unwrap().0, None));
            },
            Self::Rustls(listener, acceptor, file) => loop {
                let stream = listener.accept().await.unwrap().0;
                stream.set_nodelay(true).unwrap();
                let (acceptor, file) = (acceptor.clone(), file.clone());
                streams.spawn(async move { give(acceptor.accept(stream).await.unwrap(), file).await });
            },
            Self::Ours(transport, held) => {
                let (ready, node) = (piece(), member(1).1);
                let geometry = Geometry::new(u64::from(PIECE), PieceSize::new(PIECE).unwrap()).unwrap();
                let any = TaskId::blob(Digest::Sha256([0; 32]));
                let digest = darter_tracker::PieceDigest::of(&ready);
                let proof = node.sign_piece(&any, &geometry, PieceIndex(0), digest);
                while let Some(mut incoming) = transport.accept().await {
                    let (ready, held) = (ready.clone(), held.clone());
                    streams.spawn(async move {
                        let index = incoming.stream.receive::<u32>().await.unwrap().unwrap();
                        let (proof, bytes) = match held {
                            Some((store, task)) => {
                                let blob = store.find(&task).unwrap();
                                blob.piece(PieceIndex(index)).await.unwrap()
                            }
                            None => (proof, ready),
                        };
                        incoming.stream.send(&proof).await.unwrap();
                        incoming.stream.send_bytes(bytes).await.unwrap();
                        // The last one is acknowledged by a process that is about to end.
                        let _ = incoming.stream.deliver().await;
                    });
                }
            }
        }
    }
}

/// A blob in a cache, as an agent has it.
async fn fill(dir: &Path, pieces: u32) -> (Arc<Store>, TaskId) {
    let (store, (task, geometry)) = (store(dir, "serve"), task(pieces));
    let blob = store.create(&task, geometry).unwrap();
    let (node, hashed) = (member(1).1, Hashed::of(piece()).await.unwrap());
    for index in (0..pieces).map(PieceIndex) {
        let proof = node.sign_piece(&task, &geometry, index, hashed.digest());
        blob.write(index, &proof, hashed.clone(), PieceOrigin::Registry).await.unwrap();
    }
    blob.state().wait_for(|progress| progress.outcome == Outcome::Complete).await.unwrap();
    (store, task)
}

/// Gives the piece that is asked for, as long as one is.
async fn give(mut stream: impl AsyncRead + AsyncWrite + Unpin, file: Option<Arc<std::fs::File>>) {
    let mut piece = piece().to_vec();
    while let Ok(index) = stream.read_u32().await {
        if let Some(file) = file.clone() {
            piece = blocking(move || {
                file.read_exact_at(&mut piece, u64::from(index) * u64::from(PIECE)).unwrap();
                piece
            })
            .await;
        }
        for chunk in piece.chunks(CHUNK) {
            stream.write_all(chunk).await.unwrap();
        }
        stream.flush().await.unwrap();
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

async fn get(way: &str, dir: &Path, pieces: u32, into: Option<Arc<Blob>>) {
    let mut jobs = JoinSet::new();
    let file = (way == "file-rustls").then(|| Arc::new(std::fs::File::create(dir.join("got")).unwrap()));
    match way {
        "hashes" => hash(&piece(), pieces),
        "plain" | "rustls" | "rustls+hashes" | "file-rustls" => {
            for job in 0..PARALLEL {
                let stream = TcpStream::connect(listen(1)).await.unwrap();
                stream.set_nodelay(true).unwrap();
                if way == "plain" {
                    jobs.spawn(take(stream, job, pieces / PARALLEL, false, None));
                } else {
                    let mut roots = rustls::RootCertStore::empty();
                    roots.add(CertificateDer::from(std::fs::read(dir.join("cert")).unwrap())).unwrap();
                    let config = rustls::ClientConfig::builder_with_provider(provider())
                        .with_protocol_versions(&[&rustls::version::TLS13])
                        .unwrap()
                        .with_root_certificates(roots)
                        .with_no_client_auth();
                    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
                    let name = ServerName::try_from("bench").unwrap();
                    let stream = connector.connect(name, stream).await.unwrap();
                    jobs.spawn(take(stream, job, pieces / PARALLEL, way != "rustls", file.clone()));
                }
            }
        }
        _ => {
            let (transport, peer) = (transport(2, way), Peer { id: member(1).1.id(), addr: listen(1) });
            for job in 0..PARALLEL {
                let (transport, into) = (transport.clone(), into.clone());
                jobs.spawn(async move {
                    for index in (job..pieces).step_by(PARALLEL as usize) {
                        let mut stream = transport.open_bulk(peer).await.unwrap();
                        stream.send(&index).await.unwrap();
                        stream.finish();
                        let proof = stream.receive::<PieceProof>().await.unwrap().unwrap();
                        let bytes = stream.receive_bytes(PIECE as usize).await.unwrap();
                        drop(stream);
                        if let Some(blob) = &into {
                            let hashed = Hashed::of(bytes).await.unwrap();
                            blob.write(PieceIndex(index), &proof, hashed, PieceOrigin::Peer).await.unwrap();
                        }
                    }
                });
            }
            jobs.join_all().await;
            if let Some(blob) = into {
                blob.state().wait_for(|progress| progress.outcome == Outcome::Complete).await.unwrap();
            }
            return;
        }
    }
    jobs.join_all().await;
}

/// Takes pieces, and hashes and writes them as a download has to.
async fn take(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    job: u32,
    pieces: u32,
    hashes: bool,
    file: Option<Arc<std::fs::File>>,
) {
    let mut piece = vec![0; PIECE as usize];
    for index in (job..).step_by(PARALLEL as usize).take(pieces as usize) {
        stream.write_u32(index).await.unwrap();
        stream.flush().await.unwrap();
        stream.read_exact(&mut piece).await.unwrap();
        if hashes {
            let file = file.clone();
            piece = blocking(move || {
                hash(&piece, 1);
                if let Some(file) = file {
                    file.write_all_at(&piece, u64::from(index) * u64::from(PIECE)).unwrap();
                }
                piece
            })
            .await;
        }
    }
}

/// Both digests of so many pieces.
fn hash(piece: &[u8], pieces: u32) {
    let mut whole = Sha256::new();
    for _ in 0..pieces {
        std::hint::black_box(blake3::hash(piece));
        whole.update(piece);
    }
    std::hint::black_box(whole.finalize());
}

/// The cipher that members use.
fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    use rustls::crypto::aws_lc_rs;
    Arc::new(rustls::crypto::CryptoProvider {
        cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..aws_lc_rs::default_provider()
    })
}
