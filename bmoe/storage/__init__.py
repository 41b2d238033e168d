"""The storage layer: model manifests, blobs named by SHA-256, and evidence kept for re-execution."""
