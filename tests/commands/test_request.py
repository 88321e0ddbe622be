"""What a command line of `mep fit` asks for."""

from pathlib import Path

import pytest
import yaml

from mep_lightning.cli import main
from mep_lightning.commands.fit import requested
from mep_lightning.comparison.preflight import Settings


def seeds(*words):
    config = Settings(requested(["--run", "r", *words])[0]).config
    return config.seed_everything, config.model.seed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed_everything", "3"], (3, 3)),
        (["--seed_everything=3"], (3, 3)),
        (["--config", "everything.yaml"], (4, 4)),
        (["--config", "everything.yaml", "--seed_everything", "3"], (3, 3)),
        (["--seed_everything", "3", "--model.seed", "1"], (3, 1)),
        (["--seed_everything", "3", "--model", '{"seed": 1}'], (3, 1)),
        (["--seed_everything", "3", "--config", "model.yaml"], (3, 2)),
        (["--seed_everything", "false"], (False, 0)),
        (["--model.seed", "1"], (0, 1)),
        ([], (0, 0)),
    ],
)
def test_the_seed_of_everything_is_the_models_too_where_that_is_not_given(words, expected):
    """A packaged recipe's own is only a default."""
    Path("everything.yaml").write_text("seed_everything: 4")
    Path("model.yaml").write_text("model: {seed: 2}")
    assert seeds("--config", "zoodip", *words) == expected


def test_printed_settings_give_the_same_seeds_again(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "zoodip", "--seed_everything", "3", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["seed"] == 3
    Path("printed.yaml").write_text(printed)
    assert seeds("--config", "printed.yaml") == (3, 3)
