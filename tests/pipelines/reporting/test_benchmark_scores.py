"""Scores on benchmarks in a run's report: the mean, the best layer in the sense of each, and what is no score."""

import json
import re


def test_scores_are_a_table_and_what_is_none_is_said(make_run, report):
    folder = make_run()
    assert "Scores on benchmarks" not in report(folder).text
    (folder / "scores").mkdir()
    layers = {"layer 1": {"accuracy": 0.25}, "layer 2": {"accuracy": 0.75}}
    da2k = {"task": "da2k", "metric": "accuracy", "mean": 0.5, "layers": layers, "left_out": ["a.jpg: no features"]}
    layers = {"layer 1": {"fid": 30.5}, "layer 2": {"fid": 20.25}, "layer 3": {"fid": None}}
    fid = {"task": "fid", "metric": "fid", "mean": 25.375, "layers": layers, "left_out": []}
    for name, content in {"depth": da2k, "gen": fid, "other": ["no scores"]}.items():
        (folder / "scores" / f"{name}.json").write_text(json.dumps(content))
    page = report(folder)
    table = page.html.partition("Scores on benchmarks")[2].partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    assert rows[1:] == [
        ["depth", "DA-2K, pairs in order", "0.5", "2", "layer 2", "0.75", "1"],
        ["gen", "FID, less is better", "25.38", "2", "layer 2", "20.25", "0"],
    ]
    assert "scores/other.json is no file of olavlm-probe score" in page.text
