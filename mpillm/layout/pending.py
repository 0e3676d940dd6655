"""A call that was started and goes on by itself."""


class Pending:
    """A started call; `test()` drives it on and tells whether it is done, `wait()` returns when it is.

    Parameters
    ----------
    requests : list of MPI requests
    call : Call
    stages : callables
        Each runs when the requests before it are done, and may return further requests.
    kept : object
        Arrays that MPI still reads or writes.
    """

    def __init__(self, requests, call, stages=(), kept=None):
        self.requests, self.call, self.stages, self.kept = requests, call, list(stages), kept
        call.begun()

    def expect(self):
        """Nothing else is to be done before this call is: the flight recorder then shows who waits for what."""
        self.call.waits()

    def _next_stage(self):
        if self.stages:
            self.requests = self.stages.pop(0)() or []
            return True
        if self.call.seconds is None:
            self.call.done()
        return False

    def test(self):
        while True:
            self.requests = [request for request in self.requests if not request.Test()]
            if self.requests:
                return False
            if not self._next_stage():
                return True

    def wait(self):
        if self.requests or self.stages:
            self.expect()
        while True:
            for request in self.requests:
                request.Wait()
            self.requests = []
            if not self._next_stage():
                return
