//! The driver's objects with their lifetimes: device, stream, event, kernel; memory is in `memory.rs`.
//!
//! Everything here is made and used by the thread that owns the engine, with the device's context current
//! (`Device::enter`); memory may be dropped by any thread.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::gpudirect::GpuDirect;
pub(super) use super::memory::{Memory, Pinned, clear};
use crate::EngineError;

/// A failed call, in words.
pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> EngineError {
    move |error| EngineError::Device(format!("{what}: {error:?}"))
}

/// One GPU, with its primary context.
pub(super) struct Device {
    handle: sys::CUdevice,
    pub(super) ordinal: i32,
    context: sys::CUcontext,
    pub(super) name: String,
    /// Compute capability, e.g. (9, 0).
    pub(super) capability: (i32, i32),
    pub(super) multiprocessors: u32,
    pub(super) total_bytes: usize,
    pub(super) gpudirect: GpuDirect,
}

impl Device {
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>, EngineError> {
        super::libraries::find()?;
        result::init().map_err(|e| EngineError::Unsupported(format!("no usable CUDA device: {e:?}")))?;
        check_driver()?;
        let count = result::device::get_count().map_err(failed("counting devices"))?;
        let index = i32::try_from(ordinal).ok().filter(|&index| index < count).ok_or_else(|| {
            EngineError::Unsupported(format!("there is no CUDA device {ordinal}; {count} are visible"))
        })?;
        let handle = result::device::get(index).map_err(failed("opening the device"))?;
        let name = result::device::get_name(handle).map_err(failed("the device's name"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        // SAFETY: `handle` is a device.
        let attribute = |which| unsafe {
            result::device::get_attribute(handle, which).map_err(failed("a device attribute"))
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability.0 < 8 {
            let (major, minor) = capability;
            return Err(EngineError::Unsupported(format!(
                "{name} has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or later"
            )));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.unsigned_abs();
        // SAFETY: `handle` is a device; the context is released on drop.
        let (context, total_bytes) = unsafe {
            let total = result::device::total_mem(handle).map_err(failed("the device's memory"))?;
            (result::primary_ctx::retain(handle).map_err(failed("the device's context"))?, total)
        };
        let device = Arc::new(Self {
            handle,
            ordinal: index,
            context,
            name,
            capability,
            multiprocessors,
            total_bytes,
            gpudirect: GpuDirect::of(|which| attribute(which).ok()),
        });
        device.enter()?;
        Ok(device)
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<(), EngineError> {
        // SAFETY: retained until drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("entering the device"))
    }

    /// There is no room for `what`, in words.
    pub(super) fn out_of_memory(&self, what: &str, bytes: usize, error: DriverError) -> EngineError {
        let (free, total, name) = (self.free_bytes(), self.total_bytes, &self.name);
        EngineError::OutOfMemory(format!(
            "{what} needs {bytes} bytes of {name}; {free} of {total} are free ({error:?})"
        ))
    }

    pub(super) fn free_bytes(&self) -> usize {
        result::mem_get_info().map_or(0, |(free, _)| free)
    }
}

/// The bindings are CUDA 13's: a function that the driver lacks would be found out only when it is called.
fn check_driver() -> Result<(), EngineError> {
    const NEEDED: i32 = 13_000;
    let mut version = 0;
    // SAFETY: an integer to write to.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("the driver's version"))?;
    if version >= NEEDED {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    Err(EngineError::Unsupported(format!(
        "the NVIDIA driver is for CUDA {major}.{minor}; 13.0 is needed: install driver 580 or later, or use --device cpu"
    )))
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`; every object of the context holds this device and is gone.
        let _ = unsafe { result::primary_ctx::release(self.handle) };
    }
}

// SAFETY: a context handle may be made current on any thread.
unsafe impl Send for Device {}
// SAFETY: as above; all methods only read.
unsafe impl Sync for Device {}

/// A queue of work.
pub(super) struct Stream {
    pub(super) raw: sys::CUstream,
    _device: Arc<Device>,
}

impl Stream {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, EngineError> {
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Self { raw: raw.map_err(failed("a stream"))?, _device: Arc::clone(device) })
    }

    /// Waits until all that was queued is done; reports what failed since the last call.
    pub(super) fn synchronize(&self) -> Result<(), EngineError> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("a step on the device"))
    }

    /// Later work waits for what the event marks.
    pub(super) fn wait(&self, event: &Event) -> Result<(), EngineError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(self.raw, event.raw, flags) }
            .map_err(failed("waiting for an event"))
    }

    /// Host memory → device, asynchronous for pinned memory.
    pub(super) fn upload<T>(&self, to: u64, from: &[T]) -> Result<(), EngineError> {
        // SAFETY: callers size the target by the same numbers; pinned sources stay until the step is synchronised.
        unsafe { result::memcpy_htod_async(to, from, self.raw) }.map_err(failed("a copy to the device"))
    }

    /// Device → host memory, asynchronous for pinned memory.
    pub(super) fn download<T>(&self, to: &mut [T], from: u64) -> Result<(), EngineError> {
        // SAFETY: as for `upload`.
        unsafe { result::memcpy_dtoh_async(to, from, self.raw) }.map_err(failed("a copy from the device"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

// SAFETY: stream handles have no thread affinity.
unsafe impl Send for Stream {}

/// A mark in a stream.
pub(super) struct Event {
    raw: sys::CUevent,
}

impl Event {
    /// With a time stamp if `timed`; waiting sleeps instead of spinning where it is not.
    pub(super) fn new(timed: bool) -> Result<Self, EngineError> {
        let flags = if timed {
            sys::CUevent_flags::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
        };
        Ok(Self { raw: result::event::create(flags).map_err(failed("an event"))? })
    }

    pub(super) fn record(&self, stream: &Stream) -> Result<(), EngineError> {
        // SAFETY: both live.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(failed("recording an event"))
    }

    pub(super) fn synchronize(&self) -> Result<(), EngineError> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("work on the device"))
    }

    /// Whether the stream has passed it. Never waits.
    pub(super) fn has_passed(&self) -> Result<bool, EngineError> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.raw) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            other => other.result().map(|()| true).map_err(failed("work on the device")),
        }
    }

    /// Milliseconds from `earlier` to this; both recorded and passed.
    pub(super) fn since(&self, earlier: &Event) -> Result<f32, EngineError> {
        // SAFETY: both live.
        unsafe { result::event::elapsed(earlier.raw, self.raw) }.map_err(failed("timing"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

// SAFETY: event handles have no thread affinity.
unsafe impl Send for Event {}

/// Compiled kernels, loaded.
pub(super) struct Module {
    raw: sys::CUmodule,
    _device: Arc<Device>,
}

impl Module {
    pub(super) fn load(device: &Arc<Device>, image: &[u8]) -> Result<Arc<Self>, EngineError> {
        // SAFETY: a whole cubin, made by the compiler for this device.
        let raw =
            unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("loading kernels"))?;
        Ok(Arc::new(Self { raw, _device: Arc::clone(device) }))
    }

    pub(super) fn kernel(self: &Arc<Self>, name: &str) -> Result<Kernel, EngineError> {
        let symbol = CString::new(name).map_err(|_| EngineError::Device("a kernel's name".into()))?;
        // SAFETY: the module is loaded, and lives as long as the kernel.
        let raw = unsafe { result::module::get_function(self.raw, symbol) }
            .map_err(|e| EngineError::Device(format!("kernel {name}: {e:?}")))?;
        Ok(Kernel { raw, name: name.to_owned(), _module: Arc::clone(self) })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`; its kernels hold it.
        let _ = unsafe { result::module::unload(self.raw) };
    }
}

// SAFETY: module handles have no thread affinity.
unsafe impl Send for Module {}
// SAFETY: as above; only read.
unsafe impl Sync for Module {}

/// One kernel.
pub(super) struct Kernel {
    raw: sys::CUfunction,
    name: String,
    _module: Arc<Module>,
}

/// How a kernel is spread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (usize, usize, usize),
    pub(super) threads: u32,
    /// Dynamic shared memory in bytes.
    pub(super) shared: u32,
}

impl Grid {
    pub(super) fn new(blocks: (usize, usize, usize), threads: u32) -> Self {
        Self { blocks, threads, shared: 0 }
    }
}

impl Kernel {
    /// Allows this much dynamic shared memory.
    pub(super) fn allow_shared(&self, bytes: usize) -> Result<(), EngineError> {
        let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the kernel lives.
        unsafe { result::function::set_function_attribute(self.raw, which, bytes as i32) }
            .map_err(failed("shared memory"))
    }

    /// Queues the kernel. `args` are addresses of its parameters, in order and of the kernel's types.
    pub(super) fn launch(
        &self,
        stream: &Stream,
        grid: Grid,
        args: &mut [*mut c_void],
    ) -> Result<(), EngineError> {
        let (x, y, z) = grid.blocks;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let blocks = (x as u32, y as u32, z as u32);
        // SAFETY: the parameters match the kernel's signature beside it in `kernels/`; the memory that they name
        // belongs to the engine, which outlives the step.
        unsafe {
            result::launch_kernel(self.raw, blocks, (grid.threads, 1, 1), grid.shared, stream.raw, args)
        }
        .map_err(|e| EngineError::Device(format!("launching {} on {grid:?}: {e:?}", self.name)))
    }

    /// Queues a kernel that calls `wait_for_input` first: it may start while the one before it ends. Hides the
    /// launch and the first loads, which is what thin steps consist of otherwise. Needs Hopper, does nothing elsewhere.
    pub(super) fn launch_chained(
        &self,
        stream: &Stream,
        grid: Grid,
        args: &mut [*mut c_void],
    ) -> Result<(), EngineError> {
        let (x, y, z) = grid.blocks;
        if self._module._device.capability.0 < 9 || x == 0 || y == 0 || z == 0 {
            return self.launch(stream, grid, args);
        }
        let id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let value = sys::CUlaunchAttributeValue_union { programmaticStreamSerializationAllowed: 1 };
        self.launch_with(stream, grid, args, sys::CUlaunchAttribute { id, pad: [0; 4], value })
    }

    /// Queues a kernel whose blocks wait for each other: all of them are on the device at once, or the launch fails.
    pub(super) fn launch_together(
        &self,
        stream: &Stream,
        grid: Grid,
        args: &mut [*mut c_void],
    ) -> Result<(), EngineError> {
        let id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        let value = sys::CUlaunchAttributeValue_union { cooperative: 1 };
        self.launch_with(stream, grid, args, sys::CUlaunchAttribute { id, pad: [0; 4], value })
    }

    fn launch_with(
        &self,
        stream: &Stream,
        grid: Grid,
        args: &mut [*mut c_void],
        mut attribute: sys::CUlaunchAttribute,
    ) -> Result<(), EngineError> {
        let (x, y, z) = grid.blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: z as u32,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared,
            hStream: stream.raw,
            attrs: &mut attribute,
            numAttrs: 1,
        };
        // SAFETY: as for `launch`; the attributes live through the call.
        unsafe { sys::cuLaunchKernelEx(&config, self.raw, args.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| EngineError::Device(format!("launching {} on {grid:?}: {e:?}", self.name)))
    }
}

// SAFETY: kernel handles have no thread affinity.
unsafe impl Send for Kernel {}
// SAFETY: as above; only read.
unsafe impl Sync for Kernel {}

/// Addresses of a kernel's parameters.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        &mut [$(std::ptr::from_ref(&$arg).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use args;
