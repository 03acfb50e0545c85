//! What is in `deploy/`, judged by the programs that it is for: every kustomization is rendered and held against the
//! schemas of three versions of Kubernetes, and systemd reads the units.
//!
//! Where a program is missing its part is skipped, which in CI is a failure. Nothing is started, and no cluster and no
//! running systemd is needed. Not here: that the agent takes the configurations, which a test of the agent shows.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::step::{output, root, succeed, target};

/// The kustomizations that somebody applies; those in `base` and `components` are only parts of them.
const RENDERED: [&str; 4] = [".", "overlays/nodes", "overlays/seed", "overlays/secret"];

/// An old version, one in between and the newest that kubernetes-validate knows.
const KUBERNETES: [&str; 3] = ["1.25", "1.31", "1.37"];

/// What the secret overlay is given, if there is no such file: 32 bytes of nothing, which never leaves the build.
const PLACEHOLDER: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";

/// Checks all of it. `kubernetes-validate` comes from PyPI; it may also lie in `tools/validate` of the target directory.
pub(crate) fn check() -> Result<()> {
    let kustomize = root()?.join("deploy/kustomize");
    let work = target()?.join("deploy");
    fs::create_dir_all(&work)?;
    if there_is("kubectl", &["version", "--client"])? {
        // A copy, so that the placeholder is nowhere where somebody could apply it.
        let copy = work.join("kustomize");
        if copy.exists() {
            fs::remove_dir_all(&copy)?;
        }
        copy_folder(&kustomize, &copy)?;
        refuse_without_secret(&copy)?;
        fs::write(copy.join("components/secret/secret"), PLACEHOLDER)?;
        for overlay in RENDERED {
            render(&copy, overlay, &work)?;
        }
    }
    units(&work)
}

/// Renders one overlay and validates what comes out.
fn render(kustomize: &Path, overlay: &str, work: &Path) -> Result<()> {
    let rendered = output(Command::new("kubectl").arg("kustomize").arg(kustomize.join(overlay)))?;
    let name = if overlay == "." { "default".to_owned() } else { overlay.replace('/', "-") };
    let file = work.join(format!("{name}.yaml"));
    fs::write(&file, &rendered)?;
    println!("{}: {} objects", overlay, rendered.lines().filter(|line| line.starts_with("kind: ")).count());
    let local = target()?.join("tools/validate/bin/kubernetes-validate");
    let program = if local.exists() { local.to_string_lossy().into_owned() } else { "kubernetes-validate".to_owned() };
    if there_is(&program, &["--version"])? {
        for version in KUBERNETES {
            succeed(Command::new(&program).args(["--strict", "--quiet", "-k", version]).arg(&file))?;
        }
    }
    Ok(())
}

/// Without the operator's file the overlay that takes it must not render, or agents would start with whatever is there.
fn refuse_without_secret(kustomize: &Path) -> Result<()> {
    let mut command = Command::new("kubectl");
    let refused = command.arg("kustomize").arg(kustomize.join("overlays/secret")).output()?;
    let told = String::from_utf8_lossy(&refused.stderr);
    if refused.status.success() || !told.contains("components/secret/secret") {
        bail!("overlays/secret without its file: {}, {told}", refused.status);
    }
    Ok(())
}

/// Lets systemd read the units, with a docker.service for the drop-in and programs that exist.
fn units(work: &Path) -> Result<()> {
    if !there_is("systemd-analyze", &["--version"])? {
        return Ok(());
    }
    let copy = work.join("systemd");
    if copy.exists() {
        fs::remove_dir_all(&copy)?;
    }
    copy_folder(&root()?.join("deploy/systemd"), &copy)?;
    let docker = "[Unit]\nDescription=docker\n[Service]\nExecStart=/bin/true\n";
    fs::write(copy.join("docker.service"), docker)?;
    let service = copy.join("darter.service");
    let text = fs::read_to_string(&service)?;
    fs::write(&service, text.replace("/usr/bin/darter", "/bin/true"))?;
    let units = ["darter.service", "darter-proxy.socket", "docker.service"].map(|unit| copy.join(unit));
    let mut verify = Command::new("systemd-analyze");
    // Without this it looks for the machine's own units, and what those lack is not ours.
    verify
        .args(["verify", "--recursive-errors=no"])
        .args(&units)
        .env("SYSTEMD_UNIT_PATH", format!("{}:", copy.display()));
    let result = verify.output().context("cannot run systemd-analyze")?;
    let told = String::from_utf8_lossy(&result.stderr);
    // It warns of a key that it does not know and goes on.
    if !result.status.success() || told.contains(&*copy.to_string_lossy()) {
        bail!("systemd-analyze verify: {}\n{told}", result.status);
    }
    // 0 is locked up, 10 is as it comes; the threshold is in tenths.
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--no-pager", "--threshold=20"]).arg(&service);
    println!("{}", output(&mut security)?.lines().last().unwrap_or_default());
    Ok(())
}

/// Whether a program can be run.
fn there_is(program: &str, args: &[&str]) -> Result<bool> {
    if Command::new(program).args(args).output().is_ok_and(|output| output.status.success()) {
        return Ok(true);
    }
    if std::env::var_os("CI").is_some() {
        bail!("{program} is missing");
    }
    println!("{program} is missing: skipped");
    Ok(false)
}

/// Copies a folder, but not the operator's secret, if he has made one in it.
fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &to)?;
        } else if entry.file_name() != "secret" {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
