//! The configuration as a whole: what every bad input gets, where, and that nothing hides anything else.

#![allow(clippy::unwrap_used, clippy::panic)]

mod good;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

use super::*;

/// All listeners on loopback: what makes a loopback address a good one.
const LOOPBACK: &str = "peer: {listen: 127.0.0.1:15001}\ngossip: {listen: 127.0.0.1:8002}\n";

fn parse(text: &str) -> Result<Config, Problems> {
    with_env(text, &[])
}

fn with_env(text: &str, env: &[(&str, &str)]) -> Result<Config, Problems> {
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::parse("f.yaml", text, env)
}

/// The lines of what is wrong with a text.
fn wrong(text: &str) -> Vec<String> {
    match parse(text) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.to_string().lines().map(str::to_owned).collect(),
    }
}

/// Asserts that a text has exactly one problem, that begins like this and contains that.
#[track_caller]
fn assert_wrong(text: &str, begins: &str, contains: &str) {
    let lines = wrong(text);
    let fits = lines.len() == 1 && lines[0].starts_with(&format!("f.yaml:{begins}: ")) && lines[0].contains(contains);
    assert!(fits, "{text}\nexpected {begins}: ...{contains}...\ngot {lines:#?}");
}

/// A folder with the files that a configuration can name.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A certificate for `registry.example.org` and its key.
    fn pair(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(["registry.example.org".to_owned()]).unwrap().self_signed(&key).unwrap();
        let cert = self.write(&format!("{name}.crt"), cert.pem(), 0o644);
        (cert, self.write(&format!("{name}.key"), key.serialize_pem(), 0o600))
    }
}

fn secret() -> String {
    crate::cli::keys::secret().unwrap()
}

#[test]
fn unknown_keys_are_found_at_every_level() {
    for (text, begins, contains) in [
        ("proxi: {}", "1:1: proxi", "no such key, did you mean proxy?"),
        ("verify: streaming\nsomething: 1", "2:1: something", "no such key"),
        ("proxy: {lisen: 127.0.0.1:1}", "1:9: proxy.lisen", "did you mean listen?"),
        ("proxy: {tls: {crt: a}}", "1:15: proxy.tls.crt", "did you mean cert?"),
        ("cache:\n  dir: /var/cache\n  maxsize: 1GiB", "3:3: cache.maxsize", "did you mean max_size?"),
        ("rules:\n  - {regex: a, driect: true}", "2:16: rules[0].driect", "did you mean direct?"),
        ("registries:\n  \"a:1\": {insecure: true}", "2:11: registries.\"a:1\".insecure", "no such key"),
        ("discovery: [{statik: {}}]", "1:14: discovery[0].statik", "did you mean static?"),
        ("discovery: [{static: {addresses: [], x: 1}}]", "1:38: discovery[0].static.x", "no such key"),
        ("1: 2", "1:1: 1", "no such key"),
        ("<<: {verify: streaming}", "1:1: <<", "no such key"),
    ] {
        assert_wrong(text, begins, contains);
    }
}

#[test]
fn wrong_kinds_are_found() {
    for (text, begins, contains) in [
        ("- a", "1:1", "a mapping is wanted here, not a list"),
        ("hello", "1:1", "a mapping is wanted here, not a single value"),
        ("proxy: 5", "1:8: proxy", "a mapping is wanted here, not a single value"),
        ("node: [a]", "1:7: node", "a mapping is wanted here, not a list"),
        ("cache: {max_size: [1]}", "1:19: cache.max_size", "a single value is wanted here, not a list"),
        ("proxy: {listen: {a: 1}}", "1:17: proxy.listen", "not a mapping"),
        ("proxy:\n  listen:\n", "2:", "a single value is wanted here, not nothing"),
        ("discovery: {static: {}}", "1:12: discovery", "a list is wanted here, not a mapping"),
        ("discovery: [a]", "1:13: discovery[0]", "a mapping is wanted here"),
        ("discovery: [{static: {addresses: a}}]", "1:34: discovery[0].static.addresses", "a list is wanted here"),
        ("rules: [a]", "1:9: rules[0]", "a mapping is wanted here"),
        ("rules: [{regex: a, direct: perhaps}]", "1:28: rules[0].direct", "not one of: true, false"),
        ("hijack: {hosts: a}", "1:17: hijack.hosts", "a list is wanted here"),
        ("registries: [a]", "1:13: registries", "a mapping is wanted here"),
        ("node: {role: leader}", "1:14: node.role", "not one of: node, seed"),
        ("node: {cluster: \"a b\"}", "1:17: node.cluster", "not a name"),
        ("verify: later", "1:9: verify", "not one of: streaming, before_stream"),
        ("tag_ttl: 5", "1:10: tag_ttl", "not a duration"),
        ("tag_ttl: 24h1ms", "1:10: tag_ttl", "longer than 24h"),
        ("registries: {a: {tag_ttl: 2d}}", "1:27: registries.a.tag_ttl", "longer than 24h"),
        ("when_registry_down: panic", "1:21: when_registry_down", "seen, allow, deny"),
    ] {
        let lines = wrong(text);
        assert!(lines.len() == 1 && lines[0].starts_with(&format!("f.yaml:{begins}")), "{text} {lines:?}");
        assert!(lines[0].contains(contains), "{text} {lines:?}");
    }
}

#[test]
fn bad_values_are_found() {
    for (text, begins, contains) in [
        ("cache: {max_size: 20Gi}", "1:19: cache.max_size", "neither a size"),
        ("cache: {max_size: 1MiB}", "1:19: cache.max_size", "less than 16 MiB"),
        ("cache: {max_size: 0%}", "1:19: cache.max_size", "a cache of nothing"),
        ("cache: {max_size: 99999999TiB}", "1:19: cache.max_size", "too large"),
        ("cache: {min_free: 101%}", "1:19: cache.min_free", "not a share"),
        ("cache: {min_free: 100%}", "1:19: cache.min_free", "nothing can be cached"),
        ("cache: {idle: 5}", "1:15: cache.idle", "not a duration"),
        ("cache: {idle: 0s}", "1:15: cache.idle", "longer than nothing"),
        ("cache: {dir: var/lib}", "1:14: cache.dir", "must be absolute"),
        ("cache: {dir: ''}", "1:14: cache.dir", "empty"),
        ("limits: {download: fast}", "1:20: limits.download", "not a rate"),
        ("limits: {upload: -1}", "1:18: limits.upload", "not a rate"),
        ("limits: {per_task: 20MB/s}", "1:20: limits.per_task", "not a rate"),
        ("proxy: {listen: 127.0.0.1}", "1:17: proxy.listen", "not an address and port"),
        ("admin: {listen: localhost:15003}", "1:17: admin.listen", "no host names"),
        ("gossip: {listen: 0.0.0.0:70000}", "1:18: gossip.listen", "not an address and port"),
        ("node: {advertise: 10.0.0.1:15001}", "1:19: node.advertise", "not an IP address"),
        ("node: {advertise: host.example.org}", "1:19: node.advertise", "not an IP address"),
        ("discovery: [{static: {addresses: [10.0.0.1]}}]", "1:35: discovery[0].static.addresses[0]", "a port"),
        ("discovery: [{static: {}}]", "1:14: discovery[0].static.addresses", "missing"),
        ("discovery: [{}]", "1:13: discovery[0]", "one of static, file, dns or kubernetes"),
        ("registry_mirror: {remote: index.docker.io}", "1:27: registry_mirror.remote", "https://"),
        ("registry_mirror: {remote: \"https://a/v2/\"}", "1:27: registry_mirror.remote", "it has a path"),
        ("registry_mirror: {direct: perhaps}", "1:27: registry_mirror.direct", "not one of: true, false"),
        ("registry_mirror: {remote: \"https://me:pw@a\"}", "1:27: registry_mirror.remote", "credentials"),
        ("rules: [{regex: \"a(\"}]", "1:17: rules[0].regex", "unclosed group"),
        ("rules: [{direct: true}]", "1:9: rules[0].regex", "missing"),
        ("rules: [{regex: a, redirect: \"http://b\"}]", "1:30: rules[0].redirect", "not a URL"),
        ("registries: {\"https://a\": {}}", "1:14: registries.\"https://a\"", "not a URL"),
        ("registries: {a: {}, A: {}}", "1:21: registries.A", "two spellings"),
        ("piece_size: 1KiB", "1:13: piece_size", "between 4KiB and 16MiB"),
        ("piece_size: big", "1:13: piece_size", "not auto, dragonfly or a size"),
    ] {
        assert_wrong(text, begins, contains);
    }
}

#[test]
fn what_comes_with_a_later_version_says_so() {
    assert_wrong("limits: {upload: 100M}", "1:18: limits.upload", "not available in this version");
}

#[test]
fn mistakes_in_sources_are_found() {
    for (text, begins, contains) in [
        ("{file: {}}", "1:14: discovery[0].file.path", "missing"),
        ("{file: {path: peers}}", "1:27: discovery[0].file.path", "must be absolute"),
        ("{file: {pat: /a}}", "", ""),
        ("{dns: {}}", "1:14: discovery[0].dns.name", "missing"),
        ("{dns: {name: 'a b'}}", "1:26: discovery[0].dns.name", "not a name in DNS"),
        ("{dns: {name: 10.0.0.1}}", "1:26: discovery[0].dns.name", "not a name in DNS"),
        ("{dns: {name: \"a.b:53\"}}", "1:26: discovery[0].dns.name", "no port"),
        ("{dns: {name: a.b, port: 0}}", "1:37: discovery[0].dns.port", "not a port between 1 and 65535"),
        ("{dns: {name: a.b, prot: 1}}", "1:31: discovery[0].dns.prot", "did you mean port?"),
        ("{dns: {name: a.b, servers: 10.0.0.1}}", "1:40: discovery[0].dns.servers", "a list is wanted here"),
        ("{dns: {name: a.b, servers: [a]}}", "1:41: discovery[0].dns.servers[0]", "not the address of a resolver"),
        ("{kubernetes: {}}", "1:14: discovery[0].kubernetes", "a service, or nodes: true, is wanted here"),
        ("{kubernetes: {nodes: false}}", "1:14: discovery[0].kubernetes", "a service, or nodes: true"),
        ("{kubernetes: {nodes: maybe}}", "1:34: discovery[0].kubernetes.nodes", "not one of: true, false"),
        ("{kubernetes: {nodes: true, service: a}}", "1:14: discovery[0].kubernetes", "are two sources"),
        ("{kubernetes: {nodes: true, namespace: a}}", "1:14: discovery[0].kubernetes.namespace", "of no use"),
        ("{kubernetes: {service: A_b}}", "1:36: discovery[0].kubernetes.service", "not a name in Kubernetes"),
        ("{kubernetes: {service: a, kubeconfig: b}}", "1:51: discovery[0].kubernetes.kubeconfig", "must be absolute"),
        ("{kubernetes: {servise: a}}", "", ""),
    ] {
        let text = format!("discovery: [{text}]");
        if begins.is_empty() {
            // The key that was meant is missing as well.
            assert_eq!(wrong(&text).len(), 2, "{text}");
        } else {
            assert_wrong(&text, begins, contains);
        }
    }
    let many = ["10.0.0.1"; 9].join(", ");
    assert_wrong(
        &format!("discovery: [{{dns: {{name: a.b, servers: [{many}]}}}}]"),
        "1:40: discovery[0].dns.servers",
        "more than 8 resolvers",
    );
    // All of them at once.
    assert_eq!(wrong("discovery: [{dns: {}}, {kubernetes: {nodes: false}}, {dns: {name: 'a b'}}]").len(), 3);
}

#[test]
fn duplicate_keys_are_found() {
    assert_wrong("verify: streaming\nverify: streaming", "2:1: verify", "given twice, first in line 1");
    assert_wrong(
        "proxy:\n  listen: 127.0.0.1:1\n  listen: 127.0.0.1:2",
        "3:3: proxy.listen",
        "given twice, first in line 2",
    );
    assert_wrong("registries: {a: {}, a: {}}", "1:21: registries.a", "given twice");
}

#[test]
fn what_is_not_yaml_is_found() {
    assert_wrong("proxy: [1\nnode: 2", "2:5", "not valid YAML");
    assert_wrong("proxy: *nothing", "1:8", "not valid YAML");
}

#[test]
fn addresses_that_nobody_reaches_are_found() {
    for (text, begins, contains) in [
        ("node: {advertise: 0.0.0.0}", "1:19: node.advertise", "nobody can be reached at"),
        ("node: {advertise: \"::\"}", "1:19: node.advertise", "nobody can be reached at"),
        ("node: {advertise: 224.0.0.1}", "1:19: node.advertise", "nobody can be reached at"),
        ("node: {advertise: 255.255.255.255}", "1:19: node.advertise", "nobody can be reached at"),
        ("node: {advertise: 203.0.113.7}", "1:19: node.advertise", "not an address of this host"),
        ("node: {advertise: 127.0.0.1}", "1:19: node.advertise", "only if every listener is on loopback"),
        ("proxy: {listen: \"203.0.113.7:1\"}", "1:17: proxy.listen", "not an address of this host"),
    ] {
        assert_wrong(text, begins, contains);
    }
    // One listener that is not on loopback is enough.
    let text = format!("node: {{advertise: 127.0.0.1}}\nadmin: {{listen: 0.0.0.0:15003}}\n{LOOPBACK}");
    assert_wrong(&text, "1:19: node.advertise", "only if every listener is on loopback");
    let lines = wrong(&format!("node: {{advertise: 127.0.0.2}}\n{LOOPBACK}"));
    assert_eq!(lines.len(), 2, "neither listener is reached there: {lines:?}");
    assert!(lines.iter().all(|line| line.starts_with("f.yaml:1:19: node.advertise: 127.0.0.2 does not reach")));
}

#[test]
fn listeners_in_each_others_way_are_found() {
    for (text, begins, contains) in [
        ("proxy: {listen: 127.0.0.1:15003}", "f.yaml: admin.listen", "taken by proxy.listen"),
        ("gossip: {listen: \"0.0.0.0:15001\"}", "f.yaml:1:18: gossip.listen", "taken by peer.listen"),
        ("admin: {listen: \"[::]:65001\"}", "f.yaml:1:17: admin.listen", "taken by proxy.listen"),
    ] {
        let lines = wrong(text);
        assert!(lines.len() == 1 && lines[0].starts_with(begins) && lines[0].contains(contains), "{text} {lines:?}");
    }
    // UDP and TCP have ports of their own, and port 0 is whatever is free.
    assert_eq!(wrong("admin: {listen: \"0.0.0.0:8002\"}"), [""; 0]);
    assert_eq!(wrong("admin: {listen: \"127.0.0.1:0\"}\nproxy: {listen: \"127.0.0.1:0\"}"), [""; 0]);
}

#[test]
fn bad_secret_files_are_found() {
    let files = Files::new();
    let short = "c2hvcnQ=";
    for (content, mode, problems) in [
        (String::new(), 0o600, &["is empty"][..]),
        ("\n\n".to_owned(), 0o600, &["is empty"][..]),
        (format!("{short}\n"), 0o600, &["line 1 of", "holds 5 bytes, a secret has at least 32"][..]),
        (format!("{}\nnot base64!\n", secret()), 0o600, &["line 2 of", "is not base64"][..]),
        (secret(), 0o644, &["can be read or written by everybody (mode 0644)"][..]),
        (secret(), 0o602, &["can be read or written by everybody (mode 0602)"][..]),
    ] {
        let path = files.write("secret", &content, mode);
        let text = format!("{LOOPBACK}secret_file: {path}\n");
        for contains in problems {
            assert_wrong(&text, "3:14: secret_file", contains);
        }
        assert!(!wrong(&text)[0].contains(short) && !wrong(&text)[0].contains("not base64!"), "secrets are not shown");
    }
    for (path, contains) in [(files.path("nothing"), "No such file"), (files.path("."), "is not a file")] {
        assert_wrong(&format!("{LOOPBACK}secret_file: {}", path.display()), "3:14: secret_file", contains);
    }
    let path = files.write("secret", "x".repeat(100_000), 0o600);
    assert_wrong(&format!("{LOOPBACK}secret_file: {path}"), "3:14: secret_file", "larger than");
    // Everything that is wrong with the file at once.
    let path = files.write("secret", format!("{short}\n?\n{}\n", secret()), 0o604);
    assert_eq!(wrong(&format!("{LOOPBACK}secret_file: {path}")).len(), 3);
}

#[test]
fn bad_certificates_and_keys_are_found() {
    let files = Files::new();
    let (cert, key) = files.pair("one");
    let (_, other_key) = files.pair("other");
    let open_key = files.write("open.key", fs::read(&key).unwrap(), 0o640);
    let text = files.write("text", "no PEM here", 0o600);
    let broken = files.write("broken.crt", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 0o600);
    let gone = files.path("gone");
    let gone = gone.to_str().unwrap();
    for (cert, key, blamed, contains) in [
        (cert.as_str(), other_key.as_str(), "key", "does not fit the certificate"),
        (&cert, &open_key, "key", "open to others than its owner (mode 0640)"),
        (&cert, &text, "key", "no PEM private key"),
        (&cert, gone, "key", "No such file"),
        (gone, &key, "cert", "No such file"),
        (&text, &key, "cert", "no PEM certificate"),
        (&broken, &key, "cert", "cannot be used"),
        (&key, &key, "cert", "no PEM certificate"),
    ] {
        let at = if blamed == "cert" { "2:9" } else { "3:8" };
        assert_wrong(&format!("hijack:\n  cert: {cert}\n  key: {key}"), &format!("{at}: hijack.{blamed}"), contains);
        let at = if blamed == "cert" { "3:11" } else { "4:10" };
        let proxy = format!("proxy:\n  tls:\n    cert: {cert}\n    key: {key}");
        assert_wrong(&proxy, &format!("{at}: proxy.tls.{blamed}"), contains);
    }
    assert_eq!(wrong(&format!("hijack: {{cert: {gone}, key: {gone}}}")).len(), 2, "both are told");
    assert_wrong(&format!("hijack: {{cert: {cert}}}"), "1:16: hijack.key", "belong together");
    assert_wrong(&format!("proxy: {{tls: {{key: {key}}}}}"), "1:20: proxy.tls.cert", "belong together");
    assert_wrong(
        "hijack:\n  hosts: [registry.example.org]",
        "2:10: hijack.hosts",
        "neither hijack.cert nor hijack.key",
    );
    let hosts = format!("hijack: {{cert: {cert}, key: {key}, hosts: [a, \"*b\"]}}");
    assert!(wrong(&hosts)[0].contains("hijack.hosts[1]: '*b': a pattern is *.suffix"));
    // Trust anchors.
    for (file, contains) in [(gone, "No such file"), (&text, "no PEM certificate"), (&broken, "certificate 1 of")] {
        let text = format!("registries:\n  a: {{ca_file: {file}}}");
        assert_wrong(&text, "2:16: registries.a.ca_file", contains);
    }
    let text = format!("registries: {{a: {{ca_file: {cert}, insecure_http: true}}}}");
    assert_wrong(&text, "1:27: registries.a.ca_file", "of no use");
}

#[test]
fn all_problems_come_at_once_in_the_order_of_the_file() {
    let text = "\
cache:
  idle: never
  max_size: much
node: {advertise: 0.0.0.0, nmae: a}
secret_file: /nowhere/secret
rules: [{regex: \"[\"}]
peer: {transport: udp, listen: here}
verify: x
verify: y
";
    let env = [("DARTER_PROXY_LISTEN", "nowhere"), ("DARTER_PROXI_LISTEN", "a"), ("DARTER_RULES", "[]")];
    let problems = with_env(text, &env).unwrap_err();
    let lines: Vec<_> = problems.list().iter().map(|problem| (problem.place.clone(), problem.key.as_str())).collect();
    let at = |line, column| Place::File { line, column };
    let variable = |name: &str| Place::Environment(name.to_owned());
    assert_eq!(
        lines,
        [
            (at(2, 9), "cache.idle"),
            (at(3, 13), "cache.max_size"),
            (at(4, 19), "node.advertise"),
            (at(4, 28), "node.nmae"),
            (at(5, 14), "secret_file"),
            (at(6, 17), "rules[0].regex"),
            (at(7, 19), "peer.transport"),
            (at(7, 32), "peer.listen"),
            (at(8, 9), "verify"),
            (at(9, 1), "verify"),
            (variable("DARTER_PROXI_LISTEN"), ""),
            (variable("DARTER_PROXY_LISTEN"), "proxy.listen"),
            (variable("DARTER_RULES"), "rules"),
        ]
    );
    assert_eq!(problems.to_string().lines().count(), lines.len());
    assert!(problems.to_string().contains("DARTER_PROXI_LISTEN: no such setting, did you mean DARTER_PROXY_LISTEN?"));
}

#[test]
fn files_that_cannot_be_read_are_said() {
    let files = Files::new();
    let load = |path: &Path| Config::load(path, std::iter::empty()).unwrap_err().to_string();
    let gone = files.path("gone.yaml");
    assert_eq!(load(&gone), format!("{0}: {0} cannot be read: No such file or directory (os error 2)", gone.display()));
    let path = files.write("f.yaml", b"node: {name: \xff}", 0o644);
    assert!(load(Path::new(&path)).contains("not UTF-8 after byte 13"));
    let path = files.write("f.yaml", "#".repeat(2 << 20), 0o644);
    assert!(load(Path::new(&path)).contains("larger than"));
}

#[test]
fn addresses_that_are_taken_are_all_told() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let also = TcpListener::bind("127.0.0.1:0").unwrap();
    let (taken, also) = (taken.local_addr().map(|addr| (addr, taken)).unwrap(), (also.local_addr().unwrap(), also));
    let text = format!("proxy: {{listen: \"{}\"}}\nadmin:\n  listen: \"{}\"", taken.0, also.0);
    let config = parse(&text).unwrap();
    let told = config.try_listeners(None).unwrap_err().to_string();
    let lines: Vec<_> = told.lines().collect();
    assert_eq!(lines.len(), 2, "{told}");
    assert!(lines[0].starts_with("f.yaml:1:17: proxy.listen: ") && lines[0].contains("in use"), "{told}");
    assert!(lines[1].starts_with("f.yaml:3:11: admin.listen: "), "{told}");
    drop((taken, also));
    config.try_listeners(None).unwrap();
}

#[test]
fn peers_need_their_port_for_tcp_unless_they_use_quic_alone() {
    let files = Files::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let secret = files.write("secret", format!("{}\n", "A".repeat(44)), 0o600);
    for (transport, free) in [("auto", false), ("tcp", false), ("quic", true)] {
        let text = format!(
            "secret_file: {secret}\nproxy: {{listen: \"127.0.0.1:0\"}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n\
             gossip: {{listen: \"127.0.0.1:0\"}}\npeer: {{transport: {transport}, listen: \"127.0.0.1:{port}\"}}"
        );
        let tried = parse(&text).unwrap().try_listeners(None);
        assert_eq!(tried.is_ok(), free, "{transport}: {tried:?}");
    }
}
