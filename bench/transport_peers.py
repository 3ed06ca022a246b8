#!/usr/bin/env python3
"""Other movers of KV on loopback, host memory, two processes: what RESULTS-transport.md sets beside `tandem bench kv`.

  python3 -m venv peers && peers/bin/pip install mooncake-transfer-engine-non-cuda numpy && peers/bin/pip install --no-deps nixl-cu12
  peers/bin/python bench/transport_peers.py mooncake|nixl-tcp|nixl   [MiB a push] [runs]
"""
import json, multiprocessing, os, statistics, sys, time

KIND = sys.argv[1]
MIB, RUNS = (int(v) for v in (sys.argv[2:] + ["512", "3"][len(sys.argv[2:]):]))
BLOCKS = [16 << 10, 64 << 10, 256 << 10, 1 << 20]
TOTAL = MIB << 20


def memory():
    import numpy
    return numpy.full(TOTAL, 7, dtype=numpy.uint8)


def mooncake_far(pipe):
    from mooncake.engine import TransferEngine
    engine, pool = TransferEngine(), memory()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(pool.ctypes.data, TOTAL) == 0
    pipe.send((f"127.0.0.1:{engine.get_rpc_port()}", pool.ctypes.data))
    pipe.recv()


def mooncake(pipe):
    from mooncake.engine import TransferEngine
    engine, pool = TransferEngine(), memory()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(pool.ctypes.data, TOTAL) == 0
    target, base = pipe.recv()
    here = pool.ctypes.data

    def push(block, count, keep=pool):  # what is not named here would be freed
        for start in range(0, count, 256):  # larger batches are refused
            at = [i * block for i in range(start, min(count, start + 256))]
            sizes = [block] * len(at)
            assert engine.batch_transfer_sync_write(target, [here + a for a in at], [base + a for a in at], sizes) == 0
    return push


def nixl_agent(name):
    from nixl_cu12._api import nixl_agent, nixl_agent_config
    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def nixl_far(pipe):
    agent, pool = nixl_agent("far"), memory()
    agent.register_memory([(pool.ctypes.data, TOTAL, 0, "")], "DRAM")
    pipe.send((agent.get_agent_metadata(), pool.ctypes.data))
    pipe.recv()


def nixl(pipe):
    agent, pool = nixl_agent("near"), memory()
    agent.register_memory([(pool.ctypes.data, TOTAL, 0, "")], "DRAM")
    metadata, base = pipe.recv()
    peer, here, handles = agent.add_remote_agent(metadata), pool.ctypes.data, {}

    def push(block, count, keep=pool):
        if (block, count) not in handles:
            local = agent.get_xfer_descs([(here + i * block, block, 0) for i in range(count)], "DRAM")
            remote = agent.get_xfer_descs([(base + i * block, block, 0) for i in range(count)], "DRAM")
            handles[block, count] = agent.initialize_xfer("WRITE", local, remote, peer)
        handle = handles[block, count]
        state = agent.transfer(handle)
        while state != "DONE":
            assert state != "ERR"
            state = agent.check_xfer_state(handle)
    return push


if KIND == "nixl-tcp":
    os.environ.update(UCX_TLS="tcp", UCX_NET_DEVICES="lo")
far, near = (mooncake_far, mooncake) if KIND == "mooncake" else (nixl_far, nixl)
ours, theirs = multiprocessing.get_context("spawn").Pipe()
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=far, args=(theirs,), daemon=True)
    child.start()
    push = near(ours)
    for block in BLOCKS:
        rates = []
        for run in range(RUNS + 1):
            started = time.perf_counter()
            push(block, TOTAL // block)
            rates.append(TOTAL / (time.perf_counter() - started) / 1e9)
        times = []
        for _ in range(200):
            started = time.perf_counter()
            push(block, 1)
            times.append((time.perf_counter() - started) * 1e6)
        rates, times = sorted(rates[1:]), sorted(times)
        print(json.dumps({"kind": KIND, "block": block, "gb_per_s": [round(rates[0], 2), round(statistics.median(rates), 2),
              round(rates[-1], 2)], "p50_us": round(times[100]), "p99_us": round(times[198])}), flush=True)
    os._exit(0)
