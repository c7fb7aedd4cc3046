"""Optimal transport in plain torch: costs, marginals, Sinkhorn's algorithm, and plans that know how good they are."""

from anomalib_ot.ot.cost import cosine_cost, euclidean_cost, fused_cost, position_cost, squared_euclidean_cost
from anomalib_ot.ot.dense import sinkhorn
from anomalib_ot.ot.marginals import append_slack, normalize, uniform
from anomalib_ot.ot.sparse import SparseTransport, sparse_sinkhorn
from anomalib_ot.ot.support import Support
from anomalib_ot.ot.transport import Transport

__all__ = [
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
