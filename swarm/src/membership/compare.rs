//! Anti-entropy: a member shows another a digest of whom it knows, and what differs is told in both directions.
//!
//! SWIM tells news to random others a number of times and then never again: who misses all of that stays wrong, above all
//! after a start of many at once. A comparison costs a datagram where nothing differs, and finds what does wherever it is.
//!
//! ```text
//! A: Digest, 16 to 128 sums, one per bucket of identities
//! B: nothing if its own sums are the same; else what it knows of those in the buckets that differ, and its own Digest
//! A: what it knows of those in the buckets that still differ
//! ```
//!
//! The living are summed up; told is what is known of the dead as well, since that may be what differs. What is told is news
//! as any other: it is believed by the rules of SWIM.

use std::collections::BTreeMap;

use foca::{Codec, PostcardCodec, State};
use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::identity::Identity;

/// What a comparison says: postcard in a datagram of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Comparison {
    /// Sums of the identities that the sender believes to be alive, itself included.
    Digest {
        /// One per bucket; their number is a power of two.
        sums: Vec<u32>,
        /// Whether it answers another, so that nobody answers it with a third.
        answer: bool,
    },
    /// What the sender knows of some, each as foca writes a member.
    Told(Vec<u8>),
}

/// Buckets of a digest. A bucket that differs is told as a whole, so it should have few members: about 16 each, until 128
/// sums fill the datagram.
const BUCKETS_MIN: usize = 16;
const BUCKETS_MAX: usize = 128;
const MEMBERS_PER_BUCKET: usize = 16;

/// Datagrams of members in answer to one digest, about 28 members each: the rest follows the next comparison. It bounds what
/// a small question costs.
pub(super) const TOLD_MAX: usize = 3;

/// How many buckets a cluster of this size is put into.
fn buckets(members: usize) -> usize {
    (members / MEMBERS_PER_BUCKET).next_power_of_two().clamp(BUCKETS_MIN, BUCKETS_MAX)
}

/// The digest of those of `known` who live.
pub(super) fn digest(known: &[foca::Member<Identity>], answer: bool) -> Comparison {
    Comparison::Digest { sums: sums(known, buckets(living(known).count())), answer }
}

fn sums(known: &[foca::Member<Identity>], buckets: usize) -> Vec<u32> {
    let mut sums = vec![0; buckets];
    for identity in living(known) {
        sums[bucket(identity, buckets)] ^= fingerprint(identity);
    }
    sums
}

fn living(known: &[foca::Member<Identity>]) -> impl Iterator<Item = &Identity> {
    known.iter().filter(|member| member.state() != State::Down).map(foca::Member::id)
}

/// Where an identity belongs. Ids are hashes already.
fn bucket(identity: &Identity, buckets: usize) -> usize {
    usize::from(identity.node.as_bytes()[0]) % buckets
}

/// What stands for an identity in a sum. Ids are hashes, so some of their bytes do; the epoch is mixed in (SplitMix64), since
/// one that rejoined keeps its id. Whoever makes two that are equal hides only what he says of himself.
fn fingerprint(identity: &Identity) -> u32 {
    let id = identity.node.as_bytes();
    let half = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| id[at + byte]));
    let mut mixed =
        (half(0) ^ half(8).rotate_left(29)).wrapping_add(identity.epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) as u32
}

/// What to tell the one who sent `theirs`: who is `known` in the buckets that differ, in plaintexts of at most `bytes` bytes each;
/// begun at a random one of those buckets, as not all may fit. Empty if nothing differs; `None` if the digest is none.
pub(super) fn differing(
    theirs: &[u32],
    known: &[foca::Member<Identity>],
    bytes: usize,
    rng: &mut impl RngExt,
) -> Option<Vec<Comparison>> {
    if !theirs.len().is_power_of_two() || !(BUCKETS_MIN..=BUCKETS_MAX).contains(&theirs.len()) {
        return None;
    }
    let ours = sums(known, theirs.len());
    let mut differ: Vec<usize> = (0..theirs.len()).filter(|bucket| ours[*bucket] != theirs[*bucket]).collect();
    if differ.is_empty() {
        return Some(Vec::new());
    }
    let first = rng.random_range(0..differ.len());
    differ.rotate_left(first);
    let mut by_bucket: BTreeMap<usize, Vec<&foca::Member<Identity>>> = BTreeMap::new();
    for member in known {
        by_bucket.entry(bucket(member.id(), theirs.len())).or_default().push(member);
    }
    let mut told = vec![Vec::new()];
    for member in differ.iter().filter_map(|bucket| by_bucket.get(bucket)).flatten() {
        let mut one = Vec::new();
        PostcardCodec.encode_member(member, &mut one).ok()?;
        if told.last().is_some_and(|last: &Vec<u8>| last.len() + one.len() > bytes) {
            if told.len() >= TOLD_MAX {
                break;
            }
            told.push(Vec::new());
        }
        told.last_mut()?.extend(one);
    }
    Some(told.into_iter().filter(|told| !told.is_empty()).map(Comparison::Told).collect())
}

/// The members in what was told; `None` if it is not that.
pub(super) fn read(mut told: &[u8]) -> Option<Vec<foca::Member<Identity>>> {
    let mut members = Vec::new();
    while !told.is_empty() {
        members.push(PostcardCodec.decode_member(&mut told).ok()?);
    }
    Some(members)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;

    use darter_tracker::{NodeId, Role};
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::super::{MESSAGE_BYTES_MAX, Member, TOLD_OVERHEAD_BYTES};
    use super::*;

    const BYTES: usize = MESSAGE_BYTES_MAX - TOLD_OVERHEAD_BYTES;

    fn identity(rng: &mut StdRng) -> Identity {
        let [b, c, d] = rng.random();
        let gossip = SocketAddr::from(([10, b, c, d], 8002));
        let id = NodeId::from_bytes(rng.random());
        Identity::of(&Member { id, gossip, peer: gossip, epoch: rng.random(), role: Role::Node, zone: 0 })
    }

    /// One who knows some; dead is dead.
    #[derive(Default)]
    struct View(Vec<foca::Member<Identity>>);

    impl View {
        fn learn(&mut self, told: &[u8]) {
            for member in read(told).unwrap() {
                match self.0.iter_mut().find(|known| known.id() == member.id()) {
                    Some(known) if known.state() != State::Down => *known = member,
                    Some(_) => {}
                    None => self.0.push(member),
                }
            }
        }

        fn living(&self) -> Vec<NodeId> {
            let mut living: Vec<NodeId> = living(&self.0).map(|identity| identity.node).collect();
            living.sort_unstable();
            living
        }
    }

    /// `a` compares with `b`; returns the messages.
    fn compare(a: &mut View, b: &mut View, rng: &mut StdRng) -> usize {
        let mut said = 1;
        let Comparison::Digest { sums, .. } = digest(&a.0, false) else { return 0 };
        let differing = differing(&sums, &b.0, BYTES, rng).unwrap();
        if differing.is_empty() {
            return said;
        }
        let Comparison::Digest { sums, .. } = digest(&b.0, true) else { return 0 };
        for (to, told) in [(0, differing), (1, super::differing(&sums, &a.0, BYTES, rng).unwrap())] {
            assert!(told.len() <= TOLD_MAX);
            for comparison in told {
                said += 1;
                assert!(postcard::to_allocvec(&comparison).unwrap().len() <= MESSAGE_BYTES_MAX);
                let Comparison::Told(told) = comparison else { continue };
                if to == 0 { a.learn(&told) } else { b.learn(&told) }
            }
        }
        said + 1
    }

    #[test]
    fn two_views_become_one() {
        for (members, seed) in [(3, 1), (40, 2), (200, 3), (3000, 4)] {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut a, mut b) = (View::default(), View::default());
            for number in 0..members {
                let one = identity(&mut rng);
                // A few are known to one of both only, or dead to one of both.
                let (ours, theirs) = match number % 50 {
                    0 => (Some(foca::Member::alive(one)), None),
                    1 => (None, Some(foca::Member::alive(one))),
                    2 => (Some(foca::Member::down(one)), Some(foca::Member::alive(one))),
                    _ => (Some(foca::Member::alive(one)), Some(foca::Member::alive(one))),
                };
                a.0.extend(ours);
                b.0.extend(theirs);
            }
            let rounds = (0..).take_while(|_| compare(&mut a, &mut b, &mut rng) > 1).count();
            assert_eq!(a.living(), b.living());
            assert!(rounds <= members / 100 + 2, "{rounds} rounds for {members}");
            assert_eq!(compare(&mut b, &mut a, &mut rng), 1, "they agree, and say no more");
        }
    }

    #[test]
    fn a_new_epoch_is_a_difference() {
        let mut rng = StdRng::seed_from_u64(5);
        let before = identity(&mut rng);
        let after = Identity::of(&Member { epoch: before.epoch.wrapping_add(1), ..before.member() });
        let Comparison::Digest { sums, .. } = digest(&[foca::Member::alive(before)], false) else { return };
        assert_eq!(differing(&sums, &[foca::Member::alive(after)], BYTES, &mut rng).unwrap().len(), 1);
    }

    #[test]
    fn the_largest_digest_fits_and_nonsense_is_refused() {
        let largest = Comparison::Digest { sums: vec![u32::MAX; BUCKETS_MAX], answer: true };
        assert!(postcard::to_allocvec(&largest).unwrap().len() <= MESSAGE_BYTES_MAX);
        let mut rng = StdRng::seed_from_u64(6);
        for sums in [0, 1, 8, 15, 17, 100, 129, 256] {
            assert_eq!(differing(&vec![1; sums], &[], BYTES, &mut rng), None, "{sums}");
        }
        for _ in 0..1000 {
            let noise: Vec<u8> = (0..rng.random_range(1..100)).map(|_| rng.random()).collect();
            let _ = read(&noise);
            let _ = postcard::from_bytes::<Comparison>(&noise);
        }
    }
}
