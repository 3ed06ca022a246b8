//! A connection to a router.

use std::time::Duration;

use anyhow::Context;
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
