"""Images that clients send: data URLs, or files below a folder that the operator names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from fastvlm.functional.errors import InputError
from fastvlm.serving.errors import ApiError
from fastvlm.vision.loading import load_image


def image_at(url: str, folder: Path | None, param: str) -> Image.Image:
    """Return the image of a URL.

    Args:
        url: A data URL, or a `file://` URL of a file below the folder.
        folder: Where files may be read; None for nowhere.
        param: The field of the request, for an error.

    Raises:
        ApiError: It is another URL, or no image.
    """
    scheme = urlsplit(url[:16]).scheme.lower()
    if scheme == "file":
        url = str(file_below(url, folder, param))
    elif scheme != "data":
        raise ApiError(
            "An image is given as a data URL (data:image/jpeg;base64,...); this server fetches none"
            " from elsewhere.",
            param=param,
            code="invalid_image_url",
        )
    try:
        return load_image(Path(url) if scheme == "file" else url)
    except InputError as error:
        raise ApiError(str(error), param=param, code="invalid_image") from error


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
