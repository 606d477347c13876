"""Pictures that training left: the last ones, how they came to be, bounded in number and size."""

import base64
import io
import re

import numpy as np
from PIL import Image


def leave(folder, steps, names, size=(30, 20)):
    for step in steps:
        made = folder / "pictures" / f"step-{step:06d}"
        made.mkdir(parents=True)
        for number, name in enumerate(names):
            Image.new("RGB", size, (step % 256, 40 * number, 0)).save(made / f"{name}.png")


def shown(page):
    return [attrs["alt"].partition(":")[0] for tag, attrs in page.tags if tag == "img"]


def test_the_last_step_is_shown_and_beneath_it_the_first_and_the_middle(make_run, report):
    folder = make_run()
    assert "Pictures of training" not in report(folder, "--samples", 0).text
    leave(folder, [1000, 200, 400, 2000, 1100], ["00-cat", "01-<b>"])
    (folder / "pictures" / "step-003000").mkdir()  # a step that was killed before its first picture
    page = report(folder, "--samples", 0)
    assert shown(page) == [f"{name} at step {step}" for name in ("00-cat", "01-<b>") for step in (2000, 200, 1100)]
    assert "drawn in training at step 2,000" in page.text
    assert page.text.count("how it came to be, step 200 and 1100") == 2
    colours = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(d))))[0, 0, 0]
        for d in re.findall(r"base64,([^\"]*)", page.html)
    ]
    np.testing.assert_allclose(colours[:3], [2000 % 256, 200, 1100 % 256], atol=3)


def test_pictures_of_one_step_have_nothing_beneath_them(make_run, report):
    folder = make_run()
    leave(folder, [100], ["00-cat"])
    page = report(folder, "--samples", 0)
    assert shown(page) == ["00-cat at step 100"]
    assert "came to be" not in page.text


def test_there_are_few_pictures_and_small_ones_and_a_damaged_one_says_so(make_run, report):
    folder = make_run()
    leave(folder, [100, 200], [f"{i:02d}-x" for i in range(6)], size=(2400, 1200))
    (folder / "pictures" / "step-000200" / "01-x.png").write_bytes(b"no picture")
    page = report(folder, "--samples", 0)
    assert "4 of 6 samples are shown" in page.text
    assert len(shown(page)) == 7
    sizes = {(int(attrs["width"]), int(attrs["height"])) for tag, attrs in page.tags if tag == "img"}
    assert sizes == {(1000, 500), (640, 320)}
    assert "not-an-image" in page.by_class["empty"]
