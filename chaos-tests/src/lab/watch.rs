//! What many agents count, at little cost: one process asks all of them from a host of its own. A process per agent, as
//! for a handful, would take more of two cores than fifty agents do.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::agent::{ADMIN_PORT, Agent, Metrics};
use super::command::{Run, wait_for};
use super::netns::Host;
use super::world::World;

/// How long one agent may take to answer, on two cores that have fifty to start.
const ANSWER_SECONDS: &str = "10";

/// Ends each agent's answer.
const END: &str = "# EOF";

/// A host that looks at agents and does nothing else.
#[derive(Debug)]
pub struct Watch {
    host: Host,
}

impl Watch {
    /// Plugs it in.
    pub async fn new(world: &mut World) -> Result<Self> {
        Ok(Self { host: world.host("watch").await? })
    }

    /// What agents to be watched must have in their config: others can reach their admin port.
    #[must_use]
    pub fn config() -> Value {
        json!({"admin": {"listen": format!("0.0.0.0:{ADMIN_PORT}")}})
    }

    /// What each of the agents that run counts at the moment; an error unless all answer.
    pub async fn metrics(&self, agents: &[Agent]) -> Result<Vec<Metrics>> {
        let running: Vec<&Agent> = agents.iter().filter(|agent| agent.is_running()).collect();
        let urls = running.iter().map(|agent| format!("http://{}:{ADMIN_PORT}/metrics", agent.host.address));
        let curl: Run = self.host.run("curl").args(["-sS", "--fail", "--fail-early", "--max-time", ANSWER_SECONDS]);
        let text = curl.args(urls).output().await?;
        let mut answers: Vec<&str> = text.split(END).collect();
        answers.pop();
        ensure!(answers.len() == running.len(), "{} agents run and {} answered", running.len(), answers.len());
        Ok(answers.into_iter().map(Metrics::parse).collect())
    }

    /// Waits until each of the agents that run counts `members`, itself included. Gives the time since `since`, by which
    /// the last had answered; an error if that is more than `limit`.
    pub async fn members(&self, agents: &[Agent], members: usize, since: Instant, limit: Duration) -> Result<Duration> {
        let counts = |now: &Metrics| now.total("darter_members") == members as u64;
        let all = || async { self.metrics(agents).await.is_ok_and(|all| all.iter().all(counts)) };
        let what = format!("{members} members on all agents");
        let waited = wait_for(&what, limit.saturating_sub(since.elapsed()), all).await;
        let took = since.elapsed();
        if let Err(error) = waited {
            let seen = self.metrics(agents).await?;
            let seen: Vec<u64> = seen.iter().map(|now| now.total("darter_members")).collect();
            return Err(error.context(format!("after {took:.1?} they count {seen:?}")));
        }
        ensure!(took <= limit, "{what} took {took:.1?}, which is more than {limit:?}");
        Ok(took)
    }
}
