//! A connection to a router.

use std::error::Error as _;
use std::time::Duration;

use anyhow::Context;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to `address`, host:port or a URI.
pub async fn router(address: &str) -> anyhow::Result<Channel> {
    let uri = match address.contains("://") {
        true => address.to_owned(),
        false => format!("http://{address}"),
    };
    let endpoint = Endpoint::from_shared(uri)
        .with_context(|| format!("--addr {address} is not host:port"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true);
    endpoint.connect().await.with_context(|| format!("no router answers at {address}"))
}

/// Whether a call failed before it left this process, so that it may be made again whatever it does. A router that
/// stops closes its connections in good order; hyper hands back what was queued on one at that moment.
pub fn never_left(status: &Status) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = status.source();
    while let Some(error) = cause {
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;

    #[tokio::test]
    async fn what_a_closing_connection_hands_back_never_left() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (_reporter, health) = tonic_health::server::health_reporter();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tonic::transport::Server::builder().add_service(health);
        let incoming = TcpListenerStream::new(listener);
        let server = tokio::spawn(server.serve_with_incoming_shutdown(incoming, async {
            let _ = stopped.await;
        }));

        let mut client = HealthClient::new(router(&address).await.unwrap());
        // A running stream keeps the connection while it closes, as a running answer does.
        let running = client.watch(HealthCheckRequest::default()).await.unwrap();
        stop.send(()).unwrap();
        let refused = loop {
            match client.check(HealthCheckRequest::default()).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(status) => break status,
            }
        };
        assert!(never_left(&refused), "{refused:?}");
        assert!(!never_left(&Status::cancelled("said by a server")));
        drop(running);
        server.abort();
    }
}
