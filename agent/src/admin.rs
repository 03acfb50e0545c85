//! The admin port: liveness, readiness, metrics, and what came from where. Read-only, loopback by default (S19).

pub mod metrics;
pub mod server;

pub use self::server::{Admin, Readiness};
