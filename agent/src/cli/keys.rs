//! `darter gen-ca` and `darter secret`: the two things that must be random.
//!
//! The CA signs leaves for hijacked hosts on one node. It is good for those hosts alone, critically so: whoever steals
//! it from a node can read what that node pulls from them, and nothing else of anybody.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, GeneralSubtree, IsCa, KeyPair,
    KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256,
};

use super::args::GenCaArgs;
use super::file;
use crate::config::{HostPattern, host};

/// Name of the certificate's file.
pub const CERT_FILE: &str = "ca.crt";

/// Name of the key's file.
pub const KEY_FILE: &str = "ca.key";

/// Random bytes of a secret: what an AES-256 key is worth.
const SECRET_BYTES: usize = 32;

/// How far the validity of a CA begins in the past: clocks of a data centre differ, and so do time zones set wrongly.
const BACKDATED: Duration = Duration::from_secs(24 * 60 * 60);

/// Everybody may read a certificate.
const CERT_MODE: u32 = 0o644;

/// Only its owner may read a key.
const KEY_MODE: u32 = 0o600;

/// Why keys could not be made. Nothing was replaced, unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// There is a CA already, and nobody allowed to replace it.
    #[error("{0} exists already; --overwrite replaces it, and what it signed is worthless then")]
    Exists(PathBuf),
    /// A file could not be written. The disk's fault or the operator's; a key without its certificate may be left
    /// when one was to be replaced.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The certificate could not be made.
    #[error("cannot make the certificate")]
    Certificate(#[from] rcgen::Error),
    /// The system gave no randomness; trying again may help.
    #[error("the system gives no random bytes")]
    Random,
}

/// Makes a CA in a folder: `ca.crt`, and `ca.key` that only its owner can read.
///
/// # Errors
/// If there is one already and it is not to be replaced, or a file cannot be written.
pub fn gen_ca(args: &GenCaArgs) -> Result<(), KeysError> {
    let (cert, key) = (args.out.join(CERT_FILE), args.out.join(KEY_FILE));
    fs::create_dir_all(&args.out).map_err(|source| KeysError::Write { path: args.out.clone(), source })?;
    if !args.overwrite
        && let Some(there) = [&cert, &key].into_iter().find(|path| path.symlink_metadata().is_ok())
    {
        return Err(KeysError::Exists(there.clone()));
    }
    let (cert_pem, key_pem) = authority(&args.hosts, args.days, &host::name(), SystemTime::now())?;
    write(&key, &key_pem, KEY_MODE, args.overwrite)?;
    write(&cert, &cert_pem, CERT_MODE, args.overwrite).inspect_err(|_| {
        // Without its certificate the key is of no use, and it would be in the way of the next attempt.
        let _ = fs::remove_file(&key);
    })
}

/// A cluster secret as it stands in a secret file.
///
/// # Errors
/// If the system gives no random bytes.
pub fn secret() -> Result<String, KeysError> {
    let mut bytes = [0; SECRET_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| KeysError::Random)?;
    Ok(STANDARD.encode(bytes))
}

/// A CA for `hosts` on `node`, certificate and key in PEM.
fn authority(hosts: &[HostPattern], days: u32, node: &str, now: SystemTime) -> Result<(String, String), KeysError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + now + Duration::from_secs(u64::from(days) * 24 * 60 * 60);
    params.distinguished_name = DistinguishedName::new();
    // The node's name tells the CAs of a cluster apart in a trust store.
    params.distinguished_name.push(DnType::CommonName, format!("darter CA of {node}"));
    // Leaves only: an intermediate under it could be handed around.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.name_constraints = Some(constraints(hosts));
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// Name constraints that permit `hosts` and nothing else; they are always critical.
///
/// A kind of name that no permitted subtree speaks of is not constrained at all (RFC 5280 section 4.2.1.10), so the
/// kind that none of the hosts is of is excluded as a whole.
fn constraints(hosts: &[HostPattern]) -> NameConstraints {
    let mut permitted = Vec::new();
    let (mut names, mut addresses) = (false, false);
    for pattern in hosts {
        let host = &pattern.host.host;
        let subtree = match host.parse::<IpAddr>() {
            Ok(ip) => {
                addresses = true;
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(ip, if ip.is_ipv4() { 32 } else { 128 }))
            }
            Err(_) => {
                names = true;
                // A name stands for itself and everything below; there is no narrower constraint.
                GeneralSubtree::DnsName(host.clone())
            }
        };
        if !permitted.contains(&subtree) {
            permitted.push(subtree);
        }
    }
    let mut excluded = Vec::new();
    if !names {
        excluded.push(GeneralSubtree::DnsName(String::new()));
    }
    if !addresses {
        for all in [IpAddr::from(Ipv4Addr::UNSPECIFIED), IpAddr::from(Ipv6Addr::UNSPECIFIED)] {
            excluded.push(GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(all, 0)));
        }
    }
    NameConstraints { permitted_subtrees: permitted, excluded_subtrees: excluded }
}

/// Writes a file as a whole or not at all, never readable by more than `mode` says, not even for a moment.
fn write(path: &Path, text: &str, mode: u32, overwrite: bool) -> Result<(), KeysError> {
    file::write(path, text, mode, overwrite).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeysError::Exists(path.to_owned()),
        _ => KeysError::Write { path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests;
