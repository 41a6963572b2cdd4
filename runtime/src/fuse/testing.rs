//! What the tests of kernels and panels share.
#![allow(unsafe_code)]

use tract_core::internal::*;
use tract_linalg::mmm::MmmDispatch;

use super::kernel::Kernel;

pub(super) fn random(seed: &mut u32) -> f32 {
    *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*seed >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// Every kernel of this machine that has a square tile, ours among them.
pub(super) fn kernels() -> Vec<Kernel> {
    let all = MmmDispatch::native().runnable().iter().cloned();
    #[cfg(target_arch = "x86_64")]
    let all = all.chain(super::avx512::kernel());
    all.filter_map(Kernel::square).collect()
}

/// Panels of random values, and the values by row and lane.
pub(super) fn panels(kernel: &Kernel, rows: usize, count: usize, seed: &mut u32) -> (Tensor, Vec<Vec<f32>>) {
    let width = kernel.width();
    // SAFETY: every value is written below.
    let mut tensor = unsafe { kernel.room(count, rows) }.unwrap();
    let mut values = vec![vec![0.0; count * width]; rows];
    let mut view = tensor.try_as_plain_ram_mut().unwrap();
    for (panel, into) in view.as_slice_mut::<f32>().unwrap().chunks_exact_mut((rows + 1) * width).enumerate() {
        for (at, into) in into.iter_mut().enumerate() {
            *into = random(seed);
            if let Some(row) = values.get_mut(at / width) {
                row[panel * width + at % width] = *into;
            }
        }
    }
    (tensor, values)
}
