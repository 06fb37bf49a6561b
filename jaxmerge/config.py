"""Every field of a config, its unit and its reason; and the check of a config before a run.

A config file is Python with a function `get_config()` that returns `jaxmerge.config.default()` with
fields set. Only the entry points know of configs: everything below them takes plain arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import ml_collections

from jaxmerge import tasks
from jaxmerge.checkpoints import aligned, export, lora_export, pool, steps
from jaxmerge.errors import JaxmergeError, check_choice, check_least
from jaxmerge.evaluation import evaluator
from jaxmerge.merge import groups, methods, schedules, searched
from jaxmerge.report import tensorboard
from jaxmerge.rundir import flat
from jaxmerge.scores.objective import Objective, define
from jaxmerge.search import baselines, gradient, parts, preferences, space, surrogate

# A locked ml_collections.ConfigDict; its fields, made at run time, are unknown to type checkers.
Config = Any


# Longer than a screen: it is the list of all fields, without logic, where users look them up.
def default() -> Config:
    """The config with every field at its default; locked, so that a misspelt field is refused."""
    config: Config = ml_collections.ConfigDict()

    config.seed = 0  # of the search and the random baseline; tasks have their own

    config.pool = ml_collections.ConfigDict()
    # Checkpoints or patterns, such as ("pools/quickstart/*",), of Orbax, zarr or .npz, of Hugging
    # Face (safetensors), or PEFT adapters (LoRA, DoRA); at least two that are alike.
    # --mode=evaluate takes any.
    config.pool.checkpoints = ()
    # Of one run: "start:stop:every", both ends included, such as "1000:5000:500", which are all
    # there; "1000:5000", all that are there between; ends may be left out. pool.checkpoints is then
    # the one directory that the steps lie in.
    config.pool.steps = ""
    # Hugging Face directory that adapters are added to, and whose tokenizer and configuration are
    # used; "": that which the checkpoints bring themselves. Of Orbax checkpoints it may be another,
    # which methods take the differences from.
    config.pool.base = ""
    # item: of an Orbax step with several, the one that holds the parameters, such as "items";
    # subtree: where in a checkpoint of Orbax, zarr or .npz they are, such as "params". "": what is
    # clear by itself is taken, what is not is refused; see jaxmerge.checkpoints.parameters.
    config.pool.item = ""
    config.pool.subtree = ""
    # "default" or "llama3.1", as in MaxText's config: of Llama models of MaxText whose rope is not
    # scaled. Nothing in the checkpoint says it.
    config.pool.rope_type = ""
    # "" reads the architecture that is saved with the checkpoint; "decoder" takes it from
    # model_args; "module:function" calls function(**model_args), which returns a
    # jaxmerge.models.model.Model, or apply(params, tokens_BxT) -> logits_BxTxV.
    config.pool.model = ""
    config.pool.model_args = ml_collections.ConfigDict()
    # "bytes"; a Hugging Face directory; "module:function", which returns a Tokenizer; "": that of
    # the base or of the first Hugging Face checkpoint, unless adapters bring one that extends it;
    # or bytes where the model has 256 tokens. A directory's is exported too.
    config.pool.tokenizer = ""
    # Of members whose tokens differ: "base", all have the tokens of the base, or else of the first
    # checkpoint; "union", the others' tokens come after those. Rows of the embeddings are matched
    # by token. "": such members are refused.
    config.pool.vocabulary = ""
    config.pool.chat = False  # put each prompt into the tokenizer's chat template
    config.pool.chat_template = ""  # which, of several; "": `default`, or the only one
    config.pool.system = ""  # system message of the chat template; "": the template's own
    # Where the pool lives: "device"; "host", pinned memory; "disk", read once per step, so that
    # evaluate.candidates_per_step says how often; "auto", the first of them that fits. The scores
    # are the same.
    config.pool.residency = "device"
    # How it is held on the device: "exact"; or "int8" or "int4": the first checkpoint exact, of the
    # others the differences from it in so many bits. Scores are then of merges of what is held,
    # and what is exported is merged from the exact checkpoints on disk.
    config.pool.storage = "exact"
    config.pool.dtype = ""  # cast on load, such as "bfloat16"; "": as stored

    config.mesh = ml_collections.ConfigDict()
    # Sizes of the axes; their product is the number of devices used. One may be -1: all the rest.
    config.mesh.pop = -1  # candidates at a time, each on its own devices
    config.mesh.data = 1  # examples of one candidate are spread over these
    config.mesh.fsdp = 1  # parameters are spread over fsdp x tensor
    config.mesh.tensor = 1
    config.mesh.cpu_devices = 0  # > 0: run on the CPU, split into this many devices

    config.evaluate = ml_collections.ConfigDict()
    # Merged together, two such steps exist. 0: mesh.pop on the CPU with the pool on the device,
    # else as many as fit, up to a generation. What 0 stands for, here and in the next two, is said
    # at the start, stands in config.json, and is kept on resume.
    config.evaluate.candidates_per_step = 0
    # Rows that go through a model at a time, at most; 0: one for each 128 of batch_tokens.
    config.evaluate.batch_size = 64
    # Tokens that do, padding included, at most; 0: as many as fit, up to 8192 (CPU) or 32768.
    config.evaluate.batch_tokens = 8192
    config.evaluate.context = 0  # tokens that the model can hold; 0: what its configuration says
    config.evaluate.too_long = "refuse"  # a prompt that does not fit; "truncate": its end is read
    config.evaluate.vmap_candidates = 0  # side by side on a device; 0: 1 on CPU, else all of a step

    config.objective = ml_collections.ConfigDict()
    config.objective.tasks = ()  # names: of jaxmerge.tasks.TASKS, or of fields of `tasks` below
    # What is maximised: mean; weighted (mean, by `weights`); worst (the minimum over tasks);
    # normalised (mean gain over the pool's best, in units of the pool's range on the task);
    # chebyshev (distance to the pool's best of each task, negated). See jaxmerge.scores.objective.
    config.objective.aggregate = "mean"
    # One positive number per task, normalised to sum 1: for weighted; chebyshev may have them.
    config.objective.weights = ()
    config.objective.search_examples = 192  # of each task; they steer the search
    config.objective.test_examples = 1000  # of each task; they are what is reported
    config.heldout = ()  # tasks that the search never sees, scored for winner and best individual

    # Arguments of tasks by name, such as tasks.sums = {"builder": "my_tasks:sums", "digits": 3}, or
    # tasks.sums = {"builder": "reasoning_gym", "dataset": "chain_sum"}. A builder is called with
    # them and with search and test (numbers of examples).
    config.tasks = ml_collections.ConfigDict()

    config.merge = ml_collections.ConfigDict()
    # For --mode=merge: one number per checkpoint, in the order of pool.json (patterns are sorted);
    # or several such tuples, for as many merges in one pass over the checkpoints. They are never
    # scaled: if they do not sum to 1, the merge is no average, and a warning says so.
    config.merge.weights = ()
    # Instead of weights: mean, linear or sqrt, of checkpoints from the oldest to the newest, such
    # as pool.steps; see jaxmerge.merge.schedules.
    config.merge.schedule = ""
    # A name of jaxmerge.merge.methods.METHODS, such as "ties"; what is merged are differences from
    # pool.base where it takes a base. Single checkpoints and baselines are weighted sums still.
    config.merge.method = "linear"
    # Its numbers but the weights, such as merge.genes = {"density": 0.5}: one, or where checkpoints
    # may differ a tuple. --mode=merge takes the default of the table for what is missing; a search
    # looks for it, but for choices and tolerances. Draws depend on `seed`.
    config.merge.genes = ml_collections.ConfigDict()
    config.merge.variant = "paper"  # where papers and mergekit differ; or "mergekit"
    # Instead of weights and genes: a JSON file with those of one merge. It is the results.json of a
    # search, whose winner is merged, or a table; see "Weights by group" in docs/merging.md.
    config.merge.weights_file = ""
    config.merge.point = 0  # of the front of that search, from 1; 0: the winner
    config.merge.names = ()  # of several merges, each written to merged/NAME; (): 0, 1, 2, ...
    config.merge.memory_bytes = 2**28  # of the blocks that are merged at a time
    # For a search whose pool leaves no room for one merged model: a layer's weights are merged when
    # the model comes to it, in each pass, so for each token written: K times the bytes are read.
    # The scores are the same. The pool is on the device, and the model the package's decoder, or
    # one that says its `layers`. Exports in several formats take a whole merged model.
    config.merge.rematerialise = False

    config.space = ml_collections.ConfigDict()
    # See jaxmerge.search.space: softmax, abs, signed or free; window, of the steps of one run, of
    # which length and curve are searched; "auto": signed for sums along gradients, else softmax.
    config.space.constraint = "auto"
    # What has weights of its own: "model", one weight a checkpoint; "layer"; a number of groups of
    # layers, such as "4"; "kind", each leaf, all its layers together; "leaf", each leaf and layer;
    # "patterns". See jaxmerge.merge.groups. "auto": "leaf" for search.strategy = "gradient", and
    # "model" for all others, which want few numbers, and for a window.
    config.space.granularity = "auto"
    # Regular expressions; a leaf is in the group of the first that is found in its name.
    config.space.patterns = ()
    # Numbers of merge.method that each checkpoint has its own of, such as ("density",).
    config.space.per_checkpoint = ()
    config.space.shrink = 0.0  # how far groups are pulled to their mean genotype; 1: all the way
    config.space.bounds = (-8.0, 8.0)  # genotypes are clipped to these, in units of that module

    config.search = ml_collections.ConfigDict()
    # "gradient" climbs a soft score, "surrogate" fits quadratics, see jaxmerge.search; any name in
    # evosax.algorithms: "CMA_ES" is the method of arXiv 2412.04144; or a sampler of Optuna, such as
    # "optuna:TPESampler" or, for a front, "optuna:NSGAIISampler".
    config.search.strategy = "gradient"
    # "gradient": before the strategy, which then starts where gradients ended; "": nothing.
    config.search.warm_start = ""
    # Where it starts: "uniform", or as search.init says; a name in `baselines`, of those that come
    # before the search; "best": the single checkpoint or baseline that is best by then. Checkpoints
    # and baselines are mixed with a little of the uniform merge. "auto": "best" along gradients of
    # weighted sums without a start of their own, and "uniform" for all others.
    config.search.start = "auto"
    # Of "gradient": an optimiser of optax by name, its learning rate in genotype units, how that
    # falls (cosine, linear or constant), steps, examples of each task in a step, and steps between
    # two true scores: of the iterate, and of the mean of iterates. Derivatives are taken at a draw
    # around the genotype, with this standard deviation (smoothing); 0: at the genotype itself.
    config.search.optimizer = "adam"
    config.search.learning_rate = 0.15
    config.search.schedule = "cosine"
    config.search.steps = 60
    config.search.minibatch = 32
    config.search.score_every = 10
    config.search.smoothing = 0.5
    # Of all other strategies: candidates per generation, 0: 4 + floor(3 ln D), D = G K; and
    # evaluations, of which what is left below a whole generation is not used.
    config.search.population = 0
    config.search.budget = 200
    # Tokens of the search, one that goes forward and backward counted as three; 0: any number. The
    # search ends by this or by its budget (of "gradient": its steps), whichever is reached first:
    # before the generation that would pass it. See "Budgets in tokens" in docs/searching.md.
    config.search.budget_tokens = 0
    # Genotype to start from, one value per checkpoint, or the two of a window; (): uniform merge.
    config.search.init = ()
    # Of all but "gradient" the standard deviation of the first generation, in genotype units, and
    # fields of the strategy's Params, or arguments of the sampler.
    config.search.sigma = 0.5
    config.search.params = ml_collections.ConfigDict()
    # Share of each task's search examples that a generation sees, such as 0.125: each sees another
    # part, and parts are alike in difficulty, as the single checkpoints' scores have it; 1: all.
    config.search.subset = 1.0
    config.search.finalists = 3  # with a subset: scored on all examples, for the decision
    config.search.save_seconds = 60.0  # between saves of the strategy's state

    # Of a front: merges that trade the tasks off, each tested; see jaxmerge.experiment.front.
    config.front = ml_collections.ConfigDict()
    config.front.points = 0  # how many, at most; 0: none, but 8 for --mode=front
    # Of search.strategy = "gradient", which then climbs along preferences between the tasks: steps
    # along each, 0: none; and how tasks are weighed, a sum (weighted) or the one that lags
    # (chebyshev).
    config.front.steps = 20
    config.front.scalarisation = "weighted"
    # Search examples of each task, where objective.search_examples is less, to which fronts fit
    # themselves; 0: no more than for one winner.
    config.front.search_examples = 384
    # Every point is written, to WORKDIR/points/1, 2 and so on, and not the winner alone.
    config.front.export = False

    # Names of jaxmerge.search.baselines.BASELINES, where "lm-cocktail" and "metagpt" are too.
    config.baselines = ("uniform", "best-per-task", "greedy", "random", "paper")

    # What is made of the winner after it was tested; see jaxmerge.experiment.analyses. Two more are
    # always there, without evaluations: the share of weights that are not 0, weight against score.
    config.analyses = ml_collections.ConfigDict()
    config.analyses.leave_one_out = True  # at most K evaluations of the test examples
    # At most one evaluation of the test examples, held-out ones too, for each pair of tasks.
    config.analyses.transfer = True
    # Numbers of the best checkpoints to search over, such as (2, 4): each a search of its own.
    config.analyses.pool_sizes = ()
    config.analyses.pool_size_budget = 0  # evaluations of each of these; 0: search.budget

    config.export = ml_collections.ConfigDict()
    # What is written to WORKDIR/merged; huggingface where there is such a base or checkpoint. Also
    # npz and zarr, maxtext, maxtext_unscanned, gemma, tunix and levanter, see docs/trainers.md; and
    # lora: adapters of one base as one adapter.
    config.export.formats = ("orbax", "huggingface")
    config.export.dtype = ""  # of the Hugging Face weights: "bfloat16"; "": as they were evaluated
    # Of that adapter: the best of this rank; 0: as high as the merge takes, which is exact.
    config.export.lora_rank = 0
    # Memory of the check that a merge still speaks, see jaxmerge.evaluation.speech: of one that was
    # searched, it takes none; merges with given weights whose models are larger are not asked. 0:
    # none is asked.
    config.export.speech_bytes = 2**32
    config.export.shard_bytes = 5_000_000_000  # of a Hugging Face weights file, at most

    config.report = ml_collections.ConfigDict()
    # Between refreshes of report.html while the run goes on; more where writing it takes more than
    # 1% of that. 0: it is written at the end alone.
    config.report.every_seconds = 60.0
    config.tensorboard = False  # event files in WORKDIR/tensorboard; needs jaxmerge[tensorboard]

    # XLA's compiled programs are kept here between runs; "": they are not.
    config.compilation_cache = "~/.cache/jaxmerge/xla"

    config.lock()
    for free in (config.pool.model_args, config.tasks, config.search.params, config.merge.genes):
        free.unlock()
    return config


def reference() -> str:
    """The fields of a config with their defaults and comments, as they stand in `default`."""
    lines = [line.strip() for line in inspect.getsource(default).splitlines()]
    fields = [line for line in lines if re.match(r"#|config\.\S+ = ", line)]
    sections = [name for name, of in default().to_dict().items() if isinstance(of, dict) and of]
    shown = [line for line in fields if not re.match(rf"config\.({'|'.join(sections)}) = ", line)]
    told = "\n  ".join(["Fields of a config:", *shown])
    return told.replace("ml_collections.ConfigDict()", "{}")


def check(config: Config) -> None:
    """Refuses what can be known to be wrong before anything is read.

    Raises:
        JaxmergeError: names the field.
    """
    check_pool(config)
    if config.merge.method != "linear":
        searched.check(config.merge.method, dict(config.merge.genes), fields(config))
    check_evaluation(config)
    if config.tensorboard:
        tensorboard.package()
    if config.merge.rematerialise:
        pool.check_rematerialise(config.pool.residency, config.pool.storage)
    space.check(constraint(config), config.space.bounds, config.space.shrink)
    if config.space.constraint == space.WINDOW:
        space.check_window(fields(config))
    groups.check(granularity(config), config.space.patterns)
    lora_export.check_settings(config.export.formats, constraint=constraint(config))
    gradient.check(settings(config))
    check_least("search.budget_tokens", config.search.budget_tokens, 0)
    check_choice("search.warm_start", config.search.warm_start, ("", gradient.NAME))
    if gradient.NAME in (config.search.strategy, config.search.warm_start):
        gradient.check_fields(fields(config))
    parts.check(config.search.subset, config.search.finalists)
    preferences.check(fields(config))
    surrogate.check_fields(fields(config))
    baselines.check(config.baselines, config.pool.base)
    baselines.check_start(fields(config))


def granularity(config: Config) -> str:
    """What has weights of its own; "auto" is what was measured best for the strategy."""
    if config.space.granularity == "auto":
        along = config.search.strategy == gradient.NAME
        return "leaf" if along and config.space.constraint != space.WINDOW else "model"
    return config.space.granularity


def constraint(config: Config) -> str:
    """How genotypes become weights; "auto" is what was measured best for the strategy."""
    if config.space.constraint == "auto":
        along = config.search.strategy == gradient.NAME
        return "signed" if along and config.merge.method == "linear" else "softmax"
    return config.space.constraint


def search_examples(config: Config) -> int:
    """How many of each task steer the search, which may be for a front."""
    least = config.front.search_examples if config.front.points else 0
    return max(config.objective.search_examples, least)


def settings(config: Config) -> gradient.Settings:
    """How an optimiser goes, as the config says."""
    names = ("optimizer", "learning_rate", "schedule", "steps", "score_every", "smoothing")
    return gradient.Settings(*(config.search[name] for name in names))


def check_evaluation(config: Config) -> None:
    """The part of `check` that an evaluation of checkpoints needs too."""
    objective(config)
    builders = {name: config.tasks[name].get("builder", "") for name in config.tasks}
    sizes = search_examples(config), config.objective.test_examples
    tasks.check(config.objective.tasks, config.heldout, builders, *sizes)
    pool.check(config.pool.residency, config.pool.storage)
    evaluator.check(**{name: config.evaluate[name] for name in evaluator.FIELDS})


def check_pool(config: Config) -> None:
    """The part of `check` that a merge with given weights needs too."""
    export.check(config.export.formats, config.export.dtype, config.export.lora_rank)
    check_choice("merge.method", config.merge.method, tuple(methods.METHODS))
    check_choice("merge.variant", config.merge.variant, methods.VARIANTS)
    if config.merge.method == "linear" and config.merge.genes:
        raise JaxmergeError(
            "a linear merge takes the weights as they are",
            where="merge.genes",
            expected="merge.weights alone; or another merge.method",
            found=", ".join(config.merge.genes),
        )
    if config.merge.weights_file and (config.merge.weights or config.merge.genes):
        raise JaxmergeError(
            "these stand in the file",
            where="merge.weights" if config.merge.weights else "merge.genes",
            expected="none of them, or no merge.weights_file",
        )
    schedules.check(config.merge.schedule, config.merge.weights, config.merge.weights_file)
    aligned.check(config.pool.vocabulary, config.pool.tokenizer or config.pool.model)
    lora_export.check_settings(config.export.formats, method=config.merge.method)
    if not config.pool.checkpoints:
        raise JaxmergeError(
            "no checkpoints are named",
            where="pool.checkpoints",
            expected="directories of checkpoints, or patterns such as ('models/*',)",
        )
    if config.pool.steps:
        steps.check(config.pool.steps, config.pool.checkpoints)


def objective(config: Config) -> Objective:
    """What the config maximises.

    Raises:
        JaxmergeError: names the field, as `jaxmerge.scores.objective.define` does.
    """
    fields = config.objective
    return define(fields.tasks, [float(weight) for weight in fields.weights], fields.aggregate)


def fields(config: Config) -> dict[str, Any]:
    """The fields by their full names, such as `search.budget`."""
    return flat(plain(config))


def plain(config: Config) -> dict[str, Any]:
    """The config as dicts, lists, strings and numbers."""
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value
