//! What the proxy needs of others, and no more: registries, a judgement on who may read what, blobs, and what tags mean.
//!
//! Not here: how any of it is done. The agent wires in the registry client, the authorizer and the pulls; tests wire
//! in stubs and small servers.

use std::time::Duration;

use bytes::Bytes;
pub use darter_swarm::tags::{Accepts, ManifestType, Meaning, TagId, TagNews, Tags as HeldTags};
use darter_tracker::Digest;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use tokio::net::TcpStream;

pub use super::authorize::Repository;
use super::body::{BoxError, ClientBody};
pub use super::manifest::Descriptor;
pub use crate::pull::{BlobRequest, Client};
pub use crate::source::registry::{BlobOrigin, Credential, strip_hop_by_hop};

/// Hosts outside: one request, one answer, nothing followed and nothing kept.
pub trait Origin: Send + Sync + 'static {
    /// Why a host did not answer.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Sends a request with an absolute URI and streams both bodies. Headers that belong to one connection are taken
    /// out on both ways, the host is the URI's, and the policy for the host decides about TLS.
    fn send(
        &self,
        request: Request<ClientBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, Self::Error>> + Send;

    /// Opens a connection for a tunnel, if the dial filter allows the address.
    fn dial(&self, host: &str, port: u16) -> impl Future<Output = Result<TcpStream, Self::Error>> + Send;

    /// Whose fault an error is, which is all that a client is told.
    fn fault(error: &Self::Error) -> Fault;
}

/// Whose fault it is that a host did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The client asked for an address that the agent does not connect to. Asking again changes nothing.
    Forbidden,
    /// The host cannot be reached, or took too long. May be retried.
    Unreachable,
    /// The host was reached and what it said is no use, an untrusted certificate for example.
    Broken,
}

/// Who may read which blob.
pub trait Authorize: Send + Sync + 'static {
    /// Whether the registry would give this client the blob, asking it where that is not known (D8).
    fn blob(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        digest: &Digest,
    ) -> impl Future<Output = Verdict> + Send;

    /// A manifest that the registry gave this client. What it lists, the client may read in that repository. Returns the
    /// layers, in the manifest's order.
    fn saw_manifest(
        &self,
        repository: &Repository,
        client: &HeaderMap,
        content_type: &str,
        body: &[u8],
    ) -> Vec<Descriptor>;

    /// What the registry said of a manifest to this client's HEAD or GET, with 200: which one it would give him.
    fn saw_manifest_head(&self, repository: &Repository, client: &HeaderMap, answer: &HeaderMap);

    /// A client has had this deleted, or tried to: what the registry said of it before counts no more.
    fn forget(&self, repository: &Repository, digest: &Digest);

    /// Like [`Self::saw_manifest`], for a manifest that came from the swarm after [`Authorize::blob`] granted it: what it
    /// lists is granted for as long as the manifest is, and no longer.
    fn held_manifest(
        &self,
        origin: &BlobOrigin,
        repository: &Repository,
        digest: &Digest,
        content_type: &str,
        body: &[u8],
    ) -> Vec<Descriptor>;
}

/// What the registry would say to a client that asks for a blob.
#[derive(Debug)]
pub enum Verdict {
    /// It would give it.
    Granted {
        /// Length of the blob in bytes.
        length: u64,
        /// Headers of the registry's answer, to answer the client with.
        headers: HeaderMap,
    },
    /// It would not, or wants credentials; its own answer, to be passed on.
    Refused(Response<Bytes>),
    /// It gives no length, or something else makes this none of the swarm's business.
    PassThrough,
    /// It could not be asked, and what is known of the client is not enough.
    Unavailable(BoxError),
}

/// The members that keep for the cluster what tags mean.
pub trait TagHomes: Send + Sync + 'static {
    /// What a tag means and how old the answer is, which is less than `fresh`. None within a short time if they do not know, or do
    /// not answer: then the registry is to be asked, and they are to be told.
    fn ask(&self, tag: TagId, accepts: Accepts, fresh: Duration) -> BoxFuture<'_, Option<(Meaning, Duration)>>;

    /// Tells them what has been learnt of a tag. Lost if they do not answer.
    fn tell(&self, tag: TagId, news: TagNews) -> BoxFuture<'_, ()>;
}

/// Blobs, from wherever they come.
pub trait Blobs: Send + Sync + 'static {
    /// Why there are no, or no more, bytes.
    type Error: std::error::Error + Send + Sync + 'static;
    /// The bytes in order, checked, exactly as many as the range has. Not polled means not read: it is a pull.
    type Body: Stream<Item = Result<Bytes, Self::Error>> + Send + 'static;

    /// Begins to deliver. As long as this, or the first item, fails, the client is served by the registry instead;
    /// except where the bytes are known to be [wrong](Self::is_wrong).
    fn open(&self, request: BlobRequest) -> impl Future<Output = Result<Self::Body, Self::Error>> + Send;

    /// The registry gave this client a manifest with these layers: it may ask for them soon.
    fn expect(&self, client: Client, layers: &[Descriptor]);

    /// Whether an error says that the blob's bytes do not match its digest, so that nobody is to have them unchecked.
    fn is_wrong(error: &Self::Error) -> bool;
}
