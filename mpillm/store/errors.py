"""How saving and loading fail."""

import errno

from ..config import UserError
from ..layout.agreement import one_line


class DamagedCheckpoint(UserError):
    """A checkpoint that is incomplete, altered or unsafe to read; resuming falls back to an older one."""


class SaveFailed(Exception):
    """A checkpoint could not be written (one line); the earlier ones are intact."""


UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def unreadable(path, what, error):
    """What to raise for an error on reading: damage, unless the file system says that it cannot tell.

    A checkpoint that only cannot be read now must not be passed over: a resume would go on from an older one.
    """
    if isinstance(error, OSError) and error.errno in UNREADABLE:
        return UserError(f"{path}: cannot be read: {one_line(error)}; mend that, it is not known to be damaged")
    return DamagedCheckpoint(f"{path}: {what}: {one_line(error)}")
