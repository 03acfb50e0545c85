// A simulation needs some instant to start at; from there its own clock moves it.
#![allow(clippy::disallowed_methods)]
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

/// One end: what it sends with and what it opens with.
struct End {
    sealer: Sealer,
    opener: Opener,
    rng: StdRng,
    now: Instant,
}

impl End {
    fn new(keys: &Arc<ClusterKeys>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let sealer = Sealer::new(keys, rng.random()).unwrap();
        Self { sealer, opener: Opener::new(keys.clone()), rng, now: Instant::now() }
    }

    fn seal(&mut self, plaintext: &[u8]) -> Vec<u8> {
        self.sealer.seal(plaintext).unwrap()
    }

    fn open(&mut self, datagram: &[u8]) -> Outcome {
        self.opener.handle(self.now, datagram, &mut self.sealer, &mut self.rng)
    }

    fn ask(&mut self, datagram: &[u8]) -> Vec<u8> {
        match self.open(datagram) {
            Outcome::Reply(reply) => reply,
            other => panic!("{other:?}"),
        }
    }
}

fn ring(cluster: &str, bytes: &[u8]) -> Arc<ClusterKeys> {
    let secrets: Vec<[u8; 32]> = bytes.iter().map(|byte| [*byte; 32]).collect();
    Arc::new(ClusterKeys::new(cluster, &secrets).unwrap())
}

fn pair() -> (End, End) {
    let keys = ring("lab", &[1]);
    (End::new(&keys, 1), End::new(&keys, 2))
}

fn delivered(plaintexts: &[&[u8]]) -> Outcome {
    Outcome::Deliver(plaintexts.iter().map(|plaintext| plaintext.to_vec()).collect())
}

/// Lets `to` find out that `from` lives.
fn introduce(from: &mut End, to: &mut End) {
    let challenge = {
        let hello = from.seal(b"hello");
        to.ask(&hello)
    };
    let answer = from.ask(&challenge);
    assert_eq!(to.open(&answer), delivered(&[b"hello"]));
}

#[test]
fn strangers_converge() {
    let (mut a, mut b) = pair();
    let first = a.seal(b"first");
    let challenge = b.ask(&first);
    let second = a.seal(b"second");
    assert_eq!(b.open(&second), Outcome::Held);
    let answer = a.ask(&challenge);
    assert_eq!(b.open(&answer), delivered(&[b"first", b"second"]));
    let third = a.seal(b"third");
    assert_eq!(b.open(&third), delivered(&[b"third"]));
    // The other way round is proven on its own.
    introduce(&mut b, &mut a);
}

#[test]
fn simultaneous_strangers_converge() {
    let (mut a, mut b) = pair();
    let (from_a, from_b) = (a.seal(b"a"), b.seal(b"b"));
    let (ask_a, ask_b) = (b.ask(&from_a), a.ask(&from_b));
    let (answer_a, answer_b) = (a.ask(&ask_a), b.ask(&ask_b));
    assert_eq!(b.open(&answer_a), delivered(&[b"a"]));
    assert_eq!(a.open(&answer_b), delivered(&[b"b"]));
}

#[test]
fn a_lost_challenge_is_repeated_by_a_later_datagram() {
    let (mut a, mut b) = pair();
    let first = a.seal(b"first");
    let lost = b.ask(&first);
    b.now += CHALLENGE_AGAIN;
    let second = a.seal(b"second");
    let again = b.ask(&second);
    assert_ne!(lost, again);
    let answer = a.ask(&again);
    assert_eq!(b.open(&answer), delivered(&[b"first", b"second"]));
    // Both challenges arrived after all: the second answer is of no use and no harm.
    let late = a.ask(&lost);
    assert_eq!(b.open(&late), delivered(&[]));
}

#[test]
fn what_is_held_is_bounded_and_does_not_grow_old() {
    let (mut a, mut b) = pair();
    let first = a.seal(b"0");
    b.ask(&first);
    for number in 1..HELD_PER_SALT_MAX {
        let datagram = a.seal(&[number as u8]);
        assert_eq!(b.open(&datagram), Outcome::Held);
    }
    let more = a.seal(b"more");
    assert_eq!(b.open(&more), Outcome::Drop(DropReason::Full));
    b.now += PENDING_FOR;
    let fresh = a.seal(b"fresh");
    let challenge = b.ask(&fresh);
    let answer = a.ask(&challenge);
    assert_eq!(b.open(&answer), delivered(&[b"fresh"]));
}

#[test]
fn a_recording_of_an_earlier_run_changes_nothing() {
    let keys = ring("lab", &[1]);
    let (mut old, mut b) = (End::new(&keys, 1), End::new(&keys, 2));
    let hello = old.seal(b"hello");
    let challenge = b.ask(&hello);
    let answer = old.ask(&challenge);
    let words = old.seal(b"somebody is dead");
    drop(old);

    // b is another run, and so is whoever has the old address now.
    let (mut b, mut new) = (End::new(&keys, 3), End::new(&keys, 4));
    let challenge = b.ask(&words);
    assert_eq!(b.open(&answer), Outcome::Drop(DropReason::Replayed), "an answer to another nonce");
    assert_eq!(new.open(&challenge), Outcome::Drop(DropReason::Replayed), "nobody answers for another salt");
    assert_eq!(b.open(&words), Outcome::Drop(DropReason::Replayed));
    assert_eq!(b.opener.known.len(), 0);
}

#[test]
fn an_answer_cannot_be_used_twice() {
    let (mut a, mut b) = pair();
    let hello = a.seal(b"hello");
    let challenge = b.ask(&hello);
    let answer = a.ask(&challenge);
    assert_eq!(b.open(&answer), delivered(&[b"hello"]));
    assert_eq!(b.open(&answer), Outcome::Drop(DropReason::Replayed));
    assert_eq!(b.open(&hello), Outcome::Drop(DropReason::Replayed));
}

#[test]
fn old_words_of_a_living_sender_stay_outside_the_window() {
    let (mut a, mut b) = pair();
    let old = a.seal(b"old");
    for _ in 0..super::super::replay::WINDOW {
        a.seal(b"to somebody else");
    }
    let challenge = b.ask(&old);
    let answer = a.ask(&challenge);
    assert_eq!(b.open(&answer), delivered(&[]));
}

#[test]
fn other_clusters_and_forgeries_are_told_apart() {
    let (mut a, mut b) = pair();
    let other = ring("other", &[1]);
    let mut foreign = End::new(&other, 9);
    let datagram = foreign.seal(b"x");
    assert_eq!(b.open(&datagram), Outcome::Drop(DropReason::OtherCluster(other.sending())));
    let mut relabelled = datagram.clone();
    relabelled[2..6].copy_from_slice(&ring("lab", &[1]).sending().0);
    assert_eq!(b.open(&relabelled), Outcome::Drop(DropReason::Forged));
    let own = a.seal(b"x");
    assert_eq!(a.open(&own), Outcome::Drop(DropReason::Replayed), "a reflection");
    let mut version = own.clone();
    version[0] = 2;
    assert_eq!(b.open(&version), Outcome::Drop(DropReason::Malformed));
    assert_eq!(b.open(&own[..OVERHEAD_BYTES - 1]), Outcome::Drop(DropReason::Malformed));
    assert_eq!(b.open(&[1; DATAGRAM_BYTES_MAX + 1]), Outcome::Drop(DropReason::Malformed));
}

#[test]
fn a_secret_is_rotated_in_three_steps() {
    let steps = [ring("lab", &[1]), ring("lab", &[1, 2]), ring("lab", &[2, 1]), ring("lab", &[2])];
    for (seed, neighbours) in steps.windows(2).enumerate() {
        let (mut before, mut after) = (End::new(&neighbours[0], seed as u64), End::new(&neighbours[1], 99));
        introduce(&mut before, &mut after);
        introduce(&mut after, &mut before);
    }
    let datagram = End::new(&steps[2], 1).seal(b"x");
    let refused = End::new(&steps[0], 5).open(&datagram);
    assert_eq!(refused, Outcome::Drop(DropReason::OtherCluster(steps[3].sending())), "a step left out");
}

#[test]
fn datagrams_have_a_size() {
    let (mut a, mut b) = pair();
    introduce(&mut a, &mut b);
    let full = a.seal(&[7; PLAINTEXT_BYTES_MAX]);
    assert_eq!(full.len(), DATAGRAM_BYTES_MAX);
    assert_eq!(b.open(&full), delivered(&[&[7; PLAINTEXT_BYTES_MAX]]));
    let long = a.sealer.seal(&[7; PLAINTEXT_BYTES_MAX + 1]);
    assert_eq!(long, Err(SealError::TooLong(PLAINTEXT_BYTES_MAX + 1)));
    a.sealer.counter = u64::MAX;
    assert_eq!(a.sealer.seal(b""), Err(SealError::Exhausted));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_datagram_is_delivered_at_most_once(order in prop::collection::vec(0..40usize, 1..200)) {
        let (mut a, mut b) = pair();
        introduce(&mut a, &mut b);
        let sealed: Vec<Vec<u8>> = (0..40u8).map(|number| a.seal(&[number])).collect();
        let mut seen = [false; 40];
        for number in order {
            let expected = if seen[number] {
                Outcome::Drop(DropReason::Replayed)
            } else {
                delivered(&[&[number as u8]])
            };
            prop_assert_eq!(b.open(&sealed[number]), expected);
            seen[number] = true;
        }
    }

    #[test]
    fn a_flipped_bit_never_passes(bit in 0..(46 + 5) * 8usize, known in any::<bool>()) {
        let (mut a, mut b) = pair();
        if known {
            introduce(&mut a, &mut b);
        }
        let mut datagram = a.seal(b"hello");
        datagram[bit / 8] ^= 1 << (bit % 8);
        let outcome = b.open(&datagram);
        prop_assert!(matches!(outcome, Outcome::Drop(_)), "{outcome:?}");
        datagram[bit / 8] ^= 1 << (bit % 8);
        let outcome = b.open(&datagram);
        prop_assert!(!matches!(outcome, Outcome::Drop(_)), "the damaged one moved nothing: {outcome:?}");
    }

    #[test]
    fn noise_never_panics(noise in prop::collection::vec(any::<u8>(), 0..1300), labelled in any::<bool>()) {
        let (_, mut b) = pair();
        let mut noise = noise;
        if labelled && noise.len() > 6 {
            noise[0] = 1;
            noise[1] = 1 + noise[1] % 3;
            noise[2..6].copy_from_slice(&ring("lab", &[1]).sending().0);
        }
        prop_assert!(matches!(b.open(&noise), Outcome::Drop(_)));
    }
}
