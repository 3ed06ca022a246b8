//! Virtual time: events in the order of their times, and in the order of their making where times are equal.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Nanoseconds since the beginning.
pub(crate) type Ns = u64;

/// Seconds as nanoseconds.
pub(crate) fn ns(seconds: f64) -> Ns {
    (seconds * 1e9).round().max(0.0) as Ns
}

/// Nanoseconds as milliseconds.
pub(crate) fn ms(ns: Ns) -> f64 {
    ns as f64 / 1e6
}

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// The next request of the plan comes.
    Arrive,
    /// A request that waits at the door has waited long enough.
    GiveUp(u32),
    /// The router places a request.
    Place(u32),
    /// Its decode worker hears of it.
    Reserve(u32),
    /// Its prefill worker hears of it.
    Submit(u32),
    /// Its KV is on the decode worker.
    Landed(u32),
    /// The router hears that the prefill leg is over.
    PrefillReply(u32),
    /// A prefill worker's step is over, or it looks again for blocks.
    PrefillStep(u32),
    /// A decode worker's step is over, or it looks again for blocks.
    DecodeStep(u32),
}

/// The events to come.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    queue: BinaryHeap<Reverse<(Ns, u64, Event)>>,
    made: u64,
    now: Ns,
}

impl Clock {
    pub(crate) fn now(&self) -> Ns {
        self.now
    }

    /// At a time; not before now.
    pub(crate) fn at(&mut self, at: Ns, event: Event) {
        self.made += 1;
        self.queue.push(Reverse((at.max(self.now), self.made, event)));
    }

    /// After so long.
    pub(crate) fn after(&mut self, wait: Ns, event: Event) {
        self.at(self.now + wait, event);
    }

    /// The next event; it is its time now.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let Reverse((at, _, event)) = self.queue.pop()?;
        self.now = at;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_order_of_time_then_of_making() {
        let mut clock = Clock::default();
        clock.at(5, Event::Place(1));
        clock.at(3, Event::Place(2));
        clock.at(5, Event::Arrive);
        assert_eq!(clock.next(), Some(Event::Place(2)));
        clock.at(1, Event::Place(3));
        let rest: Vec<_> = std::iter::from_fn(|| clock.next().map(|event| (clock.now(), event))).collect();
        assert_eq!(rest, [(3, Event::Place(3)), (5, Event::Place(1)), (5, Event::Arrive)]);
    }
}
