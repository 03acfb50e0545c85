//! The admin port: liveness, readiness, metrics, what came from where, and how the process was started. Read-only, loopback
//! by default (S19).

pub mod metrics;
mod process;
pub mod server;

pub use self::server::{Admin, Readiness};
