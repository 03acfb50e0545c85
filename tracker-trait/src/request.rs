//! What a downloader says to the home of a task, and what the home answers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pause::{Added, Pause, RegistryTag};
use crate::peer::NodeId;
use crate::piece::{Bitmap, PieceIndex, PieceRange};
use crate::task::{Geometry, TaskId};

/// "I want this task", or "I hold this task".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterRequest {
    /// The task.
    pub task: TaskId,
    /// How the caller cuts the blob, if it knows its length.
    pub geometry: Option<Geometry>,
    /// What the caller holds already; `None` is nothing.
    pub have: Option<Bitmap>,
    /// Whether the caller has another home of this task, or had one: leases of that may be running, so a home that hears of
    /// the task in this way waits for those who hold them before it lends anything but what a reader waits for.
    pub moved: bool,
    /// What the caller is fetching from the registry at this moment, under another home's leases or none: the pieces that have
    /// not arrived. At most [`Self::RUNS_MAX`].
    pub runs: Vec<PieceRange>,
}

impl RegisterRequest {
    /// Bound on `runs`: what a downloader fetches at a time, and as much again.
    pub const RUNS_MAX: usize = 4;

    /// The first call of somebody who fetches nothing yet.
    #[must_use]
    pub fn new(task: TaskId, geometry: Option<Geometry>, have: Option<Bitmap>) -> Self {
        Self { task, geometry, have, moved: false, runs: Vec::new() }
    }
}

/// What the home knows of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterResponse {
    /// The task.
    pub task: TaskId,
    /// How the task is cut; `None` while nobody knows its length. Binding for the caller where it is given.
    pub geometry: Option<Geometry>,
    /// Members to exchange pieces with, at most a neighbourhood; never the caller.
    pub neighbours: Vec<NodeId>,
    /// Whether the caller shall tell the whole cluster, by gossip, that it has the task.
    pub advertise: bool,
    /// The leases under which the caller's `runs` go on, each for the beginning of one of them: up to the first piece that
    /// somebody else fetches or holds. A run without one shall stop.
    pub leases: Vec<Lease>,
}

/// "What shall I do next?"
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullPieceRequest {
    /// The task.
    pub task: TaskId,
    /// What the caller holds; `None` is nothing.
    pub have: Option<Bitmap>,
    /// Pieces that the caller wants and that no neighbour of its offers; at most [`Self::LACKING_MAX`]. The `urgent` one is among
    /// them also where a single neighbour offers it and does not give it.
    pub lacking: Vec<PieceRange>,
    /// The piece that a client of the caller is waiting for at this moment, if the wait has used up its budget.
    pub urgent: Option<PieceIndex>,
    /// Whether the caller can fetch from the registry: it has a free request, and its client's credentials are good.
    pub can_fetch: bool,
    /// The registry that the caller would ask, said where the home has told of a pause that is not meant for it.
    pub registry: Added<RegistryTag>,
}

impl PullPieceRequest {
    /// Bound on `lacking`: what is beyond waits for the next call.
    pub const LACKING_MAX: usize = 64;
}

/// The home's answer to [`PullPieceRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPieceResponse {
    /// Fetch these pieces from the registry; nobody else will.
    Lease(Lease),
    /// Ask these members for pieces that were lacking.
    Pieces(Vec<PieceSource>),
    /// Nothing yet: others are fetching. Ask again after `retry_after`.
    Wait {
        /// When to ask again, if nothing has come by itself.
        retry_after: Duration,
        /// Members to exchange pieces with meanwhile.
        neighbours: Vec<NodeId>,
        /// The registry that nobody is to ask before this time is over. Whoever asks another says which.
        paused: Added<Pause>,
    },
    /// The caller holds everything.
    Finish {
        /// The cut of the finished task.
        geometry: Geometry,
    },
}

/// Names a lease at the home that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LeaseId(pub u64);

/// The right, and the duty, to fetch a run of pieces from the registry.
///
/// It lapses when no piece of it is reported for `lapse`; what is left of it then goes to another member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The lease's name, unique at its home.
    pub id: LeaseId,
    /// The pieces.
    pub pieces: PieceRange,
    /// How long it lives without progress.
    pub lapse: Duration,
}

/// A member that has, or is about to have, pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceSource {
    /// The member.
    pub node: NodeId,
    /// What it has.
    pub pieces: PieceRange,
}

/// "I hold these pieces now."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportPieceRequest {
    /// The task.
    pub task: TaskId,
    /// The lease that the pieces were fetched under, if one was.
    pub lease: Option<LeaseId>,
    /// The pieces; empty with a lease renews it (bytes came, a piece is not full yet).
    pub pieces: Vec<PieceRange>,
    /// Whether the caller gives the rest of the lease back, for example since its credentials are not good enough.
    pub release: bool,
    /// It gives the lease back because the registry has asked to be left alone. Believed of whoever has that lease.
    pub pause: Added<Pause>,
}

/// The home's answer to [`ReportPieceRequest`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportPieceResponse {
    /// Whether the lease is still the caller's.
    pub lease: LeaseState,
    /// Whether the caller shall tell the whole cluster, by gossip, that it has the task.
    pub advertise: bool,
}

/// What became of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseState {
    /// The caller named none.
    None,
    /// It is the caller's, and renewed.
    Held,
    /// It is over: every piece arrived, it was given back, or it lapsed and others have the rest. Stop fetching.
    Over,
}

/// "I leave this task": the caller's service for it is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceDownRequest {
    /// The task.
    pub task: TaskId,
}

/// "This member failed me."
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientErrorRequest {
    /// The task.
    pub task: TaskId,
    /// The member that failed.
    pub peer: NodeId,
    /// The pieces that were asked for.
    pub pieces: Vec<PieceRange>,
    /// How it failed.
    pub kind: ErrorKind,
}

/// How a member failed another. The first two are Dragonfly v1's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ErrorKind {
    /// It does not have what it offered (v1: `FILE_NOT_EXIST`).
    NotFound,
    /// What it sent does not match its digest or signature (v1: `FILE_MD5_NOT_MATCH`).
    Mismatch,
    /// It could not be reached, broke off or did not answer in time.
    Unreachable,
}
