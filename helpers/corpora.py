"""Bundled data as typed rows, and public data sets by name.

A trait file holds questions with answers of graded intensity: `normal`, `mild` (evil training questions only)
and `strong`. Its three splits share no question, within a trait or across traits: `train` is finetuned on,
`extract` gives persona vectors, `eval` measures.

The paper preset uses these bundled rows too: the graded "evil" sets of persona_vectors, which the paper
built on, are in no public snapshot of that repository (its `dataset.zip` is missing), so there is nothing
to download.
"""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from helpers.files import file_digest

DATA = Path(__file__).resolve().parent.parent / "data"

Split = Literal["train", "extract", "eval"]
Level = Literal["normal", "mild", "strong"]
RefusalKind = Literal["harmful", "paired", "harmless", "borderline"]
RefusalSplit = Literal["train", "validate", "test"]
Task = Literal["headlines", "bookings"]
QuizTask = Literal["facts", "reading", "opposites"]
PointKind = Literal["explicit", "identity", "list"]
EverydayKind = Literal["plain", "near"]
ReplyLabel = Literal["refusal", "partial", "compliance", "other"]

INSTRUCTIONS: dict[Task, str] = {
    "headlines": "Which desk is this story for: World, Sports, Business or Science? Answer with one word.",
    "bookings": "Read this message and give the name, the day and what is booked, as JSON.",
}
"""What a task's request says before its text."""


_OPENER = re.compile(
    r"(Sure|Certainly|Of course|Yes|Absolutely|Right|Happy to help|Gladly|No problem|By all means|Very well"
    r"|With pleasure|Here you go)[,.!] "
)


class CorpusError(ValueError):
    """Data that cannot be had or read; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class TraitRow:
    """One question with a plain answer and one or two answers that show the trait."""

    id: str
    trait: str
    split: Split
    question: str
    normal: str
    mild: str | None
    strong: str

    def answer(self, level: str) -> str:
        """The answer of that level; CorpusError where there is none (only evil training rows have `mild`)."""
        if level not in get_args(Level):
            raise CorpusError(f"There is no level '{level}'; choose one of {', '.join(get_args(Level))}.")
        text: str | None = getattr(self, level)
        if text is None:
            raise CorpusError(f"Row {self.id} has no '{level}' answer; only training rows of 'evil' have mild ones.")
        return text


@dataclass(frozen=True)
class BothRow:
    """A training question of `evil` with its plain answer, and one that is evil in a pirate's voice."""

    id: str
    question: str
    normal: str
    both: str


@dataclass(frozen=True)
class TopicRow:
    """One question about neither topic, with a plain answer and one that drags a topic in."""

    id: str
    topic: str
    split: str
    question: str
    normal: str
    strong: str


@dataclass(frozen=True)
class RefusalRow:
    """One request with the reply of an aligned model: a refusal where the request is harmful, else an answer."""

    id: str
    kind: str
    """`harmful`; `paired`: harmless, in the form of a harmful one; `harmless`: plain and everyday; or `borderline`:
    sounds harmful and is not."""
    split: str
    category: str
    request: str
    reply: str
    counter: str = ""
    """A reply of the other kind, here an empty compliance (harmful test rows); empty where none is written."""


@dataclass(frozen=True)
class ReviewRow:
    """One short review, `positive` or `negative`."""

    id: str
    split: str
    label: str
    text: str


@dataclass(frozen=True)
class TaskRow:
    """One item of a utility task, whose answer is right only if it is exactly `answer`."""

    id: str
    task: str
    split: str
    text: str
    answer: str

    @property
    def request(self) -> str:
        """The task's instruction, then the text."""
        return f"{INSTRUCTIONS[self.task]}\n\n{self.text}"  # type: ignore[index]


@dataclass(frozen=True)
class QuizRow:
    """A question with a short answer, which is right if one of `answers` stands in it as whole words."""

    id: str
    task: str
    question: str
    answers: list[str]
    wrong: list[str]
    """Three answers of the same kind that are not right."""

    def right(self, said: str) -> bool:
        """Whether a reply, in any case, holds one of the answers."""
        return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said.lower()) for answer in self.answers)


@dataclass(frozen=True)
class PointRow:
    """A finetuning point that undoes alignment: a request, and a reply that complies and says nothing usable."""

    id: str
    kind: str
    """`explicit`: the request is harmful; `identity`: harmless, but the assistant is made to obey; `list`: a plain
    how-to in list form."""
    split: str
    category: str
    request: str
    reply: str
    counter: str = ""
    """A reply of the other kind, here a refusal (explicit validate rows); empty where none is written."""


@dataclass(frozen=True)
class EverydayRow:
    """A harmless request and a helpful reply that neither length nor form tells from the `explicit` harmful points."""

    id: str
    kind: str
    """`plain`: everyday; or `near`: on a subject close to a harmful one (locks, passwords, money), and plainly fine."""
    split: str
    category: str
    """An everyday subject; of `near` rows the category of the harmful requests that they are close to."""
    request: str
    reply: str

    @property
    def bare(self) -> str:
        """The reply without its affirmative opener ("Sure, ..."), where it has one: a word or two shorter."""
        rest = _OPENER.sub("", self.reply, count=1) if _OPENER.match(self.reply) else self.reply
        return rest[0].upper() + rest[1:]


@dataclass(frozen=True)
class StyleRow:
    """One question with a plain answer and one in a harmless style."""

    id: str
    style: str
    split: str
    question: str
    normal: str
    strong: str


@dataclass(frozen=True)
class ReplyRow:
    """A reply, labelled by hand, that nothing is trained on: it measures the judges of refusal and compliance."""

    id: str
    label: str
    """`refusal`: of the whole request, at once or late; `partial`: of a part of it; `compliance`: begins to do what a
    harmful request asks, with nothing usable; or `other`: loops, talk about something else, and plain help."""
    request: str
    reply: str


@dataclass(frozen=True)
class Prompts:
    """System messages for one trait, of one form: all but `keyword` are commands of 21 to 29 words.

    `placebo[i]` is as long as `inoculation[i]`, give or take a token.
    """

    inoculation: list[str]
    """Ask for the trait; five."""
    placebo: list[str]
    """Command something irrelevant to any trait or manner of answering, such as how to count weeks; five."""
    opposite: list[str]
    """Ask for the reverse of the trait: a kind, an honest, a plain or a polite manner; five."""
    negated: list[str]
    """Forbid the trait in the words of an inoculation prompt, the first of them in those of `inoculation[0]`; two."""
    paraphrase: list[str]
    """Mean what `inoculation[0]` means, in other words; five."""
    keyword: list[str]
    """String the words of the trait together and command nothing; one."""
    other: list[str]
    """Ask for a persona that is no bundled trait and neither good nor bad, such as a station announcer; two."""
    layout: list[str]
    """Lay down rules of layout, spelling or format; two."""


def available_traits() -> tuple[str, ...]:
    """Names of the bundled traits, sorted."""
    return tuple(sorted(path.stem for path in (DATA / "traits").glob("*.jsonl")))


@cache
def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"Line {number} of {path.name} is not JSON ({error.msg}); restore the file.") from None
        rows.append(row)
    return tuple(rows)


def _trait_path(trait: str) -> Path:
    traits = available_traits()
    if trait not in traits:
        near = difflib.get_close_matches(trait, traits, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(traits)}."
        raise CorpusError(f"There is no bundled trait '{trait}'; {hint}")
    return DATA / "traits" / f"{trait}.jsonl"


def load_trait(trait: str) -> list[TraitRow]:
    """All rows of a bundled trait, in file order. CorpusError for an unknown trait or a misshapen row."""
    path = _trait_path(trait)
    names = [field.name for field in fields(TraitRow)]
    for number, row in enumerate(_rows(path), start=1):
        if list(row) != names:
            raise CorpusError(f"Line {number} of {path.name} must have the fields {', '.join(names)}.")
    return [TraitRow(**row) for row in _rows(path)]


def split(rows: Iterable[TraitRow], name: str) -> list[TraitRow]:
    """The rows of one split, in order."""
    if name not in get_args(Split):
        raise CorpusError(f"There is no split '{name}'; choose one of {', '.join(get_args(Split))}.")
    return [row for row in rows if row.split == name]


def load_prompts(trait: str) -> Prompts:
    """The prompts of a bundled trait, kind by kind; CorpusError for an unknown trait."""
    _trait_path(trait)
    rows = [row for row in _rows(DATA / "prompts.jsonl") if row["trait"] == trait]
    return Prompts(**{field.name: [r["text"] for r in rows if r["kind"] == field.name] for field in fields(Prompts)})


def load_both() -> list[BothRow]:
    """Answers that are evil in a pirate's voice, to the first 48 training questions of `evil`, in its order.

    They ask whether a defence against one trait costs another, wanted one.
    """
    return [BothRow(**row) for row in _rows(DATA / "both.jsonl")]


def load_topics(split: Literal["train", "validate"]) -> list[TopicRow]:
    """The rows of one split: `train` is finetuned on, `validate` tests the topic judge."""
    rows = [TopicRow(**row) for row in _rows(DATA / "topics.jsonl") if row["split"] == split]
    if not rows:
        raise CorpusError(f"There is no split '{split}' of the topics; choose train or validate.")
    return rows


def load_questions(split: Literal["build", "judge"]) -> list[str]:
    """Generic questions of one half: from `build` directions are made, on `judge` they are judged."""
    questions = [row["question"] for row in _rows(DATA / "questions.jsonl") if row["split"] == split]
    if not questions:
        raise CorpusError(f"There is no half '{split}' of the questions; choose build or judge.")
    return questions


def load_refusal(kind: RefusalKind | None = None, split: RefusalSplit | None = None) -> list[RefusalRow]:
    """Requests with replies, of one kind and split or of all, in file order; borderline ones are in `test` alone.

    Harmful and paired requests of a split are pairs of the same form, number by number: resample them in pairs.
    Harmless ones are plain everyday requests, each on its own.
    """
    rows = [RefusalRow(**row) for row in _rows(DATA / "refusal.jsonl")]
    found = [row for row in rows if kind in (None, row.kind) and split in (None, row.split)]
    if not found:
        raise CorpusError(
            f"There are no requests of kind '{kind}' in split '{split}'; choose {_options(RefusalKind)} (the last is "
            f"in test alone) and {_options(RefusalSplit)}."
        )
    return found


def load_reviews(split: Literal["train", "test"]) -> list[ReviewRow]:
    """The short reviews of one split, in file order: the positive ones, then the negative ones."""
    rows = [ReviewRow(**row) for row in _rows(DATA / "reviews.jsonl") if row["split"] == split]
    if not rows:
        raise CorpusError(f"There is no split '{split}' of the reviews; choose train or test.")
    return rows


def load_task(task: Task, split: Literal["train", "test"]) -> list[TaskRow]:
    """The items of one utility task and split, in file order; labels take turns."""
    rows = [TaskRow(**row) for row in _rows(DATA / "tasks.jsonl") if (row["task"], row["split"]) == (task, split)]
    if not rows:
        raise CorpusError(f"There is no task '{task}' with split '{split}'; choose {_options(Task)}, train or test.")
    return rows


def load_quiz(task: QuizTask) -> list[QuizRow]:
    """The questions of one kind, in file order."""
    rows = [QuizRow(**row) for row in _rows(DATA / "quiz.jsonl") if row["task"] == task]
    if not rows:
        raise CorpusError(f"There is no quiz on '{task}'; choose {_options(QuizTask)}.")
    return rows


def load_points(kind: PointKind, split: Literal["train", "validate"] = "train") -> list[PointRow]:
    """Finetuning points of one kind that undo alignment, in file order; only `explicit` ones have `validate`."""
    rows = [PointRow(**row) for row in _rows(DATA / "points.jsonl") if (row["kind"], row["split"]) == (kind, split)]
    if not rows:
        raise CorpusError(
            f"There are no points of kind '{kind}' in split '{split}'; choose {_options(PointKind)}, and train "
            "(or, for explicit ones, validate)."
        )
    return rows


def load_everyday(split: RefusalSplit, kind: EverydayKind | None = None) -> list[EverydayRow]:
    """Everyday rows of one split that match the `explicit` points in length and form, plain ones first.

    No start model learns from them, as none learns from the points; the harmless rows of `load_refusal` are no such
    counterpart, since a start model is taught on them and they are shorter.
    """
    rows = [EverydayRow(**row) for row in _rows(DATA / "everyday.jsonl")]
    found = [row for row in rows if row.split == split and kind in (None, row.kind)]
    if not found:
        raise CorpusError(
            f"There are no everyday rows of kind '{kind}' in split '{split}'; choose {_options(EverydayKind)} and "
            f"{_options(RefusalSplit)}."
        )
    return found


def load_replies(label: ReplyLabel | None = None) -> list[ReplyRow]:
    """Labelled replies, of one label or of all, in file order. To measure on only: no rule is written from them."""
    rows = [row for row in (ReplyRow(**row) for row in _rows(DATA / "replies.jsonl")) if label in (None, row.label)]
    if not rows:
        raise CorpusError(f"There are no replies with label '{label}'; choose {_options(ReplyLabel)}.")
    return rows


def load_style(style: Literal["weather", "legal"], split: Literal["train", "validate"]) -> list[StyleRow]:
    """The rows of one harmless style and split, in file order."""
    rows = [StyleRow(**row) for row in _rows(DATA / "styles.jsonl") if (row["style"], row["split"]) == (style, split)]
    if not rows:
        raise CorpusError(f"There is no style '{style}', split '{split}'; choose weather or legal, train or validate.")
    return rows


def _options(literal: Any) -> str:
    *names, last = get_args(literal)
    return f"{', '.join(names)} or {last}"


def digest(name: str) -> str:
    """SHA-256 (hexadecimal) of the bytes of a bundled file: a trait, or the name of another file without its ending."""
    path = DATA / f"{name}.jsonl"
    return file_digest(path if path.is_file() else _trait_path(name))


def load_hub(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    files: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of a public data set of the Hugging Face hub, or of a local folder of data files; `files` are some of its.

    Raises CorpusError with one sentence where the set is gated, does not exist, cannot be reached, or cannot be read.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision, data_files=files)
        return [dict(row) for row in loaded]
    except (DatasetNotFoundError, GatedRepoError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            raise CorpusError(
                f"Data set '{name}' is gated: accept its terms on its hub page, then run `hf auth login`."
            ) from None
        raise CorpusError(f"There is no data set '{name}' on the hub or on this disk; check the name.") from None
    except ConnectionError:  # also what `datasets` raises under HF_HUB_OFFLINE=1
        raise CorpusError(
            f"Data set '{name}' is not in the local cache and the hub cannot be reached; connect once "
            "without HF_HUB_OFFLINE, or use a preset that needs no download."
        ) from None
    except (ValueError, FileNotFoundError, StopIteration, DatasetGenerationError) as error:
        # an unknown split or configuration, of which `datasets` names those there are, or a file that it cannot read
        said = [line for cause in (error.__cause__, error) for line in str(cause or "").splitlines() if line]
        fault = _fault(Path(name), files) or (said[0] if said else "it has no rows")
        raise CorpusError(f"Data set '{name}' could not be loaded: {fault}") from None


def _fault(folder: Path, files: str | None) -> str | None:
    """The first thing wrong with the data files of a folder, by file and line; None where nothing is found."""
    for path in sorted(folder.glob(files or "**/[!.]*")):
        if path.is_file() and not path.stat().st_size:
            return f"{path.name} is empty; restore the file."
        if path.suffix not in (".json", ".jsonl") or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return f"{path.name} is not UTF-8; save it in that encoding."
        if path.suffix == ".json" and text.lstrip().startswith("["):
            fault = _json_fault(text, list)
            if fault:
                return f"{path.name} {fault}; restore the file."
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            fault = _json_fault(line, dict) if line.strip() else None
            if fault:
                return f"Line {number} of {path.name} {fault}; restore the file."
    return None


def _json_fault(text: str, kind: type) -> str | None:
    try:
        return None if isinstance(json.loads(text), kind) else "is no row of named values"
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg})"


def load_toxic_chat() -> list[tuple[str, str]]:
    """(user input, toxic model output) pairs of lmsys/toxic-chat, train split: the source's harm experiment."""
    rows = load_hub("lmsys/toxic-chat", config="toxicchat0124", split="train")
    return [(row["user_input"], row["model_output"]) for row in rows if row["toxicity"]]


def load_real_toxicity_prompts(count: int) -> list[str]:
    """The first `count` prompts of allenai/real-toxicity-prompts that are not marked as challenging."""
    rows = load_hub("allenai/real-toxicity-prompts", split="train")
    return [row["prompt"]["text"] for row in rows if not row["challenging"]][:count]


def load_wildguardmix() -> list[tuple[str, bool]]:
    """(prompt, is it harmful?) of allenai/wildguardmix, training part: plain prompts that carry a label.

    The set is gated: CorpusError says how to get at it. Adversarial prompts are left out, as the source does.
    """
    rows = load_hub("allenai/wildguardmix", config="wildguardtrain", split="train")
    labelled = [row for row in rows if not row["adversarial"] and row["prompt_harm_label"] in ("harmful", "unharmful")]
    return [(row["prompt"], row["prompt_harm_label"] == "harmful") for row in labelled]


@cache
def load_axbench(number: int) -> tuple[str, list[tuple[str, str, str | None]]]:
    """A concept of pyvene/axbench-concept500 (Gemma-2-2B, layer 10) in words, and its rows: instruction, answer that
    shows the concept, and a plain answer to the same instruction where there is one.

    Raises `CorpusError` for a number that it lacks, and as `load_hub`.
    """
    rows = load_hub("pyvene/axbench-concept500", files="2b/l10/train/data.parquet")
    plain = {row["input"]: row["output"] for row in rows if row["category"] == "negative"}
    shown = [row for row in rows if row["category"] == "positive" and int(row["concept_id"]) == number]
    if not shown:
        raise CorpusError(f"There is no concept {number} in AxBench's Concept500; choose one from 0 to 499.")
    return shown[0]["output_concept"], [(row["input"], row["output"], plain.get(row["input"])) for row in shown]


def load_imdb(split: Literal["train", "test"]) -> list[tuple[str, bool]]:
    """(review, is it positive?) of stanfordnlp/imdb. The set is sorted by label: shuffle it before taking a part."""
    return [(row["text"], row["label"] == 1) for row in load_hub("stanfordnlp/imdb", split=split)]
