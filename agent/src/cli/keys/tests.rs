//! The CA as its users see it: x509-parser for what it says, webpki (through rustls) for what clients believe, and
//! openssl where it is installed.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;

use rcgen::{Issuer, SanType};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;

fn args(out: &Path, hosts: &str) -> GenCaArgs {
    let hosts = hosts.split(',').map(|host| host.parse().unwrap()).collect();
    GenCaArgs { out: out.to_owned(), hosts, days: 3650, overwrite: false }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}

/// Whether a client that trusts the CA believes a leaf of it for `san`.
fn believed(dir: &Path, san: &str) -> bool {
    let cert = fs::read(dir.join(CERT_FILE)).unwrap();
    let key = PrivateKeyDer::from_pem_file(dir.join(KEY_FILE)).unwrap();
    let ca = CertificateDer::from_pem_slice(&cert).unwrap();
    let issuer = Issuer::from_ca_cert_der(&ca, KeyPair::try_from(&key).unwrap()).unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![match san.parse::<IpAddr>() {
        Ok(ip) => SanType::IpAddress(ip),
        Err(_) => SanType::DnsName(san.try_into().unwrap()),
    }];
    let leaf = leaf.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca).unwrap();
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()));
    let name = ServerName::try_from(san.to_owned()).unwrap();
    verifier.build().unwrap().verify_server_cert(leaf.der(), &[], &name, &[], UnixTime::now()).is_ok()
}

#[test]
fn the_ca_says_what_it_is_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/folder");
    gen_ca(&args(&out, "registry.example.org,*.corp.example.org:5000,10.77.0.1,registry.example.org:443")).unwrap();
    assert_eq!((mode(&out.join(KEY_FILE)), mode(&out.join(CERT_FILE))), (0o600, 0o644));

    let der = CertificateDer::from_pem_file(out.join(CERT_FILE)).unwrap();
    let (_, ca) = X509Certificate::from_der(&der).unwrap();
    let basic = ca.basic_constraints().unwrap().unwrap();
    assert!(basic.critical && basic.value.ca);
    assert_eq!(basic.value.path_len_constraint, Some(0));
    let usage = ca.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.key_cert_sign() && !usage.value.digital_signature());
    let constraints = ca.name_constraints().unwrap().unwrap();
    assert!(constraints.critical);
    let shown = |list: &Option<Vec<x509_parser::extensions::GeneralSubtree<'_>>>| {
        list.iter().flatten().map(|subtree| subtree.base.to_string()).collect::<Vec<_>>()
    };
    let permitted = shown(&constraints.value.permitted_subtrees);
    assert_eq!(permitted.len(), 3, "{permitted:?}");
    assert_eq!(permitted[..2], ["DNSName(registry.example.org)", "DNSName(corp.example.org)"]);
    assert!(constraints.value.excluded_subtrees.is_none());
    assert_eq!(
        ca.iter_extensions()
            .filter(|ext| matches!(ext.parsed_extension(), ParsedExtension::NameConstraints(_)))
            .count(),
        1
    );
    let lifetime = ca.validity().not_after.timestamp() - ca.validity().not_before.timestamp();
    assert_eq!(lifetime, 3651 * 24 * 60 * 60);
    assert!(ca.validity().is_valid());
    // The key fits: the same check that the agent makes when it reads them.
    let key = PrivateKeyDer::from_pem_file(out.join(KEY_FILE)).unwrap();
    rustls::sign::CertifiedKey::from_der(vec![der.clone()], key, &default_provider()).unwrap();
}

#[test]
fn clients_believe_leaves_of_its_hosts_and_of_nobody_else() {
    for (hosts, good, bad) in [
        (
            "registry.example.org,*.corp.example.org",
            &["registry.example.org", "a.corp.example.org"][..],
            &["example.org", "registry.example.com", "10.77.0.1", "fd00::1"][..],
        ),
        ("10.77.0.1", &["10.77.0.1"][..], &["10.77.0.2", "registry.example.org", "fd00::1"][..]),
        ("fd00::1,a.org", &["fd00::1", "a.org"][..], &["fd00::2", "10.77.0.1", "b.org"][..]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        gen_ca(&args(dir.path(), hosts)).unwrap();
        for name in good {
            assert!(believed(dir.path(), name), "{hosts}: {name}");
        }
        for name in bad {
            assert!(!believed(dir.path(), name), "{hosts}: {name}");
        }
    }
}

#[test]
fn openssl_reads_it_too() {
    let dir = tempfile::tempdir().unwrap();
    gen_ca(&args(dir.path(), "registry.example.org,10.77.0.1")).unwrap();
    let cert = dir.path().join(CERT_FILE);
    let Ok(out) = Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(&cert).output() else {
        return; // Not installed; the tests above need nothing.
    };
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    for expected in [
        "CA:TRUE, pathlen:0",
        "Name Constraints: critical",
        "DNS:registry.example.org",
        "IP:10.77.0.1/255.255.255.255",
        "prime256v1",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
}

#[test]
fn an_existing_ca_is_not_replaced_without_being_told() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join(CERT_FILE), dir.path().join(KEY_FILE));
    gen_ca(&args(dir.path(), "a.org")).unwrap();
    let before = (fs::read(&cert).unwrap(), fs::read(&key).unwrap());
    assert!(matches!(gen_ca(&args(dir.path(), "b.org")), Err(KeysError::Exists(path)) if path == cert));
    assert_eq!(before, (fs::read(&cert).unwrap(), fs::read(&key).unwrap()));
    // One of the two is enough to refuse, and then the other is not made either.
    fs::remove_file(&cert).unwrap();
    assert!(matches!(gen_ca(&args(dir.path(), "b.org")), Err(KeysError::Exists(path)) if path == key));
    assert!(!cert.exists());
    // Told so, both are replaced, and the key is closed even where the old one was open.
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    gen_ca(&GenCaArgs { overwrite: true, ..args(dir.path(), "b.org") }).unwrap();
    assert_ne!(before.1, fs::read(&key).unwrap());
    assert_eq!(mode(&key), 0o600);
    assert!(believed(dir.path(), "b.org"));
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_folder_that_cannot_be_written_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(gen_ca(&args(&file, "a.org")), Err(KeysError::Write { .. })));
}

#[test]
fn a_secret_is_one_line_of_32_random_bytes() {
    let (one, other) = (secret().unwrap(), secret().unwrap());
    assert_eq!(STANDARD.decode(&one).unwrap().len(), SECRET_BYTES);
    assert!(!one.contains('\n'));
    assert_ne!(one, other);
}
