//! Whether the agent delivers what a runtime is about to ask it for: asked in the way of that runtime.
//!
//! A runtime that is pointed at an agent which does not work cannot pull, not even the agent's own image (spegel#739).

use std::sync::Arc;

use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue, Method, StatusCode};

use super::{Agent, NodeError, reference};
use crate::cli::args::{NodeConfigureArgs, Runtime};
use crate::client::Client;
use crate::config::{Config, HostPort, Identity};

/// What a client of images accepts as a manifest.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                         application/vnd.docker.distribution.manifest.list.v2+json, \
                         application/vnd.docker.distribution.manifest.v2+json";

/// Asks the agent whether it is ready, and through it every registry, or the one of `--probe`, for an answer.
pub(super) async fn run(
    args: &NodeConfigureArgs,
    config: &Config,
    agent: &Agent,
    registries: &[HostPort],
) -> Result<(), NodeError> {
    let admin = Client::direct(agent.admin, None);
    let status = ask(&admin, "/readyz", &format!("the agent at {}", agent.admin)).await?;
    if status != StatusCode::OK {
        return Err(NodeError::Probe(format!("the agent is not ready: /readyz was answered {status}")));
    }
    for host in registries {
        let name = reference(host);
        let client = client(args.runtime, config, agent, host)?;
        let status = ask(&client, &path(args.runtime, &name, "/v2/"), &name).await?;
        // A registry that wants credentials is one that answers.
        if !matches!(status, StatusCode::OK | StatusCode::UNAUTHORIZED) {
            return Err(NodeError::Probe(format!("{name}: /v2/ was answered {status} through the agent")));
        }
    }
    let Some(image) = &args.probe else { return Ok(()) };
    let parsed =
        registries.iter().find_map(|host| manifest(image.strip_prefix(&reference(host))?).map(|path| (host, path)));
    let Some((host, manifest)) = parsed else {
        return Err(NodeError::Probe(format!("{image} is no image of a registry that is configured")));
    };
    let client = client(args.runtime, config, agent, host)?;
    match ask(&client, &path(args.runtime, &reference(host), &manifest), image).await? {
        StatusCode::OK => Ok(()),
        StatusCode::UNAUTHORIZED => {
            Err(NodeError::Probe(format!("{image} is not given without credentials; --probe takes a public one")))
        }
        status => Err(NodeError::Probe(format!("{image}: the manifest was answered {status} through the agent"))),
    }
}

/// `/REPOSITORY:TAG` or `/REPOSITORY@DIGEST` as the path of a manifest.
fn manifest(image: &str) -> Option<String> {
    let image = image.strip_prefix('/')?;
    let (repository, reference) = image.split_once('@').or_else(|| image.rsplit_once(':')).unwrap_or((image, "latest"));
    let fits =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-:".contains(&b));
    (fits(repository) && fits(reference)).then(|| format!("/v2/{repository}/manifests/{reference}"))
}

/// The path that a runtime asks the agent for.
fn path(runtime: Runtime, registry: &str, path: &str) -> String {
    match runtime {
        Runtime::Containerd => format!("{path}?ns={registry}"),
        Runtime::Docker | Runtime::Crio => path.to_owned(),
    }
}

/// Reaches the agent as a runtime does, and trusts what that runtime will be told to trust.
fn client(runtime: Runtime, config: &Config, agent: &Agent, host: &HostPort) -> Result<Client, NodeError> {
    if runtime != Runtime::Docker {
        let tls = config.proxy.tls.as_deref().map(trusting).transpose()?;
        return Ok(Client::direct(agent.proxy, tls));
    }
    if agent.tls_cert.is_some() {
        return Err(NodeError::Probe("the probe does not speak to a proxy over TLS (proxy.tls)".to_owned()));
    }
    let tls = config.hijack.identity.as_deref().map(trusting).transpose()?;
    let (host, port) = (host.host.clone(), host.port.unwrap_or(443));
    Ok(Client { host, port, tls, proxy: Some(agent.proxy), credentials: None })
}

/// The system's roots, and a certificate of the agent's.
fn trusting(identity: &Identity) -> Result<Arc<rustls::ClientConfig>, NodeError> {
    let failed = |error: rustls::Error| NodeError::Probe(format!("TLS cannot be set up: {error}"));
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots.add_parsable_certificates(identity.chain.iter().cloned());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut tls = builder.map_err(failed)?.with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

async fn ask(client: &Client, path: &str, whom: &str) -> Result<StatusCode, NodeError> {
    let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(MANIFESTS))]);
    let answer = client.request(Method::GET, path, headers).await;
    answer.map(|answer| answer.status()).map_err(|error| {
        // The whole chain: it says who of client, agent and registry failed.
        NodeError::Probe(format!("{whom}: {:#}", anyhow::Error::from(error)))
    })
}
