import math
import re

import numpy as np
import pytest

from modmoe.analysis.records import Matrix, Picture
from modmoe.analysis.report import result_table, write_report


def entry(*seeds: float | None) -> dict:
    finite = [x for x in seeds if x is not None]
    return {"mean": sum(finite) / len(finite) if len(finite) == len(seeds) else None, "seeds": list(seeds)}


def accuracy(value: float = 0.5) -> Matrix:
    return Matrix(np.array([[value, math.nan], [0.25, 1.0]]), "after task", "task", ["t0", "t1"], ["u0", "u1"])


def page(tmp_path, config=None, summary=None, matrices=None, title="Run") -> str:
    path = tmp_path / "report.html"
    write_report(path, title, config or {}, summary or {"m": {"a": entry(0.5)}}, matrices or {})
    return path.read_text(encoding="utf-8")


def test_the_table_shows_mean_and_half_width():
    metrics, rows = result_table({"pool": {"a": entry(0.0, 2.0), "count": entry(4, 4)}, "control": {"b": entry(None)}})
    assert metrics == ["a", "count", "b"]
    # a: mean 1; half-width t(0.975, 1) * s / sqrt(2) = 12.706 * 1; "a" holds whole numbers, so it is a count
    # count: both seeds 4, so the half-width is exactly 0 and no decimals are needed
    assert rows == [["pool", "1.0 ± 12.7", "4", "–"], ["control", "–", "–", "n/a"]]  # noqa: RUF001


def test_one_seed_gives_no_interval():
    _, rows = result_table({"pool": {"accuracy": entry(0.91237), "one": entry(1.0), "parameters": entry(1234567)}})
    assert rows == [["pool", "0.912", "1.000", "1,234,567"]]


def test_small_numbers_keep_their_digits():
    _, rows = result_table({"pool": {"a": entry(0.00012), "b": entry(0.0), "c": entry(-0.25)}})
    assert rows == [["pool", "1.2e-04", "0.000", "-0.250"]]


def test_the_page_says_what_was_run(tmp_path):
    summary = {"pool": {"a": entry(0.1, 0.3)}, "control": {"a": entry(0.1, 0.1)}}
    text = page(tmp_path, {"experiment": "continual"}, summary, title="Split digits")
    assert "<h1>Split digits</h1>" in text
    assert "2 methods, 2 seeds each" in text
    assert 'title="seeds: 0.1, 0.3"' in text
    # mean 0.2; s = 0.1 sqrt(2), s / sqrt(2) = 0.1; 12.706 * 0.1 = 1.271
    assert '0.200 <span class="half">± 1.271</span>' in text
    assert f"tensorboard --logdir '{tmp_path / 'tensorboard'}'" in text


def test_the_page_loads_nothing_from_outside(tmp_path):
    text = page(tmp_path, matrices={"m": {"accuracy": accuracy()}})
    assert not re.search(r"https?:|//|<script|<link|<img|src=|url\(|@import", text)


def test_pictures_are_in_the_page_itself(tmp_path):
    path = tmp_path / "report.html"
    film = Picture(b"GIF89a\x00", 'a "leap"')
    write_report(path, "Run", {}, {"m": {"a": entry(0.5)}}, {}, pictures={"m": {"film": film}, "other": {}})
    text = path.read_text(encoding="utf-8")
    # base64 of the bytes 47 49 46 38 39 61 00
    assert '<img src="data:image/gif;base64,R0lGODlhAA==" alt="m: a &quot;leap&quot;">' in text
    assert not re.search(r"https?:|//|<script|<link|url\(|@import", text)
    with pytest.raises(ValueError, match="PNG or a GIF file, these bytes start with b'JFIF'"):
        Picture(b"JFIF")


def test_all_text_is_escaped(tmp_path):
    bad = "<script>alert('&')</script>"
    odd = Matrix(np.array([[0.5]]), bad, bad, [bad], [bad])
    text = page(
        tmp_path,
        {bad: bad, "nested": {"list": [bad]}},
        {bad: {bad: entry(0.5)}},
        {bad: {bad: odd}},
        title=bad,
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 10


def test_heat_maps_print_numbers_labels_and_follow_the_order_of_methods(tmp_path):
    text = page(tmp_path, matrices={"zebra": {"accuracy": accuracy()}, "ant": {"accuracy": accuracy(0.0)}})
    assert text.index("<figcaption>zebra") < text.index("<figcaption>ant")
    for label in ("after task", "task", "t0", "t1", "u0", "u1"):
        assert f">{label}<" in text
    # 21 shades over [0, 1]: 0.5 is shade round(0.5 * 20) = 10, 0.25 shade 5, 1 shade 20, 0 shade 0
    for cell in ('"s10">0.50<', '"s5">0.25<', '"s20">1.00<', '"s0">0.00<'):
        assert f"<td class={cell}" in text
    assert text.count('<td class="none"></td>') == 2
    assert "nan" not in text.partition("</style>")[2]


def test_numbers_outside_the_unit_interval_set_their_own_scale(tmp_path):
    losses = Matrix(np.array([[-10.0, 30.0]]), "r", "c", ["a"], ["b", "c"])
    text = page(tmp_path, matrices={"m": {"reward": losses}})
    assert '<td class="s0">-10.0</td><td class="s20">30.0</td>' in text
    assert '<span>-10.0</span><span class="bar"></span><span>30.0</span>' in text


def test_a_matrix_without_numbers_or_of_one_value_is_drawn(tmp_path):
    empty = Matrix(np.full((1, 1), math.nan), "r", "c", ["a"], ["b"])
    constant = Matrix(np.full((1, 1), 7.0), "r", "c", ["a"], ["b"])
    text = page(tmp_path, matrices={"m": {"empty": empty, "constant": constant}})
    assert '<td class="none"></td>' in text
    assert '<td class="s0">7.00</td>' in text


def test_text_on_every_shade_is_readable(tmp_path):
    text = page(tmp_path)
    rules = re.findall(r"\.s(\d+) \{ background: #(\w{6}); color: #(000|fff) \}", text)
    assert [int(step) for step, _, _ in rules] == [*range(21), *range(21)]
    lightness = []
    for _, background, colour in rules:
        channels = [int(background[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        contrast = 1.05 / (luminance + 0.05) if colour == "fff" else (luminance + 0.05) / 0.05
        assert contrast >= 4.5  # WCAG AA
        lightness.append(luminance)
    assert lightness[:21] == sorted(lightness[:21], reverse=True)
    assert lightness[21:] == sorted(lightness[21:])


def test_nested_settings_are_shown_by_dotted_key(tmp_path):
    text = page(tmp_path, {"gate": {"kind": "density"}, "sizes": [1, 2], "limit": None, "empty": {}})
    for key, value in (("gate.kind", "density"), ("sizes", "[1, 2]"), ("limit", "null"), ("empty", "{}")):
        assert f'<th scope="row">{key}</th><td>{value}</td>' in text


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "missing" / "report.html", "t", {}, {"m": {"a": entry(0.5)}}, {})
