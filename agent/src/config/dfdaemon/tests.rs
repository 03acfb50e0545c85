#![allow(clippy::unwrap_used, clippy::panic)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use http::Method;
use rcgen::{CertificateParams, KeyPair};
use tempfile::TempDir;

use super::*;
use crate::app::wiring;
use crate::proxy::rules::{Decision, Rules};

/// The certificates that a `dfdaemon.yml` names.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        let key = KeyPair::generate().unwrap();
        let names = ["docker-registry.discovery.wmnet".to_owned(), "localhost".to_owned()];
        let cert = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        std::fs::write(files.path("dfdaemon.crt"), cert.pem()).unwrap();
        std::fs::write(files.path("ca.crt"), cert.pem()).unwrap();
        std::fs::write(files.path("dfdaemon.key"), key.serialize_pem()).unwrap();
        std::fs::set_permissions(files.path("dfdaemon.key"), PermissionsExt::from_mode(0o600)).unwrap();
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file as Wikimedia's nodes have it: two images through the swarm, a static certificate of the registry's name, a
    /// private CA, dfget's own port.
    fn wikimedia(&self) -> String {
        let (cert, key, ca) = (self.path("dfdaemon.crt"), self.path("dfdaemon.key"), self.path("ca.crt"));
        let (cert, key, ca) = (cert.display(), key.display(), ca.display());
        format!(
            r#"# Managed by configuration management.
registry_mirror:
  remote: "https://docker-registry.discovery.wmnet"
hostIp: 0.0.0.0
port: 65001
certpem: "{cert}"
keypem: "{key}"
proxies:
  - regx: "wikimedia/mediawiki/blobs/sha256.*"
    use_https: true
  - regx: "restricted/mediawiki-multiversion/blobs/sha256.*"
    use_https: true
hijack_https:
  cert: "{cert}"
  key: "{key}"
  hosts:
    - regx: "docker-registry.discovery.wmnet"
      certs: ["{ca}"]
dfget_flags: ["--home", "/var/lib/dragonfly-dfdaemon/dfget", "--ip", "0.0.0.0", "--port", "15001"]
ratelimit: 100M
supernodes: ["dragonfly1001.eqiad.wmnet"]
"#
        )
    }
}

fn lines(problems: &Problems) -> Vec<String> {
    problems.to_string().lines().map(str::to_owned).collect()
}

fn config(yaml: &str) -> Config {
    Config::parse("config.yaml", yaml, std::iter::empty()).unwrap()
}

#[track_caller]
fn assert_noted(notes: &[String], begins: &str, contains: &str) {
    let found = notes.iter().filter(|line| line.starts_with(&format!("d.yml:{begins}: ")) && line.contains(contains));
    assert_eq!(found.count(), 1, "{begins}: ...{contains}... in {notes:#?}");
}

/// Row 86 and row 95.
#[test]
fn wikimedia_s_file_sends_two_images_through_the_swarm_and_nothing_else() {
    let files = Files::new();
    let imported = import("d.yml", &files.wikimedia()).unwrap();
    let config = config(&imported.yaml);
    assert_eq!(config.proxy.listen.to_string(), "0.0.0.0:65001");
    assert_eq!(config.proxy.tls.as_ref().unwrap().cert_file, files.path("dfdaemon.crt"));
    assert_eq!(config.peer.listen.to_string(), "0.0.0.0:15001");
    assert_eq!(config.registry_mirror.remote.as_ref().unwrap(), "https://docker-registry.discovery.wmnet");
    assert_eq!(config.hijack.hosts, ["docker-registry.discovery.wmnet".parse().unwrap()]);
    let registry = &config.registries[&"docker-registry.discovery.wmnet".parse().unwrap()];
    assert_eq!(registry.ca_file, Some(files.path("ca.crt")));

    let notes = lines(&imported.notes);
    assert_noted(&notes, "4:1: hostIp", "admin.listen");
    assert_noted(&notes, "17:13: hijack_https.hosts[0].regx", "became docker-registry.discovery.wmnet");
    assert_noted(&notes, "19:15: dfget_flags --home", "left out");
    assert_noted(&notes, "19:62: dfget_flags --ip", "nobody can be reached there");
    assert_noted(&notes, "20:1: ratelimit", "rate limits are not available in this version");
    assert_noted(&notes, "21:1: supernodes", "left out");
    assert!(notes.iter().any(|line| line.ends_with(NO_PEERS)), "{notes:#?}");

    let rules = Rules::new(&wiring::proxy(&config).unwrap().rules).unwrap();
    let blob = format!("blobs/sha256:{}", "ab".repeat(32));
    let swarm = Decision { use_https: true, ..Decision::SWARM };
    for (image, expected) in [
        ("wikimedia/mediawiki", swarm),
        ("restricted/mediawiki-multiversion", swarm),
        ("wikimedia/mediawiki-services-parsoid", Decision::DIRECT),
        ("restricted/mediawiki-webserver", Decision::DIRECT),
        ("python3-build-bullseye", Decision::DIRECT),
        ("mediawiki", Decision::DIRECT),
    ] {
        let url = |rest: &str| format!("https://docker-registry.discovery.wmnet/v2/{image}/{rest}");
        assert_eq!(rules.decide(&Method::GET, &url(&blob)), expected, "{image}");
        assert_eq!(rules.decide(&Method::HEAD, &url(&blob)), Decision::DIRECT, "{image}");
        assert_eq!(rules.decide(&Method::GET, &url("manifests/latest")), Decision::DIRECT, "{image}");
        assert_eq!(rules.decide(&Method::GET, &url("blobs/uploads/")), Decision::DIRECT, "{image}");
    }
}

#[test]
fn without_proxies_nothing_goes_through_the_swarm_as_in_v1() {
    for text in ["", "proxies:\n", "proxies: []", "registry_mirror: {remote: 'http://10.0.0.1:5000'}"] {
        let imported = import("d.yml", text).unwrap();
        let rules = Rules::new(&wiring::proxy(&config(&imported.yaml)).unwrap().rules).unwrap();
        assert_eq!(rules.decide(&Method::GET, "https://r/v2/a/blobs/sha256:ab"), Decision::DIRECT, "{text}");
    }
}

#[test]
fn rules_keep_their_order_and_all_they_say() {
    let text = "proxies:\n- {regx: no-proxy, direct: true}\n- {regx: 'a \"b\" \\d: #{1,2}', redirect: 'new.example:5000'}\n- \
                {regx: 0x10, use_https: true}\n";
    let config = config(&import("d.yml", text).unwrap().yaml);
    let rules: Vec<_> = config.rules.iter().map(|rule| (rule.regex.as_str(), rule.direct, rule.use_https)).collect();
    assert_eq!(rules, [("no-proxy", true, false), ("a \"b\" \\d: #{1,2}", false, false), ("0x10", false, true)]);
    assert_eq!(config.rules[1].redirect, Some("new.example:5000".parse().unwrap()));
}

#[test]
fn whatever_cannot_come_along_is_noted_with_its_place() {
    let text = r#"registry_mirror:
  remote: https://registry.example.org
  insecure: true
  direct: true
  certs: [/a.crt, /b.crt]
  mirrors: 3
hijack_https:
  hosts:
  - regx: .*
    insecure: true
  - regx: ^cdn\.example\.org(:443)?$
    insecure: true
dfpath: /usr/bin/dfget
localrepo: /var/lib/df
maxprocs: 4
verbose: true
logConfig: {path: /var/log/x}
streamMode: false
urlfilter: Signature
dfget_flags: ["-n", "a,b", "--notbs", "--callsystem=com_ops", "--expiretime", "3m0s", "--what", "x", "--dfdaemon"]
"#;
    // Hosts are hijacked with a certificate only.
    let problems = lines(&import("d.yml", text).unwrap_err());
    assert_eq!(problems.len(), 1, "{problems:#?}");
    assert!(problems[0].starts_with("d.yml:8:3: hijack_https: hosts are named"), "{problems:#?}");

    let imported = import("d.yml", &text.replace("^cdn\\.example\\.org(:443)?$", "(a|b)")).unwrap();
    let config = config(&imported.yaml);
    assert_eq!((config.cache.idle.as_secs(), config.registry_mirror.direct), (180, true));
    let notes = lines(&imported.notes);
    for (begins, contains) in [
        ("3:3: registry_mirror.insecure", "always checked"),
        ("5:3: registry_mirror.certs", "takes one file"),
        ("6:3: registry_mirror.mirrors", "not a key"),
        ("9:11: hijack_https.hosts[0].regx", "does not stand for one host"),
        ("13:1: dfpath", "left out"),
        ("14:1: localrepo", "cache.dir"),
        ("15:1: maxprocs", "left out"),
        ("16:1: verbose", "DARTER_LOG"),
        ("17:1: logConfig", "stderr"),
        ("18:1: streamMode", "streamed"),
        ("19:1: urlfilter", "not a key"),
        ("20:15: dfget_flags --node", "no supernode"),
        ("20:28: dfget_flags --notbs", "registry is asked"),
        ("20:39: dfget_flags --callsystem", "left out"),
        ("20:63: dfget_flags --expiretime", "became cache.idle"),
        ("20:87: dfget_flags --what", "not a flag of dfget v1"),
    ] {
        assert_noted(&notes, begins, contains);
    }
}

#[test]
fn all_that_is_wrong_is_told_at_once_with_its_place() {
    let text = "port: 99999\nproxies:\n- {regx: a, direct: perhaps}\n- {use_https: true}\n- x\ndfget_flags: [--port]\n\
                supernodes: a\nport: 1\n";
    let problems = lines(&import("d.yml", text).unwrap_err());
    for begins in [
        "d.yml:1:7: port: ",
        "d.yml:3:21: proxies[0].direct: ",
        "d.yml:4:3: proxies[1].regx: missing",
        "d.yml:5:3: proxies[2]: ",
        "d.yml:6:15: dfget_flags: --port has no value",
        "d.yml:8:1: port: given twice",
    ] {
        assert_eq!(problems.iter().filter(|line| line.starts_with(begins)).count(), 1, "{begins} in {problems:#?}");
    }
    assert_eq!(problems.len(), 6, "{problems:#?}");
}

/// What the agent refuses of the result is told where v1's file says it, all of it at once.
#[test]
fn what_the_agent_would_refuse_is_told_at_v1_s_key() {
    let text = "registry_mirror: {remote: index.docker.io, certs: [/no.crt]}\nproxies:\n- regx: '('\n- {regx: a, redirect: \
                'http://b'}\ncertpem: /no.pem\nhijack_https:\n  cert: /no.crt\n  key: /no.key\n  hosts: [{regx: a.org}]\n";
    let mirror = |direct: &str| format!("registry_mirror: {{remote: 'https://a.org', direct: {direct}}}");
    for (direct, expected) in [("true", true), ("false", false), ("", false)] {
        assert_eq!(
            config(&import("d.yml", &mirror(direct)).unwrap().yaml).registry_mirror.direct,
            expected,
            "{direct}"
        );
    }
    assert!(lines(&import("d.yml", &mirror("no")).unwrap_err())[0].starts_with("d.yml:1:52: registry_mirror.direct: "));
    let problems = lines(&import("d.yml", text).unwrap_err());
    for begins in [
        "d.yml:1:27: registry_mirror.remote: 'index.docker.io' is not the URL",
        "d.yml:3:9: proxies[0].regx: '(' is not a regular expression",
        "d.yml:4:23: proxies[1].redirect: 'http://b'",
        "d.yml:5:10: certpem: missing: a certificate and its key belong together",
        "d.yml:7:9: hijack_https.cert: /no.crt cannot be read",
        "d.yml:8:8: hijack_https.key: /no.key cannot be read",
    ] {
        assert_eq!(problems.iter().filter(|line| line.starts_with(begins)).count(), 1, "{begins} in {problems:#?}");
    }
    assert!(lines(&import("d.yml", "a: [").unwrap_err())[0].contains("not valid YAML"));
    assert!(lines(&import("d.yml", "- a").unwrap_err())[0].contains("a mapping is wanted here"));
}

#[test]
fn expressions_become_hosts_where_they_stand_for_some() {
    for (regex, expected) in [
        ("docker-registry.discovery.wmnet", Some("docker-registry.discovery.wmnet")),
        ("mirror.example.com:443", Some("mirror.example.com:443")),
        ("^registry\\.example\\.org(:443)?$", Some("registry.example.org")),
        ("^registry[.]example[.]org:.*", Some("registry.example.org")),
        (".*\\.example\\.org", Some("*.example.org")),
        ("^(.+)\\.example\\.org:5000$", Some("*.example.org:5000")),
        ("10.0.0.1:5000", Some("10.0.0.1:5000")),
        ("host-1", Some("host-1")),
        (".*", None),
        ("(a|b).example.org", None),
        ("registry", Some("registry")),
        ("[a-z]+.example.org", None),
        ("*.example.org", None),
        ("", None),
        ("a.*.example.org", None),
    ] {
        assert_eq!(host_of(regex).map(|pattern| pattern.to_string()).as_deref(), expected, "{regex}");
    }
}
