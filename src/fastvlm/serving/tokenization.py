"""`/tokenize` and `/detokenize`: the tokens of prompts and the text of tokens, as vLLM does."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from fastvlm.functional.errors import InputError, first_line
from fastvlm.serving.bodies import Body
from fastvlm.serving.chat import messages_of
from fastvlm.serving.errors import ApiError
from fastvlm.serving.protocol import ChatMessage
from fastvlm.serving.settings import ServerSettings
from fastvlm.vlm import VisionLanguageModel

TokenId = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Return the tokens of a text, without a chat template.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        add_special_tokens: Whether the tokenizer adds those that it begins or ends texts with.

    Raises:
        InputError: The tokenizer refuses the text.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # of whatever its settings make it stumble over
        raise InputError(f"The tokenizer refuses the prompt: {first_line(error)}.") from error


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], param: str) -> str:
    """Return the text of tokens, special ones included.

    Args:
        tokenizer: The model's tokenizer.
        token_ids: The tokens.
        param: The field of the request, for an error.

    Raises:
        ApiError: One is not the tokenizer's.
    """
    size = len(tokenizer)
    wrong = [token for token in token_ids if token >= size]
    if wrong:
        raise ApiError(f"The tokens are 0 to {size - 1}; got {wrong[0]}.", param=param)
    text = tokenizer.decode(token_ids)
    assert isinstance(text, str)  # of one list of tokens
    return text


class TokenizeRequest(Body):
    """The body of `/tokenize`: a text, or a dialogue, which the chat template is applied to."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False
    image_size: Annotated[int, Field(ge=64, le=16384)] | None = None

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ApiError: There is something.
        """
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("Give either prompt or messages.", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise ApiError(
                "The chat template adds a dialogue's special tokens itself.",
                param="add_special_tokens",
            )
        if self.messages is None and self.image_size is not None:
            raise ApiError("image_size is for messages.", param="image_size")

    async def answer(self, vlm: VisionLanguageModel, settings: ServerSettings) -> dict[str, Any]:
        """Return the tokens, with a placeholder for every visual token.

        Raises:
            ApiError: The request is refused.
            FastVlmError: The model refuses it.
        """
        self.check()
        return await asyncio.to_thread(self._answer, vlm, settings)

    def _answer(self, vlm: VisionLanguageModel, settings: ServerSettings) -> dict[str, Any]:
        if self.messages is None:
            # A text may have no token, or the placeholder of an image: it isn't decoded.
            assert self.prompt is not None  # as checked
            tokens = encode(vlm.tokenizer, self.prompt, self.add_special_tokens is not False)
        else:
            shown: Any = {} if self.image_size is None else {"image_size": self.image_size}
            messages = messages_of(self.messages, settings)
            tokens = vlm.prompts.inputs(messages, **shown)["input_ids"][0].tolist()
        found = {"count": len(tokens), "max_model_len": vlm.decoder.context, "tokens": tokens}
        if self.return_token_strs:
            found["token_strs"] = vlm.tokenizer.convert_ids_to_tokens(tokens)
        return found


class DetokenizeRequest(Body):
    """The body of `/detokenize`."""

    model: str | None = None
    tokens: list[TokenId]

    async def answer(self, vlm: VisionLanguageModel) -> dict[str, Any]:
        """Return the tokens' text.

        Raises:
            ApiError: One is not the tokenizer's.
        """
        return {"prompt": await asyncio.to_thread(decode, vlm.tokenizer, self.tokens, "tokens")}
