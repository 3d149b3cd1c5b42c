"""The command `check` tells whether this machine runs the kernels, and whether they compute what they should."""

from __future__ import annotations

import json
import time

import typer
from rich.console import Console


def check(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of tables."),
    test: bool = typer.Option(True, "--test/--no-test", help="Whether to compare results with float64 (some seconds)."),
) -> None:
    """Show what runs on this machine, what does not and why, and whether it computes what it should.

    The exit code is 1 if a number is wrong.
    """
    from .inspection import describe_machine, print_machine, test_and_print

    console = Console(quiet=as_json)
    report = describe_machine()
    print_machine(console, report)
    began = time.perf_counter()
    outcomes = test_and_print(console) if test else []
    seconds = time.perf_counter() - began
    passed = all(outcome.passed for outcome in outcomes)
    if as_json:
        found = {"self_test": [vars(outcome) for outcome in outcomes], "passed": passed, "seconds": round(seconds, 2)}
        typer.echo(json.dumps(report | found, indent=1))
    elif outcomes:
        wrong = sum(not outcome.passed for outcome in outcomes)
        verdict = (
            f"[bold red]{wrong} of {len(outcomes)} failed[/]" if wrong else f"[bold green]all {len(outcomes)} passed[/]"
        )
        console.print(f"{verdict} in {seconds:.1f} s")
    if not passed:
        raise typer.Exit(1)
