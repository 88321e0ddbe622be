"""What the `mep` command does, one module a verb; `mep_lightning.cli` dispatches to them."""
