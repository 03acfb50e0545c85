//! One round of questions: SRV and the addresses of its targets, or addresses alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};

use super::Query;
use crate::index::SEEDS_PER_SOURCE_MAX;

/// How long a server has for an answer before the next one, or the same one again, is asked.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Targets of SRV records that are looked up at a time, where the answer does not bring their addresses along.
const LOOKUPS_AT_ONCE: usize = 8;

/// How long an answer lives whose records do not say so.
const TTL_UNSAID: Duration = Duration::from_secs(5);

/// Why a name could not be asked for: the resolver's fault or the network's, so it is worth trying again.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the host's resolver configuration cannot be used: {0}")]
    System(#[source] NetError),
    #[error("{0}")]
    Resolver(#[from] NetError),
    #[error("the resolver refuses to answer for this name")]
    Refused,
    #[error("no complete answer in time")]
    Late,
}

/// What a round found.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) seeds: BTreeSet<SocketAddr>,
    /// How long all of it is true.
    pub(super) ttl: Duration,
    /// Whether every question was answered. Where one was not, what was known before stands in.
    pub(super) complete: bool,
}

/// What one question gave.
enum Found {
    Records(Lookup),
    /// There are none, for so long.
    Nothing(Option<Duration>),
    /// The server does not answer for such names. Some say so instead of "nothing" for what is below a name of theirs.
    Refused,
}

/// The addresses of one target, in a round.
struct Target {
    name: Name,
    port: u16,
    addresses: BTreeSet<IpAddr>,
    ttl: Duration,
    complete: bool,
}

/// Asks, and remembers what it was told of every target.
#[derive(Default)]
pub(super) struct Asker {
    resolver: Option<TokioResolver>,
    known: BTreeMap<Name, BTreeSet<IpAddr>>,
}

impl Asker {
    /// Forgets the connections to the servers and which they are, not what they said.
    pub(super) fn reset(&mut self) {
        self.resolver = None;
    }

    /// Asks all that has to be asked of a name.
    pub(super) async fn ask(&mut self, query: &Query) -> Result<Round, Failure> {
        let resolver = match &self.resolver {
            Some(resolver) => resolver.clone(),
            None => self.resolver.insert(resolver(&query.servers)?).clone(),
        };
        let mut ttl = Duration::MAX;
        let mut answered = false;
        for name in query.srv_names() {
            match look_up(&resolver, parse(&name)?, RecordType::SRV).await? {
                Found::Records(lookup) => return Ok(self.targets(&resolver, &lookup, ttl).await),
                Found::Nothing(lives) => {
                    answered = true;
                    ttl = ttl.min(lives.unwrap_or(ttl));
                }
                Found::Refused => {}
            }
        }
        let Some(name) = query.host_name() else {
            let ttl = if ttl == Duration::MAX { TTL_UNSAID } else { ttl };
            let nothing = Round { seeds: BTreeSet::new(), ttl, complete: true };
            return if answered { Ok(nothing) } else { Err(Failure::Refused) };
        };
        let target = addresses(&resolver, parse(&name)?, query.port).await?;
        Ok(self.round(vec![target], ttl))
    }

    /// The addresses of the targets of SRV records. Weights and priorities say whom to prefer; all of them are seeds.
    async fn targets(&mut self, resolver: &TokioResolver, lookup: &Lookup, mut ttl: Duration) -> Round {
        let mut targets = BTreeSet::new();
        for record in lookup.answers() {
            ttl = ttl.min(lives(record));
            if let RData::SRV(srv) = &record.data {
                // A lone dot says that there is no such service here, RFC 2782.
                if !srv.target.is_root() {
                    targets.insert((srv.target.to_lowercase(), srv.port));
                }
            }
        }
        let surplus = targets.len().saturating_sub(SEEDS_PER_SOURCE_MAX);
        if surplus > 0 {
            tracing::debug!(surplus, kept = SEEDS_PER_SOURCE_MAX, "more SRV records than seeds are kept");
        }
        let found = stream::iter(targets.into_iter().take(SEEDS_PER_SOURCE_MAX)).map(|(name, port)| async move {
            if let Some(target) = brought_along(lookup, &name, port) {
                return target;
            }
            addresses(resolver, name.clone(), port).await.unwrap_or_else(|failure| {
                tracing::debug!(target = %name, %failure, "a seed's address could not be asked for");
                Target { name, port, addresses: BTreeSet::new(), ttl: Duration::MAX, complete: false }
            })
        });
        let found: Vec<_> = found.buffer_unordered(LOOKUPS_AT_ONCE).collect().await;
        self.round(found, ttl)
    }

    /// Puts a round together, with what is known from before where a question was not answered.
    fn round(&mut self, targets: Vec<Target>, ttl: Duration) -> Round {
        let mut known = BTreeMap::new();
        let mut round = Round { seeds: BTreeSet::new(), ttl, complete: true };
        for mut target in targets {
            if !target.complete {
                round.complete = false;
                target.addresses.extend(self.known.get(&target.name).into_iter().flatten());
            }
            round.ttl = round.ttl.min(target.ttl);
            round.seeds.extend(target.addresses.iter().map(|ip| SocketAddr::new(*ip, target.port)));
            known.insert(target.name, target.addresses);
        }
        if round.ttl == Duration::MAX {
            round.ttl = TTL_UNSAID;
        }
        self.known = known;
        round
    }
}

/// A resolver without a cache: the records' own time is what decides when they are asked for again.
fn resolver(servers: &[SocketAddr]) -> Result<TokioResolver, Failure> {
    let mut builder = if servers.is_empty() {
        TokioResolver::builder_tokio().map_err(Failure::System)?
    } else {
        let server = |server: &SocketAddr| {
            let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
                connection.port = server.port();
                connection
            });
            NameServerConfig::new(server.ip(), true, connections.into())
        };
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.iter().map(server).collect());
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
    };
    options(builder.options_mut());
    builder.build().map_err(Failure::System)
}

fn options(options: &mut ResolverOpts) {
    options.cache_size = 0;
    options.timeout = ANSWER_MAX;
    options.attempts = 1;
}

fn parse(name: &str) -> Result<Name, Failure> {
    Name::from_ascii(name).map_err(|error| Failure::Resolver(error.into()))
}

async fn look_up(resolver: &TokioResolver, name: Name, kind: RecordType) -> Result<Found, Failure> {
    let error = match resolver.lookup(name, kind).await {
        // An alias without what it is an alias for comes as an answer as well.
        Ok(lookup) if lookup.answers().iter().any(|record| record.record_type() == kind) => {
            return Ok(Found::Records(lookup));
        }
        Ok(_) => return Ok(Found::Nothing(None)),
        Err(error) => error,
    };
    match &error {
        NetError::Dns(DnsError::ResponseCode(ResponseCode::Refused)) => Ok(Found::Refused),
        NetError::Dns(DnsError::NoRecordsFound(nothing)) => match nothing.response_code {
            ResponseCode::NoError | ResponseCode::NXDomain => {
                Ok(Found::Nothing(nothing.negative_ttl.map(|seconds| Duration::from_secs(seconds.into()))))
            }
            ResponseCode::Refused => Ok(Found::Refused),
            _ => Err(error.into()),
        },
        _ => Err(error.into()),
    }
}

/// The addresses of a name, of both families. Fails if neither was answered.
async fn addresses(resolver: &TokioResolver, name: Name, port: u16) -> Result<Target, Failure> {
    let (v4, v6) = tokio::join!(
        look_up(resolver, name.clone(), RecordType::A),
        look_up(resolver, name.clone(), RecordType::AAAA),
    );
    let mut target = Target { name, port, addresses: BTreeSet::new(), ttl: Duration::MAX, complete: true };
    let (mut answered, mut failure) = (false, None);
    for found in [v4, v6] {
        match found {
            Ok(Found::Records(lookup)) => {
                answered = true;
                for record in lookup.answers() {
                    target.ttl = target.ttl.min(lives(record));
                    target.addresses.extend(record.data.ip_addr());
                }
            }
            Ok(Found::Nothing(lives)) => {
                answered = true;
                target.ttl = target.ttl.min(lives.unwrap_or(target.ttl));
            }
            // A server that has one family and refuses the other is a complete answer.
            Ok(Found::Refused) => {}
            Err(error) => {
                target.complete = false;
                failure = Some(error);
            }
        }
    }
    if answered { Ok(target) } else { Err(failure.unwrap_or(Failure::Refused)) }
}

/// The addresses of a target that the answer brought along, which spares two questions for each.
fn brought_along(lookup: &Lookup, name: &Name, port: u16) -> Option<Target> {
    let mut target =
        Target { name: name.clone(), port, addresses: BTreeSet::new(), ttl: Duration::MAX, complete: true };
    for record in lookup.additionals() {
        if let Some(ip) = record.data.ip_addr().filter(|_| record.name == *name) {
            target.addresses.insert(ip);
            target.ttl = target.ttl.min(lives(record));
        }
    }
    (!target.addresses.is_empty()).then_some(target)
}

fn lives(record: &Record) -> Duration {
    Duration::from_secs(record.ttl.into())
}
