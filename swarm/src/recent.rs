//! A bounded map that forgets what was used least recently.
//!
//! Ordered, so that whoever iterates does so in the same order on every run. Not here: time. "Recently" counts uses.

use std::collections::BTreeMap;

/// At most `max` entries; the least recently used one makes room.
#[derive(Debug, Clone)]
pub(crate) struct Recent<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    order: BTreeMap<u64, K>,
    uses: u64,
    max: usize,
}

#[derive(Debug, Clone)]
struct Entry<V> {
    used: u64,
    value: V,
}

impl<K: Ord + Clone, V> Recent<K, V> {
    pub(crate) fn new(max: usize) -> Self {
        Self { entries: BTreeMap::new(), order: BTreeMap::new(), uses: 0, max }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Looks without counting it as a use.
    pub(crate) fn peek(&self, key: &K) -> Option<&V> {
        self.entries.get(key).map(|entry| &entry.value)
    }

    /// Counts as a use.
    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        let entry = self.entries.get_mut(key)?;
        self.uses += 1;
        if let Some(key) = self.order.remove(&entry.used) {
            self.order.insert(self.uses, key);
        }
        entry.used = self.uses;
        Some(&mut entry.value)
    }

    /// Puts an entry in, replacing the one of the same key; returns what had to go to make room.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<(K, V)> {
        self.uses += 1;
        self.order.insert(self.uses, key.clone());
        if let Some(before) = self.entries.insert(key, Entry { used: self.uses, value }) {
            self.order.remove(&before.used);
        }
        if self.entries.len() <= self.max {
            return None;
        }
        let (_, oldest) = self.order.pop_first()?;
        self.entries.remove_entry(&oldest).map(|(key, entry)| (key, entry.value))
    }

    /// Counts as a use. What had to go to make room is dropped.
    pub(crate) fn get_or_insert_with(&mut self, key: K, make: impl FnOnce() -> V) -> &mut V {
        if self.entries.len() >= self.max
            && !self.entries.contains_key(&key)
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.entries.remove(&oldest);
        }
        self.uses += 1;
        let used = self.uses;
        self.order.insert(used, key.clone());
        let entry = self.entries.entry(key).or_insert_with(|| Entry { used, value: make() });
        if entry.used != used {
            self.order.remove(&entry.used);
            entry.used = used;
        }
        &mut entry.value
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        self.order.remove(&entry.used);
        Some(entry.value)
    }

    /// Every entry, ordered by key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().map(|(key, entry)| (key, &entry.value))
    }

    /// Every entry, least recently used first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = (&K, &V)> {
        self.order.values().filter_map(|key| self.entries.get_key_value(key)).map(|(key, entry)| (key, &entry.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_the_least_recently_used() {
        let mut recent = Recent::new(2);
        assert_eq!(recent.insert("a", 1), None);
        assert_eq!(recent.insert("b", 2), None);
        assert_eq!(recent.get_mut(&"a"), Some(&mut 1));
        assert_eq!(recent.insert("c", 3), Some(("b", 2)));
        assert_eq!(recent.insert("a", 4), None);
        assert_eq!(recent.insert("d", 5), Some(("c", 3)));
        assert_eq!(recent.remove(&"a"), Some(4));
        assert_eq!((recent.len(), recent.peek(&"d"), recent.peek(&"a")), (1, Some(&5), None));
        assert_eq!(recent.order.len(), 1);
    }
}
