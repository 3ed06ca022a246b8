//! GGUF tensors told as safetensors: names, the order of q and k rows, bf16.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

use half::bf16;
use safetensors::tensor::{Dtype, View};

use super::gguf::{Gguf, Tensor};
use super::hf::Model;

/// What was written.
pub(super) struct Written {
    pub(super) tensors: usize,
    pub(super) parameters: u64,
}

/// Converts and writes tensor by tensor: memory holds one at a time.
pub(super) fn write(
    gguf: &Gguf<'_>,
    model: &Model,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Written, String> {
    let mut parts = Vec::new();
    for source in gguf.tensor_names() {
        let (Some(name), Some(tensor)) = (rename(source)?, gguf.tensor(source)) else {
            continue;
        };
        let heads = match source.rsplit_once('.').map(|(stem, _)| stem) {
            Some(stem) if model.permuted && stem.ends_with("attn_q") => Some(model.heads as usize),
            Some(stem) if model.permuted && stem.ends_with("attn_k") => Some(model.kv_heads as usize),
            _ => None,
        };
        if let Some(heads) = heads.filter(|&heads| tensor.shape[0] % (2 * heads) != 0) {
            return Err(format!(
                "tensor {source}: {} rows do not divide among {heads} heads",
                tensor.shape[0]
            ));
        }
        parts.push((name, tensor, heads));
    }
    let total = parts.iter().map(|part| part.1.data.len() as u64).sum();
    let written = Written {
        tensors: parts.len(),
        parameters: parts.iter().map(|part| part.1.shape.iter().product::<usize>() as u64).sum(),
    };
    let meter = RefCell::new(Meter { done: 0, total, progress });
    let views =
        parts.into_iter().map(|(name, tensor, heads)| (name, Converted { tensor, heads, meter: &meter }));
    let note = Some([("format".to_owned(), "pt".to_owned())].into());
    safetensors::serialize_to_file(views, note, path)
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    // The writer makes it private to its user; a model folder is for whoever may read the folder.
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(path, readable)
        .map_err(|e| format!("cannot publish {}: {e}", path.display()))?;
    Ok(written)
}

/// The Hugging Face name; `None` for tensors that hold nothing of the network.
fn rename(source: &str) -> Result<Option<String>, String> {
    let whole = match source {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Ok(Some(name.to_owned()));
    }
    let unknown = || format!("tensor {source} is not part of a network we know");
    let (layer, rest) = source.strip_prefix("blk.").and_then(|s| s.split_once('.')).ok_or_else(unknown)?;
    layer.parse::<u32>().map_err(|_| unknown())?;
    let (part, kind) = rest.rsplit_once('.').ok_or_else(unknown)?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return Err(unknown()),
    };
    if kind != "weight" && kind != "bias" {
        return Err(unknown());
    }
    Ok(Some(format!("model.layers.{layer}.{part}.{kind}")))
}

struct Meter<'a> {
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// A tensor that is converted when it is written.
struct Converted<'a> {
    tensor: &'a Tensor<'a>,
    /// Undo the permutation of this many heads.
    heads: Option<usize>,
    meter: &'a RefCell<Meter<'a>>,
}

impl View for Converted<'_> {
    fn dtype(&self) -> Dtype {
        if self.tensor.shape.len() == 1 { Dtype::F32 } else { Dtype::BF16 }
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut numbers = Vec::new();
        self.tensor.kind.unpack(self.tensor.data, &mut numbers);
        if let Some(heads) = self.heads {
            numbers = unpermute(&numbers, heads, self.tensor.shape[0]);
        }
        let bytes = match self.dtype() {
            Dtype::F32 => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        let mut meter = self.meter.borrow_mut();
        meter.done += self.tensor.data.len() as u64;
        let (done, total) = (meter.done, meter.total);
        (meter.progress)(done, total);
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        let count: usize = self.tensor.shape.iter().product();
        count * if self.dtype() == Dtype::F32 { 4 } else { 2 }
    }
}

/// Rows `[heads, head_dim / 2, 2]` → `[heads, 2, head_dim / 2]`: from pairs side by side to halves.
fn unpermute(numbers: &[f32], heads: usize, rows: usize) -> Vec<f32> {
    let width = numbers.len() / rows;
    let half = rows / heads / 2;
    let mut out = Vec::with_capacity(numbers.len());
    for head in 0..heads {
        for part in 0..2 {
            for pair in 0..half {
                let row = (head * half + pair) * 2 + part;
                out.extend_from_slice(&numbers[row * width..][..width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_return_to_halves() {
        // Two heads of four rows, one column: 0 2 1 3 | 4 6 5 7 was 0 1 2 3 | 4 5 6 7 interleaved.
        let rows: Vec<f32> = [0, 2, 1, 3, 4, 6, 5, 7].map(|x| x as f32).to_vec();
        assert_eq!(unpermute(&rows, 2, 8), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn names() {
        assert_eq!(rename("blk.7.attn_q.bias").unwrap().unwrap(), "model.layers.7.self_attn.q_proj.bias");
        assert!(rename("blk.x.attn_q.weight").is_err());
        assert!(rename("blk.1.ffn_gate_exps.weight").is_err());
    }
}
