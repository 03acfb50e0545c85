//! dockerd: `HTTPS_PROXY` by a drop-in of its unit, and the agent's CA for the hosts whose TLS the agent ends.
//!
//! Not `registry-mirrors`: docker asks mirrors for the hub's images alone, and without credentials.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::record::Root;
use super::{Agent, HUB, NodeError, Plan, Wanted, reference, refused};
use crate::config::{Config, HostPort};

const DROP_IN: &str = "/etc/systemd/system/docker.service.d/darter.conf";
const DAEMON: &str = "/etc/docker/daemon.json";
const CERTS: &str = "/etc/docker/certs.d";

/// Of its own, since docker trusts every `*.crt` in the folder and one of somebody else may be there.
const CERT_FILE: &str = "darter.crt";

/// Where systemd looks for units, what is said later first.
const UNITS: [&str; 4] =
    ["/usr/lib/systemd/system", "/lib/systemd/system", "/run/systemd/system", "/etc/systemd/system"];

/// Asked without the agent: this host.
const NO_PROXY: &str = "localhost,127.0.0.0/8,::1";

/// What docker needs.
pub(super) fn plan(root: &Root, config: &Config, agent: &Agent, registries: &[HostPort]) -> Result<Plan, NodeError> {
    let Some(identity) = &config.hijack.identity else {
        return Err(refused(
            "docker gets nothing from the swarm unless the agent ends its TLS: set hijack (darter gen-ca makes a CA)",
        ));
    };
    for host in registries {
        let port = host.port.unwrap_or(443);
        if !config.hijack.hosts.iter().any(|pattern| pattern.matches(&host.host, port)) {
            return Err(refused(format!("{host} is not in hijack.hosts of the agent's configuration")));
        }
        if reference(host) == HUB[0] {
            return Err(refused(format!(
                "docker looks for no certificate of its hub in {CERTS}, so {host} in hijack.hosts would make pulls fail"
            )));
        }
    }
    let ours = agent.url();
    let environment = environment(root)?;
    let set = |names: [&str; 2]| names.into_iter().find_map(|name| environment.get(name));
    if let Some((at, other)) = set(["HTTPS_PROXY", "https_proxy"]).filter(|(_, value)| *value != ours) {
        return Err(refused(format!(
            "{} sets HTTPS_PROXY={other}; the agent would take its place and does not ask it. Remove that first",
            at.display()
        )));
    }
    daemon(root, &ours)?;
    let no_proxy = match set(["NO_PROXY", "no_proxy"]) {
        Some(_) => String::new(),
        None => format!("# Asked without the agent: this host.\nEnvironment=\"NO_PROXY={NO_PROXY}\"\n"),
    };
    let text = format!(
        "# Written by darter node configure; --undo takes it back.\n[Unit]\n# The socket and not the service: connections \
         wait in it until the agent is there.\nWants=darter-proxy.socket\nAfter=darter-proxy.socket\n\n[Service]\n\
         Environment=\"HTTPS_PROXY={ours}\"\n{no_proxy}"
    );
    let mut plan = Plan { files: vec![Wanted { path: DROP_IN.into(), text, merged: false }], notes: Vec::new() };
    let read = std::fs::read_to_string(&identity.cert_file);
    let certificate = read.map_err(|source| NodeError::File { path: identity.cert_file.clone(), source })?;
    for host in registries {
        let path = Path::new(CERTS).join(reference(host)).join(CERT_FILE);
        plan.files.push(Wanted { path, text: certificate.clone(), merged: false });
    }
    for pattern in config.hijack.hosts.iter().filter(|pattern| pattern.below) {
        plan.notes.push(format!("docker knows no {pattern}: name its registries with --registry, each gets the CA"));
    }
    Ok(plan)
}

/// `daemon.json` has proxies too, and they count for more than the environment.
fn daemon(root: &Root, ours: &str) -> Result<(), NodeError> {
    let Some(text) = root.read(Path::new(DAEMON))? else { return Ok(()) };
    let daemon: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| refused(format!("{DAEMON} is not JSON: {error}")))?;
    match daemon.pointer("/proxies/https-proxy").and_then(serde_json::Value::as_str) {
        Some(other) if other != ours => Err(refused(format!(
            "{DAEMON} sets proxies.https-proxy to {other}, which counts for more than the environment. Remove that first"
        ))),
        _ => Ok(()),
    }
}

/// What the unit's other files put into docker's environment, and which of them.
fn environment(root: &Root) -> Result<BTreeMap<String, (PathBuf, String)>, NodeError> {
    let mut files = Vec::new();
    for units in UNITS {
        files.push(Path::new(units).join("docker.service"));
        files.extend(root.list(&Path::new(units).join("docker.service.d"), "conf")?);
    }
    let mut environment = BTreeMap::new();
    for file in files.into_iter().filter(|file| file != Path::new(DROP_IN)) {
        let Some(text) = root.read(&file)? else { continue };
        for line in text.replace("\\\n", " ").lines().map(str::trim) {
            if let Some(words) = line.strip_prefix("Environment=") {
                for (name, value) in self::words(words).iter().filter_map(|word| word.split_once('=')) {
                    environment.insert(name.to_owned(), (file.clone(), value.to_owned()));
                }
            } else if let Some(named) = line.strip_prefix("EnvironmentFile=") {
                let named = PathBuf::from(named.trim_start_matches('-'));
                let text = if named.is_absolute() { root.read(&named)? } else { None };
                for (name, value) in text.unwrap_or_default().lines().filter_map(|line| line.trim().split_once('=')) {
                    let value = value.trim_matches(['"', '\'']).to_owned();
                    environment.insert(name.to_owned(), (named.clone(), value));
                }
            }
        }
    }
    Ok(environment)
}

/// The words of a line of a unit, without their quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for c in line.chars() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if open == c => quote = None,
            (None, c) if c.is_whitespace() => words.push(std::mem::take(&mut word)),
            (_, c) => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}
