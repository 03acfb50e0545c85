//! Equal requests at the same time: the first is sent, the others wait for its answer (request coalescing).
//!
//! An answer is shared only by those who waited while it came. Nothing is kept: whoever comes later asks again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{ACCEPT, ACCEPT_ENCODING, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use tokio::time::timeout;

use super::seam::{Accepts, Credential, TagId, strip_hop_by_hop};

/// How long somebody waits for the answer to another's request: longer than a registry takes that is well. After that he asks
/// by himself, so that no slow reader or stalled answer keeps others.
const PATIENCE: Duration = Duration::from_secs(10);

/// What makes two requests equal, as a hash: no credential is kept in clear.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Same([u8; 32]);

impl Same {
    /// Requests for a manifest: the same URL and method, what is accepted, and who asks.
    pub(super) fn question(head: &Parts) -> Self {
        let mut hasher = started(b"question", head);
        for name in [ACCEPT, ACCEPT_ENCODING] {
            head.headers.get_all(&name).iter().for_each(|value| add(&mut hasher, &name, value));
        }
        Self(*hasher.update(Credential::of(&head.headers).as_bytes()).finalize().as_bytes())
    }

    /// Requests that are the same byte for byte, but for what belongs to their connection and the order of the headers.
    pub(super) fn bytes(head: &Parts) -> Self {
        let mut headers: HeaderMap = head.headers.clone();
        strip_hop_by_hop(&mut headers);
        let mut names: Vec<&HeaderName> = headers.keys().collect();
        names.sort_by_key(|name| name.as_str());
        let mut hasher = started(b"bytes", head);
        for name in names {
            headers.get_all(name).iter().for_each(|value| add(&mut hasher, name, value));
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// Questions for what a tag means, whoever asks.
    pub(super) fn tag(tag: &TagId, accepts: &Accepts) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in [b"tag", &tag.as_bytes()[..], accepts.as_bytes()] {
            part_of(&mut hasher, part);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

fn started(kind: &[u8], head: &Parts) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    for part in [kind, head.method.as_str().as_bytes(), head.uri.to_string().as_bytes()] {
        part_of(&mut hasher, part);
    }
    hasher
}

fn add(hasher: &mut blake3::Hasher, name: &HeaderName, value: &HeaderValue) {
    part_of(hasher, name.as_str().as_bytes());
    part_of(hasher, value.as_bytes());
}

/// Lengths in front, so that no two requests run together to the same bytes.
fn part_of(hasher: &mut blake3::Hasher, part: &[u8]) {
    hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
}

/// What came of a request: something for all who wait, or for the one who asked alone.
pub(super) enum Came<T, R> {
    /// For all.
    All(T),
    /// For one; the others ask for themselves.
    One(R),
}

/// Requests that are on their way: as many as clients are waiting, at most.
pub(super) struct Joins<T> {
    flights: Mutex<HashMap<Same, Arc<Flight<T>>>>,
}

/// One of them. Who holds the lock asks; what comes of it is left there: `Some(None)` is nothing for others.
type Flight<T> = tokio::sync::Mutex<Option<Option<T>>>;

impl<T> Default for Joins<T> {
    fn default() -> Self {
        Self { flights: Mutex::default() }
    }
}

impl<T: Clone> Joins<T> {
    /// Asks, or waits for what comes of an equal request that is on its way. One that is given up half-way is made by the next
    /// who waits.
    pub(super) async fn join<R>(&self, same: Same, ask: impl Future<Output = Came<T, R>>) -> Came<T, R> {
        let place = self.place(same);
        let Ok(mut left) = timeout(PATIENCE, place.flight.lock()).await else { return ask.await };
        match &*left {
            Some(Some(answer)) => return Came::All(answer.clone()),
            Some(None) => {
                drop(left);
                return ask.await;
            }
            None => {}
        }
        let came = ask.await;
        // Whoever comes from now on asks again.
        place.end();
        *left = Some(match &came {
            Came::All(answer) => Some(answer.clone()),
            Came::One(_) => None,
        });
        came
    }

    fn place(&self, same: Same) -> Place<'_, T> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        Place { joins: self, same, flight: flights.entry(same).or_default().clone() }
    }
}

/// A client's place with a request. The request is forgotten when it has been answered or its last client leaves.
struct Place<'a, T> {
    joins: &'a Joins<T>,
    same: Same,
    flight: Arc<Flight<T>>,
}

impl<T> Place<'_, T> {
    fn end(&self) {
        self.remove_if(|_| true);
    }

    fn remove_if(&self, condition: impl Fn(&Arc<Flight<T>>) -> bool) {
        let mut flights = self.joins.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if flights.get(&self.same).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight) && condition(flight)) {
            flights.remove(&self.same);
        }
    }
}

impl<T> Drop for Place<'_, T> {
    fn drop(&mut self) {
        // The map's own and this one: counted under the map's lock, so nobody can take another meanwhile.
        self.remove_if(|flight| Arc::strong_count(flight) == 2);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use http::Request;
    use tokio::sync::Notify;

    use super::*;

    fn head(method: &str, url: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn what_could_have_another_answer_is_another_request() {
        let url = "https://r/v2/a/manifests/latest";
        let alice = [("authorization", "Basic a"), ("accept", "x"), ("user-agent", "docker")];
        let same = Same::question(&head("GET", url, &alice));
        let agent = [("user-agent", "skopeo"), ("accept", "x"), ("authorization", "Basic a")];
        assert!(Same::question(&head("GET", url, &agent)) == same);
        for other in [
            head("HEAD", url, &alice),
            head("GET", "https://r/v2/a/manifests/1", &alice),
            head("GET", url, &[("authorization", "Basic b"), ("accept", "x")]),
            head("GET", url, &[("accept", "x")]),
            head("GET", url, &[("authorization", "Basic a"), ("accept", "y")]),
            head("GET", url, &[("authorization", "Basic a"), ("accept", "x"), ("accept", "y")]),
            head("GET", url, &[("authorization", "Basic a"), ("accept", "x"), ("cookie", "c")]),
        ] {
            assert!(Same::question(&other) != same, "{other:?}");
        }
        // Byte for byte, only the connection's own headers and their order do not count.
        let same = Same::bytes(&head("GET", url, &alice));
        let mut turned = alice.to_vec();
        turned.reverse();
        turned.push(("connection", "keep-alive"));
        assert!(Same::bytes(&head("GET", url, &turned)) == same);
        assert!(Same::bytes(&head("GET", url, &agent)) != same);
        assert!(Same::bytes(&head("GET", url, &alice)) != Same::question(&head("GET", url, &alice)));
    }

    fn same(name: &str) -> Same {
        Same::bytes(&head("GET", name, &[]))
    }

    async fn joined(joins: &Joins<usize>, name: &str, came: Came<usize, usize>, asked: &AtomicUsize) -> usize {
        let ask = async {
            asked.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            came
        };
        match joins.join(same(name), ask).await {
            Came::All(answer) | Came::One(answer) => answer,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_hundred_equal_requests_are_one_and_nothing_is_kept() {
        let (joins, asked) = (Joins::default(), AtomicUsize::new(0));
        for round in 1..=2 {
            let came = join_all((0..100).map(|n| joined(&joins, "/a", Came::All(n), &asked))).await;
            assert_eq!((came, asked.load(Ordering::Relaxed)), (vec![0; 100], round));
            assert!(joins.flights.lock().unwrap().is_empty());
        }
        join_all(["/a", "/b"].map(|name| joined(&joins, name, Came::All(0), &asked))).await;
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_for_one_is_asked_by_all_at_once() {
        let (joins, asked) = (Joins::default(), AtomicUsize::new(0));
        let begin = tokio::time::Instant::now();
        let came = join_all((0..10).map(|n| joined(&joins, "/a", Came::One(n), &asked))).await;
        assert_eq!((came, asked.load(Ordering::Relaxed)), ((0..10).collect(), 10));
        assert_eq!(begin.elapsed(), Duration::from_secs(2), "one after the first, not one after the other");
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_given_up_is_made_by_the_next() {
        let (joins, asked) = (Joins::default(), AtomicUsize::new(0));
        let never = async { std::future::pending::<Came<usize, usize>>().await };
        tokio::select! {
            biased;
            _ = joins.join(same("/a"), never) => panic!("it never ends"),
            answer = async {
                tokio::select! {
                    answer = joined(&joins, "/a", Came::All(7), &asked) => answer,
                    () = tokio::time::sleep(Duration::from_secs(1)) => 0,
                }
            } => assert_eq!(answer, 0, "it waits for the first"),
        }
        assert_eq!(joined(&joins, "/a", Came::All(7), &asked).await, 7);
        assert!(joins.flights.lock().unwrap().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever_for_another() {
        let (joins, asked, stop) = (Joins::default(), AtomicUsize::new(0), Notify::new());
        let stalled = async {
            stop.notified().await;
            Came::<usize, usize>::All(1)
        };
        let (first, second) = tokio::join!(joins.join(same("/a"), stalled), async {
            let answer = joined(&joins, "/a", Came::All(2), &asked).await;
            stop.notify_one();
            answer
        });
        assert!(matches!(first, Came::All(1)) && second == 2);
    }
}
