//! Routes between shards, against counting heads one by one over every even split.

use super::*;

fn shards(heads: u32, of: u32) -> Option<Vec<Shard>> {
    (0..of).map(|at| Shard::new(heads, of, at)).collect()
}

/// The head that a slot of a block has, and whether it is of V: by counting, from the units' definition.
fn heads_of(shard: Shard, unit: u32, slot: u32) -> (bool, Range<u32>) {
    let units = shard.held().len() as u32 / unit;
    let first = shard.held().start + slot % units * unit;
    (slot / units == 1, first..first + unit)
}

#[test]
fn every_head_of_every_target_comes_once_and_from_where_it_is() {
    let mut splits = 0;
    for heads in 1..=16 {
        for (from, to) in (1..=32).flat_map(|from| (1..=32).map(move |to| (from, to))) {
            let (Some(from), Some(to)) = (shards(heads, from), shards(heads, to)) else { continue };
            splits += 1;
            let mut sent = vec![0; from.len()];
            for target in &to {
                let mut missing: Vec<_> =
                    (0..2).flat_map(|v| target.held().map(move |head| (v == 1, head))).collect();
                for (sends, source) in sent.iter_mut().zip(&from) {
                    let Some(route) = Route::between(*source, *target) else { continue };
                    let [source_row, target_row] = route.units.map(|units| 2 * units);
                    for (out, into) in route.slots(3, 5) {
                        let what = heads_of(*source, route.unit, out - 3 * source_row);
                        assert_eq!(
                            what,
                            heads_of(*target, route.unit, into - 5 * target_row),
                            "{source:?} {target:?}"
                        );
                        for head in what.1 {
                            let at = missing.iter().position(|one| *one == (what.0, head));
                            missing.remove(at.expect("a head that came already, or is not the target's"));
                        }
                        *sends += 1;
                    }
                }
                assert!(missing.is_empty(), "{target:?} of {} lacks {missing:?}", from.len());
            }
            let (least, most) = (sent.iter().min(), sent.iter().max());
            // Several that hold the same take turns; that is even where the targets' number is a multiple.
            assert!(!to.len().is_multiple_of(from.len()) || least == most, "{heads} heads, {sent:?}");
        }
    }
    assert!(splits > 500, "{splits}");
}

#[test]
fn heads_that_cannot_be_shared_evenly_are_no_shards() {
    assert_eq!(Shard::new(8, 3, 0), None);
    assert_eq!(Shard::new(3, 8, 0), None);
    assert_eq!((Shard::new(0, 1, 0), Shard::new(8, 0, 0), Shard::new(8, 2, 2)), (None, None, None));
    let (eight, four) = (Shard::new(8, 2, 0).unwrap(), Shard::new(4, 2, 0).unwrap());
    assert_eq!(Route::between(eight, four), None, "another model");
    assert_eq!(Route::between(eight, Shard::new(8, 2, 1).unwrap()), None, "nothing in common");
}

#[test]
fn cells_that_are_not_whole_units_have_no_grid() {
    let route = Route::between(Shard::new(8, 2, 0).unwrap(), Shard::new(8, 4, 1).unwrap()).unwrap();
    let pool = Grid { planes: 3, plane_stride: 10 * 4096, cell_bytes: 4096 };
    assert_eq!(route.source_grid(&pool), Some(Grid { cell_bytes: 1024, ..pool }));
    assert_eq!(route.target_grid(&pool), Some(Grid { cell_bytes: 2048, ..pool }));
    assert_eq!(route.source_grid(&Grid { cell_bytes: 4095, ..pool }), None);
    assert_eq!(route.source_grid(&Grid { plane_stride: 10 * 4096 + 1, ..pool }), None);
}
