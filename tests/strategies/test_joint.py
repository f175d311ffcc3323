"""Joint and cumulative training: which data an experience brings, and how long it is trained."""

from __future__ import annotations

import torch
from cases import Case

from clplat.strategies.cumulative import Cumulative
from clplat.strategies.joint import Joint
from clplat.strategy import Session

CASES = {"finetune": Case(off={}), "joint": Case(), "cumulative": Case()}


def test_joint_trains_once_on_all_and_cumulative_on_all_so_far(tiny) -> None:
    data = tiny.stream()
    plain, n, count = Session(data[0].train), len(data[0].train), len(data)
    joint = [Joint().session(data, k, plain) for k in range(count)]
    assert joint[0].data is not None
    assert (len(joint[0].data), joint[0].budget) == (count * n, count)
    assert all(s.data is None and s.budget == 0 for s in joint[1:])
    whole = joint[0].data.batch(torch.arange(count * n))
    assert torch.equal(whole.y, torch.cat([e.train.batch(torch.arange(n)).y for e in data]))
    for k in range(count):
        session = Cumulative().session(data, k, plain)
        assert session.data is not None
        assert (len(session.data), session.budget) == ((k + 1) * n, k + 1)
