//! Walks a tree by its schema and collects what does not fit: unknown keys, keys given twice, values of a wrong kind.
//!
//! Every accessor gives `None` where it has reported a problem, so whoever relates values to each other skips those
//! that are wrong already and no problem causes a second one.

use std::collections::{BTreeMap, BTreeSet};

use super::defaults::{self, KEYS};
use super::problems::{Place, Problem};
use super::scalar::Parsed;
use super::tree::{Entry, Node, Value};

/// How many letters may differ between what was written and what is suggested.
const DISTANCE_MAX: usize = 3;

/// The entries of a mapping and what it is called in messages.
#[derive(Clone, Copy)]
pub(super) struct Map<'a> {
    entries: &'a [Entry],
}

impl<'a> Map<'a> {
    /// The entry of a key; the first, if there are more.
    pub(super) fn get(&self, key: &str) -> Option<&'a Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// All entries.
    pub(super) fn entries(&self) -> &'a [Entry] {
        self.entries
    }
}

/// Reads a tree and remembers all that is wrong with it.
pub(super) struct Reader<'a> {
    top: Map<'a>,
    sections: BTreeMap<&'static str, Map<'a>>,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    /// Reads the mappings that [`KEYS`] speaks of.
    pub(super) fn new(root: &'a Node, problems: Vec<Problem>) -> Self {
        let mut reader = Self { top: Map { entries: &[] }, sections: BTreeMap::new(), problems };
        let names: Vec<_> = KEYS.iter().map(|key| defaults::split(key.path)).collect();
        let top: Vec<_> = names.iter().map(|(section, key)| section.unwrap_or(key)).collect();
        reader.top = reader.map(root, "", &top).unwrap_or(reader.top);
        for section in names.iter().filter_map(|(section, _)| *section) {
            if reader.sections.contains_key(section) {
                continue;
            }
            let known: Vec<_> = names.iter().filter(|(of, _)| *of == Some(section)).map(|(_, key)| *key).collect();
            let map = reader.top.get(section).and_then(|entry| reader.map(&entry.node, section, &known));
            reader.sections.insert(section, map.unwrap_or(Map { entries: &[] }));
        }
        reader
    }

    /// Reads trees that the table says nothing of.
    pub(super) fn bare() -> Self {
        Self { top: Map { entries: &[] }, sections: BTreeMap::new(), problems: Vec::new() }
    }

    /// The value of a key of the table, if it is given.
    pub(super) fn node(&self, path: &str) -> Option<&'a Node> {
        let (section, key) = defaults::split(path);
        let map = section.map_or(Some(&self.top), |section| self.sections.get(section))?;
        map.get(key).map(|entry| &entry.node)
    }

    /// Where a key of the table is given.
    pub(super) fn place(&self, path: &str) -> Place {
        self.node(path).map_or(Place::Whole, |node| node.place.clone())
    }

    /// Reports a problem of a key of the table.
    pub(super) fn problem(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(Problem::new(self.place(path), path, message));
    }

    /// Reports a problem of some value.
    pub(super) fn problem_at(&mut self, place: &Place, path: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::new(place.clone(), path, message));
    }

    /// A value of the table, or its default.
    pub(super) fn value<T>(&mut self, path: &str, parse: impl Fn(&str) -> Parsed<T>) -> Option<T> {
        match self.node(path) {
            Some(node) => self.scalar(node, path, parse),
            // That every default parses is tested.
            None => parse(defaults::of(path)).ok(),
        }
    }

    /// A value of the table that may be null, or its default.
    pub(super) fn nullable<T>(&mut self, path: &str, parse: impl Fn(&str) -> Parsed<T>) -> Option<Option<T>> {
        match self.node(path) {
            Some(Node { value: Value::Null, .. }) => Some(None),
            None if defaults::of(path) == "null" => Some(None),
            _ => self.value(path, parse).map(Some),
        }
    }

    /// A single value.
    pub(super) fn scalar<T>(&mut self, node: &Node, path: &str, parse: impl Fn(&str) -> Parsed<T>) -> Option<T> {
        let parsed = match &node.value {
            Value::Scalar(text) => parse(text),
            other => Err(format!("a single value is wanted here, not {}", other.kind())),
        };
        parsed.map_err(|message| self.problem_at(&node.place, path, message)).ok()
    }

    /// A value of a mapping that is not in the table, if it is given and not null.
    pub(super) fn field<T>(
        &mut self,
        map: Map<'a>,
        path: &str,
        key: &str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<Option<T>> {
        match map.get(key) {
            None | Some(Entry { node: Node { value: Value::Null, .. }, .. }) => Some(None),
            Some(entry) => self.scalar(&entry.node, &format!("{path}.{key}"), parse).map(Some),
        }
    }

    /// A list; nothing is an empty one.
    pub(super) fn list(&mut self, node: &'a Node, path: &str) -> Option<&'a [Node]> {
        match &node.value {
            Value::Null => Some(&[]),
            Value::List(items) => Some(items),
            other => {
                self.problem_at(&node.place, path, format!("a list is wanted here, not {}", other.kind()));
                None
            }
        }
    }

    /// A mapping whose keys are all in `known`, each given once; nothing is an empty one.
    pub(super) fn map(&mut self, node: &'a Node, path: &str, known: &[&str]) -> Option<Map<'a>> {
        let map = self.any_map(node, path)?;
        let mut seen = BTreeSet::new();
        for entry in map.entries {
            // Said once per key, however often it is given.
            if seen.insert(&entry.key) && !known.contains(&entry.key.as_str()) {
                let hint = nearest(&entry.key, known.iter().copied());
                let hint = hint.map_or(String::new(), |name| format!(", did you mean {name}?"));
                self.problem_at(&entry.place, join(path, &entry.key), format!("no such key{hint}"));
            }
        }
        Some(map)
    }

    /// A mapping with any keys, each given once; nothing is an empty one.
    pub(super) fn any_map(&mut self, node: &'a Node, path: &str) -> Option<Map<'a>> {
        let entries: &[Entry] = match &node.value {
            Value::Null => &[],
            Value::Map(entries) => entries,
            other => {
                self.problem_at(&node.place, path, format!("a mapping is wanted here, not {}", other.kind()));
                return None;
            }
        };
        let mut first = BTreeMap::new();
        for entry in entries {
            if let Some(before) = first.insert(&entry.key, &entry.place) {
                let line = if let Place::File { line, .. } = before {
                    format!(", first in line {line}")
                } else {
                    String::new()
                };
                self.problem_at(&entry.place, join(path, &entry.key), format!("given twice{line}"));
            }
        }
        Some(Map { entries })
    }
}

/// A path and the name of something in it, quoted where its dots would look like the path's.
pub(super) fn join(path: &str, key: &str) -> String {
    match (path, key.contains(['.', ':'])) {
        ("", _) => key.to_owned(),
        (_, true) => format!("{path}.\"{key}\""),
        (_, false) => format!("{path}.{key}"),
    }
}

/// The name that was probably meant.
pub(super) fn nearest<S: AsRef<str>>(written: &str, names: impl Iterator<Item = S>) -> Option<S> {
    let written = written.to_ascii_lowercase();
    let measured = names.map(|name| (distance(&written, &name.as_ref().to_ascii_lowercase()), name));
    // A short word must not become any other short word.
    let near = measured.filter(|(distance, name)| *distance <= DISTANCE_MAX.min(name.as_ref().len() / 2));
    near.min_by_key(|(distance, _)| *distance).map(|(_, name)| name)
}

/// How many letters must be added, dropped or changed to make one of the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (above, b) in row.iter_mut().skip(1).zip(&to) {
            let cost = (diagonal + usize::from(a != *b)).min(left + 1).min(*above + 1);
            diagonal = *above;
            *above = cost;
            left = cost;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
        let names = ["listen", "tls", "transport", "cache"];
        for (written, expected) in [
            ("lisen", Some("listen")),
            ("Listen", Some("listen")),
            ("transprot", Some("transport")),
            ("tsl", None),
            ("tl", Some("tls")),
            ("cash", Some("cache")),
            ("something", None),
        ] {
            assert_eq!(nearest(written, names.into_iter()), expected, "{written}");
        }
    }
}
