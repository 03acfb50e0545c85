//! The server's end of TLS towards clients: certificates out of PEM or DER, and handshakes with a deadline.
//!
//! Not here: who gets which certificate.

use std::sync::Arc;
use std::time::Duration;

use rustls::server::Acceptor;
use rustls::{ServerConfig, crypto::aws_lc_rs};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::LazyConfigAcceptor;

pub(super) use tokio_rustls::server::TlsStream;

/// How long a client may take for its handshake; it is as patient as with request headers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a client inside a tunnel may speak, the better first.
const INSIDE: &[&[u8]] = &[HTTP_2, b"http/1.1"];

/// What the listener itself offers. Not HTTP/2: Go's clients offer it to a proxy that is spoken to over TLS, and send
/// CONNECT as HTTP/1.1 whatever was agreed.
const LISTENER: &[&[u8]] = &[b"http/1.1"];

const HTTP_2: &[u8] = b"h2";

/// A certificate chain and its key, as the configuration names them.
#[derive(Clone)]
pub struct PemPair {
    /// One or more certificates, the server's own first.
    pub certificate: Vec<u8>,
    /// Its private key.
    pub key: Vec<u8>,
}

/// Why there is no TLS connection, or cannot be any.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate file holds no certificate that can be read. The operator's mistake.
    #[error("no certificate can be read")]
    Certificate,
    /// The key file holds no private key that can be read. The operator's mistake.
    #[error("no private key can be read")]
    Key,
    /// Certificate and key are no pair, or of a kind that cannot be used. The operator's mistake.
    #[error("certificate and key cannot be used together")]
    Pair(#[source] rustls::Error),
    /// The client asked for another host than its tunnel leads to. The client's mistake.
    #[error("the client asked for {0:?}, which its tunnel does not lead to")]
    OtherName(String),
    /// The handshake failed; often because the client does not trust the certificate.
    #[error("the handshake failed")]
    Handshake(#[source] std::io::Error),
    /// The client did not finish its handshake in time.
    #[error("the handshake was not finished in time")]
    TimedOut,
}

/// What the agent shows to clients: a certificate chain and its key.
#[derive(Clone)]
pub(super) struct Identity(Arc<ServerConfig>);

impl Identity {
    /// The listener's own, out of PEM.
    pub(super) fn of_listener(pair: &PemPair) -> Result<Self, TlsError> {
        Self::from_pem(pair, LISTENER)
    }

    /// For what is inside tunnels, out of PEM.
    pub(super) fn inside(pair: &PemPair) -> Result<Self, TlsError> {
        Self::from_pem(pair, INSIDE)
    }

    /// For what is inside tunnels, out of DER certificates and a PKCS #8 key.
    pub(super) fn inside_from_der(chain: Vec<CertificateDer<'static>>, pkcs8: Vec<u8>) -> Result<Self, TlsError> {
        Self::new(chain, PrivatePkcs8KeyDer::from(pkcs8).into(), INSIDE)
    }

    fn from_pem(pair: &PemPair, protocols: &[&[u8]]) -> Result<Self, TlsError> {
        let chain = certificates(&pair.certificate)?;
        let key = PrivateKeyDer::from_pem_slice(&pair.key).map_err(|_| TlsError::Key)?;
        Self::new(chain, key, protocols)
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        protocols: &[&[u8]],
    ) -> Result<Self, TlsError> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
            .map_err(TlsError::Pair)?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Self(Arc::new(config)))
    }

    /// Takes a client's handshake. A client that names a host must name `expected`, where that is given.
    pub(super) async fn accept<I>(&self, io: I, expected: Option<&str>) -> Result<TlsStream<I>, TlsError>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let handshake = async {
            let hello = LazyConfigAcceptor::new(Acceptor::default(), io).await.map_err(TlsError::Handshake)?;
            if let (Some(expected), Some(name)) = (expected, hello.client_hello().server_name())
                && !name.eq_ignore_ascii_case(expected)
            {
                return Err(TlsError::OtherName(name.to_owned()));
            }
            hello.into_stream(Arc::clone(&self.0)).await.map_err(TlsError::Handshake)
        };
        tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| TlsError::TimedOut)?
    }

    #[cfg(test)]
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Whether client and agent have agreed on HTTP/2.
pub(super) fn speaks_http2<I>(stream: &TlsStream<I>) -> bool {
    stream.get_ref().1.alpn_protocol() == Some(HTTP_2)
}

/// All certificates of a PEM file, at least one.
pub(super) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| TlsError::Certificate)?;
    if chain.is_empty() { Err(TlsError::Certificate) } else { Ok(chain) }
}
