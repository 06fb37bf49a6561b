"""What `adapter_config.json` of PEFT says of an adapter: heeded, known to be silent, or refused."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from jaxmerge.errors import JaxmergeError
from jaxmerge.textfiles import read_json

CONFIG = "adapter_config.json"

# Fields that are heeded here, or by what the tensors are.
_HEEDED = frozenset(
    """
    peft_type r lora_alpha use_rslora rank_pattern alpha_pattern base_model_name_or_path
    use_dora init_lora_weights fan_in_fan_out
    """.split()
)
# Fields that say how the adapter was made and not what it means. Any other must be off: null,
# false or empty.
_SILENT = frozenset(
    """
    target_modules exclude_modules modules_to_save bias layers_to_transform layers_pattern
    task_type auto_mapping peft_version revision inference_mode lora_dropout megatron_core
    loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
    ensure_weight_tying
    """.split()
)
# How factors began, in `init_lora_weights`. From these the base stays as it is ...
_PLAIN = ("gaussian", "eva", "orthogonal", "mica")
# ... and from these peft takes what the first factors make out of the base, as `residual` in
# `lora.py` does. Other starts change the base too, by what is not stored: draws (pissa_niter_N),
# activations (corda), gradients (lora_ga), rounding to few bits (loftq).
RESIDUAL = ("pissa", "olora")
_CONVERT = (
    "an adapter as peft converts it: model.save_pretrained(NEW, path_initial_model_for_weight_"
    "conversion=INITIAL), INITIAL being the adapter as it was saved before the training"
)
_MERGED = "or the whole model, by peft: model.merge_and_unload().save_pretrained(NEW)"
# Models whose layers are transformers' Conv1D, which stores a weight as [input, output].
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


class AdapterConfig(NamedTuple):
    """An adapter's config, all of whose fields are understood.

    Attributes:
        file: where it stands.
        base: directory or name of the base; "" where it does not say.
        rank: of the factors; of modules that match a key of `ranks`, its value.
        alpha: alike, with `alphas`.
        rank_stabilised: whether the product is scaled by alpha / sqrt(rank), not alpha / rank.
        magnitudes: whether it is DoRA: rows have a length of their own.
        start: one of `RESIDUAL`, where the base is changed; else "".
        transposed: whether it was trained on weights that are stored as [input, output].
    """

    file: str
    base: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    magnitudes: bool
    start: str
    transposed: bool

    def scale(self, module: str, rank: int) -> float:
        """alpha / r of a module; alpha / sqrt(r) if it is rank-stabilised (arXiv 2312.03732)."""
        alpha = _of_module(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return int(_of_module(self.ranks, module, self.rank))


def read(path: epath.Path) -> AdapterConfig:
    """Reads the config in an adapter's directory.

    Raises:
        JaxmergeError: it can't be read; the adapter is of another kind; a field is not understood
            and set; ranks or alphas are no numbers; a pattern is no regular expression; the factors
            began in a way that changed the base by what is not stored.
    """
    file = path / CONFIG
    config = read_json(file)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise JaxmergeError(
            "the adapter is of another kind",
            where=f"{file}, peft_type",
            expected=f"LORA; {_MERGED}",
            found=str(kind)[:80],
        )
    known = _HEEDED | _SILENT
    others = {key: value for key, value in config.items() if value and key not in known}
    if others:
        raise JaxmergeError(
            "the adapter is more than low-rank factors: "
            + ", ".join(f"{key} is {str(value)[:80]}" for key, value in others.items()),
            where=str(file),
            expected=f"LoRA or DoRA, with modules_to_save and biases; {_MERGED}",
        )
    _check_switches(config, file)
    _check_numbers(config, file)
    return AdapterConfig(
        file=str(file),
        base=str(config.get("base_model_name_or_path") or ""),
        rank=config["r"],
        alpha=config["lora_alpha"],
        ranks=config.get("rank_pattern") or {},
        alphas=config.get("alpha_pattern") or {},
        rank_stabilised=bool(config.get("use_rslora")),
        magnitudes=bool(config.get("use_dora")),
        start=_start(config.get("init_lora_weights", True), file),
        transposed=bool(config.get("fan_in_fan_out")),
    )


def stored_transposed(config: AdapterConfig, model_type: str, known: bool) -> bool:
    """Whether the base stores its weights as [input, output], which its model decides.

    peft sets `fan_in_fan_out` right for each layer, whatever the config says.

    Args:
        config: of the adapter.
        model_type: of the base.
        known: whether there is a decoder for it, none of which stores them so.

    Raises:
        JaxmergeError: the config says so, of a model of which it is not known.
    """
    of_model = model_type in _CONV1D
    if config.transposed and not of_model and not known:
        raise JaxmergeError(
            f"fan_in_fan_out is set, and how models of type {model_type!r} store weights is not "
            "known",
            where=config.file,
            expected=f"fan_in_fan_out false where the base's layers are nn.Linear; {_MERGED}",
        )
    return of_model


def _start(init: Any, file: epath.Path) -> str:
    """What `init_lora_weights` says was taken out of the base."""
    name = init.lower() if isinstance(init, str) else init
    if name is None or isinstance(name, bool) or name in _PLAIN:
        return ""
    if name in RESIDUAL:
        return name
    raise JaxmergeError(
        "the adapter began with factors that were taken out of the base, which is not W + s B A, "
        "and what was taken can't be had from what is stored",
        where=f"{file}, init_lora_weights",
        expected=f"{_CONVERT}; {_MERGED}",
        found=str(init)[:80],
    )


def _check_switches(config: Mapping[str, Any], file: epath.Path) -> None:
    """Raises unless what turns on other formulas is true or false."""
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise JaxmergeError(
                f"{key} is neither true nor false",
                where=str(file),
                expected="true or false",
                found=str(config[key])[:80],
            )


def _check_numbers(config: Mapping[str, Any], file: epath.Path) -> None:
    """Raises unless ranks are whole numbers and alphas finite ones, and patterns can be matched."""
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    found = {"rank_pattern": ranks, "alpha_pattern": alphas}
    found |= {key: config.get(key) for key in ("r", "lora_alpha")}
    sound = isinstance(ranks, dict) and isinstance(alphas, dict)
    if not sound or not (
        all(type(rank) is int and rank > 0 for rank in (found["r"], *ranks.values()))
        and all(_is_number(alpha) for alpha in (found["lora_alpha"], *alphas.values()))
    ):
        raise JaxmergeError(
            "ranks or alphas are no numbers",
            where=str(file),
            expected="ranks that are whole numbers above 0, and finite alphas",
            found=str(found),
        )
    for pattern in (*ranks, *alphas):
        try:
            _matching(pattern)
        except (OverflowError, RecursionError, re.error) as error:
            raise JaxmergeError(
                "a key of rank_pattern or alpha_pattern is no regular expression",
                where=str(file),
                expected="a module's name or its end, or a regular expression of such",
                found=f"{pattern!r}: {error}",
            ) from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _of_module(
    pattern: Mapping[str, int | float], module: str, default: int | float
) -> int | float:
    """What the first key that matches says, as in peft."""
    matches = (value for key, value in pattern.items() if _matching(key).fullmatch(module))
    return next(matches, default)


def _matching(key: str) -> re.Pattern[str]:
    """What the names of the modules are that a key of a pattern is for."""
    return re.compile(rf"(.*\.)?({key})")
