//! A YAML document as a tree whose every key and value knows its line and column.
//!
//! Typed deserialisation stops at the first error; a tree can be walked to the end. Scalars keep the text they were
//! written as, so that a version 1.10 stays 1.10 and the reader of a key decides what its text means. Not here: keys.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DuplicateKeyPolicy, Location, MergeKeyPolicy, NonFiniteFloatPolicy, Spanned};

use super::problems::{Place, Problem};

/// A value and where it stands.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// What a value is.
#[derive(Clone, Debug, Default)]
pub(super) enum Value {
    #[default]
    Null,
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One `key: value` of a mapping, in the order of the file. A key may occur twice; whoever walks the tree says so.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) place: Place,
    pub(super) node: Node,
}

impl Value {
    /// What it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "nothing",
            Self::Scalar(_) => "a single value",
            Self::List(_) => "a list",
            Self::Map(_) => "a mapping",
        }
    }
}

/// The tree of a document. An empty document is [`Value::Null`].
///
/// # Errors
/// If the text is not YAML: the one problem that hides all others.
pub(super) fn parse(text: &str) -> Result<Node, Problem> {
    let options = serde_saphyr::options! {
        // Both occurrences are wanted here, to be reported with the rest.
        duplicate_keys: DuplicateKeyPolicy::LastWins,
        // A configuration this small needs no inheritance; `<<` is an unknown key.
        merge_keys: MergeKeyPolicy::AsOrdinary,
        emit_comments: false,
        // A zone may be called .inf: what a number means is for the reader of its key.
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options) {
        Ok(raw) => Ok(node(raw, text)),
        Err(error) => {
            let error = error.without_snippet();
            let place = error.location().map_or(Place::Whole, place);
            let message = one_line(&error.to_string());
            // The place says that already.
            let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
            Err(Problem::new(place, "", format!("not valid YAML: {message}")))
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn place(location: Location) -> Place {
    Place::File { line: location.line(), column: location.column() }
}

/// The tree as the YAML library gives it.
enum Raw {
    Null,
    /// A string, unescaped.
    Text(String),
    /// Something that YAML reads as a number or a truth value. Its text is in the source, at its location.
    Typed,
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<Raw>, Spanned<Raw>)>),
}

fn node(raw: Spanned<Raw>, source: &str) -> Node {
    let Spanned { value, referenced, defined } = raw;
    let value = match value {
        Raw::Null => Value::Null,
        Raw::Text(text) => Value::Scalar(text),
        Raw::Typed => Value::Scalar(written(defined, source)),
        Raw::List(items) => Value::List(items.into_iter().map(|item| node(item, source)).collect()),
        Raw::Map(entries) => Value::Map(entries.into_iter().map(|entry| self::entry(entry, source)).collect()),
    };
    Node { place: place(referenced), value }
}

fn entry((key, value): (Spanned<Raw>, Spanned<Raw>), source: &str) -> Entry {
    let key = node(key, source);
    let text = match key.value {
        Value::Scalar(text) => text,
        // Such keys are in no schema: reported as unknown under this name.
        Value::Null => "null".to_owned(),
        Value::List(_) => "[...]".to_owned(),
        Value::Map(_) => "{...}".to_owned(),
    };
    Entry { key: text, place: key.place, node: node(value, source) }
}

/// The text of a scalar as it was written.
fn written(location: Location, source: &str) -> String {
    let span = location.span();
    let range = span.byte_offset().zip(span.byte_len()).and_then(|(offset, length)| {
        let (start, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
        source.get(start..start.checked_add(length)?)
    });
    range.unwrap_or_default().trim().to_owned()
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Raw, E> {
        Ok(Raw::Text(text.to_owned()))
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_i128<E: de::Error>(self, _: i128) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_u128<E: de::Error>(self, _: u128) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Raw, E> {
        Ok(Raw::Typed)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Raw::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Raw, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Raw::Map(map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Every key and scalar with its place.
    fn flat(node: &Node, path: &str, out: &mut Vec<String>) {
        let at = |place: &Place| match place {
            Place::File { line, column } => format!("{line}:{column}"),
            other => format!("{other:?}"),
        };
        match &node.value {
            Value::Null => out.push(format!("{path} null @{}", at(&node.place))),
            Value::Scalar(text) => out.push(format!("{path} <{text}> @{}", at(&node.place))),
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    flat(item, &format!("{path}[{index}]"), out);
                }
            }
            Value::Map(entries) => {
                for entry in entries {
                    out.push(format!("{path}.{} @{}", entry.key, at(&entry.place)));
                    flat(&entry.node, &format!("{path}.{}", entry.key), out);
                }
            }
        }
    }

    #[test]
    fn everything_keeps_its_text_and_place() {
        let text = "a: {b: 1.10, c: [yes, 007]}\nd: 'it''s'\nd: ~\n\"é\": 20GiB  # so\ne: -1_0\nf: 99999999999999999999999999\ng: &x 0x10\nh: *x\ni: .inf\n";
        let mut out = Vec::new();
        flat(&parse(text).unwrap(), "", &mut out);
        assert_eq!(
            out,
            [
                ".a @1:1",
                ".a.b @1:5",
                ".a.b <1.10> @1:8",
                ".a.c @1:14",
                ".a.c[0] <yes> @1:18",
                ".a.c[1] <007> @1:23",
                ".d @2:1",
                ".d <it's> @2:4",
                ".d @3:1",
                ".d null @3:4",
                ".é @4:1",
                ".é <20GiB> @4:6",
                ".e @5:1",
                ".e <-1_0> @5:4",
                ".f @6:1",
                ".f <99999999999999999999999999> @6:4",
                ".g @7:1",
                ".g <0x10> @7:7",
                ".h @8:1",
                ".h <0x10> @8:4",
                ".i @9:1",
                ".i <.inf> @9:4",
            ]
        );
    }

    #[test]
    fn empty_documents_are_null() {
        for text in ["", "\n", "# nothing\n", "---\n", "null"] {
            assert!(matches!(parse(text).unwrap().value, Value::Null), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_yaml_has_a_place() {
        for (text, line) in [("a: [1\nb: 2\n", 2), ("a: 1\n\tb: 2\n", 1), ("a: *nobody\n", 1), ("a: 1\n---\nb: 1\n", 2)]
        {
            let problem = parse(text).unwrap_err();
            assert!(matches!(problem.place, Place::File { line: at, .. } if at >= line), "{text:?} {problem:?}");
            assert!(!problem.message.contains('\n'));
        }
    }
}
