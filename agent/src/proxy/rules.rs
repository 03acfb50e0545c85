//! Which requests of a proxied client the swarm may answer, and which are rewritten on the way.
//!
//! Dragonfly v1's table: rules are tried in order on the full URL, unanchored, for GET alone; the first that matches
//! decides; a rewrite holds for direct requests too. Where rules are given and none matches, the request is direct;
//! where none are given, every blob by digest is the swarm's.

use http::uri::{PathAndQuery, Scheme};
use http::{Method, Uri};
use regex::Regex;

use super::address::{AddressError, HostPattern, HostPort};

/// One rule as the configuration gives it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSettings {
    /// Tried on the full URL, unanchored.
    pub regex: String,
    /// What matches stays out of the swarm.
    pub direct: bool,
    /// What matches is fetched over HTTPS, whatever the client asked for.
    pub use_https: bool,
    /// What matches is fetched from this `host[:port]` instead.
    pub redirect: Option<String>,
}

/// What is wrong with a rule. The operator's mistake; nothing started.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuleError {
    /// Not a regular expression.
    #[error("rule {position}: not a regular expression")]
    Regex {
        /// Which rule, from 1.
        position: usize,
        /// What is wrong with it.
        #[source]
        source: regex::Error,
    },
    /// Not a host to redirect to.
    #[error("rule {position}: redirect")]
    Redirect {
        /// Which rule, from 1.
        position: usize,
        /// What is wrong with it.
        #[source]
        source: AddressError,
    },
}

#[derive(Debug)]
struct Rule {
    regex: Regex,
    direct: bool,
    use_https: bool,
    redirect: Option<String>,
}

/// The rules, ready to be asked.
#[derive(Debug, Default)]
pub struct Rules(Vec<Rule>);

/// What the rules say about a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// Whether the swarm may answer, if it is a blob.
    pub swarm: bool,
    /// Whether the scheme becomes https.
    pub use_https: bool,
    /// The host that takes the place of the URL's.
    pub redirect: Option<&'a str>,
}

impl Decision<'_> {
    /// Neither for the swarm nor rewritten.
    pub const DIRECT: Self = Self { swarm: false, use_https: false, redirect: None };
    /// For the swarm, not rewritten.
    pub const SWARM: Self = Self { swarm: true, use_https: false, redirect: None };

    /// The URL after the rewrite.
    ///
    /// # Errors
    /// If the parts do not make a URL, which the checks in [`Rules::new`] rule out.
    pub fn rewrite(&self, url: Uri) -> Result<Uri, http::Error> {
        if !self.use_https && self.redirect.is_none() {
            return Ok(url);
        }
        let parts = url.into_parts();
        let scheme = if self.use_https { Scheme::HTTPS } else { parts.scheme.unwrap_or(Scheme::HTTP) };
        let host = self.redirect.or(parts.authority.as_ref().map(|authority| authority.as_str()));
        Uri::builder()
            .scheme(scheme)
            .authority(host.unwrap_or_default())
            .path_and_query(parts.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/")))
            .build()
    }
}

impl Rules {
    /// Compiles the rules.
    ///
    /// # Errors
    /// At the first rule that has no regular expression or no host where one belongs.
    pub fn new(settings: &[RuleSettings]) -> Result<Self, RuleError> {
        let compile = |(at, rule): (usize, &RuleSettings)| {
            let position = at + 1;
            let regex = Regex::new(&rule.regex).map_err(|source| RuleError::Regex { position, source })?;
            if let Some(host) = &rule.redirect {
                HostPort::parse(host, Some(443)).map_err(|source| RuleError::Redirect { position, source })?;
            }
            let RuleSettings { direct, use_https, redirect, .. } = rule.clone();
            Ok(Rule { regex, direct, use_https, redirect })
        };
        settings.iter().enumerate().map(compile).collect::<Result<_, _>>().map(Self)
    }

    /// What to do with a request for this URL.
    #[must_use]
    pub fn decide(&self, method: &Method, url: &str) -> Decision<'_> {
        if method != Method::GET {
            return Decision::DIRECT;
        }
        if self.0.is_empty() {
            return Decision::SWARM;
        }
        self.0.iter().find(|rule| rule.regex.is_match(url)).map_or(Decision::DIRECT, |rule| Decision {
            swarm: !rule.direct,
            use_https: rule.use_https,
            redirect: rule.redirect.as_deref(),
        })
    }

    /// The hosts that requests may be redirected to; who named them there wants them reached.
    pub(super) fn redirect_hosts(&self) -> impl Iterator<Item = HostPattern> {
        self.0.iter().filter_map(|rule| rule.redirect.as_deref()?.parse().ok())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn rule(regex: &str, direct: bool, use_https: bool) -> RuleSettings {
        RuleSettings { regex: regex.into(), direct, use_https, redirect: None }
    }

    fn redirect(regex: &str, direct: bool, use_https: bool, host: &str) -> RuleSettings {
        RuleSettings { redirect: Some(host.into()), ..rule(regex, direct, use_https) }
    }

    /// What becomes of a GET: whether the swarm may answer it, and what it has become.
    fn outcome(rules: &Rules, method: &Method, url: &str) -> (bool, String) {
        let decision = rules.decide(method, url);
        (decision.swarm, decision.rewrite(url.parse().unwrap()).unwrap().to_string())
    }

    /// Dragonfly v1's TestMatch, and what its code does beyond that.
    #[test]
    fn the_truth_table_is_that_of_v1() {
        const SWARM: bool = true;
        const DIRECT: bool = false;
        let blobs = [rule("/blobs/sha256/", false, false)];
        let five = [
            rule("/a/d", false, true),
            rule("/a/b", true, false),
            rule("/a", false, false),
            rule("/a/c", true, false),
            rule("/a/e", false, true),
        ];
        let moved = [redirect("/a/f", false, false, "r")];
        let narrow = [
            rule("^http://plain\\.example/", true, true),
            redirect("^http://old\\.example(:80)?/", true, false, "new.example:5000"),
            redirect("//both\\.example/", false, true, "new.example"),
            rule("[?&]swarm=yes$", false, false),
            rule("(?i)CASE", false, false),
        ];
        for (rules, url, swarm, becomes) in [
            // An expression is searched anywhere in the URL, and where none is found the request is direct.
            (&blobs[..], "http://index.docker.io/v2/blobs/sha256/xxx", SWARM, None),
            (&blobs, "http://index.docker.io/v2/auth", DIRECT, None),
            (&blobs, "http://h/v2/a/manifests/1?at=/blobs/sha256/", SWARM, None),
            (&blobs, "http://h/v2/BLOBS/SHA256/", DIRECT, None),
            // The first match decides, and nothing of a later one is added.
            (&five, "http://h/a", SWARM, None),
            (&five, "http://h/a/b", DIRECT, None),
            (&five, "http://h/a/c", SWARM, None),
            (&five, "http://h/a/d", SWARM, Some("https://h/a/d")),
            (&five, "http://h/a/e", SWARM, None),
            (&five, "http://h/x/a", SWARM, None),
            (&five, "http://h/other", DIRECT, None),
            (&moved, "http://h/a/f", SWARM, Some("http://r/a/f")),
            // Rewrites hold for direct requests too; scheme, path and query stay unless a rule says otherwise.
            (&narrow, "http://plain.example/v2/", DIRECT, Some("https://plain.example/v2/")),
            (&narrow, "http://plainXexample/v2/", DIRECT, None),
            (&narrow, "http://h/?to=http://plain.example/", DIRECT, None),
            (&narrow, "http://old.example/v2/a?b=c", DIRECT, Some("http://new.example:5000/v2/a?b=c")),
            (&narrow, "http://old.example:80/v2/a", DIRECT, Some("http://new.example:5000/v2/a")),
            (&narrow, "http://both.example/v2/a", SWARM, Some("https://new.example/v2/a")),
            (&narrow, "https://both.example/v2/a", SWARM, Some("https://new.example/v2/a")),
            (&narrow, "http://h:8080/file?swarm=yes", SWARM, None),
            (&narrow, "http://h:8080/file?swarm=yes&more", DIRECT, None),
            (&narrow, "http://h/case", SWARM, None),
        ] {
            let rules = Rules::new(rules).unwrap();
            assert_eq!(outcome(&rules, &Method::GET, url), (swarm, becomes.unwrap_or(url).to_owned()), "{url}");
            // Nothing else than a GET is touched, whatever it matches.
            for method in [Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS] {
                assert_eq!(outcome(&rules, &method, url), (DIRECT, url.to_owned()), "{method} {url}");
            }
        }
        assert_eq!(Rules::default().decide(&Method::GET, "http://h/any"), Decision::SWARM);
        assert_eq!(Rules::default().decide(&Method::HEAD, "http://h/any"), Decision::DIRECT);
    }

    #[test]
    fn bad_rules_are_named() {
        let bad = [rule("ok", false, false), rule("(", false, false)];
        assert!(matches!(Rules::new(&bad), Err(RuleError::Regex { position: 2, .. })));
        let bad = RuleSettings { redirect: Some("http://x".into()), ..rule("ok", false, false) };
        assert!(matches!(Rules::new(&[bad]), Err(RuleError::Redirect { position: 1, .. })));
    }
}
