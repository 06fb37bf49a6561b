"""Tokenizers: bytes, those of Hugging Face directories, and their comparison."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.tokenizer import Bytes, Pretrained, Tokenizer, is_in
from jaxmerge.evaluation.vocabularies import check_same_vocabulary
from jaxmerge.tasks.requests import Prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<end>", "<system>", "<user>", "<assistant>"]


def make(directory, letters="abcdefghijklmnopqrstuvwxyz ", *, template: str | None = TEMPLATE):
    """A tokenizer of letters, which starts every text with <s>."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    fast = Fast(models.BPE(vocabulary, []))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tokenizer"))


def test_plain_prompts_have_a_start_and_no_end(directory):
    tokenizer = Pretrained(directory)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.prompt(Prompt("ab")) == [0, 6, 7]
    assert tokenizer.encode("ab") == [6, 7]
    assert tokenizer.decode([6, 7, 1]) == "ab"
    assert (tokenizer.vocabulary, tokenizer.stops) == (33, (1,))


def test_chat_prompts_end_where_the_answer_begins(directory):
    user, assistant, end = 4, 5, 1
    assert Pretrained(directory, chat=True).prompt(Prompt("ab")) == [user, 6, 7, end, assistant]
    system = Pretrained(directory, chat=True, system="c").prompt(Prompt("ab"))
    assert system == [3, 8, end, user, 6, 7, end, assistant]


@pytest.mark.parametrize(("named", "stops"), [(2, (1, 2)), ([1, 2], (1, 2)), (1, (1,))])
def test_generation_config_adds_stops(tmp_path, named, stops):
    make(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert Pretrained(str(tmp_path)).stops == stops


@pytest.mark.parametrize(
    ("configs", "stops"),
    [
        ({"config.json": 2}, (1, 2)),
        ({"config.json": [5, 1]}, (1, 5)),
        ({"config.json": 2, "generation_config.json": 3}, (1, 3)),  # as transformers has it
        ({"config.json": 2, "generation_config.json": None}, (1, 2)),
    ],
)
def test_ends_that_only_the_model_names(tmp_path, configs, stops):
    """In the tokenizer's directory, or in that of the model that an adapter is laid upon."""
    make(tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    for name, ends in configs.items():
        said = {"eos_token_id": ends, "vocab_size": 33}
        (tmp_path / "model" / name).write_text("\ufeff" + json.dumps(said))
    models = [str(tmp_path / "model")]
    assert Pretrained(str(tmp_path / "tokenizer"), models=models).stops == stops
    inner = {"text_config": {"eos_token_id": [4]}}
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps(inner))
    assert Pretrained(str(tmp_path / "tokenizer"), models=models).stops == (1, 4, *stops[1:])


def test_an_end_that_is_no_token_is_refused(tmp_path):
    make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))
    with pytest.raises(JaxmergeError, match="neither a number") as caught:
        Pretrained(str(tmp_path))
    assert caught.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("after", "stops"),
    [
        ("<end>", (1, 2)),
        (" \n<system>\n<user>", (1, 3)),
        ("abc <end>", (1,)),  # letters come first: no special token ends the answer
        ("{% if m['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}", (1,)),
    ],
)
def test_the_template_says_what_ends_an_answer(tmp_path, after, stops):
    """With pool.chat or without: a model that was trained so writes it."""
    make(
        tmp_path,
        template="{% for m in messages %}<user>{{ m['content'] }}" + after + "{% endfor %}",
    )
    assert Pretrained(str(tmp_path)).stops == stops
    assert Pretrained(str(tmp_path), chat=True).stops == stops


def test_no_chat_template(tmp_path):
    make(tmp_path, template=None)
    with pytest.raises(JaxmergeError, match="no chat template"):
        Pretrained(str(tmp_path), chat=True)


def test_templates_cannot_reach_python(tmp_path):
    """They render in a sandbox."""
    make(tmp_path, template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(Exception, match="unsafe"):
        Pretrained(str(tmp_path), chat=True).prompt(Prompt("ab"))


def test_no_tokenizer(tmp_path):
    assert not is_in(str(tmp_path))
    with pytest.raises(JaxmergeError, match="can't be read") as caught:
        Pretrained(str(tmp_path))
    assert caught.value.where == str(tmp_path)


def test_vocabularies_that_differ(directory, tmp_path):
    """The first ids that differ are named; the order in files does not matter."""
    same, other = make(tmp_path / "same"), make(tmp_path / "other", "bacdefgh")
    (tmp_path / "same" / "tokenizer.json").write_text(
        json.dumps(json.loads((tmp_path / "same" / "tokenizer.json").read_text()), indent=1)
    )
    check_same_vocabulary([directory, same])
    with pytest.raises(JaxmergeError, match="vocabulary") as caught:
        check_same_vocabulary([directory, same, other])
    assert caught.value.where == other
    # a and b are exchanged; 8 to 13 are alike, and the other has no 14 to 32.
    assert caught.value.found.startswith("21 of 33 ids differ, first 6: 'b', not 'a'; 7: 'a'")
    assert "14: None, not 'i'" in caught.value.found


def test_bytes():
    assert isinstance(Bytes(), Tokenizer)
    assert Bytes().decode(Bytes().prompt(Prompt("né"))) == "né"


def _with_templates(made: str, templates) -> str:
    path = Path(made, "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
    Path(made, "chat_template.jinja").unlink(missing_ok=True)
    return made


@pytest.mark.parametrize(
    ("template", "system", "said"),
    [
        ("{{ raise_exception('after user comes assistant') }}", "", "after user comes assistant"),
        ("{{ messages[0].content.no.such }}", "", "UndefinedError"),
        ("{% for m in messages %}{{ m.content }}", "", "TemplateSyntaxError, line 1"),
        ("{{ messages[0].content", "", "TemplateSyntaxError, line 1"),
        ("a\n{% endfor %}", "", "TemplateSyntaxError, line 2"),
        ("a\n\n{% frobnicate %}", "", "TemplateSyntaxError, line 3: Encountered unknown tag"),
        ("{{ messages | no_such_filter }}", "", "TemplateAssertionError, line 1: No filter"),
        ("{{ messages[0].content + 1 }}", "a", "TypeError"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No!') }}{% endif %}a",
            "a",
            "refuses a system message",
        ),
    ],
)
def test_chat_templates_that_can_not_be_filled_in(tmp_path, template, system, said):
    made = _with_templates(make(tmp_path), template)
    with pytest.raises(JaxmergeError, match=re.escape(said)) as raised:
        Pretrained(made, chat=True, system=system)
    assert "pool." in raised.value.expected


def test_one_of_several_chat_templates(tmp_path):
    directory = make(tmp_path)
    several = [{"name": "rag", "template": "a"}, {"name": "tools", "template": "b"}]
    made = _with_templates(directory, several)
    with pytest.raises(JaxmergeError, match="none is the default") as raised:
        Pretrained(made, chat=True)
    assert raised.value.expected == "pool.chat_template: one of rag, tools"
    named = Pretrained(made, chat=True, template="tools")
    assert (named.template, named.decode(named.prompt(Prompt("x")))) == ("b", "b")
    with pytest.raises(JaxmergeError, match="none is called chat"):
        Pretrained(made, chat=True, template="chat")
    default = _with_templates(directory, [*several, {"name": "default", "template": "ab"}])
    assert Pretrained(default, chat=True).template == "ab"
    refusing = Pretrained(_with_templates(directory, "{{ raise_exception('none') }}"))
    with pytest.raises(JaxmergeError, match="filled in"):
        refusing.render([{"role": "user", "content": "x"}])
