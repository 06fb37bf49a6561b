"""What a merge was made of: the method, its numbers by group, and how alike the checkpoints are."""

from __future__ import annotations

from jaxmerge.report import markup
from jaxmerge.report.markup import text
from jaxmerge.report.reading import Json, Run
from jaxmerge.scores import formatting


def method_section(results: Json) -> str:
    """What merged the winner, where that is no weighted sum, and its numbers."""
    method = results.get("method")
    if not method:
        return ""
    if "genes" not in results["best"]:
        searched = f"A weighted sum: no merge by <code>{text(method['name'])}</code> was better."
        return markup.section("How they were merged", markup.note(searched))
    variant = " in mergekit's variant" * (method["variant"] == "mergekit")
    said = {"Method": f"<code>{text(method['name'])}</code> ({text(method['paper'])}){variant}"}
    for name, gene in results["best"]["genes"].items():
        shown = (
            f"{markup.number(gene)}"
            if not isinstance(gene, list | tuple)
            else (f"from {markup.number(min(gene))} to {markup.number(max(gene))} over the groups")
        )
        said[text(name)] = f"<b>{shown}</b>, searched"
    for name, gene in method["fixed"].items():
        alike = gene[0] if isinstance(gene, list) and len({*gene}) == 1 else gene
        said[text(name)] = text(str(alike))
    return markup.section(
        "How they were merged",
        markup.note(
            "Single checkpoints and baselines are weighted sums; what was searched is merged by "
            "this method."
        ),
        markup.facts(said),
    )


def window_section(results: Json) -> str:
    """The length and the curve of the winner's window, where a search was over those."""
    numbers = results["best"].get("window")
    if not numbers:
        return ""
    said = formatting.window(numbers, len(results["best"]["weights"]))
    return markup.section(
        "The window of the run",
        markup.note(
            "Searched were the length of a window that ends at the newest checkpoint, and the "
            "exponent of the decay curve that its weights stand for."
        ),
        markup.facts({"The winner is": text(said)}),
    )


def groups_section(run: Run, results: Json) -> str:
    """The winner's weights, and a method's numbers, of each group that has its own: a heat map."""
    best = results["best"]
    if "groups" not in best:
        return ""
    genes = best.get("genes", {})
    weighted = results.get("method", {}).get("weighted", True)
    reached = max(abs(weight) for row in best["groups"] for weight in row)
    rows = [
        (
            text(group),
            *(markup.shaded(weight, reached, markup.number(weight)) for weight in row * weighted),
            *(
                markup.shaded(gene[g], max(map(abs, gene)), markup.number(gene[g]))
                for gene in genes.values()
            ),
        )
        for g, (group, row) in enumerate(zip(results["groups"], best["groups"]))
    ]
    columns = [text(checkpoint["name"]) for checkpoint in run.pool] * weighted
    columns += [f"<i>{text(name)}</i>" for name in genes]
    return markup.section(
        "Weights by group",
        markup.note(
            f"Each of {len(rows)} groups of leaves has weights of its own. The darker, the further "
            "from 0; blue is below it. The table above has their means."
            + " Numbers of the method are in italics, each column with a scale of its own."
            * bool(genes)
        ),
        markup.table(("group", *columns), rows, css="numbers heat"),
    )


def kinship_section(run: Run, results: Json) -> str:
    """How alike the checkpoints are, as a heat map."""
    if "kinship" not in results:
        return ""
    kinship, names = results["kinship"], [text(checkpoint["name"]) for checkpoint in run.pool]
    rows = [
        (name, markup.number(norm), *(markup.shaded(x, 1.0, markup.number(x)) for x in cosines))
        for name, norm, cosines in zip(names, kinship["norms"], kinship["cosines"])
    ]
    origin = "the base" if kinship["origin"] == "base" else "their mean"
    return markup.section(
        "How alike the checkpoints are",
        markup.note(
            f"Of each checkpoint's difference from {origin}, over all parameters: its norm, and "
            "the cosine with every other. Near 1 two were trained alike, near 0 they change "
            "unrelated things, below 0 they undo each other."
        ),
        markup.table(("checkpoint", "norm", *names), rows, css="numbers heat"),
    )
