//! When who is asked what he knows: seeds often while alone; once joined, random members compare their views, often for some
//! seconds and then now and then, and seeds are asked now and then, so that the halves of a split meet.
//!
//! Not here: where seeds come from (discovery), and what is done with the answers (foca).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::seq::IteratorRandom;

/// The first repetition while alone, and by how much each further wait is longer: five tries in the first four seconds, as a
/// join takes four datagrams, which at 10 % loss all arrive in two of three tries.
const ALONE_FIRST: Duration = Duration::from_millis(500);
const ALONE_GROWTH: f64 = 1.25;
/// The longest wait while alone: what a node that starts before its network adds to its start.
const ALONE_LAST: Duration = Duration::from_secs(5);
/// Between two questions once joined: a split that SWIM has forgotten heals within about this time, as every member of
/// both halves asks.
const JOINED: Duration = Duration::from_secs(30);
/// How long after joining views are compared often: SWIM's updates fill packets slowly when a whole cluster starts at once,
/// and at 10 % loss the last one is missed for up to 20 s.
const WARM: Duration = Duration::from_secs(10);
/// Between two such comparisons.
const WARM_INTERVAL: Duration = Duration::from_millis(500);
/// Between two comparisons later: what SWIM has missed is set right within a few of these. 150 bytes a time with a hundred
/// members, 700 with thousands.
const COMPARE_INTERVAL: Duration = Duration::from_secs(5);
/// Seeds asked at a time while alone; of a thousand listed ones a few suffice.
const SEEDS_AT_ONCE: usize = 5;
/// Seeds kept: a headless service of the largest cluster supported. More are ignored.
const SEEDS_MAX: usize = 16_384;
/// Deadlines are spread by up to this share, so that nodes that started together do not ask together.
const JITTER: f64 = 0.25;

/// The seeds, and when to ask some or to compare views.
pub(super) struct Seek {
    me: SocketAddr,
    seeds: BTreeSet<SocketAddr>,
    due: Option<Instant>,
    wait: Duration,
    warm_until: Option<Instant>,
    /// The next comparison; none while alone.
    compare_at: Option<Instant>,
}

impl Seek {
    pub(super) fn new(me: SocketAddr) -> Self {
        Self { me, seeds: BTreeSet::new(), due: None, wait: ALONE_FIRST, warm_until: None, compare_at: None }
    }

    pub(super) fn due(&self) -> Option<Instant> {
        [self.due, self.compare_at].into_iter().flatten().min()
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
        self.compare_at = Some(now + spread(WARM_INTERVAL, rng));
        self.due = Some(now + spread(JOINED, rng));
    }

    /// Nobody is there any more.
    pub(super) fn hurry(&mut self, now: Instant, rng: &mut impl RngExt) {
        self.wait = ALONE_FIRST;
        self.compare_at = None;
        self.due = Some(now + spread(ALONE_FIRST, rng));
    }

    /// Whom to ask for what he knows, if it is time: several seeds while alone, else a seed that is not known to live, if any.
    pub(super) fn targets(
        &mut self,
        joined: bool,
        live: &BTreeSet<SocketAddr>,
        now: Instant,
        rng: &mut impl RngExt,
    ) -> Option<Vec<SocketAddr>> {
        self.due.filter(|due| *due <= now)?;
        let (wait, targets) = if joined {
            (JOINED, pick(self.seeds.difference(live).copied(), 1, rng))
        } else {
            let wait = self.wait;
            self.wait = wait.mul_f64(ALONE_GROWTH).min(ALONE_LAST);
            (wait, pick(self.seeds.iter().copied(), SEEDS_AT_ONCE, rng))
        };
        self.due = Some(now + spread(wait, rng));
        Some(targets)
    }

    /// The live member to compare views with, if it is time.
    pub(super) fn partner(
        &mut self,
        live: &BTreeSet<SocketAddr>,
        now: Instant,
        rng: &mut impl RngExt,
    ) -> Option<SocketAddr> {
        self.compare_at.filter(|at| *at <= now)?;
        let warm = self.warm_until.is_some_and(|until| now < until);
        self.compare_at = Some(now + spread(if warm { WARM_INTERVAL } else { COMPARE_INTERVAL }, rng));
        pick(live.iter().copied(), 1, rng).pop()
    }
}

/// Up to `count` of `from`, at random.
pub(super) fn pick(from: impl IntoIterator<Item = SocketAddr>, count: usize, rng: &mut impl RngExt) -> Vec<SocketAddr> {
    from.into_iter().sample(rng, count)
}

fn spread(wait: Duration, rng: &mut impl RngExt) -> Duration {
    wait.mul_f64(rng.random_range(1.0 - JITTER..=1.0 + JITTER))
}
