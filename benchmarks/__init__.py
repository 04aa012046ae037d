"""Side-by-side measurements, each `python -m benchmarks.NAME`; LOG.md keeps what they showed.

They run with argparse and the package's core, plus the peers (`pip install -e '.[bench]'`).
"""
