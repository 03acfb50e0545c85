//! The suite as a program.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use hyper::Uri;
use hyper::header::HeaderValue;

use super::{Outcome, Subject, Target, run, trust};

/// Holds the value of an `Authorization` header, which would be seen by others on the command line.
const AUTHORIZATION: &str = "CONFORMANCE_AUTHORIZATION";

/// Asks a registry everything that the distribution specification has, and says what it makes of it. Pushes to repositories
/// below `conformance/`, unless an image is named.
#[derive(Debug, Parser)]
#[command(name = "conformance")]
struct Args {
    /// The registry, `https://registry.example.org` or `http://127.0.0.1:5000`; or a mirror.
    base: Uri,
    /// A proxy to go through, `http://127.0.0.1:65001`.
    #[arg(long)]
    proxy: Option<Uri>,
    /// Which registry a mirror is asked for, as containerd says it.
    #[arg(long)]
    ns: Option<String>,
    /// Certificates to trust instead of this host's, in PEM.
    #[arg(long)]
    ca: Option<PathBuf>,
    /// An image to read, `repository:tag`; nothing is pushed.
    #[arg(long, conflicts_with_all = ["seed", "repository"])]
    image: Option<String>,
    /// What the pushed content follows from; another one for every run, unless it is said.
    #[arg(long)]
    seed: Option<String>,
    /// Where it is pushed to, `conformance/` and the seed unless it is said.
    #[arg(long)]
    repository: Option<String>,
    /// Prints all answers as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the suite as `arguments`, of which the first is the program's name, want it. Fails where anything is otherwise than
/// specified; with `--json` the verdicts are for whoever reads them to judge.
///
/// # Errors
/// If the suite cannot begin.
pub async fn main(arguments: impl IntoIterator<Item = String>) -> Result<ExitCode> {
    let args = match Args::try_parse_from(arguments) {
        Ok(args) => args,
        Err(error) => {
            error.print()?;
            return Ok(if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS });
        }
    };
    let pem = args.ca.as_ref().map(std::fs::read).transpose().context("cannot read the certificates")?;
    let authorization = std::env::var(AUTHORIZATION).ok().map(|value| {
        let mut value = HeaderValue::try_from(value)?;
        value.set_sensitive(true);
        anyhow::Ok(value)
    });
    ensure!(args.base.authority().is_some(), "{} is no URL of a registry", args.base);
    let target = Target {
        base: args.base,
        proxy: args.proxy,
        namespace: args.ns,
        tls: trust(pem.as_deref())?,
        authorization: authorization.transpose()?,
    };
    let subject = if let Some(image) = args.image {
        let (repository, tag) = image.rsplit_once(':').context("an image is repository:tag")?;
        Subject::There(repository.to_owned(), tag.to_owned())
    } else {
        let seed = args.seed.unwrap_or_else(|| format!("{:08x}", rand::random::<u32>()));
        let repository = args.repository.unwrap_or_else(|| format!("conformance/{seed}"));
        Subject::Pushed { seed, repository }
    };
    let verdicts = run(&target, &subject).await?;
    if args.json {
        println!("{}", serde_json::to_string(&verdicts)?);
        return Ok(ExitCode::SUCCESS);
    }
    for verdict in &verdicts {
        println!("{verdict}");
    }
    let count = |of: fn(&Outcome) -> bool| verdicts.iter().filter(|verdict| of(&verdict.outcome)).count();
    let violations = count(|outcome| matches!(outcome, Outcome::Violates(_)));
    let conforming = count(|outcome| *outcome == Outcome::Conforms);
    println!("{conforming} conform, {} not supported, {violations} violate", verdicts.len() - conforming - violations);
    Ok(if violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
