//! How this process was started: its arguments, its environment, its version. Dragonfly v1 showed the same under the same
//! names.
//!
//! An environment holds whatever somebody put there, for this program or for another, so values are shown of those
//! variables alone that cannot hold a secret; of all others it is only told that they are there (S16). There is no
//! profiler: v1's `/debug/pprof` came with its language.

use std::ffi::OsString;

use serde::Serialize;

/// What stands in the place of a value that is not shown.
const REDACTED: &str = "[redacted]";

/// What this program's own variables begin with. None of them is a secret: secrets and keys are read from files, and an
/// agent does not start with one that it does not know.
const OWN: &str = "DARTER_";

/// Variables of others that say how a process behaves, and nothing else. Proxies are not among them: their URLs may have a
/// password in front of the host.
const HARMLESS: [&str; 11] = [
    "HOME",
    "HOSTNAME",
    "KUBERNETES_SERVICE_HOST",
    "KUBERNETES_SERVICE_PORT",
    "LANG",
    "PATH",
    "PWD",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TZ",
    "USER",
];

/// What was built.
#[derive(Debug, Serialize)]
pub(super) struct Version {
    version: &'static str,
    arch: &'static str,
    os: &'static str,
}

/// The version of this program.
pub(super) const VERSION: Version =
    Version { version: env!("CARGO_PKG_VERSION"), arch: std::env::consts::ARCH, os: std::env::consts::OS };

/// The command line, an argument a line.
pub(super) fn args() -> String {
    lines(std::env::args_os().map(|argument| redacted_url(&argument.to_string_lossy())))
}

/// The environment, `NAME=value` a line, in the order of the names.
pub(super) fn env() -> String {
    lines(shown(std::env::vars_os()).into_iter())
}

fn shown(variables: impl Iterator<Item = (OsString, OsString)>) -> Vec<String> {
    let mut shown: Vec<String> = variables
        .map(|(name, value)| {
            let name = name.to_string_lossy();
            let harmless = name.starts_with(OWN) || HARMLESS.contains(&&*name);
            let value = if harmless { redacted_url(&value.to_string_lossy()) } else { REDACTED.to_owned() };
            format!("{name}={value}")
        })
        .collect();
    shown.sort_unstable();
    shown
}

/// Text without what stands between `//` and `@`.
fn redacted_url(text: &str) -> String {
    let user = text.find("//").and_then(|at| {
        let from = at + 2;
        let authority = text[from..].split(['/', '?', '#']).next()?;
        Some((from, from + authority.rfind('@')?))
    });
    match user {
        Some((from, to)) => format!("{}{REDACTED}{}", &text[..from], &text[to..]),
        None => text.to_owned(),
    }
}

/// One a line; what has lines of its own does not look like several.
fn lines(texts: impl Iterator<Item = String>) -> String {
    texts.map(|text| text.escape_debug().to_string() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // S16
    #[test]
    fn only_what_cannot_be_a_secret_is_shown() {
        let given = [
            ("REGISTRY_PASSWORD", "s3cret"),
            ("AWS_SECRET_ACCESS_KEY", "s3cret"),
            ("HTTPS_PROXY", "http://user:s3cret@proxy:3128"),
            ("PATHS", "s3cret"),
            ("darter_verify", "s3cret"),
            ("DARTER_VERIFY", "before_stream"),
            ("DARTER_REGISTRY_MIRROR_REMOTE", "https://user:s3cret@registry.example.org/x@y"),
            ("PATH", "/bin:/sbin"),
            ("TZ", "UTC\nPATH=/forged"),
        ];
        let text = lines(shown(given.map(|(name, value)| (name.into(), value.into())).into_iter()).into_iter());
        assert!(!text.contains("s3cret"), "{text}");
        for line in [
            "REGISTRY_PASSWORD=[redacted]",
            "HTTPS_PROXY=[redacted]",
            "DARTER_VERIFY=before_stream",
            "DARTER_REGISTRY_MIRROR_REMOTE=https://[redacted]@registry.example.org/x@y",
            "PATH=/bin:/sbin",
            "TZ=UTC\\nPATH=/forged",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} in {text}");
        }
        assert_eq!(text.lines().count(), given.len());
    }

    #[test]
    fn users_of_urls_are_not_shown() {
        for (text, shown) in [
            ("--config", "--config"),
            ("/etc/darter//config@home.yaml", "/etc/darter//[redacted]@home.yaml"),
            ("https://a/b@c", "https://a/b@c"),
            ("https://u:p@q@a:1/b", "https://[redacted]@a:1/b"),
            ("//", "//"),
        ] {
            assert_eq!(redacted_url(text), shown);
        }
    }
}
