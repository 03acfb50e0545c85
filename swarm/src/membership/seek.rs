//! When who is asked what he knows: seeds often while alone, random members for some seconds after joining, then seeds
//! now and then, so that the halves of a split meet.
//!
//! Not here: where seeds come from (discovery), and what is done with the answers (foca).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::seq::IteratorRandom;

/// The first repetition while alone; then twice as long each time.
const ALONE_FIRST: Duration = Duration::from_millis(500);
/// The longest wait while alone: what a node that starts before its network adds to its start.
const ALONE_LAST: Duration = Duration::from_secs(5);
/// Between two questions once joined: a split that SWIM has forgotten heals within about this time, as every member of
/// both halves asks.
const JOINED: Duration = Duration::from_secs(30);
/// How long after joining others are asked for what they know: SWIM's updates fill packets slowly when a whole cluster
/// starts at once, and at 10 % loss the last one is missed for up to 20 s. One answer holds about 30 members.
const WARM: Duration = Duration::from_secs(10);
/// Between two such questions: 80 bytes and an answer of 1200.
const WARM_INTERVAL: Duration = Duration::from_millis(500);
/// Seeds asked at a time while alone; of a thousand listed ones a few suffice.
const SEEDS_AT_ONCE: usize = 5;
/// Seeds kept: a headless service of the largest cluster supported. More are ignored.
const SEEDS_MAX: usize = 16_384;
/// Deadlines are spread by up to this share, so that nodes that started together do not ask together.
const JITTER: f64 = 0.25;

/// The seeds and the next time to ask some.
pub(super) struct Seek {
    me: SocketAddr,
    seeds: BTreeSet<SocketAddr>,
    due: Option<Instant>,
    wait: Duration,
    warm_until: Option<Instant>,
}

impl Seek {
    pub(super) fn new(me: SocketAddr) -> Self {
        Self { me, seeds: BTreeSet::new(), due: None, wait: ALONE_FIRST, warm_until: None }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// Takes the list over, without this node's own address.
    pub(super) fn set_seeds(&mut self, seeds: BTreeSet<SocketAddr>, joined: bool, now: Instant, rng: &mut impl RngExt) {
        let canonical = seeds.into_iter().map(|seed| SocketAddr::new(seed.ip().to_canonical(), seed.port()));
        let seeds: BTreeSet<_> = canonical.filter(|seed| *seed != self.me).take(SEEDS_MAX).collect();
        let changed = seeds != self.seeds;
        self.seeds = seeds;
        if self.due.is_none() || (changed && !joined) {
            self.wait = ALONE_FIRST;
            self.due = Some(if joined { now + spread(JOINED, rng) } else { now });
        }
    }

    /// Somebody answered.
    pub(super) fn settle(&mut self, now: Instant, rng: &mut impl RngExt) {
        self.warm_until = Some(now + WARM);
        self.due = Some(now + spread(WARM_INTERVAL, rng));
    }

    /// Nobody is there any more.
    pub(super) fn hurry(&mut self, now: Instant, rng: &mut impl RngExt) {
        self.wait = ALONE_FIRST;
        self.due = Some(now + spread(ALONE_FIRST, rng));
    }

    /// Whom to ask now: several seeds while alone, a live member soon after joining, else a seed that is not known to
    /// live, if any.
    pub(super) fn targets(
        &mut self,
        joined: bool,
        live: &BTreeSet<SocketAddr>,
        now: Instant,
        rng: &mut impl RngExt,
    ) -> Vec<SocketAddr> {
        let warm = self.warm_until.is_some_and(|until| now < until);
        let (wait, targets) = if !joined {
            (self.wait, pick(self.seeds.iter().copied(), SEEDS_AT_ONCE, rng))
        } else if warm {
            (WARM_INTERVAL, pick(live.iter().copied(), 1, rng))
        } else {
            (JOINED, pick(self.seeds.difference(live).copied(), 1, rng))
        };
        if !joined {
            self.wait = (self.wait * 2).min(ALONE_LAST);
        }
        self.due = Some(now + spread(wait, rng));
        targets
    }
}

/// Up to `count` of `from`, at random.
pub(super) fn pick(from: impl IntoIterator<Item = SocketAddr>, count: usize, rng: &mut impl RngExt) -> Vec<SocketAddr> {
    from.into_iter().sample(rng, count)
}

fn spread(wait: Duration, rng: &mut impl RngExt) -> Duration {
    wait.mul_f64(rng.random_range(1.0 - JITTER..=1.0 + JITTER))
}
