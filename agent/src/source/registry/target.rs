//! Where a request really goes: the URL that was asked for, read once, with the registry's policy applied.

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

use crate::net::dial::{HostPattern, canonical};

/// Longest URL that is followed. S3 and its kin sign URLs of about 2 KiB.
const URL_BYTES_MAX: usize = 16 * 1024;

/// Why a URL is not asked. The fault of whoever named it; never retried; nothing was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// It is not absolute.
    #[error("the URL names no host")]
    NoHost,
    /// It is neither http nor https.
    #[error("the URL is neither http nor https")]
    Scheme,
    /// It holds a user name or a password.
    #[error("the URL holds credentials")]
    UserInfo,
    /// It is malformed or too long.
    #[error("the URL is malformed")]
    Malformed,
}

/// One place to send a request to.
#[derive(Clone)]
pub(super) struct Target {
    /// Absolute, with the scheme and port that are really used.
    pub(super) uri: Uri,
    /// Canonical host.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) https: bool,
    /// Configured to be talked to without TLS.
    pub(super) insecure: bool,
}

impl Target {
    /// Reads `url`; `insecure` are the registries that are talked to over plain HTTP, whatever the URL says.
    pub(super) fn new(url: &Uri, insecure: &[HostPattern]) -> Result<Self, TargetError> {
        let authority = url.authority().ok_or(TargetError::NoHost)?;
        if authority.as_str().contains('@') {
            return Err(TargetError::UserInfo);
        }
        let mut https = match url.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(TargetError::Scheme),
        };
        let host = canonical(authority.host());
        let explicit = authority.port_u16();
        if host.is_empty() || (authority.port().is_some() && explicit.is_none()) {
            return Err(TargetError::NoHost);
        }
        let asked = explicit.unwrap_or(if https { 443 } else { 80 });
        let pattern = insecure.iter().find(|pattern| pattern.matches(&host, asked));
        let mut port = asked;
        if let (true, Some(pattern)) = (https, pattern) {
            https = false;
            port = explicit.or(pattern.port()).unwrap_or(80);
        }
        let uri = Self::compose(url, https, &host, port).ok_or(TargetError::Malformed)?;
        Ok(Self { uri, host, port, https, insecure: pattern.is_some() })
    }

    fn compose(url: &Uri, https: bool, host: &str, port: u16) -> Option<Uri> {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let standard = if https { 443 } else { 80 };
        let authority = if port == standard { host } else { format!("{host}:{port}") };
        let path = url.path_and_query().map_or("/", PathAndQuery::as_str);
        Uri::builder()
            .scheme(if https { Scheme::HTTPS } else { Scheme::HTTP })
            .authority(authority.parse::<Authority>().ok()?)
            .path_and_query(path)
            .build()
            .ok()
    }

    /// `scheme://host:port`, what decides whether credentials may be seen there.
    pub(super) fn origin(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        if self.host.contains(':') {
            format!("{scheme}://[{}]:{}", self.host, self.port)
        } else {
            format!("{scheme}://{}:{}", self.host, self.port)
        }
    }
}

/// The URL that `location`, a redirect from `base`, means (RFC 3986, 5.2). Dot segments are left to the server.
pub(super) fn resolve(base: &Uri, location: &str) -> Result<Uri, TargetError> {
    let location = location.split('#').next().unwrap_or_default().trim();
    if location.len() > URL_BYTES_MAX {
        return Err(TargetError::Malformed);
    }
    let scheme = base.scheme_str().ok_or(TargetError::NoHost)?;
    let authority = base.authority().ok_or(TargetError::NoHost)?;
    let text = if let Some(rest) = location.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else if has_scheme(location) {
        location.to_owned()
    } else {
        let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    text.parse().map_err(|_| TargetError::Malformed)
}

fn has_scheme(location: &str) -> bool {
    location.split_once(':').is_some_and(|(scheme, _)| {
        scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_decides_scheme_and_port() {
        let insecure: Vec<HostPattern> =
            ["10.0.0.1:5000", "lan.example.org", "odd.example.org:443"].map(HostPattern::parse).into();
        for (url, uri, origin) in [
            ("https://a.example.org/v2/", "https://a.example.org/v2/", "https://a.example.org:443"),
            ("https://A.example.org:443/v2/", "https://a.example.org/v2/", "https://a.example.org:443"),
            ("http://a.example.org/v2/?x=1", "http://a.example.org/v2/?x=1", "http://a.example.org:80"),
            ("https://10.0.0.1:5000/v2/", "http://10.0.0.1:5000/v2/", "http://10.0.0.1:5000"),
            ("https://10.0.0.1:5001/v2/", "https://10.0.0.1:5001/v2/", "https://10.0.0.1:5001"),
            ("https://lan.example.org/v2/", "http://lan.example.org/v2/", "http://lan.example.org:80"),
            ("https://lan.example.org:5000/", "http://lan.example.org:5000/", "http://lan.example.org:5000"),
            ("https://odd.example.org/", "http://odd.example.org:443/", "http://odd.example.org:443"),
            ("https://[2001:DB8::1]:5000/", "https://[2001:db8::1]:5000/", "https://[2001:db8::1]:5000"),
        ] {
            let target = Target::new(&url.parse().unwrap(), &insecure).unwrap();
            assert_eq!(target.uri.to_string(), uri);
            assert_eq!(target.origin(), origin);
        }
        for (url, error) in [
            ("/v2/", TargetError::NoHost),
            ("ftp://a/", TargetError::Scheme),
            ("https://user:secret@a/", TargetError::UserInfo),
        ] {
            assert_eq!(Target::new(&url.parse().unwrap(), &insecure).err(), Some(error), "{url}");
        }
    }

    #[test]
    fn a_location_is_resolved_against_where_it_was_said() {
        let base: Uri = "https://a:5000/v2/x/blobs/y?q=1".parse().unwrap();
        for (location, url) in [
            ("http://b/z?s=1#f", "http://b/z?s=1"),
            ("//b:1/z", "https://b:1/z"),
            ("/z?to=http://b", "https://a:5000/z?to=http://b"),
            ("z", "https://a:5000/v2/x/blobs/z"),
            ("?q=2", "https://a:5000/v2/x/blobs/y?q=2"),
            ("z?u=http://b", "https://a:5000/v2/x/blobs/z?u=http://b"),
        ] {
            assert_eq!(resolve(&base, location).unwrap().to_string(), url, "{location}");
        }
        for location in ["http://", "file:///etc/passwd", "https://a b/", "javascript:alert(1)"] {
            let target = resolve(&base, location).and_then(|url| Target::new(&url, &[]));
            assert!(target.is_err(), "{location}");
        }
        assert_eq!(resolve(&base, &"x".repeat(URL_BYTES_MAX + 1)), Err(TargetError::Malformed));
    }
}
