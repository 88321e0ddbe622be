"""Figures that stand in sentences are the committed ones, as those in tables are."""

import re

import pytest

from benchmarks.documents.tables import DOCS
from tests.benchmarks.committed import (
    FAST,
    IN_AS_MANY,
    LITE,
    LONGER,
    LORA,
    OF_PATH,
    OF_WORDS,
    PAPERS,
    PARTS,
    PLAIN,
    README,
    SEARCHED,
    SELECTIVE,
    SHORTER,
    STARTED,
    TANGENTS,
    TI,
    WIDER,
    ZOODIP,
    after,
    at_end,
    beyond,
    beyond_inversion,
    from_first,
    grown,
    grown_each,
    half_way,
    left,
    less,
    lost_in_one_cell,
    minutes,
    minutes_on_tiny,
    of_inversion,
    of_subject,
    on_tiny,
    planned,
    run_peak,
    share,
    short_of_paper,
    shorter,
    step,
    told,
    tuned,
)

SENTENCES = [
    (DOCS / "reproduction.md", lambda: lost_in_one_cell() or pytest.fail("not ten differences")),
    (
        README,
        lambda: (
            f"come to {of_inversion('zoodip', 'clip_i')} of Textual Inversion's CLIP-I and "
            f"{of_inversion('zoodip', 'dino')} of its DINO, `zoodip_fast`'s to "
            f"{of_inversion('zoodip_fast', 'clip_i')} and {of_inversion('zoodip_fast', 'dino')} (± one standard error)"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"QLoRA goes from CLIP-T {tuned('qlora', 'lr=0.0003', 'clip_t')} and CLIP-I "
            f"{tuned('qlora', 'lr=0.0003', 'clip_i')} at 3e-4 to {tuned('qlora', 'lr=0.003', 'clip_t')} and "
            f"{tuned('qlora', 'lr=0.003', 'clip_i')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"it is at {tuned('dreambooth', 'lr=3e-05', 'dino')} with 3e-5, {tuned('dreambooth', 'lr=0.0001', 'dino')} "
            f"with the 1e-4 that ships and {tuned('dreambooth', 'lr=0.0003', 'dino')} with 3e-4, QLoRA at "
            f"{tuned('qlora', 'lr=0.003', 'dino')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"CLIP-T {tuned('dreambooth', 'lr=0.0003', 'clip_t')} "
            f"({tuned('dreambooth', 'lr=0.0001', 'clip_t')} at 1e-4, "
            f"{tuned('dreambooth', 'lr=3e-05', 'clip_t')} at 3e-5). QLoRA comes apart at 1e-2 (CLIP-T "
            f"{tuned('qlora', 'lr=0.01', 'clip_t')}, held-out loss {tuned('qlora', 'lr=0.01', 'heldout_loss')})"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"Beside Textual Inversion it is at {beyond_inversion('zoodip_fast', 'clip_i')} of CLIP-I and "
            f"{beyond_inversion('zoodip_fast', 'dino')} of DINO"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"with {share('zoodip_fast', 'training_planned')} of its planned memory on `tiny` and "
            f"{float(planned(FAST)) / float(planned(TI)):.0%} on SD1.5"
        ),
    ),
    (
        DOCS / "memory.md",
        lambda: (
            f"without it QLoRA is {short_of_paper('qlora')} below, PEQA {short_of_paper('peqa')} and TuneQDM "
            f"{short_of_paper('tuneqdm')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"PEQA from {tuned('peqa', 'lr=3e-06', 'clip_t')} and {tuned('peqa', 'lr=3e-06', 'clip_i')} at 3e-6 to "
            f"{tuned('peqa', LONGER, 'clip_t')} and {tuned('peqa', LONGER, 'clip_i')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"by {grown('zoodip')} MiB for ZOODiP and {grown('zoodip_fast')} for `zoodip_fast`, as for Textual "
            f"Inversion ({grown('textual_inversion')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: "GF-TI's three cells are {}, {} and {} MiB".format(*grown_each("gf_ti")),
    ),
    (
        README,
        lambda: (
            f"a token took {60 * minutes_on_tiny('textual_inversion'):.0f} s by `textual_inversion`, "
            f"{minutes_on_tiny('zoodip_fast'):.1f} minutes by `zoodip_fast` and {minutes_on_tiny('zoodip'):.0f} by "
            f"`zoodip` ([docs/reproduction.md](docs/reproduction.md#all-methods-compared)); `textual_inversion_lite` "
            f"takes {on_tiny(*LITE) / on_tiny(*PLAIN):.1f} times as long as `textual_inversion`"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"in {on_tiny(*LITE) / on_tiny(*PLAIN):.1f} times its time, and reaches ZOODiP's scores in a "
            f"{PARTS[round(on_tiny('zoodip', 'int8 zoodip') / on_tiny(*LITE))]} of ZOODiP's"
        ),
    ),
    (
        README,
        lambda: (
            f"peaked at {run_peak('textual_inversion_lite')} GiB of a GPU's memory beside ZOODiP's {run_peak('zoodip')}"
        ),
    ),
    (
        README,
        lambda: (
            f"{minutes('zoodip_fast'):.1f} minutes by `zoodip_fast`, {minutes('zoodip'):.1f} by "
            f"`zoodip` ({1e3 * step('zoodip'):.1f} ms a step), {minutes('textual_inversion'):.0f} by Textual "
            f"Inversion and {minutes('textual_inversion_lite'):.0f} by `textual_inversion_lite`"
        ),
    ),
    (
        README,
        lambda: f"a token on SD1.5 in int8 is planned at {planned(f'{ZOODIP} (streamed)')} GiB of tensors on a GPU",
    ),
    (
        DOCS / "methods.md",
        lambda: (
            f"was {step('textual_inversion_lite') / step('zoodip'):.0f} times as fast a step and its token sooner, "
            f"{minutes('zoodip'):.1f} minutes beside {minutes('textual_inversion_lite'):.0f}"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"planned at {planned(FAST)} GiB, beside ZOODiP's {planned(ZOODIP)} and Textual Inversion's {planned(TI)}"
        ),
    ),
    (
        DOCS / "memory.md",
        lambda: (
            f"on an int8 base, is planned at {planned(SELECTIVE)} GiB: "
            f"{1 - float(planned(SELECTIVE)) / float(planned(LORA)):.0%} below LoRA's backpropagation "
            f"at 512 px in fp32 ({planned(LORA)})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"ZOODiP comes to {share('zoodip', 'clip_i')} of Textual Inversion's CLIP-I and {share('zoodip', 'dino')} "
            f"of its DINO, `zoodip_fast` to {share('zoodip_fast', 'clip_i')} and {share('zoodip_fast', 'dino')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"ZOODiP is at {beyond_inversion('zoodip', 'clip_i')} and {beyond_inversion('zoodip', 'dino')}, "
            f"`zoodip_fast` at {beyond_inversion('zoodip_fast', 'clip_i')} and "
            f"{beyond_inversion('zoodip_fast', 'dino')} (± one standard error)"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"they take {share('zoodip', 'training_planned')} of Textual Inversion's memory on `tiny`, "
            "whose activations are fp32 on int8 weights too and whose members are nine, and "
            f"{float(planned(ZOODIP)) / float(planned(TI)):.0%} and {float(planned(FAST)) / float(planned(TI)):.0%} on "
            f"SD1.5 ({planned(ZOODIP)} and {planned(FAST)} of {planned(TI)} GiB)"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"CLIP-I {beyond('quality', 'zoodip_fast', 'zoodip', 'clip_i')}, "
            f"DINO {beyond('quality', 'zoodip_fast', 'zoodip', 'dino')}, "
            f"CLIP-T {beyond('quality', 'zoodip_fast', 'zoodip', 'clip_t')}, "
            f"held-out loss {beyond('quality', 'zoodip_fast', 'zoodip', 'heldout_loss')} (paired over the 24 cells"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"ZOODiP itself comes to {shorter('clip_i')} and {shorter('dino')}, so that `zoodip_fast` is ahead in "
            f"CLIP-I ({beyond(*IN_AS_MANY, 'clip_i')}) and not beyond chance in DINO ({beyond(*IN_AS_MANY, 'dino')}) "
            f"or held-out loss ({beyond(*IN_AS_MANY, 'heldout_loss')}), and behind in CLIP-T "
            f"({beyond(*IN_AS_MANY, 'clip_t')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"of its passes ZOODiP gains CLIP-I {beyond('quality', 'zoodip', SHORTER, 'clip_i')} and "
            f"DINO {beyond('quality', 'zoodip', SHORTER, 'dino')}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"its CLIP-I is {less('clip_i', 1)}% lower and its DINO {less('dino', 0)}%, a fifth of a standard error "
            f"and one; most of the latter is `heart-0` and `house-0` (DINO {of_subject('zoodip_fast', 'heart-0')} and "
            f"{of_subject('zoodip_fast', 'house-0')} beside {of_subject('textual_inversion', 'heart-0')} and "
            f"{of_subject('textual_inversion', 'house-0')})"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"In as many passes ZOODiP itself is behind it in CLIP-I (by {beyond(*IN_AS_MANY, 'clip_i')[1:]}) and, "
            f"within chance, in DINO (by {beyond(*IN_AS_MANY, 'dino')[1:]})"
        ),
    ),
    (
        DOCS / "conditioning-subspace.md",
        lambda: (
            f"CLIP-I {beyond('quality', 'zoodip_fast', 'zoodip', 'clip_i')}, "
            f"DINO {beyond('quality', 'zoodip_fast', 'zoodip', 'dino')}"
        ),
    ),
    (
        DOCS / "forward-gradients.md",
        lambda: (
            f"CLIP-I {beyond(*TANGENTS, 'clip_i')}, DINO {beyond(*TANGENTS, 'dino')}, "
            f"held-out loss {beyond(*TANGENTS, 'heldout_loss')}; on int8 weights with bf16 activations "
            + ", ".join(
                beyond("forward", "int8, bf16 activations, tangents", "fp32, finite difference", metric)
                for metric in ("clip_i", "dino")
            )
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"CLIP-I {beyond('ablation', 'SNR timesteps', 'SG', 'clip_i')}, "
            f"DINO {beyond('ablation', 'SNR timesteps', 'SG', 'dino')} against uniform ones"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: f"PUTS is the worst in held-out loss ({beyond('ablation', 'SG, PUTS 500..900', 'SG', 'heldout_loss')})",
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"ahead of the first line ({from_first('estimators', 'prompt search first', 'heldout_loss')}, its search "
            f"of 895 words among the passes), the conditioning subspace from there further "
            f"({from_first('estimators', SEARCHED, 'heldout_loss')}; "
            f"CLIP-I {from_first('estimators', SEARCHED, 'clip_i')}), "
            f"and orthogonal directions as well ({from_first('estimators', 'orthogonal directions', 'heldout_loss')}), "
            f"whose DINO is behind ({from_first('estimators', 'orthogonal directions', 'dino')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"SPSA in as many passes (CLIP-I {from_first('estimators', 'SPSA', 'clip_i')}, "
            f"DINO {from_first('estimators', 'SPSA', 'dino')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"guided search (DINO {from_first('estimators', 'guided search', 'dino')}), two directions (DINO "
            f"{from_first('estimators', 'n=2', 'dino')}), and, at this learning rate, losses that are not standardised "
            f"(DINO {from_first('estimators', 'losses as they are (no FZOO)', 'dino')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"16 directions in as many passes (CLIP-I {beyond(*WIDER, 'clip_i')}, DINO {beyond(*WIDER, 'dino')} beyond "
            f"eight) and a start at the best word (held-out loss {beyond(*STARTED, 'heldout_loss')}, "
            f"CLIP-I {beyond(*STARTED, 'clip_i')}, DINO {beyond(*STARTED, 'dino')}, "
            f"CLIP-T {beyond(*STARTED, 'clip_t')})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"CLIP-I {beyond('loras', 'selective', 'BP-low alone', 'clip_i')}, "
            f"DINO {beyond('loras', 'selective', 'BP-low alone', 'dino')}) whatever draws them"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"where ZOODiP is after some {after('zoodip', at_end('naive ZO')):,.0f}, and ZOODiP goes on to "
            f"{told(at_end('zoodip'))}; Textual Inversion is there after about "
            f"{after('textual_inversion', at_end('zoodip')):,.0f}, `zoodip_fast` after about "
            f"{after('zoodip_fast', at_end('zoodip')):,.0f}, and half-way, at {told(half_way())}, after "
            f"{after('zoodip_fast', half_way()):,.0f} beside ZOODiP's {after('zoodip', half_way()):,.0f}"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: f"ends behind the naive run ({told(at_end(PAPERS))} and {told(at_end('naive ZO'))})",
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"first alone brings the loss from {told(left('textual_inversion', 0, OF_PATH))} to "
            f"{told(left('textual_inversion', 1, OF_PATH))} and all of them to "
            f"{told(left('textual_inversion', 128, OF_PATH))} says that little beside that line counts. Four are a "
            f"little better than all ({told(left('textual_inversion', 4, OF_PATH))})"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            "with half but .0002 ("
            + ", ".join(
                f"{told(left(run, 64, OF_WORDS))} of {told(left(run, 128, OF_WORDS))}"
                for run in ("textual_inversion", "zoodip_fast")
            )
            + ")"
        ),
    ),
    (
        DOCS / "reproduction.md",
        lambda: f"500..1000 against 0..1000: {beyond('timesteps', '500..1000', '0..1000', 'heldout_loss')}, paired",
    ),
    (
        DOCS / "reproduction.md",
        lambda: (
            f"has with PUTS {beyond('timesteps', 'zoodip_fast, 500..900', 'zoodip_fast', 'heldout_loss')} of it, "
            f"CLIP-I {beyond('timesteps', 'zoodip_fast, 500..900', 'zoodip_fast', 'clip_i')} "
            f"and DINO {beyond('timesteps', 'zoodip_fast, 500..900', 'zoodip_fast', 'dino')}"
        ),
    ),
]


@pytest.mark.parametrize(
    ("document", "sentence"), SENTENCES, ids=[f"{one.stem} {n}" for n, (one, _) in enumerate(SENTENCES)]
)
def test_a_sentence_has_the_committed_figures(document, sentence):
    plain = re.sub(r"\s+", " ", document.read_text()).replace(" %", "%")
    assert sentence() in plain
