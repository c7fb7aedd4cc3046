"""Which part of a sweep is this process's, and what its jobs get of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from anomalib_ot.integration.checks.errors import InputError

Item = TypeVar("Item")

# What launchers tell their processes. A job is a process on its own: with these Lightning would wait for the others.
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
LAUNCHER_NAMES += ("GROUP_RANK", "GROUP_WORLD_SIZE")
LAUNCHER_PREFIXES = ("ROLE_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "PMIX_", "JSM_", "LSB_")
RUN_NAMES = ("TORCHELASTIC_RUN_ID", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID")
THREAD_NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class SweepShare:
    """The place of this process among those that work on a sweep.

    Example:
        >>> SweepShare.of_environment({"RANK": "1", "WORLD_SIZE": "2"}).part(["a", "b", "c", "d", "e"])
        ['b', 'd']
    """

    rank: int = 0  # number of this process, from 0
    world: int = 1  # number of processes on all machines
    local_rank: int = 0  # number of this process on its machine
    local_world: int = 1  # number of processes on this machine
    run: str = ""  # what the launcher calls this start of all processes; empty where it says nothing

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> SweepShare:
        """Ask the launcher: RANK and WORLD_SIZE (torchrun and others), else srun's and a job array's variables.

        Raises:
            InputError: If the variables are no numbers or do not fit together.
        """
        run = next((environment[name] for name in RUN_NAMES if environment.get(name)), "")
        if "RANK" in environment or "WORLD_SIZE" in environment:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            return cls(*_numbers(environment, names, (None, None, 0, 1)), run)
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        rank, world, local = _numbers(environment, names, (0, 1, 0))
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP")
        number, count, first, step = _numbers(environment, names, (0, 1, 0, 1))
        return cls((number - first) // max(step, 1) * world + rank, count * world, local, run=run)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            msg = f"the launcher says that this is process {self.rank} of {self.world}; expected 0 to {self.world - 1}"
            raise InputError(msg)

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Take every world-th item, beginning at the rank."""
        return list(items[self.rank :: self.world])

    def threads(self, processes: int, environment: Mapping[str, str]) -> int:
        """Divide the threads of this process (OMP_NUM_THREADS, else its cores) among jobs that run at the same time."""
        given = environment.get("OMP_NUM_THREADS", "")
        if given.isdecimal() and int(given) > 0:
            return max(1, int(given) // processes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // (processes * self.local_world))


def job_environment(environment: Mapping[str, str], threads: int, device: str | None = None) -> dict[str, str]:
    """Make the environment of a job: without what the launcher said, with its threads, and its CUDA device."""
    kept = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }
    kept |= dict.fromkeys(THREAD_NAMES, str(threads))
    return kept if device is None else kept | {"CUDA_VISIBLE_DEVICES": device}


def _numbers(environment: Mapping[str, str], names: Sequence[str], defaults: Sequence[int | None]) -> list[int]:
    numbers = []
    for name, default in zip(names, defaults, strict=True):
        text = environment.get(name, "" if default is None else str(default))
        if not text.strip().isdecimal():
            raise InputError(
                f"{name} is '{text}'; a launcher sets it to a whole number from 0, together with {', '.join(names[:2])}"
            )
        numbers.append(int(text))
    return numbers
