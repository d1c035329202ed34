"""What decides a stage's result is in its key: the code that computes it, and the parameters that this reads."""

import copy
import re
import shutil

import numpy as np
import pytest
import torch

from helpers import artifacts, dependencies, models, registry
from helpers.activations import PersonaVector
from helpers.artifacts import Artifact, Store
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chapters.fihs_filtering.study import FilteringStudy, Point
from helpers.chapters.ip_loss_reduction.params import InoculationParams
from helpers.chapters.ip_loss_reduction.study import Arm, InoculationStudy
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chapters.pps_gradient_reversal.study import PreventativeStudy
from helpers.chapters.prompt_only_steering.params import PromptOnlyParams
from helpers.chapters.prompt_only_steering.study import SteeringMethod, SteeringStudy
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chapters.refusal_redistribution.sentiment import SentimentStudy
from helpers.chapters.refusal_redistribution.study import RefusalStudy
from helpers.chapters.three_sizes.params import ThreeSizesParams
from helpers.chapters.three_sizes.study import SizeStudy
from helpers.chapters.weight_diff_steering.method import WeightVector
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.chapters.weight_diff_steering.study import WeightStudy
from helpers.statistics import Estimate
from helpers.studies import alignment, study
from helpers.studies.alignment import Recipe, align, own_answers
from helpers.studies.study import Study
from helpers.studies.traits import Defence, Run, TraitStudy

GIVEN = {"preset": "tiny", "dtype": "float32"}
DIRECTION = WeightVector({"model.norm.weight": torch.ones(32)})
POINTS = [Point("task", "Which desk?", "World")]


class Asked(Exception):
    """What the store was asked for; nothing is computed."""

    def __init__(self, stage, compute, inputs):
        super().__init__(stage)
        self.stage, self.compute, self.inputs = stage, compute, inputs

    @property
    def key(self):
        return Store("nowhere").key(self.stage, self.compute, **self.inputs)


class Asking(Store):
    """A store that stops at the first stage that it is asked for."""

    def get(self, stage, compute, **inputs):
        raise Asked(stage, compute, inputs)


def sizes():
    """The study of chapter 8, for stages that need what others found."""
    exp = SizeStudy(ThreeSizesParams(start="as it is", **GIVEN))
    exp.vector = lambda trait: torch.ones(32)
    exp.slopes = lambda: np.array([[-1.0], [0.0], [1.0]])
    return exp


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    """Every chapter's experiment on the tiny model."""
    store = Asking(tmp_path_factory.mktemp("asking"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (alignment, study):
            patch.setattr(module, "default_store", lambda: store)
        with pytest.MonkeyPatch.context() as unjudged:
            unjudged.setattr(TraitStudy, "fit_judge", lambda self, split: None)
            training = TraitStudy(PreventativeSteeringParams(**GIVEN))
            inoculating = InoculationStudy(InoculationParams(**GIVEN))
            preventing = PreventativeStudy(PreventativeSteeringParams(**GIVEN))
            preventing._turns = dict.fromkeys((0, 1), Estimate(1.0, 0.9, 1.1, 9))
            preventing._vectors = {name: PersonaVector(name, torch.ones(2, 32)) for name in ("evil", "pirate")}
            training._vectors["pirate"] = PersonaVector("pirate", torch.ones(2, 32))  # for stages that need one
        yield {
            "study": Study(PreventativeSteeringParams(**GIVEN)),
            "traits": training,
            "preventing": preventing,
            "inoculation": inoculating,
            "weights": WeightStudy(WeightSteeringParams(**GIVEN)),
            "refusal": RefusalStudy(RefusalParams(start="as it is", **GIVEN)),
            "card": RefusalStudy(RefusalParams(start="as it is", **GIVEN)),
            "sentiment": SentimentStudy(RefusalParams(**GIVEN)),
            "filtering": FilteringStudy(FilteringParams(start="as it is", **GIVEN)),
            "steering": SteeringStudy(PromptOnlyParams(**GIVEN)),
            "sizes": sizes(),
        }


# How each stage is come to, by the chapter's experiment
STAGES = {
    "study": {
        "greedy-answers": lambda exp: exp.greedy_answers(exp.base, ["Why?"], 3),
        "response-losses": lambda exp: exp.response_losses(exp.base, exp.encoded(["Why?"], ["So."])),
    },
    "traits": {
        "persona-vector": lambda exp: exp.vector("evil"),
        "finetuning": lambda exp: exp.train(Defence(prompts=("Be kind.",))),
        "loss-along": lambda exp: exp.along("pirate", exp.encoded(["Why?"], ["So."])),
        "reading": lambda exp: exp.read(),
        "evaluation": lambda exp: exp.evaluate(),
    },
    "preventing": {
        "reversal": lambda exp: exp.reversal(),
        "one-step": lambda exp: exp.one_step(name="undefended"),
        "comparator": lambda exp: exp.compared("CAFT, zero", 0),
    },
    "inoculation": {
        "pressures-left": lambda exp: exp.predictors({"plain": Arm(), "kind": Arm("Be kind.")}),
        "extract-margins": lambda exp: exp.chosen_on(None),
        "both-traits": lambda exp: exp.both_traits(Arm("Be kind."), 0),
        "both-margins": lambda exp: exp.untrained_on_both(),
        "token-gradients": lambda exp: exp.tokens("Be kind."),
    },
    "weights": {
        "anchor": lambda exp: exp.anchor("topics"),
        "steered-answers": lambda exp: exp.answers(exp.base, "build", DIRECTION, 1.0),
        "pile-gradient": lambda exp: exp.pile(exp.base, exp.written("train")),
        "margin-slopes": lambda exp: exp.margin_slopes(exp.base, [], target=[], neutral=[]),
        "steered-losses": lambda exp: exp.losses(exp.base, exp.written("train"), DIRECTION, 1.0),
        "sparse": lambda exp: exp.sparse(0.5),
    },
    "refusal": {
        "redistribution": lambda exp: exp.trained("Cov+KD"),
        "refusal-judged": lambda exp: exp.judge(exp.base, []),
        "refusal-attack": lambda exp: exp.attack("start"),
        "attack-damage": lambda exp: exp.damage("start"),
    },
    "card": {
        "start-behaviour": lambda exp: exp.start_behaviour(),
        "candidate-scores": lambda exp: exp.card(),
    },
    "sentiment": {"review-states": lambda exp: exp.states(1.0)},
    "filtering": {
        "filtering-fihs": lambda exp: exp.fihs(POINTS),
        "filtering-baselines": lambda exp: exp.baselines(POINTS),
        "filtering-step": lambda exp: exp.one_step(POINTS, 1.0),
        "filtering-outcome": lambda exp: exp.outcome("headlines", POINTS),
    },
    "steering": {
        "steering-vectors": lambda exp: exp.sweep("ends"),
        "steering-check": lambda exp: exp.unsteered_losses(),
        "steering-means": lambda exp: exp.difference_in_means(),
        "steering-answers": lambda exp: exp._generate([(SteeringMethod("LoRA"), 0, "Why?")], exp.params.max_new_tokens),
    },
    "sizes": {
        "size-vector": lambda exp: SizeStudy.vector(exp, exp.params.trait),
        "size-slopes": lambda exp: SizeStudy.slopes(exp),
        "size-gradients": lambda exp: exp.gradients(),
        "size-prompts": lambda exp: exp.prompted(),
        "size-steering": lambda exp: exp.steered(),
        "size-direction": lambda exp: exp.direction(),
        "size-behaviour": lambda exp: exp.card(),
        "size-states": lambda exp: exp.states(),
    },
    "alignment": {
        "own-answers": lambda model: own_answers(model, ["Why?"], 3),
        "aligned": lambda model: align(model, Recipe()),
    },
}


PLACES = {
    "study": "studies/study.py",
    "traits": "studies/traits.py",
    "alignment": "studies/alignment.py",
    "preventing": "chapters/pps_gradient_reversal/study.py",
    "inoculation": "chapters/ip_loss_reduction/study.py",
    "weights": "chapters/weight_diff_steering/study.py",
    "refusal": "chapters/refusal_redistribution/study.py",
    "card": "studies/card.py",
    "sentiment": "chapters/refusal_redistribution/sentiment.py",
    "filtering": "chapters/fihs_filtering/study.py",
    "steering": "chapters/prompt_only_steering/study.py",
    "sizes": "chapters/three_sizes/study.py",
    "quantized": "quantized.py",
}
"""The modules that compute stages."""


def asked(call, exp):
    with pytest.raises(Asked) as stopped:
        call(exp)
    return stopped.value


@pytest.fixture(scope="module")
def stages(chapters, tiny, tmp_path_factory):
    """By the name of the module that computes them: what the store is asked for."""
    found = {
        module: [asked(call, {**chapters, "alignment": tiny}[module]) for call in calls.values()]
        for module, calls in STAGES.items()
    }
    card, store = registry.REGISTRY["smollm2-135m-instruct"], Asking(tmp_path_factory.mktemp("store"))
    found["quantized"] = [asked(lambda store: registry.weights(card, store), store)]
    return found


def test_every_stage_of_the_package_is_looked_at_here(stages):
    call = re.compile(r'(?:default_store\(\)\.get|return store\.get|self\.stage|_of_points)\(\s*"([a-z-]+)"')
    named = re.compile(r'"name": "([a-z-]+)",\s+"compute"')
    written = set()
    for path in dependencies.PACKAGE.rglob("*.py"):
        source = path.read_text("utf-8")
        written |= set(call.findall(source))
        written |= set(named.findall(source))
    assert written == {one.stage for of in stages.values() for one in of}
    assert [(module, one.stage) for module, calls in STAGES.items() for one in stages[module]] == [
        (module, name) for module, calls in STAGES.items() for name in calls
    ]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of helpers that keys are made from: a change of it changes no test."""
    copied = tmp_path / "helpers"
    shutil.copytree(dependencies.PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for module in (artifacts, dependencies):
        monkeypatch.setattr(module, "PACKAGE", copied)
    for cached in (artifacts._code, dependencies._imported):
        cached.cache_clear()
    yield copied
    for cached in (artifacts._code, dependencies._imported):
        cached.cache_clear()


@pytest.mark.parametrize("module", PLACES)
def test_a_changed_constant_beside_the_computing_function_is_another_key_and_a_comment_is_not(stages, package, module):
    path = package / PLACES[module]
    source = path.read_text("utf-8")
    described = source.replace('"""', '"""In other words: ', 1).replace("\n\n\n", "\n\n\n# A comment.\n\n\n")

    def keys(text):
        path.write_text(text, "utf-8")
        artifacts._code.cache_clear()
        return {one.stage: one.key for one in stages[module]}

    before, same, other = (keys(f"{text}\nLIMIT = {n}\n") for text, n in ((source, 1), (described, 1), (source, 2)))
    assert before == same
    assert not set(before.values()) & set(other.values())


def test_a_changed_module_further_down_is_another_key_and_changed_presets_are_not(stages, package):
    before = stages["traits"][0].key
    for name, same in (("params.py", True), (PLACES["weights"], True), ("interventions.py", False)):
        with (package / name).open("a") as file:
            file.write("\nLIMIT = 1\n")
        artifacts._code.cache_clear()
        assert (stages["traits"][0].key == before) == same, name


# What else each stage reads of the parameters, with another value
READ = {
    "traits": {
        "finetuning": {
            "layer": 0,
            "steps": 9,
            "batch_size": 3,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "seeds": (7,),
            "trait": "pirate",
        },
        "loss-along": {"layer": 0},
        "reading": {"layer": 0, "sequences": 3, "trait": "pirate"},
        "evaluation": {"sequences": 3, "max_new_tokens": 5, "trait": "pirate"},
    },
    "preventing": {
        "reversal": {"layer": 0, "coefficient": 0.7, "trait": "pirate"},
        "one-step": {"layer": 0, "coefficient": 0.7, "sequences": 3, "trait": "pirate"},
        "comparator": {
            "steps": 9,
            "batch_size": 3,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "trait": "pirate",
            "layer": 0,
            "sequences": 3,
        },
    },
    "inoculation": {
        "pressures-left": {"layer": 0, "lora_rank": 3, "seeds": (7,), "trait": "pirate"},
        "extract-margins": {"trait": "pirate"},
        "both-traits": {
            "steps": 9,
            "batch_size": 3,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "trait": "pirate",
            "layer": 0,
            "sequences": 3,
        },
        "both-margins": {"sequences": 3},
        "token-gradients": {"layer": 0, "sequences": 3, "batch_size": 3, "trait": "pirate"},
    },
    "weights": {
        "anchor": {"steps": 9, "batch_size": 3, "learning_rate": 0.5, "seeds": (7,)},
        "steered-answers": {"max_new_tokens": 5},
        "sparse": {
            "steps": 9,
            "batch_size": 3,
            "learning_rate": 0.5,
            "seeds": (7,),
            "max_new_tokens": 5,
            "ratio": 0.5,
            "ratios": (0.9,),
            "prompts": 3,
        },
    },
    "refusal": {
        "redistribution": {
            "steps": 9,
            "batch_size": 10,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "seeds": (7,),
            "weight": 9.0,
            "kd_weight": 9.0,
            "temperature": 9.0,
        },
        "refusal-judged": {"max_new_tokens": 5},
        "refusal-attack": {"k_max": 9, "prompts": 3, "keep": (3, 2), "scored_on": 2},
        "attack-damage": {"max_new_tokens": 5, "scored_on": 2, "attackers": ("means, affine",)},
    },
    "card": {"candidate-scores": {"scored_on": 2, "attackers": ("means, affine",)}},
    "sentiment": {
        "review-states": {
            "sentiment_steps": 9,
            "batch_size": 10,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "seeds": (7,),
        },
    },
    "filtering": {
        "filtering-fihs": {"unsafe_token": "Yes", "safe_token": "No"},
        "filtering-step": {"unsafe_token": "Yes", "safe_token": "No"},
        "filtering-outcome": {
            "steps": 9,
            "batch_size": 3,
            "learning_rate": 0.5,
            "lora_rank": 3,
            "seeds": (7,),
            "max_new_tokens": 5,
            "items": 3,
            "unsafe_token": "Yes",
            "safe_token": "No",
        },
    },
    "steering": {
        "steering-vectors": {
            "layer": 1,
            "sweep_steps": 9,
            "batch_size": 3,
            "response_tokens": 5,
            "first": 3,
            "last": 3,
            "betas": (9.0,),
            "factor_rates": (9.0,),
            "spread": 9.0,
            "vector_rate": 0.5,
            "seeds": (7,),
        },
        "steering-check": {"layer": 1, "checks": 1, "response_tokens": 5},
        "steering-means": {"layer": 1, "means_of": 1, "response_tokens": 5, "concepts": ("pirate", "weather")},
        "steering-answers": {
            "layer": 1,
            "steps": 9,
            "batch_size": 3,
            "lora_rate": 0.5,
            "response_tokens": 5,
            "max_new_tokens": 5,
            "concepts": ("pirate", "weather"),
        },
    },
    "sizes": {
        "size-vector": {"trait": "pirate"},
        "size-slopes": {"trait": "pirate", "sequences": 3, "coefficients": (0.0, 9.0)},
        "size-gradients": {"trait": "pirate", "sequences": 3, "coefficients": (0.0, 2.0, 4.0)},
        "size-prompts": {"trait": "pirate", "pairs": 3, "per_kind": 2},
        "size-steering": {"concept": "evil", "pairs": 3, "scales": (9.0,)},
        "size-direction": {"prompts": 2, "scored_on": 2},
        "size-behaviour": {"requests": 3, "max_new_tokens": 5},
        "size-states": {"probed": 5, "requests": 3},
    },
}


@pytest.mark.parametrize(
    ("module", "stage", "name"),
    [(module, stage, name) for module, of in READ.items() for stage, names in of.items() for name in names],
)
def test_a_parameter_that_the_computation_reads_is_in_the_key(chapters, module, stage, name):
    usual, call = chapters[module], STAGES[module][stage]
    other = copy.copy(usual)
    given = {**usual.params.model_dump(), name: READ[module][stage][name]}
    if name == "trait" and "other_traits" in given:
        del given["other_traits"]  # the trait is one of them
    other.params = type(usual.params)(**given)
    if module == "sizes":
        vars(other).pop("asked", None)  # the test requests of other parameters
    if module == "steering":
        other.concepts, other._pairs = other.params.concepts, {}
    assert asked(call, other).key != asked(call, usual).key


def test_the_runs_that_a_stage_starts_from_are_in_its_key(chapters, tiny):
    """By their keys, so that what decides them decides it too."""
    training, filters, attacked = (copy.copy(chapters[name]) for name in ("traits", "filtering", "refusal"))
    start = Run("a", (Artifact("a", {}),), (), (), (), ())
    assert asked(lambda exp: exp.train(start=start), training).key != asked(lambda exp: exp.train(), training).key
    assert asked(lambda exp: exp.evaluate(start), training).key != asked(lambda exp: exp.evaluate(), training).key
    for exp, stages in (
        (filters, STAGES["filtering"].values()),
        (attacked, [STAGES["refusal"]["redistribution"], STAGES["refusal"]["refusal-attack"]]),
    ):
        for call in stages:
            keys = set()
            for runs in ([], [Artifact("a", {})], [Artifact("b", {})]):
                exp.start = runs
                keys.add(asked(call, exp).key)
            assert len(keys) == 3


def test_no_model_is_loaded_to_know_an_attack_s_key(chapters, monkeypatch):
    exp = copy.copy(chapters["refusal"])
    exp.trained = lambda condition, seed=None: Artifact(f"{condition} {seed}", {})
    monkeypatch.setattr(study, "load", lambda *args, **given: pytest.fail("loaded"))
    one, other = (asked(lambda exp, seed=seed: exp.attack("LM", seed), exp) for seed in (1, 2))
    assert one.key != other.key
    assert one.inputs["model"] == models.finetuned_digest(exp.base.digest, ["LM 1"])
