#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const CONFIG: &str = "registry_mirror: {remote: https://registry.example.org}\nregistries: {\"10.77.0.1:5000\": \
                      {insecure_http: true}}\n";

const HOSTS: &str = "/etc/containerd/certs.d/registry.example.org/hosts.toml";
const OTHERS: &str = "# ours\nserver = \"https://mirror.example.org\"\n\n# first of all\n[host.\"https://a.example\"]\n  \
                      capabilities = [\"pull\"] # only\n  [host.\"https://a.example\".header]\n    x-token = \"secret\"\n";

struct Stage {
    folder: TempDir,
    root: Root,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new(folder.path());
        Self { folder, root }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.at(Path::new(path));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.at(Path::new(path))).unwrap()
    }

    fn args(&self, runtime: Runtime) -> NodeConfigureArgs {
        let (root, config) = (self.folder.path().to_owned(), self.folder.path().join("config.yaml"));
        NodeConfigureArgs { runtime, config, registries: Vec::new(), probe: None, force: true, undo: false, root }
    }

    fn plan(&self, runtime: Runtime, yaml: &str, registries: &[&str]) -> Result<Plan, NodeError> {
        let config = Config::parse("f", yaml, std::iter::empty()).unwrap();
        let registries = registries.iter().map(|host| host.parse().unwrap()).collect();
        let registries = super::registries(&NodeConfigureArgs { registries, ..self.args(runtime) }, &config)?;
        let agent = Agent::of(&config);
        match runtime {
            Runtime::Containerd => containerd::plan(&self.root, &config, &agent, &registries),
            Runtime::Docker => docker::plan(&self.root, &config, &agent, &registries),
            Runtime::Crio => crio::plan(&self.root, &config, &agent, &registries),
        }
    }

    /// What was done to each file.
    fn apply(&self, runtime: Runtime, plan: &Plan) -> Result<Vec<&'static str>, NodeError> {
        let changes = Record::load(&self.root, runtime)?.changes(&self.root, &plan.files)?;
        Ok(changes.apply(&self.root, runtime)?.into_iter().map(|(_, done)| done).collect())
    }

    fn run(&self, runtime: Runtime, yaml: &str, registries: &[&str]) -> Result<Vec<&'static str>, NodeError> {
        self.apply(runtime, &self.plan(runtime, yaml, registries)?)
    }

    fn undo(&self, runtime: Runtime) -> Result<Vec<&'static str>, NodeError> {
        Ok(record::undo(&self.root, runtime)?.into_iter().map(|(_, done)| done).collect())
    }

    /// Every file with its content and permissions, and every folder.
    fn everything(&self) -> BTreeMap<PathBuf, (Option<Vec<u8>>, u32)> {
        let (mut found, mut folders) = (BTreeMap::new(), vec![self.folder.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let mode = fs::metadata(&path).unwrap().permissions().mode();
                found.insert(path.clone(), (fs::read(&path).ok(), mode));
                if path.is_dir() {
                    folders.push(path);
                }
            }
        }
        found
    }

    /// Hijacking for docker; the files are real, as the configuration reads them.
    fn hijack(&self, hosts: &str) -> String {
        let out = self.folder.path().join("ca");
        let hosts = vec![hosts.parse().unwrap()];
        let args = crate::cli::GenCaArgs { out: out.clone(), hosts, days: 1, overwrite: true };
        crate::cli::keys::gen_ca(&args).unwrap();
        let out = out.display();
        format!("hijack: {{cert: {out}/ca.crt, key: {out}/ca.key, hosts: [{}]}}", args.hosts[0])
    }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T, NodeError>, contains: &str) {
    let error = result.unwrap_err();
    assert!(matches!(&error, NodeError::Refused(message) if message.contains(contains)), "{contains}: {error}");
}

#[test]
fn containerd_asks_the_agent_and_then_the_registry() {
    let stage = Stage::new();
    let plan = stage.plan(Runtime::Containerd, CONFIG, &[]).unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]"))
    );
    assert_eq!(stage.apply(Runtime::Containerd, &plan).unwrap(), ["written", "written"]);
    let expected = |server: &str| {
        format!("server = \"{server}\"\n\n[host.\"http://127.0.0.1:65001\"]\ncapabilities = [\"pull\", \"resolve\"]\n")
    };
    assert_eq!(stage.read(HOSTS), expected("https://registry.example.org"));
    assert_eq!(stage.read("/etc/containerd/certs.d/10.77.0.1:5000/hosts.toml"), expected("http://10.77.0.1:5000"));
    stage.run(Runtime::Containerd, CONFIG, &["index.docker.io"]).unwrap();
    assert_eq!(stage.read("/etc/containerd/certs.d/docker.io/hosts.toml"), expected("https://registry-1.docker.io"));
}

#[test]
fn containerd_s_own_folder_is_used_and_a_missing_one_is_told() {
    for (text, folder, note) in [
        (
            "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/opt/a:/opt/b'",
            "/opt/a",
            None,
        ),
        ("version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry]\nconfig_path = '/c'", "/c", None),
        ("version = 3\n", "/etc/containerd/certs.d", Some("]\n  config_path")),
        ("version = 3\n", "/etc/containerd/certs.d", Some("\n[plugins.\"io.containerd.cri.v1.images\".registry]")),
        (
            "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.x]\nendpoint = []",
            "/etc/containerd/certs.d",
            Some("does not allow beside config_path"),
        ),
    ] {
        let stage = Stage::new();
        stage.write("/etc/containerd/config.toml", text);
        let plan = stage.plan(Runtime::Containerd, CONFIG, &["r.example"]).unwrap();
        assert_eq!(plan.files[0].path, Path::new(folder).join("r.example/hosts.toml"), "{text}");
        match note {
            Some(note) => assert!(plan.notes.iter().any(|line| line.contains(note)), "{text} {:?}", plan.notes),
            None => assert!(plan.notes.is_empty(), "{:?}", plan.notes),
        }
    }
}

#[test]
fn somebody_s_hosts_stay_as_they_are_behind_the_agent() {
    let stage = Stage::new();
    stage.write(HOSTS, OTHERS);
    stage.run(Runtime::Containerd, CONFIG, &["registry.example.org"]).unwrap();
    let text = stage.read(HOSTS);
    for line in OTHERS.lines() {
        assert!(text.lines().any(|there| there == line), "{line:?} is missing in\n{text}");
    }
    let at = |needle: &str| text.find(needle).unwrap();
    assert!(at("[host.\"http://127.0.0.1:65001\"]") < at("[host.\"https://a.example\"]"), "{text}");
    assert!(at("server =") < at("[host."), "{text}");
    for broken in ["host = 1", "a = [", "[[host]]\nx = 1"] {
        stage.write(HOSTS, broken);
        assert_refused(stage.run(Runtime::Containerd, CONFIG, &["registry.example.org"]), "left alone");
        assert_eq!(stage.read(HOSTS), broken);
    }
}

#[test]
fn docker_gets_the_proxy_and_the_ca_and_keeps_what_it_has() {
    let drop_in = "/etc/systemd/system/docker.service.d/darter.conf";
    let other = "/etc/systemd/system/docker.service.d/http-proxy.conf";
    let stage = Stage::new();
    let yaml = stage.hijack("registry.example.org");
    assert_eq!(stage.run(Runtime::Docker, &yaml, &[]).unwrap(), ["written", "written"]);
    let text = stage.read(drop_in);
    assert!(text.contains("\nEnvironment=\"HTTPS_PROXY=http://127.0.0.1:65001\"\n"), "{text}");
    assert!(text.contains("\nEnvironment=\"NO_PROXY=localhost,127.0.0.0/8,::1\"\n"), "{text}");
    let ca = fs::read_to_string(stage.folder.path().join("ca/ca.crt")).unwrap();
    assert_eq!(stage.read("/etc/docker/certs.d/registry.example.org/darter.crt"), ca);
    assert_eq!(stage.run(Runtime::Docker, &yaml, &[]).unwrap(), ["unchanged", "unchanged"]);

    // A NO_PROXY that is there holds on.
    stage.write(other, "[Service]\nEnvironment=A=b \"NO_PROXY=.corp, 10.0.0.0/8\"\n");
    assert_eq!(stage.run(Runtime::Docker, &yaml, &[]).unwrap(), ["written", "unchanged"]);
    assert!(!stage.read(drop_in).contains("NO_PROXY"));
    // Another proxy is not pushed aside, wherever it is set.
    stage.write(other, "[Service]\nEnvironment=\"HTTPS_PROXY=http://proxy.corp:3128\"\n");
    assert_refused(stage.run(Runtime::Docker, &yaml, &[]), "http-proxy.conf sets HTTPS_PROXY=http://proxy.corp:3128");
    stage.write(other, "[Service]\nEnvironmentFile=-/etc/default/docker\n");
    stage.write("/etc/default/docker", "https_proxy='http://proxy.corp:3128'\n");
    assert_refused(stage.run(Runtime::Docker, &yaml, &[]), "/etc/default/docker sets");
    stage.write(other, "");
    stage.write("/etc/docker/daemon.json", r#"{"proxies": {"https-proxy": "http://proxy.corp:3128"}}"#);
    assert_refused(stage.run(Runtime::Docker, &yaml, &[]), "proxies.https-proxy");
    assert_refused(stage.run(Runtime::Docker, CONFIG, &["registry.example.org"]), "set hijack");
    assert_refused(stage.run(Runtime::Docker, &yaml, &["other.example.org"]), "is not in hijack.hosts");
    let hub = stage.hijack("docker.io");
    assert_refused(stage.run(Runtime::Docker, &hub, &[]), "docker looks for no certificate of its hub");
}

#[test]
fn crio_gets_a_mirror_of_the_one_registry_that_is_meant() {
    let stage = Stage::new();
    assert_eq!(stage.run(Runtime::Crio, CONFIG, &[]).unwrap(), ["written"]);
    let text = stage.read("/etc/containers/registries.conf.d/10-darter.conf");
    let parsed: toml_edit::DocumentMut = text.parse().unwrap();
    let registry = parsed["registry"].as_array_of_tables().unwrap().get(0).unwrap();
    assert_eq!(registry["prefix"].as_str(), Some("registry.example.org"));
    assert_eq!(registry["location"].as_str(), Some("registry.example.org"));
    let mirror = registry["mirror"].as_array_of_tables().unwrap().get(0).unwrap();
    assert_eq!((mirror["location"].as_str(), mirror["insecure"].as_bool()), (Some("127.0.0.1:65001"), Some(true)));
    assert_refused(stage.run(Runtime::Crio, CONFIG, &["quay.io"]), "quay.io cannot be had in this way");
    assert_refused(
        stage.run(Runtime::Crio, "registry_mirror: {remote: null}", &["quay.io"]),
        "set registry_mirror.remote",
    );
    stage.write(
        "/etc/containers/registries.conf",
        "[[registry]]\nlocation = \"registry.example.org\"\nblocked = true\n",
    );
    assert_refused(stage.run(Runtime::Crio, CONFIG, &[]), "has settings of registry.example.org already");
    stage.write("/etc/containers/registries.conf", "[registries.search]\nregistries = []\n");
    assert_refused(stage.run(Runtime::Crio, CONFIG, &[]), "version 1");
}

#[test]
fn a_file_of_somebody_else_or_changed_since_is_not_touched() {
    let path = "/etc/containers/registries.conf.d/10-darter.conf";
    let stage = Stage::new();
    stage.write(path, "unqualified-search-registries = []\n");
    assert_refused(stage.run(Runtime::Crio, CONFIG, &[]), "is there already");
    fs::remove_file(stage.root.at(Path::new(path))).unwrap();
    stage.run(Runtime::Crio, CONFIG, &[]).unwrap();
    let edited = format!("{}# mine\n", stage.read(path));
    stage.write(path, &edited);
    assert_refused(stage.undo(Runtime::Crio), "changed since");
    assert_refused(stage.run(Runtime::Crio, CONFIG, &[]), "is there already");
    assert_eq!(stage.read(path), edited);
    fs::remove_file(stage.root.at(Path::new(path))).unwrap();
    std::os::unix::fs::symlink("elsewhere", stage.root.at(Path::new(path))).unwrap();
    assert_refused(stage.run(Runtime::Crio, CONFIG, &[]), "is a link");
}

#[test]
fn names_of_registries_are_safe_names_of_folders() {
    for text in ["..", "../../etc", "a/../b", ".", "a\\b/", "/etc", "a b", "%2e%2e", "a..b", ""] {
        assert!(text.parse::<HostPort>().is_err(), "{text}");
    }
    for (text, name) in [("Docker.io", "docker.io"), ("fd00::1", "[fd00::1]"), ("[fd00::1]:5000", "[fd00::1]:5000")] {
        assert_eq!(reference(&text.parse().unwrap()), name);
    }
}

/// spegel#739: no runtime is pointed at an agent that does not answer.
#[tokio::test]
async fn nothing_is_written_unless_the_agent_answers() {
    let stage = Stage::new();
    // A port that nobody listens on any more.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    stage.write("/config.yaml", &format!("{CONFIG}admin: {{listen: '{free}'}}\n"));
    let before = stage.everything();
    let mut args = NodeConfigureArgs { force: false, ..stage.args(Runtime::Containerd) };
    let refused = configure(&args).await;
    assert!(matches!(&refused, Err(NodeError::Probe(message)) if message.contains("cannot connect")), "{refused:?}");
    assert_eq!(stage.everything(), before);
    args.force = true;
    configure(&args).await.unwrap();
    assert!(stage.read(HOSTS).contains("127.0.0.1:65001"));
    args = NodeConfigureArgs { undo: true, ..args };
    configure(&args).await.unwrap();
    assert_eq!(stage.everything(), before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever was there and however often it was configured: a second time changes nothing, and undo is exact.
    #[test]
    fn twice_is_once_and_undo_is_exact(
        there in proptest::option::of(prop_oneof![
            Just(OTHERS.to_owned()),
            Just(String::new()),
            Just("# nothing\n".to_owned()),
            Just("server = 'https://x'\n[host.'http://127.0.0.1:65001']\ncapabilities = ['pull']\n".to_owned()),
            Just("[host]\n[host.b]\n[host.c]".to_owned()),
        ]),
        mode in prop_oneof![Just(0o644u32), Just(0o600), Just(0o640)],
        rounds in proptest::collection::vec(proptest::collection::vec(0usize..3, 1..3), 1..4),
    ) {
        let stage = Stage::new();
        if let Some(there) = &there {
            stage.write(HOSTS, there);
            fs::set_permissions(stage.root.at(Path::new(HOSTS)), fs::Permissions::from_mode(mode)).unwrap();
        }
        stage.write("/etc/darter/config.yaml", "");
        let before = stage.everything();
        for round in &rounds {
            let names = ["registry.example.org", "10.77.0.1:5000", "docker.io"];
            let names: Vec<_> = round.iter().map(|at| names[*at]).collect();
            stage.run(Runtime::Containerd, CONFIG, &names).unwrap();
            let once = stage.everything();
            let again = stage.run(Runtime::Containerd, CONFIG, &names).unwrap();
            prop_assert!(again.iter().all(|done| *done == "unchanged"), "{again:?}");
            prop_assert_eq!(&stage.everything(), &once);
        }
        stage.undo(Runtime::Containerd).unwrap();
        prop_assert_eq!(stage.everything(), before);
    }
}
