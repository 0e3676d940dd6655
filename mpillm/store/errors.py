"""How saving and loading fail."""

from ..config import UserError


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, altered or unsafe to read; resuming falls back to an older one."""


class SaveFailed(Exception):
    """A checkpoint could not be written (one line); the earlier ones are intact."""
