"""The recipe that trained the embedded base: `python -m mep_lightning.tiny.train --out DIR`."""
