"""How a command ends: its exit code, and one message in place of a traceback."""

import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from minilora import distributed
from minilora.errors import RunError, UserError

# words in the type or message of the errors that torch.distributed raises when another process has
# ended or does not answer
LOST_PROCESS = re.compile(
    "gloo|nccl|Connection|DistBackend|DistNetwork|DistStore|CheckpointException|timed out",
    re.IGNORECASE,
)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main function and exit with its code.

    A UserError is printed as one message (code 2), as are a RunError and the loss of another
    process (code 1). Anything else ends with a traceback (code 1).

    Args:
        main: returns the exit code; None is 0.
    """
    distributed.use_expandable_segments()
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has ended, as `| head` does
        # without this the interpreter would write to the pipe once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + 13: as a shell reports a process that SIGPIPE has ended
    except RuntimeError as error:
        if distributed.world_size() == 1 or not _is_lost_process(error):
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {distributed.rank()} of {distributed.world_size()} lost touch with "
            f"another one, which failed, was killed or hangs ({reason}). Checkpoints are intact: "
            "the same command continues from the newest",
            file=sys.stderr,
        )
        os._exit(1)  # a normal exit would wait for the lost process


def _is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed means that another process is gone."""
    return LOST_PROCESS.search(f"{type(error).__name__} {error}") is not None
