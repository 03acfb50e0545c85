//! What the environment says: `DARTER_<SECTION>_<KEY>` overrides a single value of the file.
//!
//! An empty variable counts as not set, as in shells and compose files; `null` is how to say nothing.

use super::defaults::{self, KEYS, Key};
use super::problems::{Place, Problem};
use super::read::nearest;
use super::tree::{Entry, Node, Value};

/// What the variables of this program begin with.
const PREFIX: &str = "DARTER_";

/// Variables that are read elsewhere: the log filter, and the path of the file itself.
const ELSEWHERE: &[&str] = &["DARTER_LOG", "DARTER_CONFIG"];

/// Lays the variables over the file's tree. Unknown ones are problems: a mistyped override that does nothing is worse
/// than an agent that does not start.
pub(super) fn overlay(root: &mut Node, variables: impl Iterator<Item = (String, String)>, problems: &mut Vec<Problem>) {
    for (variable, value) in variables {
        if !variable.starts_with(PREFIX) || ELSEWHERE.contains(&variable.as_str()) || is_service_link(&variable, &value)
        {
            continue;
        }
        match KEYS.iter().find(|key| defaults::variable(key.path) == variable) {
            Some(Key { path, scalar: false, .. }) => {
                let message = "a list or mapping cannot be set from the environment, only in the file";
                problems.push(Problem::new(Place::Environment(variable), *path, message));
            }
            Some(_) if value.is_empty() => {}
            Some(Key { path, .. }) => set(root, path, &variable, value),
            None => {
                let known = KEYS.iter().filter(|key| key.scalar).map(|key| defaults::variable(key.path));
                let hint = nearest(&variable, known).map_or(String::new(), |name| format!(", did you mean {name}?"));
                problems.push(Problem::new(Place::Environment(variable), "", format!("no such setting{hint}")));
            }
        }
    }
}

/// What Kubernetes puts into every pod of a namespace with a service called darter or darter-something. Nobody asked
/// for these, so they must not keep an agent from starting; no key of ours looks like that.
fn is_service_link(variable: &str, value: &str) -> bool {
    let port = |rest: &str| {
        let mut parts = rest.split('_');
        let (number, protocol, detail) = (parts.next(), parts.next(), parts.next());
        number.is_some_and(|number| number.parse::<u16>().is_ok())
            && matches!(protocol, Some("TCP" | "UDP" | "SCTP"))
            && matches!(detail, None | Some("ADDR" | "PORT" | "PROTO"))
            && parts.next().is_none()
    };
    variable.ends_with("_SERVICE_HOST")
        || variable.ends_with("_SERVICE_PORT")
        || variable.contains("_SERVICE_PORT_")
        || (variable.ends_with("_PORT") && value.contains("://"))
        || variable.rsplit_once("_PORT_").is_some_and(|(_, rest)| port(rest))
}

/// Sets a key to what a variable says. Where a section is no mapping, that is a problem of the file and stays one.
fn set(root: &mut Node, path: &str, variable: &str, value: String) {
    let place = Place::Environment(variable.to_owned());
    let value = if matches!(value.as_str(), "null" | "~") { Value::Null } else { Value::Scalar(value) };
    let (section, key) = defaults::split(path);
    let mut at = root;
    if let Some(section) = section {
        let Some(node) = child(at, section, &place) else { return };
        at = node;
    }
    if let Some(node) = child(at, key, &place) {
        *node = Node { place, value };
    }
}

/// The value of a key of a mapping, made if it is not there. Nothing counts as an empty mapping.
fn child<'a>(node: &'a mut Node, key: &str, place: &Place) -> Option<&'a mut Node> {
    if matches!(node.value, Value::Null) {
        node.value = Value::Map(Vec::new());
    }
    let Value::Map(entries) = &mut node.value else { return None };
    let at = match entries.iter().position(|entry| entry.key == key) {
        Some(at) => at,
        None => {
            let node = Node { place: place.clone(), value: Value::Null };
            entries.push(Entry { key: key.to_owned(), place: place.clone(), node });
            entries.len() - 1
        }
    };
    entries.get_mut(at).map(|entry| &mut entry.node)
}
