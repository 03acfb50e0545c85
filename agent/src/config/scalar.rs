//! What a single value means: sizes, rates, durations, addresses, names. Pure; the messages are for the operator.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use darter_swarm::tags::TTL_MAX;
use darter_tracker::{PieceSizeRule, Role};
use regex::Regex;

use super::types::{Space, Transport, Verify, WhenRegistryDown};

/// What a scalar parses to, or what is wrong with it.
pub(super) type Parsed<T> = Result<T, String>;

/// The longest name of a node, a cluster or a zone: they appear in tables and log lines.
const NAME_CHARS_MAX: usize = 64;

/// Units of a size. As everywhere outside of Dragonfly v1, KB is 1000 bytes and KiB is 1024.
const SIZE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("KB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

/// Units of a rate, those of Dragonfly v1 with its base of 1024, so that a limit that moves here keeps its meaning;
/// the ones with an i mean the same.
const RATE_UNITS: &[(&str, u64)] = &[
    ("B", 1),
    ("k", 1 << 10),
    ("K", 1 << 10),
    ("KB", 1 << 10),
    ("KiB", 1 << 10),
    ("m", 1 << 20),
    ("M", 1 << 20),
    ("MB", 1 << 20),
    ("MiB", 1 << 20),
    ("g", 1 << 30),
    ("G", 1 << 30),
    ("GB", 1 << 30),
    ("GiB", 1 << 30),
];

/// Units of a duration, in milliseconds.
const DURATION_UNITS: &[(&str, u64)] = &[("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// A size in bytes.
pub(crate) fn size(text: &str) -> Parsed<u64> {
    with_unit(text, SIZE_UNITS)?.ok_or_else(|| format!("'{text}' is not a size, as in 20GiB, 512MiB, 10MB or 1048576"))
}

/// A rate in bytes per second; 0 is no limit.
pub(super) fn rate(text: &str) -> Parsed<u64> {
    with_unit(text, RATE_UNITS)?
        .ok_or_else(|| format!("'{text}' is not a rate in bytes per second, as in 20M, 64KB, 1GB or 0 for no limit"))
}

/// Disk space: a size, or a share in percent.
pub(super) fn space(text: &str) -> Parsed<Space> {
    if let Some(percent) = text.strip_suffix('%') {
        let percent = percent.trim_end().parse().ok().filter(|percent| *percent <= 100);
        return percent.map(Space::Percent).ok_or_else(|| format!("'{text}' is not a share between 0% and 100%"));
    }
    let bytes = with_unit(text, SIZE_UNITS)?;
    bytes.map(Space::Bytes).ok_or_else(|| format!("'{text}' is neither a size, as in 20GiB, nor a share, as in 15%"))
}

/// `None` if it is no number with one of the units; an error if it is one, but too large.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Parsed<Option<u64>> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim_start() {
        "" => Some(1),
        unit => units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor),
    };
    let Some(factor) = factor.filter(|_| digits > 0) else { return Ok(None) };
    let value = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    value.map(Some).ok_or_else(|| format!("'{text}' is too large"))
}

/// A duration: numbers with units, as in `1h30m`.
pub(super) fn duration(text: &str) -> Parsed<Duration> {
    let wrong = || format!("'{text}' is not a duration, as in 90s, 5m or 1h30m");
    let (mut rest, mut total) = (text, 0u64);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(letters);
        let factor = DURATION_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
        let factor = factor.filter(|_| digits > 0).ok_or_else(wrong)?;
        let part = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        total = part.and_then(|part| total.checked_add(part)).ok_or_else(|| format!("'{text}' is too long"))?;
        rest = after;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_millis(total)) }
}

/// How long an answer for a tag may be used again.
pub(super) fn tag_ttl(text: &str) -> Parsed<Duration> {
    let ttl = duration(text)?;
    match ttl <= TTL_MAX {
        true => Ok(ttl),
        false => Err(format!("'{text}' is longer than 24h, after which no answer for a tag is used")),
    }
}

/// An address to listen at.
pub(super) fn listen(text: &str) -> Parsed<SocketAddr> {
    text.parse().map_err(|_| {
        format!("'{text}' is not an address and port, as in 127.0.0.1:65001 or [::1]:65001 (no host names)")
    })
}

/// An IP address, IPv4 in its own clothes.
pub(super) fn ip(text: &str) -> Parsed<IpAddr> {
    let parsed: Result<IpAddr, _> = text.parse();
    parsed.map(|ip| ip.to_canonical()).map_err(|_| format!("'{text}' is not an IP address (no port, no host name)"))
}

/// A name of a node, a cluster or a zone.
pub(super) fn name(text: &str) -> Parsed<String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/' | ':');
    if text.is_empty() || text.len() > NAME_CHARS_MAX || !text.chars().all(fits) {
        return Err(format!("'{text}' is not a name: 1 to {NAME_CHARS_MAX} letters, digits and . - _ / : are"));
    }
    Ok(text.to_owned())
}

/// A path of a file; relative ones are relative to where the agent was started.
pub(super) fn file(text: &str) -> Parsed<PathBuf> {
    if text.is_empty() { Err("the path is empty".to_owned()) } else { Ok(PathBuf::from(text)) }
}

/// A path that does not depend on where the agent was started.
pub(super) fn absolute(text: &str) -> Parsed<PathBuf> {
    let path = file(text)?;
    if path.is_absolute() { Ok(path) } else { Err(format!("'{text}' must be absolute, as in /var/lib/darter")) }
}

/// True or false.
pub(super) fn boolean(text: &str) -> Parsed<bool> {
    one_of(text, &[("true", true), ("false", false)])
}

/// What a node is there for.
pub(super) fn role(text: &str) -> Parsed<Role> {
    one_of(text, &[("node", Role::Node), ("seed", Role::Seed)])
}

/// How peers talk.
pub(super) fn transport(text: &str) -> Parsed<Transport> {
    one_of(text, &[("auto", Transport::Auto), ("quic", Transport::Quic), ("tcp", Transport::Tcp)])
}

/// What to do while a registry is down.
pub(super) fn when_registry_down(text: &str) -> Parsed<WhenRegistryDown> {
    use WhenRegistryDown::{Allow, Deny, Seen};
    one_of(text, &[("seen", Seen), ("allow", Allow), ("deny", Deny)])
}

/// When bytes may leave.
pub(super) fn verify(text: &str) -> Parsed<Verify> {
    one_of(text, &[("streaming", Verify::Streaming), ("before_stream", Verify::BeforeStream)])
}

/// How blobs are cut.
pub(super) fn piece_size(text: &str) -> Parsed<PieceSizeRule> {
    use darter_tracker::PieceSize;
    match text {
        "auto" => return Ok(PieceSizeRule::Auto),
        "dragonfly" => return Ok(PieceSizeRule::Dragonfly),
        _ => {}
    }
    let bytes = with_unit(text, SIZE_UNITS)?.ok_or_else(|| format!("'{text}' is not auto, dragonfly or a size"))?;
    let size = u32::try_from(bytes).ok().and_then(PieceSize::new);
    size.map(PieceSizeRule::Fixed).ok_or_else(|| format!("'{text}' is not between 4KiB and 16MiB"))
}

/// A regular expression.
pub(super) fn regex(text: &str) -> Parsed<Regex> {
    Regex::new(text).map_err(|error| {
        // The library draws a picture over several lines; the last says what is wrong.
        let picture = error.to_string();
        let last = picture.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
        format!("'{text}' is not a regular expression: {last}")
    })
}

/// The URL of a registry: scheme and authority, nothing else.
pub(super) fn registry_url(text: &str) -> Parsed<http::Uri> {
    let wrong = |why: &str| format!("'{text}' is not the URL of a registry, as in https://index.docker.io: {why}");
    if text.contains('@') {
        // Not echoed: there may be a password in it.
        return Err("credentials do not belong here; clients bring their own".to_owned());
    }
    let url: http::Uri = text.parse().map_err(|error| wrong(&format!("{error}")))?;
    if !matches!(url.scheme_str(), Some("http" | "https")) {
        return Err(wrong("it starts with neither https:// nor http://"));
    }
    let authority = url.authority().ok_or_else(|| wrong("it names no host"))?;
    authority.as_str().parse::<super::hosts::HostPort>().map_err(|error| wrong(&error.to_string()))?;
    if !matches!(url.path(), "" | "/") || url.query().is_some() {
        return Err(wrong("it has a path"));
    }
    Ok(url)
}

/// One of a few words.
fn one_of<T: Copy>(text: &str, choices: &[(&str, T)]) -> Parsed<T> {
    choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        format!("'{text}' is not one of: {}", words.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_shares() {
        for (text, expected) in [
            ("20GiB", Some(20 << 30)),
            ("512MiB", Some(512 << 20)),
            ("10MB", Some(10_000_000)),
            ("1 KiB", Some(1024)),
            ("0", Some(0)),
            ("1048576", Some(1 << 20)),
            ("7B", Some(7)),
            ("1TB", Some(1_000_000_000_000)),
            ("", None),
            ("GiB", None),
            ("20Gi", None),
            ("20gib", None),
            ("1.5GiB", None),
            ("-1", None),
            ("20 G", None),
            ("99999999999999999999", None),
            ("99999999TiB", None),
            ("1MiB1", None),
        ] {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
        assert_eq!(space("15%"), Ok(Space::Percent(15)));
        assert_eq!(space("1GiB"), Ok(Space::Bytes(1 << 30)));
        for text in ["101%", "%", "-1%", "1.5%", "x"] {
            assert!(space(text).is_err(), "{text}");
        }
        assert_eq!(Space::Percent(15).bytes(1000), 150);
        assert_eq!(Space::Percent(100).bytes(u64::MAX), u64::MAX / 100 * 100);
    }

    #[test]
    fn rates_are_those_of_dragonfly_v1() {
        for (text, expected) in [
            ("0", Some(0)),
            ("100", Some(100)),
            ("100B", Some(100)),
            ("64k", Some(64 << 10)),
            ("64K", Some(64 << 10)),
            ("64KB", Some(64 << 10)),
            ("20m", Some(20 << 20)),
            ("20M", Some(20 << 20)),
            ("20MB", Some(20 << 20)),
            ("1g", Some(1 << 30)),
            ("1G", Some(1 << 30)),
            ("1GB", Some(1 << 30)),
            ("2MiB", Some(2 << 20)),
            ("kB", None),
            ("1kb", None),
            ("1mb", None),
            ("-1", None),
            ("1.5M", None),
            ("M", None),
            ("", None),
            ("1TB", None),
            ("20M/s", None),
            ("99999999999g", None),
        ] {
            assert_eq!(rate(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, expected) in [
            ("1h", Some(3_600_000)),
            ("1h30m", Some(5_400_000)),
            ("90s", Some(90_000)),
            ("500ms", Some(500)),
            ("2d", Some(172_800_000)),
            ("0s", Some(0)),
            ("", None),
            ("5", None),
            ("m", None),
            ("5 m", None),
            ("1h30", None),
            ("-5m", None),
            ("1.5h", None),
            ("99999999999999d", None),
            ("5min", None),
        ] {
            assert_eq!(duration(text).ok(), expected.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn registries_are_urls_without_more() {
        for (text, fits) in [
            ("https://index.docker.io", true),
            ("https://10.0.0.1:5000/", true),
            ("http://[fd00::1]:5000", true),
            ("index.docker.io", false),
            ("ftp://a", false),
            ("https://", false),
            ("https://a/v2", false),
            ("https://a?ns=b", false),
            ("https://a b", false),
            ("/v2", false),
            ("https://a:99999", false),
        ] {
            assert_eq!(registry_url(text).is_ok(), fits, "{text}");
        }
        let refused = registry_url("https://me:hunter2@a").err().unwrap_or_default();
        assert!(!refused.is_empty() && !refused.contains("hunter2"));
    }
}
