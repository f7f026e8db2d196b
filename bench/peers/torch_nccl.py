"""PyTorch's NCCL collectives, timed the way `cargo xtask bench --graph` times ours.

One process per rank, started with torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Prints one JSON
object per line on rank 0: {"op", "dtype", "bytes", "world", "in_place", "us"}, where "us" is the time of one operation in a replayed CUDA
graph of back-to-back operations: the median over replays on each rank, then the slowest rank. "bytes" is the size of the full buffer.
Operations that have an in-place form run in place. What is not measured has "reason" in place of "us".
"""

import argparse
import json
import os
import statistics

import torch
import torch.distributed as dist

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


# Operations whose full buffer is made of one equal part per rank.
SPLIT = {"all_gather", "reduce_scatter", "all_to_all"}


def operation(op, full, rank, world):
    """The call to time, and whether it works in place."""
    if op == "all_to_all":
        received = torch.empty_like(full)
        return lambda: dist.all_to_all_single(received, full), False
    own = full.chunk(world)[rank] if op in SPLIT else full
    return {
        "all_reduce": lambda: dist.all_reduce(full),
        "all_gather": lambda: dist.all_gather_into_tensor(full, own),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(own, full),
        "broadcast": lambda: dist.broadcast(full, 0),
        "reduce": lambda: dist.reduce(full, 0),
    }[op], True


def graph_time_us(issue, iterations, replays):
    """Microseconds per call of `issue`, in a graph of `iterations` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            issue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(iterations):
            issue()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # absorbs the ranks' different starting times
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / iterations)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", default="all_reduce,all_gather,reduce_scatter,broadcast,reduce,all_to_all")
    parser.add_argument("--bytes", required=True, help="comma-separated sizes of the full buffer")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--iters", type=int, help="operations in a graph; by size when absent")
    args = parser.parse_args()

    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = DTYPES[args.dtype]

    for op in args.ops.split(","):
        for size in map(int, args.bytes.split(",")):
            line = {"op": op, "dtype": args.dtype, "bytes": size, "world": world}
            count = size // dtype.itemsize
            if op in SPLIT and count % world:
                line["reason"] = f"PyTorch needs an element count that is a multiple of {world}"
            else:
                iterations = args.iters or (20 if size <= 8 << 20 else 5)
                issue, line["in_place"] = operation(op, torch.ones(count, device="cuda", dtype=dtype), rank, world)
                line["us"] = graph_time_us(issue, iterations, args.replays)
            if rank == 0:
                print(json.dumps(line), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
