"""Which tokens may follow, where a reply is to have a form: grammars compiled for a tokenizer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from threading import BoundedSemaphore, Lock, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastvlm.decoding.json_schema import for_library, has_finite_reply
from fastvlm.decoding.structured import StructuredOutput
from fastvlm.functional.errors import InputError, first_line
from fastvlm.functional.lru import LruBytes

WHITESPACE = r"\x20|\x0A\x20{0,16}|\x0A\x09{1,8}"
"""What may stand between two tokens of JSON: a space, or a line break and an indentation.

A model that isn't sure would otherwise go on with whitespace to the end of the reply.
"""
MAX_COMPILED = 64
"""The maximum number of compiled grammars that are kept for a tokenizer."""
MASKS_KEPT = 64
"""The maximum number of positions whose masks a request keeps: more than any draft has."""

LEXER_FUEL = 300_000
"""What reading a regular expression may cost: a third of a second, in which it can't be cut."""
STEP_LEXER_FUEL = 100_000
"""What it may cost for one mask, which the engine waits for: a tenth of a second."""
MAX_ITEMS = 10_000
"""What may come next at one place, such as the names of an object's optional properties."""
MAX_CHARACTERS = 2**16
"""The longest form. The library's limits don't count everything that a long one costs."""
COMPILE_SECONDS = 0.75
"""How long a form may take to compile; the library reads some for minutes, and can't be stopped."""
MAX_COMPILING = 2
"""The maximum number of forms that are compiled at once, with those that nobody waits for."""


class Constraint:
    """The tokens that a grammar allows after a reply so far.

    An answer depends on the tokens that are asked about alone, in whatever order: what is behind it
    goes back to where two prefixes part, so nothing needs to be told of rejected drafts. A mask is
    computed once for a drafter and the target. It may be used from several threads.

    Args:
        grammar: The compiled grammar (llguidance's `LLMatcher`), which is copied.
        vocabulary_size: The number of the tokenizer's tokens.
        end_token_ids: Tokens that end the reply, allowed exactly where the grammar is complete.
    """

    def __init__(self, grammar: Any, vocabulary_size: int, end_token_ids: Iterable[int]) -> None:
        self.end_token_ids = frozenset(end_token_ids)
        self.error = ""
        """What the library said where it could not go on."""
        self._grammar, self._matcher = grammar, grammar.deep_copy()
        # A bit for each token, in whole words of 32 as the library writes them.
        self._bits = np.zeros((vocabulary_size + 31) // 32, dtype=np.int32)
        self._size = vocabulary_size
        self._tokens: list[int] = []
        """What the matcher has consumed."""
        self._masks: dict[int, Tensor] = {}
        """Masks after so many of these tokens."""
        self._lock = Lock()

    def allowed(self, prefix: Sequence[int], size: int) -> Tensor | None:
        """Return which tokens may follow a reply so far: booleans on the CPU, (size,).

        None where the prefix has ended, or has a token that the grammar forbids. No token at all
        where the grammar can't go on with this tokenizer, or is too complex there.

        Args:
            prefix: The reply so far, with what is drafted of it.
            size: The number of logits; those without a token of the tokenizer are not allowed.
        """
        with self._lock:
            mask = self._mask(list(prefix))
        if mask is None or len(mask) == size:
            return mask
        fitted = mask.new_zeros(size)
        shared = min(size, len(mask))
        fitted[:shared] = mask[:shared]
        return fitted

    def masks(self, reply: Sequence[int], drafted: Sequence[int], size: int) -> Tensor:
        """Return which tokens may follow a reply and each token of a draft: (positions, size).

        Behind a token that the grammar forbids, and behind the end, anything is allowed: no token
        there can become part of the reply.

        Args:
            reply: The reply before the draft.
            drafted: The draft.
            size: The number of logits.

        Raises:
            InputError: The reply itself has a token that the grammar forbids.
        """
        found: list[Tensor] = []
        for count in range(len(drafted) + 1):
            mask = self.allowed([*reply, *drafted[:count]], size)
            if mask is None:
                break
            found.append(mask)
        if not found:
            raise InputError("The reply so far doesn't have the form that it is to have.")
        found += [torch.ones_like(found[0])] * (len(drafted) + 1 - len(found))
        return torch.stack(found)

    def forced(self, prefix: Sequence[int], most: int, size: int) -> list[int]:
        """Return the tokens that must follow a reply so far, as no other is allowed.

        Args:
            prefix: The reply so far, with what is drafted of it.
            most: The maximum number of them.
            size: The number of logits.
        """
        found: list[int] = []
        while len(found) < most:
            mask = self.allowed([*prefix, *found], size)
            if mask is None or int(mask.sum()) != 1:
                break
            found.append(int(mask.int().argmax()))
        return found

    def _mask(self, prefix: list[int]) -> Tensor | None:
        shared = min(len(prefix), len(self._tokens))
        while prefix[:shared] != self._tokens[:shared]:
            shared -= 1
        if shared == len(prefix) and shared in self._masks:
            # The matcher may be further on, and will be asked about that next.
            return self._masks[shared]
        rest = prefix[shared:]
        if not self.end_token_ids.isdisjoint(rest):
            return None
        self._go_back(shared)
        consumed = self._matcher.try_consume_tokens(rest) if rest else 0
        self._tokens += rest[:consumed]
        if consumed < len(rest):
            return None
        mask = self._masks[len(prefix)] = self._computed()
        self._masks.pop(len(prefix) - MASKS_KEPT, None)
        return mask

    def _go_back(self, length: int) -> None:
        """Forget what was consumed beyond a length."""
        behind = len(self._tokens) - length
        if behind:
            self._matcher.rollback(behind)
            for gone in range(length + 1, len(self._tokens) + 1):
                self._masks.pop(gone, None)
            del self._tokens[length:]

    def _computed(self) -> Tensor:
        """Return what is allowed where the matcher is: (vocabulary,)."""
        ends = [token for token in self.end_token_ids if token < self._size]
        self._bits.fill(0)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        complete = self._matcher.is_accepting()
        allowed = np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little")
        if self._matcher.is_error() and not complete:
            # It stays in error for ever, but what has led here may be a draft that is rejected.
            self.error = self._matcher.get_error()
            self._matcher, self._tokens, self._masks = self._grammar.deep_copy(), [], {}
            allowed.fill(0)
        if np.count_nonzero(allowed) == 1:
            # A text that is certain is spelt as the tokenizer does, which may not know its letters.
            only = int(allowed.argmax())
            allowed[only] = self._matcher.validate_tokens([only]) == 1
        allowed[ends] = complete
        return torch.from_numpy(allowed).view(torch.bool)


class SpeltTokens:
    """A tokenizer as the bytes of its tokens, by what they add to the text of another.

    Args:
        tokenizer: The tokenizer.
        size: The number of its tokens.
        end_token_ids: Tokens that end a reply.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, size: int, end_token_ids: Iterable[int]
    ) -> None:
        self._tokenizer: Any = tokenizer
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        special = {token for token, one in added.items() if one.special} | {*end_token_ids}
        self.eos_token_id = min(end_token_ids)
        self.special_token_ids = sorted(special)
        texts = tokenizer.batch_decode([[token] for token in range(size)])
        letters = (token for token, text in enumerate(texts) if len(text) == 1 and text.isalpha())
        before = next((token for token in letters if token not in special), 0)
        pairs = tokenizer.batch_decode([[before, token] for token in range(size)])
        self.tokens = [
            (texts[token] if token in special else pair[len(texts[before]) :]).encode()
            for token, pair in enumerate(pairs)
        ]

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class GrammarCompiler:
    """Compiles what replies are to look like for a tokenizer, and keeps it.

    It needs the package llguidance, and may be used from several threads.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._compiled = LruBytes(MAX_COMPILED)
        self._vocabulary: tuple[tuple[int, frozenset[int]], Any] | None = None
        """The tokenizer as the library knows it, and its size and end tokens then."""
        self._lock = Lock()
        self._room = BoundedSemaphore(MAX_COMPILING)

    def constraint(
        self, form: StructuredOutput | None, end_token_ids: Iterable[int]
    ) -> Constraint | None:
        """Return the constraint of one reply.

        Args:
            form: What the reply is to look like; None for no constraint.
            end_token_ids: Tokens that end the reply.

        Raises:
            InputError: llguidance is not installed, the form can't be compiled or takes too long,
                no text has it, or the model has no token to end a reply with.
        """
        if form is None:
            return None
        size = len(self.tokenizer)
        ends = frozenset(token for token in end_token_ids if token < size)
        if not ends:
            raise InputError(
                "A reply of a given form needs a token that ends it; the model has none."
            )
        grammar = self._compiled.get((size, ends, form))
        if grammar is None:
            grammar = self._compiled_in_time(form, size, ends)
        return Constraint(grammar, size, ends)

    def _compiled_in_time(self, form: StructuredOutput, size: int, ends: frozenset[int]) -> Any:
        """Return a compiled form, which is kept even if it is done when nobody waits any more."""
        library = _library()
        # What the tokenizer takes is no form's fault.
        vocabulary = self._known_vocabulary(size, ends)
        made: list[Any] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                grammar = _compiled(library, form, vocabulary)
                _check_possible(form, Constraint(grammar, size, ends), size)
                self._compiled.put((size, ends, form), grammar, 1)
                made.append(grammar)
            except Exception as error:  # noqa: BLE001 (whoever waits raises it)
                failed.append(error)
            finally:
                self._room.release()

        deadline = time.monotonic() + COMPILE_SECONDS
        if not self._room.acquire(timeout=COMPILE_SECONDS):
            raise InputError("Other forms take long to compile; try again in a moment.")
        # A thread that nobody waits for must not keep the interpreter from ending.
        thread = Thread(target=work, name="fastvlm-grammar", daemon=True)
        thread.start()
        thread.join(max(deadline - time.monotonic(), 0))
        if failed:
            raise failed[0]
        if not made:
            raise InputError(
                f"The {form.kind} can't be used: it takes more than {COMPILE_SECONDS:g} s to"
                " compile; it is too large or too complex."
            )
        return made[0]

    def _known_vocabulary(self, size: int, ends: frozenset[int]) -> Any:
        """Return the tokenizer as the library knows it, which takes a second for a large one."""
        from llguidance import LLTokenizer
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._vocabulary is None or self._vocabulary[0] != (size, ends):
                if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
                    raise InputError(
                        "A reply's form needs a tokenizer of the library tokenizers; this is a"
                        f" {type(self.tokenizer).__name__}."
                    )
                try:
                    made = from_tokenizer(self.tokenizer, n_vocab=size, eos_token=sorted(ends))
                except ValueError:
                    # It reads byte-level BPE and SentencePiece with bytes; others are spelt out.
                    spelt: Any = SpeltTokens(self.tokenizer, size, ends)
                    made = LLTokenizer(spelt, n_vocab=size, eos_token=sorted(ends))
                self._vocabulary = (size, ends), made
            return self._vocabulary[1]


def _compiled(library: Any, form: StructuredOutput, vocabulary: Any) -> Any:
    """Return a form as the library's matcher has it.

    Raises:
        InputError: The library can't read it.
    """
    length = sum(map(len, form.value or ""))
    if length > MAX_CHARACTERS:
        raise InputError(
            f"The {form.kind} can't be used: it has {length:,} characters, and at most"
            f" {MAX_CHARACTERS:,} are read."
        )
    try:
        grammar = library.LLMatcher(
            vocabulary,
            _grammar_text(library, form),
            log_level=0,
            limits=library.LLParserLimits(
                initial_lexer_fuel=LEXER_FUEL,
                step_lexer_fuel=STEP_LEXER_FUEL,
                max_items_in_row=MAX_ITEMS,
                verbose_errors=False,
            ),
        )
    except ValueError as error:
        raise InputError(f"The {form.kind} can't be used: {first_line(error)}.") from error
    if grammar.is_error():
        said = first_line(ValueError(grammar.get_error()))
        raise InputError(f"The {form.kind} can't be used: {said}.")
    return grammar


def _check_possible(form: StructuredOutput, constraint: Constraint, size: int) -> None:
    """Refuse a form that no reply can have.

    Raises:
        InputError: What it asks for has no beginning, or no end.
    """
    possible = constraint.allowed([], size)
    if possible is None or not possible.any():
        raise InputError(f"No reply can have this form ({form.kind}).")
    if form.kind == "json" and not has_finite_reply(json.loads(form.value)):
        raise InputError("No reply can have this form (json): what it asks for has no end.")


def _grammar_text(library: Any, form: StructuredOutput) -> str:
    """Return a form in the library's own notation."""
    matcher = library.LLMatcher
    if form.kind == "grammar":
        return str(matcher.grammar_from_lark(form.value))
    if form.kind == "regex":
        return str(matcher.grammar_from_regex(form.value))
    if form.kind == "choice":
        return str(matcher.grammar_from_regex("|".join(map(_escaped, form.value))))
    schema: Any = {"type": "object"}
    if form.kind == "json":
        schema = for_library(json.loads(form.value))
    overrides = {"whitespace_pattern": WHITESPACE, "lenient": False}
    return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=overrides))


def _escaped(text: str) -> str:
    """Return a regular expression, as Rust has them, of nothing but a text."""
    return "".join(one if one.isalnum() else rf"\x{{{ord(one):x}}}" for one in text)


def _library() -> Any:
    """Return llguidance.

    Raises:
        InputError: It is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "A reply's form needs the package llguidance: pip install 'fastvlm[structured]'."
        ) from error
    return llguidance
