//! What can be asked of the simulator.

use std::time::Duration;

use clap::Args;
use darter_tracker::{Geometry, PieceSize, PieceSizeRule};
use serde::{Deserialize, Serialize};

/// Nodes that can be simulated: what a cluster's members are encoded for, and what fits into memory.
pub const NODES_MAX: u32 = 20_000;

/// A pull, and what happens meanwhile. Rates are in bits per second, sizes in bytes; both take `k`, `M`, `G` and `Ki`, `Mi`,
/// `Gi` with an optional unit behind.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// Nodes that pull the image at the same time
    #[arg(long, default_value_t = 1000)]
    pub nodes: u32,
    /// Size of the image
    #[arg(long, default_value = "1GiB", value_parser = size)]
    pub image: u64,
    /// Layers of equal size that the image has
    #[arg(long, default_value_t = 1)]
    pub layers: u16,
    /// Layers that a client reads at a time
    #[arg(long, default_value_t = 3)]
    pub readers: u16,
    /// Layers behind those that its node begins before the client asks for them
    #[arg(long, default_value_t = 3)]
    pub ahead: u16,
    /// Size of a piece, instead of what the agent would choose
    #[arg(long, value_parser = size)]
    pub piece: Option<u64>,
    /// Rate of every node's link, in each direction
    #[arg(long, default_value = "1G", value_parser = size)]
    pub rate: u64,
    /// Rate of the registry's link
    #[arg(long, default_value = "1G", value_parser = size)]
    pub registry_rate: u64,
    /// Time that a message takes between two nodes
    #[arg(long, default_value = "500us", value_parser = humantime::parse_duration)]
    pub latency: Duration,
    /// Time that the registry takes to answer a request
    #[arg(long, default_value = "5ms", value_parser = humantime::parse_duration)]
    pub registry_latency: Duration,
    /// Share of messages that are lost and have to be sent again
    #[arg(long, default_value_t = 0.0)]
    pub loss: f64,
    /// Time within which the nodes begin
    #[arg(long, default_value = "50ms", value_parser = humantime::parse_duration)]
    pub join: Duration,
    /// Share of nodes whose way out has a quarter of the rate
    #[arg(long, default_value_t = 0.0)]
    pub slow: f64,
    /// Nodes that are killed when the first has half of the image
    #[arg(long, default_value_t = 0)]
    pub kill: u32,
    /// Nodes that freeze for 20 s when the first has half of the image
    #[arg(long, default_value_t = 0)]
    pub freeze: u32,
    /// Share of nodes that give wrong bytes
    #[arg(long, default_value_t = 0.0)]
    pub lying: f64,
    /// Share of nodes that take requests and give nothing
    #[arg(long, default_value_t = 0.0)]
    pub lazy: f64,
    /// Views of the membership that disagree: each lacks the homes of those before it
    #[arg(long, default_value_t = 1)]
    pub views: u32,
    /// Requests that the registry serves at a time; beyond it answers 429
    #[arg(long)]
    pub registry_requests_max: Option<u32>,
    /// Share of registry requests that fail with 503
    #[arg(long, default_value_t = 0.0)]
    pub registry_errors: f64,
    /// What everything random is drawn from
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

impl Scenario {
    /// Everything that is wrong with it.
    ///
    /// # Errors
    /// One line per problem, naming the option.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut problems = Vec::new();
        let mut expect = |good: bool, problem: &str| {
            if !good {
                problems.push(problem.to_owned());
            }
        };
        expect((1..=NODES_MAX).contains(&self.nodes), &format!("--nodes: 1 to {NODES_MAX}"));
        expect(
            self.layers >= 1 && u64::from(self.layers) <= self.image,
            "--layers: at least 1, of at least a byte each",
        );
        expect(self.readers >= 1, "--readers: at least 1");
        expect(self.image >= 1 && self.geometry().is_some(), "--image, --piece: a layer has 1 to 65536 pieces");
        expect(self.piece.is_none_or(|bytes| piece_size(bytes).is_some()), "--piece: 4KiB to 16MiB");
        // Below this a chunk takes longer than a request may.
        expect(self.rate >= 100_000, "--rate: at least 100k");
        expect(self.registry_rate >= 100_000, "--registry-rate: at least 100k");
        for (name, share) in [("--loss", self.loss), ("--registry-errors", self.registry_errors)] {
            expect((0.0..=0.9).contains(&share), &format!("{name}: 0 to 0.9"));
        }
        for (name, share) in [("--slow", self.slow), ("--lying", self.lying), ("--lazy", self.lazy)] {
            expect((0.0..=1.0).contains(&share), &format!("{name}: 0 to 1"));
        }
        expect(self.lying + self.lazy <= 1.0, "--lying, --lazy: together at most 1");
        expect(self.kill.saturating_add(self.freeze) < self.nodes, "--kill, --freeze: one node is left alone");
        expect((1..=8).contains(&self.views) && self.views <= self.nodes, "--views: 1 to 8, no more than nodes");
        expect(self.registry_requests_max != Some(0), "--registry-requests-max: at least 1");
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// How a layer is cut; `None` if it cannot be.
    #[must_use]
    pub fn geometry(&self) -> Option<Geometry> {
        let length = self.image / u64::from(self.layers.max(1));
        let size = match self.piece {
            Some(bytes) => piece_size(bytes)?,
            None => PieceSizeRule::Auto.piece_size(length),
        };
        Geometry::new(length, size).ok()
    }

    /// Bytes of all layers: what a client reads.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.image / u64::from(self.layers) * u64::from(self.layers)
    }
}

fn piece_size(bytes: u64) -> Option<PieceSize> {
    PieceSize::new(u32::try_from(bytes).ok()?)
}

/// A number with a unit: `1GiB`, `100Mb`, `512k`.
fn size(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(['b', 'B']);
    number.parse::<bytesize::ByteSize>().map(|size| size.as_u64()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        scenario: Scenario,
    }

    fn parse(args: &[&str]) -> Scenario {
        Line::try_parse_from(std::iter::once(&"sim").chain(args)).expect("these are good options").scenario
    }

    #[test]
    fn sizes_and_rates_have_units() {
        let scenario = parse(&["--image", "64MiB", "--rate", "100Mb", "--registry-rate", "1G", "--piece", "512Ki"]);
        assert_eq!((scenario.image, scenario.rate, scenario.registry_rate), (64 << 20, 100_000_000, 1_000_000_000));
        assert_eq!(
            (scenario.piece, scenario.geometry().map(|geometry| geometry.pieces())),
            (Some(512 << 10), Some(128))
        );
    }

    #[test]
    fn all_problems_are_told_at_once() {
        assert_eq!(parse(&[]).check(), Ok(()));
        let bad = parse(&["--nodes", "0", "--slow", "2", "--kill", "5", "--piece", "1", "--views", "9"]);
        let problems = bad.check().expect_err("it is bad");
        let named: Vec<&str> = problems.iter().filter_map(|problem| problem.split([':', ',']).next()).collect();
        assert_eq!(named, ["--nodes", "--image", "--piece", "--slow", "--kill", "--views"]);
    }
}
