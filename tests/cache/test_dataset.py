"""Dataset files to samples: three kinds of file, one answer; and for each kind of damage an error that names it."""

import codecs
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olavlm.cache import Dataset, DatasetError, Sample

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat — 猫\u2028, in two lines."}]
RECORDS = [
    {"id": "one", "image": "coco/1.jpg", "conversations": TALK},
    {"id": 2, "image": "coco/2.jpg", "conversations": TALK},
    {"id": "text", "conversations": TALK[1:]},
    {"image": "coco/1.jpg", "conversations": TALK, "model": "another field"},
    {"id": None, "image": None, "conversations": TALK[1:]},
    {"id": "empty", "image": "", "conversations": TALK[1:]},
]
IDS = ["one", "2", "text", "3", "4", "empty"]  # a record without an id is known by its number
IMAGES = ["coco/1.jpg", "coco/2.jpg", None, "coco/1.jpg", None, None]


def write(folder, kind: str, records: list, name="data"):
    file = folder / f"{name}{kind}"
    if kind == ".json":
        file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    elif kind == ".jsonl":
        # U+2028 is a line's end to str.splitlines, and none to JSON.
        lines = [json.dumps(r, ensure_ascii=False) for r in records]
        file.write_text("\r\n".join([*lines, "", "  "]), encoding="utf-8")
    else:
        rows = [{**{k: r.get(k) for k in ("image", "conversations")}, "id": None} for r in records]
        for row, r in zip(rows, records, strict=True):
            row["id"] = None if r.get("id") is None else str(r["id"])
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture(params=[".json", ".jsonl", ".parquet"])
def kind(request) -> str:
    return request.param


def test_every_kind_of_file_gives_the_same_samples(tmp_path, kind):
    dataset = Dataset([write(tmp_path, kind, RECORDS)])
    assert len(dataset) == 6
    talks = [r["conversations"] for r in RECORDS]
    assert list(dataset) == [Sample(*s) for s in zip(IDS, IMAGES, talks, strict=True)]
    assert dataset[-1].id == "empty"
    assert dataset.has_image().to_pylist() == [True, True, False, True, False, False]
    with pytest.raises(IndexError):
        dataset[6]


def test_other_columns_of_parquet_are_not_read(tmp_path):
    """Some cannot be made Python's, and pictures in a table are large."""
    rows = pa.Table.from_pylist([{"id": "a", "conversations": RECORDS[0]["conversations"]}])
    rows = rows.append_column("when", pa.array([2**61], pa.timestamp("us")))
    folder = tmp_path / "image=x"  # no partition of a table
    folder.mkdir()
    pq.write_table(rows, folder / "x.parquet")
    (sample,) = Dataset([str(folder / "x.parquet")])
    assert (sample.id, sample.image) == ("a", None)


def test_parquet_with_whole_number_ids(tmp_path):
    rows = [{"id": 7, "image": "a", "conversations": TALK}, {"id": 8, "image": "b", "conversations": TALK}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert [s.id for s in Dataset([str(tmp_path / "x.parquet")])] == ["7", "8"]


def test_several_files_are_one_dataset_in_their_order(tmp_path):
    files = [write(tmp_path, kind, RECORDS[i : i + 2]) for i, kind in enumerate([".parquet", ".json", ".jsonl"])]
    dataset = Dataset(files)
    assert [s.image for s in dataset] == ["coco/1.jpg", "coco/2.jpg", "coco/2.jpg", None, None, "coco/1.jpg"]
    assert dataset.files == files


def test_an_image_is_one_row_where_it_first_appears(tmp_path):
    records = [{"image": i, "conversations": TALK} for i in ("b", "a", "b", "c", "a", "é", "e\u0301")]
    images = Dataset([write(tmp_path, ".json", records), write(tmp_path, ".jsonl", records)]).images()
    assert images.type == pa.large_string()
    assert images.to_pylist() == ["b", "a", "c", "é", "e\u0301"]  # two spellings of é are two files


def test_text_alone_has_no_images(tmp_path):
    dataset = Dataset([write(tmp_path, ".json", [RECORDS[2]])])
    assert dataset.images().to_pylist() == []
    assert dataset.images().type == pa.large_string()
    assert dataset[0].image is None


def test_take_keeps_the_order_asked_for(tmp_path):
    dataset = Dataset([write(tmp_path, ".json", RECORDS), write(tmp_path, ".jsonl", RECORDS[:1])])
    part = dataset.take(np.array([6, 2, 0, 0]))
    assert [s.id for s in part] == ["one", "text", "one", "one"]
    assert part.images().to_pylist() == ["coco/1.jpg"]
    assert part.has_image().to_pylist() == [True, False, True, True]


def test_the_digest_is_of_what_samples_say_in_their_order(tmp_path):
    digest = Dataset([write(tmp_path, ".json", RECORDS)]).digest()
    for kind in (".jsonl", ".parquet"):
        assert Dataset([write(tmp_path, kind, RECORDS)]).digest() == digest
    halves = [write(tmp_path, ".json", RECORDS[:1]), write(tmp_path, ".jsonl", RECORDS[1:])]
    assert Dataset(halves).digest() == digest
    order = np.arange(len(RECORDS))
    assert Dataset(halves).take(order).digest() == digest
    assert Dataset(halves).take(order[::-1]).digest() != digest
    assert Dataset(halves).take(order[1:]).digest() != digest

    def changed(**fields) -> str:
        return Dataset([write(tmp_path, ".json", [{**RECORDS[0], **fields}, *RECORDS[1:]])]).digest()

    question, answer = TALK
    moved = [{**question, "value": question["value"] + "W"}, {**answer, "value": answer["value"][1:]}]
    others = [
        changed(),
        changed(image=None),
        changed(conversations=[question]),
        changed(conversations=[question, {**answer, "value": "No."}]),
        changed(conversations=moved),
    ]
    assert others[0] == changed(id="another") == digest
    assert len(set(others)) == len(others)


def test_a_number_beyond_pythons_digits_is_one_line(tmp_path):
    (tmp_path / "x.json").write_text(f'[{{"id": 1{"0" * 5000}}}]')
    with pytest.raises(DatasetError, match=r"x\.json: not valid JSON: Exceeds the limit"):
        Dataset([tmp_path / "x.json"])


def test_its_buffers_may_exceed_2_gib(tmp_path):
    def leaves(kind: pa.DataType) -> list[pa.DataType]:
        inner = [kind.field(i).type for i in range(kind.num_fields)]
        return [kind] if not inner else [leaf for part in inner for leaf in leaves(part)]

    schema = Dataset([write(tmp_path, ".json", RECORDS)]).table.schema
    found = [leaf for name in schema.names for leaf in leaves(schema.field(name).type)]
    assert set(found) == {pa.large_string()}
    assert schema.field("conversations").type.equals(pa.large_list(schema.field("conversations").type.value_type))


DAMAGED = {
    "no object": ("a text", "a record is an object"),
    "no conversations": ({"id": "x"}, "'conversations' is missing or empty"),
    "empty conversations": ({"conversations": []}, "'conversations' is missing or empty"),
    "conversations a text": ({"conversations": "Hello"}, "'conversations' is missing or empty"),
    "a turn a text": ({"conversations": ["Hello"]}, "every turn"),
    "a turn without from": ({"conversations": [{"value": "Hello"}]}, "every turn"),
    "a turn without value": ({"conversations": [*TALK, {"from": "gpt"}]}, "every turn"),
    "a value a number": ({"conversations": [{"from": "gpt", "value": 3}]}, "every turn"),
    "two images": ({"image": ["a", "b"], "conversations": TALK}, "'image' is one relative path, this is a list"),
    "an empty list": ({"image": [], "conversations": TALK}, "'image' is one relative path, this is a list"),
    "an image a number": ({"image": 0, "conversations": TALK}, "'image' is one relative path, this is a int"),
    "half a character": ({"conversations": [{"from": "gpt", "value": "\ud83d"}]}, "not Unicode"),
    "half a character in the path": ({"image": "\udc00.jpg", "conversations": TALK}, "not Unicode"),
}


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record_is_named(tmp_path, kind, damage):
    record, rule = DAMAGED[damage]
    records = [*RECORDS[:3], record, RECORDS[0]]
    file = tmp_path / f"data{kind}"
    file.write_text(json.dumps(records) if kind == ".json" else "\n".join(map(json.dumps, records)))
    with pytest.raises(DatasetError) as e:
        Dataset([file])
    assert str(e.value).startswith(f"{file}, record 3: ")
    assert rule in str(e.value)


def test_a_damaged_record_of_parquet_is_named(tmp_path):
    rows = [{"image": "a", "conversations": TALK}, {"image": "b", "conversations": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match=r"x\.parquet, record 1: 'conversations' is missing"):
        Dataset([tmp_path / "x.parquet"])


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("x.json", b'[{"id": 1},', "x.json: not valid JSON: .*line 1"),
        ("x.json", b"", "x.json: not valid JSON"),
        ("x.json", b"[" * 100_000, "x.json: not valid JSON"),
        ("x.json", b'{"id": 1}', "x.json: a dataset is a list of records, this is a dict"),
        ("x.json", b'["\xff"]', "x.json: not readable as UTF-8"),
        ("x.json", b"[]", "x.json: no samples in the dataset"),
        ("x.jsonl", b"\n\n", "x.jsonl: no samples in the dataset"),
        (
            "x.jsonl",
            b'{"conversations": [{"from": "gpt", "value": "a"}]}\n{"id"\n',
            "x.jsonl, record 1: not valid JSON",
        ),
        ("x.parquet", b"PAR1 not really PAR1", "x.parquet: not a readable parquet file"),
        ("x.parquet", b"", "x.parquet: not a readable parquet file"),
        ("x.csv", b"a,b", "unknown kind '.csv'; use .json, .jsonl or .parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=rule) as e:
        Dataset([tmp_path / name])
    assert "\n" not in str(e.value)


def test_damage_anywhere_in_a_parquet_file_is_a_dataset_error_or_no_damage(tmp_path):
    file = write(tmp_path, ".parquet", RECORDS)
    data, refused = file.read_bytes(), 0
    for at in range(0, len(data), 3):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            Dataset([file])
        except DatasetError:
            refused += 1
    assert refused > len(data) // 30


def test_a_missing_file_a_folder_and_no_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for file in (tmp_path / "no.json", tmp_path / "folder.json"):
        with pytest.raises(DatasetError, match="does not exist"):
            Dataset([file])
    with pytest.raises(DatasetError, match="no dataset file given"):
        Dataset([])


def test_each_image_once_under_one_conversation(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "n"}]
    samples = [{"id": i, "image": x, "conversations": turns[::-1]} for i, x in enumerate("baca")]
    samples.append({"id": "words", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    asked = Dataset([tmp_path / "data.json"]).asking(turns)
    assert [(s.id, s.image) for s in asked] == [("b", "b"), ("a", "a"), ("c", "c")]
    assert all(s.conversations == turns for s in asked)
    assert asked.images().to_pylist() == ["b", "a", "c"]
    (tmp_path / "words.json").write_text(json.dumps(samples[-1:]))
    with pytest.raises(DatasetError, match=r"words\.json: no sample has an image"):
        Dataset([tmp_path / "words.json"]).asking(turns)


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    for kind in (".json", ".jsonl"):
        file = write(tmp_path, kind, RECORDS)
        whole = Dataset([file]).digest()
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        assert Dataset([file]).digest() == whole
