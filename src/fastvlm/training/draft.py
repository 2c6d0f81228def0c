"""The draft's lesson: an imitation network learns from a frozen target.

Layers 0..k run exactly on every drafted token, so the drafter never sees its own error in its
inputs: teacher forcing over whole replies is exactly what serving does.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from fastvlm.data.questions import Question
from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import ImitationConfig, ImitationNetwork, initialise_from
from fastvlm.functional.placement import moved
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.replies import Dialogue
from fastvlm.training.schedule import Schedule
from fastvlm.training.task import Losses, Source
from fastvlm.training.validation import HeldOut
from fastvlm.vlm import VisionLanguageModel


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What to train.

    Args:
        kind: `block` or `mlp`.
        exit_layer: Layers of the target that run before the network (k).
        draft_vocabulary: The most tokens that can be drafted: the most frequent of the replies.
    """

    kind: str = "block"
    exit_layer: int = 1
    draft_vocabulary: int = 1024


def frequent_tokens(dialogues: Sequence[Dialogue], most: int) -> list[int]:
    """Return the most frequent tokens of the replies, in the order of their numbers."""
    counts: Counter[int] = Counter()
    for dialogue in dialogues:
        counts.update(dialogue.tokens[dialogue.reply_start :])
    return sorted(token for token, _ in counts.most_common(most))


def new_network(
    vlm: VisionLanguageModel, plan: DraftPlan, dialogues: Sequence[Dialogue]
) -> ImitationNetwork:
    """Return a network that starts as the layers of the target that it stands for."""
    tokens = torch.tensor(frequent_tokens(dialogues, plan.draft_vocabulary))
    network = ImitationNetwork(
        ImitationConfig(
            kind=plan.kind,
            exit_layer=plan.exit_layer,
            text_config=vlm.model.config.get_text_config().to_dict(),
            target=fingerprint(vlm.model),
            draft_vocabulary_size=len(tokens),
        )
    )
    initialise_from(network, vlm.decoder.layers)
    assert network.draft_vocabulary is not None  # its size was given
    network.draft_vocabulary.copy_(tokens)
    return network


class DraftLesson:
    """Teaches imitation networks side by side, from one pass of the target for all of them.

    Args:
        vlm: The target, frozen.
        networks: The networks to train.
        dialogues: The target's own replies.
        batch: Dialogues in a step.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        networks: Sequence[ImitationNetwork],
        dialogues: Sequence[Dialogue],
        *,
        batch: int = 24,
    ) -> None:
        vlm.model.requires_grad_(False)
        self.vlm, self.networks = vlm, list(networks)
        self.dialogues, self.batch = dialogues, batch
        self.module: nn.Module = nn.ModuleList(self.networks).to(vlm.decoder.device)
        self.unit = "tokens"
        self.source: Source | None = None
        self.whole: str | None = None

    def draw(self, step: int) -> list[Dialogue]:
        """Return the dialogues of a step."""
        return random.sample(self.dialogues, min(self.batch, len(self.dialogues)))

    def loss(self, dialogues: Sequence[Dialogue]) -> Losses:
        """Return the networks' summed losses on some dialogues.

        KL(p || q) + 0.1 (1 - cos) + 0.1 CE at every position that predicts a token of the reply
        after its first (which the prefill gives); CE where that token can be drafted. The report
        has, for each network, `agree`: how often its best token is the target's, which is the
        acceptance rate that greedy decoding sees, and `overlap`: the sum of min(p, q), which is the
        one that sampling sees.
        """
        decoder = self.vlm.decoder
        tokens = pad_sequence([torch.tensor(d.tokens) for d in dialogues], batch_first=True)
        tokens = tokens.to(decoder.device)
        lengths = tokens.new_tensor([len(d.tokens) for d in dialogues])
        starts = tokens.new_tensor([d.reply_start for d in dialogues])
        places = torch.arange(tokens.shape[1], device=tokens.device)
        # Position i predicts token i + 1: those that a draft can hold are after the first.
        learnt = (places >= starts[:, None]) & (places < lengths[:, None] - 1)
        exits = sorted({network.config.exit_layer for network in self.networks})
        with torch.no_grad():
            x = decoder.embed(tokens)
            pictures = tokens == self.vlm.model.config.image_token_id
            pictures &= places < starts[:, None]
            features = torch.cat([d.features for d in dialogues]).to(x)
            x = x.masked_scatter(pictures[..., None], features)
            extra = max(network.cache_layers for network in self.networks)
            cache = decoder.cache(len(tokens), tokens.shape[1], extra)
            span = cache.span([0] * len(tokens), tokens.shape[1])
            states, before = {}, 0
            for exit_layer in exits:
                x = states[exit_layer] = decoder.run(x, span, cache, range(before, exit_layer))
                before = exit_layer
            last = decoder.run(x, span, cache, range(before, decoder.depth))[learnt]
            p = decoder.head(last).softmax(-1)
            best = p.argmax(-1)
        losses: list[Tensor] = []
        report: dict[str, tuple[float, float]] = {}
        for network in self.networks:
            # A cache of its own for each step's graph: keys and values carry gradients here.
            own = GradientCache()
            guess = network.run(states[network.config.exit_layer], span, own, decoder)[learnt]
            vocabulary = network.draft_vocabulary
            assert vocabulary is not None  # `new_network` gives every network one
            normed = decoder.norm(guess)
            logits = F.linear(normed, decoder.head_rows(vocabulary))
            log_q, p_seen = logits.log_softmax(-1), p[:, vocabulary]
            kl = (-(p_seen * log_q).sum(-1) - torch.special.entr(p_seen).sum(-1)).sum()
            cosine = (1 - F.cosine_similarity(normed, decoder.norm(last), dim=-1)).sum()
            columns = vocabulary.new_full((p.shape[-1],), -100).scatter(
                0, vocabulary, torch.arange(len(vocabulary), device=vocabulary.device)
            )
            ce = F.cross_entropy(logits, columns[best], ignore_index=-100, reduction="sum")
            losses.append(kl + 0.1 * cosine + 0.1 * ce)
            agree = vocabulary[logits.argmax(-1)] == best
            overlap = torch.minimum(log_q.exp(), p_seen)
            name = f"{network.config.kind}@{network.config.exit_layer}"
            measures = {"kl": kl, "agree": agree, "overlap": overlap}
            report |= {
                f"{name} {measure}": (float(value.detach().sum()), len(best))
                for measure, value in measures.items()
            }
        return Losses(torch.stack(losses).sum(), len(best), report)


class GradientCache:
    """The cache of one pass in training: it keeps nothing."""

    def write_at(self, span: object) -> None:
        """Nothing is written."""

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Return what was given: a pass from position 0 sees itself alone."""
        del layer_idx
        return keys, values


def train_draft(
    vlm: VisionLanguageModel,
    plans: dict[str, DraftPlan],
    dialogues: Sequence[Dialogue],
    output: Path,
    schedule: Schedule,
    start: Path | None = None,
    held_out: Sequence[Question] = (),
) -> None:
    """Train networks for a frozen target and save each as `output/<name>`, in bfloat16.

    Args:
        vlm: The target.
        plans: What to train, by name.
        dialogues: The target's own replies (`own_replies`).
        output: The directory of the checkpoint while it runs, and of the drafts in the end.
        schedule: Length and learning rate of the run.
        start: The output of an earlier run, whose networks go on; their exit layers and
            vocabularies stay. None for new ones.
        held_out: Questions to validate with, by decoding.

    Raises:
        CheckpointError: There is no such network to go on from, or it is for another target.
    """
    torch.manual_seed(schedule.seed)
    networks = {
        name: new_network(vlm, plan, dialogues)
        if start is None
        else load_draft(start / name, vlm.model)
        for name, plan in plans.items()
    }
    lesson = DraftLesson(vlm, list(networks.values()), dialogues)
    train(lesson, schedule, output, HeldOut(vlm, networks, held_out) if held_out else None)
    if this_process().is_main_process:
        for name, network in networks.items():
            moved(network, torch.bfloat16).save_pretrained(output / name)
