//! TLS 1.3 in which both sides show a certificate of [`identity`], and nothing weaker.
//!
//! The ordinary verifiers look for a chain to a trust anchor and for a name; here the membership tag takes their place,
//! so both sides bring their own verifier. This is the one file that replaces the verification of a TLS client, and it
//! replaces it by a stricter one. Sessions are never resumed: a resumed session would skip the certificate and with it
//! the question which member answered.

use std::sync::{Arc, OnceLock};

use darter_swarm::identity::{ClusterKeys, NodeKey};
use darter_tracker::{NodeId, Signer};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature_with_raw_key};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConfig};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime, alg_id};

use super::identity::{self, CertifyError, Credentials, Refusal};

/// The protocol and its version: agents of versions that do not understand each other fail at the handshake.
pub(super) const ALPN: &[u8] = b"darter/1";

/// Makes the TLS configurations of one agent.
#[derive(Debug)]
pub(super) struct Tls {
    keys: Arc<ClusterKeys>,
    provider: Arc<CryptoProvider>,
    certified: Arc<SingleCertAndKey>,
}

/// Where a dial's verifier leaves its reason, since TLS passes on no more than an alert.
pub(super) type Verdict = Arc<OnceLock<Refusal>>;

impl Tls {
    /// The configurations that prove `node` a member of the cluster of `keys`.
    pub(super) fn new(keys: Arc<ClusterKeys>, node: &NodeKey) -> Result<Self, CertifyError> {
        Self::with_credentials(keys, identity::certify(node)?)
    }

    pub(super) fn with_credentials(keys: Arc<ClusterKeys>, credentials: Credentials) -> Result<Self, CertifyError> {
        // AES-128-GCM first: the cheapest where the CPU helps, and QUIC needs it for its first packets in any case.
        let provider = CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![aws_lc_rs::kx_group::X25519],
            ..aws_lc_rs::default_provider()
        };
        let key = provider.key_provider.load_private_key(credentials.key).map_err(|_| CertifyError)?;
        let certified = CertifiedKey::new(vec![credentials.certificate], key);
        Ok(Self { keys, provider: Arc::new(provider), certified: Arc::new(certified.into()) })
    }

    /// For incoming connections: a client without a member's certificate is refused in the handshake.
    pub(super) fn server(&self) -> Result<ServerConfig, CertifyError> {
        let verifier = self.verifier(None);
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|_| CertifyError)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(self.certified.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// For a connection to `expected`, and nobody else. The verdict is filled if the certificate is refused.
    pub(super) fn client(&self, expected: NodeId) -> Result<(ClientConfig, Verdict), CertifyError> {
        let verdict = Verdict::default();
        let verifier = self.verifier(Some((expected, verdict.clone())));
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|_| CertifyError)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.certified.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        Ok((config, verdict))
    }

    /// Who is at the other end of a finished handshake, from the certificates that were shown in it.
    pub(super) fn bearer(&self, shown: &[CertificateDer<'_>]) -> Result<NodeId, Refusal> {
        let (certificate, others) = shown.split_first().ok_or(Refusal::Unreadable)?;
        Ok(identity::member(&self.keys, certificate, others)?.node())
    }

    fn verifier(&self, dialled: Option<(NodeId, Verdict)>) -> MemberVerifier {
        MemberVerifier { keys: self.keys.clone(), provider: self.provider.clone(), dialled }
    }
}

/// Accepts members of the cluster, or the one that was dialled only.
#[derive(Debug)]
struct MemberVerifier {
    keys: Arc<ClusterKeys>,
    provider: Arc<CryptoProvider>,
    dialled: Option<(NodeId, Verdict)>,
}

impl MemberVerifier {
    fn verify(&self, certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        self.judge(certificate, others).map(drop).map_err(|refusal| {
            if let Some((_, verdict)) = &self.dialled {
                // The first reason stands; a handshake asks once.
                let _ = verdict.set(refusal);
            }
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
        })
    }

    fn judge(&self, certificate: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<Signer, Refusal> {
        let signer = identity::member(&self.keys, certificate, others)?;
        match self.dialled {
            Some((expected, _)) if expected != signer.node() => {
                Err(Refusal::Another { expected, found: signer.node() })
            }
            _ => Ok(signer),
        }
    }

    /// Checks the handshake's signature against the very key whose tag was checked, so that two readings of one
    /// certificate cannot name two keys.
    fn verify_handshake(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if signature.scheme != SignatureScheme::ED25519 {
            return Err(CertificateError::BadEncoding.into());
        }
        let signer = identity::claim(certificate).map_err(|_| CertificateError::BadEncoding)?;
        let spki = rustls::sign::public_key_to_spki(&alg_id::ED25519, signer.public_key);
        verify_tls13_signature_with_raw_key(message, &spki, signature, &self.provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for MemberVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_handshake(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for MemberVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls13RequiredForQuic.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify_handshake(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}
