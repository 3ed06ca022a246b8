//! Finding CUDA's libraries at run time: the binary starts without them and says what is missing when asked.

use std::path::PathBuf;

use cudarc::{cublaslt, driver, nvrtc};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::EngineError;

/// Where toolkits usually are, besides the loader's own search path.
const FOLDERS: [&str; 6] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda-13.0/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/local/nvidia/lib64",
    "/usr/lib64",
];

/// Makes the compiler, the driver and cuBLASLt callable, or says which one is not there. cudarc panics on the
/// first call into a library that it cannot find; so nothing of it may be called before this.
pub(super) fn find() -> Result<(), EngineError> {
    find_compiler()?;
    // SAFETY: these calls only try to open libraries, whose initialisers are NVIDIA's.
    unsafe {
        require("libcuda.so", "the driver", &["libcuda.so.1"], || driver::sys::is_culib_present())?;
        // cuBLASLt of CUDA 13; 12 lacks the scaled FP8 products.
        require("libcublasLt.so", "cuBLASLt of CUDA 13", &["libcublasLt.so.13"], || {
            cublaslt::sys::is_culib_present()
        })
    }
}

/// The compiler alone.
pub(super) fn find_compiler() -> Result<(), EngineError> {
    // SAFETY: as above.
    unsafe {
        require("libnvrtc.so", "the CUDA 13 run-time compiler", &["libnvrtc.so.13"], || {
            nvrtc::sys::is_culib_present()
        })
    }
}

/// SAFETY: as for `dlopen`: the library's initialisers run.
unsafe fn require(
    name: &str,
    what: &str,
    files: &[&str],
    present: impl Fn() -> bool,
) -> Result<(), EngineError> {
    if present() {
        return Ok(());
    }
    for path in candidates(files) {
        // SAFETY: of the caller.
        if let Ok(library) = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
            // Stays loaded, so that cudarc's own search finds it by its name.
            std::mem::forget(library);
            if present() {
                return Ok(());
            }
        }
    }
    Err(EngineError::Unsupported(format!(
        "the cuda device needs {name} ({what}), which is neither on the loader's search path nor in {}; install \
         it, or set LD_LIBRARY_PATH, or use --device cpu",
        FOLDERS.join(", ")
    )))
}

fn candidates(files: &[&str]) -> Vec<PathBuf> {
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let folders = path.split(':').filter(|f| !f.is_empty()).chain(FOLDERS).map(PathBuf::from);
    folders
        .flat_map(|folder| files.iter().map(move |file| folder.join(file)))
        .filter(|p| p.exists())
        .collect()
}
