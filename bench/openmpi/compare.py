#!/usr/bin/env python3
"""Compares the host backend with OpenMPI on this machine: all-reduce and all-gather of f32, side by side.

Needs OpenMPI's mpicc and mpirun (Debian: openmpi-bin libopenmpi-dev). Builds and runs both sides with the same sizes,
batches, calls and kind of memory, alternating, and prints one table: OpenMPI's time, ours, and how many times faster
ours is. A run's time is the median of its batches; of the rounds the fastest counts, for both sides, because what
else a machine does only ever adds. Neither side binds its ranks to processors. Takes a minute or two once built.

    bench/openmpi/compare.py [--world 2,4] [--rounds 3] [--transport processes,direct,shm,allocated]

OpenMPI's ranks are processes, and so are ours in the column "processes"; in the others they are threads.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(command, **options):
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **options)
    if done.returncode != 0:
        sys.exit(f"failed with {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def build_ours():
    lines = run(["cargo", "bench", "-p", "comm-core", "--bench", "host_latency", "--no-run", "--message-format=json"])
    for line in lines.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "host_latency":
            return pathlib.Path(message["executable"])
    sys.exit("cargo built no host_latency")


def build_theirs():
    out = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "openmpi"
    out.mkdir(parents=True, exist_ok=True)
    run(["mpicc", "-O3", "-march=native", "-o", out / "latency", ROOT / "bench" / "openmpi" / "latency.c"])
    return out / "latency"


def measured(command):
    lines = (line.split() for line in run(command, timeout=600).splitlines())
    return {(op, int(bytes)): float(time) for op, bytes, time in lines}


def ours_with(ours, world, transport):
    if transport == "processes":
        return [ours, "--world", str(world), "--transport", "shm", "--processes"]
    return [ours, "--world", str(world), "--transport", transport]


def human(count):
    for unit in ("", "K", "M"):
        if count < 1024:
            return f"{count}{unit}"
        count //= 1024
    return f"{count}G"


def main():
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="2,4")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, the fastest of which counts")
    parser.add_argument("--transport", default="processes,direct")
    options = parser.parse_args()
    for tool in ("mpicc", "mpirun"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is not on PATH; on Debian: apt-get install openmpi-bin libopenmpi-dev")
    ours, theirs = build_ours(), build_theirs()
    transports = options.transport.split(",")
    head = f"{'op':<11}{'ranks':>6}{'bytes':>7}{'OpenMPI us':>12}"
    print(head + "".join(f"{name + ' us':>14}{'ratio':>7}" for name in transports))
    for world in map(int, options.world.split(",")):
        mpirun = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(world)]
        if os.geteuid() == 0:
            mpirun.insert(1, "--allow-run-as-root")
        runs = {"OpenMPI": []} | {name: [] for name in transports}
        for _ in range(options.rounds):
            runs["OpenMPI"].append(measured([*mpirun, theirs]))
            for name in transports:
                runs[name].append(measured(ours_with(ours, world, name)))
        for key in runs["OpenMPI"][0]:
            fastest = {name: min(run[key] for run in each) for name, each in runs.items()}
            peer = fastest["OpenMPI"]
            row = f"{key[0]:<11}{world:>6}{human(key[1]):>7}{peer:>12.2f}"
            print(row + "".join(f"{fastest[name]:>14.2f}{peer / fastest[name]:>7.2f}" for name in transports))
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
