"""A run in one page: `report.html`, a single file with its pictures and plots inside, to keep or to send."""

from __future__ import annotations

import csv
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from PIL import Image

from mep_lightning.errors import UserError, counted, human
from mep_lightning.evaluation import grid
from mep_lightning.evaluation.page import Picture, picture, render
from mep_lightning.evaluation.plots import COLORS, MARK, PARTS, branch_figure, loss_figure, memory_figure, to_svg
from mep_lightning.reading import LARGEST_LOG, load_yaml, read_json, read_text
from mep_lightning.run_folder import TEMPORARY, RunFolder, kind_of, write_atomically

STEPS = 8  # grids of the training that it shows at most
SCORES = {
    "clip_t": ("CLIP-T", "how well the pictures follow the prompts", "higher is better"),
    "clip_i": ("CLIP-I", "how much they look like the photos", "higher is better"),
    "dino": ("DINO", "how surely it is this very subject", "higher is better"),
    "dino_inter": ("DINO inter", "how alike they are to each other", "lower is more diverse"),
}
MEMORY_COLUMNS = {
    "cuda": {"allocated_peak": "allocated", "reserved_peak": "reserved", "process_peak": "process"},
    "cpu": {"peak_bytes": "the run", "process_peak": "the process"},
}
"""Figures of a phase -> what they are called; where the device is no CUDA one, all that is known is the process."""
PACKAGES = ("mep-lightning", "torch", "lightning", "diffusers", "transformers", "torchmetrics", "safetensors", "pillow")


@dataclass
class Pair:
    """What a prompt looked like before and after."""

    prompt: str
    before: Picture | None
    after: Picture | None


@dataclass
class Page:
    """All that the template shows; whatever the run does not have is empty."""

    title: str
    written: str
    facts: dict[str, str] = field(default_factory=dict)
    scores: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)
    photos: list[Picture] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    steps: dict[str, list[Picture]] = field(default_factory=dict)
    tested: list[Picture] = field(default_factory=list)
    tested_note: str = ""
    loss: Markup | None = None
    loss_note: str = ""
    branches: Markup | None = None
    branches_note: str = ""
    memory: Markup | None = None
    memory_columns: dict[str, str] = field(default_factory=dict)
    memory_rows: list[dict[str, Any]] = field(default_factory=list)
    memory_note: str = ""
    exports: list[tuple[str, str]] = field(default_factory=list)
    config: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def write_report(run: RunFolder | Path | str) -> Path:
    """Write a run's `report.html` from whatever its folder holds; parts that are missing are named, not fatal.

    Args:
        run: the run's folder.

    Returns:
        The report's path.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    page = Page(title=run.root.resolve().name, written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"))
    _read_config(page, run)
    _read_scores(page, run)
    _read_samples(page, run)
    _read_tested(page, run)
    _read_loss(page, run)
    _read_memory(page, run)
    _read_exports(page, run)
    page.versions = _versions()
    html = render("report.html.j2", page=page, colors=COLORS, parts=PARTS)
    return write_atomically(run.report, html)


def _read_config(page: Page, run: RunFolder) -> None:
    try:
        page.config = read_text(run.config, errors="replace")
    except (OSError, UserError):
        page.missing.append("config.yaml")
        return
    try:
        settings = load_yaml(page.config)
    except (ValueError, yaml.YAMLError):
        return
    model, data, trainer = (_mapping(_mapping(settings).get(key)) for key in ("model", "data", "trainer"))
    adapter, estimator = _mapping(model.get("adapter")), _mapping(model.get("estimator"))
    arguments = _mapping(adapter.get("init_args")) or adapter
    facts = {
        "method": model.get("method"),
        "base": model.get("base"),
        "precision": model.get("precision"),
        "subject": " ".join(str(part) for part in (arguments.get("token"), data.get("class_word")) if part),
        "adapter": str(adapter.get("class_path", "")).rpartition(".")[2],
        "estimator": str(estimator.get("class_path", "")).rpartition(".")[2],
        "learning rate": model.get("lr"),
        "steps": trainer.get("max_steps"),
        "seed": model.get("seed"),
        "photos from": data.get("path"),
    }
    page.facts = {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _read_scores(page: Page, run: RunFolder) -> None:
    metrics = _json(run.metrics)
    if metrics is None:
        page.missing.append("metrics.json (mep test writes it)")
        return
    flat = {**metrics, **_mapping(metrics.get("scores"))}
    for key, (name, question, direction) in SCORES.items():
        if isinstance(flat.get(key), int | float):
            page.scores.append(
                {"name": name, "value": f"{flat[key]:.3f}", "question": question, "direction": direction}
            )
    details = {key: value for key, value in flat.items() if key not in SCORES}
    for key, value in _mapping(metrics.get("settings")).items():
        details[f"{key.upper()} encoder" if key in ("clip", "dino") else str(key)] = value
    page.details = {
        key.replace("_", " "): f"{value:.4g}" if isinstance(value, float) else str(value)
        for key, value in details.items()
        if isinstance(value, str | int | float)
    }


def _read_samples(page: Page, run: RunFolder) -> None:
    photos = grid.load(run.samples / "photos.png")
    if photos is not None:
        page.photos = [picture(cell) for row in range(len(photos.boxes)) for cell in photos.cells(row)]
    before, after = grid.load(run.samples / "before.png"), grid.load(run.samples / "after.png")
    _read_pairs(page, before, after)
    for path in _spread(sorted(run.samples.glob("step-*.png")), STEPS):
        shown = grid.load(path)
        if shown is not None and shown.boxes:
            prompts = [str(prompt) for prompt in shown.info.get("prompts", [])]
            cells = [picture(cell, prompt) for cell, prompt in zip(shown.cells(), prompts, strict=False)]
            page.steps[f"step {shown.info.get('step', path.stem)}"] = cells
    if not page.pairs:
        page.missing.append("samples/before.png and after.png (the Samples callback writes them)")


def _read_pairs(page: Page, before: grid.Grid | None, after: grid.Grid | None) -> None:
    """Side by side where both showed the same prompts; a grid on its own otherwise."""
    sides: list[dict[str, Picture]] = []
    for shown in (before, after):
        prompts = [str(prompt) for prompt in shown.info.get("prompts", [])] if shown else []
        cells = shown.cells() if shown and shown.boxes else []
        # A prompt may stand several times, with another seed each.
        keys = [f"{prompts[:number].count(prompt)} {prompt}" for number, prompt in enumerate(prompts)]
        sides.append({key: picture(cell) for key, cell in zip(keys, cells, strict=False)})
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        page.pairs.append(Pair(key.partition(" ")[2], sides[0].get(key), sides[1].get(key)))


def _read_tested(page: Page, run: RunFolder) -> None:
    """The first picture of every prompt that `mep test` drew."""
    paths = [path for path in sorted((run.root / "evaluation").glob("[!.]*.png")) if path.is_file()]
    for path in paths:
        try:
            with Image.open(path) as opened:
                caption = str(opened.info.get("prompt", path.stem))
                if caption not in {picture.caption for picture in page.tested}:
                    page.tested.append(picture(opened, caption))
        except Exception:  # a damaged file makes Pillow's decoders raise nearly anything
            continue
    if len(paths) > len(page.tested):
        page.tested_note = f"One picture of each prompt; all {len(paths)} are in evaluation/."


def _spread(items: list[Path], most: int) -> list[Path]:
    """At most so many items, evenly spread, the last one among them."""
    if len(items) <= most:
        return items
    return [items[(number + 1) * len(items) // most - 1] for number in range(most)]


def _read_loss(page: Page, run: RunFolder) -> None:
    rows = _logged(run, ("step", "train/loss"))
    if not rows:
        page.missing.append("the loss (log.csv holds no train/loss)")
        return
    steps, losses = [int(step) for step, _ in rows], [loss for _, loss in rows]
    page.loss = Markup(to_svg(loss_figure(steps, losses, MARK), "loss"))
    page.loss_note = f"{len(steps)} logged values up to step {steps[-1]}; the line is their moving average"
    if skipped := [count for (count,) in _logged(run, ("train/skipped",)) if math.isfinite(count)]:
        page.loss_note += (
            f"; skipped: {counted(round(max(skipped)), 'step')}, where the loss or its gradient was not finite"
        )
    if taken := _logged(run, ("step", "train/timestep", "train/high")):
        _read_branches(page, run, taken)


def _read_branches(page: Page, run: RunFolder, taken: list[tuple[float, ...]]) -> None:
    """Which steps took which branch, where there are two."""
    steps, timesteps, high = zip(*taken, strict=True)
    figure = branch_figure([int(step) for step in steps], timesteps, [one > 0.5 for one in high], MARK)
    page.branches = Markup(to_svg(figure, "branches"))
    parts = [f"{sum(high):.0f} of {len(high)} logged steps were ZO-high, the others BP-low"]
    for name, column in (("ZO-high", "train/loss_high"), ("BP-low", "train/loss_low")):
        if losses := [loss for (loss,) in _logged(run, (column,)) if math.isfinite(loss)]:
            parts.append(f"mean loss of {name} {sum(losses) / len(losses):.4f}")
    page.branches_note = "; ".join(parts)


def _logged(run: RunFolder, columns: Sequence[str]) -> list[tuple[float, ...]]:
    """Columns of the run's log; rows that lack one of them are passed over."""
    rows: list[tuple[float, ...]] = []
    try:
        if not run.log.is_file() or run.log.stat().st_size > LARGEST_LOG:
            return rows
        with open(run.log, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                with suppress(KeyError, TypeError, ValueError):
                    rows.append(tuple(float(row[column]) for column in columns))
    except (OSError, csv.Error):
        pass
    return rows


def _read_memory(page: Page, run: RunFolder) -> None:
    memory = _json(run.memory_json)
    try:
        if memory is None or not memory["phases"]:
            raise KeyError
        page.memory = Markup(to_svg(memory_figure(memory, MARK), "memory"))
        page.memory_columns = MEMORY_COLUMNS[kind_of(memory.get("device", ""))]
        for name, figures in memory["phases"].items():
            sizes = {key: human(figures[key]) for key in page.memory_columns}
            breakdown = {part: human(figures["breakdown"].get(part, 0)) for part in PARTS}
            page.memory_rows.append(
                {"name": name, "top": name == memory.get("peak_phase"), **sizes, "parts": breakdown}
            )
        page.memory_note = (
            f"peak {human(memory['peak_bytes'])} in {memory['peak_phase']}, on {memory.get('device', '?')}"
        )
        if isinstance(memory.get("subjects"), int):
            page.memory_note += f", of {memory['subjects']} subjects that trained together"
    except (KeyError, TypeError, AttributeError):
        page.memory, page.memory_rows = None, []
        page.missing.append("memory.json (the MemoryProfiler callback writes it)")


def _read_exports(page: Page, run: RunFolder) -> None:
    if run.adapter.is_dir():
        found = (path for path in run.adapter.rglob("*") if path.is_file())
        files = sorted(path for path in found if not path.name.startswith(TEMPORARY))
        page.exports = [(str(path.relative_to(run.root)), human(path.stat().st_size)) for path in files]
    if not page.exports:
        page.missing.append("adapter/ (the Export callback writes it)")


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["system"] = f"{platform.system()} {platform.machine()}"
    return versions


def _json(path: Path) -> dict[str, Any] | None:
    content = read_json(path)
    return content if isinstance(content, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
