//! Two private registries with the same users and repositories: one asks for passwords, the other for tokens of a token
//! server. Who may read what can change while they run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::unruly::server::{Origin, Reply, Seen, reply};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// How a registry asks who somebody is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Basic,
    Bearer,
}

/// What both registries and the token server know.
pub(super) struct Office {
    /// Salted hashes, as an htpasswd file has them.
    passwords: BTreeMap<String, (String, [u8; 32])>,
    rights: BTreeSet<(String, String)>,
    /// Whom a token was given to, and for which repository, if he may read it.
    tokens: Mutex<BTreeMap<String, Option<(String, String)>>>,
    blobs: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

/// The servers. They end when dropped.
pub(super) struct Guarded {
    pub(super) office: Arc<Office>,
    basic: Origin,
    bearer: Origin,
    token_server: Origin,
}

/// A user's `Authorization`.
pub(super) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// The digest of a blob, as registries write it.
pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

// === impl Guarded ===

impl Guarded {
    /// Users with passwords, who may read what, and the blobs of every repository.
    pub(super) async fn start(
        ip: IpAddr,
        users: &[(&str, &str)],
        rights: &[(&str, &str)],
        blobs: &[(&str, &[Vec<u8>])],
    ) -> Self {
        let hashed = users.iter().map(|(user, password)| {
            let salt = format!("{:016x}", rand::random::<u64>());
            ((*user).to_owned(), (salt.clone(), hash(&salt, password)))
        });
        let named = |blob: &Vec<u8>| (digest(blob), blob.clone());
        let office = Arc::new(Office {
            passwords: hashed.collect(),
            rights: rights.iter().map(|(user, name)| ((*user).to_owned(), (*name).to_owned())).collect(),
            tokens: Mutex::default(),
            blobs: blobs.iter().map(|(name, held)| ((*name).to_owned(), held.iter().map(named).collect())).collect(),
        });
        let at = format!("{ip}:0");
        let its = office.clone();
        let token_server = Origin::start_at(&at, None, move |seen| its.token(seen)).await;
        let realm = format!("http://{}/token", token_server.address);
        let (its, asks) = (office.clone(), realm.clone());
        let basic = Origin::start_at(&at, None, move |seen| its.answer(Scheme::Basic, &asks, seen)).await;
        let its = office.clone();
        let bearer = Origin::start_at(&at, None, move |seen| its.answer(Scheme::Bearer, &realm, seen)).await;
        Self { office, basic, bearer, token_server }
    }

    pub(super) fn registry(&self, scheme: Scheme) -> &Origin {
        match scheme {
            Scheme::Basic => &self.basic,
            Scheme::Bearer => &self.bearer,
        }
    }

    pub(super) fn token_server(&self) -> &Origin {
        &self.token_server
    }

    pub(super) fn addresses(&self) -> [SocketAddr; 3] {
        [self.basic.address, self.bearer.address, self.token_server.address]
    }

    /// The path that the token server is asked at.
    pub(super) fn token_path(name: &str) -> String {
        format!("/token?service=guarded&scope=repository:{name}:pull")
    }
}

// === impl Office ===

impl Office {
    /// Everything that was ever given out as a token.
    pub(super) fn tokens(&self) -> Vec<String> {
        self.tokens.lock().unwrap().keys().cloned().collect()
    }

    /// What a registry says to somebody who wants to read a repository: nothing if he may.
    pub(super) fn refuses(&self, scheme: Scheme, authorization: Option<&str>, name: &str) -> Option<u16> {
        let user = match scheme {
            Scheme::Basic => authorization.and_then(|text| self.user(text)),
            Scheme::Bearer => {
                let token = authorization.and_then(|text| text.strip_prefix("Bearer "));
                let granted = token.and_then(|token| self.tokens.lock().unwrap().get(token).cloned());
                return match granted {
                    Some(Some((user, of))) if of == name && self.may(&user, name) => None,
                    _ => Some(401),
                };
            }
        };
        match user {
            None => Some(401),
            Some(user) if self.may(&user, name) => None,
            Some(_) => Some(403),
        }
    }

    pub(super) fn blob(&self, name: &str, digest: &str) -> Option<&Vec<u8>> {
        self.blobs.get(name)?.get(digest)
    }

    fn may(&self, user: &str, name: &str) -> bool {
        self.rights.contains(&(user.to_owned(), name.to_owned()))
    }

    fn user(&self, authorization: &str) -> Option<String> {
        let pair = STANDARD.decode(authorization.strip_prefix("Basic ")?).ok()?;
        let (user, password) = std::str::from_utf8(&pair).ok()?.split_once(':')?;
        let (salt, hashed) = self.passwords.get(user)?;
        (hash(salt, password) == *hashed).then(|| user.to_owned())
    }

    /// Gives whoever has a password a token, which opens what he may read, and so perhaps nothing.
    fn token(&self, seen: &Seen) -> Reply {
        let Some(user) = seen.header("authorization").and_then(|text| self.user(text)) else {
            return Reply::Say(reply(401, &[("www-authenticate", "Basic realm=\"tokens\"")], b"{}"));
        };
        let name = seen.path.split_once("scope=repository:").and_then(|(_, rest)| rest.strip_suffix(":pull"));
        let name = name.unwrap_or_default().to_owned();
        let token = format!("tok3n-{:032x}", rand::random::<u128>());
        let opens = self.may(&user, &name).then_some((user, name));
        self.tokens.lock().unwrap().insert(token.clone(), opens);
        let document = json!({"token": token, "expires_in": 300}).to_string();
        Reply::Say(reply(200, &[("content-type", "application/json")], document.as_bytes()))
    }

    fn answer(&self, scheme: Scheme, realm: &str, seen: &Seen) -> Reply {
        let named = seen.path.strip_prefix("/v2/").and_then(|rest| {
            let (rest, last) = rest.rsplit_once('/')?;
            let (name, kind) = rest.rsplit_once('/')?;
            Some((name, kind, last))
        });
        let Some((name, kind, last)) = named else { return Reply::Say(said(seen, reply(404, &[], b"{}"))) };
        if let Some(status) = self.refuses(scheme, seen.header("authorization"), name) {
            let challenge = match scheme {
                Scheme::Basic => "Basic realm=\"guarded\"".to_owned(),
                Scheme::Bearer => {
                    format!("Bearer realm=\"{realm}\",service=\"guarded\",scope=\"repository:{name}:pull\"")
                }
            };
            let document = b"{\"errors\":[{\"code\":\"DENIED\",\"message\":\"not for you\"}]}";
            return Reply::Say(said(seen, reply(status, &[("www-authenticate", &challenge)], document)));
        }
        match kind {
            "manifests" => {
                let manifest = self.manifest(name);
                let of = digest(&manifest);
                let headers = [("content-type", MANIFEST_TYPE), ("docker-content-digest", of.as_str())];
                Reply::Say(said(seen, reply(200, &headers, &manifest)))
            }
            "blobs" => match self.blob(name, last) {
                Some(blob) => Reply::Say(said(seen, served(seen, blob, last))),
                None => Reply::Say(said(seen, reply(404, &[], b"{}"))),
            },
            _ => Reply::Say(said(seen, reply(404, &[], b"{}"))),
        }
    }

    fn manifest(&self, name: &str) -> Vec<u8> {
        let held = self.blobs.get(name).into_iter().flatten();
        let layers: Vec<_> = held
            .map(|(digest, blob)| {
                json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": blob.len()})
            })
            .collect();
        let document = json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": layers});
        document.to_string().into_bytes()
    }
}

fn hash(salt: &str, password: &str) -> [u8; 32] {
    Sha256::digest(format!("{salt}:{password}")).into()
}

fn served(seen: &Seen, blob: &[u8], name: &str) -> Vec<u8> {
    let length = blob.len();
    match seen.range() {
        Some(range) if range.start < length => {
            let range = range.start..range.end.min(length);
            let part = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            reply(206, &[("content-range", &part), ("docker-content-digest", name)], &blob[range])
        }
        _ => reply(200, &[("docker-content-digest", name)], blob),
    }
}

/// A reply as HEAD has it: the head alone.
fn said(seen: &Seen, mut reply: Vec<u8>) -> Vec<u8> {
    if seen.method == "HEAD" {
        let end = reply.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        reply.truncate(end + 4);
    }
    reply
}
