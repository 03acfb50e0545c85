//! What a demonstration found: who got how much from where, and whether all is as it should be.
//!
//! Sums and judgements alone; it asks nobody anything. The text is for people, the JSON object is a contract.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

/// The most that the registry may send, as a multiple of the image. The design's figure for cold nodes.
pub const REGISTRY_OVER_IMAGE_MAX: f64 = 1.02;

/// The most that was on its way when an answer was cut: sent by the registry, read by nobody. The registry's buffers
/// hold less than 200 KiB, the agent's receive buffer is small too.
const CUT_BYTES_MAX: u64 = 1 << 20;

/// With more agents than these, what each got from its peers is one column instead of one for each.
const PEER_COLUMNS_MAX: usize = 6;

/// One agent's part.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AgentReport {
    /// Its name.
    pub name: String,
    /// Blob bytes that it read from the registry, by its own count.
    pub registry_bytes: u64,
    /// Blob bytes that it got from each peer, by the peer's name.
    pub peer_bytes: BTreeMap<String, u64>,
    /// The pull through it while nobody had the image.
    pub cold: Outcome,
    /// The pull through it afterwards.
    pub warm: Outcome,
}

/// How a pull ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything arrived and matched.
    Whole {
        /// How long it took.
        elapsed: Duration,
        /// How many digests were computed and compared.
        digests_checked: usize,
    },
    /// It did not, and why.
    Failed {
        /// The whole chain of causes.
        reason: String,
        /// How long it took to find out.
        elapsed: Duration,
    },
}

impl Default for Outcome {
    fn default() -> Self {
        Self::Failed { reason: "it did not take place".to_owned(), elapsed: Duration::ZERO }
    }
}

impl Outcome {
    /// How long the pull took, whichever way it ended.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        match self {
            Self::Whole { elapsed, .. } | Self::Failed { elapsed, .. } => *elapsed,
        }
    }

    /// Whether everything arrived and matched.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        matches!(self, Self::Whole { .. })
    }

    fn digests(&self) -> String {
        match self {
            Self::Whole { digests_checked, .. } => format!("{digests_checked} ok"),
            Self::Failed { .. } => "failed".to_owned(),
        }
    }
}

/// The whole demonstration. Its text is the table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The agents, in order of their names.
    pub agents: Vec<AgentReport>,
    /// Bytes of the image's blobs.
    pub image_bytes: u64,
    /// Blob body bytes that the registry sent during the cold pulls, by its own count.
    pub registry_bytes: u64,
    /// Answers of those that were cut before their end, after which the two counts cannot be equal.
    pub registry_cuts: u64,
    /// Blob body bytes that the registry sent during the warm pulls, by its own count.
    pub warm_registry_bytes: u64,
}

/// The contract of `--json`.
#[derive(Serialize)]
struct Json<'a> {
    agents: Vec<JsonAgent<'a>>,
    image_bytes: u64,
    registry_bytes: u64,
    registry_over_image: f64,
    warm_registry_bytes: u64,
    ok: bool,
}

#[derive(Serialize)]
struct JsonAgent<'a> {
    name: &'a str,
    registry_bytes: u64,
    peer_bytes: u64,
    seconds: f64,
    ok: bool,
}

impl AgentReport {
    /// Blob bytes from all its peers.
    #[must_use]
    pub fn from_peers(&self) -> u64 {
        self.peer_bytes.values().sum()
    }

    /// Whether both pulls through it went well.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.cold.is_whole() && self.warm.is_whole()
    }
}

impl Report {
    /// What the agents together say they read from the registry.
    #[must_use]
    pub fn agents_registry_bytes(&self) -> u64 {
        self.agents.iter().map(|agent| agent.registry_bytes).sum()
    }

    /// The registry's count of cold bytes as a multiple of the image.
    #[must_use]
    pub fn registry_over_image(&self) -> f64 {
        self.registry_bytes as f64 / self.image_bytes.max(1) as f64
    }

    /// Whether the registry sent what the agents read: the same to the byte, unless answers were cut.
    #[must_use]
    pub fn counts_agree(&self) -> bool {
        let lost = self.registry_bytes.checked_sub(self.agents_registry_bytes());
        lost.is_some_and(|lost| lost <= self.registry_cuts.saturating_mul(CUT_BYTES_MAX))
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.problems().is_empty()
    }

    /// Everything that is wrong, a sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for agent in &self.agents {
            for (which, outcome) in [("cold", &agent.cold), ("warm", &agent.warm)] {
                if let Outcome::Failed { reason, .. } = outcome {
                    problems.push(format!("the {which} pull through {} failed: {reason}", agent.name));
                }
            }
        }
        let (counted, told) = (self.registry_bytes, self.agents_registry_bytes());
        if !self.counts_agree() {
            problems.push(format!("the registry sent {counted} bytes of blobs, the agents say they read {told}"));
        }
        let over = self.registry_over_image();
        if over > REGISTRY_OVER_IMAGE_MAX {
            problems.push(format!("the registry sent {over:.3} x the image, more than {REGISTRY_OVER_IMAGE_MAX} x"));
        }
        if self.warm_registry_bytes > 0 {
            problems.push(format!("the registry sent {} bytes for the warm pulls", self.warm_registry_bytes));
        }
        problems
    }

    /// The object that `--json` ends with, on one line.
    #[must_use]
    pub fn json(&self) -> String {
        let agents = self.agents.iter().map(|agent| JsonAgent {
            name: &agent.name,
            registry_bytes: agent.registry_bytes,
            peer_bytes: agent.from_peers(),
            seconds: thousandths(agent.cold.elapsed().as_secs_f64()),
            ok: agent.ok(),
        });
        let json = Json {
            agents: agents.collect(),
            image_bytes: self.image_bytes,
            registry_bytes: self.registry_bytes,
            // Not rounded: whoever compares it with the bound must come to the same conclusion as `ok`.
            registry_over_image: self.registry_over_image(),
            warm_registry_bytes: self.warm_registry_bytes,
            ok: self.ok(),
        };
        // Plain numbers, texts and a list cannot fail to become JSON.
        serde_json::to_string(&json).unwrap_or_default()
    }

    fn table(&self) -> Vec<Vec<String>> {
        let single = self.agents.len() <= PEER_COLUMNS_MAX;
        let mut head = vec!["agent".to_owned(), "from registry".to_owned()];
        if single {
            head.extend(self.agents.iter().map(|peer| format!("from {}", peer.name)));
        } else {
            head.push("from peers".to_owned());
        }
        head.extend(["cold", "warm", "digests"].map(str::to_owned));
        let mut table = vec![head];
        for agent in &self.agents {
            let mut row = vec![agent.name.clone(), mebibytes(agent.registry_bytes)];
            if single {
                let from = |peer: &AgentReport| agent.peer_bytes.get(&peer.name).copied();
                row.extend(self.agents.iter().map(|peer| from(peer).map_or("-".to_owned(), mebibytes)));
            } else {
                let peers = agent.peer_bytes.values().filter(|&&bytes| bytes > 0).count();
                row.push(format!("{} ({peers})", mebibytes(agent.from_peers())));
            }
            let seconds = |outcome: &Outcome| format!("{:.2} s", outcome.elapsed().as_secs_f64());
            let digests = if agent.ok() { agent.cold.digests() } else { "failed".to_owned() };
            row.extend([seconds(&agent.cold), seconds(&agent.warm), digests]);
            table.push(row);
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = self.table();
        let columns = table.first().map_or(0, Vec::len);
        let width = |column: usize| table.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &table {
            for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if at == 0 {
                    write!(f, "{cell:<width$}")?;
                } else {
                    write!(f, "  {cell:>width$}")?;
                }
            }
            writeln!(f)?;
        }
        writeln!(f)?;
        writeln!(f, "image             {:>12}", mebibytes(self.image_bytes))?;
        let (counted, told) = (self.registry_bytes, self.agents_registry_bytes());
        let agree = match (self.counts_agree(), self.registry_cuts) {
            (true, 0) => "they agree".to_owned(),
            (true, cuts) => format!("they agree, as far as {cuts} cut answers allow"),
            (false, _) => "THEY DIFFER".to_owned(),
        };
        writeln!(f, "registry sent     {:>12}   {counted} bytes by its own count,", mebibytes(counted))?;
        writeln!(f, "agents read       {:>12}   {told} bytes by theirs: {agree}", mebibytes(told))?;
        writeln!(f, "registry / image  {:>12.3}   at most {REGISTRY_OVER_IMAGE_MAX}", self.registry_over_image())?;
        writeln!(
            f,
            "warm              {:>12}   sent by the registry for a second pull",
            mebibytes(self.warm_registry_bytes)
        )?;
        for problem in self.problems() {
            writeln!(f, "WRONG: {problem}")?;
        }
        Ok(())
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn thousandths(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn whole(milliseconds: u64) -> Outcome {
        Outcome::Whole { elapsed: Duration::from_millis(milliseconds), digests_checked: 6 }
    }

    fn report() -> Report {
        let agent = |at: u64| AgentReport {
            name: format!("agent-{at}"),
            registry_bytes: 100 + at,
            peer_bytes: (1..=3).filter(|peer| *peer != at).map(|peer| (format!("agent-{peer}"), 50 * peer)).collect(),
            cold: whole(1234 + at),
            warm: whole(40),
        };
        let agents = vec![agent(1), agent(2), agent(3)];
        Report { agents, image_bytes: 300, registry_bytes: 306, registry_cuts: 0, warm_registry_bytes: 0 }
    }

    fn problems(change: impl FnOnce(&mut Report)) -> Vec<String> {
        let mut report = report();
        change(&mut report);
        let problems = report.problems();
        assert_eq!(report.ok(), problems.is_empty());
        assert_eq!(report.to_string().matches("WRONG: ").count(), problems.len());
        problems
    }

    #[test]
    fn everything_that_is_wrong_is_said() {
        assert!(problems(|_| {}).is_empty());
        assert_eq!(problems(|report| report.registry_bytes = 305).len(), 1);
        // 307 / 300 is more than allowed, and not what the agents say either.
        assert_eq!(problems(|report| report.registry_bytes = 307).len(), 2);
        assert_eq!(problems(|report| report.warm_registry_bytes = 1).len(), 1);
        let failed = || Outcome::Failed { reason: "cut".to_owned(), elapsed: Duration::ZERO };
        assert_eq!(problems(|report| report.agents[1].cold = failed()), ["the cold pull through agent-2 failed: cut"]);
        assert_eq!(problems(|report| report.agents[2].warm = failed()), ["the warm pull through agent-3 failed: cut"]);
        // A demonstration without any outcome has shown nothing.
        assert_eq!(problems(|report| report.agents[0] = AgentReport::default()).len(), 3);
    }

    #[test]
    fn counts_may_differ_by_what_was_cut_and_only_one_way() {
        let with = |registry_bytes, registry_cuts| Report { registry_bytes, registry_cuts, ..report() }.counts_agree();
        assert!(with(306, 0) && with(306, 3));
        assert!(!with(307, 0) && with(307, 1));
        assert!(!with(305, 0) && !with(305, 1));
        assert!(with(306 + CUT_BYTES_MAX, 1) && !with(307 + CUT_BYTES_MAX, 1) && with(307 + CUT_BYTES_MAX, 2));
    }

    #[test]
    fn the_object_has_the_keys_of_the_contract_and_no_others() {
        let json = report().json();
        assert!(!json.contains('\n'));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        let expected = serde_json::json!({
            "agents": [
                {"name": "agent-1", "registry_bytes": 101, "peer_bytes": 250, "seconds": 1.235, "ok": true},
                {"name": "agent-2", "registry_bytes": 102, "peer_bytes": 200, "seconds": 1.236, "ok": true},
                {"name": "agent-3", "registry_bytes": 103, "peer_bytes": 150, "seconds": 1.237, "ok": true},
            ],
            "image_bytes": 300,
            "registry_bytes": 306,
            "registry_over_image": 1.02,
            "warm_registry_bytes": 0,
            "ok": true,
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn the_table_has_a_column_for_each_of_a_few_peers_and_one_for_many() {
        let text = report().to_string();
        let head = text.lines().next().unwrap();
        assert!(head.contains("from agent-1") && head.contains("from agent-3"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("agent-")).count(), 3);
        assert!(text.contains("they agree") && text.contains("1.020"), "{text}");
        let mut many = report();
        many.agents = (0..10).map(|_| many.agents[0].clone()).collect();
        let text = many.to_string();
        assert!(text.lines().next().unwrap().contains("from peers"), "{text}");
        assert!(text.contains("THEY DIFFER"), "{text}");
    }

    #[test]
    fn no_agents_and_no_image_divide_by_nothing() {
        let report = Report::default();
        assert_eq!(report.registry_over_image(), 0.0);
        assert!(!report.to_string().is_empty());
    }
}
