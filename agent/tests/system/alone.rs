//! Agents that have nobody to talk to: without a secret, under another one, or in another cluster.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use base64::Engine as _;
use serde_json::json;

use crate::stage::{MIB, Plan, Stage, admin, log, metric, reconfigure, samples};
use crate::wait;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_secret_an_agent_is_a_proxy_only() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![MIB, 3 * MIB], ..Plan::default() }).await;
    let mut seen = Vec::new();
    for at in 0..2 {
        let agent = stage.cluster.agent_mut(at).unwrap();
        // With a secret, both are open: the test looks at the right place.
        let own = *agent.addresses();
        assert!(udp_sockets().contains(&own.peer) && udp_sockets().contains(&own.gossip), "{:?}", udp_sockets());
        agent.stop().await;
        reconfigure(agent, |config| {
            config.as_object_mut().unwrap().remove("secret_file");
        });
        seen.push(log(agent).len());
        agent.start().unwrap();
    }
    for (agent, seen) in stage.agents().iter().zip(seen) {
        wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200)).await;
        let own = agent.addresses();
        let open: Vec<SocketAddr> = udp_sockets().into_iter().filter(|socket| socket.ip() == own.peer.ip()).collect();
        assert!(!open.contains(&own.peer) && !open.contains(&own.gossip), "{open:?}");
        assert!(std::net::TcpListener::bind(own.peer).is_ok(), "nothing listens for peers over TCP");
        assert_eq!(metric(agent, "darter_members").await, 1);
        let log = log(agent);
        let warnings: Vec<&str> = log[seen..].lines().filter(|line| line.contains(" WARN ")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("secret_file is not set"), "{warnings:#?}");
    }
    stage.pull_all().await;
    stage.pull_all().await;
    assert_eq!(stage.settled().await.blob_bytes(), 2 * stage.image.blob_bytes(), "each for itself, and once");
    assert_eq!(stage.sum("darter_peer_received_bytes_total").await, 0);
    assert_eq!(stage.sum("darter_fallbacks_total").await, 0);
    stage.stop().await;
}

/// Rows 22: clusters on one network share nothing, whether it is the id or the secret that differs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_clusters_never_meet() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![2 * MIB], ..Plan::default() }).await;
    let other_secret = stage.cluster.directory().join("other-secret");
    private(&other_secret, &(base64::engine::general_purpose::STANDARD.encode([7; 32]) + "\n"));
    for what in ["id", "secret"] {
        for at in 0..2 {
            let agent = stage.cluster.agent_mut(at).unwrap();
            agent.stop().await;
            std::fs::remove_dir_all(agent.cache_dir()).unwrap();
        }
        let stranger = stage.agent(1);
        reconfigure(stranger, |config| match what {
            "id" => config["node"]["cluster"] = json!("elsewhere"),
            _ => {
                config["node"]["cluster"] = json!("demo");
                config["secret_file"] = json!(other_secret);
            }
        });
        let seen: Vec<usize> = stage.agents().iter().map(|agent| log(agent).len()).collect();
        let before = stage.registry.stats().blob_bytes();
        for at in 0..2 {
            stage.cluster.agent_mut(at).unwrap().start().unwrap();
        }
        // They are each other's seeds, so they talk; and neither understands the other.
        for (agent, seen) in stage.agents().iter().zip(seen) {
            wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200))
                .await;
            let series = "darter_gossip_dropped_total{reason=\"OtherCluster\"}";
            wait::until("datagrams of the other cluster come", async || {
                samples(agent).await.get(series).is_some_and(|count| *count >= 2)
            })
            .await;
            assert_eq!(metric(agent, "darter_members").await, 1, "another {what}");
            let log = log(agent);
            let told = log[seen..].lines().filter(|line| line.contains("another cluster")).count();
            assert_eq!(told, 1, "once a minute, however many datagrams come:\n{}", &log[seen..]);
        }
        stage.pull_all().await;
        let bytes = stage.registry.stats().blob_bytes() - before;
        assert_eq!(bytes, 2 * stage.image.blob_bytes(), "another {what}: each for itself");
        assert_eq!(stage.sum("darter_peer_received_bytes_total").await, 0);
        assert_eq!(stage.sum("darter_peer_sent_bytes_total").await, 0);
        assert_eq!(stage.sum("darter_members").await, 2);
    }
    stage.stop().await;
}

pub(crate) fn private(path: &std::path::Path, text: &str) {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// The local addresses of all UDP sockets, from the kernel's table.
fn udp_sockets() -> Vec<SocketAddr> {
    let table = std::fs::read_to_string("/proc/net/udp").unwrap();
    let socket = |line: &str| {
        let (ip, port) = line.split_whitespace().nth(1)?.split_once(':')?;
        // The address is printed as the integer that it is in memory, in network order.
        let ip = Ipv4Addr::from(u32::from_str_radix(ip, 16).ok()?.to_ne_bytes());
        Some(SocketAddr::new(IpAddr::V4(ip), u16::from_str_radix(port, 16).ok()?))
    };
    table.lines().skip(1).filter_map(socket).collect()
}
