"""Images that clients send: data URLs, files of a folder, or URLs of hosts that are listed."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from fastvlm.functional.errors import InputError
from fastvlm.language.decoder_inputs import DecoderInputs
from fastvlm.serving.errors import ApiError
from fastvlm.serving.remote_images import RemoteImages, allowed_hosts
from fastvlm.serving.settings import ServerSettings
from fastvlm.vision.loading import load_image

BASE64_BYTES, BASE64_CHARACTERS = 3, 4
"""Bytes that some characters of base64 stand for."""


class ImageOpener:
    """Opens the images of one request, within the limits of a request.

    Args:
        settings: The limits, and where images may come from.
        remote: What fetches images; None for what the settings say.
    """

    def __init__(self, settings: ServerSettings, remote: RemoteImages | None = None) -> None:
        self.settings = settings
        self.remote = remote or RemoteImages(
            allowed_hosts(settings.image_hosts), settings.max_image_bytes, settings.image_seconds
        )
        self.images = self.pixels = 0

    def open(self, url: str, param: str) -> Image.Image:
        """Return the image of a URL.

        Args:
            url: A data URL, a `file://` URL of a file below the folder, or a URL of a listed host.
            param: The field of the request, for an error.

        Raises:
            ApiError: It is another URL, no image, or one too many.
        """
        settings = self.settings
        self.images += 1
        if self.images > settings.max_images:
            raise ApiError(f"A request has at most {settings.max_images} images here.", param=param)
        source = self._source(url, param)
        try:
            image = load_image(source)
        except InputError as error:
            raise ApiError(str(error), param=param, code="invalid_image") from error
        self.pixels += image.width * image.height
        if self.pixels > settings.max_image_pixels:
            raise ApiError(
                f"The images of a request have at most {settings.max_image_pixels:,} pixels here.",
                param=param,
                code="image_too_large",
            )
        return image

    def _source(self, url: str, param: str) -> str | Path | bytes:
        """Return what `load_image` loads: a data URL, a file that may be read, or bytes."""
        limit = self.settings.max_image_bytes
        scheme = url.partition(":")[0].lower()
        size = 0
        source: str | Path | bytes = url
        if scheme == "data":
            size = len(url.partition(",")[2].rstrip("=")) * BASE64_BYTES // BASE64_CHARACTERS
        elif scheme == "file":
            source = file_below(url, self.settings.image_folder, param)
            size = source.stat().st_size
        elif scheme in ("http", "https"):
            source = self.remote.fetch(url, param)
        else:
            raise ApiError(
                "An image is given as a data URL (data:image/jpeg;base64,...).",
                param=param,
                code="invalid_image_url",
            )
        if size > limit:
            raise ApiError(
                f"The image is larger than {limit:,} bytes.", param=param, code="image_too_large"
            )
        return source


def file_below(url: str, folder: Path | None, param: str) -> Path:
    """Return the file of a `file://` URL, if it is below the folder that clients may read.

    Raises:
        ApiError: There is no such folder, or the file is elsewhere or missing.
    """
    refused = ApiError(
        "This server reads no such file.", param=param, code="invalid_image_url", status=403
    )
    if folder is None:
        raise refused
    try:
        root, file = folder.resolve(), Path(unquote(urlsplit(url).path)).resolve()
        inside = file.is_relative_to(root) and file.is_file()
    except (OSError, ValueError) as error:
        raise refused from error
    if not inside:
        raise refused
    return file


def check_image_tokens(inputs: DecoderInputs, image_token: int | None, limit: int | None) -> None:
    """Refuse a prompt with too many visual tokens.

    Args:
        inputs: The prompt.
        image_token: The placeholder of visual tokens; None for a model without one.
        limit: The most visual tokens; those that cross-attention sees count as well.

    Raises:
        ApiError: There are more.
    """
    if limit is None:
        return
    tokens = 0 if image_token is None else inputs.token_ids.count(image_token)
    tokens += 0 if inputs.encoder_states is None else len(inputs.encoder_states)
    if tokens > limit:
        raise ApiError(
            f"The request has {tokens:,} visual tokens; the limit is {limit:,}. Send fewer or"
            " smaller images.",
            param="messages",
            code="too_many_image_tokens",
        )
