//! The side that listens: certificates that are read again while it runs, and handshakes that hold up nobody.
//!
//! One port can have two faces: clients get the certificate that is meant for them, parts of the cluster (which ask for
//! [`SERVER_NAME`](crate::cluster::SERVER_NAME)) that of the cluster.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::{Acceptor, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

use crate::cluster::{self, ClusterFiles};
use crate::identity::Names;
use crate::pem::{self, Identity, TlsError, provider};

const CERT: &str = "--tls-cert";
const KEY: &str = "--tls-key";
const CLIENT_CA: &str = "--tls-client-ca";
/// Between two looks at the files. Contents are compared, so it does not matter how they are replaced.
const LOOK: Duration = Duration::from_secs(1);
/// A client that connects must have shaken hands by then.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once; further clients wait in the listener's backlog.
const MOST_HANDSHAKES: usize = 256;
/// The first byte of every TLS connection.
const TLS: u8 = 0x16;
/// What a client without TLS is told, in HTTP since most speak that.
const PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n\
this port is encrypted: connect with TLS (https://)\n";

/// Who we are to clients, and whose clients we know.
#[derive(Debug, Clone)]
pub struct ServerFiles {
    /// Our certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities that may have signed clients' certificates. A client without one can still connect; whether it may
    /// call is for the server to say, since probes have none.
    pub client_ca: Option<PathBuf>,
}

impl ServerFiles {
    /// Reads and checks the files as they are now.
    pub fn read(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let identity = Identity::read([CERT, KEY], &self.cert, &self.key)?;
        let wrong = |why: String| TlsError::wrong(CERT, &self.cert, why);
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong(e.to_string()))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = rustls::RootCertStore::empty();
                for authority in pem::authorities(CLIENT_CA, path)? {
                    roots.add(authority).map_err(|e| TlsError::wrong(CLIENT_CA, path, e.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                    .allow_unauthenticated()
                    .build()
                    .map_err(|e| TlsError::wrong(CLIENT_CA, path, e.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified)));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// What is in the files, whatever it is: to see that it changed.
    fn contents(&self) -> Vec<Option<Vec<u8>>> {
        let files = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        files.into_iter().map(|path| path.and_then(|path| pem::read("", path).ok())).collect()
    }
}

/// What a port shows to whom. At least one of them.
#[derive(Debug, Clone, Default)]
pub struct Faces {
    /// For clients.
    pub clients: Option<ServerFiles>,
    /// For parts of the cluster, and the protocols that they may choose; all there is without the other.
    pub cluster: Option<(ClusterFiles, &'static [&'static [u8]])>,
}

/// Both, ready for handshakes.
#[derive(Debug, Clone)]
struct Configs {
    clients: Option<Arc<ServerConfig>>,
    cluster: Option<Arc<ServerConfig>>,
}

impl Faces {
    fn read(&self) -> Result<Configs, TlsError> {
        let cluster = self.cluster.as_ref().map(|(files, protocols)| files.server(protocols)).transpose()?;
        Ok(Configs { clients: self.clients.as_ref().map(ServerFiles::read).transpose()?, cluster })
    }

    fn contents(&self) -> Vec<Option<Vec<u8>>> {
        let mut all = self.clients.as_ref().map(ServerFiles::contents).unwrap_or_default();
        all.extend(self.cluster.iter().flat_map(|(files, _)| files.contents()));
        all
    }
}

/// A connection that has shaken hands.
pub struct Secured {
    stream: TlsStream<TcpStream>,
    certified: Certified,
}

/// What the handshake has shown; an extension of every request.
#[derive(Debug, Clone)]
pub struct Certified {
    /// Whether the port's cluster face was asked for: then the certificate, if any, is of the cluster's authority.
    pub is_cluster: bool,
    /// Whether there is a certificate, which then was verified.
    pub has_certificate: bool,
    /// Whom it speaks for in the cluster; nobody on the clients' face.
    pub names: Names,
}

impl Secured {
    fn new(stream: TlsStream<TcpStream>, is_cluster: bool) -> Self {
        let leaf: Option<&CertificateDer<'_>> =
            stream.get_ref().1.peer_certificates().and_then(|c| c.first());
        let names = leaf.filter(|_| is_cluster).map(Names::of).unwrap_or_default();
        let certified = Certified { is_cluster, has_certificate: leaf.is_some(), names };
        Self { stream, certified }
    }

    /// Where it comes from.
    pub fn peer_addr(&self) -> io::Result<std::net::SocketAddr> {
        self.stream.get_ref().0.peer_addr()
    }

    /// What the handshake has shown.
    pub fn certified(&self) -> &Certified {
        &self.certified
    }

    /// Whether that protocol was chosen.
    pub fn speaks(&self, protocol: &[u8]) -> bool {
        self.stream.get_ref().1.alpn_protocol() == Some(protocol)
    }

    /// The connection and the session on it.
    pub fn into_parts(self) -> (TcpStream, rustls::ServerConnection, Certified) {
        let (stream, session) = self.stream.into_inner();
        (stream, session, self.certified)
    }
}

impl Connected for Secured {
    type ConnectInfo = Certified;

    fn connect_info(&self) -> Certified {
        self.certified.clone()
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Connections that have shaken hands, of those that come in. Those that exist keep their keys when the files change; new
/// ones get the new certificate. Ends when the stream is dropped.
pub fn accept(
    incoming: impl Stream<Item = io::Result<TcpStream>> + Send + 'static,
    faces: Faces,
) -> Result<ReceiverStream<io::Result<Secured>>, TlsError> {
    let seen = faces.contents();
    let (config, current) = watch::channel(faces.read()?);
    let (ready, shaken) = mpsc::channel(16);
    let ended = ready.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = follow(faces, seen, config) => {}
            () = listen(incoming, current, ready) => {}
            () = ended.closed() => {}
        }
    });
    Ok(ReceiverStream::new(shaken))
}

/// Reads the files again when they change; what cannot be used leaves the old certificate in place.
async fn follow(faces: Faces, mut seen: Vec<Option<Vec<u8>>>, config: watch::Sender<Configs>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let faces = faces.clone();
        let looked = tokio::task::spawn_blocking(move || (faces.contents(), faces.read())).await;
        let Ok((now, read)) = looked else { continue };
        if now == seen {
            continue;
        }
        match read {
            Ok(new) => {
                config.send_replace(new);
                tracing::info!("certificates changed; new connections use them");
            }
            Err(error) => tracing::warn!(%error, "changed certificates cannot be used; the old ones stay"),
        }
        seen = now;
    }
}

async fn listen(
    incoming: impl Stream<Item = io::Result<TcpStream>>,
    config: watch::Receiver<Configs>,
    ready: mpsc::Sender<io::Result<Secured>>,
) {
    let places = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    let mut incoming = std::pin::pin!(incoming);
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match incoming.next().await {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => {
                // Out of file descriptors, most likely: not the end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            None => return,
        };
        let configs = config.borrow().clone();
        let ready = ready.clone();
        tokio::spawn(async move {
            let _place = place;
            let peer = stream.peer_addr().map_or_else(|_| "?".to_owned(), |peer| peer.to_string());
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, shake(stream, configs)).await {
                Ok(Ok(Some(secured))) => drop(ready.send(Ok(secured)).await),
                Ok(Ok(None)) => tracing::info!(%peer, "a connection without TLS was refused"),
                Ok(Err(error)) => tracing::info!(%peer, error = %explain(&error), "TLS handshake failed"),
                Err(_) => tracing::info!(%peer, "TLS handshake took too long"),
            }
        });
    }
}

/// None when the other side does not speak TLS; it was told.
async fn shake(mut stream: TcpStream, configs: Configs) -> io::Result<Option<Secured>> {
    let mut first = [0];
    if stream.peek(&mut first).await? > 0 && first != [TLS] {
        stream.write_all(PLAIN).await?;
        stream.shutdown().await?;
        // Until it has read that: a socket closed with unread bytes resets, and takes the words along.
        let mut rest = [0; 4096];
        while tokio::io::AsyncReadExt::read(&mut stream, &mut rest).await? > 0 {}
        return Ok(None);
    }
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let wants_cluster = start.client_hello().server_name() == Some(cluster::SERVER_NAME);
    let (config, is_cluster) = match (configs.clients, configs.cluster) {
        (_, Some(cluster)) if wants_cluster => (cluster, true),
        (Some(clients), _) => (clients, false),
        (None, Some(cluster)) => (cluster, true),
        (None, None) => return Err(io::Error::other("no certificate")),
    };
    Ok(Some(Secured::new(start.into_stream(config).await?, is_cluster)))
}

/// The log of the side that refuses says what to do about it.
fn explain(error: &io::Error) -> String {
    let said = error.to_string();
    let hint = match said.as_str() {
        s if s.contains("UnknownIssuer") || s.contains("BadSignature") => {
            "; the peer's certificate is of another authority than ours"
        }
        s if s.contains("Expired") => "; the peer's certificate has expired: renew it there",
        s if s.contains("UnknownCA") || s.contains("DecryptError") => {
            "; the peer trusts another authority than the one that signed our certificate"
        }
        _ => "",
    };
    format!("{said}{hint}")
}
