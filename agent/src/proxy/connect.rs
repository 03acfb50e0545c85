//! CONNECT: a blind tunnel, or one whose TLS ends here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::io::InspectReader;
use tokio_util::sync::CancellationToken;

use super::Proxy;
use super::address::HostPort;
use super::body::{AnswerBody, ByteCounter};
use super::listener::Arrival;
use super::respond::{self, Refusal};
use super::seam::{Authorize, Blobs, Fault, Origin};
use super::tls::speaks_http2;

/// How long a tunnel's far end may take to accept, as in Dragonfly v1.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a tunnel may carry nothing either way. Idle connections of Docker and containerd last a minute or two;
/// beyond that, one end is gone without a word and would hold its place for ever.
const TUNNEL_IDLE_TIMEOUT: Duration = Duration::from_secs(600);

/// The port that clients of this machine may tunnel to at any host.
const HTTPS_PORT: u16 = 443;

/// What a client's connection becomes after a CONNECT.
pub(super) enum Upgrade {
    /// A blind tunnel to a connection that is open already.
    Tunnel(OnUpgrade, TcpStream),
    /// TLS that ends here, for that host.
    Hijack(OnUpgrade, HostPort),
}

impl<O: Origin, A: Authorize, B: Blobs> Proxy<O, A, B> {
    /// Answers a CONNECT. The far end of a blind tunnel is reached first, so that a failure can still be said in HTTP.
    pub(super) async fn connect(
        &self,
        mut request: Request<Incoming>,
        arrival: &Arrival,
    ) -> Result<Response<AnswerBody>, Refusal> {
        let Some(slot) = &arrival.upgrade else { return Err(Refusal::Malformed("a tunnel has no tunnels inside")) };
        // A URL has an authority too, and is not what a tunnel is asked for by.
        let authority = request.uri().authority().filter(|_| request.uri().scheme().is_none());
        let authority = authority.map_or("", |authority| authority.as_str());
        let address =
            HostPort::parse(authority, None).map_err(|_| Refusal::Malformed("CONNECT names a host and a port"))?;
        let upgrade = hyper::upgrade::on(&mut request);
        if self.hijack.as_ref().is_some_and(|hijack| hijack.covers(&address)) {
            slot.leave(Upgrade::Hijack(upgrade, address));
            return Ok(respond::connected());
        }
        let from_here = arrival.trusted && address.port() == HTTPS_PORT;
        if !from_here && !self.names(&address) {
            return Err(Refusal::Forbidden { host: address.to_string() });
        }
        let far = self.dial(&address).await?;
        slot.leave(Upgrade::Tunnel(upgrade, far));
        Ok(respond::connected())
    }

    async fn dial(&self, address: &HostPort) -> Result<TcpStream, Refusal> {
        let failed = |fault, source| Refusal::Upstream { host: address.to_string(), fault, source };
        match timeout(DIAL_TIMEOUT, self.origin.dial(address.host(), address.port())).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(failed(O::fault(&error), error.into())),
            Err(late) => Err(failed(Fault::Unreachable, late.into())),
        }
    }

    /// Goes on with a connection after its CONNECT was answered.
    pub(super) async fn upgraded(self: &Arc<Self>, upgrade: Upgrade, trusted: bool, stop: &CancellationToken) {
        let (upgrade, next) = match upgrade {
            Upgrade::Tunnel(upgrade, far) => (upgrade, Ok(far)),
            Upgrade::Hijack(upgrade, host) => (upgrade, Err(host)),
        };
        let client = match upgrade.await {
            Ok(client) => TokioIo::new(client),
            Err(error) => {
                tracing::debug!(%error, "a client left before its tunnel was made");
                return;
            }
        };
        match next {
            Ok(far) => tunnel(client, far, &self.metrics.passed_bytes).await,
            Err(host) => self.hijacked(client, host, trusted, stop).await,
        }
    }

    async fn hijacked<I>(self: &Arc<Self>, client: I, host: HostPort, trusted: bool, stop: &CancellationToken)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // A tunnel is only marked for this where something is hijacked.
        let Some(hijack) = &self.hijack else { return };
        match hijack.accept(client, host.host()).await {
            Ok(client) => {
                let arrival = Arrival { trusted, hijacked: Some(host), upgrade: None };
                if speaks_http2(&client) {
                    self.streams(client, arrival, stop).await;
                } else {
                    self.requests(client, arrival, stop).await;
                }
            }
            Err(error) => {
                self.metrics.client_refusals.inc();
                tracing::info!(%host, error = %respond::chain(&error), "a client's TLS could not be ended here");
            }
        }
    }
}

/// Copies both ways until both ends are done, or nothing moves any more. Each end is closed as the other closes it.
async fn tunnel<I>(client: I, far: TcpStream, passed: &ByteCounter)
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Moved::new();
    let mut client = InspectReader::new(client, |_: &[u8]| moved.note());
    let mut far = InspectReader::new(far, |bytes: &[u8]| {
        moved.note();
        passed.inc_by(bytes.len() as u64);
    });
    tokio::select! {
        ended = copy_bidirectional(&mut client, &mut far) => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a tunnel broke");
            }
        }
        () = moved.idle() => tracing::debug!("a tunnel was idle for too long"),
    }
}

/// When a tunnel last carried something.
struct Moved {
    start: Instant,
    /// Milliseconds after `start`.
    last: AtomicU64,
}

impl Moved {
    fn new() -> Self {
        Self { start: Instant::now(), last: AtomicU64::new(0) }
    }

    fn note(&self) {
        let millis = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(millis, Ordering::Relaxed);
    }

    /// Ends when nothing moved for [`TUNNEL_IDLE_TIMEOUT`].
    async fn idle(&self) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
            let deadline = self.start + last + TUNNEL_IDLE_TIMEOUT;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}
