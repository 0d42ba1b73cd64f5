"""torch's own tests of non-reentrant checkpointing, with this package's saved-tensor frames in the place of torch's.

    python benchmarks/torch_checkpoint_tests.py PATH/TO/pytorch/test

The folder is that of a source release of torch (its `test_autograd.py` and `test_utils.py` are read, none of it is
kept here); pytest and torch's own `expecttest` have to be installed. Each test of "checkpoint" by name runs twice,
as it is, and with the hook of `torch.utils.checkpoint` replaced by `abyssal.models.replay.frame.Frame`. Prints those
that end differently, and the counts. Tests of another release than the installed torch may fail both ways.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PLUGIN = '''
import torch.utils.checkpoint as theirs
from torch.autograd.graph import saved_tensors_hooks

from abyssal.models.replay.frame import Frame


class Hook(saved_tensors_hooks):
    """A frame where torch makes its own; the rest of torch's checkpointing stays."""

    def __init__(self, frame):
        self.ours = Frame(lambda: frame.recompute_fn(*frame.get_inputs()), "tested", frame.early_stop)
        super().__init__(self.ours._pack, self.ours._unpack)

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.ours._is_complete = exception[0] is None


theirs._checkpoint_hook = Hook
'''


def outcomes(folder: Path, plugins: Path | None) -> dict[str, str]:
    """Run the tests and return how each ended."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-rA", "-q"]
    environment = dict(os.environ)
    if plugins is not None:
        command += ["-p", "frames_of_ours"]
        environment["PYTHONPATH"] = os.pathsep.join([str(plugins), environment.get("PYTHONPATH", "")])
    command += ["test_autograd.py", "test_utils.py", "-k", "checkpoint or Checkpoint"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return {test: how for how, test in re.findall(r"^(PASSED|FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)}


def main() -> None:
    """Run both ways and print what differs."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "frames_of_ours.py").write_text(PLUGIN)
        theirs, ours = outcomes(folder, None), outcomes(folder, Path(temporary))
    for test in sorted({*theirs, *ours}):
        if theirs.get(test) != ours.get(test):
            print(f"{test}: {theirs.get(test, 'not run')} with torch's frames, {ours.get(test, 'not run')} with ours")
    for name, found in (("torch's", theirs), ("ours", ours)):
        print(f"{name}: {sum(how == 'PASSED' for how in found.values())} of {len(found)} passed")


if __name__ == "__main__":
    main()
