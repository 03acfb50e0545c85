//! What bytes take: every node has a way out and a way in, each with its rate; the registry has a way out.
//!
//! A flow is cut into chunks. A way out gives its flows one chunk in turn; a way in takes chunks as they come. A flow has few
//! chunks on the way, so one whose receiver is busy leaves the sender's time to others.

use std::collections::VecDeque;

use darter_swarm::task::RunId;
use darter_swarm::upload::Ticket;
use darter_tracker::PieceIndex;

use super::agenda::{Nanos, SECOND};

/// Chunks of a flow that are on the way at a time, beside what the wire itself holds: one that leaves, one that arrives, one more.
const WINDOW: u64 = 3;

/// A chunk is a piece's eighth, within these bounds: small enough that a piece is not held up by whole others, large enough
/// that a run of ten thousand nodes has few of them.
const CHUNKS_PER_PIECE: u64 = 8;
const CHUNK_MIN: u64 = 16 * 1024;
const CHUNK_MAX: u64 = 256 * 1024;

/// Names a flow among all that there have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowId {
    slot: u32,
    generation: u32,
}

/// What a flow carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cargo {
    /// A piece from a peer.
    Piece {
        /// The layer's number.
        layer: u16,
        /// The piece.
        piece: PieceIndex,
        /// The sender's name for it.
        ticket: Ticket,
    },
    /// A response of the registry.
    Run {
        /// The layer's number.
        layer: u16,
        /// The receiver's name for it.
        run: RunId,
    },
}

/// Bytes on their way from one place to another.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Where they come from.
    pub from: u32,
    /// Where they go.
    pub to: u32,
    /// What they are.
    pub cargo: Cargo,
    /// How many may be sent by now.
    pub allowed: u64,
    /// How many were sent.
    pub sent: u64,
    /// How many have arrived.
    pub received: u64,
    waiting: bool,
}

#[derive(Default)]
struct Out {
    bits_per_second: u64,
    turns: VecDeque<FlowId>,
    sending: Option<(FlowId, u64)>,
    stopped: bool,
}

struct In {
    bits_per_second: u64,
    free_at: Nanos,
}

/// All ways and flows.
pub struct Links {
    outs: Vec<Out>,
    ins: Vec<In>,
    flows: Vec<(u32, Option<Flow>)>,
    free: Vec<u32>,
    chunk: u64,
    /// Bytes of a flow that are on the way at a time.
    window: u64,
}

/// What a way out has to do next.
pub struct Sending {
    /// When the chunk has left.
    pub until: Nanos,
}

/// A chunk that has left.
pub struct Left {
    /// Whose.
    pub flow: FlowId,
    /// How many bytes.
    pub bytes: u64,
    /// When it has arrived.
    pub arrives: Nanos,
}

impl Links {
    /// Links without nodes, for pieces of this size, whose wire holds so many bytes in each direction.
    #[must_use]
    pub fn new(piece_bytes: u64, wire_bytes: u64) -> Self {
        let chunk = (piece_bytes / CHUNKS_PER_PIECE).clamp(CHUNK_MIN, CHUNK_MAX);
        let window = WINDOW * chunk + wire_bytes;
        Self { outs: Vec::new(), ins: Vec::new(), flows: Vec::new(), free: Vec::new(), chunk, window }
    }

    /// Adds a place, and returns its number.
    pub fn add(&mut self, out_bits_per_second: u64, in_bits_per_second: u64) -> u32 {
        self.outs.push(Out { bits_per_second: out_bits_per_second, ..Out::default() });
        self.ins.push(In { bits_per_second: in_bits_per_second, free_at: 0 });
        (self.outs.len() - 1) as u32
    }

    /// Begins a flow of which `allowed` bytes may be sent.
    pub fn open(&mut self, from: u32, to: u32, allowed: u64, cargo: Cargo) -> FlowId {
        let flow = Flow { from, to, cargo, allowed: 0, sent: 0, received: 0, waiting: false };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flows.push((0, None));
            (self.flows.len() - 1) as u32
        });
        let entry = &mut self.flows[slot as usize];
        entry.1 = Some(flow);
        let id = FlowId { slot, generation: entry.0 };
        self.allow(id, allowed);
        id
    }

    /// Lets a flow send up to `allowed` bytes.
    pub fn allow(&mut self, id: FlowId, allowed: u64) {
        if let Some(flow) = self.flow_mut(id) {
            flow.allowed = flow.allowed.max(allowed);
        }
        self.line_up(id);
    }

    /// A flow, unless it is over.
    #[must_use]
    pub fn flow(&self, id: FlowId) -> Option<&Flow> {
        self.flows.get(id.slot as usize).filter(|(generation, _)| *generation == id.generation)?.1.as_ref()
    }

    fn flow_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.flows.get_mut(id.slot as usize).filter(|(generation, _)| *generation == id.generation)?.1.as_mut()
    }

    /// Ends a flow. What is on its way is lost.
    pub fn close(&mut self, id: FlowId) -> Option<Flow> {
        let entry = self.flows.get_mut(id.slot as usize).filter(|(generation, _)| *generation == id.generation)?;
        let flow = entry.1.take()?;
        entry.0 = entry.0.wrapping_add(1);
        self.free.push(id.slot);
        Some(flow)
    }

    /// The flows from or to a place.
    pub fn of(&self, place: u32) -> Vec<FlowId> {
        let all = self.flows.iter().zip(0u32..);
        let live = all
            .filter_map(|((generation, flow), slot)| Some((FlowId { slot, generation: *generation }, flow.as_ref()?)));
        live.filter(|(_, flow)| flow.from == place || flow.to == place).map(|(id, _)| id).collect()
    }

    /// Nothing leaves a place while it is stopped.
    pub fn stop(&mut self, place: u32, stopped: bool) {
        self.outs[place as usize].stopped = stopped;
    }

    /// Lets the way out of `place` begin with its next chunk, if it is idle and has one.
    pub fn begin(&mut self, place: u32, now: Nanos) -> Option<Sending> {
        if self.outs[place as usize].sending.is_some() || self.outs[place as usize].stopped {
            return None;
        }
        loop {
            let id = self.outs[place as usize].turns.pop_front()?;
            let (chunk, window) = (self.chunk, self.window);
            let Some(flow) = self.flow_mut(id) else { continue };
            flow.waiting = false;
            if !can_send(flow, window) {
                continue;
            }
            let bytes = chunk.min(flow.allowed - flow.sent);
            let out = &mut self.outs[place as usize];
            out.sending = Some((id, bytes));
            return Some(Sending { until: now + takes(bytes, out.bits_per_second) });
        }
    }

    /// The chunk that `place` was sending has left; `None` if its flow is over.
    pub fn left(&mut self, place: u32, latency: Nanos, now: Nanos) -> Option<Left> {
        let (id, bytes) = self.outs[place as usize].sending.take()?;
        let flow = self.flow_mut(id)?;
        flow.sent += bytes;
        let to = flow.to as usize;
        self.line_up(id);
        let way = &mut self.ins[to];
        way.free_at = way.free_at.max(now + latency) + takes(bytes, way.bits_per_second);
        Some(Left { flow: id, bytes, arrives: way.free_at })
    }

    /// A chunk has arrived; returns the flow as it is now, unless it is over.
    pub fn arrived(&mut self, id: FlowId, bytes: u64) -> Option<Flow> {
        let flow = self.flow_mut(id)?;
        flow.received += bytes;
        let flow = *flow;
        self.line_up(id);
        Some(flow)
    }

    fn line_up(&mut self, id: FlowId) {
        let window = self.window;
        let Some(flow) = self.flow_mut(id) else { return };
        if can_send(flow, window) && !std::mem::replace(&mut flow.waiting, true) {
            let from = flow.from as usize;
            self.outs[from].turns.push_back(id);
        }
    }
}

fn can_send(flow: &Flow, window: u64) -> bool {
    flow.sent < flow.allowed && flow.sent - flow.received < window
}

/// How long so many bytes take at this rate.
#[must_use]
pub fn takes(bytes: u64, bits_per_second: u64) -> Nanos {
    (u128::from(bytes) * 8 * u128::from(SECOND) / u128::from(bits_per_second.max(1))) as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Carries every flow through and tells when each has arrived whole.
    fn carry(links: &mut Links, places: u32, flows: &[(FlowId, u64)]) -> Vec<Nanos> {
        let mut events = std::collections::BTreeMap::new();
        let mut done = vec![0; flows.len()];
        let (mut now, mut number) = (0, 0);
        loop {
            for place in 0..places {
                if let Some(sending) = links.begin(place, now) {
                    number += 1;
                    events.insert((sending.until, number), (place, None));
                }
            }
            let Some(((at, _), (place, chunk))) = events.pop_first() else { return done };
            now = at;
            match chunk {
                None => {
                    let left = links.left(place, 0, now).expect("no flow is closed");
                    number += 1;
                    events.insert((left.arrives, number), (place, Some((left.flow, left.bytes))));
                }
                Some((id, bytes)) => {
                    let flow = links.arrived(id, bytes).expect("no flow is closed");
                    let at = flows.iter().position(|(other, _)| *other == id).expect("it is known");
                    if flow.received == flows[at].1 {
                        done[at] = now;
                    }
                }
            }
        }
    }

    #[test]
    fn a_full_receiver_leaves_the_senders_time_to_others() {
        const MIB: u64 = 1 << 20;
        let mut links = Links::new(MIB, 0);
        // 8 Mb/s are a byte per microsecond.
        let fast = links.add(8_000_000, 8_000_000);
        let slow = links.add(8_000_000, 800_000);
        let other = links.add(8_000_000, 8_000_000);
        let cargo = Cargo::Run { layer: 0, run: RunId(1) };
        let flows = [(links.open(fast, slow, MIB, cargo), MIB), (links.open(fast, other, 8 * MIB, cargo), 8 * MIB)];
        let done = carry(&mut links, 3, &flows);
        // The slow one takes a tenth of the sender's rate, the other nearly all that is left.
        let (alone, both) = (takes(MIB, 800_000), takes(8 * MIB, 8_000_000) * 10 / 9);
        assert!(done[0] >= alone && done[0] < alone * 11 / 10, "{done:?}");
        assert!(done[1] < both * 11 / 10, "{done:?} {both}");
    }

    #[test]
    fn flows_of_one_sender_take_turns() {
        const MIB: u64 = 1 << 20;
        let mut links = Links::new(MIB, 0);
        let from = links.add(8_000_000, 8_000_000);
        let cargo = Cargo::Run { layer: 0, run: RunId(1) };
        let flows: Vec<_> = (0..4)
            .map(|_| {
                let to = links.add(8_000_000, 8_000_000);
                (links.open(from, to, MIB, cargo), MIB)
            })
            .collect();
        let done = carry(&mut links, 5, &flows);
        let all = takes(4 * MIB, 8_000_000);
        assert!(done.iter().all(|at| *at > all * 9 / 10), "nobody is done long before the others: {done:?}");
    }
}
