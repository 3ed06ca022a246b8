//! Device memory that other processes of this host can map: the driver's virtual memory management, with the allocation
//! as a file descriptor. The memory lives until the last process that maps it, or holds its file, lets go.

use std::ffi::c_void;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use cudarc::driver::{DriverError, sys};

use super::driver::{Device, clear, failed};
use crate::EngineError;

const FILE: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// An allocation, here or of another process, at an address of ours.
pub(super) struct Mapping {
    pub(super) at: u64,
    /// What is mapped: whole pages of the driver's.
    bytes: usize,
    allocation: Allocation,
    device: Arc<Device>,
}

impl Mapping {
    /// Memory of our own, zeroed. Nothing where the driver cannot make a file of it.
    pub(super) fn new(device: &Arc<Device>, bytes: usize, what: &str) -> Result<Option<Self>, EngineError> {
        let property = property(device);
        let Ok(bytes) = whole_pages(&property, bytes) else { return Ok(None) };
        let mut handle = 0;
        // SAFETY: `property` lives; the handle is released on drop.
        let made = unsafe { sys::cuMemCreate(&mut handle, bytes, &property, 0) }.result();
        match made.map(|()| Allocation(handle)) {
            Ok(allocation) => {
                let mapping = Self::map(device, allocation, bytes).map_err(failed(what))?;
                clear(mapping.at, bytes)?;
                Ok(Some(mapping))
            }
            Err(error @ DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(device.out_of_memory(what, bytes, error))
            }
            Err(error) => {
                tracing::info!(?error, "{what} cannot be shared with other processes");
                Ok(None)
            }
        }
    }

    /// Memory of another process, at least `bytes` of it, readable from this device.
    pub(super) fn of_file(device: &Arc<Device>, file: &OwnedFd, bytes: usize) -> Result<Self, EngineError> {
        let what = failed("mapping a peer's device memory");
        let bytes = whole_pages(&property(device), bytes).map_err(&what)?;
        let mut handle = 0;
        let file = file.as_raw_fd() as usize as *mut c_void;
        // SAFETY: the descriptor is passed by value; the driver keeps a reference of its own.
        unsafe { sys::cuMemImportFromShareableHandle(&mut handle, file, FILE) }.result().map_err(&what)?;
        Self::map(device, Allocation(handle), bytes).map_err(&what)
    }

    /// The file that stands for it.
    pub(super) fn file(&self) -> Result<OwnedFd, EngineError> {
        let mut file: RawFd = -1;
        let to: *mut RawFd = &mut file;
        // SAFETY: the driver writes a descriptor, which is then ours.
        unsafe {
            sys::cuMemExportToShareableHandle(to.cast(), self.allocation.0, FILE, 0)
                .result()
                .map_err(failed("a file for device memory"))?;
            Ok(OwnedFd::from_raw_fd(file))
        }
    }

    /// A dmabuf of it, from the first byte on.
    pub(super) fn dmabuf(&self) -> Result<OwnedFd, EngineError> {
        let mut file: RawFd = -1;
        let (to, kind): (*mut RawFd, _) =
            (&mut file, sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
        // SAFETY: the range is mapped; the driver writes a descriptor, which is then ours.
        unsafe {
            sys::cuMemGetHandleForAddressRange(to.cast(), self.at, self.bytes, kind, 0)
                .result()
                .map_err(failed("a dmabuf of device memory"))?;
            Ok(OwnedFd::from_raw_fd(file))
        }
    }

    fn map(device: &Arc<Device>, allocation: Allocation, bytes: usize) -> Result<Self, DriverError> {
        let mut at = 0;
        // SAFETY: the range is ours until it is freed; it is unmapped and freed on drop, or here on failure.
        unsafe {
            sys::cuMemAddressReserve(&mut at, bytes, 0, 0, 0).result()?;
            if let Err(error) = sys::cuMemMap(at, bytes, 0, allocation.0, 0).result() {
                let _ = sys::cuMemAddressFree(at, bytes);
                return Err(error);
            }
        }
        let mapping = Self { at, bytes, allocation, device: Arc::clone(device) };
        let access = sys::CUmemAccessDesc {
            location: property(device).location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: mapped above.
        unsafe { sys::cuMemSetAccess(at, bytes, &access, 1) }.result()?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _ = self.device.enter();
        // SAFETY: mapped in `map`; who uses it has synchronised its streams.
        unsafe {
            let _ = sys::cuMemUnmap(self.at, self.bytes);
            let _ = sys::cuMemAddressFree(self.at, self.bytes);
        }
    }
}

/// A reference to an allocation.
struct Allocation(sys::CUmemGenericAllocationHandle);

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: held since it was made; a mapping keeps the memory by itself.
        let _ = unsafe { sys::cuMemRelease(self.0) };
    }
}

fn property(device: &Device) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FILE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: device.ordinal,
        },
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: u8::from(device.gpudirect.is_capable),
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn whole_pages(property: &sys::CUmemAllocationProp, bytes: usize) -> Result<usize, DriverError> {
    let mut page = 0;
    let least = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    // SAFETY: `property` lives.
    unsafe { sys::cuMemGetAllocationGranularity(&mut page, property, least) }.result()?;
    bytes
        .max(1)
        .checked_next_multiple_of(page.max(1))
        .ok_or(DriverError(sys::CUresult::CUDA_ERROR_INVALID_VALUE))
}
