"""Whether a merge still speaks: its likelihood of what its members write, beside their own.

Members write a few greedy texts. A language model that is near its members finds these about as
likely as the members find each other's; a merge that fell apart finds them unlikely, whatever it
writes itself. Nothing is compared with a text of the world, so the check knows no language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxmerge.tasks.requests import Generate, Likelihood, Likely, Prompt, Request, Response

# Nats a token by which a merge may be below the worst of its members: e^2, so a seventh of the
# probability of each token. See docs/decisions/speech.md for where merges that work and merges that
# do not were found.
MARGIN = 2.0
PROMPTS = ("The", "In the beginning", "Question: What is", "1, 2, 3,")
MEMBERS = 2  # that write, those of the largest weights
TOKENS = 16  # of a text, at most


class Verdict(NamedTuple):
    """What was found; nats a token.

    Attributes:
        merge: of the members' texts, by the merge.
        members: of each other's texts, by the members, in order.
        text: what the merge writes on from the first prompt.
        prompt: that one.
    """

    merge: float
    members: tuple[float, ...]
    text: str
    prompt: str

    @property
    def speaks(self) -> bool:
        """Whether the merge is a language model about as its members are."""
        return self.merge >= min(self.members) - MARGIN

    @property
    def warning(self) -> str:
        """What is said of a merge that does not; "": it does."""
        if self.speaks:
            return ""
        return (
            "the merge may be no language model any more: it gives its members' own texts "
            f"{self.merge:.2f} nats a token, where they give each other's "
            f"{min(self.members):.2f} at the least. After {self.prompt!r} it writes "
            f"{self.text[:120]!r}. Check the weights (they mostly sum to 1), and that the "
            "checkpoints come from the same base"
        )


def listen(
    ask: Callable[[Sequence[Request]], Sequence[Sequence[Response]]],
    prompts: Sequence[Prompt],
    tokens: int = TOKENS,
) -> Verdict | None:
    """Has the members write, and all models judge what was written.

    Args:
        ask: the responses of each model to requests: of the members, at least two, and at last of
            the merge.
        prompts: that texts go on from.
        tokens: of a text, at most.

    Returns:
        None: members write nothing that could be judged.
    """
    *written, own = ask([Generate(prompt, tokens) for prompt in prompts])
    texts = [
        (author, prompt, str(text))
        for author, of_member in enumerate(written)
        for prompt, text in zip(prompts, of_member)
        if text
    ]
    if {author for author, _, _ in texts} != {*range(len(written))}:
        return None
    judged = ask([Likelihood(prompt, text) for _, prompt, text in texts])
    authors = [author for author, _, _ in texts]
    *members, merge = (
        _nats_a_token([each for each, by in zip(of_model, authors) if by != number])
        for number, of_model in enumerate(judged)
    )
    return Verdict(merge, tuple(members), str(own[0]), prompts[0].text)


def _nats_a_token(likely: Sequence[Response]) -> float:
    found = [each for each in likely if isinstance(each, Likely)]
    return sum(each.nats for each in found) / sum(each.tokens for each in found)
