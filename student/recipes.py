"""Where recipes come from: files over their bases, the paper's tables, stages, the command line.

    load_recipe("llama3-8b-clip-l", ["--train.batch_size=16"], "pt")
    load_chain("table5/n4", [])             # a recipe for each stage, from the result of the one before

A recipe file holds the sections of `config.Recipe`, optionally `base: OTHER` (a file beside it, or a shipped recipe)
that it overrides, and `stages: {pt: {...}, ift: {...}}` with what differs between stages. Later wins: base, file, its
stage, command line (`--section.field value`), its words for the stage (`--stages.pt.section.field value`). A key that
does not exist is an error that names the nearest one that does.

`recipes/tables.yaml` holds the rows of the paper's tables, each a few overrides of a shipped recipe; `table5/n4` names
the row n4 of table 5.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from olavlm.student.choices import Stage
from olavlm.student.config import STAGES, Recipe
from olavlm.student.errors import RecipeError, RecipeFileError

SHIPPED = "olavlm.pipelines"
TABLES = "tables.yaml"
"""The shipped file with the rows of tables; the others are a recipe each."""


@dataclass(frozen=True)
class TableRow:
    """One row of a table of the paper."""

    name: str
    """Of the recipe: table5/n4."""
    title: str
    """Of the table."""
    base: str
    overrides: dict[str, Any]
    """In the shape of a recipe file."""


def load_recipe(config: str, overrides: Sequence[str], stage: Stage) -> Recipe:
    """Read a recipe for one stage.

    Args:
        config: path of a YAML file, or the name of a shipped recipe.
        overrides: command line words, `--section.field value` or `--section.field=value`; values are YAML, but those of
            keys that hold text are taken as they stand.

    Raises:
        RecipeFileError: a file that is missing or no YAML.
        RecipeError: a name that is no recipe's, a key or value that is not valid.
    """
    return _Source(config, overrides).recipe(stage)


def load_chain(config: str, overrides: Sequence[str]) -> dict[Stage, Recipe]:
    """Read a recipe for each stage of `train.stages`, in order; the arguments are those of `load_recipe`.

    Every stage but the first starts from the one before. `train.output_dir` is the folder of them all, and stage S
    writes to the folder S in it; one with `{stage}`, or that the file gives to a stage alone, is the stage's own.
    """
    source = _Source(config, overrides)
    recipes: dict[Stage, Recipe] = {}
    for stage in source.stages:
        recipe = source.recipe(stage)
        if not source.has_own_folder(stage):
            recipe.train.output_dir = str(Path(recipe.train.output_dir) / stage)
        if recipes:
            recipe.init.from_ = next(reversed(recipes.values())).train.output_dir
        recipes[stage] = recipe
    return recipes


class _Source:
    """A recipe file and a command line, from which the recipe of any stage is made."""

    def __init__(self, config: str, overrides: Sequence[str]) -> None:
        self.config = str(config)
        self.common = _read(config)
        self.by_stage = self._sections(self.common.pop("stages", None) or {}, self.config)
        _check_keys(self.common, Recipe, (), self.config)
        self.said, by_stage = {}, {}
        for key, value in _parse_overrides(overrides):
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            if key.startswith("stages."):
                by_stage = _merge(by_stage, nested["stages"])
            else:
                _check_keys(nested, Recipe, (), "command line")
                self.said = _merge(self.said, nested)
        self.said_by_stage = self._sections(by_stage, "command line")

    def _sections(self, by_stage: Any, where: str) -> dict[str, dict[str, Any]]:
        if not isinstance(by_stage, dict) or set(by_stage) - set(STAGES):
            got = ", ".join(sorted(map(str, set(by_stage) - set(STAGES)))) if isinstance(by_stage, dict) else by_stage
            raise RecipeError(f"{where}: 'stages' holds {', '.join(STAGES)}, got {got}")
        for name, section in by_stage.items():
            _check_keys(section, Recipe, (), f"{where}, stage {name}")
        return {name: section or {} for name, section in by_stage.items()}

    @property
    def stages(self) -> list[Stage]:
        """What `olavlm-train all` runs."""
        named = (_merge(self.common, self.said).get("train") or {}).get("stages")
        if named is not None and (not isinstance(named, list) or not all(stage in STAGES for stage in named)):
            raise RecipeError(f"train.stages is {named!r}: a list of {', '.join(STAGES)}, such as [pt, ift]")
        return named or [stage for stage in STAGES if stage in self.by_stage] or ["pt", "ift"]

    def recipe(self, stage: Stage) -> Recipe:
        parts = (self.by_stage.get(stage), self.said, self.said_by_stage.get(stage))
        merged = self.common
        for part in parts:
            merged = _merge(merged, part or {})
        for section in ("model", "data", "train"):
            merged[section] = merged.get(section) or {}
        merged["train"].setdefault("stages", self.stages)
        self._name_folders(merged, stage)
        return _build(merged, self.config)

    def has_own_folder(self, stage: Stage) -> bool:
        """Whether the stage's run folder is no other stage's, as it stands."""

        sections = (
            (self.said_by_stage.get(stage, {}), True),
            (self.said, False),
            (self.by_stage.get(stage, {}), True),
            (self.common, False),
        )
        for section, of_the_stage in sections:
            if folder := (section.get("train") or {}).get("output_dir"):
                return of_the_stage or "{stage}" in str(folder)
        return False

    def _name_folders(self, merged: dict[str, Any], stage: Stage) -> None:
        """Puts in what `{recipe}`, `{stage}` and `{previous}` stand for."""
        name = self.config if self.config in shipped_recipes() else Path(self.config).stem
        ahead = [s for s in self.stages if STAGES.index(s) < STAGES.index(stage)]
        for section, key in (("train", "output_dir"), ("init", "from")):
            fields = dict(merged.get(section) or {})
            if not isinstance(text := fields.get(key), str):
                continue
            if "{previous}" in text and not ahead:
                raise RecipeError(f"{section}.{key} is {text}, and no stage of train.stages is ahead of {stage}")
            previous = ahead[-1] if ahead else ""
            fields[key] = text.replace("{recipe}", name).replace("{stage}", stage).replace("{previous}", previous)
            merged[section] = fields


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name, and the files that they stand in."""
    recipes = {file.stem: file for file in sorted(_folder().glob("*.yaml")) if file.name != TABLES}
    return recipes | dict.fromkeys(table_rows(), _folder() / TABLES)


@cache
def table_rows() -> dict[str, TableRow]:
    """The rows of the paper's tables, by the names of their recipes."""
    tables = yaml.safe_load((_folder() / TABLES).read_text(encoding="utf-8"))
    rows = {}
    for name, table in tables.items():
        for row, content in table["rows"].items():
            overrides = {key: value for key, value in (content or {}).items() if key != "base"}
            base = (content or {}).get("base", table["base"])
            rows[f"{name}/{row}"] = TableRow(f"{name}/{row}", table["title"], base, overrides)
    return rows


def _folder() -> Path:
    return Path(str(files(SHIPPED) / "recipes"))


def _read(config: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file over its base; `above` are the files that it is a base of, the nearest last."""
    path = above[-1].parent / config if above else Path(config)
    if not path.is_file():
        if (row := table_rows().get(str(config))) is not None:
            return _merge(_read(row.base), row.overrides)
        path = shipped_recipes().get(Path(config).stem) if Path(config).name == str(config) else None
    if path is None:
        names = [name for name in shipped_recipes() if name not in table_rows()]
        near = difflib.get_close_matches(str(config), table_rows(), 1, cutoff=0.7)
        names += [f"a row of the paper's tables, such as {(near or list(table_rows()))[0]} (olavlm-train recipes)"]
        error = RecipeFileError if Path(config).suffix in (".yaml", ".yml", ".json") else RecipeError
        raise error(f"recipe {config} does not exist; give a file or one of {', '.join(names)}")
    if any(path.samefile(file) for file in above):
        chain = " -> ".join(file.name for file in (*above, path))
        raise RecipeError(f"recipe {path} is a base of itself ({chain}); a chain of bases has to end")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise RecipeFileError(f"recipe {path} is not valid YAML: {e}") from None
    if not isinstance(content, dict):
        raise RecipeFileError(f"recipe {path} is a {type(content).__name__}, not a mapping of sections")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: base is {base!r}; name a file beside it, or a shipped recipe")
    return _merge(_read(base, (*above, path)), content)


def _merge(under: dict, over: dict) -> dict:
    """Mappings are merged key by key, everything else is replaced; a task set to null is taken out."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _parse_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"argument {word!r} is not expected; an override is --section.field value")
        key, eq, text = word[2:].partition("=")
        if not eq:
            if not rest:
                raise RecipeError(f"--{key} lacks its value")
            text = rest.pop(0)
        pairs.append((key, _value(key, text)))
    return pairs


def _value(key: str, text: str) -> Any:
    """What a word on the command line says: YAML, except that a key of text takes it as it stands, such as a path with
    ` #` in it or `2024`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if value is None or text.strip()[:1] in ("'", '"'):
        return value
    hint = _hint(key.removeprefix("stages.").partition(".")[2] if key.startswith("stages.") else key)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return text if str in kinds and not (list[str] in kinds and isinstance(value, list)) else value


def _hint(key: str) -> Any:
    """The type of a recipe key, None for one that is a section or does not exist."""
    hint: Any = Recipe
    for part in key.split("."):
        if dataclasses.is_dataclass(hint):
            hint = {name.rstrip("_"): kind for name, kind in typing.get_type_hints(hint).items()}.get(part)
        else:
            hint = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return hint


def _check_keys(content: Any, cls: type, path: tuple[str, ...], where: str) -> None:
    """RecipeError for what is no section where one belongs, and for the first key that the dataclass does not have,
    with the nearest of all valid ones."""
    if content is None and len(path) != 1:
        return  # a stage without words of its own, a task that is taken out
    if not isinstance(content, dict):
        what, got = f"'{'.'.join(path)}'" if path else "a recipe", "nothing" if content is None else content
        raise RecipeError(f"{where}: {what} holds keys with their values, got {got}")
    hints = typing.get_type_hints(cls)
    for key, value in content.items():
        names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(cls)}
        if key not in names:
            full = (*path, str(key))
            while isinstance(value, dict) and value:  # name a field, not a section
                name, value = next(iter(value.items()))
                full = (*full, str(name))
            dotted, valid = ".".join(full), list(_all_keys(Recipe))
            local = [".".join((*path, n)) for n in names]
            near = difflib.get_close_matches(dotted, local + valid, 1, cutoff=0.0)
            raise RecipeError(f"{where}: unknown recipe key '{dotted}'; the nearest is '{near[0]}'")
        hint = hints[names[key]]
        if dataclasses.is_dataclass(hint):
            _check_keys(value, hint, (*path, key), where)
        elif typing.get_origin(hint) is dict:
            if not isinstance(value, dict):
                got = "nothing" if value is None else value
                raise RecipeError(f"{where}: '{'.'.join((*path, key))}' holds names with their keys, got {got}")
            for name, entry in value.items():
                _check_keys(entry, typing.get_args(hint)[1], (*path, key, name), where)


def _all_keys(cls: type, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        here = (*path, name.rstrip("_"))
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, here)
        elif typing.get_origin(hint) is dict:
            yield from _all_keys(typing.get_args(hint)[1], (*here, "NAME"))
        else:
            yield ".".join(here)


def _build(content: dict[str, Any], where: str) -> Recipe:
    content = json.loads(json.dumps(content, default=str))
    if isinstance(content.get("init"), dict) and "from" in content["init"]:
        content["init"]["from_"] = content["init"].pop("from")
    if isinstance(content.get("tasks"), dict):
        content["tasks"] = {name: task for name, task in content["tasks"].items() if task is not None}
    if isinstance(content.get("train"), dict) and content["train"].get("mixed_precision") is False:
        content["train"]["mixed_precision"] = "no"  # which YAML reads as false
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    try:
        return parser.instantiate(parser.parse_object({"recipe": content})).recipe
    except (ArgumentError, TypeError, ValueError) as e:
        message = " ".join(str(e).replace("recipe.", "").replace("Parser key ", "").split())
        raise RecipeError(f"{where}: {message.replace('from_', 'from')}") from None
