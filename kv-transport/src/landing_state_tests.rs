//! The landing's state under random events: duplicates, late writes, cancels at any point.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Event {
    Claim(usize),
    Begin,
    End,
    Settle(usize, bool),
    Commit,
    Revoke(usize),
}

const CELLS: usize = 5;

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..CELLS + 1).prop_map(Event::Claim),
        4 => Just(Event::Begin),
        4 => Just(Event::End),
        6 => (0..CELLS + 1, prop::bool::weighted(0.8)).prop_map(|(cell, good)| Event::Settle(cell, good)),
        2 => Just(Event::Commit),
        1 => (0..LandingEnd::ALL.len()).prop_map(Event::Revoke),
    ]
}

/// What an honest connection does for one cell.
fn land(state: &mut LandingState, cell: usize, good: bool) -> Settled {
    assert_eq!(state.claim(cell), Claim::Granted);
    assert!(state.write_begins());
    let settled = state.settle(cell, good);
    state.write_ends();
    settled
}

proptest! {
    #[test]
    fn invariants_hold_under_any_sequence(events in prop::collection::vec(event(), 0..200)) {
        let mut state = LandingState::new(CELLS);
        let (mut writes, mut good, mut claimed) = (0_usize, HashSet::new(), HashSet::new());
        let mut committed = false;
        for event in events {
            let before = state.phase();
            match event {
                Event::Claim(cell) => match state.claim(cell) {
                    Claim::Granted => {
                        prop_assert!(!good.contains(&cell), "a verified cell is never written again");
                        prop_assert!(claimed.insert(cell), "one writer a cell");
                    }
                    Claim::Duplicate => prop_assert!(good.contains(&cell)),
                    Claim::Busy => prop_assert!(claimed.contains(&cell)),
                    Claim::Outside => prop_assert_eq!(cell, CELLS),
                    Claim::Over => prop_assert!(!state.is_open()),
                },
                Event::Begin => {
                    let may = state.write_begins();
                    prop_assert_eq!(may, before == LandingPhase::Receiving);
                    writes += usize::from(may);
                }
                Event::End if writes > 0 => {
                    writes -= 1;
                    state.write_ends();
                }
                Event::End => {}
                Event::Settle(cell, ok) => match state.settle(cell, ok) {
                    Settled::Verified => {
                        prop_assert!(ok && claimed.remove(&cell));
                        good.insert(cell);
                    }
                    Settled::Refetch | Settled::GaveUp => prop_assert!(!ok && claimed.remove(&cell)),
                    Settled::Ignored => prop_assert!(!state.is_open() || !claimed.contains(&cell)),
                },
                Event::Commit => {
                    committed |= state.is_open();
                    state.commit_arrives();
                }
                Event::Revoke(end) => state.revoke(LandingEnd::ALL[end]),
            }
            let after = state.phase();
            prop_assert_eq!(state.writes(), writes);
            match before {
                LandingPhase::Void => prop_assert_eq!(after, LandingPhase::Void),
                LandingPhase::Committed => prop_assert_eq!(after, LandingPhase::Committed),
                LandingPhase::Revoking => prop_assert!(matches!(after, LandingPhase::Revoking | LandingPhase::Void)),
                LandingPhase::Receiving => prop_assert_ne!(after, LandingPhase::Reserved),
                LandingPhase::Reserved => {}
            }
            match after {
                LandingPhase::Committed => prop_assert!(committed && good.len() == CELLS && writes == 0),
                LandingPhase::Void => prop_assert!(writes == 0 && state.end().is_some()),
                LandingPhase::Revoking => prop_assert!(writes > 0 && state.end().is_some()),
                LandingPhase::Reserved | LandingPhase::Receiving => prop_assert!(state.end().is_none()),
            }
        }
        // Every state has an exit: cancel, let the writes end, and it is quiet.
        state.revoke(LandingEnd::Revoked);
        for _ in 0..writes {
            state.write_ends();
        }
        prop_assert!(matches!(state.phase(), LandingPhase::Committed | LandingPhase::Void));
    }

    #[test]
    fn any_order_of_cells_and_commit_commits(order in Just((0..CELLS).collect::<Vec<_>>()).prop_shuffle(), commit_at in 0..=CELLS) {
        let mut state = LandingState::new(CELLS);
        for (i, cell) in order.into_iter().enumerate() {
            if i == commit_at {
                state.commit_arrives();
            }
            prop_assert!(state.is_open());
            prop_assert_eq!(land(&mut state, cell, true), Settled::Verified);
        }
        state.commit_arrives();
        state.commit_arrives();
        prop_assert_eq!(state.phase(), LandingPhase::Committed);
        state.revoke(LandingEnd::PeerGone);
        prop_assert_eq!(state.phase(), LandingPhase::Committed);
        prop_assert_eq!(state.claim(0), Claim::Duplicate);
    }
}

#[test]
fn a_cell_is_refetched_three_times_and_no_more() {
    let mut state = LandingState::new(1);
    for _ in 0..MAX_REFETCHES {
        assert_eq!(land(&mut state, 0, false), Settled::Refetch);
    }
    assert_eq!(land(&mut state, 0, false), Settled::GaveUp);
    assert_eq!((state.phase(), state.end()), (LandingPhase::Void, Some(LandingEnd::Corrupt)));
}

#[test]
fn revoke_waits_for_the_write_in_flight() {
    let mut state = LandingState::new(2);
    assert_eq!(state.claim(0), Claim::Granted);
    assert!(state.write_begins());
    state.revoke(LandingEnd::Revoked);
    assert_eq!(state.phase(), LandingPhase::Revoking);
    assert!(!state.write_begins());
    assert_eq!(state.settle(0, true), Settled::Ignored);
    state.write_ends();
    assert_eq!(state.phase(), LandingPhase::Void);
}

#[test]
fn no_cells_need_no_write() {
    let mut state = LandingState::new(0);
    state.commit_arrives();
    assert_eq!(state.phase(), LandingPhase::Committed);
}
