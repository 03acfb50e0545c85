//! The registry's certificate authority, made anew for each world.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Files in PEM.
#[derive(Clone, Debug)]
pub struct RegistryCertificates {
    /// Whoever trusts this trusts the registry.
    pub ca: PathBuf,
    /// The registry's certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl RegistryCertificates {
    /// Writes a new authority's certificate, and one leaf with its key for `address`, into `dir`.
    pub fn generate(dir: &Path, address: Ipv4Addr) -> Result<Self> {
        let files = Self {
            ca: dir.join("registry-ca.crt"),
            certificate: dir.join("registry.crt"),
            key: dir.join("registry.key"),
        };
        let mut authority = CertificateParams::new(Vec::<String>::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.distinguished_name.push(DnType::CommonName, "lab registry CA");
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority_key = KeyPair::generate()?;
        let authority_certificate = authority.self_signed(&authority_key)?;
        let issuer = Issuer::new(authority, authority_key);

        let mut leaf = CertificateParams::new(vec![address.to_string()])?;
        leaf.distinguished_name.push(DnType::CommonName, "lab registry");
        let leaf_key = KeyPair::generate()?;
        let leaf_certificate = leaf.signed_by(&leaf_key, &issuer)?;

        std::fs::write(&files.ca, authority_certificate.pem())?;
        std::fs::write(&files.certificate, leaf_certificate.pem())?;
        std::fs::write(&files.key, leaf_key.serialize_pem())?;
        Ok(files)
    }
}
