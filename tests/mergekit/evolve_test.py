import re

import numpy as np
import pytest

from jaxmerge import config as configs
from jaxmerge.errors import JaxmergeError
from jaxmerge.experiment import jobs, methods
from jaxmerge.merge import groups
from jaxmerge.mergekit import evolve
from jaxmerge.models.families import read as family
from jaxmerge.search import space
from tests import mergekit_models

GENOME = """
genome:
  models: [./llama/base, ./llama/a, ./llama/a2]
  merge_method: linear
  base_model: ./llama/base
"""
TASKS = """
tasks:
- arc_easy
- {name: gsm8k, weight: 2.5, metric: "exact_match,strict-match"}
"""


@pytest.fixture
def read(tmp_path_factory, tmp_path, monkeypatch):
    models = tmp_path_factory.getbasetemp() / "evolve models"
    if not models.exists():
        mergekit_models.make(models)
    monkeypatch.chdir(models)

    def read(text: str) -> dict:
        (tmp_path / "evolve.yml").write_text(text)
        return evolve.read(str(tmp_path / "evolve.yml"))

    return read


def test_the_fields_of_a_search(read):
    fields = read(GENOME + TASKS + "limit: 50\nnum_fewshot: 2\n")
    assert [path.rsplit("/", 1)[1] for path in fields["pool.checkpoints"]] == ["base", "a", "a2"]
    assert fields["pool.base"].endswith("llama/base")
    assert fields["tasks.gsm8k"] == {
        **{"builder": "lm_eval", "task": "gsm8k", "metric": "exact_match"},
        **{"filter": "strict-match", "form": "chat", "num_fewshot": 2},
    }
    assert fields["tasks.arc_easy"]["metric"] == "acc"
    assert fields["objective.aggregate"] == "weighted"
    assert fields["objective.weights"] == (1.0, 2.5)
    assert fields["objective.search_examples"] == 50
    assert fields["search.budget"] == 100
    config = configs.default()
    jobs.set_fields(config, fields)
    configs.check(config)  # each has the type that the config wants
    assert configs.objective(config).tasks == ("arc_easy", "gsm8k")


def test_what_the_command_line_sets_holds(read):
    config = configs.default()
    config.search.budget = 7
    jobs.set_fields(config, read(GENOME + TASKS))
    assert config.search.budget == 7


def test_weights_are_those_of_its_genes(read):
    """Genes x = 1/K + sigma0 n are the genotypes z = K x - 1, with our sigma."""
    fields = read(GENOME + TASKS)
    draws = np.random.default_rng(0).normal(size=(5, 3))
    genes = 1 / 3 + draws / 6
    expected = np.abs(genes) / np.abs(genes).sum(axis=1, keepdims=True)
    found = space.weights(draws * fields["search.sigma"], fields["space.constraint"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
    free = read(GENOME + "  normalize: false\n  allow_negative_weights: true\n" + TASKS)
    found = space.weights(draws * free["search.sigma"], free["space.constraint"])
    np.testing.assert_allclose(found, genes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", ["base", "union"])
def test_vocabularies(read, choice):
    text = GENOME.replace("  base_model", f"  tokenizer_source: {choice}\n  base_model")
    assert read(text + TASKS)["pool.vocabulary"] == choice
    assert "pool.vocabulary" not in read(GENOME + TASKS)


def test_groups_of_layers_and_filters(read):
    assert read(GENOME + TASKS)["space.granularity"] == "model"
    assert read(GENOME + "  layer_granularity: 2\n" + TASKS)["space.granularity"] == "2"
    text = GENOME + "  layer_granularity: 2\n  filters: [self_attn, mlp.up_proj]\n" + TASKS
    fields = read(text)
    known = family(fields["pool.base"])
    assert known
    patterns = fields["space.patterns"]
    assert len(patterns) == 2 * 3
    # every tensor is in the group that its name says
    for leaf, parts in known.layout.leaves.items():
        for part in parts:
            layer = re.search(r"layers\.(\d)", part.tensor)
            number = int(layer[1]) if layer else 3 * (part.tensor != "model.embed_tokens.weight")
            wanted = [each in part.tensor for each in ("self_attn", "mlp.up_proj", "")].index(True)
            name = f"{leaf}/{layer[1]}" if layer else leaf
            found = [i for i, each in enumerate(patterns) if re.search(each, name)]
            assert found == [number // 2 * 3 + wanted], name
    groups.check(fields["space.granularity"], patterns)


OTHERS = """
genome:
  models: [./llama/a, ./llama/a2]
  base_model: ./llama/base
  merge_method: """


@pytest.mark.parametrize(
    ("genome", "constraint", "genes", "searched"),
    [
        ("slerp", "softmax", {}, ["t"]),
        ("ties", "abs", {"normalize": True, "lambda": 1.0}, ["density[0]", "density[1]"]),
        ("dare_ties", "abs", {"normalize": True, "lambda": 1.0}, ["density[0]", "density[1]"]),
        ("task_arithmetic", "abs", {"normalize": False}, ["lambda"]),
        (
            "ties\n  normalize: false",
            "abs",
            {"normalize": False},
            ["density[0]", "density[1]", "lambda"],
        ),
        (
            "task_arithmetic\n  allow_negative_weights: true",
            "free",
            {"normalize": False, "lambda": 1.0},
            [],
        ),
    ],
)
def test_other_methods(read, genome, constraint, genes, searched):
    config = configs.default()
    jobs.set_fields(config, read(OTHERS + genome + TASKS))
    configs.check(config)
    assert config.merge.variant == "mergekit"
    assert (configs.constraint(config), config.merge.genes.to_dict()) == (constraint, genes)
    of = methods.searched(config, 2)
    assert of
    assert [gene.name for gene in of.genes] == searched
    # Where the search starts, weights and all are those of its genome: 1/K each, or t = 1/2.
    (row,) = space.rows(
        np.zeros((1, of.numbers)), 2, methods.ranges(of), constraint, weighted=of.weighted
    )
    start = [0.5 if name == "t" else 1.0 for name in searched]
    np.testing.assert_allclose(row, [0.5, 0.5, *start, 1])
    if "density[1]" in searched:
        row[3] = 0.25
        np.testing.assert_array_equal(of.complete(row)["density"], [1, 0.25])


def test_the_first_step_of_t_is_as_long_as_its_own(read):
    fields = read(OTHERS + "slerp" + TASKS)
    draws = np.random.default_rng(0).normal(size=(20_000, 2)) / 6
    t = 1 / (1 + np.exp(draws[:, 0] - draws[:, 1]))
    ours = space.numbers(np.array([[fields["search.sigma"]]]), [space.Range(0.5, 0.0, 1.0)])
    assert t.std() == pytest.approx(float(ours[0, 0]) - 0.5, rel=0.03)


REFUSED_OF_OTHERS = [
    ("slerp\n  filters: [mlp]", "line 6, genome.filters", "layer_granularity"),
    ("ties\n  allow_negative_weights: true", "genome", "normalize: false"),
    ("karcher", "line 5, genome.merge_method", "dare_ties"),
]


@pytest.mark.parametrize(("genome", "where", "says"), REFUSED_OF_OTHERS)
def test_what_other_methods_do_not_take(read, genome, where, says):
    with pytest.raises(JaxmergeError) as caught:
        read(OTHERS + genome + TASKS)
    assert where in str(caught.value)
    assert says in str(caught.value)


REFUSED = [
    ("  merge_method: linear", "  merge_method: ties", "line 3, genome.models", "without"),
    ("  merge_method: linear", "  merge_method: slerp", "line 3, genome.models", "two models"),
    ("merge_method: linear", "merge_method: linear\n  smooth: true", "line 5", "space.granularity"),
    ("tasks:", "shuffle: true\ntasks:", "shuffle", "the same examples"),
    ("tasks:", "random_init: true\ntasks:", "random_init", "uniform merge"),
    ("  base_model", "  normalize: false\n  base_model", "line 5, genome.normalize", "true"),
    ("  base_model", "  layer_granularity: 3\n  base_model", "line 5", "a divisor of 4"),
    ("weight: 2.5", "weight: -1", "line 9, tasks[1].weight", "negated"),
    ("tasks:", "fewshot_as_multiturn: false\ntasks:", "line 7", "turns of the chat"),
    ("genome:", "genomes:", "line 2, genomes", "is genome meant"),
]


@pytest.mark.parametrize(("before", "after", "where", "says"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_key_and_line(read, before, after, where, says):
    with pytest.raises(JaxmergeError) as caught:
        read((GENOME + TASKS).replace(before, after, 1))
    assert where in str(caught.value)
    assert says in str(caught.value)
