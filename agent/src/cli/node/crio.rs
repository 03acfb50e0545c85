//! CRI-O, podman, buildah, skopeo: a drop-in of `registries.conf` with the agent as a mirror.
//!
//! These clients do not say which registry they mean, so the agent can stand for one: `registry_mirror.remote`.

use std::path::Path;

use toml_edit::{DocumentMut, Item, Table};

use super::record::Root;
use super::{Agent, NodeError, Plan, Wanted, reference, refused, toml};
use crate::config::{Config, HostPort};

const MAIN: &str = "/etc/containers/registries.conf";
const FOLDER: &str = "/etc/containers/registries.conf.d";
const DROP_IN: &str = "/etc/containers/registries.conf.d/10-darter.conf";
const CERTS: &str = "/etc/containers/certs.d";

/// What CRI-O needs.
pub(super) fn plan(root: &Root, config: &Config, agent: &Agent, registries: &[HostPort]) -> Result<Plan, NodeError> {
    let remote = config.registry_mirror.remote.as_ref();
    let mirrored = remote.and_then(|url| url.authority()?.as_str().parse::<HostPort>().ok());
    let Some(mirrored) = mirrored.map(|host| reference(&host)) else {
        return Err(refused("CRI-O does not say which registry it means: set registry_mirror.remote to it"));
    };
    if let Some(other) = registries.iter().map(reference).find(|name| *name != mirrored) {
        return Err(refused(format!(
            "CRI-O does not say which registry it means, and the agent takes {mirrored} for it \
             (registry_mirror.remote): {other} cannot be had in this way"
        )));
    }
    let mut files = vec![Path::new(MAIN).to_owned()];
    files.extend(root.list(Path::new(FOLDER), "conf")?.into_iter().filter(|file| file != Path::new(DROP_IN)));
    for file in files {
        foreign(&file, &toml(&file, root.read(&file)?.as_deref())?, &mirrored, agent)?;
    }
    let plain = remote.and_then(|url| url.scheme_str()) == Some("http");
    let plain = if plain { "insecure = true\n" } else { "" };
    let text = format!(
        "# Written by darter node configure; --undo takes it back.\n[[registry]]\nprefix = \"{mirrored}\"\nlocation = \
         \"{mirrored}\"\n{plain}\n{}",
        mirror(agent)
    );
    let mut plan = Plan { files: vec![Wanted { path: DROP_IN.into(), text, merged: false }], notes: Vec::new() };
    if let Some(cert) = &agent.tls_cert {
        let text = std::fs::read_to_string(cert).map_err(|source| NodeError::File { path: cert.clone(), source })?;
        let path = Path::new(CERTS).join(agent.proxy.to_string()).join("darter.crt");
        plan.files.push(Wanted { path, text, merged: false });
    }
    Ok(plan)
}

/// The agent as a mirror. `insecure` is plain HTTP, on this host alone.
fn mirror(agent: &Agent) -> String {
    let insecure = if agent.tls_cert.is_none() { "insecure = true\n" } else { "" };
    format!("[[registry.mirror]]\nlocation = \"{}\"\n{insecure}", agent.proxy)
}

/// Refuses where another file speaks of the registry: of two entries one would be ignored, with all that it says.
fn foreign(file: &Path, document: &DocumentMut, registry: &str, agent: &Agent) -> Result<(), NodeError> {
    let shown = file.display();
    if document.get("registries").is_some() {
        return Err(refused(format!("{shown} is of the format's version 1, which cannot be mixed with drop-ins")));
    }
    let entries = document.get("registry").and_then(Item::as_array_of_tables);
    let name = |entry: &Table| Some(entry.get("prefix").or_else(|| entry.get("location"))?.as_str()?.to_owned());
    match entries.into_iter().flatten().any(|entry| name(entry).is_some_and(|name| name == registry)) {
        true => Err(refused(format!(
            "{shown} has settings of {registry} already, which a second entry would put out of force. Add the mirror \
             there, as the first:\n{}",
            mirror(agent)
        ))),
        false => Ok(()),
    }
}
