"""Our decoder as a model of lm_eval: it answers what lm_eval's own Hugging Face model answers."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import lm_eval
import numpy as np
import pytest
import tokenizers
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import jaxmerge
from jaxmerge.checkpoints import huggingface, orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.evaluator import Evaluator
from jaxmerge.evaluation.tokenizer import Pretrained
from jaxmerge.lm_eval_model import JaxmergeLM
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.lm_eval import lm_eval as build
from tests import tiny
from tests.huggingface_models import VOCAB
from tests.huggingface_models import tiny as tiny_model
from tests.tasks.lm_eval_tasks import KINDS, WORDS, write

hugging_face: Any = HFLM
BOS, EOS = 1, 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<user>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<user>{% endif %}"
)
# variant of tests/huggingface_models.py, and whether its tokenizer begins every text with <s>
MODELS = [("llama", True), ("gemma2", False)]


def _tokenizer(starts: bool) -> transformers.PreTrainedTokenizerFast:
    """96 pieces of words, whose spaces belong to what follows them; unknown letters are <unk>."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    whole.decoder = tokenizers.decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False
    )
    whole.train_from_iterator([" ".join(WORDS) + " : , \n é"] * 3, trainer)
    if starts:
        whole.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Random tiny models with tokenizers."""
    made = {}
    for variant, starts in MODELS:
        directory = tmp_path_factory.mktemp(variant)
        shutil.copytree(tiny_model(variant).directory, directory, dirs_exist_ok=True)
        config = json.loads((directory / "config.json").read_text())
        config |= {"bos_token_id": BOS, "eos_token_id": EOS}
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
        _tokenizer(starts).save_pretrained(directory)
        made[variant] = str(directory)
    return made


@pytest.fixture(scope="module", params=[variant for variant, _ in MODELS])
def pair(request, directories):
    """Ours and theirs, of the same model."""
    directory = directories[request.param]
    ours = JaxmergeLM(directory, dtype="float32", batch_size=16, data=1)
    return ours, hugging_face(directory, device="cpu", dtype="float32", batch_size=8)


def ask(model, kind, arguments):
    instances = [Instance(kind, {}, tuple(each), 0) for each in arguments]
    return getattr(model, kind)(instances, disable_tqdm=True)


def sentences(seed, count, longest):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def contexts_and_continuations():
    """100 pairs of mixed lengths, a few with contexts longer than the models can hold."""
    rng = random.Random(4)
    befores = sentences(1, 60, 20) + sentences(2, 6, 160) + [""] * 14 + sentences(3, 20, 5)
    afters = sentences(5, 100, 4)
    ends = ["", "", " ", "\n", "  ", " é☃ ", ": "]
    pairs = [
        (before + (rng.choice(ends) if before else ""), rng.choice(["", " ", "\n"]) + after)
        for before, after in zip(befores, afters, strict=True)
    ]
    pairs[-1] = ("<s>" + pairs[-1][0], pairs[-1][1])
    pairs[-2] = ("", "<s>" + pairs[-2][1])
    return pairs


def check_likelihoods(ours, theirs, pairs, atol):
    found = ask(ours, "loglikelihood", pairs)
    expected = ask(theirs, "loglikelihood", pairs)
    np.testing.assert_allclose(
        [nats for nats, _ in found], [nats for nats, _ in expected], rtol=0, atol=atol
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_hundred_likelihoods_are_those_of_lm_eval(pair):
    ours, theirs = pair
    pairs = contexts_and_continuations()
    assert len(pairs) == 100
    # float32, sums of up to 40 tokens of about 5 nats, added up in another order.
    check_likelihoods(ours, theirs, pairs, atol=3e-4)


def test_what_is_greedy_is_greedy_to_both(pair):
    """Continuations that the model itself would write: random ones never are."""
    ours, theirs = pair
    before = [(text, {"until": [], "max_gen_toks": 3}) for text in sentences(6, 12, 6)]
    written = ask(theirs, "generate_until", before)
    pairs = [(text, after) for (text, _), after in zip(before, written) if after]
    check_likelihoods(ours, theirs, pairs, atol=3e-4)
    assert any(greedy for _, greedy in ask(ours, "loglikelihood", pairs))


def test_rolling_likelihoods_are_those_of_lm_eval(pair):
    """Of texts shorter and longer than the context of 128 tokens, up to three windows."""
    ours, theirs = pair
    texts = [(text,) for text in [*sentences(7, 10, 30), *sentences(8, 6, 250), "sun"]]
    found = ask(ours, "loglikelihood_rolling", texts)
    expected = ask(theirs, "loglikelihood_rolling", texts)
    np.testing.assert_allclose(found, expected, rtol=3e-6)  # up to 400 tokens of about 5 nats


@pytest.mark.parametrize(
    "arguments",
    [
        {"until": [], "max_gen_toks": 8},
        {"until": ["e", "n s", "wi"], "max_gen_toks": 12},
        {"until": "o", "max_gen_toks": 100, "do_sample": False, "temperature": 0.0},
    ],
)
def test_greedy_texts_are_those_of_lm_eval(pair, arguments):
    ours, theirs = pair
    contexts = [*sentences(9, 12, 20), *sentences(10, 2, 160), "sun ", "<s>sea", "é☃ moon"]
    asked = [(context, dict(arguments)) for context in contexts]
    found = ask(ours, "generate_until", asked)
    # Rows of a batch go on after a stop text of theirs; alone they do not.
    theirs.batch_size_per_gpu = 1
    assert found == ask(theirs, "generate_until", asked)
    theirs.batch_size_per_gpu = 8
    assert len(set(found)) > 5


def test_chat_templates_are_rendered_as_lm_eval_does(pair):
    ours, theirs = pair
    turns = [
        {"role": "system", "content": "sea"},  # which the template refuses
        {"role": "user", "content": "sun"},
        {"role": "assistant", "content": "moon"},
        {"role": "user", "content": "tree"},
    ]
    for messages, begins in ((turns, True), (turns[1:3], False), (turns[1:], True)):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=begins)
        assert ours.apply_chat_template(messages, add_generation_prompt=begins) == expected
    assert ours.chat_template(True) == TEMPLATE
    assert ours.tokenizer_name == theirs.tokenizer_name


def evaluate(model, path, **arguments):
    manager = TaskManager(include_defaults=False)
    settings = {"task_manager": manager, "num_fewshot": 2, "bootstrap_iters": 0, **arguments}
    simple_evaluate: Any = lm_eval.simple_evaluate
    found = simple_evaluate(model, tasks=[path], **settings)
    (samples,) = found["samples"].values()
    return {(each["doc"]["question"], each["filter"]): each for each in samples}


METRICS = [("choice", "acc_norm", "none"), ("last_word", "acc", "none"), ("text", "loss", "none")]
METRICS += [("writing", "exact_match", "word")]


@pytest.mark.parametrize(("kind", "metric", "filter"), METRICS)
def test_an_evaluator_scores_what_lm_eval_scores_with_its_own_model(
    directories, tmp_path, kind, metric, filter
):
    """From a YAML file and its data to the scores of each document, by two roads."""
    directory = directories["llama"]
    task = build(task=write(tmp_path, kind), metric=metric, filter=filter, num_fewshot=2)
    source = huggingface.describe("llama", orbax.absolute(directory))
    fields = {key: value for key, value in source.architecture.items() if key != "model"}
    model, mesh = decoder(DecoderConfig.from_plain(fields)), make_mesh(devices=jax.devices()[:1])
    pool = load([source], mesh, model.sharding_rules, dtype="float32")
    theirs = hugging_face(directory, device="cpu", dtype="float32", batch_size=1)
    expected = evaluate(theirs, str(tmp_path / f"{kind}.yaml"))
    sign, compared = (-1 if metric == "loss" else 1), 0
    for split, examples in task.splits.items():
        limits = Limits(context=128, truncate=True)
        tokenizer = Pretrained(directory)
        evaluator = Evaluator(
            pool.merge, model, tokenizer, [task], split, mesh, candidates_per_step=1, limits=limits
        )
        scores = evaluator(np.ones((1, 1), np.float32))[task.name][0]
        for example, score in zip(examples, scores, strict=True):
            sample = expected[example.data.document["question"], filter]
            assert score == pytest.approx(sign * sample[metric], abs=1e-5)
            compared += 1
    assert compared == 30


@pytest.mark.parametrize("kind", list(KINDS))
def test_lm_eval_gives_our_model_the_scores_of_its_own(pair, tmp_path, kind):
    path = write(tmp_path, kind)
    ours, theirs = pair
    theirs.batch_size_per_gpu = 1
    found, expected = evaluate(ours, path), evaluate(theirs, path)
    theirs.batch_size_per_gpu = 8
    assert found.keys() == expected.keys()
    for key, sample in found.items():
        for metric in sample["metrics"]:
            assert sample[metric] == pytest.approx(expected[key][metric], abs=1e-4)


def test_a_cache_of_lm_eval_is_filled_and_read(directories, tmp_path):
    path = write(tmp_path, "writing")
    model = JaxmergeLM(directories["llama"], dtype="float32", batch_size="auto", data=1)
    first = evaluate(model, path, use_cache=str(tmp_path / "cache"))
    del model._responder  # it is asked nothing more
    again = evaluate(model, path, use_cache=str(tmp_path / "cache"))
    assert [each["resps"] for each in again.values()] == [each["resps"] for each in first.values()]


def test_sampled_texts_differ_between_repeats_and_not_between_calls(directories):
    model = JaxmergeLM(directories["llama"], dtype="float32", data=1)
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = [("sun moon", dict(arguments))] * 6
    texts = ask(model, "generate_until", asked)
    assert len(set(texts)) > 3
    assert ask(model, "generate_until", asked) == texts


def test_an_orbax_checkpoint_answers_as_the_directory_it_was_made_of(directories, tmp_path):
    """As in `merged` of a run, with the tokenizer in the directory beside it."""
    directory = directories["gemma2"]
    source = huggingface.describe("gemma2", orbax.absolute(directory))
    mesh = make_mesh(devices=jax.devices()[:1])
    (tree,) = load([source], mesh, ((".*", ()),)).trees
    jaxmerge.save(tmp_path / "orbax", tree, architecture=source.architecture)
    pairs = [(text, " sun") for text in sentences(12, 8, 4)]
    expected = ask(JaxmergeLM(directory, data=1), "loglikelihood", pairs)
    with pytest.raises(JaxmergeError, match="which tokenizer"):
        JaxmergeLM(str(tmp_path / "orbax"))
    named = JaxmergeLM(str(tmp_path / "orbax"), tokenizer=directory, data=1)
    assert ask(named, "loglikelihood", pairs) == expected
    shutil.copytree(directory, tmp_path / "huggingface")
    found = JaxmergeLM(str(tmp_path / "orbax"), data=1)
    assert found.max_length == 128
    assert ask(found, "loglikelihood", pairs) == expected


def test_a_model_of_bytes_is_spread_over_devices(tmp_path):
    """jaxmerge's own decoder without any Hugging Face file, on 1 and on 4 devices."""
    (tree,) = tiny.trees(1)
    jaxmerge.save(tmp_path / "model", tree, architecture=tiny.model().architecture)
    one = JaxmergeLM(str(tmp_path / "model"), data=1)
    many = JaxmergeLM(str(tmp_path / "model"), data=2, tensor=2)
    assert one.max_length == 2048
    pairs = [(text, " yes") for text in sentences(11, 8, 3)]
    # float32, sums over the width in another order.
    found, expected = (ask(each, "loglikelihood", pairs) for each in (many, one))
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in expected], atol=1e-4)
    with pytest.raises(JaxmergeError, match="no chat template"):
        one.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_missing_checkpoint_is_named():
    with pytest.raises(JaxmergeError, match=r"no checkpoint here\n.*orbax"):
        JaxmergeLM("no/such")


def test_a_checkpoint_of_an_unknown_model_is_refused(tmp_path):
    jaxmerge.save(tmp_path / "model", {"w": np.ones(3, np.float32)})
    with pytest.raises(JaxmergeError, match="does not say that it is of a decoder"):
        JaxmergeLM(str(tmp_path / "model"))


def test_lm_eval_knows_the_model_by_name():
    assert get_model("jaxmerge") is JaxmergeLM


@pytest.mark.slow
def test_the_command_evaluates(directories, tmp_path):
    path = write(tmp_path, "choice")
    command = [sys.executable, "-m", "jaxmerge.lm_eval_model", "run", "--model", "jaxmerge"]
    command += ["--model_args", f"path={directories['llama']},dtype=float32,data=1"]
    command += ["--tasks", path, "--batch_size", "32", "--output_path", str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(results.read_text())["results"]["choice"]["acc,none"]
    expected = evaluate(JaxmergeLM(directories["llama"], data=1), path, num_fewshot=0)
    assert found == pytest.approx(np.mean([each["acc"] for each in expected.values()]))
    command[command.index("--model_args") + 1] = "path=no/such"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no checkpoint here" in done.stderr
    assert "Traceback" not in done.stderr
