"""Side-by-side measurements, each run as `python -m benchmarks.NAME`; LOG.md has the results.

They need the package itself, and the peers: `pip install -e '.[bench]'`.
"""
