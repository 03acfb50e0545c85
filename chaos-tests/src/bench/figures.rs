//! From what was measured to what can be compared.

use serde_json::{Value, json};

use crate::lab::netns::GOODPUT;
use crate::lab::registry::Sent;

/// Share of the cores from which on a run has measured the machine.
pub const BUSY_SHARE_MAX: f64 = 0.8;

/// One GiB, for what is given per GiB.
const GIB: f64 = (1_u64 << 30) as f64;

/// One MiB.
const MIB: f64 = (1_u64 << 20) as f64;

/// The rates that bound a rollout, in Mb/s as the links have them.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    /// Uplink of who has the image at the beginning: the registry, or a neighbour.
    pub source: f64,
    /// Downlink of every node that wants it.
    pub down: f64,
    /// Uplink of each of them.
    pub ups: Vec<f64>,
}

impl Links {
    /// The least time in seconds in which all nodes can have so many bytes, if they begin together: the source has to send
    /// them once, each node has to receive them, and all uplinks together have to carry a copy per node (Kumar and Ross,
    /// "Peer-Assisted File Distribution: The Minimum Distribution Time", HotWeb 2006).
    #[must_use]
    pub fn fluid_bound(&self, bytes: u64) -> f64 {
        let all = self.source + self.ups.iter().sum::<f64>();
        let times = [1.0 / self.source, 1.0 / self.down, self.ups.len() as f64 / all];
        times.into_iter().fold(0.0, f64::max) * bytes as f64 * 8.0 / (1e6 * GOODPUT)
    }

    /// [`Links::fluid_bound`] counted from the first start, where the last node begins so many seconds after it.
    #[must_use]
    pub fn bound(&self, bytes: u64, last_start: f64) -> f64 {
        let alone = bytes as f64 * 8.0 / (self.down * 1e6 * GOODPUT);
        self.fluid_bound(bytes).max(last_start + alone)
    }
}

/// When one client began and ended, in seconds since the first of them began.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// When it asked for the manifest, or gave its program the torrent.
    pub began: f64,
    /// When it had the last byte.
    pub ended: f64,
    /// From its request for the first layer to the first byte of it; None where the contestant does not say.
    pub first_byte: Option<f64>,
}

/// Which moment times are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// When the first of all clients began.
    FirstStart,
    /// When the client in question began.
    OwnStart,
}

/// Who kept the cores so busy that the figures are the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Nobody.
    No,
    /// What the benchmark ran.
    Own,
    /// Others on this machine, at least in part.
    Others,
}

impl Busy {
    /// Judges shares of the cores' time: of the benchmark's processes, and of all.
    #[must_use]
    pub fn of(own_share: f64, machine_share: f64) -> Self {
        if own_share > BUSY_SHARE_MAX {
            Self::Own
        } else if machine_share > BUSY_SHARE_MAX {
            Self::Others
        } else {
            Self::No
        }
    }

    fn json(self) -> Value {
        match self {
            Self::No => Value::Null,
            Self::Own => json!("own"),
            Self::Others => json!("others"),
        }
    }
}

/// What one run has measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Clients that were to finish, in no order.
    pub times: Vec<Times>,
    /// Which of their times counts.
    pub since: Since,
    /// The least time that it can take; None where there is no such thing.
    pub bound: Option<f64>,
    /// Bytes that each client wanted.
    pub wanted_bytes: u64,
    /// What the registry's own log says.
    pub sent: Sent,
    /// What left the registry's host.
    pub interface_bytes: u64,
    /// CPU seconds of the contestant's daemons.
    pub cpu: f64,
    /// Of them, those that the kernel used on their behalf: much of what the lab's links cost is in there.
    pub cpu_kernel: f64,
    /// The most memory that one of these daemons has used; None where there is none.
    pub peak_memory_bytes: Option<u64>,
    /// Bytes that nodes had from each other; None where the contestant does not say.
    pub peer_bytes: Option<u64>,
    /// Shares of the cores' time.
    pub own_share: f64,
    /// The same of all processes of the machine and its kernel.
    pub machine_share: f64,
    /// What only some modes have.
    pub extra: serde_json::Map<String, Value>,
}

/// The figures of a run, or medians of those of several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// Seconds until the last client had everything.
    pub last: f64,
    /// Seconds until the median client had.
    pub median: f64,
    /// Seconds to the first layer's first byte, of the median client.
    pub first_byte: Option<f64>,
    /// The bound in seconds.
    pub bound: Option<f64>,
    /// Blob body bytes over what one client wanted.
    pub registry_share: f64,
    /// Bytes on the registry's wire over what one client wanted.
    pub interface_share: f64,
    /// CPU seconds of the daemons per GiB that nodes had from each other.
    pub cpu_per_gib: Option<f64>,
    /// Peak memory of a daemon in MiB.
    pub peak_mib: Option<f64>,
}

impl Measured {
    /// Who was to blame, if the machine was too busy.
    #[must_use]
    pub fn busy(&self) -> Busy {
        Busy::of(self.own_share, self.machine_share)
    }

    /// The figures.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let base = |times: &Times| match self.since {
            Since::FirstStart => 0.0,
            Since::OwnStart => times.began,
        };
        let took: Vec<f64> = self.times.iter().map(|times| times.ended - base(times)).collect();
        let first_bytes: Vec<f64> = self.times.iter().filter_map(|times| times.first_byte).collect();
        let per_wanted = |bytes: u64| bytes as f64 / self.wanted_bytes.max(1) as f64;
        Figures {
            last: took.iter().copied().fold(0.0, f64::max),
            median: median(&took).unwrap_or_default(),
            first_byte: median(&first_bytes),
            bound: self.bound,
            registry_share: per_wanted(self.sent.blob_bytes),
            interface_share: per_wanted(self.interface_bytes),
            cpu_per_gib: self.peer_bytes.filter(|bytes| *bytes > 0).map(|bytes| self.cpu * GIB / bytes as f64),
            peak_mib: self.peak_memory_bytes.map(|bytes| bytes as f64 / MIB),
        }
    }

    /// As the fields of a run's line.
    #[must_use]
    pub fn json(&self) -> Value {
        let figures = self.figures();
        let last_start = self.times.iter().map(|times| times.began).fold(0.0, f64::max);
        let first_byte_max = self.times.iter().filter_map(|times| times.first_byte).reduce(f64::max);
        let requests = &self.sent.requests;
        let mut line = json!({
            "clients": self.times.len(),
            "measured_from": match self.since {
                Since::FirstStart => "the first client's start, to each client's own finish",
                Since::OwnStart => "each client's own start, to its finish",
            },
            "last_start_s": rounded(last_start),
            "first_byte_max_s": first_byte_max.map(rounded),
            "wanted_bytes": self.wanted_bytes,
            "registry_body_bytes": self.sent.blob_bytes,
            "registry_interface_bytes": self.interface_bytes,
            "requests": {
                "tag_gets": requests.tags.gets,
                "tag_heads": requests.tags.heads,
                "manifest_gets": requests.manifests.gets,
                "manifest_heads": requests.manifests.heads,
                "blob_gets": requests.blobs.gets,
                "blob_heads": requests.blobs.heads,
                "blobs_answered": self.sent.blob_responses,
                "pings": requests.pings,
                "other": requests.other,
                "unauthorized": self.sent.unauthorized,
            },
            "peer_bytes": self.peer_bytes,
            "cpu_s": rounded(self.cpu),
            "cpu_kernel_s": rounded(self.cpu_kernel),
            "own_share": rounded(self.own_share),
            "machine_share": rounded(self.machine_share),
            "busy": self.busy().json(),
        });
        extend(&mut line, figures.json());
        extend(&mut line, Value::Object(self.extra.clone()));
        line
    }
}

impl Figures {
    /// Medians, figure by figure; None of nothing.
    #[must_use]
    pub fn medians(of: &[Self]) -> Option<Self> {
        let required = |get: fn(&Self) -> f64| median(&of.iter().map(get).collect::<Vec<_>>());
        let optional = |get: fn(&Self) -> Option<f64>| median(&of.iter().filter_map(get).collect::<Vec<_>>());
        Some(Self {
            last: required(|it| it.last)?,
            median: required(|it| it.median)?,
            first_byte: optional(|it| it.first_byte),
            bound: optional(|it| it.bound),
            registry_share: required(|it| it.registry_share)?,
            interface_share: required(|it| it.interface_share)?,
            cpu_per_gib: optional(|it| it.cpu_per_gib),
            peak_mib: optional(|it| it.peak_mib),
        })
    }

    /// As fields of a line.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "last_s": rounded(self.last),
            "median_s": rounded(self.median),
            "bound_s": self.bound.map(rounded),
            "last_ratio": self.bound.map(|bound| rounded(self.last / bound)),
            "median_ratio": self.bound.map(|bound| rounded(self.median / bound)),
            "first_byte_s": self.first_byte.map(rounded),
            "registry_share": rounded(self.registry_share),
            "interface_share": rounded(self.interface_share),
            "cpu_s_per_gib_from_peers": self.cpu_per_gib.map(rounded),
            "peak_rss_mib": self.peak_mib.map(rounded),
        })
    }

    /// These over those of another, as fields of a line: below 1 where this is better.
    #[must_use]
    pub fn over(&self, other: &Self) -> Value {
        json!({
            "last": rounded(self.last / other.last),
            "median": rounded(self.median / other.median),
            "first_byte_later_s": self.first_byte.zip(other.first_byte).map(|(own, other)| rounded(own - other)),
            "registry_interface_bytes": rounded(self.interface_share / other.interface_share),
        })
    }
}

/// The middle, or the mean of the two in the middle; None of nothing.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = if sorted.len().is_multiple_of(2) { sorted[sorted.len() / 2 - 1] } else { upper };
    Some(f64::midpoint(lower, upper))
}

/// Puts the keys of one object into another.
pub fn extend(into: &mut Value, from: Value) {
    if let (Some(into), Value::Object(from)) = (into.as_object_mut(), from) {
        into.extend(from);
    }
}

/// To a tenth of a thousandth: what is behind that is noise, and hard to read.
#[must_use]
pub fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MB: u64 = 1_000_000;

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-9
    }

    #[test]
    fn the_slowest_of_three_bounds_counts() {
        let links = |source, down, ups: &[f64]| Links { source, down, ups: ups.to_vec() };
        // 8 Mb at 8 Mb/s.
        let second = 1.0 / GOODPUT;
        assert!(near(links(8.0, 80.0, &[80.0; 4]).fluid_bound(MB), second), "the source sends it once");
        assert!(near(links(80.0, 8.0, &[80.0; 4]).fluid_bound(MB), second), "each node receives it");
        // Four copies over 8 + 4 x 2 Mb/s.
        assert!(
            near(links(8.0, 80.0, &[2.0; 4]).fluid_bound(MB), 4.0 * 8.0 / 16.0 / GOODPUT),
            "uplinks carry a copy each"
        );
        // One node alone: its uplink is of no use to it.
        assert!(near(links(8.0, 8.0, &[8.0]).fluid_bound(MB), second));
    }

    #[test]
    fn slow_uplinks_count_as_what_they_are() {
        let mut ups = vec![100.0; 14];
        ups.extend([25.0; 2]);
        let links = Links { source: 100.0, down: 100.0, ups };
        // 16 copies over 100 + 1450 Mb/s is slower than one over 100.
        assert!(near(links.fluid_bound(MB), 16.0 * 8.0 / 1550.0 / GOODPUT));
    }

    #[test]
    fn a_late_start_moves_the_bound_only_where_it_is_the_slowest() {
        let links = Links { source: 8.0, down: 80.0, ups: vec![80.0; 4] };
        let fluid = links.fluid_bound(MB);
        assert!(near(links.bound(MB, 0.0), fluid));
        assert!(near(links.bound(MB, 0.5), fluid), "0.5 s and a tenth of a second for the last node");
        assert!(near(links.bound(MB, 3.0), 3.0 + 0.1 / GOODPUT));
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn above_four_fifths_the_machine_was_busy_and_somebody_is_to_blame() {
        assert_eq!(Busy::of(0.8, 0.8), Busy::No);
        assert_eq!(Busy::of(0.81, 0.9), Busy::Own);
        assert_eq!(Busy::of(0.5, 0.81), Busy::Others);
    }

    fn measured(since: Since) -> Measured {
        let times = |began, ended, first_byte| Times { began, ended, first_byte: Some(first_byte) };
        Measured {
            times: vec![times(0.0, 4.0, 0.1), times(1.0, 6.0, 0.3), times(3.0, 5.0, 0.2)],
            since,
            bound: Some(4.0),
            wanted_bytes: 100,
            sent: Sent { blob_bytes: 102, ..Sent::default() },
            interface_bytes: 110,
            cpu: 1.0,
            cpu_kernel: 0.25,
            peak_memory_bytes: Some(3 << 20),
            peer_bytes: Some(1 << 29),
            own_share: 0.5,
            machine_share: 0.6,
            extra: serde_json::Map::new(),
        }
    }

    #[test]
    fn times_count_from_where_they_are_said_to() {
        let first = measured(Since::FirstStart).figures();
        assert_eq!((first.last, first.median, first.first_byte), (6.0, 5.0, Some(0.2)));
        let own = measured(Since::OwnStart).figures();
        assert_eq!((own.last, own.median, own.first_byte), (5.0, 4.0, Some(0.2)));
    }

    #[test]
    fn a_line_has_ratios_beside_the_figures() {
        let line = measured(Since::FirstStart).json();
        assert_eq!(line["last_ratio"], json!(1.5));
        assert_eq!(line["median_ratio"], json!(1.25));
        assert_eq!(line["registry_share"], json!(1.02));
        assert_eq!(line["interface_share"], json!(1.1));
        assert_eq!(line["cpu_s_per_gib_from_peers"], json!(2.0));
        assert_eq!(line["cpu_kernel_s"], json!(0.25));
        assert_eq!(line["peak_rss_mib"], json!(3.0));
        assert_eq!(line["last_start_s"], json!(3.0));
        assert_eq!(line["busy"], Value::Null);
    }

    #[test]
    fn medians_are_taken_figure_by_figure() {
        let run = |last, first_byte| Figures { last, first_byte, ..Figures::default() };
        let medians = Figures::medians(&[run(3.0, None), run(1.0, Some(5.0)), run(2.0, Some(7.0))]).unwrap();
        assert_eq!((medians.last, medians.first_byte), (2.0, Some(6.0)));
        assert_eq!(Figures::medians(&[]), None);
    }
}
