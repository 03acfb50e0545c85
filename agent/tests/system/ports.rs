//! What an agent listens on: what its configuration says, where it says so, and nothing else (rows 101 and 116).

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use serde_json::json;
use tokio::net::TcpStream;

use crate::stage::{MIB, Plan, Stage, admin, reconfigure};
use crate::wait;
use crate::wire::{self, Way};

/// The state of a listening TCP socket in the kernel's table.
const LISTEN: &str = "0A";

/// Protocol and address.
type Open = BTreeSet<(&'static str, SocketAddr)>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_configured_ports_are_open() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![6 * MIB], ..Plan::default() }).await;
    // Having talked to peers, registry and clients changes nothing.
    for pulled in [false, true] {
        if pulled {
            stage.pull_all().await;
        }
        for agent in stage.agents() {
            let own = agent.addresses();
            let configured: Open =
                [("tcp", own.proxy), ("udp", own.peer), ("tcp", own.peer), ("udp", own.gossip), ("tcp", own.admin)]
                    .into();
            assert_eq!(listening(agent.process_id().unwrap()), configured, "{}, pulled: {pulled}", agent.name());
        }
    }
    // Peers that use QUIC alone do not listen for TCP.
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    reconfigure(agent, |config| config["peer"]["transport"] = json!("quic"));
    agent.start().unwrap();
    let agent = stage.agent(0);
    wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200)).await;
    let own = agent.addresses();
    let configured: Open = [("tcp", own.proxy), ("udp", own.peer), ("udp", own.gossip), ("tcp", own.admin)].into();
    assert_eq!(listening(agent.process_id().unwrap()), configured);
    // Without a secret there are no peers to listen for.
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    reconfigure(agent, |config| {
        config.as_object_mut().unwrap().remove("secret_file");
    });
    agent.start().unwrap();
    let agent = stage.agent(0);
    wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200)).await;
    let configured: Open = [("tcp", agent.addresses().proxy), ("tcp", agent.addresses().admin)].into();
    assert_eq!(listening(agent.process_id().unwrap()), configured);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxy_is_reached_where_it_listens_and_nowhere_else() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let blob = stage.image.layers()[0].clone();
    let path = stage.blob_path(&blob.digest());
    let others = other_addresses();
    for (listen, everywhere) in [(Ipv4Addr::LOCALHOST, false), (Ipv4Addr::UNSPECIFIED, true)] {
        let agent = stage.cluster.agent_mut(0).unwrap();
        agent.stop().await;
        let port = free_port();
        reconfigure(agent, |config| {
            config["proxy"]["listen"] = json!(SocketAddr::new(listen.into(), port));
            // An agent that listens beyond loopback may not tell peers a loopback address; this one has no peers.
            config.as_object_mut().unwrap().remove("secret_file");
            config["node"].as_object_mut().unwrap().remove("advertise");
        });
        agent.start().unwrap();
        let agent = stage.agent(0);
        wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200)).await;
        let gets = |ip: IpAddr| {
            let way = Way::Tunnel {
                proxy: SocketAddr::new(ip, port),
                to: stage.registry.address(),
                tls: stage.agent(0).tls(),
            };
            let path = path.clone();
            async move { wire::get(&way, &path, &[]).await.whole().await }
        };
        assert!(gets(Ipv4Addr::LOCALHOST.into()).await == blob.read(0..blob.length()));
        for ip in &others {
            if everywhere {
                assert!(gets(*ip).await == blob.read(0..blob.length()), "{ip}");
            } else {
                let refused = TcpStream::connect((*ip, port)).await.unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{ip}: {refused}");
            }
        }
    }
    stage.stop().await;
}

/// Addresses of this host besides 127.0.0.1: another of loopback's, and the one that packets to other networks leave from,
/// where there is one. Nothing is sent.
fn other_addresses() -> Vec<IpAddr> {
    let outward = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        Ok(socket.local_addr()?.ip())
    });
    std::iter::once(Ipv4Addr::new(127, 0, 0, 2).into()).chain(outward).collect()
}

/// A port that is free at all addresses, for now.
fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port()
}

/// Where a process takes connections or datagrams.
fn listening(process: u32) -> Open {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let inodes: BTreeSet<String> = descriptors
        .filter_map(|descriptor| std::fs::read_link(descriptor.ok()?.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let tables = [("tcp", "tcp"), ("tcp", "tcp6"), ("udp", "udp"), ("udp", "udp6")];
    let sockets = tables.into_iter().flat_map(|(protocol, table)| {
        // A kernel without IPv6 has no such table.
        let text = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap_or_default();
        text.lines().skip(1).filter_map(socket).map(|socket| (protocol, socket)).collect::<Vec<_>>()
    });
    let by_inode: BTreeMap<String, (&'static str, Socket)> =
        sockets.map(|(protocol, socket)| (socket.inode.clone(), (protocol, socket))).collect();
    let own = inodes.iter().filter_map(|inode| by_inode.get(inode));
    // Any UDP socket takes datagrams, as long as it is connected to nobody.
    let takes = own.filter(|(protocol, socket)| match *protocol {
        "tcp" => socket.state == LISTEN,
        _ => socket.remote_port == 0,
    });
    takes.map(|(protocol, socket)| (*protocol, socket.local)).collect()
}

/// A line of the kernel's tables.
struct Socket {
    local: SocketAddr,
    remote_port: u16,
    state: String,
    inode: String,
}

fn socket(line: &str) -> Option<Socket> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, remote_port) = fields.get(2)?.split_once(':')?;
    Some(Socket {
        local: address(fields.get(1)?)?,
        remote_port: u16::from_str_radix(remote_port, 16).ok()?,
        state: (*fields.get(3)?).to_owned(),
        inode: (*fields.get(9)?).to_owned(),
    })
}

/// Addresses are printed as the integers that they are in memory, in network order, four bytes at a time.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(ip.get(8 * at..8 * at + 8)?, 16).ok()?.to_ne_bytes());
    let ip: IpAddr = if ip.len() == 8 {
        Ipv4Addr::from(word(0)?).into()
    } else {
        let words = [word(0)?, word(1)?, word(2)?, word(3)?];
        let bytes: Vec<u8> = words.concat();
        Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// So that the tests above look at the right place.
#[test]
fn sockets_of_this_process_are_found() {
    let (tcp, udp) = (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let found = listening(std::process::id());
    assert!(found.contains(&("tcp", tcp.local_addr().unwrap())), "{found:?}");
    assert!(found.contains(&("udp", udp.local_addr().unwrap())), "{found:?}");
    let client = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    assert!(!listening(std::process::id()).contains(&("tcp", client.local_addr().unwrap())));
    assert_eq!(address("0100007F:FDE9"), Some("127.0.0.1:65001".parse().unwrap()));
    assert_eq!(address("00000000000000000000000001000000:1F42"), Some("[::1]:8002".parse().unwrap()));
}
