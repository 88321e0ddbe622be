"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_existing_project_learns_with_forward_passes_only(tmp_path):
    spec = importlib.util.spec_from_file_location("existing_project", EXAMPLES / "existing_project.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(tmp_path, pretraining=200, steps=100)
    assert after < before
    assert (tmp_path / "memory.json").exists()
    assert (tmp_path / "memory.png").exists()
