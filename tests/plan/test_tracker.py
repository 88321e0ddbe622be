"""Live bytes: what counts once, what counts not at all, and when it stops counting."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mep_lightning.plan.tracker import LiveBytes

KIB = torch.zeros(256)  # 1,024 bytes


def test_storages_count_from_their_making_to_their_release():
    with LiveBytes() as live:
        a = torch.zeros(256)
        b = a + 1
        assert (live.now, live.peak) == (2048, 2048)
        del a
        assert (live.now, live.peak) == (1024, 2048)
        del b
    assert (live.now, live.peak) == (0, 2048)


def test_views_and_results_in_place_share_a_storage():
    with LiveBytes() as live:
        a = torch.zeros(256)
        view = a.view(16, 16)[3:]
        a.mul_(2)
        assert live.now == 1024
        del a
        assert live.now == 1024  # the view holds it
        del view
    assert live.now == 0


def test_what_was_there_before_counts_when_it_is_given():
    with LiveBytes() as live:
        KIB.add_(0)
        made_before = KIB + 0
        live.hold({"a": [KIB, KIB], "b": made_before})
        assert live.now == 2048


def test_meta_tensors_hold_nothing_and_fakes_what_they_stand_for():
    with FakeTensorMode(), LiveBytes() as live:
        with torch.device("meta"):
            meta = torch.zeros(1 << 40)
        fake = torch.zeros(1 << 40, dtype=torch.uint8)
        assert live.now == 1 << 40
        del meta, fake
    assert live.now == 0


def test_a_peak_can_begin_anew_and_an_operations_inside_counts():
    def inside(operation, args):
        return 500 if str(operation).startswith("aten.neg") else 0

    with LiveBytes(inside=inside) as live:
        a = torch.zeros(256)
        torch.zeros(10_000)
        live.reset_peak()
        assert live.peak == 1024
        b = -a
        assert (live.now, live.peak) == (2048, 2548)
        del b


def test_an_autograd_graph_holds_what_it_saves():
    x = torch.zeros(256, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp()  # saves both results, the second of which is y itself
        assert live.now == 2048
        y.sum().backward()
        del y
    assert live.now == 1024  # the gradient
