"""`mep predict`: pictures of the learned subject."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mep_lightning.commands.drawing import add_options, check_options, draw, open_run, prepare_folder
from mep_lightning.commands.options import Options
from mep_lightning.errors import refuse_unless

EPILOG = """\
examples:
  mep predict --run runs/zoodip-1 --prompts "a photo of a <sks> dog on a beach" "a <sks> dog in a red hat"
  mep predict --run exported/ --prompts "a photo of a {}" --count 4
"""


def run(argv: Sequence[str]) -> int:
    """Runs `mep predict`."""
    parser = Options("predict", "Generates pictures of the learned subject.", EPILOG)
    parser.add_argument("--prompts", nargs="+", required=True, metavar="TEXT", help="{} stands for the subject")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pictures a prompt (default 1)")
    parser.add_argument("--out", metavar="DIR", help="where the PNGs go (default: predictions/ in the run's folder)")
    add_options(parser)
    options = parser.parse_args(list(argv))
    check_options(options)
    refuse_unless(options.count >= 1, "--count", options.count, "1 or more")

    refuse_unless(all(text.strip() for text in options.prompts), "--prompts", '""', "a text each")
    learned = open_run(options)
    prompts = [learned.prompt(text) for text in options.prompts]
    if absent := [text for text in prompts if not learned.is_in(text)]:
        print(f"Note: the subject is not in {absent[0]!r}; write {learned.token} or {{}} where it goes.")
    if holes := [hole for text in prompts for hole in re.findall(r"\{[^{}]*\}", text)]:
        print(f"Note: {holes[0]} stands for nothing and is drawn as it is; {{}} stands for the subject.")
    folder = Path(options.out).expanduser() if options.out else learned.folder.root / "predictions"
    prepare_folder(folder)
    for path in draw(learned, prompts, options.count, options).save(folder):
        print(path)
    return 0
