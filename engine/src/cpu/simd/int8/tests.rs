//! INT8 kernels against sums of whole numbers, and against each other bit by bit.

use proptest::prelude::*;

use super::super::gemm::PANEL;
use super::*;

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
    scales: Vec<f32>,
    sums: Vec<i32>,
    weights: Packed8,
    bias: Option<Vec<f32>>,
    add: bool,
}

impl Case {
    fn product(&self, kernels: &Kernels8, rows: std::ops::Range<usize>) -> Vec<f32> {
        let n = self.weights.n;
        let mut out = vec![0.5f32; self.scales.len() * n];
        let job = Gemm8 {
            a: self.a.as_ptr(),
            lda: self.lda,
            row_scales: &self.scales,
            row_sums: &self.sums,
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
    fn products(rows in 1usize..60, n in 1usize..100, k in 1usize..700, seed in any::<u64>(), add in any::<bool>(), biased in any::<bool>()) {
        let lda = k.next_multiple_of(4) + 4;
        // Activations are never -128.
        let mut a = vec![0i8; rows * lda];
        for (row, from) in a.chunks_exact_mut(lda).zip(numbers(seed, rows * k).chunks_exact(k)) {
            row[..k].copy_from_slice(&from.iter().map(|x| (*x).max(-127)).collect::<Vec<_>>());
        }
        let w = numbers(seed + 1, n * k);
        let scale = |i: usize| 0.001 * (1 + i % 7) as f32;
        let column_scales: Vec<f32> = (0..n).map(|i| scale(i + 3)).collect();
        let mut weights = Packed8::zeroed(n, k).unwrap();
        // In two parts, as q, k and v are.
        let cut = n / 3;
        weights.fill(0, &w[..cut * k], &column_scales[..cut]);
        weights.fill(cut, &w[cut * k..], &column_scales[cut..]);
        let whole = |row: usize, column: usize| -> i32 {
            (0..k).map(|i| i32::from(a[row * lda + i]) * i32::from(w[column * k + i])).sum()
        };
        let bias: Option<Vec<f32>> = biased.then(|| (0..n.next_multiple_of(PANEL)).map(|i| i as f32 * 0.37).collect());
        let mut expected = Vec::new();
        for row in 0..rows {
            for column in 0..n {
                let mut sum = whole(row, column) as f32 * (scale(row) * column_scales[column]);
                if let Some(bias) = &bias { sum += bias[column]; }
                expected.push(if add { 0.5 + sum } else { sum });
            }
        }
        let sums = a.chunks_exact(lda).map(|row| row.iter().map(|&x| i32::from(x)).sum()).collect();
        let case = Case { lda, scales: (0..rows).map(scale).collect(), sums, weights, bias, add, a: a.clone() };
        for kernels in Kernels8::supported() {
            prop_assert_eq!(&case.product(kernels, 0..rows), &expected, "{}", kernels.name);
            // Rows alone give the same bits as rows together.
            for row in [0, rows / 2, rows - 1] {
                prop_assert_eq!(&case.product(kernels, row..row + 1)[..], &expected[row * n..][..n], "{}", kernels.name);
            }
        }
    }

    #[test]
    fn rows_are_rounded_alike(x in proptest::collection::vec(-1e3f32..1e3, 1..200), bad in proptest::option::of(0usize..200)) {
        let mut x = x;
        if let Some(at) = bad { let at = at % x.len(); x[at] = f32::INFINITY; }
        let mut all = Kernels8::supported().into_iter().map(|kernels| {
            let mut out = vec![9i8; x.len().next_multiple_of(4)];
            // SAFETY: supported kernels; buffers of the sizes.
            let (scale, sum) = unsafe { (kernels.quantise)(&EightRow { x: x.as_ptr(), n: x.len(), out: out.as_mut_ptr() }) };
            (scale.to_bits(), sum, out)
        });
        let first = all.next().unwrap();
        prop_assert!(first.2[x.len()..].iter().all(|&q| q == 0));
        prop_assert!(all.all(|other| other == first));
    }
}
