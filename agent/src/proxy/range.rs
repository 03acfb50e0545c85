//! Byte ranges, read as the registry would read them.
//!
//! The reference registry answers blobs with Go's `http.ServeContent`; its habits are kept here where RFC 9110 leaves
//! a choice: what does not parse is 416, an empty list is the whole. Where an answer would need several parts, or is
//! of no use to anybody (the last zero bytes), the request is left to the registry itself.

use std::ops::Range;

/// What a Range header asks for, before the length is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The whole blob.
    Whole,
    /// One range.
    One(Spec),
    /// Something that the registry should answer by itself.
    Registrys,
    /// Not a byte range at all.
    Invalid,
}

/// One range of a Range header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spec {
    /// From an offset to the end, or to an offset that is included.
    From(u64, Option<u64>),
    /// That many bytes at the end, at least one.
    Last(u64),
}

/// A range that was checked against the length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Satisfied {
    /// Some bytes, status 206; never empty and always inside the blob.
    Part(Range<u64>),
    /// It begins past the end, status 416 with the length.
    PastEnd,
}

/// Reads a Range header.
pub(super) fn parse(header: &str) -> Wanted {
    let Some(list) = header.strip_prefix("bytes=") else { return Wanted::Invalid };
    let mut specs = list.split(',').map(str::trim).filter(|spec| !spec.is_empty());
    match (specs.next(), specs.next()) {
        (None, _) => Wanted::Whole,
        (Some(_), Some(_)) => Wanted::Registrys,
        (Some(spec), None) => one(spec),
    }
}

fn one(spec: &str) -> Wanted {
    let Some((first, last)) = spec.split_once('-') else { return Wanted::Invalid };
    let (first, last) = (first.trim(), last.trim());
    match (first.is_empty(), last.is_empty()) {
        (true, true) => Wanted::Invalid,
        (true, false) => match number(last) {
            None => Wanted::Invalid,
            Some(0) => Wanted::Registrys,
            Some(count) => Wanted::One(Spec::Last(count)),
        },
        (false, true) => number(first).map_or(Wanted::Invalid, |first| Wanted::One(Spec::From(first, None))),
        (false, false) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => Wanted::One(Spec::From(first, Some(last))),
            _ => Wanted::Invalid,
        },
    }
}

/// Digits only: `parse` alone would take a sign. What does not fit is refused, as the registry does.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl Spec {
    /// Cuts the range to a blob of `length` bytes, at least one.
    pub(super) fn within(self, length: u64) -> Satisfied {
        match self {
            Self::From(first, _) if first >= length => Satisfied::PastEnd,
            Self::From(first, last) => {
                let end = last.map_or(length, |last| length.min(last.saturating_add(1)));
                Satisfied::Part(first..end)
            }
            Self::Last(count) => Satisfied::Part(length.saturating_sub(count)..length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_ranges_as_the_registry_does() {
        const LENGTH: u64 = 1500;
        let part = |range: Range<u64>| Ok(Satisfied::Part(range));
        for (header, expected) in [
            ("bytes=500-1499", part(500..1500)),
            ("bytes=500-", part(500..1500)),
            ("bytes=-500", part(1000..1500)),
            ("bytes=-5000", part(0..1500)),
            ("bytes=1000-5000", part(1000..1500)),
            ("bytes=0-0", part(0..1)),
            ("bytes= 3-4 ", part(3..5)),
            ("bytes=3-4,", part(3..5)),
            ("bytes=1500-", Ok(Satisfied::PastEnd)),
            ("bytes=2000-5000", Ok(Satisfied::PastEnd)),
            ("bytes=", Err(Wanted::Whole)),
            ("bytes=0-1,4-5", Err(Wanted::Registrys)),
            ("bytes=-0", Err(Wanted::Registrys)),
            ("bytes=500-0", Err(Wanted::Invalid)),
            ("bytes=-", Err(Wanted::Invalid)),
            ("bytes=5", Err(Wanted::Invalid)),
            ("bytes=a-b", Err(Wanted::Invalid)),
            ("bytes=+1-2", Err(Wanted::Invalid)),
            ("bytes=--2", Err(Wanted::Invalid)),
            ("bytes=0-99999999999999999999", Err(Wanted::Invalid)),
            ("pieces=0-1", Err(Wanted::Invalid)),
            ("", Err(Wanted::Invalid)),
        ] {
            let got = match parse(header) {
                Wanted::One(spec) => Ok(spec.within(LENGTH)),
                other => Err(other),
            };
            assert_eq!(got, expected, "{header}");
        }
    }

    proptest! {
        #[test]
        fn a_part_is_never_empty_nor_outside(first: u64, last: u64, length in 1u64.., header in "bytes=[0-9, -]{0,12}") {
            let mut specs = vec![Spec::From(first, None), Spec::Last(first.max(1))];
            specs.extend((first <= last).then_some(Spec::From(first, Some(last))));
            if let Wanted::One(spec) = parse(&header) {
                specs.push(spec);
            }
            for spec in specs {
                if let Satisfied::Part(range) = spec.within(length) {
                    prop_assert!(range.start < range.end && range.end <= length);
                }
            }
        }
    }
}
