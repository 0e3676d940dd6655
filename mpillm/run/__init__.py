"""The life of a job: its launch and its end, the run directory and its lock, metrics, progress, signals."""
