//! The keys of a cluster and of a node: one cluster secret is all the PKI there is.
//!
//! - [`ClusterKeys`] is the ring of shared secrets. From each it derives the keys that datagrams are sealed with and
//!   the key that members' tags are made with.
//! - [`NodeKey`] is one agent's own key pair, made at each start. Its [`Signer`] carries a tag, a MAC under the
//!   secret over key, cluster and epoch, so a newcomer is accepted before gossip has spread his name.
//!
//! Not here: randomness. The seed of a node key and the salt of a datagram key are handed in.

use std::fmt;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use aws_lc_rs::{aead, constant_time, hkdf, hmac};
use darter_tracker::{Event, Geometry, NodeId, PieceDigest, PieceIndex, PieceProof, Signer, TaskId};
use serde::{Deserialize, Serialize};

/// Bytes that a cluster secret has at the least: below this it could be guessed offline from one recorded datagram.
pub const SECRET_BYTES_MIN: usize = 32;

/// One shared secret and what is derived from it.
struct Secret {
    key_id: KeyId,
    datagrams: hkdf::Prk,
    tags: hmac::Key,
}

/// Names a secret of the ring in clear, so that a receiver picks the right one and tells another cluster from noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 4]);

/// Why a key ring cannot be built. The operator's mistake; nothing started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A ring without secrets would be a cluster that anybody can join.
    #[error("the secret file holds no secret")]
    Empty,
    /// A secret is too short to withstand guessing.
    #[error("secret {position} has {bytes} bytes, it needs {SECRET_BYTES_MIN}")]
    Short {
        /// Which secret, from 1.
        position: usize,
        /// Its length.
        bytes: usize,
    },
}

/// The shared secrets of a cluster. The first is used to send, all are accepted, so one can be rotated.
pub struct ClusterKeys {
    cluster: String,
    secrets: Vec<Secret>,
}

/// HKDF output sizes are types in the crypto library.
struct Bytes(usize);

impl hkdf::KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

fn expand<const N: usize>(prk: &hkdf::Prk, info: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    let filled = prk.expand(info, Bytes(N)).and_then(|okm| okm.fill(&mut out));
    // HKDF-SHA-256 gives up to 8160 bytes and N is at most 32.
    debug_assert!(filled.is_ok());
    out
}

impl ClusterKeys {
    /// The key ring of `cluster`.
    ///
    /// # Errors
    /// If there is no secret or one is shorter than [`SECRET_BYTES_MIN`].
    pub fn new(cluster: &str, secrets: &[impl AsRef<[u8]>]) -> Result<Self, KeyError> {
        if secrets.is_empty() {
            return Err(KeyError::Empty);
        }
        let mut ring = Vec::with_capacity(secrets.len());
        for (at, secret) in secrets.iter().enumerate() {
            let secret = secret.as_ref();
            if secret.len() < SECRET_BYTES_MIN {
                return Err(KeyError::Short { position: at + 1, bytes: secret.len() });
            }
            let root = hkdf::Salt::new(hkdf::HKDF_SHA256, cluster.as_bytes()).extract(secret);
            ring.push(Secret {
                key_id: KeyId(expand(&root, &[b"darter key id v1"])),
                datagrams: hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &expand::<32>(&root, &[b"darter datagrams v1"])),
                tags: hmac::Key::new(hmac::HMAC_SHA256, &expand::<32>(&root, &[b"darter member tag v1"])),
            });
        }
        Ok(Self { cluster: cluster.to_owned(), secrets: ring })
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// The id of the secret that is used to send.
    #[must_use]
    pub fn sending(&self) -> KeyId {
        self.secrets[0].key_id
    }

    /// The AEAD key for datagrams sealed under `key_id` and `salt`; `None` if the ring has no such secret.
    #[must_use]
    pub fn datagram_key(&self, key_id: KeyId, salt: &[u8; 16]) -> Option<aead::LessSafeKey> {
        let secret = self.secrets.iter().find(|secret| secret.key_id == key_id)?;
        let key: [u8; 32] = expand(&secret.datagrams, &[salt]);
        aead::UnboundKey::new(&aead::AES_256_GCM, &key).ok().map(aead::LessSafeKey::new)
    }

    /// Whether the key in `signer` was made by somebody who holds one of the secrets.
    #[must_use]
    pub fn accepts(&self, signer: &Signer) -> bool {
        self.secrets
            .iter()
            .any(|secret| constant_time::verify_slices_are_equal(&self.tag(secret, signer), &signer.tag).is_ok())
    }

    fn tag(&self, secret: &Secret, signer: &Signer) -> [u8; 16] {
        let mut context = hmac::Context::with_key(&secret.tags);
        context.update(&signer.public_key);
        context.update(&signer.epoch.to_le_bytes());
        context.update(self.cluster.as_bytes());
        let mut tag = [0; 16];
        tag.copy_from_slice(&context.sign().as_ref()[..16]);
        tag
    }
}

impl fmt::Debug for ClusterKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKeys({}, {} secrets)", self.cluster, self.secrets.len())
    }
}

/// One agent's key pair: its certificate, its name ([`NodeId`]) and its signature under pieces and events.
pub struct NodeKey {
    pair: Ed25519KeyPair,
    signer: Signer,
}

impl NodeKey {
    /// The key pair for `seed`, 32 random bytes, tagged for `epoch` as a member of the cluster.
    ///
    /// Returns `None` only if the crypto library refuses the seed, which it does for none of that length.
    #[must_use]
    pub fn new(keys: &ClusterKeys, seed: &[u8; 32], epoch: u64) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let public_key = pair.public_key().as_ref().try_into().ok()?;
        let mut signer = Signer { public_key, epoch, tag: [0; 16] };
        signer.tag = keys.tag(&keys.secrets[0], &signer);
        Some(Self { pair, signer })
    }

    /// The member that this key makes its holder.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.signer.node()
    }

    /// Public key, epoch and membership tag.
    #[must_use]
    pub fn signer(&self) -> Signer {
        self.signer
    }

    /// The private key as PKCS#8, for the TLS certificate.
    ///
    /// # Errors
    /// If the crypto library cannot encode it.
    pub fn pkcs8(&self) -> Result<Vec<u8>, aws_lc_rs::error::Unspecified> {
        Ok(self.pair.to_pkcs8v1()?.as_ref().to_vec())
    }

    /// Vouches for a piece that was fetched from the registry.
    #[must_use]
    pub fn sign_piece(&self, task: &TaskId, geometry: &Geometry, piece: PieceIndex, digest: PieceDigest) -> PieceProof {
        PieceProof::new(digest, self.signer, &self.sign(&piece_message(task, geometry, piece, &digest)))
    }

    /// Signs an event of this node.
    #[must_use]
    pub fn sign_event(&self, event: Event) -> SignedEvent {
        let (mut signature_r, mut signature_s) = ([0; 32], [0; 32]);
        let signature = self.sign(&event_message(&event));
        signature_r.copy_from_slice(&signature[..32]);
        signature_s.copy_from_slice(&signature[32..]);
        SignedEvent { event, signer: self.signer, signature_r, signature_s }
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.id())
    }
}

/// An event with its author's key, tag and signature: what gossip carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedEvent {
    /// The event.
    pub event: Event,
    /// The author's key.
    pub signer: Signer,
    signature_r: [u8; 32],
    signature_s: [u8; 32],
}

/// Why a proof or an event is not believed. Whoever sent it is to blame; it must not be stored or passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The key's tag was not made with the cluster's secret.
    #[error("the signer is not a member of the cluster")]
    NotAMember,
    /// The signature does not cover what it came with.
    #[error("the signature does not match")]
    Signature,
    /// The event names another author than the key that signed it.
    #[error("the event was signed by somebody else")]
    Author,
}

impl SignedEvent {
    /// Whether the event was made by the member it names.
    ///
    /// # Errors
    /// Says what does not fit; the event must be dropped.
    pub fn verify(&self, keys: &ClusterKeys) -> Result<(), ProofError> {
        if self.event.author != self.signer.node() || self.event.epoch != self.signer.epoch {
            return Err(ProofError::Author);
        }
        let mut signature = [0; 64];
        signature[..32].copy_from_slice(&self.signature_r);
        signature[32..].copy_from_slice(&self.signature_s);
        verify(keys, &self.signer, &event_message(&self.event), &signature)
    }
}

/// Whether `proof` was made by a member for this piece of this task.
///
/// # Errors
/// Says what does not fit; neither the proof nor the piece may be stored or passed on.
pub fn verify_piece(
    keys: &ClusterKeys,
    task: &TaskId,
    geometry: &Geometry,
    piece: PieceIndex,
    proof: &PieceProof,
) -> Result<(), ProofError> {
    verify(keys, &proof.signer, &piece_message(task, geometry, piece, &proof.digest), &proof.signature())
}

fn verify(keys: &ClusterKeys, signer: &Signer, message: &[u8], signature: &[u8; 64]) -> Result<(), ProofError> {
    if !keys.accepts(signer) {
        return Err(ProofError::NotAMember);
    }
    UnparsedPublicKey::new(&ED25519, &signer.public_key).verify(message, signature).map_err(|_| ProofError::Signature)
}

/// What a piece's signature covers. The leading label keeps it apart from every other thing that is signed.
fn piece_message(task: &TaskId, geometry: &Geometry, piece: PieceIndex, digest: &PieceDigest) -> Vec<u8> {
    let mut message = b"darter piece v1\0".to_vec();
    message.extend_from_slice(task.digest().algorithm().as_bytes());
    message.extend_from_slice(task.digest().as_bytes());
    message.extend_from_slice(&geometry.length().to_le_bytes());
    message.extend_from_slice(&geometry.piece_size().bytes().to_le_bytes());
    message.extend_from_slice(&piece.0.to_le_bytes());
    message.extend_from_slice(digest.as_bytes());
    message
}

/// What an event's signature covers.
fn event_message(event: &Event) -> Vec<u8> {
    let mut message = b"darter event v1\0".to_vec();
    // Encoding plain data into a growing vector cannot fail; if it ever did, nothing would verify.
    message.extend(postcard::to_stdvec(event).unwrap_or_default());
    message
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use darter_tracker::{Digest, EventBody, PieceSize};

    fn keys(cluster: &str, byte: u8) -> ClusterKeys {
        ClusterKeys::new(cluster, &[[byte; 32]]).unwrap()
    }

    fn piece() -> (TaskId, Geometry) {
        let geometry = Geometry::new(1 << 20, PieceSize::new(1 << 18).unwrap()).unwrap();
        (TaskId::blob(Digest::Sha256([7; 32])), geometry)
    }

    #[test]
    fn a_proof_holds_for_its_own_piece_only() {
        let ring = keys("lab", 1);
        let node = NodeKey::new(&ring, &[9; 32], 5).unwrap();
        let (task, geometry) = piece();
        let proof = node.sign_piece(&task, &geometry, PieceIndex(2), PieceDigest::of(b"x"));
        assert_eq!(verify_piece(&ring, &task, &geometry, PieceIndex(2), &proof), Ok(()));
        assert_eq!(verify_piece(&ring, &task, &geometry, PieceIndex(1), &proof), Err(ProofError::Signature));
        let other = TaskId::blob(Digest::Sha256([8; 32]));
        assert_eq!(verify_piece(&ring, &other, &geometry, PieceIndex(2), &proof), Err(ProofError::Signature));
        let mut forged = proof;
        forged.digest = PieceDigest::of(b"y");
        assert_eq!(verify_piece(&ring, &task, &geometry, PieceIndex(2), &forged), Err(ProofError::Signature));
    }

    #[test]
    fn another_cluster_or_secret_is_no_member() {
        let ring = keys("lab", 1);
        for other in [keys("lab", 2), keys("other", 1)] {
            let stranger = NodeKey::new(&other, &[9; 32], 5).unwrap();
            assert!(!ring.accepts(&stranger.signer()));
            assert_ne!(ring.sending(), other.sending());
        }
    }

    #[test]
    fn a_rotated_ring_accepts_old_and_new() {
        let (old, new) = (keys("lab", 1), ClusterKeys::new("lab", &[[2; 32], [1; 32]]).unwrap());
        let before = NodeKey::new(&old, &[3; 32], 1).unwrap();
        let after = NodeKey::new(&new, &[4; 32], 1).unwrap();
        assert!(new.accepts(&before.signer()));
        assert!(new.accepts(&after.signer()));
        assert!(!old.accepts(&after.signer()));
        assert_eq!(ClusterKeys::new("lab", &[[1u8; 31]]).err(), Some(KeyError::Short { position: 1, bytes: 31 }));
        assert_eq!(ClusterKeys::new("lab", &[[0u8; 32]; 0]).err(), Some(KeyError::Empty));
    }

    #[test]
    fn events_are_bound_to_their_author() {
        let ring = keys("lab", 1);
        let node = NodeKey::new(&ring, &[9; 32], 5).unwrap();
        let event = Event {
            author: node.id(),
            epoch: 5,
            sequence: 1,
            body: EventBody::Start { task: TaskId::blob(Digest::Sha256([7; 32])) },
        };
        let signed = node.sign_event(event);
        assert_eq!(signed.verify(&ring), Ok(()));
        let mut replayed = signed;
        replayed.event.sequence = 2;
        assert_eq!(replayed.verify(&ring), Err(ProofError::Signature));
        let mut stolen = signed;
        stolen.event.author = NodeId::from_bytes([1; 16]);
        assert_eq!(stolen.verify(&ring), Err(ProofError::Author));
    }
}
