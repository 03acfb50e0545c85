//! The gate, cheapest step first.

use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::step::{cargo, succeed};
use crate::{deny, fence, tidy};

type Step = (&'static str, fn() -> Result<()>);

const STEPS: [Step; 6] = [
    ("fmt", fmt),
    ("tidy", tidy::check),
    ("fence", fence::check),
    ("clippy", clippy),
    ("docs", docs),
    ("deny", deny::check),
];

/// Runs all steps, or the one that is named.
pub(crate) fn run(only: Option<&str>) -> Result<()> {
    let steps: Vec<&Step> = STEPS.iter().filter(|(name, _)| only.is_none_or(|only| only == *name)).collect();
    if steps.is_empty() {
        bail!("no such step; there are {}", STEPS.map(|(name, _)| name).join(", "));
    }
    for (name, check) in steps {
        let start = Instant::now();
        println!("ci {name} ...");
        check().with_context(|| format!("ci {name} failed"))?;
        println!("ci {name} ... ok ({:.1} s)", start.elapsed().as_secs_f64());
    }
    Ok(())
}

fn fmt() -> Result<()> {
    succeed(cargo()?.args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    succeed(cargo()?.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))
}

fn docs() -> Result<()> {
    let mut doc = cargo()?;
    succeed(doc.args(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"))
}
