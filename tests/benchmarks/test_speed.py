"""What steering, capture, gradients, the finetuning loop, the attack and scoring cost, as ratios measured in one run.

Contestants take turns, so that a busy machine slows them alike: in each round the others are timed just before ours, a
ratio is that of two neighbours, and the median over rounds counts. Ours is what pytest-benchmark times and what its
table shows. Everything measured is printed (`pytest -s`) and kept in `extra_info`.
"""

import math
import statistics
import time
import warnings
from functools import partial

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch.nn.functional import cosine_similarity

from helpers.activations import PersonaVector
from helpers.chapters.fihs_filtering.method import fihs
from helpers.chapters.fihs_filtering.params import FilteringParams
from helpers.chapters.fihs_filtering.study import FilteringStudy
from helpers.chapters.pps_gradient_reversal.params import PreventativeSteeringParams
from helpers.chapters.prompt_only_steering.method import Pair, Run, States, train_vectors
from helpers.chapters.prompt_only_steering.params import PromptOnlyParams
from helpers.chapters.prompt_only_steering.study import SteeringMethod, SteeringStudy
from helpers.chapters.refusal_redistribution.params import RefusalParams
from helpers.chapters.refusal_redistribution.study import RefusalStudy
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.chat import Example, collate, encode, training_batches
from helpers.corpora import load_questions, load_trait, split
from helpers.generation import generate
from helpers.gradients import activation_gradients, pile_gradient
from helpers.losses import evaluate_losses, sequence_sums
from helpers.models import LoRA, load, plain_model
from helpers.studies.ablation_scores import choose, score_by_halving, score_exhaustively
from helpers.studies.defences import preventative_steering
from helpers.studies.directions import candidate_directions, header_positions
from helpers.training import finetune, finetune_stack

PARAMS = PreventativeSteeringParams(preset="quick")
BATCH = PARAMS.batch_size


@pytest.fixture(scope="module", autouse=True)
def without_type_checks():
    """They are a part of the tests, not of the helpers."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def examples(tokenizer, name, count):
    rows = split(load_trait(PARAMS.trait), name)[:count]
    return [encode(tokenizer, row.question, row.strong) for row in rows]


def seconds(work):
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(benchmark, ours, others, rounds):
    """Seconds of each contestant in each round, after a round of warm-up."""
    times = {name: [] for name in others}

    def the_others():
        for name, work in others.items():
            times[name].append(seconds(work))

    benchmark.pedantic(ours, setup=the_others, rounds=rounds, warmup_rounds=1)
    return {"ours": list(benchmark.stats.stats.data), **{name: found[-rounds:] for name, found in times.items()}}


def ratio(one, other):
    """The median over rounds of one contestant's seconds by the other's."""
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def by_ours(times):
    """How many times ours each of the others takes."""
    return {f"{name} / ours": ratio(found, times["ours"]) for name, found in times.items() if name != "ours"}


def medians(times):
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def meets(ratios, name, *, at_least=None, at_most=None):
    """The goal for a ratio; where it is missed, the test says which and by how much."""
    assert at_least is None or ratios[name] >= at_least, f"{name} is {ratios[name]}, and the goal is {at_least} or more"
    assert at_most is None or ratios[name] <= at_most, f"{name} is {ratios[name]}, and the goal is {at_most} or less"


def report(benchmark, **figures):
    benchmark.extra_info.update(figures)
    print("\n" + "\n".join(f"  {name}: {value}" for name, value in figures.items()))


# Steering and capture


def losses_of(plain, batch):
    """The response loss of each sequence on the plain model, as helpers.losses has it."""
    last = plain.model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]
    logits = plain.lm_head(last[batch.predicting])
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.ids[batch.response], reduction="none")
    rows = batch.predicting.nonzero()[:, 0]
    return torch.zeros(BATCH, device=losses.device).index_add(0, rows, losses) / batch.response.sum(1)


def test_steering_and_capture_cost_little_more_than_the_plain_passes(benchmark):
    """At most 1.15 times the plain model's forward and backward pass, with the same loss, batch and precision.

    Capture computes no weight gradients, so it should be well below. What the hooks themselves cost is seen against a
    plain pass that is frozen too and cut at the same block, with hooks that are torch's own.
    """
    model = load(PARAMS.model)
    plain, frozen = (plain_model(PARAMS.model)[0].to(model.device) for _ in range(2))
    frozen.requires_grad_(False)
    batch = collate(examples(model.tokenizer, "eval", BATCH), model.tokenizer.pad_token_id).to(model.device)
    vector = PersonaVector("random", torch.randn(model.layers, model.width))
    steer = preventative_steering(vector, PARAMS.layer, 0.1)

    def ours():
        activation_gradients(model, batch, [PARAMS.layer], interventions=[steer])

    def whole():
        with model.autocast():
            losses_of(plain, batch).sum().backward()
        plain.zero_grad(set_to_none=True)

    def whole_with_every_logit():
        with model.autocast():
            labels = torch.where(batch.response, batch.ids, -100)
            plain(input_ids=batch.ids, attention_mask=batch.attention.long(), labels=labels).loss.backward()
        plain.zero_grad(set_to_none=True)

    def cut(module):
        leaf = []

        def hook(module, args, out):
            leaf.append(out.detach().requires_grad_())
            return leaf[0]

        handle = module.register_forward_hook(hook)
        with model.autocast():
            torch.autograd.grad(losses_of(frozen, batch).sum(), leaf)
        handle.remove()

    others = {
        "plain": whole,
        "plain, logits everywhere": whole_with_every_logit,
        "plain, frozen": lambda: cut(frozen.model.embed_tokens),
        "plain, frozen, cut at the block": lambda: cut(frozen.model.layers[PARAMS.layer]),
    }
    found = take_turns(benchmark, ours, others, rounds=7)
    ratios = {f"ours / {name}": ratio(found["ours"], found[name]) for name in others}
    report(benchmark, precision=str(model.dtype), tokens=int(batch.attention.sum()), seconds=medians(found), **ratios)
    meets(ratios, "ours / plain", at_most=1.15)
    meets(ratios, "ours / plain, frozen", at_most=1.15)


# Pile gradients


def test_a_batched_pile_gradient_is_faster_than_one_example_at_a_time(benchmark):
    """At least 3 times as fast on the same pile, model and precision; in the source one example at a time is added up.

    The pile is like the chapter's: the base model's answers to questions for building. One at a time is ours
    with batches of one, which shares all savings but batching, and as a user would write it: the plain model with
    Hugging Face's loss.
    """
    params = WeightSteeringParams(preset="quick")
    model = load(params.model)
    plain, tokenizer = plain_model(params.model)
    plain = plain.to(model.device)
    questions = load_questions("build")[:16]
    prompts = [encode(tokenizer, question) for question in questions]
    answers = generate(model, prompts, max_new_tokens=params.max_new_tokens)
    pile = [encode(tokenizer, *pair) for pair in zip(questions, answers, strict=True)]

    def ours():
        pile_gradient(model, pile)

    def batches_of_one():
        pile_gradient(model, pile, batch_size=1)

    def by_hand():
        for example in pile:
            ids = torch.tensor([example.ids], device=model.device)
            labels = ids.clone()
            labels[:, : example.prompt_length] = -100
            with model.autocast():
                (plain(input_ids=ids, labels=labels, use_cache=False).loss / len(pile)).backward()
        plain.zero_grad(set_to_none=True)

    found = take_turns(benchmark, ours, {"one at a time": batches_of_one, "plain, by hand": by_hand}, rounds=3)
    tokens, ratios = sum(len(example) for example in pile), by_ours(found)
    report(benchmark, precision=str(model.dtype), tokens=tokens, seconds=medians(found), **ratios)
    meets(ratios, "one at a time / ours", at_least=3)


# Finetuning

STEPS = 4


class Stopwatch:
    """From the first step to the last, without the Trainer's own setting up."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Watch(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                self.start = time.perf_counter()

            def on_train_end(self, *args, **kwargs):
                self.seconds = time.perf_counter() - self.start

        return Watch()


def the_trainer(hf, tokenizer, data, dtype, folder):
    """`transformers.Trainer` as a user would set it up: padded batches in random order, loss on the response only."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    watch = Stopwatch()
    rows = [
        {"input_ids": list(e.ids), "labels": [-100] * e.prompt_length + list(e.ids[e.prompt_length :])} for e in data
    ]
    trainer = Trainer(
        model=hf,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=1e-5,
            weight_decay=0.01,
            max_grad_norm=1.0,
            warmup_steps=0,
            optim="adamw_torch_fused",
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[watch],
    )
    trainer.train()
    return watch.seconds


def matmul_peak(model, rows):
    """FLOP/s of a matrix product of the shape of the model's MLP, at its precision."""
    width, inner = model.hf.config.hidden_size, model.hf.config.intermediate_size
    a, b = (torch.randn(*shape, device=model.device, dtype=model.dtype) for shape in ((rows, width), (width, inner)))

    def multiply():
        for _ in range(50):
            a @ b

    multiply()
    return 50 * 2 * math.prod((rows, width, inner)) / min(seconds(multiply) for _ in range(7))


@pytest.mark.parametrize("rank", [0, PARAMS.lora_rank], ids=["all weights", "LoRA"])
def test_finetuning_is_faster_than_transformers_trainer(benchmark, rank, tmp_path):
    """At least 1.3 times the Trainer's tokens (padding not counted) per second: same model, examples, batch size,
    optimizer and precision."""
    warnings.simplefilter("ignore")
    lora = LoRA(rank) if rank else None
    model = load(PARAMS.model, lora=lora)
    plain, tokenizer = plain_model(PARAMS.model)
    plain.set_attn_implementation("sdpa")  # what a user gets, and faster than the eager attention that hooks need
    if rank:
        from peft import LoraConfig, get_peft_model

        plain = get_peft_model(
            plain, LoraConfig(r=rank, lora_alpha=lora.alpha, use_rslora=True, target_modules="all-linear")
        )
    data = examples(tokenizer, "train", BATCH * STEPS)
    tokens = sum(len(e) for e in data)  # each example once, on either side
    ours, theirs = [], []

    def ours_once():
        batches = training_batches(
            lambda rng: data, steps=STEPS, batch_size=BATCH, seed=len(ours), pad_id=tokenizer.pad_token_id
        )
        log = finetune(model, batches, steps=STEPS, learning_rate=1e-5, seed=0, warmup=0.0)
        assert log.tokens == tokens
        ours.append(log.seconds)

    def theirs_once():
        theirs.append(the_trainer(plain, tokenizer, data, model.dtype, tmp_path))

    rounds = 3
    take_turns(benchmark, ours_once, {"Trainer": theirs_once}, rounds=rounds)
    times = {"ours": ours[-rounds:], "Trainer": theirs[-rounds:]}  # the loops alone, without setting them up
    ratios = by_ours(times)
    speed = {name: tokens / median for name, median in medians(times).items()}
    peak = matmul_peak(model, rows=tokens // STEPS)
    # as if every token met the vocabulary, which in our loop only those do that predict a response
    work = sum((6 if p.requires_grad else 4) * p.numel() for p in plain.parameters())
    report(
        benchmark,
        precision=str(model.dtype),
        tokens_per_second={name: round(value, 1) for name, value in speed.items()},
        **ratios,
        matmul_peak_gflops=round(peak / 1e9, 1),
        share_of_peak={name: round(work * value / peak, 3) for name, value in speed.items()},
        seconds=times,
    )
    meets(ratios, "Trainer / ours", at_least=1.3)


@pytest.mark.parametrize("runs", [8, 32])
def test_many_runs_in_a_stack(benchmark, runs, tmp_path):
    """Runs that share a base model, in one pass a step: against one after another, and against `transformers.Trainer`
    with PEFT in a loop. On a CPU the tiny model, since only a machine that waits for its kernels gains by this.

    Aimed at on a GPU: 20 times the loop of Trainers.
    """
    warnings.simplefilter("ignore")
    name = PARAMS.model if torch.cuda.is_available() else "tiny-random"
    steps, rank, starts = 4, 8, []
    for seed in range(runs):
        torch.manual_seed(seed)
        starts.append(load(name, lora=LoRA(rank)).trained_tensors())
    single, stack = load(name, lora=LoRA(rank)), load(name, stack=starts)
    plain, tokenizer = plain_model(name)
    plain.set_attn_implementation("sdpa")  # what a user gets, and faster than the eager attention that hooks need
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(plain, LoraConfig(r=rank, lora_alpha=2 * rank, use_rslora=True, target_modules="all-linear"))
    data = examples(tokenizer, "train", BATCH * steps)

    def given(seed):
        return training_batches(
            lambda rng: data, steps=steps, batch_size=BATCH, seed=seed, pad_id=tokenizer.pad_token_id
        )

    def together():
        batches = [given(seed) for seed in range(runs)]
        finetune_stack(stack, batches, steps=[steps] * runs, learning_rates=[1e-5] * runs, warmup=0.0)

    def one_by_one():
        for seed in range(runs):
            finetune(single, given(seed), steps=steps, learning_rate=1e-5, seed=seed, warmup=0.0)

    def trainers():
        for _ in range(runs):
            the_trainer(plain, tokenizer, data, single.dtype, tmp_path)

    times = take_turns(benchmark, together, {"one after another": one_by_one, "Trainer": trainers}, rounds=3)
    report(benchmark, model=name, runs=runs, device=str(stack.device), ratios=by_ours(times))


# The attack


def test_successive_halving_chooses_as_scoring_every_candidate_does_in_a_fifth_of_the_time(benchmark):
    """The same first direction of chapter 4's start model, at least 5 times as fast.

    The candidates are the quick preset's, the prompts all from which it takes directions (it scores on fewer). Both
    read what all prompts begin with once a candidate. One turn each: it is of 40 candidates, and takes minutes.
    """
    experiment = RefusalStudy(RefusalParams(preset="quick"))
    model, attack = experiment.model("start"), experiment.settings
    kept, positions = experiment.by_behaviour(model, experiment.attackers), header_positions(model.tokenizer)
    prompts = {"harmful": kept.harmful, "harmless": kept.harmless}
    layers = list(attack.layers)
    settings = {**prompts, "refusal_ids": experiment.refusal_ids, "layers": layers}
    ablated = torch.zeros(0, model.width)
    raw = candidate_directions(model, **prompts, layers=layers, ablated=ablated)
    found = {}

    def exhaustively():
        found["exhaustive"] = score_exhaustively(model, raw, ablated=ablated, **settings)

    def halved():
        found["halved"] = score_by_halving(model, raw, ablated=ablated, halving=attack.halving, **settings)

    times = {"exhaustive": [seconds(exhaustively)]}
    benchmark.pedantic(halved, rounds=1)
    times["ours"] = list(benchmark.stats.stats.data)
    ratios = by_ours(times)
    every, kept = found["exhaustive"], found["halved"].scored
    sums, choices = every.log_odds + every.kl, {name: choose(table) for name, table in found.items()}
    report(
        benchmark,
        precision=str(model.dtype),
        candidates=len(layers) * len(positions),
        scored_exactly=int(kept.sum()),
        choices={name: (layers[c.layer], positions[c.position], c.fallback) for name, c in choices.items()},
        log_odds_plus_kl={name: round(float(sums[c.layer, c.position]), 3) for name, c in choices.items()},
        of_all={"least": round(float(sums.min()), 3), "median": round(float(sums.median()), 3)},
        seconds=medians(times),
        **ratios,
    )
    for name in ("log_odds", "kl"):  # batches of other shapes round differently in bfloat16
        one, other = (getattr(table, name)[kept] for table in (found["halved"], every))
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)
    assert choices["halved"] == choices["exhaustive"]
    meets(ratios, "exhaustive / ours", at_least=5)


# Scoring points


def test_scoring_points_in_forward_mode_is_faster_than_a_backward_pass_for_each(benchmark):
    """At least 2.5 times as fast as per-example backward, and at most 4 forward passes' time.

    The points are a part of the chapter's and all weights move. Times are those of the precision that the chapter
    computes in; in float32, where three large products cost what a backward pass's three do and only batching gains,
    one round shows that the scores are equal, and the ratio there is reported beside. One backward pass a point is ours
    with batches of one, and as a user would write it: the plain model with Hugging Face's loss.
    """
    params = FilteringParams(preset="quick")
    chapter = FilteringStudy(params)
    mix = chapter.mixture("headlines", 0.1)
    points = chapter.examples([*mix[:8], *mix[-4:]])
    plain, _ = plain_model(params.model)
    exact = load(params.model, dtype="float32")
    direction = chapter.safety_score().gradient(exact)
    along = {name: direction[name] for name, _ in plain.named_parameters()}
    plain = plain.to(exact.device)

    def ours(model):
        return fihs(model, points, direction)

    def one_by_one(model):
        gradients = (pile_gradient(model, [point], loss=sequence_sums) for point in points)
        return torch.tensor([-sum((g[name] * along[name]).sum().item() for name in along) for g in gradients])

    def by_hand(model):
        products = []
        for point in points:
            ids = torch.tensor([point.ids], device=model.device)
            labels = ids.clone()
            labels[:, : point.prompt_length] = -100
            with model.autocast():
                mean = plain(input_ids=ids, labels=labels, use_cache=False).loss
            (mean * (len(point) - point.prompt_length)).backward()
            products.append(-sum((p.grad * along[name]).sum().item() for name, p in plain.named_parameters()))
            plain.zero_grad(set_to_none=True)
        return torch.tensor(products)

    others = {"one by one": one_by_one, "by hand": by_hand, "forward pass": lambda m: evaluate_losses(m, points)}
    found = {}
    exactly = {
        name: [seconds(lambda name=name, run=run: found.update({name: run(exact)}))]
        for name, run in {"ours": ours, **others}.items()
    }
    errors = {
        n: float((found[n] - found["ours"]).abs().max() / found[n].abs().max()) for n in ("one by one", "by hand")
    }

    model = load(params.model)
    times = take_turns(benchmark, partial(ours, model), {n: partial(f, model) for n, f in others.items()}, rounds=3)
    ratios = by_ours(times) | {f"{name}, float32": value for name, value in by_ours(exactly).items()}
    ratios["ours / forward pass"] = ratio(times["ours"], times["forward pass"])
    report(
        benchmark,
        points=len(points),
        tokens=sum(map(len, points)),
        dtype=str(model.dtype),
        seconds=medians(times),
        errors=errors,
        **ratios,
    )
    assert max(errors.values()) <= 1e-4
    meets(ratios, "by hand / ours", at_least=2.5)
    meets(ratios, "ours / forward pass", at_most=4)


# Steering vectors


@pytest.fixture(scope="module")
def steering_chapter():
    return SteeringStudy(PromptOnlyParams(preset="full"))


def test_training_all_vectors_in_one_run_is_faster_than_one_after_another(benchmark, steering_chapter):
    """Twice as fast as a plain loop over concepts, with the same vectors, at quick's layer and batch size.

    On a GPU, which two sequences leave idle, at least 3 times as fast.

    The loop is what a user would write: the plain model under autocast, a forward hook on the block, Hugging Face's
    loss, one concept after another. Ours with one run at a time is reported beside. Both train at the places that the
    chapter trains at, with pairs that are met about as often as there, since ours reads each once up to the vector's
    block.
    """
    chapter, quick = steering_chapter, PromptOnlyParams(preset="quick")
    model, steps = chapter.base, 4
    places = [chapter.place(name) for name in ("ends", "all", *quick.places)]
    met = steps * quick.batch_size * len(places)
    in_chapter = quick.steps * quick.batch_size * len(places) / len(chapter.pairs(chapter.concepts[0]))
    cut, kept = quick.response_tokens, math.ceil(met / in_chapter)
    runs = [
        Run(c, tuple(Pair(_cut(p.shown, cut), _cut(p.neutral, cut)) for p in chapter.pairs(c)[:kept]), 1.0, 1.0, 1.0)
        for c in chapter.concepts
    ]
    how = {"layer": quick.layer, "steps": steps, "batch_size": quick.batch_size}
    plain = plain_model(quick.model)[0].to(model.device).requires_grad_(False)
    found = {}

    def ours(parts, model=model, places=places):
        states = States(model, quick.layer)
        return torch.stack(
            [
                t.steer.vector
                for where in places
                for part in parts
                for t in train_vectors(model, part, where=where, states=states, **how)
            ]
        )

    def hand_written(model=model, places=places):
        return torch.stack([_by_hand(plain, model, run, {**how, "where": where}) for where in places for run in runs])

    def together():
        found["ours"] = ours([runs])

    def one_by_one():
        found["one by one"] = ours([[run] for run in runs])

    def by_hand():
        found["by hand"] = hand_written()

    times = take_turns(benchmark, together, {"one by one": one_by_one, "by hand": by_hand}, rounds=2)
    ratios = by_ours(times)
    alike = {n: float(cosine_similarity(found[n], found["ours"]).min()) for n in ("one by one", "by hand")}
    exact = load(quick.model, dtype="float32")
    both = ours([runs], exact, places[:2]), hand_written(exact, places[:2])
    alike["by hand, float32"] = float(cosine_similarity(*both).min())
    report(
        benchmark,
        vectors=len(runs),
        places=len(places),
        steps=steps,
        seconds=medians(times),
        least_cosine=alike,
        **ratios,
    )
    # in float32: in bfloat16 the sign of a small gradient turns, and Adam follows it
    assert alike["by hand, float32"] > 0.999
    meets(ratios, "by hand / ours", at_least=3 if model.device.type == "cuda" else 2)


def _cut(example, tokens):
    return Example(example.ids[: example.prompt_length + tokens], example.prompt_length)


def _by_hand(plain, model, run, how):
    factor, vector = (t.to(model.device).requires_grad_() for t in run.start(model.width))
    optimizer = torch.optim.Adam([{"params": [factor], "lr": run.factor_rate}, {"params": [vector], "lr": 0.04}])
    mask = None

    def add(module, given, out):
        return out + (mask * (factor * vector)).to(out.dtype)

    handle = plain.model.layers[how["layer"]].register_forward_hook(add)
    for step, drawn in enumerate(run.draws(how["steps"], how["batch_size"])):
        batch = collate([run.pairs[i].shown for i in drawn], model.tokenizer.pad_token_id).to(model.device)
        mask = batch.positions(how["where"])[..., None]
        labels = batch.ids.masked_fill(~batch.response, -100)
        with model.autocast():
            plain(input_ids=batch.ids, attention_mask=batch.attention.long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_([vector], 1.0)
        for group, rate in zip(optimizer.param_groups, (run.factor_rate, 0.04), strict=True):
            group["lr"] = rate * (1 - step / how["steps"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    handle.remove()
    return vector.detach().cpu()


def test_prompt_only_steering_costs_decoding_nothing(benchmark, steering_chapter):
    """At most 1.02 times an unsteered step, by medians of steps in turns; steering every token is reported beside."""
    chapter = steering_chapter
    arms = {
        "unsteered": SteeringMethod(),
        "PrOSV": SteeringMethod("difference in means", "ends"),
        "FSSV": SteeringMethod("difference in means", "all"),
    }
    chapter.shifts(arms["FSSV"])
    (costs,) = benchmark.pedantic(
        lambda: chapter.decoding_costs(arms, contexts=(256,), steps=100), rounds=1, warmup_rounds=0
    )
    ratios = {f"{name} / unsteered": round(costs[name] / costs["unsteered"], 3) for name in ("PrOSV", "FSSV")}
    report(benchmark, milliseconds=costs, **ratios)
    meets(ratios, "PrOSV / unsteered", at_most=1.02)
