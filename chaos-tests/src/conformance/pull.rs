//! Reading what is in a registry: manifests, blobs and their parts, tags, referrers.

use hyper::StatusCode;
use serde_json::Value;

use super::content::{ARTIFACT, IMAGE, INDEX};
use super::http::Reply;
use super::talk::{Flaw, Talk, ensure};

/// What a client of images takes.
pub(super) const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A digest that nothing has.
const NOTHING: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// Where the second of an agent's pieces begins.
const PIECE_BYTES: usize = 256 << 10;

pub(super) async fn base(talk: &mut Talk) -> Result<(), Flaw> {
    talk.get("/v2/", &[]).await?.expect(&[200])
}

pub(super) async fn manifest_by_tag(talk: &mut Talk) -> Result<(), Flaw> {
    let path = talk.manifest(&talk.session.tag);
    manifest(talk, &path).await
}

pub(super) async fn manifest_by_digest(talk: &mut Talk) -> Result<(), Flaw> {
    let path = talk.manifest(&talk.session.image.digest);
    manifest(talk, &path).await
}

async fn manifest(talk: &mut Talk, path: &str) -> Result<(), Flaw> {
    let image = talk.session.image.clone();
    for _ in ["once", "again"] {
        let got = talk.get(path, &[("accept", ACCEPTED)]).await?;
        got.expect(&[200])?;
        got.says("content-type", &image.media_type)?;
        got.says_if_any("docker-content-digest", &image.digest)?;
        got.holds(&image.bytes)?;
        let head = talk.head(path, &[("accept", ACCEPTED)]).await?;
        head.expect(&[200])?;
        head.says("content-type", &image.media_type)?;
        head.says_if_any("docker-content-digest", &image.digest)?;
        head.says("content-length", &image.length())?;
    }
    Ok(())
}

pub(super) async fn manifest_unknown(talk: &mut Talk) -> Result<(), Flaw> {
    for reference in ["no-such-tag", NOTHING] {
        let path = talk.manifest(reference);
        absent(talk, &path, &["MANIFEST_UNKNOWN", "NAME_UNKNOWN"]).await?;
    }
    Ok(())
}

pub(super) async fn repository_unknown(talk: &mut Talk) -> Result<(), Flaw> {
    let path = "/v2/conformance/no-such-repository/manifests/latest";
    for reply in [talk.get(path, &[("accept", ACCEPTED)]).await?, talk.head(path, &[("accept", ACCEPTED)]).await?] {
        // Who may not see a repository need not hear whether there is one.
        reply.expect(&[404, 401, 403])?;
        reply.refuses(&["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "UNAUTHORIZED", "DENIED"])?;
    }
    Ok(())
}

pub(super) async fn blob_unknown(talk: &mut Talk) -> Result<(), Flaw> {
    let path = talk.blob(NOTHING);
    absent(talk, &path, &["BLOB_UNKNOWN"]).await?;
    absent(talk, &path, &["BLOB_UNKNOWN"]).await
}

pub(super) async fn blob_elsewhere(talk: &mut Talk) -> Result<(), Flaw> {
    let path = format!("/v2/conformance/no-such-repository/blobs/{}", talk.session.layer.digest);
    for reply in [talk.get(&path, &[]).await?, talk.head(&path, &[]).await?] {
        reply.expect(&[404, 401, 403])?;
        reply.refuses(&["BLOB_UNKNOWN", "NAME_UNKNOWN", "UNAUTHORIZED", "DENIED"])?;
    }
    Ok(())
}

async fn absent(talk: &mut Talk, path: &str, codes: &[&str]) -> Result<(), Flaw> {
    let got = talk.get(path, &[("accept", ACCEPTED)]).await?;
    got.expect(&[404])?;
    got.refuses(codes)?;
    talk.head(path, &[("accept", ACCEPTED)]).await?.expect(&[404])
}

pub(super) async fn digest_malformed(talk: &mut Talk) -> Result<(), Flaw> {
    for digest in ["sha256:abc", &format!("sha256:{}", "Z".repeat(64))] {
        let path = talk.blob(digest);
        let got = talk.get(&path, &[]).await?;
        got.expect(&[400, 404])?;
        got.refuses(&["DIGEST_INVALID", "BLOB_UNKNOWN", "NAME_INVALID"])?;
    }
    Ok(())
}

pub(super) async fn blob(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let path = talk.blob(&layer.digest);
    for _ in ["once", "again"] {
        let got = talk.get(&path, &[]).await?;
        got.expect(&[200])?;
        got.says_if_any("content-length", &layer.length())?;
        described(talk, &got)?;
        got.holds(&layer.bytes)?;
    }
    Ok(())
}

pub(super) async fn blob_head(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let path = talk.blob(&layer.digest);
    let head = talk.head(&path, &[]).await?;
    head.expect(&[200])?;
    head.says("content-length", &layer.length())?;
    described(talk, &head)
}

/// Who has the blob already need not be sent it.
pub(super) async fn blob_on_condition(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let path = talk.blob(&layer.digest);
    let head = talk.head(&path, &[]).await?;
    let Some(tag) = head.header("etag") else {
        return Err(Flaw::Unsupported("blobs have no ETag".to_owned()));
    };
    talk.get(&path, &[("if-none-match", tag)]).await?.supported(&[304])?;
    let got = talk.get(&path, &[("if-none-match", "\"another\"")]).await?;
    got.expect(&[200])?;
    got.holds(&layer.bytes)
}

fn described(talk: &Talk, reply: &Reply) -> Result<(), Flaw> {
    reply.says_if_any("docker-content-digest", &talk.session.layer.digest)
}

pub(super) async fn first_bytes(talk: &mut Talk) -> Result<(), Flaw> {
    one_part(talk, "bytes=0-99", 0, 100).await
}

/// Over the edge of a piece, where the blob has more than one.
pub(super) async fn middle_bytes(talk: &mut Talk) -> Result<(), Flaw> {
    let length = talk.session.layer.bytes.len();
    let first = if length > 2 * PIECE_BYTES { PIECE_BYTES - 50 } else { length / 3 };
    let end = (first + 100).min(length);
    one_part(talk, &format!("bytes={first}-{}", end - 1), first, end).await
}

pub(super) async fn open_end(talk: &mut Talk) -> Result<(), Flaw> {
    let length = talk.session.layer.bytes.len();
    one_part(talk, &format!("bytes={}-", length / 2), length / 2, length).await
}

pub(super) async fn suffix(talk: &mut Talk) -> Result<(), Flaw> {
    let length = talk.session.layer.bytes.len();
    one_part(talk, "bytes=-7", length - 7, length).await
}

pub(super) async fn past_the_end(talk: &mut Talk) -> Result<(), Flaw> {
    let length = talk.session.layer.bytes.len();
    one_part(talk, &format!("bytes={}-{}", length - 10, length + 10), length - 10, length).await
}

async fn asked_range(talk: &mut Talk, range: &str) -> Result<Reply, Flaw> {
    let path = talk.blob(&talk.session.layer.digest);
    talk.get(&path, &[("range", range)]).await
}

/// A registry may ignore ranges and give the whole, but it may not give anything else.
async fn one_part(talk: &mut Talk, range: &str, first: usize, end: usize) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let got = asked_range(talk, range).await?;
    if got.status == StatusCode::OK {
        got.holds(&layer.bytes)?;
        return Err(Flaw::Unsupported("ranges are ignored".to_owned()));
    }
    got.expect(&[206])?;
    got.says("content-range", &format!("bytes {first}-{}/{}", end - 1, layer.bytes.len()))?;
    got.says_if_any("content-length", &(end - first).to_string())?;
    got.holds(&layer.bytes.slice(first..end))
}

pub(super) async fn unsatisfiable(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let got = asked_range(talk, &format!("bytes={}-{}", layer.bytes.len(), layer.bytes.len() + 10)).await?;
    if got.status == StatusCode::OK {
        got.holds(&layer.bytes)?;
        return Err(Flaw::Unsupported("ranges are ignored".to_owned()));
    }
    got.expect(&[416])?;
    got.says_if_any("content-range", &format!("bytes */{}", layer.bytes.len()))
}

/// Several ranges come as several parts, or as one, or as the whole; what comes is right.
pub(super) async fn several_ranges(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    let got = asked_range(talk, "bytes=0-9,50-59").await?;
    got.expect(&[200, 206, 416])?;
    match got.status {
        StatusCode::OK => got.holds(&layer.bytes),
        StatusCode::PARTIAL_CONTENT if got.boundary().is_some() => {
            for part in [&layer.bytes[..10], &layer.bytes[50..60]] {
                let found = got.body.windows(part.len()).any(|window| window == part);
                ensure(found && !got.cut, || "a part is missing".to_owned())?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// RFC 9110 has it ignored, Go's library, and so most registries, refuse it.
pub(super) async fn malformed_range(talk: &mut Talk) -> Result<(), Flaw> {
    let layer = talk.session.layer.clone();
    for range in ["bytes=9-5", "bytes=a-b", "bytes"] {
        let got = asked_range(talk, range).await?;
        got.expect(&[200, 416])?;
        if got.status == StatusCode::OK {
            got.holds(&layer.bytes)?;
        }
    }
    Ok(())
}

async fn listed_tags(talk: &mut Talk, query: &str) -> Result<Vec<String>, Flaw> {
    let path = format!("/v2/{}/tags/list{query}", talk.session.repository);
    let got = talk.get(&path, &[]).await?;
    got.expect(&[200])?;
    let list: Value = serde_json::from_slice(&got.body).unwrap_or_default();
    ensure(list["name"] == talk.session.repository.as_str(), || format!("the list is of {}", list["name"]))?;
    let tags = list["tags"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(tags.map(str::to_owned).collect())
}

pub(super) async fn tags(talk: &mut Talk) -> Result<(), Flaw> {
    let tag = talk.session.tag.clone();
    let all = listed_tags(talk, "").await?;
    ensure(all.contains(&tag), || format!("{tag} is not in {all:?}"))
}

pub(super) async fn some_tags(talk: &mut Talk) -> Result<(), Flaw> {
    let some = listed_tags(talk, "?n=1").await?;
    if some.len() > 1 {
        return Err(Flaw::Unsupported("n is ignored".to_owned()));
    }
    let Some(last) = some.first() else { return Err(Flaw::Violates("no tag at all".to_owned())) };
    let rest = listed_tags(talk, &format!("?n=1000&last={last}")).await?;
    if rest.contains(last) {
        return Err(Flaw::Unsupported("last is ignored".to_owned()));
    }
    Ok(())
}

pub(super) async fn tags_of_nothing(talk: &mut Talk) -> Result<(), Flaw> {
    let got = talk.get("/v2/conformance/no-such-repository/tags/list", &[]).await?;
    got.expect(&[404, 401, 403])?;
    got.refuses(&["NAME_UNKNOWN", "UNAUTHORIZED", "DENIED"])
}

pub(super) async fn referrers(talk: &mut Talk) -> Result<(), Flaw> {
    let (repository, image) = (talk.session.repository.clone(), talk.session.image.digest.clone());
    let path = format!("/v2/{repository}/referrers/{image}");
    let got = talk.get(&path, &[]).await?;
    got.supported(&[200])?;
    let listed = referring(&got)?;
    if let Ok(made) = talk.made() {
        ensure(listed.contains(&made.artifact.digest), || format!("the artifact is not in {listed:?}"))?;
    }
    for (kind, some) in [(ARTIFACT, true), ("application/vnd.example.nothing", false)] {
        let got = talk.get(&format!("{path}?artifactType={kind}"), &[]).await?;
        got.expect(&[200])?;
        let filtered = referring(&got)?;
        if got.header("oci-filters-applied").is_some() && talk.made().is_ok() {
            ensure(filtered.is_empty() != some, || format!("{kind}: {filtered:?}"))?;
        }
    }
    // What nothing refers to has an empty list.
    let got = talk.get(&format!("/v2/{repository}/referrers/{NOTHING}"), &[]).await?;
    got.expect(&[200])?;
    ensure(referring(&got)?.is_empty(), || "something refers to nothing".to_owned())
}

fn referring(reply: &Reply) -> Result<Vec<String>, Flaw> {
    reply.says("content-type", INDEX)?;
    let index: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    ensure(index["mediaType"] == INDEX, || "the list is no index".to_owned())?;
    let entries = index["manifests"].as_array().into_iter().flatten();
    Ok(entries.filter_map(|entry| entry["digest"].as_str()).map(str::to_owned).collect())
}

/// Every platform's image of an index, by the digest that the index names.
pub(super) async fn images_of_an_index(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    for image in [&made.image, &made.other_image] {
        let path = talk.manifest(&image.digest);
        let got = talk.get(&path, &[("accept", IMAGE)]).await?;
        got.expect(&[200])?;
        got.holds(&image.bytes)?;
    }
    Ok(())
}
