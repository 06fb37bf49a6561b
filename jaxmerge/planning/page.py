"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmerge.planning.compiled import Program
from jaxmerge.planning.layouts import Plan
from jaxmerge.planning.residency import RESIDENCIES, fits

_ROWS = {"step": "gradient step"}  # of the table of times, by the split's name


def page(plan: Plan) -> str:
    """All that a plan says, as lines of text."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    pool = _bytes(plan.checkpoints * plan.bytes)
    return "\n".join(
        [
            f"Plan for {plan.machine}: {plan.kind}, mesh {mesh}",
            f"{plan.checkpoints} checkpoints of {plan.parameters:,} x {plan.dtype}: {pool}",
            "",
            *_memory(plan),
            "",
            *_programs(plan),
            "",
            *_time(plan),
        ]
    )


def _memory(plan: Plan) -> list[str]:
    need, here = plan.measured.need, plan.candidates // plan.mesh["pop"]
    what = "merged models but for layers" if plan.rematerialised else "merged models"
    merged = f"{what}: {here} of a step" + " and of the next" * (plan.steps - 1)
    rows: list[tuple[str, ...]] = [
        ("memory of each device, pool.residency =", *RESIDENCIES),
        ("pool", _bytes(need.pool), *[_bytes(need.streamed)] * 2),
        (merged, *[_bytes(need.merged)] * 3),
        ("temporaries, inputs, outputs and code", *[_bytes(need.working)] * 3),
        ("  of which key/value cache", *[_bytes(plan.measured.cache)] * 3),
        ("in all", *(_bytes(need.on_device(each)) for each in RESIDENCIES)),
        (f"of {_bytes(plan.room.device)}", *(_fits(plan, each) for each in RESIDENCIES)),
        ("host memory for each device", *(_bytes(need.on_host(each)) for each in RESIDENCIES)),
        (f"of {_bytes(plan.room.host)}" if plan.room.host else "which is the same", "", "", ""),
        ("to each device, per step", "", *[_bytes(need.pool)] * 2),
        ("from disk, per step, all hosts", "", "", _bytes(plan.checkpoints * plan.bytes)),
    ]
    taken = plan.residency or "none: it does not fit"
    return [
        *_table(rows),
        *[f"not split: {line}" for line in plan.measured.whole],
        f"pool.residency = {plan.asked} takes {taken}",
        f"evaluate.candidates_per_step = {plan.candidates}, batch_size = {plan.limits.rows}, "
        f"batch_tokens = {plan.limits.tokens}"
        + (f"; {plan.most_candidates} candidates would fit" if plan.residency else ""),
    ]


def _fits(plan: Plan, residency: str) -> str:
    if plan.measured.refused:
        return "refused"
    return "fits" if fits(plan.measured.need, plan.room, residency) else "too much"


def _programs(plan: Plan) -> list[str]:
    if not plan.measured.programs:
        return ["Nothing was compiled: the pool and the merged models alone are too much."]
    rows = [("compiled, bytes of each device", "arguments", "temporaries", "collectives")]
    rows += [_program(program) for program in plan.measured.programs]
    return [
        *_table(rows),
        f"The largest of {plan.calls} calls were compiled; collectives are per call.",
        *(f"refused: {each.refused}" for each in plan.measured.programs if each.refused),
    ]


def _program(program: Program) -> tuple[str, ...]:
    if program.refused:
        return program.name, "", "", "refused"
    exchanged = ", ".join(
        f"{count} {name} ({_bytes(size)})" for name, (count, size) in program.collectives.items()
    )
    return program.name, _bytes(program.arguments), _bytes(program.temporaries), exchanged or "none"


def _time(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = [
        (
            *("per candidate", "merge", "prefill and scoring", "decoding", "collectives"),
            *("seconds", "TFLOP", "GB", "times"),
        )
    ]
    for split, seconds in plan.seconds.items():
        amount = plan.amounts[split]
        rows.append(
            (
                *(
                    _ROWS.get(split, split),
                    *(f"{each:.3g}" for each in seconds),
                    f"{seconds.total:.3g}",
                ),
                *(f"{amount.flops / 1e12:.3g}", f"{amount.bytes / 1e9:.3g}"),
                str(plan.evaluations[split]),
            )
        )
    rates = plan.rates
    return [
        *_table(rows),
        f"The run: {_duration(plan.run_seconds)} at the least, without loading, compiling, judges.",
        f"By the roofline at {rates.flops / 1e12:.3g} TFLOP/s, {rates.bandwidth / 1e9:.4g} GB/s"
        + (f", {rates.links / 1e9:.3g} GB/s between chips" if rates.links else "")
        + f" a device: {plan.said}. Texts are taken to be as long as they may be.",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(text.rjust(width) for text, width in zip(row[1:], widths[1:])),
            ]
        ).rstrip()
        for row in rows
    ]


def _bytes(number: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB" if number else "0"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
