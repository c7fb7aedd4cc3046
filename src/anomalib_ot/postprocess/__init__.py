"""What comes after a model: regions of anomaly maps, suppression of duplicates, masks of boxes."""

from anomalib_ot.postprocess.box_masks import masks_in_boxes
from anomalib_ot.postprocess.mask_refinement import RefinedRegions, entropy_weights, refine_regions
from anomalib_ot.postprocess.nms import sinkhorn_nms, sinkhorn_regions
from anomalib_ot.postprocess.proposals import Regions, SinkhornNMSSettings

__all__ = [
    "RefinedRegions",
    "Regions",
    "SinkhornNMSSettings",
    "entropy_weights",
    "masks_in_boxes",
    "refine_regions",
    "sinkhorn_nms",
    "sinkhorn_regions",
]
