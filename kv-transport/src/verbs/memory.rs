//! A pool's memory registered with a rail: its host side always, and its device's where the card reaches that by itself
//! (GPUDirect RDMA).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::ffi::{self, Verbs};
use crate::DeviceMemory;
use crate::transport::Side;

/// Whether cards read and write the device's memory of a pool by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuDirect {
    /// Where they can; else through the host side.
    #[default]
    Auto,
    /// Always through the host side.
    Off,
    /// Not to be able to is an error.
    Require,
}

/// Registered memory, until it is dropped: before the domain that it is registered in.
pub(crate) struct Registered {
    verbs: &'static Verbs,
    pub(crate) mr: *mut ffi::Mr,
    /// Address of the first byte, as requests name it.
    pub(crate) base: u64,
    pub(crate) len: usize,
}

// SAFETY: libibverbs' objects may be used from any thread; the pointer is valid until drop.
unsafe impl Send for Registered {}
// SAFETY: as above; only plain fields of it are read.
unsafe impl Sync for Registered {}

/// Where to register, and what may be done with the memory.
#[derive(Clone, Copy)]
pub(crate) struct Domain {
    pub(crate) verbs: &'static Verbs,
    pub(crate) pd: *mut ffi::Pd,
    pub(crate) access: std::ffi::c_int,
}

impl Domain {
    fn registered(&self, mr: *mut ffi::Mr, base: u64, len: usize) -> io::Result<Registered> {
        if mr.is_null() {
            return Err(io::Error::last_os_error());
        }
        Ok(Registered { verbs: self.verbs, mr, base, len })
    }

    /// Memory at an address that the kernel, or a module beside it, knows.
    ///
    /// # Safety
    /// It must be valid and unmoved for as long as it is registered.
    pub(crate) unsafe fn register(&self, base: u64, len: usize) -> io::Result<Registered> {
        // SAFETY: the domain is alive, the memory is the caller's word.
        let mr = unsafe { (self.verbs.reg_mr)(self.pd, base as *mut _, len, self.access) };
        self.registered(mr, base, len)
    }

    /// A dmabuf from its first byte on, to be named by the addresses from `base`.
    fn register_dmabuf(&self, file: &OwnedFd, base: u64, len: usize) -> Result<Registered, String> {
        let Some(register) = self.verbs.reg_dmabuf_mr else {
            return Err("this libibverbs has no ibv_reg_dmabuf_mr; it came with rdma-core 34".into());
        };
        // SAFETY: the domain is alive; the kernel keeps a reference to the buffer behind the file.
        let mr = unsafe { register(self.pd, 0, len, base, file.as_raw_fd(), self.access) };
        self.registered(mr, base, len).map_err(|error| format!("the card or its driver refuses it: {error}"))
    }
}

impl Registered {
    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: registered while `self` lives.
        unsafe { (*self.mr).lkey }
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.mr).rkey }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: every queue pair and window that used it is gone; freed once.
        unsafe { (self.verbs.dereg_mr)(self.mr) };
    }
}

/// What a card knows of a pool's device memory.
pub(crate) struct Direct {
    memory: Registered,
    /// How it was registered.
    how: &'static str,
    /// A cell came or went this way as it should.
    is_proven: AtomicBool,
    is_given_up: AtomicBool,
}

impl Direct {
    /// Registers the device's memory, by the first way that is open; why none is.
    pub(crate) fn open(domain: Domain, device: &dyn DeviceMemory, len: usize) -> Result<Self, String> {
        let exposed = device.expose().map_err(|error| error.to_string())?;
        let made = |memory, how| {
            let (is_proven, is_given_up) = (AtomicBool::new(false), AtomicBool::new(false));
            Self { memory, how, is_proven, is_given_up }
        };
        let dmabuf = exposed.dmabuf.and_then(|file| domain.register_dmabuf(&file, exposed.address, len));
        let no_dmabuf = match dmabuf {
            Ok(memory) => return Ok(made(memory, "dmabuf")),
            Err(why) => why,
        };
        let peermem = exposed.peermem.and_then(|()| {
            // SAFETY: the device's memory lives as long as the region, of which the rail keeps a clone.
            let memory = unsafe { domain.register(exposed.address, len) };
            memory.map_err(|error| format!("the card or its driver refuses it: {error}"))
        });
        match peermem {
            Ok(memory) => Ok(made(memory, "peermem")),
            Err(why) => Err(format!("as dmabuf: {no_dmabuf}; by peer memory: {why}")),
        }
    }
}

/// The memory of a rail.
pub(crate) struct Memory {
    host: Registered,
    /// The device's, or why not; empty where nobody asked for it.
    device: Result<Direct, String>,
}

impl Memory {
    pub(crate) fn new(host: Registered, device: Result<Direct, String>) -> Self {
        Self { host, device }
    }

    fn direct(&self) -> Option<&Direct> {
        self.device.as_ref().ok().filter(|direct| !direct.is_given_up.load(Ordering::Relaxed))
    }

    /// The side that a new queue pair uses.
    pub(crate) fn side(&self) -> Side {
        if self.direct().is_some() { Side::Device } else { Side::Host }
    }

    pub(crate) fn of(&self, side: Side) -> &Registered {
        match (side, &self.device) {
            (Side::Device, Ok(direct)) => &direct.memory,
            _ => &self.host,
        }
    }

    /// A cell came or went by the device's memory as it should.
    pub(crate) fn proves(&self) {
        if let Ok(direct) = &self.device {
            direct.is_proven.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_proven(&self) -> bool {
        self.device.as_ref().is_ok_and(|direct| direct.is_proven.load(Ordering::Relaxed))
    }

    /// New queue pairs use the host side from now on; true the first time.
    pub(crate) fn gives_up(&self) -> bool {
        self.device.as_ref().is_ok_and(|direct| !direct.is_given_up.swap(true, Ordering::Relaxed))
    }

    /// In words, with a comma before; nothing where there is nothing to say.
    pub(crate) fn describe(&self) -> String {
        match (&self.device, self.direct()) {
            (_, Some(direct)) => format!(", GPUDirect by {}", direct.how),
            (Ok(_), None) => ", through host memory since GPUDirect failed".into(),
            (Err(why), _) if why.is_empty() => String::new(),
            (Err(why), _) => format!(", through host memory ({why})"),
        }
    }
}
