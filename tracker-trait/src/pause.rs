//! A registry that wants to be left alone, and how members tell each other so.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A registry without its name: members need to know whether they ask the same one, not which.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RegistryTag(pub u64);

impl RegistryTag {
    /// The tag of the registry at `origin`, `scheme://host:port` in one spelling per registry.
    #[must_use]
    pub fn of(origin: &str) -> Self {
        let hash = blake3::hash(origin.as_bytes());
        let mut tag = [0; 8];
        tag.copy_from_slice(&hash.as_bytes()[..8]);
        Self(u64::from_le_bytes(tag))
    }
}

/// A registry has asked to be left alone (429 or 503 with `Retry-After`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// Which one.
    pub registry: RegistryTag,
    /// For how long from now.
    pub left: Duration,
}

/// A field that a message did not have in its first version. It is the last of a frame, and where it says nothing the frame has
/// the bytes that it had before: whoever does not know the field understands every message that does not need it, and a message
/// of somebody who does not know it says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added<T>(pub Option<T>);

impl<T> Default for Added<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Serialize> Serialize for Added<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            Some(value) => value.serialize(serializer),
            // No bytes at all.
            None => serializer.serialize_unit(),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Added<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // The end of the frame. What is there and cannot be read is left over, which the frame's reader refuses.
        Ok(Self(T::deserialize(deserializer).ok()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Old {
        one: u32,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct New {
        one: u32,
        two: Added<Pause>,
    }

    #[test]
    fn a_field_that_says_nothing_is_not_there() {
        let silent = New { one: 7, two: Added::default() };
        let bytes = postcard::to_stdvec(&silent).unwrap();
        assert_eq!(bytes, postcard::to_stdvec(&Old { one: 7 }).unwrap());
        assert_eq!(postcard::from_bytes::<New>(&bytes).unwrap(), silent);
        let said = New { one: 7, two: Added(Some(Pause { registry: RegistryTag(9), left: Duration::from_secs(3) })) };
        let bytes = postcard::to_stdvec(&said).unwrap();
        assert_eq!(postcard::from_bytes::<New>(&bytes).unwrap(), said);
        // Half of it is none of it, and the rest is left over or missing.
        assert_eq!(postcard::from_bytes::<New>(&bytes[..3]).unwrap().two, Added::default());
    }

    #[test]
    fn registries_are_told_apart() {
        assert_eq!(RegistryTag::of("https://a:443"), RegistryTag::of("https://a:443"));
        assert_ne!(RegistryTag::of("https://a:443"), RegistryTag::of("http://a:443"));
    }
}
