//! A registry in memory that does all that the distribution specification has, pushes and referrers included, the plain way.
//!
//! It is what the suite is held against where no other registry is installed; a [`Slip`] makes it do one thing wrong.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::unruly::registry::{Algorithm, digest, said};
use crate::unruly::server::{Reply, Seen, reply};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// Something that the registry gets wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slip {
    None,
    /// A range begins a byte late.
    Range,
    /// Chunks are taken in any order.
    Order,
    /// Refusals are web pages.
    Words,
    /// What was deleted stays.
    Deletion,
}

/// Content by digest, in repositories.
pub(crate) struct Store {
    slip: Slip,
    repositories: Mutex<BTreeMap<String, Repository>>,
}

#[derive(Default)]
struct Repository {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: BTreeMap<String, Manifest>,
    tags: BTreeMap<String, String>,
    uploads: Vec<Vec<u8>>,
}

#[derive(Clone)]
struct Manifest {
    media_type: String,
    bytes: Vec<u8>,
    value: Value,
}

impl Store {
    pub(crate) fn new(slip: Slip) -> Self {
        Self { slip, repositories: Mutex::default() }
    }

    /// What is said to a request.
    pub(crate) fn answer(&self, seen: &Seen) -> Reply {
        let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
        let answer = match path.strip_prefix("/v2/") {
            Some("") => reply(200, &[("content-type", "application/json")], b"{}"),
            Some(rest) => self.within(seen, rest, &parameters(query)),
            None => self.refuse(404, "UNSUPPORTED"),
        };
        Reply::Say(said(seen, answer))
    }

    fn within(&self, seen: &Seen, rest: &str, query: &BTreeMap<&str, &str>) -> Vec<u8> {
        for (mark, kind) in [("/blobs/uploads/", 0), ("/blobs/", 1), ("/manifests/", 2), ("/referrers/", 3)] {
            if let Some((name, last)) = rest.rsplit_once(mark) {
                return match kind {
                    0 => self.upload(seen, name, last, query),
                    1 => self.blob(seen, name, last),
                    2 => self.manifest(seen, name, last),
                    _ => self.referrers(name, last, query.get("artifactType").copied()),
                };
            }
        }
        match rest.strip_suffix("/tags/list") {
            Some(name) => self.tags(name, query),
            None => self.refuse(404, "UNSUPPORTED"),
        }
    }

    fn repositories(&self) -> MutexGuard<'_, BTreeMap<String, Repository>> {
        self.repositories.lock().unwrap()
    }

    fn refuse(&self, status: u16, code: &str) -> Vec<u8> {
        if self.slip == Slip::Words {
            return reply(status, &[("content-type", "application/json")], b"{\"sorry\":true}");
        }
        let document = json!({"errors": [{"code": code, "message": "no", "detail": null}]});
        reply(status, &[("content-type", "application/json")], document.to_string().as_bytes())
    }

    fn upload(&self, seen: &Seen, name: &str, id: &str, query: &BTreeMap<&str, &str>) -> Vec<u8> {
        let mut repositories = self.repositories();
        if let (Some(digest), Some(from)) = (query.get("mount"), query.get("from"))
            && let Some(blob) = repositories.get(*from).and_then(|from| from.blobs.get(*digest)).cloned()
        {
            repositories.entry(name.to_owned()).or_default().blobs.insert((*digest).to_owned(), blob);
            return created(name, "blobs", digest, None);
        }
        let repository = repositories.entry(name.to_owned()).or_default();
        let id = match (seen.method.as_str(), id.parse()) {
            ("POST", _) => {
                repository.uploads.push(Vec::new());
                repository.uploads.len() - 1
            }
            (_, Ok(id)) if id < repository.uploads.len() => id,
            _ => return self.refuse(404, "BLOB_UPLOAD_UNKNOWN"),
        };
        let upload = &mut repository.uploads[id];
        let first =
            seen.header("content-range").map(|range| range.split_once('-').unwrap().0.parse::<usize>().unwrap());
        if first.is_some_and(|first| first != upload.len()) && self.slip != Slip::Order {
            return self.refuse(416, "BLOB_UPLOAD_INVALID");
        }
        upload.extend_from_slice(&seen.body);
        if let Some(claimed) = query.get("digest") {
            let algorithm = if claimed.starts_with("sha512:") { Algorithm::Sha512 } else { Algorithm::Sha256 };
            let blob = std::mem::take(upload);
            if digest(algorithm, &blob) != *claimed {
                return self.refuse(400, "DIGEST_INVALID");
            }
            repository.blobs.insert((*claimed).to_owned(), blob);
            return created(name, "blobs", claimed, None);
        }
        let location = format!("/v2/{name}/blobs/uploads/{id}");
        let range = format!("0-{}", upload.len().saturating_sub(1));
        let status = if seen.method == "GET" { 204 } else { 202 };
        let answer = reply(status, &[("location", &location), ("range", &range)], b"");
        if status == 204 { bodiless(&answer) } else { answer }
    }

    fn blob(&self, seen: &Seen, name: &str, digest: &str) -> Vec<u8> {
        let mut repositories = self.repositories();
        let blobs = repositories.get_mut(name).map(|repository| &mut repository.blobs);
        let Some(blobs) = blobs.filter(|blobs| blobs.contains_key(digest)) else {
            let (algorithm, hex) = digest.split_once(':').unwrap_or_default();
            let length = if algorithm == "sha512" { 128 } else { 64 };
            let known = hex.len() == length && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            return if known { self.refuse(404, "BLOB_UNKNOWN") } else { self.refuse(400, "DIGEST_INVALID") };
        };
        if seen.method == "DELETE" {
            if self.slip != Slip::Deletion {
                blobs.remove(digest);
            }
            return reply(202, &[], b"");
        }
        let (blob, tag) = (&blobs[digest], format!("\"{digest}\""));
        let headers = [
            ("content-type", "application/octet-stream"),
            ("docker-content-digest", digest),
            ("etag", &tag),
            ("accept-ranges", "bytes"),
            ("cache-control", "max-age=31536000"),
            ("docker-distribution-api-version", "registry/2.0"),
        ];
        if seen.header("if-none-match") == Some(&tag) {
            return bodiless(&reply(304, &headers[1..], b""));
        }
        // Several ranges come as the whole.
        let range = seen.header("range").filter(|range| seen.method == "GET" && !range.contains(','));
        let Some(range) = range else { return reply(200, &headers, blob) };
        match byte_range(range, blob.len()) {
            None => self.refuse(416, "SIZE_INVALID"),
            Some((first, end)) if first >= end => {
                let range = format!("bytes */{}", blob.len());
                let refusal = self.refuse(416, "SIZE_INVALID");
                let text = String::from_utf8(refusal).unwrap();
                text.replacen("\r\n", &format!("\r\ncontent-range: {range}\r\n"), 1).into_bytes()
            }
            Some((first, end)) => {
                let first = if self.slip == Slip::Range { first + 1 } else { first };
                let range = format!("bytes {first}-{}/{}", end - 1, blob.len());
                let headers = [&headers[..], &[("content-range", range.as_str())]].concat();
                reply(206, &headers, &blob[first..end])
            }
        }
    }

    fn manifest(&self, seen: &Seen, name: &str, reference: &str) -> Vec<u8> {
        let mut repositories = self.repositories();
        if seen.method == "PUT" {
            return self.put_manifest(seen, repositories.entry(name.to_owned()).or_default(), name, reference);
        }
        let Some(repository) = repositories.get_mut(name) else { return self.refuse(404, "NAME_UNKNOWN") };
        let digest = repository.tags.get(reference).cloned().unwrap_or_else(|| reference.to_owned());
        let Some(manifest) = repository.manifests.get(&digest) else { return self.refuse(404, "MANIFEST_UNKNOWN") };
        if seen.method == "DELETE" {
            if self.slip == Slip::Deletion {
            } else if reference.contains(':') {
                repository.manifests.remove(&digest);
                repository.tags.retain(|_, tagged| *tagged != digest);
            } else {
                repository.tags.remove(reference);
            }
            return reply(202, &[], b"");
        }
        let headers = [("content-type", manifest.media_type.as_str()), ("docker-content-digest", &digest)];
        reply(200, &headers, &manifest.bytes)
    }

    fn put_manifest(&self, seen: &Seen, repository: &mut Repository, name: &str, reference: &str) -> Vec<u8> {
        let Ok(value) = serde_json::from_slice::<Value>(&seen.body) else {
            return self.refuse(400, "MANIFEST_INVALID");
        };
        let listed = value["layers"].as_array().into_iter().flatten().chain(value.get("config"));
        let absent = listed.filter(|entry| entry.get("urls").is_none()).any(|entry| {
            let digest = entry["digest"].as_str().unwrap_or_default();
            !repository.blobs.contains_key(digest)
        });
        if absent {
            return self.refuse(400, "MANIFEST_BLOB_UNKNOWN");
        }
        let digest = digest(Algorithm::Sha256, &seen.body);
        let subject = value["subject"]["digest"].as_str().map(str::to_owned);
        let media_type = seen.header("content-type").unwrap_or_default().to_owned();
        repository.manifests.insert(digest.clone(), Manifest { media_type, bytes: seen.body.clone(), value });
        if !reference.contains(':') {
            repository.tags.insert(reference.to_owned(), digest.clone());
        }
        created(name, "manifests", &digest, subject.as_deref())
    }

    fn tags(&self, name: &str, query: &BTreeMap<&str, &str>) -> Vec<u8> {
        let repositories = self.repositories();
        let Some(repository) = repositories.get(name) else { return self.refuse(404, "NAME_UNKNOWN") };
        let after = repository.tags.keys().filter(|tag| query.get("last").is_none_or(|last| tag.as_str() > *last));
        let most = query.get("n").map_or(usize::MAX, |n| n.parse().unwrap());
        let list = json!({"name": name, "tags": after.take(most).collect::<Vec<_>>()});
        reply(200, &[("content-type", "application/json")], list.to_string().as_bytes())
    }

    fn referrers(&self, name: &str, digest: &str, kind: Option<&str>) -> Vec<u8> {
        let repositories = self.repositories();
        let manifests = repositories.get(name).into_iter().flat_map(|repository| &repository.manifests);
        let referring = manifests.filter(|(_, manifest)| manifest.value["subject"]["digest"] == digest);
        let descriptors = referring.map(|(digest, manifest)| {
            let kind = &manifest.value["artifactType"];
            json!({"mediaType": manifest.media_type, "digest": digest, "size": manifest.bytes.len(), "artifactType": kind})
        });
        let some: Vec<_> = descriptors.filter(|it| kind.is_none_or(|kind| it["artifactType"] == kind)).collect();
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": some});
        let mut headers = vec![("content-type", INDEX)];
        headers.extend(kind.map(|_| ("oci-filters-applied", "artifactType")));
        reply(200, &headers, index.to_string().as_bytes())
    }
}

fn created(name: &str, kind: &str, digest: &str, subject: Option<&str>) -> Vec<u8> {
    let location = format!("/v2/{name}/{kind}/{digest}");
    let mut headers = vec![("location", location.as_str()), ("docker-content-digest", digest)];
    headers.extend(subject.map(|subject| ("oci-subject", subject)));
    reply(201, &headers, b"")
}

/// Answers that never have a body have no length either.
fn bodiless(answer: &[u8]) -> Vec<u8> {
    String::from_utf8_lossy(answer).replace("content-length: 0\r\n", "").into_bytes()
}

fn parameters(query: &str) -> BTreeMap<&str, &str> {
    query.split('&').filter_map(|parameter| parameter.split_once('=')).collect()
}

/// First byte and end of one range, which may be empty; None for what is no range, which Go's library refuses.
fn byte_range(text: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    match (first, last) {
        ("", last) => Some((length.saturating_sub(last.parse().ok()?), length)),
        (first, "") => Some((first.parse().ok()?, length)),
        (first, last) => {
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            (first <= last).then_some((first, length.min(last + 1)))
        }
    }
}
