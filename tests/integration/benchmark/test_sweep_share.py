"""Whose jobs are whose, and what a job's process is told."""

import pytest

from anomalib_ot.integration.benchmark.launcher import SweepShare, job_environment
from anomalib_ot.integration.checks.errors import InputError

ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({}, 0, 1),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 2, 4),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 3, 4),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, 2, 3),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 3, 6),
    ],
)
def test_the_launcher_is_asked(environment, rank, world):
    share = SweepShare.of_environment(environment)
    assert (share.rank, share.world) == (rank, world)


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}]
)
def test_a_place_that_is_none_is_refused(environment):
    with pytest.raises(InputError):
        SweepShare.of_environment(environment)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_job_is_somebodys_and_nobody_elses(world):
    parts = [SweepShare(rank, world).part(range(5)) for rank in range(world)]
    assert sorted(job for part in parts for job in part) == list(range(5))


def test_a_start_of_all_processes_has_a_name():
    assert SweepShare.of_environment({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "a"}).run == "a"
    assert SweepShare.of_environment({"SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "9"}).run == "7"
    assert SweepShare.of_environment({}).run == ""


def test_threads_are_divided():
    assert SweepShare().threads(4, {"OMP_NUM_THREADS": "8"}) == 2
    assert SweepShare().threads(4, {"OMP_NUM_THREADS": "1"}) == 1
    assert SweepShare(local_world=10**6).threads(1, {}) == 1
    assert SweepShare().threads(1, {}) >= 1


def test_a_job_does_not_know_of_the_launcher():
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "a", "SLURM_NTASKS": "2"}
    made = job_environment({**told, "PATH": "/bin", "OMP_NUM_THREADS": "8"}, threads=2, device="3")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    assert made == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "3", **threads}
