//! cargo-deny: licences, sources and bans of dependencies, as `deny.toml` has them.
//!
//! Advisories are not checked here: that takes a database from the network, and a gate that fails on another day with
//! the same source is not a gate.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::step::{cargo, output, root, succeed, target};

/// The version that `deny.toml` was written for; later ones may read it differently.
const VERSION: &str = "0.20.2";

pub(crate) fn check() -> Result<()> {
    let program = install()?;
    succeed(Command::new(program).current_dir(root()?).args(["--locked", "check", "bans", "licenses", "sources"]))
}

/// cargo-deny from the target directory, built on first use.
fn install() -> Result<PathBuf> {
    let tools = target()?.join("tools");
    let program = tools.join("bin/cargo-deny");
    if is_right_version(&program) {
        return Ok(program);
    }
    println!("building cargo-deny {VERSION} into {}, once", tools.display());
    let build = tools.join("build");
    let mut install = cargo()?;
    // Unoptimised it builds in half the time, and still checks in a few seconds.
    install.args(["install", "cargo-deny", "--locked", "--debug", "--force", "--version", VERSION]);
    install.arg("--root").arg(&tools).env("CARGO_TARGET_DIR", &build).env("CARGO_PROFILE_DEV_DEBUG", "false");
    succeed(&mut install)?;
    std::fs::remove_dir_all(&build).context("cannot remove what is left of the build")?;
    Ok(program)
}

fn is_right_version(program: &Path) -> bool {
    output(Command::new(program).arg("--version")).is_ok_and(|version| version.trim().ends_with(VERSION))
}
