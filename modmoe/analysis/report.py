"""One self-contained HTML page for a run: results, heat maps and config, with nothing loaded from outside."""

import json
import math
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from modmoe.analysis.records import Matrix, half_width

_STEPS = 21  # shades of the heat maps; the eye cannot tell more apart


def write_report(
    path: str | Path,
    title: str,
    config: dict,
    summary: dict,
    matrices: dict[str, dict[str, Matrix]],
    about: dict[str, str] | None = None,
) -> None:
    """Write ``report.html``: the result table, every method's matrices as heat maps, and the config.

    Matrices of one title share one colour scale: 0 to 1 where all numbers lie in it, else lowest to highest.

    Args:
        path: the file to write; its folder must exist. TensorBoard events are said to be in ``tensorboard``
            beside it.
        title: heading of the page.
        config: the settings of the run, shown as they are.
        summary: what `summarise` gives.
        matrices: what `mean_matrices` gives; methods are shown in this order.
        about: method -> one sentence on what it is.
    """
    path = Path(path)
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
        css=_CSS + _shades(),
        lead=f"{experiment}{methods}, {seeds} each. {interval}{averaged if titles and num_seeds > 1 else ''}",
        results=_results(summary) + _about(about or {}),
        maps="".join(_maps(name, matrices) for name in titles),
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
    return f'<td class="s{round(share * (_STEPS - 1))}">{_entry(x, max(abs(low), abs(high)))}</td>'


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


def _shades() -> str:
    """Rules for the shades s0..: one hue, lightness in even steps, text in the colour of higher contrast."""
    light = [_oklch(0.97 - 0.57 * t, 0.012 + 0.108 * t, 255) for t in np.linspace(0, 1, _STEPS)]
    dark = [_oklch(0.27 + 0.58 * t, 0.025 + 0.045 * t + 0.16 * t * (1 - t), 255) for t in np.linspace(0, 1, _STEPS)]
    return _rules(light) + "@media (prefers-color-scheme: dark) {" + _rules(dark) + "}"


def _rules(colours: list[tuple[float, float, float]]) -> str:
    rules, names = [], []
    for step, rgb in enumerate(colours):
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb)
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        # WCAG contrast against white is 1.05 / (Y + 0.05) and against black (Y + 0.05) / 0.05.
        text = "#fff" if (luminance + 0.05) ** 2 < 1.05 * 0.05 else "#000"
        names.append("#" + "".join(f"{round(255 * x):02x}" for x in rgb))
        rules.append(f".s{step} {{ background: {names[-1]}; color: {text} }}")
    return f"{' '.join(rules)} .bar {{ background: linear-gradient(to right, {', '.join(names[::4])}) }}"


def _oklch(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Convert a colour of the OKLCH space (equal steps look equal; Ottosson 2020) to sRGB in [0, 1]."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    clipped = (min(max(x, 0.0), 1.0) for x in linear)
    red, green, blue = (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in clipped)
    return red, green, blue


_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16202c; --muted: #5b6878;
  --line: #dfe4ea; --none: #eef0f3 }
@media (prefers-color-scheme: dark) { :root { --page: #0f141a; --card: #171e26; --ink: #e6ebf1;
  --muted: #94a1b1; --line: #2a343f; --none: #1d252e } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 64px }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 0 }
h2::first-letter { text-transform: uppercase }
.lead { color: var(--muted); max-width: 76ch; margin: 0 }
section { margin-top: 36px }
.head { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: center; justify-content: space-between;
  margin-bottom: 12px }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.scroll { overflow-x: auto }
code, pre, .config { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.results { width: 100%; font-size: 14px }
.results th, .results td { padding: 9px 11px; text-align: right; border-top: 1px solid var(--line) }
.results td { white-space: nowrap }
.results thead th { border-top: 0; color: var(--muted); font-size: 13px; font-weight: 500;
  vertical-align: bottom; line-height: 1.3 }
.results th:first-child { text-align: left; position: sticky; left: 0; background: var(--card) }
.results tbody th { font-weight: 600; min-width: 8ch }
.half { color: var(--muted) }
.about { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 16px 0 0; font-size: 14px }
.about dt { font-weight: 600 } .about dd { margin: 0; color: var(--muted) }
@media (max-width: 600px) { .about { grid-template-columns: 1fr } .about dd { margin-bottom: 8px } }
.note { margin: 8px 0 0; font-size: 13px; color: var(--muted) }
.maps { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
figure { margin: 0; padding: 14px 16px 16px; max-width: 100% }
figcaption { font-weight: 600; margin-bottom: 6px }
.heat { border-collapse: separate; border-spacing: 2px }
.heat th { font-size: 12px; font-weight: 500; color: var(--muted); padding: 2px 6px; white-space: nowrap }
.heat tbody th { text-align: right }
.heat .axis { text-align: center; font-style: italic; font-weight: 400 }
.heat .side { padding: 0 2px }
.heat .side span { writing-mode: vertical-rl; transform: rotate(180deg) }
.heat tbody td { min-width: 46px; height: 34px; padding: 0 5px; text-align: center; font-size: 13px;
  border-radius: 4px }
.heat .none { background: repeating-linear-gradient(-45deg, var(--none) 0 4px, transparent 4px 8px) }
.legend { display: flex; align-items: center; gap: 8px; margin: 0; font-size: 12px; color: var(--muted) }
.bar { width: 140px; height: 10px; border-radius: 5px; border: 1px solid var(--line) }
summary { cursor: pointer; padding: 12px 16px; font-weight: 600; font-size: 18px }
.config { width: 100% }
.config th, .config td { text-align: left; vertical-align: top; padding: 6px 16px; overflow-wrap: anywhere;
  border-top: 1px solid var(--line) }
.config th { font-weight: 500; color: var(--muted); width: 34% }
pre { margin: 10px 0 0; padding: 12px 16px; overflow-x: auto }
@media (max-width: 600px) { main { padding: 24px 14px 48px } h1 { font-size: 23px }
  .results th, .results td { padding: 9px 11px } figure { padding: 12px; width: 100% }
  .heat tbody td { min-width: 40px; padding: 0 3px } }
@media print { body { background: none } td, .bar { print-color-adjust: exact } }
"""

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
<section><details class="card"><summary>Configuration</summary>
<table class="config">$config</table></details></section>
<section><h2>Learning curves</h2>
<pre class="card">tensorboard --logdir '$logdir'</pre>
</section>
</main>
</body>
</html>
""")
