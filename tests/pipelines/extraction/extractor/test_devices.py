"""How a worker computes: threads, compiled forwards, memory formats, a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import torch

from olavlm.cache import FeatureStore, StoreBuilder
from olavlm.pipelines.extraction.extractor import ShardExtractor, TeacherSpec


def test_one_compute_thread_whatever_thread_asks(scene):
    scene = scene()
    store = scene.store("a")
    seen = []
    scene.teachers["a"].before_forward = lambda batch: seen.append(torch.get_num_threads())
    worker = scene.worker(store)
    with ThreadPoolExecutor(1) as other:
        other.submit(worker.extract, scene.tasks(store)).result()
    assert set(seen) == {1}


def test_what_is_compiled_is_the_forward_and_only_when_asked(scene, monkeypatch):
    scene, compiled = scene(), []
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    store = scene.store("a")
    scene.worker(store)
    assert compiled == []
    scene.worker(store, compile=True)
    assert compiled == [scene.teachers["a"].forward]


def test_channels_last_where_patches_overlap(scene):
    scene = scene()
    store = scene.store("ab")
    networks = {"a": torch.nn.Conv2d(3, 4, kernel_size=3), "b": torch.nn.Conv2d(3, 4, kernel_size=4, stride=4)}
    for key, network in networks.items():
        scene.teachers[key].network = torch.nn.Sequential(network)
    scene.worker(store)
    is_last = {k: n.weight.is_contiguous(memory_format=torch.channels_last) for k, n in networks.items()}
    assert is_last == {"a": True, "b": False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_a_gpu_gives_the_same_bytes_each_time_and_nearly_those_of_the_cpu(scene, tiny, sample_images, tmp_path, dtype):
    scene = scene(0)
    specs = [TeacherSpec(name, name, str(tiny[name])) for name in ("depth", "seg", "gen")]
    images = sorted(file.name for file in sample_images.iterdir())[:10]
    stores = {}
    for name, device in {"cpu": "cpu", "gpu": "cuda", "again": "cuda"}.items():
        builder = StoreBuilder(tmp_path / name)
        builder.extend_plan(pa.array(images, pa.large_string()))
        for spec in specs:
            builder.ensure_teacher(spec.key, spec.load("cpu").card.to_dict(), dtype=dtype, shard_rows=8)
        stores[name] = FeatureStore(builder.path)
        worker = ShardExtractor(
            str(builder.path), specs, [str(sample_images)], batch_size=scene.batch_size, device=device, threads=2
        )
        worker.load()
        with ThreadPoolExecutor(2) as calls:
            results = calls.map(worker.extract, [[task] for task in scene.tasks(stores[name])])
            assert scene.outcomes(r for block in results for r in block) == {"committed": 6}
        assert worker.watch().stages.device > 0
    assert scene.files(stores["gpu"]) == scene.files(stores["again"])
    for spec in specs:
        cpu, gpu = (FeatureStore(stores[name].path)[spec.key].read(range(10))[0] for name in ("cpu", "gpu"))
        cosine = torch.cosine_similarity(torch.from_numpy(cpu).flatten(1), torch.from_numpy(gpu).flatten(1))
        assert cosine.min() > (0.99999 if dtype == "float16" else 0.98)
