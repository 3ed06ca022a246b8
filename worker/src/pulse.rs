//! Signs of life on streams to a router.
//!
//! A connection that answers pings can still have lost a stream: one flipped bit in an HTTP/2 frame's header is enough, and
//! nobody would ever say so. So no stream is silent for longer than [`PULSE`] while the worker has it.

use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, BoxStream, StreamExt};

/// Longest silence of a stream that is as it should be.
pub const PULSE: Duration = Duration::from_secs(2);

/// A stream of `alive` until `work` is done, then of what it gave. Dropping it drops the work.
pub fn until<T: Clone + Send + 'static>(work: BoxFuture<'static, T>, alive: T) -> BoxStream<'static, T> {
    let next = |state: Option<(BoxFuture<'static, T>, T)>| async move {
        let (mut work, alive) = state?;
        match tokio::time::timeout(PULSE, &mut work).await {
            Ok(done) => Some((done, None)),
            Err(_) => Some((alive.clone(), Some((work, alive)))),
        }
    };
    stream::unfold(Some((work, alive)), move |state| next(state).boxed()).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn says_every_two_seconds_that_it_works() {
        let work = tokio::time::sleep(Duration::from_millis(5100)).map(|()| "done").boxed();
        assert_eq!(until(work, "alive").collect::<Vec<_>>().await, ["alive", "alive", "done"]);
        let at_once = std::future::ready("done").boxed();
        assert_eq!(until(at_once, "alive").collect::<Vec<_>>().await, ["done"]);
    }
}
