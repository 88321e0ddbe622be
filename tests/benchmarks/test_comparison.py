"""The benchmark that runs `mep compare`: its figures, and the pictures taken from its folder."""

import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.documents import scores, sheets, tables
from benchmarks.trained import comparison
from mep_lightning.comparison import table
from mep_lightning.comparison.folder import ComparisonFolder
from mep_lightning.tiny.subjects import style


def told(*methods):
    records = [
        {"method": method, "subject": subject, "seed": seed, "training_bytes": 2**20 * (1 + number)}
        | dict.fromkeys(("clip_t", "clip_i", "dino", "dino_inter"), number + seed / 10)
        for number, method in enumerate(methods)
        for subject in ("a", "b")
        for seed in (0, 1)
    ]
    records.append({"method": methods[0], "subject": "c", "seed": 0, "error": "out of memory", "kind": "memory"})
    return table.rows(records, methods, {})


def test_lines_are_those_of_the_table():
    lines = told("zoodip", "lora")
    found = comparison.lines(comparison.rows(lines))
    assert table.as_markdown(found) == table.as_markdown(lines)
    assert found[0]["spread"]["dino"] == pytest.approx(0.0707, abs=1e-4)
    assert scores.compared(comparison.rows(lines)).count("\n") == 4


def test_a_method_without_a_cell_has_no_row():
    assert comparison.rows(table.rows([], ["zoodip"], {})) == []


def test_figures_are_of_what_every_method_has(tmp_path, monkeypatch):
    folder = ComparisonFolder(tmp_path)
    for method, subject, dino in (("lora", "a", 0.1), ("lora", "b", 0.9), ("zoodip", "a", 0.3), ("zoodip", "c", 0.9)):
        scores = dict.fromkeys(("clip_t", "clip_i", "dino", "dino_inter"), dino)
        folder.keep({"method": method, "subject": subject, "seed": 0, **scores})
    monkeypatch.setattr(comparison, "METHODS", ("lora", "zoodip"))
    monkeypatch.setattr(comparison, "planned", lambda *_: {})
    found = [row for row in comparison.figures(folder) if row["metric"] == "dino"]
    assert [(row["case"], row["value"], row["cells"]) for row in found] == [("lora", 0.1, 1), ("zoodip", 0.3, 1)]
    assert "spread" not in found[0]  # of a single seed nobody knows it


def test_a_seed_with_fewer_subjects_waits_for_the_rest(tmp_path, monkeypatch):
    folder = ComparisonFolder(tmp_path)
    monkeypatch.setattr(comparison, "METHODS", ("lora",))
    monkeypatch.setattr(comparison, "planned", lambda *_: {})

    def cells():
        (row,) = [row for row in comparison.figures(folder) if row["metric"] == "dino"]
        return row["value"], row["cells"], "spread" in row

    def keep(subject, seed, dino):
        scores = dict.fromkeys(("clip_t", "clip_i", "dino", "dino_inter"), dino)
        folder.keep({"method": "lora", "subject": subject, "seed": seed, **scores})

    for one in (("a", 0, 0.1), ("b", 0, 0.3), ("a", 1, 0.9)):
        keep(*one)
    assert cells() == (pytest.approx(0.2), 2, False)
    keep("b", 1, 0.7)
    assert cells() == (pytest.approx(0.5), 4, True)


def test_memory_alone_is_measured_anew(tmp_path, monkeypatch):
    """In short trainings of a few cells; what was measured otherwise, or of other settings or devices, is left out."""
    told, kept = [], tmp_path / "compare.jsonl"
    (tmp_path / "short").mkdir()

    def train(words):
        told.append(words)
        on_gpu = {"method": "lora", "subject": "c", "seed": 0, "training_bytes": 9, "inference_bytes": 9}
        ComparisonFolder(tmp_path / "short").keep(on_gpu | {"device": "NVIDIA H200"})
        for subject, size in (("a", 5), ("b", None)):
            figures = {"training_bytes": size, "inference_bytes": 4, "device": "cpu"}
            figures = {"error": "out of time"} if size is None else figures
            ComparisonFolder(tmp_path / "short").keep({"method": "lora", "subject": subject, "seed": 0} | figures)

    def record(subject, key="of-lora", device="cpu"):
        size = {"training_bytes": 1, "inference_bytes": 2, "dino": 0.5, "memory_of": "another"}
        return {"method": "lora", "subject": subject, "seed": 0, "key": key, "device": device} | size

    before = [record("a"), record("b"), record("c"), record("a", key="older"), record("a", device="NVIDIA H200")]
    kept.write_text("".join(json.dumps(one) + "\n" for one in before))
    monkeypatch.setattr(comparison, "METHODS", ("lora",))
    monkeypatch.setattr(comparison, "keys", lambda images: {"lora": "of-lora"})
    monkeypatch.setattr(comparison.compare, "run", train)
    comparison.measure_memory(tmp_path / "short", kept)
    after = [json.loads(line) for line in kept.read_text().splitlines()]
    assert (after[0]["training_bytes"], after[0]["inference_bytes"], after[0]["dino"]) == (5, 4, 0.5)
    assert after[0]["memory_of"]["steps"] == comparison.MEMORY_STEPS
    for one in after[1:3]:
        assert one["training_bytes"] is one["inference_bytes"] is None and "memory_of" not in one
    assert after[3:] == before[3:]
    (words,) = told
    assert words[words.index("--max-steps") + 1] == str(comparison.MEMORY_STEPS)


def drawn(folder, method, seed, *pictures):
    """The folder of a run on `dog`, with pictures of prompts."""
    to = folder.run(method, "dog", seed) / "evaluation"
    to.mkdir(parents=True)
    for number, (prompt, color) in enumerate(pictures):
        about = PngInfo()
        about.add_text("prompt", prompt)
        Image.new("RGB", (64, 64), color).save(to / f"{number}-seed{seed}.png", pnginfo=about)


def colors(path):
    """Of the pictures of a sheet, line by line."""
    step = sheets.SIDE + sheets.GAP
    with Image.open(path) as sheet:
        lines, columns = (sheet.height - sheets.HEAD) // step + 1, sheet.width // step + 1
        return [
            [sheet.getpixel((x * step + 32, sheets.HEAD + y * step + 32)) for x in range(columns)] for y in range(lines)
        ]


def test_sheets_show_one_prompt_of_every_method(tmp_path):
    folder = ComparisonFolder(tmp_path)
    (folder.photos / "dog").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(folder.photos / "dog" / "0.png")
    snow = "a <sks> dog in the snow"
    drawn(
        folder, "zoodip", 0, ("a <sks> dog on grass", "lime"), (snow, "blue"), ("a blue <sks> dog in the snow", "lime")
    )
    drawn(folder, "zoodip", 1, (snow, "yellow"))
    keys = {"zoodip": "of-zoodip", "lora": "of-lora"}
    sheets.methods(tmp_path, keys, tmp_path / "methods.png")
    red, blue, yellow, white = (255, 0, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
    assert colors(tmp_path / "methods.png") == [[red, blue, white]]
    sheets.diversity(tmp_path, keys, 2, 1, tmp_path / "diversity.png")
    assert colors(tmp_path / "diversity.png") == [[blue, white], [yellow, white]]


def test_a_sheet_shows_several_prompts_of_one_subject(tmp_path, monkeypatch):
    folder = ComparisonFolder(tmp_path)
    (folder.photos / "dog").mkdir(parents=True)
    for number, color in enumerate(("red", "yellow")):
        Image.new("RGB", (64, 64), color).save(folder.photos / "dog" / f"{number}.png")
    drawn(folder, "zoodip", 0, ("a <sks> dog on grass", "lime"), ("another", "black"), ("a red <sks> dog", "blue"))
    monkeypatch.setattr(sheets, "ONE", "dog")
    monkeypatch.setattr(sheets, "PLACES", (0, 2, 5))
    sheets.prompts(tmp_path, {"zoodip": "of-zoodip", "lora": "of-lora"}, tmp_path / "prompts.png")
    red, lime, blue, yellow, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
    assert colors(tmp_path / "prompts.png") == [[red, lime, white], [yellow, blue, white], [red, white, white]]


def test_a_sheet_keeps_pictures_whose_runs_are_gone(tmp_path):
    here, gone, empty = (ComparisonFolder(tmp_path / name) for name in ("here", "gone", "empty"))
    for folder in (here, gone, empty):
        (folder.photos / "dog").mkdir(parents=True)
    snow = "a <sks> dog in the snow"
    drawn(gone, "zoodip", 0, (snow, "blue"))
    drawn(gone, "lora", 0, (snow, "red"))
    drawn(here, "lora", 0, (snow, "lime"))
    drawn(here, "lora", 1, (snow, "yellow"))
    blue, lime, yellow, white = (0, 0, 255), (0, 255, 0), (255, 255, 0), (255, 255, 255)
    sheet = tmp_path / "diversity.png"
    for folder in (gone, here):
        sheets.diversity(folder.root, {"zoodip": "1", "lora": "2"}, 2, 1, sheet)
    assert colors(sheet) == [[blue, lime], [white, yellow]]
    sheets.diversity(empty.root, {"lora": "2", "zoodip": "1"}, 2, 1, sheet)
    assert colors(sheet) == [[lime, blue], [yellow, white]]
    sheets.diversity(empty.root, {"lora": "2", "zoodip": "other settings"}, 2, 1, sheet)
    assert colors(sheet) == [[lime, white], [yellow, white]]
    sheets.diversity(empty.root, {"lora": "2", "zoodip": "1"}, 3, 1, sheet)  # of other lines
    assert {color for line in colors(sheet) for color in line} == {white}


def test_a_methods_key_is_of_its_recipe_its_values_and_the_pictures(tmp_path, monkeypatch):
    known = comparison.keys(2)
    assert known == comparison.keys(2) and len(set(known.values())) == len(comparison.METHODS)
    assert not set(comparison.keys(3).values()) & set(known.values())
    with monkeypatch.context() as patch:
        recipe = tmp_path / "recipe.yaml"
        find = comparison.find_recipe
        patch.setattr(comparison, "find_recipe", lambda name: recipe if name == "zoodip" else find(name))
        recipe.write_text("model: {lr: 1.0}")
        assert changed(known, comparison.keys(2)) == {"zoodip"}
        recipe.write_text(find("zoodip").read_text().replace("  members_at_once: null\n", "  # a comment\n"))
        assert comparison.keys(2) == known  # a switch that is off is as one that was not known yet
        recipe.write_text(find("zoodip").read_text().replace("members_at_once: null", "members_at_once: 1"))
        assert changed(known, comparison.keys(2)) == {"zoodip"}
    lookup = comparison.defaults.lookup
    patched = lambda name, *of: lookup(name, *of) | ({"lr": 7.0} if name == "peqa" else {})  # noqa: E731
    monkeypatch.setattr(comparison.defaults, "lookup", patched)
    assert changed(known, comparison.keys(2)) == {"peqa"}


def test_the_committed_figures_are_those_of_cells_of_todays_settings(tmp_path, monkeypatch):
    path, folder = tables.results("compare"), ComparisonFolder(tmp_path)
    comparison.restore(folder, path.with_suffix(".jsonl"), comparison.keys(2))
    monkeypatch.setattr(comparison, "planned", lambda *_: {})
    committed = {(row["case"], row["metric"]): row for row in json.loads(path.read_text())["rows"]}
    figures = {(row["case"], row["metric"]): row for row in comparison.figures(folder)}
    scores = [key for key in figures if key[1] in table.SCORES]
    assert {method for method, _ in scores} == set(comparison.METHODS)
    assert {key: figures[key] for key in scores} == {key: committed[key] for key in scores}


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


@pytest.fixture
def compared(monkeypatch):
    """`mep compare` whose cells do nothing: (seeds that ran, seeds that fail or are interrupted)."""
    ran, fails = [], {}

    def compare(words):
        folder = ComparisonFolder(Path(words[words.index("--out") + 1]))
        for seed in range(int(words[words.index("--seeds") + 1])):
            if ("lora", "dog", seed) not in folder.records():
                ran.append(seed)
                came = {"dino": seed} if seed not in fails else {"error": "out of memory", "kind": "memory"}
                folder.keep({"method": "lora", "subject": "dog", "seed": seed, **came})
                if fails.get(seed) == "interrupted":
                    raise KeyboardInterrupt

    monkeypatch.setattr(comparison.compare, "run", compare)
    return ran, fails


def test_records_outlive_their_folder(tmp_path, compared):
    """A folder that is gone is begun again with what is kept, and only cells that are missing or failed run."""
    kept, (ran, fails) = tmp_path / "compare.jsonl", compared
    comparison.run(tmp_path / "first", kept, seeds=2)
    fails[2] = "interrupted"
    comparison.run(tmp_path / "second", kept, seeds=4)
    fails.clear()
    comparison.run(tmp_path / "third", kept, seeds=4)
    assert ran == [0, 1, 2, 2, 3]
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [record["dino"] for record in records] == [0, 1, 2, 3]
    assert all({"key", "machine", "date", "commit"} <= set(record) for record in records)


def test_what_was_made_with_other_settings_is_made_again_and_stays_beside(tmp_path, compared, monkeypatch):
    kept, (ran, _) = tmp_path / "compare.jsonl", compared
    comparison.run(tmp_path / "folder", kept, seeds=1)
    monkeypatch.setattr(comparison.quality, "fingerprint", lambda *_: "other weights")
    comparison.run(tmp_path / "folder", kept, seeds=1)
    comparison.run(tmp_path / "folder", kept, seeds=1)
    assert ran == [0, 0]
    assert len({json.loads(line)["key"] for line in kept.read_text().splitlines()}) == 2


def test_one_methods_new_values_leave_the_others_cells(tmp_path, compared, monkeypatch):
    kept, (ran, _) = tmp_path / "compare.jsonl", compared
    comparison.run(tmp_path / "folder", kept, seeds=1)
    runs = ComparisonFolder(tmp_path / "folder").run("lora", "dog", 0)
    runs.mkdir(parents=True)
    plans = ComparisonFolder(tmp_path / "folder").plans
    lookup = comparison.defaults.lookup
    for name, cells, there in (("zoodip_fast", [0], True), ("lora", [0, 0], False)):
        patched = lambda one, *of, name=name: lookup(one, *of) | ({"lr": 7.0} if one == name else {})  # noqa: E731
        monkeypatch.setattr(comparison.defaults, "lookup", patched)
        plans.write_text("{}")
        comparison.run(tmp_path / "folder", kept, seeds=1)
        assert (ran, runs.exists(), plans.exists()) == (cells, there, False)


def test_what_was_planned_is_kept_with_a_record(tmp_path, compared):
    plans = {"lora": {"of": "x", "training_planned": 5, "inference_planned": 3}}
    folder = ComparisonFolder(tmp_path / "folder")
    comparison.run(folder.root, tmp_path / "first.jsonl", seeds=1)
    folder.plans.write_text(json.dumps(plans))
    comparison.run(folder.root, tmp_path / "second.jsonl", seeds=1)
    (record,) = map(json.loads, (tmp_path / "second.jsonl").read_text().splitlines())
    assert (record["training_planned"], record["inference_planned"], record["dino"]) == (5, 3, 0)
    (row,) = table.rows([record | dict.fromkeys(("clip_t", "clip_i", "dino_inter"), 0.0)], ["lora"], {})
    assert row["training_planned"] == 5


def test_the_sheet_of_styles_shows_each_beside_objects_that_its_pictures_lack(tmp_path, monkeypatch):
    asked = {}

    def drawn(one, folder, templates):
        asked[folder.name] = templates
        return [Image.new("RGB", (64, 64), "red") for _ in templates]

    monkeypatch.setattr(sheets, "_in_style", drawn)
    sheets.styles(tmp_path, tmp_path / "styles.png", count=2)
    shown = {name: [caption.split()[2] for caption in style(i).captions] for i, name in enumerate(asked)}
    assert list(asked) == ["style-0", "style-1"]
    for name, templates in asked.items():
        assert len(templates) == 5 and not {template.split()[2] for template in templates} & set(shown[name])
    with Image.open(tmp_path / "styles.png") as sheet:
        step = sheets.SIDE + sheets.GAP
        assert sheet.size == (11 * step - sheets.GAP, sheets.HEAD + 2 * step - sheets.GAP)
        assert sheet.getpixel((6 * step + 30, sheets.HEAD + 30)) == (255, 0, 0)


def test_the_sheet_of_learned_precisions_has_two_pictures_of_each(tmp_path, monkeypatch):
    asked = []

    def trained(run, words):
        photos = Path(words[words.index("--data.path") + 1])
        asked.append((run.relative_to(tmp_path).as_posix(), words[words.index("--model.precision") + 1]))
        assert len(list(photos.glob("*.png"))) == 5
        return run

    colors = {"int8": "red", "int4": "blue"}
    monkeypatch.setattr(sheets, "_trained", trained)
    monkeypatch.setattr(
        sheets, "_drawn_of", lambda run, asks: [Image.new("RGB", (64, 64), colors[run.name]) for _ in asks]
    )
    sheets.learned(tmp_path, tmp_path / "learned.png", count=2)
    assert asked == [(f"{who}/{p}", p) for who in ("ball-0", "cube-0") for p in ("int8", "int4")]
    with Image.open(tmp_path / "learned.png") as sheet:
        step = sheets.SIDE + sheets.GAP
        assert sheet.size == (5 * step - sheets.GAP, sheets.HEAD + 2 * step - sheets.GAP)
        line = [sheet.getpixel((column * step + 30, sheets.HEAD + step + 30)) for column in range(1, 5)]
        assert line == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
