//! What one case says to a registry and hears from it, written down so that two ways to the same registry can be compared.
//!
//! Names stand for what differs between runs by intention: repositories, digests, hosts, uploads.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::content::{Content, Made, sha256};
use super::http::{Ask, Reply, Sent, Target};

/// Headers of a success that clients go by.
const TOLD: [&str; 14] = [
    "accept-ranges",
    "cache-control",
    "content-length",
    "content-range",
    "content-type",
    "docker-content-digest",
    "docker-distribution-api-version",
    "docker-upload-uuid",
    "etag",
    "link",
    "location",
    "oci-filters-applied",
    "oci-subject",
    "range",
];

/// Headers of a refusal that clients go by.
const TOLD_OF_REFUSALS: [&str; 4] = ["content-range", "content-type", "retry-after", "www-authenticate"];

/// What was asked and answered, in names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Method, path and range.
    pub asked: String,
    /// The status.
    pub status: u16,
    /// The headers that matter.
    pub headers: BTreeMap<String, String>,
    /// What the body is.
    pub body: String,
}

/// Why a case does not come out as the specification says.
#[derive(Debug)]
pub(super) enum Flaw {
    /// The specification leaves it to the registry, and this one does without.
    Unsupported(String),
    /// The specification says otherwise.
    Violates(String),
}

impl From<anyhow::Error> for Flaw {
    fn from(error: anyhow::Error) -> Self {
        Self::Violates(format!("{error:#}"))
    }
}

/// What all cases of a run have in common.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) target: Target,
    pub(super) repository: String,
    /// A second repository, for mounting.
    pub(super) other: String,
    /// The image's tag.
    pub(super) tag: String,
    pub(super) image: Content,
    /// A blob of the image with some hundred bytes at least.
    pub(super) layer: Content,
    /// Tells this run's content from others'.
    pub(super) seed: String,
    /// What is pushed; None where an image that is there already is read.
    pub(super) made: Option<Made>,
}

/// One case's conversation.
#[derive(Debug)]
pub(super) struct Talk {
    pub(super) session: Arc<Session>,
    /// Content that this case made, beside the session's.
    known: Vec<Content>,
    uploads: Vec<String>,
    answers: Vec<Answer>,
}

impl Talk {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session, known: Vec::new(), uploads: Vec::new(), answers: Vec::new() }
    }

    /// Makes content that only this case knows.
    pub(super) fn make(&mut self, name: &str) -> Content {
        self.know(Content::small(name, &self.session.seed))
    }

    /// Lets the conversation speak of content by its name.
    pub(super) fn know(&mut self, content: Content) -> Content {
        self.known.push(content.clone());
        content
    }

    /// The image and artifact that this run pushes.
    pub(super) fn made(&self) -> Result<Made, Flaw> {
        self.session.made.clone().ok_or_else(|| Flaw::Unsupported("nothing is pushed in this run".to_owned()))
    }

    pub(super) fn blob(&self, digest: &str) -> String {
        format!("/v2/{}/blobs/{digest}", self.session.repository)
    }

    pub(super) fn manifest(&self, reference: &str) -> String {
        format!("/v2/{}/manifests/{reference}", self.session.repository)
    }

    pub(super) async fn get(&mut self, path: &str, headers: &[(&'static str, &str)]) -> Result<Reply, Flaw> {
        self.read(Method::GET, path, headers).await
    }

    pub(super) async fn head(&mut self, path: &str, headers: &[(&'static str, &str)]) -> Result<Reply, Flaw> {
        let reply = self.read(Method::HEAD, path, headers).await?;
        ensure(reply.body.is_empty(), || "HEAD was answered with a body".to_owned())?;
        Ok(reply)
    }

    async fn read(&mut self, method: Method, path: &str, headers: &[(&'static str, &str)]) -> Result<Reply, Flaw> {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.send(Ask { method, to: path.to_owned(), headers, body: Sent::Nothing }).await
    }

    /// Sends a request and writes down what came.
    pub(super) async fn send(&mut self, ask: Ask) -> Result<Reply, Flaw> {
        let reply = self.session.target.send(&ask).await?;
        let location = reply.header("location").map(str::to_owned);
        // The answers that say where an upload goes on.
        let upload = matches!(reply.status.as_u16(), 202 | 204).then_some(location).flatten();
        self.uploads.extend(upload);
        let answer = self.told(&ask, &reply);
        self.answers.push(answer);
        Ok(reply)
    }

    /// What was said, and a text with names in it.
    pub(super) fn end(self, message: &str) -> (Vec<Answer>, String) {
        let message = self.named(message);
        (self.answers, message)
    }

    fn told(&self, ask: &Ask, reply: &Reply) -> Answer {
        let path = if self.is_upload(&ask.to) { "<upload>".to_owned() } else { self.named(&ask.to) };
        let mut asked = format!("{} {path}", ask.method);
        for (name, value) in ask.headers.iter().filter(|(name, _)| matches!(*name, "range" | "content-range")) {
            asked += &format!(" {name}: {value}");
        }
        let names: &[&str] = match reply.status {
            // docker-registry gives the blob's own length and type with it.
            StatusCode::RANGE_NOT_SATISFIABLE => &TOLD_OF_REFUSALS[..1],
            status if status.is_client_error() || status.is_server_error() => &TOLD_OF_REFUSALS,
            _ => &TOLD,
        };
        let said = names.iter().filter_map(|name| Some(((*name).to_owned(), self.header(reply, name)?)));
        Answer { asked, status: reply.status.as_u16(), headers: said.collect(), body: self.body(&ask.method, reply) }
    }

    fn is_upload(&self, to: &str) -> bool {
        self.uploads.iter().any(|upload| to.starts_with(upload.as_str()))
    }

    fn header(&self, reply: &Reply, name: &str) -> Option<String> {
        let value = reply.header(name)?;
        Some(match name {
            "location" if self.is_upload(value) => "<upload>".to_owned(),
            "docker-upload-uuid" => "<upload>".to_owned(),
            "location" => self.named(path_of(value)),
            // The part separators are drawn at random, and a charset says nothing about JSON.
            "content-type" if reply.boundary().is_some() => "multipart/byteranges".to_owned(),
            "content-type" if !reply.status.is_success() => essence(value).to_owned(),
            "content-length" if reply.boundary().is_some() => return None,
            _ => self.named(value),
        })
    }

    fn body(&self, method: &Method, reply: &Reply) -> String {
        let bytes = &reply.body;
        // What is said about a range that cannot be is for nobody's eyes.
        if *method == Method::HEAD || reply.status == StatusCode::RANGE_NOT_SATISFIABLE {
            return String::new();
        }
        if reply.cut {
            return format!("cut after {} bytes", bytes.len());
        }
        if !reply.status.is_success() {
            return reply.error_codes().map_or_else(|| "no error document".to_owned(), |codes| codes.join(" "));
        }
        if let Some(boundary) = reply.boundary() {
            let separators = count(bytes, boundary.as_bytes());
            return format!("{separators} separators, {} bytes", bytes.len() - separators * boundary.len());
        }
        if bytes.is_empty() {
            return "empty".to_owned();
        }
        if let Some(content) = self.contents().find(|content| content.bytes == *bytes) {
            return content.name.clone();
        }
        if let Some((content, first)) = self.contents().find_map(|content| Some((content, part(content, reply)?))) {
            return format!("{}[{first}..{}]", content.name, first + bytes.len());
        }
        match serde_json::from_slice::<Value>(bytes) {
            Ok(value) => self.named(&value.to_string()),
            Err(_) => format!("{} bytes of something else", bytes.len()),
        }
    }

    fn contents(&self) -> impl Iterator<Item = &Content> {
        let made = self.session.made.iter().flat_map(Made::all);
        made.chain([&self.session.image, &self.session.layer]).chain(&self.known)
    }

    fn named(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for content in self.contents() {
            text = text.replace(&content.digest, &format!("<{}>", content.name));
            // docker-registry calls a blob that was pushed by its SHA-512 by its SHA-256.
            if content.digest.starts_with("sha512:") {
                text = text.replace(&sha256(&content.bytes), &format!("<{}, by SHA-256>", content.name));
            }
        }
        text = text.replace(&self.session.other, "<other>").replace(&self.session.repository, "<repository>");
        match self.session.target.base.authority() {
            Some(authority) => text.replace(authority.as_str(), "<registry>"),
            None => text,
        }
    }
}

impl Reply {
    /// A header's text; None if it is missing or not text.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Any of these statuses, or a violation.
    pub(super) fn expect(&self, statuses: &[u16]) -> Result<(), Flaw> {
        let status = self.status.as_u16();
        ensure(statuses.contains(&status), || {
            let codes = self.error_codes().unwrap_or_default().join(" ");
            format!("{status} {codes} instead of {statuses:?}")
        })
    }

    /// Any of these statuses, or a registry that does without this.
    pub(super) fn supported(&self, statuses: &[u16]) -> Result<(), Flaw> {
        if statuses.contains(&self.status.as_u16()) {
            return Ok(());
        }
        Err(Flaw::Unsupported(format!("answered {}", self.status.as_u16())))
    }

    /// A header with this text, or a violation.
    pub(super) fn says(&self, name: &str, expected: &str) -> Result<(), Flaw> {
        ensure(self.header(name) == Some(expected), || {
            format!("{name} is {:?} instead of {expected:?}", self.header(name))
        })
    }

    /// A header that need not be there, but if it is, with this text.
    pub(super) fn says_if_any(&self, name: &str, expected: &str) -> Result<(), Flaw> {
        if self.header(name).is_some() { self.says(name, expected) } else { Ok(()) }
    }

    /// The whole content, or a violation.
    pub(super) fn holds(&self, expected: &Bytes) -> Result<(), Flaw> {
        ensure(!self.cut && self.body == *expected, || {
            let cut = if self.cut { ", cut" } else { "" };
            format!("the body is something else: {} bytes instead of {}{cut}", self.body.len(), expected.len())
        })
    }

    /// A refusal whose document, if there is one in JSON, is the specification's with one of these codes.
    pub(super) fn refuses(&self, codes: &[&str]) -> Result<(), Flaw> {
        let is_json = self.header("content-type").is_some_and(|value| essence(value) == "application/json");
        if !is_json || self.body.is_empty() {
            return Ok(());
        }
        let said = self.error_codes().ok_or_else(|| Flaw::Violates("JSON that is no error document".to_owned()))?;
        ensure(said.iter().any(|code| codes.contains(&code.as_str())), || format!("{said:?} instead of {codes:?}"))
    }

    /// The codes of the specification's error document.
    fn error_codes(&self) -> Option<Vec<String>> {
        let document: Value = serde_json::from_slice(&self.body).ok()?;
        let errors = document.get("errors")?.as_array()?;
        errors.iter().map(|error| Some(error.get("code")?.as_str()?.to_owned())).collect()
    }

    /// What separates the parts of a multipart body.
    pub(super) fn boundary(&self) -> Option<&str> {
        let value = self.headers.get(CONTENT_TYPE)?.to_str().ok()?;
        value.strip_prefix("multipart/byteranges;")?.trim().strip_prefix("boundary=")
    }
}

/// A violation unless it `holds`.
pub(super) fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), Flaw> {
    if holds { Ok(()) } else { Err(Flaw::Violates(message())) }
}

/// Where in `content` the body is, if it is what its `Content-Range` says.
fn part(content: &Content, reply: &Reply) -> Option<usize> {
    let range = reply.header("content-range")?.strip_prefix("bytes ")?;
    let first: usize = range.split_once('-')?.0.parse().ok()?;
    let said = content.bytes.get(first..first.checked_add(reply.body.len())?)?;
    (reply.body == said).then_some(first)
}

/// A URL without its scheme and host.
fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map(|(_, rest)| rest);
    rest.map_or(url, |rest| rest.find('/').map_or("/", |at| &rest[at..]))
}

/// A media type without its parameters.
fn essence(value: &str) -> &str {
    value.split(';').next().unwrap_or_default().trim()
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    if what.is_empty() { 0 } else { bytes.windows(what.len()).filter(|window| *window == what).count() }
}
