"""Checkpoints as a model of lm-evaluation-harness: its tasks, its prompts, our decoder.

    python -m jaxmerge.lm_eval_model run --model jaxmerge --model_args path=DIR \
        --tasks hellaswag --batch_size 64

is the command `lm_eval` with one model more. lm_eval has no entry point for models of others; in a
program, importing this module adds the name.
"""

from __future__ import annotations

from jaxmerge import entry

if __name__ == "__main__":  # before the imports, which take seconds
    entry.begin()

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from tqdm import tqdm

from jaxmerge.checkpoints import orbax
from jaxmerge.checkpoints.pool import load
from jaxmerge.checkpoints.source import Source
from jaxmerge.checkpoints.survey import FORMATS
from jaxmerge.checkpoints.trainers import STORED
from jaxmerge.errors import JaxmergeError
from jaxmerge.evaluation import vocabularies
from jaxmerge.evaluation.batches import Limits
from jaxmerge.evaluation.respond import Responder
from jaxmerge.evaluation.tokenizer import Bytes, Pretrained, Tokenizer, is_in
from jaxmerge.merge import linear
from jaxmerge.models import families
from jaxmerge.models.architecture import DecoderConfig
from jaxmerge.models.decoder import decoder
from jaxmerge.models.family_fields import FAMILIES
from jaxmerge.models.model import Model
from jaxmerge.sharding import make_mesh
from jaxmerge.tasks.lm_eval_instances import answer, generate, text_prompt
from jaxmerge.tasks.requests import Likelihood, Request, Rolling

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise JaxmergeError(
        "a package is missing",
        expected="pip install 'jaxmerge[lm-eval]'",
        where="jaxmerge.lm_eval_model",
        found=str(error),
    ) from error

_CONTEXT = 2048  # where no configuration says; lm_eval's default
_ROWS = 64  # of `--batch_size auto`
_AT_A_TIME = 1024  # requests between two steps of the progress bar


class JaxmergeLM(LM):
    """A checkpoint that lm_eval can ask, with the encoding of its own Hugging Face model.

    Spaces at the end of a context are scored with the continuation, both are encoded together, an
    empty context is the token that begins (or else ends) texts, and a prompt that is too long loses
    its beginning. Greedy texts are those of transformers, but no repetition penalty of a
    generation_config.json is heeded.

    Args:
        path: an Orbax checkpoint of a decoder that says so, as runs write it; a Hugging Face
            directory; or an adapter.
        tokenizer: a Hugging Face directory, or "bytes"; "": of the checkpoint, or of the directory
            `huggingface` beside it, as in `merged` of a run.
        base: Hugging Face directory that an adapter is laid upon; "": the one that it names.
        subtree: where in an Orbax checkpoint the parameters are.
        dtype: cast floating-point leaves to this; "" keeps each as stored.
        max_length: tokens of the context; 0: as the model's configuration says.
        batch_size: rows at a time; "auto" is 64.
        data: mesh axis that requests are spread over; -1: all devices that are left.
        fsdp: mesh axis that parameters are spread over; `tensor` alike.
        max_batch_size: not heeded; lm_eval gives it to every model.
        device: not heeded either, since lm_eval says `cuda:0` when nobody does; JAX takes the best
            that there is, or what JAX_PLATFORMS says.

    Raises:
        JaxmergeError: there is no such checkpoint, or it does not say what model it is of; there
            is no tokenizer for it.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str = "",
        base: str = "",
        subtree: str = "",
        dtype: str = "",
        max_length: int = 0,
        batch_size: int | str = _ROWS,
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        source = _source(path, subtree, base)
        model = _model(source)
        directory = os.path.expanduser(tokenizer) or _directory_of(source)
        mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        (tree,) = load([source], mesh, model.sharding_rules, dtype=dtype).trees
        self._merged = linear.program(tree, population=True)((tree,), jnp.ones((1, 1)))
        self._tokenizer = _tokenizer(directory, model, source)
        self._directory = directory
        self.max_length = max_length or _context(source.directory or directory) or _CONTEXT
        rows = _ROWS if str(batch_size).startswith("auto") else int(batch_size)
        limits = Limits(rows=rows, context=self.max_length, truncate=True)
        self._responder = Responder(model, self._tokenizer, mesh, limits)

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats, whether greedy) of the continuation of each context."""
        asked = [Likelihood(text_prompt(each.args[0]), each.args[1]) for each in requests]
        return self._answers("loglikelihood", requests, asked, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The nats of each whole text."""
        asked = [Rolling(each.args[0], form="text") for each in requests]
        return self._answers("loglikelihood_rolling", requests, asked, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A text after each context; a context that is there again gets another seed."""
        asked, before = [], Counter[str]()
        for context, arguments in (each.args for each in requests):
            seed = (zlib.crc32(context.encode()) + before[context]) % 2**31
            asked.append(generate(text_prompt(context), arguments, seed, "generate_until"))
            before[context] += 1
        return self._answers("generate_until", requests, asked, disable_tqdm)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages as one text; without their system message where the template refuses it."""
        return self._pretrained().render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template; lm_eval writes it into its results."""
        return self._pretrained().template if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """What tells caches of rendered prompts apart."""
        return self._directory.replace(os.sep, "__")

    def _pretrained(self) -> Pretrained:
        if not isinstance(self._tokenizer, Pretrained):
            raise JaxmergeError(
                "the tokenizer has no chat template",
                where=self._directory,
                expected="tokenizer=DIR of one that has; or lm_eval without --apply_chat_template",
            )
        return self._tokenizer

    def _answers(
        self, kind: str, instances: Sequence[Any], requests: Sequence[Request], quiet: bool
    ) -> list[Any]:
        """The responses in the order of the requests; long ones are asked first."""
        order = sorted(range(len(requests)), key=lambda i: -len("".join(_texts(instances[i]))))
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(order), desc=kind, disable=quiet or None) as bar:
            for start in range(0, len(order), _AT_A_TIME):
                some = order[start : start + _AT_A_TIME]
                (responses,) = self._responder(self._merged, [requests[i] for i in some])
                for i, response in zip(some, responses):
                    answers[i] = answer(kind, response)
                    self.cache_hook.add_partial(kind, instances[i].args, answers[i])
                bar.update(len(some))
        return answers


register_model("jaxmerge")(JaxmergeLM)


def _texts(instance: Any) -> list[str]:
    return [part for part in instance.args if isinstance(part, str)]


def _source(path: str, subtree: str, base: str) -> Source:
    """The checkpoint, its metadata read."""
    where = orbax.absolute(path)
    for module in FORMATS.values():
        if module.recognises(where):
            return module.describe(where.name, where, subtree, base)
    raise JaxmergeError(
        "there is no checkpoint here", where=path, expected=f"one of format {', '.join(FORMATS)}"
    )


def _model(source: Source) -> Model:
    named = dict(source.architecture)
    if named.pop("model", "") != "decoder":
        raise JaxmergeError(
            "the checkpoint does not say that it is of a decoder that there is here",
            where=source.path,
            expected="jaxmerge.save(..., architecture=model.architecture), or a Hugging Face "
            f"directory of one of {', '.join(FAMILIES)}",
            found=str(source.architecture),
        )
    return decoder(DecoderConfig.from_plain(named))


def _directory_of(source: Source) -> str:
    """Where the tokenizer of a checkpoint is: an adapter may have its own."""
    own = [] if source.format in STORED else [source.path]
    rows = int(source.architecture["vocab"])
    found = vocabularies.choose(own, [source.base] if source.base else [], rows=rows)
    return found or _beside(source.path)


def _beside(path: str) -> str:
    directory = os.path.join(os.path.dirname(path), "huggingface")
    return directory if is_in(directory) else ""


def _tokenizer(directory: str, model: Model, source: Source) -> Tokenizer:
    if directory == "bytes" or (not directory and model.vocabulary == Bytes.vocabulary):
        return Bytes()
    if not directory:
        raise JaxmergeError(
            "the checkpoint does not say which tokenizer it is for",
            where=source.path,
            expected='tokenizer=DIR of a Hugging Face directory, or tokenizer="bytes"',
        )
    return Pretrained(directory, models=[source.directory] if source.directory else [])


def _context(directory: str) -> int:
    has_config = os.path.exists(os.path.join(directory, "config.json"))
    return families.context(directory) if has_config else 0


def main() -> None:
    """The command `lm_eval`, which knows the model `jaxmerge` too."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
