//! What a listener on the network sees: real processes, real packets. With TLS no prompt, no token, no KV, no key; without,
//! the same search finds them all. And certificates and keys that change under load, without a failed request.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use proto::v1;
use tandem_tests::certs::Ca;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::secured::{Secured, run, uri};
use tandem_tests::wire::{Capture, Traffic};

const TANDEM: &str = env!("CARGO_BIN_EXE_tandem");
const PROMPT: &str =
    "my neighbour's secret recipe for walnut bread, which nobody on this network may ever read; ";
/// How KV connections begin without TLS, and what they ask for in the handshake with it.
const KV_MAGIC: &[u8] = b"\xF7TDMKV\r\n";
const KV_PROTOCOL: &[u8] = b"tandem-kv";

/// An API key and the file of keys that knows it.
fn api_key(cluster: &mut Secured) -> String {
    let key = cluster.file("client.api-key");
    let (code, said) = run(Command::new(TANDEM).args(["key", "new", "client", "--out"]).arg(&key));
    assert_eq!(code, Some(0), "{said}");
    let keys = cluster.file("api-keys");
    std::fs::write(&keys, format!("{} operator\n", said.lines().last().unwrap())).unwrap();
    cluster.api_key = Some(key);
    keys.to_str().unwrap().to_owned()
}

/// What somebody saw while a prompt was answered.
struct Seen {
    traffic: Traffic,
    answer: String,
    tokens: Vec<u32>,
    key: String,
}

/// A cluster, a prompt, an answer, and everything on the wire meanwhile. What processes log and how they were started must
/// not show secrets either.
async fn observe(tls: bool) -> Seen {
    let mut cluster = Secured::prepare(TANDEM, tls, true).await;
    cluster.log_level = "debug";
    let keys = api_key(&mut cluster);
    cluster.up(&["--api-keys", &keys, "--strategy", "disaggregated"]).await;
    let key = std::fs::read_to_string(cluster.api_key.as_ref().unwrap()).unwrap().trim().to_owned();
    let capture = Capture::start().expect("a namespace of our own lets us listen");
    let text = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Text(PROMPT.repeat(20))),
        ..request(&[], greedy(40))
    };
    let output = cluster.generate(text).await.unwrap();
    assert_eq!(output.complete.kv.as_ref().unwrap().transport, "tcp");
    // Over HTTP/1.1 too, where a header is not squeezed.
    let models = cluster.curl("/v1/models", &key);
    assert!(models.contains(" 200"), "{models}");
    // Loads are written to etcd about once a second.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let traffic = capture.stop();
    no_secrets_told(&cluster, &key);
    Seen { traffic, answer: output.text[0].clone(), tokens: output.tokens[0].clone(), key }
}

fn no_secrets_told(cluster: &Secured, key: &str) {
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let (mut looked, mut shown) = (0, Vec::new());
    for (name, pid) in cluster.pids() {
        shown.push((format!("{name}.log"), cluster.log(&name)));
        shown.push((format!("command line of {name}"), read(Path::new(&format!("/proc/{pid}/cmdline")))));
    }
    for (place, text) in shown {
        assert!(text.len() > 20, "{place} is empty");
        for secret in [key, "PRIVATE KEY", "walnut bread"] {
            assert!(!text.contains(secret), "{place} shows {secret}: {text}");
        }
        looked += 1;
    }
    assert_eq!(looked, 6);
}

/// Pieces of the KV that crossed: of every kilobyte some bytes, if they are not all alike.
fn kv_pieces(traffic: &Traffic) -> Vec<Vec<u8>> {
    let streams = traffic.beginning_with(KV_MAGIC);
    let bytes: usize = streams.iter().map(|stream| stream.len()).sum();
    assert!(bytes > 100_000, "{bytes} bytes of KV were captured");
    let pieces =
        streams.iter().flat_map(|stream| stream.chunks(1024).filter_map(|chunk| chunk.get(500..532)));
    let varied = |piece: &&[u8]| piece.iter().collect::<BTreeSet<_>>().len() > 12;
    pieces.filter(varied).map(<[u8]>::to_vec).collect()
}

fn varint(mut value: u32, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A `DecodeEvent` with one drawn token, as it crosses from a decode worker to the router.
fn token_events(tokens: &[u32]) -> Vec<Vec<u8>> {
    let event = |(position, token): (u32, &u32)| {
        let mut sampled = vec![0x10];
        varint(*token, &mut sampled);
        sampled.push(0x20);
        varint(position, &mut sampled);
        let len = sampled.len() as u8;
        [vec![0x12, len + 2, 0x0a, len], sampled].concat()
    };
    (0..).zip(tokens).skip(1).map(event).collect()
}

/// Of each kind of secret, how many of how many are on the wire.
fn found(traffic: &Traffic, seen: &Seen, kv: &[Vec<u8>]) -> Vec<(&'static str, usize, usize)> {
    let count = |needles: &[Vec<u8>]| needles.iter().filter(|needle| traffic.holds(needle)).count();
    let kinds = [
        ("prompt", vec![b"walnut bread".to_vec(), PROMPT.as_bytes().to_vec()]),
        ("tokens", token_events(&seen.tokens)),
        ("KV", kv.to_vec()),
        ("API key", vec![seen.key.as_bytes().to_vec()]),
        ("load in etcd", vec![b"\"free_blocks\"".to_vec()]),
    ];
    kinds.into_iter().map(|(kind, needles)| (kind, count(&needles), needles.len())).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs in a network namespace of its own, started by `a_listener_sees_nothing`"]
async fn inside_a_namespace() {
    // The same model, prompt and layout give the same KV: the first run tells what to look for.
    let known = observe(false).await;
    let kv = kv_pieces(&known.traffic);
    assert!(kv.len() > 50, "{} pieces", kv.len());
    let plain = observe(false).await;
    assert_eq!(plain.answer, known.answer);
    for (kind, hits, of) in found(&plain.traffic, &plain, &kv) {
        println!("without TLS: {hits} of {of} {kind}");
        let expected = match kind {
            "tokens" => of / 2,
            "KV" => of * 9 / 10,
            _ => of,
        };
        assert!(hits >= expected.max(1), "the search would not notice {kind}: {hits} of {of}");
    }
    let secret = observe(true).await;
    assert_eq!(secret.tokens, known.tokens);
    let captured = secret.traffic.bytes();
    assert!(captured > plain.traffic.bytes() / 2, "{captured} bytes were captured");
    assert!(secret.traffic.holds(KV_PROTOCOL), "no KV connection was captured");
    assert!(secret.traffic.beginning_with(KV_MAGIC).is_empty(), "a KV connection without TLS");
    for (kind, hits, of) in found(&secret.traffic, &secret, &kv) {
        println!("with TLS: {hits} of {of} {kind}");
        assert_eq!(hits, 0, "{kind} on the wire");
    }
}

#[test]
fn a_listener_sees_nothing() {
    let is_root = run(Command::new("id").arg("-u")).1.trim() == "0";
    let flags = if is_root { "-n" } else { "-rn" };
    let may = run(Command::new("unshare").args([flags, "ip", "link", "set", "lo", "up"]));
    if may.0 != Some(0) {
        eprintln!("NOT RUN: no network namespace of our own to listen in (unshare {flags}): {}", may.1);
        return;
    }
    let own = std::env::current_exe().unwrap();
    let mut inside = Command::new("unshare");
    inside.args([flags, "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""]).arg(own);
    let (code, said) = run(inside.args(["inside_a_namespace", "--exact", "--ignored", "--nocapture"]));
    println!("{said}");
    assert!(code == Some(0) && said.contains("1 passed"), "{said}");
}

/// Replaces every certificate by one of `ca`, and waits until the router shows it.
async fn renew(cluster: &Secured, ca: &Ca, names: &[&str]) {
    let before = shown(cluster);
    for name in names {
        ca.issue_for(cluster.dir.path(), name, 2, &[&uri(name)]);
    }
    cluster.until("the router shows the new certificate", |cluster| shown(cluster) != before).await;
}

/// The fingerprint of what the router shows to clients.
fn shown(cluster: &Secured) -> String {
    let script = format!(
        "openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -noout -fingerprint",
        cluster.address
    );
    run(Command::new("sh").args(["-c", &script])).1
}

/// Requests that end, those that failed, and the sign to stop.
#[derive(Default)]
struct Load {
    ended: AtomicUsize,
    failed: parking_lot::Mutex<Vec<String>>,
    stop: AtomicBool,
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_authorities_and_keys_change_under_load() {
    let mut cluster = Secured::prepare(TANDEM, true, true).await;
    let keys = api_key(&mut cluster);
    cluster.up(&["--api-keys", &keys, "--strategy", "disaggregated"]).await;
    let load = Arc::new(Load::default());
    let clients: Vec<_> = (0..3_u32)
        .map(|client| {
            let (router, load) = (cluster.client(), Arc::clone(&load));
            tokio::spawn(async move {
                for round in 0.. {
                    if load.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let prompt: Vec<u32> = (0..100).map(|i| (i * 7 + round * 13 + client) % 250).collect();
                    match router.generate(request(&prompt, greedy(60))).await {
                        Ok(output) if output.tokens[0].len() == 60 => {
                            load.ended.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(output) => load.failed.lock().push(format!("{} tokens", output.tokens[0].len())),
                        Err(error) => load.failed.lock().push(error),
                    }
                }
            })
        })
        .collect();
    let settle = async |more: usize| {
        let before = load.ended.load(Ordering::Relaxed);
        for _ in 0..600 {
            if load.ended.load(Ordering::Relaxed) >= before + more || !load.failed.lock().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the load stands still");
    };
    let names = ["router", "prefill", "decode", "prefill-2", "decode-2"];
    for round in 1..=4 {
        settle(4).await;
        // A new authority beside the old one, certificates of the new one, then the old one goes.
        let old = std::fs::read_to_string(&cluster.ca.cert).unwrap();
        let new = Ca::new(cluster.dir.path(), &format!("authority-{round}"));
        let pem = std::fs::read_to_string(&new.cert).unwrap();
        replace(&cluster.ca.cert, &format!("{old}{pem}"));
        tokio::time::sleep(Duration::from_millis(2500)).await;
        renew(&cluster, &new, &names).await;
        settle(2).await;
        replace(&cluster.ca.cert, &pem);
        // A second API key of the same client; clients take it, and the first one goes.
        let fresh = cluster.file(&format!("client-{round}.api-key"));
        let (_, said) = run(Command::new(TANDEM).args(["key", "new", "client", "--out"]).arg(&fresh));
        let line = format!("{} operator\n", said.lines().last().unwrap());
        let before = std::fs::read_to_string(&keys).unwrap();
        replace(Path::new(&keys), &format!("{before}{line}"));
        tokio::time::sleep(Duration::from_millis(2500)).await;
        replace(cluster.api_key.as_ref().unwrap(), &std::fs::read_to_string(&fresh).unwrap());
        settle(4).await;
        replace(Path::new(&keys), &line);
        // Workers that come and go make new connections with what is there now.
        let (comes, goes) = match round % 2 {
            1 => (["prefill-2", "decode-2"], ["prefill", "decode"]),
            _ => (["prefill", "decode"], ["prefill-2", "decode-2"]),
        };
        cluster.spawn("prefill", comes[0], &[]);
        cluster.spawn("decode", comes[1], &[]);
        cluster.wait_for(4).await;
        for name in goes {
            assert!(cluster.drain(name), "{name} ended badly");
        }
    }
    settle(4).await;
    load.stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let (ended, failed) = (load.ended.load(Ordering::Relaxed), load.failed.lock().clone());
    println!(
        "4 authorities, 20 certificates and 4 API keys changed; {ended} requests, {} failed",
        failed.len()
    );
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(ended >= 40, "{ended} requests are no load");
}

/// At once, as Kubernetes replaces the files of a secret.
fn replace(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(&beside, path).unwrap();
}
