"""Every chapter that trains or steers runs on a model built like Qwen2, with biases and a head of its own."""

import json

import nbformat
import pytest

from helpers.building.execution import execute
from helpers.chapters import CHAPTERS
from helpers.models import load
from helpers.params import PROJECT

LATER = [chapter for chapter in CHAPTERS if not chapter.startswith(("00", "01"))]


@pytest.fixture(scope="module")
def qwen2(save_model):
    """Two random blocks under the embedded model's tokenizer, whose words the chapters' data are made of."""
    tokenizer = load("tiny-random").tokenizer
    return save_model(
        "Qwen2",
        tokenizer=tokenizer,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.mark.parametrize("chapter", LATER)
def test_a_chapter_runs_on_a_model_of_another_architecture(chapter, qwen2, tmp_path):
    texts = {"preset": "tiny", "model": str(qwen2), "results": str(tmp_path / "results")}
    if "sentiment_model" in CHAPTERS[chapter].model_fields:
        texts["sentiment_model"] = str(qwen2)
    execute(PROJECT / "notebooks" / f"{chapter}.ipynb", tmp_path / f"{chapter}.ipynb", texts)
    run = json.loads((tmp_path / "results" / "findings.json").read_text("utf-8"))
    assert run["model"] == str(qwen2) and run["findings"]
    executed = nbformat.read(tmp_path / f"{chapter}.ipynb", as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
