//! Encrypted connections: the same promises as plain ones, and who may use them.

#![allow(clippy::unwrap_used, missing_docs)]

mod pair;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use kv_transport::mux::{MuxConfig, split};
use kv_transport::{PushError, Refusal, Reserve, Secure, Sender, SenderConfig, Socket};
use pair::{Pair, Setup, identity, soon};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore, ServerConfig, crypto::ring, server::WebPkiClientVerifier,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn issue(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap();
        (vec![cert.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    fn server(&self) -> TlsAcceptor {
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots(), provider.clone());
        let verifier = verifier.allow_unauthenticated().build().unwrap();
        let (chain, key) = self.issue("decode.test");
        let config =
            ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        TlsAcceptor::from(Arc::new(
            config.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap(),
        ))
    }

    fn client(&self, name: Option<&str>) -> Arc<dyn Secure> {
        let provider = Arc::new(ring::default_provider());
        let config =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(self.roots());
        let config = match name {
            None => config.with_no_client_auth(),
            Some(name) => {
                let (chain, key) = self.issue(name);
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        Arc::new(Client(Arc::new(config)))
    }
}

#[derive(Debug)]
struct Client(Arc<ClientConfig>);

impl Secure for Client {
    fn secure<'a>(&'a self, stream: TcpStream, _receiver: &'a str) -> BoxFuture<'a, io::Result<Socket>> {
        async move {
            let name = ServerName::try_from("decode.test").unwrap();
            let (stream, session) =
                TlsConnector::from(self.0.clone()).connect(name, stream).await?.into_inner();
            Ok(Socket::encrypted(stream, session.into(), Some(Arc::new(|_| true))))
        }
        .boxed()
    }
}

/// A receiver behind TLS that believes whoever has a certificate to be `believed`.
async fn start(ca: &Ca, setup: Setup, believed: &'static str) -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let inner = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = setup;
    setup.receiver.secure = true;
    setup.endpoint = Some(address.to_string());
    let pair = setup.start_on(inner);
    let (receiver, acceptor) = (pair.receiver.clone(), ca.server());
    let (mut kv, mut rest) = split(listener, MuxConfig::default());
    tokio::spawn(async move {
        use futures::StreamExt;
        loop {
            let receiver = receiver.clone();
            tokio::select! {
                Some(plain) = kv.next() => drop(tokio::spawn(async move { receiver.serve(plain).await })),
                Some(Ok(stream)) = rest.next() => {
                    let acceptor = acceptor.clone();
                    tokio::spawn(async move {
                        let Ok(shaken) = acceptor.accept(stream).await else { return };
                        let (stream, session) = shaken.into_inner();
                        let is_known = session.peer_certificates().is_some();
                        let speaks_for: kv_transport::SpeaksFor = Arc::new(move |worker| worker == believed);
                        let socket = Socket::encrypted(stream, session.into(), is_known.then_some(speaks_for));
                        receiver.serve(socket).await;
                    });
                }
                else => return,
            }
        }
    });
    pair
}

fn setup(secure: Option<Arc<dyn Secure>>, cell_bytes: u32) -> Setup {
    let mut setup = Setup::new(3, 64, cell_bytes);
    setup.sender = SenderConfig { secure, ..SenderConfig::default() };
    setup
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pushed_lands_whatever_the_size_of_a_cell() {
    let ca = Ca::new();
    for cell_bytes in [4, 100, 4096, 65_536, 1_000_000] {
        let pair = start(&ca, setup(Some(ca.client(Some("any"))), cell_bytes), "prefill").await;
        let src: Vec<u32> = (0..40).rev().collect();
        let dst: Vec<u32> = (10..50).collect();
        let mut landing = pair.reserve(&dst);
        let report = soon(pair.push_all(landing.ticket().clone(), &src)).await.unwrap();
        assert_eq!(report.cells, 120);
        let landed = soon(landing.committed()).await.unwrap();
        assert_eq!(&landed.payload[..], b"first token");
        pair.assert_landed(&src, &dst);
        drop(landed);
        pair.assert_quiet().await;
        assert_eq!(pair.receiver.stats().identity_refused_total, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pushes_at_once_share_the_connections() {
    let ca = Ca::new();
    let pair = Arc::new(start(&ca, setup(Some(ca.client(Some("any"))), 8192), "prefill").await);
    let pushes = (0..16_u32).map(|n| {
        let pair = pair.clone();
        tokio::spawn(async move {
            let slots: Vec<u32> = (n * 4..n * 4 + 4).collect();
            let mut landing = pair.reserve(&slots);
            pair.push_all(landing.ticket().clone(), &slots).await.unwrap();
            landing.committed().await.unwrap();
        })
    });
    soon(futures::future::try_join_all(pushes)).await.unwrap();
    let all: Vec<u32> = (0..64).collect();
    pair.assert_landed(&all, &all);
    assert_eq!(pair.sender.stats().connects_total, 2);
    pair.assert_quiet().await;
}

async fn refused(ca: &Ca, secure: Option<Arc<dyn Secure>>, believed: &'static str) -> (PushError, Pair) {
    let pair = start(ca, setup(secure, 4096), believed).await;
    let landing = pair.reserve(&[1, 2]);
    let error = soon(pair.push_all(landing.ticket().clone(), &[1, 2])).await.unwrap_err();
    (error, pair)
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_in_words_and_counted() {
    let ca = Ca::new();
    let (error, pair) = refused(&ca, None, "prefill").await;
    assert_eq!(error, PushError::Refused(Refusal::Insecure));
    assert!(error.to_string().contains("--cluster-cert"), "{error}");
    assert!(pair.receiver.stats().identity_refused_total > 0);
    // Without a certificate, and with one that speaks for somebody else.
    for (secure, believed) in [(ca.client(None), "prefill"), (ca.client(Some("x")), "another")] {
        let (error, pair) = refused(&ca, Some(secure), believed).await;
        assert_eq!(error, PushError::Refused(Refusal::Identity));
        assert!(error.to_string().contains("tandem://worker/NAME"), "{error}");
        assert!(pair.receiver.stats().identity_refused_total > 0);
        assert_eq!(pair.receiver.stats().bytes_total, 0);
    }
    // Of another authority: the handshake ends it.
    let stranger = Ca::new();
    let pair = start(&ca, setup(Some(stranger.client(Some("x"))), 4096), "prefill").await;
    let landing = pair.reserve(&[1]);
    let error = soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap_err();
    assert!(
        matches!(&error, PushError::Connect { reason, .. } if reason.contains("peer certificate")),
        "{error}"
    );
}

/// A ticket that another worker got hold of, secret and all.
#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_ticket_opens_nothing() {
    let ca = Ca::new();
    let pair = start(&ca, setup(Some(ca.client(Some("any"))), 4096), "prefill").await;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let mut landing = pair
        .receiver
        .reserve(Reserve {
            slots: vec![5],
            meta: Bytes::new(),
            attempt: 1,
            sender: Some("prefill-2".into()),
            deadline,
            hold: (),
        })
        .unwrap();
    let error = soon(pair.push_all(landing.ticket().clone(), &[5])).await.unwrap_err();
    assert_eq!(error, PushError::Refused(Refusal::Misused));
    assert_eq!(pair.receiver.stats().misused_refused_total, 1);
    assert_eq!(pair.receiver.stats().bytes_total, 0);
    // The right one may still come: the theft ended nothing.
    assert!(tokio::time::timeout(Duration::from_millis(50), landing.committed()).await.is_err());
    let sender =
        Sender::new(identity("prefill-2", 1), pair.source.clone(), pair.grid, SenderConfig::default());
    let error = soon(sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap_err();
    assert_eq!(error, PushError::Refused(Refusal::Insecure));
}

/// Without TLS the name is only what the peer says, and still a ticket in the wrong hands is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_for_one_worker_without_encryption_too() {
    let pair = Setup::new(1, 8, 4096).start().await;
    let reserve = |sender: &str| Reserve {
        slots: vec![5],
        meta: Bytes::new(),
        attempt: 1,
        sender: Some(sender.into()),
        deadline: std::time::Instant::now() + Duration::from_secs(20),
        hold: (),
    };
    let landing = pair.receiver.reserve(reserve("another")).unwrap();
    let error = soon(pair.push_all(landing.ticket().clone(), &[5])).await.unwrap_err();
    assert_eq!(error, PushError::Refused(Refusal::Misused));
    let mut landing = pair.receiver.reserve(reserve("prefill")).unwrap();
    soon(pair.push_all(landing.ticket().clone(), &[5])).await.unwrap();
    soon(landing.committed()).await.unwrap();
}

/// The queue pair is offered, answered and keyed over the encrypted connection; the cells go beside it, unencrypted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_queue_pair_is_set_up_over_tls() {
    let ca = Ca::new();
    let secure = Setup { rdma: (true, true), ..setup(Some(ca.client(Some("any"))), 16 << 10) };
    let pair = start(&ca, secure, "prefill").await;
    let slots: Vec<u32> = (0..32).collect();
    let mut landing = pair.reserve(&slots);
    let push = pair.push_all(landing.ticket().clone(), &slots);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    assert_eq!((report.unwrap().transport, landed.unwrap().transport), ("rdma", "rdma"));
    pair.assert_landed(&slots, &slots);
    // A stranger gets no queue pair.
    let secure = Setup { rdma: (true, true), ..setup(Some(ca.client(Some("x"))), 16 << 10) };
    let pair = start(&ca, secure, "another").await;
    let landing = pair.reserve(&[1]);
    let error = soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap_err();
    assert_eq!(error, PushError::Refused(Refusal::Identity));
    assert_eq!((pair.receiver.stats().queue_pairs_total, pair.receiver.stats().bytes_total), (0, 0));
}
