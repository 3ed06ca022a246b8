//! Bodies on their way in: bounded in bytes, all of them together, and in time.
//!
//! One body is at most 16 MiB. Without a bound on all of them some hundred clients that send theirs and never end could
//! fill the memory; without a bound on time they could do so for ever.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tonic::Status;

/// Bytes of bodies that have come and are not read to their end, at most.
const MOST_BYTES: usize = 256 << 20;
/// A body must be whole by then; a prompt is seldom a megabyte.
const PATIENCE: Duration = Duration::from_secs(30);

/// What all bodies share. Clones share.
#[derive(Clone, Default)]
pub struct Receiving {
    bytes: Arc<AtomicUsize>,
}

/// Counts a call's body while it comes. Calls whose client may go on sending (the registry's) are not meant.
pub async fn bounded(State(all): State<Receiving>, request: Request, next: Next) -> Response {
    if request.uri().path().starts_with("/tandem.v1.Registry/") {
        return next.run(request).await;
    }
    let declared = request.headers().get(header::CONTENT_LENGTH).is_none_or(|length| length != "0");
    if !declared {
        return next.run(request).await;
    }
    next.run(request.map(|body| Body::new(Bounded::new(body, all)))).await
}

struct Bounded {
    body: Body,
    all: Receiving,
    held: usize,
    patience: Pin<Box<Sleep>>,
}

impl Bounded {
    fn new(body: Body, all: Receiving) -> Self {
        Self { body, all, held: 0, patience: Box::pin(tokio::time::sleep(PATIENCE)) }
    }

    fn take(&mut self, bytes: usize) -> Result<(), Status> {
        self.held += bytes;
        match self.all.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > MOST_BYTES {
            true => {
                Err(Status::resource_exhausted("the router is receiving too many large requests; try again"))
            }
            false => Ok(()),
        }
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        self.all.bytes.fetch_sub(self.held, Ordering::Relaxed);
    }
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                let taken = self.take(frame.data_ref().map_or(0, Bytes::len));
                Poll::Ready(Some(taken.map(|()| frame).map_err(Into::into)))
            }
            Poll::Ready(ended) => Poll::Ready(ended.map(|error| error.map_err(Into::into))),
            Poll::Pending if self.patience.as_mut().poll(context).is_ready() => {
                let late = Status::deadline_exceeded(format!(
                    "the request was not whole within {} s",
                    PATIENCE.as_secs()
                ));
                Poll::Ready(Some(Err(late.into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What was said here, out of the error that an extractor made of it.
pub fn status_in<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Status> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| error.downcast_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use http_body_util::BodyExt;
    use tonic::Code;

    fn refused(ended: Result<impl std::fmt::Debug, axum::BoxError>) -> Code {
        status_in(ended.unwrap_err().as_ref()).map_or(Code::Ok, Status::code)
    }

    #[tokio::test(start_paused = true)]
    async fn all_bodies_together_are_bounded() {
        let all = Receiving::default();
        let piece = || Body::from(Bytes::from(vec![0; MOST_BYTES / 2]));
        let mut held = Bounded::new(piece(), all.clone());
        held.frame().await.unwrap().unwrap();
        let mut second = Bounded::new(piece(), all.clone());
        second.frame().await.unwrap().unwrap();
        assert_eq!(
            refused(Bounded::new(Body::from("x"), all.clone()).collect().await),
            Code::ResourceExhausted
        );
        drop(held);
        assert!(Bounded::new(Body::from("x"), all.clone()).collect().await.is_ok());
        drop(second);
        assert_eq!(all.bytes.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_never_ends_is_given_up() {
        let beginning = futures::stream::iter([Ok::<_, std::io::Error>("{")]);
        let endless = Body::from_stream(beginning.chain(futures::stream::pending()));
        assert_eq!(
            refused(Bounded::new(endless, Receiving::default()).collect().await),
            Code::DeadlineExceeded
        );
    }
}
