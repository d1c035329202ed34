"""Every verdict of the book comes from a measurement that is tested on planted arrays."""

import ast
import re
from pathlib import Path

import nbformat

from helpers.book.findings import load_claims

PROJECT = Path(__file__).resolve().parents[2]
ROOMS = PROJECT / "helpers" / "chapters"
MEASUREMENTS = {path.parent.name: path.read_text("utf-8") for path in ROOMS.glob("*/measurements.py")}
SHOWN_IN_THE_NOTEBOOK = {"primer.parity", "primer.judge-auroc"}
"""Claims whose estimate is one call of a tested statistic."""


def claims_of(source: str) -> set[str]:
    """Claim ids in a module's strings; `weights.{name}-specific` stands for both topics."""
    tree = ast.parse(source)
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    joined = {
        "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    }
    patterns = [re.compile(re.escape(text).replace(r"\*", r"[\w-]+")) for text in texts | joined if "." in text]
    return {claim for claim in load_claims() if any(pattern.fullmatch(claim) for pattern in patterns)}


def test_every_claim_is_measured_by_a_function_of_its_own():
    measured = set().union(*(claims_of(source) for source in MEASUREMENTS.values()))
    assert set(load_claims()) - measured == SHOWN_IN_THE_NOTEBOOK


def test_every_chapter_s_measurements_have_planted_tests():
    for room in MEASUREMENTS:
        tests = PROJECT / "tests" / "unit" / "chapters" / room / "test_measurements.py"
        assert f"helpers.chapters.{room}" in tests.read_text("utf-8"), room


def test_notebooks_judge_measurements_and_show_each_claims_sentence():
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        made_here = set(re.findall(r'Measurement\(\s*"([\w.-]+)"', code))
        assert made_here <= SHOWN_IN_THE_NOTEBOOK, path.name
        assert not re.search(r'findings\.judge\(\s*f?"', code), path.name
        claims = {claim.id for claim in load_claims().values() if claim.chapter == path.stem}
        unsaid = {claim for claim in claims if f"said.{claim}`" not in prose}
        assert not unsaid, f"{path.name}: {unsaid}"
