"""What may change between a checkpoint and the job that goes on from it (DESIGN.md section 8, Resume)."""

import dataclasses

from ..config import Job, UserError, job_to_dict

REFUSED = {
    "model": ("family", "layers", "width", "heads", "kv_heads", "mlp_width", "tied", "vocabulary", "rope_base", "rope_scaling", "norm_epsilon",
              "head_width", "qkv_bias", "experts", "experts_per_token", "shared_experts"),
    "train": ("seed",),
    "optimizer": ("name",),
}
SAID = {
    "model": ("dropout", "context", "balance_loss", "router_z_loss"),
    "data": ("train", "validation"),
    "train": ("steps", "batch", "spike"),
    "optimizer": ("rate", "rate_schedule", "final_rate_share", "decay_share", "warmup", "betas", "epsilon", "weight_decay", "clip"),
    "precision": ("compute",),
}


def check_model(before, job, where):
    """Refuses a job whose model is not the one of the job `before`."""
    _refuse(before, job_to_dict(job), ("model",), where, "set it to that, or start from another checkpoint")


def _refuse(before, after, sections, where, remedy="set it back, or use another run.name to start anew"):
    for section in sections:
        for key in REFUSED[section]:
            old, new = _value(before, section, key), after[section].get(key)
            if old != new:
                raise UserError(f"{section}.{key} = {new} in the job, {old} in the checkpoint {where}; {remedy}")


def _value(job, section, key):
    """A value of a job in a manifest; the default where the mpillm that wrote it did not know the key."""
    kind = {item.name: item.type for item in dataclasses.fields(Job)}[section]
    defaults = {item.name: item.default for item in dataclasses.fields(kind) if item.default is not dataclasses.MISSING}
    return job.get(section, {}).get(key, defaults.get(key))


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
    _refuse(before, after, REFUSED, where)
    lines = []
    for section, keys in SAID.items():
        for key in keys:
            old, new = _value(before, section, key), after[section].get(key)
            if old != new:
                lines.append(f"{section}.{key} changes from {old} to {new}")
    return lines
