//! Turns Dragonfly v1's `dfdaemon.yml` into a configuration of ours, and says what could not come along.
//!
//! What does not fit v1's own format, or what a check of the result finds, is a problem of the file, at its place there.
//! What v1 had and this agent has not is a note: the rest is imported all the same. Nothing here judges values by itself:
//! the result goes through the same checks as every configuration, so an import that succeeds is one that is accepted.
//!
//! `flags` reads `dfget_flags`, `out` is what is written.

mod flags;
mod out;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use super::hosts::{HostPattern, HostPort};
use super::problems::{Place, Problem, Problems};
use super::read::{Map, Reader, join};
use super::tree::{self, Entry, Node, Value};
use super::{Config, FILE_BYTES_MAX, build, files, scalar};
use out::{CertKey, Hijack, Out, Registry, Rule};

/// Why an import without them is a proxy only. v1 had no counterpart: whoever reached a supernode was let in.
const NO_PEERS: &str = "v1 has no counterpart of secret_file and discovery: add both, or this agent has no peers";

/// What v1 did with every certificate error and this agent never does.
const INSECURE: &str = "left out: certificates are always checked. Give a private CA as certs, or plain HTTP as \
                        registries.HOST.insecure_http";

/// What came out of a `dfdaemon.yml`.
#[derive(Clone, Debug)]
pub struct Imported {
    /// The configuration; `darter config check` accepts it.
    pub yaml: String,
    /// What it does not say any more, or says differently, and why. Never empty.
    pub notes: Problems,
}

/// Imports a file.
///
/// # Errors
/// As [`import`], and if it cannot be read.
pub fn load(path: &Path) -> Result<Imported, Problems> {
    let shown = path.display().to_string();
    match files::text(path, FILE_BYTES_MAX) {
        Ok(text) => import(&shown, &text),
        Err(message) => Err(Problems::new(shown, vec![Problem::new(Place::Whole, "", message)])),
    }
}

/// Imports a text that is called `file` in messages.
///
/// # Errors
/// Everything that is wrong with the file, and everything that the agent would not accept of what it says, with lines and
/// columns. The operator must mend it.
pub fn import(file: &str, text: &str) -> Result<Imported, Problems> {
    let root = tree::parse(text).map_err(|problem| Problems::new(file, vec![problem]))?;
    let mut import =
        Import { reader: Reader::bare(), notes: Vec::new(), sources: BTreeMap::new(), out: Out::default() };
    import.file(&root);
    let Import { reader, mut notes, sources, out } = import;
    if !reader.problems.is_empty() {
        return Err(Problems::new(file, reader.problems));
    }
    let yaml = out.yaml().map_err(|message| Problems::new(file, vec![Problem::new(Place::Whole, "", message)]))?;
    match Config::parse("", &yaml, std::iter::empty()) {
        Ok(config) => {
            notes.push(Problem::new(Place::Whole, "", NO_PEERS));
            // That there is no secret has just been said.
            let warnings = config.warnings.into_iter().filter(|warning| !warning.starts_with("secret_file"));
            notes.extend(warnings.map(|warning| Problem::new(Place::Whole, "", warning)));
            Ok(Imported { yaml, notes: Problems::new(file, notes) })
        }
        Err(problems) => {
            let there = problems.list().iter().map(|problem| traced(problem, &sources));
            Err(Problems::new(file, there.collect()))
        }
    }
}

/// Where something of the result came from: v1's key and its place.
type Sources = BTreeMap<String, (String, Place)>;

/// A problem of the result as one of the file that it came from.
fn traced(problem: &Problem, sources: &Sources) -> Problem {
    let nearest =
        sources.iter().filter(|(key, _)| problem.key.starts_with(key.as_str())).max_by_key(|(key, _)| key.len());
    match nearest {
        Some((_, (key, place))) => Problem::new(place.clone(), key.as_str(), problem.message.as_str()),
        None => Problem::new(Place::Whole, problem.key.as_str(), problem.message.as_str()),
    }
}

struct Import<'a> {
    reader: Reader<'a>,
    notes: Vec<Problem>,
    sources: Sources,
    out: Out,
}

impl<'a> Import<'a> {
    fn file(&mut self, root: &'a Node) {
        let Some(map) = self.reader.any_map(root, "") else { return };
        self.listeners(map);
        let mut rules = false;
        for Entry { key, place, node } in map.entries() {
            if is_empty(node) {
                continue;
            }
            match key.as_str() {
                "port" | "hostIp" | "peerPort" | "localIP" | "certpem" | "keypem" => {}
                "proxies" => rules = self.proxies(node),
                "hijack_https" => self.hijack(node),
                "registry_mirror" => self.mirror(node),
                "dfget_flags" => self.dfget_flags(node),
                "ratelimit" => {
                    let message = format!("left out: {} (limits.per_task and limits.download)", build::NO_LIMITS);
                    self.note(place, key, message);
                }
                "supernodes" => self.note(place, key, "left out: there is no supernode; members find each other"),
                "localrepo" | "workHome" => {
                    let message =
                        "left out: cache.dir is /var/lib/darter unless it is set, and v1's files are of no use";
                    self.note(place, key, message);
                }
                "dfpath" => self.note(place, key, "left out: no other program is run"),
                "maxprocs" => self.note(
                    place,
                    key,
                    "left out: half as many threads as there are cores, at most eight, do what does not block",
                ),
                "verbose" => self.note(place, key, "left out: DARTER_LOG=debug in the agent's environment does that"),
                "logConfig" => {
                    self.note(place, key, "left out: logs go to stderr, for systemd or the container runtime")
                }
                "streamMode" => self.note(place, key, "left out: blobs are always streamed"),
                _ => self.note(place, key, "left out: not a key of dfdaemon v1 that is known here"),
            }
        }
        if !rules {
            // Without rules v1 sent nothing through the swarm, and this agent would send every blob.
            self.out.rules = vec![Rule { regex: String::new(), direct: true, ..Rule::default() }];
            let message = "without proxies v1 passed every proxied request through; a rule that says so was added";
            self.note(&Place::Whole, "proxies", message);
        }
    }

    /// What makes up `proxy` and, unless `dfget_flags` says otherwise, `peer`.
    fn listeners(&mut self, map: Map<'a>) {
        let port = self.value(map, "port", port);
        let ip = self.value(map, "hostIp", scalar::ip);
        let entry = map.get("hostIp").or_else(|| map.get("port"));
        if let Some(entry) = entry.filter(|_| port.is_some() || ip.is_some()) {
            let ip = ip.unwrap_or_else(|| std::net::IpAddr::from([127, 0, 0, 1]));
            self.out.proxy.listen = Some(std::net::SocketAddr::new(ip, port.unwrap_or(65001)).to_string());
            self.source("proxy.listen", &entry.key, &entry.node);
            if !ip.is_loopback() {
                let message = "kept, and other hosts can use the proxy, for the registries that the configuration names; \
                               metrics are not on this port any more but on admin.listen";
                self.note(&entry.place, &entry.key, message);
            }
        }
        let cert = self.text(map, "certpem", "proxy.tls.cert");
        let key = self.text(map, "keypem", "proxy.tls.key");
        if cert.is_some() || key.is_some() {
            // Of one without the other, the one that is there is to be looked at.
            let given = if cert.is_some() { "certpem" } else { "keypem" };
            if let Some(entry) = map.get(given) {
                self.source("proxy.tls", given, &entry.node);
            }
            self.out.proxy.tls = Some(CertKey { cert, key });
        }
        if let Some(port) = self.value(map, "peerPort", number).filter(|port| *port > 0) {
            self.peer_port(port);
        }
        self.out.node.advertise = self.text(map, "localIP", "node.advertise");
    }

    fn peer_port(&mut self, port: u16) {
        self.out.peer.listen = Some(format!("0.0.0.0:{port}"));
    }

    /// Whether there are rules.
    fn proxies(&mut self, node: &'a Node) -> bool {
        let Some(items) = self.reader.list(node, "proxies") else { return true };
        for (at, item) in items.iter().enumerate() {
            let path = format!("proxies[{at}]");
            let Some(map) = self.reader.any_map(item, &path) else { continue };
            self.unknown(map, &path, &["regx", "direct", "use_https", "redirect"]);
            let ours = format!("rules[{at}]");
            self.source(&ours, &path, item);
            let regex = self.field(map, &path, "regx", &join(&ours, "regex"), text);
            if regex.is_none() && map.get("regx").is_none() {
                self.reader.problem_at(&item.place, join(&path, "regx"), "missing: the expression of the rule");
            }
            let rule = Rule {
                regex: regex.unwrap_or_default(),
                direct: self.field(map, &path, "direct", &ours, scalar::boolean).unwrap_or(false),
                use_https: self.field(map, &path, "use_https", &ours, scalar::boolean).unwrap_or(false),
                redirect: self.field(map, &path, "redirect", &join(&ours, "redirect"), text),
            };
            self.out.rules.push(rule);
        }
        !items.is_empty()
    }

    fn hijack(&mut self, node: &'a Node) {
        const PATH: &str = "hijack_https";
        let Some(map) = self.reader.any_map(node, PATH) else { return };
        self.unknown(map, PATH, &["cert", "key", "hosts"]);
        self.source("hijack", PATH, node);
        let mut hijack = Hijack {
            cert: self.field(map, PATH, "cert", "hijack.cert", text),
            key: self.field(map, PATH, "key", "hijack.key", text),
            hosts: Vec::new(),
        };
        let hosts = map.get("hosts").and_then(|entry| self.reader.list(&entry.node, "hijack_https.hosts"));
        for (at, item) in hosts.unwrap_or_default().iter().enumerate() {
            let path = format!("hijack_https.hosts[{at}]");
            let Some(map) = self.reader.any_map(item, &path) else { continue };
            self.unknown(map, &path, &["regx", "insecure", "certs"]);
            let Some(regex) = self.field(map, &path, "regx", "", text) else { continue };
            let place = map.get("regx").map_or(&item.place, |entry| &entry.node.place);
            let Some(pattern) = host_of(&regex) else {
                let message =
                    format!("left out: '{regex}' does not stand for one host or *.suffix; name hosts in hijack.hosts");
                self.note(place, &join(&path, "regx"), message);
                continue;
            };
            let message =
                format!("became {pattern}: hosts are compared as a whole here, not searched for an expression");
            self.note(place, &join(&path, "regx"), message);
            self.source(&format!("hijack.hosts[{}]", hijack.hosts.len()), &join(&path, "regx"), item);
            hijack.hosts.push(pattern.to_string());
            self.trust(map, &path, &pattern);
        }
        self.out.hijack = Some(hijack);
    }

    fn mirror(&mut self, node: &'a Node) {
        const PATH: &str = "registry_mirror";
        let Some(map) = self.reader.any_map(node, PATH) else { return };
        self.unknown(map, PATH, &["remote", "insecure", "certs", "direct"]);
        self.out.registry_mirror.remote = self.field(map, PATH, "remote", "registry_mirror.remote", text);
        let direct = self.field(map, PATH, "direct", "registry_mirror.direct", scalar::boolean);
        // What is not said is false with both.
        self.out.registry_mirror.direct = direct.unwrap_or(false);
        let host = self.out.registry_mirror.remote.as_deref().and_then(|url| url.parse::<http::Uri>().ok());
        let host = host.and_then(|url| url.authority()?.as_str().parse::<HostPort>().ok());
        // Without a host the check of the result says what is wrong with `remote`.
        if let Some(host) = host {
            self.trust(map, PATH, &HostPattern { host, below: false });
        }
    }

    /// `insecure` and `certs` of a host.
    fn trust(&mut self, map: Map<'a>, path: &str, pattern: &HostPattern) {
        if self.field(map, path, "insecure", "", scalar::boolean) == Some(true) {
            self.note_of(map, path, "insecure", INSECURE);
        }
        let Some(entry) = map.get("certs").filter(|entry| !is_empty(&entry.node)) else { return };
        let certs = join(path, "certs");
        let Some(files) = self.reader.list(&entry.node, &certs) else { return };
        let files: Vec<String> = files.iter().filter_map(|file| self.reader.scalar(file, &certs, text)).collect();
        match files.as_slice() {
            [] => {}
            _ if pattern.below => {
                self.note(
                    &entry.place,
                    &certs,
                    format!("left out: name the hosts of {pattern} in registries, with ca_file"),
                );
            }
            [file] => {
                let key = pattern.host.to_string();
                self.source(&join("registries", &key), &certs, &entry.node);
                self.out.registries.insert(key, Registry { ca_file: file.clone() });
            }
            _ => {
                let message = "left out: registries.HOST.ca_file takes one file; put these into one and name it there";
                self.note(&entry.place, &certs, message);
            }
        }
    }

    /// A key of the file itself.
    fn value<T>(&mut self, map: Map<'a>, key: &str, parse: impl Fn(&str) -> scalar::Parsed<T>) -> Option<T> {
        let entry = map.get(key).filter(|entry| !is_empty(&entry.node))?;
        self.reader.scalar(&entry.node, key, parse)
    }

    /// The text of a key of the file itself, that becomes `ours`.
    fn text(&mut self, map: Map<'a>, key: &str, ours: &str) -> Option<String> {
        let entry = map.get(key)?;
        self.source(ours, key, &entry.node);
        self.value(map, key, text)
    }

    /// A key of a mapping in the file, that becomes `ours`; empty if it becomes nothing that is checked.
    fn field<T>(
        &mut self,
        map: Map<'a>,
        path: &str,
        key: &str,
        ours: &str,
        parse: impl Fn(&str) -> scalar::Parsed<T>,
    ) -> Option<T> {
        let entry = map.get(key).filter(|entry| !is_empty(&entry.node))?;
        let path = join(path, key);
        if !ours.is_empty() {
            self.source(ours, &path, &entry.node);
        }
        self.reader.scalar(&entry.node, &path, parse)
    }

    fn unknown(&mut self, map: Map<'a>, path: &str, known: &[&str]) {
        for entry in map.entries().iter().filter(|entry| !known.contains(&entry.key.as_str())) {
            self.note(&entry.place, &join(path, &entry.key), "left out: not a key of dfdaemon v1 that is known here");
        }
    }

    fn source(&mut self, ours: &str, key: &str, node: &Node) {
        self.sources.insert(ours.to_owned(), (key.to_owned(), node.place.clone()));
    }

    fn note_of(&mut self, map: Map<'a>, path: &str, key: &str, message: &str) {
        let place = map.get(key).map_or(Place::Whole, |entry| entry.place.clone());
        self.note(&place, &join(path, key), message);
    }

    fn note(&mut self, place: &Place, key: &str, message: impl Into<String>) {
        self.notes.push(Problem::new(place.clone(), key, message));
    }
}

/// v1 writes what is not set as nothing, as an empty text, and as an empty list.
fn is_empty(node: &Node) -> bool {
    match &node.value {
        Value::Null => true,
        Value::Scalar(text) => text.is_empty(),
        Value::List(items) => items.is_empty(),
        Value::Map(_) => false,
    }
}

/// The hosts that an expression was meant for: a host, or all below one.
///
/// v1 searched it in `host:port`. What is written is a name as it stands, or one with escaped dots, anchors, the port of
/// HTTPS that may be there, or anything in front of a suffix.
fn host_of(regex: &str) -> Option<HostPattern> {
    let name = regex.strip_prefix('^').unwrap_or(regex);
    let name = name.strip_suffix('$').unwrap_or(name);
    let name =
        ["(:443)?", "(:\\d+)?", "(:[0-9]+)?", ":.*"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    let name = name.replace("\\.", ".").replace("[.]", ".").replace("\\-", "-");
    let starts = [".*.", ".+.", "(.*).", "(.+)."];
    match starts.iter().find_map(|start| name.strip_prefix(start)) {
        Some(suffix) => format!("*.{suffix}").parse().ok(),
        None => name.parse().ok().filter(|pattern: &HostPattern| !pattern.below),
    }
}

fn text(text: &str) -> scalar::Parsed<String> {
    Ok(text.to_owned())
}

fn number(text: &str) -> scalar::Parsed<u16> {
    text.parse().map_err(|_| format!("'{text}' is not a port"))
}

fn port(text: &str) -> scalar::Parsed<u16> {
    number(text).and_then(|port| if port == 0 { Err("0 is not a port".to_owned()) } else { Ok(port) })
}
