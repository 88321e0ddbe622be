"""One command a suite: `python -m benchmarks SUITE --out FILE.json`."""
