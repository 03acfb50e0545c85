//! The registry source against registries that tell the truth, and against others.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod replies;

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;

use super::testing::{Origin, Reply, Seen, origin, reply, serve, upstream, upstream_with};
use super::*;

const BLOB: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
const LENGTH: u64 = BLOB.len() as u64;

async fn read_all(mut body: RangeBody) -> Result<Vec<u8>, OriginError> {
    let mut all = Vec::new();
    while let Some(part) = body.read(7).await? {
        assert!(!part.is_empty() && part.len() <= 7);
        all.extend_from_slice(&part);
    }
    Ok(all)
}

fn redirect(to: &str) -> Reply {
    Reply::Say(reply(307, &[("location", to)], b""))
}

const SECRETS: &[(&str, &str)] = &[
    ("authorization", "Bearer s3cret"),
    ("cookie", "session=s3cret"),
    ("x-registry-key", "s3cret"),
    ("proxy-authorization", "Basic s3cret"),
    ("user-agent", "docker/28"),
    ("range", "bytes=3-"),
    ("if-none-match", "\"e\""),
    ("accept-encoding", "gzip"),
    ("connection", "x-hop"),
    ("x-hop", "1"),
];

#[tokio::test]
async fn parts_are_fetched_with_the_clients_own_headers_and_counted() {
    let registry = Origin::start(|seen| serve(BLOB, seen)).await;
    let (upstream, metrics) = upstream();
    let from = origin(&registry.url("/v2/a/blobs/b?x=1"), SECRETS);
    for range in [0..LENGTH, 0..1, 5..20, LENGTH - 1..LENGTH] {
        let body = upstream.fetch(&from, range.clone(), LENGTH).await.unwrap();
        assert_eq!(body.remaining(), range.end - range.start);
        assert_eq!(read_all(body).await.unwrap(), &BLOB[range.start as usize..range.end as usize]);
    }
    assert_eq!(metrics.registry_requests.get(), 4);
    assert_eq!(metrics.registry_bytes.get(), LENGTH + 1 + 15 + 1);
    let seen = &registry.seen()[2];
    assert_eq!((seen.path.as_str(), seen.header("range")), ("/v2/a/blobs/b?x=1", Some("bytes=5-19")));
    assert_eq!(seen.header("authorization"), Some("Bearer s3cret"));
    assert_eq!(seen.header("cookie"), Some("session=s3cret"));
    assert_eq!(seen.header("x-registry-key"), Some("s3cret"));
    assert_eq!(seen.header("user-agent"), Some("docker/28"));
    assert_eq!(seen.header("accept-encoding"), Some("identity"));
    for gone in ["proxy-authorization", "if-none-match", "x-hop", "connection"] {
        assert_eq!(seen.header(gone), None, "{gone}");
    }
    // What was read to its end leaves a connection that is used again.
    assert_eq!(registry.connections(), 1);
}

// S25
#[tokio::test]
async fn credentials_stay_at_the_origin_and_are_not_given_back() {
    let back = Origin::start(|seen| serve(BLOB, seen)).await;
    let home = back.url("/blob");
    let cdn = Origin::start(move |_| redirect(&home)).await;
    let next = cdn.url("/signed?s=1");
    // The registry redirects within itself first: that is still the same origin.
    let registry = Origin::start(move |seen| match seen.path.as_str() {
        "/v2/a/blobs/b" => redirect("/v2/other"),
        _ => redirect(&next),
    })
    .await;
    let (upstream, metrics) = upstream();
    let body = upstream.fetch(&origin(&registry.url("/v2/a/blobs/b"), SECRETS), 2..9, LENGTH).await.unwrap();
    assert_eq!(read_all(body).await.unwrap(), &BLOB[2..9]);
    assert_eq!(metrics.registry_requests.get(), 4);
    for seen in registry.seen() {
        assert_eq!(seen.header("authorization"), Some("Bearer s3cret"));
    }
    for seen in [cdn.seen(), back.seen()].concat() {
        assert!(!format!("{seen:?}").contains("s3cret"), "{seen:?}");
        assert_eq!(seen.header("range"), Some("bytes=2-8"));
    }
}

#[tokio::test]
async fn credentials_do_not_come_back_with_a_redirect_to_the_first_origin() {
    let next = Arc::new(std::sync::OnceLock::<String>::new());
    let to = next.clone();
    let registry = Origin::start(move |seen| match seen.path.as_str() {
        "/blob" => serve(BLOB, seen),
        _ => redirect(to.get().unwrap()),
    })
    .await;
    let home = registry.url("/blob");
    let cdn = Origin::start(move |_| redirect(&home)).await;
    next.set(cdn.url("/signed")).unwrap();
    let (upstream, _) = upstream();
    let body = upstream.fetch(&origin(&registry.url("/v2/a/blobs/b"), SECRETS), 0..9, LENGTH).await.unwrap();
    assert_eq!(read_all(body).await.unwrap(), &BLOB[..9]);
    let seen = registry.seen();
    assert_eq!((seen.len(), seen[0].header("authorization")), (2, Some("Bearer s3cret")));
    assert!(!format!("{:?}", seen[1]).contains("s3cret"));
}

// S2
#[tokio::test]
async fn redirects_pass_the_dial_filter_and_end() {
    let trap = Origin::start_at("127.0.0.2:0", None, |seen| serve(BLOB, seen)).await;
    let (upstream, _) = upstream();
    for target in ["http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/", &trap.url("/")] {
        let to = target.to_owned();
        let registry = Origin::start(move |_| redirect(&to)).await;
        let error = upstream.fetch(&origin(&registry.url("/b"), SECRETS), 0..9, LENGTH).await.unwrap_err();
        assert!(matches!(&error, OriginError::Unreachable(cause) if cause.is_refused()), "{target}: {error}");
        assert!(!error.is_retryable());
    }
    assert_eq!(trap.connections(), 0);

    for (location, requests) in [("/b", 6), ("ftp://x/", 1), ("http://u:p@127.0.0.1/", 1)] {
        let registry = Origin::start(move |_| redirect(location)).await;
        let error = upstream.fetch(&origin(&registry.url("/b"), &[]), 0..9, LENGTH).await.unwrap_err();
        assert!(matches!(error, OriginError::Broken(_)), "{location}: {error}");
        assert_eq!(registry.seen().len(), requests, "{location}");
    }
}

#[tokio::test]
async fn an_expired_target_is_renewed_once() {
    for (lifetimes, works) in [(1, true), (2, false)] {
        let cdn = Origin::start(move |seen| match seen.path.strip_prefix('/').unwrap().parse::<usize>().unwrap() {
            attempt if attempt < lifetimes => Reply::Say(reply(403, &[], b"<Error>expired</Error>")),
            _ => serve(BLOB, seen),
        })
        .await;
        let base = cdn.url("/");
        let count = std::sync::atomic::AtomicUsize::new(0);
        let registry = Origin::start(move |_| {
            redirect(&format!("{base}{}", count.fetch_add(1, std::sync::atomic::Ordering::SeqCst)))
        })
        .await;
        let (upstream, _) = upstream();
        match upstream.fetch(&origin(&registry.url("/b"), &[]), 0..9, LENGTH).await {
            Ok(body) => assert_eq!((works, read_all(body).await.unwrap().len()), (true, 9)),
            Err(OriginError::Refused { by_registry, .. }) => assert!(!works && !by_registry),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(registry.seen().len(), 2);
    }
}

#[tokio::test]
async fn a_request_is_passed_on_and_its_answer_back() {
    let registry = Origin::start(|seen: &Seen| match seen.method.as_str() {
        "PUT" => Reply::Say(reply(201, &[("location", "/done")], &seen.body)),
        _ => Reply::Say(reply(
            401,
            &[
                ("www-authenticate", "Bearer realm=\"https://auth.example.org/token\""),
                ("connection", "keep-alive, x-hop"),
                ("x-hop", "1"),
                ("proxy-authenticate", "Basic"),
                ("keep-alive", "timeout=5"),
                ("set-cookie", "a=b"),
            ],
            b"{\"errors\":[]}",
        )),
    })
    .await;
    let (upstream, _) = upstream();
    let mut request = Request::new(ProxyBody::empty());
    *request.uri_mut() = registry.url("/v2/?a=b%2Fc").parse().unwrap();
    *request.headers_mut() = origin("http://x/", SECRETS).headers;
    request.headers_mut().insert("host", "elsewhere.example.org".parse().unwrap());
    let answer = upstream.send(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(answer.headers()["www-authenticate"], "Bearer realm=\"https://auth.example.org/token\"");
    assert_eq!(answer.headers()["set-cookie"], "a=b");
    for gone in ["connection", "x-hop", "proxy-authenticate", "keep-alive"] {
        assert!(!answer.headers().contains_key(gone), "{gone}");
    }
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "{\"errors\":[]}");
    let seen = registry.seen().remove(0);
    assert_eq!(seen.path, "/v2/?a=b%2Fc");
    // The host is the URL's, whatever a header says; conditions and ranges are the client's.
    assert_eq!(seen.header("host"), Some(registry.address.to_string().as_str()));
    assert_eq!((seen.header("range"), seen.header("if-none-match")), (Some("bytes=3-"), Some("\"e\"")));
    assert_eq!(seen.header("accept-encoding"), Some("gzip"));
    assert_eq!((seen.header("proxy-authorization"), seen.header("x-hop")), (None, None));

    let mut request = Request::new(ProxyBody::from(Bytes::from_static(BLOB)));
    *request.method_mut() = Method::PUT;
    *request.uri_mut() = registry.url("/v2/a/blobs/uploads/1").parse().unwrap();
    let answer = upstream.send(request).await.unwrap();
    // A redirect or a location is the client's business.
    assert_eq!((answer.status(), &answer.headers()["location"]), (StatusCode::CREATED, &"/done".parse().unwrap()));
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), BLOB);
}

// S29
#[tokio::test]
async fn connections_are_not_shared_between_credentials() {
    let registry = Origin::start(|seen| serve(BLOB, seen)).await;
    let (upstream, _) = upstream();
    for who in ["a", "b", "a", "b", ""] {
        let headers: &[(&str, &str)] = if who.is_empty() { &[] } else { &[("authorization", who)] };
        let body = upstream.fetch(&origin(&registry.url("/b"), headers), 0..9, LENGTH).await.unwrap();
        read_all(body).await.unwrap();
    }
    let mut by_connection = std::collections::BTreeMap::new();
    for seen in registry.seen() {
        let who = seen.header("authorization").map(str::to_owned);
        assert_eq!(*by_connection.entry(seen.connection).or_insert(who.clone()), who);
    }
    assert_eq!(by_connection.len(), 3);
}

// D11
#[tokio::test]
async fn an_urgent_fetch_does_not_wait_for_those_that_are_held_back() {
    let registry = Origin::start(|seen| serve(BLOB, seen)).await;
    let (upstream, _) = upstream();
    let from = origin(&registry.url("/b"), &[]);
    let mut held = Vec::new();
    for _ in 0..limit::FETCHES_MAX {
        held.push(upstream.fetch(&from, 0..9, LENGTH).await.unwrap());
    }
    let mut waiting = Box::pin(upstream.fetch(&from, 0..9, LENGTH));
    let body = tokio::select! {
        biased;
        _ = &mut waiting => panic!("there was no turn left"),
        body = upstream.fetch_urgent(&from, 9..12, LENGTH) => body.unwrap(),
    };
    assert_eq!(read_all(body).await.unwrap(), &BLOB[9..12]);
    assert_eq!(registry.seen().len(), limit::FETCHES_MAX + 1);
    held.pop();
    assert!(waiting.await.is_ok());
}

#[tokio::test]
async fn a_connection_that_was_closed_while_idle_costs_no_error() {
    let registry = Origin::start(|seen| match seen.connection {
        0 if seen.path == "/second" => Reply::Close(Vec::new()),
        _ => serve(BLOB, seen),
    })
    .await;
    let (upstream, _) = upstream();
    for path in ["/first", "/second"] {
        let body = upstream.fetch(&origin(&registry.url(path), &[]), 0..9, LENGTH).await.unwrap();
        assert_eq!(read_all(body).await.unwrap(), &BLOB[..9]);
    }
    assert_eq!(registry.connections(), 2);
}

// S3
#[tokio::test]
async fn a_private_ca_is_trusted_where_it_is_configured_and_nowhere_else() {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(params, ca_key);
    let dir = tempfile::tempdir().unwrap();
    let ca_file = dir.path().join("ca.crt");
    std::fs::write(&ca_file, ca.pem()).unwrap();
    let server = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        tokio_rustls::TlsAcceptor::from(Arc::new(config))
    };
    let right = Origin::start_at("127.0.0.1:0", Some(server("localhost")), |seen| serve(BLOB, seen)).await;
    let wrong = Origin::start_at("127.0.0.1:0", Some(server("other.example.org")), |seen| serve(BLOB, seen)).await;
    let with_ca = RegistryPolicy { ca_file: Some(ca_file), ..RegistryPolicy::default() };
    let fetch = async |policies: &[(&str, RegistryPolicy)], registry: &Origin| {
        let (upstream, _) = upstream_with(policies);
        read_all(upstream.fetch(&origin(&registry.url("/b"), &[]), 0..9, LENGTH).await?).await
    };

    assert_eq!(fetch(&[("localhost", with_ca.clone())], &right).await.unwrap(), &BLOB[..9]);
    let elsewhere = [("localhost", RegistryPolicy::default()), ("registry.example.org", with_ca.clone())];
    for (policies, registry) in [(&elsewhere[..], &right), (&[("localhost", with_ca.clone())], &wrong)] {
        let error = fetch(policies, registry).await.unwrap_err();
        assert!(matches!(error, OriginError::Unreachable(UpstreamError::Dial(DialError::Tls { .. }))), "{error}");
        assert!(!error.is_down());
    }
    assert!(wrong.seen().is_empty());

    // https to http is refused on a redirect, except to a registry that is configured so.
    let plain = Origin::start(|seen| serve(BLOB, seen)).await;
    let to = plain.url("/b");
    let downgrade = Origin::start_at("127.0.0.1:0", Some(server("localhost")), move |_| redirect(&to)).await;
    let insecure = RegistryPolicy { insecure_http: true, ca_file: None };
    let mut policies = vec![("localhost", with_ca), ("127.0.0.1", RegistryPolicy::default())];
    let error = fetch(&policies, &downgrade).await.unwrap_err();
    assert!(matches!(error, OriginError::Broken(_)) && plain.connections() == 0, "{error}");
    policies[1].1 = insecure;
    assert_eq!(fetch(&policies, &downgrade).await.unwrap(), &BLOB[..9]);
}

#[tokio::test]
async fn an_insecure_registry_is_asked_over_plain_http_under_any_scheme() {
    let registry = Origin::start(|seen| serve(BLOB, seen)).await;
    let policy = RegistryPolicy { insecure_http: true, ca_file: None };
    let (upstream, _) = upstream_with(&[(&registry.address.to_string(), policy)]);
    let url = format!("https://{}/b", registry.address);
    let body = upstream.fetch(&origin(&url, &[]), 0..9, LENGTH).await.unwrap();
    assert_eq!(read_all(body).await.unwrap(), &BLOB[..9]);
    assert_eq!(upstream.origin_of(&url.parse().unwrap()).unwrap(), format!("http://{}", registry.address));
}

#[test]
fn all_bad_ca_files_are_reported_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bad = |name: &str, text: Option<&str>| {
        let path = dir.path().join(name);
        if let Some(text) = text {
            std::fs::write(&path, text).unwrap();
        }
        (name.to_owned(), RegistryPolicy { insecure_http: false, ca_file: Some(path) })
    };
    let malformed = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let policies = [bad("a", None), bad("b", Some("")), bad("c", Some(malformed))].into();
    let settings = Settings { policies, ..Settings::default() };
    let Err(UpstreamError::Settings(problems)) = Upstream::new(settings, Arc::default()) else { panic!("accepted") };
    assert!(matches!(problems[..], [CaError::Read { .. }, CaError::Empty { .. }, CaError::Malformed { .. }]));
}
