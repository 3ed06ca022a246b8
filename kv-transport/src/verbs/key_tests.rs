//! The key is the proof: what a writer that does not keep to the protocol can do before, while and after its key is
//! taken back. Over real verbs, against memory that is looked at byte by byte.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Control, Done, Fabric, FabricConfig, PairBroken, QueuePair, Window, WriteTo};
use crate::Region;

const LEN: usize = 8 << 20;
const PIECE: usize = 256 << 10;

struct Ends {
    source: Region,
    target: Region,
    writer: QueuePair,
    owner: QueuePair,
    owner_fabric: Arc<Fabric>,
}

fn control(receive_buffers: usize) -> Control {
    Control { sends: 256, send_buffers: 64, receive_buffers }
}

fn ends() -> Ends {
    let (source, target) = (Region::zeroed(LEN), Region::zeroed(LEN));
    let open = |region: &Region| Fabric::open(&FabricConfig::default(), region).unwrap();
    let (writer_fabric, owner_fabric) = (open(&source), open(&target));
    let pair = |fabric: &Fabric, receives| {
        QueuePair::new(fabric.rail(0).unwrap().clone(), control(receives)).unwrap()
    };
    let (mut writer, mut owner) = (pair(&writer_fabric, 0), pair(&owner_fabric, 64));
    assert!(owner.has_windows(), "this test is about memory windows");
    owner.connect(&writer.offer()).unwrap();
    writer.connect(&owner.offer()).unwrap();
    Ends { source, target, writer, owner, owner_fabric }
}

/// Polls until `found` says so, or a request failed.
fn poll(pair: &mut QueuePair, mut found: impl FnMut(Done) -> bool) -> Result<(), PairBroken> {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut done = Vec::new();
    while Instant::now() < deadline {
        pair.poll(&mut done)?;
        if done.drain(..).any(&mut found) {
            return Ok(());
        }
        std::thread::yield_now();
    }
    panic!("nothing completed in time");
}

fn bind(owner: &mut QueuePair) -> (Window, u32) {
    let window = owner.bind().unwrap();
    poll(owner, |done| done == Done::Bound(window)).unwrap();
    let key = owner.key(window);
    (window, key)
}

impl Ends {
    fn write(&mut self, at: usize, buffer: usize, key: u32) {
        let remote = self.target.base() as u64 + at as u64;
        let write = WriteTo { remote, pieces: vec![at..at + PIECE] };
        self.writer.write_and_announce(&[write], key, b"x", buffer).unwrap();
    }

    fn target(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        self.target.copy_out(0, &mut bytes).unwrap();
        bytes
    }
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_key_that_was_taken_back_in_the_middle_of_writes_lets_no_later_byte_in() {
    let mut landed_before = 0;
    for round in 0..20 {
        let mut ends = ends();
        ends.source.copy_in(0, &[0xAB; LEN]).unwrap();
        let (window, key) = bind(&mut ends.owner);
        for (buffer, at) in (0..LEN).step_by(PIECE).enumerate() {
            ends.write(at, buffer, key);
        }
        // A few of the 32 writes arrive, a different number each round.
        let (wanted, mut arrived) = (round % 8, 0);
        if wanted > 0 {
            let mut enough = |done| {
                arrived += u32::from(matches!(done, Done::Received(..)));
                arrived >= wanted
            };
            poll(&mut ends.owner, &mut enough).unwrap();
        }
        ends.owner.invalidate(window).unwrap();
        let taken = poll(&mut ends.owner, |done| done == Done::Invalidated(window));
        // A write that met the dead key may break the queue pair before the completion is seen: then it is torn
        // down, as the receiver does.
        if taken.is_err() {
            ends.owner.fail();
        }
        // The memory is somebody else's from here on.
        landed_before += ends.target().iter().filter(|b| **b == 0xAB).count();
        ends.target.copy_in(0, &[0x11; LEN]).unwrap();
        // The writer learns that a write failed, or that all were done before; nothing of it is in flight then.
        let last = LEN / PIECE - 1;
        let _ = poll(&mut ends.writer, |done| done == Done::Sent(last));
        assert!(ends.target() == [0x11; LEN], "round {round}: a byte landed after the key was taken back");
    }
    assert!(landed_before > 0, "no write ever arrived");
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_dead_key_breaks_its_user_and_writes_nothing() {
    let mut ends = ends();
    ends.source.copy_in(0, &[0xAB; LEN]).unwrap();
    let (window, key) = bind(&mut ends.owner);
    ends.write(0, 0, key);
    poll(&mut ends.writer, |done| done == Done::Sent(0)).unwrap();
    assert_eq!(ends.target()[PIECE - 1..PIECE + 1], [0xAB, 0]);
    ends.owner.invalidate(window).unwrap();
    poll(&mut ends.owner, |done| done == Done::Invalidated(window)).unwrap();
    ends.write(PIECE, 1, key);
    let error = poll(&mut ends.writer, |done| done == Done::Sent(1)).unwrap_err();
    assert!(error.0.contains("remote"), "{error:?}");
    assert!(ends.target()[PIECE..].iter().all(|b| *b == 0));
}

#[tokio::test]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_key_is_worthless_on_another_queue_pair_and_so_is_the_regions_own() {
    for stolen in [true, false] {
        let mut first = ends();
        let (_, key) = bind(&mut first.owner);
        let key = if stolen { key } else { first.owner.region_key() };
        // Another peer of the same owner, that was given no key.
        let source = Region::zeroed(LEN);
        source.copy_in(0, &[0xCD; LEN]).unwrap();
        let other_fabric = Fabric::open(&FabricConfig::default(), &source).unwrap();
        let mut other = QueuePair::new(other_fabric.rail(0).unwrap().clone(), control(0)).unwrap();
        let mut owner = QueuePair::new(first.owner_fabric.rail(0).unwrap().clone(), control(64)).unwrap();
        owner.connect(&other.offer()).unwrap();
        other.connect(&owner.offer()).unwrap();
        let write = WriteTo { remote: first.target.base() as u64, pieces: vec![0..PIECE] };
        other.write_and_announce(&[write], key, b"x", 0).unwrap();
        assert!(poll(&mut other, |done| done == Done::Sent(0)).is_err());
        assert!(first.target().iter().all(|b| *b == 0), "stolen: {stolen}");
    }
}
