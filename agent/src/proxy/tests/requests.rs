//! Which registry a request goes to, and that what is not the swarm's arrives untouched.

use bytes::Bytes;
use futures_util::future::join_all;
use futures_util::stream;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;

use super::support::{LATE, Registry, Seen, Setup, blob_path, hello, request};
use crate::proxy::body::BoxError;
use crate::proxy::mirror::MirrorSettings;
use crate::proxy::rules::RuleSettings;

#[tokio::test]
async fn absolute_urls_are_proxied() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    let (head, body) = proxy.get("http://registry.example/f?a=b", &[("x-a", "b")]).await;
    assert_eq!((head.status, &body[..]), (StatusCode::OK, &b"from the registry"[..]));
    assert_eq!(head.headers["x-from"], "registry");
    let seen = registry.one();
    assert_eq!((seen.uri.as_str(), &seen.headers["x-a"]), ("/f?a=b", &"b".parse().unwrap()));
    assert_eq!(seen.headers["host"], "registry.example", "the URL names the host, not the header");

    assert_eq!(proxy.get(&format!("http://registry.example{}", blob_path(1)), &[]).await.1.len(), 1500);
    assert_eq!(proxy.get("http://elsewhere.example/", &[]).await.0.status, 403, "the dial filter's word");
    assert_eq!(proxy.get("ftp://registry.example/", &[]).await.0.status, 400);
    assert_eq!(proxy.send(request("OPTIONS", "*", &[])).await.status(), 400);
    assert!(registry.take().is_empty());
}

/// Ten clients at once, twice, and one with other rights.
#[tokio::test(start_paused = true)]
async fn equal_questions_for_tags_and_tokens_are_asked_once() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    let token = "http://registry.example/token?service=registry.example&scope=repository:a/b:pull";
    for (method, uri, questions) in [
        ("GET", "http://registry.example/v2/a/b/manifests/latest", 2),
        ("HEAD", "http://registry.example/v2/a/b/manifests/latest", 2),
        ("GET", token, 2),
        // Others may have side effects, or differ in what the agent does not know of.
        ("GET", "http://registry.example/v2/a/b/tags/list", 11),
        ("POST", token, 11),
    ] {
        for _ in 0..2 {
            let proxy = &proxy;
            let asked = |credential: &'static str| async move {
                let headers = [("authorization", credential), (LATE, "yes")];
                let answer = proxy.send(request(method, uri, &headers)).await;
                assert_eq!(answer.headers()["x-from"], "registry");
                answer.into_body().collect().await.unwrap().to_bytes()
            };
            let (same, other) = tokio::join!(join_all((0..10).map(|_| asked("Basic one"))), asked("Basic other"));
            let whole = if method == "HEAD" { "" } else { "from the registry" };
            assert!(same.iter().chain([&other]).all(|body| body == whole));
            assert_eq!(registry.take().len(), questions, "{method} {uri}");
        }
    }
}

#[tokio::test]
async fn a_dead_registry_is_503() {
    let registry = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    // A port that was free a moment ago: nothing listens there.
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    setup.origin.hosts.insert("dead.example:80".into(), free);
    let proxy = setup.start().await;
    let (head, body) = proxy.get("http://dead.example/", &[]).await;
    assert_eq!((head.status, &body[..]), (StatusCode::SERVICE_UNAVAILABLE, &b"dead.example did not answer\n"[..]));
}

#[tokio::test]
async fn a_mirror_asks_its_remote_or_the_namespace() {
    let registry = Registry::start(None, hello).await;
    let other = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.mirror.remote = Some("http://other.example".into());
    setup.origin.hosts.insert("other.example:80".into(), other.address);
    let proxy = setup.start().await;
    for path in ["/v2/", "/v2/library/busybox/tags/list?n=1"] {
        assert_eq!(proxy.get(path, &[]).await.0.status, 200);
        let seen = other.one();
        assert_eq!((seen.uri.as_str(), &seen.headers["host"]), (path, &"other.example".parse().unwrap()));
    }
    assert_eq!(proxy.get("/v2/?ns=other.example:80&x=y", &[]).await.0.status, 200);
    assert_eq!(other.one().uri, "/v2/?x=y");
    assert_eq!(proxy.get("/v2/?ns=a/b", &[]).await.0.status, 400);
    assert_eq!(proxy.get("/v2/?ns=169.254.169.254", &[]).await.0.status, 403, "the dial filter's word");
    assert_eq!(proxy.get(&format!("{}?ns=registry.example", blob_path(1)), &[]).await.1.len(), 1500);
    let asked = proxy.authorize.asked.lock().unwrap().remove(0);
    assert_eq!(
        (asked.0.registry.as_str(), asked.1),
        ("https://registry.example:443", format!("https://registry.example{}", blob_path(1)))
    );
}

#[tokio::test]
async fn rules_hold_for_proxied_gets_and_not_for_the_mirror() {
    let registry = Registry::start(None, hello).await;
    let new = Registry::start(None, hello).await;
    let rule = |regex: &str, direct, redirect: Option<&str>| RuleSettings {
        regex: regex.into(),
        direct,
        use_https: false,
        redirect: redirect.map(Into::into),
    };
    let mut setup = Setup::of(&registry);
    setup.origin.hosts.insert("new.example:5000".into(), new.address);
    setup.settings.rules = vec![
        rule("private", true, None),
        rule("//old[.]example/.*/blobs/", true, Some("new.example:5000")),
        rule("library/busybox/blobs/sha256", false, None),
    ];
    let proxy = setup.start().await;
    let at = |host: &str, path: &str| format!("http://{host}{path}");
    let length = async |url: String| proxy.get(&url, &[]).await.1.len();
    let passed = "from the registry".len();
    assert_eq!(length(at("registry.example", &blob_path(1))).await, 1500);
    assert_eq!(length(at("registry.example", &blob_path(1)) + "?private").await, passed, "the first rule decides");
    assert_eq!(length(at("registry.example", &blob_path(1).replace("busybox", "mysql"))).await, passed, "no rule");
    assert_eq!(registry.take().len(), 2);
    assert_eq!(length(at("old.example", &blob_path(1))).await, passed, "redirected, and direct");
    assert_eq!(new.one().headers["host"], "new.example:5000");
    let post = proxy.send(request("POST", &at("old.example", &blob_path(1)), &[])).await;
    assert_eq!(post.status(), 403, "only GETs are rewritten, and old.example itself is not dialled");
    assert_eq!(length(blob_path(1).replace("busybox", "mysql")).await, 1500, "a mirror goes by digests alone");
}

#[tokio::test]
async fn a_direct_mirror_leaves_the_swarm_alone() {
    let registry = Registry::start(None, hello).await;
    let mut setup = Setup::of(&registry);
    setup.settings.mirror = MirrorSettings { direct: true, ..setup.settings.mirror };
    let proxy = setup.start().await;
    assert_eq!(&proxy.get(&blob_path(1), &[]).await.1[..], b"from the registry");
    assert_eq!((proxy.opened(), registry.take().len()), (0, 1));
}

#[tokio::test]
async fn a_malformed_digest_is_refused_as_the_specification_says() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    for path in ["/v2/a/blobs/sha256:zz", "http://registry.example/v2/a/blobs/nonsense"] {
        let (head, body) = proxy.get(path, &[]).await;
        assert_eq!(
            (head.status, &head.headers["content-type"]),
            (StatusCode::BAD_REQUEST, &"application/json".parse().unwrap())
        );
        let document: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(document["errors"][0]["code"], "DIGEST_INVALID");
        assert_eq!(proxy.send(request("HEAD", path, &[])).await.status(), 400);
    }
    assert!(registry.take().is_empty());
    assert_eq!(proxy.metrics.client_refusals.get(), 4);
}

// S28: what could be read in two ways is left to the registry, byte for byte.
#[tokio::test]
async fn everything_else_passes_untouched() {
    let registry = Registry::start(None, hello).await;
    let proxy = Setup::of(&registry).start().await;
    let blob = blob_path(1);
    for (method, path) in [
        ("HEAD", blob.clone()),
        ("DELETE", blob.clone()),
        ("GET", blob.replace("/blobs", "//blobs")),
        ("GET", blob.replace("library/", "library/../library/")),
        ("GET", blob.replace("library/", "library%2f")),
        ("GET", blob.replace("sha256:", "sha256%3A")),
        ("GET", "/v2/a/blobs/uploads/1?_state=x%3D".into()),
        ("GET", "/v2/a/tags/list?n=2&last=b".into()),
        ("HEAD", "/v2/a/manifests/latest".into()),
        ("GET", "/token?service=a&scope=repository:b:pull".into()),
        ("POST", "/v2/a/blobs/uploads/?mount=x&from=y".into()),
    ] {
        let answer = proxy.send(request(method, &path, &[("authorization", "Basic eA==")])).await;
        assert_eq!((answer.status(), answer.headers()["x-from"].to_str().unwrap()), (StatusCode::OK, "registry"));
        let seen = registry.one();
        assert_eq!((seen.method.as_str(), seen.uri.as_str()), (method, path.as_str()));
        assert_eq!(seen.headers["authorization"], "Basic eA==");
    }
    assert_eq!(proxy.opened(), 0);
}

#[tokio::test]
async fn a_push_streams_through() {
    let registry = Registry::start(None, |seen| {
        let status = if seen.method == "PATCH" { 202 } else { 201 };
        Response::builder().status(status).header("location", "/v2/a/blobs/uploads/1").body(Full::default()).unwrap()
    })
    .await;
    let proxy = Setup::of(&registry).start().await;

    let (give, mut given) = mpsc::channel::<Bytes>(1);
    let chunks = stream::poll_fn(move |cx| given.poll_recv(cx));
    let chunks = futures_util::StreamExt::map(chunks, |chunk| Ok::<_, BoxError>(Frame::data(chunk)));
    let body = BodyExt::boxed(StreamBody::new(chunks));
    let (mut patch, _) =
        request("PATCH", "/v2/a/blobs/uploads/1", &[("content-type", "application/octet-stream")]).into_parts();
    patch.headers.remove("content-length");
    let answer = proxy.send(http::Request::from_parts(patch, body));
    let sending = async {
        let mut sent = Vec::new();
        for byte in 0..200_u8 {
            let chunk = Bytes::from(vec![byte; 7001]);
            sent.extend_from_slice(&chunk);
            give.send(chunk).await.unwrap();
        }
        drop(give);
        sent
    };
    let (answer, sent) = tokio::join!(answer, sending);
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["location"]),
        (202, &"/v2/a/blobs/uploads/1".parse().unwrap())
    );
    let seen = registry.one();
    assert!(seen.body == sent && !seen.headers.contains_key("content-length"));

    let put = request("PUT", "/v2/a/manifests/latest", &[])
        .map(|_| Full::from(vec![7; 70_000]).map_err(|never| match never {}).boxed());
    assert_eq!(proxy.send(put).await.status(), 201);
    let seen = registry.one();
    assert_eq!((seen.body.len(), &seen.headers["content-length"]), (70_000, &"70000".parse().unwrap()));
    assert!(proxy.authorize.manifests.lock().unwrap().is_empty(), "what is pushed was not granted");
}

#[tokio::test]
async fn a_manifest_is_seen_by_the_authorizer_before_the_client_has_it() {
    fn answer(seen: &Seen) -> Response<Full<Bytes>> {
        let tag = seen.uri.rsplit('/').next().unwrap();
        let builder = match tag {
            "missing" => Response::builder().status(404),
            "packed" => Response::builder().header("content-encoding", "gzip"),
            _ => Response::builder(),
        };
        let kind =
            if tag == "page" { "text/html" } else { "Application/vnd.oci.image.manifest.v1+json; charset=utf-8" };
        let body = if tag == "huge" { vec![b' '; 4 * 1024 * 1024 + 1] } else { b"{\"layers\":[]}".to_vec() };
        builder.header("content-type", kind).body(Full::from(body)).unwrap()
    }
    let registry = Registry::start(None, answer).await;
    let proxy = Setup::of(&registry).start().await;
    for tag in ["missing", "packed", "page", "huge", "latest?token=x"] {
        proxy.get(&format!("/v2/a/b/manifests/{tag}"), &[]).await;
        assert!(proxy.authorize.manifests.lock().unwrap().is_empty(), "{tag}");
    }
    let (head, body) = proxy.get("/v2/a/b/manifests/latest", &[]).await;
    assert_eq!((head.status, &body[..]), (StatusCode::OK, &b"{\"layers\":[]}"[..]));
    let (repository, kind, seen) = proxy.authorize.manifests.lock().unwrap().remove(0);
    assert_eq!((repository.registry.as_str(), repository.name.as_str()), ("http://registry.example:80", "a/b"));
    assert_eq!((kind.as_str(), &seen[..]), ("application/vnd.oci.image.manifest.v1+json", &body[..]));
}
