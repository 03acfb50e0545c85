//! Builds the agent and the lab, and runs the lab.

use std::os::unix::fs::MetadataExt as _;

use anyhow::Result;

use crate::step::{cargo, succeed};

/// `args` go to the lab.
pub(crate) fn run(args: &[&str]) -> Result<()> {
    // Without root the lab only says so, which does not take an agent.
    if std::fs::metadata("/proc/self")?.uid() == 0 {
        succeed(cargo()?.args(["build", "--release", "--locked", "-p", "darter-agent", "--bin", "darter"]))?;
    }
    let mut lab = cargo()?;
    lab.args(["run", "--quiet", "--release", "--locked", "-p", "chaos-tests", "--bin", "lab", "--"]).args(args);
    succeed(&mut lab)
}
