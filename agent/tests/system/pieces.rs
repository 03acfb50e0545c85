//! What an agent gives to a peer that is none of its own kind (row 61): pieces, by number, with a proof, and of nothing that
//! it does not hold.

use std::time::Duration;

use base64::Engine as _;
use darter_swarm::identity::{ClusterKeys, verify_piece};
use darter_tracker::{Digest, PieceDigest, PieceIndex, TaskId};

use crate::member::Member;
use crate::stage::{KIB, MIB, Plan, Stage, pieces};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_gets_each_piece_with_its_proof_and_nothing_else() {
    let plan = Plan { agents: 1, layers: vec![3 * MIB + 77], piece_bytes: Some(512 * KIB), ..Plan::default() };
    let stage = Stage::start(plan).await;
    stage.pull([0]).await;
    let sent = stage.settled().await.blob_bytes();
    let blob = stage.image.layers()[0].clone();
    let (task, geometry) = (TaskId::blob(blob.digest()), stage.geometry(&blob));
    let secret = std::fs::read_to_string(stage.cluster.directory().join("secret")).unwrap();
    let secret = base64::engine::general_purpose::STANDARD.decode(secret.trim()).unwrap();
    let keys = ClusterKeys::new("demo", &[secret]).unwrap();

    let peer = Member::join(&stage, 0).await;
    let from = stage.agent(0).addresses().peer;
    let cut = pieces(geometry);
    assert_eq!(cut.len(), 7);
    // Each by itself, in no order: every piece is a range of the blob.
    for at in [3, 0, 6, 5, 1, 4, 2, 3] {
        let (proof, bytes) = peer.take(from, task, PieceIndex(at)).await.unwrap();
        assert!(bytes == blob.read(cut[at as usize].clone()), "piece {at}");
        assert_eq!(proof.digest, PieceDigest::of(&bytes), "piece {at}");
        assert!(verify_piece(&keys, &task, &geometry, PieceIndex(at), &proof).is_ok(), "piece {at}");
        // The proof is of this piece alone.
        assert!(verify_piece(&keys, &task, &geometry, PieceIndex((at + 1) % 7), &proof).is_err(), "piece {at}");
    }
    let unknown = TaskId::blob(Digest::Sha256([7; 32]));
    for (task, piece) in [(unknown, 0), (task, 7), (task, u32::MAX)] {
        let none = tokio::time::timeout(Duration::from_secs(20), peer.take(from, task, PieceIndex(piece)));
        assert!(none.await.expect("an answer").is_none(), "piece {piece} of {task}");
    }
    assert_eq!(stage.settled().await.blob_bytes(), sent, "nothing of that asked the registry");
    peer.leave().await;
    stage.stop().await;
}
