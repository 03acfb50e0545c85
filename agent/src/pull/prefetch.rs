//! Fetches layers before their client asks for them, as [`ahead`](super::ahead) says, and opens the way to their homes.
//!
//! One loop owns the pulls that it has begun: each is an ordinary pull without a reader, which takes little
//! ([`Task::handle_background`](darter_swarm::task::Task::handle_background)) until its client comes. A blob that is whole before
//! that stays in the cache until the client has come or is given up; if room is wanted for what a client asks for, that goes first.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use darter_tracker::{Bitmap, Geometry, TaskId};
use http::Uri;
use http::uri::PathAndQuery;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::ahead::{Ahead, AheadId, Asked, Move};
use super::flight::{FLIGHTS_MAX, Flight, Flights, lock};
use super::{BlobRequest, Client};
use crate::source::registry::BlobOrigin;
use crate::store::{Blob, Outcome};

/// Pulls on this node up to which layers are fetched ahead: the other half is for what clients ask for.
const FLIGHTS_AHEAD_MAX: usize = FLIGHTS_MAX / 2;

/// What is fetched ahead, and for whom.
#[derive(Default)]
pub(super) struct Prefetch {
    ahead: Mutex<Ahead<How>>,
    changed: Notify,
    running: AtomicBool,
    /// Whole blobs that their clients have not asked for yet: held, so that they are not evicted.
    kept: Mutex<BTreeMap<AheadId, Arc<Blob>>>,
}

/// How a client asked for a layer, so that others can be asked for in the same way.
#[derive(Clone, Debug)]
struct How {
    origin: BlobOrigin,
    named: bool,
}

/// How a pull that was begun ahead has ended, with the bytes that were fetched.
enum End {
    /// The blob is whole.
    Whole(Arc<Blob>, u64),
    /// It failed, or did not begin.
    Failed(u64),
    /// It was told to stop.
    Stopped(u64),
}

impl Prefetch {
    /// Lets go of what nobody has asked for yet; tells whether there was any.
    pub(super) fn let_go(&self) -> bool {
        let kept = std::mem::take(&mut *lock(&self.kept));
        !kept.is_empty()
    }
}

/// A client's request for a blob, until its response ends.
pub(super) struct AskedSeat {
    flights: Arc<Flights>,
    asked: Asked,
    given: bool,
}

impl AskedSeat {
    /// The client has been given a whole piece.
    pub(super) fn given(&mut self) {
        if !std::mem::replace(&mut self.given, true) {
            let prefetch = &self.flights.prefetch;
            lock(&prefetch.ahead).given(self.asked);
            prefetch.changed.notify_one();
        }
    }
}

impl Drop for AskedSeat {
    fn drop(&mut self) {
        let prefetch = &self.flights.prefetch;
        lock(&prefetch.ahead).done(self.asked, Instant::now());
        prefetch.changed.notify_one();
    }
}

impl Flights {
    /// A client was given a manifest with these layers. Opens connections to their homes, so that no handshake stands before
    /// the first byte; nothing is fetched before the client asks.
    pub fn expect(self: &Arc<Self>, client: Client, layers: Vec<(TaskId, u64)>) {
        let tracker = self.context.tracker.clone();
        let tasks: Vec<TaskId> = layers.iter().map(|(task, _)| *task).collect();
        let stopping = self.stopping.clone();
        self.loops.spawn(async move { stopping.run_until_cancelled(tracker.prepare(&tasks)).await });
        lock(&self.prefetch.ahead).listed(client, &layers, Instant::now());
        if !self.prefetch.running.swap(true, Ordering::AcqRel) {
            self.loops.spawn(run(self.clone()));
        }
        self.prefetch.changed.notify_one();
    }

    /// A client asks for a blob, which may be a layer of a manifest that it was given.
    pub(super) fn note_asked(self: &Arc<Self>, request: &BlobRequest) -> Option<AskedSeat> {
        let client = request.client.as_ref()?;
        let whole = request.range == (0..request.length);
        let how = How { origin: request.origin.clone(), named: request.named };
        let asked = lock(&self.prefetch.ahead).asked(client, request.task, whole, how, Instant::now())?;
        self.prefetch.changed.notify_one();
        Some(AskedSeat { flights: self.clone(), asked, given: false })
    }
}

/// Begins and ends pulls until the agent stops.
async fn run(flights: Arc<Flights>) {
    let prefetch = &flights.prefetch;
    let mut pulls = JoinSet::new();
    let mut stops: BTreeMap<AheadId, CancellationToken> = BTreeMap::new();
    loop {
        let (moves, deadline) = due(&flights);
        for next in moves {
            match next {
                Move::Start { id, task, length, how } => {
                    let stop = CancellationToken::new();
                    stops.insert(id, stop.clone());
                    let flights = flights.clone();
                    pulls.spawn(async move { (id, fetch(&flights, task, length, how, &stop).await) });
                }
                Move::Stop { id } => {
                    lock(&prefetch.kept).remove(&id);
                    if let Some(stop) = stops.get(&id) {
                        stop.cancel();
                    }
                }
            }
        }
        let wake = deadline.map(tokio::time::Instant::from_std);
        tokio::select! {
            () = flights.stopping.cancelled() => break,
            () = prefetch.changed.notified() => {}
            () = sleep_until(wake) => {}
            Some(Ok((id, end))) = pulls.join_next() => {
                stops.remove(&id);
                let mut ahead = lock(&prefetch.ahead);
                match end {
                    End::Whole(blob, bytes) => {
                        lock(&prefetch.kept).insert(id, blob);
                        ahead.ended(id, true, bytes, Instant::now());
                    }
                    End::Failed(bytes) => ahead.ended(id, false, bytes, Instant::now()),
                    End::Stopped(bytes) => ahead.stopped(id, bytes, Instant::now()),
                }
            }
        }
    }
    lock(&prefetch.kept).clear();
    pulls.shutdown().await;
}

/// What is to be done now, and when to look again.
fn due(flights: &Flights) -> (Vec<Move<How>>, Option<Instant>) {
    let now = Instant::now();
    let mut ahead = lock(&flights.prefetch.ahead);
    let moves: Vec<Move<How>> = std::iter::from_fn(|| ahead.poll(now)).collect();
    let unread = ahead.take_unread(now);
    let deadline = ahead.deadline();
    drop(ahead);
    if unread > 0 {
        tracing::debug!(bytes = unread, "nobody has read what was fetched ahead");
        flights.context.metrics.unread_bytes.inc_by(unread);
    }
    (moves, deadline)
}

async fn sleep_until(wake: Option<tokio::time::Instant>) {
    match wake {
        Some(wake) => tokio::time::sleep_until(wake).await,
        None => std::future::pending().await,
    }
}

/// A place among those for whom a pull runs, given up when dropped.
struct Place(Arc<Flight>);

impl Place {
    fn take(flight: Arc<Flight>) -> Self {
        flight.ahead.fetch_add(1, Ordering::AcqRel);
        flight.readers_changed.notify_one();
        Self(flight)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.ahead.fetch_sub(1, Ordering::AcqRel);
        self.0.readers_changed.notify_one();
    }
}

/// Pulls one layer until it is whole or `stop`.
async fn fetch(flights: &Arc<Flights>, task: TaskId, length: u64, how: How, stop: &CancellationToken) -> End {
    if let Some(blob) = flights.context.store.find(&task)
        && blob.state().borrow().outcome == Outcome::Complete
    {
        return End::Whole(blob, 0);
    }
    let Some(url) = sibling(&how.origin.url, &task) else { return End::Failed(0) };
    let origin = BlobOrigin { url, headers: how.origin.headers };
    let request = BlobRequest { task, length, origin, range: 0..length, named: how.named, client: None };
    let place = match flights.join(&request, FLIGHTS_AHEAD_MAX).await {
        Ok(flight) => Place::take(flight),
        Err(error) => {
            tracing::debug!(%task, %error, "a layer cannot be fetched ahead");
            return End::Failed(0);
        }
    };
    flights.context.metrics.ahead.inc();
    tracing::debug!(%task, length, "a layer is fetched ahead");
    let blob = place.0.blob.clone();
    let before = blob.held();
    let stopped = tokio::select! {
        _ = place.0.end() => false,
        () = stop.cancelled() => true,
    };
    // Another client may be reading it: then it was not in vain.
    let read = !place.0.reading().is_empty();
    let bytes = if read { 0 } else { fetched(blob.geometry(), &before, &blob.held()) };
    match stopped {
        true => End::Stopped(bytes),
        false if blob.state().borrow().outcome == Outcome::Complete => End::Whole(blob, bytes),
        false => End::Failed(bytes),
    }
}

/// Bytes of what is held now and was not before.
fn fetched(geometry: &Geometry, before: &Bitmap, now: &Bitmap) -> u64 {
    now.iter().filter(|piece| !before.contains(*piece)).map(|piece| u64::from(geometry.piece_length(piece))).sum()
}

/// The URL of another blob of the same repository, for one that is asked for in the plain form.
fn sibling(url: &Uri, task: &TaskId) -> Option<Uri> {
    let (repository, _) = url.path().rsplit_once("/blobs/")?;
    let mut parts = url.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(format!("{repository}/blobs/{}", task.digest())).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use darter_tracker::Digest;

    #[test]
    fn a_sibling_is_another_blob_of_the_same_repository() {
        let task = TaskId::blob(Digest::Sha256([7; 32]));
        let url: Uri = "https://r.example:5000/v2/a/blobs/b/blobs/sha256:00?x=y".parse().unwrap();
        let expected = format!("https://r.example:5000/v2/a/blobs/b/blobs/{}", Digest::Sha256([7; 32]));
        assert_eq!(sibling(&url, &task).unwrap().to_string(), expected);
        assert_eq!(sibling(&"https://r.example/v2/a".parse().unwrap(), &task), None);
    }
}
