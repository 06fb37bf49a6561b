"""What a model can be asked, and what it answers: text in, text or log-likelihoods out."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Prompt(NamedTuple):
    """What a model reads.

    Attributes:
        text: the question.
        shots: earlier questions with their answers: turns of the chat, or text before the question,
            joined as they are.
        form: `chat`: through the tokenizer's chat template; `text`: as it is, after whatever tokens
            the tokenizer begins every text with, unless they are there already; `bare`: as it is,
            after nothing; "": chat or text, as the tokenizer is set (`pool.chat`).
    """

    text: str
    shots: tuple[tuple[str, str], ...] = ()
    form: Literal["", "chat", "text", "bare"] = ""


class Sampling(NamedTuple):
    """How tokens are drawn: from softmax(logits / temperature), cut to the likeliest of mass top_p.

    Attributes:
        temperature: greater than 0.
        top_p: mass of the likeliest tokens that are kept (arXiv 1904.09751); 1: all of them.
        seed: the same seed writes the same text, whatever else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Generate(NamedTuple):
    """Write on from a prompt. The response is the text, without what ended it.

    Attributes:
        prompt: what is gone on from.
        max_new_tokens: tokens that may be written.
        until: texts that end it, wherever tokens begin and end; besides the tokenizer's own stops.
        sampling: None is greedy.
    """

    prompt: Prompt
    max_new_tokens: int
    until: tuple[str, ...] = ()
    sampling: Sampling | None = None


class Likelihood(NamedTuple):
    """How likely a continuation of a prompt is. The response is a `Likely`.

    Attributes:
        prompt: what is read before.
        continuation: what is scored.
        ended: whether the token that ends a text is scored after it.
    """

    prompt: Prompt
    continuation: str
    ended: bool = False


class Rolling(NamedTuple):
    """How likely a whole text is. The response is a `Likely`.

    A text longer than the model's context is cut into windows; each token is scored once.

    Attributes:
        text: what is scored, after the token that stands before every text.
        form: as of `Prompt`: with `text`, a start token is scored too.
    """

    text: str
    form: Literal["text", "bare"] = "bare"


class Likely(NamedTuple):
    """The log-likelihood of some tokens.

    Attributes:
        nats: sum of the natural logarithms of their probabilities; -1e9 where the model's logits
            are not finite.
        greedy: whether each was the likeliest.
        tokens: how many there are.
    """

    nats: float
    greedy: bool
    tokens: int


Request = Generate | Likelihood | Rolling
Response = str | Likely
