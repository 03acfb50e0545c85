//! Which custom events are believed, handled and passed on.
//!
//! An event travels as a version byte and the signed event in postcard. What this version does not understand is
//! skipped, never passed on: nobody could tell whether its author said it. Each author has one register per task for
//! what it holds (Start, Progress and Remove replace each other), one for the length, one for Recover; the last writer
//! by (epoch, sequence) wins, and what is not newer is dropped before its signature costs anything.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use darter_tracker::{Event, EventBody, NodeId, TaskId};

use super::identity::Identity;
use crate::identity::{ClusterKeys, SignedEvent};
use crate::recent::Recent;

/// Bytes of an encoded event, at the most: the largest fits beside SWIM's own traffic in one datagram, where foca
/// would silently never send it otherwise.
pub const EVENT_BYTES_MAX: usize = 400;

/// Registers remembered, about 200 bytes each: what the cluster says in ten minutes at the rate that gossip carries.
/// One that is forgotten while its event still travels is handled twice, which is harmless.
const SEEN_MAX: usize = 16_384;

const VERSION: u8 = 1;

/// What an event is about: events of one subject replace each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Subject {
    author: NodeId,
    register: Register,
    task: Option<TaskId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Register {
    Holding,
    Length,
    Recover,
}

impl Subject {
    fn of(event: &Event) -> Self {
        let (register, task) = match event.body {
            EventBody::Start { task } | EventBody::Progress { task, .. } | EventBody::Remove { task } => {
                (Register::Holding, Some(task))
            }
            EventBody::Length { task, .. } => (Register::Length, Some(task)),
            EventBody::Recover { task } => (Register::Recover, task),
        };
        Self { author: event.author, register, task }
    }
}

/// An event's place among those that replace each other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    subject: Subject,
    version: (u64, u64),
}

impl foca::Invalidates for Slot {
    fn invalidates(&self, other: &Self) -> bool {
        self.subject == other.subject && self.version >= other.version
    }
}

/// An event as it travels; `None` if it is longer than [`EVENT_BYTES_MAX`].
pub(super) fn encode(event: &SignedEvent) -> Option<Vec<u8>> {
    let bytes = postcard::to_extend(event, vec![VERSION]).ok()?;
    (bytes.len() <= EVENT_BYTES_MAX).then_some(bytes)
}

fn decode(bytes: &[u8]) -> Option<SignedEvent> {
    if bytes.len() > EVENT_BYTES_MAX {
        return None;
    }
    match bytes.split_first()? {
        (&VERSION, rest) => match postcard::take_from_bytes(rest) {
            Ok((event, [])) => Some(event),
            _ => None,
        },
        _ => None,
    }
}

/// Events of one datagram: 1200 bytes hold eight of the smallest.
pub(super) const ACCEPTED_MAX: usize = 32;

/// foca's door for events. What passes is sent to the owner of the receiving end, who drains it after every call.
pub(super) struct Relay {
    keys: Arc<ClusterKeys>,
    me: NodeId,
    seen: Recent<Subject, (u64, u64)>,
    accepted: mpsc::SyncSender<SignedEvent>,
    /// Set while too much is waiting to be sent: events are handled, but no longer passed on.
    congested: Arc<AtomicBool>,
}

impl Relay {
    pub(super) fn new(
        keys: Arc<ClusterKeys>,
        me: NodeId,
        accepted: mpsc::SyncSender<SignedEvent>,
        congested: Arc<AtomicBool>,
    ) -> Self {
        Self { keys, me, seen: Recent::new(SEEN_MAX), accepted, congested }
    }

    fn receive(&mut self, data: &[u8], own: bool) -> Option<Slot> {
        let signed = decode(data)?;
        let subject = Subject::of(&signed.event);
        let version = (signed.event.epoch, signed.event.sequence);
        if !own && signed.event.author == self.me {
            return None;
        }
        if self.seen.get_mut(&subject).is_some_and(|seen| *seen >= version) {
            return None;
        }
        if !own && signed.verify(&self.keys).is_err() {
            return None;
        }
        self.seen.insert(subject, version);
        if own {
            return Some(Slot { subject, version });
        }
        // The owner drains it after every datagram, which carries no more than fits; the receiving end lives as long.
        let _ = self.accepted.try_send(signed);
        (!self.congested.load(Ordering::Relaxed)).then_some(Slot { subject, version })
    }
}

impl foca::BroadcastHandler<Identity> for Relay {
    type Key = Slot;
    type Error = Infallible;

    fn receive_item(&mut self, data: &[u8], sender: Option<&Identity>) -> Result<Option<Slot>, Infallible> {
        Ok(self.receive(data, sender.is_none()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::identity::NodeKey;
    use darter_tracker::{Digest, Geometry, PieceSize};

    fn relay(keys: &Arc<ClusterKeys>) -> (Relay, mpsc::Receiver<SignedEvent>) {
        let (accepted, events) = mpsc::sync_channel(ACCEPTED_MAX);
        (Relay::new(keys.clone(), NodeId::from_bytes([0; 16]), accepted, Arc::default()), events)
    }

    fn event(node: &NodeKey, sequence: u64, body: EventBody) -> Event {
        Event { author: node.id(), epoch: node.signer().epoch, sequence, body }
    }

    #[test]
    fn the_largest_event_fits() {
        let keys = ClusterKeys::new("lab", &[[1; 32]]).unwrap();
        let node = NodeKey::new(&keys, &[2; 32], u64::MAX).unwrap();
        let geometry = Geometry::new(1 << 38, PieceSize::new(1 << 24).unwrap()).unwrap();
        let body = EventBody::Length { task: TaskId::blob(Digest::Sha512([255; 64])), geometry };
        let bytes = encode(&node.sign_event(event(&node, u64::MAX, body))).unwrap();
        assert!(bytes.len() < EVENT_BYTES_MAX, "{}", bytes.len());
        assert!(decode(&bytes).is_some());
    }

    #[test]
    fn only_new_and_signed_events_pass() {
        let keys = Arc::new(ClusterKeys::new("lab", &[[1; 32]]).unwrap());
        let node = NodeKey::new(&keys, &[2; 32], 5).unwrap();
        let task = TaskId::blob(Digest::Sha256([7; 32]));
        let start = encode(&node.sign_event(event(&node, 1, EventBody::Start { task }))).unwrap();
        let progress = encode(&node.sign_event(event(&node, 2, EventBody::Progress { task, quarters: 4 }))).unwrap();
        let (mut relay, events) = relay(&keys);

        assert!(relay.receive(&progress, false).is_some());
        assert!(relay.receive(&progress, false).is_none(), "seen");
        assert!(relay.receive(&start, false).is_none(), "overtaken");
        assert_eq!(events.try_iter().count(), 1);

        let outsiders = ClusterKeys::new("lab", &[[9; 32]]).unwrap();
        let outsider = NodeKey::new(&outsiders, &[3; 32], 5).unwrap();
        let foreign = encode(&outsider.sign_event(event(&outsider, 1, EventBody::Start { task }))).unwrap();
        assert!(relay.receive(&foreign, false).is_none(), "not a member's");
        let mut version = start.clone();
        version[0] = 2;
        assert!(relay.receive(&version, false).is_none(), "another version");
        for at in 0..start.len() {
            let mut damaged = start.clone();
            damaged[at] ^= 1;
            assert!(relay.receive(&damaged, false).is_none());
        }
        assert_eq!(events.try_iter().count(), 0);
    }

    #[test]
    fn a_congested_relay_handles_but_does_not_pass_on() {
        let keys = Arc::new(ClusterKeys::new("lab", &[[1; 32]]).unwrap());
        let node = NodeKey::new(&keys, &[2; 32], 5).unwrap();
        let (mut relay, events) = relay(&keys);
        relay.congested.store(true, Ordering::Relaxed);
        let bytes = encode(&node.sign_event(event(&node, 1, EventBody::Recover { task: None }))).unwrap();
        assert!(relay.receive(&bytes, false).is_none());
        assert_eq!(events.try_iter().count(), 1);
    }
}
