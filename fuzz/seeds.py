#!/usr/bin/env python3
"""Writes the seeds of every fuzz target: small valid inputs, from which the fuzzer goes on. `python3 fuzz/seeds.py`."""

import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"


def seed(target, name, data):
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    """One protobuf field: an integer, a float, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def name(text):
    return bytes([len(text)]) + text.encode()


def kv():
    for kind in range(1, 17):
        seed("kv_frames", f"kind-{kind}", struct.pack("<BBHIII16sQI", kind, 0, 1, 12, 64, 7, b"t" * 16, 3, 1))
    hello = struct.pack("<H", 1) + name("prefill-0") + struct.pack("<Q", 7) + name("decode-0") + struct.pack("<Q", 9)
    seed("kv_frames", "hello", hello)
    seed("kv_frames", "cells", struct.pack("<6I", 0, 1, 2, 3, 4, 5))
    ticket = b"TDMT" + struct.pack("<H16s16s", 1, b"t" * 16, b"s" * 16) + name("decode-0")
    ticket += struct.pack("<QQIQ", 9, 3, 1, 1000) + struct.pack("<IQI", 4, 1 << 20, 1024) + bytes([1]) + name("127.0.0.1:7000")
    ticket += struct.pack("<IIIII", 2, 0, 3, 8, 2) + struct.pack("<I", 4) + b"meta"
    seed("ticket", "two-runs", ticket)


def requests():
    sampling = field(1, 0.5) + field(2, 0.9) + field(5, 1.0)
    sequence = field(1, "id") + field(2, 1) + field(3, b"".join(map(varint, [1, 2, 3]))) + field(4, sampling) + field(5, 8) + field(8, 2)
    for n in (7, 8, 9, 10):
        seed("worker_request", f"decode-{n}", field(1, sequence + field(n, 1)) + field(2, "fuzz"))
    chat = field(1, field(1, "user") + field(2, "hello"))
    tools = field(2, field(1, "look") + field(2, "looks") + field(3, '{"type": "object"}'))
    for number, given in enumerate([field(2, "a text"), field(3, chat), field(3, chat + tools), field(4, field(1, b"\1\2\3"))]):
        seed("generate_request", f"input-{number}", field(1, "id") + given + field(5, field(1, 0.5) + field(6, 7)))
    sampled = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 8, "seed": -1, "stop": ["\n"], "logit_bias": {"3": 1}, "n": 2}
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    parts = [{"type": "text", "text": "hello"}]
    for title, body in {
        "chat": {"messages": [{"role": "user", "content": "hello"}], **sampled},
        "parts": {"messages": [{"role": "user", "content": parts}], "stream": True, "stream_options": {"include_usage": True}},
        "tools": {"messages": [{"role": "user", "content": "look"}], "tools": [tool], "tool_choice": "required"},
        "text": {"prompt": "hello", **sampled, "logprobs": 2},
        "texts": {"prompt": ["a", "b"]},
        "tokens": {"prompt": [[1, 2], [3]]},
        "regex": {"prompt": "a", "structured_outputs": {"regex": "[a-z]{3}"}},
        "schema": {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}},
    }.items():
        seed("http_body", title, json.dumps(body))


def texts():
    loop = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    seed("template", "loop", "hello\n" + loop)
    seed("template", "methods", "a,b\n{% set x = messages[1]['content'].split(',') %}{{ x | tojson }}{{ 'a' * 3 }}{{ x[0].upper() }}")
    seed("template", "macro", "x\n{% macro f(a, b=2) %}{{ a ~ b }}{% endmacro %}{{ f(messages | length) }}{{ raise_exception('no') }}")
    seed("template", "namespace", "x\n{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
                                  "{{ strftime_now('%Y') }}{% if tools is defined %}{{ tools }}{% endif %}")
    call = '{"name": "look", "arguments": {"a": 1}}'
    for number, text in enumerate([f"Well. <tool_call>{call}</tool_call> done", call.replace("arguments", "parameters"), f"[TOOL_CALLS][{call}]"]):
        for pieces in (0, 3):
            seed("tool_calls", f"{number}-{pieces}", bytes([number + 48 * bool(pieces)]) + text.encode())
    seed("grammar", "lark", b"\0" + b'start: "a" (b | /[0-9]+/)*\nb: "b"\n')
    seed("grammar", "regex", b"\1" + rb"(a|b)*c{2,3}[^\n]\d+")
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}, "b": {"enum": ["x", 1]}}, "required": ["a"]}
    seed("grammar", "schema", b"\2" + json.dumps(schema).encode())
    seed("grammar", "recursive", b"\2" + json.dumps({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}).encode())
    seed("trace", "mooncake", '{"timestamp": 0, "input_length": 10, "output_length": 3, "hash_ids": [1, 2]}\n{"timestamp": 5, "input_length": 1, "output_length": 1}\n')
    seed("trace", "azure", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n")


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def gguf():
    def strings(values):
        return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))
    keys = [("general.architecture", 8, text("llama")), ("general.name", 8, text("tiny"))]
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 4, "attention.head_count": 2,
             "attention.head_count_kv": 1}
    keys += [(f"llama.{key}", 4, struct.pack("<I", n)) for key, n in sizes.items()]
    keys += [("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)), ("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
             ("tokenizer.ggml.model", 8, text("gpt2")), ("tokenizer.ggml.pre", 8, text("smollm")),
             ("tokenizer.ggml.tokens", 9, strings(["<s>", "a", "b", "ab"])), ("tokenizer.ggml.merges", 9, strings(["a b"])),
             ("tokenizer.ggml.token_type", 9, struct.pack("<IQ4i", 5, 4, 3, 1, 1, 1)),
             ("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 0)), ("tokenizer.ggml.eos_token_id", 4, struct.pack("<I", 0))]
    shapes = {"token_embd": (4, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,), "blk.0.attn_q": (8, 8),
              "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (4, 8),
              "blk.0.ffn_up": (4, 8), "blk.0.ffn_down": (8, 4)}
    for title, kind in (("f32", 0), ("f16", 1)):
        infos, data = b"", b""
        for tensor, shape in shapes.items():
            count, code = shape[0] * (shape[1:] or (1,))[0], kind if len(shape) > 1 else 0
            infos += text(f"{tensor}.weight") + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
            infos += struct.pack("<IQ", code, len(data))
            data += bytes(count * (2 if code else 4))
            data += bytes(-len(data) % 32)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys)) + b"".join(text(k) + struct.pack("<I", t) + v for k, t, v in keys) + infos
        seed("gguf", title, head + bytes(-len(head) % 32) + data)


def folders():
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}})
    seed("safetensors", "two", struct.pack("<Q", len(header)) + header.encode() + bytes(24))
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264, "rms_norm_eps": 1e-5}
    seed("config", "llama", json.dumps(plain))
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    seed("config", "scaled", json.dumps({**plain, "max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": scaled, "eos_token_id": [1, 2]}))
    qwen = {**plain, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    seed("config", "qwen2", json.dumps(qwen))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}|\\s+"}, "behavior": "Isolated", "invert": False}
    for title, before in (("byte-level", level), ("split", {"type": "Sequence", "pretokenizers": [split, level]})):
        seed("tokenizer", title, json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"}, "pre_tokenizer": before,
            "added_tokens": [{"id": 4, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}],
            "post_processor": level, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3}, "merges": [["a", "b"]]}}))


if __name__ == "__main__":
    for make in (kv, requests, texts, gguf, folders):
        make()
