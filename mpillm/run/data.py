"""The token files of a job, opened and checked before the first step."""

from ..config import UserError
from ..layout.agreement import agreed
from ..layout.slab import cut
from ..text.batches import check_same_tokenizer, open_batches, validation_windows
from ..text.tokenfile import TokenFile

LOOKED_AT = 2**24       # tokens of each file whose ids a rank checks before the first step, a moment's work
PIECE = 2**20           # tokens read at once


class TrainingData:
    """
    Attributes
    ----------
    vocabulary : int
        Tokens that the model must know.
    tokenizer : bytes or None
        The tokenizer.json; None with random data.
    tokenizer_hash : str or None
    validation : TokenFile or None
    """

    def __init__(self, job, group):
        self.job = job
        self.tokenizer = self.tokenizer_hash = self.validation = self.files = None
        if job.data.train == "random":
            if not job.model.vocabulary:
                raise UserError("data.train = \"random\": random tokens need model.vocabulary; set it")
            if job.data.validation:
                raise UserError("data.validation with data.train = \"random\": random tokens have no tokenizer to compare; leave validation out")
            self.vocabulary = job.model.vocabulary
            return
        names = list(job.data.train) if isinstance(job.data.train, dict) else [job.data.train]
        self.files = [TokenFile(name, group) for name in names]
        if job.data.validation:
            self.validation = TokenFile(job.data.validation, group)
        check_same_tokenizer(self.files + ([self.validation] if self.validation else []))
        self.vocabulary, self.tokenizer_hash = self.files[0].vocabulary, self.files[0].tokenizer_hash
        self.tokenizer = self.files[0].tokenizer_bytes()
        if self.validation:
            self.windows()      # too short a file is refused now
        self._check_ids(group)

    def _check_ids(self, group):
        """Refuses ids beyond the vocabulary now, not at the step that reads them: all ranks look at their parts of the files.

        What is left of a part beyond `LOOKED_AT` tokens is checked when it is read.
        """
        with agreed(group, UserError, "checking the token files"):
            for file in self.files + ([self.validation] if self.validation else []):
                first, size = cut(file.num_tokens, group.size, group.rank)
                for start in range(first, first + min(size, LOOKED_AT), PIECE):
                    file.read(start, min(start + PIECE, first + size))

    def batches(self, cursor=None):
        """The training samples from the cursor on."""
        return open_batches(self.job.data.train, self.job.model.context, self.job.train.seed, cursor, self.vocabulary, self.files)

    def windows(self):
        """Number of validation windows, and what reads them."""
        return validation_windows(self.validation, self.job.model.context, self.job.train.validation_samples)
