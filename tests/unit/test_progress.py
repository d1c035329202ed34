"""Progress says how far a long step is, and leaves nothing where results are."""

import subprocess
import sys
import time

import nbformat
from nbclient import NotebookClient

from helpers import progress
from helpers.params import PROJECT


def test_a_log_file_has_a_line_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINES", 0.5)
    for _ in progress.watched(range(16), "training"):
        time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[-1].startswith("training: ") and " of 16 steps, " in lines[-1] and lines[-1].endswith(" left")


def test_what_is_soon_done_says_nothing():
    code = "from helpers.progress import watched\nfor _ in watched(range(9), 'training'): pass"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_a_notebook_shows_it_while_it_lasts_and_nothing_afterwards():
    shown = []

    class Client(NotebookClient):
        def process_message(self, msg, cell, cell_index):
            if msg["msg_type"] in ("display_data", "update_display_data"):
                shown.append(msg["content"]["data"].get("text/plain"))
            return super().process_message(msg, cell, cell_index)

    code = (
        "import time\nfrom helpers.progress import progress\n"
        "with progress(4, 'training') as bar:\n"
        "    for _ in range(4):\n        time.sleep(0.7)\n        bar.update()"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    Client(notebook, resources={"metadata": {"path": str(PROJECT)}}).execute()
    assert shown[0].startswith("training: 2 of 4 steps, ") and shown[-1] is None
    assert [dict(output.data) for output in notebook.cells[0].outputs] == [{}]
