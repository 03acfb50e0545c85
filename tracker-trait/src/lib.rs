//! The vocabulary of the swarm and the five-method [`Tracker`].
//!
//! In Dragonfly a tracker call names the supernode to ask. Here the `node` argument names the task's *home*, an
//! ordinary agent that every member computes for itself, so the interface survives and the supernode does not.
//!
//! Read in this order: [`digest`] and [`task`] (what is moved), [`piece`] (in what portions), [`peer`] (between whom),
//! [`request`] (what is said to a home), [`event`] (what is said to everybody), [`error`]. [`memory`] is the in-memory
//! twin, [`conformance`] the suite that every implementation passes.
//!
//! Not here: sockets, encodings, keys, clocks. Wire formats are derived with serde and written by the agent.

pub mod conformance;
pub mod digest;
pub mod error;
pub mod event;
pub mod memory;
pub mod pause;
pub mod peer;
pub mod piece;
pub mod request;
pub mod task;

pub use digest::{Digest, DigestError};
pub use error::TrackerError;
pub use event::{Event, EventBody};
pub use pause::{Added, Pause, RegistryTag};
pub use peer::{NodeId, Role};
pub use piece::{Bitmap, PieceDigest, PieceIndex, PieceProof, PieceRange, PieceSize, Signer};
pub use request::{
    ClientErrorRequest, ErrorKind, Lease, LeaseId, LeaseState, PieceSource, PullPieceRequest, PullPieceResponse,
    RegisterRequest, RegisterResponse, ReportPieceRequest, ReportPieceResponse, ServiceDownRequest,
};
pub use task::{Geometry, GeometryError, PieceSizeRule, TaskId};

use std::future::Future;

/// What a downloader says to the home of a task.
///
/// The caller's own identity is not an argument: it is the authenticated end of whatever carries the call, so nobody
/// can register, report or resign for another. `node` is the member to ask; an implementation answers locally when
/// that is the caller itself.
///
/// Every call may fail with [`TrackerError`]; none of them is needed for a download to finish, since a downloader
/// without a home goes to the registry by itself.
pub trait Tracker: Send + Sync {
    /// Announces the caller as a downloader of a task and learns what the home knows of it.
    fn register(
        &self,
        node: NodeId,
        request: RegisterRequest,
    ) -> impl Future<Output = Result<RegisterResponse, TrackerError>> + Send;

    /// Asks what to do next: fetch a leased run from the registry, ask a holder, wait, or stop because all is there.
    fn pull_piece(
        &self,
        node: NodeId,
        request: PullPieceRequest,
    ) -> impl Future<Output = Result<PullPieceResponse, TrackerError>> + Send;

    /// Tells the home that the caller holds pieces, which renews the lease that they were fetched under.
    fn report_piece(
        &self,
        node: NodeId,
        request: ReportPieceRequest,
    ) -> impl Future<Output = Result<ReportPieceResponse, TrackerError>> + Send;

    /// Withdraws the caller from a task: it is nobody's neighbour or source for it any more, its leases are free.
    fn service_down(
        &self,
        node: NodeId,
        request: ServiceDownRequest,
    ) -> impl Future<Output = Result<(), TrackerError>> + Send;

    /// Reports that another member failed the caller: lacked what it promised, served something wrong, or was silent.
    fn report_error(
        &self,
        node: NodeId,
        request: ClientErrorRequest,
    ) -> impl Future<Output = Result<(), TrackerError>> + Send;
}
