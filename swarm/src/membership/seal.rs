//! Sealed datagrams: what gossip sends is readable and believable to members only, and only once.
//!
//! ```text
//! version 1 | kind 1 | key id 4 | salt 16 | counter 8 | AES-256-GCM ciphertext | tag 16
//! ```
//!
//! The header is authenticated with the rest. The key comes from a secret of the ring and the salt, which is random
//! and made at each start; the counter is the nonce and, at the receiver, the place in the replay window.
//!
//! A recording of an earlier run has an old salt, so an unknown salt must answer a challenge before its words change
//! anything: its first datagrams are held, the sender is asked to seal a fresh nonce under the same salt, and what is
//! held is delivered when he does. Answering needs no trust in who asks, so two sides that do not know each other
//! converge. A lost challenge is sent again when the next datagram arrives.
//!
//! Not here: sockets, clocks and randomness; source addresses, which prove nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use rand::RngExt;

use super::replay::ReplayWindow;
use crate::identity::{ClusterKeys, KeyId};
use crate::recent::Recent;

/// Bytes of a whole datagram, at the most: it passes every path with an MTU of 1280 unfragmented.
pub const DATAGRAM_BYTES_MAX: usize = 1200;
/// Bytes that sealing adds.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// Bytes that fit into one datagram.
pub const PLAINTEXT_BYTES_MAX: usize = DATAGRAM_BYTES_MAX - OVERHEAD_BYTES;

/// Salts whose replay windows are kept: a cluster of 2000 members that all restarted once. About 1 KiB each. The least
/// recently heard one is forgotten and would be challenged again.
const KNOWN_SALTS_MAX: usize = 4096;
/// Salts that are being challenged: a cold start of 1000 members through one seed. The oldest is forgotten.
const PENDING_SALTS_MAX: usize = 1024;
/// Datagrams held for one unknown salt: what a newcomer sends in one round trip. More are dropped, as SWIM repeats
/// itself. With the bound above, 4.6 MiB in all.
const HELD_PER_SALT_MAX: usize = 4;
/// How soon a challenge that was not answered is sent again.
const CHALLENGE_AGAIN: Duration = Duration::from_millis(100);
/// How long a challenge may be answered and datagrams are held: beyond that a probe is stale.
const PENDING_FOR: Duration = Duration::from_secs(3);

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 1 + 1 + 4 + SALT_BYTES + 8;
const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 16;
const TAG_BYTES: usize = 16;

/// Why a datagram was dropped. Nothing changed but what is counted; the sender need not be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// Too short, too long, another version, an unknown kind, or not what its kind must hold.
    #[error("malformed")]
    Malformed,
    /// Sealed under a secret that is not in the ring: another cluster, or a secret that was rotated away.
    #[error("sealed under the unknown key {:08x}", u32::from_be_bytes(.0.0))]
    OtherCluster(KeyId),
    /// It names one of our secrets but does not open under it.
    #[error("forged or damaged")]
    Forged,
    /// Seen before, too old to tell, or an answer to no question of ours.
    #[error("replayed")]
    Replayed,
    /// The sender's salt is not proven yet and enough of its datagrams are held.
    #[error("too many datagrams are held")]
    Full,
}

/// Why nothing was sealed. The caller's state is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The plaintext does not fit; the caller's mistake.
    #[error("{0} bytes do not fit into a datagram")]
    TooLong(usize),
    /// The counter of this salt is used up, or the crypto library failed; only a new [`Sealer`] helps.
    #[error("the key cannot be used any more")]
    Exhausted,
}

/// What came of a received datagram.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Plaintexts from a proven sender, oldest first; may be none, when the datagram served the sealing itself.
    Deliver(Vec<Vec<u8>>),
    /// Send this datagram back to where the other came from.
    Reply(Vec<u8>),
    /// Kept until its sender answers the challenge that is under way.
    Held,
    /// Dropped.
    Drop(DropReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data = 1,
    Challenge = 2,
    Answer = 3,
}

/// A secret and a salt: one run of one sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Source {
    key_id: KeyId,
    salt: [u8; SALT_BYTES],
}

struct Header {
    kind: Kind,
    source: Source,
    counter: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = VERSION;
        bytes[1] = self.kind as u8;
        bytes[2..6].copy_from_slice(&self.source.key_id.0);
        bytes[6..22].copy_from_slice(&self.source.salt);
        bytes[22..].copy_from_slice(&self.counter.to_be_bytes());
        bytes
    }

    fn parse(datagram: &[u8]) -> Option<(Self, &[u8])> {
        if datagram.len() > DATAGRAM_BYTES_MAX || datagram.len() < OVERHEAD_BYTES {
            return None;
        }
        let (header, sealed) = datagram.split_first_chunk::<HEADER_BYTES>()?;
        let kind = match (header[0], header[1]) {
            (VERSION, 1) => Kind::Data,
            (VERSION, 2) => Kind::Challenge,
            (VERSION, 3) => Kind::Answer,
            _ => return None,
        };
        let source = Source { key_id: KeyId(header[2..6].try_into().ok()?), salt: header[6..22].try_into().ok()? };
        Some((Self { kind, source, counter: u64::from_be_bytes(header[22..].try_into().ok()?) }, sealed))
    }

    fn open(&self, key: &LessSafeKey, sealed: &[u8]) -> Option<Vec<u8>> {
        let mut buffer = sealed.to_vec();
        let length = key.open_in_place(nonce(self.counter), Aad::from(self.encode()), &mut buffer).ok()?.len();
        buffer.truncate(length);
        Some(buffer)
    }
}

/// Unique under one key as the counter never repeats.
fn nonce(counter: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[4..].copy_from_slice(&counter.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Seals what this node sends, all of it under one salt.
pub struct Sealer {
    source: Source,
    key: LessSafeKey,
    counter: u64,
}

impl Sealer {
    /// A sealer under the ring's sending secret. `salt` must be random and never used before.
    ///
    /// Returns `None` only if the crypto library refuses the key.
    #[must_use]
    pub fn new(keys: &ClusterKeys, salt: [u8; SALT_BYTES]) -> Option<Self> {
        let key_id = keys.sending();
        let key = keys.datagram_key(key_id, &salt)?;
        Some(Self { source: Source { key_id, salt }, key, counter: 0 })
    }

    /// Seals a plaintext of at most [`PLAINTEXT_BYTES_MAX`] bytes.
    ///
    /// # Errors
    /// If it is longer, or the key is used up.
    pub fn seal(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
        self.seal_as(Kind::Data, plaintext)
    }

    fn seal_as(&mut self, kind: Kind, plaintext: &[u8]) -> Result<Vec<u8>, SealError> {
        if plaintext.len() > PLAINTEXT_BYTES_MAX {
            return Err(SealError::TooLong(plaintext.len()));
        }
        let counter = self.counter.checked_add(1).ok_or(SealError::Exhausted)?;
        let header = Header { kind, source: self.source, counter }.encode();
        let mut datagram = Vec::with_capacity(plaintext.len() + OVERHEAD_BYTES);
        datagram.extend_from_slice(&header);
        datagram.extend_from_slice(plaintext);
        let sealed =
            self.key.seal_in_place_separate_tag(nonce(counter), Aad::from(header), &mut datagram[HEADER_BYTES..]);
        datagram.extend_from_slice(sealed.map_err(|_| SealError::Exhausted)?.as_ref());
        self.counter = counter;
        Ok(datagram)
    }
}

/// A salt that has proven to belong to a running member.
struct Known {
    key: LessSafeKey,
    window: ReplayWindow,
}

/// A salt that is being challenged.
struct Pending {
    key: LessSafeKey,
    nonce: [u8; NONCE_BYTES],
    since: Instant,
    asked: Instant,
    held: Vec<(u64, Vec<u8>)>,
}

/// Opens what this node receives.
pub struct Opener {
    keys: Arc<ClusterKeys>,
    known: Recent<Source, Known>,
    pending: Recent<Source, Pending>,
}

impl Opener {
    /// An opener that knows no salt yet.
    #[must_use]
    pub fn new(keys: Arc<ClusterKeys>) -> Self {
        Self { keys, known: Recent::new(KNOWN_SALTS_MAX), pending: Recent::new(PENDING_SALTS_MAX) }
    }

    /// Takes a datagram in. `sealer` makes challenges and answers, `rng` their nonces.
    pub fn handle(&mut self, now: Instant, datagram: &[u8], sealer: &mut Sealer, rng: &mut impl RngExt) -> Outcome {
        let Some((header, sealed)) = Header::parse(datagram) else {
            return Outcome::Drop(DropReason::Malformed);
        };
        if header.source == sealer.source {
            return Outcome::Drop(DropReason::Replayed);
        }
        if let Some(known) = self.known.get_mut(&header.source) {
            if !known.window.is_fresh(header.counter) {
                return Outcome::Drop(DropReason::Replayed);
            }
            let Some(plaintext) = header.open(&known.key, sealed) else {
                return Outcome::Drop(DropReason::Forged);
            };
            known.window.mark(header.counter);
            return match header.kind {
                Kind::Data => Outcome::Deliver(vec![plaintext]),
                Kind::Challenge => answer(&plaintext, sealer),
                // A second answer, because the challenge was sent twice.
                Kind::Answer => Outcome::Deliver(Vec::new()),
            };
        }
        self.handle_unknown(now, &header, sealed, sealer, rng)
    }

    fn handle_unknown(
        &mut self,
        now: Instant,
        header: &Header,
        sealed: &[u8],
        sealer: &mut Sealer,
        rng: &mut impl RngExt,
    ) -> Outcome {
        let opened = match self.pending.peek(&header.source) {
            Some(pending) => header.open(&pending.key, sealed).map(|plaintext| (plaintext, None)),
            None => match self.keys.datagram_key(header.source.key_id, &header.source.salt) {
                Some(key) => header.open(&key, sealed).map(|plaintext| (plaintext, Some(key))),
                None => return Outcome::Drop(DropReason::OtherCluster(header.source.key_id)),
            },
        };
        let Some((plaintext, new_key)) = opened else {
            return Outcome::Drop(DropReason::Forged);
        };
        match header.kind {
            Kind::Data => self.hold(now, header, plaintext, new_key, sealer, rng),
            Kind::Challenge => answer(&plaintext, sealer),
            Kind::Answer => self.prove(now, header, &plaintext),
        }
    }

    /// Keeps an authentic datagram of a salt that may be a recording, and asks its sender for a sign of life.
    fn hold(
        &mut self,
        now: Instant,
        header: &Header,
        plaintext: Vec<u8>,
        new_key: Option<LessSafeKey>,
        sealer: &mut Sealer,
        rng: &mut impl RngExt,
    ) -> Outcome {
        let source = header.source;
        let expired = |pending: &Pending| now.duration_since(pending.since) >= PENDING_FOR;
        let key = match new_key {
            Some(key) => Some(key),
            None if self.pending.peek(&source).is_some_and(expired) => self.pending.remove(&source).map(|old| old.key),
            None => None,
        };
        if let Some(key) = key {
            let held = vec![(header.counter, plaintext)];
            let nonce = rng.random();
            self.pending.insert(source, Pending { key, nonce, since: now, asked: now, held });
            return challenge(&source, &nonce, sealer);
        }
        let Some(pending) = self.pending.get_mut(&source) else {
            return Outcome::Drop(DropReason::Full);
        };
        if pending.held.iter().any(|(counter, _)| *counter == header.counter) {
            return Outcome::Drop(DropReason::Replayed);
        }
        let full = pending.held.len() >= HELD_PER_SALT_MAX;
        if !full {
            pending.held.push((header.counter, plaintext));
        }
        if now.duration_since(pending.asked) >= CHALLENGE_AGAIN {
            pending.asked = now;
            let nonce = pending.nonce;
            return challenge(&source, &nonce, sealer);
        }
        if full { Outcome::Drop(DropReason::Full) } else { Outcome::Held }
    }

    /// Admits a salt that sealed our nonce. The window starts at the answer, which is newer than any recording.
    fn prove(&mut self, now: Instant, header: &Header, plaintext: &[u8]) -> Outcome {
        let expected = self.pending.peek(&header.source).is_some_and(|pending| {
            pending.nonce.as_slice() == plaintext && now.duration_since(pending.since) < PENDING_FOR
        });
        if !expected {
            return Outcome::Drop(DropReason::Replayed);
        }
        let Some(Pending { key, mut held, .. }) = self.pending.remove(&header.source) else {
            return Outcome::Drop(DropReason::Replayed);
        };
        let mut window = ReplayWindow::starting_at(header.counter);
        held.sort_by_key(|(counter, _)| *counter);
        held.retain(|(counter, _)| window.mark(*counter));
        self.known.insert(header.source, Known { key, window });
        Outcome::Deliver(held.into_iter().map(|(_, plaintext)| plaintext).collect())
    }
}

/// A challenge: a nonce, and the salt that is to seal it, so that nobody answers for another.
fn challenge(source: &Source, nonce: &[u8; NONCE_BYTES], sealer: &mut Sealer) -> Outcome {
    let body = [nonce.as_slice(), &source.key_id.0, &source.salt].concat();
    reply(sealer.seal_as(Kind::Challenge, &body))
}

/// An answer has the size of its challenge at the most, so answering strangers amplifies nothing.
fn answer(challenge: &[u8], sealer: &mut Sealer) -> Outcome {
    let Some((nonce, rest)) = challenge.split_first_chunk::<NONCE_BYTES>() else {
        return Outcome::Drop(DropReason::Malformed);
    };
    if rest != [sealer.source.key_id.0.as_slice(), &sealer.source.salt].concat() {
        return Outcome::Drop(DropReason::Replayed);
    }
    reply(sealer.seal_as(Kind::Answer, nonce))
}

fn reply(sealed: Result<Vec<u8>, SealError>) -> Outcome {
    // Both bodies are short; an exhausted key can only be silent.
    sealed.map_or(Outcome::Drop(DropReason::Full), Outcome::Reply)
}

#[cfg(test)]
mod tests;
