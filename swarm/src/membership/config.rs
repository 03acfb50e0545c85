//! The settings of SWIM, and why foca's own for a LAN do not do.
//!
//! Simulated with 128 members, the LAN defaults declare 6 healthy ones down in ten minutes at 10 % loss, and a split
//! takes 96 to 285 s to heal; these declare none and heal in 11 to 29 s. A dead member is declared so after 6 to 8 s.

use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use foca::{Config, PeriodicParams};

use super::MESSAGE_BYTES_MAX;

/// One member is probed per period.
const PROBE_PERIOD: Duration = Duration::from_secs(1);
/// Silence after which others are asked to probe. Must leave them time within the period.
const PROBE_RTT: Duration = Duration::from_millis(500);
/// Others that are asked; with 3, as in LAN defaults, 10 % loss already kills the living.
const INDIRECT_PROBES: NonZeroUsize = NonZeroUsize::new(5).unwrap();
/// How often one update is passed on by each member: enough that none dies out at 20 % loss.
const TRANSMISSIONS_MAX: NonZeroU8 = NonZeroU8::new(14).unwrap();
/// Time to refute a suspicion: 25 gossip rounds.
const SUSPICION: Duration = Duration::from_secs(5);
/// How long a dead member is remembered, and so announced to. Longer splits heal through discovery.
const REMEMBER_DOWN: Duration = Duration::from_secs(15 * 60);
/// Healing: the dead are asked whether they live this often, this many at a time.
const ANNOUNCE_TO_DOWN: PeriodicParams =
    PeriodicParams { frequency: Duration::from_secs(5), num_members: NonZeroUsize::new(3).unwrap() };
/// News travels this often, to this many.
const GOSSIP: PeriodicParams =
    PeriodicParams { frequency: Duration::from_millis(200), num_members: NonZeroUsize::new(3).unwrap() };
/// What foca may put in a packet so that the sealed datagram fits.
const PACKET_BYTES_MAX: NonZeroUsize = NonZeroUsize::new(MESSAGE_BYTES_MAX).unwrap();

const _: () = assert!(PROBE_RTT.as_millis() * 2 <= PROBE_PERIOD.as_millis());
const _: () = assert!(SUSPICION.as_millis() >= 20 * GOSSIP.frequency.as_millis());

/// The settings that every member uses.
pub(super) fn config() -> Config {
    Config {
        probe_period: PROBE_PERIOD,
        probe_rtt: PROBE_RTT,
        num_indirect_probes: INDIRECT_PROBES,
        max_transmissions: TRANSMISSIONS_MAX,
        suspect_to_down_after: SUSPICION,
        remove_down_after: Some(REMEMBER_DOWN),
        max_packet_size: PACKET_BYTES_MAX,
        // Without it a split never heals: the dead would announce to the dead and nobody would say so. The needless
        // rejoins that it causes are prevented where timers are handled.
        notify_down_members: true,
        // Views are compared instead (`compare`): that finds what differs, where an announcement gets 28 members at random.
        periodic_announce: None,
        periodic_announce_to_down_members: Some(ANNOUNCE_TO_DOWN),
        periodic_gossip: Some(GOSSIP),
    }
}
