//! The same tests on every registry: memory, etcd (a real one), and a worker's remote view of memory.
//!
//! etcd is started from the PATH; a machine without it fails with a message, since `make test` installs it.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use cluster::{EtcdRegistry, Join, Load, Member, MemoryRegistry, Picture, RegistryError, Role, Watch};
use tandem_tests::etcd::Etcd;
use tandem_tests::process::free_port;
use tokio::sync::watch;

fn member(worker: &str, incarnation: u64) -> Member {
    Member {
        worker: worker.into(),
        role: Role::Decode,
        address: "127.0.0.1:1".into(),
        model: "m".into(),
        compat_hash: "c".into(),
        incarnation,
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

/// Waits until the picture fulfils a condition; the deadline only ends a test that would hang.
async fn until(seen: &mut watch::Receiver<Picture>, what: &str, holds: impl Fn(&Picture) -> bool) -> Picture {
    let waited = tokio::time::timeout(Duration::from_secs(30), seen.wait_for(|p| holds(p))).await;
    if let Ok(Ok(picture)) = waited {
        return picture.clone();
    }
    panic!("never saw: {what}");
}

trait Both: Join + Watch {}
impl<T: Join + Watch> Both for T {}

/// Joining, load, leaving, another incarnation: what every registry must do.
async fn behaves(registry: &dyn Both) {
    let mut seen = registry.watch().await.unwrap();
    assert!(seen.borrow().connected && seen.borrow().members.is_empty());

    let (load, load_rx) = watch::channel(Load { free_blocks: 10, ..Load::default() });
    let a = registry.join(member("a", 1), load_rx.clone()).await.unwrap();
    let b = registry.join(member("b", 1), watch::channel(Load::default()).1).await.unwrap();
    let both = until(&mut seen, "two members", |p| p.members.len() == 2).await;
    assert_eq!(both.members["a"].member, member("a", 1));
    assert_eq!(both.members["a"].load.free_blocks, 10);

    load.send_modify(|l| l.free_blocks = 3);
    until(&mut seen, "the new load", |p| p.members["a"].load.free_blocks == 3).await;
    // A watcher that comes late sees the same.
    assert_eq!(registry.watch().await.unwrap().borrow().members, seen.borrow().members);

    b.leave(Duration::from_secs(5)).await;
    until(&mut seen, "b gone", |p| !p.members.contains_key("b")).await;
    a.leave(Duration::from_secs(5)).await;
    until(&mut seen, "a gone", |p| p.members.is_empty()).await;

    let again = registry.join(member("a", 2), load_rx).await.unwrap();
    let p = until(&mut seen, "a again", |p| p.members.contains_key("a")).await;
    assert_eq!(p.members["a"].member.incarnation, 2);
    again.vanish();
    until(&mut seen, "a vanished", |p| p.members.is_empty()).await;
}

#[tokio::test]
async fn memory_behaves() {
    behaves(&MemoryRegistry::new()).await;
}

#[tokio::test]
async fn memory_keeps_the_newer_incarnation() {
    let registry = MemoryRegistry::new();
    let load = watch::channel(Load::default()).1;
    let new = registry.join(member("a", 5), load.clone()).await.unwrap();
    let refused = registry.join(member("a", 4), load).await;
    assert!(matches!(refused.err(), Some(RegistryError::Refused(_))));
    registry.remove("a", 4);
    assert_eq!(registry.watch().await.unwrap().borrow().members.len(), 1);
    new.leave(Duration::from_secs(1)).await;
}

fn registry(etcd: &Etcd) -> EtcdRegistry {
    EtcdRegistry::new(std::slice::from_ref(&etcd.url), "test", Duration::from_secs(2))
}

#[tokio::test]
async fn etcd_behaves() {
    let etcd = Etcd::start().await;
    behaves(&registry(&etcd)).await;
}

#[tokio::test]
async fn etcd_away_is_not_everyone_gone() {
    let mut etcd = Etcd::start().await;
    let registry: Arc<dyn Both> = Arc::new(registry(&etcd));
    let mut seen = registry.watch().await.unwrap();
    let load = watch::channel(Load::default()).1;
    let a = registry.join(member("a", 7), load).await.unwrap();
    until(&mut seen, "a", |p| p.members.contains_key("a")).await;

    etcd.kill();
    let away = until(&mut seen, "etcd away", |p| !p.connected).await;
    assert!(away.members.contains_key("a"), "the last picture stays");

    etcd.restart();
    let back = until(&mut seen, "etcd back with a", |p| p.connected && p.members.contains_key("a")).await;
    assert_eq!(back.members["a"].member.incarnation, 7);
    // The old lease has run out by now or soon; the member must stay through its own new one.
    tokio::time::sleep(Duration::from_secs(4)).await;
    until(&mut seen, "a still there", |p| p.connected && p.members.contains_key("a")).await;
    a.leave(Duration::from_secs(5)).await;
    until(&mut seen, "a gone", |p| p.members.is_empty()).await;
}

#[tokio::test]
async fn etcd_away_at_the_start_is_an_error() {
    let url = format!("http://127.0.0.1:{}", free_port());
    let registry = EtcdRegistry::new(&[url], "test", Duration::from_secs(2));
    let refused = registry.watch().await.map(drop);
    assert!(matches!(refused, Err(RegistryError::Unreachable { .. })), "{refused:?}");
    let load = watch::channel(Load::default()).1;
    assert!(registry.join(member("a", 1), load).await.is_err());
}

#[tokio::test]
async fn a_patient_start_waits_for_etcd() {
    let mut etcd = Etcd::start().await;
    etcd.kill();
    let patient = registry(&etcd).patient(Duration::from_secs(30));
    let load = watch::channel(Load::default()).1;
    let (joining, watching) = (patient.clone(), patient);
    let joining = tokio::spawn(async move { joining.join(member("a", 7), load).await });
    let watching = tokio::spawn(async move { watching.watch().await });
    // Once an impatient one has failed, the two have too, or are about to.
    assert!(registry(&etcd).watch().await.is_err());
    assert!(!joining.is_finished() && !watching.is_finished());

    etcd.restart();
    let a = joining.await.unwrap().unwrap();
    let mut seen = watching.await.unwrap().unwrap();
    until(&mut seen, "a", |p| p.connected && p.members.contains_key("a")).await;
    a.leave(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn etcd_keys_are_readable() {
    let etcd = Etcd::start().await;
    let load = watch::channel(Load::default()).1;
    let _a = registry(&etcd).join(member("a", 7), load).await.unwrap();
    let text = etcd.keys("/tandem/").unwrap();
    assert!(text.contains("/tandem/v1/test/members/a\n{\"worker\":\"a\",\"role\":\"decode\""), "{text}");
    assert!(text.contains("/tandem/v1/test/load/a\n{\"queued_tokens\":0"), "{text}");
}
