//! Weights from safetensors files, one or many, through the page cache.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::quantise::{Bytes, Eight, Quantisation, Stored};
use super::raw::read_json;
use crate::EngineError;
use crate::mapped::Mapped;

/// Where a network's tensors come from: a folder, or a seed.
pub trait WeightSource {
    /// A matrix `[rows, columns]` as bf16; f32 and f16 are rounded to nearest even.
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix, EngineError>;
    /// A matrix of a layer as it is stored: bf16, or eight bits with a scale per row.
    fn stored(&self, name: &str, rows: usize, columns: usize) -> Result<Stored, EngineError> {
        self.matrix(name, rows, columns).map(Stored::Brain)
    }
    /// A vector as f32.
    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, EngineError>;
    /// Whether there is a tensor of this name.
    fn has(&self, name: &str) -> bool;
}

/// bf16 numbers, row-major: borrowed from a mapped file, or owned.
pub struct Matrix(Storage);

enum Storage {
    Mapped(Arc<Mapped>, Range<usize>),
    Owned(Vec<bf16>),
}

impl Matrix {
    /// The numbers, row-major.
    pub fn numbers(&self) -> &[bf16] {
        match &self.0 {
            // Checked when the matrix was made.
            Storage::Mapped(file, range) => {
                bytemuck::try_cast_slice(&file.bytes()[range.clone()]).unwrap_or_default()
            }
            Storage::Owned(numbers) => numbers,
        }
    }
}

/// Bytes of a mapped file, or owned.
pub(super) enum ByteStorage {
    Mapped(Arc<Mapped>, Range<usize>),
    Owned(Vec<u8>),
}

impl ByteStorage {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(file, range) => &file.bytes()[range.clone()],
            Self::Owned(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(ByteStorage::Owned(bytes))
    }
}

impl From<Vec<bf16>> for Matrix {
    fn from(numbers: Vec<bf16>) -> Self {
        Self(Storage::Owned(numbers))
    }
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In the file.
    range: Range<usize>,
}

/// The tensors of a model folder.
pub struct Weights {
    dir: PathBuf,
    files: Vec<(PathBuf, Arc<Mapped>)>,
    entries: HashMap<String, Entry>,
}

impl Weights {
    /// Maps the folder's files and reads their headers.
    pub fn open(dir: &Path) -> Result<Self, EngineError> {
        let mut weights = Self { dir: dir.to_owned(), files: Vec::new(), entries: HashMap::new() };
        for path in weight_files(dir)? {
            weights.add(path)?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), EngineError> {
        let map = Mapped::open(&path)?;
        let (header, metadata) = SafeTensors::read_metadata(map.bytes()).map_err(|e| {
            let reason = format!("not a whole safetensors file of {} bytes: {e}", map.bytes().len());
            EngineError::model(&path, reason)
        })?;
        let start = 8 + header;
        for (name, info) in metadata.tensors() {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), range };
            if let Some(other) = self.entries.insert(name.clone(), entry) {
                let first = self.files.get(other.file).map_or(&path, |file| &file.0);
                return Err(EngineError::model(
                    &path,
                    format!("tensor {name} is in {} too", first.display()),
                ));
            }
        }
        self.files.push((path, Arc::new(map)));
        Ok(())
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<(&Entry, &(PathBuf, Arc<Mapped>)), EngineError> {
        let entry = self.entries.get(name).ok_or_else(|| {
            let reason = format!(
                "tensor {name} is missing ({shape:?} expected, {} tensors found)",
                self.entries.len()
            );
            EngineError::model(&self.dir, reason)
        })?;
        let file = &self.files[entry.file];
        if entry.shape != shape {
            let reason = format!("tensor {name}: shape {shape:?} expected, {:?} found", entry.shape);
            return Err(EngineError::model(&file.0, reason));
        }
        Ok((entry, file))
    }

    /// `NAME_scale` beside a matrix of eight bits: one per row, or one for all.
    fn scales(&self, name: &str, rows: usize) -> Result<Vec<f32>, EngineError> {
        let name = format!("{name}_scale");
        let shape = self.entries.get(&name).map(|entry| entry.shape.clone());
        let one = shape.filter(|shape| shape.iter().product::<usize>() == 1);
        let (entry, (path, map)) = self.find(&name, &one.unwrap_or_else(|| vec![rows, 1]))?;
        let scales = convert(&map.bytes()[entry.range.clone()], entry.dtype, bf16::to_f32, |x| x);
        let scales = scales.ok_or_else(|| dtype_error(path, &name, entry.dtype))?;
        if let Some(scale) = scales.iter().find(|scale| !(scale.is_finite() && **scale >= 0.0)) {
            let reason = format!("tensor {name}: a scale of {scale}, which no weight has");
            return Err(EngineError::model(path, reason));
        }
        Ok(if scales.len() == rows { scales } else { vec![scales[0]; rows] })
    }
}

impl WeightSource for Weights {
    fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Matrix, EngineError> {
        let (entry, (path, map)) = self.find(name, &[rows, columns])?;
        let bytes = &map.bytes()[entry.range.clone()];
        if entry.dtype == Dtype::BF16 && bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok() {
            return Ok(Matrix(Storage::Mapped(Arc::clone(map), entry.range.clone())));
        }
        let numbers = convert(bytes, entry.dtype, |x| x, bf16::from_f32);
        numbers.map(Matrix::from).ok_or_else(|| dtype_error(path, name, entry.dtype))
    }

    fn stored(&self, name: &str, rows: usize, columns: usize) -> Result<Stored, EngineError> {
        let kind = match self.entries.get(name).map(|entry| entry.dtype) {
            Some(Dtype::I8) => Quantisation::Int8,
            Some(Dtype::F8_E4M3) => Quantisation::Fp8,
            _ => return self.matrix(name, rows, columns).map(Stored::Brain),
        };
        let (entry, (_, map)) = self.find(name, &[rows, columns])?;
        let bytes = Bytes(ByteStorage::Mapped(Arc::clone(map), entry.range.clone()));
        Ok(Stored::Eight(Eight { kind, bytes, scales: self.scales(name, rows)? }))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, EngineError> {
        let (entry, (path, map)) = self.find(name, &[length])?;
        let numbers = convert(&map.bytes()[entry.range.clone()], entry.dtype, bf16::to_f32, |x| x);
        numbers.ok_or_else(|| dtype_error(path, name, entry.dtype))
    }

    fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }
}

fn convert<T>(bytes: &[u8], dtype: Dtype, brain: fn(bf16) -> T, single: fn(f32) -> T) -> Option<Vec<T>> {
    Some(match dtype {
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| brain(bf16::from_le_bytes([b[0], b[1]]))).collect(),
        Dtype::F16 => {
            bytes.chunks_exact(2).map(|b| single(f16::from_le_bytes([b[0], b[1]]).to_f32())).collect()
        }
        Dtype::F32 => {
            bytes.chunks_exact(4).map(|b| single(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
        }
        _ => return None,
    })
}

fn dtype_error(path: &Path, name: &str, found: Dtype) -> EngineError {
    EngineError::model(path, format!("tensor {name}: BF16, F16 or F32 expected, {found:?} found"))
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// The folder's weight files: those the index names, else `model.safetensors`, else every `*.safetensors`.
pub(crate) fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let index = dir.join("model.safetensors.index.json");
    if index.exists() {
        let names: BTreeSet<String> = read_json::<Index>(&index)?.weight_map.into_values().collect();
        if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(EngineError::model(
                &index,
                format!("names {name}, which is not a file of this folder"),
            ));
        }
        return Ok(names.iter().map(|name| dir.join(name)).collect());
    }
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let unreadable = |e: std::io::Error| EngineError::model(dir, format!("cannot be read: {e}"));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|ext| ext == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(EngineError::model(dir, "no *.safetensors file"));
    }
    files.sort();
    Ok(files)
}
