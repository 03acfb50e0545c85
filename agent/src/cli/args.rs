//! What can be asked for.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::config::{HostPattern, HostPort, scalar};

/// Fewest agents of a demo: with fewer than two there is nobody to share with.
const DEMO_AGENTS_MIN: i64 = 2;

/// Most agents of a demo, each a process of its own on one machine.
const DEMO_AGENTS_MAX: i64 = 64;

/// Ten years, as in Dragonfly v1: this CA is bound to one node and its hosts, and nobody renews it in time.
const CA_DAYS: u32 = 3650;

/// Most days of a CA: beyond a century somebody mistyped.
const CA_DAYS_MAX: i64 = 36_500;

/// Nodes that pull the same image fetch each piece from the registry once between them.
#[derive(Clone, Debug, Parser)]
#[command(name = "darter", version, disable_help_subcommand = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Run the node agent in the foreground, with logs to stderr.
    Agent(AgentArgs),
    /// Run a registry and some agents on loopback, pull through each, and show what came from where.
    Demo(DemoArgs),
    /// Make the CA that the agent signs certificates of hijacked hosts with.
    GenCa(GenCaArgs),
    /// Print a new cluster secret: one line, 32 random bytes in base64.
    Secret,
    /// Print the defaults, check a file, or import one of Dragonfly v1.
    Config {
        /// Which of them.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Make this node's container runtime pull through its agent.
    Node {
        /// What to do.
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Print the version.
    Version,
}

/// Arguments of `darter agent`.
#[derive(Clone, Debug, clap::Args)]
pub struct AgentArgs {
    /// The configuration file.
    #[arg(long, value_name = "FILE", env = "DARTER_CONFIG")]
    pub config: PathBuf,
}

/// Arguments of `darter demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// How many agents pull.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(DEMO_AGENTS_MIN..=DEMO_AGENTS_MAX))]
    pub agents: u16,
    /// Size of the image, as in 200MiB. Its layers keep their proportions.
    #[arg(long = "size", value_name = "SIZE", value_parser = demo_size)]
    pub size_bytes: Option<u64>,
    /// Print one JSON object as the last line.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `darter gen-ca`.
#[derive(Clone, Debug, clap::Args)]
pub struct GenCaArgs {
    /// The folder for ca.crt and ca.key; made if it is not there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The only hosts that the CA is good for, as in hijack.hosts: names, *.suffix, addresses. Ports are ignored.
    #[arg(long, value_name = "H,...", value_delimiter = ',', required = true)]
    pub hosts: Vec<HostPattern>,
    /// How long it is valid, in days.
    #[arg(long, value_name = "N", default_value_t = CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=CA_DAYS_MAX))]
    pub days: u32,
    /// Replace a CA that is there already; what it signed is then worthless.
    #[arg(long)]
    pub overwrite: bool,
}

/// What `darter config` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every key with its default and the reason for it, as a file to start from.
    Default,
    /// Say OK, or everything that is wrong with a file, with line and column.
    Check {
        /// The file.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Turn a dfdaemon.yml of Dragonfly v1 into a configuration, and say on stderr what could not come along. Run it on
    /// the node that it is for: the files and addresses that it names are looked at.
    Import {
        /// The dfdaemon.yml.
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Where to write it; stdout unless told.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Replace that file if it is there already.
        #[arg(long, requires = "output")]
        overwrite: bool,
    },
}

/// What `darter node` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum NodeCommand {
    /// Write the files with which a runtime pulls through the agent, once a probe through the agent has passed.
    Configure(NodeConfigureArgs),
}

/// Arguments of `darter node configure`.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeConfigureArgs {
    /// Whose files.
    #[arg(long, value_enum)]
    pub runtime: Runtime,
    /// The agent's configuration.
    #[arg(long, value_name = "FILE", env = "DARTER_CONFIG", default_value = "/etc/darter/config.yaml")]
    pub config: PathBuf,
    /// A registry, may be repeated; those of the agent's configuration unless told.
    #[arg(long = "registry", value_name = "HOST")]
    pub registries: Vec<HostPort>,
    /// An image whose manifest is asked for as well before anything is written.
    #[arg(long, value_name = "IMAGE")]
    pub probe: Option<String>,
    /// Write without asking the agent first.
    #[arg(long, conflicts_with = "probe")]
    pub force: bool,
    /// Put everything back as it was.
    #[arg(long, conflicts_with_all = ["registries", "probe", "force"])]
    pub undo: bool,
    /// Work on the files below this folder.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
}

/// A container runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Runtime {
    /// containerd, and with it Kubernetes and nerdctl.
    Containerd,
    /// dockerd.
    Docker,
    /// CRI-O; podman, buildah and skopeo read the same files.
    Crio,
}

impl Runtime {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Crio => "crio",
        }
    }
}

fn demo_size(text: &str) -> Result<u64, String> {
    scalar::size(text).and_then(|bytes| if bytes == 0 { Err("an image has some bytes".to_owned()) } else { Ok(bytes) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Args::try_parse_from(line.split_whitespace()).map(|args| args.command)
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn commands_are_parsed() {
        let Command::Agent(agent) = parse("darter agent --config /etc/darter/config.yaml").unwrap() else { panic!() };
        assert_eq!(agent.config, PathBuf::from("/etc/darter/config.yaml"));
        let Command::Demo(demo) = parse("darter demo").unwrap() else { panic!() };
        assert_eq!((demo.agents, demo.size_bytes, demo.json), (3, None, false));
        let Command::Demo(demo) = parse("darter demo --agents 5 --size 10MiB --json").unwrap() else { panic!() };
        assert_eq!((demo.agents, demo.size_bytes, demo.json), (5, Some(10 << 20), true));
        let Command::GenCa(ca) = parse("darter gen-ca --out d --hosts a.org,*.b.org,10.0.0.1:5000").unwrap() else {
            panic!()
        };
        assert_eq!((ca.days, ca.overwrite, ca.hosts.len()), (3650, false, 3));
        assert_eq!(ca.hosts[1].to_string(), "*.b.org");
        assert!(matches!(parse("darter secret").unwrap(), Command::Secret));
        assert!(matches!(parse("darter version").unwrap(), Command::Version));
        let check = parse("darter config check f.yaml").unwrap();
        assert!(
            matches!(check, Command::Config { command: ConfigCommand::Check { file } } if file.as_os_str() == "f.yaml")
        );
        let import = parse("darter config import d.yml --output c.yaml").unwrap();
        let Command::Config { command: ConfigCommand::Import { file, output, overwrite } } = import else { panic!() };
        assert_eq!((file, output, overwrite), (PathBuf::from("d.yml"), Some(PathBuf::from("c.yaml")), false));
        assert!(matches!(parse("darter config default").unwrap(), Command::Config { command: ConfigCommand::Default }));
    }

    #[test]
    fn wrong_arguments_are_usage_errors() {
        for line in [
            "darter",
            "darter agnet",
            "darter demo --agents 1",
            "darter demo --agents 65",
            "darter demo --size 10Gi",
            "darter demo --size 0",
            "darter gen-ca --out d",
            "darter gen-ca --out d --hosts",
            "darter gen-ca --out d --hosts a..b",
            "darter gen-ca --out d --hosts a --days 0",
            "darter gen-ca --hosts a",
            "darter config",
            "darter config check",
            "darter config import",
            "darter node configure",
            "darter node configure --runtime rkt",
            "darter node configure --runtime crio --registry ../..",
            "darter node configure --runtime crio --undo --force",
            "darter config import f.yml --overwrite",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), i32::from(crate::cli::EXIT_USAGE), "{line}");
        }
    }
}
