"""The suites: what they write down is what was measured, and old figures are not taken for new ones."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from inspect import signature

import pytest
import torch

from benchmarks import rows
from benchmarks.__main__ import ALONE, PERFORMANCE, RUN, default_path, main, parser
from benchmarks.documents import scores, tables
from benchmarks.performance import step
from benchmarks.performance.ordinary import as_it_comes_
from benchmarks.trained import quality, tune, variants
from benchmarks.trained.differences import Difference, difference
from mep_lightning import defaults, load_base


def test_results_say_where_and_with_what_they_were_measured(tmp_path):
    about = rows.measured_with(threads=1)
    rows.write([rows.row("step", "case", "seconds a step", 0.5, "s", 1.0, 2.0)], tmp_path / "new" / "a.json", about)
    written = json.loads((tmp_path / "new" / "a.json").read_text())
    assert set(written) == {"device", "torch", "date", "commit", "rows"} and written["torch"] == torch.__version__
    assert written["device"].endswith("1 thread")
    assert set(written["rows"][0]) == {"suite", "case", "metric", "value", "unit", "baseline", "ratio"}


def test_a_suite_that_is_stopped_leaves_what_it_had(tmp_path):
    path, partial = tmp_path / "a.json", tmp_path / "a.partial.json"

    def measured():
        yield rows.row("step", "first", "seconds a step", 0.5, "s")
        assert not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.write(measured(), path, {"device": "a"})
    assert [row["case"] for row in json.loads(partial.read_text())["rows"]] == ["first"] and not path.exists()
    rows.write([], path, {"device": "a"})
    assert json.loads(path.read_text())["rows"] == [] and not partial.exists()


def test_both_sides_run_in_turn():
    order = []
    seconds = rows.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4 and {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert rows.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_the_summary_is_the_mean_over_subjects_and_the_spread_over_seeds():
    cells = [
        dict.fromkeys(quality.SCORES, value)
        | {"variant": "zo", "subject": subject, "index": "ab".index(subject)}
        | {"seed": seed, "seconds": 9 * value}
        for seed, subject, value in [(0, "a", 1.0), (0, "b", 3.0), (1, "a", 2.0), (1, "b", 4.0)]
    ]
    rows = quality.summarise("quality", cells, ["zo", "absent"])
    (dino,) = [r for r in rows if r["metric"] == "dino"]
    (seconds,) = [r for r in rows if r["metric"] == "seconds"]
    assert seconds["value"] == 22.5  # the median
    assert dino["value"] == 2.5 and dino["spread"] == pytest.approx(0.70711, abs=1e-5)
    assert (dino["subjects"], dino["seeds"]) == (2, 2) and "beyond_first" not in dino


def test_the_difference_of_two_variants_is_paired_by_subject_and_seed():
    def cell(variant, index, seed, value):
        told = dict.fromkeys(quality.SCORES, value)
        return told | {"variant": variant, "subject": f"s{index}", "index": index, "seed": seed, "seconds": 1.0}

    cells = [cell("a", 0, 0, 1.0), cell("a", 0, 1, 5.0), cell("b", 0, 1, 5.5), cell("b", 0, 0, 1.3)]
    cells += [cell("b", 1, 0, 9.0), cell("a", 2, 0, 2.0), cell("b", 2, 0, 2.4)]
    told = difference(cells, "b", "a", "dino")
    assert told.cells == 3 and told.mean == pytest.approx(0.4) and told.error == pytest.approx(0.1 / 3**0.5, abs=1e-6)
    assert told.told() == "+.400 ± .058"
    assert difference(cells, "a", "b", "dino").told(2) == "−.40 ± .06"
    assert difference(cells[:4], "b", "a", "dino").told() == "+.400"  # of two cells an error would hang on chance
    assert difference(cells[:1], "b", "a", "dino") is None
    assert Difference(-0.0001, 0.0, 9, 4).told() == ".000 ± .000"
    assert (told.ahead, told.deviation) == (3, pytest.approx(0.1, abs=1e-6))
    assert difference(cells, "a", "b", "dino").ahead == 0
    assert difference(cells[:4], "b", "a", "dino").deviation is None

    table = scores.differences(quality.summarise("estimators", cells, ["a", "b"])).splitlines()
    assert table[0].startswith("| beyond a | cells |")
    assert table[2].startswith("| b | 3 | +.400 ± .058 |") and table[2].endswith("| +.4000 ± .0577 |")


def test_what_the_paper_shows_of_one_subject_stands_beside_what_one_cell_would():
    def cell(variant, seed, value):
        told = dict.fromkeys(quality.SCORES, value)
        return told | {"variant": variant, "subject": "s0", "index": 0, "seed": seed, "seconds": 1.0}

    gains = (0.02, -0.05, 0.03)  # of the paper's -.011 and -.022 one cell has the sign
    cells = [cell("SG", seed, 0.5) for seed in range(3)] + [
        cell("no SG", n, 0.5 + gain) for n, gain in enumerate(gains)
    ]
    lines = scores.of_one_subject(quality.summarise("ablation", cells, ["SG", "no SG"])).splitlines()
    assert lines[2] == "| no SG | CLIP-I | −.011 | .000 ± .025 | .044 | 1 of 3 |"
    assert lines[3].startswith("| no SG | DINO | −.022 |") and len(lines) == 4


@pytest.mark.parametrize("suite", [name for name in variants.SUITES if tables.results(name).exists()])
def test_committed_figures_are_those_of_the_committed_cells(suite):
    path = tables.results(suite)
    rows = json.loads(path.read_text())["rows"]
    subjects, seeds = (max(row.get(key, 0) for row in rows) for key in ("subjects", "seeds"))
    cells = quality.committed(suite, path.with_suffix(".jsonl"))
    cells = [cell for cell in cells if cell["index"] < subjects and cell["seed"] < seeds]
    again = {
        (made["case"], made["metric"]): made
        for made in quality.summarise(suite, cells, dict.fromkeys(row["case"] for row in rows))
    }
    assert len(rows) >= len(quality.SCORES)
    for row in rows:
        assert {key: again[row["case"], row["metric"]][key] for key in row} == row


def test_a_cell_counts_only_for_the_settings_it_was_measured_with():
    settings = variants.resolve(variants.ZOODIP)
    base = quality.fingerprint(settings, "test", 2)
    assert base == quality.fingerprint(dict(settings), "test", 2)
    others = [
        quality.fingerprint(settings | {"mu": 0.5}, "test", 2),
        quality.fingerprint(settings, "tune", 2),
        quality.fingerprint(settings, "test", 1),
    ]
    assert len({base, *others}) == 4


def test_a_default_counts_as_much_as_a_setting(monkeypatch):
    before = variants.resolve(variants.ZOODIP)
    monkeypatch.setattr(defaults, "_TABLE", [*defaults._TABLE, ("zoodip", "tiny", "*", {"lr": 0.5})])
    assert variants.resolve(variants.ZOODIP) == before | {"lr": 0.5}
    assert variants.resolve(variants.ZOODIP | {"lr": before["lr"]}) == before


def test_a_parts_own_default_counts_as_much_as_a_setting(monkeypatch):
    before = variants.resolve(variants.FAST)
    assert before["share"] == 0.97 and before["every"] == 50
    assert variants.resolve(variants.FAST | {"share": 0.5}) == before | {"share": 0.5}
    assert "share" not in variants.resolve(variants.ZOODIP)


def test_the_ordinary_step_has_weights_in_the_common_order():
    """Ours are channels-last on a CPU, int8 ones too, which are buffers."""
    base = load_base("tiny", "int8")
    as_it_comes_(base.unet)
    weights = [tensor for tensor in (*base.unet.parameters(), *base.unet.buffers()) if tensor.dim() == 4]
    assert weights and all(tensor.is_contiguous() for tensor in weights)


def test_the_step_suite_compares_equal_losses():
    module, draw = step.build("fp32", 2)
    members = module.adapter.theta.detach() + 0.01 * torch.randn(3, *module.adapter.theta.shape)
    with torch.no_grad():
        torch.testing.assert_close(
            module.losses(members, draw), step.one_after_the_other(module, members, draw), rtol=1e-5, atol=1e-6
        )


def test_a_search_goes_on_from_the_best_of_every_axis(monkeypatch, tmp_path):
    tried = []

    def run_cells(trials, path, *, split, **kwargs):
        assert split == "tune"
        tried.append(trials)
        return [
            {"variant": name, "clip_i": -abs(trial["lr"] - 0.2), "dino": -abs(trial.get("mu", 0) - 5)}
            for name, trial in trials.items()
            for _ in range(2)
        ]

    monkeypatch.setattr(tune, "run_cells", run_cells)
    monkeypatch.setitem(tune.START, "zoodip", {"lr": 0.3, "mu": 4})
    monkeypatch.setitem(tune.AXES, "zoodip", [[{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}], [{"mu": 4}, {"mu": 5}]])
    found = tune.run("zoodip", tmp_path / "cells.jsonl")
    assert [trial["lr"] for trial in tried[0].values()] == [0.1, 0.2, 0.3]
    assert [(trial["lr"], trial["mu"]) for trial in tried[1].values()] == [(0.2, 5)]  # mu=4 was tried already
    assert found[-1]["settings"] == variants.METHODS["zoodip"] | {"lr": 0.2, "mu": 5}
    assert [r["value"] for r in found] == pytest.approx([-0.55, -0.5, -0.55, -0.5, 0, 0])


def test_bounds_that_a_variant_does_not_use_are_none_of_its_settings(monkeypatch):
    some = variants.METHODS | {"without PUTS": variants.ZOODIP | {"puts": False}}
    before = {name: variants.resolve(settings) for name, settings in some.items()}
    monkeypatch.setattr(defaults, "_TABLE", [*defaults._TABLE, ("zoodip", "tiny", "*", {"puts_high": 321})])
    assert {name for name, settings in some.items() if variants.resolve(settings) != before[name]} == {"zoodip"}


def test_no_two_variants_train_alike():
    for suite in variants.SUITES.values():
        resolved = [variants.resolve(settings) for settings in suite.values()]
        assert all(one != other for i, one in enumerate(resolved) for other in resolved[:i])
    narrowed = [variants.resolve(settings) for settings in variants.ABLATION.values() if settings["puts"]]
    assert narrowed and all((one["puts_low"], one["puts_high"]) != (0, 1000) for one in narrowed)


@pytest.mark.parametrize(
    "words", [["quality", "--subjects", "2"], ["ablation", "--variants", "n=1"], ["tiny", "--sets", "1"]]
)
def test_part_of_a_suite_does_not_overwrite_the_whole(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--out FILE.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["step"], "step.json"),
        (["step", "--base", "sd15", "--device", "cuda"], "cuda/step-sd15.json"),
        (["memory"], "memory-sd15.json"),
        (["kernels", "--device", "cuda"], "cuda/kernels.json"),
        (["tune", "--method", "zoodip"], "tune-zoodip.json"),
    ],
)
def test_figures_are_kept_by_suite_base_and_device(words, path):
    assert default_path(words[0], parser().parse_args(words)) == rows.RESULTS / path


def test_all_writes_a_file_a_suite(monkeypatch, tmp_path):
    asked = []
    for name in PERFORMANCE:
        monkeypatch.setitem(RUN, name, lambda args, path: asked.append(args.base) or [])
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "all", "--base", "sd21", "--device", "cuda:0", "--out", str(tmp_path)]
    )
    monkeypatch.setattr(rows, "device_name", lambda *_: "a GPU")
    main()
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert written == {
        f"cuda/{name}.json"
        for name in ("step-sd21", "methods-sd21", "memory-sd21", "kernels", "autoencoder", "fidelity", "profile-sd21")
    }
    assert asked == ["sd21"] * len(written)


@pytest.mark.parametrize("method", tune.AXES)
def test_a_search_tries_only_settings_that_there_are(method):
    known = variants.resolve((variants.METHODS | variants.BASELINES)[method]).keys()
    assert all(change.keys() <= known for axis in tune.AXES[method] for change in (*axis, tune.START[method]))


class Cells:
    """Stands in for training: notes which cells begin, and how many at once; one of them is a mistake."""

    def __init__(self, mistake=None):
        self.begun, self.now, self.most, self.mistake = [], 0, 0, mistake

    def __call__(self, variant, settings, split, index, seed, images, device):
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.append((variant, index, seed))
        time.sleep(0.02)
        self.now -= 1
        if (variant, index, seed) == self.mistake:
            raise ValueError("no such cell")
        scores = dict.fromkeys(quality.SCORES, 0.5)
        return {"variant": variant, "subject": f"s{index}", "split": split, "seed": seed, "seconds": 1.0} | scores


def test_a_stopped_suite_has_what_was_done_and_carries_on(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "ProcessPoolExecutor", lambda workers, *_, **__: ThreadPoolExecutor(workers))
    path, named = tmp_path / "cells.jsonl", {"zoodip": variants.ZOODIP, "textual_inversion": variants.BACKPROP}
    stopped = Cells(mistake=("zoodip", 2, 0))
    monkeypatch.setattr(quality, "cell", stopped)
    with pytest.raises(ValueError, match="no such cell"):
        quality.run_cells(named, path, subjects=8, seeds=1, workers=2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert stopped.most <= 2 and len(stopped.begun) <= 7 and 3 <= len(kept) <= 6
    whole = Cells()
    monkeypatch.setattr(quality, "cell", whole)
    cells = quality.run_cells(named, path, subjects=8, seeds=1, workers=2)
    assert len(cells) == 16 and len(whole.begun) == 16 - len(kept)
    assert not {(c["variant"], c["index"], c["seed"]) for c in kept} & set(whole.begun)


@pytest.mark.parametrize("name", ALONE)
def test_a_suite_without_options_is_a_module_of_its_name(name):
    signature(import_module(f"benchmarks.studies.{name}").run).bind()
