//! A bounded parser of GGUF, versions 2 and 3 (little-endian).
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 keys:u64 │ key: string type:u32 value │ tensor: name dims type offset │ data
//! ```
//! Nothing is allocated by a number from the file before the file was seen to hold that much; strings are
//! borrowed. Hostile bytes give an error, never a panic.

use std::collections::HashMap;

use super::blocks::BlockType;

const MAGIC: &[u8; 4] = b"GGUF";
/// Most metadata values, array elements included: the largest vocabularies need about a million.
const MAX_VALUES: usize = 1 << 22;
const MAX_DIMS: u32 = 4;
const MAX_ARRAY_DEPTH: u32 = 2;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// Any float.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A string.
    Text(&'a str),
    /// Values of one type.
    Array(Vec<Value<'a>>),
}

/// A tensor and its bytes, whose length fits its shape and type.
#[derive(Debug, Clone)]
pub struct Tensor<'a> {
    /// Sizes, slowest first (the file has them fastest first).
    pub shape: Vec<usize>,
    /// How its elements are packed.
    pub kind: BlockType,
    /// The packed elements.
    pub data: &'a [u8],
}

/// A parsed file, borrowing its bytes.
#[derive(Debug)]
pub struct Gguf<'a> {
    metadata: HashMap<&'a str, Value<'a>>,
    tensors: HashMap<&'a str, Tensor<'a>>,
}

impl<'a> Gguf<'a> {
    /// Parses a whole file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let mut reader = Reader { bytes, at: 0, values: 0 };
        if reader.take(4)? != MAGIC {
            return Err("not a GGUF file (wrong magic)".into());
        }
        let version = reader.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("GGUF version {version}, only 2 and 3 are known"));
        }
        let tensor_count = reader.u64()?;
        let key_count = reader.u64()?;
        let mut metadata = HashMap::new();
        for _ in 0..key_count {
            let key = reader.text()?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0).map_err(|e| format!("{key}: {e}"))?;
            if metadata.insert(key, value).is_some() {
                return Err(format!("metadata key {key} occurs twice"));
            }
        }
        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(reader.tensor_info()?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 16 => *n as usize,
            Some(other) => return Err(format!("general.alignment is {other:?}")),
        };
        let start = reader.at.next_multiple_of(alignment);
        let data = bytes.get(start..).unwrap_or_default();
        let mut tensors = HashMap::new();
        for info in infos {
            let tensor = info.locate(data)?;
            if tensors.insert(info.name, tensor).is_some() {
                return Err(format!("tensor {} occurs twice", info.name));
            }
        }
        Ok(Self { metadata, tensors })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        self.metadata.get(key)
    }

    /// A string that must be there.
    pub fn text(&self, key: &str) -> Result<&'a str, String> {
        match self.get(key) {
            Some(Value::Text(text)) => Ok(text),
            other => Err(wrong(key, "a string", other)),
        }
    }

    /// A non-negative integer, if there.
    pub fn integer(&self, key: &str) -> Result<Option<u64>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            other => Err(wrong(key, "an integer", other)),
        }
    }

    /// A float, if there.
    pub fn float(&self, key: &str) -> Result<Option<f64>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) if x.is_finite() => Ok(Some(*x)),
            other => Err(wrong(key, "a finite float", other)),
        }
    }

    /// A truth value, if there.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            other => Err(wrong(key, "a bool", other)),
        }
    }

    /// An array, if there.
    pub fn array(&self, key: &str) -> Result<Option<&[Value<'a>]>, String> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            other => Err(wrong(key, "an array", other)),
        }
    }

    /// A tensor.
    pub fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.tensors.get(name)
    }

    /// All tensors' names, sorted.
    pub fn tensor_names(&self) -> Vec<&'a str> {
        let mut names: Vec<&str> = self.tensors.keys().copied().collect();
        names.sort_unstable();
        names
    }
}

fn wrong(key: &str, expected: &str, found: Option<&Value<'_>>) -> String {
    match found {
        None => format!("metadata key {key} is missing"),
        Some(Value::Array(values)) => {
            format!("{key} is an array of {}, expected {expected}", values.len())
        }
        Some(other) => format!("{key} is {other:?}, expected {expected}"),
    }
}

struct TensorInfo<'a> {
    name: &'a str,
    shape: Vec<usize>,
    kind: BlockType,
    offset: u64,
}

impl<'a> TensorInfo<'a> {
    fn locate(&self, data: &'a [u8]) -> Result<Tensor<'a>, String> {
        let bytes = self.kind.bytes_of(&self.shape).map_err(|e| format!("tensor {}: {e}", self.name))?;
        let range = usize::try_from(self.offset).ok().and_then(|at| Some(at..at.checked_add(bytes)?));
        let data = range.and_then(|range| data.get(range)).ok_or_else(|| {
            format!(
                "tensor {}: {bytes} bytes at {} expected, the file holds {} bytes of data: truncated?",
                self.name,
                self.offset,
                data.len()
            )
        })?;
        Ok(Tensor { shape: self.shape.clone(), kind: self.kind, data })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    values: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or_else(|| format!("the file ends at byte {}: truncated?", self.bytes.len()))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<&'a str, String> {
        let length = usize::try_from(self.u64()?).map_err(|_| "a string longer than memory".to_owned())?;
        std::str::from_utf8(self.take(length)?).map_err(|e| format!("a string that is not UTF-8: {e}"))
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value<'a>, String> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} metadata values"));
        }
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::Text(self.text()?),
            9 if depth < MAX_ARRAY_DEPTH => {
                let kind = self.u32()?;
                let count = self.u64()?;
                // Grows with what is read, so a hostile count costs nothing.
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => {
                return Err(format!("metadata type {other} is not known or nested too deep"));
            }
        })
    }

    fn tensor_info(&mut self) -> Result<TensorInfo<'a>, String> {
        let name = self.text()?;
        let dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(format!("tensor {name} has {dims} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let size = self.u64()?;
            shape.push(usize::try_from(size).map_err(|_| format!("tensor {name}: a dimension of {size}"))?);
        }
        shape.reverse();
        let kind = self.u32()?;
        let kind = BlockType::from_code(kind).ok_or_else(|| {
            format!("tensor {name} has type {kind}; F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are read")
        })?;
        Ok(TensorInfo { name, shape, kind, offset: self.u64()? })
    }
}
