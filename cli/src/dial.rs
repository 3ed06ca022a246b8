//! A connection to a router.

use std::error::Error as _;
use std::time::Duration;

use anyhow::{Context, bail};
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use crate::args::DialArgs;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection whose calls show our API key.
pub type Channel = InterceptedService<tonic::transport::Channel, ApiKey>;

/// Shows our API key with every call, if we have one.
#[derive(Clone)]
pub struct ApiKey(pub Option<AsciiMetadataValue>);

impl Interceptor for ApiKey {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, Status> {
        if let Some(key) = &self.0 {
            request.metadata_mut().insert("authorization", key.clone());
        }
        Ok(request)
    }
}

impl ApiKey {
    /// From the file or the variable.
    pub fn of(dial: &DialArgs) -> anyhow::Result<Self> {
        let Some(key) = dial.api_key.key()? else { return Ok(Self(None)) };
        // Not shown: it may be a key with a stray character.
        let value = AsciiMetadataValue::try_from(format!("Bearer {key}"));
        let mut value = value.ok().context("the API key: holds characters that no key has")?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }
}

/// Connects to `address`, host:port or a URI; encrypted if there is an authority to trust.
pub async fn router(address: &str, dial: &DialArgs) -> anyhow::Result<Channel> {
    let (channel, key) = parts(address, dial).await?;
    Ok(InterceptedService::new(channel, key))
}

/// The same, for a caller that shows the key itself.
pub async fn parts(address: &str, dial: &DialArgs) -> anyhow::Result<(tonic::transport::Channel, ApiKey)> {
    let key = ApiKey::of(dial)?;
    let files = dial.files();
    let uri = match (address.split_once("://"), &files) {
        (Some(("https", _)), None) => {
            bail!("--addr {address}: needs --ca FILE, the authority that signed the router's certificate")
        }
        (Some(("http", _)), Some(_)) => bail!("--ca: but --addr {address} is not encrypted; write https://"),
        (Some(_), _) => address.to_owned(),
        (None, Some(_)) => format!("https://{address}"),
        (None, None) => format!("http://{address}"),
    };
    let mut endpoint = Endpoint::from_shared(uri)
        .with_context(|| format!("--addr {address} is not host:port"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true);
    if let Some(files) = files {
        endpoint = endpoint.tls_config(files.read()?)?;
    }
    let channel = endpoint.connect().await.with_context(|| format!("no router answers at {address}"))?;
    Ok((channel, key))
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

/// What a broken connection is called in other languages' clients: UNAVAILABLE. tonic says UNKNOWN.
pub fn named(status: Status) -> Status {
    match status.source() {
        Some(_) if status.code() == Code::Unknown => {
            Status::unavailable(format!("the connection to the router broke: {}", status.message()))
        }
        _ => status,
    }
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

        let mut client = HealthClient::new(router(&address, &DialArgs::default()).await.unwrap());
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
