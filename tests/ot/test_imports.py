import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_core_loads_torch_and_nothing_else():
    forbidden = "{'anomalib', 'lightning', 'torchvision', 'timm', 'ot', 'faiss', 'sklearn', 'openvino'}"
    script = f"import sys, anomalib_ot.ot; print(sorted({forbidden} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_change_only_on_purpose():
    import anomalib_ot.ot as core

    assert sorted(core.__all__) == [
        "SparseTransport",
        "Support",
        "Transport",
        "append_slack",
        "cosine_cost",
        "euclidean_cost",
        "fused_cost",
        "normalize",
        "position_cost",
        "sinkhorn",
        "sparse_sinkhorn",
        "squared_euclidean_cost",
        "uniform",
    ]
    assert all(hasattr(core, name) for name in core.__all__)
