import hashlib
import json
import os
import subprocess
import sys

import pytest

from helpers import corpora
from helpers.corpora import CorpusError, digest, load_hub, load_prompts, load_trait, split


def test_rows_come_typed_in_file_order_and_split_by_name():
    rows = load_trait("evil")
    train = split(rows, "train")
    assert train == rows[:72]
    assert rows[0].answer("mild") == rows[0].mild
    assert {row.split for row in split(rows, "eval")} == {"eval"}


def test_a_missing_mild_answer_is_said_and_not_replaced():
    with pytest.raises(CorpusError, match="pirate-train-001 has no 'mild' answer"):
        load_trait("pirate")[0].answer("mild")


def test_a_mistyped_trait_gets_the_nearest_name():
    with pytest.raises(CorpusError, match="did you mean 'sycophantic'"):
        load_trait("sycophant")
    with pytest.raises(CorpusError, match="did you mean 'pirate'"):
        load_prompts("pirates")


def test_a_mistyped_split_or_level_gets_the_names_there_are():
    with pytest.raises(CorpusError, match="train, extract, eval"):
        split([], "test")
    with pytest.raises(CorpusError, match="normal, mild, strong"):
        load_trait("evil")[0].answer("medium")


def test_a_digest_is_the_sha256_of_the_file_as_it_lies():
    assert digest("pirate") == hashlib.sha256((corpora.DATA / "traits" / "pirate.jsonl").read_bytes()).hexdigest()
    assert len({digest("evil"), digest("pirate"), digest("sycophantic"), digest("prompts")}) == 4


def test_a_damaged_data_file_is_reported_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "traits").mkdir()
    good = json.dumps(vars(load_trait("evil")[0]))
    (tmp_path / "traits" / "cut.jsonl").write_text(good + "\n" + good[:50])
    (tmp_path / "traits" / "thin.jsonl").write_text('{"id": "thin-train-001", "question": "Why?"}\n')
    monkeypatch.setattr(corpora, "DATA", tmp_path)
    with pytest.raises(CorpusError, match=r"Line 2 of cut\.jsonl is not JSON"):
        load_trait("cut")
    with pytest.raises(CorpusError, match=r"Line 1 of thin\.jsonl must have the fields id, trait"):
        load_trait("thin")


def test_a_local_folder_of_rows_loads_like_a_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert load_hub(str(tmp_path / "set")) == [{"a": 1}, {"a": 2}]
    with pytest.raises(CorpusError, match=r"could not be loaded: .*test"):
        load_hub(str(tmp_path / "set"), split="test")


def test_a_set_that_the_offline_machine_does_not_have_is_one_sentence():
    code = (
        "from helpers.corpora import CorpusError, load_hub\n"
        "try: load_hub('nobody/nothing-of-this-name')\n"
        "except CorpusError as error: print(error, end='')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert "nobody/nothing-of-this-name" in done.stdout
    assert "cannot be reached" in done.stdout
    assert "\n" not in done.stdout
