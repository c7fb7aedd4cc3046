"""What comes after a model: regions of anomaly maps, suppression of duplicates."""

from anomalib_ot.postprocess.nms_settings import SinkhornNMSSettings
from anomalib_ot.postprocess.proposal_regions import Regions
from anomalib_ot.postprocess.published_nms import PublishedNMSSettings, published_regions
from anomalib_ot.postprocess.sinkhorn_nms import sinkhorn_nms, sinkhorn_regions

__all__ = [
    "PublishedNMSSettings",
    "Regions",
    "SinkhornNMSSettings",
    "published_regions",
    "sinkhorn_nms",
    "sinkhorn_regions",
]
