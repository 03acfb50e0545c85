//! What bad input gets: every problem at once, with its place, exit code 2, and nothing started.

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use darter_agent::demo::authority::Authority;
use darter_agent::demo::cluster::Subnet;
use tempfile::TempDir;

use crate::stage::program;

/// Refusing takes milliseconds; an agent that starts instead never ends by itself.
const REFUSAL_MAX: Duration = Duration::from_secs(20);

/// Lines of a configuration that is good, in their order.
struct Setting {
    directory: TempDir,
    /// An address that nothing else of this machine uses: on that of everybody's clients a port that was free a moment ago is
    /// taken by the next connection.
    subnet: Subnet,
    lines: Vec<String>,
    ports: [u16; 4],
}

struct Refused {
    code: Option<i32>,
    lines: Vec<String>,
}

impl Setting {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let secret = base64::engine::general_purpose::STANDARD.encode([7; 32]) + "\n";
        let (secret_file, cache) = (directory.path().join("secret"), directory.path().join("cache"));
        write(&secret_file, &secret, 0o600);
        let subnet = Subnet::claim().unwrap();
        let host = subnet.registry();
        let ports = free_ports(host);
        let [proxy, peer, gossip, admin] = ports;
        let lines = vec![
            format!("node: {{name: a, cluster: c, advertise: {host}}}"),
            format!("secret_file: {}", secret_file.display()),
            format!("proxy: {{listen: \"{host}:{proxy}\"}}"),
            format!("peer: {{listen: \"{host}:{peer}\"}}"),
            format!("gossip: {{listen: \"{host}:{gossip}\"}}"),
            format!("admin: {{listen: \"{host}:{admin}\"}}"),
            format!("cache: {{dir: {}}}", cache.display()),
        ];
        Self { directory, subnet, lines, ports }
    }

    /// Replaces the line that starts with the same key, or adds one. Returns its number, from 1.
    fn put(&mut self, line: &str) -> usize {
        let key = line.split(':').next().unwrap();
        let same = self.lines.iter().position(|other| other.split(':').next() == Some(key));
        let at = same.unwrap_or(self.lines.len());
        if same.is_some() {
            self.lines[at] = line.to_owned();
        } else {
            self.lines.push(line.to_owned());
        }
        at + 1
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs the agent, which must end by itself, and looks for what it left behind.
    async fn refused(&self) -> Refused {
        let config = self.file("darter.yaml");
        write(&config, &(self.lines.join("\n") + "\n"), 0o644);
        let mut command = tokio::process::Command::new(program());
        command.arg("agent").arg("--config").arg(&config).stdin(std::process::Stdio::null()).kill_on_drop(true);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("DARTER_")) {
            command.env_remove(name);
        }
        let output = tokio::time::timeout(REFUSAL_MAX, command.output()).await.expect("the agent started").unwrap();
        assert!(!self.file("cache").exists(), "nothing was started, so there is no cache");
        let text = String::from_utf8(output.stderr).unwrap();
        let prefix = format!("{}:", config.display());
        let lines = text.lines().map(|line| line.strip_prefix(&prefix).unwrap_or(line).to_owned()).collect();
        Refused { code: output.status.code(), lines }
    }

    /// The addresses that nothing else holds can be bound, so nobody listens there. Waited for, since whatever another test
    /// starts meanwhile has this process's sockets too until it runs its own program.
    async fn all_free(&self) {
        let host = self.subnet.registry();
        for port in self.ports {
            crate::wait::until("nobody listens", async || {
                TcpListener::bind((host, port)).is_ok() && UdpSocket::bind((host, port)).is_ok()
            })
            .await;
        }
    }
}

fn free_ports(host: IpAddr) -> [u16; 4] {
    let sockets = [(); 4].map(|()| TcpListener::bind((host, 0)).unwrap());
    sockets.map(|socket| socket.local_addr().unwrap().port())
}

fn write(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[tokio::test]
async fn each_mistake_is_told_with_its_place() {
    let hijack = |cert: &str, key: &str| format!("hijack: {{cert: CERT{cert}, key: CERT{key}, hosts: [a.example]}}");
    let cases = [
        ("nodes: {}", "1: nodes: ", "no such key"),
        ("cache: {dir: /x, maxsize: 1GiB}", "18: cache.maxsize: ", "did you mean max_size?"),
        ("proxy: 5", "8: proxy: ", "a mapping is wanted here"),
        ("piece_size: [1]", "13: piece_size: ", "wanted here"),
        ("verify: never", "9: verify: ", ""),
        ("node: {advertise: 0.0.0.0}", "19: node.advertise: ", "nobody can be reached at"),
        ("node: {advertise: 203.0.113.7}", "19: node.advertise: ", "not an address of this host"),
        ("admin: {listen: \"0.0.0.0:0\"}", "", "loopback only if every listener is"),
        ("secret_file: DIR/nothing", "14: secret_file: ", "No such file"),
        ("secret_file: DIR", "14: secret_file: ", "is not a file"),
        ("secret_file: DIR/empty", "14: secret_file: ", "is empty"),
        ("secret_file: DIR/short", "14: secret_file: ", "at least 32"),
        ("secret_file: DIR/open", "14: secret_file: ", "can be read or written by everybody"),
        (&hijack("one.crt", "other.key"), "", "hijack.key"),
        (&hijack("one.crt", "open.key"), "", "hijack.key"),
        (&hijack("nothing.crt", "one.key"), "", "hijack.cert"),
    ];
    for (bad, place, contains) in cases {
        let mut setting = Setting::new();
        let (one, other) =
            (Authority::new("one", &["a.example"]).unwrap(), Authority::new("two", &["b.example"]).unwrap());
        write(&setting.file("one.crt"), one.certificate_pem(), 0o644);
        write(&setting.file("one.key"), one.key_pem(), 0o600);
        write(&setting.file("other.key"), other.key_pem(), 0o600);
        write(&setting.file("open.key"), one.key_pem(), 0o640);
        write(&setting.file("empty"), "", 0o600);
        write(&setting.file("short"), "aGVsbG8=\n", 0o600);
        write(&setting.file("open"), &std::fs::read_to_string(setting.file("secret")).unwrap(), 0o644);
        let directory = setting.directory.path().display().to_string();
        let bad = bad.replace("CERT", &format!("{directory}/")).replace("DIR", &directory);
        let line = setting.put(&bad);
        let refused = setting.refused().await;
        assert_eq!(refused.code, Some(2), "{bad}: {:#?}", refused.lines);
        let at = if contains.starts_with("loopback") { 1 } else { line };
        let fits = |told: &String| {
            told.starts_with(&format!("{at}:{place}")) && told.contains(contains.trim_start_matches("loopback "))
        };
        assert!(
            refused.lines.len() == 1 && refused.lines.iter().any(fits),
            "{bad}: {at}:{place}{contains}, not {:#?}",
            refused.lines
        );
        setting.all_free().await;
    }
}

#[tokio::test]
async fn all_mistakes_are_told_at_once() {
    let mut setting = Setting::new();
    setting.put("node: {name: a, cluster: c, advertise: 0.0.0.0}");
    setting.put("secret_file: /nowhere/at/all");
    setting.put("admin: {lisen: \"127.0.0.1:1\"}");
    setting.put("verify: perhaps");
    setting.put("piece_size: {}");
    let refused = setting.refused().await;
    assert_eq!(refused.code, Some(2));
    let places: Vec<String> =
        refused.lines.iter().map(|line| line.splitn(4, ':').take(3).collect::<Vec<_>>().join(":")).collect();
    let expected = ["1:40: node.advertise", "2:14: secret_file", "6:9: admin.lisen", "8:9: verify", "9:13: piece_size"];
    assert_eq!(places, expected, "{:#?}", refused.lines);
    setting.all_free().await;
}

#[tokio::test]
async fn an_address_that_is_taken_starts_nothing() {
    let setting = Setting::new();
    let [proxy, _, gossip, admin] = setting.ports;
    let taken = TcpListener::bind((setting.subnet.registry(), proxy)).unwrap();
    let also = UdpSocket::bind((setting.subnet.registry(), gossip)).unwrap();
    let and = TcpListener::bind((setting.subnet.registry(), admin)).unwrap();
    let refused = setting.refused().await;
    assert_eq!(refused.code, Some(2), "{:#?}", refused.lines);
    for (line, begins) in
        refused.lines.iter().zip(["3:17: proxy.listen: ", "5:18: gossip.listen: ", "6:17: admin.listen: "])
    {
        assert!(line.starts_with(begins) && line.contains("in use"), "{:#?}", refused.lines);
    }
    assert_eq!(refused.lines.len(), 3, "{:#?}", refused.lines);
    drop((taken, also, and));
    setting.all_free().await;
}

/// So that the tests above mean something: without a mistake the agent does start.
#[tokio::test]
async fn the_good_configuration_is_good() {
    let setting = Setting::new();
    let config = setting.file("darter.yaml");
    write(&config, &(setting.lines.join("\n") + "\n"), 0o644);
    let output = tokio::process::Command::new(program()).args(["config", "check"]).arg(&config).output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}
