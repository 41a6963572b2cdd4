//! What is asked of the system about memory.
#![allow(unsafe_code)]

use tract_core::internal::Tensor;

/// Bytes of a large page, where there are any.
pub(crate) const LARGE_PAGE: usize = 2 << 20;

/// Moves a tensor that will stay to large pages, where the system has them: a run reads all weights once, and would look up
/// a page for every four kilobytes of them.
#[cfg(target_os = "linux")]
pub(crate) fn on_large_pages(tensor: &Tensor) {
    // SAFETY: advice on whole pages that are the tensor's own, which leaves what is in them as it is.
    unsafe {
        let start = tensor.as_ptr_unchecked::<u8>();
        let bytes = tensor.len() * tensor.datum_type().size_of() / LARGE_PAGE * LARGE_PAGE;
        if bytes > 0 && start.addr().is_multiple_of(LARGE_PAGE) {
            // Older systems know the first alone, which is for pages that are not in use yet: then nothing changes.
            libc::madvise(start.cast_mut().cast(), bytes, libc::MADV_HUGEPAGE);
            libc::madvise(start.cast_mut().cast(), bytes, libc::MADV_COLLAPSE);
        }
    }
}

/// Elsewhere the system decides.
#[cfg(not(target_os = "linux"))]
pub(crate) fn on_large_pages(_: &Tensor) {}

/// While a model is prepared, each of its weights is freed as its packed copy is made. Now and then the pages between are given
/// back: the allocator, or the program, may be told to keep them.
#[derive(Default)]
pub(crate) struct Freed {
    bytes: usize,
}

impl Freed {
    const NOW_AND_THEN: usize = 48 << 20;

    /// Notes that so many bytes were freed.
    pub(crate) fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes >= Self::NOW_AND_THEN {
            self.bytes = 0;
            give_back();
        }
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn give_back() {
    // SAFETY: pages that hold nothing.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back() {}
