//! What a registry has to do, by the [distribution specification] of the Open Container Initiative (1.1), asked of any base
//! URL: pulls, the ways of asking for a part of a blob, pushes, mounts, referrers, deletion.
//!
//! A [`Verdict`] holds, beside whether the case came out as specified, every answer in names that do not depend on the run.
//! So the same registry can be asked by two ways, directly and through an agent, and must get equal verdicts case by case,
//! whatever it supports.
//!
//! [distribution specification]: https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md

mod args;
mod content;
mod http;
mod pull;
mod push;
mod talk;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use content::{Content, Made};
use http::{Ask, Reply, Sent};
pub use http::{Target, trust};
use talk::{Flaw, Session, Talk};

pub use args::main;
pub use talk::Answer;

/// A blob that is worth asking for parts of has so many bytes, and one that is read several times not too many.
const LAYER_BYTES: std::ops::RangeInclusive<u64> = 256..=64 << 20;

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Content that is pushed. Another repository with the same content is new to the registry, and none to caches.
    Pushed {
        /// What the content follows from. Runs that are compared have seeds of one length.
        seed: String,
        /// Where to; a second repository's name begins with this one's. Likewise of one length.
        repository: String,
    },
    /// An image that is there, by repository and tag. Nothing is pushed and nothing deleted.
    There(String, String),
}

/// How a case came out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// As specified.
    Conforms,
    /// The registry does without something that it need not have.
    Unsupported(String),
    /// Otherwise than specified.
    Violates(String),
}

/// One case's result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The case.
    pub case: String,
    /// How it came out.
    pub outcome: Outcome,
    /// What was said on the way.
    pub answers: Vec<Answer>,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Conforms => write!(f, "{:28} conforms", self.case),
            Outcome::Unsupported(why) => write!(f, "{:28} not supported: {why}", self.case),
            Outcome::Violates(why) => write!(f, "{:28} VIOLATES: {why}", self.case),
        }
    }
}

type Running<'a> = Pin<Box<dyn Future<Output = Result<(), Flaw>> + Send + 'a>>;

struct Case {
    name: &'static str,
    /// Whether it needs content of this suite in the registry.
    pushes: bool,
    run: for<'a> fn(&'a mut Talk) -> Running<'a>,
}

macro_rules! case {
    ($name:literal, pull, $run:path) => {
        Case { name: $name, pushes: false, run: |talk| Box::pin($run(talk)) }
    };
    ($name:literal, push, $run:path) => {
        Case { name: $name, pushes: true, run: |talk| Box::pin($run(talk)) }
    };
}

/// In their order: what is pushed is pulled then, parts of the layer before the whole and after it, and deleted at last.
const CASES: &[Case] = &[
    case!("base", pull, pull::base),
    case!("blob-post-put", push, push::post_and_put),
    case!("blob-post-with-digest", push, push::post_with_digest),
    case!("blob-chunks", push, push::chunks),
    case!("blob-chunk-out-of-order", push, push::chunk_out_of_order),
    case!("blob-streamed", push, push::streamed),
    case!("blob-wrong-digest", push, push::wrong_digest),
    case!("blob-empty", push, push::empty_blob),
    case!("blob-sha512", push, push::sha512),
    case!("mount", push, push::mount),
    case!("mount-of-nothing", push, push::mount_of_nothing),
    case!("image", push, push::image),
    case!("index", push, push::index),
    case!("artifact", push, push::artifact),
    case!("no-manifest", push, push::no_manifest),
    case!("image-without-its-blob", push, push::image_without_its_blob),
    case!("foreign-layer", push, push::foreign_layer),
    case!("range-first-bytes", pull, pull::first_bytes),
    case!("range-middle", pull, pull::middle_bytes),
    case!("range-open-end", pull, pull::open_end),
    case!("range-suffix", pull, pull::suffix),
    case!("range-past-the-end", pull, pull::past_the_end),
    case!("range-unsatisfiable", pull, pull::unsatisfiable),
    case!("range-several", pull, pull::several_ranges),
    case!("range-malformed", pull, pull::malformed_range),
    case!("manifest-by-tag", pull, pull::manifest_by_tag),
    case!("manifest-by-digest", pull, pull::manifest_by_digest),
    case!("images-of-an-index", push, pull::images_of_an_index),
    case!("manifest-unknown", pull, pull::manifest_unknown),
    case!("repository-unknown", pull, pull::repository_unknown),
    case!("blob-head", pull, pull::blob_head),
    case!("blob", pull, pull::blob),
    case!("blob-on-condition", pull, pull::blob_on_condition),
    case!("blob-unknown", pull, pull::blob_unknown),
    case!("blob-elsewhere", pull, pull::blob_elsewhere),
    case!("digest-malformed", pull, pull::digest_malformed),
    case!("warm-range-first-bytes", pull, pull::first_bytes),
    case!("warm-range-middle", pull, pull::middle_bytes),
    case!("warm-range-open-end", pull, pull::open_end),
    case!("warm-range-suffix", pull, pull::suffix),
    case!("warm-range-past-the-end", pull, pull::past_the_end),
    case!("warm-range-unsatisfiable", pull, pull::unsatisfiable),
    case!("warm-range-several", pull, pull::several_ranges),
    case!("warm-range-malformed", pull, pull::malformed_range),
    case!("tags", pull, pull::tags),
    case!("tags-some", pull, pull::some_tags),
    case!("tags-of-nothing", pull, pull::tags_of_nothing),
    case!("referrers", pull, pull::referrers),
    case!("delete-tag", push, push::delete_tag),
    case!("delete-manifest", push, push::delete_manifest),
    case!("delete-blob", push, push::delete_blob),
];

/// Runs all cases that the subject admits.
///
/// # Errors
/// If an image that should be there cannot be read. Whatever a case comes upon is in its verdict.
pub async fn run(target: &Target, subject: &Subject) -> Result<Vec<Verdict>> {
    let session = Arc::new(match subject {
        Subject::Pushed { seed, repository } => made(target, seed, repository),
        Subject::There(repository, tag) => found(target, repository, tag).await?,
    });
    let mut verdicts = Vec::new();
    for case in CASES.iter().filter(|case| session.made.is_some() || !case.pushes) {
        let mut talk = Talk::new(Arc::clone(&session));
        let ended = (case.run)(&mut talk).await;
        let why = match &ended {
            Ok(()) => "",
            Err(Flaw::Unsupported(why) | Flaw::Violates(why)) => why,
        };
        let (answers, why) = talk.end(why);
        let outcome = match ended {
            Ok(()) => Outcome::Conforms,
            Err(Flaw::Unsupported(_)) => Outcome::Unsupported(why),
            Err(Flaw::Violates(_)) => Outcome::Violates(why),
        };
        verdicts.push(Verdict { case: case.name.to_owned(), outcome, answers });
    }
    Ok(verdicts)
}

/// What two ways to one registry do not have in common, a line for each case.
#[must_use]
pub fn differences(own: &[Verdict], other: &[Verdict]) -> Vec<String> {
    let mut lines = Vec::new();
    if own.len() != other.len() {
        lines.push(format!("{} cases instead of {}", other.len(), own.len()));
    }
    for (own, other) in own.iter().zip(other).filter(|(own, other)| own != other) {
        let answers = own.answers.iter().zip(&other.answers).find(|(own, other)| own != other);
        lines.push(match answers {
            Some((own, other)) => format!("{other_case}: {other:?} instead of {own:?}", other_case = own.asked),
            None => format!("{other} instead of {own}"),
        });
        if let Some(line) = lines.last_mut() {
            *line = format!("{}: {line}", own.case);
        }
    }
    lines
}

fn made(target: &Target, seed: &str, repository: &str) -> Session {
    let made = Made::new(seed);
    Session {
        target: target.clone(),
        repository: repository.to_owned(),
        other: format!("{repository}-other"),
        tag: "latest".to_owned(),
        image: made.image.clone(),
        layer: made.layer.clone(),
        seed: seed.to_owned(),
        made: Some(made),
    }
}

/// Reads an image that is there: the first of an index, and a layer of it.
async fn found(target: &Target, repository: &str, tag: &str) -> Result<Session> {
    let manifest = |reference: &str| format!("/v2/{repository}/manifests/{reference}");
    let mut reference = tag.to_owned();
    let mut reply = read(target, manifest(tag)).await?;
    let mut value: Value = serde_json::from_slice(&reply.body).context("not a manifest")?;
    if let Some(first) = value["manifests"][0]["digest"].as_str() {
        reference = first.to_owned();
        reply = read(target, manifest(first)).await?;
        value = serde_json::from_slice(&reply.body).context("not a manifest")?;
    }
    let media_type = reply.header("content-type").context("a manifest without a type")?.to_owned();
    let image = Content::new("image", &media_type, reply.body);
    let layers = value["layers"].as_array().context("an image without layers")?;
    let layer = layers.iter().find(|layer| layer["size"].as_u64().is_some_and(|size| LAYER_BYTES.contains(&size)));
    let digest = layer.context("no layer of a useful size")?["digest"].as_str().context("a layer without a digest")?;
    let bytes = read(target, format!("/v2/{repository}/blobs/{digest}")).await?.body;
    let layer = Content::new("layer", content::BLOB, bytes);
    ensure!(layer.digest == digest, "{digest} came as {}", layer.digest);
    Ok(Session {
        target: target.clone(),
        repository: repository.to_owned(),
        other: format!("{repository}-other"),
        tag: reference,
        image,
        layer,
        seed: String::new(),
        made: None,
    })
}

async fn read(target: &Target, to: String) -> Result<Reply> {
    let headers = vec![("accept", pull::ACCEPTED.to_owned())];
    let ask = Ask { method: hyper::Method::GET, to, headers, body: Sent::Nothing };
    let reply = target.send(&ask).await?;
    if reply.status != 200 || reply.cut {
        bail!("{} was answered {}", ask.to, reply.status);
    }
    Ok(reply)
}
