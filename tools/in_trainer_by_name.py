"""What `tools/check_by_name.py` runs in a trainer's own environment: it knows nothing of jaxmerge.

    python tools/in_trainer_by_name.py save TRAINER DIR          # random models, DIR/0 and DIR/1
    python tools/in_trainer_by_name.py read TRAINER DIR 1,0 ...  # the merge DIR/1,0, loaded by it

Reading ends with 1 where a merge is not what its weights say.
"""

import functools
import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_default_matmul_precision", "highest")

STEPS = 4  # of training, before a model is saved


class Kauldron:
    """Runs of Kauldron's `Trainer`, which go on from a merge by `SimpleCheckpointLoader`."""

    def __init__(self):
        from flax import linen

        self._kd = importlib.import_module("kauldron.kd")

        class Net(linen.Module):
            def __kontext_keys__(self) -> dict[str, str]:
                return {"x": "batch.x"}

            @linen.compact
            def __call__(self, x: Any) -> Any:
                x = linen.LayerNorm()(linen.Dense(7)(x))
                # Of another dtype, so that what is rounded is seen too.
                return linen.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32)(linen.relu(x))

        rng = np.random.default_rng(0)
        sizes = {"x": 5, "y": 3}
        self._model = Net()
        self._data = {n: rng.normal(size=(64, size)).astype("f") for n, size in sizes.items()}

    def _run(self, directory: Path, seed: int, steps: int, **more: Any) -> Any:
        import optax

        kd = self._kd
        data = kd.data.InMemoryPipeline(loader=lambda: self._data, batch_size=8, seed=seed)
        return kd.train.Trainer(
            seed=seed,
            workdir=directory,
            train_ds=data,
            model=self._model,
            num_train_steps=steps,
            train_losses={"l2": kd.losses.L2(preds="preds", targets="batch.y")},
            optimizer=optax.adam(1e-2),
            checkpointer=kd.ckpts.Checkpointer(save_interval_steps=STEPS),
            writer=None,
            **more,
        )

    def save(self, path: Path, seed: int) -> None:
        directory = path.with_name(f"run{seed}")
        self._run(directory, seed, STEPS).train()
        (directory / "checkpoints" / f"ckpt_{STEPS}").rename(path)

    def _loader(self, path: Path) -> Any:
        """A work directory that has the checkpoint as its only step."""
        checkpoints = path.with_name(f"read-{path.name}") / "checkpoints"
        if not checkpoints.exists():
            checkpoints.mkdir(parents=True)
            (checkpoints / "ckpt_0").symlink_to(path, target_is_directory=True)
        return self._kd.ckpts.SimpleCheckpointLoader(workdir=checkpoints.parent)

    def load(self, path: Path) -> tuple[Any, Any]:
        run = self._run(path.with_name("unused"), 9, 1, init_transform=self._loader(path))
        params = run.init_state().params
        return params, self.outputs(params)

    def outputs(self, params: Any) -> Any:
        return jax.jit(self._model.apply)({"params": params}, self._data["x"])

    def go_on(self, path: Path) -> str:
        directory = path.with_name(f"on-{path.name}")
        state, _ = self._run(directory, 9, 1, init_transform=self._loader(path)).train()
        assert np.isfinite(self.outputs(state.params)).all()
        return f"trained to step {int(state.step)}"


class EasyDeL:
    """A Llama of EasyDeL, in a training state with Adam's moments."""

    def __init__(self):
        self._ed = importlib.import_module("easydel")
        self._tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (2, 8)))
        self._dtypes = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}

    def _model(self, seed: int) -> Any:
        from flax import nnx

        config = self._ed.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            attn_mechanism="vanilla",
        )
        return self._ed.LlamaForCausalLM(config=config, rngs=nnx.Rngs(seed), **self._dtypes)

    def save(self, path: Path, seed: int) -> None:
        import optax
        from flax import nnx

        model, rng = self._model(seed), np.random.default_rng(seed)
        state = nnx.state(model, nnx.Param)
        # All leaves, also those that start at ones.
        random = jax.tree.map(lambda of: jnp.asarray(rng.normal(0, 0.1, of.shape), of.dtype), state)
        nnx.update(model, random)
        make = functools.partial(self._ed.EasyDeLState.create, tx=optax.adam(1e-3))
        make(model=model, step=seed + 5, init_opt_state=True).save_state(str(path))

    def _logits(self, model: Any) -> Any:
        with model.mesh:
            return model(input_ids=self._tokens).logits

    def load(self, path: Path) -> tuple[Any, Any]:
        from flax import nnx

        loader = self._ed.AutoEasyDeLModelForCausalLM
        model = loader.from_pretrained(str(path), **self._dtypes)
        return nnx.state(model, nnx.Param).to_pure_dict(), self._logits(model)

    def outputs(self, params: Any) -> Any:
        from flax import nnx

        model = self._model(9)
        state = nnx.state(model, nnx.Param)
        state.replace_by_pure_dict(params)
        nnx.update(model, state)
        return self._logits(model)

    def go_on(self, path: Path) -> str:
        state = self._ed.EasyDeLState.load_state(str(path), **self._dtypes)
        return f"a state of step {int(state.step)}"


TRAINERS = {"kauldron": Kauldron, "easydel": EasyDeL}


def weighted(members: list[Any], weights: list[float]) -> Any:
    """The sum in float32, rounded to the dtype of each leaf once."""

    def leaf(*of: Any) -> Any:
        terms = [
            np.float32(weight) * np.asarray(each, np.float32)
            for weight, each in zip(weights, of, strict=True)
        ]
        return jnp.asarray(functools.reduce(np.add, terms), of[0].dtype)

    return jax.tree.map(leaf, *members)


def check(trainer: Any, directory: Path, name: str) -> bool:
    """Whether a merge, as the trainer loads it, is the weighted sum."""
    members = [trainer.load(directory / str(each))[0] for each in (0, 1)]
    # Nor is either what a model starts from, if its loader does anything.
    assert not any(
        jax.tree.leaves(jax.tree.map(lambda *of: bool((of[0] == of[1]).all()), *members))
    )
    found, outputs = trainer.load(directory / name)
    wanted = weighted(members, [float(each) for each in name.split(",")])
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    leaves = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    same = sum(
        one.dtype == other.dtype and np.asarray(one).tobytes() == np.asarray(other).tobytes()
        for one, other in leaves
    )
    outputs, expected = (np.asarray(each, "f") for each in (outputs, trainer.outputs(wanted)))
    difference = np.abs(outputs - expected).max()
    dtypes = " and ".join(sorted({str(one.dtype) for one, _ in leaves}))
    said = f"{same} of {len(leaves)} leaves in {dtypes} the same bit for bit"
    differ = f"outputs differ by {difference} of {np.abs(expected).max():.2f}"
    print(f"{name}: {said}, {differ}; {trainer.go_on(directory / name)}", flush=True)
    return same == len(leaves) and difference == 0


def main(what: str, name: str, directory: Path, merges: list[str]) -> int:
    packages = ("jax", "flax", "orbax-checkpoint", name)
    versions = [f"{each} {importlib.metadata.version(each)}" for each in packages]
    print(f"{what}: Python {platform.python_version()}, {', '.join(versions)}", flush=True)
    trainer = TRAINERS[name]()
    if what == "save":
        for seed in (0, 1):
            trainer.save(directory / str(seed), seed)
        return 0
    same = [check(trainer, directory, each) for each in merges]
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), sys.argv[4:]))
