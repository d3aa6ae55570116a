"""Speed and memory of the library on this machine.

python -m benchmarks                       all but the CIFAR-10-sized network (some minutes)
python -m benchmarks sampling              the loop against the bare network calls
python -m benchmarks training              forward against reverse mode, both networks
python -m benchmarks distance              the Frechet distance
python -m benchmarks all --output FILE     everything, and the figures as JSON
"""

import argparse
import json
import os
import platform
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from amedlib.files import write_atomically

from . import distance, sampling, training

PARTS = {
    "sampling": [sampling.rows],
    "training": [lambda: training.rows("digits"), lambda: training.rows("cifar10")],
    "distance": [distance.rows],
}


def machine() -> dict:
    """What the figures depend on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "all"])
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--threads", type=int, help="threads of PyTorch, the cores unless given")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # Without a name, all that is done in a few minutes.
    parts = {arguments.part: PARTS.get(arguments.part)}
    if arguments.part == "all":
        parts = PARTS
    elif arguments.part is None:
        parts = {name: benchmarks[:1] for name, benchmarks in PARTS.items()}
    report = {"machine": machine()}
    print(pd.Series(report["machine"]).to_string())
    for name, benchmarks in parts.items():
        rows = [row for benchmark in benchmarks for row in tqdm(benchmark(), name, leave=False)]
        report[name] = rows
        table = pd.DataFrame(rows)
        table = table if len(table) > 4 else table.T
        print(f"\n{name}\n{table.to_string(float_format='{:.4g}'.format)}", flush=True)
        if arguments.output:
            write_atomically(arguments.output, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
