"""What the whole suite shares: tiny checkpoints, the bundled photographs, and stores extracted from them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported: no test may ask the network
# A Ray of one's own sets this to "token" for the whole process, whose drivers then refuse the calls of a shared cluster
# that was started without: its actors die before they run.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import gc
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from olavlm.cache import Dataset, FeatureStore, StoreBuilder, pending
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec
from olavlm.student.recipes import load_recipe
from olavlm.teachers.tiny import make_tiny

TESTS = Path(__file__).parent
DEAREST = (
    "student/training/test_distributed.py",
    "pipelines/extraction/test_cluster.py",
    "student/training/test_trainer.py",
    "pipelines/test_extract.py",
    "cache/objects/test_server.py",
    "cache/objects/test_faults.py",
    "pipelines/test_own_teacher.py",
    "student/test_recipes.py",
    "student/training/test_switches.py",
    "benchmarks/test_benchmarks.py",
    "end_to_end/test_answers_from_the_image.py",
    "student/test_fusion.py",
    "pipelines/test_object_store.py",
    "student/vision/test_encoders.py",
    "test_faults.py",
    "test_notebook.py",
    "cache/store/test_damage.py",
    "pipelines/test_store.py",
    "student/probing/test_planted.py",
    "pipelines/evaluation/test_evaluate.py",
    "end_to_end/test_commands.py",
    "benchmarks/test_train.py",
)
"""The files that take longest, the longest first: one that came last would leave all processes but its own idle."""
SAMPLE = Path(str(files("olavlm.pipelines") / "sample"))
TEACHERS = ("gen", "depth", "seg")
NUM_IMAGES = 10


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The dearest files first, in which order `--dist loadfile --no-loadscope-reorder` hands them out."""
    order = {TESTS / name: place for place, name in enumerate(DEAREST)}
    assert all(file.is_file() for file in order), "DEAREST in tests/conftest.py names a file that is not there"
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """On networks this small, more threads only wait for each other."""
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries find at the end that their objects have leaked


@pytest.fixture(scope="module", autouse=True)
def imported_for_good():
    """What stands when a module begins, packages for the most part, is looked through by no garbage collection any
    more: each training ends with one, which took a quarter of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint folders depth, seg, gen, encoder and llm."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pt_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled captions of the first photographs, one a photograph."""
    samples, seen = [], set()
    for sample in json.loads((SAMPLE / "pt.json").read_text()):
        if sample["image"] not in seen and len(seen) < NUM_IMAGES:
            seen.add(sample["image"])
            samples.append(sample)
    file = tmp_path_factory.mktemp("data") / "pt.json"
    file.write_text(json.dumps(samples))
    return file


@pytest.fixture(scope="session")
def ift_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six bundled dialogues over photographs and two without."""
    samples = json.loads((SAMPLE / "ift.json").read_text())
    chosen = [s for s in samples if "image" in s][:6] + [s for s in samples if "image" not in s][:2]
    file = tmp_path_factory.mktemp("data") / "ift.json"
    file.write_text(json.dumps(chosen))
    return file


@pytest.fixture(scope="session")
def make_store(tiny, pt_json, tmp_path_factory):
    """make_store(dtype, teachers=..., images=..., models=...) -> folder of a finished store, extracted without Ray, by
    the tiny teachers or by those in the folders `models`."""

    def make(dtype: str, teachers=TEACHERS, data: Path = pt_json, images=SAMPLE / "images", models=tiny) -> Path:
        folder = tmp_path_factory.mktemp("store") / "features"
        builder = StoreBuilder(folder)
        builder.extend_plan(Dataset([data]).images())
        specs = [TeacherSpec(name, name, str(models[name])) for name in teachers]
        for spec in specs:
            builder.ensure_teacher(spec.key, spec.load("cpu").card.to_dict(), dtype=dtype, shard_rows=4)
        worker = ShardExtractor(str(folder), specs, [str(images)], batch_size=4, device="cpu", threads=2)
        worker.load()
        for spec in specs:
            assert {r.outcome for r in worker.extract(pending(FeatureStore(folder)[spec.key]))} == {"committed"}
        return folder

    return make


@pytest.fixture(scope="session")
def store32(make_store) -> Path:
    return make_store("float32")


@pytest.fixture(scope="session")
def write_store():
    """write_store(folder, images, {key: (images, n, D)}, bad={image: reason}, cards={key: more of its card}) -> folder:
    a store of features that no teacher made."""

    def write(folder: Path, images, features, bad=(), dtype: str = "float32", cards=None) -> Path:
        builder = StoreBuilder(folder)
        builder.extend_plan(pa.array(images, pa.large_string()))
        for key, values in features.items():
            card = {"name": key, "tokens": values.shape[1], "dim": values.shape[2], "versions": {}}
            card |= (cards or {}).get(key, {})
            card["fingerprint"] = hashlib.sha256(json.dumps(card).encode()).hexdigest()
            builder.ensure_teacher(key, card, dtype=dtype, shard_rows=64)
            group = FeatureStore(folder)[key]
            for task in pending(group):
                with builder.writer(group).begin(task.shard, (task.start, task.stop), task.segment) as shard:
                    for row in range(task.start, task.stop):
                        image = group.plan.image_of(row)
                        if image in bad:
                            shard.append(None, image_sha256=None, reason=bad[image], detail="")
                        else:
                            shard.append(values[images.index(image)], image_sha256="0" * 64)
                    shard.commit()
        return folder

    return write


@pytest.fixture(scope="session")
def make_small_targets(write_store, tmp_path_factory):
    """make_small_targets(data) -> folder of a store as `make_store` makes it, of random features and of 16 tokens where
    that has 576: a step of training towards them takes half the time."""
    shapes = {"gen": (1, 48), "depth": (16, 32), "seg": (16, 64)}
    recipes = {"gen": "embedding", "depth": "mean4", "seg": "stage4"}
    cards = {key: {"recipe": {"name": name}, "geometry": "reference"} for key, name in recipes.items()}

    def make(data: Path) -> Path:
        images, draw = Dataset([data]).images().to_pylist(), np.random.default_rng(0)
        features = {key: draw.standard_normal((len(images), *shape)).astype("f4") for key, shape in shapes.items()}
        return write_store(tmp_path_factory.mktemp("small") / "features", images, features, cards=cards)

    return make


@pytest.fixture(scope="session")
def small_targets(make_small_targets, pt_json) -> Path:
    return make_small_targets(pt_json)


@pytest.fixture(scope="session")
def recipe_in(tiny, pt_json, small_targets):
    """recipe_in(folder, stage="pt", **{"section.field": value}) -> the tiny recipe over the shared fixtures. Teachers
    in the loop need the targets of `store32`, or none."""

    def make(folder: Path, stage="pt", **overrides):
        values = {
            "model.llm": tiny["llm"],
            "model.encoder": tiny["encoder"],
            "data.file": pt_json,
            "data.images": SAMPLE / "images",
            "data.workers": 0,
            "targets.store": small_targets,
            "train.output_dir": folder / stage,
            "train.batch_size": 4,
            "init.from": "null",
            **{f"tasks.{name}.model": tiny[name] for name in TEACHERS},
            **overrides,
        }
        return load_recipe("tiny", [f"--{k}={v}" for k, v in values.items()], stage)

    return make


@pytest.fixture
def recipe(recipe_in, tmp_path):
    """recipe(stage="pt", **overrides), as `recipe_in` in the test's own folder."""
    return partial(recipe_in, tmp_path)


@pytest.fixture(scope="session")
def llava(tiny, tmp_path_factory):
    """llava(kind, **changes) -> a tiny stock LLaVA of `llava_checkpoints.py`, beside this file, which no
    package holds; `llava.module` is that file."""
    module = load_beside("llava_checkpoints")

    def make(kind: str, **changes) -> Path:
        return getattr(module, kind)(tmp_path_factory.mktemp("llava") / kind, tiny["llm"], **changes)

    make.module = module
    return make


@pytest.fixture(scope="session")
def visper(tiny, tmp_path_factory):
    """visper(model_type, **changes) -> a tiny published checkpoint of `visper_checkpoints.py`, beside this file, which
    no package holds, and what it was written from; `visper.module` is that file."""
    module = sys.modules["visper_checkpoints"] = load_beside("visper_checkpoints")  # where dataclasses look

    def make(model_type: str, **changes):
        return module.publish(tmp_path_factory.mktemp("visper") / model_type, tiny, model_type, **changes)

    make.module = module
    yield make
    del sys.modules["visper_checkpoints"]


def load_beside(name: str):
    """A file of helpers beside this one as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sample_images() -> Path:
    """The folder of the bundled photographs."""
    return SAMPLE / "images"


@pytest.fixture(scope="session")
def s3_server():
    """The endpoint URL of an S3 server on loopback, a process of its own; what s3fs and boto3 need to use it is in the
    environment until the session ends."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    # `python -m moto.server -H 127.0.0.1 -p 0`, of S3 alone: that looks through the folders of all services for every
    # request, and prints each. It also ends when the tests were killed.
    program = (
        "import os, sys, threading; from moto.server import MotoRequestHandler, create_backend_app, run_simple\n"
        "threading.Thread(target=lambda: sys.stdin.read() or os._exit(0), daemon=True).start()\n"
        "MotoRequestHandler.log_request = lambda *request: None\n"
        "run_simple('127.0.0.1', 0, create_backend_app('s3'), threaded=True, request_handler=MotoRequestHandler)"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, **settings}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    endpoint = next((url[0] for line in server.stderr if (url := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
    assert endpoint, f"the S3 server did not start: status {server.wait()}"
    threading.Thread(target=server.stderr.read, daemon=True).start()  # a full pipe would stop it
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**settings, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        yield endpoint
    server.kill()
    server.wait()
