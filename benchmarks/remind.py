"""What a replayed row costs REMIND, against a plain replay of float features at the same depth, alternating in one run.

    python benchmarks/remind.py [--rounds 7] [--steps 40] [--threads 1]

Both sides train what lies above the same cut of the same net on B current rows, which go through the frozen part, and
on n stored ones. Plain replay keeps the features as they are; REMIND keeps codes, so it encodes the current rows and
decodes all, and with mixing decodes two stored rows for each replayed one. A ratio is the median of the rounds'
own ratios of times a step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from clplat.learners.learner import Learner
from clplat.learners.mixers.lstm import LSTM
from clplat.learners.nets.heads import Head
from clplat.learners.nets.recurrent import recurrent
from clplat.learners.nets.transformer import transformer
from clplat.learners.objectives import Classification
from clplat.rehearsal.policies import Reservoir
from clplat.strategies.remind import Remind
from clplat.streams.batch import concatenate
from clplat.streams.data import TensorData
from clplat.streams.experience import Batch, Experience, Stream
from clplat.streams.inputs import Inputs

BASE, STEPS, FEATURES, HIDDEN = 500, 28, 28, 128


def make(kind: str, strategy: Remind) -> Learner:
    """A net of two layers, its base initialised on random rows, ready for experience 1."""
    torch.manual_seed(0)
    inputs, head = Inputs(FEATURES, length=STEPS), partial(Head, outputs=10)
    net = (
        recurrent(inputs, head, mixer=LSTM, hidden=HIDDEN, layers=2)
        if kind == "LSTM"
        else transformer(inputs, head, hidden=HIDDEN, layers=2)
    )
    made = Learner(net, Classification(), strategy, partial(torch.optim.SGD, lr=0.01))
    data = TensorData(torch.randn(BASE, STEPS, FEATURES), torch.randint(0, 10, (BASE,)))
    first = Experience(0, "base", tuple(range(10)), train=data, test=data)
    strategy.setup(made, Stream("base", (first, replace(first, index=1)), "class_incremental", "class", 10, FEATURES))
    made.begin(first)
    made.end(first)
    made.begin(replace(first, index=1))
    return made


def remind_step(made: Learner, optimizer: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """One step as the learner takes it, without what Lightning does."""

    def step(batch: Batch) -> None:
        given = made.strategy.batch(made, batch)
        optimizer.zero_grad(set_to_none=True)
        output = made(given)
        made.strategy.objective(made, given, output).backward()
        optimizer.step()
        with torch.no_grad():
            made.strategy.after_step(made, given, output)

    return step


def plain_step(made: Learner, optimizer: torch.optim.Optimizer, rows: int) -> Callable[[Batch], None]:
    """The same without codes: stored float features through the same upper part."""
    buffer, cut = Reservoir(BASE, seed=0), 1
    with torch.no_grad():
        x, y = torch.randn(BASE, STEPS, FEATURES), torch.randint(0, 10, (BASE,))
        buffer.insert(Batch(made.net.lower(Batch(x, y), cut)[0], y))

    def step(batch: Batch) -> None:
        with torch.no_grad():
            current = replace(batch, x=made.net.lower(batch, cut)[0])
        joined = concatenate([current, buffer.sample(rows)])
        optimizer.zero_grad(set_to_none=True)
        made.objective(made.net.upper(joined.x, cut, joined).logits, joined).backward()
        optimizer.step()
        buffer.insert(current)

    return step


def seconds(step: Callable[[Batch], None], batches: list[Batch]) -> float:
    """Time a step."""
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - start) / len(batches)


def compare(kind: str, size: int, rows: int, mixup: float, rounds: int, steps: int) -> tuple[float, float, float]:
    """Median ratio of REMIND's time a step to plain replay's, and the median milliseconds of both."""
    made = make(kind, Remind(capacity=BASE, rows=rows, mixup=mixup, iterations=5))
    optimizer = torch.optim.SGD(made.weights().values(), lr=0.01)
    batches = [Batch(torch.randn(size, STEPS, FEATURES), torch.randint(0, 10, (size,))) for _ in range(steps)]
    sides = remind_step(made, optimizer), plain_step(made, optimizer, rows)
    for side in sides:
        seconds(side, batches[:5])
    times = [(seconds(sides[0], batches), seconds(sides[1], batches)) for _ in range(rounds)]
    ours, plain = (statistics.median(t) * 1000 for t in zip(*times, strict=True))
    return statistics.median(a / b for a, b in times), ours, plain


def main() -> None:
    """Print one line for each net, batch size and way of mixing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print("net          B   n  mixup  ratio  REMIND ms a step  plain replay ms a step")
    for kind in ("LSTM", "transformer"):
        for size in (1, 10):
            for mixup in (0.0, 0.1):
                ratio, ours, plain = compare(kind, size, 50, mixup, given.rounds, given.steps)
                print(f"{kind:11} {size:2} {50:3}  {mixup:5}  {ratio:5.2f}  {ours:16.2f}  {plain:22.2f}", flush=True)


if __name__ == "__main__":
    main()
