"""The draft's task: what it learns from, what it measures, and what decoding makes of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.questions import Question
from fastvlm.decoding import Request
from fastvlm.drafting import ImitationConfig, ImitationNetwork
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.imitation import initialise_from
from fastvlm.functional.errors import CheckpointError
from fastvlm.prompts import question as asking
from fastvlm.training import replies
from fastvlm.training.draft import (
    DraftTask,
    frequent_tokens,
    new_network,
    train_draft,
)
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.loop import train
from fastvlm.training.replies import Example, TrainingPrompt
from fastvlm.training.schedule import Schedule
from fastvlm.vision.images import prepare
from fastvlm.vlm import VisionLanguageModel, load
from fastvlm_example import DESCRIPTION_PROMPT, SENTENCE_PROMPT
from tests.models import LIVELY, about_scenes, small_vlm

MOST = 40
"""Tokens of a reply at most."""
FEW = 8
DEPTH = LIVELY["num_hidden_layers"]


def own_replies(
    vlm: VisionLanguageModel, questions: Sequence[Question], folder: Path, **options: Any
) -> list[Example]:
    """The target's replies to questions about scenes and photos."""
    asked = [
        TrainingPrompt(str(q.image), tuple(asking(q.prompt, q.open(vlm.image_size))), "")
        for q in questions
    ]
    return replies.own_replies(vlm, asked, folder, BrokenRecords(), **options)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return about_scenes(range(20))


@pytest.fixture(scope="module")
def vlm(questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    """A model some of whose replies end themselves, while others reach the limit."""
    vlm = small_vlm()
    counts: Counter[int] = Counter()
    folder = tmp_path_factory.mktemp("endless")
    for example in own_replies(vlm, questions, folder, max_new_tokens=MOST):
        reply = example.reply
        counts.update(set(reply[MOST // 2 :]) - set(reply[: MOST // 2]))
    [(end, _)] = counts.most_common(1)
    vlm.model.generation_config.eos_token_id = end
    return vlm


@pytest.fixture(scope="module")
def examples(
    vlm: VisionLanguageModel,
    questions: list[Question],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Example]:
    folder = tmp_path_factory.mktemp("replies")
    return own_replies(vlm, questions, folder, max_new_tokens=MOST)


def taught(vlm: VisionLanguageModel, plan: DraftPlan, examples: list[Example]) -> ImitationNetwork:
    return new_network(vlm, plan, examples).to(vlm.decoder.dtype)


def loss_of(
    vlm: VisionLanguageModel, network: ImitationNetwork, examples: Sequence[Example]
) -> tuple[float, dict[str, float]]:
    """One network's loss and report, by the names of the measures alone."""
    losses = DraftTask(vlm, {"it": network}, examples).loss(examples)
    report = {name.split()[-1]: total / over for name, (total, over) in losses.report.items()}
    return float(losses.total.detach()) / losses.weight, report


@pytest.fixture(scope="module")
def network(
    vlm: VisionLanguageModel,
    examples: list[Example],
    tmp_path_factory: pytest.TempPathFactory,
) -> ImitationNetwork:
    """A block that was taught the first few examples for a while."""
    torch.manual_seed(0)
    network = taught(vlm, DraftPlan("block", 3, draft_vocabulary=150), examples)
    schedule = Schedule(steps=30, learning_rate=2e-3, warmup=5)
    train(DraftTask(vlm, {"it": network}, examples[:6]), schedule, tmp_path_factory.mktemp("draft"))
    return network


def test_replies_are_what_generate_says(
    vlm: VisionLanguageModel, questions: list[Question], examples: list[Example]
) -> None:
    assert len({example.reply for example in examples}) > 15
    assert len({len(example.reply) for example in examples}) > 3
    for question, example in zip(questions[:6], examples, strict=False):
        pixels = prepare(question.open(vlm.image_size), vlm.image_size).double()
        prompt, reply = vlm.tokens(question.prompt, images=1), list(example.reply)
        tokens = torch.tensor([prompt])
        out = vlm.model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels,
            max_new_tokens=MOST, do_sample=False,
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == reply
        assert vlm.generate(
            question.prompt, question.open(vlm.image_size), max_new_tokens=MOST
        ).token_ids == reply  # fmt: skip


class Counted:
    """Counts the requests that a model decodes; the process is killed at a number of them."""

    def __init__(
        self, vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, killed_at: int = 1000
    ) -> None:
        self.asked, self.killed_at = 0, killed_at
        self.requests = vlm.requests
        monkeypatch.setattr(vlm, "requests", self)

    def __call__(self, *args: Any, **options: Any) -> Iterator[Request]:
        for request in self.requests(*args, **options):
            if self.asked == self.killed_at:
                raise KeyboardInterrupt
            self.asked += 1
            yield request

    def since(self) -> int:
        """Return the requests since this was asked last."""
        asked, self.asked = self.asked, 0
        return asked


def said(examples: list[Example]) -> list[tuple[int, ...]]:
    return [example.reply for example in examples]


def test_replies_are_kept(
    vlm: VisionLanguageModel,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = questions[:7]
    counted = Counted(vlm, monkeypatch)
    fresh = own_replies(vlm, few, tmp_path, max_new_tokens=6)
    assert counted.since() == 7
    kept = own_replies(vlm, few, tmp_path, max_new_tokens=6)
    assert counted.since() == 0
    assert said(kept) == said(fresh)
    # Other questions, limits or weights are not answered from it.
    own_replies(vlm, few[:2], tmp_path, max_new_tokens=6)
    own_replies(vlm, few[:3], tmp_path, max_new_tokens=5)
    assert counted.since() == 5
    norm = vlm.model.get_decoder().norm.weight
    monkeypatch.setattr(norm, "data", norm.data * 2)
    own_replies(vlm, few[:2], tmp_path, max_new_tokens=6)
    assert counted.since() == 2


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_killed_run_goes_on_from_the_replies_it_kept(
    temperature: float,
    vlm: VisionLanguageModel,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"max_new_tokens": 12, "temperature": temperature}
    expected = own_replies(vlm, questions, tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        Counted(vlm, patched, killed_at=18)
        with pytest.raises(KeyboardInterrupt):
            own_replies(vlm, questions, tmp_path, **options)
    [file] = tmp_path.glob("replies-*.jsonl")
    kept = len(file.read_text().splitlines())
    assert 0 < kept < 18
    # A line that was cut off is answered again.
    file.write_bytes(file.read_bytes()[:-3])
    resumed = Counted(vlm, monkeypatch)
    again = own_replies(vlm, questions, tmp_path, **options)
    assert said(again) == said(expected)
    assert resumed.asked == len(questions) - kept + 1


def test_sampled_replies_are_drawn_with_their_numbers(
    vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
) -> None:
    told = own_replies(vlm, [questions[0]] * 3, tmp_path, max_new_tokens=12, temperature=1.0)
    assert len({example.reply for example in told}) == 3
    for number, example in enumerate(told):
        reply = vlm.generate(
            questions[0].prompt,
            questions[0].open(vlm.image_size),
            max_new_tokens=12,
            temperature=1.0,
            seed=number,
        )
        assert reply.token_ids == list(example.reply)


def test_a_question_that_fails_is_its_own_failure(
    vlm: VisionLanguageModel, questions: list[Question], tmp_path: Path
) -> None:
    """An image that can't be read, and a prompt without room for a reply, are passed over."""
    asked = [
        TrainingPrompt(str(n), tuple(asking(q.prompt, q.open(vlm.image_size))), "")
        for n, q in enumerate(questions[:4])
    ]
    asked[1] = TrainingPrompt("1", tuple(asking("What?", tmp_path / "nowhere.png")), "")
    asked[2] = TrainingPrompt("2", tuple(asking("What? " * 300, None)), "")
    for _ in range(2):
        broken = BrokenRecords(share=0.5)
        told = replies.own_replies(vlm, asked, tmp_path, broken, max_new_tokens=6)
        whole = own_replies(vlm, [questions[0], questions[3]], tmp_path, max_new_tokens=6)
        assert said(told) == said(whole)
        assert "2 of 4" in broken.summary()


def test_another_failure_ends_the_run(
    vlm: VisionLanguageModel,
    questions: list[Question],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vlm.decoder, "forward_layers", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        own_replies(vlm, questions[:2], tmp_path, max_new_tokens=6)


def test_photos_are_answered_too(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    Image.effect_noise((90, 60), 90).convert("RGB").save(tmp_path / "noise.png")
    asked = [
        Question(prompt, str(tmp_path / "noise.png"))
        for prompt in (DESCRIPTION_PROMPT, SENTENCE_PROMPT)
    ]
    told = own_replies(vlm, [*asked, *about_scenes([3])], tmp_path, max_new_tokens=8)
    for question, example in zip(asked, told, strict=False):
        reply = vlm.generate(question.prompt, tmp_path / "noise.png", max_new_tokens=8)
        assert list(example.reply) == reply.token_ids


def test_frequent_tokens_are_counted_in_replies_alone() -> None:
    told = [Example((), (5, 7, 5)), Example((), (7, 5, 3))]
    assert frequent_tokens(told, 2) == [5, 7]
    assert frequent_tokens(told, 3) == [3, 5, 7]
    assert frequent_tokens(told, 99) == [3, 5, 7]


def test_a_new_network_starts_as_the_layer_it_stands_for(
    vlm: VisionLanguageModel, examples: list[Example]
) -> None:
    network = new_network(vlm, DraftPlan("block", 2, draft_vocabulary=50), examples)
    layers = vlm.model.get_decoder().layers
    for name, weight in network.layers[0].state_dict().items():
        assert torch.equal(weight.double(), layers[2].state_dict()[name].float().double())
    assert network.draft_vocabulary.tolist() == frequent_tokens(examples, 50)
    assert network.draft_vocabulary.dtype == torch.long
    assert (network.config.exit_layer, network.config.draft_vocabulary_size) == (2, 50)


@torch.no_grad()
def naive_loss(
    vlm: VisionLanguageModel, network: ImitationNetwork, examples: Sequence[Example]
) -> tuple[float, dict[str, float]]:
    """The loss of a network of kind `mlp`, from transformers' own outputs, row by row."""
    decoder, head = vlm.model.get_decoder(), vlm.model.get_output_embeddings()
    mlp, vocabulary, zero = network.mlp, network.draft_vocabulary, torch.zeros(()).double()
    parts: dict[str, list[Tensor]] = {"kl": [], "cos": [], "ce": [], "agree": [], "overlap": []}
    for example in examples:
        prompt = vlm.prompts.decoder_inputs(example.messages)
        tokens = torch.tensor([*prompt.token_ids, *example.reply])
        x = decoder.embed_tokens(tokens)
        x[: len(prompt.token_ids)] = prompt.embeddings
        out = decoder(inputs_embeds=x[None], output_hidden_states=True)
        # Position i predicts token i + 1; the prefill gives the reply's first.
        for i in range(len(prompt.token_ids), len(tokens) - 1):
            state, last = out.hidden_states[network.config.exit_layer][0, i], out.last_hidden_state
            scaled = state / (state.square().mean() + mlp.norm.eps).sqrt() * mlp.norm.weight
            gate, up = mlp.gate_proj.weight @ scaled, mlp.up_proj.weight @ scaled
            guess = decoder.norm(state + mlp.down_proj.weight @ (gate * gate.sigmoid() * up))
            p = head(last[0, i]).softmax(-1)
            q = (head.weight[vocabulary] @ guess).softmax(-1)
            best = int(p.argmax())
            parts["kl"].append((p[vocabulary] * (p[vocabulary] / q).log()).sum())
            parts["cos"].append(1 - guess @ last[0, i] / guess.norm() / last[0, i].norm())
            known = best in vocabulary.tolist()
            parts["ce"].append(-q[vocabulary.tolist().index(best)].log() if known else zero)
            parts["agree"].append((vocabulary[q.argmax()] == best).double())
            parts["overlap"].append(torch.minimum(p[vocabulary], q).sum())
    mean = {name: float(torch.stack(values).mean()) for name, values in parts.items()}
    return mean["kl"] + 0.1 * mean["cos"] + 0.1 * mean["ce"], mean


def test_the_loss_is_the_papers(vlm: VisionLanguageModel, examples: list[Example]) -> None:
    # Of different lengths, so that some are padded.
    few = [
        Example(example.messages, example.reply[:kept])
        for example, kept in zip(examples, (12, 25, 7), strict=False)
    ]
    network = taught(vlm, DraftPlan("mlp", 2, draft_vocabulary=60), examples)
    expected, measures = naive_loss(vlm, network, few)
    loss, report = loss_of(vlm, network, few)
    assert loss == pytest.approx(expected, rel=1e-9)
    for name, value in report.items():
        assert value == pytest.approx(measures[name], rel=1e-6), name
    assert 0 < report["overlap"] < 1


def test_networks_are_taught_side_by_side(
    vlm: VisionLanguageModel, examples: list[Example]
) -> None:
    plans = {
        "large": DraftPlan("block", 3, draft_vocabulary=60),
        "small": DraftPlan("mlp", 1, draft_vocabulary=40, cosine=0),
        "whole": DraftPlan("block", 2, blocks=2, draft_vocabulary=0, cross_entropy=0.3),
    }
    networks = {name: taught(vlm, plan, examples) for name, plan in plans.items()}
    together = DraftTask(vlm, networks, examples, plans).loss(examples[:3])
    alone = [
        DraftTask(vlm, {name: network}, examples, plans).loss(examples[:3])
        for name, network in networks.items()
    ]
    summed = sum(float(losses.total.detach()) for losses in alone)
    assert float(together.total.detach()) == pytest.approx(summed)
    assert {losses.weight for losses in alone} == {together.weight}
    single = {name: sums for losses in alone for name, sums in losses.report.items()}
    assert together.report.keys() == single.keys()
    for name, sums in together.report.items():
        assert sums == pytest.approx(single[name])
    assert {name.split()[0] for name in together.report} == set(plans)
    together.total.backward()
    for network in networks.values():
        assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert all(p.grad is None for p in vlm.model.parameters())


def test_an_example_goes_through_the_target_once(
    vlm: VisionLanguageModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = {"deep": DraftPlan("block", 3), "shallow": DraftPlan("mlp", 1)}
    networks = {name: taught(vlm, plan, examples) for name, plan in plans.items()}
    ran: list[range] = []
    run = vlm.decoder.forward_layers

    def counted(x: Tensor, positions: Any, cache: Any, layers: range) -> Tensor:
        ran.append(layers)
        return run(x, positions, cache, layers)

    monkeypatch.setattr(vlm.decoder, "forward_layers", counted)
    together = DraftTask(vlm, networks, examples, plans, kept_bytes=0)
    expected = [
        float(together.loss(drawn).total.detach()) for drawn in (examples[:3], examples[2:5])
    ]
    assert len(ran) == 2 * 3
    task = DraftTask(vlm, networks, examples, plans)
    # The third is met again, among others.
    found = [task.loss(drawn).total for drawn in (examples[:3], examples[2:5])]
    assert len(ran) == 2 * 3 + 5 * 3
    assert [float(total.detach()) for total in found] == pytest.approx(expected)
    # And to the bit, whatever it was drawn with first: as when a run is resumed.
    resumed = DraftTask(vlm, networks, examples, plans)
    assert torch.equal(resumed.loss(examples[2:5]).total, found[1])
    assert torch.equal(task.loss(examples[2:5]).total, found[1])


def test_states_are_kept_where_all_fit(vlm: VisionLanguageModel, examples: list[Example]) -> None:
    network = {"it": taught(vlm, DraftPlan("mlp", 2), examples)}
    roomy = DraftTask(vlm, network, examples, kept_bytes=2**30)
    expected = float(roomy.loss(examples).total.detach())
    needed = 2**30 - roomy.target.kept.left
    assert needed > 0
    for room, keeps in ((2 * needed, True), (needed // 2, False)):
        task = DraftTask(vlm, network, examples, kept_bytes=room)
        for _ in range(2):
            assert float(task.loss(examples).total.detach()) == pytest.approx(expected)
        assert task.target.keeps == keeps
        assert (task.target.kept.left < room) == keeps


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_a_perfect_network_agrees_everywhere(
    exit_layer: int, vlm: VisionLanguageModel, examples: list[Example]
) -> None:
    vocabulary = vlm.model.config.get_text_config().vocab_size
    network = ImitationNetwork(
        ImitationConfig(
            exit_layer=exit_layer,
            blocks=DEPTH - exit_layer,
            text_config=vlm.model.config.get_text_config().to_dict(),
            draft_vocabulary_size=vocabulary,
        )
    ).double()
    initialise_from(network, list(vlm.model.get_decoder().layers))
    network.draft_vocabulary.copy_(torch.arange(vocabulary))
    _, report = loss_of(vlm, network, examples)
    assert report["agree"] == 1.0
    assert report["overlap"] == pytest.approx(1, abs=1e-9)
    assert report["kl"] == pytest.approx(0, abs=1e-9)


def test_teaching_raises_the_agreement(
    vlm: VisionLanguageModel, examples: list[Example], network: ImitationNetwork
) -> None:
    untaught = taught(vlm, DraftPlan("block", 3, draft_vocabulary=150), examples)
    loss, before = loss_of(vlm, untaught, examples[:6])
    less, after = loss_of(vlm, network, examples[:6])
    assert less < loss
    assert after["agree"] > before["agree"] + 0.1
    assert after["overlap"] > before["overlap"]
    assert after["kl"] < before["kl"]


@pytest.fixture(scope="module")
def agreements(
    vlm: VisionLanguageModel, examples: list[Example], network: ImitationNetwork
) -> list[list[bool]]:
    """Whether teacher forcing predicts a reply's second token, its third, and so on."""
    found = []
    for example in examples[:FEW]:
        hits = [0]
        for end in range(2, len(example.reply) + 1):
            cut = Example(example.messages, example.reply[:end])
            agree = loss_of(vlm, network, [cut])[1]["agree"]
            hits.append(round(agree * (end - 1)))
        found.append([after > before for before, after in itertools.pairwise(hits)])
    return found


def decoded(
    vlm: VisionLanguageModel, network: ImitationNetwork, questions: list[Question], most: int
) -> list[Request]:
    """Replies decoded as one batch, with drafts of a fixed length."""
    strategy = vlm.strategy(
        "imitation", network=network, num_speculative_tokens=most, confidence=0.0
    )
    requests = [
        vlm.request(
            question.prompt,
            question.open(vlm.image_size),
            strategy=strategy,
            max_new_tokens=MOST,
        )
        for question in questions
    ]
    for request in vlm.engine.run(requests):
        assert request.error is None
    return requests


def replayed(agrees: list[bool], most: int) -> list[int]:
    """How many tokens each cycle accepts, if a draft is what teacher forcing predicts.

    Args:
        agrees: For each token of a reply after the first, whether it is the one predicted.
        most: Tokens of a draft.
    """
    accepted, position = [], 0
    while position < len(agrees):
        # The token at the limit is never drafted: it is the bonus, if all before it are accepted.
        room = min(most, MOST - position - 2)
        count = 0
        while count < room and position + count < len(agrees) and agrees[position + count]:
            count += 1
        accepted.append(count)
        position += count + 1
    return accepted


@pytest.mark.parametrize("most", [1, 3, 8, MOST])
def test_decoding_accepts_just_what_teaching_predicts(
    most: int,
    vlm: VisionLanguageModel,
    questions: list[Question],
    examples: list[Example],
    network: ImitationNetwork,
    agreements: list[list[bool]],
) -> None:
    requests = decoded(vlm, network, questions[:FEW], most)
    for request, example, agrees in zip(requests, examples, agreements, strict=False):
        assert request.output_token_ids == list(example.reply)
        assert request.accepted == replayed(agrees, most)


def test_the_acceptance_of_teaching_is_that_of_decoding(
    vlm: VisionLanguageModel,
    questions: list[Question],
    examples: list[Example],
    network: ImitationNetwork,
) -> None:
    # Drafts as long as the replies put every token to the test that teaching does: all but the
    # first, from the prefill, and the bonus at the limit after a draft that was accepted whole.
    accepted = rejected = 0
    for request in decoded(vlm, network, questions, MOST):
        accepted += sum(request.accepted)
        rejected += sum(a < p for p, a in zip(request.proposed, request.accepted, strict=True))
    assert accepted + rejected > 400
    _, report = loss_of(vlm, network, examples)
    assert 0.3 < report["agree"] < 0.9
    assert accepted / (accepted + rejected) == pytest.approx(report["agree"], abs=0.02)


def test_drafts_trained_for_a_stored_model_serve_it(tmp_path: Path) -> None:
    stored = small_vlm(torch.bfloat16)
    for part in (stored.model, stored.tokenizer):
        part.save_pretrained(tmp_path / "model")
    vlm = load(tmp_path / "model")
    asked = about_scenes(range(4))
    told = own_replies(vlm, asked, tmp_path, max_new_tokens=12)
    plans = {
        "one": DraftPlan("block", 2, draft_vocabulary=40),
        "two": DraftPlan("mlp", 1, draft_vocabulary=30),
    }
    train_draft(vlm, plans, told, tmp_path, Schedule(steps=2, learning_rate=1e-3, warmup=1))
    for name, plan in plans.items():
        network = load_draft(tmp_path / name, vlm.model)
        assert (network.config.kind, network.config.exit_layer) == (plan.kind, plan.exit_layer)
        assert network.draft_vocabulary.tolist() == frequent_tokens(told, plan.draft_vocabulary)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        strategy = vlm.strategy("imitation", network=network)
        for question, example in zip(asked, told, strict=True):
            image = question.open(vlm.image_size)
            reply = vlm.generate(question.prompt, image, max_new_tokens=12, strategy=strategy)
            assert reply.token_ids == list(example.reply)


def test_a_draft_goes_on_from_an_earlier_run(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32)
    told = own_replies(vlm, about_scenes(range(4)), tmp_path, max_new_tokens=12)
    plans = {"block": DraftPlan("block", 2, draft_vocabulary=40)}
    still = Schedule(steps=1, learning_rate=1e-9, warmup=1)
    train_draft(vlm, plans, told, tmp_path / "one", Schedule(steps=3, learning_rate=1e-2, warmup=1))
    # Another plan and other replies: the network's own exit layer and vocabulary stay.
    other = {"block": DraftPlan("block", 1, draft_vocabulary=10)}
    train_draft(vlm, other, told[:1], tmp_path / "two", still, tmp_path / "one")
    one, two = (load_draft(tmp_path / name / "block", vlm.model) for name in ("one", "two"))
    assert two.config.exit_layer == 2
    for name, weight in one.state_dict().items():
        assert two.state_dict()[name].equal(weight), name
    with pytest.raises(CheckpointError, match="There is no draft"):
        train_draft(vlm, other, told, tmp_path / "three", still, tmp_path / "nowhere")
