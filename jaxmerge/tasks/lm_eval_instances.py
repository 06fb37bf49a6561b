"""Instances of lm-evaluation-harness as requests, and responses as it wants them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.requests import (
    Generate,
    Likelihood,
    Likely,
    Prompt,
    Request,
    Response,
    Rolling,
    Sampling,
)

_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
_MAX_GEN_TOKS = 256  # where a task does not say; lm_eval's default


def text_prompt(context: str) -> Prompt:
    """A context as lm_eval gives it: one text, special tokens and all."""
    return Prompt(context, form="text")


def chat_prompt(context: str) -> Prompt:
    """A context that `messages` made: turns of a chat, the system's before the first question."""
    if not context:
        return Prompt("", form="text")  # what a choice is worth without a question
    turns = json.loads(context)
    system = turns.pop(0)["content"].rstrip() + "\n\n" if turns[0]["role"] == "system" else ""
    turns[0]["content"] = system + turns[0]["content"]
    texts = [turn["content"] for turn in turns]
    return Prompt(texts[-1], tuple(zip(texts[:-1:2], texts[1::2])), form="chat")


def messages(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """The chat template that lm_eval is given: the turns, for `chat_prompt` to read."""
    return json.dumps(turns)


def requests_of(
    instance: Any, prompt: Callable[[str], Prompt], where: str = "", seed: int = 0
) -> Sequence[Request]:
    """What is asked about an instance: as many requests as it has repeats.

    Args:
        instance: of `lm_eval.api.instance`.
        prompt: `text_prompt` or `chat_prompt`.
        where: whose it is, for error messages.
        seed: added to those of sampled texts, which are the CRC-32 of the context and what follows.

    Raises:
        JaxmergeError: a text is asked for in a way that there is not here.
    """
    count = instance.repeats or 1
    if instance.request_type == "loglikelihood":
        context, continuation = instance.args[:2]
        return [Likelihood(prompt(context), continuation) for _ in range(count)]
    if instance.request_type == "loglikelihood_rolling":
        return [Rolling(instance.args[0], form="text") for _ in range(count)]
    context, arguments = instance.args[:2]
    first = zlib.crc32(context.encode(), seed)
    return [generate(prompt(context), arguments, (first + i) % 2**31, where) for i in range(count)]


def generate(
    prompt: Prompt, arguments: Mapping[str, Any], seed: int = 0, where: str = ""
) -> Generate:
    """The request that lm_eval's `generation_kwargs` mean.

    Args:
        prompt: what is gone on from.
        arguments: `until`, `max_gen_toks` (256 where it is missing), `do_sample`, `temperature`
            and `top_p`; greedy unless sampling or a temperature above 0 is asked for.
        seed: of the sampling.
        where: whose they are, for error messages.

    Raises:
        JaxmergeError: there is another argument that would make a difference, or sampling is asked
            for at temperature 0.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), _MAX_GEN_TOKS))
    sampled = given["do_sample"]
    temperature = float(given.get("temperature", 1.0 if sampled else 0.0))
    unknown = [name for name in given if name not in (*_KNOWN, *(() if sampled else ("top_k",)))]
    if unknown or (sampled and not temperature):
        raise JaxmergeError(
            "texts can't be written in this way",
            where=f"{where}, generation_kwargs",
            expected=f"no others than {', '.join(_KNOWN)}; sampling at a temperature above 0",
            found=", ".join(f"{name}={given[name]!r}" for name in unknown or ["temperature"]),
        )
    sampling = Sampling(temperature, float(given.get("top_p", 1.0)), seed) if sampled else None
    until = tuple(stop for stop in given["until"] if stop)
    return Generate(prompt, given["max_gen_toks"], until, sampling)


def answer(request_type: str, response: Response) -> Any:
    """A response as lm_eval wants it: a text, (nats, greedy), or of a whole text the nats."""
    if not isinstance(response, Likely):
        return response
    if request_type == "loglikelihood_rolling":
        return response.nats
    return response.nats, response.greedy
