//! Every state that a hand-off can reach, within bounds: router, prefill worker, decode worker and network, around
//! the real states of landing, push and fence.
//!
//! Free at any point: loss, delay, reordering, timeouts of each side, cancel, late writes and reads. Drawn from a
//! budget: crash and restart of either worker, duplicates, flipped bytes. One block
//! on each side, two attempts, the block reused by the second one. `TANDEM_MODEL=layers,faults` sets other bounds.

#![allow(clippy::unwrap_used)]

#[path = "model/steps.rs"]
mod steps;
#[path = "model/world.rs"]
mod world;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use stateright::{Checker, Model, Property};
use steps::Step;
use world::World;

#[derive(Debug, Clone, Copy)]
struct HandOff {
    layers: usize,
    faults: u8,
}

impl Model for HandOff {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.layers, self.faults)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        world.after(&step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no token from unverified KV", |_: &Self, w: &World| !w.wrong_token),
            Property::always("a block is in one hand", |_: &Self, w: &World| w.one_hand()),
            Property::always("a source block is in one hand", |_: &Self, w: &World| w.one_source()),
            Property::always("a request ends once", |_: &Self, w: &World| {
                w.ends == u8::from(w.outcome.is_some())
            }),
            Property::sometimes("a request is answered", |_: &Self, w: &World| {
                w.outcome == Some(world::Outcome::Done)
            }),
            Property::sometimes("all is back", |_: &Self, w: &World| w.at_rest()),
        ]
    }
}

/// Two layers with every delay, one layer with every delay and one fault; or what the environment says.
fn bounds() -> Vec<HandOff> {
    let Ok(set) = std::env::var("TANDEM_MODEL") else {
        return vec![HandOff { layers: 1, faults: 1 }, HandOff { layers: 2, faults: 0 }];
    };
    let (layers, faults) = set.split_once(',').unwrap();
    vec![HandOff { layers: layers.parse().unwrap(), faults: faults.parse().unwrap() }]
}

#[test]
fn no_reachable_state_breaks_an_invariant() {
    for model in bounds() {
        let checker = model.checker().threads(2).spawn_bfs().join();
        println!("{model:?}: {} states, depth {}", checker.unique_state_count(), checker.max_depth());
        checker.assert_properties();
    }
}

/// From every reachable state a state can be reached where the request has ended and everything is back, by each side's own
/// steps: no message need come for it.
#[test]
fn every_reachable_state_has_an_exit() {
    for model in bounds() {
        let (states, stuck) = without_exit(model);
        println!("{model:?}: {states} states, {stuck} without an exit");
        assert_eq!(stuck, 0);
    }
}

/// How many states are reachable, and how many of them cannot reach the end.
fn without_exit(model: HandOff) -> (usize, usize) {
    // States are kept as their hashes, as the checker does; with 64 bits two of a million rarely meet.
    let hasher = RandomState::new();
    let mut numbers = HashMap::new();
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut exits = Vec::new();
    let mut frontier = Vec::new();
    for world in model.init_states() {
        numbers.insert(hasher.hash_one(&world), 0);
        before.push(Vec::new());
        frontier.push((0, world));
    }
    while let Some((from, world)) = frontier.pop() {
        if world.at_rest() {
            exits.push(from);
        }
        let mut steps = Vec::new();
        world.steps(&mut steps);
        for step in steps {
            let Some(next) = world.after(&step) else { continue };
            let number = *numbers.entry(hasher.hash_one(&next)).or_insert_with(|| {
                let number = u32::try_from(before.len()).unwrap();
                before.push(Vec::new());
                frontier.push((number, next));
                number
            });
            if step.is_local() {
                before[number as usize].push(from);
            }
        }
    }
    let mut has_exit = vec![false; before.len()];
    while let Some(state) = exits.pop() {
        if !std::mem::replace(&mut has_exit[state as usize], true) {
            exits.extend(&before[state as usize]);
        }
    }
    let stuck = has_exit.iter().filter(|exit| !**exit).count();
    (before.len(), stuck)
}
