//! GGUF files made here, read back through the public path; hostile ones refused.

#![allow(clippy::unwrap_used)]

use engine::import::{gguf::Gguf, import_gguf};
use engine::model::{ModelConfig, WeightSource, Weights};
use proptest::prelude::*;

/// Writes GGUF version 3.
#[derive(Default)]
struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Writer {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn key(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        Self::text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }

    fn string(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, value);
        self.key(key, 8, &bytes)
    }

    fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|v| Self::text(&mut bytes, v));
        self.key(key, 9, &bytes)
    }

    fn number(self, key: &str, value: u32) -> Self {
        self.key(key, 4, &value.to_le_bytes())
    }

    /// F32; `shape` slowest first.
    fn tensor(mut self, name: &str, shape: &[u64], first: f32) -> Self {
        Self::text(&mut self.infos, name);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|d| self.infos.extend(d.to_le_bytes()));
        self.infos.extend(0u32.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        let count: u64 = shape.iter().product();
        (0..count).for_each(|i| self.data.extend((first + i as f32).to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensor_count += 1;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(&self.keys);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn tiny() -> Writer {
    Writer::default()
        .string("general.architecture", "llama")
        .string("general.name", "tiny")
        .number("llama.block_count", 1)
        .number("llama.context_length", 64)
        .number("llama.embedding_length", 8)
        .number("llama.feed_forward_length", 4)
        .number("llama.attention.head_count", 2)
        .number("llama.attention.head_count_kv", 1)
        .key("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes())
        .key("llama.rope.freq_base", 6, &10_000f32.to_le_bytes())
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &["<s>", "a", "b", "ab"])
        .strings("tokenizer.ggml.merges", &["a b"])
        .key("tokenizer.ggml.token_type", 9, &token_types(&[3, 1, 1, 1]))
        .number("tokenizer.ggml.bos_token_id", 0)
        .number("tokenizer.ggml.eos_token_id", 0)
        .tensor("token_embd.weight", &[4, 8], 0.0)
        .tensor("output_norm.weight", &[8], 1.0)
        .tensor("blk.0.attn_norm.weight", &[8], 1.0)
        .tensor("blk.0.ffn_norm.weight", &[8], 1.0)
        .tensor("blk.0.attn_q.weight", &[8, 8], 0.0)
        .tensor("blk.0.attn_k.weight", &[4, 8], 0.0)
        .tensor("blk.0.attn_v.weight", &[4, 8], 0.0)
        .tensor("blk.0.attn_output.weight", &[8, 8], 0.0)
        .tensor("blk.0.ffn_gate.weight", &[4, 8], 0.0)
        .tensor("blk.0.ffn_up.weight", &[4, 8], 0.0)
        .tensor("blk.0.ffn_down.weight", &[8, 4], 0.0)
}

fn token_types(kinds: &[i32]) -> Vec<u8> {
    let mut bytes = 5u32.to_le_bytes().to_vec();
    bytes.extend((kinds.len() as u64).to_le_bytes());
    kinds.iter().for_each(|k| bytes.extend(k.to_le_bytes()));
    bytes
}

#[test]
fn a_tiny_file_becomes_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, out) = (dir.path().join("tiny.gguf"), dir.path().join("tiny"));
    std::fs::write(&gguf, tiny().bytes()).unwrap();
    let mut seen = Vec::new();
    let report = import_gguf(&gguf, &out, &mut |done, total| seen.push((done, total))).unwrap();
    assert_eq!((report.tensors, report.vocab, report.architecture.as_str()), (11, 4, "LlamaForCausalLM"));
    assert!(seen.windows(2).all(|w| w[0].0 < w[1].0) && seen.last().unwrap().0 == seen[0].1);

    let config = ModelConfig::load(&out).unwrap();
    assert_eq!((config.hidden, config.head_dim, config.rms_eps), (8, 4, 1e-5));
    assert!(config.tie_embeddings);
    let weights = Weights::open(&out).unwrap();
    let k = weights.matrix("model.layers.0.self_attn.k_proj.weight", 4, 8).unwrap();
    // One head of four rows: stored 0 2 1 3.
    let rows: Vec<f32> = k.numbers().chunks(8).map(|row| row[0].to_f32()).collect();
    assert_eq!(rows, [0.0, 16.0, 8.0, 24.0]);

    let tokenizer = tokenizers::Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode("<s>abba", true).unwrap();
    assert_eq!(ids.get_ids(), [0, 3, 2, 1]);
    let again = import_gguf(&gguf, &out, &mut |_, _| {}).unwrap_err();
    assert!(again.to_string().contains("exists already"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "staging folders left behind");
}

#[test]
fn refusals_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, out) = (dir.path().join("x.gguf"), dir.path().join("x"));
    for (bytes, words) in [
        (b"GGML....".to_vec(), "magic"),
        (Writer::default().string("general.architecture", "gpt-j").bytes(), "gpt-j is not known"),
        (Writer::default().bytes(), "general.architecture is missing"),
        (tiny().bytes()[..2000].to_vec(), "truncated"),
        (tiny().tensor("blk.0.mystery.weight", &[2, 2], 0.0).bytes(), "mystery"),
        (tiny().string("tokenizer.chat_template", "x").string("general.name", "y").bytes(), "twice"),
    ] {
        std::fs::write(&gguf, bytes).unwrap();
        let reason = import_gguf(&gguf, &out, &mut |_, _| {}).unwrap_err().to_string();
        assert!(reason.contains(words), "{reason}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}

#[test]
fn hostile_counts_allocate_nothing() {
    for at in [8, 16] {
        let mut bytes = tiny().bytes();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Gguf::parse(&bytes).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn flipped_bits_never_panic(flips in proptest::collection::vec((0usize..3000, 0u8..8), 1..6), cut in 0usize..3400) {
        let mut bytes = tiny().bytes();
        for (at, bit) in flips {
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
        }
        bytes.truncate(cut.max(4));
        let _ = Gguf::parse(&bytes);
    }

    #[test]
    fn flipped_bits_never_panic_in_a_whole_import(at in 0usize..2200, bit in 0u8..8) {
        let mut bytes = tiny().bytes();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let dir = tempfile::tempdir().unwrap();
        let gguf = dir.path().join("t.gguf");
        std::fs::write(&gguf, bytes).unwrap();
        let _ = import_gguf(&gguf, &dir.path().join("t"), &mut |_, _| {});
    }
}
