//! What attention of any kind shares: heads of sequences as tasks, and where a sequence's queries lie in panels.
#![allow(unsafe_code)]

use std::ops::Range;

use rayon::prelude::*;
use tract_core::internal::*;
use tract_linalg::multithread::{Executor, current_tract_executor, multithread_tract_scope};

use super::kernel::Kernel;

/// The sizes of one evaluation.
#[derive(Clone, Copy)]
pub(super) struct Heads<'k> {
    pub(super) kernel: &'k Kernel,
    pub(super) batch: usize,
    /// Keys and values of each sequence.
    pub(super) length: usize,
    /// Queries of each sequence.
    pub(super) queries: usize,
    pub(super) heads: usize,
    /// Channels of a head.
    pub(super) channels: usize,
}

/// Where the queries of one sequence lie.
pub(super) struct Asking {
    /// The panels that hold one of them.
    pub(super) panels: Range<usize>,
    /// The first one's lane in these.
    pub(super) lane: usize,
    /// Whether no other sequence has queries in these panels.
    pub(super) is_alone: bool,
}

impl Heads<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.batch * self.length * self.queries == 0
    }

    /// Room for the contexts in so many panels, with what no head writes cleared.
    pub(super) fn output(&self, panels: usize) -> TractResult<Tensor> {
        let rows = self.heads * self.channels;
        // SAFETY: the heads write all rows of every panel that holds a query, and spare lanes are cleared here.
        let mut output = unsafe { self.kernel.room(panels, rows) }?;
        let width = self.kernel.width();
        if self.is_empty() || !(self.batch * self.queries).is_multiple_of(width) {
            // Lanes of the last panel that are no token's.
            let panel = (rows + 1) * width;
            let mut view = output.try_as_plain_ram_mut()?;
            let all = view.as_slice_mut::<f32>()?;
            let spare = if self.is_empty() { 0 } else { all.len() - panel };
            all[spare..].fill(0.0);
        }
        Ok(output)
    }

    pub(super) fn asking(&self, sequence: usize) -> Asking {
        let width = self.kernel.width();
        let lanes = sequence * self.queries..(sequence + 1) * self.queries;
        let panels = lanes.start / width..lanes.end.div_ceil(width);
        let ends = lanes.end.is_multiple_of(width) || lanes.end == self.batch * self.queries;
        let lane = lanes.start - panels.start * width;
        Asking { panels, lane, is_alone: lane == 0 && ends }
    }

    /// Panels that lanes of sequences of so many tokens may lie in.
    pub(super) fn most_panels(&self, tokens: usize) -> usize {
        (tokens + self.kernel.width() - 1).div_ceil(self.kernel.width()) + 1
    }
}

/// Runs `one` for each of so many tasks, spread over the threads of tract's executor, each with a room of its own; products
/// inside a task are too small to be spread.
pub(super) fn each_head<R: Send>(
    tasks: usize,
    room: &(dyn Fn() -> TractResult<R> + Sync),
    one: &(dyn Fn(&mut R, usize) -> TractResult<()> + Sync),
) -> TractResult<()> {
    let run = |room: &mut TractResult<R>, task: usize| match room {
        Ok(room) => one(room, task),
        Err(e) => bail!("{e}"),
    };
    let alone =
        |room: &mut TractResult<R>, task: usize| multithread_tract_scope(Executor::SingleThread, || run(room, task));
    let all = || (0..tasks).into_par_iter().try_for_each_init(room, alone);
    match current_tract_executor() {
        Executor::SingleThread => {
            let mut room = room();
            (0..tasks).try_for_each(|task| run(&mut room, task))
        }
        Executor::MultiThread(pool) => pool.install(all),
        Executor::RayonGlobal => all(),
    }
}
