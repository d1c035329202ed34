"""Questions are read from a file; one that cannot be asked is told in one sentence."""

import pytest

from helpers.artifacts import PACKAGE
from helpers.checking import QuestionError, questions, read_questions
from helpers.dependencies import helper_sources

WHOLE = """\
[colour]
question = "Which colour has the sky?"
options.a = "Blue."
options.b = "Green."
right = "a"
replies.a = "look up."
replies.b = "that is the grass."
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "questions.toml"


def test_a_question_is_asked_and_each_letter_has_its_reply(file, capsys):
    file.write_text(WHOLE)
    question = questions(str(file.with_name("exercises.py")))
    question("colour")
    assert capsys.readouterr().out == "Which colour has the sky?\n\na) Blue.\nb) Green.\n"
    for letter, said in (("a", "Right: look up.\n"), (" B) ", "Not yet: that is the grass.\n")):
        question("colour", letter)
        assert capsys.readouterr().out == said
    question("colour", "c")
    assert capsys.readouterr().out == 'Not yet: answer "a" or "b".\n'


def test_a_question_that_is_not_there_names_the_nearest(file):
    file.write_text(WHOLE)
    with pytest.raises(QuestionError, match="no question 'color' in this chapter: did you mean 'colour'") as error:
        questions(str(file.with_name("exercises.py")))("color")
    assert error.value._render_traceback_() == [f"QuestionError: {error.value}"]


@pytest.mark.parametrize(
    ("whole", "broken", "sentence"),
    [
        ('right = "a"', 'right = "c"', "colour: right is 'c', which is no option"),
        ('right = "a"', "", "colour.right: Field required"),
        ('right = "a"', 'right = ["a", "b"]', "colour.right: Input should be a valid string"),
        ('right = "a"', 'right = "a"\nright = "b"', "Cannot overwrite a value"),
        ('replies.b = "that is the grass."', "", "colour: replies must be a, b as the options are"),
        ("replies.b", "replies.c", "colour: replies must be a, b as the options are"),
        ('options.b = "Green."', "", "colour: options must be a, b, at least two, but are a"),
        ("options.b", "options.c", "colour: options must be a, b, at least two, but are a, c"),
        ('"Blue."', '""', "colour.options.a: String should have at least 1 character"),
        ("question =", "asks =", "colour.question: Field required"),
        ("[colour]", 'hint = "blue"\n[colour]', "hint: Input should be a valid dictionary"),
        ("[colour]", "[colour", "Expected ']'"),
        ("Blue", "Bl\udcfce", "can't decode byte 0xfc"),
    ],
)
def test_a_broken_file_is_one_sentence(file, whole, broken, sentence):
    assert whole in WHOLE
    file.write_bytes(WHOLE.replace(whole, broken).encode("utf-8", "surrogateescape"))
    with pytest.raises(QuestionError) as error:
        read_questions(file)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert f"{file.parent.name}/questions.toml" in str(error.value)


def test_a_file_that_is_not_there_is_one_sentence(file):
    with pytest.raises(QuestionError, match=r"questions.toml cannot be asked \(No such file or directory\)"):
        read_questions(file)


def test_no_stage_depends_on_questions():
    """What computes a stage is in its key, with all that it imports: exercises are none of that."""
    stages = [path for path in PACKAGE.rglob("*.py") if path.name not in ("exercises.py", "checking.py")]
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in stages]
    used = helper_sources([name.removesuffix(".__init__") for name in names if name != "__init__"])
    assert not {path.name for path in used} & {"exercises.py", "checking.py"}
