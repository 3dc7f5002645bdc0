"""The command itself: what errors become."""

from __future__ import annotations

import os
import sys

from rayltx.cli import exit_codes
from rayltx.cli.interrupts import remembered_interrupts
from rayltx.cli.packages import missing_packages_named
from rayltx.errors import RayLTXError, UserError


def main() -> None:
    """Run the command. Exit code 2 for what the user can mend, 1 for what failed, with one message each."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a future default of Ray
    subcommand = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "the command")
    try:
        with remembered_interrupts(), missing_packages_named(subcommand):
            from rayltx.cli.commands import app  # not at the top: without typer there are no options, but a message

            app()
    except UserError as error:
        print(f"rayltx: {error}", file=sys.stderr)
        sys.exit(exit_codes.USER_ERROR)
    except RayLTXError as error:
        print(f"rayltx: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(exit_codes.FAILURE)
    except KeyboardInterrupt:
        print("rayltx: interrupted", file=sys.stderr)
        sys.exit(exit_codes.INTERRUPTED)


if __name__ == "__main__":
    main()
