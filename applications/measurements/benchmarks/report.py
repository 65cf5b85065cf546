"""Tables and pictures of the contests."""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from applications.frame.figures import BLUE, GREY, OURS, png


class Row(TypedDict):
    """One contestant."""

    name: str
    seconds: list[float | None]
    error: float | None
    beyond: int
    checked: int
    peak_mib: float | None
    facts: dict[str, Any]
    note: str


class Entry(TypedDict):
    """One workload in ``results.json``."""

    title: str
    command: str
    machine: dict[str, Any]
    matmul_gflops: float
    flops: float | None
    rows: list[Row]


def median(row: dict[str, Any]) -> float:
    """Median of its times, an unreached target last; infinite where there is none."""
    seconds = [math.inf if second is None else second for second in row["seconds"]]
    return statistics.median(seconds) if seconds else math.inf


def best_peer(rows: list[dict[str, Any]]) -> float:
    """The least median of those that are not ours."""
    return min((median(row) for row in rows if not row["name"].startswith(OURS)), default=math.inf)


def table(entry: dict[str, Any]) -> str:
    """Markdown, fastest first."""
    rows, peer = entry["rows"], best_peer(entry["rows"])
    rate = entry["matmul_gflops"]
    machine = entry["machine"]
    lines = [
        f"## {entry['title']}",
        "",
        f"{_place(machine)}, a matrix product at {rate:.0f} GFLOP/s",
        "",
        "| | median s (least, most) | best peer / this | error | peak MiB | notes |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(rows, key=median):
        seconds = [second for second in row["seconds"] if second is not None]
        middle = median(row)
        time = f"{middle:.3g} ({min(seconds):.3g}, {max(seconds):.3g})" if math.isfinite(middle) else ""
        ratio = f"{peer / middle:.2f}" if math.isfinite(middle) and math.isfinite(peer) else ""
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        if row["beyond"]:
            error += f", {row['beyond']} of {row['checked']} beyond"
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(f"| {row['name']} | {time} | {ratio} | {error} | {memory} | {_notes(row, entry, middle, rate)} |")
    return "\n".join([*lines, ""])


def _place(machine: dict[str, Any]) -> str:
    cores = f"{machine['threads']} cores of an {machine['cpu']} with {machine['instructions']}"
    return f"{machine['gpu']}, beside {cores}" if "gpu" in machine else cores


def _notes(row: dict[str, Any], entry: dict[str, Any], seconds: float, rate: float) -> str:
    if row["note"]:
        return row["note"].replace("|", "/")
    facts, parts = row["facts"], []
    if entry.get("flops") and math.isfinite(seconds):
        achieved = entry["flops"] / seconds / 1e9
        parts.append(f"{achieved:.0f} GFLOP/s, {100 * achieved / rate:.0f} % of a matmul")
    for name, text in (("iterations", "CG steps"), ("passes", "passes over X"), ("steps", "outer steps")):
        if name in facts:
            parts.append(f"{facts[name]} {text}")
    if "product_in_gradients" in facts:
        parts.append(f"a product costs {facts['product_in_gradients']:.1f} gradients")
    if "ratio" in facts:
        parts.append(f"{facts['ratio']:.2f} times {facts['to']}")
    if "stopped" in facts:
        parts.append(facts["stopped"][:80].replace("|", "/"))
    elif "curve" in facts and not math.isfinite(seconds):
        parts.append(f"target not reached: loss {facts['curve'][-1][1]:.3f} for {facts['target']:.3f}")
    return ", ".join(parts)


def figure(row: dict[str, Any], entry: dict[str, Any]) -> float:
    """What can be compared with a run on another machine: a ratio within the run, else products of matrices."""
    if "ratio" in row["facts"]:
        return float(row["facts"]["ratio"])
    return median(row) * float(entry["matmul_gflops"])


def changes(new: dict[str, Any], kept: dict[str, Any]) -> dict[str, float]:
    """By how much the figures of our contestants grew from one set of results to another, by workload and name."""
    found = {}
    for workload, entry in new.items():
        before = {row["name"]: row for row in kept.get(workload, {}).get("rows", [])}
        for row in entry["rows"]:
            name = row["name"]
            if name.startswith(OURS) and name in before:
                found[f"{workload}, {name}"] = figure(row, entry) / figure(before[name], kept[workload])
    return found


def picture(entry: dict[str, Any]) -> bytes:
    """Curves where the rows have them, else bars."""
    rows = entry["rows"]
    if any("curve" in row["facts"] for row in rows):
        return _curves(entry)
    sizes = [row for row in rows if "chunk_size" in row["facts"].get("settings", {}) and row["peak_mib"] is not None]
    return _sizes(entry, sizes) if rows and len(sizes) == len(rows) else _bars(entry)


def _bars(entry: dict[str, Any]) -> bytes:
    rows = [row for row in sorted(entry["rows"], key=median, reverse=True) if math.isfinite(median(row))]
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.38 * max(1, len(rows))), layout="constrained")
    colours = [BLUE if row["name"].startswith(OURS) else GREY for row in rows]
    bars = axes.barh([row["name"] for row in rows], [median(row) for row in rows], color=colours)
    axes.bar_label(bars, [f"{median(row):.3g} s" for row in rows], padding=3, fontsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("seconds, median")
    return _png(figure, axes, entry)


def _sizes(entry: dict[str, Any], rows: list[dict[str, Any]]) -> bytes:
    """Time against memory, a curve for each number of threads; each point says how many tasks a thread has."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    found = [(row["facts"]["settings"], row["peak_mib"], median(row)) for row in rows]
    for threads, colour in zip(sorted({settings["threads"] for settings, *_ in found}), (BLUE, GREY), strict=False):
        points = sorted((each["chunk_size"], mib, s) for each, mib, s in found if each["threads"] == threads)
        axes.plot([mib for _, mib, _ in points], [s for *_, s in points], "o-", color=colour, label=f"{threads}")
        for size, mib, seconds in points:
            axes.annotate(f"{size}", (mib, seconds), xytext=(4, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="peak MiB", ylabel="seconds, median", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False, title="threads; at the points tasks of each", fontsize=9)
    return _png(figure, axes, entry)


SHOWN = 6
"""Curves of ours, the fastest ones; those of the peers are all shown."""


def _curves(entry: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    rows = sorted((row for row in entry["rows"] if "curve" in row["facts"]), key=median)
    ours = [row for row in rows if row["name"].startswith(OURS)]
    chosen = ours[:SHOWN] + [row for row in ours[SHOWN:] if row["name"] == f"{OURS}: advised"]
    chosen += [row for row in rows if row not in ours]
    palette = plt.get_cmap("tab20")
    for index, row in enumerate(chosen):
        points = [(x, y) for x, y in row["facts"]["curve"] if x > 0 and math.isfinite(y)]
        if points:
            style = "-" if row["name"].startswith(OURS) else "--"
            reached = f" ({median(row):.2g} s)" if math.isfinite(median(row)) else ""
            axes.plot(
                *zip(*points, strict=True), style, marker=".", color=palette(index % 20), label=row["name"] + reached
            )
    target = rows[0]["facts"]["target"]
    axes.axhline(target, color="black", linewidth=0.8)
    axes.annotate("target", (0.01, target), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(top=rows[0]["facts"]["start"] * 1.02)
    axes.set_xlabel("seconds")
    axes.set_ylabel("validation loss at the inner solution")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _png(figure, axes, entry)


def _png(figure: Figure, axes: Axes, entry: dict[str, Any]) -> bytes:
    figure.suptitle(textwrap.fill(entry["title"], 90), fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)
