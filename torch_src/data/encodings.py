"""The encoding of a text that is not UTF-8, to read it or to report how to convert it."""

import codecs
from collections import Counter

GZIPPED = b"\x1f\x8b"  # first bytes of a gzip file; no UTF-8 text begins with them
GZIPPED_FILE = "is gzipped (expected plain text); unpack it with gunzip"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# The 3,755 characters that GB2312 lists as common begin with these bytes; they are most of any Chinese text.
COMMON_BYTES = {bytes([first]) for first in range(0xB0, 0xD8)}
MIN_COMMON = 0.7  # share of them in text that is GB18030; in Big5 and damaged UTF-8 it is below a half


def is_gb18030(raw: bytes) -> bool:
    """Return whether bytes that are not UTF-8 read like Chinese in GB18030, which decodes almost anything.

    The last character may be incomplete.
    """
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(raw)
    except UnicodeDecodeError:
        return False
    counts = Counter(text)
    letters = {char: count for char, count in counts.items() if char > "\x7f" and char.isalnum()}
    common = sum(n for char, n in letters.items() if char.encode("gb2312", "ignore")[:1] in COMMON_BYTES)
    return common >= MIN_COMMON * max(1, sum(letters.values()))


def known_encoding(raw: bytes) -> str:
    """Return the encoding of bytes that are not UTF-8; empty when unknown, as in a damaged file."""
    return "UTF-16" if raw.startswith(UTF16) else "GB18030" if is_gb18030(raw) else ""


def not_utf8(raw: bytes, path: object, where: str = "") -> str:
    """Return the message about bytes of a file that are not UTF-8: what they are, and how to convert them."""
    if raw.startswith(GZIPPED):
        return GZIPPED_FILE
    found = known_encoding(raw)
    if not found:
        return (
            f"not UTF-8{where}: a damaged file, or another encoding; `iconv -f ENCODING -t UTF-8` converts it"
        )
    return f"not UTF-8 but {found}; convert it: iconv -f {found} -t UTF-8 {path} > {path}.utf8"
