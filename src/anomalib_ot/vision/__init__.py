"""Images, patches and maps: torch, torchvision and timm, nothing of transport and nothing of Anomalib."""
