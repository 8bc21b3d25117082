"""Draw the README's figure from what kernels.py wrote.

    python benchmarks/plot_kernels.py [--json FILE] [--out FILE]

Left: forward + backward over the dense layer of the same FLOPs and kind, for each case and arm. Right: the same as the
number of experts grows, at fixed T and k.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from kernel_cases import Case

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

METRIC = "fwd_bwd_vs_dense"
FOLDER = Path(__file__).parent

# arm -> label, colour (Okabe and Ito's, told apart by colour-blind readers), marker
ARMS = {
    "auto": ("modmoe", "#0072B2", "o"),
    "balanced_bmm": ("balanced bmm (floor)", "#999999", "s"),
    "raw_grouped_mm": ("F.grouped_mm", "#56B4E9", "^"),
    "transformers_grouped": ("transformers, grouped_mm", "#E69F00", "D"),
    "transformers_eager": ("transformers, eager", "#D55E00", "v"),
    "st_moe": ("st-moe-pytorch", "#CC79A7", "P"),
    "soft_moe": ("soft-moe-pytorch", "#009E73", "X"),
}
BAR_CASES = (
    "32,64,128,16,2",
    "128,64,128,16,2",
    "1024,64,128,64,2",
    "1024,128,256,32,2,zipf",
    "1024,256,512,16,2",
    "1024,512,1024,16,2",
)
SWEEP = (1024, 64, 128, 2)  # T, d, h, k
TICKS = (1, 2, 3, 5, 10, 20, 50, 100)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Write the figure.

    Args:
        rows: of kernels.py; cases and arms that are not in them are left out.
        path: of the PNG.
    Raises:
        ValueError: if there is nothing to draw.
    """
    values = {(row["case"], row["arm"]): row["value"] for row in rows if row["metric"] == METRIC}
    if not any((case, "auto") in values for case, _ in values):
        raise ValueError(f"no row of the arm auto and the metric {METRIC}: nothing to draw")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(11.5, 4.2), width_ratios=(2.1, 1), layout="constrained")
    draw_bars(bars, values)
    draw_sweep(lines, values)
    handles, labels = bars.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(axes: Axes, values: dict[tuple[str, str], float]) -> None:
    """A group of bars for each case, a bar for each arm."""
    cases = [case for case in BAR_CASES if (case, "auto") in values] or sorted({case for case, _ in values})
    arms = [arm for arm in ARMS if any((case, arm) in values for case in cases)]
    width = 0.84 / len(arms)
    for index, arm in enumerate(arms):
        label, colour, _ = ARMS[arm]
        own = [(place, values[case, arm]) for place, case in enumerate(cases) if (case, arm) in values]
        middle = (index - (len(arms) - 1) / 2) * width
        places, heights = [place + middle for place, _ in own], [value for _, value in own]
        axes.bar(places, heights, 0.92 * width, color=colour, label=label, zorder=2)
        if arm == "auto":
            for place, height in zip(places, heights, strict=True):
                axes.annotate(
                    f"{height:.2g}", (place + width / 2, height), ha="right", va="bottom", fontsize=8, color=colour
                )
    axes.set_xticks(range(len(cases)), [label_of(case) for case in cases], fontsize=8)
    set_scale(axes, [values[case, arm] for case in cases for arm in arms if (case, arm) in values])
    axes.set_title(
        "Forward + backward over the dense layer of the same FLOPs (lower is better)", loc="left", fontsize=10
    )


def draw_sweep(axes: Axes, values: dict[tuple[str, str], float]) -> None:
    """A line for each arm over the number of experts."""
    tokens, d, h, k = SWEEP
    drawn: list[float] = []
    ticks: set[int] = set()
    for arm, (_, colour, marker) in ARMS.items():
        points = sorted(
            (case.sizes[3], value)
            for (name, own), value in values.items()
            if own == arm and (case := Case(name)).kind == "" and case.sizes == (tokens, d, h, case.sizes[3], k)
        )
        if points:
            experts, heights = zip(*points, strict=True)
            strong = arm == "auto"
            axes.plot(experts, heights, color=colour, marker=marker, ms=6 if strong else 4.5, lw=2.4 if strong else 1.3)
            drawn += heights
            ticks.update(experts)
    if drawn:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(number) for number in sorted(ticks)])
        set_scale(axes, drawn)
    axes.set_xlabel(f"experts (T {tokens}, d {d}, h {h}, k {k})")
    axes.set_title("The same as experts are added", loc="left", fontsize=10)


def set_scale(axes: Axes, drawn: Sequence[float]) -> None:
    """A log scale with plain numbers, and a line where the dense layer is."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.9 * min(1, *drawn), 1.25 * max(drawn))
    axes.grid(axis="y", color="#dddddd", lw=0.7, zorder=0)
    axes.axhline(1, color="black", lw=1, zorder=3)
    axes.annotate("dense", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def label_of(case: str) -> str:
    """T, d, h on one line; E, k and the rest on the next."""
    tokens, d, h, experts, k = Case(case).sizes
    rest = {"zipf": ", Zipf 15:1"}.get(Case(case).kind, "")
    return f"T {tokens}\nd {d}, h {h}\nE {experts}, k {k}{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "kernels.json", help="what kernels.py wrote")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "docs" / "kernels.png", help="the PNG")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text())["rows"], args.out)


if __name__ == "__main__":
    main()
