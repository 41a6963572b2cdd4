//! A matrix kernel of 16 x 16 for AVX-512, run by tract-linalg like its own.
//!
//! tract's kernels for AVX-512 store what they computed value by value and gather what they add, whatever the strides:
//! for products with few terms that takes longer than the product. This one stores and adds whole registers, for results
//! whose rows are next to each other, which is all that [`Panels`](super::kernel::Panels) ask for.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m512, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_min_ps,
    _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use tract_core::prelude::DatumType;
use tract_linalg::mmm::{DynKernel, FusedKerSpec, MatMatMul, OutputStoreKer};
use tract_linalg::pack::PackedFormat;

/// Both sides of the tile.
const SIDE: usize = 16;
/// Rows of both operands that are asked for ahead of time: weights come from memory, a page at a time, and the processor's
/// own prefetching stops at the end of each.
const AHEAD: usize = 32;

/// The kernel, if this machine can run it.
pub(super) fn kernel() -> Option<Box<dyn MatMatMul>> {
    let panels = || PackedFormat::new(DatumType::F32, SIDE, 64);
    is_x86_feature_detected!("avx512f")
        .then(|| DynKernel::<SIDE, SIDE, f32>::new("mabert_avx512_f32_16x16", run, panels(), panels()).mmm())
}

/// Returns 1, having stored nothing, where it is asked for what it cannot do.
///
/// # Safety
/// The machine has AVX-512 and the operations' addresses are as tract-linalg gives them.
unsafe fn run(operations: &[FusedKerSpec<f32>]) -> isize {
    // SAFETY: the caller's promise; `kernel` looked for the feature.
    unsafe { tile(operations) }
}

type Tile = [__m512; SIDE];

#[target_feature(enable = "avx512f")]
unsafe fn tile(operations: &[FusedKerSpec<f32>]) -> isize {
    let mut sum: Tile = [_mm512_setzero_ps(); SIDE];
    for operation in operations {
        // SAFETY: addresses are tract-linalg's: whole panels of `k` rows, a value a column, and a tile to store to.
        unsafe {
            match *operation {
                FusedKerSpec::Done => return 0,
                FusedKerSpec::Clear => sum = [_mm512_setzero_ps(); SIDE],
                FusedKerSpec::AddMatMul { k, pa, pb, packing: 0 } => sum = add_product(sum, k, pa.cast(), pb.cast()),
                FusedKerSpec::ScalarMax(least) => {
                    let least = _mm512_set1_ps(least);
                    // The order of the operands makes a NaN stay one, as tract's own kernels do.
                    sum.iter_mut().for_each(|column| *column = _mm512_max_ps(least, *column));
                }
                FusedKerSpec::ScalarMin(most) => {
                    let most = _mm512_set1_ps(most);
                    sum.iter_mut().for_each(|column| *column = _mm512_min_ps(most, *column));
                }
                FusedKerSpec::PerColAdd(values) => {
                    for (j, column) in sum.iter_mut().enumerate() {
                        *column = _mm512_add_ps(*column, _mm512_set1_ps(*values.add(j)));
                    }
                }
                FusedKerSpec::PerColMul(values) => {
                    for (j, column) in sum.iter_mut().enumerate() {
                        *column = _mm512_mul_ps(*column, _mm512_set1_ps(*values.add(j)));
                    }
                }
                FusedKerSpec::AddUnicast(from) if from.row_byte_stride == 4 => {
                    for (j, column) in sum.iter_mut().enumerate() {
                        *column = _mm512_add_ps(*column, _mm512_loadu_ps(column_of(&from, j)));
                    }
                }
                FusedKerSpec::Store(to) if to.row_byte_stride == 4 => {
                    for (j, column) in sum.iter().enumerate() {
                        _mm512_storeu_ps(column_of(&to, j), *column);
                    }
                }
                _ => return 1,
            }
        }
    }
    1
}

#[target_feature(enable = "avx512f")]
unsafe fn add_product(mut sum: Tile, k: usize, mut a: *const f32, mut b: *const f32) -> Tile {
    for _ in 0..k {
        // SAFETY: both panels have `k` rows of `SIDE` values.
        unsafe {
            // Beyond a panel lies the next one, or nothing: prefetching never faults.
            _mm_prefetch::<_MM_HINT_T0>(a.wrapping_add(AHEAD * SIDE).cast());
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD * SIDE).cast());
            let lanes = _mm512_loadu_ps(a);
            for (j, column) in sum.iter_mut().enumerate() {
                *column = _mm512_fmadd_ps(lanes, _mm512_set1_ps(*b.add(j)), *column);
            }
            a = a.add(SIDE);
            b = b.add(SIDE);
        }
    }
    sum
}

/// # Safety
/// The tile has a column `j`.
unsafe fn column_of(tile: &OutputStoreKer, j: usize) -> *mut f32 {
    // SAFETY: the caller's promise.
    unsafe { tile.ptr.offset(tile.col_byte_stride * j as isize).cast() }
}
