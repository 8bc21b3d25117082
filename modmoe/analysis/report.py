"""One self-contained HTML page for a run: results, heat maps and config, with nothing loaded from outside."""

import base64
import json
import math
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from modmoe.analysis.records import Matrix, Picture, half_width
from modmoe.analysis.report_style import CSS, STEPS, shades


def write_report(
    path: str | Path,
    title: str,
    config: dict,
    summary: dict,
    matrices: dict[str, dict[str, Matrix]],
    about: dict[str, str] | None = None,
    pictures: dict[str, dict[str, Picture]] | None = None,
) -> None:
    """Write ``report.html``: the result table, every method's matrices as heat maps, its pictures, and the config.

    Matrices of one title share one colour scale: 0 to 1 where all numbers lie in it, else lowest to highest.

    Args:
        path: the file to write; its folder must exist. TensorBoard events are said to be in ``tensorboard``
            beside it.
        title: heading of the page.
        config: the settings of the run, shown as they are.
        summary: what `summarise` gives.
        matrices: what `mean_matrices` gives; methods are shown in this order.
        about: method -> one sentence on what it is.
        pictures: method -> title -> picture; pictures of one title stand side by side.
    """
    path = Path(path)
    pictures = pictures or {}
    num_seeds = _num_seeds(summary)
    seeds = f"{num_seeds} seed" + ("" if num_seeds == 1 else "s")
    methods = f"{len(summary)} method" + ("" if len(summary) == 1 else "s")
    experiment = f"Experiment <code>{escape(str(config['experiment']))}</code>: " if "experiment" in config else ""
    interval = (
        "Numbers are means over the seeds ± half of the 95% confidence interval (Student t)."
        if num_seeds > 1
        else "With one seed there is no interval: the numbers say nothing about chance."
    )
    titles = dict.fromkeys(name for of_method in matrices.values() for name in of_method)
    averaged = " Matrices are means over the seeds; a matrix whose size differs between seeds is the first seed's."
    page = _PAGE.substitute(
        title=escape(title),
        css=CSS + shades(),
        lead=f"{experiment}{methods}, {seeds} each. {interval}{averaged if titles and num_seeds > 1 else ''}",
        results=_results(summary) + _about(about or {}),
        maps="".join(_maps(name, matrices) for name in titles),
        pictures="".join(
            _pictures(name, pictures)
            for name in dict.fromkeys(name for of_method in pictures.values() for name in of_method)
        ),
        config=_config_rows(config),
        logdir=escape(str(path.parent / "tensorboard")),
    )
    path.write_text(page, encoding="utf-8")


def result_table(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Format a summary as a table of text: "mean ± half-width", or the mean alone for one seed.

    Args:
        summary: what `summarise` gives.
    Returns:
        The metrics (union over the methods, in order), and a row per method: its name, then one cell per
        metric, ``"n/a"`` for a non-finite number and ``"–"`` where the method lacks the metric.
    """
    metrics = list(dict.fromkeys(metric for of_method in summary.values() for metric in of_method))
    columns = []
    for metric in metrics:
        entries = [of_method.get(metric) for of_method in summary.values()]
        numbers = [x for entry in entries if entry for x in entry["seeds"] if x is not None]
        # Counts (experts, parameters) read better without ".000"; an accuracy of exactly 1 is no count.
        count = all(float(x).is_integer() for x in numbers) and max(map(abs, numbers), default=0) > 1
        columns.append([_cell(entry, count) for entry in entries])
    rows = [[method, *(column[i] for column in columns)] for i, method in enumerate(summary)]
    return metrics, rows


def _cell(entry: dict | None, count: bool) -> str:
    if entry is None:
        return "–"  # noqa: RUF001
    if entry["mean"] is None:
        return "n/a"
    half = half_width(entry["seeds"])
    if half is None or (count and half == 0):  # a size that no seed changes needs no interval
        return f"{entry['mean']:,.0f}" if count else _number(entry["mean"])
    if count:
        decimals = 0 if abs(entry["mean"]) >= 1000 else 1
        return f"{entry['mean']:,.{decimals}f} ± {half:,.{decimals}f}"
    return f"{_number(entry['mean'])} ± {_number(half)}"


def _number(x: float) -> str:
    if abs(x) >= 1000:
        return f"{x:,.0f}" if abs(x) < 1e7 else f"{x:.3g}"
    return f"{x:.3f}" if x == 0 or abs(x) >= 0.0005 else f"{x:.1e}"


def _num_seeds(summary: dict) -> int:
    return max((len(e["seeds"]) for of_method in summary.values() for e in of_method.values()), default=0)


def _wrappable(name: str) -> str:
    """Escape a name and let it break after an underscore or a slash."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _results(summary: dict) -> str:
    metrics, rows = result_table(summary)
    head = "".join(f'<th scope="col">{_wrappable(metric)}</th>' for metric in metrics)
    body = []
    for method, *cells in rows:
        row = [f'<th scope="row">{_wrappable(method)}</th>']
        for metric, cell in zip(metrics, cells, strict=True):
            mean, _, half = cell.partition(" ± ")
            seeds = summary[method].get(metric, {"seeds": []})["seeds"]
            tip = "seeds: " + ", ".join("n/a" if x is None else f"{x:.6g}" for x in seeds)
            half = f' <span class="half">± {escape(half)}</span>' if half else ""
            row.append(f'<td title="{escape(tip)}">{escape(mean)}{half}</td>')
        body.append(f"<tr>{''.join(row)}</tr>")
    shown = {cell for row in rows for cell in row[1:]}
    meanings = {"n/a": "n/a: some seed gave no finite number.", "–": "–: the method has no such metric."}  # noqa: RUF001
    note = " ".join(meaning for cell, meaning in meanings.items() if cell in shown)
    return (
        f'<div class="card scroll"><table class="results">'
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>" + (f'<p class="note">{note}</p>' if note else "")
    )


def _about(about: dict[str, str]) -> str:
    entries = [f"<dt>{_wrappable(method)}</dt><dd>{escape(text)}</dd>" for method, text in about.items() if text]
    return f'<dl class="about">{"".join(entries)}</dl>' if entries else ""


def _maps(title: str, matrices: dict[str, dict[str, Matrix]]) -> str:
    shown = {method: of_method[title] for method, of_method in matrices.items() if title in of_method}
    numbers = np.concatenate([matrix.values.ravel() for matrix in shown.values()])
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    figures = "".join(_heat_map(method, matrix, low, high) for method, matrix in shown.items())
    legend = (
        f'<p class="legend"><span>{_entry(low, high)}</span><span class="bar"></span>'
        f"<span>{_entry(high, high)}</span></p>"
    )
    head = f'<div class="head"><h2>{escape(title)}</h2>{legend}</div>'
    return f'<section>{head}<div class="maps">{figures}</div></section>'


def _heat_map(method: str, matrix: Matrix, low: float, high: float) -> str:
    rows, columns = matrix.values.shape
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in matrix.column_names)
    body = []
    for i, name in enumerate(matrix.row_names):
        axis = f'<th class="axis side" rowspan="{rows}"><span>{escape(matrix.row_label)}</span></th>' if i == 0 else ""
        cells = "".join(_heat_cell(float(x), low, high) for x in matrix.values[i])
        body.append(f'<tr>{axis}<th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<figure><figcaption>{escape(method)}</figcaption><div class="scroll"><table class="heat">'
        f'<thead><tr><td colspan="2"></td>'
        f'<th class="axis" colspan="{columns}">{escape(matrix.column_label)}</th></tr>'
        f'<tr><td colspan="2"></td>{names}</tr></thead><tbody>{"".join(body)}</tbody></table></div></figure>'
    )


def _heat_cell(x: float, low: float, high: float) -> str:
    if not math.isfinite(x):
        return '<td class="none"></td>'
    share = (x - low) / (high - low) if high > low else 0.0
    return f'<td class="s{round(share * (STEPS - 1))}">{_entry(x, max(abs(low), abs(high)))}</td>'


def _pictures(title: str, pictures: dict[str, dict[str, Picture]]) -> str:
    figures = []
    for method, of_method in pictures.items():
        if title in of_method:
            picture = of_method[title]
            data = base64.b64encode(picture.data).decode()
            note = f'<p class="note">{escape(picture.caption)}</p>' if picture.caption else ""
            figures.append(
                f'<figure><figcaption>{escape(method)}</figcaption><img src="data:{picture.kind};base64,{data}" '
                f'alt="{escape(f"{method}: {picture.caption or title}")}">{note}</figure>'
            )
    head = f'<div class="head"><h2>{escape(title)}</h2></div>'
    return f'<section>{head}<div class="maps">{"".join(figures)}</div></section>'


def _entry(x: float, largest: float) -> str:
    decimals = 2 if largest < 10 else 1 if largest < 100 else 0
    return f"{x:,.{decimals}f}"


def _config_rows(config: dict, prefix: str = "") -> str:
    rows = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            rows.append(_config_rows(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows.append(f'<tr><th scope="row">{_wrappable(prefix + str(key))}</th><td>{escape(text)}</td></tr>')
    return "".join(rows)


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
<section><div class="head"><h2>Results</h2></div>$results</section>
$maps
$pictures
<section><details class="card"><summary>Configuration</summary>
<table class="config">$config</table></details></section>
<section><h2>Learning curves</h2>
<pre class="card">tensorboard --logdir '$logdir'</pre>
</section>
</main>
</body>
</html>
""")
