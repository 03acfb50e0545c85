//! HTTP as a registry's client speaks it, by whatever way: one request per connection, redirects of reads followed.
//!
//! Nothing is retried and nothing is pooled, so that a verdict is about one answer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use rustls_pki_types::pem::PemObject as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Longer than anything takes that works, a registry that commits an upload included.
const STALL_MAX: Duration = Duration::from_secs(60);

/// The longest head of an answer to CONNECT.
const CONNECT_HEAD_BYTES_MAX: usize = 16 << 10;

/// The longest body that is collected: more than a manifest may have, and any blob that the suite pushes.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Redirects that are followed. Registries use one, those behind a global load balancer two.
const REDIRECTS_MAX: usize = 5;

/// A registry, and the way there.
#[derive(Clone)]
pub struct Target {
    /// `http://host[:port]` or `https://host[:port]`.
    pub base: Uri,
    /// `http://host:port` of a proxy: it is given the whole URL where `base` is `http`, and CONNECT where it is `https`.
    pub proxy: Option<Uri>,
    /// Says to a mirror which registry is meant, as containerd does. Every request then goes to `base`, uploads too, although a
    /// registry names itself in their `Location`.
    pub namespace: Option<String>,
    /// Whom to trust.
    pub tls: Arc<rustls::ClientConfig>,
    /// Sent with every request to `base`.
    pub authorization: Option<HeaderValue>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("base", &self.base).field("proxy", &self.proxy).finish_non_exhaustive()
    }
}

/// A request's body.
#[derive(Clone, Debug, Default)]
pub(super) enum Sent {
    #[default]
    Nothing,
    /// With a length.
    Whole(Bytes),
    /// Without: in chunks.
    Streamed(Vec<Bytes>),
}

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) method: Method,
    /// A path with an optional query, or an absolute URL that the registry gave.
    pub(super) to: String,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Sent,
}

/// One answer, all of it.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// Whether the connection broke before the end of the body.
    pub(super) cut: bool,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// TLS that trusts the certificates of a PEM file, or this host's where there is none.
pub fn trust(pem: Option<&[u8]>) -> Result<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    match pem {
        Some(pem) => {
            for certificate in rustls_pki_types::CertificateDer::pem_slice_iter(pem) {
                roots.add(certificate.context("a certificate that cannot be read")?)?;
            }
            ensure!(!roots.is_empty(), "no certificate in the file");
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = config.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

impl Target {
    /// A registry that is asked directly.
    #[must_use]
    pub fn direct(base: Uri, tls: Arc<rustls::ClientConfig>) -> Self {
        Self { base, proxy: None, namespace: None, tls, authorization: None }
    }

    /// Sends a request and collects the answer. Where a GET or HEAD is redirected, to an object store say, the answer is that of
    /// where it leads to, and credentials do not go there.
    pub(super) async fn send(&self, ask: &Ask) -> Result<Reply> {
        let mut url = self.url(&ask.to)?;
        for _ in 0..=REDIRECTS_MAX {
            let reply = self.exchange(ask, &url).await?;
            let reads = ask.method == Method::GET || ask.method == Method::HEAD;
            if !(reads && matches!(reply.status.as_u16(), 301 | 302 | 303 | 307 | 308)) {
                return Ok(reply);
            }
            let location = reply.headers.get(LOCATION).context("a redirect to nowhere")?.to_str()?;
            url = if location.starts_with('/') { on(&url, location)? } else { location.parse()? };
        }
        bail!("redirected more than {REDIRECTS_MAX} times")
    }

    /// The URL that is asked for: a path of the base, or what an upload's `Location` says.
    fn url(&self, to: &str) -> Result<Uri> {
        if to.starts_with('/') {
            return on(&self.base, &self.with_namespace(to));
        }
        let url: Uri = to.parse().with_context(|| format!("{to} is no URL"))?;
        let path = url.path_and_query().map_or("/", |path| path.as_str());
        if self.namespace.is_some() { on(&self.base, &self.with_namespace(path)) } else { Ok(url) }
    }

    fn with_namespace(&self, path: &str) -> String {
        match &self.namespace {
            Some(name) => format!("{path}{}ns={name}", if path.contains('?') { '&' } else { '?' }),
            None => path.to_owned(),
        }
    }

    async fn exchange(&self, ask: &Ask, url: &Uri) -> Result<Reply> {
        let exchange = async {
            let (stream, absolute) = self.connect(url).await?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let request = self.request(ask, url, absolute)?;
            let answered = async {
                let (head, mut body) = sender.send_request(request).await?.into_parts();
                let mut bytes = BytesMut::new();
                let mut cut = false;
                while let Some(frame) = body.frame().await {
                    match frame.map(Frame::into_data) {
                        Ok(Ok(more)) => bytes.extend_from_slice(&more),
                        Ok(Err(_trailers)) => {}
                        Err(_) => cut = true,
                    }
                    ensure!(bytes.len() <= BODY_BYTES_MAX, "more than {BODY_BYTES_MAX} bytes");
                }
                Ok(Reply { status: head.status, headers: head.headers, body: bytes.freeze(), cut })
            };
            tokio::pin!(answered);
            // The connection moves the bytes; its error is the answer's as well.
            tokio::select! {
                reply = &mut answered => reply,
                _ = connection => answered.await,
            }
        };
        let answered = tokio::time::timeout(STALL_MAX, exchange).await;
        answered
            .with_context(|| format!("nothing came for {STALL_MAX:?}"))?
            .with_context(|| format!("cannot ask {url}"))
    }

    fn request(&self, ask: &Ask, url: &Uri, absolute: bool) -> Result<Request<BoxBody<Bytes, std::io::Error>>> {
        let body = match &ask.body {
            Sent::Nothing => Full::default().map_err(|never| match never {}).boxed(),
            Sent::Whole(bytes) => Full::new(bytes.clone()).map_err(|never| match never {}).boxed(),
            Sent::Streamed(parts) => {
                let frames = parts.clone().into_iter().map(|part| Ok(Frame::data(part)));
                StreamBody::new(stream::iter(frames)).boxed()
            }
        };
        let mut request = Request::new(body);
        *request.method_mut() = ask.method.clone();
        let path = url.path_and_query().map_or("/", |path| path.as_str());
        *request.uri_mut() = if absolute { url.clone() } else { path.parse()? };
        let host = url.authority().context("a URL without a host")?.as_str();
        let headers = request.headers_mut();
        headers.insert(HOST, HeaderValue::try_from(host)?);
        if let Some(authorization) = self.authorization.as_ref().filter(|_| url.authority() == self.base.authority()) {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        // A POST or PUT without a body says so.
        if matches!(ask.body, Sent::Nothing) && !matches!(ask.method, Method::GET | Method::HEAD) {
            headers.insert(hyper::header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        for (name, value) in &ask.headers {
            headers.append(HeaderName::from_static(name), HeaderValue::try_from(value)?);
        }
        Ok(request)
    }

    /// A connection that takes the request, and whether it wants the whole URL.
    async fn connect(&self, url: &Uri) -> Result<(Box<dyn Io>, bool)> {
        let secure = match url.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => bail!("{url} is neither http nor https"),
        };
        let Some(proxy) = &self.proxy else {
            let stream = tcp(url).await?;
            return Ok((if secure { self.secure(stream, url).await? } else { Box::new(stream) }, false));
        };
        let mut stream = tcp(proxy).await?;
        if !secure {
            return Ok((Box::new(stream), true));
        }
        let to = format!("{}:{}", url.host().unwrap_or_default(), port(url));
        stream.write_all(format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n").as_bytes()).await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            ensure!(head.len() < CONNECT_HEAD_BYTES_MAX, "the answer to CONNECT does not end");
            // Byte by byte: what follows the head belongs to somebody else.
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8_lossy(&head);
        ensure!(head.split(' ').nth(1) == Some("200"), "CONNECT {to} was answered {head:?}");
        Ok((self.secure(stream, url).await?, false))
    }

    async fn secure(&self, stream: TcpStream, url: &Uri) -> Result<Box<dyn Io>> {
        let host = url.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host)?;
        Ok(Box::new(TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await?))
    }
}

async fn tcp(url: &Uri) -> Result<TcpStream> {
    let host = url.host().context("a URL without a host")?.trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, port(url))).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn port(url: &Uri) -> u16 {
    url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 })
}

/// Another path of the same host.
fn on(url: &Uri, path: &str) -> Result<Uri> {
    let mut parts = url.clone().into_parts();
    parts.path_and_query = Some(path.parse().with_context(|| format!("{path} is no path"))?);
    Ok(Uri::from_parts(parts)?)
}
