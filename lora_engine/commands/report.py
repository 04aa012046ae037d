"""python -m lora_engine report: the results of one or several runs as one HTML file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lora_engine import cli
from lora_engine.commands.captioning_flags import check_writable
from lora_engine.report.page import write_report
from lora_engine.report.run_folder import RunFolder
from lora_engine.terminal import printable


@dataclass(frozen=True)
class ReportConfig:
    """Flags of `report`."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders: finished, stopped, or still training."""
    out: str | None = None
    """File to write. Default: report.html, in the run's folder for a single run and in the current
    folder for several."""


def report(args: list[str]) -> int:
    """Write the report of one or several runs and return the exit status."""
    config = cli.parse(
        ReportConfig, args, prog="python -m lora_engine report",
        description="Write the results of a run, or compare several, as one HTML file. A run "
        "writes its own report.html at each validation and when it ends.",
    )
    if not config.runs:
        raise ValueError("no runs to report on: name their folders, such as runs/blip-001")
    check_writable("--out", config.out)
    folder = Path(config.runs[0] if len(config.runs) == 1 else ".")
    out = Path(config.out) if config.out else folder / "report.html"
    write_report(config.runs, out, running=list(filter(RunFolder.is_running, config.runs)))
    print(printable(f"report  {out}"))
    return 0
