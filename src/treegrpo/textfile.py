"""Reading the user's text files, with errors that say which file is wrong and where.

Left out: what the text means.
"""

from pathlib import Path

from treegrpo.errors import UserError


def read_utf8(path: Path, description: str, error: type[UserError]) -> str:
    """Text of a UTF-8 file, a byte order mark dropped.

    Args:
        path: the file.
        description: what the file is, to begin the messages with: "prompt file".
        error: the class to raise.

    Raises:
        error: the file is missing, unreadable or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{description} {path} does not exist") from None
    except IsADirectoryError:
        raise error(f"{description} {path} is a folder; must be a file") from None
    except OSError as reason:
        raise error(f"{description} {path} cannot be read: {reason.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        line = data.count(b"\n", 0, reason.start) + 1
        raise error(
            f"{description} {path} is not UTF-8: byte 0x{data[reason.start]:02x} "
            f"at offset {reason.start}, line {line}"
        ) from None
