//! Who a peer is: the certificate that an agent shows, and what is read out of one that is shown.
//!
//! A certificate here is an envelope, not a chain of trust. It carries the agent's Ed25519 key as its subject key and,
//! in an extension, the boot epoch and the membership tag that was made with the cluster's secret. The tag decides;
//! names, dates and the self-signature mean nothing and are not looked at. That the other side holds the private key
//! is proven by the TLS handshake.

use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::{NodeId, Signer};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::der_parser::oid::Oid;
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The extension's name. The arc is the one that RFC 5612 sets aside for numbers that nobody registers; only agents
/// that speak darter's own ALPN protocol ever see it.
const MEMBERSHIP_OID: [u64; 9] = [1, 3, 6, 1, 4, 1, 32473, 68, 1];

/// DER tag of an octet string, which the extension's content is.
const OCTET_STRING: u8 = 0x04;
/// Epoch and tag.
const MEMBERSHIP_BYTES: usize = 8 + 16;

/// What an agent proves itself with.
#[derive(Debug)]
pub(super) struct Credentials {
    /// The certificate, valid as long as the key: until the agent ends.
    pub(super) certificate: CertificateDer<'static>,
    /// The private key.
    pub(super) key: PrivateKeyDer<'static>,
}

/// The node's own key could not be put into a certificate. A fault of this agent's libraries; nothing started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node's key cannot be made into a certificate")]
pub struct CertifyError;

/// Why a certificate does not make its bearer a peer. The bearer is to blame; asking again with the same cannot help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is no X.509 certificate, or it came with others.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// Its key is not an Ed25519 key.
    #[error("the certificate's key is not an Ed25519 key")]
    KeyType,
    /// It lacks the membership extension, or that is malformed.
    #[error("the certificate says nothing of membership")]
    NoMembership,
    /// Its tag was not made with a secret of this cluster for this key and epoch.
    #[error("the certificate's bearer is not a member of the cluster")]
    NotAMember,
    /// The bearer is a member, but not the one that was dialled: the address has changed hands.
    #[error("{found} answered where {expected} was expected")]
    Another {
        /// Who was dialled.
        expected: NodeId,
        /// Who answered.
        found: NodeId,
    },
}

/// The certificate of this node.
pub(super) fn certify(node: &NodeKey) -> Result<Credentials, CertifyError> {
    let pkcs8 = PrivatePkcs8KeyDer::from(node.pkcs8().map_err(|_| CertifyError)?);
    let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519).map_err(|_| CertifyError)?;
    let certificate = envelope(&node.signer(), &pair)?;
    Ok(Credentials { certificate, key: PrivateKeyDer::Pkcs8(pkcs8) })
}

/// A certificate for `pair` that claims the epoch and tag of `signer`.
fn envelope(signer: &Signer, pair: &rcgen::KeyPair) -> Result<CertificateDer<'static>, CertifyError> {
    let mut content = vec![OCTET_STRING, MEMBERSHIP_BYTES as u8];
    content.extend_from_slice(&signer.epoch.to_le_bytes());
    content.extend_from_slice(&signer.tag);
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&MEMBERSHIP_OID, content)];
    Ok(params.self_signed(pair).map_err(|_| CertifyError)?.into())
}

/// The member that a certificate names, if its tag was made with one of the cluster's secrets. A bearer shows one
/// certificate; `others` that come with it are refused, as nothing here would check them.
///
/// Says nothing of who sent the certificate: the handshake's signature must be checked against the returned key.
pub(super) fn member(
    keys: &ClusterKeys,
    certificate: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
) -> Result<Signer, Refusal> {
    if !others.is_empty() {
        return Err(Refusal::Unreadable);
    }
    let signer = claim(certificate)?;
    if keys.accepts(&signer) { Ok(signer) } else { Err(Refusal::NotAMember) }
}

/// What a certificate claims, unchecked.
pub(super) fn claim(certificate: &CertificateDer<'_>) -> Result<Signer, Refusal> {
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|_| Refusal::Unreadable)?;
    if !rest.is_empty() {
        return Err(Refusal::Unreadable);
    }
    let subject = parsed.public_key();
    if subject.algorithm.algorithm != OID_SIG_ED25519 || subject.algorithm.parameters.is_some() {
        return Err(Refusal::KeyType);
    }
    let public_key = subject.subject_public_key.data.as_ref().try_into().map_err(|_| Refusal::KeyType)?;

    let oid = Oid::from(&MEMBERSHIP_OID).map_err(|_| Refusal::NoMembership)?;
    let extension = parsed.get_extension_unique(&oid).ok().flatten().ok_or(Refusal::NoMembership)?;
    let [OCTET_STRING, length, membership @ ..] = extension.value else {
        return Err(Refusal::NoMembership);
    };
    let membership: [u8; MEMBERSHIP_BYTES] = membership.try_into().map_err(|_| Refusal::NoMembership)?;
    if usize::from(*length) != MEMBERSHIP_BYTES {
        return Err(Refusal::NoMembership);
    }
    let (mut epoch, mut tag) = ([0; 8], [0; 16]);
    epoch.copy_from_slice(&membership[..8]);
    tag.copy_from_slice(&membership[8..]);
    Ok(Signer { public_key, epoch: u64::from_le_bytes(epoch), tag })
}

/// Ways to show something else than one's own certificate.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod forge {
    use super::*;

    /// The key of `node` in a certificate that claims the epoch and tag of `claimed`.
    pub(crate) fn with_tag_of(node: &NodeKey, claimed: &Signer) -> Credentials {
        let honest = certify(node).unwrap();
        let PrivateKeyDer::Pkcs8(pkcs8) = &honest.key else { unreachable!("keys are PKCS#8") };
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(pkcs8, &rcgen::PKCS_ED25519).unwrap();
        let certificate = envelope(claimed, &pair).unwrap();
        Credentials { certificate, key: honest.key }
    }

    /// The certificate of `victim` with the private key of `node`.
    pub(crate) fn with_certificate_of(node: &NodeKey, victim: &NodeKey) -> Credentials {
        Credentials { certificate: certify(victim).unwrap().certificate, key: certify(node).unwrap().key }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ring(byte: u8) -> ClusterKeys {
        ClusterKeys::new("lab", &[[byte; 32]]).unwrap()
    }

    #[test]
    fn a_certificate_says_who_made_it() {
        let node = NodeKey::new(&ring(1), &[9; 32], 77).unwrap();
        let credentials = certify(&node).unwrap();
        assert_eq!(member(&ring(1), &credentials.certificate, &[]), Ok(node.signer()));
        assert_eq!(member(&ring(2), &credentials.certificate, &[]), Err(Refusal::NotAMember));
    }

    #[test]
    fn a_tag_holds_for_its_own_key_and_epoch() {
        let ring = ring(1);
        let node = NodeKey::new(&ring, &[9; 32], 77).unwrap();
        let other = NodeKey::new(&ring, &[8; 32], 77).unwrap();
        let forged = forge::with_tag_of(&other, &node.signer());
        assert_eq!(member(&ring, &forged.certificate, &[]), Err(Refusal::NotAMember));
        let aged = forge::with_tag_of(&node, &Signer { epoch: 78, ..node.signer() });
        assert_eq!(member(&ring, &aged.certificate, &[]), Err(Refusal::NotAMember));
    }

    #[test]
    fn refuses_what_is_no_certificate_of_ours() {
        let ring = ring(1);
        let node = NodeKey::new(&ring, &[9; 32], 77).unwrap();
        let good = certify(&node).unwrap().certificate;
        let chain = [good.clone()];
        assert_eq!(member(&ring, &good, &chain), Err(Refusal::Unreadable));
        let mut longer = good.to_vec();
        longer.push(0);
        for bytes in [vec![], vec![0x30], good[..good.len() - 1].to_vec(), longer] {
            assert_eq!(member(&ring, &CertificateDer::from(bytes), &[]), Err(Refusal::Unreadable));
        }
        let plain = |alg| {
            let pair = rcgen::KeyPair::generate_for(alg).unwrap();
            CertificateDer::from(rcgen::CertificateParams::default().self_signed(&pair).unwrap())
        };
        assert_eq!(member(&ring, &plain(&rcgen::PKCS_ECDSA_P256_SHA256), &[]), Err(Refusal::KeyType));
        assert_eq!(member(&ring, &plain(&rcgen::PKCS_ED25519), &[]), Err(Refusal::NoMembership));
    }
}
