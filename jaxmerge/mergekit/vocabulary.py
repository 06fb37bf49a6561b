"""The vocabulary that a document asks for, by `tokens` of the YAML too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxmerge.checkpoints.vocabulary import Rule, Vocabulary, Words, combined, read
from jaxmerge.mergekit.document import Reference, Token, Tokenizer
from jaxmerge.mergekit.models import Member


def vocabulary(
    choice: Tokenizer, members: Mapping[Reference, Member], base: Reference, rows: Sequence[int]
) -> Vocabulary:
    """The vocabulary that a document asks for.

    Args:
        choice: `tokenizer` or `tokenizer_source` of the YAML.
        members: the models.
        base: the one whose tokenizer and rows come first.
        rows: of the embeddings of each model.

    Raises:
        JaxmergeError: a tokenizer can't be read, or a token is not where the YAML says.
    """
    words = [read(member.directory, count) for member, count in zip(members.values(), rows)]
    order = list(members)
    for token, rule in choice.tokens.items():
        if not rule.kind and not any(token in each.ids for each in words):
            raise choice.node.error(
                f"no model has the token {token}",
                expected=f"tokens: {{{token}: {{source: ...}}}}, a model's row or kind: zero",
            )
    return combined(
        words,
        rows,
        order.index(base),
        source=order.index(choice.source if isinstance(choice.source, Reference) else base),
        union=choice.source == "union",
        more=choice.tokens,
        rules={
            token: _rule(rule, token, words, order, rows)
            for token, rule in choice.tokens.items()
            if rule.kind
        },
        multiple=choice.multiple or 1,
    )


def _rule(
    rule: Token,
    text: str,
    words: Sequence[Words],
    order: Sequence[Reference],
    rows: Sequence[int],
) -> Rule:
    if rule.kind == "zero":
        return Rule((), rule.force)
    assert rule.model
    k = order.index(rule.model)
    wanted = rule.token if rule.kind == "model_token" else text
    row = wanted if isinstance(wanted, int) else words[k].ids.get(wanted, -1)
    if not 0 <= row < rows[k]:
        raise rule.node.error(
            f"{rule.model} has no such token", expected=f"a row below {rows[k]}", found=str(wanted)
        )
    return Rule(((k, row),), rule.force)
