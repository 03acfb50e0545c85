//! TLS towards registries: the host's own roots and, for a configured registry, its private CA beside them.
//!
//! Every connection is verified: chain, validity and name. There is no switch to turn that off (S3); a registry without
//! TLS is configured as such and gets no TLS at all.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{ATTEMPT_TIMEOUT, DialError, Dialer, HostPattern};

/// Bytes of a CA file that are read at most; a bundle of all public roots has a quarter of that.
const CA_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Why a CA file cannot be used. The operator's mistake; nothing started.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is larger than any bundle of certificates.
    #[error("{path} is larger than {CA_FILE_BYTES_MAX} bytes")]
    Large {
        /// Which file.
        path: PathBuf,
    },
    /// It holds no certificate in PEM.
    #[error("{path} holds no certificate")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A certificate of it is malformed.
    #[error("{path} holds a certificate that is malformed")]
    Malformed {
        /// Which file.
        path: PathBuf,
    },
    /// The crypto provider offers no TLS version that is known here.
    #[error("TLS cannot be set up")]
    Provider(#[source] rustls::Error),
}

/// What TLS connections are made with, for all registries.
pub struct RegistryTls {
    plain: Arc<ClientConfig>,
    private: Vec<(HostPattern, Arc<ClientConfig>)>,
}

impl RegistryTls {
    /// Loads the host's roots, of which there may be none, and the CA files.
    ///
    /// # Errors
    /// All that is wrong with any of the CA files.
    pub fn load<'a>(ca_files: impl IntoIterator<Item = (HostPattern, &'a Path)>) -> Result<Self, Vec<CaError>> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(native.certs);
        if roots.is_empty() {
            tracing::warn!("this host has no trusted root certificates: only registries with a ca_file are reachable");
        }
        let mut problems = Vec::new();
        let mut private = Vec::new();
        for (host, path) in ca_files {
            match with_ca(roots.clone(), path) {
                Ok(config) => private.push((host, config)),
                Err(problem) => problems.push(problem),
            }
        }
        // The more specific pattern wins.
        private.sort_by_key(|(host, _)| host.port().is_none());
        match config(roots) {
            Ok(plain) if problems.is_empty() => Ok(Self { plain, private }),
            Ok(_) => Err(problems),
            Err(problem) => {
                problems.push(problem);
                Err(problems)
            }
        }
    }

    /// Dials `host` and makes it prove that it is that host.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn connect(
        &self,
        dialer: &Dialer,
        host: &str,
        port: u16,
        receive_bytes: Option<u32>,
    ) -> Result<TlsStream<TcpStream>, DialError> {
        let failed = |source| DialError::Tls { host: host.to_owned(), source: Arc::new(source) };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
        let stream = dialer.dial(host, port, receive_bytes).await?;
        let config =
            self.private.iter().find(|(pattern, _)| pattern.matches(host, port)).map_or(&self.plain, |(_, own)| own);
        match timeout(ATTEMPT_TIMEOUT, TlsConnector::from(config.clone()).connect(name, stream)).await {
            Ok(Ok(stream)) => Ok(stream),
            // A reset or an end of file is the network's doing; anything else is what the handshake found.
            Ok(Err(error)) if error.kind() != io::ErrorKind::InvalidData => {
                Err(DialError::Connect { host: host.to_owned(), source: Arc::new(error) })
            }
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => {
                let source = Arc::new(io::ErrorKind::TimedOut.into());
                Err(DialError::Connect { host: host.to_owned(), source })
            }
        }
    }
}

fn with_ca(mut roots: RootCertStore, path: &Path) -> Result<Arc<ClientConfig>, CaError> {
    let path = path.to_owned();
    let read = |path: &Path| -> io::Result<Option<Vec<u8>>> {
        if std::fs::metadata(path)?.len() > CA_FILE_BYTES_MAX { Ok(None) } else { std::fs::read(path).map(Some) }
    };
    let pem = match read(&path) {
        Ok(Some(pem)) => pem,
        Ok(None) => return Err(CaError::Large { path }),
        Err(source) => return Err(CaError::Read { path, source }),
    };
    let mut found = false;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        match certificate.map(|certificate| roots.add(certificate)) {
            Ok(Ok(())) => found = true,
            Ok(Err(_)) | Err(_) => return Err(CaError::Malformed { path }),
        }
    }
    if found { config(roots) } else { Err(CaError::Empty { path }) }
}

fn config(roots: RootCertStore) -> Result<Arc<ClientConfig>, CaError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(CaError::Provider)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A connection to a registry, with TLS or, where configured, without.
pub enum Link {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
