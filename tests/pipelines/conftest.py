"""What the tests of the commands share: extractions that need no Ray."""

import time
from collections import deque

import pytest

from olavlm.pipelines.extraction.crew import Looked, Ready, Returned
from olavlm.pipelines.extraction.extractor import ShardExtractor
from olavlm.pipelines.extraction.scheduler import Scheduler


@pytest.fixture
def without_ray(monkeypatch):
    """Extractions of this process are done in it, by one worker, the scheduler's only one: an actor of Ray imports for
    ten seconds before a test's second of work."""

    def run_tasks(job, tasks, tally) -> None:
        tally.device, tally.hosts, tally.nodes = "cpu", ["here"], 1
        Scheduler(CrewOfOne(job), tasks, tally, workers=1).run()

    monkeypatch.setattr("olavlm.pipelines.extraction.cluster.run_tasks", run_tasks)


class CrewOfOne:
    """See `olavlm.pipelines.extraction.crew.Crew`. The worker loads, or does a block, when somebody looks."""

    elastic, obstacle, name = False, "", "the worker here"

    def __init__(self, job) -> None:
        self._extractor = ShardExtractor(
            job.store, list(job.specs), list(job.images), batch_size=job.batch_size, device="cpu", threads=1,
            known_images=list(job.known_images),
        )  # fmt: skip
        self._loaded, self._blocks = False, deque()

    def room(self) -> int:
        return 1

    def hire(self, wanted: int) -> int:
        return 1

    def give(self, worker, block) -> None:
        self._blocks.append(block)

    def look(self, seconds: float) -> list:
        if not self._loaded:
            self._extractor.load()
            self._loaded = True
            return [Ready(self)]
        if not self._blocks:  # what is left is held by another run: a killed one's actors take a moment to notice
            time.sleep(seconds)
            return []
        block = self._blocks.popleft()
        return [Returned(self, self._extractor.extract(block), block)]

    def last_look(self) -> list:
        return [Looked(self, self._extractor.watch())]

    def dismiss(self, worker, blame: str = "") -> None:
        raise AssertionError(f"the only worker is of no use: {blame}")

    def stop(self) -> None:
        self._extractor.stop()
