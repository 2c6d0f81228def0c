"""A model's own task: what is learnt of a conversation, by which part, and what is saved."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError
from fastvlm.training.assembly import assemble
from fastvlm.training.instruction import InstructionTask, tune_model
from fastvlm.training.paper_stages import PAPER_STAGES, PaperStage
from fastvlm.training.parts import computed_in, learning
from fastvlm.training.replies import text_of
from fastvlm.training.reply_scores import reply_loss, score_replies, score_tokens
from fastvlm.training.rows import IGNORED, FastViTHDRows, rows_for
from fastvlm.training.schedule import Schedule
from fastvlm.vision import FastViTHD
from fastvlm.vlm import VisionLanguageModel, load
from fastvlm_example.scenes import render, sample
from tests.families import ROTARY
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, small_encoder, small_vlm
from tests.processors import saved

FAST = Schedule(steps=3, learning_rate=0.05, warmup=0, weight_decay=0.0)


def turn(role: str, *parts: str | Image.Image) -> dict[str, Any]:
    return {
        "role": role,
        "content": [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part}
            for part in parts
        ],
    }


def conversations(size: int = 128) -> list[Conversation]:
    """One of two turns, one of text alone, and one with two images."""
    first, second = render(sample(1), size), render(sample(2), size)
    return [
        Conversation(
            "two turns",
            (
                turn("user", first, "What is it?"),
                turn("assistant", "A red square."),
                turn("user", "Is it large?"),
                turn("assistant", "No."),
            ),
        ),
        Conversation("text", (turn("user", "Hello"), turn("assistant", "A blue circle."))),
        Conversation(
            "images",
            (turn("user", second, "and", first), turn("assistant", "Two.")),
        ),
    ]


def source(found: Sequence[Conversation]) -> Records:
    return Records(found, lambda _, one: one, lambda _, one: one.name)


def rows_of(vlm: VisionLanguageModel) -> FastViTHDRows:
    return FastViTHDRows(vlm.model, vlm.tokenizer, IMAGE_SIZE)


def test_every_reply_is_learnt_with_its_end_and_nothing_else() -> None:
    vlm = small_vlm()
    [row] = rows_of(vlm).rows(conversations()[0])
    tokens, labels = row.inputs["input_ids"], row.labels
    learnt = labels != IGNORED
    assert labels[learnt].equal(tokens[learnt])
    assert vlm.tokenizer.decode(labels[learnt]) == "A red square.<|end|>No.<|end|>"
    # What comes before the first reply is what serving asks.
    asked = vlm.prompts.decoder_inputs(conversations()[0].messages[:1]).token_ids
    assert tokens[: len(asked)].tolist() == asked
    assert not learnt[: len(asked)].any()
    assert learnt[len(asked)]


def test_an_end_that_the_template_does_not_write_is_learnt_without_being_shown() -> None:
    vlm = small_vlm()
    written = rows_of(vlm).rows(conversations()[0])[0]
    vlm.tokenizer.chat_template = vlm.tokenizer.chat_template.replace("<|end|>", "")
    [row] = rows_of(vlm).rows(conversations()[0])
    tokens, labels = row.inputs["input_ids"], row.labels
    end = vlm.tokenizer.eos_token_id
    assert labels[labels != IGNORED].equal(written.labels[written.labels != IGNORED])
    # The last one is nobody's input.
    assert tokens[:-1].tolist().count(end) == 0
    assert labels.tolist().count(end) == 2


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    vlm = small_vlm()
    vlm.tokenizer.chat_template = "{{ messages | length }}" + vlm.tokenizer.chat_template
    with pytest.raises(InputError, match="rewrites earlier turns"):
        rows_of(vlm).rows(conversations()[0])


def test_the_loss_is_transformers_own() -> None:
    vlm = small_vlm()
    rows = rows_of(vlm)
    made = [row for one in conversations() for row in rows.rows(one)]
    feed = Feed(source(conversations()))
    found = InstructionTask(vlm.model, rows, feed, 3).loss(made)
    alone, learnt = [], 0
    for row in made:
        number = int((row.labels[1:] != IGNORED).sum())
        pixels = row.inputs.get("pixel_values")
        out = vlm.model(
            input_ids=row.inputs["input_ids"][None],
            pixel_values=None if pixels is None else pixels.double(),
            labels=row.labels[None],
        )
        alone.append(float(out.loss.detach()) * number)
        learnt += number
    assert found.weight == learnt
    # transformers' own loss is in float32.
    assert float(found.total.detach()) == pytest.approx(sum(alone), rel=1e-6)
    assert 0 <= found.report["right"][0] <= learnt == found.report["right"][1]


def test_each_row_has_the_scores_that_it_has_alone() -> None:
    vlm = small_vlm()
    rows = rows_of(vlm)
    made = [row for one in conversations() for row in rows.rows(one)]
    for row, scored in zip(made, score_replies(vlm.model, rows, made), strict=True):
        [alone] = score_replies(vlm.model, rows, [row])
        assert len(alone.losses) == int((row.labels != IGNORED).sum())
        torch.testing.assert_close(scored.losses, alone.losses)
        assert scored.right.equal(alone.right)


def test_the_loss_of_each_kind_is_reported() -> None:
    vlm = small_vlm()
    rows = rows_of(vlm)
    made = [row for one in conversations() for row in rows.rows(one)]
    assert reply_loss(vlm.model, rows, made).report.keys() == {"right"}
    kinds = ("asked", "", "asked")
    named = [replace(row, kind=kind) for row, kind in zip(made, kinds, strict=True)]
    report = reply_loss(vlm.model, rows, named).report
    assert report.keys() == {"right", "asked"}
    expected = reply_loss(vlm.model, rows, [made[0], made[2]])
    assert report["asked"] == pytest.approx((float(expected.total.detach()), expected.weight))


def test_gradients_reach_projector_and_encoder_and_statistics_stay() -> None:
    vlm = small_vlm()
    tower = FastViTHD(small_encoder().config).double()
    tower.load_state_dict(small_encoder().state_dict())
    vlm.model.model.vision_tower = tower
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    assert any("running_mean" in name for name in before)
    rows = rows_of(vlm)
    with learning(vlm.model, "everything", 1):
        task = InstructionTask(vlm.model, rows, Feed(source(conversations())), 2)
        task.loss(task.draw(0) + task.draw(1)).total.backward()
    without = [n for n, p in vlm.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    for name, buffer in tower.named_buffers():
        assert buffer.equal(before[name])


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    ("learns", "prefixes"),
    [
        ("projector", {"multi_modal_projector"}),
        ("decoder", {"multi_modal_projector", "language_model", "lm_head"}),
        ("everything", {"multi_modal_projector", "language_model", "lm_head", "vision_tower"}),
        ("lora", {"multi_modal_projector", "language_model"}),
    ],
)
def test_only_the_named_part_changes_and_what_is_saved_is_it(
    learns: str, prefixes: set[str], tmp_path: Path
) -> None:
    if learns == "lora":
        pytest.importorskip("peft")
    vlm = small_vlm(torch.float32)
    model = vlm.model
    before = {name: weight.clone() for name, weight in weights(model).items()}
    stage = PaperStage(learns, FAST.learning_rate, None, 2, 1, "")
    records = source(conversations())
    tune_model(model, vlm.tokenizer, records, stage, FAST, tmp_path, rank=2)
    reloaded, _ = load_checkpoint(tmp_path, torch.float32, "cpu")
    after = weights(reloaded)
    assert after.keys() == before.keys()
    changed = {name for name in before if not after[name].equal(before[name])}
    parts = {next(part for part in name.split(".") if part != "model") for name in changed}
    assert parts == prefixes
    for name, weight in weights(model).items():
        assert after[name].equal(weight), name
    assert load(tmp_path).generate("What?", render(sample(0), 128), max_new_tokens=3).token_ids


def test_adapters_are_few_and_merged_they_are_the_adapted_model() -> None:
    pytest.importorskip("peft")
    vlm = small_vlm()
    rows = rows_of(vlm)
    made = [row for one in conversations() for row in rows.rows(one)]
    task = InstructionTask(vlm.model, rows, Feed(source(conversations())), 2)
    plain = float(task.loss(made).total.detach())
    names = set(vlm.model.state_dict())
    with learning(vlm.model, "lora", 2):
        learnt = [p for p in vlm.model.parameters() if p.requires_grad]
        whole = sum(p.numel() for p in vlm.model.parameters())
        assert 0 < sum(p.numel() for p in learnt) < 0.1 * whole
        assert float(task.loss(made).total.detach()) == pytest.approx(plain)
        with torch.no_grad():
            for p in learnt:
                p.add_(0.5 * torch.randn_like(p))
        adapted = float(task.loss(made).total.detach())
    assert adapted != pytest.approx(plain, rel=1e-3)
    assert float(task.loss(made).total.detach()) == pytest.approx(adapted, rel=1e-9)
    assert set(vlm.model.state_dict()) == names


def test_the_stages_are_the_papers() -> None:
    assert list(PAPER_STAGES) == ["1", "1.5", "2", "3"]
    first, *others = PAPER_STAGES.values()
    assert (first.learns, first.learning_rate, first.batch) == ("projector", 1e-3, 256)
    for stage in others:
        assert (stage.learns, stage.learning_rate, stage.batch) == ("everything", 2e-5, 128)
        assert stage.image_size == 1024
    # LLaVA-558K in one epoch.
    assert first.steps(558_128) == 2181
    schedule = first.schedule(2181)
    assert (schedule.steps, schedule.warmup, schedule.weight_decay) == (2181, 65, 0.0)


def test_a_size_of_the_stage_becomes_the_models_own(tmp_path: Path) -> None:
    vlm = small_vlm(torch.float32)
    stage = PaperStage("projector", 1e-3, 192, 1, 1, "")
    tune_model(vlm.model, vlm.tokenizer, source(conversations()), stage, FAST, tmp_path)
    again = load(tmp_path)
    assert again.image_size == 192
    assert again.model.config.image_seq_length == 9
    with pytest.raises(InputError, match="a multiple of 64 pixels; got 100"):
        rows_for(vlm.model, vlm.tokenizer, 100)


def test_text_alone_teaches_a_projector_nothing() -> None:
    vlm = small_vlm()
    rows = rows_of(vlm)
    with learning(vlm.model, "projector", 1):
        task = InstructionTask(vlm.model, rows, Feed(source(conversations())), 1)
        found = task.loss(rows.rows(conversations()[1]))
        found.total.backward()
    assert found.weight > 1
    assert all(p.grad is None for p in vlm.model.parameters())


def test_conversations_that_make_no_row_are_counted() -> None:
    vlm = small_vlm(torch.float32)
    long = Conversation("long", (turn("user", "a" * 900), turn("assistant", "No.")))
    feed = Feed(source([long, *conversations()]))
    feed.broken.share = 0.5
    task = InstructionTask(vlm.model, rows_of(vlm), feed, 4)
    assert len(task.draw(0)) == 4
    [named] = feed.broken.named
    assert (named.name, "the model's context is 256" in named.reason) == ("long", True)
    with pytest.raises(InputError, match="1 of 1 records"):
        InstructionTask(vlm.model, rows_of(vlm), Feed(source([long])), 1).draw(0)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl", "idefics3"])
def test_other_families_learn_through_their_processor(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "model")
    model, processor = load_checkpoint(tmp_path / "model", torch.float64, "cpu")
    rows = rows_for(model, processor, None)
    made = rows.rows(conversations()[0])
    task = InstructionTask(model, rows, Feed(source(conversations())), 1)
    found = task.loss(made)
    expected, learnt = 0.0, 0
    for row in made:
        number = int((row.labels != IGNORED).sum())
        out = model(**row.inputs, labels=row.labels[None])
        expected += float(out.loss.detach()) * number
        learnt += number
    assert found.weight == learnt
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-6)
    if family != "qwen2.5-vl":
        with learning(model, "projector", 1):
            parameters = [name for name, p in model.named_parameters() if p.requires_grad]
        assert parameters
        assert all("projector" in name or "connector" in name for name in parameters)


def test_models_that_can_not_be_trained(tmp_path: Path) -> None:
    saved("blip2-t5", tmp_path / "model")
    model, processor = load_checkpoint(tmp_path / "model", torch.float64, "cpu")
    with pytest.raises(InputError, match="can't be trained here"):
        rows_for(model, processor, None)
    with pytest.raises(InputError, match="has no projector"), learning(model, "projector", 1):
        pass


def test_a_new_model_is_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(small_vlm().tokenizer)
    torch.manual_seed(1)
    rows = len(tokenizer)
    decoder = AutoModelForCausalLM.from_config(
        Qwen2Config(**{**ROTARY, "vocab_size": rows, "eos_token_id": tokenizer.eos_token_id})
    )
    decoder.save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    encoder = small_encoder()
    model, prepared = assemble(encoder, tmp_path / "decoder")
    assert encoder.config.form == "training"
    text = torch.randint(4, rows, (1, 9))
    torch.testing.assert_close(model(input_ids=text).logits, decoder(input_ids=text).logits)
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    seen = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(seen, small_encoder()(pixels).last_hidden_state)
    stage = PaperStage("projector", 1e-3, None, 2, 1, "")
    tune_model(model, prepared, source(conversations()), stage, FAST, tmp_path / "new")
    # The encoder is trained on in a later stage, so it stays unfolded on disk.
    again, _ = load_checkpoint(tmp_path / "new", torch.float32, "cpu")
    assert again.model.vision_tower.config.form == "training"
    assert len(load(tmp_path / "new").tokens("What?", 1)) > VISUAL_TOKENS
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "decoder")
    with pytest.raises(InputError, match="no place for images"):
        assemble(small_encoder(), tmp_path / "decoder")


def captioned(size: int = 128) -> Conversation:
    """A question with an answer before it, whose last reply has alternatives."""
    [two_turns, *_] = conversations(size)
    return replace(two_turns, alternatives=("It is.", "Not that I can see, no."))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_replies_that_share_a_prompt_have_the_losses_that_they_have_alone(attention: str) -> None:
    vlm = small_vlm()
    vlm.model.model.language_model.set_attn_implementation(attention)
    rows = rows_of(vlm)
    one = captioned()
    other = conversations()[2]
    [shared], [beside] = rows.rows(one), rows.rows(other)
    both = score_replies(vlm.model, rows, [shared, beside])
    texts = (text_of(one.messages[-1]), *one.alternatives)
    alone = [
        rows.rows(replace(one, messages=said, alternatives=()))[0]
        for said in ((*one.messages[:-1], turn("assistant", text)) for text in texts)
    ]
    scores = score_replies(vlm.model, rows, alone)
    first_turn = int((alone[0].labels != IGNORED).sum()) - len(
        vlm.tokenizer.encode(texts[0], add_special_tokens=False)
    )
    expected = [scores[0].losses, *(scored.losses[first_turn - 1 :] for scored in scores[1:])]
    # Eager attention has its softmax in float32.
    torch.testing.assert_close(both[0].losses, torch.cat(expected), rtol=1e-5, atol=1e-6)
    [unshared] = score_replies(vlm.model, rows, [beside])
    torch.testing.assert_close(both[1].losses, unshared.losses)


def test_replies_share_no_prompt_beyond_what_a_layer_sees() -> None:
    vlm = small_vlm()
    rows = rows_of(vlm)
    [shared] = rows.rows(captioned())
    rows.shared_length = len(shared.labels) - 1
    assert len(rows.rows(captioned())) == 3
    vlm.model.config.text_config.sliding_window = 17
    assert rows_of(vlm).shared_length == 17


def test_other_families_learn_each_alternative_in_a_row_of_its_own(tmp_path: Path) -> None:
    saved("llava", tmp_path / "model")
    model, processor = load_checkpoint(tmp_path / "model", torch.float64, "cpu")
    rows = rows_for(model, processor, None)
    one = captioned()
    made = rows.rows(one)
    assert len(made) == 4
    for row, text in zip(made[-2:], one.alternatives, strict=True):
        said = replace(one, messages=(*one.messages[:-1], turn("assistant", text)), alternatives=())
        expected = rows.rows(said)[-1]
        assert row.inputs["input_ids"].equal(expected.inputs["input_ids"])
        assert row.labels.equal(expected.labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
# Many positions, sure of theirs; and few, to which all tokens are as good.
@pytest.mark.parametrize(("positions", "size"), [(300, 4.0), (3, 0.2)])
def test_a_frozen_head_costs_no_logits_and_changes_no_gradient(
    dtype: torch.dtype, positions: int, size: float
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 500, bias=False, dtype=dtype)
    # All rows have something in common, so that none may be left out.
    nn.init.normal_(head.weight, mean=0.5, std=0.15)
    states = (size * torch.randn(positions, 16)).to(dtype).requires_grad_()
    targets = torch.randint(500, (positions,))
    weight = torch.rand(positions, dtype=torch.float64)
    known = score_tokens(head, states, targets)
    (weight * known.losses).sum().backward()
    gradient, states.grad = states.grad, None
    head.requires_grad_(False)
    found = score_tokens(head, states, targets)
    (weight * found.losses).sum().backward()
    exact = dtype == torch.float64
    close: dict[str, float] = {} if exact else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(found.losses, known.losses, **close)
    assert found.right.equal(known.right)
    torch.testing.assert_close(states.grad, gradient, **close)


def test_what_is_frozen_is_held_in_the_precision_of_the_run() -> None:
    pytest.importorskip("peft")
    vlm = small_vlm(torch.float32)
    before = {name: weight.dtype for name, weight in vlm.model.state_dict().items()}
    with learning(vlm.model, "lora", 2), computed_in(vlm.model, torch.bfloat16):
        layer = vlm.model.model.language_model.layers[0]
        assert layer.mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
        assert layer.input_layernorm.weight.dtype == torch.float32
        learnt = {p.dtype for p in vlm.model.parameters() if p.requires_grad}
        assert learnt == {torch.float32}
        tower = {p.dtype for p in vlm.model.model.vision_tower.parameters()}
        assert tower == {torch.float32}
    assert {name: weight.dtype for name, weight in vlm.model.state_dict().items()} == before
