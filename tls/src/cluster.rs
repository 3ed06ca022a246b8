//! Mutual TLS inside the cluster, router and workers among each other: one certificate, one key, one authority for each
//! process, used as server and as client on every plane.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::server::{ParsedCertificate, StoresServerSessions, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::identity::{Names, Part};
use crate::pem::{self, Identity, TlsError, provider};

const CERT: &str = "--cluster-cert";
const KEY: &str = "--cluster-key";
const CA: &str = "--cluster-ca";

/// The name that is asked for in a handshake: it tells a port that also serves clients which certificate is meant.
pub const SERVER_NAME: &str = "cluster.tandem.internal";
/// The protocol of KV connections, and that of calls: chosen in the handshake.
pub const KV: &[u8] = b"tandem-kv";
/// HTTP/2, for gRPC.
pub const H2: &[u8] = b"h2";

/// A server must have looked at our certificate by then.
const PATIENCE: Duration = Duration::from_secs(5);

/// Looks at files that do not fit each other, and the time between two.
const TRIES: usize = 4;
const BETWEEN: Duration = Duration::from_millis(50);

/// A process's certificate, its key and the authorities it trusts; read again at every connection.
#[derive(Debug, Clone)]
pub struct ClusterFiles {
    /// Certificate chain, with the names of this process among its subject alternative names.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities that may have signed the others' certificates.
    pub ca: PathBuf,
}

impl ClusterFiles {
    /// Refuses what could never work: unreadable, expired or mismatched files, and a certificate that does not speak
    /// for this process.
    pub fn check(&self, own: &Part) -> Result<(), TlsError> {
        self.server(&[H2])?;
        let names = self.names()?;
        if names.cover(own) {
            return Ok(());
        }
        let why = format!(
            "speaks for {names}, not for {own}: issue one with URI:{own} among its subject alternative names{}",
            if matches!(own, Part::Router) { "" } else { ", or start the worker with a --name it covers" }
        );
        Err(TlsError::wrong(CERT, &self.cert, why))
    }

    /// The names in our own certificate.
    pub fn names(&self) -> Result<Names, TlsError> {
        let chain = pem::certificates(CERT, &self.cert)?;
        Ok(chain.first().map(Names::of).unwrap_or_default())
    }

    /// The listening side. A peer without a certificate shakes hands and is refused in words; one of another authority
    /// is refused in the handshake.
    pub fn server(&self, protocols: &[&[u8]]) -> Result<Arc<ServerConfig>, TlsError> {
        let identity = Identity::read([CERT, KEY], &self.cert, &self.key)?;
        let wrong = |why: String| TlsError::wrong(CA, &self.ca, why);
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .allow_unauthenticated()
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| wrong(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified)));
        config.session_storage = Arc::new(Forgetful);
        config.send_tls13_tickets = 1;
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// The connecting side: whoever answers must have a certificate of ours that speaks for `wanted`.
    pub fn client(&self, wanted: Part, protocol: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
        let identity = Identity::read([CERT, KEY], &self.cert, &self.key)?;
        let roots = self.roots()?;
        let verifier =
            Arc::new(Expect { roots, wanted, algorithms: provider().signature_verification_algorithms });
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|e| TlsError::wrong(CERT, &self.cert, e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified)));
        config.resumption = rustls::client::Resumption::disabled();
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Arc::new(config))
    }

    /// Shakes hands over a connection that was made.
    pub async fn connect(
        &self,
        stream: TcpStream,
        wanted: Part,
        protocol: &[u8],
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let config = self.settled(wanted, protocol).await.map_err(std::io::Error::other)?;
        let name = ServerName::try_from(SERVER_NAME).map_err(std::io::Error::other)?;
        let mut stream = TlsConnector::from(config).connect(name, stream).await.map_err(explain)?;
        accepted(&mut stream).await.map_err(explain)?;
        Ok(stream)
    }

    /// The files may be in the middle of being replaced: a certificate without its key is looked at again for a moment.
    async fn settled(&self, wanted: Part, protocol: &[u8]) -> Result<Arc<ClientConfig>, TlsError> {
        for _ in 0..TRIES {
            if let Ok(config) = self.client(wanted.clone(), protocol) {
                return Ok(config);
            }
            tokio::time::sleep(BETWEEN).await;
        }
        self.client(wanted, protocol)
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in pem::authorities(CA, &self.ca)? {
            roots.add(authority).map_err(|e| TlsError::wrong(CA, &self.ca, e.to_string()))?;
        }
        Ok(Arc::new(roots))
    }

    /// What is in the files, whatever it is: to see that it changed.
    pub(crate) fn contents(&self) -> Vec<Option<Vec<u8>>> {
        [&self.cert, &self.key, &self.ca].into_iter().map(|path| pem::read("", path).ok()).collect()
    }
}

/// Tickets that open nothing. A resumed session would not look at the peer's certificate again; but a server issues a
/// ticket only once it has taken the client's certificate, and so it tells the client that it has.
#[derive(Debug)]
struct Forgetful;

impl StoresServerSessions for Forgetful {
    fn put(&self, _key: Vec<u8>, _value: Vec<u8>) -> bool {
        true
    }

    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// Waits until the server has taken our certificate. In TLS 1.3 the handshake is over before it has looked, and what it says
/// against it would be lost with the connection.
async fn accepted(stream: &mut TlsStream<TcpStream>) -> std::io::Result<()> {
    let (socket, session) = stream.get_mut();
    let taken = async {
        while session.tls13_tickets_received() == 0 {
            socket.readable().await?;
            match session.read_tls(&mut NonBlocking(socket)) {
                Ok(0) => return Err(std::io::Error::other("the connection was closed after the handshake")),
                Ok(_) => {
                    session.process_new_packets().map_err(std::io::Error::other)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "no word on our certificate");
    tokio::time::timeout(PATIENCE, taken).await.map_err(|_| late())?
}

/// The socket as the session reads it.
struct NonBlocking<'a>(&'a TcpStream);

impl std::io::Read for NonBlocking<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.try_read(buf)
    }
}

/// What a failed handshake means to an operator.
fn explain(error: std::io::Error) -> std::io::Error {
    let said = error.to_string();
    let hint = match said.as_str() {
        s if s.contains("UnknownIssuer") || s.contains("BadSignature") => {
            "; its certificate is not signed by our --cluster-ca: give both sides the same authority"
        }
        s if s.contains("corrupt message") || s.contains("handshake eof") || s.contains("reset") => {
            "; it does not speak TLS: start it with --cluster-cert, --cluster-key and --cluster-ca"
        }
        s if s.contains("Expired") => "; its certificate has expired: renew it there",
        s if s.contains("alert") || s.contains("after the handshake") => {
            "; it does not accept our --cluster-cert: its log says why"
        }
        _ => "",
    };
    std::io::Error::new(error.kind(), format!("TLS: {said}{hint}"))
}

/// Verifies the chain, and the name of a part of the cluster instead of a host's.
#[derive(Debug)]
struct Expect {
    roots: Arc<RootCertStore>,
    wanted: Part,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Expect {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        let names = Names::of(end_entity);
        if names.cover(&self.wanted) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(rustls::Error::General(format!(
            "its certificate speaks for {names}, not for {}: somebody else answers there, or the certificate lacks that name",
            self.wanted
        )))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
