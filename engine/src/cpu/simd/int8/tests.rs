//! INT8 kernels against sums of whole numbers, and against each other bit by bit.

use proptest::prelude::*;

use super::super::gemm::PANEL;
use super::*;
use crate::cpu::arena::Arena;
use crate::model::quantise::{int8_row, turn};

fn numbers(seed: u64, count: usize) -> Vec<i8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Every eighth number is at an end of the range, where 16-bit sums would saturate.
        match state >> 61 {
            0 if state & 1 == 0 => -128,
            0 => 127,
            _ => (state >> 40) as i8,
        }
    };
    (0..count).map(|_| next()).collect()
}

struct Case {
    a: Vec<i8>,
    lda: usize,
    rows: usize,
    group: usize,
    groups: Vec<Group>,
    weights: Packed8,
    bias: Option<Vec<f32>>,
    add: bool,
}

impl Case {
    fn product(&self, kernels: &Kernels8, rows: std::ops::Range<usize>) -> Vec<f32> {
        let n = self.weights.n;
        let mut out = vec![0.5f32; self.rows * n];
        let job = Gemm8 {
            a: self.a.as_ptr(),
            lda: self.lda,
            group: self.group,
            groups: self.groups.as_ptr(),
            ldg: self.groups.len() / self.rows,
            weights: &self.weights,
            bias: self.bias.as_deref(),
            out: out.as_mut_ptr(),
            ldo: n,
            add: self.add,
        };
        // SAFETY: supported kernels; all buffers have the sizes.
        unsafe { job.run(kernels, rows.clone(), 0..self.weights.panels()) };
        out[rows.start * n..rows.end * n].to_vec()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, ..ProptestConfig::default() })]

    #[test]
    fn products(rows in 1usize..60, n in 1usize..100, k in 1usize..700, quads in 1usize..200, seed in any::<u64>(), add in any::<bool>(), biased in any::<bool>()) {
        let group = 4 * quads;
        let lda = k.next_multiple_of(4) + 4;
        // Activations are never -128.
        let mut a = vec![0i8; rows * lda];
        for (row, from) in a.chunks_exact_mut(lda).zip(numbers(seed, rows * k).chunks_exact(k)) {
            row[..k].copy_from_slice(&from.iter().map(|x| (*x).max(-127)).collect::<Vec<_>>());
        }
        let w = numbers(seed + 1, n * k);
        let scale = |i: usize| 0.001 * (1 + i % 7) as f32;
        let column_scales: Vec<f32> = (0..n).map(|i| scale(i + 3)).collect();
        let mut weights = Packed8::zeroed(&mut Arena::default(), n, k, false).unwrap();
        // In two parts, as q, k and v are.
        let cut = n / 3;
        weights.fill(0, &w[..cut * k], &column_scales[..cut]);
        weights.fill(cut, &w[cut * k..], &column_scales[cut..]);
        let group_scale = |row: usize, index: usize| scale(row + 2 * index);
        let product = |row: usize, column: usize| -> f32 {
            let pairs: Vec<i32> = (0..k).map(|i| i32::from(a[row * lda + i]) * i32::from(w[column * k + i])).collect();
            pairs.chunks(group).enumerate().fold(0.0, |total, (i, pairs)| {
                (pairs.iter().sum::<i32>() as f32).mul_add(group_scale(row, i), total)
            })
        };
        let bias: Option<Vec<f32>> = biased.then(|| (0..n.next_multiple_of(PANEL)).map(|i| i as f32 * 0.37).collect());
        let mut expected = Vec::new();
        for row in 0..rows {
            for column in 0..n {
                let mut sum = product(row, column) * column_scales[column];
                if let Some(bias) = &bias { sum += bias[column]; }
                expected.push(if add { 0.5 + sum } else { sum });
            }
        }
        let groups = (0..rows).flat_map(|row| a[row * lda..][..k].chunks(group).enumerate().map(move |(i, numbers)| Group {
            scale: group_scale(row, i), sum: numbers.iter().map(|&x| i32::from(x)).sum(),
        })).collect();
        let case = Case { lda, rows, group, groups, weights, bias, add, a: a.clone() };
        for kernels in Kernels8::up_to(Level::of_cpu()) {
            prop_assert_eq!(&case.product(kernels, 0..rows), &expected, "{}", kernels.name);
            // Rows alone give the same bits as rows together.
            for row in [0, rows / 2, rows - 1] {
                prop_assert_eq!(&case.product(kernels, row..row + 1)[..], &expected[row * n..][..n], "{}", kernels.name);
            }
        }
    }

    #[test]
    fn rows_are_rounded_alike(x in proptest::collection::vec(-1e3f32..1e3, 1..200), quads in 1usize..60, turned in any::<bool>(), bad in proptest::option::of(0usize..200)) {
        let mut x = x;
        if let Some(at) = bad { let at = at % x.len(); x[at] = f32::INFINITY; }
        let group = 4 * quads;
        let mut all = Kernels8::up_to(Level::of_cpu()).into_iter().map(|kernels| {
            let mut out = vec![9i8; x.len().next_multiple_of(4)];
            let mut groups = vec![Group { scale: 0.0, sum: 0 }; x.len().div_ceil(group)];
            let mut x = x.clone();
            let row = EightRow { x: x.as_mut_ptr(), n: x.len(), turn: turned, group, out: out.as_mut_ptr(), groups: groups.as_mut_ptr() };
            // SAFETY: supported kernels; buffers of the sizes.
            unsafe { (kernels.quantise)(&row) };
            (groups.into_iter().map(|group| (group.scale.to_bits(), group.sum)).collect::<Vec<_>>(), out)
        });
        let first = all.next().unwrap();
        let mut x = x.clone();
        if turned { turn(&mut x); }
        prop_assert!(first.1[x.len()..].iter().all(|&q| q == 0));
        // Each group as if it were a row; what is not finite shows in its own group.
        for (i, (x, &(scale, sum))) in x.chunks(group).zip(&first.0).enumerate() {
            let mut alone = vec![0; x.len()];
            let found = int8_row(x, &mut alone);
            prop_assert_eq!((found.0.to_bits(), found.1), (scale, sum));
            prop_assert_eq!(&alone[..], &first.1[i * group..][..x.len()]);
        }
        prop_assert!(all.all(|other| other == first));
    }
}
