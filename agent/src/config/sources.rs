//! The list of discovery sources: which there are, and what each has to be told.

use std::net::{IpAddr, SocketAddr};

use darter_discovery::fixed::is_host_name;
use darter_discovery::{Address, Source, dns, kubernetes};

use super::build::parsed;
use super::defaults;
use super::read::{Map, Reader, join};
use super::scalar::{self, Parsed};
use super::tree::{Entry, Node};

/// Sources of seeds. Each is a task that asks again and again.
const SOURCES_MAX: usize = 16;

/// Resolvers of one source: more than any resolv.conf can name.
const SERVERS_MAX: usize = 8;

/// Where a resolver listens that is given without a port.
const DNS_PORT: u16 = 53;

/// The longest name of a Kubernetes namespace or service: they are labels of names in DNS.
const LABEL_BYTES_MAX: usize = 63;

/// All sources. `gossip` is where this agent listens: members that are found without a port have the same.
pub(super) fn discovery(reader: &mut Reader<'_>, gossip: Option<SocketAddr>) -> Option<Vec<Source>> {
    const PATH: &str = "discovery";
    let Some(node) = reader.node(PATH) else { return Some(Vec::new()) };
    let items = reader.list(node, PATH)?;
    if items.len() > SOURCES_MAX {
        reader.problem(PATH, format!("{} sources, at most {SOURCES_MAX} are possible", items.len()));
    }
    // An agent that takes whichever port is free is found by its own address; others are where the default is.
    let default = || scalar::listen(defaults::of("gossip.listen")).ok();
    let port = gossip.filter(|listen| listen.port() != 0).or_else(default).map_or(0, |listen| listen.port());
    // All are read, so that all problems are found, before the first that failed ends it.
    let sources: Vec<_> =
        items.iter().enumerate().map(|(at, item)| source(reader, item, &format!("{PATH}[{at}]"), port)).collect();
    sources.into_iter().collect()
}

fn source<'a>(reader: &mut Reader<'a>, node: &'a Node, path: &str, port: u16) -> Option<Source> {
    let map = reader.map(node, path, &["static", "file", "dns", "kubernetes"])?;
    let [entry] = map.entries() else {
        reader.problem_at(&node.place, path, "one of static, file, dns or kubernetes is wanted here");
        return None;
    };
    let path = join(path, &entry.key);
    match entry.key.as_str() {
        "static" => list(reader, entry, &path),
        "file" => file(reader, entry, &path),
        "dns" => name(reader, entry, &path, port),
        "kubernetes" => objects(reader, entry, &path, port),
        // Reported as unknown.
        _ => None,
    }
}

fn list<'a>(reader: &mut Reader<'a>, entry: &'a Entry, path: &str) -> Option<Source> {
    let map = reader.map(&entry.node, path, &["addresses"])?;
    if map.get("addresses").is_none() {
        let path = join(path, "addresses");
        reader.problem_at(&entry.place, path, "missing: a list as in [\"10.77.0.2:8002\"]");
        return None;
    }
    Some(Source::Fixed { addresses: items(reader, map, path, "addresses", parsed::<Address>)? })
}

fn file<'a>(reader: &mut Reader<'a>, entry: &'a Entry, path: &str) -> Option<Source> {
    let map = reader.map(&entry.node, path, &["path"])?;
    let file = reader.field(map, path, "path", scalar::absolute)?;
    if file.is_none() {
        reader.problem_at(&entry.place, join(path, "path"), "missing: a file with an address per line");
    }
    Some(Source::File { path: file? })
}

fn name<'a>(reader: &mut Reader<'a>, entry: &'a Entry, path: &str, gossip: u16) -> Option<Source> {
    let map = reader.map(&entry.node, path, &["name", "port", "servers"])?;
    let name = reader.field(map, path, "name", dns_name);
    let port = reader.field(map, path, "port", port);
    let servers = items(reader, map, path, "servers", server);
    if let Some(entry) = map.get("servers")
        && servers.as_ref().is_some_and(|servers| servers.len() > SERVERS_MAX)
    {
        let message = format!("more than {SERVERS_MAX} resolvers");
        reader.problem_at(&entry.node.place, join(path, "servers"), message);
    }
    if name == Some(None) {
        reader.problem_at(&entry.place, join(path, "name"), "missing: the name to look up");
    }
    Some(Source::Dns(dns::Query { name: name??, port: port?.unwrap_or(gossip), servers: servers? }))
}

fn objects<'a>(reader: &mut Reader<'a>, entry: &'a Entry, path: &str, port: u16) -> Option<Source> {
    let map = reader.map(&entry.node, path, &["service", "namespace", "nodes", "kubeconfig"])?;
    let service = reader.field(map, path, "service", label);
    let namespace = reader.field(map, path, "namespace", label);
    let nodes = reader.field(map, path, "nodes", scalar::boolean);
    let kubeconfig = reader.field(map, path, "kubeconfig", scalar::absolute);
    if let (Some(service), Some(nodes)) = (&service, nodes) {
        match (service, nodes.unwrap_or(false)) {
            (None, false) => reader.problem_at(&entry.place, path, "a service, or nodes: true, is wanted here"),
            (Some(_), true) => {
                reader.problem_at(
                    &entry.place,
                    path,
                    "a service and nodes: true are two sources, each with its own entry",
                );
            }
            (None, true) if matches!(namespace, Some(Some(_))) => {
                reader.problem_at(&entry.place, join(path, "namespace"), "of no use with nodes: true, nodes have none");
            }
            _ => {}
        }
    }
    let (service, namespace) = (service?, namespace?);
    let what = match (service, nodes?) {
        (Some(service), _) => kubernetes::Watched::Service { namespace, service },
        (None, _) => kubernetes::Watched::Nodes,
    };
    Some(Source::Kubernetes(kubernetes::Query { what, port, kubeconfig: kubeconfig? }))
}

/// The values of a list in a mapping; none, if it is not given.
fn items<'a, T>(
    reader: &mut Reader<'a>,
    map: Map<'a>,
    path: &str,
    key: &str,
    parse: impl Fn(&str) -> Parsed<T>,
) -> Option<Vec<T>> {
    let Some(entry) = map.get(key) else { return Some(Vec::new()) };
    let path = join(path, key);
    let items = reader.list(&entry.node, &path)?;
    let values: Vec<_> =
        items.iter().enumerate().map(|(at, item)| reader.scalar(item, &format!("{path}[{at}]"), &parse)).collect();
    values.into_iter().collect()
}

fn dns_name(text: &str) -> Parsed<String> {
    if is_host_name(text) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!("'{text}' is not a name in DNS, as in darter.kube-system.svc.cluster.local (no port, no address)"))
}

fn port(text: &str) -> Parsed<u16> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| format!("'{text}' is not a port between 1 and 65535"))
}

fn server(text: &str) -> Parsed<SocketAddr> {
    let server = text.parse::<SocketAddr>().or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, DNS_PORT).into()));
    let server = server.ok().filter(|server| server.port() != 0 && !server.ip().is_unspecified());
    server.ok_or_else(|| format!("'{text}' is not the address of a resolver, as in 10.96.0.10 or [fd00::a]:53"))
}

fn label(text: &str) -> Parsed<String> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good = (1..=LABEL_BYTES_MAX).contains(&text.len())
        && text.bytes().all(fits)
        && !text.starts_with('-')
        && !text.ends_with('-');
    if good {
        return Ok(text.to_owned());
    }
    Err(format!("'{text}' is not a name in Kubernetes: 1 to {LABEL_BYTES_MAX} lower-case letters, digits and - are"))
}
