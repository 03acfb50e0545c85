//! The fence around the deciding crate: nothing that does IO may be among what it links.

use anyhow::{Result, bail};

use crate::step::{cargo, output};

/// The crate inside the fence.
const FENCED: &str = "darter-swarm";

/// Families of crates that stay outside: each name, and every name that begins with it and a dash.
const OUTSIDE: [&str; 9] = ["tokio", "quinn", "hyper", "kube", "k8s-openapi", "hickory", "rustls", "mio", "socket2"];

pub(crate) fn check() -> Result<()> {
    let mut tree = cargo()?;
    tree.args(["tree", "--locked", "-p", FENCED, "-e", "normal", "--target", "all", "--prefix", "none", "--format"]);
    let tree = output(tree.arg("{p}"))?;
    let found = trespassers(&tree);
    if !found.is_empty() {
        bail!("{FENCED} links {}; find out why with `cargo tree -p {FENCED} -e normal -i NAME`", found.join(", "));
    }
    Ok(())
}

fn trespassers(tree: &str) -> Vec<&str> {
    let names = tree.lines().filter_map(|line| line.split_whitespace().next());
    let mut found: Vec<&str> = names.filter(|name| OUTSIDE.iter().any(|family| belongs(name, family))).collect();
    found.sort_unstable();
    found.dedup();
    found
}

fn belongs(name: &str, family: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_families_and_nothing_that_only_sounds_like_them() {
        let tree = "darter-swarm v0.1.0\nfoca v2.0.0\ntokio-util v0.7.20\nquinn v0.11\ntokioish v1\nquinn v0.11 (*)\n";
        assert_eq!(trespassers(tree), ["quinn", "tokio-util"]);
    }
}
