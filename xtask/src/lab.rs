//! Builds the agent and the lab or the benchmark, and runs that.

use std::os::unix::fs::MetadataExt as _;

use anyhow::Result;

use crate::step::{cargo, succeed};

/// `program` is `lab` or `bench`, and gets `args`.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<()> {
    // Without root they only say so, which does not take an agent.
    if std::fs::metadata("/proc/self")?.uid() == 0 {
        succeed(cargo()?.args(["build", "--release", "--locked", "-p", "darter-agent", "--bin", "darter"]))?;
    }
    let mut run = cargo()?;
    run.args(["run", "--quiet", "--release", "--locked", "-p", "chaos-tests", "--bin", program, "--"]).args(args);
    succeed(&mut run)
}
