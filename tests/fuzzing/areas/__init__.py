"""The areas, by name."""

from __future__ import annotations

from tests.fuzzing.area import Area
from tests.fuzzing.areas.checkpoints import Checkpoints
from tests.fuzzing.areas.command_lines import CommandLines
from tests.fuzzing.areas.configurations import Configurations
from tests.fuzzing.areas.datasets import DataSets
from tests.fuzzing.areas.drafts import Drafts
from tests.fuzzing.areas.images import Images
from tests.fuzzing.areas.requests import Requests
from tests.fuzzing.areas.tokenizers import Tokenizers

AREAS: dict[str, type[Area]] = {
    area.name: area
    for area in (
        Images,
        Requests,
        Configurations,
        Tokenizers,
        Checkpoints,
        Drafts,
        DataSets,
        CommandLines,
    )
}
