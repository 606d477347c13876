"""README.md's figures are made from results/*.json, between two marks.

python -m benchmarks.cache.readme            render anew, as after a results file was removed
"""

from __future__ import annotations

import json
from pathlib import Path

from .figures import from_json

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results: made by `python -m benchmarks.cache.readme`, do not edit -->", "<!-- end of results -->"


def render_run(run: dict) -> str:
    """One run's figures as Markdown."""
    machine = dict(run["machine"])
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in machine.pop("versions").items())
    about = [
        f"{machine['date']}, commit {machine['commit']}, size `{run['size']}`, {run['seconds'] / 60:.1f} minutes.",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:g} GB; {machine['file_system']} on "
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
    runs = {file.stem: json.loads(file.read_text()) for file in (folder / "results").glob("*.json")}
    return render((folder / "README.md").read_text(), runs)


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(rendered(FOLDER))
