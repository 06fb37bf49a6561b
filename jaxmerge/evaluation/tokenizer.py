"""Text to token ids and back."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxmerge.errors import JaxmergeError
from jaxmerge.tasks.requests import Prompt
from jaxmerge.textfiles import read_json


@runtime_checkable
class Tokenizer(Protocol):
    """What evaluation needs of a tokenizer."""

    vocabulary: int  # ids are below it
    stops: tuple[int, ...]  # the ids that end a generated text; the first is what training writes
    prefix: int  # the id before the first token of a text that has nothing before it

    def prompt(self, prompt: Prompt) -> list[int]:
        """What a model reads before it answers: with a start token, a chat template, ..."""
        ...

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        """A prompt, which may be empty, and a continuation of it, whose tokens are scored."""
        ...

    def encode(self, text: str) -> list[int]:
        """A text that goes on from a prompt."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def pieces(self, first: bool = False) -> list[bytes]:
        """What each id below `vocabulary` stands for in UTF-8, special tokens too.

        Args:
            first: at the beginning of a text, where some tokenizers drop a space.
        """
        ...


class Bytes:
    """One token per UTF-8 byte; a newline ends a generated text. There is no chat template.

    >>> Bytes().encode("é")
    [195, 169]
    >>> Bytes().decode([104, 105])
    'hi'
    """

    vocabulary = 256
    stops: tuple[int, ...] = (10,)
    prefix = 10

    def prompt(self, prompt: Prompt) -> list[int]:
        return self.encode(plain(prompt))

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        return self.prompt(prompt), self.encode(continuation)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def pieces(self, first: bool = False) -> list[bytes]:
        return [bytes([byte]) for byte in range(256)]


def plain(prompt: Prompt) -> str:
    """A prompt as one text: questions and answers one after the other."""
    return "".join(question + answer for question, answer in prompt.shots) + prompt.text


class _Refused(Exception):
    """A chat template raised something; says what."""


class Pretrained:
    """The tokenizer of a Hugging Face directory, through `transformers.AutoTokenizer`.

    A text ends with the end-of-sequence token, with one that generation_config.json names, or else
    config.json, and with the special token that ends an answer in the chat template. No code of the
    directory is run, and chat templates render in Jinja's sandbox.

    Args:
        directory: holds tokenizer.json or another file that AutoTokenizer knows.
        chat: whether prompts are messages of a user, put into the chat template, or plain text.
        system: the system message before each; "": whatever the template does without one.
        models: directories of models whose configs say which tokens end a text, besides this one.
        template: the name of one of several chat templates; "": `default`, or the only one.

    Raises:
        JaxmergeError: there is no tokenizer, no chat template, or no token that ends a text; the
            template has a mistake, or refuses the system message.
    """

    def __init__(
        self,
        directory: str,
        *,
        chat: bool = False,
        system: str = "",
        template: str = "",
        models: Sequence[str] = (),
    ):
        directory = os.path.expanduser(directory)
        self._tokenizer = _load(directory)
        self._chat, self._system, self._directory = chat, system, directory
        self._named = template
        if chat:
            self._in_template(self._messages(Prompt("?")), tokenize=False)
        ends = _ids(self._tokenizer.eos_token_id)
        ends += [i for each in dict.fromkeys([directory, *models]) for i in _ends_of_model(each)]
        ends += self._end_of_turn()
        if not ends:
            raise JaxmergeError(
                "nothing says which token ends a text",
                where=directory,
                expected="eos_token in tokenizer_config.json, or eos_token_id in "
                "generation_config.json or config.json",
            )
        self.stops = tuple(dict.fromkeys(ends))
        starts = _ids(self._tokenizer.bos_token_id)
        self.prefix = (starts or ends)[0]
        self._begins = self._tokenizer.convert_ids_to_tokens(self.prefix)
        self.vocabulary = max(self._tokenizer.get_vocab().values(), default=0) + 1
        if self.vocabulary > 2**24:
            raise JaxmergeError(
                f"a token has the number {self.vocabulary - 1}, for which no embedding has a row",
                where=directory,
                expected=f"numbers below {2**24}",
            )

    def prompt(self, prompt: Prompt) -> list[int]:
        if self._is_chat(prompt):
            return self._in_template(self._messages(prompt), tokenize=True, return_dict=False)
        text = plain(prompt)
        if prompt.form == "bare" or (self._begins and text.startswith(self._begins)):
            return self.encode(text)
        tokens = self._tokenizer(text).input_ids
        # Some tokenizers end every text; a prompt goes on.
        return tokens[:-1] if tokens and tokens[-1] in self.stops else tokens

    def pair(self, prompt: Prompt, continuation: str) -> tuple[list[int], list[int]]:
        if self._is_chat(prompt):
            return self.prompt(prompt), self.encode(continuation)
        # Together, as the text would be read; a space between them begins the continuation.
        text = plain(prompt)
        spaces = len(text) - len(text.rstrip())
        read = self.prompt(Prompt(text[: len(text) - spaces], form=prompt.form or "text"))
        whole = self.prompt(Prompt(text + continuation, form=prompt.form or "text"))
        return read, whole[len(read) :]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def pieces(self, first: bool = False) -> list[bytes]:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        by_byte = backend is not None and "ByteLevel" in str(backend.decoder)
        added = self._tokenizer.get_added_vocab()  # as they are; a special one is in no text
        pieces = [b""] * self.vocabulary
        for token, index in self._tokenizer.get_vocab().items():
            encode = str.encode if token in added else _byte_level if by_byte else _metaspace
            pieces[index] = encode(token)
        if not first:
            return pieces
        spaced = [i for i, piece in enumerate(pieces) if re.match(rb" \w", piece)]
        dropped = spaced and not self.decode(spaced[:1]).startswith(" ")
        return [piece.removeprefix(b" ") for piece in pieces] if dropped else pieces

    @property
    def template(self) -> str:
        """The chat template; "" where there is none.

        Raises:
            JaxmergeError: there are several, and it is not known which is meant.
        """
        found = self._tokenizer.chat_template or ""
        if not isinstance(found, dict):
            return found
        named = self._named or "default"
        if named not in found:
            raise JaxmergeError(
                "there are several chat templates, and "
                + (f"none is called {named}" if self._named else "none is the default"),
                where=self._directory,
                expected=f"pool.chat_template: one of {', '.join(sorted(found))}",
                found=f"pool.chat_template = {self._named!r}",
            )
        return found[named]

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages of any roles in the chat template, as text.

        A template that refuses the system's message gets the others.

        Args:
            messages: each a `role` and a `content`.
            add_generation_prompt: whether the beginning of an answer follows; else the last
                message is left open, to be gone on from.

        Raises:
            JaxmergeError: there is no chat template, or it refuses the messages.
        """
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self._rendered(messages, **options)
        except _Refused as refused:
            without = [message for message in messages if message["role"] != "system"]
            if len(without) == len(messages):
                raise self._refusal(refused) from refused
        try:
            return self._rendered(without, **options)
        except _Refused as refused:
            raise self._refusal(refused) from refused

    def _in_template(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """Messages in the chat template, where an answer begins.

        Raises:
            JaxmergeError: the template refuses them, or the system's message, or has a mistake.
        """
        options["add_generation_prompt"] = True
        try:
            return self._rendered(messages, **options)
        except _Refused as refused:
            if not self._system:
                raise self._refusal(refused) from refused
            try:
                self._rendered(messages[1:], **options)
            except _Refused as without:
                raise self._refusal(without) from without
            raise JaxmergeError(
                "the chat template refuses a system message",
                where=self._directory,
                expected='pool.system = ""; what it should say can stand in the prompts of tasks',
                found=f"pool.system = {self._system!r}, of which the template says: {refused}",
            ) from refused

    def _rendered(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        self._is_chat(Prompt("", form="chat"))
        template = self.template
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), chat_template=template, **options
            )
        except Exception as error:  # a template is a program of others: it can raise anything
            number = getattr(error, "lineno", None)  # of a mistake of syntax
            line = f", line {number}" if number else ""
            raise _Refused(f"{type(error).__name__}{line}: {error}") from error

    def _refusal(self, refused: _Refused) -> JaxmergeError:
        return JaxmergeError(
            "the chat template can't be filled in",
            where=self._directory,
            expected="a template without mistakes that takes these turns; or pool.chat = False",
            found=str(refused),
        )

    def _end_of_turn(self) -> list[int]:
        """The special token with which the chat template ends an answer; [] where there is none.

        A template that fails here says of no end; that it fails is said once it is needed.
        """
        if not self._tokenizer.chat_template:
            return []
        answer = "jaxmerge"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        try:
            text = self._rendered(turns, tokenize=False)
        except (_Refused, JaxmergeError):
            return []
        _, found, rest = text.rpartition(answer)
        first = self.encode(rest.strip())[:1] if found else []
        return [each for each in first if each in self._tokenizer.all_special_ids]

    def _is_chat(self, prompt: Prompt) -> bool:
        chat = prompt.form == "chat" or (not prompt.form and self._chat)
        if chat and not self._tokenizer.chat_template:
            raise JaxmergeError(
                "the tokenizer has no chat template",
                where=self._directory,
                expected="pool.chat = False, and no task of form chat; or pool.tokenizer: a "
                "directory whose tokenizer has one",
            )
        return chat

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        turns = [("system", self._system)] if self._system else []
        for question, answer in prompt.shots:
            turns += [("user", question), ("assistant", answer)]
        turns.append(("user", prompt.text))
        return [{"role": role, "content": content} for role, content in turns]


def _byte_level(token: str) -> bytes:
    """The bytes of a token of GPT-2's alphabet, in which every byte is a printable character."""
    known = _byte_of_character()
    return b"".join(bytes([known[c]]) if c in known else c.encode() for c in token)


def _metaspace(token: str) -> bytes:
    """The bytes of a token of SentencePiece, which writes spaces as U+2581 and bytes as <0x0A>."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {
        chr(256 + i): byte for i, byte in enumerate(hidden)
    }


def is_in(directory: str) -> bool:
    """Whether a directory has the files of a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    return any(Path(directory, name).exists() for name in names)


def tokens(directory: str) -> dict[int, str]:
    """The tokens of a directory's tokenizer, by their ids."""
    return {index: token for token, index in _load(directory).get_vocab().items()}


def _load(directory: str) -> Any:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's
            raise
        raise JaxmergeError(
            "the tokenizer can't be read",
            where=directory,
            expected="the files that AutoTokenizer reads, whole; or pool.tokenizer: another "
            "directory, or bytes",
            found=str(error).split("\n")[0],
        ) from error


def _ids(found: int | list[int] | None) -> list[int]:
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _ends_of_model(directory: str) -> list[int]:
    """The tokens that end a text by generation_config.json, or else by config.json.

    So transformers has it; of models for pictures and text, the part for text says it.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(directory, name)
        said = read_json(file) if file.exists() else {}
        if not isinstance(said, dict):
            raise JaxmergeError(
                "this is no JSON object",
                where=str(file),
                expected="the file as transformers writes it",
                found=str(said)[:80],
            )
        inner = said.get("text_config")
        for each in (said, inner if isinstance(inner, dict) else {}):
            ends = each.get("eos_token_id")
            if ends is None or ends == []:
                continue
            if not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
                raise JaxmergeError(
                    "eos_token_id is neither a number nor a list of some",
                    where=str(file),
                    expected="a token's number, such as 2, or a list of them, such as [2, 7]",
                    found=str(ends)[:80],
                )
            return _ids(ends)
    return []
