"""Loading a processor for texts and still images without torchvision."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import (
    PROCESSOR_MAPPING,
    processor_class_from_name,
)
from transformers.utils.import_utils import DummyObject

from fastvlm.functional.errors import CheckpointError
from fastvlm.functional.model_files import read_object

PROCESSOR_CLASS_FILE_NAMES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files that may name the processor's class; the first that does decides."""


class StillImages(ProcessorMixin):
    """A mixin that leaves out a processor's video part.

    That part alone needs torchvision, whose build may not match the installed torch.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Return the names of the processor's parts."""
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(
        cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any
    ) -> ProcessorMixin:
        """Build a processor without its video part. See `ProcessorMixin.from_args_and_dict`.

        Args:
            args: The processor's parts: tokenizer, image processor, ...
            processor_dict: The settings of the processor's configuration file.
            kwargs: Further settings.
        """
        # Some classes want to be told that there is none.
        settings = {**processor_dict, "video_processor": None}
        made: ProcessorMixin = super().from_args_and_dict(args, settings, **kwargs)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what to pickle: the class is created at run time and can't be found by name."""
        return _blank, (type(self).__bases__[1],), self.__dict__

    def apply_chat_template(self, conversation: Any, *given: Any, **named: Any) -> Any:
        """Render a dialogue with the chat template. See `ProcessorMixin.apply_chat_template`."""
        # SmolVLM's own method asks the video processor how many frames it takes.
        return ProcessorMixin.apply_chat_template(self, conversation, *given, **named)


@cache
def without_video(kind: Any) -> type[ProcessorMixin]:
    """Return a class of processors without its video part."""
    return type(kind.__name__, (StillImages, kind), {})


def _blank(kind: Any) -> ProcessorMixin:
    """Return a processor that unpickling fills."""
    found = without_video(kind)
    return found.__new__(found)


def load_processor(
    folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool = False
) -> ProcessorMixin:
    """Load the processor of a model with images.

    Args:
        folder: The model's directory.
        config: The model's configuration, which decides the class where no file names one.
        trust_remote_code: Whether to run code from the folder.

    Raises:
        CheckpointError: No file and no configuration says which class it is, or it needs a package
            that isn't installed.
    """
    kind = processor_class(folder, config)
    check_packages(kind)
    if "video_processor" in kind.get_attributes():
        kind = without_video(cast(Any, kind))
    return kind.from_pretrained(folder, trust_remote_code=trust_remote_code)


def check_packages(kind: type) -> None:
    """Refuse a processor for which a package is missing, so that `transformers` has no code of it.

    Raises:
        CheckpointError: One is missing, which is named.
    """
    if isinstance(kind, DummyObject):
        packages = " and ".join(vars(kind)["_backends"])
        raise CheckpointError(
            f"The processor {kind.__name__} needs {packages}: install {packages} in the build that"
            " fits the installed torch, see https://pytorch.org/get-started/locally."
        )


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the processor itself if it is one."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor
    return cast(PreTrainedTokenizerBase, processor.tokenizer)


def processor_class(folder: Path, config: PreTrainedConfig) -> type[ProcessorMixin]:
    """Return the class of a model's processor.

    Raises:
        CheckpointError: No file and no configuration says which.
    """
    for file in (folder / name for name in PROCESSOR_CLASS_FILE_NAMES):
        if not file.is_file():
            continue
        name = read_object(file).get("processor_class")
        found = processor_class_from_name(name) if isinstance(name, str) else None
        if found is not None:
            return cast(type[ProcessorMixin], found)
    if type(config) in PROCESSOR_MAPPING:
        return cast(type[ProcessorMixin], PROCESSOR_MAPPING[type(config)])
    raise CheckpointError(
        f"No file in {folder} names a processor that transformers knows, and the family"
        f" {config.model_type!r} has none of its own."
    )
