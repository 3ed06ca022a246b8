//! The side that listens: certificates that are read again while it runs, and handshakes that hold up nobody.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::SingleCertAndKey;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

use crate::pem::{self, Identity, TlsError};

const CERT: &str = "--tls-cert";
const KEY: &str = "--tls-key";
const CLIENT_CA: &str = "--tls-client-ca";
/// Between two looks at the files. Contents are compared, so it does not matter how they are replaced.
const LOOK: Duration = Duration::from_secs(1);
/// A client that connects must have shaken hands by then.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once; further clients wait in the listener's backlog.
const MOST_HANDSHAKES: usize = 256;

/// Who we are, and whose clients we know.
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
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| wrong(e.to_string()))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = rustls::RootCertStore::empty();
                for authority in pem::certificates(CLIENT_CA, path)? {
                    roots.add(authority).map_err(|e| TlsError::wrong(CLIENT_CA, path, e.to_string()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
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

/// Connections that have shaken hands. Those that exist keep their keys when the files change; new ones get the new
/// certificate. Ends when the stream is dropped.
pub fn accept(
    listener: TcpListener,
    files: ServerFiles,
) -> Result<ReceiverStream<io::Result<TlsStream<TcpStream>>>, TlsError> {
    let seen = files.contents();
    let (config, current) = watch::channel(files.read()?);
    let (ready, incoming) = mpsc::channel(16);
    let ended = ready.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = follow(files, seen, config) => {}
            () = listen(listener, current, ready) => {}
            () = ended.closed() => {}
        }
    });
    Ok(ReceiverStream::new(incoming))
}

/// Reads the files again when they change; what cannot be used leaves the old certificate in place.
async fn follow(
    files: ServerFiles,
    mut seen: Vec<Option<Vec<u8>>>,
    config: watch::Sender<Arc<ServerConfig>>,
) {
    loop {
        tokio::time::sleep(LOOK).await;
        let files = files.clone();
        let looked = tokio::task::spawn_blocking(move || (files.contents(), files.read())).await;
        let Ok((now, read)) = looked else { continue };
        if now == seen {
            continue;
        }
        seen = now;
        match read {
            Ok(new) => {
                config.send_replace(new);
                tracing::info!("certificates changed; new connections use them");
            }
            Err(error) => tracing::warn!(%error, "changed certificates cannot be used; the old ones stay"),
        }
    }
}

async fn listen(
    listener: TcpListener,
    config: watch::Receiver<Arc<ServerConfig>>,
    ready: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let places = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: not the end.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let acceptor = TlsAcceptor::from(config.borrow().clone());
        let ready = ready.clone();
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(ready.send(Ok(stream)).await),
                Ok(Err(error)) => tracing::info!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::info!(%peer, "TLS handshake took too long"),
            }
        });
    }
}
