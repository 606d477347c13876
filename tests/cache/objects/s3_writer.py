"""A process that imports everything once, and forks writers of small stores which a test may kill.

Started by the fixture `writers`, see `main`.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import numpy as np

from olavlm.cache import FeatureStore, LeaseHeld, LeaseLost, ShardTask, ShardWriter

HELD, LOST = 3, 4  # exit statuses


def main() -> None:
    """Commit what standard input asks for, a JSON line a job, and answer with a line of exit statuses.

    A job is committed by `writers` processes at once, of which one that gets the lease goes on when the others have
    ended; with `die` it is killed ahead of that step. They are forked from here, where no client has been made yet:
    an event loop would not survive it, and a fresh Python takes seconds to import everything.
    """
    import s3fs  # noqa: F401
    import upath  # noqa: F401
    from botocore.loaders import JSONFileLoader
    from botocore.session import get_session

    load = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda self, path: load(path)  # S3's model: parsed once, not by every fork
    get_session().create_client("s3")
    for line in sys.stdin:
        assert threading.active_count() == 1
        job = json.loads(line)
        (go_read, go_write), (alive_read, alive_write) = os.pipe(), os.pipe()
        children = []
        for _ in range(job["writers"]):
            children.append(os.fork())
            if children[-1] == 0:
                os.close(go_write)
                os._exit(write(job, go_read, alive_read, alive_write))
        for descriptor in (go_read, go_write, alive_read, alive_write):
            os.close(descriptor)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


def write(job: dict, go: int, others: int, me: int) -> int:
    """One process of a job; its exit status."""
    from conftest import SmallStore  # of the folder above

    def on_step(step: str) -> None:
        if step == job["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "stage":
            os.close(me)
            os.read(others, 1)  # ends when the last of them has ended

    try:
        task = ShardTask(**job["task"])
        group = FeatureStore(job["store"])[task.key]
        features = dict(enumerate(np.array(job["features"], np.float32), task.start))
        writer = ShardWriter(group.folder, group.layout, group.fingerprint, on_step)
        os.read(go, 1)  # ends when all have been started
        with writer.begin(task.shard, (task.start, task.stop), task.segment) as shard:
            SmallStore.append(None, shard, task, {int(row): reason for row, reason in job["bad"].items()}, features)
            shard.commit()
        return 0
    except LeaseHeld:
        return HELD
    except LeaseLost:
        return LOST
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
