"""What a sweep is: which parameters take which values, and how its runs are started."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rwkv_lab.errors import ParameterError
from rwkv_lab.spec import Spec, Text
from rwkv_lab.suggestions import unknown_name
from rwkv_lab.text import counted
from rwkv_lab.yaml_file import read_mapping

_RANGE = ("low", "high", "log")
MOST = 10_000  # runs


class SweepSpec(Spec):
    """What the runs of a sweep differ in. Exactly one of `grid`, `runs` and `random` is given."""

    title: ClassVar[str] = "a sweep"

    grid: dict[str, list[Any]] = Field({}, description="parameter: list of values; every combination is one run")
    runs: list[dict[str, Any]] = Field([], description="list of runs, each with its parameters")
    random: dict[str, Any] = Field(
        {}, description="parameter: list of values, or {low, high}, with log: true on a logarithmic scale"
    )
    draws: Annotated[int, Field(ge=1, le=MOST)] | None = Field(None, description="how many runs random draws")
    seed: int = Field(0, description="of random: the same seed draws the same runs")
    fixed: dict[str, Any] = Field({}, description="parameters that are the same in every run")
    minimise: list[Text] = Field([], description="metrics of which less is better; the first of all decides the best")
    maximise: list[Text] = Field([], description="metrics of which more is better")
    skip_refused: bool = Field(False, description="leave out combinations that the notebook refuses, and list them")


class SweepOptions(Spec):
    """How the runs of a sweep are started."""

    title: ClassVar[str] = "a sweep"

    folder: str = Field("", description="where runs and summary go; empty: reports/sweeps/ and the grid's name")
    processes: Annotated[int, Field(ge=1)] | None = Field(
        None, description="runs at the same time on this machine; None: one for two cores"
    )
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="of each run; None: the cores, shared out among the processes"
    )
    memory: Annotated[int, Field(ge=1)] | None = Field(
        None, description="bytes that all runs may take together; None: what is free"
    )
    retries: Annotated[int, Field(ge=0)] = Field(1, description="further attempts at a run whose process died")
    scheduler: str = Field(
        "", description="address of a Dask scheduler, such as tcp://10.0.0.1:8786; empty: this machine"
    )
    keep_outputs: bool = Field(True, description="keep the checkpoint that each run writes, not its report alone")
    dry_run: bool = Field(False, description="say what would be run, how much memory and disk it takes, and stop")


def read_sweep(given: str | Path | Mapping[str, Any]) -> SweepSpec:
    """The spec of a sweep from a YAML file or a mapping.

    Raises:
        ParameterError: no such file, an unknown name, or values that do not go together.
        CorruptFileError: it is not YAML.
    """
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        values = read_mapping(Path(given).expanduser(), "a sweep", "grid, runs or random, and what is fixed")
    for name in ("minimise", "maximise"):
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    spec = SweepSpec.read(values)
    _check(spec)
    return spec


def expand(spec: SweepSpec) -> list[dict[str, Any]]:
    """The parameters of every run, without those that are fixed.

    Raises:
        ParameterError: there are too many, or two are the same.
    """
    if spec.grid:
        count = math.prod(map(len, spec.grid.values()))
        if count > MOST:
            raise ParameterError(
                f"the grid has {counted(count, 'combination')}; {MOST:,} at most. Draw some of them by random."
            )
        found = [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]
    else:
        found = list(spec.runs) or list(_drawn(spec))
    for i, one in enumerate(found):
        if one in found[:i]:
            raise ParameterError(f"two runs have the same parameters: {shown(one)}. Leave one of them out.")
    return found


def swept_names(spec: SweepSpec) -> list[str]:
    """The parameters in which runs may differ."""
    return list(spec.grid or spec.random or dict.fromkeys(name for one in spec.runs for name in one))


def shown(parameters: Mapping[str, Any]) -> str:
    """Parameters in a line: `alpha=0.5, method=linear`."""
    return ", ".join(f"{name}={value_in_words(value)}" for name, value in parameters.items()) or "no parameters"


def value_in_words(value: Any) -> str:
    """A value of a parameter for a line or a cell."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if value in ("", [], {}):
        return repr(value)
    return ",".join(map(value_in_words, value)) if isinstance(value, list) else str(value)


def _check(spec: SweepSpec) -> None:
    kinds = [name for name in ("grid", "runs", "random") if getattr(spec, name)]
    if len(kinds) != 1:
        said = " and ".join(kinds) or "none of them"
        raise ParameterError(f"a sweep has one of grid, runs and random; here: {said}.")
    if bool(spec.random) != bool(spec.draws):
        raise ParameterError("random needs draws, how many runs it draws; and draws needs random.")
    empty = [name for name, values in spec.grid.items() if not values]
    if empty:
        raise ParameterError(f"grid: {empty[0]} has no values. Give one or more, or leave it out.")
    twice = sorted(set(swept_names(spec)) & set(spec.fixed))
    if twice:
        raise ParameterError(f"{twice[0]} is among what is fixed and what is swept; leave one of them out.")
    both = sorted(set(spec.minimise) & set(spec.maximise))
    if both:
        raise ParameterError(f"{both[0]} is in minimise and in maximise; leave one of them out.")
    for name, values in spec.random.items():
        _check_range(name, values)


def _check_range(name: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    if not isinstance(values, dict):
        raise ParameterError(f"random: {name} should be a list of values or a mapping with low and high: {values!r}")
    for key in values:
        if key not in _RANGE:
            raise unknown_name(f"random: {name}", str(key), _RANGE)
    low, high, log = values.get("low"), values.get("high"), values.get("log", False)
    numbers = [n for n in (low, high) if isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)]
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ParameterError(f"random: {name} needs low and high, two numbers of which low is the smaller: {values!r}")
    if not isinstance(log, bool) or (log and numbers[0] <= 0):
        raise ParameterError(f"random: {name}: log is true or false, and true only where low is above 0: {values!r}")


def _drawn(spec: SweepSpec) -> Iterator[dict[str, Any]]:
    """Runs with values drawn at random; each parameter has numbers of its own, whatever else is drawn."""
    numbers = {name: random.Random(f"{spec.seed} {name}") for name in spec.random}
    for _ in range(spec.draws or 0):
        yield {name: _draw(values, numbers[name]) for name, values in spec.random.items()}


def _draw(values: Any, numbers: random.Random) -> Any:
    if isinstance(values, list):
        return numbers.choice(values)
    low, high = values["low"], values["high"]
    if values.get("log"):
        value = math.exp(numbers.uniform(math.log(low), math.log(high)))
        return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.6g}")
    if isinstance(low, int) and isinstance(high, int):
        return numbers.randint(low, high)
    return float(f"{numbers.uniform(low, high):.6g}")
