//! Agents that die without a word: whoever is left finishes, and the registry is not asked again for what is there.

use std::num::NonZeroU64;
use std::time::Duration;

use darter_agent::client::{Client, PullError, Pulled, Transfer};
use darter_agent::demo::registry;
use futures_util::future::{join, join_all};
use tokio::time::error::Elapsed;

use crate::stage::{MIB, Plan, Stage, chain, metric, pieces};
use crate::wait;

/// Longer than a pull takes during which homes, leases and neighbours are lost.
const PULL_MAX: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_finishes_when_the_agent_that_serves_is_killed() {
    let mut stage = Stage::start(Plan { agents: 4, layers: vec![MIB, 14 * MIB, 18 * MIB], ..Plan::default() }).await;
    let (server, others) = (0, [1, 2, 3]);
    stage.pull([server]).await;
    let warm = stage.settled().await.blob_bytes();

    let clients = others.map(|at| (at, stage.client(at)));
    let (repository, tag) = (stage.image.repository().to_owned(), stage.image.tag().to_owned());
    let all = others.len() as u64 * stage.image.blob_bytes();
    let pulls = pulls(&clients, &repository, &tag);
    let kill = async {
        let given = wait::within(PULL_MAX, "the server serves", async || {
            let given = metric(stage.agent(server), "darter_peer_sent_bytes_total").await;
            (given >= stage.image.blob_bytes() / 8).then_some(given)
        })
        .await;
        let got = stage.sum("darter_peer_received_bytes_total").await;
        stage.cluster.agent_mut(server).unwrap().kill().await;
        (given, got)
    };
    let (pulled, (given, got)) = join(pulls, kill).await;
    assert!(got < all, "{given} bytes given, {got} of {all} there: it was killed too late to matter");
    for (at, pulled) in pulled {
        finished(&stage, at, pulled);
    }
    assert!(stage.registry.stats().blob_bytes() > warm, "what died with the server came from the registry");
    stage.stop().await;
}

/// Pieces that may leave the registry again because of one dead fetcher: two that it had and nobody else, which is where
/// its brake is, the one under way, and one that its death caught between two peers.
const LOST_PIECES_MAX: usize = 4;

/// Large, so that what sockets hold is small beside it; set rather than chosen by the agents, as this counts by it.
const PIECE_BYTES: u64 = MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_fetchers_lease_goes_to_another() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(12 * MIB), ..registry::Options::default() };
    let plan =
        Plan { agents: 5, layers: vec![36 * MIB + 4321], registry, piece_bytes: Some(PIECE_BYTES), ..Plan::default() };
    let mut stage = Stage::start(plan).await;
    // Losing a home as well is another matter: here it lives.
    stage.make_home(0).await;
    let blob = stage.image.layers()[0].clone();
    let clients: Vec<_> = (0..5).map(|at| (at, stage.client(at))).collect();
    let (repository, tag) = (stage.image.repository().to_owned(), stage.image.tag().to_owned());
    let pulls = pulls(&clients, &repository, &tag);
    let kill = async {
        let victim = wait::within(PULL_MAX, "a fetcher is in its run", async || {
            for at in 1..5 {
                if metric(stage.agent(at), "darter_registry_received_bytes_total").await >= 2 * PIECE_BYTES {
                    return Some(at);
                }
            }
            None
        })
        .await;
        // It gave away what it had fetched before it had the whole (rows 12 and 69).
        wait::until("a fetcher serves what it has", async || {
            metric(stage.agent(victim), "darter_peer_sent_bytes_total").await > 0
        })
        .await;
        let sent = stage.registry.stats().blobs[&blob.digest()].body_bytes;
        stage.cluster.agent_mut(victim).unwrap().kill().await;
        (victim, sent)
    };
    let (pulled, (victim, sent)) = join(pulls, kill).await;
    assert!(sent < blob.length() * 3 / 4, "{sent} of {} sent: it was killed too late to matter", blob.length());
    for (at, pulled) in pulled.into_iter().filter(|(at, _)| *at != victim) {
        finished(&stage, at, pulled);
    }
    let stats = &stage.registry.stats().blobs[&blob.digest()];
    let logs = stage.logs();
    let times: Vec<usize> = pieces(stage.geometry(&blob)).iter().map(|piece| stats.times_sent(piece)).collect();
    assert!(
        times.iter().all(|times| (1..=2).contains(times)),
        "how often each piece was sent: {times:?}\n{:?}\n{logs}",
        stats.served
    );
    let twice = times.iter().filter(|times| **times == 2).count();
    assert!(twice <= LOST_PIECES_MAX, "{twice} pieces were sent twice: {times:?}\n{:?}", stats.served);
    stage.stop().await;
}

/// Whoever was the home of a task: the others finish without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_finishes_when_the_home_is_killed() {
    let registry = registry::Options { blob_rate: NonZeroU64::new(12 * MIB), ..registry::Options::default() };
    let mut stage = Stage::start(Plan { agents: 4, layers: vec![24 * MIB], registry, ..Plan::default() }).await;
    stage.make_home(0).await;
    let digest = stage.image.layers()[0].digest();
    let clients: Vec<_> = (1..4).map(|at| (at, stage.client(at))).collect();
    let (repository, tag) = (stage.image.repository().to_owned(), stage.image.tag().to_owned());
    let pulls = pulls(&clients, &repository, &tag);
    let kill = async {
        wait::until("the pull has begun", async || stage.registry.stats().blobs[&digest].body_bytes >= 4 * MIB).await;
        stage.cluster.agent_mut(0).unwrap().kill().await;
        stage.registry.stats().blobs[&digest].body_bytes
    };
    let (pulled, sent) = join(pulls, kill).await;
    assert!(sent < 20 * MIB, "{sent} bytes sent: it was killed too late to matter");
    for (at, pulled) in pulled {
        finished(&stage, at, pulled);
    }
    stage.stop().await;
}

type Ended = Result<Result<Pulled, PullError>, Elapsed>;

/// Pulls through several agents at once.
async fn pulls(clients: &[(usize, Client)], repository: &str, tag: &str) -> Vec<(usize, Ended)> {
    join_all(clients.iter().map(|(at, client)| async move {
        let transfer = Transfer::default();
        (*at, tokio::time::timeout(PULL_MAX, client.pull(repository, tag, &transfer)).await)
    }))
    .await
}

/// A pull that must have succeeded at the first attempt.
fn finished(stage: &Stage, at: usize, ended: Ended) {
    let agent = stage.agent(at);
    let pulled = ended.unwrap_or_else(|_| panic!("{} hangs\n{}", agent.name(), agent.log_tail()));
    let pulled = pulled.unwrap_or_else(|error| panic!("{}: {}\n{}", agent.name(), chain(&error), agent.log_tail()));
    assert_eq!(pulled.blob_bytes, stage.image.blob_bytes());
}
