"""The scores against their formulas on known embeddings, and as torchmetrics: reset, accumulate, synchronise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mep_lightning.errors import UserError
from mep_lightning.evaluation import (
    ClipEncoder,
    ClipImageAlignment,
    ClipTextAlignment,
    DinoAlignment,
    DinoDiversity,
    DinoEncoder,
    evaluate,
)


@pytest.fixture(scope="module")
def clip(clip_folder):
    return ClipEncoder(clip_folder)


@pytest.fixture(scope="module")
def dino(dino_folder):
    return DinoEncoder(dino_folder)


def circle(*degrees: float) -> torch.Tensor:
    """Unit vectors in a plane, [N, 2]: cosines between them are those of the angles between."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], -1)


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of a few large patches of colour each."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return [Image.fromarray(patch).resize((24, 24), Image.Resampling.NEAREST) for patch in patches]


def test_clip_t_compares_each_picture_with_its_own_text(clip):
    metric = ClipTextAlignment(clip)
    metric.update(circle(0, 90), circle(60, 90))
    assert float(metric.compute()) == pytest.approx((cos(60) + 1) / 2)


def test_image_alignment_is_the_mean_over_all_pairs(clip, dino):
    for metric in (ClipImageAlignment(clip), DinoAlignment(dino)):
        metric.update(circle(0, 40), circle(10, 70, 130))
        expected = [cos(10), cos(70), cos(130), cos(30), cos(30), cos(90)]
        assert float(metric.compute()) == pytest.approx(sum(expected) / 6)


def test_every_picture_counts_the_same_whatever_its_subjects_number_of_photos(dino):
    metric = DinoAlignment(dino)
    metric.update(circle(0), circle(0, 60))
    metric.update(circle(0), circle(90))
    assert float(metric.compute()) == pytest.approx(((1 + cos(60)) / 2 + 0) / 2)


def test_diversity_takes_pairs_within_a_group_and_none_with_itself(dino):
    metric = DinoDiversity(dino)
    metric.update(circle(0, 30, 90))
    assert float(metric.compute()) == pytest.approx((cos(30) + cos(90) + cos(60)) / 3)
    metric.update(circle(200))  # a group of one has no pair
    metric.update(circle(10, 10))
    assert float(metric.compute()) == pytest.approx((cos(30) + cos(90) + cos(60) + 1) / 4)


def test_identical_pictures_are_not_diverse_and_different_ones_are_more_so(dino):
    same, different = DinoDiversity(dino), DinoDiversity(dino)
    same.update(pictures(1) * 3)
    different.update(pictures(3))
    assert float(same.compute()) == pytest.approx(1, abs=1e-5)
    assert float(different.compute()) < 0.99


def test_batches_add_up_and_reset_forgets(clip):
    whole, parts = ClipTextAlignment(clip), ClipTextAlignment(clip)
    whole.update(circle(0, 50, 100), circle(20, 40, 160))
    parts.update(circle(0), circle(20))
    parts.update(circle(50, 100), circle(40, 160))
    assert float(parts.compute()) == pytest.approx(float(whole.compute()))
    parts.reset()
    parts.update(circle(0), circle(90))
    assert float(parts.compute()) == pytest.approx(0, abs=1e-6)


def test_forward_returns_the_batchs_own_value_and_still_accumulates(clip):
    metric = ClipTextAlignment(clip)
    assert float(metric(circle(0), circle(0))) == pytest.approx(1)
    assert float(metric(circle(0), circle(90))) == pytest.approx(0, abs=1e-6)
    assert float(metric.compute()) == pytest.approx(0.5)


def test_two_processes_add_sums_and_counts_instead_of_averaging_means(clip):
    """One process saw three pictures (mean 0), the other one (mean 1): the mean of all four is 1/4."""
    other = {"total": torch.tensor(1.0, dtype=torch.float64), "count": torch.tensor(1)}
    states = iter(["total", "count"])

    def gather(state, group):
        return [state, other[next(states)]]

    metric = ClipTextAlignment(clip, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    metric.update(circle(0, 0, 0), circle(90, 90, 90))
    assert float(metric.compute()) == pytest.approx(0.25)


def test_scores_of_pictures_are_those_of_their_embeddings(clip, dino):
    images, photos, prompts = pictures(3), pictures(2, seed=9), ["a ball", "a red ball", "a cube"]
    in_clip, words, in_photos = clip.encode_images(images), clip.encode_texts(prompts), clip.encode_images(photos)
    clip_t, clip_i, alignment = ClipTextAlignment(clip), ClipImageAlignment(clip), DinoAlignment(dino)
    clip_t.update(images, prompts)
    clip_i.update(images, photos)
    alignment.update(images, photos)
    assert float(clip_t.compute()) == pytest.approx(float((in_clip * words).sum(-1).mean()), abs=1e-6)
    assert float(clip_i.compute()) == pytest.approx(float((in_clip @ in_photos.T).mean()), abs=1e-6)
    cosines = dino.encode_images(images) @ dino.encode_images(photos).T
    assert float(alignment.compute()) == pytest.approx(float(cosines.mean()), abs=1e-6)


def test_evaluate_gives_the_four_scores_with_the_token_taken_out(clip, dino):
    images, photos = pictures(4), pictures(2, seed=9)
    prompts = ["a <sks> ball", "a <sks> ball", "a red <sks> ball", "a red <sks> ball"]
    scores = evaluate(images, prompts, photos, clip=clip, dino=dino, token="<sks>")
    plain = ["a ball", "a ball", "a red ball", "a red ball"]
    embeds = dino.encode_images(images)
    assert list(scores) == ["clip_t", "clip_i", "dino", "dino_inter"]
    assert scores["clip_t"] == pytest.approx(
        float((clip.encode_images(images) * clip.encode_texts(plain)).sum(-1).mean())
    )
    assert scores["dino_inter"] == pytest.approx(float(embeds[0] @ embeds[1] + embeds[2] @ embeds[3]) / 2)
    assert scores["clip_t"] != pytest.approx(
        evaluate(images, prompts, photos, clip=clip, dino=dino)["clip_t"], abs=1e-6
    )


def test_diversity_falls_back_to_all_pairs_where_no_prompt_has_two_pictures(clip, dino):
    images = pictures(3)
    scores = evaluate(images, ["a", "b", "c"], pictures(1), clip=clip, dino=dino)
    cosines = dino.encode_images(images) @ dino.encode_images(images).T
    assert scores["dino_inter"] == pytest.approx(float(cosines[0, 1] + cosines[0, 2] + cosines[1, 2]) / 3)


def test_a_perfect_copy_of_the_photo_scores_one(clip, dino):
    scores = evaluate(pictures(1), ["a ball"], pictures(1), clip=clip, dino=dino)
    assert scores["clip_i"] == pytest.approx(1, abs=1e-5)
    assert scores["dino"] == pytest.approx(1, abs=1e-5)
    assert math.isnan(scores["dino_inter"])


def test_nothing_to_score_is_said_in_a_sentence(clip, dino):
    with pytest.raises(UserError, match="2 pictures cannot be scored against 1 prompts"):
        evaluate(pictures(2), ["a"], pictures(1), clip=clip, dino=dino)
    with pytest.raises(UserError, match="no photo to score"):
        evaluate(pictures(1), ["a"], [], clip=clip, dino=dino)
    with pytest.raises(UserError, match="1 pictures cannot be scored against 2 prompts"):
        ClipTextAlignment(clip).update(pictures(1), ["a", "b"])
