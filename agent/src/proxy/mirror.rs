//! Registry-mirror mode: a client asks for a path only, and which registry it means comes from the configuration or
//! from the `ns` parameter that containerd adds.

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

use super::address::{AddressError, HostPattern, HostPort};
use super::respond::Refusal;

/// The name under which images of Docker's hub are known, and which containerd sends; no registry answers there.
const HUB_NAMESPACE: &str = "docker.io";

/// Where the hub's registry answers. A remote with one of these names is the hub under whatever name it is asked for.
const HUB_REGISTRIES: [&str; 2] = ["registry-1.docker.io", "index.docker.io"];

/// What the mirror stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorSettings {
    /// Scheme and host of the registry that is meant where the client names none, `https://index.docker.io` say. `None`
    /// refuses such requests.
    pub remote: Option<String>,
    /// Keeps mirrored blobs out of the swarm.
    pub direct: bool,
}

/// Why there is nothing to mirror. The operator's mistake; nothing started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MirrorError {
    /// Not a URL with scheme http or https.
    #[error("the mirrored registry is written https://host[:port]")]
    Url,
    /// There is more than scheme and host.
    #[error("the mirrored registry's URL has a path, a query or a user")]
    More,
    /// The host is none.
    #[error("the mirrored registry's host")]
    Host(#[from] AddressError),
}

/// The registry that is mirrored.
#[derive(Debug)]
pub(super) struct Mirror {
    remote: Option<(Scheme, HostPort)>,
    /// Whether mirrored blobs stay out of the swarm.
    pub(super) direct: bool,
}

impl Mirror {
    /// Checks the settings.
    pub(super) fn new(settings: &MirrorSettings) -> Result<Self, MirrorError> {
        let Some(remote) = &settings.remote else { return Ok(Self { remote: None, direct: settings.direct }) };
        let parts = remote.parse::<Uri>().map_err(|_| MirrorError::Url)?.into_parts();
        let scheme = parts.scheme.filter(|scheme| *scheme == Scheme::HTTPS || *scheme == Scheme::HTTP);
        let (Some(scheme), Some(authority)) = (scheme, parts.authority) else { return Err(MirrorError::Url) };
        let bare = parts.path_and_query.is_none_or(|path| path == "/");
        if !bare || authority.as_str().contains('@') {
            return Err(MirrorError::More);
        }
        let remote = HostPort::parse(authority.as_str(), Some(implied_port(&scheme)))?;
        Ok(Self { remote: Some((scheme, remote)), direct: settings.direct })
    }

    /// The mirrored registry, as something that the operator named.
    pub(super) fn pattern(&self) -> Option<HostPattern> {
        self.remote.as_ref().map(|(_, remote)| HostPattern::exactly(remote))
    }

    /// The absolute URL that a request for a path means, without the parameter that chose the registry.
    pub(super) fn target(&self, uri: &Uri) -> Result<Uri, Refusal> {
        let (namespace, query) = split_namespace(uri.query().unwrap_or_default())?;
        let (scheme, registry) = match namespace {
            Some(namespace) => self.registry(&namespace)?,
            None => self.remote.clone().ok_or(Refusal::Malformed("no registry is mirrored, so ns must name one"))?,
        };
        let path = match query.as_str() {
            "" => uri.path().to_owned(),
            query => format!("{}?{query}", uri.path()),
        };
        let malformed = |_| Refusal::Malformed("the path cannot be asked for");
        Uri::builder()
            .authority(Authority::try_from(registry.authority(&scheme)).map_err(malformed)?)
            .scheme(scheme)
            .path_and_query(PathAndQuery::try_from(path).map_err(malformed)?)
            .build()
            .map_err(|_| Refusal::Malformed("the path cannot be asked for"))
    }

    fn registry(&self, namespace: &str) -> Result<(Scheme, HostPort), Refusal> {
        let named = HostPort::parse(namespace, Some(implied_port(&Scheme::HTTPS)))
            .map_err(|_| Refusal::Malformed("ns is not the name of a registry"))?;
        if let Some((scheme, remote)) = &self.remote
            && named == *remote
        {
            return Ok((scheme.clone(), named));
        }
        if named.host() != HUB_NAMESPACE {
            return Ok((Scheme::HTTPS, named));
        }
        if let Some((scheme, remote)) =
            self.remote.as_ref().filter(|(_, remote)| HUB_REGISTRIES.contains(&remote.host()))
        {
            return Ok((scheme.clone(), remote.clone()));
        }
        let hub = HostPort::parse(HUB_REGISTRIES[0], Some(named.port()));
        hub.map(|hub| (Scheme::HTTPS, hub)).map_err(|_| Refusal::Malformed("ns is not the name of a registry"))
    }
}

/// The port that a scheme implies.
pub(super) fn implied_port(scheme: &Scheme) -> u16 {
    if *scheme == Scheme::HTTPS { 443 } else { 80 }
}

/// Takes the parameter `ns` out of a query and leaves the rest as the client wrote it.
fn split_namespace(query: &str) -> Result<(Option<String>, String), Refusal> {
    let mut namespace = None;
    let mut rest = Vec::new();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let Some(value) = parameter.strip_prefix("ns=") else {
            rest.push(parameter);
            continue;
        };
        let value = unescape(value).ok_or(Refusal::Malformed("ns is not the name of a registry"))?;
        if namespace.replace(value).is_some() {
            return Err(Refusal::Malformed("ns is given twice"));
        }
    }
    Ok((namespace, rest.join("&")))
}

/// Undoes percent-encoding once; a port's colon may come as `%3A`.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        (bytes, rest) = match byte {
            b'%' => {
                let (digits, after) = after.split_at_checked(2)?;
                let digits = std::str::from_utf8(digits).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                (bytes, after)
            }
            _ => {
                bytes.push(byte);
                (bytes, after)
            }
        };
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn mirror(remote: &str) -> Result<Mirror, MirrorError> {
        Mirror::new(&MirrorSettings { remote: Some(remote.into()), direct: false })
    }

    #[test]
    fn the_namespace_chooses_the_registry_and_is_not_passed_on() {
        const HUB: &str = "https://index.docker.io";
        for (remote, asked, expected) in [
            (HUB, "/v2/", "https://index.docker.io/v2/"),
            (HUB, "/v2/?ns=docker.io", "https://index.docker.io/v2/"),
            ("https://registry-1.docker.io", "/v2/?ns=docker.io", "https://registry-1.docker.io/v2/"),
            ("https://harbor.example", "/v2/?ns=docker.io", "https://registry-1.docker.io/v2/"),
            ("https://harbor.example", "/v2/?ns=DOCKER.io&n=1", "https://registry-1.docker.io/v2/?n=1"),
            (HUB, "/v2/?ns=ghcr.io", "https://ghcr.io/v2/"),
            (HUB, "/v2/x?a=%20b&ns=10.77.0.1%3A5000&c", "https://10.77.0.1:5000/v2/x?a=%20b&c"),
            (HUB, "/v2/?ns=[::1]:5000", "https://[::1]:5000/v2/"),
            ("http://10.77.0.1:5000/", "/v2/?last=a&n=2", "http://10.77.0.1:5000/v2/?last=a&n=2"),
            ("http://10.77.0.1:5000", "/v2/?ns=10.77.0.1:5000", "http://10.77.0.1:5000/v2/"),
            ("http://10.77.0.1:5000", "/v2/?nsx=ghcr.io", "http://10.77.0.1:5000/v2/?nsx=ghcr.io"),
        ] {
            let mirrored = mirror(remote).unwrap().target(&asked.parse().unwrap()).unwrap();
            assert_eq!(mirrored.to_string(), expected, "{remote} {asked}");
        }
        for namespace in ["", "a/b", "user@host", "a%2fb", "a%2", "a%zz", "a:0", "a b", "..", "a&ns=b", "a%00"] {
            let asked = format!("/v2/?ns={}", namespace.replace(' ', "+"));
            let answer = mirror(HUB).unwrap().target(&asked.parse().unwrap());
            assert!(matches!(answer, Err(Refusal::Malformed(_))), "{namespace}");
        }
    }

    #[test]
    fn a_remote_is_scheme_and_host() {
        for (remote, error) in [
            ("index.docker.io", MirrorError::Url),
            ("/v2", MirrorError::Url),
            ("ftp://a", MirrorError::Url),
            ("https://a/b", MirrorError::More),
            ("https://a/?b", MirrorError::More),
            ("https://u:p@a", MirrorError::More),
            ("https://a..b", MirrorError::Host(AddressError::Host)),
        ] {
            assert_eq!(mirror(remote).unwrap_err(), error, "{remote}");
        }
    }
}
