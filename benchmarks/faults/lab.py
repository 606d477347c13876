"""Where trials happen: scratch folders, the scenes, and the events of an uninterrupted run of each."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from olavlm.cache import StoreBuilder

from .process import Process, Where, steps_of, the_same
from .scene import FLAVOURS, KINDS, Scene, extract, make_scene, open_group


class NotPossible(Exception):
    """This machine cannot make the fault, and why."""


class Missed(Exception):
    """The job had ended before the fault, or went past it: to be drawn again."""


class Lab:
    """All that is drawn is drawn from `seed`."""

    def __init__(self, folder: Path, seed: int, scenes: int) -> None:
        """With `scenes` scenes of each kind and flavour."""
        self.folder, self.seed, self.scenes = folder, seed, scenes
        self.points: set[tuple[str, int]] = set()
        """(scene, event) that a fault has struck at."""
        self._scenes: dict[tuple, Scene] = {}
        self._decks: dict[str, list] = {}

    def prepare(self) -> None:
        """Make every scene and an uninterrupted run of each, before any protection is left out."""
        for flavour, kind, number in itertools.product((*FLAVOURS, "long"), KINDS, range(self.scenes)):
            scene = self._scene(flavour, kind, number)
            self.events(scene)

    def scene(self, rng: np.random.Generator, flavours: Iterable[str] = FLAVOURS, kinds: Iterable = KINDS) -> Scene:
        """One of the scenes of these flavours and kinds."""
        flavours, kinds = list(flavours), list(kinds)
        flavour, kind = flavours[rng.integers(len(flavours))], kinds[rng.integers(len(kinds))]
        return self._scene(flavour, kind, int(rng.integers(self.scenes)))

    def _scene(self, flavour: str, kind: tuple[str, str], number: int) -> Scene:
        key = (flavour, *kind, number)
        if key not in self._scenes:
            name = "-".join(map(str, key))
            own = np.random.default_rng([self.seed, *name.encode()])
            self._scenes[key] = make_scene(name, self.folder / "scenes" / name, own, kind, flavour)
        return self._scenes[key]

    def deal(self, deck: str, cards: Iterable, rng: np.random.Generator):
        """One of `cards`, each once in random order before any comes again."""
        if not self._decks.get(deck):
            cards = list(cards)
            self._decks[deck] = [cards[i] for i in rng.permutation(len(cards))]
        return self._decks[deck].pop()

    def begin_row(self) -> None:
        """Forget what was struck and dealt."""
        self.points.clear()
        self._decks.clear()

    @contextlib.contextmanager
    def copy(self, scene: Scene, state: str = "base") -> Iterator[Path]:
        """The store before (`base`) or after (`final`) the scene's request, to be harmed; removed at the end."""
        folder = Path(tempfile.mkdtemp(prefix="trial-", dir=self.folder))
        try:
            path = Path(shutil.copytree(scene.folder / state, folder / "store"))
            if open_group(path) is not None:
                StoreBuilder(path).index()  # the copied one is of files of other times
            yield path
        finally:
            shutil.rmtree(folder)

    @functools.cache  # noqa: B019 - one lab a run
    def events(self, scene: Scene) -> list[str]:
        """What an uninterrupted run tells."""
        with self.copy(scene) as path:
            process = Process(lambda tell: extract(scene, path, tell=tell), root=path)
            assert process.wait() == "ok", process.words
        return process.words

    @functools.cache  # noqa: B019
    def seconds(self, scene: Scene) -> float:
        """How long an uninterrupted run takes."""
        taken = []
        for _ in range(3):
            with self.copy(scene) as path:
                began = time.perf_counter()
                Process(lambda tell, path=path: extract(scene, path, tell=tell)).wait()
                taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def draw_event(
        self, scene: Scene, rng: np.random.Generator, steps: Iterable[str], shards: Iterable[int] | None = None
    ) -> Where:
        """An event of one of `steps`, each as likely; `Missed` if the scene has none."""
        of, steps, shards = steps_of(self.events(scene)), list(steps), None if shards is None else set(shards)
        step = steps[rng.integers(len(steps))]
        there = [i for i, (s, shard) in enumerate(of) if s == step and (shards is None or shard in shards)]
        if not there:
            raise Missed
        return self.strike(scene, int(rng.choice(there)))

    def strike(self, scene: Scene, event: int) -> Where:
        """The event of this number in an uninterrupted run."""
        self.points.add((scene.name, event))
        return the_same(self.events(scene), event)


def disk_not_waited_for():
    """`os.fsync` does nothing: for faults that leave the page cache alone it makes no difference but time."""
    return mock.patch.object(os, "fsync", return_value=None)
