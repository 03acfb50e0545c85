//! Turns the configuration into the settings of each part. Nothing is decided here; parts know nothing of YAML.

use std::collections::BTreeSet;

use anyhow::Context as _;

use crate::config::{self, Config};
use crate::net;
use crate::proxy;
use crate::source::registry;
use crate::store;

/// The cache's settings.
///
/// # Errors
/// If the size of the file system cannot be told.
pub fn store(config: &Config) -> anyhow::Result<store::Settings> {
    // The folder need not exist yet: its nearest ancestor is on the file system that it will be on.
    let there = config.cache.dir.ancestors().find(|dir| dir.exists()).context("cache.dir has no parent")?;
    let stat = rustix::fs::statvfs(there).context("the cache's file system cannot be looked at")?;
    let total = stat.f_blocks.saturating_mul(stat.f_frsize);
    Ok(store::Settings {
        dir: config.cache.dir.clone(),
        max_bytes: config.cache.max_size.bytes(total),
        min_free_bytes: config.cache.min_free.bytes(total),
        idle: config.cache.idle,
        verify_before_stream: config.verify == config::Verify::BeforeStream,
        memory_bytes: store::MEMORY_BYTES,
        put_off: store::PUT_OFF,
    })
}

/// The registry client's settings.
#[must_use]
pub fn upstream(config: &Config) -> registry::Settings {
    let policies = config.registries.iter().map(|(host, policy)| {
        let policy = registry::RegistryPolicy { insecure_http: policy.insecure_http, ca_file: policy.ca_file.clone() };
        (host.to_string(), policy)
    });
    let mut local_hosts: BTreeSet<String> = config.hijack.hosts.iter().map(ToString::to_string).collect();
    local_hosts.extend(config.registry_mirror.remote.as_ref().and_then(|url| url.authority()).map(ToString::to_string));
    local_hosts.extend(config.rules.iter().filter_map(|rule| rule.redirect.as_ref()).map(ToString::to_string));
    let listeners = [config.proxy.listen, config.admin.listen, config.peer.listen, config.gossip.listen];
    registry::Settings {
        policies: policies.collect(),
        own_ports: listeners.iter().map(|listener| listener.port()).collect(),
        local_hosts,
    }
}

/// Which transports peers are talked to over.
#[must_use]
pub fn transport(config: &Config) -> net::Mode {
    match config.peer.transport {
        config::Transport::Auto => net::Mode::Auto,
        config::Transport::Quic => net::Mode::Quic,
        config::Transport::Tcp => net::Mode::Tcp,
    }
}

/// What to serve while a registry is down.
#[must_use]
pub fn when_down(config: &Config) -> proxy::authorize::WhenRegistryDown {
    match config.when_registry_down {
        config::WhenRegistryDown::Seen => proxy::authorize::WhenRegistryDown::Seen,
        config::WhenRegistryDown::Allow => proxy::authorize::WhenRegistryDown::Allow,
        config::WhenRegistryDown::Deny => proxy::authorize::WhenRegistryDown::Deny,
    }
}

/// How long answers for tags may be used again.
///
/// # Errors
/// If the proxy reads a host otherwise than the configuration does.
pub fn tag_ttls(config: &Config) -> anyhow::Result<proxy::tags::TagTtls> {
    let mut named: Vec<_> =
        config.registries.iter().filter_map(|(host, registry)| Some((host, registry.tag_ttl?))).collect();
    // Who names a port means that one above all.
    named.sort_by_key(|(host, _)| host.port.is_none());
    let pattern = |(host, ttl): (&config::HostPort, _)| {
        let host = host.to_string();
        anyhow::Ok((host.parse().with_context(|| host.clone())?, ttl))
    };
    let registries = named.into_iter().map(pattern).collect::<anyhow::Result<_>>()?;
    Ok(proxy::tags::TagTtls { default: config.tag_ttl, registries })
}

/// The number of the zone that this node stands in; 0 is none. Labels are hashed: members only compare them, and two of
/// some hundred sharing a number merely makes them look near.
#[must_use]
pub fn zone(config: &Config) -> u16 {
    config.node.zone.as_ref().map_or(0, |label| {
        let hash = blake3::hash(label.as_bytes());
        u16::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1]]).max(1)
    })
}

/// The proxy's settings.
///
/// # Errors
/// If a certificate that was readable when the configuration was checked is not any more.
pub fn proxy(config: &Config) -> anyhow::Result<proxy::Settings> {
    let pair = |identity: &config::Identity| -> anyhow::Result<proxy::tls::PemPair> {
        let read = |path: &std::path::Path| std::fs::read(path).with_context(|| path.display().to_string());
        Ok(proxy::tls::PemPair { certificate: read(&identity.cert_file)?, key: read(&identity.key_file)? })
    };
    let pattern = |host: String| host.parse().with_context(|| host.clone());
    let hijacked = config.hijack.hosts.iter().map(|host| pattern(host.to_string())).collect::<anyhow::Result<_>>()?;
    let hijack = match &config.hijack.identity {
        Some(identity) => Some(proxy::hijack::HijackSettings { pair: pair(identity)?, hosts: hijacked }),
        None => None,
    };
    Ok(proxy::Settings {
        tls: config.proxy.tls.as_deref().map(pair).transpose()?,
        mirror: proxy::mirror::MirrorSettings {
            remote: config.registry_mirror.remote.as_ref().map(ToString::to_string),
            direct: config.registry_mirror.direct,
        },
        rules: config
            .rules
            .iter()
            .map(|rule| proxy::rules::RuleSettings {
                regex: rule.regex.as_str().to_owned(),
                direct: rule.direct,
                use_https: rule.use_https,
                redirect: rule.redirect.as_ref().map(ToString::to_string),
            })
            .collect(),
        hijack,
        registries: config.registries.keys().map(|host| pattern(host.to_string())).collect::<anyhow::Result<_>>()?,
    })
}
