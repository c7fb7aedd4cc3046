"""Small problems are solved on one thread, and nobody's number of threads is changed."""

import subprocess
import sys

import pytest
import torch

from anomalib_ot.ot import Support, scaling, sinkhorn, sparse_sinkhorn, threads
from anomalib_ot.ot.threads import threads_for


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    counts, solve = [], scaling.solve

    def watched(*args, **kwargs):
        counts.append(torch.get_num_threads())
        return solve(*args, **kwargs)

    monkeypatch.setattr(scaling, "solve", watched)
    return counts


@pytest.mark.usefixtures("two_threads")
def test_small_problems_are_solved_on_one_thread(seen):
    cost = torch.rand(20, 30)
    sinkhorn(cost, epsilon=0.1)
    pairs = torch.ones(20, 30).nonzero()
    sparse_sinkhorn(Support.of_pairs(pairs[:, 0], pairs[:, 1], cost.flatten(), (20, 30)), epsilon=0.1)
    assert seen == [1, 1]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_large_problems_keep_their_threads(seen, monkeypatch):
    monkeypatch.setattr(threads, "MOST_ON_ONE_THREAD", 599)
    sinkhorn(torch.rand(20, 30), epsilon=0.1)
    assert seen == [2]
    with threads_for(torch.rand(1, device="meta")):  # other devices do, too
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_threads_come_back_after_an_error():
    with pytest.raises(ValueError, match="at least 0: clamp it"):
        sinkhorn(torch.rand(2, 2), torch.tensor([-1.0, 1.0]), epsilon=0.1)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_gradients_of_small_problems_take_one_thread(monkeypatch):
    counts = []
    cost = torch.rand(20, 30).requires_grad_()
    plan = sinkhorn(cost, epsilon=0.1).plan
    set_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: (counts.append(count), set_threads(count)))
    plan.square().sum().backward()
    assert counts == [1, 2]


@pytest.mark.slow
def test_solvers_in_several_threads_leave_the_number_as_it_was():
    code = """
import torch
from concurrent.futures import ThreadPoolExecutor
from anomalib_ot.ot import sinkhorn
torch.set_num_threads(2)
cost = torch.rand(60, 50)
def solve(_):
    for _ in range(30):
        sinkhorn(cost, epsilon=0.05, gradient="none")
for _ in range(5):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(solve, range(4)))
assert torch.get_num_threads() == 2
with ThreadPoolExecutor(1) as pool:
    assert pool.submit(torch.get_num_threads).result() == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_graph_that_is_recorded_changes_no_threads(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("a traced graph set the number of threads"))
    traced = torch.jit.trace(lambda cost: sinkhorn(cost, epsilon=0.1, num_iters=3).plan, torch.rand(4, 5))
    assert traced(torch.rand(4, 5)).shape == (4, 5)
