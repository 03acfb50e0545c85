//! Manifests that come from the swarm: what they speak for, how long, and while the registry is down.

use super::*;

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";

impl Front {
    fn manifest(&self, who: &[(&str, &str)], letter: char) -> BlobOrigin {
        origin(&format!("{}/v2/a/manifests/{}", self.base, digest(letter)), who)
    }

    async fn ask_manifest(&self, who: &[(&str, &str)], letter: char) -> Verdict {
        self.authorizer.blob(&self.manifest(who, letter), &self.repository("a"), &digest(letter)).await
    }

    fn hold_manifest(&self, who: &[(&str, &str)], letter: char, listed: char) {
        let body = format!(r#"{{"layers":[{{"digest":"{}","size":5}}]}}"#, digest(listed));
        let (origin, repository) = (self.manifest(who, letter), self.repository("a"));
        self.authorizer.held_manifest(&origin, &repository, &digest(letter), IMAGE, body.as_bytes());
    }
}

/// Read at the last moment, it must not give another minute.
#[tokio::test]
async fn a_held_manifest_speaks_no_longer_than_the_registry_did() {
    let revoked = Arc::new(AtomicBool::new(false));
    let flag = revoked.clone();
    let front = Front::start(WhenRegistryDown::Seen, move |seen| {
        if flag.load(Ordering::SeqCst) { Reply::Say(reply(403, &[], b"")) } else { alices(seen) }
    })
    .await;
    granted(&front.ask_manifest(ALICE, 'd').await);
    revoked.store(true, Ordering::SeqCst);
    pass(YES - Duration::from_secs(1)).await;
    front.hold_manifest(ALICE, 'd', 'e');
    granted(&front.ask(ALICE, "a", 'e').await);
    // A manifest that nobody was granted speaks for nothing.
    front.hold_manifest(BOB, 'd', 'f');
    assert_eq!(refused(front.ask(BOB, "a", 'f').await).status(), 403);
    pass(Duration::from_secs(1)).await;
    assert_eq!(refused(front.ask(ALICE, "a", 'e').await).status(), 403);
}

/// A runtime asks with HEAD what a tag means, and then for that manifest: the registry has said already that it would give it.
#[tokio::test]
async fn what_a_tag_was_said_to_mean_may_be_had_by_him_who_was_told() {
    let front = Front::start(WhenRegistryDown::Seen, alices).await;
    let mut said = HeaderMap::new();
    said.insert("docker-content-digest", digest('d').to_string().parse().unwrap());
    said.insert("content-length", LENGTH.into());
    said.insert("content-type", IMAGE.parse().unwrap());
    let alice = front.manifest(ALICE, 'd').headers;
    front.authorizer.saw_manifest_head(&front.repository("a"), &alice, &said);
    match front.ask_manifest(ALICE, 'd').await {
        Verdict::Granted { length, headers } => {
            assert!(length == LENGTH && headers[CONTENT_TYPE] == IMAGE);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(front.questions(), 0);
    assert!(!matches!(front.ask_manifest(BOB, 'd').await, Verdict::Granted { .. }), "it was not said to him");
    granted(&front.ask(ALICE, "a", 'd').await);
    assert!(front.questions() >= 2, "nor of the blob of that digest");
}

/// A yes to the one is no yes to the other: a registry need not give a manifest as a blob.
#[tokio::test]
async fn a_manifest_and_a_blob_of_one_digest_are_two_questions() {
    let front = Front::start(WhenRegistryDown::Seen, alices).await;
    granted(&front.ask_manifest(ALICE, 'd').await);
    granted(&front.ask(ALICE, "a", 'd').await);
    assert_eq!(front.questions(), 2);
}

#[tokio::test]
async fn while_the_registry_is_down_a_manifest_has_no_type_and_speaks_for_nothing_new() {
    for (policy, alice, bob) in [
        (WhenRegistryDown::Seen, true, false),
        (WhenRegistryDown::Allow, true, true),
        (WhenRegistryDown::Deny, false, false),
    ] {
        let mut front = Front::start(policy, alices).await;
        granted(&front.ask_manifest(ALICE, 'd').await);
        front.registry.stop().await;
        pass(YES).await;
        for (who, may) in [(ALICE, alice), (BOB, bob)] {
            match front.ask_manifest(who, 'd').await {
                Verdict::Granted { length, headers } => {
                    assert!(may && length == LENGTH, "{policy:?} {who:?}");
                    assert!(!headers.contains_key(CONTENT_TYPE));
                }
                other => assert!(!may && matches!(other, Verdict::Unavailable(_)), "{policy:?} {who:?} {other:?}"),
            }
            front.hold_manifest(who, 'd', 'e');
            assert!(matches!(front.ask(who, "a", 'e').await, Verdict::Unavailable(_)), "{policy:?} {who:?}");
        }
    }
}
