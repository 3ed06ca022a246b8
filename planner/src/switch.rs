//! Which worker should change its pool: from the sizes that were decided, and from what there is.

use crate::Pool;

/// Workers of both pools that take requests now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Staff {
    /// All, by [`Pool`].
    pub ready: [usize; 2],
    /// Those of them that may change their pool.
    pub movable: [usize; 2],
}

/// The pool that a worker should go to. One at a time: a pool that is short, when the other has more than it should have and
/// one of them may go. Two short pools keep what they have, since taking from one would only move the shortage; no pool
/// gives its last worker. The sizes are damped already, so this needs no memory of its own.
pub fn switch(sizes: [usize; 2], staff: Staff) -> Option<Pool> {
    [Pool::Prefill, Pool::Decode].into_iter().find(|&to| {
        let (to, from) = (to as usize, 1 - to as usize);
        let spare = staff.ready[from].saturating_sub(sizes[from].max(1));
        staff.ready[to] < sizes[to] && spare > 0 && staff.movable[from] > 0
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn staff(ready: [usize; 2], movable: [usize; 2]) -> Staff {
        Staff { ready, movable }
    }

    #[test]
    fn from_plenty_to_want() {
        assert_eq!(switch([2, 3], staff([1, 4], [0, 1])), Some(Pool::Prefill));
        assert_eq!(switch([1, 3], staff([2, 2], [1, 0])), Some(Pool::Decode));
        assert_eq!(switch([2, 4], staff([1, 4], [0, 4])), None, "none to spare");
        assert_eq!(switch([2, 3], staff([1, 4], [1, 0])), None, "none that may go");
        assert_eq!(switch([5, 0], staff([1, 1], [0, 1])), None, "the last one stays");
    }

    proptest! {
        #[test]
        fn ends_and_never_turns_back(
            sizes in [1usize..9, 1usize..9], mut ready in [1usize..9, 1usize..9], fixed in [0usize..3, 0usize..3],
        ) {
            let mut seen = None;
            for _ in 0..20 {
                let movable = [0, 1].map(|p: usize| ready[p].saturating_sub(fixed[p]));
                let Some(to) = switch(sizes, staff(ready, movable)) else { return Ok(()) };
                prop_assert_eq!(*seen.get_or_insert(to), to);
                ready[to as usize] += 1;
                ready[1 - to as usize] -= 1;
                prop_assert!(ready[1 - to as usize] >= 1);
            }
            prop_assert!(false, "never ends");
        }
    }
}
