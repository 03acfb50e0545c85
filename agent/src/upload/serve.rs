//! Takes the streams that peers open, and serves each in a task of its own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use darter_swarm::upload::{ACTIVE, OFFER_MAX, Step, Ticket, Uploads};
use darter_swarm::wire::{LineFrame, Offer, Open, PieceReply, SessionFrame, TurnReply};
use darter_tracker::{Added, NodeId, PieceIndex, TaskId};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::admin::metrics::Metrics;
use crate::gossip::tracker::HomeHandle;
use crate::net::{Incoming, NetError, Receiver, Sender, Stream, Transport};
use crate::pull::Flights;
use crate::store::{Blob, Outcome, Store, StoreError};

/// Streams that are served at a time; further ones wait in the transport. A stream costs some kilobytes, and the bytes
/// of pieces are bounded by [`ACTIVE`] and [`LINGERING_MAX`].
const STREAMS_MAX: usize = 4096;

/// A stream that has not said what it wants by then is dropped.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A piece that the other side has not taken by then is given up, so that nobody can hold a slot.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a peer that waits for its turn, and to which nothing else goes, is told so: well below the time after which it takes
/// this node for silent.
const QUEUED_EVERY: Duration = Duration::from_millis(300);

/// How often is looked whether something else has gone: so much later than that the peer may be told.
const QUEUED_LOOK: Duration = Duration::from_millis(100);

/// A peer from which nothing has come for this long, not even acknowledgements, takes no bytes: its upload goes on, and others
/// get its slot. Two that die would else keep everybody else from what only this node has until their connections end.
const SILENCE: Duration = Duration::from_millis(500);

/// Uploads to silent peers that go on beside those that have slots: with them they bound the bytes of pieces in memory.
const LINGERING_MAX: usize = 4 * ACTIVE;

/// How often that is looked at.
const PULSE: Duration = Duration::from_millis(100);

/// Turns of one line that are kept for pieces that were not asked for yet: as many as may leave at a time. Whoever asks for more
/// before he uses them loses the first.
const TURNS_PER_LINE: usize = ACTIVE;

/// A session with a finished holder is kept no longer than this without a word: it says nothing new anyway.
const SESSION_IDLE: Duration = Duration::from_secs(30);

/// Pairs of task and peer whose share is remembered, to serve the neediest first.
const SHARES_MAX: usize = 8192;

/// Serves peers.
pub struct Uploader {
    store: Arc<Store>,
    flights: Arc<Flights>,
    home: HomeHandle,
    metrics: Arc<Metrics>,
    desk: Mutex<Desk>,
    lingering: Semaphore,
}

/// Who is served and who waits. The lock is held for a look-up, never across an await.
#[derive(Default)]
struct Desk {
    uploads: Uploads,
    requests: BTreeMap<Ticket, Request>,
    /// Pieces given so far, per task and peer.
    shares: BTreeMap<(TaskId, NodeId), u32>,
}

/// Somebody who waits in line, was offered a turn, or is being served.
struct Request {
    peer: NodeId,
    task: TaskId,
    /// Tells that its turn has come.
    offer: Option<oneshot::Sender<()>>,
    /// Tells that what it has said is to be served, and who waits for that.
    serve: Option<oneshot::Sender<()>>,
    served: Option<oneshot::Receiver<()>>,
    /// Whether it has said which piece: then the turn is no longer that of the stream on which it was offered.
    taken: bool,
}

impl Desk {
    /// A peer wants a turn; tells when it has come. `None` is "busy".
    fn line_up(&mut self, peer: NodeId, task: TaskId, holds: u32) -> Option<(Ticket, oneshot::Receiver<()>)> {
        if self.shares.len() >= SHARES_MAX {
            self.shares.clear();
        }
        // Who claims to hold little is believed as far as it has got little from here.
        let given = self.shares.get(&(task, peer)).copied().unwrap_or(0);
        let (ticket, steps) = self.uploads.request(task, peer, holds.max(given))?;
        let ((offer, offered), (serve, served)) = (oneshot::channel(), oneshot::channel());
        let request =
            Request { peer, task, offer: Some(offer), serve: Some(serve), served: Some(served), taken: false };
        self.requests.insert(ticket, request);
        self.go_on(steps);
        Some((ticket, offered))
    }

    /// A peer uses a turn; tells when it is to be served. `None` if it is not its turn.
    fn take(&mut self, ticket: Ticket, peer: NodeId, task: TaskId) -> Option<oneshot::Receiver<()>> {
        let own = |request: &&mut Request| request.peer == peer && request.task == task && request.offer.is_none();
        let served = self.requests.get_mut(&ticket).filter(own)?.served.take()?;
        let request = self.requests.get_mut(&ticket)?;
        request.taken = true;
        let share = self.shares.entry((task, peer)).or_default();
        *share = share.saturating_add(1);
        let steps = self.uploads.take(ticket);
        self.go_on(steps);
        Some(served)
    }

    fn finish(&mut self, ticket: Ticket) {
        self.requests.remove(&ticket);
        let steps = self.uploads.finish(ticket);
        self.go_on(steps);
    }

    /// Tells those whom it concerns. One that went away meanwhile gives its turn up by itself.
    fn go_on(&mut self, steps: Vec<Step>) {
        for step in steps {
            let (Step::Offer(ticket) | Step::Serve(ticket)) = step;
            let Some(request) = self.requests.get_mut(&ticket) else { continue };
            let told = if matches!(step, Step::Offer(_)) { request.offer.take() } else { request.serve.take() };
            if let Some(told) = told {
                let _ = told.send(());
            }
        }
    }
}

/// A place in line or a slot for one upload, given up when dropped.
struct Slot {
    uploader: Arc<Uploader>,
    ticket: Ticket,
    /// Whether the peer has said which piece it wants.
    taken: bool,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.uploader.desk(|desk| {
            // Once the piece was named, the turn belongs to whoever serves it.
            if desk.requests.get(&self.ticket).is_some_and(|request| request.taken == self.taken) {
                desk.finish(self.ticket);
            }
        });
    }
}

impl Uploader {
    /// Serves what `store` holds and `flights` are getting, and passes tracker calls to `home`.
    #[must_use]
    pub fn new(store: Arc<Store>, flights: Arc<Flights>, home: HomeHandle, metrics: Arc<Metrics>) -> Arc<Self> {
        let uploader =
            Self { store, flights, home, metrics, desk: Mutex::default(), lingering: Semaphore::new(LINGERING_MAX) };
        uploader.show_slots();
        Arc::new(uploader)
    }

    /// Serves until `stopping`, then lets uploads finish for as long as `drain`.
    pub async fn run(self: Arc<Self>, transport: Transport, stopping: CancellationToken, drain: Duration) {
        let mut streams = JoinSet::new();
        let room = Arc::new(Semaphore::new(STREAMS_MAX));
        loop {
            // The semaphore is never closed.
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            tokio::select! {
                () = stopping.cancelled() => break,
                incoming = transport.accept() => {
                    let Some(incoming) = incoming else { break };
                    let (uploader, transport) = (self.clone(), transport.clone());
                    streams.spawn(async move {
                        let (peer, remote) = (incoming.peer, incoming.remote);
                        if let Err(error) = uploader.serve(incoming, &transport).await {
                            tracing::debug!(%peer, %remote, %error, "a peer's stream broke off");
                        }
                        drop(permit);
                    });
                    while streams.try_join_next().is_some() {}
                }
            }
        }
        // Sessions would stay open for as long as the other side likes: only uploads are waited for.
        let done =
            async { while self.desk(|desk| desk.uploads.active()) > 0 && streams.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(drain, done).await;
        streams.shutdown().await;
    }

    async fn serve(self: Arc<Self>, incoming: Incoming, transport: &Transport) -> Result<(), NetError> {
        let Incoming { peer, mut stream, .. } = incoming;
        let Ok(open) = tokio::time::timeout(OPEN_TIMEOUT, stream.receive::<Open>()).await else { return Ok(()) };
        match open? {
            None => Ok(()),
            Some(Open::Call(call)) => {
                let reply = self.home.call(peer, call).await;
                stream.send_last(&reply).await?;
                Ok(())
            }
            Some(Open::Session(offer)) => self.session(peer, offer, stream).await,
            Some(Open::Ask { task, holds }) => self.line(peer, task, holds, stream, transport).await,
            Some(Open::Piece { task, piece, ticket }) => {
                let upload = self.clone().piece(peer, task, piece, Ticket(ticket), stream, transport);
                // A timeout drops the stream, which tells the other side.
                tokio::time::timeout(UPLOAD_TIMEOUT, upload).await.unwrap_or(Ok(()))
            }
        }
    }

    async fn session(&self, peer: NodeId, offer: Offer, stream: Stream) -> Result<(), NetError> {
        let task = offer.task;
        let (sender, receiver) = stream.split();
        let Err((mut sender, mut receiver)) = self.flights.session(peer, offer, sender, receiver).await else {
            return Ok(());
        };
        // Nobody pulls it here: what is stored is offered, and nothing will be added.
        let ours = match self.store.find(&task) {
            Some(blob) if matches!(blob.state().borrow().outcome, Outcome::Complete | Outcome::Incomplete) => {
                crate::pull::own_offer(&blob, None)
            }
            _ => Offer { task, geometry: None, have: None, home: None },
        };
        let serving = ours.have.is_some();
        sender.send(&SessionFrame::Offer(ours)).await?;
        if serving {
            sender.send(&SessionFrame::Finished).await?;
        }
        sender.finish();
        while let Ok(frame) = tokio::time::timeout(SESSION_IDLE, receiver.receive::<SessionFrame>()).await {
            if frame?.is_none_or(|frame| frame == SessionFrame::Finished) {
                break;
            }
        }
        Ok(())
    }

    async fn piece(
        self: Arc<Self>,
        peer: NodeId,
        task: TaskId,
        piece: PieceIndex,
        ticket: Ticket,
        mut stream: Stream,
        transport: &Transport,
    ) -> Result<(), NetError> {
        let Some(slot) = self.slot(peer, task, ticket, &mut stream).await? else {
            stream.send_last(&PieceReply::Busy).await?;
            return Ok(());
        };
        let held = match self.store.find(&task) {
            Some(blob) => blob.piece(piece).await.map_err(|error| {
                tracing::debug!(%task, %error, "a piece is not served");
                // What cannot be read at this moment is not gone: the home would take it off its list.
                if matches!(error, StoreError::Unreadable { .. }) { PieceReply::Busy } else { PieceReply::NotHeld }
            }),
            None => Err(PieceReply::NotHeld),
        };
        let (proof, bytes) = match held {
            Ok(held) => held,
            Err(reply) => {
                stream.send_last(&reply).await?;
                return Ok(());
            }
        };
        let (length, way) = (bytes.len() as u32, stream.way());
        let since = Instant::now();
        // The slot is held until the bytes have left, so that it is the link that uploads take turns on.
        let sending = async {
            stream.send_last_with(&PieceReply::Piece { proof, length }, bytes).await?;
            stream.deliver().await?;
            // Before the slot goes to the next.
            self.gave(length, since.elapsed());
            Ok::<(), NetError>(())
        };
        // A stream that is dropped tells the other side.
        let Some(sent) = hold_while_alive(slot, &self.lingering, || transport.received(peer), sending).await else {
            return Ok(());
        };
        sent?;
        tracing::debug!(%task, piece = piece.0, %peer, "a piece was given");
        self.metrics.sent(way, u64::from(length));
        self.flights.uploaded(&task, piece);
        Ok(())
    }

    /// Takes note of how fast a piece has left, which decides how many may leave at a time.
    fn gave(&self, bytes: u32, took: Duration) {
        let gets = self.flights.rate();
        self.desk(|desk| desk.uploads.gave(bytes, took, gets));
        self.show_slots();
    }

    fn show_slots(&self) {
        let slots = self.desk(|desk| desk.uploads.slots());
        self.metrics.upload_slots.set(i64::try_from(slots).unwrap_or(i64::MAX));
    }

    /// Offers a peer one turn after the other, for as long as it asks for them.
    async fn line(
        self: Arc<Self>,
        peer: NodeId,
        task: TaskId,
        mut holds: u32,
        stream: Stream,
        transport: &Transport,
    ) -> Result<(), NetError> {
        let (mut sender, mut receiver) = stream.split();
        // The turns before: which piece is taken on them is said on other streams, and may be heard later than the next question.
        let mut before = VecDeque::new();
        loop {
            forget_stale(&mut before);
            let slot = match self.line_up(peer, task, holds) {
                Ok((slot, offered)) => {
                    if !wait_in_line(offered, (&mut sender, &mut receiver), &mut before, || transport.sent(peer))
                        .await?
                    {
                        return Ok(());
                    }
                    slot
                }
                Err(reply) => {
                    in_time(sender.send_last(&reply)).await?;
                    // What was offered before stays good.
                    if let Some((_, offered)) = before.back() {
                        tokio::time::sleep_until(*offered + OFFER_MAX).await;
                    }
                    return Ok(());
                }
            };
            let rather = Added(self.flights.rather(&task));
            in_time(sender.send(&TurnReply::Turn { ticket: slot.ticket.0, rather })).await?;
            before.push_back((slot, Instant::now()));
            if before.len() > TURNS_PER_LINE {
                before.pop_front();
            }
            holds = loop {
                // Nobody waits for one who does not say what it wants.
                match tokio::time::timeout(OFFER_MAX, receiver.receive()).await {
                    Ok(Ok(Some(LineFrame::Again { holds }))) => break holds,
                    Ok(Ok(Some(LineFrame::Pass))) => drop(before.pop_back()),
                    Ok(Ok(None)) | Err(_) => return Ok(()),
                    Ok(Err(error)) => return Err(error),
                }
            };
        }
    }

    /// Gives a peer a place in line, or the reason why it gets none.
    fn line_up(
        self: &Arc<Self>,
        peer: NodeId,
        task: TaskId,
        holds: u32,
    ) -> Result<(Slot, oneshot::Receiver<()>), TurnReply> {
        let held = |blob: Arc<Blob>| matches!(blob.state().borrow().outcome, Outcome::Complete | Outcome::Incomplete);
        if !self.store.find(&task).is_some_and(held) {
            return Err(TurnReply::NotHeld);
        }
        let (ticket, offered) = self.desk(|desk| desk.line_up(peer, task, holds)).ok_or(TurnReply::Busy)?;
        Ok((Slot { uploader: self.clone(), ticket, taken: false }, offered))
    }

    /// Waits until what a peer takes on its turn is to be served, and tells it so; `None` if it was not its turn.
    async fn slot(
        self: &Arc<Self>,
        peer: NodeId,
        task: TaskId,
        ticket: Ticket,
        stream: &mut Stream,
    ) -> Result<Option<Slot>, NetError> {
        let Some(mut served) = self.desk(|desk| desk.take(ticket, peer, task)) else { return Ok(None) };
        let slot = Slot { uploader: self.clone(), ticket, taken: true };
        loop {
            match tokio::time::timeout(QUEUED_EVERY, &mut served).await {
                Ok(granted) => return Ok(granted.ok().map(|()| slot)),
                Err(_) => stream.send(&PieceReply::Queued).await?,
            }
        }
    }

    fn desk<T>(&self, act: impl FnOnce(&mut Desk) -> T) -> T {
        act(&mut self.desk.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Waits until it is a peer's turn, and tells it now and then that it waits still; `false` if it does not any more. The turns
/// `before` are given up when their time is over. `sent` counts what goes to the peer.
async fn wait_in_line(
    mut offered: oneshot::Receiver<()>,
    (sender, receiver): (&mut Sender, &mut Receiver),
    before: &mut VecDeque<(Slot, Instant)>,
    sent: impl Fn() -> u64,
) -> Result<bool, NetError> {
    let (mut count, mut since) = (sent(), Instant::now());
    loop {
        tokio::select! {
            turn = &mut offered => return Ok(turn.is_ok()),
            // Who waits says nothing, but leaves.
            _ = receiver.receive::<LineFrame>() => return Ok(false),
            () = tokio::time::sleep(QUEUED_LOOK) => {
                forget_stale(before);
                // Whatever goes to the peer shows that this node is alive: one word for all that it waits for.
                if std::mem::replace(&mut count, sent()) < count {
                    since = Instant::now();
                } else if since.elapsed() >= QUEUED_EVERY {
                    in_time(sender.send(&TurnReply::Queued)).await?;
                    since = Instant::now();
                }
            }
        }
    }
}

/// Gives up turns whose time is over.
fn forget_stale(before: &mut VecDeque<(Slot, Instant)>) {
    before.retain(|(_, offered)| offered.elapsed() < OFFER_MAX);
}

/// What a peer does not let in for as long as a turn is kept is not waited for: its turns are others'.
async fn in_time(said: impl Future<Output = Result<(), NetError>>) -> Result<(), NetError> {
    tokio::time::timeout(OFFER_MAX, said).await.unwrap_or(Err(NetError::Silent))
}

/// Carries an upload through, and gives its slot up as soon as the peer is silent; `None` if it is given up, as too many linger
/// in that way. `received` counts what comes from the peer.
async fn hold_while_alive<S, T>(
    slot: S,
    lingering: &Semaphore,
    received: impl Fn() -> u64,
    sending: impl Future<Output = T>,
) -> Option<T> {
    let mut sending = std::pin::pin!(sending);
    let mut slot = Some(slot);
    let mut lingers = None;
    let (mut before, mut heard) = (received(), Instant::now());
    loop {
        if let Ok(sent) = tokio::time::timeout(PULSE, &mut sending).await {
            drop(lingers);
            return Some(sent);
        }
        let packets = received();
        if packets != before {
            (before, heard) = (packets, Instant::now());
        } else if slot.is_some() && heard.elapsed() >= SILENCE {
            slot = None;
            // Its bytes are held on; where too many are, it is given up.
            lingers = Some(lingering.try_acquire().ok()?);
        }
    }
}

impl std::fmt::Debug for Uploader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploader").field("active", &self.desk(|desk| desk.uploads.active())).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn uploads_to_the_silent_are_bounded() {
        let begin = Instant::now();
        let never = std::future::pending::<()>();
        assert_eq!(hold_while_alive((), &Semaphore::new(0), || 0, never).await, None);
        assert!(begin.elapsed() <= SILENCE + 2 * PULSE, "it is given up at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_loses_its_slot_and_not_its_upload() {
        let slot = Arc::new(());
        let packets = Cell::new(0);
        let begin = Instant::now();
        let sending = tokio::time::sleep(Duration::from_secs(5));
        let lingering = Semaphore::new(1);
        let upload = hold_while_alive(slot.clone(), &lingering, || packets.get(), sending);
        let watch = async {
            // Alive for two seconds, then silent.
            while begin.elapsed() < Duration::from_secs(2) {
                packets.set(packets.get() + 1);
                assert_eq!(Arc::strong_count(&slot), 2, "the slot is held");
                tokio::time::sleep(PULSE).await;
            }
            tokio::time::sleep(SILENCE + 2 * PULSE).await;
            assert_eq!(Arc::strong_count(&slot), 1, "others have the slot");
        };
        let (sent, ()) = tokio::join!(upload, watch);
        assert!(sent.is_some());
        assert_eq!(begin.elapsed().as_secs(), 5, "what was being sent was carried through");
    }
}
