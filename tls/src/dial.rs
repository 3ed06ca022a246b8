//! gRPC channels to another part of the cluster. The files are read at every connection, so a channel that connects again
//! uses the certificate of that moment.

use std::io;

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::cluster::{ClusterFiles, H2};
use crate::identity::Part;

/// A channel that connects at its first call, and again when the connection breaks. The endpoint is `http://host:port`,
/// as if it were not encrypted: the connection is made here.
pub fn lazy(endpoint: &Endpoint, files: ClusterFiles, wanted: Part) -> Channel {
    endpoint.connect_with_connector_lazy(connector(files, wanted))
}

/// A channel that is connected.
pub async fn now(
    endpoint: &Endpoint,
    files: ClusterFiles,
    wanted: Part,
) -> Result<Channel, tonic::transport::Error> {
    endpoint.connect_with_connector(connector(files, wanted)).await
}

fn connector(
    files: ClusterFiles,
    wanted: Part,
) -> impl tower::Service<
    Uri,
    Response = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>,
    Error = io::Error,
    Future = impl Future<Output = io::Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>>> + Send,
> + Send
+ 'static {
    tower::service_fn(move |uri: Uri| {
        let (files, wanted) = (files.clone(), wanted.clone());
        async move {
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
            stream.set_nodelay(true)?;
            files.connect(stream, wanted, H2).await.map(TokioIo::new)
        }
    })
}
