"""Parameters to disk and back. Reading order: agreement, structure, create, hyperslab, manifest, directory, checkpoint."""
