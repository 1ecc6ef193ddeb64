"""The group of all commands: errors that users cause as one line, usage errors with an example, whole summaries."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

from benchmark.errors import NO_NAME, REMEDIES, InputError, RunError, storage_error
from benchmark.opening import printable

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
UsageError: Any = typer.BadParameter.__bases__[0]  # Typer has no public name for it
_ANY_LENGTH = 1000


class Group(TyperGroup):
    """Turns the errors that users cause into one line and an exit code."""

    def make_context(self, *given: Any, **options: Any) -> Any:
        """The context of a call; --install-completion acts here, and writes into the user's home."""
        try:
            return super().make_context(*given, **options)
        except OSError as error:
            remedy = "Print the completion with --show-completion and put it where your shell reads it"
            typer.echo(printable(f"error: {error.filename}: {error.strerror}. {remedy}"), err=True)
            raise typer.Exit(FAILED) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            help_text = getattr(getattr(error.ctx, "command", None), "help", None) or ""
            example = re.search(r"Examples:\n\s*(.+)", help_text)
            if example is None:
                raise
            raise UsageError(f"{error.format_message()}\nFor example: {example[1]}", ctx=error.ctx) from None
        except InputError as error:
            typer.echo(printable(f"error: {error}"), err=True)
            raise typer.Exit(BAD_INPUT) from None
        except RunError as error:
            typer.echo(printable(f"error: {error}"), err=True)
            raise typer.Exit(FAILED) from None
        except OSError as error:
            if error.errno in NO_NAME:
                typer.echo(printable(f"error: {error.filename}: {error.strerror}. Choose another name"), err=True)
                raise typer.Exit(BAD_INPUT) from None
            if error.errno not in REMEDIES:
                raise
            typer.echo(printable(f"error: {storage_error(error)}"), err=True)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands with their whole summaries, on as many lines as those need."""
        shown = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_ANY_LENGTH)) for name, each in shown if each])
