"""New models of an encoder and a decoder: how their turns are written, and how they begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from fastvlm.checkpoints import load_checkpoint
from fastvlm.data.conversations import Broken, Conversation, Records
from fastvlm.data.feed import Feed
from fastvlm.functional.errors import InputError
from fastvlm.prompts.messages import question
from fastvlm.training.assembly import assemble, replace_encoder
from fastvlm.training.instruction import tune_model
from fastvlm.training.paper_stages import PaperStage
from fastvlm.training.schedule import Schedule
from fastvlm.training.turn_formats import prepare_tokenizer
from fastvlm.training.words import WordExampleMaker, WordsTask, count_words, teach_words
from fastvlm.vlm import load
from tests.models import IMAGE_SIZE, VISUAL_TOKENS, small_encoder, small_vlm

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
GEMMA_TOKENS = ("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it? "}]},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Sure?"},
]


def tokenizer_with(*special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, with some special tokens."""
    words = ["<pad>", *special, "user", "model", "assistant", "It", "is", "what", ".", "a"]
    words += [*COLOURS, *(f"w{number}" for number in range(20))]
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, "<pad>"))
    made.pre_tokenizer = Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<pad>")
    found.add_special_tokens({"additional_special_tokens": [*special]})
    if "<bos>" in special:
        found.bos_token = "<bos>"
    return found


def gemma_decoder(folder: Path) -> PreTrainedTokenizerFast:
    """Save a small Gemma 3 without a chat template."""
    tokenizer = tokenizer_with(*GEMMA_TOKENS)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=16,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def colours() -> Records:
    """Return images of one colour each, and sentences that say which."""

    def convert(name: str, row: tuple[str, int]) -> Conversation:
        colour, number = row
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLOURS[colour])
        image.putpixel((number, 0), (0, 0, 0))
        answer = {"role": "assistant", "content": [{"type": "text", "text": f"It is {colour} ."}]}
        return Conversation(name, (*question("what", image), answer), (f"a {colour}",))

    rows = [(colour, number) for colour in COLOURS for number in range(12)]
    return Records(rows, convert, lambda place, _: str(place))


def test_a_format_is_chosen_by_what_the_tokenizer_knows() -> None:
    gemma, chatml = tokenizer_with(*GEMMA_TOKENS), tokenizer_with(*CHATML_TOKENS)
    assert prepare_tokenizer(gemma, Path("x")) == ("<start_of_image>", gemma.vocab["<end_of_turn>"])
    assert prepare_tokenizer(chatml, Path("x")) == ("<image>", chatml.vocab["<|im_end|>"])
    assert "<image>" in chatml.get_vocab()
    assert "<image>" not in gemma.get_vocab()
    assert gemma.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe kind.\n\n<start_of_image>\nWhat is it?<end_of_turn>\n"
        "<start_of_turn>model\nA dog.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(InputError, match="ChatML or Gemma's"):
        prepare_tokenizer(tokenizer_with("<bos>"), Path("x"))


@pytest.mark.parametrize("image", ["<image>", "<start_of_image>"])
def test_a_template_of_the_decoders_own_is_kept(image: str) -> None:
    tokenizer = tokenizer_with(*GEMMA_TOKENS)
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m.content %}"
        f"{{% if p.type == 'image' %}}{image}{{% else %}}{{{{ p.text }}}}{{% endif %}}"
        "{% endfor %}{% endfor %}"
    )
    before = tokenizer.chat_template
    assert prepare_tokenizer(tokenizer, Path("x")) == (image, None)
    assert tokenizer.chat_template == before
    assert image in tokenizer.get_vocab()


def test_a_new_model_around_gemma_is_asked_in_gemmas_turns(tmp_path: Path) -> None:
    tokenizer = gemma_decoder(tmp_path / "decoder")
    model, prepared = assemble(small_encoder(), tmp_path / "decoder")
    assert model.lm_head.weight.shape[0] == len(tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    known = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    text = torch.randint(4, len(tokenizer), (1, 30))
    assert model(input_ids=text).logits.equal(known(input_ids=text).logits)
    # An image is as large as a word is, after Gemma's own scaling.
    with torch.no_grad():
        shown = torch.cat([*model.eval().get_image_features(torch.rand(2, 3, 128, 128))[1]])
        words = model.get_input_embeddings()(torch.arange(len(tokenizer)))
    sizes = [float(x.square().mean().sqrt()) for x in (shown, words)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)
    stage = PaperStage("lora", 1e-3, None, 2, 1, "")
    schedule = Schedule(steps=2, learning_rate=1e-3, warmup=0)
    tune_model(model, prepared, colours(), stage, schedule, tmp_path / "model", rank=2)
    vlm = load(tmp_path / "model", dtype=torch.float64)
    asked = vlm.tokens("what", 1)
    assert asked.count(tokenizer.vocab["<start_of_image>"]) == VISUAL_TOKENS
    assert vlm.model.generation_config.eos_token_id == tokenizer.vocab["<end_of_turn>"]
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLOURS["red"])
    inputs = vlm.prompts.inputs(question("what", image))
    known_reply = vlm.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    reply = vlm.generate("what", image, max_new_tokens=40, strategy="prompt-lookup")
    assert list(reply.token_ids) == known_reply[0, len(asked) :].tolist()


def test_an_encoder_is_replaced_by_one_of_its_width() -> None:
    model = small_vlm(torch.float32).model
    other = small_encoder(image_size=192)
    replace_encoder(model, other)
    assert model.model.vision_tower is other
    assert model.config.vision_config.image_size == 192
    assert model.config.image_seq_length == 9
    with pytest.raises(InputError, match="64 wide, and the model's projector reads 128"):
        replace_encoder(model, small_encoder(widths=(8, 16, 32, 32, 32)))


def test_words_are_tokens_that_tell_images_apart(tmp_path: Path) -> None:
    tokenizer = gemma_decoder(tmp_path)
    words = count_words(colours(), tokenizer)
    assert sorted(tokenizer.convert_ids_to_tokens(words.tokens)) == sorted(COLOURS)
    assert words.weights == pytest.approx([torch.tensor(3.0).log().item()] * 3)
    few = Records([0], lambda *_: colours()[0], lambda *_: "one")
    with pytest.raises(InputError, match="too small"):
        count_words(few, tokenizer)


def test_a_projector_learns_to_tell_images_by_words(tmp_path: Path) -> None:
    tokenizer = gemma_decoder(tmp_path / "decoder")
    torch.manual_seed(1)
    model, prepared = assemble(small_encoder(), tmp_path / "decoder")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stage = PaperStage("projector", 5e-3, None, 12, 1, "")
    schedule = Schedule(steps=80, learning_rate=5e-3, warmup=5, weight_decay=0.0)
    teach_words(model, prepared, colours(), stage, schedule, tmp_path / "model")
    after, _ = load_checkpoint(tmp_path / "model", torch.float32)
    changed = [
        name
        for name, weight in after.state_dict().items()
        if not weight.equal(before[name].to(torch.bfloat16).float())
    ]
    assert changed
    assert all("multi_modal_projector" in name for name in changed)
    words = count_words(colours(), tokenizer)
    maker = WordExampleMaker(prepared, IMAGE_SIZE)
    task = WordsTask(after, words, Feed(colours()), maker, 12)
    found = task.loss(task.draw(0))
    assert found.report["words"][0] / found.weight < 0.3
    embedded = after.get_input_embeddings()(torch.tensor(words.tokens))
    for place, colour in enumerate(COLOURS):
        example = maker(colours()[12 * place])
        assert not isinstance(example, Broken)
        with torch.no_grad():
            visual = torch.cat([*after.get_image_features(example.pixels)[1]])
        nearest = (visual - embedded.mean(0)) @ (embedded - embedded.mean(0)).T
        assert tokenizer.convert_ids_to_tokens([words.tokens[nearest.amax(0).argmax()]]) == [colour]


def test_words_need_images_at_hand(tmp_path: Path) -> None:
    gemma_decoder(tmp_path / "decoder")
    model, prepared = assemble(small_encoder(), tmp_path / "decoder")
    text = Conversation("text", colours()[0].messages[1:])
    assert isinstance(WordExampleMaker(prepared, IMAGE_SIZE)(text), Broken)
    stage, schedule = PaperStage("projector", 0.02, None, 12, 1, ""), Schedule(1, 0.02)
    shards: Any = object()
    with pytest.raises(InputError, match="can't be streamed"):
        teach_words(model, prepared, shards, stage, schedule, tmp_path / "model")
