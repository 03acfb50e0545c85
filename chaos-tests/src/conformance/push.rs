//! Putting content into a registry and taking it out: uploads in every form, mounts, manifests, deletion.

use bytes::Bytes;
use hyper::Method;
use serde_json::json;

use super::content::{BLOB, CONFIG, Content, IMAGE, INDEX, LAYER};
use super::http::{Ask, Reply, Sent};
use super::talk::{Flaw, Talk, ensure};

/// A digest that nothing has.
const NOTHING: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

fn uploads(repository: &str) -> String {
    format!("/v2/{repository}/blobs/uploads/")
}

fn typed(media_type: &str) -> Vec<(&'static str, String)> {
    vec![("content-type", media_type.to_owned())]
}

/// Where an upload goes on.
fn location(reply: &Reply) -> Result<String, Flaw> {
    let location = reply.header("location").map(str::to_owned);
    location.ok_or_else(|| Flaw::Violates("an upload without a Location".to_owned()))
}

/// The URL that ends an upload.
fn end(location: &str, digest: &str) -> String {
    format!("{location}{}digest={digest}", if location.contains('?') { '&' } else { '?' })
}

async fn post(talk: &mut Talk, to: String) -> Result<Reply, Flaw> {
    talk.send(Ask { method: Method::POST, to, headers: Vec::new(), body: Sent::Nothing }).await
}

async fn begin(talk: &mut Talk) -> Result<String, Flaw> {
    let to = uploads(&talk.session.repository);
    let begun = post(talk, to).await?;
    begun.expect(&[202])?;
    location(&begun)
}

async fn patch(talk: &mut Talk, to: &str, part: Bytes, first: usize) -> Result<Reply, Flaw> {
    let mut headers = typed(BLOB);
    headers.push(("content-range", format!("{first}-{}", first + part.len() - 1)));
    talk.send(Ask { method: Method::PATCH, to: to.to_owned(), headers, body: Sent::Whole(part) }).await
}

async fn put(talk: &mut Talk, to: String, media_type: &str, bytes: &Bytes) -> Result<Reply, Flaw> {
    let body = Sent::Whole(bytes.clone());
    talk.send(Ask { method: Method::PUT, to, headers: typed(media_type), body }).await
}

/// Ends an upload without further bytes.
async fn put_nothing(talk: &mut Talk, to: String) -> Result<(), Flaw> {
    let put = talk.send(Ask { method: Method::PUT, to, headers: Vec::new(), body: Sent::Nothing }).await?;
    created(&put)
}

fn created(reply: &Reply) -> Result<(), Flaw> {
    reply.expect(&[201])?;
    location(reply).map(drop)
}

async fn push(talk: &mut Talk, content: &Content) -> Result<(), Flaw> {
    let to = begin(talk).await?;
    created(&put(talk, end(&to, &content.digest), BLOB, &content.bytes).await?)
}

async fn is_there(talk: &mut Talk, content: &Content) -> Result<(), Flaw> {
    let path = talk.blob(&content.digest);
    let got = talk.get(&path, &[]).await?;
    got.expect(&[200])?;
    got.holds(&content.bytes)
}

pub(super) async fn post_and_put(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    for content in [&made.layer, &made.config, &made.empty] {
        push(talk, content).await?;
        // Not with GET: it is the ranges that come first.
        let path = talk.blob(&content.digest);
        let head = talk.head(&path, &[]).await?;
        head.expect(&[200])?;
        head.says("content-length", &content.length())?;
    }
    Ok(())
}

/// One request, or, where the registry takes that for the beginning of an upload, two.
pub(super) async fn post_with_digest(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("posted blob");
    let to = format!("{}?digest={}", uploads(&talk.session.repository), content.digest);
    let body = Sent::Whole(content.bytes.clone());
    let posted = talk.send(Ask { method: Method::POST, to, headers: typed(BLOB), body }).await?;
    posted.expect(&[201, 202])?;
    if posted.status == 202 {
        let to = end(&location(&posted)?, &content.digest);
        created(&put(talk, to, BLOB, &content.bytes).await?)?;
    }
    is_there(talk, &content).await
}

pub(super) async fn chunks(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("chunked blob");
    let (mut to, mut first) = (begin(talk).await?, 0);
    for part_bytes in [300, 500] {
        let part = content.bytes.slice(first..first + part_bytes);
        let patched = patch(talk, &to, part, first).await?;
        patched.expect(&[202])?;
        first += part_bytes;
        patched.says("range", &format!("0-{}", first - 1))?;
        to = location(&patched)?;
        let status = talk.get(&to, &[]).await?;
        status.expect(&[204])?;
        status.says("range", &format!("0-{}", first - 1))?;
        to = location(&status)?;
    }
    // The last chunk may come with the end.
    created(&put(talk, end(&to, &content.digest), BLOB, &content.bytes.slice(first..)).await?)?;
    is_there(talk, &content).await
}

pub(super) async fn chunk_out_of_order(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("disordered blob");
    let to = begin(talk).await?;
    let early = patch(talk, &to, content.bytes.slice(500..), 500).await?;
    early.expect(&[416])?;
    // Nothing of it was taken, and the upload goes on.
    let patched = patch(talk, &to, content.bytes.slice(..500), 0).await?;
    patched.expect(&[202])?;
    let to = location(&patched)?;
    created(&put(talk, end(&to, &content.digest), BLOB, &content.bytes.slice(500..)).await?)?;
    is_there(talk, &content).await
}

pub(super) async fn streamed(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("streamed blob");
    let to = begin(talk).await?;
    let body = Sent::Streamed(vec![content.bytes.slice(..300), content.bytes.slice(300..)]);
    let patched = talk.send(Ask { method: Method::PATCH, to, headers: typed(BLOB), body }).await?;
    patched.expect(&[202])?;
    let to = end(&location(&patched)?, &content.digest);
    put_nothing(talk, to).await?;
    is_there(talk, &content).await
}

pub(super) async fn wrong_digest(talk: &mut Talk) -> Result<(), Flaw> {
    let (content, other) = (talk.make("mistaken blob"), talk.make("meant blob"));
    let to = begin(talk).await?;
    let refused = put(talk, end(&to, &other.digest), BLOB, &content.bytes).await?;
    refused.expect(&[400])?;
    refused.refuses(&["DIGEST_INVALID"])?;
    let path = talk.blob(&other.digest);
    talk.head(&path, &[]).await?.expect(&[404])
}

pub(super) async fn empty_blob(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.know(Content::new("empty blob", BLOB, Bytes::new()));
    let to = begin(talk).await?;
    put_nothing(talk, end(&to, &content.digest)).await?;
    let path = talk.blob(&content.digest);
    for _ in ["cold", "warm"] {
        let got = talk.get(&path, &[]).await?;
        got.expect(&[200])?;
        got.holds(&content.bytes)?;
    }
    let head = talk.head(&path, &[]).await?;
    head.expect(&[200])?;
    head.says("content-length", "0")
}

pub(super) async fn sha512(talk: &mut Talk) -> Result<(), Flaw> {
    let content = Content::small("blob by SHA-512", &talk.session.seed).by_sha512();
    let content = talk.know(content);
    let to = begin(talk).await?;
    let put = put(talk, end(&to, &content.digest), BLOB, &content.bytes).await?;
    put.supported(&[201])?;
    is_there(talk, &content).await
}

pub(super) async fn mount(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("mounted blob");
    let (repository, other) = (talk.session.repository.clone(), talk.session.other.clone());
    let begun = post(talk, uploads(&other)).await?;
    begun.expect(&[202])?;
    created(&put(talk, end(&location(&begun)?, &content.digest), BLOB, &content.bytes).await?)?;
    // What is in another repository is not in this one. Not with GET: a no is kept for some seconds.
    let path = talk.blob(&content.digest);
    talk.head(&path, &[]).await?.expect(&[404])?;
    let mounted = post(talk, format!("{}?mount={}&from={other}", uploads(&repository), content.digest)).await?;
    mounted.expect(&[201, 202])?;
    mounted.supported(&[201])?;
    location(&mounted)?;
    is_there(talk, &content).await
}

/// What is not there cannot be mounted: an ordinary upload begins.
pub(super) async fn mount_of_nothing(talk: &mut Talk) -> Result<(), Flaw> {
    let (repository, other) = (talk.session.repository.clone(), talk.session.other.clone());
    let begun = post(talk, format!("{}?mount={NOTHING}&from={other}", uploads(&repository))).await?;
    begun.expect(&[202])?;
    location(&begun).map(drop)
}

async fn put_manifest(talk: &mut Talk, reference: &str, content: &Content) -> Result<Reply, Flaw> {
    let to = talk.manifest(reference);
    put(talk, to, &content.media_type, &content.bytes).await
}

async fn push_manifest(talk: &mut Talk, reference: &str, content: &Content) -> Result<Reply, Flaw> {
    let put = put_manifest(talk, reference, content).await?;
    created(&put)?;
    put.says_if_any("docker-content-digest", &content.digest)?;
    Ok(put)
}

pub(super) async fn image(talk: &mut Talk) -> Result<(), Flaw> {
    let (made, tag) = (talk.made()?, talk.session.tag.clone());
    push_manifest(talk, &tag, &made.image).await?;
    push_manifest(talk, &made.other_image.digest, &made.other_image).await.map(drop)
}

pub(super) async fn index(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    push_manifest(talk, "index", &made.index).await?;
    for reference in ["index", &made.index.digest] {
        let path = talk.manifest(reference);
        let got = talk.get(&path, &[("accept", INDEX)]).await?;
        got.expect(&[200])?;
        got.says("content-type", INDEX)?;
        got.holds(&made.index.bytes)?;
    }
    Ok(())
}

pub(super) async fn artifact(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    let put = push_manifest(talk, &made.artifact.digest, &made.artifact).await?;
    let path = talk.manifest(&made.artifact.digest);
    let got = talk.get(&path, &[("accept", IMAGE)]).await?;
    got.expect(&[200])?;
    got.holds(&made.artifact.bytes)?;
    if put.header("oci-subject").is_none() {
        return Err(Flaw::Unsupported("the registry does not look at subjects".to_owned()));
    }
    put.says("oci-subject", &made.image.digest)
}

pub(super) async fn no_manifest(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.know(Content::new("no manifest", IMAGE, "{\"schemaVersion\":2,"));
    let refused = put_manifest(talk, "no-manifest", &content).await?;
    refused.expect(&[400])?;
    refused.refuses(&["MANIFEST_INVALID"])
}

/// A registry may take it, since the blob may come later.
pub(super) async fn image_without_its_blob(talk: &mut Talk) -> Result<(), Flaw> {
    let absent = talk.make("absent blob");
    let content = listing(&absent, None);
    let content = talk.know(content);
    let put = put_manifest(talk, "incomplete", &content).await?;
    put.expect(&[201, 400, 404])?;
    put.refuses(&["MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "MANIFEST_INVALID"])
}

/// A layer that is kept elsewhere is not in the repository, even where the registry takes the manifest.
pub(super) async fn foreign_layer(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    let absent = talk.make("foreign layer");
    let mut content = listing(&absent, Some("https://example.org/layer.tar"));
    content.name = "image with a foreign layer".to_owned();
    let content = talk.know(content);
    push(talk, &made.empty).await?;
    let put = put_manifest(talk, "foreign", &content).await?;
    put.expect(&[201, 400, 404])?;
    let path = talk.blob(&absent.digest);
    let got = talk.get(&path, &[]).await?;
    got.expect(&[404])?;
    got.refuses(&["BLOB_UNKNOWN"])
}

/// An image of the empty config and one layer.
fn listing(layer: &Content, url: Option<&str>) -> Content {
    let config = Content::new("", CONFIG, "{}");
    let mut entry = layer.descriptor();
    let kind = if url.is_some() { "application/vnd.oci.image.layer.nondistributable.v1.tar" } else { LAYER };
    entry["mediaType"] = json!(kind);
    if let Some(url) = url {
        entry["urls"] = json!([url]);
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": IMAGE, "config": config.descriptor(), "layers": [entry],
    });
    Content::new("incomplete image", IMAGE, manifest.to_string())
}

async fn delete(talk: &mut Talk, to: String) -> Result<Reply, Flaw> {
    talk.send(Ask { method: Method::DELETE, to, headers: Vec::new(), body: Sent::Nothing }).await
}

pub(super) async fn delete_tag(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    push_manifest(talk, "doomed", &made.other_image).await?;
    let path = talk.manifest("doomed");
    delete(talk, path.clone()).await?.supported(&[202])?;
    talk.get(&path, &[("accept", IMAGE)]).await?.expect(&[404])
}

pub(super) async fn delete_manifest(talk: &mut Talk) -> Result<(), Flaw> {
    let made = talk.made()?;
    let path = talk.manifest(&made.artifact.digest);
    talk.head(&path, &[("accept", IMAGE)]).await?.expect(&[200])?;
    delete(talk, path.clone()).await?.supported(&[202])?;
    talk.head(&path, &[("accept", IMAGE)]).await?.expect(&[404])?;
    let got = talk.get(&path, &[("accept", IMAGE)]).await?;
    got.expect(&[404])?;
    got.refuses(&["MANIFEST_UNKNOWN"])
}

pub(super) async fn delete_blob(talk: &mut Talk) -> Result<(), Flaw> {
    let content = talk.make("deleted blob");
    push(talk, &content).await?;
    let path = talk.blob(&content.digest);
    delete(talk, path.clone()).await?.supported(&[202])?;
    let got = talk.get(&path, &[]).await?;
    ensure(got.status == 404, || format!("a deleted blob is answered {}", got.status))?;
    got.refuses(&["BLOB_UNKNOWN"])
}
