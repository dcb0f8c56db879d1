"""The command ``nndefense``. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command; every error that a user can mend is one line on standard error.

    Exit codes: 0 done; 1 an error of another kind; 2 wrong options or input; 3 data missing or unusable; 4 a
    classifier, 5 a database missing or unusable; 130 interrupted.
    """
    from nndefense.cli.app import build
    from nndefense.cli.streams import prepare
    from nndefense.errors import NNDefenseError

    prepare()
    try:
        code = build()(prog_name="nndefense", standalone_mode=False)
        # Here rather than at the end of the process, where a reader that has gone could not be handled.
        sys.stdout.flush()
        if code == INTERRUPTED:
            # Typer turns Ctrl-C into this code, and says nothing.
            raise KeyboardInterrupt
        sys.exit(code)
    except NNDefenseError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        print("nndefense: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output (head, less) has seen enough: end quietly, as Typer does where it notices first.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # A full disk or a missing permission is not a defect of the program, and its own text says which file.
        _fail(error, 1)
    except Exception as error:
        # Typer's own errors about options, whose class is click's or Typer's, depending on its version.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        place = getattr(getattr(error, "ctx", None), "command_path", "nndefense")
        _fail(error, 2, f"{error.format_message().rstrip('.')} (see {place} --help)")


def _fail(error: Exception, code: int, text: str = "") -> None:
    """Say in one line what is wrong, or, with ``--debug``, raise it with its traceback."""
    if "--debug" in sys.argv:
        raise error
    from nndefense.cli.streams import one_line

    print(f"nndefense: error: {one_line(text or error)}", file=sys.stderr)
    sys.exit(code)


__all__ = ["main"]
