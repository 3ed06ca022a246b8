//! A man in the middle of router and workers, who cuts calls at chosen places.
//!
//! Workers register with his address instead of theirs; KV goes past him, since tickets name the worker itself.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cluster::{Join, Load, Member, Membership, RegistryError};
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, StreamExt};
use parking_lot::Mutex;
use proto::v1::decode_worker_client::DecodeWorkerClient;
use proto::v1::decode_worker_server::{DecodeWorker, DecodeWorkerServer};
use proto::v1::prefill_worker_client::PrefillWorkerClient;
use proto::v1::prefill_worker_server::{PrefillWorker, PrefillWorkerServer};
use proto::v1::{self, decode_event::Event};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

/// Where calls are cut: each call of its kind takes the next entry; none left means no cut.
#[derive(Clone, Default)]
pub struct Cuts {
    decode: Arc<Mutex<VecDeque<usize>>>,
    prefill: Arc<Mutex<VecDeque<PrefillCut>>>,
    /// Decode streams that are cut stay open instead, and silent.
    mute: Arc<AtomicBool>,
}

/// Where a prefill call is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillCut {
    /// The worker never hears of it.
    Before,
    /// It is done, and its reply is lost.
    After,
    /// The worker never hears of it, and the router hears nothing.
    Lost,
}

impl Cuts {
    /// The next decode streams break after so many tokens each.
    pub fn decode_after(&self, tokens: &[usize]) {
        *self.decode.lock() = tokens.iter().copied().collect();
    }

    /// From now on, streams that are cut do not break but fall silent, as when a frame's header was damaged.
    pub fn mute(&self) {
        self.mute.store(true, Ordering::Relaxed);
    }

    /// The next prefill calls break there.
    pub fn prefill_at(&self, cuts: &[PrefillCut]) {
        *self.prefill.lock() = cuts.iter().copied().collect();
    }

    /// Cuts that no call has taken yet.
    pub fn left(&self) -> usize {
        self.decode.lock().len() + self.prefill.lock().len()
    }
}

/// Joins the registry with the cutter's address.
pub struct Redirect {
    inner: Arc<dyn Join>,
    cuts: Cuts,
}

impl Redirect {
    /// In front of a registry.
    pub fn new(inner: Arc<dyn Join>, cuts: Cuts) -> Self {
        Self { inner, cuts }
    }
}

impl Join for Redirect {
    fn join(
        &self,
        member: Member,
        load: watch::Receiver<Load>,
    ) -> BoxFuture<'_, Result<Membership, RegistryError>> {
        Box::pin(async move {
            let address = serve(&member.address, self.cuts.clone()).await;
            self.inner.join(Member { address: address.to_string(), ..member }, load).await
        })
    }
}

/// A cutter in front of the worker at `worker`; ends with the test's runtime.
async fn serve(worker: &str, cuts: Cuts) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let channel = tonic::transport::Channel::from_shared(format!("http://{worker}")).unwrap().connect_lazy();
    let cutter = Cutter { channel, cuts };
    let server = tonic::transport::Server::builder()
        .add_service(DecodeWorkerServer::new(cutter.clone()))
        .add_service(PrefillWorkerServer::new(cutter))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    address
}

#[derive(Clone)]
struct Cutter {
    channel: tonic::transport::Channel,
    cuts: Cuts,
}

fn cut() -> Status {
    Status::unavailable("cut by the test")
}

#[tonic::async_trait]
impl DecodeWorker for Cutter {
    type DecodeStream = ReceiverStream<Result<v1::DecodeEvent, Status>>;

    async fn decode(&self, call: Request<v1::DecodeRequest>) -> Result<Response<Self::DecodeStream>, Status> {
        let mut left = self.cuts.decode.lock().pop_front();
        let mut events =
            DecodeWorkerClient::new(self.channel.clone()).decode(call.into_inner()).await?.into_inner();
        let (out, stream) = mpsc::channel(1);
        let mute = self.cuts.mute.load(Ordering::Relaxed);
        tokio::spawn(async move {
            while let Some(event) = events.message().await.transpose() {
                let (event, is_cut) = shortened(event, &mut left);
                if out.send(event).await.is_err() {
                    return;
                }
                if is_cut && mute {
                    return out.closed().await;
                }
                if is_cut {
                    let _ = out.send(Err(cut())).await;
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn r#move(&self, call: Request<v1::MoveRequest>) -> Result<Response<v1::MoveReply>, Status> {
        DecodeWorkerClient::new(self.channel.clone()).r#move(call.into_inner()).await
    }
}

/// At most `left` more tokens; true when the stream breaks behind them.
fn shortened(
    event: Result<v1::DecodeEvent, Status>,
    left: &mut Option<usize>,
) -> (Result<v1::DecodeEvent, Status>, bool) {
    let Some(left) = left else { return (event, false) };
    let event = event.map(|mut event| {
        if let Some(Event::Tokens(tokens)) = &mut event.event {
            tokens.tokens.truncate(*left);
            *left -= tokens.tokens.len();
        }
        event
    });
    (event, *left == 0)
}

#[tonic::async_trait]
impl PrefillWorker for Cutter {
    type PrefillStream = BoxStream<'static, Result<v1::PrefillEvent, Status>>;

    async fn prefill(
        &self,
        call: Request<v1::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let at = self.cuts.prefill.lock().pop_front();
        if at == Some(PrefillCut::Before) {
            return Err(cut());
        }
        if at == Some(PrefillCut::Lost) {
            return Ok(Response::new(stream::pending().boxed()));
        }
        let reply = PrefillWorkerClient::new(self.channel.clone()).prefill(call.into_inner()).await?;
        let events = reply.into_inner();
        let events = match at {
            Some(PrefillCut::After) => events
                .map(|event| if matches!(&event, Ok(e) if e.reply.is_some()) { Err(cut()) } else { event })
                .boxed(),
            _ => events.boxed(),
        };
        Ok(Response::new(events))
    }
}
