"""The miniature world: true to its geometry, a function of (seed, index), balanced, and not to be answered unseen."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from olavlm.cache import Dataset

ROOT = Path(__file__).parents[2]
NUM = 96
TASKS = ("Count", "Relation", "Depth", "Distance")
PUBLISHED = (
    "idx type task image question choices answer prompt filename source source_dataset source_filename target_class "
    "target_size bbox"
)
"""Columns of nyu-visionx/CV-Bench."""


@pytest.fixture(scope="module")
def pictures(module):
    return module("miniature.world").pictures(3, range(NUM))


def ray(*values):
    return np.array([values], np.float32)


@pytest.mark.parametrize(
    ("shape", "origin", "direction", "t", "normal"),
    [
        ("sphere", (-3, 0, 0), (1, 0, 0), 2.2, (-1, 0, 0)),
        ("sphere", (-3, 0.81, 0), (1, 0, 0), np.inf, None),
        ("sphere", (3, 0, 0), (1, 0, 0), np.inf, None),
        ("cube", (0, -5, 0.1), (0, 2, 0), (5 - 3**-0.5) / 2, (0, -1, 0)),
        ("cube", (0, -5, 0.58), (0, 2, 0), np.inf, None),
        ("cylinder", (0.1, 0, 4), (0, 0, -1), 3.2, (0, 0, 1)),
        ("cylinder", (2, 0, 0), (-1, 0, 0), 1.4, (1, 0, 0)),
        ("cylinder", (2, 0, 0.81), (-1, 0, 0), np.inf, None),
        ("cone", (0.1, 0, -3), (0, 0, 1), 2.3, (0, 0, -1)),
        # At height 0.1 the cone is 0.7 * 0.8 / 1.6 = 0.35 wide; its side leans by 0.7 / 1.6.
        ("cone", (2, 0, 0.1), (-1, 0, 0), 1.65, (1 / np.hypot(1, 0.4375), 0, 0.4375 / np.hypot(1, 0.4375))),
        ("cone", (2, 0, 1.0), (-1, 0, 0), np.inf, None),  # above the top, where its mirror image would be met
    ],
)
def test_rays_meet_solids_where_they_should(module, shape, origin, direction, t, normal):
    solids = module("miniature.solids")
    met, found = solids.MEET[solids.SHAPES.index(shape)](ray(*origin), ray(*direction))
    assert met[0] == pytest.approx(t, abs=1e-5)
    if normal is not None:
        assert found[0] == pytest.approx(normal, abs=1e-5)


def test_depth_is_the_cameras(module):
    """A sphere straight ahead begins its radius before its centre; the ground is where a ray has sunk to it."""
    plan, scenes, render = (module(f"miniature.{name}") for name in ("plan", "scenes", "render"))
    dealt = dataclasses.replace(plan.plan_of(0, 0), kinds=(0, 5, 10))
    uniforms = np.stack([plan.placement_uniforms(0, 0, attempt, scenes.UNIFORMS) for attempt in range(20)])
    made = scenes.place([dealt] * 20, uniforms)
    made = made.take(np.nonzero(made.placed)[0][:1])
    made.centre[0, 0], made.radius[0, 0] = (0, 0, 4.0), 0.5
    made.centre[0, 1:] = (50, 50, 4.0)  # out of sight
    seen = render.render(made)
    middle = scenes.SIDE // 2
    assert seen.objects[0, middle, middle] == 0
    assert seen.depth[0, middle, middle] == pytest.approx(4 - 0.8 * 0.5, abs=2e-3)
    row = scenes.SIDE - 1
    assert seen.objects[0, row, 0] == render.GROUND
    y, pitch = (row + 0.5 - middle) / made.focal[0], made.pitch[0]
    assert seen.depth[0, row, 0] == pytest.approx(made.height[0] / (y * np.cos(pitch) + np.sin(pitch)), rel=1e-5)


def test_a_picture_is_a_function_of_seed_and_index(module, pictures):
    (alone,) = module("miniature.world").pictures(3, [41])
    assert np.array_equal(alone.rgb, pictures[41].rgb)
    assert np.array_equal(alone.depth, pictures[41].depth)
    assert alone.questions == pictures[41].questions
    (other,) = module("miniature.world").pictures(4, [41])
    assert not np.array_equal(other.rgb, alone.rgb)


def test_objects_are_seen_and_counted(module, pictures):
    world = module("miniature.world")
    for picture in pictures:
        area = np.bincount(picture.objects.ravel(), minlength=8)[: len(picture.kinds)]
        assert area.min() >= world.LEAST_PIXELS
        assert len(set(picture.kinds)) == len(picture.kinds)
        count = picture.questions[0]
        what = count.text.removeprefix("How many ").partition(" ")[0]
        names = [name for name in picture.facts.names if what == "objects" or what.removesuffix("s") in name.split()]
        assert count.options[count.letter] == str(len(names))
        assert sorted(count.options) == sorted(set(count.options))


def check_answers(questions, facts, relation, depth, distance):
    (one, other), words = relation.about, {"left": -1, "right": 1, "above": -1, "below": 1}
    place = facts.column if set(relation.options) == {"left", "right"} else facts.row
    assert (place[one] - place[other]) * words[relation.options[relation.letter]] >= questions.APART
    near, far = depth.about[depth.letter], depth.about[1 - depth.letter]
    assert facts.centre[far, 2] >= questions.DEPTH_RATIO * facts.centre[near, 2]
    away = [np.linalg.norm(facts.centre[distance.about[0]] - facts.centre[i]) for i in distance.about[1:]]
    assert away[1 - distance.letter] >= questions.DISTANCE_RATIO * away[distance.letter]
    assert [facts.names[i] for i in distance.about[1:]] == list(distance.options)
    return near, far


def test_answers_are_true_by_a_margin(module, pictures):
    for picture in pictures:
        near, far = check_answers(module("miniature.questions"), picture.facts, *picture.questions[1:])
        seen = [np.median(picture.depth[picture.objects == i]) for i in (near, far)]
        assert seen[0] < seen[1]


def test_other_questions_are_as_true_and_as_balanced(module, pictures):
    """Those that the language model is asked about scenes in words."""
    questions, rng, letters = (
        module("miniature.questions"),
        np.random.default_rng(0),
        collections.defaultdict(collections.Counter),
    )
    for picture in pictures * 4:
        asked = {task: questions.ask_another(task, picture.facts, rng) for task in TASKS}
        if all(asked.values()):
            check_answers(questions, picture.facts, *list(asked.values())[1:])
        if (count := asked["Count"]) is not None:
            what = count.text.split()[2]
            among = [name for name in picture.facts.names if what.rstrip("s") in name.split() or what == "objects"]
            assert int(count.options[count.letter]) == len(among)
        for task, question in asked.items():
            if question is not None:
                letters[task][question.letter] += 1
    for task in TASKS:
        counts, options = letters[task].values(), 4 if task == "Count" else 2
        each = sum(counts) / options
        assert each > NUM / 2
        assert len(counts) == options
        assert max(abs(count - each) for count in counts) < 3 * each**0.5, letters


def test_letters_and_shortcuts_are_balanced_to_the_picture(module, pictures):
    for task, question in zip(TASKS, zip(*(p.questions for p in pictures), strict=True), strict=True):
        letters = collections.Counter(q.letter for q in question)
        assert set(letters.values()) == {NUM // (4 if task == "Count" else 2)}
    assert module("miniature.shortcuts").by_rule(pictures) == {
        "larger is closer": 0.5,
        "lower is closer": 0.5,
        "closer in the picture": 0.5,
    }


def test_words_alone_are_at_chance(module):
    """1,200 questions of each kind are learnt from and 2,400 asked; a planted clue is found."""
    shortcuts, world = module("miniature.shortcuts"), module("miniature.world")
    asked = [questions for _, questions in world.described_scenes(11, range(1200 + 2400))]
    for i, task in enumerate(TASKS):
        learnt, held_out = [q[i] for q in asked[:1200]], [q[i] for q in asked[1200:]]
        chance = shortcuts.CHANCE[task]
        # Four questions are asked at once: 1.25 of the 95% interval is 98.6%, so that all of them pass in 95%.
        assert abs(shortcuts.text_alone(learnt, held_out) - chance) < 1.25 * shortcuts.interval(chance, 2400)
    planted = [[dataclasses.replace(q[2], letter=int("red" in q[2].options[0])) for q in part]
               for part in (asked[:1200], asked[1200:])]  # fmt: skip
    assert shortcuts.text_alone(*planted) > 0.9


def test_places_and_sizes_together_are_weighed(module, pictures):
    """A planted clue is found: the closer object is always the one that is seen larger by half."""
    shortcuts = module("miniature.shortcuts")
    found = {task: shortcuts.flat(pictures, pictures, task) for task in ("Depth", "Distance")}
    assert all(0.5 <= accuracy < 0.8 for accuracy in found.values()), found
    half = len(pictures) // 2
    unseen = {task: shortcuts.trees(pictures[:half], pictures[half:], task) for task in ("Depth", "Distance")}
    assert all(0.3 < accuracy < 0.85 for accuracy in unseen.values()), unseen

    def larger_is_right(picture):
        depth = picture.questions[TASKS.index("Depth")]
        first, second = depth.about
        letter = int(picture.facts.area[second] > picture.facts.area[first])
        questions = [dataclasses.replace(q, letter=letter) if q is depth else q for q in picture.questions]
        return dataclasses.replace(picture, questions=tuple(questions))

    planted = [larger_is_right(picture) for picture in pictures]
    assert shortcuts.flat(planted, planted, "Depth") > 0.95
    assert shortcuts.trees(planted[:half], planted[half:], "Depth") > 0.9


@pytest.fixture(scope="module")
def written(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    settings = module("miniature.write").WorldSettings(scenes=48, held_out=48, seed=3)
    assert module("miniature.write").write_world(folder, settings, processes=1)
    return folder


def test_the_files_are_llavas(written, pictures):
    for name in ("pt", "ift", "held_out"):
        dataset = Dataset([written / f"{name}.json"])
        assert len(dataset) == 48
    samples = json.loads((written / "pt.json").read_text())
    facts = pictures[0].facts
    first = f"a {facts.names[int(np.argmin(facts.column))]}"
    assert samples[0]["conversations"][1]["value"].startswith(first)
    shown = np.asarray(Image.open(written / "images" / samples[0]["image"])).astype(int)
    assert np.abs(shown - pictures[0].rgb).mean() < 3
    turns = json.loads((written / "ift.json").read_text())[0]["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 4
    assert turns[0]["value"].startswith("<image>\nHow many")


def test_dialogues_answer_in_words_and_by_letters(module, written, pictures):
    """Every answer is the right one of a question of the picture; half of them are a letter alone, as is asked for."""
    forms: collections.Counter[str] = collections.Counter()
    for sample, picture in zip(json.loads((written / "ift.json").read_text()), pictures[:48], strict=True):
        said = [turn["value"].removeprefix("<image>\n") for turn in sample["conversations"]]
        right = {question.text: question for question in picture.questions}
        for asked, answered in zip(said[::2], said[1::2], strict=True):
            question = next(right.pop(text) for text in list(right) if asked.startswith(text))
            letter, words = f"({'ABCD'[question.letter]})", question.options[question.letter]
            form = {letter: "letter", words: "words", f"{words} {letter}": "both"}[answered]
            assert asked.endswith("answer (A).") == (form == "letter")
            assert ("Select from" in asked) == (form != "words")
            forms[form] += 1
        assert not right
    assert sum(forms.values()) == 48 * 4
    assert forms["letter"] == pytest.approx(96, abs=3 * 7)
    assert forms["words"] == pytest.approx(48, abs=3 * 6)


def test_the_held_out_table_is_cv_benchs(module, written):
    truth = np.load(written / "truth.npz")
    assert truth["depth"].shape == truth["objects"].shape == (48, 96, 96)
    for kind, tasks, sources in (("2d", TASKS[:2], {"ADE20K": 48, "COCO": 48}), ("3d", TASKS[2:], {"Omni3D": 96})):
        table = pq.read_table(written / "cv_bench" / f"test_{kind}.parquet")
        assert table.schema.names == PUBLISHED.split()
        rows = table.to_pylist()
        assert collections.Counter(row["task"] for row in rows) == dict.fromkeys(tasks, 48)
        assert collections.Counter(row["source"] for row in rows) == sources
        assert {row["type"] for row in rows} == {kind.upper()}
        for row in rows:
            letter = "ABCD".index(row["answer"][1])
            assert f"\n{row['answer']} {row['choices'][letter]}" in row["prompt"]
        assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).size == (96, 96)
    (left, top, width, height), names = rows[0]["bbox"][0], rows[0]["target_class"].split(", ")
    assert len(names) == len(rows[0]["bbox"])
    inside = truth["objects"][0][int(top) : int(top + height), int(left) : int(left + width)]
    assert (inside < 6).any()


def test_a_world_is_written_once(module, written):
    write = module("miniature.write")
    stamp = (written / "pt.json").stat().st_mtime_ns
    assert not write.write_world(written, write.WorldSettings(48, 48, 3))
    assert (written / "pt.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="name another folder"):
        write.write_world(written, write.WorldSettings(48, 48, 4))
    with pytest.raises(ValueError, match="multiples of 48"):
        write.WorldSettings(50, 48, 3)


def test_the_tables_are_those_of_the_results(module):
    folder = ROOT / "benchmarks" / "miniature"
    assert (folder / "README.md").read_text() == module("readme").rendered(folder)


def test_figures_are_kept_with_the_machine(module, tmp_path, monkeypatch, capsys):
    main = module("miniature.__main__")
    (tmp_path / "README.md").write_text((ROOT / "benchmarks" / "miniature" / "README.md").read_text())
    monkeypatch.setattr(main, "FOLDER", tmp_path)
    assert main.main(["shortcuts", "--pictures", "48", "--learn", "96", "--processes", "1", "--name", "toy"]) == 0
    run = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert run["machine"]["cores"] >= 1
    words, rules, places = run["figures"]["shortcuts"]
    assert set(words["values"]) == set(TASKS)
    assert rules["values"]["larger is closer"]["accuracy"] == 0.5
    assert set(places["values"]) == {
        f"{task}, {how}" for task in ("Depth", "Distance") for how in ("a linear rule", "boosted trees")
    }
    assert "larger is closer" in (tmp_path / "README.md").read_text()
    assert main.main(["models", "--dir", str(tmp_path / "none"), "--size", "toy", "--name", "toy"]) == 1
    assert "toy.json holds shortcuts, not models; give another name" in capsys.readouterr().err
    assert json.loads((tmp_path / "results" / "toy.json").read_text()) == run


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("world --dir {} --scenes 50", 2, "--scenes 50: takes multiples of 48"),
        ("world --dir {} --scenes 48 --held-out 48 --seed -1", 2, "argument --seed: -1 is not"),
        ("shortcuts --pictures 0", 2, "argument --pictures: 0 is not a positive number"),
        ("shortcuts --name a/b", 2, "argument --name: a/b is not the name of a file"),
        ("models --dir {} --only foo", 2, "invalid choice: 'foo'"),
        ("models --dir {} --device foo", 2, "--device foo: "),
        ("run --dir {} --seeds 0", 2, "argument --seeds: 0 is not a positive number"),
        ("run --dir {} --first-seed -1", 2, "argument --first-seed: -1 is not"),
        ("run --dir {} --workers 0", 2, "argument --workers: 0 is not"),
        ("run --dir {} --arms n0 --measure probes probes", 2, "n0: trained, and not probed"),
        ("run --dir {}/file/in-it --workers 1", 1, "file/in-it: Not a directory"),
        ("world --dir {}/file --scenes 48 --held-out 48 --processes 1", 1, "file"),
    ],
)
def test_wrong_usage_is_one_line(module, tmp_path, capsys, words, status, told):
    (tmp_path / "file").touch()
    main = module("miniature.__main__").main
    try:
        ended = main(words.format(tmp_path).split())
    except SystemExit as end:
        ended = end.code
    lines = capsys.readouterr().err.splitlines()
    assert ended == status
    assert told in lines[-1]
    assert "Traceback" not in "".join(lines)
