//! What an import writes: those keys of a configuration that `dfdaemon.yml` can speak of, in their order.

use std::collections::BTreeMap;

use serde::Serialize;

/// The first lines of what is written.
const HEAD: &str = "# Imported from a dfdaemon.yml of Dragonfly v1. `darter config default` prints all keys with their reasons.\n\
                    # What makes it a member of a swarm has to be added; v1 has no counterpart of it:\n\
                    # secret_file: /etc/darter/secret\n\
                    # discovery: [{static: {addresses: [\"10.77.0.1:8002\"]}}]\n";

/// A configuration. What is not set is not written.
#[derive(Debug, Default, Serialize)]
pub(super) struct Out {
    #[serde(skip_serializing_if = "Node::is_empty")]
    pub(super) node: Node,
    #[serde(skip_serializing_if = "Proxy::is_empty")]
    pub(super) proxy: Proxy,
    #[serde(skip_serializing_if = "Peer::is_empty")]
    pub(super) peer: Peer,
    #[serde(skip_serializing_if = "Cache::is_empty")]
    pub(super) cache: Cache,
    #[serde(skip_serializing_if = "RegistryMirror::is_empty")]
    pub(super) registry_mirror: RegistryMirror,
    pub(super) rules: Vec<Rule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hijack: Option<Hijack>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) registries: BTreeMap<String, Registry>,
}

/// A section of one optional value.
macro_rules! section {
    ($name:ident, $key:ident) => {
        #[derive(Debug, Default, Serialize)]
        pub(super) struct $name {
            pub(super) $key: Option<String>,
        }

        impl $name {
            fn is_empty(&self) -> bool {
                self.$key.is_none()
            }
        }
    };
}

section!(Node, advertise);
section!(Peer, listen);
section!(Cache, idle);

#[derive(Debug, Default, Serialize)]
pub(super) struct RegistryMirror {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) remote: Option<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) direct: bool,
}

impl RegistryMirror {
    fn is_empty(&self) -> bool {
        self.remote.is_none() && !self.direct
    }
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Proxy {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) listen: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tls: Option<CertKey>,
}

impl Proxy {
    fn is_empty(&self) -> bool {
        self.listen.is_none() && self.tls.is_none()
    }
}

#[derive(Debug, Default, Serialize)]
pub(super) struct CertKey {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cert: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Rule {
    pub(super) regex: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) direct: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) use_https: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) redirect: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Hijack {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cert: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key: Option<String>,
    pub(super) hosts: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Registry {
    pub(super) ca_file: String,
}

impl Out {
    /// As a file.
    pub(super) fn yaml(&self) -> Result<String, String> {
        let body = serde_saphyr::to_string(self).map_err(|error| format!("cannot be written as YAML: {error}"))?;
        Ok(format!("{HEAD}{body}"))
    }
}
