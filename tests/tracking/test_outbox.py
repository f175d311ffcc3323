"""The outbox delivers everything, in whatever order its store fails."""

import logging
import random
import time

from clplat.tracking.outbox import SPILL, Outbox


class Flaky:
    """A store that fails at random, half of the times after it had taken the request."""

    def __init__(self) -> None:
        self.draw = random.Random(0)
        self.values: list = []
        self.jobs: list = []

    def _maybe_fail(self) -> None:
        if self.draw.random() < 0.4:
            raise ConnectionError("away")

    def send_values(self, values):
        self._maybe_fail()
        self.values += [value for value in values if value not in self.values]  # as MLflow does
        self._maybe_fail()
        return []

    def steps(self, key):
        self._maybe_fail()
        return set()

    def do(self, job):
        self._maybe_fail()
        self.jobs.append(job)
        return True


def test_the_outbox_delivers_through_any_failure(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    box, store = Outbox({"uri": "flaky", "run_id": "1"}, tmp_path, every=0.001), Flaky()
    box.start(store)
    expected = [("key", float(i), i, i) for i in range(3000)]
    for value in expected:
        box.values.append(value)
        if value[2] % 300 == 0:
            box.jobs.append({"kind": "tag", "key": value[2]})
            time.sleep(0.01)
    assert box.close(timeout=20) == 0
    assert sorted(store.values) == expected
    assert sorted({job["key"] for job in store.jobs}) == list(range(0, 3000, 300))
    assert not (tmp_path / SPILL).exists()
