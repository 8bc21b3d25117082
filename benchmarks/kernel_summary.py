"""What the kernels must reach, and what they reached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernel_cases import Case

Row = dict


@dataclass(frozen=True)
class Requirement:
    """One line of the table.

    Args:
        text: what is compared.
        arm: whose rows.
        metric: which of them.
        concerns: of which cases; the worst one counts.
        gate: what must be reached.
        goal: what is aimed for.
        higher: whether higher is better.
    """

    text: str
    arm: str
    metric: str
    concerns: Callable[[Case], bool]
    gate: float
    goal: float
    higher: bool = False

    def judge(self, rows: Sequence[Row]) -> Row | None:
        """The worst value and whether it reaches the gate and the goal; None if no case was measured."""
        found = [
            r for r in rows if (r["arm"], r["metric"]) == (self.arm, self.metric) and self.concerns(Case(r["case"]))
        ]
        if not found:
            return None
        sign = -1 if self.higher else 1
        worst = max(found, key=lambda row: sign * row["value"])
        return {
            "what": self.text,
            "case": worst["case"],
            "value": worst["value"],
            "gate": self.gate,
            "goal": self.goal,
            "reached": [sign * worst["value"] <= sign * bound for bound in (self.gate, self.goal)],
        }


def named(*names: str) -> Callable[[Case], bool]:
    """Whether a case is one of these."""
    return lambda case: case.name in names


def on_cpu(case: Case) -> bool:
    return case.device.type == "cpu"


def on_gpu(case: Case) -> bool:
    return case.device.type == "cuda" and case.kind == ""


def eager_is_slow(case: Case) -> bool:
    _, _, h, experts, _ = case.sizes
    return on_cpu(case) and experts >= 16 and h <= 256 and case.kind in ("", "zipf", "empty")


def nothing_frozen(case: Case) -> bool:
    return on_cpu(case) and case.kind in ("", "zipf", "empty")


def in_sweep(case: Case) -> bool:
    tokens, d, h, experts, k = case.sizes
    return case.kind == "" and (tokens, d, h, k) == (1024, 64, 128, 2) and experts >= 16


MUST_REACH = (
    Requirement(
        "transformer sizes / dense",
        "auto",
        "fwd_bwd_vs_dense",
        named("1024,256,512,16,2", "1024,512,1024,16,2"),
        1.3,
        1.15,
    ),
    Requirement("64 small experts / dense", "auto", "fwd_bwd_vs_dense", named("1024,64,128,64,2"), 2.2, 1.7),
    Requirement("128 tokens / dense", "auto", "fwd_bwd_vs_dense", named("128,64,128,16,2"), 2.6, 1.8),
    Requirement("Zipf 15:1 / dense", "auto", "fwd_bwd_vs_dense", named("1024,128,256,32,2,zipf"), 1.5, 1.3),
    Requirement("transformers eager / ours", "transformers_eager", "fwd_bwd_vs_auto", eager_is_slow, 3, 5, True),
    Requirement("raw grouped_mm / ours", "raw_grouped_mm", "fwd_bwd_vs_auto", nothing_frozen, 1.0, 1.2, True),
    Requirement(
        "90% frozen, whole step: all trainable / ours",
        "auto_all_trainable",
        "step_vs_auto",
        named("2048,256,512,20,2,frozen90"),
        1.5,
        2,
        True,
    ),
    Requirement("E 16 to 256: ours / balanced bmm", "auto", "fwd_bwd_vs_balanced_bmm", in_sweep, 1.1, 1.0),
    Requirement("bf16: percent of cuBLAS", "auto", "percent_of_cublas", on_gpu, 80, 80, True),
    Requirement("bf16: raw grouped_mm / ours", "raw_grouped_mm", "fwd_bwd_vs_auto", on_gpu, 1.0, 1.0, True),
    Requirement("bf16: scattermoe / ours", "scattermoe", "fwd_bwd_vs_auto", on_gpu, 1.3, 1.3, True),
)


def must_reach(rows: Sequence[Row]) -> list[Row]:
    """Each requirement of which a case was measured."""
    return [result for requirement in MUST_REACH if (result := requirement.judge(rows)) is not None]


def report(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal: ratios of each case and arm, then what must be reached."""
    columns = ("fwd_vs_dense", "fwd_bwd_vs_dense", "fwd_bwd_vs_auto", "step_vs_auto", "fwd_bwd_ms", "peak_bytes")
    values: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        values.setdefault((row["case"], row["arm"]), {})[row["metric"]] = row["value"]
    lines = [f"{'case':30} {'arm':20} " + " ".join(f"{column:>16}" for column in columns)]
    for (case, arm), own in values.items():
        cells = (f"{own[column]:16,.4g}" if column in own else " " * 16 for column in columns)
        lines.append(f"{case:30} {arm:20} " + " ".join(cells))
    lines += ["", f"{'must reach':46} {'worst':>8} {'gate':>6} {'goal':>6}"]
    for result in must_reach(rows):
        verdict = "goal reached" if result["reached"][1] else "gate reached" if result["reached"][0] else "NOT REACHED"
        numbers = f"{result['value']:8.3g} {result['gate']:6g} {result['goal']:6g}"
        lines.append(f"{result['what']:46} {numbers}  {verdict} ({result['case']})")
    return "\n".join(lines)
