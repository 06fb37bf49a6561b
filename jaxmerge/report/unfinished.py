"""The words and tables of a run that is not finished: search scores, and how far it has come."""

from __future__ import annotations

import numpy as np

from jaxmerge.report import markup, plots
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run
from jaxmerge.rundir import cost
from jaxmerge.scores import formatting, pareto

CAUTION = (
    "All scores are search scores. The best of many is flattered by them; what counts is the test "
    "score, which is there when the run is finished."
)


def models(run: Run) -> list[tuple[str, Json]]:
    """(kind, entry) of the best so far, of what the baselines have so far, of the checkpoints."""
    found = [
        ("baseline", _best_of(run, origin, origin.removeprefix("baseline:")))
        for origin in dict.fromkeys(candidate["origin"] for candidate in run.searched)
        if origin.startswith("baseline:")
    ]
    searched = [("search", _best_of(run, "search", "search"))] if run.of_origin("search") else []
    alone = [
        ("individual", _entry(run, candidate, candidate["name"]))
        for candidate in run.of_origin("individual")
    ]
    return [*searched, *found, *alone]


def headline(run: Run) -> tuple[str, str]:
    """That the run is not finished, and the best so far."""
    form, objective = run.formats["objective"], run.objective
    lines = run.of_origin("search")
    done, budget, unit = _search(run)
    lead = "The search has not begun. "
    if lines:
        generation = lines[-1]["generation"] + 1
        lead = (
            f"Generation <strong>{generation}</strong> of the search, {done:,} of at most "
            f"{budget:,} {unit}. "
        )
    best = {
        origin: max((objective.of(one["scores"]) for one in run.of_origin(origin)), default=None)
        for origin in ("search", "individual")
    }
    if best["search"] is not None:
        lead += (
            f"Best merge so far <strong>{markup.score(form, best['search'], unit=True)}</strong>"
        )
    if best["individual"] is not None:
        lead += "; best" if best["search"] is not None else "Best"
        lead += f" single checkpoint {markup.score(form, best['individual'], unit=True)}"
    return "This run is not finished", f"{lead.rstrip()} (search split)." if run.searched else lead


def progress_section(run: Run) -> str:
    """Evaluations so far, by what they are for."""
    done, budget, unit = _search(run)
    K = len(run.pool)
    rows = [("single checkpoints", _of(len(run.of_origin("individual")), K))]
    for name in run.config["baselines"]:
        count = len(run.of_origin(f"baseline:{name}"))
        rows.append((text(name), f"{count:,}" if count else "not yet"))
    rows.append(("search", _of(done, budget) + (f" {unit}" if done and unit == "tokens" else "")))
    tested = sum(candidate["split"] == "test" for candidate in run.candidates)
    rows.append(("final test", f"{tested:,}" if tested else "not yet"))
    extra = sum(candidate["origin"].startswith("analysis:") for candidate in run.candidates)
    if extra:
        rows.append(("analyses", f"{extra:,}"))
    return markup.section(
        "Progress", markup.table(("evaluations of", "so far"), rows, css="numbers narrow")
    )


def scores_section(run: Run, so_far: list[tuple[str, Json]]) -> str:
    """Search scores so far; the best of each column is bold."""
    choices = ["objective", *run.objective.tasks]
    scores = [{**entry["search"], "objective": entry["search_objective"]} for _, entry in so_far]
    tops = {choice: max(of_one[choice] for of_one in scores) for choice in choices}
    rows = [
        (
            "best merge so far" if kind == "search" else text(entry["name"]),
            *(
                markup.score(run.formats[choice], of_one[choice], bold=of_one[choice] == top)
                for choice, top in tops.items()
            ),
        )
        for (kind, entry), of_one in zip(so_far, scores)
    ]
    forms = [run.formats[choice] for choice in choices]
    title, columns = formatting.headings("Search scores so far", choices, forms)
    return markup.section(
        title,
        markup.note("Of each baseline its best candidate so far. The best of each column is bold."),
        markup.table(("model", *map(text, columns)), rows, css="numbers"),
    )


def front(run: Run) -> list[int]:
    """Ids of the candidates that no other dominates, of those scored on all search examples."""
    whole = [one for one in run.searched if not one.get("out_of")]
    if not whole:
        return []
    tasks = run.objective.tasks
    scores_PxM = np.array([[one["scores"][task] for task in tasks] for one in whole])
    return [whole[i]["id"] for i in pareto.front(scores_PxM)]


def _search(run: Run) -> tuple[int, int, str]:
    """How far the search is, how far it may come, and in which unit: tokens or evaluations."""
    lines, search = run.of_origin("search"), run.config["search"]
    if search.get("budget_tokens"):
        lines = [*run.of_origin(plots.WARM), *lines]
        return sum(cost(line.get("tokens")) for line in lines), search["budget_tokens"], "tokens"
    if search.get("strategy") == "gradient":  # the iterate and the mean of iterates
        return len(lines), 2 * -(-search["steps"] // search["score_every"]), "evaluations"
    return len(lines), search["budget"], "evaluations"


def _best_of(run: Run, origin: str, name: str) -> Json:
    objective = run.objective
    best = max(run.of_origin(origin), key=lambda candidate: objective.of(candidate["scores"]))
    return _entry(run, best, name)


def _entry(run: Run, candidate: Json, name: str) -> Json:
    names = [checkpoint["name"] for checkpoint in run.pool]
    return {
        "name": name,
        "id": candidate["id"],
        "weights": dict(zip(names, candidate["weights"])),
        "search": candidate["scores"],
        "search_objective": run.objective.of(candidate["scores"]),
    }


def _of(done: int, whole: int) -> str:
    return f"{done:,} of {whole:,}" if done else "not yet"
