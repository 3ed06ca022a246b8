//! Models from other formats, rewritten as a Hugging Face folder.

mod blocks;
pub mod gguf;
mod hf;
mod tensors;
mod tokenizer;

use std::fs;
use std::path::{Path, PathBuf};

use crate::EngineError;
use crate::mapped::Mapped;
use gguf::Gguf;

/// What an import made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportReport {
    /// The model's own name, as its file gives it.
    pub name: String,
    /// The Hugging Face architecture it was written as.
    pub architecture: String,
    /// Tensors written.
    pub tensors: usize,
    /// Numbers in them.
    pub parameters: u64,
    /// Bytes of `model.safetensors`.
    pub bytes: u64,
    /// Tokens in the vocabulary.
    pub vocab: usize,
}

/// Rewrites a GGUF file as the folder `out_dir`: `config.json`, `generation_config.json`,
/// `model.safetensors` (bf16; one-dimensional tensors stay f32), `tokenizer.json`, `tokenizer_config.json`.
///
/// The folder appears at once when all of it is written, or not at all; an existing one is refused.
/// `progress(done, total)` counts bytes of the source's tensors.
pub fn import_gguf(
    gguf: &Path,
    out_dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport, EngineError> {
    if out_dir.exists() {
        return Err(EngineError::model(out_dir, "exists already; remove it to import again"));
    }
    let file = Mapped::open(gguf)?;
    let parsed = Gguf::parse(file.bytes()).map_err(|reason| EngineError::model(gguf, reason))?;
    let staging = Staging::beside(out_dir)?;
    let report =
        write_folder(&parsed, &staging.path, progress).map_err(|reason| EngineError::model(gguf, reason))?;
    staging.publish(out_dir)?;
    Ok(report)
}

fn write_folder(
    gguf: &Gguf<'_>,
    dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ImportReport, String> {
    let model = hf::Model::read(gguf)?;
    let tokenizer = tokenizer::Tokenizer::read(gguf, model.vocab)?;
    write_json(dir, "config.json", &model.config_json())?;
    write_json(dir, "generation_config.json", &model.generation_json())?;
    write_json(dir, "tokenizer.json", &tokenizer.tokenizer_json(&model))?;
    write_json(dir, "tokenizer_config.json", &tokenizer.config_json(&model))?;
    let path = dir.join("model.safetensors");
    let written = tensors::write(gguf, &model, &path, progress)?;
    let bytes = fs::metadata(&path).map_err(|e| format!("cannot read back {}: {e}", path.display()))?.len();
    Ok(ImportReport {
        name: model.name.clone(),
        architecture: model.architecture.to_owned(),
        tensors: written.tensors,
        parameters: written.parameters,
        bytes,
        vocab: model.vocab,
    })
}

fn write_json(dir: &Path, name: &str, value: &serde_json::Value) -> Result<(), String> {
    let path = dir.join(name);
    let text = serde_json::to_vec_pretty(value).map_err(|e| format!("{name}: {e}"))?;
    fs::write(&path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// A folder next to the final one; removed unless published.
struct Staging {
    path: PathBuf,
    published: bool,
}

impl Staging {
    fn beside(out_dir: &Path) -> Result<Self, EngineError> {
        let name =
            out_dir.file_name().ok_or_else(|| EngineError::model(out_dir, "is not a folder's name"))?;
        let name = format!(".{}.importing-{}", name.to_string_lossy(), std::process::id());
        let path = out_dir.with_file_name(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).map_err(|e| EngineError::model(&path, format!("cannot be made: {e}")))?;
        Ok(Self { path, published: false })
    }

    fn publish(mut self, out_dir: &Path) -> Result<(), EngineError> {
        fs::rename(&self.path, out_dir)
            .map_err(|e| EngineError::model(out_dir, format!("cannot be moved into place: {e}")))?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
