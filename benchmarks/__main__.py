"""Speed and memory of the library on this machine.

python -m benchmarks                       all but the CIFAR-10-sized network (some minutes)
python -m benchmarks sampling              the loop against the bare network calls
python -m benchmarks training              forward against reverse mode, both networks
python -m benchmarks distance              the Frechet distance
python -m benchmarks race                  against the released code's procedure, restated
python -m benchmarks growth                by images, NFE, pixels and methods
python -m benchmarks memory                by images
python -m benchmarks cluster               by workers
python -m benchmarks all --output FILE     everything, and the figures as JSON
python -m benchmarks gpu                   the paper's networks on a GPU; into data/results/gpu
"""

import argparse
import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from amedlib.files import write_atomically
from amedlib.study.store import RESULTS

from . import cluster, distance, gpu, growth, race, sampling, training

PARTS = {
    "sampling": [sampling.rows],
    "training": [lambda: training.rows("digits"), lambda: training.rows("cifar10")],
    "distance": [distance.rows],
    "race": [
        lambda: race.training("digits"),
        race.sampling,
        race.distance,
        race.table,
        lambda: race.training("cifar10"),
    ],
    "growth": [growth.rows],
    "memory": [growth.memory],
    "cluster": [cluster.rows],
    "sizes": [gpu.sizes],
    "simulation": [cluster.simulate, cluster.simulate_paper],
}


def machine(device: str = "cpu") -> dict:
    """What the figures depend on."""
    card = {}
    if torch.device(device).type == "cuda":
        card["card"] = torch.cuda.get_device_name(device)
        card["card's memory, GiB"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        card["CUDA"] = torch.version.cuda
    return card | {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all", "gpu"])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--threads", type=int, help="threads of PyTorch, the cores unless given")
    of_gpu = parser.add_argument_group("gpu")
    of_gpu.add_argument("--device", default="cuda")
    of_gpu.add_argument(
        "--seconds", type=float, default=400, help="after these nothing new is begun; 400"
    )
    of_gpu.add_argument("--networks", nargs="+", default=list(gpu.NETWORKS), metavar="DATASET")
    of_gpu.add_argument("--tiny", action="store_true", help="small networks, to try the code")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    # Without a name, all that is done in a few minutes.
    parts = {given.part: PARTS.get(given.part)}
    device = "cpu"
    if given.part == "all":
        parts = PARTS
    elif given.part == "gpu":
        device = given.device
        parts = gpu.parts(device, given.seconds, given.networks, given.tiny)
    elif given.part is None:
        parts = {name: benchmarks[:1] for name, benchmarks in PARTS.items()}
    report = {"machine": machine(device)}
    if given.part == "gpu" and not given.output:
        name = report["machine"].get("card", report["machine"]["processor"])
        given.output = RESULTS / "gpu" / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    print(pd.Series(report["machine"]).to_string())
    for name, benchmarks in parts.items():
        rows = []
        for benchmark in benchmarks:
            for row in tqdm(benchmark(), name, leave=False):
                rows.append(row)
                report[name] = rows
                if given.output:  # after every row: whatever ends this, what was measured stays
                    write_atomically(given.output, json.dumps(report, indent=1).encode())
        if not rows:
            print(f"\n{name}: not begun, the time is up", flush=True)
            continue
        table = pd.DataFrame(rows)
        table = table if len(table) > 4 else table.T
        print(f"\n{name}\n{table.to_string(float_format='{:.4g}'.format)}", flush=True)


if __name__ == "__main__":
    main()
