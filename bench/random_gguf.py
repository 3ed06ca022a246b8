#!/usr/bin/env python3
"""Random weights of a shape as GGUF, without a vocabulary, for llama.cpp: python3 bench/random_gguf.py FOLDER (needs numpy and gguf)."""
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
shapes={'smollm2':(30,576,1536,9,3,64,49152,True),'llama-1b':(22,2048,5632,32,4,64,32000,False)}
def make(name,kind):
    L,h,f,H,KV,d,V,tied=shapes[name]
    w=gguf.GGUFWriter(f'{sys.argv[1]}/{name}-{kind}.gguf','llama')
    w.add_context_length(8192); w.add_embedding_length(h); w.add_block_count(L); w.add_feed_forward_length(f)
    w.add_head_count(H); w.add_head_count_kv(KV); w.add_key_length(d); w.add_value_length(d); w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e5); w.add_rope_dimension_count(d); w.add_vocab_size(V); w.add_tokenizer_model('none')
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if kind=='bf16' else gguf.LlamaFileType.MOSTLY_Q8_0)
    t=T.BF16 if kind=='bf16' else T.Q8_0
    rng=np.random.default_rng(1)
    def m(n,r,c):
        a=rng.standard_normal((r,c),dtype=np.float32)*0.02
        w.add_tensor(n,gguf.quants.quantize(a,t),raw_dtype=t)
    def v(n,c): w.add_tensor(n,np.ones(c,np.float32))
    m('token_embd.weight',V,h)
    for i in range(L):
        p=f'blk.{i}.'
        v(p+'attn_norm.weight',h); v(p+'ffn_norm.weight',h)
        m(p+'attn_q.weight',H*d,h); m(p+'attn_k.weight',KV*d,h); m(p+'attn_v.weight',KV*d,h); m(p+'attn_output.weight',h,H*d)
        m(p+'ffn_gate.weight',f,h); m(p+'ffn_up.weight',f,h); m(p+'ffn_down.weight',h,f)
    v('output_norm.weight',h)
    if not tied: m('output.weight',V,h)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
for n in shapes:
    for k in ('bf16','q8_0'): make(n,k)
