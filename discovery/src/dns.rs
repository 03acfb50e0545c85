//! Seeds from a name, as a cluster's DNS serves a headless service: SRV records, else A and AAAA with gossip's port.
//!
//! Read in this order: [`Query`], what is asked; `run`, when; `ask`, how. A name is asked for again when its records run
//! out. While the resolver does not answer, the last good answer stays; that there are no records is an answer.

mod ask;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::backoff::Backoff;
use crate::index::SourceId;
use crate::{Update, refresh};
use ask::{Asker, Round};

/// How long all questions of a round may take together: two servers that are tried twice, and some time to spare.
const ROUND_MAX: Duration = Duration::from_secs(10);

/// The longest wait for a resolver that does not answer. Shorter than for other sources: a question is one packet, and
/// agents that start while the cluster's DNS does wait for it.
const DELAY_MAX: Duration = Duration::from_secs(5);

/// How long the answer that there is nothing is believed. Negative answers may live for hours, but the name of a service
/// that is being set up appears within seconds.
const NOTHING_MAX: Duration = Duration::from_secs(5);

/// What is asked, and whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// The name, always taken as complete: search lists of the host are not used. One that begins with an underscore, as
    /// in `_gossip._udp.darter.example.org`, has only SRV records.
    pub name: String,
    /// The port of addresses that come without one.
    pub port: u16,
    /// The resolvers; none: those of the system.
    pub servers: Vec<SocketAddr>,
}

impl Query {
    /// The names that may have SRV records, best first. The port's own name first, since a service that names several
    /// ports has records of all of them under its plain one.
    fn srv_names(&self) -> Vec<String> {
        let plain = self.name.trim_end_matches('.');
        if plain.starts_with('_') {
            return vec![format!("{plain}.")];
        }
        vec![format!("_gossip._udp.{plain}."), format!("{plain}.")]
    }

    /// The name that may have addresses, if it can have any.
    fn host_name(&self) -> Option<String> {
        let plain = self.name.trim_end_matches('.');
        (!plain.starts_with('_')).then(|| format!("{plain}."))
    }
}

/// Asks for the name again and again. Ends when nobody listens.
pub(crate) async fn run(source: SourceId, query: Query, updates: mpsc::Sender<Update>) {
    let mut asker = Asker::default();
    let mut backoff = Backoff::up_to(DELAY_MAX);
    let mut failing = false;
    loop {
        let answer = tokio::select! {
            answer = tokio::time::timeout(ROUND_MAX, asker.ask(&query)) => answer,
            () = updates.closed() => return,
        };
        let wait = match answer.unwrap_or(Err(ask::Failure::Late)) {
            Ok(round) => {
                let wait = next(&round, &mut backoff, rand::random());
                if std::mem::replace(&mut failing, !round.complete) && round.complete {
                    tracing::info!(name = query.name, "the name of the seeds is answered again");
                }
                if updates.send(Update { source, seeds: round.seeds, complete: round.complete }).await.is_err() {
                    return;
                }
                wait
            }
            Err(failure) => {
                // Said once per outage; what was known stays with the index.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(name = query.name, %failure, "the seeds' name cannot be asked for, it is tried again");
                }
                // The host's resolvers may have changed, and a socket may be what is broken.
                asker.reset();
                backoff.failed(rand::random())
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = updates.closed() => return,
        }
    }
}

/// How long to wait after an answer. One that lacks something is asked for again as after a failure, if that is sooner.
fn next(round: &Round, backoff: &mut Backoff, jitter: f64) -> Duration {
    let lives = if round.seeds.is_empty() { round.ttl.min(NOTHING_MAX) } else { round.ttl };
    let wait = refresh::after(lives, jitter);
    if round.complete {
        backoff.succeeded();
        return wait;
    }
    wait.min(backoff.failed(jitter))
}

#[cfg(test)]
mod tests;
