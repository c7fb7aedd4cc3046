"""The fixed-length form leaves torch: torch.export, ONNX, OpenVINO."""

import math

import openvino
import pytest
import torch
from torch import Tensor, nn

from anomalib_ot.ot import append_slack, cosine_cost, sinkhorn, uniform


class Grouping(nn.Module):
    """Soft clustering with slack, as a post-processor does it: hard, relaxed and free columns, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        cost = cosine_cost(x, self.targets.expand(x.shape[0], -1, -1))
        b = uniform((1, 4)).expand(x.shape[0], 4)
        cost, b = append_slack(cost, b, side="target", slack_cost=0.8, slack_mass=1.0)
        columns = torch.ones_like(b, dtype=torch.bool)
        rho_b = torch.tensor([math.inf, math.inf, 1.0, 0.1, 0.0])
        transport = sinkhorn(cost, None, b, epsilon=0.05, rho_b=rho_b, mask=(valid, columns), num_iters=4)
        return transport.plan, transport.barycenters(x)


def inputs(batch, n):
    x = torch.randn(batch, n, 6, generator=torch.Generator().manual_seed(n))
    return x, torch.arange(n).expand(batch, n) < n - 2


@pytest.mark.slow
def test_openvino_gives_what_torch_gives(tmp_path):
    model = Grouping().eval()
    path = tmp_path / "grouping.onnx"
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("points", min=3)}
    program = torch.onnx.export(model, inputs(2, 9), dynamo=True, dynamic_shapes=(dims, dims), verbose=False)
    program.save(path)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch, n in ((2, 9), (1, 9), (3, 25)):
        x, valid = inputs(batch, n)
        with torch.no_grad():
            plan, barycenters = model(x, valid)
        exported = compiled((x.numpy(), valid.numpy()))
        assert (torch.from_numpy(exported[0]) - plan).abs().sum((-2, -1)).max() < 1e-5
        torch.testing.assert_close(torch.from_numpy(exported[1]), barycenters, rtol=1e-4, atol=1e-4)
        assert (exported[0][~valid.numpy()] == 0).all()


@pytest.mark.slow
def test_torch_export_under_grad_and_autocast():
    model = Grouping()
    x, valid = inputs(2, 9)
    expected = model(x, valid)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        program = torch.export.export(model, (x, valid))
    torch.testing.assert_close(program.module()(x, valid)[0], expected)
