"""Check the file that a command writes a picture to."""

from pathlib import Path


def picture_path(path: Path) -> Path:
    """Return the path that a picture is written to, with the ending .png if it has none.

    Needs Matplotlib.

    Raises:
      ValueError: Matplotlib cannot write files with this ending, or the file is not writable.
    """
    from matplotlib.figure import Figure

    path = path if path.suffix else path.with_name(f"{path.name}.png")
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"{path} ends in {path.suffix}, which Matplotlib cannot write; it writes "
            f"{', '.join(formats)}"
        )
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
    if is_new:
        path.unlink()
    return path
