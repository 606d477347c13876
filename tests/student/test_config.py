"""Recipes: sections, overrides, inheritance, and errors that name the key."""

import pytest
import yaml

from olavlm.student.config import describe
from olavlm.student.errors import RecipeError, RecipeFileError
from olavlm.student.recipes import load_recipe, shipped_recipes, table_rows

MINIMAL = {
    "model": {"llm": "llm", "encoder": "encoder"},
    "data": {"file": "pt.json", "images": "images"},
    "train": {"output_dir": "run"},
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(content, name="recipe.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(tmp_path / name)

    return write_recipe


def test_defaults_are_the_papers(write):
    recipe = load_recipe(write(MINIMAL), [], "pt")
    assert {name: task.layers for name, task in recipe.tasks.items()} == {
        "gen": [12, 20], "depth": [8, 20], "seg": [10, 18]
    }  # fmt: skip
    assert all(task.weight == 0.5 for task in recipe.tasks.values())
    assert recipe.losses.contrastive_weight == 0.3
    assert recipe.task_order == ["gen", "depth", "seg"]


def test_command_line_wins_over_stage_wins_over_file_wins_over_base(write):
    write({**MINIMAL, "train": {"output_dir": "base", "lr": 1.0, "seed": 1, "batch_size": 1}}, "base.yaml")
    file = write(
        {
            "base": "base.yaml",
            "train": {"seed": 2, "batch_size": 2, "accumulation": 2},
            "stages": {"pt": {"train": {"batch_size": 3, "accumulation": 3}}, "ift": {"train": {"seed": 9}}},
        }
    )
    train = load_recipe(file, ["--train.accumulation", "4"], "pt").train
    assert (train.lr, train.seed, train.batch_size, train.accumulation) == (1.0, 2, 3, 4)


def test_override_forms(write):
    recipe = load_recipe(
        write(MINIMAL),
        ["--init.from=runs/pt", "--tasks.depth.layers", "[1, 2]", "--train.lr=1e-4", "--data.file", "[a.json, b.json]"],
        "pt",
    )
    assert recipe.init.from_ == "runs/pt"
    assert recipe.tasks["depth"].layers == [1, 2]
    assert recipe.train.lr == 1e-4
    assert recipe.files == ["a.json", "b.json"]
    assert recipe.to_dict()["init"] == {"from": "runs/pt"}


def test_resolved_recipe_reads_back_the_same(write):
    recipe = load_recipe(write(MINIMAL), ["--init.from", "x"], "pt")
    again = load_recipe(write(recipe.to_dict(), "resolved.yaml"), [], "pt")
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_a_task_is_taken_out_by_null(write):
    recipe = load_recipe(write({**MINIMAL, "base": "tiny"}), ["--tasks.seg", "null"], "pt")
    assert recipe.task_order == ["gen", "depth"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.max_step", "train.max_steps"),
        ("trian.seed", "train.seed"),
        ("model.encodr", "model.encoder"),
        ("init.form", "init.from"),
        ("tasks.depth.layer", "tasks.depth.layers"),
    ],
)
def test_unknown_key_names_itself_and_the_nearest(write, key, nearest):
    with pytest.raises(RecipeError, match=f"unknown recipe key '{key}'; the nearest is '{nearest}'"):
        load_recipe(write(MINIMAL), [f"--{key}", "1"], "pt")


def test_unknown_key_in_the_file(write):
    with pytest.raises(RecipeError, match=r"unknown recipe key 'targets\.stor'; the nearest is 'targets\.store'"):
        load_recipe(write({**MINIMAL, "targets": {"stor": "x"}}), [], "pt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.batch_size=0", "train.batch_size is 0: at least 1"),
        ("--train.batch_size=four", "train.batch_size"),
        ("--targets.source=cash", "targets.source"),
        ("--data.fraction=1.5", "data.fraction is 1.5"),
        ("--train.max_grad_norm=-1", "train.max_grad_norm is -1"),
        ("--train.max_grad_norm=0", "train.max_grad_norm is 0"),
        ("--train.weight_decay=-1", "train.weight_decay is -1"),
        ("--train.lr=.nan", "train.lr is nan: above 0"),
        ("--losses.contrastive_weight=-1", "losses.contrastive_weight is -1"),
        ("--losses.contrastive_weight=.nan", "losses.contrastive_weight is nan: at least 0"),
        ("--model.order=[depth]", "model.order"),
        ("--tasks.depth.layers=[0]", "counted from 1"),
    ],
)
def test_wrong_values_are_one_line(write, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(MINIMAL), [override], "pt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_lists_the_shipped_recipes():
    for name, kind in (("no/such.yaml", RecipeFileError), ("such", RecipeError)):
        with pytest.raises(kind, match=r"does not exist; give a file or one of .*tiny"):
            load_recipe(name, [], "pt")


@pytest.mark.parametrize("content", ["a: [", "- a list", b"\xff\xfe\x00"])
def test_damaged_file(write, tmp_path, content):
    file = write("")
    (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeFileError):
        load_recipe(file, [], "pt")


SECTIONS = {
    "stages: {prt: {}}": "'stages' holds pt, vpt, ift, got prt",
    "stages: 5": "'stages' holds pt, vpt, ift, got 5",
    "stages: {pt: 5}": "stage pt: a recipe holds keys with their values, got 5",
    "stages: {pt: [1]}": r"stage pt: a recipe holds keys with their values, got \[1\]",
    "stages: {pt: {train: 5}}": "stage pt: 'train' holds keys with their values, got 5",
    "train: 5": "'train' holds keys with their values, got 5",
    "train: [1]": r"'train' holds keys with their values, got \[1\]",
    "model: foo": "'model' holds keys with their values, got foo",
    "init: 5": "'init' holds keys with their values, got 5",
    "losses:": "'losses' holds keys with their values, got nothing",
    "tasks:": "'tasks' holds names with their keys, got nothing",
    "tasks: {depth: 5}": r"'tasks\.depth' holds keys with their values, got 5",
    "train: {stages: 5}": r"train\.stages is 5: a list of pt, vpt, ift",
    "train: {stages: [zz]}": r"train\.stages is \['zz'\]: a list of pt, vpt, ift",
}


@pytest.mark.parametrize("content", SECTIONS)
def test_what_is_no_section_is_said_and_never_dropped(write, content):
    """Over a base, and with the same section on the command line, which would take its place."""
    with pytest.raises(RecipeError, match=SECTIONS[content]):
        load_recipe(write(f"base: tiny\n{content}\n"), ["--train.seed", "1", "--model.llm", "x"], "pt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.stages", "pt"], "train.stages is 'pt': a list of pt, vpt, ift, such as [pt, ift]"),
        (["--train", "5"], "command line: 'train' holds keys with their values, got 5"),
        (["--train", "[1]"], "command line: 'train' holds keys with their values, got [1]"),
        (["--stages.pt", "5"], "command line, stage pt: a recipe holds keys with their values, got 5"),
        (["--stages", "5"], "command line: unknown recipe key 'stages'; the nearest is"),
        (["--model.order", "[gen, gen, depth, seg]"], "model.order is ['gen', 'gen', 'depth', 'seg']: each task once"),
    ],
)
def test_a_wrong_kind_of_value_is_one_line(write, words, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write({**MINIMAL, "base": "tiny"}), words, "pt")
    assert message in str(error.value)


@pytest.mark.parametrize("path", ["runs/exp #2", "2024", "010", "no", "null and void", "runs: 2", "[a]"])
@pytest.mark.parametrize("stage", ["", "stages.pt."])
def test_a_text_on_the_command_line_is_taken_as_it_stands(write, path, stage):
    """YAML would cut the first at its comment, and write into another run's folder."""
    recipe = load_recipe(write(MINIMAL), [f"--{stage}train.output_dir", path, "--data.file", path], "pt")
    assert recipe.train.output_dir == path


def test_lists_quotes_and_null_on_the_command_line_are_yaml(write):
    words = ["--data.file", "[a.json, b.json]", "--targets.store", "null", "--model.template", "'phi_3'"]
    recipe = load_recipe(write({**MINIMAL, "targets": {"store": "x"}}), words, "pt")
    assert (recipe.files, recipe.targets.store, recipe.model.template) == (["a.json", "b.json"], None, "phi_3")


@pytest.mark.parametrize("name", sorted(shipped_recipes().keys() - table_rows().keys()))
@pytest.mark.parametrize("stage", ["pt", "ift"])
def test_shipped_recipes_load(name, stage):
    recipe = load_recipe(name, [], stage)
    assert stage in recipe.train.output_dir
    assert (recipe.init.from_ is None) == (stage == "pt")


def test_paper_recipes_have_the_papers_hyper_parameters():
    for name, template in (("llama3-8b-clip-l", "llama_3"), ("phi3-mini-clip-l", "phi_3")):
        pt, ift = (load_recipe(name, [], stage) for stage in ("pt", "ift"))
        assert pt.model.template == template
        assert (pt.train.lr, ift.train.lr) == (1e-3, 2e-5)
        assert [8 * r.train.batch_size * r.train.accumulation for r in (pt, ift)] == [256, 128]  # 8 GPUs
        assert {n: t.layers for n, t in pt.tasks.items()} == {"gen": [12, 20], "depth": [8, 20], "seg": [10, 18]}
        assert (pt.data.group_by_modality, ift.data.group_by_modality) == (False, True)
        assert pt.train.warmup == ift.train.warmup == 0.03


def test_help_names_every_contract_key():
    text = describe()
    for key in (
        "model.llm", "model.encoder", "data.file", "data.images", "targets.store", "targets.source", "init.from",
        "train.output_dir", "train.max_steps", "train.seed", "train.batch_size", "train.accumulation",
    ):  # fmt: skip
        assert f"  {key}: " in text
