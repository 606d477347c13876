"""What a run folder tells of image roots: where they are, and not how one gets in."""

import fsspec

from olavlm.student.data import encoder_features, targets
from olavlm.student.probing.settings import ProbeData
from olavlm.student.training.metrics import read_metrics
from olavlm.student.training.trainer import train


def run(recipe, stage="pt"):
    folder = train(recipe, stage, {"test": "1"})
    return folder, read_metrics(folder / "metrics.jsonl")


def test_credentials_of_image_roots_are_in_no_file_of_the_run(recipe, sample_images):
    """Of a server in this process, whose paths begin with them."""
    files = fsspec.filesystem("memory")
    for file in sample_images.iterdir():
        files.pipe(f"/bob:hunter2@host/{file.name}", file.read_bytes())
    settings = {"data.images": "memory://bob:hunter2@host", "train.max_steps": 1}
    folder, metrics = run(recipe(**settings))
    assert metrics[0]["bad_images"] == 0
    kept = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert b"memory://host" in kept["recipe.yaml"]
    assert b"memory://host" in kept["state.json"]
    assert [name for name, content in kept.items() if b"hunter2" in content] == []
    assert run(recipe(**settings | {"train.max_steps": 2}))[1][-1]["step"] == 2, "it is resumed"


def test_nor_in_the_commands_that_errors_name(recipe):
    settings = {"data.images": "https://bob:hunter2@host/a?sig=hunter2", "data.encoder_features": "s3://k:hunter2@b/f"}
    made = recipe(**settings)
    data = ProbeData(["a.json"], ["https://bob:hunter2@host/a"], "s3://k:hunter2@b/f")
    commands = [
        targets.extract_command(made, ["depth"]),
        encoder_features.extract_command(made, "pt"),
        data.extract_command("depth"),
    ]
    assert all("--images https://host/a " in command for command in commands)
    assert [command for command in commands if "hunter2" in command] == []
