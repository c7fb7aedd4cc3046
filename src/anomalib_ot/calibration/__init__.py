"""What good images change after a training: thresholds (`anomalib-ot calibrate`), prototypes (`anomalib-ot update`)."""
