"""One command a suite: `python -m benchmarks SUITE --out FILE.json`."""

from mep_lightning.commands.chatter import quiet_before_imports

quiet_before_imports()  # first, and in a cell's process too: libraries' hints would bury what comes of a suite
