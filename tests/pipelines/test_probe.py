"""olavlm-probe as a user types it: a run, its scores in a table, in JSON, an image each and as a plot; and refusals."""

import json
import re
import xml.etree.ElementTree as ET
from argparse import Namespace
from xml.parsers.expat import ExpatError

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from olavlm.cache import FeatureStore, ImageRoots
from olavlm.pipelines import probe, report
from olavlm.pipelines.cli import JobFailed
from olavlm.pipelines.downstream.command import open_source
from olavlm.pipelines.downstream.probe_source import ProbeSource
from olavlm.pipelines.layer_plot import Line, layer_plot
from olavlm.student.training.trainer import train

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def scene(recipe_in, write_store, pt_json, sample_images, tmp_path_factory):
    """Folder with a store and two datasets, eight images and two others; and the arguments of a run and a scoring."""
    folder = tmp_path_factory.mktemp("probe")
    samples = json.loads(pt_json.read_text())
    for name, part in {"train": samples[:8], "held-out": samples[8:]}.items():
        (folder / f"{name}.json").write_text(json.dumps(part))
    random = np.random.default_rng(0)
    features = {k: random.standard_normal((10, *shape)) for k, shape in {"gen": (1, 8), "depth-last": (4, 6)}.items()}
    images = [sample["image"] for sample in samples]
    write_store(folder / "store", images, {k: v.astype(np.float32) for k, v in features.items()})
    model = train(recipe_in(folder, **{"train.max_steps": 1}), "pt", {})

    def words(command, data, *more):
        common = ["--data", folder / f"{data}.json", "--images", sample_images, "--store", folder / "store"]
        return [str(word) for word in (command, *common, "--workers", 0, *more)]

    def run(name, *more):
        needed = ["--model", model, "--tasks", "depth,gen", "--output", folder / name, "--batch-size", 4]
        return words("train", "train", *needed, *more)

    return folder, run, words


@pytest.fixture(scope="module")
def runs(scene):
    """Two run folders: of three layers, and of two for one task."""
    folder, run, _ = scene
    assert probe.main(run("one", "--layers", "2,4-5", "--max-steps", "2")) == 0
    assert probe.main(run("two", "--layers", "4,6", "--max-steps", "1", "--tasks", "gen")) == 0
    return folder / "one", folder / "two"


def test_scores_of_a_run_in_every_form(scene, runs, capsys):
    folder, _, words = scene
    assert probe.main(words("eval", "held-out", runs[0])) == 0
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    output = runs[0] / "eval"
    assert f"scores: {output}" in printed.out
    scores = json.loads((output / "scores.json").read_text())
    (model,) = scores["models"]
    assert (model["name"], model["images"], model["trained_on"]) == ("one", 2, 0)
    assert list(model["tasks"]) == ["depth", "gen"]
    assert model["tasks"]["depth"]["key"] == "depth-last"
    assert scores["asked"]["seed"] == 0
    assert "torch" in scores["versions"]

    cosines = pq.read_table(output / "cosines.parquet").to_pydict()
    assert cosines.pop("image") == [s["image"] for s in json.loads((folder / "held-out.json").read_text())]
    assert set(cosines) == {f"{task}/{layer}" for task in ("depth", "gen") for layer in (2, 4, 5)}
    for name, values in cosines.items():
        task, layer = name.split("/")
        found = model["tasks"][task]["layers"][layer]
        assert found["mean"] == pytest.approx(np.mean(values))
        assert (found["low"], found["high"], found["images"]) == (min(values), max(values), 2)
        assert f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]" in printed.out
    overall = model["tasks"]["gen"]["mean_over_layers"]["mean"]
    assert overall == pytest.approx(np.mean([cosines[f"gen/{x}"] for x in (2, 4, 5)]))
    assert re.search(rf"^mean +{overall:.4f} ", printed.out, flags=re.M)


def test_predictions_for_pictures_are_those_that_were_scored(scene, runs, sample_images, tmp_path):
    folder, _, words = scene
    assert probe.main(words("eval", "held-out", runs[0], "--output", tmp_path)) == 0
    cosines = pq.read_table(tmp_path / "cosines.parquet").to_pydict()
    (tmp_path / "broken.jpg").write_bytes(b"")
    roots = ImageRoots([sample_images, f"bad={tmp_path}"])
    source = ProbeSource(runs[0], "gen", roots, torch.device("cpu"), None)
    assert source.layers == ("layer 2", "layer 4", "layer 5")
    images = [*cosines["image"], "bad/broken.jpg"]
    features, valid = source.read(images)
    assert valid.tolist() == [True, True, False]
    targets, _ = FeatureStore(folder / "store")["gen"].read([8, 9])
    for layer in (2, 4, 5):
        predictions = features[f"layer {layer}"][:2].flatten(1).double()
        found = torch.cosine_similarity(predictions, torch.from_numpy(targets).flatten(1).double())
        assert found.tolist() == pytest.approx(cosines[f"gen/{layer}"], abs=1e-5)
    with pytest.raises(JobFailed, match="one of seg is scored"):
        ProbeSource(runs[0], "seg", roots, torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("task", "prompt"), [("da2k", "Describe the image."), ("fid", "Describe the image in two lines.")]
)
def test_each_benchmark_asks_its_own_prompt(task, prompt, runs, scene, sample_images, monkeypatch):
    """DA-2K what the public code asks there, the others what stood beside the images in the probes' training."""
    asked = Namespace(
        task=task, source=str(runs[0]), images=[str(sample_images)], device="cpu", key=None, probed_model=None
    )
    source = open_source(asked, "gen")
    model, read = source.predict.model, []
    states = model.states
    monkeypatch.setattr(model, "states", lambda layers, ids, **rest: read.append(ids) or states(layers, ids, **rest))
    samples = json.loads((scene[0] / "held-out.json").read_text())
    source.read([sample["image"] for sample in samples])
    (ids,) = read
    for row in ids:
        assert prompt in model.tokenizer.decode(row)


def test_the_report_draws_what_the_probes_predict(runs, tmp_path, capsys):
    assert report.main([str(runs[0]), "--samples", "2", "--output", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "No pictures" not in page
    drawn = [
        f"{task}, {name}: " for task in ("depth", "gen") for name in ("target", *(f"layer {i}" for i in (2, 4, 5)))
    ]
    assert [page.count(f'alt="{about}') for about in drawn] == [2] * 8
    assert "each probe makes" in page


def test_several_runs_side_by_side(scene, runs, capsys):
    folder, _, words = scene
    assert probe.main(words("eval", "train", *runs, "--output", folder / "both", "--resamples", 50)) == 0
    printed = capsys.readouterr()
    assert "warning: one: 8 of 8 images were in its training" in printed.err
    gen = printed.out.partition("gen ")[2]
    assert gen.split()[:2] == ["one", "two"]
    assert re.search(r"^2 .*\] +-$", gen, flags=re.M), "the second was not probed there"
    scores = json.loads((folder / "both" / "scores.json").read_text())
    assert [model["name"] for model in scores["models"]] == ["one", "two"]
    assert [model["trained_on"] for model in scores["models"]] == [8, 8]
    assert {file.name for file in (folder / "both").iterdir()} == {
        "scores.json", "layers.svg", "0-cosines.parquet", "1-cosines.parquet"
    }  # fmt: skip
    drawn = ET.parse(folder / "both" / "layers.svg").getroot()
    panels = drawn.findall(f"{SVG}g")
    lines = [len(panel.findall(f"{SVG}path[@class='band s{i}']")) for panel in panels for i in (0, 1)]
    assert lines == [1, 0, 1, 1]
    assert "mean over 8 images" in "".join(drawn.itertext()).lower()


def test_the_plot_places_means_and_intervals_where_they_belong():
    panels = {
        "depth & <b>": [Line('pt "x"', [1, 2, 4], [0.2, 0.6, 0.4], [0.1, 0.5, 0.3], [0.3, 0.7, 0.5])],
        "gen": [Line('pt "x"', [1], [0.5], [0.5], [0.5]), Line("ift", [1, 2], [0.1, 0.9], [0.0, 0.8], [0.2, 1.0])],
    }
    svg = layer_plot(panels, y_title="cosine", note="Over few & images.")
    root = ET.fromstring(svg)
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|href|url\(|<script", svg)
    assert 'depth & <b>: pt "x" is best at layer 2 with 0.600' in root.find(f"{SVG}desc").text
    first, second = root.findall(f"{SVG}g")
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in first.findall(f"{SVG}circle")]
    (x1, y1), (x2, y2), (x4, y4) = dots
    assert (x4 - x1) == pytest.approx(3 * (x2 - x1), abs=0.2), "layers are to scale"
    assert (y1 - y2) == pytest.approx(2 * (y4 - y2), abs=0.2), "and so are cosines, upwards"
    bars = [list(map(float, re.findall(r"[\d.]+", p.get("d")))) for p in first.findall(f"{SVG}path[@class='bar s0']")]
    for (x, y), (at, bottom, top) in zip(dots, bars, strict=True):
        assert at == x
        assert (bottom - y, y - top) == pytest.approx(((y1 - y2) / 4,) * 2, abs=0.2)
    styles = {c.get("class") for c in second.findall(f"{SVG}circle")}
    assert styles == {"dot s0", "dot s1"}, "a model has one colour in all panels"
    with pytest.raises((ET.ParseError, ExpatError)):  # the control: names that are not escaped break it
        ET.fromstring(svg.replace("&amp;", "&"))


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--layers", "0"], 2, "give layers from 1 and runs of them, such as 1,8-20"),
        (["--layers", "9-2"], 2, "is an empty run of layers"),
        (["--layers", "7"], 2, "layer 7 of an LLM of 6 blocks"),
        (["--tasks", "gen,gen"], 2, "give names, such as depth,seg or mine=KEY, each once"),
        (["--tasks", "gen="], 2, "give names, such as depth,seg"),
        (["--batch-size", "7", "--micro-batch", "4"], 2, "do not divide it"),
        (["--epochs", "0"], 2, "--epochs is 0.0: above 0"),
        (["--epochs", "inf"], 2, "--epochs is inf: above 0"),
        (
            ["--tasks", "seg"],
            1,
            "lacks seg (it has depth-last, gen); make it with: olavlm-extract --teacher seg --data",
        ),
        (["--model", "none"], 1, "'none': it is neither a local folder nor reachable as a hub id"),
    ],
)
def test_wrong_runs_give_one_line(scene, more, status, message, capsys):
    _, run, _ = scene
    try:
        found = probe.main(run("wrong", *more))
    except SystemExit as left:  # as argparse does, with its usage ahead of the line
        found = left.code
    errors = capsys.readouterr().err
    assert (found, message in errors) == (status, True), errors
    assert "Traceback" not in errors
    assert sum(": error: " in line for line in errors.splitlines()) == 1


def test_wrong_scorings_give_one_line(scene, runs, tmp_path, capsys):
    _, _, words = scene
    for arguments, status, message in (
        ((tmp_path,), 1, "holds no probes.json; give the run folder of olavlm-probe train"),
        ((*runs, "--model", "x"), 2, "--model goes with one RUN; 2 were given"),
        ((runs[0], "--output", runs[0] / "probes.json"), 1, "is a file; name a folder"),
    ):
        assert probe.main(words("eval", "held-out", *arguments)) == status
        errors = capsys.readouterr().err
        assert errors.startswith("olavlm-probe: error: ")
        assert errors.count("\n") == 1
        assert message in errors


def test_help_shows_an_example(capsys):
    for words, example in (
        (["train", "--help"], "example: olavlm-probe train --model runs/"),
        (["eval", "--help"], "example: olavlm-probe eval probes/"),
        (["--help"], "example: olavlm-probe train --model runs/"),
    ):
        with pytest.raises(SystemExit) as left:
            probe.main(words)
        assert left.value.code == 0
        shown = capsys.readouterr().out
        (line,) = [line for line in shown.splitlines() if line.startswith(example)]
        probe.arguments().parse_args(line.removeprefix("example: olavlm-probe ").split())
