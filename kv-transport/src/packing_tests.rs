//! Packed rows: the error's bound, what comes back unchanged, numbers that are none.

use proptest::prelude::*;

use super::*;

fn cell(numbers: &[u16]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn numbers(cell: &[u8]) -> Vec<u16> {
    cell.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect()
}

fn packed(packing: Packing, numbers: &[u16]) -> Vec<u8> {
    let cell = cell(numbers);
    let mut packed = vec![0xAA; packing.packed_bytes(cell.len()).unwrap()];
    packing.pack(&cell, &mut packed);
    // Peers need not have the same instructions.
    let mut narrow = vec![0xAA; packed.len()];
    packing.pack_rows(&cell, &mut narrow);
    assert_eq!(packed, narrow);
    packed
}

fn unpacked(packing: Packing, packed: &[u8], numbers_wanted: usize) -> Vec<u16> {
    let mut cell = vec![0xAA; numbers_wanted * NUMBER];
    packing.unpack(packed, &mut cell);
    let mut narrow = vec![0xAA; cell.len()];
    packing.unpack_rows(packed, &mut narrow);
    assert_eq!(cell, narrow);
    numbers(&cell)
}

const KINDS: [&str; 2] = [Packing::INT8, Packing::FP8];

fn journey(kind: &str, row: u16, from: &[u16]) -> Vec<u16> {
    let packing = Packing::named(kind, row).unwrap();
    unpacked(packing, &packed(packing, from), from.len())
}

fn bf16(number: f32) -> u16 {
    (number.to_bits() >> 16) as u16
}

/// Half a step, and half of what lies between two bf16 of that size: 2⁻⁸ of it, or of the smallest ones there are.
fn bound(kind: &str, number: f32, largest: u16) -> f64 {
    let (number, largest) = (f64::from(number.abs()), f64::from(wide(largest)));
    let step =
        if kind == Packing::INT8 { largest / 254.0 } else { (number / 16.0).max(largest / 448.0 / 1024.0) };
    step * 1.000_01 + (number + step) * 2_f64.powi(-8) + 2_f64.powi(-134)
}

/// Numbers of like size as KV has them, or any bits at all: zeros, denormals, infinities, NaN.
fn row_numbers(row: u16) -> impl Strategy<Value = Vec<u16>> {
    let alike =
        (0..255_u16).prop_flat_map(|exponent| (exponent.saturating_sub(6)..=exponent).prop_map(|e| e << 7));
    let alike = prop::collection::vec((alike, 0..128_u16, any::<bool>()), usize::from(row) * 3)
        .prop_map(|all| all.into_iter().map(|(e, m, sign)| e | m | u16::from(sign) << 15).collect());
    prop_oneof![alike, prop::collection::vec(any::<u16>(), usize::from(row) * 3)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn numbers_come_back_within_the_bound_and_never_lose_more(
        kind in prop::sample::select(&KINDS[..]),
        (row, from) in (MIN_ROW..=130).prop_flat_map(|row| (Just(row), row_numbers(row)))
    ) {
        let once = journey(kind, row, &from);
        for (from, once) in from.chunks(row.into()).zip(once.chunks(row.into())) {
            let magnitudes = from.iter().map(|n| n & MAGNITUDE).filter(|m| *m < INFINITE);
            let largest = magnitudes.max().unwrap_or(0);
            for (was, is) in from.iter().zip(once) {
                let (was, is) = (wide(*was), wide(*is));
                if was.is_finite() {
                    let off = (f64::from(was) - f64::from(is)).abs();
                    prop_assert!(off <= bound(kind, was, largest), "{was} became {is}, beside at most {}", wide(largest));
                    prop_assert!(was != 0.0 || is == 0.0);
                    prop_assert!(bf16(was.abs()) != largest || was == is, "the largest, {was}, became {is}");
                } else {
                    prop_assert!(is.is_nan(), "{was} became {is}");
                }
            }
        }
        let again = journey(kind, row, &once);
        prop_assert!(again == once, "a second journey changed {once:?} to {again:?}");
    }

    #[test]
    fn any_bytes_unpack_to_some_numbers(
        kind in prop::sample::select(&KINDS[..]),
        row in MIN_ROW..=130,
        seed in prop::collection::vec(any::<u8>(), 132 * 2),
    ) {
        let packing = Packing::named(kind, row).unwrap();
        let bytes = &seed[..2 * (usize::from(row) + NUMBER)];
        prop_assert_eq!(unpacked(packing, bytes, 2 * usize::from(row)).len(), 2 * usize::from(row));
    }
}

#[test]
fn a_row_by_hand() {
    let from = [0.0, -0.0, 127.0, -127.0, 1.0, -2.0, 0.4, 100.6].map(bf16);
    let packing = Packing::named(Packing::INT8, 8).unwrap();
    let bytes = packed(packing, &from);
    assert_eq!(bytes[..2], bf16(127.0).to_le_bytes());
    assert_eq!(
        bytes[2..].iter().map(|b| b.cast_signed()).collect::<Vec<_>>(),
        [0, 0, 127, -127, 1, -2, 0, 100]
    );
    let back = unpacked(packing, &bytes, 8).into_iter().map(wide).collect::<Vec<_>>();
    assert_eq!(back, [0.0, 0.0, 127.0, -127.0, 1.0, -2.0, 0.0, 100.0]);
}

#[test]
fn what_is_not_finite_stays_so_and_its_neighbours_stay_fine() {
    let from = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0, -0.5, 0.25, 0.0, 0.125].map(bf16);
    for kind in KINDS {
        let back: Vec<f32> = journey(kind, 8, &from).into_iter().map(wide).collect();
        assert!(back[..3].iter().all(|n| n.is_nan()), "{back:?}");
        for (was, is) in [1.0_f32, -0.5, 0.25, 0.0, 0.125].iter().zip(&back[3..]) {
            assert!((was - is).abs() <= 1.0 / 254.0 + 0.004, "{was} became {is}");
        }
        assert!(journey(kind, 8, &[INFINITE; 8]).iter().all(|n| wide(*n).is_nan()));
    }
}

#[test]
fn the_largest_and_the_smallest_numbers_there_are() {
    for number in [0x7f7f, 0xff7f, 0x0001, 0x8001, 0x007f, 0x0080, TINY - 1, TINY] {
        let mut from = [0; 8];
        from[3] = number;
        for kind in KINDS {
            assert_eq!(journey(kind, 8, &from), from, "{kind}: {}", wide(number));
        }
    }
}

#[test]
fn cells_must_be_whole_rows() {
    assert_eq!(Packing::named(Packing::INT8, MIN_ROW - 1), None);
    let packing = Packing::named(Packing::INT8, 64).unwrap();
    assert_eq!(packing.packed_bytes(12 << 10), Some(96 * 66));
    assert_eq!((packing.packed_bytes(0), packing.packed_bytes(129)), (None, None));
    assert_eq!(Packing::named("int4", 64), None);
    for (kind, row) in [(Packing::INT8, 128), (Packing::FP8, 64)] {
        assert_ne!(packing.code(), Packing::named(kind, row).unwrap().code());
    }
}
