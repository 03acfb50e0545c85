//! List, then watch, again and again: what each failure means, and that none of them costs the seeds that are known.
//!
//! | what happens | what is done |
//! |---|---|
//! | the watch ends or breaks off | watch on from the version that was seen last |
//! | the version is too old (410) | list again; the seeds stay until the list is complete and replaces them |
//! | an event that cannot be understood, or an error in the stream | list again: what it said is not known |
//! | the server refuses, is slow or away | wait, longer each time, and do the same again |
//! | nothing, for [`RESYNC`] | list again, in case that a change was never told |

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};

use super::lines::{Lines, TooLong};
use super::objects::{Applied, Objects};
use crate::Update;
use crate::backoff::Backoff;
use crate::index::SourceId;

/// How long one page, or the beginning of a watch, may take. A server that needs longer is overloaded, and a question that is
/// given up and asked later is the smaller burden.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long a watch is asked for, at least; up to as much again is added. Since nothing needs to come on a watch, this is
/// also how long a connection that died without a word goes unnoticed.
const WATCH: Duration = Duration::from_secs(120);

/// How much longer than asked for a watch may last: the server is to end it, this is for one that cannot.
const WATCH_GRACE: Duration = Duration::from_secs(5);

/// A watch that lasted this long ended for another reason than those before it.
const STEADY: Duration = Duration::from_secs(10);

/// How often everything is listed although every change should have been told; up to a fifth is added.
const RESYNC: Duration = Duration::from_secs(30 * 60);

/// Pages of one list: ten thousand objects and more. What comes after them is left out.
const PAGES_MAX: usize = 128;

/// The longest event. An object in etcd has up to 1.5 MiB.
const EVENT_BYTES_MAX: usize = 2 << 20;

/// Failures in a row that nobody is told of: connections break, and servers restart.
const FAILURES_UNSAID: u32 = 3;

/// The longest pause that a server is granted.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Why following came to an end. All are worth trying again, some only with other credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// This agent's: it is not told where the server is, or by credentials that cannot be read.
    #[error("the Kubernetes API cannot be used from here: {0}")]
    Configuration(String),
    /// The operator's: the agent's account may not list and watch this.
    #[error("the agent's account may not list and watch this ({code}): {message}")]
    Forbidden { code: u16, message: String },
    /// Nobody's: history is kept for some minutes only. The version is of no more use.
    #[error("the version is too old")]
    Expired,
    /// The server's.
    #[error("the API server refuses ({code}): {message}")]
    Refused { code: u16, message: String, pause: Option<Duration> },
    /// The server's, or the network's.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// The network's: the answer broke off, or has no end.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// The server's: this is no answer to what was asked. What it should have said is not known.
    #[error("the answer cannot be understood: {0}")]
    Malformed(String),
    /// The server's, or the network's.
    #[error("no answer within {} s", ANSWER_MAX.as_secs())]
    Late,
}

impl From<TooLong> for Failure {
    fn from(too_long: TooLong) -> Self {
        Self::Malformed(too_long.to_string())
    }
}

impl Failure {
    /// Whether the operator has to do something before it can get better.
    fn is_for_the_operator(&self) -> bool {
        matches!(self, Self::Configuration(_) | Self::Forbidden { .. })
    }

    /// How long the server wants to be left alone.
    fn pause(&self) -> Duration {
        let Self::Refused { pause: Some(pause), .. } = self else { return Duration::ZERO };
        (*pause).min(PAUSE_MAX)
    }
}

/// A part of a list.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) objects: Vec<(String, BTreeSet<SocketAddr>)>,
    pub(super) version: String,
    /// What asks for the next page, if there is one.
    pub(super) next: Option<String>,
}

/// A line of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Applied {
        name: String,
        seeds: BTreeSet<SocketAddr>,
        version: Option<String>,
    },
    Deleted {
        name: String,
        version: Option<String>,
    },
    /// Nothing has changed up to this version.
    Bookmark {
        version: String,
    },
}

/// What is asked of the API server.
pub(super) trait Server {
    /// The stream of changes.
    type Body: BodyExt<Data: AsRef<[u8]>, Error: std::fmt::Display> + Unpin;

    /// A page of the list of all objects.
    async fn page(&mut self, token: Option<&str>) -> Result<Page, Failure>;
    /// Asks for the changes since a version.
    async fn watch(&mut self, version: &str, lives: Duration) -> Result<Self::Body, Failure>;
    /// What a line of them says.
    fn line(&self, line: &[u8]) -> Result<Line, Failure>;
    /// Forgets connection and credentials.
    fn reset(&mut self);
}

/// Follows the objects of a server until nobody listens.
pub(super) async fn run<S: Server>(server: S, source: SourceId, updates: mpsc::Sender<Update>) {
    let listening = updates.clone();
    let mut follower = Follower {
        server,
        source,
        updates,
        objects: Objects::default(),
        version: None,
        resync_at: Instant::now(),
        backoff: Backoff::default(),
        failures: 0,
    };
    tokio::select! {
        () = follower.run() => {}
        () = listening.closed() => {}
    }
}

struct Follower<S> {
    server: S,
    source: SourceId,
    updates: mpsc::Sender<Update>,
    objects: Objects,
    /// Up to where the objects are known; none before the first list, and where something may have been missed.
    version: Option<String>,
    resync_at: Instant,
    backoff: Backoff,
    /// Failures since the last thing that went well.
    failures: u32,
}

impl<S: Server> Follower<S> {
    async fn run(&mut self) {
        loop {
            let ended = self.follow().await;
            let wait = self.backoff.failed(rand::random());
            let pause = match &ended {
                Ok(()) => Duration::ZERO,
                Err(failure) => {
                    self.failed(failure);
                    failure.pause()
                }
            };
            tokio::time::sleep(wait.max(pause)).await;
        }
    }

    /// Lists where that is needed, then watches until the watch ends.
    async fn follow(&mut self) -> Result<(), Failure> {
        let version = match self.version.clone() {
            None => self.list().await?,
            Some(known) if Instant::now() < self.resync_at => known,
            // Nothing is known to be missing: if it cannot be listed, watching goes on.
            Some(known) => match self.list().await {
                Ok(listed) => listed,
                Err(failure) => {
                    tracing::debug!(%failure, "the seeds' objects cannot be listed again");
                    self.resync_at = Instant::now() + PAUSE_MAX;
                    known
                }
            },
        };
        self.watch(&version).await
    }

    /// Reads all pages, then puts them in the place of what was known.
    async fn list(&mut self) -> Result<String, Failure> {
        let mut objects = Objects::default();
        let mut token: Option<String> = None;
        let mut version = String::new();
        for pages in 1..=PAGES_MAX {
            let page = timeout(ANSWER_MAX, self.server.page(token.as_deref())).await.unwrap_or(Err(Failure::Late))?;
            version = page.version;
            let full = page.objects.into_iter().any(|(name, seeds)| objects.apply(name, seeds) == Applied::Full);
            token = page.next;
            if full || (token.is_some() && pages == PAGES_MAX) {
                tracing::warn!(source = self.source.0, pages, "more objects than are kept, the rest is left out");
                break;
            }
            if token.is_none() {
                break;
            }
        }
        if version.is_empty() {
            return Err(Failure::Malformed("a list without a version".to_owned()));
        }
        self.objects = objects;
        self.version = Some(version.clone());
        self.resync_at = Instant::now() + RESYNC.mul_f64(1.0 + rand::random::<f64>() / 5.0);
        self.went_well();
        self.publish().await;
        Ok(version)
    }

    /// Takes changes over until there are no more of this watch.
    async fn watch(&mut self, version: &str) -> Result<(), Failure> {
        let lives = WATCH.mul_f64(1.0 + rand::random::<f64>());
        let asked = timeout(ANSWER_MAX, self.server.watch(version, lives)).await.unwrap_or(Err(Failure::Late));
        let mut body = asked.inspect_err(|failure| self.lose_track_if(matches!(failure, Failure::Expired)))?;
        let started = Instant::now();
        let mut lines = Lines::new(EVENT_BYTES_MAX);
        loop {
            let frame = timeout_at(started + lives + WATCH_GRACE, body.frame()).await;
            if started.elapsed() >= STEADY {
                self.backoff.succeeded();
            }
            let data = match frame {
                // It has ended, or it should have.
                Ok(None) | Err(_) => return Ok(()),
                Ok(Some(Err(error))) => return Err(Failure::Broken(error.to_string())),
                Ok(Some(Ok(frame))) => frame.into_data(),
            };
            let Ok(data) = data else { continue };
            // Whatever is wrong with a line, what it should have said is not known.
            let lines = lines.push(data.as_ref()).inspect_err(|_| self.lose_track_if(true))?;
            let mut changed = false;
            let mut outcome = Ok(());
            for line in lines {
                match self.server.line(&line) {
                    Ok(line) => changed |= self.take(line),
                    Err(failure) => {
                        self.lose_track_if(true);
                        outcome = Err(failure);
                        break;
                    }
                }
            }
            if changed {
                self.publish().await;
            }
            outcome?;
        }
    }

    /// Takes one change over. Returns whether it is one.
    fn take(&mut self, line: Line) -> bool {
        let (changed, version) = match line {
            Line::Bookmark { version } => (false, Some(version)),
            Line::Deleted { name, version } => {
                self.went_well();
                self.backoff.succeeded();
                (self.objects.delete(&name), version)
            }
            Line::Applied { name, seeds, version } => {
                self.went_well();
                self.backoff.succeeded();
                (self.objects.apply(name, seeds) != Applied::Same, version)
            }
        };
        self.version = version.or_else(|| self.version.take());
        changed
    }

    async fn publish(&self) {
        let update = Update { source: self.source, seeds: self.objects.seeds(), complete: true };
        // That nobody listens any more ends all of this, elsewhere.
        let _ = self.updates.send(update).await;
    }

    fn lose_track_if(&mut self, lost: bool) {
        if lost {
            self.version = None;
        }
    }

    fn went_well(&mut self) {
        if std::mem::take(&mut self.failures) >= FAILURES_UNSAID {
            tracing::info!(source = self.source.0, "the Kubernetes API answers again");
        }
    }

    /// Says what is wrong, once per outage, and drops what may be the reason.
    fn failed(&mut self, failure: &Failure) {
        let said_at = if failure.is_for_the_operator() { 0 } else { FAILURES_UNSAID - 1 };
        if self.failures == said_at {
            tracing::warn!(source = self.source.0, %failure, "seeds cannot be asked for, it is tried again");
        } else {
            tracing::debug!(source = self.source.0, %failure, "seeds cannot be asked for, it is tried again");
        }
        self.failures = self.failures.saturating_add(1);
        match failure {
            Failure::Configuration(_) | Failure::Forbidden { .. } | Failure::Unreachable(_) | Failure::Late => {
                self.server.reset();
            }
            Failure::Expired | Failure::Refused { .. } | Failure::Broken(_) | Failure::Malformed(_) => {}
        }
    }
}
