//! Plugs the real parts into what the proxy needs: registries, the judgement on who may read what, blobs, what tags mean.

use std::sync::Arc;
use std::time::Duration;

use darter_tracker::{Digest, TaskId};
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use tokio::net::TcpStream;

use crate::gossip::tracker::tags::TagHomes;
use crate::proxy::authorize::{self, Authorizer, Repository};
use crate::proxy::body::ClientBody;
use crate::proxy::seam::{
    self, Accepts, Authorize, Blobs, Descriptor, Fault, Meaning, Origin, TagId, TagNews, Verdict,
};
use crate::pull::{BlobRequest, BlobStream, Client, Flights, PullError};
use crate::source::registry::{BlobOrigin, OriginError, ProxyBody, Upstream, UpstreamError};

impl Origin for Upstream {
    type Error = UpstreamError;

    async fn send(&self, request: Request<ClientBody>) -> Result<Response<Incoming>, UpstreamError> {
        Self::send(self, request.map(ProxyBody::new)).await
    }

    async fn dial(&self, host: &str, port: u16) -> Result<TcpStream, UpstreamError> {
        Self::dial(self, host, port).await
    }

    fn fault(error: &UpstreamError) -> Fault {
        if error.is_refused() {
            Fault::Forbidden
        } else if error.is_down() {
            Fault::Unreachable
        } else {
            Fault::Broken
        }
    }
}

impl Authorize for Authorizer {
    async fn blob(&self, origin: &BlobOrigin, repository: &Repository, digest: &Digest) -> Verdict {
        match Self::blob(self, origin, repository, digest).await {
            authorize::Verdict::Granted { length, headers } => Verdict::Granted { length, headers },
            authorize::Verdict::Refused(answer) => Verdict::Refused(answer),
            authorize::Verdict::PassThrough => Verdict::PassThrough,
            // An address that the agent does not connect to: passing the request on is what says so to the client.
            authorize::Verdict::Unavailable(error) if is_forbidden(&error) => Verdict::PassThrough,
            authorize::Verdict::Unavailable(error) => Verdict::Unavailable(Box::new(error)),
        }
    }

    fn saw_manifest(
        &self,
        repository: &Repository,
        client: &HeaderMap,
        content_type: &str,
        body: &[u8],
    ) -> Vec<Descriptor> {
        Self::saw_manifest(self, repository, client, content_type, body).layers().collect()
    }

    fn saw_manifest_head(&self, repository: &Repository, client: &HeaderMap, answer: &HeaderMap) {
        Self::saw_manifest_head(self, repository, client, answer);
    }

    fn forget(&self, repository: &Repository, digest: &Digest) {
        Self::forget(self, repository, digest);
    }

    fn held_manifest(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        digest: &Digest,
        content_type: &str,
        body: &[u8],
    ) -> Vec<Descriptor> {
        Self::held_manifest(self, origin, repository, digest, content_type, body).layers().collect()
    }
}

fn is_forbidden(error: &OriginError) -> bool {
    matches!(error, OriginError::Unreachable(error) if error.is_refused())
}

impl seam::TagHomes for TagHomes {
    fn ask(&self, tag: TagId, accepts: Accepts, fresh: Duration) -> BoxFuture<'_, Option<(Meaning, Duration)>> {
        Box::pin(Self::ask(self, tag, accepts, fresh))
    }

    fn tell(&self, tag: TagId, news: TagNews) -> BoxFuture<'_, ()> {
        Box::pin(Self::tell(self, tag, news))
    }
}

/// The pulls of this node, as the proxy sees them.
#[derive(Debug)]
pub struct Pulls(pub Arc<Flights>);

impl Blobs for Pulls {
    type Error = PullError;
    type Body = BlobStream;

    async fn open(&self, request: BlobRequest) -> Result<BlobStream, PullError> {
        self.0.open(request).await
    }

    fn expect(&self, client: Client, layers: &[Descriptor]) {
        let layers = layers.iter().map(|layer| (TaskId::blob(layer.digest), layer.size)).collect();
        self.0.expect(client, layers);
    }

    fn is_wrong(error: &PullError) -> bool {
        *error == PullError::Poisoned
    }
}
