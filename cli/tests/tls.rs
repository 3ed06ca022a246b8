//! The router's port with TLS: the real binary on both sides, curl, certificates that are renewed, missing and wrong.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::v1;
use proto::v1::inference_client::InferenceClient;
use tandem_tests::certs::{Ca, Pair};
use tandem_tests::cluster::{greedy, request};
use tandem_tests::etcd::Etcd;
use tandem_tests::model;
use tandem_tests::process::{Process, free_port};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

fn tandem() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tandem"))
}

/// Exit code, and everything that was printed.
fn run(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

/// A cluster whose router has TLS and wants certificates.
struct Secure {
    dir: tempfile::TempDir,
    ca: Ca,
    client: Pair,
    address: String,
    _etcd: Etcd,
    _processes: Vec<Process>,
}

impl Secure {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        std::fs::create_dir(&folder).unwrap();
        model::write(&folder, 3);
        let ca = Ca::new(dir.path(), "ca");
        let server = ca.issue(dir.path(), "server", 1);
        let client = ca.issue(dir.path(), "client", 1);
        let etcd = Etcd::start().await;
        let address = format!("127.0.0.1:{}", free_port());
        let start = |role: &str, more: &[&Path]| {
            let mut command = tandem();
            command.args([role, "--etcd", &etcd.url, "--model-name", "tiny", "--model"]).arg(&folder);
            match role {
                "router" => command.args(["--listen", &address]),
                _ => command.args(["--listen", "127.0.0.1:0", "--kv-mib", "32", "--threads", "1"]),
            };
            Process(command.args(more).stdin(Stdio::null()).spawn().unwrap())
        };
        let flag = Path::new;
        let files = [
            flag("--tls-cert"),
            &server.cert,
            flag("--tls-key"),
            &server.key,
            flag("--tls-client-ca"),
            &ca.cert,
        ];
        let processes = vec![start("router", &files), start("prefill", &[]), start("decode", &[])];
        let secure = Self { dir, ca, client, address, _etcd: etcd, _processes: processes };
        let mut client = InferenceClient::new(secure.channel().await);
        for _ in 0..1500 {
            let workers = client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
            if workers.iter().filter(|w| w.state == "ready").count() == 2 {
                return secure;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the workers never came");
    }

    async fn channel(&self) -> Channel {
        let read = |path: &Path| std::fs::read(path).unwrap();
        let identity = Identity::from_pem(read(&self.client.cert), read(&self.client.key));
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&self.ca.cert)));
        let endpoint = Channel::from_shared(format!("https://{}", self.address)).unwrap();
        let endpoint = endpoint.tls_config(tls.identity(identity)).unwrap();
        for _ in 0..500 {
            if let Ok(channel) = endpoint.connect().await {
                return channel;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no router at {}", self.address);
    }

    /// `tandem COMMAND --addr ... --ca CA`, with a certificate if there is one.
    fn call(&self, arguments: &[&str], ca: &Path, pair: Option<&Pair>) -> (Option<i32>, String) {
        let mut command = tandem();
        command.args(arguments).args(["--addr", &format!("https://{}", self.address), "--ca"]).arg(ca);
        if let Some(pair) = pair {
            command.arg("--cert").arg(&pair.cert).arg("--key").arg(&pair.key);
        }
        run(&mut command)
    }

    /// curl with the authority, and a certificate if there is one.
    fn curl(&self, path: &str, pair: Option<&Pair>) -> (Option<i32>, String) {
        let mut command = Command::new("curl");
        command.args(["-sS", "-i", "--cacert"]).arg(&self.ca.cert);
        if let Some(pair) = pair {
            command.arg("--cert").arg(&pair.cert).arg("--key").arg(&pair.key);
        }
        run(command.arg(format!("https://{}{path}", self.address)))
    }

    /// The serial number's holder that the router shows now: its certificate's fingerprint.
    fn shown(&self) -> String {
        let script = format!(
            "openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -noout -fingerprint",
            self.address
        );
        run(Command::new("sh").args(["-c", &script])).1
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_open_the_router_and_their_renewal_disturbs_nobody() {
    let secure = Secure::start().await;
    let (ca, own) = (&secure.ca.cert, Some(&secure.client));

    // Who has a certificate gets everything, over gRPC and HTTPS.
    let (code, said) = secure.call(&["generate", "hello", "--max-tokens", "4", "-q"], ca, own);
    assert_eq!(code, Some(0), "{said}");
    for arguments in [&["status"][..], &["top", "--json"], &["drain", "nobody"]] {
        let (code, said) = secure.call(arguments, ca, own);
        let expected = if arguments[0] == "drain" { (Some(4), "is not known") } else { (Some(0), "tiny") };
        assert!(code == expected.0 && said.contains(expected.1), "{arguments:?}: {code:?} {said}");
    }
    let (_, said) = secure.curl("/v1/models", own);
    assert!(said.contains(" 200") && said.contains("\"tiny\""), "{said}");

    // Who has none gets health and nothing else.
    let (_, said) = secure.curl("/health", None);
    assert!(said.contains(" 200") && said.contains("ready"), "{said}");
    for path in ["/v1/models", "/metrics", "/status.json"] {
        let (_, said) = secure.curl(path, None);
        assert!(said.contains(" 401") && said.contains("wants a client certificate"), "{path}: {said}");
    }
    let (code, said) = secure.call(&["generate", "hello"], ca, None);
    assert!(code == Some(1) && said.contains("wants a client certificate"), "{code:?} {said}");

    let (code, said) = run(tandem().args(["generate", "hello", "--addr", &secure.address]));
    assert!(code != Some(0) && said.contains("https://HOST:PORT --ca FILE"), "{code:?} {said}");

    // The planner looks at both pools through it.
    let listen = format!("127.0.0.1:{}", free_port());
    let mut planner = tandem();
    planner.args(["planner", "--routers", &secure.address, "--listen", &listen, "--look-seconds", "1"]);
    planner.args(["--slo-ttft", "2", "--slo-itl", "0.1", "--ca"]).arg(ca);
    planner.arg("--cert").arg(&secure.client.cert).arg("--key").arg(&secure.client.key);
    let planner = Process(planner.stdin(Stdio::null()).spawn().unwrap());
    let mut ready = false;
    for _ in 0..100 {
        ready = run(Command::new("curl").args(["-sf", &format!("http://{listen}/health")])).0 == Some(0);
        if ready {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(ready, "the planner never saw the cluster");
    drop(planner);

    // Wrong ones, on either side.
    let stranger = Ca::new(secure.dir.path(), "stranger");
    let strangers = stranger.issue(secure.dir.path(), "strangers", 1);
    let old = secure.ca.issue(secure.dir.path(), "old", -1);
    let (code, said) = secure.call(&["status"], &stranger.cert, own);
    assert!(code == Some(3) && said.contains("invalid peer certificate"), "{code:?} {said}");
    let (code, said) = secure.call(&["status"], ca, Some(&strangers));
    assert!(code != Some(0) && !said.contains("tiny"), "{code:?} {said}");
    let (code, said) = secure.call(&["status"], ca, Some(&old));
    assert!(code == Some(1) && said.contains("--cert") && said.contains("expired on"), "{code:?} {said}");
    let (code, said) = secure.call(&["status"], Path::new("/nowhere.pem"), None);
    assert!(code == Some(1) && said.contains("--ca /nowhere.pem"), "{code:?} {said}");
    let (code, said) = run(tandem().args(["status", "--addr", &format!("https://{}", secure.address)]));
    assert!(code == Some(1) && said.contains("needs --ca FILE"), "{code:?} {said}");

    // An answer is on its way while the certificate is renewed; first by rubbish, which changes nothing.
    let mut client = InferenceClient::new(secure.channel().await);
    let mut running = client.generate(request(&[1, 2, 3], greedy(400))).await.unwrap().into_inner();
    assert!(running.message().await.unwrap().is_some());
    let before = secure.shown();
    assert!(before.contains("ingerprint="), "{before}");
    let server = secure.dir.path().join("server.pem");
    std::fs::write(&server, "rubbish").unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(secure.shown(), before);
    secure.ca.issue(secure.dir.path(), "server", 2);
    let mut renewed = false;
    for _ in 0..100 {
        renewed = secure.shown() != before;
        if renewed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(renewed, "the new certificate is never shown");
    let (code, said) = secure.call(&["status"], ca, own);
    assert_eq!(code, Some(0), "{said}");
    let mut complete = false;
    while let Some(message) = running.message().await.unwrap() {
        complete |= matches!(message.event, Some(v1::generate_response::Event::Complete(_)));
    }
    assert!(complete, "the running answer ended early");
}

#[test]
fn a_router_refuses_files_that_cannot_work() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new(dir.path(), "ca");
    let (one, two) = (ca.issue(dir.path(), "one", 1), ca.issue(dir.path(), "two", -1));
    let refused = |cert: &Path, key: &Path, etcd: bool, words: &str| {
        let mut command = tandem();
        command
            .args(["router", "--listen", "127.0.0.1:0"])
            .arg("--tls-cert")
            .arg(cert)
            .arg("--tls-key")
            .arg(key);
        if etcd {
            command.args(["--etcd", "http://127.0.0.1:1"]);
        }
        let (code, said) = run(&mut command);
        assert!(code == Some(1) && said.contains(words), "{code:?}: {said}");
    };
    refused(&one.cert, &one.key, false, "needs --cluster-cert, or --etcd");
    refused(&one.cert, &two.key, true, "is not the key of");
    refused(&two.cert, &two.key, true, "expired on");
    refused(&one.key, &one.key, true, "holds no certificate");
    refused(&dir.path().join("none"), &one.key, true, "cannot be read");
}
