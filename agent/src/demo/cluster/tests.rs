//! The life of processes, with shell scripts in the place of agents: what happens when an agent fails.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::os::unix::fs::PermissionsExt as _;

use super::*;

/// Long enough that no loaded machine takes it for lateness, where nothing is late.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with a program in it that does `script`.
fn program(script: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("program");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    (directory, path)
}

fn cluster(program: PathBuf) -> Result<Cluster, ClusterError> {
    loop {
        match start(program.clone()) {
            // A test beside this one forks while the script is still open for writing; it closes it at once.
            Err(ClusterError::Spawn { source, .. }) if source.kind() == io::ErrorKind::ExecutableFileBusy => {}
            started => return started,
        }
    }
}

fn start(program: PathBuf) -> Result<Cluster, ClusterError> {
    let subnet = Subnet::claim().unwrap();
    let registry =
        Upstream { address: SocketAddr::new(subnet.registry(), 5000), authority_pem: Some("not read here".to_owned()) };
    Cluster::start(&Options { agents: 2, program, registry, overrides: serde_json::Value::Null }, &subnet)
}

#[tokio::test]
async fn an_agent_that_ends_is_reported_with_its_last_words() {
    let (_directory, program) = program("echo \"cannot do $1 $2\" >&2; exit 2");
    let mut cluster = cluster(program).unwrap();
    let failed = cluster.ready(PATIENCE).await;
    let Err(ClusterError::Exited { agent, status, log }) = failed else { panic!("{failed:?}") };
    assert_eq!((agent.as_str(), status.code(), log.as_str()), ("agent-1", Some(2), "cannot do agent --config"));
}

#[tokio::test]
async fn an_agent_that_never_gets_ready_is_reported() {
    let (_directory, program) = program("exec sleep 600");
    let mut cluster = cluster(program).unwrap();
    let failed = cluster.ready(Duration::from_millis(200)).await;
    assert!(matches!(failed, Err(ClusterError::NotReady { .. })), "{failed:?}");
}

#[tokio::test]
async fn stopping_ends_the_processes_and_removes_the_files() {
    let (_directory, program) = program("exec sleep 600");
    let cluster = cluster(program).unwrap();
    let directory = cluster.directory().to_owned();
    let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(directory.join("secret")), 0o600);
    assert_eq!(mode(directory.join("agent-2/hijack.key")), 0o600);
    let ids: Vec<u32> = cluster.agents().iter().map(|agent| agent.process_id().unwrap()).collect();
    cluster.stop().await.unwrap();
    assert!(!directory.exists());
    // Waited for, so not even a zombie has the number.
    assert!(ids.iter().all(|id| !Path::new(&format!("/proc/{id}/exe")).exists()));
}

#[tokio::test]
async fn a_killed_agent_can_be_started_again() {
    let (_directory, program) = program("echo started; exec sleep 600");
    let mut cluster = cluster(program).unwrap();
    let agent = cluster.agent_mut(1).unwrap();
    let first = agent.process_id().unwrap();
    agent.kill().await;
    assert_eq!(agent.process_id(), None);
    agent.start().unwrap();
    assert_ne!(agent.process_id().unwrap(), first);
    agent.running().unwrap();
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_run_is_said() {
    let failed = cluster(PathBuf::from("/nowhere/darter"));
    assert!(matches!(failed, Err(ClusterError::Spawn { .. })), "{failed:?}");
    let subnet = Subnet::claim().unwrap();
    let registry = Upstream { address: SocketAddr::new(subnet.registry(), 5000), authority_pem: None };
    for agents in [0, AGENTS_MAX + 1] {
        let program = PathBuf::from("/nowhere/darter");
        let options = Options { agents, program, registry: registry.clone(), overrides: serde_json::Value::Null };
        assert!(matches!(Cluster::start(&options, &subnet), Err(ClusterError::Count(count)) if count == agents));
    }
}
