//! The configuration file of one agent.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};

use super::Addresses;

/// The cluster's name in every agent's configuration.
const CLUSTER: &str = "demo";

/// What stands in one agent's file.
pub(super) struct Rendered<'a> {
    pub(super) name: &'a str,
    /// Absolute; certificate, key and cache are in it.
    pub(super) home: &'a Path,
    pub(super) secret_file: &'a Path,
    pub(super) own: &'a Addresses,
    pub(super) all: &'a [Addresses],
    pub(super) registry: SocketAddr,
    pub(super) ca_file: Option<&'a Path>,
    pub(super) overrides: &'a Value,
}

impl Rendered<'_> {
    pub(super) fn yaml(&self) -> Result<String, serde_saphyr::ser::Error> {
        serde_saphyr::to_string(&self.value())
    }

    fn value(&self) -> Value {
        let others = self.all.iter().filter(|other| *other != self.own);
        let others: Vec<String> = others.map(|other| other.gossip.to_string()).collect();
        let discovery = if others.is_empty() { json!([]) } else { json!([{"static": {"addresses": others}}]) };
        let policy = match self.ca_file {
            Some(ca_file) => json!({"ca_file": ca_file}),
            None => json!({"insecure_http": true}),
        };
        let mut value = json!({
            "node": {"name": self.name, "cluster": CLUSTER, "advertise": self.own.peer.ip()},
            "secret_file": self.secret_file,
            "proxy": {"listen": self.own.proxy},
            "peer": {"listen": self.own.peer},
            "gossip": {"listen": self.own.gossip},
            "admin": {"listen": self.own.admin},
            "discovery": discovery,
            // The caches live for minutes; a disk that is nearly full need not stop a demonstration that fits on it.
            "cache": {"dir": self.home.join("cache"), "min_free": "0%"},
            "hijack": {
                "cert": self.home.join("hijack.crt"),
                "key": self.home.join("hijack.key"),
                "hosts": [self.registry.to_string()],
            },
            "registries": {self.registry.to_string(): policy},
        });
        lay_over(&mut value, self.overrides);
        value
    }
}

/// Puts `over` on top of `base`: mappings are merged, anything else is replaced, and nothing is nothing.
fn lay_over(base: &mut Value, over: &Value) {
    match (base, over) {
        (_, Value::Null) => {}
        (Value::Object(base), Value::Object(over)) => {
            for (key, over) in over {
                lay_over(base.entry(key.clone()).or_insert(Value::Null), over);
            }
        }
        (base, over) => *base = over.clone(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn addresses(last: u8) -> Addresses {
        let at = |port| SocketAddr::from(([127, 77, 0, last], port));
        Addresses { proxy: at(65_001), peer: at(15_001), gossip: at(8002), admin: at(15_003) }
    }

    fn rendered(all: &[Addresses], ca_file: Option<&Path>, overrides: &Value) -> Value {
        let rendered = Rendered {
            name: "agent-1",
            home: Path::new("/demo/a home/agent-1"),
            secret_file: Path::new("/demo/secret"),
            own: &all[0],
            all,
            registry: "127.77.0.1:5000".parse().unwrap(),
            ca_file,
            overrides,
        };
        let yaml = rendered.yaml().unwrap();
        let value: Value = serde_saphyr::from_str(&yaml).unwrap();
        // Nothing that is text may come back as a number or a truth.
        assert_eq!(value, rendered.value(), "{yaml}");
        value
    }

    #[test]
    fn the_file_says_what_the_contract_names() {
        let all = [addresses(2), addresses(3), addresses(4)];
        let value = rendered(&all, Some(Path::new("/demo/ca.crt")), &Value::Null);
        assert_eq!(value["node"], json!({"name": "agent-1", "cluster": "demo", "advertise": "127.77.0.2"}));
        assert_eq!(value["proxy"]["listen"], "127.77.0.2:65001");
        assert_eq!(value["peer"]["listen"], "127.77.0.2:15001");
        assert_eq!(value["gossip"]["listen"], "127.77.0.2:8002");
        assert_eq!(value["admin"]["listen"], "127.77.0.2:15003");
        let others = ["127.77.0.3:8002", "127.77.0.4:8002"];
        assert_eq!(value["discovery"], json!([{"static": {"addresses": others}}]));
        assert_eq!(value["registries"], json!({"127.77.0.1:5000": {"ca_file": "/demo/ca.crt"}}));
        assert_eq!(value["hijack"]["hosts"], json!(["127.77.0.1:5000"]));
        assert_eq!(value["hijack"]["key"], "/demo/a home/agent-1/hijack.key");
        assert_eq!(value["cache"]["dir"], "/demo/a home/agent-1/cache");
    }

    #[test]
    fn one_agent_discovers_nobody_and_plain_http_is_said() {
        let value = rendered(&[addresses(2)], None, &Value::Null);
        assert_eq!(value["discovery"], json!([]));
        assert_eq!(value["registries"], json!({"127.77.0.1:5000": {"insecure_http": true}}));
    }

    #[test]
    fn overrides_replace_what_they_name_and_nothing_else() {
        let over = json!({"cache": {"max_size": "64MiB"}, "hijack": {"hosts": []}, "verify": "before_stream"});
        let value = rendered(&[addresses(2)], None, &over);
        let expected = json!({"dir": "/demo/a home/agent-1/cache", "min_free": "0%", "max_size": "64MiB"});
        assert_eq!(value["cache"], expected);
        assert_eq!(value["hijack"]["hosts"], json!([]));
        assert_eq!(value["verify"], "before_stream");
    }
}
