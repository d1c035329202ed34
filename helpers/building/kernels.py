"""The kernel that executes a chapter, by way of papermill: of this Python, and watched while a cell runs.

A module of its own, since papermill takes seconds to import and most mistakes are found before.
"""

import logging
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from helpers.progress import DISPLAY

if TYPE_CHECKING:
    from helpers.building.execution import Watch

FAILURES = (papermill.PapermillExecutionError, DeadKernelError, CellTimeoutError, RuntimeError, OSError)
"""What can come of executing a notebook."""


def run(source: Any, given: Mapping[str, Any], watch: "Watch") -> None:
    """Execute a notebook in the current folder, handing what happens to `watch`; raises one of `FAILURES`."""
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would say was checked, or is said in the end
    with TemporaryDirectory(prefix="kernel-") as folder:
        papermill.execute_notebook(
            source,
            None,
            dict(given),
            engine_name="helpers",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            watch=watch,
            folder=folder,
        )


def failure(notebook: Any) -> str | None:
    """What went wrong in a notebook that papermill takes for executed: a cell that ends its process."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"
    return None


def reason(error: BaseException) -> str:
    """One of `FAILURES`, as a sentence goes on with it."""
    if isinstance(error, papermill.PapermillExecutionError):
        lines = f"{error.ename}: {error.evalue}".strip().splitlines()
        return lines[0] if len(lines) == 1 or len(lines[0]) > 40 else " ".join(lines[:3])
    if isinstance(error, DeadKernelError):
        return "the end of its kernel, which the system may have killed because memory ran out"
    if isinstance(error, CellTimeoutError):
        return "no word from its kernel for minutes"
    return " ".join(str(error).split()) or type(error).__name__


class _Kernel(AsyncKernelManager):
    """A kernel of this Python, spoken to through files that only its user can open.

    Other kernels named python3 may come first in the search path (a cluster's modules, conda), ports may be taken by a
    kernel that starts beside this one, and the folder where Jupyter keeps such files may be one that cannot be written.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.kernel_spec_manager = KernelSpecManager(kernel_dirs=[], parent=self)
        self.transport = "ipc"


class _Client(PapermillNotebookClient):
    """Hands progress on, which is no result and does not stay in the notebook."""

    watch: Any = None
    folder = ""

    def create_kernel_manager(self) -> Any:
        self.km = _Kernel(kernel_name="python3", connection_file=f"{self.folder}/k.json", ip=f"{self.folder}/k")
        return self.km

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        shown = (msg["content"].get("transient") or {}).get("display_id") or ""
        if shown.startswith(DISPLAY):
            self.watch.inside(msg["content"]["data"].get("text/plain", ""))
            return None
        return super().process_message(msg, cell, cell_index)


class _Engine(NBClientEngine):
    """papermill's engine, with our client."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, *, watch: Any = None, folder: str = "", **_: Any
    ) -> None:
        from helpers.building.execution import PATIENCE

        watch.begin(nb_man.nb)
        client = _Client(
            nb_man,
            kernel_name=kernel_name,
            log=logging.getLogger("papermill"),
            extra_arguments=["--log-level=CRITICAL"],  # a kernel that ends as it should may log that as an error
            startup_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            on_cell_start=lambda cell, cell_index: watch.start(cell, cell_index),
        )
        client.watch, client.folder, watch.client = watch, folder, client
        client.execute()


papermill_engines.register("helpers", _Engine)
