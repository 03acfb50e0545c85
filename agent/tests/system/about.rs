//! What the admin port tells of the process itself, and what it does not (row 100), and of what it keeps out of the swarm
//! (row 85).

use serde_json::{Value, json};

use crate::stage::{MIB, Plan, Stage, admin, reconfigure};
use crate::wire::{self, Way};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_is_described_and_its_secrets_are_not() {
    let mut stage = Stage::start(Plan { agents: 1, layers: vec![MIB], ..Plan::default() }).await;
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    let planted = [
        ("REGISTRY_PASSWORD", "pl4nted"),
        ("HTTPS_PROXY", "http://user:pl4nted@127.0.0.1:1"),
        ("AWS_SECRET_ACCESS_KEY", "pl4nted"),
        ("DARTER_VERIFY", "before_stream"),
        ("DARTER_LOG", "debug"),
    ];
    agent.start_with(&planted).unwrap();
    stage.ready().await;
    let agent = stage.agent(0);
    let ask = async |path: &str| {
        let (status, said) = admin(agent, path).await.unwrap();
        assert_eq!(status, 200, "{path}");
        assert!(!said.contains("pl4nted"), "{path}: {said}");
        said
    };
    let args = ask("/args").await;
    let lines: Vec<&str> = args.lines().collect();
    assert!(lines[0].ends_with("darter"), "{args}");
    assert_eq!(lines[1..], ["agent", "--config", agent.config_file().to_str().unwrap()]);
    let env = ask("/env").await;
    for line in ["REGISTRY_PASSWORD=[redacted]", "HTTPS_PROXY=[redacted]", "DARTER_VERIFY=before_stream"] {
        assert!(env.lines().any(|shown| shown == line), "{line} in {env}");
    }
    let version: Value = serde_json::from_str(&ask("/debug/version").await).unwrap();
    assert_eq!(
        version,
        json!({"version": env!("CARGO_PKG_VERSION"), "arch": std::env::consts::ARCH, "os": std::env::consts::OS})
    );
    assert!(ask("/metrics").await.contains("darter_build_info"));
    // There is no profiler, and the proxy's port tells nothing of this.
    assert_eq!(admin(agent, "/debug/pprof").await.unwrap().0, 404);
    let proxy = Way::To(agent.addresses().proxy, None);
    assert_ne!(wire::get(&proxy, "/env", &[]).await.status, 200);
    // Nor are the cluster's secret and the key of the CA anywhere in it.
    let secret = std::fs::read_to_string(stage.cluster.directory().join("secret")).unwrap();
    let key = std::fs::read_to_string(agent.config_file().with_file_name("hijack.key")).unwrap();
    let key = key.lines().nth(1).unwrap();
    for path in ["/args", "/env", "/debug/version", "/metrics", "/api/v1/sources", "/api/v1/holdings"] {
        let said = ask(path).await;
        assert!(!said.contains(secret.trim()) && !said.contains(key), "{path}");
    }
    stage.stop().await;
}

/// Row 85: two agents, one image, and every byte of it from the registry twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_direct_mirror_gives_no_peer_a_byte() {
    let mut stage = Stage::start(Plan { agents: 2, layers: vec![3 * MIB], ..Plan::default() }).await;
    let remote = format!("https://{}", stage.registry.address());
    let layer = stage.image.layers()[0].clone();
    for (direct, copies) in [(true, 2), (false, 3)] {
        for at in 0..2 {
            let agent = stage.cluster.agent_mut(at).unwrap();
            agent.stop().await;
            reconfigure(agent, |config| config["registry_mirror"] = json!({"remote": remote, "direct": direct}));
            agent.start().unwrap();
        }
        stage.ready().await;
        for at in 0..2 {
            let mirror = Way::To(stage.agent(at).addresses().proxy, None);
            let got = wire::get(&mirror, &stage.blob_path(&layer.digest()), &[]).await.whole().await;
            assert!(got == layer.read(0..layer.length()), "agent {at}, direct: {direct}");
        }
        let sent = stage.settled().await.blobs[&layer.digest()].body_bytes;
        assert_eq!(sent, copies * layer.length(), "direct: {direct}");
        let by_peers = stage.sum("darter_peer_received_bytes_total").await;
        let by_swarm = stage.sum("darter_client_sent_bytes_total").await;
        let expected = if direct { (0, 0) } else { (layer.length(), 2 * layer.length()) };
        assert_eq!((by_peers, by_swarm), expected, "direct: {direct}");
    }
    stage.stop().await;
}
