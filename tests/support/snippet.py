"""The code of a model card, run as a reader would: beside an image, with the places of folders filled in."""

from __future__ import annotations

import io
import os
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image


def run_beside_an_image(code: str, image: Image.Image | None = None, folders: Path | None = None) -> str:
    """What the code prints.

    Args:
        code (`str`): The code; it opens `image.png`.
        image (`PIL.Image.Image`, *optional*): The image.
        folders (`Path`, *optional*): Where backbone and adapter lie, which the code has as `path/to`.
    """
    if folders is not None:
        code = code.replace("path/to", folders.as_posix())
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        # TIFF can hold all modes; PIL looks at the content, not at the ending.
        (image or Image.new("RGB", (32, 24))).save(Path(folder, "image.png"), format="TIFF")
        os.chdir(folder)
        try:
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, "README.md", "exec"), {})
        finally:
            os.chdir(before)
    return printed.getvalue().strip()
