//! From a tree to a [`Config`]: every key read by its parser, then everything related to everything else.
//!
//! A key that is wrong leaves `None` behind and a problem with the reader; the configuration is put together only when
//! all are there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use darter_tracker::Role;

use super::check::{self, Listeners};
use super::files::{self, PairProblem};
use super::hosts::{HostPattern, HostPort};
use super::problems::Place;
use super::read::{Reader, join};
use super::scalar::{self, Parsed};
use super::tree::Node;
use super::types::{
    Admin, Cache, Gossip, Hijack, Identity, Limits, Node as ThisNode, Peer, Proxy, Redacted, Registry, RegistryMirror,
    Rule, Space,
};
use super::{Config, coverage, host, sources};

/// The least a cache may hold: one piece of the largest size, so that something can be given to others at all.
const CACHE_BYTES_MIN: u64 = darter_tracker::PieceSize::MAX_BYTES as u64;

/// How long a node keeps a blob that nobody asks for, unless it is told. Dragonfly v1 forgot after 5 minutes, which is
/// before the slow half of a rollout asks.
const IDLE_NODE: Duration = Duration::from_secs(3600);

/// The same of a seed, which is there to have what others have forgotten: what was rolled out in the morning is rolled
/// back, or on, within a day. `cache.max_size` bounds it all the same.
const IDLE_SEED: Duration = Duration::from_secs(24 * 3600);

/// Why a limit is refused.
pub(super) const NO_LIMITS: &str = "rate limits are not available in this version; 0 is no limit";

/// The configuration that the reader's tree says; `None` if there are problems.
pub(super) fn config(reader: &mut Reader<'_>) -> Option<Config> {
    let mut warnings = Vec::new();
    let listeners = Listeners {
        proxy: reader.value("proxy.listen", scalar::listen),
        peer: reader.value("peer.listen", scalar::listen),
        gossip: reader.value("gossip.listen", scalar::listen),
        admin: reader.value("admin.listen", scalar::listen),
    };
    check::listeners(reader, &listeners);
    let secret_file = reader.nullable("secret_file", scalar::file);
    let secrets = secret_file.as_ref().and_then(|file| secrets(reader, file.as_ref()));
    if matches!(secret_file, Some(None)) {
        warnings.push("secret_file is not set: this agent is a proxy only, without gossip and peers".to_owned());
    }
    let peers = !matches!(secret_file, Some(None));
    let node = node(reader, &listeners, peers);
    let tls = proxy_tls(reader);
    let transport = reader.value("peer.transport", scalar::transport);
    let discovery = sources::discovery(reader, listeners.gossip);
    let cache = cache(reader, node.as_ref().map_or(Role::Node, |node| node.role));
    let limits = limits(reader);
    let remote = reader.nullable("registry_mirror.remote", scalar::registry_url);
    let direct = reader.value("registry_mirror.direct", scalar::boolean);
    let rules = rules(reader);
    let hijack = hijack(reader, &mut warnings);
    let registries = registries(reader);
    let when_registry_down = reader.value("when_registry_down", scalar::when_registry_down);
    let tag_ttl = reader.value("tag_ttl", scalar::tag_ttl);
    let piece_size = reader.value("piece_size", scalar::piece_size);
    let verify = reader.value("verify", scalar::verify);
    if !reader.problems.is_empty() {
        return None;
    }
    Some(Config {
        node: node?,
        secret_file: secret_file?,
        secrets: secrets?,
        proxy: Proxy { listen: listeners.proxy?, tls: tls? },
        peer: Peer { listen: listeners.peer?, transport: transport? },
        gossip: Gossip { listen: listeners.gossip? },
        admin: Admin { listen: listeners.admin? },
        discovery: discovery?,
        cache: cache?,
        limits: limits?,
        registry_mirror: RegistryMirror { remote: remote?, direct: direct? },
        rules: rules?,
        hijack: hijack?,
        registries: registries?,
        when_registry_down: when_registry_down?,
        tag_ttl: tag_ttl?,
        piece_size: piece_size?,
        verify: verify?,
        warnings,
        origin: super::Origin::default(),
    })
}

fn secrets(reader: &mut Reader<'_>, file: Option<&PathBuf>) -> Option<Vec<Redacted<Vec<u8>>>> {
    let Some(file) = file else { return Some(Vec::new()) };
    let read = files::secrets(file);
    read.map_err(|problems| problems.into_iter().for_each(|problem| reader.problem("secret_file", problem))).ok()
}

fn node(reader: &mut Reader<'_>, listeners: &Listeners, peers: bool) -> Option<ThisNode> {
    let name = reader.nullable("node.name", scalar::name);
    let cluster = reader.value("node.cluster", scalar::name);
    let zone = reader.nullable("node.zone", scalar::name);
    let role = reader.value("node.role", scalar::role);
    let given = reader.nullable("node.advertise", scalar::ip);
    let advertise = given.and_then(|given| check::advertise(reader, given, listeners, peers));
    Some(ThisNode {
        name: name?.unwrap_or_else(host::name),
        cluster: cluster?,
        advertise: advertise?,
        zone: zone?,
        role: role?,
    })
}

fn proxy_tls(reader: &mut Reader<'_>) -> Option<Option<Arc<Identity>>> {
    const PATH: &str = "proxy.tls";
    let Some(node) = reader.node(PATH) else { return Some(None) };
    let map = reader.map(node, PATH, &["cert", "key"])?;
    let cert = reader.field(map, PATH, "cert", scalar::file)?;
    let key = reader.field(map, PATH, "key", scalar::file)?;
    let place = |key: &str| map.get(key).map_or(node.place.clone(), |entry| entry.node.place.clone());
    identity(reader, PATH, cert, key, [place("cert"), place("key")])
}

/// Two files, or none of both.
fn identity(
    reader: &mut Reader<'_>,
    path: &str,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    [cert_place, key_place]: [Place; 2],
) -> Option<Option<Arc<Identity>>> {
    let (cert_path, key_path) = (join(path, "cert"), join(path, "key"));
    let problems = match (cert, key) {
        (None, None) => return Some(None),
        (Some(cert), Some(key)) => match files::identity(&cert, &key) {
            Ok(identity) => return Some(Some(Arc::new(identity))),
            Err(problems) => problems,
        },
        // The one that is there is where the other is missing.
        (None, Some(_)) => return missing(reader, &key_place, &cert_path),
        (Some(_), None) => return missing(reader, &cert_place, &key_path),
    };
    for problem in problems {
        match problem {
            PairProblem::Cert(message) => reader.problem_at(&cert_place, cert_path.as_str(), message),
            PairProblem::Key(message) => reader.problem_at(&key_place, key_path.as_str(), message),
        }
    }
    None
}

fn missing<T>(reader: &mut Reader<'_>, place: &Place, path: &str) -> Option<T> {
    reader.problem_at(place, path, "missing: a certificate and its key belong together");
    None
}

fn cache(reader: &mut Reader<'_>, role: Role) -> Option<Cache> {
    let dir = reader.value("cache.dir", scalar::absolute);
    let max_size = reader.value("cache.max_size", scalar::space);
    let min_free = reader.value("cache.min_free", scalar::space);
    let idle = reader.nullable("cache.idle", scalar::duration);
    match max_size {
        Some(Space::Bytes(bytes)) if bytes < CACHE_BYTES_MIN => {
            reader.problem("cache.max_size", format!("less than {} MiB, the largest piece", CACHE_BYTES_MIN >> 20));
        }
        Some(Space::Percent(0)) => reader.problem("cache.max_size", "a cache of nothing can hold no piece"),
        _ => {}
    }
    if min_free == Some(Space::Percent(100)) {
        reader.problem("cache.min_free", "with 100% kept free nothing can be cached");
    }
    if idle.flatten().is_some_and(|idle| idle.is_zero()) {
        reader.problem("cache.idle", "must be longer than nothing, or every blob would be forgotten at once");
    }
    let by_role = match role {
        Role::Node => IDLE_NODE,
        Role::Seed => IDLE_SEED,
    };
    Some(Cache { dir: dir?, max_size: max_size?, min_free: min_free?, idle: idle?.unwrap_or(by_role) })
}

fn limits(reader: &mut Reader<'_>) -> Option<Limits> {
    let download = reader.value("limits.download", scalar::rate);
    let upload = reader.value("limits.upload", scalar::rate);
    let per_task = reader.value("limits.per_task", scalar::rate);
    for (path, rate) in [("limits.download", download), ("limits.upload", upload), ("limits.per_task", per_task)] {
        if rate.is_some_and(|rate| rate > 0) {
            reader.problem(path, NO_LIMITS);
        }
    }
    Some(Limits { download: download?, upload: upload?, per_task: per_task? })
}

fn rules(reader: &mut Reader<'_>) -> Option<Vec<Rule>> {
    const PATH: &str = "rules";
    let Some(node) = reader.node(PATH) else { return Some(Vec::new()) };
    let items = reader.list(node, PATH)?;
    let rules: Vec<_> =
        items.iter().enumerate().map(|(at, item)| rule(reader, item, &format!("{PATH}[{at}]"))).collect();
    rules.into_iter().collect()
}

fn rule<'a>(reader: &mut Reader<'a>, node: &'a Node, path: &str) -> Option<Rule> {
    let map = reader.map(node, path, &["regex", "direct", "use_https", "redirect"])?;
    let regex = reader.field(map, path, "regex", scalar::regex);
    let direct = reader.field(map, path, "direct", scalar::boolean);
    let use_https = reader.field(map, path, "use_https", scalar::boolean);
    let redirect = reader.field(map, path, "redirect", parsed::<HostPort>);
    if matches!(regex, Some(None)) {
        reader.problem_at(&node.place, join(path, "regex"), "missing: the expression that a URL is searched for");
    }
    Some(Rule {
        regex: regex??,
        direct: direct?.unwrap_or(false),
        use_https: use_https?.unwrap_or(false),
        redirect: redirect?,
    })
}

fn hijack(reader: &mut Reader<'_>, warnings: &mut Vec<String>) -> Option<Hijack> {
    const HOSTS: &str = "hijack.hosts";
    let cert = reader.nullable("hijack.cert", scalar::file);
    let key = reader.nullable("hijack.key", scalar::file);
    let hosts = match reader.node(HOSTS) {
        Some(node) => reader.list(node, HOSTS).and_then(|items| {
            let hosts: Vec<_> = items
                .iter()
                .enumerate()
                .map(|(at, item)| reader.scalar(item, &format!("{HOSTS}[{at}]"), parsed::<HostPattern>))
                .collect();
            hosts.into_iter().collect::<Option<Vec<_>>>()
        }),
        None => Some(Vec::new()),
    };
    if cert == Some(None) && key == Some(None) && hosts.as_ref().is_some_and(|hosts| !hosts.is_empty()) {
        reader.problem(HOSTS, "hosts are named, but neither hijack.cert nor hijack.key (darter gen-ca makes both)");
    }
    let places = [reader.place("hijack.cert"), reader.place("hijack.key")];
    let identity = identity(reader, "hijack", cert?, key?, places)?;
    let hosts = hosts?;
    if let Some(identity) = &identity {
        warnings.extend(coverage::warnings(identity, &hosts));
    }
    Some(Hijack { identity, hosts })
}

fn registries(reader: &mut Reader<'_>) -> Option<BTreeMap<HostPort, Registry>> {
    const PATH: &str = "registries";
    let Some(node) = reader.node(PATH) else { return Some(BTreeMap::new()) };
    let map = reader.any_map(node, PATH)?;
    let mut registries = BTreeMap::new();
    for entry in map.entries() {
        let path = join(PATH, &entry.key);
        let host = entry.key.parse::<HostPort>();
        if let Err(error) = &host {
            reader.problem_at(&entry.place, path.as_str(), error.to_string());
        }
        // Read even under a wrong name, so that all problems are found.
        let registry = registry(reader, &entry.node, &path);
        if let (Ok(host), Some(registry)) = (host, registry)
            && registries.insert(host.clone(), registry).is_some()
            && host.to_string() != entry.key
        {
            reader.problem_at(&entry.place, path, "the same host is given twice in two spellings");
        }
    }
    Some(registries)
}

fn registry<'a>(reader: &mut Reader<'a>, node: &'a Node, path: &str) -> Option<Registry> {
    let map = reader.map(node, path, &["insecure_http", "ca_file", "tag_ttl"])?;
    let insecure_http = reader.field(map, path, "insecure_http", scalar::boolean);
    let ca_file = reader.field(map, path, "ca_file", scalar::file);
    let tag_ttl = reader.field(map, path, "tag_ttl", scalar::tag_ttl);
    let path = join(path, "ca_file");
    let place = map.get("ca_file").map_or(Place::Whole, |entry| entry.node.place.clone());
    if let Some(Some(file)) = &ca_file {
        if let Err(message) = files::authorities(file) {
            reader.problem_at(&place, path.as_str(), message);
        }
        if insecure_http == Some(Some(true)) {
            reader.problem_at(&place, path, "of no use with insecure_http: true, which speaks no TLS");
        }
    }
    Some(Registry { insecure_http: insecure_http?.unwrap_or(false), ca_file: ca_file?, tag_ttl: tag_ttl? })
}

/// A scalar of a type that parses itself.
pub(super) fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Parsed<T> {
    text.parse().map_err(|error| format!("'{text}': {error}"))
}
