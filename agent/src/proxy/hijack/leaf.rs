//! Leaf certificates, one per hijacked host, signed by the operator's CA.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use lru::LruCache;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData,
};
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::proxy::tls::{self, Identity, PemPair, TlsError};

/// How long a leaf is valid. A stolen one is of use for no longer.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// How much earlier a leaf's validity begins, for clients (containers, virtual machines) whose clocks are behind.
const BACKDATED: Duration = Duration::from_secs(60 * 60);

/// A leaf with less than this left is replaced, so that none expires during a handshake or a client's session.
const REPLACED_BEFORE: Duration = Duration::from_secs(60 * 60);

/// Leaves kept; the least recently used goes. Minting another takes well under a millisecond.
const LEAVES_MAX: NonZeroUsize = NonZeroUsize::new(100).unwrap();

/// Why a CA is of no use. The operator's mistake, apart from [`LeafError::Mint`]; nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum LeafError {
    /// The certificate cannot be read.
    #[error("the CA certificate cannot be read")]
    Certificate,
    /// The key cannot be read.
    #[error("the CA key cannot be read")]
    Key(#[source] rcgen::Error),
    /// The key is another certificate's.
    #[error("the CA key does not belong to the CA certificate")]
    OtherKey,
    /// A leaf could not be signed, for example because the host is no name that a certificate can hold.
    #[error("no certificate can be minted")]
    Mint(#[source] rcgen::Error),
    /// A minted leaf was not accepted by the TLS library. A defect here.
    #[error("a minted certificate cannot be used")]
    Unusable(#[source] TlsError),
}

/// A CA that mints leaves.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    chain: Vec<CertificateDer<'static>>,
    /// All leaves have this key, made at start and never written anywhere. It is not the CA's: a leaf's key is in use
    /// with every handshake, the CA's only to sign.
    leaf_key: KeyPair,
    leaves: Mutex<LruCache<String, Leaf>>,
}

struct Leaf {
    identity: Identity,
    expires: SystemTime,
}

impl Authority {
    /// A CA out of PEM, or `None` if the certificate is not one that may issue others.
    pub(super) fn from_pem(pair: &PemPair) -> Result<Option<Self>, LeafError> {
        let chain = tls::certificates(&pair.certificate).map_err(|_| LeafError::Certificate)?;
        let first = chain.first().ok_or(LeafError::Certificate)?;
        let (_, certificate) = X509Certificate::from_der(first).map_err(|_| LeafError::Certificate)?;
        if !certificate.is_ca() {
            return Ok(None);
        }
        let pem = std::str::from_utf8(&pair.key).map_err(|_| LeafError::Key(rcgen::Error::CouldNotParseKeyPair))?;
        let key = KeyPair::from_pem(pem).map_err(LeafError::Key)?;
        if key.subject_public_key_info() != certificate.public_key().raw {
            return Err(LeafError::OtherKey);
        }
        let issuer = Issuer::from_ca_cert_der(first, key).map_err(|_| LeafError::Certificate)?;
        let leaf_key = KeyPair::generate().map_err(LeafError::Mint)?;
        Ok(Some(Self { issuer, chain, leaf_key, leaves: Mutex::new(LruCache::new(LEAVES_MAX)) }))
    }

    /// The leaf for a host, from the cache or newly minted. `host` is a name or an address, without brackets.
    pub(super) fn leaf(&self, host: &str, now: SystemTime) -> Result<Identity, LeafError> {
        // Nothing is awaited under the lock, and minting is short; two handshakes for one host share one leaf.
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.get(host).filter(|leaf| now + REPLACED_BEFORE < leaf.expires) {
            return Ok(leaf.identity.clone());
        }
        let expires = now + LIFETIME;
        let identity = self.mint(host, now, expires)?;
        leaves.put(host.to_owned(), Leaf { identity: identity.clone(), expires });
        Ok(identity)
    }

    fn mint(&self, host: &str, now: SystemTime, expires: SystemTime) -> Result<Identity, LeafError> {
        // An address becomes an IP name, everything else a DNS name.
        let mut params = CertificateParams::new([host.to_owned()]).map_err(LeafError::Mint)?;
        // Clients go by the alternative name alone; a host here could be too long for the field.
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "darter");
        params.not_before = (now - BACKDATED).into();
        params.not_after = expires.into();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&self.leaf_key, &self.issuer).map_err(LeafError::Mint)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.chain.iter().cloned());
        Identity::inside_from_der(chain, self.leaf_key.serialize_der()).map_err(LeafError::Unusable)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rcgen::BasicConstraints;

    fn ca(key: &KeyPair) -> PemPair {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(key).unwrap().pem().into_bytes();
        PemPair { certificate, key: key.serialize_pem().into_bytes() }
    }

    #[test]
    fn a_leaf_is_used_again_until_it_is_about_to_expire() {
        let authority = Authority::from_pem(&ca(&KeyPair::generate().unwrap())).unwrap().unwrap();
        let now = SystemTime::now();
        let first = authority.leaf("a.example", now).unwrap();
        assert!(first.is(&authority.leaf("a.example", now + Duration::from_secs(22 * 3600)).unwrap()));
        assert!(!first.is(&authority.leaf("b.example", now).unwrap()));
        assert!(!first.is(&authority.leaf("a.example", now + Duration::from_secs(23 * 3600)).unwrap()));
    }

    /// The median, so that a machine with other work is no failure.
    #[test]
    fn a_leaf_is_minted_within_five_milliseconds() {
        let authority = Authority::from_pem(&ca(&KeyPair::generate().unwrap())).unwrap().unwrap();
        let now = SystemTime::now();
        let mut times: Vec<Duration> = (0..99)
            .map(|host| {
                let start = std::time::Instant::now();
                authority.leaf(&format!("h{host}.example"), now).unwrap();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!("a leaf is minted in {:?}, at the most in {:?}", times[49], times[98]);
        assert!(times[49] <= Duration::from_millis(5), "{:?}", times[49]);
    }

    #[test]
    fn the_cache_of_leaves_is_bounded() {
        let authority = Authority::from_pem(&ca(&KeyPair::generate().unwrap())).unwrap().unwrap();
        let now = SystemTime::now();
        let first = authority.leaf("h.example", now).unwrap();
        for host in 0..LEAVES_MAX.get() {
            authority.leaf(&format!("h{host}.example"), now).unwrap();
        }
        assert_eq!(authority.leaves.lock().unwrap().len(), LEAVES_MAX.get());
        assert!(!first.is(&authority.leaf("h.example", now).unwrap()));
    }

    #[test]
    fn what_is_no_ca_is_told_apart_from_what_is_no_pair() {
        let key = KeyPair::generate().unwrap();
        let plain = CertificateParams::new(["a.example".to_owned()]).unwrap().self_signed(&key).unwrap();
        let plain = PemPair { certificate: plain.pem().into_bytes(), key: key.serialize_pem().into_bytes() };
        assert!(Authority::from_pem(&plain).unwrap().is_none());
        let mut other = ca(&key);
        other.key = KeyPair::generate().unwrap().serialize_pem().into_bytes();
        assert!(matches!(Authority::from_pem(&other), Err(LeafError::OtherKey)));
        other.key = b"nonsense".to_vec();
        assert!(matches!(Authority::from_pem(&other), Err(LeafError::Key(_))));
        other.certificate = b"nonsense".to_vec();
        assert!(matches!(Authority::from_pem(&other), Err(LeafError::Certificate)));
    }
}
