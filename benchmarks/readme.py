"""The figures in a README.md are made from the results/*.json beside it, between two marks.

python -m benchmarks.readme            render every one anew, as after a results file was removed
"""

from __future__ import annotations

import json
from pathlib import Path

from .figures import from_json

BEGIN, END = "<!-- results: made by `python -m benchmarks.readme`, do not edit -->", "<!-- end of results -->"


def results(folder: Path) -> dict[str, dict]:
    """The runs kept in `folder`/results, by name; other JSON files there are no runs of benchmarks."""
    runs = {file.stem: json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))}
    return {name: run for name, run in runs.items() if "figures" in run}


def render_run(run: dict) -> str:
    """One run's figures as Markdown."""
    machine = dict(run["machine"])
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in machine.pop("versions").items())
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    about = [
        f"{machine['date']}, commit {machine['commit']}, size `{run['size']}`, {run['seconds'] / 60:.1f} minutes.",
        f"{gpu}{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB; {machine['file_system']} on "
        f"{machine['disk']}; Linux {machine['kernel']}; load {machine['load']:g} at the start.",
        f"Python {machine['python']}, {versions}.",
    ]
    parts = ["\n".join(about)]
    for name, figures in run["figures"].items():
        parts += [f"### {name}", *(f.markdown() for f in from_json(figures))]
    return "\n\n".join(parts)


def render(readme: str, runs: dict[str, dict]) -> str:
    """`readme` with the figures of `runs` (by name) between its marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    parts = [f"## Results: {name}\n\n{render_run(run)}" for name, run in sorted(runs.items())]
    return "\n\n".join([before + BEGIN, *parts, END + after])


def rendered(folder: Path) -> str:
    """What README.md in `folder` is to be, given its results."""
    return render((folder / "README.md").read_text(), results(folder))


if __name__ == "__main__":
    for file in Path(__file__).parent.glob("*/README.md"):
        file.write_text(rendered(file.parent))
