"""Does a change keep results to the bit? Trains both demos at two commits and compares them.

    python -m benchmarks.same_bits main            the working tree against main
    python -m benchmarks.same_bits main HEAD~1     one commit against another

Losses and gradient norms of every step, validation scores, sample captions and all tensors of the
adapter must be equal. Exits with 1 if something differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
RECIPES = ("blip_cc3m", "vit_gpt2_cc3m")
FLAGS = "--max_steps 6 --log_every 1 --eval_captions 20 --num_samples 1 --num_threads 1".split()
COMPARED = ("event", "step", "loss", "grad_norm", "cider_d", "bleu_4", "rouge_l", "caption")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", help="a commit, branch or tag")
    parser.add_argument("after", nargs="?", help="default: the working tree as it is")
    arguments = parser.parse_args(argv)
    num_differing = 0
    for recipe in RECIPES:
        before, after = outcome(arguments.before, recipe), outcome(arguments.after, recipe)
        differing = [key for key in before | after if before.get(key) != after.get(key)]
        num_differing += len(differing)
        print(f"{recipe}: {len(before)} values, {len(differing)} differ {differing[:10] or ''}")
    return 1 if num_differing else 0


@contextmanager
def tree(commit: str | None) -> Iterator[Path]:
    """A checkout of the commit; without one the working tree."""
    if commit is None:
        yield ROOT
        return
    with tempfile.TemporaryDirectory() as name:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", f"{name}/tree", commit], check=True)
        try:
            yield Path(name, "tree")
        finally:
            subprocess.run([*git, "remove", "--force", f"{name}/tree"], check=True)


def outcome(commit: str | None, recipe: str) -> dict[str, object]:
    """What the demo computes at a commit, trained with an empty feature cache, by what it is."""
    values: dict[str, object] = {}
    with tree(commit) as root, tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        subprocess.run(
            [sys.executable, "-m", f"recipes.{recipe}", *FLAGS, "--output_path", str(run)],
            check=True, cwd=root, stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": name},
        )
        for file in ("metrics.jsonl", "samples.jsonl"):
            for number, line in enumerate((run / file).read_text().splitlines(), start=1):
                record = json.loads(line)
                values |= {f"{file}:{number} {key}": record.get(key) for key in COMPARED}
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return values | {name: (x.dtype.str, x.shape, x.tobytes()) for name, x in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
