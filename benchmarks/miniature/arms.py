"""What is trained and compared: an arm each of the recipes in recipes/, and the paper's tables that it is a row of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from olavlm.student.recipes import load_recipe

RECIPES = Path(__file__).parent / "recipes"
_PAPER, _PAPERS_BLOCKS = "llama3-8b-clip-l", 32


@dataclass(frozen=True)
class Arm:
    """A recipe, in words."""

    name: str
    """Of its file in `RECIPES`."""
    title: str
    rows: dict[str, str]
    """By table, such as `table 1`, what the paper's own row is called (pipelines/recipes/tables.yaml)."""
    titles: dict[str, str] = field(default_factory=dict)
    """By table, what it is called among that table's rows, if that is not its title."""

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"

    def title_in(self, table: str) -> str:
        return self.titles.get(table, self.title)


SINGLE, DISTILLED = "single", "distilled"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(SINGLE, "single encoder", {"table 1": "table1/vit-llama3-llava"}),
        Arm("feature_concat", "feature concat", {"table 1": "table1/vit-llama3-feature-concat"}),
        Arm("token_concat", "token concat", {"table 1": "table1/vit-llama3-token-concat"}),
        Arm(
            DISTILLED,
            "distilled",
            {"table 1": "table1/vit-llama3", "table 4": "table4/pt", "table 5": "table5/n8"},
            {"table 4": "losses in PT (distilled)", "table 5": "8 tokens a task (distilled)"},
        ),
        Arm("tokens_only", "task tokens, no losses", {"table 4": "table4/tokens-only"}),
        Arm("losses_pt_ift", "losses in PT and IFT", {"table 4": "table4/pt-ift"}),
        Arm("n0", "no task tokens", {"table 5": "table5/n0"}),
        Arm("n4", "4 tokens a task", {"table 5": "table5/n4"}),
        Arm("n16", "16 tokens a task", {"table 5": "table5/n16"}),
        # Not of the paper, whose 12 and 24 do not divide a grid of 64.
        Arm("n32", "32 tokens a task", {"table 5": ""}),
    )
}  # fmt: skip
"""By name, in the order of tables. `distilled` has 8 tokens a task, and losses in PT alone."""


def distilled_layers(task: str, blocks: int) -> list[int]:
    """At which of so many blocks a task is distilled: the paper's layers, scaled."""
    paper = load_recipe(_PAPER, [], "pt").tasks[task].layers
    return [round(layer * blocks / _PAPERS_BLOCKS) for layer in paper]


def papers_rate(stage: str) -> float:
    """The paper's learning rate, for a language model that is not the world's own."""
    return load_recipe(_PAPER, [], stage).train.lr


def arms_of(table: str) -> list[Arm]:
    """Rows of a table, in order; those of table 5 by the number of tokens."""
    rows = [arm for arm in ARMS.values() if table in arm.rows]
    order = ("n0", "n4", DISTILLED, "n16", "n32")
    return sorted(rows, key=lambda arm: order.index(arm.name)) if table == "table 5" else rows
