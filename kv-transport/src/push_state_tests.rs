//! The push's state under random events, and against a model receiver.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const PLANES: u32 = 2;
const SLOTS: u32 = 3;
const TOTAL: usize = 6;
const BOUNDS: FrameBounds = FrameBounds { cells: 2, bytes: 300, window_bytes: 450 };

fn push() -> PushState {
    PushState::new(PLANES as usize, SLOTS as usize, 100, BOUNDS)
}

fn cell(id: u32) -> QueuedCell {
    QueuedCell { plane: id / SLOTS, index: id % SLOTS, src_slot: id, checksum: id }
}

#[derive(Debug, Clone)]
enum Event {
    Queue(u32),
    Attached,
    Next,
    Begin,
    End,
    Ack(u32, u64),
    Commit,
    CommitAck,
    Close,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..8_u32).prop_map(Event::Queue),
        3 => Just(Event::Attached),
        8 => Just(Event::Next),
        4 => Just(Event::Begin),
        4 => Just(Event::End),
        6 => (0..12_u32, prop_oneof![4 => Just(0), 1 => any::<u64>()]).prop_map(|(seq, bad)| Event::Ack(seq, bad)),
        2 => Just(Event::Commit),
        2 => Just(Event::CommitAck),
        1 => Just(Event::Close),
    ]
}

/// The ticket was shown on one connection; cells and commit went by another, and were answered first.
#[test]
fn a_ticket_that_comes_after_its_own_commit_ends_nothing() {
    let mut state = push();
    assert_eq!(state.next(), Next::Attach);
    state.queue(&(0..TOTAL as u32).map(cell).collect::<Vec<_>>()).unwrap();
    state.refused(Refusal::Stale, false);
    assert!(!state.is_open(), "before the commit a stale ticket is the end");

    let mut state = PushState::new(1, 1, 100, BOUNDS);
    assert_eq!(state.next(), Next::Attach);
    state.queue(&[cell(0)]).unwrap();
    state.commit().unwrap();
    assert!(matches!(state.next(), Next::Write { .. }));
    assert_eq!(state.next(), Next::Commit);
    let (mut committed, mut earlier) = (state.clone(), state.clone());
    let (mut refused, mut busy) = (state.clone(), state);
    committed.refused(Refusal::Stale, false);
    committed.attached();
    committed.commit_acked();
    assert_eq!(committed.phase(), PushPhase::Committed);
    committed.refused(Refusal::Stale, false);
    assert!(committed.was_committed(), "also when the late answer comes last");
    earlier.refused(Refusal::Stale, false);
    earlier.commit_acked();
    assert!(!earlier.was_committed());
    assert_eq!(earlier.end(), Some(&PushError::Refused(Refusal::Stale)), "another push used the ticket");
    refused.refused(Refusal::Stale, true);
    assert_eq!(refused.end(), Some(&PushError::Refused(Refusal::Stale)));
    busy.refused(Refusal::Busy, false);
    assert_eq!(busy.end(), Some(&PushError::Refused(Refusal::Busy)), "its cells may be lost");
}

proptest! {
    #[test]
    fn invariants_hold_under_any_sequence(events in prop::collection::vec(event(), 0..300)) {
        let mut state = push();
        let (mut reads, mut queued, mut commits, mut aborts) = (0_usize, HashSet::new(), 0, 0);
        for event in events {
            let before = state.phase();
            match event {
                Event::Queue(id) => {
                    let taken = state.queue(&[cell(id)]).is_ok();
                    prop_assert!(!taken || (queued.insert(id) && id < TOTAL as u32));
                }
                Event::Attached => state.attached(),
                Event::Next => {
                    prop_assert_eq!(state.has_next(), { let mut copy = state_probe(&state); copy.next() != Next::Nothing });
                    match state.next() {
                        Next::Write { cells, .. } => {
                            prop_assert!(!cells.is_empty() && cells.len() <= BOUNDS.cells);
                            prop_assert!(state.is_open());
                        }
                        Next::Commit => {
                            commits += 1;
                            prop_assert!(state.pending.is_empty(), "the commit goes out behind the cells");
                            prop_assert_eq!(queued.len(), TOTAL);
                        }
                        Next::Abort => aborts += 1,
                        Next::Attach | Next::Nothing => {}
                    }
                }
                Event::Begin => {
                    let may = state.read_begins();
                    prop_assert!(!may || state.is_open());
                    reads += usize::from(may);
                }
                Event::End if reads > 0 => {
                    reads -= 1;
                    state.read_ends();
                }
                Event::End => {}
                Event::Ack(seq, bad) => state.acked(seq, bad),
                Event::Commit => { let _ = state.commit(); }
                Event::CommitAck => state.commit_acked(),
                Event::Close => state.close(PushError::Closed),
            }
            prop_assert_eq!(state.reads(), reads);
            prop_assert!(state.outstanding_bytes() <= TOTAL * 100, "the queue is bounded by the cells of the transfer");
            prop_assert!(commits <= 1 && aborts <= 1);
            match (before, state.phase()) {
                (PushPhase::Closed, after) => prop_assert_eq!(after, PushPhase::Closed),
                (PushPhase::Closing, after) => prop_assert!(matches!(after, PushPhase::Closing | PushPhase::Closed)),
                (_, PushPhase::Closed) => prop_assert_eq!(reads, 0),
                (_, PushPhase::Committed) => prop_assert!(commits == 1 && queued.len() == TOTAL),
                _ => {}
            }
        }
        state.close(PushError::Closed);
        for _ in 0..reads {
            state.read_ends();
        }
        prop_assert_eq!(state.phase(), PushPhase::Closed);
    }

    #[test]
    fn every_cell_arrives_whatever_order_acks_come_in(seeds in prop::collection::vec(any::<u16>(), 200)) {
        let mut state = push();
        prop_assert_eq!(state.next(), Next::Attach);
        state.attached();
        state.queue(&(0..TOTAL as u32).map(cell).collect::<Vec<_>>()).unwrap();
        state.commit().unwrap();
        let (mut open, mut arrived, mut commits) = (Vec::new(), HashSet::new(), 0);
        let mut seeds = seeds.into_iter();
        loop {
            match state.next() {
                Next::Write { seq, cells } => open.push((seq, cells)),
                Next::Commit => commits += 1,
                Next::Nothing if open.is_empty() => break,
                Next::Nothing => {
                    let seed = usize::from(seeds.next().unwrap_or(0));
                    let (seq, cells) = open.swap_remove(seed % open.len());
                    // Once in a while the first cell of a frame was bad.
                    let bad = u64::from(seed % 7 == 1 && state.refetched() < 3);
                    arrived.extend(cells.iter().skip(bad as usize).map(|c| c.src_slot));
                    state.acked(seq, bad);
                    state.acked(seq, u64::MAX);
                }
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert!(open.iter().map(|(_, cells)| cells.len() * 100).sum::<usize>() <= BOUNDS.window_bytes);
        }
        prop_assert_eq!(commits, 1);
        prop_assert_eq!(arrived.len(), TOTAL);
        state.commit_acked();
        prop_assert_eq!(state.phase(), PushPhase::Committed);
        state.close(PushError::Closed);
        prop_assert_eq!((state.phase(), state.end()), (PushPhase::Closed, None));
        prop_assert!(!state.has_next());
    }
}

/// A copy good enough to ask what `next` would say.
fn state_probe(state: &PushState) -> PushState {
    PushState {
        phase: state.phase,
        end: state.end.clone(),
        queued: state.queued.clone(),
        pending: state.pending.clone(),
        sent: state.sent.clone(),
        retries: state.retries.clone(),
        ..*state
    }
}

#[test]
fn a_cell_refused_four_times_is_corrupt() {
    let mut state = PushState::new(1, 1, 100, BOUNDS);
    state.next();
    state.attached();
    state.queue(&[cell(0)]).unwrap();
    for round in 0..4 {
        let Next::Write { seq, .. } = state.next() else { panic!("round {round}") };
        state.acked(seq, 1);
    }
    assert_eq!(state.end(), Some(&PushError::Corrupt));
    assert_eq!(state.phase(), PushPhase::Closed);
}

#[test]
fn queueing_is_all_or_nothing() {
    let mut state = push();
    assert!(state.queue(&[cell(0), cell(1), cell(0)]).is_err());
    assert!(state.queue(&[cell(0), cell(6)]).is_err());
    state.queue(&[cell(0), cell(1)]).unwrap();
    state.next();
    state.attached();
    assert_eq!(state.commit(), Err(PushError::Incomplete { missing: 4 }));
}
