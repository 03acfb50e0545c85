//! Every key, its default and the reason for it. The one table that is read, printed and overridden from.
//!
//! Defaults are written as an operator would write them and go through the same parsers as his. What `darter config
//! default` prints is this table, so the two cannot drift apart.

/// A key that has a default.
pub(super) struct Key {
    /// Section and key, as in `proxy.listen`, or a top-level key.
    pub(super) path: &'static str,
    /// Its default as YAML.
    pub(super) default: &'static str,
    /// What it is and why this default.
    pub(super) why: &'static str,
    /// What a value looks like where the default is empty.
    pub(super) example: &'static [&'static str],
    /// Whether it is one value, which the environment can override, rather than a list or a mapping.
    pub(super) scalar: bool,
}

const fn scalar(path: &'static str, default: &'static str, why: &'static str) -> Key {
    Key { path, default, why, example: &[], scalar: true }
}

const fn nested(path: &'static str, default: &'static str, why: &'static str, example: &'static [&'static str]) -> Key {
    Key { path, default, why, example, scalar: false }
}

/// All keys, in the order in which they are printed; those of a section follow each other.
pub(super) const KEYS: &[Key] = &[
    scalar("node.name", "null", "What people know this agent by. null: the name of the host, which is unique already."),
    scalar(
        "node.cluster",
        "default",
        "Members of different clusters cannot read each other's datagrams, whatever their secrets. Give each data \
         centre its own: a swarm that spans two moves layers over the line between them.",
    ),
    scalar(
        "node.advertise",
        "null",
        "The address that peers reach this agent at, one of this host's. null: the address that peer.listen names, or \
         else the one that packets to other networks leave from. Loopback only if every listener is on loopback.",
    ),
    scalar(
        "node.zone",
        "null",
        "Where the node stands (a rack, a room). Told to the other members; this version asks near and far peers alike. null: nowhere.",
    ),
    scalar(
        "node.role",
        "node",
        "node | seed. Seeds are stable members that are preferred as homes of tasks and keep blobs for longer; a cluster \
         works without any.",
    ),
    scalar(
        "secret_file",
        "null",
        "What makes a cluster: one or more lines of base64, each at least 32 bytes (darter secret prints one). The \
         first is used to send, all are accepted, so that one can be rotated. Must not be readable by others. null: \
         this agent is a proxy only, without peers, since there is no secret that could be a safe default.",
    ),
    scalar(
        "proxy.listen",
        "127.0.0.1:65001",
        "Where container runtimes reach the agent. Loopback, since what it serves is served with the client's own \
         credentials over plain HTTP; the port is Dragonfly's.",
    ),
    nested(
        "proxy.tls",
        "null",
        "Serve TLS on that port. Some clients send credentials to a proxy on another host over nothing else.",
        &["{cert: /etc/darter/proxy.crt, key: /etc/darter/proxy.key}"],
    ),
    scalar(
        "peer.listen",
        "0.0.0.0:15001",
        "Where members exchange pieces; every connection is authenticated with the cluster's secret on both sides.",
    ),
    scalar(
        "peer.transport",
        "auto",
        "auto | quic | tcp. auto: pieces over TLS over TCP where that gets through, since it takes a third of QUIC's CPU \
         time, and everything else over QUIC. quic: everything over QUIC; TCP is not listened on. tcp: calls and sessions \
         over TCP as well; QUIC, on the same port, is left for members that do not take TCP and for when there are too \
         many connections.",
    ),
    scalar(
        "gossip.listen",
        "0.0.0.0:8002",
        "Where members hear of each other; every datagram is sealed. The port is the one the supernode used, so that \
         firewalls that let it through still fit.",
    ),
    scalar(
        "admin.listen",
        "127.0.0.1:15003",
        "Health, metrics and status. Loopback, since it asks for no password; scrape it through a local exporter or \
         choose an address that only the monitoring reaches.",
    ),
    nested(
        "discovery",
        "[]",
        "Where the first members are found; any number of sources, all used. [] waits until others come. A member \
         that is listed but dead does no harm, so list a few. static: addresses or names, each with gossip's port. \
         file: the same, one per line, # begins a comment; read again when it changes. dns: SRV records of \
         _gossip._udp.NAME or NAME, else A and AAAA with `port` (default: that of gossip.listen), asked for again when \
         they run out; of `servers`, or else of the resolvers of the host. kubernetes: the endpoints of a service, ready \
         or not, at its port named gossip (none: that of gossip.listen), or with nodes: true all nodes' internal \
         addresses; needs leave to list and watch them. `namespace` (default: the pod's own) and `kubeconfig` \
         (default: as kubectl, else as a pod does) may be left out. While a source is down, what it said last stays.",
        &[
            "- static: {addresses: [\"10.77.0.2:8002\", \"seed.example.org:8002\"]}",
            "- file: {path: /etc/darter/peers}",
            "- dns: {name: darter.kube-system.svc.cluster.local}",
            "- dns: {name: seeds.example.org, port: 8002, servers: [10.77.0.53]}",
            "- kubernetes: {service: darter, namespace: kube-system}",
            "- kubernetes: {nodes: true, kubeconfig: /etc/darter/kubeconfig}",
        ],
    ),
    scalar(
        "cache.dir",
        "/var/lib/darter",
        "Where blobs are kept. Disposable, but worth a real disk: what is there after a restart is not fetched again.",
    ),
    scalar(
        "cache.max_size",
        "20GiB",
        "A size, or a share of the file system as in 40%. Holds the images of a rollout, a few GiB each, with room \
         for the previous one.",
    ),
    scalar(
        "cache.min_free",
        "15%",
        "A size or a share that stays free whatever max_size says. At less than 15 % a kubelet with its default \
         settings begins to delete images and evict pods; a cache must never be the reason.",
    ),
    scalar(
        "cache.idle",
        "null",
        "How long a blob is kept that nobody asks for. null: 1h, and 24h on a seed, which is there to have what others \
         have forgotten. Dragonfly v1 forgot after 5 minutes, which is before the slow half of a rollout asks.",
    ),
    scalar(
        "limits.download",
        "0",
        "Bytes per second from peers and registries together, as in 100M (1024 is the base, as in Dragonfly v1). 0 is \
         no limit: a pull is what the node waits for.",
    ),
    scalar("limits.upload", "0", "Bytes per second to peers. 0 is no limit: uploads are bounded in number already."),
    scalar("limits.per_task", "0", "Bytes per second of one blob. 0 is no limit."),
    scalar(
        "registry_mirror.remote",
        "https://index.docker.io",
        "The registry of requests that come as to a mirror and name none with ?ns=. What docker means when it says \
         nothing. null: such requests are refused.",
    ),
    scalar(
        "registry_mirror.direct",
        "false",
        "true: what is asked for as of a mirror is the registry's alone to give, and the swarm has no part in it. For \
         blobs that other nodes have no use for; rules say the same of single URLs that come as to a proxy.",
    ),
    nested(
        "rules",
        "[]",
        "What to do with a URL; the first expression found in it wins. Without a rule, blobs asked for by their \
         digest go to the swarm and everything else passes through.",
        &[
            "- {regex: \"blobs/sha256.*\"}                   # through the swarm",
            "- {regex: \"^http://legacy/\", use_https: true}",
            "- {regex: \"//big\\\\.example\\\\.org/\", direct: true}",
            "- {regex: \"//old\\\\.example\\\\.org/\", redirect: new.example.org}",
        ],
    ),
    scalar(
        "hijack.cert",
        "null",
        "The CA (darter gen-ca makes one) that certificates for the hosts below are signed with, or one static \
         certificate for them all. null: TLS passes through the proxy unread, and so past the swarm.",
    ),
    scalar("hijack.key", "null", "The key of that certificate, readable by its owner only."),
    nested(
        "hijack.hosts",
        "[]",
        "The registries whose TLS the proxy terminates: host, host:port or *.suffix. [] is none, since reading \
         somebody's traffic is never a default.",
        &["[\"registry.example.org\", \"*.corp.example.org:5000\"]"],
    ),
    nested(
        "registries",
        "{}",
        "How single registries are spoken to, by host or host:port. {}: over HTTPS, trusting what the system trusts.",
        &[
            "\"10.77.0.1:5000\": {insecure_http: true, ca_file: null}",
            "registry.example.org: {ca_file: /etc/darter/corp-ca.crt, tag_ttl: 5m}",
        ],
    ),
    scalar(
        "when_registry_down",
        "seen",
        "seen | allow | deny. Who gets a cached blob while its registry cannot be asked. seen: whom it has let in \
         before, with this credential, to this repository; that keeps restarts going and lets nobody new in.",
    ),
    scalar(
        "tag_ttl",
        "0s",
        "How long the cluster may use a registry's answer for a tag again, 24h at most: a tag is asked for once per \
         cluster in that time, and is served while the registry is down. Images pushed past the agents are seen so \
         much later, and the other members are believed what a tag means; each client still needs the registry's yes \
         for the manifest. 0s: every tag is asked for.",
    ),
    scalar(
        "piece_size",
        "auto",
        "auto | dragonfly | a size. auto cuts small layers finer than Dragonfly v1 did, so that they too pipeline.",
    ),
    scalar(
        "verify",
        "streaming",
        "streaming | before_stream. streaming gives clients every piece that passed its digest at once and withholds \
         the last until the whole blob has; before_stream withholds all of it, and the client waits for the download.",
    ),
];

/// The default of a key; empty for one that is not in the table.
pub(super) fn of(path: &str) -> &'static str {
    KEYS.iter().find(|key| key.path == path).map_or("", |key| key.default)
}

/// The environment variable that overrides a key.
pub(super) fn variable(path: &str) -> String {
    format!("DARTER_{}", path.to_ascii_uppercase().replace('.', "_"))
}

/// Section of a path, if it has one, and its last name.
pub(super) fn split(path: &str) -> (Option<&str>, &str) {
    match path.split_once('.') {
        Some((section, key)) => (Some(section), key),
        None => (None, path),
    }
}

/// Where comments are wrapped: what fits beside a file tree.
const WIDTH: usize = 100;

/// All defaults as YAML, with their reasons as comments. Parses back to the same configuration.
#[must_use]
pub fn yaml() -> String {
    let mut out = String::new();
    comment(
        &mut out,
        "",
        "All keys of darter with their defaults. Every key may be left out. Single values can be overridden by \
         environment variables: proxy.listen by DARTER_PROXY_LISTEN, verify by DARTER_VERIFY, and so on. Sizes: B, \
         KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024. Durations: ms, s, m, h, d.",
    );
    let mut current = None;
    for Key { path, default, why, example, .. } in KEYS {
        let (section, key) = split(path);
        let indent = if section.is_some() { "  " } else { "" };
        if section != current || section.is_none() {
            out.push('\n');
        }
        if let Some(section) = section.filter(|_| section != current) {
            out.push_str(&format!("{section}:\n"));
        }
        current = section;
        comment(&mut out, indent, why);
        for (at, line) in example.iter().enumerate() {
            let lead = if at == 0 { "example:" } else { "        " };
            out.push_str(&format!("{indent}# {lead} {line}\n"));
        }
        out.push_str(&format!("{indent}{key}: {default}\n"));
    }
    out
}

fn comment(out: &mut String, indent: &str, text: &str) {
    let mut line = format!("{indent}#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            out.push_str(&line);
            out.push('\n');
            line = format!("{indent}#");
        }
        line.push(' ');
        line.push_str(word);
    }
    out.push_str(&line);
    out.push('\n');
}
