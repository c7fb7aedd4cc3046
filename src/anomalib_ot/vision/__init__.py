"""Images, patches, maps and boxes; knows nothing of transport and nothing of Anomalib."""
