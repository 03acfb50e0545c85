//! What the benchmark is asked for. Everything that is wrong with a command line is said at once.

use std::path::PathBuf;
use std::time::Duration;

use super::contestants::Contestant;
use crate::lab::netns::CONGESTION;

/// How it is called.
pub const USAGE: &str = "\
usage: cargo xtask bench MODE [OPTION...]          as root; one JSON line per run

modes
  cold      nobody has the image, all nodes begin together
  warm      a neighbour has it
  single    one node, nobody else
  rolling   nodes begin in waves, each when the one before it is done
  fail      two agents are killed in the middle, one of them a fetcher; beside it the same undisturbed
  small     a small image
  slow      two uplinks have a quarter of the rate, other two in every run
  partial   all nodes ask for the last layer only, as those that hold the others

options
  --nodes N            nodes that pull
  --rate MBPS          every node's link, in each direction
  --registry-rate MBPS the registry's
  --congestion NAME    what everybody's TCP regulates its rate by: cubic, bbr, or what else the kernel has
  --image LAYERS       as 8x16M, or 40K,2x1M,3M
  --runs N             runs of each contestant; they take turns
  --against LIST       of direct, aria2, rqbit; or none
  --seed N             of the image and of who is picked
  --spread MS          clients begin at random moments within it
  --wave N             nodes that begin together (rolling)
  --repeats N          how often a run is repeated that found the machine busy
  --json               nothing but the JSON lines
  --darter FILE        the agent
  --tools DIR          where rqbit is, besides PATH";

/// Nodes that a run may have: a router of the lab has 254 ports, and one is the registry's.
const NODES_MAX: usize = 250;

/// The largest rate of a link, in Mb/s; no machine shapes more for several nodes.
const RATE_MAX: u32 = 10_000;

/// The most layers of an image, as docker has it.
const LAYERS_MAX: usize = 127;

/// The largest layer: images are made in memory.
const LAYER_BYTES_MAX: usize = 4 << 30;

/// The most runs, repeats, and nodes of a wave.
const COUNT_MAX: usize = 1000;

/// The longest that starts may be apart, in milliseconds.
const SPREAD_MAX: u64 = 60_000;

/// The fewest nodes with which there is somebody left once two are killed or slow.
const NODES_MIN_OF_TWO: usize = 4;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nobody has the image.
    Cold,
    /// A neighbour has it.
    Warm,
    /// One node.
    Single,
    /// In waves.
    Rolling,
    /// Two agents die.
    Fail,
    /// A small image.
    Small,
    /// Two slow uplinks.
    Slow,
    /// All but the last layer is there already.
    Partial,
}

impl Mode {
    const ALL: [Self; 8] =
        [Self::Cold, Self::Warm, Self::Single, Self::Rolling, Self::Fail, Self::Small, Self::Slow, Self::Partial];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Single => "single",
            Self::Rolling => "rolling",
            Self::Fail => "fail",
            Self::Small => "small",
            Self::Slow => "slow",
            Self::Partial => "partial",
        }
    }

    /// Whether there is anything to compare with: others have no agents to kill, and what they leave unread is not theirs
    /// to say.
    fn has_others(self) -> bool {
        !matches!(self, Self::Warm | Self::Fail | Self::Partial)
    }

    fn image(self) -> &'static str {
        match self {
            Self::Small => "40K,160K,512K,1M,2M,3M",
            Self::Partial => "10x8M",
            _ => "8x16M",
        }
    }
}

/// Whom the agents are compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Against {
    /// With these, which have to be there.
    Named(Vec<Contestant>),
    /// With those of these that are installed.
    Installed(Vec<Contestant>),
}

/// What is asked for, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What is measured.
    pub mode: Mode,
    /// Nodes that pull.
    pub nodes: usize,
    /// Their links, in Mb/s in each direction.
    pub rate: u32,
    /// The registry's.
    pub registry_rate: u32,
    /// What everybody's TCP regulates its rate by, as the kernel calls it.
    pub congestion: String,
    /// Sizes of the image's layers.
    pub layers_bytes: Vec<usize>,
    /// Runs of each contestant.
    pub runs: usize,
    /// Who else runs.
    pub against: Against,
    /// Seed of the image and of every choice.
    pub seed: u64,
    /// Clients begin within it.
    pub spread: Duration,
    /// Nodes that begin together, where they do it in waves.
    pub wave: usize,
    /// How often a run is repeated that found the machine busy.
    pub repeats: usize,
    /// Whether nothing is printed but JSON.
    pub json: bool,
    /// The agent, where it is not beside this program.
    pub darter: Option<PathBuf>,
    /// Where tools are besides PATH.
    pub tools: Option<PathBuf>,
}

impl Settings {
    /// Reads a command line; an error is everything that is wrong with it.
    pub fn parse(args: &[String]) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let mode = match args.first() {
            None => Err("no mode is given".to_owned()),
            Some(name) => {
                Mode::ALL.into_iter().find(|mode| mode.name() == name).ok_or(format!("there is no mode {name}"))
            }
        };
        let given = Given::read(args.get(1..).unwrap_or_default(), &mut problems);
        let mode = match mode {
            Ok(mode) => mode,
            Err(problem) => {
                problems.insert(0, problem);
                // What is left to find is wrong in any mode.
                Mode::Cold
            }
        };
        let settings = given.settle(mode, &mut problems);
        if problems.is_empty() { Ok(settings) } else { Err(problems) }
    }

    /// Bytes of all layers.
    #[must_use]
    pub fn layers_sum_bytes(&self) -> u64 {
        self.layers_bytes.iter().map(|bytes| *bytes as u64).sum()
    }
}

/// What was given, in its own terms.
#[derive(Default)]
struct Given {
    nodes: Option<usize>,
    rate: Option<u32>,
    registry_rate: Option<u32>,
    congestion: Option<String>,
    layers_bytes: Option<Vec<usize>>,
    runs: Option<usize>,
    against: Option<Vec<Contestant>>,
    seed: Option<u64>,
    spread: Option<u64>,
    wave: Option<usize>,
    repeats: Option<usize>,
    json: bool,
    darter: Option<PathBuf>,
    tools: Option<PathBuf>,
}

impl Given {
    fn read(args: &[String], problems: &mut Vec<String>) -> Self {
        let mut given = Self::default();
        let mut seen = Vec::new();
        let mut args = args.iter();
        while let Some(option) = args.next() {
            if seen.contains(&option) {
                problems.push(format!("{option} is given twice"));
            }
            seen.push(option);
            if option == "--json" {
                given.json = true;
                continue;
            }
            if !OPTIONS.contains(&option.as_str()) {
                problems.push(format!("there is no option {option}"));
                continue;
            }
            match args.next() {
                Some(value) => problems.extend(given.set(option, value).err()),
                None => problems.push(format!("{option} wants a value")),
            }
        }
        given
    }

    fn set(&mut self, option: &str, value: &str) -> Result<(), String> {
        match option {
            "--nodes" => self.nodes = Some(number(option, value, 1, NODES_MAX)?),
            "--rate" => self.rate = Some(number(option, value, 1, RATE_MAX)?),
            "--registry-rate" => self.registry_rate = Some(number(option, value, 1, RATE_MAX)?),
            "--congestion" => self.congestion = Some(value.to_owned()),
            "--image" => self.layers_bytes = Some(layers(value)?),
            "--runs" => self.runs = Some(number(option, value, 1, COUNT_MAX)?),
            "--against" => self.against = Some(contestants(value)?),
            "--seed" => self.seed = Some(number(option, value, 0, u64::MAX)?),
            "--spread" => self.spread = Some(number(option, value, 0, SPREAD_MAX)?),
            "--wave" => self.wave = Some(number(option, value, 1, COUNT_MAX)?),
            "--repeats" => self.repeats = Some(number(option, value, 0, COUNT_MAX)?),
            "--darter" => self.darter = Some(value.into()),
            _ => self.tools = Some(value.into()),
        }
        Ok(())
    }

    fn settle(self, mode: Mode, problems: &mut Vec<String>) -> Settings {
        let nodes = self.nodes.unwrap_or(if mode == Mode::Single { 1 } else { 16 });
        if mode == Mode::Single && nodes != 1 {
            problems.push(format!("--nodes {nodes} is not single"));
        }
        if mode == Mode::Warm && nodes < 2 {
            problems.push("warm wants two nodes at least: one has the image, the others want it".to_owned());
        }
        if matches!(mode, Mode::Fail | Mode::Slow) && nodes < NODES_MIN_OF_TWO {
            problems.push(format!("{} wants {NODES_MIN_OF_TWO} nodes at least: two are picked", mode.name()));
        }
        if mode != Mode::Rolling && self.wave.is_some() {
            problems.push(format!("--wave is for rolling, {} has no waves", mode.name()));
        }
        if mode == Mode::Rolling && self.spread.is_some() {
            problems.push("--spread does not go with rolling: there, a wave begins together".to_owned());
        }
        if !mode.has_others() && self.against.as_ref().is_some_and(|named| !named.is_empty()) {
            problems.push(format!("--against does not go with {}: it is about agents", mode.name()));
        }
        let layers_bytes = self.layers_bytes.or_else(|| layers(mode.image()).ok()).unwrap_or_default();
        if mode == Mode::Partial && layers_bytes.len() < 2 {
            problems.push("partial wants two layers at least: the nodes have all but the last".to_owned());
        }
        Settings {
            mode,
            nodes,
            rate: self.rate.unwrap_or(100),
            registry_rate: self.registry_rate.unwrap_or(100),
            congestion: self.congestion.unwrap_or_else(|| CONGESTION.to_owned()),
            layers_bytes,
            // Slow: so many that each node is slow once.
            runs: self.runs.unwrap_or(if mode == Mode::Slow { nodes.div_ceil(2) } else { 5 }),
            against: self.against.map_or_else(|| usual(mode), Against::Named),
            seed: self.seed.unwrap_or(1),
            spread: Duration::from_millis(self.spread.unwrap_or(0)),
            // A quarter of the usual nodes, about what Kubernetes replaces at once.
            wave: self.wave.unwrap_or(4),
            repeats: self.repeats.unwrap_or(3),
            json: self.json,
            darter: self.darter,
            tools: self.tools,
        }
    }
}

/// Options that have a value.
const OPTIONS: [&str; 13] = [
    "--nodes",
    "--rate",
    "--registry-rate",
    "--congestion",
    "--image",
    "--runs",
    "--against",
    "--seed",
    "--spread",
    "--wave",
    "--repeats",
    "--darter",
    "--tools",
];

fn usual(mode: Mode) -> Against {
    match mode {
        Mode::Cold | Mode::Rolling => Against::Installed(vec![Contestant::Aria2, Contestant::Rqbit]),
        Mode::Single | Mode::Small => Against::Named(vec![Contestant::Direct]),
        Mode::Warm | Mode::Fail | Mode::Slow | Mode::Partial => Against::Named(Vec::new()),
    }
}

fn number<T: std::str::FromStr + PartialOrd + std::fmt::Display>(
    option: &str,
    value: &str,
    min: T,
    max: T,
) -> Result<T, String> {
    match value.parse() {
        Ok(number) if min <= number && number <= max => Ok(number),
        _ => Err(format!("{option} wants a number from {min} to {max}, not {value:?}")),
    }
}

/// `8x16M`, `40K,3M`, `2x1M,100`.
fn layers(text: &str) -> Result<Vec<usize>, String> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (count, size) = part.split_once('x').unwrap_or(("1", part));
        let (digits, shift) = match size.as_bytes().last() {
            Some(b'K') => (&size[..size.len() - 1], 10),
            Some(b'M') => (&size[..size.len() - 1], 20),
            Some(b'G') => (&size[..size.len() - 1], 30),
            _ => (size, 0),
        };
        let bytes = digits.parse::<usize>().ok().and_then(|number| number.checked_mul(1 << shift));
        let bytes = bytes.filter(|bytes| (1..=LAYER_BYTES_MAX).contains(bytes));
        let count = count.parse::<usize>().ok().filter(|count| (1..=LAYERS_MAX).contains(count));
        let (Some(bytes), Some(count)) = (bytes, count) else {
            return Err(format!("--image wants layers as in 8x16M or 40K,3M, not {part:?}"));
        };
        all.extend(std::iter::repeat_n(bytes, count));
    }
    if all.len() > LAYERS_MAX {
        return Err(format!("--image has {} layers, at most {LAYERS_MAX} are possible", all.len()));
    }
    Ok(all)
}

fn contestants(text: &str) -> Result<Vec<Contestant>, String> {
    let mut all = Vec::new();
    for name in text.split(',').filter(|_| text != "none") {
        let contestant = Contestant::OTHERS.into_iter().find(|contestant| contestant.name() == name);
        let contestant = contestant.ok_or(format!("--against wants direct, aria2, rqbit, or none, not {name:?}"))?;
        if all.contains(&contestant) {
            return Err(format!("--against has {name} twice"));
        }
        all.push(contestant);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(line: &str) -> Result<Settings, Vec<String>> {
        Settings::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn every_mode_has_what_the_goals_are_about() {
        let cold = parse("cold").unwrap();
        assert_eq!((cold.nodes, cold.rate, cold.registry_rate, cold.runs), (16, 100, 100, 5));
        assert_eq!(cold.congestion, "cubic");
        assert_eq!((cold.layers_bytes.len(), cold.layers_sum_bytes()), (8, 128 << 20));
        assert_eq!(cold.against, Against::Installed(vec![Contestant::Aria2, Contestant::Rqbit]));
        let small = parse("small").unwrap();
        assert_eq!((small.layers_bytes.len(), small.layers_bytes[0], small.layers_bytes[5]), (6, 40 << 10, 3 << 20));
        assert_eq!(small.against, Against::Named(vec![Contestant::Direct]));
        assert_eq!(parse("single").unwrap().nodes, 1);
        assert_eq!(parse("slow").unwrap().runs, 8, "each of 16 nodes is slow once");
        assert_eq!(parse("partial").unwrap().layers_bytes.len(), 10);
        for mode in Mode::ALL {
            assert_eq!(parse(mode.name()).unwrap().mode, mode);
        }
    }

    #[test]
    fn options_replace_what_is_usual() {
        let line = "cold --nodes 50 --rate 20 --registry-rate 90 --image 1x32M --runs 2 --against direct,rqbit --seed 7 \
                    --spread 1000 --repeats 0 --congestion bbr --json --darter d --tools t";
        let settings = parse(line).unwrap();
        assert_eq!((settings.nodes, settings.rate, settings.registry_rate, settings.runs), (50, 20, 90, 2));
        assert_eq!((settings.layers_bytes, settings.seed, settings.repeats), (vec![32 << 20], 7, 0));
        assert_eq!(settings.against, Against::Named(vec![Contestant::Direct, Contestant::Rqbit]));
        assert_eq!((settings.spread, settings.json), (Duration::from_secs(1), true));
        assert_eq!(settings.congestion, "bbr");
        assert_eq!((settings.darter.unwrap(), settings.tools.unwrap()), (PathBuf::from("d"), PathBuf::from("t")));
        assert_eq!(parse("cold --against none").unwrap().against, Against::Named(Vec::new()));
        assert_eq!(parse("rolling --wave 2").unwrap().wave, 2);
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(layers("2x1M,40K,7").unwrap(), [1 << 20, 1 << 20, 40 << 10, 7]);
        for odd in ["", "x", "0x1M", "1x0M", "128x1", "1T", "1x", "5G", "99999999999999999999G", "-1M"] {
            assert!(layers(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let problems = parse("hot --nodes 0 --colour red --runs").unwrap_err();
        let mentioned = ["hot", "--nodes", "--colour", "red", "--runs"];
        assert_eq!(problems.len(), mentioned.len(), "{problems:?}");
        for (problem, word) in problems.iter().zip(mentioned) {
            assert!(problem.contains(word), "{problem} does not say {word}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        for (line, word) in [
            ("single --nodes 2", "single"),
            ("warm --nodes 1", "two"),
            ("fail --nodes 3", "fail"),
            ("slow --nodes 3", "slow"),
            ("cold --wave 2", "--wave"),
            ("rolling --spread 5", "--spread"),
            ("warm --against aria2", "--against"),
            ("fail --against direct", "--against"),
            ("partial --image 1x8M", "two layers"),
            ("cold --against aria2,aria2", "twice"),
            ("cold --against spegel", "spegel"),
            ("cold --runs 1 --runs 2", "twice"),
            ("", "mode"),
        ] {
            let problems = parse(line).unwrap_err();
            assert!(problems.len() == 1 && problems[0].contains(word), "{line}: {problems:?}");
        }
    }
}
