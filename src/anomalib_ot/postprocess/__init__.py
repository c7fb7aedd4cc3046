"""What comes after a model: regions of anomaly maps, suppression of duplicates, masks of boxes."""

from anomalib_ot.postprocess.box_masks import masks_in_boxes
from anomalib_ot.postprocess.duplicate_losses import duplicate_losses
from anomalib_ot.postprocess.entropy_weights import entropy_weights
from anomalib_ot.postprocess.mask_refinement import RefinedRegions, refine_regions
from anomalib_ot.postprocess.nms_settings import SinkhornNMSSettings
from anomalib_ot.postprocess.proposal_regions import Regions
from anomalib_ot.postprocess.published_nms import PublishedNMSSettings, published_regions
from anomalib_ot.postprocess.sinkhorn_nms import sinkhorn_nms, sinkhorn_regions

__all__ = [
    "PublishedNMSSettings",
    "RefinedRegions",
    "Regions",
    "SinkhornNMSSettings",
    "duplicate_losses",
    "entropy_weights",
    "masks_in_boxes",
    "published_regions",
    "refine_regions",
    "sinkhorn_nms",
    "sinkhorn_regions",
]
