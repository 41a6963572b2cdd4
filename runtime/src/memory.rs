//! What is asked of the system about memory.
#![allow(unsafe_code)]

use tract_core::internal::{Tensor, TractResult, bail, ensure};

/// Bytes of a large page, where there are any.
const LARGE_PAGE: usize = 2 << 20;

/// Bytes at which tensors begin: the widest vector registers, and what Apple's matrix unit loads at once.
pub(crate) const ALIGNMENT: usize = 128;

/// Room for a tensor of `f32` that is read often or written once and for all: on large pages, if it fills any.
///
/// # Safety
/// Every value is written before it is read.
pub(crate) unsafe fn room(shape: &[usize]) -> TractResult<Tensor> {
    let large = shape.iter().product::<usize>() * size_of::<f32>() >= LARGE_PAGE;
    // SAFETY: the caller's.
    let mut room = unsafe { Tensor::uninitialized_aligned::<f32>(shape, if large { LARGE_PAGE } else { ALIGNMENT }) }?;
    on_large_pages(&mut room);
    Ok(room)
}

/// A tensor of `f32` as a model's file holds it.
pub(crate) fn from_le_bytes(shape: &[usize], bytes: &[u8]) -> TractResult<Tensor> {
    let (given, []) = bytes.as_chunks::<4>() else { bail!("{} bytes are no whole values", bytes.len()) };
    ensure!(shape.iter().product::<usize>() == given.len(), "{} values do not fill {shape:?}", given.len());
    // SAFETY: as many values as there is room for are written.
    let mut tensor = unsafe { room(shape) }?;
    let mut view = tensor.try_as_plain_ram_mut()?;
    for (value, bytes) in view.as_slice_mut::<f32>()?.iter_mut().zip(given) {
        *value = f32::from_le_bytes(*bytes);
    }
    Ok(tensor)
}

/// Puts a tensor that is yet to be filled, and will stay, on large pages, where the system has them: a run reads all weights
/// once, and would look up a page for every four kilobytes of them. What was in the tensor is lost.
#[cfg(target_os = "linux")]
fn on_large_pages(tensor: &mut Tensor) {
    // SAFETY: whole pages that are the tensor's own, which nobody else reads or writes meanwhile; any values may be in them
    // afterwards, as any may be in them now.
    unsafe {
        let start = tensor.as_ptr_mut_unchecked::<u8>();
        let bytes = tensor.len() * tensor.datum_type().size_of() / LARGE_PAGE * LARGE_PAGE;
        if bytes > 0 && start.addr().is_multiple_of(LARGE_PAGE) {
            // Small pages that were in use before would stay: they go first. Either may fail, and then nothing changes.
            libc::madvise(start.cast(), bytes, libc::MADV_DONTNEED);
            libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
        }
    }
}

/// Elsewhere the system decides.
#[cfg(not(target_os = "linux"))]
fn on_large_pages(_: &mut Tensor) {}

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
