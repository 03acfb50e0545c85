//! containerd: `certs.d/REGISTRY/hosts.toml`, where the agent is asked first and the registry if it does not answer.

use std::path::{Path, PathBuf};

use toml_edit::{Array, Item, Table, value};

use super::record::Root;
use super::{Agent, NodeError, Plan, Wanted, reference, refused, server, toml};
use crate::config::{Config, HostPort};

const CONFIG: &str = "/etc/containerd/config.toml";

/// Where containerd's documentation has the folders of registries.
const CERTS: &str = "/etc/containerd/certs.d";

/// What a mirror may be asked for; pushes go to the registry.
const CAPABILITIES: [&str; 2] = ["pull", "resolve"];

/// The plugin that has the registry's settings, by version of the file: 1, 2, and 3 of containerd 2.
const PLUGINS: [&str; 3] = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];

/// What containerd needs.
pub(super) fn plan(root: &Root, config: &Config, agent: &Agent, registries: &[HostPort]) -> Result<Plan, NodeError> {
    let mut plan = Plan::default();
    let folder = folder(root, &mut plan.notes)?;
    for host in registries {
        let path = folder.join(reference(host)).join("hosts.toml");
        let there = root.read(&path)?;
        let text = hosts(&path, there.as_deref(), &server(host, config), agent)?;
        plan.files.push(Wanted { path, text, merged: true });
    }
    Ok(plan)
}

/// The folder that containerd looks into, and what has to be added where it looks into none.
fn folder(root: &Root, notes: &mut Vec<String>) -> Result<PathBuf, NodeError> {
    let text = root.read(Path::new(CONFIG))?;
    let document = toml(Path::new(CONFIG), text.as_deref())?;
    let settings = |plugin: &str| document.get("plugins")?.get(plugin)?.get("registry");
    for registry in PLUGINS.into_iter().filter_map(settings) {
        let paths = registry.get("config_path").and_then(Item::as_str).unwrap_or_default();
        // Several may be listed; the first that has a folder of the registry's name wins.
        if let Some(first) = paths.split(':').find(|path| path.starts_with('/')) {
            if first.split('/').any(|part| part == "..") {
                return Err(refused(format!("config_path in {CONFIG} goes upwards: {first}")));
            }
            return Ok(first.into());
        }
        if registry.get("mirrors").is_some() {
            notes.push(format!(
                "{CONFIG} has registry.mirrors, which containerd does not allow beside config_path: move them to \
                 {CERTS}/REGISTRY/hosts.toml first"
            ));
        }
    }
    let version = document.get("version").and_then(Item::as_integer);
    let plugin = match version {
        Some(3..) => PLUGINS[2],
        _ => PLUGINS[1],
    };
    let head = if version.is_none() { "version = 2\n" } else { "" };
    notes.push(format!(
        "config_path is not set in {CONFIG}, so containerd's CRI plugin may not look into {CERTS}. Add this and restart \
         containerd (ctr and nerdctl take --hosts-dir):\n{head}[plugins.\"{plugin}\".registry]\n  config_path = \"{CERTS}\""
    ));
    Ok(CERTS.into())
}

/// What `hosts.toml` should say. Whatever is there stays, behind the agent.
fn hosts(path: &Path, there: Option<&str>, server: &str, agent: &Agent) -> Result<String, NodeError> {
    let mut document = toml(path, there)?;
    if document.get("server").is_none() {
        document.insert("server", value(server));
    }
    let first = document.get("host").and_then(Item::as_table).map(first_position);
    let hosts = document.entry("host").or_insert_with(|| {
        let mut table = Table::new();
        table.set_implicit(true);
        Item::Table(table)
    });
    let in_the_way = || refused(format!("host in {} is not a table of hosts, so it is left alone", path.display()));
    let hosts = hosts.as_table_mut().ok_or_else(in_the_way)?;
    let url = agent.url();
    if !hosts.contains_key(&url) {
        let mut host = Table::new();
        // Hosts are asked in the order of the file.
        host.set_position(first.flatten().map(|first| first - 1));
        host.insert("capabilities", value(CAPABILITIES.into_iter().collect::<Array>()));
        if let Some(cert) = &agent.tls_cert {
            host.insert("ca", value(cert.display().to_string()));
        }
        hosts.insert(&url, Item::Table(host));
    }
    Ok(document.to_string())
}

/// The first place in the file of a table below this one.
fn first_position(table: &Table) -> Option<isize> {
    table.iter().filter_map(|(_, item)| item.as_table()?.position()).min()
}
