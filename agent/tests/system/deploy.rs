//! What is in `deploy/` fits the agent: its own `config check` takes the configurations, ports and paths agree with them,
//! and what a kustomization names is there.
//!
//! Not here: rendering and schemas, which `cargo xtask deploy` does with the programs for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use darter_agent::config::{Config, host};
use serde_json::Value;

use crate::stage::{MIB, program};

/// What the agent may take (memory in DESIGN's budget), in MiB; limits leave it room.
const AGENT_MIB: u64 = 128;

/// How long a stop may take, in seconds.
const STOP_SECONDS: u64 = 10;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// The documents of a YAML file.
fn documents(path: &Path) -> Vec<Value> {
    let text = text(path);
    let parse = |text: &str| serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.split("\n---\n").map(parse).collect()
}

fn kustomizations() -> Vec<(PathBuf, Value)> {
    let all = files(&deploy().join("kustomize"));
    let all = all.into_iter().filter(|path| path.file_name().is_some_and(|name| name == "kustomization.yaml"));
    all.map(|path| (path.parent().unwrap().to_owned(), documents(&path).remove(0))).collect()
}

/// Every object of a kind.
fn objects(kind: &str) -> Vec<Value> {
    let all = files(&deploy().join("kustomize"));
    let manifests = all.iter().filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    manifests.flat_map(|path| documents(path)).filter(|object| object["kind"] == kind).collect()
}

fn strings<'a>(value: &'a Value, key: &str) -> Vec<&'a str> {
    value[key].as_array().into_iter().flatten().map(|item| item.as_str().unwrap()).collect()
}

/// The agents' configurations in ConfigMaps.
fn configurations() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (folder, kustomization) in kustomizations() {
        for generator in kustomization["configMapGenerator"].as_array().into_iter().flatten() {
            assert_eq!(generator["name"], "darter");
            assert_eq!(strings(generator, "files"), ["agent.yaml"]);
            found.push(folder.join("agent.yaml"));
        }
    }
    assert_eq!(found.len(), 2, "endpoint slices and nodes");
    found
}

/// The DaemonSet and the StatefulSet, with the pods that they are for.
fn workloads() -> Vec<Value> {
    let found: Vec<Value> = objects("DaemonSet").into_iter().chain(objects("StatefulSet")).collect();
    assert_eq!(found.len(), 2);
    found
}

fn defaults() -> Config {
    Config::parse("defaults", "", std::iter::empty()).unwrap()
}

#[test]
fn what_a_kustomization_names_is_there() {
    for (folder, kustomization) in kustomizations() {
        for base in strings(&kustomization, "bases") {
            let base = folder.join(base).join("kustomization.yaml");
            assert!(base.exists(), "{}", base.display());
        }
        let generators = kustomization["configMapGenerator"].as_array().into_iter().flatten();
        let generated = generators.flat_map(|generator| strings(generator, "files"));
        for file in strings(&kustomization, "resources").into_iter().chain(generated) {
            assert!(folder.join(file).is_file(), "{}: {file}", folder.display());
        }
        // The other way round: a manifest that nothing names is applied by nobody.
        let named: BTreeSet<_> = strings(&kustomization, "resources").into_iter().collect();
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if name.ends_with(".yaml") && !["kustomization.yaml", "agent.yaml"].contains(&name.as_str()) {
                assert!(named.contains(name.as_str()), "{} is not named", path.display());
            }
        }
        // All that are applied take the same image, at one place each.
        for image in kustomization["images"].as_array().into_iter().flatten() {
            assert_eq!(image["name"], "darter");
        }
        assert_eq!(kustomization["namespace"], "kube-system", "the configurations name it as well");
    }
}

#[test]
fn no_secret_is_committed() {
    assert!(objects("Secret").is_empty());
    let folder = deploy().join("kustomize/components/secret");
    assert!(text(&folder.join(".gitignore")).lines().any(|line| line == "secret"));
}

/// With what the manifests put into the environment, addresses apart, which are this machine's.
#[test]
fn the_agent_takes_the_configurations() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret");
    crate::alone::private(&secret, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n");
    for workload in workloads() {
        let container = &workload["spec"]["template"]["spec"]["containers"][0];
        let mut variables = BTreeMap::from([("DARTER_SECRET_FILE".to_owned(), secret.display().to_string())]);
        for variable in container["env"].as_array().unwrap() {
            let name = variable["name"].as_str().unwrap().to_owned();
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                Some("status.podIP") => host::outward(true, false).map(|ip| ip.to_string()),
                Some("spec.nodeName" | "metadata.name") => Some("node-1.example.org".to_owned()),
                Some(other) => panic!("{other}"),
                None => variable["value"].as_str().map(str::to_owned),
            };
            variables.extend(value.map(|value| (name, value)));
        }
        for file in configurations() {
            let mut command = Command::new(program());
            for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("DARTER_")) {
                command.env_remove(name);
            }
            let checked = command.args(["config", "check"]).arg(&file).envs(&variables).output().unwrap();
            let told = String::from_utf8_lossy(&checked.stderr);
            assert!(checked.status.success() && told.is_empty(), "{}: {told}", file.display());
        }
    }
}

#[test]
fn pods_are_as_locked_as_the_agent_allows() {
    for workload in workloads() {
        let pod = &workload["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > STOP_SECONDS);
        let containers = pod["containers"].as_array().unwrap();
        for container in containers.iter().chain(pod["initContainers"].as_array().into_iter().flatten()) {
            let context = &container["securityContext"];
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(strings(&context["capabilities"], "drop"), ["ALL"]);
            assert_eq!(container["image"], "darter", "kustomize puts the real one there");
        }
        let [agent] = &containers[..] else { panic!("one container") };
        assert!(agent["securityContext"]["capabilities"]["add"].is_null());
        assert_ne!(agent["securityContext"]["runAsNonRoot"], false);
        let limit = agent["resources"]["limits"]["memory"].as_str().unwrap();
        let limit: u64 = limit.strip_suffix("Mi").unwrap().parse().unwrap();
        assert!(limit * MIB > AGENT_MIB * MIB, "{limit} MiB");
    }
}

#[test]
fn paths_and_ports_are_the_agents() {
    let defaults = defaults();
    let admin = defaults.admin.listen;
    for workload in workloads() {
        let pod = &workload["spec"]["template"]["spec"];
        let agent = &pod["containers"][0];
        let mounts: BTreeMap<&str, &str> = agent["volumeMounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| (mount["name"].as_str().unwrap(), mount["mountPath"].as_str().unwrap()))
            .collect();
        let config = format!("{}/agent.yaml", mounts["config"]);
        assert_eq!(strings(agent, "args"), ["agent", "--config", config.as_str()]);
        for file in configurations() {
            let config = documents(&file).remove(0);
            let overridden = agent["env"].as_array().unwrap().iter().find(|it| it["name"] == "DARTER_CACHE_DIR");
            let cache = overridden.map_or(&config["cache"]["dir"], |it| &it["value"]).as_str().unwrap();
            // A volume that fsGroup opens to a group is none that the agent takes; a folder in it is.
            let expected = if pod["hostNetwork"] == true { "" } else { "/cache" };
            assert_eq!(cache, format!("{}{expected}", mounts["cache"]));
            assert_eq!(config["secret_file"], format!("{}/secret", mounts["secret"]));
            assert!(config["admin"].is_null() && config["peer"].is_null(), "the defaults are what is declared");
        }
        let mut ports = BTreeMap::new();
        for port in agent["ports"].as_array().unwrap() {
            ports.insert(port["name"].as_str().unwrap(), port["containerPort"].as_u64().unwrap());
            assert!(port["hostPort"].is_null() || port["hostPort"] == port["containerPort"]);
        }
        assert_eq!(ports["peer"], u64::from(defaults.peer.listen.port()));
        assert_eq!(ports["gossip"], u64::from(defaults.gossip.listen.port()));
        for (probe, path) in [("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
            let probe = &agent[probe]["httpGet"];
            assert_eq!(probe["path"], path);
            if pod["hostNetwork"] == true {
                assert_eq!(probe["host"], admin.ip().to_string(), "the kubelet asks where the agent listens");
                assert_eq!(probe["port"], admin.port());
            } else {
                assert!(probe["host"].is_null(), "loopback would be the node's and not the pod's");
                assert_eq!(ports[probe["port"].as_str().unwrap()], u64::from(admin.port()));
            }
        }
    }
    let service = objects("Service").remove(0);
    assert_eq!(service["spec"]["clusterIP"], "None");
    assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
    assert_eq!(service["spec"]["ports"][0]["port"], defaults.gossip.listen.port());
    let policy = objects("NetworkPolicy").remove(0);
    let allowed: BTreeSet<(String, u64)> = policy["spec"]["ingress"][0]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| (port["protocol"].as_str().unwrap().to_owned(), port["port"].as_u64().unwrap()))
        .collect();
    let (peer, gossip) = (u64::from(defaults.peer.listen.port()), u64::from(defaults.gossip.listen.port()));
    assert_eq!(allowed, [("TCP", peer), ("UDP", peer), ("UDP", gossip)].map(|(p, n)| (p.to_owned(), n)).into());
}

#[test]
fn rights_are_to_look_only() {
    let mut rules = Vec::new();
    for role in objects("Role").iter().chain(&objects("ClusterRole")) {
        for rule in role["rules"].as_array().unwrap() {
            assert_eq!(strings(rule, "verbs"), ["list", "watch"]);
            rules.push((role["kind"].as_str().unwrap().to_owned(), strings(rule, "resources").join(",")));
        }
    }
    rules.sort();
    assert_eq!(
        rules,
        [("ClusterRole", "nodes"), ("Role", "endpointslices")].map(|(kind, it)| (kind.to_owned(), it.to_owned()))
    );
}

#[test]
fn systemd_opens_what_the_agent_expects() {
    let defaults = defaults();
    let systemd = deploy().join("systemd");
    let proxy = defaults.proxy.listen.to_string();
    let line = |file: &str, line: &str| {
        let text = text(&systemd.join(file));
        assert!(text.lines().any(|it| it == line), "{file} has no line {line}");
    };
    line("darter-proxy.socket", &format!("ListenStream={proxy}"));
    line("darter-proxy.socket", "Service=darter.service");
    line("darter.service", "Sockets=darter-proxy.socket");
    line("darter.service", "Type=notify");
    line("darter.service", "Restart=always");
    line("darter.service", "StateDirectory=darter");
    assert_eq!(defaults.cache.dir, Path::new("/var/lib/darter"));
    line("docker.service.d/darter.conf", &format!("Environment=\"HTTPS_PROXY=http://{proxy}\""));
}
