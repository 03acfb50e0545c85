//! Which transport pieces take, as `peer.transport` says and as the other side allows.

use serde_json::json;

use crate::stage::{MIB, Plan, Stage, admin, metric, reconfigure};
use crate::wait;

const OVER_TCP: &str = "darter_peer_received_over_bytes_total{transport=\"Tcp\"}";
const OVER_QUIC: &str = "darter_peer_received_over_bytes_total{transport=\"Quic\"}";

fn plan() -> Plan {
    Plan { agents: 3, layers: vec![6 * MIB, 24 * MIB], ..Plan::default() }
}

/// Pieces over both transports, of all agents, after a cold pull by all of them.
async fn cold(stage: &Stage) -> (u64, u64) {
    stage.pull_all().await;
    assert_eq!(stage.sum("darter_peer_wrong_bytes_total").await, 0);
    let (tcp, quic) = (stage.sum(OVER_TCP).await, stage.sum(OVER_QUIC).await);
    assert_eq!(tcp + quic, stage.sum("darter_peer_received_bytes_total").await);
    (tcp, quic)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_go_over_tcp_by_themselves() {
    let stage = Stage::start(plan()).await;
    let (tcp, quic) = cold(&stage).await;
    // What does not is what was asked for before the first handshake was over.
    assert!(tcp > quic, "{tcp} over TCP, {quic} over QUIC");
    assert!(stage.sum("darter_tcp_connections").await > 0);
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_goes_over_tcp_where_it_is_wanted() {
    let stage = Stage::start(Plan { overrides: |_| json!({"peer": {"transport": "tcp"}}), ..plan() }).await;
    let (tcp, quic) = cold(&stage).await;
    assert!(tcp > 4 * quic, "{tcp} over TCP, {quic} over QUIC");
    stage.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_takes_quic_only_is_no_obstacle() {
    let mut stage = Stage::start(plan()).await;
    let agent = stage.cluster.agent_mut(0).unwrap();
    agent.stop().await;
    reconfigure(agent, |config| config["peer"]["transport"] = json!("quic"));
    agent.start().unwrap();
    let agent = stage.agent(0);
    wait::until("the agent is ready", async || admin(agent, "/readyz").await.is_some_and(|it| it.0 == 200)).await;
    wait::until("all know each other", async || stage.sum("darter_members").await == 9).await;
    cold(&stage).await;
    let quic_only = stage.agent(0);
    assert_eq!(metric(quic_only, OVER_TCP).await, 0);
    assert_eq!(metric(quic_only, "darter_tcp_connections").await, 0);
    assert!(metric(quic_only, OVER_QUIC).await > 0);
    stage.stop().await;
}
