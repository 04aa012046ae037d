"""Run every benchmark for both models, each in its own process, and print a summary.

    python -m benchmarks.all --quick          check that all run: about five minutes on two cores
    python -m benchmarks.all --device cuda    real figures: nothing else may run on the machine

On a GPU whose figures gpu_budget.py knows, first and later epochs are compared with its roofline.
Exits with 1 if one of them failed; the others still run.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import MODELS

BENCHMARKS = {  # name: arguments of the command
    "first epoch": ["throughput", "--phase", "first"],
    "later epochs": ["throughput", "--phase", "later"],
    "wall-clock": ["throughput", "--phase", "wall"],
    "memory": ["memory"],
    "cross_attention": ["cross_attention"],
    "lora_linear": ["lora_linear"],
    "variants": ["variants"],
    "generate": ["generate"],
    "features": ["features"],
    "checkpointing": ["checkpointing"],
    "input_path": ["input_path"],
    "data": ["data"],
    "ranks": ["ranks"],
    "learning": ["learning"],
    "gpu_budget": ["gpu_budget"],
}
ON_CPU = {"input_path", "data", "ranks", "learning", "gpu_budget"}  # whatever --device is
COUNTED = {"gpu_budget"}  # once


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: CUDA if there is one")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, help="default: that of each benchmark")
    parser.add_argument("--quick", action="store_true", help="small models, 2 rounds")
    arguments = parser.parse_args(argv)
    summary = []
    num_failed = 0
    for name in arguments.only:
        for model in arguments.models:
            command = [sys.executable, "-m", f"benchmarks.{BENCHMARKS[name][0]}"]
            command += [*BENCHMARKS[name][1:], "--model", model]
            if arguments.device and name not in ON_CPU:
                command += ["--device", arguments.device]
            if arguments.rounds and name not in COUNTED:
                command += ["--rounds", str(arguments.rounds)]
            if arguments.quick:
                command.append("--quick")
            begin_s = time.monotonic()
            has_failed, last_line = run(command)
            num_failed += has_failed
            outcome = "FAILED" if has_failed else "ok"
            seconds = time.monotonic() - begin_s
            summary.append(f"{name:<16} {model:<9} {seconds:5.0f} s  {outcome:<6}  {last_line}")
    print("", *summary, sep="\n")
    return 1 if num_failed else 0


def run(command: list[str]) -> tuple[bool, str]:
    """Run a command and print its output -> whether it failed, and its last line of output."""
    print(f"\n$ {' '.join(command)}", flush=True)
    last_line = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last_line = line.strip() or last_line
    return process.returncode != 0, last_line


if __name__ == "__main__":
    sys.exit(main())
