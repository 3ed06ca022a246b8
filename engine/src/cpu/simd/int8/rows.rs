//! Work on rows: activations to INT8, totals to outputs. Plain code, compiled once per instruction set.

use super::Group;
use crate::model::quantise::{int8_row, turn};

/// A row to round.
pub(crate) struct EightRow {
    /// `[n]`
    pub(crate) x: *mut f32,
    pub(crate) n: usize,
    /// For weights that are turned: `x` is turned in place.
    pub(crate) turn: bool,
    /// Numbers that share a scale, a multiple of four; fewer at the end.
    pub(crate) group: usize,
    /// `[n]`, then zeros up to a whole number of quads.
    pub(crate) out: *mut i8,
    /// `[n / group]`
    pub(crate) groups: *mut Group,
}

/// # Safety
/// Pointers valid for the sizes; none of them shared.
#[inline(always)]
pub(super) unsafe fn quantise(row: &EightRow) {
    // SAFETY: the caller's.
    unsafe {
        let x = std::slice::from_raw_parts_mut(row.x, row.n);
        if row.turn {
            turn(x);
        }
        let out = std::slice::from_raw_parts_mut(row.out, row.n.next_multiple_of(4));
        out[row.n..].fill(0);
        for (i, (x, out)) in x.chunks(row.group).zip(out.chunks_mut(row.group)).enumerate() {
            let (scale, sum) = int8_row(x, &mut out[..x.len()]);
            row.groups.add(i).write(Group { scale, sum });
        }
    }
}

/// Totals of a panel become numbers of `out`.
pub(crate) struct Finish<'a> {
    /// `[rows, PANEL]`
    pub(super) totals: &'a [f32],
    pub(super) panel: usize,
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
    for (m, totals) in job.totals.chunks_exact(job.panel).enumerate() {
        // SAFETY: `columns` numbers of a row of `out`, ours alone.
        let out = unsafe { std::slice::from_raw_parts_mut(job.out.add(m * job.ldo), columns) };
        let product = |i: usize| totals[i] * job.column_scales[i];
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
        pub(super) unsafe fn $quantise(row: &EightRow) {
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
