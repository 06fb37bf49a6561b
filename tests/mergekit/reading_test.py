import numpy as np
import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.mergekit import document as documents
from jaxmerge.mergekit.document import Reference
from jaxmerge.mergekit.nodes import documents as nodes
from jaxmerge.mergekit.settings import evaluate, lookup, parameters


def settings(tmp_path, text):
    path = tmp_path / "settings.yml"
    path.write_text(text)
    return parameters(nodes(str(path))[0])


def read(tmp_path, text):
    path = tmp_path / "merge.yml"
    path.write_text(text)
    return documents.read(str(path))


def refused(tmp_path, text) -> str:
    with pytest.raises(JaxmergeError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_gradients_are_linear_between_their_knots(tmp_path):
    found = settings(tmp_path, "t: [1, 3, 0]\none: [7]\nflags: [true, false]\nsmall: 1e-5")
    at = np.linspace(0, 1, 11)
    expected = np.interp(at, [0, 0.5, 1], [1, 3, 0])
    np.testing.assert_allclose([evaluate(found["t"], "x", t) for t in at], expected, atol=1e-12)
    assert evaluate(found["one"], "x", 0.3) == 7
    assert [evaluate(found["flags"], "x", t) for t in (0.0, 0.9, 1.0)] == [True, True, False]
    assert evaluate(found["small"], "x", 0.0) == 1e-5  # a text, to YAML 1.1


def test_the_first_condition_holds_whose_filter_is_in_the_name(tmp_path):
    text = "t:\n- {filter: mlp, value: [0, 1]}\n- {filter: layers.2., value: 5}\nu: {value: 3}"
    found = settings(tmp_path, text)
    assert evaluate(found["t"], "model.layers.2.mlp.up", 0.25) == 0.25
    assert evaluate(found["t"], "model.layers.2.norm", 0.25) == 5
    assert evaluate(found["t"], "model.layers.20.norm", 0.25) is None
    assert evaluate(found["u"], "anything", 0.25) == 3


def test_a_level_at_which_no_condition_holds_is_passed_over(tmp_path):
    near = settings(tmp_path, "weight: [{filter: mlp, value: 1}]")
    far = settings(tmp_path, "weight: 2")
    for name, expected in (("mlp.up", 1), ("attention", 2)):
        found = lookup("weight", [near, far], name, 0.0)
        assert found
        assert found.value == expected
    assert lookup("density", [near, far], "mlp.up", 0.0) is None


def test_a_byte_order_mark_is_no_part_of_it(tmp_path):
    text = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b}\n"
    path = tmp_path / "merge.yml"
    path.write_text(text)
    plain = documents.read(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert documents.read(str(path)) == plain
    assert plain[0].method.value == "linear"


def test_references(tmp_path):
    (found,) = read(
        tmp_path,
        """
        merge_method: linear
        models:
        - model: one/two@v1+./three@v2
        - model: {model: {path: ./four}, lora: {path: five, revision: v3}}
        base_model: ./six
        """,
    )
    assert found.references() == (
        Reference("./six"),
        Reference("one/two", "v1", "./three", "v2"),
        Reference("./four", "", "five", "v3"),
    )


def test_documents_come_after_those_whose_results_they_take(tmp_path):
    merge = "merge_method: linear\nmodels: [{model: %s}]\n"
    texts = [merge % "b", "name: b\n" + merge % "a", "name: a\n" + merge % "./x"]
    found = read(tmp_path, "---\n".join(texts))
    assert [each.name for each in found] == ["a", "b", ""]
    assert documents.result(found).name == ""
    around = ["name: a\n" + merge % "b", "name: b\n" + merge % "a", merge % "a"]
    assert "need each other's results" in refused(tmp_path, "---\n".join(around))
    assert "all but one have a name" in refused(tmp_path, "---\n".join(texts[1:]))


def test_anchors_and_merges(tmp_path):
    (found,) = read(
        tmp_path,
        """
        merge_method: linear
        models:
        - model: a
          parameters: &usual {weight: 1, density: 0.5}
        - model: b
          parameters:
            <<: *usual
            weight: 2
        """,
    )
    first, second = found.modules[0].slices[0].inputs
    assert evaluate(first.parameters["weight"], "", 0.0) == 1
    assert evaluate(second.parameters["weight"], "", 0.0) == 2
    assert evaluate(second.parameters["density"], "", 0.0) == 0.5


TOKEN = "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}"
REFUSED = [
    ("merge_method: linear\nmodel: x", "line 2, model", "models"),
    ("merge_method: linear", "line 1", "exactly one of"),
    ("models: [{model: a}]\nslices: []\nmerge_method: linear", "line 1", "models, slices"),
    ("merge_method: linear\nmodels:\n- model: a\n  weight: 3", "line 4, models[0].weight", "param"),
    ("merge_method: linear\nmodels: [{model: a}]\ndtype: int64", "line 3, dtype", "bfloat16"),
    ("merge_method: linear\nmodels: [{model: a+b+c}]", "models[0].model", "PATH+ADAPTER"),
    ("merge_method: linear\nmodels: []", "line 2, models", "a list"),
    ("merge_method: linear\nmerge_method: ties\nmodels: [{model: a}]", "line 2", "twice"),
    ("merge_method: linear\nmodels: [", "line", "no YAML"),
    ("merge_method: linear\nmodels: [{model: a}]\nchat_template: nope", "line 3", "chatml"),
    (
        "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [3, 3]}",
        "line 4, slices[0].sources[0].layer_range",
        "after the last",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\nparameters:\n  weight: [1, {value: 2}]",
        "line 4, parameters.weight",
        "side by side",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union\ntokenizer: {}",
        "line 3, tokenizer_source",
        "one of the two",
    ),
    ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: !!int ''}", "", "no YAML"),
    ("merge_method: linear\nmodels: [{model: a}]\nparameters: {t: !!bool x}", "", "no YAML"),
    (f"merge_method: linear\nmodels: [{{model: a}}]\nseed: 0x{'f' * 5000}", "", "no YAML"),
    (f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{t: 1{'0' * 400}}}", "", "no YA"),
    (
        "merge_method: linear\nmodels: [{model: a}]\n" + TOKEN,
        "line 3, tokenizer.tokens.x.source",
        "token_id",
    ),
]


@pytest.mark.parametrize(("text", "where", "says"), REFUSED)
def test_what_is_not_understood_is_refused_by_key_and_line(tmp_path, text, where, says):
    said = refused(tmp_path, text)
    assert where in said
    assert says in said


def test_a_file_of_the_other_kind_says_which_command(tmp_path):
    path = tmp_path / "evolve.yml"
    path.write_text("genome: {}\ntasks: []")
    with pytest.raises(JaxmergeError, match="jaxmerge search"):
        documents.check_kind(str(path), "merge_method")


def test_aliases_that_grow_without_bound(tmp_path):
    """Ten lines that stand for 10^9 values, and a list that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    for text in ("\n".join(lines), "a: &a [*a]"):
        (tmp_path / "bomb.yml").write_text(text)
        with pytest.raises(JaxmergeError, match="too large for a merge"):
            nodes(str(tmp_path / "bomb.yml"))
