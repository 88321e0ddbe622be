"""The noise of every zeroth-order gradient: known answers, an independent twin, and statistics."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.kernels import philox_normal, philox_uint32
from mep_lightning.kernels.philox import CPU_BLOCKS
from mep_lightning.kernels.philox.reference import WORD, philox_4x32, uniform

PI = ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1")
RANDOM123 = {  # counter, key, answer: Random123's kat_vectors for philox4x32-10
    "zeros": (" ".join(["00000000"] * 4), " ".join(["00000000"] * 2), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (" ".join(["ffffffff"] * 4), " ".join(["ffffffff"] * 2), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": PI,
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("case", RANDOM123)
def test_known_answers_of_random123(case):
    counter, key, answer = map(words, RANDOM123[case])
    out = philox_4x32(*(torch.tensor([word]) for word in counter), *key)
    assert [int(word) & WORD for word in out] == answer


def numpy_philox(seed: int, step: int, member: int, param_id: int, numel: int) -> np.ndarray:
    """Written from the paper in unsigned 32-bit arithmetic, one block at a time."""
    out = []
    for block in range(-(-numel // 4)):
        left, right = (
            [np.uint32(block), np.uint32(member)],
            [np.uint32(step), np.uint32(param_id)],
        )  # (c0, c2), (c1, c3)
        keys = [seed & WORD, seed >> 32]
        for _ in range(10):
            products = [int(c) * m for c, m in zip(left, (0xD2511F53, 0xCD9E8D57), strict=True)]
            high, low = [np.uint32(p >> 32) for p in products], [np.uint32(p & WORD) for p in products]
            left = [high[1] ^ right[0] ^ np.uint32(keys[0]), high[0] ^ right[1] ^ np.uint32(keys[1])]
            right = [low[1], low[0]]
            keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
        out += [left[0], right[0], left[1], right[1]]
    return np.array(out[:numel], dtype=np.int64)


@pytest.mark.parametrize("numel", [1, 4, 33])
@pytest.mark.parametrize(
    "key", [(0, 0, 0, 0), (1, 2, 3, 4), ((1 << 64) - 1, WORD, WORD, WORD), (0xDEADBEEF_01234567, 30_000, 7, 400)]
)
def test_integers_equal_an_independent_twin(key, numel):
    np.testing.assert_array_equal(philox_uint32(*key, numel).numpy(), numpy_philox(*key, numel))


def test_uniforms_fold_the_sign_as_triton_does():
    values = uniform(torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]))
    scale = np.float32(4.6566127342e-10)
    expected = [0, scale, np.float32(2**31) * scale, np.float32(2**31) * scale, scale, 0]
    assert values.tolist() == [float(value) for value in expected]
    assert values.max() < 1


def test_normals_are_box_muller_of_the_integers():
    key, numel = (9, 8, 7, 6), 4000
    signed = philox_uint32(*key, numel).numpy().astype(np.uint32).view(np.int32)
    u = np.where(signed < 0, ~signed, signed).astype(np.float64) * 4.6566127342e-10
    radius, angle = np.sqrt(-2 * np.log(np.maximum(u[0::2], 1e-7))), 2 * np.pi * u[1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    np.testing.assert_allclose(philox_normal(*key, numel).numpy(), expected, rtol=1e-4, atol=4e-6)


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 5, 768, 4 * CPU_BLOCKS - 1, 4 * CPU_BLOCKS, 4 * CPU_BLOCKS + 3])
def test_a_longer_call_starts_with_a_shorter_ones_values(numel):
    longest = philox_normal(5, 1, 2, 3, 4 * CPU_BLOCKS + 100)
    assert torch.equal(philox_normal(5, 1, 2, 3, numel), longest[:numel])


def test_the_op_equals_its_reference_across_chunks():
    numel = 4 * CPU_BLOCKS + 9
    assert torch.equal(philox_normal(5, 1, 2, 3, numel), philox_normal.reference(5, 1, 2, 3, numel))


def test_values_are_standard_normal():
    z = philox_normal(0, 0, 0, 0, 1_000_000).double()
    n = len(z)
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(3).mean()) < 5 * (15 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert stats.kstest(z[:200_000].numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("word", ["seed", "seed_high", "step", "member", "param_id"])
def test_every_word_of_the_counter_gives_independent_noise(word):
    n = 200_000
    key = {"seed": 3, "step": 3, "member": 3, "param_id": 3}
    name, change = ("seed", 1 << 40) if word == "seed_high" else (word, 1)
    other = {**key, name: key[name] + change}
    one, two = philox_normal(**key, numel=n).double(), philox_normal(**other, numel=n).double()
    assert not (one == two).any()
    assert abs((one * two).mean()) < 5 / n**0.5
    assert abs((one.square() * two.square()).mean() - 1) < 5 * (8 / n) ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 768])
def test_elements_are_independent_of_their_neighbours(lag):
    z = philox_normal(1, 2, 3, 4, 400_000).double()
    assert abs((z[lag:] * z[:-lag]).mean()) < 5 / len(z) ** 0.5
    assert abs((z[lag:].square() * z[:-lag].square()).mean() - 1) < 5 * (8 / len(z)) ** 0.5


def test_seeds_count_modulo_64_bits():
    assert torch.equal(philox_normal(-1, 0, 0, 0, 8), philox_normal((1 << 64) - 1, 0, 0, 0, 8))
    assert not torch.equal(philox_normal(1 << 32, 0, 0, 0, 8), philox_normal(0, 0, 0, 0, 8))


@pytest.mark.parametrize("numel", [1, 6, 768, 4 * CPU_BLOCKS + 3])
@pytest.mark.parametrize("draw", [philox_normal, philox_normal.reference], ids=["op", "reference"])
def test_members_drawn_together_equal_members_drawn_alone(draw, numel):
    members = [7, 0, WORD]
    together = draw(5, 1, members, 3, numel)
    assert together.shape == (3, numel)
    for member, noise in zip(members, together, strict=True):
        assert torch.equal(noise, draw(5, 1, member, 3, numel))


def test_no_member_draws_nothing():
    assert philox_normal(5, 1, [], 3, 10).shape == (0, 10)


@pytest.mark.parametrize("name", ["step", "member", "param_id"])
@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_word_out_of_range_is_refused_rather_than_wrapped(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        philox_normal(**{"seed": 0, "step": 0, "member": 0, "param_id": 0, "numel": 4, name: value})
    if name == "member":
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            philox_normal(0, 0, [0, value], 0, 4)


def test_the_global_generators_are_left_alone():
    state = torch.get_rng_state()
    philox_normal(0, 0, 0, 0, 100)
    assert torch.equal(torch.get_rng_state(), state)


def test_opcheck():
    torch.library.opcheck(torch.ops.mep_lightning.philox_normal.default, (0, 1, [2], 3, 10))
    torch.library.opcheck(torch.ops.mep_lightning.philox_normal.default, (-1, 1, [2, 0], 3, 8, torch.device("cpu")))


def test_works_under_fake_tensors():
    with FakeTensorMode():
        fake = philox_normal(0, 1, 2, 3, 10, device="cpu")
        several = philox_normal(0, 1, [2, 3], 3, 10, device="cpu")
    assert (fake.shape, fake.dtype, fake.device) == ((10,), torch.float32, torch.device("cpu"))
    assert several.shape == (2, 10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_noise():
    assert torch.equal(philox_uint32(1, 2, 3, 4, 999, device="cuda").cpu(), philox_uint32(1, 2, 3, 4, 999))
    torch.testing.assert_close(
        philox_normal(1, 2, 3, 4, 999, device="cuda").cpu(), philox_normal(1, 2, 3, 4, 999), rtol=1e-5, atol=1e-6
    )
