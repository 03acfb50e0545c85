//! The files that a configuration names: the cluster's secret, certificates, keys. Read once, at the start.
//!
//! Messages name the file and the line, never what stands there.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use darter_swarm::identity::SECRET_BYTES_MIN;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::types::{Identity, Redacted};

/// Bound on a secret file: more lines than any rotation needs.
const SECRET_FILE_BYTES_MAX: u64 = 64 * 1024;

/// Bound on a PEM file: three times what a system's whole CA bundle takes.
const PEM_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Permission bits that let others than owner and group read or write.
const OTHERS: u32 = 0o006;

/// Permission bits that let anybody but the owner do anything.
const GROUP_AND_OTHERS: u32 = 0o077;

/// Why a pair of files is no identity: which key of the configuration is to blame, and for what.
pub(super) enum PairProblem {
    /// The certificate.
    Cert(String),
    /// The key, or the key in relation to the certificate.
    Key(String),
}

/// The secrets of a file, one per line in base64, in its order. All that is wrong with it if anything is.
pub(super) fn secrets(path: &Path) -> Result<Vec<Redacted<Vec<u8>>>, Vec<String>> {
    let (bytes, mode) = read(path, SECRET_FILE_BYTES_MAX).map_err(|message| vec![message])?;
    let mut problems = Vec::new();
    if mode & OTHERS != 0 {
        let shown = path.display();
        problems.push(format!("{shown} can be read or written by everybody (mode {mode:04o}): chmod 0600 {shown}"));
    }
    let mut secrets = Vec::new();
    let text = String::from_utf8_lossy(&bytes);
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        match STANDARD.decode(text.trim()) {
            Ok(secret) if secret.len() < SECRET_BYTES_MIN => problems.push(format!(
                "line {line} of {} holds {} bytes, a secret has at least {SECRET_BYTES_MIN} (darter secret makes one)",
                path.display(),
                secret.len()
            )),
            Ok(secret) => secrets.push(Redacted::new(secret)),
            Err(_) => problems.push(format!("line {line} of {} is not base64", path.display())),
        }
    }
    if secrets.is_empty() && problems.is_empty() {
        problems.push(format!("{} is empty: it holds no secret (darter secret makes one)", path.display()));
    }
    if problems.is_empty() { Ok(secrets) } else { Err(problems) }
}

/// The certificates of a PEM file, at least one, each of which can be a trust anchor.
pub(super) fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = certificates(path)?;
    for (at, certificate) in (1..).zip(&certificates) {
        let usable = rustls::RootCertStore::empty().add(certificate.clone());
        usable.map_err(|error| format!("certificate {at} of {} cannot be used: {error}", path.display()))?;
    }
    Ok(certificates)
}

/// A certificate chain and the key that fits it.
pub(super) fn identity(cert_file: &Path, key_file: &Path) -> Result<Identity, Vec<PairProblem>> {
    let (chain, key) = match (certificates(cert_file), private_key(key_file)) {
        (Ok(chain), Ok(key)) => (chain, key),
        (chain, key) => {
            let cert = chain.err().map(PairProblem::Cert);
            return Err(cert.into_iter().chain(key.err().map(PairProblem::Key)).collect());
        }
    };
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map_err(|error| {
        let (cert, key) = (cert_file.display(), key_file.display());
        vec![match error {
            rustls::Error::InconsistentKeys(_) => {
                PairProblem::Key(format!("{key} does not fit the certificate in {cert}"))
            }
            rustls::Error::InvalidCertificate(why) => {
                PairProblem::Cert(format!("the first certificate of {cert} cannot be used: {why:?}"))
            }
            error => PairProblem::Key(format!("the key in {key} cannot be used: {error}")),
        }]
    })?;
    let (cert_file, key_file) = (cert_file.to_owned(), key_file.to_owned());
    Ok(Identity { cert_file, key_file, chain, key: Redacted::new(key) })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let (bytes, _) = read(path, PEM_FILE_BYTES_MAX)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| format!("{} is not PEM: {error}", path.display()))?;
    if found.is_empty() { Err(format!("{} holds no PEM certificate", path.display())) } else { Ok(found) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let (bytes, mode) = read(path, PEM_FILE_BYTES_MAX)?;
    let shown = path.display();
    if mode & GROUP_AND_OTHERS != 0 {
        return Err(format!("{shown} is open to others than its owner (mode {mode:04o}): chmod 0600 {shown}"));
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| format!("{shown} holds no PEM private key"))
}

/// The content of a file of at most `max` bytes, and its permissions.
fn read(path: &Path, max: u64) -> Result<(Vec<u8>, u32), String> {
    let failed = |error: std::io::Error| format!("{} cannot be read: {error}", path.display());
    // Before it is opened: opening a pipe would wait for somebody to write.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    let mut bytes = Vec::new();
    file.take(max + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max {
        return Err(format!("{} is larger than {max} bytes", path.display()));
    }
    Ok((bytes, mode))
}

/// The text of a configuration file of at most `max` bytes.
pub(super) fn text(path: &Path, max: u64) -> Result<String, String> {
    let (bytes, _) = read(path, max)?;
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8 after byte {}", error.utf8_error().valid_up_to()))
}
