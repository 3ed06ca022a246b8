//! A real etcd with client certificates, users and permissions: what works, and what each refusal says.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use cluster::{EtcdAccess, EtcdRegistry, Join, Load, Member, Picture, RegistryError, Role, Watch};
use tandem_tests::certs::{Ca, Pair};
use tandem_tests::etcd::Etcd;
use tokio::sync::watch;

fn member(worker: &str) -> Member {
    Member {
        worker: worker.into(),
        role: Role::Decode,
        address: "127.0.0.1:1".into(),
        model: "m".into(),
        compat_hash: "c".into(),
        incarnation: 1,
        transports: vec!["tcp".into()],
        tls: false,
        zone: String::new(),
        block_tokens: 16,
        total_blocks: 10,
        max_context_tokens: 100,
        max_sequences: 4,
        auto_role: false,
    }
}

async fn until(seen: &mut watch::Receiver<Picture>, what: &str, holds: impl Fn(&Picture) -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(30), seen.wait_for(|p| holds(p))).await;
    assert!(matches!(waited, Ok(Ok(_))), "never saw: {what}");
}

fn files(pair: &Pair) -> Option<(PathBuf, PathBuf)> {
    Some((pair.cert.clone(), pair.key.clone()))
}

/// The access that works with a secured etcd, as nobody.
fn good(etcd: &Etcd) -> EtcdAccess {
    let secured = etcd.secured.as_ref().unwrap();
    EtcdAccess { ca: Some(secured.ca.cert.clone()), identity: files(&secured.client), user: None }
}

fn registry(etcd: &Etcd, access: EtcdAccess) -> EtcdRegistry {
    EtcdRegistry::new(std::slice::from_ref(&etcd.url), "test", Duration::from_secs(2)).with_access(access)
}

async fn refusal(etcd: &Etcd, access: EtcdAccess) -> RegistryError {
    registry(etcd, access).watch().await.map(drop).unwrap_err()
}

#[tokio::test]
async fn client_certificates_open_etcd_and_wrong_ones_say_why() {
    let etcd = Etcd::start_with(true, &[]).await;
    let dir = etcd.dir();
    let stranger = Ca::new(dir, "stranger");
    let strangers = stranger.issue(dir, "stranger", 1);
    let old = etcd.secured.as_ref().unwrap().ca.issue(dir, "old", -1);
    let good = good(&etcd);

    let registry = registry(&etcd, good.clone());
    let mut seen = registry.watch().await.unwrap();
    let a = registry.join(member("a"), watch::channel(Load::default()).1).await.unwrap();
    until(&mut seen, "a", |p| p.members.contains_key("a")).await;
    a.leave(Duration::from_secs(5)).await;
    until(&mut seen, "a gone", |p| p.members.is_empty()).await;

    let wrong_ca = EtcdAccess { ca: Some(stranger.cert.clone()), ..good.clone() };
    let said = refusal(&etcd, wrong_ca).await.to_string();
    assert!(said.contains("invalid peer certificate") && said.contains(&etcd.url), "{said}");
    let nobody = EtcdAccess { identity: None, ..good.clone() };
    let said = refusal(&etcd, nobody).await.to_string();
    assert!(said.contains("certificate"), "{said}");
    let said = refusal(&etcd, EtcdAccess { identity: files(&strangers), ..good.clone() }).await.to_string();
    assert!(said.contains("certificate"), "{said}");
    let said = refusal(&etcd, EtcdAccess { identity: files(&old), ..good.clone() }).await.to_string();
    assert!(said.contains("--etcd-cert") && said.contains("expired on"), "{said}");
}

#[test]
fn settings_and_files_are_refused_before_a_connection() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new(dir.path(), "ca");
    let (one, two) = (ca.issue(dir.path(), "one", 1), ca.issue(dir.path(), "two", 1));
    let access =
        |ca: Option<&Path>, identity| EtcdAccess { ca: ca.map(Path::to_owned), identity, user: None };
    let says = |access: EtcdAccess, endpoint: &str, expected: &str| {
        let said = access.check(&[endpoint.to_owned()]).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    };
    let (plain, encrypted) = ("http://e:2379", "https://e:2379");
    assert!(EtcdAccess::default().check(&[plain.to_owned()]).is_ok());
    assert!(access(Some(&ca.cert), files(&one)).check(&[encrypted.to_owned()]).is_ok());
    says(access(None, None), encrypted, "needs --etcd-ca FILE");
    says(access(Some(&ca.cert), None), plain, "write https://");
    says(access(Some(&dir.path().join("none")), None), encrypted, "--etcd-ca");
    says(access(Some(&one.key), None), encrypted, "holds no certificate");
    says(access(Some(&ca.cert), Some((one.cert.clone(), two.key.clone()))), encrypted, "is not the key of");
    says(access(Some(&ca.cert), Some((one.cert.clone(), one.cert.clone()))), encrypted, "no private key");
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    let user = EtcdAccess { user: Some(("u".into(), empty)), ..EtcdAccess::default() };
    says(user, plain, "--etcd-password-file");
}

/// Users with a password and permissions: the worker writes below its cluster, the router only reads there.
fn enable_users(etcd: &Etcd) {
    let all = "/tandem/v1/test/";
    let root = ["--user", "root:secret"];
    for command in [
        &["user", "add", "root:secret"][..],
        &["user", "add", "worker:w-pass"],
        &["user", "add", "router:r-pass"],
        &["user", "add", "other:o-pass"],
        &["role", "add", "writes"],
        &["role", "add", "reads"],
        &["role", "grant-permission", "writes", "readwrite", all, "--prefix"],
        &["role", "grant-permission", "reads", "read", all, "--prefix"],
        &["user", "grant-role", "root", "root"],
        &["user", "grant-role", "worker", "writes"],
        &["user", "grant-role", "router", "reads"],
        &["auth", "enable"],
    ] {
        assert!(etcd.ctl(command).is_some(), "{command:?}");
    }
    assert!(etcd.ctl(&[&root[..], &["user", "list"]].concat()).unwrap().contains("worker"));
}

fn user(etcd: &Etcd, name: &str, password: &str) -> EtcdAccess {
    let file = etcd.dir().join(format!("{name}.password"));
    std::fs::write(&file, format!("{password}\n")).unwrap();
    let access = if etcd.secured.is_some() { good(etcd) } else { EtcdAccess::default() };
    EtcdAccess { user: Some((name.to_owned(), file)), ..access }
}

#[tokio::test]
async fn users_with_permissions_and_tokens_that_expire() {
    // Tokens that nobody uses live for a second; the certificate's name (tandem) is no user, so passwords decide.
    let mut etcd = Etcd::start_with(true, &["--auth-token-ttl=1"]).await;
    enable_users(&etcd);
    let worker = registry(&etcd, user(&etcd, "worker", "w-pass"));
    let router = registry(&etcd, user(&etcd, "router", "r-pass"));

    let mut seen = router.watch().await.unwrap();
    let (load, load_rx) = watch::channel(Load::default());
    let a = worker.join(member("a"), load_rx).await.unwrap();
    until(&mut seen, "a", |p| p.members.contains_key("a")).await;

    let said = refusal(&etcd, user(&etcd, "other", "o-pass")).await.to_string();
    assert!(said.contains("permission denied"), "{said}");
    let said = refusal(&etcd, user(&etcd, "worker2", "w-pass")).await.to_string();
    assert!(said.contains("authentication failed"), "{said}");
    let load_only = watch::channel(Load::default()).1;
    let said = router.join(member("b"), load_only).await.map(drop).unwrap_err().to_string();
    assert!(said.contains("permission denied"), "{said}");

    // Time passes without a call: both tokens are gone, the lease and the watch are not.
    tokio::time::sleep(Duration::from_secs(4)).await;
    load.send_modify(|l| l.free_blocks = 3);
    let fresh = |p: &Picture| p.connected && p.members.get("a").is_some_and(|e| e.load.free_blocks == 3);
    until(&mut seen, "the load after the token's end", fresh).await;

    // A restart forgets every token.
    etcd.kill();
    until(&mut seen, "etcd away", |p| !p.connected).await;
    etcd.restart();
    until(&mut seen, "etcd back with a", |p| p.connected && p.members.contains_key("a")).await;
    load.send_modify(|l| l.free_blocks = 4);
    until(&mut seen, "the load", |p| p.members.get("a").is_some_and(|e| e.load.free_blocks == 4)).await;

    a.leave(Duration::from_secs(5)).await;
    until(&mut seen, "a gone", |p| p.members.is_empty()).await;
}
