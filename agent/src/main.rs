//! `darter`: the command line. Each subcommand is a function of the library.

use std::process::ExitCode;

use clap::Parser as _;
use darter_agent::app::activation;
use darter_agent::cli::{self, Args, Command, ConfigCommand, NodeCommand};
use darter_agent::config::Config;
use darter_agent::{app, demo};

fn main() -> ExitCode {
    let args = Args::parse();
    match args.command {
        Command::Agent(args) => agent(&args),
        Command::Demo(args) => demonstrate(&args),
        Command::GenCa(args) => match cli::keys::gen_ca(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => cli::fail(&format!("{:#}", anyhow::Error::from(error))),
        },
        Command::Secret => match cli::keys::secret() {
            Ok(secret) => cli::print(&secret),
            Err(error) => cli::fail(&format!("{:#}", anyhow::Error::from(error))),
        },
        Command::Config { command: ConfigCommand::Default } => cli::config::default(),
        Command::Config { command: ConfigCommand::Check { file } } => cli::config::check(&file),
        Command::Config { command: ConfigCommand::Import { file, output, overwrite } } => {
            cli::config::import(&file, output.as_deref(), overwrite)
        }
        Command::Node { command: NodeCommand::Configure(args) } => {
            match block_on(async { Ok(cli::node::configure(&args).await?) }) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => cli::fail(&format!("{error:#}")),
            }
        }
        Command::Version => cli::print(&cli::version()),
    }
}

/// Runs the agent. A configuration that cannot be used exits with 2 before anything is started.
fn agent(args: &cli::AgentArgs) -> ExitCode {
    let loaded = Config::load(&args.config, cli::config::variables()).and_then(|config| {
        // Before any thread is there.
        let passed = activation::take(config.proxy.listen)
            .map_err(|error| config.problems(vec![config.problem("proxy.listen", error.to_string())]))?;
        config.try_listeners(passed.as_ref())?;
        Ok((config, passed))
    });
    let (config, passed) = match loaded {
        Ok(loaded) => loaded,
        Err(problems) => {
            return cli::refuse(&problems.to_string());
        }
    };
    if let Err(error) = app::telemetry::init() {
        return cli::refuse(&error);
    }
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    match block_on(app::run(config, passed)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => cli::fail(&format!("{error:#}")),
    }
}

/// Shows the job being done. Anything wrong is exit code 1.
fn demonstrate(args: &cli::DemoArgs) -> ExitCode {
    let options = demo::Options {
        agents: usize::from(args.agents),
        size_bytes: args.size_bytes.unwrap_or(demo::SIZE_BYTES),
        json: args.json,
    };
    match block_on(async { Ok(demo::run(options).await?) }) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(cli::EXIT_FAILED),
        Err(error) => cli::fail(&format!("{error:#}")),
    }
}

/// One thread for so many cores runs what does not block: an agent is a guest on its node, and work that is handed about between
/// more threads costs more (16 agents on two cores: 93 thousand context switches in a pull with two threads each, 74 with one).
const CORES_PER_WORKER: usize = 2;

/// The most of them. What takes long, as hashing large pieces and files, has threads of its own.
const WORKERS_MAX: usize = 8;

/// Runs a future, and what it spawns.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = (cores / CORES_PER_WORKER).clamp(1, WORKERS_MAX);
    tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?.block_on(future)
}
