#!/usr/bin/env python3
"""Ways to serve both phases, on one GPU or two, with a Llama-3.1-8B shape and random weights: open-loop load and saturation.

    python3 bench/serve_gpu.py --tandem target/release/tandem --tokenizer DIR --out serve.json
    python3 bench/serve_gpu.py --gpus 2 --rates 10,20.8,34,41.6 --concurrency 512 --tandem …

DIR holds a tokenizer.json and a tokenizer_config.json. Wants torch and safetensors, 16 GB of disk and 60 GB of memory. Prompts are random
tokens without a common prefix, answers have exactly the wanted length; weights are drawn from N(0, 0.02), norms are 1. Below each row
stands what the processes did meanwhile.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import processes
import serve_watch

SHAPE = dict(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
# gpus → name → what `--strategy` says, and the workers: role, which GPU, flags
CHUNKS = {f"chunked: {n} tokens a step": n for n in (512, 2048)}
WAYS = {
    1: {
        "shared: whole prompts on the decode worker": ("shared", [("decode", 0, ["--step-tokens", "8192"])]),
        **{name: ("chunked", [("decode", 0, ["--step-tokens", str(n)])]) for name, n in CHUNKS.items()},
        **{f"priority: decode first, ITL limit {n} ms": ("priority", [("decode", 0, ["--step-tokens", "2048", "--slo-itl-ms", str(n)])]) for n in (15, 30)},
        "disaggregated: two processes share the one GPU": ("disaggregated", [("decode", 0, []), ("prefill", 0, [])]),
    },
    2: {
        "shared: whole prompts, a worker on each": ("shared", [("decode", gpu, ["--step-tokens", "8192"]) for gpu in (0, 1)]),
        **{f"{name}, a worker on each": ("chunked", [("decode", gpu, ["--step-tokens", str(n)]) for gpu in (0, 1)]) for name, n in CHUNKS.items()},
        "disaggregated: prefill on one, decode on the other": ("disaggregated", [("decode", 0, []), ("prefill", 1, [])]),
        "adaptive: prefill on one, decode on the other": ("adaptive", [("decode", 0, ["--step-tokens", "512"]), ("prefill", 1, [])]),
    },
}
# By the number of GPUs; with two, a decode worker's pool holds its 256 sequences.
KV_MIB = {1: {"decode": 20480, "prefill": 8192}, 2: {"decode": 40960, "prefill": 8192}}


def make_model(folder, tokenizer):
    import torch
    from safetensors.torch import save_file

    s = argparse.Namespace(**SHAPE)
    generator = torch.Generator(device="cuda").manual_seed(1)

    def draw(*shape):
        return (torch.randn(*shape, device="cuda", generator=generator) * 0.02).to(torch.bfloat16).cpu()

    one = torch.ones(s.hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": draw(s.vocab, s.hidden), "lm_head.weight": draw(s.vocab, s.hidden), "model.norm.weight": one}
    for layer in range(s.layers):
        at = f"model.layers.{layer}."
        tensors[at + "self_attn.q_proj.weight"] = draw(s.heads * s.head_dim, s.hidden)
        tensors[at + "self_attn.k_proj.weight"] = draw(s.kv_heads * s.head_dim, s.hidden)
        tensors[at + "self_attn.v_proj.weight"] = draw(s.kv_heads * s.head_dim, s.hidden)
        tensors[at + "self_attn.o_proj.weight"] = draw(s.hidden, s.heads * s.head_dim)
        tensors[at + "mlp.gate_proj.weight"] = draw(s.ffn, s.hidden)
        tensors[at + "mlp.up_proj.weight"] = draw(s.ffn, s.hidden)
        tensors[at + "mlp.down_proj.weight"] = draw(s.hidden, s.ffn)
        tensors[at + "input_layernorm.weight"] = one.clone()
        tensors[at + "post_attention_layernorm.weight"] = one.clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16", hidden_act="silu", attention_bias=False,
        hidden_size=s.hidden, num_hidden_layers=s.layers, num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        intermediate_size=s.ffn, vocab_size=s.vocab, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=None, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)))
    del tensors
    torch.cuda.empty_cache()


def one_way(options, model, way, loads):
    """Starts a cluster, puts the loads on it, stops it."""
    strategy, workers = WAYS[options.gpus][way]
    router, *ports = (processes.free_port() for _ in range(1 + len(workers)))
    commands = [[options.tandem, "router", "--model", model, "--listen", f"127.0.0.1:{router}", "--strategy", strategy]]
    for port, (role, gpu, flags) in zip(ports, workers):
        commands.append([options.tandem, role, "--model", model, "--registry", f"127.0.0.1:{router}", "--device", "cuda", "--gpu", gpu, "--log", "warn",
                         "--listen", f"127.0.0.1:{port}", "--kv-mib", KV_MIB[options.gpus][role], "--strategy", strategy, *flags, *options.flags.split()])
    names = ["router"] + [f"{role} on GPU {gpu}" for role, gpu, _ in workers]
    with processes.cluster(way, commands, ports, 200) as (running, seconds):
        print(f"{way}: ready after {seconds:.1f} s", flush=True)
        seen = {name: (process.pid, port) for name, process, port in zip(names, running, (router, *ports))}
        rows = []
        for number, load in enumerate(loads):
            # A seed for each load, the same for all ways: an earlier load's prompts would be in the prefix caches.
            command = [options.tandem, "bench", "serve", "--addr", f"127.0.0.1:{router}", "--json", "--seconds", options.seconds,
                       "--warm-up", options.warm_up, "--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens,
                       "--spread", "0.1", "--seed", 7 + number, *load]
            watch = serve_watch.Watch(seen, options.warm_up, options.seconds)
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"{way} {load}: {done.stderr}", flush=True)
                continue
            row = json.loads(done.stdout)["loads"][0]
            rows.append(row | {"processes": watch.told()})
            t, i, e = row["ttft_ms"], row["itl_ms"], row["e2e_ms"]
            print(f"| {way} | {row['load']} | {row['requests_per_second']:.1f} | {t['p50']:.0f} / {t['p99']:.0f} | {i['p50']:.1f} / {i['p99']:.1f} / {i['p999']:.0f} "
                  f"| {e['p50']:.0f} / {e['p99']:.0f} | {row['output_tokens_per_second']:.0f} | {row['shed'] + row['failed']} |", flush=True)
            print("\n".join(serve_watch.words(watch.seen)), flush=True)
        return {"way": way, "loads": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True)
    parser.add_argument("--tokenizer", required=True, type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--gpus", type=int, choices=WAYS, default=1)
    parser.add_argument("--flags", default="", help="further flags for every worker, in one string")
    parser.add_argument("--prompt-tokens", default=1024, type=int)
    parser.add_argument("--output-tokens", default=128, type=int)
    parser.add_argument("--kv-heads", default=SHAPE["kv_heads"], type=int, help="fewer: the same model with less KV")
    parser.add_argument("--model", type=pathlib.Path, help="a folder to keep the model in; made where it is not there yet")
    parser.add_argument("--rates", default="17,20.8", help="open loads, requests a second; none: \"\"")
    parser.add_argument("--concurrency", default="256", help="closed loads, requests at a time")
    parser.add_argument("--seconds", default=24.0, type=float)
    parser.add_argument("--warm-up", default=6.0, type=float)
    parser.add_argument("--only", default="", help="ways whose name contains one of these, comma-separated, in this order")
    options = parser.parse_args()
    SHAPE["kv_heads"] = options.kv_heads
    wanted = [[w for w in WAYS[options.gpus] if part in w] for part in options.only.split(",")]
    loads = [[flag, value] for flag, values in (("--rate", options.rates), ("--concurrency", options.concurrency))
             for value in filter(None, values.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or pathlib.Path(folder) / "llama-8b"
        if not (model / "config.json").exists():
            make_model(model, options.tokenizer)
            print("model written", flush=True)
        seen = []
        for way in dict.fromkeys(sum(wanted, [])):
            seen.append(one_way(options, model, way, loads))
            if options.out:
                options.out.write_text(json.dumps(seen, indent=1))


main()
