//! Certificate authorities of the demonstration and of tests: one that the registry's certificate comes from, one for
//! each agent to answer its clients with. They live as long as the process, or as the directory they are written to.
//!
//! Not here: the authority of a real node, which `darter gen-ca` makes.

use std::fmt;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, NameConstraints,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Bits of an address that a name constraint on one host covers.
const IPV4_BITS: u8 = 32;
const IPV6_BITS: u8 = 128;

/// Why no certificate was made. A bug or a host name that cannot stand in one; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The name or the key was refused.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refused what was made.
    #[error("cannot use the certificate")]
    Tls(#[from] rustls::Error),
}

/// A certificate authority that may vouch for a few hosts and for nobody else.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key_pem: String,
}

impl Authority {
    /// A new authority for `hosts`, names or addresses without ports. The constraint to them is critical.
    ///
    /// # Errors
    /// If a host is neither a DNS name nor an address.
    pub fn new(name: &str, hosts: &[&str]) -> Result<Self, AuthorityError> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: hosts.iter().map(|host| subtree(host)).collect(),
            excluded_subtrees: Vec::new(),
        });
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (certificate_pem, key_pem) = (certificate.pem(), key.serialize_pem());
        Ok(Self { certificate: certificate.der().clone(), certificate_pem, key_pem, issuer: Issuer::new(params, key) })
    }

    /// The certificate in PEM, for `registries.ca_file`, `hijack.cert` or a client's trust.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The private key in PEM. Whoever writes it to a file makes that 0600.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// The TLS side of a server called `host`, with a certificate of its own.
    ///
    /// # Errors
    /// If `host` is neither a DNS name nor an address.
    pub fn server(&self, host: &str) -> Result<Arc<rustls::ServerConfig>, AuthorityError> {
        let mut params = CertificateParams::new(vec![host.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, host);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// The TLS side of a client that trusts this authority alone.
    ///
    /// # Errors
    /// If the TLS library refuses the certificate.
    pub fn client(&self) -> Result<Arc<rustls::ClientConfig>, AuthorityError> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.certificate.clone())?;
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

fn subtree(host: &str) -> GeneralSubtree {
    match host.parse() {
        Ok(std::net::IpAddr::V4(address)) => {
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address.into(), IPV4_BITS))
        }
        Ok(std::net::IpAddr::V6(address)) => {
            GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address.into(), IPV6_BITS))
        }
        Err(_) => GeneralSubtree::DnsName(host.to_owned()),
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
