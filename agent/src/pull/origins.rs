//! Whom a pull asks: where its clients asked, with their headers.

use crate::source::registry::BlobOrigin;

/// Clients whose address and headers are kept to fetch with: the latest are the likeliest to be good still.
const ORIGINS_MAX: usize = 8;

/// The clients of a pull, in the order in which they are of use, the best last.
#[derive(Default)]
pub(super) struct Origins(Vec<(bool, BlobOrigin)>);

impl Origins {
    /// A client came. A registry that the operator named goes before all others: what somebody's own registry sends is
    /// found to be wrong only at the end, by which time the whole cluster has it.
    pub(super) fn offer(&mut self, origin: BlobOrigin, named: bool) {
        self.0.retain(|(_, known)| !same(known, &origin));
        self.0.push((named, origin));
        // Stable: among equals the latest stays last.
        self.0.sort_by_key(|(named, _)| *named);
        if self.0.len() > ORIGINS_MAX {
            self.0.remove(0);
        }
    }

    /// Whom to ask next.
    pub(super) fn best(&self) -> Option<&BlobOrigin> {
        self.0.last().map(|(_, origin)| origin)
    }

    /// The registry refused this client; another's credentials may be good. Tells whether there is one.
    pub(super) fn refused(&mut self, origin: &BlobOrigin) -> bool {
        self.0.retain(|(_, known)| !same(known, origin));
        !self.0.is_empty()
    }
}

/// Whether two clients asked for the same thing with the same headers.
fn same(one: &BlobOrigin, other: &BlobOrigin) -> bool {
    one.url == other.url && one.headers == other.headers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn origin(host: &str) -> BlobOrigin {
        BlobOrigin { url: format!("https://{host}/v2/a/blobs/b").parse().unwrap(), headers: http::HeaderMap::new() }
    }

    #[test]
    fn a_named_registry_is_asked_before_those_that_anybody_can_run() {
        let mut origins = Origins::default();
        let best = |origins: &Origins| origins.best().map(|origin| origin.url.host().unwrap().to_owned());
        origins.offer(origin("named"), true);
        for n in 0..2 * ORIGINS_MAX {
            origins.offer(origin(&format!("anybody{n}")), false);
            assert_eq!(best(&origins).as_deref(), Some("named"));
        }
        assert_eq!(origins.0.len(), ORIGINS_MAX);
        origins.offer(origin("other"), true);
        assert_eq!(best(&origins).as_deref(), Some("other"), "the latest of two");
        assert!(origins.refused(&origin("other")) && origins.refused(&origin("named")));
        assert_eq!(best(&origins).unwrap(), format!("anybody{}", 2 * ORIGINS_MAX - 1));
        assert!(!Origins::default().refused(&origin("x")));
    }
}
