"""Print pip constraints that pin every dependency to the lowest version that pyproject.toml admits.

python tests/lowest_versions.py > constraints.txt        (`make test-lowest` does)
"""

import tomllib
from pathlib import Path


def constraints(project: dict) -> list[str]:
    """`name==lowest` for each `name>=lowest` of the project and its extra `dev`."""
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = []
    for requirement in wanted:
        name, bound, version = requirement.partition(";")[0].partition(">=")
        if not bound or "," in version:
            raise SystemExit(f"{requirement}: a dependency is written NAME>=LOWEST, without an upper bound")
        lines.append(f"{name.partition('[')[0]}=={version}")
    return lines


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    print("\n".join(constraints(pyproject["project"])))
