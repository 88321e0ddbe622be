"""README.md: its commands parse, its snippets run, its links and names exist."""

import re
import shlex
from pathlib import Path

import pytest

from mep_lightning.cli import COMMANDS, main
from mep_lightning.commands.recipes import recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMAND_LINES = [
    line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("mep ")
]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]


class ParsedError(Exception):
    """Parsing got through, and nothing more is wanted."""


@pytest.fixture
def parse_only(monkeypatch):
    from mep_lightning.commands import learned
    from mep_lightning.commands.training import FitCLI

    def stop(*args, **kwargs):
        raise ParsedError

    monkeypatch.setattr(FitCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(learned, "open_learned", stop)
    monkeypatch.setattr("mep_lightning.plan.plan", stop)
    monkeypatch.setattr("mep_lightning.commands.budget.identify", stop)
    monkeypatch.setattr("mep_lightning.commands.compare._subjects", stop)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_in_the_readme_parses(line, parse_only, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)[1:]
    if "--resume" in words:
        run = Path(words[words.index("--run") + 1])
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("model: {method: zoodip}")
    with pytest.raises(ParsedError):
        main(words)


def test_the_readme_shows_every_command_and_recipe():
    assert {line.split()[1] for line in COMMAND_LINES} >= {"fit", "test", "predict", "plan"}
    assert all(f"mep {name}" in README for name in COMMANDS)
    assert all(f"`{name}`" in README for name in recipe_names())


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_a_snippet_compiles(snippet):
    compile(snippet, "README.md", "exec")


def test_the_snippet_that_trains_runs(photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = [text for text in SNIPPETS if "trainer.fit" in text]
    assert "max_steps=2000" in snippet
    assert photo_folder == tmp_path / "photos"
    exec(snippet.replace("max_steps=2000", "max_steps=2"), {})


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)|<img[^>]+src=\"([^\"]+)\"", README):
        path = target[0] or target[1]
        assert path.startswith("https://") or (ROOT / path).exists(), path
