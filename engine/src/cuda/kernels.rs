//! The kernels: compiled at run time for the device at hand, and kept on disk.
//!
//! At run time, because then one binary serves every device, no CUDA toolkit is needed to build it, and what
//! depends on the device (`sm_90a`) is only compiled where it is. The first start pays some seconds,
//! later ones read the cache.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::Arc;

use cudarc::nvrtc::{result as compiler, sys};
use xxhash_rust::xxh3::xxh3_128;

use super::driver::{Device, Kernel, Module};
use super::gemm::Operands;
use super::thin::Thin;
use super::wide::Wide;
use crate::model::Quantisation;
use crate::{EngineError, KvDtype};

const COMMON: &str = include_str!("kernels/common.cuh");

/// What stands before a file of `kernels/`, beside what all have.
#[derive(Clone, Copy, PartialEq)]
enum Header {
    Attend,
    /// Hopper's own instructions.
    Hopper,
    Kinds,
    Ring,
    Rotation,
    Words,
}

impl Header {
    fn text(self) -> &'static str {
        match self {
            Self::Attend => include_str!("kernels/attend.cuh"),
            Self::Hopper => include_str!("kernels/hopper.cuh"),
            Self::Kinds => include_str!("kernels/kinds.cuh"),
            Self::Ring => include_str!("kernels/ring.cuh"),
            Self::Rotation => include_str!("kernels/rotation.cuh"),
            Self::Words => include_str!("kernels/words.cuh"),
        }
    }
}

/// A file of `kernels/`.
struct Source {
    name: &'static str,
    text: &'static str,
    headers: &'static [Header],
}

impl Source {
    fn of_hopper(&self) -> bool {
        self.headers.contains(&Header::Hopper)
    }
}

macro_rules! source {
    ($name:literal $(, $header:ident)*) => {
        Source {
            name: $name,
            text: include_str!(concat!("kernels/", $name, ".cu")),
            headers: &[$(Header::$header),*],
        }
    };
}

const ROWS: Source = source!("rows", Rotation);
const BLOCKS: Source = source!("blocks");
const ATTENTION_ANY: Source = source!("attention_any");
const DRAW: Source = source!("draw");
const THIN: Source = source!("thin");
const WIDE_SM90: Source = source!("wide_sm90", Hopper);
const MEGAKERNEL: Source = source!("megakernel", Hopper, Words, Kinds, Ring, Rotation, Attend);
const QUANTISE: Source = source!("quantise", Hopper);
const DECODE: Source = source!("attention_decode", Rotation, Attend);
const PREFILL: Source = source!("attention_prefill");
const PREFILL_SM90: Source = source!("attention_prefill_sm90", Hopper);

/// Every kernel of the engine.
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) pick_rows: Kernel,
    pub(super) rms_norm: Kernel,
    pub(super) swiglu: Kernel,
    pub(super) rotation_table: Kernel,
    pub(super) rotate_and_store: Kernel,
    pub(super) argmax: Kernel,
    pub(super) random_weights: Kernel,
    pub(super) read_all: Kernel,
    pub(super) copy_cells: Kernel,
    pub(super) fork_blocks: Kernel,
    pub(super) widen_blocks: Kernel,
    pub(super) checksums: Kernel,
    pub(super) attention_any: Kernel,
    pub(super) drawing: Drawing,
    /// Rounding to eight bits, where the network is; on Hopper.
    pub(super) quantise: Option<Rounding>,
    /// For the model's head size, where there is one.
    pub(super) fast: Option<FastAttention>,
}

/// Draws other than of the largest logit.
pub(super) struct Drawing {
    pub(super) raw: Kernel,
    pub(super) mask: Kernel,
    pub(super) edit: Kernel,
    pub(super) draw: Kernel,
}

/// Rows of bf16 to eight bits, alone or together with what makes the rows.
pub(super) struct Rounding {
    pub(super) rows: Kernel,
    pub(super) norm: Kernel,
    pub(super) swiglu: Kernel,
}

/// Attention through tensor cores.
pub(super) struct FastAttention {
    pub(super) decode: Kernel,
    /// That rotates, and puts the newest KV into the pool.
    pub(super) decode_turning: Kernel,
    pub(super) join: Kernel,
    pub(super) prefill: Kernel,
    /// On Hopper.
    pub(super) prefill_sm90: Option<Kernel>,
}

/// The kernel of all layers for weights and KV of a kind; on Hopper.
pub(super) fn megakernel(
    device: &Arc<Device>,
    operands: Operands,
    kv: KvDtype,
    head_dim: usize,
) -> Result<Option<Kernel>, EngineError> {
    if device.capability != (9, 0) {
        return Ok(None);
    }
    let code = compiled_for(device, &MEGAKERNEL, &settings(operands, kv, head_dim))?;
    Module::load(device, &code)?.kernel("all_layers").map(Some)
}

/// What one variant of the megakernel is made for.
fn settings(operands: Operands, kv: KvDtype, head_dim: usize) -> String {
    let kind = match operands {
        Operands::Bf16 => "Bf16",
        Operands::Int8 => "Int8",
        Operands::Fp8 => "Fp8",
    };
    let kv = if kv == KvDtype::Fp8 { "KvFp8" } else { "KvBf16" };
    format!("#define KIND {kind}\n#define KV {kv}\n#define HEAD_DIM {head_dim}\n")
}

/// The kernels for products with few rows.
pub(super) fn thin(device: &Arc<Device>) -> Result<Thin, EngineError> {
    Thin::new(device, &Module::load(device, &compiled(device, &THIN)?)?)
}

/// The kernels for products with many rows; on Hopper.
pub(super) fn wide(device: &Arc<Device>) -> Result<Option<Wide>, EngineError> {
    if device.capability != (9, 0) {
        return Ok(None);
    }
    Wide::new(device, &Module::load(device, &compiled(device, &WIDE_SM90)?)?).map(Some)
}

impl Kernels {
    pub(super) fn load(
        device: &Arc<Device>,
        head_dim: usize,
        quantise: Option<Quantisation>,
        kv: KvDtype,
    ) -> Result<Self, EngineError> {
        // Kernels that read or write the pool.
        let of_pool = if kv == KvDtype::Fp8 { "_fp8" } else { "" };
        let module = |source: &Source| Module::load(device, &compiled(device, source)?);
        let (rows, blocks, any) = (module(&ROWS)?, module(&BLOCKS)?, module(&ATTENTION_ANY)?);
        let draw = module(&DRAW)?;
        let fast = || -> Result<FastAttention, EngineError> {
            let decode = module(&DECODE)?;
            let sm90 = || module(&PREFILL_SM90)?.kernel(&format!("prefill_attention_sm90_{head_dim}"));
            Ok(FastAttention {
                decode: decode.kernel(&format!("decode_attention{of_pool}_{head_dim}"))?,
                decode_turning: decode.kernel(&format!("decode_attention_turning{of_pool}_{head_dim}"))?,
                join: decode.kernel("decode_join")?,
                prefill: module(&PREFILL)?.kernel(&format!("prefill_attention_{head_dim}"))?,
                prefill_sm90: (device.capability == (9, 0)).then(sm90).transpose()?,
            })
        };
        let rounding = |kind: Quantisation| -> Result<Rounding, EngineError> {
            let (module, kind) = (module(&QUANTISE)?, kind.name());
            Ok(Rounding {
                rows: module.kernel(&format!("quantise_rows_{kind}"))?,
                norm: module.kernel(&format!("norm_rows_{kind}"))?,
                swiglu: module.kernel(&format!("swiglu_rows_{kind}"))?,
            })
        };
        Ok(Self {
            embed: rows.kernel("embed")?,
            pick_rows: rows.kernel("pick_rows")?,
            rms_norm: rows.kernel("rms_norm")?,
            swiglu: rows.kernel("swiglu")?,
            rotation_table: rows.kernel("rotation_table")?,
            rotate_and_store: rows.kernel(&format!("rotate_and_store{of_pool}"))?,
            argmax: rows.kernel("argmax")?,
            random_weights: rows.kernel("random_weights")?,
            read_all: rows.kernel("read_all")?,
            copy_cells: blocks.kernel("copy_cells")?,
            fork_blocks: blocks.kernel("fork_blocks")?,
            widen_blocks: blocks.kernel("widen_blocks")?,
            checksums: blocks.kernel("checksums")?,
            attention_any: any.kernel(&format!("attention_any{of_pool}"))?,
            drawing: Drawing {
                raw: draw.kernel("raw_logits")?,
                mask: draw.kernel("mask_logits")?,
                edit: draw.kernel("edit_logits")?,
                draw: draw.kernel("draw_tokens")?,
            },
            quantise: quantise.map(rounding).transpose()?,
            fast: matches!(head_dim, 64 | 128).then(fast).transpose()?,
        })
    }
}

/// The machine code for this device, from the cache or the compiler.
fn compiled(device: &Device, source: &Source) -> Result<Vec<u8>, EngineError> {
    compiled_for(device, source, "")
}

/// The same with `settings` before it.
fn compiled_for(device: &Device, source: &Source, settings: &str) -> Result<Vec<u8>, EngineError> {
    let (major, minor) = device.capability;
    let architecture = format!("sm_{major}{minor}{}", if source.of_hopper() { "a" } else { "" });
    let text = whole(source, settings);
    let (mut newest, mut oldest) = (0, 0);
    // SAFETY: two integers to write to.
    unsafe { sys::nvrtcVersion(&mut newest, &mut oldest) }.result().map_err(|e| compile_error(source, e))?;
    let key = format!("{architecture} {newest}.{oldest} {text}");
    let cached =
        cache_folder().map(|f| f.join(format!("{}-{:032x}.cubin", source.name, xxh3_128(key.as_bytes()))));
    if let Some(code) = cached.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(code);
    }
    let started = std::time::Instant::now();
    let code = compile(source, &text, &architecture)?;
    let (name, ms) = (source.name, started.elapsed().as_millis());
    tracing::info!(name, architecture, ms, "kernels compiled");
    if let Some(path) = cached {
        keep(&path, &code);
    }
    Ok(code)
}

fn whole(source: &Source, settings: &str) -> String {
    let headers: Vec<_> = source.headers.iter().map(|header| header.text()).collect();
    format!("{COMMON}\n{settings}{}\n{}", headers.join("\n"), source.text)
}

/// `$XDG_CACHE_HOME/tandem/kernels`, or the same under `~/.cache`.
fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("tandem").join("kernels"))
}

/// Whole or not at all: another process may be starting beside this one. Failing costs the next start some seconds.
fn keep(path: &std::path::Path, code: &[u8]) {
    let Some(folder) = path.parent() else { return };
    let partial = path.with_extension(format!("{}", std::process::id()));
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&partial, code))
        .and_then(|()| std::fs::rename(&partial, path));
    if let Err(error) = written {
        tracing::debug!(%error, path = %path.display(), "compiled kernels are not kept");
    }
}

fn compile(source: &Source, text: &str, architecture: &str) -> Result<Vec<u8>, EngineError> {
    let text = CString::new(text).map_err(|_| EngineError::Device("a kernel source has a NUL".into()))?;
    let program = compiler::create_program(&text, None).map_err(|e| compile_error(source, e))?;
    let arch = format!("--gpu-architecture={architecture}");
    let options = [arch.as_str(), "--std=c++17", "-default-device", "--diag-suppress=177"];
    // SAFETY: the program lives until it is destroyed below.
    let outcome = unsafe { compiler::compile_program(program, &options) };
    let code = match outcome {
        Ok(()) => machine_code(program).map_err(|e| compile_error(source, e)),
        Err(e) => {
            // SAFETY: as above.
            let log = unsafe { compiler::get_program_log(program) }.unwrap_or_default();
            // SAFETY: the compiler ends its log with a NUL.
            let log = unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned();
            Err(EngineError::Device(format!("kernels {} do not compile: {e:?}: {log}", source.name)))
        }
    };
    // SAFETY: made above, not used again.
    let _ = unsafe { compiler::destroy_program(program) };
    code
}

fn machine_code(program: sys::nvrtcProgram) -> Result<Vec<u8>, compiler::NvrtcError> {
    let mut size = 0;
    // SAFETY: a compiled program, and a place for the size.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }.result()?;
    let mut code = vec![0u8; size];
    // SAFETY: `size` bytes.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast::<c_char>()) }.result()?;
    Ok(code)
}

fn compile_error(source: &Source, error: compiler::NvrtcError) -> EngineError {
    EngineError::Device(format!("compiling kernels {}: {error:?}", source.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs the compiler but no GPU.
    #[test]
    fn every_kernel_compiles() {
        if let Err(missing) = crate::cuda::libraries::find_compiler() {
            eprintln!("skipped: {missing}");
            return;
        }
        let anywhere = [&ROWS, &BLOCKS, &ATTENTION_ANY, &DRAW, &THIN, &DECODE, &PREFILL];
        for source in anywhere.into_iter().chain([&QUANTISE, &WIDE_SM90, &PREFILL_SM90]) {
            let architectures: &[&str] =
                if source.of_hopper() { &["sm_90a"] } else { &["sm_80", "sm_90", "sm_100"] };
            architectures.iter().for_each(|architecture| compiles(source, "", architecture));
        }
        for operands in [Operands::Bf16, Operands::Int8, Operands::Fp8] {
            for (kv, head_dim) in [(KvDtype::Bf16, 64), (KvDtype::Bf16, 128), (KvDtype::Fp8, 128)] {
                compiles(&MEGAKERNEL, &settings(operands, kv, head_dim), "sm_90a");
            }
        }
    }

    fn compiles(source: &Source, settings: &str, architecture: &str) {
        let code = compile(source, &whole(source, settings), architecture);
        if let Err(error) = &code {
            eprintln!("{error}");
        }
        assert!(code.is_ok_and(|code| !code.is_empty()), "{} for {architecture}: {settings}", source.name);
    }
}
