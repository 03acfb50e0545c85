//! What good configurations mean.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use darter_discovery::{dns, kubernetes};
use darter_tracker::{PieceSizeRule, Role};

use super::*;
use crate::app::wiring;

/// Everything but the places.
fn shown(mut config: Config) -> String {
    config.origin = Origin::default();
    format!("{config:#?}")
}

#[test]
fn every_default_is_valid_and_explained() {
    let config = parse("").unwrap();
    assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
    assert!(config.warnings[0].contains("proxy only"));
    assert_eq!(config.cluster_keys().map(|keys| keys.is_none()), Ok(true));
    for key in defaults::KEYS {
        assert!(!key.default.is_empty() && key.why.len() > 20, "{}", key.path);
        assert_eq!(key.scalar, !matches!(key.default, "[]" | "{}") && key.path != "proxy.tls", "{}", key.path);
    }
    let paths: BTreeSet<_> = defaults::KEYS.iter().map(|key| key.path).collect();
    assert_eq!(paths.len(), defaults::KEYS.len());
}

#[test]
fn the_printed_defaults_are_the_defaults() {
    let yaml = defaults::yaml();
    assert_eq!(shown(parse(&yaml).unwrap()), shown(parse("").unwrap()));
    for key in defaults::KEYS {
        let (_, name) = defaults::split(key.path);
        assert!(yaml.lines().any(|line| line.trim_start() == format!("{name}: {}", key.default)), "{}", key.path);
    }
    assert!(yaml.lines().all(|line| line.len() <= 120 && line.trim_end() == line));
}

/// Row 21: a seed keeps what others forget, unless it is told otherwise.
#[test]
fn a_seed_keeps_blobs_for_longer() {
    let idle = |text: &str| parse(text).unwrap().cache.idle.as_secs();
    assert_eq!(idle("node: {role: node}"), 3600);
    assert_eq!(idle("node: {role: seed}"), 24 * 3600);
    assert_eq!(idle("{node: {role: seed}, cache: {idle: 2h}}"), 2 * 3600);
    assert_eq!(idle("{node: {role: seed}, cache: {idle: null}}"), 24 * 3600);
}

#[test]
fn the_printed_examples_are_valid() {
    for key in defaults::KEYS.iter().filter(|key| !key.example.is_empty()) {
        if key.path == "proxy.tls" || key.path == "hijack.hosts" || key.path == "registries" {
            continue; // Those name files that are not here.
        }
        let lines: Vec<_> = key.example.iter().map(|line| format!("  {line}\n")).collect();
        let text = format!("{}:\n{}", key.path, lines.concat());
        assert_eq!(wrong(&text), [""; 0], "{text}");
    }
}

#[test]
fn sources_of_every_kind_are_accepted() {
    let text = r#"
gossip: {listen: "0.0.0.0:9002"}
discovery:
  - file: {path: /etc/darter/peers}
  - dns: {name: Darter.kube-system.svc.cluster.local.}
  - dns: {name: a.b, port: 7, servers: [10.96.0.10, "[fd00::a]:5353"]}
  - kubernetes: {service: darter, namespace: kube-system}
  - kubernetes: {nodes: true, kubeconfig: /etc/kubeconfig}
"#;
    let expected = [
        Source::File { path: "/etc/darter/peers".into() },
        Source::Dns(dns::Query {
            name: "darter.kube-system.svc.cluster.local.".to_owned(),
            port: 9002,
            servers: Vec::new(),
        }),
        Source::Dns(dns::Query {
            name: "a.b".to_owned(),
            port: 7,
            servers: vec!["10.96.0.10:53".parse().unwrap(), "[fd00::a]:5353".parse().unwrap()],
        }),
        Source::Kubernetes(kubernetes::Query {
            what: kubernetes::Watched::Service {
                namespace: Some("kube-system".to_owned()),
                service: "darter".to_owned(),
            },
            port: 9002,
            kubeconfig: None,
        }),
        Source::Kubernetes(kubernetes::Query {
            what: kubernetes::Watched::Nodes,
            port: 9002,
            kubeconfig: Some("/etc/kubeconfig".into()),
        }),
    ];
    assert_eq!(parse(text).unwrap().discovery, expected);
    // What the defaults give as examples, all together.
    let examples = defaults::KEYS.iter().find(|key| key.path == "discovery").unwrap().example.join("\n");
    assert_eq!(parse(&format!("discovery:\n{examples}")).unwrap().discovery.len(), 6);
}

#[test]
fn the_documented_keys_mean_what_they_say() {
    let files = Files::new();
    let (cert, key) = files.pair("hijack");
    let secret = files.write("secret", format!("{}\n\n{}\n", secret(), secret()), 0o600);
    let text = format!(
        r#"
node:      {{name: h1, cluster: lab, advertise: 127.0.0.1, zone: rack-1, role: seed}}
secret_file: {secret}
proxy:     {{listen: 127.0.0.1:65001, tls: null}}
peer:      {{listen: 127.0.0.1:15001, transport: quic}}
gossip:    {{listen: 127.0.0.1:8002}}
admin:     {{listen: "[::1]:15003"}}
discovery:
  - static: {{addresses: ["10.77.0.2:8002", "seed.example.org:8002"]}}
  - static: {{addresses: []}}
cache:     {{dir: /var/lib/darter, max_size: 40%, min_free: 1GiB, idle: 1h30m}}
limits:    {{download: 0, upload: 0B, per_task: 0M}}
registry_mirror: {{remote: "https://index.docker.io", direct: true}}
rules:
  - {{regex: "blobs/sha256.*"}}
  - {{regex: "^http://a/", use_https: true, redirect: "b:5000"}}
  - {{regex: c, direct: true}}
hijack:    {{cert: {cert}, key: {key}, hosts: ["registry.example.org"]}}
registries:
  "10.77.0.1:5000": {{insecure_http: true, ca_file: null}}
  Registry.example.org: {{ca_file: {cert}, tag_ttl: 1h}}
when_registry_down: deny
tag_ttl: 24h
piece_size: 1MiB
verify: before_stream
"#
    );
    let config = parse(&text).unwrap();
    assert_eq!(config.warnings, [""; 0]);
    assert_eq!((config.node.name.as_str(), config.node.cluster.as_str()), ("h1", "lab"));
    assert_eq!((config.node.zone.as_deref(), config.node.role), (Some("rack-1"), Role::Seed));
    assert_eq!(config.node.advertise, IpAddr::from([127, 0, 0, 1]));
    assert_eq!(config.secrets.len(), 2);
    assert!(config.cluster_keys().unwrap().is_some());
    assert_eq!(config.peer.transport, Transport::Quic);
    assert!(config.proxy.tls.is_none());
    assert!(config.admin.listen.is_ipv6());
    let Source::Fixed { addresses } = &config.discovery[0] else { panic!("{:?}", config.discovery[0]) };
    assert_eq!(
        addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.77.0.2:8002", "seed.example.org:8002"]
    );
    assert_eq!((config.cache.max_size, config.cache.min_free), (Space::Percent(40), Space::Bytes(1 << 30)));
    assert_eq!(config.cache.idle, Duration::from_secs(5400));
    assert_eq!(config.limits, Limits { download: 0, upload: 0, per_task: 0 });
    assert_eq!(config.registry_mirror.remote.as_ref().unwrap().to_string(), "https://index.docker.io/");
    assert!(config.registry_mirror.direct && wiring::proxy(&config).unwrap().mirror.direct);
    assert_eq!(config.rules.len(), 3);
    assert!(config.rules[0].regex.is_match("https://a/v2/b/blobs/sha256:0"));
    assert!(config.rules[1].use_https && config.rules[1].redirect.as_ref().unwrap().to_string() == "b:5000");
    assert!(config.rules[2].direct && !config.rules[2].use_https);
    let identity = config.hijack.identity.as_ref().unwrap();
    assert_eq!((identity.chain.len(), identity.cert_file.to_str().unwrap()), (1, cert.as_str()));
    assert!(config.hijack.hosts[0].matches("registry.example.org", 443));
    let plain = &config.registries[&"10.77.0.1:5000".parse().unwrap()];
    assert_eq!(*plain, Registry { insecure_http: true, ca_file: None, tag_ttl: None });
    assert_eq!(config.registries[&"registry.example.org".parse().unwrap()].ca_file.as_deref(), Some(Path::new(&cert)));
    assert_eq!(config.when_registry_down, WhenRegistryDown::Deny);
    assert_eq!(config.tag_ttl, Duration::from_secs(24 * 3600));
    let ttls = wiring::tag_ttls(&config).unwrap();
    assert_eq!((ttls.default, ttls.registries.len()), (config.tag_ttl, 1));
    assert_eq!(ttls.registries[0].1, Duration::from_secs(3600));
    assert_eq!(config.piece_size.piece_size(1 << 30).bytes(), 1 << 20);
    assert_eq!(config.verify, Verify::BeforeStream);
}

#[test]
fn empty_sections_and_nulls_are_defaults() {
    let text = "node:\nproxy: {tls: ~}\ncache: {}\nrules:\nregistries:\nregistry_mirror: {remote: null}\nhijack: {hosts: []}\n";
    let config = parse(text).unwrap();
    assert!(config.registry_mirror.remote.is_none() && !config.registry_mirror.direct);
    assert!(!wiring::proxy(&config).unwrap().mirror.direct);
    assert_eq!(config.cache.max_size, Space::Bytes(20 << 30));
    assert!(matches!(config.piece_size, PieceSizeRule::Auto));
}

#[test]
fn the_environment_overrides_single_values() {
    let files = Files::new();
    let secret = files.write("secret", secret(), 0o440);
    let env = [
        ("DARTER_PROXY_LISTEN", "127.0.0.1:7001"),
        ("DARTER_PEER_LISTEN", "127.0.0.2:7002"),
        ("DARTER_GOSSIP_LISTEN", "127.0.0.2:7003"),
        ("DARTER_NODE_NAME", "n7"),
        ("DARTER_NODE_ZONE", ""),
        ("DARTER_CACHE_MAX_SIZE", "1GiB"),
        ("DARTER_SECRET_FILE", secret.as_str()),
        ("DARTER_REGISTRY_MIRROR_REMOTE", "null"),
        ("DARTER_VERIFY", "before_stream"),
        ("DARTER_LOG", "debug"),
        ("DARTER_CONFIG", "/etc/darter/config.yaml"),
        ("DARTER_SERVICE_HOST", "10.0.0.1"),
        ("DARTER_SERVICE_PORT_ADMIN", "15003"),
        ("DARTER_PORT", "tcp://10.0.0.1:15003"),
        ("DARTER_GOSSIP_PORT_8002_UDP_ADDR", "10.0.0.1"),
        ("DARTER_PORT_15003_TCP", "tcp://10.0.0.1:15003"),
        ("PATH", "/bin"),
    ];
    let text = "node: {name: h1, zone: z}\nproxy: {listen: nonsense}\nregistry_mirror: {remote: \"https://a\"}";
    let config = with_env(text, &env).unwrap();
    assert_eq!(config.proxy.listen.port(), 7001);
    assert_eq!((config.node.name.as_str(), config.node.zone.as_deref()), ("n7", Some("z")));
    assert_eq!(config.cache.max_size, Space::Bytes(1 << 30));
    assert_eq!(config.secrets.len(), 1);
    assert!(config.registry_mirror.remote.is_none());
    assert_eq!(config.verify, Verify::BeforeStream);
    assert_eq!(config.problem("proxy.listen", "").place, Place::Environment("DARTER_PROXY_LISTEN".to_owned()));
    assert_eq!(config.node.advertise, IpAddr::from([127, 0, 0, 2]), "the address that the listeners name");
    // What only looks like such a variable is a mistake.
    for name in ["DARTER_PROXY_PORT", "DARTER_PROXY", "DARTER_", "DARTER_DISCOVERY", "DARTER_PROXY_TLS_CERT"] {
        let problems = with_env("", &[(name, "1")]).unwrap_err();
        assert_eq!(problems.list().len(), 1);
        assert_eq!(problems.list()[0].place, Place::Environment(name.to_owned()));
    }
    // Every single value has its variable.
    for key in defaults::KEYS.iter().filter(|key| key.scalar) {
        assert_eq!(
            shown(with_env("", &[(&defaults::variable(key.path), key.default)]).unwrap()),
            shown(parse("").unwrap())
        );
    }
}

#[test]
fn an_address_to_advertise_is_found() {
    // With peers it must be one that others reach; without, anything will do.
    let files = Files::new();
    let secret = files.write("secret", secret(), 0o600);
    match parse(&format!("secret_file: {secret}")) {
        Ok(config) => assert!(host::has(config.node.advertise) && !config.node.advertise.is_loopback()),
        Err(problems) => {
            assert!(host::outward(true, false).is_none());
            assert!(problems.to_string().contains("no address that others could reach"));
        }
    }
    parse("").unwrap();
    let text = format!("{LOOPBACK}secret_file: {secret}");
    assert!(parse(&text).unwrap().node.advertise.is_loopback());
    let lines = wrong(&format!("{text}\nadmin: {{listen: \"0.0.0.0:1\"}}"));
    assert!(lines.len() == 1 && lines[0].starts_with("f.yaml:1:16: peer.listen: loopback"), "{lines:?}");
    let lines = wrong(&text.replace("127.0.0.1:8002", "127.0.0.2:8002"));
    assert!(lines.len() == 1 && lines[0].starts_with("f.yaml:2:18: gossip.listen: "), "{lines:?}");
}

#[test]
fn certificates_that_clients_will_refuse_are_warned_about() {
    let files = Files::new();
    let (cert, key) = files.pair("static");
    let warned =
        |hosts: &str| parse(&format!("hijack: {{cert: {cert}, key: {key}, hosts: {hosts}}}")).unwrap().warnings;
    assert_eq!(warned("[registry.example.org]").len(), 1, "only that there is no secret");
    assert!(warned("[registry.example.com]")[1].contains("clients will refuse it"));

    let out = files.path("ca");
    let hosts = ["a.org", "*.b.org", "10.0.0.1"].map(|host| host.parse().unwrap()).to_vec();
    crate::cli::keys::gen_ca(&crate::cli::GenCaArgs { out: out.clone(), hosts, days: 1, overwrite: false }).unwrap();
    let out = out.display();
    let warned = |hosts: &str| {
        let text = format!("hijack: {{cert: {out}/ca.crt, key: {out}/ca.key, hosts: {hosts}}}");
        parse(&text).unwrap().warnings.len() - 1
    };
    assert_eq!(warned("[a.org, x.a.org, \"*.b.org\", y.b.org, 10.0.0.1]"), 0);
    assert_eq!(warned("[b.com, 10.0.0.2, fd00::1, xa.org]"), 4);
}

#[test]
fn secrets_are_never_shown() {
    let files = Files::new();
    let value = secret();
    let path = files.write("secret", &value, 0o600);
    let (cert, key) = files.pair("a");
    let text = format!("{LOOPBACK}secret_file: {path}\nhijack: {{cert: {cert}, key: {key}}}");
    let config = parse(&text).unwrap();
    let shown = format!("{config:?}");
    assert!(shown.contains("[redacted]") && !shown.contains(&value));
    assert!(!shown.contains(&format!("{:?}", config.secrets[0].expose())));
    assert!(!shown.contains("PrivateKeyDer"));
}
