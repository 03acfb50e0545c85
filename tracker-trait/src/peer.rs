//! Who takes part.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A member of the cluster: the first 16 bytes of the BLAKE3 hash of its public key.
///
/// Made anew at each start of an agent, so a restarted node is another member and old promises do not bind it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId([u8; Self::BYTES]);

impl NodeId {
    /// Length of an id: long enough that nobody finds a second key for it, short enough for gossip packets.
    pub const BYTES: usize = 16;

    /// The id of the holder of `public_key`.
    #[must_use]
    pub fn of_key(public_key: &[u8; 32]) -> Self {
        let mut id = [0; Self::BYTES];
        id.copy_from_slice(&blake3::hash(public_key).as_bytes()[..Self::BYTES]);
        Self(id)
    }

    /// An id from its raw bytes, for tests and simulations.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// The raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Eight digits tell the members of a cluster apart in a log line.
        for byte in &self.0[..4] {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a member is there for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// An agent beside a container runtime.
    #[default]
    Node,
    /// A stable member that others bootstrap from and that is preferred as a home.
    Seed,
}
