//! Which requests of a proxied client the swarm may answer, and which are rewritten on the way.
//!
//! Dragonfly v1's table: rules are tried in order on the full URL, unanchored, for GET alone; the first that matches
//! decides; a rewrite holds for direct requests too. Where rules are given and none matches, the request is direct;
//! where none are given, every blob by digest is the swarm's.

use http::Uri;
use http::uri::{PathAndQuery, Scheme};
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

    /// What to do with a GET of this URL.
    #[must_use]
    pub fn decide(&self, url: &str) -> Decision<'_> {
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

    #[test]
    fn the_first_match_decides_as_in_v1() {
        let one = Rules::new(&[rule("/blobs/sha256/", false, false)]).unwrap();
        let five = Rules::new(&[
            rule("/a/d", false, true),
            rule("/a/b", true, false),
            rule("/a", false, false),
            rule("/a/c", true, false),
            rule("/a/e", false, true),
        ])
        .unwrap();
        for (rules, url, swarm, use_https) in [
            (&one, "http://index.docker.io/v2/blobs/sha256/xxx", true, false),
            (&one, "http://index.docker.io/v2/auth", false, false),
            (&five, "http://h/a", true, false),
            (&five, "http://h/a/b", false, false),
            (&five, "http://h/a/c", true, false),
            (&five, "http://h/a/d", true, true),
            (&five, "http://h/a/e", true, false),
            (&five, "http://h/other", false, false),
        ] {
            assert_eq!(rules.decide(url), Decision { swarm, use_https, redirect: None }, "{url}");
        }
        assert_eq!(Rules::default().decide("http://h/any"), Decision::SWARM);
    }

    #[test]
    fn rewrites_hold_for_direct_requests_too() {
        let redirect = |direct, use_https| RuleSettings {
            regex: "^http://old/".into(),
            direct,
            use_https,
            redirect: Some("new.example:5000".into()),
        };
        for (settings, url, expected) in [
            (redirect(true, false), "http://old/v2/a?b=c", "http://new.example:5000/v2/a?b=c"),
            (redirect(false, true), "http://old/v2/a", "https://new.example:5000/v2/a"),
            (rule("old", true, true), "http://old:80/v2/a", "https://old:80/v2/a"),
            (rule("other", true, true), "http://old/v2/a", "http://old/v2/a"),
        ] {
            let rules = Rules::new(&[settings]).unwrap();
            let rewritten = rules.decide(url).rewrite(url.parse().unwrap()).unwrap();
            assert_eq!(rewritten.to_string(), expected);
        }
    }

    #[test]
    fn bad_rules_are_named() {
        let bad = [rule("ok", false, false), rule("(", false, false)];
        assert!(matches!(Rules::new(&bad), Err(RuleError::Regex { position: 2, .. })));
        let bad = RuleSettings { redirect: Some("http://x".into()), ..rule("ok", false, false) };
        assert!(matches!(Rules::new(&[bad]), Err(RuleError::Redirect { position: 1, .. })));
    }
}
