//! The conformance suite against docker-registry: directly, and by every way through an agent, with equal verdicts.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::conformance::{Outcome, Verdict, differences};
use crate::lab::agent::{Cluster, PROXY, Remote};
use crate::lab::netns::Host;
use crate::lab::registry::{Access, Registry};
use crate::lab::world::World;

/// What docker-registry 2.8 does otherwise than specified: it appends a chunk wherever that says it belongs, and answers 500
/// to a layer that is kept elsewhere.
const KNOWN: [&str; 2] = ["blob-chunk-out-of-order", "foreign-layer"];

/// Over HTTPS: through a tunnel that the agent ends, and from the agent as a mirror. The second one of each pushes to another
/// repository what the agents hold already.
pub(super) async fn secure(world: &mut World) -> Result<String> {
    let registry = Registry::start(world, Access::Open).await?;
    let ca = registry.ca.clone().context("a registry without TLS")?;
    let remote = Remote { name: &registry.name, ca: Some(&ca) };
    let cluster = Cluster::start(world, remote, 2, &Value::Null).await?;
    let [first, second] = &cluster.agents[..] else { anyhow::bail!("not two agents") };
    let base = format!("https://{}", registry.name);
    let own = ask(&registry.host, "00000000", "lab/0", &[&base], Some(&ca)).await?;
    let mirror = ["--ns", &registry.name, PROXY];
    let ways = [
        ("CONNECT", first, ["--proxy", PROXY, &base], "00000001", "lab/1"),
        ("mirror", second, mirror, "00000002", "lab/2"),
        ("CONNECT, warm", second, ["--proxy", PROXY, &base], "00000001", "lab/3"),
        ("mirror, warm", first, mirror, "00000002", "lab/4"),
    ];
    for (way, agent, args, seed, repository) in ways {
        let verdicts = ask(&agent.host, seed, repository, &args, Some(&agent.hijack_ca())).await?;
        compare(way, &own, &verdicts)?;
    }
    summary(&own, "by CONNECT and from the mirror, cold and warm")
}

/// Over plain HTTP, where a proxy is given the whole URL.
pub(super) async fn plain(world: &mut World) -> Result<String> {
    let registry = Registry::start(world, Access::Plain).await?;
    let cluster = Cluster::start(world, Remote { name: &registry.name, ca: None }, 2, &Value::Null).await?;
    let base = format!("http://{}", registry.name);
    let own = ask(&registry.host, "00000000", "lab/0", &[&base], None).await?;
    let ways = [("absolute form", "lab/1"), ("absolute form, warm", "lab/2")];
    for ((way, repository), agent) in ways.into_iter().zip(&cluster.agents) {
        let verdicts = ask(&agent.host, "00000001", repository, &["--proxy", PROXY, &base], None).await?;
        compare(way, &own, &verdicts)?;
    }
    summary(&own, "by absolute form, cold and warm")
}

/// Runs the suite on a host: this very program, as for the origin.
async fn ask(host: &Host, seed: &str, repository: &str, args: &[&str], ca: Option<&Path>) -> Result<Vec<Verdict>> {
    let program = std::env::current_exe()?;
    let program = program.to_str().context("the path of this program is not UTF-8")?;
    let mut run = host.run(program).args(["suite", "--json", "--seed", seed, "--repository", repository]).args(args);
    if let Some(ca) = ca {
        run = run.arg("--ca").arg(ca);
    }
    serde_json::from_str(&run.output().await?).context("not what the suite prints")
}

fn compare(way: &str, own: &[Verdict], verdicts: &[Verdict]) -> Result<()> {
    let differences = differences(own, verdicts);
    ensure!(differences.is_empty(), "{way}: {}", differences.join("\n"));
    Ok(())
}

fn summary(own: &[Verdict], ways: &str) -> Result<String> {
    let (mut conforming, mut violating) = (0, Vec::new());
    for verdict in own {
        match &verdict.outcome {
            Outcome::Conforms => conforming += 1,
            Outcome::Unsupported(_) => {}
            Outcome::Violates(_) => violating.push(verdict.case.as_str()),
        }
    }
    ensure!(violating.iter().all(|case| KNOWN.contains(case)), "the registry itself violates {violating:?}");
    let rest = own.len() - conforming - violating.len();
    Ok(format!(
        "{} cases, {conforming} conform, {rest} not supported, the registry violates {violating:?}; equal {ways}",
        own.len()
    ))
}
