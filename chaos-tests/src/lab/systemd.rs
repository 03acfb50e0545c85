//! A systemd of its own as the first process of a host, on a throw-away copy of this machine's files, with the units that
//! darter ships.
//!
//! Not a container runtime: the machine's programs are used as they are, and nothing is limited. What systemd writes, files
//! and cgroups, is gone with it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::command::{Run, wait_for};
use super::daemon::Daemon;
use super::netns::Host;
use super::world::World;

/// Programs that it takes, beyond those of the lab.
pub const TOOLS: &[&str] = &["systemd", "systemctl", "systemd-sysusers", "journalctl", "mount", "pivot_root"];

/// The service under test.
pub const SERVICE: &str = "darter.service";

/// What is installed, under the names that `deploy/systemd/README.md` gives.
const UNITS: [(&str, &str); 2] = [
    ("darter.service", include_str!("../../../deploy/systemd/darter.service")),
    ("darter-proxy.socket", include_str!("../../../deploy/systemd/darter-proxy.socket")),
];
const SYSUSERS: &str = include_str!("../../../deploy/systemd/darter.sysusers.conf");

/// All that is started.
const TARGET: (&str, &str) = ("lab.target", "[Unit]\nRequires=darter-proxy.socket darter.service\n");

/// How long until the service runs. It takes a second; the machine may be busy.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);

/// Puts itself into a cgroup of its own, named $2, by a mount in $1 that nobody else sees, and goes on with the rest.
const ENTER: &str = r#"set -e
mkdir "$1/cgroups"
mount -t cgroup2 cgroup2 "$1/cgroups"
mkdir "$1/cgroups/$2"
echo 0 > "$1/cgroups/$2/cgroup.procs"
umount "$1/cgroups"
shift 2
exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --cgroup "$@""#;

/// Turns the machine's files, with what is in $1/files on top, into the root, and becomes systemd. The root is shared, since
/// systemd hands over credentials by a mount that has to be seen in the service's namespace; settings of the kernel are
/// read-only, since they are this machine's. $2 is the agent's binary.
const BOOT: &str = r#"set -e
mkdir "$1/layer"
mount -t tmpfs tmpfs "$1/layer"
root=$1/layer/root
mkdir "$1/layer/upper" "$1/layer/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/layer/upper,workdir=$1/layer/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
rm -rf "$root/etc/systemd/system" "$root/etc/darter" "$root/var/lib/darter"
cp -a "$1/files/." "$root/"
touch "$root/usr/bin/darter"
mount --bind "$2" "$root/usr/bin/darter"
systemd-sysusers --root="$root" darter.conf
mkdir "$root/before"
cd "$root"
pivot_root . before
mount --make-rshared /
umount -l /before
exec env -i container=lab PATH=/usr/bin:/bin:/usr/sbin:/sbin /lib/systemd/systemd --system --unit=lab.target --log-target=journal"#;

/// Removes the cgroup $2 and all below it.
const CLEAR: &str = r#"set -e
mount -t cgroup2 cgroup2 "$1/cgroups"
find "$1/cgroups/$2" -depth -type d -exec rmdir {} +"#;

/// A running systemd.
#[derive(Debug)]
pub struct Systemd {
    /// `unshare`, whose only child is systemd.
    daemon: Daemon,
    dir: PathBuf,
    cgroup: String,
}

impl Systemd {
    /// Boots it on `host`, with an agent that has no peers, and waits until the service runs.
    pub async fn boot(world: &World, host: &Host) -> Result<Self> {
        let dir = world.directory("systemd")?;
        let files = dir.join("files");
        let units = files.join("etc/systemd/system");
        let (sysusers, etc) = (files.join("usr/lib/sysusers.d"), files.join("etc/darter"));
        for path in [&units, &sysusers, &etc] {
            fs::create_dir_all(path)?;
        }
        for (name, text) in UNITS.into_iter().chain([TARGET]) {
            fs::write(units.join(name), text)?;
        }
        fs::write(sysusers.join("darter.conf"), SYSUSERS)?;
        let advertise = host.address.to_string();
        // JSON is YAML too. A machine with a full disk may still run the lab.
        let config = json!({"node": {"advertise": advertise}, "cache": {"min_free": "1%"}, "discovery": []});
        fs::write(etc.join("config.yaml"), config.to_string())?;
        fs::copy(super::agent::secret(world).await?, etc.join("secret"))?;

        let cgroup = format!("darter-lab-{}", std::process::id());
        let run = host.run("unshare").args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "sh"]).arg(&dir);
        let run = run.args([&cgroup, "sh", "-c", BOOT, "sh"]).arg(&dir).arg(world.darter());
        let daemon = Daemon::start("systemd", run, &world.log("systemd"))?;
        let mut systemd = Self { daemon, dir, cgroup };
        if let Err(error) = systemd.wait_for_service().await {
            let journal = systemd.journal().await;
            systemd.stop().await?;
            return Err(error.context(journal));
        }
        Ok(systemd)
    }

    async fn wait_for_service(&mut self) -> Result<()> {
        let runs = || async { self.show("SubState").await.is_ok_and(|state| state == "running") };
        let waited = wait_for("the service to run", BOOT_DEADLINE, runs).await;
        self.daemon.check()?;
        waited
    }

    /// A program beside systemd, with its files, its network, its processes.
    pub fn run(&self, program: &str) -> Result<Run> {
        let parent = self.daemon.pid().as_raw_nonzero();
        let child = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
        let child = child.split_whitespace().next().context("systemd does not run")?;
        let all = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net"];
        Ok(Run::new("nsenter").args(["--target", child]).args(all).arg(program))
    }

    /// A property of the service.
    pub async fn show(&self, property: &str) -> Result<String> {
        let value = self.run("systemctl")?.args(["show", "--value", "--property", property, SERVICE]).output().await?;
        Ok(value.trim().to_owned())
    }

    /// What the service and systemd about it have said last.
    pub async fn journal(&self) -> String {
        let shown =
            async { self.run("journalctl")?.args(["--no-pager", "--lines", "20", "--unit", SERVICE]).output().await };
        shown.await.unwrap_or_else(|error| format!("no journal: {error:#}"))
    }

    /// Ends it and everything that it runs, as when a machine loses power, and removes its cgroups.
    pub async fn stop(self) -> Result<()> {
        self.daemon.kill().await?;
        let clear = || async {
            let run = Run::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", CLEAR, "sh"]);
            run.arg(&self.dir).arg(&self.cgroup).output().await.is_ok()
        };
        // The last processes end a moment after the first.
        wait_for("systemd's cgroups to be empty", BOOT_DEADLINE, clear).await
    }
}
