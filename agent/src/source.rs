//! Where pieces come from when they are not on the disk: the registry, and other members.

pub mod peer;
pub mod registry;
pub mod tally;
