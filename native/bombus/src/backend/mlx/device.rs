//! Devices, memory, and MLX's error handler.

use crate::error::{Error, INSTALL_CUDA_BUILD, Result};
use mlx_rs::{Device as MlxDevice, Stream};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Once;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    Cpu,
    Gpu,
}

thread_local! {
    /// This thread's streams: MLX never gives one back.
    static STREAMS: RefCell<HashMap<Device, Stream>> = RefCell::default();
}

impl Device {
    pub fn stream(self) -> Result<Stream> {
        if self == Device::Gpu && !gpu_available() {
            return Err(Error::NoGpu(no_gpu()));
        }
        STREAMS.with_borrow_mut(|streams| {
            Ok(streams.entry(self).or_insert_with(|| self.make()).clone())
        })
    }

    /// MLX's GPU is a Mac's or NVIDIA's.
    pub fn is_cuda(self) -> bool {
        self == Device::Gpu && !cfg!(target_os = "macos")
    }

    fn make(self) -> Stream {
        Stream::new_with_device(&match self {
            Device::Cpu => MlxDevice::cpu(),
            Device::Gpu => MlxDevice::gpu(),
        })
    }
}

fn no_gpu() -> String {
    format!(
        "MLX finds no GPU: it needs an Apple Silicon Mac, or an NVIDIA card on Linux and MLX's CUDA \
         build in a folder that BOMBUS_MLX_DIR names ({INSTALL_CUDA_BUILD}); `device: :cpu` works \
         everywhere"
    )
}

/// mlx-c's own error handler ends the process. mlx-rs replaces it on the first operation that
/// can fail, so one is made before anything else.
pub fn init() -> Result<()> {
    static FLOAT32: Once = Once::new();
    FLOAT32.call_once(keep_float32);
    mlx_rs::memory::active_memory()?;
    Ok(())
}

/// On CUDA MLX rounds what it multiplies in float32 to 10 bits, unless this variable, which it reads with its
/// first such product, says no.
#[allow(unsafe_code)]
fn keep_float32() {
    const TF32: &str = "MLX_ENABLE_TF32";
    if cfg!(target_os = "linux") && std::env::var_os(TF32).is_none() {
        // SAFETY: once, before MLX's first work; Rust's own readers share a lock with this, and the BEAM
        // reads a copy that it has made at its start. Others who read the environment in this moment (a C
        // library that looks for the time zone) would be at risk, as with any call of setenv.
        unsafe { std::env::set_var(TF32, "0") };
    }
}

#[allow(unsafe_code)]
pub fn gpu_available() -> bool {
    if init().is_err() {
        return false;
    }
    let mut available = false;
    // SAFETY: the device is made and freed here, and the answer goes to a local.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        mlx_sys::mlx_device_is_available(&mut available, device);
        mlx_sys::mlx_device_free(device);
    }
    available
}

/// Waits until all that was submitted on a stream is done, and MLX's thread has let go of it.
#[allow(unsafe_code)]
pub fn synchronize(stream: &Stream) -> Result<()> {
    // SAFETY: the stream is this thread's.
    match unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::Backend("MLX did not wait for its stream".into())),
    }
}

/// Bytes that MLX holds in the whole process: active, cached, peak.
pub fn memory() -> Result<[usize; 3]> {
    use mlx_rs::memory::{active_memory, cache_memory, peak_memory};
    Ok([active_memory()?, cache_memory()?, peak_memory()?])
}

/// mlx-rs seeds its random numbers with this clock of macOS; Bombus draws its own.
#[cfg(not(target_os = "macos"))]
#[allow(unsafe_code)]
// SAFETY: no other library on Linux defines this name.
#[unsafe(no_mangle)]
extern "C" fn mach_approximate_time() -> u64 {
    0
}
