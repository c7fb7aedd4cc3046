"""anomalib-ot: the optimal-transport extension of Anomalib.

Importing this package costs nothing: the public names load torch and Anomalib when they are first asked for.
"""

from importlib import import_module

__version__ = "0.2.0"

_PUBLIC = {
    "CocoBoxes": "anomalib_ot.integration.data.coco_boxes",
    "Inspector": "anomalib_ot.edge.inspector",
    "MaskBoxes": "anomalib_ot.integration.data.mask_boxes",
    "OTADetector": "anomalib_ot.integration.models.ota_detector",
    "OTPrototypes": "anomalib_ot.integration.models.ot_prototypes",
    "RegionWriter": "anomalib_ot.integration.callbacks.region_writer",
    "SinkhornNMS": "anomalib_ot.integration.processing.sinkhorn_nms",
    "SparseMDOD": "anomalib_ot.integration.models.sparse_mdod",
    "SubmissionWriter": "anomalib_ot.integration.callbacks.submission_writer",
    "SyntheticFabric": "anomalib_ot.integration.data.synthetic_fabric",
    "SyntheticFabricBoxes": "anomalib_ot.integration.data.synthetic_fabric_boxes",
    "SyntheticTray": "anomalib_ot.integration.data.synthetic_tray",
    "TianchiFabric": "anomalib_ot.integration.data.tianchi_fabric",
}

__all__ = [
    "CocoBoxes",
    "Inspector",
    "MaskBoxes",
    "OTADetector",
    "OTPrototypes",
    "RegionWriter",
    "SinkhornNMS",
    "SparseMDOD",
    "SubmissionWriter",
    "SyntheticFabric",
    "SyntheticFabricBoxes",
    "SyntheticTray",
    "TianchiFabric",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use (PEP 562)."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the lazy names too, for completion."""
    return sorted({*globals(), *__all__})
