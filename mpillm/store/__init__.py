"""Parameters to disk and back. Reading order: errors, structure, hyperslab, manifest, directory, checkpoint."""
