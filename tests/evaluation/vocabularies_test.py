"""Which tokenizer a pool is read with: the base's, or what its members agree on."""

import json
import shutil
from pathlib import Path

import pytest

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.vocabularies import choose, template
from tests.evaluation.tokenizer_test import make

FEW, MORE = "abcdefgh", "abcdefghij"  # 14 and 16 tokens
OTHER = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("vocabularies")
    make(top / "base", FEW, template=None)
    make(top / "same", FEW, template=None)
    make(top / "more", MORE, template=None)
    make(top / "templated", FEW)
    make(top / "both", MORE, template=OTHER)
    make(top / "another", "bacdefgh")
    (top / "nothing").mkdir()
    return top


@pytest.mark.parametrize(
    ("members", "bases", "chosen"),
    [
        (["nothing"], [], ""),
        (["nothing"], ["base"], "base"),
        (["same"], ["base"], "base"),
        (["same", "base"], [], "same"),
        (["more"], ["base"], "more"),
        (["more", "nothing"], ["base"], "more"),  # who has none says nothing
        (["more", "base"], ["base"], "more"),  # an adapter beside the base that it is laid upon
        (["more", "both"], ["base"], "both"),  # one template among them
        (["same", "templated"], ["base"], "templated"),
        (["same"], ["templated"], "templated"),
        (["both"], ["base", "templated"], "both"),
    ],
)
def test_the_bases_unless_the_members_say_more(made, members, bases, chosen):
    for chat in (False, True):
        found = choose(
            [str(made / each) for each in members],
            [str(made / each) for each in bases],
            rows=16,
            chat=chat,
        )
        assert found == (str(made / chosen) if chosen else "")


@pytest.mark.parametrize(
    ("members", "rows", "said"),
    [
        (["more", "same"], 0, "the vocabulary is not that of"),
        (["another"], 0, "nor does it only add"),
        (["more"], 15, "no row in the model's embedding"),
    ],
)
def test_what_contradicts_is_refused(made, members, rows, said):
    with pytest.raises(JaxmergeError, match=said) as caught:
        choose([str(made / each) for each in members], [str(made / "base")], rows=rows)
    assert caught.value.where == str(made / members[-1])
    assert caught.value.expected


def test_templates_that_differ_matter_in_chats(made, tmp_path):
    """However they are stored; without chats the base's is kept."""
    members = [str(made / "templated"), str(shutil.copytree(made / "same", tmp_path / "other"))]
    said = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    said["chat_template"] = OTHER
    (tmp_path / "other" / "tokenizer_config.json").write_text("\ufeff" + json.dumps(said))
    assert [template(each) == OTHER for each in members] == [False, True]
    base = str(made / "base")
    assert choose(members, [base]) == base
    with pytest.raises(JaxmergeError, match="templates of the members differ") as caught:
        choose(members, [base], chat=True)
    assert caught.value.where == "pool.tokenizer"
    assert all(each in caught.value.found for each in members)
