//! Which workers of a large pool are looked at for a request. A pure function.
//!
//! A small pool is looked at whole. Of a large one, those that hold most of the prompt come into question, and a random
//! sample of the others: the best of a few dozen drawn ones is nearly as good as the best of all (Mitzenmacher, "The power
//! of two choices"), and routers that do not know of each other do not all choose the same one.

use rand::Rng;
use rand::seq::{SliceRandom, index};

/// Pools of up to so many workers are looked at whole.
pub const WHOLE: usize = 64;
/// Of larger ones, so many that hold most of the prompt.
pub const HOLDERS: usize = 32;
/// And so many others.
pub const SAMPLE: usize = 32;

/// Positions in a pool of `workers`, each with the blocks it holds. `holders` come with those that hold most first, as the
/// prefix index gives them.
pub fn shortlist(
    workers: usize,
    mut holders: Vec<(usize, usize)>,
    random: &mut impl Rng,
) -> Vec<(usize, usize)> {
    let mut held = vec![0; workers];
    holders.iter().for_each(|&(at, blocks)| held[at] = blocks);
    if workers <= WHOLE {
        return held.into_iter().enumerate().collect();
    }
    if holders.len() > HOLDERS {
        // Which of those that hold the same is left to chance, or the first ones would get everything.
        let least = holders[HOLDERS - 1].1;
        let surely = holders.partition_point(|(_, blocks)| *blocks > least);
        let maybe = holders.partition_point(|(_, blocks)| *blocks >= least);
        holders.truncate(maybe);
        holders[surely..].partial_shuffle(random, HOLDERS - surely);
        // What is drawn stands at the end.
        holders.drain(surely..maybe - (HOLDERS - surely));
    }
    let mut listed = vec![false; workers];
    holders.iter().for_each(|(at, _)| listed[*at] = true);
    let others = index::sample(random, workers, SAMPLE);
    holders.extend(others.into_iter().filter(|at| !listed[*at]).map(|at| (at, held[at])));
    holders
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    proptest! {
        #[test]
        fn the_deepest_holders_and_a_sample(
            workers in 1usize..300, held in proptest::collection::vec(0usize..4, 300), seed in any::<u64>(),
        ) {
            let mut holders: Vec<(usize, usize)> =
                held[..workers].iter().copied().enumerate().filter(|(_, blocks)| *blocks > 0).collect();
            holders.sort_by_key(|(_, blocks)| std::cmp::Reverse(*blocks));
            let of = |seed| shortlist(workers, holders.clone(), &mut StdRng::seed_from_u64(seed));
            let list = of(seed);
            prop_assert_eq!(&list, &of(seed));
            let mut places: Vec<usize> = list.iter().map(|(at, _)| *at).collect();
            places.sort_unstable();
            places.dedup();
            prop_assert_eq!(places.len(), list.len(), "nobody twice");
            prop_assert!(list.iter().all(|(at, blocks)| held[*at] == *blocks));
            if workers <= WHOLE {
                prop_assert_eq!(list.len(), workers);
            } else {
                prop_assert!(list.len() >= SAMPLE && list.len() <= HOLDERS + SAMPLE);
                // As much is held by those listed as by the best that there are.
                let mut most: Vec<usize> = list.iter().map(|(_, blocks)| *blocks).collect();
                most.sort_by_key(|blocks| std::cmp::Reverse(*blocks));
                for (at, holder) in holders.iter().take(HOLDERS).enumerate() {
                    prop_assert!(most[at] >= holder.1);
                }
            }
        }
    }

    /// A thousand hold what everybody holds: none of them is always passed over.
    #[test]
    fn chance_decides_among_equals() {
        let mut random = StdRng::seed_from_u64(1);
        let mut listed = vec![0; 1000];
        for _ in 0..1000 {
            let holders = (0..1000).map(|at| ((at + 7) % 1000, if at == 0 { 9 } else { 1 })).collect();
            shortlist(1000, holders, &mut random).iter().for_each(|(at, _)| listed[*at] += 1);
        }
        assert_eq!(listed[7], 1000);
        assert!(listed.iter().all(|times| *times > 20), "{listed:?}");
    }
}
