"""The draft's task: an imitation network learns from a frozen target.

Layers 0..k run exactly on every drafted token, so the drafter never sees its own error in its
inputs: teacher forcing over whole replies is exactly what serving does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm.drafting.directory import load_draft
from fastvlm.drafting.fingerprint import fingerprint
from fastvlm.drafting.imitation import ImitationConfig, ImitationNetwork, grown, initialise_from
from fastvlm.functional.digests import digest_of_weights
from fastvlm.functional.files import written_directory
from fastvlm.functional.placement import moved
from fastvlm.language.structure import text_decoder
from fastvlm.training.digests import digest_of_examples
from fastvlm.training.draft_plan import DraftPlan
from fastvlm.training.draws import ExampleDraws
from fastvlm.training.forcing import (
    EXAMPLE_CACHE_BYTES,
    ExampleCache,
    GradientCache,
    TeacherForcing,
)
from fastvlm.training.loop import train
from fastvlm.training.processes import this_process
from fastvlm.training.replies import Example, TrainingPrompt
from fastvlm.training.schedule import Schedule
from fastvlm.training.target import FrozenTarget, TargetStates, full_precision
from fastvlm.training.task import ExampleStream, Losses
from fastvlm.training.validation import HeldOut
from fastvlm.vlm import VisionLanguageModel

IGNORED = -100
"""Stands for a token that can't be drafted."""


def frequent_tokens(examples: Sequence[Example], most: int) -> list[int]:
    """Return the most frequent tokens of the replies, in the order of their numbers."""
    counts: Counter[int] = Counter()
    for example in examples:
        counts.update(example.reply)
    return sorted(token for token, _ in counts.most_common(most))


def new_network(
    vlm: VisionLanguageModel, plan: DraftPlan, examples: Sequence[Example]
) -> ImitationNetwork:
    """Return an untrained network where the target is, in the precision that it is trained in."""
    most = plan.draft_vocabulary
    tokens = frequent_tokens(examples, most) if most else []
    network = ImitationNetwork(
        ImitationConfig(
            kind=plan.kind,
            exit_layer=plan.exit_layer,
            blocks=plan.blocks,
            text_config=text_decoder(vlm.model).config.to_dict(),
            target=fingerprint(vlm.model),
            draft_vocabulary_size=len(tokens) or None,
        )
    )
    if not plan.random_start:
        initialise_from(network, vlm.decoder.layers)
    if network.draft_vocabulary is not None:
        network.draft_vocabulary.copy_(torch.tensor(tokens))
    network.implement_as(vlm.decoder.decoder.config)
    return moved(network, vlm.decoder.device, master(vlm.decoder.dtype))


def started_network(vlm: VisionLanguageModel, plan: DraftPlan, start: Path) -> ImitationNetwork:
    """Return a network that goes on, with as many blocks as the plan has, if it had fewer.

    Raises:
        CheckpointError: There is no such network, or it is for another target.
        InputError: It can't have further blocks.
    """
    network = moved(load_draft(start, vlm.model), master(vlm.decoder.dtype))
    if len(network.layers) < plan.blocks and plan.kind == "block":
        return grown(network, plan.blocks, vlm.decoder)
    return network


class DraftTask:
    """Teaches imitation networks side by side, from one pass of the target for all of them.

    Where there is memory for the target's states, an example goes through it once (see
    `FrozenTarget`); after that, a step costs no more than the networks' own passes.

    Args:
        vlm: The target, frozen.
        networks: The networks to train, by name.
        examples: What they learn from.
        plans: How, by the same names; as `DraftPlan` has it, for those that are not named.
        batch: Examples in a step.
        kept_bytes: The most memory for examples' prompts, and again for the target's states.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        networks: Mapping[str, ImitationNetwork],
        examples: Sequence[Example],
        plans: Mapping[str, DraftPlan] | None = None,
        *,
        batch: int = 24,
        kept_bytes: int = EXAMPLE_CACHE_BYTES,
    ) -> None:
        vlm.model.requires_grad_(False)
        # Dropout, which OPT and T5 have, would hide part of what is to be imitated.
        self.vlm, self.networks = vlm, {name: net.eval() for name, net in networks.items()}
        self.plans = {name: (plans or {}).get(name, DraftPlan()) for name in networks}
        self.examples, self.batch = examples, batch
        self.forcing = TeacherForcing(vlm, ExampleCache(kept_bytes))
        exits = [network.config.exit_layer for network in networks.values()]
        self.target = FrozenTarget(self.forcing, exits, examples, kept_bytes)
        self.module: nn.Module = nn.ModuleDict(self.networks)
        self.unit = "tokens"
        self.plan: Mapping[str, Any] = {
            "target": fingerprint(vlm.model),
            "dtype": str(vlm.decoder.dtype),
            "examples": digest_of_examples(examples),
            "batch": batch,
            "networks": {
                name: {
                    **asdict(self.plans[name]),
                    # A network that goes on keeps the shape that it had.
                    "exit_layer": network.config.exit_layer,
                    "kind": network.config.kind,
                    "first_weights": digest_of_weights(network),
                }
                for name, network in networks.items()
            },
        }
        self.source: ExampleStream | None = None
        self.whole: str | None = None
        self.draws = ExampleDraws(self.forcing, examples, batch)

    def draw(self, step: int) -> list[Example]:
        """Return the examples of a step."""
        return self.draws(step)

    def loss(self, examples: Sequence[Example]) -> Losses:
        """Return the networks' summed losses on some examples.

        KL(p || q) + 0.1 (1 - cos) + 0.1 CE, as the plans weigh them, at every position that
        predicts a token of the reply after its first (which the prefill gives). The report has, for
        each network, `agree`: how often its best token is the target's, which is the acceptance
        rate that greedy decoding sees, and `overlap`: the sum of min(p, q), which is the one that
        sampling sees.
        """
        decoder = self.vlm.decoder
        forced = self.forcing.batch(examples)
        passed = self.target.passed(examples, forced)
        last = decoder.norm(passed.last)
        losses: list[Tensor] = []
        report: dict[str, tuple[float, float]] = {}
        for name, network in self.networks.items():
            plan = self.plans[name]
            with self.precision:
                x = passed.states[network.config.exit_layer]
                cache, places = GradientCache(), forced.positions
                guess = network.imitate(x, places, cache, decoder)[forced.loss_mask]
                normed, logits = decoder.norm(guess), self.logits(guess, network.draft_vocabulary)
            log_q = logits.log_softmax(-1)
            p, wanted = self.taught(passed, network.draft_vocabulary)
            entropy = torch.special.entr(p).sum(-1)
            loss = (-(p * log_q).sum(-1) - entropy).sum()
            kl = loss.detach()
            if plan.cosine:
                cosine = F.cosine_similarity(normed, last, dim=-1)
                loss = loss + plan.cosine * (1 - cosine).sum()
            if plan.cross_entropy:
                ce = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
                loss = loss + plan.cross_entropy * ce
            number = len(passed.best)
            losses.append(loss)
            agree = (logits.argmax(-1) == wanted).sum()
            overlap = torch.minimum(log_q.exp(), p).sum()
            report |= {
                f"{name} kl": (float(kl), number),
                f"{name} agree": (float(agree), number),
                f"{name} overlap": (float(overlap.detach()), number),
            }
        return Losses(torch.stack(losses).sum(), len(passed.best), report)

    @property
    def precision(self) -> torch.autocast:
        """The target's precision, in which the network computes; its weights stay in float32."""
        decoder = self.vlm.decoder
        short = decoder.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(decoder.device.type, decoder.dtype if short else None, enabled=short)

    def logits(self, guess: Tensor, vocabulary: Tensor | None) -> Tensor:
        """Return the logits of guessed states.

        Args:
            guess: (positions, d_model).
            vocabulary: The tokens whose logits are wanted; None for all.

        Returns:
            (positions, draft vocabulary).
        """
        decoder = self.vlm.decoder
        if vocabulary is None:
            return full_precision(decoder.head(guess))
        rows = decoder.lm_head_rows(vocabulary)
        if rows is None:
            # Quantised or adapted: such a head is more than its rows.
            return full_precision(decoder.head(guess)[:, vocabulary])
        return full_precision(decoder.logits(F.linear(decoder.norm(guess), rows)))

    @torch.no_grad()
    def taught(self, passed: TargetStates, vocabulary: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what a network is to imitate, in the numbers of its vocabulary.

        Args:
            passed: The target's pass.
            vocabulary: The tokens that can be drafted; None for all.

        Returns:
            The target's distribution over them, (positions, draft vocabulary), and its best
            tokens, (positions,), with `IGNORED` for one that can't be drafted.
        """
        p = (self.logits(passed.last, vocabulary) - passed.normaliser[:, None]).exp()
        if vocabulary is None:
            return p, passed.best
        columns = torch.full((self.target.vocabulary,), IGNORED, device=vocabulary.device)
        columns[vocabulary] = torch.arange(len(vocabulary), device=vocabulary.device)
        return p, columns[passed.best]


def master(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of weights that are trained for a target of a precision.

    It is float32 at least: the small steps of an optimiser vanish in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def train_draft(
    vlm: VisionLanguageModel,
    plans: Mapping[str, DraftPlan],
    examples: Sequence[Example],
    output: Path,
    schedule: Schedule,
    start: Path | None = None,
    held_out: Sequence[TrainingPrompt] = (),
) -> dict[str, ImitationNetwork]:
    """Train networks for a frozen target and save each as `output/<name>`, in bfloat16.

    Args:
        vlm: The target.
        plans: What to train, by name.
        examples: What they learn from.
        output: The directory of the checkpoint while it runs, and of the drafts in the end.
        schedule: Length and learning rate of the run.
        start: The output of an earlier run, whose networks go on; their exit layers and
            vocabularies stay, and of blocks there are more where a plan has more. None for new
            ones.
        held_out: Questions to validate with, by decoding.

    Raises:
        CheckpointError: There is no such network to go on from, or it is for another target.
    """
    torch.manual_seed(schedule.seed)
    networks = {
        name: new_network(vlm, plan, examples)
        if start is None
        else started_network(vlm, plan, start / name)
        for name, plan in plans.items()
    }
    for network in networks.values():
        # A network that goes on may have begun with the target as it was then.
        network.config.target = fingerprint(vlm.model)
    task = DraftTask(vlm, networks, examples, plans)
    with task.draws.ahead(schedule):
        train(task, schedule, output, HeldOut(vlm, networks, held_out) if held_out else None)
    if this_process().is_main_process:
        for name, network in networks.items():
            with written_directory(output / name) as beside:
                moved(network, torch.bfloat16).save_pretrained(beside)
    return networks
