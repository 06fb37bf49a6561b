"""What `tools/check_trainers.py` runs in a trainer's own environment: it knows nothing of jaxmerge.

    python tools/in_trainer.py save TRAINER DIR ...   # random models, DIR/0 and DIR/1
    python tools/in_trainer.py read TRAINER DIR ...   # DIR/merged, loaded by it

The logits of DIR/0 and of DIR/merged go to logits-0.npy and logits-merged.npy. Sizes and family are
those of DIR/base/config.json, of Hugging Face; tokens are DIR/tokens.npy.
"""

import dataclasses
import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_default_matmul_precision", "highest")


def randomised(tree: Any, seed: int) -> Any:
    """All leaves random, also those that a trainer starts at ones or zeros."""
    rng = np.random.default_rng(seed)

    def random(leaf: Any) -> Any:
        # Few different values, so that a fixture of them is small.
        return jnp.asarray(rng.integers(-4, 5, leaf.shape) / 8, leaf.dtype)

    return jax.tree.map(random, tree)


class Tunix:
    """A model of Tunix, saved and loaded by its `CheckpointManager`."""

    def __init__(self, said: dict[str, Any]):
        of = str(said["model_type"])
        family = {"llama": "llama3", "gemma3_text": "gemma3"}.get(of, of)
        self._saving = importlib.import_module("tunix.sft.checkpoint_manager")
        self._module = importlib.import_module(f"tunix.models.{family}.model")
        sizes = {
            "num_layers": said["num_hidden_layers"],
            "embed_dim": said["hidden_size"],
            "hidden_dim": said["intermediate_size"],
            "num_heads": said["num_attention_heads"],
            "num_kv_heads": said["num_key_value_heads"],
            "head_dim": said["head_dim"],
        }
        rope = {"rope_theta": 10_000, "norm_eps": said["rms_norm_eps"]}
        more = {
            "llama3": rope | {"weight_tying": said["tie_word_embeddings"]},
            "gemma3": {
                "sliding_window_size": said.get("sliding_window"),
                "global_base_frequency": 1_000_000,
                "param_dtype": jnp.float32,
            },
        }
        more = more.get(family, rope | {"use_tied_embedding": said["tie_word_embeddings"]})
        rows = {"num_embed" if family == "gemma3" else "vocab_size": said["vocab_size"]}
        self._config = self._module.ModelConfig(**sizes, **rows, **more)
        self._class = getattr(self._module, family.capitalize())

    def _model(self, seed: int) -> Any:
        from flax import nnx

        model = self._class(self._config, rngs=nnx.Rngs(seed))
        nnx.update(model, randomised(nnx.state(model), seed))
        return model

    def save(self, path: Path, seed: int) -> None:
        manager = self._saving.CheckpointManager(str(path.with_name(f"run{seed}")))
        assert manager.save(1, self._model(seed), force=True)
        manager.close()
        path.with_name(f"run{seed}").joinpath("1").rename(path)

    def logits(self, path: Path, tokens: Any) -> Any:
        from flax import nnx

        root = path.with_name(f"read-{path.name}")
        root.mkdir()
        (root / "1").symlink_to(path, target_is_directory=True)
        model = self._model(9)
        self._saving.CheckpointManager(str(root)).maybe_restore(model)
        length = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        mask = jnp.broadcast_to(
            jnp.tril(jnp.ones((length, length), bool)), (len(tokens),) + (length,) * 2
        )
        return nnx.jit(lambda model: model(tokens, positions, None, mask)[0])(model)


class Gemma:
    """A model of the gemma package, saved and loaded by `gm.ckpts`, which reads three forms."""

    def __init__(self, said: dict[str, Any], form: str = "nested"):
        gm = importlib.import_module("gemma.gm")
        kinds = gm.nn.AttentionType
        third = said["model_type"] == "gemma3_text"
        pattern = [kinds.LOCAL_SLIDING] * (5 if third else 1) + [kinds.GLOBAL]
        count = said["num_hidden_layers"]
        self._gm, self._form, self._pattern = gm, form, len(pattern)
        self._model = gm.nn.Transformer(
            config=gm.nn.config.TransformerConfig(
                num_embed=said["vocab_size"],
                embed_dim=said["hidden_size"],
                hidden_dim=said["intermediate_size"],
                num_heads=said["num_attention_heads"],
                num_kv_heads=said["num_key_value_heads"],
                head_dim=said["head_dim"],
                final_logit_softcap=None if third else 30.0,
                attn_logits_soft_cap=None if third else 50.0,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                use_qk_norm=third,
                attention_types=tuple((pattern * count)[:count]),
                sliding_window_size=said["sliding_window"],
                transpose_gating_einsum=True,
                global_base_frequency=1_000_000 if third else 10_000,
            ),
            dtype=jnp.float32,
        )

    def _shapes(self) -> Any:
        tokens = jnp.ones((1, 4), jnp.int32)
        return jax.eval_shape(self._model.init, jax.random.key(0), tokens)["params"]

    def save(self, path: Path, seed: int) -> None:
        params = randomised(self._shapes(), seed)
        forms = importlib.import_module("gemma.gm.ckpts._checkpoint")
        if self._form == "flat":
            params = forms._nested_to_flat(params)
        elif self._form == "stacked":
            params = forms._nested_to_stacked(params, self._pattern)
        self._gm.ckpts.save_params(params, path, wait_until_finished=True)

    def logits(self, path: Path, tokens: Any) -> Any:
        params = self._gm.ckpts.load_params(path)
        return jax.jit(self._model.apply)({"params": params}, tokens).logits


class MaxText:
    """A model of MaxText, saved and loaded by its `checkpointing`."""

    def __init__(self, said: dict[str, Any], *, scanned: bool = True):
        pyconfig = importlib.import_module("maxtext.configs.pyconfig")
        creation = importlib.import_module("maxtext.utils.model_creation_utils")
        of = str(said["model_type"])
        family = {"llama": "llama2", "gemma3_text": "gemma3"}.get(of, of)
        gemma = family.startswith("gemma")
        experts = said.get("num_experts", said.get("num_local_experts", 0))
        fields = {
            "decoder_block": family,
            "base_emb_dim": said["hidden_size"],
            "base_num_query_heads": said["num_attention_heads"],
            "base_num_kv_heads": said["num_key_value_heads"],
            "head_dim": said["head_dim"],
            "base_mlp_dim": said["intermediate_size"],
            "base_num_decoder_layers": said["num_hidden_layers"],
            "vocab_size": said["vocab_size"],
            "normalization_layer_epsilon": said["rms_norm_eps"],
            "logits_via_embedding": said["tie_word_embeddings"],
            "mlp_activations": ["gelu" if gemma else "silu", "linear"],
            "use_qk_norm": family.startswith("qwen3") or family == "gemma3",
            "attention_bias": family == "qwen2",
            "normalize_embedding_logits": gemma,
            "rope_max_timescale": 1_000_000 if family == "gemma3" else 10_000,
        }
        if experts:
            fields |= {"num_experts": experts, "num_experts_per_tok": said["num_experts_per_tok"]}
            fields |= {"megablox": False, "sparse_matmul": False, "norm_topk_prob": True}
            fields["base_moe_mlp_dim"] = said.get(
                "moe_intermediate_size", said["intermediate_size"]
            )
        if said.get("rope_parameters", {}).get("rope_type") == "llama3":
            fields["rope_type"] = "llama3.1"
        if gemma:
            fields |= {"use_post_attn_norm": True, "use_post_ffw_norm": True}
            fields |= {
                "sliding_window_size": said["sliding_window"],
                "local_rope_max_timescale": 10_000,
            }
        if family == "gemma2":
            fields |= {"attn_logits_soft_cap": 50.0, "final_logits_soft_cap": 30.0}
            fields["base_num_decoder_layers"] //= 2  # it counts pairs
        if family == "gemma3":
            # It scales queries by this name; all else is said here.
            fields |= {"model_name": "gemma3-4b", "override_model_config": True}
            fields["rope_linear_scaling_factor"] = 1.0
        base = Path(str(pyconfig.__file__)).with_name("base.yml")
        self._config = pyconfig.initialize(
            [None, str(base)],
            **{"run_name": "tiny", "enable_checkpointing": False, "hardware": "cpu"},
            **{"skip_jax_distributed_system": True, "dataset_type": "synthetic"},
            **{"dtype": "float32", "weight_dtype": "float32", "matmul_precision": "highest"},
            **{"attention": "dot_product", "max_target_length": 8, "per_device_batch_size": 2},
            **{"scan_layers": scanned, "enable_dropout": False, "float32_logits": True},
            **fields,
        )
        self._model = creation.from_config(self._config)

    def _shapes(self) -> Any:
        from flax import linen

        tokens = jnp.ones((2, 8), jnp.int32)
        keys = {name: jax.random.key(0) for name in ("params", "dropout", "aqt")}
        shapes = jax.eval_shape(self._model.init, keys, tokens, tokens)
        return linen.unbox({"params": shapes["params"]})

    def save(self, path: Path, seed: int) -> None:
        checkpointing = importlib.import_module("maxtext.common.checkpointing")
        params = randomised(self._shapes(), seed)
        checkpointing.save_params_to_path(str(path), params)

    def logits(self, path: Path, tokens: Any) -> Any:
        checkpointing = importlib.import_module("maxtext.common.checkpointing")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), self._shapes()
        )
        params = checkpointing.load_params_from_path(str(path / "items"), wanted, 8)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        apply = functools.partial(self._model.apply, enable_dropout=False)
        return jax.jit(apply)(params, tokens, positions, jnp.ones_like(tokens))


class Levanter:
    """A model of Levanter, in a training state that its `checkpoint` saves; it loads `model`."""

    def __init__(self, said: dict[str, Any]):
        transformers = importlib.import_module("transformers")
        self._saving = importlib.import_module("levanter.checkpoint")
        self._attention = importlib.import_module("levanter.layers.attention")
        self._haliax = importlib.import_module("haliax")
        module, name = {
            "llama": ("llama", "LlamaConfig"),
            "mistral": ("mistral", "MistralConfig"),
            "qwen2": ("qwen", "QwenConfig"),
            "qwen3": ("qwen", "Qwen3Config"),
        }[said["model_type"]]
        kind = getattr(importlib.import_module(f"levanter.models.{module}"), name)
        plain = kind.from_hf_config(transformers.AutoConfig.for_model(**said))
        # It takes these from no config of Hugging Face's, or not of all families.
        more = {"head_dim": said["head_dim"], "tie_word_embeddings": said["tie_word_embeddings"]}
        self._config = dataclasses.replace(
            plain, **more, attn_backend=self._attention.AttentionBackend.VANILLA
        )
        self._rows = self._haliax.Axis("vocab", said["vocab_size"])

    def _shapes(self) -> Any:
        equinox = importlib.import_module("equinox")
        init, key = self._config.model_type.init, jax.random.key(0)
        return equinox.filter_eval_shape(init, self._rows, self._config, key=key)

    def save(self, path: Path, seed: int) -> None:
        model = randomised(self._shapes(), seed)
        moments = jax.tree.map(jnp.zeros_like, model)
        state = {"model": model, "opt_state": {"mu": moments}, "step": jnp.int32(seed)}
        self._saving.save_checkpoint(state, seed, str(path))

    def logits(self, path: Path, tokens: Any) -> Any:
        where = {"axis_mapping": {}, "mesh": jax.make_mesh((1,), ("data",))}
        load = functools.partial(self._saving.load_checkpoint, subpath="model", **where)
        model = load(self._shapes(), str(path))
        named = self._haliax.named(tokens, ("batch", "position"))
        mask = self._attention.AttentionMask.causal()
        return self._haliax.named_jit(lambda model: model(named, attn_mask=mask))(model).array


TRAINERS = {
    "levanter": Levanter,
    "tunix": Tunix,
    "gemma": Gemma,
    "gemma_flat": functools.partial(Gemma, form="flat"),
    "gemma_stacked": functools.partial(Gemma, form="stacked"),
    "maxtext": MaxText,
    "maxtext_unscanned": functools.partial(MaxText, scanned=False),
}


def run(what: str, trainer: str, directory: Path) -> None:
    said = json.loads((directory / "base" / "config.json").read_text())
    model = TRAINERS[trainer](said)
    if what == "save":
        for seed in (0, 1):
            model.save(directory / str(seed), seed)
    tokens = jnp.asarray(np.load(directory / "tokens.npy"))
    name = "0" if what == "save" else "merged"
    found = model.logits(directory / name, tokens)
    np.save(directory / f"logits-{name}.npy", np.asarray(found, np.float32))


if __name__ == "__main__":
    for each in sys.argv[3:]:
        run(sys.argv[1], sys.argv[2], Path(each).resolve())
