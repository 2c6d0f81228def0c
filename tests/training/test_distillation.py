"""An encoder's task: a teacher's features of places and of images, its logits, and bad teachers."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.data.broken import BrokenRecords
from fastvlm.data.conversations import Records
from fastvlm.data.training_images import (
    CropMaker,
    ImageReference,
    distinct_images,
    is_image_folder,
    read_image_folder,
    whole_image,
)
from fastvlm.functional.errors import InputError
from fastvlm.training.assembly import read_encoder
from fastvlm.training.distillation import DistillationTask, HeldOutImages, distil, shown_at
from fastvlm.training.distillation_plan import DistillationPlan
from fastvlm.training.loop import train
from fastvlm.training.optimisation import seed_step
from fastvlm.training.read_out import RIDGE, regression, resampled
from fastvlm.training.schedule import Schedule
from fastvlm.training.teacher import Teacher, TeacherImages, TeacherOutputs, load_teacher
from fastvlm.vision import FastViTHD
from fastvlm.vision.images import prepare
from fastvlm_example.scenes import render, sample
from tests.models import small_encoder_config
from tests.training import teachers
from tests.training.test_instruction import conversations, source
from tests.training.test_loop import assert_same, ended

STATED = {"image_mean": "0.4 0.5 0.6", "image_std": "0.2,0.25,0.5"}
SCHEDULE = Schedule(steps=6, learning_rate=3e-3, warmup=2, checkpoint_seconds=0)
PLAN = DistillationPlan(batch=4)
CPU = torch.device("cpu")
UNSAID = TeacherImages()


def teacher_of(name: str, given: TeacherImages = UNSAID) -> Teacher:
    return load_teacher(f"{teachers.FILE}:{name}", given, CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[ImageReference]:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        render(sample(number), 128).crop((0, 0, 128, 70 + 4 * number)).save(
            folder / f"{number:02}.png"
        )
    return distinct_images(read_image_folder(folder), BrokenRecords())


def new_encoder(form: str = "training") -> FastViTHD:
    torch.manual_seed(2)
    encoder = FastViTHD(small_encoder_config(layer_scale_init=1.0))
    return encoder if form == "training" else encoder.fuse()


def new_task(
    images: Sequence[ImageReference],
    name: str = "grid",
    schedule: Schedule = SCHEDULE,
    plan: DistillationPlan = PLAN,
    form: str = "training",
) -> DistillationTask:
    encoder = new_encoder(form).train()
    return DistillationTask(encoder, teacher_of(name), images, schedule, plan, {})


@pytest.mark.parametrize(
    ("name", "has_grid"),
    [("grid", True), ("tokens", True), ("class_token", True), ("vector", False)],
)
def test_features_of_any_form_are_those_of_places_and_of_images(name: str, has_grid: bool) -> None:
    pixels = torch.rand(3, 3, teachers.SIZE, teachers.SIZE)
    teacher = teacher_of(name)
    found, expected = teacher(pixels), teacher_of("grid")(pixels)
    assert (teacher.channels, teacher.has_grid) == (7, has_grid)
    if has_grid:
        assert found.grid.equal(expected.grid)
    # The summary of a class token is its own.
    pooled = 2 * expected.pooled if name == "class_token" else expected.pooled
    torch.testing.assert_close(found.pooled, pooled)
    assert (found.logits is None) == (name != "grid")


def test_images_are_normalised_as_the_teacher_says_or_the_user() -> None:
    pixels = torch.rand(2, 3, teachers.SIZE, teachers.SIZE)
    module = teachers.Colours()
    mean, std = (torch.tensor(x)[:, None, None] for x in (module.image_mean, module.image_std))
    expected = module((pixels - mean) / std)["features"]
    torch.testing.assert_close(teacher_of("grid")(pixels).grid, expected)
    plain = teacher_of("grid", TeacherImages(size=64, mean=(0, 0, 0), std=(1, 1, 1)))
    small = pixels[..., :64, :64]
    torch.testing.assert_close(plain(small).grid, module(small)["features"])
    assert plain.size == 64
    assert plain.plan != teacher_of("grid").plan


@pytest.mark.parametrize(
    ("batch", "size"), [("batch", teachers.SIZE), (1, teachers.SIZE), ("batch", "side")]
)
def test_an_onnx_file_teaches_what_its_module_does(
    tmp_path: Path, batch: int | str, size: int | str
) -> None:
    stated = STATED if isinstance(size, int) else {**STATED, "image_size": str(teachers.SIZE)}
    file = teachers.save_onnx(tmp_path / "t.onnx", batch=batch, size=size, stated=stated)
    teacher = load_teacher(str(file), UNSAID, CPU)
    pixels = torch.rand(3, 3, teachers.SIZE, teachers.SIZE)
    found, expected = teacher(pixels), teacher_of("grid")(pixels)
    torch.testing.assert_close(found.grid, expected.grid)
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.logits, expected.logits)


def test_an_exported_program_teaches_what_its_module_does(tmp_path: Path) -> None:
    pixels = torch.rand(3, 3, teachers.SIZE, teachers.SIZE)
    batch = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(teachers.Colours(), (pixels,), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "t.pt2")
    given = TeacherImages(teachers.SIZE, teachers.Colours.image_mean, teachers.Colours.image_std)
    found = load_teacher(str(tmp_path / "t.pt2"), given, CPU)(pixels)
    torch.testing.assert_close(found.grid, teacher_of("grid")(pixels).grid)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.onnx", "no teacher at nowhere.onnx"),
        ("nowhere.pt2", "no teacher at nowhere.pt2"),
        ("nowhere.py:grid", "no file nowhere.py"),
        ("no.such.module:grid", "no.such.module:grid can't be made: ModuleNotFoundError"),
        ("efficientnet", "module:callable"),
        (f"{teachers.FILE}:nothing", "AttributeError"),
        (f"{teachers.FILE}:raises", "its weights are missing"),
        (f"{teachers.FILE}:number", "is a int, no torch module"),
        (f"{teachers.FILE}:not_a_square", r"\(2, 7, 4\); a teacher has a grid"),
        (f"{teachers.FILE}:one_for_all", r"features of .* are \(1, 4\)"),
        (f"{teachers.FILE}:no_numbers", "no finite numbers"),
        (f"{teachers.FILE}:unnamed", "returns last; features are needed"),
        (f"{teachers.FILE}:text", "features of .* are str"),
        (f"{teachers.FILE}:fails", r"can't take images of \(2, 3, 64, 64\)"),
        (f"{teachers.FILE}:silent", "give --teacher-mean"),
        (f"{teachers.FILE}:four_colours", "mean of .* is three numbers"),
        (f"{teachers.FILE}:grey", "std of .* is above 0"),
    ],
)
def test_a_bad_teacher_is_refused_in_a_sentence(name: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as refused:
        load_teacher(name, UNSAID, CPU)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_an_onnx_file_that_is_no_teacher_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(InputError, match="can't be read as ONNX"):
        load_teacher(str(file), UNSAID, CPU)
    teachers.save_onnx(file, stated={})
    with pytest.raises(InputError, match="give --teacher-mean"):
        load_teacher(str(file), UNSAID, CPU)
    teachers.save_onnx(file, batch=4, stated=STATED)
    with pytest.raises(InputError, match="takes 4 images at a time"):
        load_teacher(str(file), UNSAID, CPU)
    teachers.save_onnx(file, stated=STATED)
    with pytest.raises(InputError, match=r"can't take images of \(2, 3, 64, 64\)"):
        load_teacher(str(file), TeacherImages(size=64), CPU)


def test_the_loss_is_the_naive_one(images: list[ImageReference]) -> None:
    task = new_task(images)
    task.encoder.double()
    task.read_out.double()
    seed_step(0, 0)
    shown = [one.double() for one in task.draw(0)]
    found = task.loss(shown)
    pixels = torch.stack(shown)
    assert pixels.shape == (4, 3, 128, 128)
    taught = task.teacher(shown_at(pixels, teachers.SIZE))
    states = task.encoder(pixels).last_hidden_state
    mean, std = states.mean(1, keepdim=True), states.var(1, correction=0, keepdim=True)
    features = (states - mean) / (std + 1e-5).sqrt()
    read, total = task.read_out, 0.0
    for number in range(4):
        places = []
        for row in range(2):
            for column in range(2):
                # Three places of the teacher for two of the encoder: the middle one is in both.
                area = taught.grid[number, :, row : row + 2, column : column + 2].mean((1, 2))
                guess = read.grid(features[number, :, row, column])
                places.append(((area - read.grid_mean) / read.grid_deviation - guess) ** 2)
        total += torch.stack(places).mean()
        whole = features[number].mean((1, 2))
        target = (taught.pooled[number] - read.pooled_mean) / read.pooled_deviation
        total += ((target - read.pooled(whole)) ** 2).mean()
        p, q = (x.div(2).softmax(-1) for x in (taught.logits[number], read.logits(whole)))
        total += 4 * (p * (p / q).log()).sum()
    assert found.weight == 4
    torch.testing.assert_close(found.total, total, rtol=1e-9, atol=0)
    assert found.report.keys() == {"grid", "pooled", "classes"}
    assert sum(value for value, _ in found.report.values()) == pytest.approx(float(total.detach()))


def test_a_teachers_features_are_standardised_over_the_images(
    images: list[ImageReference],
) -> None:
    task = new_task(images)
    for features in task.read_out.standardised(task.first(images)[1]).values():
        flat = features.flatten(0, -2)
        torch.testing.assert_close(flat.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
        torch.testing.assert_close(flat.std(0, correction=0), torch.ones(7))


def test_the_read_out_begins_as_a_ridge_regression() -> None:
    torch.manual_seed(4)
    x, y = torch.randn(30, 6, dtype=torch.float64) + 3, torch.randn(30, 2, dtype=torch.float64)
    made = regression(x, y)
    weight = made.weight.detach().double().requires_grad_(True)
    bias = made.bias.detach().double().requires_grad_(True)
    loss = (x @ weight.T + bias - y).square().sum() + RIDGE * len(x) * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert all(one.abs().max() < 1e-4 for one in gradients)


def test_a_channel_that_never_varies_stays_finite(
    images: list[ImageReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers.Colours, "forward", lambda _, pixels: 0 * pixels.mean((2, 3)) + 1)
    task = new_task(images, "vector")
    seed_step(0, 0)
    assert task.loss(task.draw(0)).total.isfinite()


@pytest.mark.parametrize("name", ["grid", "vector"])
def test_an_encoder_learns_what_its_teacher_sees(
    images: list[ImageReference], name: str, tmp_path: Path
) -> None:
    schedule = dataclasses.replace(SCHEDULE, steps=60, validation_steps=60)
    # The same whole images in each step: with random crops of few, a run may end anywhere.
    plan = dataclasses.replace(PLAN, batch=12, mixup=0.0, smallest_crop=1.0)
    task = new_task(images, name, schedule, plan)
    measure = HeldOutImages(task, images)
    before = measure(0)
    train(task, schedule, tmp_path)
    after = measure(60)
    assert after["held-out pooled explained"] > before["held-out pooled explained"]
    assert after["held-out pooled cosine"] > before["held-out pooled cosine"] + 0.5
    assert ("held-out same class" in after) == (name == "grid")


def test_what_is_measured_is_the_share_of_the_variance(images: list[ImageReference]) -> None:
    task = new_task(images)
    measure = HeldOutImages(task, images[:5])
    found = measure(0)
    encoder = task.encoder
    assert encoder.training
    assert all(part.training for part in encoder.modules())
    encoder.eval()
    taught, guesses = [], []
    with torch.no_grad():
        for one in images[:5]:
            pixels = whole_image(one.image(), 128)[None]
            taught.append(task.teacher(shown_at(pixels, teachers.SIZE)).pooled[0])
            guesses.append(task.read_out(encoder(pixels).last_hidden_state)["pooled"][0])
    scale = task.read_out
    truth = (torch.stack(taught) - scale.pooled_mean) / scale.pooled_deviation
    guess = torch.stack(guesses)
    share = 1 - (truth - guess).var(0, correction=0).sum() / truth.var(0, correction=0).sum()
    bias = (truth - guess).mean(0).square().sum() / truth.var(0, correction=0).sum()
    assert found["held-out pooled explained"] == pytest.approx(float(share - bias), rel=1e-4)
    cosine = F.cosine_similarity(truth, guess).mean()
    assert found["held-out pooled cosine"] == pytest.approx(float(cosine), rel=1e-4)


def fail(*_: object) -> None:
    raise ZeroDivisionError("a step fails")


@pytest.mark.parametrize("form", ["training", "fused"])
def test_a_failed_run_goes_on_where_it_stopped(
    images: list[ImageReference], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(new_task(images, form=form), SCHEDULE, tmp_path / "whole")
    for step in (2, 5):
        task = new_task(images, form=form)
        draw = task.draw
        monkeypatch.setattr(task, "draw", lambda at, d=draw, s=step: fail() if at == s else d(at))
        with pytest.raises(ZeroDivisionError):
            train(task, SCHEDULE, tmp_path / "failed")
    assert ended(tmp_path / "failed")["step"] == 5
    train(new_task(images, form=form), SCHEDULE, tmp_path / "failed")
    assert_same(ended(tmp_path / "failed"), ended(tmp_path / "whole"))


@pytest.mark.slow
def test_workers_change_nothing(images: list[ImageReference], tmp_path: Path) -> None:
    for workers in (0, 2):
        schedule = dataclasses.replace(SCHEDULE, workers=workers)
        task = new_task(images, schedule=schedule)
        train(task, schedule, tmp_path / str(workers))
        task.close()
    assert_same(ended(tmp_path / "2"), ended(tmp_path / "0"))


def test_a_runs_last_steps_are_taken_as_inference_computes(images: list[ImageReference]) -> None:
    task = new_task(images, schedule=dataclasses.replace(SCHEDULE, steps=10))
    norms = [part for part in task.encoder.modules() if isinstance(part, nn.BatchNorm2d)]
    kept: list[list[Tensor]] = []
    for step in range(10):
        seed_step(0, step)
        crops = torch.stack(task.draw(step))
        assert {norm.training for norm in norms} == {step < 8}
        task.loss(list(crops))
        kept.append([norm.running_mean.clone() for norm in norms])
        # Crops of one image each have whole values of 255.
        mixed = not torch.allclose((crops * 255).round(), crops * 255, atol=1e-3)
        assert mixed == (step < 8)
    assert all(map(torch.equal, kept[7], kept[9]))
    assert not all(map(torch.equal, kept[6], kept[7]))


def test_a_step_needs_all_of_its_crops_only_where_batches_are_normed(
    images: list[ImageReference],
) -> None:
    assert "batch norms" in str(new_task(images).whole)
    task = new_task(images, form="fused")
    assert task.whole is None
    seed_step(0, 0)
    shown = task.draw(0)
    both = task.loss(shown).total
    torch.testing.assert_close(both, task.loss(shown[:1]).total + task.loss(shown[1:]).total)


def test_crops_lie_in_the_image_and_depend_on_their_seed_alone() -> None:
    ramp = Image.new("RGB", (200, 100))
    ramp.putdata([(x, 255 - x, 128) for _ in range(100) for x in range(200)])
    make = CropMaker(64, 0.5)
    random.seed(1)
    crops = [make((f"0/{number}", ramp)) for number in range(40)]
    random.seed(2)
    assert all(crop.equal(make((f"0/{n}", ramp))) for n, crop in enumerate(crops))
    assert not crops[0].equal(crops[1])
    for crop in crops:
        assert (crop.shape, crop.dtype) == ((3, 64, 64), torch.uint8)
        slope = crop[0, 32, 48].float() - crop[0, 32, 16].float()
        assert slope != 0
    rising = [bool(crop[0, 32, 48] > crop[0, 32, 16]) for crop in crops]
    assert 8 < sum(rising) < 32
    whole = CropMaker(64, 1.0)(("a", Image.new("RGB", (80, 40), (100, 100, 100))))
    assert whole.float().std(dim=(1, 2)).max() == 0


def test_an_image_is_held_out_as_it_is_shown_later() -> None:
    image = render(sample(3), 192).crop((0, 0, 150, 90))
    assert whole_image(image, 128).equal(prepare(image, 128)[0])


def test_an_image_that_is_shown_twice_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    render(sample(1), 64).save(path)
    (tmp_path / "b.png").write_bytes(path.read_bytes())
    records = read_image_folder(tmp_path)
    twice = Records([path, path, tmp_path / "b.png"], records.convert, lambda n, _: str(n))
    found = distinct_images(twice, BrokenRecords())
    assert [one.image() for one in found] == [path, tmp_path / "b.png"]
    assert len(distinct_images(twice, BrokenRecords(), 1)) == 1
    # One without an image, one with two.
    assert len(distinct_images(source(conversations()), BrokenRecords())) == 3
    assert is_image_folder(str(tmp_path))
    (tmp_path / "a.txt").write_text("A red square.")
    assert not is_image_folder(str(tmp_path))


def test_an_encoder_is_saved_as_a_model_takes_it(
    images: list[ImageReference], tmp_path: Path
) -> None:
    encoder = new_encoder()
    teacher = teacher_of("grid")
    found = distil(encoder, teacher, images[2:], images[:2], SCHEDULE, PLAN, tmp_path, "data")
    again = read_encoder(tmp_path)
    assert again.config.form == "training"
    assert_same(dict(again.state_dict()), dict(encoder.state_dict()))
    assert -1 < found["held-out grid cosine"] < 1
    with pytest.raises(InputError, match="At least two images"):
        HeldOutImages(new_task(images), images[:1])


def test_a_large_grid_is_averaged_over_areas() -> None:
    grid = torch.arange(16.0).view(1, 1, 4, 4)
    found = resampled(TeacherOutputs(grid, grid.mean((2, 3)), None), 2, 2).grid
    assert found.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
