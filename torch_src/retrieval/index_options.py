"""--index and --search_params, checked before faiss sees them: with some values it crashes or never ends."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch_src.runtime.errors import UserError, first_line, is_out_of_memory
from torch_src.runtime.options import in_range, limit_text

CODES = r"SQ(?:4|6|8|fp16|bf16)|PQ(?P<m>\d+)(?:x(?P<bits>\d+)(?:fsr?)?(?:_\d+)?)?"
# The parts of a factory string, which commas separate; NSG, LSQ, RQ, LSH and others are not supported.
PARTS = tuple(map(re.compile, (
    "Flat", "L2norm", "RFlat", "RaBitQ", CODES, rf"Refine\((?:Flat|{CODES})\)",
    r"(?:OPQ|PCAW?R?|RR)\d+(?:_\d+)?", r"HNSW(?P<links>\d+)(?:_(?:Flat|" + CODES + "))?",
    r"IVF(?P<lists>\d+)(?:_HNSW(?P<links>\d+))?",
)))  # fmt: skip
NUMBERS = {"links": (2, 512), "lists": (1, 10**6), "m": (1, 4096), "bits": (1, 12)}  # by name in PARTS
# name of a search parameter, as the end of faiss's own names -> range
PARAMETERS = {
    "nprobe": (1, 10**6), "efSearch": (1, 10**6), "k_factor": (1, 1000), "k_factor_rf": (1, 1000),
    "max_codes": (0, 10**12), "ht": (0, 1024), "qb": (0, 8),
}  # fmt: skip
EXAMPLES = "HNSW32 or IVF4096,PQ192x4fs,Refine(SQfp16)"


def check_factory(factory: str) -> None:
    """UserError for a factory string with an unknown part, or a number that faiss does not survive."""
    for part in factory.split(","):
        found = next((match for pattern in PARTS if (match := pattern.fullmatch(part))), None)
        if not found:
            raise UserError(
                f"--index {factory}: not a faiss index, or {part!r} is not supported (try {EXAMPLES})"
            )
        for name, text in found.groupdict().items():
            if text and not in_range(int(text[:18]), *NUMBERS[name]):
                raise UserError(f"--index {factory}: {text} in {part}: must be {limit_text(*NUMBERS[name])}")
        if re.search(r"[A-Za-z_]0+(?!\d)", part):
            raise UserError(f"--index {factory}: 0 in {part}: must be at least 1")


def check_search_params(params: str) -> None:
    """UserError unless the parameters are name=number,name=number with numbers in their ranges."""
    for parameter in filter(None, params.split(",")):
        name, _, text = parameter.partition("=")
        limits = PARAMETERS.get(name.removeprefix("quantizer_"))
        if limits is None:
            known = ", ".join(PARAMETERS)
            raise UserError(f"--search_params {parameter}: unknown name (expected one of {known})")
        number = re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", text)
        whole = "k_factor" in name or (number and not number[1])
        if not number or not whole or not in_range(float(text), *limits):
            kind = "a number" if "k_factor" in name else "an integer"
            raise UserError(f"--search_params {parameter}: expected {kind}, {limit_text(*limits)}")


@contextmanager
def faiss_errors(factory: str) -> Iterator[None]:
    """Turn what faiss raises (RuntimeError) into a UserError; being out of memory is reported as such."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = faiss_reason(error)
        raise UserError(f"--index {factory}: not possible with these vectors ({reason})") from error


def faiss_reason(error: RuntimeError) -> str:
    """Return the message of an error of faiss without the location in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", first_line(error))[-200:]
