//! The house rules that a program can check. Each says what to do instead.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail};

use crate::step::{output, root};

/// The length at which a file has more than one subject.
const FILE_LINES_MAX: usize = 600;

/// Marks of unfinished work. Written in two halves, so that this file does not break its own rule.
const UNFINISHED: [&str; 6] = [
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("TO", "DO"),
    concat!("todo", "!"),
    concat!("unimplemented", "!"),
    concat!("dbg", "!"),
];

/// Beginnings of paths that exist on one machine only.
const MACHINE_PATHS: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/tmp/", "wt")];

/// Crates that only some rooms may name, and those rooms, as beginnings of paths.
const ROOMS: [Room; 5] = [
    Room { crates: &["quinn", "quinn_proto", "quinn_udp"], rooms: &["agent/src/net"] },
    Room {
        crates: &["rustls", "tokio_rustls", "hyper_rustls", "rustls_native_certs"],
        rooms: &[
            // Among peers.
            "agent/src/net",
            // A client of registries.
            "agent/src/source/registry",
            // A server that docker takes for the registry.
            "agent/src/proxy/hijack",
            // The proxy's own certificate (`proxy.tls`).
            "agent/src/proxy/tls",
            // The registry of the demonstration.
            "agent/src/demo",
            // Making and checking keys.
            "agent/src/cli",
            "agent/src/config",
            // Tests build their own ends of a connection.
            "agent/src/proxy/tests",
            "agent/tests",
            // What the transport is measured against.
            "agent/benches",
            // A client of any registry.
            "chaos-tests/src/conformance",
        ],
    },
    Room { crates: &["kube", "k8s_openapi"], rooms: &["discovery/src/kubernetes"] },
    Room { crates: &["hickory_resolver", "hickory_proto", "hickory_net"], rooms: &["discovery/src/dns"] },
    Room { crates: &["foca"], rooms: &["swarm/src/membership"] },
];

struct Room {
    crates: &'static [&'static str],
    rooms: &'static [&'static str],
}

/// Checks every file that git has or would add.
pub(crate) fn check() -> Result<()> {
    let root = root()?;
    let mut git = Command::new("git");
    git.current_dir(&root).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    let mut problems = Vec::new();
    for path in output(&mut git)?.lines() {
        // Deleted but not yet staged, or not text.
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue };
        check_file(path, &text, &mut problems);
    }
    if !problems.is_empty() {
        bail!("{} problems:\n{}", problems.len(), problems.join("\n"));
    }
    Ok(())
}

fn check_file(path: &str, text: &str, problems: &mut Vec<String>) {
    for (index, line) in text.lines().enumerate() {
        let mut report = |what: String| problems.push(format!("{path}:{}: {what}", index + 1));
        for path in MACHINE_PATHS.iter().filter(|path| begins_a_path(line, path)) {
            report(format!("`{path}` is a path of one machine"));
        }
        if path.ends_with(".rs") {
            for mark in UNFINISHED.iter().filter(|mark| contains_word(line, mark)) {
                report(format!("`{mark}`: finish it, or write down what is missing where users read it"));
            }
            check_rooms(path, line, &mut report);
        }
        if path.ends_with("Cargo.toml") && path != "Cargo.toml" && names_a_version(line) {
            report("versions stand in the root Cargo.toml only".to_owned());
        }
    }
    let mut report = |what: &str| problems.push(format!("{path}: {what}"));
    if path.ends_with(".rs") {
        if text.lines().count() > FILE_LINES_MAX {
            report("longer than 600 lines: split it by subject");
        }
        // Tests that moved out of a file are still about that file.
        if !text.starts_with("//!") && !path.ends_with("/tests.rs") {
            report("begins without `//!`: say what it does, why, and what is not here");
        }
        if path.ends_with("/mod.rs") {
            report("foo.rs beside foo/ instead of foo/mod.rs");
        }
    }
    if path == "Cargo.toml" && !text.contains("unsafe_code = \"forbid\"") {
        report("the workspace forbids unsafe code");
    }
    if path.ends_with("/Cargo.toml") && !text.contains("[lints]\nworkspace = true") {
        report("every crate takes the workspace's lints");
    }
    if path.starts_with("rust-toolchain") {
        report("a toolchain file makes machines download one; `rust-version` says what is needed");
    }
}

fn check_rooms(path: &str, line: &str, report: &mut impl FnMut(String)) {
    let code = line.split("//").next().unwrap_or_default();
    for room in ROOMS.iter().filter(|room| !room.rooms.iter().any(|prefix| path.starts_with(prefix))) {
        for name in room.crates.iter().filter(|name| names_a_crate(code, name)) {
            report(format!("only {} may name the crate {name}", room.rooms.join(", ")));
        }
    }
}

/// Whether code names a crate, as in `quinn::Endpoint` or `use quinn;`.
fn names_a_crate(code: &str, name: &str) -> bool {
    let mut rest = code;
    while let Some(at) = rest.find(name) {
        let (before, after) = (&rest[..at], &rest[at + name.len()..]);
        // `net::quinn::` is a module of ours, `aquinn::` another name, `::quinn::` the crate.
        let path = before.strip_suffix("::").unwrap_or(before);
        let starts = !path.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '"');
        let used = after.starts_with("::") || (before.trim_end().ends_with("use") && !after.starts_with('_'));
        if starts && used {
            return true;
        }
        rest = after;
    }
    false
}

/// Whether the line has a path that begins like this, as opposed to one that has a folder of such a name inside.
fn begins_a_path(line: &str, start: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    line.match_indices(start).any(|(at, _)| !line[..at].ends_with(inside))
}

/// Whether the line has the word with nothing of a word around it.
fn contains_word(line: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + word.len()..]);
        !before.ends_with(is_word) && (word.ends_with('!') || !after.starts_with(is_word))
    })
}

/// Whether a line of a member's manifest gives a dependency a version of its own.
fn names_a_version(line: &str) -> bool {
    let Some((key, value)) = line.split_once('=') else { return false };
    let (key, value) = (key.trim(), value.trim());
    let is_number = value.strip_prefix('"').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    let elsewhere = ["version = \"", "path = \"../", "git = \""].iter().any(|mark| value.contains(mark));
    elsewhere || (is_number && !["edition", "rust-version", "version"].contains(&key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        let mut problems = Vec::new();
        check_file(path, text, &mut problems);
        problems.len()
    }

    #[test]
    fn a_crate_is_named_in_its_room_only() {
        assert_eq!(problems("agent/src/net/quic.rs", "//! x\nuse quinn::Endpoint;\n"), 0);
        assert_eq!(problems("agent/src/pull.rs", "//! x\nuse quinn::Endpoint;\n"), 1);
        assert_eq!(problems("agent/src/pull.rs", "//! x\nfn f(c: quinn::Connection) {}\n"), 1);
        assert_eq!(problems("agent/src/pull.rs", "//! x\nlet e = ::rustls::Error::General;\n"), 1);
        assert_eq!(problems("agent/src/pull.rs", "//! x\nuse crate::net::quinn::Thing; // quinn::Endpoint\n"), 0);
        assert_eq!(problems("agent/src/pull.rs", "//! quinn::Endpoint\n"), 0);
        assert_eq!(problems("swarm/src/home.rs", "//! x\nuse foca::Timer;\n"), 1);
    }

    #[test]
    fn unfinished_work_is_found_as_a_word() {
        assert_eq!(problems("a.rs", concat!("//! x\n// TO", "DO later\n")), 1);
        assert_eq!(problems("a.rs", concat!("//! x\nlet x = todo", "!();\n")), 1);
        assert_eq!(problems("a.rs", concat!("//! x\nlet MAXX", "XY = 1;\n")), 0);
    }

    #[test]
    fn files_have_headers_lints_and_an_end() {
        assert_eq!(problems("a.rs", "fn main() {}\n"), 1);
        assert_eq!(problems("a/mod.rs", "//! x\n"), 1);
        assert_eq!(problems("a.rs", &format!("//! x\n{}", "\n".repeat(FILE_LINES_MAX))), 1);
        assert_eq!(problems("a/Cargo.toml", "[package]\n"), 1);
        assert_eq!(problems("rust-toolchain.toml", ""), 1);
        assert_eq!(problems("README.md", concat!("see /wo", "rk/x\n")), 1);
        assert_eq!(problems("README.md", concat!("see swarm/src/ho", "me/lease.rs\n")), 0);
    }

    #[test]
    fn versions_stand_in_the_root_only() {
        let manifest = |line: &str| format!("[lints]\nworkspace = true\n{line}\n");
        assert_eq!(problems("a/Cargo.toml", &manifest("serde = \"1.0\"")), 1);
        assert_eq!(problems("a/Cargo.toml", &manifest("serde = { version = \"1\", features = [] }")), 1);
        assert_eq!(problems("a/Cargo.toml", &manifest("serde.workspace = true")), 0);
        assert_eq!(problems("a/Cargo.toml", &manifest("serde = { workspace = true, features = [\"derive\"] }")), 0);
    }
}
