//! Waiting for what must happen, never for time to pass.

use std::time::Duration;

use tokio::time::Instant;

/// How often is asked. All questions are local.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Most things take milliseconds. A machine that is busy with other work may take this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Asks until there is an answer; fails the test after `within`, saying `what` did not happen.
pub(crate) async fn within<T>(within: Duration, what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < end, "within {within:?}: {what}");
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    within(PATIENCE, what, async || holds().await.then_some(())).await;
}
