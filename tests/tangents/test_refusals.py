"""What has no rule is refused by name: no tangent is dropped silently."""

import pytest
import torch
from torch.func import jvp
from torch.nn import functional as F

from mep_lightning import kernels
from mep_lightning.errors import UserError
from mep_lightning.tangents import Dual, rule
from mep_lightning.tangents.dual import RULES
from tests.carried import check, dual, expected, randn


def test_an_unknown_function_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="torch.*cumsum has no rule for tangents: use a finite difference"):
        torch.cumsum(dual(3), 0)
    with pytest.raises(NotImplementedError, match="fft_fft has no rule"):
        torch.fft.fft(dual(3))
    with pytest.raises(NotImplementedError, match="copy_"):
        torch.zeros(3, dtype=torch.float64).copy_(dual(3))


def test_a_custom_op_is_refused_where_functional_jvp_answers_zero():
    @torch.library.custom_op("mep_test::triple", mutates_args=())
    def triple(x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    x = dual(4)
    with pytest.raises(NotImplementedError, match="triple"):
        triple(x)
    rule(triple._opoverload)(lambda x: Dual(triple(x.stack)))
    try:
        check(triple_exact := lambda x: 3 * x, x)
        torch.testing.assert_close(triple(x).stack, expected(triple_exact, x))
    finally:
        del RULES[triple._opoverload]


def test_calls_that_no_rule_knows_are_refused_by_name():
    x = dual(3)
    with pytest.raises(NotImplementedError, match="softmax is called in a way that has no rule"):
        torch.softmax(x, -1, out=torch.empty(3, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="linear is called in a way that has no rule"):
        F.linear(input=randn(2, 3), weight=dual(4, 3))
    with pytest.raises(UserError, match="a norm whose own weight or bias has tangents"):
        F.layer_norm(randn(2, 3), (3,), x)


def test_a_backward_pass_through_them_is_refused():
    with pytest.raises(UserError, match="under torch.no_grad"):
        Dual(torch.randn(2, 3, requires_grad=True) * 2)


def test_what_jvp_would_answer_with_zero_is_not():
    q, k, v = (randn(3, 1, 2, 5, 4) for _ in range(3))
    answer, moved = jvp(lambda x: kernels.attention_tangents(x, k, v), (q,), (randn(3, 1, 2, 5, 4) + 1,))
    reference = jvp(lambda x: kernels.attention_tangents.reference(x, k, v), (q,), (randn(3, 1, 2, 5, 4) + 1,))
    assert moved.abs().max() > 1e-2
    torch.testing.assert_close((answer, moved), reference)
    with pytest.raises(NotImplementedError, match="rounds and has no derivative"):
        jvp(lambda x: kernels.quantize_rows(x)[1], (randn(2, 3),), (randn(2, 3),))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: torch.exp(x, out=torch.empty(3, dtype=torch.float64)), "exp"),
        (lambda x: x.H, "H has no rule"),
        (lambda x: x.view(torch.int64), "view"),
        (lambda x: torch.zeros(3, dtype=torch.float64).mul_(x), "mul_|in place"),
        (lambda x: torch.clamp(x, min=torch.zeros(3)), "clamp"),
    ],
)
def test_refusals_name_the_function(call, name):
    with pytest.raises(NotImplementedError, match=name):
        call(dual(3))


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: x.to(torch.int64),
        lambda x: x.item(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: torch.zeros_like(x.value).copy_(x),
        lambda x: torch.zeros_like(x).__setitem__(0, x[0]),
        lambda x: F.dropout(x, 0.5),
        lambda x: torch.randn(3)[x],
        lambda x: torch.where(x, 1.0, 2.0),
        lambda x: x.data,
        lambda x: bool(x.sum() > 0),
    ],
)
def test_ways_out_of_the_tangents_are_closed(drop):
    with pytest.raises((NotImplementedError, RuntimeError)):
        drop(dual(3))
