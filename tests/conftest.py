"""Every test runs on 8 CPU devices, with shapes checked and with warnings as errors."""

import gc
import os
import shutil
import sys
import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# Array annotations of the whole package are checked on every call.
install_import_hook("jaxmerge", "beartype.beartype")


CACHE = "JAXMERGE_TESTS_CACHE"  # a directory that all workers, and what they start, find
# Directories and modules that compare runs with runs, or models and scores with what others make of
# them, or look at what is said: a third of their time went into optimising programs that run for
# milliseconds. All others, also several processes that find what one finds, and the tools on real
# models, have the programs of users.
QUICKLY_COMPILED = {
    *("evaluation", "experiment", "models", "report", "search", "sweep"),
    *("bench_strategies_test", "check_device_test", "climb_test", "lm_eval_model_test"),
    *("lost_test", "python_guide_test"),
}


def pytest_configure(config):
    """Makes the compilation cache of all commands that tests start; see `command.Command`."""
    if not hasattr(config, "workerinput"):
        os.environ[CACHE] = tempfile.mkdtemp()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(CACHE))


def pytest_collection_modifyitems(items):
    """Workers take a file at a time. Those with slow tests come first, so that none begins last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="session")
def late_reads():
    """Passes over the reads that Orbax gives up after a damaged file, which end in a later test."""
    hook = sys.unraisablehook

    def unless_late(unraisable):
        late = (
            "Event loop is closed",
            "Encountered error while reading array",
            "coroutine 'Store._get_array_metadatas' was never awaited",
        )
        if not str(unraisable.exc_value).startswith(late):
            hook(unraisable)

    sys.unraisablehook = unless_late
    yield
    sys.unraisablehook = hook


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module(request):
    """Lets compiled programs go: each holds maps of memory, of which a process may have 65,530.

    The compiler crashes when there are no more, which it did after 1,400 tests.
    """
    quickly = not QUICKLY_COMPILED.isdisjoint((request.path.parent.name, request.path.stem))
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))  # for what tests start
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilations():
    """A function that says how many programs XLA has compiled since the test began."""
    count = 0

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)
