"""The page of `tests.bench.gpu`: `gpu.md` from what `gpu.json` holds."""

from s2t2_dist.ot.kernels.library import LAG

N = 3  # iterations
GB, GIB = 1e9, 1 << 30
LABELS = {
    "triton": "ours, Triton",
    "compile": "ours, `torch.compile`",
    "eager": "ours, eager torch",
    "literal": "Algorithms 1 + 2, torch autograd",
    "entmax": "Algorithm 1, `entmax.sparsemax`",
}
STEP = {
    "step_seconds": ("ms of a step", 1e3),
    "translator_seconds": ("ms of the translator", 1e3),
    "tokens_per_second": ("tokens/s", 1),
    "model_tflops": ("model TFLOP/s", 1),
    "mfu": ("MFU", 1),
    "peak_gib": ("peak GiB", 1),
    "planned_gib": ("planned GiB", 1),
    "run_seconds": ("s of the whole run", 1),
}


def markdown(report: dict) -> str:
    """The report as a page."""
    parts = {name: part["lines"] for name, part in report["parts"].items()}
    known = {key: value for line in parts.get("machine", []) for key, value in line.items()}
    lines = ["# One GPU", "", f"`{report['command']}`, commit {report['commit']}.", ""]
    lines += [", ".join(f"{k} {v}" for k, v in known.items() if k not in CEILINGS) + ".", ""]
    lines += ceilings(known) + transport(parts, known)
    lines += table("The translator's step", parts.get("translator", []), TRANSLATOR)
    lines += steps(parts)
    lines += table("Checkpoint of the finetune stage", parts.get("checkpoint", []), CHECKPOINT)
    lines += table("Loader", parts.get("loader", []), {"tokens_per_second": ("tokens/s", 1)})
    lines += tiles(parts.get("tiles", []))
    problems = {name: part["problem"] for name, part in report["parts"].items() if part["problem"]}
    if problems:
        lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in problems.items())]
    return "\n".join(lines).rstrip() + "\n"


CEILINGS = {
    "copy": ("copy, GB/s read and written", 1 / GB),
    "read": ("read, GB/s", 1 / GB),
    "bf16": ("bf16 product, TFLOP/s", 1e-12),
}
TRANSLATOR = {
    "V": ("V", 1),
    "U": ("U", 1),
    "D": ("D", 1),
    "translate": ("ms: solve, E', L'", 1e3),
    "backward": ("ms: backward", 1e3),
    "optimizer": ("ms: norm, AdamW", 1e3),
    "peak_bytes": ("peak GiB", 1 / GIB),
}
CHECKPOINT = {
    "bytes": ("GB", 1 / GB),
    "save": ("s to save", 1),
    "verify": ("s to verify", 1),
    "load": ("s to load", 1),
}


def ceilings(known: dict) -> list[str]:
    found = {key: known[key] for key in CEILINGS if key in known}
    return table("Ceilings", [found] if found else [], CEILINGS)


def matrices(evaluations: int) -> dict[str, int]:
    """How many matrices of C's size the passes of a solve read or write.

    Forward: one per evaluation of a column search (the first of each is the row search's), C and P
    for the plan. Backward: C and dL/dP in each of n + 1 passes, and dL/dC.
    """
    forward = evaluations + 2
    return {"forward": forward, "both": forward + 2 * (N + 1) + 1}


def transport(parts: dict, known: dict) -> list[str]:
    """A table for each size."""
    cases: dict[tuple, dict[str, dict]] = {}
    for name in LABELS:
        for line in parts.get(name, []):
            cases.setdefault((line["V"], line["U"]), {})[name] = line
    lines = []
    for (V, U), methods in sorted(cases.items(), key=lambda item: item[0][0] * item[0][1]):
        lines += [f"## Transport, V = {V:,}, U = {U:,}: C has {4 * V * U / GIB:.3g} GiB", ""]
        heads = ("method", "first s", "forward ms", "warm solve ms", "both ms", "peak / C")
        heads += ("passes", "both / floor", "row error", "column error")
        lines += [row(heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
        lines += [row(case(name, line, known)) for name, line in methods.items()] + [""]
    return lines


def case(name: str, line: dict, known: dict) -> list[str]:
    if "problem" in line:
        return [LABELS[name], line["problem"], *[""] * 8]
    passes, over = "-", "-"
    if "evaluations" in line:
        # Those after the last that found anything to do end at once.
        count = line["evaluations"] - (N * LAG if name == "triton" else 0)
        passes = str(count)
        speed = max((known[key] for key in ("copy", "read") if key in known), default=None)
        if speed:
            over = number(line["both_seconds"] * speed / matrices(count)["both"] / line["bytes"])
    peak = line["peak_bytes"] and line["peak_bytes"] / line["bytes"]
    cells = [line["first_seconds"], 1e3 * line["forward_seconds"]]
    cells += [1e3 * line["warm_seconds"] if "warm_seconds" in line else None]
    cells += [1e3 * line["both_seconds"], peak]
    errors = [f"{line[key]:.1e}" for key in ("row_error", "column_error")]
    return [LABELS[name], *map(number, cells), passes, over, *errors]


def steps(parts: dict) -> list[str]:
    """The stages and the plain loop, a column each."""
    columns = {n: parts[n][0] for n in ("translate", "finetune", "plain") if parts.get(n)}
    if not columns:
        return []
    lines = ["## OLMo-1B's shape, random weights, 16 rows of 512 tokens (small: shrunk)", ""]
    lines += [row(["", *columns]), "|---" + "|---:" * len(columns) + "|"]
    for key, (label, factor) in STEP.items():
        values = [column.get(key) for column in columns.values()]
        if any(value is not None for value in values):
            cells = [number(None if v is None else factor * v) for v in values]
            lines.append(row([label, *cells]))
    return [*lines, ""]


def tiles(found: list[dict]) -> list[str]:
    lines = [line | {"ms": 1e3 * line["both"]} for line in found]
    heads = {key: (key, 1) for key in ("V", "U", "tile", "per_thread", "ms")}
    return table("Tiles of the kernels that own rows: solve and backward", lines, heads)


def table(title: str, found: list[dict], columns: dict[str, tuple[str, float]]) -> list[str]:
    """A line of numbers for each of some lines of figures; nothing where there are none."""
    if not found:
        return []
    lines = [f"## {title}", "", row([label for label, _ in columns.values()])]
    lines.append("|" + "---:|" * len(columns))
    for line in found:
        values = [line.get(key) for key in columns]
        scales = [factor for _, factor in columns.values()]
        cells = [None if v is None else v * f for v, f in zip(values, scales, strict=True)]
        lines.append(row(map(number, cells)))
    return [*lines, ""]


def row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Three significant digits; sizes whole."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
