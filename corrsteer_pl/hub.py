"""Reasons why loading from the Hugging Face Hub failed, as text that says what to do."""

from typing import Any

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# From the HTTP library that huggingface_hub uses, requests or httpx.
HTTP_ERROR = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
# What loading from the Hub raises.
HUB_ERRORS: Any = (OSError, ValueError, KeyError, RuntimeError, HTTP_ERROR)
UNREACHABLE = (
    "it is not in the local cache and the Hub cannot be reached: download it once with a network, with 'hf download', "
    "or give the path of a local copy"
)
GATED = "it is gated: accept its terms on huggingface.co, then log in with 'hf auth login' or set HF_TOKEN"
REASONS: dict[tuple[type[BaseException], ...], str] = {
    (GatedRepoError,): GATED,
    (RevisionNotFoundError,): "the Hub has it, but not that revision",
    (RepositoryNotFoundError,): "there is no such folder, and the Hub has nothing of that name for you",
    (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError): UNREACHABLE,
    (EntryNotFoundError,): "the Hub has it, but without the file that is needed",
}


def reason(error: BaseException) -> str:
    r"""The reason of a failed load, found in the chain of causes of an exception; else the first line of its message.

    Example:
        >>> reason(ValueError("no weights here\nTraceback ..."))
        'no weights here'
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    # LocalEntryNotFoundError is an EntryNotFoundError too, and GatedRepoError a RepositoryNotFoundError: order counts.
    for kinds, text in REASONS.items():
        if any(isinstance(cause, kinds) for cause in causes):
            return text
    if isinstance(error, HTTP_ERROR) and not isinstance(error, HfHubHTTPError):
        return UNREACHABLE
    if "gated" in str(error):
        # The datasets library says so in words alone.
        return GATED
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
