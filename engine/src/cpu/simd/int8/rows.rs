//! Work on rows: activations to INT8, sums to f32. Plain code, compiled once per instruction set.

use crate::model::quantise::int8_row;

/// A row to round.
pub(crate) struct EightRow {
    /// `[n]`
    pub(crate) x: *const f32,
    pub(crate) n: usize,
    /// `[n]`, then zeros up to a whole number of quads.
    pub(crate) out: *mut i8,
}

/// The row's scale and the sum of its numbers.
///
/// # Safety
/// Pointers valid for the sizes; `out` not shared.
#[inline(always)]
pub(super) unsafe fn quantise(row: &EightRow) -> (f32, i32) {
    // SAFETY: the caller's.
    unsafe {
        let x = std::slice::from_raw_parts(row.x, row.n);
        let out = std::slice::from_raw_parts_mut(row.out, row.n.next_multiple_of(4));
        out[row.n..].fill(0);
        int8_row(x, &mut out[..row.n])
    }
}

/// Sums of a panel become numbers of `out`.
pub(crate) struct Finish<'a> {
    /// `[rows, PANEL]`
    pub(super) sums: &'a [i32],
    pub(super) panel: usize,
    /// Of the rows: their scales, and the sums of their numbers.
    pub(super) row_scales: &'a [f32],
    pub(super) row_sums: &'a [i32],
    /// What every weight was too large by.
    pub(super) shift: i32,
    /// Of the panel's columns that exist.
    pub(super) column_scales: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
    /// `[rows, ..]` at the panel's first column, rows `ldo` apart.
    pub(super) out: *mut f32,
    pub(super) ldo: usize,
    pub(super) add: bool,
}

/// # Safety
/// `out` valid for the rows and columns, and not shared.
#[inline(always)]
pub(super) unsafe fn finish(job: &Finish<'_>) {
    let columns = job.column_scales.len();
    for (m, sums) in job.sums.chunks_exact(job.panel).enumerate() {
        let (scale, shift) = (job.row_scales[m], job.row_sums[m].wrapping_mul(job.shift));
        // SAFETY: `columns` numbers of a row of `out`, ours alone.
        let out = unsafe { std::slice::from_raw_parts_mut(job.out.add(m * job.ldo), columns) };
        let product = |i: usize| sums[i].wrapping_sub(shift) as f32 * (scale * job.column_scales[i]);
        match (job.bias, job.add) {
            (None, false) => (0..columns).for_each(|i| out[i] = product(i)),
            (None, true) => (0..columns).for_each(|i| out[i] += product(i)),
            (Some(bias), false) => (0..columns).for_each(|i| out[i] = product(i) + bias[i]),
            (Some(bias), true) => (0..columns).for_each(|i| out[i] += product(i) + bias[i]),
        }
    }
}

macro_rules! compiled {
    ($features:literal, $quantise:ident, $finish:ident) => {
        /// # Safety
        /// As the plain one; the instructions.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $quantise(row: &EightRow) -> (f32, i32) {
            // SAFETY: the caller's.
            unsafe { quantise(row) }
        }
        /// # Safety
        /// As the plain one; the instructions.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $finish(job: &Finish<'_>) {
            // SAFETY: the caller's.
            unsafe { finish(job) }
        }
    };
}
compiled!("avx2,fma", quantise_avx2, finish_avx2);
compiled!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", quantise_avx512, finish_avx512);
