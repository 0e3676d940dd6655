"""What may change between a checkpoint and the job that goes on from it (DESIGN.md section 8, Resume)."""

from ..config import UserError, job_to_dict

REFUSED = {
    "model": ("family", "layers", "width", "heads", "kv_heads", "mlp_width", "tied", "vocabulary", "rope_base", "norm_epsilon"),
    "train": ("seed",),
    "optimizer": ("name",),
}
SAID = {
    "model": ("dropout", "context"),
    "data": ("train", "validation"),
    "train": ("steps", "batch"),
    "optimizer": ("rate", "rate_schedule", "final_rate_share", "decay_share", "warmup", "betas", "epsilon", "weight_decay", "clip"),
    "precision": ("compute",),
}


def changes(before, job, where):
    """Lines that tell what the job changes against the checkpoint.

    Parameters
    ----------
    before : dict
        The job in the manifest.
    job : Job
        With the vocabulary filled in.
    where : str
        The checkpoint, for the message.

    Raises
    ------
    UserError
        The model's shape, the seed or the optimizer differ.
    """
    after = job_to_dict(job)
    for section, keys in REFUSED.items():
        for key in keys:
            old, new = before.get(section, {}).get(key), after[section].get(key)
            if old != new:
                raise UserError(f"{section}.{key} = {new} in the job, {old} in the checkpoint {where}; "
                                "set it back, or use another run.name to start anew")
    lines = []
    for section, keys in SAID.items():
        for key in keys:
            old, new = before.get(section, {}).get(key), after[section].get(key)
            if old != new:
                lines.append(f"{section}.{key} changes from {old} to {new}")
    return lines
