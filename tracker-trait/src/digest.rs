//! Content digests as the OCI specifications write them: `sha256:<64 hex>` or `sha512:<128 hex>`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The digest of a whole blob.
///
/// Parsed once at the edge; a value of this type is always well formed, so it may be turned into a file name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Digest {
    /// SHA-256, what registries use today.
    Sha256([u8; 32]),
    /// SHA-512, the other algorithm that the OCI image specification registers.
    Sha512([u8; 64]),
}

/// Why a text is not a digest. The caller sent it; retrying cannot help; nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `:` between algorithm and value.
    #[error("a digest is written algorithm:hex")]
    NoSeparator,
    /// The algorithm is none that is checked here; MD5 and SHA-1 are among the refused.
    #[error("the digest algorithm is not sha256 or sha512")]
    Algorithm,
    /// The value has the wrong length or holds something other than lower-case hex digits.
    #[error("the digest value is not {expected} lower-case hex digits")]
    Value {
        /// How many digits the algorithm asks for.
        expected: usize,
    },
}

impl Digest {
    /// `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "sha256",
            Self::Sha512(_) => "sha512",
        }
    }

    /// The raw value, 32 or 64 bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Sha256(value) => value,
            Self::Sha512(value) => value,
        }
    }

    /// The value in lower-case hex, safe as a file name.
    #[must_use]
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        let mut text = String::with_capacity(self.as_bytes().len() * 2);
        for byte in self.as_bytes() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm(), self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (algorithm, value) = text.split_once(':').ok_or(DigestError::NoSeparator)?;
        match algorithm {
            "sha256" => decode_hex(value).map(Self::Sha256),
            "sha512" => decode_hex(value).map(Self::Sha512),
            _ => Err(DigestError::Algorithm),
        }
    }
}

/// Decodes exactly `N` bytes of lower-case hex; the OCI grammar does not allow upper case.
fn decode_hex<const N: usize>(text: &str) -> Result<[u8; N], DigestError> {
    let wrong = DigestError::Value { expected: N * 2 };
    if text.len() != N * 2 {
        return Err(wrong);
    }
    let mut value = [0; N];
    for (byte, pair) in value.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else {
            return Err(wrong);
        };
        *byte = high << 4 | low;
    }
    Ok(value)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// On the wire a digest is its algorithm's number and its raw bytes: 34 bytes instead of 71.
#[derive(Serialize, Deserialize)]
enum Wire {
    Sha256([u8; 32]),
    Sha512([u8; 32], [u8; 32]),
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Sha256(value) => Wire::Sha256(*value),
            Self::Sha512(value) => {
                let (mut first, mut second) = ([0; 32], [0; 32]);
                first.copy_from_slice(&value[..32]);
                second.copy_from_slice(&value[32..]);
                Wire::Sha512(first, second)
            }
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Wire::deserialize(deserializer)? {
            Wire::Sha256(value) => Self::Sha256(value),
            Wire::Sha512(first, second) => {
                let mut value = [0; 64];
                value[..32].copy_from_slice(&first);
                value[32..].copy_from_slice(&second);
                Self::Sha512(value)
            }
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_is_not_a_digest() {
        let hex = "a".repeat(64);
        for (text, error) in [
            ("", DigestError::NoSeparator),
            ("sha256", DigestError::NoSeparator),
            (&format!("md5:{}", "a".repeat(32)), DigestError::Algorithm),
            ("sha256:", DigestError::Value { expected: 64 }),
            (&format!("sha256:{}", "A".repeat(64)), DigestError::Value { expected: 64 }),
            (&format!("sha256:{hex}0"), DigestError::Value { expected: 64 }),
            (&format!("sha256:{}/..", "a".repeat(61)), DigestError::Value { expected: 64 }),
            (&format!("sha512:{hex}"), DigestError::Value { expected: 128 }),
            (&format!("sha256:{}", "é".repeat(32)), DigestError::Value { expected: 64 }),
        ] {
            assert_eq!(text.parse::<Digest>(), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_and_wire_round_trip(first in any::<[u8; 32]>(), second in any::<[u8; 32]>()) {
            let mut long = [0; 64];
            long[..32].copy_from_slice(&first);
            long[32..].copy_from_slice(&second);
            for digest in [Digest::Sha256(first), Digest::Sha512(long)] {
                prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
                let bytes = postcard::to_stdvec(&digest).unwrap();
                prop_assert_eq!(postcard::from_bytes::<Digest>(&bytes).unwrap(), digest);
            }
        }
    }
}
