//! The device that gradients are computed on.

use std::sync::LazyLock;

use candle_core::Device;

/// Where gradients are computed: in builds with the feature `cuda` on the first GPU, if there is one; else on the CPU.
pub(crate) fn device() -> &'static Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        Device::cuda_if_available(0).unwrap_or_else(|error| {
            tracing::warn!("the GPU cannot be used: {error}");
            Device::Cpu
        })
    });
    &DEVICE
}

/// Its name, for reports.
pub(crate) fn device_name() -> &'static str {
    if device().is_cuda() { "GPU" } else { "CPU" }
}
