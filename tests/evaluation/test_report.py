"""The report of a fabricated run: everything is on the page, nothing is fetched, no user text becomes markup."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from mep_lightning.evaluation import grid, plots, write_report
from mep_lightning.evaluation.report import _logged
from mep_lightning.run_folder import RunFolder

EVIL = "<script>alert('x')</script> & \"<sks>\""
MIB = 2**20


def phase_figures(**parts: int) -> dict:
    breakdown = dict.fromkeys(plots.PARTS, 0) | {name: size * MIB for name, size in parts.items()}
    total = sum(breakdown.values())
    return {
        "peak_bytes": total,
        "allocated_peak": total,
        "reserved_peak": total + MIB,
        "process_peak": total + 400 * MIB,
        "breakdown": breakdown,
    }


def flat(*color: int) -> Image.Image:
    return Image.new("RGB", (64, 64), color)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A run's folder with everything in it, and hostile text wherever a user may write."""
    run = RunFolder(tmp_path / "zoodip-1")
    grid.save(grid.draw([grid.Row("", [flat(10, 20, 30), flat(11, 21, 31)])]), run.samples / "photos.png")
    prompts = ["a <sks> ball", EVIL, "a <sks> ball"]
    for name, step, red in (("before", 0, 50), ("step-000500", 500, 100), ("after", 900, 200)):
        row = grid.Row(name, [flat(red, number, 0) for number in range(3)], prompts)
        grid.save(grid.draw([row], step=step, prompts=prompts), run.samples / f"{name}.png")
    with open(run.log, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/grad_norm", "train/loss"])
        for step in range(50):
            writer.writerow([0, step, 1.0, 0.2 + 0.1 * math.exp(-step / 9)])
            writer.writerow([0, step, 1.0, ""])
    memory = {
        "device": EVIL,
        "phases": {
            "load": phase_figures(weights=100, other=20),
            "step": phase_figures(weights=100, activations=87),
            EVIL: phase_figures(weights=1),
        },
        "peak_bytes": 187 * MIB,
        "peak_phase": "step",
    }
    run.memory_json.write_text(json.dumps(memory))
    run.metrics.write_text(
        json.dumps({"clip_t": 0.2871, "clip_i": 0.772, "dino": 0.5, "dino_inter": 0.6, "note": EVIL})
    )
    run.config.write_text(
        f"# {EVIL}\nmodel:\n  base: tiny\n  precision: int8\n  adapter:\n    class_path: a.b.TokenEmbedding\n"
        f"    init_args: {{token: '<sks>'}}\ndata:\n  class_word: {json.dumps(EVIL)}\n  path: /photos/<b>\n"
    )
    (run.adapter).mkdir()
    (run.adapter / "learned_embeds.safetensors").write_bytes(b"x" * 640)
    (run.adapter / f"{EVIL.replace('/', '')}.safetensors").write_bytes(b"y")
    (run.adapter / ".tmp-1-learned_embeds.safetensors").write_bytes(b"half, as a kill leaves it")
    return run


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def pictures(self, alt: str) -> list[np.ndarray]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img" and attributes["alt"].startswith(alt):
                data = base64.b64decode(attributes["src"].partition("base64,")[2])
                found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return found


def read(run: RunFolder) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_is_whole_in_itself(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"link", "script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert all(not name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("data:image/", "#"))
    assert not re.search(r"url\((?!#)|@import", html)
    outside = re.findall(r"https?://[^\"' <]+", html)
    assert set(outside) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses


def test_user_text_is_shown_and_never_becomes_markup(run):
    page = read(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "sks" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert('x')") >= 8  # config, class word, score, prompt, caption, device, phase, file
    assert ".tmp-" not in page.text


def test_half_a_character_does_not_cost_the_page(run):
    run.metrics.write_text('{"clip_t": 0.3, "note": "\\ud800"}')
    assert "0.300" in read(run).text


def test_before_and_after_of_a_prompt_stand_side_by_side_in_order(run):
    page = read(run)
    before, after = page.pictures("before:"), page.pictures("after:")
    assert [tuple(picture[5, 5]) for picture in before] == [(50, 0, 0), (50, 1, 0), (50, 2, 0)]
    assert [tuple(picture[5, 5]) for picture in after] == [(200, 0, 0), (200, 1, 0), (200, 2, 0)]
    order = [a["alt"] for tag, a in page.tags if tag == "img" and a["alt"].startswith(("before", "after"))]
    assert order == [
        f"{side}: {text}" for text in ("a <sks> ball", EVIL, "a <sks> ball") for side in ("before", "after")
    ]


def test_photos_steps_scores_facts_exports_and_versions_are_there(run):
    page = read(run)
    assert [tuple(picture[5, 5]) for picture in page.pictures("photo ")] == [(10, 20, 30), (11, 21, 31)]
    assert len(page.pictures("step 500")) == 3
    scores = re.findall(r'class="card score"><span>(.*?)</span><b>(.*?)</b>', write_report(run).read_text())
    assert scores == [("CLIP-T", "0.287"), ("CLIP-I", "0.772"), ("DINO", "0.500"), ("DINO inter", "0.600")]
    for text in (
        f"<sks> {EVIL}",
        "int8",
        "TokenEmbedding",
        "/photos/<b>",
        "640 B",
        torch.__version__,
        "187 MiB",
    ):
        assert text in page.text
    assert "Not in this run's folder" not in page.text


def test_both_plots_are_drawn_in_the_pages_own_ink(run):
    html = write_report(run).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert "currentColor" in drawing
        assert plots.MARK not in drawing
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(ids)
    assert "187 MiB" in drawings[1]
    assert "activations" in drawings[1]
    assert "gradients" not in drawings[1]


def test_evaluation_pictures_show_one_of_every_prompt(run):
    for number, prompt in enumerate(["a red <sks> ball", "a red <sks> ball", EVIL]):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("prompt", prompt)
        (run.root / "evaluation").mkdir(exist_ok=True)
        flat(number, 7, 7).save(run.root / "evaluation" / f"{number:02d}.png", pnginfo=info)
    (run.root / "evaluation" / "broken.png").write_bytes(b"no picture")
    page = read(run)
    assert [tuple(picture[5, 5]) for picture in page.pictures("test: ")] == [(0, 7, 7), (2, 7, 7)]
    assert "all 4 are in evaluation/" in page.text


def test_a_long_run_shows_few_of_its_grids_and_the_last_among_them(run):
    for step in range(1000, 60_000, 500):
        row = grid.Row("", [flat(1, 1, 1)])
        grid.save(grid.draw([row], step=step, prompts=["a"]), run.samples / f"step-{step:06d}.png")
    shown = [attributes["alt"] for tag, attributes in read(run).tags if attributes.get("alt", "").startswith("step ")]
    assert len(shown) == 8
    assert shown[-1].startswith("step 59500:")


def test_an_empty_folder_still_makes_a_page_that_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    for part in ("config.yaml", "metrics.json", "before.png", "loss", "memory.json", "adapter/"):
        assert part in page.text
    assert tmp_path.name in page.text


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"phases": 3}', '{"phases": {"step": {}}}', "\x00\xff"])
def test_damaged_files_are_passed_over(run, content):
    for path in (run.memory_json, run.metrics, run.log, run.config):
        path.write_text(content, encoding="latin-1")
    (run.samples / "before.png").write_text(content, encoding="latin-1")
    page = read(run)
    assert "memory.json" in page.text
    assert len(page.pictures("after:")) == 3
    assert not page.pictures("before:")


def test_a_stopped_run_shows_before_alone(run):
    (run.samples / "after.png").unlink()
    page = read(run)
    assert len(page.pictures("before:")) == 3
    assert not page.pictures("after:")
    assert page.text.count("not there") == 3


def test_the_loss_is_that_of_the_log_and_of_no_other_file(run):
    (run.root / "lightning_logs").mkdir()
    (run.root / "lightning_logs" / "metrics.csv").write_text("step,train/loss\n7,70.0\n")
    run.log.write_text("step,train/grad_norm,train/loss\n0,1.0,0.5\n1,1.0,\n2,1.0,nan\n3,1.0,0.25\nx,1.0,9\n4,1.0\n")
    steps, losses = zip(*_logged(run, ("step", "train/loss")), strict=True)
    assert steps == (0, 2, 3)
    assert losses == pytest.approx([0.5, math.nan, 0.25], nan_ok=True)
    run.log.unlink()
    assert _logged(run, ("step", "train/loss")) == []


def test_the_branches_of_a_selective_run_are_shown(run):
    rows = [
        f"{step},0.5,{step % 1000},{step % 2},{0.1 if step % 2 else ''},{'' if step % 2 else 0.3}" for step in range(40)
    ]
    header = "step,train/loss,train/timestep,train/high,train/loss_high,train/loss_low"
    run.log.write_text("\n".join([header, *rows]) + "\n")
    text = read(run).text
    assert "20 of 40 logged steps were ZO-high, the others BP-low" in text
    assert "mean loss of ZO-high 0.1000; mean loss of BP-low 0.3000" in text
    run.log.write_text("step,train/loss\n0,0.5\n")
    assert "ZO-high" not in read(run).text


def test_large_pictures_do_not_make_a_heavy_page(run):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    row = grid.Row("", [Image.fromarray(noise)] * 3)
    for name in ("before", "after"):
        grid.save(grid.draw([row], step=0, prompts=["a", "b", "c"]), run.samples / f"{name}.png")
    assert write_report(run).stat().st_size < 2_000_000


def test_smoothing_is_an_unbiased_average_that_passes_over_gaps():
    assert plots.smooth([3.0, 3.0, 3.0], 10) == pytest.approx([3.0, 3.0, 3.0])
    nan = float("nan")
    assert plots.smooth([nan, 1.0, nan, float("inf"), 4.0], 2)[1:] == pytest.approx([1, 1, 1, (1 * 0.5 + 4) / 1.5])
    decayed = plots.smooth([0.0] * 50 + [1.0] * 200, 10)
    assert decayed[49] == 0
    assert 0.6 < decayed[59] < 0.7
    assert decayed[-1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (1024, "1 KiB"),
        (12_582_912, "12 MiB"),
        (1_048_261_632, "0.98 GiB"),  # 999.7 MiB, which three digits cannot say
        (2_544_764_682, "2.37 GiB"),
        (1040 * MIB, "1.02 GiB"),
    ],
)
def test_bytes_for_people(size, text):
    assert plots.human(size) == text


def test_a_cpus_memory_has_no_columns_of_a_gpus_allocator(run):
    memory = json.loads(run.memory_json.read_text())
    for device, there in (("cpu", False), ("NVIDIA H200", True)):
        run.memory_json.write_text(json.dumps(memory | {"device": device}))
        text = read(run).text
        assert [name in text for name in ("allocated", "reserved")] == [there, there]
        assert "187 MiB" in text and ("the process" in text) is not there
