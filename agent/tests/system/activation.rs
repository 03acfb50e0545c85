//! A proxy whose listener somebody else holds, as systemd does with socket activation: clients that come while the agent
//! is not there wait instead of being refused.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use darter_agent::demo::cluster::Agent;
use http::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::stage::{MIB, Plan, Stage, admin, log, program};
use crate::wait::{self, PATIENCE};

/// How long an agent may take to end.
const ENDED_WITHIN: Duration = Duration::from_secs(10);

/// Connections that wait while no agent accepts any, as in `deploy/systemd/darter-proxy.socket`.
const BACKLOG: i32 = 1024;

/// Pause between clients: with it less than [`BACKLOG`] come in [`ENDED_WITHIN`].
const CLIENT_EVERY: Duration = Duration::from_millis(20);

/// Passes its standard input on as descriptor 3, which is where systemd puts the first socket, and becomes the agent:
/// `$$` is the number of this process before and after.
const AS_SYSTEMD: &str =
    r#"exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=proxy exec "$0" agent --config "$1""#;

/// Starts the program of an agent that is stopped, with a listener and a socket to be told things at.
fn start(agent: &Agent, listener: &TcpListener, notify: &Path) -> Child {
    let log = File::options().create(true).append(true).open(agent.log_file()).unwrap();
    let mut command = Command::new("sh");
    command.arg("-c").arg(AS_SYSTEMD).arg(program()).arg(agent.config_file());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("DARTER_")) {
        command.env_remove(name);
    }
    command.env("NOTIFY_SOCKET", notify).stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())));
    command.stdout(Stdio::null()).stderr(log).kill_on_drop(true).spawn().unwrap()
}

/// Ends an agent and waits for it; gives its exit code, if it has one.
async fn end(mut child: Child, signal: Signal) -> Option<i32> {
    kill_process(Pid::from_raw(child.id().unwrap() as i32).unwrap(), signal).unwrap();
    timeout(ENDED_WITHIN, child.wait()).await.expect("it ends").unwrap().code()
}

/// Waits for what a service manager would be told.
async fn told(socket: &UnixDatagram, message: &[u8]) {
    wait::until("the service manager is told", async || {
        let mut bytes = [0; 64];
        socket.recv(&mut bytes).is_ok_and(|length| {
            assert_eq!(&bytes[..length], message);
            true
        })
    })
    .await;
}

/// A client that has connected to the proxy and asked for the image's manifest.
async fn ask(stage: &Stage, proxy: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(proxy).await.expect("nobody is refused");
    let (registry, path) = (stage.registry.address(), stage.manifest_path());
    let request = format!("GET http://{registry}{path} HTTP/1.1\r\nHost: {registry}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// What the client is answered.
async fn answer(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("an answer").unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_passed_listener_outlives_the_agent() {
    let plan = Plan { agents: 1, layers: vec![MIB], tls: false, ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    stage.cluster.agent_mut(0).unwrap().stop().await;
    let proxy = stage.agent(0).addresses().proxy;
    assert!(TcpStream::connect(proxy).await.is_err(), "without the agent and without a listener clients are refused");

    let listener = TcpListener::bind(proxy).unwrap();
    rustix::net::listen(&listener, BACKLOG).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let notify = directory.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_nonblocking(true).unwrap();

    let ends = [Signal::TERM, Signal::KILL, Signal::TERM];
    for signal in ends {
        // Connected before there is an agent, the first time or again.
        let early = ask(&stage, proxy).await;
        let child = start(stage.agent(0), &listener, &notify);
        let answer = answer(early).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}\n{}", stage.agent(0).log_tail());
        told(&manager, b"READY=1\n").await;
        wait::until("the agent is ready", async || {
            admin(stage.agent(0), "/readyz").await.is_some_and(|(status, _)| status == StatusCode::OK)
        })
        .await;
        stage.pull([0]).await;

        // Whoever connects while it stops, or crashes, may be cut, but is never refused.
        let ending = end(child, signal);
        let clients = async {
            loop {
                drop(TcpStream::connect(proxy).await.expect("nobody is refused"));
                tokio::time::sleep(CLIENT_EVERY).await;
            }
        };
        let code = tokio::select! {
            code = ending => code,
            () = clients => None,
        };
        if signal == Signal::TERM {
            assert_eq!(code, Some(0));
            told(&manager, b"STOPPING=1\n").await;
        }
    }
    assert_eq!(log(stage.agent(0)).matches("takes over the socket").count(), ends.len(), "{}", stage.logs());
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_on_another_address_is_refused() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], tls: false, ..Plan::default() }).await;
    stage.cluster.agent_mut(0).unwrap().stop().await;
    let agent = stage.agent(0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut child = start(agent, &listener, &directory.path().join("nobody"));
    let status = timeout(ENDED_WITHIN, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(2));
    let told = agent.log_tail();
    for address in [listener.local_addr().unwrap(), agent.addresses().proxy] {
        assert!(told.contains(&address.to_string()), "{address}: {told}");
    }
    stage.stop().await;
}
