"""The jobs of a benchmark: the same files as `anomalib benchmark`, checked, with the same grids."""

import difflib
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from anomalib_ot.integration.checks.errors import InputError

ACCELERATORS = ("cpu", "cuda")
CATEGORY = "data.init_args.category"  # names data even where it is the only one


@dataclass(frozen=True)
class SweepJob:
    """One training and test: a model on data, with a seed."""

    config: dict  # `accelerator`, `seed`, `model` and `data`, as Anomalib's benchmark would get them

    @cached_property
    def flat(self) -> dict[str, object]:
        """The configuration in one level with dotted names, which tells jobs apart; texts as `${...}` are resolved."""
        from anomalib.utils.config import flatten_dict
        from omegaconf import OmegaConf

        return flatten_dict(OmegaConf.to_container(OmegaConf.create(self.config), resolve=True))

    @cached_property
    def key(self) -> str:
        """A short name of the job, the same on every machine: a digest of `flat`."""
        return hashlib.sha256(json.dumps(self.flat, sort_keys=True, default=str).encode()).hexdigest()[:12]


class SweepLabels:
    """Short names of jobs: the classes, and as few arguments as tell the jobs of one class apart.

    Models are told apart by all their arguments; data only where one model meets them, so that a model which needs
    another batch size is compared on the same data. Categories are always named, and several accelerators, too.
    """

    def __init__(self, jobs: Sequence[SweepJob]) -> None:
        groups: dict[tuple[str, str], list[SweepJob]] = defaultdict(list)
        for job in jobs:
            for part in ("model", "data"):
                groups[part, _class_of(job, part)].append(job)
        self._accelerators = {job.config["accelerator"] for job in jobs}
        self._telling = {(part, kind): _telling(group, part) for (part, kind), group in groups.items()}

    def of(self, job: SweepJob, part: str) -> str:
        """Name a job's `part`, "model" or "data"."""
        kind = _class_of(job, part)
        names = self._telling[part, kind] or ([CATEGORY] if part == "data" else [])
        names = [name for name in names if name in job.flat]
        if part == "data" and len(names) == 1:
            return str(job.flat[names[0]])
        where = [f"({job.config['accelerator']})"] if part == "model" and len(self._accelerators) > 1 else []
        return " ".join([kind, *(f"{name.rpartition('.')[2]}={job.flat[name]}" for name in names), *where])


def read_configs(paths: Sequence[str | Path]) -> list[dict]:
    """Read and check benchmark files, YAML with `accelerator` and `benchmark`; an `InputError` if one is wrong."""
    return [_read(Path(path)) for path in paths]


def sweep_jobs(configs: Sequence[dict]) -> list[SweepJob]:
    """Expand grids as Anomalib's benchmark does; a job that comes twice is one job.

    Raises:
        InputError: If there is no job, or a model or data set of a grid is not described as one.
    """
    from anomalib.pipelines.components.utils import get_iterator_from_grid_dict

    jobs: dict[str, SweepJob] = {}
    for config in configs:
        for accelerator in _as_list(config["accelerator"]):
            for single in get_iterator_from_grid_dict(config["benchmark"]):
                for part in ("model", "data"):
                    _check_class(single.get(part), part)
                job = SweepJob({"accelerator": accelerator, **single})
                jobs.setdefault(job.key, job)
    if not jobs:
        raise InputError("the configuration has no jobs: a grid in it is empty; put at least one value into every grid")
    return list(jobs.values())


def _class_of(job: SweepJob, part: str) -> str:
    return str(job.flat.get(f"{part}.class_path", job.flat.get(part))).rpartition(".")[2]


def _telling(jobs: Sequence[SweepJob], part: str) -> list[str]:
    """Choose arguments, one by one, each the one that tells most jobs apart, the first of several."""
    names = list(dict.fromkeys(name for job in jobs for name in job.flat if name.startswith(f"{part}.init_args.")))

    def told(chosen: Sequence[str]) -> int:
        return len({(_rest(job, part), *(str(job.flat.get(name)) for name in chosen)) for job in jobs})

    chosen: list[str] = []
    while told(chosen) < told(names):
        chosen.append(max(names, key=lambda name: told([*chosen, name])))
    return chosen


def _rest(job: SweepJob, part: str) -> str:
    """What a job has besides its data; nothing besides a model."""
    if part == "model":
        return ""
    return json.dumps({name: value for name, value in job.flat.items() if not name.startswith("data.")}, default=str)


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _read(path: Path) -> dict:
    if not path.is_file():
        there = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = (
            f"did you mean '{path.parent / near[0]}'?"
            if near
            else "give a YAML file, such as those in configs/benchmark"
        )
        raise InputError(f"--config is '{path}', which is no file: {hint}")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config '{path}' is not YAML: {' '.join(str(error).split())}") from error
    _check_keys(config, ("accelerator", "benchmark"), f"--config '{path}'")
    for accelerator in _as_list(config["accelerator"]):
        if accelerator not in ACCELERATORS:
            msg = f"accelerator in '{path}' is {accelerator!r}; expected one or a list of {', '.join(ACCELERATORS)}"
            raise InputError(msg)
    _check_keys(config["benchmark"], ("seed", "model", "data"), f"benchmark in '{path}'")
    return config


def _check_keys(found: object, expected: Sequence[str], where: str) -> None:
    """Refuse what has other keys than expected, or lacks one."""
    if not isinstance(found, dict):
        raise InputError(f"{where} is {type(found).__name__}; expected a mapping with {', '.join(expected)}")
    for name in found:
        if name not in expected:
            near = difflib.get_close_matches(str(name), expected, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(expected)}"
            raise InputError(f"{where} has '{name}', which it does not know: {hint}")
    for name in expected:
        if name not in found:
            raise InputError(f"{where} has no '{name}'; it needs {', '.join(expected)}")


def _check_class(found: object, part: str) -> None:
    """Refuse a model or data that is neither a name nor a class with arguments."""
    if part == "model" and isinstance(found, str):
        return
    is_class = isinstance(found, dict) and isinstance(found.get("class_path"), str)
    if not is_class or found.keys() - {"class_path", "init_args"}:
        came = sorted(found) if isinstance(found, dict) else repr(found)
        raise InputError(
            f"benchmark.{part} is {came}; expected class_path (a name) and init_args (its arguments), or a grid of such"
        )
